"""Text <-> token ids of ChatGLM-6B: a SentencePiece model behind transformers' `PreTrainedTokenizer`.

Unusual here, all of it fixed by the released checkpoints:
* newlines, tabs and runs of blanks are spelled as pieces of their own (`<n>`, `<|tab|>`, `<|blank_k|>`);
* a prompt ends with `[gMASK] <sop>`, a text with a blank to be filled has `[MASK]` there and ends with `<sop>`, and
  the model closes what it writes with `<eop>`;
* in the full vocabulary (150528 rows) 20000 image tokens come before the text pieces, in the slim one none do:
  `num_image_tokens` is that difference.
"""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.utils import to_py_obj

from .configuration_chatglm import IMAGE_TOKENS, warn_once
from .sentencepiece_file import BLANKS, NEWLINE, TAB, VOCAB_FILE, read_complete

WHITESPACE = {NEWLINE: "\n", TAB: "\t", **{piece: run for run, piece in BLANKS.items()}}
BLANK_RUN = re.compile(" {2,80}")
IMAGE_TOKEN = re.compile("<image_(0|[1-9][0-9]{0,8})>")

OWN_NAMES = ("gmask_token", "end_token", "eop_token")  # in settings files of ChatGLM; the last in the first release's
SPECIAL_TOKENS = {"bos": "<sop>", "eos": "<eop>", "unk": "<unk>", "pad": "<pad>", "mask": "[MASK]"}
CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # lose their blanks
AS_TEXT = dict.fromkeys(("tokenize", "return_dict", "return_assistant_tokens_mask", "continue_final_message"), False)
# Asked here and not in compat.py, which needs torch, as tokenizers do not.
IS_TRANSFORMERS_5 = not hasattr(PreTrainedTokenizer, "_batch_encode_plus")


def spell_whitespace(text: str) -> str:
    """Newlines, tabs and runs of 2 to 80 blanks as the pieces that stand for them; a single blank stays."""
    text = text.replace("\n", NEWLINE).replace("\t", TAB)
    return BLANK_RUN.sub(lambda run: BLANKS[run[0]], text)


# ---- conversations as text ----------------------------------------------------------------------------------
def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r} ({type(value).__name__}), not a str.")
    return value


def _with_whole_text(message: Any) -> Any:
    """A message whose text comes in parts, [{"type": "text", "text": …}], as pipelines and servers give it."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    is_text = isinstance(parts, list) and all(isinstance(one, Mapping) and one.get("type") == "text" for one in parts)
    return {**message, "content": "".join(_text(one.get("text"), "A part") for one in parts)} if is_text else message


def _messages(conversation: Any) -> list[Any]:
    """The messages of (query, answer) pairs, the last answer of which may be None; messages as they are."""
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(f"The conversation is {conversation!r}, not a list of (query, answer) pairs or of messages.")
    if not conversation or isinstance(conversation[0], Mapping):
        return [_with_whole_text(message) for message in conversation]
    messages = []
    for i, pair in enumerate(conversation):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"Round {i} is {pair!r}, not a (query, answer) pair.")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
    return messages[:-1] if messages[-1]["content"] is None else messages


def _split(messages: list[Any]) -> tuple[str, list[str]]:
    """System text ("" without one), and the other texts in turn: query, answer, query ..."""
    system, texts = "", []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"Message {i} is {message!r}, not a dict with 'role' and 'content'.")
        if i == 0 and message["role"] == "system":
            system = _text(message["content"], "The system's text")
            continue
        expected = ("user", "assistant")[len(texts) % 2]
        if message["role"] != expected:
            cure = "give one 'system' message at most, first, then 'user' and 'assistant' in turn."
            raise ValueError(f"Message {i} has the role {message['role']!r} where {expected!r} is due: {cure}")
        texts.append(_text(message["content"], f"The {expected}'s text of round {len(texts) // 2}"))
    return system, texts


def _prompt(system: str, texts: list[str], generation: bool = True) -> str:
    """The official text up to the last query, and with `generation` the word that calls for its answer."""
    queries, answers = texts[::2], texts[1::2]
    queries[0] = f"{system}\n{queries[0]}" if system else queries[0]
    if len(queries) == 1:
        return queries[0]
    *rounds, last = [f"[Round {i}]\n问：{query}\n答：" for i, query in enumerate(queries)]
    text = "".join(f"{one}{answer}\n" for one, answer in zip(rounds, answers)) + last
    return text if generation else text[: -len("答：")]


def _chat_parts(messages: list, add_generation_prompt=False, continue_final_message=False) -> tuple[str, ...]:
    """The text of the prompt, and that of the answer where the conversation ends with one."""
    system, texts = _split(messages)
    if not texts:
        raise ValueError("The conversation has no query: give at least one message of the role 'user'.")
    answered = len(texts) % 2 == 0
    if continue_final_message and not answered:
        raise ValueError("continue_final_message: the conversation ends with a query, there is no answer to go on.")
    if add_generation_prompt and answered:
        raise ValueError("add_generation_prompt: the conversation ends with an answer: say continue_final_message.")
    prompt = _prompt(system, texts, generation=add_generation_prompt or answered)
    return (prompt, texts[-1]) if answered else (prompt,)


# ---- the tokenizer ------------------------------------------------------------------------------------------
class ChatGLMTokenizer(PreTrainedTokenizer):
    """The tokenizer of ChatGLM-6B, with the ids of the official code on transformers 4.23 to 5.24.

    `tokenizer(text)` is the official encoding: text, then `[gMASK] <sop>`; SPECIAL_TOKENS inside the text are parsed,
    and white space beside them is dropped. Text that a user typed belongs in `build_chat_input_ids`,
    `apply_chat_template` or `encode_text`, which never parse any.

    Args:
        vocab_file: `ice_text.model`, the final one or that of the first release (completed in memory).
        num_image_tokens: rows before the first text piece: 0 (slim), 20000 (full), or None for what the file is from.
        clean_up_tokenization_spaces: whether `decode` removes blanks before punctuation, which damages code.
        kwargs: others than SPECIAL_TOKENS, or None for no pad, unk or mask token; and those of transformers.

    Raises:
        ValueError: no such file, or not an `ice_text.model`; a number of image tokens that no vocabulary has.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    chat_template = None  # transformers below 4.34 knows none

    def __init__(
        self,
        vocab_file: str | None = None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        end_token: str = "</s>",
        gmask_token: str = "[gMASK]",
        num_image_tokens: int | None = None,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> None:
        self.sp, complete = read_complete(vocab_file or Path(kwargs.get("name_or_path") or "", VOCAB_FILE))
        self.vocab_file = vocab_file
        offset = (0 if complete else IMAGE_TOKENS) if num_image_tokens is None else num_image_tokens
        if type(offset) is not int or not 0 <= offset <= IMAGE_TOKENS:
            raise ValueError(f"num_image_tokens is {offset!r}: it is 0 (slim) or {IMAGE_TOKENS} (full).")
        own = {"num_image_tokens": offset, "do_lower_case": do_lower_case, "remove_space": remove_space}
        own["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        vars(self).update(own)  # transformers >= 4.34 asks for the vocabulary while its own __init__ runs
        self.split_special_tokens = bool(kwargs.get("split_special_tokens", False))  # below 4.34, nobody else does
        tokens = {f"{name}_token": kwargs.pop(f"{name}_token", token) for name, token in SPECIAL_TOKENS.items()}
        if None in (tokens["bos_token"], tokens["eos_token"]):
            raise ValueError("bos_token or eos_token is None: every prompt needs <sop> and every answer <eop>.")
        if str(tokens["eos_token"]) == str(end_token):  # so the first release's settings; its answers end with <eop>
            tokens["eos_token"] = SPECIAL_TOKENS["eos"]
        # a special token swallows the white space beside it, as all of them did before transformers 4.34
        form = {"lstrip": True, "rstrip": True, "normalized": False}
        special = {name: token and AddedToken(str(token), **form) for name, token in tokens.items()}
        # 5.x gathers gmask_token and such of a settings file in a dict, to parse them in text and hide them in answers
        for group in ("model_specific_special_tokens", "extra_special_tokens"):
            if isinstance(kwargs.get(group), dict):
                kwargs[group] = {name: token for name, token in kwargs[group].items() if name not in OWN_NAMES}
        if isinstance(kwargs.get("extra_special_tokens"), (list, tuple)):  # the user's, for 4.x by their old name
            kwargs["additional_special_tokens"] = list(kwargs.pop("extra_special_tokens"))
        super().__init__(**special, **own, **kwargs)
        self.gmask_token, self.end_token = str(gmask_token), str(end_token)  # no special tokens to transformers
        self.gmask_token_id, self.end_token_id = map(self._convert_token_to_id, (self.gmask_token, self.end_token))
        # up to 4.33 only from_pretrained made them one token in text, and from 5.0 on they lose their flags
        self.add_tokens([token for token in special.values() if token], special_tokens=True)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> ChatGLMTokenizer:
        """Overridden because 4.47 to 5.5 hide an error of `__init__` behind a missing protobuf, which none needs."""
        try:
            return super().from_pretrained(*args, **kwargs)
        except ImportError as error:
            raise (error.__context__ if isinstance(error.__context__, ValueError) else error) from None

    # ---- vocabulary ------------------------------------------------------------------------------------------
    @property
    def vocab_size(self) -> int:
        """Image tokens and text pieces, without tokens added by the user."""
        return self.num_image_tokens + self.sp.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, user-added ones included."""
        pieces = self.sp.id_to_piece(list(range(self.sp.get_piece_size())))
        names = [f"<image_{k}>" for k in range(self.num_image_tokens)] + pieces
        vocab = dict(zip(names, range(len(names))))
        vocab.update(getattr(self, "added_tokens_encoder", {}))
        return vocab

    def _convert_token_to_id(self, token: str) -> int:
        image = IMAGE_TOKEN.fullmatch(token)
        if image and int(image[1]) < self.num_image_tokens:
            return int(image[1])
        return self.sp.piece_to_id(token) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        """The piece, or nothing for the spare rows of the model (130344 to 130527), which no text leads to."""
        if 0 <= index < self.num_image_tokens:
            return f"<image_{index}>"
        piece = index - self.num_image_tokens
        return self.sp.id_to_piece(piece) if 0 <= piece < self.sp.get_piece_size() else ""

    @property
    def sp_tokenizer(self) -> OfficialParts:
        """What converters and stream decoders written for the official code reach into."""
        pieces = SimpleNamespace(sp=self.sp)
        return OfficialParts(tokenizer=self, text_tokenizer=pieces, vocab_file=self.vocab_file)

    # ---- text to ids -----------------------------------------------------------------------------------------
    def _spell(self, text: str) -> str:
        """Text as SentencePiece gets it; a lone surrogate is a UnicodeEncodeError, which is a ValueError."""
        text.encode()
        text = " ".join(text.split()) if self.remove_space else text
        return spell_whitespace(text.lower() if self.do_lower_case else text)

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """Pieces of a text; overridden because `split_special_tokens` is ignored below 4.34."""
        split = options.pop("split_special_tokens", self.split_special_tokens)
        return self._tokenize(text) if split else super().tokenize(text, **options)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.sp.encode(self._spell(text), out_type=str)

    def encode_text(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token: `<eop>` or `[MASK]` is spelled out, as are added tokens.

        Raises:
            ValueError: not a str, or a lone surrogate in it.
        """
        pieces = self.sp.encode(self._spell(_text(text, "The text to encode")))
        return [piece + self.num_image_tokens for piece in pieces]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        """The official layout: `text [gMASK] <sop>`, and for a pair `text [gMASK] <sop> second <eop>`."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None) -> list[int]:
        """0 for a prompt, 1 for what follows its `<sop>`; overridden because before 5.0 they come out too short."""
        return [0] * (len(token_ids_0) + 2) + ([] if token_ids_1 is None else [1] * (len(token_ids_1) + 1))

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False) -> list[int]:
        """1 where a token is added; overridden because transformers (4.23 to 5.24) knows no layout, and says 0."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        second = [] if token_ids_1 is None else [*[0] * len(token_ids_1), 1]
        return [*[0] * len(token_ids_0), 1, 1, *second]

    def truncate_sequences(self, ids, pair_ids=None, num_tokens_to_remove=0, **options):
        """Overridden because 5.x empties a part that is too short to be cut: it stays whole here, as up to 4.57."""
        strategy = options.get("truncation_strategy", "longest_first")
        part = (pair_ids or []) if strategy == "only_second" else ids
        is_one = pair_ids is None or strategy != "longest_first"
        if is_one and num_tokens_to_remove >= max(len(part), 1):
            warn_once(f"{num_tokens_to_remove} of {len(part)} tokens are to be cut, none is: raise max_length.")
            num_tokens_to_remove = 0
        return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, **options)

    def build_blank_input_ids(self, text: str) -> list[int]:
        """Ids that ask the model to fill the first `[MASK]` in a text: the text, then `<sop>`, without `[gMASK]`.

        White space beside `[MASK]` is dropped, as in the official encoding; other control tokens are spelled out.

        >>> tokenizer.convert_ids_to_tokens(tokenizer.build_blank_input_ids("AI [MASK] AI"))
        ['▁', 'AI', '[MASK]', '▁', 'AI', '<sop>']
        """
        first, *others = re.split(rf"\s*{re.escape(self.mask_token)}\s*", _text(text, "The text with a blank"))
        if not others:
            raise ValueError(f"There is no {self.mask_token} in {text!r}: put one where the model is to write.")
        ids = self.encode_text(first)
        for part in others:
            ids += [self.mask_token_id, *self.encode_text(part)]
        return [*ids, self.bos_token_id]

    # ---- conversations ---------------------------------------------------------------------------------------
    def build_prompt(self, query: str, history: list | None = None) -> str:
        """The official text of a chat: the query alone, or numbered rounds that end with it.

        history: earlier rounds, oldest first: (query, answer) pairs, or messages {"role", "content"} that end with an
        answer. The text of a "system" message (one at most, first) goes before the first query, on lines of its own.

        >>> print(tokenizer.build_prompt("它在哪里", [("介绍一下清华大学", "清华大学是中国的大学。")]))
        [Round 0]
        问：介绍一下清华大学
        答：清华大学是中国的大学。
        [Round 1]
        问：它在哪里
        答：
        """
        system, texts = _split(_messages([] if history is None else history))
        if len(texts) % 2:
            raise ValueError(f"The history ends with the query {texts[-1]!r}; it has to end with an answer.")
        return _prompt(system, [*texts, _text(query, "The query")])

    def build_chat_input_ids(self, query: str, history: list | None = None) -> list[int]:
        """Ids from which the model answers `query`: `build_prompt` in ids, then `[gMASK] <sop>`.

        Nothing in the query or the history becomes a control token.

        >>> ids = tokenizer.build_chat_input_ids("What does <eop> mean?")
        >>> tokenizer.convert_ids_to_tokens(ids[-2:]), tokenizer.eos_token_id in ids
        (['[gMASK]', '<sop>'], False)
        """
        return self.build_inputs_with_special_tokens(self.encode_text(self.build_prompt(query, history)))

    def apply_chat_template(self, conversation: Any, *, chat_template: str | None = None, **options: Any) -> Any:
        """A conversation, or a list of them, as text or ids: the ids of `build_chat_input_ids`.

        Overridden (4.23, which has no such method, to 5.24) because transformers encodes what a template writes, so
        that what a user typed could become a control token, and because `[gMASK]` is never parsed. A template, given
        here or the tokenizer's, that writes something else than `build_prompt` is left to transformers.

        Args:
            conversation: messages or (query, answer) pairs, as in `build_prompt`. It ends with a query (as a pair:
                (query, None)) or with an answer; that follows `[gMASK] <sop>` and is closed by `<eop>`, to train on.
            options: those of transformers. `return_assistant_tokens_mask` marks the last answer, the only one that
                the model can learn from; `tokenizer_kwargs` go to `pad`; tools, documents and such have no effect.

        Raises ValueError for a conversation of another shape or with other roles, or a flag that does not fit its end.
        """
        first = conversation[0] if conversation and isinstance(conversation, (list, tuple)) else None
        is_batch = isinstance(first, (list, tuple)) and not (first and isinstance(first[0], str))
        conversations = [_messages(one) for one in (conversation if is_batch else [conversation])]
        if all(self._writes_prompt(chat_template, one, **options) for one in conversations):
            return self._encode_chats(conversations, is_batch, **options)
        conversation = conversations if is_batch else conversations[0]
        return super().apply_chat_template(conversation, chat_template=chat_template, **options)

    def _writes_prompt(self, template: str | None, messages: list[Any], **options: Any) -> bool:
        """Whether a template (None: the tokenizer's own) writes what `build_prompt` does, or refuses what it does."""
        if template is None and self.chat_template is None:
            return True
        ours = theirs = None  # refused
        with contextlib.suppress(ValueError):
            ours = "".join(_chat_parts(messages, options.get("add_generation_prompt", False)))
        with contextlib.suppress(Exception):  # of whatever kind: the template will be used, and say so
            theirs = super().apply_chat_template(messages, chat_template=template, **{**options, **AS_TEXT})
        return ours == theirs

    def _encode_chats(self, conversations: list, is_batch: bool, truncation=False, max_length=None, **options) -> Any:
        """`apply_chat_template` without a template: the rounds of `build_prompt`."""
        prompted, continued = (bool(options.get(name)) for name in ("add_generation_prompt", "continue_final_message"))
        parts = [_chat_parts(one, prompted, continued) for one in conversations]
        if not options.get("tokenize", True):
            return ["".join(one) for one in parts] if is_batch else "".join(parts[0])
        rows = []
        for one in parts:
            cut = {"truncation": truncation, "max_length": max_length if truncation else None}
            row = self(*one, split_special_tokens=True, return_token_type_ids=True, **cut)
            unwanted = continued if len(one) == 2 else 0 if prompted else 2  # at the end
            rows.append({name: values[: len(values) - unwanted] for name, values in row.items()})
        pads = {"padding": options.get("padding", False), "max_length": max_length}
        tensors = options.get("return_tensors")
        encoded = self.pad(rows, return_tensors=tensors, **pads, **(options.get("tokenizer_kwargs") or {}))
        answers = encoded.pop("token_type_ids")
        if options.get("return_assistant_tokens_mask"):
            encoded["assistant_masks"] = answers
        if not is_batch and tensors is None:
            encoded = BatchEncoding({name: values[0] for name, values in encoded.items()})
        as_dict = options.get("return_dict")
        return encoded if (IS_TRANSFORMERS_5 if as_dict is None else as_dict) else encoded["input_ids"]

    # ---- ids to text -----------------------------------------------------------------------------------------
    def decode(self, token_ids: Any, skip_special_tokens=False, clean_up_tokenization_spaces=None, **options) -> Any:
        """Text of ids (an int, a list, an array or a tensor); of a batch, a list of texts.

        Control tokens and ids without a piece print nothing, `<unk>` prints " ⁇ "; padding is left out first, so that
        it can stand between the bytes of a character. Overridden (4.23 to 5.24) because up to 4.27 the clean-up is on
        unless the caller says otherwise, and 5.0 has none.
        """
        ids = to_py_obj(token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        if ids and isinstance(ids[0], (list, tuple)):
            return self.batch_decode(ids, skip_special_tokens, clean_up_tokenization_spaces, **options)
        hidden = {self.pad_token_id, *(self.all_special_ids if skip_special_tokens else ())}
        added = {index: token for token, index in self.get_added_vocab().items() if index >= self.vocab_size}
        tokens = (added.get(index) or self._convert_id_to_token(index) for index in ids if index not in hidden)
        texts: list[str] = []
        for is_added, run in groupby(filter(None, tokens), set(added.values()).__contains__):
            run = list(run)
            texts += run if is_added else [self.convert_tokens_to_string(run)]
        text = (" " if options.get("spaces_between_special_tokens", True) else "").join(texts)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        for mark in CLEANED_UP if clean_up_tokenization_spaces else ():
            text = text.replace(mark, mark.strip())
        return text

    def batch_decode(self, sequences: Any, *args: Any, **options: Any) -> list[str]:
        """A text for each row of ids; overridden because up to 4.27 it asks `decode` for the clean-up."""
        return [self.decode(row, *args, **options) for row in sequences]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp.decode_pieces([WHITESPACE.get(token, token) for token in tokens])

    if IS_TRANSFORMERS_5:

        @property
        def _tokenizer(self) -> Any:
            """`decode` as an object of the library tokenizers, whose DecodeStream makes the text of `transformers
            serve`. It encodes nothing, and is made anew where tokens were added."""
            made_for, twin = vars(self).get("_twin", (None, None))
            state = len(self), self.all_special_tokens
            if made_for != state:
                from tokenizers import Tokenizer, decoders, models

                me = weakref.proxy(self)  # Python's garbage collector does not see through the library's objects

                def texts(tokens: list[str]) -> list[str]:
                    return [me.decode(me.convert_tokens_to_ids(tokens), clean_up_tokenization_spaces=False)]

                twin = Tokenizer(models.WordLevel(self.get_vocab()))
                twin.add_special_tokens([str(token) for token in self.all_special_tokens])
                twin.decoder = decoders.Decoder.custom(SimpleNamespace(decode_chain=texts))
                self._twin = state, twin
            return twin

        def __getstate__(self) -> dict[str, Any]:
            return {k: v for k, v in vars(self).items() if k != "_twin"}  # which decodes by this very object

    # ---- files -----------------------------------------------------------------------------------------------
    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the complete `ice_text.model` into a folder, or to a file: what is no folder yet is a file."""
        path = Path(save_directory, VOCAB_FILE) if os.path.isdir(save_directory) else Path(save_directory)
        path.write_bytes(self.sp.serialized_model_proto())
        return (str(path),)


class OfficialParts(SimpleNamespace):
    """`[token]` is an id and `[id]` a token, image tokens counted."""

    def __getitem__(self, item: str | int) -> int | str:
        of = self.tokenizer
        return of.convert_tokens_to_ids(item) if isinstance(item, str) else of.convert_ids_to_tokens(item)


ChatGLMTokenizer.register_for_auto_class("AutoTokenizer")
