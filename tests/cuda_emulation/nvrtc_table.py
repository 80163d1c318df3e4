"""Compile the CUDA source for every GPU generation with each NVRTC found in pip wheels; no GPU, no headers.

    python tests/cuda_emulation/nvrtc_table.py

prints one line a target: kernels, most registers a thread, spilled bytes, size of the cubin, seconds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Volta, Turing, A100, RTX 30, RTX 40, H100, B200, RTX 50: every generation that the kernels are for.
TARGETS = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


class Compiled(NamedTuple):
    """What `--ptxas-options=-v` says of one target: by kernel, registers and bytes on the stack or spilled."""

    nvrtc: str
    target: str
    seconds: float
    size: int
    registers: dict[str, int]
    spilled: dict[str, int]


class Nvrtc:
    """The few calls of NVRTC that a compilation needs."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))

    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def targets(self) -> list[str]:
        count = ctypes.c_int()
        self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        supported = (ctypes.c_int * count.value)()
        self.library.nvrtcGetSupportedArchs(supported)
        return [target for target in TARGETS if int(target[3:]) in list(supported)]

    def compile(self, source: str, target: str) -> tuple[bytes, str]:
        """The cubin and the compiler's log; RuntimeError with the log when the source is refused."""
        call, program = self.library, ctypes.c_void_p()
        call.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"cuda_kernels.cu", 0, None, None)
        options = [f"--gpu-architecture={target}", "--std=c++14", "--ptxas-options=-v"]
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = call.nvrtcCompileProgram(program, len(options), arguments)
        log = self._bytes(program, call.nvrtcGetProgramLogSize, call.nvrtcGetProgramLog).rstrip(b"\0").decode()
        if status:
            raise RuntimeError(f"NVRTC {self.version()} refuses the source for {target}:\n{log}")
        cubin = self._bytes(program, call.nvrtcGetCUBINSize, call.nvrtcGetCUBIN)
        call.nvrtcDestroyProgram(ctypes.byref(program))
        return cubin, log

    @staticmethod
    def _bytes(program, get_size, get) -> bytes:
        size = ctypes.c_size_t()
        get_size(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        get(program, buffer)
        return buffer.raw


def wheels() -> list[Path]:
    """NVRTC libraries of the pip packages nvidia-cuda-nvrtc-cu12 (12.x) and nvidia-cuda-nvrtc (13.x)."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else ()
    return sorted(path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*"))


def parse_log(log: str) -> tuple[dict[str, int], dict[str, int]]:
    """Registers, and bytes on the stack or spilled, of every kernel in a ptxas log."""
    registers, spilled, kernel = {}, {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = entry.group(1)
        elif "bytes stack frame" in line:  # and then "bytes spill stores", "bytes spill loads"
            spilled[kernel] = sum(int(number) for number in re.findall(r"\d+", line))
        elif used := re.search(r"Used (\d+) registers", line):
            registers[kernel] = int(used.group(1))
    return registers, spilled


def compile_target(path: Path, source: str, target: str) -> Compiled:
    nvrtc = Nvrtc(path)
    began = time.perf_counter()
    cubin, log = nvrtc.compile(source, target)
    seconds = time.perf_counter() - began
    registers, spilled = parse_log(log)
    return Compiled("{}.{}".format(*nvrtc.version()), target, seconds, len(cubin), registers, spilled)


def compile_all(source: str) -> Iterator[Compiled]:
    """Every target by every NVRTC, two processes at a time."""
    jobs = [(path, source, target) for path in wheels() for target in Nvrtc(path).targets()]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        yield from pool.map(compile_target, *zip(*jobs))


def table(results: list[Compiled]) -> str:
    """Markdown: target by NVRTC with kernels, most registers, spilled bytes, size and seconds."""
    lines = ["| NVRTC | target | kernels | most registers | spilled bytes | cubin kB | seconds |", "|---" * 7 + "|"]
    for result in results:
        largest = max(result.registers, key=result.registers.get)
        lines.append(
            f"| {result.nvrtc} | {result.target} | {len(result.registers)} | {result.registers[largest]} ({largest}) "
            f"| {sum(result.spilled.values())} | {result.size // 1000} | {result.seconds:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from cuda_kernels import SOURCE

    if not wheels():
        sys.exit("no NVRTC found: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvrtc")
    print(table(list(compile_all(SOURCE))))
