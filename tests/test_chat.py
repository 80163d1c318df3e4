"""chat, stream_chat and stream_generate: the golden answers, and what differs from the original on purpose."""

import json
import threading
from pathlib import Path

import pytest
import torch
from chatglm_slim.chat import without_oldest_round
from chatglm_slim.tokenization_chatglm import ChatGLMTokenizer
from transformers import LogitsProcessor, LogitsProcessorList

GOLDEN = Path(__file__).parent / "golden" / "model"
CASES = json.loads((GOLDEN / "chat2d" / "cases.json").read_text(encoding="utf-8"))["cases"]
GREEDY = [case for case in CASES if case["kind"] == "chat" and case["kwargs"].get("do_sample") is False]
STREAMED = [case for case in GREEDY if "stream_responses" in case]


@pytest.fixture(scope="module")
def model(golden_model):
    return golden_model("chat2d")[0]


@pytest.fixture(scope="module")
def tokenizer(golden):
    return ChatGLMTokenizer(str(golden / "tiny_sp.model"))


def pairs(history):
    return [tuple(pair) for pair in history or []]


@pytest.mark.parametrize("case", GREEDY, ids=lambda case: case["name"])
def test_greedy_and_beam_answers_equal_the_original(model, tokenizer, case):
    history = pairs(case["history"])
    response, new_history = model.chat(tokenizer, case["query"], history=history, **case["kwargs"])
    assert response == case["response"]
    assert new_history == pairs(case["new_history"])
    assert history == pairs(case["history"])  # the caller's list is left alone
    if "input_ids" in case:
        assert tokenizer.build_chat_input_ids(case["query"], history) == case["input_ids"]


def test_conversation_feeds_its_answers_back(model, tokenizer):
    case = next(case for case in CASES if case["kind"] == "conversation")
    history = []
    for query, answer in case["turns"]:
        response, history = model.chat(tokenizer, query, history=history, do_sample=False, max_length=256)
        assert response == answer
    assert history == pairs(case["history"])


@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case["name"])
def test_stream_shows_the_original_steps_without_half_characters_and_ends_as_chat(model, tokenizer, case):
    history = pairs(case["history"])
    stream = list(model.stream_chat(tokenizer, case["query"], history=history, **case["kwargs"]))
    shown = [response for response, _ in stream]
    original = [step.rstrip("\ufffd") for step in case["stream_responses"]]
    assert shown[: len(original)] == original
    assert not any("\ufffd" in step for step in shown)
    assert shown[-1] == case["response"]  # the original never yielded its last token
    assert stream[-1][1] == pairs(case["new_history"])


def test_sampling_is_reproducible_and_streams_the_same(model, tokenizer):
    answers = set()
    for _ in range(2):
        torch.manual_seed(42)
        answers.add(model.chat(tokenizer, "介绍一下清华大学", max_length=96)[0])
        torch.manual_seed(42)
        answers.add(list(model.stream_chat(tokenizer, "介绍一下清华大学", max_length=96))[-1][0])
    assert len(answers) == 1


def test_process_response_equals_the_original(model):
    for text, expected in json.loads((GOLDEN / "misc.json").read_text(encoding="utf-8"))["process_response"]:
        assert model.process_response(text) == expected


def test_stream_generate_yields_every_token_of_generate(model, tokenizer):
    prompt = torch.tensor([tokenizer.build_chat_input_ids("你好")])
    options = {"do_sample": False, "max_length": 24, "attention_mask": torch.ones_like(prompt)}
    steps = list(model.stream_generate(prompt, **options))
    whole = model.generate(input_ids=prompt, **options)
    assert [step.shape[1] for step in steps] == list(range(prompt.shape[1] + 1, whole.shape[1] + 1))
    assert torch.equal(steps[-1], whole)


def test_closing_the_stream_ends_its_thread(model, tokenizer):
    before = threading.active_count()
    stream = model.stream_chat(tokenizer, "介绍一下清华大学", do_sample=False)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_an_error_while_streaming_reaches_the_caller(model, tokenizer):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("broken processor")

    with pytest.raises(RuntimeError, match="broken processor"):
        list(model.stream_chat(tokenizer, "你好", logits_processor=LogitsProcessorList([Broken()])))


class Overwrite(LogitsProcessor):
    """Sets one score, as a broken model (nan, inf) or a legitimate ban (-inf) would."""

    def __init__(self, value, token):
        self.value, self.token = value, token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] = self.value
        return scores


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_raise_with_dtype_and_cure(model, tokenizer, value):
    processors = LogitsProcessorList([Overwrite(value, 7)])
    with pytest.raises(ValueError, match=r"not finite \(dtype torch.float32.*bfloat16"):
        model.chat(tokenizer, "你好", do_sample=False, logits_processor=processors)
    assert len(processors) == 1  # the original added one to the caller's list at each call


def test_banning_a_token_with_minus_infinity_is_no_error(model, tokenizer):
    answer, _ = model.chat(tokenizer, "你好", do_sample=False, max_length=40)
    first = tokenizer.encode_text(answer)[1]
    processors = LogitsProcessorList([Overwrite(float("-inf"), first)])
    other, _ = model.chat(tokenizer, "你好", do_sample=False, max_length=40, logits_processor=processors)
    assert other and other != answer


def test_stop_strings_end_answer_and_stream(model, tokenizer):
    full, _ = model.chat(tokenizer, "你好", do_sample=False, max_length=128)
    stop = "ChatGLM"
    assert stop in full
    response, history = model.chat(tokenizer, "你好", do_sample=False, max_length=128, stop=[stop])
    assert response == full[: full.index(stop)].strip() and history[-1] == ("你好", response)
    stream = list(model.stream_chat(tokenizer, "你好", do_sample=False, max_length=128, stop=stop))
    assert stream[-1][0] == response
    assert len(stream) < len(tokenizer.encode_text(full))


def test_a_prompt_without_room_is_an_error_before_anything_is_generated(model, tokenizer):
    with pytest.raises(ValueError, match="5 tokens and max_length is 5"):
        model.chat(tokenizer, "你好", max_length=5)
    with pytest.raises(ValueError, match="no room is left"):
        next(model.stream_chat(tokenizer, "你好", max_length=3))


def test_max_new_tokens_replaces_max_length(model, tokenizer):
    answer, _ = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=3)
    assert answer == "你好"


def test_answer_room_leaves_out_the_oldest_rounds(model, tokenizer):
    history = [("旧" * 40, "答" * 40), ("say hi", "Hi, how are you?")]
    with pytest.raises(ValueError, match="no room"):
        model.chat(tokenizer, "and you", history=history, do_sample=False, max_length=100)
    response, new_history = model.chat(
        tokenizer, "and you", history=history, do_sample=False, max_length=100, answer_room=40
    )
    expected, _ = model.chat(tokenizer, "and you", history=history[1:], do_sample=False, max_length=100)
    assert response == expected == "I am fine"
    assert new_history == [*history, ("and you", "I am fine")]  # only the prompt is shortened


def test_history_as_messages_gives_the_same_answer_and_grows_in_kind(model, tokenizer):
    messages = [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "Hi, how are you?"}]
    response, history = model.chat(tokenizer, "and you", history=messages, do_sample=False)
    assert response == "I am fine"
    assert history == [
        *messages,
        {"role": "user", "content": "and you"},
        {"role": "assistant", "content": "I am fine"},
    ]


def test_the_oldest_round_goes_first_and_the_system_message_stays():
    system = {"role": "system", "content": "s"}
    rounds = [{"role": role, "content": str(n)} for n in range(2) for role in ("user", "assistant")]
    assert without_oldest_round([system, *rounds]) == [system, *rounds[2:]]
    assert without_oldest_round([system, *rounds[2:]]) == [system]
    assert without_oldest_round([system]) is None and without_oldest_round([]) is None
    assert without_oldest_round([("a", "b"), ("c", "d")]) == [("c", "d")]


def test_control_tokens_typed_by_a_user_stay_text(model, tokenizer):
    typed = "<sop> <eop> [gMASK] [MASK] <pad> <unk>"
    ids = tokenizer.build_chat_input_ids(typed, [(typed, typed)])
    controls = set(tokenizer.convert_tokens_to_ids(["<sop>", "<eop>", "[gMASK]", "[MASK]", "<pad>", "<unk>"]))
    assert not controls & set(ids[:-2])
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    response, _ = model.chat(tokenizer, typed, do_sample=False, max_new_tokens=4)
    assert isinstance(response, str)


def test_stop_strings_are_never_shown_in_part_and_never_empty(model, tokenizer):
    full, _ = model.chat(tokenizer, "你好", do_sample=False)
    word = full[4:7]
    steps = [text for text, _ in model.stream_chat(tokenizer, "你好", do_sample=False, stop=[word])]
    assert all(later.startswith(earlier) for earlier, later in zip(steps, steps[1:]))
    with pytest.raises(ValueError, match="empty text"):
        model.chat(tokenizer, "你好", stop=[""])


def test_beams_are_not_streamed(model, tokenizer):
    with pytest.raises(ValueError, match="num_beams = 3"):
        next(model.stream_chat(tokenizer, "你好", num_beams=3))


def test_answer_room_counts_with_max_new_tokens_too(model, tokenizer):
    history = [("旧" * 30, "答" * 30)] * 60
    with pytest.MonkeyPatch.context() as patch:
        lengths = []
        patch.setattr(model, "generate", lambda input_ids, **rest: lengths.append(input_ids.shape[1]) or input_ids)
        model.chat(tokenizer, "你好", history=history, max_new_tokens=3, answer_room=256)
    assert 1000 < lengths[0] <= model.config.max_sequence_length - 256
