"""Fixtures: the package under an import name, the golden figures, the real SentencePiece model where there is one."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

os.environ.setdefault("CHATGLM_CPU_ROUTES", "default")  # nothing is timed, nor written to the user's cache
ROOT = Path(__file__).resolve().parents[1]

# The files import each other relatively, as the Hub wants it; whatever the clone's folder is called, tests say
# `from chatglm_slim.modeling_chatglm import ...`.
package = types.ModuleType("chatglm_slim")
package.__path__ = [str(ROOT)]
sys.modules["chatglm_slim"] = package
sys.path[:0] = [str(ROOT), str(ROOT / "cpu")]  # for the scripts: slim, train_tiny, cli_chat; and chatglm_cpu


class NoKernels:
    """An engine that serves nothing."""

    def __getattr__(self, name):
        return lambda *arguments: None


@pytest.fixture
def no_kernels(monkeypatch):
    """An engine without kernels in place of chatglm_cpu; give it functions by setting attributes."""
    from chatglm_slim import kernel_routes

    engine = NoKernels()
    monkeypatch.setattr(kernel_routes, "engine", lambda: engine)
    return engine


@pytest.fixture(scope="session")
def golden() -> Path:
    """Figures computed by the original code; `pins.txt` there names the environment that made them."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def tiny_sp_model(golden) -> Path:
    """A 1,444-piece SentencePiece model in the layout of the real one."""
    return golden / "tiny_sp.model"


@pytest.fixture(scope="session")
def real_sp_model() -> Path:
    """The real `ice_text.model`, which is not ours to ship: from $ICE_TEXT_MODEL or ../shared/ice_text."""
    path = Path(os.environ.get("ICE_TEXT_MODEL", ROOT.parent / "shared" / "ice_text" / "ice_text.model"))
    if not path.is_file():
        pytest.skip("set ICE_TEXT_MODEL to the real ice_text.model to run this test")
    return path


@pytest.fixture(scope="session")
def golden_model(golden):
    """`golden_model("base2d")`: the model of a golden folder in float32, its cases by name, its tensors."""
    from chatglm_slim.configuration_chatglm import ChatGLMConfig
    from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration
    from safetensors.torch import load_file

    def load(name: str, **changes):
        folder = golden / "model" / name
        config = ChatGLMConfig.from_pretrained(folder)
        for field, value in changes.items():
            setattr(config, field, value)
        model = ChatGLMForConditionalGeneration(config)
        weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if "inv_freq" not in k}
        model.load_state_dict(weights, strict=True)
        cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
        tensors = folder / "tensors.safetensors"
        return (
            model.eval().float(),
            {case["name"]: case for case in cases},
            load_file(tensors) if tensors.exists() else {},
        )

    return load


@pytest.fixture
def hub(tmp_path):
    """A Hub on this machine."""
    from hub import serving

    with serving(tmp_path) as state:
        yield state
