"""The device, seen through one probe, and the residency defaults of a two-stage model that follow from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .args import DEVICE_MODES, ServerArgs

__all__ = [
    "MODE_VARIABLE",
    "RESIDENT_MIN_BYTES",
    "DeviceInfo",
    "device_mode",
    "probe_device",
    "stays_resident",
    "two_stage_defaults",
]

GIB = 1 << 30
# A two-stage video model with both DiTs, the text encoder and the VAE fits next to its activations from here on.
RESIDENT_MIN_BYTES = 130 * GIB
MODE_VARIABLE = "FXNVTX_TWO_STAGE_DEVICE_MODE"
AUXILIARY_FLAGS = ("text_encoder_cpu_offload", "image_encoder_cpu_offload", "vae_cpu_offload")
log = logging.getLogger("fxnvtx.pipeline")


@dataclass(frozen=True)
class DeviceInfo:
    """What is known of the compute device: its name is for the log, its memory (bytes) decides."""

    cuda: bool
    name: str
    total_bytes: int


Probe = Callable[[], DeviceInfo]


def probe_device() -> DeviceInfo:
    """The device that this process computes on."""
    if not torch.cuda.is_available():
        return DeviceInfo(False, "cpu", 0)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return DeviceInfo(True, str(properties.name), int(properties.total_memory))


def stays_resident(device: DeviceInfo) -> bool:
    """The one place that decides whether everything fits. The name takes no part: "GH200 480GB" has 96 GB, and an
    18 GB slice of an H200 is called H200 too."""
    return device.cuda and device.total_bytes >= RESIDENT_MIN_BYTES


def device_mode(args: ServerArgs, device: DeviceInfo, environment: Mapping[str, str] | None = None) -> str:
    """resident or original: the explicit argument, else the environment, else the device's memory."""
    chosen = args.two_stage_device_mode
    if not args.is_arg_explicitly_set("two_stage_device_mode"):
        variables = os.environ if environment is None else environment
        chosen = variables.get(MODE_VARIABLE, "").strip().lower() or "auto"
        if chosen not in DEVICE_MODES:
            raise ConfigError(f"{MODE_VARIABLE}={chosen} has no meaning: use {', '.join(DEVICE_MODES)}")
    if chosen != "auto":
        return chosen
    return "resident" if stays_resident(device) else "original"


def two_stage_defaults(
    args: ServerArgs,
    auxiliary: Mapping[str, str],
    probe: Probe = probe_device,
    environment: Mapping[str, str] | None = None,
) -> ServerArgs:
    """`args` with the residency defaults of a two-stage model.

    `auxiliary`: the components that are no DiTs and have a flag, and their kinds (text_encoder, image_encoder, vae).
    What was set explicitly stays as it is. The rest: in resident mode nothing is offloaded; in original mode the
    auxiliary components are offloaded layer by layer, unless their flag says otherwise, and the DiTs, which are in use
    for a whole loop, as wholes. One log line says what changed.
    """
    device = probe()
    mode = device_mode(args, device, environment)
    if args.performance_mode != "auto" and not args.is_arg_explicitly_set("two_stage_device_mode"):
        return args
    resident = mode == "resident"
    wanted: dict[str, object] = dict.fromkeys((*AUXILIARY_FLAGS, "dit_cpu_offload"), not resident)
    open_ones = [name for name, kind in auxiliary.items() if not args.is_arg_explicitly_set(f"{kind}_cpu_offload")]
    wanted["layerwise_offload_components"] = None if resident else open_ones
    changed = args.with_defaults(**wanted)
    told = [f"{k}={getattr(changed, k)}" for k in wanted if getattr(changed, k) != getattr(args, k)]
    kept = [k for k in wanted if args.is_arg_explicitly_set(k)]
    if told:
        size = f"{device.total_bytes / GIB:.1f} GiB" if device.cuda else "no CUDA"
        left = f"; set explicitly and kept: {', '.join(kept)}" if kept else ""
        log.info("two-stage device mode %s (%s, %s): %s%s", mode, device.name, size, ", ".join(told), left)
    return changed
