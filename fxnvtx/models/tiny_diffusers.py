"""Diffusers pipelines with tiny random weights: whole, real and offline, milliseconds a step on a CPU.

`TINY[class name](prompt, seed)` gives the pipeline and the keyword arguments of a call. Text encoders are left out
(embeddings are passed in) except in LTXPipeline, which encodes its prompt with a small T5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["TINY", "Built"]


Built = tuple[Any, dict[str, Any]]
TEXT_WIDTH = 16
TEXT_LENGTH = 32


def _noise(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _image_vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4, **options
    )


def _flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def _dit(prompt: str, seed: int) -> Built:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = DiTPipeline(transformer=transformer, vae=_image_vae(), scheduler=DDIMScheduler())
    return pipe, {"class_labels": [1]}


def _flux(prompt: str, seed: int) -> Built:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = _image_vae(
        latent_channels=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5
    )
    pipe = FluxPipeline(
        scheduler=_flow(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    embedding, pooled = _noise(seed, (1, 8, 32), (1, 32))
    return pipe, {"prompt_embeds": embedding, "pooled_prompt_embeds": pooled, "height": 16, "width": 16}


def _sd3(prompt: str, seed: int) -> Built:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_flow(),
        vae=_image_vae(latent_channels=4, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    text, blank, pooled, blank_pooled = _noise(seed, (1, 8, 32), (1, 8, 32), (1, 64), (1, 64))
    return pipe, {
        "prompt_embeds": text,
        "negative_prompt_embeds": blank,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": blank_pooled,
        "height": 16,
        "width": 16,
    }


def _tokenizer() -> Any:
    """One token a character; made in memory, so that there is nothing to download."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(32, 127))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


def _text_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=98, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def _ltx(prompt: str, seed: int) -> Built:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    scaling = (True, True, False, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=scaling,
        decoder_spatio_temporal_scaling=scaling,
        patch_size=1,
        patch_size_t=1,
    )
    pipe = LTXPipeline(
        scheduler=_flow(), vae=vae, text_encoder=_text_encoder(), tokenizer=_tokenizer(), transformer=transformer
    )
    return pipe, {
        "prompt": prompt,
        "negative_prompt": "low quality",
        "max_sequence_length": TEXT_LENGTH,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 3.0,
    }


def _wan(prompt: str, seed: int) -> Built:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    def expert() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=expert(),
        transformer_2=expert(),
        boundary_ratio=0.875,
    )
    text, blank = _noise(seed, (1, 8, TEXT_WIDTH), (1, 8, TEXT_WIDTH))
    return pipe, {
        "prompt_embeds": text,
        "negative_prompt_embeds": blank,
        "height": 16,
        "width": 16,
        "num_frames": 9,
    }


def _ltx2(prompt: str, seed: int) -> Built:
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    layers_of_text = 3
    transformer = LTX2VideoTransformer3DModel(
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
        caption_channels=TEXT_WIDTH,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=layers_of_text,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
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
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * 8,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    pipe = LTX2Pipeline(
        scheduler=_flow(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=None,
        tokenizer=None,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )
    text, blank = _noise(seed, (1, 8, TEXT_WIDTH * layers_of_text), (1, 8, TEXT_WIDTH * layers_of_text))
    return pipe, {
        "prompt_embeds": text,
        "prompt_attention_mask": torch.ones(1, 8),
        "negative_prompt_embeds": blank,
        "negative_prompt_attention_mask": torch.ones(1, 8),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "frame_rate": 25.0,
        "guidance_scale": 2.0,
    }


def _seeded(build: Callable[[str, int], Built]) -> Callable[[str, int], Built]:
    def built(prompt: str = "a red fox on the moon", seed: int = 0) -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the weights; `seed` is that of the noise
            pipe, arguments = build(prompt, seed)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        pipe.set_progress_bar_config(disable=True)
        return pipe, arguments

    return built


TINY: dict[str, Callable[..., Built]] = {
    "DiTPipeline": _seeded(_dit),
    "FluxPipeline": _seeded(_flux),
    "StableDiffusion3Pipeline": _seeded(_sd3),
    "LTXPipeline": _seeded(_ltx),
    "WanPipeline": _seeded(_wan),
    "LTX2Pipeline": _seeded(_ltx2),
}
