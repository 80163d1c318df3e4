"""The CUDA kernels on a real GPU: are they right, how fast are they, what do they bring to the whole model.

    python benchmarks/gpu_quantization.py [--device cuda:0] [--skip-model] [--eager]

This prints, for the GPU at hand: whether compression, extraction and products are right; the time of a first use and
of a launch; for each matrix of the 6B model and several numbers of rows the time of the fused product and its GB/s
beside a copy on the same device, the dequantize-then-matmul way, a 16-bit matmul, PyTorch's own products with INT4
(bfloat16, groups of 128) and INT8 weights and, where they are installed, bitsandbytes' (NF4, LLM.int8) and gemlite's
(groups of 128; it tunes itself at each new size, for minutes); and of the model with random weights, as far as memory
allows, the tokens/s of decoding, alone and in batches, and the time of prompts.
Without an NVIDIA GPU it says so and exits with 2; if a number is wrong it exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from package import package_module

MATRICES = {  # of a layer: output by input features
    "query_key_value": (12288, 4096),
    "dense": (4096, 4096),
    "dense_h_to_4h": (16384, 4096),
    "dense_4h_to_h": (4096, 16384),
}
ROWS = (1, 2, 4, 8, 16, 32, 128, 512, 2048)
CHECKED_SHAPES = ((64, 4096), (33, 704))
BEYOND_CACHE = 512 * 2**20  # bytes of different matrices in turn, so that no cache serves them
CALLS = 20  # of a product, in one measurement
REPEATS = 7
DECODED, NEW_TOKENS = ((1, 128), (1, 1024), (4, 128), (16, 128)), 64  # sequences and tokens of context
PROMPTS = (128, 512, 2048)
MODEL_BYTES = {16: 15.5e9, 8: 9.5e9, 4: 6.5e9}  # weights, cache and temporaries of these
INT8PACK_ROWS = 16  # its time grows with each row: 15 ms for 128 of them on an H200, 200 times a 16-bit product's
GROUP = 128  # columns that share a scale in PyTorch's own INT4
NOWHERE = "gpu_quantization: no NVIDIA GPU that PyTorch can use was found, so there is nothing to measure."
REPORT = "Please report this output, whole, in the issue tracker of the repository, with the name of your system."


cuda_kernels = package_module("cuda_kernels")
quantization = package_module("quantization")


# ---- measuring ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of GPU work: from a CUDA graph, so that the host's part does not count, or as it comes (`eager`)."""

    def __init__(self, device: torch.device, eager: bool):
        self.device, self.eager = device, eager

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[int], object]) -> float:
        """Median of `REPEATS` measurements of call(0), call(1) … call(CALLS - 1), for one call."""
        for i in range(CALLS):
            call(i)
        work = self._captured(call) if self.device.type == "cuda" and not self.eager else lambda: repeat(call)
        times = []
        for _ in range(REPEATS):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            times.append((time.perf_counter() - began) / CALLS)
        return median(times)

    def _captured(self, call: Callable[[int], object]) -> Callable[[], None]:
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            repeat(call)
        graph.replay()
        return graph.replay


def repeat(call: Callable[[int], object]) -> None:
    for i in range(CALLS):
        call(i)


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second that a copy on the device moves, reading and writing counted."""
    source = torch.zeros(BEYOND_CACHE, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * BEYOND_CACHE / clock.seconds(lambda i: target.copy_(source))


def quantized_copies(shape: tuple[int, int], bits: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Random quantized matrices, together larger than any cache, with float16 scales."""
    rows, columns = shape
    count = max(1, min(CALLS, BEYOND_CACHE // (rows * columns * bits // 8)))
    for _ in range(count):
        weight = torch.randint(-128, 128, (rows, columns * bits // 8), dtype=torch.int8, device=device)
        yield weight, (torch.rand(rows, device=device) * 0.01 + 0.001).half()


# ---- right? ---------------------------------------------------------------------------------------------------------


def wrong_numbers(device: torch.device) -> list[str]:
    """What the kernels compute differently from plain PyTorch; empty when all is well."""
    wrong = []
    for bits in (8, 4):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for shape in CHECKED_SHAPES:
                name = f"INT{bits} {str(dtype)[6:]} {shape[0]} x {shape[1]}"
                wrong += [f"{what}, {name}" for what in differences(torch.randn(shape, device=device).to(dtype), bits)]
    return wrong


def differences(weight: Tensor, bits: int) -> Iterator[str]:
    packed, scale = quantization.quantize_weight(weight, bits)
    kernel_packed, kernel_scale = cuda_kernels.quantize(weight, bits)
    if not (torch.equal(packed, kernel_packed) and torch.equal(scale, kernel_scale)):
        yield "compression"
    scale = scale.to(weight.dtype)
    matrix = quantization.dequantize_weight(packed, scale, bits, weight.dtype)
    if not torch.equal(cuda_kernels.dequantize(packed, scale, bits, weight.dtype), matrix):
        yield "extraction"
    exact = quantization.dequantize_weight(packed, scale, bits, torch.float64)
    for m in range(1, cuda_kernels.FUSED_ROWS + 1):
        x = torch.randn(m, weight.shape[1], device=weight.device).to(weight.dtype)
        error = (cuda_kernels.linear(x, packed, scale, bits).double() - x.double() @ exact.T).abs()
        summing = 64 * 2.0**-24 * (x.double().abs() @ exact.abs().T)
        if bool((error > summing + (x.double() @ exact.T).abs() * torch.finfo(weight.dtype).eps).any()):
            yield f"product of {m} rows"


# ---- how fast? ------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """Seconds of one product, the ways it can be computed; None where there is no such way."""

    matrix: str
    bits: int
    rows: int
    fused: float | None
    dequantized: float
    plain: float
    of_torch: float | None
    of_bitsandbytes: float | None
    of_gemlite: float | None
    bytes: int  # of the quantized weight


def products(clock: Clock) -> Iterator[Product]:
    for name, shape in MATRICES.items():
        plain = [torch.randn(shape, device=clock.device).half() for _ in range(4)]
        for bits in (8, 4):
            weights = list(quantized_copies(shape, bits, clock.device))
            sizes = (shape, bits, len(weights), clock.device)
            makers = (products_of_torch, products_of_bitsandbytes, products_of_gemlite)
            peers = [peer_or_failing(make, *sizes) for make in makers]
            for m in ROWS:
                x = torch.randn(m, shape[1], device=clock.device).half()
                yield timed_product(clock, name, bits, x, weights, plain, peers)


def timed_product(
    clock: Clock, name: str, bits: int, x: Tensor, weights: list, plain: list[Tensor], peers: list
) -> Product:
    def fused(i: int) -> Tensor:
        return cuda_kernels.linear(x, *weights[i % len(weights)], bits)

    def dequantized(i: int) -> Tensor:
        return F.linear(x, cuda_kernels.dequantize(*weights[i % len(weights)], bits, x.dtype))

    is_fused = x.shape[0] <= cuda_kernels.FUSED_ROWS
    of_torch, of_bitsandbytes, of_gemlite = (seconds_of_peer(clock, peer, x) for peer in peers)
    return Product(
        matrix=name,
        bits=bits,
        rows=x.shape[0],
        fused=clock.seconds(fused) if is_fused else None,
        dequantized=clock.seconds(dequantized),
        plain=clock.seconds(lambda i: F.linear(x, plain[i % len(plain)])),
        of_torch=of_torch,
        of_bitsandbytes=of_bitsandbytes,
        of_gemlite=of_gemlite,
        bytes=weights[0][0].numel(),
    )


Peer = Callable[[int, Tensor], Tensor]  # product number i with these rows


def products_of_torch(shape: tuple[int, int], bits: int, count: int, device: torch.device) -> Peer:
    """PyTorch's own products with random weights of this format: bfloat16 with INT4, the type of x with INT8."""
    rows, columns = shape
    if bits == 8:
        weights = [torch.randint(-128, 128, shape, dtype=torch.int8, device=device) for _ in range(count)]
        scale = torch.rand(rows, device=device).to(torch.bfloat16)

        def product(i: int, x: Tensor) -> Tensor:
            if x.shape[0] > INT8PACK_ROWS:
                raise ValueError(f"PyTorch's INT8 product is not measured for more than {INT8PACK_ROWS} rows")
            return torch._weight_int8pack_mm(x.to(torch.bfloat16), weights[i % count], scale)

        return product
    packed = [torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device) for _ in range(count)]
    tiles = [torch._convert_weight_to_int4pack(one, 8) for one in packed]
    scales = torch.rand(columns // GROUP, rows, 2, device=device).to(torch.bfloat16)
    return lambda i, x: torch._weight_int4pack_mm(x.to(torch.bfloat16), tiles[i % count], GROUP, scales)


def products_of_bitsandbytes(shape: tuple[int, int], bits: int, count: int, device: torch.device) -> Peer:
    """bitsandbytes' layers with random weights: NF4, and LLM.int8 without outliers."""
    import bitsandbytes

    rows, columns = shape
    kinds = {
        4: lambda: bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.float16),
        8: lambda: bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False),
    }
    layers = [kinds[bits]().half().to(device) for _ in range(count)]
    return lambda i, x: layers[i % count](x)


def products_of_gemlite(shape: tuple[int, int], bits: int, count: int, device: torch.device) -> Peer:
    """gemlite's Triton kernels for float16 rows, with random weights: INT8 by rows, INT4 in groups."""
    from gemlite.helper import A16W8, A16Wn

    def layer():
        if bits == 8:
            weight = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
            return A16W8(str(device), torch.float16).from_weights(weight, scales=torch.rand(shape[0], 1).half())
        values = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
        scales = torch.rand(values.numel() // GROUP, 1, device=device).half()
        zeros = torch.full_like(scales, 8)
        return A16Wn(str(device), torch.float16).from_weights(values, scales, zeros, bits, GROUP)

    layers = [layer() for _ in range(count)]
    return lambda i, x: layers[i % count](x)


def peer_or_failing(make: Callable[..., Peer], *sizes) -> Peer:
    try:
        return make(*sizes)
    except Exception as error:  # missing, or too old, or not for this GPU
        reason = error

    def fails(i: int, x: Tensor) -> Tensor:
        raise reason

    return fails


@torch.inference_mode()
def seconds_of_peer(clock: Clock, peer: Peer, x: Tensor) -> float | None:
    try:
        peer(0, x)
        return clock.seconds(lambda i: peer(i, x))
    except Exception as error:  # whatever a peer raises: named once, and the others go on
        name_once(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return None


@functools.cache
def name_once(what: str) -> None:
    print(f"(a peer does not run: {what})")


def product_table(measured: Iterator[Product], bandwidth: float) -> Iterator[str]:
    yield (
        "| matrix | bits | rows | fused µs | GB/s | of a copy | dequantize + matmul µs | 16-bit matmul µs "
        "| PyTorch's own µs | bitsandbytes µs | gemlite µs |"
    )
    yield "|---" * 11 + "|"
    for product in measured:
        fused = ["–"] * 3
        if product.fused is not None:
            speed = product.bytes / product.fused
            fused = [f"{product.fused * 1e6:.1f}", f"{speed / 1e9:.0f}", f"{speed / bandwidth:.0%}"]
        others = [product.dequantized, product.plain, *product[6:9]]
        others = ["–" if seconds is None else f"{seconds * 1e6:.1f}" for seconds in others]
        yield "| " + " | ".join([product.matrix, str(product.bits), str(product.rows), *fused, *others]) + " |"


def launch_cost(clock: Clock, calls: int = 1000) -> tuple[float, float]:
    """Host seconds of a fused product and of F.linear, on matrices too small to matter."""
    weight, scale = next(quantized_copies((64, 256), 4, clock.device))
    x, matrix = torch.randn(1, 256, device=clock.device).half(), torch.randn(64, 256, device=clock.device).half()
    costs = []
    for call in (lambda: cuda_kernels.linear(x, weight, scale, 4), lambda: F.linear(x, matrix)):
        call()
        clock.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        costs.append((time.perf_counter() - began) / calls)
        clock.synchronize()
    return costs[0], costs[1]


# ---- the whole model ------------------------------------------------------------------------------------------------


def random_model(bits: int, device: torch.device, **sizes):
    """ChatGLM-6B with random weights, built on the device as it will be used."""
    config = package_module("configuration_chatglm").ChatGLMConfig(quantization_bit=0 if bits == 16 else bits, **sizes)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            model = package_module("modeling_chatglm").ChatGLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.int8:
            parameter.data.random_(-128, 128)
        elif name.endswith("weight_scale"):
            parameter.data.fill_(0.02 / {8: 127, 4: 7}[bits])
    return model.eval()


@torch.inference_mode()
def seconds_of_answers(model, clock: Clock, sequences: int, context: int, tokens: int) -> float:
    """Of `tokens` greedy tokens after prompts of `context` tokens, the prompts included."""
    config = model.config
    prompt = torch.randint(100, 1000, (sequences, context), device=clock.device)
    prompt[:, -2:] = torch.tensor([config.gmask_token_id, config.bos_token_id], device=clock.device)
    clock.synchronize()
    began = time.perf_counter()
    model.generate(prompt, do_sample=False, min_length=context + tokens, max_length=context + tokens)
    clock.synchronize()
    return time.perf_counter() - began


def tokens_per_second(model, clock: Clock, sequences: int, context: int) -> float:
    """Of decoding alone: the time of long answers less the time of short ones, the first of each to warm up."""
    times = [seconds_of_answers(model, clock, sequences, context, tokens) for tokens in (NEW_TOKENS, 2, NEW_TOKENS)]
    return sequences * (NEW_TOKENS - 2) / (times[2] - times[1])


def seconds_of_prompt(model, clock: Clock, length: int) -> float:
    return median(seconds_of_answers(model, clock, 1, length, 1) for _ in range(4))


def model_table(clock: Clock, free: float, **sizes) -> Iterator[str]:
    """Of each way to store and to multiply the weights: tokens/s, seconds of prompts, memory."""
    heads = [f"{sequences} x {context}: tokens/s" for sequences, context in DECODED]
    heads += [f"prompt of {length}: ms" for length in PROMPTS]
    yield "| weights | products | " + " | ".join(heads) + " | peak GB of one answer | of all |"
    yield "|---" * (4 + len(heads)) + "|"
    for bits, kind in (
        (16, "matmul"),
        (8, "fused"),
        (8, "dequantize + matmul"),
        (4, "fused"),
        (4, "dequantize + matmul"),
    ):
        if free < MODEL_BYTES[bits] and not sizes:
            yield f"| {bits} bits | skipped: {free / 1e9:.1f} GB free, {MODEL_BYTES[bits] / 1e9:.1f} needed |"
            continue
        yield f"| {bits} bits | {kind} | " + " | ".join(model_figures(clock, bits, kind, **sizes)) + " |"


def model_figures(clock: Clock, bits: int, kind: str, **sizes) -> list[str]:
    on_gpu = clock.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(clock.device)
    model = random_model(bits, clock.device, **sizes)
    with fused_rows(cuda_kernels.FUSED_ROWS if kind == "fused" else 0):
        seconds_of_answers(model, clock, 1, 1024, NEW_TOKENS)
        peaks = [peak_gigabytes(clock)]
        figures = [f"{tokens_per_second(model, clock, *decoded):.1f}" for decoded in DECODED]
        figures += [f"{1e3 * seconds_of_prompt(model, clock, length):.1f}" for length in PROMPTS]
    return [*figures, *peaks, peak_gigabytes(clock)]


def peak_gigabytes(clock: Clock) -> str:
    on_gpu = clock.device.type == "cuda"
    return f"{torch.cuda.max_memory_allocated(clock.device) / 1e9:.1f}" if on_gpu else "–"


@contextlib.contextmanager
def fused_rows(rows: int) -> Iterator[None]:
    """Products of more rows than this use the dequantized matrix."""
    before, cuda_kernels.FUSED_ROWS = cuda_kernels.FUSED_ROWS, rows
    try:
        yield
    finally:
        cuda_kernels.FUSED_ROWS = before


# ---- the report -----------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    library = cuda_kernels._cpm_kernels()
    nvrtc = ".".join(str(part) for part in library.nvrtc.version)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
        f"{properties.total_memory / 1e9:.1f} GB; torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"driver {library.cuda.version}, runtime {library.cudart.version}, NVRTC {nvrtc}"
    )


def report(clock: Clock, skip_model: bool) -> int:
    """Prints everything; the exit code."""
    began = time.perf_counter()
    if cuda_kernels._kernels_for(torch.zeros(1, device=clock.device)) is None:
        print("The kernels could not be loaded; the warning above says why.", REPORT)
        return 1
    print(describe(clock.device))
    print(f"First use (import, compile, load): {time.perf_counter() - began:.2f} s")
    wrong = wrong_numbers(clock.device)
    print("Compression, extraction and products:", "; ".join(f"WRONG: {what}" for what in wrong) or "right")
    fused, plain = launch_cost(clock)
    print(f"Host time of a call: {fused * 1e6:.1f} µs fused, {plain * 1e6:.1f} µs F.linear")
    bandwidth = copy_bandwidth(clock)
    print(f"A copy on the device moves {bandwidth / 1e9:.0f} GB/s\n")
    for line in product_table(products(clock), bandwidth):
        print(line, flush=True)
    if not skip_model:
        print()
        torch.cuda.empty_cache()
        for line in model_table(clock, torch.cuda.mem_get_info(clock.device)[0]):
            print(line, flush=True)
    print("\n" + REPORT)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="The CUDA kernels of ChatGLM-6B-Slim on the GPU at hand.")
    parser.add_argument("--device", default="cuda:0", help="the GPU to measure (cuda:0)")
    parser.add_argument("--skip-model", action="store_true", help="single products only, not the 6B model")
    parser.add_argument("--eager", action="store_true", help="time launches as they come, not from a CUDA graph")
    arguments = parser.parse_args()
    if torch.version.hip or not torch.cuda.is_available():
        print(NOWHERE)
        return 2
    device = torch.device(arguments.device)
    with torch.cuda.device(device):
        return report(Clock(device, arguments.eager), arguments.skip_model)


if __name__ == "__main__":
    sys.exit(main())
