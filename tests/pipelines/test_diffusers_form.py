"""A pipeline keeps our denoiser when it is saved, and has it again when it is loaded."""

import json
import os
import shutil

import pytest
import torch

import tfmq_fx
from tfmq_fx import ArtifactError, Bound, ConfigError, Converted, bind_request, fold_timesteps
from tfmq_fx.serialization.artifact import DIFFUSERS_CONFIG, DIFFUSERS_TENSORS, GRAPH_FILE

diffusers = pytest.importorskip("diffusers")

STEPS = 3


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ).eval()


@pytest.fixture(scope="module")
def plain(unet, tmp_path_factory):
    """The folder of a pipeline as diffusers writes it."""
    folder = tmp_path_factory.mktemp("plain")
    diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(unet):
    return diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler())


@pytest.fixture(scope="module")
def exact(unet):
    return fold_timesteps(unet, [0, 333, 666])


@pytest.fixture(scope="module")
def bound(unet):
    return bind_request(unet)


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        batch_size=1, num_inference_steps=STEPS, generator=generator, output_type="np"
    ).images
    return torch.tensor(images)


@pytest.mark.parametrize("form", ["exact", "bound"])
def test_a_pipeline_keeps_its_denoiser_bit_for_bit(pipe, form, request, tmp_path):
    pipe.unet = request.getfixturevalue(form)
    kind, expected = type(pipe.unet), draw(pipe)
    pipe.save_pretrained(tmp_path / "a")
    for load in (diffusers.DiffusionPipeline, diffusers.DDIMPipeline):
        again = load.from_pretrained(tmp_path / "a")
        assert type(again.unet) is kind and torch.equal(draw(again), expected)
    assert again.unet.config.sample_size == 8
    again.save_pretrained(tmp_path / "b")  # and once more, there and in place
    again.save_pretrained(tmp_path / "a")
    for folder in ("a", "b"):
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / folder)
        assert type(again.unet) is kind and torch.equal(draw(again), expected)
    assert again.components.keys() == {"unet", "scheduler"}
    again.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(again), expected)


def test_every_reader_loads_what_a_pipeline_saved(pipe, exact, tmp_path):
    pipe.unet = exact
    pipe.save_pretrained(tmp_path)
    folder = tmp_path / "unet"
    assert {GRAPH_FILE, DIFFUSERS_CONFIG, DIFFUSERS_TENSORS} < set(os.listdir(folder))
    config = json.loads((folder / DIFFUSERS_CONFIG).read_text())
    assert config["_class_name"] == "UNet2DModel"
    assert config["quantization_config"] == {"quant_method": "tfmq", "config": "fp"}
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([333])
    expected = exact(x, t).sample
    for model in (
        tfmq_fx.load(folder),
        tfmq_fx.load(folder, device="cpu"),
        Converted.from_pretrained(folder),
        Converted.from_pretrained(tmp_path, subfolder="unet", dtype=torch.float32),
        diffusers.UNet2DModel.from_pretrained(folder),
        diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet", device_map="cpu"),
    ):
        assert type(model) is Converted and not model.training
        assert torch.equal(model(x, t).sample, expected)
        assert model.origin.fingerprints.keys() == exact.origin.fingerprints.keys()


def test_a_model_takes_the_place_of_the_one_that_a_folder_names(plain, bound, caplog):
    pipe = diffusers.DDIMPipeline.from_pretrained(plain, unet=bound)
    assert pipe.unet is bound
    with pytest.raises(ArtifactError, match=r"unet is not empty and not a model saved by tfmq_fx"):
        pipe.save_pretrained(plain)
    assert isinstance(diffusers.DDIMPipeline.from_pretrained(plain).unet, diffusers.UNet2DModel)


def test_a_compiled_model_is_saved_as_what_it_was_compiled_from(pipe, exact, tmp_path):
    converted = tfmq_fx.load(saved(exact, tmp_path / "model"))
    pipe.unet = tfmq_fx.compile(converted, "eager")
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert type(again.unet) is Converted and torch.equal(draw(again), expected)
    del converted
    with pytest.raises(ArtifactError, match=r"no longer in memory.*save it before compiling"):
        pipe.save_pretrained(tmp_path / "other")


def test_a_prepared_model_is_refused(pipe, unet, tmp_path):
    pipe.unet = tfmq_fx.prepare(unet, timesteps=3)
    with pytest.raises(ArtifactError, match=r"prepared model cannot be saved.*convert it"):
        pipe.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"variant": "fp16"}, r"variant='fp16'"),
        ({"safe_serialization": False}, r"safe_serialization=False"),
        ({"max_shard_size": "1KB"}, r"max_shard_size='1KB'.*one file"),
    ],
)
def test_options_that_the_form_lacks_are_refused(pipe, bound, option, message, tmp_path):
    pipe.unet = bound
    with pytest.raises(ArtifactError, match=message):
        pipe.save_pretrained(tmp_path, **option)
    bound.save_pretrained(tmp_path / "model", max_shard_size="1GB", is_main_process=False)
    assert not (tmp_path / "model").exists()
    with pytest.raises(ArtifactError, match=r"push_to_hub=True.*huggingface_hub"):
        bound.save_pretrained(tmp_path / "model", push_to_hub=True)
    with pytest.raises(ArtifactError, match=r"push_to_hub.*save_pretrained"):
        bound.push_to_hub("someone/something")


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_options_of_from_pretrained_are_used_or_refused(exact, tmp_path):
    folder = saved(exact, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"quantized already"):
        Converted.from_pretrained(folder, quantization_config=tfmq_fx.TFMQConfig())
    with pytest.raises(ConfigError, match=r"device='nowhere'"):
        tfmq_fx.load(folder, device="nowhere")
    with pytest.raises(ConfigError, match=r"device_map='auto'.*one device"):
        diffusers.UNet2DModel.from_pretrained(folder, device_map="auto")
    with pytest.raises(ConfigError, match=r"captured in torch.float32 and cannot be cast"):
        diffusers.UNet2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def test_the_two_forms_of_a_folder_replace_each_other(exact, tmp_path):
    folder = saved(exact, tmp_path / "model")
    tfmq_fx.save(exact, folder)
    assert not (folder / DIFFUSERS_CONFIG).exists()
    (folder / DIFFUSERS_CONFIG).write_text("{}")  # somebody's own
    with pytest.raises(ArtifactError, match=rf"would delete: \['{DIFFUSERS_CONFIG}'\]"):
        exact.save_pretrained(folder)
    (folder / DIFFUSERS_CONFIG).unlink()
    assert tfmq_fx.load(saved(exact, folder)).timesteps.tolist() == [0, 333, 666]


def test_damage_is_found_whoever_loads(exact, tmp_path):
    folder = saved(exact, tmp_path / "model")
    path = folder / DIFFUSERS_TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for load in (tfmq_fx.load, Converted.from_pretrained, diffusers.UNet2DModel.from_pretrained):
        with pytest.raises(
            ArtifactError, match=rf"{DIFFUSERS_TENSORS} is truncated or was altered"
        ):
            load(folder)


def test_a_folder_without_our_graph_is_refused_by_name(exact, tmp_path):
    folder = saved(exact, tmp_path / "model")
    (folder / GRAPH_FILE).unlink()
    with pytest.raises(ArtifactError, match=rf"holds no {GRAPH_FILE}.*snapshot_download"):
        diffusers.UNet2DModel.from_pretrained(folder)


def test_what_config_json_says_runs_nothing(exact, tmp_path):
    """It is read by diffusers alone: the class is that of the call, the graph that of our file."""
    folder = saved(exact, tmp_path / "model")
    path = folder / DIFFUSERS_CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_class_name": "os", "in_channels": 5}))
    model = diffusers.UNet2DModel.from_pretrained(folder)
    assert model.outline.kind == "UNet2DModel" and model.outline.attributes["sample_size"] == 8
    assert Converted.from_pretrained(folder).config["in_channels"] == 3


def test_a_bound_model_is_bound_again(bound, tmp_path):
    model = diffusers.UNet2DModel.from_pretrained(saved(bound, tmp_path / "model"))
    assert type(model) is Bound and model.spec == bound.spec
    model.set_timesteps(3)
    shutil.rmtree(tmp_path / "model")
    assert model(torch.randn(1, 3, 8, 8), torch.tensor([1])).sample.isfinite().all()
