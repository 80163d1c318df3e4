"""Fixtures of the server's tests: `tiny`, as a stranger gets it, and small golden models."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CHATGLM_CPU_ROUTES", "default")  # nothing is timed, nor written to the user's cache
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tiny"
sys.path.insert(0, str(ROOT))


def load_tiny():
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    return tokenizer, AutoModel.from_pretrained(TINY, trust_remote_code=True).eval()


@pytest.fixture(scope="session")
def tiny():
    """(tokenizer, model) in float32."""
    return load_tiny()


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """What `tiny` was taught to answer."""
    lines = (TINY / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    asks = [ask for line in lines for one in json.loads(line)["rounds"] for ask in one["ask"]]
    return random.Random(7).sample(asks, 64)


@pytest.fixture(autouse=True)
def threads_as_found():
    found = torch.get_num_threads()
    yield
    torch.set_num_threads(found)


@pytest.fixture(scope="session")
def real_sp_model() -> Path:
    """The real `ice_text.model`, which is not ours to ship."""
    path = Path(os.environ.get("ICE_TEXT_MODEL", ROOT.parent / "shared" / "ice_text" / "ice_text.model"))
    if not path.is_file():
        pytest.skip("set ICE_TEXT_MODEL to the real ice_text.model to run this test")
    return path
