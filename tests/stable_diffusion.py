"""A pipeline in the shape of Stable Diffusion, small, of random weights, with every part in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer over single letters, from vocabulary files written to `folder`."""
    from transformers import CLIPTokenizer

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = [*letters, *[f"{letter}</w>" for letter in letters]]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


def pipeline(folder: Path) -> Any:
    """StableDiffusionPipeline with the scheduler that it ships with, images of 64 x 64."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tokenizer(folder)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=16,
                num_attention_heads=2,
                num_hidden_layers=1,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
            )
        )
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
        )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
