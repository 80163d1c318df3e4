"""What of a source's JSON settings goes into an output: known fields of the right type. What is left out is named.

A settings file can carry instructions: with trust_remote_code transformers fetches the classes that `auto_map` and
`custom_pipelines` name, `_attn_implementation` names a kernel of the Hub, `custom_generate` a repository, PEFT imports
what `auto_mapping` and `megatron_core` say, and Jinja runs a chat template. So nothing is copied that isn't listed
here, and nothing of a source reaches transformers before it has passed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from package import ROOT as PACKAGE
from package import package_module
from slimming import checkpoint_io as io
from slimming.checkpoint_io import Exit, Refusal

Rule = Callable[[Any], bool]

IDENTITY = ("auto_map", "architectures", "model_type", "tokenizer_class", "code_version")  # always the package's own
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NULLABLE = (*TOKEN_IDS, "mask_token_id", "gmask_token_id", "pre_seq_len", "residual_scale")  # null: the default
NULLABLE += ("quantization_bit", "quantization_group_size", "quantize_head", "quantization_embeddings")


def switch(value: Any) -> bool:
    return isinstance(value, bool)


def natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def number(value: Any) -> bool:
    return type(value) in (int, float) and -(2.0**63) < value < 2.0**63


def ids(value: Any) -> bool:
    return natural(value) or list_of(natural)(value)


def text(pattern: str) -> Rule:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def list_of(rule: Rule) -> Rule:
    return lambda value: isinstance(value, list) and len(value) <= 10_000 and all(map(rule, value))


def table_of(rule: Rule) -> Rule:
    return lambda value: isinstance(value, dict) and all(MODULE(key) and rule(one) for key, one in value.items())


def either(*rules: Rule) -> Rule:
    return lambda value: any(rule(value) for rule in rules)


VERSION = text(r"\d+(\.\w+){1,4}(\+\w+)?")
MODULE = text(r"[\w.|()\[\]\\*+?^$-]{1,1000}")  # a module's name or a pattern of names
MODULES = either(MODULE, list_of(MODULE))
WORD = text(r"\w{1,40}")
TYPE = text("float16|bfloat16|float32|float64")

MODEL_EXTRAS: dict[str, Rule] = {"torch_dtype": TYPE, "dtype": TYPE, "transformers_version": VERSION}
GENERATION: dict[str, Rule] = {
    **dict.fromkeys(TOKEN_IDS, ids),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_beams"), natural),
    **dict.fromkeys(("num_beam_groups", "num_return_sequences", "no_repeat_ngram_size"), natural),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff"), number),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "diversity_penalty"), number),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), switch),
    "early_stopping": either(switch, text("never")),
    "_from_model_config": switch,
    "transformers_version": VERSION,
}
TOKENIZER: dict[str, Rule] = {
    **dict.fromkeys(("do_lower_case", "remove_space", "clean_up_tokenization_spaces"), switch),
    "model_max_length": either(number, lambda value: type(value) is int and value > 0),  # "none" is 10**30
}
ADAPTER: dict[str, Rule] = {
    **dict.fromkeys(("peft_type", "task_type", "bias"), WORD),
    **dict.fromkeys(("r", "qalora_group_size"), natural),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), number),
    **dict.fromkeys(("fan_in_fan_out", "inference_mode", "use_rslora", "use_dora", "use_qalora", "lora_bias"), switch),
    **dict.fromkeys(("merge_weights", "ensure_weight_tying"), switch),
    **dict.fromkeys(("target_modules", "modules_to_save", "exclude_modules", "layers_pattern"), MODULES),
    "target_parameters": MODULES,
    "init_lora_weights": either(switch, WORD),
    "layers_to_transform": ids,
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), table_of(number)),
    "enable_lora": list_of(switch),
    "trainable_token_indices": either(ids, table_of(list_of(natural))),
    "base_model_name_or_path": text(r"[^\x00-\x1f\x7f]{1,500}"),
    "revision": text(r"[\w./-]{1,100}"),
    "peft_version": text(r"[\w.+@-]{1,80}"),
}
# What transformers 4.x wrote into every config.json, whatever the model: it says nothing, so nothing is said of it.
SILENT: dict[str, Any] = {
    **dict.fromkeys(("diversity_penalty", "encoder_no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("length_penalty", "repetition_penalty", "temperature", "top_p", "typical_p"), 1.0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    "max_length": 20,
    "top_k": 50,
    "return_dict": True,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
}


def left_out(file: str, names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    shown = ", ".join(name[:60] for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return (f"{file}: left out {shown} (no settings of a ChatGLM-6B, or of a wrong type)",)


def filtered(content: dict[str, Any], rules: dict[str, Rule], ignored: tuple[str, ...] = ()) -> tuple[dict, list[str]]:
    """The fields that pass, null among them, and the names of those that don't and say something."""
    kept = {name: content[name] for name, rule in rules.items() if name in content and passes(content[name], rule)}
    names = [name for name in content if name not in kept and name not in ignored]
    return kept, [name for name in names if content[name] and content[name] != SILENT.get(name, ...)]


def passes(value: Any, rule: Rule) -> bool:
    return value is None or rule(value)


# ---------------------------------------------------------------------------------------------------- the four files


@functools.cache
def config_class() -> Any:
    return package_module("configuration_chatglm").ChatGLMConfig  # imports transformers


@functools.cache
def config_names() -> frozenset[str]:
    """The fields that ChatGLMConfig knows, the official int4 code's name for a quantized embedding among them."""
    known = set(package_module("configuration_chatglm").FIELDS) - {"code_version"}
    return frozenset(known | {"quantization_embeddings"})


def model_fields(folder: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a config.json that ChatGLMConfig knows, judged by it; and what was left out.

    Raises:
        Refusal: a known field of a type or size that no model can have.
    """
    judge_weights_name(folder, raw)
    own = {name: raw[name] for name in raw if name in config_names() and not (raw[name] is None and name in NULLABLE)}
    if raw.get("num_hidden_layers") is not None:
        own.setdefault("num_layers", raw["num_hidden_layers"])
    settings_of(folder, own)
    extras, dropped = filtered(raw, MODEL_EXTRAS, (*config_names(), *IDENTITY, "_name_or_path", "num_hidden_layers"))
    extras = {name: value for name, value in extras.items() if value is not None}
    return {**own, **extras}, left_out("config.json", dropped + foreign_code(raw))


def settings_of(folder: Path, fields: dict[str, Any]) -> Any:
    """The configuration that some fields make, its defaults included; ids that are missing fit any vocabulary."""
    known = {name: value for name, value in fields.items() if name in config_names()}
    try:
        return config_class()(**{"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 3, **known})
    except ValueError as error:
        raise Refusal(Exit.BAD_SETTINGS, f"{folder / 'config.json'}: {error}") from None


def foreign_code(raw: dict[str, Any]) -> list[str]:
    """`auto_map`, where it names the code of another repository; a folder's own is replaced by the package's."""
    return ["auto_map"] if "--" in repr(raw.get("auto_map")) else []


def judge_weights_name(folder: Path, raw: dict[str, Any]) -> None:
    """transformers 4.57 and later load the file that this field names, and slim.py would take another."""
    name = raw.get("transformers_weights")
    if name and name != io.loaded_file({path.name for path in folder.iterdir()}):
        message = f"{folder / 'config.json'} names {repr(name)[:80]} as its weights (transformers_weights)"
        raise Refusal(Exit.UNSUPPORTED, f"{message}: rename that file to {io.WEIGHT_NAMES[0]} and remove the field")


def generation_fields(folder: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Of generation_config.json; None where there is none."""
    name = "generation_config.json"
    if not (folder / name).exists():
        return None, ()
    kept, dropped = filtered(io.read_json(folder, name), GENERATION)
    return {key: value for key, value in kept.items() if value is not None}, left_out(name, dropped)


def tokenizer_fields(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Choices about text of tokenizer_config.json; everything else there is the package's, its template too."""
    name, own, dropped = "tokenizer_config.json", {}, []
    if (folder / name).exists():
        raw = io.read_json(folder, name)
        package = io.read_json(PACKAGE, name)
        names = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "end_token", "gmask_token", "eop_token")
        own, dropped = filtered(raw, TOKENIZER, (*(set(package) - set(TOKENIZER)), *names))
        own = {key: value for key, value in own.items() if value is not None}
        dropped += foreign_code(raw)
        if raw.get("chat_template") == template(PACKAGE):
            dropped.remove("chat_template")
    notes = left_out(name, dropped)
    if template(folder) not in (None, template(PACKAGE)):
        notes += ("chat_template.jinja: left out, the package's own takes its place",)
    return own, notes


def template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if not path.is_file() or path.stat().st_size > io.MAX_JSON_BYTES:
        return "" if path.exists() or path.is_symlink() else None
    return path.read_text(encoding="utf-8", errors="replace")


def adapter_fields(folder: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Of adapter_config.json."""
    kept, dropped = filtered(raw, ADAPTER)
    return kept, left_out("adapter_config.json", dropped)
