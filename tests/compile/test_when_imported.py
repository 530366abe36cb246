"""Acting on a module's import: once, after it has run, and without importing it."""

from __future__ import annotations

import importlib
import sys

import pytest

from fxnvtx import compile as imports
from fxnvtx.compile import no_longer_when_imported, when_imported


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "_finder", imports._Finder())  # the product's own may wait for other modules
    names = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        importlib.invalidate_caches()

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_it_waits_for_the_import_and_takes_its_finder_away(write):
    write("waited_for", "value = 1")
    seen = []
    when_imported("waited_for", lambda module: seen.append(module.value))
    assert seen == []
    assert "waited_for" not in sys.modules
    module = importlib.import_module("waited_for")
    assert seen == [1]
    assert imports._finder not in sys.meta_path
    assert "exec_module" not in vars(module.__spec__.loader)  # type: ignore[union-attr]
    importlib.reload(module)
    assert seen == [1]


def test_it_acts_at_once_on_what_is_there(write):
    write("here_already", "value = 2")
    importlib.import_module("here_already")
    seen = []
    when_imported("here_already", lambda module: seen.append(module.value))
    assert seen == [2]


def test_a_module_that_fails_may_be_imported_again(write):
    write("fails_first", "raise ValueError('not yet')")
    seen = []
    when_imported("fails_first", lambda module: seen.append(module.value))
    with pytest.raises(ValueError, match="not yet"):
        importlib.import_module("fails_first")
    write("fails_first", "value = 3  # another size, so that no cached bytecode is taken")
    importlib.import_module("fails_first")
    assert seen == [3]


def test_what_is_taken_back_is_not_done_and_leaves_no_finder(write):
    write("taken_back", "value = 4")
    seen = []
    acts = [lambda module: seen.append(module.value), lambda module: seen.append(-module.value)]
    before = list(sys.meta_path)
    for act in acts:
        when_imported("taken_back", act)
    no_longer_when_imported("taken_back", acts[0])
    no_longer_when_imported("taken_back", acts[0])  # once is enough, twice does no harm
    importlib.import_module("taken_back")
    assert seen == [-4]
    write("taken_back_whole", "value = 5")
    when_imported("taken_back_whole", acts[0])
    no_longer_when_imported("taken_back_whole", acts[0])
    assert "taken_back_whole" not in imports._finder.waiting
    assert [f for f in sys.meta_path if f not in before] == []
    importlib.import_module("taken_back_whole")
    assert seen == [-4]
