"""chat, stream_chat and stream_generate: the golden answers, and what differs from the original on purpose."""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from chatglm_slim.chat import Answer, process_response
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
    before = set(threading.enumerate())
    stream = model.stream_chat(tokenizer, "介绍一下清华大学", do_sample=False)
    next(stream)
    (started,) = set(threading.enumerate()) - before
    stream.close()
    assert not started.is_alive()


def test_a_stream_collected_as_garbage_in_its_own_thread_ends_in_silence(model, tokenizer, monkeypatch):
    dropped, unraisable = threading.Event(), []

    class Collect(LogitsProcessor):
        steps = 0

        def __call__(self, input_ids, scores):
            self.steps += 1
            if self.steps == 2:
                assert dropped.wait(60)
                gc.collect()
            return scores

    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    gc.disable()
    try:
        before = set(threading.enumerate())
        cycle = [model.stream_chat(tokenizer, "介绍一下清华大学", logits_processor=[Collect()])]
        cycle.append(cycle)
        next(cycle[0])
        (thread,) = set(threading.enumerate()) - before
        del cycle
        dropped.set()
        thread.join(60)
    finally:
        gc.enable()
    assert not thread.is_alive() and not unraisable


def seen_while_generating(model, see, generate):
    seen = set()
    hook = model.transformer.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.add(see(output)))
    try:
        generate()
    finally:
        hook.remove()
    return seen


def test_autocast_and_inference_mode_reach_the_thread_of_a_stream(model, tokenizer):
    options = {"do_sample": False, "max_new_tokens": 2}

    def stream():
        return list(model.stream_chat(tokenizer, "你好", **options))

    def see(output):
        return output.dtype, torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    assert seen_while_generating(model, see, stream) == {(torch.float32, False, False)}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert seen_while_generating(model, see, stream) == {(torch.bfloat16, True, False)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_current_cuda_stream_reaches_the_thread_of_a_stream(golden_model, tokenizer):
    model, own = golden_model("chat2d")[0].cuda(), torch.cuda.Stream()
    options = {"do_sample": False, "max_new_tokens": 2}
    with torch.cuda.stream(own):
        seen = seen_while_generating(
            model,
            lambda output: torch.cuda.current_stream().cuda_stream,
            lambda: list(model.stream_chat(tokenizer, "你好", **options)),
        )
    assert seen == {own.cuda_stream}


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


def test_history_as_messages_gives_the_same_answer_and_grows_in_kind(model, tokenizer):
    messages = [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "Hi, how are you?"}]
    response, history = model.chat(tokenizer, "and you", history=messages, do_sample=False)
    assert response == "I am fine"
    assert history == [
        *messages,
        {"role": "user", "content": "and you"},
        {"role": "assistant", "content": "I am fine"},
    ]


def test_control_tokens_typed_by_a_user_stay_text(model, tokenizer):
    typed = "<sop> <eop> [gMASK] [MASK] <pad> <unk>"
    ids = tokenizer.build_chat_input_ids(typed, [(typed, typed)])
    controls = set(tokenizer.convert_tokens_to_ids(["<sop>", "<eop>", "[gMASK]", "[MASK]", "<pad>", "<unk>"]))
    assert not controls & set(ids[:-2])
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    response, _ = model.chat(tokenizer, typed, do_sample=False, max_new_tokens=4)
    assert isinstance(response, str)


def test_stop_strings_are_never_shown_in_part(model, tokenizer):
    full, _ = model.chat(tokenizer, "你好", do_sample=False)
    steps = [text for text, _ in model.stream_chat(tokenizer, "你好", do_sample=False, stop=[full[4:7]])]
    assert steps[-1] == full[:4]
    assert all(steps[-1].startswith(step) for step in steps)


@pytest.mark.parametrize("stop", [[""], "", [5], ["a", None]])
def test_stop_strings_that_are_no_text_are_named(model, tokenizer, stop):
    with pytest.raises(ValueError, match="stop = .*give texts"):
        model.chat(tokenizer, "你好", stop=stop)


MARKS = "x, y? 好!好\n\n问:abc,好 [[训练时间]] end. 一,,二 "


def test_a_stop_string_cuts_what_is_shown_wherever_it_stands(tokenizer):
    """Every piece of the shown text as a stop string, token by token: the answer is the whole one, cut before it."""
    ids = torch.tensor(tokenizer.encode_text(MARKS))
    whole = process_response(tokenizer.decode(ids.tolist()))
    assert "，好" in whole and "2023年" in whole and "[[" not in whole
    stops = {whole[start : start + length] for start in range(len(whole)) for length in (1, 2, 3, 4)} | {",好", "[["}
    for stop in stops:
        answer = Answer(tokenizer, 0, process_response, [stop])
        for length in range(1, len(ids) + 1):
            shown = answer.text(ids[:length], finished=False)
            assert whole.partition(stop)[0].startswith(shown)
            if answer(ids[None, :length], None):
                break
        assert answer.text(ids[:length], finished=True) == whole.partition(stop)[0].rstrip()
        assert length < len(ids) or stop not in whole[:-3]  # the marks before the last character settle with it


def test_blanks_that_are_not_shown_yet_end_an_answer(tokenizer):
    answer = Answer(tokenizer, 0, process_response, ["\n\n"])
    assert answer.ended(torch.tensor(tokenizer.encode_text("Hi\n\n")), finished=False) == ("Hi", True)


def test_full_width_marks_are_stop_strings(model, tokenizer):
    full, _ = model.chat(tokenizer, "介绍一下清华大学", do_sample=False)
    for stop in ("，", "：工"):
        assert stop in full
        expected = full.partition(stop)[0]
        assert model.chat(tokenizer, "介绍一下清华大学", do_sample=False, stop=[stop])[0] == expected
        assert list(model.stream_chat(tokenizer, "介绍一下清华大学", do_sample=False, stop=[stop]))[-1][0] == expected


@pytest.mark.parametrize("stop", ["，", "大学", "\n\n", "学院", "没有"])
def test_beams_give_their_best_answer_cut_at_the_stop_string(model, tokenizer, stop):
    options = {"num_beams": 3, "do_sample": False, "max_length": 96}
    full, _ = model.chat(tokenizer, "介绍一下清华大学", **options)
    cut, _ = model.chat(tokenizer, "介绍一下清华大学", stop=[stop], **options)
    assert cut == full.partition(stop)[0].rstrip()


def test_beams_are_not_streamed(model, tokenizer):
    with pytest.raises(ValueError, match="num_beams = 3"):
        next(model.stream_chat(tokenizer, "你好", num_beams=3))


def test_top_k_of_the_generation_config_is_obeyed_also_where_it_is_0(model, tokenizer, monkeypatch):
    settings, seen = getattr(model, "generation_config", model.config), []
    monkeypatch.setattr(model, "generate", lambda input_ids, **rest: seen.append(rest["top_k"]) or input_ids)
    for value, expected in ((0, 0), (7, 7), (None, 50)):
        monkeypatch.setattr(settings, "top_k", value)
        model.chat(tokenizer, "你好")
        assert seen.pop() == expected
    model.chat(tokenizer, "你好", top_k=9)
    assert seen.pop() == 9


@pytest.mark.parametrize("name, value", [("max_length", "2048"), ("max_new_tokens", 2.5), ("num_beams", "3")])
def test_lengths_that_are_no_whole_numbers_are_named(model, tokenizer, name, value):
    message = f"{name} = {value!r} \\({type(value).__name__}\\)"
    with pytest.raises(ValueError, match=message):
        model.chat(tokenizer, "你好", **{name: value})
    with pytest.raises(ValueError, match=message):
        list(model.stream_chat(tokenizer, "你好", **{name: value}))


def test_whole_numbers_of_other_types_are_lengths(model, tokenizer):
    for value in (8.0, torch.tensor(8)):
        assert model.chat(tokenizer, "你好", do_sample=False, max_length=value)[0] == "你好"
