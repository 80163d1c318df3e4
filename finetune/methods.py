"""The three ways to tune a model, what each saves, and how that loads again.

| method | what is trained | what is saved |
|---|---|---|
| ptuning | keys and values before the first token | pytorch_model.bin with transformer.prefix_encoder.* |
| lora | low-rank matrices beside the linear layers | a PEFT adapter folder |
| full | everything | a whole checkpoint |
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from finetune.adapters import add_lora, load_lora

METHODS = ("ptuning", "lora", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
PREFIX = "transformer.prefix_encoder."  # of the official keys
PREFIX_FILE = "pytorch_model.bin"  # which the official evaluation reads


def load_base(path: str, bits: int = 0, dtype: torch.dtype | str = "auto", **options) -> tuple[nn.Module, object]:
    """The model, quantized to `bits` unless it is already, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype=dtype, **options)
    return model.quantize(bits), tokenizer


def trainable(model: nn.Module, method: str, rank: int = 8, alpha: int = 16, dropout: float = 0.0) -> nn.Module:
    """The model with what the method trains, in float32, and nothing else to train. `ptuning` wants one that was
    loaded with pre_seq_len.

    Raises:
        ValueError: full tuning of a quantized model.
    """
    if method == "lora":
        return add_lora(model, rank, alpha, dropout)  # PEFT makes its numbers float32
    if method == "ptuning":
        model.transformer.prefix_encoder.float()
        return model
    if model.config.quantization_bit:
        raise ValueError(
            f"--method full on an INT{model.config.quantization_bit} model: integers cannot be tuned; use "
            "--method lora or ptuning, or a 16-bit model"
        )
    return model.float()


def prefix_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The prefix under its official keys."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name.startswith(PREFIX)}


def save_prefix(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(prefix_state(model), folder / PREFIX_FILE)
    model.config.save_pretrained(folder)


def fill_prefix(model: nn.Module, folder: Path) -> None:
    """Puts a saved prefix into a model that was made with pre_seq_len."""
    state = torch.load(folder / PREFIX_FILE, map_location="cpu", weights_only=True)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    model.transformer.prefix_encoder.load_state_dict(state)


def prefix_settings(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {"pre_seq_len": config.get("pre_seq_len"), "prefix_projection": config.get("prefix_projection", False)}


def kind_of(folder: Path) -> str:
    """Which method's result lies in a folder."""
    if (folder / "adapter_config.json").is_file():
        return "lora"
    has_prefix = (folder / PREFIX_FILE).is_file() and not (folder / "model.safetensors").exists()
    if has_prefix and prefix_settings(folder)["pre_seq_len"]:
        return "ptuning"
    if (folder / "config.json").is_file():
        return "full"
    raise ValueError(f"{folder} holds no adapter, no prefix and no model")


def load_tuned(path: str, tuned: Path, bits: int = 0, dtype: torch.dtype | str = "auto") -> tuple[nn.Module, object]:
    """The base model at `path` with what train.py saved in `tuned`, ready to chat; and the tokenizer."""
    kind = kind_of(tuned)
    if kind == "full":
        return load_base(str(tuned), bits, dtype)
    if kind == "lora":
        model, tokenizer = load_base(path, bits, dtype)
        return load_lora(model, tuned).eval(), tokenizer
    model, tokenizer = load_base(path, bits, dtype, **prefix_settings(tuned))
    fill_prefix(model, tuned)
    return model.eval(), tokenizer
