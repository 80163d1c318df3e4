"""Attention of a prompt as matrix products, and weights moved to huge pages: the same results from other places."""

import pytest
import torch
from chatglm_slim import cpu_attention, huge_pages, modeling_chatglm
from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

TOKENS, HEADS, SIZE = 600, 3, 32  # two tiles, the second not full


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    """PyTorch's bfloat16 products are right everywhere, only slower."""
    monkeypatch.setattr(cpu_attention, "_multiplies_bfloat16", lambda: True)


@pytest.fixture
def states():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, TOKENS, HEADS, SIZE).bfloat16().transpose(2, 3)
    return 4 * query, key, value  # scores up to 20, where bfloat16 has steps of 0.1


def masks():
    prompt = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    prompt[..., :-1, -1] = False  # <sop>
    padded = prompt.repeat(2, 1, 1, 1)
    padded[1, ..., :5] = False
    return {"none": None, "all": torch.ones_like(prompt), "prompt": prompt, "padded": padded, "causal": prompt.tril()}


@pytest.mark.parametrize("name", masks())
@torch.no_grad()
def test_prompt_attention_is_as_exact_as_that_of_torch(states, name):
    visible = masks()[name]
    context = cpu_attention.prompt_attention(*states, visible)
    query, key, value = (x.double() for x in states)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    magnitude = torch.nn.functional.scaled_dot_product_attention(query, key, value.abs(), attn_mask=visible)
    assert ((context.double() - exact).abs() <= 0.01 * magnitude).all()  # two roundings to bfloat16 are 0.008
    torchs = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=visible).double()
    assert (context.double() - exact).norm() <= 1.5 * (torchs - exact).norm()


@torch.no_grad()
def test_a_row_that_sees_nothing_stays_finite(states):
    visible = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    visible[1, :, :7] = False
    context = cpu_attention.prompt_attention(*states, visible)
    assert context.isfinite().all()


@torch.no_grad()
def test_more_keys_than_new_tokens(states):
    query, key, value = states
    context = cpu_attention.prompt_attention(query[:, :, -300:], key, value, None)
    whole = cpu_attention.prompt_attention(query, key, value, None)
    assert torch.allclose(context.float(), whole[:, :, -300:].float(), atol=0.02, rtol=0.02)


def test_what_it_does_not_serve_is_left_to_torch(states, monkeypatch):
    query, key, value = states
    served = cpu_attention.prompt_attention
    assert served(query, key, value, None) is not None
    assert served(query.float(), key.float(), value.float(), None) is None
    assert served(query[:, :, :100], key, value, None) is None
    assert served(query.requires_grad_(), key, value, None) is None
    with torch.no_grad():
        assert served(query, key, value, None) is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert served(query.detach(), key, value, None) is None


def model(dtype=torch.bfloat16, **changes):
    config = ChatGLMConfig(
        hidden_size=96, num_layers=2, num_attention_heads=HEADS, inner_hidden_size=128, vocab_size=1472,
        bos_token_id=1104, eos_token_id=1105, gmask_token_id=1101, pad_token_id=3, **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    return ChatGLMForConditionalGeneration(config).eval().to(dtype)


def test_a_long_prompt_goes_through_it_and_answers_the_same(monkeypatch):
    ids = torch.cat((torch.randint(10, 1000, (2, 400)), torch.tensor([[1101, 1104]]).expand(2, 2)), dim=1)
    network, calls, real = model(), [], modeling_chatglm.prompt_attention
    monkeypatch.setattr(modeling_chatglm, "prompt_attention", lambda *a: calls.append(real(*a)) or calls[-1])
    with torch.no_grad():
        fast = network(ids).logits
        monkeypatch.setattr(modeling_chatglm, "prompt_attention", lambda *a: None)
        plain = network(ids).logits
    assert len(calls) == 2 and all(call is not None for call in calls)
    assert not fast.equal(plain)  # else it would not have been used
    exact = model(torch.float32)
    exact.load_state_dict(network.state_dict())
    with torch.no_grad():
        exact = exact(ids).logits
    assert (fast - exact).norm() <= 1.2 * (plain - exact).norm()


def test_huge_pages_hold_the_same_weights_in_the_same_parameters(tmp_path):
    network = model(tie_word_embeddings=True)
    network.save_pretrained(tmp_path)
    network = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    before = {name: (parameter, parameter.clone()) for name, parameter in network.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    assert network.to_huge_pages() is network
    for name, parameter in network.named_parameters():
        same, values = before[name]
        assert parameter is same and parameter.equal(values) and parameter.data_ptr() != places[name]
    assert network.lm_head.weight is network.transformer.word_embeddings.weight


@pytest.mark.parametrize("rows", [3, 1 << 11, (1 << 11) + 1])
def test_copies_to_huge_pages_are_whole_and_aligned(rows):
    tensor = torch.arange(rows * 600, dtype=torch.int32).view(rows, 600)
    copy = huge_pages.copy_to_huge_pages(tensor.t())
    assert copy.equal(tensor.t()) and copy.is_contiguous() and copy.data_ptr() != tensor.data_ptr()
    if tensor.nbytes >= huge_pages.PAGE and huge_pages._madvise() is not None:
        assert copy.data_ptr() % huge_pages.PAGE == 0


def test_quantized_models_on_huge_pages_give_the_same_answer():
    network = model().quantize(4, quantize_head=8)
    ids = torch.tensor([[20, 30, 1101, 1104]])
    before = network.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert network.to_huge_pages().generate(input_ids=ids, max_new_tokens=8, do_sample=False).equal(before)


def test_without_madvise_the_copy_is_an_ordinary_one(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    tensor = torch.arange(1 << 20)
    copy = huge_pages.copy_to_huge_pages(tensor)
    assert copy.equal(tensor) and copy.data_ptr() != tensor.data_ptr()
