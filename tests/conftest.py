"""Flags and profiles of the whole suite, and what belongs to the fast set (CONTRIBUTING.md)."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

from .support.heavy import is_heavy

try:
    from hypothesis import settings
except ImportError:  # a machine that has only a GPU
    settings = None  # type: ignore[assignment,misc]

# What CI tries is the same every time, so that a red run is of the change that it was run for; whoever runs the tests
# by hand tries something new each time. The fast set tries a few examples of each property.
if settings is not None:
    settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
    settings.register_profile("fast", max_examples=20, deadline=None)

_MANY_EXAMPLES = 100  # more of them, or a state machine, make a property test a slow one
_PROCESS_STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write what the renderers give now into tests/report/golden"
    )


def pytest_configure(config: pytest.Config) -> None:
    fast = "not slow" in (config.getoption("markexpr") or "")
    if settings is not None:
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast" if fast else "default"))
    if fast:
        config.pluginmanager.register(NoProcesses())


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") is None and (_tries_much(item) or is_heavy(item.path, _top_name(item))):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Half a million objects of torch and diffusers are there by now and stay: gc.collect(), which many tests call,
    need not go through them again each time (0.3 s)."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what ends with the interpreter may be cleaned up


def _top_name(item: pytest.Item) -> str:
    cls = getattr(item, "cls", None)
    return str(cls.__name__ if cls is not None else getattr(item, "originalname", None) or item.name)


def _tries_much(item: pytest.Item) -> bool:
    test: Any = getattr(item, "obj", None)
    if settings is None or not getattr(test, "is_hypothesis_test", False):
        return False
    chosen: Any = getattr(test, "_hypothesis_internal_use_settings", None) or settings.default
    return getattr(item, "cls", None) is not None or chosen.max_examples > _MANY_EXAMPLES


class NoProcesses:
    """In the fast set, a test that starts a process fails and says that it wants the mark: what heavy.py cannot read
    in the tests' source shows when the product does it."""

    def __init__(self) -> None:
        self.started: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _PROCESS_STARTS:
            self.started.append(f"{event} {args[0] if args else ''}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        self.started.clear()
        yield
        if self.started:
            pytest.fail(f"this test starts a process ({self.started[0]}): mark it @pytest.mark.slow", pytrace=False)
