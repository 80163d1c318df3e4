"""INT8 and INT4 weights in the official ChatGLM-6B format, on any device.

A quantized matrix is `weight`, int8 [out, in] or two int4 columns a byte [out, in / 2] (the even column in the high
nibble, two's complement), and `weight_scale` [out], or [out, in / group] with group-wise scales. What computes with it
is chosen in kernel_routes.py; all ways give the numbers of plain PyTorch with the dequantized weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # a dependency of transformers

from .configuration_chatglm import check_field, warn_once
from .cuda_kernels import quantize as cuda_quantize
from .kernel_routes import FrozenProduct, dequantize_weight, dequantized, product

LARGEST = {4: 7, 8: 127}
SEARCH_FACTORS = [1 - step / 40 for step in range(17)]  # of the largest value, when the scale is searched: 1.0 ... 0.6


# ---- The format: pure functions -------------------------------------------------------------------------------------
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
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16
    scale = (groups.abs().amax(dim=2, keepdim=True) / LARGEST[bits]).to(dtype)
    scale = searched_scale(groups, scale, bits) if search else scale
    values = rounded(groups, scale, bits).flatten(1)
    return pack_int4(values) if bits == 4 else values, scale.squeeze(2) if group_size else scale.flatten()


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


def pack_int4(values: Tensor) -> Tensor:
    """int8 [..., in] with values -8 ... 7 -> int8 [..., in / 2], even columns in the high nibbles."""
    return ((values[..., 0::2] & 15) << 4) | (values[..., 1::2] & 15)


def check_shape(in_features: int, bits: int, group_size: int) -> None:
    step = group_size or 8 // bits  # columns that share a scale or a byte
    if in_features % step:
        raise ValueError(f"in_features = {in_features} is not a multiple of {step}, which group_size or INT4 asks for")


# ---- The layers -----------------------------------------------------------------------------------------------------
class QuantizedLinear(nn.Module):
    """A linear layer with int8 or int4 weights. No nn.Linear, whose weight other libraries (PEFT) read as numbers and
    merge adapters into.

    weight: int8 [out, in] or [out, in / 2]; weight_scale: [out] or [out, in / group_size]; bias: [out] or None.
    copies: what kernel_routes.product keeps of an INT4 weight, as large as it; not counted, saved, copied or trained.
    """

    quantize_activations = False  # see ChatGLMConfig
    _hf_quantized_needs_local_tp = True  # tensor parallelism hands it plain tensors, also for gradients

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int = 0, bias: bool = True, device=None
    ):
        check_shape(in_features, bits, group_size)
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.copies: dict = {}
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
        fill(quantized, layer.weight, search)
        if layer.bias is not None:
            quantized.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return quantized

    def forward(self, x: Tensor) -> Tensor:
        trained = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trained and torch.is_grad_enabled():
            self.copies.clear()
            y = FrozenProduct.apply(x, self.weight, self.weight_scale, self.bits)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        moved = "forward" in self.__dict__  # by accelerate's hooks: another weight at each call, not worth a copy
        copies = None if moved else self.copies
        return product(x, self.weight, self.weight_scale, self.bits, self.bias, self.quantize_activations, copies)

    def __getstate__(self):
        return {**self.__dict__, "copies": {}}  # their order is this processor's

    def _apply(self, function, *arguments, **named):
        self.copies.clear()
        return super()._apply(function, *arguments, **named)


class QuantizedEmbedding(nn.Module):
    """An embedding with int8 or int4 rows, which the head can share; the tensors are those of QuantizedLinear."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, group_size: int = 0, device=None):
        super().__init__()
        self.embedding_dim, self.bits, self.group_size = embedding_dim, bits, group_size
        rows = QuantizedLinear(embedding_dim, num_embeddings, bits, group_size, bias=False, device=device)
        self.weight, self.weight_scale = rows.weight, rows.weight_scale

    def forward(self, ids: Tensor) -> Tensor:
        rows, scale = self.weight[ids.flatten()], self.weight_scale[ids.flatten()]
        return dequantize_weight(rows, scale, self.bits, scale.dtype).view(*ids.shape, self.embedding_dim)


def fill(layer: QuantizedLinear | QuantizedEmbedding, weight: Tensor, search: bool) -> None:
    """Gives the layer `weight` [out, in] rounded, on its device, by the CUDA kernel where that applies."""
    fast = None if layer.group_size or search else cuda_quantize(weight, layer.bits)
    values, scale = fast or quantize_weight(weight, layer.bits, layer.group_size, search)
    layer.weight = nn.Parameter(values, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)


def plain_layer(layer: QuantizedLinear | QuantizedEmbedding, dtype: torch.dtype | None) -> nn.Linear | nn.Embedding:
    """One with the same numbers, in `dtype` or that of the scale."""
    weight = dequantized(layer.weight, layer.weight_scale, layer.bits, dtype or layer.weight_scale.dtype)
    if isinstance(layer, QuantizedEmbedding):
        return nn.Embedding.from_pretrained(weight, freeze=False)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
    return plain


# ---- A whole model --------------------------------------------------------------------------------------------------
def quantize_model(
    model: nn.Module,
    bits: int,
    group_size: int = 0,
    quantize_head: bool | int = False,
    search: bool = False,
    quantize_activations: bool | None = None,
    quantize_embeddings: bool = False,
    empty_init: bool = False,
    kernel_file: str | None = None,
    use_quantization_cache: bool = False,
) -> nn.Module:
    """Replaces the linear layers of every block by quantized ones, one matrix at a time, where they are.

    Args:
        model: a ChatGLMForConditionalGeneration, of any dtype and on any devices; returned.
        bits: 8 or 4; 0 leaves the model as it is.
        group_size: columns that share a scale: 0 for a row, which is the official format, or 32, 64, 128.
        quantize_head: embedding and head too, True or 8 for int8 rows, 4 for int4; the official format keeps them.
        search: for each scale, the value with the least squared error rather than the largest weight's.
        quantize_activations: as in ChatGLMConfig; a switch that may be turned again at any time. None leaves it.
        quantize_embeddings: the official name for `quantize_head=bits`. The others are official and change nothing.

    Raises ValueError, and leaves the model as it was: a value that the configuration cannot have, a model that is
    quantized differently already, or one whose weights are offloaded.
    """
    if empty_init or kernel_file or use_quantization_cache:
        warn_once("quantize(): empty_init, kernel_file and use_quantization_cache have no effect here")
    config, quantize_head = model.config, quantize_head or (bits if quantize_embeddings else False)
    check_request(config, bits, group_size, quantize_head)
    check_field("quantize_activations", False if quantize_activations is None else quantize_activations)
    if bits and not config.quantization_bit:
        quantize_layers(model, bits, group_size, search)
        config.quantize_head = quantize_head
        if config.head_bits:
            quantize_embedding_and_head(model, search)
        model.freeze()
    if config.quantization_bit:
        if quantize_activations is not None:
            config.quantize_activations = quantize_activations
        for _, _, layer in linear_layers(model.transformer.layers, QuantizedLinear):
            layer.quantize_activations = config.quantize_activations
    return model


def check_request(config, bits, group_size, quantize_head) -> None:
    """ValueError for values that a configuration may not have, and for another format than the model has already."""
    asked = {"quantization_bit": bits, "quantization_group_size": group_size, "quantize_head": quantize_head}
    for name, value in asked.items():
        check_field(name, value)
    present = {name: getattr(config, name) for name in asked}
    plain = {"quantization_bit": config.quantization_bit, "quantization_group_size": 0, "quantize_head": False}
    if bits and config.quantization_bit and asked not in (present, plain):
        raise ValueError(f"the model is quantized already, as {present}, not {asked}; load the 16-bit one again")


def quantize_layers(model: nn.Module, bits: int, group_size: int, search: bool) -> None:
    """Those of the blocks, with a progress bar where they take long; says so in the configuration."""
    layers = list(linear_layers(model.transformer.layers))
    for _, _, layer in layers:
        check_shape(layer.in_features, bits, group_size)
    refuse_offloaded(model, f"quantize({bits})")
    is_small = sum(parameter.numel() for parameter in model.parameters()) < 10**9
    for parent, name, layer in tqdm(layers, f"quantizing to INT{bits}", unit="matrix", disable=is_small):
        setattr(parent, name, QuantizedLinear.from_linear(layer, bits, group_size, search))
    model.config.quantization_bit, model.config.quantization_group_size = bits, group_size


def linear_layers(module: nn.Module, kind: type | tuple = nn.Linear) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of every linear layer of the kind below `module`."""
    for parent in module.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, kind):
                yield parent, name, layer


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Weights that accelerate keeps on disk or elsewhere lie on the meta device until they are used; of those that are
    split over processes (DTensor) each has a part."""
    away = [name for name, own in model.named_parameters() if own.is_meta or hasattr(own, "placements")]
    if away:
        raise ValueError(
            f"{what}: {len(away)} weights are offloaded or split over processes, {away[0]} for one; load the model as "
            "a whole first, as `python slim.py SOURCE OUTPUT --bits 4` also does, and spread it afterwards"
        )


@torch.no_grad()
def quantize_embedding_and_head(model: nn.Module, search: bool) -> None:
    """A tied pair stays tied: values and scales are stored once."""
    transformer, old, bits = model.transformer, model.lm_head, model.config.head_bits
    group_size = model.config.head_group_size
    head = QuantizedLinear.from_linear(old, bits, group_size, search)
    embedding = QuantizedEmbedding(old.out_features, old.in_features, bits, group_size, device="meta")
    model.config.tie_word_embeddings = old.weight is transformer.word_embeddings.weight
    if model.config.tie_word_embeddings:
        embedding.weight, embedding.weight_scale = head.weight, head.weight_scale
    else:
        fill(embedding, transformer.word_embeddings.weight, search)
    model.lm_head, transformer.word_embeddings = head, embedding
    model._tied_weights_keys = tied_head_keys()


def tied_head_keys() -> dict[str, str]:
    """What a quantized head shares with the embedding."""
    return {f"lm_head.{name}": f"transformer.word_embeddings.{name}" for name in ("weight", "weight_scale")}


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces all quantized layers by plain ones with the same numbers, in `dtype`, by default that of the scales;
    returns the model itself. ValueError where weights are offloaded; the model stays as it was then."""
    refuse_offloaded(model, "dequantize()")
    config, found = model.config, list(linear_layers(model, (QuantizedLinear, QuantizedEmbedding)))
    for parent, name, layer in found:
        setattr(parent, name, plain_layer(layer, dtype))
    if config.quantization_bit and config.head_bits and config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.word_embeddings.weight
    config.quantization_bit = config.quantization_group_size = 0
    config.quantize_head = config.quantize_activations = False
    if found:
        model._tied_weights_keys = type(model)._tied_weights_keys
        model.requires_grad_(True).freeze()
    return model


def refuse_other_format(path, held, asked) -> None:
    """Weights are as the configuration beside them says, `held`, whatever from_pretrained is asked for."""
    names = ("quantization_bit", "quantization_group_size", "head_bits")
    formats = [{name: getattr(config, name) for name in names} for config in (held, asked)]
    if formats[0] != formats[1]:
        cure = "load it as it is" if held.quantization_bit else "load it without these and call model.quantize(...)"
        raise ValueError(f"{path} holds weights with {formats[0]}, and was to be loaded with {formats[1]}: {cure}")
