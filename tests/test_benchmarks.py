"""What the benchmarks work out of their times, and what they name."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def figures(**more) -> dict:
    """Of 4 layers and 1, in two rounds: a layer of ours takes 1 and 2 ms a token, one of the peer's twice that."""
    cells = {"ours int4": (0.001, 0.002), "llama.cpp q4_0": (0.002, 0.004)}
    values = {}
    for name, layer in cells.items():
        values[name] = {f"{n}: decode 128": [0.01 + n * layer[0], 0.01 + n * layer[1]] for n in (4, 1)}
        values[name]["4: bandwidth decode 128"] = [2e10, 1e10]
    return {
        "machine": {"processor": "CPU", "threads": 2, "memory_gib": 8, "torch": "2", "system": "Linux"},
        "commands": ["python benchmarks/speed.py"],
        "layers": 4,
        "few": 4,
        "seconds": 60,
        "load": [0.1, 0.3],
        "versions": {"llama.cpp": "v1"},
        "failed": {"openvino int4": "no memory"},
        "bytes_per_token": {"ours int4": 3e8, "llama.cpp q4_0": None},
        "cache_bytes_per_token": 0,
        "groups": {"int4": list(cells)},
        "values": {"int4": values},
        **more,
    }


def test_the_report_scales_few_layers_to_28_and_compares_round_by_round(benchmarks):
    from speed_report import Figures, markdown, peer_table

    found = Figures(figures())
    assert found.decode("int4", "ours int4", 128) == pytest.approx([0.01 + 28 * 0.001, 0.01 + 28 * 0.002])
    ratio = sorted([(0.01 + 28 * 0.002) / (0.01 + 28 * 0.001), (0.01 + 28 * 0.004) / (0.01 + 28 * 0.002)])
    assert f"| ours int4 | {sum(ratio) / 2:.2f} × |" in peer_table(found, "int4", "llama.cpp q4_0")
    text = markdown(found)
    assert "* llama.cpp: v1" in text and "* openvino int4 is left out: no memory" in text


def test_layers_beyond_the_distinct_ones_repeat_them_in_files_of_their_own(benchmarks, monkeypatch, tmp_path):
    import make_model

    small = {"hidden_size": 128, "inner_hidden_size": 512, "vocab_size": 32}
    root = tmp_path / "root"
    shutil.copytree(ROOT / "tests" / "golden", root / "tests" / "golden", ignore=shutil.ignore_patterns("model*"))
    shutil.copy(ROOT / "generation_config.json", root)
    (root / "config.json").write_text(json.dumps({**json.loads((ROOT / "config.json").read_text()), **small}))
    monkeypatch.setattr(make_model, "ROOT", root)
    folders = make_model.make_folders(6, ["16", "int4", "int4-head"], data=tmp_path)
    for kind, folder in folders.items():
        first, again = (folder / f"model-layer-{layer:02d}.safetensors" for layer in (1, 5))
        assert first.stat().st_ino != again.stat().st_ino, kind
        own = {name.replace(".5.", ".1.", 1): tensor for name, tensor in load_file(again).items()}
        expected = load_file(first)
        assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own), kind
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        layers = {int(name.split(".")[2]) for name in weight_map if ".layers." in name}
        assert layers == set(range(6)) and json.loads((folder / "config.json").read_text())["num_layers"] == 6
    shared = [folders[kind] / "model-layer-05.safetensors" for kind in ("int4", "int4-head")]
    assert shared[0].stat().st_ino == shared[1].stat().st_ino


def test_the_report_says_how_it_is_called(benchmarks, monkeypatch, capsys):
    import speed_report

    monkeypatch.setattr("sys.argv", ["speed_report.py", "--help"])
    with pytest.raises(SystemExit) as left:
        speed_report.main()
    assert left.value.code == 0 and "FILE.json" in capsys.readouterr().out


def test_the_logits_of_each_device_map_are_set_beside_those_of_one_process(benchmarks, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers.distributed.mixin", reason="transformers 5.23 and later")
    devices = importlib.import_module("devices")
    monkeypatch.setattr(sys, "argv", ["devices.py", str(ROOT / "tiny")])
    devices.main()
    lines = re.findall(r"^(INT\d, )?float32, blocks on (.+): (\S+) of (\S+)$", capsys.readouterr().out, flags=re.M)
    assert [bits for bits, place, *_ in lines if place == "the disk"] == ["", "INT8, ", "INT4, "]
    assert all(float(furthest) <= 1e-4 * float(largest) for *_, furthest, largest in lines)  # sums in another order
