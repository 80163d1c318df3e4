"""The CPU kernels against float64, on every instruction set this machine can run, and what they refuse."""

from __future__ import annotations

import doctest
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from chatglm_cpu import dequantize, instruction_set, kernels, linear, routes, runtime
from chatglm_cpu.ir import PASS_ROWS, Variant
from chatglm_cpu.kernels import decode_attention
from chatglm_cpu.runtime import kernel_ir

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

needs_kernels = pytest.mark.skipif(not instruction_set(), reason="needs llvmlite and a CPU with AVX2 and FMA")


@pytest.fixture
def no_llvmlite(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    monkeypatch.setattr(runtime, "_machine", {})
    monkeypatch.setattr(runtime, "_compiled", {})


def make_weight(rows, columns, bits, group=0, dtype=torch.float16, seed=0):
    """(weight, scale, both multiplied in float64), with the lowest integers and a row of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 16:
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        return weight, None, weight.double()
    low = -(1 << bits - 1)
    values = torch.randint(low, -low, (rows, columns), generator=generator)
    values[0, :3], values[-1] = low, 0
    weight = values.to(torch.int8)
    if bits == 4:
        weight = ((values[:, ::2] << 4) | (values[:, 1::2] & 15)).to(torch.int8)
    groups = columns // group if group else 1
    scale = torch.rand(rows, groups, generator=generator).mul(0.02).add(1e-3).to(dtype)
    exact = values.double() * scale.double().repeat_interleave(columns // groups, 1)
    return weight, scale if group else scale[:, 0].contiguous(), exact


def make_x(rows, columns, dtype):
    """Activations with outliers, as a language model has them."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[:, ::97] *= 30
    return x.to(dtype)


def assert_close(y, x, exact, extra=0.0):
    """Sums in float32 of exact products, rounded once to the type of y; `extra` as a share of the sum of sizes."""
    assert y is not None and y.dtype == x.dtype and y.shape == (len(x), len(exact)) and y.is_contiguous()
    expected, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    bound = ROUNDING[x.dtype] * expected.abs() + (2e-6 + extra) * size
    assert ((y - expected).abs() <= bound).all()


@needs_kernels
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 32), (4, 128), (8, 0), (8, 64), (16, 0)])
def test_linear_sums_exact_products_in_float32(isa, x_dtype, bits, group):
    rows, columns = 68, 640  # a block and a bit of rows, five chunks of columns
    dtype = torch.float16 if x_dtype == torch.float32 else x_dtype
    weight, scale, exact = make_weight(rows, columns, bits, group, dtype)
    rounded = isa == "avx512_bf16" and x_dtype == torch.bfloat16 and group
    for few in (1, 3, 6, 11, 16):  # a gemv, in one pass and in several, which may differ in their rows
        x = make_x(few, columns, x_dtype)
        assert_close(linear(x, weight, scale, bits), x, exact)
    for many in (17, 33):  # a matrix product, which rounds weights with group scales to bfloat16
        x = make_x(many, columns, x_dtype)
        y = linear(x, weight, scale, bits)
        if bits == 16 and x_dtype == torch.bfloat16 and isa == "avx512_bf16":
            assert y is None  # left to torch, whose own product is as fast
        else:
            assert_close(y, x, exact, extra=2.0**-9 if rounded else 0)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 4, 8, 9, 13, 16])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_gemv_over_several_blocks_of_one_task(isa, bits, rows):
    weight, scale, exact = make_weight(2052, 1152, bits, dtype=torch.bfloat16)
    for lanes in ("f32", "bf16"):
        for x_dtype in (torch.float32, torch.bfloat16):
            x = make_x(rows, 1152, x_dtype)
            y = kernels.gemv(x, weight, scale, bits, None, routes.dots(lanes, "l2"))
            assert_close(y, x, exact, extra=1152 / 16 * 2.0**-24)  # roundings of a lane's sum, in a single chain


@pytest.mark.parametrize("name", list(PASS_ROWS))
def test_passes_are_even_and_leave_no_row_out(name):
    for rows in range(1, kernels.GEMV_ROWS + 1):
        passes = Variant("gemv", name, 8, 0, "", "float", "float", rows).passes
        assert [m for x_rows in passes for m in x_rows] == list(range(rows))
        sizes = sorted(map(len, passes))
        assert sizes[-1] - sizes[0] <= 1 and sizes[-1] <= PASS_ROWS[name]


@needs_kernels
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_a_bias_is_added_before_the_rounding(x_dtype, bias_dtype):
    weight, scale, exact = make_weight(68, 256, 8)
    bias = None if bias_dtype is None else torch.linspace(-3, 3, 68).to(bias_dtype)
    for rows in (1, 6, 20):
        x = make_x(rows, 256, x_dtype)
        y, expected = linear(x, weight, scale, 8, bias), x.double() @ exact.T
        expected = expected if bias is None else expected + bias.double()
        bound = ROUNDING[x_dtype] * expected.abs() + 3e-6 * (x.double().abs() @ exact.abs().T)
        assert ((y - expected).abs() <= bound).all()


needs_vnni = pytest.mark.skipif(instruction_set() != "avx512_bf16", reason="needs a CPU with AVX-512 VNNI and BF16")


@needs_vnni
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "shape"), [(17, (64, 128)), (33, (132, 2304)), (300, (68, 640))], ids=str)
def test_int8_activations_give_the_exact_product_of_what_they_were_rounded_to(x_dtype, bits, rows, shape):
    weight, scale, exact = make_weight(*shape, bits)
    x = make_x(rows, shape[1], x_dtype)
    x[3] = 0
    values, scales = kernels.activations_as_int8(x, bits)
    assert values.abs().max() == 127 and (values == values.round()).all()
    y = linear(x, weight, scale, bits, None, True)
    assert y.dtype == x_dtype
    rounded = values.double() * scales.double()
    expected, size = rounded @ exact.T, rounded.abs() @ exact.abs().T
    assert ((y - expected).abs() <= ROUNDING[x_dtype] * expected.abs() + 2e-6 * size).all()
    step = scales.double() / 2  # half of it is the most that an activation moves
    assert ((rounded - x.double()).abs() <= step * 1.0001).all()


@needs_vnni
def test_int8_activations_lose_a_hundredth_on_outliers_and_serve_many_rows_only():
    weight, scale, exact = make_weight(256, 1024, 8)
    x = make_x(64, 1024, torch.bfloat16)
    expected = x.double() @ exact.T
    error = (linear(x, weight, scale, 8, None, True) - expected).norm() / expected.norm()
    # That of the format: half a step at most, evenly spread, which is 1 / sqrt(12) of it in the mean. The products of
    # 65,536 such errors are that within a hundredth, and the rounding to bfloat16 adds another in squares.
    steps = kernels.activations_as_int8(x, 8)[1].double()
    told = (steps.square().sum() / 12 / x.double().square().sum()).sqrt()
    assert 0.005 < told < 0.015 and 0.95 * told < error < 1.05 * told
    assert torch.equal(linear(x[:4], weight, scale, 8, None, True), linear(x[:4], weight, scale, 8))
    grouped = torch.ones(256, 8, dtype=torch.bfloat16)
    assert torch.equal(linear(x, weight, grouped, 8, None, True), linear(x, weight, grouped, 8))


@needs_vnni
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 17, 127])
def test_int8_activations_keep_nan_and_infinity_visible_in_their_row(value, column):
    weight, scale, _ = make_weight(64, 128, 8)
    weight[:, column] = 1
    x = make_x(20, 128, torch.float32)
    x[5, column] = value
    y = linear(x, weight, scale, 8, None, True)
    assert not y[5].isfinite().any() and y[:5].isfinite().all() and y[6:].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_may_have_any_type(scale_dtype, bits):
    weight, scale, exact = make_weight(64, 256, bits, 64, scale_dtype)
    x = make_x(2, 256, torch.float32)
    assert_close(linear(x, weight, scale, bits), x, exact)


@needs_kernels
def test_bfloat16_activations_meet_float16_weights_and_the_other_way_round():
    for weight_dtype, x_dtype in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        weight, _, exact = make_weight(64, 256, 16, dtype=weight_dtype)
        for rows in (1, 20):
            x = make_x(rows, 256, x_dtype)
            assert_close(linear(x, weight, None, 16), x, exact)


@needs_kernels
@pytest.mark.parametrize("rows", [4, 60, 64, 132, 1000])
def test_any_multiple_of_four_rows_of_the_weight(rows):
    weight, scale, exact = make_weight(rows, 128, 4)
    for few_or_many in (1, 24):
        x = make_x(few_or_many, 128, torch.bfloat16)
        assert_close(linear(x, weight, scale, 4), x, exact)


@needs_kernels
@pytest.mark.parametrize("columns", [128, 384, 1152, 4096])
def test_any_multiple_of_128_columns(isa, columns):
    weight, scale, exact = make_weight(64, columns, 8)
    for rows in (4, 40):
        x = make_x(rows, columns, torch.bfloat16)
        assert_close(linear(x, weight, scale, 8), x, exact)


@needs_kernels
def test_long_prompts_go_in_slabs(monkeypatch):
    monkeypatch.setattr(kernels, "SLAB_ROWS", 32)
    weight, scale, exact = make_weight(64, 128, 8)
    x = make_x(75, 128, torch.float32)
    assert_close(linear(x, weight, scale, 8), x, exact)


@needs_kernels
def test_one_and_more_threads_give_the_same_bits():
    weight, scale, _ = make_weight(512, 1024, 4)
    before = torch.get_num_threads()
    try:
        for rows in (1, 30):
            x, results = make_x(rows, 1024, torch.bfloat16), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(linear(x, weight, scale, 4))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 32), (8, 0), (8, 128), (16, 0)])
def test_dequantize_equals_plain_torch_bit_for_bit(isa, dtype, bits, group):
    for scale_dtype in DTYPES if bits < 16 else (torch.float16, torch.bfloat16):
        weight, scale, exact = make_weight(36, 384, bits, group, scale_dtype)
        if scale is not None:
            scale[1] = 0
            scale[2] = 65504 if scale_dtype == torch.float16 else 1e38  # overflows some results to infinity
            scale[3] = 6e-8 if scale_dtype == torch.float16 else 1e-40  # subnormal
            repeated = scale if not group else scale.repeat_interleave(group, 1)
            integers = make_weight(36, 384, bits, group, torch.float32)
            integers = (integers[2] / integers[1].double().view(36, -1).repeat_interleave(group or 384, 1)).round()
            expected = integers.float() * repeated.float().view(36, -1)
        else:
            expected = exact.float()
        assert torch.equal(dequantize(weight, scale, bits, dtype), expected.to(dtype))


@needs_kernels
def test_dequantize_keeps_infinities_and_nans_of_16_bit_weights(isa):
    weight = torch.randn(4, 128).half()
    weight[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    for dtype in DTYPES:
        torch.testing.assert_close(
            dequantize(weight, None, 16, dtype), weight.to(dtype), rtol=0, atol=0, equal_nan=True
        )


@needs_kernels
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 20])
def test_infinite_and_nan_activations_stay_visible_in_their_row_only(isa, x_dtype, rows):
    weight, scale, _ = make_weight(64, 128, 4)
    x = make_x(rows, 128, x_dtype)
    healthy = linear(x, weight, scale, 4)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    y = linear(x, weight, scale, 4)
    assert y[0, :-1].isnan().all() and not y[1].isfinite()[:-1].all()
    assert torch.equal(y[2:], healthy[2:])


@needs_kernels
def test_a_row_of_zeros_gives_zeros():
    weight, scale, _ = make_weight(64, 128, 8)
    scale[-1] = 0
    assert not linear(make_x(1, 128, torch.bfloat16), weight, scale, 8)[:, -1].any()


def refusals():
    weight, scale, _ = make_weight(64, 256, 8)
    x = make_x(2, 256, torch.float32)
    half, _, _ = make_weight(64, 256, 16)
    return {
        "rows not a multiple of 4": (x, weight[:62], scale[:62], 8),
        "columns not a multiple of 128": (x[:, :192].contiguous(), weight[:, :192].contiguous(), scale, 8),
        "x of another width": (x[:, :128].contiguous(), weight, scale, 8),
        "x not contiguous": (make_x(256, 2, torch.float32).t(), weight, scale, 8),
        "weight not contiguous": (x, weight.t().contiguous().t(), scale, 8),
        "x with three dimensions": (x[None], weight, scale, 8),
        "x without rows": (x[:0], weight, scale, 8),
        "x of another type": (x.double(), weight, scale, 8),
        "weight of another type": (x, weight.int(), scale, 8),
        "float32 weight": (x, half.float(), None, 16),
        "no scale": (x, weight, None, 8),
        "a scale for 16 bits": (x, half, scale, 16),
        "groups of 16": (x, weight, torch.ones(64, 16), 8),
        "too few scales": (x, weight, scale[:60], 8),
        "scale of another type": (x, weight, scale.double(), 8),
        "other bits": (x, weight, scale, 2),
        "meta tensors": (x.to("meta"), weight.to("meta"), scale.to("meta"), 8),
    }


@pytest.mark.parametrize("case", list(refusals()))
def test_linear_refuses(case):
    assert linear(*refusals()[case]) is None


@needs_kernels
def test_dequantize_refuses_other_types_of_result():
    weight, scale, _ = make_weight(4, 128, 8)
    assert dequantize(weight, scale, 8, torch.float32) is not None
    assert dequantize(weight, scale, 8, torch.float64) is None


@needs_kernels
@pytest.mark.parametrize(("kind", "rows"), [("gemv", 1), ("gemm", 24)])
def test_a_wrong_kernel_is_replaced_with_one_warning(monkeypatch, kind, rows):
    def wrong(variant):
        text = kernel_ir(variant)
        return text.replace("fmul", "fadd", 1) if variant.kind == kind else text

    monkeypatch.setattr(runtime, "kernel_ir", wrong)
    monkeypatch.setattr(runtime, "_compiled", {})
    weight, scale, _ = make_weight(64, 256, 8)
    x = make_x(rows, 256, torch.bfloat16)
    with pytest.warns(UserWarning, match="differ from plain PyTorch"):
        first = linear(x, weight, scale, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = linear(x, weight, scale, 8)
    assert first is None and second is None


@needs_kernels
def test_text_that_llvm_rejects_is_replaced_with_one_warning(monkeypatch):
    monkeypatch.setattr(runtime, "kernel_ir", lambda variant: "no IR at all")
    monkeypatch.setattr(runtime, "_compiled", {})
    weight, scale, _ = make_weight(64, 256, 4)
    with pytest.warns(UserWarning, match="is not used"):
        assert dequantize(weight, scale, 4, torch.float32) is None


def make_states(batch, heads, tokens, size, dtype):
    """query [B, H, 1, D] as a transposed view; keys and values as views of buffers with room for more tokens."""
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(batch, 1, heads, size, generator=generator).to(dtype).transpose(1, 2)
    buffers = (torch.randn(batch, heads, tokens + 9, size, generator=generator).to(dtype) for _ in range(2))
    return query, *(buffer[:, :, :tokens] for buffer in buffers)


def exact_attention(query, key, value, visible=None):
    scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ value.double()


def assert_attends(context, states, visible=None):
    """Rounded once to its type, and about as near to the truth as PyTorch's in float32."""
    truth, dtype = exact_attention(*states, visible), states[0].dtype
    single = (x.float() for x in states)
    others = torch.nn.functional.scaled_dot_product_attention(*single, attn_mask=visible)
    rounding = 1.5 * (others - truth).abs().max() + 4 * 2.0**-24 * states[2].abs().max()  # scores, exp, sum, quotient
    assert context.dtype == dtype and context.shape == truth.shape
    assert ((context - truth).abs() <= ROUNDING[dtype] * truth.abs() + rounding).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 100, 128), (2, 3, 1, 64), (3, 2, 333, 32), (1, 2, 50, 256)], ids=str)
def test_decode_attention_rounds_only_its_result(isa, dtype, shape):
    query, key, value = make_states(*shape, dtype)
    hidden = torch.zeros(shape[0], 1, 1, shape[2], dtype=torch.bool)
    hidden[-1, ..., : shape[2] // 2] = True
    for visible in (None, ~hidden):
        assert_attends(decode_attention(query, key, value, visible), (query, key, value), visible)


@needs_kernels
def test_decode_attention_never_reads_the_room_behind_the_last_token():
    query, key, value = make_states(1, 2, 5, 64, torch.bfloat16)
    key._base[:, :, 5:], value._base[:, :, 5:] = float("nan"), float("nan")
    assert decode_attention(query, key, value).isfinite().all()


@needs_kernels
def test_decode_attention_refuses_what_it_does_not_serve():
    query, key, value = make_states(1, 2, 5, 64, torch.float32)
    assert decode_attention(query, key, value) is not None
    assert decode_attention(query.expand(1, 2, 2, 64), key, value) is None  # two new tokens
    assert decode_attention(query, key.transpose(2, 3).contiguous().transpose(2, 3), value) is None  # tokens apart
    assert decode_attention(query[..., :40], key[..., :40], value[..., :40]) is None
    assert decode_attention(query, key.bfloat16(), value) is None
    assert decode_attention(query, key[:, :1], value[:, :1]) is None
    assert decode_attention(query.double(), key.double(), value.double()) is None
    assert decode_attention(query.requires_grad_(), key, value) is None
    with torch.no_grad():
        assert decode_attention(query, key, value) is not None


def test_without_llvmlite_everything_is_left_to_the_caller_with_one_warning(no_llvmlite):
    with pytest.warns(UserWarning, match="pip install .*llvmlite") as warned:
        assert instruction_set() == "" == instruction_set()
    assert len(warned) == 1
    weight, scale, _ = make_weight(64, 256, 8)
    grouped, scales, _ = make_weight(64, 256, 8, group=32)
    assert linear(make_x(64, 256, torch.float32), weight, scale, 8) is None
    assert linear(make_x(1, 256, torch.float32), grouped, scales, 8) is None
    assert linear(make_x(1, 256, torch.float32), make_weight(64, 256, 16)[0], None, 16) is None
    assert dequantize(weight, scale, 8, torch.float32) is None
    assert decode_attention(*make_states(1, 2, 5, 64, torch.bfloat16)) is None


@needs_kernels
def test_a_cpu_without_fused_multiply_add_is_not_served(monkeypatch):
    import llvmlite.binding

    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: {"avx2": True, "f16c": True, "fma": False})
    monkeypatch.setattr(runtime, "_machine", {})
    assert instruction_set() == ""


@needs_kernels
def test_an_llvmlite_that_is_too_old_is_named(monkeypatch):
    import llvmlite.binding

    def reject(text):
        raise RuntimeError("ptr type is only supported in -opaque-pointers mode")

    monkeypatch.setattr(llvmlite.binding, "parse_assembly", reject)
    monkeypatch.setattr(runtime, "_machine", {})
    with pytest.warns(UserWarning, match="llvmlite>=0.45"):
        assert instruction_set() == ""


@needs_kernels
def test_threads_that_arrive_together_compile_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(runtime, "_compiled", {})
    original = runtime._compile
    monkeypatch.setattr(runtime, "_compile", lambda variant: compiled.append(variant) or original(variant))
    weight, scale, exact = make_weight(64, 256, 8)
    x, results = make_x(1, 256, torch.float32), []
    threads = [threading.Thread(target=lambda: results.append(linear(x, weight, scale, 8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1 and len(results) == 4
    for y in results:
        assert_close(y, x, exact)


@needs_kernels
def test_compiling_leaves_the_callers_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(runtime, "_compiled", {})
    weight, scale, _ = make_weight(64, 128, 8)
    state = torch.get_rng_state()
    linear(make_x(20, 128, torch.float32), weight, scale, 8)
    assert torch.equal(torch.get_rng_state(), state)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
def test_without_openmp_pythons_threads_do_the_work(monkeypatch, threads):
    monkeypatch.setitem(runtime._machine, "GOMP_parallel", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, scale, exact = make_weight(512, 256, 4)
    for rows in (1, 20):
        x = make_x(rows, 256, torch.bfloat16)
        assert_close(linear(x, weight, scale, 4), x, exact)


@needs_kernels
def test_defaults_of_torch_do_not_reach_the_kernels(monkeypatch):
    monkeypatch.setattr(runtime, "_compiled", {})
    weight, scale, exact = make_weight(64, 128, 8)
    few, many, states = (
        make_x(1, 128, torch.bfloat16),
        make_x(30, 128, torch.bfloat16),
        make_states(1, 2, 5, 64, DTYPES[0]),
    )
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("error")
            results = [linear(few, weight, scale, 8), linear(many, weight, scale, 8)]
            context, dense = decode_attention(*states), dequantize(weight, scale, 8, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(results[0], few, exact)
    assert_close(results[1], many, exact)
    assert_attends(context, states)
    assert torch.equal(dense.double(), exact)  # 8 bits times 11 bits fit into float32


@needs_kernels
def test_activations_that_want_gradients_are_only_read():
    weight, scale, exact = make_weight(64, 128, 8)
    for rows in (1, 20):
        x = make_x(rows, 128, torch.bfloat16).requires_grad_()
        y = linear(x, weight, scale, 8)
        assert not y.requires_grad
        assert_close(y, x.detach(), exact)


@needs_kernels
def test_the_examples_in_the_docstrings_hold():
    results = doctest.testmod(routes)
    assert results.attempted and not results.failed


def test_kernels_for_avx2_call_no_instruction_of_avx512():
    for kind in ("gemv", "gemm", "dequantize"):
        for x in ("float", "bfloat", "half"):
            assert "avx512" not in kernel_ir(Variant(kind, "avx2", 4, 32, "", "half", x, 2, 2))


def test_importing_compiles_and_looks_up_nothing():
    code = (
        "import sys, types\n"
        "package = sys.modules['p'] = types.ModuleType('p')\n"
        "package.__path__ = [sys.argv[1]]\n"
        "from p import program, kernels, runtime\n"
        "assert 'llvmlite' not in sys.modules and not runtime._machine and not runtime._compiled"
    )
    root = kernels.__file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", code, root], check=True, timeout=600)
