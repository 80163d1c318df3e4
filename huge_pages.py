"""Moves weights from mapped files, whose pages are small, to huge pages of the process, which are read faster."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch
from torch import Tensor, nn

PAGE = 2 << 20  # of x86 and of most ARM systems
MADV_HUGEPAGE = 14  # madvise(2)


@torch.no_grad()
def move_to_huge_pages(module: nn.Module) -> None:
    """Copies the weights on the CPU one by one, so that a file is unmapped as soon as its last one is done.

    Raises:
        RuntimeError: no memory for a copy; what was copied before stays usable, and the others where they were.
    """
    for parameter in module.parameters():  # a tied one once
        if parameter.device.type == "cpu" and not parameter.is_meta:
            parameter.data = copy_to_huge_pages(parameter.data)


def copy_to_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy; what is smaller than a page goes to ordinary memory, and so does everything elsewhere than on
    Linux."""
    advise = _madvise()
    if tensor.nbytes < PAGE or advise is None:
        return tensor.clone(memory_format=torch.contiguous_format)
    memory = torch.empty(tensor.nbytes + 2 * PAGE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % PAGE
    length = -(-tensor.nbytes // PAGE) * PAGE
    advise(memory.data_ptr() + start, length, MADV_HUGEPAGE)  # advice: refused, the pages are ordinary ones
    return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@functools.cache
def _madvise():
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
