"""`nox -s lint fast full` is a developer's day; `nox -s versions` is the table of docs/versions.md.

The package index that pip is set up with decides which build of torch comes (the default one of PyPI brings CUDA, about
5.5 GB an environment): each session's environment is made anew and can be deleted after.
"""

from __future__ import annotations

import configparser

import nox

nox.options.sessions = ["lint", "fast"]
nox.options.error_on_external_run = True

SOURCES = ["fxnvtx", "tests", "benchmarks", "noxfile.py"]
TORCH = ["2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# what depends on torch's internals
VERSIONED = ["tests/gpuless", "tests/core", "tests/compile", "tests/pipeline", "tests/integrations"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("-c", "constraints.txt", "-e", ".[test,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def fast(session: nox.Session) -> None:
    """What neither compiles nor starts other programs."""
    session.install("-c", "constraints.txt", "-e", ".[test,dev]")
    session.run("pytest", "-n", "2", "-m", "not slow and not nsys and not gpu", *session.posargs)


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


def lowest_of(*groups: str) -> list[str]:
    """The lowest versions that setup.cfg declares: of the package itself and of these extras."""
    config = configparser.ConfigParser()
    config.read("setup.cfg")
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][g] for g in groups)]
    lines = [line.partition(",")[0] for text in texts for line in text.split("\n") if line]
    return [line.replace(">=", "==") for line in lines]


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """The lowest declared versions of everything that the core and its tests need, on the lowest Python."""
    session.install(*lowest_of("test"))
    session.install("--no-deps", "-e", ".")
    session.run("pytest", *(session.posargs or ["tests/core", "tests/report", "tests/compile/test_truth.py"]))


@nox.session(python="3.12")
def gpu(session: nox.Session) -> None:
    """A folder of wheels for a machine with a GPU and torch alone; how it runs there is said in the script."""
    session.run("python", "tests/gpu/elsewhere.py", "pack", *(session.posargs or ["build/wheels"]))
