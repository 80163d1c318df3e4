"""A trimmed vocabulary spells kept text as before, spells all other text somehow, and keeps its rows."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import assert_as_near, exact, roundings
from slim_sources import (
    EMBEDDING,
    HEAD,
    IMAGE_ROWS,
    full_toy,
    golden_toy,
    same_bits,
    tensors_of,
    widened,
    write_full_toy,
    write_source,
)

import slim
from slim import Options
from slimming import trim_vocabulary as trim
from slimming.checkpoint_io import Exit

CHINESE = (
    "人工智能是计算机科学的一个分支，它企图了解智能的实质。\n清华大学位于北京，是一所著名的大学。\n今天天气很好！\n"
)
ENGLISH = "The model answers questions in two languages.\n\tdef main():\n        return 42\nIt was trained on text.\n"
TEXTS = st.one_of(
    st.text(max_size=40).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)),
    st.lists(st.sampled_from(list("的一是不了人我在有他 abcdeinorst0123.,\n\t  ") + ["the ", "清华", "大学"])).map(
        "".join
    ),
)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["tiny", "real"])
def model(request) -> bytes:
    """The toy's SentencePiece model, and the real one where it is."""
    return request.getfixturevalue(f"{request.param}_sp_model").read_bytes()


@pytest.fixture(scope="module")
def whole(model):
    return trim.tokenizer_of(model)


@pytest.fixture(scope="module")
def halves(model):
    """(kept ids, tokenizer) of two different cuts to about a half."""
    pieces = list(trim.read_pieces(model))
    cuts = []
    for step in (2, 3):
        kept = sorted(trim.always_kept(pieces) | set(range(0, len(pieces), step)))
        cuts.append((kept, trim.tokenizer_of(trim.with_pieces(model, kept))))
    return cuts


def test_pieces_are_those_that_sentencepiece_reads(model, whole):
    pieces = list(trim.read_pieces(model))
    assert len(pieces) == whole.sp.get_piece_size()
    for index in range(0, len(pieces), max(len(pieces) // 500, 1)):
        assert pieces[index].text == whole.sp.id_to_piece(index)
        assert pieces[index].score == pytest.approx(whole.sp.get_score(index))
    types = {3: whole.sp.is_control, 6: whole.sp.is_byte, 2: whole.sp.is_unknown}
    for number, is_type in types.items():
        assert [piece.type == number for piece in pieces] == [is_type(index) for index in range(len(pieces))]


def test_nothing_changes_when_every_piece_is_kept(model):
    assert trim.with_pieces(model, range(len(list(trim.read_pieces(model))))) == model


@MANY
@given(data=st.data())
def test_text_whose_pieces_are_kept_encodes_to_the_same_pieces(whole, halves, data):
    kept, cut = data.draw(st.sampled_from(halves))
    # text built from kept pieces, so that it often encodes to them
    ids = data.draw(st.lists(st.sampled_from(kept), max_size=12))
    text = data.draw(TEXTS) + whole.sp.decode(ids)
    before = whole.encode_text(text)
    new_id = {old: new for new, old in enumerate(kept)}
    if all(index in new_id for index in before):
        assert cut.encode_text(text) == [new_id[index] for index in before]


@MANY
@given(text=TEXTS, which=st.integers(0, 1))
def test_every_other_text_still_comes_back(whole, halves, text, which):
    cut = halves[which][1]
    assert cut.sp.decode(cut.encode_text(text)) == whole.sp.decode(whole.encode_text(text))


def test_cutting_the_lowest_piece_could_change_kept_text_so_it_always_stays(model):
    pieces = list(trim.read_pieces(model))
    scores = [piece.score for piece in pieces if piece.type == trim.NORMAL]
    kept = trim.always_kept(pieces)
    assert {min(scores), max(scores)} <= {pieces[index].score for index in kept}
    texts = {pieces[index].text for index in kept}
    assert texts >= {"<unk>", "<pad>", "<n>", "[gMASK]", "<sop>", "<eop>", "<|tab|>", "<|blank_80|>", "<0xFF>", "▁"}
    assert texts >= {digit for digit in "0123456789" if any(piece.text == digit for piece in pieces)}


def test_languages_choose_pieces_by_script(real_sp_model):
    pieces = list(trim.read_pieces(real_sp_model.read_bytes()))
    texts = {
        language: {pieces[i].text for i in trim.of_languages(pieces, [language])} for language in ("zh", "en", "ru")
    }
    assert "清华大学" in texts["zh"] - texts["en"]
    assert "▁the" in texts["en"] - texts["zh"]
    assert "," in texts["zh"] & texts["en"] & texts["ru"]
    assert not any("а" <= character <= "я" for text in texts["en"] for character in text)
    assert len(texts["zh"]) > 60_000


def test_an_unknown_language_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown language tlh: known are ar, "):
        trim.of_languages([], ["zh", "tlh"])


@pytest.mark.parametrize("text", [CHINESE, ENGLISH], ids=["Chinese", "English"])
def test_corpus_keeps_its_own_spelling_and_the_frame_of_chat(tmp_path, model, whole, text):
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    kept = trim.kept_pieces(model, tmp_path / "corpus.txt", ())
    cut_model = trim.with_pieces(model, kept)
    cut = trim.tokenizer_of(cut_model)
    assert len(kept) < len(list(trim.read_pieces(model)))
    figures = trim.corpus_figures(model, cut_model, kept, tmp_path / "corpus.txt")
    assert figures.coverage == 1
    assert figures.tokens_before == figures.tokens_after
    prompt = whole.build_prompt(text.split("\n")[0], [("0", "1")])
    assert [kept[index] for index in cut.encode_text(prompt)] == whole.encode_text(prompt)


def test_min_count_drops_rare_pieces_and_the_figures_say_so(tmp_path, tiny_sp_model):
    model = tiny_sp_model.read_bytes()
    (tmp_path / "corpus.txt").write_text(ENGLISH * 3 + CHINESE, encoding="utf-8")
    kept = trim.kept_pieces(model, tmp_path / "corpus.txt", (), min_count=6)
    figures = trim.corpus_figures(model, trim.with_pieces(model, kept), kept, tmp_path / "corpus.txt")
    assert figures.coverage < 1
    assert figures.tokens_after > figures.tokens_before
    assert "tokens per character" in str(figures)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_trimmed_checkpoint_holds_the_rows_of_the_kept_pieces(tmp_path, tiny_sp_model, form):
    state, config = full_toy()
    source = write_source(tmp_path / "source", state, config, form=form)
    (tmp_path / "corpus.txt").write_text(CHINESE, encoding="utf-8")
    plan = slim.slim(str(source), tmp_path / "out", Options(corpus=tmp_path / "corpus.txt", check=True))
    kept = trim.kept_pieces(plan.source.sentencepiece, tmp_path / "corpus.txt", ())
    id_map = json.loads((tmp_path / "out" / "vocabulary_map.json").read_text())
    rows = [row for begin, end in id_map["kept_runs"] for row in range(begin, end)]
    assert rows[: len(kept)] == [index + IMAGE_ROWS for index in kept]
    assert id_map["rows"] == len(rows) == plan.vocabulary.rows
    found = tensors_of(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        assert same_bits(found[name], state[name][torch.tensor(rows)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    pieces = [list(trim.read_pieces(plan.source.sentencepiece))[index].text for index in kept]
    assert config["vocab_size"] == len(rows)
    assert pieces[config["bos_token_id"]] == "<sop>"
    assert pieces[config["gmask_token_id"]] == "[gMASK]"
    assert pieces[config["pad_token_id"]] == "<pad>"


def test_trimmed_checkpoint_computes_the_same_logits_and_chats(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    source = write_source(tmp_path / "source", *widened(*golden_toy("base2d")))
    (tmp_path / "corpus.txt").write_text(CHINESE, encoding="utf-8")
    slim.slim(str(source), tmp_path / "slim")
    slim.slim(str(tmp_path / "slim"), tmp_path / "trimmed", Options(corpus=tmp_path / "corpus.txt"))
    logits = []
    for name in ("slim", "trimmed"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=True)
        model = AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True).float().eval()
        with torch.no_grad():
            logits.append(model(**tokenizer("今天天气很好!", return_tensors="pt")).logits)
            truth = exact(model, **tokenizer("今天天气很好!", return_tensors="pt")).logits
    id_map = json.loads((tmp_path / "trimmed" / "vocabulary_map.json").read_text())
    rows = [row for begin, end in id_map["kept_runs"] for row in range(begin, end)]
    assert_as_near(logits[1], logits[0][..., rows], truth, roundings(model.config))
    assert isinstance(model.chat(tokenizer, "你好 world", do_sample=False, max_length=48)[0], str)


def test_keep_languages_on_the_command_line(tmp_path, capsys):
    source = write_full_toy(tmp_path / "source")
    assert slim.main([str(source), str(tmp_path / "out"), "--keep-languages", "en", "--dry-run"]) == 0
    assert "pieces stay" in capsys.readouterr().out
    (source / "ice_text.model").unlink()
    assert slim.main([str(source), str(tmp_path / "out"), "--keep-languages", "en"]) == Exit.WRONG_TOKENIZER
