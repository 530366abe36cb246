"""The few things in a report that are worth doing something about, each with its evidence (pure).

Every rule is a function of the report. It gives a `Finding`, or a `Silence` where the capture does not hold what it
takes to say, or None where all is well. Its docstring is its condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from ..categories import COMPILE, MODULE, RESIDENCY, STEP
from .format import readable_bytes, readable_ns, readable_share
from .labels import category_of, is_module
from .report import Report
from .rows import Row
from .tree import Calls, Node, merged, spread_of

__all__ = ["RULES", "Finding", "Silence", "findings", "findings_text"]

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


# ------------------------------------------------------------------------------------------------ the rules


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


def late_compilation(report: Report) -> Answer:
    """Something is compiled in a step that is not the first: a recompilation, by a changed shape most often."""
    steps = [row.name for row in _rows(report, "step")]
    if len(steps) < 2:
        return Silence("late_compilation", "fewer than two steps")
    late: dict[str, int] = {}
    for node in report.root.walk():
        if node.parent is None or category_of(node.name) != COMPILE:
            continue
        step = next((above for above in _above(node) if category_of(above.name) == STEP), None)
        if step is not None and step.name.text != steps[0]:
            late[step.name.text] = late.get(step.name.text, 0) + node.cpu
    if not late:
        return None
    return Finding(
        "late_compilation",
        f"something is compiled in {len(late)} steps after the first: look for changing shapes (TORCH_LOGS=recompiles)",
        sum(late.values()),
        _largest(late),
    )


def launch_bound(report: Report) -> Answer:
    """The device is idle before launches for more than a fifth of its busy and idle time together."""
    if not report.has_gpu:
        return Silence("launch_bound", "no device work")
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


def idle_gaps(report: Report) -> Answer:
    """One single time that the device was idle between two launches is more than 1% of its busy and idle time."""
    if not report.has_gpu:
        return Silence("idle_gaps", "no device work")
    longest = sorted((gap for part in report.parts for gap in part.gaps), reverse=True)[:EVIDENCE]
    if not longest or longest[0][0] * 100 <= report.root.gap + report.root.gpu:
        return None
    idle, _, where, kernel = longest[0]
    return Finding(
        "idle_gaps",
        f"the device was idle for {readable_ns(idle)} at a stretch, in {where} before {kernel}",
        idle,
        tuple((f"{where}, before {kernel}", idle) for idle, _, where, kernel in longest),
    )


def residency_waits(report: Report) -> Answer:
    """Residency work that nothing hid takes more than 2% of the time."""
    nodes = [node for node in report.root.walk() if node.parent is not None and node.name.category == RESIDENCY]
    if not nodes:
        return Silence("residency_waits", "no residency ranges")
    waits: dict[str, int] = {}
    for node in nodes:
        open_time = max(0, node.resident - node.overlap)
        waits[node.name.text] = waits.get(node.name.text, 0) + open_time
    total = sum(waits.values())
    if total * 50 <= report.root.cpu:
        return None
    return Finding(
        "residency_waits",
        f"weights are waited for {readable_share(total / report.root.cpu)} of the time: prefetch earlier, or keep them",
        total,
        _largest(waits),
    )


def copies(report: Report) -> Answer:
    """Copies are more than 5% of the device's busy time, what kernels hid not counted."""
    if not report.has_gpu:
        return Silence("copies", "no device work")
    kinds: dict[str, int] = {}
    where: dict[str, int] = {}
    for node in report.root.walk():
        for name, (_count, _duration, credit) in (node.ops or {}).items():
            if name.startswith("[memcpy"):
                kinds[name] = kinds.get(name, 0) + credit
                where[node.name.text] = where.get(node.name.text, 0) + credit
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


def guidance(report: Report) -> Answer:
    """Passes without the condition, which only guidance needs, take more than a quarter of the steps' time."""
    steps = sum(_measure(report, row) for row in _rows(report, "step"))
    if not steps:
        return Silence("guidance", "no steps")
    passes: dict[str, int] = {}
    for node in report.root.walk():
        if node.name.text in ("predict_noise.unconditional", "predict_noise.uncond"):
            passes[node.name.text] = passes.get(node.name.text, 0) + (node.gpu if report.has_gpu else node.cpu)
    total = sum(passes.values())
    if total * 4 <= steps:
        return None
    return Finding(
        "guidance",
        f"guidance's second pass takes {readable_share(total / steps)} of the steps: an interval of steps may do",
        total,
        _largest(passes),
    )


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


def exposed_communication(report: Report) -> Answer:
    """Communication that no other kernel hides is more than 5% of the device's busy time."""
    if not report.has_gpu:
        return Silence("exposed_communication", "no device work")
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


def waits(report: Report) -> Answer:
    """Calls inside of modules that wait for the device take more than 2% of the CPU time."""
    if not report.has_gpu:
        return Silence("waits", "no device work")
    inside: dict[str, int] = {}
    for node, module in _with_modules(report):
        if module and node.waited:
            inside[module] = inside.get(module, 0) + node.waited
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


def slow_launches(report: Report) -> Answer:
    """Calls that launch work take more than 10 us on average, more than 10% of the CPU time together, and longer than
    what they launch then waits to start. (Where that waits for long, the queue is full: the CPU is ahead, all is well.)
    """
    if not report.has_gpu:
        return Silence("slow_launches", "no device work")
    calls = sum(node.launches for node in report.root.kids.values())
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


def late_allocation(report: Report) -> Answer:
    """Device memory is allocated from the driver in a step that is not the first."""
    if not any(part.has_memory for part in report.parts):
        return Silence("late_allocation", "no memory events: record with --cuda-memory-usage=true")
    steps = _rows(report, "step")
    if len(steps) < 2:
        return Silence("late_allocation", "fewer than two steps")
    late = {row.name: row.allocated for row in steps[1:] if row.allocated}
    if not late:
        return None
    return Finding(
        "late_allocation",
        f"{readable_bytes(sum(late.values()))} of device memory are allocated in steps after the first"
        f" ({len(late)} of them): cudaMalloc waits for the device",
        sum(_measure(report, row) for row in steps[1:] if row.allocated),
        _largest({row.name: _measure(report, row) for row in steps[1:] if row.allocated}),
    )


def unattributed(report: Report) -> Answer:
    """More than a tenth of the device time belongs to no range."""
    if not report.has_gpu:
        return Silence("unattributed", "no device work")
    lost: dict[str, int] = {}
    for node in report.root.walk():
        if node.parent is not None and node.is_unknown():
            lost[node.name.text] = lost.get(node.name.text, 0) + node.gpu_self
    total = sum(lost.values())
    if total * 10 <= report.root.gpu:
        return None
    return Finding(
        "unattributed",
        f"{readable_share(total / report.root.gpu)} of the device time has no layer: see the rows that say why",
        total,
        _largest(lost),
    )


def far_below_the_roof(report: Report) -> Answer:
    """Layers whose work is known take, at less than half of what the device can do, more than a tenth of the time."""
    whole = report.root.gpu if report.has_gpu else report.root.cpu
    known = [node for node in report.root.walk() if node.parent is not None and node.rated and not node.roofless]
    if not any(node.roof for node in known):
        return Silence("far_below_the_roof", "no work of layers, or no peaks of the device (--peak)")
    far: dict[str, int] = {}
    for node in known:
        if node.roof and 2 * node.roof < node.rated:
            name = node.name.text
            far[name] = far.get(name, 0) + node.rated - node.roof
    total = sum(far.values())
    if total * 10 <= whole:
        return None
    return Finding(
        "far_below_the_roof",
        f"layers at less than half of what the device can do have {readable_share(total / whole)} of the time to win",
        total,
        _largest(far),
    )


def above_the_roof(report: Report) -> Answer:
    """A layer is faster than the device can be: its work, its time or the peak is wrong, or a cache held its data."""
    nodes = [node for node in report.root.walk() if node.parent is not None and node.roof and not node.roofless]
    if not nodes:
        return Silence("above_the_roof", "no work of layers, or no peaks of the device (--peak)")
    over: dict[str, int] = {}
    for node in nodes:
        if node.roof > node.rated > 0:
            over[node.name.text] = over.get(node.name.text, 0) + node.roof - node.rated
    if not over:
        return None
    return Finding(
        "above_the_roof",
        f"{len(over)} layers are faster than the peaks allow: their data is in a cache, or the peaks are not right",
        sum(over.values()),
        _largest(over),
    )


RULES: tuple[Callable[[Report], Answer], ...] = (
    first_step,
    uneven_steps,
    late_compilation,
    launch_bound,
    idle_gaps,
    residency_waits,
    copies,
    guidance,
    rank_skew,
    exposed_communication,
    waits,
    slow_launches,
    late_allocation,
    unattributed,
    far_below_the_roof,
    above_the_roof,
)


# ------------------------------------------------------------------------------------------------ shared


def _rows(report: Report, by: str) -> list[Row]:
    return [row for row in report.rows(by) if row.kind == "range" and row.calls]


def _measure(report: Report, row: Row) -> int:
    return row.gpu if report.has_gpu else row.cpu


def _above(node: Node) -> list[Node]:
    found = []
    at = node.parent
    while at is not None and at.parent is not None:
        found.append(at)
        at = at.parent
    return found


def _by_module(report: Report, measure: Callable[[Node], int]) -> tuple[tuple[str, int], ...]:
    """The modules with most of a measure of their own; what lies outside of modules by its range's name."""
    found: dict[str, int] = {}
    outer: dict[int, str] = {}  # of nodes outside of modules, the outermost range's name
    for node, module in _with_modules(report):
        if not module:
            above = outer.get(id(node.parent), node.name.text)
            outer[id(node)] = module = above
        found[module] = found.get(module, 0) + measure(node)
    return _largest(found)


def _with_modules(report: Report) -> Iterator[tuple[Node, str]]:
    """All ranges, outer ones first, and where each is: the innermost module, and the operator in it if any
    ("blocks.0.attn > aten::copy_"); without modules the outermost operator stands for one; "" where neither is."""
    todo: list[tuple[Node, str, str]] = [(kid, "", "") for kid in report.root.kids.values()]
    while todo:
        node, module, inner = todo.pop()
        text = node.name.text
        # another library's domain, such as NCCL's, names no modules of a model
        if is_module(node.name) and (not module or (category_of(node.name) == MODULE and not node.name.domain)):
            module, inner = text, ""
        elif module and is_module(node.name):
            inner = text
        yield node, f"{module} > {inner}" if inner else module
        todo.extend((kid, module, inner) for kid in node.kids.values())


def _largest(values: dict[str, int]) -> tuple[tuple[str, int], ...]:
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    least = sum(value for _, value in ordered if value > 0) // 100  # a hundredth is no evidence
    return tuple(item for item in ordered[:EVIDENCE] if item[1] > least)
