"""Two-stage residency defaults: every case of device memory and name, without a device."""

import logging

import pytest

from fxnvtx.errors import ConfigError
from fxnvtx.pipeline.args import ServerArgs
from fxnvtx.pipeline.pipelines import (
    MODE_VARIABLE,
    DeviceInfo,
    device_mode,
    probe_device,
    stays_resident,
    two_stage_defaults,
)

NAMES = ["NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H200 MIG 1g.18gb", "NVIDIA B200"]
SIZES = [18, 96, 129.9, 130, 141]
KINDS = {"text_encoder": "text_encoder", "vae": "vae"}
AUXILIARY = ("text_encoder_cpu_offload", "image_encoder_cpu_offload", "vae_cpu_offload")


def device(gib, name="NVIDIA H200", cuda=True):
    return DeviceInfo(cuda, name, int(gib * 2**30))


def defaults(args, info, environment=None):
    return two_stage_defaults(args, KINDS, probe=lambda: info, environment=environment or {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gib", SIZES)
@pytest.mark.parametrize("cuda", [True, False])
def test_memory_alone_decides(name, gib, cuda):
    resident = cuda and gib >= 130
    info = device(gib, name, cuda)
    assert stays_resident(info) is resident
    assert device_mode(ServerArgs(), info, {}) == ("resident" if resident else "original")
    args = defaults(ServerArgs(), info)
    assert [getattr(args, flag) for flag in AUXILIARY] == [not resident] * 3
    assert args.layerwise_offload_components == (None if resident else ["text_encoder", "vae"])
    assert args.residency_mode("dit", "dit") == ("resident" if resident else "component-offload")
    assert args.residency_mode("vae", "vae") == ("resident" if resident else "layerwise-offload")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gib", SIZES)
@pytest.mark.parametrize("cuda", [True, False])
def test_explicit_settings_always_win(name, gib, cuda):
    chosen = ServerArgs.from_kwargs(
        text_encoder_cpu_offload=True, vae_cpu_offload=False, layerwise_offload_components=["refiner"]
    )
    args = defaults(chosen, device(gib, name, cuda))
    assert (args.text_encoder_cpu_offload, args.vae_cpu_offload) == (True, False)
    assert args.layerwise_offload_components == ["refiner"]
    assert args.image_encoder_cpu_offload is not (cuda and gib >= 130)


def test_an_explicit_flag_keeps_its_component_out_of_the_layerwise_defaults():
    args = defaults(ServerArgs(text_encoder_cpu_offload=True, vae_cpu_offload=False), device(18))
    assert args.layerwise_offload_components == []
    assert args.residency_mode("text_encoder", "text_encoder") == "component-offload"
    assert args.residency_mode("vae", "vae") == "resident"
    args = defaults(ServerArgs(vae_cpu_offload=True), device(18))
    assert args.layerwise_offload_components == ["text_encoder"]


@pytest.mark.parametrize("gib", SIZES)
def test_argument_before_environment_before_memory(gib):
    info = device(gib)
    automatic = "resident" if gib >= 130 else "original"
    for wanted in ("resident", "original"):
        assert device_mode(ServerArgs(), info, {MODE_VARIABLE: wanted}) == wanted
        other = "original" if wanted == "resident" else "resident"
        explicit = ServerArgs(two_stage_device_mode=wanted)
        assert device_mode(explicit, info, {MODE_VARIABLE: other}) == wanted
    assert device_mode(ServerArgs(two_stage_device_mode="auto"), info, {MODE_VARIABLE: "resident"}) == automatic
    assert device_mode(ServerArgs(), info, {MODE_VARIABLE: " AUTO "}) == automatic


def test_an_unknown_mode_in_the_environment():
    with pytest.raises(ConfigError, match=MODE_VARIABLE):
        device_mode(ServerArgs(), device(141), {MODE_VARIABLE: "h200"})


def test_a_chosen_performance_mode_is_explicit_too():
    speed = defaults(ServerArgs(performance_mode="speed"), device(18))
    assert speed.residency_mode("dit", "dit") == "resident"
    memory = defaults(ServerArgs(performance_mode="memory"), device(141))
    assert memory.residency_mode("dit", "dit") == "layerwise-offload"
    both = defaults(ServerArgs(performance_mode="memory", two_stage_device_mode="resident"), device(18))
    assert both.residency_mode("vae", "vae") == "resident"


def test_one_log_line_says_what_changed_and_what_was_kept(caplog):
    with caplog.at_level(logging.INFO, "fxnvtx.pipeline"):
        defaults(ServerArgs(vae_cpu_offload=True), device(141))
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert "resident" in line
    assert "text_encoder_cpu_offload=False" in line
    assert "kept: vae_cpu_offload" in line
    assert "\n" not in line


def test_the_probe_answers_here():
    info = probe_device()
    assert info.cuda == (info.total_bytes > 0)
    assert info.name
