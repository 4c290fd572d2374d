"""self_check: what a backend answers is compared with the model, and faults are found."""

import functools
import math

import pytest
import torch
from torch import nn

from tests.backends.cpu.cases import needs_kernels
from tests.backends.faults import Faulty, one_more, saturating, scale_off, swapped
from tests.backends.test_inductor import TIMES, converted
from tests.toys import seeded
from tfmq_fx import ActivationSpec, LayerConfig, WeightSpec, fold_timesteps
from tfmq_fx.api import _reference
from tfmq_fx.backends.cpu.autotune import untimed_choice
from tfmq_fx.backends.cpu.lower import alone, lower
from tfmq_fx.backends.float import dequantize
from tfmq_fx.backends.openvino.lower import lower as lower_for_openvino


class Deep(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(4, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2)
        self.leave = nn.Linear(32, 8)

    def forward(self, x, t):
        h = torch.relu(self.enter(x) * (1 + t[:, None, None, None].to(x.dtype) / 7))
        h = torch.relu(self.down(torch.relu(self.middle(h))))
        return self.leave(h.flatten(2).transpose(1, 2))


@functools.cache
def deep(bits=8, alike=False):
    """The net with all layers in these bits; alike: weights of near magnitudes,
    whose codes are all large."""
    layer = LayerConfig(weights=WeightSpec(bits=bits), activations=ActivationSpec())
    source = seeded(Deep).eval()
    if alike:
        for p in source.parameters():
            p.data = p.sign() * (1 + p.abs() / p.abs().max())
    return converted(source, overrides={"*": layer})


def reference_of(model):
    return _reference(model)


@functools.cache
def reference(bits=8):
    return reference_of(deep(bits))


def check(runner, bits=8):
    return reference(bits).check("other", runner, deep(bits).gm)


LAYERS = ["enter", "middle", "down", "leave"]


def test_the_model_agrees_with_itself():
    made = check(deep().gm)
    assert made.passed and made.backend == "other" and made.notes == ()
    assert [step.timestep for step in made.steps] == list(TIMES)
    assert all(step.sqnr == math.inf and 20 < step.least < 60 for step in made.steps)
    # the middle one is judged most closely: elsewhere four times the power is allowed
    first, middle, last = (step.least for step in made.steps)
    assert first == last == pytest.approx(middle - 10 * math.log10(4))
    assert str(made).startswith("t = 0: inf dB (at least")


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_right_backends_pass_with_a_margin(bits):
    gm = deep(bits).gm
    for lowered in (lower(gm, choose=untimed_choice), lower_for_openvino(gm)):
        found = reference(bits).check("right", lowered.gm, lowered.gm)
        assert found.passed and all(step.sqnr > step.least + 6 for step in found.steps)
    rough = dequantize(gm, dtype=torch.bfloat16)
    rough.gm.meta["precision"] = "bf16"
    found = reference(bits).check("float", rough.gm, rough.gm)
    assert found.passed and all(step.sqnr > step.least + 2 for step in found.steps)
    # as a backend that does not say that it computes so, it would not
    rough.gm.meta["precision"] = "f32"
    assert reference(bits).nearby.keys() > {(frozenset(), frozenset())}


@pytest.mark.parametrize("fault", [one_more, scale_off, swapped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_fault_of_one_layer_is_found(bits, layer, fault):
    found = check(Faulty(deep(bits).gm, layer, fault).run, bits)
    assert not found.passed


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_sums_that_saturate_are_found(layer):
    small = Faulty(deep(4).gm, layer, saturating)
    assert check(small.run, 4).passed  # their sums fit: the emulation is right where none saturates
    model = deep(8, alike=True)
    found = reference_of(model).check("other", Faulty(model.gm, layer, saturating).run, model.gm)
    assert not found.passed


@pytest.mark.parametrize("step", TIMES)
def test_a_stale_row_of_one_timestep_is_found(step):
    gm = deep().gm

    def stale(*inputs):
        x, t = inputs
        return gm(x, torch.where(t == step, TIMES[(TIMES.index(step) + 1) % 3], t))

    found = check(stale)
    assert [s.timestep for s in found.steps if not s.passed] == [step]


def test_outputs_of_other_shapes_or_with_nan_are_found():
    gm = deep().gm
    made = check(lambda *inputs: tuple(y[:1] for y in gm(*inputs)))
    assert not made.passed and "other shapes of outputs at t = 0" in made.notes
    made = check(lambda *inputs: tuple(y / 0 for y in gm(*inputs)))
    assert not made.passed and "NaN or Inf at t = 0 at other places" in made.notes[0]


class Odd(nn.Module):
    """Several outputs, one of integers; `odd` makes one of NaN."""

    def __init__(self, odd=False):
        super().__init__()
        self.leave, self.odd = nn.Linear(8, 8), odd

    def forward(self, x, t):
        y = self.leave(x) * (1 + t[:, None].to(x.dtype))
        root = torch.where(y > 0, y, torch.nan) if self.odd else y.abs()
        return y, root, y.argmax(-1), torch.zeros_like(y)


@pytest.mark.parametrize("odd", [False, True])
def test_several_outputs_integers_and_nan_of_the_reference(odd):
    calls = [(torch.randn(16, 8), torch.full((16,), t)) for t in TIMES]
    model = fold_timesteps(seeded(Odd, odd).eval(), TIMES, calls[0])
    gm, made = model.gm, reference_of(model)
    found = made.check("other", gm, gm)
    assert found.passed
    assert [note.partition(" at")[0] for note in found.notes] == (
        ["the reference's output 1 has NaN or Inf"] * 3 if odd else []
    )
    for i in range(4):

        def wrong(*inputs, i=i):
            outputs = list(gm(*inputs))
            outputs[i] = outputs[i] + 1
            return outputs

        assert not made.check("other", wrong, gm).passed


def test_inputs_beyond_the_ranges_are_made_smaller():
    """All that is rounded to an end of its range alike shows no fault."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.leave = nn.Linear(8, 8)

        def forward(self, x, t):
            return self.leave(x * (20 + t[:, None].float() / 100))

    generator = torch.Generator().manual_seed(0)
    calls = [(torch.randn(4, 8, generator=generator) / 20, torch.full((4,), t)) for t in TIMES]
    from tfmq_fx import calibrate, convert, prepare

    layer = LayerConfig(weights=WeightSpec(), activations=ActivationSpec())
    prepared = prepare(
        seeded(Narrow).eval(), calls[0], timesteps=TIMES, config="w8a8", overrides={"*": layer}
    )
    model = convert(calibrate(prepared, calls, progress=False), progress=False)
    made = reference_of(model)
    assert made.check("other", model.gm, model.gm).passed
    assert made.inputs[1][0].abs().max() < 1
    assert not made.check("other", Faulty(model.gm, "leave", one_more).run, model.gm).passed


@needs_kernels
def test_right_kernels_pass_layer_by_layer():
    for bits in (4, 8):
        assert reference(bits).wrong_layers(alone) == {}
