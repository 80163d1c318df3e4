"""`tokenizer.json`, for programs in Rust and JavaScript: `ice_text.model` as the library tokenizers reads it.

It encodes as `tokenizer(text)` does: control tokens in a text are parsed, and `[gMASK] <sop>` follows. Python needs
none of it: AutoTokenizer goes on with SentencePiece. Both take the segmentation with the highest sum of scores,
SentencePiece in 32 bits over the whole text, tokenizers in 64. Where two sums are equal, or nearer than that rounding,
they may take different ones; docs/ecosystem.md says how often.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from sentencepiece_file import BLANKS, BYTE, CONTROL, NEWLINE, TAB
from slimming.trim_vocabulary import fields, read_pieces

FAST_FILE = "tokenizer.json"
UNKNOWN = 2  # the type of <unk>
PARSED = ("<sop>", "<eop>", "<unk>", "<pad>", "[MASK]")  # in a text, by the official encoding
WHITESPACE = {"\n": NEWLINE, "\t": TAB, **dict(sorted(BLANKS.items(), reverse=True))}  # the longest run first


def tokenizer_json(model: bytes, choices: Mapping[str, Any]) -> str:
    """The file for a complete `ice_text.model`; `choices`: the fields of tokenizer_config.json about texts."""
    pieces = list(read_pieces(model))
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(text, ids[text]) for text in PARSED],
        "normalizer": {"type": "Sequence", "normalizers": normalizers(model, choices)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers(pieces)},
        "post_processor": layout(ids),
        "decoder": {"type": "Sequence", "decoders": decoders()},
        "model": {
            "type": "Unigram",
            "unk_id": ids["<unk>"],
            "vocab": [[piece.text, piece.score] for piece in pieces],
            "byte_fallback": True,
        },
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def added_token(text: str, index: int) -> dict:
    kind = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": True}
    return {"id": index, "content": text, **kind}


def replaced(old: dict, new: str) -> dict:
    return {"type": "Replace", "pattern": old, "content": new}


def normalizers(model: bytes, choices: Mapping[str, Any]) -> list[dict]:
    """White space as pieces, SentencePiece's table of characters, no blank twice or at an end, "▁" for the rest."""
    settings = next(content for number, content, *_ in fields(model) if number == 3)
    table = next(content for number, content, *_ in fields(settings) if number == 2)
    return [
        *([replaced({"Regex": r"\s+"}, " ")] if choices.get("remove_space") else []),
        *([{"type": "Lowercase"}] if choices.get("do_lower_case") else []),
        *(replaced({"String": run}, piece) for run, piece in WHITESPACE.items()),
        *(replaced({"String": old}, new) for old, new in half_width()),
        {"type": "NFC"},
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()},
        replaced({"Regex": " {2,}"}, " "),
        replaced({"Regex": "^ | $"}, ""),
        replaced({"String": " "}, "▁"),
        {"type": "Prepend", "prepend": "▁"},
    ]


def half_width() -> Iterator[tuple[str, str]]:
    """Katakana of half width with a mark behind it: one character in SentencePiece's table, which tokenizers reads in
    clusters of 5 bytes at most. NFC joins what has a canonical form (and brings marks in another order into it)."""
    for pair in itertools.product(map(chr, range(0xFF66, 0xFF9E)), "ﾞﾟ"):
        joined = unicodedata.normalize("NFKC", "".join(pair))
        if len(joined) == 1:
            yield "".join(pair), joined


def pre_tokenizers(pieces: list) -> list[dict]:
    """Pieces for white space stand alone. Control tokens and bytes that somebody typed are cut before their last
    character, where no piece crosses, since the model of tokenizers would take them for what they name."""
    spelled = "|".join(map(re.escape, WHITESPACE.values()))
    reserved = [piece.text for piece in pieces if piece.type in (UNKNOWN, CONTROL, BYTE)]
    ends = sorted({text[-1] for text in reserved})
    cuts = []
    for end in ends:
        starts = "|".join(re.escape(text[:-1]) for text in reserved if text[-1] == end)
        cuts.append(f"(?<={starts})(?={re.escape(end)})")
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    return [{**split, "pattern": {"Regex": pattern}} for pattern in (spelled, *cuts)]


def layout(ids: dict[str, int]) -> dict:
    """`text [gMASK] <sop>`, and for a pair `text [gMASK] <sop> second <eop>`."""

    def token(text: str, type_id: int = 0) -> dict:
        return {"SpecialToken": {"id": text, "type_id": type_id}}

    single = [{"Sequence": {"id": "A", "type_id": 0}}, token("[gMASK]"), token("<sop>")]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, token("<eop>", 1)]
    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ("[gMASK]", "<sop>", "<eop>")}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def decoders() -> list[dict]:
    return [
        *(replaced({"String": piece}, run) for run, piece in WHITESPACE.items()),
        replaced({"String": "▁"}, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
