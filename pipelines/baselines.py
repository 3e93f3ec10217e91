"""What a simpler method reaches on the same splits: the yardstick that says whether a pretrained model was needed."""

from __future__ import annotations

import re

import numpy as np

from pipelines.data import targets_of
from pipelines.evaluate import evaluate, softmax_and_cross_entropy
from pipelines.evaluate_multi_label import choose_thresholds, evaluate_multi_label, sigmoid

PENALTIES = (0.1, 1.0, 10.0, 100.0)  # C of scikit-learn's logistic regression, strong penalty to weak
MOST_TERMS = 100_000  # words and pairs of words, the most frequent ones
MOST_EXAMPLES = 20_000  # that it learns from, so that it takes a minute at most; tables are ordered by hash
WORD = r"\b\w\w+\b"
NEVER = -30.0  # logit of a class that no example it learns from has


def tfidf_baseline(splits, seed: int = 0) -> dict:
    """TF-IDF of words and pairs of words with logistic regression, scored as the run itself is.

    A count weighs 1 + log(count). Of several L2 penalties the one with the best validation loss is taken; of several
    labels each is a yes-or-no of its own, its threshold chosen on validation. The two texts of a pair have
    terms of their own. Words are what lies between blanks and signs: of languages that write without blanks it asks
    too little. After Wang and Manning 2012, "Baselines and Bigrams".

    Args:
        splits: `pipelines.data.Splits` of texts.

    Returns:
        name; metric, value, interval (95%, [low, high]) and half_width of the headline on the test set; accuracy on
        the test set (None of several labels); c, the penalty; terms, how many there are.
    """
    train = splits.train.slice(0, MOST_EXAMPLES)
    inputs = term_weights([train, splits.val, splits.test])
    targets = [targets_of(table, len(splits.class_names)) for table in (train, splits.val, splits.test)]
    fit = _fit_yes_or_no if splits.multi_label else _fit_one_of_many
    tried = [(c, fit(inputs[0], targets[0], c)) for c in PENALTIES]
    c, logits_of = min(tried, key=lambda pair: _loss(targets[1], pair[1](inputs[1]), splits.multi_label))
    logits = logits_of(inputs[2])
    if splits.multi_label:
        thresholds = choose_thresholds(targets[1], sigmoid(logits_of(inputs[1])))
        chosen = sigmoid(logits) >= thresholds
        figures = evaluate_multi_label(targets[2], logits, chosen, thresholds, splits.class_names, seed)
    else:
        figures = evaluate(targets[2].argmax(axis=1), logits, splits.class_names, seed=seed)
    headline = figures["headline"]
    return {
        "name": "TF-IDF with logistic regression",
        **{key: headline[key] for key in ("metric", "value", "interval", "half_width")},
        "accuracy": figures.get("accuracy"),
        "c": c,
        "terms": int(inputs[0].shape[1]),
    }


def baseline_verdict(headline: dict, baseline: dict, nouns: str = "texts") -> str:
    """What one would tell a colleague: how far the run's headline lies above a baseline's, or below."""
    words, gain = headline["metric"].replace("_", " "), headline["value"] - baseline["value"]
    name = baseline["name"]
    inside = name[0].lower() + name[1:] if name[1:2].islower() else name  # in a sentence; TF-IDF stays as it is
    if gain <= 0:
        how = "better" if gain else "as well"
        return f"{name} does {how} on the same {nouns}: {words} {baseline['value']:.3f} ({-gain:+.3f})."
    return f"{gain:+.3f} {words} over {inside} ({baseline['value']:.3f})."


def term_weights(tables: list) -> list:
    """Sparse matrices [rows, terms] of tables with the columns text (and text_b); terms are those of the first."""
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    parts = []
    for column in ("text", "text_b"):
        if column in tables[0].column_names:
            texts = tables[0][column].to_pylist()
            # Words as scikit-learn's own default sees them; single signs where no text has a word.
            pattern = WORD if any(re.search(WORD, text) for text in texts) else r"\S"
            vectorizer = TfidfVectorizer(
                token_pattern=pattern, ngram_range=(1, 2), sublinear_tf=True, max_features=MOST_TERMS
            )
            first = vectorizer.fit_transform(texts)
            parts.append([first, *(vectorizer.transform(table[column].to_pylist()) for table in tables[1:])])
    return [scipy.sparse.hstack(columns, format="csr") for columns in zip(*parts)]


def _fit_one_of_many(inputs, targets: np.ndarray, c: float):
    """A function: matrix [n, terms] -> logits [n, classes], learned from targets with one 1 per row."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    present = np.flatnonzero(targets.any(axis=0))
    model = LogisticRegression(C=c, solver="newton-cg", max_iter=1000)
    if len(present) > 1:
        with threadpool_limits(1, "blas"):  # threads that wait for work on matrices so small cost ten times the work
            model.fit(inputs, targets.argmax(axis=1))

    def logits_of(matrix):
        logits = np.full((matrix.shape[0], targets.shape[1]), NEVER)
        if len(present) == 1:
            logits[:, present] = 0
        elif len(present) == 2:  # scikit-learn gives only the second one's
            logits[:, present] = np.stack([np.zeros(matrix.shape[0]), model.decision_function(matrix)], axis=1)
        else:
            logits[:, present] = model.decision_function(matrix)
        return logits

    return logits_of


def _fit_yes_or_no(inputs, targets: np.ndarray, c: float):
    """As `_fit_one_of_many` for any number of 1 per row: a model of two classes for each column."""
    models = [_fit_one_of_many(inputs, np.stack([1 - column, column], axis=1), c) for column in targets.T]

    def logits_of(matrix):
        pairs = [model(matrix) for model in models]
        return np.stack([pair[:, 1] - pair[:, 0] for pair in pairs], axis=1)

    return logits_of


def _loss(targets: np.ndarray, logits: np.ndarray, multi_label: bool) -> float:
    """Mean cross-entropy in nats."""
    if multi_label:
        return float(np.logaddexp(0.0, np.where(targets > 0, -logits, logits)).mean())
    return float(softmax_and_cross_entropy(targets.argmax(axis=1), logits)[1].mean())
