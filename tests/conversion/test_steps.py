"""The steps of `convert` as values: their order, what they need, and steps of one's own."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import tfmq_fx
from tests.test_traps import batches, calibrated, recipe
from tests.toys import ToyUNet, seeded
from tfmq_fx import STEPS, Guarantee, Need, Stage, Step, Steps, convert, load, refresh, report, save
from tfmq_fx.core.errors import CalibrationError, ConfigError, GraphError
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass

W4A8 = recipe("w4a8")


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def clamp_weights(gm, *, limit):
    """Clamp the weights of linear layers to [-limit, limit]."""
    changed = 0
    for name, module in list(gm.named_modules()):
        if isinstance(module, torch.nn.Linear):
            clamped = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None
            )
            clamped.weight = torch.nn.Parameter(module.weight.detach().clamp(-limit, limit))
            clamped.bias = module.bias
            gm.set_submodule(name, clamped.eval())
            changed += 1
    return Rewrite(gm, changed)


def clamping(limit=0.05, name="clamp"):
    def clamp(job):
        """Clamp the weights of linear layers."""
        return job.applied(clamp_weights(job.gm, limit=limit))

    return captured(name, clamp)


def captured(name, run, **changes):
    settings = {
        "takes": Stage.CAPTURED,
        "gives": Stage.CAPTURED,
        "guarantee": Guarantee.MEASURED,
        "cost": "seconds",
    }
    return Step(name=name, run=run, **settings | changes)


def quantized(name, run, **changes):
    return captured(name, run, takes=Stage.QUANTIZED, gives=Stage.QUANTIZED, **changes)


@pytest.fixture(scope="module")
def prepared():
    return calibrated(seeded(ToyUNet).eval(), W4A8)


def outputs(model):
    with torch.no_grad():
        return [model(*batch) for batch in batches()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


def test_steps_print_as_the_table_of_the_readme():
    text = str(STEPS)
    assert text.splitlines()[0] == "| step | what it does | graph | guarantee | cost |"
    assert [re.match(r"\| `(\w+)`", line)[1] for line in text.splitlines()[2:]] == list(STEPS.names)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert text in readme


def test_the_standard_steps_fit_one_another():
    stage = Stage.CAPTURED
    for step in STEPS:
        assert step.takes is stage
        stage = step.gives
        assert step.summary and step.cost
    assert stage is Stage.QUANTIZED
    assert tfmq_fx.STEPS is STEPS and isinstance(STEPS, tuple)


def test_every_step_is_in_the_record_with_its_time_or_the_reason_it_was_left_out(prepared):
    model = convert(prepared, progress=False)
    logged = {entry["name"]: entry for entry in model.record["steps"]}
    assert tuple(logged) == STEPS.names
    assert logged["plan_bits"]["skipped"] == "no budget was given"
    assert logged["round_weights"]["skipped"] is None and logged["round_weights"]["seconds"] > 0
    text = str(report(model))
    assert "plan_bits: left out, no budget was given" in text
    assert re.search(r"fold_timesteps: [\d.]+ s, bit-exact", text)


def test_conversion_changes_nothing_of_what_was_prepared():
    prepared = calibrated(seeded(ToyUNet).eval(), W4A8)
    wanted = [p.requires_grad for p in prepared.gm.parameters()]
    code = prepared.gm.code
    first = convert(prepared, progress=False)
    assert wanted == [p.requires_grad for p in prepared.gm.parameters()] and any(wanted)
    assert all(p.requires_grad for p in prepared.source.parameters())
    assert prepared.gm.code == code and same(first, convert(prepared, progress=False))


def test_a_step_of_ones_own_runs_where_it_was_put(prepared):
    steps = STEPS.before("measure_ranges", clamping())
    model = convert(prepared, steps=steps, progress=False)
    assert model.origin.steps == steps.names
    assert model.record["passes"][0]["name"] == "clamp_weights"
    assert not same(model, convert(prepared, progress=False))
    # the clamped model is what later steps call full precision
    source = seeded(ToyUNet).eval()
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.clamp_(-0.05, 0.05)
    own = convert(calibrated(source, W4A8), progress=False)
    assert {n: s["weight_bits"] for n, s in own.record["sites"].items()} == {
        n: s["weight_bits"] for n, s in model.record["sites"].items()
    }
    for mine, theirs in zip(outputs(model), outputs(own), strict=True):
        assert (mine - theirs).norm() < 0.1 * theirs.norm()  # ranges come from other samples


def test_a_step_that_changes_nothing_leaves_the_bits_as_they_are(prepared):
    steps = STEPS.after("fold_timesteps", quantized("look", lambda job: job))
    with pytest.raises(ConfigError, match="step 'look' takes a quantized graph, but after step"):
        convert(prepared, steps=steps, progress=False)
    steps = STEPS.before("round_weights", quantized("look", lambda job: job))
    assert same(convert(prepared, steps=steps, progress=False), convert(prepared, progress=False))


def test_steps_left_out_and_replaced(prepared):
    model = convert(prepared, steps=STEPS.without("round_weights"), progress=False)
    passes = [p["name"] for p in model.record["passes"]]
    assert "round_weights" not in passes and "quantize_layers" in passes
    again = Step(**{f.name: getattr(STEPS[0], f.name) for f in dataclasses.fields(Step)})
    assert STEPS.replaced("rewrite_layers", again).names == STEPS.names
    for name in ("fold_timesteps", "quantize_layers"):
        with pytest.raises(ConfigError, match=r"takes a \w+ graph, but after|end with a folded"):
            convert(prepared, steps=STEPS.without(name), progress=False)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: STEPS.before("round", clamping()), "no step is called 'round'; there are rewrite"),
        (lambda: STEPS.without("nothing"), "no step is called 'nothing'"),
        (lambda: Steps(clamping(), clamping()), "two steps are called 'clamp'"),
        (lambda: clamping(name="two words"), "must be an identifier"),
        (lambda: captured("bad", "text"), "run must be a function"),
        (lambda: captured("bad", len, takes="captured"), "takes must be a Stage"),
        (lambda: captured("bad", len, guarantee="exact"), "guarantee must be a Guarantee"),
        (lambda: captured("bad", len, needs={"samples"}), "which is no Need"),
    ],
)
def test_wrong_steps_are_refused_by_name(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_what_a_step_does_wrong_is_told_by_its_name(prepared):
    def forgets(job):
        return job.gm

    def edits(job):
        next(iter(job.gm.graph.find_nodes(op="output"))).meta["x"] = 1
        job.gm.add_module("more", torch.nn.Linear(1, 1))
        return job

    def overwrites(job):
        for buffer in job.gm.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1)
        return job

    for run, message in (
        (forgets, "step 'bad' returned a ToyUNet instead of a Job"),
        (edits, "step 'bad' changed the graph that it was given"),
        (overwrites, "step 'bad' changed the graph that it was given"),
    ):
        steps = STEPS.before("round_weights", quantized("bad", run))
        with pytest.raises(GraphError, match=message):
            convert(prepared, steps=steps, progress=False)
    with pytest.raises(ConfigError, match=r"steps must be a tfmq_fx\.Steps"):
        convert(prepared, steps=[clamping()], progress=False)


def test_an_error_in_a_step_names_the_step(prepared):
    def fails(job):
        raise ConfigError("no")

    steps = STEPS.before("round_weights", quantized("mine", fails))
    with pytest.raises(ConfigError, match="no") as caught:
        convert(prepared, steps=steps, progress=False)
    assert "in step mine" in caught.value.__notes__


def test_what_a_step_needs_is_asked_for_before_the_long_work():
    nearest = dataclasses.replace(
        W4A8, reconstruction=dataclasses.replace(W4A8.reconstruction, rounding="nearest", iters=0)
    )
    ran = []
    watching = captured("watch", lambda job: ran.append(1) or job)
    bare = tfmq_fx.prepare(seeded(ToyUNet).eval(), next(batches()), timesteps=4, config="fp")
    assert convert(bare, steps=STEPS.before("fold_timesteps", watching), progress=False) and ran
    ran.clear()
    needs = quantized("needs", lambda job: job, needs={Need.SAMPLES})
    steps = STEPS.before("fold_timesteps", watching).before("round_weights", needs)
    with pytest.raises(CalibrationError, match="before any calibration"):
        convert(bare, steps=steps, progress=False)
    iterable = calibrated(seeded(ToyUNet).eval(), nearest)
    needs = quantized("needs", lambda job: job, needs={Need.RESAMPLING})
    with pytest.raises(CalibrationError, match="iterable"):
        convert(iterable, steps=STEPS.before("round_weights", needs), progress=False)
    assert not ran


def test_samples_are_read_when_a_step_first_asks(monkeypatch):
    nearest = dataclasses.replace(
        W4A8, reconstruction=dataclasses.replace(W4A8.reconstruction, rounding="nearest", iters=0)
    )
    prepared = calibrated(seeded(ToyUNet).eval(), nearest)
    model = convert(prepared, progress=False)
    assert model.record["samples"]["used"] == 0 and not model.origin.calibration.rows
    asks = quantized("asks", lambda job: (job.samples.chunks, job)[1], needs={Need.SAMPLES})
    model = convert(prepared, steps=STEPS.before("round_weights", asks), progress=False)
    assert model.record["samples"]["used"] > 0 and model.origin.calibration.rows


def test_a_checkpoint_belongs_to_its_steps_and_to_what_they_make(prepared, tmp_path):
    plain = convert(prepared, checkpoint=tmp_path / "a", progress=False)
    steps = STEPS.before("measure_ranges", clamping(0.05))
    with pytest.raises(ConfigError, match="another conversion"):
        convert(prepared, steps=steps, checkpoint=tmp_path / "a", progress=False)
    clamped = convert(prepared, steps=steps, checkpoint=tmp_path / "b", progress=False)
    # a step of the same name that does another thing takes none of the other's parts
    other = STEPS.before("measure_ranges", clamping(0.02))
    fresh = convert(prepared, steps=other, checkpoint=tmp_path / "b", progress=False)
    assert same(fresh, convert(prepared, steps=other, progress=False))
    assert not same(fresh, clamped) and not same(clamped, plain)
    again = convert(prepared, steps=steps, checkpoint=tmp_path / "b", progress=False)
    taken = [p["details"].get("checkpoint", {}).get("taken") for p in again.record["passes"]]
    assert same(again, clamped) and any(taken)


def test_refresh_refuses_a_step_that_it_cannot_find(prepared, tmp_path):
    steps = STEPS.before("measure_ranges", clamping())
    model = convert(prepared, steps=steps, progress=False)
    save(model, tmp_path / "saved", calibration=True)
    loaded = load(tmp_path / "saved")
    assert loaded.origin.steps == steps.names
    source = seeded(ToyUNet).eval()
    for each in (model, loaded):
        with pytest.raises(ConfigError, match=r"cannot find the step 'clamp'.*steps=\.\.\."):
            refresh(each, source, progress=False)
        assert same(refresh(each, source, steps=steps, progress=False), model)
        with pytest.raises(ConfigError, match="was converted with the steps"):
            refresh(each, source, steps=steps.after("clamp", clamping(name="more")), progress=False)


def test_a_model_that_was_converted_without_a_step_is_refreshed_without_it(prepared):
    model = convert(prepared, steps=STEPS.without("round_weights"), progress=False)
    assert same(refresh(model, seeded(ToyUNet).eval(), progress=False), model)
