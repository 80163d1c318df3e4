"""One token through all blocks of the network in one call: a program of CPU kernels.

Between two products of a decode step there is little to compute, yet in PyTorch each of some forty operations a block
costs more than its arithmetic, and meanwhile no weight is read. Here the products of cpu_kernels.py and three small
kernels run one behind the other without coming back to Python. Activations are rounded where the network rounds them;
sums, and what only the next kernel reads, stay float32.

A program belongs to a list of blocks and is made at its first decode step. At each step all that it depends on is
compared: a new weight, a hook, an adapter leads to another program or to the plain way, which serves everything else.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch

from .compat import cached_states, grows_in_place, reserve
from .cpu_kernel_ir import CHUNK, LARGEST_HEAD, Arguments, Variant
from .cpu_kernels import (
    GEMV_ROWS,
    attention_arguments,
    gelu_arguments,
    gemv_arguments,
    gemv_variant,
    is_served,
    is_vector,
    tried_gelu,
    tried_product,
)
from .cpu_runtime import (
    IR_TYPES,
    WORD,
    Trial,
    aligned_address,
    argument_words,
    dtype_of,
    empty,
    instruction_set,
    is_plain,
    kernel_address,
    launch,
    noise,
    openmp_function,
    run,
    scratch_size,
)
from .cpu_step_ir import attention_scratch
from .quantization import Linear, QuantizedLinear

PARTS = ("input_layernorm", "attention", "post_attention_layernorm", "mlp")
ATTENTION_PARTS, MLP_PARTS = ("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
LEAVES = (nn.LayerNorm, Linear, QuantizedLinear)
STEPS, ATTENTION = 8, 2  # kernels of a block, behind the norm that comes before the first; attention's place there

_programs: weakref.WeakKeyDictionary[nn.Module, Programs] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def decode_step(
    blocks: nn.ModuleList, final_norm: nn.LayerNorm, hidden: Tensor, rotary, cache, kinds: tuple[type, type, type]
) -> Tensor | None:
    """The output [B, 1, hidden] of all blocks and the final norm for one new token; None where that is not served.

    hidden: [B, 1, hidden], the embedding; rotary: the tables of its position, of hidden's type; cache: holds all other
    tokens, all of them visible, and gets this one; kinds: the classes of block, attention and MLP. Served: up to four
    sequences on a CPU, without gradients, in a cache that grows in place, through 16-bit or quantized layers that
    nobody has replaced or hooked.
    """
    if torch.is_grad_enabled() or not grows_in_place(cache) or not is_plain(hidden) or not instruction_set():
        return None
    state = network_state(blocks, final_norm, kinds)
    if state is None:
        return None
    cos, sin = (table[..., -1, :].flatten(1) for table in rotary)
    purpose = Purpose(hidden.shape[0], hidden.dtype, rotary[0].shape[4], torch.get_num_threads())
    with _lock:
        programs = _programs.setdefault(blocks, Programs(threading.Lock(), {}))
    with programs.lock:
        program = programs.by_purpose.get(purpose)
        if program is None or program.state != state:
            with torch.inference_mode(False):  # its buffers outlive the mode of their first use
                program = programs.by_purpose[purpose] = Program(blocks, final_norm, purpose, state)
        return program.run(hidden, cos, sin, cache) if program.is_complete and program.fits(cache) else None


class Programs(NamedTuple):
    """Of one list of blocks. They hold addresses of its tensors, and nothing that would keep those alive."""

    lock: threading.Lock  # a program has one set of buffers
    by_purpose: dict[Purpose, Program]


class Purpose(NamedTuple):
    sequences: int
    dtype: torch.dtype  # of the activations
    position_rows: int
    threads: int


class Step(NamedTuple):
    """One kernel of a program."""

    variant: Variant
    trial: Trial
    scratch: int
    arguments: dict[str, Tensor | int]


class Program:
    """The kernels of all blocks in order with their arguments, and the buffers between them."""

    def __init__(self, blocks: nn.ModuleList, final_norm: nn.LayerNorm, purpose: Purpose, state: list):
        self.purpose, self.state = purpose, state
        self.layers = [block.attention.layer_idx for block in blocks]
        self.is_complete = is_served_network(blocks, final_norm, purpose)
        if self.is_complete:
            self._assemble(list(self._steps(blocks, final_norm)))

    def fits(self, cache) -> bool:
        """Whether the cache holds keys and values of the right shape, as many in every layer."""
        sequences, heads, _, size = self.new_states.shape
        shapes = {states.shape for layer_idx in self.layers for states in cached_states(cache, layer_idx)}
        return len(shapes) == 1 and shapes <= {(sequences, heads, tokens, size) for _, _, tokens, size in shapes}

    def run(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache) -> Tensor:
        tokens = 1 + cached_states(cache, self.layers[0])[0].shape[2]
        if attention_scratch(tokens) > self.scratch:
            self._allocate_scratch(attention_scratch(tokens + 1024))
        self.hidden.copy_(hidden[:, 0])
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        self.table[:, : len(Arguments.COUNTERS)] = 0
        states = [reserve(cache, layer_idx, self.new_states) for layer_idx in self.layers]
        arguments = [attention_arguments(*layer) for layer in states]
        words = torch.tensor([list(of_layer.values()) for of_layer in arguments], device="cpu")
        self.attention[:, [WORD[name] for name in arguments[0]]] = words
        launch(self.address, self.words.data_ptr(), self.purpose.threads)
        return self.normed.clone().unsqueeze(1)

    # --- assembling ----------------------------------------------------------------------------------------------

    def _steps(self, blocks: nn.ModuleList, final_norm: nn.LayerNorm) -> Iterator[Step]:
        """Makes the buffers; yields the norm before the first block, then the STEPS of each."""
        sequences, dtype, position_rows, _ = self.purpose
        attention, mlp = blocks[0].attention, blocks[0].mlp
        width, inner = final_norm.weight.shape[0], mlp.dense_h_to_4h.out_features
        self.hidden, self.normed, self.context = (empty(sequences, width, dtype=dtype) for _ in range(3))
        self.inner = empty(sequences, inner, dtype=dtype)
        self.sums = empty(sequences * max(3 * width, inner))  # of the last product, float32
        self.cos, self.sin = (empty(sequences, attention.head_size // 2, dtype=dtype) for _ in range(2))
        self.new_states = empty(sequences, attention.heads, 1, attention.head_size, dtype=dtype)
        self.zeros = torch.zeros(sequences, width, dtype=torch.float32, device="cpu")
        norms = [block.input_layernorm for block in blocks] + [final_norm]
        yield self._norm(self.hidden, 1.0, self.zeros, self.zeros, norms[0])
        for block, norm_after in zip(blocks, norms[1:]):
            attention, mlp, scale = block.attention, block.mlp, block.residual_scale
            yield self._product(self.normed, attention.query_key_value)
            yield self._attention(attention, position_rows)
            yield self._product(self.context, attention.dense)
            yield self._norm(self.normed, scale, self.sums, attention.dense.bias, block.post_attention_layernorm)
            yield self._product(self.normed, mlp.dense_h_to_4h)
            yield self._gelu(mlp.dense_h_to_4h.bias)
            yield self._product(self.inner, mlp.dense_4h_to_h)
            yield self._norm(self.normed, scale, self.sums, mlp.dense_4h_to_h.bias, norm_after)

    def _product(self, x: Tensor, layer: Linear | QuantizedLinear) -> Step:
        scale, bits = weight_format(layer)
        variant = gemv_variant(x, layer.weight, scale, bits)
        arguments = gemv_arguments(x, layer.weight, scale, self.sums)
        return Step(variant, tried_product, variant.gemv_scratch(x.shape[1]), arguments)

    def _norm(self, residual: Tensor, factor: float, x: Tensor, bias: Tensor, norm: nn.LayerNorm) -> Step:
        types = ("", IR_TYPES[norm.weight.dtype], IR_TYPES[residual.dtype])
        arguments = norm_arguments(residual, factor, x, bias, norm.weight, norm.bias, norm.eps, self.normed)
        variant = Variant("residual_norm", instruction_set(), 16, 0, *types, bias=IR_TYPES[bias.dtype])
        return Step(variant, tried_norm, residual.shape[1], arguments)

    def _attention(self, attention: nn.Module, position_rows: int) -> Step:
        bias = attention.query_key_value.bias
        variant = Variant(
            *("rotary_attention", instruction_set(), 16, 0, "", "", IR_TYPES[self.purpose.dtype]),
            bias=IR_TYPES[bias.dtype],
            head_size=attention.head_size,
            position_rows=position_rows,
        )
        arguments = {"x": self.sums, "bias": bias, "cos": self.cos, "sin": self.sin, "y": self.context}
        return Step(variant, tried_rotary_attention, attention_scratch(1024), {**arguments, "rows": 0, "task_rows": 1})

    def _gelu(self, bias: Tensor) -> Step:
        bias_type, inner_type = IR_TYPES[bias.dtype], IR_TYPES[self.purpose.dtype]
        variant = Variant("gelu", instruction_set(), 16, 0, "", "float", inner_type, bias=bias_type)
        return Step(variant, tried_gelu, 0, gelu_arguments(self.sums, bias, self.inner))

    def _assemble(self, steps: list[Step]) -> None:
        trials = {step.variant: step.trial for step in steps}
        addresses = {variant: kernel_address(variant, trial) for variant, trial in trials.items()}
        self.address = kernel_address(Variant("program", instruction_set(), 16, 0, "", "", ""), None)
        barrier = openmp_function("GOMP_barrier")
        self.is_complete = None not in (self.address, barrier, *addresses.values())
        if not self.is_complete:
            return
        words = [argument_words(self.purpose.threads, step.arguments) for step in steps]
        self.table = torch.tensor(words, dtype=torch.int64, device="cpu")
        self.attention = self.table[ATTENTION::STEPS]
        self._allocate_scratch(max(step.scratch for step in steps))
        width = self.table.stride(0) * self.table.element_size()
        places = [[addresses[step.variant], self.table.data_ptr() + i * width] for i, step in enumerate(steps)]
        self.places = torch.tensor(places, dtype=torch.int64, device="cpu")
        of_program = {
            "weight": self.places,
            "rows": len(steps),
            "barrier": ctypes.cast(barrier, ctypes.c_void_p).value,
        }
        self.words = torch.tensor(argument_words(1, of_program), dtype=torch.int64, device="cpu")

    def _allocate_scratch(self, scratch: int) -> None:
        self.scratch, self.memory = scratch, empty(scratch_size(self.purpose.threads, scratch))
        self.table[:, WORD["scratch"]] = aligned_address(self.memory)


def network_state(blocks: nn.ModuleList, final_norm: nn.Module, kinds: tuple[type, type, type]) -> list | None:
    """All that a program depends on, as values: the numbers of the modules, and where and in what form their tensors
    lie. Asked for at each step, so it takes no detours.

    Returns:
        None where calling the modules would do anything else than what their classes say.
    """
    if any(getattr(modules_of_torch, name, None) for name in GLOBAL_HOOKS):
        return None
    state: list = []
    leaves = [final_norm]
    for block in blocks._modules.values():
        if type(block) is not kinds[0] or tuple(block._modules) != PARTS:
            return None
        norm, attention, norm_after, mlp = block._modules.values()
        if (type(attention), type(mlp)) != kinds[1:] or any(map(is_altered, (block, attention, mlp))):
            return None
        if tuple(attention._modules) != ATTENTION_PARTS or tuple(mlp._modules) != MLP_PARTS:
            return None
        state += (block.residual_scale, attention.layer_idx, attention.heads, attention.head_size)
        leaves += (norm, *attention._modules.values(), norm_after, *mlp._modules.values())
    for leaf in leaves:
        if type(leaf) not in LEAVES or is_altered(leaf):
            return None
        own = leaf.__dict__
        state += (type(leaf), own.get("eps"), own.get("bits"))
        for tensor in leaf._parameters.values():
            if type(tensor) is not nn.Parameter or not tensor.is_cpu:
                return None
            state += (tensor.data_ptr(), tensor.dtype, tensor.numel(), tensor.stride())
    return state


def is_altered(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_served_network(blocks: nn.ModuleList, final_norm: nn.LayerNorm, purpose: Purpose) -> bool:
    """Whether types and shapes are those of kernels; the modules are those that `network_state` accepts."""
    if purpose.dtype not in IR_TYPES or purpose.sequences > GEMV_ROWS or not len(blocks):
        return False
    attention, (width,) = blocks[0].attention, final_norm.normalized_shape
    heads, size, inner = attention.heads, attention.head_size, blocks[0].mlp.dense_h_to_4h.out_features
    if size % 32 or size > LARGEST_HEAD or heads * size != width or size % (4 * purpose.position_rows):
        return False
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        products = {attention.query_key_value: (3 * width, width), attention.dense: (width, width)}
        products.update({mlp.dense_h_to_4h: (inner, width), mlp.dense_4h_to_h: (width, inner)})
        if (attention.heads, attention.head_size) != (heads, size):
            return False
        if not all(is_served_product(layer, *shape, purpose) for layer, shape in products.items()):
            return False
    norms = [norm for block in blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
    return all(is_served_norm(norm, width) for norm in (*norms, final_norm))


def is_served_product(layer: nn.Module, rows: int, columns: int, purpose: Purpose) -> bool:
    if type(layer) not in (Linear, QuantizedLinear) or (layer.out_features, layer.in_features) != (rows, columns):
        return False
    scale, bits = weight_format(layer)
    if layer.bias is None or layer.bias.shape != (rows,) or (bits == 16 and layer.weight.dtype != purpose.dtype):
        return False
    x = empty(purpose.sequences, columns, dtype=purpose.dtype)
    stored = (rows, columns * bits // 8 if bits < 16 else columns)
    return layer.weight.shape == stored and is_vector(layer.bias) and is_served(x, layer.weight, scale, bits)


def is_served_norm(norm: nn.Module, width: int) -> bool:
    if type(norm) is not nn.LayerNorm or norm.normalized_shape != (width,) or norm.bias is None:
        return False
    vectors = (norm.weight, norm.bias)
    return all(is_vector(v) and v.shape == (width,) and v.dtype == norm.weight.dtype for v in vectors)


def weight_format(layer: Linear | QuantizedLinear) -> tuple[Tensor | None, int]:
    """(scale, bits)."""
    return (layer.weight_scale, layer.bits) if type(layer) is QuantizedLinear else (None, 16)


# ---------------------------------------------------------------------------------------------- the small kernels


def float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def norm_arguments(residual, factor: float, x, bias, gamma, beta, epsilon: float, y) -> dict[str, Tensor | int]:
    places = {"residual": residual, "x": x, "bias": bias, "gamma": gamma, "beta": beta, "y": y}
    numbers = {"factor": float_bits(factor), "epsilon": float_bits(epsilon)}
    return {**places, **numbers, "rows": y.shape[0], "chunks": y.shape[1] // CHUNK, "task_rows": 1}


def tried_norm(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    columns, dtype = 3 * CHUNK, dtype_of(variant.x)
    x, residual = noise(3, columns), noise(3, columns).flip(0).to(dtype)
    bias, (gamma, beta) = noise(columns, dtype=dtype_of(variant.bias)), noise(2, columns).to(dtype_of(variant.scale))
    y = empty(3, columns, dtype=dtype)
    run(address, columns, **norm_arguments(residual, 1.5, x, bias, gamma, beta, 0.5, y))
    total = 1.5 * residual.double() + x.double() + bias.double()
    exact = nn.functional.layer_norm(total, (columns,), gamma.double(), beta.double(), 0.5)
    return y, exact, 1e-5 * (1 + exact.abs()) + torch.finfo(dtype).eps * exact.abs()


def tried_rotary_attention(variant: Variant, address: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences of two heads with 36 tokens before; the result is the context, and the new keys and values."""
    size, rows, dtype, heads = variant.head_size, variant.position_rows, dtype_of(variant.x), 2
    x, bias = noise(2, heads, 3, size), noise(heads, 3, size, dtype=dtype_of(variant.bias))
    x[0, 0] *= 20  # scores whose exponentials need the largest one subtracted
    states, context = noise(4, heads, 40, size).to(dtype), empty(2, heads, size, dtype=dtype)
    key, value = states[:, :, :37].split(2)
    angles = 3 * noise(2, rows, size // rows // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    places = {"x": x, "bias": bias, "cos": cos, "sin": sin, "y": context}
    run(address, attention_scratch(37), **places, **attention_arguments(key, value))
    fused = x.double() + bias.double()
    a, b = fused[:, :, :2].unflatten(-1, (rows, 2, -1)).unbind(-2)
    c, s = (table.double()[:, None, None] for table in (cos, sin))
    new_query, new_key = torch.stack((a * c - b * s, b * c + a * s), -2).flatten(-3).unbind(2)
    key, value = key.double(), value.double()
    written = torch.stack((key[:, :, -1], value[:, :, -1]))
    expected = torch.stack((new_key, fused[:, :, 2]))
    key[:, :, -1], value[:, :, -1] = expected
    scores = new_query[:, :, None] @ key.mT / size**0.5
    exact, magnitude = scores.softmax(-1) @ value, scores.softmax(-1) @ value.abs()
    eps = torch.finfo(dtype).eps
    doubt = eps * (new_query[:, :, None].abs() @ key.abs().mT / size**0.5).amax(-1, keepdim=True)
    bounds = ((3e-5 + eps + 3 * doubt) * magnitude, 1e-5 + (1e-5 + eps) * expected.abs())
    y, exact, bound = (
        torch.cat([part.flatten() for part in parts])
        for parts in ((context.double(), written), (exact, expected), bounds)
    )
    return y, exact, bound
