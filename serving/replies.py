"""What the batch's thread tells, in the event loop of the server: answers that grow, whoever reads them how fast."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from .batching import End, Event, Work
from .errors import as_api_error
from .sampling import Token
from .text import AnswerText

PING_SECONDS = 15.0


class Piece(NamedTuple):
    """What is new of one choice; nothing for a sign of life."""

    choice: Choice | None = None
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


class Choice:
    """One answer. Its text grows as the tokens come, not as they are read, so that a stop text ends it at once."""

    def __init__(self, index: int, text: AnswerText, end_ids: set[int], changed: Callable[[Choice], None]):
        self.index, self.text, self.end_ids, self.changed = index, text, end_ids, changed
        self.tokens: list[Token] = []
        self.ids: list[int] = []  # without the end token
        self.finish: str | None = None
        self.error: Exception | None = None
        self.sent, self.tokens_sent, self.finish_sent = 0, 0, False

    def hear(self, event: Event) -> None:
        if self.finish is not None:
            return
        if isinstance(event, Token):
            self.tokens.append(event)
            if event.id not in self.end_ids:
                self.ids.append(event.id)
                self.finish = "stop" if self.text.update(self.ids, finished=False) else None
        elif isinstance(event, End):
            self.error = event.error
            stopped = event.error is None and self.text.update(self.ids, finished=True)
            self.finish = "stop" if stopped else event.reason
        self.changed(self)

    def news(self) -> Piece | None:
        text, tokens = self.text.ready[self.sent :], tuple(self.tokens[self.tokens_sent :])
        finish = None if self.finish_sent else self.finish
        if not (text or finish):
            return None
        self.sent, self.tokens_sent = self.sent + len(text), len(self.tokens)
        self.finish_sent = finish is not None
        return Piece(self, text, tokens, finish)


class Reply:
    """The choices of one request. `works` are set by who submits them; `cancel` gives their rows back."""

    def __init__(self, cancel: Callable[[list[Work]], None], metrics):
        self.choices: list[Choice] = []
        self.works: list[Work] = []
        self.prompt_tokens = 0
        self._cancel, self.metrics = cancel, metrics
        self.changed, self.began = asyncio.Event(), time.monotonic()

    def note(self, choice: Choice) -> None:
        """After each event of a choice."""
        seconds = time.monotonic() - self.began
        if len(choice.tokens) == 1 and choice.finish is None:
            self.metrics.first_token.observe(seconds)
        if choice.finish is not None:
            self.metrics.answer.observe(seconds)
            self.metrics.answer_tokens.inc(len(choice.tokens))
            self.metrics.ended.labels(choice.finish).inc()
            self._cancel([self.works[choice.index]])  # a stop text ends the answer before its row knows
        self.changed.set()

    def cancel(self) -> None:
        self._cancel(self.works)

    async def finished(self) -> list[Choice]:
        """All choices with their whole texts; an ApiError for what ended one of them."""
        async for _ in self.pieces():
            pass
        return self.choices

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is new, until all choices have finished; an ApiError for what ended one of them."""
        while True:
            self.changed.clear()
            for choice in self.choices:
                if choice.error is not None:
                    raise as_api_error(choice.error)
                piece = choice.news()
                if piece is not None:
                    yield piece
            if all(choice.finish_sent for choice in self.choices):
                return
            try:
                await asyncio.wait_for(self.changed.wait(), PING_SECONDS)
            except asyncio.TimeoutError:
                yield Piece()

    @property
    def usage(self) -> dict[str, int]:
        answers = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answers,
            "total_tokens": self.prompt_tokens + answers,
        }
