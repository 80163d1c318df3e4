"""What a model answers, and how much of what it should answer it does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from finetune.collators import ExampleCollator
from finetune.data import IGNORED, Example, Exchange, Sizes, context_of

TOKENS_A_BATCH = 8192


def by_length(examples: list, length, most: int) -> Iterator[list[int]]:
    """Indices of examples in batches of similar length, `most` tokens each with padding."""
    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda index: length(examples[index])):
        if batch and length(examples[index]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def answered(model: nn.Module, tokenizer, examples: list[Example]) -> list[bool]:
    """Whether every token of an answer, <eop> included, has the best score after the right ones before it: that is
    what greedy decoding writes word for word."""
    collate, found = ExampleCollator(tokenizer), [False] * len(examples)
    was_training = model.training
    model.eval()
    for batch in by_length(examples, lambda example: len(example.ids), TOKENS_A_BATCH):
        inputs = {name: rows.to(model.device) for name, rows in collate([examples[index] for index in batch]).items()}
        labels = inputs.pop("labels")[:, 2:]  # <sop> is given, not answered: the first label is behind it
        asked = labels != IGNORED
        asked &= labels != tokenizer.bos_token_id
        right = model(**inputs, use_cache=False).logits[:, 1:-1].argmax(dim=-1) == labels
        for index, is_right in zip(batch, (right | ~asked).all(dim=1).tolist()):
            found[index] = is_right
    model.train(was_training)
    return found


@torch.no_grad()
def own_answers(model: nn.Module, tokenizer, exchanges: list[Exchange], sizes: Sizes) -> list[Example]:
    """What the model itself answers, greedily, as examples: answers without an end have none."""
    contexts = [context_of(exchange, tokenizer, sizes.source)[0] for exchange in exchanges]
    examples: list[Example | None] = [None] * len(contexts)
    was_training = model.training
    model.eval()
    for batch in by_length(contexts, lambda ids: len(ids) + sizes.target, 4 * TOKENS_A_BATCH):
        prompts = [contexts[index] + [tokenizer.bos_token_id] for index in batch]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=sizes.target - 2)
        for index, row in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist()):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            target = [tokenizer.bos_token_id, *row[:end]]
            labels = [IGNORED] * len(contexts[index]) + target
            examples[index] = Example(contexts[index] + target, labels, "")
    model.train(was_training)
    return examples


def share(found: list[bool]) -> float:
    return sum(found) / max(len(found), 1)
