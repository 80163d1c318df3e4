"""Processes without the engine, with one that does not start, and what the first products leave as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chatglm_slim import kernel_routes

ROOT = Path(__file__).resolve().parents[1]
PROLOGUE = """
import os, sys, types
package = sys.modules["chatglm_slim"] = types.ModuleType("chatglm_slim")
package.__path__ = [ROOT]
sys.path[:0] = PATHS
import torch, transformers
def model(dtype, bits):
    from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
    torch.manual_seed(3)
    sizes = {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 256}
    ids = {"bos_token_id": 1104, "eos_token_id": 1105, "gmask_token_id": 1101, "pad_token_id": 3}
    config = ChatGLMConfig(vocab_size=1472, **sizes, **ids)
    return ChatGLMForConditionalGeneration(config).eval().to(dtype).quantize(bits)
def answer(dtype, bits):
    ids = torch.tensor([[5, 9, 700, 33, 12, 1101, 1104]])
    mask = torch.ones_like(ids)
    return model(dtype, bits).generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=5).tolist()
"""
ANSWERS = """
print(answer(torch.float32, 0))
for dtype, bits in ((torch.float32, 8), (torch.bfloat16, 4), (torch.float16, 0)):
    answer(dtype, bits)
"""


def run(code, *paths):
    code = f"ROOT, PATHS = {str(ROOT)!r}, {[str(path) for path in paths]}\n{PROLOGUE}{code}"
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], [line for line in done.stderr.splitlines() if "chatglm_cpu" in line]


@pytest.fixture(scope="module")
def expected():
    return run("print(answer(torch.float32, 0))", ROOT / "cpu")[0]


def make_module(folder, name, text):
    folder = folder / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(text)


def test_without_the_engine_one_line_for_each_kind_of_weights_says_so(expected, tmp_path):
    out, lines = run('sys.modules["chatglm_cpu"] = None\n' + ANSWERS)
    assert out == expected
    if kernel_routes.platform.machine().lower() in ("x86_64", "amd64"):
        assert [line.partition(" weights")[0][-6:] for line in lines] == ["INT8", "INT4", "16-bit"]
        assert all("pip install ./cpu" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [("API_LEVEL = 0", "API level 0"), ("raise OSError('cannot load')", "does not start")],
)
def test_an_engine_that_is_too_old_or_does_not_start_is_said_in_one_line(expected, tmp_path, text, message):
    make_module(tmp_path, "chatglm_cpu", text)
    out, lines = run(ANSWERS, tmp_path)
    assert out == expected
    told = [line for line in lines if "weights are computed" not in line]
    assert len(told) == 1 and message in told[0] and "pip install ./cpu" in told[0]


@pytest.mark.parametrize(
    "text", ["raise OSError('Could not find/load libllvmlite.so')", "import nothing_of_this_name"]
)
def test_an_llvmlite_that_does_not_load_is_said_once_and_pytorch_answers(expected, tmp_path, text):
    make_module(tmp_path, "llvmlite", "")
    make_module(tmp_path / "llvmlite", "binding", text)
    out, lines = run(ANSWERS, tmp_path, ROOT / "cpu")
    assert out == expected
    warned = [line for line in lines if "pip install" in line and "llvmlite" in line]
    assert len(warned) == 1


def test_import_and_first_products_change_nothing_of_the_process():
    code = """
def state():
    return (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(),
            torch.get_default_device(), torch.get_float32_matmul_precision(), torch.random.get_rng_state().tolist(),
            torch.backends.mkldnn.enabled, list(sys.path), os.getcwd())
import transformers.modeling_utils, transformers.utils.logging
before = state()
import chatglm_slim.modeling_chatglm, chatglm_slim.tokenization_chatglm
assert state() == before
assert not {"chatglm_cpu", "llvmlite", "cpm_kernels"} & set(sys.modules), "imported early"
networks = [model(torch.bfloat16, 4), model(torch.float32, 8), model(torch.float16, 0)]
ids = torch.tensor([[5, 9, 700, 33, 12, 1101, 1104]])
before, modules = state(), set(sys.modules)
with torch.no_grad():
    for network in networks:
        output = network(ids, use_cache=True)
        network(ids[:, :1], past_key_values=output.past_key_values)
assert state() == before
new = {name.partition(".")[0] for name in set(sys.modules) - modules} - set(sys.stdlib_module_names)
print(sorted(new - {"chatglm_slim", "chatglm_cpu", "llvmlite", "torch", "transformers"}))
"""
    assert run(code, ROOT / "cpu")[0] == "[]"


def test_the_private_names_of_torch_that_the_seam_asks_are_there():
    """Without them plain PyTorch serves, silently slower: this test has to say so."""
    assert all(isinstance(hooks, dict) for hooks in kernel_routes.GLOBAL_HOOKS)
    assert kernel_routes.torch_functions() == kernel_routes.TORCH
    assert torch._C._len_torch_dispatch_stack() == 0
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    assert any(kernel_routes.GLOBAL_HOOKS)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *arguments: None)
    assert any(kernel_routes.GLOBAL_HOOKS)
    handle.remove()
    assert not any(kernel_routes.GLOBAL_HOOKS)


def test_a_function_that_is_not_torchs_own_is_told_apart():
    import functools

    wrapper = functools.wraps(torch.nn.Linear.forward)(lambda self, x: x)
    assert not kernel_routes.is_of_torch(wrapper) and not kernel_routes.is_of_torch(len.__call__)
    assert all(kernel_routes.is_of_torch(function) for function in kernel_routes.torch_functions())
