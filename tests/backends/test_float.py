"""float: the quantized model compiled in bfloat16 where the processor has it."""

import pytest
import torch

from tests.backends.cuda.test_lower import data, quantized
from tests.backends.test_inductor import needs_compiler
from tfmq_fx.backends import float as floats
from tfmq_fx.backends.cpu.kernels import fast_dtype
from tfmq_fx.backends.float import compile_graph, dequantize, unavailable
from tfmq_fx.backends.float_layers import DequantizedLayer
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import sqnr


@pytest.mark.parametrize("dtype, least", [(torch.float32, 30), (torch.bfloat16, 30)])
def test_every_layer_is_declined_and_runs_on_its_weights(dtype, least):
    model = quantized("w8a8")
    lowered = dequantize(model.gm, dtype=dtype)
    assert stage_of(lowered.gm) is Stage.LOWERED and lowered.changed == 4
    name = "float32" if dtype == torch.float32 else "bfloat16"
    reason = f"backend 'float' computes in {name}"
    layers = ["enter", "down", "leave", "last"]
    assert {d.site: d.reason for d in lowered.declined} == dict.fromkeys(layers, reason)
    made = [m for m in lowered.gm.modules() if isinstance(m, DequantizedLayer)]
    assert len(made) == 4 and all(m.dequantized.dtype == dtype for m in made)
    assert sum(isinstance(m, QuantLayer) for m in model.gm.modules()) == 4
    x, t = data(seed=1)[1]
    with torch.no_grad():
        # inputs are not rounded: apart by the noise of 8 bits, 40 dB less some for four layers
        assert sqnr(model(x, t), lowered.gm(x, t)[0]) > least


class Compiled:
    """In place of the compiled graph: what it is made of, and how it is called."""

    def __init__(self, gm, options, *, freezes, artifact):
        self.gm, self.made = gm, (options, freezes, artifact)

    def __call__(self, *inputs):
        self.autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        with torch.no_grad():
            return self.gm(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_cast_where_the_processor_has_bf16_and_results_are_not(monkeypatch, dtype):
    made = []

    def compiled(*args, **options):
        made.append(Compiled(*args, **options))
        return made[-1]

    monkeypatch.setattr(floats, "CpuCallable", compiled)
    monkeypatch.setattr(floats, "fast_dtype", lambda: dtype)
    model = quantized("w8a8")
    run, _ = compile_graph(model.gm, mode="default")
    x, t = data(seed=1)[1]
    (found,) = run(x, t)
    assert made[0].made == ({"mode": "default"}, True, None)
    assert made[0].autocast[0] == (dtype == torch.bfloat16)
    assert found.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        assert sqnr(model(x, t), found) > 30


def test_where_it_runs(monkeypatch):
    message = "it compiles for cpu, the model is on cuda"
    assert unavailable(torch.device("cuda")) == message
    monkeypatch.setattr(floats, "no_compiler", lambda device: "no compiler")
    assert unavailable() == "no compiler"


@needs_compiler
@pytest.mark.slow
@pytest.mark.sample
def test_the_compiled_model_is_near_the_quantized_one(dynamo):
    model = quantized("w4a8")
    run, _ = compile_graph(model.gm)
    for x, t in data(seed=1):
        (found,) = run(x, t)
        assert found.dtype == torch.float32 and sqnr(model(x, t), found) > 25
    assert fast_dtype() in (torch.float32, torch.bfloat16)
