"""The products of one ChatGLM-6B layer on this CPU: our kernels, torch's, and the time of only reading the bytes.

    python benchmarks/cpu_kernels.py [--rows 1 2 4 128 512] [--runs 9] [--head] [--threads N]
    python benchmarks/cpu_kernels.py --attention 512 1536 4096
    python benchmarks/cpu_kernels.py --sweep [--rows 1 4 16 128] [--formats bfloat16 int4]

All candidates of one number of rows run alternately in one process, since the memory bandwidth of a machine drifts.
A time is the sum over the four matrices of a layer (201 million weights) of their medians over the runs. `share` is
the time of reading the same bytes, in the same run, over the time of the product. Candidates that are far slower than
the rest run once. Needs 3 GB of memory. `--attention` measures the attention of a layer over prompts instead.

`--sweep` times what the engine has chosen for each format and number of rows, every other way that
it knows, and PyTorch's product with bfloat16 weights, each with its weight read from memory: of query_key_value below
MANY_ROWS rows, of dense from there on. It names what is more than 10 % slower than its best way, and products with
quantized weights that take more than 1.5 times as long as those with bfloat16 ones, both after a second look.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe, load_average

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from package import engine_module, package_module

LAYER = ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384))  # query_key_value, dense, dense_h_to_4h, _4h_to_h
HEAD = ((130528, 4096),)


class Matrix:
    """One weight in every format, random; the 16-bit forms are made when a candidate asks for them."""

    def __init__(self, rows: int, columns: int):
        self.shape = (rows, columns)
        self.int8 = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        self.int4 = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
        self.scale = torch.rand(rows).mul(1e-3).bfloat16()
        self.groups = {group: torch.rand(rows, columns // group).mul(1e-3).bfloat16() for group in (32, 128)}
        self._made: dict = {}

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._made:
            self._made[dtype] = self.int8.to(dtype)
        return self._made[dtype]

    def packed(self, group: int) -> tuple:
        """torch's own INT4 format of the same size, and its scales with zero points."""
        if group not in self._made:
            values = torch.randint(0, 16, self.shape, dtype=torch.int32)
            scales = torch.rand(self.shape[1] // group, self.shape[0], 2).bfloat16()
            self._made[group] = (torch._convert_weight_to_int4pack_for_cpu(values, 1), scales)
        return self._made[group]


def candidates(kernels, quantization) -> dict:
    """name -> (type of the activations, bytes per weight, function of x and a Matrix, most rows that make sense)."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def eager(bits):
        def run(x, m):
            weight = quantization.dequantize_weight(m.int8 if bits == 8 else m.int4, m.scale, bits, x.dtype)
            return F.linear(x, weight)

        return run

    def ours(bits, group=0, int8_activations=False):
        def run(x, m):
            weight, scale = (m.int8 if bits == 8 else m.int4), (m.groups[group] if group else m.scale)
            return kernels.linear(x, weight, scale, bits, None, int8_activations)

        return run

    return {
        "bfloat16, ours": (bf16, 2, lambda x, m: kernels.linear(x, m.dense(bf16), None, 16), 64),
        "bfloat16, F.linear": (bf16, 2, lambda x, m: F.linear(x, m.dense(bf16)), 4096),
        "float16, ours": (fp16, 2, lambda x, m: kernels.linear(x, m.dense(fp16), None, 16), 4096),
        "float16, F.linear": (fp16, 2, lambda x, m: F.linear(x, m.dense(fp16)), 128),
        "int8, ours": (bf16, 1, ours(8), 4096),
        "int8, ours, float32 x": (fp32, 1, ours(8), 4096),
        "int8, ours, int8 activations": (bf16, 1, ours(8, 0, True), 4096),
        "int8, _weight_int8pack_mm": (bf16, 1, lambda x, m: torch._weight_int8pack_mm(x, m.int8, m.scale), 128),
        "int8, dequantize + matmul": (bf16, 1, eager(8), 4096),
        "int4, ours": (bf16, 0.5, ours(4), 4096),
        "int4, ours, float32 x": (fp32, 0.5, ours(4), 4096),
        "int4, ours, int8 activations": (bf16, 0.5, ours(4, 0, True), 4096),
        "int4 groups of 128, ours": (bf16, 0.5, ours(4, 128), 4096),
        "int4 groups of 32, ours": (bf16, 0.5, ours(4, 32), 4096),
        "int4 groups of 32, int4pack_mm": (
            bf16,
            0.5,
            lambda x, m: torch._weight_int4pack_mm_for_cpu(x, m.packed(32)[0], 32, m.packed(32)[1]),
            128,
        ),
        "int4, dequantize + matmul": (bf16, 0.5, eager(4), 4096),
    }


def readers() -> dict:
    """Bytes per weight -> a pass that only reads as many."""
    return {
        2: lambda x, m: m.dense(torch.bfloat16).view(torch.int64).sum(),
        1: lambda x, m: m.int8.view(torch.int64).sum(),
        0.5: lambda x, m: m.int4.view(torch.int64).sum(),
    }


def timed(function, inputs, matrices) -> list[float]:
    """Seconds for each matrix; empty where the function does not serve."""
    seconds = []
    for x, matrix in zip(inputs, matrices):
        start = time.perf_counter()
        if function(x, matrix) is None:
            return []
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(rows: int, matrices: list[Matrix], kernels, quantization, runs: int) -> list[tuple]:
    """(name, bytes, seconds) of every candidate, the passes that only read first."""
    xs = {
        dtype: [torch.randn(rows, m.shape[1]).to(dtype) for m in matrices]
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    weights = sum(m.shape[0] * m.shape[1] for m in matrices)
    cases = {f"only read, {size} bytes": (torch.bfloat16, size, reader, 1) for size, reader in readers().items()}
    cases.update({name: case for name, case in candidates(kernels, quantization).items() if rows <= case[3]})
    times, results = {}, []
    for name, (dtype, _, run, _) in cases.items():
        times[name] = [timed(run, xs[dtype], matrices) for _ in range(2)][1:]
    slow = {name for name, seconds in times.items() if sum(seconds[0]) > 0.2 * max(1, rows / 8)}
    for _ in range(runs - 1):
        for name in cases.keys() - slow:
            dtype, _, run, _ = cases[name]
            times[name].append(timed(run, xs[dtype], matrices))
    for name, (_, size, _, _) in cases.items():
        if times[name][0]:
            results.append((name, size * weights, sum(statistics.median(matrix) for matrix in zip(*times[name]))))
    return results


def report(rows: int, results: list[tuple], weights: int) -> None:
    reading = {size: seconds for name, size, seconds in results if name.startswith("only read")}
    print(f"\n{rows} rows of activations, load average {load_average():.1f}")
    print(f"| {'product':32} |       ms |   GB/s | share of reading | GFLOP/s |")
    print(f"| {'-' * 32} | -------: | -----: | ---------------: | ------: |")
    for name, size, seconds in results:
        flops = 0 if name.startswith("only read") else 2 * weights * rows / seconds / 1e9
        share = f"{reading[size] / seconds:16.0%}"
        print(f"| {name:32} | {seconds * 1e3:8.2f} | {size / seconds / 1e9:6.1f} | {share} | {flops:7.0f} |")


def attention_times(attention, tokens: int, runs: int) -> list[tuple[str, float]]:
    """(name, seconds) of the attention of one layer, 32 heads of 128 in bfloat16, as a prompt asks for it.

    Its last position, `<sop>`, is hidden from the context, so PyTorch gets a mask too.
    """
    query, key, value = torch.randn(3, 1, 32, tokens, 128).bfloat16()
    visible = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    visible[..., :-1, -1] = False
    calls = {
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(query, key, value, visible),
        "prompt_attention": lambda: attention.prompt_attention(query, key, value, visible),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            if call() is not None:
                times[name].append(time.perf_counter() - start)
    return [(name, statistics.median(seconds[1:])) for name, seconds in times.items() if seconds]


def report_attention(attention, prompts: list[int], runs: int) -> None:
    print(f"\nattention of a layer, load average {load_average():.1f}")
    print("| tokens | attention                    |       ms | GFLOP/s |")
    print("| -----: | ---------------------------- | -------: | ------: |")
    for tokens in prompts:
        for name, seconds in attention_times(attention, tokens, runs):
            flops = 4 * 32 * 128 * tokens**2 / seconds / 1e9
            print(f"| {tokens:6} | {name:28} | {1e3 * seconds:8.1f} | {flops:7.0f} |")


SWEEP_ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 2048]
MANY_ROWS = 128  # where products are bound by computing
FORMATS = {  # name: bits, columns a scale, int8 activations
    "bfloat16": (16, 0, False),
    "float16": (16, 0, False),
    "int8": (8, 0, False),
    "int8, int8 activations": (8, 0, True),
    "int8 groups of 128": (8, 128, False),
    "int4": (4, 0, False),
    "int4, int8 activations": (4, 0, True),
    "int4 groups of 128": (4, 128, False),
    "int4 groups of 32": (4, 32, False),
}
PLAIN = "bfloat16 F.linear"
SLOWER_THAN_BEST, SLOWER_THAN_PLAIN = 1.1, 1.5  # what is named
HOPELESS = 4  # times as slow as the fastest: run once


class Sweep:
    """One weight in all formats, and the ways to multiply with it."""

    def __init__(self, shape: tuple[int, int]):
        names = ("routes", "kernels", "measuring")
        self.routes, self.kernels, self.measuring = map(engine_module, names)
        self.matrix = Matrix(*shape)

    def weight(self, name: str) -> tuple:
        """weight, scale, bits."""
        bits, group, _ = FORMATS[name]
        if bits == 16:
            return self.matrix.dense(getattr(torch, name)), None, 16
        weight = self.matrix.int8 if bits == 8 else self.matrix.int4
        return weight, self.matrix.groups[group] if group else self.matrix.scale, bits

    def ways(self, name: str, rows: int) -> tuple[str, dict]:
        """The way that the engine takes, and way -> function without arguments, PLAIN among them."""
        dtype = torch.float16 if name == "float16" else torch.bfloat16
        x, (weight, scale, bits) = torch.randn(rows, self.matrix.shape[1]).to(dtype), self.weight(name)
        group, int8 = FORMATS[name][1:]
        ours = self.routes.candidates(rows, dtype, bits, group, weight.dtype, int8)
        chosen = self.routes.ranked(x, weight, scale, bits, int8)[0]
        dense, plain_x = self.matrix.dense(torch.bfloat16), x.bfloat16()
        calls = {way: functools.partial(self.routes.linear_by, way, x, weight, scale, bits) for way in ours}
        calls[PLAIN] = functools.partial(F.linear, plain_x, dense)
        return chosen, {way: (call, dense if way == PLAIN else weight) for way, call in calls.items()}

    def times(self, ways: dict, rows: int, runs: int) -> dict[str, float]:
        """way -> median seconds, of the ways that serve here, run in turn."""
        seconds: dict[str, list[float]] = {}
        best = 0.0
        for run in range(runs + 1):  # the first one compiles and warms up
            for way in self.measuring.shuffled(list(ways), run):
                call, weight = ways[way]
                if run and (way not in seconds or (run > 1 and seconds[way][0] > HOPELESS * best)):
                    continue
                self.kernels.flush(weight)
                start = time.perf_counter()
                served = call() is not None
                taken = time.perf_counter() - start
                if run:
                    seconds[way].append(taken)
                elif served:
                    seconds[way] = []
            best = min((min(runs) for runs in seconds.values() if runs), default=0.0)
        return {way: statistics.median(runs) for way, runs in seconds.items()}

    def line(self, name: str, rows: int, runs: int) -> tuple[list[str], str]:
        """A line of the table, and what is wrong with it."""
        chosen, ways = self.ways(name, rows)
        for more in (1, 3):
            times = self.times(ways, rows, more * runs)
            plain, ours = times.pop(PLAIN), times[chosen]
            best = min(times, key=times.get)
            wrong = [f"{ours / times[best]:.2f} times {best}"] * (ours > SLOWER_THAN_BEST * times[best])
            if name not in ("bfloat16", "float16") and rows >= MANY_ROWS and ours > SLOWER_THAN_PLAIN * plain:
                wrong.append(f"{ours / plain:.2f} times {PLAIN}")
            if not wrong:
                break
        others = ", ".join(f"{way} {1e3 * times[way]:.2f}" for way in sorted(times, key=times.get) if way != chosen)
        cells = [str(rows), f"{1e3 * ours:.2f}", chosen, f"{1e3 * plain:.2f}", f"{ours / plain:.2f}", others or "–"]
        return cells, f"{name}, {rows} rows, {chosen}: {' and '.join(wrong)}" if wrong else ""


def report_sweep(rows: list[int], formats: list[str]) -> None:
    few, many = Sweep(LAYER[0]), Sweep(LAYER[1])
    start, slow = time.perf_counter(), []
    for name in formats:
        print(f"\n{name}, ms; load average {load_average():.1f}")
        print(f"| rows | ours | its way | {PLAIN} | ours / it | other ways |")
        print("| ---: | ---: | --- | ---: | ---: | --- |")
        for count in rows:
            runs = 7 if count <= 16 else 3 if count < 512 else 2
            cells, wrong = (many if count >= MANY_ROWS else few).line(name, count, runs)
            print(f"| {' | '.join(cells)} |{' <- slow' * bool(wrong)}", flush=True)
            slow += [wrong] * bool(wrong)
    print(f"\n{time.perf_counter() - start:.0f} s; slower than they should be: {len(slow)}")
    print("\n".join(slow))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", help="rows of activations (1 2 4 128 512; --sweep: many)")
    parser.add_argument("--runs", type=int, default=9, help="runs, of which the median counts")
    parser.add_argument("--head", action="store_true", help="the output layer instead of one of the 28")
    parser.add_argument("--attention", type=int, nargs="+", metavar="TOKENS", help="attention over such prompts")
    parser.add_argument("--sweep", action="store_true", help="every format and way for many numbers of rows")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="of the sweep; all but float16 by default")
    parser.add_argument("--threads", type=int, help="threads, torch's own choice by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernels, quantization = engine_module(), package_module("quantization")
    print(describe())
    if options.attention:
        with torch.inference_mode():
            report_attention(engine_module("prompt"), options.attention, options.runs)
        return
    print("instruction set of our kernels:", kernels.instruction_set() or "none (llvmlite is missing or no AVX2)")
    if options.sweep:
        if not kernels.instruction_set():
            parser.error("there is nothing to compare without the engine's kernels")
        with torch.inference_mode():
            formats = options.formats or [name for name in FORMATS if name != "float16"]
            report_sweep(options.rows or SWEEP_ROWS, formats)
        return
    matrices = [Matrix(*shape) for shape in (HEAD if options.head else LAYER)]
    weights = sum(m.shape[0] * m.shape[1] for m in matrices)
    with torch.inference_mode():
        for rows in options.rows or [1, 2, 4, 128, 512]:
            report(rows, measure(rows, matrices, kernels, quantization, options.runs), weights)


if __name__ == "__main__":
    main()
