"""Denoisers as researchers' repositories have them: captured and folded without a changed bit."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.toys import seeded
from tfmq_fx.api import fold_timesteps, save
from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.core.errors import CaptureError, InputError
from tfmq_fx.prologue.load_model import load

pytest.importorskip("einops")
from tests import handwritten

OpenAIUNet, GuidedUNet = handwritten.OpenAIUNet, handwritten.GuidedUNet
DDIMUNet = handwritten.DDIMUNet
BOTH = ("batch", "spatial")
SMALL = {"model_channels": 16, "groups": 4}

# name -> class, options, sizes that are free
CASES: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[str, ...]]] = {
    "openai": (OpenAIUNet, {}, BOTH),
    "openai-labels": (OpenAIUNet, {**SMALL, "num_classes": 5, "use_scale_shift_norm": True}, BOTH),
    "openai-checkpoint": (OpenAIUNet, {**SMALL, "use_checkpoint": True}, BOTH),
    "openai-self-attention": (OpenAIUNet, {**SMALL, "context_dim": None}, BOTH),
    "openai-pooling": (OpenAIUNet, {**SMALL, "conv_resample": False}, BOTH),
    "openai-odd-width": (OpenAIUNet, {"model_channels": 15, "groups": 5, "num_heads": 5}, BOTH),
    "openai-half": (
        OpenAIUNet,
        {**SMALL, "use_fp16": True, "use_spatial_transformer": False},
        BOTH,
    ),
    "guided": (GuidedUNet, {}, BOTH),
    "guided-new-order": (GuidedUNet, {"use_new_attention_order": True}, BOTH),
    "guided-no-labels": (GuidedUNet, {"num_classes": None, "use_checkpoint": True}, BOTH),
    "guided-half": (GuidedUNet, {"use_fp16": True}, BOTH),
    "ddim": (DDIMUNet, {}, ("batch",)),
    "ddim-odd-width": (DDIMUNet, {"ch": 9, "groups": 3}, ("batch",)),
    "ddim-pooling": (DDIMUNet, {"resamp_with_conv": False, "ch_mult": (1, 1, 2)}, ("batch",)),
}


def build(kind: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    model = handwritten.awake(seeded(kind, **options))
    if options.get("use_fp16"):
        model.convert_to_fp16()
    return model


def inputs(
    model: nn.Module, batch: int, side: tuple[int, int] = (8, 8), seed: int = 0
) -> dict[str, Any]:
    """Everything but the timestep."""
    generator = torch.Generator().manual_seed(seed)
    channels = {OpenAIUNet: 4, GuidedUNet: 3, DDIMUNet: 3}[type(model)]
    found: dict[str, Any] = {"x": torch.randn(batch, channels, *side, generator=generator)}
    if isinstance(model, DDIMUNet):
        return found
    if model.num_classes is not None:
        found["y"] = torch.randint(0, model.num_classes, (batch,), generator=generator)
    for module in model.modules():
        if isinstance(module, handwritten.CrossAttention) and module.to_k.in_features == 24:
            found["context"] = torch.randn(batch, 7, 24, generator=generator)
            break
    return found


def clock(model: nn.Module) -> str:
    return "t" if isinstance(model, DDIMUNet) else "timesteps"


def answer(captured: Captured, given: dict[str, Any]) -> Tensor:
    values, _ = captured.call.bind((), given)
    return captured.call.rebuild(captured.gm(*values), None)


def equal(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert expected.std() > 1e-3 and bool(expected.isfinite().all())
    assert (found - expected).abs().max() == 0


# variants are captured with one dtype of the timestep only: the other changes nothing there
TYPED = [(name, torch.int64) for name in CASES]
TYPED += [(name, torch.float32) for name in ("openai", "guided", "ddim")]


# long to trace, and each but a variant of the others
SLOW = {
    name: [pytest.mark.slow]
    for name in ("openai-checkpoint", "openai-odd-width", "openai-self-attention")
} | {"openai-pooling": [pytest.mark.slow, pytest.mark.sample]}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (name, dtype),
            id=f"{name}-{dtype}",
            marks=SLOW.get(name, []),
        )
        for name, dtype in TYPED
    ],
)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Captured, torch.dtype, bool]:
    """A model, its graph, the dtype of its timestep, and whether height and width are free."""
    return made(*request.param)


@functools.cache  # pytest keeps the last case alone, and shares them out among processes
def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Captured, torch.dtype, bool]:
    kind, options, dynamic = CASES[name]
    model = build(kind, options)
    example = {**inputs(model, 2), clock(model): torch.tensor([5, 5], dtype=dtype)}
    captured = capture(model, example, timestep=clock(model), dynamic=dynamic)
    return model, captured, dtype, "spatial" in dynamic


@pytest.mark.parametrize("kind", ["number", "0-d", "equal", "different"])
def test_the_graph_equals_the_model(case: Any, kind: str) -> None:
    # these models take a tensor (batch,) only; numbers and 0-d tensors stand for an equal one
    model, captured, dtype, spatial = case
    other = (12, 16) if spatial else (8, 8)
    for batch, side in [(1, (8, 8)), (2, other), (3, (8, 8))]:
        given = inputs(model, batch, side, seed=batch)
        rows = torch.full((batch,), 371, dtype=dtype)
        if kind == "different":
            rows = torch.tensor([999, 0, 20][:batch], dtype=dtype)
            rows = rows + 0.25 if dtype.is_floating_point else rows
        t = {"number": rows[0].item(), "0-d": rows[0]}.get(kind, rows)
        with torch.no_grad():
            expected = model(**given, **{clock(model): rows})
            equal(answer(captured, {**given, clock(model): t}), expected)


def test_no_size_is_baked_in(case: Any) -> None:
    _, captured, _, spatial = case
    assert captured.route == "trace" and captured.call.guards == ()
    sides = ("height", "width") if spatial else (8, 8)
    assert all(spec.shape[0] == "batch" for spec in captured.call.inputs)
    assert captured.call.inputs[0].shape[2:] == sides


def test_a_model_that_asserts_its_resolution_keeps_it() -> None:
    model = build(DDIMUNet, {})
    example = {**inputs(model, 2), "t": 5}
    captured = capture(model, example, timestep="t", dynamic=BOTH)
    given = {**inputs(model, 3), "t": torch.tensor([1, 500, 3])}
    with torch.no_grad():
        equal(answer(captured, given), model(**given))
    for side in [(16, 16), (8, 16), (16, 8)]:
        given = {**inputs(model, 3, side), "t": 5}
        with pytest.raises(InputError):
            answer(captured, given)


def test_what_a_model_asserts_is_asserted_at_capture() -> None:
    model = build(GuidedUNet, {})
    example = {"x": torch.randn(2, 3, 8, 8), "timesteps": 5}
    with pytest.raises(CaptureError, match="must specify y if and only if"):
        capture(model, example, timestep="timesteps")


class Masked(nn.Module):
    """Cross-attention with a mask, which it writes into its own scores."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = handwritten.CrossAttention(16, 24, heads=4, dim_head=4, dropout=0.0)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x + t[:, None, None].float(), context, mask=mask)


def test_attention_with_a_mask() -> None:
    model = seeded(Masked).eval()

    def given(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch)
        return {
            "x": torch.randn(batch, 9, 16, generator=generator),
            "t": torch.arange(batch),
            "context": torch.randn(batch, 7, 24, generator=generator),
            "mask": torch.rand(batch, 7, generator=generator) > 0.4,
        }

    captured = capture(model, given(2), timestep="t")
    for batch in (1, 2, 3):
        with torch.no_grad():
            equal(answer(captured, given(batch)), model(**given(batch)))


FOLDED = ["openai", "openai-checkpoint", "openai-odd-width", "ddim", "ddim-odd-width"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("name", FOLDED)
def test_folding_is_exact_at_batch_one(name: str, dtype: torch.dtype) -> None:
    kind, options, _ = CASES[name]
    model = build(kind, options)
    times = torch.tensor([0, 1, 371, 500, 999], dtype=dtype)
    if dtype.is_floating_point:
        times = times + 0.25
    example = {**inputs(model, 2), clock(model): times[:2]}
    folded = fold_timesteps(model, times, example, timestep=clock(model))
    time_layers = {"temb_proj", "emb_layers", "time_embed", "temb"}
    called = [node.target for node in folded.gm.graph.find_nodes(op="call_module")]
    left = {part for path in called for part in path.split(".")}
    assert not left & time_layers  # all of them are tables now
    for t in times:
        given = inputs(model, 1, seed=int(t))
        with torch.no_grad():
            expected = model(**given, **{clock(model): t[None]})
            equal(folded(**given, **{clock(model): t}), expected)
            equal(folded(**given, **{clock(model): t.item()}), expected)


@pytest.mark.parametrize("name", ["openai", "openai-half", "guided", "ddim"])
def test_saving_brings_the_same_model_back(name: str, tmp_path: Any) -> None:
    kind, options, _ = CASES[name]
    model = build(kind, options)
    given = {**inputs(model, 2), clock(model): torch.tensor([3, 500])}
    folded = fold_timesteps(model, [3, 500], given, timestep=clock(model))
    save(folded, tmp_path / "model")
    with torch.no_grad():
        equal(load(tmp_path / "model")(**given), folded(**given))


def test_checkpointing_changes_no_gradient() -> None:
    plain = build(OpenAIUNet, SMALL)
    saving = copy.deepcopy(plain)
    for module in saving.modules():
        for flag in ("use_checkpoint", "checkpoint"):
            if hasattr(module, flag):
                setattr(module, flag, True)
    given = {**inputs(plain, 2), "timesteps": torch.tensor([3, 900])}
    for model in (plain, saving):
        model(**given).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        # only gradients of the time embedding are added in another order, some ten of them
        assert (a.grad - b.grad).norm() <= 10 * 2**-23 * a.grad.norm(), name


FULL = [
    (OpenAIUNet, handwritten.STABLE_DIFFUSION_1, 859_520_964),
    (GuidedUNet, handwritten.ADM_64, 295_904_454),
    (DDIMUNet, handwritten.DDPM_CIFAR10, 35_746_307),
]


@pytest.mark.parametrize(("kind", "options", "parameters"), FULL, ids=lambda k: str(k)[:20])
def test_full_size_has_the_published_number_of_parameters(
    kind: type[nn.Module], options: dict[str, Any], parameters: int
) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in kind(**options).parameters()) == parameters
