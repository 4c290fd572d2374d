"""Whatever diffusers' pipelines ask a denoiser for, a captured one answers as the denoiser does."""

import functools
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tfmq_fx import FrozenError, bind_request
from tfmq_fx.conversion.graph_model import GraphModel
from tfmq_fx.conversion.source_outline import SourceOutline

diffusers = pytest.importorskip("diffusers")

READS = re.compile(r"\b(?:unet|transformer|transformer_2|prior|decoder)\.([a-zA-Z_]\w*)")


@functools.cache
def names():
    """The attributes that the installed pipelines read of their denoisers."""
    folder = Path(diffusers.__file__).parent / "pipelines"
    texts = [path.read_text() for path in folder.rglob("pipeline_*.py")]
    return sorted({name for text in texts for name in READS.findall(text)})


def ask(model, name):
    try:
        return getattr(model, name)
    except AttributeError as error:
        return type(error)


def make(name):
    if name != "prior":
        return zoo.model(name, device="meta")
    with torch.device("meta"):
        return diffusers.PriorTransformer(2, 4, 1, embedding_dim=8)


KINDS = {zoo.config(name)["_class_name"]: name for name in zoo.ENTRIES}


@pytest.mark.parametrize("name", ["prior", *KINDS.values()])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_answers_for_what_pipelines_read(name):
    source = make(name)
    outline, compared = SourceOutline.of(source), 0
    for read in (*names(), "_reset_stateful_cache", "enable_freeu"):
        expected = ask(source, read)
        if hasattr(GraphModel, read) or isinstance(expected, Tensor):
            continue  # answered by the graph's own class; a weight
        if expected is AttributeError:
            assert ask_outline(outline, read) is AttributeError
            continue
        found = ask_outline(outline, read)
        compared += 1
        if inspect.ismethod(expected) or isinstance(expected, dict):
            assert callable(found) or found.keys() == expected.keys()
        elif isinstance(expected, nn.Module):
            assert isinstance(found, type(expected)) and repr(found) == repr(expected)
        else:
            assert found == expected
    assert compared > 2


def ask_outline(outline, name):
    try:
        return outline.get(name)
    except AttributeError as error:
        return type(error)


# What pipelines and their loaders call to change a denoiser.
CHANGES = {
    "enable_freeu": {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4},
    "fuse_qkv_projections": {},
    "set_attn_processor": {"processor": None},
    "set_attention_slice": {"slice_size": 1},
    "enable_gradient_checkpointing": {},
    "enable_layerwise_casting": {"storage_dtype": torch.float16, "compute_dtype": torch.float32},
    "compile_repeated_blocks": {},
    "add_adapter": {},
    "load_lora_adapter": {"prefix": None},
}


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ).eval()


@pytest.fixture(scope="module")
def exact(unet):
    return bind_request(unet)


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_the_denoiser_is_refused_by_name(unet, exact, name):
    arguments = dict(CHANGES[name])
    if name == "set_attn_processor":
        arguments["processor"] = diffusers.models.attention_processor.AttnProcessor()
    if name in ("add_adapter", "load_lora_adapter"):
        peft = pytest.importorskip("peft")
        arguments["adapter_config"] = peft.LoraConfig(r=2, target_modules=["to_q"])
    if name == "load_lora_adapter":
        path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        lora = {
            f"{path}.lora_A.weight": torch.ones(2, 8),
            f"{path}.lora_B.weight": torch.ones(8, 2),
        }
        arguments = {"pretrained_model_name_or_path_or_dict": lora, "prefix": None}
    assert hasattr(exact, name)
    with pytest.raises(
        FrozenError, match=rf"{name}\(\) of the captured UNet2DConditionModel.*Do it"
    ):
        getattr(exact, name)(**arguments)
    assert not hasattr(unet, "peft_config")


def test_what_changes_nothing_may_be_called(exact):
    exact.disable_freeu()
    assert exact.num_parameters() == exact.outline.get("num_parameters")()
    assert set(exact.attn_processors) and not exact.is_gradient_checkpointing
    with pytest.raises(FrozenError, match=r"scale cannot be set"):
        next(iter(exact.attn_processors.values())).scale = 2.0


def test_pipelines_offload_the_layers_of_the_graph(exact):
    assert not hasattr(exact, "enable_group_offload")
    with pytest.raises(FrozenError, match=r"apply_group_offloading\(model"):
        exact.enable_group_offload(torch.device("cpu"))


def test_sizes_of_layers_can_be_read_through_the_parts(unet, exact):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert exact.mid_block.get_submodule(layer.partition(".")[2]).in_features == 8
    assert hasattr(exact.mid_block, "motion_modules") == hasattr(unet.mid_block, "motion_modules")
    assert exact.time_embedding.linear_1.in_features == 8


def test_a_prior_gives_its_latents_back_their_scale():
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        prior = diffusers.PriorTransformer(2, 4, 1, embedding_dim=8, num_embeddings=3).eval()
        prior.clip_mean.normal_()
        inputs = (torch.randn(1, 8), 3, torch.randn(1, 8), torch.randn(1, 3, 8))
        exact = bind_request(prior, example_inputs=inputs)
        expected = prior.post_process_latents(torch.ones(1, 8))
        del prior
        assert torch.equal(exact.post_process_latents(torch.ones(1, 8)), expected)


def test_the_numbers_of_rotary_tables_can_be_read():
    net = zoo.model("hunyuan-dit")
    exact = bind_request(net)
    assert (exact.inner_dim, exact.num_heads) == (net.inner_dim, net.num_heads)


def test_a_pipeline_with_caches_in_its_blocks_ends_as_it_should():
    """Pipelines reset the caches of every part that has any."""
    net = zoo.model("flux-schnell")
    exact = bind_request(net)
    assert hasattr(net, "_reset_stateful_cache") and not exact.is_cache_enabled
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, exact)
    pipe.maybe_free_model_hooks()
    with pytest.raises(FrozenError, match=r"enable_cache\(\)"):
        exact.enable_cache(diffusers.FirstBlockCacheConfig())
