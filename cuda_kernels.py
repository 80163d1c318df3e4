"""INT8 and INT4 products on NVIDIA GPUs: CUDA kernels of our own, compiled at first use, launched by cpm_kernels.

`SOURCE` is the CUDA C++ text. It includes no header, so NVRTC needs no toolkit, and the tests compile the very same
text with g++ behind an emulated driver (tests/cuda_emulation). The Python half below it finds NVRTC, compiles for the
GPU at hand, checks the result against PyTorch there and launches on torch's current stream. Nothing of CUDA is touched
before the first quantized product on a CUDA tensor. Where the kernels cannot be had, one warning names the cause and
the cure, `linear`, `dequantize` and `quantize` return None, and quantization.py computes the same with plain PyTorch.

Notation: M rows of activations, N output features, K input features, G groups of columns with a scale of their own.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import ctypes.util
import functools
import glob
import importlib
import importlib.util
import os
import re
import sys
import threading
import types
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, cuda
from torch.nn import functional as F

# Up to this many rows the weights are read as they are, from memory once. Above it they are first written out in 16
# bits for cuBLAS, which moves 5 (INT8) or 9 (INT4) times the bytes but multiplies on tensor cores: an H200 or an
# H100 gains by that from 12 to 18 rows on (benchmarks/results).
FUSED_ROWS = 8

SOURCE = r"""
// A quantized matrix: `rows` output features by `columns` input features, row after row.
//   8 bits: one signed byte a column.
//   4 bits: one byte for two columns, two's complement, the even column in the HIGH nibble.
// columns is a multiple of 8. A scale serves 2^groupShift of them; with one scale per row groups = 1, groupShift = 31.
// Python fills this struct in as class _Matrix: same fields, same order.
struct Matrix {
    const signed char *packed;
    const void *scale;
    int scaleType;
    int rows, columns, groups, groupShift;
};
enum ScaleType { HALF_SCALE, BFLOAT16_SCALE, FLOAT_SCALE };

#define UNROLL _Pragma("unroll")  // before loops over arrays that have to live in registers

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

// Eight consecutive elements, 128 bits at a time; p is a multiple of 16 bytes. Two 16-bit elements are taken out of a
// word by shifts, of which one folds into bfloat16's own.
__device__ __forceinline__ void load8(const float *p, float *values) {
    alignas(16) float elements[8];
    UNROLL for (int i = 0; i < 2; ++i) ((uint4 *)elements)[i] = ((const uint4 *)p)[i];
    UNROLL for (int i = 0; i < 8; ++i) values[i] = elements[i];
}
template <class T> __device__ __forceinline__ void load8(const T *p, float *values) {
    alignas(16) unsigned words[4];
    *(uint4 *)words = *(const uint4 *)p;
    UNROLL for (int i = 0; i < 8; ++i) {
        const T element = {(unsigned short)(words[i / 2] >> 16 * (i % 2))};
        values[i] = load(&element);
    }
}
template <class T> __device__ __forceinline__ void store8(T *p, const float *values) {
    alignas(16) T elements[8];
    UNROLL for (int i = 0; i < 8; ++i) store(elements + i, values[i]);
    UNROLL for (int i = 0; i < sizeof(T) / 2; ++i) ((uint4 *)p)[i] = ((const uint4 *)elements)[i];
}

// ---- 2. Weights ----------------------------------------------------------------------------------------------------

// Both unpack8 turn 8 weights into exact floats without the slow integer conversion: with its sign bit flipped, a
// weight is an unsigned number u; u in the low mantissa bits of the float 2^23 makes it 2^23 + u; what follows is one
// subtraction, which is exact.
template <int BITS> __device__ __forceinline__ void unpack8(const unsigned *words, float *values);

template <> __device__ __forceinline__ void unpack8<8>(const unsigned *words, float *values) {
    UNROLL for (int i = 0; i < 8; ++i) {
        const unsigned flipped = words[i / 4] ^ 0x80808080u;
        const unsigned selector = 0x7540u + i % 4;  // lowest byte: byte i of the word; above it the bytes 00 00 4B
        values[i] = __uint_as_float(__byte_perm(flipped, 0x4B000000u, selector)) - (8388608.f + 128.f);
    }
}
// A nibble that starts at mantissa bit b fits the float 2^(23-b) instead, so that five of eight need no shift.
template <> __device__ __forceinline__ void unpack8<4>(const unsigned *words, float *values) {
    const unsigned flipped = words[0] ^ 0x88888888u;
    UNROLL for (int i = 0; i < 8; ++i) {
        const int nibble = i ^ 1;  // the even column is in the high nibble
        const unsigned word = nibble < 5 ? flipped : flipped >> 20;
        const int bit = 4 * (nibble < 5 ? nibble : nibble - 5);
        const unsigned power = (unsigned)(127 + 23 - bit) << 23;
        values[i] = __uint_as_float(andOr(word, 15u << bit, power)) - ((float)(1 << (23 - bit)) + 8.f);
    }
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

// ---- 3. y = x W^T + bias for few rows of x -------------------------------------------------------------------------

// A warp owns WARP_ROWS rows of W and TILE rows of x. A lane reads 128 bits of each row of W, then the activations
// that meet them, and sums in float; the warp adds its lanes up at the end. columns is a multiple of CHUNK and a group
// of scales at least one CHUNK. Neighbouring blocks take the same rows of W: one reads them from memory, the others
// find them in the L2 cache. INT4 meets more activations a byte, and more rows of W share their conversion: of an
// H100's time for 4 and 8 rows four rows a warp save a third, of INT8's nothing. bias: a number a row of W, or null.
enum { LINEAR_THREADS = 128 };

__device__ __forceinline__ float warpSum(float sum) {
    UNROLL for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return sum;
}

template <class T, int BITS, int TILE>
__device__ __forceinline__ void linear(const Matrix &w, const T *x, const T *bias, T *y, int m) {
    enum { CHUNK = 128 / BITS, WARP_ROWS = BITS == 4 && TILE > 1 ? 4 : 2 };
    const int tiles = (m + TILE - 1) / TILE;
    const int firstX = blockIdx.x % tiles * TILE;
    const int lane = threadIdx.x % 32;
    const int warp = blockIdx.x / tiles * (LINEAR_THREADS / 32) + threadIdx.x / 32;
    const int firstRow = warp * WARP_ROWS;
    if (firstRow >= w.rows) return;  // the whole warp, so that the shuffles below have all their lanes

    int rows[WARP_ROWS];  // past the end: the last row once more, computed and thrown away
    UNROLL for (int r = 0; r < WARP_ROWS; ++r) rows[r] = min(firstRow + r, w.rows - 1);

    float sums[WARP_ROWS][TILE] = {};
    for (int column = lane * CHUNK; column < w.columns; column += 32 * CHUNK) {
        alignas(16) unsigned words[WARP_ROWS][4];
        UNROLL for (int r = 0; r < WARP_ROWS; ++r)
            *(uint4 *)words[r] = *(const uint4 *)(packedRow<BITS>(w, rows[r]) + column / (8 / BITS));
        float parts[WARP_ROWS][TILE] = {};
        UNROLL for (int i = 0; i < CHUNK; i += 8) {
            float weights[WARP_ROWS][8];
            UNROLL for (int r = 0; r < WARP_ROWS; ++r) unpack8<BITS>(words[r] + i * BITS / 32, weights[r]);
            UNROLL for (int t = 0; t < TILE; ++t) {
                float activations[8];
                load8(x + min(firstX + t, m - 1) * w.columns + column + i, activations);
                UNROLL for (int r = 0; r < WARP_ROWS; ++r)
                    UNROLL for (int e = 0; e < 8; ++e) parts[r][t] += weights[r][e] * activations[e];
            }
        }
        UNROLL for (int r = 0; r < WARP_ROWS; ++r) {
            const float scale = scaleAt<T>(w, rows[r], column);
            UNROLL for (int t = 0; t < TILE; ++t) sums[r][t] += scale * parts[r][t];
        }
    }

    UNROLL for (int r = 0; r < WARP_ROWS; ++r)
        UNROLL for (int t = 0; t < TILE; ++t) {
            const float sum = warpSum(sums[r][t]);
            if (lane == 0 && firstRow + r < w.rows && firstX + t < m)
                store(y + (long long)(firstX + t) * w.rows + firstRow + r, bias ? sum + load(bias + rows[r]) : sum);
        }
}

// ---- 4. Writing the weights out: one block a row -------------------------------------------------------------------

// weight x scale, rounded once: for half that is the official fp16(integer) * fp16 scale.
template <class T, int BITS> __device__ __forceinline__ void dequantize(const Matrix &w, T *out) {
    const int row = blockIdx.x;
    const signed char *packed = packedRow<BITS>(w, row);
    out += (long long)row * w.columns;
    for (int column = threadIdx.x * 8; column < w.columns; column += blockDim.x * 8) {
        unsigned words[BITS / 4];
        UNROLL for (int i = 0; i < BITS / 4; ++i) words[i] = ((const unsigned *)(packed + column / (8 / BITS)))[i];
        float values[8];
        unpack8<BITS>(words, values);
        const float scale = scaleAt<T>(w, row, column);
        UNROLL for (int i = 0; i < 8; ++i) values[i] *= scale;
        store8(out + column, values);
    }
}

// ---- 5. Compressing weights: one block a row -----------------------------------------------------------------------

enum { QUANTIZE_THREADS = 256 };

__device__ __forceinline__ unsigned blockMax(unsigned value) {
    __shared__ unsigned warpMax[QUANTIZE_THREADS / 32];
    UNROLL for (int distance = 16; distance; distance /= 2)
        value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
    if (threadIdx.x % 32 == 0) warpMax[threadIdx.x / 32] = value;
    __syncthreads();
    UNROLL for (int i = 0; i < QUANTIZE_THREADS / 32; ++i) value = max(value, warpMax[i]);
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
    Matrix w, const T *x, const T *bias, T *y, int m) { linear<T, BITS, TILE>(w, x, bias, y, m); }
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

_DEVICE = "cuda"  # type of the tensors that are served
_ELEMENTS = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}  # as in enum ScaleType
_LINEAR_THREADS, _LINEAR_WARPS = 128, 4  # a block: WARP_ROWS output features a warp
_ROW_THREADS = 256  # dequantize and quantize: a block for a row, QUANTIZE_THREADS
_LOAD_BITS = 128  # what a lane of the product loads at once
_ONE_GROUP = 31  # column >> 31 == 0: one scale per row


# ---- What the other files call: None where PyTorch has to do it -----------------------------------------------------
def linear(x: Tensor, weight: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None) -> Tensor | None:
    """x [..., K] in a float type of 16 or 32 bits, W [N, K] quantized, scale [N] or [N, G] of any such, bias [N] or
    none -> x @ W.T + bias.

    Up to FUSED_ROWS contiguous rows [M, K] are multiplied with the stored integers, exactly, summed in float32 and
    rounded once. All else is multiplied by cuBLAS with the dequantized matrix, which lives as long as the product.
    No gradient is recorded: with gradients wanted the answer is None, except inside an autograd.Function.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    kernels = _kernels_for(x, weight, scale) if bias is None else _kernels_for(x, weight, scale, bias)
    matrix = _describe(weight, scale, bits) if kernels else None
    if matrix is None or x.dtype not in _ELEMENTS:
        return None
    bias = bias if bias is None else bias.to(x.dtype).contiguous()
    if x.shape[-1] != matrix.columns:
        raise ValueError(f"x has {x.shape[-1]} columns, the {bits}-bit weight {matrix.columns}; they must be equal")
    if x.dim() != 2 or x.shape[0] > FUSED_ROWS or not _is_loadable(x, matrix, bits):
        return F.linear(x, dequantize(weight, scale, bits, x.dtype), bias)
    y = x.new_empty(x.shape[0], matrix.rows)
    kernels.linear(matrix, bits, x, bias, y)
    return y


def dequantize(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor | None:
    """W [N, K] in `dtype`: integer x scale in `dtype`, as the original has it."""
    kernels = _kernels_for(weight, scale)
    matrix = _describe(weight, scale, bits) if kernels else None
    if matrix is None or dtype not in _ELEMENTS:
        return None
    out = torch.empty(matrix.rows, matrix.columns, dtype=dtype, device=weight.device)
    kernels.dequantize(matrix, bits, out)
    return out


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """What `quantization.quantize_weight(weight, bits)`, which checks the shape, gives, bit for bit."""
    kernels = _kernels_for(weight)
    if kernels is None or weight.dtype not in _ELEMENTS:
        return None
    rows, columns = weight.shape
    packed = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device=weight.device)
    scale_dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16
    scale = torch.empty(rows, dtype=scale_dtype, device=weight.device)
    kernels.quantize(weight.detach().contiguous(), bits, packed, scale)
    return packed, scale


# ---- A quantized matrix as the kernels see it -----------------------------------------------------------------------
class _Matrix(ctypes.Structure):
    """struct Matrix of SOURCE: one argument for all of a matrix, which the launch of every product can share."""

    _fields_ = [("packed", ctypes.c_void_p), ("scale", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int32) for name in ("scale_type", "rows", "columns", "groups", "group_shift")]


def _describe(weight: Tensor, scale: Tensor, bits: int) -> _Matrix | None:
    """The matrix in its checked form, or None for a layout that only PyTorch serves."""
    if not (weight.is_contiguous() and scale.is_contiguous()):
        return None
    return _matrix(weight.data_ptr(), weight.shape, weight.dtype, scale.data_ptr(), scale.shape, scale.dtype, bits)


@functools.lru_cache(maxsize=4096)  # a matrix is multiplied once a token, from the same place: 112 in the 6B model
def _matrix(packed, packed_shape, packed_dtype, scale, scale_shape, scale_dtype, bits) -> _Matrix | None:
    rows, columns = packed_shape[0], packed_shape[1] * 8 // bits
    groups = scale_shape[1] if len(scale_shape) == 2 else 1
    if packed_dtype != torch.int8 or scale_shape not in ((rows,), (rows, groups)) or not groups or columns % groups:
        raise ValueError(
            f"scales {tuple(scale_shape)} do not fit a weight of {rows} rows and {columns} columns in {packed_dtype}"
        )
    group = columns // groups
    is_power = group & (group - 1) == 0
    if columns % 8 or packed % 16 or scale_dtype not in _ELEMENTS or groups > 1 and not (is_power and group >= 8):
        return None
    shift = _ONE_GROUP if groups == 1 else group.bit_length() - 1
    return _Matrix(packed, scale, list(_ELEMENTS).index(scale_dtype), rows, columns, groups, shift)


def _is_loadable(x: Tensor, matrix: _Matrix, bits: int) -> bool:
    """Whether every lane's 128-bit loads stay inside a row and a group, and begin at multiples of 16 bytes."""
    chunk, begins = _LOAD_BITS // bits, x.is_contiguous() and x.data_ptr() % 16 == 0
    return begins and matrix.columns % chunk == 0 and 1 << matrix.group_shift >= chunk


# ---- Launching ------------------------------------------------------------------------------------------------------
class _Kernels:
    """The compiled kernels of one device."""

    def __init__(self, cpm: types.SimpleNamespace, device: torch.device, cubin: bytes):
        self._cpm, self._device = cpm, device
        with self._device_set():
            cpm.cudart.cudaFree(None)  # makes the device's context, if nothing has
            self._context = cpm.cuda.cuCtxGetCurrent().value
            module = cpm.cuda.cuModuleLoadData(cubin)  # here, not at the first product: the driver may refuse it
        self._function = functools.cache(functools.partial(cpm.cuda.cuModuleGetFunction, module))

    @contextlib.contextmanager
    def _device_set(self) -> Iterator[None]:
        """This is torch's current device and, as cpm_kernels may have a cudart of its own, that one's, too."""
        with cuda.device(self._device):
            self._cpm.cudart.cudaSetDevice(self._device.index or 0)
            yield

    def linear(self, matrix: _Matrix, bits: int, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        m, tile = x.shape[0], 1 if x.shape[0] == 1 else 4
        warp_rows = 4 if bits == 4 and tile > 1 else 2
        blocks = -(-matrix.rows // (_LINEAR_WARPS * warp_rows)) * -(-m // tile)
        name = f"linear{bits}_{_ELEMENTS[x.dtype]}_{tile}"
        added = ctypes.c_void_p() if bias is None else _pointer(bias)
        self._launch(name, blocks, _LINEAR_THREADS, matrix, _pointer(x), added, _pointer(y), ctypes.c_int32(m))

    def dequantize(self, matrix: _Matrix, bits: int, out: Tensor) -> None:
        name = f"dequantize{bits}_{_ELEMENTS[out.dtype]}"
        self._launch(name, matrix.rows, _ROW_THREADS, matrix, _pointer(out))

    def quantize(self, weight: Tensor, bits: int, packed: Tensor, scale: Tensor) -> None:
        name, (rows, columns) = f"quantize{bits}_{_ELEMENTS[weight.dtype]}", weight.shape
        pointers = [_pointer(tensor) for tensor in (weight, packed, scale)]
        self._launch(name, rows, _ROW_THREADS, *pointers, ctypes.c_int32(columns))

    def _launch(self, name: str, blocks: int, threads: int, *arguments: ctypes.Structure | ctypes._SimpleCData):
        if not blocks:  # a matrix without elements needs no launch, and CUDA refuses an empty one
            return
        is_current = self._cpm.cuda.cuCtxGetCurrent().value == self._context  # not so in new threads; it is asked
        with contextlib.nullcontext() if is_current else self._device_set():  # because setting costs half a launch
            function, stream = self._function(name), _stream(self._device.index or 0)
            addresses = [ctypes.addressof(argument) for argument in arguments]
            self._cpm.cuda.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, addresses)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _stream(device_index: int) -> int:
    """torch.cuda.current_stream(...).cuda_stream, which takes a seventh of a product's time on the host; this is what
    Triton asks."""
    return torch._C._cuda_getCurrentRawStream(device_index)


# ---- Loading, once, at the first use --------------------------------------------------------------------------------
class _Unavailable(Exception):
    """Why there are no kernels, and the cure, in one sentence each."""


_lock = threading.Lock()
_loaded: dict[int, _Kernels | None] = {}  # by device index; None: tried, warned, left to PyTorch


def _kernels_for(*tensors: Tensor) -> _Kernels | None:
    """The kernels of the tensors' device; None elsewhere than on one NVIDIA GPU and wherever loading has failed."""
    device = tensors[0].device
    if device.type != _DEVICE or any(tensor.device != device for tensor in tensors):
        return None
    if device.index not in _loaded:
        with _lock:
            if device.index not in _loaded:
                _loaded[device.index] = _load_or_warn(device)
    return _loaded[device.index]


def _load_or_warn(device: torch.device) -> _Kernels | None:
    try:
        cpm = _cpm_kernels()
        kernels = _Kernels(cpm, device, _compile(cpm.nvrtc, cuda.get_device_capability(device)))
        _check(kernels, device)
        return kernels
    except cuda.OutOfMemoryError:  # says itself what is wrong, and the next product may find room
        raise
    except _Unavailable as error:
        reason = str(error)
    except Exception as error:  # whatever a driver, a loader or a package may raise: named, then left to PyTorch
        cure = "If that does not say what to do: update the NVIDIA driver, torch and cpm_kernels to matching versions."
        reason = f"{type(error).__name__}: {error}. {cure}"
    _warn_once(reason)
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
    raise _Unavailable(
        f"NVRTC {'.'.join(map(str, nvrtc.version))} does not compile for sm_{major}{minor} ({reason.strip()}). "
        "The kernels need a GPU of compute capability 7.0 or newer and an NVRTC that knows it: "
        f"pip install -U {_pip_package('nvrtc')}, or point CUDA_PATH at a matching CUDA toolkit."
    )


# ---- Checking, once on every GPU ------------------------------------------------------------------------------------
# A block of the product and a row more; a warp's columns and a load more.
_CHECKED_ROWS, _CHECKED_COLUMNS = 17, 33 * 32


def _check(kernels: _Kernels, device: torch.device) -> None:
    """_Unavailable unless this very GPU computes what PyTorch computes, on a matrix that takes milliseconds."""
    for bits in (8, 4):
        for kernel, is_right in _verdicts(kernels, device, bits):
            if not is_right:
                raise _Unavailable(
                    f"The {kernel} of INT{bits} is wrong on this GPU. Please report that in the issue tracker of the "
                    "repository, with the name of the GPU and the versions of its driver and of torch."
                )


def _verdicts(kernels: _Kernels, device: torch.device, bits: int) -> Iterator[tuple[str, bool]]:
    """Each kernel, and whether its numbers are those that quantization.py computes on the CPU."""
    # Not by a `from` line, neither here nor above: that file imports this one, and transformers 4.41 to 4.5x follows
    # such lines round and round for ever.
    plain = importlib.import_module(".quantization", __package__)

    def unwritten(*shape: int) -> Tensor:  # without the right numbers of an earlier result
        return torch.full(shape, float("nan"), dtype=torch.float16, device=device)

    cpu = torch.device("cpu")  # whatever the default device is
    every_byte = torch.arange(_CHECKED_ROWS * _CHECKED_COLUMNS * bits // 8, device=cpu) * 37 % 256 - 128
    packed = every_byte.to(torch.int8).view(_CHECKED_ROWS, -1)
    scale = torch.linspace(0.001, 0.02, _CHECKED_ROWS, dtype=torch.float32, device=cpu).half()
    exact = plain.dequantize_weight(packed, scale, bits, torch.float64)
    stored, stored_scale = packed.to(device), scale.to(device)  # by name, for `matrix` does not keep them alive
    matrix, weight = _describe(stored, stored_scale, bits), unwritten(_CHECKED_ROWS, _CHECKED_COLUMNS)
    kernels.dequantize(matrix, bits, weight)
    yield "extraction", torch.equal(weight.cpu(), exact.half())
    bias = torch.arange(_CHECKED_ROWS, dtype=torch.float32, device=cpu).cos().half()
    for m in (1, 5):  # one row in a tile; a full tile of four and one that is not
        x = torch.arange(m * _CHECKED_COLUMNS, dtype=torch.float32, device=cpu).sin().half().view(m, -1)
        y = unwritten(m, _CHECKED_ROWS)
        kernels.linear(matrix, bits, x.to(device), bias.to(device), y)
        expected, magnitude = x.double() @ exact.T + bias.double(), x.double().abs() @ exact.abs().T
        is_near = (y.cpu() - expected).abs() <= 1e-3 * expected.abs() + 1e-5 * magnitude
        yield f"product of {m} rows", bool(is_near.all())
    again, again_scale = torch.zeros_like(stored), unwritten(_CHECKED_ROWS)
    kernels.quantize(weight, bits, again, again_scale)
    results = zip((again, again_scale), plain.quantize_weight(exact.half(), bits))
    yield "compression", all(torch.equal(found.cpu(), expected) for found, expected in results)


# ---- cpm_kernels, without importing it ------------------------------------------------------------------------------
@functools.cache
def _cpm_kernels() -> types.SimpleNamespace:
    """The driver, the runtime and NVRTC as cpm_kernels 1.0.11 binds them: cuda, cudart, nvrtc.

    `import cpm_kernels` needs pkg_resources, which new environments lack, and does not find the CUDA of pip. Lending
    it both would change sys.modules, os and ctypes under the feet of other threads. So the four files that are needed
    run as modules of our own: they import what they are given, and nothing of the process changes.
    """
    if torch.version.hip:
        raise _Unavailable("This is a ROCm build of PyTorch; the kernels are for NVIDIA GPUs.")
    package = importlib.util.find_spec("cpm_kernels")
    if package is None:
        raise _Unavailable("cpm_kernels is not installed: pip install cpm_kernels.")
    folder = package.submodule_search_locations[0]
    base = _run(folder, "base")
    base.unix_find_lib = base.windows_find_lib = _find_library
    return types.SimpleNamespace(**{name: _run(folder, name, base=base) for name in ("cuda", "cudart", "nvrtc")})


def _run(folder: str, name: str, **given) -> types.ModuleType:
    """A file of cpm_kernels, run as a module that only the caller has; its imports of a name in `given` get that."""

    def importing(name, *arguments):
        return given[name] if name in given else __import__(name, *arguments)

    spec = importlib.util.spec_from_file_location(f"cpm_kernels.{name}", os.path.join(folder, "library", f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    module.__builtins__ = {**vars(builtins), "__import__": importing}  # where an import statement looks first
    spec.loader.exec_module(module)
    return module


def _find_library(name: str) -> str:
    """lib<name> of $CUDA_PATH, else of the CUDA that torch came with, of the system's toolkit, of the system."""
    if on_windows := sys.platform == "win32":
        file = re.compile(rf"{name}64_[\d_]+\.dll")
        places = [_torch_folders(), os.environ.get("PATH", "").split(os.pathsep)]
    else:
        file = re.compile(rf"lib{name}(-[0-9a-f]+)?\.so(\.\d+)*")
        chosen = [os.path.join(os.environ["CUDA_PATH"], "lib64")] if "CUDA_PATH" in os.environ else []
        places = [chosen, _torch_folders(), ["/usr/local/cuda/lib64"]]
    for folders in places:
        entries = [entry for folder in folders for entry in sorted(glob.glob(os.path.join(glob.escape(folder), "*")))]
        found = [entry for entry in entries if file.fullmatch(os.path.basename(entry))]
        if found:
            return min(found, key=lambda entry: f".so.{_cuda_major()}" not in entry)
    if name == "cuda":  # the driver's: loaded, for there is a tensor on the GPU
        return "nvcuda.dll" if on_windows else "libcuda.so.1"
    known = ctypes.util.find_library(name)
    if known is None:
        cure = f"pip install {_pip_package(name)}, or point CUDA_PATH at a CUDA toolkit."
        raise _Unavailable(f"cpm_kernels cannot load lib{name}: {cure}")
    return known


def _torch_folders() -> list[str]:
    """Where torch's own CUDA libraries can be: in torch, in pip's nvidia-* packages, or in a conda environment."""
    nvidia = importlib.util.find_spec("nvidia")
    patterns = [os.path.join(torch.__path__[0], "lib")]
    for root in nvidia.submodule_search_locations if nvidia else ():
        patterns += [os.path.join(root, "*", part) for part in ("lib", "bin")]  # Linux, Windows
    patterns += [os.path.join(sys.prefix, "lib"), os.path.join(sys.prefix, "Library", "bin")]
    return [folder for pattern in patterns for folder in sorted(glob.glob(pattern))]


def _pip_package(library: str) -> str:
    """NVIDIA's pip package of cudart or nvrtc for torch's version of CUDA; since 13 its name has no suffix."""
    name = {"cudart": "nvidia-cuda-runtime", "nvrtc": "nvidia-cuda-nvrtc"}[library]
    return f"{name}-cu{_cuda_major()}" if _cuda_major() in ("11", "12") else name


def _cuda_major() -> str:
    return (torch.version.cuda or "").split(".")[0]
