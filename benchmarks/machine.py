"""What the benchmarks need to know about the machine: name, load, memory of a process, and how fast memory is read."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path


def processor() -> str:
    """The CPU's name and what it can multiply with."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    flags = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(flags) or 'no vector extensions known'})"


def memory_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float:
    return os.getloadavg()[0]


def describe() -> dict:
    """Everything a reader needs to judge figures from this machine."""
    import torch

    return {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_total() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def resident_memory() -> dict[str, int]:
    """Bytes of this process: now, the most ever, and how much of now is its own rather than a mapped file's."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    kilobytes = {"now": "VmRSS", "peak": "VmHWM", "own": "RssAnon"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in kilobytes.items() if field in fields}


class ReadBandwidth:
    """Bytes a second that torch's threads read from memory: the most that a product with one row can reach.

    A sum over float32 and a maximum over int32 are both bound by reading; the better one counts.
    """

    def __init__(self, size: int = 1 << 29):
        import torch

        self.numbers = torch.ones(size // 4)
        self.reads = (self.numbers.sum, self.numbers.view(torch.int32).amax)

    def measure(self) -> float:
        best = 0.0
        for read in self.reads:
            start = time.perf_counter()
            read()
            best = max(best, self.numbers.nbytes / (time.perf_counter() - start))
        return best


def read_file(path: Path) -> float:
    """Seconds to read a file once, in blocks of 8 MiB into the same buffer."""
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def forget_files(paths: list[Path]) -> bool:
    """Drops files from the page cache, so that the next reader reads the disk; whether the system can do that."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True
