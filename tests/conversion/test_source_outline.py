"""A model answers for what its source has besides the graph, and refuses what it cannot follow."""

import collections
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from tests.toys import seeded
from tfmq_fx import FrozenError, bind_request, compile, fold_timesteps, load, prepare, save
from tfmq_fx.conversion.source_outline import SourceOutline

X, T = torch.randn(2, 4), torch.tensor([3, 7])


class Rope(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = 10.0
        self.register_buffer("scale", torch.tensor([1.0, 2.0]), persistent=False)

    def coordinates(self, count):
        return torch.arange(count)[:, None] / self.base * self.scale


class Processor:
    def __init__(self):
        self.scale = [1.0]


class Net(nn.Module):
    version = 3

    def __init__(self):
        super().__init__()
        self.width, self.heads, self.sizes = 4, (2, 2), [1, 2]
        self.kept_dtype, self.nothing_yet = torch.float16, None
        # names that our own classes use
        self.spec = self.conditions = self.record = self.recipe = self.origin = "source"
        self.prologue = self.step = self.backend = self.check = self.cache = "source"
        self.rope, self.out = Rope(), nn.Linear(4, 4)
        self.rope.processor = Processor()
        self.gain = nn.Parameter(torch.full((4,), 2.0))
        self.shifts = {"a": [1]}

    @property
    def double_width(self):
        return 2 * self.width

    @classmethod
    def named(cls):
        return cls.__name__

    def post_process(self, x):
        return x * self.gain

    def project(self, x):
        return self.out(x)

    def weight(self):
        return self.out.weight

    def fuse(self):
        self.fused = True

    def fuse_inside(self):
        for part in self.modules():
            if hasattr(part, "processor"):
                part.processor.scale = [2.0]

    def fuse_list(self):
        self.rope.processor.scale[0] = 2.0

    def fuse_dict(self):
        self.shifts["b"] = []

    def hook(self):
        self.out.register_forward_hook(print)

    def replace(self):
        self.rope = Rope()

    def again(self):
        self.width = 4

    def forward(self, x, t):
        return self.out(x) + t[:, None].float() / self.width


def forms(net, folder):
    exact = fold_timesteps(net, 10, (X, T))
    bound = bind_request(exact, 5)
    save(bound, folder)
    here = (prepare(net, (X, T), timesteps=10), exact, bound, compile(exact, "eager"))
    return here, (load(folder), pickle.loads(pickle.dumps(exact)))


def test_plain_attributes_survive_every_form(tmp_path):
    here, loaded = forms(seeded(Net).eval(), tmp_path / "model")
    for model in (*here, copy.deepcopy(here[1]), *loaded):
        assert (model.width, model.heads, model.sizes) == (4, (2, 2), [1, 2])
        assert model.kept_dtype is torch.float16 and model.nothing_yet is None
        assert model.shifts == {"a": [1]}
        assert not hasattr(model, "no_such_thing")
        assert getattr(model, "peft_config", "none") == "none"
    for model in here:
        assert model.double_width == 8 and model.version == 3 and model.named() == "Net"


def test_methods_that_compute_work_without_the_source(tmp_path):
    net = seeded(Net).eval()
    gone = weakref.ref(net)
    expected = net.rope.coordinates(3), net.post_process(X)
    here, _ = forms(net, tmp_path / "model")
    here = here[1:]  # a prepared model has its source
    del net
    gc.collect()
    assert gone() is None
    for model in here:
        assert torch.equal(model.rope.coordinates(3), expected[0])
        assert torch.equal(model.post_process(X), expected[1])
        half = copy.deepcopy(model) if model is here[0] else None
        if half is not None:
            assert half.to(torch.bfloat16).post_process(X.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "name", ["fuse", "fuse_inside", "fuse_list", "fuse_dict", "hook", "replace", "train"]
)
def test_methods_that_would_change_the_source_are_refused(name):
    net = seeded(Net).eval()
    net.drop = nn.Dropout(0.5)
    net.out = nn.Sequential(net.out, net.drop)
    model = bind_request(net, example_inputs=(X, T))
    before = copy.deepcopy(vars(net))
    assert callable(getattr(model, name))
    with pytest.raises(FrozenError, match="source"):
        getattr(model, name)()
    assert vars(net).keys() == before.keys() and net.rope.processor.scale == [1.0]
    model.again()  # changes nothing, here or there
    assert model(X, T).shape == X.shape


@pytest.mark.parametrize("name", ["project", "weight"])
def test_methods_that_need_weights_are_refused(name):
    model = fold_timesteps(seeded(Net).eval(), 10, (X, T))
    with pytest.raises(FrozenError, match=f"{name}\\(\\).*weights"):
        getattr(model, name)(*([X] if name == "project" else []))


def test_parts_answer_for_their_structure_and_cannot_be_called_or_changed():
    net = seeded(Net).eval()
    model = fold_timesteps(net, 10, (X, T))
    assert isinstance(model.rope, Rope) and model.rope.base == 10.0
    assert isinstance(model.out, nn.Linear) and torch.equal(model.out.weight, net.out.weight)
    with pytest.raises(FrozenError, match=r"Rope.base cannot be set"):
        model.rope.base = 1.0
    with pytest.raises(FrozenError, match=r"list or dict"):
        model.sizes.append(3)
    with pytest.raises(FrozenError, match=r"Rope.base cannot be deleted"):
        del model.rope.base


def test_attributes_that_the_source_had_cannot_be_set_and_others_can(tmp_path):
    here, loaded = forms(seeded(Net).eval(), tmp_path / "model")
    for model in (*here, *loaded):
        with pytest.raises(FrozenError, match=r"width"):
            model.width = 5
        model.width = 4
        model.note = "mine"  # as hooks of accelerate do
        assert model.note == "mine" and model.width == 4
    with pytest.raises(FrozenError, match=r"rope"):
        here[0].rope = None


def test_a_loaded_model_names_what_it_lacks(tmp_path):
    _, loaded = forms(seeded(Net).eval(), tmp_path / "model")
    for model in loaded:
        assert not hasattr(model, "post_process")
        with pytest.raises(FrozenError, match=r"'post_process'.*Net.*width.*before it is captured"):
            model.post_process(X)


def test_training_mode_is_refused_where_layers_would_follow_it():
    net = seeded(Net).eval()
    assert fold_timesteps(net, 10, (X, T)).train().training
    net.out = nn.Sequential(net.out, nn.Dropout(0.5))
    with pytest.raises(FrozenError, match=r"out.1 \(Dropout\).*eval mode"):
        fold_timesteps(net, 10, (X, T)).train()


def test_the_configuration_can_be_replaced_as_diffusers_does(tmp_path):
    model = fold_timesteps(seeded(Net).eval(), 10, (X, T))
    model.register_to_config(sample_size=8)
    assert model.config.sample_size == 8 and model._internal_dict["sample_size"] == 8
    model._internal_dict = {**model.config, "sample_size": 64}
    save(model, tmp_path / "model")
    assert load(tmp_path / "model").config.sample_size == 64


def capturing(value):
    return lambda: value


def test_what_leads_back_to_the_source_is_left_out():
    net = seeded(Net).eval()
    gone = weakref.ref(net)
    net.method, net.function, net.itself = net.fuse, capturing(net), [net]
    outline = SourceOutline.of(net)
    del net
    gc.collect()
    assert gone() is None
    with pytest.raises(AttributeError):
        outline.get("method")
    with pytest.raises(AttributeError):
        outline.get("function")


Point = collections.namedtuple("Point", "x y")


class Link:
    following = None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
def test_any_attribute_may_lie_on_a_model():
    """What cannot be copied is left out: locks, chains that are too long, scripted parts."""
    net = seeded(Net).eval()
    net.lock, net.generator, net.library = threading.Lock(), torch.Generator(), torch
    net.chain = link = Link()
    net.deep = level = []
    for _ in range(3000):
        link.following, inner = Link(), []
        level.append(inner)
        link, level = link.following, inner
    net.scripted, net.point = torch.jit.script(nn.ReLU()), Point(1, 2)
    net.queue = collections.deque([1])
    outline = SourceOutline.of(net)
    assert outline.get("point") == Point(1, 2) and outline.get("chain").following is not None
    for name in ("lock", "generator", "library", "scripted", "queue", "deep"):
        with pytest.raises(AttributeError):
            outline.get(name)
    assert "deep" not in outline.attributes
