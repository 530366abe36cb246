"""Tiny diffusers models with random weights, offline: a forward of each takes under two seconds on a CPU.

`build(name)` -> (model in eval mode, keyword arguments for one call). Seeded: two builds are equal.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

r = torch.randn
Built = tuple[torch.nn.Module, dict[str, Any]]
MODELS: dict[str, Callable[[Any], Built]] = {}


def model(function: Callable[[Any], Built]) -> Callable[[Any], Built]:
    MODELS[function.__name__] = function
    return function


def build(name: str) -> Built:
    import diffusers

    torch.manual_seed(0)
    made, arguments = MODELS[name](diffusers)
    return made.eval(), arguments


def tensors_of(result: Any) -> list[torch.Tensor]:
    """All tensors of a model's output."""
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    if isinstance(result, (tuple, list)):
        return [t for item in result for t in tensors_of(item)]
    return []


@model
def dit(kinds: Any) -> Built:
    m = kinds.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    return m, {"hidden_states": r(2, 4, 8, 8), "timestep": torch.tensor([1, 1]), "class_labels": torch.tensor([0, 1])}


@model
def sd3(kinds: Any) -> Built:
    m = kinds.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return m, {
        "hidden_states": r(2, 4, 16, 16),
        "encoder_hidden_states": r(2, 8, 32),
        "pooled_projections": r(2, 64),
        "timestep": torch.tensor([1, 1]),
    }


@model
def flux(kinds: Any) -> Built:
    m = kinds.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return m, {
        "hidden_states": r(1, 16, 4),
        "encoder_hidden_states": r(1, 8, 32),
        "pooled_projections": r(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": torch.tensor([3.5]),
    }


@model
def ltx_video(kinds: Any) -> Built:
    m = kinds.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=16,
    )
    f, h, w = 2, 4, 4
    return m, {
        "hidden_states": r(1, f * h * w, 8),
        "encoder_hidden_states": r(1, 8, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, 8),
        "num_frames": f,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (1 / 25, 32, 32),
    }


@model
def ltx2_video(kinds: Any) -> Built:
    m = kinds.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
    )
    f, h, w, af = 2, 4, 4, 9
    return m, {
        "hidden_states": r(1, f * h * w, 4),
        "audio_hidden_states": r(1, af, 4),
        "encoder_hidden_states": r(1, 8, 16),
        "audio_encoder_hidden_states": r(1, 8, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, 8),
        "audio_encoder_attention_mask": torch.ones(1, 8),
        "num_frames": f,
        "height": h,
        "width": w,
        "audio_num_frames": af,
        "fps": 25.0,
    }


@model
def vae_kl(kinds: Any) -> Built:
    m = kinds.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return m, {"sample": r(1, 3, 32, 32)}


@model
def vae_ltx(kinds: Any) -> Built:
    m = kinds.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return m, {"sample": r(1, 3, 9, 16, 16)}


@model
def vae_ltx2(kinds: Any) -> Built:
    m = kinds.AutoencoderKLLTX2Video(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        down_block_types=("LTX2VideoDownBlock3D",),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
        decoder_causal=False,
    )
    return m, {"sample": r(1, 3, 9, 16, 16)}


@model
def pixart(kinds: Any) -> Built:
    m = kinds.PixArtTransformer2DModel(
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
    return m, {
        "hidden_states": r(1, 4, 8, 8),
        "encoder_hidden_states": r(1, 6, 16),
        "timestep": torch.tensor([3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@model
def sana(kinds: Any) -> Built:
    m = kinds.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        mlp_ratio=2.5,
        sample_size=8,
        patch_size=1,
    )
    return m, {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, 6, 16), "timestep": torch.tensor([3])}


@model
def cogvideox(kinds: Any) -> Built:
    m = kinds.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    )
    return m, {"hidden_states": r(1, 2, 4, 8, 8), "encoder_hidden_states": r(1, 6, 16), "timestep": torch.tensor([3])}


@model
def auraflow(kinds: Any) -> Built:
    m = kinds.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return m, {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, 6, 16), "timestep": torch.tensor([0.5])}


@model
def wan(kinds: Any) -> Built:
    m = kinds.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return m, {"hidden_states": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(1, 6, 16), "timestep": torch.tensor([3])}


@model
def vae_tiny(kinds: Any) -> Built:
    m = kinds.AutoencoderTiny(
        in_channels=3,
        out_channels=3,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    return m, {"sample": r(1, 3, 16, 16)}


@model
def vae_dc(kinds: Any) -> Built:
    m = kinds.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return m, {"sample": r(1, 3, 16, 16)}


@model
def vq(kinds: Any) -> Built:
    m = kinds.VQModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
    )
    return m, {"sample": r(1, 3, 16, 16)}


@model
def cogview4(kinds: Any) -> Built:
    m = kinds.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(4, 4),
    )
    return m, {
        "hidden_states": r(1, 4, 8, 8),
        "encoder_hidden_states": r(1, 6, 16),
        "timestep": torch.tensor([3]),
        "original_size": torch.tensor([[8, 8]]),
        "target_size": torch.tensor([[8, 8]]),
        "crop_coords": torch.tensor([[0, 0]]),
    }


@model
def unet(kinds: Any) -> Built:
    m = kinds.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return m, {"sample": r(1, 3, 8, 8), "timestep": torch.tensor([3])}
