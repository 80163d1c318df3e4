"""What the texts of the CPU kernels are written with: LLVM IR, its types, and the variants of a kernel.

A kernel is one function `void step(ptr arguments, i64 thread)` that every thread runs; the threads share out its rows
by a counter. Products are written in products.py, everything else of a decode step in steps.py; nothing is
compiled or run there (see runtime.py).

    M rows of activations, K columns, N rows of the weight; INT4 packs the even column into the HIGH nibble.
"""

from __future__ import annotations

import contextlib
import struct
import types
from typing import NamedTuple

CHUNK = 128  # columns per step of every kernel: 64 bytes of INT4, and whole groups of 32, 64 or 128 columns
TILE = 4  # rows of the weight that share one load of the activations
PANEL = 16  # rows of activations in one vector of a matrix product
BLOCK_ROWS = 64  # rows of the weight that a gemm unpacks at a time, and that all passes of a gemv share
PASS_ROWS = {"avx2": 4, "avx512": 8, "avx512_bf16": 8}  # of activations at a time in a gemv: their sums fill registers
PREFETCH_LEVEL = 3  # into the first-level cache

PREFETCH_BYTES = 4096  # how far ahead keys and values are asked for
LARGEST_HEAD = 256  # numbers in a query, key or value
INT8_COLUMNS = 32  # of activations that share a scale when they are int8
INT8_BYTES = PANEL * (4 + 4 + INT8_COLUMNS)  # of so many columns of a panel: a scale and an offset a row, then values
TYPE_BYTES = {"float": 4, "bfloat": 2, "half": 2}

F32X16, BF16X32, I32X16, I16X32 = "<16 x float>", "<32 x bfloat>", "<16 x i32>", "<32 x i16>"
NIBBLES = [n if n < 8 else n - 16 for n in range(16)]
INTRINSICS = f"""
declare i64 @llvm.umin.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.x86.sse2.clflush(ptr)
declare void @llvm.x86.sse2.pause()
declare i64 @llvm.readcyclecounter()
declare {F32X16} @llvm.fma.v16f32({F32X16}, {F32X16}, {F32X16})
declare {F32X16} @llvm.sqrt.v16f32({F32X16})
declare {F32X16} @llvm.roundeven.v16f32({F32X16})
declare {F32X16} @llvm.maximum.v16f32({F32X16}, {F32X16})
declare {F32X16} @llvm.fabs.v16f32({F32X16})
declare {I32X16} @llvm.x86.avx512.vpdpbusd.512({I32X16}, {I32X16}, {I32X16})
declare i32 @llvm.vector.reduce.add.v16i32({I32X16})
declare float @llvm.vector.reduce.fmaximum.v16f32({F32X16})
declare float @llvm.vector.reduce.fadd.v16f32(float, {F32X16})
declare float @llvm.vector.reduce.fmax.v16f32({F32X16})
declare {F32X16} @llvm.x86.avx512.permvar.sf.512({F32X16}, {I32X16})
declare {I16X32} @llvm.x86.avx512.permvar.hi.512({I16X32}, {I16X32})
declare {BF16X32} @llvm.x86.avx512bf16.cvtne2ps2bf16.512({F32X16}, {F32X16})
declare {F32X16} @llvm.x86.avx512bf16.dpbf16ps.512({F32X16}, {BF16X32}, {BF16X32})
"""


class Variant(NamedTuple):
    """What one compiled kernel is for; the types are names of LLVM IR, or "" where there is none."""

    kind: str  # a key of PRODUCTS or STEPS
    isa: str  # "avx512_bf16", "avx512" or "avx2"
    bits: int  # 4, 8 or 16
    group: int  # columns per scale; 0 = one scale per row, or none
    weight: str  # type of 16-bit weights
    scale: str  # in "gelu" the type of the input, in "residual_norm" that of the weights of the norm
    x: str  # type of the activations; for "dequantize", "gelu" and "residual_norm" of the result
    rows: int = 0  # rows of activations of a gemv
    tile: int = 0  # rows of the weight at a time in a gemv
    head_size: int = 0  # of attention; keys and values have the type of x
    position_rows: int = 0  # of rotary positions
    bias: str = ""
    masked: bool = False  # whether a mask is added to the scores of attention
    int8: bool = False  # whether a gemm has its activations as int8, which "quantize_panels" makes of x
    prefetch: int = 2  # of the weights of a gemv: into the second-level cache, which takes more requests at a time

    @property
    def dots_bf16(self) -> bool:
        """Whether vdpbf16ps multiplies pairs of bfloat16, which integers and bfloat16 weights fit without rounding."""
        fits = self.bits < 16 or self.weight == "bfloat" or self.head_size
        return self.isa == "avx512_bf16" and self.x == "bfloat" and bool(fits)

    @property
    def lane(self) -> str:
        return "bfloat" if self.dots_bf16 else "float"

    @property
    def vector(self) -> str:
        return BF16X32 if self.dots_bf16 else F32X16

    @property
    def chunk_bytes(self) -> int:
        return CHUNK * self.bits // 8

    @property
    def chunk_groups(self) -> int:
        return CHUNK // self.group if self.group else 0

    @property
    def passes(self) -> list[range]:
        """The rows of activations that a gemv multiplies with a block of the weight one after the other, evenly."""
        count = max(1, -(-self.rows // PASS_ROWS[self.isa]))
        bounds = [self.rows * number // count for number in range(count + 1)]
        return [range(*ends) for ends in zip(bounds, bounds[1:])]

    @property
    def pass_rows(self) -> int:
        return max(map(len, self.passes))

    @property
    def chains(self) -> int:
        """Independent sums per row of the weight and row of x in a gemv, as far as the registers reach."""
        registers, vectors = (4 if self.isa == "avx2" else 8), (4 if self.dots_bf16 else 8)
        return 1 if self.group else min(vectors, max(1, registers // (self.tile * self.pass_rows)))

    @property
    def slab_columns(self) -> int:
        """Columns of a gemv whose activations take 16 KiB (32 KiB of two or four rows) of the first-level cache."""
        columns = 8192 if self.dots_bf16 else 4096
        return columns // (1 if self.pass_rows <= 2 else 2 if self.pass_rows <= 4 else 8)

    def with_tile(self, columns: int) -> Variant:
        """Sets how many rows of the weight a gemv reads side by side. One is a single stream, which memory delivers
        fastest; several share each load of the activations, and slabs end less often. As measured."""
        if self.isa == "avx2":  # half as many registers, half as wide
            return self._replace(tile={1: 2, 2: 2}.get(self.pass_rows, 1))
        if self.pass_rows > 4:
            return self._replace(tile=2)
        if self.pass_rows > 1 or (self.bits < 16 and not self.dots_bf16):
            return self._replace(tile=TILE)
        if columns <= self.slab_columns:
            return self._replace(tile=1)
        return self._replace(tile=TILE if self.bits == 4 else 2)

    @property
    def tiles_ahead(self) -> int:
        """How far ahead a gemv asks for weights: 8 KiB or one tile."""
        return max(1, 8192 // (self.tile * min(self.slab_columns, 4096) * self.bits // 8))

    @property
    def asks_twice(self) -> bool:
        """Whether a gemv asks for its next tile into the first-level cache as well. The multiplications of many rows
        that wait for a weight leave no place in the queue for others; few rows lose by it. As measured on Zen 4."""
        return self.pass_rows > 4

    def gemv_scratch(self, columns: int) -> int:
        """float32 words that each thread of a gemv needs: x and the sums."""
        return self.rows * (columns + 16 * BLOCK_ROWS)

    @property
    def gemm_tiles(self) -> list[tuple[int, int]]:
        """(panels of activations, rows of the weight) at a time in a gemm, the widest first."""
        if self.int8:
            return [(2, 4), (1, 8)]
        return [(1, 4)] if self.isa == "avx2" else [(2, 8), (1, 16)]

    @property
    def lane_bytes(self) -> int:
        """Of one unpacked weight of a gemm."""
        return 1 if self.int8 else 2 if self.dots_bf16 else 4

    @property
    def block_columns(self) -> int:
        """Columns of the weight that a gemm unpacks at a time: 128 KiB with BLOCK_ROWS, in the second-level cache."""
        return 2048 // self.lane_bytes

    def gemm_scratch(self, panels: int) -> int:
        """float32 words that each thread of a gemm needs: the sums and the unpacked block."""
        return BLOCK_ROWS * (panels * PANEL + self.block_columns * self.lane_bytes // 4)


class Arguments:
    """What a kernel reads: 64-bit words, the first of which the threads count up; and the number of this thread."""

    COUNTERS = ("next_task", "tasks_done", "next_thread")
    POINTERS = ("weight", "scale", "x", "y", "scratch", "bias", "residual", "gamma", "beta")
    POINTERS += ("key", "value", "mask", "lengths", "cos", "sin", "nap")
    NUMBERS = ("rows", "task_rows", "chunks", "panels", "tokens", "heads", "key_head_stride", "key_batch_stride")
    NUMBERS += ("value_head_stride", "value_batch_stride", "patience")
    NUMBERS += ("factor", "epsilon")  # float32 in the lower half
    NAMES = COUNTERS + POINTERS + NUMBERS

    thread = "%thread"

    def __init__(self, emit: Emitter, pointer: str = "%arguments") -> None:
        for number, name in enumerate(self.NAMES):
            word = emit.at("i64", pointer, number)
            if name not in self.COUNTERS:
                word = emit.load("i64", word)
            setattr(self, name, emit(f"inttoptr i64 {word} to ptr") if name in self.POINTERS else word)


class Emitter:
    """Collects lines of IR. Calling it with an instruction appends it and returns the name of its value."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.block = "entry"
        self._names = 0

    def __call__(self, instruction: str) -> str:
        name = f"%{self.fresh()}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def fresh(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def do(self, *lines: str) -> None:
        self.lines += lines

    def op(self, name: str, a, b, kind: str = "i64") -> str:
        return self(f"{name} {kind} {a}, {b}")

    def at(self, kind: str, pointer: str, index) -> str:
        return self(f"getelementptr {kind}, ptr {pointer}, i64 {index}")

    def load(self, kind: str, pointer: str, align: int = 1) -> str:
        return self(f"load {kind}, ptr {pointer}, align {align}")

    def store(self, kind: str, value: str, pointer: str, align: int = 1) -> None:
        self.do(f"  store {kind} {value}, ptr {pointer}, align {align}")

    def call(self, kind: str, function: str, *arguments: str) -> str:
        return self(f"call {kind} @llvm.{function}({', '.join(arguments)})")

    def minimum(self, a: str, b: str) -> str:
        return self.call("i64", "umin.i64", f"i64 {a}", f"i64 {b}")

    def fma(self, a: str, b: str, c: str) -> str:
        return self.call(F32X16, "fma.v16f32", f"{F32X16} {a}", f"{F32X16} {b}", f"{F32X16} {c}")

    def shuffle(self, kind: str, a: str, lanes: list[int], b: str = "poison") -> str:
        return self(f"shufflevector {kind} {a}, {kind} {b}, <{len(lanes)} x i32> {vector_of('i32', lanes)}")

    def widen(self, kind: str, value: str, lanes: int = 16) -> str:
        return value if kind == "float" else self(f"fpext <{lanes} x {kind}> {value} to <{lanes} x float>")

    @contextlib.contextmanager
    def loop(self, stop: str, step: int = 1, start: str = "0", carried=()):
        """for index in range(start, stop, step). `carried` lists (type, initial value); in the body `values` are their
        names, and after it `update` has to hold their new values. Such a loop runs at least once, and the new values
        are valid after it as well."""
        label, before = self.fresh(), self.block
        some = "" if carried else self(f"icmp ult i64 {start}, {stop}")
        self.do(f"  br i1 {some}, label %{label}, label %{label}.end" if some else f"  br label %{label}", f"{label}:")
        head, self.block = len(self.lines), label
        values = [f"%{label}.{number}" for number in range(len(carried))]
        loop = types.SimpleNamespace(index=f"%{label}.index", values=values, update=[])
        yield loop
        following = self.op("add", loop.index, step)
        again = self(f"icmp ult i64 {following}, {stop}")
        self.do(f"  br i1 {again}, label %{label}, label %{label}.end", f"{label}.end:")
        phis = [("i64", start, loop.index, following)]
        phis += [(kind, first, name, new) for (kind, first), name, new in zip(carried, values, loop.update)]
        self.lines[head:head] = [
            f"  {name} = phi {kind} [{first}, %{before}], [{new}, %{self.block}]" for kind, first, name, new in phis
        ]
        self.block = f"{label}.end"

    @contextlib.contextmanager
    def when(self, condition: str):
        label = self.fresh()
        self.do(f"  br i1 {condition}, label %{label}, label %{label}.end", f"{label}:")
        self.block = label
        yield
        self.do(f"  br label %{label}.end", f"{label}.end:")
        self.block = f"{label}.end"

    @contextlib.contextmanager
    def tasks(self, args: Arguments):
        """Takes ranges of rows from a counter that all threads share, so that a core which is busy elsewhere takes
        fewer; yields the first row of a range and the one after its last."""
        label = self.fresh()
        self.do(f"  br label %{label}", f"{label}:")
        first = self.op("mul", self(f"atomicrmw add ptr {args.next_task}, i64 1 monotonic"), args.task_rows)
        more = self(f"icmp ult i64 {first}, {args.rows}")
        self.do(f"  br i1 {more}, label %{label}.body, label %{label}.end", f"{label}.body:")
        self.block = f"{label}.body"
        last = self.minimum(self.op("add", first, args.task_rows), args.rows)
        yield first, last
        self(f"atomicrmw add ptr {args.tasks_done}, i64 1 release")
        self.do(f"  br label %{label}", f"{label}.end:")
        self.block = f"{label}.end"


def vector_of(kind: str, values) -> str:
    return "<" + ", ".join(f"{kind} {value}" for value in values) + ">"


def splat(emit: Emitter, scalar: str) -> str:
    return emit.shuffle(F32X16, emit(f"insertelement {F32X16} poison, float {scalar}, i64 0"), [0] * 16)


def float_constant(value: float) -> str:
    """IR wants a float32 written as the float64 that it equals."""
    value = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def float_word(emit: Emitter, word: str) -> str:
    """The float32 in the lower half of a 64-bit argument."""
    return emit(f"bitcast i32 {emit(f'trunc i64 {word} to i32')} to float")


def narrow(emit: Emitter, kind: str, value: str, lanes: int = 16) -> str:
    """float32 lanes -> `kind`, ties to even. bfloat16 by integers: LLVM would call a C function without AVX-512."""
    if kind == "float":
        return value
    floats, integers = f"<{lanes} x float>", f"<{lanes} x i32>"
    if kind == "half":
        return emit(f"fptrunc {floats} {value} to <{lanes} x half>")
    bits, constant = emit(f"bitcast {floats} {value} to {integers}"), lambda n: vector_of("i32", [n] * lanes)
    odd = emit.op("and", emit.op("lshr", bits, constant(16), integers), constant(1), integers)
    rounded = emit.op("add", emit.op("add", bits, odd, integers), constant(0x7FFF), integers)
    is_nan = emit(f"fcmp uno {floats} {value}, {value}")
    rounded = emit(f"select <{lanes} x i1> {is_nan}, {integers} {constant(0x7FC00000)}, {integers} {rounded}")
    upper = emit(f"trunc {integers} {emit.op('lshr', rounded, constant(16), integers)} to <{lanes} x i16>")
    return emit(f"bitcast <{lanes} x i16> {upper} to <{lanes} x bfloat>")


def load_float32(emit: Emitter, kind: str, pointer: str, index) -> str:
    return emit.widen(kind, emit.load(f"<16 x {kind}>", emit.at(kind, pointer, index)))


def larger(emit: Emitter, a: str, b: str) -> str:
    """The larger lanes; b where a is NaN."""
    return emit(f"select <16 x i1> {emit(f'fcmp ogt {F32X16} {a}, {b}')}, {F32X16} {a}, {F32X16} {b}")


def smaller(emit: Emitter, a: str, b: str) -> str:
    """The smaller lanes; a where a is NaN."""
    return emit(f"select <16 x i1> {emit(f'fcmp ogt {F32X16} {a}, {b}')}, {F32X16} {b}, {F32X16} {a}")


def sum_of_lanes(emit: Emitter, vector: str) -> str:
    return emit(f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, {F32X16} {vector})")


def multiply_add(emit: Emitter, variant: Variant, weight: str, x: str, total: str) -> str:
    if not variant.dots_bf16:
        return emit.fma(weight, x, total)
    operands = (f"{F32X16} {total}", f"{BF16X32} {weight}", f"{BF16X32} {x}")
    return emit.call(F32X16, "x86.avx512bf16.dpbf16ps.512", *operands)


def prefetch(emit: Emitter, pointer: str, size: int, level: int = PREFETCH_LEVEL) -> None:
    """Of weights that are needed soon: the CPU by itself looks ahead within a page of 4 KiB only."""
    for offset in range(0, size, 64):
        emit.do(f"  call void @llvm.prefetch.p0(ptr {emit.at('i8', pointer, offset)}, i32 0, i32 {level}, i32 1)")
