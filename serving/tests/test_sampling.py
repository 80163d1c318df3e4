"""Tokens are chosen as transformers' own generation chooses them; the text of an answer only grows."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from serving.sampling import Sampling, choose
from serving.text import AnswerText, token_bytes


@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
@pytest.mark.parametrize("top_p", [0.1, 0.7, 1.0])
def test_a_sampled_token_is_the_one_of_transformers_warpers(top_k, top_p):
    for seed in range(20):
        scores = torch.randn(1, 500, generator=torch.Generator().manual_seed(seed)) * 4
        expected = TemperatureLogitsWarper(0.8)(None, scores)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        torch.manual_seed(seed)
        drawn = int(torch.multinomial(expected.softmax(-1), 1))
        sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, seed=seed)
        assert choose(scores[0], sampling, sampling.generator("cpu"), [], None).id == drawn


def test_equal_scores_at_the_edge_of_top_k_all_stay():
    scores = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    drawn = set()
    for seed in range(40):
        sampling = Sampling(temperature=1, top_k=2, top_p=1, seed=seed)
        drawn.add(choose(scores, sampling, sampling.generator("cpu"), [], None).id)
    assert drawn == {1, 2, 3}


def test_penalties_are_those_of_the_interface():
    scores = torch.tensor([2.0, 1.9, 1.0])
    sampling = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logprobs=3)
    token = choose(scores, sampling, None, [0, 0, 2], None)
    expected = torch.tensor([2.0 - 0.5 - 2 * 0.25, 1.9, 1.0 - 0.5 - 0.25]).log_softmax(-1)
    assert token.id == 1 and token.logprob == pytest.approx(float(expected[1]))
    assert dict(token.top) == pytest.approx(dict(enumerate(expected.tolist())))


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("stop", [[], ["。"], ["北京", "公园"], ["b c"]])
def test_what_is_ready_only_grows_and_ends_as_the_whole_text(tiny, clean, stop):
    tokenizer, model = tiny
    process = model.process_response if clean else None
    texts = [
        "你好, 北京!ok",
        "[[训练时间]] 和 [[训练",
        "a b c d",
        "  两个 空格\n\n换行 ",
        "😀 emoji 𝄞",
        "[[训练时间]]",
    ]
    for text in texts:
        ids = tokenizer.encode_text(text)
        growing = AnswerText(tokenizer.decode, process, stop)
        shown, found = "", False
        for count in range(1, len(ids) + 1):
            found = growing.update(ids[:count], finished=False)
            assert growing.ready.startswith(shown), (shown, growing.ready)
            shown = growing.ready
            if found:
                break
        found = growing.update(ids[:count], finished=not found) or found
        assert growing.ready.startswith(shown)
        whole = tokenizer.decode(ids) if process is None else process(tokenizer.decode(ids))
        ends = [whole.index(word) for word in stop if word in whole]
        expected = whole[: min(ends)] if ends else whole
        assert found == bool(ends) and growing.ready == (expected.rstrip() if clean else expected)


def check_bytes(tokenizer, size):
    found = token_bytes(tokenizer, size)
    anchor = tokenizer.encode_text("a")[-1]
    before = tokenizer.decode([anchor]).encode()
    after = tokenizer.decode([anchor, anchor]).encode()[len(before) :]
    for index, expected in enumerate(found):
        is_byte = len(expected) == 1 and expected >= b"\x80"
        if not is_byte and index != tokenizer.unk_token_id:  # a byte alone is no character, <unk> prints " ⁇ "
            assert tokenizer.decode([anchor, index, anchor]).encode() == before + expected + after, index
    assert {bytes([byte]) for byte in range(256)} <= set(found)


def test_the_bytes_of_a_token_are_what_decode_prints_for_it(tiny):
    tokenizer, model = tiny
    check_bytes(tokenizer, model.config.vocab_size)


def test_the_bytes_of_the_real_vocabulary_are_what_decode_prints(tiny, real_sp_model):
    check_bytes(type(tiny[0])(str(real_sp_model)), 130528)
