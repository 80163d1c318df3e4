"""Products with INT4, INT8 and 16-bit weights on x86 CPUs, by kernels compiled for the very machine at first use.

At one new token a model is as fast as its weights can be read, so the kernels read the official storage format as it
lies in memory, widen a weight in registers and sum in float32; activations keep their precision. llvmlite compiles
them, and they run on the OpenMP threads that torch already has. Without llvmlite torch's own INT8 kernel serves; where
neither can, the public functions return None and the caller computes in plain PyTorch. Nothing happens at import.

After os.fork() a child may use one thread only (`torch.set_num_threads(1)`), as with torch's own parallel operations.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_kernel_ir import CHUNK, TILE, Variant, kernel_ir

GEMV_ROWS = 4  # rows of activations in one pass over the weight: more sums than that do not fit the registers
FEW_ROWS = {
    4: 32,
    8: 32,
    16: 8,
}  # bits -> up to so many rows, repeated passes beat unpacking; benchmarks/cpu_kernels.py
BLOCK_BYTES = 8 << 20  # of unpacked weight at a time: stays in the last-level cache
IR_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat", torch.float16: "half"}

_lock = threading.RLock()
_compiled: dict[Variant, tuple | None] = {}  # (address, engine that owns the code), or None for a kernel that failed
_machine: dict[str, object] = {}  # what was found out about this machine


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    """x @ (scale * weight).T without the weight in full precision, or None where this machine or shape is not served.

    x: [M, K] float32, bfloat16 or float16; the result is [M, N] of the same type.
    weight: bits 8: int8 [N, K]; 4: int8 [N, K/2], even column in the high nibble; 16: float16 or bfloat16 [N, K].
    scale: [N], or [N, K/group] with groups of 32, 64 or 128 columns, of any of the three types; None for 16 bits.
    Not differentiable. Served: contiguous CPU tensors with N % 4 == 0 and K % 128 == 0.

    >>> weight = torch.tensor([[1, -128], [2, 3], [0, 0], [127, 5]], dtype=torch.int8).repeat(1, 64)
    >>> y = linear(torch.ones(1, 128), weight, torch.full((4,), 0.5), 8)
    >>> y is None or y.tolist()
    [[-4064.0, 160.0, 0.0, 4224.0]]
    """
    if not _is_served(x, weight, scale, bits):
        return None
    if x.shape[0] <= FEW_ROWS[bits]:
        y = _gemv(x, weight, scale, bits)
        return _torch_linear(x, weight, scale, bits) if y is None else y
    if bits == 16 and weight.dtype == torch.bfloat16:
        return None  # torch's own matrix product is the best there is
    return _unpack_and_multiply(x, weight, scale, bits)


def dequantize(weight: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor | None:
    """scale * weight [N, K] as `dtype` in one pass, the float32 product rounded once; None where not served."""
    if dtype not in IR_TYPES or not _is_served(None, weight, scale, bits):
        return None
    y = torch.empty(weight.shape[0], _columns(weight, bits), dtype=dtype)
    return _dequantize_into(y, weight, scale, bits)


def _columns(weight: Tensor, bits: int) -> int:
    return weight.shape[1] * 2 if bits == 4 else weight.shape[1]


def _group(weight: Tensor, scale: Tensor | None, bits: int) -> int:
    return 0 if scale is None or scale.dim() == 1 else _columns(weight, bits) // scale.shape[1]


def _is_served(x: Tensor | None, weight: Tensor, scale: Tensor | None, bits: int) -> bool:
    if weight.dim() != 2 or weight.dtype not in ((torch.float16, torch.bfloat16) if bits == 16 else (torch.int8,)):
        return False
    rows, columns = weight.shape[0], _columns(weight, bits)
    if rows % TILE or columns % CHUNK or rows == 0 or columns == 0:
        return False
    if x is not None and (x.dim() != 2 or x.shape[1] != columns or x.shape[0] == 0):
        return False
    if (scale is None) != (bits == 16):
        return False
    if scale is not None and not _fits(scale, rows, columns):
        return False
    tensors = [tensor for tensor in (x, weight, scale) if tensor is not None]
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)  # no fake or wrapped tensors
    return plain and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors) and _types_are_known(x, scale)


def _fits(scale: Tensor, rows: int, columns: int) -> bool:
    if scale.dim() == 1:
        return scale.shape[0] == rows
    return scale.dim() == 2 and scale.shape[0] == rows and scale.shape[1] in (columns // g for g in (32, 64, 128))


def _types_are_known(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype in IR_TYPES for tensor in tensors)


# ---------------------------------------------------------------------------------------------- the routes


def _gemv(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    """Passes over the packed weight, GEMV_ROWS rows of x each."""
    y = torch.empty(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[0], GEMV_ROWS):
        part = x[start : start + GEMV_ROWS]
        address = _kernel(_variant("gemv", weight, scale, bits, x.dtype, part.shape[0]))
        if address is None:
            return None
        _launch(address, weight, scale, part, y[start : start + GEMV_ROWS], bits)
    return y.to(x.dtype)


def _unpack_and_multiply(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    """Unpacks a block of rows at a time to the type of x (float16 to float32, whose product is faster and exact)."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    if _kernel(_variant("dequantize", weight, scale, bits, dtype)) is None:
        return None
    step = max(TILE, BLOCK_BYTES // (x.shape[1] * dtype.itemsize) // TILE * TILE)
    block, inputs = torch.empty(step, x.shape[1], dtype=dtype), x.to(dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        part = block[: rows.stop - rows.start]
        _dequantize_into(part, weight[rows], None if scale is None else scale[rows], bits)
        y[:, rows] = F.linear(inputs, part)
    return y


def _torch_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    """torch's INT8 product, which is fast for bfloat16 activations only; the scale is applied afterwards, unrounded.

    torch's INT4 product is left aside: it wants a packed copy of every weight, which would double the memory."""
    product = getattr(torch, "_weight_int8pack_mm", None)
    if product is None or bits == 16 or scale.dim() != 1:
        return None
    inputs, ones = x.bfloat16(), torch.ones(weight.shape[0], dtype=torch.bfloat16)
    if bits == 8:
        y = product(inputs, weight, ones).float()
    else:  # each nibble at the top of its byte is sixteen times its value
        even, odd = inputs[:, ::2].contiguous(), inputs[:, 1::2].contiguous()
        y = (product(even, weight & -16, ones).float() + product(odd, weight << 4, ones).float()) / 16
    return (y * scale.float()).to(x.dtype)


def _dequantize_into(y: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    address = _kernel(_variant("dequantize", weight, scale, bits, y.dtype))
    return None if address is None else _launch(address, weight, scale, None, y, bits)


# ---------------------------------------------------------------------------------------------- compiling, launching


def instruction_set() -> str:
    """avx512_bf16, avx512 or avx2; "" where there is no llvmlite or the CPU has no fused multiply-add."""
    if "isa" not in _machine:
        _machine["isa"] = _find_instruction_set()
    return _machine["isa"]


def _find_instruction_set() -> str:
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return ""
    if not hasattr(llvm, "create_pass_builder"):  # llvmlite 0.44
        return ""
    has = llvm.get_host_cpu_features().get
    if not (has("avx2") and has("fma") and has("f16c")):
        return ""
    if not (has("avx512f") and has("avx512bw") and has("avx512vl") and has("avx512dq")):
        return "avx2"
    return "avx512_bf16" if has("avx512bf16") else "avx512"


def _variant(kind: str, weight: Tensor, scale: Tensor | None, bits: int, x: torch.dtype, rows: int = 0) -> Variant:
    weight_type = IR_TYPES[weight.dtype] if bits == 16 else ""
    scale_type = "" if scale is None else IR_TYPES[scale.dtype]
    return Variant(
        kind, instruction_set(), bits, _group(weight, scale, bits), weight_type, scale_type, IR_TYPES[x], rows
    )


def _kernel(variant: Variant) -> int | None:
    """The address of the compiled and checked kernel; None without llvmlite, or with a warning where it is wrong."""
    if variant not in _compiled:
        with _lock:
            if variant not in _compiled:
                _compiled[variant] = _compile_and_check(variant) if variant.isa else None
    kernel = _compiled[variant]
    return None if kernel is None else kernel[0]


def _compile_and_check(variant: Variant) -> tuple | None:
    try:
        kernel = _compile(variant)
        _check(variant, kernel[0])
    except (RuntimeError, OSError) as error:
        warnings.warn(f"the CPU kernel {variant} is not used, plain PyTorch instead: {error}", stacklevel=2)
        return None
    return kernel


def _compile(variant: Variant) -> tuple:
    """(address, engine), in 20-90 ms; the code lives as long as the engine."""
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        raise RuntimeError("llvmlite is gone; `pip install llvmlite`") from error
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    features += {"avx2": ",-avx512f,-avx512bf16", "avx512": ",-avx512bf16"}.get(variant.isa, "")
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)
    module = llvm.parse_assembly(kernel_ir(variant))
    options = llvm.create_pipeline_tuning_options(2)
    options.loop_unrolling = False  # the kernels are unrolled as far as the registers allow
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine.get_function_address("kernel"), engine


def _check(variant: Variant, address: int) -> None:
    """Compares a kernel with plain torch in float64 on a small problem; raises RuntimeError where they differ."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 5 * TILE, 3 * CHUNK
    types = {name: dtype for dtype, name in IR_TYPES.items()}
    if variant.bits == 16:
        weight, scale = torch.randn(rows, columns, generator=generator).to(types[variant.weight]), None
        exact = weight.double()
    else:
        packed = (rows, columns * variant.bits // 8)
        weight = torch.randint(-128, 128, packed, generator=generator, dtype=torch.int8)
        exact = weight if variant.bits == 8 else torch.stack((weight >> 4, (weight << 4) >> 4), -1).flatten(1)
        groups = columns // variant.group if variant.group else 1
        scale = torch.rand(rows, groups, generator=generator).add(0.5).to(types[variant.scale])
        exact = exact.double() * scale.double().repeat_interleave(columns // groups, 1)
        scale = scale if variant.group else scale[:, 0].contiguous()
    if variant.kind == "dequantize":
        y = _launch(address, weight, scale, None, torch.empty(rows, columns, dtype=types[variant.x]), variant.bits)
        wrong = y != exact.float().to(types[variant.x])
    else:
        x = torch.randn(variant.rows, columns, generator=generator).to(types[variant.x])
        y = _launch(address, weight, scale, x, torch.empty(variant.rows, rows), variant.bits)
        wrong = ~((y - x.double() @ exact.T).abs() <= 1e-5 * (x.double().abs() @ exact.abs().T))
    if wrong.any():
        raise RuntimeError(f"{int(wrong.sum())} of {wrong.numel()} results differ from plain PyTorch")


def _openmp():
    """GOMP_parallel of the OpenMP library torch itself is linked with, so that no second pool fights for the cores;
    None where it has no such function (other systems than Linux): one thread then."""
    if "openmp" not in _machine:
        library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so"), None)
        parallel = None if library is None else getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
        if parallel is not None:
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
        _machine["openmp"] = parallel
    return _machine["openmp"]


def _launch(address: int, weight: Tensor, scale: Tensor | None, x: Tensor | None, y: Tensor, bits: int) -> Tensor:
    """Runs a kernel on torch's threads; see Arguments in cpu_kernel_ir.py."""
    rows, columns = weight.shape[0], _columns(weight, bits)
    parallel = _openmp()
    threads = torch.get_num_threads() if parallel else 1
    own_x = 0 if x is None else x.numel()
    scratch = torch.empty(threads * own_x + 16)  # float32; 16 more for the alignment to 64 bytes
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (weight, scale, x, y)]
    task_rows = min(256, max(4 * TILE, rows // (8 * threads) // TILE * TILE))
    words = (0, 0, *pointers, scratch.data_ptr() + 63 & ~63, rows, columns // CHUNK, task_rows)
    arguments = (ctypes.c_int64 * len(words))(*words)
    if threads == 1:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(arguments))
    else:
        parallel(address, ctypes.addressof(arguments), threads, 0)
    return y
