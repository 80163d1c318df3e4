"""ChatGLM-6B: where things are in a GLM sequence, the network, its head, and the hooks of `generate`.

What is unusual, all of it from "GLM: General Language Model Pretraining with Autoregressive Blank Infilling"
(https://arxiv.org/abs/2103.10360) and the released checkpoint:

* Prefix mask: the context (everything before `<sop>`) is read in both directions, the answer causally.
* 2-D positions: in the context a token has its index and block position 0; in the answer all tokens have the index of
  the [MASK] or [gMASK] that they fill and block positions 1, 2, 3, ... Half of each head is rotated by either.
* The residual branch carries the *normalised* input of each sub-layer, times `config.residual_scale`.

Shapes: B batch, S new tokens, K all keys (prefix and cached tokens too), H heads, D head size, P prefix length,
R position rows (2 or 1), V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# All files of the package: transformers before 5 copies only those that this one imports itself.
from .chat import ChatMixin
from .compat import (
    CACHE_NAME,
    GenerationMixin,
    GrowingCache,
    Past,
    VersionedModel,
    as_cache,
    cache_for_generate,
    cached_length,
    chosen_attention,
    chosen_setting,
    fixed_length,
    geometry_of,
    given_cache,
    is_tracing,
    remember_geometry,
)
from .configuration_chatglm import HAS_TENSOR_PARALLELISM, ChatGLMConfig, warn_once
from .cuda_kernels import linear as cuda_linear  # noqa: F401
from .kernel_routes import attention, decode_step, gelu, linear
from .quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_model,
    quantize_model,
    refuse_other_format,
    tied_head_keys,
)

LOSS_IN_CONTEXT = (
    "labels before <sop>: tokens of a GLM context read each other in both directions, so the model sees what it is "
    "to predict there and learns nothing from it; label the answer, from <sop> on, as the collators in "
    "finetune/collators.py of the ChatGLM-6B-Slim repository do"
)
FROZEN = (
    "its layers are frozen. Add an adapter, or a prefix (pre_seq_len), or tune the 16-bit one: see finetune/README.md "
    "in the ChatGLM-6B-Slim repository"
)
P_TUNING = (
    "PEFT's prompt tuning and prefix tuning do not know where a GLM context ends: P-tuning v2 is built in, give "
    "from_pretrained pre_seq_len=128, see finetune/README.md in the ChatGLM-6B-Slim repository"
)


# ---- Where things are in a GLM sequence: context, answer, padding. Every position and mask comes from here ----------


def is_start(seen) -> bool:
    """Whether nothing is cached; what torch.compile counts in a tensor never is."""
    return isinstance(seen, int) and seen == 0


class Geometry(NamedTuple):
    """Indices in a left-padded batch, [B, 1] each."""

    context_length: Tensor  # index of the first <sop>: the context is before it, the answer starts with it
    mask_position: Tensor  # index of the first [gMASK], or without one of the first [MASK]: what the answer fills
    fills_blank: Tensor  # whether that is a [MASK]
    padding: Tensor  # tokens of padding on the left


def first_index(found: Tensor) -> Tensor:
    """[B, S] bool -> [B, 1]: index of the first True of each row, S in rows without."""
    index = torch.arange(found.shape[1], device=found.device)
    return torch.where(found, index, found.shape[1]).amin(dim=1, keepdim=True)


def find_geometry(
    ids: Tensor, config: ChatGLMConfig, attention_mask: Tensor | None = None, filled: tuple | None = None
) -> Geometry:
    """Reads the geometry off whole sequences [B, S].

    Args:
        attention_mask: [B, S] with 0 for padding; without one leading pads are.
        filled: mask_position and fills_blank, where they don't follow from the ids.

    Raises:
        ValueError: a row without <sop>, or without [MASK] and [gMASK].
    """
    length, context_length = ids.shape[1], first_index(ids == config.bos_token_id)
    if filled is None:
        gmask, blank = first_index(ids == config.gmask_token_id), first_index(ids == config.mask_token_id)
        filled = torch.where(gmask == length, blank, gmask), gmask == length
    pad = -1 if config.pad_token_id is None else config.pad_token_id
    visible = ids != pad if attention_mask is None else attention_mask[:, :length].bool()
    for index, what in () if is_tracing() else ((context_length, "<sop>"), (filled[0], "[gMASK] or [MASK]")):
        if (index == length).any():
            raise ValueError(
                f"row {int((index == length).int().argmax())} of the input has no {what} among its {length} tokens: a "
                "GLM prompt ends with [gMASK] <sop>, which the tokenizer adds; keep add_special_tokens=True"
            )
    return Geometry(context_length, *filled, first_index(visible))


def position_ids_between(geometry: Geometry, start, new_tokens: int, two_dimensional: bool) -> Tensor:
    """Positions of the tokens start ... start + new_tokens - 1 of each row (counted with padding): [B, R, S]."""
    index = torch.arange(new_tokens, device=geometry.padding.device) + start
    in_answer = index >= geometry.context_length
    from_text = (index - geometry.padding).clamp(min=0)
    of_mask = geometry.mask_position - geometry.padding
    if two_dimensional:
        block = (index - geometry.context_length + 1).clamp(min=0)
        return torch.stack((torch.where(in_answer, of_mask, from_text), block), dim=1)
    return torch.where(in_answer & geometry.fills_blank, of_mask, from_text).unsqueeze(1)


def hidden_keys(
    geometry: Geometry | None, attention_mask: Tensor | None, start, new_tokens: int, total: int, device
) -> Tensor:
    """Which of `total` keys the tokens start ... start + new_tokens - 1 may not read: [B or 1, 1, S, total] bool, as
    the official masks are.

    The context is read in both directions only where it is all new (`start` is 0): cached tokens cannot be changed.
    What `attention_mask` [B, n] marks with 0 is hidden, cached or not; without one, padding is. A token always reads
    itself, or rows of padding would have nothing to read.
    """
    key = torch.arange(total, device=device)
    query = (torch.arange(new_tokens, device=device) + start)[:, None]
    hidden = (key > query)[None]
    if is_start(start):
        hidden = hidden & (key >= geometry.context_length)[:, None]
    if attention_mask is not None:
        masked = F.pad(attention_mask == 0, (0, total - attention_mask.shape[1]), value=False)
        hidden = hidden | masked[:, None]
    elif geometry is not None:
        hidden = hidden | (key < geometry.padding)[:, None]
    return (hidden & (key != query))[:, None]


def check_sizes(mask: Tensor | None, batch: int, new_tokens: int, tokens: int, keys: int) -> None:
    """ValueError for too few slots, and for a mask that is neither [B, tokens] nor an official one, of which the last
    rows count. `tokens` are the new ones and those in the cache, `keys` what may be read in the end."""
    if tokens > keys:
        raise ValueError(
            f"the static cache has room for {keys} tokens beside the P-tuning prefix, the text has {tokens}: pass a "
            "StaticCache with max_cache_len = max_length + pre_seq_len"
        )
    rows, *sizes = (1, tokens) if mask is None else mask.shape
    is_official = len(sizes) == 3 and (sizes[1] == 1 or sizes[1] >= new_tokens) and sizes[2] in (1, tokens, keys)
    if rows not in (1, batch) or not (is_official or sizes == [tokens]):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: {new_tokens} new tokens after {tokens - new_tokens} in the "
            f"cache take [{batch}, {tokens}] with 0 for hidden tokens, or the official bool mask "
            f"[{batch}, 1, {new_tokens}, {tokens}] with True for them"
        )


# ---- The network ----------------------------------------------------------------------------------------------------


def rotary_tables(position_ids: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and ∓sin of the angles, [B, S, 1, 1, R, 2, size / 2]; `size` is the part of a head that one row rotates.

    The frequencies are rounded to float16 and float16 models round the angles too, as the original does: the released
    weights were trained that way. bfloat16 could not tell positions beyond 256 apart, so its angles are float32.
    """
    precision = dtype if dtype == torch.float16 else torch.promote_types(dtype, torch.float32)
    powers = torch.arange(0, size, 2, device=position_ids.device).float() / size
    frequencies = (1.0 / 10000**powers).half().to(precision)
    angles = position_ids.to(precision).transpose(1, 2)[:, :, None, None, :, None, None] * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return cos, torch.cat((-sin, sin), dim=-2)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """states [B, S, H, 2, D] (query and key): R parts of two halves each, (x, y) -> (x cos - y sin, y cos + x sin)."""
    parts = states.unflatten(-1, (cos.shape[4], 2, -1))
    return (parts * cos + parts.flip(-2) * sin).flatten(-3)


class SelfAttention(nn.Module):
    is_causal, num_key_value_groups = False, 1  # what functions of transformers' AttentionInterface look for

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.query_key_value = linear_layer(config, config.hidden_size, 3 * config.hidden_size)
        self.dense = linear_layer(config, config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, rotary, visible: Tensor | None, past: Past, output_attentions: bool):
        B, S, _ = hidden.shape
        fused = linear(self.query_key_value, hidden).view(B, S, -1, 3, self.head_size)
        query, key = rotate(fused[..., :2, :], *rotary).transpose(1, 2).unbind(-2)  # [B, H, S, D] each
        value = fused[..., 2, :].transpose(1, 2)
        key, value = past.extend(key, value, self.layer_idx)
        chosen = "eager" if output_attentions else chosen_attention(self.config)
        if callable(chosen):
            options = {"dropout": 0.0, "scaling": self.head_size**-0.5, "is_causal": False}
            context, weights = chosen(self, query, key, value, visible, **options)
        elif chosen == "eager":
            context, weights = eager_attention(query, key, value, visible)
        else:
            context, weights = attention(query, key, value, visible).transpose(1, 2), None
        return linear(self.dense, context.reshape(B, S, -1)), weights


def eager_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """query [B, H, S, D], key and value [B, H, K, D] -> context [B, S, H, D] and weights [B, H, S, K]."""
    wide = torch.promote_types(query.dtype, torch.float32)  # float16 products may overflow
    scores = query.to(wide) / query.shape[-1] ** 0.5 @ key.to(wide).transpose(2, 3)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class MLP(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = linear_layer(config, config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = linear_layer(config, config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(self.dense_4h_to_h, gelu(linear(self.dense_h_to_4h, hidden)))


class GLMBlock(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, rotary, visible: Tensor | None, past: Past, output_attentions: bool):
        normed = self.input_layernorm(hidden)
        attended, weights = self.attention(normed, rotary, visible, past, output_attentions)
        normed = self.post_attention_layernorm(normed * self.residual_scale + attended)
        return normed * self.residual_scale + self.mlp(normed), weights


def network_functions() -> tuple:
    """What a decode step by kernels stands for: where one is another function by now, the modules are called."""
    classes = (GLMBlock.forward, SelfAttention.forward, MLP.forward, QuantizedLinear.forward)
    return (*classes, linear, attention, gelu, rotate)


NETWORK = network_functions()


class PrefixEncoder(nn.Module):
    """P-tuning v2: trained keys and values before the first token (https://arxiv.org/abs/2110.07602)."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(0.1)
        width = 2 * config.num_layers * config.hidden_size
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, config.hidden_size)
            hidden = nn.Linear(config.hidden_size, config.hidden_size)
            self.trans = nn.Sequential(hidden, nn.Tanh(), nn.Linear(config.hidden_size, width))
        else:
            self.embedding = nn.Embedding(config.pre_seq_len, width)
        self.embedding.initial_std = 1.0  # torch's own, which the official training recipe starts from

    def forward(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) for each layer, [B, H, P, D] each, for embeddings [B, S, hidden]."""
        states = self.embedding(torch.arange(self.config.pre_seq_len, device=hidden.device))
        states = self.trans(states) if self.config.prefix_projection else states
        heads, size, batch = self.config.num_attention_heads, self.config.head_size, len(hidden)
        states = states.to(hidden).view(1, -1, 2 * self.config.num_layers, heads, size).expand(batch, -1, -1, -1, -1)
        states = self.dropout(states).permute(2, 0, 3, 1, 4)
        return list(zip(states[0::2], states[1::2]))


def linear_layer(config: ChatGLMConfig, in_features: int, out_features: int) -> nn.Module:
    if not config.quantization_bit:
        return nn.Linear(in_features, out_features)
    layer = QuantizedLinear(in_features, out_features, config.quantization_bit, config.quantization_group_size)
    layer.quantize_activations = config.quantize_activations
    return layer


def embedding(config: ChatGLMConfig) -> nn.Module:
    if not config.head_bits:
        return nn.Embedding(config.vocab_size, config.hidden_size)
    return QuantizedEmbedding(config.vocab_size, config.hidden_size, config.head_bits, config.head_group_size)


# ---- The models: what both share, without head, with it -------------------------------------------------------------


class ChatGLMPreTrainedModel(VersionedModel):
    """Loading, saving and initialisation."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]
    # Buffers of the original; the frequencies follow from the head size.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    def __init__(self, config: ChatGLMConfig, *args, **kwargs):
        config.check_values()  # fields may have been changed since the configuration was made
        super().__init__(config, *args, **kwargs)

    @classmethod
    def check_format(cls, path, arguments: dict[str, Any]) -> None:
        """ValueError where the config.json at `path` says of the weights what they are not to be loaded as."""
        try:
            stored = ChatGLMConfig.get_config_dict(path, **{**arguments, "trust_remote_code": None})[0]
        except OSError:  # there is none
            return
        if "model_type" in stored:
            asked = arguments.get("config") or ChatGLMConfig.from_dict(dict(stored), **arguments)
            asked = asked if hasattr(asked, "quantization_bit") else ChatGLMConfig.from_pretrained(asked)
            refuse_other_format(path, ChatGLMConfig.from_dict(dict(stored)), asked)

    def freeze(self) -> None:
        """Beside a prefix, and in a quantized model, nothing else is trained: norms and biases alone learn little."""
        if self.config.pre_seq_len is not None or self.config.quantization_bit:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("prefix_encoder." in name)

    @property
    def position_encoding_2d(self) -> bool:
        return self.config.position_encoding_2d

    def get_masks(self, input_ids: Tensor, device) -> Tensor:
        """The official mask of whole sequences, as `forward` derives it: [B, 1, S, S] bool, True for hidden."""
        ids = input_ids.to(device)
        anything = torch.zeros_like(ids[:, :1])  # what the answer fills does not matter here
        geometry = find_geometry(ids, self.config, filled=(anything, anything))
        return hidden_keys(geometry, None, 0, ids.shape[1], ids.shape[1], ids.device)

    def get_position_ids(self, input_ids: Tensor, mask_positions, device, use_gmasks=None) -> Tensor:
        """The official positions of whole sequences, as `forward` derives them: [B, 2, S], or [B, S] for 1-D models.

        mask_positions: for each row the index of the [MASK] or [gMASK] that the answer fills.
        use_gmasks: for each row whether that is a [gMASK], which 1-D models ask; None: none is.
        """
        places = torch.as_tensor(mask_positions, device=device).view(-1, 1)
        is_gmask = torch.as_tensor([False] if use_gmasks is None else use_gmasks, device=device).view(-1, 1)
        geometry = find_geometry(input_ids.to(device), self.config, filled=(places, ~is_gmask))
        positions = position_ids_between(geometry, 0, input_ids.shape[1], self.position_encoding_2d)
        return positions if self.position_encoding_2d else positions[:, 0]

    def _init_weights(self, module: nn.Module) -> None:
        """Quantized layers are filled from a checkpoint, or by quantize(). By functions of nn.init: transformers 5
        guards those, so that loaded tensors are not overwritten."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=getattr(module, "initial_std", 0.02))
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The network without its head."""

    judges_labels = True  # until it warned

    def __init__(self, config: ChatGLMConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.word_embeddings = embedding(config)
        self.layers = nn.ModuleList([GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    @property
    def prefix_length(self) -> int:
        return self.config.pre_seq_len or 0

    def tokens_in(self, cache):
        """Cached tokens, without the prefix: an int, but see cached_length."""
        cached = cached_length(cache)
        return cached if is_start(cached) else cached - self.prefix_length

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache=None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, S], or inputs_embeds [B, S, hidden], from which no positions and mask are derived.
            position_ids: [B, 2, S] ([B, S] for 1-D models); derived when absent.
            attention_mask: [B, K] with 0 for padding, or the official bool mask [B, 1, S, K] with True for *hidden*;
                derived when absent (leading pad tokens are padding).
            past_key_values, or cache: a Cache, or (keys, values) per layer, [B, H, K - S, D] each; new tokens are
                causal. transformers 5.24 renamed the one to the other, in the output too; both serve everywhere.

        Returns:
            last_hidden_state [B, S, hidden]; hidden_states: the embeddings, then the output of each block, the last
            one after the final LayerNorm; attentions [B, H, S, K].

        Raises:
            ValueError: no <sop> or no mask token in the prompt; masks or positions of a wrong shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config, cache = self.config, given_cache(past_key_values, cache)
        attends = config.output_attentions if output_attentions is None else output_attentions
        shows_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        cache = GrowingCache() if cache is None and use_cache else cache
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        inputs, seen = hidden if input_ids is None else input_ids, self.tokens_in(cache)
        position_ids, visible, geometry = self.place(inputs, position_ids, attention_mask, cache, seen)
        if visible is not None:  # so far what is hidden; a row of padding reads all, as in the original
            visible = F.pad(~visible | visible.all(dim=-1, keepdim=True), (self.prefix_length, 0), value=True)
        rotary = rotary_tables(position_ids, config.head_size // position_ids.shape[1], hidden.dtype)
        states, attentions = self._run_blocks(hidden, rotary, visible, cache, seen, attends, shows_states)
        if geometry is not None:
            remember_geometry(cache, geometry)
        derived = getattr(attention_mask, "ndim", 2) == 2 and is_start(seen) and not is_tracing()
        if self.judges_labels and derived and states[-1].requires_grad and geometry is not None:
            states[-1].register_hook(functools.partial(self._judge_labels, geometry.context_length))
        cache, states = cache if use_cache else None, tuple(states)
        attentions = tuple(attentions) if attends else None
        output = BaseModelOutputWithPast(states[-1], cache, states if shows_states else None, attentions)
        return as_asked(output, return_dict, config)

    def _run_blocks(self, hidden: Tensor, rotary, visible, cache, seen, attends: bool, shows_states: bool):
        """The embeddings and the output of each block, the last one after the final LayerNorm; attention weights."""
        is_step = hidden.shape[1] == 1 and not (attends or shows_states or is_start(seen) or is_tracing())
        if is_step and chosen_attention(self.config) == "sdpa" and network_functions() == NETWORK:
            kinds = (GLMBlock, SelfAttention, MLP, QuantizedLinear)
            last = decode_step(self.layers, self.final_layernorm, hidden, rotary, visible, cache, kinds)
            if last is not None:  # by CPU kernels, all blocks at once
                return [last], []
        prefix = self.prefix_encoder(hidden) if self.prefix_length and is_start(seen) else None
        past, states, attentions = Past(cache, prefix, hidden.shape[1], hidden.device), [hidden], []
        for layer_idx, layer in enumerate(self.layers):
            hidden, weights = self.checkpointed(layer, layer_idx)(hidden, rotary, visible, past, attends)
            states.append(hidden)
            attentions.append(weights)
        states[-1] = self.final_layernorm(hidden)
        return states, attentions

    def _judge_labels(self, context_length: Tensor, gradient: Tensor) -> None:
        """Looks at the gradient [B, S, hidden] of the last hidden states, because TRL computes the loss by itself."""
        index = torch.arange(gradient.shape[1], device=gradient.device)
        is_used = (gradient.abs() > 0).any(dim=-1)  # to predict the next token; not where all is NaN
        if (is_used & (index < context_length.to(gradient.device) - 1)).any():
            self.judges_labels = False
            warn_once(LOSS_IN_CONTEXT)

    def place(self, inputs: Tensor, position_ids, attention_mask, cache, seen):
        """Where the new tokens are that follow `seen` cached ones, and what they read: the one place that says so.

        Args:
            inputs: ids [B, S] or embeddings [B, S, hidden].
            position_ids, attention_mask: as `forward` takes them; an official mask is obeyed, all else is derived from
                the geometry, which is read off a whole prompt and kept with the cache.

        Returns:
            positions [B, R, S]; keys that may not be read [B or 1, 1, S, K], None where one token reads all; the
            geometry, or None where nothing follows from it.
        """
        (B, S), slots = inputs.shape[:2], fixed_length(cache)
        keys = seen + S if slots is None else slots - self.prefix_length
        if not is_tracing():
            check_sizes(attention_mask, B, S, seen + S, keys)
            if seen + S > self.config.max_sequence_length:
                warn_once(
                    f"the text is longer than the {self.config.max_sequence_length} tokens that the model was trained "
                    "for: answers may get worse"
                )
        official = attention_mask is not None and attention_mask.dim() == 4
        geometry = geometry_of(cache)
        if is_start(seen) and (position_ids is None or not official):
            if inputs.dim() == 3:
                raise ValueError(f"inputs_embeds take position_ids and the official mask with them. {P_TUNING}")
            geometry = find_geometry(inputs, self.config, None if official else attention_mask)
        if position_ids is not None:
            position_ids = self.checked_positions(position_ids, S)
        elif geometry is None:
            raise ValueError(
                "past_key_values without position_ids: nothing tells where the context of this cache ends; pass "
                f"position_ids [B, 2, S] with it, or the cache that the model returned, not reordered. {P_TUNING}"
            )
        else:
            position_ids = position_ids_between(geometry, seen, S, self.config.position_encoding_2d)
        if official:
            hidden = attention_mask[:, :, -S:].bool()
            hidden = hidden.expand(-1, -1, -1, seen + S) if hidden.shape[-1] == 1 else hidden
            return position_ids, F.pad(hidden, (0, keys - hidden.shape[-1]), value=True), geometry  # of empty slots
        hidden = hidden_keys(geometry, attention_mask, seen, S, keys, inputs.device)
        may_drop = S == 1 and slots is None and not is_start(seen) and not is_tracing()
        return position_ids, None if may_drop and not hidden.any() else hidden, geometry

    def checked_positions(self, position_ids: Tensor, new_tokens: int) -> Tensor:
        """[B, R, S] of what a caller gave for the new tokens."""
        rows = 2 if self.config.position_encoding_2d else 1
        if rows == 1 and position_ids.dim() == 2:
            position_ids = position_ids.unsqueeze(1)
        if position_ids.dim() != 3 or position_ids.shape[1:] != (rows, new_tokens):
            raise ValueError(
                f"position_ids of shape {tuple(position_ids.shape)}: this model takes [batch, {rows}, {new_tokens}] "
                f"for {new_tokens} new tokens; leave them out to have them derived"
            )
        return position_ids


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM with its language-model head: generation, chat, quantization.

    Example:
        >>> from transformers import AutoModel, AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("tiny", trust_remote_code=True)
        >>> model = AutoModel.from_pretrained("tiny", trust_remote_code=True).eval()
        >>> response, history = model.chat(tokenizer, "你好", history=[], do_sample=False)
        >>> len(history)
        1
    """

    # A dict for transformers 5; iterates over its keys like the list that 4.x expects.
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
    # as the embedding, which may have the same weight
    _tp_plan = {"lm_head": "colwise_gather_output"} if HAS_TENSOR_PARALLELISM else None

    def __init__(self, config: ChatGLMConfig, *args, **kwargs):
        config = copy.deepcopy(config)  # quantize() changes it: a model owns its configuration
        super().__init__(config, *args, **kwargs)
        self.transformer = ChatGLMModel(config)
        if config.head_bits:
            rows = (config.hidden_size, config.vocab_size, config.head_bits, config.head_group_size)
            self.lm_head = QuantizedLinear(*rows, bias=False)
            self._tied_weights_keys = tied_head_keys()
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.head_bits and self._tp_plan:
            self._tp_plan = {name: way for name, way in self._tp_plan.items() if name != "lm_head"}
        self.freeze()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def tie_weights(self, *args, **kwargs):
        """Ties the scales of a quantized head with its values; transformers before 5 knows `weight` only."""
        super().tie_weights(*args, **kwargs)
        if self.config.tie_word_embeddings and isinstance(self.lm_head, QuantizedLinear):
            self.lm_head.weight_scale = self.transformer.word_embeddings.weight_scale

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache=None,
        **kwargs,
    ) -> tuple | CausalLMOutputWithPast:
        """Inputs as ChatGLMModel.forward.

        Args:
            labels: [B, S], -100 where no loss is wanted; the model shifts them.
            logits_to_keep: how many last positions (or which ones) get logits; 0 for all, as labels need them.

        Returns:
            loss, the mean cross entropy in float32, cast to the model's dtype; logits [B, kept, V].
        """
        inputs = (input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        output = self.transformer(*inputs, output_attentions, output_hidden_states, return_dict=True, cache=cache)
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = linear(self.lm_head, hidden if isinstance(kept, slice) and kept.start == 0 else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = shifted_cross_entropy(logits, labels, kwargs.get("num_items_in_batch")).to(logits.dtype)
            if self.training and self.config.quantization_bit and torch.is_grad_enabled() and not loss.requires_grad:
                warn_once(f"nothing of this INT{self.config.quantization_bit} model is trained: {FROZEN}")
        others = {name: value for name, value in output.items() if name != "last_hidden_state"}
        return as_asked(CausalLMOutputWithPast(loss, logits, **others), return_dict, self.config)

    # --- hooks of transformers' generate, checked on every rung of the ladder -------------------------------------

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """Overridden to hand it a cache that grows in place, and official masks in a form that it lets pass; refuses
        what runs the model on less than a whole prompt, or on copies of the cache with other rows."""
        penalty, guidance = (chosen_setting(self, args, kwargs, name) for name in ("penalty_alpha", "guidance_scale"))
        if penalty:
            raise ValueError(f"penalty_alpha = {penalty}: contrastive search is not served; sample, or take num_beams")
        if guidance not in (None, 1) and kwargs.get("negative_prompt_ids") is None:
            raise ValueError(
                f"guidance_scale = {guidance}: a GLM says nothing without a prompt; give the ids of one, which "
                "ends with [gMASK] <sop>, as negative_prompt_ids"
            )
        if any(getattr(one, "sequence", None) == "" for one in kwargs.get("stopping_criteria") or ()):
            raise ValueError(
                "stopping_criteria wait for an empty text, as <eop> prints, and would end every answer at once: in "
                "lm-evaluation-harness take the model `chatglm` of finetune/harness.py, not `hf`"
            )
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is not None:
            self._without_official_forms(prompt, kwargs)
        with cache_for_generate(self, args, kwargs):
            return super().generate(inputs, *args, **kwargs)

    def _without_official_forms(self, prompt: Tensor, options: dict[str, Any]) -> None:
        """Puts a mask [B, S] in the place of what official collators give generate, a mask [B, 1, S, S] and positions
        [B, R, S], because no version of it can continue those for new tokens.

        Raises:
            ValueError: they are not what the model derives from the prompt with that mask.
        """
        mask, positions = options.get("attention_mask"), options.pop("position_ids", None)
        if positions is not None and positions.dim() == 2 and self.position_encoding_2d:
            positions = None  # made by transformers, for an assistant
        is_official = mask is not None and mask.dim() == 4
        if positions is None and not is_official:
            return
        tokens = (~mask.bool().all(dim=2))[:, 0].long().expand(len(prompt), -1) if is_official else mask
        if is_official:
            options["attention_mask"] = tokens
        derived = self.transformer.place(prompt, None, tokens, None, 0)
        given = self.transformer.place(prompt, derived[0] if positions is None else positions, mask, None, 0)
        real = torch.ones_like(prompt[:, None]) if tokens is None else tokens[:, None]
        names = ("position_ids", "attention_mask")
        for name, theirs, ours, rows in zip(names, given, derived, (real, real.unsqueeze(-1))):
            if ((theirs != ours) & rows.bool()).any():
                raise ValueError(
                    f"{name} of shape {tuple(theirs.shape)} is not what the model derives from this prompt, so it "
                    "cannot be continued for new tokens: give generate() a 2-D mask [batch, length] with 0 for hidden "
                    "tokens, as the tokenizer returns it, and no position_ids"
                )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        """Overridden because positions and masks follow from the whole text, `input_ids`, of which a step gets only
        the new tokens. The positions that transformers 5 makes are not looked at."""
        cache = given_cache(**kwargs)
        names = ("use_cache", "output_attentions", "output_hidden_states", "logits_to_keep")
        inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        inputs.update({CACHE_NAME: cache, "attention_mask": attention_mask})
        seen = self.transformer.tokens_in(cache)
        if not seen:
            if bool((input_ids[:, -1] == self.config.bos_token_id).all()):
                inputs["logits_to_keep"] = 1  # a bare prompt: only what follows it is asked for
            return {**inputs, "input_ids": input_ids}
        total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        if total <= seen:
            raise ValueError(
                f"the cache holds {seen} tokens and the input has {total}: pass the whole text, prompt and answer, "
                "with past_key_values"
            )
        geometry = geometry_of(cache)
        if geometry is None or len(geometry.padding) != len(input_ids) or input_ids.shape[1] > seen + 1:
            geometry = find_geometry(input_ids, self.config, attention_mask)  # the cache may be another prompt's
            if bool((geometry.context_length > seen).any()):
                raise ValueError(
                    f"the cache ends at token {seen}, inside a context of {int(geometry.context_length.max())}: a GLM "
                    "context is read in both directions and cannot be continued; pass the whole prompt without a cache"
                )
            remember_geometry(cache, geometry)
        new = input_ids[:, seen - total :].contiguous()
        position_ids, hidden, _ = self.transformer.place(new, None, attention_mask, cache, seen)
        return {**inputs, "input_ids": new, "position_ids": position_ids, "attention_mask": hidden}

    @staticmethod
    def _reorder_cache(past, beam_idx: Tensor):
        """Beam search below 4.42 calls this in place of the cache's own method."""
        cache = as_cache(past)
        cache.reorder_cache(beam_idx)
        return cache

    # --- weights -------------------------------------------------------------------------------------------------

    quantize, dequantize = quantize_model, dequantize_model


def as_asked(output, return_dict: bool | None, config: ChatGLMConfig):
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def shifted_cross_entropy(logits: Tensor, labels: Tensor, num_items: int | None = None) -> Tensor:
    """Mean over the labels that are not -100 (or sum / num_items, which Trainer gives for accumulated batches)."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for logits of {tuple(logits.shape[:2])} tokens: give one label a "
            "token, -100 where no loss is wanted, and no logits_to_keep; the model shifts them"
        )
    logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
    loss = F.cross_entropy(logits, labels, reduction="mean" if num_items is None else "sum")
    return loss if num_items is None else loss / num_items


# transformers 4.29-4.31 and 4.45-4.51 copy the code on save_pretrained only for registered classes.
ChatGLMForConditionalGeneration.register_for_auto_class("AutoModel")
