"""Moves weights from mapped files, whose pages are small, to huge pages of the process, which are read faster."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes, of x86 and of most ARM systems


def copy_to_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy whose storage holds nothing else. What is smaller than a page goes to ordinary memory, and so
    does everything where the system has no huge pages."""
    if tensor.nbytes < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor.clone(memory_format=torch.contiguous_format)
    length = -(-tensor.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, length + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    with contextlib.suppress(OSError):  # a kernel without them; the pages are ordinary ones then
        memory.madvise(mmap.MADV_HUGEPAGE, start, length)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)
