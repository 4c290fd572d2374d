"""How `tests/assets/saved-format-4` was made, by the version that wrote format 4.

A small denoiser that makes a converted graph name everything of this library that a saved graph can
name. All numbers of the saved models are small powers of two and integers, so that what they answer
is exact: every processor gives the same bits, in whatever order it adds.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx import (
    ActivationSpec,
    AttentionSpec,
    Config,
    LayerConfig,
    RewriteSpec,
    TemporalSpec,
    WeightSpec,
)
from tfmq_fx.serialization.module_json import tensors_of

TIMESTEPS = [0, 256, 512, 768]
CHANNELS, SIZE = 8, 4
CONFIG = Config(
    name="asset",
    layers=LayerConfig(weights=WeightSpec(bits=4, search=4), activations=ActivationSpec()),
    first=LayerConfig(weights=WeightSpec(bits=8), activations=ActivationSpec(bits=8)),
    rewrites=RewriteSpec(low_rank=2, split_concat=True),
    attention=AttentionSpec(probabilities_bits=8, probabilities="log2"),
    temporal=TemporalSpec(mode="cache", cache_bits=(8,), tiar_iters=0),
    correction="bias",
)

_NAME = "saved_models"  # of the classes in what was saved, wherever this file lies


class Net(nn.Module):
    """A denoiser whose results are exact: no root, no exponential but that of 0."""

    __module__ = _NAME

    def __init__(self) -> None:
        super().__init__()
        c = CHANNELS
        self.time1, self.time2 = nn.Linear(4, c), nn.Linear(c, c)
        self.label = nn.Linear(c, c)
        self.conv_in, self.conv_out = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(2 * c, 3, 1)
        self.line, self.volume = nn.Conv1d(c, c, 1), nn.Conv3d(c, c, 1)
        self.query, self.key, self.value = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = integers(i, *parameter.shape) / 8
        self.query.weight.data.zero_()  # all scores are 0: their softmax is a power of two
        self.query.bias.data.zero_()

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> dict[str, Tensor]:
        steps = timestep[:, None].float() / 256 * torch.arange(1, 5, device=x.device)
        e = self.time2(F.relu(self.time1(steps)))
        h = F.relu(self.conv_in(x) + (e + self.label(y))[:, :, None, None])
        doubled = h[:, :1]
        doubled *= 2
        h[:, 1:2] = x[:, :1]
        s = h.flatten(2)
        s = (s + self.line(s)).transpose(1, 2)
        a = F.scaled_dot_product_attention(self.query(s), self.key(s), self.value(s))
        s = (s + a).transpose(1, 2).unflatten(2, h.shape[2:])
        v = self.volume(h[:, :, None])[:, :, 0]
        return {"sample": self.conv_out(torch.cat([s, v], 1))}

    forward.__module__ = _NAME


class Labelled(nn.Module):
    """A smaller one, part of which a request's label fixes."""

    __module__ = _NAME

    def __init__(self) -> None:
        super().__init__()
        self.time, self.label = nn.Linear(1, 3), nn.Linear(CHANNELS, 3)
        self.conv = nn.Conv2d(3, 3, 1)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = powers_of_two(integers(i, *parameter.shape))

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        e = self.time(timestep[:, None].float() / 256) + F.relu(self.label(y))
        return self.conv(x + e[:, :, None, None])

    forward.__module__ = _NAME


def integers(start: int, *shape: int) -> Tensor:
    """Integers from -4 to 4 in a row that does not repeat soon."""
    count = torch.arange(start, start + math.prod(shape))
    return (count * 7919 % 101 % 9 - 4).reshape(shape).float()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, and timesteps that the models know."""
    t = torch.tensor(TIMESTEPS * batch)[:batch]
    return integers(0, batch, 3, SIZE, SIZE), t, integers(5, batch, CHANNELS)


def save_all(folder: Path) -> None:
    """Save a quantized model with its calibration, one bound to a request's label, and what the
    digests of their tensors and their answers are."""
    prepared = tfmq_fx.prepare(Net().eval(), inputs(), timesteps=TIMESTEPS, config=CONFIG)
    with torch.no_grad():
        for step in TIMESTEPS:
            x, _, y = inputs()
            prepared(x, torch.tensor(step), y)
    quantized = tfmq_fx.convert(prepared, progress=False)
    for tensor in (*quantized.gm.parameters(), *quantized.gm.buffers()):
        if tensor.dtype.is_floating_point:
            tensor.data.copy_(powers_of_two(tensor))
    folded = tfmq_fx.fold_timesteps(Labelled().eval(), TIMESTEPS, inputs())
    bound = tfmq_fx.bind_request(folded, conditions=["y"])
    expected, answers = {}, {}
    for name, model in (("quantized", quantized), ("bound", bound)):
        tfmq_fx.save(model, folder / name, calibration=name == "quantized")
        expected[name] = digests(model)
        answers[name] = answer(model)
    (folder / "digests.json").write_text(json.dumps(expected, indent=1) + "\n")
    safetensors.torch.save_file(answers, folder / "answers.safetensors")


def digests(model: nn.Module) -> dict[str, str]:
    """The start of the SHA-256 of each tensor of a model's graph: dtype, shape and bytes."""
    found = {}
    for name, value in sorted(tensors_of(model.gm).items()):
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        text = f"{value.dtype} {tuple(value.shape)} ".encode()
        found[name] = hashlib.sha256(text + content).hexdigest()[:20]
    return found


def answer(model: nn.Module) -> Tensor:
    """What a model answers to `inputs`."""
    with torch.no_grad():
        found = model(*inputs(4))
    return found["sample"] if isinstance(found, dict) else found


def powers_of_two(values: Tensor) -> Tensor:
    """The values, each the power of two that is next in size, from 1/16 to 4, or 0."""
    size = torch.exp2(values.double().abs().clamp(1 / 16, 4).log2().round())
    return (size * values.sign()).to(values.dtype)
