"""The residency manager: begin, extend, replace, nest, fail; and ranges that are on exactly meanwhile."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.errors import PipelineError
from fxnvtx.modules import is_enabled, label_of
from fxnvtx.pipeline import ComponentResidencyManager, ComponentUse, ServerArgs
from fxnvtx.pipeline.component_use import Timeline

from ..support.limits import THREAD_S
from .nets import LAYERS, STAGES, Net, Uses, batch, labels, pipeline_of, weight_bytes

OFFLOAD_A = LAYERS.with_values(residency={"a": "component-offload"})
OFFLOAD = LAYERS.with_values(residency={"a": "component-offload", "b": "component-offload"})
X = torch.ones(1, 8)


def nothing(stage, batch):
    return None


def stage_of(name, *uses):
    stage = Uses(nothing, *uses)
    stage.set_registered_stage_name(name)
    return stage


class Request:
    """A manager with components a and b, in a request of one stage `s` that uses both."""

    def __init__(self, args=OFFLOAD, uses=("a", "b"), **request):
        self.components: dict[str, Any] = {"a": Net(seed=1), "b": Net(seed=2)}
        self.manager = ComponentResidencyManager(self.components, args=args)
        self.stage = stage_of("s", *uses)
        self.args = args
        self.request = request

    def __enter__(self):
        self.manager.begin_request([self.stage], self.args, **self.request)
        self.manager.before_stage(self.stage)
        return self

    def __exit__(self, *_):
        self.manager.finish_request()

    def resident(self):
        return {name for name in self.components if self.manager.account.of(name)}

    def shown(self, work):
        """What a recorder sees of `work`, without residency."""
        with fxnvtx.record() as recording:
            work()
        assert recording.balanced
        return [r.label for r in recording.ranges if r.category != "residency"]


def test_begin_ends_the_use_before_it():
    with Request() as r:
        assert r.manager.begin_use("a") is r.components["a"]
        assert r.resident() == {"a"}
        assert "s.a.head" in r.shown(lambda: r.components["a"](X))
        r.manager.begin_use("b")
        assert r.resident() == {"b"}
        assert label_of(r.components["b"]) == "s.b"
        r.manager.end_use("b")
        assert r.resident() == set()


def test_the_same_use_again_goes_on():
    with Request(uses=("a",)) as r, fxnvtx.record() as recording:  # nothing comes next that could be prefetched
        for _ in range(3):
            r.manager.begin_use("a")
        r.manager.end_use("a")
        r.manager.end_use("a")
        assert r.resident() == set()
    moves = [x for x in labels(recording, "residency") if x.endswith(" a")]
    assert [m for m in moves if "offload" not in m] in (
        ["residency.load a"],
        ["residency.prefetch a", "residency.wait a"],
    )
    assert moves.count("residency.offload a") == 1


def test_ending_a_use_that_another_one_ended_does_nothing():
    with Request() as r:
        r.manager.begin_use("a")
        r.manager.begin_use("b")
        r.manager.end_use("a")
        assert r.resident() == {"b"}


def test_a_changed_module_object_or_dtype_is_prepared_again():
    with Request() as r:
        first = r.manager.begin_use("a")
        second = r.components["a"] = Net(seed=3)
        assert r.manager.begin_use("a") is second
        assert label_of(first) is None
        assert label_of(second) == "s.a"
        assert r.manager.account.of("a") == weight_bytes(second)
        r.manager.begin_use("a", dtype=torch.bfloat16)
        assert second.head.weight.dtype == torch.bfloat16
        r.manager.begin_use("a")
        assert second.head.weight.dtype == torch.float32
        assert torch.equal(second.head.weight, Net(seed=3).head.weight)


def test_another_module_under_the_same_use_takes_the_ranges_over():
    first, second = Net(seed=8), Net(seed=9)
    with Request() as r:
        r.manager.begin_use("a", module=first)
        assert "s.a.head" in r.shown(lambda: first(X))
        r.manager.begin_use("a", module=second)
        assert label_of(first) is None
        assert "s.a.head" in r.shown(lambda: second(X))
        with r.manager.use_component("a", module=first):
            assert r.shown(lambda: (first.head(X), second.head(X))) == ["s.a.head"] * 2
        assert r.shown(lambda: second.head(X)) == ["s.a.head"]
        assert label_of(first) is None


def test_nested_uses_do_not_silence_the_outer_one():
    with Request() as r:
        a, b = r.components["a"], r.components["b"]
        with r.manager.use_component("a"):
            with r.manager.use_component("b"):
                assert r.resident() == {"a", "b"}
                assert r.shown(lambda: (a.head(X), b.head(X))) == ["s.a.head", "s.b.head"]
            assert r.resident() == {"a"}
            assert r.shown(lambda: a.head(X)) == ["s.a.head"]
        assert r.resident() == set()


def test_a_nested_use_of_the_same_module_gives_the_name_back():
    uses = [ComponentUse("a"), ComponentUse("a", "encode"), ComponentUse("a", "low", torch.bfloat16)]
    with Request(uses=uses) as r:
        a = r.components["a"]
        with r.manager.use_component("a"):
            with r.manager.use_component("a", "encode"):
                assert r.shown(lambda: a.head(X)) == ["s.a.encode.head"]
            assert r.resident() == {"a"}
            with r.manager.use_component("a", "low"):
                assert r.shown(lambda: a.head(X.bfloat16())) == ["s.a.low.head"]
            assert r.shown(lambda: a.head(X)) == ["s.a.head"]
        assert r.resident() == set()


def test_begin_use_inside_a_block_ends_with_the_block():
    with Request() as r:
        with r.manager.use_component("a"):
            r.manager.begin_use("b")
            assert r.resident() == {"a", "b"}
        assert r.resident() == set()


@pytest.mark.parametrize(
    ("args", "warmup", "wanted"),
    [(LAYERS, False, True), (LAYERS, True, False), (STAGES, False, False), (ServerArgs(), False, False)],
)
def test_nothing_is_attached_unless_layers_are_wanted(args, warmup, wanted):
    with Request(args, is_warmup=warmup) as r:
        before = [dict(m.__dict__) for m in r.components["a"].modules()]
        with r.manager.use_component("a") as a:
            assert (label_of(a) is not None) is wanted
            assert bool(r.shown(lambda: a(X))) is wanted
            if not wanted:
                assert [dict(m.__dict__) for m in a.modules()] == before


def test_a_component_that_is_no_module_is_handed_over_as_it_is():
    request = Request(uses=("a", "t"))
    request.components["t"] = str.upper
    with request as r:
        with r.manager.use_component("t") as tokenizer:
            assert tokenizer("x") == "X"
        r.manager.refresh_pipeline()


def test_uses_of_one_key_are_taken_in_their_order():
    low = ComponentUse("a", dtype=torch.bfloat16)
    with Request(uses=(ComponentUse("a"), low, ComponentUse("b"))) as r:
        seen = []
        for _ in range(3):
            with r.manager.use_component("a") as a:
                seen.append(a.head.weight.dtype)
        assert seen == [torch.float32, torch.bfloat16, torch.float32]


def test_a_stage_that_runs_twice_finds_its_uses_again():
    timeline = Timeline([ComponentUse(c, stage=s) for s, c in (("s", "a"), ("t", "b"), ("s", "a"), ("u", "c"))])
    nexts: list[tuple[str, str | None]] = []
    for stage in ("s", "t", "s", "u", "t"):
        timeline.stage_begins(stage)
        use = timeline.next_heavy()
        assert use is not None
        timeline.begins(use)
        coming = timeline.next_heavy()
        nexts.append((use.component, coming.component if coming is not None else None))
    assert nexts == [("a", "b"), ("b", "a"), ("a", "c"), ("c", None), ("b", "a")]


def test_prefix_of_a_use():
    assert ComponentUse("vae", "decode", stage="decoding").prefix == "decoding.vae.decode"
    assert ComponentUse("vae", stage="decoding").prefix == "decoding.vae"
    assert ComponentUse("vae", stage="decoding").key == ("decoding", "vae", None)


def test_methods_and_a_direct_forward_have_the_root_range():
    with Request() as r, r.manager.use_component("a") as a:
        direct = ["s.a", "s.a.embed"]
        assert r.shown(lambda: a.encode(X)) == direct
        assert r.shown(lambda: a.decode(X))[0] == "s.a"
        whole = r.shown(lambda: a(X))
        # inside a call its own methods are no second root
        assert r.shown(lambda: a.forward(X))[0] == whole[0] == "s.a"
        assert whole.count("s.a") == 1
    assert not {"encode", "decode", "forward"} & a.__dict__.keys()


def test_copies_and_pickles_taken_during_a_use_are_plain():
    with Request() as r, r.manager.use_component("a") as a:
        wanted = a(X)
        for other in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
            assert r.shown(lambda o=other: o(X)) == []
            assert torch.equal(other(X), wanted)
            other.head.weight.data.zero_()
            assert not torch.equal(other.decode(X), a.decode(X))


def test_windows_of_steps():
    args = OFFLOAD.with_values(nvtx_steps="1-2,4")
    seen = []
    with Request(args) as r:
        with r.manager.use_component("a") as a:
            for step in range(6):
                r.manager.show_step(step)
                seen.append(bool(r.shown(lambda: a.head(X))))
        assert seen == [False, True, True, False, True, False]
        with r.manager.use_component("b") as b:
            assert r.shown(lambda: b.head(X)) == ["s.b.head"]


def test_depth():
    with Request(OFFLOAD.with_values(nvtx_depth=1)) as r, r.manager.use_component("a") as a:
        assert r.shown(lambda: a.blocks[0](X)) == ["s.a.blocks.0"]
        assert r.shown(lambda: a.head(X)) == ["s.a.head"]


def test_remove_in_the_middle_of_a_use_leaves_no_trace():
    plain = Net(seed=1)
    with Request() as r:
        with r.manager.use_component("a") as a:
            a(X)
            r.manager.remove_nvtx_hooks_for_module(a)
            assert label_of(a) is None
            assert r.shown(lambda: a(X)) == []
            r.manager.remove_nvtx_hooks_for_module(a)
            for module, like in zip(a.modules(), plain.modules(), strict=True):
                assert module.__dict__.keys() == like.__dict__.keys()
        with r.manager.use_component("a") as a:
            assert r.shown(lambda: a.head(X)) == ["s.a.head"]


def test_a_replaced_component_is_picked_up_and_the_old_one_is_freed():
    with Request() as r:
        with r.manager.use_component("a"):
            pass
        old = weakref.ref(r.components["a"])
        weight = weakref.ref(r.components["a"].head.weight)
        r.components["a"] = Net(seed=5)
        gc.collect()
        assert old() is None
        assert weight() is None
        r.manager.refresh_pipeline()
        assert r.resident() == set()
        with r.manager.use_component("a") as a:
            assert a is r.components["a"]
            assert "s.a.head" in r.shown(lambda: a(X))


def test_a_component_replaced_while_it_is_in_use_and_prefetched():
    args = LAYERS.with_values(residency={"a": "component-offload", "b": "component-offload"}, performance_mode="speed")
    with Request(args) as r:
        with r.manager.use_component("a"):  # b is on its way
            r.components["b"] = Net(seed=6)
            r.components["a"] = Net(seed=7)
        gc.collect()
        with r.manager.use_component("b") as b:
            assert torch.equal(b(X), Net(seed=6)(X))
        r.manager.refresh_pipeline()
        assert r.manager.account.resident_bytes == 0


def test_replaced_children_are_picked_up_and_the_old_ones_are_freed():
    with Request() as r:
        with r.manager.use_component("a") as a:
            a(X)
        old = weakref.ref(a.blocks[1])
        a.blocks[1] = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        gc.collect()
        assert old() is None
        with r.manager.use_component("a"):
            shown = r.shown(lambda: a(X))
        assert "s.a.blocks.1.0" in shown
        assert "s.a.blocks.1.norm" not in shown
        assert r.manager.account.resident_bytes == weight_bytes(a) == 0


def test_a_load_that_fails_changes_nothing_and_the_next_one_works(monkeypatch):
    with Request() as r:

        def refuse(nbytes):
            raise MemoryError("no room")

        place = r.manager.holdings._weights_place()
        monkeypatch.setattr(place, "allocate", refuse)
        with pytest.raises(MemoryError), r.manager.use_component("a"):
            raise AssertionError("not reached")
        assert r.resident() == set()
        assert label_of(r.components["a"]) is None
        monkeypatch.undo()
        with r.manager.use_component("a") as a:
            assert torch.equal(a(X), Net(seed=1)(X))


def test_several_failures_while_uses_end_leave_nothing_behind(monkeypatch):
    from fxnvtx.pipeline.strategies import ComponentOffload

    with Request() as r:

        def fail(self, module):
            raise OSError(f"disk of {self.component}")

        with pytest.raises(OSError, match="disk of a"), r.manager.use_component("a"), r.manager.use_component("b"):
            monkeypatch.setattr(ComponentOffload, "finish_use", fail)
        monkeypatch.undo()
        assert not any(is_enabled(m) for m in r.components.values())
        r.manager.refresh_pipeline()
        assert r.resident() == set()


def test_prefetch_of_the_next_heavy_use_keeps_to_the_bound():
    uses = (ComponentUse("a"), ComponentUse("b", prefetch=False), ComponentUse("a", "again"))
    with Request(uses=uses) as r, fxnvtx.record() as recording:
        with r.manager.use_component("a"):
            pass
        with r.manager.use_component("b"):
            pass
        with r.manager.use_component("a", "again"):
            assert r.manager.account.peak_bytes <= r.manager.bound_bytes == weight_bytes(r.components["a"])
    moves = [x for x in labels(recording, "residency") if "offload" not in x]
    assert sorted(moves) == sorted(["residency.load a", "residency.load b", "residency.prefetch a", "residency.wait a"])


def test_speed_prefetches_beside_what_is_there():
    args = OFFLOAD.with_values(performance_mode="speed")
    with Request(args) as r, fxnvtx.record() as recording, r.manager.use_component("a"):
        pass
    assert "residency.prefetch b" in labels(recording)
    with Request(OFFLOAD) as r, fxnvtx.record() as recording, r.manager.use_component("a"):
        assert "residency.prefetch b" not in labels(recording)


def test_a_prefetch_for_another_component_gives_way():
    args = LAYERS.with_values(residency=dict.fromkeys(["a", "b"], "component-offload"))
    with Request(args, uses=("a", "b")) as r:
        with r.manager.use_component("a"):
            pass
        # b is on its way, but a is wanted once more
        with r.manager.use_component("a"):
            pass
        assert r.manager.account.peak_bytes <= r.manager.bound_bytes


def test_payloads_are_bytes():
    with Request() as r, fxnvtx.record() as recording, r.manager.use_component("a") as a:
        total = weight_bytes(a)
    moved = {x.label: x.payload for x in recording.ranges if x.category == "residency"}
    assert moved["residency.load a"] == total
    assert moved["residency.offload a"] == total


def test_requests_of_several_threads_exclude_each_other():
    r = Request()
    order = []

    def work(name):
        with Request.__enter__(r).manager.use_component("a") as a:
            order.append(name)
            a(X)
            order.append(name)
        r.manager.finish_request()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=THREAD_S)
    assert len(order) == 8
    assert all(order[i] == order[i + 1] for i in range(0, 8, 2))


def test_a_request_inside_a_request():
    with Request() as r:
        with r.manager.use_component("a") as a:
            inner = stage_of("inner", "a", "b")
            r.manager.begin_request([inner], OFFLOAD)
            r.manager.before_stage(inner)
            with r.manager.use_component("a"):
                assert r.shown(lambda: a.head(X)) == ["inner.a.head"]
            with r.manager.use_component("b"):
                assert r.resident() == {"a", "b"}
            r.manager.finish_request()
            assert r.shown(lambda: a.head(X)) == ["s.a.head"]
        assert r.resident() <= {"b"}, "b is declared next and may be on its way already"
    assert r.resident() == set()


def test_a_silent_request_inside_one_with_layers():
    with Request() as r, r.manager.use_component("a") as a:
        inner = stage_of("inner", "a")
        r.manager.begin_request([inner], OFFLOAD, is_warmup=True)
        r.manager.before_stage(inner)
        with r.manager.use_component("a"):
            assert r.shown(lambda: a.head(X)) == []
        r.manager.finish_request()
        assert r.shown(lambda: a.head(X)) == ["s.a.head"]


class Straight(nn.Module):
    """A forward that may be generated."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.embed(x))


class Branching(Straight):
    """The same with a branch on its input: hooks only."""

    def forward(self, x):
        if x.sum() > 1e6:
            return x
        return self.head(self.embed(x))


def test_components_on_the_fx_path_and_on_the_hooks_path_look_the_same():
    seen = []
    for kind, path in ((Straight, "fx"), (Branching, "hooks")):
        request = Request()
        request.components["a"] = nn.Sequential(kind(), kind())
        with request as r, r.manager.use_component("a") as a:
            paths = {row.label: row.path for row in fxnvtx.explain(a).rows}
            assert paths["s.a.0.head"] == path
            seen.append(r.shown(lambda a=a: a(X)))
    assert seen[0] == seen[1] == ["s.a"] + [f"s.a.{n}{part}" for n in (0, 1) for part in ("", ".embed", ".head")]


def test_another_mode_from_one_request_to_the_next():
    wanted = Net(seed=1)(X)
    r = Request()
    for mode in ("component-offload", "resident", "layerwise-offload", "snapshot-offload", "component-offload"):
        r.args = LAYERS.with_values(residency={"a": mode, "b": "resident"})
        with r:
            with r.manager.use_component("a") as a:
                assert torch.equal(a(X), wanted)
            assert (r.manager.account.of("a") == 0) is (mode != "resident")
        assert r.manager.account.of("b") == weight_bytes(r.components["b"])


def test_bring_back():
    with Request() as r:
        pass
    net = r.components["a"]
    assert weight_bytes(net) == 0
    r.manager.bring_back("a")
    assert torch.equal(net(X), Net(seed=1)(X))


def test_updates_are_kept_in_every_mode_in_use_and_out_of_it():
    for mode in ("resident", "component-offload", "layerwise-offload", "snapshot-offload"):
        for in_use in (False, True):
            with Request(LAYERS.with_values(residency={"a": mode})) as r:

                def double(part):
                    for p in part.parameters():
                        p.data.mul_(2)

                if in_use:
                    with r.manager.use_component("a") as a:
                        r.manager.update_component("a", double)
                        assert torch.equal(a.head.weight, 2 * Net(seed=1).head.weight)
                else:
                    r.manager.update_component("a", double)
                with r.manager.use_component("a") as a:
                    got = a(X)
                like = Net(seed=1)
                double(like)
                assert torch.equal(got, like(X)), (mode, in_use)


def test_a_use_that_begins_at_the_stages_entry():
    """Its weights come in before the stage does anything, stay between its blocks, and go with the stage."""
    seen: list[Any] = []

    def work(stage, batch):
        manager = pipeline.residency
        for _ in range(2):
            with stage.use_component("a"):
                pass
            seen.append(manager.account.of("a") > 0)

    for entry in (True, False):
        seen.clear()
        pipeline = pipeline_of({"a": Net()}, {"s": Uses(work, ComponentUse("a", at_stage_entry=entry))}, OFFLOAD_A)
        with fxnvtx.record() as recording:
            pipeline(batch())
        assert seen == [entry, entry]
        assert not pipeline.residency.account.of("a")
        (stage,) = (n for root in recording.tree() for n in root.walk() if n.category == "stage")
        moves = [n.label for n in stage.walk() if n.label in ("residency.load a", "residency.offload a")]
        assert moves == ["residency.load a", "residency.offload a"] * (1 if entry else 2)


@pytest.mark.parametrize("mode", ["component-offload", "layerwise-offload", "snapshot-offload"])
def test_weights_that_are_kept_for_the_next_request(mode):
    keep = True

    class Keeps(Uses):
        def component_uses(self, args, stage_name):
            return [ComponentUse("a", keep_ready=keep), ComponentUse("b")]

    def work(stage, batch):
        for name in "ab":
            with stage.use_component(name) as net:
                batch.latent = net(X)

    nets = {"a": Net(seed=1), "b": Net(seed=2)}
    wanted, limit = Net(seed=2)(X), weight_bytes(*nets.values())
    pipeline = pipeline_of(
        nets, {"s": Keeps(work)}, LAYERS.with_values(residency={"a": mode, "b": "component-offload"})
    )
    for kept, loads in ((True, True), (True, mode == "layerwise-offload"), (False, mode == "layerwise-offload")):
        keep = kept
        with fxnvtx.record() as recording:
            done = pipeline(batch())
        assert torch.equal(done.latent, wanted)
        moved = sum(r.payload or 0 for r in recording.ranges if r.label.startswith("residency.load a"))
        assert bool(moved) == loads
        assert bool(pipeline.residency.account.of("a")) == kept
        assert not pipeline.residency.account.of("b")
        assert pipeline.residency.account.peak_bytes <= limit


def test_mistakes_are_told():
    r = Request()
    with pytest.raises(PipelineError, match="no request"):
        r.manager.begin_use("a")
    r.manager.finish_request()
    with r:
        with pytest.raises(PipelineError, match="not declared"):
            r.manager.begin_use("a", "other")
        with pytest.raises(PipelineError, match="there is no component 'c'; the pipeline has a, b"):
            r.manager.update_component("c", print)
    with pytest.raises(PipelineError, match="there is no component 'c'"):
        r.manager.begin_request([stage_of("s", "c")], OFFLOAD)
    with r:
        pass
