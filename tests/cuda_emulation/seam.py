"""Answers to what cuda_kernels.py asks torch.cuda: tensors of the CPU pass for those of the emulated GPU."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.cuda import OutOfMemoryError

STREAM = 0x5EED


def emulated(library: Path, capability: tuple[int, int] = (8, 0)) -> dict[str, Any]:
    """What to set in cuda_kernels, by name."""
    driver = ctypes.CDLL(str(library))

    @contextlib.contextmanager
    def on(device):
        driver.cudaSetDevice(device.index or 0)
        try:
            yield
        finally:
            driver.cudaSetDevice(0)

    answers = {
        "device": on,
        "get_device_capability": lambda device: capability,
        "OutOfMemoryError": OutOfMemoryError,
    }
    return {"cuda": SimpleNamespace(**answers), "_stream": lambda index: STREAM, "_DEVICE": "cpu", "_loaded": {}}
