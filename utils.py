"""`load_model_on_gpus`, where the scripts for the original ChatGLM-6B import it from: one model over several GPUs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel


def auto_configure_device_map(num_gpus: int, num_layers: int = 28, prefix: bool = False) -> dict[str, int]:
    """Places for accelerate: the blocks in turn, evenly over the GPUs; embedding, last norm and head, which count as
    two blocks, on the first one, so that texts go in and logits come out there.

    Args:
        num_layers: blocks of the model.
        prefix: whether it has a P-tuning prefix, which is the first GPU's too.

    Raises:
        ValueError: fewer than one GPU.
    """
    if num_gpus < 1:
        raise ValueError(f"num_gpus = {num_gpus}: give 1 or more, or a device_map")
    first = ["word_embeddings", "final_layernorm", *(["prefix_encoder"] if prefix else [])]
    places = {**{f"transformer.{name}": 0 for name in first}, "lm_head": 0}
    for layer in range(num_layers):
        places[f"transformer.layers.{layer}"] = (layer + 2) * num_gpus // (num_layers + 2)
    return places


def load_model_on_gpus(
    checkpoint_path: str | Path, num_gpus: int = 2, device_map: dict | str | None = None, **kwargs
) -> torch.nn.Module:
    """The model in float16, its blocks spread over `num_gpus` GPUs, or as `device_map` says (a map, "auto", ...).

    Args:
        kwargs: anything that from_pretrained takes.

    Raises:
        ValueError: fewer GPUs are there than asked for.
    """
    kwargs = {"trust_remote_code": True, "torch_dtype": torch.float16, **kwargs}
    if device_map is None:
        there = torch.cuda.device_count()
        if num_gpus > there:
            raise ValueError(
                f"num_gpus = {num_gpus}: PyTorch sees {there} GPUs here; give num_gpus up to that, or device_map="
                '"auto", which puts on the CPU, and with offload_folder=... on disk, what no GPU has room for'
            )
        config = AutoConfig.from_pretrained(checkpoint_path, trust_remote_code=kwargs["trust_remote_code"])
        prefix = kwargs.get("pre_seq_len", config.pre_seq_len) is not None
        device_map = auto_configure_device_map(num_gpus, config.num_layers, prefix)
    return AutoModel.from_pretrained(checkpoint_path, device_map=device_map, **kwargs)
