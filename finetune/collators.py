"""Batches of right-padded sequences, for transformers' Trainer and for TRL.

All of them make labels from <sop> on only: the tokens before it read each other in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.data import COLUMNS, IGNORED, SIZES, Columns, Example, Exchange, Sizes, check, encode, exchanges_of


def padded(rows: list[list[int]], filler: int) -> Tensor:
    """[B, S], S the longest row."""
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


class ExampleCollator:
    """Examples of finetune.data -> input_ids, attention_mask and labels, [B, S] each."""

    def __init__(self, tokenizer):
        self.pad = tokenizer.pad_token_id

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        rows = [example.ids for example in examples]
        return {
            "input_ids": padded(rows, self.pad),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
            "labels": padded([example.labels for example in examples], IGNORED),
        }


class ChatCollator(ExampleCollator):
    """Rows with official columns or with messages -> the same; of messages the last answer is learned, as a row is one
    sequence.

    For TRL's SFTTrainer: SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False).
    """

    def __init__(self, tokenizer, columns: Columns = COLUMNS, sizes: Sizes = SIZES):
        super().__init__(tokenizer)
        self.tokenizer, self.columns, self.sizes = tokenizer, columns, sizes

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return super().__call__([self.example(row) for row in rows])

    def example(self, row: dict[str, Any]) -> Example:
        exchange = list(exchanges_of(row, self.columns, 0))[-1]
        check(exchange, self.tokenizer, need_answer=True)
        return encode(exchange, self.tokenizer, self.sizes)


class PreferenceCollator(ExampleCollator):
    """Rows of {"prompt", "chosen", "rejected"} and perhaps "history", or of messages under the first three -> what
    TRL's DPOTrainer computes with: the sequences of all chosen answers, then those of all rejected ones, as input_ids,
    attention_mask and completion_mask, [2 B, S] each; the last is 1 from the first token of the answer to <eop>.

    For DPOConfig(remove_unused_columns=False).
    """

    def __init__(self, tokenizer, columns: Columns = COLUMNS, sizes: Sizes = SIZES):
        super().__init__(tokenizer)
        self.tokenizer, self.columns, self.sizes = tokenizer, columns, sizes

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        examples = [self.example(row, answer) for answer in ("chosen", "rejected") for row in rows]
        batch = super().__call__(examples)
        learned = batch.pop("labels") != IGNORED
        is_answer = batch["input_ids"] != self.tokenizer.bos_token_id  # <sop> is no part of what was preferred
        return {**batch, "completion_mask": (learned & is_answer).long()}

    def example(self, row: dict[str, Any], answer: str) -> Example:
        query, history, said = row[self.columns.prompt], row.get(self.columns.history) or [], row[answer]
        if isinstance(query, list):
            query, history, said = query[-1]["content"], query[:-1], said[-1]["content"]
        said = said.removesuffix(self.tokenizer.eos_token)  # which TRL writes behind plain text
        exchange = Exchange(query, history, said, 0)
        check(exchange, self.tokenizer, need_answer=True)
        return encode(exchange, self.tokenizer, self.sizes)
