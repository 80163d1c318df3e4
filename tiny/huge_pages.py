"""Moves weights from mapped files, whose pages are small, to huge pages of the process, which are read faster."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor, nn

PAGE = 2 << 20  # bytes, of x86 and of most ARM systems


def move_to_huge_pages(module: nn.Module) -> None:
    """Copies the parameters on the CPU one by one, so that a file is unmapped as soon as its last one is done.

    Tied ones stay tied. Buffers stay where they are.

    Raises:
        RuntimeError, OSError: no memory for a copy; what was copied before stays usable, and the others where they
            were.
    """
    copies: dict[tuple, Tensor] = {}  # parameters over the same memory get the same copy
    with torch.inference_mode(False), torch.no_grad():
        for parameter in list(module.parameters()):
            if parameter.device.type == "cpu" and parameter.numel():
                place = (parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride())
                if place not in copies:
                    copies[place] = copy_to_huge_pages(parameter.data)
                parameter.data = copies[place]


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
