"""Prepare the tensors of a model for a safetensors file, and read them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.reading import open_regular

_NAMED = {  # as safetensors names them
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPES = {*_NAMED.values(), torch.complex64, torch.complex128}


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


def read_tensors(path: Path, device: torch.device | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file into memory of their own, on `device`.

    In the file they start at any byte, where torch aligns to 64. Kernels choose their path by
    alignment (5e-7 on a small UNet), and a loaded model is to be bit-identical to the saved one.
    So each is read to where it stays: mapping the file and copying from it would hold both.
    Raises SafetensorError where the file is damaged.
    """
    with safe_open(path, framework="pt"):  # which checks the header and that it fits the file
        pass
    tensors: dict[str, Tensor] = {}
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in sorted(entries, key=lambda pair: pair[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if (dtype := _NAMED.get(entry["dtype"])) is None:
                raise ArtifactError(f"{path}: {name} is of {entry['dtype']}, which is not read")
            memory = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
            file.seek(8 + size + begin)
            if file.readinto(memory.numpy().data) != end - begin:
                raise ArtifactError(f"{path} was cut while it was read")
            tensor = memory.view(dtype).reshape(entry["shape"])
            tensors[name] = tensor if device is None else tensor.to(device)
    return tensors
