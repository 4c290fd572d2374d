"""Tensors of a saved model: written as safetensors, read, and put into modules."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.strides import laid_out

from .json_values import dtype_named
from .module_json import owner_of

_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
}


def tensors_to_store(tensors: dict[str, Tensor], table: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file: contiguous, on the CPU, sharing no memory, each once."""
    stored: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, entry in table.items():
        if "same_as" in entry:
            continue
        value = tensors[name].detach()
        if value.dtype not in _DTYPES:
            raise ArtifactError(f"{name}: tensors of {value.dtype} cannot be saved")
        if value.is_meta:
            raise ArtifactError(f"{name}: the tensor is on the meta device and has no content")
        value = value.resolve_conj().resolve_neg().cpu()
        if value.is_complex():  # which safetensors does not know
            value = torch.view_as_real(value)
        value = value.contiguous()
        if value.untyped_storage().data_ptr() in used:  # part of another one: safetensors refuses
            value = value.clone()
        used.add(value.untyped_storage().data_ptr())
        stored[name] = value
    return stored


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own.

    In the file they start at any byte, where torch aligns to 64. Kernels choose their path by
    alignment (5e-7 on a small UNet), and a loaded model is to be bit-identical to the saved one.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def fill_modules(
    gm: fx.GraphModule, tensors: dict[str, Tensor], table: dict[str, Any], path: Path
) -> None:
    """Put the tensors of the file into the graph's empty ones."""
    wanted = {name for name, entry in table.items() if "same_as" not in entry}
    if wanted != set(tensors):
        raise ArtifactError(
            f"{path} does not fit the graph: missing {sorted(wanted - set(tensors))}, "
            f"not used {sorted(set(tensors) - wanted)}"
        )
    for name, entry in table.items():
        owner, leaf = owner_of(gm, name)
        empty = owner._parameters.get(leaf) if leaf in owner._parameters else owner._buffers[leaf]
        if "same_as" in entry:
            first = owner_of(gm, entry["same_as"])
            tensor = _held(*first)
        else:
            tensor = _filled(tensors[name], entry, name, path)
        if isinstance(empty, nn.Parameter):
            made = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
            made.requires_grad_(empty.requires_grad)
            owner._parameters[leaf] = made
        else:
            owner._buffers[leaf] = tensor
    every = itertools.chain(gm.named_parameters(), gm.named_buffers())
    if lacking := [name for name, value in every if value.is_meta]:
        raise ArtifactError(f"{path} holds no values for {lacking[:5]}")


def _held(owner: nn.Module, leaf: str) -> Tensor:
    found = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
    assert found is not None
    return found


def _filled(value: Tensor, entry: dict[str, Any], name: str, path: Path) -> Tensor:
    """A tensor of the file as the graph takes it."""
    dtype = dtype_named(entry["dtype"], name)
    if dtype.is_complex and value.shape[-1:] == (2,) and value.dtype is dtype.to_real():
        value = torch.view_as_complex(value)
    if list(value.shape) != entry["shape"] or value.dtype != dtype:
        raise ArtifactError(
            f"{path}: {name} is {value.dtype} {tuple(value.shape)}, "
            f"but the graph takes {dtype} {tuple(entry['shape'])}"
        )
    return laid_out(value, entry["stride"]) if "stride" in entry else value
