"""behaviour: settings, forwards and hooks of a source that change are noticed; its state is not."""

import copy
import functools
import gc
import json
import types
import weakref

import pytest
import torch
from torch import nn

from tests.toys import seeded
from tfmq_fx import (
    ConfigError,
    StaleError,
    check_source,
    compile,
    convert,
    fold_timesteps,
    load,
    prepare,
    refresh,
    save,
)
from tfmq_fx.serialization.module_settings import behaviour, differences

X, T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 1])


class Gain(nn.Module):
    """A layer with settings of many kinds, and state that only running changes."""

    limit = None  # of the class; instances may set it

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.1)
        self.act = nn.SiLU()
        self.gain, self.gains, self.order = 0.5, {"a": 2.0}, ["a"]
        self.shape_of = torch.tanh
        self.calls, self.seen, self.sizes = 0, [], {}

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(self.seen))
        y = self.drop(self.act(self.norm(self.linear(x))))
        for name in self.order:
            y = y * self.gains[name]
        y = self.shape_of(y * self.gain)
        return y if self.limit is None else y.clamp(max=self.limit)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.time = Gain(), nn.Linear(1, 4)
        self.ready = True

    def forward(self, x, t):
        return self.first(x) + self.time(t[:, None] / 10)


@pytest.fixture
def source():
    return seeded(Net).eval()


@pytest.fixture
def folded(source):
    return fold_timesteps(source, 3, (X, T))


def other_forward(self, x):
    return -x


CHANGES = {
    "a number": ("first.gain", lambda m: setattr(m.first, "gain", 0.25)),
    "an entry of a dict": ("first.gains", lambda m: m.first.gains.update(a=1.0)),
    "a list": ("first.order", lambda m: m.first.order.append("a")),
    "a function": ("first.shape_of", lambda m: setattr(m.first, "shape_of", torch.sin)),
    "what a class sets": ("first.limit", lambda m: setattr(m.first, "limit", 0.1)),
    "an epsilon": ("first.norm.eps", lambda m: setattr(m.first.norm, "eps", 1e-3)),
    "a rate of dropout": ("first.drop.p", lambda m: setattr(m.first.drop, "p", 0.7)),
    "a module": (r"first.act.(class)", lambda m: setattr(m.first, "act", nn.GELU())),
    "a forward": (
        r"first.act.(forward)",
        lambda m: setattr(m.first.act, "forward", types.MethodType(other_forward, m.first.act)),
    ),
    "a hook": (r"first.(hooks)", lambda m: m.first.register_forward_hook(lambda *_: None)),
    "a hook before": (r"time.(hooks)", lambda m: m.time.register_forward_pre_hook(lambda *_: None)),
    "a removed module": ("first.act", lambda m: m.first._modules.pop("act")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_by_name_at_each_call(source, folded, change, tmp_path):
    folded(X, T)
    name, make = CHANGES[change]
    make(source)
    for use in (
        lambda: folded(X, T),
        lambda: folded(X, T),  # not only the first time
        lambda: save(folded, tmp_path / "model"),
        lambda: compile(folded, "eager"),
    ):
        with pytest.raises(StaleError) as caught:
            use()
        assert f"behaves otherwise since: {name} was " in str(caught.value)
        assert "Prepare and convert it anew, set it back, or call" in str(caught.value)
    assert check_source(folded, source) == [name]
    with pytest.raises(ConfigError, match=r"behaves otherwise than the one that|another model"):
        refresh(folded, source)
    folded.forget_source()  # what the message says
    folded(X, T)


def test_what_is_set_back_is_fine(source, folded):
    expected = folded(X, T)
    source.first.gain = 3.0
    with pytest.raises(StaleError, match=r"first.gain was 0.5, is 3.0"):
        folded(X, T)
    source.first.gain = 0.5
    assert torch.equal(folded(X, T), expected)
    source.first.gains["a"] = source.first.gains["a"] * 0.3 / 0.3  # as adapters scale and unscale
    folded(X, T)
    handle = source.first.register_forward_hook(lambda *_: None)
    with pytest.raises(StaleError):
        folded(X, T)
    handle.remove()
    assert torch.equal(folded(X, T), expected)


def test_a_change_between_capture_and_conversion_is_noticed(source):
    prepared = prepare(source, (X, T), timesteps=3, config="fp")
    source.first.gain = 2.0
    model = fold_timesteps(source, 3, (X, T))
    with pytest.raises(StaleError, match=r"first.gain was 0.5, is 2.0"):
        convert(prepared, progress=False)(X, T)
    with torch.no_grad():  # the remedy
        assert torch.allclose(model(X, T), source(X, T))


def test_functions_are_told_apart_by_what_they_do(source):
    def scaled(by):
        return lambda x: x * by

    source.first.shape_of = scaled(2.0)
    model = fold_timesteps(source, 3, (X, T))
    source.first.shape_of = scaled(2.0)
    model(X, T)
    source.first.shape_of = scaled(3.0)
    with pytest.raises(StaleError, match=r"first.shape_of"):
        model(X, T)
    source.first.shape_of = functools.partial(torch.mul, other=2.0)
    half = fold_timesteps(source, 3, (X, T))
    source.first.shape_of = functools.partial(torch.mul, other=0.5)
    with pytest.raises(StaleError, match=r"first.shape_of"):
        half(X, T)


def test_a_forward_replaced_on_the_class_is_noticed_before_saving(source, folded, tmp_path):
    before = Gain.forward
    try:
        Gain.forward = lambda self, x: x
        with pytest.raises(StaleError, match=r"first\.\(forward\)"):
            save(folded, tmp_path / "model")
    finally:
        Gain.forward = before
    save(folded, tmp_path / "model")


# ---------------------------------------------------------------- what is no change


def test_running_the_source_is_no_change(source, folded):
    for rows in (1, 2, 5):
        source(torch.randn(rows, 4), torch.ones(rows, dtype=torch.int64))
        source.first.sizes[rows] = "kept"  # a cache that somebody else fills
        folded(X, T)
    source.unrelated, source.first.note = 3, "new"
    folded(X, T)
    folded.watch.check_contents()


def test_casts_and_training_are_no_change(source):
    model = fold_timesteps(source, 3, (X, T))
    source.train()  # a model is captured in eval mode whichever it is in
    model(X, T)
    source.to(torch.float64)
    model(X, T)


def test_a_model_captured_in_training_mode_may_leave_it(source):
    model = fold_timesteps(source.train(), 3, (X, T))  # the graph is of eval mode all the same
    model(X, T)
    source.eval()
    model(X, T)


def test_hooks_that_move_weights_are_no_change(source, folded):
    hooks = pytest.importorskip("accelerate.hooks")
    for module in (source.first, source.time):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    source(X, T)
    folded(X, T)
    folded.watch.check_contents()


def test_nothing_is_kept_alive():
    source = seeded(Net).eval()
    source.first.keeper = functools.partial(len, [source])  # holds the model itself
    model = fold_timesteps(source, 3, (X, T))
    model(X, T)
    alive = weakref.ref(source.first)
    del source
    gc.collect()
    assert alive() is None
    model(X, T)


def test_what_is_recorded_is_json_and_survives_saving(source, folded, tmp_path):
    recorded = behaviour(source)
    assert json.loads(json.dumps(recorded)) == recorded
    assert recorded["first"]["gain"] == 0.5 and recorded["first.norm"]["eps"] == 1e-5
    assert not {"calls", "seen"} & set(recorded["first"])  # what forward writes
    assert differences(recorded, copy.deepcopy(source)) == {}
    save(folded, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert check_source(loaded, source) == []
    source.first.gain = 0.75
    assert check_source(loaded, source) == ["first.gain"]
    with pytest.raises(ConfigError, match=r"first.gain was 0.5, is 0.75"):
        refresh(loaded, source)


def test_pipelines_and_diffusers_own_state_are_no_change():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    source = seeded(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=20,
    ).eval()
    model = fold_timesteps(source, 3)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1, 1]), torch.tensor([3, 5]))
    names = ("hidden_states", "timestep", "class_labels")
    call = dict(zip(names, inputs, strict=True))

    for act in (
        lambda: source(**call),
        lambda: DiTPipeline(source, None, DDIMScheduler()),
        lambda: source.enable_gradient_checkpointing(),
        lambda: source.requires_grad_(False),
        lambda: source.register_to_config(sample_size=16),
    ):
        act()
        model(**call)
        model.watch.check_contents()
    source.register_to_config(norm_eps=1.0)
    with pytest.raises(StaleError, match=r"_internal_dict"):
        model(**call)


def test_the_scale_of_an_adapter_is_watched():
    pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    source = seeded(
        UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    source.add_adapter(lora, adapter_name="a")
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 8)
    call = {"sample": x, "timestep": torch.tensor([3, 3]), "encoder_hidden_states": text}
    model = fold_timesteps(source, 5, call)
    source(**call, cross_attention_kwargs={"scale": 0.3})  # scales its adapters, and back again
    model(**call)
    for change, back in (
        (lambda: source.set_adapters("a", 0.3), lambda: source.set_adapters("a", 1.0)),
        (source.disable_adapters, source.enable_adapters),
    ):
        change()
        with pytest.raises(StaleError, match=r"to_q\.(scaling|_disable_adapters) was"):
            model(**call)
        back()
        model(**call)
    layer = source.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.scale_layer(0.5)
    with pytest.raises(StaleError, match=r"to_q\.scaling was .*4\.0.* is .*2\.0"):
        model(**call)
    layer.unscale_layer(0.5)
    model(**call)
    layer.merge()
    with pytest.raises(StaleError, match=r"has other weights since: .*to_q\.base_layer\.weight"):
        model(**call)
