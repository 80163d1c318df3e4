"""The package from the clone, and each instruction set that this machine can run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ["CHATGLM_CPU_ROUTES"] = "default"  # whatever is fast here: tests ask for other ways by name

INSTRUCTION_SETS = ("avx2", "avx512", "avx512_bf16")


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    """Each instruction set up to the one of this machine."""
    from chatglm_cpu import instruction_set, runtime

    if request.param not in INSTRUCTION_SETS[: INSTRUCTION_SETS.index(instruction_set() or "avx2") + 1]:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setitem(runtime._machine, "isa", request.param)
    return request.param
