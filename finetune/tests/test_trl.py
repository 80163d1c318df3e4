"""What TRL trains on, for every form of data that it takes: right ids and masks, or a warning by name."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="pip install trl datasets")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from finetune.collators import ChatCollator, PreferenceCollator

QUICK = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
CHATS = [[("你好", "你好啊")], [("hi", "hello"), ("and a second, longer question", "yes")]]


def messages(rounds):
    return [{"role": role, "content": text} for pair in rounds for role, text in zip(("user", "assistant"), pair)]


def expected(tokenizer, rounds, with_sop: bool):
    """ids and labels of the official sequence."""
    *history, (query, answer) = rounds
    prompt = tokenizer.build_chat_input_ids(query, history)
    target = [*tokenizer.encode_text(answer), tokenizer.eos_token_id]
    first = [prompt[-1]] if with_sop else [-100]
    return prompt + target, [-100] * (len(prompt) - 1) + first + target


def trained_on(trainer):
    """(ids, labels) of each row of the first batch, without padding."""
    batch = next(iter(trainer.get_train_dataloader()))
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].bool(), batch["labels"].tolist())
    return [
        ([i for i, real in zip(ids, mask) if real], [one for one, real in zip(labels, mask) if real])
        for ids, mask, labels in rows
    ]


def sft(load, tokenizer, folder, rows, collator=None, **options):
    config = SFTConfig(str(folder), per_device_train_batch_size=2, **QUICK, **options)
    return SFTTrainer(
        load(), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, data_collator=collator
    )


def by_length(rows):
    return sorted(rows, key=lambda row: len(row[0]))


def test_messages_with_assistant_only_loss_are_the_official_sequences(load, tokenizer, tmp_path, said):
    rows = [{"messages": messages(chat)} for chat in CHATS]
    trainer = sft(load, tokenizer, tmp_path, rows, assistant_only_loss=True)
    assert by_length(trained_on(trainer)) == [expected(tokenizer, chat, with_sop=False) for chat in CHATS]
    trainer.train()
    assert "labels before <sop>" not in said.text


def test_prompt_and_completion_as_messages_are_the_official_sequences(load, tokenizer, tmp_path, said):
    rows = [{"prompt": messages(chat)[:-1], "completion": messages(chat)[-1:]} for chat in CHATS]
    trainer = sft(load, tokenizer, tmp_path, rows)
    assert by_length(trained_on(trainer)) == [expected(tokenizer, chat, with_sop=False) for chat in CHATS]
    trainer.train()
    assert "labels before <sop>" not in said.text


WRONG = {
    "messages with a loss on the prompt": ({"messages": messages(CHATS[0])}, {}),
    "text": ({"text": "你好 hello"}, {}),
    "prompt and completion as text": ({"prompt": "你好", "completion": "hello"}, {}),
}


@pytest.mark.parametrize("row, options", WRONG.values(), ids=WRONG)
def test_defaults_that_train_wrongly_are_told(load, tokenizer, tmp_path, said, row, options):
    sft(load, tokenizer, tmp_path, [row, row], **options).train()
    assert "labels before <sop>" in said.text and "finetune/collators.py" in said.text


ROWS = {
    "official columns": [
        {"prompt": c[-1][0], "response": c[-1][1], "history": [list(r) for r in c[:-1]]} for c in CHATS
    ],
    "messages": [{"messages": messages(chat)} for chat in CHATS],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_our_collator_serves_sft(load, tokenizer, tmp_path, said, rows):
    raw = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = sft(load, tokenizer, tmp_path, rows, ChatCollator(tokenizer), **raw)
    assert by_length(trained_on(trainer)) == [expected(tokenizer, chat, with_sop=True) for chat in CHATS]
    trainer.train()
    assert "labels before <sop>" not in said.text


PREFERENCES = {
    "official columns": [
        {"prompt": c[-1][0], "chosen": c[-1][1], "rejected": "no", "history": [list(r) for r in c[:-1]]} for c in CHATS
    ],
    "messages": [
        {"prompt": messages(c)[:-1], "chosen": messages(c)[-1:], "rejected": messages([("", "no")])[1:]} for c in CHATS
    ],
}


def dpo(load, tokenizer, folder, rows, collator=None, **options):
    config = DPOConfig(str(folder), per_device_train_batch_size=2, **QUICK, **options)
    data = Dataset.from_list(rows)
    return DPOTrainer(load(), load(), config, train_dataset=data, processing_class=tokenizer, data_collator=collator)


@pytest.mark.parametrize("own", [False, True], ids=["TRL's collator", "ours"])
@pytest.mark.parametrize("kind", PREFERENCES)
def test_preferences_are_official_sequences(load, tokenizer, tmp_path, said, kind, own):
    if not own and kind == "official columns":
        pytest.skip("TRL knows no history, and puts [gMASK] <sop> behind plain text: see README.md")
    options = {"remove_unused_columns": False, "data_collator": None} if own else {}
    options.pop("data_collator", None)
    trainer = dpo(
        load, tokenizer, tmp_path, PREFERENCES[kind], PreferenceCollator(tokenizer) if own else None, **options
    )
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for ids, real, learned in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"]):
        found.append((ids[real].tolist(), torch.where(learned.bool(), ids, -100)[real].tolist()))
    wanted = [expected(tokenizer, chat, with_sop=False) for chat in CHATS]
    wanted += [expected(tokenizer, [*chat[:-1], (chat[-1][0], "no")], with_sop=False) for chat in CHATS]
    assert sorted(found) == sorted(wanted) and {row[1][-2] for row in found[:2]} != {row[1][-2] for row in found[2:]}
    trainer.train()
    assert "labels before <sop>" not in said.text
