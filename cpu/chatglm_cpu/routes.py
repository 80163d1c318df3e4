"""Which kernel computes what: every choice of the engine is made here.

For weights of SMALLEST and more the ways to compute a product are timed at its first use (measuring.py), and the
fastest one serves all products of that format with about as many rows; for smaller ones the constants below decide.
A function returns None where PyTorch's own way is as good, or nothing here serves.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import measuring
from .ir import BLOCK_ROWS
from .kernels import Dots, decode_attention, dense, gemm, gemv, group_of, int8pack, is_served, is_vector
from .prompt import prompt_attention
from .runtime import held, instruction_set

CLASSES = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512)  # rows of activations: up to so many are computed alike
SMALLEST = 1 << 20  # weights of a matrix; below, nothing is timed
MOST_GEMV_ROWS, FEWEST_GEMM_ROWS, MOST_INT8PACK_ROWS = 32, 5, 64  # beyond, not worth a trial
FEW_ROWS, FEW_ROWS_WITHOUT_PAIRS = 16, 8  # up to so many a gemv is tried first; the second for 16-bit weights
FEWEST_TOKENS = 256  # of a prompt; below, its matrix products are too small
FEW_SEQUENCES = 4  # for which a decode program is always the fastest
MOST_THREADS = 4  # `scaled_dot_product_attention` shares out heads, `prompt_attention` the rows of each: for few cores


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bits: int,
    bias: Tensor | None = None,
    int8_activations: bool = False,
) -> Tensor | None:
    """x @ (scale * weight).T + bias without the weight in full precision, or None where that is not served.

    Routes: see `candidates`, of which the fastest computes. With `int8_activations` one of them multiplies int8 where
    the processor can.

    x: [M, K] float32, bfloat16 or float16; the result is [M, N] of the same type.
    weight: bits 8: int8 [N, K]; 4: int8 [N, K/2], even column in the high nibble; 16: float16 or bfloat16 [N, K].
    scale: [N], or [N, K/group] with groups of 32, 64 or 128 columns, of any of the three types; None for 16 bits.
    bias: [N] of any of the three types; added in float32, before the one rounding.
    int8_activations: x may be rounded to int8, with a scale for each 32 columns, where many rows gain from that.
    Not differentiable. Served: contiguous CPU tensors with N % 4 == 0 and K % 128 == 0.

    >>> weight = torch.tensor([[1, -128], [2, 3], [0, 0], [127, 5]], dtype=torch.int8).repeat(1, 64)
    >>> y = linear(torch.ones(1, 128), weight, torch.full((4,), 0.5), 8)
    >>> y is None or y.tolist()
    [[-4064.0, 160.0, 0.0, 4224.0]]
    """
    if not _is_served(x, weight, scale, bits, bias):
        return None
    weight, scale, bias = held(weight), held(scale), held(bias)  # of one moment, whoever swaps them meanwhile
    names = ranked(x, weight, scale, bits, int8_activations)
    if names[0] == "torch":
        return None  # which the caller computes
    y = _compute(names[0], x, weight, scale, bits, bias)
    return y if y is not None or len(names) == 1 else _compute(names[1], x, weight, scale, bits, bias)


def linear_by(
    name: str, x: Tensor, weight: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None = None
) -> Tensor | None:
    """`linear` by one of the `candidates`, or None where that one does not serve, for instance on this processor."""
    if not _is_served(x, weight, scale, bits, bias):
        return None
    group = group_of(weight, scale, bits)
    if name not in candidates(len(x), x.dtype, bits, group, weight.dtype, True):
        return None
    return _compute(name, x, held(weight), held(scale), bits, held(bias))


def _is_served(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None) -> bool:
    return bool(instruction_set()) and is_served(x, weight, scale, bits) and (bias is None or is_vector(bias))


def _compute(name: str, x: Tensor, weight: Tensor, scale, bits: int, bias) -> Tensor | None:
    way, *how = name.split("-")
    if way == "gemv":
        return gemv(x, weight, scale, bits, bias, dots(*how))
    if way == "gemm":
        return gemm(x, weight, scale, bits, bias, bool(how)) if len(weight) >= BLOCK_ROWS else None
    if way == "torch":
        return F.linear(x.detach(), weight, bias if bias is None else bias.to(x.dtype))
    return {"dense": dense, "int8pack": int8pack}[way](x, weight, scale, bits, bias)


def dots(lanes: str, cache: str) -> Dots:
    """Of the gemv by this name: pairs of bfloat16, or float32; weights asked for ahead into which cache."""
    isa = instruction_set()
    return Dots("avx512" if lanes == "f32" and isa == "avx512_bf16" else isa, {"l1": 3, "l2": 2}[cache])


def candidates(
    rows: int, x: torch.dtype, bits: int, group: int = 0, weight: torch.dtype = torch.int8, int8: bool = False
) -> list[str]:
    """The ways to compute a product with `rows` rows of activations of type x, the one by default first.

    gemv-bf16-l2, gemv-f32-l2, gemv-bf16-l1 or gemv-f32-l1: walks over the weight for up to 16 rows each, with dots of
    bfloat16 pairs or in float32, and the weights asked for ahead into the second or the first cache. gemm, gemm-int8:
    blocks of the weight are unpacked and multiplied with all rows, which with `int8` may be rounded to int8. dense:
    blocks of the weight in x's type, and PyTorch's product. int8pack: PyTorch's product with INT8. torch: PyTorch's
    own product with 16-bit weights.
    """
    return _candidates(instruction_set(), rows, x, bits, group, weight, int8)


@functools.cache
def _candidates(isa: str, rows: int, x: torch.dtype, bits: int, group: int, weight: torch.dtype, int8: bool):
    pairs = isa == "avx512_bf16" and x == torch.bfloat16 and weight != torch.float16
    # Float32 wins for one row of INT8 on a Zen 4, and for all few rows on an Intel with AMX.
    lanes = ["f32"] + ["bf16"] * pairs if bits == 8 else ["bf16"] * pairs + ["f32"]
    gemvs = [*(f"gemv-{of}-l2" for of in lanes), f"gemv-{lanes[0]}-l1"] if rows <= MOST_GEMV_ROWS else []
    others = []
    if rows >= FEWEST_GEMM_ROWS and not (bits == 16 and pairs):
        vnni = int8 and bits < 16 and not group and isa == "avx512_bf16"  # which comes with it
        others += ["gemm-int8"] * vnni + ["gemm"]
    if rows >= FEWEST_GEMM_ROWS and bits < 16:
        others.append("dense")
    if bits == 8 and not group and x == torch.bfloat16 and rows <= MOST_INT8PACK_ROWS:
        others += ["int8pack"] * hasattr(torch, "_weight_int8pack_mm")
    if bits == 16 and rows > 1 and x == weight:
        others.append("torch")
    few = FEW_ROWS_WITHOUT_PAIRS if bits == 16 and not pairs else FEW_ROWS
    return gemvs + others if rows <= few else others + gemvs


def ranked(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int, int8: bool = False) -> list[str]:
    """The candidates for such a product, the one that computes it first."""
    rows, group = len(x), group_of(weight, scale, bits)
    if weight.shape[0] < BLOCK_ROWS:
        return candidates(1, x.dtype, bits, group, weight.dtype)[:1]
    if weight.shape[0] * x.shape[1] < SMALLEST:
        return candidates(rows, x.dtype, bits, group, weight.dtype, int8)[:1]
    rows = next((limit for limit in CLASSES if rows <= limit), CLASSES[-1])
    names = candidates(rows, x.dtype, bits, group, weight.dtype, int8)
    if len(names) == 1:
        return names
    kind = f"int{bits}" + f"g{group}" * bool(group) if bits < 16 else _name(weight.dtype)
    label = f"{kind}:{_name(x.dtype)}{'-int8' * ('gemm-int8' in names)}:{rows}"
    return measuring.ranking(measuring.Problem(label, rows, x.dtype, weight, scale, bits), names, _compute)


def program_dots(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Dots | None:
    """How a decode program, which has gemvs alone, computes this product; None for so many rows that another way was
    measured to be faster."""
    names = ranked(x, weight, scale, bits)
    if len(names) == 1:  # not measured: what stands between small products costs more than they do
        names = candidates(len(x), x.dtype, bits, group_of(weight, scale, bits), weight.dtype)
    elif len(x) > FEW_SEQUENCES and not names[0].startswith("gemv"):
        return None
    return next(dots(*name.split("-")[1:]) for name in names if name.startswith("gemv"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor | None:
    """softmax(query @ key.T / sqrt(D)) @ value, [B, H, S, D]; None where PyTorch's own is to be taken.

    Routes: for one new token a kernel that reads keys and values as fast as memory gives them; for FEWEST_TOKENS and
    more matrix products in bfloat16, on processors that have those without AMX, with up to MOST_THREADS threads.

    query: [B, H, S, D]; key, value: [B, H, T, D]; visible: bool, broadcast to [B, 1, S, T].
    """
    if query.dim() == 4 and query.shape[2] == 1:
        return decode_attention(query, key, value, visible)
    if query.shape[-2] < FEWEST_TOKENS or torch.get_num_threads() > MOST_THREADS or not multiplies_bfloat16():
        return None
    return prompt_attention(query, key, value, visible)


@functools.cache
def multiplies_bfloat16() -> bool:
    """AVX-512 with bfloat16, but not AMX, for which PyTorch's attention has products of its own."""
    found = [getattr(torch.cpu, f"_is_{what}_supported", lambda: False)() for what in ("avx512_bf16", "amx_tile")]
    return found == [True, False]
