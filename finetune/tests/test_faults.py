"""What other tools' defaults would do wrongly in silence is refused or told, naming the cure."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

IGNORED = -100


def example(tokenizer, query="早上好", answer="早上好！"):
    prompt = tokenizer.build_chat_input_ids(query)
    target = [tokenizer.bos_token_id, *tokenizer.encode_text(answer), tokenizer.eos_token_id]
    return torch.tensor([prompt[:-1] + target]), torch.tensor([[IGNORED] * (len(prompt) - 1) + target])


def backward(model, ids, labels, **options) -> None:
    model.train()(ids, labels=labels, **options).loss.backward()


def test_labels_of_the_answer_are_right_and_labels_of_the_context_are_told(load, tokenizer, said):
    model, (ids, labels) = load(), example(tokenizer)
    backward(model, ids, labels)
    backward(model, ids, torch.where(torch.arange(ids.shape[1]) == 0, ids, labels))  # the first label is for no token
    assert "labels before <sop>" not in said.text and looks_at_gradients(model, ids)
    backward(model, ids, ids)
    assert said.text.count("labels before <sop>") == 1 and "finetune/collators.py" in said.text
    backward(model, ids, ids)
    assert said.text.count("labels before <sop>") == 1 and not looks_at_gradients(model, ids)


def looks_at_gradients(model, ids) -> bool:
    return bool(model.transformer(ids).last_hidden_state._backward_hooks)


@pytest.mark.parametrize("at", [-2, -1, 0], ids=["before [gMASK]", "[gMASK]", "<sop>"])
def test_one_label_is_judged_by_its_place(load, tokenizer, said, at):
    """Also of a loss that somebody else computes from the hidden states."""
    model, (ids, _) = load().train(), example(tokenizer)
    place = ids[0].tolist().index(tokenizer.bos_token_id) + at
    states = model.transformer(ids, use_cache=False).last_hidden_state
    torch.nn.functional.cross_entropy(model.lm_head(states[:, place - 1]), ids[:, place]).backward()
    assert ("labels before <sop>" in said.text) == (at < 0)


def test_a_loss_of_nan_is_not_blamed_on_the_labels(load, tokenizer, said):
    """Then every gradient is NaN, also where no label is."""
    ids, labels = example(tokenizer)
    (load().train()(ids, labels=labels).loss * float("nan")).backward()
    assert "labels before <sop>" not in said.text


def test_gradient_checkpointing_and_evaluation_are_told_the_same(load, tokenizer, said):
    model, (ids, labels) = load(), example(tokenizer)
    model.gradient_checkpointing_enable()
    backward(model, ids, labels)
    model.eval()(ids, labels=ids)  # whoever measures has no gradient
    assert "labels before <sop>" not in said.text
    backward(model, ids, ids)
    assert "labels before <sop>" in said.text


def test_labels_with_an_official_mask_are_the_callers_own_affair(load, tokenizer, said):
    model, (ids, _) = load(), example(tokenizer)
    causal = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()[None, None]
    backward(model, ids, ids, attention_mask=causal)
    assert "labels before <sop>" not in said.text


@pytest.mark.parametrize("bits", [8, 4])
def test_full_tuning_of_integers_by_trainer_fails_and_says_why(load, tokenizer, said, tmp_path, bits):
    ids, labels = example(tokenizer)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    trainer = Trainer(load(bits), arguments, train_dataset=[{"input_ids": ids[0], "labels": labels[0]}])
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer.train()
    assert f"nothing of this INT{bits} model is trained" in said.text and "finetune/README.md" in said.text


PROMPTS = [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
]


@pytest.mark.parametrize("config", PROMPTS, ids=lambda config: type(config).__name__)
def test_prompts_of_peft_are_refused_at_their_first_step(load, tokenizer, config):
    model, (ids, labels) = peft.get_peft_model(load(), config).train(), example(tokenizer)
    with pytest.raises(ValueError, match="P-tuning v2 is built in"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    with pytest.raises(ValueError, match="P-tuning v2 is built in"):
        model.generate(**tokenizer("你好", return_tensors="pt"), max_new_tokens=2)


def test_lora_of_peft_generates_as_before(load, tokenizer):
    model = peft.get_peft_model(load(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["dense"]))
    inputs = tokenizer("你好", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), load().generate(**inputs, **options))
