"""ServerArgs on a command line: one flag per argument, and only what was written counts as given."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ..errors import ConfigError
from .args import DEVICE_MODES, PERFORMANCE_MODES, RESIDENCY_MODES, read_config

__all__ = ["add_arguments", "parse", "parse_residency"]

_SWITCHES = {
    "enable_layerwise_nvtx_marker": "ranges for requests, stages, steps and every layer",
    "enable_stage_nvtx_marker": "ranges for requests, stages and steps, none for layers",
    "nvtx_shapes": "a marker with the input shapes at every layer's call",
    "cuda_profiler_range": "cudaProfilerStart/Stop around every request",
    "text_encoder_cpu_offload": "bring text encoders in only while they work",
    "image_encoder_cpu_offload": "bring image encoders in only while they work",
    "vae_cpu_offload": "bring VAEs in only while they work",
    "dit_cpu_offload": "bring DiTs in only while they work",
    "sync_steps": "wait for the device at the end of each step",
    "memory_snapshots": "write memory figures into the metrics",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` every argument of ServerArgs. What is not written stays out of the namespace."""
    absent: Any = argparse.SUPPRESS
    for name, text in _SWITCHES.items():
        parser.add_argument(
            _flag(name),
            dest=name,
            nargs="?",
            const=True,
            type=_boolean,
            default=absent,
            metavar="true|false",
            help=text,
        )
    parser.add_argument("--nvtx-depth", type=int, default=absent, help="levels of modules below a component")
    parser.add_argument("--nvtx-steps", default=absent, metavar="4-8,20", help="steps that get layer ranges")
    parser.add_argument("--performance-mode", choices=PERFORMANCE_MODES, default=absent)
    parser.add_argument("--two-stage-device-mode", choices=DEVICE_MODES, default=absent)
    parser.add_argument(
        "--residency",
        action="append",
        default=absent,
        metavar="COMPONENT=MODE",
        help=f"where a component's weights are kept: {', '.join(RESIDENCY_MODES)}",
    )
    parser.add_argument("--layerwise-offload-components", type=_names, default=absent, metavar="A,B|none")
    parser.add_argument("--residency-dir", default=absent, metavar="DIR")
    parser.add_argument("--guidance-interval", type=_two_steps, default=absent, metavar="FIRST-LAST")


def parse(argv: list[str] | None) -> dict[str, Any]:
    """The arguments that were written, in `--config FILE` or spelled out (these win), by name."""
    parser = _Parser(prog="fxnvtx", allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--config", default=None, metavar="FILE.json")
    given = vars(parser.parse_args(argv))
    config = given.pop("config")
    if "residency" in given:
        given["residency"] = parse_residency(given["residency"])
    return {**(read_config(config) if config else {}), **given}


def parse_residency(pairs: list[str]) -> dict[str, str]:
    """["dit=layerwise-offload", "vae=resident"] -> a mapping. Raises ConfigError for anything else."""
    found = {}
    for pair in pairs:
        component, equals, mode = pair.partition("=")
        if not equals or not component.strip():
            raise ConfigError(f"--residency {pair}: write COMPONENT=MODE, for example dit=layerwise-offload")
        found[component.strip()] = mode.strip()
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _boolean(text: str) -> bool:
    value = text.strip().lower()
    if value in {"true", "1", "yes", "on"}:
        return True
    if value in {"false", "0", "no", "off"}:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _names(text: str) -> list[str] | None:
    if text.strip().lower() in {"none", "null", ""}:
        return None
    return [part.strip() for part in text.split(",") if part.strip()]


def _two_steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no interval of steps: write it like 2-10") from None
