"""`nox -s lint fast full` is a developer's day; `nox -s versions` is the table of docs/versions.md.

The package index that pip is set up with decides which build of torch comes (the default one of PyPI brings CUDA, about
5.5 GB an environment): each session's environment is made anew and can be deleted after.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "fast"]
nox.options.error_on_external_run = True

SOURCES = ["fxnvtx", "tests", "benchmarks", "noxfile.py"]
TORCH = ["2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# what depends on torch's internals
VERSIONED = ["tests/core", "tests/compile", "tests/pipeline", "tests/integrations"]
# the lowest versions that setup.cfg declares
LOWEST = ["torch==2.11.0", "nvtx==0.2.12", "click==8.1.0", "rich==13.0.0"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def fast(session: nox.Session) -> None:
    """What neither compiles nor starts other programs."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("pytest", "-m", "not slow and not nsys and not gpu", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """Everything, as the README's second command runs it."""
    session.install("-c", "constraints.txt", "-e", ".[test,diffusers,cluster]")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documents as a site, in site/."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCH)
def versions(session: nox.Session, torch: str) -> None:
    """One torch on one Python."""
    session.install(f"torch=={torch}", "-e", ".[test,diffusers]")
    session.run("pytest", *(session.posargs or VERSIONED))


@nox.session
def lowest(session: nox.Session) -> None:
    """The lowest declared versions of everything that the core needs."""
    session.install(*LOWEST, "-e", ".[test]")
    session.run("pytest", "-m", "not slow", *(session.posargs or ["tests/core", "tests/report"]))
