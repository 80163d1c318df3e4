"""Broken kernels: every one of them has to be caught by checks.py, or the checks prove nothing.

    python tests/cuda_emulation/mutants.py

builds each mutant behind the emulated driver, runs the checks on it in a process of its own, and prints what caught
it.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401  makes the name chatglm_slim

import torch
from chatglm_slim import cuda_kernels
from cuda_emulation import build, checks, nvrtc_table, seam

TIME_LIMIT = 120  # seconds for the checks of one mutant
SURVIVED, SANITIZER, WRONG_NUMBERS, CHECKS_FAILED = 0, 1, 10, 11  # exit codes; 1 is gcc's
VERDICTS = {SURVIVED: "SURVIVED", SANITIZER: "undefined behaviour", WRONG_NUMBERS: "wrong numbers"}
CAUGHT = {"undefined behaviour", "wrong numbers", "SIGSEGV", "SIGBUS", "SIGABRT"}


class Mutant(NamedTuple):
    name: str
    original: str
    mutation: str
    sanitized: bool = False  # only the compiler's checks can see it


MUTANTS = [
    # layout of the weights
    Mutant("low nibble taken for the even column", "const int nibble = i ^ 1;", "const int nibble = i;"),
    Mutant("nibbles packed the other way round", "(even & 15) << 4 | (odd & 15)", "(odd & 15) << 4 | (even & 15)"),
    Mutant("zero point of INT4 off by one", "(float)(1 << (23 - bit)) + 8.f", "(float)(1 << (23 - bit)) + 7.f"),
    Mutant("sign bit of one INT8 byte not flipped", "^ 0x80808080u", "^ 0x80800080u"),
    Mutant("one byte picked twice", "0x7540u + i % 4", "0x7540u + i % 4 / 2 * 2"),
    Mutant("four activations read twice", "[i] = ((const uint4 *)p)[i]", "[i] = ((const uint4 *)p)[0]"),
    Mutant("two activations of a word swapped", ">> 16 * (i % 2)", ">> 16 * (1 - i % 2)"),
    Mutant("four results written twice", "((uint4 *)p)[i] =", "((uint4 *)p)[0] ="),
    # scales
    Mutant("scale of the wrong group", "(column >> w.groupShift)", "(column >> (w.groupShift - 1))"),
    Mutant("scale of the wrong row", "(long long)row * w.groups +", "(long long)row +"),
    Mutant("scale of the wrong type", "if (w.scaleType == HALF_SCALE) return rounded<T>(load((const half *)",
           "if (w.scaleType == HALF_SCALE) return rounded<T>(load((const bfloat16 *)"),
    # rounding
    Mutant("bfloat16 ties away from zero", "+ 0x7fffu + (bits >> 16 & 1u)", "+ 0x8000u"),
    Mutant("quotient not rounded in the weight's type", "rounded<typename Rounding<T>::Quotient>(__fdiv_rn(weight,",
           "(__fdiv_rn(weight,"),
    Mutant("integer cut off, not rounded", "return __float2int_rn(", "return (int)("),
    Mutant("a row of zeros divided by its scale", "if (scale == 0.f || quotient != quotient) return 0;",
           "if (quotient != quotient) return 0;"),
    Mutant("product rounded before the scale", "sums[r][t] += scale * parts[r][t]",
           "sums[r][t] += scale * rounded<T>(parts[r][t])"),
    # ends
    Mutant("weights read past the last row", "min(firstRow + r, w.rows - 1)", "firstRow + r"),
    Mutant("activations read past the last row", "min(firstX + t, m - 1)", "(firstX + t)"),
    Mutant("results written past the last row of W", "lane == 0 && firstRow + r < w.rows &&", "lane == 0 &&"),
    Mutant("results written past the last row of x", "&& firstX + t < m)", ")"),
    Mutant("second round of a lane skipped", "column += 32 * CHUNK", "column += 64 * CHUNK"),
    Mutant("tiles of x mistaken for blocks of W", "blockIdx.x % tiles * TILE", "blockIdx.x % TILE * TILE"),
    Mutant("results of two rows in one place", "* w.rows + firstRow + r, bias", "* w.rows + firstRow, bias"),
    Mutant("bias of another row", "load(bias + rows[r])", "load(bias + r)"),
    Mutant("bias left out", "bias ? sum + load(bias + rows[r]) : sum", "sum"),
    # threads
    Mutant("misaligned 128-bit load", "rows[r]) + column / (8 / BITS));", "rows[r]) + column / (8 / BITS) + 4);",
           sanitized=True),
    Mutant("missing barrier", "    __syncthreads();\n", ""),
    Mutant("barrier in a divergent branch", "    __syncthreads();", "    if (threadIdx.x < 200) __syncthreads();"),
    Mutant("shuffle in a divergent branch", "sum += __shfl_xor_sync(0xffffffffu, sum, distance)",
           "if (threadIdx.x % 32 != 5) sum += __shfl_xor_sync(0xffffffffu, sum, distance)"),
    Mutant("half of the lanes missing in the mask", "sum += __shfl_xor_sync(0xffffffffu, sum",
           "sum += __shfl_xor_sync(0x0000ffffu, sum"),
    Mutant("one lane leaves before the shuffles", "if (firstRow >= w.rows) return;",
           "if (firstRow >= w.rows || lane == 3) return;"),
    Mutant("sum over half of the lanes", "for (int distance = 16; distance; distance /= 2) sum",
           "for (int distance = 8; distance; distance /= 2) sum"),
    Mutant("largest of half of the warps", "i < QUANTIZE_THREADS / 32; ++i)", "i < QUANTIZE_THREADS / 64; ++i)"),
]  # fmt: skip


def mutated(mutant: Mutant) -> str:
    if cuda_kernels.SOURCE.count(mutant.original) != 1:
        raise ValueError(f"mutant {mutant.name!r}: its original has to stand in the source once: {mutant.original!r}")
    return cuda_kernels.SOURCE.replace(mutant.original, mutant.mutation)


def verdicts(folder: Path) -> Iterator[tuple[str, str]]:
    """(mutant, what caught it or "SURVIVED") for every mutant; the source itself, called "none", comes first."""
    jobs = [("none", cuda_kernels.SOURCE, True)]
    jobs += [(mutant.name, mutated(mutant), mutant.sanitized) for mutant in MUTANTS]
    nvrtc = nvrtc_table.Nvrtc(nvrtc_table.wheels()[0])
    cubin, _ = nvrtc.compile(cuda_kernels.SOURCE, "sm_80")  # for its symbols; what runs is g++'s, and mutated
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = [
            pool.submit(build.build, source, folder / str(number), sanitized)
            for number, (_, source, sanitized) in enumerate(jobs)
        ]
    for (name, *_), library in zip(jobs, builds):  # after the pool: a fork wants no other threads
        yield name, verdict(library.result(), cubin)


def verdict(library: Path, cubin: bytes) -> str:
    """Run the checks in a fork: a kernel that faults takes its process with it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(TIME_LIMIT)
        os._exit(run_checks(library, cubin))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return VERDICTS.get(os.WEXITSTATUS(status), "checks do not run")


def run_checks(library: Path, cubin: bytes) -> int:
    try:
        for name, value in seam.emulated(library).items():
            setattr(cuda_kernels, name, value)
        cuda_kernels._compile = lambda nvrtc, capability: cubin
        cuda_kernels._check = lambda kernels, device: None  # of the package; here checks.py has to find it
        os.environ["CUDA_PATH"] = str(library.parents[1])
        checks.check_everything(cuda_kernels._kernels_for(torch.zeros(1)))
    except AssertionError:
        return WRONG_NUMBERS
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return CHECKS_FAILED
    return SURVIVED


def main() -> int:
    """Prints a line a mutant; the exit code says whether the source passed and all mutants were caught."""
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        for name, caught in verdicts(Path(folder)):
            print(f"{name}: {caught}", flush=True)
            passed &= caught == "SURVIVED" if name == "none" else caught in CAUGHT
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
