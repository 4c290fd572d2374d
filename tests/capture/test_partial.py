"""Models whose code depends on data: opaque modules, held conditions, and what is still refused."""

import copy

import pytest
import torch
from torch import nn

import tfmq_fx
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.errors import ArtifactError, CaptureError, InputError
from tfmq_fx.ir.graph import OPAQUE
from tfmq_fx.ir.held_values import check_held, checks
from tfmq_fx.quant.quant_layer import QuantLayer

WIDTH, TOKENS = 16, 6
STEPS = 4


class Picked(nn.Module):
    """Attends to the tokens of a mask alone, by their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        kept = torch.nonzero(mask[0]).flatten()
        return self.out(self.inner(x[:, kept]).mean(1, keepdim=True).expand_as(x))


class Experts(nn.Module):
    """Sends each token to the layer that a gate chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen, result = self.gate(tokens).argmax(-1), torch.zeros_like(tokens)
        counts = chosen.bincount(minlength=3).cpu().numpy()
        for i, layer in enumerate(self.layers):
            if counts[i]:
                result[chosen == i] = layer(tokens[chosen == i])
        return result.view(x.shape)


class Denoiser(nn.Module):
    """A part whose code depends on data between layers that do not."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.time, self.out = part, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, timestep, mask):
        rates = torch.arange(WIDTH, device=x.device) / WIDTH
        e = self.time((timestep[:, None] * rates).sin())
        h = self.part(x, mask) if isinstance(self.part, Picked) else self.part(x)
        return self.out(x + h + e[:, None])


class Lengths(Denoiser):
    """Reads the lengths in a mask, in the model's own forward."""

    def forward(self, x, timestep, mask):
        longest = max(mask.sum(dim=1).tolist())
        x = torch.cat([2 * x[:, :longest], x[:, longest:]], dim=1)
        return super().forward(x[:, : int(mask.sum(1).max()) + 1], timestep, mask)


def made(kind=Denoiser, part=Experts):
    torch.manual_seed(0)
    return kind(part()).eval()


def inputs(batch=2, length=4):
    mask = (torch.arange(TOKENS) < length).long().expand(batch, TOKENS).clone()
    return {
        "x": torch.randn(batch, TOKENS, WIDTH),
        "timestep": torch.arange(batch) % STEPS,
        "mask": mask,
    }


def equal(model, other, values):
    with torch.no_grad():
        torch.testing.assert_close(other(**values), model(**values), rtol=0, atol=0)


@pytest.mark.parametrize("part", [Picked, Experts])
def test_a_part_stays_as_it_is_and_the_rest_is_a_graph(part):
    model = made(part=part)
    prepared = tfmq_fx.prepare(model, inputs(), timesteps=STEPS, config="fp")
    assert [*prepared.gm.meta[OPAQUE]] == ["part"]
    assert not checks(prepared.gm)
    (note,) = prepared.gm.meta["capture"]["notes"]
    assert note.startswith("opaque, runs as the model's own code: part, since the ")
    assert "test_partial.py:" in note
    for values in (inputs(), inputs(batch=5), inputs(length=2)):  # other sizes, other data
        equal(model, prepared, values)


def test_parts_that_look_alike_become_opaque_together():
    model = made(lambda part: nn.ModuleList([Denoiser(part), Denoiser(Experts())]))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model

        def forward(self, x, timestep, mask):
            for block in self.blocks:
                x = block(x, timestep, mask)
            return x

    captured = capture(Twice().eval(), inputs(), timestep="timestep")
    assert [*captured.gm.meta[OPAQUE]] == ["blocks.0.part", "blocks.1.part"]


@pytest.mark.parametrize("part", [Picked, Experts])
@pytest.mark.parametrize("preset", ["w8a8", "w8a8-dynamic", "w8a16"])
def test_layers_inside_are_quantized_with_ranges_measured_at_calls(part, preset):
    model = made(part=part)
    prepared = tfmq_fx.prepare(model, inputs(), timesteps=STEPS, config=preset)
    tfmq_fx.calibrate(prepared, [inputs() for _ in range(2 * STEPS)], progress=False)
    before = copy.deepcopy(model.state_dict())
    converted = tfmq_fx.convert(prepared, progress=False)
    layers = {n: m for n, m in converted.gm.named_modules() if isinstance(m, QuantLayer)}
    inner = {name for name in layers if name.startswith("part.")}
    assert inner == {f"part.{n}" for n, m in model.part.named_modules() if type(m) is nn.Linear}
    assert {layers[name].range_kind() for name in inner} == {
        "none" if preset == "w8a16" else "dynamic"
    }
    report = tfmq_fx.report(converted)
    assert report.weight_coverage == 1
    assert "part.gate" in str(report) or "part.inner" in str(report)
    values = inputs(batch=3)
    with torch.no_grad():
        y, z = model(**values), converted(**values)
    assert (y - z).norm() < 0.1 * y.norm()
    equal(copy.deepcopy(converted), converted, values)
    assert all(type(m) is not QuantLayer for m in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_patterns_reach_the_layers_inside():
    kept = tfmq_fx.LayerConfig()
    prepared = tfmq_fx.prepare(
        made(), inputs(), timesteps=STEPS, config="w8a16", overrides={"part.layers.*": kept}
    )
    tfmq_fx.calibrate(prepared, [inputs() for _ in range(2 * STEPS)], progress=False)
    with pytest.warns(tfmq_fx.CoverageWarning, match="part"):
        converted = tfmq_fx.convert(prepared, progress=False)
    sites = converted.record["sites"]
    assert sites["part.gate"]["weight_bits"] == 8
    assert sites["part.layers.0"]["weight_bits"] is None


def test_a_model_with_an_opaque_part_is_not_saved(tmp_path):
    folded = tfmq_fx.fold_timesteps(made(), STEPS, inputs())
    with pytest.raises(ArtifactError, match=r"part: a .*Experts that is opaque .*convert\(check"):
        tfmq_fx.save(folded, tmp_path / "model")


def test_tables_and_requests_around_an_opaque_part():
    model, values = made(), inputs(batch=1)
    equal(model, tfmq_fx.fold_timesteps(model, STEPS, inputs()), values)
    bound = tfmq_fx.bind_request(model, STEPS, inputs())
    equal(model, bound, values)
    analysis = tfmq_fx.analyze(model, inputs())
    assert "not counted, as their code depends on data: part" in str(analysis)


@pytest.mark.parametrize("change", ["random", "writes", "state", "number"])
def test_a_module_that_no_graph_can_call_is_refused_with_the_reason(change):
    class Other(Experts):
        calls = 0

        def forward(self, x):
            y = super().forward(x)
            if change == "random":
                return y + torch.rand(())
            if change == "writes":
                x.mul_(2)
            if change == "state":
                self.calls = self.calls + 1
            return (y, float(y.sum())) if change == "number" else y

    class Unpacked(Denoiser):
        def forward(self, x, timestep, mask):
            h = self.part(x)
            h = h[0] if isinstance(h, tuple) else h
            return self.out(x + h + self.time(timestep[:, None].expand(-1, WIDTH).float())[:, None])

    model = made(Unpacked, Other)
    with pytest.raises(CaptureError, match=r"part \(test_partial\.py:\d+\)") as caught:
        capture(model, inputs(), timestep="timestep")
    assert "nor does leaving modules as they are" in caught.value.__notes__[0]


class Shortened(Denoiser):
    """Goes on with the number of tokens that a part returned, the tokens of a mask alone."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(Kept())

    def forward(self, x, timestep, mask):
        kept = self.part(x, mask)
        return self.out(x + kept.sum(1, keepdim=True) / kept.shape[1])


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        return self.inner(x[:, torch.nonzero(mask[0]).flatten()])


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_sizes_that_depend_on_data_are_those_of_capture_or_refused(backend):
    """A mask of ones shows nothing of it, neither when sizes are observed nor in the replay."""
    model, whole, shorter = made(Shortened), inputs(1, TOKENS), inputs(1, TOKENS - 2)
    ours = converted = tfmq_fx.fold_timesteps(model, STEPS, whole)
    assert [*ours.gm.meta[OPAQUE]] == ["part"]
    if backend is not None:
        ours = tfmq_fx.compile(converted, backend, check=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(**whole), model(**whole))
        with pytest.raises(InputError, match="its sizes depend on the data of its inputs"):
            ours(**shorter)
        torch.testing.assert_close(ours(**whole), model(**whole))


# Values of conditions


def test_what_is_read_from_a_mask_is_held_and_compared(tmp_path):
    model = made(Lengths, nn.Identity)
    prepared = tfmq_fx.prepare(model, inputs(), timesteps=STEPS, config="fp")
    held = {node.args[2] for node in checks(prepared.gm)}
    assert held == {"mask"} and not prepared.gm.meta[OPAQUE]
    equal(model, prepared, inputs())
    folded = tfmq_fx.fold_timesteps(model, STEPS, inputs())
    path = tmp_path / "model"
    tfmq_fx.save(folded, path)
    loaded = tfmq_fx.load(path)
    equal(folded, loaded, inputs())
    with pytest.raises(InputError, match=r"mask: forward reads .*test_partial\.py:\d+.* \[4, 4\]"):
        loaded(**inputs(length=3))
    assert tfmq_fx.verify(model, folded).ok  # random masks would be refused


@pytest.mark.parametrize("bound", [False, True])
def test_another_value_is_captured_again(bound):
    model = made(Lengths, nn.Identity)
    make = tfmq_fx.bind_request if bound else tfmq_fx.fold_timesteps
    ours = make(model, STEPS, inputs())
    for values in (inputs(), inputs(length=3), inputs(length=2), inputs()):
        equal(model, ours, values)
    assert ours.forms.captured == 2


def test_quantized_layers_serve_another_value():
    model = made(Lengths, nn.Identity)
    prepared = tfmq_fx.prepare(model, inputs(), timesteps=STEPS, config="w8a8")
    tfmq_fx.calibrate(prepared, [inputs() for _ in range(2 * STEPS)], progress=False)
    converted = tfmq_fx.convert(prepared, progress=False)
    values = inputs(length=3)
    with torch.no_grad():
        y, z = model(**values), converted(**values)
    assert (y - z).norm() < 0.1 * y.norm()


def test_samples_stand_where_the_held_values_had_them():
    """A batch of calibration is drawn anew; each sample has the mask of its place."""
    model, values = made(Lengths, nn.Identity), inputs()
    values["mask"][1, 2:] = 0
    prepared = tfmq_fx.prepare(model, values, timesteps=STEPS, config="w8a8")
    calls = [{**inputs(), "mask": values["mask"]} for _ in range(2 * STEPS)]
    tfmq_fx.calibrate(prepared, calls, progress=False)
    converted = tfmq_fx.convert(prepared, progress=False)
    with torch.no_grad():
        y, z = model(**values), converted(**values)
    assert (y - z).norm() < 0.1 * y.norm()


def test_a_value_of_the_sample_is_never_held():
    class Branches(Denoiser):
        def forward(self, x, timestep, mask):
            return super().forward(x if x.sum() > 0 else -x, timestep, mask)

    with pytest.raises(CaptureError, match=r"bool\(\) of a tensor's data"):
        capture(made(Branches), inputs(), timestep="timestep")


class Masked(Denoiser):
    """Picks, repeats and counts by a mask, in the model's own forward."""

    def forward(self, x, timestep, mask):
        mask = mask.bool()
        valid = torch.cat([x[0][mask[0]], x[0][~mask[0]]])[None]
        repeated = valid.repeat_interleave(mask[0].long() + 1, dim=1)[:, :TOKENS]
        rows = int(mask[0].sum())
        tall = x.reshape(len(x), rows // 2, -1)
        x = x + valid + repeated + tall.reshape(x.shape) + torch.nonzero(mask[0]).sum()
        x[:, :rows] += 1
        return super().forward(x, timestep, mask)


def test_picking_by_a_mask_holds_the_mask_and_not_what_is_picked():
    model = made(Masked, nn.Identity)
    captured = tfmq_fx.prepare(model, inputs(), timesteps=STEPS, config="fp")
    assert {node.args[2] for node in checks(captured.gm)} == {"mask"}
    for _ in range(3):
        equal(model, captured, inputs())


def test_the_check_names_the_inputs_and_both_values():
    with pytest.raises(InputError, match=r"mask, ids: forward reads .* \(a\.py:7\).* 3; .* has 5"):
        check_held(torch.tensor(5), torch.tensor(3), "mask, ids", "a.py:7")


def test_a_buffer_that_a_call_sets_before_it_reads_it_is_no_state():
    class Rates(nn.Module):
        def __init__(self, reads: bool) -> None:
            super().__init__()
            self.register_buffer("rates", torch.ones(WIDTH))
            self.reads = reads

        def forward(self, x):
            before = self.rates if self.reads else 1.0
            self.rates = before * torch.arange(WIDTH, device=x.device) / WIDTH
            return x * self.rates

    torch.manual_seed(0)
    model = Denoiser(Rates(False)).eval()
    equal(model, tfmq_fx.prepare(model, inputs(), timesteps=STEPS, config="fp"), inputs())
    with pytest.raises(CaptureError, match=r"assigns to the buffer part\.rates"):
        capture(Denoiser(Rates(True)).eval(), inputs(), timestep="timestep")
