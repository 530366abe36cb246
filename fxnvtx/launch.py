"""`python -m fxnvtx script.py`: run a script with every model in it instrumented, without touching the script."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from .cli import writable_folder
from .compile.invisible import dynamo_active, hide_from_dynamo
from .control import entry_of
from .errors import ConfigError, FxnvtxError
from .instrument import instrument, log_once, unwrapped
from .output import complain

__all__ = ["factory_runner", "instrument_everything", "run_command"]


class _Thread(threading.local):
    inside = False


_thread = _Thread()


@contextmanager
def instrument_everything(depth: int | None = None, path: str = "auto") -> Iterator[None]:
    """While this runs, a module that is called from outside any other module is instrumented just before its call.

    diffusers pipelines get their request, stages and steps as well, and what the program compiles with Inductor is
    compiled with the backend "fxnvtx". Replaces nn.Module.__call__ and torch.compile for the time being: that is what
    it takes where no line may be added to the program.
    """
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _thread.inside or dynamo_active():
            return original(self, *args, **kwargs)
        _thread.inside = True
        try:
            _meet(self, depth, path)
            return original(self, *args, **kwargs)
        finally:
            _thread.inside = False

    hide_from_dynamo(call.__code__)
    from .integrations import diffusers

    compile_ = torch.compile

    def compile_with_layers(*args: Any, backend: Any = "inductor", **kwargs: Any) -> Any:
        return compile_(*args, backend="fxnvtx" if backend == "inductor" else backend, **kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    torch.compile = compile_with_layers  # the same kernels, with their layers named
    diffusers.watch(depth=depth, path=path)
    try:
        yield
    finally:
        diffusers.unwatch()
        torch.compile = compile_
        nn.Module.__call__ = original  # type: ignore[method-assign]


def _meet(module: nn.Module, depth: int | None, path: str) -> None:
    inner = unwrapped(module)
    if entry_of(inner) is None and not isinstance(inner, nn.modules.loss._Loss):
        try:
            instrument(inner, depth=depth, path=path)
        except FxnvtxError as error:  # the script must go on
            log_once(type(inner).__name__, str(error))


hide_from_dynamo(_meet.__code__)


@click.command(
    "run",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for recording.json and trace.json.")
@click.option("--depth", type=click.IntRange(0), help="Levels of modules below each model. Default: all.")
@click.option("--path", type=click.Choice(["auto", "hooks"]), default="auto", show_default=True)
@click.option(
    "--rows", type=click.IntRange(0), default=60, show_default=True, help="Rows of the printed tree; 0: none."
)
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(
    output: Path | None, depth: int | None, path: str, rows: int, script: Path, arguments: tuple[str, ...]
) -> None:
    """Run SCRIPT with its models instrumented; at its end, print where the time went."""
    from .recording import record
    from .report import chrome, from_recording, render_text

    if not script.is_file():
        raise ConfigError(f"{script} is no file: name the Python script to run")
    if output is not None:
        writable_folder(output)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    with record() as recording:
        try:
            with instrument_everything(depth, path):
                runpy.run_path(str(script), run_name="__main__")
        finally:
            recording.stop()
            if rows and recording.ranges:
                complain(render_text(from_recording(recording), "tree", fold=True, limit=rows))
            if output is not None:
                recording.save(output / "recording.json")
                chrome.write(recording, output / "trace.json")


def factory_runner(path: Path, factory: str, job: Any) -> Callable[[bool, Any], Any]:
    """For --pipeline file.py:factory. `factory()` returns what is called without arguments to run one request."""
    if not path.is_file():
        raise ConfigError(f"{path} is no file: --pipeline takes file.py:factory")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    made = getattr(module, factory, None)
    if not callable(made):
        raise ConfigError(f"{path} has no function {factory!r}: --pipeline takes file.py:factory")
    request = made()
    if not callable(request):
        raise ConfigError(f"{factory}() in {path} must return a callable that runs one request")
    from .ranges import label, pop, push

    def run(is_warmup: bool, on_step: Any) -> Any:
        with instrument_everything(job.depth):
            entry = None if is_warmup else push(label("request#1", "request"))
            try:
                return request()
            finally:
                pop(entry)

    return run
