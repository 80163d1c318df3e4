"""INT8 and INT4 weights in the official ChatGLM-6B format, on any device.

A quantized matrix is `weight`, int8 [out, in] or two int4 columns a byte [out, in / 2] (the even column in the high
nibble, two's complement), and `weight_scale` [out], or [out, in / group] with group-wise scales. What computes with it
is chosen in `product`, the one seam: compiled CPU kernels (cpu_kernels.py), CUDA kernels (cuda_kernels.py), or plain
PyTorch with the same numbers. Only INT4 on a CPU without llvmlite is another matter: see QuantizedLinear.packed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_chatglm import GROUP_SIZES
from .cpu_int4pack import Packed, pack, unpack
from .cpu_int4pack import is_served as can_be_packed
from .cpu_int4pack import linear as packed_linear
from .cpu_kernels import dequantize as cpu_dequantize
from .cpu_kernels import linear as cpu_linear
from .cpu_runtime import instruction_set
from .cuda_kernels import dequantize as cuda_dequantize
from .cuda_kernels import linear as cuda_linear
from .cuda_kernels import quantize as cuda_quantize
from .int4 import pack_int4, unpack_int4

LARGEST = {4: 7, 8: 127}
_packing = threading.Lock()
SEARCH_FACTORS = [1 - step / 40 for step in range(17)]  # of the largest value, when the scale is searched: 1.0 ... 0.6


# ---------------------------------------------------------------------------------------------------------------------
# The format: pure functions
# ---------------------------------------------------------------------------------------------------------------------


def quantize_weight(weight: Tensor, bits: int, group_size: int = 0, search: bool = False) -> tuple[Tensor, Tensor]:
    """Rounds a matrix to `bits` with one scale per row, or per group of `group_size` columns.

    Args:
        weight: float [out, in]. The scale is max|w| / 127 (or 7) in its dtype, rounded to float16, or to bfloat16 for
            bfloat16 weights.
        search: try smaller scales too, and keep for each row or group the one with the least squared error.

    Returns:
        int8 [out, in] or packed [out, in / 2], and the scale [out] or [out, in / group_size].
    """
    check_shape(weight.shape[1], bits, group_size)
    groups = weight.unflatten(1, (-1, group_size or weight.shape[1]))  # [out, groups, columns]
    scale = largest_scale(groups, bits)
    if search:
        scale = searched_scale(groups, scale, bits)
    values = rounded(groups, scale, bits).flatten(1)
    return pack_int4(values) if bits == 4 else values, scale.squeeze(2) if group_size else scale.flatten()


def largest_scale(groups: Tensor, bits: int) -> Tensor:
    dtype = torch.bfloat16 if groups.dtype == torch.bfloat16 else torch.float16
    return (groups.abs().amax(dim=2, keepdim=True) / LARGEST[bits]).to(dtype)


def rounded(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The quotient is rounded in the weight's dtype first, as the original does (bfloat16 is too coarse for that)."""
    groups = groups.float() if groups.dtype == torch.bfloat16 else groups
    quotient = torch.where(scale == 0, torch.zeros_like(groups), groups / scale)
    return quotient.round().clamp(-LARGEST[bits], LARGEST[bits]).to(torch.int8)


def searched_scale(groups: Tensor, largest: Tensor, bits: int) -> Tensor:
    best, least = largest, torch.full_like(largest, float("inf"), dtype=torch.float32)
    for factor in SEARCH_FACTORS:
        scale = (largest.float() * factor).to(largest.dtype)
        error = groups.float() - rounded(groups, scale, bits).float() * scale.float()
        error = error.square().sum(dim=2, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def dequantize_weight(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """int8 or packed int4 weights -> [out, in]: integer times scale, computed and rounded once in `dtype`."""
    values = (unpack_int4(weight) if bits == 4 else weight).to(dtype)
    if scale.dim() == 1:
        return values * scale.to(dtype)[:, None]
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.to(dtype)[:, :, None]).flatten(1)


def check_shape(in_features: int, bits: int, group_size: int) -> None:
    if bits not in LARGEST:
        raise ValueError(f"quantize to {bits} bits: only 4 and 8 are supported")
    if bits == 4 and in_features % 2:
        raise ValueError(f"in_features = {in_features}: INT4 packs two columns in a byte, so it must be even")
    if group_size and in_features % group_size:
        raise ValueError(
            f"in_features = {in_features} is not a multiple of group_size = {group_size}: use 0, or a divisor"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The seam: which kernel computes a product
# ---------------------------------------------------------------------------------------------------------------------


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bits: int,
    bias: Tensor | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """x [..., in] times the transposed weight, plus bias -> [..., out] in x's dtype; bits 16 is a plain matrix."""
    # Kernels want contiguous rows, and torch would repeat the weight for each row of a strided batch.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = None
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        y = cpu_linear(rows, weight, scale, bits, bias, int8_activations)
    elif x.device.type == "cuda" and bits != 16 and not torch.compiler.is_compiling():
        y = cuda_linear(rows, weight, scale, bits)
        y = y if y is None or bias is None else y.add_(bias)
    if y is None:
        dense = weight if bits == 16 else dequantize_weight(weight, scale, bits, x.dtype)
        y = F.linear(rows, dense, bias if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], weight.shape[0])


def dequantized(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    kernel = {"cuda": cuda_dequantize, "cpu": cpu_dequantize}.get(weight.device.type)
    fast = kernel(weight, scale, bits, dtype) if kernel is not None else None
    return dequantize_weight(weight, scale, bits, dtype) if fast is None else fast


class FrozenProduct(torch.autograd.Function):
    """`product` with a gradient for x; the weights are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return product(x, weight, scale, bits)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, scale = ctx.saved_tensors
        return gradient @ dequantized(weight, scale, ctx.bits, gradient.dtype), None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The layers
# ---------------------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear layer that reads 16-bit weights at full memory speed on CPUs where a kernel for them exists."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.weight.dtype == torch.float32 or x.dtype != self.weight.dtype:
            return super().forward(x)
        trained = (tensor is not None and tensor.requires_grad for tensor in (x, self.weight, self.bias))
        if torch.is_grad_enabled() and any(trained):
            return super().forward(x)
        return product(x, self.weight, None, 16, self.bias)


class QuantizedLinear(nn.Linear):
    """A linear layer with int8 or int4 weights; adapters that know nn.Linear (PEFT) can wrap it.

    weight: int8 [out, in] or [out, in / 2]; weight_scale: [out] or [out, in / group_size]; bias: [out] or None.

    Where torch's own INT4 product is the best that a CPU has (no llvmlite; it rounds activations to bfloat16),
    `packed` holds the weight in torch's order from the first product on, and `weight` is empty. `restore` brings it
    back, as moving, saving, copying and loading do first.
    """

    quantize_activations = False  # see ChatGLMConfig
    shares_weight = False  # whether an embedding has the same
    packed: Packed | None = None

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int = 0, bias: bool = True, device=None
    ):
        check_shape(in_features, bits, group_size)
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        weight = torch.empty(out_features, in_features * bits // 8, dtype=torch.int8, device=device)
        shape = (out_features, in_features // group_size) if group_size else (out_features,)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(shape, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Linear, bits: int, group_size: int = 0, search: bool = False) -> QuantizedLinear:
        """The same layer with rounded weights, on its device and in its dtype."""
        quantized = cls(layer.in_features, layer.out_features, bits, group_size, layer.bias is not None, device="meta")
        weight, scale = quantized_matrix(layer.weight, bits, group_size, search)
        quantized.weight = nn.Parameter(weight, requires_grad=False)
        quantized.weight_scale = nn.Parameter(scale.to(layer.weight.dtype), requires_grad=False)
        if layer.bias is not None:
            quantized.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return quantized

    def forward(self, x: Tensor) -> Tensor:
        trained = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trained and torch.is_grad_enabled():
            self.restore()
            y = FrozenProduct.apply(x, self.weight, self.weight_scale, self.bits)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if self._may_be_packed(x):
            y = packed_linear(x.reshape(-1, self.in_features), self._pack(), self.weight_scale, self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        self.restore()
        return product(x, self.weight, self.weight_scale, self.bits, self.bias, self.quantize_activations)

    def _may_be_packed(self, x: Tensor) -> bool:
        if self.bits != 4 or self.shares_weight or x.device.type != "cpu" or self.weight.device.type != "cpu":
            return False
        if instruction_set() or "forward" in self.__dict__:  # better kernels; hooked: moved at will
            return False
        return can_be_packed(self.out_features, self.in_features)

    def _pack(self) -> Packed:
        packed = self.packed
        if packed is not None and not self.weight.numel() and packed.scale is self.weight_scale:
            return packed
        with _packing, torch.inference_mode(False), torch.no_grad():
            if not self.weight.numel():  # packed by another thread, or with another scale
                self.weight = nn.Parameter(unpack(self.packed), requires_grad=False)
            self.packed = packed = pack(self.weight, self.weight_scale)
            # A parameter of its own: whoever holds the old one, autograd for instance, keeps it whole.
            self.weight = nn.Parameter(self.weight.new_empty(self.out_features, 0), requires_grad=False)
        return packed

    def restore(self) -> None:
        """Brings the official `weight` back."""
        if self.packed is None:
            return
        with _packing, torch.inference_mode(False), torch.no_grad():
            if self.packed is not None and not self.weight.numel():
                self.weight = nn.Parameter(unpack(self.packed), requires_grad=False)
            self.packed = None

    def __getstate__(self):
        self.restore()  # the packed order is this processor's
        return self.__dict__.copy()

    def _apply(self, function, *arguments, **named):
        self.restore()
        return super()._apply(function, *arguments, **named)

    def _save_to_state_dict(self, *arguments):
        self.restore()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments):
        self.restore()
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        names = ("in_features", "out_features", "bits", "group_size")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class QuantizedEmbedding(nn.Module):
    """An embedding with int8 or int4 rows, which the head can share; the tensors are those of QuantizedLinear."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, group_size: int = 0, device=None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        rows = QuantizedLinear(embedding_dim, num_embeddings, bits, group_size, bias=False, device=device)
        self.weight, self.weight_scale = rows.weight, rows.weight_scale

    def forward(self, ids: Tensor) -> Tensor:
        rows, scale = self.weight[ids.flatten()], self.weight_scale[ids.flatten()]
        return dequantize_weight(rows, scale, self.bits, scale.dtype).view(*ids.shape, self.embedding_dim)


def quantized_matrix(weight: Tensor, bits: int, group_size: int = 0, search: bool = False) -> tuple[Tensor, Tensor]:
    """quantize_weight, by the CUDA kernel where it applies."""
    fast = None
    if weight.is_cuda and not group_size and not search:
        fast = cuda_quantize(weight, bits)
    return quantize_weight(weight, bits, group_size, search) if fast is None else fast


# ---------------------------------------------------------------------------------------------------------------------
# A whole model
# ---------------------------------------------------------------------------------------------------------------------


def quantize_model(
    model: nn.Module,
    bits: int,
    group_size: int = 0,
    quantize_head: bool | int = False,
    search: bool = False,
    quantize_activations: bool | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Replaces the linear layers of every block by quantized ones, one matrix at a time, where they are.

    Args:
        model: a ChatGLMForConditionalGeneration, of any dtype and on any devices.
        bits: 8 or 4; 0 leaves the model as it is.
        group_size: columns that share a scale: 0 for a row, which is the official format, or 32, 64, 128.
        quantize_head: embedding and head too, True or 8 for int8 rows, 4 for int4; the official format keeps them.
        search: for each scale, the value with the least squared error rather than the largest weight's.
        quantize_activations: as in ChatGLMConfig; a switch that may be turned again at any time. None leaves it.
        progress: a progress bar; by default for models of a billion parameters and more.

    Returns:
        the model itself.

    Raises:
        ValueError: unknown bits or group size, or a model that is quantized differently already.
    """
    config = model.config
    if bits == 0:
        return switch_activations(model, quantize_activations) if config.quantization_bit else model
    if bits not in LARGEST:
        raise ValueError(f"quantize({bits}): use 8, 4, or 0 for no quantization")
    if quantize_activations not in (None, False, True):
        raise ValueError(f"quantize(quantize_activations={quantize_activations!r}): use False, True, or None")
    if config.quantization_bit:
        refuse_other_format(config, bits, group_size, quantize_head)
        return switch_activations(model, quantize_activations)
    if group_size not in GROUP_SIZES or quantize_head not in (False, True, 4, 8):
        raise ValueError(
            f"quantize(group_size={group_size}, quantize_head={quantize_head}): group_size is one of {GROUP_SIZES}, "
            "quantize_head False, True, 4 or 8"
        )
    layers = list(linear_layers(model.transformer.layers))
    for _, _, layer in layers:
        check_shape(layer.in_features, bits, group_size)
    if progress is None:
        progress = sum(parameter.numel() for parameter in model.parameters()) >= 10**9
    for parent, name, layer in progress_bar(layers, progress, f"quantizing to INT{bits}"):
        setattr(parent, name, QuantizedLinear.from_linear(layer, bits, group_size, search))
    config.quantization_bit, config.quantization_group_size = bits, group_size
    config.quantize_head = quantize_head
    if config.head_bits:
        quantize_embedding_and_head(model, search)
    return switch_activations(model, quantize_activations)


def switch_activations(model: nn.Module, int8: bool | None) -> nn.Module:
    """Sets what ChatGLMConfig calls quantize_activations; None leaves it as it is."""
    if int8 is not None:
        model.config.quantize_activations = int8
    for _, _, layer in linear_layers(model.transformer.layers):
        layer.quantize_activations = model.config.quantize_activations
    return model


def refuse_other_format(config, bits: int, group_size: int, quantize_head: bool | int) -> None:
    present = (config.quantization_bit, config.quantization_group_size, config.quantize_head)
    if present == (bits, group_size, quantize_head) or (bits == present[0] and not group_size and not quantize_head):
        return
    raise ValueError(
        f"quantize(bits={bits}, group_size={group_size}, quantize_head={quantize_head}): the model is quantized "
        f"already (bits={present[0]}, group_size={present[1]}, quantize_head={present[2]}); load the 16-bit one again"
    )


def linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every linear layer below `module`."""
    for parent in module.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                yield parent, name, layer


@torch.no_grad()
def quantize_embedding_and_head(model: nn.Module, search: bool) -> None:
    """A tied pair stays tied: values and scales are stored once."""
    transformer, head, bits = model.transformer, model.lm_head, model.config.head_bits
    group_size = head_group_size(bits, model.config.quantization_group_size)
    tied = head.weight is transformer.word_embeddings.weight
    model.lm_head = QuantizedLinear.from_linear(head, bits, group_size, search)
    model.lm_head.shares_weight = tied
    rows = model.lm_head if tied else as_linear(transformer.word_embeddings, bits, group_size, search)
    embedding = QuantizedEmbedding(head.out_features, head.in_features, bits, group_size, device="meta")
    embedding.weight, embedding.weight_scale = rows.weight, rows.weight_scale
    transformer.word_embeddings = embedding
    model.config.tie_word_embeddings = tied
    model._tied_weights_keys = tied_head_keys()


def as_linear(embedding: nn.Embedding, bits: int, group_size: int, search: bool) -> QuantizedLinear:
    layer = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    layer.weight = embedding.weight
    return QuantizedLinear.from_linear(layer, bits, group_size, search)


def head_group_size(bits: int, group_size: int) -> int:
    """Int8 rows need no groups; an int4 head has those of the other layers."""
    return group_size if bits == 4 else 0


def tied_head_keys() -> dict[str, str]:
    """What a quantized head shares with the embedding."""
    return {f"lm_head.{name}": f"transformer.word_embeddings.{name}" for name in ("weight", "weight_scale")}


def progress_bar(items: list, show: bool, description: str):
    if not show:
        return items
    from tqdm.auto import tqdm  # a dependency of transformers

    return tqdm(items, desc=description, unit="matrix")
