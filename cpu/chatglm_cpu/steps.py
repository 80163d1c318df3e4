"""The LLVM IR of a decode step beside its products, as text: attention of one new token, norms, GELU, and the program
that runs kernels one behind the other."""

from __future__ import annotations

import contextlib
import math

from .ir import (
    BF16X32,
    CHUNK,
    F32X16,
    I32X16,
    LARGEST_HEAD,
    PREFETCH_BYTES,
    TYPE_BYTES,
    Arguments,
    Emitter,
    Variant,
    float_constant,
    float_word,
    larger,
    load_float32,
    multiply_add,
    narrow,
    prefetch,
    smaller,
    splat,
    sum_of_lanes,
    vector_of,
)

NAP = 50  # microseconds

# -------------------------------------------------------------------------------------------- attention of one token


def attention(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[head] = softmax(x[head] @ keys.T / sqrt(head size) + mask) @ values, with `rows` heads of all sequences."""
    with own_heads(emit, args) as (head, scores, _):
        query = head_vectors(emit, variant, emit.at(variant.x, args.x, emit.op("mul", head, variant.head_size)))
        attend(emit, variant, args, head, query, scores, args.tokens)


def rotary_attention(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """`attention` of the fused projection x [B, heads, 3, head size] float32 + bias. Query and key are rotated; key
    and value are stored behind the others of their sequence, whose `lengths` counts them already."""
    size = variant.head_size
    with own_heads(emit, args) as (head, scores, query):
        sequence, within = emit.op("udiv", head, args.heads), emit.op("urem", head, args.heads)
        x = emit.at("float", args.x, emit.op("mul", head, 3 * size))
        bias = emit.at(variant.bias, args.bias, emit.op("mul", within, 3 * size))
        angles = emit.op("mul", sequence, size // 2)
        tokens = emit.load("i64", emit.at("i64", args.lengths, sequence))
        new = emit.op("mul", emit.op("sub", tokens, 1), size)
        key, value = (emit.at(variant.x, head_start(emit, args, name, head), new) for name in ("key", "value"))
        for part, target in enumerate((query, key)):
            rotate(emit, variant, args, x, bias, part * size, angles, target)
        for start in range(0, size, 16):
            states = biased(emit, variant, x, bias, 2 * size + start, 16)
            emit.store(f"<16 x {variant.x}>", narrow(emit, variant.x, states), emit.at(variant.x, value, start))
        attend(emit, variant, args, head, head_vectors(emit, variant, query), scores, tokens)


def attention_scratch(tokens: int) -> int:
    """float32 words that each thread of an attention needs: a score for each token, and a query."""
    return (tokens + 31) // 16 * 16 + LARGEST_HEAD


@contextlib.contextmanager
def own_heads(emit: Emitter, args: Arguments):
    """The heads that a thread takes one by one, and its own memory for their scores and query."""
    score_floats = emit.op("and", emit.op("add", args.tokens, 31), -16)
    own_floats = emit.op("add", score_floats, LARGEST_HEAD)
    scores = emit.at("float", args.scratch, emit.op("mul", args.thread, own_floats))
    with emit.tasks(args) as (first, last), emit.loop(last, 1, first) as head:
        yield head.index, scores, emit.at("float", scores, score_floats)


def attend(
    emit: Emitter, variant: Variant, args: Arguments, head: str, query: list[str], scores: str, tokens: str
) -> None:
    score_keys(emit, variant, args, head, query, scores, tokens)
    total = softmax(emit, scores, tokens)
    mix_values(emit, variant, args, head, scores, total, tokens)


def score_keys(
    emit: Emitter, variant: Variant, args: Arguments, head: str, query: list[str], scores: str, tokens: str
) -> None:
    """scores[t] = query . key[t] / sqrt(head size), plus the mask of its sequence if there is one."""
    size, keys = variant.head_size, head_start(emit, args, "key", head)
    factor = float_constant(size**-0.5)
    mask = emit.at("float", args.mask, emit.op("mul", emit.op("udiv", head, args.heads), args.tokens))
    with emit.loop(tokens) as token:
        key = emit.at(variant.x, keys, emit.op("mul", token.index, size))
        prefetch(emit, emit.at("i8", key, PREFETCH_BYTES), size * TYPE_BYTES[variant.x])
        sums = ["zeroinitializer", "zeroinitializer"]
        for v, vector in enumerate(head_vectors(emit, variant, key)):
            sums[v % 2] = multiply_add(emit, variant, vector, query[v], sums[v % 2])
        score = emit.op("fmul", sum_of_lanes(emit, emit.op("fadd", *sums, F32X16)), factor, "float")
        if variant.masked:
            score = emit.op("fadd", score, emit.load("float", emit.at("float", mask, token.index)), "float")
        emit.store("float", score, emit.at("float", scores, token.index))


def softmax(emit: Emitter, scores: str, tokens: str) -> str:
    """scores[t] = exp(scores[t] - the largest); returns their sum, by which they are not divided."""
    lowest = splat(emit, float_constant(float("-inf")))
    emit.store(F32X16, lowest, emit.at("float", scores, tokens))  # vectors may end behind the last token
    stop = emit.op("lshr", emit.op("add", tokens, 15), 4)
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


def mix_values(
    emit: Emitter, variant: Variant, args: Arguments, head: str, weights: str, total: str, tokens: str
) -> None:
    """y[head] = sum over t of weights[t] * value[t], divided by `total`."""
    size, values = variant.head_size, head_start(emit, args, "value", head)
    in_float32 = variant._replace(isa="avx512")  # no pairs of tokens to multiply
    with emit.loop(tokens, carried=[(F32X16, "zeroinitializer")] * (size // 16)) as token:
        value = emit.at(variant.x, values, emit.op("mul", token.index, size))
        prefetch(emit, emit.at("i8", value, PREFETCH_BYTES), size * TYPE_BYTES[variant.x])
        weight = splat(emit, emit.load("float", emit.at("float", weights, token.index)))
        vectors = head_vectors(emit, in_float32, value)
        token.update = [emit.fma(vector, weight, old) for vector, old in zip(vectors, token.values)]
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


# ----------------------------------------------------------------------- what stands between the products of a block


def residual_norm(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """y[m] = LayerNorm(factor * residual[m] + x[m] + bias) * gamma + beta, of `rows` rows.

    x is float32, y and the residual have the type of the activations, gamma and beta the type `scale`."""
    columns = emit.op("mul", args.chunks, CHUNK)
    own = emit.at("float", args.scratch, emit.op("mul", args.thread, columns))
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


# -------------------------------------------------------------------------------------------------- kernels in a row


def program(emit: Emitter, variant: Variant, args: Arguments) -> None:
    """Runs `rows` other kernels, each when all tasks of the one before are done: `weight` lists the address of each
    and of its arguments. A thread that comes late, since its core does something else, is not waited for: it finds
    nothing left to do in the kernels that it missed."""
    with emit.loop(args.rows) as step:
        entry = emit.at("{ ptr, ptr }", args.weight, step.index)
        kernel, arguments = emit.load("ptr", entry), emit.load("ptr", emit.at("ptr", entry, 1))
        of_kernel = Arguments(emit, arguments)
        taken = emit(f"load atomic i64, ptr {of_kernel.next_task} monotonic, align 8")
        first = emit.op("mul", taken, of_kernel.task_rows)
        with emit.when(emit(f"icmp ult i64 {first}, {of_kernel.rows}")):
            emit.do(f"  call void {kernel}(ptr {arguments}, i64 {args.thread})")
        wait(emit, args, of_kernel)


def wait(emit: Emitter, args: Arguments, of_kernel: Arguments) -> None:
    """Until all tasks of a kernel are done: on the core for `patience` of its cycles, then in naps, which leave it to
    the thread that is waited for."""
    tasks = emit.op("add", of_kernel.rows, emit.op("sub", of_kernel.task_rows, 1))
    tasks = emit.op("udiv", tasks, of_kernel.task_rows)
    end = emit.op("add", emit("call i64 @llvm.readcyclecounter()"), args.patience)
    label = emit.fresh()
    emit.do(f"  br label %{label}", f"{label}:")
    done = emit(f"load atomic i64, ptr {of_kernel.tasks_done} acquire, align 8")
    emit.do(
        f"  br i1 {emit(f'icmp uge i64 {done}, {tasks}')}, label %{label}.end, label %{label}.wait", f"{label}.wait:"
    )
    is_late = emit(f"icmp ugt i64 {emit('call i64 @llvm.readcyclecounter()')}, {end}")
    emit.do(f"  br i1 {is_late}, label %{label}.nap, label %{label}.spin", f"{label}.nap:")
    emit(f"call i32 {args.nap}(i32 {NAP})")
    emit.do(f"  br label %{label}", f"{label}.spin:", "  call void @llvm.x86.sse2.pause()")
    emit.do(f"  br label %{label}", f"{label}.end:")
    emit.block = f"{label}.end"


STEPS = {
    "attention": attention,
    "rotary_attention": rotary_attention,
    "residual_norm": residual_norm,
    "gelu": gelu,
    "program": program,
}
