"""The LLVM IR of products with INT4, INT8 and 16-bit weights, as text.

They walk the weight by tiles of a few rows and chunks of 128 columns; a group of columns with a scale of its own never
crosses a chunk. For few rows of activations a gemv widens the weights in registers; for many a gemm unpacks a block of
them into the cache once and multiplies it with all rows.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from .ir import (
    BF16X32,
    BLOCK_ROWS,
    CHUNK,
    F32X16,
    I16X32,
    I32X16,
    INT8_BYTES,
    INT8_COLUMNS,
    NIBBLES,
    PANEL,
    Arguments,
    Emitter,
    Variant,
    float_constant,
    multiply_add,
    narrow,
    prefetch,
    splat,
    sum_of_lanes,
    vector_of,
)

# -------------------------------------------------------------------------------------------------- widening weights


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
    size = variant.chunk_bytes // (4 if variant.dots_bf16 else 8)
    parts = [emit.at("i8", pointer, offset) for offset in range(0, variant.chunk_bytes, size)]
    if variant.bits == 8:
        return [_pair_of_int8(emit, part) if variant.dots_bf16 else _floats_of_int8(emit, part) for part in parts]
    if variant.dots_bf16:
        return [emit.load(BF16X32, part) for part in parts]
    return [emit.widen(variant.weight, emit.load(f"<16 x {variant.weight}>", part)) for part in parts]


def _floats_of_int8(emit: Emitter, pointer: str) -> str:
    return emit(f"sitofp <16 x i8> {emit.load('<16 x i8>', pointer)} to {F32X16}")


def _pair_of_int8(emit: Emitter, pointer: str) -> str:
    """By the instruction that rounds two vectors of float32; an fptrunc becomes three, in the way of the dots."""
    low, high = (_floats_of_int8(emit, emit.at("i8", pointer, offset)) for offset in (0, 16))
    return emit.call(BF16X32, "x86.avx512bf16.cvtne2ps2bf16.512", f"{F32X16} {high}", f"{F32X16} {low}")


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


# ------------------------------------------------------------------------------------------- few rows of activations


def gemv(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[M, N] = x[M, K] @ (scale * weight[N, K]).T for a few M.

    Reads BLOCK_ROWS rows of the weight, by slabs of columns whose activations stay in the first-level cache; where M
    takes several passes, the later ones find these weights in the second-level cache. The own memory of a thread holds
    x [M, K] and the sums [BLOCK_ROWS, M] of 16 lanes."""
    x_columns = emit.op("mul", args.chunks, CHUNK)
    x_values = emit.op("mul", x_columns, variant.rows)
    own_floats = emit.op("add", x_values, BLOCK_ROWS * variant.rows * 16)
    sums = emit.at("float", args.scratch, emit.op("mul", args.thread, own_floats))
    own_x = emit.at(F32X16, sums, BLOCK_ROWS * variant.rows)
    copy_x(emit, variant, args, own_x)
    with emit.tasks(args) as (first, last), emit.loop(last, BLOCK_ROWS, first) as block:
        stop = emit.minimum(emit.op("add", block.index, BLOCK_ROWS), last)
        slab_chunks = variant.slab_columns // CHUNK
        with emit.loop(args.chunks, slab_chunks) as slab:
            slab_stop = emit.minimum(emit.op("add", slab.index, slab_chunks), args.chunks)
            for x_rows in variant.passes:
                with emit.loop(stop, variant.tile, block.index) as row:
                    local = emit.op("mul", emit.op("sub", row.index, block.index), variant.rows)
                    tile_sums = emit.at(F32X16, sums, local)
                    add_tile(emit, variant, args, own_x, tile_sums, row.index, slab.index, slab_stop, x_rows)
        with emit.loop(stop, 1, block.index) as row:
            local = emit.op("mul", emit.op("sub", row.index, block.index), variant.rows)
            store_row(emit, variant, args, emit.at(F32X16, sums, local), row.index)


def copy_x(emit: Emitter, variant: Variant, args: Arguments, own_x: str) -> None:
    """Each thread copies x to its own memory, in the kernel's type and order of columns, for each pass as
    [chunks, rows, CHUNK]: whole rows would lie multiples of 4 KiB apart, which contend for the same few places of the
    first-level cache."""
    order = [column for vector in columns(variant) for column in vector]
    with emit.loop(args.chunks) as chunk:
        for x_rows in variant.passes:
            start = pass_start(emit, variant, args, own_x, x_rows, chunk.index)
            with emit.loop(str(len(x_rows))) as row:
                line = emit.op("mul", emit.op("add", row.index, x_rows[0]), args.chunks)
                place = emit.op("mul", emit.op("add", line, chunk.index), CHUNK)
                x = emit.load(f"<{CHUNK} x {variant.x}>", emit.at(variant.x, args.x, place))
                x = x if variant.x == variant.lane else emit.widen(variant.x, x, CHUNK)
                x = emit.shuffle(f"<{CHUNK} x {variant.lane}>", x, order)
                target = emit.at(variant.lane, start, emit.op("mul", row.index, CHUNK))
                emit.store(f"<{CHUNK} x {variant.lane}>", x, target, 64)


def pass_start(emit: Emitter, variant: Variant, args: Arguments, own_x: str, x_rows: range, chunk: str) -> str:
    """Where the rows of one chunk and pass begin."""
    before = emit.op("add", emit.op("mul", args.chunks, x_rows[0]), emit.op("mul", chunk, len(x_rows)))
    return emit.at(variant.lane, own_x, emit.op("mul", before, CHUNK))


def add_tile(
    emit, variant: Variant, args: Arguments, own_x: str, tile_sums: str, row: str, start: str, stop: str, x_rows: range
) -> None:
    """Adds the chunks from `start` to `stop` of the rows of a tile, times `x_rows`, to their sums, in several chains:
    a single chain of additions would wait for its own results."""
    chains = variant.chains
    keys = [(t, m, c) for t in range(variant.tile) for m in range(len(x_rows)) for c in range(chains)]
    row_bytes = emit.op("mul", args.chunks, variant.chunk_bytes)
    first = emit.at("i8", args.weight, emit.op("mul", row, row_bytes))
    rows = [emit.at("i8", first, emit.op("mul", row_bytes, t)) for t in range(variant.tile)]
    next_tile = emit.op("mul", row_bytes, variant.tile)
    ahead = emit.op("mul", next_tile, variant.tiles_ahead)
    with emit.loop(stop, 1, start, [(F32X16, "zeroinitializer")] * len(keys)) as chunk:
        sums = dict(zip(keys, chunk.values))
        here = [emit.at("i8", pointer, emit.op("mul", chunk.index, variant.chunk_bytes)) for pointer in rows]
        for pointer in here:
            if x_rows[0] == 0:
                prefetch(emit, emit.at("i8", pointer, ahead), variant.chunk_bytes, variant.prefetch)
            if variant.asks_twice:
                prefetch(emit, emit.at("i8", pointer, next_tile), variant.chunk_bytes)
        weights = [widened(emit, variant, pointer) for pointer in here]
        x_first = pass_start(emit, variant, args, own_x, x_rows, chunk.index)
        xs = [emit.at(variant.lane, x_first, CHUNK * m) for m in range(len(x_rows))]
        if variant.group:
            scales = [chunk_scales(emit, variant, args, emit.op("add", row, t), chunk.index) for t in range(len(rows))]
            add_grouped(emit, variant, sums, weights, xs, scales)
        else:
            for v in range(len(weights[0])):
                add_products(emit, variant, sums, v, weights, xs, chain=v % chains)
        chunk.update = [sums[key] for key in keys]
    is_first = emit(f"icmp eq i64 {start}, 0")
    for t, m, _ in keys[::chains]:
        place = emit.at(F32X16, tile_sums, t * variant.rows + x_rows[m])
        total = emit(f"select i1 {is_first}, {F32X16} zeroinitializer, {F32X16} {emit.load(F32X16, place, 64)}")
        for c in range(chains):
            total = emit.op("fadd", total, sums[t, m, c], F32X16)
        emit.store(F32X16, total, place, 64)


def add_products(emit: Emitter, variant: Variant, sums: dict, v: int, weights: list, xs: list, chain: int = 0) -> None:
    """sums[t, m, chain] += weights[t][v] * xs[m][v]."""
    kind, lanes = variant.vector, 32 if variant.dots_bf16 else 16
    for m, x in enumerate(xs):
        x_vector = emit.load(kind, emit.at(variant.lane, x, v * lanes), 64)
        for t, row in enumerate(weights):
            sums[t, m, chain] = multiply_add(emit, variant, row[v], x_vector, sums[t, m, chain])


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
            for m in range(len(xs)):
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


# ----------------------------------------------------------------------------------------- weights in full precision


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


# --------------------------------------------------------------------------------------------------- matrix products


def gemm(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[M, N] = x[M, K] @ (scale * weight[N, K]).T for many M.

    x comes as panels of 16 rows, transposed so that a vector holds one column of all 16 (bfloat16: a pair of columns).
    A thread unpacks a block of the weight once, then multiplies each of its values with whole panels; the sums of its
    BLOCK_ROWS rows stay in its own memory until all columns are done."""
    sum_floats = emit.op("mul", args.panels, PANEL * BLOCK_ROWS)
    own_floats = emit.op("add", sum_floats, BLOCK_ROWS * variant.block_columns * variant.lane_bytes // 4)
    sums = emit.at("float", args.scratch, emit.op("mul", args.thread, own_floats))
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


# -------------------------------------------------------------------------------------------------- int8 activations


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


# ---------------------------------------------------------------------------------------------- for measurements


def flush(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """Takes `rows` lines of 64 bytes out of all caches."""
    with emit.tasks(args) as (first, last), emit.loop(last, 1, first) as line:
        pointer = emit.at("i8", args.weight, emit.op("mul", line.index, 64))
        emit.do(f"  call void @llvm.x86.sse2.clflush(ptr {pointer})")


PRODUCTS = {
    "gemv": gemv,
    "gemm": gemm,
    "dequantize": dequantize_rows,
    "quantize_panels": quantize_panels,
    "flush": flush,
}
