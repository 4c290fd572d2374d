"""admission: models that no graph can be made of are told, and what to pass instead works."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tfmq_fx import fold_timesteps, prepare, refresh, verify
from tfmq_fx.capture.model_checks import check_model, unwrapped
from tfmq_fx.core.errors import CaptureError, ConfigError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.e = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(1, 16)

    def forward(self, x, t):
        return self.b(torch.tanh(self.a(x) + self.e(t[:, None].to(x.dtype) / 1000)[:, None]))


class Passes(nn.Module):
    """A wrapper of somebody's own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Peft(nn.Module):
    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


X, T = torch.randn(2, 5, 6), torch.tensor([900, 900])
WRAPPERS = [
    (AveragedModel, "module"),
    (nn.DataParallel, "module"),
    (compiled, "_orig_mod"),
    (lambda model: nn.DataParallel(compiled(model)), "module._orig_mod"),
    (Peft, "base_model"),
]


def answer(model, given=(X, T)):
    """Whether a graph of the model says what the model says."""
    folded = fold_timesteps(model, [900, 500], given)
    return torch.allclose(folded(X, T), model(X, T), rtol=0, atol=1e-5)  # batches of two: sums


@pytest.mark.parametrize("given", [(X, T), {"x": X, "t": T}], ids=["tuple", "dict"])
@pytest.mark.parametrize("wrap, path", WRAPPERS, ids=[path for _, path in WRAPPERS])
def test_wrappers_are_named_and_what_is_inside_works(wrap, path, given):
    wrapped = wrap(Net().eval()).eval()
    with pytest.raises(ConfigError, match=rf"is a wrapper: pass the model inside, model\.{path}$"):
        prepare(wrapped, given)
    inside = unwrapped(wrapped)
    assert type(inside) is Net and inside is wrapped.get_submodule(path)
    assert answer(inside, given)


def test_wrappers_of_other_makes():
    net = Net().eval()
    with pytest.raises(ConfigError, match=r"takes 0: . To prepare .*, pass model\.inner"):
        prepare(Passes(net), (X, T))
    with pytest.raises(ConfigError, match=r"takes 1: input. To prepare .*, pass model\[0\]"):
        prepare(nn.Sequential(net), (X, T))
    by_name = fold_timesteps(Passes(net).eval(), [900, 500], {"x": X, "t": T})
    assert torch.equal(by_name(x=X[:1], t=900), net(X[:1], T[:1]))
    with pytest.raises(ValueError, match=r"2 positional arguments .*give the others by name: x, t"):
        by_name(X, 900)


def test_a_model_compiled_in_place_is_itself():
    net = Net().eval()
    net.compile(backend="eager")
    net(X, T)
    assert answer(net)


def test_a_pipeline_may_hold_the_model_compiled():
    from tests.calibration.test_sampling_pass import Pipeline
    from tfmq_fx.calibration.sampling_pass import with_denoiser

    net, other = Net(), Net()
    pipe = Pipeline(compiled(net), None)
    assert with_denoiser(pipe, net, other).components["unet"] is other


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripts_averages_and_what_is_no_model():
    import diffusers

    net = Net().eval()
    with pytest.raises(ConfigError, match="has no Python code: pass the model that it was script"):
        prepare(torch.jit.trace(net, (X, T)), (X, T))
    average = diffusers.training_utils.EMAModel(net.parameters())
    with pytest.raises(ConfigError, match=r"got EMAModel: .*copy_to\(model.parameters\(\)\)$"):
        prepare(average, (X, T))
    average.copy_to(net.parameters())
    assert answer(net)
    with pytest.raises(ConfigError, match=r"must be a torch.nn.Module, got str$"):
        check_model("unet")


class Coded(torch.Tensor):
    """A tensor that a library computes with in its own way."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(nn.Parameter):
    """A parameter with a name of its own and nothing else."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quantized_models_are_named():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    sources = Net().eval()
    torchao = copy.deepcopy(sources)
    quantize_(torchao, Int8WeightOnlyConfig(), filter_fn=lambda _, path: path == "b")
    with pytest.raises(
        ConfigError, match=r"^b.weight is a Int8Tensor of torchao, .* before it was"
    ):
        prepare(torchao, (X, T))
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(sources), {nn.Linear})
    with pytest.raises(
        ConfigError, match=r"^a is a Linear of torch.ao, .* before it was quantized"
    ):
        prepare(dynamic, (X, T))
    own = copy.deepcopy(sources)
    own.a.register_buffer("scale", torch.ones(1).as_subclass(Coded))
    with pytest.raises(ConfigError, match=r"^a.scale is a Coded of tests, "):
        prepare(own, (X, T))
    assert answer(sources)


def test_parameters_of_a_class_of_their_own_are_fine():
    net = Net().eval()
    net.a.weight = Plain(net.a.weight.detach())
    assert answer(net)


@pytest.mark.parametrize("to_disk", [False, True])
def test_offloaded_weights_are_named_and_can_be_brought_back(to_disk, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    net = Net().eval()
    cpu = torch.device("cpu")
    if to_disk:
        accelerate.disk_offload(net, str(tmp_path), execution_device=cpu)
    else:
        accelerate.cpu_offload(net, execution_device=cpu)
    with pytest.raises(CaptureError, match=r"remove_hook_from_submodules\(model\)"):
        prepare(net, (X, T))
    accelerate.hooks.remove_hook_from_submodules(net)
    assert answer(net)


def test_weights_without_content_are_named():
    net = Net().eval()
    net.b = net.b.to("meta")
    with pytest.raises(
        ConfigError, match=r"^b.weight is on the meta device, .* and a.weight is no"
    ):
        prepare(net, (X, T))
    check_model(Net().to("meta"))  # the whole of it: to be analyzed


def test_weights_of_a_wrapped_model_are_taken_from_inside():
    net = Net().eval()
    folded = fold_timesteps(net, [900, 500], (X, T))
    with pytest.raises(ConfigError, match=r"pass the model inside, model\._orig_mod$"):
        refresh(folded, compiled(net))
    assert torch.equal(refresh(folded, unwrapped(compiled(net)))(X, 500), folded(X, 500))
    with pytest.raises(ConfigError, match=r"pass the model inside, model\.module$"):
        verify(nn.DataParallel(net), folded)
