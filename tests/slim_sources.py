"""Checkpoints of every kind that `slim.py` meets, made from the golden toys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
IMAGE_ROWS = 20_000


def full_toy() -> tuple[dict[str, torch.Tensor], dict]:
    """State dict (21472 rows, float16, untied) and config of the first-release toy."""
    folder = GOLDEN / "model" / "trim" / "preslim"
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def slim_toy() -> dict[str, torch.Tensor]:
    """The same toy, trimmed by the tool that made the golden figures."""
    return load_file(GOLDEN / "model" / "trim" / "slim" / "model.safetensors")


def widened(state: dict[str, torch.Tensor], config: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """A slim toy as it would have been in the first release: image rows in front, ids moved up."""
    state, config = dict(state), dict(config)
    for name in (EMBEDDING, HEAD):
        image = torch.randn(IMAGE_ROWS, state[name].shape[1], generator=torch.Generator().manual_seed(1))
        state[name] = torch.cat((image.to(state[name].dtype), state[name]))
    for name in ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id", "vocab_size"):
        config[name] += IMAGE_ROWS
    return state, config


def golden_toy(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    folder = GOLDEN / "model" / name
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def write_source(
    folder: Path, state: dict, config: dict | None, form: str = "safetensors", shards: int = 1, index: bool = True
) -> Path:
    """A checkpoint folder: `form` safetensors, bin or legacy (torch.save before 1.6); first-release tokenizer."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "tiny_sp_preslim.model", folder / "ice_text.model")
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names = list(state)
    step = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        part = {name: state[name].contiguous() for name in names[number * step : (number + 1) * step]}
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        weight_map.update(dict.fromkeys(part, file))
        if form == "safetensors":
            save_file(part, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=form == "bin")
    if shards > 1 and index:
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map}  # a stale size, as in the wild
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    return folder


def write_full_toy(folder: Path, **form) -> Path:
    state, config = full_toy()
    return write_source(folder, state, config, **form)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an output, read by the safetensors library."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state.update(load_file(path))
    return state


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )
