"""correct_outputs: the fitted correction in front of the output, where it helps, by timestep."""

import copy

import pytest
import torch

from tests.calibration.test_output_errors import Estimate, captured, chunks
from tests.ir.test_sites import graph_of
from tests.passes.test_quantize_layers import (
    TIMES,
    as_tensor,
    quantize,
    relative_error,
)
from tests.toys import ToyUNet, TupleOutput, seeded
from tfmq_fx.api import save
from tfmq_fx.calibration.output_errors import measure_errors
from tfmq_fx.capture.capture import capture
from tfmq_fx.conversion.models import Converted
from tfmq_fx.conversion.records import pass_record
from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ConfigError, GraphError, InputError
from tfmq_fx.core.layer_config import LayerConfig, WeightSpec
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.passes.correct_outputs import CORRECTION, correct_outputs
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.prologue.load_model import load

W2 = LayerConfig(weights=WeightSpec(bits=2, search=1))


@pytest.fixture(scope="module")
def toy():
    return graph_of(seeded(ToyUNet).eval(), 3, 8, 8)


@pytest.fixture(scope="module")
def rough(toy):
    """Weights of 2 bits, whose output is off by much."""
    return quantize(toy, W2, [], TIMES).gm


def batches(seed=1, count=40):
    """Batches of all timesteps mixed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count // 8):
        t = torch.arange(8)[torch.randperm(8, generator=generator)] % 4
        scale = 0.3 + t.view(-1, 1, 1, 1)
        yield torch.randn(8, 3, 8, 8, generator=generator) * scale, t


@pytest.mark.parametrize("kind", ["bias", "noise"])
def test_the_error_of_new_samples_falls(toy, rough, kind):
    errors = measure_errors(toy, rough, batches(), timesteps=TIMES)
    done = correct_outputs(rough, errors=errors, kind=kind, timesteps=TIMES)
    assert done.changed == 1 and not done.declined and stage_of(done.gm) is Stage.QUANTIZED
    details = done.details
    assert details["kind"] == kind and details["timesteps"] == 4
    assert details["corrected"] >= 1 and details["interpolated"] == 0
    assert details["error_after"] < details["error_before"]
    held = list(batches(seed=2, count=80))
    before = relative_error(rough, toy, held)
    assert relative_error(done.gm, toy, held) < before


def test_it_is_what_was_fitted(toy, rough):
    """(ehat - D) / (1 + k), for each sample by its own timestep."""
    errors = measure_errors(toy, rough, batches(), timesteps=TIMES)
    done = correct_outputs(rough, errors=errors, kind="noise", timesteps=TIMES)
    fitted = errors.correction("noise")
    x, t = next(batches(seed=3))
    with torch.no_grad():
        plain, found = as_tensor(rough(x, t)), as_tensor(done.gm(x, t))
    k, shift = fitted.k[t].view(-1, 1, 1, 1), fitted.shift[t][:, :, None, None]
    # float32 tables and two operations
    assert torch.allclose(found.double(), (plain.double() - shift) / (1 + k), rtol=1e-5, atol=1e-6)
    assert found.dtype == plain.dtype


def test_timesteps_where_it_does_not_help_keep_their_output_bit_for_bit():
    """A mean at timestep 0 alone; elsewhere fresh noise, two samples for each half."""
    biased = Estimate()
    biased.k.zero_(), biased.shift.zero_()
    biased.shift[0] = 1.0
    shape, times = (3, 6, 6), torch.arange(10)
    reference, gm = captured(Estimate(True), shape), captured(biased, shape)
    gm = fold_timesteps(gm, timesteps=times).gm
    data = list(chunks(times=times, batches=4, size=10, std=0.3))
    errors = measure_errors(reference, gm, data, timesteps=times)
    done = correct_outputs(gm, errors=errors, kind="noise", timesteps=times)
    off = ~errors.correction("noise").corrected
    assert not off[0] and off.sum() >= 6 and done.details["corrected"] == int((~off).sum())
    for x, t, noise in data:
        plain, found = as_tensor(gm(x, t, noise)), as_tensor(done.gm(x, t, noise))
        assert torch.equal(found[off[t]], plain[off[t]])
        changed = (found - plain).abs().flatten(1).amax(1) > 0
        assert torch.equal(changed, ~off[t])


def test_one_look_up_and_plain_operations_are_added(toy, rough):
    errors = measure_errors(toy, rough, batches(), timesteps=TIMES)
    done = correct_outputs(rough, errors=errors, kind="noise", timesteps=TIMES).gm
    old = {n.name for n in rough.graph.nodes}
    added = [n for n in done.graph.nodes if n.name not in old and n.op != "get_attr"]
    assert [n.op for n in added].count("call_module") == 0 and len(added) == 9
    (row,) = (n for n in added if is_timestep_row(n))
    table = done.get_buffer(str(row.args[0].target))
    assert table.shape == (4, 4) and table.dtype == torch.float32
    assert table is getattr(done, CORRECTION)
    with pytest.raises(InputError, match="no table row for timestep 8"):
        done(torch.randn(1, 3, 8, 8), torch.tensor([8]))
    assert not hasattr(rough, CORRECTION)  # the input is as it was


def test_only_the_first_of_several_outputs_is_corrected():
    reference = graph_of(seeded(TupleOutput).eval(), 4)
    gm = quantize(reference, W2, [], TIMES).gm
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 4, generator=generator), torch.arange(8) % 4) for _ in range(20)]
    errors = measure_errors(reference, gm, data, timesteps=TIMES)
    done = correct_outputs(gm, errors=errors, kind="bias", timesteps=TIMES)
    assert done.changed == 1
    with torch.no_grad():
        (plain, values), (found, others) = gm(*data[0]), done.gm(*data[0])
    assert torch.equal(values, others) and not torch.equal(plain, found)


def test_what_cannot_be_corrected_is_declined_by_reason(toy, rough):
    errors = measure_errors(toy, rough, batches(), timesteps=TIMES)
    done = correct_outputs(rough, errors=errors, kind="bias", timesteps=TIMES)
    again = correct_outputs(done.gm, errors=errors, kind="bias", timesteps=TIMES)
    assert again.changed == 0 and again.gm.code == done.gm.code
    assert [d.reason for d in again.declined] == ["it is corrected already"]

    plan = {site.name: LayerConfig() for site in find_sites(toy)[0]}
    exact = quantize_layers(toy, plan=plan, ranges={}, timesteps=TIMES).gm
    errors = measure_errors(toy, exact, batches(), timesteps=TIMES)
    done = correct_outputs(exact, errors=errors, kind="noise", timesteps=TIMES)
    assert done.changed == 0 and done.gm.code == exact.code and done.details["corrected"] == 0
    assert "no correction helps" in done.declined[0].reason

    errors = measure_errors(toy, rough, [], timesteps=TIMES)
    done = correct_outputs(rough, errors=errors, kind="noise", timesteps=TIMES)
    assert done.changed == 0 and "two calibration samples" in done.declined[0].reason
    assert "corrected" not in done.details


def test_wrong_uses_are_refused(toy, rough):
    errors = measure_errors(toy, rough, batches(), timesteps=TIMES)
    with pytest.raises(ConfigError, match="of 4 timesteps other than the 3"):
        correct_outputs(rough, errors=errors, kind="bias", timesteps=TIMES[1:])
    with pytest.raises(ConfigError, match="'bias' or 'noise', got 'none'"):
        correct_outputs(rough, errors=errors, kind="none", timesteps=TIMES)
    with pytest.raises(GraphError, match="expected a folded graph, found a captured one"):
        correct_outputs(toy, errors=errors, kind="bias", timesteps=TIMES)


@pytest.fixture(scope="module")
def converted(toy):
    gm = fold_timesteps(toy, timesteps=TIMES).gm
    plan = {site.name: W2 for site in find_sites(gm)[0]}
    gm = quantize_layers(gm, plan=plan, ranges={}, timesteps=TIMES).gm
    errors = measure_errors(toy, gm, batches(), timesteps=TIMES)
    done = correct_outputs(gm, errors=errors, kind="noise", timesteps=TIMES)
    done.gm.meta["timesteps"] = TIMES
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    call = capture(seeded(ToyUNet).eval(), example, timestep="t").call
    record = {"passes": [pass_record(done)]}
    return Converted(done.gm, call, recipe=Config(layers=W2), record=record)


def test_the_table_stays_exact_in_half_precision(converted):
    half = copy.deepcopy(converted).half()
    assert getattr(half.gm, CORRECTION).dtype == torch.float32
    assert torch.equal(getattr(half.gm, CORRECTION), getattr(converted.gm, CORRECTION))
    x, t = next(batches())
    with torch.no_grad():
        found, expected = half(x.half(), t), converted(x, t)
    assert found.dtype == torch.float16
    # some twenty layers at 11 bits each
    assert float((found.float() - expected).norm() / expected.norm()) < 0.02


def test_it_is_saved_and_loaded(converted, tmp_path):
    save(converted, tmp_path / "model")
    again = load(tmp_path / "model")
    x, t = next(batches())
    assert torch.equal(again(x, t), converted(x, t))
    assert again.record["passes"][0]["details"] == converted.record["passes"][0]["details"]
