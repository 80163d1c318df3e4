"""tokenizer.json, which `slim.py --fast-tokenizer` writes: SentencePiece's ids, and Python's tokenizer as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from slim_sources import write_full_toy

from slimming.fast_tokenizer import FAST_FILE, tokenizer_json
from slimming.trim_vocabulary import kept_pieces, tokenizer_of, with_pieces

ROOT = Path(__file__).resolve().parents[1]
STRINGS = (
    *(
        "",
        " ",
        "a",
        " a  b ",
        "a\nb",
        "\n",
        "\n\n  x\t",
        "a\r\nb",
        " " * 200,
        "你好，世界！",
        "def f(x):\n    return x",
    ),
    *("<n>", "<|blank_3|>", "<|tab|>x", "a <eop> b", "[MASK]", "<sop>", "x <unk><pad>", "What does <eop> do?"),
    *("[gMASK] x", "<0x41>", "x<0x41>y", "＜ｓｏｐ＞", "<unused_0>[sMASK]</s><s>", "<ENC><dBLOCK>", "<unk"),
    *(
        "🤗👍🏽 é e\u0301",
        "A\u0300\u0301\u0302",
        "　全角　空格",
        "１２３ＡＢＣ",
        "\u200b\ufeffa",
        "¨x",
        "①②½ﬁ",
        "\x00\x01a",
    ),
    *("한국어 각 \u1112\u1161\u11ab", "ｶﾞｷﾞｸﾞ ﾊﾟ ｱﾞ", "𠮷野家 ☃ ñ", "العربية", "हिन्दी क्षि", "ไทยน้ำ"),
)


def library_reads_bytes() -> bool:
    """0.14: Unigram that falls back to bytes."""
    return tuple(map(int, tokenizers.__version__.split(".")[:2])) >= (0, 14)


def same_choice(slow, ours: list[int], theirs: list[int]) -> bool:
    """Equal ids, or two segmentations whose sums of scores differ by less than additions in 32 bits can tell apart."""
    totals = [sum(slow.sp.get_score(one) for one in ids) for ids in (ours, theirs)]
    rounding = 2 * len(ours) * abs(totals[0]) * 2.0**-24
    return ours == theirs or (abs(totals[0] - totals[1]) <= rounding and slow.decode(ours) == slow.decode(theirs))


@pytest.fixture(scope="module", params=["tiny", "trimmed", "real"])
def both(request, tmp_path_factory):
    """Our tokenizer over a SentencePiece model, and the file for it, read by the library."""
    if not library_reads_bytes():
        pytest.skip(f"tokenizers {tokenizers.__version__} has no bytes in Unigram")
    path = request.getfixturevalue("real_sp_model" if request.param == "real" else "tiny_sp_model")
    model = Path(path).read_bytes()
    if request.param == "trimmed":
        model = with_pieces(model, kept_pieces(model, None, ["zh"]))
    file = tmp_path_factory.mktemp("fast") / FAST_FILE
    file.write_text(tokenizer_json(model, {}), encoding="utf-8")
    return tokenizer_of(model), tokenizers.Tokenizer.from_file(str(file))


def test_ids_are_those_of_our_tokenizer(both):
    slow, fast = both
    for text in STRINGS:
        assert same_choice(slow, slow(text)["input_ids"], fast.encode(text).ids), text
        pair = fast.encode("你好", text)
        assert same_choice(slow, slow("你好", text)["input_ids"], pair.ids), text
        assert pair.type_ids == slow("你好", text, return_token_type_ids=True)["token_type_ids"]


def test_text_that_a_user_typed_can_be_encoded_without_control_tokens(both):
    slow, fast = both
    fast.encode_special_tokens = True
    for text in STRINGS:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert same_choice(slow, slow.encode_text(text), ids), text
        assert not {slow.bos_token_id, slow.eos_token_id, slow.mask_token_id, slow.gmask_token_id} & set(ids)
    fast.encode_special_tokens = False


def test_ids_become_the_same_text(both):
    slow, fast = both
    for text in STRINGS:
        ids = slow.encode_text(text)
        assert fast.decode(ids) == slow.decode(ids, skip_special_tokens=True), text
    ids = [*slow.encode_text("a"), slow.eos_token_id]
    assert fast.decode(ids) == "a"


def test_real_texts_have_the_golden_ids(real_sp_model, golden, tmp_path):
    if not library_reads_bytes():
        pytest.skip(f"tokenizers {tokenizers.__version__} has no bytes in Unigram")
    (tmp_path / FAST_FILE).write_text(tokenizer_json(real_sp_model.read_bytes(), {}), encoding="utf-8")
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / FAST_FILE))
    assert fast.encode("你好").ids == [5, 74874, 130001, 130004]
    assert fast.decode([5, 74874]) == "你好"


def test_choices_about_text_go_along(tiny_sp_model, tmp_path):
    if not library_reads_bytes():
        pytest.skip(f"tokenizers {tokenizers.__version__} has no bytes in Unigram")
    model = tiny_sp_model.read_bytes()
    choices = {"do_lower_case": True, "remove_space": True}
    file = tmp_path / FAST_FILE
    file.write_text(tokenizer_json(model, choices), encoding="utf-8")
    slow = type(tokenizer_of(model))(str(tiny_sp_model), num_image_tokens=0, **choices)
    for text in ("A\n  b\tC ", "HELLO   World", "ÄÖ"):
        assert tokenizers.Tokenizer.from_file(str(file)).encode(text).ids == slow(text)["input_ids"]


def test_python_goes_on_with_sentencepiece_where_the_file_is_there(tmp_path):
    plain, with_file = tmp_path / "plain", tmp_path / "with_file"
    for folder in (plain, with_file):
        shutil.copytree(ROOT / "tiny", folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    (with_file / FAST_FILE).write_text(tokenizer_json((plain / "ice_text.model").read_bytes(), {}), encoding="utf-8")
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
        for folder in (plain, with_file)
    )
    assert type(theirs).__name__ == "ChatGLMTokenizer" and not theirs.is_fast
    assert type(theirs).__mro__[1] is type(ours).__mro__[1]
    assert all(theirs(text)["input_ids"] == ours(text)["input_ids"] for text in STRINGS)
    assert theirs.build_chat_input_ids("你好") == ours.build_chat_input_ids("你好")
    theirs.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "ChatGLMTokenizer" and not settings.get("tokenizer_file")


def test_slim_writes_it_on_request_and_check_reads_it(tmp_path, capsys):
    if not library_reads_bytes():
        pytest.skip(f"tokenizers {tokenizers.__version__} has no bytes in Unigram")
    import slim
    from slimming.checkpoint_io import Exit

    source, out = write_full_toy(tmp_path / "source"), tmp_path / "out"
    assert slim.main([str(source), str(out), "--check", "--fast-tokenizer"]) == Exit.OK
    assert slim.main([str(source), str(out), "--check-only"]) == Exit.CHECK_FAILED
    assert "tokenizer.json is there" in capsys.readouterr().out
    content = json.loads((out / FAST_FILE).read_text(encoding="utf-8"))
    content["model"]["vocab"][content["model"]["unk_id"] + 10][1] = 0.0  # one piece is always the best now
    (out / FAST_FILE).write_text(json.dumps(content), encoding="utf-8")
    assert slim.main([str(source), str(out), "--check-only", "--fast-tokenizer"]) == Exit.CHECK_FAILED
    assert "tokenizer.json: " in capsys.readouterr().out
    assert slim.main([str(out), str(tmp_path / "again"), "--fast-tokenizer"]) == Exit.OK, "slim already, and wanted"
