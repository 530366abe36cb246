"""A pytest plugin: SGLang's names for what fxnvtx.pipeline has, so that SGLang's own unit tests run against it.

Translates and answers nothing by itself: what a test sees of hooks and names is read off the models. SGLang need not be
installed; a test of something that fxnvtx.pipeline does not have fails (test_real.py says which those are).
"""

import sys
from types import ModuleType, SimpleNamespace

import torch.cuda.nvtx

import fxnvtx.pipeline as fx
from fxnvtx.control import controls_of
from fxnvtx.hooks import DiffusionNvtxHooks
from fxnvtx.instrument import is_enabled, label_of
from fxnvtx.integrations.sglang.torch_nvtx import also_through_torch
from fxnvtx.names import Selection, input_shapes, label_text, name_modules
from fxnvtx.pipeline.request import RequestMetrics
from fxnvtx.ranges import maybe_nvtx_range

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


def component_use(stage_name, component_name, phase=None):
    return fx.ComponentUse(component_name, phase, stage=stage_name)


class Manager:
    def __init__(self, pipeline, server_args):
        self.args = fx.ServerArgs(enable_layerwise_nvtx_marker=server_args.enable_layerwise_nvtx_marker)
        self.pipeline = pipeline
        self.state = SimpleNamespace(batch_is_warmup=False)
        self._manager = fx.ComponentResidencyManager(pipeline.modules, args=self.args)
        self._request = None
        self._hooks = {}

    def begin_use(self, use, module=None):
        if self._request is None:
            self._request = self._manager.begin_request([], self.args, is_warmup=self.state.batch_is_warmup)
        if use not in self._request.timeline.uses:  # SGLang's stages declare theirs elsewhere
            self._request.timeline.uses.append(use)
        self._manager.begin_use(use, module=module)
        if use.key not in self._hooks or self._hooks[use.key].module is not module:
            self._hooks[use.key] = HooksOfUse(use, module)

    def end_use(self, use, module=None):
        self._manager.end_use(use)

    def remove_nvtx_hooks_for_module(self, module):
        self._manager.remove_nvtx_hooks_for_module(module)

    @property
    def _nvtx_hooks_by_use_key(self):
        return {k: (id(h.module), h) for k, h in self._hooks.items() if controls_of(h.module) is not None}

    @property
    def _active_nvtx_key(self):
        return next((a.use.key for a in reversed(self._request.active) if a.ranged), None)


class Stage(fx.PipelineStage):
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
    return [list(shape) for shape in input_shapes(args, kwargs or {})]


def offer(name, **names):
    """Let `name` be importable with those names in it."""
    parts = (RUNTIME + name).split(".")
    for end in range(1, len(parts) + 1):
        dotted = ".".join(parts[:end])
        if dotted not in sys.modules:
            module = sys.modules[dotted] = ModuleType(dotted)
            module.__path__ = []
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    sys.modules[RUNTIME + name].__dict__.update(names)


also_through_torch()
offer(
    "utils.nvtx_pytorch_hooks",
    nvtx=torch.cuda.nvtx,
    DiffusionNvtxHooks=Hooks,
    maybe_nvtx_range=maybe_nvtx_range,
    _collect_input_shapes=collect_input_shapes,
)
offer("managers.memory_managers.component_manager", ComponentResidencyManager=Manager, ComponentUse=component_use)
offer(
    "managers.memory_managers.component_residency_strategies", ComponentOffloadStrategy=object, ResidentStrategy=object
)
offer("pipelines_core.stages.base", PipelineStage=Stage)
offer("pipelines_core.schedule_batch", Req=Req)
