"""A loop with guided steps, and a stage that decodes."""

import contextlib

from ...managers import forward_context
from ...managers.memory_managers.component_manager import ComponentUse
from ...utils import nvtx_pytorch_hooks, torch_compile


class Stage:
    name = "stage"
    use: ComponentUse
    current_use_nvtx = False
    silent = staticmethod(contextlib.nullcontext)

    def ranged(self, text):
        return nvtx_pytorch_hooks.maybe_nvtx_range(text, True) if self.current_use_nvtx else self.silent()

    def component_uses(self, server_args, stage_name=None):
        return [self.use]


class DenoisingStage(Stage):
    name = "denoising"

    def __init__(self, branches):
        self.branches = branches
        self.use = ComponentUse("denoising", "dit")

    def forward(self, batch, manager):
        dit = manager.begin_use(self.use)
        with self.ranged("denoising_loop"):
            for step in range(3):
                with self.ranged(f"denoising_step_{step}_t{900 - 100 * step}"):
                    with self.ranged("predict_noise"):
                        batch.latent = self._predict_noise_with_cfg(dit, batch, cfg_policy=self)
                    with self.ranged("scheduler_step"):
                        batch.latent = batch.latent * 0.5
        manager.end_use(self.use)

    def _maybe_enable_torch_compile(self, module):  # before 0.5.15
        module.compile()

    def _predict_noise_with_cfg(self, dit, batch, cfg_policy):
        found = []
        for branch in cfg_policy.branches:
            branch.configure_batch(batch)
            forward_context.CONTEXT.forward_batch = batch
            found.append(self._predict_noise(dit, batch))
        return sum(found)

    def _predict_noise(self, dit, batch):
        return dit(batch.latent)


class DecodingStage(Stage):
    name = "decoding"

    def __init__(self, target_dtype=None):
        self.use = ComponentUse("decoding", "vae", "decode", target_dtype)
        self.compile_kwargs = None
        self.compiled = torch_compile.ActiveTargetCompiledCallable()

    def forward(self, batch, manager):
        vae = manager.begin_use(self.use)
        decode = vae.decode
        if self.compile_kwargs is not None:
            kwargs = {**torch_compile.build_torch_compile_kwargs(mode=None, module=vae), **self.compile_kwargs}
            decode = self.compiled.get_or_compile(vae, decode, compile_kwargs=kwargs)
        batch.image = decode(batch.latent.to(next(vae.parameters()).dtype))
        manager.end_use(self.use)
