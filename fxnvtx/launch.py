"""`fxnvtx run`, `python -m fxnvtx script.py`: a program with its models instrumented, in every process it starts.

The program runs in a process of its own, started exactly as it would be without us. What arms it is a folder on
PYTHONPATH (`_site`), so it reaches whatever Python process the program starts in turn: spawned, forked, by a launcher.
"""

from __future__ import annotations

from pathlib import Path

import click

from .errors import ConfigError
from .processes import Launched, command_line
from .steps import Numbers

__all__ = ["run_command"]


@click.command("run", context_settings={"allow_interspersed_args": False}, options_metavar="[OPTIONS]")
@click.option("-m", "as_module", is_flag=True, help="PROGRAM is a module, as for `python -m`.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the recordings and trace.json.")
@click.option("--depth", type=click.IntRange(0), help="Levels of modules below each model. Default: all.")
@click.option("--path", type=click.Choice(["auto", "hooks"]), default="auto", show_default=True)
@click.option("--stages-only", is_flag=True, help="Requests, stages, loops and steps of pipelines, without layers.")
@click.option("--infer-steps", is_flag=True, help="Take a loop's calls of one model for steps, said to be inferred.")
@click.option("--warmup", type=click.IntRange(0), default=0, help="Leave out so many outermost ranges of each process.")
@click.option(
    "--steps", metavar="NUMBERS", help="Of each request (or model) only these steps (calls), from 0: 5, or 3-5."
)
@click.option("--nsys", is_flag=True, help="Run under Nsight Systems; needs -o, where capture.nsys-rep will lie.")
@click.option("--capture-range", metavar="LABEL", help="With --nsys: capture one range of this label, and no more.")
@click.option(
    "--rows", type=click.IntRange(0), default=60, show_default=True, help="Rows of the printed tree; 0: none."
)
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(
    as_module: bool,
    output: Path | None,
    depth: int | None,
    path: str,
    stages_only: bool,
    infer_steps: bool,
    warmup: int,
    steps: str | None,
    nsys: bool,
    capture_range: str | None,
    rows: int,
    program: str,
    arguments: tuple[str, ...],
) -> None:
    """Run PROGRAM with its models instrumented; at its end, print where the time went.

    PROGRAM is a Python script, a module (-m), or a command like torchrun. It runs as it would without this; so do the
    Python processes that it starts, each of which leaves a recording of its own, named by rank and process.
    """
    from .cli.commands import writable_folder

    command = command_line(program, arguments, as_module)
    if steps is not None:
        Numbers.read(steps)
    if (nsys or capture_range) and output is None:
        raise ConfigError("--nsys needs -o FOLDER for the capture")
    if capture_range and not nsys:
        raise ConfigError("--capture-range is for --nsys")
    options = {
        "depth": depth,
        "path": path,
        "stages-only": stages_only or None,
        "infer-steps": infer_steps or None,
        "warmup": warmup or None,
        "steps": steps,
    }
    if output is not None:
        writable_folder(output)
    launched = Launched(output, {k: str(v) for k, v in options.items() if v is not None})
    if stages_only and infer_steps:
        raise ConfigError("--infer-steps reads the calls of models, which --stages-only leaves out")
    if nsys:
        from .nsys import around

        command = around(command, launched.output / "capture", capture_range)
        launched.captures_all = capture_range is None
    code = launched.run(command)
    launched.tell(rows)
    launched.leave(code)
