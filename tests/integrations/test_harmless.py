"""What instrument() does to other people's objects: nothing that they could notice, and nothing that stays."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import timeit
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

import diffusers

import fxnvtx
from fxnvtx import record
from fxnvtx.errors import InstrumentError, SelectionError
from fxnvtx.integrations import diffusers as fx
from fxnvtx.integrations import diffusers as ours
from fxnvtx.integrations.diffusers import registry
from fxnvtx.integrations.diffusers.thread_state import find

from .asking import STEPS, build, every, labels, only, recorded, same, tensors, traces


def test_it_leaves_no_trace() -> None:
    pipe, ask = build("WanPipeline")
    ask()
    before = traces(pipe)
    fx.instrument(pipe)
    with record():
        assert traces(pipe) != before  # so the comparison can see something
    fx.uninstrument(pipe)
    assert traces(pipe) == before
    assert fxnvtx.instrument.__globals__["controls_of"](pipe.transformer) is None
    fx.uninstrument(pipe)
    assert traces(pipe) == before


def test_objects_keep_class_and_dict_while_instrumented() -> None:
    pipe, ask = build("LTXPipeline")
    ask()
    things = [pipe, pipe.scheduler, pipe.vae, pipe.transformer]
    before = [(type(t), dict(vars(t))) for t in things]
    signature = inspect.signature(pipe.__call__)
    fx.instrument(pipe)
    assert [(type(t), dict(vars(t))) for t in things] == before
    assert inspect.signature(pipe.__call__) == signature


def test_instrumenting_twice_is_once() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    once = [(r.label, r.depth) for r in recorded(ask).ranges]
    fx.instrument(fx.instrument(pipe))
    twice = [(r.label, r.depth) for r in recorded(ask).ranges]
    assert [t for t in twice if t[0] != "request#2"] == [o for o in once if o[0] != "request#1"]
    fx.uninstrument(pipe)
    assert len(registry.methods) == 0


def test_another_pipeline_of_the_class_stays_silent() -> None:
    pipe, _ = build("FluxPipeline")
    _, ask_other = build("FluxPipeline")
    fx.instrument(pipe)
    assert recorded(ask_other).ranges == []


def test_components_shared_by_two_pipelines() -> None:
    pipe, ask = build("FluxPipeline")
    other = type(pipe)(**pipe.components)
    fx.instrument(pipe)
    fx.instrument(other)
    fx.uninstrument(other)
    found = {n.label for n in every(recorded(ask))}
    assert "transformer.transformer_blocks.0.attn" in found
    assert "vae.decode" in found
    assert "scheduler_step" in found


def test_a_method_that_calls_the_one_it_overrides() -> None:
    """Both classes' methods are wrapped, each for another pipeline; a call shows one range."""

    class Sub(diffusers.AutoencoderKL):  # type: ignore[misc]
        def decode(self, *args: Any, **kwargs: Any) -> Any:
            return super().decode(*args, **kwargs)

    class Steps(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    pipe, _ = build("DiTPipeline")
    other, ask = build("DiTPipeline")
    other.register_modules(vae=Sub(**pipe.vae.config).eval(), scheduler=Steps())
    fx.instrument(pipe)
    fx.instrument(other)
    recording = recorded(ask)
    assert only(recording, "vae.decode")
    assert [n.label for n in every(recording)].count("scheduler_step") == STEPS


def test_an_object_at_the_address_of_one_that_is_gone() -> None:
    """Objects are known by their address, which Python gives away again."""
    pipe, _ = build("FluxPipeline")
    fx.instrument(pipe)
    stranger = torch.nn.Linear(2, 2)
    known = find(pipe.transformer)
    assert known is not None
    registry.known[id(stranger)] = [known]
    assert find(stranger) is None
    del registry.known[id(stranger)]
    old = pipe.transformer.x_embedder
    known.paths[id(stranger)] = known.paths.pop(id(old))
    pipe.transformer.x_embedder = stranger
    assert ours._altered(pipe.transformer, known)


def test_a_pipeline_that_goes_away_takes_its_ranges_along() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    recorded(ask)
    gone = weakref.ref(pipe)
    del pipe, ask
    gc.collect()
    assert gone() is None
    assert registry.pipes() == []
    assert len(registry.methods) == 0


def test_copies_and_pickles() -> None:
    pipe, ask = build("FluxPipeline")
    plain = ask()
    fx.instrument(pipe)
    with record():
        scheduler = pickle.loads(pickle.dumps(pipe.scheduler))
        assert type(scheduler) is type(pipe.scheduler)
        for part in (pipe.scheduler, pipe.transformer, pipe.vae):
            assert type(copy.deepcopy(part)) is type(part)
        twin = copy.deepcopy(pipe.transformer)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), pipe.transformer.parameters(), strict=True))
    pipe.transformer = twin
    fx.uninstrument(pipe)
    assert same(plain, ask())
    assert recorded(ask).ranges == []


def test_saving_and_loading(tmp_path: Path) -> None:
    pipe, ask = build("DiTPipeline")
    plain = ask()
    fx.instrument(pipe)
    with record():
        pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(
        class_labels=[1], num_inference_steps=STEPS, output_type="pt", generator=torch.Generator().manual_seed(5)
    )
    assert same(plain, tensors(again))


def test_a_replaced_component_is_taken_in() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    old = pipe.transformer
    pipe.transformer = copy.deepcopy(old)
    found = {n.label for n in every(recorded(ask))}
    assert "transformer.transformer_blocks.0.attn.to_q" in found
    assert fxnvtx.instrument.__globals__["controls_of"](old) is None


def test_a_replaced_layer_is_taken_in() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.to_q = torch.nn.Sequential(attention.to_q)
    found = {n.label for n in every(recorded(ask))}
    assert "transformer.transformer_blocks.0.attn.to_q.0" in found


def test_methods_replaced_on_the_object() -> None:
    """The usual place for torch.compile(vae.decode), and for bars of one's own."""
    pipe, ask = build("FluxPipeline")
    plain = ask()
    original = pipe.vae.decode
    seen: list[str] = []

    def decode(*args: Any, **kwargs: Any) -> Any:
        seen.append("decode")
        return original(*args, **kwargs)

    pipe.vae.decode = decode
    fx.instrument(pipe)
    with record() as recording:
        assert same(plain, ask())
    assert only(recording, "vae.decode")
    assert seen == ["decode"]
    fx.uninstrument(pipe)
    assert pipe.vae.decode is decode

    fx.instrument(pipe)
    later: Any = lambda *a, **k: decode(*a, **k)  # noqa: E731
    pipe.vae.decode = later  # after instrument()
    assert only(recorded(ask), "vae.decode")
    fx.uninstrument(pipe)
    assert pipe.vae.decode is later


def test_a_method_that_others_wrapped_as_well() -> None:
    pipe, ask = build("FluxPipeline")
    kind = type(pipe)
    original = kind.__call__
    fx.instrument(pipe)
    ours = kind.__call__
    assert ours is not original
    theirs: Any = lambda self, *a, **k: ours(self, *a, **k)  # noqa: E731
    try:
        kind.__call__ = theirs
        assert only(recorded(ask), "request#1")
        fx.uninstrument(pipe)
        assert kind.__call__ is theirs
        assert recorded(ask).ranges == []
    finally:
        kind.__call__ = original


def test_a_component_called_directly() -> None:
    pipe, _ = build("FluxPipeline")
    fx.instrument(pipe)
    recording = recorded(lambda: pipe.vae.decode(torch.randn(1, 4, 4, 4)))
    assert labels(recording.tree()) == ["vae.decode"]
    recording = recorded(lambda: pipe.vae.encode(torch.randn(1, 3, 16, 16)))
    assert labels(recording.tree()) == ["vae.encode"]
    assert labels(recording.tree()[0].children) == ["vae.encoder"]


def test_switched_off_nothing_is_shown() -> None:
    pipe, ask = build("LTX2Pipeline")
    fx.instrument(pipe)
    fx.set_enabled(pipe, False)
    assert recorded(ask).ranges == []
    fx.set_enabled(pipe, True)
    assert only(recorded(ask), "request#1")


def test_a_component_switched_off_by_hand_stays_off() -> None:
    pipe, ask = build("LTXPipeline")
    fx.instrument(pipe)
    fxnvtx.set_enabled(pipe.text_encoder, False)
    fxnvtx.set_enabled(pipe.transformer, False)
    for _ in range(2):
        found = {n.label.partition(".")[0] for n in every(recorded(ask)) if n.category == "module"}
        assert found == {"vae"}


def test_a_component_replaced_while_switched_off_is_off() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    fx.set_enabled(pipe, False)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    fx.instrument(pipe)
    assert recorded(ask).ranges == []


def test_nobody_listening_costs_nothing_to_speak_of() -> None:
    """Of a scheduler's step, the most frequent call that we wrap; a real one takes 100 us and more."""

    class Quick(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, *args: Any) -> None:  # type: ignore[override]
            return None

    pipe, _ = build("FluxPipeline")
    pipe.scheduler = scheduler = Quick()

    def cost() -> float:
        return min(timeit.repeat(lambda: scheduler.step(1, 2, 3), number=100, repeat=100)) / 100

    bare = cost()
    fx.instrument(pipe)
    assert type(scheduler).step.__wrapped__ is not None  # type: ignore[attr-defined]
    assert cost() - bare < 2e-6


def test_two_threads() -> None:
    built = [build("FluxPipeline"), build("LTXPipeline")]
    plain = [ask() for _, ask in built]
    for pipe, _ in built:
        fx.instrument(pipe)
    made: dict[int, Any] = {}
    start = threading.Barrier(2)

    def run(index: int) -> None:
        start.wait()
        made[index] = built[index][1]()

    with record() as recording:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recording.balanced
    assert [same(plain[i], made[i]) for i in range(2)] == [True, True]
    assert sorted(r.payload for r in recording.tree()) == ["FluxPipeline", "LTXPipeline"]
    for root in recording.tree():
        assert labels(root.children)[-1] == "vae.decode"
        texts = [n.label for n in root.walk()]
        assert texts.count("denoising_loop") == 1
        assert ("text_encoder" in texts) == (root.payload == "LTXPipeline")


def test_globs_are_meant_for_the_component_that_has_them() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe, include=["transformer.transformer_blocks.*", "decoder.conv_in"])
    found = {n.label for n in every(recorded(ask)) if n.category == "module"}
    assert "vae.decoder.conv_in" in found
    assert "vae.decoder.mid_block" not in found
    assert "transformer.transformer_blocks.0.attn" in found
    assert "transformer.x_embedder" not in found


def test_errors_say_what_to_do() -> None:
    pipe, ask = build("FluxPipeline")
    with pytest.raises(SelectionError, match="matches no module of any component"):
        fx.instrument(pipe, include="trnsformer.*")
    assert recorded(ask).ranges == []
    with pytest.raises(InstrumentError, match=r"use fxnvtx\.instrument\(model\)"):
        fx.instrument(pipe.transformer)
    with pytest.raises(InstrumentError, match="diffusers pipeline"):
        fx.uninstrument("pipe")
    with pytest.raises(InstrumentError, match="path must be one of"):
        fx.instrument(pipe, path="nowhere")
    with pytest.raises(InstrumentError, match="not instrumented"):
        fx.set_enabled(pipe, True)
