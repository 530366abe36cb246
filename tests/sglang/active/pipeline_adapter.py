"""A pytest plugin: SGLang's names for what fxnvtx.pipeline has, so that SGLang's own unit tests run against it.

Translates and answers nothing by itself: what a test sees of hooks and names is read off the models. SGLang need not be
installed; a test of something that fxnvtx.pipeline does not have fails (test_real.py says which those are).
"""

import dataclasses
import sys
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch.cuda.nvtx

import fxnvtx.pipeline as fx
from fxnvtx.errors import ConfigError
from fxnvtx.integrations.sglang import also_through_torch
from fxnvtx.modules import DiffusionNvtxHooks, is_enabled, label_of
from fxnvtx.modules.registry import controls_of
from fxnvtx.modules.selection import Selection, label_text, name_modules
from fxnvtx.pipeline import strategies
from fxnvtx.pipeline.component_use import Holdings
from fxnvtx.pipeline.request import RequestMetrics
from fxnvtx.ranges import maybe_nvtx_range
from fxnvtx.ranges.labels import input_shapes

RUNTIME = "sglang.multimodal_gen.runtime."


def names_of(model):
    """Module -> label of everything in `model` that has a range now."""
    if controls_of(model) is None:
        return {}
    return {n.module: label_text(label_of(model), type(n.module), n.fqn) for n in name_modules(model, Selection())}


class Hooks(DiffusionNvtxHooks):
    def __init__(self):
        super().__init__()
        self._hook_handles = []  # there are no forward hooks

    @property
    def _module_to_name_map(self):
        models = [c.model() for c in self._models]
        return {m: text for model in models if model is not None for m, text in names_of(model).items()}


class HooksOfUse:
    """What one use has attached to one module."""

    def __init__(self, use, module):
        self.use, self.module = use, module

    @property
    def _enabled(self):
        return label_of(self.module) == self.use.prefix and is_enabled(self.module)

    @property
    def _module_to_name_map(self):
        return names_of(self.module)


class Use(fx.ComponentUse):
    """A use, made and asked as SGLang's are."""

    def __init__(
        self, stage_name, component_name, phase=None, target_dtype=None, memory_intensive=False,
        start_at_stage_entry=True, preferred_ready_after_request=False,
    ):  # fmt: skip
        super().__init__(
            component_name, phase, dtype=target_dtype, heavy=memory_intensive, stage=stage_name,
            at_stage_entry=start_at_stage_entry, keep_ready=preferred_ready_after_request,
        )  # fmt: skip

    component_name = property(lambda self: self.component)
    stage_name = property(lambda self: self.stage)
    __hash__ = fx.ComponentUse.__hash__


class StageOf:
    """A stage of a test, as the manager asks for one. There, a use that is its stage's only one begins with it."""

    def __init__(self, stage, name, server_args):
        self.component_name, self._args = name, server_args
        self.uses = {u.key: u for u in stage.component_uses(server_args, name)}

    def component_uses(self, args, stage_name):
        alone = len(self.uses) == 1
        return [
            dataclasses.replace(u, at_stage_entry=u.at_stage_entry and alone) for u in map(plain, self.uses.values())
        ]


def plain(use):
    return fx.ComponentUse(**{f.name: getattr(use, f.name) for f in dataclasses.fields(use)})


class Strategy:
    """One of a test's strategies (a Mock), as the manager calls its own."""

    mode, kept, stays, offloads, ahead = "test", False, False, True, False
    bound_bytes = committed_bytes = 0

    def __init__(self, books, name, module):
        self._books, self._name, self._module = books, name, module
        self._theirs = books.outer.strategy_for(name, module)

    def _tell(self, what, module, **named):
        self.ahead = what == "prefetch_for_use"
        use = self._books.last.get(self._name)
        if use is not None:  # else it is only put where it is to wait
            getattr(self._theirs, what)(module, use, self._books.outer.state, **named)

    def refresh(self, module):
        pass

    def before_use(self, module, dtype):
        self._tell("prepare_for_use", module)

    def wait_for_use(self, module, dtype):
        self._tell("wait_for_use", module)

    def finish_use(self, module):
        self._tell("finish_use", module)

    def prefetch_bytes(self):
        return 1

    def prefetch(self, module, dtype):
        self._tell("prefetch_for_use", module)

    def finish_request(self, module):
        self._tell("finish_request", module, preferred=False)


class Books(Holdings):
    """The manager's books, in which the strategies are those that a test puts in `strategy_for`."""

    def __init__(self, outer, *args):
        super().__init__(*args)
        self.outer, self.last, self.met = outer, {}, {}

    def strategy(self, name, module):
        if "strategy_for" not in vars(self.outer):
            return super().strategy(name, module)
        return self.met.setdefault(id(module), (module, Strategy(self, name, module)))[1]

    def of(self, module):
        return self.met[id(module)][1] if id(module) in self.met else super().of(module)

    def known(self):
        return list(self.met.values()) or super().known()

    def load(self, use, module, components):
        self.last[use.component] = self.outer.uses.get(use.key, use)
        super().load(use, module, components)

    def prefetch(self, strategy, module, dtype, components):
        if isinstance(strategy, Strategy):
            name = strategy._name
            before, self.last[name] = (
                self.last.get(name),
                self.outer.uses[self.outer._request.timeline.next_heavy().key],
            )
            strategy.prefetch(module, dtype)
            if before is not None:
                self.last[name] = before
        else:
            super().prefetch(strategy, module, dtype, components)


class Components(dict):
    """The modules of a test. One that a stage brings along when it comes to it is not there yet, and is no module."""

    def __missing__(self, name):
        return None


class Manager:
    def __init__(self, pipeline, server_args):
        self.args = arguments(server_args)
        self.pipeline = pipeline
        pipeline.modules = Components(pipeline.modules)
        self.state = SimpleNamespace(batch_is_warmup=False, stages=[])
        m: Any = fx.ComponentResidencyManager(pipeline.modules, args=self.args)
        self._manager = m
        m.holdings = Books(self, m.kinds, m._args_here, None, m._in_use, m._shows_moves)
        self._request: Any = None
        self._hooks = {}
        self._stages = {}
        self.uses = {}
        self._open = ExitStack()

    def refresh_pipeline(self, pipeline):
        self._manager.refresh_pipeline(pipeline.modules)

    def _stage(self, stage, server_args):
        name = next((n for n, s in self.pipeline._stage_name_mapping.items() if s is stage), "stage")
        found = StageOf(stage, name, server_args)
        # the uses say of which stage they are
        found.component_name = next((u.stage for u in found.uses.values()), name)
        self.uses.update(found.uses)
        return found

    def begin_request(self, stages, batch, server_args):
        args = arguments(server_args)
        known = self.pipeline._stage_name_mapping.values()
        whole = fx.ComposedPipeline(args)
        whole.components.update(self.pipeline.modules)
        whole.stages.update({s.component_name: s for s in (self._stage(s, server_args) for s in known)})
        if known:
            whole.check(args)
        own = [self._stage(s, server_args) for s in stages]
        warmup = fx.PipelineExecutor._is_warmup_payload(batch)
        self._request = self._manager.begin_request(own, args, is_warmup=warmup)
        self.state.batch_is_warmup, self.state.stages = warmup, list(stages)

    @property
    def _ordered_uses(self):
        return tuple(self.uses[use.key] for use in self._request.timeline.uses)

    def finish_request(self):
        self._manager.finish_request(self._request)

    def before_stage(self, stage, index, batch, server_args):
        self._now = self._stage(stage, server_args)
        self._manager.before_stage(self._now)

    def strategy_for(self, component_name, module):
        self._manager.components[component_name] = module
        return self._manager.holdings.strategy(component_name, module)

    @property
    def _strategy_cache(self):
        named = {id(module): name for name, module in self._manager.components.items()}
        return {named[id(m)]: (m, s) for m, s in self._manager.holdings.known() if id(m) in named}

    def begin_stage(self):
        self._open.enter_context(self._manager.stage_uses(self._now))

    def end_stage(self):
        self._open.close()

    def finish_active_use(self):
        if self._request.active:
            self._manager.end_use(self._request.active[-1].use)

    @property
    def _prefetched_use_keys(self):  # asked for by SGLang's tests alone
        return {self._manager.holdings.last[s._name].key for _, s in self._manager.holdings.known() if s.ahead}

    def _use_key(self, use):
        return use.key

    def begin_use(self, use, module=None):
        if self._request is None:
            self._request = self._manager.begin_request([], self.args, is_warmup=self.state.batch_is_warmup)
        if self._request.timeline.find(use.key) is None:  # SGLang's stages declare theirs elsewhere
            self._request.timeline.uses.append(use)
            self.uses[use.key] = use
        self._manager.begin_use(plain(use), module=module)
        if use.key not in self._hooks or self._hooks[use.key].module is not module:
            self._hooks[use.key] = HooksOfUse(use, module)

    ensure_ready = begin_use

    def end_use(self, use, module=None):
        self._manager.end_use(plain(use))

    def remove_nvtx_hooks_for_module(self, module):
        self._manager.remove_nvtx_hooks_for_module(module)

    @property
    def _nvtx_hooks_by_use_key(self):
        return {k: (id(h.module), h) for k, h in self._hooks.items() if controls_of(h.module) is not None}

    @property
    def _active_nvtx_key(self):
        return next((a.use.key for a in reversed(self._request.active) if a.ranged), None)


class Args:
    """Server arguments of a test that says where weights are kept."""

    enable_layerwise_nvtx_marker = False


def arguments(server_args):
    return fx.ServerArgs(
        enable_layerwise_nvtx_marker=server_args.enable_layerwise_nvtx_marker,
        residency=dict(getattr(server_args, "component_residency", {})),
    )


class Stage(fx.PipelineStage):
    server_args: Any

    def __call__(self, batch, server_args):
        wanted = getattr(self.server_args, "enable_layerwise_nvtx_marker", False)
        return super().__call__(batch, fx.ServerArgs(enable_layerwise_nvtx_marker=wanted))


class ByName(dict):
    """SGLang's figures of stages go by their profile names, ours by the labels of their ranges."""

    def __contains__(self, name):
        return any(stage.name == name for stage in self.values())


class Req:
    is_warmup = False

    def __init__(self, perf_dump_path=None):
        self.metrics = RequestMetrics(stages=ByName())


def collect_input_shapes(args, kwargs=None):
    return [list(shape) for shape in cast("tuple[tuple[int, ...], ...]", input_shapes(args, kwargs or {}))]


def offer(name, below=RUNTIME, /, **names):
    """Let `name` be importable with those names in it."""
    parts = (below + name).split(".")
    for end in range(1, len(parts) + 1):
        dotted = ".".join(parts[:end])
        if dotted not in sys.modules:
            module = sys.modules[dotted] = ModuleType(dotted)
            module.__path__ = []
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    sys.modules[below + name].__dict__.update(names)


also_through_torch()
offer(
    "utils.nvtx_pytorch_hooks",
    nvtx=torch.cuda.nvtx,
    DiffusionNvtxHooks=Hooks,
    maybe_nvtx_range=maybe_nvtx_range,
    _collect_input_shapes=collect_input_shapes,
)
offer(
    "managers.memory_managers.component_manager", ComponentResidencyManager=Manager, ComponentUse=Use,
    ResidencyState=SimpleNamespace, build_component_residency_strategy=None,
)  # fmt: skip
offer("managers.memory_managers.component_residency", ComponentResidencyError=ConfigError)
offer("server_args", ServerArgs=Args)
offer("pipelines_core.stages.base", PipelineStage=Stage)
offer("pipelines_core.schedule_batch", Req=Req)
# What SGLang alone has: a test that asks for it fails.
NOT_OURS = {
    "managers.memory_managers.memory_occupation_controller": ("MemoryOccupationController",),
    "managers.memory_managers.weight_snapshot": ("weight_snapshot",),
    "loader.utils": ("component_residency_bytes",),
    "pipelines_core.lora.pipeline": ("LoRAPipeline",),
    "pipelines_core.stages.image_encoding": ("ImageEncodingStage",),
    "pipelines_core.stages.realtime.text_encoding": ("RealtimeTextEncodingStage",),
    "post_training.weights_updater": ("_load_weights_into_module",),
    "utils.argparse": ("FlexibleArgumentParser",),
}  # fmt: skip
for where, names in NOT_OURS.items():
    offer(where, **{name: type(name, (), {}) for name in names})
CALLED = dict.fromkeys(("prepare_for_use", "wait_for_use", "prefetch_for_use", "finish_use", "finish_request"))
offer(
    "managers.memory_managers.component_residency_strategies",
    ResidentStrategy=strategies.Resident,
    ComponentOffloadStrategy=type("ComponentOffloadStrategy", (), CALLED),
    SnapshotOffloadStrategy=type("SnapshotOffloadStrategy", (), CALLED),
)
offer("platforms", current_platform=SimpleNamespace(is_cuda=lambda: False))
for where, name in (("base", "PipelineConfig"), ("qwen_image", "QwenImagePipelineConfig")):
    offer(f"pipeline_configs.{where}", "sglang.multimodal_gen.configs.", **{name: type(name, (), {})})
