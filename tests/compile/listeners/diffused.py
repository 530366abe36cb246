"""`python -m tests.compile.listeners.diffused MODE OUTPUT`: three models as people have them, compiled for a GPU.

A flux transformer with accelerate's hooks, a VAE with the old weight_norm, a transformer with a LoRA. MODE: "plain"
(nothing of ours), "silent" (also where a tool is attached) or "recorder" (on from before torch is imported). What must
not depend on the mode goes to OUTPUT as JSON, with the labels of the second call. tests/gpuless has the device.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

MODE, OUTPUT = sys.argv[1], Path(sys.argv[2])
if MODE != "plain":
    import fxnvtx

    recording = fxnvtx.record().__enter__() if MODE == "recorder" else None

import torch  # noqa: E402 - see above

from ...gpuless import device  # noqa: E402
from ...gpuless.check import stripped  # noqa: E402
from ..generated import counted, forget_generated_code, kernel_hashes, wrapper_sources  # noqa: E402

r = torch.randn


def flux() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Offloaded as a whole, its blocks with hooks that move their arguments: `forward` is replaced at both levels."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    add_hook_to_module(model.proj_out, AlignDevicesHook(execution_device="cpu"))
    model, _ = cpu_offload_with_hook(model, torch.device("cpu"))
    return model, {
        "hidden_states": r(1, 16, 4),
        "encoder_hidden_states": r(1, 8, 32),
        "pooled_projections": r(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def oobleck() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Stable Audio's: every convolution's weight is made anew by a pre-hook."""
    from diffusers import AutoencoderOobleck

    model: Any = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=1,
    )
    return model, {"sample": r(1, 1, 64)}


def lora() -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=False,
    )
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), model)
    conditions = {"resolution": None, "aspect_ratio": None}
    return model, {
        "hidden_states": r(1, 4, 8, 8),
        "encoder_hidden_states": r(1, 6, 16),
        "timestep": torch.tensor([3]),
        "added_cond_kwargs": conditions,
    }


MODELS = {"flux": flux, "oobleck": oobleck} | ({"lora": lora} if importlib.util.find_spec("peft") else {})


def compiled(name: str) -> tuple[dict[str, Any], list[str]]:
    forget_generated_code()
    torch.manual_seed(0)
    model, arguments = MODELS[name]()
    model.eval()
    if MODE != "plain":
        fxnvtx.instrument(model, name)
    labels: list[str] = []
    with counted() as counters, torch.no_grad():
        call = torch.compile(model, backend="inductor" if MODE == "plain" else "fxnvtx")
        call(**arguments)
        if MODE == "recorder":
            assert recording is not None
            labels = [made.label for made in recording.ranges if made.category == "module"]
            with fxnvtx.record() as second:
                call(**arguments)
            labels = [made.label for made in second.ranges if made.category == "module"]
        else:
            call(**arguments)
    breaks: Counter[str] = Counter()
    for reason, times in counters["breaks"].items():
        breaks[re.sub(r"0x[0-9a-f]+", "", reason)] += times  # addresses of functions
    counters["breaks"] = breaks
    code = [stripped(source) for source in wrapper_sources()]
    return {"counters": counters, "kernels": kernel_hashes(), "code": code}, labels


def main() -> None:
    device.install()
    found = {name: compiled(name) for name in MODELS}
    OUTPUT.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
