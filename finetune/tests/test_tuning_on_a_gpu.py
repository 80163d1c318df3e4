"""Training and evaluation choose the GPU by themselves and give what the CPU gives; without a GPU nothing runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from finetune import evaluate, train
from finetune.methods import load_tuned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parents[2]
ROWS = [("你们几点开门？", "早上八点开门。"), ("Where are you?", "We are near the lake.")]
RANK = ["--method", "lora", "--steps", "40", "--rank", "16"]
PREFIX = ["--method", "ptuning", "--steps", "60", "--pre-seq-len", "16"]


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in ROWS), encoding="utf-8")
    return path


def trained(data: Path, out: Path, *words: str) -> dict:
    options = ["--data", str(data), "--out", str(out), "--batch", "2", "--log-every", "1"]
    return train.main(["--model", str(ROOT / "tiny"), *options, *words])


@pytest.mark.parametrize(
    ("dtype", "bits"), [("float32", "0"), ("bfloat16", "0"), ("float16", "0"), ("bfloat16", "8"), ("float16", "4")]
)
@pytest.mark.parametrize("words", [RANK, PREFIX], ids=["lora", "ptuning"])
def test_what_is_trained_on_the_gpu_answers_there_and_on_the_cpu(data, tmp_path, words, dtype, bits):
    report = trained(data, tmp_path / "out", *words, "--bits", bits, "--dtype", dtype)
    assert torch.cuda.max_memory_allocated() > 0, "trained elsewhere"
    assert report["after"]["task"] == 1, report
    for device in ("cpu", "cuda"):
        model, tokenizer = load_tuned(str(ROOT / "tiny"), tmp_path / "out", int(bits))
        model = model.to(device)
        assert [model.chat(tokenizer, q, history=[], do_sample=False)[0] for q, _ in ROWS] == [a for _, a in ROWS]


@pytest.mark.parametrize("mixed", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", ["0", "4"])
def test_mixed_precision_learns_on_the_gpu(data, tmp_path, bits, mixed):
    words = [*RANK, "--steps", "60", "--bits", bits, "--mixed", mixed, "--gradient-checkpointing"]
    report = trained(data, tmp_path / "out", *words)
    assert report["after"]["task"] == 1, report


def test_the_first_losses_on_the_gpu_are_those_of_the_cpu(data, tmp_path):
    losses = []
    for device in ("auto", "cpu"):
        trained(data, tmp_path / device, *RANK[:2], "--steps", "3", "--bits", "4", "--device", device)
        with open(tmp_path / device / "curve.csv", newline="") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_evaluation_on_the_gpu_gives_the_figures_of_the_cpu():
    pytest.importorskip("rouge_score")
    words = ["--model", str(ROOT / "tiny"), "--bits", "0", "8", "4", "--data", str(ROOT / "finetune" / "sample.jsonl")]
    on_gpu = evaluate.main(words)
    for found, expected in zip(on_gpu, evaluate.main([*words, "--device", "cpu"])):
        assert found["weights"] == expected["weights"]
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-2)
        assert found["exact match"] == pytest.approx(expected["exact match"], abs=0.05)
