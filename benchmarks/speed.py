"""Speed and memory of the full-size model in 16 bit, INT8 and INT4, side by side with other engines.

    python benchmarks/speed.py                  decode with all 28 layers, prefill from 4
    python benchmarks/speed.py --layers 4       everything scaled from 4 layers and 1
    python benchmarks/speed.py --peers llama.cpp openvino
                                                beside these engines, which `peers.py NAME ...` installs once
    python benchmarks/speed.py --add ...        more rounds, or other cells, into the figures of the last run
    python benchmarks/speed.py --prefill-layers 28 --groups original-bf16 --prompts 128 512 --contexts 128 1024
                                                beside the official code's way to compute (original.py)

Makes what it needs in bench_data/ once (make_model.py; the three groups without peers: 28 GB). Each model runs in a
process of its own. Models of one precision are measured in turn, figure by figure, or model by model where memory does
not hold them together (28 layers in 16 bit). The machine's read bandwidth drifts: it is measured before each, and
ratios and shares are medians of what stands side by side in each round. Writes JSON, a Markdown table and a plot.

Scaled figures are `one + (layers - 1) / (few - 1) * (time of few layers - one)`, all measured the same way, in turn.
Sequences of a batch have different lengths, for us with padding in front; their cells are times of a step of all.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

import machine
from make_model import DATA, make_folders
from peers import PEERS, Peer
from remote import Remote, script
from speed_report import write_report

LAYERS = 28
CONTEXTS = (100, 128, 512, 1024, 2000)
PROMPTS = (128, 512, 1536)
BATCHES = (4, 16)
WARM = 512  # tokens of a prompt, up to which each is computed once before it is timed
LENGTHS = (64, 80)  # tokens before the shortest and the longest sequence of a batch
CACHE_BYTES = 2 * 4096 * 2  # of one token in one layer: keys and values, 16 bit


class Model(NamedTuple):
    """One line of the table."""

    name: str
    kind: str  # of folder, or the peer's type
    peer: Peer | None = None
    dtype: str = "bfloat16"
    int8_activations: bool = False  # which change prompts and batches
    huge_pages: bool = False  # which change decoding
    script: str = "worker.py"

    def has(self, method: str) -> bool:
        """Whether it differs there from the line that it is a variant of, and can do that at all."""
        if self.peer:
            return method != "batch" or self.peer.batches
        if method == "batch" and self.script == "original.py":
            return False
        return not {"decode": self.int8_activations, "prefill": self.huge_pages}.get(method, False)


def of_peer(name: str, *kinds: str) -> list[Model]:
    return [Model(f"{name} {kind}", kind, peer=PEERS[name]) for kind in kinds]


GROUPS = {  # what is measured in turn
    "original-bf16": [Model("ours bf16", "16"), Model("original bf16", "16", script="original.py")],
    "original-fp16": [
        Model("ours fp16", "16", dtype="float16"),
        Model("original fp16", "16", dtype="float16", script="original.py"),
    ],
    "16-bit": [
        Model("ours bf16", "16"),
        *of_peer("llama.cpp", "bf16"),
        *of_peer("openvino", "bf16"),
        *of_peer("xfastertransformer", "bf16"),
        *of_peer("chatglm.cpp", "f16"),
    ],
    "fp16": [Model("ours fp16", "16", dtype="float16"), *of_peer("chatglm.cpp", "f16")],
    "int8": [
        Model("ours int8", "int8"),
        Model("ours int8, int8 head", "int8-head"),
        Model("ours int8, int8 activations", "int8-head", int8_activations=True),
        *of_peer("llama.cpp", "q8_0"),
        *of_peer("openvino", "int8"),
        *of_peer("xfastertransformer", "int8", "w8a8"),
        *of_peer("chatglm.cpp", "q8_0"),
        *of_peer("fastllm", "int8"),
    ],
    "int4": [
        Model("ours int4", "int4"),
        Model("ours int4, int8 head", "int4-head"),
        Model("ours int4, int4 head", "int4-head4"),
        Model("ours int4, int8 head, huge pages", "int4-head", huge_pages=True),
        Model("ours int4, int4 head, huge pages", "int4-head4", huge_pages=True),
        Model("ours int4, int8 activations", "int4-head", int8_activations=True),
        *of_peer("llama.cpp", "q4_0"),
        *of_peer("openvino", "int4"),
        *of_peer("xfastertransformer", "int4"),
        *of_peer("chatglm.cpp", "q4_0"),
        *of_peer("fastllm", "int4"),
    ],
}


class Bench:
    """Starts workers, asks them in turn, and keeps every figure: `values[group][model][cell]` is a list of runs."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.reader = machine.ReadBandwidth()
        self.values: dict[str, dict[str, dict[str, list]]] = {}
        self.versions: dict[str, str] = {}  # of peers
        self.failed: dict[str, str] = {}  # model -> why it is left out
        self.load: list[float] = []

    def stored(self, model: Model, layers: int) -> Path:
        """The folder or file of a model, made if missing. `layers` 1 is the first layer of the small one."""
        data, size = self.options.data, max(layers, self.options.prefill_layers)
        if not model.peer:
            return make_folders(size, [model.kind], model.dtype, data)[model.kind]
        file = data / f"{layers}-{model.peer.name}" / f"{model.kind}.bin"
        if not file.exists():
            source = make_folders(size, ["16"], "bfloat16", data)["16"] if model.peer.copies else "-"
            command = [*self.peer_command(model.peer), "convert", str(source), str(file)]
            command += ["--type", model.kind, "--layers", str(layers)]
            print(f"making {file}", file=sys.stderr)
            made = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if made.returncode:
                last = made.stderr.strip().splitlines()[-1:]
                raise RuntimeError(f"its file cannot be made, status {made.returncode}: {' '.join(last)}")
        return file

    def peer_command(self, peer: Peer) -> list[str]:
        return [str(peer.python(self.options.data)), script(peer.script)]

    def start(self, model: Model, layers: int) -> Remote:
        stored = str(self.stored(model, layers))
        if model.peer:
            home = {"PEER_HOME": str(model.peer.home(self.options.data).resolve())}
            worker = Remote([*self.peer_command(model.peer), "work", stored], home, quiet=True)
            self.versions[model.peer.name] = worker.started["version"]
            return worker
        command = [sys.executable, script(model.script), stored, "--layers", str(layers)]
        command += ["--dtype", model.dtype] if model.script == "original.py" else []
        command += ["--int8-activations"] if model.int8_activations else []
        command += ["--huge-pages"] if model.huge_pages else []
        return Remote([*command, "--threads", str(self.options.threads)], {"HF_HUB_OFFLINE": "1"})

    def leave_out(self, model: Model, error: RuntimeError) -> None:
        """A peer that does not run; an error of ours ends the run."""
        if not model.peer:
            raise error
        self.failed[model.name] = str(error)
        print(f"{model.name} is left out: {error}", file=sys.stderr)

    def keep(self, group: str, model: Model, cell: str, value) -> None:
        self.values.setdefault(group, {}).setdefault(model.name, {}).setdefault(cell, []).append(value)
        print(f"  {group:14}{model.name:34}{cell:26}{value:.4g}", file=sys.stderr, flush=True)

    def run_group(self, group: str, sizes: tuple[int, ...], cells: dict[str, tuple[str, dict]], runs: int) -> None:
        """All models of a group, with each of these numbers of layers, in turn."""
        models = [model for model in self.models(group) if any(model.has(method) for method, _ in cells.values())]
        lines = [(model, layers) for model in models for layers in sizes if self.makes(model, layers)]
        if self.fits(lines):
            self.run_together(group, lines, cells, runs)
            return
        for _ in range(runs):
            for model, layers in lines:
                try:
                    worker = self.start(model, layers)
                except RuntimeError as error:
                    self.leave_out(model, error)
                    continue
                with worker:
                    for cell, call in cells.items():
                        self.run_cell(group, model, layers, worker, cell, call)

    def run_together(self, group: str, lines: list[tuple[Model, int]], cells, runs: int) -> None:
        workers = {}
        with ExitStack() as stack:
            for line in lines:
                try:
                    workers[line] = stack.enter_context(self.start(*line))
                except RuntimeError as error:
                    self.leave_out(line[0], error)
            for method, arguments in cells.values():  # compiles, and chooses between kernels
                for (model, _), worker in workers.items():
                    if model.has(method) and arguments.get("tokens", 0) <= WARM:
                        worker(method, **arguments)
            for _ in range(runs):
                for cell, call in cells.items():
                    for line, worker in workers.items():
                        self.run_cell(group, *line, worker, cell, call)

    def makes(self, model: Model, layers: int) -> bool:
        """Whether the model's file is there, or could be made; what fails once is not tried again."""
        if model.name in self.failed:
            return False
        if model.peer and layers > model.peer.deepest:
            print(f"{model.name} is measured with --layers {model.peer.deepest} or fewer", file=sys.stderr)
            return False
        try:
            self.stored(model, layers)
        except RuntimeError as error:
            self.leave_out(model, error)
        return model.name not in self.failed

    def fits(self, lines: list[tuple[Model, int]]) -> bool:
        """Whether memory holds all of them at once, and none disturbs the others."""
        stored = {line: files_of(self.stored(*line)) for line in lines}
        shared = {file.stat().st_ino: file.stat().st_size for files in stored.values() for file in files}
        copied = [line for line in lines if line[0].peer or line[0].huge_pages or line[0].script == "original.py"]
        needed = sum(shared.values()) + sum(size_of(self.stored(*line)) for line in copied)
        spins = any(model.peer and model.peer.spins for model, _ in lines)
        return needed < 0.7 * machine.memory_total() and not spins

    def models(self, group: str) -> list[Model]:
        models = [model for model in GROUPS[group] if not model.peer or model.peer.name in self.options.peers]
        return [model for model in models if not self.options.models or model.name in self.options.models]

    def run_cell(self, group: str, model: Model, layers: int, worker: Remote, cell: str, call: tuple) -> None:
        method, arguments = call
        if not model.has(method):
            return
        if method == "decode":
            self.keep(group, model, f"{layers}: bandwidth {cell}", self.bandwidth())
        seconds = worker(method, **arguments)["seconds"]
        self.keep(group, model, f"{layers}: {cell}", median(seconds) if isinstance(seconds, list) else seconds)

    def bandwidth(self) -> float:
        """Bytes a second, as memory is now."""
        self.load.append(machine.load_average())
        return max(self.reader.measure() for _ in range(2))

    def run_load(self, group: str, layers: int, runs: int) -> None:
        """Reading the files, and load to first token, from the disk (where the system can) and from memory."""
        for model in self.models(group):
            if not (model.has("decode") and self.makes(model, layers)):
                continue
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
            self.keep(group, model, f"{layers}: peak GB", worker("memory")["peak"] / 1e9)


def files_of(stored: Path) -> list[Path]:
    return sorted([*stored.glob("*.safetensors"), *stored.glob("*.bin")]) if stored.is_dir() else [stored]


def size_of(stored: Path) -> int:
    return sum(file.stat().st_size for file in files_of(stored))


def decode_cells(contexts: tuple[int, ...], steps: int) -> dict[str, tuple[str, dict]]:
    return {f"decode {c}": ("decode", {"context": c, "steps": steps}) for c in contexts}


def prefill_cells(prompts: tuple[int, ...]) -> dict[str, tuple[str, dict]]:
    return {f"prefill {tokens}": ("prefill", {"tokens": tokens}) for tokens in prompts}


def batch_cells(batches: tuple[int, ...], steps: int) -> dict[str, tuple[str, dict]]:
    shortest, longest = LENGTHS
    lengths = {n: [longest - row * (longest - shortest) // max(n - 1, 1) for row in range(n)] for n in batches}
    return {f"batch {n}": ("batch", {"lengths": lengths[n], "steps": steps}) for n in batches}


def measure(options: argparse.Namespace, bench: Bench) -> None:
    for group in options.groups:
        few = options.prefill_layers
        steps = {**decode_cells(options.contexts, options.steps), **batch_cells(options.batches, options.steps)}
        if steps:
            print(f"{group}: decode", file=sys.stderr)
            sizes = (options.layers,) if options.layers >= LAYERS else (options.layers, 1)
            bench.run_group(group, sizes, steps, options.runs)
        if options.prompts:
            print(f"{group}: prefill", file=sys.stderr)
            sizes = (few,) if few >= LAYERS else (few, 1)
            bench.run_group(group, sizes, prefill_cells(options.prompts), options.runs)
            if options.layers >= LAYERS > few:  # a check of the scaling
                bench.run_group(group, (options.layers,), prefill_cells((128,)), 1)
        if options.load:
            print(f"{group}: load", file=sys.stderr)
            bench.run_load(group, options.layers, min(options.runs, 3))


def result(bench: Bench, seconds: float, before: dict) -> dict:
    """All figures, those of earlier runs in front, and what is needed to read them."""
    options, sizes = bench.options, {**before.get("bytes_per_token", {})}
    for group in options.groups:
        for model in bench.models(group):
            if bench.values.get(group, {}).get(model.name):
                sizes[model.name] = bytes_per_token(bench, model)
    values = before.get("values", {})
    for group, models in bench.values.items():
        for model, cells in models.items():
            for cell, runs in cells.items():
                values.setdefault(group, {}).setdefault(model, {}).setdefault(cell, []).extend(runs)
    load = before.get("load", []) + bench.load
    return {
        "machine": machine.describe(),
        "commands": [*before.get("commands", []), " ".join(["python benchmarks/speed.py", *sys.argv[1:]])],
        "layers": options.layers,
        "few": options.prefill_layers,
        "seconds": before.get("seconds", 0) + seconds,
        "load": load,
        "versions": {**before.get("versions", {}), **bench.versions},
        "failed": {**before.get("failed", {}), **bench.failed},
        "bytes_per_token": sizes,
        "cache_bytes_per_token": LAYERS * CACHE_BYTES,
        "groups": {name: [model.name for model in GROUPS[name]] for name in GROUPS if name in values},
        "values": values,
    }


def bytes_per_token(bench: Bench, model: Model) -> float | None:
    """Weight bytes that one token must read with 28 layers: the whole file, whose embedding is also the head; None
    where the files do not tell."""
    few = bench.options.prefill_layers
    unread = model.peer.unread.get(model.kind, 0) if model.peer else 0
    if model.peer and not model.peer.stores:
        return None
    if bench.options.layers >= LAYERS and not (model.peer and model.peer.deepest < LAYERS):
        return size_of(bench.stored(model, LAYERS)) - unread
    files = files_of(bench.stored(model, few))
    total = sum(file.stat().st_size for file in files)
    one = size_of(bench.stored(model, 1)) if model.peer else next(f for f in files if "layer-00" in f.name)
    layer = (total - one) / (few - 1) if model.peer else one.stat().st_size
    return total - unread + (LAYERS - few) * layer


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the decode runs; fewer than 28 are scaled")
    parser.add_argument("--prefill-layers", type=int, default=4)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["16-bit", "int8", "int4"])
    parser.add_argument("--models", nargs="+", help="of the groups only these, peers included")
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    parser.add_argument(
        "--contexts", nargs="*", type=int, default=CONTEXTS, help="tokens that decode runs stand behind"
    )
    parser.add_argument("--prompts", nargs="*", type=int, default=PROMPTS, help="prefill lengths")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES, help="sequences that decode together")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="tokens of one decode run")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--no-load", dest="load", action="store_false", help="no loading")
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="no loading from the disk")
    parser.add_argument("--add", action="store_true", help="to the figures of an earlier run with as many layers")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, help="folder of the results (default: DATA/results)")
    options = parser.parse_args()
    options.prefill_layers = min(options.layers, options.prefill_layers)
    missing = [name for name in options.peers if not PEERS[name].installed(options.data)]
    if missing:
        where = f" --data {options.data}" if options.data != DATA else ""
        parser.error(f"not installed: run `python benchmarks/peers.py {' '.join(missing)}{where}`")
    return options


def main() -> None:
    options, start = parsed_options(), time.perf_counter()
    folder = options.output or options.data / "results"
    file = folder / f"speed-{options.layers}.json"
    before = json.loads(file.read_text()) if options.add and file.exists() else {}
    if before and before["few"] != options.prefill_layers:
        raise SystemExit(f"{file} has prefill from {before['few']} layers, not from {options.prefill_layers}")
    bench = Bench(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        measure(options, bench)
    finally:  # a run that is stopped leaves what it has
        figures = result(bench, time.perf_counter() - start, before)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1))
    print(write_report(figures, file))


if __name__ == "__main__":
    main()
