"""Arguments: where they come from, which of them were chosen, and what has no meaning."""

import copy
import json
import pickle
import shlex

import pytest

from fxnvtx.errors import ConfigError
from fxnvtx.pipeline.args import ServerArgs

FLAG = "enable_layerwise_nvtx_marker"


def test_nothing_is_explicit_by_default():
    args = ServerArgs()
    assert args.enable_layerwise_nvtx_marker is False
    assert not args.stage_ranges
    assert not any(args.is_arg_explicitly_set(name) for name in (FLAG, "vae_cpu_offload", "residency"))


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--enable-layerwise-nvtx-marker"], True),
        (["--enable-layerwise-nvtx-marker", "true"], True),
        (["--enable-layerwise-nvtx-marker=True"], True),
        (["--enable-layerwise-nvtx-marker", "false"], False),
        (["--enable-layerwise-nvtx-marker", "--nvtx-depth", "2"], True),
    ],
)
def test_the_marker_flag_is_bare_or_true_or_false(argv, value):
    args = ServerArgs.from_cli(argv)
    assert args.enable_layerwise_nvtx_marker is value
    assert args.is_arg_explicitly_set(FLAG)
    assert not args.is_arg_explicitly_set("enable_stage_nvtx_marker")


def test_a_value_equal_to_the_default_counts_where_it_was_written():
    for args in (
        ServerArgs.from_cli(["--enable-layerwise-nvtx-marker", "false"]),
        ServerArgs.from_dict({FLAG: False}),
        ServerArgs.from_kwargs(**{FLAG: False}),
        ServerArgs(enable_layerwise_nvtx_marker=False),
        ServerArgs(False),
    ):
        assert args == ServerArgs()
        assert args.is_arg_explicitly_set(FLAG)


def test_a_config_file_counts_and_the_command_line_wins_over_it(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"vae_cpu_offload": True, "nvtx_depth": 3, "residency": {"dit": "snapshot-offload"}}))
    args = ServerArgs.from_cli(["--config", str(file), "--nvtx-depth", "1"])
    assert (args.vae_cpu_offload, args.nvtx_depth, args.residency) == (True, 1, {"dit": "snapshot-offload"})
    assert args.is_arg_explicitly_set("vae_cpu_offload")
    assert args.is_arg_explicitly_set("residency")
    assert not args.is_arg_explicitly_set("dit_cpu_offload")
    assert ServerArgs.from_file(file).nvtx_depth == 3


def test_defaults_put_in_later_do_not_count_and_do_not_win():
    args = ServerArgs(vae_cpu_offload=False).with_defaults(vae_cpu_offload=True, text_encoder_cpu_offload=True)
    assert (args.vae_cpu_offload, args.text_encoder_cpu_offload) == (False, True)
    assert args.is_arg_explicitly_set("vae_cpu_offload")
    assert not args.is_arg_explicitly_set("text_encoder_cpu_offload")
    assert args.with_values(text_encoder_cpu_offload=False).is_arg_explicitly_set("text_encoder_cpu_offload")


def test_copies_remember_what_was_chosen():
    args = ServerArgs.from_dict({"vae_cpu_offload": True})
    for other in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert other == args
        assert other.is_arg_explicitly_set("vae_cpu_offload")
        assert not other.is_arg_explicitly_set("dit_cpu_offload")


def test_the_whole_command_line():
    args = ServerArgs.from_cli(
        shlex.split(
            "--residency dit=layerwise-offload --residency vae=resident --layerwise-offload-components a,b "
            "--guidance-interval 2-5 --nvtx-steps 4-8,20 --performance-mode memory --cuda-profiler-range"
        )
    )
    assert args.residency == {"dit": "layerwise-offload", "vae": "resident"}
    assert args.layerwise_offload_components == ["a", "b"]
    assert args.guidance_interval == (2, 5)
    assert args.cuda_profiler_range
    assert [s for s in range(30) if s in args.step_windows()] == [4, 5, 6, 7, 8, 20]


def test_no_layerwise_components_can_be_asked_for():
    args = ServerArgs.from_cli(["--layerwise-offload-components", "none"])
    assert args.layerwise_offload_components is None
    assert args.is_arg_explicitly_set("layerwise_offload_components")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ServerArgs(nvtx_steps="8-4"),
        lambda: ServerArgs(nvtx_steps="4,x"),
        lambda: ServerArgs(nvtx_depth=-1),
        lambda: ServerArgs(performance_mode="fast"),
        lambda: ServerArgs(residency={"dit": "gone"}),
        lambda: ServerArgs(residency=["dit"]),  # type: ignore[arg-type]
        lambda: ServerArgs(enable_layerwise_nvtx_marker="yes"),  # type: ignore[arg-type]
        lambda: ServerArgs(vae_cpu_offload=1),  # type: ignore[arg-type]
        lambda: ServerArgs(layerwise_offload_components="dit"),  # type: ignore[arg-type]
        lambda: ServerArgs(guidance_interval=(5, 2)),
        lambda: ServerArgs(two_stage_device_mode="h200"),
        lambda: ServerArgs.from_kwargs(enable_nvtx=True),
        lambda: ServerArgs.from_dict([1]),  # type: ignore[arg-type]
        lambda: ServerArgs.from_file("/nowhere/run.json"),
        lambda: ServerArgs.from_cli(["--unknown"]),
        lambda: ServerArgs.from_cli(["--vae-cpu-offload", "maybe"]),
        lambda: ServerArgs.from_cli(["--residency", "dit"]),
        lambda: ServerArgs.from_cli(["--residency", "dit=gone"]),
        lambda: ServerArgs.from_cli(["--guidance-interval", "a-b"]),
        lambda: ServerArgs().is_arg_explicitly_set("enable_nvtx"),
    ],
)
def test_what_has_no_meaning_is_said_in_one_line(make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_damaged_config_file(tmp_path):
    for text in ("{", "[1]"):
        file = tmp_path / "bad.json"
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.json"):
            ServerArgs.from_file(file)


def test_residency_by_component_then_list_then_flag_then_performance_mode():
    assert ServerArgs().residency_mode("dit", "dit") == "resident"
    assert ServerArgs(dit_cpu_offload=True).residency_mode("dit", "dit") == "component-offload"
    both = ServerArgs(dit_cpu_offload=True, layerwise_offload_components=["dit"])
    assert both.residency_mode("dit", "dit") == "layerwise-offload"
    named = ServerArgs(residency={"dit": "snapshot-offload"}, layerwise_offload_components=["dit"])
    assert named.residency_mode("dit", "dit") == "snapshot-offload"
    memory = ServerArgs(performance_mode="memory", vae_cpu_offload=False)
    assert memory.residency_mode("dit", "dit") == "layerwise-offload"
    assert memory.residency_mode("upsampler", "other") == "component-offload"
    assert memory.residency_mode("vae", "vae") == "resident"
    defaulted = ServerArgs(dit_cpu_offload=False).with_defaults(layerwise_offload_components=["dit"])
    assert defaulted.residency_mode("dit", "dit") == "resident"
