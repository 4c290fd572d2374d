"""Prepare the tensors of a model for a safetensors file, and read them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tfmq_fx.core.errors import ArtifactError

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
    """Return the tensors to write: contiguous, on the CPU, sharing no memory, each once.

    table: of `module_json.tensors_json`, which says which tensors are the same.
    """
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
    """Read the tensors of a file into memory of their own.

    In the file they start at any byte, where torch aligns to 64. Kernels choose their path by
    alignment (5e-7 on a small UNet), and a loaded model is to be bit-identical to the saved one.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
