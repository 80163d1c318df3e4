"""What a round of chat needs around `generate`: history, the text of an answer and its end, tokens on their way."""

import queue
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

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
