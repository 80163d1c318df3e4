"""Weights moved from mapped files to huge pages: the same values in new parameters, in memory of their own."""

from __future__ import annotations

import pytest
import torch
from chatglm_cpu import huge_pages, move_to_huge_pages
from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from safetensors.torch import save_model

IDS = torch.tensor([[20, 30, 1101, 1104]])


def model(hidden_size=128, **changes):
    """Its embedding has 1.5 MB in float32."""
    config = ChatGLMConfig(
        hidden_size=hidden_size, num_layers=2, num_attention_heads=4, inner_hidden_size=4 * hidden_size,
        vocab_size=1472, bos_token_id=1104, eos_token_id=1105, gmask_token_id=1101, pad_token_id=3, **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    return ChatGLMForConditionalGeneration(config).eval().float()


@pytest.fixture(params=[1 << 12, huge_pages.PAGE])
def any_page(request, monkeypatch):
    """Pages of 4 KiB too, so that weights of small models fill some."""
    monkeypatch.setattr(huge_pages, "PAGE", request.param)


@pytest.mark.parametrize("tied", [True, False])
def test_new_parameters_hold_the_same_values_and_old_ones_stay_whole(any_page, tmp_path, tied):
    model(tie_word_embeddings=tied).save_pretrained(tmp_path / "before")
    network = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "before")
    before = {name: (parameter, parameter.clone()) for name, parameter in network.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    move_to_huge_pages(network)
    for name, parameter in network.named_parameters():
        old, values = before[name]
        assert parameter.equal(values) and parameter.requires_grad == old.requires_grad
        assert parameter.data_ptr() != places[name] == old.data_ptr() and old.equal(values)
    assert (network.lm_head.weight is network.transformer.word_embeddings.weight) == tied
    network.save_pretrained(tmp_path / "after")
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "after").state_dict()
    assert all(again[name].equal(tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("quantization", [{"bits": 8}, {"bits": 4, "quantize_head": 8}])
def test_quantized_models_give_the_same_answer(any_page, quantization):
    network = model().bfloat16().quantize(**quantization)
    before = network.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
    move_to_huge_pages(network)
    assert network.generate(input_ids=IDS, max_new_tokens=8, do_sample=False).equal(before)


def test_parameters_over_the_same_memory_share_the_copy():
    values = torch.randn(1 << 10, 1 << 10)
    pair = torch.nn.ParameterList([torch.nn.Parameter(values), torch.nn.Parameter(values)])
    move_to_huge_pages(pair)
    assert pair[0].data_ptr() == pair[1].data_ptr() != values.data_ptr()


def test_a_model_moved_in_inference_mode_can_be_trained():
    network = model()
    with torch.inference_mode():
        move_to_huge_pages(network)
    network(IDS, labels=IDS).loss.backward()
    assert network.lm_head.weight.grad.any()


def test_it_can_be_saved_by_safetensors_alone(any_page, tmp_path):
    network = model()
    move_to_huge_pages(network)
    save_model(network, str(tmp_path / "weights"))
