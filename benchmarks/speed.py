"""Speed and memory of the full-size model in 16 bit, INT8 and INT4, side by side with chatglm.cpp where installed.

    python benchmarks/speed.py                  decode with all 28 layers, prefill from 4 (35 minutes with chatglm.cpp)
    python benchmarks/speed.py --layers 4       everything scaled from 4 layers and 1 (4 minutes a group)
    python benchmarks/speed.py --prefill-layers 28 --groups original-bf16 --prompts 128 512 --contexts 128 1024
                                                beside the official code's way to compute (original.py)
    python benchmarks/speed.py --layers 4 --groups fastllm-int4 --fastllm-python VENV/bin/python   with ftllm in it
    python benchmarks/speed.py --peer-python VENV/bin/python     the Python that has chatglm-cpp, if not this one

Makes what it needs in bench_data/ once (make_model.py; the three groups with chatglm.cpp: 54 GB). Each model runs in a
process of its own. Models of one precision are measured in turn, figure by figure, or model by model where memory does
not hold them together (28 layers in 16 bit). The machine's read bandwidth drifts: it is measured before each, and
ratios and shares are medians of what stands side by side in each round. Writes JSON, a Markdown table and a plot.

Scaled figures are `one + (layers - 1) / (few - 1) * (time of few layers - one)`, all measured the same way, in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

import machine
from make_model import DATA, make_folders
from remote import Remote, script
from speed_report import write_report

LAYERS = 28
CONTEXTS = (100, 128, 512, 1024, 2000)
PROMPTS = (128, 512, 1536)
CACHE_BYTES = 2 * 4096 * 2  # of one token in one layer: keys and values, 16 bit


class Peer(NamedTuple):
    """Another program: what makes and runs its files, and in which Python."""

    folder: str
    script: str
    module: str  # that it needs
    python: str  # the option that names a Python with it
    unread: int = 0  # bytes of its files that no token reads
    spins: bool = False  # its threads are busy even between requests: nothing runs beside it, its bandwidth is too low


CHATGLM_CPP = Peer("chatglm.cpp", "peer_chatglm_cpp.py", "chatglm_cpp", "peer_python")
FASTLLM = Peer(  # the embedding apart from the head, in float32
    "fastllm", "peer_fastllm.py", "ftllm", "fastllm_python", unread=130528 * 4096 * 4, spins=True
)


class Model(NamedTuple):
    """One line of the table."""

    name: str
    kind: str  # of folder, or the peer's type
    peer: Peer | None = None
    dtype: str = "bfloat16"
    int8_activations: bool = False  # which change prefill only
    huge_pages: bool = False  # which change decoding only
    script: str = "worker.py"


GROUPS = {  # what is measured in turn
    "original-bf16": [Model("ours bf16", "16"), Model("original bf16", "16", script="original.py")],
    "original-fp16": [
        Model("ours fp16", "16", dtype="float16"),
        Model("original fp16", "16", dtype="float16", script="original.py"),
    ],
    "16-bit": [Model("ours bf16", "16"), Model("chatglm.cpp f16", "f16", peer=CHATGLM_CPP)],
    "fastllm-int4": [
        Model("ours int4, int4 head", "int4-head4"),
        Model("fastllm int4", "int4", peer=FASTLLM),
    ],
    "fastllm-int8": [
        Model("ours int8, int8 head", "int8-head"),
        Model("fastllm int8", "int8", peer=FASTLLM),
    ],
    "fp16": [
        Model("ours fp16", "16", dtype="float16"),
        Model("chatglm.cpp f16", "f16", peer=CHATGLM_CPP),
    ],
    "int8": [
        Model("ours int8", "int8"),
        Model("ours int8, int8 head", "int8-head"),
        Model("ours int8, int8 activations", "int8-head", int8_activations=True),
        Model("chatglm.cpp q8_0", "q8_0", peer=CHATGLM_CPP),
    ],
    "int4": [
        Model("ours int4", "int4"),
        Model("ours int4, int8 head", "int4-head"),
        Model("ours int4, int4 head", "int4-head4"),
        Model("ours int4, int8 head, huge pages", "int4-head", huge_pages=True),
        Model("ours int4, int4 head, huge pages", "int4-head4", huge_pages=True),
        Model("ours int4, int8 activations", "int4-head", int8_activations=True),
        Model("chatglm.cpp q4_0", "q4_0", peer=CHATGLM_CPP),
    ],
}


class Bench:
    """Starts workers, asks them in turn, and keeps every figure: `values[group][model][cell]` is a list of runs."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.reader = machine.ReadBandwidth()
        self.values: dict[str, dict[str, dict[str, list]]] = {}
        self.load: list[float] = []

    def stored(self, model: Model, layers: int) -> Path:
        """The folder or file of a model, made if missing. `layers` 1 is the first layer of the small one."""
        data, size = self.options.data, max(layers, self.options.prefill_layers)
        if not model.peer:
            return make_folders(size, [model.kind], model.dtype, data)[model.kind]
        file = data / f"{layers}-{model.peer.folder}" / f"{model.kind}.bin"
        if not file.exists():
            source = make_folders(size, ["16"], "bfloat16", data)["16"]
            command = [*self.peer_command(model.peer), "convert", str(source), str(file)]
            command += ["--type", model.kind, "--layers", str(layers)]
            print(f"making {file}", file=sys.stderr)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return file

    def peer_command(self, peer: Peer) -> list[str]:
        return [getattr(self.options, peer.python), script(peer.script)]

    def start(self, model: Model, layers: int) -> Remote:
        stored = str(self.stored(model, layers))
        if model.peer:
            return Remote([*self.peer_command(model.peer), "work", stored])
        command = [sys.executable, script(model.script), stored, "--layers", str(layers)]
        command += ["--dtype", model.dtype] if model.script == "original.py" else []
        command += ["--int8-activations"] if model.int8_activations else []
        command += ["--huge-pages"] if model.huge_pages else []
        return Remote([*command, "--threads", str(self.options.threads)], {"HF_HUB_OFFLINE": "1"})

    def keep(self, group: str, model: Model, cell: str, value) -> None:
        self.values.setdefault(group, {}).setdefault(model.name, {}).setdefault(cell, []).append(value)
        print(f"  {group:14}{model.name:34}{cell:26}{value:.4g}", file=sys.stderr, flush=True)

    def run_group(self, group: str, sizes: tuple[int, ...], cells: dict[str, tuple[str, dict]], runs: int) -> None:
        """All models of a group, with each of these numbers of layers, in turn."""
        prefill = any("prefill" in cell for cell in cells)
        lines = [(model, layers) for model in self.models(group, prefill) for layers in sizes]
        if self.fits(lines):
            self.run_together(group, lines, cells, runs)
            return
        for _ in range(runs):
            for model, layers in lines:
                with self.start(model, layers) as worker:
                    for cell, call in cells.items():
                        self.run_cell(group, model, layers, worker, cell, call)
                    self.keep_peak(group, model, layers, worker)

    def run_together(self, group: str, lines: list[tuple[Model, int]], cells, runs: int) -> None:
        with ExitStack() as stack:
            workers = {line: stack.enter_context(self.start(*line)) for line in lines}
            for _ in range(runs):
                for cell, call in cells.items():
                    for line in lines:
                        self.run_cell(group, *line, workers[line], cell, call)
            for line in lines:
                self.keep_peak(group, *line, workers[line])

    def fits(self, lines: list[tuple[Model, int]]) -> bool:
        """Whether memory holds all of them at once, and none disturbs the others."""
        stored = {line: files_of(self.stored(*line)) for line in lines}
        shared = {file.stat().st_ino: file.stat().st_size for files in stored.values() for file in files}
        copied = [line for line in lines if line[0].huge_pages or line[0].script == "original.py"]
        needed = sum(shared.values()) + sum(size_of(self.stored(*line)) for line in copied)
        spins = any(model.peer and model.peer.spins for model, _ in lines)
        return needed < 0.7 * machine.memory_total() and not spins

    def models(self, group: str, prefill: bool = False) -> list[Model]:
        models = [model for model in GROUPS[group] if not model.peer or model.peer in self.options.peers]
        return [model for model in models if not (model.huge_pages if prefill else model.int8_activations)]

    def run_cell(self, group: str, model: Model, layers: int, worker: Remote, cell: str, call: tuple) -> None:
        method, arguments = call
        if method == "decode":
            self.keep(group, model, f"{layers}: bandwidth {cell}", self.bandwidth())
        seconds = worker(method, **arguments)["seconds"]
        self.keep(group, model, f"{layers}: {cell}", median(seconds) if isinstance(seconds, list) else seconds)

    def keep_peak(self, group: str, model: Model, layers: int, worker: Remote) -> None:
        self.keep(group, model, f"{layers}: peak GB", worker("memory")["peak"] / 1e9)

    def bandwidth(self) -> float:
        """Bytes a second, as memory is now."""
        self.load.append(machine.load_average())
        return max(self.reader.measure() for _ in range(2))

    def run_load(self, group: str, layers: int, runs: int) -> None:
        """Reading the files, and load to first token, from the disk (where the system can) and from memory."""
        for model in self.models(group):
            files = files_of(self.stored(model, layers))
            for _ in range(runs):
                if self.options.cold and machine.forget_files(files):
                    self.keep(group, model, f"{layers}: cold read", sum(map(machine.read_file, files)))
                    machine.forget_files(files)
                    self.first_token(group, model, layers, "cold")
                self.keep(group, model, f"{layers}: warm read", sum(map(machine.read_file, files)))
                self.first_token(group, model, layers, "warm")

    def first_token(self, group: str, model: Model, layers: int, how: str) -> None:
        with self.start(model, layers) as worker:
            self.keep(group, model, f"{layers}: {how} first token", worker.started["first_token_seconds"])


def files_of(stored: Path) -> list[Path]:
    return sorted(stored.glob("*.safetensors")) if stored.is_dir() else [stored]


def size_of(stored: Path) -> int:
    return sum(file.stat().st_size for file in files_of(stored))


def decode_cells(contexts: tuple[int, ...], steps: int) -> dict[str, tuple[str, dict]]:
    return {f"decode {c}": ("decode", {"context": c, "steps": steps}) for c in contexts}


def prefill_cells(prompts: tuple[int, ...]) -> dict[str, tuple[str, dict]]:
    return {f"prefill {tokens}": ("prefill", {"tokens": tokens}) for tokens in prompts}


def installed_peers(options: argparse.Namespace) -> set[Peer]:
    """The peers of the groups whose Python has what they need; the others are named."""
    found = set()
    for peer in {model.peer for group in options.groups for model in GROUPS[group] if model.peer}:
        python = getattr(options, peer.python)
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{peer.module}') is None)"
        if subprocess.run([python, "-c", probe], check=False).returncode == 0:
            found.add(peer)
        else:
            print(f"{peer.folder} is left out: no {peer.module} in {python}", file=sys.stderr)
    return found


def measure(options: argparse.Namespace) -> Bench:
    bench = Bench(options)
    for group in options.groups:
        print(f"{group}: decode", file=sys.stderr)
        few = options.prefill_layers
        sizes = (options.layers,) if options.layers >= LAYERS else (options.layers, 1)
        bench.run_group(group, sizes, decode_cells(options.contexts, options.steps), options.runs)
        print(f"{group}: prefill", file=sys.stderr)
        sizes = (few,) if few >= LAYERS else (few, 1)
        bench.run_group(group, sizes, prefill_cells(options.prompts), options.runs)
        if options.layers >= LAYERS > few:  # a check of the scaling
            bench.run_group(group, (options.layers,), prefill_cells((128,)), 1)
        print(f"{group}: load", file=sys.stderr)
        bench.run_load(group, options.layers, min(options.runs, 3))
    return bench


def result(bench: Bench, seconds: float) -> dict:
    """All figures and what is needed to read them."""
    options = bench.options
    sizes, layers = {}, options.layers
    for group in options.groups:
        for model in bench.models(group):
            sizes[model.name] = bytes_per_token(bench, model)
    return {
        "machine": machine.describe(),
        "command": " ".join(["python benchmarks/speed.py", *sys.argv[1:]]),
        "layers": layers,
        "few": options.prefill_layers,
        "seconds": seconds,
        "load_average": [min(bench.load), median(bench.load), max(bench.load)],
        "bytes_per_token": sizes,
        "cache_bytes_per_token": LAYERS * CACHE_BYTES,
        "groups": {name: [model.name for model in GROUPS[name]] for name in options.groups},
        "values": bench.values,
    }


def bytes_per_token(bench: Bench, model: Model) -> float:
    """Weight bytes that one token must read with 28 layers: the whole file, whose embedding is also the head."""
    few = bench.options.prefill_layers
    unread = model.peer.unread if model.peer else 0
    if bench.options.layers >= LAYERS:
        return size_of(bench.stored(model, LAYERS)) - unread
    files = files_of(bench.stored(model, few))
    total = sum(file.stat().st_size for file in files)
    one = size_of(bench.stored(model, 1)) if model.peer else next(f for f in files if "layer-00" in f.name)
    layer = (total - one) / (few - 1) if model.peer else one.stat().st_size
    return total - unread + (LAYERS - few) * layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the decode runs; fewer than 28 are scaled")
    parser.add_argument("--prefill-layers", type=int, default=4)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["16-bit", "int8", "int4"])
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens that decode runs stand behind"
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=PROMPTS, help="prefill lengths")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="tokens of one decode run")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has chatglm-cpp")
    parser.add_argument("--fastllm-python", default=sys.executable, help="a Python that has ftllm")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="no loading from the disk")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, help="folder of the results (default: DATA/results)")
    options = parser.parse_args()
    if options.layers < LAYERS:
        options.prefill_layers = options.layers
    options.peers = installed_peers(options) if options.peers else set()
    start = time.perf_counter()
    figures = result(measure(options), 0)
    figures["seconds"] = time.perf_counter() - start
    folder = options.output or options.data / "results"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"speed-{options.layers}.json"
    file.write_text(json.dumps(figures, indent=1))
    print(write_report(figures, file))


if __name__ == "__main__":
    main()
