"""The checkpoint in tiny/: it loads by itself, knows its dialogues word for word, and its code is the package's."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import train_tiny
from package import package_files

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
DIALOGUES = train_tiny.load_dialogues(TINY / "dialogues.jsonl")
LEARNED = train_tiny.exchanges(DIALOGUES)
HELD_OUT = train_tiny.exchanges(DIALOGUES, "held_out")
ONE_OF_EACH = [one for index, one in enumerate(LEARNED) if one.answer != LEARNED[index - 1].answer]
REPORT = json.loads((TINY / "report.json").read_text(encoding="utf-8"))
OF_SEVERAL_ROUNDS = [dialogue for dialogue in DIALOGUES if len(dialogue["rounds"]) > 1]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(TINY), trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(str(TINY), trust_remote_code=True).eval()


def plain_examples(tokenizer, asked):
    return [train_tiny.example(tokenizer, one.query, one.history, one.answer) for one in asked]


# --- the folder -------------------------------------------------------------------------------------------------


def test_the_folder_has_at_most_10_megabytes():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 10e6


def test_the_code_files_are_those_of_the_package():
    files = [path.name for path in package_files()]
    assert {"configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"} <= set(files)
    assert sorted(path.name for path in TINY.glob("*.py")) == files
    for name in [*files, "tokenizer_config.json", "chat_template.jinja"]:
        same = (TINY / name).read_bytes() == (ROOT / name).read_bytes()
        assert same, f"tiny/{name} is not {name}: run `python train_tiny.py --sync-code`"


def test_sync_code_copies_what_the_code_imports_relatively(tmp_path):
    files = train_tiny.sync_code(tmp_path)
    for name in files:
        for imported in re.findall(r"^\s*from \.(\w+) import", (tmp_path / name).read_text(encoding="utf-8"), re.M):
            assert (tmp_path / f"{imported}.py").is_file()


def test_the_configuration_is_the_released_one_but_for_sizes_and_ids():
    released, own = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (ROOT, TINY))
    changed = {"_name_or_path", "torch_dtype", "vocab_size", *train_tiny.SIZES}
    changed |= {name for name in released if name.endswith("_token_id")}
    assert own.keys() == released.keys()
    assert {name for name in own if own[name] != released[name]} <= changed


def test_the_vocabulary_has_the_layout_of_the_real_one(tokenizer, model):
    sop = tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4, 5]) == ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁"]
    after = tokenizer.convert_ids_to_tokens([sop - 4, sop - 3, sop, sop + 1, sop + 4, sop + 5, sop + 83, sop + 84])
    assert after == ["[MASK]", "[gMASK]", "<sop>", "<eop>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "<0x00>"]
    assert len(tokenizer) == sop + 84 + 256
    assert model.config.bos_token_id == sop and model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size < len(tokenizer) + 32


def test_the_vocabulary_is_what_training_on_the_dialogues_gives(tokenizer):
    processor = train_tiny.spm.SentencePieceProcessor(model_proto=train_tiny.train_sentencepiece(DIALOGUES))
    assert [processor.id_to_piece(index) for index in range(len(processor))] == tokenizer.convert_ids_to_tokens(
        list(range(len(tokenizer)))
    )


# --- the dialogues ----------------------------------------------------------------------------------------------


def test_the_set_is_large_and_varied_enough():
    texts = [text for one in LEARNED for text in (one.query, one.answer)]
    assert sum(len(dialogue["rounds"]) for dialogue in DIALOGUES) >= 150
    assert len(OF_SEVERAL_ROUNDS) >= 10
    assert sum(bool(re.search("[\u4e00-\u9fff]", one.answer)) for one in LEARNED) > len(LEARNED) / 4
    assert sum(one.answer.isascii() for one in LEARNED) > len(LEARNED) / 4
    for what in ("\t", "    ", "\n", r"\d"):
        assert sum(bool(re.search(what, text)) for text in texts) >= 5
    assert sum(any(unicodedata.category(char) == "So" for char in text) for text in texts) >= 20


def test_no_prompt_is_asked_twice_and_none_that_is_held_out_is_learned(tokenizer):
    learned = [tuple(tokenizer.build_chat_input_ids(one.query, one.history)) for one in LEARNED]
    held_out = [tuple(tokenizer.build_chat_input_ids(one.query, one.history)) for one in HELD_OUT]
    assert len(set(learned)) == len(learned)
    assert len(set(held_out)) == len(held_out) >= 100
    assert not set(learned) & set(held_out)
    assert not {one.query for one in LEARNED} & {one.query for one in HELD_OUT}


def test_every_answer_survives_tokenizer_and_clean_up(tokenizer, model):
    for answer in {one.answer for one in LEARNED}:
        assert model.process_response(tokenizer.decode(tokenizer.encode_text(answer))) == answer


# --- what it says -----------------------------------------------------------------------------------------------


def test_it_answers_every_training_prompt_word_for_word(model, tokenizer):
    said = train_tiny.answers(model, tokenizer, LEARNED)
    wrong = [(one.query, text) for one, text in zip(LEARNED, said) if text != one.answer]
    assert not wrong


def test_it_answers_as_many_held_out_paraphrases_as_reported(model, tokenizer):
    rate = train_tiny.exact_rate(model, tokenizer, HELD_OUT)
    assert rate >= REPORT["held_out_prompts_answered_exactly"] - 0.01
    assert rate >= 0.5


def test_the_report_describes_this_checkpoint(model):
    assert REPORT["training_prompts"] == len(LEARNED) and REPORT["training_prompts_answered_exactly"] == 1
    assert REPORT["held_out_prompts"] == len(HELD_OUT)
    assert REPORT["exchanges"] == sum(len(dialogue["rounds"]) for dialogue in DIALOGUES)
    assert REPORT["parameters"] == sum(weight.numel() for weight in model.parameters())
    card = (TINY / "README.md").read_text(encoding="utf-8")
    for figure in (REPORT["exchanges"], len(LEARNED), len(HELD_OUT)):
        assert f"{figure:,}" in card
    assert f"{REPORT['held_out_prompts_answered_exactly']:.1%}" in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_knows_its_answers_in_half_precision_too(dtype, tokenizer):
    model = AutoModel.from_pretrained(str(TINY), trust_remote_code=True, torch_dtype=dtype).eval()
    exact, _ = train_tiny.teacher_forced(model, plain_examples(tokenizer, ONE_OF_EACH), tokenizer.pad_token_id)
    assert exact == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_it_knows_its_answers_quantized(bits, tokenizer):
    model = AutoModel.from_pretrained(str(TINY), trust_remote_code=True).eval().quantize(bits)
    exact, _ = train_tiny.teacher_forced(model, plain_examples(tokenizer, ONE_OF_EACH), tokenizer.pad_token_id)
    assert exact >= {8: 1, 4: 0.95}[bits]


@pytest.mark.parametrize("dialogue", OF_SEVERAL_ROUNDS[::3], ids=lambda dialogue: dialogue["rounds"][0]["ask"][0])
def test_chat_follows_up_on_its_own_history(dialogue, model, tokenizer):
    history = []
    for turn in dialogue["rounds"]:
        response, history = model.chat(tokenizer, turn["ask"][0], history=history, do_sample=False)
        assert response == turn["answer"]
    assert history == [(turn["ask"][0], turn["answer"]) for turn in dialogue["rounds"]]


def test_the_same_question_means_what_the_history_says(model, tokenizer):
    places = [one for one in LEARNED if one.query == "它在哪里？" and one.history]
    said = {model.chat(tokenizer, one.query, history=one.history, do_sample=False)[0] for one in places}
    assert said == {one.answer for one in places} and len(said) >= 5


@pytest.mark.parametrize(
    "query", ["你好", "发一个笑脸", "用 Python 写一个加法函数", "Write a Makefile", "Write a poem"]
)
def test_the_stream_grows_and_ends_with_what_chat_says(query, model, tokenizer):
    whole, history = model.chat(tokenizer, query, history=[], do_sample=False)
    stream = list(model.stream_chat(tokenizer, query, history=[], do_sample=False))
    assert stream[-1] == (whole, history)
    assert all("\ufffd" not in text for text, _ in stream)
    assert all(len(text) <= len(longer) for (text, _), (longer, _) in zip(stream, stream[1:]))


def test_sampling_with_the_defaults_of_chat_still_makes_sense(model, tokenizer):
    torch.manual_seed(0)
    asked = [one for one in LEARNED if not one.history][::60]
    right = [model.chat(tokenizer, one.query)[0] == one.answer for one in asked]
    assert sum(right) >= len(right) - 2


def test_it_loads_as_a_causal_language_model(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(str(TINY), trust_remote_code=True).eval()
    assert model.chat(tokenizer, "1 + 1 等于几？", do_sample=False)[0] == "1 + 1 = 2。"


# --- the training script ----------------------------------------------------------------------------------------


def test_an_example_is_the_official_one(tokenizer):
    ids, labels = train_tiny.example(tokenizer, "你好", [], "再见！")
    start = ids.index(tokenizer.bos_token_id)
    assert ids[: start + 1] == tokenizer.build_chat_input_ids("你好")
    assert ids[start + 1 :] == [*tokenizer.encode_text("再见！"), tokenizer.eos_token_id]
    assert labels == [-100] * start + ids[start:]


def test_batches_lose_no_example_and_keep_to_their_size(tokenizer):
    examples = plain_examples(tokenizer, LEARNED[:100])
    rows = []
    for batch in train_tiny.batches(examples, tokenizer.pad_token_id, 512, train_tiny.random.Random(0)):
        assert batch["input_ids"].shape == batch["labels"].shape
        assert batch["input_ids"].numel() <= 512 or len(batch["input_ids"]) == 1
        rows += [ids[ids != tokenizer.pad_token_id].tolist() for ids in batch["input_ids"]]
        assert (batch["labels"][batch["input_ids"] == tokenizer.pad_token_id] == -100).all()
    assert sorted(rows) == sorted(one.ids for one in examples)


def test_training_is_repeatable_and_the_loss_falls(tokenizer):
    def losses(seed=0):
        torch.manual_seed(seed)
        trainer = train_tiny.Trainer(train_tiny.new_model(TINY), tokenizer, DIALOGUES[:8], epochs=5, seed=seed)
        return [trainer.epoch([trainer.vary(one) for one in trainer.to_learn], epoch) for epoch in range(5)]

    # Products on some Intel CPUs round as the memory happens to lie, and Adam makes that a little larger.
    first, again, other = torch.tensor([losses(), losses(), losses(seed=1)])
    assert (first - again).abs().max() < (first - other).abs().max() / 10
    assert first[-1] < first[0]


def test_training_ends_when_every_answer_is_sure_twice(tokenizer, capsys):
    model = AutoModel.from_pretrained(str(TINY), trust_remote_code=True)
    trainer = train_tiny.Trainer(model, tokenizer, DIALOGUES[:8], epochs=1, seed=0)
    trainer.run()
    assert "exact 100.0%" in capsys.readouterr().out
    assert train_tiny.teacher_forced(model, trainer.plain, trainer.pad)[0] == 1


def test_training_that_fails_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(train_tiny, "MOST_PLAIN_EPOCHS", 1)
    with pytest.raises(SystemExit, match="not learned: 0.00% exact.*--epochs"):
        train_tiny.Trainer(train_tiny.new_model(TINY), tokenizer, DIALOGUES[:2], epochs=1, seed=0).run()


def test_no_variation_of_a_prompt_is_a_held_out_paraphrase(tokenizer):
    vary = train_tiny.Variations(tokenizer, DIALOGUES, seed=1)
    held_out = {tuple(tokenizer.encode_text(one.query)) for one in HELD_OUT}
    single = [one for one in LEARNED if not one.earlier]
    examples = [vary(one) for one in single * 3]
    contexts = [tuple(one.ids[: one.ids.index(tokenizer.gmask_token_id)]) for one in examples]
    assert len(set(contexts)) > len(single)
    assert not held_out & set(contexts)
