"""How far the logits of a model that several devices or processes share are from those of one process.

    python benchmarks/devices.py tiny                                  # device maps
    torchrun --nproc_per_node=2 benchmarks/devices.py tiny             # tensor parallel

For the model as it is, in INT8 and in INT4, each way a line: the largest difference of a logit, beside the largest
logit, over all tokens of a question.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator

import torch
from transformers import AutoModel, AutoTokenizer

QUESTION = "介绍一下清华大学"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
ENDS = ("transformer.word_embeddings", "transformer.final_layernorm", "lm_head")


def ways(layers: int, scratch: str) -> Iterator[tuple[str, dict]]:
    """Names of what to compare with one process, and its arguments of from_pretrained."""
    if "WORLD_SIZE" in os.environ:
        from transformers.distributed import DistributedConfig

        yield f"{os.environ['WORLD_SIZE']} processes", {"distributed_config": DistributedConfig(tp_plan="auto")}
        return
    turns = {"the CPU and the disk": ("cpu", "disk"), "the disk": ("disk", "disk")}
    if torch.cuda.is_available():
        turns |= {"a GPU and the CPU": (0, "cpu")}
    for name, places in turns.items():
        ends = 0 if 0 in places else "cpu"
        blocks = {f"transformer.layers.{layer}": places[layer % 2] for layer in range(layers)}
        yield f"blocks on {name}", {"device_map": {**dict.fromkeys(ENDS, ends), **blocks}, "offload_folder": scratch}


@torch.no_grad()
def logits_of(path: str, tokenizer, **options) -> torch.Tensor:
    """[S, vocabulary]"""
    model = AutoModel.from_pretrained(path, trust_remote_code=True, **options).eval()
    return model(**tokenizer(QUESTION, return_tensors="pt").to(model.device)).logits[0].cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of what is no integer")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    dtype = DTYPES[options.dtype]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {f"INT{bits}, {options.dtype}" if bits else options.dtype: f"{scratch}/{bits}" for bits in (0, 8, 4)}
        for bits, folder in zip((0, 8, 4), folders.values()):  # before processes belong together: one would save
            model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=dtype)
            model.quantize(bits).save_pretrained(folder)
        for kept, folder in folders.items():
            expected = logits_of(folder, tokenizer, dtype=dtype)
            for name, way in ways(model.config.num_layers, f"{folder}/offload"):
                found = logits_of(folder, tokenizer, dtype=dtype, **way)
                furthest, largest = (found - expected).abs().max().item(), expected.abs().max().item()
                if os.environ.get("RANK", "0") == "0":
                    print(f"{kept}, {name}: {furthest:.1e} of {largest:.1f}", flush=True)


if __name__ == "__main__":
    main()
