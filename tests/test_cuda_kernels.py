"""The CUDA kernels, proven without a GPU: compiled by NVRTC, and run on the CPU behind an emulated driver.

Everything goes the way it goes on a GPU: NVRTC makes a cubin, cpm_kernels' bindings of the (emulated) driver load and
launch it. Only then the emulation runs the same source, compiled by g++.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import glob
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chatglm_slim import cuda_kernels, quantization
from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_slim.quantization import dequantize_weight
from cuda_emulation import build, checks, mutants, nvrtc_table, seam
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

needs_nvrtc = pytest.mark.skipif(
    not nvrtc_table.wheels(), reason="NVRTC is missing: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvrtc"
)
needs_compilers = pytest.mark.skipif(
    not (build.COMPILER and nvrtc_table.wheels()),
    reason="g++ or NVRTC is missing: apt install g++; pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvrtc",
)
FLOATS = checks.FLOATS
COMPILE = cuda_kernels._compile


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The emulated GPU is one thread, and tensors here are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory) -> Path:
    """The emulated driver, as a CUDA toolkit for $CUDA_PATH."""
    logging.getLogger("cpm_kernels.library.base").setLevel(logging.ERROR)  # it lists what the emulation leaves out
    folder = tmp_path_factory.mktemp("cuda")
    build.build(cuda_kernels.SOURCE, folder)
    return folder


CUBINS: dict[tuple[int, int], bytes] = {}


def compiled_once(nvrtc, capability) -> bytes:
    """_compile, once for all tests; those of _compile itself use `compiling`."""
    if capability not in CUBINS:
        CUBINS[capability] = COMPILE(nvrtc, capability)
    return CUBINS[capability]


@pytest.fixture
def compiling(emulated, monkeypatch):
    """The true _compile, with nothing compiled yet."""
    monkeypatch.setattr(cuda_kernels, "_compile", COMPILE)
    COMPILE.cache_clear()


@pytest.fixture
def emulated(toolkit, monkeypatch) -> ctypes.CDLL:
    """Two emulated GPUs in front of an unused seam; the driver itself, to ask what was launched."""
    library = toolkit / "lib64" / "libcuda.so"
    driver = ctypes.CDLL(str(library))
    driver.emulatedLastKernel.restype = ctypes.c_char_p
    driver.emulatedLastStream.restype = ctypes.c_void_p
    monkeypatch.setenv("CUDA_PATH", str(toolkit))
    monkeypatch.setenv("EMULATED_DEVICES", "2")
    for name, value in seam.emulated(library).items():
        monkeypatch.setattr(cuda_kernels, name, value)
    monkeypatch.setattr(cuda_kernels, "_compile", compiled_once)
    cuda_kernels._cpm_kernels.cache_clear()
    cuda_kernels._warn_once.cache_clear()
    return driver


@pytest.fixture
def unchecked(emulated, monkeypatch):
    """For devices cuda:0 and cuda:1: launches on them can be emulated, tensors on them cannot."""
    monkeypatch.setattr(cuda_kernels, "_check", lambda kernels, device: None)


@pytest.fixture(scope="module")
def ready():
    """Kernels that are loaded once for all tests of numbers."""
    return {}


@pytest.fixture
def kernels(emulated, ready, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_loaded", ready)
    return cuda_kernels._kernels_for(torch.zeros(1))


# ---- compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.once
@needs_nvrtc
def test_every_target_compiles_without_spills_and_with_at_most_128_registers():
    results = list(nvrtc_table.compile_all(cuda_kernels.SOURCE))
    print("\n" + nvrtc_table.table(results))
    for result in results:
        assert set(result.registers) == set(build.kernel_names())
        assert not any(result.spilled.values()), f"NVRTC {result.nvrtc} spills on {result.target}: {result.spilled}"
        assert max(result.registers.values()) <= 128
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90"} <= {result.target for result in results}


@needs_nvrtc
@pytest.mark.parametrize("path", nvrtc_table.wheels(), ids=lambda path: path.name)
def test_the_ptx_computes_what_the_emulation_has_in_its_place(path):
    """ptxas folds a conversion of a constant, so that the cubin holds its result; LOP3 it leaves, with its table."""
    halves = torch.tensor([0x3555, 0x0001, 0x03FF, 0x7BFF, 0x7C00], dtype=torch.int16)
    floats = torch.tensor([0.1, 65519.0, 65520.0, 1.5 * 2.0**-25, 1 + 2.0**-11, 1 + 3 * 2.0**-11])
    mark = 0xABC0 << 16  # so that a result of 16 bits is found by 32
    cases = [
        (f"__float_as_uint(halfBitsToFloat({bits}))", value)
        for bits, value in zip(halves.tolist(), halves.view(torch.float16).float().view(torch.int32).tolist())
    ] + [
        (f"{mark}u + floatToHalfBits(__uint_as_float({bits}u))", mark + value)
        for bits, value in zip(floats.view(torch.int32).tolist(), floats.half().view(torch.int16).tolist())
    ]
    functions = cuda_kernels.SOURCE.split("__device__ __forceinline__ float load(")[0]
    kernels = [f'extern "C" __global__ void f{i}(unsigned *o) {{ *o = {code}; }}' for i, (code, _) in enumerate(cases)]
    cubin, _ = nvrtc_table.Nvrtc(path).compile("\n".join([functions, *kernels]), "sm_80")
    for code, value in cases:
        assert value.to_bytes(4, "little") in cubin, code
    table = int(re.search(r'asm\("lop3.b32 %0, %1, %2, %3, (0x\w+);"', functions).group(1), 16)
    assert table == (0xF0 & 0xCC) | 0xAA  # of (a & mask) | b, as the PTX manual defines such tables


# ---- numbers --------------------------------------------------------------------------------------------------------


@needs_compilers
@pytest.mark.parametrize("bits", [8, 4])
def test_compression_reproduces_the_golden_figures(kernels, golden, bits):
    figures = load_file(golden / "quantization.safetensors")
    cases = sorted({name.split(".")[0] for name in figures if name.endswith(".w")})
    assert len(cases) >= 4
    for case in cases:
        packed, scale = cuda_kernels.quantize(figures[f"{case}.w"], bits)
        assert torch.equal(packed, figures[f"{case}.int{bits}.weight"]), case
        assert torch.equal(scale, figures[f"{case}.int{bits}.scale"]), case


@needs_compilers
@pytest.mark.parametrize("bits", [8, 4])
def test_extraction_reproduces_the_golden_figures(kernels, golden, bits):
    figures = load_file(golden / "quantization.safetensors")
    widths = {name.split(".")[0]: weight.shape[1] for name, weight in figures.items() if name.endswith(".w")}
    cases = sorted(case for case, width in widths.items() if width % 8 == 0)
    assert len(cases) >= 4
    for case in cases:
        weight, scale = figures[f"{case}.int{bits}.weight"], figures[f"{case}.int{bits}.scale"]
        for dtype, name in ((torch.float16, "dequant_half"), (torch.float32, "dequant_float")):
            out = cuda_kernels.dequantize(weight.clone(), scale, bits, dtype)
            assert checks.same_bits(out, figures[f"{case}.int{bits}.{name}"]), case


@needs_compilers
@pytest.mark.parametrize("at_end", [True, False], ids=["guarded-end", "guarded-start"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_compression_equals_pytorch_bit_for_bit_on_odd_shapes_and_odd_numbers(kernels, bits, dtype, at_end):
    generator = torch.Generator().manual_seed(3)
    checks.check_quantize(kernels, checks.edge_weights(dtype), bits, at_end)
    for rows, columns in ((1, 2), (5, 6), (3, 258), (2, 1030), (1, 4096)):
        checks.check_quantize(kernels, torch.randn(rows, columns, generator=generator).to(dtype), bits, at_end)
    if bits == 8:
        checks.check_quantize(kernels, torch.randn(3, 257, generator=generator).to(dtype), bits, at_end)


@needs_compilers
@pytest.mark.parametrize("at_end", [True, False], ids=["guarded-end", "guarded-start"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_extraction_equals_pytorch_bit_for_bit_for_every_scale_type_and_group(kernels, bits, dtype, at_end):
    for scale_dtype in FLOATS:
        for rows, columns, groups in ((1, 8, 1), (3, 72, 1), (2, 264, 1), (3, 256, 8), (2, 256, 2), (1, 4096, 32)):
            checks.check_dequantize(kernels, rows, columns, bits, groups, scale_dtype, dtype, at_end)


@needs_compilers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_stay_within_the_bound_for_every_number_of_rows(kernels, bits, dtype):
    for m in range(1, cuda_kernels.FUSED_ROWS + 1):
        for rows, columns in ((1, 32), (17, 33 * checks.CHUNK[bits])):
            checks.check_linear(kernels, m, rows, columns, bits, 1, dtype, dtype, at_end=m % 2 == 0)


@needs_compilers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_stay_within_the_bound_with_group_scales_of_every_type(kernels, bits, dtype):
    for scale_dtype in FLOATS:
        for group in (32, 64, 128):
            for m in (1, 5):
                checks.check_linear(kernels, m, 10, 640, bits, 640 // group, scale_dtype, dtype)


@needs_compilers
@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_of_the_full_width_stays_within_the_bound(kernels, bits):
    checks.check_linear(kernels, 1, 12, 16384, bits, 1, torch.float16, torch.float16)


@needs_compilers
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 80),
    groups=st.sampled_from([1, 2, 4]),
    m=st.integers(1, cuda_kernels.FUSED_ROWS),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(FLOATS),
    scale_dtype=st.sampled_from(FLOATS),
    at_end=st.booleans(),
)
def test_any_shape_is_right_to_its_last_row_and_column(
    kernels, rows, width, groups, m, bits, dtype, scale_dtype, at_end
):
    checks.check_quantize(kernels, torch.randn(rows, 2 * width).to(dtype), bits, at_end)
    checks.check_dequantize(kernels, rows, 8 * width, bits, 1, scale_dtype, dtype, at_end)
    columns = 128 * groups if groups > 1 else width * checks.CHUNK[bits]
    checks.check_dequantize(kernels, rows, columns, bits, groups, scale_dtype, dtype, at_end)
    checks.check_linear(kernels, m, rows, columns, bits, groups, scale_dtype, dtype, at_end)


@needs_compilers
def test_no_result_depends_on_the_order_of_the_threads(kernels, monkeypatch):
    products = []
    for seed in range(5):
        monkeypatch.setenv("EMULATED_SEED", str(seed))
        checks.check_everything(kernels)
        products.append(checks.check_linear(kernels, 5, 9, 1056, 4, 1, torch.float32, torch.float32))
    assert all(checks.same_bits(product, products[0]) for product in products)


@pytest.mark.once
@needs_compilers
def test_the_checks_catch_every_broken_kernel():
    script = Path(mutants.__file__)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=1200)
    print("\n" + result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\n") == 1 + len(mutants.MUTANTS)


# ---- what quantization.py calls -------------------------------------------------------------------------------------


@needs_compilers
@pytest.mark.parametrize("bits", [8, 4])
def test_few_rows_are_fused_and_many_are_multiplied_with_the_dequantized_matrix(kernels, emulated, bits):
    weight, scale = checks.random_weight(24, 96, bits, 1, torch.float32)
    matrix = dequantize_weight(weight, scale, bits, torch.float32)
    for shape, kernel in (
        ((1, 96), f"linear{bits}_float_1"),
        ((2, 96), f"linear{bits}_float_4"),
        ((8, 96), f"linear{bits}_float_4"),
        ((2, 4, 96), f"dequantize{bits}_float"),  # rows are the caller's to lay out
        ((9, 96), f"dequantize{bits}_float"),
        ((3, 7, 96), f"dequantize{bits}_float"),
    ):
        x = torch.randn(shape)
        for bias in (None, torch.randn(24), torch.randn(24).half(), torch.randn(24, 2)[:, 0]):
            y = cuda_kernels.linear(x, weight, scale, bits, bias)
            assert emulated.emulatedLastKernel().decode() == kernel
            torch.testing.assert_close(y, F.linear(x, matrix, bias if bias is None else bias.float()))


@needs_compilers
@pytest.mark.parametrize("bits", [8, 4])
def test_widths_that_no_load_of_a_lane_divides_go_through_the_dequantized_matrix(kernels, emulated, bits):
    weight, scale = checks.random_weight(5, 72, bits, 1, torch.float32)
    x = torch.randn(1, 72)
    y = cuda_kernels.linear(x, weight, scale, bits)
    assert emulated.emulatedLastKernel().decode() == f"dequantize{bits}_float"
    torch.testing.assert_close(y, F.linear(x, dequantize_weight(weight, scale, bits, torch.float32)))


@needs_compilers
def test_activations_that_are_not_contiguous_or_not_aligned_give_the_same_product(kernels):
    weight, scale = checks.random_weight(8, 64, 8, 1, torch.float16)
    x = torch.randn(64, 3).half()
    expected = cuda_kernels.linear(x.T.contiguous(), weight, scale, 8)
    unaligned = torch.empty(3 * 64 + 1, dtype=torch.float16)[1:].view(3, 64).copy_(x.T)
    for other in (x.T, unaligned):  # both go through the dequantized matrix
        torch.testing.assert_close(cuda_kernels.linear(other, weight, scale, 8), expected, rtol=4e-3, atol=4e-3)


@needs_compilers
def test_a_batch_without_rows_launches_nothing(kernels, emulated):
    weight, scale = checks.random_weight(8, 64, 8, 1, torch.float16)
    launches = emulated.emulatedLaunchCount()
    assert cuda_kernels.linear(torch.empty(0, 64).half(), weight, scale, 8).shape == (0, 8)
    assert emulated.emulatedLaunchCount() == launches


@needs_compilers
def test_layouts_that_only_pytorch_serves_give_none(kernels):
    weight, scale = checks.random_weight(8, 96, 8, 1, torch.float16)
    x = torch.randn(1, 96).half()
    assert cuda_kernels.linear(x, weight.T.contiguous().T, scale, 8) is None
    assert cuda_kernels.linear(x, torch.zeros(8 * 96 + 1, dtype=torch.int8)[1:].view(8, 96), scale, 8) is None
    assert cuda_kernels.linear(x, weight, torch.ones(8, 4).half(), 8) is None  # groups of 24
    assert cuda_kernels.linear(x[:, :92], weight[:, :92].contiguous(), scale, 8) is None  # not a multiple of 8
    assert cuda_kernels.linear(x.double(), weight, scale, 8) is None
    assert cuda_kernels.linear(x, weight, scale.double(), 8) is None
    assert cuda_kernels.dequantize(weight, scale, 8, torch.float64) is None
    assert cuda_kernels.quantize(torch.randn(2, 4).double(), 8) is None


@needs_compilers
def test_where_a_gradient_is_wanted_pytorch_computes(kernels):
    weight, scale = checks.random_weight(8, 64, 8, 1, torch.float32)
    x = torch.randn(1, 64, requires_grad=True)
    assert cuda_kernels.linear(x, weight, scale, 8) is None
    with torch.no_grad():
        assert cuda_kernels.linear(x, weight, scale, 8) is not None


@needs_compilers
def test_shapes_that_do_not_fit_are_refused_by_name(kernels):
    weight, scale = checks.random_weight(8, 64, 8, 1, torch.float32)
    with pytest.raises(ValueError, match="x has 32 columns, the 8-bit weight 64"):
        cuda_kernels.linear(torch.randn(1, 32), weight, scale, 8)
    with pytest.raises(ValueError, match=r"scales \(7,\) do not fit a weight of 8 rows"):
        cuda_kernels.linear(torch.randn(1, 64), weight, scale[:7], 8)
    with pytest.raises(ValueError, match="columns in torch.float32"):
        cuda_kernels.dequantize(weight.float(), scale, 8, torch.float16)


@needs_compilers
@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_what_is_compressed_and_extracted_is_the_weight_within_a_rounding_step(kernels, bits, largest):
    weight = torch.randn(6, 128).half()
    packed, scale = cuda_kernels.quantize(weight, bits)
    error = (cuda_kernels.dequantize(packed, scale, bits, torch.float32) - weight.float()).abs()
    step = weight.float().abs().amax(dim=1, keepdim=True) / largest
    assert bool((error <= 0.6 * step).all())  # half a step, and float16 in the scale and in the quotient


@pytest.fixture
def seam_on_cpu(kernels, no_kernels):
    """The seam of kernel_routes.py sends tensors of the CPU, too, to the kernels."""

    def linear(x, weight, scale, bits, bias=None, int8_activations=False):
        return None if bits == 16 else cuda_kernels.linear(x, weight, scale, bits, bias)

    no_kernels.linear, no_kernels.dequantize = linear, cuda_kernels.dequantize


@needs_compilers
@pytest.mark.parametrize("bits", [8, 4])
def test_the_golden_quantized_model_gives_its_logits_through_the_kernels(
    seam_on_cpu, emulated, golden, tmp_path, bits
):
    folder = golden / "model" / f"quant{bits}"
    shutil.copy(folder / "config.json", tmp_path)
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval().float()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # aligned, as on a GPU; a mapped file is not
    ids = torch.tensor(json.loads((folder / "cases.json").read_text(encoding="utf-8"))["input_ids"])
    launches = emulated.emulatedLaunchCount()
    with torch.no_grad():
        logits = model(ids).logits
    assert emulated.emulatedLaunchCount() - launches == 4 * model.config.num_layers
    expected = load_file(folder / "tensors.safetensors")["logits_float_from_dequant_half"]
    assert (logits - expected).abs().max() < 0.02  # float32 weights here, rounded to float16 there


@needs_compilers
@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_flow_through_a_quantized_layer_that_uses_the_kernels(seam_on_cpu, emulated, bits):
    layer = quantization.QuantizedLinear.from_linear(torch.nn.Linear(64, 24), bits)
    x, direction = torch.randn(3, 64, requires_grad=True), torch.randn(3, 24)
    (layer(x) * direction).sum().backward()
    assert emulated.emulatedLastKernel().decode() == f"dequantize{bits}_float"
    matrix = dequantize_weight(layer.weight, layer.weight_scale, bits, torch.float32)
    torch.testing.assert_close(x.grad, direction @ matrix)


# ---- loading --------------------------------------------------------------------------------------------------------


def first_use():
    """linear on the first tensors that the seam sees, and the warnings that it gives."""
    weight, scale = checks.random_weight(8, 64, 8, 1, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = cuda_kernels.linear(torch.ones(1, 64), weight, scale, 8)
        again = cuda_kernels.linear(torch.ones(1, 64), weight, scale, 8)
    assert (y is None) == (again is None)
    return y, [str(warning.message) for warning in caught]


def test_importing_the_file_touches_no_cuda():
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("fresh_cuda_kernels", cuda_kernels.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert not {
        name for name in set(sys.modules) - before if name.startswith(("cpm_kernels", "pkg_resources", "nvidia"))
    }
    assert not torch.cuda.is_initialized()


def test_tensors_on_the_cpu_are_left_alone(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_loaded", {})
    y, texts = first_use()
    assert y is None
    assert texts == []
    assert cuda_kernels._loaded == {}


def test_transformers_loads_the_file_where_cpm_kernels_is_absent(monkeypatch):
    from transformers.dynamic_module_utils import check_imports  # it refuses files whose imports are missing

    monkeypatch.setitem(sys.modules, "cpm_kernels", None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("cpm_kernels")
    check_imports(cuda_kernels.__file__)


FIRST_USE = """
import builtins, ctypes.util, importlib, os, sys, threading, time, warnings
sys.path.insert(0, os.environ["TESTS"])
import conftest, torch
from chatglm_slim import cuda_kernels, quantization
from cuda_emulation import seam
from pathlib import Path

for name, value in seam.emulated(Path(os.environ["CUDA_PATH"], "lib64", "libcuda.so")).items():
    setattr(cuda_kernels, name, value)
os.environ.pop("PATH", None)
weight, scale, x = torch.ones(8, 64, dtype=torch.int8), torch.ones(8), torch.ones(1, 64)

def state():
    functions = os.path.exists, os.listdir, ctypes.util.find_library, builtins.__import__, importlib.import_module
    return dict(os.environ), list(sys.modules), functions, list(sys.path), list(sys.meta_path), os.getcwd()

before, seen = state(), set()

def look(event, arguments):
    if looking and event in ("import", "open", "compile", "exec", "glob.glob", "os.listdir", "ctypes.dlopen"):
        seen.add(event)
        if state() != before:
            os.write(2, f"changed at {event}{arguments}".encode())
            os._exit(3)

def watch():
    while looking:
        time.sleep(1e-4)
        if state() != before:
            os._exit(4)

looking = True
sys.addaudithook(look)
sys.setswitchinterval(1e-5)
thread = threading.Thread(target=watch)
thread.start()
warnings.simplefilter("error")
try:
    y = cuda_kernels.linear(x, weight, scale, 8)
finally:
    looking = False
    thread.join()
assert torch.equal(y, torch.full((1, 8), 64.0)), y
assert {"open", "exec", "ctypes.dlopen"} <= seen, seen
assert state() == before
"""


@needs_compilers
def test_nothing_of_the_process_changes_at_the_first_use_nor_meanwhile(toolkit):
    """At every event that Python reports to audit hooks, in a second thread, and afterwards; PATH is unset."""
    environment = {**os.environ, "CUDA_PATH": str(toolkit), "TESTS": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", FIRST_USE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_compilers
def test_cpm_kernels_that_somebody_else_has_imported_is_neither_used_nor_touched(emulated, monkeypatch):
    theirs = SimpleNamespace(__spec__=importlib.util.find_spec("cpm_kernels"))
    monkeypatch.setitem(sys.modules, "cpm_kernels", theirs)
    y, texts = first_use()
    assert y is not None
    assert texts == []
    assert sys.modules["cpm_kernels"] is theirs
    assert vars(theirs).keys() == {"__spec__"}


@needs_compilers
def test_the_check_keeps_what_it_put_on_the_gpu_until_the_launch(emulated, compiling, monkeypatch):
    """On a GPU `.to` makes a copy; freed too early, its memory is the next tensor's."""
    to, described, launch = torch.Tensor.to, [], cuda_kernels._Kernels._launch
    describe = cuda_kernels._describe

    def remember(weight, scale, bits):
        described[:] = weakref.ref(weight), weakref.ref(scale)
        return describe(weight, scale, bits)

    def check_and_launch(kernels, name, *arguments):
        assert all(tensor() is not None for tensor in described)
        launch(kernels, name, *arguments)

    def copied(tensor, *arguments, **options):
        return to(tensor, *arguments, **options).clone()

    kernels = cuda_kernels._load_or_warn(torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(cuda_kernels, "_describe", remember)
    monkeypatch.setattr(cuda_kernels._Kernels, "_launch", check_and_launch)
    cuda_kernels._check(kernels, torch.device("cpu"))
    assert described


@needs_compilers
def test_a_full_gpu_is_said_to_be_full_and_asked_again(emulated, monkeypatch):
    def full(kernels, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cuda_kernels, "_check", full)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            first_use()
    y, texts = first_use()
    assert y is not None
    assert texts == []


@needs_compilers
def test_launches_go_to_the_tensors_device_and_to_its_current_stream(emulated, unchecked):
    for index in (1, 0):
        device = torch.device("cuda", index)
        kernels = cuda_kernels._load_or_warn(device)
        checks.check_linear(kernels, 1, 3, 64, 8, 1, torch.float16, torch.float16)
        assert emulated.emulatedLastDevice() == index
        assert emulated.emulatedLastStream() == seam.STREAM


@needs_compilers
def test_a_runtime_library_of_its_own_does_not_send_cpm_kernels_to_another_gpu(emulated, monkeypatch, unchecked):
    monkeypatch.setattr(
        cuda_kernels.cuda, "device", lambda device: contextlib.nullcontext()
    )  # torch's copy; cpm's stays at 0
    kernels = cuda_kernels._load_or_warn(torch.device("cuda", 1))
    checks.check_linear(kernels, 1, 3, 64, 8, 1, torch.float16, torch.float16)
    assert emulated.emulatedLastDevice() == 1
    emulated.cudaSetDevice(0)


@needs_compilers
def test_the_device_is_set_once_a_thread_and_left_as_it_was_found(emulated, unchecked):
    """A new thread has no context; from its first product on the device is asked for, and not set again."""

    def products():
        before = emulated.emulatedDevicesSet()
        for _ in range(3):
            checks.check_linear(kernels, 1, 3, 64, 8, 1, torch.float16, torch.float16)
        sets.append(emulated.emulatedDevicesSet() - before)

    sets, kernels = [], cuda_kernels._load_or_warn(torch.device("cuda", 0))
    products()
    thread = threading.Thread(target=products)
    thread.start()
    thread.join()
    to_and_back = 3  # by torch, by cpm_kernels, and back by torch
    assert sets == [0, to_and_back]
    elsewhere = cuda_kernels._load_or_warn(torch.device("cuda", 1))
    checks.check_linear(elsewhere, 1, 3, 64, 8, 1, torch.float16, torch.float16)
    device = ctypes.c_int()
    emulated.cudaGetDevice(ctypes.byref(device))
    assert (emulated.emulatedLastDevice(), device.value) == (1, 0)


@needs_compilers
def test_two_gpus_of_a_kind_are_compiled_for_once(compiling, unchecked):
    first, second = (cuda_kernels._load_or_warn(torch.device("cuda", index)) for index in (0, 1))
    assert first is not None
    assert second is not None
    assert COMPILE.cache_info().misses == 1


@needs_compilers
def test_many_threads_load_once(emulated, monkeypatch):
    loads = []
    load = cuda_kernels._load_or_warn
    monkeypatch.setattr(cuda_kernels, "_load_or_warn", lambda device: loads.append(device) or load(device))
    results = []
    threads = [threading.Thread(target=lambda: results.append(first_use_in_thread())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert all(torch.equal(result, results[0]) for result in results)


def first_use_in_thread():
    weight, scale = checks.random_weight(8, 64, 8, 1, torch.float32)
    return cuda_kernels.linear(torch.ones(1, 64), weight, scale, 8)


@needs_compilers
def test_a_gpu_newer_than_nvrtc_runs_the_code_of_its_own_generation(emulated, monkeypatch):
    monkeypatch.setattr(cuda_kernels.cuda, "get_device_capability", lambda device: (8, 9 + 2))
    y, texts = first_use()
    assert y is not None
    assert texts == []


@needs_compilers
def test_a_missing_cpm_kernels_is_named_once_with_its_cure(emulated, monkeypatch):
    monkeypatch.setitem(sys.modules, "cpm_kernels", None)  # as where it is not installed
    y, texts = first_use()
    assert y is None
    assert len(texts) == 1
    assert "cpm_kernels is not installed: pip install cpm_kernels." in texts[0]


@needs_compilers
@pytest.mark.parametrize(
    ("library", "cure"),
    [
        ("cudart", "cannot load libcudart: pip install nvidia-cuda-runtime-cu12, or point CUDA_PATH at"),
        ("nvrtc", "cannot load libnvrtc: pip install nvidia-cuda-nvrtc-cu12, or point CUDA_PATH at"),
        ("cuda", "libcuda.so.1: cannot open shared object file"),  # a driver without its library
    ],
)
def test_a_missing_library_is_named_once_with_its_cure(emulated, toolkit, tmp_path, monkeypatch, library, cure):
    every = glob.glob
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(
        glob, "glob", lambda pattern: [path for path in every(pattern) if f"lib{library}." not in path]
    )
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    y, texts = first_use()
    assert y is None
    assert len(texts) == 1
    assert cure in texts[0]


@needs_compilers
def test_a_gpu_that_nvrtc_does_not_know_is_named_once_with_its_cure(emulated, monkeypatch):
    monkeypatch.setattr(cuda_kernels.cuda, "get_device_capability", lambda device: (3, 5))
    y, texts = first_use()
    assert y is None
    assert len(texts) == 1
    assert "does not compile for sm_35" in texts[0]
    assert "compute capability 7.0" in texts[0]


@needs_compilers
def test_a_driver_that_refuses_the_code_is_named_once(emulated, monkeypatch):
    monkeypatch.setenv("EMULATED_LOAD_ERROR", "209")
    y, texts = first_use()
    assert y is None
    assert len(texts) == 1
    assert "no kernel image is available" in texts[0]


@needs_compilers
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("zero point of INT4 off by one", "extraction of INT4"),
        ("sum over half of the lanes", "product of 1 rows of INT8"),
        ("tiles of x mistaken for blocks of W", "product of 5 rows of INT8"),
        ("nibbles packed the other way round", "compression of INT4"),
    ],
)
def test_kernels_that_are_wrong_on_a_gpu_are_not_used(emulated, tmp_path, monkeypatch, name, wrong):
    mutant = next(mutant for mutant in mutants.MUTANTS if mutant.name == name)
    build.build(mutants.mutated(mutant), tmp_path / "cuda", sanitized=False)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    y, texts = first_use()
    assert y is None
    assert len(texts) == 1
    assert f"The {wrong} is wrong on this GPU. Please report" in texts[0]


def test_torchs_own_libraries_come_before_the_systems_and_those_of_its_cuda_version_first(monkeypatch, tmp_path):
    chosen, own = tmp_path / "chosen" / "lib64", tmp_path / "own"
    for folder, names in (
        (own, ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libcudart-1a2b3c4d.so.12")),
        (chosen, ("libnvrtc.so",)),
    ):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(cuda_kernels, "_torch_folders", lambda: [str(own), str(tmp_path / "gone")])
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"the system's {name}")
    for version, name in (("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert cuda_kernels._find_library("nvrtc") == str(own / name)
    assert cuda_kernels._find_library("cudart") == str(own / "libcudart-1a2b3c4d.so.12")
    assert cuda_kernels._find_library("gone") == "the system's gone"
    assert cuda_kernels._pip_package("nvrtc") == "nvidia-cuda-nvrtc"  # of CUDA 13
    monkeypatch.setenv("CUDA_PATH", str(chosen.parent))
    assert cuda_kernels._find_library("nvrtc") == str(chosen / "libnvrtc.so")
    assert cuda_kernels._find_library("cudart") == str(own / "libcudart-1a2b3c4d.so.12")


def test_on_windows_torchs_folders_and_those_of_path_are_searched(monkeypatch, tmp_path):
    """The names only: no library of Windows can be loaded here."""
    own, other = tmp_path / "own", tmp_path / "other"
    for folder, names in (
        (own, ("nvrtc64_130_0.dll", "nvrtc64_130_0.alt.dll", "nvrtc-builtins64_130.dll")),
        (other, ("nvrtc64_120_0.dll", "cudart64_12.dll")),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    (tmp_path / "file.exe").touch()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(cuda_kernels, "_torch_folders", lambda: [str(own)])
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("file.exe", "gone", "other")))
    assert cuda_kernels._find_library("nvrtc") == str(own / "nvrtc64_130_0.dll")
    assert cuda_kernels._find_library("cudart") == str(other / "cudart64_12.dll")
    assert cuda_kernels._find_library("cuda") == "nvcuda.dll"


def test_a_rocm_build_of_pytorch_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(cuda_kernels, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda_kernels, "_loaded", {})
    cuda_kernels._cpm_kernels.cache_clear()
    cuda_kernels._warn_once.cache_clear()
    y, texts = first_use()
    assert y is None
    assert len(texts) == 1
    assert "ROCm" in texts[0]


# ---- the benchmark --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_benchmark(monkeypatch):
    """The benchmark in small, where there is no GPU to ask."""
    monkeypatch.syspath_prepend(str(Path(cuda_kernels.__file__).parent / "benchmarks"))
    module = importlib.import_module("gpu_quantization")
    small = {"CALLS": 2, "REPEATS": 2, "NEW_TOKENS": 4, "DECODED": ((2, 8),), "PROMPTS": (8,), "ROWS": (1, 32)}
    small["BEYOND_CACHE"] = 2**20
    for name, value in {**small, "MATRICES": {"small": (8, 64)}, "CHECKED_SHAPES": ((4, 64),)}.items():
        monkeypatch.setattr(module, name, value)
    gpu = SimpleNamespace(name="Emulated GPU", major=8, minor=0, multi_processor_count=1, total_memory=1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    return module


@pytest.mark.once  # some versions of transformers write warnings of their own to stderr
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_benchmark_says_so_in_one_line_and_exits_with_2():
    script = Path(cuda_kernels.__file__).parent / "benchmarks" / "gpu_quantization.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout.count("\n") == 1
    assert "no NVIDIA GPU" in result.stdout
    assert result.stderr == ""


@needs_compilers
def test_the_benchmark_reports_the_device_its_numbers_and_every_way_of_a_product(kernels, gpu_benchmark, capsys):
    assert gpu_benchmark.report(gpu_benchmark.Clock(torch.device("cpu"), eager=False), skip_model=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Emulated GPU, sm_80, 1 SMs, 1.0 GB; torch ")
    assert "Compression, extraction and products: right" in lines
    assert [line.split(" | ")[:3] for line in lines if line.startswith("| small")] == [
        ["| small", bits, rows] for bits in ("8", "4") for rows in ("1", "32")
    ]
    assert "issue tracker" in lines[-1]


@needs_compilers
def test_the_benchmark_finds_wrong_numbers_and_exits_with_1(kernels, gpu_benchmark, monkeypatch, capsys):
    linear = cuda_kernels.linear
    monkeypatch.setattr(cuda_kernels, "linear", lambda *arguments: linear(*arguments) * 1.01)
    assert gpu_benchmark.report(gpu_benchmark.Clock(torch.device("cpu"), eager=False), skip_model=True) == 1
    assert "WRONG: product of 1 rows, INT4 float16 4 x 64" in capsys.readouterr().out


@needs_compilers
def test_the_benchmark_decodes_with_the_model_in_every_way(seam_on_cpu, gpu_benchmark):
    clock = gpu_benchmark.Clock(torch.device("cpu"), eager=True)
    sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "inner_hidden_size": 128}
    lines = list(gpu_benchmark.model_table(clock, 0, **sizes))
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| 16 bits", "matmul"],
        ["| 8 bits", "fused"],
        ["| 8 bits", "dequantize + matmul"],
        ["| 4 bits", "fused"],
        ["| 4 bits", "dequantize + matmul"],
    ]
