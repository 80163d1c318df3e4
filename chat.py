"""Chat: the text of an answer and its end, tokens on their way, and the three methods."""

from __future__ import annotations

import math
import queue
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .compat import chosen_setting

CHINESE = "\u4e00-\u9fff"
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
DATE_PLACEHOLDER = "[[训练时间]]"
UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character


def process_response(response: str) -> str:
    """The official clean-up: outer blanks, the placeholder of the training date, and full-width punctuation beside
    Chinese characters."""
    response = response.strip().replace(DATE_PLACEHOLDER, "2023年")
    for half, full in FULL_WIDTH.items():
        response = re.sub(rf"(?<=[{CHINESE}]){re.escape(half)}|{re.escape(half)}(?=[{CHINESE}])", full, response)
    return response


def held_back(text: str, words: list[str]) -> str:
    """`text` without an end that may yet become one of the words."""
    beginnings = [word[:length] for word in words for length in range(1, len(word))]
    return text[: len(text) - max((len(start) for start in beginnings if text.endswith(start)), default=0)]


def settled(response: str) -> str:
    """The part of an unfinished answer that the clean-up leaves as it is, whatever text follows."""
    return held_back(response, [DATE_PLACEHOLDER]).rstrip("".join(FULL_WIDTH))


# --- history and answer ----------------------------------------------------------------------------------------------


def with_round(history: list | None, query: str, response: str) -> list:
    """A new history with one more round, in the form of the old one."""
    if history and isinstance(history[0], dict):
        return [*history, {"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return [*(history or []), (query, response)]


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
    """The text of an answer as it is shown, and its end before a stop string; one place for chat and stream_chat."""

    def __init__(self, tokenizer, prompt_length: int, process_response, stop: list[str] | None):
        self.tokenizer, self.prompt_length, self.process_response = tokenizer, prompt_length, process_response
        self.stop = [stop] if isinstance(stop, str) else list(stop or [])
        if not all(isinstance(word, str) and word for word in self.stop):
            raise ValueError(f"stop = {stop!r}: give texts; an empty one would end every answer before it begins")

    def ended(self, ids: Tensor, finished: bool) -> tuple[str, bool]:
        """The text of `ids` [n] behind the prompt, cut before the first stop string; and whether one was found.

        Stop strings are looked for in what is shown, so in the cleaned text, where more text can't change it.
        """
        raw = self.tokenizer.decode(ids[self.prompt_length :].tolist())
        raw = raw if finished else raw.rstrip(UNFINISHED)
        text = self.process_response(raw)
        blanks = raw[len(raw.rstrip()) :] if text else ""  # not shown yet, but they may be in a stop string
        searched = text + blanks if finished else settled(text + blanks)
        ends = [searched.find(word) for word in self.stop if word in searched]
        return (text[: min(ends)].rstrip(), True) if ends else (text, False)

    def text(self, ids: Tensor, finished: bool) -> str:
        text, stopped = self.ended(ids, finished)
        return text if finished or stopped or not self.stop else held_back(settled(text), self.stop)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> bool:
        """Of beams nobody knows yet which one wins: they go on, and the winner is cut."""
        return bool(self.stop) and len(input_ids) == 1 and self.ended(input_ids[0], finished=False)[1]


# --- tokens on their way ---------------------------------------------------------------------------------------------


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

    def run(self, contexts: list, generate, arguments: dict[str, Any]) -> None:
        try:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                output = generate(**arguments)
            ids = getattr(output, "sequences", output)
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


def state_of_thread(device: torch.device) -> list:
    """What PyTorch keeps for this thread alone, as contexts for another one: autocast, inference mode, and CUDA's
    current device and stream. (Gradients are off in both.)"""
    contexts: list = [torch.inference_mode()] if torch.is_inference_mode_enabled() else []
    for kind in {"cpu", device.type}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            cached = torch.is_autocast_cache_enabled()
            contexts.append(torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=cached))
    if torch.cuda.is_initialized():
        contexts.append(torch.cuda.stream(torch.cuda.current_stream()))  # sets the device too
    return contexts


def embedding_device(model):
    """Where the embedding executes: its weight may wait elsewhere, moved by hooks of accelerate."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else device


class ChatMixin:
    """chat, stream_chat and stream_generate of the model."""

    process_response = staticmethod(process_response)

    def chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        stop: list[str] | None = None,
        **kwargs,
    ) -> tuple[str, list]:
        """Answers `query` after `history`.

        Args:
            history: earlier rounds as (query, answer) pairs, or role/content messages; not changed.
            max_length: tokens of prompt and answer together (or give max_new_tokens).
            stop: texts, as they would be shown, that end the answer; it is cut before them.
            kwargs: anything else that transformers' `generate` takes.

        Returns:
            the answer, and a new history with this round added in the form that `history` had.

        Raises:
            ValueError: no room under max_length; scores that are not finite; a length that is no whole number.
        """
        kwargs.update(max_length=max_length, logits_processor=logits_processor, num_beams=num_beams)
        kwargs.update(do_sample=do_sample, top_p=top_p, temperature=temperature)
        answer, arguments = self._begin(tokenizer, query, history, stop, kwargs)
        output = self.generate(**arguments)
        response = answer.text(getattr(output, "sequences", output)[0], finished=True)
        return response, with_round(history, query, response)

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        stop: list[str] | None = None,
        **kwargs,
    ) -> Iterator[tuple[str, list]]:
        """As `chat`, but yields (answer so far, history) after each token; the last pair is what `chat` returns.

        Closing the generator (or leaving its loop) ends the generation.
        """
        kwargs.update(max_length=max_length, logits_processor=logits_processor)
        kwargs.update(do_sample=do_sample, top_p=top_p, temperature=temperature)
        answer, arguments = self._begin(tokenizer, query, history, stop, kwargs)
        shown, ids = None, arguments["input_ids"]
        for ids in self.stream_generate(**arguments):
            shown = answer.text(ids[0], finished=False)
            yield shown, with_round(history, query, shown)
        response = answer.text(ids[0], finished=True)
        if response != shown:
            yield response, with_round(history, query, response)

    def stream_generate(
        self,
        input_ids: Tensor,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn=None,
        **kwargs,
    ) -> Iterator[Tensor]:
        """Runs `generate` and yields the ids so far, [B, n], after each token, the last included (no beams).

        The generation runs in a thread of its own, which ends when this generator does. Autocast, inference mode and
        CUDA's current device and stream are there what they are here at the first step.
        """
        if (kwargs.get("num_beams") or 1) > 1:
            raise ValueError(f"num_beams = {kwargs['num_beams']}: beams cannot be streamed; use chat() or generate()")
        tap = TokenTap()
        given = {"generation_config": generation_config, "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn}
        kwargs.update({name: value for name, value in given.items() if value is not None})  # 4.23 knows no first one
        kwargs.update(input_ids=input_ids, logits_processor=LogitsProcessorList(logits_processor or []))
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(stopping_criteria or []), tap])
        arguments = (state_of_thread(input_ids.device), self.generate, kwargs)
        thread = threading.Thread(target=tap.run, args=arguments, daemon=True)
        thread.start()
        try:
            yield from tap
        finally:
            tap.stopped = True
            if thread is not threading.current_thread():  # the garbage collector may come by there
                thread.join()

    def _begin(self, tokenizer, query: str, history, stop, options: dict[str, Any]):
        """How to read the answer, and the arguments of `generate`, for one round of chat."""
        for name in ("max_length", "max_new_tokens", "num_beams"):
            value = options.get(name)
            if value is None:
                continue
            if isinstance(value, str) or int(value) != value:
                raise ValueError(f"{name} = {value!r} ({type(value).__name__}): give a whole number")
            options[name] = int(value)
        if options["max_length"] is None or options.get("max_new_tokens") is not None:
            del options["max_length"]
        prompt = torch.tensor([tokenizer.build_chat_input_ids(query, history)], device=embedding_device(self))
        if prompt.shape[1] >= options.get("max_length", math.inf):
            raise ValueError(
                f"the prompt has {prompt.shape[1]} tokens and max_length is {options['max_length']}: no room is left "
                "for an answer; leave out the oldest rounds of the history, shorten the query, or raise max_length"
            )
        if options["do_sample"]:
            own = chosen_setting(self, (), options, "top_k")
            options["top_k"] = 50 if own is None else own  # as in the transformers that the original ran on
        else:  # generate would warn that they have no effect
            options = {name: value for name, value in options.items() if name not in ("top_p", "temperature", "top_k")}
        answer = Answer(tokenizer, prompt.shape[1], self.process_response, stop)
        options.update(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        options["logits_processor"] = LogitsProcessorList([*(options["logits_processor"] or []), FiniteScores()])
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), answer])
        return answer, options
