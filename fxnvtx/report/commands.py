"""`fxnvtx report` and `fxnvtx diff`; which option has a meaning in which mode: the others are errors, never ignored."""

from __future__ import annotations

import atexit
import gc
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..categories import EXAMPLES
from ..output import STDOUT, check_target, complain, is_stdout, printable_lines, write_text, wrote
from .capture import expanded, scrub, uncollected
from .capture.recording import load_recording
from .diff import Comparison, diff, diff_csv, diff_html, diff_json, diff_markdown, diff_text
from .findings import findings_text, headlines
from .part import Numbers, Window, read_times
from .render import render_text
from .render.data import render_csv, render_html, render_json
from .render.traces import write_chrome, write_speedscope
from .report import load
from .rows import ORDERS
from .selection import VIEWS, Selection
from .work import parse_peaks

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Late", "check_options", "diff_command", "refuse", "report_command"]


CAPTURE = click.Path(path_type=Path)
ROWS = click.IntRange(1, 1_000_000_000)
FORMATS = ("text", "json", "csv", "html", "chrome", "speedscope")
DIFF_FORMATS = ("text", "markdown", "json", "csv", "html")
# the first that fits
_ENDINGS = (
    (".speedscope.json", "speedscope"),
    (".chrome.json", "chrome"),
    (".trace.json", "chrome"),
    (".json", "json"),
    (".csv", "csv"),
    (".html", "html"),
    (".htm", "html"),
    (".md", "markdown"),
)


@click.command("report", short_help="what each module of a capture costs")
@click.argument("captures", nargs=-1, required=True, type=CAPTURE, metavar="CAPTURE...")
@click.option("--by", type=click.Choice(VIEWS), default="tree", show_default=True, help="what a row stands for")
@click.option("--depth", type=ROWS, help="levels of the tree, or dotted parts of a module's name")
@click.option("--format", "form", type=click.Choice(FORMATS), help="default: what the ending of -o says, else text")
@click.option("-o", "--output", type=CAPTURE, help="write to this file; -: to stdout")
@click.option("--include", multiple=True, metavar="GLOB", help="only rows that match, with what is inside them")
@click.option("--exclude", multiple=True, metavar="GLOB", help="no rows that match, nor what is inside them")
@click.option(
    "--fold/--no-fold", default=None, help="one row for identical blocks, steps and requests; default: in text, by tree"
)
@click.option("--kernels", is_flag=True, help="device operations as rows under their range (tree only)")
@click.option("--split-fused", is_flag=True, help="share fused kernels out over their modules: an estimate")
@click.option("--sort", type=click.Choice(list(ORDERS)), help="largest first; in the tree among siblings")
@click.option("--limit", type=ROWS, help="at most so many rows (text only)")
@click.option("--all", "everything", is_flag=True, help="small rows, too (text only)")
@click.option("--requests", metavar="NUMBERS", help="only these requests, counted from 0: 2, or 1:4, or 0,3:")
@click.option("--steps", metavar="NUMBERS", help=f"of each request only these steps, from 0: {EXAMPLES}")
@click.option("--skip-warmup", is_flag=True, help="leave out the first request")
@click.option("--skip-first", type=ROWS, metavar="N", help="leave out the first N requests (--steps N: for steps)")
@click.option("--between", metavar="FROM:TO", help="only this time after the first range: 1.5s:2s, or 250ms:")
@click.option("--keep-compile", is_flag=True, help="keep requests in which something was compiled")
@click.option("--peak", metavar="FIGURES", help="what the device can do: bf16=989T,mem=3.35T (per second)")
@click.option("--jobs", type=click.IntRange(1, 256), help="how many files to read at once")
@click.option("--findings", "findings_", is_flag=True, help="all that is worth doing something about, with evidence")
@click.option("--exact", is_flag=True, help="keep the running numbers of torch's emit_nvtx in the names")
@click.option("--classes", type=CAPTURE, metavar="RECORDING", help="take the modules' classes from this recording")
@click.option("--scrub", "scrubbed", is_flag=True, help="write a copy without environment, host and process names")
@click.pass_context
def report_command(
    context: click.Context,
    captures: tuple[Path, ...],
    by: str,
    depth: int | None,
    form: str | None,
    output: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    fold: bool | None,
    kernels: bool,
    split_fused: bool,
    sort: str | None,
    limit: int | None,
    everything: bool,
    requests: str | None,
    steps: str | None,
    skip_warmup: bool,
    skip_first: int | None,
    between: str | None,
    keep_compile: bool,
    peak: str | None,
    jobs: int | None,
    findings_: bool,
    exact: bool,
    classes: Path | None,
    scrubbed: bool,
) -> None:
    """Read captures (nsys .sqlite or .nsys-rep), traces (torch.profiler's, Chrome's, speedscope's; .gz) and recordings,
    and say which module of which step costs what.

    Several files are several ranks: their times add up, and every row says how far the ranks are apart. A folder stands
    for the captures in it, or else for its recordings.

    In text, the largest findings come first (--findings: all), then the tree, folded: one row for identical blocks,
    steps and requests (--no-fold: each of its own). Rows that are a small part of the whole are left out; a line says
    how many, and their time (--all: every row).

    \b
    calls     how often the range ran (-: replayed by a CUDA graph, no Python ran)
    total     CPU time inside the range; self: without the ranges inside it
    gpu       time the device was busy with what was launched inside, overlaps once;
              self: what was launched right here, each instant given to one range
    kernels   kernels, copies and memsets
    gap       device idle time between two launches of the range
    min, median, p99, max   of single calls (GPU time where the capture has any)
    hidden    residency work that passed while something computed; bytes: its size
    exposed   time of NCCL's kernels, and their like, that no other kernel hides
    wait      time in calls that wait for the device; queue: from launches to their start, on average
    memory    the most that was allocated on the device at an allocation in here
    flops, moved   work of the layers: operations (torch.utils.flop_counter's), bytes their code reads and writes
    TFLOP/s, GB/s  the same per second; roof: share of what the device can do (!: more than it can, so suspect)
    bound     what is in the way: compute, memory, or launch (the device waits longer than it works)
    headroom  time now minus time at the roof (?: work not known, +?: not of all)
    skew      how far the ranks are apart: (highest - lowest) / highest
    ~         an estimate (--split-fused)
    """
    form = form or ("scrub" if scrubbed else _format_of(output))
    if fold is None:
        fold = form == "text" and by == "tree"
    check_options(context, "scrub" if scrubbed else form, by, fold)
    captures = tuple(expanded(captures))
    if scrubbed:
        if output is None or len(captures) != 1:
            raise click.UsageError("--scrub needs one capture, and -o FILE for the copy")
        wrote(scrub(captures[0], output))
        return
    if form in ("html", "chrome", "speedscope") and output is None:
        raise click.UsageError(f"--format {form} needs -o FILE")
    window = _window(requests, steps, skip_first or int(skip_warmup), keep_compile, between)
    if form == "html":
        window = replace(window, timeline=True)
    peaks = None if peak is None else parse_peaks(peak)
    inputs = [*captures, *([classes] if classes else [])]
    check_target(output, inputs)
    if form in ("chrome", "speedscope"):
        writer = write_chrome if form == "chrome" else write_speedscope
        with Late(f"writing {output.name}") as tick:  # type: ignore[union-attr]
            wrote(writer(list(captures), output, tick))  # type: ignore[arg-type]
        return
    # A tree need not be searched for garbage while it grows, nor be taken apart at the program's end, where the program
    # is this command; in somebody else's process the end is not ours.
    if (click.get_current_context().obj or {}).get("own_process"):
        atexit.register(gc.freeze)
    with uncollected():
        with Late(f"reading {captures[0].name}") as tick:
            found = load(*captures, exact=exact, jobs=jobs, tick=tick, window=window, peak=peaks)
        if classes is not None:
            found.classes.update(load_recording(classes).classes)
        chosen = Selection(by, depth, include, exclude, fold, kernels, split_fused, sort)
        if form == "text":
            color = _colored(output)
            if by == "tree" and all(node.is_unknown() for node in found.root.children.values()):
                chosen = replace(chosen, kernels=True)  # there is nothing else to name
            if findings_:
                text = printable_lines(findings_text(found)) + "\n"
            else:
                text = headlines(found, color=color) + "\n" if by == "tree" and not (include or exclude) else ""
            text += render_text(found, chosen, color=color, limit=limit, everything=everything)
        elif form == "json":
            text = render_json(found, chosen, findings=findings_)
        elif form == "csv":
            text = render_csv(found, chosen)
        else:
            text = render_html(
                found, include=include, exclude=exclude, fold=fold, kernels=kernels, split_fused=split_fused
            )
    _give(text, output, inputs)


@click.command("diff", short_help="what changed between two captures")
@click.argument("a", type=CAPTURE)
@click.argument("b", type=CAPTURE)
@click.option("--depth", type=ROWS, help="only modules with at most so many dotted parts")
@click.option(
    "--format", "form", type=click.Choice(DIFF_FORMATS), help="default: what the ending of -o says, else text"
)
@click.option("-o", "--output", type=CAPTURE, help="write to this file; -: to stdout")
@click.option("--limit", type=ROWS, help="at most so many rows (text and markdown)")
@click.option("--split-fused", is_flag=True, help="share fused kernels out over their modules: an estimate")
@click.option("--requests", metavar="NUMBERS", help="of both sides only these requests: 2, or 1:4, or 0,3:")
@click.option("--steps", metavar="NUMBERS", help=f"of each request only these steps, from 0: {EXAMPLES}")
@click.option("--skip-warmup", is_flag=True, help="leave out the first request of both sides")
@click.option("--skip-first", type=ROWS, metavar="N", help="leave out the first N requests of both sides")
@click.option("--between", metavar="FROM:TO", help="only this time after the first range: 1.5s:2s, or 250ms:")
@click.option(
    "--by", type=click.Choice(("module", "kernel")), default="module", show_default=True, help="what to compare"
)
@click.option(
    "--fail-on",
    type=click.FloatRange(0, 1_000_000),
    metavar="PERCENT",
    help="exit code 1 if requests or steps (else components) are slower than in A by more than this",
)
@click.option("--keep-compile", is_flag=True, help="keep requests in which something was compiled")
@click.pass_context
def diff_command(
    context: click.Context,
    a: Path,
    b: Path,
    depth: int | None,
    form: str | None,
    output: Path | None,
    limit: int | None,
    split_fused: bool,
    requests: str | None,
    steps: str | None,
    skip_warmup: bool,
    skip_first: int | None,
    between: str | None,
    by: str,
    fail_on: float | None,
    keep_compile: bool,
) -> None:
    """Compare two captures module by module: B minus A.

    Times are medians over steps (over requests outside of steps). A change is called one where it is larger than what
    the scatter over steps explains; how two runs differ as a whole (clocks, temperature) cannot be seen from inside.
    """
    form = form or _format_of(output, DIFF_FORMATS)
    if limit is not None and form not in ("text", "markdown"):
        refuse(context, "limit", f"--format {form}")
    if by == "kernel":
        for name, given in (("depth", depth is not None), ("split_fused", split_fused)):
            if given:
                refuse(context, name, "--by kernel")
    check_target(output, [a, b])
    window = _window(requests, steps, skip_first or int(skip_warmup), keep_compile, between)
    if form == "html" and output is None:
        raise click.UsageError("--format html needs -o FILE")
    with Late(f"reading {a.name} and {b.name}") as tick:
        one, two = load(a, tick=tick, window=window), load(b, tick=tick, window=window)
        found = diff(one, two, depth, split_fused, by)
    if form == "text":
        text = diff_text(found, limit=limit, color=_colored(output))
    elif form == "markdown":
        text = diff_markdown(found, limit)
    elif form == "html":
        text = diff_html(found, one, two)
    else:
        text = diff_json(found) if form == "json" else diff_csv(found)
    _give(text, output, [a, b])
    if fail_on is not None:
        _fail(found, fail_on)


def _fail(found: Comparison, percent: float) -> None:
    """End with exit code 1 where B is too slow, or where nothing can be compared: a check must not pass unseen."""
    if not found.units:
        complain("fxnvtx: --fail-on finds no requests, steps or components on both sides")
        raise SystemExit(1)
    slow = [unit for unit in found.units if unit.slower * 100 > percent]
    for unit in slow:
        complain(f"fxnvtx: {unit.kind}s are {unit.slower:.1%} slower than in A, more than {percent:g}%")
    if slow:
        raise SystemExit(1)


def _window(requests: str | None, steps: str | None, first: int, keep_compile: bool, between: str | None) -> Window:
    return Window(
        None if requests is None else Numbers.read(requests),
        None if steps is None else Numbers.read(steps),
        first,
        keep_compile,
        None if between is None else read_times(between),
    )


def _format_of(output: Path | None, known: tuple[str, ...] = FORMATS) -> str:
    """The format that the ending of the output's name stands for; text where it stands for none."""
    name = "" if output is None else output.name.lower()
    return next((form for ending, form in _ENDINGS if name.endswith(ending) and form in known), "text")


def _colored(output: Path | None) -> bool:
    return (output is None or is_stdout(output)) and sys.stdout.isatty()


def _give(text: str, output: Path | None, inputs: list[Path]) -> None:
    wrote(write_text(STDOUT if output is None else output, text, inputs))


# ------------------------------------------------------------------------------------------ which option has a meaning


_TABLES = frozenset({"text", "json", "csv"})
_ALL = _TABLES | {"html"}
_NESTED = frozenset({"tree", "module", "class", "component", "range"})
_STEPS = frozenset({"request", "step"})

# option -> formats in which it has a meaning, and views (None: all) in which the tables have
_MEANING: dict[str, tuple[frozenset[str], frozenset[str] | None]] = {
    "by": (_TABLES, None),
    "depth": (_TABLES, frozenset({"tree", "module"})),
    "include": (_ALL, None),
    "exclude": (_ALL, None),
    "fold": (_ALL, _STEPS | (_NESTED - {"class"})),
    "kernels": (_ALL, frozenset({"tree"})),
    "split_fused": (_ALL, _NESTED - {"component"}),
    "limit": (frozenset({"text"}), None),
    "everything": (frozenset({"text"}), None),
    "sort": (_TABLES, None),
    "requests": (_ALL, None),
    "steps": (_ALL, None),
    "skip_warmup": (_ALL, None),
    "skip_first": (_ALL, None),
    "between": (_ALL, None),
    "keep_compile": (_ALL, None),
    "jobs": (_ALL, None),
    "peak": (_ALL, frozenset(VIEWS) - {"kernel"}),
    "findings_": (frozenset({"text", "json"}), None),
    "exact": (_ALL, frozenset(VIEWS) - {"stage", "class", "kernel"}),
    "classes": (_ALL, _NESTED),
    "form": (_ALL | {"chrome", "speedscope"}, None),
}


def check_options(context: click.Context, mode: str, by: str, folded: bool) -> None:
    """Raise a usage error for an option that was given and has no meaning. mode: a format, or "scrub"."""
    for name, (formats, views) in _MEANING.items():
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if mode not in formats:
            refuse(context, name, "--scrub" if mode == "scrub" else f"--format {mode}")
        if views is not None and mode in _TABLES and by not in views:
            refuse(context, name, f"--by {by}")
        if name == "classes" and mode in _TABLES and by != "class" and not folded:
            refuse(context, name, f"--by {by} without --fold")


def refuse(context: click.Context, name: str, mode: str) -> None:
    """Raise the usage error for one option."""
    option = next(parameter for parameter in context.command.params if parameter.name == name)
    shown: Iterable[str] = [word for word in option.opts if word.startswith("--")] or option.opts
    raise click.UsageError(f"{next(iter(shown))} has no meaning with {mode}")


# ------------------------------------------------------------------------- a progress line where somebody would wonder


AFTER = 2.0  # seconds


class Late:
    """Call it with the number of rows read since the last call; shows itself on a terminal's stderr after two seconds.

    >>> with Late("reading") as tick:
    ...     load(path, tick=tick)
    """

    def __init__(self, title: str, after: float = AFTER) -> None:
        self._title = title
        self._after = after
        self._start = time.monotonic()
        self._progress: Progress | None = None
        self._rows = 0

    def __enter__(self) -> Late:
        return self

    def __call__(self, rows: int) -> None:
        self._rows += rows
        if self._progress is None:
            if time.monotonic() - self._start < self._after or not sys.stderr.isatty():
                return
            # not at the top: whoever waits for less than that needs none of it
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TextColumn("{task.completed:,.0f} rows"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._progress.add_task(self._title, total=None)
        self._progress.update(self._progress.task_ids[0], completed=self._rows)

    def __exit__(self, *raised: object) -> None:
        if self._progress is not None:
            self._progress.stop()
