"""Models of full size with random weights, their inputs, and their quantized forms: for benches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tfmq_fx
from tests import zoo
from tfmq_fx.capture.diffusers_inputs import example_inputs

STEPS = 20  # of a request
CALIBRATED = 4  # of them, that calibration visits
MODEL_DTYPE = torch.bfloat16

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model at one batch size.

    entry: of `tests.zoo`.  scale: multiplies height and width of its example.  tokens: of the text.
    changed: configuration set otherwise, to reduce depth.  flow: its time runs from 1 to 0.
    bound: whether a prologue frees enough of it to be measured.
    """

    entry: str
    batch: int
    scale: int = 1
    tokens: int = 77
    changed: dict[str, Any] = field(default_factory=dict)
    flow: bool = False
    bound: bool = False


CASES = {
    "sdxl-b2": Case(entry="sdxl", batch=2),
    "sd15-b8": Case(entry="sd15", batch=8),
    "dit-b16": Case(entry="dit-xl-2", batch=16, bound=True),
    "dit-b2": Case(entry="dit-xl-2", batch=2, bound=True),
    "sd15-b2": Case(entry="sd15", batch=2),
    "sd15-b1": Case(entry="sd15", batch=1),
    "flux-b1": Case(
        entry="flux-dev",
        batch=1,
        scale=4,
        tokens=512,
        changed={"num_layers": 3, "num_single_layers": 6},
        flow=True,
        bound=True,
    ),
    "pixart-b2": Case(entry="pixart-sigma", batch=2, tokens=300, changed={"num_layers": 8}),
}
"""The most telling first: what a call has no time for is left out from the end.

SDXL at 1024 pixels, SD 1.5 at 512, DiT-XL/2 at 256; FLUX and PixArt at 1024, of reduced depth.
"""


def tiny(case: Case) -> Case:
    """The case at the small widths of `tests.zoo`, to try the bench."""
    return dataclasses.replace(case, batch=2, scale=1, tokens=5, changed={})


def build(
    case: Case, device: str, *, full: bool = True, dtype: torch.dtype = MODEL_DTYPE
) -> nn.Module:
    """The model, channels last, with random weights, none of them all zero."""
    import diffusers

    values = zoo.config(case.entry, full) | case.changed
    kind = getattr(diffusers, values.pop("_class_name"))
    torch.manual_seed(0)
    with torch.no_grad(), torch.device(device):
        made: nn.Module = kind.from_config(values)
        for parameter in made.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.02)
    made = made.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    return made.eval().requires_grad_(False)


def timesteps(case: Case, steps: int = STEPS) -> Tensor:
    """The timesteps of a request as the model receives them, falling: (steps,) on the CPU."""
    if case.flow:
        return torch.linspace(1, 1 / steps, steps)
    return torch.linspace(999, 0, steps).long()


class Request:
    """Inputs of one case: conditions drawn once, the sample and the timestep anew for each call."""

    def __init__(self, case: Case, model: nn.Module, seed: int = 0, steps: int = STEPS) -> None:
        self.case = case
        self._given = example_inputs(model, case.batch, scale=case.scale)
        self._first = next(iter(self._given))  # the sample
        self.device = self._given[self._first].device
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._classes = getattr(model.config, "num_embeds_ada_norm", 1000)
        self._steps = timesteps(case, steps).to(self.device)
        self._calls = 0
        self.new_conditions()

    def new_conditions(self) -> None:
        """Begin another request."""
        for name, value in self._given.items():
            if name not in (self._first, "timestep"):
                self._given[name] = self._drawn(name, value)

    def inputs(self, step: int | None = None) -> Inputs:
        """Arguments of forward, by name: at the given step, or at each in turn."""
        if step is None:
            step, self._calls = self._calls, self._calls + 1
        sample = self._normal(self._given[self._first])
        if sample.dim() == 4:
            sample = sample.contiguous(memory_format=torch.channels_last)
        t = self._steps[step % len(self._steps)].expand(self.case.batch).contiguous()
        return {**self._given, self._first: sample, "timestep": t}

    def _drawn(self, name: str, value: Any) -> Any:
        batch, tokens = self.case.batch, self.case.tokens
        if isinstance(value, dict):
            return {key: self._drawn(key, inner) for key, inner in value.items()}
        if name == "encoder_hidden_states":
            return self._normal(value.new_empty(batch, tokens, value.shape[2]))
        if name == "encoder_attention_mask":  # the last quarter is padding
            row = torch.arange(tokens, device=value.device) < tokens - tokens // 4
            return row.to(value.dtype).expand(batch, tokens).clone()
        if name == "txt_ids":
            return value.new_zeros(tokens, value.shape[1])
        if name in ("pooled_projections", "text_embeds"):
            return self._normal(value)
        if name == "class_labels":
            settings = {"device": value.device, "generator": self._generator}
            return torch.randint(self._classes, value.shape, **settings)
        return value  # sizes, positions, guidance

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(
            like.shape, dtype=like.dtype, device=like.device, generator=self._generator
        )


def recipe(name: str, *, tables: bool) -> tfmq_fx.Config:
    """The preset made quick: weights rounded to nearest over their whole range.

    tables: exact rows for what depends on the timestep alone, and a range for each timestep;
    without, that part as quantized layers, and one range for all.
    """
    config = tfmq_fx.PRESETS[name]

    def quick(layer: tfmq_fx.LayerConfig | None) -> tfmq_fx.LayerConfig | None:
        if layer is None or layer.weights is None:
            return layer
        acts = layer.activations
        if acts is not None and not tables:
            acts = dataclasses.replace(acts, per_timestep=False)
        weights = dataclasses.replace(layer.weights, search=1)
        return tfmq_fx.LayerConfig(weights=weights, activations=acts)

    layers = quick(config.layers)
    assert layers is not None
    mode: Any = "table" if tables else "tib"
    return dataclasses.replace(
        config,
        layers=layers,
        first=quick(config.first),
        last=quick(config.last),
        temporal=tfmq_fx.TemporalSpec(mode=mode, tiar_iters=0),
        reconstruction=tfmq_fx.ReconstructionSpec(rounding="nearest", cache=1),
    )


def calibrated(case: Case, model: nn.Module, request: Request) -> tfmq_fx.Prepared:
    """`model` prepared, after a few steps of calibration on random samples; for every recipe, whose
    observers are the same."""
    prepared = tfmq_fx.prepare(
        model,
        request.inputs(0),
        timesteps=timesteps(case),
        config=recipe("w8a8", tables=True),
    )
    for i in range(CALIBRATED):
        prepared(**request.inputs(i * (STEPS - 1) // (CALIBRATED - 1)))
    return prepared


def torchao_quantized(model: nn.Module, kind: str, request: Request) -> tuple[nn.Module, int]:
    """A copy of `model` with its linear layers on torchao's dynamic "fp8" or "int8", and how many.

    Layers whose sizes are no multiples of 16, or that see 16 rows or fewer, stay: torch's integer
    product takes none of them.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    rows: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows[name] = args[0].numel() // args[0].shape[-1]

        return hook

    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in linear.items()]
    try:
        model(**request.inputs(0))
    finally:
        for hook in hooks:
            hook.remove()
    chosen = {
        name
        for name, module in linear.items()
        if rows.get(name, 0) > 16 and module.in_features % 16 == module.out_features % 16 == 0
    }
    config = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        if kind == "fp8"
        else Int8DynamicActivationInt8WeightConfig()
    )
    copied = copy.deepcopy(model)
    quantize_(copied, config, filter_fn=lambda module, name: name in chosen)
    return copied, len(chosen)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones counted once."""
    every = [*model.parameters(), *model.buffers()]
    return sum({id(tensor): tensor.nbytes for tensor in every}.values())
