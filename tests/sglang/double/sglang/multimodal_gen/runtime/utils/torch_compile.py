"""What SGLang hands to torch.compile, and a compiled method."""

from torch import nn


def build_torch_compile_kwargs(*, mode, module=None):
    kwargs = {"fullgraph": False, "dynamic": None}
    return kwargs if mode is None else {**kwargs, "mode": mode}


class CallableModule(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


class ActiveTargetCompiledCallable:
    compiled = None

    def get_or_compile(self, target, fn, *, compile_kwargs):
        if self.compiled is None:
            self.compiled = CallableModule(fn)
            self.compiled.compile(**compile_kwargs)
        return self.compiled


class CompiledModuleRegistry:
    def compile_once(self, module, *, compile_kwargs):
        module.compile(**compile_kwargs)
        return True
