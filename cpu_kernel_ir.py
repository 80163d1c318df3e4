"""The LLVM IR of the CPU kernels, as text; nothing here is compiled or run (see cpu_kernels.py).

A kernel is one function `void kernel(ptr arguments)` that every thread runs. It walks the weight by tiles of a few
rows and chunks of 128 columns; a group of columns with a scale of its own never crosses a chunk.

    M rows of activations, K columns, N rows of the weight; INT4 packs the even column into the HIGH nibble.
"""

from __future__ import annotations

import contextlib
import math
import struct
import types
from typing import NamedTuple

CHUNK = 128  # columns per step of every kernel: 64 bytes of INT4, and whole groups of 32, 64 or 128 columns
TILE = 4  # rows of the weight that share one load of the activations
PANEL = 16  # rows of activations in one vector of a matrix product
BLOCK_ROWS = 64  # rows of the weight that a thread unpacks at a time for a matrix product
PREFETCH_LEVEL = 3  # into the first-level cache; measured best

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
declare {F32X16} @llvm.x86.avx512bf16.dpbf16ps.512({F32X16}, {BF16X32}, {BF16X32})
"""


class Variant(NamedTuple):
    """What one compiled kernel is for; the types are names of LLVM IR, or "" where there is none."""

    kind: str  # a key of KERNELS
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

    @property
    def dots_bf16(self) -> bool:
        """Whether vdpbf16ps multiplies pairs of bfloat16, which integers and bfloat16 weights fit without rounding;
        a gemv has INT8 in float32 sooner."""
        fits = self.bits == 4 or self.weight == "bfloat" or (self.bits == 8 and self.kind == "gemm") or self.head_size
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
    def chains(self) -> int:
        """Independent sums per row of the weight and row of x in a gemv, as far as the registers reach."""
        registers, vectors = (4 if self.isa == "avx2" else 8), (4 if self.dots_bf16 else 8)
        return 1 if self.group else min(vectors, max(1, registers // (self.tile * self.rows)))

    @property
    def slab_columns(self) -> int:
        """Columns of a gemv whose activations take 16 KiB, or 32 KiB of several rows, of the first-level cache."""
        columns = 8192 if self.dots_bf16 else 4096
        return columns if self.rows <= 2 else columns // 2

    def with_tile(self, columns: int) -> Variant:
        """Sets how many rows of the weight a gemv reads side by side. One is a single stream, which memory delivers
        fastest; several share each load of the activations, and slabs end less often. As measured."""
        if self.isa == "avx2":  # half as many registers, half as wide
            return self._replace(tile={1: 2, 2: 2}.get(self.rows, 1))
        if self.rows > 1 or (self.bits == 4 and not self.dots_bf16):
            return self._replace(tile=TILE)
        if columns <= self.slab_columns:
            return self._replace(tile=1)
        return self._replace(tile=TILE if self.bits == 4 else 2)

    @property
    def tiles_ahead(self) -> int:
        """How far ahead a gemv asks for weights: 8 KiB or one tile."""
        return max(1, 8192 // (self.tile * min(self.slab_columns, 4096) * self.bits // 8))

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


# ---------------------------------------------------------------------------------------------- writing LLVM IR


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
        some = "true" if carried else self(f"icmp ult i64 {start}, {stop}")
        self.do(f"  br i1 {some}, label %{label}, label %{label}.end", f"{label}:")
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
        self.do(f"  br label %{label}", f"{label}.end:")
        self.block = f"{label}.end"


def vector_of(kind: str, values) -> str:
    return "<" + ", ".join(f"{kind} {value}" for value in values) + ">"


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


# ---------------------------------------------------------------------------------------------- widening weights


def columns(variant: Variant) -> list[list[int]]:
    """Which column of a chunk each lane of each vector of `widened` holds.

    INT4 nibbles are taken from 16- or 32-bit lanes by shifts, which is cheaper than restoring their order: the
    activations, of which there are few, are put into this order instead."""
    if variant.bits == 4:
        vectors = 4 if variant.dots_bf16 else 8
        return [[vectors * lane + (v ^ 1) for lane in range(CHUNK // vectors)] for v in range(vectors)]
    lanes = 32 if variant.dots_bf16 else 16
    return [list(range(start, start + lanes)) for start in range(0, CHUNK, lanes)]


def widened(emit: Emitter, variant: Variant, pointer: str) -> list[str]:
    """The weights of the chunk at `pointer` as vectors of `variant.vector`."""
    if variant.bits == 4:
        return _widened_int4(emit, variant, pointer)
    size = 64 if variant.dots_bf16 else variant.chunk_bytes // 8
    parts = [emit.at("i8", pointer, offset) for offset in range(0, variant.chunk_bytes, size)]
    if variant.bits == 8:
        return [emit(f"sitofp <16 x i8> {emit.load('<16 x i8>', part)} to {F32X16}") for part in parts]
    if variant.dots_bf16:
        return [emit.load(BF16X32, part) for part in parts]
    return [emit.widen(variant.weight, emit.load(f"<16 x {variant.weight}>", part)) for part in parts]


def _widened_int4(emit: Emitter, variant: Variant, pointer: str) -> list[str]:
    """By a look-up in a table of 16 values held in a register; the look-up ignores the bits above its index."""
    if variant.dots_bf16:
        table = vector_of("i16", [struct.unpack("<h", struct.pack("<f", n)[2:])[0] for n in NIBBLES * 2])
        packed, found = emit.load(I16X32, pointer), []
        for shift in range(0, 16, 4):
            index = emit.op("lshr", packed, vector_of("i16", [shift] * 32), I16X32)
            value = emit.call(I16X32, "x86.avx512.permvar.hi.512", f"{I16X32} {table}", f"{I16X32} {index}")
            found.append(emit(f"bitcast {I16X32} {value} to {BF16X32}"))
        return found
    packed, constant = emit.load(I32X16, pointer), lambda n: vector_of("i32", [n] * 16)
    if variant.isa == "avx2":
        tops = [emit.op("shl", packed, constant(28 - shift), I32X16) for shift in range(0, 32, 4)]
        return [emit(f"sitofp {I32X16} {emit.op('ashr', top, constant(28), I32X16)} to {F32X16}") for top in tops]
    table = f"{F32X16} {vector_of('float', map(float, NIBBLES))}"
    indices = [emit.op("lshr", packed, constant(shift), I32X16) for shift in range(0, 32, 4)]
    return [emit.call(F32X16, "x86.avx512.permvar.sf.512", table, f"{I32X16} {index}") for index in indices]


# ---------------------------------------------------------------------------------------------- the kernels


class Arguments:
    """The kernels' one argument: 64-bit words, the first two of which the threads count up."""

    COUNTERS = ("next_task", "next_thread")
    POINTERS = ("weight", "scale", "x", "y", "scratch", "bias", "residual", "gamma", "beta")
    POINTERS += ("key", "value", "mask", "cos", "sin", "barrier")
    NUMBERS = ("rows", "task_rows", "chunks", "panels", "tokens", "heads", "key_head_stride", "key_batch_stride")
    NUMBERS += ("value_head_stride", "value_batch_stride")
    NUMBERS += ("factor", "epsilon")  # float32 in the lower half
    NAMES = COUNTERS + POINTERS + NUMBERS

    def __init__(self, emit: Emitter) -> None:
        for number, name in enumerate(self.NAMES):
            word = emit.at("i64", "%arguments", number)
            if name not in self.COUNTERS:
                word = emit.load("i64", word)
            setattr(self, name, emit(f"inttoptr i64 {word} to ptr") if name in self.POINTERS else word)


def kernel_ir(variant: Variant) -> str:
    """The module of LLVM IR with the one function `kernel`, which every thread runs."""
    emit = Emitter()
    emit.do("define void @kernel(ptr %arguments) {", "entry:")
    args = Arguments(emit)
    KERNELS[variant.kind](emit, variant, args)
    emit.do("  ret void", "}")
    body = "\n".join(emit.lines)
    used = [line for line in INTRINSICS.splitlines() if line and line.split("@")[1].split("(")[0] in body]
    return "\n".join(used) + "\n" + body


def gemv(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[M, N] = x[M, K] @ (scale * weight[N, K]).T for a few M.

    Reads BLOCK_ROWS rows of the weight, by slabs of columns whose activations stay in the first-level cache. The own
    memory of a thread holds x [M, K] and the sums [BLOCK_ROWS, M] of 16 lanes."""
    x_columns = emit.op("mul", args.chunks, CHUNK)
    x_values = emit.op("mul", x_columns, variant.rows)
    thread = emit(f"atomicrmw add ptr {args.next_thread}, i64 1 monotonic")
    own_floats = emit.op("add", x_values, BLOCK_ROWS * variant.rows * 16)
    sums = emit.at("float", args.scratch, emit.op("mul", thread, own_floats))
    own_x = emit.at(F32X16, sums, BLOCK_ROWS * variant.rows)
    copy_x(emit, variant, args, own_x)
    with emit.tasks(args) as (first, last), emit.loop(last, BLOCK_ROWS, first) as block:
        stop = emit.minimum(emit.op("add", block.index, BLOCK_ROWS), last)
        slab_chunks = variant.slab_columns // CHUNK
        with emit.loop(args.chunks, slab_chunks) as slab:
            slab_stop = emit.minimum(emit.op("add", slab.index, slab_chunks), args.chunks)
            with emit.loop(stop, variant.tile, block.index) as row:
                local = emit.op("mul", emit.op("sub", row.index, block.index), variant.rows)
                tile_sums = emit.at(F32X16, sums, local)
                add_tile(emit, variant, args, own_x, tile_sums, row.index, slab.index, slab_stop)
        with emit.loop(stop, 1, block.index) as row:
            local = emit.op("mul", emit.op("sub", row.index, block.index), variant.rows)
            store_row(emit, variant, args, emit.at(F32X16, sums, local), row.index)


def copy_x(emit: Emitter, variant: Variant, args: Arguments, own_x: str) -> None:
    """Each thread copies x to its own memory, in the kernel's type and order of columns."""
    order = [column for vector in columns(variant) for column in vector]
    with emit.loop(emit.op("mul", args.chunks, variant.rows)) as chunk:
        offset = emit.op("mul", chunk.index, CHUNK)
        x = emit.load(f"<{CHUNK} x {variant.x}>", emit.at(variant.x, args.x, offset))
        if variant.x != variant.lane:
            x = emit.widen(variant.x, x, CHUNK)
        x = emit.shuffle(f"<{CHUNK} x {variant.lane}>", x, order)
        emit.store(f"<{CHUNK} x {variant.lane}>", x, emit.at(variant.lane, own_x, offset), 64)


def add_tile(
    emit, variant: Variant, args: Arguments, own_x: str, tile_sums: str, row: str, start: str, stop: str
) -> None:
    """Adds the chunks from `start` to `stop` of the rows of a tile to their sums, in several chains: a single chain of
    additions would wait for its own results."""
    chains = variant.chains
    keys = [(t, m, c) for t in range(variant.tile) for m in range(variant.rows) for c in range(chains)]
    row_bytes = emit.op("mul", args.chunks, variant.chunk_bytes)
    first = emit.at("i8", args.weight, emit.op("mul", row, row_bytes))
    rows = [emit.at("i8", first, emit.op("mul", row_bytes, t)) for t in range(variant.tile)]
    ahead = emit.op("mul", row_bytes, variant.tile * variant.tiles_ahead)
    x_columns = emit.op("mul", args.chunks, CHUNK)
    with emit.loop(stop, 1, start, [(F32X16, "zeroinitializer")] * len(keys)) as chunk:
        sums = dict(zip(keys, chunk.values))
        here = [emit.at("i8", pointer, emit.op("mul", chunk.index, variant.chunk_bytes)) for pointer in rows]
        for pointer in here:
            prefetch(emit, emit.at("i8", pointer, ahead), variant.chunk_bytes)
        weights = [widened(emit, variant, pointer) for pointer in here]
        x_first = emit.at(variant.lane, own_x, emit.op("mul", chunk.index, CHUNK))
        xs = [emit.at(variant.lane, x_first, emit.op("mul", x_columns, m)) for m in range(variant.rows)]
        if variant.group:
            scales = [chunk_scales(emit, variant, args, emit.op("add", row, t), chunk.index) for t in range(len(rows))]
            add_grouped(emit, variant, sums, weights, xs, scales)
        else:
            for v in range(len(weights[0])):
                add_products(emit, variant, sums, v, weights, xs, chain=v % chains)
        chunk.update = [sums[key] for key in keys]
    is_first = emit(f"icmp eq i64 {start}, 0")
    for t, m, _ in keys[::chains]:
        place = emit.at(F32X16, tile_sums, t * variant.rows + m)
        total = emit(f"select i1 {is_first}, {F32X16} zeroinitializer, {F32X16} {emit.load(F32X16, place, 64)}")
        for c in range(chains):
            total = emit.op("fadd", total, sums[t, m, c], F32X16)
        emit.store(F32X16, total, place, 64)


def prefetch(emit: Emitter, pointer: str, size: int) -> None:
    """Of weights that are needed soon: the CPU by itself looks ahead within a page of 4 KiB only."""
    for offset in range(0, size, 64):
        emit.do(
            f"  call void @llvm.prefetch.p0(ptr {emit.at('i8', pointer, offset)}, i32 0, i32 {PREFETCH_LEVEL}, i32 1)"
        )


def add_products(emit: Emitter, variant: Variant, sums: dict, v: int, weights: list, xs: list, chain: int = 0) -> None:
    """sums[t, m, chain] += weights[t][v] * xs[m][v]."""
    kind, lanes = variant.vector, 32 if variant.dots_bf16 else 16
    for m, x in enumerate(xs):
        x_vector = emit.load(kind, emit.at(variant.lane, x, v * lanes), 64)
        for t, row in enumerate(weights):
            sums[t, m, chain] = multiply_add(emit, variant, row[v], x_vector, sums[t, m, chain])


def multiply_add(emit: Emitter, variant: Variant, weight: str, x: str, total: str) -> str:
    if not variant.dots_bf16:
        return emit.fma(weight, x, total)
    operands = (f"{F32X16} {total}", f"{BF16X32} {weight}", f"{BF16X32} {x}")
    return emit.call(F32X16, "x86.avx512bf16.dpbf16ps.512", *operands)


def chunk_scales(emit: Emitter, variant: Variant, args: Arguments, row: str, chunk: str) -> str:
    """The scales of one row in one chunk, as float32 lanes."""
    count = variant.chunk_groups
    first = emit.op("mul", emit.op("add", emit.op("mul", row, args.chunks), chunk), count)
    return emit.widen(
        variant.scale, emit.load(f"<{count} x {variant.scale}>", emit.at(variant.scale, args.scale, first)), count
    )


def add_grouped(emit: Emitter, variant: Variant, sums: dict, weights: list, xs: list, scales: list) -> None:
    """Vectors whose lanes lie in the same groups are summed first, then multiplied by the scales of their lanes."""
    alike: dict[tuple, list[int]] = {}
    for v, lanes in enumerate(columns(variant)):
        alike.setdefault(tuple(column // variant.group for column in lanes[:: len(lanes) // 16]), []).append(v)
    for groups, vectors in alike.items():
        partial = dict.fromkeys(sums, "zeroinitializer")
        for v in vectors:
            add_products(emit, variant, partial, v, weights, xs)
        for t, scale in enumerate(scales):
            of_lanes = emit.shuffle(f"<{variant.chunk_groups} x float>", scale, list(groups))
            for m in range(variant.rows):
                sums[t, m, 0] = emit.fma(partial[t, m, 0], of_lanes, sums[t, m, 0])


def store_row(emit: Emitter, variant: Variant, args: Arguments, row_sums: str, row: str) -> None:
    """y[:, row] = the sums of one row of the weight, lanes added, times its scale."""
    scale = row_value(emit, variant.scale, args.scale, row) if variant.scale and not variant.group else None
    for m in range(variant.rows):
        lanes = emit.load(F32X16, emit.at(F32X16, row_sums, m), 64)
        total = sum_of_lanes(emit, lanes)
        if scale:
            total = emit.op("fmul", total, scale, "float")
        emit.store("float", total, emit.at("float", args.y, emit.op("add", row, emit.op("mul", args.rows, m))))


def row_value(emit: Emitter, kind: str, pointer: str, index: str) -> str:
    """The scale, or the bias, of one row of the weight as float32."""
    value = emit.load(kind, emit.at(kind, pointer, index))
    return value if kind == "float" else emit(f"fpext {kind} {value} to float")


def dequantize_rows(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[N, K] = scale * weight[N, K], the float32 product rounded once."""
    with emit.tasks(args) as (first, last), emit.loop(last, 1, first) as rows, emit.loop(args.chunks) as chunk:
        scale = ""
        if variant.scale and not variant.group:
            scale = splat(emit, row_value(emit, variant.scale, args.scale, rows.index))
        values = in_order(emit, variant, args, rows.index, chunk.index, scale)
        place = emit.op("mul", emit.op("add", emit.op("mul", rows.index, args.chunks), chunk.index), CHUNK)
        for v, value in enumerate(values):
            pointer = emit.at(variant.x, args.y, emit.op("add", place, v * 16))
            emit.store(f"<16 x {variant.x}>", narrow(emit, variant.x, value), pointer)


def in_order(emit: Emitter, variant: Variant, args: Arguments, row: str, chunk: str, scale: str = "") -> list[str]:
    """A chunk as eight vectors of float32 in the order of its columns, times `scale` or the scales of its groups."""
    number = emit.op("add", emit.op("mul", row, args.chunks), chunk)
    pointer = emit.at("i8", args.weight, emit.op("mul", number, variant.chunk_bytes))
    to_float32 = variant._replace(x="float")
    values = in_order_int4(emit, pointer) if variant.bits == 4 else widened(emit, to_float32, pointer)
    if variant.group:
        scales = chunk_scales(emit, variant, args, row, chunk)
        of_vector = [[v * 16 // variant.group] * 16 for v in range(8)]
        scales = [emit.shuffle(f"<{variant.chunk_groups} x float>", scales, lanes) for lanes in of_vector]
    else:
        scales = [scale] * 8
    return [emit.op("fmul", value, scale, F32X16) if scale else value for value, scale in zip(values, scales)]


def in_order_int4(emit: Emitter, pointer: str) -> list[str]:
    kind, four = "<64 x i8>", vector_of("i8", [4] * 64)
    packed = emit.load(kind, pointer)
    high = emit.op("ashr", packed, four, kind)
    low = emit.op("ashr", emit.op("shl", packed, four, kind), four, kind)
    values = []
    for start in range(0, 64, 8):
        lanes = [index for byte in range(start, start + 8) for index in (byte, 64 + byte)]
        values.append(emit(f"sitofp <16 x i8> {emit.shuffle(kind, high, lanes, low)} to {F32X16}"))
    return values


def splat(emit: Emitter, scalar: str) -> str:
    return emit.shuffle(F32X16, emit(f"insertelement {F32X16} poison, float {scalar}, i64 0"), [0] * 16)


# ---------------------------------------------------------------------------------------------- matrix products


def gemm(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[M, N] = x[M, K] @ (scale * weight[N, K]).T for many M.

    x comes as panels of 16 rows, transposed so that a vector holds one column of all 16 (bfloat16: a pair of columns).
    A thread unpacks a block of the weight once, then multiplies each of its values with whole panels; the sums of its
    BLOCK_ROWS rows stay in its own memory until all columns are done."""
    sum_floats = emit.op("mul", args.panels, PANEL * BLOCK_ROWS)
    own_floats = emit.op("add", sum_floats, BLOCK_ROWS * variant.block_columns * variant.lane_bytes // 4)
    thread = emit(f"atomicrmw add ptr {args.next_thread}, i64 1 monotonic")
    sums = emit.at("float", args.scratch, emit.op("mul", thread, own_floats))
    block = emit.at("float", sums, sum_floats)
    last_block = emit.op("sub", args.rows, BLOCK_ROWS)
    with emit.tasks(args) as (first, _):
        first = emit.minimum(first, last_block)  # the last two blocks may overlap
        with emit.loop(emit.op("mul", args.panels, BLOCK_ROWS)) as vector:
            emit.store(F32X16, "zeroinitializer", emit.at(F32X16, sums, vector.index), 64)
        block_chunks = variant.block_columns // CHUNK
        with emit.loop(args.chunks, block_chunks) as start:
            count = emit.minimum(emit.op("sub", args.chunks, start.index), str(block_chunks))
            unpack, multiply = (unpack_bytes, multiply_int8_tile) if variant.int8 else (unpack_block, multiply_tile)
            unpack(emit, variant, args, block, first, start.index, count)
            tile_start = "0"
            for panels, rows in variant.gemm_tiles:
                stop = args.panels if panels == 1 else emit.op("and", args.panels, -panels)
                with emit.loop(stop, panels, tile_start) as panel, emit.loop(str(BLOCK_ROWS), rows) as row:
                    tile = GemmTile(panel.index, panels, row.index, rows)
                    multiply(emit, variant, args, tile, block, sums, start.index, count)
                tile_start = stop
        with emit.loop(str(BLOCK_ROWS), 8) as row, emit.loop(args.panels) as panel:
            finish_tile(emit, variant, args, sums, first, row.index, panel.index)


class GemmTile(NamedTuple):
    panel: str
    panels: int
    row: str
    rows: int


def unpack_block(emit: Emitter, variant: Variant, args: Arguments, block: str, first: str, chunk: str, count: str):
    """block[BLOCK_ROWS, block_columns] = the weight, times the scales of its groups; rounded only by these."""
    lane = variant.lane
    with emit.loop(str(BLOCK_ROWS)) as row, emit.loop(count) as local:
        weight_row, weight_chunk = emit.op("add", first, row.index), emit.op("add", chunk, local.index)
        number = emit.op("add", emit.op("mul", weight_row, args.chunks), weight_chunk)
        next_block = emit.op("mul", emit.op("add", number, variant.block_columns // CHUNK), variant.chunk_bytes)
        prefetch(emit, emit.at("i8", args.weight, next_block), variant.chunk_bytes)
        place = emit.op("mul", row.index, variant.block_columns)
        place = emit.op("add", place, emit.op("mul", local.index, CHUNK))
        for v, value in enumerate(in_order(emit, variant, args, weight_row, weight_chunk)):
            if lane == "bfloat":
                value = emit(f"fptrunc {F32X16} {value} to <16 x bfloat>")
            emit.store(f"<16 x {lane}>", value, emit.at(lane, block, emit.op("add", place, v * 16)), 32)


def multiply_tile(
    emit, variant: Variant, args: Arguments, tile: GemmTile, block: str, sums: str, chunk: str, count: str
):
    """sums[row, panel] += block[row] * panel, for the rows and panels of a tile and the columns of a block."""
    per_chunk = CHUNK // 2 if variant.dots_bf16 else CHUNK  # steps: a column, or a pair, of one panel is 64 bytes
    places, panels = [], []
    for r in range(tile.rows):
        line = emit.op("mul", emit.op("add", tile.row, r), args.panels)
        for p in range(tile.panels):
            index = emit.op("add", line, emit.op("add", tile.panel, p))
            places.append(emit.at(F32X16, sums, index))
    for p in range(tile.panels):
        line = emit.op("mul", emit.op("add", tile.panel, p), args.chunks)
        panels.append(emit.at(F32X16, args.x, emit.op("mul", emit.op("add", line, chunk), per_chunk)))
    rows = emit.at(variant.lane, block, emit.op("mul", tile.row, variant.block_columns))
    unroll = 4
    carried = [(F32X16, emit.load(F32X16, place, 64)) for place in places]
    with emit.loop(emit.op("mul", count, per_chunk), unroll, carried=carried) as step:
        totals = list(step.values)
        for u in range(unroll):
            index = emit.op("add", step.index, u)
            xs = [emit.load(variant.vector, emit.at(F32X16, panel, index), 64) for panel in panels]
            for r in range(tile.rows):
                offset = emit.op("add", index, r * variant.block_columns * per_chunk // CHUNK)
                weight = broadcast(emit, variant, emit.at("float", rows, offset))
                for p, x in enumerate(xs):
                    number = r * tile.panels + p
                    totals[number] = multiply_add(emit, variant, weight, x, totals[number])
        step.update = totals
    for place, total in zip(places, step.update):
        emit.store(F32X16, total, place, 64)


def broadcast(emit: Emitter, variant: Variant, pointer: str) -> str:
    """One float32, or a pair of bfloat16, in all lanes."""
    vector = splat(emit, emit.load("float", pointer, 4))
    return emit(f"bitcast {F32X16} {vector} to {BF16X32}") if variant.dots_bf16 else vector


def finish_tile(emit: Emitter, variant: Variant, args: Arguments, sums: str, first: str, row: str, panel: str) -> None:
    """y[16 rows of a panel, 8 rows of the weight] = scale * sums + bias, transposed."""
    kind, rows = variant.x, []
    for r in range(8):
        local = emit.op("add", row, r)
        index = emit.op("add", emit.op("mul", local, args.panels), panel)
        value = emit.load(F32X16, emit.at(F32X16, sums, index), 64)
        number = emit.op("add", first, local)
        if variant.scale and not variant.group:
            scale = row_value(emit, variant.scale, args.scale, number)
            value = emit.op("fmul", value, splat(emit, scale), F32X16)
        if variant.bias:
            bias = row_value(emit, variant.bias, args.bias, number)
            value = emit.op("fadd", value, splat(emit, bias), F32X16)
        rows.append(narrow(emit, kind, value))
    size = PANEL
    while len(rows) > 1:  # interleave the first half with the second until one vector holds [16, 8]
        half, lanes = len(rows) // 2, [lane for n in range(size) for lane in (n, size + n)]
        rows = [emit.shuffle(f"<{size} x {kind}>", a, lanes, b) for a, b in zip(rows[:half], rows[half:])]
        size *= 2
    place = emit.op("add", emit.op("mul", emit.op("mul", panel, PANEL), args.rows), emit.op("add", first, row))
    for m in range(PANEL):
        of_row = emit.shuffle(f"<{size} x {kind}>", rows[0], list(range(8 * m, 8 * m + 8)))
        index = emit.op("add", place, emit.op("mul", args.rows, m))
        emit.store(f"<8 x {kind}>", of_row, emit.at(kind, args.y, index))


# ---------------------------------------------------------------------------------------------- int8 activations


def int8_columns(bits: int) -> list[list[int]]:
    """Which columns of a chunk share a scale of the activations, in their order there: as the weights are unpacked,
    which for INT4 is all even columns before all odd ones."""
    order = list(range(CHUNK)) if bits == 8 else [*range(0, CHUNK, 2), *range(1, CHUNK, 2)]
    return [order[start : start + INT8_COLUMNS] for start in range(0, CHUNK, INT8_COLUMNS)]


def quantize_panels(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y = x[M, K] as int8 in panels of 16 rows, for the weights of `variant.bits`.

    INT8_BYTES for each INT8_COLUMNS: 16 scales; 16 offsets, which are what makes unsigned weights signed ones; and
    eight times four columns of all rows. `tokens` is M; rows behind it repeat the last one."""
    unsigned = 1 << variant.bits - 1
    chunk_bytes = CHUNK // INT8_COLUMNS * INT8_BYTES
    with emit.tasks(args) as (first, last), emit.loop(last, 1, first) as panel, emit.loop(args.chunks) as chunk:
        number = emit.op("add", emit.op("mul", panel.index, args.chunks), chunk.index)
        target = emit.at("i8", args.y, emit.op("mul", number, chunk_bytes))
        with emit.loop(str(PANEL)) as row:
            place = emit.op("add", emit.op("mul", panel.index, PANEL), row.index)
            place = emit.minimum(place, emit.op("sub", args.tokens, 1))
            place = emit.op("mul", emit.op("add", emit.op("mul", place, args.chunks), chunk.index), CHUNK)
            x = emit.load(f"<{CHUNK} x {variant.x}>", emit.at(variant.x, args.x, place))
            for b, columns_of_block in enumerate(int8_columns(variant.bits)):
                halves = [columns_of_block[:16], columns_of_block[16:]]
                halves = [emit.shuffle(f"<{CHUNK} x {variant.x}>", x, lanes) for lanes in halves]
                halves = [emit.widen(variant.x, half) for half in halves]
                start = emit.at("i8", target, b * INT8_BYTES)
                quantize_block(emit, halves, unsigned, emit.at("i8", start, emit.op("mul", row.index, 4)))


def quantize_block(emit: Emitter, halves: list[str], unsigned: int, place: str) -> None:
    """32 activations of one row -> its scale, offset and values; `place` is that of the scale."""
    sizes = [emit.call(F32X16, "fabs.v16f32", f"{F32X16} {half}") for half in halves]
    largest = emit.call(F32X16, "maximum.v16f32", *(f"{F32X16} {size}" for size in sizes))  # NaN stays NaN
    largest = emit(f"call float @llvm.vector.reduce.fmaximum.v16f32({F32X16} {largest})")
    limit = float_constant(127.0)
    emit.store("float", emit.op("fdiv", largest, limit, "float"), place, 4)
    is_zero = emit(f"fcmp oeq float {largest}, 0.0")
    inverse = emit(f"select i1 {is_zero}, float 0.0, float {emit.op('fdiv', limit, largest, 'float')}")
    factor, values = splat(emit, inverse), []
    for half in halves:
        rounded = emit.call(F32X16, "roundeven.v16f32", f"{F32X16} {emit.op('fmul', half, factor, F32X16)}")
        values.append(emit(f"fptosi {F32X16} {rounded} to {I32X16}"))
    total = emit(f"call i32 @llvm.vector.reduce.add.v16i32({I32X16} {emit.op('add', *values, I32X16)})")
    emit.store("i32", emit.op("mul", total, -unsigned, "i32"), emit.at("i8", place, PANEL * 4), 4)
    for h, value in enumerate(values):
        fours = emit(f"bitcast <16 x i8> {emit(f'trunc {I32X16} {value} to <16 x i8>')} to <4 x i32>")
        for lane in range(4):
            four = emit(f"extractelement <4 x i32> {fours}, i64 {lane}")
            emit.store("i32", four, emit.at("i8", place, PANEL * 4 * (2 + 4 * h + lane)), 4)


def unpack_bytes(emit: Emitter, variant: Variant, args: Arguments, block: str, first: str, chunk: str, count: str):
    """block[BLOCK_ROWS, block_columns] = the weight as unsigned bytes, in the order of `int8_columns`."""
    kind, constant = "<64 x i8>", lambda n: vector_of("i8", [n] * 64)
    with emit.loop(str(BLOCK_ROWS)) as row, emit.loop(count) as local:
        weight_row, weight_chunk = emit.op("add", first, row.index), emit.op("add", chunk, local.index)
        number = emit.op("add", emit.op("mul", weight_row, args.chunks), weight_chunk)
        pointer = emit.at("i8", args.weight, emit.op("mul", number, variant.chunk_bytes))
        prefetch(emit, emit.at("i8", pointer, variant.block_columns * variant.bits // 8), variant.chunk_bytes)
        packed = [emit.load(kind, emit.at("i8", pointer, start)) for start in range(0, variant.chunk_bytes, 64)]
        if variant.bits == 4:
            high, low = emit.op("lshr", packed[0], constant(4), kind), emit.op("and", packed[0], constant(15), kind)
            values = [emit.op("xor", nibbles, constant(8), kind) for nibbles in (high, low)]
        else:
            values = [emit.op("xor", value, constant(-128), kind) for value in packed]
        place = emit.op("mul", row.index, variant.block_columns)
        place = emit.op("add", place, emit.op("mul", local.index, CHUNK))
        for v, value in enumerate(values):
            emit.store(kind, value, emit.at("i8", block, emit.op("add", place, 64 * v)), 64)


def multiply_int8_tile(
    emit, variant: Variant, args: Arguments, tile: GemmTile, block: str, sums: str, chunk: str, count: str
):
    """sums[row, panel] += block[row] * panel: integers within INT8_COLUMNS, then times their scales in float32."""
    per_chunk = CHUNK // INT8_COLUMNS
    places, keys = [], [(r, p) for r in range(tile.rows) for p in range(tile.panels)]
    for r, p in keys:
        line = emit.op("mul", emit.op("add", tile.row, r), args.panels)
        places.append(emit.at(F32X16, sums, emit.op("add", line, emit.op("add", tile.panel, p))))
    panels = []
    for p in range(tile.panels):
        number = emit.op("add", emit.op("mul", emit.op("add", tile.panel, p), args.chunks), chunk)
        panels.append(emit.at("i8", args.x, emit.op("mul", number, per_chunk * INT8_BYTES)))
    rows = emit.at("i8", block, emit.op("mul", tile.row, variant.block_columns))
    carried = [(F32X16, emit.load(F32X16, place, 64)) for place in places]
    with emit.loop(emit.op("mul", count, per_chunk), carried=carried) as step:
        here = [emit.at("i8", panel, emit.op("mul", step.index, INT8_BYTES)) for panel in panels]
        weights = emit.at("i8", rows, emit.op("mul", step.index, INT8_COLUMNS))
        scales = [emit.load(F32X16, pointer, 64) for pointer in here]
        offsets = [emit.load(I32X16, emit.at("i8", pointer, PANEL * 4), 64) for pointer in here]
        dots = {(r, p): offsets[p] for r, p in keys}
        for k in range(INT8_COLUMNS // 4):
            xs = [emit.load(I32X16, emit.at("i8", pointer, PANEL * 4 * (2 + k)), 64) for pointer in here]
            for r in range(tile.rows):
                four = emit.load("i32", emit.at("i8", weights, r * variant.block_columns + 4 * k), 4)
                weight = emit(f"insertelement {I32X16} poison, i32 {four}, i64 0")
                weight = emit.shuffle(I32X16, weight, [0] * 16)
                for p, x in enumerate(xs):
                    operands = (f"{I32X16} {dots[r, p]}", f"{I32X16} {weight}", f"{I32X16} {x}")
                    dots[r, p] = emit.call(I32X16, "x86.avx512.vpdpbusd.512", *operands)
        for (r, p), total in zip(keys, step.values):
            step.update.append(emit.fma(emit(f"sitofp {I32X16} {dots[r, p]} to {F32X16}"), scales[p], total))
    for place, total in zip(places, step.update):
        emit.store(F32X16, total, place, 64)


# ---------------------------------------------------------------------------------------------- attention of one token


def attention(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[head] = softmax(x[head] @ keys.T / sqrt(head size) + mask) @ values, with `rows` heads of all sequences."""
    with own_heads(emit, args) as (head, scores, _):
        query = head_vectors(emit, variant, emit.at(variant.x, args.x, emit.op("mul", head, variant.head_size)))
        attend(emit, variant, args, head, query, scores)


def rotary_attention(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """`attention` of the fused projection x [B, heads, 3, head size] float32 + bias. Query and key are rotated; key
    and value are stored behind the others, and `tokens` counts them already."""
    size = variant.head_size
    with own_heads(emit, args) as (head, scores, query):
        sequence, within = emit.op("udiv", head, args.heads), emit.op("urem", head, args.heads)
        x = emit.at("float", args.x, emit.op("mul", head, 3 * size))
        bias = emit.at(variant.bias, args.bias, emit.op("mul", within, 3 * size))
        angles = emit.op("mul", sequence, size // 2)
        new = emit.op("mul", emit.op("sub", args.tokens, 1), size)
        key, value = (emit.at(variant.x, head_start(emit, args, name, head), new) for name in ("key", "value"))
        for part, target in enumerate((query, key)):
            rotate(emit, variant, args, x, bias, part * size, angles, target)
        for start in range(0, size, 16):
            states = biased(emit, variant, x, bias, 2 * size + start, 16)
            emit.store(f"<16 x {variant.x}>", narrow(emit, variant.x, states), emit.at(variant.x, value, start))
        attend(emit, variant, args, head, head_vectors(emit, variant, query), scores)


def attention_scratch(tokens: int) -> int:
    """float32 words that each thread of an attention needs: a score for each token, and a query."""
    return (tokens + 31) // 16 * 16 + LARGEST_HEAD


@contextlib.contextmanager
def own_heads(emit: Emitter, args: Arguments):
    """The heads that a thread takes one by one, and its own memory for their scores and query."""
    thread = emit(f"atomicrmw add ptr {args.next_thread}, i64 1 monotonic")
    score_floats = emit.op("and", emit.op("add", args.tokens, 31), -16)
    own_floats = emit.op("add", score_floats, LARGEST_HEAD)
    scores = emit.at("float", args.scratch, emit.op("mul", thread, own_floats))
    with emit.tasks(args) as (first, last), emit.loop(last, 1, first) as head:
        yield head.index, scores, emit.at("float", scores, score_floats)


def attend(emit: Emitter, variant: Variant, args: Arguments, head: str, query: list[str], scores: str) -> None:
    total = softmax(emit, args, score_keys(emit, variant, args, head, query, scores))
    mix_values(emit, variant, args, head, scores, total)


def score_keys(emit: Emitter, variant: Variant, args: Arguments, head: str, query: list[str], scores: str) -> str:
    """scores[t] = query . key[t] / sqrt(head size), plus the mask of its sequence if there is one."""
    size, keys = variant.head_size, head_start(emit, args, "key", head)
    factor = float_constant(size**-0.5)
    mask = emit.at("float", args.mask, emit.op("mul", emit.op("udiv", head, args.heads), args.tokens))
    with emit.loop(args.tokens) as token:
        key = emit.at(variant.x, keys, emit.op("mul", token.index, size))
        prefetch(emit, emit.at("i8", key, PREFETCH_BYTES), size * TYPE_BYTES[variant.x])
        sums = ["zeroinitializer", "zeroinitializer"]
        for v, vector in enumerate(head_vectors(emit, variant, key)):
            sums[v % 2] = multiply_add(emit, variant, vector, query[v], sums[v % 2])
        score = emit.op("fmul", sum_of_lanes(emit, emit.op("fadd", *sums, F32X16)), factor, "float")
        if variant.masked:
            score = emit.op("fadd", score, emit.load("float", emit.at("float", mask, token.index)), "float")
        emit.store("float", score, emit.at("float", scores, token.index))
    return scores


def softmax(emit: Emitter, args: Arguments, scores: str) -> str:
    """scores[t] = exp(scores[t] - the largest); returns their sum, by which they are not divided."""
    lowest = splat(emit, float_constant(float("-inf")))
    emit.store(F32X16, lowest, emit.at("float", scores, args.tokens))  # vectors may end behind the last token
    stop = emit.op("lshr", emit.op("add", args.tokens, 15), 4)
    with emit.loop(stop, carried=[(F32X16, lowest)]) as step:
        vector = emit.load(F32X16, emit.at(F32X16, scores, step.index), 64)
        step.update = [larger(emit, vector, step.values[0])]
    largest = splat(emit, emit(f"call float @llvm.vector.reduce.fmax.v16f32({F32X16} {step.update[0]})"))
    with emit.loop(stop, carried=[(F32X16, "zeroinitializer")]) as step:
        place = emit.at(F32X16, scores, step.index)
        weights = exponential(emit, emit.op("fsub", emit.load(F32X16, place, 64), largest, F32X16))
        emit.store(F32X16, weights, place, 64)
        step.update = [emit.op("fadd", step.values[0], weights, F32X16)]
    return sum_of_lanes(emit, step.update[0])


def mix_values(emit: Emitter, variant: Variant, args: Arguments, head: str, weights: str, total: str) -> None:
    """y[head] = sum over t of weights[t] * value[t], divided by `total`."""
    size, values = variant.head_size, head_start(emit, args, "value", head)
    in_float32 = variant._replace(isa="avx512")  # no pairs of tokens to multiply
    with emit.loop(args.tokens, carried=[(F32X16, "zeroinitializer")] * (size // 16)) as token:
        value = emit.at(variant.x, values, emit.op("mul", token.index, size))
        prefetch(emit, emit.at("i8", value, PREFETCH_BYTES), size * TYPE_BYTES[variant.x])
        weight = splat(emit, emit.load("float", emit.at("float", weights, token.index)))
        vectors = head_vectors(emit, in_float32, value)
        token.update = [emit.fma(vector, weight, total) for vector, total in zip(vectors, token.values)]
    y = emit.at(variant.x, args.y, emit.op("mul", head, size))
    for v, vector in enumerate(token.update):
        mean = emit.op("fdiv", vector, splat(emit, total), F32X16)
        emit.store(f"<16 x {variant.x}>", narrow(emit, variant.x, mean), emit.at(variant.x, y, v * 16))


def head_start(emit: Emitter, args: Arguments, name: str, head: str) -> str:
    """Where the tokens of a head of the keys, or the values, begin; heads count through all sequences."""
    batch_stride, head_stride = (getattr(args, f"{name}_{part}_stride") for part in ("batch", "head"))
    batch = emit.op("mul", emit.op("udiv", head, args.heads), batch_stride)
    within = emit.op("mul", emit.op("urem", head, args.heads), head_stride)
    return emit.at("i8", getattr(args, name), emit.op("add", batch, within))


def head_vectors(emit: Emitter, variant: Variant, pointer: str) -> list[str]:
    """One query, key or value as vectors of `variant.vector`."""
    if variant.dots_bf16:
        return [emit.load(BF16X32, emit.at("i8", pointer, 2 * start)) for start in range(0, variant.head_size, 32)]
    parts = [emit.at(variant.x, pointer, start) for start in range(0, variant.head_size, 16)]
    return [emit.widen(variant.x, emit.load(f"<16 x {variant.x}>", part)) for part in parts]


def rotate(emit, variant: Variant, args: Arguments, x: str, bias: str, start: int, angles: str, target: str) -> None:
    """target = x[start: start + head size] + bias, rotated: for each row of positions a part of two halves."""
    part = variant.head_size // variant.position_rows
    half = part // 2
    lanes = math.gcd(half, 16)
    for r in range(variant.position_rows):
        for offset in range(0, half, lanes):
            cos, sin = (
                emit.widen(
                    variant.x,
                    emit.load(
                        f"<{lanes} x {variant.x}>",
                        emit.at(variant.x, table, emit.op("add", angles, r * half + offset)),
                    ),
                    lanes,
                )
                for table in (args.cos, args.sin)
            )
            first, second = r * part + offset, r * part + half + offset
            a, b = (biased(emit, variant, x, bias, start + place, lanes) for place in (first, second))
            kind = f"<{lanes} x float>"
            rotated_a = emit.op("fsub", emit.op("fmul", a, cos, kind), emit.op("fmul", b, sin, kind), kind)
            rotated_b = emit.op("fadd", emit.op("fmul", b, cos, kind), emit.op("fmul", a, sin, kind), kind)
            for place, value in ((first, rotated_a), (second, rotated_b)):
                value = narrow(emit, variant.x, value, lanes)
                emit.store(f"<{lanes} x {variant.x}>", value, emit.at(variant.x, target, place))


def biased(emit: Emitter, variant: Variant, x: str, bias: str, start, lanes: int) -> str:
    """x[start: start + lanes] float32 plus the bias there."""
    values = emit.load(f"<{lanes} x float>", emit.at("float", x, start))
    added = emit.load(f"<{lanes} x {variant.bias}>", emit.at(variant.bias, bias, start))
    return emit.op("fadd", values, emit.widen(variant.bias, added, lanes), f"<{lanes} x float>")


# ------------------------------------------------------------------------- what stands between the products of a block


def residual_norm(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[m] = LayerNorm(factor * residual[m] + x[m] + bias) * gamma + beta, of `rows` rows.

    x is float32, y and the residual have the type of the activations, gamma and beta the type `scale`."""
    thread = emit(f"atomicrmw add ptr {args.next_thread}, i64 1 monotonic")
    columns = emit.op("mul", args.chunks, CHUNK)
    own = emit.at("float", args.scratch, emit.op("mul", thread, columns))
    count = splat(emit, emit(f"uitofp i64 {columns} to float"))
    factor, epsilon = splat(emit, float_word(emit, args.factor)), splat(emit, float_word(emit, args.epsilon))
    with emit.tasks(args) as (first, last), emit.loop(last, 1, first) as row:
        start = emit.op("mul", row.index, columns)
        x, residual, y = (
            emit.at("float", args.x, start),
            *(emit.at(variant.x, p, start) for p in (args.residual, args.y)),
        )
        with emit.loop(columns, 16, carried=[(F32X16, "zeroinitializer")]) as step:
            old = load_float32(emit, variant.x, residual, step.index)
            value = emit.fma(old, factor, biased(emit, variant, x, args.bias, step.index, 16))
            emit.store(F32X16, value, emit.at("float", own, step.index), 64)
            step.update = [emit.op("fadd", step.values[0], value, F32X16)]
        mean = emit.op("fdiv", splat(emit, sum_of_lanes(emit, step.update[0])), count, F32X16)
        with emit.loop(columns, 16, carried=[(F32X16, "zeroinitializer")]) as step:
            value = emit.op("fsub", emit.load(F32X16, emit.at("float", own, step.index), 64), mean, F32X16)
            step.update = [emit.fma(value, value, step.values[0])]
        variance = emit.op("fdiv", splat(emit, sum_of_lanes(emit, step.update[0])), count, F32X16)
        deviation = emit.call(F32X16, "sqrt.v16f32", f"{F32X16} {emit.op('fadd', variance, epsilon, F32X16)}")
        with emit.loop(columns, 16) as step:
            value = emit.op("fsub", emit.load(F32X16, emit.at("float", own, step.index), 64), mean, F32X16)
            value = emit.op("fdiv", value, deviation, F32X16)
            gamma, beta = (load_float32(emit, variant.scale, p, step.index) for p in (args.gamma, args.beta))
            value = narrow(emit, variant.x, emit.fma(value, gamma, beta))
            emit.store(f"<16 x {variant.x}>", value, emit.at(variant.x, y, step.index))


def gelu(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y = gelu(x + bias) in its tanh form, by `rows` chunks; `chunks` of them make a row, after which the bias starts
    again. v / 2 * (1 + tanh(u)) is v - v / (exp(2 u) + 1)."""
    constant = lambda value: splat(emit, float_constant(value))  # noqa: E731
    with emit.tasks(args) as (first, last), emit.loop(last, 1, first) as chunk:
        start = emit.op("mul", chunk.index, CHUNK)
        bias = emit.op("mul", emit.op("urem", chunk.index, args.chunks), CHUNK)
        x, y = emit.at(variant.scale, args.x, start), emit.at(variant.x, args.y, start)
        for offset in range(0, CHUNK, 16):
            value = load_float32(emit, variant.scale, x, offset)
            if variant.bias:
                added = load_float32(emit, variant.bias, args.bias, emit.op("add", bias, offset))
                value = emit.op("fadd", value, added, F32X16)
            square = emit.op("fmul", value, value, F32X16)
            cubic = emit.fma(square, constant(2 * 0.044715 * 0.7978845608028654), constant(2 * 0.7978845608028654))
            power = smaller(emit, emit.op("fmul", value, cubic, F32X16), constant(80.0))
            divisor = emit.op("fadd", exponential(emit, power), constant(1.0), F32X16)
            value = emit.op("fsub", value, emit.op("fdiv", value, divisor, F32X16), F32X16)
            emit.store(f"<16 x {variant.x}>", narrow(emit, variant.x, value), emit.at(variant.x, y, offset))


def exponential(emit: Emitter, x: str) -> str:
    """exp of 16 float32 up to 88, to 2 units in the last place; zero below -87. As Cephes' expf: 2**n * exp(r)."""
    constant = lambda value: splat(emit, float_constant(value))  # noqa: E731
    power = emit.op("fmul", x, constant(1.4426950408889634), F32X16)
    power = smaller(
        emit,
        larger(emit, emit.call(F32X16, "roundeven.v16f32", f"{F32X16} {power}"), constant(-127.0)),
        constant(127.0),
    )
    r = emit.fma(power, constant(-0.693359375), x)
    r = emit.fma(power, constant(2.12194440e-4), r)
    total = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        total = emit.fma(total, r, constant(coefficient))
    total = emit.fma(emit.fma(total, r, constant(1.0)), r, constant(1.0))
    bits = emit.op("add", emit(f"fptosi {F32X16} {power} to {I32X16}"), vector_of("i32", [127] * 16), I32X16)
    scale = emit(f"bitcast {I32X16} {emit.op('shl', bits, vector_of('i32', [23] * 16), I32X16)} to {F32X16}")
    tiny = emit(f"fcmp olt {F32X16} {x}, {constant(-87.0)}")
    return emit(f"select <16 x i1> {tiny}, {F32X16} zeroinitializer, {F32X16} {emit.op('fmul', total, scale, F32X16)}")


def larger(emit: Emitter, a: str, b: str) -> str:
    """The larger lanes; b where a is NaN."""
    return emit(f"select <16 x i1> {emit(f'fcmp ogt {F32X16} {a}, {b}')}, {F32X16} {a}, {F32X16} {b}")


def smaller(emit: Emitter, a: str, b: str) -> str:
    """The smaller lanes; a where a is NaN."""
    return emit(f"select <16 x i1> {emit(f'fcmp ogt {F32X16} {a}, {b}')}, {F32X16} {b}, {F32X16} {a}")


def sum_of_lanes(emit: Emitter, vector: str) -> str:
    return emit(f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, {F32X16} {vector})")


def load_float32(emit: Emitter, kind: str, pointer: str, index) -> str:
    return emit.widen(kind, emit.load(f"<16 x {kind}>", emit.at(kind, pointer, index)))


def float_constant(value: float) -> str:
    """IR wants a float32 written as the float64 that it equals."""
    value = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def float_word(emit: Emitter, word: str) -> str:
    """The float32 in the lower half of a 64-bit argument."""
    return emit(f"bitcast i32 {emit(f'trunc i64 {word} to i32')} to float")


# ---------------------------------------------------------------------------------------------- kernels in a row


def program(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """Runs `rows` other kernels, each behind the one before on all threads: `weight` lists the address of each and of
    its arguments, `barrier` is the function in which the threads of a team wait for each other."""
    with emit.loop(args.rows) as step:
        entry = emit.at("{ ptr, ptr }", args.weight, step.index)
        kernel, arguments = emit.load("ptr", entry), emit.load("ptr", emit.at("ptr", entry, 1))
        emit.do(f"  call void {kernel}(ptr {arguments})", f"  call void {args.barrier}()")


KERNELS = {
    "gemv": gemv,
    "gemm": gemm,
    "quantize_panels": quantize_panels,
    "dequantize": dequantize_rows,
    "attention": attention,
    "rotary_attention": rotary_attention,
    "residual_norm": residual_norm,
    "gelu": gelu,
    "program": program,
}
