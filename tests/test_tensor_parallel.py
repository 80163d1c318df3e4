"""Tensor parallelism of transformers over two processes of this machine gives what one process gives.

All in float64, where two right results agree to far more than the digits asked for, and a part that is missing or
counted twice shows in the first ones. Run by torchrun, this file is the program of each process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
DIGITS = 1e-9  # of the largest number, where float64 has 2e-16
IDS = [[5, 95, 1101, 1601, 1604, 7, 9, 12]]
FORMATS = {
    "plain": {},
    "untied": {},
    "INT8": {"bits": 8},
    "INT4": {"bits": 4, "quantize_head": 8},
    "INT4 in groups": {"bits": 4, "group_size": 32, "quantize_head": 4},
}


def numbers_of(model, tokenizer) -> dict[str, torch.Tensor]:
    """Logits of a padded batch, answers, and gradients: of the embeddings, which pass all layers, and of weights where
    they are trained."""
    batch = tokenizer(["你好", "介绍一下清华大学"], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = {"logits": model(**batch).logits}
    found["greedy"] = model.generate(**batch, do_sample=False, max_new_tokens=4)
    static = {"cache_implementation": "static", "disable_compile": True}
    found["greedy, static cache"] = model.generate(**batch, do_sample=False, max_new_tokens=4, **static)
    answer = model.chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=4)[0]
    streamed = list(model.stream_chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=4))[-1][0]
    found |= {"chat": torch.tensor(tokenizer.encode_text(answer)), "equal stream": torch.tensor(answer == streamed)}
    ids = torch.tensor(IDS)
    labels = torch.where(torch.arange(ids.shape[1]) < 5, -100, ids)
    given = model.get_input_embeddings()(ids).detach().requires_grad_()
    places = {"position_ids": model.get_position_ids(ids, [3], "cpu"), "attention_mask": model.get_masks(ids, "cpu")}
    model(inputs_embeds=given, labels=labels, **places).loss.backward()
    found["gradient of the embeddings"] = given.grad
    for name, own in model.named_parameters():
        if own.grad is not None and ("layers.0." in name or "layers.3." in name):
            found["gradient of " + name] = getattr(own.grad, "full_tensor", lambda own=own: own.grad)()
    return found


def process(folder: str) -> None:
    """One of the two processes; the first one writes down the numbers of each model."""
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    for path in sorted(Path(folder).iterdir()):
        numbers = {}
        try:
            options = {"distributed_config": DistributedConfig(tp_plan="auto"), "dtype": torch.float64}
            model = AutoModel.from_pretrained(path, trust_remote_code=True, **options).eval()
            numbers = numbers_of(model, AutoTokenizer.from_pretrained(path, trust_remote_code=True))
            try:
                model.quantize(8) if not model.config.quantization_bit else model.dequantize()
            except ValueError as error:
                numbers["refusal of another format"] = str(error)
            model.save_pretrained(path / "saved")
        except ValueError as error:
            numbers["error"] = str(error)
        if os.environ["RANK"] == "0":
            torch.save(numbers, path / "numbers.pt")
    torch.distributed.destroy_process_group()


def make_folders(root: Path) -> None:
    from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration

    import train_tiny
    from package import copy_package

    torch.manual_seed(0)
    settings = json.loads((train_tiny.TINY / "config.json").read_text(encoding="utf-8"))
    strange = {"five heads": {"num_attention_heads": 5, "hidden_size": 160}, "prefix": {"pre_seq_len": 3}}
    for name in [*FORMATS, "groups of 128", *strange]:
        model = ChatGLMForConditionalGeneration.from_pretrained(train_tiny.TINY)
        if name in strange:
            model = ChatGLMForConditionalGeneration(model.config.from_dict(settings | strange[name]))
        if name == "untied":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.5)
            model.config.tie_word_embeddings = False
        if name.startswith(("INT", "groups")):
            model.quantize(**FORMATS.get(name, {"bits": 4, "group_size": 128}))
        model.save_pretrained(root / name)
        shutil.copy(train_tiny.TINY / "ice_text.model", root / name)
        copy_package(root / name)
        written = json.loads((root / name / "config.json").read_text(encoding="utf-8"))
        (root / name / "config.json").write_text(json.dumps(written | {"auto_map": settings["auto_map"]}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for each model, where both processes have been."""
    pytest.importorskip("transformers.distributed.mixin", reason="tensor parallelism as transformers 5.23 has it")
    root = tmp_path_factory.mktemp("models")
    make_folders(root)
    options = ["--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(root.parent / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.parametrize("name", FORMATS)
def test_two_processes_give_the_numbers_of_one(root, name):
    tokenizer = AutoTokenizer.from_pretrained(root / name, trust_remote_code=True)
    model = AutoModel.from_pretrained(root / name, trust_remote_code=True, dtype=torch.float64).eval()
    alone, shared = numbers_of(model, tokenizer), torch.load(root / name / "numbers.pt")
    assert "error" not in shared, shared["error"]
    assert alone["equal stream"] and alone.keys() <= shared.keys()
    assert sum(key.startswith("gradient") for key in alone) >= (1 if model.config.quantization_bit else 8)
    for key, expected in alone.items():
        assert expected.any() and torch.is_floating_point(expected) == torch.is_floating_point(shared[key])
        furthest = (shared[key].double() - expected.double()).abs().max()
        assert furthest <= DIGITS * expected.double().abs().max(), f"{key} is off by {furthest:.1e}"


@pytest.mark.parametrize("name", FORMATS)
def test_two_processes_save_one_checkpoint(root, name):
    from safetensors.torch import load_file

    saved, stored = (load_file(folder / "model.safetensors") for folder in (root / name / "saved", root / name))
    for key in set(saved) - set(stored):  # transformers gathers each name: a tied head comes twice
        stored[key] = stored[key.replace("lm_head", "transformer.word_embeddings")]
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key].to(stored[key]), stored[key]) for key in stored)


@pytest.mark.parametrize("name", FORMATS)
def test_another_format_is_refused_where_each_process_has_a_part(root, name):
    refusal = torch.load(root / name / "numbers.pt")["refusal of another format"]
    assert "weights are offloaded or split over processes" in refusal and "load the model as a whole first" in refusal


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("five heads", "ChatGLMConfig.num_attention_heads = 5: 2 processes cannot share its heads and groups"),
        ("groups of 128", "2 processes cannot share its heads and groups of columns, take a divisor of 1"),
        ("prefix", "ChatGLMConfig.pre_seq_len = 3: tensor parallelism is not for P-tuning: use a device_map"),
    ],
)
def test_what_cannot_be_shared_is_refused(root, name, message):
    assert message in torch.load(root / name / "numbers.pt")["error"]


if __name__ == "__main__":
    process(sys.argv[1])
