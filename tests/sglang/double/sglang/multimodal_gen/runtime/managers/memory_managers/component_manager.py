"""Uses of components, one after the other."""

from dataclasses import dataclass
from types import SimpleNamespace

from ...utils import nvtx_pytorch_hooks


@dataclass
class ComponentUse:
    stage_name: str
    component_name: str
    phase: str | None = None
    target_dtype: object = None


class ComponentResidencyManager:
    def __init__(self, modules, strategies, server_args):
        self.modules, self.strategies, self.server_args = modules, strategies, server_args
        self.state = SimpleNamespace(batch_is_warmup=False)
        self.hooks = {}
        self.active = None

    def get_module(self, name):
        return self.modules.get(name)

    def stage_name(self, stage):
        return stage.name

    def begin_use(self, use):
        module, strategy = self.modules[use.component_name], self.strategies[use.component_name]
        strategy.prepare_for_use(module, use, self.state)
        strategy.wait_for_use(module, use, self.state)
        self._enable_nvtx_for_use(use, module)
        return module

    def end_use(self, use):
        if self.active is not None:
            self.active.set_enabled(False)
        self.strategies[use.component_name].finish_use(self.modules[use.component_name], use, self.state)

    def _enable_nvtx_for_use(self, use, module=None):
        self.active = None
        if not self.server_args.enable_layerwise_nvtx_marker or self.state.batch_is_warmup:
            return
        key = (use.stage_name, use.component_name, use.phase)
        known = self.hooks.get(key)
        if known is None or known[0] is not module:
            if known is not None:
                known[1].remove_hooks()
            made = nvtx_pytorch_hooks.DiffusionNvtxHooks()
            if made.register_hooks(module, prefix=self._nvtx_prefix_for_use(use)) == 0:
                return
            known = self.hooks[key] = (module, made)
        known[1].set_enabled(True)
        self.active = known[1]

    @staticmethod
    def _nvtx_prefix_for_use(use):
        return ".".join(p for p in (use.stage_name, use.component_name, use.phase) if p)
