"""Real captures against figures that were counted another way: SQL over the tables, or loops over the events."""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fxnvtx.report import Report, load
from fxnvtx.report.findings import findings

DATA = Path(__file__).parents[1] / "data"
TRACES = ("kineto_a100_alexnet", "kineto_mi250_train")
CAPTURES = ("h100_2gpu_slice", "mfu_2gpu_slice")
WORK = ("kernel", "gpu_memcpy", "gpu_memset")


# ------------------------------------------------------------------------------------------------ torch.profiler


@pytest.fixture(scope="module", params=TRACES)
def trace(request: pytest.FixtureRequest) -> tuple[list[dict[str, Any]], Report]:
    path = DATA / f"{request.param}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()), parse_float=Fraction)["traceEvents"], load(path)


def ns(value: Any) -> int:
    return round(Fraction(value) * 1000)


def times(event: dict[str, Any]) -> tuple[int, int]:
    return ns(event["ts"]), ns(event["ts"]) + ns(event["dur"])


def test_every_operation_of_a_profiler_trace_is_under_the_operator_that_launched_it(
    trace: tuple[list[dict[str, Any]], Report],
) -> None:
    """By correlation to the call, by time to the innermost range around it: one event at a time, in plain loops."""
    events, report = trace
    ranges = [event for event in events if event["cat"] in ("cpu_op", "user_annotation")]
    calls = {event["args"]["correlation"]: event for event in events if event["cat"] == "cuda_runtime"}
    wanted: Counter[tuple[str, str]] = Counter()
    lengths: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event["cat"] not in WORK:
            continue
        call = calls[event["args"]["correlation"]]
        at = ns(call["ts"])
        around = [
            one
            for one in ranges
            if (one["pid"], one["tid"]) == (call["pid"], call["tid"]) and times(one)[0] <= at < times(one)[1]
        ]
        inner = min(around, key=lambda one: one["dur"])["name"] if around else "launched outside every range"
        name = event["name"] if event["cat"] == "kernel" else event["cat"]
        wanted[inner, name] += 1
        lengths[inner, name] += ns(event["dur"])
    found: Counter[tuple[str, str]] = Counter()
    sums: Counter[tuple[str, str]] = Counter()
    for node in report.root.walk():
        for name, (count, length, _credit) in (node.ops or {}).items():
            short = "gpu_memcpy" if name.startswith("[memcpy") else "gpu_memset" if name == "[memset]" else name
            where = node.name.text.removeprefix("cannot attribute: ")
            found[where, short] += count
            sums[where, short] += length
    assert sum(wanted.values()) == sum(event["cat"] in WORK for event in events) > 10
    assert found == wanted
    assert sums == lengths


def test_the_device_was_busy_as_long_as_its_operations_together(trace: tuple[list[dict[str, Any]], Report]) -> None:
    events, report = trace
    busy = reach = 0
    for start, end in sorted(times(event) for event in events if event["cat"] in WORK):
        busy += max(0, end - max(start, reach))
        reach = max(reach, end)
    assert report.root.gpu == busy
    assert "no device work" not in {silence.why for silence in findings(report)[1]}


def test_calls_and_times_of_operators_are_those_of_the_trace(trace: tuple[list[dict[str, Any]], Report]) -> None:
    events, report = trace
    ranges = [event for event in events if event["cat"] in ("cpu_op", "user_annotation")]
    rows = {row.name: row for row in report.rows("range") if row.kind == "range"}
    assert {name: row.calls for name, row in rows.items()} == Counter(event["name"] for event in ranges)
    total: Counter[str] = Counter()
    for event in ranges:
        total[event["name"]] += ns(event["dur"])
    assert {name: row.cpu for name, row in rows.items()} == total


# ------------------------------------------------------------------------------------------------ Nsight Systems

# how much of some operations passed while kernels of another kind ran on their device
HIDDEN = """
WITH marked AS (SELECT *, max(end) OVER (PARTITION BY pid, device ORDER BY start, end
    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before FROM others),
  numbered AS (SELECT *, sum(before IS NULL OR start > before) OVER (PARTITION BY pid, device ORDER BY start, end)
    AS island FROM marked),
  busy AS (SELECT pid, device, min(start) AS start, max(end) AS end FROM numbered GROUP BY pid, device, island)
SELECT (SELECT sum(end - start) FROM these),
  (SELECT coalesce(sum(min(t.end, b.end) - max(t.start, b.start)), 0) FROM these t JOIN busy b
    ON t.pid = b.pid AND t.device = b.device AND t.start < b.end AND b.start < t.end)
"""


def hidden(name: str, these: str, others: str) -> tuple[int, int]:
    """(time of these operations, how much of it the others hide)."""
    database = sqlite3.connect(DATA / f"{name}.sqlite")
    kernels = (
        "SELECT globalPid AS pid, deviceId AS device, start, end FROM CUPTI_ACTIVITY_KIND_KERNEL"
        " JOIN StringIds ON id = demangledName WHERE lower(value)"
    )
    copies = "SELECT globalPid AS pid, deviceId AS device, start, end FROM CUPTI_ACTIVITY_KIND_MEMCPY"
    sources = {"communication": f"{kernels} LIKE '%nccl%'", "compute": f"{kernels} NOT LIKE '%nccl%'", "copies": copies}
    try:
        for view, source in (("these", these), ("others", others)):
            database.execute(f"CREATE TEMP VIEW {view} AS {sources[source]}")
        total, covered = database.execute(HIDDEN).fetchone()
    finally:
        database.close()
    return total or 0, covered


@pytest.mark.parametrize("name", CAPTURES)
def test_exposed_communication_and_hidden_copies_by_sql(name: str) -> None:
    root = load(DATA / f"{name}.sqlite").root
    talking = hidden(name, "communication", "compute")
    assert (root.of("communication"), root.of("communication_hidden")) == talking
    assert bool(talking[0]) == (name == "mfu_2gpu_slice")
    copying = hidden(name, "copies", "compute")
    assert (root.of("copying"), root.of("copying_hidden")) == copying
    assert copying[0] > 0


def test_the_finding_about_exposed_communication_by_sql() -> None:
    report = load(DATA / "mfu_2gpu_slice.sqlite")
    total, covered = hidden("mfu_2gpu_slice", "communication", "compute")
    (said,) = [finding for finding in findings(report)[0] if finding.rule == "exposed_communication"]
    assert said.ns == total - covered == 9_132_601
    assert f"{(total - covered) / report.root.gpu:.1%} of the device's time" in said.text
