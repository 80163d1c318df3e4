"""The one seam to fast kernels: each operation that the network computes in more than one way, and which way when.

On a CPU `chatglm_cpu` computes, the engine in `cpu/` of the repository that this code comes from, where it is
installed: it is looked for at the first use, and what it does not serve it answers with None. On a GPU it is
cuda_kernels.py. Else PyTorch's own products for INT8 and INT4 serve, and last plain PyTorch, whose numbers all the
others have to give. Nothing but plain PyTorch is used where somebody watches or changes what it computes.
"""

from __future__ import annotations

import functools
import itertools
import platform
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules_of_torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext  # of torch.set_default_device, which changes no product

from .compat import GrowingCache, cached_length, cached_states, is_tracing
from .configuration_chatglm import warn_once
from .cuda_kernels import dequantize as cuda_dequantize
from .cuda_kernels import linear as cuda_linear

API_LEVEL = 2  # of chatglm_cpu, the least that this file asks for
INSTALL = "`pip install ./cpu` in a clone of the ChatGLM-6B-Slim repository installs it"
TORCH_ROWS = 64  # of x, up to which PyTorch's own products beat unpacking the weight for a matmul
ROWS_AT_ONCE = 512  # of a weight that is unpacked, which stay in the cache until they are multiplied
ALIGNMENT = 16  # bytes, without which PyTorch's INT8 product crashes for several rows
SMALLEST = 1 << 20  # weights of a matrix; below, unpacking takes 3 ms at most, and rounds nothing to bfloat16
INT4_GROUPS = (256, 128, 64, 32)  # columns a scale that PyTorch's INT4 product knows
INT4_BLOCK = 64  # rows of a weight that it takes together on any processor
PACKED_AT_ONCE = 1 << 20  # weights, which take four bytes each while they are packed


# ---- The engine, and whether it may be used -------------------------------------------------------------------------
@functools.cache
def engine():
    """The module chatglm_cpu, or None where it is missing, too old, or does not start (both said in one line)."""
    try:
        import chatglm_cpu  # said here: below 4.27, an import alone on its line is asked for in files of the Hub

        if chatglm_cpu.API_LEVEL >= API_LEVEL:
            return chatglm_cpu
        reason = f"has API level {chatglm_cpu.API_LEVEL}, this code asks for {API_LEVEL}"
    except Exception as error:  # a broken installation breaks no model
        if isinstance(error, ImportError) and error.name == "chatglm_cpu":
            return None
        reason = f"does not start ({error!r})"
    warn_once(f"chatglm_cpu {reason}, so PyTorch computes, several times slower: {INSTALL} anew")
    return None


def engine_for(weights: str):
    """The engine; where it is missing, one line for each kind of weights says what it would gain."""
    if engine() is None and platform.machine().lower() in ("x86_64", "amd64"):
        warn_once(f"{weights} weights are computed by PyTorch alone, and decode faster with chatglm_cpu: {INSTALL}")
    return engine()


def by_engine(operation: str, x: Tensor, *arguments):
    """The engine's `operation` of x and the rest, where it serves: on a CPU, with nothing watched; else None."""
    serves = x.device.type == "cpu" and not is_watched() and engine() is not None
    return getattr(engine(), operation)(x, *arguments) if serves else None


def torch_functions() -> tuple:
    """What of PyTorch the kernels stand for."""
    methods = (nn.Module.__call__, nn.Linear.forward, nn.LayerNorm.forward)
    return (F.linear, F.layer_norm, F.gelu, F.scaled_dot_product_attention, *methods)


def is_of_torch(function) -> bool:
    code = getattr(function, "__code__", None)  # builtins have none; wrappers have that of another file
    own = torch.__path__[0]
    return isinstance(function, types.BuiltinFunctionType) if code is None else code.co_filename.startswith(own)


TORCH = tuple(function if is_of_torch(function) else None for function in torch_functions())
# A name that disappears counts as a hook: then plain PyTorch serves, and a test fails.
GLOBAL_HOOKS = [getattr(modules_of_torch, f"_global_forward_{kind}hooks", True) for kind in ("", "pre_")]


def is_watched() -> bool:
    """Whether somebody traces, casts, counts, differentiates, batches or replaces PyTorch's operations, so that they
    must be called."""
    if is_tracing() or torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack():
        return True
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True  # tangents and batched tensors, whose memory is not what is computed with
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return any(type(mode) is not DeviceContext for mode in modes) or torch_functions() != TORCH


def is_altered(module: nn.Module) -> bool:
    """Whether calling the module does anything else than its class says."""
    hooks = any(GLOBAL_HOOKS) or module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


# ---- Products -------------------------------------------------------------------------------------------------------
def unpack_int4(packed: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """int8 [..., in / 2], the even column in the high nibble -> [..., in] in `dtype`."""
    values = packed.new_empty((*packed.shape, 2), dtype=dtype)
    values[..., 0], values[..., 1] = packed >> 4, (packed << 4) >> 4
    return values.flatten(-2)


def dequantize_weight(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """int8 or packed int4 weights -> [out, in]: integer times scale, computed and rounded once in `dtype`."""
    values = unpack_int4(weight, dtype) if bits == 4 else weight.to(dtype)
    groups = (scale if scale.dim() == 2 else scale[:, None]).to(dtype)  # of columns; one where a row has one scale
    return values.unflatten(1, (groups.shape[1], -1)).mul_(groups[..., None]).flatten(1)


def dequantized(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """dequantize_weight. Routes: the engine's on a CPU, cuda_kernels' on a GPU, where they serve; else plain."""
    arguments = (weight, scale, bits, dtype)
    fast = cuda_dequantize(*arguments) if weight.device.type == "cuda" else by_engine("dequantize", *arguments)
    return dequantize_weight(*arguments) if fast is None else fast


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bits: int,
    bias: Tensor | None = None,
    int8_activations: bool = False,
    copies: dict | None = None,
) -> Tensor:
    """x [..., in] times the transposed INT8 or INT4 weight, plus bias -> [..., out] in x's dtype, or autocast's.

    Routes: on a CPU, with nothing watched, the engine's `linear`, for contiguous weights with 4 n rows and 128 n
    columns, then for SMALLEST weights and more `product_of_torch`; on a GPU, not under torch.compile,
    cuda_kernels.linear; else the weight is dequantized for a matmul.

    copies: where a layer keeps the copy of its weight, as large as the weight; None for no copies.
    """
    # Kernels want contiguous rows, and torch would repeat the weight for each row of a strided batch.
    rows, y = x.reshape(-1, x.shape[-1]).contiguous(), None
    if x.device.type == "cpu" and not is_watched():
        fast = engine_for(f"INT{bits}")
        if fast is not None:
            y = fast.linear(rows, weight, scale, bits, bias, int8_activations)
        if y is None and weight.device.type == "cpu" and weight.shape[0] * x.shape[-1] >= SMALLEST:
            y = product_of_torch(rows, weight, scale, bits, bias, copies)
    elif x.device.type == "cuda" and not is_tracing():
        if torch.is_autocast_enabled("cuda"):
            rows = rows.to(torch.get_autocast_dtype("cuda"))  # as F.linear would, however many there are
        y = cuda_linear(rows, weight, scale, bits, bias)
    if y is None:
        y = product_of_unpacked(rows, weight, scale, bits, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def product_of_unpacked(x: Tensor, weight: Tensor, scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """A matmul with the dequantized weight; on a CPU with ROWS_AT_ONCE rows of it after another."""
    at_once = ROWS_AT_ONCE if weight.device.type == "cpu" and not is_tracing() else max(len(weight), 1)
    biases = itertools.repeat(None) if bias is None else bias.to(x.dtype).split(at_once)
    parts = zip(weight.split(at_once), scale.split(at_once), biases)
    products = [F.linear(x, dequantize_weight(rows, scale, bits, x.dtype), bias) for rows, scale, bias in parts]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


class FrozenProduct(torch.autograd.Function):
    """`product` with a gradient for x; the weights are frozen, and not kept unpacked until the gradient comes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return product(x, weight, scale, bits)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ dequantized(*ctx.saved_tensors, ctx.bits, gradient.dtype), None, None, None


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x).

    Routes: for a plain nn.Linear on a CPU with 16-bit weights, x in their type, no gradient and nothing watched or
    hooked, the engine's `linear`, which reads them at full memory speed; else the layer is called.
    """
    if type(layer) is not nn.Linear or x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        return layer(x)
    weight, bias = layer.weight, layer.bias
    trained = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    if weight.dtype != x.dtype or is_altered(layer) or is_watched() or (trained and torch.is_grad_enabled()):
        return layer(x)
    fast = engine_for("16-bit")
    y = fast and fast.linear(x.reshape(-1, x.shape[-1]).contiguous(), weight, None, 16, bias)
    return layer(x) if y is None else y.view(*x.shape[:-1], weight.shape[0])


# ---- PyTorch's own products with INT8 and INT4 weights, where the engine does not serve -----------------------------
def product_of_torch(x, weight, scale, bits, bias, copies) -> Tensor | None:
    """`product` in bfloat16; scales of whole rows are applied afterwards, where they are not rounded.

    Routes, up to TORCH_ROWS rows of x: INT8 with a scale a row, with a copy of a weight that is not aligned, as in a
    mapped file; INT4, with a copy of the weight in the order that PyTorch wants; else None.
    """
    if len(x) > TORCH_ROWS:
        return None
    if bits == 8 and scale.dim() == 1 and hasattr(torch, "_weight_int8pack_mm"):
        is_aligned = weight.data_ptr() % ALIGNMENT == 0
        aligned = weight if is_aligned else kept_copy(copies, weight, scale, lambda weight, scale: weight.clone())
        if aligned is None:
            return None
        y = torch._weight_int8pack_mm(x.bfloat16(), aligned, scale.new_ones(len(scale), dtype=torch.bfloat16))
    elif bits == 4 and x.shape[1] % INT4_GROUPS[-1] == 0 and has_int4_product():
        packed = kept_copy(copies, weight, scale, packed_copy)
        if packed is None:
            return None
        y = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), *packed)[:, : len(weight)]
    else:
        return None
    y = y.float() if scale.dim() == 2 else y.float() * scale.float()
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def kept_copy(copies: dict | None, weight: Tensor, scale: Tensor, make):
    """make(weight, scale), kept in `copies` as long as the two are the same memory and not written to (PyTorch cannot
    tell of writes through `.data`); None where nothing is to be kept, or writes are not counted, as in inference mode.
    """
    if copies is None or weight.is_inference() or scale.is_inference():
        return None
    of = (weight.data, scale.data)
    state = [(tensor.data_ptr(), tensor._version) for tensor in (weight, scale)]
    kept_state, copy, _ = copies.get("copy", (None, None, None))
    if kept_state != state:
        copies.clear()  # before there is a second one
        with torch.inference_mode(False), torch.no_grad():
            copy = make(*of)
        copies["copy"] = state, copy, of  # as long as `of` lives, nothing else gets its memory
    return copy


def packed_copy(weight: Tensor, scale: Tensor) -> tuple[Tensor, int, Tensor]:
    """What PyTorch's INT4 product takes: the weight in its order, its rows filled up to a multiple of INT4_BLOCK;
    columns a scale; scales and zero points [groups, rows, 2] bfloat16, with ones for scales of whole rows."""
    columns, missing = 2 * weight.shape[1], -len(weight) % INT4_BLOCK
    at_once = max(INT4_BLOCK, PACKED_AT_ONCE // columns // INT4_BLOCK * INT4_BLOCK)
    parts = [F.pad(unpack_int4(part), (0, 0, 0, -len(part) % INT4_BLOCK)) for part in weight.split(at_once)]
    packed = torch.cat([torch._convert_weight_to_int4pack_for_cpu(part.to(torch.int32) + 8, 1) for part in parts])
    if scale.dim() == 1:
        scale = scale.new_ones(len(scale), columns // next(group for group in INT4_GROUPS if columns % group == 0))
    scales = F.pad(scale.T, (0, missing)).bfloat16()
    return packed, columns // scale.shape[1], torch.stack((scales, torch.zeros_like(scales)), dim=-1)


@functools.cache
def has_int4_product() -> bool:
    """Whether this PyTorch has its INT4 product for CPUs and computes a small one right; if not, one line says so."""
    weight = torch.arange(INT4_BLOCK * 64, device="cpu").mul(167).to(torch.int8).view(INT4_BLOCK, 64)
    ones = torch.ones(INT4_BLOCK, 1, dtype=torch.float32, device="cpu")
    x = torch.arange(-64, 64, device="cpu").bfloat16()[None]  # whole numbers: only the result is rounded
    expected = (x.double() @ unpack_int4(weight).double().T).bfloat16()
    try:
        is_right = torch.equal(torch._weight_int4pack_mm_for_cpu(x, *packed_copy(weight, ones)), expected)
    except (AttributeError, RuntimeError):
        is_right = False
    if not is_right:
        warn_once("INT4 weights are unpacked for each product: PyTorch's INT4 product does not serve")
    return is_right


# ---- What stands between the products -------------------------------------------------------------------------------
def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """query [B, H, S, D], key and value [B, H, K, D] -> [B, H, S, D].

    Routes: the engine's, which serves one new token of any type and long prompts in bfloat16; else PyTorch's.
    """
    fast = by_engine("attention", query, key, value, visible)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible) if fast is None else fast


def gelu(states: Tensor) -> Tensor:
    """In the tanh form. Routes: the engine's in 16 bit, in half the time; else PyTorch's."""
    fast = by_engine("gelu", states)
    return F.gelu(states, approximate="tanh") if fast is None else fast


# ---- A whole decode step --------------------------------------------------------------------------------------------
def decode_step(blocks: nn.ModuleList, final_norm, hidden: Tensor, rotary, visible, cache, kinds) -> Tensor | None:
    """The output [B, 1, hidden] of all blocks and the final norm for one new token; None: call the modules.

    Routes: the engine's `decode_program`, for some sequences on a CPU, without gradients, in a cache that is written
    in place, through 16-bit or quantized layers, as long as the modules are what `described` knows; else None.

    hidden: [B, 1, hidden], the embedding; rotary: the tables of its position, of hidden's type; visible: None, or bool
    [B, 1, 1, K]; cache: holds all other tokens and gets this one, behind them or, where it has `ends` [B], there;
    kinds: the classes of block, attention, MLP, and quantized layer.
    """
    ends = getattr(cache, "ends", None)
    fits = type(hidden) is Tensor and (ends is not None or isinstance(cache, GrowingCache))
    if not fits or torch.is_grad_enabled() or is_watched() or engine() is None:
        return None
    network = described(blocks, final_norm, kinds)
    if network is None or network.heads * network.head_size != hidden.shape[2]:
        return None
    new = hidden.view(len(hidden), network.heads, 1, network.head_size)
    layers = [block.attention.layer_idx for block in blocks]
    expected = (*new.shape[:2], cached_length(cache), new.shape[3])  # as many tokens in every layer, keys and values
    if ends is None and any([x.shape for x in cached_states(cache, i)] != [expected] * 2 for i in layers):
        return None
    sizes = (len(hidden), hidden.dtype, rotary[0].shape[4], visible is not None)
    step = engine().decode_program(blocks, network, *sizes)
    if step is None:
        return None
    states = [cache.update(new, new, layer_idx) for layer_idx in layers]  # makes room: the step writes the numbers
    cos, sin = (table[..., -1, :].flatten(1) for table in rotary)
    return step.run(hidden[:, 0], cos, sin, states, ends, visible).unsqueeze(1)


def described(blocks: nn.ModuleList, final_norm: nn.Module, kinds: tuple[type, type, type, type]):
    """The network as the engine's `Network` wants it, tensors and numbers; None where calling the modules would do
    anything else than their classes say. Read at each step, so it takes no detours."""
    *networks, quantized = kinds
    norms, products, values, sizes = (nn.LayerNorm,), (nn.Linear, quantized), [], set()

    def add(kinds, *modules) -> None:
        for module in modules:
            kind, own = type(module), module._parameters
            if kind not in kinds or is_altered(module):
                raise TypeError
            if kind is nn.LayerNorm:
                values.extend((own["weight"], own["bias"], float(module.eps)))
            elif kind is nn.Linear:
                values.extend((own["weight"], own["bias"], None, 16))
            elif kind is quantized:
                values.extend((own["weight"], own["bias"], own["weight_scale"], module.bits))

    try:
        for block in blocks:
            attention, mlp = block.attention, block.mlp
            add(networks, block, attention, mlp)
            sizes.add((attention.heads, attention.head_size))
            values.append(float(block.residual_scale))
            add(norms, block.input_layernorm)
            add(products, attention.query_key_value, attention.dense)
            add(norms, block.post_attention_layernorm)
            add(products, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
        add(norms, final_norm)
    except (AttributeError, KeyError, TypeError):  # a module of another kind
        return None
    return engine().Network(*sizes.pop(), values) if len(sizes) == 1 else None
