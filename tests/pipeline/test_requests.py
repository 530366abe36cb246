"""Whose request is meant: threads, tasks, and requests that begin in one place and end in another."""

import asyncio
import contextvars
import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.errors import PipelineError
from fxnvtx.modules import is_enabled, label_of
from fxnvtx.pipeline import Batch, ComponentResidencyManager

from ..support.limits import THREAD_S
from .nets import LAYERS, Net, Uses, calls, labels, pipeline_of

OFFLOAD = LAYERS.with_values(residency={"a": "component-offload", "b": "component-offload"})
X = torch.ones(1, 8)


def manager_of():
    components = {"a": Net(seed=1), "b": Net(seed=2)}
    return ComponentResidencyManager(components, args=OFFLOAD), components


def stage(name, *uses):
    made = Uses(None, *(uses or ("a", "b")))
    made.set_registered_stage_name(name)
    return made


def on_a_thread(work):
    """What `work` returned on a thread of its own; raises what it raised."""
    found: list[tuple[Any, BaseException | None]] = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=THREAD_S)
    assert found, "it waits for ever"
    if found[0][1] is not None:
        raise found[0][1]
    return found[0][0]


def shown(work):
    with fxnvtx.record() as recording:
        work()
    assert recording.balanced
    return labels(recording, "module")


@pytest.mark.parametrize("named", [True, False])
def test_a_request_may_be_finished_on_another_thread(named):
    manager, nets = manager_of()
    for _ in range(2):  # and the next one begins
        request = manager.begin_request([stage("s")], OFFLOAD)
        manager.before_stage(stage("s"))
        manager.begin_use("a")
        on_a_thread(lambda r=request: manager.finish_request(r if named else None))
        assert not manager.in_request
        assert manager.account.resident_bytes == 0
        assert not is_enabled(nets["a"])
        with pytest.raises(PipelineError, match="no request is under way"):
            manager.begin_use("a")


def test_a_whole_request_may_move_from_thread_to_thread():
    manager, nets = manager_of()
    first = stage("s")
    steps = [
        lambda: manager.begin_request([first], OFFLOAD),
        lambda: manager.before_stage(first),
        lambda: manager.begin_use("a"),
        lambda: shown(lambda: nets["a"].head(X)),
        lambda: manager.end_use("a"),
        manager.finish_request,
    ]
    for _ in range(2):
        results = [on_a_thread(step) for step in steps]
        assert results[3] == ["s.a.head"]
    assert manager.account.resident_bytes == 0
    request = on_a_thread(steps[0])
    on_a_thread(steps[-1])
    assert manager.begin_request([first], OFFLOAD).outer is None, "a request that is over keeps nothing alive"
    assert request.finished
    manager.finish_request()


def test_tasks_on_one_thread_have_a_request_each():
    manager, _ = manager_of()

    async def serve(name, warmup):
        mine = stage(name)
        manager.begin_request([mine], OFFLOAD, is_warmup=warmup)
        await asyncio.sleep(0)
        manager.before_stage(mine)
        seen = []
        for component in ("a", "b"):
            with manager.use_component(component):
                await asyncio.sleep(0)
                assert manager.current_stage_name == name
            await asyncio.sleep(0)
            with manager.use_component(component) as net:
                seen += shown(lambda n=net: n.head(X))
        manager.finish_request()
        return seen

    async def both():
        return await asyncio.gather(serve("one", False), serve("two", False), serve("three", True))

    one, two, three = asyncio.run(both())
    assert one == ["one.a.head", "one.b.head"]
    assert two == ["two.a.head", "two.b.head"]
    assert three == []
    assert not manager.in_request
    assert manager.account.resident_bytes == 0


def test_two_requests_in_turns_on_one_thread():
    manager, nets = manager_of()
    contexts = [contextvars.copy_context() for _ in range(2)]
    stages = [stage("s"), stage("t")]
    for context, mine in zip(contexts, stages, strict=True):
        context.run(manager.begin_request, [mine], OFFLOAD)
        context.run(manager.before_stage, mine)
    for context, name in zip(contexts, "st", strict=True):
        net = context.run(manager.begin_use, "a")
        assert shown(lambda n=net: n.head(X)) == [f"{name}.a.head"]
    contexts[1].run(manager.end_use, "a")
    assert shown(lambda: nets["a"].head(X)) == ["s.a.head"], "the other one's use goes on"
    with pytest.raises(PipelineError, match="2 requests are under way"):
        contextvars.Context().run(manager.begin_use, "a")
    contexts[0].run(manager.finish_request)
    assert manager.in_request
    contexts[1].run(manager.finish_request)
    assert not manager.in_request


def test_threads_take_turns_and_a_failing_begin_lets_the_next_one_in():
    manager, _ = manager_of()
    request = manager.begin_request([stage("s")], OFFLOAD)
    began, other = threading.Event(), []

    def work():
        began.set()
        other.append(manager.begin_request([stage("t")], OFFLOAD))
        manager.finish_request(other[0])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    began.wait(20)
    assert not other
    manager.finish_request(request)
    thread.join(20)
    assert other
    assert not manager.in_request
    with pytest.raises(PipelineError, match="no component 'c'"):
        on_a_thread(lambda: manager.begin_request([stage("s", "c")], OFFLOAD))
    on_a_thread(lambda: manager.begin_request([stage("s")], OFFLOAD))
    manager.finish_request()


def test_a_pipeline_serves_from_several_threads():
    pipeline = pipeline_of({"net": Net()}, {"one": calls(), "two": calls()})
    wanted = Net()(Net()(torch.ones(2, 8)))
    found = []

    def serve():
        found.append(pipeline(Batch()).latent)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert all(torch.equal(f, wanted) for f in found)


def test_another_module_under_a_key_takes_the_old_ones_ranges_out_at_once():
    manager, nets = manager_of()
    mine = stage("s")
    manager.begin_request([mine], OFFLOAD)
    manager.before_stage(mine)
    new = Net(seed=9)
    plain = [m.__dict__.keys() for m in Net().modules()]
    with fxnvtx.record():
        manager.begin_use("a")
        assert label_of(nets["a"]) == "s.a"
        manager.begin_use("a", module=new)
        assert label_of(nets["a"]) is None
        assert [m.__dict__.keys() for m in nets["a"].modules()] == plain
        assert shown(lambda: new.head(X)) == ["s.a.head"]
        with manager.use_component("a") as again:
            assert again is nets["a"]
            assert shown(lambda: again.head(X)) == ["s.a.head"]
        manager.end_use("a")
        manager.begin_use("a")
        assert label_of(new) is None
    manager.finish_request()


def test_shapes_of_the_layers_calls():
    manager, _ = manager_of()
    mine = stage("s")
    args = OFFLOAD.with_values(nvtx_shapes=True)
    manager.begin_request([mine], args)
    manager.before_stage(mine)
    with manager.use_component("a") as net, fxnvtx.record() as recording:
        net(X)
    manager.finish_request()
    assert [m.label for m in recording.marks][:2] == ["s.a in=[[1, 8]]", "s.a.embed in=[[1, 8]]"]
    assert labels(recording, "module")[:2] == ["s.a", "s.a.embed"]


def test_copies_and_pickles_of_a_component_with_methods_by_other_names():
    manager, nets = manager_of()
    nets["a"] = Aliased()
    mine = stage("s")
    manager.begin_request([mine], OFFLOAD)
    manager.before_stage(mine)
    with manager.use_component("a") as net:
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other.decode(X), net.decode(X))
            other.fc.weight.data.zero_()
            assert not torch.equal(other.decode(X), net.decode(X)), "it works with its own weights"
        assert shown(lambda: (net.encode(X), net.decode(X))) == ["s.a", "s.a.fc"] * 2
    manager.finish_request()
    assert not {"encode", "decode"} & nets["a"].__dict__.keys()


class Aliased(nn.Module):
    """One function under two names, and no forward."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def run(self, x):
        return self.fc(x)

    encode = decode = run
