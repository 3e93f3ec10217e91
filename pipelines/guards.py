"""Forgetting: how far fine-tuning takes a backbone from what it was, and a limit to that.

After each epoch the features of a few fixed training examples are compared with those of the pretrained backbone. The
features come through the feed of the phase: through what lies above the cut, on cached activations, where it has them.
No TensorFlow here, so that the sentences are at hand everywhere.
"""

from __future__ import annotations

import numpy as np

from pipelines import ladder
from pipelines.console import console

PROBE_EXAMPLES = 128  # most training examples that are compared
LEAST_EXAMPLES = 5  # of them: fewer are not compared; the unbiased estimate of CKA needs four
NEIGHBOURS = 10


def linear_cka(features: np.ndarray, others: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of features of the same examples, [n, d] and [n, e], n >= 4.

    1 where one is a rotation or a multiple of the other, near 0 (perhaps a little below) where they have nothing in
    common. Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited"; with the unbiased estimate
    of HSIC (Song et al. 2012, "Feature Selection via Dependence Maximization", equation 5), as Nguyen et al. 2021 take
    it: the plain estimate of unrelated features is d / (d + n), 0.9 for 1,280 features of 128 examples. Features that
    are all alike, as those of a network that has collapsed, give 0.
    """
    one, other = hollow_products(features), hollow_products(others)
    norms = unbiased_hsic(one, one) * unbiased_hsic(other, other)
    return float(unbiased_hsic(one, other) / norms**0.5) if norms > 0 else 0.0


def hollow_products(features: np.ndarray) -> np.ndarray:
    """Products of the centred features of every two examples, [n, n] float64, with 0 on the diagonal."""
    centred = np.asarray(features, np.float64)
    centred = centred - centred.mean(axis=0)
    products = centred @ centred.T
    np.fill_diagonal(products, 0.0)
    return products


def unbiased_hsic(one: np.ndarray, other: np.ndarray) -> float:
    """The unbiased estimate of HSIC from two matrices [n, n] with 0 on the diagonal."""
    count = len(one)
    sums, other_sums = one.sum(axis=0), other.sum(axis=0)
    total = sums.sum() * other_sums.sum() / ((count - 1) * (count - 2))
    return float(((one * other).sum() + total - 2 / (count - 2) * sums @ other_sums) / (count * (count - 3)))


def neighbour_overlap(features: np.ndarray, others: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Mean share of each example's nearest others that are the same by two sets of features [n, d] and [n, e].

    Nearest by Euclidean distance. Unrelated features share neighbours / (n - 1) of them by chance.

    Args:
        neighbours: at most all others.
    """
    count = min(neighbours, len(features) - 1)
    shared = [np.intersect1d(*pair).size for pair in zip(nearest(features, count), nearest(others, count))]
    return float(np.mean(shared)) / count


def nearest(features: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest others of each example, [n, count], in no order."""
    values = np.asarray(features, np.float64)
    values = values - values.mean(axis=0)  # for precision: differences of large numbers otherwise
    lengths = (values**2).sum(axis=1)
    distances = lengths[:, None] + lengths - 2 * values @ values.T
    np.fill_diagonal(distances, np.inf)
    return np.argpartition(distances, count - 1, axis=1)[:, :count]


class ForgettingGuard:
    """What a backbone was, and how far it is from that; called after each epoch of a phase that thaws some of it."""

    def __init__(self, model, train, limit: float = 0.0, summed=lambda found: found):
        """train: the training table; limit: least CKA that a phase may have, 0 for none.

        summed: of several workers, that have a share of the probe each: an array -> its sum over all.
        """
        self.model, self.limit, self.summed = model, limit, summed
        # By content, so that it is the same examples in every run on this data, and of all classes.
        self.probe = train.take(np.argsort(train["id"].to_numpy())[:PROBE_EXAMPLES])
        self.pretrained, self.values = None, {}  # features [n, d]; id of a weight -> (weight, pretrained value)

    def begin(self, feed):
        """Watch a phase on a `pipelines.feeds.Feed`, what it trains being thawed; returns the guard.

        Before the first phase, the backbone must be as it was loaded; before others, all but what the earlier thawed.
        """
        from models import freezing  # imports Keras

        self.pooled, self.batches = feed.pooled, list(feed.batches(self.probe))
        if self.pretrained is None:
            self.pretrained = self.features()
        for weight in freezing.moving_weights(self.model):
            self.values.setdefault(id(weight), (weight, weight.numpy()))
        return self

    def features(self) -> np.ndarray:
        """Pooled features of the probe, [n, d] float32, by the weights as they are."""
        found = np.zeros((self.probe.num_rows, self.model.backbone.feature_size), np.float32)
        for inputs, _, _, rows in self.batches:
            rows, values = rows.numpy(), np.asarray(self.pooled(inputs))
            if values.ndim == 3:  # frames of speech, zeros in the padding
                values = values.sum(axis=1) / np.maximum((values != 0).any(axis=2).sum(axis=1), 1)[:, None]
            found[rows[rows >= 0]] = values[rows >= 0]
        return self.summed(found)

    def weight_distances(self) -> dict[str, float]:
        """For each block that was thawed: the length of its weights' way from their start, over their length then."""
        distances = {}
        for block in self.model.blocks:
            thawed = [self.values[id(weight)] for weight in block.weights if id(weight) in self.values]
            if thawed:
                way = sum(float(((weight.numpy() - value) ** 2).sum()) for weight, value in thawed)
                length = sum(float((value**2).sum()) for _, value in thawed)
                distances[block.name] = (way / length) ** 0.5 if length else 0.0
        return distances

    def look(self) -> tuple[dict, bool]:
        """How far the backbone is now from what it was.

        Returns:
            cka, neighbour_overlap, source_agreement where the checkpoint has its original classifier (share of the
            probe to which that answers as before), and weight_distance by block; nothing where there are fewer than
            LEAST_EXAMPLES. And whether the limit is passed.
        """
        if self.probe.num_rows < LEAST_EXAMPLES:
            return {}, False
        features = self.features()
        figures = {
            "cka": linear_cka(features, self.pretrained),
            "neighbour_overlap": neighbour_overlap(features, self.pretrained),
        }
        if self.model.backbone.source_head is not None:
            kernel, bias = self.model.backbone.source_head
            answers = [(values @ kernel + bias).argmax(axis=1) for values in (features, self.pretrained)]
            figures["source_agreement"] = float(np.mean(answers[0] == answers[1]))
        return figures | {"weight_distance": self.weight_distances()}, figures["cka"] < self.limit

    def __call__(self) -> tuple[dict, bool]:
        """As `look`; where the limit is passed the user is told."""
        figures, passed = self.look()
        if passed:
            console.print(
                f"  Stopped: linear CKA to the pretrained features is {figures['cka']:.2f}, "
                f"below --forgetting-limit {self.limit:g}."
            )
        return figures, passed


# ---------------------------------------------------------------- what is said of it


def watched(phases: list[dict]) -> list[dict]:
    """The phases with figures on forgetting."""
    return [phase for phase in phases if "cka" in phase["history"][0]]


def story(phases: list[dict], limit: float) -> dict:
    """What metrics.json and the report say of forgetting; the figures of each epoch are in the phases' history.

    Returns:
        Nothing where no phase was watched. Else sentence; limit; probe_examples (at most); neighbours; kept: the
        figures of the epoch whose weights were kept (not given where those are the pretrained ones); wise_ft: what
        `pipelines.weight_average.average_kept` chose, where that was asked for and something was fine-tuned.
    """
    if not watched(phases):
        return {}
    best = ladder.best_phase(phases)
    told = {"limit": limit, "probe_examples": PROBE_EXAMPLES, "neighbours": NEIGHBOURS}
    if "cka" not in best["history"][0]:
        return {"sentence": "Yes: the head alone was kept, on the backbone as it was loaded.", **told}
    row = best["history"][best["best_epoch"] - 1]
    if "wise_ft" in best:
        told["wise_ft"] = best["wise_ft"]
        row = best["wise_ft"]["kept"]
    names = ("cka", "neighbour_overlap", "source_agreement", "weight_distance")
    told["kept"] = {name: row[name] for name in names if name in row}
    return {"sentence": sentence(told["kept"]), **told}


def sentence(figures: dict) -> str:
    """The figures of the weights that were kept, in words."""
    cka = figures["cka"]  # words for a figure that has no natural steps; it follows them
    how = "Nearly" if cka >= 0.9 else "In part" if cka >= 0.5 else "Hardly"
    agreement = ""
    if "source_agreement" in figures:
        share = figures["source_agreement"]
        agreement = f", and the backbone's original classifier would answer {100 * share:.0f}% of them as before"
    return (
        f"{how}: linear CKA to the pretrained features is {cka:.2f}, "
        f"{100 * figures['neighbour_overlap']:.0f}% of the nearest neighbours of an example are the same{agreement}."
    )


def verdicts(phases: list[dict], limit: float) -> list[str]:
    """What one would tell a colleague: which phases the limit stopped, and what averaging weights changed."""
    said = []
    for phase in watched(phases):
        if phase["forgot"]:
            said.append(
                f"Fine-tuning {ladder.name_of(phase)} was stopped in epoch {phase['epochs']}: linear CKA to the "
                f"pretrained features fell to {phase['history'][-1]['cka']:.2f} (limit {limit:g})."
            )
        if "wise_ft" in phase and phase["wise_ft"]["share"] < 1:
            said.append(
                f"Averaged with the pretrained weights (WiSE-FT): {100 * phase['wise_ft']['share']:.0f}% "
                f"fine-tuned has the lowest validation loss."
            )
    return said
