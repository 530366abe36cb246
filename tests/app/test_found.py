"""What `fxnvtx run` finds in programs whose models are not simply called: official sampling scripts, in small."""

from __future__ import annotations

import asyncio
import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.integrations.everything import instrument_everything
from fxnvtx.modules import registry as control
from fxnvtx.recording import Node, Recording


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: Any, c: Any) -> Any:
        return x + self.mlp(self.norm(x)) * c


class DiT(nn.Module):
    """The official one's ways in: forward, and forward_with_cfg, which calls forward as a plain method."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.final = nn.Linear(8, 8)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        nn.init.zeros_(self.final.bias)
        for block in self.blocks:
            nn.init.ones_(cast(Block, block).mlp.weight)

    def forward(self, x: Any, t: Any) -> Any:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, t)
        return self.final(x)

    def forward_with_cfg(self, x: Any, t: Any, scale: float) -> Any:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t)
        cond, uncond = out.chunk(2)
        return uncond + scale * (cond - uncond)

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters()) + len(self.blocks)


DIT = ["embed"] + [f"blocks.{i}{part}" for i in range(3) for part in ("", ".norm", ".mlp")] + ["final"]


class Solver(nn.Module):
    """Like the wrapper around torchdiffeq in SiT: a module that is handed the network and does not own it."""

    def forward(self, x: Any, network: Any, steps: int) -> Any:
        for i in range(steps):
            x = x + network(x, torch.tensor(float(i))) / steps
        return x


class Loss(nn.Module):
    def forward(self, network: Any, denoiser: Any, x: Any) -> Any:
        return denoiser(network, x).pow(2).mean()


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaling = nn.Identity()

    def forward(self, network: Any, x: Any) -> Any:
        return network(self.scaling(x), torch.tensor(1.0))


class Engine(nn.Module):
    """Like Stability's DiffusionEngine: owns everything, is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DiT(1)
        self.denoiser = Denoiser()
        self.loss_fn = Loss()
        self.first_stage = VAE()

    def sample(self, x: Any) -> Any:
        def denoise(x: Any) -> Any:
            return self.denoiser(self.model, x)

        return self.decode_first_stage(denoise(x))

    def decode_first_stage(self, z: Any) -> Any:
        return self.first_stage.decode(z)

    def training_loss(self, x: Any) -> Any:
        return self.loss_fn(self.model, self.denoiser, x)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.decoder = nn.Linear(8, 8)

    def encode(self, x: Any) -> Any:
        return self.encoder(x)

    def decode(self, z: Any) -> Any:
        return self.decoder(z)

    def forward(self, x: Any) -> Any:
        return self.decode(self.encode(x))


@pytest.fixture
def everything() -> Iterator[None]:
    with instrument_everything():
        yield


def tree(recording: Recording) -> list[Any]:
    def shown(node: Node) -> Any:
        below = [shown(child) for child in node.children]
        return (node.label, below) if below else node.label

    assert recording.balanced
    return [shown(node) for node in recording.tree()]


def labels(recording: Recording) -> list[str]:
    assert recording.balanced
    return [r.label for r in recording.ranges]


@pytest.mark.usefixtures("everything")
def test_a_public_method_that_leads_to_children_is_a_root() -> None:
    net = DiT()
    x, t = torch.ones(2, 8), torch.tensor(1.0)
    with fxnvtx.record() as recording:
        first = net.forward_with_cfg(x, t, 4.0)
        net.forward_with_cfg(x, t, 4.0)
        net.count()
        net.initialize_weights()
        net(x, t)
    assert [n.label for n in recording.tree()] == ["DiT.forward_with_cfg"] * 2 + ["DiT"]
    assert labels(recording) == [*(["DiT.forward_with_cfg", *DIT] * 2), "DiT", *DIT]
    assert torch.equal(first, net.forward_with_cfg(x, t, 4.0))


@pytest.mark.usefixtures("everything")
def test_the_network_in_somebody_elses_hands_keeps_its_name() -> None:
    net = DiT()
    with fxnvtx.record() as recording:
        Solver()(torch.ones(1, 8), net, 2)
        Solver()(torch.ones(1, 8), net.forward, 1)
    assert [n.label for n in recording.tree()] == ["Solver", "Solver"]
    first, second = recording.tree()
    assert [n.label for n in first.children] == ["DiT", "DiT"]
    assert [n.label for n in first.children[0].walk()] == ["DiT", *DIT]
    assert [n.label for n in second.walk()] == ["Solver", *DIT]


@pytest.mark.usefixtures("everything")
def test_an_owner_that_is_never_called_names_all_it_owns() -> None:
    engine = Engine()
    x = torch.ones(1, 8)
    with fxnvtx.record() as recording:
        engine.sample(x)
        engine.training_loss(x)
        engine.first_stage.encode(x)
    network = (
        "model",
        ["model.embed", ("model.blocks.0", ["model.blocks.0.norm", "model.blocks.0.mlp"]), "model.final"],
    )
    assert tree(recording) == [
        ("Engine.sample", [("denoiser", [network]), ("first_stage.decode", ["first_stage.decoder"])]),
        ("Engine.training_loss", [("loss_fn", [("denoiser", [network])])]),
        ("first_stage.encode", [("first_stage.encoder", ["first_stage.encoder.0", "first_stage.encoder.1"])]),
    ]


@pytest.mark.usefixtures("everything")
def test_children_that_others_call_are_named_below_their_owner() -> None:
    x, t = torch.ones(1, 8), torch.tensor(1.0)
    with fxnvtx.record() as recording:
        DiT().forward(x, t)
        copy.deepcopy(DiT()).forward(x, t)
        Solver()(x, DiT().forward, 1)
        net = DiT()
        for block in net.blocks:
            block(x, t)
    blocks = [label for label in DIT if label.startswith("blocks.")]
    assert labels(recording) == [*DIT, *DIT, "Solver", *DIT, *blocks]


@pytest.mark.usefixtures("everything")
def test_a_parent_that_comes_later_renames_nothing() -> None:
    net, x, t = DiT(1), torch.ones(1, 8), torch.tensor(1.0)

    class Guided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.out = nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return self.out(self.net(x, t))

    with fxnvtx.record() as recording:
        net(x, t)
        Guided()(x)
    own = ("DiT", ["embed", ("blocks.0", ["blocks.0.norm", "blocks.0.mlp"]), "final"])
    assert tree(recording) == [own, ("Guided", [own, "out"])]


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_a_model_of_its_own(make: Any) -> None:
    net, x, t = DiT(), torch.ones(2, 8), torch.tensor(1.0)
    net(x, t)
    with fxnvtx.record() as recording:
        make(net).forward_with_cfg(x, t, 2.0)
    assert labels(recording) == ["DiT.forward_with_cfg", *DIT]


@pytest.mark.usefixtures("everything")
def test_models_in_a_bare_list_are_models_of_their_own() -> None:
    both = nn.ModuleList([VAE(), DiT(1)])
    with fxnvtx.record() as recording:
        both[0](torch.ones(1, 8))
        both[1](torch.ones(1, 8), torch.tensor(1.0))
    assert [n.label for n in recording.tree()] == ["VAE", "DiT"]
    assert labels(recording)[:5] == ["VAE", "encoder", "encoder.0", "encoder.1", "decoder"]


@pytest.mark.usefixtures("everything")
def test_a_layer_made_for_one_call_is_no_model() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return nn.Softmax(dim=-1)(self.layer(x))

    net = Old()
    known = len(control.controls())
    with fxnvtx.record() as recording:
        for _ in range(3):
            net(torch.ones(1, 8))
    assert labels(recording) == ["Old", "layer"] * 3
    assert len(control.controls()) == known + 1


@pytest.mark.usefixtures("everything")
def test_nor_is_one_that_is_made_in_a_coroutine() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        async def forward(self, x: Any) -> Any:
            x = self.layer(x)
            await asyncio.sleep(0)
            return nn.Softmax(dim=-1)(x)

    async def requests() -> None:
        await asyncio.gather(*(net(torch.ones(1, 8)) for _ in range(3)))

    net = Waits()
    known = len(control.controls())
    with fxnvtx.record() as recording:
        asyncio.run(requests())
    assert tree(recording) == [("Waits", ["layer"])] * 3
    assert len(control.controls()) == known + 1


@pytest.mark.usefixtures("everything")
def test_the_programs_own_instrument_call_stands() -> None:
    net = fxnvtx.instrument(DiT(1), "mine", depth=1)
    with fxnvtx.record() as recording:
        net(torch.ones(1, 8), torch.tensor(1.0))
        net.forward_with_cfg(torch.ones(2, 8), torch.tensor(1.0), 1.0)
    own = ["mine.embed", "mine.blocks.0", "mine.final"]
    assert tree(recording) == [("mine", own), ("mine.forward_with_cfg", own)]


@pytest.mark.usefixtures("everything")
def test_the_generated_forwards_run_where_explain_says_so() -> None:
    from fxnvtx.modules.traced_forward import Level

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return self.b(self.a(x))

    net = Two()
    with fxnvtx.record() as recording:
        net(torch.ones(1, 8))
        rows = {row.fqn: row.path for row in fxnvtx.explain(net).rows}
        assert rows == {"": "fx", "a": "fx", "b": "fx"}
        ran: list[str] = []
        found = control.entry_of(net)
        assert found is not None
        level = found[1].level
        assert isinstance(level, Level)
        plain = Two.forward.__code__

        def seen(frame: Any, event: str, arg: Any) -> None:
            if event == "call" and frame.f_code in (plain, level.general.__code__, level.fast.__code__):
                ran.append("plain" if frame.f_code is plain else "generated")

        sys.setprofile(seen)
        try:
            net(torch.ones(1, 8))
        finally:
            sys.setprofile(None)
        assert ran == ["generated"]
    assert labels(recording) == ["Two", "a", "b"] * 2


def test_afterwards_everything_is_as_it_was() -> None:
    before = (dict(vars(nn.Module)), torch.compile, torch.jit.script, dict(vars(DiT)), dict(vars(VAE)))
    with instrument_everything():
        DiT(1)
        VAE()
        assert DiT.forward_with_cfg is not before[3]["forward_with_cfg"]
    assert (dict(vars(nn.Module)), torch.compile, torch.jit.script, dict(vars(DiT)), dict(vars(VAE))) == before


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def through(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.through(x)


@pytest.mark.usefixtures("everything")
def test_other_readers_of_a_model_see_the_models_own_methods() -> None:
    net = Scripted()
    x = torch.ones(1, 8)
    expected = net(x)
    assert torch.equal(torch.jit.script(net)(x), expected)
    traced = torch.fx.symbolic_trace(net)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "call_function", "output"]
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    for target in (net, net.through):
        assert torch.equal(torch.compile(target, backend=backend, fullgraph=True)(x), expected)
    assert len(graphs) == 2
    assert torch.export.export(net, (x,)).module()(x).equal(expected)
    torch._dynamo.reset()  # it does not look for new hooks
    net.layer.register_forward_hook(lambda module, args, out: out + 1)  # now Dynamo inlines the call
    assert torch.equal(torch.compile(net, backend=backend, fullgraph=True)(x), net(x))
    assert len(graphs) == 3
