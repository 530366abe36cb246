"""Captures of every kind, damaged at random, through every command: an answer or one line, soon and in little memory.

    python -m tests.report.mutated [--cases 3000] [--seed 0] [--folder FOLDER]

Each case damages one file (bytes over, out, in; values of a table or document replaced; a table or column dropped) and
gives it to the commands, in this process. Whatever goes wrong is printed with the case's number, which makes it again.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import random
import resource
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from fxnvtx.cli import cli
from fxnvtx.recording import Range
from fxnvtx.recording.spool import SUFFIX
from fxnvtx.report import write_chrome, write_speedscope

from .captures import Capture
from .samples import pipeline, recorded

SECONDS, MEMORY = 20, 4 << 30  # a case takes some ten milliseconds and some MiB
WRONG: tuple[Any, ...] = (
    None,
    "",
    "x",
    "\x00\x1b[31m",
    -1,
    0,
    1.5,
    2**31,
    2**63 - 1,
    -(2**63),
    10**25,
    [],
    {},
    True,
    "é" * 300,
)
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("report", "FILE"),
    ("report", "FILE", "--format", "json", "--findings", "--between", "0:1ms"),
    ("report", "FILE", "--format", "csv", "--by", "module", "--fold"),
    ("report", "FILE", "-o", "OUT.html", "--kernels"),
    ("report", "FILE", "-o", "OUT.chrome.json"),
    ("report", "FILE", "-o", "OUT.speedscope.json"),
    ("report", "FILE", "--scrub", "-o", "OUT.copy"),
    ("report", "FILE", "--findings", "--steps", "1:", "--keep-compile"),
    ("report", "FILE", "GOOD", "--by", "kernel", "--jobs", "1"),
    ("diff", "FILE", "GOOD", "--format", "markdown"),
    ("diff", "GOOD", "FILE", "--by", "kernel", "--format", "json"),
    ("diff", "FILE", "GOOD", "--format", "html", "-o", "OUT.html"),
)


def sources(folder: Path) -> list[Path]:
    """One small file of each kind; the first one is the undamaged other side of comparisons."""
    folder.mkdir(exist_ok=True)
    found = [pipeline(folder / "good.sqlite", requests=1, steps=2, blocks=2).close()]
    capture = pipeline(folder / "rich.sqlite", requests=2, steps=2, blocks=2)
    for number in range(6):
        at = 1_000 + 20 * number
        capture.range(at, at + 15, f"blocks.{number}.attn", registered=bool(number % 2), payload=number)
        capture.kernel(
            at + 400, at + 430, capture.call(at + 1, at + 4), "ncclDevKernel" if number % 2 else "gemm", stream=9
        )
        capture.memory(at + 5, capture.call(at + 5, at + 8, name="cudaMalloc_v3020"), 1000)
    capture.call(2_000, 2_900, name="cudaStreamSynchronize_v3020")
    capture.range(3_000, None, "open")
    capture.range(10, 5_000, "aside", kind=60)
    found.append(capture.close())
    graphs = Capture(folder / "graphs.sqlite", version="2026_2")
    graphs.range(0, 500, "net")
    for node in range(10, 14):
        graphs.graph_node(20 * node, node, node - 5)
        graphs.kernel(1000 + 50 * node, 1030 + 50 * node, graphs.call(100 + node, 101 + node), node=node)
    graphs.graph_run(3000, 3500, graphs.call(300, 320), 7)
    found.append(graphs.close())
    ranges = [
        Range("request#0", "request", None, 1, 0, 0, 900),
        *(Range(f"denoising_step_{n}_t9", "step", n, 1, 1, 100 * n, 100 * n + 90) for n in range(4)),
        *(Range(f"blocks.{n}.attn", "module", None, 1, 2, 100 * n + 5, 100 * n + 60) for n in range(4)),
    ]
    recording = recorded(ranges, pid=5, classes={"blocks.0.attn": "Attention"}).save(folder / "recording.json")
    found.append(recording)
    rows = [
        [number, r.label, r.category, r.payload, 1, r.depth, r.start_ns, r.end_ns, False]
        for number, r in enumerate(ranges)
    ]
    lines = (
        {"format": "fxnvtx-recording", "version": 1, "meta": {"pid": 5, "first": True}},
        {"ranges": rows, "ended": [], "marks": [["mark", "op", None, 1, 7]], "classes": {}, "strays": 0},
    )
    spool = folder / f"5{SUFFIX}"
    spool.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found.append(spool)
    trace: dict[str, Any] = {"schemaVersion": 1, "traceEvents": []}
    for number in range(8):
        ids = {"correlation": number + 1}
        for kind, name, start, length, thread, more in (
            ("cpu_op", "aten::mm", 10 * number, 8, 3, {}),
            ("cuda_runtime", "cudaLaunchKernel", 10 * number + 1, 2, 3, ids),
            ("kernel", "gemm", 10 * number + 5.25, 6.5, 7, {**ids, "device": 0, "stream": 7}),
            ("gpu_memcpy", "Memcpy HtoD", 10 * number + 6, 2, 8, {**ids, "device": 0, "stream": 8, "bytes": 64}),
        ):
            pid = 1 if thread == 3 else 0
            trace["traceEvents"].append(
                {
                    "ph": "X",
                    "cat": kind,
                    "name": name,
                    "pid": pid,
                    "tid": thread,
                    "ts": start,
                    "dur": length,
                    "args": more,
                }
            )
    kineto = folder / "kineto.json"
    kineto.write_text(json.dumps(trace))
    found.append(kineto)
    zipped = folder / "kineto.json.gz"
    zipped.write_bytes(gzip.compress(kineto.read_bytes(), mtime=0))
    found.append(zipped)
    for writer, name in ((write_chrome, "chrome.json"), (write_speedscope, "profile.speedscope.json")):
        found.append(writer(found[1], folder / name))
    return found


def damage(source: Path, target: Path, rng: random.Random) -> None:
    """A damaged copy."""
    kind = rng.random()
    if source.suffix == ".sqlite" and kind < 0.5:
        target.write_bytes(source.read_bytes())
        _in_tables(target, rng)
        return
    content = source.read_bytes()
    if source.suffix == ".gz" and kind < 0.7:
        target.write_bytes(gzip.compress(_changed(gzip.decompress(content), rng), mtime=0))
    elif source.suffix == ".json" and kind < 0.6:
        document = json.loads(content)
        for _ in range(rng.randint(1, 4)):
            _in_document(document, rng)
        target.write_text(json.dumps(document))
    else:
        target.write_bytes(_changed(content, rng))


def _changed(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        patch = (
            rng.randbytes(rng.randint(1, 30))
            if rng.random() < 0.5
            else rng.choice((b"\x00", b"\xff" * 9, b'"', b"[" * 2000, b"9" * 40))
        )
        kind = rng.random()
        if kind < 0.5:
            data[at : at + len(patch)] = patch
        elif kind < 0.7:
            data[at:at] = patch
        elif kind < 0.85:
            del data[at : at + rng.randint(1, 5000)]
        else:
            del data[at:]
    return bytes(data)


def _in_document(document: Any, rng: random.Random) -> None:
    """Replace, double or drop a value somewhere in it."""
    at = document
    while isinstance(at, (dict, list)) and at:
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.85:
            at = at[key]
            continue
        kind = rng.random()
        if kind < 0.8:
            at[key] = copy.deepcopy(rng.choice(WRONG))
        elif kind < 0.9:
            del at[key]
        elif isinstance(at, list):
            at.insert(key, copy.deepcopy(at[rng.randrange(len(at))]))
        return


def _in_tables(path: Path, rng: random.Random) -> None:
    database = sqlite3.connect(path)
    try:
        for _ in range(rng.randint(1, 4)):
            tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            if not tables:
                break
            table = rng.choice(tables)
            columns = [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')]
            column, kind = rng.choice(columns), rng.random()
            try:
                if kind < 0.7:
                    some = rng.choice(("1", "rowid % 3 = 0", f"rowid = {rng.randint(1, 40)}"))
                    value = rng.choice(
                        [item for item in WRONG if not isinstance(item, (list, dict)) and item != 10**25]
                    )
                    database.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE {some}', (value,))
                elif kind < 0.8:
                    database.execute(f'UPDATE "{table}" SET "{column}" = "{column}" * {rng.choice((-1, 1000, 2**40))}')
                elif kind < 0.9:
                    database.execute(f'ALTER TABLE "{table}" DROP COLUMN "{column}"')
                else:
                    database.execute(f'DROP TABLE "{table}"')
            except sqlite3.Error:
                continue  # a column that must not be empty, or the last one
        database.commit()
    finally:
        database.close()


class Late(BaseException):
    """A command takes too long."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(_signal: int, _frame: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


ANSWERED: list[int] = []  # exit codes


def told(path: Path, good: Path, command: tuple[str, ...], folder: Path) -> str:
    """What is wrong with the answer; "" for nothing."""
    words = [word.replace("FILE", str(path)).replace("GOOD", str(good)) for word in command]
    words = [str(folder / word) if word.startswith("OUT.") else word for word in words]
    try:
        with limited(SECONDS):
            done = CliRunner().invoke(cli, words)
    except Late:
        return f"took more than {SECONDS} s"
    ANSWERED.append(done.exit_code)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return "".join(traceback.format_exception(*done.exc_info)) if done.exc_info else repr(done.exception)
    if done.exit_code not in (0, 1, 2):
        return f"exit code {done.exit_code}"
    if done.exit_code == 1 and done.output.count("\n") != 1:
        return f"an error of {done.output.count(chr(10))} lines: {done.output[:500]}"
    return "" if done.output.replace("\n", "").isprintable() or done.exit_code else "unprintable output"


def run(cases: int, seed: int, folder: Path, say: Callable[[str], None] = print, commands: int = 4) -> int:
    """How many of so many cases went wrong."""
    folder.mkdir(exist_ok=True)
    good, *others = files = sources(folder / "sources")
    wrong = 0
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        source = files[number % len(files)] if others else good
        path = folder / f"case{''.join(source.suffixes[-2:])}"
        damage(source, path, rng)
        for command in rng.sample(COMMANDS, commands):
            problem = told(path, good, command, folder)
            if problem:
                wrong += 1
                say(f"case {number} ({source.name}), {' '.join(command)}: {problem}")
                if problem.startswith("took"):
                    break
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)

        wrong = run(arguments.cases, arguments.seed, folder, lambda text: print(text, flush=True), arguments.commands)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answered = ANSWERED.count(0) / max(1, len(ANSWERED))
    print(
        f"{arguments.cases} cases, {wrong} wrong, {answered:.0%} of {len(ANSWERED)} commands gave an answer, "
        f"{time.process_time() - begin:.0f} CPU s, {most:.0f} MiB at most"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
