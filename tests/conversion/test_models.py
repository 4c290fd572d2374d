"""modules: what users hold behaves as a torch module and is called like the original."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from tests.test_api import TIMES, calibrated, data, fast
from tests.toys import ToyUNet, seeded, tiny_unet2d
from tfmq_fx import compile, convert, fold_timesteps, load, prepare, save
from tfmq_fx.conversion.graph_model import ModelConfig, retarget
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.core.stages import stage_of
from tfmq_fx.ir.verifier import check
from tfmq_fx.quant.modules import QuantConv2d
from tfmq_fx.quant.timestep_table import QuantTimestepTable
from tfmq_fx.serialization.removed_layers import Removed


@pytest.fixture(scope="module")
def toy():
    return seeded(ToyUNet).eval()


@pytest.fixture(scope="module")
def prepared(toy):
    return calibrated(toy, 8, fast("w8a8"))


@pytest.fixture(scope="module")
def model(prepared):
    return convert(prepared, progress=False)


@pytest.fixture(scope="module")
def unet():
    return fold_timesteps(tiny_unet2d(), TIMES)


def test_a_saved_config_answers_by_key_and_by_attribute():
    config = ModelConfig(in_channels=3, sample_size=16)
    assert config["in_channels"] == config.in_channels == 3
    assert config.get("nothing") is None and dict(config) == {"in_channels": 3, "sample_size": 16}
    assert getattr(config, "nothing", 7) == 7
    with pytest.raises(AttributeError, match="the model's config has no 'nothing'"):
        _ = config.nothing
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_they_know_dtype_device_timesteps_and_config(model, unet, prepared):
    assert model.dtype == unet.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.timesteps.tolist() == list(TIMES) == prepared.timesteps.tolist()
    assert model.config is None and unet.config.in_channels == 3
    assert not model.training and not prepared.training


def test_bytes_count_shared_tensors_once():
    folded = fold_timesteps(seeded(ToyUNet).eval(), TIMES, data(8)[0])
    before = folded.nbytes()
    folded.gm.again = nn.Module()
    folded.gm.again.weight = nn.Parameter(folded.gm.conv_in.weight.data)
    assert folded.nbytes() == before


def test_the_graph_is_open_to_inspection(model, capsys):
    model.print_readable()
    text = capsys.readouterr().out
    assert "timestep_row" in text and "conv_in" in text
    assert isinstance(model.gm.conv_in, QuantConv2d)
    assert model.conv_in is model.gm.conv_in  # as on the original
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    assert "stage=quantized, recipe=w8a8" in repr(model)


def test_the_users_model_is_no_part_of_the_prepared_one(prepared, toy):
    assert prepared.source is toy
    assert not any(m is toy for m in prepared.modules())
    assert not any(key.startswith("_source") for key in prepared.state_dict())


def test_prepared_models_compute_without_gradients(prepared):
    x, t = data(8)[0]
    assert not prepared(x, t).requires_grad
    with pytest.raises(InputError, match="gradient"):
        prepared(x.clone().requires_grad_(), t).sum().backward()


@pytest.mark.parametrize("move", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_prepared_models_do_not_move(toy, move):
    prepared = calibrated(toy, 8, fast("w8a8"))
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    with pytest.raises(ConfigError, match="Move the model before prepare"):
        prepared.to(**move)
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())
    convert(prepared.to("cpu", torch.float32), progress=False)


@pytest.mark.parametrize("move", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_moving_a_model_moves_no_other(toy, move):
    given, x = toy.state_dict(), torch.randn(2, 3, 8, 8)
    prepared = calibrated(toy, 8, fast("w8a8"))
    first, second = (convert(prepared, progress=False) for _ in range(2))
    expected = second(x, TIMES[1])
    copied = copy.deepcopy(prepared.gm.state_dict())
    first.to(**move)
    assert {t.dtype for t in first.parameters()} <= {move.get("dtype", torch.float32)}
    assert torch.equal(second(x, TIMES[1]), expected)
    assert torch.equal(convert(prepared, progress=False)(x, TIMES[1]), expected)
    for state, before in [(prepared.gm.state_dict(), copied), (toy.state_dict(), given)]:
        assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_batched_inputs_are_told_from_the_others(prepared):
    assert prepared.batched() == [True, True]


def test_state_dicts_go_from_one_model_to_a_copy(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.gm.conv_in.codes.zero_()
    x, t = data(8)[0]
    assert not torch.equal(other(x, t), model(x, t))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, t), model(x, t))


def test_pickling_keeps_everything(model):
    x, t = data(8)[0]
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x, t), model(x, t))
    assert again.recipe == model.recipe and again.record == model.record
    check(again.gm, stage_of(model.gm))  # values and names too: it can be saved and verified
    assert [n.name for n in again.gm.graph.nodes] == [n.name for n in model.gm.graph.nodes]
    with pytest.raises(InputError, match="not among"):
        again(x, 7)


def test_copies_keep_config_record_and_recipe(unet):
    other = copy.deepcopy(unet)
    assert other.recipe == unet.recipe and other.record == unet.record
    assert other.record is not unet.record
    assert other.config.in_channels == 3
    x, t = data(16)[0]
    assert torch.equal(other(x, t).sample, unet(x, t).sample)


@pytest.mark.parametrize("method", ["half", "bfloat16", "double"])
def test_casting_keeps_keys_and_scales(model, method):
    cast = getattr(copy.deepcopy(model), method)()
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[method]
    gm = cast.gm
    assert gm.temporal_keys.dtype == torch.int64
    assert gm.activation_scales.dtype == torch.float32
    assert gm.temporal_table.dtype == gm.norm_out.weight.dtype == dtype
    assert gm.conv_in.codes.dtype == torch.uint8 and gm.conv_in.weight_scale.dtype == torch.float32
    assert torch.equal(gm.activation_scales, model.gm.activation_scales)
    x, t = data(8)[0]
    assert cast(x.to(dtype), t).dtype == dtype == cast.dtype
    back = cast.float()
    assert back.dtype == torch.float32 and back(x, t).dtype == torch.float32


def test_float_keys_keep_their_dtype(toy):
    x = torch.randn(2, 3, 8, 8)
    folded = fold_timesteps(toy, [0.25, 0.1], (x, torch.tensor([0.25, 0.25])))
    half = copy.deepcopy(folded).half()
    assert half.gm.temporal_keys.dtype == torch.float64
    # 0.1 is no float16: had the key been rounded, this call would miss it
    assert half(x.half(), torch.tensor([0.1, 0.25])).dtype == torch.float16


def test_cached_rows_keep_their_scales(toy):
    done = convert(calibrated(toy, 8, fast("w8a8", mode="cache")), progress=False)
    (table,) = [m for m in done.gm.modules() if isinstance(m, QuantTimestepTable)]
    done.half()
    assert table.scale.dtype == torch.float32 and table.dtype == torch.float16
    x, t = data(8)[0]
    assert done(x.half(), t).dtype == torch.float16


def test_half_precision_is_saved_and_loaded(model, tmp_path):
    half = copy.deepcopy(model).half()
    save(half, tmp_path / "model")
    loaded = load(tmp_path / "model")
    x, t = data(8)[0]
    assert loaded.dtype == torch.float16
    assert torch.equal(loaded(x.half(), t), half(x.half(), t))
    with pytest.raises(InputError, match=r"captured for torch\.float16, got torch\.float32"):
        loaded(x, t)


def test_moving_retargets_constants_in_the_graph():
    graph = fx.Graph()
    x = graph.placeholder("x")
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    ones = graph.call_function(torch.ones, ((2,),), options)
    cast = graph.call_method("to", (x, torch.float32))
    kept = graph.call_method("to", (cast, torch.int64))
    graph.output((ones, kept))
    gm = fx.GraphModule(nn.Module(), graph)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    retarget(gm, (cpu, torch.float32), (meta, torch.float16))
    assert ones.kwargs == {"device": meta, "dtype": torch.float16}
    assert cast.args[1] == torch.float16 and kept.args[1] == torch.int64
    assert gm(torch.ones(1))[0].is_meta


def test_a_model_on_the_meta_device_keeps_its_shapes(model):
    moved = copy.deepcopy(model).to("meta")
    assert moved.device.type == "meta" and moved.gm.conv_in.codes.is_meta
    assert moved.timesteps.is_meta


def test_compiled_models_answer_as_their_converted_one(model):
    compiled = compile(model, "eager")
    assert compiled.recipe == model.recipe and compiled.record == model.record
    assert compiled.timesteps.tolist() == list(TIMES)
    x, t = data(8)[0]
    assert torch.equal(compiled(x, t), model(x, t))
    with pytest.raises(InputError, match="gradient"):
        compiled(x.clone().requires_grad_(), t).sum().backward()


def test_without_a_finite_set_every_timestep_is_taken(toy):
    prepared = prepare(toy, data(8)[0], config=fast("w8a8"))
    assert prepared.timesteps is None
    prepared(data(8)[0][0], 123)
    assert prepared.cache.visits == {123: 4}


def test_what_was_removed_still_answers(unet, tmp_path):
    """diffusers pipelines read the sizes of layers, whatever became of them."""
    save(unet, tmp_path / "model")
    forms = (unet, load(tmp_path / "model"), copy.deepcopy(unet), pickle.loads(pickle.dumps(unet)))
    for found in (*forms, compile(unet, "eager")):
        layer = found.time_embedding.linear_1
        assert isinstance(layer, Removed) and "Linear(in_features=16" in repr(layer)
        assert layer.in_features == 16 and layer.weight.is_meta and layer.weight.shape[1] == 16
        assert not hasattr(layer, "nothing") and not list(found.time_embedding.parameters())
        with pytest.raises(NotImplementedError):
            layer(torch.zeros(1, 16))
    assert not any(name.startswith("gm.time_embedding") for name in unet.state_dict())


def test_pipelines_may_say_which_pass_of_guidance_runs(unet):
    with unet.cache_context("cond"):
        assert unet(*data(16)[0]).sample.shape == data(16)[0][0].shape
