"""Configuration of ChatGLM-6B: the official fields, with the released slim model (130,528 rows) as defaults.

Two things are unusual. The residual stream carries the *normalised* input times `residual_scale`, which is √56 for any
depth, because the original code always computes √(2·28). And checkpoints of the first release still hold 20,000
image-token rows in front of the text vocabulary: `num_image_tokens` tells which kind a configuration describes.
"""

from transformers.configuration_utils import PretrainedConfig

IMAGE_TOKENS = 20000  # rows that the first release reserved in front of every text token
QUANTIZATION_BITS = (0, 4, 8)
GROUP_SIZES = (0, 32, 64, 128)
# The last 8 pieces before <|tab|> have fixed places relative to <sop> in every vocabulary (ice_text.model).
MASK_BEFORE_SOP, GMASK_BEFORE_SOP = 4, 3
LATER_GENERATIONS = ("multi_query_attention", "padded_vocab_size", "ffn_hidden_size", "kv_channels", "rmsnorm")


class ChatGLMConfig(PretrainedConfig):
    r"""Sizes, ids and switches of a ChatGLM model.

    Args:
        vocab_size: rows of embedding and head; 130528 after slimming, 150528 in the first release.
        hidden_size, num_layers, num_attention_heads, inner_hidden_size: the usual widths; heads must divide
            `hidden_size`, and the head size must be a multiple of 4 (2-D rotary) or 2 (1-D).
        layernorm_epsilon: added to the variance in every LayerNorm.
        bos_token_id, eos_token_id: `<sop>`, which starts the answer, and `<eop>`, which ends it.
        mask_token_id, gmask_token_id: `[MASK]` and `[gMASK]`; None takes their places before `<sop>`.
        max_sequence_length: the length the model was trained for, in tokens; longer works, with a warning.
        position_encoding_2d: rotate one half of each head by the position in the context and the other half by the
            position in the answer (the released models), or the whole head by one position.
        quantization_bit: 0, 4 or 8; non-zero builds quantized linear layers, ready to load such a checkpoint.
        quantization_group_size: columns that share a scale: 0 for a whole row (the official format), 32, 64 or 128.
        quantize_head: embedding and head too: True or 8 for int8 rows, 4 for int4 (needs `quantization_bit`).
        quantize_activations: CPUs with AVX-512 VNNI may round the activations of long inputs to int8, with a scale
            for each 32 columns, before products with quantized weights: sooner, and a little less exact.
        pre_seq_len, prefix_projection: P-tuning v2: length of the trained prefix (None: none), and its two-layer form.
        residual_scale: factor of the residual branch; None gives √56.

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
        bos_token_id=130004,
        eos_token_id=130005,
        mask_token_id=None,
        gmask_token_id=None,
        pad_token_id=3,
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
        **kwargs,
    ):
        refuse_later_generations(kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = kwargs.pop("num_hidden_layers", num_layers)
        self.num_attention_heads = num_attention_heads
        self.layernorm_epsilon = layernorm_epsilon
        self.use_cache = use_cache
        self.mask_token_id = bos_token_id - MASK_BEFORE_SOP if mask_token_id is None else mask_token_id
        self.gmask_token_id = bos_token_id - GMASK_BEFORE_SOP if gmask_token_id is None else gmask_token_id
        self.max_sequence_length = max_sequence_length
        self.inner_hidden_size = inner_hidden_size
        self.position_encoding_2d = position_encoding_2d
        self.quantization_bit = quantization_bit
        self.quantization_group_size = quantization_group_size
        self.quantize_head = quantize_head
        self.quantize_activations = quantize_activations
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        self.residual_scale = 56**0.5 if residual_scale is None else residual_scale
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.check_values()

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
        return IMAGE_TOKENS if (self.pad_token_id or 0) >= IMAGE_TOKENS or self.bos_token_id == 150004 else 0

    def check_values(self) -> None:
        """Raises a ValueError that names field, value and cure where no model can be built."""
        for field in ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size"):
            self._check(field, lambda value: is_positive_integer(value), "give a positive whole number")
        self._check("max_sequence_length", is_positive_integer, "give a positive number of tokens")
        self._check("layernorm_epsilon", lambda value: value > 0, "the released models use 1e-5")
        self._check(
            "num_attention_heads",
            lambda heads: self.hidden_size % heads == 0,
            f"it must divide hidden_size = {self.hidden_size}",
        )
        parts = 4 if self.position_encoding_2d else 2
        if self.head_size % parts:
            raise ValueError(
                f"head size {self.head_size} (hidden_size {self.hidden_size} / num_attention_heads "
                f"{self.num_attention_heads}) cannot be rotated: it must be a multiple of {parts}"
            )
        self._check("quantization_bit", lambda bits: bits in QUANTIZATION_BITS, f"use one of {QUANTIZATION_BITS}")
        self._check("quantization_group_size", lambda size: size in GROUP_SIZES, f"use one of {GROUP_SIZES}")
        self._check("quantize_head", lambda head: head in (False, True, 4, 8), "use False, True, 4 or 8")
        self._check("quantize_activations", lambda value: value in (False, True), "use False or True")
        if self.pre_seq_len is not None:
            self._check("pre_seq_len", is_positive_integer, "give a positive prefix length, or None for no prefix")
        self._check("residual_scale", lambda scale: scale > 0, "the released models use sqrt(56)")
        for field in ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id"):
            self._check(
                field,
                lambda token: token is None or all(0 <= t < self.vocab_size for t in as_list(token)),
                f"ids run from 0 to vocab_size - 1 = {self.vocab_size - 1}; slim checkpoints use "
                "130000 [MASK], 130001 [gMASK], 130004 <sop>, 130005 <eop>, 3 <pad>, full ones 20000 more",
            )

    def _check(self, field, is_good, cure: str) -> None:
        value = getattr(self, field)
        try:
            good = is_good(value)
        except TypeError:
            good = False
        if not good:
            raise ValueError(f"ChatGLMConfig.{field} = {value!r}: {cure}")


def is_positive_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def refuse_later_generations(fields: dict) -> None:
    found = [name for name in LATER_GENERATIONS if name in fields]
    if found:
        raise ValueError(
            f"this is a ChatGLM2/ChatGLM3 configuration (it has {', '.join(found)}): ChatGLM-6B-Slim runs the first "
            "ChatGLM-6B only; load it with the code of its own repository"
        )


ChatGLMConfig.register_for_auto_class("AutoConfig")  # 4.29-4.31, 4.45-4.51 copy code on save only then
