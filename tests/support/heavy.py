"""Which tests are left out of the fast set without being marked: read from their source.

A test is slow where it, a fixture that it asks for, or a function of the tests that these use starts a process or
compiles a model. So a new test falls there by what it does. What only a product function does (a command that starts
nsys) cannot be read here; conftest.py notices it while the test runs and asks for the mark.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

__all__ = ["is_heavy"]

TESTS = Path(__file__).resolve().parents[1]
_MODULES = frozenset({"multiprocessing", "subprocess", "forkserver"})
_OF_OS = frozenset({"execv", "execve", "fork", "posix_spawn", "popen", "system"})
_COMPILES = frozenset({"compile", "compile_repeated_blocks", "aot_compile"})

Definition = tuple[Path, str]  # a file of the tests, and what is defined at its top


def is_heavy(path: Path, name: str) -> bool:
    """Whether the test `name` (a function or class at the top of the file `path`) starts a process or compiles."""
    seen: set[Definition] = set()
    todo: list[Definition] = [(path, name)]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        heavy, used = _read(*one)
        if heavy:
            return True
        todo += used
    return False


@cache
def _read(path: Path, name: str) -> tuple[bool, list[Definition]]:
    """Whether a definition starts a process or compiles by itself; and the definitions that it uses."""
    node = _definitions(path).get(name)
    if not isinstance(node, ast.AST):
        return False, [node] if node is not None else []
    if any(_starts_or_compiles(part) for part in ast.walk(node) if isinstance(part, ast.Attribute)):
        return True, []
    return False, list(dict.fromkeys(found for used in _names(node) for found in _meant(path, used)))


@cache
def _definitions(path: Path) -> dict[str, ast.AST | Definition]:
    """What the names at the top of a file of the tests are: defined there, or in another file of the tests."""
    found: dict[str, ast.AST | Definition] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found.update((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
            for alias in node.names:
                module = folder.with_suffix(".py")
                if module.is_file():
                    found[alias.asname or alias.name] = (module, alias.name)
                elif (folder / f"{alias.name}.py").is_file():
                    found[alias.asname or alias.name] = (folder / f"{alias.name}.py", "")
    return found


def _meant(path: Path, used: tuple[str, str]) -> Iterator[Definition]:
    """The definitions that a name may be about: of this file, of what it imports, or a fixture of a conftest.py."""
    name, attribute = used
    found = _definitions(path).get(name)
    if isinstance(found, tuple):
        yield found if found[1] else (found[0], attribute)
    elif found is not None:
        yield path, name
    yield from ((file, name) for file in _conftests(path.parent) if name in _definitions(file))


@cache
def _conftests(folder: Path) -> list[Path]:
    above = [] if folder in (TESTS, *TESTS.parents) else _conftests(folder.parent)
    return [file for file in (folder / "conftest.py",) if file.is_file()] + above


def _names(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Names that are read, with the attribute asked of them; parameters too, which may be fixtures."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            yield part.value.id, part.attr
        elif isinstance(part, ast.Name):
            yield part.id, ""
        elif isinstance(part, ast.arg):
            yield part.arg, ""
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr == "usefixtures":
            yield from ((str(word.value), "") for word in part.args if isinstance(word, ast.Constant))


def _starts_or_compiles(part: ast.Attribute) -> bool:
    owner = part.value.id if isinstance(part.value, ast.Name) else ""
    if owner in _MODULES or (owner == "os" and part.attr in _OF_OS) or (owner, part.attr) == ("sys", "executable"):
        return True
    return part.attr in _COMPILES and owner != "re"
