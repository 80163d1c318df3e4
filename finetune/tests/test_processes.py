"""Training on two processes of this machine is training on one, step by step."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
# Float32 sums in another order, through three steps of Adam; what is left out, or counted twice, shows in two digits.
SAME = 1e-3
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def losses(out: Path, *launcher: str, accumulate: int = 1) -> list[float]:
    """A run of three steps; four examples a step, whoever takes them."""
    run = ["finetune/train.py", "--model", "tiny", "--data", "finetune/sample.jsonl", "--method", "lora"]
    run += ["--steps", "3", "--log-every", "1", "--batch", "2", "--accumulate", str(accumulate), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *run, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(row["loss"]) for row in csv.DictReader((out / "curve.csv").open(encoding="utf-8"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    return losses(out, accumulate=2), load_file(out / "adapter_model.safetensors")


def test_two_processes_learn_what_one_learns(alone, tmp_path):
    expected, adapter = alone
    found = losses(tmp_path / "out", *TWO)
    assert len(found) == 3 and found == pytest.approx(expected, rel=SAME)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    for name, matrix in adapter.items():
        assert (saved[name] - matrix).norm() <= SAME**0.5 * matrix.norm(), name
