"""A smaller SentencePiece model for one corpus or some languages: which pieces stay, and what that costs.

Why kept text encodes as before: SentencePiece takes the segmentation with the highest sum of scores. Removing pieces
only removes other segmentations; the one new thing they can leave behind is an unknown character, which scores 10
below the lowest piece, so below the character's own removed piece. Hence the lowest and the highest piece always stay.
Whatever lost its piece is spelled by smaller ones or by bytes, so every text still comes back from its ids.
"""

from __future__ import annotations

import struct
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from package import package_module
from sentencepiece_file import VOCAB_FILE

# Scripts by the first word of their characters' Unicode names; a piece without letters belongs to every language.
SCRIPTS = {
    "zh": {"CJK", "IDEOGRAPHIC", "BOPOMOFO"},
    "ja": {"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"},
    "ko": {"HANGUL"},
    "ru": {"CYRILLIC"},
    "el": {"GREEK"},
    "ar": {"ARABIC"},
    "he": {"HEBREW"},
    "hi": {"DEVANAGARI"},
    "th": {"THAI"},
    "en": {"ASCII"},
    **{
        language: {"ASCII", "LATIN"} for language in ("de", "es", "fr", "it", "la", "nl", "pl", "pt", "sv", "tr", "vi")
    },
}


# ------------------------------------------------------------------------------------------- pieces in the file

NORMAL = 1  # the type of a piece that is neither control, user-defined, unknown nor a byte


class Piece(NamedTuple):
    """A piece, and where its entry stands in the file."""

    text: str
    score: float
    type: int
    start: int
    end: int


def read_pieces(model: bytes) -> Iterator[Piece]:
    """The pieces of a SentencePiece model that SentencePiece has read, in the order of their ids."""
    for number, message, start, end in fields(model):
        if number == 1:
            found = {2: bytes(4), 3: bytes((NORMAL,)), **{key: content for key, content, *_ in fields(message)}}
            yield Piece(found[1].decode(), struct.unpack("<f", found[2])[0], found[3][0], start, end)


def fields(message: bytes) -> Iterator[tuple[int, bytes, int, int]]:
    """(number, content, start, end) of each field of a protobuf message; a number's content is its bytes."""
    start = 0
    while start < len(message):
        key, position = read_varint(message, start)
        if key & 7 == 2:
            length, position = read_varint(message, position)
        elif key & 7 == 0:
            length = read_varint(message, position)[1] - position
        elif key & 7 in (1, 5):
            length = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"{VOCAB_FILE} has a field of kind {key & 7}, which none of ours has")
        yield key >> 3, message[position : position + length], start, position + length
        start = position + length


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """The base-128 number at `start`, and the index after it."""
    value = shift = 0
    while data[start] > 127:
        value, shift, start = value | (data[start] & 127) << shift, shift + 7, start + 1
    return value | data[start] << shift, start + 1


def with_pieces(model: bytes, kept: Iterable[int]) -> bytes:
    """The model with only the pieces `kept`, in their old order; everything else in it stays."""
    kept, parts, position = set(kept), [], 0
    for index, piece in enumerate(read_pieces(model)):
        if index not in kept:
            parts.append(model[position : piece.start])
            position = piece.end
    return b"".join((*parts, model[position:]))


# ----------------------------------------------------------------------------------------------------- which stay


def always_kept(pieces: Sequence[Piece]) -> set[int]:
    """Specials, bytes, blanks, tab, newline; digits and other ASCII characters; "▁"; the lowest and highest score."""
    normal = [index for index, piece in enumerate(pieces) if piece.type == NORMAL]
    kept = {index for index, piece in enumerate(pieces) if piece.type != NORMAL}
    kept.update(index for index in normal if len(pieces[index].text) == 1 and pieces[index].text.isascii())
    kept.update(index for index in normal if pieces[index].text == "▁" or pieces[index].text.isdigit())
    kept.add(min(normal, key=lambda index: pieces[index].score))
    kept.add(max(normal, key=lambda index: pieces[index].score))
    return kept


def of_languages(pieces: Sequence[Piece], languages: Sequence[str]) -> set[int]:
    """Pieces whose letters all belong to the scripts of `languages`, and pieces without letters.

    Raises:
        ValueError: an unknown language.
    """
    unknown = sorted(set(languages) - set(SCRIPTS))
    if unknown:
        raise ValueError(f"unknown language {', '.join(unknown)}: known are {', '.join(sorted(SCRIPTS))}")
    scripts = set().union(*(SCRIPTS[language] for language in languages))
    return {index for index, piece in enumerate(pieces) if all(belongs(c, scripts) for c in piece.text)}


def belongs(character: str, scripts: set[str]) -> bool:
    if not unicodedata.category(character).startswith(("L", "M")):  # letters and the marks on them
        return True
    script = "ASCII" if character.isascii() else unicodedata.name(character, "?").split()[0]
    return script in scripts


def of_corpus(model: bytes, corpus: Path, min_count: int) -> set[int]:
    """Pieces that the lines of `corpus` use at least `min_count` times, at the start of a text or after a newline."""
    counts: Counter[int] = Counter()
    tokenizer = tokenizer_of(model)
    for line in lines_of(corpus):
        counts.update(tokenizer.encode_text(line))
        counts.update(tokenizer.encode_text("\n" + line))
    return {index for index, count in counts.items() if count >= min_count}


def of_conversations(model: bytes) -> set[int]:
    """Pieces of the frame that `chat` writes around every round."""
    tokenizer = tokenizer_of(model)
    return set(tokenizer.encode_text(tokenizer.build_prompt("", [("", "")] * 11)))


def kept_pieces(model: bytes, corpus: Path | None, languages: Sequence[str], min_count: int = 1) -> list[int]:
    """The ids, in order, of the pieces that stay for a corpus, for languages, or for both.

    Args:
        model: a complete `ice_text.model`.
        corpus: a UTF-8 text file; its pieces stay.
        languages: codes of `SCRIPTS`; all pieces in their scripts stay.
        min_count: how often the corpus must use a piece.
    """
    pieces = list(read_pieces(model))
    kept = always_kept(pieces) | of_conversations(model)
    if languages:
        kept |= of_languages(pieces, languages)
    if corpus is not None:
        kept |= of_corpus(model, corpus, min_count)
    return sorted(kept)


# ---------------------------------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class CorpusFigures:
    """How a corpus is spelled before and after: tokens whose piece stayed, and tokens per character."""

    characters: int
    tokens_before: int
    tokens_after: int
    tokens_kept: int

    @property
    def coverage(self) -> float:
        return self.tokens_kept / max(self.tokens_before, 1)

    def __str__(self) -> str:
        before, after = (count / max(self.characters, 1) for count in (self.tokens_before, self.tokens_after))
        return (
            f"corpus of {self.characters:,} characters: {self.coverage:.2%} of its tokens keep their piece, "
            f"tokens per character {before:.4f} -> {after:.4f}"
        )


def corpus_figures(model: bytes, trimmed: bytes, kept: Sequence[int], corpus: Path) -> CorpusFigures:
    before, after, kept_set = tokenizer_of(model), tokenizer_of(trimmed), set(kept)
    characters = tokens_before = tokens_after = tokens_kept = 0
    for line in lines_of(corpus):
        ids = before.encode_text(line)
        characters += len(line)
        tokens_before += len(ids)
        tokens_kept += sum(index in kept_set for index in ids)
        tokens_after += len(after.encode_text(line))
    return CorpusFigures(characters, tokens_before, tokens_after, tokens_kept)


def lines_of(corpus: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; empty ones are skipped."""
    with open(corpus, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line := line.rstrip("\r\n"):
                yield line


@lru_cache(maxsize=2)  # the whole one and the trimmed one: the real file takes a second to load
def tokenizer_of(model: bytes) -> Any:
    """The tokenizer over a SentencePiece model in memory; ids are piece numbers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VOCAB_FILE
        path.write_bytes(model)
        return package_module("tokenization_chatglm").ChatGLMTokenizer(str(path), num_image_tokens=0)
