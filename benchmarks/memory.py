"""What the model needs in 16 bit, INT8 and INT4: from the real shapes, and on request measured.

    python benchmarks/memory.py                    computed, in a second
    python benchmarks/memory.py --measure          peak memory of CPU processes with random weights too (bench_data/)

Computed: weights; the key/value cache in its 256-token steps; and the largest temporaries alive at once while a prompt
of that length is read (attention mask, hidden states of the widest layer, logits of one position). The published
minimum for GPUs (13 / 10 / 6 GB, README of ChatGLM-6B) covers 16 bit, INT8 and INT4 with their officially 16-bit head.
Measured: peak resident memory of a process that loads the model, reads a prompt of 128 tokens and writes behind 2,048;
Python and libraries are part of it. Weights are mapped from the file, so they count once, as used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import machine
from make_model import DATA, EMBEDDING, KINDS, layer_shapes, make_folders
from remote import Remote, script
from speed_report import table

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {"16": 13, "int8": 10, "int4": 6}
GB = 1e9
CACHE_STEP = 256  # compat.CHUNK


def weight_bytes(config: dict, bits: int, quantize_head: int) -> int:
    """Bytes of all tensors of a checkpoint with a tied head; what is not quantized has 16 bits."""
    hidden = config["hidden_size"]
    total = matrix_bytes((config["vocab_size"], hidden), quantize_head)
    for name, shape in layer_shapes(hidden).items():
        is_matrix = name != EMBEDDING and len(shape) == 2
        total += config["num_layers"] * (matrix_bytes(shape, bits) if is_matrix else 2 * shape[0])
    return total + 2 * 2 * hidden  # the last LayerNorm


def matrix_bytes(shape: tuple[int, ...], bits: int) -> int:
    rows, columns = shape
    return rows * columns * bits // 8 + 2 * rows if bits else 2 * rows * columns


def cache_bytes(config: dict, tokens: int) -> int:
    room = -(-tokens // CACHE_STEP) * CACHE_STEP
    return 2 * 2 * config["num_layers"] * config["hidden_size"] * room


def temporary_bytes(config: dict, tokens: int) -> int:
    """The MLP of one layer is the widest: its input, the residual, and the inner states before and after GELU."""
    tokens = max(tokens, 1)
    states = 2 * tokens * (2 * config["hidden_size"] + 2 * config["inner_hidden_size"])
    return states + tokens * tokens + (2 + 4) * config["vocab_size"]  # mask in bytes; logits in 16 and 32 bit


def computed(config: dict) -> str:
    rows = []
    for kind, (bits, head) in KINDS.items():
        weights = weight_bytes(config, bits, head)
        row = [name_of(kind), f"{weights / GB:.2f}"]
        for tokens in (0, 2048):
            parts = (weights, cache_bytes(config, tokens), temporary_bytes(config, tokens))
            row.append(f"{sum(parts) / GB:.2f}")
        parts = (f"{cache_bytes(config, 2048) / GB:.2f}", f"{temporary_bytes(config, 2048) / GB:.2f}")
        rows.append([*row, *parts, str(PUBLISHED.get(kind, "–"))])
    head = ["GB", "weights", "in all, context 0", "in all, context 2048", "of it cache", "of it temporaries"]
    return table([*head, "published minimum"], rows)


def name_of(kind: str) -> str:
    return {"16": "FP16 / BF16"}.get(
        kind, kind.replace("int", "INT").replace("-head4", ", INT4 head").replace("-head", ", INT8 head")
    )


def measured(kinds: list[str], layers: int, data: Path) -> str:
    rows = []
    for kind in kinds:
        folder = make_folders(layers, [kind], data=data)[kind]
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        with Remote([sys.executable, script("worker.py"), str(folder)], {"HF_HUB_OFFLINE": "1"}) as worker:
            loaded = worker.started
            worker("prefill", tokens=128)
            worker("decode", context=128, steps=4)
            short = worker("memory")
            worker("decode", context=2048, steps=4)
            memory = worker("memory")
        values = (size, loaded["memory_peak"], short["peak"], memory["peak"], memory.get("own", 0))
        rows.append([name_of(kind), *(f"{value / GB:.2f}" for value in values)])
        rows[-1].append(f"{loaded['memory_peak'] / size:.2f}")
    head = ["GB, measured", "files", "peak after loading and a first token", "peak, context 128", "peak, context 2048"]
    return table([*head, "of it not mapped from files", "loading / files"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", action="store_true", help="run each model on the CPU as well")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    config = {**json.loads((ROOT / "config.json").read_text()), "num_layers": options.layers}
    print(computed(config))
    if options.measure:
        print(f"\n{machine.processor()}, {machine.memory_total() / 2**30:.0f} GiB\n")
        print(measured(options.kinds, options.layers, options.data))


if __name__ == "__main__":
    main()
