"""The compiled kernels as functions of tensors: products with INT4, INT8 and 16-bit weights, GELU, attention.

At one new token a model is as fast as its weights can be read, so the kernels read the official storage format as it
lies in memory, widen a weight in registers and sum in float32; activations keep their precision. products.py and
steps.py write them, runtime.py compiles and runs them, routes.py chooses. What is not served gives None.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ir import (
    BLOCK_ROWS,
    CHUNK,
    INT8_BYTES,
    INT8_COLUMNS,
    LARGEST_HEAD,
    PANEL,
    TILE,
    Variant,
)
from .products import int8_columns
from .runtime import IR_TYPES, dtype_of, empty, instruction_set, is_plain, kernel_address, noise, run
from .steps import attention_scratch

GEMV_ROWS = 16  # of activations that walk over a weight together, in passes of PASS_ROWS
GELU_CHUNKS = 8  # that a thread takes at a time
SLAB_ROWS = 256  # rows of activations in one matrix product, so that they stay in the last-level cache
DENSE_BYTES = 8 << 20  # of the weight in full precision at a time, for each product that runs at once
ALIGNMENT = 16  # bytes, without which PyTorch's INT8 product crashes for several rows

_buffers: list[Tensor] = []  # of DENSE_BYTES each, which no product uses at the moment


def dequantize(weight: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor | None:
    """scale * weight [N, K] as `dtype` in one pass, the float32 product rounded once; None where not served."""
    if dtype not in IR_TYPES or not is_served(None, weight, scale, bits):
        return None
    address = kernel_address(_variant("dequantize", weight, scale, bits, dtype), _tried_dequantize)
    y = empty(weight.shape[0], columns_of(weight, bits), dtype=dtype)
    return None if address is None else _run_dequantize(address, weight, scale, y)


def gelu(x: Tensor) -> Tensor | None:
    """GELU in its tanh form of [..., K] in bfloat16 or float16, computed in float32; None where not served, which is
    for K % 128 != 0 and where a gradient is wanted."""
    if (
        not is_vector(x)
        or x.dtype == torch.float32
        or x.shape[-1] % CHUNK
        or not x.numel()
        or (torch.is_grad_enabled() and x.requires_grad)
    ):
        return None
    name = IR_TYPES[x.dtype]
    address = kernel_address(Variant("gelu", instruction_set(), 16, 0, "", name, name), tried_gelu)
    if address is None:
        return None
    y = empty(*x.shape, dtype=x.dtype)
    run(address, **gelu_arguments(x, None, y))
    return y


def decode_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor | None:
    """softmax(query @ key.T / sqrt(D)) @ value for one new token, as fast as memory gives the keys and values.

    query: [B, H, 1, D]; key, value: [B, H, T, D], views of larger buffers allowed as long as a head's tokens are
    contiguous; float32, bfloat16 or float16, all the same. visible: bool, broadcast to [B, 1, 1, T]. Scores, weights
    and sums are float32. Returns [B, H, 1, D]. Not differentiable. Served: CPU tensors with D % 32 == 0, D <= 256.
    """
    if not _attention_is_served(query, key, value):
        return None
    mask = None if visible is None else additive(visible, query.shape[0], key.shape[2])
    name = IR_TYPES[query.dtype]
    variant = Variant("attention", instruction_set(), 16, 0, "", "", name, head_size=query.shape[3])
    variant = variant._replace(masked=mask is not None)
    address = kernel_address(variant, _tried_attention)
    return None if address is None else _run_attention(address, query, key, value, mask)


def additive(visible: Tensor, batch: int, tokens: int) -> Tensor:
    """bool -> float32 [B, 1, 1, T], 0 or -infinity."""
    mask = torch.zeros(visible.shape, dtype=torch.float32, device="cpu").masked_fill_(~visible, float("-inf"))
    return mask.expand(batch, 1, 1, tokens).contiguous()


def _attention_is_served(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if query.dim() != 4 or query.shape[2] != 1 or key.shape != value.shape or 0 in key.shape:
        return False
    batch, heads, _, size = query.shape
    if key.dim() != 4 or key.shape[:2] != (batch, heads) or key.shape[3] != size or size % 32 or size > LARGEST_HEAD:
        return False
    states = (query, key, value)
    if not all(is_plain(tensor) and tensor.dtype == query.dtype for tensor in states):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states):
        return False
    return query.dtype in IR_TYPES and key.stride()[2:] == value.stride()[2:] == (size, 1)


def columns_of(weight: Tensor, bits: int) -> int:
    return weight.shape[1] * 2 if bits == 4 else weight.shape[1]


def group_of(weight: Tensor, scale: Tensor | None, bits: int) -> int:
    return 0 if scale is None or scale.dim() == 1 else columns_of(weight, bits) // scale.shape[1]


def is_served(x: Tensor | None, weight: Tensor, scale: Tensor | None, bits: int) -> bool:
    of_x, of_scale = (None if tensor is None else (tensor.dtype, tensor.shape) for tensor in (x, scale))
    if not _fits(bits, weight.dtype, weight.shape, of_x, of_scale):
        return False
    return all(is_plain(tensor) and tensor.is_contiguous() for tensor in (x, weight, scale) if tensor is not None)


def is_vector(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.is_contiguous() and tensor.dtype in IR_TYPES


@functools.lru_cache(maxsize=1024)
def _fits(bits: int, dtype: torch.dtype, shape: tuple, x: tuple | None, scale: tuple | None) -> bool:
    """Whether types and shapes are served; x and scale are (type, shape) or None. Asked for every product: cached."""
    stored_as = {4: (torch.int8,), 8: (torch.int8,), 16: (torch.float16, torch.bfloat16)}
    if dtype not in stored_as.get(bits, ()) or len(shape) != 2 or (scale is None) != (bits == 16):
        return False
    rows, columns = shape[0], shape[1] * (2 if bits == 4 else 1)
    if rows % TILE or columns % CHUNK or rows == 0 or columns == 0:
        return False
    if x is not None and (x[0] not in IR_TYPES or len(x[1]) != 2 or x[1][0] == 0 or x[1][1] != columns):
        return False
    scale_shapes = [(rows,)] + [(rows, columns // group) for group in (32, 64, 128)]
    return scale is None or (scale[0] in IR_TYPES and tuple(scale[1]) in scale_shapes)


# ---------------------------------------------------------------------------------------------- products


class Dots(NamedTuple):
    """How a gemv multiplies, and into which cache it asks for weights ahead."""

    isa: str
    prefetch: int


def gemv(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None, dots: Dots) -> Tensor | None:
    """Walks over the packed weight, with up to GEMV_ROWS rows of x each."""
    parts = []
    for part in x.split(GEMV_ROWS):
        variant = gemv_variant(part, weight, scale, bits, dots)
        address = kernel_address(variant, tried_product)
        if address is None:
            return None
        parts.append(_run_gemv(variant, address, part, weight, scale))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def gemv_variant(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int, dots: Dots) -> Variant:
    variant = _variant("gemv", weight, scale, bits, x.dtype, x.shape[0])._replace(isa=dots.isa, prefetch=dots.prefetch)
    return variant.with_tile(x.shape[1])


def gemv_arguments(x: Tensor, weight: Tensor, scale: Tensor | None, y: Tensor) -> dict[str, Tensor | int | None]:
    places = {"x": x, "weight": weight, "scale": scale, "y": y}
    return {**places, "rows": weight.shape[0], "chunks": x.shape[1] // CHUNK}


def _run_gemv(variant: Variant, address: int, x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    y = empty(x.shape[0], weight.shape[0])
    run(address, variant.gemv_scratch(x.shape[1]), **gemv_arguments(x, weight, scale, y))
    return y


def gemm(
    x: Tensor, weight: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None, int8: bool = False
) -> Tensor | None:
    """Unpacks the weight block by block in each thread's cache and multiplies it with all rows of x, which become int8
    where that is asked for."""
    variant = _variant("gemm", weight, scale, bits, x.dtype)
    variant = variant._replace(bias="" if bias is None else IR_TYPES[bias.dtype], int8=int8)
    if int8 and kernel_address(_of_panels(variant), _tried_panels) is None:
        return None
    address = kernel_address(variant, tried_product)
    return None if address is None else _run_gemm(variant, address, x, weight, scale, bias)


def dense(x: Tensor, weight: Tensor, scale: Tensor, bits: int, bias: Tensor | None) -> Tensor | None:
    """PyTorch's own product with the weight in x's type, rounded once, made block by block in a buffer of DENSE_BYTES
    that is used again: fresh memory costs more in page faults than the product."""
    rows, columns = weight.shape[0], x.shape[1]
    at_once = DENSE_BYTES // (columns * x.element_size()) // TILE * TILE
    address = kernel_address(_variant("dequantize", weight, scale, bits, x.dtype), _tried_dequantize)
    if not at_once or address is None:
        return None
    x, bias = x.detach(), None if bias is None else bias.to(x.dtype)
    buffer = _free_buffer()
    y = empty(len(x), rows, dtype=x.dtype)
    for start in range(0, rows, at_once):
        part = slice(start, min(start + at_once, rows))
        block = buffer.view(x.dtype)[: (part.stop - start) * columns].view(-1, columns)
        _run_dequantize(address, weight[part], scale[part], block)
        y[:, part] = F.linear(x, block, bias if bias is None else bias[part])
    _buffers.append(buffer)
    return y


def _free_buffer() -> Tensor:
    try:
        return _buffers.pop()
    except IndexError:
        with torch.inference_mode(False):  # it outlives the mode of its first use
            return empty(DENSE_BYTES, dtype=torch.uint8)


def int8pack(x: Tensor, weight: Tensor, scale: Tensor, bits: int, bias: Tensor | None) -> Tensor | None:
    """PyTorch's own product of bfloat16 with INT8; None for a weight at an odd address, where it crashes."""
    if weight.data_ptr() % ALIGNMENT:
        return None
    if scale.dtype == x.dtype and bias is None:
        return torch._weight_int8pack_mm(x.detach(), weight, scale)
    y = torch._weight_int8pack_mm(x.detach(), weight, torch.ones_like(scale, dtype=x.dtype)).float().mul_(scale)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _run_gemm(
    variant: Variant, address: int, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    x, y = x.detach(), empty(-(-x.shape[0] // PANEL) * PANEL, weight.shape[0], dtype=x.dtype)
    size = {"rows": weight.shape[0], "chunks": x.shape[1] // CHUNK, "task_rows": BLOCK_ROWS}
    for start in range(0, x.shape[0], SLAB_ROWS):
        panels = _slab(variant, x[start : start + SLAB_ROWS])
        scratch = variant.gemm_scratch(len(panels))
        places = {"weight": weight, "scale": scale, "bias": bias, "x": panels, "y": y[start:]}
        run(address, scratch, panels=len(panels), **places, **size)
    return y[: x.shape[0]]


def _slab(variant: Variant, x: Tensor) -> Tensor:
    """x as the panels that a gemm wants."""
    if not variant.int8:
        return _panels(x, variant.dots_bf16)
    return _run_panels(kernel_address(_of_panels(variant), _tried_panels), x)


def _of_panels(variant: Variant) -> Variant:
    return Variant("quantize_panels", variant.isa, variant.bits, 0, "", "", variant.x)


def _run_panels(address: int, x: Tensor) -> Tensor:
    """x [M, K] -> [ceil(M / 16), K / 32, INT8_BYTES] int8."""
    size = {"tokens": len(x), "rows": -(-len(x) // PANEL), "chunks": x.shape[1] // CHUNK, "task_rows": 1}
    panels = empty(size["rows"], x.shape[1] // INT8_COLUMNS, INT8_BYTES, dtype=torch.int8)
    run(address, x=x, y=panels, **size)
    return panels


def activations_as_int8(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """In plain PyTorch, what int8 products make of x [M, K] for weights of `bits`: integers, and their scales, [M, K]
    each."""
    order = torch.tensor(int8_columns(bits), device="cpu")  # [blocks of a chunk, INT8_COLUMNS]
    blocks = x.float().unflatten(1, (-1, CHUNK))[:, :, order]
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # Tensor by tensor: torch takes the reciprocal where a number is divided by a tensor, which rounds twice.
    inverse = torch.where(largest == 0, 0.0, torch.full_like(largest, 127) / largest)
    values, scales = torch.empty(2, len(x), x.shape[1] // CHUNK, CHUNK, device="cpu")
    values[:, :, order] = (blocks * inverse).round()
    scales[:, :, order] = (largest / 127).expand_as(blocks)
    return values.flatten(1), scales.flatten(1)


def _panels(x: Tensor, pairs: bool) -> Tensor:
    """x [M, K] -> [ceil(M / 16), K, 16] float32, or with `pairs` [.., K / 2, 16] of two bfloat16 each; zeros below."""
    words = x.view(torch.int32) if pairs else x.float()
    panels = words.new_empty(-(-len(x) // PANEL), words.shape[1], PANEL)
    for number, panel in enumerate(panels):
        rows = words[number * PANEL : (number + 1) * PANEL]
        if len(rows) < PANEL:
            panel.zero_()
        panel[:, : len(rows)].copy_(rows.t())
    return panels


def _run_dequantize(address: int, weight: Tensor, scale: Tensor | None, y: Tensor) -> Tensor:
    run(address, weight=weight, scale=scale, y=y, rows=y.shape[0], chunks=y.shape[1] // CHUNK)
    return y


def _run_attention(address: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query [B, H, 1, D], key and value [B, H, T, D], mask [B, 1, 1, T] float32 -> context [B, H, 1, D]."""
    context = empty(*query.shape, dtype=query.dtype)
    scratch = attention_scratch(key.shape[2])
    run(address, scratch, x=query.contiguous(), y=context, mask=mask, **attention_arguments(key, value))
    return context


def attention_arguments(key: Tensor, value: Tensor) -> dict[str, int]:
    """Of the kernels that read these keys and values, [B, H, T, D] each."""
    batch, heads, tokens, _ = key.shape
    arguments = {"rows": batch * heads, "heads": heads, "tokens": tokens, "task_rows": 1}
    for name, states in (("key", key), ("value", value)):
        strides = [stride * states.element_size() for stride in states.stride()[:2]]
        arguments.update(
            {name: states.data_ptr(), f"{name}_batch_stride": strides[0], f"{name}_head_stride": strides[1]}
        )
    return arguments


def gelu_arguments(x: Tensor, bias: Tensor | None, y: Tensor) -> dict[str, Tensor | int | None]:
    chunks = y.shape[-1] // CHUNK
    size = {"rows": y.numel() // CHUNK, "chunks": chunks, "task_rows": GELU_CHUNKS}
    return {"x": x, "bias": bias, "y": y, **size}


def flush(weight: Tensor) -> None:
    """Takes it out of the caches, so that the next product reads it from memory."""
    address = kernel_address(Variant("flush", instruction_set(), 8, 0, "", "", ""), None)
    if address is not None:
        run(address, weight=weight, rows=weight.nbytes // 64, task_rows=1024)


def plain_weight(weight: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """scale * weight in float32, by PyTorch alone."""
    values = (unpack_int4(weight) if bits == 4 else weight).float()
    if scale is None:
        return values
    scale = scale.float().view(len(values), -1, 1)
    return (values.view(len(values), scale.shape[1], -1) * scale).flatten(1)


# ---------------------------------------------------------------------------------------------- variants, their trials


def _variant(kind: str, weight: Tensor, scale: Tensor | None, bits: int, x: torch.dtype, rows: int = 0) -> Variant:
    weight_type = IR_TYPES[weight.dtype] if bits == 16 else ""
    scale_type = "" if scale is None else IR_TYPES[scale.dtype]
    return Variant(
        kind, instruction_set(), bits, group_of(weight, scale, bits), weight_type, scale_type, IR_TYPES[x], rows
    )


def tried_product(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = max(variant.block_columns, variant.slab_columns) + CHUNK  # neither blocks of rows nor columns are whole
    weight, scale, exact = _example(variant, BLOCK_ROWS + TILE, columns)
    x = noise(variant.rows or 2 * PANEL + 1, columns).to(dtype_of(variant.x))
    if variant.kind == "gemv":
        bias, y = None, _run_gemv(variant, address, x, weight, scale)
    else:
        bias = noise(len(weight), dtype=dtype_of(variant.bias)) if variant.bias else None
        y = _run_gemm(variant, address, x, weight, scale, bias)
    if variant.int8:
        values, scales = activations_as_int8(x, variant.bits)
        x = values.double() * scales.double()
    rounded_weight = 2.0**-9 if variant.kind == "gemm" and variant.dots_bf16 and variant.group else 0.0
    magnitude, exact = x.double().abs() @ exact.abs().T, x.double() @ exact.T + (0 if bias is None else bias.double())
    return y, exact, (1e-5 + rounded_weight) * magnitude + torch.finfo(y.dtype).eps * exact.abs()


def _tried_panels(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    """Seen as whole numbers: every byte of the values, every offset, and the bits of the scales."""
    x = noise(PANEL + 3, 3 * CHUNK, dtype=dtype_of(variant.x))
    x[1, :CHUNK], x[2] = 0, x[2] * 100
    rows = torch.arange(2 * PANEL, device="cpu").clamp(max=len(x) - 1)
    values, scales = (part[rows].view(2, PANEL, -1, CHUNK) for part in activations_as_int8(x, variant.bits))
    order = torch.tensor(int8_columns(variant.bits), device="cpu")
    values, scales = values[..., order].flatten(2, 3), scales[..., order].flatten(2, 3)[..., 0]  # [2, 16, blocks, 32]
    fours = values.unflatten(-1, (-1, 4)).permute(0, 2, 3, 1, 4).flatten(2).to(torch.int8)
    offsets = (-(1 << variant.bits - 1) * values.sum(-1)).to(torch.int32)
    head = (part.transpose(1, 2).contiguous().view(torch.int8) for part in (scales, offsets))
    exact = torch.cat((*head, fours), dim=-1).double()
    return _run_panels(address, x).double(), exact, torch.zeros_like(exact)


def _tried_dequantize(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, scale, exact = _example(variant, BLOCK_ROWS + TILE, 3 * CHUNK)
    exact = exact.float().to(dtype_of(variant.x))
    y = _run_dequantize(address, weight, scale, torch.empty_like(exact))
    return y, exact, torch.zeros_like(exact)


def _tried_attention(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences of two heads, in buffers with room for more tokens."""
    query, states = noise(2, 2, 1, variant.head_size), noise(4, 2, 40, variant.head_size)[:, :, :37]
    query, (key, value) = query.to(dtype_of(variant.x)), states.to(dtype_of(variant.x)).split(2)
    mask = noise(2, 1, 1, 37) if variant.masked else None
    y = _run_attention(address, query, key, value, mask)
    scores = query.double() @ key.double().mT / variant.head_size**0.5
    weights = (scores if mask is None else scores + mask.double()).softmax(-1)
    exact, size = weights @ value.double(), weights @ value.double().abs()
    return y, exact, 1e-5 * size + torch.finfo(y.dtype).eps * exact.abs()


def tried_gelu(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = 3 * CHUNK
    x, y = (4 * noise(2, columns)).to(dtype_of(variant.scale)), empty(2, columns, dtype=dtype_of(variant.x))
    bias = noise(columns, dtype=dtype_of(variant.bias)) if variant.bias else None
    run(address, **gelu_arguments(x, bias, y))
    exact = torch.nn.functional.gelu(x.double() + (0 if bias is None else bias.double()), approximate="tanh")
    return y, exact, 1e-6 * (1 + exact.abs()) + torch.finfo(y.dtype).eps * exact.abs()


def _example(variant: Variant, rows: int, columns: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """A weight [rows, columns] with every bit pattern of its type, its scale, and both multiplied in float64."""
    if variant.bits == 16:
        weight = noise(rows, columns).to(dtype_of(variant.weight))
        return weight, None, weight.double()
    bytes_per_row = columns * variant.bits // 8
    weight = torch.arange(rows * bytes_per_row, device="cpu").mul(167).to(torch.int8).view(rows, bytes_per_row)
    values = weight if variant.bits == 8 else unpack_int4(weight)
    groups = columns // variant.group if variant.group else 1
    scale = (
        torch.linspace(0.5, 1.5, rows * groups, dtype=torch.float32, device="cpu")
        .view(rows, groups)
        .to(dtype_of(variant.scale))
    )
    exact = values.double() * scale.double().repeat_interleave(columns // groups, 1)
    return weight, scale if variant.group else scale.flatten(), exact


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 [..., in / 2], the even column in the high nibble -> int8 [..., in]."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)
