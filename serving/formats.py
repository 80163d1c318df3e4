"""Replies in the shapes of OpenAI's API, whole and in pieces."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import AsyncIterator

from .replies import Choice, Piece, Reply
from .sampling import Token
from .schemas import ChatRequest, Sampled
from .service import Service


class Format:
    prefix, kind, kind_of_chunk = "", "", ""

    def __init__(self, service: Service, asked: Sampled):
        self.service, self.asked = service, asked
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        version = getattr(sys.modules[type(service.model.config).__module__], "CODE_VERSION", "1")
        self.tail = {"model": service.settings.name, "system_fingerprint": f"chatglm-slim-{version}"}

    def whole(self, reply: Reply) -> dict:
        choices = [self.whole_choice(choice) for choice in reply.choices]
        return {**self.head, "object": self.kind, **self.tail, "choices": choices, "usage": reply.usage}

    async def chunks(self, reply: Reply) -> AsyncIterator[dict | None]:
        options = self.asked.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        head = {**self.head, "object": self.kind_of_chunk, **self.tail, **usage}
        for choice in reply.choices:
            if (first := self.first_piece(choice)) is not None:
                yield {**head, "choices": [first]}
        async for piece in reply.pieces():
            yield None if piece.choice is None else {**head, "choices": [self.piece(piece)]}
        if usage:
            yield {**head, "choices": [], "usage": reply.usage}

    def first_piece(self, choice: Choice) -> dict | None:
        return None

    def shown(self, tokens) -> list[Token]:
        """Without the end token, which is no text."""
        return [token for token in tokens if token.id not in self.service.batch.end_ids]


class ChatFormat(Format):
    prefix, kind, kind_of_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    asked: ChatRequest

    def whole_choice(self, choice: Choice) -> dict:
        message = {"role": "assistant", "content": choice.text.ready, "refusal": None}
        logprobs = self.logprobs(choice.tokens)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def first_piece(self, choice: Choice) -> dict:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, piece: Piece) -> dict:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self.logprobs(piece.tokens)
        return {"index": piece.choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def logprobs(self, tokens) -> dict | None:
        if not self.asked.logprobs:
            return None
        content = []
        for token in self.shown(tokens):
            top = [self.logprob(*pair) for pair in token.top]
            content.append({**self.logprob(token.id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def logprob(self, index: int, value: float) -> dict:
        as_bytes = self.service.bytes_of[index]
        return {"token": as_bytes.decode(errors="replace"), "logprob": value, "bytes": list(as_bytes)}


class CompletionFormat(Format):
    prefix, kind, kind_of_chunk = "cmpl", "text_completion", "text_completion"

    def whole_choice(self, choice: Choice) -> dict:
        return self.choice(choice.index, choice.text.ready, choice.tokens, choice.finish, 0)

    def piece(self, piece: Piece) -> dict:
        offset = piece.choice.sent - len(piece.text)
        return self.choice(piece.choice.index, piece.text, piece.tokens, piece.finish, offset)

    def choice(self, index: int, text: str, tokens, finish: str | None, offset: int) -> dict:
        logprobs = None if self.asked.logprobs is None else self.logprobs(tokens, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, tokens, offset: int) -> dict:
        tokens, text_of = self.shown(tokens), self.service.text_of
        texts, offsets = [text_of(token.id) for token in tokens], []
        blank = offset == 0  # SentencePiece's before a text, which is no part of it
        for text in texts:
            offsets.append(offset)
            offset += len(text) - (blank and text.startswith(" "))
            blank = False
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text_of(index): value for index, value in token.top} for token in tokens],
            "text_offset": offsets,
        }
