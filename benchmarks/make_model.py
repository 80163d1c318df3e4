"""Model folders of the real widths with random weights, made tensor by tensor, for the benchmarks.

    python benchmarks/make_model.py [--layers 28] [--dtype bfloat16] [--kinds 16 int8 int8-head int4 int4-head ...]
    python benchmarks/make_model.py --delete

Writes `bench_data/<layers>-<dtype>/<kind>/`: the 16-bit checkpoint shard by shard, and from its matrices the INT8 and
INT4 ones; `-head` stores embedding and head in INT8 as well, `-head4` in INT4. Layers beyond four have the numbers
of the first four once more, in files of their own, so that a deep model takes no deep 16-bit one to quantize. A shard
that two folders share is one file on the disk (hard link). The code is copied beside, and a stand-in vocabulary of
1,444 pieces, enough for runs that feed ids. 28 layers need 22 GB of disk (INT4 alone 6) and 3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from package import copy_package, package_module  # noqa: E402

DATA = ROOT / "bench_data"
KINDS = {  # name: bits of the layers and of the head, 0 for 16
    "16": (0, 0),
    "int8": (8, 0),
    "int8-head": (8, 8),
    "int4": (4, 0),
    "int4-head": (4, 8),
    "int4-head4": (4, 4),
}
DISTINCT = 4  # layers with numbers of their own
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING = "transformer.word_embeddings.weight"
LINEARS = {  # name in a layer: rows and columns as multiples of the hidden size
    "attention.query_key_value": (3, 1),
    "attention.dense": (1, 1),
    "mlp.dense_h_to_4h": (4, 1),
    "mlp.dense_4h_to_h": (1, 4),
}


def folder_of(layers: int, kind: str, dtype: str = "bfloat16", data: Path = DATA) -> Path:
    return data / f"{layers}-{dtype}" / kind


def make_folders(layers: int, kinds: list[str], dtype: str = "bfloat16", data: Path = DATA) -> dict[str, Path]:
    """The folders of these kinds by kind; what exists is kept, but the code in them is always today's."""
    source = folder_of(min(layers, DISTINCT), "16", dtype, data)
    if not (source / "config.json").is_file():
        make_16_bit(source, min(layers, DISTINCT), dtype)
    folders = {}
    for kind in kinds:
        bits, head = KINDS[kind]
        folder = folders[kind] = folder_of(layers, kind, dtype, data)
        if not (folder / "config.json").is_file():
            make_from_16_bit(source, folder, layers, bits, head, dtype)
        copy_code(folder)
    return folders


def layer_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Name in a layer -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes.update({f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)})
    for name, (rows, columns) in LINEARS.items():
        shapes.update({f"{name}.weight": (rows * hidden, columns * hidden), f"{name}.bias": (rows * hidden,)})
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal weights as the model is initialised with (deviation 0.02); LayerNorms near one. What a layer adds
    outweighs what comes in, or each token would be that before it, the <sop> that no server shows."""
    generator = torch.Generator().manual_seed(seed)
    deviation = 0.5 if name.endswith("dense_4h_to_h.weight") else 0.02
    tensor = torch.empty(shape, dtype=dtype).normal_(0, deviation, generator=generator)
    return tensor.add_(1) if name.endswith("layernorm.weight") else tensor


def make_16_bit(folder: Path, layers: int, dtype: str) -> None:
    config = json.loads((ROOT / "config.json").read_text())
    hidden, rows = config["hidden_size"], config["vocab_size"]

    def tensors(prefix: str, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
        names = enumerate(shapes.items())
        return {prefix + n: random_tensor(n, s, DTYPES[dtype], 1000 * seed + i) for i, (n, s) in names}

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield "head", tensors("", {EMBEDDING: (rows, hidden)}, 0)
        for layer in range(layers):
            yield f"layer-{layer:02d}", tensors(f"transformer.layers.{layer}.", layer_shapes(hidden), layer + 1)
        norm = {"transformer.final_layernorm.weight": (hidden,), "transformer.final_layernorm.bias": (hidden,)}
        yield "norm", tensors("", norm, layers + 1)

    write_folder(folder, shards(), {**config, "num_layers": layers, "torch_dtype": dtype})


def make_from_16_bit(source: Path, folder: Path, layers: int, bits: int, head: int, dtype: str) -> None:
    """Of DISTINCT layers or fewer in 16 bit, as many as asked for in the form asked for."""
    quantize = package_module("quantization").quantize_weight
    siblings = [folder.with_name(kind) for kind, (of_layers, _) in KINDS.items() if of_layers == bits]
    sibling = next((other for other in siblings if (other / "config.json").is_file()), None)

    def shards() -> Iterator[tuple[str, dict[str, Tensor] | Path]]:
        for path in sorted(source.glob("model-*.safetensors")):
            name = path.stem.removeprefix("model-")
            width = head if name == "head" else bits
            if name == "norm" or not width:
                yield name, path
            elif name != "head" and sibling is not None:
                yield name, sibling / path.name
            else:
                yield name, {k: v for stored in load_tensors(path) for k, v in quantized(*stored, width, quantize)}
        for layer in range(DISTINCT, layers):
            name, like = f"layer-{layer:02d}", f"layer-{layer % DISTINCT:02d}"
            again = load_tensors(folder / f"model-{like}.safetensors")
            own = {k.replace(f".{layer % DISTINCT}.", f".{layer}.", 1): v for k, v in again}
            yield name, own if sibling is None else sibling / f"model-{name}.safetensors"

    config = json.loads((source / "config.json").read_text())
    config.update(num_layers=layers, quantization_bit=bits, quantization_group_size=0, quantize_head=head)
    write_folder(folder, shards(), config)


def load_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            yield name, stored.get_tensor(name)


def quantized(name: str, tensor: Tensor, bits: int, quantize) -> Iterator[tuple[str, Tensor]]:
    """The stored form of one tensor."""
    if tensor.dim() < 2:
        yield name, tensor
        return
    weight, scale = quantize(tensor, bits)
    yield name, weight
    yield f"{name}_scale", scale.to(tensor.dtype)


def write_folder(folder: Path, shards, config: dict) -> None:
    """Shards are (name, tensors) or (name, file to share); config.json comes last and says that all is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    size = 0
    for name, content in shards:
        path = folder / f"model-{name}.safetensors"
        if isinstance(content, Path):
            share_file(content, path)
        else:
            save_file(content, path, metadata={"format": "pt"})
        with safe_open(path, "pt") as stored:
            weight_map.update(dict.fromkeys(stored.keys(), path.name))
        size += path.stat().st_size
        print(f"\r{folder.parent.name}/{folder.name}: {size / 1e9:.2f} GB", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    copy_code(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def share_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def copy_code(folder: Path) -> None:
    """The package, and a stand-in for the vocabulary."""
    copy_package(folder)
    shutil.copyfile(ROOT / "generation_config.json", folder / "generation_config.json")
    shutil.copyfile(ROOT / "tests" / "golden" / "tiny_sp.model", folder / "ice_text.model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--data", type=Path, default=DATA, help="where to put the folders (default: bench_data)")
    parser.add_argument("--delete", action="store_true", help="delete all that the benchmarks wrote there")
    options = parser.parse_args()
    if options.delete:
        shutil.rmtree(options.data, ignore_errors=True)
        return
    for kind, folder in make_folders(options.layers, options.kinds, options.dtype, options.data).items():
        print(f"{kind}\t{folder}")


if __name__ == "__main__":
    main()
