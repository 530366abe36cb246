"""Its own markers, which a torch without CUDA cannot emit."""


def maybe_nvtx_range(name, enabled=True):
    raise RuntimeError("NVTX functions not installed")


class DiffusionNvtxHooks:
    def __init__(self):
        raise RuntimeError("NVTX functions not installed")
