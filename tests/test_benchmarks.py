"""What the benchmarks work out of their times, and what they name."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sweep(monkeypatch):
    """A sweep with times of its own instead of this machine's: way -> milliseconds."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cpu_kernels

    made = object.__new__(cpu_kernels.Sweep)

    def line(name, rows, chosen, times):
        made.looks = 0

        def look(ways, rows, runs):
            made.looks += 1
            return {way: ms / 1e3 for way, ms in times.items()}

        made.ways, made.times = (lambda *_: (chosen, None)), look
        return made.line(name, rows, 3)

    made.of = line
    return made


def test_the_sweep_names_a_way_that_is_slower_than_another_after_a_second_look(sweep):
    times = {"gemv": 1.2, "gemm": 1.0, "bfloat16 F.linear": 2.0}
    cells, wrong = sweep.of("int4", 8, "gemv", times)
    assert wrong == "int4, 8 rows, gemv: 1.20 times gemm" and sweep.looks == 2
    assert cells == ["8", "1.20", "gemv", "2.00", "0.60", "gemm 1.00"]
    assert sweep.of("int4", 8, "gemm", times)[1] == "" and sweep.looks == 1


def test_the_sweep_names_quantized_products_of_many_rows_that_are_slower_than_16_bit_ones(sweep):
    times = {"gemm": 1.6, "bfloat16 F.linear": 1.0}
    assert sweep.of("int8", 128, "gemm", times)[1] == "int8, 128 rows, gemm: 1.60 times bfloat16 F.linear"
    assert sweep.of("int8", 64, "gemm", times)[1] == sweep.of("float16", 128, "gemm", times)[1] == ""
