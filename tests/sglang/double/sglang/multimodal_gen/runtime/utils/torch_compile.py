"""What SGLang hands to torch.compile."""


def build_torch_compile_kwargs(*, mode, module=None):
    kwargs = {"fullgraph": False, "dynamic": None}
    return kwargs if mode is None else {**kwargs, "mode": mode}
