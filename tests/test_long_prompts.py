"""The model with the engine's attention of long prompts: as exact as with PyTorch's own."""

from __future__ import annotations

import chatglm_cpu
import pytest
import torch
from chatglm_cpu import routes
from chatglm_slim import kernel_routes
from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

HEADS = 3


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    """PyTorch's bfloat16 products are right everywhere, only slower."""
    monkeypatch.setattr(routes, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(routes, "MOST_THREADS", 1000)


def model(dtype=torch.bfloat16, **changes):
    config = ChatGLMConfig(
        hidden_size=96, num_layers=2, num_attention_heads=HEADS, inner_hidden_size=128, vocab_size=1472,
        bos_token_id=1104, eos_token_id=1105, gmask_token_id=1101, pad_token_id=3, **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    return ChatGLMForConditionalGeneration(config).eval().to(dtype)


def test_a_long_prompt_goes_through_it_and_answers_the_same(no_kernels):
    ids = torch.cat((torch.randint(10, 1000, (2, 400)), torch.tensor([[1101, 1104]]).expand(2, 2)), dim=1)
    network, calls = model(), []
    no_kernels.attention = lambda *a: calls.append(chatglm_cpu.attention(*a)) or calls[-1]
    with torch.no_grad():
        fast = network(ids).logits
        no_kernels.attention = lambda *a: None
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


def test_tracing_leaves_it_out(monkeypatch, no_kernels):
    monkeypatch.setattr(kernel_routes, "is_tracing", lambda: True)
    no_kernels.attention = None  # calling it would be an error
    ids = torch.cat((torch.randint(10, 1000, (1, 300)), torch.tensor([[1101, 1104]])), dim=1)
    with torch.no_grad():
        assert model()(ids).logits.isfinite().all()
