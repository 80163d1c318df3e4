"""Weights moved from mapped files to huge pages: the same values in the same parameters, in memory of their own."""

import mmap
import pickle
from pathlib import Path

import pytest
import torch
from chatglm_slim import huge_pages
from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from safetensors.torch import save_model

needs_huge_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
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
def test_the_parameters_stay_and_hold_the_same_values(any_page, tmp_path, tied):
    model(tie_word_embeddings=tied).save_pretrained(tmp_path / "before")
    network = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "before")
    before = {name: (parameter, parameter.clone()) for name, parameter in network.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    assert network.to_huge_pages() is network
    for name, parameter in network.named_parameters():
        same, values = before[name]
        assert parameter is same and parameter.equal(values) and parameter.data_ptr() != places[name]
    assert (network.lm_head.weight is network.transformer.word_embeddings.weight) == tied
    network.save_pretrained(tmp_path / "after")
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "after").state_dict()
    assert all(again[name].equal(tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("quantization", [{"bits": 8}, {"bits": 4, "quantize_head": 8}])
def test_quantized_models_give_the_same_answer(any_page, quantization):
    network = model().bfloat16().quantize(**quantization)
    before = network.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
    assert network.to_huge_pages().generate(input_ids=IDS, max_new_tokens=8, do_sample=False).equal(before)


@pytest.mark.parametrize("rows", [3, 1 << 11, (1 << 11) + 1])
def test_a_copy_is_whole_aligned_and_alone_in_its_storage(rows):
    tensor = torch.arange(rows * 600, dtype=torch.int32).view(rows, 600)
    copy = huge_pages.copy_to_huge_pages(tensor.t())
    assert copy.equal(tensor.t()) and copy.is_contiguous() and copy.data_ptr() != tensor.data_ptr()
    assert copy.untyped_storage().nbytes() == tensor.nbytes and copy.storage_offset() == 0
    assert len(pickle.dumps(copy)) < tensor.nbytes + 2000
    if tensor.nbytes >= huge_pages.PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert copy.data_ptr() % huge_pages.PAGE == 0


@needs_huge_pages
def test_huge_pages_are_asked_for():
    copy = huge_pages.copy_to_huge_pages(torch.ones(3 * huge_pages.PAGE // 4 + 1))
    first, last, flags = 0, 0, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            first, last = (int(number, 16) for number in name.split("-"))
        elif name == "VmFlags:" and first <= copy.data_ptr() < last:
            flags = rest
            assert copy.data_ptr() + copy.nbytes <= last
    assert "hg" in flags.split()


def test_parameters_over_the_same_memory_share_the_copy():
    values = torch.randn(1 << 10, 1 << 10)
    pair = torch.nn.ParameterList([torch.nn.Parameter(values), torch.nn.Parameter(values)])
    huge_pages.move_to_huge_pages(pair)
    assert pair[0].data_ptr() == pair[1].data_ptr() != values.data_ptr()


def test_a_model_moved_in_inference_mode_can_be_trained():
    network = model()
    with torch.inference_mode():
        network.to_huge_pages()
    network(IDS, labels=IDS).loss.backward()
    assert network.lm_head.weight.grad.any()


def test_it_can_be_saved_by_safetensors_alone(any_page, tmp_path):
    network = model().to_huge_pages()
    save_model(network, str(tmp_path / "weights"))


def test_without_huge_pages_the_copy_is_an_ordinary_one(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = torch.arange(1 << 20)
    copy = huge_pages.copy_to_huge_pages(tensor)
    assert copy.equal(tensor) and copy.data_ptr() != tensor.data_ptr()


def test_a_kernel_that_refuses_is_no_error(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999, raising=False)
    tensor = torch.arange(1 << 20)
    assert huge_pages.copy_to_huge_pages(tensor).equal(tensor)
