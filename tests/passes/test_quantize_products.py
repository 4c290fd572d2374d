"""quantize_products: operands are rounded as measured, row by row; the rest of the graph stays."""

import copy
import json
import operator

import pytest
import torch
from torch import nn

from tests.toys import ToyDiT, ToyUNet, seeded
from tfmq_fx.backends.cpu.autotune import untimed_choice
from tfmq_fx.backends.cpu.lower import lower
from tfmq_fx.backends.inductor import unavailable
from tfmq_fx.calibration.observers import RangeObserver
from tfmq_fx.calibration.product_ranges import measure_products
from tfmq_fx.capture.capture import capture
from tfmq_fx.conversion.models import Converted
from tfmq_fx.core.config import AttentionSpec, Config
from tfmq_fx.core.errors import InputError
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.graph import fork
from tfmq_fx.ir.layer_edits import call_before
from tfmq_fx.ir.products import find_products
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.passes.decompose_attention import decompose_attention
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.passes.observe_layers import observe_layers
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.passes.quantize_products import SCALES, quantize_products
from tfmq_fx.quant import sqnr as metrics
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.affine import levels
from tfmq_fx.serialization import artifact

TIMES = torch.arange(4)
W8A8 = LayerConfig(weights=WeightSpec(search=1), activations=ActivationSpec())


def spec(bits=8, probabilities="uniform", probabilities_bits=None, **options):
    return AttentionSpec(
        activations=ActivationSpec(bits=bits, **options),
        probabilities_bits=probabilities_bits or bits,
        probabilities=probabilities,
    )


@pytest.fixture(scope="module")
def unet():
    model = seeded(ToyUNet).eval()
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    return capture(model, example, timestep="t").gm


@pytest.fixture(scope="module")
def dit():
    example = {
        "x": torch.randn(2, 3, 8, 8),
        "t": torch.tensor([1, 2]),
        "y": torch.tensor([3, 4]),
    }
    gm = capture(seeded(ToyDiT).eval(), example, timestep="t").gm
    return decompose_attention(gm).gm


def batches(gm, count=6):
    """One batch for each timestep, of placeholder values in order."""
    generator = torch.Generator().manual_seed(0)
    for t in TIMES.tolist():
        x = torch.randn(count, 3, 8, 8, generator=generator) * (0.3 + t)
        values = {"x": x, "t": torch.full((count,), t), "y": torch.arange(count) % 10}
        yield [values[str(node.target)] for node in gm.graph.find_nodes(op="placeholder")]


def quantize(gm, wanted, timesteps=TIMES, target=None):
    """`target`, or the graph that was measured, with its products quantized."""
    measured = measure_products(gm, batches(gm), spec=wanted, timesteps=timesteps)
    target = gm if target is None else target
    return quantize_products(target, measured=measured, spec=wanted, timesteps=timesteps)


def sqnr(gm, reference):
    """Output SQNR in dB over all batches."""
    with torch.no_grad():
        found = torch.stack([gm(*batch)[0] for batch in batches(gm)])
        expected = torch.stack([reference(*batch)[0] for batch in batches(gm)])
    return metrics.output_sqnr(expected, found).pooled


def roundings(gm):
    return {name: m for name, m in gm.named_modules() if isinstance(m, QuantActivation)}


def with_choices(gm, log2):
    """`gm`, its probabilities on log2 grids, as saved models have it that were made when a test
    chose their grid: logarithmic at some timesteps, log2 (K,) bool, and uniform at the others."""
    gm, modules = fork(gm), roundings(gm)
    table = gm.get_buffer(SCALES)
    for call in list(gm.graph.find_nodes(op="call_module")):
        module = modules.get(call.target)
        if module is None or module.grid != "log2":
            continue
        row, (_, column) = call.args[1].args
        flag = table.shape[1]
        table = torch.cat([table, log2[:, None].float()], 1)
        table[:, column] /= torch.where(log2, 1, levels(module.bits))
        adaptive = QuantActivation(bits=module.bits, grid="adaptive", per_timestep=True)
        gm.set_submodule(call.target, adaptive)
        row.meta["val"] = row.meta["val"].new_empty((row.meta["val"].shape[0], flag + 1))
        place, name = (slice(None), flag), f"log2_{call.name}"
        call.args = (*call.args, call_before(call, operator.getitem, row, place, name=name))
    setattr(gm, SCALES, table)
    gm.recompile()
    return gm


@pytest.mark.parametrize("model", ["unet", "dit"])
@pytest.mark.parametrize("probabilities", ["uniform", "log2"])
def test_every_product_is_rounded_and_keeps_its_name(model, probabilities, request):
    gm = request.getfixturevalue(model)
    products = find_products(gm)
    done = quantize(gm, spec(probabilities=probabilities))
    assert stage_of(done.gm) is Stage.QUANTIZED and stage_of(gm) is Stage.CAPTURED
    assert done.changed == len(products) and not done.declined
    assert [p.name for p in find_products(done.gm)] == [p.name for p in products]
    assert len(roundings(done.gm)) == 2 * len(products) and not roundings(gm)
    for product in find_products(done.gm):
        assert all(n.op == "call_module" for n in (product.left, product.right))
    (row,) = [n for n in done.gm.graph.nodes if is_timestep_row(n)]
    table = done.gm.get_buffer(SCALES)
    assert row.args[0].target == SCALES and table.shape[0] == len(TIMES)
    assert bool((table >= 0).all())
    json.dumps(done.details)
    assert done.details["products"].keys() == {p.name for p in products}


def test_more_bits_lose_less(unet):
    # A bit is worth 6 dB; 4 bits of both operands and 16 bits bound the ladder.
    ladder = [sqnr(quantize(unet, spec(bits=bits)).gm, unet) for bits in (4, 6, 8, 16)]
    assert ladder == sorted(ladder)
    assert ladder[2] - ladder[0] > 12 and ladder[3] - ladder[2] > 24


def test_what_was_rounded_is_on_the_grid(unet):
    wanted = spec(bits=4, probabilities="log2")
    done = quantize(unet, wanted)
    seen = {}
    for name, module in roundings(done.gm).items():
        module.register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: (y, args[1])})
        )
    batch = list(batches(unet))[2]
    with torch.no_grad():
        done.gm(*batch)
    scores, values = (p.name for p in find_products(unet))
    q, scale = seen[f"quantized_products.{scores}.left"]
    codes = q / scale.view(-1, 1, 1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert float(codes.max() - codes.min()) <= 15.001
    p, scale = seen[f"quantized_products.{values}.left"]
    powers = torch.log2(p[p > 0] / scale[0])
    torch.testing.assert_close(powers, powers.round(), rtol=0, atol=1e-4)
    assert float(powers.min()) >= -14 and float(powers.max()) <= 0


def test_scales_go_by_the_value_of_t_row_by_row(unet):
    done = quantize(unet, spec(bits=4, probabilities="log2")).gm
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([3, 0, 3, 1])
    with torch.no_grad():
        (together,) = done(x, t)
        alone = torch.cat([done(x[i : i + 1], t[i : i + 1])[0] for i in range(4)])
        (other,) = done(x, torch.tensor([0, 0, 3, 1]))
    # a batch may multiply in another order than one row, and a rounding at a tie may flip
    assert float((together - alone).norm() / alone.norm()) < 0.02
    assert not torch.equal(other[0], together[0]) and torch.equal(other[2:], together[2:])
    with pytest.raises(InputError, match="no table row for timestep 7"):
        done(x, torch.full((4,), 7))


def test_one_static_range_needs_no_table(unet):
    done = quantize(unet, spec(per_timestep=False, probabilities="log2"))
    assert not [n for n in done.gm.graph.nodes if is_timestep_row(n)] and not done.declined
    assert {m.range_kind() for m in roundings(done.gm).values()} == {"static"}
    assert sqnr(done.gm, unet) > 20


class TokensFirst(nn.Module):
    """Attention with the batch in the middle, as torch.nn.MultiheadAttention has it."""

    def forward(self, x, t):
        tokens = x.flatten(2).permute(2, 0, 1)
        scores = torch.einsum("nbc,mbc->bnm", tokens, tokens)
        y = torch.einsum("bnm,mbc->bcn", scores.softmax(-1), tokens)
        return y.reshape(x.shape) * t[:, None, None, None]


def test_operands_without_the_batch_get_a_static_range_and_say_so():
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    gm = capture(TokensFirst(), example, timestep="t").gm
    done = quantize(gm, spec())
    assert done.changed == 2
    assert len(done.declined) == 3 and all(
        d.reason.startswith("static range: dim 0 of its ") for d in done.declined
    )
    kinds = [m.range_kind() for m in roundings(done.gm).values()]
    assert kinds.count("static") == 3 and kinds.count("per timestep") == 1
    assert sqnr(done.gm, gm) > 20


def quantized_layers(gm):
    """`gm` with its timestep block folded and every layer quantized."""
    observed = observe_layers(gm).gm
    with torch.no_grad():
        for batch in batches(gm):
            observed(*batch)
    seen = [m for m in observed.modules() if isinstance(m, RangeObserver) and m.seen]
    ranges = {o.site: o.ranges(TIMES) for o in seen}
    folded = fold_timesteps(gm, timesteps=TIMES).gm
    plan = {site.name: W8A8 for site in find_sites(folded)[0]}
    return quantize_layers(folded, plan=plan, ranges=ranges, timesteps=TIMES).gm


@pytest.mark.parametrize("model", ["unet", "dit"])
def test_products_of_a_graph_with_quantized_layers(model, request):
    gm = request.getfixturevalue(model)
    layers = quantized_layers(gm)
    done = quantize(gm, spec(), target=layers)
    assert done.changed == len(find_products(gm)) and not done.declined
    both, alone = sqnr(done.gm, gm), sqnr(layers, gm)
    assert alone - 6 < both < alone + 3  # 8 bits on the products add no more than the layers lost
    again = quantize(gm, spec(), target=done.gm)
    assert again.changed == 0
    assert {d.reason for d in again.declined} == {"it is quantized already"}


def test_products_that_were_not_measured_are_declined(unet):
    done = quantize_products(unet, measured={}, spec=spec(), timesteps=TIMES)
    assert done.changed == 0 and not roundings(done.gm)
    assert {d.reason for d in done.declined} == {"calibration saw no such product"}


def test_log2_probabilities_of_four_bits_beat_uniform_ones_where_they_follow_a_power_law():
    class ByDistance(nn.Module):
        """Weights 1 / distance: the far keys hold most of the weight together."""

        def forward(self, x, t):
            tokens = x.flatten(2)
            far = (tokens[:, 0, :, None] - tokens[:, 0, None]).abs()
            weights = (-torch.log(far + 0.01 * (1 + t)[:, None, None])).softmax(-1)
            return weights @ tokens.square().transpose(1, 2)  # far keys have large values

    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    gm = capture(ByDistance(), example, timestep="t").gm
    found = {
        kind: sqnr(quantize(gm, spec(probabilities=kind, probabilities_bits=4)).gm, gm)
        for kind in ("uniform", "log2")
    }
    assert found["log2"] > found["uniform"] + 3


@pytest.mark.parametrize("older", [False, True])
def test_the_result_saves_loads_and_copies(unet, older, tmp_path):
    done = quantize(unet, spec(bits=4, probabilities="log2")).gm
    if older:
        done = with_choices(done, torch.tensor([True, False, False, True]))
        assert "adaptive" in {m.grid for m in roundings(done).values()}
    batch = list(batches(unet))[1]
    with torch.no_grad():
        (expected,) = done(*batch)
        artifact.save(tmp_path / "model", gm=done, call={}, config={}, extra={})
        loaded = artifact.load(tmp_path / "model").gm
        assert torch.equal(loaded(*batch)[0], expected)
        copied = copy.deepcopy(done)
        assert torch.equal(copied(*batch)[0], expected)
    assert {n: repr(m) for n, m in roundings(loaded).items()} == {
        n: repr(m) for n, m in roundings(done).items()
    }


def test_scales_stay_in_float32_in_a_half_precision_model():
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    found = capture(seeded(Block).eval(), example, timestep="t")
    done = quantize(found.gm, spec()).gm
    x, t = list(batches(found.gm))[1]
    with torch.no_grad():
        (expected,) = done(x, t)
        model = Converted(done, found.call, recipe=Config(), record={}).to(torch.bfloat16)
        y = model(x.bfloat16(), t)
    assert model.gm.get_buffer(SCALES).dtype == torch.float32
    assert all(m.act_scale.dtype == torch.float32 for m in roundings(model).values())
    assert y.dtype == torch.bfloat16
    # scores of up to 10 with 8 bits of mantissa: weights, their exponentials, are off by 10 * 2**-8
    assert float((y.float() - expected).norm() / expected.norm()) < 0.04


class Block(nn.Module):
    """A layer and attention over what it gives."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(3, 12, 1)

    def forward(self, x, t):
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return y * t[:, None, None]


def test_the_result_compiles_with_quantized_layers():
    if reason := unavailable():
        pytest.skip(reason)
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    gm = capture(seeded(Block).eval(), example, timestep="t").gm
    done = quantize(gm, spec(probabilities="log2"), target=quantized_layers(gm)).gm
    lowered = lower(done, choose=untimed_choice).gm
    assert len(roundings(lowered)) == 4
    compiled = torch.compile(lowered, fullgraph=True)
    batch = list(batches(gm))[1]
    with torch.no_grad():
        (found,), (expected,) = compiled(*batch), done(*batch)
    # the same integers up to ties: a step of 1/255 of a range here and there
    assert float((found - expected).norm() / expected.norm()) < 0.02
