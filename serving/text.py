"""The text of a growing answer: what of it may be shown, and its end before a stop text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character
# What the official clean-up of an answer may still change when more text comes: a mark that becomes full-width before
# a Chinese character, and the beginning of the placeholder of the training date.
UNSETTLED_MARKS = ",!:;?"
DATE_PLACEHOLDER = "[[训练时间]]"
BYTE = re.compile("<0x([0-9A-F]{2})>")


def held_back(text: str, words: Sequence[str]) -> str:
    """`text` without an end that may yet become one of the words."""
    starts = (word[:length] for word in words for length in range(1, len(word)))
    return text[: len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)]


def settled(text: str) -> str:
    return held_back(text, [DATE_PLACEHOLDER]).rstrip(UNSETTLED_MARKS)


class Decoded:
    """`decode` of ids to which more are added, in the time that the new ones take.

    The text so far ends with a whole character at `read`; what comes next is told apart by decoding it behind the
    tokens from `start` to there, which print more than blanks, since those at the beginning of a text are not printed.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.text = decode, ""
        self.start, self.read = 0, 0

    def __call__(self, ids: list[int]) -> str:
        known = self.decode(ids[self.start : self.read])
        new = self.decode(ids[self.start :])[len(known) :]
        if new.strip() and not new.endswith(UNFINISHED):
            self.text, self.start, self.read = self.text + new, self.read, len(ids)
            return self.text
        return self.text + new


class AnswerText:
    """`ready` is what later tokens cannot change, so it only grows; after the last token it is the whole text.

    Args:
        decode: ids -> text.
        clean: the official clean-up, `model.process_response`; None for the text as it was decoded.
        stop: texts that end the answer, which is cut before them, looked for in what is shown, as `chat` does.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        clean: Callable[[str], str] | None = None,
        stop: Sequence[str] = (),
    ):
        self.decode, self.clean, self.stop = Decoded(decode), clean, list(stop)
        self.ready = ""

    def update(self, ids: list[int], finished: bool) -> bool:
        """Takes all ids of the answer so far; returns whether a stop text was found in their text."""
        raw = self.decode(ids)
        raw = raw if finished else raw.rstrip(UNFINISHED)
        if self.clean is None:
            text = searched = raw
        else:
            text = self.clean(raw)
            blanks = raw[len(raw.rstrip()) :] if text else ""  # not shown yet, but they may be in a stop text
            searched = text + blanks if finished else settled(text + blanks)
        ends = [searched.find(word) for word in self.stop if word in searched]
        if ends:
            self._show(text[: min(ends)])
        elif finished:
            self.ready = text
        else:
            self._show(held_back(text if self.clean is None else settled(text), self.stop))
        return bool(ends)

    def _show(self, text: str) -> None:
        self.ready = text if self.clean is None else text.rstrip()


def token_bytes(tokenizer, vocab_size: int) -> list[bytes]:
    """What `decode` prints for each id inside a text; b"" for control tokens, <unk> and rows without a piece."""
    sp, white = tokenizer.sp, {"<n>": b"\n", "<|tab|>": b"\t"}
    found = []
    for index in range(vocab_size):
        piece = index - tokenizer.num_image_tokens
        if not 0 <= piece < sp.get_piece_size() or sp.is_control(piece) or sp.is_unknown(piece):
            found.append(b"")
            continue
        text = sp.id_to_piece(piece)
        if byte := BYTE.fullmatch(text):
            found.append(bytes.fromhex(byte[1]))
        elif text.startswith("<|blank_"):
            found.append(b" " * int(text[len("<|blank_") : -len("|>")]))
        else:
            found.append(white.get(text) or text.replace("\u2581", " ").encode())
    return found
