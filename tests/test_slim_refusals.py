"""Every reason to refuse: its own exit code, one line that names it, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from slim_sources import EMBEDDING, HEAD, full_toy, golden_toy, widened, write_full_toy, write_source

import slim
from slimming.checkpoint_io import Exit

LAYER = "transformer.layers.1.mlp.dense_h_to_4h.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 1740000000\n"


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def edit_bytes(path: Path, old: bytes, new: bytes, after: int | None = None) -> None:
    """Replaces the first `old` behind a place (None: the end, where there is nothing left)."""
    content = path.read_bytes()
    place = len(content) if after is None else content.index(old, after)
    path.write_bytes(content[:place] + new + content[place + len(old) :])


def edit_header(path: Path, edit) -> None:
    """Lets `edit` change the header of a safetensors file; the data behind it stays."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = edit(json.loads(content[8 : 8 + size]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def point_index_at(source: Path, file: str) -> None:
    path = source / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    weight_map[LAYER] = file
    path.write_text(json.dumps({"weight_map": weight_map}))


def write_state(source: Path, **changes) -> None:
    """Writes the source again with some tensors replaced, or without those that are None."""
    state, config = full_toy()
    for name, tensor in changes.items():
        name = {"embedding": EMBEDDING, "head": HEAD, "layer": LAYER}[name]
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor(state[name])
    shutil.rmtree(source)
    write_source(source, state, config)


def shift(header: dict, name: str, begin: int, end: int) -> dict:
    offsets = header[name]["data_offsets"]
    header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]
    return header


def with_nan(row: int):
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[row, 3] = float("nan")
        return tensor

    return edit


def with_inf(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[2, 1] = float("inf")
    return tensor


def twice_in_one_header(header: dict) -> bytes:
    entry = json.dumps({LAYER: header[LAYER]})[1:-1]
    return (json.dumps(header)[:-1] + ", " + entry + "}").encode()


def twice_in_two_files(source: Path) -> None:
    state, _ = full_toy()
    from safetensors.torch import save_file

    save_file({LAYER: state[LAYER]}, source / "model-00001-of-00002.safetensors")
    save_file(state, source / "model-00002-of-00002.safetensors")
    (source / "model.safetensors").unlink()


def other_model(source: Path, rows: int, name: str) -> None:
    shutil.rmtree(source)
    write_source(source, {name: torch.zeros(rows, 8)}, {"model_type": "chatglm", "vocab_size": rows})


def link_outside(source: Path) -> None:
    shutil.move(source / "model.safetensors", source.parent / "elsewhere.safetensors")
    os.symlink(source.parent / "elsewhere.safetensors", source / "model.safetensors")


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


WEIGHTS = "model.safetensors"
SHARD = "model-00002-of-00003.safetensors"

# what is done to a good source in three shards or one, the code, words of the line
CASES = {
    "no such folder": (1, lambda s: shutil.rmtree(s), Exit.NOT_A_CHECKPOINT, "neither a folder nor a Hub id"),
    "no weights": (1, lambda s: (s / WEIGHTS).unlink(), Exit.NOT_A_CHECKPOINT, "holds none of"),
    "no config": (1, lambda s: (s / "config.json").unlink(), Exit.BROKEN_SHARD, "config.json is missing"),
    "config is no JSON": (1, lambda s: (s / "config.json").write_text("{"), Exit.NOT_A_CHECKPOINT, "is not JSON"),
    "another model type": (
        1, lambda s: edit_json(s / "config.json", model_type="llama"), Exit.UNSUPPORTED, "'llama'"),
    "ChatGLM2 by config": (
        1, lambda s: edit_json(s / "config.json", padded_vocab_size=65024), Exit.WRONG_ROWS, "ChatGLM2"),
    "ChatGLM2 by tensor": (
        1, lambda s: other_model(s, 65024, "transformer.embedding.word_embeddings.weight"),
        Exit.WRONG_ROWS, "ChatGLM3"),
    "ChatGLM2 rows under our name": (1, lambda s: other_model(s, 65024, EMBEDDING), Exit.WRONG_ROWS, "ChatGLM3"),
    "rows differ from config": (
        1, lambda s: edit_json(s / "config.json", vocab_size=21471), Exit.WRONG_ROWS, "21472 rows"),
    "head and embedding differ": (1, lambda s: write_state(s, head=lambda t: t[:-8]), Exit.WRONG_ROWS, "21464"),
    "missing tensor": (1, lambda s: write_state(s, layer=None), Exit.WRONG_TENSORS, f"missing tensor {LAYER}"),
    "missing embedding": (1, lambda s: write_state(s, embedding=None), Exit.WRONG_TENSORS, "missing tensor"),
    "missing head that config unties": (1, lambda s: write_state(s, head=None), Exit.WRONG_TENSORS, HEAD),
    "wrong shape": (1, lambda s: write_state(s, layer=lambda t: t[:, :4]), Exit.WRONG_TENSORS, "[16, 4]"),
    "int8 embedding without scales": (
        1, lambda s: write_state(s, embedding=lambda t: t.to(torch.int8)), Exit.WRONG_TENSORS, "_scale"),
    "packed int4 embedding": (
        1, lambda s: write_state(s, embedding=lambda t: t[:, :4].to(torch.int8)), Exit.WRONG_TENSORS, "int4"),
    "twice in a header": (
        1, lambda s: edit_header(s / WEIGHTS, twice_in_one_header), Exit.WRONG_TENSORS, "2 times"),
    "twice in two files": (1, twice_in_two_files, Exit.WRONG_TENSORS, "duplicate tensor"),
    "index names a tensor elsewhere": (
        3, lambda s: point_index_at(s, "model-00001-of-00003.safetensors"), Exit.WRONG_TENSORS, "missing tensor"),
    "index climbs out": (3, lambda s: point_index_at(s, "../x.safetensors"), Exit.UNSAFE_PATH, "'../x.safetensors'"),
    "index climbs out the Windows way": (
        3, lambda s: point_index_at(s, "..\\x.safetensors"), Exit.UNSAFE_PATH, "x.safetensors"),
    "index names an absolute path": (
        3, lambda s: point_index_at(s, "/etc/passwd"), Exit.UNSAFE_PATH, "'/etc/passwd'"),
    "link out of the folder": (1, link_outside, Exit.UNSAFE_PATH, "a link out of"),
    "missing shard": (3, lambda s: (s / SHARD).unlink(), Exit.BROKEN_SHARD, f"{SHARD} is missing"),
    "empty shard": (3, lambda s: (s / SHARD).write_bytes(b""), Exit.BROKEN_SHARD, "is empty"),
    "truncated shard": (3, lambda s: cut(s / SHARD, 1), Exit.BROKEN_SHARD, "is truncated"),
    "truncated in the header": (
        3, lambda s: cut(s / SHARD, (s / SHARD).stat().st_size - 50), Exit.BROKEN_SHARD, "header"),
    "git-LFS pointer for a shard": (
        3, lambda s: (s / SHARD).write_bytes(POINTER), Exit.LFS_POINTER, "git lfs pull"),
    "git-LFS pointer for the tokenizer": (
        1, lambda s: (s / "ice_text.model").write_bytes(POINTER), Exit.LFS_POINTER, "git lfs pull"),
    "overlapping offsets": (
        1, lambda s: edit_header(s / WEIGHTS, lambda h: shift(h, LAYER, -16, -16)), Exit.BAD_OFFSETS, "overlaps"),
    "a hole between tensors": (
        1, lambda s: edit_header(s / WEIGHTS, lambda h: {k: v for k, v in h.items() if k != LAYER}),
        Exit.BAD_OFFSETS, "hole"),
    "offsets beyond the end": (
        1, lambda s: edit_header(s / WEIGHTS, lambda h: shift(h, EMBEDDING, 10**9, 10**9)), Exit.BAD_OFFSETS, "hole"),
    "offsets that don't fit the shape": (
        1, lambda s: edit_header(s / WEIGHTS, lambda h: shift(h, LAYER, 0, 2)), Exit.BAD_OFFSETS, LAYER),
    "negative offsets": (
        1, lambda s: edit_header(s / WEIGHTS, lambda h: shift(h, HEAD, -8, -8)), Exit.BAD_OFFSETS, HEAD),
    "data behind the tensors": (
        1, lambda s: (s / WEIGHTS).write_bytes((s / WEIGHTS).read_bytes() + b"x"), Exit.BAD_OFFSETS, "behind"),
    "absurd header size": (
        1, lambda s: (s / WEIGHTS).write_bytes(b"\xff" * 64), Exit.BAD_OFFSETS, "not safetensors"),
    "unknown dtype": (
        1, lambda s: edit_header(s / WEIGHTS, lambda h: {**h, LAYER: {**h[LAYER], "dtype": "F8_E4M3"}}),
        Exit.UNSUPPORTED, "F8_E4M3"),
    "NaN in an embedding row": (
        1, lambda s: write_state(s, embedding=with_nan(20007)), Exit.NONFINITE, "row 7"),
    "Inf in a layer": (1, lambda s: write_state(s, layer=with_inf), Exit.NONFINITE, "row 2"),
    "tokenizer with a damaged piece": (
        1, lambda s: edit_bytes(s / "ice_text.model", b"\x0a", b"\x0b", after=2000), Exit.WRONG_TOKENIZER, "damaged"),
    "tokenizer with an endless number": (
        1, lambda s: edit_bytes(s / "ice_text.model", b"", b"\xff" * 400_000), Exit.WRONG_TOKENIZER, "damaged"),
    "no tokenizer": (1, lambda s: (s / "ice_text.model").unlink(), Exit.WRONG_TOKENIZER, "--tokenizer"),
    "tokenizer is no SentencePiece model": (
        1, lambda s: (s / "ice_text.model").write_bytes(b"hello"), Exit.WRONG_TOKENIZER, "SentencePiece"),
    "tokenizer of another vocabulary": (
        1, lambda s: edit_json(s / "config.json", bos_token_id=21103), Exit.WRONG_TOKENIZER, "21103"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refusal(tmp_path, capsys, case):
    shards, damage, code, words = CASES[case]
    source = write_full_toy(tmp_path / "source", shards=shards)
    damage(source)
    assert slim.main([str(source), str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert error.startswith("slim.py: ")
    assert error.count("\n") == 1
    assert words in error
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


def test_nan_in_a_row_that_goes_is_no_reason_and_allow_nonfinite_goes_on(tmp_path):
    source = write_full_toy(tmp_path / "source")
    write_state(source, embedding=with_nan(7))
    assert slim.main([str(source), str(tmp_path / "out")]) == 0
    write_state(source, embedding=with_nan(20007), layer=with_inf)
    assert slim.main([str(source), str(tmp_path / "with_nan"), "--allow-nonfinite"]) == 0


def test_numbers_too_large_for_the_new_dtype_are_refused(tmp_path, capsys):
    source = write_full_toy(tmp_path / "source")
    write_state(source, layer=lambda tensor: tensor.float() + 70000)
    assert slim.main([str(source), str(tmp_path / "out"), "--dtype", "float16"]) == Exit.NONFINITE
    assert "bfloat16" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_too_little_disk_is_known_before_the_start(tmp_path, capsys, monkeypatch):
    source = write_full_toy(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.TOO_LITTLE_DISK
    assert "1,000,000 free" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_does_not_run(tmp_path, capsys, form):
    source, trace = write_full_toy(tmp_path / "source", form="bin"), tmp_path / "trace"
    state, _ = full_toy()
    state["x"] = Malicious(trace)
    if form == "pickle":
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.UNSAFE_PICKLE
    assert "was not run" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(("damage", "code"), [
    (lambda path: cut(path, 300), Exit.BROKEN_SHARD),
    (lambda path: path.write_bytes(b"<html>404</html>"), Exit.BROKEN_SHARD),
    (lambda path: path.write_bytes(POINTER), Exit.LFS_POINTER),
    (lambda path: torch.save({"epoch": 3, "weights": torch.zeros(2)}, path), Exit.NOT_A_CHECKPOINT),
    (lambda path: torch.save([torch.zeros(2)], path), Exit.NOT_A_CHECKPOINT),
    (lambda path: torch.save({EMBEDDING: torch.zeros(8, 21472).t()}, path), Exit.UNSUPPORTED),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bin_files(tmp_path, damage, code):
    source = write_full_toy(tmp_path / "source", form="bin")
    damage(source / "pytorch_model.bin")
    assert slim.main([str(source), str(tmp_path / "out")]) == code
    assert os.listdir(tmp_path) == ["source"]


def test_shards_without_an_index_must_all_be_there(tmp_path):
    source = write_full_toy(tmp_path / "source", shards=3, index=False)
    (source / SHARD).unlink()
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.BROKEN_SHARD


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "main"
    write_full_toy(snapshot)
    (repository / "blobs").mkdir()
    shutil.move(snapshot / "model.safetensors", repository / "blobs" / "0123")
    os.symlink("../../blobs/0123", snapshot / "model.safetensors")
    assert slim.main([str(snapshot), str(tmp_path / "out")]) == 0


def test_options_that_cannot_be_served(tmp_path, capsys):
    state, config = golden_toy("prefix")
    prefix = {name: tensor for name, tensor in state.items() if "prefix_encoder" in name}
    source = write_source(tmp_path / "source", prefix, config)
    assert slim.main([str(source), str(tmp_path / "out"), "--bits", "4"]) == Exit.UNSUPPORTED
    source = write_full_toy(tmp_path / "whole")
    assert slim.main([str(source), str(tmp_path / "out"), "--bits", "4", "--group-size", "64"]) == Exit.UNSUPPORTED
    assert "--group-size" in capsys.readouterr().err
    assert slim.main([str(source), str(tmp_path / "out"), "--keep-languages", "zh,xx"]) == Exit.UNSUPPORTED
    assert "xx" in capsys.readouterr().err
    assert slim.main([str(source), str(tmp_path / "out"), "--quantize-head"]) == Exit.UNSUPPORTED
    quantized = write_source(tmp_path / "quantized", *widened(*golden_toy("quant8")))
    assert slim.main([str(quantized), str(tmp_path / "out"), "--bits", "4"]) == Exit.UNSUPPORTED
    assert "quantized already (bits 8" in capsys.readouterr().err
    for wrong in (["--max-shard-size", "big"], ["--bits", "5"], ["--min-count", "-5"], ["--push", "no id"]):
        with pytest.raises(SystemExit) as usage:
            slim.main([str(source), str(tmp_path / "out"), *wrong])
        assert usage.value.code == Exit.USAGE


def test_every_exit_code_is_explained_in_the_help(capsys):
    with pytest.raises(SystemExit):
        slim.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {code.value:>3}  " in text for code in Exit)
