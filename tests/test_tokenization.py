"""The tokenizer: the original's ids, what differs on purpose, conversations, files, bad input."""

from __future__ import annotations

import contextlib
import copy
import doctest
import functools
import gc
import hashlib
import inspect
import json
import pickle
import re
import shutil
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from chatglm_slim.sentencepiece_file import (
    CONTROL_PIECES,
    MOST_BYTES,
    complete_processor,
    read_complete,
)
from chatglm_slim.tokenization_chatglm import IS_TRANSFORMERS_5, ChatGLMTokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizer

from package import copy_package

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests/golden/tokenizer.json").read_text())
SURROGATE = "a\udc00b"  # one golden string is no text at all
VARIANTS = ["real", "tiny"]


def model_folder(folder: Path, sp_model: Path, **config) -> Path:
    """What a Hub repository holds for its tokenizer: code, settings, SentencePiece model."""
    copy_package(folder)
    shutil.copy(sp_model, folder / "ice_text.model")
    released = json.loads((ROOT / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**released, **config}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def outside_of_the_repository(tmp_path_factory):
    """transformers 4.23 takes a tokenizer_config.json of the working directory for that of the model."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """from_pretrained on a fresh folder, as a user of the Hub would."""

    def load(sp_model, **config):
        folder = model_folder(tmp_path_factory.mktemp("model"), sp_model, **config)
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)

    return load


@pytest.fixture(scope="module")
def tiny(load, tiny_sp_model):
    return load(tiny_sp_model)


@pytest.fixture(scope="module")
def tiny_full(load, tiny_sp_model):
    """The tiny pieces behind 20000 image tokens."""
    return load(tiny_sp_model, num_image_tokens=20000)


@pytest.fixture(scope="module")
def tokenizers(request, load, tiny):
    """Looked up by variant; "real" skips where the real SentencePiece model is not at hand."""
    cache = {"tiny": tiny}

    def get(variant):
        if variant not in cache:
            offset = 20000 if variant == "real20k" else 0
            cache[variant] = load(request.getfixturevalue("real_sp_model"), num_image_tokens=offset)
        return cache[variant]

    return get


# ---- the original's ids --------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_golden_string_has_the_ids_pieces_and_texts_of_the_original(tokenizers, variant):
    tokenizer = tokenizers(variant)
    checked = 0
    for case in GOLDEN["strings"]:
        if case["text"] == SURROGATE:
            continue
        text, want = case["text"], case[variant]
        assert tokenizer(text)["input_ids"] == want["input_ids"], text
        assert tokenizer.encode(text, add_special_tokens=False) == want["ids"], text
        if "tokens" in want:  # not recorded for the long ones
            assert tokenizer.tokenize(text) == want["tokens"], text
            assert tokenizer.convert_tokens_to_ids(want["tokens"]) == want["ids"], text
        assert tokenizer.decode(want["ids"]) == want["decode_ids_no_cleanup"], text
        assert tokenizer.decode(want["ids"], clean_up_tokenization_spaces=True) == want["decode_ids"], text
        clean = {"clean_up_tokenization_spaces": True}
        assert tokenizer.decode(want["input_ids"], **clean) == want["decode_input_ids"], text
        assert tokenizer.decode(want["input_ids"], skip_special_tokens=True, **clean) == want["decode_input_ids_skip"]
        assert tokenizer.encode_text(text) == want["sp_encode"], text
        checked += 1
    assert checked == 108


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_vocabulary_ids_are_the_slim_ones_plus_the_image_tokens(load, tokenizers, variant):
    slim = tokenizers(variant)
    full = load(slim.vocab_file, num_image_tokens=20000)
    for case in GOLDEN["strings"]:
        if case["text"] != SURROGATE:
            ids = full(case["text"])["input_ids"]
            assert [index - 20000 for index in ids] == case[variant]["input_ids"]
            assert full.decode(ids) == slim.decode(case[variant]["input_ids"])
    for name in ("bos", "eos", "pad", "unk", "mask", "gmask", "end"):
        assert getattr(full, f"{name}_token_id") == getattr(slim, f"{name}_token_id") + 20000
    assert (full.vocab_size, len(full)) == (slim.vocab_size + 20000, len(slim) + 20000)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_golden_pair_is_laid_out_and_cut_as_by_the_original(tokenizers, variant):
    tokenizer = tokenizers(variant)
    for case in GOLDEN["pairs"]:
        a, b, want = case["a"], case["b"], case[variant]
        assert tokenizer(a, b)["input_ids"] == want["pair"]["input_ids"]
        padded = tokenizer(a, b, padding="max_length", max_length=32, truncation=True)
        assert padded["input_ids"] == want["pair_maxlen32"]["input_ids"]
        assert padded["attention_mask"] == [int(index != 3) for index in padded["input_ids"]]
        for strategy in ("longest_first", "only_first", "only_second"):
            cut = want[f"trunc12_{strategy}"]
            if isinstance(cut, list):
                assert tokenizer(a, b, truncation=strategy, max_length=12)["input_ids"] == cut
        assert tokenizer(a, truncation=True, max_length=6)["input_ids"] == want["single_trunc6"]
        left = copy.copy(tokenizer)
        left.truncation_side = "left"
        assert left(a, truncation=True, max_length=6)["input_ids"] == want["single_trunc6_left"]
        ids_a, ids_b = (tokenizer.encode(text, add_special_tokens=False) for text in (a, b))
        assert tokenizer.build_inputs_with_special_tokens(ids_a) == want["build_single"]
        assert tokenizer.build_inputs_with_special_tokens(ids_a, ids_b) == want["build_pair"]
        clean = {"clean_up_tokenization_spaces": True}
        assert tokenizer.decode(want["build_pair"], **clean) == want["decode_pair"]
        assert tokenizer.decode(want["build_pair"], skip_special_tokens=True, **clean) == want["decode_pair_skip"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_special_tokens_mask_marks_what_was_added(tokenizers, variant):
    """The original's mask is zero everywhere and, within an encoding, two or three entries short."""
    tokenizer = tokenizers(variant)
    for pair in ((), ("其二",)):
        encoded = tokenizer("其一", *pair, return_special_tokens_mask=True)
        marked = [i for i, m in zip(encoded["input_ids"], encoded["special_tokens_mask"]) if m]
        added = [tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
        assert marked == added[: 3 if pair else 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_golden_batch_has_the_original_ids_and_a_2d_mask(tokenizers, variant):
    """The original's [B,1,S,S] masks and [B,2,S] positions are the model's to derive: every generation API of
    transformers wants 2-D masks. Here a row of the mask says which tokens are no padding."""
    tokenizer = tokenizers(variant)
    forms = {
        "longest_list": {"padding": True},
        "longest_np": {"padding": True, "return_tensors": "np"},
        "maxlen20_np": {"padding": "max_length", "max_length": 20, "return_tensors": "np"},
        "multiple8_np": {"padding": True, "pad_to_multiple_of": 8, "return_tensors": "np"},
        "nopad": {},
    }
    for case in GOLDEN["batches"]:
        alone = [tokenizer(text)["input_ids"] for text in case["texts"]]
        for name, options in forms.items():
            encoded = tokenizer(case["texts"], **options)
            ids, masks = (getattr(rows, "tolist", lambda rows=rows: rows)() for rows in encoded.values())
            assert ids == case[variant][name]["input_ids"]
            for row, mask, own in zip(ids, masks, alone):
                assert mask == [0] * (len(row) - len(own)) + [1] * len(own)
                assert row[len(row) - len(own) :] == own
        assert list(encoded) == ["input_ids", "attention_mask"]
        assert tokenizer.batch_decode(ids, clean_up_tokenization_spaces=True) == case[variant]["batch_decode"]
        skipped = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        assert skipped == case[variant]["batch_decode_skip"]


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=lambda case: f"{case['variant']}-{case['ids'][:3]}")
def test_every_golden_decode_case(tokenizers, case):
    """Where the original raises IndexError, ids beyond the pieces that a model may still sample, nothing is shown."""
    tokenizer = tokenizers(case["variant"])
    plain, skipped = (want if isinstance(want, str) else "" for want in (case["decode"], case["decode_skip"]))
    assert tokenizer.decode(case["ids"]) == plain
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == skipped
    tokens = case["tokens"] if isinstance(case["tokens"], list) else [""]
    assert tokenizer.convert_ids_to_tokens(case["ids"]) == tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_vocabulary_facts_are_those_of_the_original(tokenizers, variant):
    tokenizer, want = tokenizers(variant), GOLDEN["meta"][variant]
    assert tokenizer.vocab_size == len(tokenizer) == want["vocab_size"]
    for token, index in want["token_to_id"].items():
        if not token.startswith("<image_"):  # of which a slim vocabulary has none: the original's id is a piece's
            assert tokenizer.convert_tokens_to_ids(token) == index
    if variant == "real":
        assert sorted(tokenizer.all_special_tokens) == sorted(want["all_special_tokens"])
        assert sorted(tokenizer.all_special_ids) == sorted(want["all_special_ids"])
        assert tokenizer.num_special_tokens_to_add() == want["num_special_single"]
        assert tokenizer.num_special_tokens_to_add(pair=True) == want["num_special_pair"]
        assert tokenizer.padding_side == want["padding_side"]


@pytest.mark.parametrize("offset", [0, 20000])
def test_get_vocab_holds_every_id_once(load, tiny_sp_model, offset):
    tokenizer = load(tiny_sp_model, num_image_tokens=offset)
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(tokenizer.vocab_size))
    assert all(tokenizer.convert_ids_to_tokens(index) == token for token, index in vocab.items())
    assert all(tokenizer.convert_tokens_to_ids(token) == index for token, index in vocab.items())


IMAGE_NAMES = ["<image_5>", "<image_0>", "<image_20000>", "<image_05>", "<image_٥>", f"<image_{'9' * 5000}>"]


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_image_tokens_are_those_of_the_vocabulary_and_no_other(tiny, tiny_full, name):
    """The original reads 5 out of `<image_5>` in a slim vocabulary too, where 5 is a piece of text."""
    assert tiny.convert_tokens_to_ids(name) == tiny.unk_token_id
    index = tiny_full.get_vocab().get(name, tiny_full.unk_token_id)
    assert tiny_full.convert_tokens_to_ids(name) == index


@pytest.mark.parametrize("number", [-1, 20001, 10**12, True, 2.5, "0"])
def test_number_of_image_tokens_that_no_vocabulary_has_is_refused_before_any_is_made(tiny_sp_model, number):
    with pytest.raises(ValueError, match="num_image_tokens is .*: it is 0"):
        ChatGLMTokenizer(str(tiny_sp_model), num_image_tokens=number)


# What transformers calls or offers under these names; a name that it drops makes the test fail on that version.
OVERRIDES = {
    "__init__",
    "_convert_id_to_token",
    "_convert_token_to_id",
    "_tokenize",
    "apply_chat_template",
    "batch_decode",
    "build_inputs_with_special_tokens",
    "convert_tokens_to_string",
    "create_token_type_ids_from_sequences",
    "decode",
    "from_pretrained",
    "get_special_tokens_mask",
    "get_vocab",
    "save_vocabulary",
    "tokenize",
    "truncate_sequences",
    "vocab_size",
}


def test_every_method_that_is_overridden_exists_in_this_version_of_transformers():
    inherited = {name for base in PreTrainedTokenizer.__mro__[:-1] for name in vars(base)} | {"__init__"}
    own = {
        name for name in vars(ChatGLMTokenizer) if callable(getattr(ChatGLMTokenizer, name)) or name == "vocab_size"
    }
    abstract = {"_convert_id_to_token", "_convert_token_to_id"}  # called by transformers, which need not define them
    too_new = set() if hasattr(PreTrainedTokenizer, "apply_chat_template") else {"apply_chat_template"}  # 4.34
    assert own & (inherited | abstract | too_new) == OVERRIDES


def test_use_leaves_no_trace_in_the_tokenizer(tiny_sp_model):
    """A cache that is keyed by the tokenizer's pickle (datasets' fingerprints) is found again."""
    tokenizer = ChatGLMTokenizer(str(tiny_sp_model))
    before = pickle.dumps(tokenizer)
    ids = tokenizer("你好 [MASK]", "b", truncation=True, max_length=6, padding="max_length")["input_ids"]
    tokenizer(["a  b", "c"] * 40, padding=True)
    tokenizer.decode(ids, skip_special_tokens=True)
    tokenizer.batch_decode([ids, ids], clean_up_tokenization_spaces=True)
    tokenizer.apply_chat_template([("hi", "hello")], return_assistant_tokens_mask=True)
    tokenizer.build_chat_input_ids("q", [("hi", "hello")])
    assert tokenizer.sp_tokenizer["<sop>"] == tokenizer.bos_token_id
    assert tokenizer.get_vocab()
    assert pickle.dumps(tokenizer) == before


@pytest.mark.parametrize("offset", [0, 20000])
def test_parts_have_the_names_that_converters_reach_for(tiny_sp_model, offset):
    tokenizer = ChatGLMTokenizer(str(tiny_sp_model), num_image_tokens=offset)
    parts = tokenizer.sp_tokenizer
    sp = parts.text_tokenizer.sp
    assert sp.serialized_model_proto() == tiny_sp_model.read_bytes() and parts.vocab_file == str(tiny_sp_model)
    assert [parts[index + offset] for index in range(sp.piece_size())] == sp.id_to_piece(list(range(sp.piece_size())))
    assert parts[tokenizer.gmask_token] == tokenizer.gmask_token_id == sp.piece_to_id("[gMASK]") + offset
    assert min(sp.get_score(index) for index in range(sp.piece_size())) < 0.0


# ---- text that a user typed ----------------------------------------------------------------------------------
CONTROL = ("<unk>", "<s>", "</s>", "<pad>", *CONTROL_PIECES)
EVERYTHING = st.text(st.characters(exclude_categories=["Cs"]))
TYPED = st.lists(st.one_of(st.sampled_from((*CONTROL, "<n>", "<|tab|>", "<|blank_5|>", " ", "\n", "\t")), EVERYTHING))
TYPED = TYPED.map("".join)
quick = settings(max_examples=60, deadline=None)


def control_ids(tokenizer):
    return {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("token", CONTROL)
def test_control_token_typed_in_a_chat_is_spelled_out(tokenizers, variant, token):
    tokenizer = tokenizers(variant)
    ids = tokenizer.build_chat_input_ids(f"what is {token} good for", [(f"{token}", f"a {token} b")])
    assert control_ids(tokenizer).isdisjoint(ids[:-2])
    assert tokenizer.decode(ids).count(token) == 3
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]


@quick
@given(query=TYPED, rounds=st.lists(st.tuples(TYPED, TYPED), max_size=3))
def test_chat_ids_hold_control_tokens_only_at_the_end(tiny, query, rounds):
    ids = tiny.build_chat_input_ids(query, rounds)
    assert control_ids(tiny).isdisjoint(ids[:-2])
    assert ids == [*tiny.encode_text(tiny.build_prompt(query, rounds)), tiny.gmask_token_id, tiny.bos_token_id]


def test_plain_encoding_still_parses_control_tokens_as_the_original_does(tiny):
    assert tiny.mask_token_id in tiny("a [MASK] b")["input_ids"]
    spelled = tiny("a [MASK] b", split_special_tokens=True)["input_ids"]
    assert spelled == tiny.build_inputs_with_special_tokens(tiny.encode_text("a [MASK] b"))
    assert tiny.mask_token_id not in spelled


def test_named_special_tokens_of_the_users_own_are_kept_and_those_of_chatglm_are_none(load, tiny_sp_model):
    names = {"image_token": "<img>", "gmask_token": "[gMASK]", "end_token": "</s>", "eop_token": "<eop>"}
    try:
        tokenizer = load(tiny_sp_model, extra_special_tokens=names)
    except (AttributeError, TypeError, ValueError):
        pytest.skip(f"transformers {version('transformers')} knows no named special tokens")
    if hasattr(tokenizer, "image_token"):
        (own,) = tokenizer("<img>", add_special_tokens=False)["input_ids"]
        assert own >= tokenizer.vocab_size and own in tokenizer.all_special_ids
    assert tokenizer.gmask_token_id not in tokenizer("a [gMASK] b", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_no_prompt_can_do_without_its_start_and_end(load, tiny_sp_model, name):
    with pytest.raises(ValueError, match="bos_token or eos_token is None"):
        load(tiny_sp_model, **{name: None})


@pytest.mark.parametrize("conversation", [{"role": "user", "content": "hi"}, 7])
def test_what_is_no_conversation_is_named(tiny, conversation):
    with pytest.raises(ValueError, match="not a list"):
        tiny.apply_chat_template(conversation)


def test_a_special_token_of_the_users_own_loads_by_either_name(load, tiny_sp_model):
    """transformers 5 writes the names of such tokens as `extra_special_tokens`, which means something else to 4.x."""
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokenizer = load(tiny_sp_model, **{name: ["<mine>"]})
        (own,) = tokenizer("<mine>", add_special_tokens=False)["input_ids"]
        assert own >= tokenizer.vocab_size and tokenizer.decode([own], skip_special_tokens=True) == ""


def test_a_tokenizer_may_be_set_to_spell_control_tokens_out(load, tiny_sp_model, tiny, tmp_path):
    tokenizer = load(tiny_sp_model, split_special_tokens=True)
    tokenizer.save_pretrained(str(tmp_path))
    for one in (tokenizer, ChatGLMTokenizer.from_pretrained(str(tmp_path))):
        ids = one("a [MASK] b", add_special_tokens=False)["input_ids"]
        assert ids == tiny.encode_text("a [MASK] b")


def test_blank_is_filled_from_mask_and_sop_without_gmask(tiny):
    ids = tiny.build_blank_input_ids("凡事预则立，[MASK] <eop>")
    assert ids.count(tiny.mask_token_id) == 1 and ids[-1] == tiny.bos_token_id
    assert tiny.gmask_token_id not in ids and tiny.eos_token_id not in ids
    official = tiny("凡事预则立，  [MASK]\n不预则废")["input_ids"]
    assert tiny.build_blank_input_ids("凡事预则立，  [MASK]\n不预则废") == official[:-2] + official[-1:]
    with pytest.raises(ValueError, match=r"no \[MASK\]"):
        tiny.build_blank_input_ids("nothing to fill")


def test_examples_in_the_docstrings_are_true(tiny):
    module = vars(sys.modules[ChatGLMTokenizer.__module__])
    examples = doctest.DocTestFinder().find(ChatGLMTokenizer, globs={**module, "tokenizer": tiny})
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results) >= 3
    assert not any(result.failed for result in results)


# ---- conversations -------------------------------------------------------------------------------------------
def test_prompts_have_the_original_text_and_ids(tiny, golden):
    cases = json.loads((golden / "model/chat2d/cases.json").read_text())["cases"]
    cases = [case for case in cases if case["kind"] == "chat" and case.get("input_ids")]
    assert len(cases) >= 8
    for case in cases:
        history = [tuple(pair) for pair in case["history"] or []]
        assert tiny.build_prompt(case["query"], history) == case["prompt"]
        assert tiny.build_chat_input_ids(case["query"], history) == case["input_ids"]
        assert tiny.build_chat_input_ids(case["query"], as_messages(history)) == case["input_ids"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_round_prompt_comes_from_its_history(tokenizers, variant):
    text = "[Round 0]\n问：hi\n答：hello\n[Round 1]\n问：  空格  \n答："
    want = next(case for case in GOLDEN["strings"] if case["text"] == text)
    assert tokenizers(variant).build_chat_input_ids("  空格  ", [("hi", "hello")]) == want[variant]["input_ids"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_answered_conversation_is_the_original_training_example(tokenizers, variant):
    tokenizer = tokenizers(variant)
    for case in GOLDEN["pairs"]:
        want = case[variant]["train_input_ids"]
        ids = list(tokenizer.apply_chat_template([(case["a"], case["b"])], return_dict=False))
        assert ids == want[: len(ids)] and set(want[len(ids) :]) <= {tokenizer.pad_token_id}


def as_messages(pairs, query=None, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answered in pairs:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages + ([{"role": "user", "content": query}] if query is not None else [])


def knows_generation() -> bool:
    method = getattr(PreTrainedTokenizer, "apply_chat_template", None)
    return method is not None and "return_assistant_tokens_mask" in inspect.signature(method).parameters


class Generation(Extension):
    """What marks an answer for training renders as if it were not there; transformers knows it from 4.42 on."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


@functools.lru_cache(maxsize=1)
def template():
    """chat_template.jinja in the environment that transformers renders it in."""

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string((ROOT / "chat_template.jinja").read_text())


def template_text(messages, add_generation_prompt):
    return template().render(messages=messages, add_generation_prompt=add_generation_prompt)


@quick
@given(query=EVERYTHING, rounds=st.lists(st.tuples(EVERYTHING, EVERYTHING), max_size=4), system=st.none() | EVERYTHING)
def test_template_file_renders_what_build_prompt_says(tiny, query, rounds, system):
    history, messages = as_messages(rounds, system=system), as_messages(rounds, query, system)
    prompt = tiny.build_prompt(query, history)
    assert template_text(messages, True) == prompt
    if system is None:
        assert tiny.build_prompt(query, rounds) == prompt
    for one, flag in ((messages, True), (messages, False), (messages[:-1], False)):
        if one and one[-1]["role"] != "system":
            text = tiny.apply_chat_template(one, tokenize=False, add_generation_prompt=flag)
            assert template_text(one, flag) == text


@pytest.mark.parametrize("roles", ["assistant", "user user", "user system", "user assistant assistant", "tool"])
def test_template_file_and_tokenizer_refuse_the_same_roles(tiny, roles):
    messages = [{"role": role, "content": "x"} for role in roles.split()]
    with pytest.raises(TemplateError, match="in turn"):
        template_text(messages, False)
    with pytest.raises(ValueError, match="in turn"):
        tiny.apply_chat_template(messages)


def test_text_in_parts_is_the_text_of_the_parts(tiny):
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    told = [("system", ["be ", "brief"]), ("user", ["你", "好 <eop>"]), ("assistant", ["您好"]), ("user", ["再见"])]
    whole = [{"role": role, "content": "".join(texts)} for role, texts in told]
    in_parts = [{"role": role, "content": parts(*texts)} for role, texts in told]
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": True, "tokenize": False}):
        assert tiny.apply_chat_template(in_parts, **options) == tiny.apply_chat_template(whole, **options)
    assert tiny.build_chat_input_ids("q", in_parts[:3]) == tiny.build_chat_input_ids("q", whole[:3])
    for other in ([*parts("a"), {"type": "image", "url": "x"}], parts(5)):
        with pytest.raises(ValueError, match="not a str"):
            tiny.apply_chat_template([{"role": "user", "content": other}], add_generation_prompt=True)


@pytest.mark.parametrize("content", [None, ["x"], [{"type": "image", "url": "x"}], 3])
def test_template_file_and_tokenizer_refuse_what_is_no_text(tiny, content):
    """Else the template, which would write it as Python does, would be taken for another one than the tokenizer's."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    for refused in (messages, messages[1:] + messages[:1], [{"role": "system", "content": content}, *messages[:1]]):
        with pytest.raises(TemplateError):
            template_text(refused, False)
        with pytest.raises(ValueError, match="not a str|is due"):
            tiny.apply_chat_template(refused)
    for nothing in ([], [{"role": "system", "content": "x"}]):
        with pytest.raises(TemplateError):
            template_text(nothing, False)


def test_system_message_leads_the_first_query(tiny):
    assert tiny.build_prompt("q", [{"role": "system", "content": "s"}]) == "s\nq"
    history = as_messages([("q0", "a0")], system="s")
    assert tiny.build_prompt("q1", history) == tiny.build_prompt("q1", [("s\nq0", "a0")])


@pytest.mark.parametrize("rounds", [[], [("你好", "你好！")], [("a", "b\n"), ("", "  c")]])
def test_chat_template_gives_the_ids_of_chat(tiny, rounds):
    ids = tiny.build_chat_input_ids("再见", rounds)
    for conversation in (as_messages(rounds, "再见"), [*rounds, ("再见", None)]):
        options = {"add_generation_prompt": True}
        assert tiny.apply_chat_template(conversation, return_dict=False, **options) == ids
        encoded = tiny.apply_chat_template(conversation, return_dict=True, return_tensors="np", **options)
        assert encoded["input_ids"].tolist() == [ids] and encoded["attention_mask"].tolist() == [[1] * len(ids)]
        assert tiny.apply_chat_template(conversation, tokenize=False, **options) == tiny.build_prompt("再见", rounds)


def test_chat_template_returns_what_the_installed_transformers_returns(tiny):
    returned = tiny.apply_chat_template(as_messages([], "hi"), add_generation_prompt=True)
    if hasattr(PreTrainedTokenizer, "_batch_encode_plus"):  # 4.x
        assert returned == tiny.build_chat_input_ids("hi")
    else:
        assert isinstance(returned, BatchEncoding) and returned["input_ids"] == tiny.build_chat_input_ids("hi")


def test_batch_of_conversations_is_padded_on_the_left(tiny):
    batch = [as_messages([], "hi"), as_messages([("hi", "hello")], "and you")]
    rows = [tiny.build_chat_input_ids("hi"), tiny.build_chat_input_ids("and you", [("hi", "hello")])]
    options = {"add_generation_prompt": True, "return_dict": True}
    assert tiny.apply_chat_template(batch, **options)["input_ids"] == rows
    padded = tiny.apply_chat_template(batch, padding=True, return_tensors="np", **options)
    assert padded["input_ids"].tolist() == [[3] * (len(rows[1]) - len(rows[0])) + rows[0], rows[1]]
    assert padded["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    kwargs = {"tokenizer_kwargs": {"pad_to_multiple_of": 16}}
    assert (
        tiny.apply_chat_template(batch, padding=True, return_tensors="np", **kwargs, **options)["input_ids"].shape[1]
        % 16
        == 0
    )


def test_truncated_conversation_still_calls_for_an_answer(tiny):
    options = {"add_generation_prompt": True, "return_dict": False}
    whole = tiny.apply_chat_template([("one two three four", None)], **options)
    cut = tiny.apply_chat_template([("one two three four", None)], truncation=True, max_length=8, **options)
    assert cut == whole[:6] + whole[-2:]


def test_flags_decide_how_a_conversation_ends(tiny):
    asked, answered = as_messages([], "hi"), as_messages([("hi", "hello")])
    ids = {
        name: tiny.apply_chat_template(messages, return_dict=False, **flags)
        for name, messages, flags in (
            ("query", asked, {}),
            ("prompt", asked, {"add_generation_prompt": True}),
            ("open", answered, {"continue_final_message": True}),
            ("closed", answered, {}),
        )
    }
    assert ids["query"] == tiny.encode_text("hi")
    assert ids["prompt"] == tiny.build_chat_input_ids("hi")
    assert ids["open"] == ids["prompt"] + tiny.encode_text("hello")
    assert ids["closed"] == ids["open"] + [tiny.eos_token_id]
    with pytest.raises(ValueError, match="ends with an answer"):
        tiny.apply_chat_template(answered, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="ends with an answer"):
        template_text(answered, True)
    with pytest.raises(ValueError, match="ends with a query"):
        tiny.apply_chat_template(asked, continue_final_message=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_masks_mark_the_answer_that_can_be_learnt(tiny, side):
    tokenizer = copy.copy(tiny)
    tokenizer.padding_side = side
    chats = [as_messages([("hi", "hello")]), as_messages([("hi", "hello"), ("and you", "fine")])]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(chats, padding=True, return_tensors="np", **options)
    for ids, mask, answer in zip(encoded["input_ids"], encoded["assistant_masks"], ("hello", "fine")):
        assert ids[mask == 1].tolist() == [*tiny.encode_text(answer), tiny.eos_token_id]
    alone = tokenizer.apply_chat_template(chats[0], **options)
    assert sum(alone["assistant_masks"]) == len(tiny.encode_text("hello")) + 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_cut_training_example_keeps_its_control_tokens_and_the_mask_of_its_answer(tiny, side):
    tokenizer = copy.copy(tiny)
    tokenizer.truncation_side = side
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    query, answer = "one two three four", "five six seven eight"
    cut = tokenizer.apply_chat_template([(query, answer)], truncation=True, max_length=9, **options)
    assert cut["input_ids"] == tokenizer(query, answer, truncation=True, max_length=9)["input_ids"]
    start = cut["input_ids"].index(tiny.bos_token_id) + 1
    assert len(cut["input_ids"]) == 9 and cut["input_ids"][start - 2] == tiny.gmask_token_id
    assert cut["assistant_masks"] == [0] * start + [1] * (9 - start) and cut["input_ids"][-1] == tiny.eos_token_id


@pytest.mark.skipif(not hasattr(PreTrainedTokenizer, "apply_chat_template"), reason="transformers < 4.34")
def test_template_of_the_user_is_left_to_transformers(tiny):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
    messages = as_messages([("hi", "hello")])
    assert tiny.apply_chat_template(messages, chat_template=template, tokenize=False) == "user: hi;assistant: hello;"
    ids = tiny.apply_chat_template(messages, chat_template=template, return_tensors="np", padding=True)
    assert tiny.decode((ids if isinstance(ids, np.ndarray) else ids["input_ids"])[0]) == "user: hi;assistant: hello;"
    own = copy.deepcopy(tiny)
    own.chat_template = template
    assert own.apply_chat_template(messages, tokenize=False) == "user: hi;assistant: hello;"
    ids = own.apply_chat_template(messages)
    assert tiny.decode(ids if isinstance(ids, list) else ids["input_ids"]) == "user: hi;assistant: hello;"


@pytest.mark.skipif(not knows_generation(), reason="transformers < 4.42 knows no {% generation %}, and reads no file")
def test_template_that_says_the_same_in_other_words_keeps_typed_control_tokens_out(tiny):
    own = copy.deepcopy(tiny)
    shipped = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    own.chat_template = re.sub(r"\{#.*?#\}", "", shipped).replace("{%-", "{%-   ").replace("    ", "")
    assert own.chat_template != shipped
    messages = as_messages([("hi", "<eop>")], "what does <eop> do")
    assert own.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == (
        tiny.build_chat_input_ids("what does <eop> do", [("hi", "<eop>")])
    )
    own.chat_template = shipped.replace("问：", "Q: ")
    assert "Q: what does" in own.apply_chat_template(messages, tokenize=False)
    own.chat_template = shipped.replace('{{- raise_exception("Give', "{{- ('' ~ \"Give")
    answered = own.apply_chat_template([*messages[:2], {"role": "tool", "content": "x"}], tokenize=False)
    assert "Give at most one" in answered


def test_other_roles_are_refused_by_name(tiny):
    """Libraries probe a template with the roles of tool calls."""
    messages = [*as_messages([("a", "b")]), {"role": "tool", "content": "c"}]
    with pytest.raises(ValueError, match="Message 2 has the role 'tool' where 'user' is due"):
        tiny.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "history, message",
    [
        (["hi"], "Round 0 is 'hi'"),
        ([("hi",)], "Round 0"),
        ([("hi", "a"), ("b", None)], "ends with the query 'b'"),
        ([("hi", None), ("b", "c")], "assistant's text of round 0 is None"),
        ([(1, "a")], "user's text of round 0 is 1"),
        ([{"role": "user", "content": "hi"}], "ends with the query 'hi'"),
        ([{"role": "user"}], "Message 0"),
        ([{"role": "user", "content": "hi"}, ("a", "b")], "Message 1"),
        ([{"role": "user", "content": ["hi"]}], "user's text of round 0"),
        ([{"role": "assistant", "content": "hi"}], "'assistant' where 'user' is due"),
        (7, "conversation is 7"),
        ("hi", "conversation is 'hi'"),
    ],
)
def test_history_of_another_shape_is_refused_by_name(tiny, history, message):
    with pytest.raises(ValueError, match=message):
        tiny.build_chat_input_ids("q", history)


@pytest.mark.parametrize("query", [None, 3, b"hi", ["hi"]])
def test_query_that_is_no_text_is_refused(tiny, query):
    with pytest.raises(ValueError, match="not a str"):
        tiny.build_chat_input_ids(query)
    with pytest.raises(ValueError, match="not a str"):
        tiny.encode_text(query)


@pytest.mark.parametrize("conversation", [[], "hi", None, [[]], as_messages([], system="s")])
def test_conversation_without_a_query_is_refused(tiny, conversation):
    with pytest.raises(ValueError, match="[Cc]onversation"):
        tiny.apply_chat_template(conversation)


# ---- files ---------------------------------------------------------------------------------------------------
def test_saved_tokenizer_loads_and_encodes_the_same(tiny, tmp_path):
    tiny.save_pretrained(str(tmp_path))
    again = ChatGLMTokenizer.from_pretrained(str(tmp_path))
    text = "你好  a [MASK] b\n\t[gMASK]x"
    assert again(text)["input_ids"] == tiny(text)["input_ids"]
    assert (tmp_path / "ice_text.model").read_bytes() == Path(tiny.vocab_file).read_bytes()


def test_save_vocabulary_takes_the_name_of_a_file(tiny, tmp_path):
    for path in (tmp_path / "vocabulary.model", tmp_path / "no_suffix"):
        assert tiny.save_vocabulary(str(path)) == (str(path),)
        assert ChatGLMTokenizer(str(path))("你好")["input_ids"] == tiny("你好")["input_ids"]


def test_first_release_file_is_completed_in_memory_and_on_save(load, golden, tiny, tmp_path):
    """Its tokenizer_config.json names no number of image tokens, and </s> as eos; the model stops at <eop>."""
    tokenizer = load(golden / "tiny_sp_preslim.model", num_image_tokens=None, eos_token="</s>", eop_token="<eop>")
    assert tokenizer.num_image_tokens == 20000
    text = "你好  a [MASK] b\n\t龘"
    assert tokenizer(text)["input_ids"] == [index + 20000 for index in tiny(text)["input_ids"]]
    assert tokenizer.eos_token_id == tiny.eos_token_id + 20000
    tokenizer.save_pretrained(str(tmp_path))
    completed = serialized((golden / "tiny_sp_preslim.model").read_bytes())
    assert (tmp_path / "ice_text.model").read_bytes() == completed
    assert ChatGLMTokenizer.from_pretrained(str(tmp_path))(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_official_settings_file_does_not_make_gmask_parsed(load, tiny_sp_model, tiny):
    """It names gmask_token and end_token, which transformers 5 takes for special tokens."""
    tokenizer = load(tiny_sp_model, gmask_token="[gMASK]", end_token="</s>")
    assert tokenizer("[gMASK] </s>")["input_ids"] == tiny("[gMASK] </s>")["input_ids"]
    assert sorted(tokenizer.all_special_tokens) == sorted(tiny.all_special_tokens)
    assert (tokenizer.gmask_token_id, tokenizer.end_token_id) == (tiny.gmask_token_id, tiny.end_token_id)


def test_completed_first_release_file_is_the_final_file(golden):
    """But for the name that its training run had, and the length of the settings that hold it."""
    final = (golden / "tiny_sp.model").read_bytes()
    completed = serialized((golden / "tiny_sp_preslim.model").read_bytes())
    assert completed.replace(b"\x128\x12\x0ftiny_sp_preslim", b"\x120\x12\x07tiny_sp") == final
    assert serialized(final) == final
    assert serialized(completed) == completed
    files = (golden / "tiny_sp_preslim.model").read_bytes(), completed, final
    assert [complete_processor(file)[1] for file in files] == [False, True, True]


def test_completed_real_first_release_file_has_the_published_hash(real_sp_model):
    first_release = real_sp_model.with_name("ice_text.preslim.model")
    if not first_release.is_file():
        pytest.skip(f"no {first_release.name} beside {real_sp_model}")
    completed = serialized(first_release.read_bytes())
    assert hashlib.sha256(completed).hexdigest() == "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"
    assert completed == real_sp_model.read_bytes()


def serialized(model):
    """What is saved of a model."""
    return complete_processor(model)[0].serialized_model_proto()


PIECE_END = b"\x15\0\0\0\0\x18"  # score 0.0, then the type


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda model: b"", "begins with"),
        (
            lambda model: b"version https://git-lfs.github.com/spec/v1\noid sha256:5e97\n",
            "damaged or no SentencePiece model",
        ),
        (lambda model: model[:1000], "damaged or no SentencePiece model"),
        (lambda model: model[:-1000], "damaged or no SentencePiece model"),
        (lambda model: model[: model.index(b"\x0a\x0b", 9000)], "cut off"),
        (lambda model: model[: model.index(b"nmt_nfkc") - 6], "cut off"),
        (lambda model: model.replace(b"<n>", b"<N>"), "begins with"),
        (lambda model: model.replace(b"<dBLOCK>", b"<dbLOCK>"), "already defined"),
        (lambda model: model.replace(b"<0xFE>", b"<0xFf>"), "byte piece <0xFf> is invalid"),
        (lambda model: model.replace(b"<sop>" + PIECE_END + b"\3", b"<sop>" + PIECE_END + b"\4"), "already defined"),
    ],
    ids=[
        "empty",
        "pointer",
        "cut",
        "short",
        "cut-between-pieces",
        "without-settings",
        "other-family",
        "without-control",
        "without-byte",
        "wrong-type",
    ],
)
def test_file_that_is_no_ice_text_model_is_refused(tiny_sp_model, tmp_path, spoil, message):
    spoiled = spoil(tiny_sp_model.read_bytes())
    with pytest.raises(ValueError, match=message):
        complete_processor(spoiled)
    path = tmp_path / "ice_text.model"
    path.write_bytes(spoiled)
    with pytest.raises(ValueError, match="download it again"):
        ChatGLMTokenizer(str(path))


@pytest.mark.parametrize("first_release", [False, True])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_a_value_error_wherever_it_is(golden, first_release, data):
    model = (golden / ("tiny_sp_preslim.model" if first_release else "tiny_sp.model")).read_bytes()
    start = data.draw(st.integers(0, len(model)))
    spoiled = model[:start] + data.draw(st.binary(max_size=12)) + model[start + data.draw(st.integers(0, 12)) :]
    with contextlib.suppress(ValueError):
        processor, _ = complete_processor(spoiled)
        processor.encode("你好  a\n")


@pytest.mark.parametrize("bomb", [b"\xff" * 4_000_000, b"\x78" + b"\x80" * 4_000_000, b"\x7a" + b"\xff" * 9 + b"\x01"])
def test_number_without_an_end_is_refused_at_its_tenth_byte(tiny_sp_model, bomb):
    """Reading on would take hours: the time is quadratic in the length."""
    for model in (tiny_sp_model.read_bytes() + bomb, bomb):
        with pytest.raises(ValueError, match="download it again"):
            complete_processor(model)


def test_file_too_large_for_a_vocabulary_is_refused_unread(tmp_path):
    path = tmp_path / "ice_text.model"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        read_complete(path)
    assert MOST_BYTES > 2 * 2_706_249


def test_missing_vocabulary_is_said_in_one_line_with_its_cure(tmp_path, tiny_sp_model):
    folder = model_folder(tmp_path, tiny_sp_model)
    (folder / "ice_text.model").unlink()
    with pytest.raises(ValueError, match="python slim.py THUDM/chatglm-6b OUT") as error:
        AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_and_pickles_work_like_the_tokenizer(tiny_sp_model, clone):
    tokenizer = ChatGLMTokenizer(str(tiny_sp_model), num_image_tokens=20000)
    tokenizer.add_tokens(["<mine>"])
    cloned, text = clone(tokenizer), "你好  a [MASK] b <mine>"
    assert cloned(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert cloned.decode(tokenizer(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


# ---- tokens added by the user --------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0, 20000])
def test_added_tokens_are_parsed_saved_and_decoded(tiny_sp_model, tmp_path, offset):
    tokenizer = ChatGLMTokenizer(str(tiny_sp_model), num_image_tokens=offset)
    assert tokenizer.add_tokens(["<mine>", "龘龘"]) == 2
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]}) == 1
    tokenizer.save_pretrained(str(tmp_path))
    for one in (tokenizer, ChatGLMTokenizer.from_pretrained(str(tmp_path))):
        assert len(one) == tokenizer.vocab_size + 3
        ids = one.encode("a<mine> 龘龘 b<tool>c", add_special_tokens=False)
        new = [index for index in ids if index >= one.vocab_size]
        assert one.convert_ids_to_tokens(new) == ["<mine>", "龘龘", "<tool>"]
        assert one.decode(ids) == "a <mine> 龘龘 b <tool> c"
        assert one.decode(ids, skip_special_tokens=True) == "a <mine> 龘龘 b c"
        assert one.decode(ids, spaces_between_special_tokens=False) == "a<mine>龘龘b<tool>c"
        assert set(one.get_vocab().values()) == set(range(len(one)))


@pytest.mark.parametrize("name", ["pad", "unk", "mask"])
def test_a_special_token_may_be_none(tiny_sp_model, tiny, tmp_path, name):
    tokenizer = ChatGLMTokenizer(str(tiny_sp_model), **{f"{name}_token": None})
    tokenizer.save_pretrained(str(tmp_path))
    for one in (tokenizer, ChatGLMTokenizer.from_pretrained(str(tmp_path))):
        assert len(one) == len(tiny) and "None" not in one.get_vocab()
        assert getattr(one, f"{name}_token") is None and getattr(one, f"{name}_token_id") is None
        assert one.decode(one("你好")["input_ids"]) == "你好"


# ---- bad input, odd input, much input ------------------------------------------------------------------------
@pytest.mark.parametrize("encode", ["__call__", "encode", "encode_text", "tokenize", "build_chat_input_ids"])
def test_lone_surrogate_is_refused(tiny, encode):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        getattr(tiny, encode)(SURROGATE)
    if encode == "__call__":
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tiny(["fine"] * 100 + [SURROGATE])


@pytest.mark.parametrize("text", [None, 3, 1.5, b"hi", ["fine", None], [3.5], {"a": "b"}])
def test_what_is_no_text_is_refused(tiny, text):
    with pytest.raises((ValueError, TypeError)):
        tiny(text)


def test_lower_case_and_space_settings_leave_special_tokens_alone(load, tiny_sp_model, tiny):
    lower = load(tiny_sp_model, do_lower_case=True)
    assert lower("SAY Hi [MASK] <eop>")["input_ids"] == tiny("say hi [MASK] <eop>")["input_ids"]
    assert lower(["SAY", "Hi [MASK]"])["input_ids"] == tiny(["say", "hi [MASK]"])["input_ids"]
    one_space = load(tiny_sp_model, remove_space=True)
    assert one_space("  a \n\t b  ")["input_ids"] == tiny("a b")["input_ids"]


def test_cut_that_would_leave_nothing_leaves_the_text_and_says_so(tiny, caplog):
    sys.modules[type(tiny).__module__].warn_once.cache_clear()
    for text in ("你好", ["你好", "hi"]):
        with caplog.at_level("WARNING"):
            assert tiny(text, truncation=True, max_length=2)["input_ids"] == tiny(text)["input_ids"]
    assert "raise max_length" in caplog.text


def test_decode_takes_every_form_of_ids(tiny):
    ids = tiny.encode_text("你好  x")
    for form in (
        ids,
        tuple(ids),
        np.array(ids),
        torch.tensor(ids),
        [np.int64(i) for i in ids],
        list(torch.tensor(ids)),
    ):
        assert tiny.decode(form) == "你好  x"
    for form in (ids[1], np.int64(ids[1]), torch.tensor(ids[1])):
        assert tiny.decode(form) == tiny.decode([ids[1]])
    for batch in ([ids, ids], np.array([ids, ids]), torch.tensor([ids, ids]), [torch.tensor(ids), torch.tensor(ids)]):
        assert tiny.batch_decode(batch) == ["你好  x"] * 2
    assert tiny.batch_decode([]) == []
    assert tiny.decode([]) == ""


def test_pieces_that_only_spell_a_newline_stay_what_they_are(tiny):
    """The original prints a newline for them too: it replaces `<n>` in the text. A typed `<n>` is one in both."""
    tokens = ["<", "n", ">", "<n>", "<|tab|>", "<|blank_3|>"]
    ids = tiny.convert_tokens_to_ids(tokens)
    assert tiny.unk_token_id not in ids
    assert tiny.decode(ids) == tiny.convert_tokens_to_string(tokens) == "<n>\n\t   "
    assert tiny.decode(tiny.encode_text("a<n>b")) == "a\nb"


def test_ids_without_a_piece_print_nothing(tiny):
    ids = tiny.encode_text("你好")
    assert tiny.decode([*ids, tiny.vocab_size, tiny.vocab_size + 183, -100]) == "你好"


def test_what_prints_nothing_does_not_break_a_character(tiny):
    """Between the bytes of a character: padding, ids without a piece and, where they are skipped, special tokens."""
    first, *others = tiny.convert_tokens_to_ids(["<0xE9>", "<0xBE>", "<0x98>"])
    for between in ([tiny.pad_token_id], [tiny.vocab_size, -100], [tiny.pad_token_id] * 3):
        assert tiny.decode([first, *between, *others]) == "龘"
    assert tiny.decode([first, tiny.eos_token_id, *others], skip_special_tokens=True) == "龘"


# ---- streams -------------------------------------------------------------------------------------------------
def streamed(twin, ids) -> str:
    """As `transformers serve` decodes: token by token, control tokens left out."""
    stream = decoders.DecodeStream(skip_special_tokens=True)
    return "".join(filter(None, (stream.step(twin, index) for index in ids)))


has_streams = pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="`transformers serve` streams from 5 on")


@has_streams
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decode_stream_says_what_decode_says(tokenizers, variant):
    tokenizer = tokenizers(variant)
    cases = [case[variant] for case in GOLDEN["strings"] if case["text"] != SURROGATE]
    assert len(cases) == 108
    twin = tokenizer._tokenizer
    for case in cases:
        for ids in (case["ids"], [*case["input_ids"], tokenizer.eos_token_id]):
            assert streamed(twin, ids) == tokenizer.decode(ids, skip_special_tokens=True)


@has_streams
def test_a_decode_stream_waits_for_whole_characters_and_knows_added_tokens(tiny_sp_model):
    tokenizer = ChatGLMTokenizer(str(tiny_sp_model))
    tokenizer.add_tokens(["<mine>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    ids = tokenizer.encode("a<mine> 龘👋 b<tool>c", add_special_tokens=False)
    assert streamed(tokenizer._tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)
    half, whole = ["▁a", "<0xE9>", "<0xBE>"], ["▁a", "<0xE9>", "<0xBE>", "<0x98>"]
    assert streamed(tokenizer._tokenizer, tokenizer.convert_tokens_to_ids(half)) == "a"
    assert streamed(tokenizer._tokenizer, tokenizer.convert_tokens_to_ids(whole)) == "a龘"
    assert not tokenizer.is_fast, "encoding stays SentencePiece's"


@has_streams
def test_what_streams_decode_with_is_made_once_and_anew_for_added_tokens_and_stays_out_of_copies(tiny_sp_model):
    tokenizer = ChatGLMTokenizer(str(tiny_sp_model))
    before, twin = pickle.dumps(tokenizer), tokenizer._tokenizer
    assert tokenizer._tokenizer is twin and pickle.dumps(tokenizer) == before
    assert copy.copy(tokenizer)._tokenizer is not twin
    for other in (copy.deepcopy(tokenizer), pickle.loads(before), tokenizer):
        other.add_tokens(["<mine>"])
        assert streamed(other._tokenizer, other.encode("a<mine>b", add_special_tokens=False)) == "a <mine> b"
    assert tokenizer._tokenizer is not twin
    tokenizer.add_special_tokens({"additional_special_tokens": ["你"]})  # a piece, no longer shown
    ids = tokenizer.convert_tokens_to_ids(["▁a", "你", "b"])
    assert streamed(tokenizer._tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True) == "ab"


@has_streams
def test_a_tokenizer_that_streamed_is_freed_when_nobody_has_it(tiny_sp_model):
    tokenizer = ChatGLMTokenizer(str(tiny_sp_model))
    assert streamed(tokenizer._tokenizer, tokenizer.encode_text("你好")) == "你好"
    seen = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert seen() is None


@pytest.mark.skipif(IS_TRANSFORMERS_5, reason="what transformers 4 does at loading")
def test_loading_makes_nothing_for_streams_on_transformers_4(tiny):
    assert not hasattr(tiny, "_tokenizer")


# ---- properties ----------------------------------------------------------------------------------------------
ALPHABETS = ("abXY019 .,!?;:'\"()[]{}#$%&*+-/=@_`~^", "你好世界。的龘，！？", "👋😀é한", "\n\t ")
PLAIN = st.lists(st.one_of(*map(st.text, ALPHABETS), st.sampled_from([" " * 80, " " * 81, " " * 162])), max_size=8)
PLAIN = PLAIN.map("".join)
FULL_WIDTH = str.maketrans("，！？", ",!?")  # what NFKC changes of these


def as_the_rules_leave_it(text):
    """A lone blank at either end is dropped; one that 80 or 160 blanks leave over at the end is alone."""
    text = text.translate(FULL_WIDTH)
    trailing = len(text) - len(text.rstrip(" "))
    text = text[1:] if text.startswith(" ") and not text.startswith("  ") else text
    return text[:-1] if trailing % 80 == 1 else text


@pytest.mark.parametrize("variant", VARIANTS)
@quick
@given(text=PLAIN)
@example(" " * 161)
@example(" ")
def test_decoding_gives_back_the_normalised_text(tokenizers, variant, text):
    tokenizer = tokenizers(variant)
    for ids in (tokenizer.encode_text(text), tokenizer(text)["input_ids"]):
        assert tokenizer.decode(ids) == as_the_rules_leave_it(text)


@quick
@given(text=TYPED)
def test_offset_moves_every_id_by_exactly_the_image_tokens(tiny, tiny_full, text):
    assert tiny_full.encode_text(text) == [index + 20000 for index in tiny.encode_text(text)]
    ids = tiny(text)["input_ids"]
    assert tiny_full(text)["input_ids"] == [index + 20000 for index in ids]
    assert tiny_full.decode([index + 20000 for index in ids]) == tiny.decode(ids)


@quick
@given(texts=st.lists(TYPED, min_size=1, max_size=5), extra=st.integers(0, 9))
def test_padding_changes_no_row(tiny, texts, extra):
    alone = [tiny(text)["input_ids"] for text in texts]
    width = max(map(len, alone)) + extra
    batch = tiny(texts, padding="max_length", max_length=width)
    for row, mask, ids in zip(batch["input_ids"], batch["attention_mask"], alone):
        assert row == [tiny.pad_token_id] * (width - len(ids)) + ids
        assert mask == [0] * (width - len(ids)) + [1] * len(ids)
    assert tiny.batch_decode(batch["input_ids"]) == [tiny.decode(ids) for ids in alone]


@quick
@given(
    rows=st.one_of(st.lists(TYPED, min_size=1), st.lists(st.tuples(TYPED, TYPED), min_size=1)),
    limit=st.none() | st.integers(4, 12),
    strategy=st.sampled_from([True, "only_first", "longest_first"]),
    special=st.booleans(),
)
def test_batch_is_encoded_as_its_rows_are(tiny, rows, limit, strategy, special):
    """Batches go past the row-by-row way of transformers, which encodes single texts."""
    options = {"add_special_tokens": special}
    options.update({} if limit is None else {"truncation": strategy, "max_length": limit})
    batch = tiny(rows, **options)
    alone = [tiny(*([row] if isinstance(row, str) else row), **options) for row in rows]
    for name in ("input_ids", "attention_mask"):
        assert batch[name] == [one[name] for one in alone]
    told = tiny(rows, return_special_tokens_mask=True, **options)  # row by row again
    assert told["input_ids"] == batch["input_ids"]


def test_batch_on_threads_is_encoded_as_on_one(tiny):
    rows = [f"第 {i} 行\n  x" + (" [MASK]" if i % 7 == 0 else "") for i in range(300)]
    assert tiny(rows)["input_ids"] == [tiny(row)["input_ids"] for row in rows]


# ---- much input ----------------------------------------------------------------------------------------------
class Counting:
    """SentencePiece, which counts the characters that it is given."""

    def __init__(self, sp):
        self.sp, self.given = sp, 0

    def __getattr__(self, name):
        return getattr(self.sp, name)

    def encode(self, text, **options):
        self.given += len(text)
        return self.sp.encode(text, **options)

    def decode_pieces(self, pieces):
        self.given += sum(map(len, pieces))
        return self.sp.decode_pieces(pieces)


def work(monkeypatch, tokenizer, method: str, argument) -> tuple[int, int]:
    """Calls of functions, Python's and those in C, and characters for SentencePiece, in one call of the method."""
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        calls += event in ("call", "c_call")

    with monkeypatch.context() as patches:
        counting = Counting(tokenizer.sp)
        patches.setattr(tokenizer, "sp", counting)
        sys.setprofile(count)
        try:
            getattr(tokenizer, method)(argument)
        finally:
            sys.setprofile(None)
    return calls, counting.given


MUCH = {
    "blanks": " " * 1000,
    "newlines": "\n" * 1000,
    "code": "\tif x:  # 注释\n" + " " * 12 + "y = [1, 2]\n",
    "one-word": "a" * 1000,
    "control-tokens": "x [MASK] <sop> 你好 ",
    "unclosed": "<|blank_<|<n[MASK" * 10,
}


@pytest.mark.parametrize("unit", MUCH.values(), ids=MUCH)
def test_encoding_and_decoding_are_linear_in_the_length(tiny, monkeypatch, unit):
    """Eight times as much text is eight times as many calls and characters, but for where the text begins and ends."""
    short = unit * (5_000 // len(unit))
    long = 8 * short
    parts = {"__call__": (short, long), "encode_text": (short, long)}
    parts["decode"] = tuple(tiny(text)["input_ids"] for text in (short, long))
    for method, (little, much) in parts.items():
        few, many = work(monkeypatch, tiny, method, little), work(monkeypatch, tiny, method, much)
        assert 0 < many[0] <= 8 * few[0] + 100 and 0 < many[1] <= 8 * few[1] + 100, (method, few, many)
