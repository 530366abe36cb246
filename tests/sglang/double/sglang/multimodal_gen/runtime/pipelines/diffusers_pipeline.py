"""The diffusers backend, which calls torch.compile itself."""

import torch


class DiffusersPipeline:
    def _apply_torch_compile(self, pipe, server_args):
        pipe.transformer.compile()
        pipe.unet = torch.compile(pipe.unet)
        return pipe
