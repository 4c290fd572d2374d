"""Pack codes of fewer than 8 bits densely, in memory and on disk.

Codes follow one another without gaps, the first in the lowest bits, in words of whole bytes: two
4-bit codes in one byte, eight 3-bit codes in three.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """The size in bytes of `count` packed codes of `bits` bits, 1 to 8."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (any shape, in [0, 2**bits - 1]) into a flat uint8 tensor, first code lowest."""
    flat = codes.flatten().to(torch.uint8)
    if bits == 8:
        return flat
    per_word, width = _word(bits)
    fields = torch.nn.functional.pad(flat, (0, -len(flat) % per_word)).view(-1, per_word)
    words = torch.zeros(len(fields), dtype=_dtype(width), device=flat.device)
    for i in range(per_word):
        words |= fields[:, i].to(words.dtype) << (bits * i)
    packed = torch.stack([(words >> (8 * i)).to(torch.uint8) for i in range(width)], 1)
    return packed.flatten()[: packed_size(len(flat), bits)].clone()  # its storage is saved


def unpack(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Unpack the uint8 codes that `pack` stored, in `shape`."""
    if bits == 8:
        return packed.view(shape)
    per_word, width = _word(bits)
    fields = torch.nn.functional.pad(packed, (0, -len(packed) % width)).view(-1, width)
    words = torch.zeros(len(fields), dtype=_dtype(width), device=packed.device)
    for i in range(width):
        words |= fields[:, i].to(words.dtype) << (8 * i)
    mask = 2**bits - 1
    codes = [((words >> (bits * i)) & mask).to(torch.uint8) for i in range(per_word)]
    count = torch.Size(shape).numel()
    return torch.stack(codes, 1).flatten()[:count].view(shape)


def _word(bits: int) -> tuple[int, int]:
    """The number of codes in one word, and the bytes of that word."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def _dtype(width: int) -> torch.dtype:
    """The dtype that holds words of `width` bytes."""
    return torch.uint8 if width == 1 else torch.int64
