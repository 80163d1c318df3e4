"""Which file of a folder transformers loads the weights from, on this version, and that slim.py takes the same."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2Model

from slimming.checkpoint_io import loaded_file, weight_files

CONFIG = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16, n_positions=8)
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def write(folder, name: str, number: float, state: dict) -> None:
    """The file, or the index and the shard that it names, with `number` for every weight."""
    numbers = {key: torch.full_like(tensor, number) for key, tensor in state.items()}
    file = name
    if name.endswith(".index.json"):
        stem, suffix = name.removesuffix(".index.json").split(".")
        file = f"{stem}-00001-of-00001.{suffix}"
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(numbers, file)}
        (folder / name).write_text(json.dumps(index))
    if file.endswith(".safetensors"):
        save_file(numbers, folder / file, {"format": "pt"})
    else:
        torch.save(numbers, folder / file)


@pytest.mark.parametrize("present", [c for n in range(1, 5) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_slim_takes_the_file_that_transformers_loads(tmp_path, present):
    state = {name: tensor for name, tensor in GPT2Model(CONFIG).state_dict().items() if "attn.bias" not in name}
    CONFIG.save_pretrained(tmp_path)
    for name in present:
        write(tmp_path, name, 1.0 + NAMES.index(name), state)
    loaded = NAMES[int(GPT2Model.from_pretrained(tmp_path).wte.weight[0, 0]) - 1]
    assert loaded_file({path.name for path in tmp_path.iterdir()}) == loaded
    names, weight_map = weight_files(tmp_path)
    assert (weight_map is not None) == loaded.endswith(".index.json")
    assert names == ([loaded] if weight_map is None else sorted(set(weight_map.values())))
