"""Attention of a prompt as matrix products: as exact as torch's, and only where it is served."""

from __future__ import annotations

import pytest
import torch
from chatglm_cpu import attention, prompt, routes

TOKENS, HEADS, SIZE = 600, 3, 32  # two tiles, the second not full
find_bfloat16 = routes.multiplies_bfloat16.__wrapped__


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    """PyTorch's bfloat16 products are right everywhere, only slower."""
    monkeypatch.setattr(routes, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(routes, "MOST_THREADS", 1000)


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


def assert_as_exact_as_torch(context, states, visible=None):
    query, key, value = (x.double() for x in states)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    magnitude = torch.nn.functional.scaled_dot_product_attention(query, key, value.abs(), attn_mask=visible)
    assert ((context.double() - exact).abs() <= 0.01 * magnitude).all()  # two roundings to bfloat16 are 0.008
    torchs = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=visible).double()
    assert (context.double() - exact).norm() <= 1.5 * (torchs - exact).norm()


@pytest.mark.parametrize("name", masks())
@torch.no_grad()
def test_prompt_attention_is_as_exact_as_that_of_torch(states, name):
    visible = masks()[name]
    assert_as_exact_as_torch(prompt.prompt_attention(*states, visible), states, visible)


@torch.no_grad()
def test_a_row_that_sees_nothing_gets_nothing(states):
    visible = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    visible[1, :, :7] = False
    context = prompt.prompt_attention(*states, visible)
    assert not context[1, :, :7].any() and context[0].any() and context.isfinite().all()


@torch.no_grad()
def test_nothing_of_a_hidden_key_comes_through():
    query = torch.full((1, 1, 300, 32), 8.0).bfloat16()
    key, value = -query.repeat(1, 1, 1, 1), torch.zeros_like(query)
    key[:, :, -1], value[:, :, -1] = 8.0, 1e6  # a score of 362 against -362
    visible = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    visible[..., -1] = False
    assert not prompt.prompt_attention(query, key, value, visible).any()
    assert (prompt.prompt_attention(query, key, value, None) > 9e5).all()


@torch.no_grad()
def test_more_keys_than_new_tokens(states):
    query, key, value = states
    states = query[:, :, -300:], key, value
    assert_as_exact_as_torch(prompt.prompt_attention(*states, None), states)


def test_what_it_does_not_serve_is_left_to_torch(states, monkeypatch):
    query, key, value = states
    served = attention
    assert served(query, key, value, None) is not None
    assert served(query.float(), key.float(), value.float(), None) is None
    assert served(query, key, value.float(), None) is None
    assert served(query[:, :, :100], key, value, None) is None
    assert served(query, key, value, torch.ones(2, HEADS, TOKENS, TOKENS, dtype=torch.bool)) is None
    assert served(query.requires_grad_(), key, value, None) is None
    with torch.no_grad():
        assert served(query, key, value, None) is not None
    monkeypatch.setattr(routes, "MOST_THREADS", torch.get_num_threads() - 1)
    assert served(query.detach(), key, value, None) is None
    monkeypatch.setattr(routes, "MOST_THREADS", torch.get_num_threads())
    assert served(query.detach(), key, value, None) is not None
    monkeypatch.setattr(routes, "multiplies_bfloat16", lambda: False)
    assert served(query.detach(), key, value, None) is None


@pytest.mark.parametrize(
    ("bfloat16", "amx", "wanted"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_it_is_for_processors_that_multiply_bfloat16_without_amx(monkeypatch, bfloat16, amx, wanted):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert find_bfloat16() is wanted
