"""The plugin in a small stand-in for SGLang (double/): what shows, and that nothing else changes."""

import copy
import importlib
import logging
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx import compile as imports
from fxnvtx import ranges
from fxnvtx.cli import doctor
from fxnvtx.integrations.everything import instrument_everything
from fxnvtx.integrations.sglang import missing_targets, patch_older_releases, register
from fxnvtx.integrations.sglang.targets import TARGETS, Options, found_in, read_options
from fxnvtx.modules import Attachments
from fxnvtx.ranges import emit
from fxnvtx.recording import Recording

DOUBLE = Path(__file__).parent / "double"
ROOT = "sglang.multimodal_gen.runtime."
X = torch.ones(1, 4)


class Rotary(nn.Module):
    def forward(self, x):
        return x + 1


class Block(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.rotary(x))


class Dit(nn.Module):
    """Two blocks that share a module."""

    def __init__(self):
        super().__init__()
        rotary = Rotary()
        self.layers = nn.ModuleList([Block(rotary), Block(rotary)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Vae(nn.Module):
    """Has no forward that anybody calls."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 4)

    def decode(self, x):
        return self.decoder(x)


class Server:
    """The stand-in, with the plugin in it as the environment says."""

    def __init__(self, branches=("positive", "negative"), strategy="ResidentStrategy", dtype=None):
        def at(name):
            return importlib.import_module(ROOT + name)

        self.at = at
        torch.manual_seed(0)
        self.dit, self.vae = Dit(), Vae()
        memory = "managers.memory_managers.component_"
        older = importlib.util.find_spec(ROOT + memory + "residency_strategies") is None
        strategies = at(memory + ("resident_strategies" if older else "residency_strategies"))
        self.args = at("server_args").ARGS
        stages, policy = at("pipelines_core.stages.denoising"), at("distributed.cfg_policy")
        made = [policy.CFGBranch(name, name != "negative") for name in branches]
        self.stages = [stages.DenoisingStage(made), stages.DecodingStage(dtype)]
        self.manager = at("managers.memory_managers.component_manager").ComponentResidencyManager(
            {"dit": self.dit, "vae": self.vae},
            {"dit": strategies.ResidentStrategy(), "vae": getattr(strategies, strategy)()},
            self.args,
        )
        self.executor = at("pipelines_core.executors.pipeline_executor").PipelineExecutor(self.manager)

    def batch(self, **values):
        return SimpleNamespace(latent=X, is_warmup=False, is_cfg_negative=False, **values)

    def serve(self, batch=None, call="execute_with_profiling"):
        return getattr(self.executor, call)(self.stages, batch or self.batch(), self.args)

    def recorded(self, *args, **kwargs):
        with fxnvtx.record() as recording:
            result = self.serve(*args, **kwargs)
            if kwargs.get("call", "").startswith("execute_group_seq"):
                list(result)
        assert recording.balanced
        return recording


def older_release(folder):
    """The stand-in as a release that loads no plugins (before 0.5.21) would be."""
    runtime = Path("sglang", "multimodal_gen", "runtime")
    shutil.copytree(DOUBLE, folder)
    shutil.copytree(DOUBLE.parent / "older", folder / runtime, dirs_exist_ok=True)
    (folder / runtime / "platforms" / "plugins.py").unlink()
    (folder / runtime / "managers" / "memory_managers" / "component_residency_strategies.py").unlink()
    return str(folder)


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(flag=True, old=False, VARIABLE=..., server arguments) -> Server."""

    def forget():
        for name in [n for n in sys.modules if n == "sglang" or n.startswith("sglang.")]:
            del sys.modules[name]
        for name in [n for n in imports._finder.waiting if n.startswith("sglang.")]:
            del imports._finder.waiting[name]

    def run(
        flag=True, branches=("positive", "negative"), strategy="ResidentStrategy", dtype=None, old=False, **variables
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if old:
            monkeypatch.syspath_prepend(older_release(tmp_path / "old"))
            importlib.invalidate_caches()
            patch_older_releases()
        else:
            register()
            importlib.import_module(ROOT + "platforms.plugins").HookRegistry.apply_hooks()
        server = Server(branches, strategy, dtype)
        server.args.enable_layerwise_nvtx_marker = flag
        return server

    for name in ("", "_STEPS", "_DEPTH", "_SHAPES", "_RECORD"):
        monkeypatch.delenv("FXNVTX_SGLANG" + name, raising=False)
    forget()
    monkeypatch.syspath_prepend(str(DOUBLE))
    yield run
    forget()


def labels(recording, category=None):
    return [r.label for r in recording.ranges if category is None or r.category == category]


def tree(nodes):
    return [[n.label, tree(n.children)] for n in nodes]


def traces(model):
    return [sorted(m.__dict__) for m in model.modules()]


def test_the_tree_of_a_request(start):
    server = start()
    before = traces(server.dit), traces(server.vae)
    (request,) = server.recorded().tree()
    denoising, decoding = request.children
    (loop,) = (n for n in denoising.children if n.category == "loop")
    assert [n.label for n in (request, denoising, decoding)] == ["request#0", "stage_denoising", "stage_decoding"]
    assert [n.category for n in (request, denoising, loop, loop.children[0])] == ["request", "stage", "loop", "step"]
    assert [s.payload for s in loop.children] == [0, 1, 2]
    layer = [
        [f"denoising.dit.layers.{n}", [[f"denoising.dit.layers.{n}.rotary", []], [f"denoising.dit.layers.{n}.fc", []]]]
        for n in (0, 1)
    ]
    passes = [[f"predict_noise.{n}", [["denoising.dit", layer]]] for n in ("conditional", "unconditional")]
    assert tree(loop.children[0].children) == [["predict_noise", passes], ["scheduler_step", []]]
    assert tree(n for n in decoding.children if n.category == "module") == [
        ["decoding.vae.decode", [["decoding.vae.decode.decoder", []]]]
    ]
    assert labels(server.recorded(), "request") == ["request#1"]
    for _, hooks in server.manager.hooks.values():
        hooks.remove_hooks()
        hooks.remove_hooks()
    assert (traces(server.dit), traces(server.vae)) == before


def test_markers_have_the_shapes_unless_they_are_not_wanted(start):
    marks = [m.label for m in start().recorded().marks]
    assert "denoising.dit.layers.1.rotary in=[[1, 4]]" in marks


def test_options_reach_the_layers(start):
    recording = start(FXNVTX_SGLANG_SHAPES="0", FXNVTX_SGLANG_DEPTH="1", FXNVTX_SGLANG_STEPS="1").recorded()
    assert not recording.marks
    steps = [n for root in recording.tree() for n in root.walk() if n.category == "step"]
    assert [sum(n.category == "module" for n in s.walk()) for s in steps] == [0, 6, 0]
    assert labels(recording, "module")[-2:] == ["decoding.vae.decode", "decoding.vae.decode.decoder"]


def test_stages_only(start):
    server = start(FXNVTX_SGLANG="stages")
    before = traces(server.dit)
    recording = server.recorded()
    assert not labels(recording, "module")
    assert "predict_noise.unconditional" in labels(recording)
    assert traces(server.dit) == before


def test_off_registers_nothing(start):
    server = start(FXNVTX_SGLANG="off")
    assert not server.at("platforms.plugins").HookRegistry.hooks
    with pytest.raises(RuntimeError, match="NVTX"):
        server.serve()


def test_without_the_flag_and_in_a_warmup_nothing_shows_and_the_result_is_the_same(start, tmp_path):
    server = start(flag=False, FXNVTX_SGLANG_RECORD=str(tmp_path))
    before = traces(server.dit)
    wanted = server.serve().image
    assert not server.recorded().ranges
    server.args.enable_layerwise_nvtx_marker = True
    warmup = server.batch()
    warmup.is_warmup = True
    assert not server.recorded(warmup).ranges
    assert traces(server.dit) == before
    assert not list(tmp_path.iterdir())
    assert torch.equal(server.serve().image, wanted)
    with fxnvtx.record():
        assert torch.equal(server.serve().image, wanted)


@pytest.mark.parametrize("old", [False, True])
def test_under_the_launcher_a_warmup_shows_no_plain_models(start, old):
    with instrument_everything():
        server = start(old=old)
        warmup = server.batch()
        warmup.is_warmup = True
        assert labels(server.recorded(warmup)) == []
        first = server.recorded()
        assert labels(first)[0] == "request#0"
        assert not [name for name in labels(first) if name.startswith(("Dit", "Vae"))]
        server.args.enable_layerwise_nvtx_marker = False  # then the launcher shows what it finds
        server = Server()
        assert "Dit" in labels(server.recorded(warmup))
    server.args.enable_layerwise_nvtx_marker = True
    assert labels(first)[1:] == labels(Server().recorded())[1:]


def test_what_cannot_be_shown_is_told_once_and_served_all_the_same(start, caplog):
    server = start()
    wanted = server.serve().image
    server = Server()
    server.args.enable_layerwise_nvtx_marker = True
    server.manager.modules["dit"] = torch.fx.symbolic_trace(server.dit)
    with caplog.at_level(logging.WARNING, "fxnvtx.sglang"):
        for _ in range(2):
            assert torch.equal(server.serve().image, wanted)
    told = [r.getMessage() for r in caplog.records if r.name == "fxnvtx.sglang"]
    assert len(told) == len(set(told)) > 0
    assert labels(server.recorded(), "stage") == ["stage_denoising", "stage_decoding"]


def test_more_than_two_passes_go_by_their_names(start):
    server = start(branches=("positive", "image", "negative"))
    names = [x for x in labels(server.recorded()) if x.startswith("predict_noise.")]
    assert names == ["predict_noise.positive", "predict_noise.image", "predict_noise.negative"] * 3


def test_groups(start):
    server = start()
    batches = [server.batch(), server.batch()]
    group = server.recorded(batches, call="execute_group_with_profiling")
    assert [(r.label, r.payload) for r in group.ranges if r.category == "request"] == [("request_group#0", 2)]
    with fxnvtx.record() as recording:
        for _ in server.serve(batches, call="execute_group_sequentially_with_profiling"):
            with fxnvtx.range("between"):
                pass
    between = [r for r in recording.ranges if r.label == "between"]
    assert [r.depth for r in between] == [0, 0]
    assert labels(recording, "request")[:2] == ["request_group#1", "request_group#2"]
    unfinished = server.serve(batches, call="execute_group_sequentially_with_profiling")
    next(unfinished)
    unfinished.close()
    assert server.recorded().balanced


def test_ranks(start):
    server = start()
    server.at("distributed.parallel_state").WORLD[:] = [1, 2]
    (rank,) = server.recorded().tree()
    assert (rank.label, rank.payload) == ("rank_1", 1)
    assert rank.children[0].label == "request#0"


def test_a_recording_per_request(start, tmp_path, caplog):
    server = start(FXNVTX_SGLANG_RECORD=str(tmp_path / "made"))
    server.serve()
    server.vae.decode = None
    with pytest.raises(TypeError):
        server.serve()
    files = sorted((tmp_path / "made").iterdir())
    assert [f.name.split("-")[:2] for f in files] == [["request0", "rank0"], ["request1", "rank0"]]
    for number, file in enumerate(files):
        recording = Recording.load(file)
        assert recording.balanced
        assert labels(recording, "request") == [f"request#{number}"]


def test_a_folder_that_cannot_be_written_costs_no_request(start, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    server = start(FXNVTX_SGLANG_RECORD=str(tmp_path / "file" / "below"))
    assert server.serve().image is not None
    assert "was not recorded" in caplog.text


@pytest.mark.parametrize("strategy", ["ResidentStrategy", "ComponentOffloadStrategy", "SnapshotOffloadStrategy"])
def test_weights_that_move(start, strategy):
    server = start(strategy=strategy, dtype=torch.bfloat16)
    moves = [(r.label, r.payload) for r in server.recorded().ranges if r.category == "residency"]
    offloads = [("residency.offload vae", 0)] if strategy != "ResidentStrategy" else []
    assert moves == [("residency.load dit", 0), ("residency.load vae", 4 * 20), *offloads]
    again = [(r.label, r.payload) for r in server.recorded().ranges if r.category == "residency"]
    assert again == [(text, 0) for text, _ in moves], "it is there, in this precision"


def test_layers_that_come_and_go_one_by_one(start):
    server = start()
    layerwise = server.at("managers.memory_managers.layerwise_offload").LayerwiseOffloadManager(server.dit)
    nbytes = 4 * 20

    def moves(**batch):
        asked = server.batch()
        asked.is_warmup = bool(batch)
        return [(r.label, r.payload) for r in server.recorded(asked).ranges if " layers." in r.label]

    first = [("residency.load layers.0", nbytes)]
    forward = [
        ("residency.prefetch layers.1", nbytes),
        ("residency.offload layers.0", nbytes),
        ("residency.prefetch layers.0", nbytes),
        ("residency.offload layers.1", nbytes),
    ]
    assert moves() == first + forward * 6
    assert moves() == forward * 6, "the first one is there from before"
    assert moves(is_warmup=True) == []
    layerwise._retained_set = frozenset({0, 1})
    assert moves() == forward[:1], "what stays does not move"


def test_a_hook_that_raises_before_ours_closes_nobodys_range(start):
    server = start()

    def refuse(module, args):
        raise ValueError("no")

    handle = server.dit.layers[1].register_forward_pre_hook(refuse)
    with fxnvtx.record() as recording, pytest.raises(ValueError, match="no"):
        server.serve()
    assert recording.balanced
    handle.remove()
    assert labels(server.recorded(), "stage") == ["stage_denoising", "stage_decoding"]


def test_a_component_of_two_uses_is_named_by_the_one_that_goes_on(start):
    server = start()
    hooks = server.at("utils.nvtx_pytorch_hooks").DiffusionNvtxHooks
    encode, decode = hooks(), hooks()
    assert encode.register_hooks(server.vae, "image_encoding.vae") == 2
    assert decode.register_hooks(server.vae, prefix="decoding.vae") == 2

    def shown():
        with fxnvtx.record() as recording:
            server.vae.decode(X)
        return labels(recording)

    assert shown() == []
    encode.set_enabled(True)
    assert shown() == ["image_encoding.vae", "image_encoding.vae.decoder"]
    decode.set_enabled(True)
    assert shown() == ["decoding.vae", "decoding.vae.decoder"]
    decode.set_enabled(False)
    assert shown() == ["image_encoding.vae", "image_encoding.vae.decoder"]
    encode.remove_hooks()
    assert shown() == []
    decode.set_enabled(True)
    for other in (copy.deepcopy(server.vae), pickle.loads(pickle.dumps(server.vae))):
        with fxnvtx.record() as recording:
            assert torch.equal(other.decode(X), server.vae.decode(X))
        assert labels(recording) == ["decoding.vae", "decoding.vae.decoder"], "the copy has none"


def test_a_use_that_goes_on_costs_nothing_and_sees_new_layers(start, monkeypatch):
    server = start()
    named = []
    enable = Attachments.enable
    monkeypatch.setattr(Attachments, "enable", lambda self, *a, **k: named.append(a) or enable(self, *a, **k))  # type: ignore[func-returns-value]
    use = server.stages[0].use
    server.manager.begin_use(use)
    assert len(named) == 1
    for _ in range(5):
        server.manager.begin_use(use)
    assert len(named) == 1
    server.dit.layers[1].fc = nn.Sequential(nn.Linear(4, 4))
    with fxnvtx.record() as recording:
        server.dit(X)
    assert "denoising.dit.layers.1.fc.0" in labels(recording)
    server.manager.end_use(use)
    server.manager.begin_use(use)
    assert len(named) == 2
    server.manager.end_use(use)


@pytest.mark.parametrize("flag", [True, False])
def test_arguments_of_torch_compile(start, flag):
    server = start(flag=flag)
    build = server.at("utils.torch_compile").build_torch_compile_kwargs
    kwargs = build(mode="default", module=server.dit)
    assert kwargs.get("backend", "inductor") == ("fxnvtx" if flag else "inductor")
    assert kwargs["mode"] == "default"
    assert traces(server.dit) == traces(Dit())


@pytest.mark.slow
def test_compiled_layers_and_a_silent_warmup(start):
    server = start()
    torch._dynamo.reset()
    wanted = server.serve().image
    inner = {"backend": fxnvtx.backend("eager")}
    assert server.at("utils.torch_compile").build_torch_compile_kwargs(mode=None, module=server.dit)
    server.dit.compile(**inner)
    server.stages[1].compile_kwargs = inner
    warmup = server.batch()
    warmup.is_warmup = True
    assert {r.category for r in server.recorded(warmup).ranges} <= {"compile"}
    recording = server.recorded()
    (decoding,) = (n for n in recording.tree()[0].children if n.label == "stage_decoding")
    (root,) = (n for n in decoding.children if n.category == "module")
    assert (root.label, [n.label for n in root.walk()][-1]) == ("decoding.vae.decode", "decoding.vae.decode.decoder")
    for prefix in ("denoising.dit", "denoising.dit.layers.1", "denoising.dit.layers.1.fc", "decoding.vae.decode"):
        assert prefix in labels(recording, "module")
    assert torch.equal(server.serve().image, wanted)
    server.args.enable_layerwise_nvtx_marker = False
    torch._dynamo.reset()


def test_direct_calls_of_torch_compile(start):
    server = start()
    pipe = SimpleNamespace(transformer=server.dit, unet=Dit())
    compile = torch.compile
    pipeline = server.at("pipelines.diffusers_pipeline").DiffusersPipeline()
    assert pipeline._apply_torch_compile(pipe, server.args) is pipe
    assert torch.compile is compile
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_release_without_some_places(start, tmp_path, monkeypatch, caplog):
    old = tmp_path / "some"
    shutil.copytree(DOUBLE, old)
    runtime = old / "sglang" / "multimodal_gen" / "runtime"
    (runtime / "distributed" / "cfg_policy.py").unlink()
    stages = runtime / "pipelines_core" / "stages" / "denoising.py"
    stages.write_text(stages.read_text().replace("_predict_noise_with_cfg", "_predict"))
    monkeypatch.syspath_prepend(str(old))
    importlib.invalidate_caches()
    told = missing_targets() or []
    assert [t.split(": ")[0] for t in told] == ["names of more than two passes"] * 2
    (finding,) = (f for f in doctor.findings() if f.what == "SGLang")
    assert finding.state == "note"
    assert "CFGBranch.configure_batch is not there" in finding.found
    with caplog.at_level(logging.WARNING, "fxnvtx.sglang"):
        register()
    lines = [r.getMessage() for r in caplog.records if r.name == "fxnvtx.sglang"]
    assert lines == ["this release of SGLang has no place for: names of more than two passes"]
    hooked = {target for target, *_ in importlib.import_module(ROOT + "platforms.plugins").HookRegistry.hooks}
    assert len(hooked) == len(TARGETS) - 2


@pytest.mark.slow
def test_targets_of_the_stand_in_are_all_there(start):
    assert missing_targets() == []
    assert [f.state for f in doctor.findings() if f.what == "SGLang"] == ["ok"]
    assert len(found_in(None)[1]) == len(TARGETS)


@pytest.mark.parametrize(
    "strategy", ["ResidentStrategy", "VanillaD2HStrategy", "SnapshotStrategy", "LayerwiseOffloadStrategy"]
)
def test_an_older_release_shows_the_same(start, strategy):
    """Its classes are patched as they are imported; `fxnvtx run` asks for that in every process."""
    server = start(old=True, strategy=strategy, dtype=torch.bfloat16)
    told = missing_targets() or []
    assert told[0].startswith("it loads no plugins")
    assert [t.split(":")[0] for t in told[1:]] == ["the root of a compiled vae.decode"]
    before = traces(server.dit)
    (request,) = server.recorded().tree()
    labels_of: dict[str, list[str]] = {n.category: [] for n in request.walk()}
    for n in request.walk():
        labels_of[n.category].append(n.label)
    assert labels_of["request"] == ["request#0"]
    assert labels_of["stage"] == ["stage_denoising", "stage_decoding"]
    assert labels_of["op"][:3] == ["predict_noise", "predict_noise.conditional", "predict_noise.unconditional"]
    assert labels_of["module"][:2] == ["denoising.dit", "denoising.dit.layers.0"]
    assert labels_of["module"][-1] == "decoding.vae.decode.decoder"
    offload = [] if strategy == "ResidentStrategy" else ["residency.offload vae"]
    assert labels_of["residency"] == ["residency.load dit", "residency.load vae", *offload]
    patch_older_releases()  # the second time it changes nothing
    assert labels(server.recorded(), "request") == ["request#1"]
    server.args.enable_layerwise_nvtx_marker = False
    assert not server.recorded().ranges
    for _, hooks in server.manager.hooks.values():
        hooks.remove_hooks()
    assert traces(server.dit) == before


def test_an_older_release_takes_our_backend(start):
    server = start(old=True)
    stage = server.stages[0]
    stage.server_args = SimpleNamespace(enable_layerwise_nvtx_marker=True, enable_torch_compile=True)
    asked = []
    compile = torch.compile
    try:
        torch.compile = lambda *args, **kwargs: asked.append(kwargs) or compile(*args, **kwargs)  # type: ignore[func-returns-value]
        stage._maybe_enable_torch_compile(server.dit)
        stage.server_args.enable_layerwise_nvtx_marker = False
        stage._maybe_enable_torch_compile(Dit())
    finally:
        torch.compile = compile
    assert [a.get("backend") for a in asked] == ["fxnvtx", None]
    torch._dynamo.reset()


def test_hook_objects_are_sglangs_own(start):
    """Whoever asks them, or inherits from their class, finds what he knows."""
    server = start()
    kind = server.at("utils.nvtx_pytorch_hooks").DiffusionNvtxHooks
    assert kind.__module__ == ROOT + "utils.nvtx_pytorch_hooks"

    hooks = type("Mine", (kind,), {})()
    assert hooks.register_hooks(server.dit, "denoising.dit") == len(hooks._module_to_name_map) == 6
    assert hooks._module_to_name_map[server.dit.layers[1].fc] == "denoising.dit.layers.1.fc"
    hooks.set_enabled(True)
    assert hooks._enabled
    server.dit.layers[1].fc = None
    assert len(hooks._module_to_name_map) == 5, "a layer that was replaced is not kept alive"
    hooks.remove_hooks()
    assert hooks._module_to_name_map == {}
    assert hooks.register_hooks(server.dit) == 5, "and may be used again"
    hooks.remove_hooks()


def test_a_handle_that_is_removed_takes_its_layers_range_out(start):
    """SGLang keeps two for each module, in this order; removing them all, as it does, leaves the object as new."""
    server = start()
    hooks = server.at("utils.nvtx_pytorch_hooks").DiffusionNvtxHooks()

    def shown():
        with fxnvtx.record() as recording:
            server.dit(X)
        return labels(recording)

    hooks.register_hooks(server.dit, "d")
    hooks.set_enabled(True)
    assert len(hooks._hook_handles) == 2 * len(hooks._module_to_name_map) == 12
    everything = ["d", "d.layers.0", "d.layers.0.rotary", "d.layers.0.fc"]
    everything += ["d.layers.1", "d.layers.1.rotary", "d.layers.1.fc"]
    assert shown() == everything
    for name, end in (("d.layers.0.fc", 0), ("d.layers.0.rotary", 1), ("d.layers.1", 0), ("d", 1)):
        at = list(hooks._module_to_name_map.values()).index(name)
        hooks._hook_handles[2 * at + end].remove()
        hooks._hook_handles[2 * at + end].remove()
    assert shown() == ["d", "d.layers.0", "d.layers.1.fc"], "a module that has two names is gone by both"
    hooks.set_enabled(False)
    assert shown() == []
    hooks.set_enabled(True)
    assert shown() == ["d", "d.layers.0", "d.layers.1.fc"]
    server.dit.layers[0].fc = nn.Linear(4, 4)
    server.dit.layers[1] = nn.Linear(4, 4)
    hooks.set_enabled(False)
    hooks.set_enabled(True)
    assert shown() == ["d", "d.layers.0", "d.layers.0.fc", "d.layers.1"], "in the next use others in their place show"
    before = hooks._hook_handles[:]
    hooks.remove_hooks()
    assert shown() == hooks._hook_handles == []
    for handle in before:
        handle.remove()
    hooks.register_hooks(server.dit, "d")
    hooks.set_enabled(True)
    assert shown() == ["d", "d.layers.0", "d.layers.0.rotary", "d.layers.0.fc", "d.layers.1"]
    hooks.remove_hooks()


@pytest.fixture
def torch_nvtx(monkeypatch, start):
    """torch.cuda.nvtx as it is in a fresh process."""
    module = torch.cuda.nvtx
    yield module
    module.__class__ = ModuleType


def test_who_takes_the_place_of_torchs_nvtx_functions_hears_every_range(start, torch_nvtx, monkeypatch):
    server = start()
    heard = []
    server.serve()
    assert not emit.sinks
    with monkeypatch.context() as patch:
        patch.setattr(torch_nvtx, "range_push", lambda text: heard.append(text))
        patch.setattr(torch_nvtx, "range_pop", lambda: heard.append(None))
        assert ranges.listening()
        recording = server.recorded()
        assert [text for text in heard if text] == labels(recording)
        assert heard.count(None) == len(recording.ranges)
        depth = 0
        for text in heard:
            depth += 1 if text else -1
            assert depth >= 0
        patch.setattr(torch_nvtx, "range_push", lambda text: 1 / 0)
        assert server.serve().image is not None
        assert heard.count(None) == len(recording.ranges), "what was not pushed is not popped"
    assert not emit.sinks


@pytest.mark.slow
def test_without_sglang(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_targets() is None
    assert not [f for f in doctor.findings() if f.what == "SGLang"]


def test_values_without_meaning_are_told_and_ignored(caplog):
    given = {"": "loud", "_DEPTH": "-1", "_STEPS": "a", "_SHAPES": "2"}
    assert read_options({f"FXNVTX_SGLANG{k}": v for k, v in given.items()}) == Options()
    assert len(caplog.records) == 4
    assert read_options({}) == Options()
    right = {"": " Stages ", "_DEPTH": "2", "_STEPS": "4-8,20", "_SHAPES": "false", "_RECORD": "x"}
    found = read_options({f"FXNVTX_SGLANG{k}": v for k, v in right.items()})
    assert (found.mode, found.depth, found.shapes, found.record) == ("stages", 2, False, "x")
    assert found.steps is not None
    assert [s in found.steps for s in (3, 4, 20)] == [False, True, True]
