"""Configuration of ChatGLM-6B: the official fields, with the released slim model (130,528 rows) as defaults.

Two things are unusual. The residual stream carries the *normalised* input times `residual_scale`, which is √56 for any
depth, because the original code always computes √(2·28). And checkpoints of the first release still hold 20,000
image-token rows in front of the text vocabulary: `num_image_tokens` tells which kind a configuration describes.
Every field is checked for its type as well as its value, so that "false" or 2.5 from a file is an error here and not a
wrong model later. Keys that are not ours stay as transformers keeps them.
"""

import functools
import logging
import math
import os
import re
import sys

from transformers.configuration_utils import PretrainedConfig

logger = logging.getLogger(__name__)

CODE_VERSION = "2.0.0"  # of all code files of a folder; written into its config.json as `code_version`
IMAGE_TOKENS = 20000  # rows that the first release reserved in front of every text token
MASK, GMASK, SOP, EOP, PAD = 130000, 130001, 130004, 130005, 3  # ids in the released slim vocabulary
GROUP_SIZES = (0, 32, 64, 128)
CHOICES = {"quantization_bit": (0, 4, 8), "quantization_group_size": GROUP_SIZES}
CHOICES["quantize_head"] = (False, True, 0, 4, 8)
LATER_GENERATIONS = ("multi_query_attention", "padded_vocab_size", "ffn_hidden_size", "kv_channels", "rmsnorm")
# field: the largest value that is not a mistake
SIZES = {"vocab_size": 2**24, "hidden_size": 2**20, "num_layers": 2**12, "num_attention_heads": 2**16}
SIZES.update({"inner_hidden_size": 2**22, "max_sequence_length": 2**31 - 1})
FACTORS = {"layernorm_epsilon": "1e-5", "residual_scale": "sqrt(56)"}  # field: what the released models use
SWITCHES = ("use_cache", "position_encoding_2d", "prefix_projection", "quantize_activations", "tie_word_embeddings")
IDS = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")


class ChatGLMConfig(PretrainedConfig):
    r"""Sizes, ids and switches of a ChatGLM model.

    Args:
        vocab_size: rows of embedding and head; 130528 after slimming, 150528 in the first release.
        hidden_size, num_layers, num_attention_heads, inner_hidden_size: the usual widths; heads must divide
            `hidden_size`, and the head size must be a multiple of 4 (2-D rotary) or 2 (1-D).
        layernorm_epsilon: added to the variance in every LayerNorm.
        bos_token_id, eos_token_id: `<sop>`, which starts the answer, and `<eop>` (or a list), which ends it.
        mask_token_id, gmask_token_id: `[MASK]` and `[gMASK]`; None takes their places before `<sop>`.
        max_sequence_length: the length the model was trained for, in tokens; longer works, with a warning.
        position_encoding_2d: rotate one half of each head by the position in the context and the other half by the
            position in the answer (the released models), or the whole head by one position.
        quantization_bit: 0, 4 or 8; non-zero builds quantized linear layers, ready to load such a checkpoint.
        quantization_group_size: columns that share a scale: 0 for a whole row (the official format), 32, 64 or 128.
        quantize_head: embedding and head too: True or 8 for int8 rows, 4 for int4 (needs `quantization_bit`).
        quantization_embeddings: the official int4 code's name for the same, with the bits of the layers.
        quantize_activations: CPUs with AVX-512 VNNI may round the activations of long inputs to int8, with a scale
            for each 32 columns, before products with quantized weights: sooner, and a little less exact.
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

    def __init__(
        self,
        vocab_size=130528,
        hidden_size=4096,
        num_layers=28,
        num_attention_heads=32,
        layernorm_epsilon=1e-5,
        use_cache=True,
        bos_token_id=SOP,
        eos_token_id=EOP,
        mask_token_id=None,
        gmask_token_id=None,
        pad_token_id=PAD,
        max_sequence_length=2048,
        inner_hidden_size=16384,
        position_encoding_2d=True,
        quantization_bit=0,
        quantization_group_size=0,
        quantize_head=False,
        quantize_activations=False,
        pre_seq_len=None,
        prefix_projection=False,
        residual_scale=None,
        tie_word_embeddings=True,
        code_version=None,
        **kwargs,
    ):
        refuse_later_generations(kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.layernorm_epsilon = layernorm_epsilon
        self.use_cache = use_cache
        # [MASK] and [gMASK] have fixed places before <sop> in every vocabulary
        sop = bos_token_id if type(bos_token_id) is int else SOP  # anything else is refused below
        self.mask_token_id = sop - (SOP - MASK) if mask_token_id is None else mask_token_id
        self.gmask_token_id = sop - (SOP - GMASK) if gmask_token_id is None else gmask_token_id
        self.max_sequence_length = max_sequence_length
        self.inner_hidden_size = inner_hidden_size
        self.position_encoding_2d = position_encoding_2d
        self.quantization_bit = quantization_bit
        self.quantization_group_size = quantization_group_size
        official = kwargs.pop("quantization_embeddings", False)
        if not isinstance(official, bool):
            raise ValueError(f"ChatGLMConfig.quantization_embeddings = {repr(official)[:80]}: give True or False")
        self.quantize_head = quantization_bit if official and quantize_head is False else quantize_head
        self.quantize_activations = quantize_activations
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        self.residual_scale = 56**0.5 if residual_scale is None else residual_scale
        self.code_version = version_asked_for(code_version)
        for name, field in self.attribute_map.items():
            if name in kwargs:
                setattr(self, field, kwargs.pop(name))
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        for field, value in {**ids, "tie_word_embeddings": tie_word_embeddings}.items():
            setattr(self, field, value)
        self.check_values()  # before transformers 5 compares some of them
        super().__init__(**ids, tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def head_bits(self) -> int:
        """Bits of embedding and head: 8, 4, or 0 for the model's own dtype."""
        bits = 8 if self.quantize_head is True else int(self.quantize_head)
        return bits if self.quantization_bit else 0

    @property
    def num_image_tokens(self) -> int:
        """Rows in front of the text vocabulary: 20000 in the first release, 0 after slimming."""
        is_full = (self.pad_token_id or 0) >= IMAGE_TOKENS or self.bos_token_id == SOP + IMAGE_TOKENS
        return IMAGE_TOKENS if is_full else 0

    def check_values(self) -> None:
        """Raises a ValueError that names field, value and cure where no model can be built."""
        for field, most in SIZES.items():
            self._check(field, is_natural(getattr(self, field), 1, most), f"give a whole number from 1 to {most}")
        for field, released in FACTORS.items():
            self._check(field, is_positive(getattr(self, field)), f"give a number above 0, as {released}")
        for field in SWITCHES:
            self._check(field, isinstance(getattr(self, field), bool), "give True or False (in JSON true or false)")
        whole, parts = self.hidden_size % self.num_attention_heads == 0, 4 if self.position_encoding_2d else 2
        self._check("num_attention_heads", whole, f"it must divide hidden_size = {self.hidden_size}")
        sizes = f"(hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads})"
        self._check("head_size", self.head_size % parts == 0, f"{sizes} cannot be rotated, use a multiple of {parts}")
        for field, values in CHOICES.items():
            self._check(field, is_one_of(getattr(self, field), values), f"use one of {values}")
        prefix = self.pre_seq_len is None or is_natural(self.pre_seq_len, 1, 2**20)
        self._check("pre_seq_len", prefix, f"give a prefix length from 1 to {2**20}, or None for no prefix")
        for field in IDS:
            self._check(
                field,
                self._holds_ids(field),
                f"ids run from 0 to vocab_size - 1 = {self.vocab_size - 1}; slim checkpoints use {MASK} [MASK], "
                f"{GMASK} [gMASK], {SOP} <sop>, {EOP} <eop>, {PAD} <pad>, full ones {IMAGE_TOKENS} more",
            )

    def _holds_ids(self, field: str) -> bool:
        """Several ids may end an answer; a model can do without an end and without padding."""
        value, optional = getattr(self, field), field in ("eos_token_id", "pad_token_id")
        several = value if field == "eos_token_id" and isinstance(value, (list, tuple)) else [value]
        return optional and value is None or all(is_natural(token, 0, self.vocab_size - 1) for token in several)

    def _check(self, field: str, good: bool, cure: str) -> None:
        if not good:
            raise ValueError(f"ChatGLMConfig.{field} = {repr(getattr(self, field))[:80]}: {cure}")


def is_natural(value, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # True is no number here


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def is_one_of(value, values: tuple) -> bool:
    return any(type(value) is type(one) and value == one for one in values)  # 1 is not True, and 8.0 not 8


def version_asked_for(asked) -> str:
    """The newer of the version that a config.json asks for and this code's own; a warning where that is the former."""
    if asked is None:
        return CODE_VERSION
    if not isinstance(asked, str) or not re.fullmatch(r"\d{1,6}(\.\d{1,6}){0,3}", asked):
        raise ValueError(f"ChatGLMConfig.code_version = {repr(asked)[:80]}: give a version such as {CODE_VERSION!r}")
    theirs, ours = ([int(part) for part in version.split(".")] for version in (asked, CODE_VERSION))
    if theirs > ours:
        warn_of_older_code(asked)
    return asked if theirs > ours else CODE_VERSION


def warn_of_older_code(asked: str) -> None:
    warn_once(  # a configuration is made several times while a model loads
        f"config.json asks for version {asked} of the code, the code beside it is {CODE_VERSION}: settings new to "
        "it are ignored; put the .py files of the newer version there"
    )


# Code files of this process, as they were when they were first looked at; kept where this file is run again (4.4x).
_imported: dict[tuple, bytes] = globals().get("_imported", {})


def warn_of_other_code(folder) -> None:
    """Says so where a folder is served by code that is not its own.

    Within a process transformers imports the code of a local folder once for each name of a folder (below 4.27: once
    at all), and serves other folders of that name with it, wholly or in part; seen on every version up to 5.24. Its
    copy of the files is no witness, since the second folder's are copied over the first one's.
    """
    package = __name__.rpartition(".")[0] + "."
    if not package.startswith("transformers_modules.") or not os.path.isdir(folder):
        return
    differing = []
    for name, module in list(sys.modules.items()):
        if name.startswith(package):
            run = (name, getattr(module, "__transformers_module_hash__", None))
            if run not in _imported:
                _imported[run] = read_or_nothing(module.__file__)
            own = read_or_nothing(os.path.join(folder, os.path.basename(module.__file__)))
            if own not in (b"", _imported[run]):
                differing.append(os.path.basename(module.__file__))
    if differing:
        warn_once(
            f"{folder} is served by the code of another folder, whose {', '.join(sorted(differing))} this process has "
            "imported before: load it in a process of its own, or give the folder a name of its own (and use "
            "transformers 4.27 or later)"
        )


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def read_or_nothing(path: str) -> bytes:
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read()


def refuse_later_generations(fields: dict) -> None:
    found = [name for name in LATER_GENERATIONS if name in fields]
    if found:
        raise ValueError(
            f"this is a ChatGLM2/ChatGLM3 configuration (it has {', '.join(found)}): ChatGLM-6B-Slim runs the first "
            "ChatGLM-6B only; load it with the code of its own repository"
        )


ChatGLMConfig.register_for_auto_class("AutoConfig")  # 4.29-4.31, 4.45-4.51 copy code on save only then
