"""Flags and profiles of the whole suite."""

from __future__ import annotations

import os

import pytest

try:
    from hypothesis import settings
except ImportError:  # a machine that has only a GPU
    settings = None

# What CI tries is the same every time, so that a red run is of the change that it was run for; whoever runs the tests
# by hand tries something new each time.
if settings is not None:
    settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write what the renderers give now into tests/report/golden"
    )
