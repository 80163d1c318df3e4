"""What lm-evaluation-harness counts of a GLM, against the definition, token by token.

In float64, where two right sums agree to far more than the digits asked for.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

NEEDS = "pip install -r finetune/requirements-evaluate.txt"
pytest.importorskip("lm_eval", reason=NEEDS)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from finetune.harness import ChatGLM  # noqa: E402

DIGITS = 1e-9
TINY = Path(__file__).resolve().parents[2] / "tiny"
PAIRS = [
    ("介绍一下清华大学", "清华大学是中国著名的综合性大学"),
    ("你好", "你好👋！"),
    ("", "没有前文的回答"),
    ("问：1 + 1 = ", "2"),
    ("问：1 + 1 =", " 2"),
]


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModel

    return AutoModel.from_pretrained(TINY, trust_remote_code=True, dtype=torch.float64).eval()


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def by_hand(model, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
    """log P(answer | prompt) one token after the other, and whether each is the likeliest."""
    total, greedy = 0.0, True
    for index, token in enumerate(answer):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer[:index]])).logits[0, -1].log_softmax(dim=-1)
        total, greedy = total + scores[token].item(), greedy and int(scores.argmax()) == token
    return total, greedy


def ends(tokenizer) -> list[int]:
    return [tokenizer.gmask_token_id, tokenizer.bos_token_id]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_continuation_is_scored_as_the_answer_behind_gmask_and_sop(model, tokenizer, batch_size):
    found = ChatGLM(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float64).loglikelihood(
        requests("loglikelihood", PAIRS), disable_tqdm=True
    )
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found):
        prompt = tokenizer.encode_text(context.rstrip()) + ends(tokenizer)
        expected, is_greedy = by_hand(model, prompt, tokenizer.encode_text(continuation.strip()))
        assert math.isclose(logprob, expected, rel_tol=DIGITS) and greedy == is_greedy
    assert found[3] == found[4]  # the blank between the two is nobody's
    assert found[1][1] and not found[2][1]


def test_rolling_counts_each_token_of_a_text_once(model, tokenizer):
    text = "清华大学是中国著名的综合性大学，校训是自强不息。"
    ids, room = tokenizer.encode_text(text), 8
    whole, cut = ChatGLM(model, tokenizer=tokenizer), ChatGLM(model, tokenizer=tokenizer, max_length=room + 3)
    expected = by_hand(model, ends(tokenizer), ids)[0]
    asked = requests("loglikelihood_rolling", [(text,), (text[:3],)])
    found = whole.loglikelihood_rolling(asked, disable_tqdm=True)
    assert math.isclose(found[0], expected, rel_tol=1e-5)  # the harness sums in float32
    starts = range(0, len(ids), room)
    assert len(starts) > 2
    parts = [by_hand(model, ids[max(at - 1, 0) : at] + ends(tokenizer), ids[at : at + room])[0] for at in starts[:-1]]
    last = max(starts)  # the harness fills the last window up with tokens before it
    before = len(ids) - room - 1
    parts.append(by_hand(model, ids[before:last] + ends(tokenizer), ids[last:])[0])
    assert math.isclose(cut.loglikelihood_rolling(asked, disable_tqdm=True)[0], sum(parts), rel_tol=1e-5)


def test_generation_answers_as_chat_does_and_ends_at_a_stop_text(model, tokenizer):
    questions = ["你好", "介绍一下清华大学", "早上好"]
    options = {"do_sample": False, "max_gen_toks": 48}
    expected = [model.chat(tokenizer, one, history=[], do_sample=False, max_new_tokens=48)[0] for one in questions]
    for batch_size in (1, 3):
        harness = ChatGLM(model, tokenizer=tokenizer, batch_size=batch_size)
        asked = requests("generate_until", [(one, dict(options)) for one in questions])
        assert harness.generate_until(asked, disable_tqdm=True) == expected
    cut = requests("generate_until", [("介绍一下清华大学", {**options, "until": ["，"]})])
    assert harness.generate_until(cut, disable_tqdm=True) == [expected[1].partition("，")[0]]


def test_a_long_context_loses_its_beginning_and_keeps_gmask_and_sop(model, tokenizer):
    harness = ChatGLM(model, tokenizer=tokenizer, max_length=12, softmax_dtype=torch.float64)
    context, answer = "介绍一下清华大学，还有北京大学，还有复旦大学", "好的"
    ids, given = tokenizer.encode_text(context), tokenizer.encode_text(answer)
    kept = ids[len(ids) - (12 + 1 - len(given) - 2) :]
    (found,) = harness.loglikelihood(requests("loglikelihood", [(context, answer)]), disable_tqdm=True)
    assert math.isclose(found[0], by_hand(model, kept + ends(tokenizer), given)[0], rel_tol=DIGITS)
    batch, mask = harness.tok_batch_encode([context, "你好"], left_truncate_len=6)
    assert batch.tolist()[0] == ids[-4:] + ends(tokenizer) and batch.tolist()[1][-2:] == ends(tokenizer)
    assert mask.tolist()[1] == [0] * (6 - int(mask[1].sum())) + [1] * int(mask[1].sum())
    with pytest.raises(ValueError, match="a continuation of .* tokens: .* the model takes 12"):
        harness.loglikelihood(requests("loglikelihood", [("你好", context)]), disable_tqdm=True)


def test_the_plain_hf_model_of_the_harness_is_refused_and_never_wrong(model, tokenizer):
    harness = HFLM(model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="has no <sop>"):
        harness.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"has no \[gMASK\] or \[MASK\]"):
        harness.loglikelihood_rolling(requests("loglikelihood_rolling", [("你好，世界",)]), disable_tqdm=True)
    with pytest.raises(ValueError, match="take the model `chatglm` of finetune/harness.py, not `hf`"):
        asked = requests("generate_until", [("你好", {"do_sample": False, "max_gen_toks": 8})])
        harness.generate_until(asked, disable_tqdm=True)
