"""Attention of a prompt as matrix products: as exact as torch's, and only where it is served."""

import pytest
import torch
from chatglm_slim import cpu_attention, modeling_chatglm
from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

TOKENS, HEADS, SIZE = 600, 3, 32  # two tiles, the second not full
find_bfloat16 = cpu_attention._multiplies_bfloat16.__wrapped__


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    """PyTorch's bfloat16 products are right everywhere, only slower."""
    monkeypatch.setattr(cpu_attention, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_attention, "MOST_THREADS", 1000)


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
def test_a_row_that_sees_nothing_gets_nothing(states):
    visible = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    visible[1, :, :7] = False
    context = cpu_attention.prompt_attention(*states, visible)
    assert not context[1, :, :7].any() and context[0].any() and context.isfinite().all()


@torch.no_grad()
def test_nothing_of_a_hidden_key_comes_through():
    query = torch.full((1, 1, 300, 32), 8.0).bfloat16()
    key, value = -query.repeat(1, 1, 1, 1), torch.zeros_like(query)
    key[:, :, -1], value[:, :, -1] = 8.0, 1e6  # a score of 362 against -362
    visible = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    visible[..., -1] = False
    assert not cpu_attention.prompt_attention(query, key, value, visible).any()
    assert (cpu_attention.prompt_attention(query, key, value, None) > 9e5).all()


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
    assert served(query, key, value.float(), None) is None
    assert served(query[:, :, :100], key, value, None) is None
    assert served(query, key, value, torch.ones(2, HEADS, TOKENS, TOKENS, dtype=torch.bool)) is None
    assert served(query.requires_grad_(), key, value, None) is None
    with torch.no_grad():
        assert served(query, key, value, None) is not None
    monkeypatch.setattr(cpu_attention, "MOST_THREADS", torch.get_num_threads() - 1)
    assert served(query.detach(), key, value, None) is None
    monkeypatch.setattr(cpu_attention, "MOST_THREADS", torch.get_num_threads())
    assert served(query.detach(), key, value, None) is not None
    monkeypatch.setattr(cpu_attention, "_multiplies_bfloat16", lambda: False)
    assert served(query.detach(), key, value, None) is None


@pytest.mark.parametrize(
    ("bfloat16", "amx", "wanted"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_it_is_for_processors_that_multiply_bfloat16_without_amx(monkeypatch, bfloat16, amx, wanted):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert find_bfloat16() is wanted


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


def test_a_long_prompt_with_a_mask_for_each_head_is_answered():
    ids = torch.cat((torch.randint(10, 1000, (1, 300)), torch.tensor([[1101, 1104]])), dim=1)
    mask = torch.zeros(1, HEADS, 302, 302, dtype=torch.bool)
    with torch.no_grad():
        assert model()(ids, attention_mask=mask).logits.isfinite().all()


def test_tracing_leaves_it_out(monkeypatch):
    monkeypatch.setattr(modeling_chatglm, "is_tracing", lambda: True)
    monkeypatch.setattr(modeling_chatglm, "prompt_attention", None)  # calling it would be an error
    ids = torch.cat((torch.randint(10, 1000, (1, 300)), torch.tensor([[1101, 1104]])), dim=1)
    with torch.no_grad():
        assert model()(ids).logits.isfinite().all()
