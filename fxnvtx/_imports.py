"""Importing what brings torch along, without torch's complaint that numpy is not there: nothing here needs numpy."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

__all__ = ["import_quietly"]


def import_quietly(name: str) -> Any:
    """The module `name`, as importlib.import_module() gives it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        return import_module(name)
