"""gradients: those of converted models are the float model's, up to the noise of rounding; what has
none says so."""

import dataclasses

import pytest
import torch

from tests.adapters import Denoiser
from tests.toys import ToyUNet, seeded
from tfmq_fx import PRESETS, InputError, bind_request, calibrate, compile, convert, prepare

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 5])


def gradient(model, x=X, t=T):
    given = x.clone().requires_grad_()
    return torch.autograd.grad(model(given, t).square().sum(), given)[0]


@pytest.fixture(scope="module")
def source():
    return seeded(ToyUNet).eval().requires_grad_(False)


def converted(source, recipe):
    config = PRESETS[recipe]
    temporal = dataclasses.replace(config.temporal, tiar_iters=0)
    config = dataclasses.replace(config, temporal=temporal)
    prepared = prepare(source, (X, T), timesteps=[1, 5], config=config)
    data = [(X, T), (X, torch.tensor([1, 1]))]
    return prepared, convert(calibrate(prepared, data, progress=False), progress=False)


# of the gradient's norm; the outputs of these recipes are off by about a third of this
NOISE = {"fp": 1e-5, "w8a8": 0.2, "w8a8-dynamic": 0.2, "w4a8": 0.5, "fp8-dynamic": 0.25}


@pytest.mark.parametrize("recipe", NOISE)
def test_gradients_pass_straight_through_the_rounding(source, recipe):
    _, model = converted(source, recipe)
    wanted, found = gradient(source), gradient(model)
    assert (found - wanted).norm() <= NOISE[recipe] * wanted.norm()
    with torch.no_grad():  # rounding with a gradient is the same rounding
        expected = model(X, T)
    assert torch.equal(model(X.clone().requires_grad_(), T).detach(), expected)


def test_what_has_no_gradient_says_so(source):
    prepared, model = converted(source, "w8a8")
    for other, why in (
        (prepared, "a prepared model only observes"),
        (compile(model, "eager"), r"a compiled model is for inference.*Call the converted model"),
    ):
        given = X.clone().requires_grad_()
        answer = other(given, T)  # who wants no gradient is not kept from calling
        with torch.no_grad():
            assert torch.equal(answer, other(X, T))
        with pytest.raises(InputError, match=why):
            (answer.sum() + given.sum()).backward()


def test_gradients_of_what_a_table_or_a_request_fixes_are_refused():
    source = seeded(Denoiser).eval().requires_grad_(False)
    x, t = torch.randn(2, 4), torch.tensor([1.0, 1.0])
    folded = convert(prepare(source, (x, t), timesteps=[1.0, 2.0], config="fp"), progress=False)
    bound = bind_request(source, [1.0, 2.0], (x, t))
    assert not bound.prologue.parts  # its rows outweigh its weights: there is a gradient
    wanted, found = (
        torch.autograd.grad(model(x, given).sum(), given)[0]
        for model in (source, bound)
        for given in [t.clone().requires_grad_()]
    )
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    for model in (folded, bind_request(folded, [1.0, 2.0])):
        assert (gradient(model, x, t) - gradient(source, x, t)).norm() < 1e-5
        answer = model(x, t.clone().requires_grad_())
        with pytest.raises(InputError, match=r"t: no gradient with respect to .* Detach it"):
            answer.sum().backward()
