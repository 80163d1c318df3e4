"""INT8 and INT4 products on NVIDIA GPUs: CUDA kernels of our own, compiled at first use, launched by cpm_kernels.

`SOURCE` is the CUDA C++ text. It includes no header, so NVRTC needs no toolkit, and the tests compile the very same
text with g++ behind an emulated driver (tests/cuda_emulation). The Python half below it finds NVRTC, compiles for the
GPU at hand, checks the result against PyTorch there and launches on torch's current stream. Nothing of CUDA is touched
before the first quantized product on a CUDA tensor. Where the kernels cannot be had, one warning names the cause and
the cure, `linear`, `dequantize` and `quantize` return None, and quantization.py computes the same with plain PyTorch.

Notation: M rows of activations, N output features, K input features, G groups of columns with a scale of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import glob
import importlib.util
import os
import re
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to this many rows the weights are read as they are, from memory once. Above it they are first written out in 16
# bits for cuBLAS, which moves 5 (INT8) or 9 (INT4) times the bytes but multiplies on tensor cores.
FUSED_ROWS = 16

SOURCE = r"""
// A quantized matrix: `rows` output features by `columns` input features, row after row.
//   8 bits: one signed byte a column.
//   4 bits: one byte for two columns, two's complement, the even column in the HIGH nibble.
// A scale serves 2^groupShift columns of a row; with one scale per row groups = 1 and groupShift = 31.
// Python fills this struct in as class _Matrix: same fields, same order.
struct Matrix {
    const signed char *packed;
    const void *scale;
    int scaleType;
    int rows, columns, groups, groupShift;
};
enum ScaleType { HALF_SCALE, BFLOAT16_SCALE, FLOAT_SCALE };

// ---- 1. Element types: 16 bits of storage, arithmetic in float -----------------------------------------------------

struct half { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

#ifdef __CUDACC__  // all the PTX there is; the emulation has these three functions in C++
__device__ __forceinline__ float halfBitsToFloat(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ unsigned short floatToHalfBits(float value) {  // to nearest, ties to even
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ unsigned andOr(unsigned a, unsigned mask, unsigned b) {  // (a & mask) | b, one LOP3
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(mask), "r"(b));
    return result;
}
#endif

__device__ __forceinline__ float load(const float *p) { return *p; }
__device__ __forceinline__ float load(const half *p) { return halfBitsToFloat(p->bits); }
__device__ __forceinline__ float load(const bfloat16 *p) { return __uint_as_float((unsigned)p->bits << 16); }

__device__ __forceinline__ void store(float *p, float value) { *p = value; }
__device__ __forceinline__ void store(half *p, float value) { p->bits = floatToHalfBits(value); }
__device__ __forceinline__ void store(bfloat16 *p, float value) {  // to nearest, ties to even
    const unsigned bits = __float_as_uint(value);
    const bool isNan = (bits & 0x7fffffffu) > 0x7f800000u;
    p->bits = isNan ? 0x7fc0 : (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <class T> __device__ __forceinline__ float rounded(float value) {
    T element;
    store(&element, value);
    return load(&element);
}

// 128 bits at once; p is a multiple of 16 bytes.
__device__ __forceinline__ void load128(const void *p, unsigned *words) {
    const uint4 loaded = *(const uint4 *)p;
    words[0] = loaded.x; words[1] = loaded.y; words[2] = loaded.z; words[3] = loaded.w;
}
__device__ __forceinline__ void store128(void *p, const unsigned *words) {
    uint4 stored;
    stored.x = words[0]; stored.y = words[1]; stored.z = words[2]; stored.w = words[3];
    *(uint4 *)p = stored;
}

// Eight consecutive elements.
__device__ __forceinline__ void load8(const float *p, float *values) {
    unsigned words[8];
    load128(p, words);
    load128(p + 4, words + 4);
    #pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __uint_as_float(words[i]);
}
template <class T> __device__ __forceinline__ void load8(const T *p, float *values) {
    unsigned words[4];
    load128(p, words);
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        T element;
        element.bits = (unsigned short)(words[i / 2] >> 16 * (i % 2));
        values[i] = load(&element);
    }
}
__device__ __forceinline__ void store8(float *p, const float *values) {
    unsigned words[8];
    #pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = __float_as_uint(values[i]);
    store128(p, words);
    store128(p + 4, words + 4);
}
template <class T> __device__ __forceinline__ void store8(T *p, const float *values) {
    unsigned words[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        T low, high;
        store(&low, values[2 * i]);
        store(&high, values[2 * i + 1]);
        words[i] = low.bits | (unsigned)high.bits << 16;
    }
    store128(p, words);
}

// ---- 2. Weights ----------------------------------------------------------------------------------------------------

// Both unpack8 turn 8 weights into exact floats without the slow integer conversion: with its sign bit flipped, a
// weight is an unsigned number u; u in the low mantissa bits of the float 2^23 makes it 2^23 + u; what follows is one
// subtraction, which is exact.
template <int BITS> __device__ __forceinline__ void unpack8(const unsigned *words, float *values);

template <> __device__ __forceinline__ void unpack8<8>(const unsigned *words, float *values) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const unsigned flipped = words[i / 4] ^ 0x80808080u;
        const unsigned selector = 0x7540u + i % 4;  // lowest byte: byte i of the word; above it the bytes 00 00 4B
        values[i] = __uint_as_float(__byte_perm(flipped, 0x4B000000u, selector)) - (8388608.f + 128.f);
    }
}
// A nibble that starts at mantissa bit b fits the float 2^(23-b) instead, so that five of eight need no shift.
template <> __device__ __forceinline__ void unpack8<4>(const unsigned *words, float *values) {
    const unsigned flipped = words[0] ^ 0x88888888u;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int nibble = i ^ 1;  // the even column is in the high nibble
        const unsigned word = nibble < 5 ? flipped : flipped >> 20;
        const int bit = 4 * (nibble < 5 ? nibble : nibble - 5);
        const unsigned power = (unsigned)(127 + 23 - bit) << 23;
        values[i] = __uint_as_float(andOr(word, 15u << bit, power)) - ((float)(1 << (23 - bit)) + 8.f);
    }
}
template <int BITS> __device__ __forceinline__ float unpack1(const signed char *row, int column) {
    if (BITS == 8) return (float)row[column];
    const int pair = row[column / 2];
    return (float)(column % 2 ? (int)((unsigned)pair << 28) >> 28 : pair >> 4);
}

template <int BITS> __device__ __forceinline__ const signed char *packedRow(const Matrix &w, int row) {
    return w.packed + (long long)row * w.columns / (8 / BITS);
}
// The scale in T's precision, as PyTorch's conversion gives it.
template <class T> __device__ __forceinline__ float scaleAt(const Matrix &w, int row, int column) {
    const long long i = (long long)row * w.groups + (column >> w.groupShift);
    if (w.scaleType == HALF_SCALE) return rounded<T>(load((const half *)w.scale + i));
    if (w.scaleType == BFLOAT16_SCALE) return rounded<T>(load((const bfloat16 *)w.scale + i));
    return rounded<T>(load((const float *)w.scale + i));
}

// ---- 3. y = x W^T for few rows of x --------------------------------------------------------------------------------

// A warp owns WARP_ROWS rows of W and TILE rows of x. A lane reads 128 bits of each row of W, then the activations
// that meet them, and sums in float; the warp adds its lanes up at the end. columns is a multiple of CHUNK and a group
// of scales at least one CHUNK. Neighbouring blocks take the same rows of W: one reads them from memory, the others
// find them in the L2 cache.
enum { LINEAR_THREADS = 128, WARP_ROWS = 2 };

__device__ __forceinline__ float warpSum(float sum) {
    #pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return sum;
}

template <class T, int BITS, int TILE>
__device__ __forceinline__ void linear(const Matrix &w, const T *x, T *y, int m) {
    enum { CHUNK = 128 / BITS };
    const int tiles = (m + TILE - 1) / TILE;
    const int firstX = blockIdx.x % tiles * TILE;
    const int lane = threadIdx.x % 32;
    const int warp = blockIdx.x / tiles * (LINEAR_THREADS / 32) + threadIdx.x / 32;
    const int firstRow = warp * WARP_ROWS;
    if (firstRow >= w.rows) return;  // the whole warp, so that the shuffles below have all their lanes

    int rows[WARP_ROWS];  // past the end: the last row once more, computed and thrown away
    #pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r) rows[r] = min(firstRow + r, w.rows - 1);

    float sums[WARP_ROWS][TILE] = {};
    for (int column = lane * CHUNK; column < w.columns; column += 32 * CHUNK) {
        unsigned words[WARP_ROWS][4];
        #pragma unroll
        for (int r = 0; r < WARP_ROWS; ++r) load128(packedRow<BITS>(w, rows[r]) + column / (8 / BITS), words[r]);
        float parts[WARP_ROWS][TILE] = {};
        #pragma unroll
        for (int i = 0; i < CHUNK; i += 8) {
            float weights[WARP_ROWS][8];
            #pragma unroll
            for (int r = 0; r < WARP_ROWS; ++r) unpack8<BITS>(words[r] + i * BITS / 32, weights[r]);
            #pragma unroll
            for (int t = 0; t < TILE; ++t) {
                float activations[8];
                load8(x + min(firstX + t, m - 1) * w.columns + column + i, activations);
                #pragma unroll
                for (int r = 0; r < WARP_ROWS; ++r)
                    #pragma unroll
                    for (int e = 0; e < 8; ++e) parts[r][t] += weights[r][e] * activations[e];
            }
        }
        #pragma unroll
        for (int r = 0; r < WARP_ROWS; ++r) {
            const float scale = scaleAt<T>(w, rows[r], column);
            #pragma unroll
            for (int t = 0; t < TILE; ++t) sums[r][t] += scale * parts[r][t];
        }
    }

    #pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r)
        #pragma unroll
        for (int t = 0; t < TILE; ++t) {
            const float sum = warpSum(sums[r][t]);
            if (lane == 0 && firstRow + r < w.rows && firstX + t < m)
                store(y + (long long)(firstX + t) * w.rows + firstRow + r, sum);
        }
}

// ---- 4. Writing the weights out: one block a row -------------------------------------------------------------------

// weight x scale, rounded once: for half that is the official fp16(integer) * fp16 scale.
template <class T, int BITS> __device__ __forceinline__ void dequantize(const Matrix &w, T *out) {
    const int row = blockIdx.x;
    const signed char *packed = packedRow<BITS>(w, row);
    out += (long long)row * w.columns;
    if (w.columns % 8) {  // rows begin anywhere: column by column
        for (int column = threadIdx.x; column < w.columns; column += blockDim.x)
            store(out + column, unpack1<BITS>(packed, column) * scaleAt<T>(w, row, column));
        return;
    }
    for (int column = threadIdx.x * 8; column < w.columns; column += blockDim.x * 8) {
        unsigned words[BITS / 4];
        #pragma unroll
        for (int i = 0; i < BITS / 4; ++i) words[i] = ((const unsigned *)(packed + column / (8 / BITS)))[i];
        float values[8];
        unpack8<BITS>(words, values);
        const float scale = scaleAt<T>(w, row, column);
        #pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= scale;
        store8(out + column, values);
    }
}

// ---- 5. Compressing weights: one block a row -----------------------------------------------------------------------

enum { QUANTIZE_THREADS = 256 };

__device__ __forceinline__ unsigned blockMax(unsigned value) {
    __shared__ unsigned warpMax[QUANTIZE_THREADS / 32];
    #pragma unroll
    for (int distance = 16; distance; distance /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
    if (threadIdx.x % 32 == 0) warpMax[threadIdx.x / 32] = value;
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < QUANTIZE_THREADS / 32; ++i) value = max(value, warpMax[i]);
    return value;
}

// The scale is half and the quotient as precise as the weight. For bfloat16 the scale keeps the type, for its range,
// but a quotient in it would be too coarse.
template <class T> struct Rounding { typedef half Scale; typedef T Quotient; };
template <> struct Rounding<bfloat16> { typedef bfloat16 Scale; typedef float Quotient; };

// weight / scale to the nearest integer, ties to even; anything / 0 and NaN give 0.
template <class T> __device__ __forceinline__ int quantized(float weight, float scale, int largest) {
    const float quotient = rounded<typename Rounding<T>::Quotient>(__fdiv_rn(weight, scale));
    if (scale == 0.f || quotient != quotient) return 0;
    return __float2int_rn(fminf(fmaxf(quotient, (float)-largest), (float)largest));
}

template <class T, int BITS>
__device__ __forceinline__ void quantize(
        const T *weights, signed char *packed, typename Rounding<T>::Scale *scales, int columns) {
    enum { LARGEST = (1 << (BITS - 1)) - 1 };
    const T *row = weights + (long long)blockIdx.x * columns;
    signed char *packedRow = packed + (long long)blockIdx.x * (columns / (8 / BITS));

    unsigned largest = 0;  // of |weight| as bits: floats without sign are ordered like integers, NaN above all
    for (int column = threadIdx.x; column < columns; column += QUANTIZE_THREADS)
        largest = max(largest, __float_as_uint(load(row + column)) & 0x7fffffffu);
    largest = blockMax(largest);
    const float scale = rounded<typename Rounding<T>::Scale>(__fdiv_rn(__uint_as_float(largest), (float)LARGEST));
    if (threadIdx.x == 0) store(scales + blockIdx.x, scale);

    for (int i = threadIdx.x; i < columns / (8 / BITS); i += QUANTIZE_THREADS)
        if (BITS == 8) {
            packedRow[i] = (signed char)quantized<T>(load(row + i), scale, LARGEST);
        } else {
            const int even = quantized<T>(load(row + 2 * i), scale, LARGEST);
            const int odd = quantized<T>(load(row + 2 * i + 1), scale, LARGEST);
            packedRow[i] = (signed char)((even & 15) << 4 | (odd & 15));
        }
}

// ---- 6. Entry points, e.g. linear4_half_1, dequantize8_float, quantize4_bfloat16 -----------------------------------

#define LINEAR(T, BITS, TILE) \
extern "C" __global__ void __launch_bounds__(LINEAR_THREADS) linear##BITS##_##T##_##TILE( \
    Matrix w, const T *x, T *y, int m) { linear<T, BITS, TILE>(w, x, y, m); }
#define DEQUANTIZE(T, BITS) \
extern "C" __global__ void dequantize##BITS##_##T(Matrix w, T *out) { dequantize<T, BITS>(w, out); }
#define QUANTIZE(T, BITS) \
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS) quantize##BITS##_##T( \
    const T *weights, signed char *packed, Rounding<T>::Scale *scales, int columns) { \
    quantize<T, BITS>(weights, packed, scales, columns); }
#define KERNELS(T, BITS) \
    LINEAR(T, BITS, 1) LINEAR(T, BITS, 4) DEQUANTIZE(T, BITS) QUANTIZE(T, BITS)

KERNELS(half, 8) KERNELS(bfloat16, 8) KERNELS(float, 8)
KERNELS(half, 4) KERNELS(bfloat16, 4) KERNELS(float, 4)
"""

_ELEMENTS = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}
_SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # enum ScaleType
_LINEAR_THREADS, _LINEAR_ROWS = 128, 8  # a block: 4 warps, WARP_ROWS output features each
_ROW_THREADS = 256  # dequantize and quantize: a block for a row, QUANTIZE_THREADS
_LOAD_BITS = 128  # what a lane of the product loads at once
_ONE_GROUP = 31  # column >> 31 == 0: one scale per row


# ---- What quantization.py calls -------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    """`x @ W.T` for a quantized W on x's GPU; None when PyTorch has to do it.

    Args:
        x: [..., K], float16, bfloat16 or float32.
        weight: int8 [N, K] (bits 8) or packed [N, K/2] (bits 4, even column in the high nibble).
        scale: [N] or [N, G], of any of those float types.

    Up to `FUSED_ROWS` rows are multiplied with the stored integers, exactly, summed in float32 and rounded once to
    x.dtype. More rows are multiplied by cuBLAS with the dequantized matrix, which lives as long as the product.
    No gradient is recorded: with gradients wanted the answer is None, except inside an autograd.Function.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    kernels = _kernels_for(x, weight, scale)
    matrix = _describe(weight, scale, bits) if kernels else None
    if matrix is None or x.dtype not in _ELEMENTS:
        return None
    if x.shape[-1] != matrix.columns:
        raise ValueError(f"x has {x.shape[-1]} columns, the {bits}-bit weight {matrix.columns}; they must be equal")
    x_rows = x.reshape(-1, matrix.columns).contiguous()
    if x_rows.shape[0] <= FUSED_ROWS and _is_fused(x_rows, matrix, bits):
        y = x.new_empty(x_rows.shape[0], matrix.rows)
        kernels.linear(matrix, bits, x_rows, y)
    else:
        y = F.linear(x_rows, dequantize(weight, scale, bits, x.dtype))
    return y.view(*x.shape[:-1], matrix.rows)


def dequantize(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor | None:
    """W [N, K] in `dtype`: integer x scale in `dtype`, as the original has it; None when PyTorch has to do it."""
    kernels = _kernels_for(weight, scale)
    matrix = _describe(weight, scale, bits) if kernels else None
    if matrix is None or dtype not in _ELEMENTS:
        return None
    out = torch.empty(matrix.rows, matrix.columns, dtype=dtype, device=weight.device)
    kernels.dequantize(matrix, bits, out)
    return out


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """What `quantization.quantize_weight(weight, bits)` gives, bit for bit; None when PyTorch has to do it.

    Args:
        weight: [N, K], float16, bfloat16 or float32; K even for bits 4.

    Returns:
        int8 [N, K] or packed [N, K/2], and the scale [N], bfloat16 for bfloat16 and else float16.
    """
    kernels = _kernels_for(weight)
    if kernels is None or weight.dtype not in _ELEMENTS:
        return None
    rows, columns = weight.shape
    if bits not in (4, 8) or columns * bits % 8:
        raise ValueError(f"cannot pack {columns} columns into {bits} bits: bits is 4 or 8, and 4 needs an even width")
    packed = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device=weight.device)
    scale_dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16
    scale = torch.empty(rows, dtype=scale_dtype, device=weight.device)
    kernels.quantize(weight.detach().contiguous(), bits, packed, scale)
    return packed, scale


# ---- A quantized matrix as the kernels see it -----------------------------------------------------------------------


class _Matrix(ctypes.Structure):
    """struct Matrix of SOURCE: one argument for all of a matrix, which the launch of every product can share."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("scale_type", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("group_shift", ctypes.c_int32),
    ]


def _describe(weight: Tensor, scale: Tensor, bits: int) -> _Matrix | None:
    """The matrix in its checked form, or None for a layout that only PyTorch serves."""
    if not (weight.is_contiguous() and scale.is_contiguous()):
        return None
    return _matrix(weight.data_ptr(), weight.shape, weight.dtype, scale.data_ptr(), scale.shape, scale.dtype, bits)


@functools.lru_cache(maxsize=4096)  # a matrix is multiplied once a token, from the same place: 112 in the 6B model
def _matrix(packed, packed_shape, packed_dtype, scale, scale_shape, scale_dtype, bits) -> _Matrix | None:
    if bits not in (4, 8) or packed_dtype != torch.int8 or len(packed_shape) != 2:
        raise ValueError(
            f"a quantized weight is int8 [N, K] or [N, K/2], bits 4 or 8; not {packed_dtype}, {bits} bits"
        )
    rows, columns = packed_shape[0], packed_shape[1] * 8 // bits
    groups = scale_shape[1] if len(scale_shape) == 2 else 1
    if len(scale_shape) not in (1, 2) or scale_shape[0] != rows or groups == 0 or columns % groups:
        raise ValueError(f"scales {tuple(scale_shape)} do not fit a weight of {rows} rows and {columns} columns")
    group = columns // groups
    if groups == 1:
        shift = _ONE_GROUP
    elif group >= 8 and group & (group - 1) == 0:
        shift = group.bit_length() - 1
    else:
        return None
    if packed % 16 or scale_dtype not in _SCALE_TYPES:
        return None
    return _Matrix(packed, scale, _SCALE_TYPES[scale_dtype], rows, columns, groups, shift)


def _is_fused(x: Tensor, matrix: _Matrix, bits: int) -> bool:
    """Whether every lane's 128-bit loads stay inside a row and a group, and begin at multiples of 16 bytes."""
    chunk = _LOAD_BITS // bits
    return matrix.columns % chunk == 0 and 1 << matrix.group_shift >= chunk and x.data_ptr() % 16 == 0


# ---- Launching ------------------------------------------------------------------------------------------------------


class _Kernels:
    """The compiled kernels of one device."""

    def __init__(self, cpm: _CpmKernels, device: torch.device, cubin: bytes):
        self._device = device
        self._set_device = cpm.library.cudart.cudaSetDevice
        module = cpm.base.LazyKernelCModule(cubin)
        self._function = functools.cache(functools.partial(cpm.base.KernelFunction, module))
        with _on(device):
            self._set_device(device.index or 0)
            module.get_module()  # here, not at the first product: the driver may refuse the cubin

    def linear(self, matrix: _Matrix, bits: int, x: Tensor, y: Tensor) -> None:
        tile = 1 if x.shape[0] == 1 else 4
        blocks = -(-matrix.rows // _LINEAR_ROWS) * -(-x.shape[0] // tile)
        name = f"linear{bits}_{_ELEMENTS[x.dtype]}_{tile}"
        self._launch(name, blocks, _LINEAR_THREADS, matrix, _pointer(x), _pointer(y), ctypes.c_int32(x.shape[0]))

    def dequantize(self, matrix: _Matrix, bits: int, out: Tensor) -> None:
        self._launch(f"dequantize{bits}_{_ELEMENTS[out.dtype]}", matrix.rows, _ROW_THREADS, matrix, _pointer(out))

    def quantize(self, weight: Tensor, bits: int, packed: Tensor, scale: Tensor) -> None:
        rows, columns = weight.shape
        arguments = _pointer(weight), _pointer(packed), _pointer(scale), ctypes.c_int32(columns)
        self._launch(f"quantize{bits}_{_ELEMENTS[weight.dtype]}", rows, _ROW_THREADS, *arguments)

    def _launch(self, name: str, blocks: int, threads: int, *arguments) -> None:
        if blocks:  # a matrix without elements needs no launch, and CUDA refuses an empty one
            with _on(self._device):
                self._set_device(self._device.index or 0)  # cpm_kernels may use another copy of the runtime than torch
                self._function(name)((blocks, 1, 1), (threads, 1, 1), 0, _stream(self._device), arguments)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# The four questions put to torch.cuda; the tests answer them for the emulated device.


def _is_served(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# ---- Loading, once, at the first use --------------------------------------------------------------------------------


class _Unavailable(Exception):
    """Why there are no kernels, and the cure, in one sentence each."""


class _CpmKernels(NamedTuple):
    """The modules of cpm_kernels that are used."""

    base: types.ModuleType  # LazyKernelCModule, KernelFunction
    library: types.ModuleType  # cuda, cudart, nvrtc, cublaslt


_lock = threading.Lock()
_loaded: dict[int, _Kernels | None] = {}  # by device index; None: tried, warned, left to PyTorch


def _kernels_for(*tensors: Tensor) -> _Kernels | None:
    """The kernels of the tensors' device; None elsewhere than on one NVIDIA GPU and wherever loading has failed."""
    device = tensors[0].device
    if not _is_served(tensors[0]) or any(tensor.device != device for tensor in tensors):
        return None
    try:
        return _loaded[device.index]
    except KeyError:
        pass
    with _lock:
        if device.index not in _loaded:
            _loaded[device.index] = _load_or_warn(device)
        return _loaded[device.index]


def _load_or_warn(device: torch.device) -> _Kernels | None:
    try:
        cpm = _cpm_kernels()
        kernels = _Kernels(cpm, device, _compile(cpm.library.nvrtc, _capability(device)))
        _check(kernels, device)
        return kernels
    except _Unavailable as error:
        _warn_once(str(error))
    except Exception as error:  # whatever a driver, a loader or a package may raise: named, then left to PyTorch
        _warn_once(
            f"{type(error).__name__}: {error}. Update the NVIDIA driver, torch and cpm_kernels to matching ones."
        )
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    text = f"No CUDA kernels for quantized weights. {reason} PyTorch computes the same numbers instead, slower."
    warnings.warn(text, RuntimeWarning, stacklevel=5)  # the caller of linear, dequantize or quantize


@functools.cache
def _compile(nvrtc: types.ModuleType, capability: tuple[int, int]) -> bytes:
    """The cubin for a GPU, or for an older one of its generation whose cubins it runs, if NVRTC knows only that."""
    major, minor = capability
    for known in range(minor, -1, -1):
        program = nvrtc.nvrtcProgram()
        nvrtc.nvrtcCreateProgram(program, SOURCE, "cuda_kernels.cu", 0, [], [])
        try:
            nvrtc.nvrtcCompileProgram(program, 2, [f"--gpu-architecture=sm_{major}{known}", "--std=c++14"])
            cubin = ctypes.create_string_buffer(nvrtc.nvrtcGetCUBINSize(program))
            nvrtc.nvrtcGetCUBIN(program, cubin)
            return cubin.raw
        except RuntimeError as error:
            reason = str(error)
        finally:
            nvrtc.nvrtcDestroyProgram(program)
    version = "{}.{}".format(*nvrtc.version)
    raise _Unavailable(
        f"NVRTC {version} does not compile for sm_{major}{minor} ({reason.strip()}). "
        "The kernels need a GPU of compute capability 7.0 or newer and an NVRTC that knows it: "
        f"pip install -U {_pip_package('cuda-nvrtc')}, or point CUDA_PATH at a matching CUDA toolkit."
    )


@functools.cache
def _cpm_kernels() -> _CpmKernels:
    """cpm_kernels, complete with its CUDA libraries, or _Unavailable."""
    if torch.version.hip:
        raise _Unavailable("This is a ROCm build of PyTorch; the kernels are for NVIDIA GPUs.")
    _forget_useless_import()
    with _lent_to_cpm_kernels():
        try:  # as transformers wants it: outside of a `try`, its import scan would make the package a requirement
            import cpm_kernels.kernels.base as base
            import cpm_kernels.library as library
        except ModuleNotFoundError as error:
            if error.name != "cpm_kernels":
                raise
            raise _Unavailable("cpm_kernels is not installed: pip install cpm_kernels.") from error
    for missing in _missing_libraries(library):
        raise _Unavailable(f"cpm_kernels cannot load lib{missing}: {_cure(missing)}")
    return _CpmKernels(base, library)


def _missing_libraries(library: types.ModuleType) -> list[str]:
    """The CUDA libraries that cpm_kernels did not find; each that it did has answered with a version."""
    versions = {
        "cuda": library.cuda.version,
        "cudart": library.cudart.version,
        "nvrtc": library.nvrtc.version[0],
        "cublasLt": library.cublaslt.version,
    }
    return [name for name, version in versions.items() if not version]


def _cure(name: str) -> str:
    if name == "cuda":
        return "install the NVIDIA driver."
    package = {"cudart": "cuda-runtime", "nvrtc": "cuda-nvrtc", "cublasLt": "cublas"}[name]
    return f"pip install {_pip_package(package)}, or point CUDA_PATH at a CUDA toolkit."


def _pip_package(name: str) -> str:
    """NVIDIA's pip package for torch's version of CUDA; since 13 its name has no suffix."""
    major = (torch.version.cuda or "").split(".")[0]
    return f"nvidia-{name}-cu{major}" if major in ("11", "12") else f"nvidia-{name}"


# ---- Checking, once on every GPU ------------------------------------------------------------------------------------


def _check(kernels: _Kernels, device: torch.device) -> None:
    """_Unavailable unless this very GPU computes what PyTorch computes, on a matrix that takes milliseconds."""
    for bits in (8, 4):
        wrong = _wrong_kernel(kernels, device, bits)
        if wrong:
            raise _Unavailable(
                f"The {wrong} of INT{bits} is wrong on this GPU. Please report that in the issue tracker of the "
                "repository, with the name of the GPU and the versions of its driver and of torch."
            )


def _wrong_kernel(kernels: _Kernels, device: torch.device, bits: int) -> str | None:
    """The first kernel whose numbers are not those of PyTorch on the CPU."""
    limit, rows, columns = 2 ** (bits - 1), 9, 1056
    cpu = torch.device("cpu")  # whatever the default device is
    values = torch.arange(rows * columns, device=cpu).view(rows, columns) * 37 % (2 * limit) - limit  # every integer
    scale = torch.linspace(0.001, 0.02, rows, dtype=torch.float32, device=cpu).half()
    exact = values.double() * scale.double()[:, None]
    packed = _packed(values, bits).to(device)
    matrix = _describe(packed, scale.to(device), bits)

    weight = _unwritten(rows, columns, device=device)
    kernels.dequantize(matrix, bits, weight)
    if not torch.equal(weight.cpu(), exact.half()):
        return "extraction"
    for m in (1, 5):
        x = torch.arange(m * columns, dtype=torch.float32, device=cpu).sin().half().view(m, columns)
        y = _unwritten(m, rows, device=device)
        kernels.linear(matrix, bits, x.to(device), y)
        expected, magnitude = x.double() @ exact.T, x.double().abs() @ exact.abs().T
        if not bool(((y.cpu() - expected).abs() <= 1e-3 * expected.abs() + 1e-5 * magnitude).all()):
            return f"product of {m} rows"
    again, again_scale = torch.zeros_like(packed), _unwritten(rows, device=device)
    kernels.quantize(weight, bits, again, again_scale)
    expected_scale = exact.half().abs().amax(dim=1) / (limit - 1)
    expected = _packed((exact.half() / expected_scale[:, None]).round().long(), bits)
    return (
        None
        if torch.equal(again.cpu(), expected) and torch.equal(again_scale.cpu(), expected_scale)
        else "compression"
    )


def _unwritten(*shape: int, device: torch.device) -> Tensor:
    """Room for a result, without the right numbers of an earlier one."""
    return torch.full(shape, float("nan"), dtype=torch.float16, device=device)


def _packed(values: Tensor, bits: int) -> Tensor:
    """Integers [N, K] as the format stores them."""
    values = values.to(torch.int8)
    return values if bits == 8 else (values[:, 0::2] & 15) << 4 | (values[:, 1::2] & 15)


# ---- What cpm_kernels 1.0.11 lacks today ----------------------------------------------------------------------------


def _forget_useless_import() -> None:
    """An import of cpm_kernels that failed or found no libraries stays in sys.modules; it would be served again."""
    library = sys.modules.get("cpm_kernels.library")
    if library and "cpm_kernels" in sys.modules and not _missing_libraries(library):
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "cpm_kernels"]:
        del sys.modules[name]


@contextlib.contextmanager
def _lent_to_cpm_kernels() -> Iterator[None]:
    """For the import of cpm_kernels only: a pkg_resources, a search that finds pip's CUDA, and a PATH of folders.

    It imports pkg_resources, which new environments no longer have; it knows $CUDA_PATH, /usr/local/cuda and
    ctypes.util.find_library, but not the libraries that torch itself came with; on Windows it lists every entry of
    PATH, files too, and torch's folder is not on it.
    """
    find, exists, path = ctypes.util.find_library, os.path.exists, os.environ.get("PATH", "")
    needs_stub = "pkg_resources" not in sys.modules and not importlib.util.find_spec("pkg_resources")
    if needs_stub:
        sys.modules["pkg_resources"] = _pkg_resources_stub()
    ctypes.util.find_library = lambda name: _pip_library(name) or find(name)
    os.path.exists = lambda path: exists(path) and not _is_superseded(path)
    folders = [entry for entry in path.split(os.pathsep) if os.path.isdir(entry)]
    os.environ["PATH"] = os.pathsep.join(_library_folders() + folders)
    try:
        yield
    finally:
        ctypes.util.find_library, os.path.exists = find, exists
        os.environ["PATH"] = path
        if needs_stub:
            del sys.modules["pkg_resources"]


def _pkg_resources_stub() -> types.ModuleType:
    """The two functions by which cpm_kernels reads its own files."""

    def location(package: str, name: str) -> str:
        return os.path.join(os.path.dirname(sys.modules[package].__file__), name)

    def resource_string(package: str, name: str) -> bytes:
        with open(location(package, name), "rb") as file:
            return file.read()

    stub = types.ModuleType("pkg_resources")
    stub.resource_exists = lambda package, name: os.path.exists(location(package, name))
    stub.resource_string = resource_string
    return stub


def _library_folders() -> list[str]:
    """Where torch's own CUDA libraries can be: in torch, in pip's nvidia-* packages, or in a conda environment."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = nvidia.submodule_search_locations if nvidia else ()
    patterns = [os.path.join(os.path.dirname(torch.__file__), "lib")]
    patterns += [os.path.join(root, "*", part) for root in roots for part in ("lib", "bin")]  # Linux, Windows
    patterns += [os.path.join(sys.prefix, "lib"), os.path.join(sys.prefix, "Library", "bin")]
    return [folder for pattern in patterns for folder in sorted(glob.glob(pattern))]


def _pip_library(name: str) -> str | None:
    """lib<name> of pip's CUDA, the one of torch's own CUDA version first."""
    pattern = re.compile(rf"lib{name}(-[0-9a-f]+)?\.so(\.\d+)*")
    found = [
        os.path.join(folder, file)
        for folder in _library_folders()
        for file in sorted(os.listdir(folder))
        if pattern.fullmatch(file)
    ]
    major = (torch.version.cuda or "").split(".")[0]
    return min(found, key=lambda path: f".so.{major}" not in path, default=None)


def _is_superseded(path: str) -> bool:
    """Whether the system toolkit's library has to give way to the one that torch came with."""
    library = re.fullmatch(r"/usr/local/cuda/lib64/lib(\w+)\.so", str(path))
    return bool(library and _pip_library(library.group(1)))
