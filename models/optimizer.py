"""Optimizers with a learning rate per block, weight decay that follows it, and clipping that is
the same on any number of replicas.

Keras has no parameter groups. Scaling gradients does nothing under Adam, so the multiplier scales
the applied update and the decoupled weight decay. Three private hooks of Keras 3.15.1 are used:
`_get_variable_index`, `_apply_weight_decay` and `_all_reduce_sum_gradients`; tests/test_optimizer.py and
tests/test_training.py hold them in place.
"""

from __future__ import annotations

import keras
import tensorflow as tf

from models.classifier import Classifier

TOP_BLOCK_MULTIPLIER = 0.1  # the top block learns ten times slower than the head,
BLOCK_DECAY = 0.8  # each block below it 0.8 times as fast as the one above (DESIGN: learning rates)


def block_multipliers(model: Classifier) -> dict[str, float]:
    """Multiplier of the base rate per block name: 0.1 * 0.8 ** (d - 1), d = 1 for the top block; head 1."""
    names = [block.name for block in model.blocks]
    rates = {name: TOP_BLOCK_MULTIPLIER * BLOCK_DECAY**depth for depth, name in enumerate(reversed(names))}
    return {**rates, "head": 1.0}


def weight_rules(model: Classifier) -> dict[int, tuple[float, bool]]:
    """id(weight) -> (multiplier, takes weight decay) for every weight of the model.

    By layer object, not by path: paths repeat in some families. Only matrices and kernels decay; norms, whatever
    their names, and other vectors do not, nor do biases, which in attention have a row per head.
    """
    rates = block_multipliers(model)
    rules = {}
    for name, weights in [(b.name, b.weights) for b in model.blocks] + [("head", model.head.weights)]:
        for weight in weights:
            rules[id(weight)] = (rates[name], len(weight.shape) > 1 and weight.name != "bias")
    return rules


def make_optimizer(
    name: str,
    model: Classifier,
    learning_rate,
    weight_decay: float = 0.01,
    clip_norm: float | None = None,
):
    """Build an optimizer over the model's trainable weights, as they are flagged now.

    Call it inside the strategy's scope, after freezing.

    Args:
        name: a key of OPTIMIZERS. Usual rates for a new head: AdamW 1e-3; SGD (Nesterov momentum 0.9) 1e-2 to 1e-1;
            Lion 3 to 10 times lower than AdamW's, with a decay as much higher (Chen et al. 2023, arXiv 2302.06675);
            Adafactor 1e-2, since its steps are in proportion to each weight's root mean square (Shazeer and Stern
            2018, arXiv 1804.04235). Its relative step is off, so that the rate is the schedule's, though Keras never
            lets it pass 1 / sqrt(update).
        learning_rate: float or Keras schedule; the head's rate.
        weight_decay: decoupled, per update: weight -= rate * multiplier * weight_decay * weight.
        clip_norm: global norm to which the all-reduced gradient is clipped; None for no clipping.
    """
    kind, options = OPTIMIZERS[name]
    optimizer = kind(
        learning_rate, weight_decay=weight_decay, rules=weight_rules(model), clip_norm=clip_norm, **options
    )
    optimizer.build(model.trainable_weights)
    return optimizer


def warmup_cosine(base_rate: float, steps: int, warmup_share: float) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up from 0 over `warmup_share` of the steps, then a cosine down to 0."""
    warmup_steps = max(1, round(steps * warmup_share)) if warmup_share else 0
    if warmup_steps == 0:
        return keras.optimizers.schedules.CosineDecay(base_rate, max(1, steps))
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup_steps), warmup_target=base_rate, warmup_steps=warmup_steps
    )


class _LayerwiseMixin:
    """Per-weight multipliers, decay that follows them, and clipping after the all-reduce."""

    def __init__(self, learning_rate, *, rules: dict[int, tuple[float, bool]], clip_norm: float | None, **options):
        super().__init__(learning_rate, **options)
        # Through __dict__: Keras' attribute tracking would wrap these for checkpoints.
        self.__dict__["_rules"] = rules
        self.__dict__["_reduced_clip_norm"] = clip_norm

    def build(self, variables):
        super().build(variables)
        # In the order of the optimizer's own variable indices.
        self.__dict__["_multipliers"] = tuple(self._rules[id(variable)][0] for variable in variables)
        self.__dict__["_decays"] = tuple(self._rules[id(variable)][1] for variable in variables)

    def update_step(self, gradient, variable, learning_rate):
        multiplier = self._multipliers[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * multiplier)

    def _apply_weight_decay(self, variables):
        if self.weight_decay is None:
            return

        def decay(strategy, variables):
            for variable in variables:
                index = self._get_variable_index(variable)
                if not self._decays[index]:
                    continue
                factor = self.learning_rate * self.weight_decay * self._multipliers[index]
                strategy.extended.update(
                    variable.value,
                    lambda value, factor=factor: value.assign_sub(value * tf.cast(factor, value.dtype)),
                    group=False,
                )

        tf.__internal__.distribute.interim.maybe_merge_call(decay, self._distribution_strategy, variables)

    def _all_reduce_sum_gradients(self, grads_and_vars):
        # Keras clips per replica, before the sum, so two devices would differ from one.
        pairs = super()._all_reduce_sum_gradients(grads_and_vars)
        if self._reduced_clip_norm is None:
            return pairs
        gradients, _ = tf.clip_by_global_norm([gradient for gradient, _ in pairs], self._reduced_clip_norm)
        return [(gradient, variable) for gradient, (_, variable) in zip(gradients, pairs)]


class LayerwiseAdamW(_LayerwiseMixin, keras.optimizers.AdamW):
    """AdamW with a multiplier per weight."""


class LayerwiseSGD(_LayerwiseMixin, keras.optimizers.SGD):
    """SGD with a multiplier per weight."""


class LayerwiseLion(_LayerwiseMixin, keras.optimizers.Lion):
    """Lion with a multiplier per weight."""


class LayerwiseAdafactor(_LayerwiseMixin, keras.optimizers.Adafactor):
    """Adafactor with a multiplier per weight."""


OPTIMIZERS = {  # name of --optimizer -> class, its options
    "adamw": (LayerwiseAdamW, {}),
    "sgd": (LayerwiseSGD, {"momentum": 0.9, "nesterov": True}),
    "lion": (LayerwiseLion, {}),
    "adafactor": (LayerwiseAdafactor, {"relative_step": False}),
}
