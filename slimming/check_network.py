"""The last part of the proof: logits of the output's code and files, and of a network written from the formulas.

The reference computes in float64, and in float32 to see how far rounding alone carries; the output's own code runs in
float32 over the output's own files. Both take one layer at a time into memory. What is unusual in the formulas: the
state that passes on is the *normalised* input times `residual_scale`; keys of the context are visible to all, later
ones causally; each half of a head turns with one of two positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from package import package_module
from slimming.check import (
    EMBEDDING,
    HEAD,
    Case,
    Difference,
    Stored,
    expected_blocks,
    read_json,
    source_block,
    transformed,
)

PROMPTS = ("你好", "介绍一下清华大学", "hello world, this is a test\n1 + 1 = 2")
ANSWER_TOKENS = 3  # of the prompt, again as the beginning of an answer: causal keys, the second row of positions
DEFAULTS = {"num_layers": 28, "num_attention_heads": 32, "hidden_size": 4096, "inner_hidden_size": 16384}
DEFAULTS.update({"layernorm_epsilon": 1e-5, "position_encoding_2d": True, "residual_scale": math.sqrt(56)})
HEAD_ROWS = 1 << 14  # of the head, in memory at a time
FLOAT32_ROUNDING = 2.0**-24
NO_FIELDS = ("auto_map", "architectures", "torch_dtype", "dtype")  # of a model that is made from its class

Numbers = Callable[..., Tensor]  # (name, begin, end) -> rows of a tensor as plain floating numbers


@dataclass(frozen=True)
class Prompt:
    """Text, [gMASK], <sop>, beginning of an answer."""

    ids: list[int]
    context: int  # tokens before <sop>, the last of them [gMASK]


def compare_logits(case: Case, output: Path, found: dict[str, Stored]) -> str:
    """What to say of the logits.

    Raises:
        Difference: they are further apart than rounding can carry them, or aren't finite.
    """
    if case.kind != "model":
        return f"a {case.kind} alone computes none"
    config = {**DEFAULTS, **{name: value for name, value in case.config.items() if value is not None}}
    config["rows"] = len(case.kept)
    prompts = encoded_prompts(output)
    with torch.no_grad():
        exact, short = reference(lambda *rows: expected_numbers(case, *rows), config, prompts)
        if not all(logits.isfinite().all() for logits in exact):
            if case.options.allow_nonfinite:
                return "not compared, the source's own aren't finite"
            raise Difference("the source's own logits aren't finite: look for NaN or Inf in its weights")
        ours = output_logits(output, found, prompts)
    size = max(logits.abs().max().item() for logits in exact)
    rounding = max((a - b).abs().max().item() for a, b in zip(exact, short))
    limit = rounding_limit(config, rounding, size)
    worst = 0.0
    for text, mine, theirs in zip(PROMPTS, exact, ours):
        apart = (mine - theirs).abs()
        if not theirs.isfinite().all() or apart.max() > limit:
            row, column = divmod(int(torch.where(apart.isfinite(), apart, torch.inf).argmax()), apart.shape[1])
            values = f"{theirs[row, column].item():.6g}, expected {mine[row, column].item():.6g}"
            raise Difference(f"prompt {text!r}, token {row}, column {column}: {values} within {limit:.1e}")
        worst = max(worst, apart.max().item())
    if not size:
        return f"all are zero for {len(prompts)} prompts, as the formulas have it, which says nothing of the layers"
    return f"{len(prompts)} prompts within {worst:.1e} of the formulas (limit {limit:.1e}, largest logit {size:.1f})"


def rounding_limit(config: dict[str, Any], rounding: float, size: float) -> float:
    """How far a float32 computation of logits up to `size` can be from the exact one.

    Other code adds in another order than the reference in float32. Its error is of the kind of that one, which is
    measured (`rounding`); and for an unlucky measurement there is what the additions of 4 products a layer carry:
    roundings of random signs grow with the root of their number.
    """
    additions = 4 * config["num_layers"] * max(config["hidden_size"], config["inner_hidden_size"])
    return 4 * rounding + math.sqrt(additions) * FLOAT32_ROUNDING * size


def encoded_prompts(output: Path) -> list[Prompt]:
    """Ids of each prompt, [gMASK], <sop>, and its first ones again for an answer."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=(output / "ice_text.model").read_bytes())
    frame = [processor.piece_to_id("[gMASK]"), processor.piece_to_id("<sop>")]
    texts = [processor.encode(prompt.replace("\n", "<n>")) for prompt in PROMPTS]
    return [Prompt(ids + frame + ids[:ANSWER_TOKENS], len(ids) + 1) for ids in texts]


# ------------------------------------------------------------------------------------------------------ the numbers


def expected_numbers(case: Case, name: str, begin: int = 0, end: int | None = None) -> Tensor:
    """Rows of what a tensor of the source becomes, int8 and int4 multiplied out."""
    name = name if name in case.tensors else EMBEDDING if name == HEAD else name
    stored = case.tensors[name]
    if end is None:
        blocks = [block for _, block in expected_blocks(case, stored)]
        parts = {part: torch.cat([block[part] for block in blocks]) for part in blocks[0]}
    else:
        parts = transformed(case, name, source_block(case, stored, begin, end))
    if parts[name].is_floating_point():
        return parts[name]
    scale = parts.get(f"{name}_scale")
    if scale is None:
        scales = case.tensors[f"{name}_scale"]
        block = source_block(case, scales, begin, begin + len(parts[name]))
        scale = transformed(case, scales.name, block)[scales.name]
    return multiplied(parts[name], scale, columns_of(case.config, name))


def output_numbers(output: dict[str, Stored], config: dict[str, Any], name: str) -> Tensor:
    stored = output[name if name in output else EMBEDDING if name == HEAD else name]
    numbers = stored.whole()
    if numbers.is_floating_point():
        return numbers
    return multiplied(numbers, output[f"{stored.name}_scale"].whole(), columns_of(config, name))


def columns_of(config: dict[str, Any], name: str) -> int:
    field = "inner_hidden_size" if "dense_4h_to_h" in name else "hidden_size"
    return config.get(field) or DEFAULTS[field]


def multiplied(values: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Integers times scales, as float32 [out, in]; int4 has the even column in the high four bits."""
    if values.shape[1] != columns:
        values = torch.stack((values >> 4, (values << 4) >> 4), dim=2).flatten(1)
    scales = scale.float().view(len(values), -1, 1)  # one for each row, or for each group of columns
    return (values.float().view(len(values), scales.shape[1], -1) * scales).flatten(1)


# ---------------------------------------------------------------------------------------------------- the reference


@dataclass(frozen=True)
class Stream:
    """One prompt in one type on its way through the layers."""

    state: Tensor  # [S, hidden]
    cos: Tensor  # [S, R, size / 2], for R parts of each head
    sin: Tensor
    visible: Tensor  # [S, S], True for keys that a token may read


def reference(numbers: Numbers, config: dict[str, Any], prompts: list[Prompt]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits [S, V] of each prompt, computed in float64 and in float32."""
    streams = []
    for dtype in (torch.float64, torch.float32):
        for prompt in prompts:
            embedded = torch.cat([numbers(EMBEDDING, index, index + 1) for index in prompt.ids]).to(dtype)
            streams.append(Stream(embedded, *rotation(config, prompt, dtype), visible_keys(prompt)))
    prefix = prefix_states(numbers, config)
    for layer in range(config["num_layers"]):
        states = block(numbers, config, layer, streams, prefix)
        streams = [replace(stream, state=state) for stream, state in zip(streams, states)]
    states = normalised(numbers, config, "transformer.final_layernorm", [stream.state for stream in streams])
    parts = []
    for begin in range(0, config["rows"], HEAD_ROWS):
        weight = numbers(HEAD, begin, min(begin + HEAD_ROWS, config["rows"]))
        parts.append([state @ weight.to(state.dtype).T for state in states])
    logits = [torch.cat(columns, dim=1).double() for columns in zip(*parts)]
    return logits[: len(prompts)], logits[len(prompts) :]


def visible_keys(prompt: Prompt) -> Tensor:
    keys = torch.arange(len(prompt.ids))
    return (keys[None, :] < prompt.context) | (keys[None, :] <= keys[:, None])


def rotation(config: dict[str, Any], prompt: Prompt, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [S, R, size / 2]: frequencies are rounded to float16 once, and 2-D models rotate two halves."""
    context, places = prompt.context, torch.arange(len(prompt.ids))
    rows = [places]
    if config["position_encoding_2d"]:  # the context's places, then that of [gMASK]; and the answer's from <sop> on
        rows = [torch.where(places < context, places, context - 1), (places - context + 1).clamp(min=0)]
    size = config["hidden_size"] // config["num_attention_heads"] // len(rows)
    frequencies = (1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)).half().to(dtype)
    angles = torch.stack(rows, dim=1).to(dtype)[:, :, None] * frequencies
    return angles.cos(), angles.sin()


def rotated(states: Tensor, stream: Stream) -> Tensor:
    """[S, heads, d]: each part's halves (x, y) become (x cos - y sin, y cos + x sin)."""
    x, y = states.unflatten(-1, (stream.cos.shape[1], 2, -1)).unbind(-2)
    cos, sin = stream.cos[:, None], stream.sin[:, None]
    return torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-2).flatten(-3)


def linear(numbers: Numbers, name: str, states: list[Tensor]) -> list[Tensor]:
    """The same layer of every stream; its weight is read once."""
    weight, bias = numbers(f"{name}.weight"), numbers(f"{name}.bias")
    cast = {dtype: (weight.to(dtype), bias.to(dtype)) for dtype in {state.dtype for state in states}}
    return [state @ cast[state.dtype][0].T + cast[state.dtype][1] for state in states]


def normalised(numbers: Numbers, config: dict[str, Any], name: str, states: list[Tensor]) -> list[Tensor]:
    weight, bias = numbers(f"{name}.weight"), numbers(f"{name}.bias")
    results = []
    for state in states:
        centred = state - state.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + config["layernorm_epsilon"]).sqrt()
        results.append(centred / deviation * weight.to(state.dtype) + bias.to(state.dtype))
    return results


def block(numbers: Numbers, config: dict[str, Any], layer: int, streams: list[Stream], prefix: Tensor | None) -> list:
    """The states of every stream after one layer."""
    name, scale = f"transformer.layers.{layer}", config["residual_scale"]
    normed = normalised(numbers, config, f"{name}.input_layernorm", [stream.state for stream in streams])
    fused = linear(numbers, f"{name}.attention.query_key_value", normed)
    past = None if prefix is None else prefix[:, 2 * layer : 2 * layer + 2]
    context = [attended(config, *pair, past) for pair in zip(fused, streams)]
    outputs = linear(numbers, f"{name}.attention.dense", context)
    hidden = [a * scale + b for a, b in zip(normed, outputs)]
    normed = normalised(numbers, config, f"{name}.post_attention_layernorm", hidden)
    inner = [gelu(state) for state in linear(numbers, f"{name}.mlp.dense_h_to_4h", normed)]
    outputs = linear(numbers, f"{name}.mlp.dense_4h_to_h", inner)
    return [a * scale + b for a, b in zip(normed, outputs)]


def attended(config: dict[str, Any], fused: Tensor, stream: Stream, past: Tensor | None) -> Tensor:
    """[S, 3 * hidden], for each head its query, key and value, -> [S, hidden]; prefix `past` [P, 2, heads, d]."""
    heads = config["num_attention_heads"]
    query, key, value = fused.unflatten(-1, (heads, 3, -1)).unbind(-2)
    query, key, visible = rotated(query, stream), rotated(key, stream), stream.visible
    if past is not None:
        past_key, past_value = past.to(fused.dtype).unbind(1)
        key, value = torch.cat((past_key, key)), torch.cat((past_value, value))
        visible = torch.cat((visible.new_ones(len(visible), len(past)), visible), dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))


def prefix_states(numbers: Numbers, config: dict[str, Any]) -> Tensor | None:
    """Keys and values of a P-tuning prefix, [P, 2 * layers, heads, d] in float64."""
    if not config.get("pre_seq_len"):
        return None
    name = "transformer.prefix_encoder"
    states = numbers(f"{name}.embedding.weight").double()
    if config.get("prefix_projection"):
        (states,) = linear(numbers, f"{name}.trans.0", [states])
        (states,) = linear(numbers, f"{name}.trans.2", [states.tanh()])
    return states.view(len(states), 2 * config["num_layers"], config["num_attention_heads"], -1)


# ------------------------------------------------------------------------------------------------ the output's model


def output_logits(output: Path, found: dict[str, Stored], prompts: list[Prompt]) -> list[Tensor]:
    """Logits [S, V] of the output's settings, code and numbers in float32, a layer at a time in memory.

    The code is the package's: that both are the same bytes has been seen before.
    """
    model = empty_model(output)
    config = read_json(output / "config.json")
    inner = model.transformer
    parts = {"transformer.word_embeddings": inner.word_embeddings, "lm_head": model.lm_head}
    parts.update({f"transformer.layers.{index}": layer for index, layer in enumerate(inner.layers)})
    parts["transformer.final_layernorm"] = inner.final_layernorm
    if config.get("pre_seq_len"):
        parts["transformer.prefix_encoder"] = inner.prefix_encoder
    for name, module in parts.items():
        fill_when_called(module, name, lambda tensor: output_numbers(found, config, tensor).float())
    return [model(input_ids=torch.tensor([prompt.ids]), use_cache=False).logits[0].double() for prompt in prompts]


def empty_model(output: Path) -> Any:
    """The model without numbers; quantized layers are plain ones here and get their numbers multiplied out."""
    config_class = package_module("configuration_chatglm").ChatGLMConfig
    plain = {"quantization_bit": 0, "quantize_head": False, "quantization_group_size": 0}
    fields = {name: value for name, value in read_json(output / "config.json").items() if name not in NO_FIELDS}
    with torch.device("meta"):
        return (
            package_module("modeling_chatglm")
            .ChatGLMForConditionalGeneration(config_class(**{**fields, **plain}))
            .eval()
        )


def fill_when_called(module: torch.nn.Module, name: str, read: Callable[[str], Tensor]) -> None:
    """The module gets its numbers for the time of each call."""
    empty = dict(module.state_dict())

    def fill(module: torch.nn.Module, _: Any) -> None:
        module.load_state_dict({tensor: read(f"{name}.{tensor}") for tensor in empty}, assign=True)

    def clear(module: torch.nn.Module, _: Any, __: Any) -> None:
        module.load_state_dict(empty, assign=True)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(clear)
