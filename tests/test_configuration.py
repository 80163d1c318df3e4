"""Fields, defaults, and the errors that come before memory is taken."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import transformers
from chatglm_slim import configuration_chatglm
from chatglm_slim.configuration_chatglm import CODE_VERSION, ChatGLMConfig

ROOT = Path(__file__).resolve().parents[1]


def test_defaults_are_the_released_slim_model():
    config = ChatGLMConfig()
    released = json.loads((ROOT / "config.json").read_text())
    about_the_file = ("_name_or_path", "architectures", "auto_map", "tokenizer_class", "torch_dtype")
    about_the_file += ("transformers_version",)
    for field, value in released.items():
        if field not in about_the_file:
            assert getattr(config, field) == value, field
    assert config.vocab_size == 130528
    assert config.residual_scale == 56**0.5


def test_the_architecture_is_a_name_that_transformers_has_whatever_the_file_says():
    """`transformers serve` looks it up there, also for folders that save_pretrained wrote the class's name into."""
    assert json.loads((ROOT / "config.json").read_text())["architectures"] == ["ChatGLMForConditionalGeneration"]
    for path in (ROOT, ROOT / "tiny"):
        (name,) = ChatGLMConfig.from_pretrained(path).architectures
        assert hasattr(transformers, name)


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
    assert json.loads((tmp_path / "config.json").read_text())["code_version"] == CODE_VERSION


def test_first_release_configuration_is_recognised():
    config = ChatGLMConfig(vocab_size=150528, bos_token_id=150004, eos_token_id=150005, pad_token_id=20003)
    assert (config.mask_token_id, config.gmask_token_id) == (150000, 150001)


WRONG = [
    ({"num_attention_heads": 5}, "num_attention_heads = 5: it must divide hidden_size = 4096"),
    ({"hidden_size": -1}, "hidden_size = -1: give a whole number from 1 to 1048576"),
    ({"hidden_size": "64"}, "hidden_size = '64': give a whole number"),
    ({"hidden_size": True}, "hidden_size = True: give a whole number"),
    ({"num_layers": 0}, "num_layers = 0"),
    ({"num_layers": "abc"}, "num_layers = 'abc': give a whole number from 1 to 4096"),
    ({"num_layers": 2.5}, "num_layers = 2.5"),
    ({"num_layers": 2.0}, "num_layers = 2.0"),
    ({"num_layers": [2]}, r"num_layers = \[2\]"),
    ({"num_layers": None}, "num_layers = None"),
    ({"num_layers": 10_000_000}, "num_layers = 10000000: give a whole number from 1 to 4096"),
    ({"vocab_size": "130528"}, "vocab_size = '130528': give a whole number"),
    ({"intermediate_size": "x"}, "inner_hidden_size = 'x': give a whole number"),
    ({"vocab_size": 10**12}, "vocab_size = 1000000000000: give a whole number from 1 to 16777216"),
    ({"max_sequence_length": 1e4}, "max_sequence_length = 10000.0"),
    ({"inner_hidden_size": 1.5}, "inner_hidden_size = 1.5"),
    ({"hidden_size": 6, "num_attention_heads": 1}, "head_size = 6: .* multiple of 4"),
    ({"layernorm_epsilon": 0}, "layernorm_epsilon = 0: give a number above 0, as 1e-05"),
    ({"layernorm_epsilon": "1e-5"}, "layernorm_epsilon = '1e-5'"),
    ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon = nan"),
    ({"layernorm_epsilon": True}, "layernorm_epsilon = True"),
    ({"residual_scale": float("inf")}, "residual_scale = inf"),
    ({"tie_word_embeddings": "false"}, r"tie_word_embeddings = 'false': use one of \(True, False\)"),
    ({"position_encoding_2d": 1}, r"position_encoding_2d = 1: use one of \(True, False\)"),
    ({"use_cache": None}, "use_cache = None"),
    ({"prefix_projection": "true"}, "prefix_projection = 'true'"),
    ({"quantization_bit": 5}, r"quantization_bit = 5: use one of \(0, 4, 8\)"),
    ({"quantization_bit": False}, "quantization_bit = False"),
    ({"quantization_bit": 4.0}, "quantization_bit = 4.0"),
    ({"quantization_group_size": 48}, "quantization_group_size = 48"),
    ({"quantize_head": 1}, "quantize_head = 1: use one of"),
    ({"quantize_head": "x"}, "quantize_head = 'x'"),
    ({"quantization_embeddings": "false"}, r"quantization_embeddings = 'false': use one of \(True, False\)"),
    ({"pre_seq_len": 0}, "pre_seq_len = 0"),
    ({"pre_seq_len": 10**9}, "pre_seq_len = 1000000000: give a whole number from 1 to 1048576"),
    ({"eos_token_id": 150005}, "eos_token_id = 150005: ids run from 0 to vocab_size - 1 = 130527"),
    ({"eos_token_id": [130005, "2"]}, r"eos_token_id = \[130005, '2'\]"),
    ({"pad_token_id": -1}, "pad_token_id = -1"),
    ({"pad_token_id": "3"}, "pad_token_id = '3'"),
    ({"pad_token_id": 10**30}, "pad_token_id = 10000"),
    ({"bos_token_id": 130528}, "bos_token_id = 130528"),
    ({"bos_token_id": "x"}, "bos_token_id = 'x'"),
    ({"bos_token_id": [130004]}, r"bos_token_id = \[130004\]"),
    ({"bos_token_id": None}, "bos_token_id = None"),
    ({"code_version": 2}, "code_version = 2: give a version such as"),
]


@pytest.mark.parametrize(
    "fields, message", WRONG, ids=lambda value: repr(value)[:40] if isinstance(value, dict) else ""
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


def test_values_of_the_right_type_are_taken():
    ends = ChatGLMConfig(eos_token_id=[130005, 2], pad_token_id=None)
    assert ends.eos_token_id == [130005, 2] and ends.pad_token_id is None
    assert ChatGLMConfig(residual_scale=7, layernorm_epsilon=1).residual_scale == 7
    assert [ChatGLMConfig(quantization_bit=8, quantize_head=head).head_bits for head in (False, 0, True, 8, 4)] == [
        *(0, 0, 8, 8, 4)
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_official_name_for_a_quantized_embedding_means_the_same_layout(bits):
    config = ChatGLMConfig(quantization_bit=bits, quantization_embeddings=True)
    assert config.head_bits == bits
    assert "quantization_embeddings" not in config.to_dict()
    assert ChatGLMConfig(quantization_bit=bits, quantization_embeddings=False).head_bits == 0


def test_keys_of_other_transformers_versions_are_kept_without_a_word(caplog):
    config = ChatGLMConfig(finetuning_task=None, chunk_size_feed_forward=0, someone_elses_key={"a": 1})
    assert config.someone_elses_key == {"a": 1}
    assert not caplog.records


@pytest.fixture
def warnings(caplog):
    """The messages of the configuration's own logger, with its memory of what it said empty."""
    configuration_chatglm.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=configuration_chatglm.__name__):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == configuration_chatglm.__name__]
    configuration_chatglm.warn_once.cache_clear()


@pytest.mark.parametrize("asked", [None, "1.0", "1.99.99", CODE_VERSION, f"{CODE_VERSION}.0"[:5]])
def test_code_as_new_as_the_config_asks_for_says_nothing(warnings, asked):
    assert ChatGLMConfig(code_version=asked).code_version == CODE_VERSION
    assert warnings() == []


def test_older_code_than_the_config_asks_for_warns_once_and_the_demand_stays(warnings, tmp_path):
    for _ in range(3):
        config = ChatGLMConfig(code_version="99.10")
    assert len(warnings()) == 1
    assert f"asks for version 99.10 of the code, the code that runs is {CODE_VERSION}" in warnings()[0]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["code_version"] == "99.10"
    assert ChatGLMConfig.from_pretrained(tmp_path).code_version == "99.10"


def test_the_code_version_of_the_released_files_is_this_codes():
    for folder in (ROOT, ROOT / "tiny"):
        assert json.loads((folder / "config.json").read_text())["code_version"] == CODE_VERSION, folder
