"""Malformed requests, a few of those that tests/acceptance/fuzz.py sends."""

from __future__ import annotations

import pytest

from tests.acceptance.fuzz import fuzz


@pytest.mark.slow
def test_malformed_requests_get_proper_answers(tmp_path):
    lines = []
    assert fuzz(1500, 0, tmp_path, lines.append) == []
    assert any("without a proper answer" in line for line in lines)
