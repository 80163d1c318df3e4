"""Configuration of ChatGLM-6B: the official fields, with the released slim model (130,528 rows) as defaults.

Two things are unusual. The residual stream carries the *normalised* input times `residual_scale`, which is √56 for any
depth, because the original code always computes √(2·28). And checkpoints of the first release still hold 20,000
image-token rows in front of the text vocabulary, so that every id is larger there.
Fields are checked for type and value, so that "false" or 2.5 from a file is an error here and not a wrong model later.
"""

from __future__ import annotations

import functools
import logging
import math
import re

from transformers.configuration_utils import PretrainedConfig

logger = logging.getLogger(__name__)

# 5.23. Versions before it lack ways to split that the plan names, or rename what it says of a tied embedding.
HAS_TENSOR_PARALLELISM = hasattr(PretrainedConfig, "extra_files")
CODE_VERSION = "2.0.0"  # of all code files of a folder; written into its config.json as `code_version`
LICENSE_NAME = "chatglm-6b-license"  # of the released weights
LICENSE_LINK = "https://github.com/THUDM/ChatGLM-6B/blob/main/MODEL_LICENSE"
IMAGE_TOKENS = 20000  # rows that the first release reserved in front of every text token
MASK, GMASK, SOP, EOP, PAD = 130000, 130001, 130004, 130005, 3  # ids in the released slim vocabulary

SWITCH, TOKEN, POSITIVE, VERSION = (True, False), "token", "positive", re.compile(r"\d{1,6}(\.\d{1,6}){0,3}")
FIELDS = {  # name: (default, rule); the rule is a largest whole number, all values there are, or one of those above
    "vocab_size": (130528, 2**24),
    "hidden_size": (4096, 2**20),
    "num_layers": (28, 2**12),
    "num_attention_heads": (32, 2**16),
    "inner_hidden_size": (16384, 2**22),
    "layernorm_epsilon": (1e-5, POSITIVE),
    "residual_scale": (56**0.5, POSITIVE),
    "max_sequence_length": (2048, 2**31 - 1),
    "position_encoding_2d": (True, SWITCH),
    "use_cache": (True, SWITCH),
    "tie_word_embeddings": (True, SWITCH),
    "bos_token_id": (SOP, TOKEN),
    "eos_token_id": (EOP, TOKEN),
    "mask_token_id": (None, TOKEN),
    "gmask_token_id": (None, TOKEN),
    "pad_token_id": (PAD, TOKEN),
    "quantization_bit": (0, (0, 4, 8)),
    "quantization_group_size": (0, (0, 32, 64, 128)),
    "quantize_head": (False, (False, True, 0, 4, 8)),
    "quantize_activations": (False, SWITCH),
    "pre_seq_len": (None, 2**20),
    "prefix_projection": (False, SWITCH),
    "code_version": (CODE_VERSION, VERSION),
}


class ChatGLMConfig(PretrainedConfig):
    r"""Sizes, ids and switches of a ChatGLM model; FIELDS has all of them, their defaults and limits.

    Args:
        num_attention_heads: must divide `hidden_size`; the head size is a multiple of 4 (2-D rotary) or 2 (1-D).
        bos_token_id, eos_token_id: `<sop>`, which starts the answer, and `<eop>` (or a list), which ends it.
        mask_token_id, gmask_token_id: `[MASK]` and `[gMASK]`; None takes their places before `<sop>`.
        max_sequence_length: the length the model was trained for, in tokens; longer works, with a warning.
        position_encoding_2d: rotate one half of each head by the position in the context and the other half by the
            position in the answer (the released models), or the whole head by one position.
        quantization_bit: 0, 4 or 8; non-zero builds quantized linear layers, ready to load such a checkpoint.
        quantization_group_size: columns that share a scale; 0 for a whole row (the official format).
        quantize_head: embedding and head too: True or 8 for int8 rows, 4 for int4 (needs `quantization_bit`).
        quantization_embeddings: the official int4 code's name for the same, with the bits of the layers.
        quantize_activations: chatglm_cpu, on CPUs with AVX-512 VNNI, may round the activations of long inputs to int8,
            with a scale for each 32 columns, before products with quantized weights: sooner, and a little less exact.
        pre_seq_len, prefix_projection: P-tuning v2: length of the trained prefix (None: none), and its two-layer form.
        residual_scale: factor of the residual branch; None gives √56.
        code_version: the oldest code that reads the checkpoint as meant; None for this one.

    Raises:
        ValueError: a value that no model can be built from, before any memory is taken.

    Example:
        >>> config = ChatGLMConfig(num_layers=2, hidden_size=64, num_attention_heads=4, inner_hidden_size=256)
        >>> config.num_hidden_layers, config.gmask_token_id
        (2, 130001)
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "num_attention_heads",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "inner_hidden_size",
        "layer_norm_eps": "layernorm_epsilon",
    }

    def __init__(self, **kwargs):
        kwargs.update({field: kwargs.pop(name) for name, field in self.attribute_map.items() if name in kwargs})
        fields = {name: kwargs.pop(name, default) for name, (default, _) in FIELDS.items()}
        # [MASK] and [gMASK] have fixed places before <sop> in every vocabulary
        sop = fields["bos_token_id"] if type(fields["bos_token_id"]) is int else SOP  # anything else is refused below
        derived = {"mask_token_id": sop - (SOP - MASK), "gmask_token_id": sop - (SOP - GMASK)}
        derived.update({name: FIELDS[name][0] for name in ("residual_scale", "code_version")})
        official = kwargs.pop("quantization_embeddings", False)
        check("quantization_embeddings", official, type(official) is bool, f"use one of {SWITCH}")
        if official and fields["quantize_head"] is False:
            fields["quantize_head"] = fields["quantization_bit"]
        for name, value in fields.items():
            setattr(self, name, derived.get(name) if value is None else value)
        self.check_values()  # before transformers 5 compares some of them
        self.code_version = newer_version(self.code_version)
        shared = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # with transformers
        super().__init__(**{name: fields[name] for name in shared}, **kwargs)
        self.architectures = ["AutoModelForCausalLM"]  # the class that `transformers serve` asks transformers for

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def head_bits(self) -> int:
        """Bits of embedding and head: 8, 4, or 0 for the model's own dtype."""
        bits = 8 if self.quantize_head is True else int(self.quantize_head)
        return bits if self.quantization_bit else 0

    @property
    def head_group_size(self) -> int:
        """Int8 rows need no groups; an int4 head has those of the other layers."""
        return self.quantization_group_size if self.head_bits == 4 else 0

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """How transformers splits the network over processes: by heads, and by inner columns."""
        if not HAS_TENSOR_PARALLELISM:
            return None
        plan, pairs = {}, {"attention.query_key_value": "attention.dense", "mlp.dense_h_to_4h": "mlp.dense_4h_to_h"}
        for split, join in pairs.items():
            plan.update({f"layers.*.{split}": "colwise", f"layers.*.{join}": "rowwise"})
            if self.quantization_bit and not self.quantization_group_size:  # each process needs the scale of a row
                plan[f"layers.*.{join}.weight_scale"] = "replicate"
        return plan if self.head_bits else {**plan, "word_embeddings": "embedding_rowwise"}

    def check_processes(self, processes: int) -> None:
        """ValueError where that many cannot have equal parts of each layer."""
        heads, group = self.num_attention_heads, self.quantization_group_size or 1
        parts = math.gcd(heads, self.hidden_size // group, self.inner_hidden_size // group)
        cure = f"{processes} processes cannot share its heads and groups of columns, take a divisor of {parts}"
        check("num_attention_heads", heads, parts % processes == 0, cure)
        alone = processes == 1 or self.pre_seq_len is None
        check("pre_seq_len", self.pre_seq_len, alone, "tensor parallelism is not for P-tuning: use a device_map")

    def check_values(self) -> None:
        """Raises a ValueError that names field, value and cure where no model can be built."""
        for name in FIELDS:
            check_field(name, getattr(self, name), self.vocab_size)
        heads, parts = self.num_attention_heads, 4 if self.position_encoding_2d else 2
        whole_heads = self.hidden_size % heads == 0
        check("num_attention_heads", heads, whole_heads, f"it must divide hidden_size = {self.hidden_size}")
        sizes = f"(hidden_size {self.hidden_size} / num_attention_heads {heads})"
        can_rotate = self.head_size % parts == 0
        check("head_size", self.head_size, can_rotate, f"{sizes} cannot be rotated, use a multiple of {parts}")


def check_field(name: str, value, vocab_size: int = FIELDS["vocab_size"][0]) -> None:
    """ValueError for a value that no model with such a vocabulary can have, whatever the other fields are."""
    default, rule = FIELDS[name]
    if type(rule) is int:
        good, cure = type(value) is int and 1 <= value <= rule, f"give a whole number from 1 to {rule}"
        good, cure = (good or value is None, f"{cure}, or None") if default is None else (good, cure)
    elif type(rule) is tuple:  # 1 is not True, and 8.0 not 8
        good, cure = any(type(value) is type(one) and value == one for one in rule), f"use one of {rule}"
    elif rule is POSITIVE:
        good, cure = type(value) in (int, float) and 0 < value < math.inf, f"give a number above 0, as {default}"
    elif rule is VERSION:
        good, cure = isinstance(value, str) and rule.fullmatch(value), f"give a version such as {default!r}"
    else:  # several ids may end an answer; a model can do without an end and without padding
        ids = value if name == "eos_token_id" and isinstance(value, (list, tuple)) else [value]
        spared = value is None and name in ("eos_token_id", "pad_token_id")
        good = spared or all(type(token) is int and 0 <= token < vocab_size for token in ids)
        cure = (
            f"ids run from 0 to vocab_size - 1 = {vocab_size - 1}; slim checkpoints use {MASK} [MASK], "
            f"{GMASK} [gMASK], {SOP} <sop>, {EOP} <eop>, {PAD} <pad>, full ones {IMAGE_TOKENS} more"
        )
    check(name, value, good, cure)


def check(field: str, value, good: bool, cure: str) -> None:
    if not good:
        raise ValueError(f"ChatGLMConfig.{field} = {repr(value)[:80]}: {cure}")


def newer_version(asked: str) -> str:
    """Of the version that a config.json asks for and this code's own; a warning where that is the former."""
    theirs, ours = ([int(part) for part in version.split(".")] for version in (asked, CODE_VERSION))
    if theirs <= ours:
        return CODE_VERSION
    warn_once(  # a configuration is made several times while a model loads
        f"config.json asks for version {asked} of the code, the code that runs is {CODE_VERSION}: put the newer .py "
        "files beside it; where this process has used another folder of the same name, the code is that one's"
    )
    return asked


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


MODEL_CARD = f"""---
language:
- zh
- en
{{origin}}library_name: transformers
pipeline_tag: text-generation
---

# ChatGLM

Saved with version {CODE_VERSION} of the code of ChatGLM-6B-Slim, which is beside it in `.py` files under Apache-2.0;
`trust_remote_code=True` runs it. Write here what the model learned, from which data, and its licence.
"""
ORIGIN = f"license: other\nlicense_name: {LICENSE_NAME}\nlicense_link: {LICENSE_LINK}\nbase_model: THUDM/chatglm-6b\n"


def model_card(config: ChatGLMConfig) -> str:
    """The README.md of a saved model, which the Hub reads; only the released sizes tell whose weights those were."""
    is_6b = (config.hidden_size, config.num_layers) == (FIELDS["hidden_size"][0], FIELDS["num_layers"][0])
    return MODEL_CARD.format(origin=ORIGIN if is_6b else "")


ChatGLMConfig.register_for_auto_class("AutoConfig")  # 4.29-4.31, 4.45-4.51 copy code on save only then
