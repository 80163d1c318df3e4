"""Questions of tiny/dialogues.jsonl as data sets for lm-evaluation-harness, without a download."""

from __future__ import annotations

import json
from pathlib import Path

import datasets

DIALOGUES = Path(__file__).resolve().parents[2] / "tiny" / "dialogues.jsonl"
CHOICES = 4


def first_rounds() -> list[dict]:
    lines = DIALOGUES.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["rounds"][0] for line in lines if line]


def load(**_) -> dict[str, datasets.Dataset]:
    """Each question once, with its answer among those of the questions behind it."""
    rounds, rows = first_rounds(), []
    for index, one in enumerate(rounds):
        others = [other["answer"] for other in rounds[index + 1 :] + rounds[:index]]
        wrong = [answer for answer in dict.fromkeys(others) if answer != one["answer"]][: CHOICES - 1]
        gold = index % CHOICES
        choices = [*wrong[:gold], one["answer"], *wrong[gold:]]
        rows.append({"question": one["ask"][0], "answer": one["answer"], "choices": choices, "gold": gold})
    return {"test": datasets.Dataset.from_list(rows)}
