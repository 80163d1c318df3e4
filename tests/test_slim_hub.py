"""SOURCE as a Hub id and --push, against a stand-in of the Hub's HTTP API on 127.0.0.1."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from slim_sources import same_bits, slim_toy, tensors_of, write_full_toy

from slimming.checkpoint_io import Exit

SLIM = Path(__file__).resolve().parents[1] / "slim.py"


def test_a_hub_id_is_downloaded_without_the_bin_twins_and_slimmed(hub, tmp_path):
    source = write_full_toy(hub["repositories"] / "someone" / "source")
    (source / "pytorch_model.bin").write_bytes(b"the same again")
    (source / "photo.png").write_bytes(b"not needed")
    process = hub["run"](SLIM, "someone/source", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    found = tensors_of(tmp_path / "out")
    assert all(same_bits(found[name], tensor) for name, tensor in slim_toy().items())
    assert "base_model: someone/source" in (tmp_path / "out" / "README.md").read_text()
    assert {"pytorch_model.bin", "photo.png"}.isdisjoint(hub["downloads"])


def test_an_unknown_hub_id_is_refused(hub, tmp_path):
    process = hub["run"](SLIM, "someone/nothing", tmp_path / "out")
    assert process.returncode == Exit.HUB
    assert "someone/nothing can't be downloaded" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("public", [False, True])
def test_push_uploads_every_file_privately_unless_asked(hub, tmp_path, public):
    source = write_full_toy(tmp_path / "source")
    process = hub["run"](SLIM, source, tmp_path / "out", "--push", "me/out", *(["--public"] if public else []))
    assert process.returncode == 0, process.stderr
    created = hub["created"]
    assert created["name"] == "out"
    assert created.get("private", created.get("visibility") == "private") is not public
    header, *operations = hub["commit"]
    assert header["key"] == "header"
    pushed = {operation["value"]["path"]: operation for operation in operations}
    assert set(pushed) == set(os.listdir(tmp_path / "out"))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert pushed["model.safetensors"]["value"]["oid"] == hashlib.sha256(weights).hexdigest()
    assert hub["uploads"][hashlib.sha256(weights).hexdigest()] == weights


def test_a_failed_push_leaves_the_output_and_says_how_to_go_on(hub, tmp_path):
    hub["refuse"] = True
    process = hub["run"](SLIM, write_full_toy(tmp_path / "source"), tmp_path / "out", "--push", "me/out")
    assert process.returncode == Exit.HUB
    assert "hf upload me/out" in process.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
