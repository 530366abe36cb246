"""Several files are several ranks: one tree, and every row says how far they are apart."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from fxnvtx.errors import CaptureError, ConfigError
from fxnvtx.recording import Recording
from fxnvtx.report import load, render_text
from fxnvtx.report.capture import rank_of
from fxnvtx.report.labels import Name
from fxnvtx.report.report import load_on
from fxnvtx.report.tree import Node, Tree

from .captures import Capture
from .samples import pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    return [pipeline(folder / f"run.rank{rank}.sqlite", scale=1 + rank).close() for rank in range(3)]


def test_ranks_are_merged_with_their_skew(files: list[Path]) -> None:
    report = load(*files, jobs=1)
    assert [part.title for part in report.parts] == ["rank 0", "rank 1", "rank 2"]
    row = next(row for row in report.rows(by="module") if row.name == "transformer.blocks.0.attn")
    assert row.ranks == {"rank 0": 240_000, "rank 1": 480_000, "rank 2": 720_000}
    assert row.gpu == 1_440_000
    assert row.skew == pytest.approx(2 / 3)
    assert row.calls == 24
    assert "66.7%" in render_text(report, by="module", width=140)


@pytest.mark.slow
def test_processes_give_what_one_process_gives(files: list[Path]) -> None:
    alone, spread = load(*files, jobs=1), load(*files, jobs=3)
    for view in ("tree", "module", "kernel"):
        assert spread.rows(by=view) == alone.rows(by=view)


def test_a_script_without_a_main_guard_may_load_several_files(files: list[Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, fxnvtx.report as report\nprint('once')\nprint(len(report.load(*sys.argv[1:], jobs=2).parts))\n"
    )
    done = subprocess.run([sys.executable, script, *files], capture_output=True, text=True, check=True)
    assert done.stdout == "once\n3\n"


def test_two_processes_in_one_file(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "both.sqlite")
    for pid, length in ((7, 30), (8, 60)):
        capture.range(0, 100, "layer", pid=pid)
        # the same correlation numbers exist in both: they must not be mixed up
        capture._correlation = 0
        capture.kernel(1000, 1000 + length, capture.call(10, 20, pid=pid), pid=pid)
    (row,) = load(capture.close()).rows()
    assert row.ranks == {"process 7": 30, "process 8": 60}
    assert (row.gpu, row.calls) == (90, 2)


def test_a_module_that_one_rank_never_ran(tmp_path: Path) -> None:
    one, two = Capture(tmp_path / "rank0.sqlite"), Capture(tmp_path / "rank1.sqlite")
    one.range(0, 100, "shared")
    two.range(0, 100, "shared")
    two.range(200, 250, "only here")
    rows = {row.name: row for row in load(one.close(), two.close()).rows()}
    assert rows["only here"].ranks == {"rank 0": 0, "rank 1": 50}
    assert rows["only here"].skew == 1.0


def test_rank_of_a_recording_comes_from_the_recording(tmp_path: Path) -> None:
    paths = []
    for rank in (0, 1):
        recording = Recording()
        recording.meta = {"pid": 5, "rank": rank}
        recording.stop()
        paths.append(recording.save(tmp_path / f"{rank}.json"))
    assert [part.title for part in load(*paths).parts] == ["rank 0", "rank 1"]


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("run.rank3.sqlite", 3),
        ("rank_12.nsys-rep", 12),
        ("RANK-0/capture.sqlite", 0),
        ("rank1/rank2.sqlite", 2),
        ("lowrank16.sqlite", None),
        ("rank3/deeper/capture.sqlite", None),
    ],
)
def test_rank_from_a_path(name: str, rank: int | None) -> None:
    assert rank_of(Path(name)) == rank


def test_equal_titles_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        capture = Capture(tmp_path / f"{name}.sqlite")
        capture.range(0, 100, "layer")
        paths.append(capture.close())
    (row,) = load(*paths).rows()
    assert len(row.ranks) == 2


@pytest.mark.slow
def test_a_tree_survives_the_way_between_processes() -> None:
    tree = Tree()
    node: Node = tree.root
    for depth in range(3000):  # deeper than Python's recursion limit
        node = tree.child(node, Name(f"level {depth}", "module"))
        node.calls, node.cpu, node.first = 1, depth, depth
    node.add_op("kernel", 1, 5, 5)
    node.gpu_self = 5
    tree.total()
    copy = pickle.loads(pickle.dumps(tree.root))
    assert [item.name for item in copy.walk()] == [item.name for item in tree.root.walk()]
    assert copy.gpu == 5
    assert list(copy.walk())[-1].ops == {"kernel": [1, 5, 5]}


class LocalClient:
    """The two methods of a dask.distributed.Client, run here."""

    def map(self, function, items, pure=True):  # type: ignore[no-untyped-def]
        return [lambda item=item: function(item) for item in items]

    def gather(self, futures):  # type: ignore[no-untyped-def]
        return [future() for future in futures]


def test_any_mapper_gives_the_same_report(files: list[Path]) -> None:
    assert load_on(LocalClient(), *files).rows() == load(*files, jobs=1).rows()
    with pytest.raises(ConfigError, match="needs a dask"):
        load_on(object(), *files)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="no capture given"):
        load_on(LocalClient())


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_report(files: list[Path]) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert load_on(client, *files).rows(by="module") == load(*files, jobs=1).rows(by="module")
        with pytest.raises(CaptureError, match="No such file"):
            load_on(client, files[0].parent / "none.sqlite")
