"""What the kernels have to compute, on guarded memory: bit for bit, or within a bound that is derived, not tuned.

Each check takes the emulated GPU's kernels and raises AssertionError; tests/test_cuda_kernels.py runs them on the real
source, mutants.py on broken ones.
"""

from __future__ import annotations

import torch
from chatglm_slim import cuda_kernels
from chatglm_slim.kernel_routes import dequantize_weight, unpack_int4
from chatglm_slim.quantization import quantize_weight
from torch import Tensor

from .guarded import Guarded, read_only

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CHUNK = {8: 16, 4: 32}  # weights in a 128-bit load


def random_weight(
    rows: int, columns: int, bits: int, groups: int, scale_dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Every integer of the format, the most negative too, and scales that differ by row and group."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (rows, columns * bits // 8), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3
    return weight, (scale if groups > 1 else scale.flatten()).to(scale_dtype)


def check_quantize(kernels, weight: Tensor, bits: int, at_end: bool = True) -> None:
    """The kernel's integers and scales are those of plain PyTorch."""
    rows, columns = weight.shape
    expected, expected_scale = quantize_weight(weight, bits)
    packed = Guarded(expected.shape, torch.int8, at_end)
    scale = Guarded((rows,), expected_scale.dtype, at_end)
    kernels.quantize(read_only(weight, at_end), bits, packed.tensor, scale.tensor)
    assert same_bits(scale.tensor, expected_scale)
    assert torch.equal(packed.tensor, expected)
    packed.check_surroundings()
    scale.check_surroundings()


def check_dequantize(kernels, rows, columns, bits, groups, scale_dtype, dtype, at_end: bool = True) -> None:
    """The kernel's matrix is that of plain PyTorch."""
    weight, scale = random_weight(rows, columns, bits, groups, scale_dtype)
    out = Guarded((rows, columns), dtype, at_end)
    out.tensor.fill_(float("nan"))
    weight, scale = read_only(weight, at_end), read_only(scale, at_end)
    kernels.dequantize(cuda_kernels._describe(weight, scale, bits), bits, out.tensor)
    assert same_bits(out.tensor, dequantize_weight(weight, scale, bits, dtype))
    out.check_surroundings()


def check_linear(kernels, m, rows, columns, bits, groups, scale_dtype, dtype, at_end: bool = True) -> Tensor:
    """The product, which has to be the float64 one within `product_bound`, as has the one with a bias."""
    weight, scale = random_weight(rows, columns, bits, groups, scale_dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, columns, generator=generator)
    x[:, ::7] *= 20  # outliers, as real activations have
    x = x.to(dtype)
    y = Guarded((m, rows), dtype, at_end)
    y.tensor.fill_(float("nan"))
    weight, scale = read_only(weight, at_end), read_only(scale, at_end)
    matrix, x = cuda_kernels._describe(weight, scale, bits), read_only(x, at_end)
    exact = exact_matrix(weight, scale, bits, dtype)
    expected, magnitude = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    bias = read_only((torch.linspace(-1, 1, rows) * magnitude.mean()).to(dtype), at_end)
    for added in (bias, None):
        kernels.linear(matrix, bits, x, added, y.tensor)
        plus = torch.zeros(rows) if added is None else added.double()
        error = (y.tensor.double() - expected - plus).abs()
        bound = product_bound(magnitude + plus.abs(), expected + plus, columns, bits, dtype)
        assert bool((error <= bound).all()), f"error {error.max():.3g}, {(error / bound).max():.3g} of the bound"
        y.check_surroundings()
    return y.tensor


def exact_matrix(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Integer x scale in float64; the scale in the precision of the product, as PyTorch's conversion gives it."""
    values = (unpack_int4(weight) if bits == 4 else weight).double()
    groups = scale.view(scale.shape[0], -1).to(dtype).double()
    return values * groups.repeat_interleave(values.shape[1] // groups.shape[1], dim=1)


def product_bound(magnitude: Tensor, expected: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Half a unit of the last place for the one rounding to `dtype`, plus what summing in float32 may cost.

    A weight times an activation is rounded once and added to at most CHUNK others by a lane, multiplied by the scale,
    added to the lane's other chunks, to 31 other lanes in 5 steps, and to the bias: each step may be off by 2^-24 of
    the sum of the absolute values.
    """
    steps = 1 + CHUNK[bits] + 1 + -(-columns // (32 * CHUNK[bits])) + 5 + 1
    summing = steps * 2.0**-24 * magnitude
    largest = (expected.abs() + summing).clamp(min=torch.finfo(dtype).smallest_normal)
    last_place = 2.0 ** (torch.floor(torch.log2(largest))) * torch.finfo(dtype).eps
    return summing + last_place / 2


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns: NaN equals NaN, +0 differs from -0."""
    integers = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


# ---- the whole matter in a few seconds, for mutants -----------------------------------------------------------------


def check_everything(kernels) -> None:
    """Each kernel on the smallest shapes that have a tail, a second round, a group and an odd row."""
    for bits in (8, 4):
        for dtype in FLOATS:
            check_quantize(kernels, edge_weights(dtype), bits)
            check_quantize(kernels, torch.randn(3, 600, generator=torch.Generator().manual_seed(2)).to(dtype), bits)
            for columns, groups in ((8, 1), (72, 1), (256, 8)):
                check_dequantize(kernels, 3, columns, bits, groups, dtype, dtype)
            columns = 33 * CHUNK[bits]  # one lane has a second chunk
            for m, rows in ((1, 9), (3, 17), (6, 17)):  # a block of W and a row more
                check_linear(kernels, m, rows, columns, bits, 1, dtype, dtype)
            check_linear(kernels, 2, 3, 256, bits, 8, dtype, dtype)
        for scale_dtype in FLOATS:
            check_linear(kernels, 1, 3, 64, bits, 1, scale_dtype, torch.float16)


def edge_weights(dtype: torch.dtype) -> Tensor:
    """Rows that go wrong easily: zeros, ties between integers, the smallest and the largest numbers, NaN, infinity."""
    tiny = torch.finfo(dtype).tiny
    rows = [
        [0.0] * 8,
        [127, 126.5, -127, 63.5, -63.5, 0.5, -0.5, 1.5],
        [7, 6.5, 5.5, 4.5, -3.5, -2.5, -1.5, -0.5],
        [tiny, -tiny / 2, tiny / 4, 0, -0.0, tiny, tiny, tiny],
        [6e-8] * 8,
        [6e-8, 1.2e-7, -1.4e-5, 3.6e-6, -3.1e-6, 0, 0, 1],
        [60000, -60000, 30000, 1, 0, 0, 0, 0],
        [float("nan"), 1, 2, 3, 4, 5, 6, 7],
        [float("inf"), 1, -float("inf"), 3, 4, 5, 6, 7],
        [1.4e-5, 1.3e-5, -1.4e-5, 1e-6, 2e-6, -3e-6, 5e-6, 7e-6],
    ]
    return torch.tensor(rows).to(dtype)
