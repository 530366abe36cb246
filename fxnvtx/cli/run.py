"""`fxnvtx run`, `python -m fxnvtx script.py`: a program with its models instrumented, in every process it starts.

The program runs in a process of its own, started exactly as it would be without us. What arms it is a folder on
PYTHONPATH (`_site`), so it reaches whatever Python process the program starts in turn: spawned, forked, by a launcher.
It is waited for as a shell would, and what its processes left behind is gathered.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from ..categories import EXAMPLES, Numbers
from ..errors import ConfigError, OutputError
from ..output import complain
from ..recording import Recording
from ..recording.spool import SUFFIX, read_spool
from . import around, ranges_kept, writable_folder

__all__ = ["run_command"]

VARIABLE = "FXNVTX_RUN"
_PACKAGE = Path(__file__).resolve().parents[1]
_SITE = str(_PACKAGE / "_site")
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGINT)


@click.command("run", context_settings={"allow_interspersed_args": False}, options_metavar="[OPTIONS]")
@click.option("-m", "as_module", is_flag=True, help="PROGRAM is a module, as for `python -m`.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the recordings and trace.json.")
@click.option("--depth", type=click.IntRange(0), help="Levels of modules below each model. Default: all.")
@click.option("--path", type=click.Choice(["auto", "hooks"]), default="auto", show_default=True)
@click.option("--stages-only", is_flag=True, help="Requests, stages, loops and steps of pipelines, without layers.")
@click.option("--infer-steps", is_flag=True, help="Take a loop's calls of one model for steps, said to be inferred.")
@click.option("--work", is_flag=True, help="Count FLOPs and bytes of eager layers too (compiled ones carry theirs).")
@click.option("--warmup", type=click.IntRange(0), default=0, help="Leave out so many outermost ranges of each process.")
@click.option(
    "--steps", metavar="NUMBERS", help=f"Of each request (or model) only these steps (calls), from 0: {EXAMPLES}."
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
    work: bool,
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
    command = command_line(program, arguments, as_module)
    if steps is not None:
        Numbers.read(steps)
    if stages_only and infer_steps:
        raise ConfigError("--infer-steps reads the calls of models, which --stages-only leaves out")
    if stages_only and work:
        raise ConfigError("--work counts what layers do, which --stages-only leaves out")
    if (nsys or capture_range) and output is None:
        raise ConfigError("--nsys needs -o FOLDER for the capture")
    if capture_range and not nsys:
        raise ConfigError("--capture-range is for --nsys")
    options = {
        "depth": depth,
        "path": path,
        "stages-only": stages_only or None,
        "infer-steps": infer_steps or None,
        "work": work or None,
        "warmup": warmup or None,
        "steps": steps,
    }
    if output is not None:
        writable_folder(output)
    launched = Launched(output, {k: str(v) for k, v in options.items() if v is not None})
    if nsys:
        command = around(command, launched.output / "capture", capture_range)
        launched.captures_all = capture_range is None
    code = launched.run(command)
    launched.show(rows)
    launched.leave(code)


def command_line(program: str, arguments: Sequence[str], as_module: bool) -> list[str]:
    """The words that start the program: a module, a script, or a command found on the PATH."""
    if as_module:
        return [sys.executable, *_interpreter_options(), "-m", program, *arguments]
    path = Path(program)
    # a folder is a program where Python can run it; otherwise it may have its name in common with a command
    if (path.is_file() and not _runs_itself(path)) or (path / "__main__.py").is_file():
        return [sys.executable, *_interpreter_options(), program, *arguments]
    found = shutil.which(program if os.sep in program or not path.is_file() else f"./{program}")
    if found is None:
        raise ConfigError(f"{program} is no file and no command: name a Python script, a command, or a module with -m")
    return [found, *arguments]


def _runs_itself(path: Path) -> bool:
    """Whether the system can start this file: a shell script, a binary, a console script."""
    if path.suffix == ".py" or not os.access(path, os.X_OK):
        return False
    with open(path, "rb") as file:
        return file.read(4).startswith((b"#!", b"\x7fELF"))


def _interpreter_options() -> list[str]:
    """`python -X dev -O -m fxnvtx script.py`: what stands before -m is meant for the script too."""
    words = sys.orig_argv[1:]
    if "-m" not in words or words[words.index("-m") + 1 : words.index("-m") + 2] != ["fxnvtx"]:
        return []
    return words[: words.index("-m")]


def environment(folder: Path, options: dict[str, str]) -> dict[str, str]:
    """What arms the program and every Python process below it that keeps its environment."""
    options = {"package": str(_PACKAGE), "folder": str(folder), "first": "1", **options}
    if any("\n" in value for value in options.values()):
        raise ConfigError("the name of the output folder has a line break in it; choose another with -o")
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != _SITE]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([_SITE, *others]),
        VARIABLE: "\n".join(f"{name}={value}" for name, value in options.items()),
    }


class Launched:
    """One run of a program. Its processes spool into a folder that is gone when they are."""

    def __init__(self, output: Path | None, options: dict[str, str]) -> None:
        self.kept = output is not None
        self.output = Path(tempfile.mkdtemp(prefix="fxnvtx-")) if output is None else output.resolve()
        self.options = options
        # torchrun may have started us: then there are others like us that write to the same folder
        self.rank = os.environ["RANK"] if os.environ.get("RANK", "").isdigit() else None
        self.spools = self.output / f".fxnvtx-run-{os.getpid()}"
        self.recordings: list[Path] = []
        self.notes: list[str] = []
        self.shown = False  # whether any process had a range
        self.captures_all = False  # whether nsys is to have heard every range that was recorded

    def run(self, command: Sequence[str]) -> int:
        """Run the command to its end and gather the recordings; returns its exit code, negative for a signal."""
        if self.kept and self.rank is None:
            self._clear()
        try:
            self.spools.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {self.output}: {error.strerror or error}") from error
        try:
            process = subprocess.Popen(command, env=environment(self.spools, self.options))
        except OSError as error:
            self._remove()
            raise ConfigError(f"{command[0]} cannot be run: {error.strerror or error}") from error
        with _passing_on(process):
            code = process.wait()
        self._gather()
        if self.captures_all:
            self._compare()
        return code

    def _clear(self) -> None:
        """Recordings that an earlier run left here would be taken for this one's."""
        try:
            for pattern in ("recording.json", "recording.*pid*.json", "trace.json"):
                for path in self.output.glob(pattern):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot remove {error.filename} of an earlier run: {error.strerror or error}; choose another with -o"
            ) from error

    def _gather(self) -> None:
        for spool in sorted(self.spools.glob(f"*{SUFFIX}")):
            recording = read_spool(spool)
            pid = int(spool.name.split("-")[0].split(".")[0])
            if not recording.ranges:
                spool.unlink()
                continue
            self.shown = True
            open_ = [r.label for r in recording.ranges if r.end_ns is None]
            if _runs(pid) and self.kept:
                self.notes.append(f"process {pid} still runs; when it has ended: fxnvtx report {spool}")
                continue
            spool.unlink()
            if open_:
                where = " > ".join(open_[:3])
                self.notes.append(f"process {pid} ended within {where}: what it did there last may be missing")
            target = self.output / self._name(recording, pid)
            count = 1
            while target in self.recordings:
                count += 1
                target = self.output / f"recording.pid{pid}-{count}.json"
            self.recordings.append(recording.save(target))
        if self.kept and not self.recordings:
            self.recordings.append(Recording().save(self.output / "recording.json"))
        self.recordings.sort(key=lambda path: (path.name != "recording.json", path.name))

    def _compare(self) -> None:
        """Say what the capture lost. nsys sends what it has heard now and then, and the rest when a process exits:
        one that ends by a signal or os._exit takes that along, and nothing in the process can hurry it."""
        kept = ranges_kept(self.output / "capture.sqlite")
        for path in self.recordings:
            recording = Recording.load(path)
            made = sum(r.end_ns is not None and not r.label.endswith("(inferred)") for r in recording.ranges)
            pid = int(recording.meta.get("pid", 0))
            if kept and made > kept.get(pid, 0):
                recording.meta = {"captured": kept.get(pid, 0), **recording.meta}  # report/capture looks for it
                recording.save(path)
                self.notes.append(
                    f"the capture has {kept.get(pid, 0):,} of the {made:,} ranges of process {pid}, which ended before "
                    f"nsys had sent the rest (by a signal or os._exit); {path.name} has them all"
                )

    def _name(self, recording: Recording, pid: int) -> str:
        rank = recording.meta.get("rank")
        if recording.meta.get("first") and self.rank is None:
            return "recording.json"
        return f"recording.rank{rank}.pid{pid}.json" if rank is not None else f"recording.pid{pid}.json"

    def show(self, rows: int) -> None:
        """Print the tree of all processes, and say what is missing; write trace.json."""
        from ..report import first_screen, load, write_chrome

        try:
            if self.kept and self.recordings:
                name = "trace.json" if self.rank is None else f"trace.rank{self.rank}.json"
                write_chrome(list(self.recordings), self.output / name)
            found = load(*self.recordings) if self.recordings else None
            if found is None or not self.shown:
                complain(f"fxnvtx: {self._why_nothing()}")
            elif rows:
                complain(first_screen(found, limit=rows))
            for note in self.notes:
                complain(f"fxnvtx: {note}")
        finally:
            self._remove()

    def _why_nothing(self) -> str:
        nothing = "nothing was instrumented: "
        if os.environ.get("FXNVTX", "").strip().lower() == "off":
            return nothing + "FXNVTX=off"
        if not (self.spools / "armed").exists():
            return nothing + (
                "no process of the program imported torch (or it was started with python -E, -I or -S, or with an "
                "environment without PYTHONPATH and FXNVTX_RUN)"
            )
        if "stages-only" in self.options:
            return nothing + "--stages-only shows requests and steps of diffusers pipelines, and none was called"
        if "warmup" in self.options or "steps" in self.options:
            return "nothing was shown: --warmup and --steps leave out every call that there was"
        return nothing + "torch was imported, but no model was called"

    def _remove(self) -> None:
        if not self.kept or not any(self.spools.glob(f"*{SUFFIX}")):
            shutil.rmtree(self.spools, ignore_errors=True)
        if not self.kept:
            shutil.rmtree(self.output, ignore_errors=True)

    def leave(self, code: int) -> NoReturn:
        """End as the program ended: with its exit code, or by the signal that ended it."""
        sys.stdout.flush()
        if code < 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            if -code not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        sys.exit(code)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals sent to us are meant for the program; Ctrl-C reaches it from the terminal by itself."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGINT, signal.SIGQUIT) and _in_foreground():
            return
        if process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    for descriptor in (0, 1, 2):
        try:
            return os.tcgetpgrp(descriptor) == os.getpgrp()
        except OSError:
            continue
    return False
