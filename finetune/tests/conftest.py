"""The repository's scripts, and `tiny` with a tokenizer: a new model for each test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

os.environ.setdefault("CHATGLM_CPU_ROUTES", "default")  # nothing is timed, nor written to the user's cache
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tiny"
sys.path[:0] = [str(path) for path in (ROOT, ROOT / "cpu") if str(path) not in sys.path]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)


@pytest.fixture
def load():
    """`load(bits=4, pre_seq_len=8)`: tiny, in float32."""

    def load(bits: int = 0, **options):
        return AutoModel.from_pretrained(TINY, trust_remote_code=True, **options).quantize(bits)

    return load


@pytest.fixture
def said(load, caplog):
    """What the model's code warns of, from here on."""
    import importlib

    code = importlib.import_module(type(load()).__module__)
    code.warn_once.cache_clear()
    return caplog
