"""The small kernels of a decode program against float64, and the program itself, from tensors alone."""

from __future__ import annotations

import pytest
import torch
from chatglm_cpu import instruction_set, program, runtime
from chatglm_cpu.ir import Variant
from chatglm_cpu.kernels import tried_gelu
from chatglm_cpu.runtime import kernel_ir

pytestmark = pytest.mark.skipif(
    not instruction_set() or runtime.nap_function() is None,
    reason="needs llvmlite, a CPU with AVX2 and FMA, and usleep",
)
TYPES = ("float", "bfloat", "half")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("parameters", TYPES)
def test_small_kernels_equal_float64(isa, name, parameters):
    norm = Variant("residual_norm", isa, 16, 0, "", parameters, name, bias=parameters)
    gelu = Variant("gelu", isa, 16, 0, "", parameters, name)
    attention = Variant("rotary_attention", isa, 16, 0, "", "", name, head_size=32, position_rows=2, bias=parameters)
    cases = [(norm, program.tried_norm), (gelu, tried_gelu), (gelu._replace(bias=name), tried_gelu)]
    for size, rows in ((32, 1), (32, 2), (96, 2), (128, 2), (256, 2)):
        cases.append((attention._replace(head_size=size, position_rows=rows), program.tried_rotary_attention))
    for variant, trial in cases:
        kernel = runtime._compile(variant)
        y, exact, bound = trial(variant, kernel[0])
        assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("change", [("fadd", "fsub"), ("fmul", "fadd"), ("fsub", "fadd"), ("fdiv", "fmul")])
@pytest.mark.parametrize("kind", ["residual_norm", "gelu", "rotary_attention"])
def test_trials_find_a_wrong_instruction_wherever_it_is(kind, change, monkeypatch):
    trial = {"residual_norm": program.tried_norm, "gelu": tried_gelu}
    trial = trial.get(kind, program.tried_rotary_attention)
    sizes = {"head_size": 32, "position_rows": 2} if kind == "rotary_attention" else {}
    variant = Variant(kind, instruction_set(), 16, 0, "", "float", "float", bias="float", **sizes)
    text = kernel_ir(variant)
    places = [place for place in range(len(text)) if text.startswith(f"= {change[0]} ", place)]
    assert places or (kind, change[0]) == ("residual_norm", "fmul")  # it multiplies and adds at once
    missed = 0
    for place in places:
        wrong = text[:place] + text[place:].replace(change[0], change[1], 1)
        monkeypatch.setattr(runtime, "kernel_ir", lambda variant, wrong=wrong: wrong)
        kernel = runtime._compile(variant)
        y, exact, bound = trial(variant, kernel[0])
        missed += bool(((y - exact).abs() <= bound).all())
    assert not missed, f"{missed} of {len(places)}"


@torch.no_grad()
def test_a_step_from_tensors_alone_equals_float64_and_keeps_their_memory():
    heads, size, width, inner, tokens = 4, 32, 128, 256, 9
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    def product(rows, columns):
        return program.Product(random(rows, columns, scale=columns**-0.5).half(), random(rows).half(), None, 16)

    def norm():
        return program.Norm(1 + random(width, scale=0.1).half(), random(width).half(), 1e-5)

    layer = program.Layer(
        *(2.0, norm(), product(3 * width, width), product(width, width), norm()),
        *(product(inner, width), product(width, inner)),
    )
    final_norm = norm()
    values = [layer.factor, *(value for part in layer[1:] for value in part), *final_norm]
    network = program.Network(heads, size, values)
    hidden, states = random(1, width).half(), [tuple(random(2, 1, heads, tokens, size).half())]
    angles = random(1, 2, size // 4)
    cos, sin = angles.cos().half().flatten(1), angles.sin().half().flatten(1)
    owner = torch.nn.Module()
    step = program.decode_program(owner, network, 1, torch.float16, 2)
    y = step.run(hidden, cos, sin, states)

    def linear(p, x):
        return x @ p.weight.double().T + p.bias.double()

    def normed(n, x):
        return torch.nn.functional.layer_norm(x, (width,), n.weight.double(), n.bias.double(), n.epsilon)

    a = normed(layer.norm, hidden.double())
    query, key, value = linear(layer.query_key_value, a).view(heads, 3, size).unbind(1)
    c, s = (table.double().view(2, size // 4) for table in (cos, sin))

    def rotated(x):
        p, q = x.view(heads, 2, 2, size // 4).unbind(2)
        return torch.stack((p * c - q * s, q * c + p * s), dim=2).view(heads, size)

    keys = torch.cat((states[0][0][0, :, :-1].double(), rotated(key)[:, None]), dim=1)
    values = torch.cat((states[0][1][0, :, :-1].double(), value[:, None]), dim=1)
    weights = (rotated(query)[:, None] @ keys.mT / size**0.5).softmax(-1)
    b = normed(layer.norm_after, 2 * a + linear(layer.dense, (weights @ values).view(1, width)))
    up = torch.nn.functional.gelu(linear(layer.up, b), approximate="tanh")
    exact = normed(final_norm, 2 * b + linear(layer.down, up))
    # A norm divides by the deviation of what is about 2 a; some twenty roundings of 2**-11 stand between.
    assert ((y.double() - exact).abs() <= 20 * 2.0**-11 * exact.abs().amax()).all() and exact.abs().max() > 1
    with pytest.raises(ValueError, match="keys and values of 1 layers"):
        step.run(hidden, cos, sin, [(states[0][0], states[0][1][:, :, :3])])
    assert program.decode_program(owner, network._replace(heads=3), 1, torch.float16, 2) is None


def small_network(heads=4, size=32, inner=256):
    """Of one layer; values, and what a step takes besides: hidden, cos, sin, states."""
    generator, width = torch.Generator().manual_seed(1), heads * size

    def random(*shape):
        return torch.randn(*shape, generator=generator).half()

    def product(rows, columns):
        return random(rows, columns) * columns**-0.5, random(rows), None, 16

    norms = [(1 + random(width) / 10, random(width), 1e-5) for _ in range(3)]
    layer = (2.0, *norms[0], *product(3 * width, width), *product(width, width), *norms[1])
    values = [*layer, *product(inner, width), *product(width, inner), *norms[2]]
    arguments = (random(1, width), random(1, size // 2), random(1, size // 2), [tuple(random(2, 1, heads, 9, size))])
    return program.Network(heads, size, values), arguments


@torch.no_grad()
def test_a_thread_that_never_comes_is_not_waited_for_and_one_that_comes_late_changes_nothing(monkeypatch):
    network, arguments = small_network()
    expected = program.decode_program(torch.nn.Module(), network, 1, torch.float16, 2).run(*arguments)
    calls = []

    def alone(address, words, threads):
        kernel = runtime._FUNCTION(address)
        for _ in range(threads):  # one behind the other: what waits for others would wait for ever
            kernel(words)
        calls.append(threads)

    monkeypatch.setattr(program, "launch", alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    y = program.decode_program(torch.nn.Module(), network, 1, torch.float16, 2).run(*arguments)
    assert calls == [3] and torch.equal(y, expected)


@torch.no_grad()
@pytest.mark.parametrize("threads", [2, 16])
def test_threads_that_have_to_nap_give_the_same_bits(monkeypatch, threads):
    network, arguments = small_network()
    expected = program.decode_program(torch.nn.Module(), network, 1, torch.float16, 2).run(*arguments)
    before = torch.get_num_threads()
    monkeypatch.setattr(program, "PATIENCE", 0)
    torch.set_num_threads(threads)
    try:
        step = program.decode_program(torch.nn.Module(), network, 1, torch.float16, 2)
        assert all(torch.equal(step.run(*arguments), expected) for _ in range(5))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_ends_beyond_the_keys_are_refused():
    network, arguments = small_network()
    step = program.decode_program(torch.nn.Module(), network, 1, torch.float16, 2)
    for ends in ([9], [-1], [1, 2]):
        with pytest.raises(ValueError, match="a place below 9 for each of 1 sequences"):
            step.run(*arguments, torch.tensor(ends))
