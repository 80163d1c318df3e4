"""The file `ice_text.model`: reading it, and completing the first release's, which lacks the last 344 pieces.

It is a protobuf message (sentencepiece_model.proto), which SentencePiece reads and judges. Two such messages in a row
are one: lists go on, single values are replaced. So what is lacking is appended.
"""

from __future__ import annotations

import os
from pathlib import Path

import sentencepiece as spm

VOCAB_FILE = "ice_text.model"
MOST_BYTES = 1 << 23  # the real file has 2.7 million
CURE = f"expected the {VOCAB_FILE} of ChatGLM-6B (2.7 MB, not a git-lfs pointer): download it again."

NEWLINE, TAB = "<n>", "<|tab|>"
BLANKS = {" " * count: f"<|blank_{count}|>" for count in range(2, 81)}
BASE_PIECES = ["<unk>", "<s>", "</s>", "<pad>", NEWLINE]  # ids 0..4 of every ice_text.model
CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
NORMALIZER = b"nmt_nfkc"  # its name stands behind all pieces and settings

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # types of pieces
LATER_PIECES = (  # what the first release lacks, in order
    *((piece, CONTROL) for piece in CONTROL_PIECES),
    *((piece, USER_DEFINED) for piece in (TAB, *BLANKS.values())),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
)


def _entry(piece: str, kind: int) -> bytes:
    """A message's field 1, which has for fields the text 1, the score 2 (0.0) and the type 3 of a piece."""
    content = bytes((1 << 3 | 2, len(piece))) + piece.encode() + bytes((2 << 3 | 5, 0, 0, 0, 0, 3 << 3, kind))
    return bytes((1 << 3 | 2, len(content))) + content


EXTENSION = b"".join(_entry(*piece) for piece in LATER_PIECES)
BYTE_FALLBACK = b"\x12\x03\x98\x02\x01"  # field 2, the settings of the training: its field 35, byte_fallback, is true


def complete_processor(model: bytes) -> tuple[spm.SentencePieceProcessor, bool]:
    """The processor of the final `ice_text.model`, and whether `model` is that already, not the first release's.

    The processor of the published first-release file, serialized, is the published final file, byte for byte.

    Raises:
        ValueError: `model` is no SentencePiece model of this family, is cut off, or has a part of the 344 pieces.
    """
    complete = EXTENSION in model
    try:
        processor = spm.SentencePieceProcessor(model_proto=model)
        first = [processor.id_to_piece(index) for index in range(min(len(BASE_PIECES), processor.get_piece_size()))]
        if first == BASE_PIECES and not complete:  # pieces that are there already are refused
            processor = spm.SentencePieceProcessor(model_proto=model + EXTENSION + BYTE_FALLBACK)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{len(model):,} bytes, damaged or no SentencePiece model; {CURE} ({error})") from error
    if first != BASE_PIECES:
        raise ValueError(f"A SentencePiece model that begins with {first}, not with {BASE_PIECES}; {CURE}")
    if NORMALIZER not in model:
        raise ValueError(f"A SentencePiece model that is cut off: its end, {NORMALIZER.decode()}, is missing; {CURE}")
    return processor, complete


def read_complete(path: str | os.PathLike) -> tuple[spm.SentencePieceProcessor, bool]:
    """`complete_processor` of a file.

    Raises:
        ValueError: as there, or no such file, or one too large to be read.
    """
    if not os.path.isfile(path):
        raise ValueError(
            f"No {VOCAB_FILE} at {path}: make a complete folder with "
            "`python slim.py THUDM/chatglm-6b OUT --repackage`, or download that file from the Hub into the folder."
        )
    if os.path.getsize(path) > MOST_BYTES:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes, more than {MOST_BYTES:,}: {CURE}")
    try:
        return complete_processor(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
