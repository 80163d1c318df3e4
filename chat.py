"""What a round of chat needs around `generate`: history, the text of an answer and its end, tokens on their way."""

import queue
import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

CHINESE = "\u4e00-\u9fff"
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character


def process_response(response: str) -> str:
    """The official clean-up: outer blanks, the placeholder of the training date, and full-width punctuation beside
    Chinese characters."""
    response = response.strip().replace("[[训练时间]]", "2023年")
    for half, full in FULL_WIDTH.items():
        response = re.sub(rf"(?<=[{CHINESE}]){re.escape(half)}", full, response)
        response = re.sub(rf"{re.escape(half)}(?=[{CHINESE}])", full, response)
    return response


def is_messages(history: Optional[list]) -> bool:
    return bool(history) and isinstance(history[0], dict)


def with_round(history: Optional[list], query: str, response: str) -> list:
    """A new history with one more round, in the form of the old one."""
    if is_messages(history):
        return [*history, {"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return [*(history or []), (query, response)]


def without_oldest_round(history: Optional[list]) -> Optional[list]:
    """`history` without its first question and answer; a system message stays. None when no round is left."""
    if not is_messages(history):
        return list(history[1:]) if history else None
    system = [message for message in history if message.get("role") == "system"]
    rounds = [message for message in history if message.get("role") != "system"]
    starts = [index for index, message in enumerate(rounds) if message.get("role") == "user"]
    if not starts:
        return None
    return system + (rounds[starts[1] :] if len(starts) > 1 else [])


class Rounds(NamedTuple):
    """A query with what was said before it."""

    tokenizer: Any
    query: str
    history: Optional[list]
    answer_room: Optional[int]  # tokens to keep free for the answer by leaving out the oldest rounds

    def prompt_within(self, max_length: Optional[int]) -> list[int]:
        """The ids of the prompt; ValueError where `max_length` leaves no room for an answer."""
        history = self.history
        ids = self.tokenizer.build_chat_input_ids(self.query, history)
        if max_length is None:
            return ids
        while self.answer_room is not None and len(ids) + self.answer_room > max_length:
            history = without_oldest_round(history)
            if history is None:
                break
            ids = self.tokenizer.build_chat_input_ids(self.query, history)
        if len(ids) < max_length:
            return ids
        raise ValueError(
            f"the prompt has {len(ids)} tokens and max_length is {max_length}: no room is left for an answer; "
            "raise max_length, shorten the history (answer_room=256 leaves out its oldest rounds) or the query"
        )


class FiniteScores(LogitsProcessor):
    """Stops the generation where the scores make no sense; -inf alone is a processor's way to forbid a token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if torch.isfinite(scores.amax(dim=-1)).all():  # NaN and inf both survive the maximum
            return scores
        raise ValueError(
            f"the model's scores are not finite (dtype {scores.dtype}, token {input_ids.shape[1]}): float16 overflows "
            "on some hardware and with some fine-tunes; load it with torch_dtype=torch.bfloat16 or torch.float32"
        )


class Answer(StoppingCriteria):
    """The text of an answer: decoding, clean-up, and stop strings, in one place for chat and stream_chat."""

    def __init__(self, tokenizer, prompt_length: int, process_response, stop: Optional[list[str]]):
        self.tokenizer, self.prompt_length, self.process_response = tokenizer, prompt_length, process_response
        self.stop = [stop] if isinstance(stop, str) else list(stop or [])
        if "" in self.stop:
            raise ValueError(f"stop = {stop!r}: an empty text would end every answer before it begins")

    def decoded(self, ids: Tensor) -> tuple[str, bool]:
        """The text of `ids` [n] behind the prompt, cut before the first stop string; and whether one was found."""
        text = self.tokenizer.decode(ids[self.prompt_length :].tolist())
        ends = [text.find(word) for word in self.stop if word in text]
        return (text[: min(ends)], True) if ends else (text, False)

    def text(self, ids: Tensor, finished: bool) -> str:
        text, stopped = self.decoded(ids)
        return self.process_response(text if finished or stopped else self.shown(text.rstrip(UNFINISHED)))

    def shown(self, text: str) -> str:
        """Unfinished text without an end that may yet become a stop string."""
        beginnings = [word[:length] for word in self.stop for length in range(1, len(word))]
        held_back = max((len(start) for start in beginnings if text.endswith(start)), default=0)
        return text[: len(text) - held_back]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> bool:
        return bool(self.stop) and self.decoded(input_ids[0])[1]


class TokenTap(StoppingCriteria):
    """Hands the ids of each step from the thread that generates to the one that reads.

    A stopping criterion is the one public hook that every transformers version calls after each token (below 4.39 not
    after a last one that another criterion stops at: that comes from the result).
    """

    def __init__(self):
        self.queue, self.stopped, self.length = queue.Queue(), False, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> bool:
        self.queue.put(input_ids)
        self.length = input_ids.shape[1]
        return self.stopped

    def run(self, generate, arguments: dict[str, Any]) -> None:
        try:
            output = generate(**arguments)
            ids = output if torch.is_tensor(output) else output.sequences
            if ids.shape[1] > self.length:
                self.queue.put(ids)
            self.queue.put(None)
        except BaseException as error:  # raised again where the tokens are read
            self.queue.put(error)

    def __iter__(self) -> Iterator[Tensor]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class ChatMixin:
    """chat, stream_chat and stream_generate of the model."""

    def process_response(self, response: str) -> str:
        """The official clean-up of an answer; see chat.process_response."""
        return process_response(response)

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        query: str,
        history: Optional[list] = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Optional[LogitsProcessorList] = None,
        stop: Optional[list[str]] = None,
        answer_room: Optional[int] = None,
        **kwargs,
    ) -> tuple[str, list]:
        """Answers `query` after `history`.

        Args:
            history: earlier rounds as (query, answer) pairs, or role/content messages; not changed.
            max_length: tokens of prompt and answer together (or give max_new_tokens).
            stop: texts that end the answer; the answer is cut before them.
            answer_room: tokens to keep free for the answer: the oldest rounds are left out of the prompt until they
                are. Without it a prompt that fills `max_length` is an error.
            kwargs: anything that transformers' `generate` takes.

        Returns:
            the answer, and a new history with this round added in the form that `history` had.

        Raises:
            ValueError: no room under max_length; scores that are not finite.
        """
        kwargs.update(do_sample=do_sample, top_p=top_p, temperature=temperature, num_beams=num_beams)
        rounds = Rounds(tokenizer, query, history, answer_room)
        prompt, arguments = self._chat_arguments(rounds, max_length, logits_processor, kwargs)
        answer = Answer(tokenizer, prompt.shape[1], self.process_response, stop)
        arguments["stopping_criteria"].append(answer)
        output = self.generate(input_ids=prompt, **arguments)
        output = output if torch.is_tensor(output) else output.sequences
        response = answer.text(output[0], finished=True)
        return response, with_round(history, query, response)

    @torch.no_grad()
    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: Optional[list] = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Optional[LogitsProcessorList] = None,
        stop: Optional[list[str]] = None,
        answer_room: Optional[int] = None,
        **kwargs,
    ) -> Iterator[tuple[str, list]]:
        """As `chat`, but yields (answer so far, history) after each token; the last pair is what `chat` returns.

        Closing the generator (or leaving its loop) ends the generation.
        """
        kwargs.update(do_sample=do_sample, top_p=top_p, temperature=temperature)
        rounds = Rounds(tokenizer, query, history, answer_room)
        prompt, arguments = self._chat_arguments(rounds, max_length, logits_processor, kwargs)
        answer = Answer(tokenizer, prompt.shape[1], self.process_response, stop)
        arguments["stopping_criteria"].append(answer)
        shown, ids = None, prompt
        for ids in self.stream_generate(prompt, **arguments):
            shown = answer.text(ids[0], finished=False)
            yield shown, with_round(history, query, shown)
        response = answer.text(ids[0], finished=True)
        if response != shown:
            yield response, with_round(history, query, response)

    @torch.no_grad()
    def stream_generate(
        self,
        input_ids: Tensor,
        generation_config=None,
        logits_processor: Optional[LogitsProcessorList] = None,
        stopping_criteria: Optional[StoppingCriteriaList] = None,
        prefix_allowed_tokens_fn=None,
        **kwargs,
    ) -> Iterator[Tensor]:
        """Runs `generate` and yields the ids so far, [B, n], after each token, the last included (no beams).

        The generation runs in a thread of its own, which ends when this generator does.
        """
        if (kwargs.get("num_beams") or 1) > 1:
            raise ValueError(f"num_beams = {kwargs['num_beams']}: beams cannot be streamed; use chat() or generate()")
        tap = TokenTap()
        arguments = dict(kwargs, input_ids=input_ids, logits_processor=logits_processor or LogitsProcessorList())
        arguments["stopping_criteria"] = StoppingCriteriaList([*(stopping_criteria or []), tap])
        optional = {"generation_config": generation_config, "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn}
        arguments.update({name: value for name, value in optional.items() if value is not None})
        thread = threading.Thread(target=tap.run, args=(self.generate, arguments), daemon=True)
        thread.start()
        try:
            yield from tap
        finally:
            tap.stopped = True
            thread.join()

    def _chat_arguments(self, rounds: Rounds, max_length: int, logits_processor, options: dict[str, Any]):
        """Prompt ids [1, S] and the arguments of `generate` for one round of chat."""
        if options.get("max_new_tokens") is not None:
            max_length = None
        trimmed = self.config.max_sequence_length if rounds.answer_room is not None else None
        ids = rounds.prompt_within(trimmed if max_length is None else max_length)
        if max_length is not None:
            options["max_length"] = max_length
        if not options["do_sample"]:  # generate would warn that they have no effect
            options = {name: value for name, value in options.items() if name not in ("top_p", "temperature", "top_k")}
        else:
            own = getattr(getattr(self, "generation_config", None), "top_k", None)
            options.setdefault("top_k", own or 50)  # the default of the transformers that the original ran on
        prompt = torch.tensor([ids], device=self.device)
        options["attention_mask"] = torch.ones_like(prompt)
        options["logits_processor"] = LogitsProcessorList([*(logits_processor or []), FiniteScores()])
        options["stopping_criteria"] = StoppingCriteriaList(options.get("stopping_criteria") or [])
        return prompt, options
