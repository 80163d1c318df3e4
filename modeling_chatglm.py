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

import copy
import functools
import os
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# All files of the package: transformers before 5 copies only those that this one imports itself.
from .chat import ChatMixin
from .compat import (
    CACHE_NAME,
    GenerationMixin,
    Past,
    VersionedModel,
    as_cache,
    cache_of_generate,
    cached_length,
    check_weight_files,
    chosen_attention,
    chosen_mask,
    fixed_length,
    geometry_of,
    give_cache,
    is_tracing,
    one_of,
    remember_geometry,
)
from .configuration_chatglm import ChatGLMConfig, warn_of_other_code, warn_once
from .cuda_kernels import linear as cuda_linear  # noqa: F401
from .kernel_routes import attention, decode_step, gelu, linear, move_to_huge_pages
from .quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_model,
    head_group_size,
    quantize_model,
    tied_head_keys,
)

GET_WEIGHTS = (
    "this folder holds the code of ChatGLM-6B-Slim without weights: make a complete folder with "
    "`python slim.py THUDM/chatglm-6b OUTPUT --repackage`, or give from_pretrained a Hub id that has them"
)


# ---------------------------------------------------------------------------------------------------------------------
# Where things are in a GLM sequence: context, answer, padding. Every position and mask comes from here.
# ---------------------------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """Indices in a left-padded batch, [B, 1] each."""

    context_length: Tensor  # index of the first <sop>: the context is before it, the answer starts with it
    mask_position: Tensor  # index of the first [gMASK], or without one of the first [MASK]: what the answer fills
    fills_blank: Tensor  # whether that is a [MASK]
    padding: Tensor  # tokens of padding on the left
    is_padded: bool  # whether any row has hidden tokens


def first_index(found: Tensor, otherwise: int) -> Tensor:
    """[B, S] bool -> [B, 1]: index of the first True of each row, `otherwise` in rows without."""
    index = torch.arange(found.shape[1], device=found.device)
    return torch.where(found, index, otherwise).amin(dim=1, keepdim=True)


def find_geometry(kinds: "TokenKinds", attention_mask: Optional[Tensor]) -> Geometry:
    """Reads the geometry off a whole sequence; `attention_mask` [B, S], 0 = padding; else leading pads are.

    Raises:
        ValueError: a row without <sop>, or without [MASK] and [gMASK].
    """
    length = kinds.sop.shape[1]
    context_length = first_index(kinds.sop, length)
    gmask_position, blank_position = first_index(kinds.gmask, length), first_index(kinds.mask, length)
    fills_blank = gmask_position == length
    mask_position = torch.where(fills_blank, blank_position, gmask_position)
    visible = ~kinds.pad if attention_mask is None else attention_mask[:, :length].bool()
    padding = first_index(visible, length)
    is_padded = True
    if not is_tracing():
        refuse_rows((context_length == length).squeeze(1), "<sop>", length)
        refuse_rows((mask_position == length).squeeze(1), "[gMASK] or [MASK]", length)
        is_padded = bool(padding.any()) if attention_mask is None else not bool(attention_mask.all())
    return Geometry(context_length, mask_position, fills_blank, padding, is_padded)


def check_mask(mask: Tensor, batch: int, new_tokens: int, tokens: int, keys: int) -> None:
    """ValueError for a mask that is neither [B, tokens] nor an official one; `tokens` with those in the cache."""
    rows, *sizes = mask.shape
    fits = sizes == [tokens]
    if len(sizes) == 3:  # of the official masks the last rows count
        fits = (sizes[1] == 1 or sizes[1] >= new_tokens) and sizes[2] in (1, tokens, keys)
    if not fits or rows not in (1, batch):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: {new_tokens} new tokens after {tokens - new_tokens} in the "
            f"cache take [{batch}, {tokens}] with 0 for hidden tokens, or the official bool mask "
            f"[{batch}, 1, {new_tokens}, {tokens}] with True for them"
        )


def hides_any(geometry: Optional[Geometry], attention_mask: Optional[Tensor]) -> bool:
    """Whether something before a new token is hidden from it; while tracing, whether it may be."""
    if attention_mask is None:
        return geometry is not None and geometry.is_padded
    return is_tracing() or bool((attention_mask == 0).any())


def refuse_rows(missing: Tensor, what: str, length: int) -> None:
    if missing.any():
        row = int(missing.int().argmax())
        raise ValueError(
            f"row {row} of the input has no {what} among its {length} tokens: a GLM prompt ends with [gMASK] <sop>, "
            "which the tokenizer adds; keep add_special_tokens=True"
        )


class TokenKinds(NamedTuple):
    """Where the tokens that shape the sequence are, [B, S] bool each."""

    sop: Tensor
    gmask: Tensor
    mask: Tensor
    pad: Tensor

    @classmethod
    def of_ids(cls, input_ids: Tensor, config: ChatGLMConfig) -> "TokenKinds":
        return cls(*(input_ids == (-1 if token is None else token) for token in shaping_tokens(config)))

    @classmethod
    def of_embeddings(cls, inputs_embeds: Tensor, embedding: nn.Module, config: ChatGLMConfig) -> "TokenKinds":
        """Recognises the special tokens by their embeddings, so that `inputs_embeds` alone is enough."""

        def found(token: Optional[int]) -> Tensor:
            if token is None:
                return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
            row = embedding(torch.tensor([token], device=inputs_embeds.device))
            return (inputs_embeds == row.to(inputs_embeds.dtype)).all(dim=-1)

        return cls(*map(found, shaping_tokens(config)))


def shaping_tokens(config: ChatGLMConfig) -> tuple[Optional[int], ...]:
    """The ids of <sop>, [gMASK], [MASK] and <pad>; a configuration may have no <pad>."""
    return config.bos_token_id, config.gmask_token_id, config.mask_token_id, config.pad_token_id


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


def continued_position_ids(position_ids: Tensor, start: int, new_tokens: int) -> Tensor:
    """Positions of the tokens start ... start + new_tokens - 1: those that the caller gave for the prompt, [B, R, P],
    and behind them the last row counts on, the first of two stays."""
    prompt, end = position_ids.shape[-1], start + new_tokens
    steps = torch.arange(max(start, prompt), max(end, prompt), device=position_ids.device) - (prompt - 1)
    moves = torch.ones_like(position_ids[..., -1:])
    if position_ids.shape[1] == 2:
        moves[:, 0] = 0
    return torch.cat((position_ids[..., start:end], position_ids[..., -1:] + moves * steps), dim=-1)


def hidden_keys(
    geometry: Optional[Geometry], attention_mask: Optional[Tensor], start, new_tokens: int, total: int, device
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
    if isinstance(start, int) and start == 0:
        hidden = hidden & (key >= geometry.context_length)[:, None]
    if attention_mask is not None:
        masked = F.pad(attention_mask == 0, (0, total - attention_mask.shape[1]), value=False)
        hidden = hidden | masked[:, None]
    elif geometry is not None:
        hidden = hidden | (key < geometry.padding)[:, None]
    return (hidden & (key != query))[:, None]


def padding_mask(official: Tensor, input_ids: Tensor, config: ChatGLMConfig) -> Tensor:
    """The mask [B, S], 0 for padding, that says of whole sequences what an official one, [B, 1, S, S], does.

    Raises:
        ValueError: there is none, because the official mask hides other keys than a GLM sequence does.
    """
    B, S = input_ids.shape
    shown = ~official.bool().expand(B, 1, *official.shape[2:])
    mask = shown.any(dim=2)[:, 0]
    if shown.shape[2:] == (S, S):
        geometry = find_geometry(TokenKinds.of_ids(input_ids, config), mask)
        usual = ~hidden_keys(geometry, mask, 0, S, S, mask.device)
        if torch.equal(shown & mask[:, None, :, None], usual & mask[:, None, :, None]):
            return mask.long()
    raise ValueError(
        f"attention_mask of shape {tuple(official.shape)} is not that of {B} prompts of {S} tokens as the official "
        "code makes it, so it cannot be continued for new tokens: give generate() a 2-D mask [batch, length] with 0 "
        "for hidden tokens, as the tokenizer returns it"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


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

    def forward(self, hidden: Tensor, rotary, visible: Optional[Tensor], past: Past, output_attentions: bool):
        B, S, _ = hidden.shape
        fused = linear(self.query_key_value, hidden).view(B, S, self.heads, 3, self.head_size)
        query, key = rotate(fused[..., :2, :], *rotary).transpose(1, 2).unbind(-2)  # [B, H, S, D] each
        value = fused[..., 2, :].transpose(1, 2)
        key, value = past.extend(key, value, self.layer_idx)
        if visible is not None and visible.shape[-1] < key.shape[2]:  # a static cache hands out its empty slots too
            visible = F.pad(visible, (0, key.shape[2] - visible.shape[-1]), value=False)
        chosen = None if output_attentions else chosen_attention(self.config)
        if chosen is not None:
            mask, scale = chosen_mask(self.config, visible, query.dtype), self.head_size**-0.5
            context, weights = chosen(self, query, key, value, mask, dropout=0.0, scaling=scale, is_causal=False)
        elif output_attentions or getattr(self.config, "_attn_implementation", None) == "eager":
            context, weights = eager_attention(query, key, value, visible)
            context = context.transpose(1, 2)
        else:
            context, weights = attention(query, key, value, visible).transpose(1, 2), None
        return linear(self.dense, context.reshape(B, S, -1)), weights


def eager_attention(query: Tensor, key: Tensor, value: Tensor, visible: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """query [B, H, S, D], key and value [B, H, K, D] -> context [B, H, S, D] and weights [B, H, S, K]."""
    wide = torch.promote_types(query.dtype, torch.float32)  # float16 products may overflow
    scores = query.to(wide) / query.shape[-1] ** 0.5 @ key.to(wide).transpose(2, 3)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1).to(query.dtype)
    return weights @ value, weights


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

    def forward(self, hidden: Tensor, rotary, visible: Optional[Tensor], past: Past, output_attentions: bool):
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

    def forward(self, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) for each layer, [B, H, P, D] each."""
        states = self.embedding.weight if not self.config.prefix_projection else self.trans(self.embedding.weight)
        heads, size = self.config.num_attention_heads, self.config.head_size
        states = states.to(dtype).view(1, -1, 2 * self.config.num_layers, heads, size).expand(batch, -1, -1, -1, -1)
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
    group_size = head_group_size(config.head_bits, config.quantization_group_size)
    return QuantizedEmbedding(config.vocab_size, config.hidden_size, config.head_bits, group_size)


# ---------------------------------------------------------------------------------------------------------------------
# The models: what both share, without head, with it
# ---------------------------------------------------------------------------------------------------------------------


class ChatGLMPreTrainedModel(VersionedModel):
    """Loading, saving and initialisation."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]
    # Buffers of the original; the frequencies follow from the head size.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    def __init__(self, config: ChatGLMConfig, *args, **kwargs):
        config.check_values()  # fields may have been changed since the configuration was made
        if config.num_image_tokens:
            warn_once(
                f"this checkpoint still holds {config.num_image_tokens} image-token rows that no text uses: "
                "`python slim.py SOURCE OUTPUT` makes the same model without them"
            )
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, path, *args, **kwargs):
        """As in transformers (compat.py says where not); refuses weights that are not what they are loaded as."""
        if not kwargs.get("state_dict"):
            folder = os.path.join(path, kwargs.get("subfolder") or "") if isinstance(path, (str, os.PathLike)) else ""
            if os.path.isdir(folder):
                check_weight_files(folder, GET_WEIGHTS)
            stored = stored_config(path, kwargs)
            refuse_other_format(path, stored, kwargs)
            stored_tie = stored.get("tie_word_embeddings", True)
            kwargs["head_is_tied"] = getattr(kwargs.get("config"), "tie_word_embeddings", stored_tie)
        warn_of_other_code(path)
        return super().from_pretrained(path, *args, **kwargs)

    def freeze(self) -> None:
        for module in self.modules():
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                module.requires_grad_(False)
        if self.config.pre_seq_len is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("prefix_encoder." in name)

    @property
    def position_encoding_2d(self) -> bool:
        return self.config.position_encoding_2d

    def get_masks(self, input_ids: Tensor, device) -> Tensor:
        """The official mask of whole sequences, as `forward` derives it: [B, 1, S, S] bool, True for hidden.

        Raises:
            ValueError: a row without <sop>.
        """
        kinds = TokenKinds.of_ids(input_ids.to(device), self.config)
        geometry = find_geometry(kinds._replace(gmask=kinds.sop), None)  # what the answer fills doesn't matter here
        return hidden_keys(geometry, None, 0, input_ids.shape[1], input_ids.shape[1], geometry.padding.device)

    def get_position_ids(self, input_ids: Tensor, mask_positions, device, use_gmasks=None) -> Tensor:
        """Positions of whole sequences, as `forward` derives them, but with the places that the answers fill given.

        Args:
            mask_positions: for each row the index of its [MASK] or [gMASK].
            use_gmasks: for each row whether that is a [gMASK]; only 1-D models ask. None: none is.

        Returns:
            [B, 2, S]; [B, S] for 1-D models.

        Raises:
            ValueError: a row without <sop>.
        """
        kinds = TokenKinds.of_ids(input_ids.to(device), self.config)
        places = torch.as_tensor(mask_positions, device=device).view(-1, 1)
        is_gmask = torch.as_tensor([False] if use_gmasks is None else use_gmasks, device=device).view(-1, 1)
        found = torch.arange(input_ids.shape[1], device=device) == places
        geometry = find_geometry(kinds._replace(gmask=found & is_gmask, mask=found & ~is_gmask), None)
        positions = position_ids_between(geometry, 0, input_ids.shape[1], self.position_encoding_2d)
        return positions if self.position_encoding_2d else positions[:, 0]

    def _init_weights(self, module: nn.Module) -> None:
        # nn.init functions, not .data: transformers 5 guards those, so that loaded tensors are not overwritten.
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            return  # filled from a checkpoint, or by quantize()
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(module, "initial_std", 0.02))
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def stored_config(path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The config.json beside the weights; empty where there is none."""
    of_hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    where = {name: arguments[name] for name in (*of_hub, "use_auth_token") if name in arguments}
    commit = getattr(arguments.get("config"), "_commit_hash", None)
    try:
        return ChatGLMConfig.get_config_dict(path, _commit_hash=commit, **where)[0]
    except OSError:
        return {}


def refuse_other_format(path, stored: dict[str, Any], arguments: dict[str, Any]) -> None:
    """A checkpoint's weights are quantized as its own config.json says, whatever from_pretrained is asked for."""
    config, names = arguments.get("config"), ("quantization_bit", "quantization_group_size", "quantize_head")
    if "model_type" not in stored:  # nothing is known
        return
    if isinstance(config, (str, os.PathLike)):
        config = ChatGLMConfig.from_pretrained(config)
    present = [stored.get(name) or 0 for name in names]
    if config is None:
        asked = [arguments.get(name, own) for name, own in zip(names, present)]
    else:
        asked = [getattr(config, name, 0) for name in names]
    for formats in (present, asked):
        formats[2] = 8 if formats[2] is True else int(formats[2])  # one name for the same head
    if present != asked:
        held, wanted = (", ".join(f"{n}={v}" for n, v in zip(names, values)) for values in (present, asked))
        cure = "load it as it is" if present[0] else "load it without these and call model.quantize(...)"
        raise ValueError(f"{path} holds weights with {held}, and was to be loaded with {wanted}: {cure}")


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The network without its head."""

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

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        past_key_values=None,
        inputs_embeds: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        cache=None,
        **kwargs,
    ) -> Union[tuple, BaseModelOutputWithPast]:
        """
        Args:
            input_ids: [B, S], or inputs_embeds [B, S, hidden] (special tokens are recognised by their embeddings).
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
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        given = one_of(past_key_values, cache)
        cache = as_cache(given) if use_cache or given is not None else None
        seen, prefix = self._start(cache, hidden)
        position_ids, visible = self._place(input_ids, hidden, position_ids, attention_mask, cache, seen)
        rows = position_ids.shape[1]
        rotary = rotary_tables(position_ids, self.config.head_size // rows, hidden.dtype)
        last, hidden_states, attentions = None, None, None
        if hidden.shape[1] == 1 and visible is None and not (output_attentions or output_hidden_states):
            last = self._decode_step(hidden, rotary, cache, seen)
        if last is None:
            past = Past(cache, prefix, hidden.shape[1], hidden.device)
            hidden_states, attentions = self._run_blocks(hidden, rotary, visible, past, output_attentions)
            last = hidden_states[-1]
        output = BaseModelOutputWithPast(
            last_hidden_state=last,
            **{CACHE_NAME: cache if use_cache else None},
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    def _run_blocks(self, hidden: Tensor, rotary, visible, past: Past, output_attentions: bool):
        """The embeddings and the output of each block, the last one after the final LayerNorm; attention weights."""
        hidden_states, attentions = [hidden], []
        for layer_idx, layer in enumerate(self.layers):
            block = self.checkpointed(layer, layer_idx)
            hidden, weights = block(hidden, rotary, visible, past, output_attentions)
            hidden_states.append(hidden)
            attentions.append(weights)
        hidden_states[-1] = self.final_layernorm(hidden)
        return hidden_states, attentions

    def _decode_step(self, hidden: Tensor, rotary, cache, seen) -> Optional[Tensor]:
        """What `_run_blocks` computes for one new token, by CPU kernels where they serve."""
        built_in = getattr(self.config, "_attn_implementation", None) in (None, "sdpa")
        if hidden.device.type != "cpu" or is_tracing() or not seen or network_functions() != NETWORK:
            return None
        if not built_in or chosen_attention(self.config) is not None:
            return None
        kinds = (GLMBlock, SelfAttention, MLP, QuantizedLinear)
        return decode_step(self.layers, self.final_layernorm, hidden, rotary, cache, kinds)

    def _start(self, cache, hidden: Tensor):
        """Number of tokens already cached (without the prefix), and the prefix where no cache holds it."""
        cached = cached_length(cache)
        if not self.prefix_length:
            return cached, None
        if cache is not None and (not isinstance(cached, int) or cached >= self.prefix_length):
            return cached - self.prefix_length, None
        prefix = self.prefix_encoder(hidden.shape[0], hidden.dtype)
        if cache is None:
            return 0, prefix
        past = Past(cache, None, self.prefix_length, hidden.device)
        for layer_idx, (key, value) in enumerate(prefix):
            past.extend(key, value, layer_idx)
        return 0, None

    def _place(self, input_ids, hidden, position_ids, attention_mask, cache, seen) -> tuple[Tensor, Optional[Tensor]]:
        """Positions [B, R, S] of the new tokens, and the keys that they may read, [B, 1, S, K] or None for all."""
        (B, S), slots = hidden.shape[:2], fixed_length(cache)
        keys = seen + S if slots is None else slots - self.prefix_length
        if attention_mask is not None and not is_tracing():
            check_mask(attention_mask, B, S, seen + S, keys)
        official = attention_mask is not None and attention_mask.dim() == 4
        geometry, first = geometry_of(cache), isinstance(seen, int) and seen == 0
        if first and (position_ids is None or not official):
            geometry = find_geometry(self._kinds(input_ids, hidden), None if official else attention_mask)
            remember_geometry(cache, geometry)
        if position_ids is not None:
            position_ids = self._checked_positions(position_ids, S)
        elif geometry is None:
            raise ValueError(
                "past_key_values without position_ids: this cache does not know where its context ends; pass "
                "position_ids [B, 2, S] with it, or the Cache object that the model returned"
            )
        else:
            position_ids = position_ids_between(geometry, seen, S, self.config.position_encoding_2d)
        if isinstance(seen, int) and seen + S > self.config.max_sequence_length:
            warn_once(
                f"the text is longer than the {self.config.max_sequence_length} tokens that the model was trained "
                "for: answers may get worse"
            )
        if official:
            visible = ~attention_mask[:, :, -S:].bool()
            visible = visible | ~visible.any(dim=-1, keepdim=True)  # a row of padding reads all, as in the original
        elif S == 1 and slots is None and not first and not hides_any(geometry, attention_mask):
            return position_ids, None
        else:
            visible = ~hidden_keys(geometry, attention_mask, seen, S, keys, hidden.device)
        return position_ids, F.pad(visible, (self.prefix_length, 0), value=True)

    def _kinds(self, input_ids: Optional[Tensor], hidden: Tensor) -> TokenKinds:
        if input_ids is not None:
            return TokenKinds.of_ids(input_ids, self.config)
        return TokenKinds.of_embeddings(hidden, self.word_embeddings, self.config)

    def _checked_positions(self, position_ids: Tensor, new_tokens: int) -> Tensor:
        rows = 2 if self.config.position_encoding_2d else 1
        if rows == 1 and position_ids.dim() == 2:
            position_ids = position_ids.unsqueeze(1)
        if position_ids.dim() != 3 or position_ids.shape[1] != rows or position_ids.shape[2] != new_tokens:
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

    def __init__(self, config: ChatGLMConfig, *args, **kwargs):
        config = copy.deepcopy(config)  # quantize() changes it: a model owns its configuration
        super().__init__(config, *args, **kwargs)
        self.transformer = ChatGLMModel(config)
        if config.head_bits:
            group_size = head_group_size(config.head_bits, config.quantization_group_size)
            self.lm_head = QuantizedLinear(
                config.hidden_size, config.vocab_size, config.head_bits, group_size, bias=False
            )
            self._tied_weights_keys = tied_head_keys()
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.word_embeddings = value

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
        input_ids: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        past_key_values=None,
        inputs_embeds: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        logits_to_keep: Union[int, Tensor] = 0,
        cache=None,
        **kwargs,
    ) -> Union[tuple, CausalLMOutputWithPast]:
        """Inputs as ChatGLMModel.forward.

        Args:
            labels: [B, S], -100 where no loss is wanted; the model shifts them.
            logits_to_keep: how many last positions (or which ones) get logits; 0 for all, as labels need them.

        Returns:
            loss, the mean cross entropy in float32, cast to the model's dtype; logits [B, kept, V].
        """
        if labels is not None:
            check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds, logits_to_keep)
        output = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=one_of(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = linear(self.lm_head, hidden if isinstance(kept, slice) and kept.start == 0 else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = shifted_cross_entropy(logits, labels, kwargs.get("num_items_in_batch")).to(logits.dtype)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: output.get(CACHE_NAME)},
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    # --- hooks of transformers' generate, checked on every rung of the ladder -------------------------------------

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs: Optional[Tensor] = None, *args, **kwargs):
        """Overridden to hand it a cache that grows in place, and what it does not know in forms that it lets pass:
        official masks [B, 1, S, S] as 2-D ones, positions [B, 2, S] of the prompt under a name of their own."""
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids") if inputs is None else inputs
        if mask is not None and mask.dim() == 4 and ids is not None:
            kwargs["attention_mask"] = padding_mask(mask, ids, self.config)
        positions, rows = kwargs.pop("position_ids", None), 3 if self.config.position_encoding_2d else 2
        if positions is not None and positions.dim() >= rows:  # transformers gives an assistant [B, S] ones of its own
            length = positions.shape[-1] if ids is None else ids.shape[1]
            kwargs["prompt_position_ids"] = self.transformer._checked_positions(positions, length)
        cache = give_cache(self, args, kwargs)
        with cache_of_generate(cache):
            output = super().generate(inputs, *args, **kwargs)
        if cache is not None and not int(cached_length(cache)):
            warn_once(
                "generate made no use of its cache, so each token computed the whole text again: this version of "
                "transformers hands it over in another way than ChatGLM-6B-Slim knows; see the versions in its README"
            )
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values=None,
        attention_mask: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        past=None,
        cache=None,
        prompt_position_ids: Optional[Tensor] = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Overridden for the 2-D positions and the prefix mask.

        Args:
            input_ids: the whole text so far.
            prompt_position_ids: [B, R, P], the caller's own for the prompt.
            position_ids: not looked at: transformers 5 makes [B, S] ones, and counts those of the caller on wrongly.
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: generate() takes a 2-D mask [batch, length] "
                "with 0 for padding, as the tokenizer returns it; only forward() takes the official 4-D masks"
            )
        given = one_of(past_key_values, cache, past)  # 4.25 and earlier, 4.26 to 5.23, 5.24 and later
        cache = None if given is None else as_cache(given)
        seen = max(int(cached_length(cache)) - self.transformer.prefix_length, 0)
        inputs = {CACHE_NAME: cache, "attention_mask": attention_mask, "use_cache": use_cache}
        for name in ("output_attentions", "output_hidden_states", "logits_to_keep"):
            if kwargs.get(name) is not None:
                inputs[name] = kwargs[name]
        if prompt_position_ids is not None:  # 4.23 does not repeat it for beams
            prompt_position_ids = prompt_position_ids.repeat_interleave(len(input_ids) // len(prompt_position_ids), 0)
        if not seen:
            length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
            first = {"inputs_embeds": inputs_embeds} if inputs_embeds is not None else {"input_ids": input_ids}
            if inputs_embeds is None and bool((input_ids[:, -1] == self.config.bos_token_id).all()):
                inputs["logits_to_keep"] = 1  # a bare prompt: only what follows it is asked for
            if prompt_position_ids is not None:
                inputs["position_ids"] = continued_position_ids(prompt_position_ids, 0, length)
            return {**first, **inputs}
        total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        if inputs_embeds is not None and total <= seen:  # input_ids holds the new tokens only
            total += inputs_embeds.shape[1]
        new_tokens = total - seen
        if new_tokens < 1:
            raise ValueError(
                f"the cache holds {seen} tokens and the input has {total}: pass the whole text, prompt and answer, "
                "with past_key_values"
            )
        geometry = self._cached_geometry(cache, input_ids, attention_mask, seen)
        if prompt_position_ids is not None:
            position_ids = continued_position_ids(prompt_position_ids, seen, new_tokens)
        else:
            position_ids = position_ids_between(geometry, seen, new_tokens, self.config.position_encoding_2d)
        slots = fixed_length(cache)
        if slots is not None:  # one shape for every step, so that a compiled step is compiled once
            slots -= self.transformer.prefix_length
            if slots < total:
                raise ValueError(
                    f"the static cache has room for {slots} tokens beside the P-tuning prefix, the text has {total}: "
                    "pass a StaticCache with max_cache_len = max_length + pre_seq_len"
                )
            inputs["attention_mask"] = hidden_keys(geometry, attention_mask, seen, new_tokens, slots, input_ids.device)
        return {"input_ids": input_ids[:, -new_tokens:].contiguous(), "position_ids": position_ids, **inputs}

    def _cached_geometry(self, cache, input_ids: Tensor, attention_mask, seen: int) -> Geometry:
        geometry = geometry_of(cache)
        one_more = input_ids.shape[1] <= seen + 1  # several new tokens may belong to another prompt
        if geometry is not None and geometry.padding.shape[0] == input_ids.shape[0] and one_more:
            return geometry
        geometry = find_geometry(TokenKinds.of_ids(input_ids, self.config), attention_mask)
        if bool((geometry.context_length > seen).any()):
            raise ValueError(
                f"the cache ends at token {seen}, inside a context of {int(geometry.context_length.max())} tokens: a "
                "GLM context is read in both directions and cannot be continued; pass the whole prompt without a cache"
            )
        remember_geometry(cache, geometry)
        return geometry

    @staticmethod
    def _reorder_cache(past, beam_idx: Tensor):
        """Beam search below 4.42 calls this in place of the cache's own method."""
        cache = as_cache(past)
        cache.reorder_cache(beam_idx)
        return cache

    # --- weights -------------------------------------------------------------------------------------------------

    def to_huge_pages(self) -> "ChatGLMForConditionalGeneration":
        """Copies the weights on the CPU from the mapped files to huge pages of the process, where Linux has them.

        Decoding reads them faster there (README.md, "Speed on a CPU"). It takes seconds for some GB, and memory that
        the system cannot take back, unlike that of a mapped file. The parameters are new ones, so make an optimizer
        afterwards. Needs chatglm_cpu; without it one line says so.

        Returns:
            the model itself.

        Raises:
            RuntimeError, OSError: not enough memory; the model stays usable.
        """
        move_to_huge_pages(self)
        return self

    def quantize(self, bits: int, group_size: int = 0, quantize_head: Union[bool, int] = False, **kwargs):
        """Replaces the linear layers by INT8 or INT4 ones, in place; see quantization.quantize_model."""
        return quantize_model(self, bits, group_size=group_size, quantize_head=quantize_head, **kwargs)

    def dequantize(self, dtype: Optional[torch.dtype] = None):
        """Plain layers with the same numbers in place of INT8 or INT4 ones; see quantization.dequantize_model."""
        return dequantize_model(self, dtype)


def check_labels(labels: Tensor, inputs: Optional[Tensor], logits_to_keep: Union[int, Tensor]) -> None:
    if torch.is_tensor(logits_to_keep) or logits_to_keep:
        raise ValueError(
            f"labels with logits_to_keep = {logits_to_keep!r}: a loss needs the logits of all positions; give one of "
            "the two"
        )
    if inputs is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for an input of {tuple(inputs.shape[:2])}: give one label a "
            "token, -100 where no loss is wanted; the model shifts them"
        )


def shifted_cross_entropy(logits: Tensor, labels: Tensor, num_items: Optional[int] = None) -> Tensor:
    """Mean over the labels that are not -100 (or sum / num_items, which Trainer gives for accumulated batches)."""
    labels = labels[:, 1:].reshape(-1).to(logits.device)
    loss = F.cross_entropy(
        logits[:, :-1].float().reshape(-1, logits.shape[-1]),
        labels,
        ignore_index=-100,
        reduction="mean" if num_items is None else "sum",
    )
    return loss if num_items is None else loss / num_items


# transformers 4.29-4.31 and 4.45-4.51 copy the code on save_pretrained only for registered classes.
ChatGLMForConditionalGeneration.register_for_auto_class("AutoModel")
