"""Memory and time of `slim.py` on a checkpoint of the real sizes, against `cp` of the same files on the same disk.

    python benchmarks/slim.py [--format bin|safetensors|both] [--layers 28] [--bits 4] [--folder DIR]

Makes the full-vocabulary 6B checkpoint (13.7 GB, 8 shards, random float16, LayerNorms float32) shard by shard in DIR,
measures `cp`, `slim.py` and `cp` again in one run, each with the source out of the page cache (Linux) and until its
output is on the disk, and deletes everything. Needs twice the checkpoint's size of free space. `--layers 2` is a small
run. Peak memory is the child process's own (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from slimming import checkpoint_io as io  # noqa: E402
from slimming.plan import EMBEDDING, HEAD, IMAGE_ROWS, expected_shapes  # noqa: E402

RELEASED = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
MOVED = {name: value + IMAGE_ROWS for name, value in RELEASED.items() if name.endswith("_token_id")}
ROWS, PIECES, SHARDS = RELEASED["vocab_size"] + IMAGE_ROWS, 130000, 8
CONFIG = {**RELEASED, **MOVED, "vocab_size": ROWS}


def tensors_by_shard(layers: int) -> Iterator[list[tuple[str, str, tuple[int, ...]]]]:
    """(name, dtype, shape) of each shard: the embedding in the first, the head alone in the last, as published."""
    shapes = expected_shapes({**CONFIG, "num_layers": layers}, ROWS, tensors=20 * layers)
    names = [EMBEDDING, *(name for name in shapes if name != EMBEDDING)]
    size = {name: int(numpy.prod(shapes[name])) * 2 for name in names}
    limit = 1.05 * sum(size.values()) / (SHARDS - 1)
    shard: list[tuple[str, str, tuple[int, ...]]] = []
    filled = 0
    for name in names:
        if shard and filled + size[name] > limit:
            yield shard
            shard, filled = [], 0
        shard.append((name, "F32" if "layernorm" in name else "F16", shapes[name]))
        filled += size[name]
    yield shard
    yield [(HEAD, "F16", shapes[EMBEDDING])]


def random_bytes(count: int, item_size: int, seed: int) -> memoryview:
    """Random numbers below 2 in magnitude, so none is NaN or infinite."""
    numbers = numpy.random.default_rng(seed).integers(0, 2**64, count // 8 + 1, dtype=numpy.uint64)
    numbers &= numpy.uint64(0xBFFFBFFFBFFFBFFF if item_size == 2 else 0xBFFFFFFFBFFFFFFF)
    return memoryview(numbers.view("u1"))[:count]


def make_checkpoint(folder: Path, kind: str, layers: int) -> None:
    import torch

    shards = list(tensors_by_shard(layers))
    weight_map = {}
    seed = 0
    for number, tensors in enumerate(shards, 1):
        name = f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{number:05d}-of-{len(shards):05d}.{kind}"
        contents = {}
        for tensor, dtype, shape in tensors:
            seed += 1
            size = io.ITEM_SIZES[dtype]
            contents[tensor] = random_bytes(int(numpy.prod(shape)) * size, size, seed)
            weight_map[tensor] = name
        if kind == "safetensors":
            io.write_shard(folder / name, tensors, contents.items())
        else:
            state = {tensor: io.as_tensor(contents[tensor], dtype).view(shape) for tensor, dtype, shape in tensors}
            torch.save(state, folder / name)
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_layers": layers}))
    (folder / "ice_text.model").write_bytes(stand_in_sentencepiece())


def stand_in_sentencepiece() -> bytes:
    """A file with as many pieces as the first release's, which can't be shipped here."""

    def field(number: int, content: bytes) -> bytes:
        length = len(content)
        size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
        return bytes([number << 3 | 2]) + size + content

    names = ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁", *(f"piece{i}" for i in range(PIECES - 6))]
    pieces = (field(1, field(1, name.encode()) + b"\x15" + struct.pack("<f", -1.0)) for name in names)
    return b"".join(pieces) + field(2, b"\x18\x01")


# -------------------------------------------------------------------------------------------------------- measuring


def to_disk(folder: Path, forget: bool = False) -> None:
    """Until every file of the folder is on the disk; `forget` drops it from the page cache as well."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(command: list[str], source: Path, output: Path) -> tuple[float, float, float]:
    """Seconds of the command, seconds until its output is on the disk, and its peak memory in MB."""
    to_disk(source, forget=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    to_disk(output)
    total = time.perf_counter() - start
    return seconds, total, usage.ru_maxrss / 1e3 * (1.024 if sys.platform == "linux" else 1e-3)


def run(kind: str, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="slim-benchmark-") as name:
        source, output = Path(name, "source"), Path(name, "output")
        source.mkdir()
        # in a process of its own: a child's peak memory counts what its parent held when it was started
        maker = multiprocessing.get_context("spawn").Process(
            target=make_checkpoint, args=(source, kind, options.layers)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"making the checkpoint ended with status {maker.exitcode}")
        size = sum(path.stat().st_size for path in source.iterdir())
        slim = [sys.executable, str(ROOT / "slim.py"), str(source), str(output)]
        slim += ["--bits", str(options.bits)] if options.bits else []
        copy = ["cp", "-r", str(source), str(output)]
        print(f"{kind}: {size / 1e9:.2f} GB in {sum(1 for _ in source.glob(f'*.{kind}'))} shards", flush=True)
        print(f"{'':<10}{'seconds':>9}{'on disk':>9}{'peak MB':>9}{'GB out':>8}", flush=True)
        results = {}
        for label, command in (("cp", copy), ("slim.py", slim), ("cp again", copy)):
            results[label] = seconds, total, peak = measure(command, source, output)
            written = sum(path.stat().st_size for path in output.iterdir())
            print(f"{label:<10}{seconds:>9.1f}{total:>9.1f}{peak:>9.0f}{written / 1e9:>8.2f}", flush=True)
            shutil.rmtree(output)
        for index, what in ((0, "command"), (1, "until on disk")):
            copies = (results["cp"][index] + results["cp again"][index]) / 2
            print(f"slim.py / cp, {what}: {results['slim.py'][index] / copies:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--format", choices=("bin", "safetensors", "both"), default="both")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=0)
    parser.add_argument("--folder", default=".", help="where there is room (default: here)")
    options = parser.parse_args()
    for kind in ("safetensors", "bin") if options.format == "both" else (options.format,):
        run(kind, options)


if __name__ == "__main__":
    main()
