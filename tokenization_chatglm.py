"""Text <-> token ids of ChatGLM-6B: a SentencePiece model behind transformers' `PreTrainedTokenizer`.

Unusual here, all of it fixed by the released checkpoints:
* newlines, tabs and runs of blanks are spelled as pieces of their own (`<n>`, `<|tab|>`, `<|blank_k|>`);
* a prompt ends with `[gMASK] <sop>`, a text with a blank to be filled has `[MASK]` there and ends with `<sop>`, and
  the model closes what it writes with `<eop>`;
* in the full vocabulary (150528 rows) 20000 image tokens come before the text pieces, in the slim one none do:
  `num_image_tokens` is that difference, and `_ids_of` / `_pieces_of` are the way across;
* the file of the first release lacks the last 344 pieces: `complete_sentencepiece` appends them.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Union

import sentencepiece as spm
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

logger = logging.getLogger(__name__)

VOCAB_FILE = "ice_text.model"
NUM_IMAGE_TOKENS = 20000  # rows of the full vocabulary that stand before the text pieces

NEWLINE, TAB = "<n>", "<|tab|>"
MAX_BLANKS = 80  # the longest run of blanks that is one piece
BLANKS = {" " * k: f"<|blank_{k}|>" for k in range(2, MAX_BLANKS + 1)}
WHITESPACE = {NEWLINE: "\n", TAB: "\t", **{piece: run for run, piece in BLANKS.items()}}
# in UTF-8, which is what SentencePiece takes and what is searched faster than Python's strings
SPELLED_BLANKS = {run.encode(): piece.encode() for run, piece in BLANKS.items()}
BLANK_RUN = re.compile(b"(  {1,%d})" % (MAX_BLANKS - 1))  # found three times as fast as " {2,80}"
IMAGE_PIECE = re.compile(r"<image_(\d+)>")
THREADED_BATCH = 64  # texts from which on SentencePiece's threads gain more than they cost
# options of an encoding that are left to transformers: how text is cut, and what else is told of each row
TEXT_OPTIONS = ("is_split_into_words", "sanitize_control_tokens")
ROW_OPTIONS = (
    "return_length",
    "return_offsets_mapping",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_token_type_ids",
)

# What the file of the first release lacks, in order, with SentencePiece's type numbers.
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
BASE_PIECES = ("<unk>", "<s>", "</s>", "<pad>", NEWLINE)  # ids 0..4 of every ice_text.model
CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
EXTENSION = (
    *((piece, CONTROL) for piece in CONTROL_PIECES),
    *((piece, USER_DEFINED) for piece in (TAB, *BLANKS.values())),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
)
PIECES_FIELD, TRAINER_FIELD, BYTE_FALLBACK_FIELD = 1, 2, 35  # numbers in sentencepiece_model.proto

History = Sequence[Union[tuple[str, str], dict[str, str]]]
OWN_NAMES = ("gmask_token", "end_token", "eop_token")  # in settings files of ChatGLM; the last in the first release's
TEMPLATE_MARK = "ChatGLMTokenizer.build_prompt"  # stands in chat_template.jinja: a template without it is the user's


# --------------------------------------------------------------------------------------------------------------
# The SentencePiece file
# --------------------------------------------------------------------------------------------------------------
def _read_varint(data: bytes, start: int) -> tuple[int, int]:
    """The base-128 number at `start` and the index after it."""
    value = shift = 0
    while True:
        byte = data[start]
        start, value, shift = start + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, start


def _varint(value: int) -> bytes:
    head = bytearray()
    while value > 127:
        head.append(value & 127 | 128)
        value >>= 7
    return bytes((*head, value))


def _fields(message: bytes) -> Iterator[tuple[int, bytes, int, int]]:
    """(number, content, start, end) of each field of a protobuf message; content is empty for plain numbers."""
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        content = b""
        kind = key & 7
        if kind == 0:
            _, position = _read_varint(message, position)
        elif kind == 2:
            length, position = _read_varint(message, position)
            content = message[position : position + length]
            position += length
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"field kind {kind}")
        if position > len(message):
            raise ValueError("cut off")
        yield key >> 3, content, start, position


def _length_delimited(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _piece_entries(pieces: Iterable[tuple[str, int]]) -> bytes:
    """Entries of a SentencePiece model: text, score 0.0, type."""
    score, kind_key = b"\x15" + bytes(4), b"\x18"
    messages = (_length_delimited(1, piece.encode()) + score + kind_key + _varint(kind) for piece, kind in pieces)
    return b"".join(_length_delimited(PIECES_FIELD, message) for message in messages)


def _with_byte_fallback(trainer: bytes) -> bytes:
    """The trainer settings with `byte_fallback` on, at its place in the order of field numbers."""
    flag = _varint(BYTE_FALLBACK_FIELD << 3) + b"\x01"
    cut = next((start for number, _, start, _ in _fields(trainer) if number > BYTE_FALLBACK_FIELD), len(trainer))
    return trainer[:cut] + flag + trainer[cut:]


def complete_sentencepiece(model: bytes) -> bytes:
    """The final `ice_text.model` made from the one of the first release; a final one comes back as it is.

    Appends the 344 pieces that early code added in memory (8 control, tab, 79 runs of blanks, 256 bytes) and
    switches `byte_fallback` on. Completing the published first-release file gives the published final file, byte
    for byte. No protobuf package is needed.

    Raises:
        ValueError: `model` is no SentencePiece model of this family, or has only a part of the 344 pieces.
    """
    cure = f"expected the {VOCAB_FILE} of ChatGLM-6B (2.7 MB, not a git-lfs pointer): download it again."
    try:
        first = [_piece_name(content) for _, content, _, _ in islice(_fields(model), len(BASE_PIECES))]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{len(model)} bytes that are no SentencePiece model; {cure}") from error
    if tuple(first) != BASE_PIECES:
        raise ValueError(f"A SentencePiece model that begins with {first}, not with {list(BASE_PIECES)}; {cure}")
    extension = _piece_entries(EXTENSION)
    _, found, rest = model.partition(extension)
    try:
        fields = list(_fields(rest if found else model))
        names = {_piece_name(content) for number, content, _, _ in fields if number == PIECES_FIELD}
        ((trainer, start, end),) = (field for number, *field in fields if number == TRAINER_FIELD)
    except (ValueError, IndexError) as error:
        raise ValueError(f"A SentencePiece model that is cut off or damaged; {cure}") from error
    if found:
        return model
    known = sum(piece in names for piece, _ in EXTENSION)
    if known:
        raise ValueError(
            f"{known} of the {len(EXTENSION)} pieces that the first release lacked are there, and not all of them "
            f"as the final release has them; {cure}"
        )
    return model[:start] + extension + _length_delimited(TRAINER_FIELD, _with_byte_fallback(trainer)) + model[end:]


def _piece_name(message: bytes) -> str:
    return next(_fields(message), (0, b"", 0, 0))[1].decode()


def _decoding_model(model: bytes) -> bytes:
    """A complete model in which the pieces that stand for white space are that white space.

    SentencePiece then decodes to the final text by itself; replacing afterwards takes a third of its time again.
    """
    *_, (_, _, start, end) = islice(_fields(model), len(BASE_PIECES))
    newline = _piece_entries([(WHITESPACE[NEWLINE], USER_DEFINED)])
    spelled = _piece_entries(EXTENSION)
    assert spelled in model, "complete_sentencepiece sees to it"
    white = _piece_entries((WHITESPACE.get(piece, piece), kind) for piece, kind in EXTENSION)
    return model[:start] + newline + model[end:].replace(spelled, white)


def _load_sentencepiece(vocab_file: str | None, folder: str) -> tuple[spm.SentencePieceProcessor, bool]:
    """The processor of a complete model, and whether the file already was one."""
    if vocab_file is None or not os.path.isfile(vocab_file):
        raise ValueError(
            f"No {VOCAB_FILE} at {vocab_file or folder}: make a complete folder with "
            "`python slim.py THUDM/chatglm-6b OUT`, or download that file from the Hub into the folder."
        )
    model = Path(vocab_file).read_bytes()
    try:
        completed = complete_sentencepiece(model)
        return spm.SentencePieceProcessor(model_proto=completed), completed == model
    except (ValueError, RuntimeError) as error:  # transformers 4.57 would swallow a RuntimeError
        raise ValueError(f"{vocab_file} cannot be used: {error}") from error


# --------------------------------------------------------------------------------------------------------------
# White space
# --------------------------------------------------------------------------------------------------------------
def _spell_whitespace(text: bytes) -> bytes:
    """Newlines, tabs and runs of 2 to 80 blanks as the pieces that stand for them; a single blank stays."""
    text = text.replace(b"\n", NEWLINE.encode()).replace(b"\t", TAB.encode())
    if b"  " not in text:
        return text
    parts = BLANK_RUN.split(text)  # every second part is a run of blanks
    parts[1::2] = [SPELLED_BLANKS[run] for run in parts[1::2]]
    return b"".join(parts)


def _clean_up(text: str) -> str:
    """transformers' removal of blanks before punctuation, which 5.0 no longer has for tokenizers in Python."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


# --------------------------------------------------------------------------------------------------------------
# Conversations
# --------------------------------------------------------------------------------------------------------------
def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r} ({type(value).__name__}), not a str.")
    return value


def _split_conversation(conversation: Any) -> tuple[str, list[tuple[str, str | None]]]:
    """System text ("" without one) and rounds (query, answer); the last answer is None when it is still to come.

    Args:
        conversation: (query, answer) pairs, or messages {"role": "system" | "user" | "assistant", "content": str}:
            at most one system message, first, then user and assistant in turn.
    """
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(f"The history is {conversation!r}, not a list of (query, answer) pairs or of messages.")
    if conversation and not isinstance(conversation[0], Mapping):
        last = len(conversation) - 1
        return "", [_pair(turn, i, unanswered=i == last) for i, turn in enumerate(conversation)]
    system, texts = "", []
    for i, turn in enumerate(conversation):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise ValueError(f"Message {i} is {turn!r}, not a dict with 'role' and 'content'.")
        content = _text(turn["content"], f"The content of message {i}")
        if i == 0 and turn["role"] == "system":
            system = content
            continue
        expected = ("user", "assistant")[len(texts) % 2]
        if turn["role"] != expected:
            raise ValueError(
                f"Message {i} has the role {turn['role']!r} where {expected!r} is due: give at most one 'system' "
                "message, first, then 'user' and 'assistant' in turn."
            )
        texts.append(content)
    answers = [*texts[1::2], None][: len(texts[::2])]
    return system, list(zip(texts[::2], answers))


def _pair(turn: Any, index: int, unanswered: bool) -> tuple[str, str | None]:
    """A (query, answer) pair; the answer may be None where `unanswered` allows it."""
    if not isinstance(turn, (tuple, list)) or len(turn) != 2:
        raise ValueError(f"Round {index} is {turn!r}, not a (query, answer) pair.")
    query, answer = turn
    query = _text(query, f"The query of round {index}")
    return query, None if unanswered and answer is None else _text(answer, f"The answer of round {index}")


def _prompt(system: str, rounds: list[tuple[str, str | None]], generation: bool = True) -> str:
    """The official text before the last answer; without `generation` it ends where the last query does."""
    queries = [query for query, _ in rounds]
    if system:
        queries[0] = f"{system}\n{queries[0]}"
    if len(rounds) == 1:
        return queries[0]
    lines = [
        f"[Round {i}]\n问：{query}\n答：{answer}\n" for i, (query, (_, answer)) in enumerate(zip(queries, rounds))
    ]
    lines[-1] = f"[Round {len(rounds) - 1}]\n问：{queries[-1]}\n" + ("答：" if generation else "")
    return "".join(lines)


# --------------------------------------------------------------------------------------------------------------
# The tokenizer
# --------------------------------------------------------------------------------------------------------------
class ChatGLMTokenizer(PreTrainedTokenizer):
    """The tokenizer of ChatGLM-6B, with the ids of the official code on transformers 4.23 to 5.23.

    `tokenizer(text)` is the official encoding: text, then `[gMASK] <sop>`; `<sop>`, `<eop>`, `<unk>`, `<pad>` and
    `[MASK]` inside the text are parsed as control tokens, and white space beside them is dropped. Text that a user
    typed belongs in `build_chat_input_ids`, `apply_chat_template` or `encode_text`, which never parse any.

    Args:
        vocab_file: `ice_text.model`, the final one or that of the first release (completed in memory).
        num_image_tokens: rows before the first text piece: 0 in a slim vocabulary, 20000 in a full one. None means
            what the file is from: 0 for a final file, 20000 for one of the first release.
        clean_up_tokenization_spaces: whether `decode` removes blanks before punctuation; off, it damages code.
        gmask_token, end_token: names of pieces that are no special tokens to transformers.

    Raises:
        ValueError: no such file, or not an `ice_text.model`.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        padding_side: str = "left",
        num_image_tokens: int | None = None,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> None:
        # transformers >= 4.34 asks for the vocabulary while its own __init__ runs
        self.sp, complete = _load_sentencepiece(vocab_file, kwargs.get("name_or_path") or "the given place")
        self.vocab_file = vocab_file
        self.num_image_tokens = (0 if complete else NUM_IMAGE_TOKENS) if num_image_tokens is None else num_image_tokens
        if self.num_image_tokens < 0:
            raise ValueError(f"num_image_tokens is {num_image_tokens}: it is 0 (slim) or {NUM_IMAGE_TOKENS} (full).")
        self.do_lower_case, self.remove_space = do_lower_case, remove_space
        kwargs = _own_names_removed(kwargs)
        # tokenizer_config.json of the first release says </s>, but the model has always ended answers with <eop>
        eos_token = "<eop>" if str(eos_token) == str(end_token) else eos_token
        tokens = {"bos": bos_token, "eos": eos_token, "unk": unk_token, "pad": pad_token, "mask": mask_token}
        # a special token swallows the white space beside it, as all of them did before transformers 4.34
        special = {
            f"{name}_token": AddedToken(str(token), lstrip=True, rstrip=True, normalized=False)
            for name, token in tokens.items()
        }
        super().__init__(
            **special,
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            padding_side=padding_side,
            num_image_tokens=self.num_image_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.gmask_token, self.end_token = str(gmask_token), str(end_token)
        # up to 4.33 only from_pretrained made them one token in text, and from 5.0 on they lose their flags
        self.add_tokens(list(special.values()), special_tokens=True)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> ChatGLMTokenizer:
        """As in transformers; 4.47 to 5.5 hide an error of `__init__` behind a missing protobuf, which none needs."""
        try:
            return super().from_pretrained(*args, **kwargs)
        except ImportError as error:
            if isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise

    # ---- vocabulary ------------------------------------------------------------------------------------------
    @property
    def vocab_size(self) -> int:
        """Image tokens and text pieces, without tokens added by the user."""
        return self.num_image_tokens + self.sp.get_piece_size()

    @property
    def gmask_token_id(self) -> int:
        return self._convert_token_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        return self._convert_token_to_id(self.end_token)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, user-added ones included."""
        pieces = self.sp.id_to_piece(list(range(self.sp.get_piece_size())))
        names = [f"<image_{k}>" for k in range(self.num_image_tokens)] + pieces
        vocab = dict(zip(names, range(len(names))))
        vocab.update(getattr(self, "added_tokens_encoder", {}))
        return vocab

    def _ids_of(self, pieces: list[int]) -> list[int]:
        """Token ids of SentencePiece's numbers."""
        offset = self.num_image_tokens
        return [piece + offset for piece in pieces] if offset else pieces

    def _pieces_of(self, ids: list[int]) -> list[int]:
        """SentencePiece's numbers of token ids; below 0 and beyond its last number there is no piece."""
        offset = self.num_image_tokens
        return [index - offset for index in ids] if offset else ids

    def _convert_token_to_id(self, token: str) -> int:
        image = token.startswith("<image_") and IMAGE_PIECE.fullmatch(token)
        return int(image[1]) if image else self._ids_of([self.sp.piece_to_id(token)])[0]

    def _convert_id_to_token(self, index: int) -> str:
        """The piece, or nothing for the spare rows of the model (130344 to 130527), which no text leads to."""
        if 0 <= index < self.num_image_tokens:
            return f"<image_{index}>"
        (piece,) = self._pieces_of([index])
        return self.sp.id_to_piece(piece) if 0 <= piece < self.sp.get_piece_size() else ""

    # ---- text to ids -----------------------------------------------------------------------------------------
    def _spell(self, text: str) -> bytes:
        """Text as SentencePiece gets it, in UTF-8.

        Raises:
            ValueError: a lone surrogate.
        """
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        try:
            return _spell_whitespace(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text holds a lone surrogate, {text[error.start]!r}, which is no character: read it with "
                "errors='replace', or text.encode('utf-16', 'surrogatepass').decode('utf-16')."
            ) from error

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp.encode(self._spell(text).decode(), out_type=str)

    def encode_text(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token: `<eop>` or `[MASK]` in it is spelled out.

        So are tokens that you have added yourself: they are parsed by `tokenizer(text)` alone.

        Raises:
            ValueError: not a str, or a lone surrogate in it.
        """
        return self._ids_of(self.sp.encode(self._spell(_text(text, "The text to encode"))))

    def _parse_texts(self, texts: list[str], options: dict[str, Any]) -> list[list[int]]:
        """Ids of texts; special tokens and the user's tokens are parsed unless options["split_special_tokens"].

        transformers looks for tokens character by character and turns pieces into ids one at a time, which takes four
        times as long as SentencePiece: that is left to it only where there is a token to be found.
        """
        split = options.get("split_special_tokens", getattr(self, "split_special_tokens", False))
        tokens = set() if split else {*self.all_special_tokens, *self.get_added_vocab()}
        if tokens and self.do_lower_case:
            tokens = {""}  # in every text: transformers knows in what case it holds each token
        beginnings = {token[:1] for token in tokens}  # single characters are found twenty times as fast
        parsed = {
            i
            for i, text in enumerate(texts)
            if any(start in text for start in beginnings) and any(token in text for token in tokens)
        }
        plain = [self._spell(text) for i, text in enumerate(texts) if i not in parsed]
        threads = len(plain) >= THREADED_BATCH
        rows = iter(self.sp.encode(plain) if threads else [self.sp.encode(text) for text in plain])
        return [
            self.convert_tokens_to_ids(self.tokenize(text)) if i in parsed else self._ids_of(next(rows))
            for i, text in enumerate(texts)
        ]

    @functools.wraps(PreTrainedTokenizer.__call__)  # its signature and its description (4.23 to 5.23)
    def __call__(self, text: Any = None, *args: Any, **options: Any) -> BatchEncoding:
        # A text alone goes a short way: transformers' own takes a third of SentencePiece's time.
        plain = isinstance(text, str) and not args and options.keys() <= {"return_tensors"}
        own = type(self) is ChatGLMTokenizer and self.model_input_names == ChatGLMTokenizer.model_input_names
        if not (plain and own):
            return super().__call__(text, *args, **options)
        (ids,) = self._parse_texts([text], {})
        ids = self.build_inputs_with_special_tokens(ids)
        self._eventual_warn_about_too_long_sequence(ids, None, True)
        encoded, form = {"input_ids": ids, "attention_mask": [1] * len(ids)}, options.get("return_tensors")
        return BatchEncoding(encoded, tensor_type=form, prepend_batch_axis=form is not None)

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """transformers' one door for a text and, from 5.0 on, for a batch; overridden for speed (4.23 to 5.23)."""
        encoded = None
        if isinstance(text, str) and not any(options.get(name) for name in TEXT_OPTIONS):
            text, text_pair = (
                self._parse_texts([one], options)[0] or one if isinstance(one, str) else one
                for one in (text, text_pair)  # ids are taken as well as text, but no empty list
            )
        elif isinstance(text, (list, tuple)) and not hasattr(super(), "_batch_encode_plus"):
            if text_pair is None:
                encoded = self._encode_batch(text, options)
            elif isinstance(text_pair, (list, tuple)) and len(text_pair) == len(text):
                encoded = self._encode_batch(list(zip(text, text_pair)), options)
        return super()._encode_plus(text, text_pair, **options) if encoded is None else encoded

    def _batch_encode_plus(self, batch_text_or_text_pairs: list, **options: Any) -> BatchEncoding:
        """The door for a batch before 5.0."""
        encoded = self._encode_batch(batch_text_or_text_pairs, options)
        return super()._batch_encode_plus(batch_text_or_text_pairs, **options) if encoded is None else encoded

    def _encode_batch(self, inputs: list, options: dict[str, Any]) -> BatchEncoding | None:
        """Texts and pairs of texts, encoded together; None leaves them to transformers, which goes row by row."""
        items = [item if isinstance(item, (list, tuple)) else (item,) for item in inputs]
        texts = [text for item in items for text in item]
        regular = all(len(item) in (1, 2) for item in items) and all(isinstance(text, str) for text in texts)
        if not (texts and regular) or any(options.get(name) for name in (*TEXT_OPTIONS, *ROW_OPTIONS)):
            return None
        ids = iter(self._parse_texts(texts, options))
        rows = [self._lay_out(next(ids), next(ids) if len(item) == 2 else None, options) for item in items]
        names = ("max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask", "return_tensors")
        given = {name: options[name] for name in names if options.get(name) is not None}
        return self.pad({"input_ids": rows}, padding=options["padding_strategy"], **given)

    def _lay_out(self, first: list[int], second: list[int] | None, options: dict[str, Any]) -> list[int]:
        """A row of a batch: cut to options["max_length"], with special tokens."""
        special = options.get("add_special_tokens", True)
        strategy, limit = options["truncation_strategy"], options.get("max_length")
        if limit is not None and strategy.value != "do_not_truncate":
            added = self.num_special_tokens_to_add(pair=second is not None) if special else 0
            excess = len(first) + len(second or ()) + added - limit
            first, second, _ = self.truncate_sequences(first, second, excess, strategy)
        return self.build_inputs_with_special_tokens(first, second) if special else first + (second or [])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The official layout: `text [gMASK] <sop>`, and for a pair `text [gMASK] <sop> second <eop>`."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """All 0, as long as the encoding, since the model knows no types; before 5.0 they come out too short."""
        added = self.num_special_tokens_to_add(pair=token_ids_1 is not None)
        return [0] * (len(token_ids_0) + len(token_ids_1 or ()) + added)

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 where `build_inputs_with_special_tokens` adds a token (transformers knows no layout, and says 0)."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        prompt = [0] * len(token_ids_0) + [1, 1]
        return prompt if token_ids_1 is None else prompt + [0] * len(token_ids_1) + [1]

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: Any = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """A part that would vanish stays whole, as up to 4.57; 5.x empties it, often with the rest still too long.

        Checked on 4.23 to 5.23; how the rest is cut is left to transformers.
        """
        strategy = getattr(truncation_strategy, "value", truncation_strategy)
        if num_tokens_to_remove <= 0:
            return ids, pair_ids, []
        part = pair_ids if strategy == "only_second" else ids
        only_part = strategy != "longest_first" or pair_ids is None
        if only_part and part is not None and len(part) <= num_tokens_to_remove:
            logger.warning(
                f"{num_tokens_to_remove} tokens are to be cut from a part of {len(part)} ({strategy}), which stays "
                "whole: raise max_length, or choose another truncation strategy."
            )
            return ids, pair_ids, []
        return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, truncation_strategy, stride)

    def build_blank_input_ids(self, text: str) -> list[int]:
        """Ids that ask the model to fill the first `[MASK]` in a text: the text, then `<sop>`, without `[gMASK]`.

        Generate from them (`model.generate(torch.tensor([ids]))`); what comes after `<sop>` fills the blank. White
        space beside `[MASK]` is dropped, as in the official encoding; other control tokens are spelled out.

        Raises:
            ValueError: no `[MASK]` in the text.

        >>> tokenizer.convert_ids_to_tokens(tokenizer.build_blank_input_ids("AI [MASK] AI"))
        ['▁', 'AI', '[MASK]', '▁', 'AI', '<sop>']
        """
        before, *others = _text(text, "The text with a blank").split(self.mask_token)
        if not others:
            raise ValueError(f"There is no {self.mask_token} in {text!r}: put one where the model is to write.")
        ids = self.encode_text(before.rstrip())
        for part in (*(part.strip() for part in others[:-1]), others[-1].lstrip()):
            ids += [self.mask_token_id, *self.encode_text(part)]
        return [*ids, self.bos_token_id]

    # ---- conversations ---------------------------------------------------------------------------------------
    def build_prompt(self, query: str, history: History | None = None) -> str:
        """The official text of a chat: the query alone, or numbered rounds that end with it.

        Args:
            query: what is asked now.
            history: earlier rounds, oldest first: (query, answer) pairs, or messages {"role", "content"} that end
                with an answer. The text of a "system" message (one at most, first) goes before the first query, on
                lines of its own: the model knows no place for it.

        Raises:
            ValueError: a history of another shape; it names the round or message.

        >>> print(tokenizer.build_prompt("它在哪里", [("介绍一下清华大学", "清华大学是中国的大学。")]))
        [Round 0]
        问：介绍一下清华大学
        答：清华大学是中国的大学。
        [Round 1]
        问：它在哪里
        答：
        """
        system, rounds = _split_conversation([] if history is None else history)
        if rounds and rounds[-1][1] is None:
            raise ValueError(f"The history ends with the query {rounds[-1][0]!r}; it has to end with an answer.")
        return _prompt(system, [*rounds, (_text(query, "The query"), None)])

    def build_chat_input_ids(self, query: str, history: History | None = None) -> list[int]:
        """Ids from which the model answers `query`: `build_prompt` in ids, then `[gMASK] <sop>`.

        Nothing in the query or the history becomes a control token.

        >>> ids = tokenizer.build_chat_input_ids("What does <eop> mean?")
        >>> tokenizer.convert_ids_to_tokens(ids[-2:]), tokenizer.eos_token_id in ids
        (['[gMASK]', '<sop>'], False)
        """
        return self.build_inputs_with_special_tokens(self.encode_text(self.build_prompt(query, history)))

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A conversation, or a list of them, as text or ids: the ids of `build_chat_input_ids`.

        Overridden (4.23, which has no such method, to 5.23) because a template is rendered before it is encoded, so
        that what a user typed could become a control token, and because `[gMASK]` is never parsed. A template of your
        own (`chat_template`, here or of the tokenizer) is left to transformers.

        Args:
            conversation: messages or (query, answer) pairs, as in `build_prompt`. It ends with a query (as a pair:
                (query, None)) or with an answer; that follows `[gMASK] <sop>` and is closed by `<eop>`, to train on.
            add_generation_prompt (False): end with the words and the tokens that call for an answer.
            continue_final_message (False): leave the answer at the end open, without `<eop>`, to be continued.
            tokenize (True): ids; otherwise the text, in which control tokens are not written.
            padding (False), truncation (False), max_length (None), return_tensors (None): as in `__call__`; the
                text is cut, but never the `[gMASK] <sop>` that calls for an answer.
            return_dict (None): None returns what transformers itself does: ids on 4.x, a BatchEncoding on 5.x.
            return_assistant_tokens_mask (False): add "assistant_masks": 1 for the answer after `[gMASK] <sop>`, the
                only one that the model can learn from, since earlier ones are part of the prompt.
            tokenizer_kwargs (None): further arguments of `pad`, such as `pad_to_multiple_of`.
            Others, such as tools and documents, have no place in the text, and no effect.

        Raises:
            ValueError: a conversation of another shape, or a flag that does not fit its end.
        """
        if self._has_template_of_user(options.get("chat_template")):
            return super().apply_chat_template(conversation, **options)
        return self._apply_rounds(conversation, **options)

    def _apply_rounds(
        self,
        conversation: Any,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool | None = None,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Any:
        """`apply_chat_template` without a template: the rounds of `build_prompt`."""
        conversations, is_batch = _batch_of(conversation)
        flags = (add_generation_prompt, continue_final_message)
        if not tokenize:
            parts = [self._chat_parts(one, *flags) for one in conversations]
            texts = [prompt + (answer or "") for prompt, answer in parts]
            return texts if is_batch else texts[0]
        rows = [self._chat_ids(one, *flags, truncation=truncation, max_length=max_length) for one in conversations]
        encoded = self._pad_chats(rows, padding=padding, max_length=max_length, **(tokenizer_kwargs or {}))
        if not return_assistant_tokens_mask:
            del encoded["assistant_masks"]
        if not is_batch and return_tensors is None:
            encoded = {name: values[0] for name, values in encoded.items()}
        encoded = BatchEncoding(encoded, tensor_type=return_tensors)
        return encoded if _chat_returns_dict(return_dict) else encoded["input_ids"]

    def _has_template_of_user(self, given: str | None) -> bool:
        template = given or getattr(self, "chat_template", None)
        if isinstance(template, dict):  # named ones
            template = template.get("default")
        return template is not None and TEMPLATE_MARK not in template

    def _chat_parts(
        self, conversation: Any, add_generation_prompt: bool, continue_final_message: bool
    ) -> tuple[str, str | None]:
        """The text of the prompt, and that of the answer where the conversation ends with one."""
        system, rounds = _split_conversation(conversation)
        if not rounds:
            raise ValueError("The conversation has no query: give at least one message of the role 'user'.")
        answer = rounds[-1][1]
        if answer is None and continue_final_message:
            raise ValueError(
                "continue_final_message: the conversation ends with a query, there is no answer to go on."
            )
        if answer is not None and add_generation_prompt:
            raise ValueError(
                "add_generation_prompt: the conversation ends with an answer, there is no query left; "
                "use continue_final_message=True to have that answer continued."
            )
        return _prompt(system, rounds, generation=add_generation_prompt or answer is not None), answer

    def _chat_ids(
        self, conversation: Any, add_generation_prompt: bool, continue_final_message: bool, **cut: Any
    ) -> tuple[list[int], int]:
        """Ids of a conversation, cut, and how many of them come before the answer."""
        prompt, answer = self._chat_parts(conversation, add_generation_prompt, continue_final_message)
        ids = self.encode_text(prompt)
        if answer is None:
            ids = self.prepare_for_model(ids, add_special_tokens=add_generation_prompt, **cut)["input_ids"]
            return ids, len(ids)
        prompt_ids = self.build_inputs_with_special_tokens(ids)
        ids = [*prompt_ids, *self.encode_text(answer), *([] if continue_final_message else [self.eos_token_id])]
        kept = self.prepare_for_model(ids, add_special_tokens=False, **cut)["input_ids"]
        lost_in_front = len(ids) - len(kept) if self.truncation_side == "left" else 0
        return kept, min(max(len(prompt_ids) - lost_in_front, 0), len(kept))

    def _pad_chats(self, rows: list[tuple[list[int], int]], **form: Any) -> dict[str, list[list[int]]]:
        """Padded rows, with masks of what is no padding and of what is the answer."""
        encoded = dict(self.pad({"input_ids": [ids for ids, _ in rows]}, **form))
        masks = [[0] * before + [1] * (len(ids) - before) for ids, before in rows]
        padding = [[0] * (len(row) - len(mask)) for row, mask in zip(encoded["input_ids"], masks)]
        left = self.padding_side == "left"
        encoded["assistant_masks"] = [pad + mask if left else mask + pad for pad, mask in zip(padding, masks)]
        return encoded

    # ---- ids to text -----------------------------------------------------------------------------------------
    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Text of ids (an int, a list, an array or a tensor); of a batch, a list of texts.

        Control tokens print nothing, `<unk>` prints " ⁇ " unless `skip_special_tokens`, and ids without a piece print
        nothing. Overridden (4.23 to 5.23) because up to 4.27 the clean-up is on unless the caller says otherwise.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if not isinstance(ids, list):
            ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and isinstance(ids[0], (list, tuple)) or getattr(ids[0] if ids else None, "ndim", 0):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **kwargs) for row in ids]
        if ids and type(ids[0]) is not int:
            ids = [int(index) for index in ids]  # numpy or torch numbers
        text = self._decode(ids, skip_special_tokens, **kwargs)
        clean_up = clean_up_tokenization_spaces
        clean_up = self.clean_up_tokenization_spaces if clean_up is None else clean_up
        return _clean_up(text) if clean_up else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """A text for each row of ids; overridden as `decode` is, and for the same reason."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **kwargs) for row in sequences]

    def _decode(self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        hidden = {self.pad_token_id, *(self.all_special_ids if skip_special_tokens else ())}
        # control pieces print nothing anyway: this is for <unk>, and for special tokens that the user has added
        hidden = {index for index in hidden if index is not None and not self._is_control(index)}
        if hidden and not hidden.isdisjoint(token_ids):
            token_ids = [index for index in token_ids if index not in hidden]
        try:
            return self._decoder.decode(self._pieces_of(token_ids))
        except IndexError:  # not all of them are pieces
            return self._decode_mixed(token_ids, kwargs.get("spaces_between_special_tokens", True))

    @functools.cached_property
    def _decoder(self) -> spm.SentencePieceProcessor:
        return spm.SentencePieceProcessor(model_proto=_decoding_model(self.sp.serialized_model_proto()))

    def _is_control(self, index: int) -> bool:
        (piece,) = self._pieces_of([index])
        return 0 <= piece < self.sp.get_piece_size() and self.sp.is_control(piece)

    def _decode_mixed(self, token_ids: list[int], spaces: bool) -> str:
        """Text of ids some of which are image tokens, tokens added by the user, or nothing."""
        added = {index: token for token, index in self.get_added_vocab().items()}
        texts, run = [], []
        for index in token_ids:
            if 0 <= index < self.vocab_size:
                run.append(self._convert_id_to_token(index))
            elif index in added:
                texts += [self.convert_tokens_to_string(run), added[index]] if run else [added[index]]
                run = []
        texts += [self.convert_tokens_to_string(run)] if run else []
        return (" " if spaces else "").join(texts)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decoder.decode_pieces([WHITESPACE.get(token, token) for token in tokens])

    # ---- files -----------------------------------------------------------------------------------------------
    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `ice_text.model`, complete even where the loaded file was of the first release."""
        path = Path(save_directory, f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE)
        path.write_bytes(self.sp.serialized_model_proto())
        return (str(path),)


def _own_names_removed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers, which of its own accord makes every `*_token` of a settings file a special token.

    From 5.0 on such tokens would be parsed in text and hidden in answers, as the original does with neither. A list
    of the user's special tokens, written by 5.x, goes by the name that 4.x knows too.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in OWN_NAMES}
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        tokens = kwargs.get(group)
        if isinstance(tokens, dict):
            kwargs[group] = {name: token for name, token in tokens.items() if name not in OWN_NAMES}
    if isinstance(kwargs.get("extra_special_tokens"), (list, tuple)):
        tokens = kwargs.pop("extra_special_tokens")
        kwargs["additional_special_tokens"] = kwargs.get("additional_special_tokens") or list(tokens)
    return kwargs


def _batch_of(conversation: Any) -> tuple[list, bool]:
    """A list of conversations, and whether it was one (a lone conversation becomes a list of itself)."""
    conversation = getattr(conversation, "messages", conversation)  # the Conversation objects of 4.x
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"The conversation is {conversation!r}, not a list of messages or of (query, answer) pairs.")
    first = getattr(conversation[0], "messages", conversation[0])
    if isinstance(first, (list, tuple)) and not (first and isinstance(first[0], str)):
        return [getattr(one, "messages", one) for one in conversation], True
    return [conversation], False


def _chat_returns_dict(wanted: bool | None) -> bool:
    """What the caller wants or, by default, what transformers itself does: no on 4.x, yes from 5.0 on."""
    if wanted is not None:
        return wanted
    method = getattr(PreTrainedTokenizer, "apply_chat_template", None)
    parameter = inspect.signature(method).parameters.get("return_dict") if method else None
    return bool(parameter and parameter.default)


ChatGLMTokenizer.register_for_auto_class("AutoTokenizer")
