"""torch's own INT4 product, for CPUs without llvmlite: a tenth of the time of what plain PyTorch can do.

It wants the nibbles in an order of its own, which depends on the processor. `pack` makes it, `unpack` undoes it; the
order is read off a small matrix at first use, and where it cannot be read or the product is wrong, nothing is packed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .int4 import pack_int4, unpack_int4

ROWS = 64  # of a weight are packed together on any processor; their number must be a multiple
GROUPS = (256, 128, 64, 32)  # columns a scale that the product knows
PACKED_AT_ONCE = 1 << 20  # weights, which take four bytes each while they are packed


def is_served(rows: int, columns: int) -> bool:
    """Whether an INT4 weight [rows, columns] can be packed on this machine."""
    return rows % ROWS == 0 and columns % GROUPS[-1] == 0 and block_order() is not None


@functools.cache
def block_order() -> tuple[Tensor, Tensor] | None:
    """Rows of a block whose nibbles are the low and the high halves of consecutive bytes; None where that is unclear.

    A packed weight is [N / block, K, block / 2] bytes."""
    if not hasattr(torch, "_convert_weight_to_int4pack_for_cpu"):
        return None
    rows = torch.arange(ROWS, dtype=torch.int32, device="cpu")[:, None].expand(ROWS, GROUPS[-1])
    try:
        parts = [torch._convert_weight_to_int4pack_for_cpu(part.contiguous(), 1) for part in (rows & 15, rows >> 4)]
    except RuntimeError:
        return None
    low, high = ((parts[0] >> shift & 15).long() + 16 * (parts[1] >> shift & 15) for shift in (0, 4))
    for block in (ROWS, ROWS // 2):
        order = tuple(half.flatten()[: block // 2] for half in (low, high))
        if torch.cat(order).sort().values.equal(torch.arange(block, device="cpu")) and _is_right(order):
            return order
    return None


def _is_right(order: tuple[Tensor, Tensor]) -> bool:
    """Compares packing, unpacking and the product of a small matrix with plain torch."""
    weight = torch.arange(2 * ROWS * 64, device="cpu").mul(167).to(torch.int8).view(2 * ROWS, 64)
    packed = _pack_rows(weight)
    if not _unpack(packed, order).equal(weight):
        return False
    values = unpack_int4(weight).float()
    x = torch.linspace(-1, 1, 128, dtype=torch.float32, device="cpu").bfloat16()[None]
    y = torch._weight_int4pack_mm_for_cpu(x, packed, *group_scales(torch.ones(2 * ROWS, device="cpu"), 128))
    return bool(((y.float() - x.float() @ values.T).abs() <= 0.02 * (x.float().abs() @ values.abs().T)).all())


class Packed(NamedTuple):
    scale: Tensor  # that it was packed with
    weight: Tensor  # uint8 [N, K / 2]
    group: int  # columns a scale
    scales: Tensor  # bfloat16 [K / group, N, 2]: scales and zero points


def pack(weight: Tensor, scale: Tensor) -> Packed:
    """int8 [N, K / 2] in the official order, and its scales, as torch's product wants them."""
    rows = max(ROWS, PACKED_AT_ONCE // (2 * weight.shape[1]) // ROWS * ROWS)
    packed = torch.cat([_pack_rows(part) for part in weight.split(rows)])
    return Packed(scale, packed, *group_scales(scale, 2 * weight.shape[1]))


def _pack_rows(weight: Tensor) -> Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(unpack_int4(weight).to(torch.int32).add_(8), 1)


def unpack(packed: Packed) -> Tensor:
    """The weight that was packed."""
    return _unpack(packed.weight, block_order())


def _unpack(packed: Tensor, order: tuple[Tensor, Tensor]) -> Tensor:
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    half = len(order[0])
    blocks = packed.view(rows // (2 * half), columns, half)
    values = torch.empty(rows // (2 * half), 2 * half, columns, dtype=torch.uint8, device="cpu")
    for of_half, nibbles in zip(order, (blocks & 15, blocks >> 4)):
        values[:, of_half] = nibbles.transpose(1, 2)
    return pack_int4(values.view(rows, columns).view(torch.int8) - 8)


def group_scales(scale: Tensor, columns: int) -> tuple[int, Tensor]:
    """(columns a scale, scales and zero points [groups, N, 2] bfloat16) of a weight with `columns`. Scales of whole
    rows are left for afterwards, where they are not rounded: ones stand in for them."""
    if scale.dim() == 2:
        return columns // scale.shape[1], torch.stack((scale.T, torch.zeros_like(scale.T)), dim=-1).bfloat16()
    group = next(group for group in GROUPS if columns % group == 0)
    return group, _ones(columns // group, len(scale))


@functools.lru_cache(maxsize=16)
def _ones(groups: int, rows: int) -> Tensor:
    return torch.tensor([1.0, 0.0], dtype=torch.bfloat16, device="cpu").repeat(groups, rows, 1)


def linear(x: Tensor, packed: Packed, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ (scale * weight).T + bias, in x's type; activations are rounded to bfloat16, as the product wants."""
    y = torch._weight_int4pack_mm_for_cpu(x.bfloat16().contiguous(), *packed[1:]).float()
    y = y * scale.float() if scale.dim() == 1 else y
    return (y if bias is None else y.add_(bias)).to(x.dtype)
