"""One token through all layers of the network in one call: a program of kernels.

Between two products of a decode step there is little to compute, yet in PyTorch each of some forty operations a layer
costs more than its arithmetic, and meanwhile no weight is read. Here the products and three small kernels run one
behind the other without coming back to Python. Activations are rounded where the network rounds them; sums, and what
only the next kernel reads, stay float32.

A program is made for a description of the network, tensors and numbers, at its first decode step. Each further step
brings its description along: another weight, scale or number leads to another program. The memory of the described
tensors is held while a step runs, and only then.
"""

from __future__ import annotations

import struct
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .crowding import Watch
from .ir import CHUNK, LARGEST_HEAD, Arguments, Variant
from .kernels import (
    GEMV_ROWS,
    additive,
    attention_arguments,
    gelu_arguments,
    gemv_arguments,
    gemv_variant,
    is_served,
    is_vector,
    tried_gelu,
    tried_product,
)
from .routes import program_dots
from .runtime import (
    IR_TYPES,
    WORD,
    Trial,
    aligned_address,
    argument_words,
    available_cores,
    dtype_of,
    empty,
    instruction_set,
    kernel_address,
    launch,
    nap_function,
    noise,
    run,
    scratch_size,
    step_address,
)
from .steps import attention_scratch

LAYER_VALUES = 23  # of a layer's description: its factor, two norms, four products
MOST_SEQUENCES = GEMV_ROWS
PATIENCE = (
    200_000  # cycles, some 70 microseconds, that a thread waits on its core; longer than the last task of a kernel
)

_programs: weakref.WeakKeyDictionary[object, Programs] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


# ---------------------------------------------------------------------------------------------- what is described


class Norm(NamedTuple):
    """LayerNorm: (x - mean) / sqrt(variance + epsilon) * weight + bias, of vectors [width]."""

    weight: Tensor
    bias: Tensor
    epsilon: float


class Product(NamedTuple):
    """x @ (scale * weight).T + bias: weight and scale as routes.linear takes them; bits 4, 8 or 16."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    bits: int


class Layer(NamedTuple):
    """a = norm(x); b = norm_after(factor * a + dense(attention(query_key_value(a))));
    y = factor * b + down(gelu(up(b)))."""

    factor: float
    norm: Norm
    query_key_value: Product  # [heads, 3, head_size] outputs
    dense: Product
    norm_after: Norm
    up: Product
    down: Product

    @classmethod
    def of(cls, factor: float, *rest) -> Layer:
        """From one row of a description."""
        before = (Norm(*rest[:3]), Product(*rest[3:7]), Product(*rest[7:11]))
        return cls(factor, *before, Norm(*rest[11:14]), Product(*rest[14:18]), Product(*rest[18:22]))


class Network(NamedTuple):
    """A description, which is made and read at each step: therefore without further objects.

    values: for each layer the LAYER_VALUES fields of Layer and its parts, one behind the other; then the final Norm's.
    """

    heads: int
    head_size: int
    values: list[Tensor | float | int | None]

    def parts(self) -> tuple[list[Layer], Norm]:
        rows = range(0, len(self.values) - 3, LAYER_VALUES)
        return [Layer.of(*self.values[row : row + LAYER_VALUES]) for row in rows], Norm(*self.values[-3:])


def decode_program(
    owner: object,
    network: Network,
    sequences: int,
    dtype: torch.dtype,
    position_rows: int,
    masked: bool = False,
) -> Step | None:
    """The step of `network` for one new token of each of up to MOST_SEQUENCES sequences, or None where that is not
    served, or not the fastest.

    owner: whose life the program shares; each has its own. dtype: of the activations, to which sums are rounded.
    position_rows: into how many parts, each of two halves, a head is split for rotary positions. masked: whether the
    step will be told which keys are visible.

    Served: CPU tensors of one width, a multiple of 128, all products with a bias, heads of 32, 64, ... 256 numbers
    that fill the width.
    """
    if not instruction_set():
        return None
    held = hold(network.values)
    if held is None:
        return None
    values, state = held
    state += network[:2]
    purpose = Purpose(sequences, dtype, position_rows, masked, torch.get_num_threads())
    with _lock:
        programs = _programs.setdefault(owner, Programs(threading.Lock(), {}))
    with programs.lock:
        program = programs.by_purpose.get(purpose)
        if program is None or program.state != state:
            with torch.inference_mode(False):  # its buffers outlive the mode of their first use
                program = programs.by_purpose[purpose] = Program(network._replace(values=values), purpose, state)
    return Step(program, network._replace(values=values)) if program.is_complete else None


class Step(NamedTuple):
    """One decode step to come: the program, and the memory that it reads."""

    program: Program
    network: Network

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        states: list[tuple[Tensor, Tensor]],
        ends: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """hidden [B, width], cos and sin of each row's angles [B, head_size / 2], and for each layer the keys and the
        values [B, H, T, D] -> [B, width] after the final norm.

        The new token's keys and values are written at `ends` [B] of each sequence, by default T - 1, and what is
        behind is not read; visible: bool [B, 1, 1, T], for programs that are masked. Tokens of one head are
        contiguous; T is the same in all layers.

        Raises:
            ValueError: keys, values or ends of another kind, with which memory beyond their end would be read.
        """
        heads, size, values = self.network
        layers, tokens = len(values) // LAYER_VALUES, states[0][0].shape[2]
        expected = (len(hidden), heads, tokens, size)
        if len(states) != layers or any(
            x.shape != expected or x.stride()[2:] != (size, 1) or x.dtype != hidden.dtype for kv in states for x in kv
        ):
            raise ValueError(f"keys and values of {layers} layers have to be {expected} each, tokens side by side")
        ends = torch.full((len(hidden),), tokens - 1, device="cpu") if ends is None else ends
        if ends.shape != (len(hidden),) or not 0 <= int(ends.min()) <= int(ends.max()) < tokens:
            raise ValueError(f"ends has to hold a place below {tokens} for each of {len(hidden)} sequences: {ends}")
        mask = additive(visible, len(hidden), tokens) if self.program.purpose.masked else None
        return self.program.run(hidden, cos, sin, states, ends, mask)


def hold(values: list) -> tuple[list, list] | None:
    """The same values with the tensors' memory under names of its own, and all that a program depends on; None for
    tensors of another kind. Asked for at each step, so it takes no detours."""
    held, state = [], []
    for value in values:
        if type(value) in (Tensor, nn.Parameter) and value.is_cpu:
            value = value.data
            state += (value.data_ptr(), value.dtype, value.shape, value.stride())
        elif isinstance(value, Tensor):
            return None
        else:
            state.append(value)
        held.append(value)
    return held, state


# ---------------------------------------------------------------------------------------------- the program


class Programs(NamedTuple):
    """Of one owner. They hold addresses of its tensors, and nothing that would keep those alive."""

    lock: threading.Lock
    by_purpose: dict[Purpose, Program]


class Purpose(NamedTuple):
    sequences: int
    dtype: torch.dtype  # of the activations
    position_rows: int
    masked: bool
    threads: int


class Kernel(NamedTuple):
    """One kernel of a program."""

    variant: Variant
    trial: Trial
    scratch: int
    arguments: dict[str, Tensor | int]


class Program:
    """The kernels of all layers in order with their arguments, and the buffers between them."""

    def __init__(self, network: Network, purpose: Purpose, state: list):
        self.purpose, self.state = purpose, state
        self.lock = threading.Lock()  # there is one set of buffers
        self.watch = Watch(purpose.threads)
        self.is_complete = is_served_network(network, purpose)
        if self.is_complete:
            self._assemble(list(self._kernels(network)), len(network.values) // LAYER_VALUES)

    def run(self, hidden: Tensor, cos: Tensor, sin: Tensor, states: list, ends: Tensor, mask: Tensor | None) -> Tensor:
        with self.lock:
            tokens = states[0][0].shape[2]
            if attention_scratch(tokens) > self.scratch:
                self._allocate_scratch(attention_scratch(tokens + 1024))
            self.hidden.copy_(hidden)
            self.cos.copy_(cos)
            self.sin.copy_(sin)
            self.lengths.copy_(ends).add_(1)
            self.table[:, : len(Arguments.COUNTERS)] = 0
            self.words[: len(Arguments.COUNTERS)] = 0
            arguments = [attention_arguments(*of_layer) for of_layer in states]
            words = torch.tensor([list(of_layer.values()) for of_layer in arguments], device="cpu")
            self.attention[:, [WORD[name] for name in arguments[0]]] = words
            self.attention[:, WORD["mask"]] = 0 if mask is None else mask.data_ptr()
            launch(self.address, self.words.data_ptr(), self.purpose.threads)
            self.watch.step()
            return self.normed.clone()

    # --- assembling ----------------------------------------------------------------------------------------------

    def _kernels(self, network: Network) -> Iterator[Kernel]:
        """Makes the buffers; yields the norm before the first layer, then the kernels of each."""
        sequences, dtype, position_rows, *_ = self.purpose
        size, (layers, final_norm) = network.head_size, network.parts()
        width, inner = final_norm.weight.shape[0], layers[0].up.weight.shape[0]
        self.hidden, self.normed, self.context = (empty(sequences, width, dtype=dtype) for _ in range(3))
        self.inner = empty(sequences, inner, dtype=dtype)
        self.sums = empty(sequences * max(3 * width, inner))  # of the last product, float32
        self.cos, self.sin = (empty(sequences, size // 2, dtype=dtype) for _ in range(2))
        self.lengths = torch.empty(sequences, dtype=torch.int64, device="cpu")
        self.zeros = torch.zeros(sequences, width, dtype=torch.float32, device="cpu")
        norms = [layer.norm for layer in layers] + [final_norm]
        yield self._norm(self.hidden, 1.0, self.zeros, self.zeros, norms[0])
        for layer, norm_after in zip(layers, norms[1:]):
            yield self._product(self.normed, layer.query_key_value)
            yield self._attention(layer.query_key_value.bias, size, position_rows)
            yield self._product(self.context, layer.dense)
            yield self._norm(self.normed, layer.factor, self.sums, layer.dense.bias, layer.norm_after)
            yield self._product(self.normed, layer.up)
            yield self._gelu(layer.up.bias)
            yield self._product(self.inner, layer.down)
            yield self._norm(self.normed, layer.factor, self.sums, layer.down.bias, norm_after)

    def _product(self, x: Tensor, product: Product) -> Kernel:
        weight = (product.weight, product.scale, product.bits)
        variant = gemv_variant(x, *weight, program_dots(x, *weight))
        arguments = gemv_arguments(x, product.weight, product.scale, self.sums)
        return Kernel(variant, tried_product, variant.gemv_scratch(x.shape[1]), arguments)

    def _norm(self, residual: Tensor, factor: float, x: Tensor, bias: Tensor, norm: Norm) -> Kernel:
        types = ("", IR_TYPES[norm.weight.dtype], IR_TYPES[residual.dtype])
        arguments = norm_arguments(residual, factor, x, bias, norm.weight, norm.bias, norm.epsilon, self.normed)
        variant = Variant("residual_norm", instruction_set(), 16, 0, *types, bias=IR_TYPES[bias.dtype])
        return Kernel(variant, tried_norm, residual.shape[1], arguments)

    def _attention(self, bias: Tensor, size: int, position_rows: int) -> Kernel:
        variant = Variant(
            *("rotary_attention", instruction_set(), 16, 0, "", "", IR_TYPES[self.purpose.dtype]),
            bias=IR_TYPES[bias.dtype],
            head_size=size,
            position_rows=position_rows,
            masked=self.purpose.masked,
        )
        arguments = {"x": self.sums, "bias": bias, "cos": self.cos, "sin": self.sin, "y": self.context}
        arguments["lengths"] = self.lengths
        arguments.update(rows=0, task_rows=1)
        return Kernel(variant, tried_rotary_attention, attention_scratch(1024), arguments)

    def _gelu(self, bias: Tensor) -> Kernel:
        bias_type, inner_type = IR_TYPES[bias.dtype], IR_TYPES[self.purpose.dtype]
        variant = Variant("gelu", instruction_set(), 16, 0, "", "float", inner_type, bias=bias_type)
        return Kernel(variant, tried_gelu, 0, gelu_arguments(self.sums, bias, self.inner))

    def _assemble(self, kernels: list[Kernel], layers: int) -> None:
        trials = {kernel.variant: kernel.trial for kernel in kernels}
        addresses = {variant: kernel_address(variant, trial) for variant, trial in trials.items()}
        self.address = kernel_address(Variant("program", instruction_set(), 16, 0, "", "", ""), None)
        nap = nap_function()
        self.is_complete = None not in (self.address, nap, *addresses.values())
        if not self.is_complete:
            return
        words = [argument_words(self.purpose.threads, kernel.arguments) for kernel in kernels]
        self.table = torch.tensor(words, dtype=torch.int64, device="cpu")
        first = next(i for i, kernel in enumerate(kernels) if kernel.variant.kind == "rotary_attention")
        self.attention = self.table[first :: (len(kernels) - 1) // layers]
        self._allocate_scratch(max(kernel.scratch for kernel in kernels))
        width = self.table.stride(0) * self.table.element_size()
        steps = {variant: step_address(variant) for variant in addresses}
        places = [[steps[kernel.variant], self.table.data_ptr() + i * width] for i, kernel in enumerate(kernels)]
        self.places = torch.tensor(places, dtype=torch.int64, device="cpu")
        patience = PATIENCE if self.purpose.threads <= available_cores() else 0
        of_program = {"weight": self.places, "rows": len(kernels), "nap": nap, "patience": patience}
        self.words = torch.tensor(argument_words(1, of_program), dtype=torch.int64, device="cpu")

    def _allocate_scratch(self, scratch: int) -> None:
        self.scratch, self.memory = scratch, empty(scratch_size(self.purpose.threads, scratch))
        self.table[:, WORD["scratch"]] = aligned_address(self.memory)


def is_served_network(network: Network, purpose: Purpose) -> bool:
    """Whether types and shapes are those of kernels."""
    heads, size, (layers, final_norm) = *network[:2], network.parts()
    if purpose.dtype not in IR_TYPES or purpose.sequences > MOST_SEQUENCES or not layers:
        return False
    width, inner = heads * size, layers[0].up.weight.shape[0]
    if size % 32 or size > LARGEST_HEAD or size % (4 * purpose.position_rows):
        return False
    for layer in layers:
        products = ((layer.query_key_value, 3 * width, width), (layer.dense, width, width))
        products += ((layer.up, inner, width), (layer.down, width, inner))
        if not all(is_served_product(*product, purpose) for product in products):
            return False
        if not (is_served_norm(layer.norm, width) and is_served_norm(layer.norm_after, width)):
            return False
    return is_served_norm(final_norm, width)


def is_served_product(product: Product, rows: int, columns: int, purpose: Purpose) -> bool:
    weight, bias, scale, bits = product
    if not is_vector(bias) or bias.shape != (rows,) or (bits == 16 and weight.dtype != purpose.dtype):
        return False
    x = empty(purpose.sequences, columns, dtype=purpose.dtype)
    stored = (rows, columns * bits // 8 if bits < 16 else columns)
    fits = weight.shape == stored and is_served(x, weight, scale, bits)
    return fits and program_dots(x, weight, scale, bits) is not None


def is_served_norm(norm: Norm, width: int) -> bool:
    vectors = (norm.weight, norm.bias)
    return all(is_vector(v) and v.shape == (width,) and v.dtype == norm.weight.dtype for v in vectors)


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
    """Two sequences of two heads, one with 36 tokens before and one with 20, some of which are hidden from a masked
    kernel; the result is the context, and the new keys and values."""
    size, rows, dtype, heads = variant.head_size, variant.position_rows, dtype_of(variant.x), 2
    x, bias = noise(2, heads, 3, size), noise(heads, 3, size, dtype=dtype_of(variant.bias))
    x[0, 0] *= 20  # scores whose exponentials need the largest one subtracted
    states, context = noise(4, heads, 40, size).to(dtype), empty(2, heads, size, dtype=dtype)
    key, value = states[:, :, :37].split(2)
    lengths, row = torch.tensor([37, 21], device="cpu"), torch.arange(2, device="cpu")
    visible = torch.arange(37, device="cpu") < lengths[:, None]
    visible[0, 5:9] &= not variant.masked
    mask = additive(visible[:, None, None], 2, 37) if variant.masked else None
    angles = 3 * noise(2, rows, size // rows // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    places = {"x": x, "bias": bias, "cos": cos, "sin": sin, "y": context, "lengths": lengths, "mask": mask}
    run(address, attention_scratch(37), **places, **attention_arguments(key, value))
    fused = x.double() + bias.double()
    a, b = fused[:, :, :2].unflatten(-1, (rows, 2, -1)).unbind(-2)
    c, s = (table.double()[:, None, None] for table in (cos, sin))
    new_query, new_key = torch.stack((a * c - b * s, b * c + a * s), -2).flatten(-3).unbind(2)
    key, value = key.double(), value.double()
    written = torch.stack((key[row, :, lengths - 1], value[row, :, lengths - 1]))
    expected = torch.stack((new_key, fused[:, :, 2]))
    key[row, :, lengths - 1], value[row, :, lengths - 1] = expected
    scores = (new_query[:, :, None] @ key.mT / size**0.5).masked_fill(~visible[:, None, None], float("-inf"))
    exact, magnitude = scores.softmax(-1) @ value, scores.softmax(-1) @ value.abs()
    eps = torch.finfo(dtype).eps
    doubt = eps * (new_query[:, :, None].abs() @ key.abs().mT / size**0.5).amax(-1, keepdim=True)
    bounds = ((3e-5 + eps + 3 * doubt) * magnitude, 1e-5 + (1e-5 + eps) * expected.abs())
    y, exact, bound = (
        torch.cat([part.flatten() for part in parts])
        for parts in ((context.double(), written), (exact, expected), bounds)
    )
    return y, exact, bound
