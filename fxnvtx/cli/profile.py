"""`fxnvtx profile`: run a pipeline, show its structure, and leave recording, trace and image in a folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..errors import ConfigError
from ..output import say, write_text
from ..report.commands import refuse
from .commands import writable_folder
from .jobs import BUILT_IN, Job, runner

__all__ = ["profile_command"]

TREE = "tree.txt"
PAGE = "report.html"


@click.command("profile")
@click.option(
    "--pipeline",
    default="reference",
    show_default=True,
    help="reference, two-stage, diffusers:<Class> or file.py:factory.",
)
@click.option("--prompt", default="a red fox on the moon", show_default=True)
@click.option("--steps", type=click.IntRange(1, 10_000), default=4, show_default=True, help="Denoising steps.")
@click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), default=0, show_default=True)
@click.option("--size", default="tiny", show_default=True, help="Size of the reference models: tiny to xl.")
@click.option("--compile", "compile_", is_flag=True, help="Compile the denoiser with torch.compile(backend='fxnvtx').")
@click.option("--residency", multiple=True, metavar="COMPONENT=MODE", help="Like dit=layerwise-offload; repeatable.")
@click.option("--depth", type=click.IntRange(0, 10_000), help="Levels of modules below a component. Default: all.")
@click.option("--stages-only", is_flag=True, help="Request, stage, loop and step ranges without layers.")
@click.option(
    "--warmup", type=click.IntRange(0, 10_000), default=1, show_default=True, help="Requests before the one shown."
)
@click.option("--model", help="For diffusers:<Class>: a local folder to load; without it, tiny random weights.")
@click.option(
    "--nsys/--no-nsys", "nsys", default=None, help="Capture with Nsight Systems. Default: if it is installed."
)
@click.option(
    "--rows", type=click.IntRange(1, 1_000_000_000), default=60, show_default=True, help="Rows of the printed tree."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("fxnvtx-profile"), show_default=True)
@click.pass_context
def profile_command(
    context: click.Context,
    pipeline: str,
    prompt: str,
    steps: int,
    seed: int,
    size: str,
    compile_: bool,
    residency: tuple[str, ...],
    depth: int | None,
    stages_only: bool,
    warmup: int,
    model: str | None,
    nsys: bool | None,
    rows: int,
    output: Path,
) -> None:
    """Run a diffusion pipeline and show where its time went, per request, stage, step, component, block and layer."""
    from .nsys import find_nsys

    check_options(context, pipeline)
    job = Job(pipeline, prompt, steps, seed, size, compile_, _residency(residency), depth, stages_only, warmup, model)
    writable_folder(output)
    if nsys or (nsys is None and find_nsys() is not None):
        _under_nsys(output)
        return
    _in_process(job, output, rows)


# kind of pipeline -> options that it does not have
_LACKS = {
    "built-in": ("model",),
    "diffusers": ("residency", "size"),
    "file": ("prompt", "steps", "seed", "size", "compile_", "residency", "stages_only", "model"),
}


def kind_of(pipeline: str) -> str:
    """built-in, diffusers or file."""
    if pipeline in BUILT_IN:
        return "built-in"
    return "diffusers" if pipeline.startswith("diffusers:") else "file"


def check_options(context: click.Context, pipeline: str) -> None:
    """Raise a usage error for an option that was given and that this kind of pipeline does not have."""
    for name in _LACKS[kind_of(pipeline)]:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            refuse(context, name, f"--pipeline {pipeline}")


def _residency(given: tuple[str, ...]) -> dict[str, str]:
    modes = {}
    for item in given:
        component, equals, mode = item.partition("=")
        if not equals or not component or not mode:
            raise ConfigError(f"--residency takes COMPONENT=MODE, like dit=layerwise-offload, not {item!r}")
        modes[component] = mode
    return modes


def _under_nsys(output: Path) -> None:
    """Run the same command once more as a child of nsys; the recorder and the capture then tell of the same run."""
    import torch
    from rich.console import Console

    from .nsys import capture

    words = [word for word in sys.argv[1:] if word != "--nsys"]
    target = output / "capture"
    os.environ.setdefault("COLUMNS", str(shutil.get_terminal_size((120, 24)).columns))
    with Console(stderr=True).status("running under nsys, then exporting"):
        capture([sys.executable, "-m", "fxnvtx", *words, "--no-nsys"], target, cuda=torch.cuda.is_available())
    say((output / TREE).read_text(encoding="utf-8"), end="")
    say(f"  {target}.nsys-rep   open in Nsight Systems, or: fxnvtx report {target}.sqlite")
    say("  captures hold the environment of this machine: fxnvtx report --scrub before you share one")


def _in_process(job: Job, output: Path, rows: int) -> None:
    from ..recording import record
    from ..report import from_recording, render_html, render_text, write_chrome

    run = runner(job)
    for _ in range(job.warmup):
        run(True, None)
    with _progress(job.steps) as on_step, record() as recording:
        result = run(False, on_step)
    recording.meta["pipeline"] = job.pipeline
    recording.save(output / "recording.json")
    write_chrome(recording, output / "trace.json")
    names = ["recording.json", "trace.json", PAGE, TREE, *_write_picture(result, output)]
    report = from_recording(recording)
    write_text(output / PAGE, render_html(report))
    shown = render_text(report, "tree", fold=True, limit=rows)
    shown += f"wrote {', '.join(names)} to {output}/\n  the whole table: fxnvtx report {output}/recording.json\n"
    write_text(output / TREE, shown)
    say(shown, end="")


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("denoising", total=steps)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write_picture(result: Any, output: Path) -> list[str]:
    """Image or video as PNG; what another pipeline returned is not ours to interpret."""
    from ..models import write_apng, write_png

    if getattr(result, "video", None) is not None:
        write_apng(output / "video.png", result.video)
        return ["video.png"]
    if getattr(result, "image", None) is not None:
        write_png(output / "image.png", result.image)
        return ["image.png"]
    return []
