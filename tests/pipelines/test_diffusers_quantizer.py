"""`from_pretrained` of diffusers quantizes by a TFMQConfig as prepare and convert would."""

import json

import pytest
import torch

import tfmq_fx
from tfmq_fx import PRESETS, ConfigError, Converted, TFMQConfig
from tfmq_fx.pipelines.quantization_config import QuantMethod

diffusers = pytest.importorskip("diffusers")

TIMES = [0, 333, 666]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
    folder = tmp_path_factory.mktemp("plain")
    diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def quantized(folder, *args, **kwargs):
    config = TFMQConfig(*args, timesteps=TIMES)
    return diffusers.UNet2DModel.from_pretrained(
        folder, subfolder="unet", quantization_config=config, **kwargs
    )


X, T = torch.randn(2, 3, 8, 8), torch.tensor([333, 333])


@pytest.mark.parametrize("preset", ["w8a8-dynamic", "fp8-dynamic", "w8a16", "w4a16"])
def test_presets_without_calibration(folder, preset, tmp_path):
    model = quantized(folder, preset)
    assert type(model) is Converted and model.recipe.name == preset and not model.training
    expected = model(X, T).sample
    model.save_pretrained(tmp_path / "unet")
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(again(X, T).sample, expected)


def test_the_model_is_the_one_that_prepare_and_convert_make(folder):
    source = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    prepared = tfmq_fx.prepare(source, config=TFMQConfig("w4a16").recipe(), timesteps=TIMES)
    expected = tfmq_fx.convert(prepared, progress=False)
    assert torch.equal(quantized(folder, "w4a16")(X, T).sample, expected(X, T).sample)


def test_a_model_in_another_dtype(folder):
    model = quantized(folder, "w8a16", torch_dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert model(X.bfloat16(), T).sample.dtype is torch.bfloat16


def test_a_pipeline_quantizes_the_parts_that_it_is_told(folder, tmp_path):
    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={"unet": TFMQConfig("w8a16", timesteps=TIMES)}
    )
    pipe = diffusers.DDIMPipeline.from_pretrained(folder, quantization_config=config)
    assert type(pipe.unet) is Converted
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.unet(X, T).sample, pipe.unet(X, T).sample)


@pytest.mark.parametrize("preset", [name for name in PRESETS if "dynamic" not in name])
def test_presets_that_need_calibration_are_refused_before_loading(folder, preset):
    if preset in ("fp", "w8a16", "w4a16"):
        TFMQConfig(preset).recipe()
        return
    with pytest.raises(ConfigError, match=rf"{preset}.*prepare.*calibrate\(.*convert\(.*w8a16"):
        quantized(folder, preset)


def test_timesteps_are_asked_for_where_only_the_scheduler_knows_them(tmp_path):
    from tests import zoo

    zoo.model("sd3").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"SD3Transformer2DModel takes floats.*timesteps="):
        diffusers.SD3Transformer2DModel.from_pretrained(
            tmp_path, quantization_config=TFMQConfig("w8a16")
        )


@pytest.mark.parametrize("config", ["w4a16", PRESETS["fp8-dynamic"]])
def test_a_config_survives_json(config):
    made = TFMQConfig(config, timesteps=[0, 0.5], dynamic=("batch",))
    data = json.loads(made.to_json_string())
    assert TFMQConfig.from_dict(data) == made and data["quant_method"] == "tfmq"
    assert made.quant_method is QuantMethod.TFMQ and "tfmq" in repr(made)


def test_values_that_cannot_be_used_are_refused():
    with pytest.raises(ConfigError, match=r"unknown keys \['bits'\]"):
        TFMQConfig.from_dict({"bits": 4})
    with pytest.raises(ConfigError, match=r"quant_method"):
        TFMQConfig(quant_method="gguf")
    with pytest.raises(ConfigError, match=r"timesteps=\) takes"):
        TFMQConfig(timesteps=0.5)
