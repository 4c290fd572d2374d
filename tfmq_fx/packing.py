"""Weights as dense bit fields: how codes of fewer than 8 bits lie in memory and on disk."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits: 4 and 2 bits share bytes, others take one each."""
    per_byte = 8 // bits if bits in (2, 4) else 1
    return -(-count // per_byte)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, integers in [0, 2**bits - 1]) as a flat uint8 tensor, first code lowest."""
    flat = codes.flatten().to(torch.uint8)
    if bits not in (2, 4):
        return flat
    per_byte = 8 // bits
    padding = -len(flat) % per_byte
    fields = torch.nn.functional.pad(flat, (0, padding)).view(-1, per_byte)
    packed = torch.zeros(len(fields), dtype=torch.uint8, device=flat.device)
    for i in range(per_byte):
        packed |= fields[:, i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The uint8 codes that `pack` was given, in `shape`."""
    if bits not in (2, 4):
        return packed.view(shape)
    fields = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    count = torch.Size(shape).numel()
    return torch.stack(fields, 1).flatten()[:count].view(shape)
