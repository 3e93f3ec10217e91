"""What one would advise before training: how deep to go and how much to augment, from a few plain figures.

The prior is the field's rule of thumb: hundreds to thousands of examples suit feature extraction, thousands to tens of
thousands light fine-tuning, more the whole backbone. The probes are the evidence that moves it.
"""

from __future__ import annotations

from pipelines.facts import NOUNS

LIGHT_FROM, FULL_FROM = 2_000, 20_000  # training examples from which the rule of thumb goes a step deeper
SATURATED = 0.97  # accuracy of a linear probe above which a deeper phase has little left to win
NEAR = 0.5  # share of the raw input's mistakes that features of a near domain make good
APART = 0.03  # neighbours within so much of the probe: classes lie apart without any learning
EVEN, UNEVEN = 2, 5  # largest class over smallest: up to EVEN balanced, beyond UNEVEN a matter to act on
FEW, MANY = 100, 1_000  # examples per class below which images want strong, from which plain augmentation
DEPTHS = (
    ("head", "feature extraction (`--depth head`)"),
    ("light", "light fine-tuning of the top blocks (`--depth 2`)"),
    ("full", "fine-tuning the whole backbone (`--depth full`)"),
)


def advice(kind: str, counts: list[int], probe=None, neighbours=None, raw=None, examples=None) -> str:
    """A paragraph for people: the data, how near the backbone's domain is, and so which depth and augmentation.

    Args:
        kind: "image", "text" or "audio".
        counts: training examples of each class; of several labels each counts for all it has.
        probe: accuracy 0 to 1 of a linear probe on the pretrained features, or None where there is none.
        neighbours, raw: that of nearest neighbours, and of a linear model of pixels or term weights; None likewise.
        examples: training examples (None: the sum of counts, as it is with one label each).
    """
    examples = sum(counts) if examples is None else examples
    depth, why = recommended_depth(examples, probe, raw)
    sentences = [about_data(kind, counts, examples), about_domain(kind, probe, neighbours, raw)]
    sentences.append(f"{why} {dict(DEPTHS)[depth]}; `--depth auto` climbs from there only if validation gains.")
    far = probe is not None and raw is not None and probe <= raw
    sentences.append(about_augmentation(kind, counts, depth, far))
    return " ".join(sentence for sentence in sentences if sentence)


def run_advice(gathered: dict) -> str:
    """`advice` from what a run knows of itself: `gathered` of `pipelines.results.write_results`.

    The probes are those of the transfer verdict, so that both say the same. Without them the head phase is the linear
    probe: beside a simpler method where one was scored, both on the test set, else by itself, on validation.
    """
    kind, counts, head = gathered["kind"], gathered["class_counts"]["train"], gathered["phases"][0]
    examples = gathered["examples"]["train"]
    if "thresholds" in gathered:  # of several labels accuracy says nothing that could be compared
        return advice(kind, counts, examples=examples)
    probes = gathered.get("transfer", {}).get("probes")
    if probes:
        return advice(kind, counts, probes["pretrained"]["accuracy"], raw=probes["raw"]["accuracy"], examples=examples)
    raw = next((row["accuracy"] for row in gathered.get("baselines", [])), None)
    validated = head["history"][max(head["best_epoch"], 1) - 1]["val_accuracy"]
    probe = validated if raw is None else head["test"]["accuracy"]
    return advice(kind, counts, probe, raw=raw, examples=examples)


def recommended_depth(examples: int, probe=None, raw=None) -> tuple[str, str]:
    """The depth ("head", "light" or "full") for so many training examples, and the words that lead to it."""
    prior = 0 if examples < LIGHT_FROM else 1 if examples < FULL_FROM else 2
    if probe is not None and raw is not None and probe <= raw:
        deeper = min(prior + 1, 2)
        reason = "The features have to change to be of use here, so go deeper than so few examples suggest:"
        return DEPTHS[deeper][0], reason if deeper > prior else "So much data, so far from the backbone's, asks for"
    if probe is not None and probe >= SATURATED and prior:
        return "head", f"A linear head on frozen features gets {probe:.1%} right already, so begin with"
    how_many = ("Hundreds to a few thousand", "Thousands to tens of thousands of", "Tens of thousands of")[prior]
    return DEPTHS[prior][0], f"{how_many} examples suit"


def about_data(kind: str, counts: list[int], examples: int) -> str:
    """How many examples there are of how many classes, and how evenly they are spread."""
    present = [count for count in counts if count]
    smallest, largest = min(present), max(present)
    spread = f"{smallest:,} to {largest:,} each" if smallest < largest else f"{smallest:,} each"
    text = f"{examples:,} training {NOUNS[kind]} in {len(present)} classes ({spread}"
    if largest <= EVEN * smallest:
        return f"{text}: well balanced)."
    if largest <= UNEVEN * smallest:
        return f"{text}: somewhat uneven)."
    return f"{text}: uneven). Judge by macro F1, and try `--class-weights balanced` if rare classes matter."


def about_domain(kind: str, probe, neighbours, raw) -> str:
    """How near the backbone's domain is, as far as the probes tell; "" without a probe."""
    if probe is None:
        return ""
    raw_name = {"image": "pixels", "text": "words", "audio": "log-mel statistics"}[kind]
    text = f"A linear probe on the pretrained features gets {probe:.1%} right"
    if raw is not None:
        text += f", one on the bare {raw_name} {raw:.1%}: "
        if probe <= raw:
            text += "the backbone's domain is far from this one"
        elif probe - raw >= NEAR * (1 - raw):
            text += "the backbone's domain is near"
        else:
            text += "the backbone's domain helps, but is some way off"
    if neighbours is not None:
        apart = neighbours >= probe - APART
        lie = "lie apart without any learning" if apart else "are told apart only by a learned head"
        text += f"; nearest neighbours reach {neighbours:.1%}, so the classes {lie}"
    return f"{text}."


def about_augmentation(kind: str, counts: list[int], depth: str, far: bool = False) -> str:
    """How much to augment; "" for texts, which are not changed at random. far: the bare input says more."""
    if kind == "text":
        return ""
    per_class = sum(counts) / max(sum(count > 0 for count in counts), 1)
    if depth == "head":
        return "Augmentation plays no part while only the head trains."
    if kind == "audio":
        noisier = "`--augmentation spec-augment` adds masks where there are few or noisy clips."
        return f"Noise, shifts and crops (the default) are the right amount of augmentation; {noisier}"
    if far:
        return "Crops without flips (`--augmentation crop`) suit it: mirror images may not show the same here."
    if per_class < FEW:
        return f"With {per_class:,.0f} images a class go for variety: `--augmentation rand-augment`, more epochs."
    if per_class < MANY:
        return "Flips and crops (the default) are the right amount of augmentation."
    return "With so many images a class flips and crops are plenty; `--augmentation none` is worth a try."
