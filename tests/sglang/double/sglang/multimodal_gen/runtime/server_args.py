"""The arguments of the process."""

from types import SimpleNamespace

ARGS = SimpleNamespace(enable_layerwise_nvtx_marker=False)


def get_global_server_args():
    return ARGS
