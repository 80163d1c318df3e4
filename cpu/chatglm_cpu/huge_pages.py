"""Moves weights from mapped files, whose pages are small, to huge pages of the process, which are read faster."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor, nn

PAGE = 2 << 20  # bytes, of x86 and of most ARM systems


def move_to_huge_pages(model: nn.Module) -> None:
    """Gives all modules on the CPU new parameters in huge pages, one by one, so that a mapped file is released as soon
    as its last one is done. Tied ones stay tied; who computes with an old one meanwhile keeps it. Buffers stay."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.numel():
                owners.setdefault(id(parameter), []).append((module, name))
    copies: dict[tuple, Tensor] = {}  # parameters over the same memory get the same copy
    with torch.inference_mode(False), torch.no_grad():
        for places in owners.values():
            old = places[0][0]._parameters[places[0][1]]
            memory = (old.data_ptr(), old.dtype, old.shape, old.stride())
            if memory not in copies:
                copies[memory] = copy_to_huge_pages(old.data)
            new = nn.Parameter(copies[memory], requires_grad=old.requires_grad)
            new.grad = old.grad
            for module, name in places:
                module._parameters[name] = new


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
