"""The small kernels of a decode program against float64, and the program itself, from tensors alone."""

import pytest
from chatglm_cpu import instruction_set, program, runtime
from chatglm_cpu.ir import Variant
from chatglm_cpu.kernels import tried_gelu
from chatglm_cpu.runtime import kernel_ir

pytestmark = pytest.mark.skipif(
    not instruction_set() or runtime.openmp_function("GOMP_barrier") is None,
    reason="needs llvmlite, a CPU with AVX2 and FMA, and GNU's OpenMP",
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
