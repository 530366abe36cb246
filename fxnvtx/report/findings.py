"""The few things in a report that are worth doing something about, each with its evidence (pure).

Every rule is a function of the report. It gives a `Finding`, or a `Silence` where the capture does not hold what it
takes to say, or None where all is well. Its docstring is its condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from statistics import median

from ..categories import COMPILE, RESIDENCY, STEP
from ..output import cut, width_of
from .labels import category_of
from .render import (
    middle,
    painted,
    readable_bytes,
    readable_ns,
    readable_share,
    render_text,
    width_of_terminal,
    wrapped,
)
from .report import Report
from .rows import Row
from .selection import with_modules
from .tree import Calls, Node, merged, spread_of

__all__ = ["RULES", "Finding", "Silence", "findings", "findings_text", "first_screen", "headlines"]

_WITHOUT_CONDITION = ("predict_noise.unconditional", "predict_noise.uncond")
EVIDENCE = 3  # rows of evidence with each finding


@dataclass(frozen=True)
class Finding:
    """rule: its function's name. text: a sentence. ns: how much time it is about. evidence: rows, largest first."""

    rule: str
    text: str
    ns: int
    evidence: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Silence:
    """What a rule cannot say from this capture, and why."""

    rule: str
    why: str


Answer = Finding | Silence | None
Rule = Callable[["Report"], Answer]


def findings(report: Report) -> tuple[list[Finding], list[Silence]]:
    """What the rules say, largest first, and what they cannot say."""
    answers = [rule(report) for rule in RULES]
    found = sorted((a for a in answers if isinstance(a, Finding)), key=lambda finding: -finding.ns)
    return found, [a for a in answers if isinstance(a, Silence)]


def findings_text(report: Report) -> str:
    """The findings as lines of text."""
    found, silent = findings(report)
    lines = []
    for number, finding in enumerate(found, 1):
        lines.append(f"{number}. {finding.text} [{readable_ns(finding.ns)}]")
        lines.extend(f"     {readable_ns(ns):>10}  {name}" for name, ns in finding.evidence)
    if not found:
        lines.append("no findings")
    if silent:
        lines.append("not enough in this capture to say: " + "; ".join(f"{s.rule} ({s.why})" for s in silent))
    return "\n".join(lines) + "\n"


FIRST = 5  # findings before a table


def headlines(report: Report, width: int | None = None, color: bool = False) -> str:
    """The largest findings in two lines each, for above a table; one line where there is none."""
    found, silent = findings(report)
    columns = width_of_terminal(width)
    more = f"{len(found) - FIRST} more, and all " if len(found) > FIRST else "all "
    lines = [painted(f"what to do first ({more}evidence: --findings)", "bold", color)]
    for number, finding in enumerate(found[:FIRST], 1):
        evidence = ", ".join(f"{middle(name, 60)} {readable_ns(ns)}" for name, ns in finding.evidence)
        text = f"{number}. {readable_ns(finding.ns)}: {finding.text}" + (f" ({evidence})" if evidence else "")
        first, *rest = wrapped(text, columns, False, "").split("\n")
        lines.append(first)
        if rest:
            second = " ".join(rest)
            lines.append(f"   {second if width_of(second) <= columns - 3 else cut(second, columns - 4) + '…'}")
    if not found:
        silence = f"; {len(silent)} of {len(RULES)} rules lack what they need: --findings" if silent else ""
        lines = [wrapped(f"nothing to do stands out{silence}", columns, color, "bold")]
    return "\n".join(lines) + "\n"


def first_screen(report: Report, width: int | None = None, *, color: bool = False, limit: int | None = None) -> str:
    """What to do, and the folded tree, as the command shows it. width: in characters, default the terminal's; limit:
    at most so many rows of the tree."""
    table = render_text(report, fold=True, width=width, color=color, limit=limit)
    return f"{headlines(report, width, color)}\n{table}"


RULES: list[Rule] = []


def _rule(rule: Rule) -> Rule:
    RULES.append(rule)
    return rule


def _of_devices(rule: Rule) -> Rule:
    """A rule that has nothing to say of captures without device work."""

    @wraps(rule)
    def asked(report: Report) -> Answer:
        return rule(report) if report.has_gpu else Silence(rule.__name__, "no device work")

    return _rule(asked)


@_rule
def first_step(report: Report) -> Answer:
    """The first step takes more than 1.5 times the median of at least three others."""
    steps = _rows(report, "step")
    if len(steps) < 4:
        return Silence("first_step", f"{len(steps)} different steps, four are needed")
    each = [_measure(report, row) // row.calls for row in steps]
    usual = int(median(each[1:]))
    over = (each[0] - usual) * steps[0].calls
    if each[0] <= 1.5 * usual:
        return None
    return Finding(
        "first_step",
        f"the first step takes {each[0] / usual:.1f}x a usual one: warm up before timing, or look what it loads"
        if usual
        else "the first step does all the work",
        over,
        ((steps[0].name, each[0]), ("median of the others", usual)),
    )


@_rule
def uneven_steps(report: Report) -> Answer:
    """Of ten steps or more, leaving the first out, the slowest hundredth takes more than twice the median."""
    calls: Calls = None
    for row in _rows(report, "step")[1:]:
        calls = merged(calls, row.distribution)
    spread = spread_of(calls)
    if spread is None or spread.count < 10:
        return Silence("uneven_steps", f"{spread.count if spread else 0} steps after the first, ten are needed")
    if spread.most <= 2 * spread.middle:
        return None
    return Finding(
        "uneven_steps",
        f"some steps take {spread.most / spread.middle:.1f}x the median" if spread.middle else "steps are uneven",
        spread.most - spread.middle,
        (("99th percentile", spread.most), ("median", spread.middle)),
    )


@_rule
def late_compilation(report: Report) -> Answer:
    """Something is compiled in a step that is not the first: a recompilation, by a changed shape most often."""
    steps = [row.name for row in _rows(report, "step")]
    if len(steps) < 2:
        return Silence("late_compilation", "fewer than two steps")
    compiling = (node for node in report.root.every() if node.parent is not None and category_of(node.name) == COMPILE)
    places = ((next((n.text for n in node.path() if category_of(n) == STEP), steps[0]), node.cpu) for node in compiling)
    late = _summed((step, time) for step, time in places if step != steps[0])
    if not late:
        return None
    return Finding(
        "late_compilation",
        f"something is compiled in {len(late)} steps after the first: look for changing shapes (TORCH_LOGS=recompiles)",
        sum(late.values()),
        _largest(late),
    )


@_of_devices
def launch_bound(report: Report) -> Answer:
    """The device is idle before launches for more than a fifth of its busy and idle time together."""
    root = report.root
    if root.gap * 5 <= root.gap + root.gpu:
        return None
    share = root.gap / (root.gap + root.gpu)
    return Finding(
        "launch_bound",
        f"the device waits for launches {readable_share(share)} of the time: CUDA graphs or compiling would fill it",
        root.gap,
        _by_module(report, lambda node: node.gap_self),
    )


@_of_devices
def idle_gaps(report: Report) -> Answer:
    """One single time that the device was idle between two launches is more than 1% of its busy and idle time."""
    longest = sorted((gap for part in report.parts for gap in part.gaps), reverse=True)[:EVIDENCE]
    if not longest or longest[0][0] * 100 <= report.root.gap + report.root.gpu:
        return None
    idle, _, where, kernel = longest[0]
    return Finding(
        "idle_gaps",
        f"the device was idle for {readable_ns(idle)} at a stretch, in {where} before {middle(kernel, 60)}",
        idle,
        tuple((f"{where}, before {kernel}", idle) for idle, _, where, kernel in longest),
    )


@_rule
def residency_waits(report: Report) -> Answer:
    """Residency work that nothing hid takes more than 2% of the time."""
    nodes = [node for node in report.root.every() if node.parent is not None and node.name.category == RESIDENCY]
    if not nodes:
        return Silence("residency_waits", "no residency ranges")
    waits = _summed((node.name.text, max(0, node.resident - node.overlap)) for node in nodes)
    total = sum(waits.values())
    if total * 50 <= report.root.cpu:
        return None
    return Finding(
        "residency_waits",
        f"weights are waited for {readable_share(total / report.root.cpu)} of the time: prefetch earlier, or keep them",
        total,
        _largest(waits),
    )


@_of_devices
def copies(report: Report) -> Answer:
    """Copies are more than 5% of the device's busy time, what kernels hid not counted."""
    ops = [(node.name.text, *op) for node in report.root.every() for op in (node.ops or {}).items()]
    kinds = _summed((name, credit) for _, name, (_, _, credit) in ops if name.startswith("[memcpy"))
    where = _summed((text, credit) for text, name, (_, _, credit) in ops if name.startswith("[memcpy"))
    total = sum(kinds.values())
    if total * 20 <= report.root.gpu:
        return None
    most = max(kinds, key=lambda name: kinds[name])
    return Finding(
        "copies",
        f"copies take {readable_share(total / report.root.gpu)} of the device's time, most of them {most}",
        total,
        _largest(where),
    )


@_rule
def guidance(report: Report) -> Answer:
    """Passes without the condition, which only guidance needs, take more than a quarter of the steps' time."""
    steps = sum(_measure(report, row) for row in _rows(report, "step"))
    if not steps:
        return Silence("guidance", "no steps")
    nodes = (node for node in report.root.every() if node.name.text in _WITHOUT_CONDITION)
    passes = _summed((node.name.text, node.gpu if report.has_gpu else node.cpu) for node in nodes)
    total = sum(passes.values())
    if total * 4 <= steps:
        return None
    return Finding(
        "guidance",
        f"guidance's second pass takes {readable_share(total / steps)} of the steps: an interval of steps may do",
        total,
        _largest(passes),
    )


@_rule
def rank_skew(report: Report) -> Answer:
    """Ranks are more than 10% apart in requests (steps where there are none)."""
    if len(report.parts) < 2:
        return Silence("rank_skew", "one process")
    rows = _rows(report, "request") or _rows(report, "step")
    apart = {row.name: max(row.ranks.values()) - min(row.ranks.values()) for row in rows if (row.skew or 0) > 0.1}
    if not rows:
        return Silence("rank_skew", "no requests or steps")
    if not apart:
        return None
    worst = max((row for row in rows if row.name in apart), key=lambda row: apart[row.name])
    slow = max(worst.ranks, key=lambda rank: worst.ranks[rank])
    return Finding("rank_skew", f"ranks are apart: {slow} takes the longest", sum(apart.values()), _largest(apart))


@_of_devices
def exposed_communication(report: Report) -> Answer:
    """Communication that no other kernel hides is more than 5% of the device's busy time."""
    root = report.root
    if not root.of("communication"):
        return Silence("exposed_communication", "no communication kernels")
    exposed = root.of("communication") - root.of("communication_hidden")
    if exposed * 20 <= root.gpu:
        return None
    return Finding(
        "exposed_communication",
        f"communication that nothing hides takes {readable_share(exposed / root.gpu)} of the device's time"
        f" ({readable_share(exposed / root.of('communication'))} of all communication): overlap it with compute",
        exposed,
        _by_module(report, lambda node: node.communication - node.communication_hidden),
    )


@_of_devices
def waits(report: Report) -> Answer:
    """Calls inside of modules that wait for the device take more than 2% of the CPU time."""
    if not report.root.of("waited"):
        return None
    inside = _summed((module, node.waited) for node, module, _ in with_modules(report.root) if module and node.waited)
    total = sum(inside.values())
    if total * 50 <= report.root.cpu:
        return None
    return Finding(
        "waits",
        f"the CPU waits for the device inside of modules {readable_share(total / report.root.cpu)} of the time: look"
        " for .item(), .cpu(), nonzero(), and .to(device) of memory that is not pinned",
        total,
        _largest(inside),
    )


@_of_devices
def slow_launches(report: Report) -> Answer:
    """Calls that launch work take more than 10 us on average, more than 10% of the CPU time together, and longer than
    what they launch then waits to start. (Where that waits for long, the queue is full: the CPU is ahead, all is well.)
    """
    calls = sum(node.launches for node in report.root.children.values())
    if not calls:
        return Silence("slow_launches", "no launching calls")
    total = report.root.of("launching")
    if total <= 10_000 * calls or total * 10 <= report.root.cpu or report.root.of("queued") > total:
        return None
    return Finding(
        "slow_launches",
        f"launching calls take {readable_ns(total / calls)} each: the driver blocks in them (modules loaded at their"
        " first launch, copies from pageable memory, a lock), or the profiler slows them down",
        total,
        _by_module(report, lambda node: node.launching),
    )


@_rule
def late_allocation(report: Report) -> Answer:
    """Device memory is allocated from the driver in a step that is not the first."""
    if not any(part.has_memory for part in report.parts):
        return Silence("late_allocation", "no memory events: record with --cuda-memory-usage=true")
    steps = _rows(report, "step")
    if len(steps) < 2:
        return Silence("late_allocation", "fewer than two steps")
    late = [row for row in steps[1:] if row.allocated]
    if not late:
        return None
    return Finding(
        "late_allocation",
        f"{readable_bytes(sum(row.allocated for row in late))} of device memory are allocated in steps after the first"
        f" ({len(late)} of them): cudaMalloc waits for the device",
        sum(_measure(report, row) for row in late),
        _largest({row.name: _measure(report, row) for row in late}),
    )


@_of_devices
def unattributed(report: Report) -> Answer:
    """More than a tenth of the device time belongs to no range."""
    nodes = (node for node in report.root.every() if node.parent is not None and node.is_unknown())
    lost = _summed((node.name.text, node.gpu_self) for node in nodes)
    total = sum(lost.values())
    if total * 10 <= report.root.gpu:
        return None
    share = readable_share(total / report.root.gpu)
    nothing = all(node.is_unknown() for node in report.root.children.values())
    return Finding(
        "unattributed",
        "no range lies around the device's work: start the program with `fxnvtx run --nsys`, or let nsys trace nvtx"
        if nothing
        else f"{share} of the device time has no layer: see the rows that say why",
        total,
        _largest(lost),
    )


@_rule
def far_below_the_roof(report: Report) -> Answer:
    """Layers whose work is known take, at less than half of what the device can do, more than a tenth of the time."""
    whole = report.root.gpu if report.has_gpu else report.root.cpu
    known = [node for node in report.root.every() if node.parent is not None and node.rated and not node.roofless]
    if not any(node.roof for node in known):
        return Silence("far_below_the_roof", "no work of layers, or no peaks of the device (--peak)")
    far = _summed((n.name.text, n.rated - n.roof) for n in known if n.roof and 2 * n.roof < n.rated)
    total = sum(far.values())
    if total * 10 <= whole:
        return None
    return Finding(
        "far_below_the_roof",
        f"layers at less than half of what the device can do have {readable_share(total / whole)} of the time to win",
        total,
        _largest(far),
    )


@_rule
def above_the_roof(report: Report) -> Answer:
    """A layer is faster than the device can be: its work, its time or the peak is wrong, or a cache held its data."""
    nodes = [node for node in report.root.every() if node.parent is not None and node.roof and not node.roofless]
    if not nodes:
        return Silence("above_the_roof", "no work of layers, or no peaks of the device (--peak)")
    over = _summed((n.name.text, n.roof - n.rated) for n in nodes if n.roof > n.rated > 0)
    if not over:
        return None
    return Finding(
        "above_the_roof",
        f"{len(over)} layers are faster than the peaks allow: their data is in a cache, or the peaks are not right",
        sum(over.values()),
        _largest(over),
    )


def _rows(report: Report, by: str) -> list[Row]:
    return [row for row in report.rows(by) if row.kind == "range" and row.calls]


def _measure(report: Report, row: Row) -> int:
    return row.gpu if report.has_gpu else row.cpu


def _by_module(report: Report, measure: Callable[[Node], int]) -> tuple[tuple[str, int], ...]:
    """The modules with most of a measure of their own; what lies outside of modules by its outermost range's name."""
    return _largest(_summed((module or outer, measure(node)) for node, module, outer in with_modules(report.root)))


def _summed(items: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in items:
        found[name] = found.get(name, 0) + value
    return found


def _largest(values: dict[str, int]) -> tuple[tuple[str, int], ...]:
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    least = sum(value for _, value in ordered if value > 0) // 100  # a hundredth is no evidence
    return tuple(item for item in ordered[:EVIDENCE] if item[1] > least)
