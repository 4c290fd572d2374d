"""What tiny pipelines are made of: encoders, decoders, denoisers, schedulers, and the table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import zoo
from tests.stable_diffusion import tokenizer

Built = tuple[Any, dict[str, Any]]

PIPELINES: dict[str, Callable[[], Built]] = {}
"""The builders by the name of the family."""

WIDTH = 16  # of text embeddings
STEPS: dict[str, Any] = {"num_inference_steps": 2}


def family(build: Callable[[], Built]) -> Callable[[], Built]:
    """Enter a builder in the table; its weights are always the same."""

    def built() -> Built:
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            pipe, options = build()
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()
                    for parameter in part.parameters():
                        if not parameter.any():  # diffusers sets to zero what ends a block
                            parameter.normal_(std=0.02)
        pipe.set_progress_bar_config(disable=True)
        return pipe, STEPS | options

    PIPELINES[build.__name__] = built
    return built


def written(pipe: Any, folder: Path) -> Any:
    """`pipe` written to `folder` by save_pretrained and read again."""
    import diffusers

    pipe.save_pretrained(folder)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    read = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
    read.set_progress_bar_config(disable=True)
    return read


def with_text(pipe: Any) -> Any:
    """`pipe`, of the Stable Diffusion family, with a tiny CLIP text encoder and its tokenizer."""
    pipe.register_modules(text_encoder=clip_text().eval(), tokenizer=clip_tokenizer())
    return pipe


def text(tokens: int = 77, width: int = WIDTH, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, width)


def both(tokens: int = 77, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of its negative."""
    return {"prompt_embeds": text(tokens, width), "negative_prompt_embeds": text(tokens, width)}


def masked(tokens: int = 12, width: int = 32) -> dict[str, Any]:
    """Embeddings of a prompt and its negative, some tokens of which are padding."""
    mask = torch.ones(1, tokens, dtype=torch.int64)
    mask[:, tokens // 2 :] = 0
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}
    return both(tokens, width) | masks | {"negative_prompt": None}


def image(size: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, size, size)


def clip_tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer(Path(folder))


def _clip(kind: str, **more: Any) -> Any:
    import transformers

    words = clip_tokenizer()
    config = getattr(transformers, f"CLIP{kind}Config")
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2}
    if kind == "Text":
        sizes |= {"vocab_size": len(words), "bos_token_id": words.bos_token_id}
        sizes |= {"eos_token_id": words.eos_token_id}
    return config(num_hidden_layers=2, projection_dim=WIDTH, **sizes, **more)


def clip_text(projected: bool = False) -> Any:
    import transformers

    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(transformers, kind)(_clip("Text"))


def clip_vision() -> Any:
    import transformers

    config = _clip("Vision", image_size=16, patch_size=8)
    return transformers.CLIPVisionModelWithProjection(config)


def clip_images() -> Any:
    import transformers

    return transformers.CLIPImageProcessor(crop_size=16, size=16)


def vae(channels: int = 4, **more: Any) -> Any:
    """An AutoencoderKL of factor 2."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=channels,
        shift_factor=0.1,
        **more,
    )


def unet(**more: Any) -> Any:
    import diffusers

    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**sizes | more)


def plain_unet(channels: int = 3) -> Any:
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def transformer(name: str, **more: Any) -> Any:
    """The reduced transformer of tests/zoo.py, with some settings otherwise."""
    import diffusers

    values = zoo.config(name) | more
    return getattr(diffusers, values.pop("_class_name")).from_config(values)


def sd_scheduler(kind: str = "PNDMScheduler", **more: Any) -> Any:
    import diffusers

    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    if kind == "PNDMScheduler":
        settings |= {"skip_prk_steps": True, "set_alpha_to_one": False}
    return getattr(diffusers, kind)(**settings | more)


def flow(**more: Any) -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def sd_parts(**more: Any) -> dict[str, Any]:
    """The components of Stable Diffusion, without text encoder."""
    parts = {
        "vae": vae(),
        "unet": unet(),
        "scheduler": sd_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        "text_encoder": None,
        "tokenizer": None,
    }
    return parts | more


def plain_text(kind: Any, **parts: Any) -> Any:
    """A pipeline of `kind` without text encoder and tokenizer."""
    return kind(text_encoder=None, tokenizer=None, **parts)
