"""Tensors between two pages that nobody may touch: an access past either end is a crash, not luck."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
FORBIDDEN, READ_ONLY = 0, 1  # PROT_NONE, PROT_READ
FILL = 0xA5


class Guarded:
    """A tensor that ends (or begins) at a forbidden page, at a multiple of 16 bytes like GPU memory.

    What lies between the tensor and the page that it does not reach is filled with a pattern, and `check_surroundings`
    fails where that has changed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, at_end: bool = True):
        count = torch.Size(shape).numel()
        self.size = count * dtype.itemsize
        self.room = -(-max(self.size, 1) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.room + 2 * PAGE)
        self.offset = PAGE + ((self.room - self.size) // 16 * 16 if at_end else 0)
        self.memory[PAGE : PAGE + self.room] = bytes([FILL]) * self.room
        self.tensor = torch.frombuffer(self.memory, dtype=dtype, count=count, offset=self.offset).view(shape)
        self._protect(0, PAGE, FORBIDDEN)
        self._protect(PAGE + self.room, PAGE, FORBIDDEN)

    def _protect(self, offset: int, size: int, rights: int) -> None:
        mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        start = self.tensor.data_ptr() - self.offset
        if mprotect(start + offset, size, rights):
            raise OSError(ctypes.get_errno(), "mprotect")

    def make_read_only(self) -> Tensor:
        self._protect(PAGE, self.room, READ_ONLY)
        return self.tensor

    def check_surroundings(self) -> None:
        before = self.memory[PAGE : self.offset]
        after = self.memory[self.offset + self.size : PAGE + self.room]
        assert set(before + after) <= {FILL}, "a kernel wrote outside of its output"


def read_only(tensor: Tensor, at_end: bool = True) -> Tensor:
    """A guarded copy that a kernel may read and not write."""
    copy = Guarded(tuple(tensor.shape), tensor.dtype, at_end)
    copy.tensor.copy_(tensor)
    return copy.make_read_only()
