"""Small random models in diffusers layout, for tests: real files, real loading code, no training."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH = 16
LENGTH = 12


def make_tiny_model(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Writes a Stable Diffusion pipeline of some 100 k parameters: 16x16 images, 4x8x8 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config()),
            tokenizer=make_tokenizer(),
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=WIDTH,
                attention_head_dim=2,
                norm_num_groups=4,
            ),
            scheduler=make_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_xl_model(folder: Path) -> Path:
    """Writes a Stable Diffusion XL pipeline of that size: two text encoders, a pooled prompt and sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=CLIPTextModel(_text_config()),
            tokenizer=make_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_size=2 * WIDTH, projection_dim=WIDTH)),
            tokenizer_2=make_tokenizer(),
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=3 * WIDTH,
                attention_head_dim=2,
                norm_num_groups=4,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=WIDTH + 6 * 4,
            ),
            scheduler=make_scheduler(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_sd3_model(folder: Path, *, with_t5: bool = True) -> Path:
    """Writes a Stable Diffusion 3 pipeline of that size: a transformer on 4x8x8 latents, its schedule shifted by 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=3 * WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=2 * WIDTH,
                pos_embed_max_size=8,
                qk_norm="rms_norm",
                dual_attention_layers=(0,),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(_text_config(projection_dim=WIDTH, num_hidden_layers=2)),
            tokenizer=make_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(projection_dim=WIDTH, num_hidden_layers=2)),
            tokenizer_2=make_tokenizer(),
            text_encoder_3=_t5(3 * WIDTH) if with_t5 else None,
            tokenizer_3=_t5_tokenizer() if with_t5 else None,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_flux_model(folder: Path, *, guidance_embeds: bool = True) -> Path:
    """Writes a FLUX.1 pipeline of that size, for `model.resolution` 16: 4x8x8 latents in 16 tokens, a schedule shifted
    by their number, and a network that is told the guidance (dev) or not (schnell)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = FluxPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(2, 2, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(_text_config()),
            tokenizer=make_tokenizer(),
            text_encoder_2=_t5(WIDTH),
            tokenizer_2=_t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def _vae(**config: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=300, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5TokenizerFast:
    """A unigram vocabulary of single bytes, in T5's form."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = sorted({*bytes_to_unicode().values(), "\u2581"})
    return T5TokenizerFast(vocab=[*special, *((letter, -1.0) for letter in letters)], extra_ids=0)


def make_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Returns Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _text_config(**changes: int) -> CLIPTextConfig:
    config = {
        "vocab_size": 514,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
    }
    return CLIPTextConfig(**{**config, **changes})


def make_tokenizer(num_words: int = 514, length: int = LENGTH) -> CLIPTokenizer:
    """Returns CLIP's byte-level vocabulary without merges: every byte is a token, inside a word or at its end. Words
    beyond those stand for merges and never come up; the last two begin and end a text, as in CLIP's own."""
    letters = list(bytes_to_unicode().values())
    known = [*letters, *(letter + "</w>" for letter in letters)]
    unused = [f"<|unused{number}|>" for number in range(num_words - len(known) - 2)]
    words = [*known, *unused, "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=length)
