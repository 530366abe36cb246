"""The work of eager layers: equal to torch's own counter, harmless, and counted once for each set of shapes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx import recording as work
from fxnvtx.categories import Numbers
from fxnvtx.modules import call_slot as slot
from fxnvtx.recording import Recording
from fxnvtx.report import Report
from fxnvtx.report.capture.recording import read_recording
from fxnvtx.report.part import Window

from ..models import samples
from ..support import diffusers_zoo as zoo
from ..support.work_truth import PEAKS, report_of, shown_flops, true_flops

ZOO = ("dit", "sd3", "flux", "ltx_video", "pixart", "sana", "vae_kl", "unet")


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two living models with one name nobody could say whose work it is; other tests' models may still be there, and
    what they compiled: after that not every eager call is counted."""
    monkeypatch.setattr(work, "_entries", {})
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def sample(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, object]]:
    if name.startswith("reference "):
        return *getattr(samples, name.removeprefix("reference "))(), {}
    pytest.importorskip("diffusers", reason="the diffusers extra is not installed")
    model, arguments = zoo.build(name)
    return model, (), arguments


CASES = [("reference dit", "hooks"), *((name, "auto") for name in ("reference dit", "reference vae", *ZOO))]


@pytest.mark.parametrize(("name", "path"), CASES)
def test_every_layer_is_what_torch_counts(name: str, path: str) -> None:
    model, args, kwargs = sample(name)
    torch.manual_seed(1)
    plain = model(*args, **kwargs)
    truth = {label: flops for label, flops in true_flops(model, lambda: model(*args, **kwargs), "net").items() if flops}
    fxnvtx.instrument(model, "net", path=path)
    torch.manual_seed(1)
    with fxnvtx.record(work=True) as counted:
        result = model(*args, **kwargs)
    after = torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(zoo.tensors_of(plain), zoo.tensors_of(result), strict=True))
    assert shown_flops(counted) == truth
    torch.manual_seed(1)
    with fxnvtx.record() as later:
        model(*args, **kwargs)
        model(*args, **kwargs)
    assert shown_flops(later) == {label: 2 * flops for label, flops in truth.items()}
    torch.manual_seed(1)
    model(*args, **kwargs)
    assert torch.equal(torch.rand(1), after), "random numbers were drawn"
    root = next(row for row in report_of(later).rows() if row.name == "net")
    tops = [row for row in report_of(later).rows() if row.depth == 0]
    assert (root.flops, root.unrated) == (2 * truth["net"], 0)
    assert sum(row.flops for row in tops) == root.flops


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu()) + x


def test_bytes_of_eager_layers_are_what_each_operator_reads_and_writes() -> None:
    model = fxnvtx.instrument(Net(), "net")
    with fxnvtx.record(work=True) as recording:
        model(torch.rand(2, 4))
    rows = {row.name: row for row in report_of(recording).rows()}
    assert rows["net.a"].moved == 4 * (8 + 32 + 8 + 16)  # input, weight, bias, result
    assert rows["net.b"].moved == 4 * (16 + 32 + 4 + 8)
    assert rows["net"].moved == rows["net.a"].moved + rows["net.b"].moved + 4 * (16 + 16) + 4 * 3 * 8  # relu, sum


def test_a_call_is_counted_once_for_each_set_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxnvtx.compile import metering

    model = fxnvtx.instrument(Net(), "net")
    seen: list[object] = []
    original = metering._Mode.__torch_dispatch__

    def counting(self: object, func: object, *rest: object, **more: object) -> object:
        seen.append(func)
        return original(self, func, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(metering._Mode, "__torch_dispatch__", counting)
    with fxnvtx.record(work=True):
        model(torch.rand(2, 4))
        first = len(seen)
        model(torch.rand(2, 4))
        assert first == len(seen) > 0
        model(torch.rand(3, 4))
        assert len(seen) == 2 * first
    model(torch.rand(5, 4))
    with fxnvtx.record():
        model(torch.rand(5, 4))
    assert len(seen) == 2 * first


def test_recording_costs_no_call_more_for_the_work_it_carries() -> None:
    """Whether the work is known or not, a call under a recorder runs the same functions."""

    def functions_called() -> list[str]:
        found: list[str] = []
        sys.setprofile(lambda frame, event, _: found.append(frame.f_code.co_name) if event == "call" else None)
        try:
            model(x)
        finally:
            sys.setprofile(None)
        return found

    model, x = fxnvtx.instrument(Net(), "net"), torch.rand(2, 4)
    with fxnvtx.record():
        model(x)
        before = functions_called()
    with fxnvtx.record(work=True):
        model(x)
    assert slot.metered is None
    with fxnvtx.record() as recording:
        model(x)
        assert functions_called() == before
    assert recording.meta["work"]


def test_every_call_has_the_work_of_its_own_shapes(tmp_path: Path) -> None:
    """In each request what was called there; also in a file."""
    model = fxnvtx.instrument(Net(), "net")
    batches: list[tuple[int, ...]] = [(2, 3, 3), (7,), (2,)]
    with fxnvtx.record(work=True) as recording:
        for sizes in batches:
            with fxnvtx.range("request", category="request"):
                for size in sizes:
                    with fxnvtx.range("around"):
                        model(torch.rand(size, 4))
    alone = {}
    for size in (2, 3, 7):
        with fxnvtx.record(work=True) as single:
            model(torch.rand(size, 4))
        alone[size] = {row.name: row for row in report_of(single).rows()}
    for tree in (recording, Recording.load(recording.save(tmp_path / "recording.json"))):
        roots = [r for r in tree.ranges if r.label == "request"]
        for number, sizes in enumerate(batches):
            window = Window(Numbers.read(str(number)))
            report = Report([read_recording(tree, window=window)], PEAKS)
            rows = {row.name: row for row in report.rows()}
            assert len(roots) == 3 and not any(rows[name].unrated for name in ("net", "net.a", "net.b"))
            for name in ("net", "net.a", "net.b"):
                assert rows[name].calls == len(sizes)
                assert rows[name].flops == sum(alone[size][name].flops for size in sizes) > 0
                assert rows[name].moved == sum(alone[size][name].moved for size in sizes) > 0
        whole = {row.name: row for row in report_of(tree).rows("module")}
        assert whole["net"].flops == sum(alone[size]["net"].flops for sizes in batches for size in sizes)


def test_where_no_call_says_its_shapes_the_work_is_unknown_and_not_wrong() -> None:
    model = fxnvtx.instrument(Net(), "net")
    with fxnvtx.record(work=True):
        model(torch.rand(2, 4))
        model(torch.rand(3, 4))
    with fxnvtx.record() as recording:
        model(torch.rand(3, 4))
    rows = {row.name: row for row in report_of(recording).rows()}
    assert all(row.flops == 0 and row.unrated and row.headroom is None for row in rows.values())


def test_the_work_of_a_model_that_is_gone_is_not_carried() -> None:
    model = fxnvtx.instrument(Net(), "net")
    with fxnvtx.record(work=True):
        model(torch.rand(2, 4))
    assert work.carried({"net.a"})
    del model
    assert not work.carried({"net.a"})


def test_a_call_that_fails_leaves_no_half_work() -> None:
    class Failing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(str(self.a(x).shape))

    model = fxnvtx.instrument(Failing(), "failing")
    with fxnvtx.record(work=True) as recording, pytest.raises(ValueError, match="2, 8"):
        model(torch.rand(2, 4))
    assert recording.meta["work"] == []
    assert recording.balanced


def test_work_survives_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = fxnvtx.instrument(Net(), "net")
    with fxnvtx.record(work=True) as recording:
        model(torch.rand(2, 4))
    loaded = Recording.load(recording.save(tmp_path / "r.json"))
    assert [row.flops for row in report_of(loaded).rows()] == [row.flops for row in report_of(recording).rows()]


class Named(torch.Tensor):
    """A subclass that computes as any tensor does."""


@contextlib.contextmanager
def odd(kind: str, model: nn.Module, rows: torch.Tensor) -> Iterator[tuple[nn.Module, Any, tuple[str, ...]]]:
    """A model, its input, and how to ask its output for the plain tensors that it is made of."""
    if kind == "plain":
        yield model, rows, ()
    elif kind == "parameter":
        yield model, nn.Parameter(rows), ()
    elif kind == "subclass":
        yield model, rows.as_subclass(Named), ()
    elif kind == "nested":
        yield model, torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 2, 5])), ("values",)
    elif kind == "two":
        from torch.testing._internal.two_tensor import TwoTensor

        yield model, TwoTensor(rows, rows.clone()), ("a", "b")
    else:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import distribute_module, distribute_tensor
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        try:
            mesh = DeviceMesh("cpu", [0])
            yield distribute_module(model, mesh), distribute_tensor(rows, mesh), ("to_local",)
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["plain", "parameter", "subclass", "nested", "two", "distributed"])
def test_tensors_that_compute_in_their_own_way(kind: str, grad: bool) -> None:
    """What they are made of is counted, and the call is what it was."""
    with torch.set_grad_enabled(grad), odd(kind, Net(), torch.rand(5, 4)) as (model, x, parts):
        fxnvtx.instrument(model, "net")
        want = model(x)
        with fxnvtx.record(work=True) as recording:
            found = model(x)
        assert type(found) is type(want)
        if not parts:
            assert torch.equal(found, want)
        for name in parts:
            ours, theirs = (getattr(tensor, name) for tensor in (found, want))
            assert torch.equal(ours() if callable(ours) else ours, theirs() if callable(theirs) else theirs)
    one = {"net": 640, "net.a": 320, "net.b": 320}
    assert shown_flops(recording) == {label: (len(parts) or 1) * flops for label, flops in one.items()}


def test_custom_operators_are_not_guessed() -> None:
    @torch.library.custom_op("fxnvtx_work::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    model = fxnvtx.instrument(nn.Sequential(Custom(), nn.Linear(4, 4)), "net")
    with fxnvtx.record(work=True) as recording:
        model(torch.rand(2, 4))
    report = report_of(recording)
    rows = {row.name: row for row in report.rows()}
    assert rows["net.0"].unrated and rows["net.0"].rated == 0
    assert rows["net"].unrated == rows["net.0"].unrated and rows["net"].flops == 2 * 2 * 4 * 4
    assert any("fxnvtx_work.twice" in row[7] for row in recording.meta["work"])


def test_inference_mode_and_autocast() -> None:
    x = torch.rand(2, 4)
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        model = Net()
        with mode:
            plain = model(x)
            fxnvtx.instrument(model, "net")
            with fxnvtx.record(work=True) as recording:
                assert torch.equal(model(x), plain)
        assert shown_flops(recording) == {"net": 256, "net.a": 128, "net.b": 128}
        kinds = {kind for row in recording.meta["work"] for kind in row[5]}
        assert kinds <= {"fp32", "bf16"}


def test_where_something_was_compiled_no_mode_is_on_around_it() -> None:
    """Compiled blocks stay compiled, their neighbours are counted."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(4, 4), Net(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.block(self.first(x)))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which a reset leaves as they are
    model = fxnvtx.instrument(Blocks(), "net")
    model.block.compile(backend="eager")
    compiled = torch._dynamo.utils.counters["frames"]
    with fxnvtx.record(work=True) as recording:
        model(torch.rand(2, 4))
    assert compiled["ok"] == 1
    carried = {row[0]: row for row in recording.meta["work"]}
    assert carried["net.first"][5] == carried["net.last"][5] == {"fp32": 64}
    assert "net.block" not in carried and "net.block.a" not in carried


def test_what_became_known_is_given_once() -> None:
    """To each who asks, with nothing looked at where nothing is new."""

    def entry(label: str) -> work.Entry:
        return work.Entry(label, "", False, "eager", 1, (("fp32", 8),), 16, "", "cpu")

    def given(news: work.News) -> list[str]:
        return [row[0] for row in news.rows() if row[0].startswith("news.")]

    early = work.News()
    work.carry_work([entry("news.a")])
    late = work.News()
    assert given(early) == given(late) == ["news.a"]
    work.carry_work([entry("news.a"), entry("news.b")])
    assert given(early) == ["news.b"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "_entries", None)
        assert early.rows() == []
    assert given(late) == ["news.b"]
