"""The file `ice_text.model` without a protobuf package: what it holds, and how the first release's is completed.

It is one protobuf message (sentencepiece_model.proto): a field 1 for each piece (text 1, score 2, type 3), a field 2
with the settings of its training, more for the spelling of its input. No other module knows that. The file of the
first release lacks the last 344 pieces, which its code added in memory.

Files are read before they are trusted: sizes are judged first, and all that is wrong with one is a ValueError.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

VOCAB_FILE = "ice_text.model"
MOST_BYTES = 1 << 23  # the real file has 2.7 million
CURE = f"expected the {VOCAB_FILE} of ChatGLM-6B (2.7 MB, not a git-lfs pointer): download it again."

NEWLINE, TAB = "<n>", "<|tab|>"
BLANKS = {" " * count: f"<|blank_{count}|>" for count in range(2, 81)}
BASE_PIECES = ("<unk>", "<s>", "</s>", "<pad>", NEWLINE)  # ids 0..4 of every ice_text.model
CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")

PIECES, TRAINER = 1, 2  # fields of the file
TEXT, SCORE, TYPE = 1, 2, 3  # fields of a piece
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # types
BYTE_FALLBACK = 35  # a field of the trainer's settings
EXTENSION = (  # what the first release lacks, in order
    *((piece, CONTROL) for piece in CONTROL_PIECES),
    *((piece, USER_DEFINED) for piece in (TAB, *BLANKS.values())),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
)


class Piece(NamedTuple):
    """A piece, and where its entry stands in the file."""

    text: str
    score: float
    type: int
    start: int
    end: int


def _damaged(what: str) -> ValueError:
    return ValueError(f"A SentencePiece model that is cut off or damaged ({what}); {CURE}")


def _read_varint(data: bytes, start: int) -> tuple[int, int]:
    """The base-128 number at `start` and the index after it; ten bytes hold the longest one, of 64 bits."""
    if start < len(data) and data[start] < 128:  # nearly all of them
        return data[start], start + 1
    value = 0
    for count, byte in enumerate(data[start : start + 10]):
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value, start + count + 1
    raise _damaged("a number without an end")


def _varint(value: int) -> bytes:
    return bytes((value,)) if value < 128 else bytes((value & 127 | 128,)) + _varint(value >> 7)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, int, int]]:
    """(number, content, start, end) of each field of a message; the content of a number is its bytes as they stand."""
    start = 0
    while start < len(message):
        key, position = _read_varint(message, start)
        kind = key & 7
        if kind not in (0, 1, 2, 5):
            raise _damaged(f"a field of kind {kind}")
        length = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            length, position = _read_varint(message, position)
        elif kind == 0:
            length = _read_varint(message, position)[1] - position
        end = position + length
        if end > len(message):
            raise _damaged(f"{length:,} bytes at {position:,} of {len(message):,}")
        yield key >> 3, message[position:end], start, end
        start = end


def read_pieces(model: bytes) -> Iterator[Piece]:
    """The pieces of a SentencePiece model, in the order of their ids.

    Raises:
        ValueError: the model is cut off or damaged.
    """
    for number, message, start, end in _fields(model):
        if number == PIECES:
            found = {TEXT: b"", SCORE: bytes(4), TYPE: bytes((NORMAL,))}
            found.update((key, content) for key, content, *_ in _fields(message))
            try:
                text, (score,) = found[TEXT].decode(), struct.unpack("<f", found[SCORE])
            except (UnicodeDecodeError, struct.error) as error:
                raise _damaged(str(error)) from error
            yield Piece(text, score, _read_varint(found[TYPE], 0)[0], start, end)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _entry(piece: str, kind: int) -> bytes:
    score = bytes((SCORE << 3 | 5, 0, 0, 0, 0))
    return _field(PIECES, _field(TEXT, piece.encode()) + score + bytes((TYPE << 3, kind)))


def _with_byte_fallback(trainer: bytes) -> bytes:
    """The trainer's settings with `byte_fallback` on, at its place in the order of field numbers."""
    cut = next((start for number, _, start, _ in _fields(trainer) if number > BYTE_FALLBACK), len(trainer))
    return trainer[:cut] + _varint(BYTE_FALLBACK << 3) + b"\1" + trainer[cut:]


def complete_sentencepiece(model: bytes) -> bytes:
    """The final `ice_text.model` made from the one of the first release; a final one comes back as it is.

    Appends the 344 pieces that early code added in memory (8 control, tab, 79 runs of blanks, 256 bytes) and
    switches `byte_fallback` on. Completing the published first-release file gives the published final file, byte
    for byte.

    Raises:
        ValueError: `model` is no SentencePiece model of this family, or has only a part of the 344 pieces.
    """
    try:
        first = [piece.text for _, piece in zip(BASE_PIECES, read_pieces(model))]
    except ValueError as error:
        raise ValueError(f"{len(model):,} bytes that are no SentencePiece model; {CURE}") from error
    if tuple(first) != BASE_PIECES:
        raise ValueError(f"A SentencePiece model that begins with {first}, not with {list(BASE_PIECES)}; {CURE}")
    extension, added = b"".join(_entry(*piece) for piece in EXTENSION), {piece for piece, _ in EXTENSION}
    _, found, rest = model.partition(extension)
    known = sum(piece.text in added for piece in read_pieces(rest if found else model))
    trainers = [one for number, *one in _fields(rest if found else model) if number == TRAINER]
    if len(trainers) != 1:
        raise _damaged(f"the settings of {len(trainers)} trainings")
    if found:
        return model
    if known:
        raise ValueError(
            f"{known} of the {len(EXTENSION)} pieces that the first release lacked are there, and not all of them "
            f"as the final release has them; {CURE}"
        )
    trainer, start, end = trainers[0]
    return model[:start] + extension + _field(TRAINER, _with_byte_fallback(trainer)) + model[end:]


def read_complete(path: str | os.PathLike) -> tuple[bytes, bool]:
    """The model in a file, complete, and whether the file itself is.

    Raises:
        ValueError: as `complete_sentencepiece`, or a file too large to be read.
    """
    size = os.path.getsize(path)
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MOST_BYTES:,}: no vocabulary; {CURE}")
    model = Path(path).read_bytes()
    completed = complete_sentencepiece(model)
    return completed, completed == model
