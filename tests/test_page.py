"""The page at `/` of the embedded server, used in a real browser: Chromium, headless, driven by playwright."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import shutil
import subprocess
import time
import urllib.parse

import pytest
import tensorflow as tf

from models.classifier import Classifier
from models.text import load_text_folder
from tests.embedded_server import ROOT, ask, predict, running
from tests.test_export import CLASSES, encoded_image, tiny_classifier

pytestmark = pytest.mark.slow  # a server, exports and a browser of its own

ODD = 'pairs </script> & "é"'  # a model's name may be anything but a path
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1100, "height": 860}
WAIT_MS = 20_000
DROP = """([name, content]) => {
    const moved = new DataTransfer();
    moved.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
    return moved;
}"""
CONTRASTS = """() => {
    const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const luminance = (colour) => channels(colour).slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = (one) => {
        const colour = getComputedStyle(one).backgroundColor;
        return channels(colour)[3] === 0 ? ground(one.parentElement) : colour;
    };
    const texts = [...document.body.querySelectorAll("*")].filter((one) => one.checkVisibility()
        && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
    return texts.map((one) => {
        const [low, high] = [getComputedStyle(one).color, ground(one)].map(luminance).sort((a, b) => a - b);
        return [(high + 0.05) / (low + 0.05), one.outerHTML.slice(0, 80)];
    });
}"""  # of every text against what is behind it, as WCAG 2.2 defines contrast


def write_pairs_model(folder) -> None:
    """Two texts in; out come seven labels by their thresholds, two of them equal, and a doubt about equal texts."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name=name) for name in ("text_a", "text_b")])
    def serve(text_a, text_b):
        probabilities = tf.tile([[0.2, 0.9, 0.5, 0.5, 0.3, 0.1, 0.05]], [tf.size(text_a), 1])
        scores, order = tf.math.top_k(probabilities, k=5)
        names = tf.constant(["plain", "<b>best</b>", "first of two", "second of two", "שלום", "left out", "low"])
        return {
            "labels": tf.gather(names, order),
            "scores": scores,
            "probabilities": probabilities,
            "chosen": probabilities >= tf.constant([0.9, 0.8, 0.6, 0.4, 0.9, 0.9, 0.01]),
            "error": tf.fill(tf.shape(text_a), ""),
            "unsure": text_a == text_b,
        }

    module = tf.Module()
    module.serve = serve
    tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: folder} of three models, and a fourth that takes numbers."""
    from serving.export import export_image_classifier
    from serving.export_text import export_text_classifier

    folder = tmp_path_factory.mktemp("models")
    model = tiny_classifier(len(CLASSES))
    export_image_classifier(model, model.backbone.preprocess, CLASSES, folder / "photos" / "1")
    backbone = load_text_folder(ROOT / "tests" / "fixtures" / "text" / "bert")
    export_text_classifier(
        Classifier(backbone, 3), backbone.preprocess, ["Frage", "answer", "回答"], folder / "texts" / "1"
    )
    write_pairs_model(folder / "pairs" / "1")
    module = tf.Module()
    module.serve = tf.function(lambda x: {"y": x}, input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    tf.saved_model.save(module, str(folder / "numbers" / "1"), signatures={"serving_default": module.serve})
    return {
        "photos": folder / "photos",
        "texts": folder / "texts",
        ODD: folder / "pairs",
        "numbers": folder / "numbers",
    }


@pytest.fixture(scope="module")
def port(models, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "models.config"
    entries = [f"config {{ name: {json.dumps(name)} base_path: '{folder}' }}" for name, folder in models.items()]
    config.write_text(f"model_config_list {{ {' '.join(entries)} }}", "utf-8")
    with running("--model_config_file", config, name="photos") as (rest, _, _):
        yield rest


@pytest.fixture(scope="module")
def browser():
    reason = "needs playwright: pip install playwright (without its own browsers)"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # root needs that
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, port, name: str = "photos", may_say: str = "nothing", **settings):
    """The page, with this model chosen; whatever it does, it asks this server only and has no errors."""
    context = browser.new_context(**{"viewport": DESK, **settings})
    context.set_default_timeout(WAIT_MS)
    page, said, hosts = context.new_page(), [], set()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "://" in request.url else ""))
    try:
        page.goto(f"http://127.0.0.1:{port}/")
        if name != "photos":
            page.get_by_label("Model").select_option(name)
        page.locator("h1", has_text=name).wait_for()
        page.locator("#about", has_text="Loading").wait_for(state="hidden")
        yield page
        # Blobs (previews) and data (the icon) have no host.
        assert [text for text in said if may_say not in text] == [] and hosts - {""} == {f"127.0.0.1:{port}"}
    finally:
        context.close()


def drop(page, name: str, content: bytes) -> None:
    moved = page.evaluate_handle(DROP, [name, base64.b64encode(content).decode()])
    page.dispatch_event(".drop", "drop", {"dataTransfer": moved})


def answers(page, count: int = 1) -> list:
    """The finished answers on the page, newest first."""
    page.locator("article[aria-busy=false]").nth(count - 1).wait_for()
    return page.locator("article").all()


def rows_of(article) -> list[tuple[str, str]]:
    """[(label, percentage)] as they can be read."""
    return [
        tuple(span.inner_text() for span in item.locator("> span").all()[:2]) for item in article.locator("li").all()
    ]


def path_of(name: str) -> str:
    return "/v1/models/" + urllib.parse.quote(name, safe="")


def asked(port, name: str, instance) -> dict:
    """The model's own answer over REST."""
    status, body = predict(port, {"instances": [instance]}, path_of(name))
    assert status == 200, body
    return json.loads(body)["predictions"][0]


def expected_rows(answer: dict) -> list[tuple[str, str]]:
    return [(label, f"{100 * score:.1f}%") for label, score in zip(answer["labels"], answer["scores"])]


def test_a_picture_is_dropped(browser, port, tmp_path):
    picture = encoded_image(3, "jpeg", (120, 160, 3))
    with opened(browser, port) as page:
        assert page.locator("#about").inner_text() == "Version 1 · takes image files"
        drop(page, "holiday.jpg", picture)
        (article,) = answers(page)
        answer = asked(port, "photos", {"b64": base64.b64encode(picture).decode()})
        assert rows_of(article) == expected_rows(answer) and len(answer["labels"]) == 5
        assert article.locator("li.best").inner_text().startswith(answer["labels"][0])
        widths = [bar.evaluate("bar => bar.style.width") for bar in article.locator("i").all()]
        assert [float(width[:-1]) for width in widths] == pytest.approx(
            [100 * score for score in answer["scores"]], rel=1e-4
        )
        assert re.search(r"photos · version 1 · [\d.]+ ms", article.inner_text())
        assert article.locator("img").evaluate("image => image.naturalWidth") == 160
        page.screenshot(path=tmp_path / "image.png", full_page=True)
        assert "Production is TensorFlow Serving" in page.locator("footer").inner_text()


def test_a_text_is_typed(browser, port, tmp_path):
    text = 'The quick "brown" fox\njumps over the lazy dog. 日本'
    with opened(browser, port, "texts") as page:
        page.get_by_label("Text").fill(text)
        page.get_by_role("button", name="Ask the model").click()
        (article,) = answers(page)
        assert rows_of(article) == expected_rows(asked(port, "texts", text))
        assert article.locator("blockquote").inner_text() == text
        assert re.search(r"texts · version 1 · [\d.]+ ms", article.inner_text())
        page.screenshot(path=tmp_path / "text.png", full_page=True)


def test_broken_files_beside_a_good_one(browser, port):
    """Each says its own error; the others are answered."""
    with opened(browser, port) as page:
        files = {"notes.txt": b"no image", "cut.png": encoded_image(1)[:600], "good.png": encoded_image(2)}
        chosen = [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files.items()]
        page.get_by_label("Choose an image").set_input_files(chosen)
        page.locator("article li").first.wait_for()
        articles = answers(page, 3)
        errors = [asked(port, "photos", {"b64": base64.b64encode(data).decode()})["error"] for data in files.values()]
        assert "not an image" in errors[0] and "damaged" in errors[1] and errors[2] == ""
        for article, error in zip(articles[:2], errors):
            assert article.locator(".failed").inner_text() == f"Not answered: {error}" and rows_of(article) == []
        assert len(rows_of(articles[2])) == 5


def test_two_texts_with_chosen_labels_and_doubt(browser, port, models):
    with opened(browser, port, ODD) as page:
        assert page.locator("h1").inner_text() == ODD and page.locator("#about").inner_text().endswith("takes 2 texts")
        page.get_by_label("First text").fill("same")
        page.get_by_label("Second text").fill("same")
        page.keyboard.press("Control+Enter")
        (article,) = answers(page)
        shown = rows_of(article)
        answer = asked(port, ODD, {"text_a": "same", "text_b": "same"})
        assert [label.removesuffix(" ✓ chosen") for label, _ in shown] == answer["labels"]
        # Of two equal probabilities the second is chosen, and one that is not among the best five.
        assert [label for label, _ in shown if "chosen" in label] == ["<b>best</b> ✓ chosen", "second of two ✓ chosen"]
        assert article.locator(".doubt").all_inner_texts() == [
            "The model is unsure of this answer.",
            "1 more chosen beyond the best 5.",
        ]
        # A version that comes later answers from then on, and the page says so.
        shutil.copytree(models[ODD] / "1", models[ODD] / ".tmp")
        (models[ODD] / ".tmp").rename(models[ODD] / "2")
        end = time.monotonic() + 20
        while b'"2"' not in ask(port, "GET", f"{path_of(ODD)}/metadata")[1]:
            assert time.monotonic() < end
        page.get_by_label("Second text").fill("another")
        page.get_by_role("button", name="Ask the model").click()
        article = answers(page, 2)[0]
        assert "version 2 ·" in article.inner_text() and "unsure" not in article.inner_text()
        assert page.locator("#about").inner_text().startswith("Version 2 ")


def test_what_cannot_be_asked_says_why(browser, port):
    with opened(browser, port, "numbers") as page:
        assert "This model takes numbers (x, DT_FLOAT)" in page.get_by_role("alert").inner_text()
        assert not page.locator("form").is_visible()
        page.get_by_label("Model").select_option("texts")
        page.get_by_label("Text").fill("a")
        assert not page.get_by_role("alert").is_visible()
        assert page.evaluate("location.hash") == "#texts" and page.title() == "texts · Graft"


def test_a_server_that_is_gone(browser, port):
    with opened(browser, port, "texts", may_say="ERR_INTERNET_DISCONNECTED") as page:
        page.context.set_offline(True)
        page.get_by_label("Text").fill("a")
        page.get_by_role("button").click()
        (article,) = answers(page)
        assert article.locator(".failed").inner_text() == "The server cannot be reached. Does it still run?"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["photos", ODD])
def test_on_a_phone_in_both_schemes(browser, port, tmp_path, scheme, name):
    """Nothing is wider than the screen, every text can be read, everything is large enough for a finger."""
    with opened(browser, port, name, viewport=PHONE, color_scheme=scheme) as page:
        if name == "photos":
            drop(page, f"{'a_very_long_name_' * 8}.png", encoded_image(2, "png", (300, 400, 3)))
            drop(page, "broken.png", b"no image")
        else:
            for label in ("First text", "Second text"):
                page.get_by_label(label).fill("Unbreakable" * 20)
            page.get_by_role("button").click()
        answers(page, 2 if name == "photos" else 1)
        page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 10 and [one for one in contrasts if one[0] < 4.5] == []
        for one in page.locator("select, button, textarea, .drop").all():
            assert one.bounding_box()["height"] >= 44


def test_with_the_keyboard_only(browser, port):
    with opened(browser, port) as page:
        # Listened for all the time: switched on only as a key is pressed, it can come too late on a busy machine.
        page.on("filechooser", lambda _: None)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "model"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        assert page.locator(".drop").evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
        for count, key in enumerate(["Enter", "Space"], 1):
            with page.expect_file_chooser() as chooser:
                page.keyboard.press(key)
            chooser.value.set_files([{"name": "a.png", "mimeType": "image/png", "buffer": encoded_image(0)}])
            assert len(rows_of(answers(page, count)[0])) == 5
        assert page.locator("#answers").get_attribute("aria-live") == "polite"
        # Whatever can be filled in has a name for those who do not see it.
        tree = page.locator("main").aria_snapshot()
        assert 'combobox "Model"' in tree and 'button "Choose an image or drop it here"' in tree


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl: apt-get install curl")
@pytest.mark.parametrize(
    ("name", "instance"),
    [
        ("photos", {"b64": base64.b64encode(encoded_image(1)).decode()}),
        ("texts", "…"),
        (ODD, {"text_a": "…", "text_b": "…"}),
    ],
)
def test_the_command_that_the_page_shows(browser, port, tmp_path, name, instance):
    with opened(browser, port, name) as page:
        page.locator("summary").click()
        command = page.locator("details pre").inner_text()
    (tmp_path / "FILE").write_bytes(encoded_image(1))
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True)
    assert json.loads(done.stdout) == {"predictions": [asked(port, name, instance)]}, done.stderr


def headers_of(port, path: str, method: str = "GET") -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()


def test_headers(port):
    """Only the page's own script may run, and it may ask nobody else."""
    status, headers, body = headers_of(port, "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    names = re.search(rb'id="names">(.*?)</script>', body)[1]
    assert json.loads(names) == ["photos", "texts", ODD, "numbers"]
    assert re.findall(rb"https?://(?!www\.w3\.org/2000/svg)", body) == []  # nothing to load from anywhere
    assert headers_of(port, "/", "HEAD") == (200, headers, b"")


def test_the_interface_is_not_disturbed(port):
    """As in the real server: what is not the page answers as ever, without the page's headers."""
    for path, status, kind in [
        ("/v1/models/photos", 200, "application/json"),
        ("/v1/models/photos/metadata", 200, "application/json"),
        ("/v1/models", 400, "application/json"),
        ("/v1/", 400, "application/json"),
        ("/index.html", 404, "text/html"),
        ("//", 404, "text/html"),
        ("/favicon.ico", 404, "text/html"),
    ]:
        found, headers, _ = headers_of(port, path)
        assert (found, headers["content-type"]) == (status, kind), path
        assert "content-security-policy" not in headers and "cache-control" not in headers
    assert ask(port, "POST", "/", b"{}")[0] == 404 and ask(port, "PUT", "/")[0] == 404
