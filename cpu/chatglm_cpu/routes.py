"""Which kernel computes what: every choice of the engine is made here, by the constants below.

They are what was measured (benchmarks/cpu_kernels.py of the repository); a function returns None where PyTorch's own
way is as good, or nothing here serves.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .ir import BLOCK_ROWS
from .kernels import decode_attention, gemm, gemv, is_served, is_vector
from .prompt import prompt_attention
from .runtime import held

FEW_ROWS = {4: 16, 8: 12, 16: 8}  # bits -> up to so many rows, passes of a gemv beat a gemm
FEWEST_TOKENS = 256  # of a prompt; below, its matrix products are too small
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

    Routes: up to FEW_ROWS rows, or for small weights, a `gemv` that passes over the weight for each four of them; for
    more a `gemm` that unpacks blocks of the weight, except with bfloat16 weights where the processor multiplies
    bfloat16: PyTorch's own product is as fast there. With `int8_activations` the gemm multiplies int8 where the
    processor can.

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
    if not is_served(x, weight, scale, bits) or not (bias is None or is_vector(bias)):
        return None
    weight, scale, bias = held(weight), held(scale), held(bias)  # of one moment, whoever swaps them meanwhile
    if x.shape[0] <= FEW_ROWS[bits] or weight.shape[0] < BLOCK_ROWS:
        return gemv(x, weight, scale, bits, bias)
    return gemm(x, weight, scale, bits, bias, int8_activations)


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
