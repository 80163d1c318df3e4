"""Answers that are JSON, or JSON of a schema, by the masks of llguidance.

The library knows the vocabulary as bytes, so it is given what `decode` prints for each id. Free white space is off,
because blank and newline pieces would fill the answer, and so are raw control characters, which JSON forbids. A
number ends after as many digits as a double holds: a schema cannot say that, and a model may go on without end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import llguidance
import numpy as np
import torch
from torch import Tensor

from .text import token_bytes

STRICT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "lenient": False}
MAX_KEYS, MAX_DEPTH = 400, 40  # of a schema: time grows with the square of the keys, 0.1 s here
MAX_TEXT = 1 << 14  # characters of it as JSON: what must follow is tokenized at each token, 10 ms of everybody's
DIGITS = re.compile(rb"[0-9.]{17,}$")  # of a double


class GrammarError(ValueError):
    """A schema that cannot be followed."""


class Vocabulary:
    """What llguidance.TokenizerWrapper asks for."""

    bos_token_id = None

    def __init__(self, tokenizer, vocab_size: int):
        self.encode_text, self.eos_token_id = tokenizer.encode_text, tokenizer.eos_token_id
        self.tokens: list[bytes] = [
            b"" if len(one) == 1 and one < b" " else one for one in token_bytes(tokenizer, vocab_size)
        ]
        self.special_token_ids = [index for index, one in enumerate(self.tokens) if not one]
        starts = [one[:1] for one in self.tokens]
        self.is_digit = torch.tensor([bool(start) and start in b"0123456789" for start in starts])
        self.is_numeric = torch.tensor([bool(start) and start in b"0123456789.eE+-,]}" for start in starts])
        self.is_numeric[self.eos_token_id] = True
        self.newline = len(self.encode_text("\n"))  # with the blank that SentencePiece puts before a text

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text inside of another, so without the blank before it."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self.encode_text("\n" + text)[self.newline :]


class JsonGrammar:
    """One answer on its way."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: Vocabulary):
        self.matcher, self.vocabulary, self.tail = matcher, vocabulary, b""

    def mask(self, scores: Tensor) -> Tensor:
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        allowed = torch.from_numpy(bits).bool()[: len(self.vocabulary.tokens)]
        allowed = self._without_more_digits(allowed) if DIGITS.search(self.tail) else allowed
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))

    def _without_more_digits(self, allowed: Tensor) -> Tensor:
        """In a number, which is where nothing but the signs of numbers and what ends them may follow."""
        others = allowed & ~self.vocabulary.is_digit
        is_number = others.any() and not (allowed & ~self.vocabulary.is_numeric).any()
        return others if is_number else allowed

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)
        self.tail = (self.tail + self.vocabulary.tokens[token])[-32:]
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise GrammarError(f"the answer cannot follow the schema any further: {reason(self.matcher)}")


def reason(matcher: llguidance.LLMatcher) -> str:
    return matcher.get_error().partition("\n")[0][:300]


def check_size(schema, depth: int = 0) -> int:
    """The keys of a schema; GrammarError for too many, or for too many levels."""
    if depth > MAX_DEPTH:
        raise GrammarError(f"the schema has more than {MAX_DEPTH} levels")
    inner = list(schema.values()) if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    keys = len(inner) + sum(check_size(one, depth + 1) for one in inner)
    if keys > MAX_KEYS:
        raise GrammarError(f"the schema has more than {MAX_KEYS} keys and values")
    return keys


def json_grammars(tokenizer, vocab_size: int) -> Callable[[dict], Callable[[], JsonGrammar]]:
    """A function from a schema to a function that begins an answer.

    The first raises GrammarError for a schema that the library does not know, or that is too large.
    """
    ours = Vocabulary(tokenizer, vocab_size)
    theirs = llguidance.LLTokenizer(llguidance.TokenizerWrapper(ours), n_vocab=vocab_size)

    def compile(schema: dict) -> Callable[[], JsonGrammar]:
        check_size(schema)
        if (length := len(json.dumps(schema, ensure_ascii=False))) > MAX_TEXT:
            raise GrammarError(f"the schema has {length} characters as JSON: at most {MAX_TEXT} are taken")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=STRICT)
        except ValueError as error:
            raise GrammarError(f"the schema cannot be read: {error}") from error
        matcher = llguidance.LLMatcher(theirs, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the schema cannot be followed: {reason(matcher)}")
        return lambda: JsonGrammar(matcher.deep_copy(), ours)

    return compile
