"""What train.py does where several processes train together; docs/devices.md says how they are started."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer

BLOCK = "GLMBlock"  # which FSDP splits as one


def how_many() -> int:
    """Processes that torchrun, accelerate or DeepSpeed started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_launch(options: argparse.Namespace) -> str:
    """What is wrong with the way that train.py was started; "" if nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "accelerate launch --use_fsdp: start it with --multi_gpu, and give train.py --fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "accelerate launch --use_deepspeed: start it with --multi_gpu, and give train.py --deepspeed FILE"
    if options.fsdp and options.deepspeed:
        return "--fsdp and --deepspeed both split the model: give one of them"
    if options.fsdp and how_many() < 2:
        return "--fsdp needs several processes: torchrun --nproc_per_node=2 finetune/train.py ..."
    if options.fsdp and options.method == "ptuning":
        return "--method ptuning trains the prefix alone: leave out --fsdp, or use --method lora or full"
    return check_deepspeed(options.deepspeed) if options.deepspeed else ""


def check_deepspeed(path: Path) -> str:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"--deepspeed {path}: {error}"
    if not isinstance(settings, dict):
        return f"--deepspeed {path}: holds a {type(settings).__name__}, not an object with DeepSpeed's settings"
    if importlib.util.find_spec("deepspeed") is None:
        return f"--deepspeed {path}: DeepSpeed is missing: pip install deepspeed"
    return ""


def sharding() -> dict:
    """TrainingArguments for FSDP2: each process holds a part of every block, and what is saved is whole."""
    return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": [BLOCK]}}


def shard_on_cpus(trainer: Trainer) -> None:
    """accelerate uses FSDP on GPUs only, and trains without in silence elsewhere; PyTorch has it for CPUs, too."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def is_split(model: torch.nn.Module) -> bool:
    """Whether FSDP put a class of its own over that of a whole model, whose code would be saved in place of ours."""
    return isinstance(model, FSDPModule) and isinstance(model, PreTrainedModel)


def save_whole(model: PreTrainedModel, state: dict[str, torch.Tensor], folder: str) -> None:
    """save_pretrained of the model that FSDP split, from its whole weights."""
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        whole = kind(model.config)
    whole.load_state_dict(state, assign=True)
    whole.generation_config = model.generation_config
    whole.tie_weights()
    whole.save_pretrained(folder)
