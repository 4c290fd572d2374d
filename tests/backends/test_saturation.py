"""saturation: layers whose products could saturate on this processor run in floating point."""

import os
import subprocess
import sys

import pytest
import torch

from tests.backends.test_inductor import data, whole
from tfmq_fx.backends import saturation
from tfmq_fx.backends.cpu import kernels
from tfmq_fx.backends.cpu import lower as lowering
from tfmq_fx.backends.cpu.autotune import untimed_choice
from tfmq_fx.backends.cpu.lower import lower
from tfmq_fx.backends.cpu.onednn import OnednnLayer
from tfmq_fx.backends.float_layers import FloatLayer
from tfmq_fx.backends.openvino import lower as openvino
from tfmq_fx.backends.openvino.layers import CompressedLinear, IntegerLayer
from tfmq_fx.backends.saturation import fits_pairs, onednn_is_exact, openvino_is_exact


def paired(codes, inputs):
    """The sum of products as `vpmaddubsw` and 32-bit additions make it."""
    pairs = (codes.int() * inputs.int()).view(-1, 2).sum(1)
    return int(pairs.clamp(-(2**15), 2**15 - 1).sum())


@pytest.mark.parametrize("top", [15, 63, 127, 128, 255])
@pytest.mark.parametrize("most", [7, 15, 63, 64, 65, 127, 128])
def test_codes_fit_where_no_pair_saturates(most, top):
    for sign in (1, -1):
        if sign * most == 128:
            continue  # no int8
        codes = torch.tensor([0, 1, sign * most, sign * most], dtype=torch.int8)
        inputs = torch.tensor([0, 1, top, top], dtype=torch.uint8)
        exact = paired(codes, inputs) == int((codes.int() * inputs.int()).sum())
        if fits_pairs(codes, top):
            assert exact
        elif sign > 0:  # one pair less fits where its sum is negative: 2**15 and no more
            assert not exact
    assert fits_pairs(torch.empty(0, dtype=torch.int8), top)


@pytest.mark.parametrize("bits, floats", [(8, ["enter", "leave"]), (6, []), (4, [])])
def test_layers_that_could_saturate_run_in_floating_point(bits, floats, monkeypatch):
    monkeypatch.setattr(kernels, "unavailable", lambda: "no such instructions")
    model = whole(bits)
    for library, module, name in (
        ("oneDNN", lowering, "onednn_is_exact"),
        ("OpenVINO", openvino, "openvino_is_exact"),
    ):
        monkeypatch.setattr(module, name, lambda: False)
        lowered = (
            lower(model.gm, choose=untimed_choice)
            if library == "oneDNN"
            else openvino.lower(model.gm)
        )
        assert [d.site for d in lowered.declined] == floats
        for declined in lowered.declined:
            reason = f"{library} adds products of 8-bit weights in 16 bits on this processor"
            assert reason in declined.reason and "floating point" in declined.reason
        kinds = {type(lowered.gm.enter), type(lowered.gm.leave)}
        if library == "oneDNN":
            assert kinds == ({FloatLayer} if floats else {OnednnLayer})
        else:
            assert kinds == ({FloatLayer, CompressedLinear} if floats else {IntegerLayer})
        assert lowered.details["integer"] == 2 - len(floats)
        x, t = data(seed=1)[1]
        step = float(model.gm.activation_scales.max() * model.gm.leave.weight.abs().max())
        with torch.no_grad():  # one code beside a boundary
            assert (lowered.gm(x, t)[0] - model(x, t)).abs().max() <= step + 1e-5


def test_a_library_is_asked_only_for_codes_that_could_saturate():
    def ask():
        raise AssertionError

    layer = whole(6).gm.leave
    assert saturation.saturates(layer, "oneDNN", ask) is None
    with pytest.raises(AssertionError):
        saturation.saturates(whole(8).gm.leave, "oneDNN", ask)


OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
CASE = """
import torch
from tests.backends.test_inductor import whole
from tfmq_fx import compile
from tfmq_fx.backends.cpu import kernels
from tfmq_fx.backends.saturation import onednn_is_exact, openvino_is_exact
assert "ATEN_CPU_CAPABILITY=avx2" in kernels.unavailable()
print(onednn_is_exact(), openvino_is_exact())
model, (x, t) = whole(), (50 * torch.ones(4, 4, 6, 6), torch.full((4,), 3))
for backend in ("inductor", "openvino"):
    compiled = compile(model, backend)
    print(compiled.lowered, float((compiled(x, t) - model(x, t)).abs().max()))
"""


def test_a_processor_without_vnni_answers_as_the_reference():
    """Also where this processor has VNNI, of which oneDNN then makes no use."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CASE],
        env=os.environ | OLDER,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    exact, *found = (line.split() for line in done.stdout.splitlines())
    assert exact == ["False", "False"]
    assert len(found) == 2
    model = whole()
    step = float(model.gm.activation_scales.max() * model.gm.leave.weight.abs().max())
    for lowered, apart in found:
        assert lowered == "0" and float(apart) <= step + 1e-5


def test_the_probes_agree_with_what_the_processor_says():
    """Processors with VNNI are exact; of others nothing is said here."""
    flags = set(kernels.processor().split())
    limits = {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & set(os.environ)
    if {"avx512_vnni", "avx512bw", "avx512vl"} <= flags and not limits:
        assert onednn_is_exact() and openvino_is_exact()


@pytest.mark.parametrize("asked", ["avx2", "default"])
def test_kernels_heed_the_limit_that_torch_heeds(asked, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", asked)
    kernels.unavailable.cache_clear()
    try:
        assert f"ATEN_CPU_CAPABILITY={asked}" in kernels.unavailable() or "x86-64" in (
            kernels.unavailable()
        )
        assert openvino._computes_bf16() is False
    finally:
        monkeypatch.undo()
        kernels.unavailable.cache_clear()
