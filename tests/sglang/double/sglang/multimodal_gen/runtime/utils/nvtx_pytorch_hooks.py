"""Its own markers, which a torch without CUDA cannot emit."""


def maybe_nvtx_range(name, enabled=True):
    raise RuntimeError("NVTX functions not installed")


class DiffusionNvtxHooks:
    def __init__(self):
        self._enabled = False
        self._module_to_name_map = {}
        self._hook_handles = []

    def register_hooks(self, model, prefix=""):
        raise RuntimeError("NVTX functions not installed")

    def set_enabled(self, enabled):
        self._enabled = enabled

    def remove_hooks(self):
        for handle in self._hook_handles:
            handle.remove()
        self._hook_handles.clear()
        self._module_to_name_map.clear()
