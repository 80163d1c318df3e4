"""Which way to compute a product is the fastest on this machine: timed once on the weight at hand, and remembered.

What wins for a kind of product stays for the process, and in a file of the user's cache directory for later ones with
the same processor, number of threads, and versions. Ways differ in rounding only; to repeat a run to the last bit, or
to compare, the environment variable CHATGLM_CPU_ROUTES takes, separated by commas:

    default               nothing is timed or remembered, the constants of routes.py decide
    measure               what the cache directory holds is not read
    list                  each choice is printed when it is made
    int4:bfloat16:1=NAME  this way for this kind of product; `list` shows the kinds, `routes.candidates` the names
    NAME                  this way wherever it is a candidate
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .crowding import is_crowded, seconds_waited
from .ir import BLOCK_ROWS
from .kernels import activations_as_int8, columns_of, flush, plain_weight
from .runtime import instruction_set, noise

WORDS, WAYS = {"default", "measure", "list"}, ("gemv", "gemm", "dense", "int8pack", "torch")
ROUNDS = 7  # of all ways in turn; the first one compiles, checks and warms up
SECONDS = 0.08  # after which no further round begins
LEAD = 0.05  # the default stays unless another is faster by this share
SAMPLE_BYTES = 64 << 20  # of the weight: a second pass over it shall not find it in a cache
SAMPLE_FLOPS = 1e9  # for each thread
CHECKED_ROWS = 32  # of the sample, whose results are compared with plain PyTorch

_rankings: dict[tuple, list[str]] = {}
_lock = threading.RLock()


class Problem(NamedTuple):
    """A product to try the ways on: `rows` rows of activations of a type with a weight."""

    label: str
    rows: int
    dtype: torch.dtype
    weight: Tensor
    scale: Tensor | None
    bits: int


Compute = Callable[[str, Tensor, Tensor, Tensor | None, int, None], Tensor | None]


def ranking(problem: Problem, names: list[str], compute: Compute) -> list[str]:
    """The names, the fastest first. compute(name, x, weight, scale, bits, None) is None where a way does not serve."""
    key = (problem.label, torch.get_num_threads(), instruction_set())
    if key not in _rankings:
        with _lock:
            if key not in _rankings:
                _rankings[key] = _decide(problem, names, compute)
    return _rankings[key]


def chosen() -> str:
    """CHATGLM_CPU_ROUTES that repeats the choices of this process."""
    return ",".join(f"{label}={names[0]}" for (label, *_), names in sorted(_rankings.items()))


def _decide(problem: Problem, names: list[str], compute: Compute) -> list[str]:
    words, fixed = settings()
    wanted = [fixed.get(problem.label), *(name for name in names if name in words)]
    wanted = [name for name in wanted if name]
    if wanted and wanted[0] not in names:
        raise ValueError(f"CHATGLM_CPU_ROUTES: {problem.label}={wanted[0]}, but there are only {', '.join(names)}")
    if wanted or "default" in words:
        return list(dict.fromkeys([*wanted, *names]))
    path, machine = cache_file(), machine_key()
    saved = {} if "measure" in words else load(path, machine)
    if sorted(saved.get(problem.label, ())) == sorted(names):
        return _shown(problem, saved[problem.label], "remembered", words)
    waited, began = seconds_waited(), time.perf_counter()
    times = measure(problem, names, compute)
    found = sorted(times, key=lambda name: times[name] * (1 - LEAD if name == names[0] else 1))
    found += [name for name in names if name not in times]
    if not is_crowded(waited, began, torch.get_num_threads()):  # else the next process chooses anew
        save(path, machine, {**load(path, machine), problem.label: found})
    told = ", ".join(f"{name} {1e3 * times[name]:.2f} ms" for name in times)
    return _shown(problem, found, f"{told}; it took {time.perf_counter() - began:.2f} s", words)


def _shown(problem: Problem, names: list[str], why: str, words: set[str]) -> list[str]:
    if "list" in words:
        print(f"chatglm_cpu: {problem.label}={names[0]} ({why})", file=sys.stderr, flush=True)
    return names


@functools.cache
def settings() -> tuple[set[str], dict[str, str]]:
    """The single words of CHATGLM_CPU_ROUTES, and its choices by the kind of product."""
    parts = [part.strip() for part in os.environ.get("CHATGLM_CPU_ROUTES", "").split(",")]
    words = {part for part in parts if part and "=" not in part}
    unknown = sorted(word for word in words - WORDS if word.partition("-")[0] not in WAYS)
    if unknown:
        warnings.warn(
            f"CHATGLM_CPU_ROUTES: {', '.join(unknown)} is neither {', '.join(sorted(WORDS))} nor a way", stacklevel=2
        )
    return words, dict(part.split("=", 1) for part in parts if "=" in part)


# ---------------------------------------------------------------------------------------------- timing


def measure(problem: Problem, names: list[str], compute: Compute) -> dict[str, float]:
    """name -> seconds for a sample of the weight, of all that serve and compute right."""
    weight, scale = _sample(problem)
    x = noise(16, columns_of(weight, problem.bits), dtype=problem.dtype)
    x = x.repeat(-(-problem.rows // 16), 1)[: problem.rows]
    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        for name in names:
            y = compute(name, x, weight, scale, problem.bits, None)
            if y is not None and _is_right(name, y, x, weight, scale, problem.bits):
                times[name] = []
        end = time.perf_counter() + SECONDS
        for number in range(1, ROUNDS):
            best = min(map(typical, times.values()), default=0)
            for name in shuffled([name for name in times if number == 1 or typical(times[name]) < 1.5 * best], number):
                flush(weight)
                start = time.perf_counter()
                compute(name, x, weight, scale, problem.bits, None)
                times[name].append(time.perf_counter() - start)
            if time.perf_counter() > end:
                break
    return {name: typical(of_way) for name, of_way in times.items()}


def typical(times: list[float]) -> float:
    """The fastest but one, of three and more: others' work only makes slower, and a moment of fast memory may have met
    one way alone. Of two the faster, since the other may have waited."""
    return sorted(times)[1 if len(times) > 2 else 0] if times else float("inf")


def shuffled(names: list[str], seed: int) -> list[str]:
    """In another order each time, since whoever comes after PyTorch's product was seen to take a tenth longer."""
    return random.Random(seed).sample(names, len(names))


def _sample(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The first rows of the weight: as many as take a few milliseconds, the same number of blocks for each thread."""
    weight, scale, threads = problem.weight, problem.scale, torch.get_num_threads()
    by_bytes = SAMPLE_BYTES // (weight.shape[1] * weight.element_size())
    by_flops = int(SAMPLE_FLOPS * threads / (2 * problem.rows * columns_of(problem.weight, problem.bits)))
    block = BLOCK_ROWS * threads
    rows = max(min(by_bytes, by_flops) // block, 2) * block
    return weight[:rows], None if scale is None else scale[:rows]


def _is_right(name: str, y: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> bool:
    """Against plain PyTorch in float32, within the rounding of the weight and of the result."""
    if name.endswith("int8"):
        values, scales = activations_as_int8(x, bits)
        x = values * scales
    rows = slice(0, CHECKED_ROWS)
    weight = plain_weight(weight[rows], None if scale is None else scale[rows], bits)
    expected, size = x.float() @ weight.T, x.float().abs() @ weight.abs().T
    bound = torch.finfo(y.dtype).eps * (expected.abs() + size / 2) + 1e-5 * size
    return bool(((y[:, rows].float() - expected).abs() <= bound).all())


# ---------------------------------------------------------------------------------------------- remembering


def machine_key() -> dict[str, str | int]:
    """All that the times depend on: another processor, number of threads or version finds another file."""
    import llvmlite

    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, llvmlite {llvmlite.__version__}, chatglm_cpu {own_version()}",
    }


@functools.cache
def processor() -> str:
    """Model and flags, as the system tells them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        told = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
        return "; ".join(told.get(name, "").strip() for name in ("model name", "stepping", "flags"))
    return f"{platform.machine()}; {platform.processor()}"


@functools.cache
def own_version() -> str:
    """Of the code as it is, installed or not."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(json.dumps(machine_key(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder, "chatglm_cpu", f"routes-{digest}.json")


def load(path: Path, machine: dict) -> dict[str, list[str]]:
    """The choices in a file of this user and machine; nothing of any other, or of a damaged one."""
    try:
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        routes = content["routes"] if content["machine"] == machine else {}
        return {str(label): [str(name) for name in names] for label, names in routes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save(path: Path, machine: dict, routes: dict[str, list[str]]) -> None:
    """Whole or not at all; a directory that cannot be written is no error."""
    if not path.is_absolute():  # no home
        return
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
            name = file.name
            json.dump({"machine": machine, "routes": routes}, file, indent=1)
        os.replace(name, path)
    except OSError:
        if name is not None:
            Path(name).unlink(missing_ok=True)
