"""overrides: what was put in the place of a layer's own code is captured, or refused by name."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tfmq_fx import (
    CaptureError,
    CoverageWarning,
    StaleError,
    convert,
    fold_timesteps,
    prepare,
    refresh,
    report,
)
from tfmq_fx.core.module_overrides import has_hooks, is_plain, replaced_forward
from tfmq_fx.quant.sqnr import sqnr

STEPS = [900, 1]


class Net(nn.Module):
    """Three convolutions, the middle one for tests to change, and a temporal block."""

    def __init__(self, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.time = nn.Linear(1, 16)
        self.middle = nn.Conv2d(16, 16, 3, padding=1) if middle is None else middle

    def forward(self, x, t):
        h = self.enter(x) + self.time(t[:, None].to(x.dtype) / 1000)[:, :, None, None]
        return self.leave(self.middle(h.sigmoid()).sigmoid())


def example(batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.tensor(STEPS[:batch])


def quantized(net):
    return convert(prepare(net, example(), config="w8a8-dynamic", timesteps=STEPS), progress=False)


def replace(net, forward):
    net.middle.forward = forward
    return net.middle.weight


def doubled(net):
    old = net.middle.forward
    return replace(net, lambda h: 2 * old(h))


def low_rank(net):
    old, down, up = net.middle.forward, nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
    replace(net, lambda h: old(h) + up(down(h)))
    return up.weight


def low_rank_inside(net):
    old = net.middle.forward
    net.down, net.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
    replace(net, lambda h: old(h) + net.up(net.down(h)))
    return net.up.weight


def bound(net):
    def forward(self, h):
        return nn.Conv2d.forward(self, h) * 3

    return replace(net, types.MethodType(forward, net.middle))


def partial(net):
    def forward(layer, factor, h):
        return F.conv2d(h, layer.weight, layer.bias, padding=1) * factor

    return replace(net, functools.partial(forward, net.middle, 3))


def accelerated(net):
    hooks = pytest.importorskip("accelerate.hooks")

    class Triple(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 3

    hooks.add_hook_to_module(net.middle, Triple())
    return net.middle.weight


def tiled(net):
    def wrap(self, x, weight, bias):
        x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    net.middle._conv_forward = wrap.__get__(net.middle, nn.Conv2d)
    return net.middle.weight


def padded_otherwise(net):
    net.middle.padding_mode = "circular"
    net.middle._reversed_padding_repeated_twice = [2, 0, 1, 1]
    return net.middle.weight


def circular(net):
    net.middle.padding_mode = "circular"
    return net.middle.weight


def normed(net):
    parametrizations.weight_norm(net.middle)
    return net.middle.parametrizations.weight.original0


def spectral(net):
    parametrizations.spectral_norm(net.middle)
    return net.middle.parametrizations.weight.original


def normed_by_hook(net):
    with pytest.warns(FutureWarning):
        weight_norm(net.middle)
    return net.middle.weight_g


def spectral_by_hook(net):
    spectral_norm(net.middle)
    return net.middle.weight_orig


class Scaled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Standardized(nn.Conv2d):
    """A subclass with a _conv_forward of its own."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.std(), bias)


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""


def subclass(kind, net):
    net.middle = kind(16, 16, 3, padding=1)
    return net.middle.weight


PATCHES = [doubled, low_rank, low_rank_inside, bound, partial, accelerated]
INSIDE = [
    tiled,
    padded_otherwise,
    circular,
    normed,
    spectral,
    normed_by_hook,
    spectral_by_hook,
    *(functools.partial(subclass, kind) for kind in (Scaled, Standardized, Renamed)),
]


def name_of(change):
    return change.args[0].__name__ if isinstance(change, functools.partial) else change.__name__


@pytest.fixture
def patched(request):
    net = Net()
    source = request.param(net)
    return net.eval(), source


@torch.no_grad()
def check_answers(net, *models):
    x, t = example(1)
    for model in models:
        assert sqnr(net(x, t), model(x, t)) > 30


@pytest.mark.parametrize("patched", PATCHES, indirect=True, ids=name_of)
def test_a_replaced_forward_is_captured_and_its_layer_declined(patched):
    net, source = patched
    with pytest.warns(CoverageWarning, match=r"middle \(its forward was replaced on the instance"):
        model = quantized(net)
    check_answers(net, model)
    assert ["middle", "its forward was replaced on the instance"] in model.record["declined"]
    assert 0.25 < report(model).weight_coverage < 0.35
    with torch.no_grad():
        x, t = example(1)
        assert torch.equal(fold_timesteps(net, STEPS, example())(x, t), net(x, t))
        source.mul_(1.5)
        with pytest.raises(StaleError):
            model(x, t)


@pytest.mark.parametrize("patched", INSIDE, indirect=True, ids=name_of)
def test_a_convolution_with_other_weights_or_padding_is_quantized_as_it_is(patched):
    net, source = patched
    model = quantized(net)
    check_answers(net, model)
    assert report(model).weight_coverage == 1 and not model.record["declined"]
    assert set(model.record["sites"]) == {"enter", "middle", "leave"}
    with torch.no_grad():
        x, t = example(1)
        assert torch.equal(fold_timesteps(net, STEPS, example())(x, t), net(x, t))
        source.mul_(1.5)
        with pytest.raises(StaleError):
            model(x, t)
    check_answers(net, refresh(model, net, progress=False))


def test_a_class_whose_forward_was_replaced(monkeypatch):
    old = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * old(self, x))
    net = Net().eval()
    assert replaced_forward(net.middle) == "the forward of Conv2d was replaced"
    with pytest.raises(
        ValueError, match=r"nothing of this model can be quantized: .*config=\"fp\""
    ):
        quantized(net)
    with torch.no_grad():
        x, t = example(1)
        assert torch.equal(fold_timesteps(net, STEPS, example())(x, t), net(x, t))


def test_hooks_for_all_modules_are_refused():
    def triple(module, args, output):
        return output * 3

    handle = nn.modules.module.register_module_forward_hook(triple)
    try:
        with pytest.raises(CaptureError, match=r"hook .*triple is registered for all modules"):
            quantized(Net().eval())
    finally:
        handle.remove()
    assert report(quantized(Net().eval())).weight_coverage == 1


def test_layers_with_hooks_keep_them_and_are_declined():
    net = Net().eval()
    net.middle.register_forward_hook(
        lambda module, args, kwargs, output: output * 3, with_kwargs=True
    )
    assert has_hooks(net.middle) and is_plain(net.middle)
    with pytest.warns(CoverageWarning, match=r"middle \(it has hooks\)"):
        model = quantized(net)
    check_answers(net, model)
    assert model.record["declined"] == [["middle", "it has hooks"]]


def test_offloaded_models_are_refused_with_what_to_do():
    accelerate = pytest.importorskip("accelerate")
    net = accelerate.cpu_offload(Net().eval(), execution_device=torch.device("cpu"))
    with pytest.raises(CaptureError, match=r"AlignDevicesHook .*remove_hook_from_submodules"):
        quantized(net)
    accelerate.hooks.remove_hook_from_submodules(net)
    check_answers(net, quantized(net))


def test_hooks_that_keep_state_or_cast_are_refused_with_what_to_do():
    hooks = pytest.importorskip("diffusers.hooks")

    class Remembers(hooks.ModelHook):
        _is_stateful = True

        def reset_state(self, module):
            return module

    net = Net().eval()
    registry = hooks.HookRegistry.check_if_exists_or_initialize(net.middle)
    registry.register_hook(Remembers(), "remembers")
    with pytest.raises(CaptureError, match=r"middle: its hook 'remembers' .*remove_hook\(name\)"):
        quantized(net)
    registry.remove_hook("remembers")
    check_answers(net, quantized(net))
    hooks.apply_layerwise_casting(net, torch.float8_e4m3fn, torch.bfloat16)
    with pytest.raises(CaptureError, match="enter: its hook 'layerwise_casting'"):
        quantized(net)


def test_the_model_is_in_training_mode_again_after_it_was_captured():
    net = Net()
    doubled(net)
    net.middle.eval()
    with pytest.warns(CoverageWarning):
        quantized(net)
    assert net.training and net.enter.training and not net.middle.training


class Holder(nn.Module):
    """A module whose forward is a function that reaches its children by a closure."""

    def __init__(self, blocks, function):
        super().__init__()
        self.blocks, self.function = nn.ModuleList(blocks), function

    def forward(self, x, t):
        return self.function(x, t)


def test_a_closure_over_children_has_their_names():
    torch.manual_seed(0)
    time, enter, norm, leave = (
        nn.Linear(1, 32),
        nn.Linear(8, 32),
        nn.BatchNorm1d(32),
        nn.Linear(32, 8),
    )
    net = Holder(
        [time, enter, norm, leave],
        lambda x, t: leave(norm(enter(x)) * time(t[:, None] / 1000).sigmoid()),
    )
    before = norm.running_mean.clone()
    inputs = torch.randn(2, 8), torch.tensor(STEPS)
    prepared = prepare(net, inputs, config="w8a8-dynamic", timesteps=STEPS)
    model = convert(prepared, progress=False)
    assert list(model.record["sites"]) == ["blocks.1", "blocks.3"]
    assert report(model).weight_coverage == 1
    assert net.training and torch.equal(norm.running_mean, before)
    net.eval()
    with torch.no_grad():
        assert sqnr(net(*inputs), model(*inputs)) > 30
        enter.weight.mul_(2)
        with pytest.raises(StaleError, match=r"blocks\.1\.weight"):
            model(*inputs)
        assert sqnr(net(*inputs), refresh(model, net, progress=False)(*inputs)) > 30
