"""Fixtures of the tests of ``prepare``."""

import pytest


@pytest.fixture(autouse=True)
def no_histograms(request, monkeypatch):
    """Drawing takes most of a second: only the tests of what is drawn do."""
    if not request.module.__name__.endswith("test_histograms"):
        monkeypatch.setattr("nnssl_plugin.intake.unlabelled.draw_histograms", lambda folder, origins: None)
