"""Tensors copied to huge pages."""

from __future__ import annotations

import mmap
import pickle
from pathlib import Path

import pytest
import torch
from chatglm_cpu import huge_pages

needs_huge_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")


@pytest.mark.parametrize("rows", [3, 1 << 11, (1 << 11) + 1])
def test_a_copy_is_whole_aligned_and_alone_in_its_storage(rows):
    tensor = torch.arange(rows * 600, dtype=torch.int32).view(rows, 600)
    copy = huge_pages.copy_to_huge_pages(tensor.t())
    assert copy.equal(tensor.t()) and copy.is_contiguous() and copy.data_ptr() != tensor.data_ptr()
    assert copy.untyped_storage().nbytes() == tensor.nbytes and copy.storage_offset() == 0
    assert len(pickle.dumps(copy)) < tensor.nbytes + 2000
    if tensor.nbytes >= huge_pages.PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert copy.data_ptr() % huge_pages.PAGE == 0


@needs_huge_pages
def test_huge_pages_are_asked_for():
    copy = huge_pages.copy_to_huge_pages(torch.ones(3 * huge_pages.PAGE // 4 + 1))
    first, last, flags = 0, 0, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            first, last = (int(number, 16) for number in name.split("-"))
        elif name == "VmFlags:" and first <= copy.data_ptr() < last:
            flags = rest
            assert copy.data_ptr() + copy.nbytes <= last
    assert "hg" in flags.split()


def test_without_huge_pages_the_copy_is_an_ordinary_one(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = torch.arange(1 << 20)
    copy = huge_pages.copy_to_huge_pages(tensor)
    assert copy.equal(tensor) and copy.data_ptr() != tensor.data_ptr()


def test_a_kernel_that_refuses_is_no_error(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999, raising=False)
    tensor = torch.arange(1 << 20)
    assert huge_pages.copy_to_huge_pages(tensor).equal(tensor)
