"""Products with INT4, INT8 and 16-bit weights on x86 CPUs, by kernels compiled for the very machine at first use.

At one new token a model is as fast as its weights can be read, so the kernels read the official storage format as it
lies in memory, widen a weight in registers and sum in float32; activations keep their precision. llvmlite compiles
them, and they run on the OpenMP threads that torch already has. Without llvmlite torch's own INT8 kernel serves; where
neither can, the public functions return None and the caller computes in plain PyTorch. Nothing happens at import.

After os.fork() a child may use one thread only (`torch.set_num_threads(1)`), as with torch's own parallel operations.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .cpu_kernel_ir import BLOCK_ROWS, CHUNK, PANEL, TILE, Arguments, Variant, kernel_ir

GEMV_ROWS = 4  # rows of activations in one pass over the weight: more sums than that do not fit the registers
FEW_ROWS = {4: 16, 8: 12, 16: 8}  # bits -> up to so many rows, passes of a gemv beat a gemm; benchmarks/cpu_kernels.py
TORCH_INT8_ROWS = 16  # up to so many rows, torch's INT8 kernel beats unpacking in plain PyTorch
SLAB_ROWS = 256  # rows of activations in one matrix product, so that they stay in the last-level cache
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
    rows = x.shape[0]
    if rows <= FEW_ROWS[bits] or weight.shape[0] < BLOCK_ROWS:
        y = _gemv(x, weight, scale, bits)
    else:
        y = _gemm(x, weight, scale, bits)
    if y is None and rows <= TORCH_INT8_ROWS:
        return _torch_linear(x, weight, scale, bits)
    return y


def dequantize(weight: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor | None:
    """scale * weight [N, K] as `dtype` in one pass, the float32 product rounded once; None where not served."""
    if dtype not in IR_TYPES or not _is_served(None, weight, scale, bits):
        return None
    address = _kernel(_variant("dequantize", weight, scale, bits, dtype))
    return None if address is None else _run_dequantize(address, weight, scale, bits, dtype)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor | None:
    """softmax(query @ key.T / sqrt(D)) @ value for one new token, as fast as memory gives the keys and values.

    query: [B, H, 1, D]; key, value: [B, H, T, D], views of larger buffers allowed as long as a head's tokens are
    contiguous; float32, bfloat16 or float16, all the same. visible: bool, broadcast to [B, H, 1, T]. Scores, weights
    and sums are float32. Returns [B, H, 1, D]. Not differentiable. Served: CPU tensors with D % 32 == 0, D <= 256.
    """
    if not _attention_is_served(query, key, value):
        return None
    addresses = [_kernel(_attention_variant(kind, query)) for kind in ("scores", "mix")]
    if None in addresses:
        return None
    scores = _run_scores(addresses[0], query, key)
    if visible is not None:
        scores.masked_fill_(~visible, float("-inf"))
    return _run_mix(addresses[1], scores.softmax(-1), value)


def _attention_is_served(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if query.dim() != 4 or query.shape[2] != 1 or key.shape != value.shape or 0 in key.shape:
        return False
    batch, heads, _, size = query.shape
    if key.dim() != 4 or key.shape[:2] != (batch, heads) or key.shape[3] != size or size % 32 or size > 256:
        return False
    states = (query, key, value)
    if not all(_is_plain(tensor) and tensor.dtype == query.dtype for tensor in states):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states):
        return False
    return query.dtype in IR_TYPES and all(tensor.stride()[2:] == (size, 1) for tensor in (key, value))


def _attention_variant(kind: str, query: Tensor) -> Variant:
    name = IR_TYPES[query.dtype]
    return Variant(kind, instruction_set(), 16, 0, weight=name, scale="", x=name, head_size=query.shape[-1])


def _columns(weight: Tensor, bits: int) -> int:
    return weight.shape[1] * 2 if bits == 4 else weight.shape[1]


def _group(weight: Tensor, scale: Tensor | None, bits: int) -> int:
    return 0 if scale is None or scale.dim() == 1 else _columns(weight, bits) // scale.shape[1]


def _is_served(x: Tensor | None, weight: Tensor, scale: Tensor | None, bits: int) -> bool:
    of_x, of_scale = (None if tensor is None else (tensor.dtype, tensor.shape) for tensor in (x, scale))
    if not _fits(bits, weight.dtype, weight.shape, of_x, of_scale):
        return False
    return all(_is_plain(tensor) and tensor.is_contiguous() for tensor in (x, weight, scale) if tensor is not None)


def _is_plain(tensor: Tensor) -> bool:
    """On the CPU, and not a fake tensor of torch.compile or another subclass without memory of its own."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


@functools.lru_cache(maxsize=1024)
def _fits(bits: int, dtype: torch.dtype, shape: tuple, x: tuple | None, scale: tuple | None) -> bool:
    """Whether types and shapes are served; x and scale are (type, shape) or None. Asked for every product: cached."""
    stored_as = {4: (torch.int8,), 8: (torch.int8,), 16: (torch.float16, torch.bfloat16)}
    if dtype not in stored_as.get(bits, ()) or len(shape) != 2 or (scale is None) != (bits == 16):
        return False
    rows, columns = shape[0], shape[1] * (2 if bits == 4 else 1)
    if rows % TILE or columns % CHUNK or rows == 0 or columns == 0:
        return False
    if x is not None and (x[0] not in IR_TYPES or len(x[1]) != 2 or x[1][0] == 0 or x[1][1] != columns):
        return False
    scale_shapes = [(rows,)] + [(rows, columns // group) for group in (32, 64, 128)]
    return scale is None or (scale[0] in IR_TYPES and tuple(scale[1]) in scale_shapes)


# ---------------------------------------------------------------------------------------------- the routes


def _gemv(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    """Passes over the packed weight, GEMV_ROWS rows of x each."""
    parts = []
    for part in x.split(GEMV_ROWS) if len(x) > GEMV_ROWS else (x,):
        variant = _variant("gemv", weight, scale, bits, x.dtype, part.shape[0]).with_tile(x.shape[1])
        address = _kernel(variant)
        if address is None:
            return None
        parts.append(_run_gemv(variant, address, part, weight, scale))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)


def _run_gemv(variant: Variant, address: int, x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    y = _empty(x.shape[0], weight.shape[0])
    size = {"rows": weight.shape[0], "chunks": x.shape[1] // CHUNK}
    _run(address, variant.gemv_scratch(x.shape[1]), weight=weight, scale=scale, x=x, y=y, **size)
    return y


def _gemm(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    """Unpacks the weight block by block in each thread's cache and multiplies it with all rows of x."""
    variant = _variant("gemm", weight, scale, bits, x.dtype)
    if bits == 16 and variant.dots_bf16:
        return None  # torch's own product is as fast
    address = _kernel(variant)
    return None if address is None else _run_gemm(variant, address, x, weight, scale)


def _run_gemm(variant: Variant, address: int, x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    x, y = x.detach(), _empty(-(-x.shape[0] // PANEL) * PANEL, weight.shape[0], dtype=x.dtype)
    size = {"rows": weight.shape[0], "chunks": x.shape[1] // CHUNK, "task_rows": BLOCK_ROWS}
    for start in range(0, x.shape[0], SLAB_ROWS):
        panels = _panels(x[start : start + SLAB_ROWS], variant.dots_bf16)
        scratch = variant.gemm_scratch(len(panels))
        _run(address, scratch, weight=weight, scale=scale, x=panels, y=y[start:], panels=len(panels), **size)
    return y[: x.shape[0]]


def _panels(x: Tensor, pairs: bool) -> Tensor:
    """x [M, K] -> [ceil(M / 16), K, 16] float32, or with `pairs` [.., K / 2, 16] of two bfloat16 each; zeros below."""
    words = x.view(torch.int32) if pairs else x.float()
    panels = words.new_empty(-(-len(x) // PANEL), words.shape[1], PANEL)
    for number, panel in enumerate(panels):
        rows = words[number * PANEL : (number + 1) * PANEL]
        if len(rows) < PANEL:
            panel.zero_()
        panel[:, : len(rows)].copy_(rows.t())
    return panels


def _run_dequantize(address: int, weight: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    y = _empty(weight.shape[0], _columns(weight, bits), dtype=dtype)
    _run(address, weight=weight, scale=scale, y=y, rows=y.shape[0], chunks=y.shape[1] // CHUNK)
    return y


def _run_scores(address: int, query: Tensor, key: Tensor) -> Tensor:
    """query [B, H, 1, D], key [B, H, T, D] -> scores [B, H, 1, T]."""
    batch, heads, tokens, _ = key.shape
    scores = _empty(batch, heads, 1, tokens)
    _run(address, x=query.contiguous(), y=scores, **_heads(key))
    return scores


def _run_mix(address: int, weights: Tensor, value: Tensor) -> Tensor:
    """weights [B, H, 1, T], value [B, H, T, D] -> context [B, H, 1, D]."""
    context = _empty(*value.shape[:2], 1, value.shape[3], dtype=value.dtype)
    _run(address, scale=weights, y=context, **_heads(value))
    return context


def _heads(states: Tensor) -> dict:
    batch, heads, tokens, _ = states.shape
    strides = [stride * states.element_size() for stride in states.stride()[:2]]
    places = {"weight": states, "batch_stride": strides[0], "head_stride": strides[1]}
    return {**places, "rows": batch * heads, "heads": heads, "tokens": tokens, "task_rows": 1}


def _torch_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    """torch's INT8 product, which is fast for bfloat16 activations only; the scale is applied afterwards, unrounded.

    torch's INT4 product is left aside: it wants a packed copy of every weight, which would double the memory."""
    product = getattr(torch, "_weight_int8pack_mm", None)
    if product is None or bits == 16 or scale.dim() != 1:
        return None
    inputs, ones = x.bfloat16(), weight.new_ones(weight.shape[0], dtype=torch.bfloat16)
    if bits == 8:
        y = product(inputs, weight, ones).float()
    else:  # each nibble at the top of its byte is sixteen times its value
        even, odd = inputs[:, ::2].contiguous(), inputs[:, 1::2].contiguous()
        y = (product(even, weight & -16, ones).float() + product(odd, weight << 4, ones).float()) / 16
    return (y * scale.float()).to(x.dtype)


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
    try:
        llvm.parse_assembly("define void @kernel(ptr %arguments) { ret void }")
    except RuntimeError:  # before llvmlite 0.45 pointers have types
        warnings.warn("llvmlite is too old for the CPU kernels: pip install 'llvmlite>=0.45'", stacklevel=2)
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
    if variant.head_size:
        y, exact, bound = _checked_attention(variant, address)
    elif variant.kind == "dequantize":
        weight, scale, exact = _example(variant, BLOCK_ROWS + TILE, 3 * CHUNK)
        exact, bound = exact.float().to(_dtype(variant.x)), 0
        y = _run_dequantize(address, weight, scale, variant.bits, exact.dtype)
    else:
        y, exact, bound = _checked_product(variant, address)
    wrong = ~((y - exact).abs() <= bound)
    if wrong.any():
        raise RuntimeError(f"{int(wrong.sum())} of {wrong.numel()} results differ from plain PyTorch")


def _checked_product(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = max(variant.block_columns, variant.slab_columns) + CHUNK  # neither blocks of rows nor columns are whole
    weight, scale, exact = _example(variant, BLOCK_ROWS + TILE, columns)
    x = _noise(variant.rows or 2 * PANEL + 1, columns).to(_dtype(variant.x))
    y = (_run_gemv if variant.kind == "gemv" else _run_gemm)(variant, address, x, weight, scale)
    rounded_weight = 2.0**-9 if variant.kind == "gemm" and variant.dots_bf16 and variant.group else 0.0
    magnitude, exact = x.double().abs() @ exact.abs().T, x.double() @ exact.T
    return y, exact, (1e-5 + rounded_weight) * magnitude + torch.finfo(y.dtype).eps * exact.abs()


def _checked_attention(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences of two heads, in buffers with room for more tokens."""
    states = _noise(2, 2, 40, variant.head_size).to(_dtype(variant.x))[:, :, :37]
    if variant.kind == "scores":
        query = _noise(2, 2, 1, variant.head_size).to(states.dtype)
        a, b, y = query.double() / variant.head_size**0.5, states.double().mT, _run_scores(address, query, states)
    else:
        weights = _noise(2, 2, 1, 37)
        a, b, y = weights.double(), states.double(), _run_mix(address, weights, states)
    return y, a @ b, 1e-5 * (a.abs() @ b.abs()) + torch.finfo(y.dtype).eps * (a @ b).abs()


def _example(variant: Variant, rows: int, columns: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """A weight [rows, columns] with every bit pattern of its type, its scale, and both multiplied in float64."""
    if variant.bits == 16:
        weight = _noise(rows, columns).to(_dtype(variant.weight))
        return weight, None, weight.double()
    bytes_per_row = columns * variant.bits // 8
    weight = torch.arange(rows * bytes_per_row, device="cpu").mul(167).to(torch.int8).view(rows, bytes_per_row)
    values = weight if variant.bits == 8 else torch.stack((weight >> 4, (weight << 4) >> 4), -1).flatten(1)
    groups = columns // variant.group if variant.group else 1
    scale = (
        torch.linspace(0.5, 1.5, rows * groups, dtype=torch.float32, device="cpu")
        .view(rows, groups)
        .to(_dtype(variant.scale))
    )
    exact = values.double() * scale.double().repeat_interleave(columns // groups, 1)
    return weight, scale if variant.group else scale.flatten(), exact


def _noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the caller's own stays untouched
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _dtype(ir_type: str) -> torch.dtype:
    return next(dtype for dtype, name in IR_TYPES.items() if name == ir_type)


def _openmp():
    """GOMP_parallel of the OpenMP library torch itself is linked with, so that no second pool fights for the cores;
    None where it has no such function, which is elsewhere than on Linux."""
    if "openmp" not in _machine:
        library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so"), None)
        parallel = None if library is None else getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
        if parallel is not None:
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
        _machine["openmp"] = parallel
    return _machine["openmp"]


def _run(address: int, scratch: int = 0, **arguments: Tensor | int | None) -> None:
    """Runs a kernel on torch's threads, each with `scratch` float32 of its own; the names are those of Arguments."""
    threads = torch.get_num_threads()
    memory = _empty(threads * scratch + 16)  # 16 more for the alignment to 64 bytes
    words = (ctypes.c_int64 * len(Arguments.NAMES))()
    for name, value in arguments.items():
        if value is not None:
            words[_WORD[name]] = value.data_ptr() if isinstance(value, Tensor) else value
    words[_WORD["scratch"]] = memory.data_ptr() + 63 & ~63
    if not words[_WORD["task_rows"]]:
        words[_WORD["task_rows"]] = min(256, max(4 * TILE, arguments["rows"] // (8 * threads) // TILE * TILE))
    parallel = _openmp() if threads > 1 else None
    if parallel is not None:
        parallel(address, ctypes.addressof(words), threads, 0)
    else:
        _run_on_python_threads(_FUNCTION(address), ctypes.addressof(words), threads)


def _run_on_python_threads(kernel, words: int, threads: int) -> None:
    """The kernels share out their work themselves, and a foreign call releases Python's lock."""
    others = [threading.Thread(target=kernel, args=(words,)) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    kernel(words)
    for thread in others:
        thread.join()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default type and device are


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_WORD = {name: number for number, name in enumerate(Arguments.NAMES)}
