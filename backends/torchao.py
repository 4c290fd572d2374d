"""Lower linear layers to torchao's tensors with our codes and scales; weights are not rounded
again.

y = linear_q(x)    ->    y = F.linear(x, Int8Tensor(codes, scale)), and so with fp8 and int4

Weights are bit for bit ours, but for int4, whose kernel takes scales in bfloat16. Inputs are in
floating point, or ranged at every call and rounded by torchao, with scales that it computes in the
input's dtype:
- int8: a row whose largest magnitude is negative has scale -x / 128 where that is more than x / 127
  of its largest value, and is rounded a little finer than in the reference.
- fp8: codes of x / scale where the reference takes x * (1 / scale), which differ at ties alone.
"""

from __future__ import annotations

import importlib.metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_fx.core.errors import BackendError
from tfmq_fx.core.stages import Stage
from tfmq_fx.quant.affine import FP8_MAX, TINY_SCALE, QParams
from tfmq_fx.quant.modules import QuantLinear
from tfmq_fx.quant.quant_layer import QuantLayer

_INPUTS_SINCE = (0, 18)  # of torchao: whose tensors take bounded input ranges
_GROUPS = (32, 64, 128, 256)  # of input channels, in the int4 kernel
_ROWS = 17  # that cuBLAS multiplies at least as int8


def torchao_obstacle(layer: QuantLayer, device_type: str) -> str | None:
    """Why no torchao tensor can hold a layer's weight on a type of device, or None where one
    can."""
    if not isinstance(layer, QuantLinear):
        return "torchao has tensors for linear layers alone"
    if layer.act_bits is None:
        return int4_obstacle(layer, device_type) if layer.weight_groups > 1 else None
    if not layer.dynamic:
        return "static input ranges run on the kernels of this package"
    if layer.weight_format != layer.act_format:
        return f"weights are {layer.weight_format} and inputs {layer.act_format}"
    if layer.act_bits != 8:
        return f"torchao rounds inputs to 8 bits, not {layer.act_bits}"
    if layer.weight_groups > 1:
        return "weights have scales per group"
    if layer.dtype not in (torch.float32, torch.bfloat16):
        return f"torchao's sums and scales are not safe in {_name(layer.dtype)}"
    installed = importlib.metadata.version("torchao")
    if tuple(int(part) for part in installed.split(".")[:2]) < _INPUTS_SINCE:
        return f"torchao {installed} is installed, quantized inputs need 0.18"
    return None if device_type == "cpu" else _kernel_obstacle(layer, device_type)


def int4_obstacle(layer: QuantLayer, device_type: str) -> str | None:
    """Why torchao's int4 kernel cannot run a layer on a type of device, or None where it can."""
    if not isinstance(layer, QuantLinear) or layer.act_bits is not None:
        return "int4 kernels run linear layers whose input is in floating point"
    if layer.weight_format != "int" or layer.weight_bits > 4:
        return f"int4 kernels do not hold {layer.weight_format} weights of {layer.weight_bits} bits"
    if device_type != "cuda":
        return f"no int4 kernel on {device_type}"
    if layer.dtype != torch.bfloat16:
        return f"int4 kernels multiply bfloat16, not {_name(layer.dtype)}"
    if _group_size(layer) not in _GROUPS:
        return f"int4 kernels take groups of {_GROUPS} inputs, not {_group_size(layer)}"
    return _since((8, 0), "int4")


def to_torchao(layer: QuantLinear) -> nn.Linear:
    """A torch.nn.Linear whose weight is a torchao tensor with the codes of `layer`.

    Integer weights of fewer than 8 bits are expanded to int8, their zero points subtracted; those
    in groups are packed for the int4 kernel, which reads half as much and is made for few rows at a
    time.  Raises BackendError where there is no such tensor.
    """
    device = layer.codes.device.type
    if reason := torchao_obstacle(layer, device):
        raise BackendError(f"no torchao tensor for {layer}: {reason}")
    out, width = layer.weight_shape
    integers = layer.act_bits is not None and layer.act_format == "int"
    kind = _RowsLinear if integers else nn.Linear
    linear = kind(width, out, bias=False, device="meta", dtype=layer.dtype)
    if layer.weight_groups > 1:
        weight = _int4_tensor(layer)
    elif layer.weight_format == "fp8":
        weight = _fp8_tensor(layer)
    else:
        weight = _int8_tensor(layer)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
    return linear.eval()


class _RowsLinear(nn.Linear):
    """A linear layer that pads its rows (n, in) to as many as the int8 product takes."""

    stage = Stage.LOWERED

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        if count < _ROWS:
            rows = F.pad(rows, (0, 0, 0, _ROWS - count))
        y = F.linear(rows, self.weight, self.bias)[:count]
        return y.view(*x.shape[:-1], self.out_features)


def _int8_tensor(layer: QuantLinear) -> Tensor:
    from torchao.quantization import Int8Tensor, MappingType, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs as Inputs

    # plain SYMMETRIC has scale amax / 127.5, which clips the largest value by half a step
    rows = Inputs(granularity=PerRow(), mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR)
    # Where inputs are integers the product is one of float32 scales, rounded once.
    dtype = layer.dtype if layer.act_bits is None else torch.float32
    weight: Tensor = Int8Tensor(
        qdata=layer.weight_codes(),
        scale=layer.weight_scale.to(dtype)[:, None],
        block_size=[1, layer.in_features],
        dtype=layer.dtype,
        act_quant_kwargs=None if layer.act_bits is None else rows,
    )
    return weight


def _fp8_tensor(layer: QuantLinear) -> Tensor:
    from torchao.quantization import Float8MMConfig, Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs as Inputs

    inputs = None
    if layer.act_bits is not None:
        # without this least magnitude a row of zeros is divided by 0
        inputs = Inputs(granularity=PerRow(), hp_value_lb=FP8_MAX * TINY_SCALE)
    weight: Tensor = Float8Tensor(
        layer.weight_codes().clone(),
        layer.weight_scale.clone()[:, None],
        block_size=[1, layer.in_features],
        mm_config=Float8MMConfig(use_fast_accum=True),  # torchao's own default on Hopper
        act_quant_kwargs=inputs,
        dtype=layer.dtype,
    )
    return weight


def _int4_tensor(layer: QuantLinear) -> Tensor:
    from torchao.quantization import Int4TilePackedTo4dTensor

    codes, scale_and_zero = int4_parts(layer)
    weight: Tensor = Int4TilePackedTo4dTensor(
        qdata=torch.ops.aten._convert_weight_to_int4pack(codes, 8),
        scale_and_zero=scale_and_zero,
        block_size=[1, _group_size(layer)],
        shape=torch.Size(layer.weight_shape),
    )
    return weight


def int4_parts(layer: QuantLinear) -> tuple[Tensor, Tensor]:
    """The tensors of a layer that the int4 kernel reads: codes (out, in / 2) uint8, the first of
    two in the high four bits, and scale and zero (in / group, out, 2) bfloat16.

    It computes scale * (code - 8) + zero, so that zero = scale * (8 - zero point); codes of fewer
    than 4 bits are moved to have 0 there.  `in` is padded to a multiple of 1024 and `out` of 8,
    with zeros.
    """
    out, width = layer.weight_shape
    grid = layer.grid()
    if layer.weight_bits < 4:
        grid = QParams(grid.scale, torch.full_like(grid.zero, 8), 4)
    padding = (0, -width % 1024, 0, -out % 8)
    codes = layer.weight_codes().float() + grid.over(width)[1]
    codes = F.pad(codes, padding).to(torch.uint8)
    pair = torch.stack([grid.scale, grid.scale * (8 - grid.zero)], 2)
    groups = codes.shape[1] // _group_size(layer)
    pair = F.pad(pair, (0, 0, 0, groups - layer.weight_groups, 0, -out % 8))
    return codes[:, ::2] << 4 | codes[:, 1::2], pair.transpose(0, 1).to(torch.bfloat16).contiguous()


def _group_size(layer: QuantLinear) -> int:
    """Input channels that share a scale."""
    return layer.in_features // layer.weight_groups


def _kernel_obstacle(layer: QuantLinear, device_type: str) -> str | None:
    """Why torchao's 8-bit products cannot run a layer on an accelerator, or None where they can."""
    fp8 = layer.act_format == "fp8"
    kind, multiple = ("fp8", 16) if fp8 else ("int8", 8)
    if device_type != "cuda":
        return f"no {kind} kernel on {device_type}"
    if layer.in_features % multiple or layer.out_features % multiple:
        sizes = f"{layer.in_features} inputs and {layer.out_features} outputs"
        return f"{kind} kernels take multiples of {multiple}, not {sizes}"
    if fp8 and layer.dtype != torch.bfloat16:
        return f"fp8 rows are multiplied into bfloat16, not {_name(layer.dtype)}"
    return _since((8, 9) if fp8 else (8, 0), kind)


def _since(needed: tuple[int, int], kind: str) -> str | None:
    """Why the current CUDA device is too old for a kind of kernel, or None where it is not."""
    has_gpu = torch.cuda.is_available()
    return too_old(torch.cuda.get_device_capability() if has_gpu else (0, 0), needed, kind)


def too_old(capability: tuple[int, int], needed: tuple[int, int], kind: str) -> str | None:
    """Why a device of this compute capability cannot run a kind of kernel, or None where it can."""
    if capability >= needed:
        return None
    need, have = (f"{major}.{minor}" for major, minor in (needed, capability))
    return f"{kind} kernels need compute capability {need}, this device has {have}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
