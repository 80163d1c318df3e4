"""Compiles the CPU kernels with llvmlite at first use, checks each against plain PyTorch, and runs them on the OpenMP
threads that torch already has. Nothing happens at import.

After os.fork() a child may use one thread only (`torch.set_num_threads(1)`), as with torch's own parallel operations.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .ir import INTRINSICS, TILE, Arguments, Emitter, Variant
from .products import PRODUCTS
from .steps import STEPS

IR_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat", torch.float16: "half"}

# Runs a new kernel on a small problem: its result, the exact one in float64, and the bound for their difference.
Trial = Callable[[Variant, int], tuple[Tensor, Tensor, Tensor]]

UNUSABLE = (
    "chatglm_cpu: the compiled kernels are not used and PyTorch's slower ones serve, since llvmlite does not: "
    "`pip install --upgrade --force-reinstall 'llvmlite>=0.45'` brings them back"
)

_lock = threading.RLock()
_compiled: dict[Variant, tuple | None] = {}  # (address, engine that owns the code), or None for a kernel that failed
_machine: dict[str, object] = {}  # what was found out about this machine


# ---------------------------------------------------------------------------------------------- compiling


def instruction_set() -> str:
    """avx512_bf16, avx512 or avx2; "" where llvmlite does not work, with a warning, and where the CPU has no fused
    multiply-add."""
    if "isa" not in _machine:
        _machine["isa"] = _find_instruction_set()
    return _machine["isa"]


def _find_instruction_set() -> str:
    try:
        import llvmlite.binding as llvm

        llvm.parse_assembly("define void @kernel(ptr %arguments) { ret void }")
        has = llvm.get_host_cpu_features().get
    except Exception as error:  # not there, its library does not load, or before 0.45, where pointers have types
        warnings.warn(f"{UNUSABLE} ({type(error).__name__}: {error})", stacklevel=2)
        return ""
    if not (has("avx2") and has("fma") and has("f16c")):
        return ""
    if not (has("avx512f") and has("avx512bw") and has("avx512vl") and has("avx512dq")):
        return "avx2"
    return "avx512_bf16" if has("avx512bf16") else "avx512"


def kernel_address(variant: Variant, trial: Trial | None) -> int | None:
    """The address of the compiled and checked kernel; None without llvmlite, or with a warning where it is wrong."""
    if variant not in _compiled:
        with _lock:
            if variant not in _compiled:
                _compiled[variant] = _compile_and_check(variant, trial) if variant.isa else None
    kernel = _compiled[variant]
    return None if kernel is None else kernel[0]


def step_address(variant: Variant) -> int:
    """Of a compiled kernel as a step of a program."""
    return _compiled[variant][1].get_function_address("step")


def _compile_and_check(variant: Variant, trial: Trial | None) -> tuple | None:
    try:
        kernel = _compile(variant)
        if trial is not None:
            y, exact, bound = trial(variant, kernel[0])
            wrong = ~((y - exact).abs() <= bound)
            if wrong.any():
                raise RuntimeError(f"{int(wrong.sum())} of {wrong.numel()} results differ from plain PyTorch")
    except Exception as error:  # whatever LLVM or the linker say: the kernel is optional
        warnings.warn(f"the CPU kernel {variant} is not used, plain PyTorch instead: {error}", stacklevel=2)
        return None
    return kernel


def kernel_ir(variant: Variant) -> str:
    """The module of LLVM IR with the function `step`, and `kernel`, which calls it with the number of a thread."""
    emit = Emitter()
    emit.do("define void @step(ptr %arguments, i64 %thread) noinline {", "entry:")
    args = Arguments(emit)
    {**PRODUCTS, **STEPS}[variant.kind](emit, variant, args)
    emit.do("  ret void", "}", "define void @kernel(ptr %arguments) {", "entry:")
    thread = emit(f"atomicrmw add ptr {Arguments(emit).next_thread}, i64 1 monotonic")
    emit.do(f"  call void @step(ptr %arguments, i64 {thread})", "  ret void", "}")
    body = "\n".join(emit.lines)
    used = [line for line in INTRINSICS.splitlines() if line and line.split("@")[1].split("(")[0] in body]
    return "\n".join(used) + "\n" + body


def _compile(variant: Variant) -> tuple:
    """(address, engine), in 10-70 ms; the code lives as long as the engine. LLVM's passes over the text are left out:
    they took as long again and made no kernel faster, which are unrolled as far as the registers allow."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    features += {"avx2": ",-avx512f,-avx512bf16", "avx512": ",-avx512bf16"}.get(variant.isa, "")
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)
    module = llvm.parse_assembly(kernel_ir(variant))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine.get_function_address("kernel"), engine


# ---------------------------------------------------------------------------------------------- running


def run(address: int, scratch: int = 0, **arguments: Tensor | int | None) -> None:
    """Runs a kernel on torch's threads, each with `scratch` float32 of its own; the names are those of Arguments."""
    threads = torch.get_num_threads()
    memory = empty(scratch_size(threads, scratch))
    arguments = {name: held(value) for name, value in arguments.items()}
    words = argument_words(threads, {**arguments, "scratch": aligned_address(memory)})
    words = (ctypes.c_int64 * len(words))(*words)
    launch(address, ctypes.addressof(words), threads)


def held(value):
    """A tensor's memory under a name of its own, so that it stays where it is while a kernel reads it: another thread
    may give a parameter other `data` meanwhile, which counts from the next call on."""
    return value.data if isinstance(value, Tensor) else value


def scratch_size(threads: int, scratch: int) -> int:
    """float32 words for all threads, 16 of them for the alignment to 64 bytes."""
    return threads * scratch + 16


def aligned_address(memory: Tensor) -> int:
    return memory.data_ptr() + 63 & ~63


def argument_words(threads: int, arguments: dict[str, Tensor | int | None]) -> list[int]:
    """What a kernel finds at its one argument: addresses of tensors, and numbers."""
    words = [0] * len(Arguments.NAMES)
    for name, value in arguments.items():
        if value is not None:
            words[WORD[name]] = value.data_ptr() if isinstance(value, Tensor) else value
    if not words[WORD["task_rows"]]:
        words[WORD["task_rows"]] = min(256, max(4 * TILE, arguments["rows"] // (8 * threads) // TILE * TILE))
    return words


def launch(address: int, words: int, threads: int) -> None:
    """Calls the kernel with the address of its words on every thread, and waits for all."""
    parallel = openmp_parallel() if threads > 1 else None
    if parallel is not None:
        parallel(address, words, threads, 0)
    else:
        _run_on_python_threads(_FUNCTION(address), words, threads)


def openmp_parallel():
    """GOMP_parallel(function, its argument, threads, flags) of the OpenMP library torch itself is linked with, so that
    no second pool fights for the cores; None where it has no such function, which is elsewhere than on Linux."""
    if "parallel" not in _machine:
        library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so"), None)
        function = None if library is None else getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
        if function is not None:
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            function.restype = None
        _machine["parallel"] = function
    return _machine["parallel"]


def nap_function() -> int | None:
    """The address of usleep, which takes microseconds; None where there is none."""
    if "nap" not in _machine:
        function = None if os.name == "nt" else getattr(ctypes.CDLL(None), "usleep", None)
        _machine["nap"] = None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    return _machine["nap"]


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_on_python_threads(kernel, words: int, threads: int) -> None:
    """The kernels share out their work themselves, and a foreign call releases Python's lock."""
    others = [threading.Thread(target=kernel, args=(words,)) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    kernel(words)
    for thread in others:
        thread.join()


# ---------------------------------------------------------------------------------------------- tensors


def is_plain(tensor: Tensor) -> bool:
    """On the CPU, and not a fake tensor of torch.compile or another subclass without memory of its own."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default type and device are


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the caller's own stays untouched
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def dtype_of(ir_type: str) -> torch.dtype:
    return next(dtype for dtype, name in IR_TYPES.items() if name == ir_type)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
WORD = {name: number for number, name in enumerate(Arguments.NAMES)}
