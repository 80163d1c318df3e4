"""Tokens are chosen as transformers' own generation chooses them; the text of an answer only grows."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from serving.sampling import Sampling, choose
from serving.text import AnswerText, Decoded, token_bytes


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


def test_without_a_seed_tokens_are_drawn_as_often_as_they_should():
    probabilities, draws = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]), 4000
    sampling = Sampling(temperature=1.0, top_k=4, top_p=0.9)
    expected = torch.tensor([4 / 9, 3 / 9, 2 / 9, 0, 0])  # top_k leaves the last out, then top_p the one before it
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(5)
    for _ in range(draws):
        counts[choose(probabilities.log(), sampling, generator, [], None).id] += 1
    deviation = (expected * (1 - expected) * draws).sqrt()
    assert ((counts - draws * expected).abs() <= 5 * deviation).all(), counts


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


def check_growing_text(tokenizer, size):
    """At each token the text of all of them, whatever they are."""
    chance = random.Random(0)
    often = tokenizer.encode_text("a \n\t  , 好😀𝄞") + [tokenizer.unk_token_id, tokenizer.eos_token_id, 0]
    for _ in range(150):
        share, ids = chance.choice([0.2, 0.5, 0.9]), []
        growing = Decoded(tokenizer.decode)
        for _ in range(30):
            ids.append(chance.choice(often) if chance.random() < share else chance.randrange(size))
            assert growing(ids) == growing(ids) == tokenizer.decode(ids), ids


def test_a_text_that_grows_is_at_each_token_that_of_all_tokens(tiny):
    tokenizer, model = tiny
    check_growing_text(tokenizer, model.config.vocab_size)


def test_a_text_of_the_real_vocabulary_grows_likewise(tiny, real_sp_model):
    check_growing_text(type(tiny[0])(str(real_sp_model)), 130528)


def test_a_token_late_in_a_text_takes_no_longer_to_decode_than_an_early_one(tiny):
    tokenizer, _ = tiny
    decoded, ids = [], tokenizer.encode_text("清华大学在北京 hello 😀\n" * 50)
    growing = Decoded(lambda some: decoded.append(len(some)) or tokenizer.decode(some))
    for count in range(1, len(ids) + 1):
        growing(ids[:count])
    longest = max(len(tokenizer.encode_text(char)) for char in "清😀")
    assert len(ids) > 300 and max(decoded) <= 2 * longest + 2


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
