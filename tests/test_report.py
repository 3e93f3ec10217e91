"""The report page: well-formed, self-contained, escaped, complete, and written whole or not at all."""

from __future__ import annotations

import html.parser
import io
import os
import re

import numpy
import PIL.Image
import pyarrow
import pytest

from pipelines import report
from pipelines.evaluate import evaluate
from pipelines.report import write_report

VOID = {"meta", "img", "br", "link", "input", "hr", "col"}
ADDRESSES = ("src", "href", "xlink:href", "srcset")
OPTIONAL = ("Worst mistakes", "Learning curves", "What was trainable", "Where the time went", "How it is served")


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and gathers text, attributes and the addresses that would be loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.loaded, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self.loaded += [attributes[key] for key in ADDRESSES if attributes.get(key)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


def picture():
    buffer = io.BytesIO()
    noise = numpy.random.default_rng(0).integers(256, size=(96, 96), dtype="uint8")
    PIL.Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def metrics_for(class_names, examples=400, positive=None, weights=None, seed=0):
    generator = numpy.random.default_rng(seed)
    labels = generator.choice(len(class_names), size=examples, p=weights)
    logits = generator.normal(size=(examples, len(class_names))).astype("float32")
    logits[numpy.arange(examples), labels] += 3
    return evaluate(labels, logits, class_names, positive=positive, bootstrap_samples=50)


def phase(name, epochs, kept=True):
    frozen = {"batch_norm": "frozen", "trainable_parameters": 0, "learning_rate": 0.0}
    blocks = [{"name": f"block{index}", "layers": 8, "parameters": 5000, **frozen} for index in range(6)]
    head = {"name": "head", "layers": 2, "parameters": 717, "trainable_parameters": 717, "batch_norm": "none"}
    if name == "fine_tune":
        blocks[5] = {**blocks[5], "trainable_parameters": 4321, "learning_rate": 1e-4}
    return {
        "name": name, "epochs": epochs, "seconds": 83.0, "trainable_parameters": 717, "best_epoch": epochs,
        "learning_rate": 1e-3, "kept": kept, "test": {"accuracy": 0.7512, "loss": 0.61},
        "blocks": [*blocks, {**head, "learning_rate": 1e-3}],
        "history": [
            {"epoch": epoch, "loss": 1 / epoch, "accuracy": 0.5, "val_loss": 1.1 / epoch, "val_accuracy": 0.6}
            for epoch in range(1, epochs + 1)
        ],
    }  # fmt: skip


def make_facts(class_names=("ant", "bee", "cat"), with_pictures=True, **more):
    class_names = list(class_names)
    mistakes = [
        {
            "id": f"{index:08x}", "path": f"photos/{index}.png" if with_pictures else None,
            "true": class_names[0], "predicted": class_names[1], "probability": 0.987, "true_probability": 0.002,
            "picture": picture() if with_pictures else None,
        }
        for index in range(12)
    ]  # fmt: skip
    return {
        "title": "photos", "created": "2025-01-02T03:04:05+00:00", "kind": "image",
        "command": "graft image --data photos/", "verdicts": ["Two blocks were worth it: +2.4 points."],
        "warnings": ["3 files carry an EXIF rotation."], "class_names": class_names,
        "examples": {"train": 1029, "val": 220, "test": 400, "skipped": 2},
        "class_counts": {split: [321] * len(class_names) for split in ("train", "val", "test")},
        "metrics": {"test": metrics_for(class_names), "val": metrics_for(class_names, seed=1)},
        "phases": [phase("head", 3), phase("fine_tune", 2)], "mistakes": mistakes,
        "settings": {"seed": 0, "depth": 2},
        "backbone": {"name": "efficientnet_lite0", "parameters": 3372856, "feature_size": 1280,
                     "image_size": [160, 160], "source": {"package": "wheel", "version": "1.0"}},
        "data": {"fingerprint": "9f3a", "white_level": 255, "duplicates": None},
        "timings": {"data": 6.2, "head": 41.0, "fine_tune": 152.0},
        "serving": {"folder": "serving/photos/1", "files": 200, "largest_difference": 3e-7, "target": "2.20"},
        "versions": {"python": "3.11"}, "machine": "2 CPU cores", **more,
    }  # fmt: skip


def page_of(folder, facts):
    return Page(write_report(folder, facts).read_text("utf-8"))


def test_the_page_is_well_formed_self_contained_and_small(tmp_path):
    names = [f"class {index}" for index in range(15)]
    path = write_report(tmp_path, make_facts(names))
    page = Page(path.read_text("utf-8"))

    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 1_500_000
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    assert all(address.startswith(("#", "data:")) for address in page.loaded), page.loaded
    assert sum(address.startswith("data:image/png;base64,") for address in page.loaded) == 12
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {address[1:] for address in page.loaded if address.startswith("#")} <= set(identifiers)


def test_it_tells_the_whole_story(tmp_path):
    facts = make_facts()
    text = page_of(tmp_path, facts).text
    figures = facts["metrics"]["test"]
    low, high = (f"{100 * bound:.1f}%" for bound in figures["headline"]["interval"])
    assert f"{100 * figures['accuracy']:.1f}%" in text
    assert f"95% interval {low} to {high}" in text
    assert "accuracy on 400 test images" in text
    for row in figures["per_class"]:
        assert f"{row['f1']:.3f}" in text and f"{100 * row['precision']:.1f}%" in text
    for words in (
        "Two blocks were worth it: +2.4 points.", "3 files carry an EXIF rotation.", "Head only", "75.1%",
        "Always answering the largest class", "→ bee", "99% sure, truth <1%", "photos/0.png", "400 images",
        "block4 … block0", "(5 blocks)", "4,321", "1.0e-4", "1 min 23 s", "1,029 images", "2 min 32 s",
        "tensorflow/serving:2.20.0", "/v1/models/photos:predict", "between probabilities 3.0e-7",
        *OPTIONAL, "graft image --data photos/", "efficientnet_lite0", "2 CPU cores", "Guo et al. 2017",
    ):  # fmt: skip
        assert words in text, words
    assert "None" not in text and "nan" not in text and "Duplicates" not in text


def test_names_and_paths_are_escaped(tmp_path):
    nasty = "<script>alert(1)</script>"
    facts = make_facts([nasty, 'quote " onload="x', "{{ 7 * 7 }} $a_b$ 混凝土 مرحبا"], title="<b>bold</b>")
    facts["mistakes"][0]["path"] = "x/<img src=x onerror=alert(2)>.png"
    facts["warnings"] = ["bad <i>file</i>"]
    raw = write_report(tmp_path, facts).read_text("utf-8")
    page = Page(raw)
    assert nasty not in raw and "<img src=x" not in raw and "<i>file" not in raw and "<b>bold" not in raw
    assert nasty in page.text and "{{ 7 * 7 }} $a_b$ 混凝土 مرحبا" in page.text
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


def test_a_path_that_is_not_unicode_is_shown_all_the_same(tmp_path):
    facts = make_facts()
    facts["mistakes"][0]["path"] = os.fsdecode(b"photos/caf\xe9.png")
    assert "photos/caf\\udce9.png" in page_of(tmp_path, facts).text


def test_without_inputs_mistakes_show_their_ids(tmp_path):
    page = page_of(tmp_path, make_facts(with_pictures=False))
    assert "00000007" in page.text
    assert "img" not in {tag for tag, _ in page.elements}


def test_an_evaluation_alone_makes_a_page_without_the_optional_sections(tmp_path):
    full = make_facts()
    facts = {key: full[key] for key in ("title", "kind", "class_names")}
    page = page_of(tmp_path, {**facts, "metrics": {"test": full["metrics"]["test"]}})
    assert "What is taken for what" in page.text and "How far to trust" in page.text
    assert not any(title in page.text for title in (*OPTIONAL, "Reproduce"))
    page = page_of(tmp_path, {**facts, "metrics": {"val": full["metrics"]["val"]}})
    assert "accuracy on 400 validation images" in page.text


def test_two_classes_with_a_positive_one(tmp_path):
    names = ["healthy", "ill"]
    figures = metrics_for(names, positive="ill", weights=[0.85, 0.15])
    text = page_of(tmp_path, make_facts(names, metrics={"test": figures})).text
    assert f"{figures['macro_f1']:.3f}" in text and "macro F1 on 400 test images" in text
    assert f"sensitivity {100 * figures['positive']['sensitivity']:.1f}% at specificity" in text
    assert f"from a probability of {figures['positive']['threshold']:.3f} on" in text


def test_many_classes_get_pairs_instead_of_an_unreadable_matrix(tmp_path):
    def cells(count):
        names = [f"class {index}" for index in range(count)]
        page = page_of(tmp_path, make_facts(names, with_pictures=False))
        classes = [attributes.get("class", "") for _, attributes in page.elements]
        return sum(value.startswith("hit") for value in classes), page.text

    matrix, text = cells(15)
    assert matrix == 15 and "Most frequent mix-ups" in text
    matrix, text = cells(45)
    assert matrix == 45 and "most frequent mix-ups among 45 classes" in text
    matrix, text = cells(60)
    assert matrix == 0 and "The whole matrix is in metrics.json" in text
    assert "The other 40 classes" in text


def test_worst_classes_come_first_and_absent_ones_last(tmp_path):
    figures = evaluate([0, 0, 1, 1], numpy.eye(3)[[0, 0, 0, 1]] * 5, ["good", "poor", "absent"])
    rows = report.class_rows(figures, {"train": [7, 8, 9]})
    assert [row["name"] for row in rows] == ["poor", "good", "absent"]
    assert (rows[0]["taken_for"], rows[0]["often"], rows[0]["train"]) == ("good", 1, 8)
    page_of(tmp_path, make_facts(["good", "poor", "absent"], metrics={"test": figures}))


def test_a_phase_that_was_not_kept_says_so(tmp_path):
    text = page_of(tmp_path, make_facts(phases=[phase("head", 3), phase("fine_tune", 2, kept=False)])).text
    assert "Fine-tuning, not kept" in text and "not kept: validation got worse" in text
    assert "A pale phase made validation worse" in text


def test_a_phase_stopped_before_its_first_epoch_is_listed(tmp_path):
    stopped = {**phase("fine_tune", 2, kept=False), "epochs": 0, "history": [], "test": None}
    assert "Fine-tuning" in page_of(tmp_path, make_facts(phases=[phase("head", 3), stopped])).text


def test_batch_norm_has_columns_only_where_it_trains(tmp_path):
    """Frozen everywhere is one sentence, and a model without any says nothing of it: the table fits the page."""
    phases = [phase("head", 3), phase("fine_tune", 2)]
    text = page_of(tmp_path, make_facts(phases=phases)).text
    assert "BatchNorm layers stayed frozen everywhere" in text and "Learning rate BatchNorm" not in text
    phases[1]["blocks"][5]["batch_norm"] = "trains"
    text = page_of(tmp_path, make_facts(phases=phases)).text
    assert "stayed frozen everywhere" not in text and text.count("Learning rate BatchNorm") == 2
    for block in phases[0]["blocks"] + phases[1]["blocks"]:
        block["batch_norm"] = "none"
    assert "BatchNorm" not in page_of(tmp_path, make_facts(phases=phases)).text


def test_the_same_facts_give_the_same_page(tmp_path):
    facts = make_facts()
    assert write_report(tmp_path, facts).read_bytes() == write_report(tmp_path, facts).read_bytes()


def test_nothing_partial_is_left_when_writing_fails(tmp_path):
    (tmp_path / "report.html").mkdir()  # in the way of the rename, after everything was written
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(tmp_path, make_facts())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_is_replaced_whole_and_readable_by_all(tmp_path):
    (tmp_path / "report.html").write_text("old")
    path = write_report(tmp_path, make_facts(title="new"))
    assert "new" in path.read_text("utf-8") and path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.44, "0.4 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_in_words(seconds, words):
    assert report.duration(seconds) == words


def test_no_probability_is_rounded_to_certainty():
    assert [report.probability(value) for value in (0.001, 0.984, 0.999, None)] == ["<1%", "98%", ">99%", "–"]


def text_mistakes(*texts):
    from pipelines.mistakes import shortened

    mistakes = make_facts(with_pictures=False)["mistakes"]
    return [{**mistakes[0], "texts": [shortened(text) for text in texts]}, *mistakes[1:]]


def test_worst_mistakes_show_the_texts_escaped_and_shortened(tmp_path):
    mistakes = text_mistakes("<mark>bold</mark> & שלום", "x" * 1234)
    page = page_of(tmp_path, make_facts(kind="text", mistakes=mistakes))
    assert "<mark>bold</mark> & שלום" in page.text and "mark" not in {tag for tag, _ in page.elements}
    assert "x" * 400 in page.text and "x" * 401 not in page.text
    assert "(400 of 1,234 characters)" in page.text
    assert ("blockquote", {"dir": "auto"}) in page.elements


def test_a_text_run_speaks_of_texts(tmp_path):
    serving = {"folder": "serving/topics/1", "files": 200, "largest_difference": 3e-7, "target": "2.20"}
    backbone = {"name": "minilm_l6", "parameters": 22713216, "feature_size": 384, "source": {}}
    facts = make_facts(
        kind="text", command="graft text", mistakes=text_mistakes("a"), serving=serving, title="topics",
        backbone={**backbone, "preprocess": {"sequence_length": 128}}, warnings=[], data={},
    )  # fmt: skip
    text = page_of(tmp_path, facts).text
    assert "Text classification with Graft" in text and "accuracy on 400 test texts" in text
    assert "texts of up to 128 tokens" in text and "takes texts and answers labels" in text
    assert """curl -d '{"instances": ["a text"]}' http://localhost:8501/v1/models/topics:predict""" in text
    assert not re.search("image|picture|photo", text, re.IGNORECASE)
    pairs = page_of(tmp_path, {**facts, "serving": {**serving, "pairs": True}}).text
    assert """'{"instances": [{"text_a": "a text", "text_b": "its second"}]}'""" in pairs


def test_baselines_are_bars_of_the_yardstick(tmp_path):
    baseline = {"name": "TF-IDF with logistic regression", "metric": "accuracy", "value": 0.6789}
    text = page_of(tmp_path, make_facts(baselines=[baseline])).text
    assert re.search(r"TF-IDF with logistic regression 67\.9%", text)
    other = {**baseline, "metric": "macro_f1"}  # of another figure, which no bar of these could be compared with
    assert "TF-IDF" not in page_of(tmp_path, make_facts(baselines=[other])).text


@pytest.mark.parametrize("pairs", [False, True])
def test_worst_mistakes_of_texts(pairs):
    from pipelines.mistakes import worst_mistakes

    columns = {"id": ["a", "b", "c"], "text": ["one", "two " * 200, "three"], "label": [0, 1, 0]}
    columns |= {"text_b": ["1", "2", "3"]} if pairs else {}
    probabilities = numpy.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], "float32")
    mistakes = worst_mistakes(pyarrow.table(columns), probabilities, ["no", "yes"], 255, "all")
    assert [mistake["id"] for mistake in mistakes] == ["c", "b"]
    second = [{"text": "2", "of": None}] if pairs else []
    assert mistakes[1]["texts"] == [{"text": "two " * 100, "of": 800}, *second]
    hidden = worst_mistakes(pyarrow.table(columns), probabilities, ["no", "yes"], 255, "none")
    assert [mistake["id"] for mistake in hidden] == ["c", "b"] and "three" not in str(hidden)
    assert not any(mistake.get("texts") or mistake["path"] or mistake["picture"] for mistake in hidden)


def test_a_model_card_of_a_text_run_speaks_of_texts():
    from pipelines.model_card import model_card

    backbone = {"name": "minilm_l6", "parameters": 22713216, "preprocess": {"sequence_length": 128}, "source": {}}
    card = model_card(make_facts(kind="text", backbone=backbone, command="graft text", settings={"data": "topics"},
                                 warnings=[], data={"fingerprint": "9f3a"}))  # fmt: skip
    assert "pipeline_tag: text-classification" in card and "22,713,216 parameters, 128 tokens" in card
    assert "classes a text belongs to: ant, bee, cat" in card and "2 were empty and left out" in card
    assert not re.search("image|picture|pixel|camera", card)
