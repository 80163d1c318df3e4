"""Fields, defaults, and the errors that come before memory is taken."""

import json
from pathlib import Path

import pytest
from chatglm_slim.configuration_chatglm import ChatGLMConfig

ROOT = Path(__file__).resolve().parents[1]


def test_defaults_are_the_released_slim_model():
    config = ChatGLMConfig()
    released = json.loads((ROOT / "config.json").read_text())
    about_the_file = ("_name_or_path", "architectures", "auto_map", "torch_dtype", "transformers_version")
    for field, value in released.items():
        if field not in about_the_file:
            assert getattr(config, field) == value, field
    assert (config.vocab_size, config.num_image_tokens) == (130528, 0)
    assert config.residual_scale == 56**0.5


def test_standard_names_reach_the_official_fields():
    config = ChatGLMConfig(num_hidden_layers=3)
    assert config.num_layers == config.num_hidden_layers == 3
    assert config.intermediate_size == config.inner_hidden_size
    assert config.max_position_embeddings == config.max_sequence_length
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.layer_norm_eps == config.layernorm_epsilon


def test_saving_and_loading_keeps_every_field(tmp_path):
    fields = {"num_layers": 2, "residual_scale": 2.0, "pre_seq_len": 8}
    config = ChatGLMConfig(**fields, quantization_bit=4, quantization_group_size=32, quantize_head=True)
    config.save_pretrained(tmp_path)
    saved, loaded = config.to_dict(), ChatGLMConfig.from_pretrained(tmp_path).to_dict()
    for record in (saved, loaded):
        record.pop("auto_map", None)
        record.pop("_name_or_path", None)
    assert saved == loaded and saved["num_layers"] == 2


def test_first_release_configuration_is_recognised():
    config = ChatGLMConfig(vocab_size=150528, bos_token_id=150004, eos_token_id=150005, pad_token_id=20003)
    assert config.num_image_tokens == 20000
    assert (config.mask_token_id, config.gmask_token_id) == (150000, 150001)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_attention_heads": 5}, "num_attention_heads = 5: it must divide hidden_size = 4096"),
        ({"hidden_size": -1}, "hidden_size = -1"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"inner_hidden_size": 1.5}, "inner_hidden_size = 1.5"),
        ({"hidden_size": 6, "num_attention_heads": 1}, "head size 6 .* multiple of 4"),
        ({"quantization_bit": 5}, r"quantization_bit = 5: use one of \(0, 4, 8\)"),
        ({"quantization_group_size": 48}, "quantization_group_size = 48"),
        ({"layernorm_epsilon": 0}, "layernorm_epsilon = 0"),
        ({"pre_seq_len": 0}, "pre_seq_len = 0"),
        ({"eos_token_id": 150005}, "eos_token_id = 150005: ids run from 0 to vocab_size - 1 = 130527"),
        ({"pad_token_id": -1}, "pad_token_id = -1"),
        ({"bos_token_id": 130528}, "bos_token_id = 130528"),
        ({"multi_query_attention": True, "padded_vocab_size": 65024}, "ChatGLM2/ChatGLM3"),
    ],
)
def test_values_that_no_model_can_be_built_from_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ChatGLMConfig(**fields)


def test_a_field_changed_afterwards_is_checked_before_the_model_is_built():
    from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration

    config = ChatGLMConfig(num_layers=1)
    config.num_attention_heads = 33
    with pytest.raises(ValueError, match="num_attention_heads = 33"):
        ChatGLMForConditionalGeneration(config)
