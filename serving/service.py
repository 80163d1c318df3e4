"""From requests to works of the batch: tokenizer, limits, grammars, and the event loop that hears what they tell."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from .batching import Batch, Embedding, End, Event, Generation
from .errors import ApiError, as_api_error
from .grammar import json_grammars
from .metrics import Metrics
from .replies import Choice, Reply
from .sampling import Sampling
from .scheduler import Scheduler
from .schemas import ChatRequest, CompletionRequest, EmbeddingRequest, Limits, Sampled
from .text import AnswerText, token_bytes
from .warming import warm_up


class Settings(NamedTuple):
    """name: the model's, to clients; kept_bytes: room for the keys of prompts that may be asked again; places: rows
    times the tokens of the longest, at most."""

    name: str = "chatglm-6b-slim"
    slots: int = 16
    queue: int = 64
    places: int = 1 << 14
    kept_bytes: int = 1 << 28
    limits: Limits = Limits()


class Service:
    """One model, its batch in one thread, and one more thread for tokenizing and for grammars."""

    def __init__(self, tokenizer, model, settings: Settings = Settings()):  # noqa: B008
        self.tokenizer, self.model, self.settings, self.limits = tokenizer, model, settings, settings.limits
        self.batch = Batch(model, settings.slots, settings.places, settings.kept_bytes)
        self.scheduler = Scheduler(self.batch, settings.queue)
        self.metrics = Metrics(self.scheduler)
        self.bytes_of = token_bytes(tokenizer, model.config.vocab_size)
        self.workers = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def warm_up(self) -> None:
        """Before the first request, so that none waits for what is done once; raises what the model raises."""
        warm_up(self.model, self.settings.slots, self.ids_of_text("你好", "prompt"))

    def start(self) -> None:
        self.scheduler.start()

    def close(self, seconds: float = 0.0) -> None:
        """Gives what is running so many seconds, ends the rest, and returns when the threads have ended."""
        self.scheduler.close(seconds)
        self.workers.shutdown(cancel_futures=True)

    @functools.cached_property
    def grammars(self) -> Callable:
        return json_grammars(self.tokenizer, self.model.config.vocab_size)

    async def aside(self, function: Callable, *arguments):
        """Runs in the other thread what would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, function, *arguments)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            message = f"the model {name!r} is not served here; {self.settings.name!r} is"
            raise ApiError(404, message, "model", "model_not_found")

    async def chat(self, request: ChatRequest, max_length: int | None = None) -> Reply:
        """The answers to a conversation."""
        self.check_model(request.model)
        ids = await self.aside(self.ids_of_chat, [message.as_turn for message in request.messages])
        schema = None if request.response_format is None else request.response_format.schema_to_follow
        grammar = None if schema is None else await self.aside(lambda: self.grammars(schema))
        asked = request.max_completion_tokens or request.max_tokens
        tokens = self.answer_tokens(len(ids), asked, "messages", max_length)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        works = []
        for index in range(request.n):
            options = {"grammar": None if grammar is None else grammar()}
            works.append((ids, tokens, request.sampling(index, logprobs), options))
        clean = self.model.process_response if schema is None else None
        return self.submit(works, clean, request, prompt_tokens=len(ids))

    async def complete(self, request: CompletionRequest) -> Reply:
        """What the model writes after texts, which it was only trained to do as an answer to them."""
        self.check_model(request.model)
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        works, total = [], 0
        for prompt in prompts:
            ids = await self.aside(self.ids_of_text, prompt, "prompt")
            tokens = self.answer_tokens(len(ids), request.max_tokens, "prompt")
            total += len(ids)
            for index in range(request.n):
                works.append((ids, tokens, request.sampling(index, request.logprobs), {}))
        return self.submit(works, None, request, prompt_tokens=total)

    async def embed(self, request: EmbeddingRequest) -> tuple[list[Tensor], int]:
        """A vector [hidden] for each text, and the tokens of all."""
        self.check_model(request.model)
        size = self.model.config.hidden_size
        if request.dimensions not in (None, size):
            raise ApiError(400, f"dimensions = {request.dimensions}: this model's are {size}", "dimensions")
        texts = [request.input] if isinstance(request.input, str) else request.input
        prompts = [await self.aside(self.ids_of_text, text, "input") for text in texts]
        for ids in prompts:
            self.answer_tokens(len(ids), None, "input")
        vectors = [Vector() for _ in prompts]
        works = [Embedding(ids, self.in_loop(vector.hear)) for ids, vector in zip(prompts, vectors)]
        self.scheduler.submit(works)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        try:
            return await asyncio.gather(*(vector.made for vector in vectors)), sum(map(len, prompts))
        finally:
            self.scheduler.cancel(works)

    # ---- ids --------------------------------------------------------------------------------------------------------

    def ids_of_chat(self, turns: list[dict[str, str]]) -> list[int]:
        """Nothing in the texts becomes a control token."""
        *history, last = turns
        if last["role"] != "user":
            raise ApiError(400, f"the last message has the role {last['role']!r}: it must be the user's", "messages")
        try:
            return self.tokenizer.build_chat_input_ids(last["content"], history)
        except ValueError as error:
            raise ApiError(400, str(error)[:500], "messages") from error

    def ids_of_text(self, text: str, param: str) -> list[int]:
        if not text:
            raise ApiError(400, f"{param}: the text is empty", param)
        try:
            return self.tokenizer.build_inputs_with_special_tokens(self.tokenizer.encode_text(text))
        except ValueError as error:
            raise ApiError(400, str(error)[:500], param) from error

    def answer_tokens(self, prompt: int, asked: int | None, param: str, max_length: int | None = None) -> int:
        """How many tokens the answer may have; ApiError where that is none, or fewer than asked for."""
        length = self.limits.length if max_length is None else max_length
        if length > self.limits.length:
            raise ApiError(400, f"max_length = {length}: at most {self.limits.length} are served", "max_length")
        room = length - prompt
        if room < 1 or (asked or 0) > room:
            more = f" and max_tokens asks for {asked} more" if asked else ""
            message = f"{param} has {prompt} tokens{more}: prompt and answer may have {length} together"
            raise ApiError(400, message, param, "context_length_exceeded")
        return room if asked is None else asked

    # ---- works ------------------------------------------------------------------------------------------------------

    def in_loop(self, hear: Callable[[Event], None]) -> Callable[[Event], None]:
        """`hear` as the batch's thread may call it."""
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(hear, event)

        return tell

    def submit(
        self,
        works: Sequence[tuple[list[int], int, Sampling, dict]],
        clean: Callable[[str], str] | None,
        request: Sampled,
        prompt_tokens: int,
    ) -> Reply:
        """Queues (ids, tokens of the answer, sampling, options) as the choices of a reply."""
        reply = Reply(self.scheduler.cancel, self.metrics)
        decode = self.tokenizer.decode if clean else self.decode_as_it_is
        for index, (ids, tokens, sampling, options) in enumerate(works):
            choice = Choice(index, AnswerText(decode, clean, request.stops), self.batch.end_ids, reply.note)
            reply.choices.append(choice)
            reply.works.append(Generation(ids, self.in_loop(choice.hear), tokens, sampling, **options))
        self.scheduler.submit(reply.works)
        reply.prompt_tokens = prompt_tokens
        self.metrics.prompt_tokens.inc(prompt_tokens)
        return reply

    def decode_as_it_is(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def text_of(self, token: int) -> str:
        return self.bytes_of[token].decode(errors="replace")


class Vector:
    """Hears what comes of an Embedding."""

    def __init__(self):
        self.made: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()

    def hear(self, event: Tensor | End) -> None:
        if self.made.done():
            return
        if isinstance(event, Tensor):
            self.made.set_result(event)
        elif event.error is not None:
            self.made.set_exception(as_api_error(event.error))
        else:
            self.made.cancel()
