"""`fxnvtx profile`: run a pipeline, show its structure, and leave recording, trace and image in a folder.

What it runs is a job: a pipeline and how, as a function that makes one request after the other.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import ConfigError
from ..output import say, write_text
from ..report.commands import refuse
from . import writable_folder

if TYPE_CHECKING:
    import torch

__all__ = ["Job", "Picture", "diffusers_runner", "profile_command", "runner"]

TREE = "tree.txt"
PAGE = "report.html"
BUILT_IN = ("reference", "two-stage")
OnStep = Callable[[int, int], None]
Run = Callable[[bool, OnStep | None], Any]


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
    from . import find_nsys

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

    from . import capture

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
    from ..report import first_screen, from_recording, render_html, write_chrome

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
    shown = first_screen(report, limit=rows)
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


# ---------------------------------------------------------------------------------------------------------- what to run


@dataclass
class Job:
    """What to run and how: the command's options."""

    pipeline: str
    prompt: str
    steps: int
    seed: int
    size: str
    compile: bool
    residency: dict[str, str]
    depth: int | None
    stages_only: bool
    warmup: int
    model: str | None


def runner(job: Job) -> Run:
    """(is_warmup, on_step) -> result, for each kind of --pipeline."""
    if job.pipeline in BUILT_IN:
        return _built_in(job)
    if job.pipeline.startswith("diffusers:"):
        return diffusers_runner(job.pipeline.partition(":")[2], job)
    path, colon, factory = job.pipeline.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ConfigError(
            f"--pipeline {job.pipeline!r} is unknown: use {', '.join(BUILT_IN)}, diffusers:<Class> or file.py:factory"
        )
    return _factory(Path(path), factory, job)


def _built_in(job: Job) -> Run:
    from .. import pipeline

    args = pipeline.ServerArgs.from_kwargs(
        enable_layerwise_nvtx_marker=not job.stages_only,
        enable_stage_nvtx_marker=True,
        nvtx_depth=job.depth,
        residency=job.residency,
    )
    built = pipeline.PIPELINES[job.pipeline](args, size=job.size, compile=job.compile)

    def run(is_warmup: bool, on_step: OnStep | None) -> Any:
        if is_warmup:
            return built(pipeline.Batch(prompt=job.prompt, steps=1, refine_steps=1, seed=job.seed, is_warmup=True))
        return pipeline.run(
            job.pipeline, prompt=job.prompt, steps=job.steps, seed=job.seed, pipeline=built, on_step=on_step
        )

    return run


def _factory(path: Path, factory: str, job: Job) -> Run:
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
    from ..integrations.everything import instrument_everything
    from ..ranges import label, pop, push

    def run(is_warmup: bool, on_step: OnStep | None) -> Any:
        with instrument_everything(job.depth):
            entry = None if is_warmup else push(label("request#1", "request"))
            try:
                return request()
            finally:
                pop(entry)

    return run


# ------------------------------------------------------------------------------------------------------------ diffusers


@dataclass(frozen=True)
class Picture:
    """What a request made: an image, uint8 [height, width, 3], or a video, uint8 [frames, height, width, 3]."""

    image: torch.Tensor | None = None
    video: torch.Tensor | None = None


def diffusers_runner(class_name: str, job: Job) -> Run:
    """(is_warmup, on_step) -> Picture. on_step(done, total) is called after each step; a warm-up shows no ranges.

    Without job.model the pipeline has tiny random weights; with it, the folder is loaded. Raises ConfigError.
    """
    import torch

    from ..integrations import diffusers

    pipe, arguments = _load(class_name, job) if job.model else _tiny(class_name, job)
    if torch.cuda.is_available():
        pipe.to("cuda")
        arguments = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    diffusers.instrument(pipe, depth=job.depth, layers=not job.stages_only)
    if job.compile:
        _denoiser(pipe).compile(backend="fxnvtx")
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments.update(num_inference_steps=job.steps, output_type="np")

    def run(is_warmup: bool, on_step: OnStep | None) -> Picture:
        given = dict(arguments, generator=torch.Generator().manual_seed(job.seed))
        if on_step is not None and "callback_on_step_end" in accepted:
            given["callback_on_step_end"] = _callback(on_step, job.steps)
        diffusers.set_enabled(pipe, not is_warmup)
        try:
            made = pipe(**given)
        finally:
            diffusers.set_enabled(pipe, True)
        if on_step is not None:
            on_step(job.steps, job.steps)
        return picture_of(made)

    return run


def _callback(on_step: OnStep, steps: int) -> Callable[..., dict[str, Any]]:
    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1, steps)
        return tensors

    return on_step_end


def _library() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(f"diffusers cannot be imported ({error}): pip install fxnvtx[diffusers]") from error
    return diffusers


def _tiny(class_name: str, job: Job) -> tuple[Any, dict[str, Any]]:
    from ..models.tiny_diffusers import TINY

    if class_name not in TINY:
        raise ConfigError(
            f"there are no tiny weights for {class_name or 'an empty name'}: use one of {', '.join(TINY)}, "
            "or give a local folder with --model"
        )
    _library()
    pipe, arguments = TINY[class_name](job.prompt, job.seed)
    return pipe, dict(arguments)


def _load(class_name: str, job: Job) -> tuple[Any, dict[str, Any]]:
    diffusers = _library()
    kind = getattr(diffusers, class_name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise ConfigError(f"diffusers {diffusers.__version__} has no pipeline {class_name!r}")
    folder = Path(str(job.model))
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: --model takes what save_pretrained wrote")
    try:
        pipe = kind.from_pretrained(str(folder), local_files_only=True)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{class_name} cannot be loaded from {folder}: {str(error).splitlines()[0]}") from error
    accepted = inspect.signature(type(pipe).__call__).parameters
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt": job.prompt} if "prompt" in accepted else {"class_labels": [1]}


def _denoiser(pipe: Any) -> Any:
    import torch

    for name in ("transformer", "unet"):
        found = getattr(pipe, name, None)
        if isinstance(found, torch.nn.Module):
            return found
    raise ConfigError(f"{type(pipe).__name__} has neither transformer nor unet to compile: leave --compile out")


def picture_of(made: Any) -> Picture:
    """The first image or video of what a pipeline returned: [batch, (frames,) height, width, channels], 0 to 1."""
    import torch

    try:
        first = torch.as_tensor(made[0][0])
    except (TypeError, ValueError, KeyError, IndexError):
        return Picture()
    if first.ndim not in (3, 4) or first.shape[-1] not in (1, 3):
        return Picture()
    shown = (torch.nan_to_num(first.float()) * 255).round().clamp(0, 255).to(torch.uint8)
    shown = shown.expand(*shown.shape[:-1], 3).contiguous()
    return Picture(image=shown) if shown.ndim == 3 else Picture(video=shown)
