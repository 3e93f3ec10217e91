"""The page for people at `/` of the embedded server: page.html, with the names of the models in it.

Everything else it asks of the REST interface, so it would work in front of TensorFlow Serving as well.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

CONTENT_TYPE = b"text/html; charset=utf-8"
_TEXT = (Path(__file__).parent / "page.html").read_text("utf-8")
_NO_NAMES = '<script type="application/json" id="names">[]</script>'


def page(names: list[str]) -> bytes:
    """The page, for models of these names."""
    listed = json.dumps(names).replace("<", "\\u003c")  # which could end the script that holds them
    return _TEXT.replace(_NO_NAMES, _NO_NAMES.replace("[]", listed)).encode()


def hash_source(tag: str) -> str:
    """What the policy calls the only script, or the only style, of the page: its hash."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", _TEXT, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


POLICY = {
    "default-src": "'none'",
    "script-src": hash_source("script"),
    "style-src": hash_source("style"),
    "img-src": "blob: data:",  # previews of the user's own files, and the icon
    "media-src": "blob:",  # players of the user's own sounds
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = [
    (b"content-security-policy", "; ".join(f"{key} {value}" for key, value in POLICY.items()).encode()),
    (b"cache-control", b"no-store"),  # the models may change
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
