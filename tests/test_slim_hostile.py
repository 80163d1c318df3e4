"""Sources that carry instructions or bombs, files at will, folders of others: clean exits, and nothing followed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest
import tomllib
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slim_sources import (
    EMBEDDING,
    HEAD,
    IMAGE_ROWS,
    full_toy,
    golden_toy,
    same_bits,
    slim_toy,
    tensors_of,
    widened,
    write_full_toy,
    write_source,
)

import slim
from package import package_module
from slim import Options
from slimming import checkpoint_io, plan
from slimming.checkpoint_io import Exit, Refusal

ROOT = Path(__file__).resolve().parents[1]


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


# ------------------------------------------------------------------------------------------------------- instructions

INSTRUCTIONS = {
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}},
    "_attn_implementation": "someone/kernel",
    "_attn_implementation_internal": "someone/kernel",
    "attn_implementation": "someone/kernel",
    "custom_generate": "someone/generate",
    "quantization_config": {"quant_method": "gptq"},
    "auto_map": {"AutoModel": "someone/repository--modeling.Model"},
    "some_nested": {"trust_remote_code": True},
    "tokenizer_class": "someone--Tokenizer",
}


def test_instructions_in_settings_are_left_out_and_named(tmp_path, capsys):
    source, out = write_full_toy(tmp_path / "source"), tmp_path / "out"
    edit_json(source / "config.json", **INSTRUCTIONS)
    generation = {"custom_generate": "someone/x", "top_p": 0.5, "temperature": "hot", "bad_words_ids": [[20005]]}
    edit_json(source / "generation_config.json", **generation)
    tokenizer = {"auto_map": {"AutoTokenizer": ["someone/x--t.T", None]}, "do_lower_case": 1, "remove_space": True}
    edit_json(source / "tokenizer_config.json", **tokenizer, chat_template="{{ evil }}", evil=1)
    (source / "chat_template.jinja").write_text("{{ evil }}")
    slim.slim(str(source), out, Options(check=True))
    said = capsys.readouterr().out
    for name in ("custom_pipelines", "_attn_implementation", "custom_generate", "quantization_config", "auto_map"):
        assert name in said
    assert "generation_config.json: left out custom_generate, temperature, bad_words_ids" in said
    assert "tokenizer_config.json: left out do_lower_case, chat_template, evil, auto_map" in said
    assert "chat_template.jinja: left out" in said
    written = {path.name: path.read_text() for path in out.iterdir() if path.suffix in (".json", ".jinja")}
    assert not [name for name, text in written.items() if "someone" in text or "evil" in text]
    package = json.loads((ROOT / "config.json").read_text())
    config = json.loads(written["config.json"])
    assert config["auto_map"] == package["auto_map"]
    assert not set(INSTRUCTIONS) - {"auto_map", "tokenizer_class"} & set(config)
    assert json.loads(written["generation_config.json"])["top_p"] == 0.5
    settings_of_text = json.loads(written["tokenizer_config.json"])
    assert (settings_of_text["do_lower_case"], settings_of_text["remove_space"]) == (False, True)


def test_an_official_template_and_the_keys_that_every_old_config_has_are_nothing_to_speak_of(tmp_path, capsys):
    source = write_full_toy(tmp_path / "source")
    shutil.copy(ROOT / "chat_template.jinja", source)
    shutil.copy(ROOT / "tokenizer_config.json", source)
    slim.slim(str(source), tmp_path / "out")
    assert "left out" not in capsys.readouterr().out


def test_an_adapter_keeps_the_settings_of_lora_and_no_module_to_import(tmp_path, capsys):
    from safetensors.torch import save_file

    source = tmp_path / "adapter"
    source.mkdir()
    save_file({"base_model.model.transformer.layers.0.attention.dense.lora_A.weight": torch.randn(2, 8)},
              source / "adapter_model.safetensors")  # fmt: skip
    kept = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["dense"],
        "bias": "none",
        "revision": None,
    }
    evil = {"auto_mapping": {"parent_library": "os"}, "megatron_core": "os.path", "r2": 5, "use_dora": "yes"}
    (source / "adapter_config.json").write_text(json.dumps({**kept, **evil}))
    slim.slim(str(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == kept
    assert "left out auto_mapping, megatron_core, r2, use_dora" in capsys.readouterr().out


def test_weights_under_a_name_that_the_config_chooses_are_refused(tmp_path, capsys):
    source = write_full_toy(tmp_path / "source")
    edit_json(source / "config.json", transformers_weights="other.safetensors")
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.UNSUPPORTED
    assert "transformers_weights" in capsys.readouterr().err


def test_what_a_file_says_reaches_the_terminal_as_one_line_without_escapes(tmp_path, capsys):
    source = write_full_toy(tmp_path / "source")
    edit_json(source / "config.json", **{"\x1b[2J\nevil": 1})
    assert slim.main([str(source), str(tmp_path / "out")]) == 0
    edit_json(source / "config.json", model_type="\x1b]0;x\x07\nsecond line")
    assert slim.main([str(source), str(tmp_path / "out2")]) == Exit.UNSUPPORTED
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert shown.err.count("\n") == 1


# -------------------------------------------------------------------------------------------------- types and bounds


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "index"])
@pytest.mark.parametrize("text", ["[]", "null", "5", '"x"', "[" * 100_000, '{"a":' * 50_000, "", "\ufeff{}", "\x00"])
def test_settings_that_are_no_object_end_cleanly(tmp_path, capsys, name, text):
    source = write_full_toy(tmp_path / "source", shards=3)
    (source / (name if name != "index" else "model.safetensors.index.json")).write_text(text)
    code = slim.main([str(source), str(tmp_path / "out")])
    assert code in (Exit.NOT_A_CHECKPOINT, Exit.BROKEN_SHARD)
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(("field", "value"), [
    ("num_layers", "abc"), ("num_layers", 2.5), ("num_layers", -1), ("num_layers", None), ("num_layers", 10_000_000),
    ("num_layers", True), ("hidden_size", "8"), ("vocab_size", "21472"), ("layernorm_epsilon", "1e-5"),
    ("tie_word_embeddings", "false"), ("quantization_bit", "x"), ("quantize_head", "x"), ("pre_seq_len", 10**9),
    ("pad_token_id", "3"), ("bos_token_id", [1]), ("vocab_size", 10**12), ("position_encoding_2d", 1),
])  # fmt: skip
def test_fields_of_a_wrong_type_are_named_with_their_value(tmp_path, capsys, field, value):
    source = write_full_toy(tmp_path / "source")
    edit_json(source / "config.json", **{field: value})
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.BAD_SETTINGS
    assert f"{field} = {value!r}" in capsys.readouterr().err


def test_more_layers_than_tensors_are_refused_before_their_names_are_made(tmp_path, capsys):
    source = write_full_toy(tmp_path / "source")
    edit_json(source / "config.json", num_layers=4096)
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.WRONG_TENSORS
    assert "num_layers 4096, the files hold 30 tensors" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [
    {"dtype": ["F16"]}, {"dtype": {}}, {"dtype": None}, {"shape": "ab"}, {"shape": [True]}, {"shape": [-1, -8]},
    {"shape": [1] * 9}, {"shape": [10**30, 10**30]}, {"shape": None}, {"data_offsets": "ab"}, {"data_offsets": [0]},
    {"data_offsets": [0.0, 1.0]}, {"data_offsets": [2**63, 2**63 + 1]}, {"data_offsets": [True, 1]},
])  # fmt: skip
def test_headers_of_wrong_types_end_cleanly(tmp_path, entry):
    source = write_full_toy(tmp_path / "source")
    path = source / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header[HEAD].update(entry)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    assert slim.main([str(source), str(tmp_path / "out")]) in (Exit.BAD_OFFSETS, Exit.UNSUPPORTED)


def test_limits_of_size_are_known_before_anything_is_parsed(tmp_path, monkeypatch, capsys):
    for name, limit, code in (
        ("config.json", "MAX_JSON_BYTES", Exit.NOT_A_CHECKPOINT),
        ("model.safetensors", "MAX_HEADER_BYTES", Exit.BAD_OFFSETS),
    ):
        source = write_full_toy(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_io, limit, 100)
            assert slim.main([str(source), str(tmp_path / "out")]) == code
        assert "limit 100" in capsys.readouterr().err


@pytest.mark.parametrize("record", ["data.pkl", "byteorder"])
def test_a_bomb_in_a_bin_is_refused_by_its_size(tmp_path, capsys, record):
    source = write_full_toy(tmp_path / "source", form="bin")
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                if name.endswith(f"/{record}"):
                    archive.writestr(name, content + bytes(5_000_000), method)
                else:
                    archive.writestr(name, content)
        assert slim.main([str(source), str(tmp_path / "out")]) == Exit.BROKEN_SHARD
        error = capsys.readouterr().err
        assert "compressed" in error if method == zipfile.ZIP_DEFLATED else "limit 4,000,000" in error


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.to("meta"), "meta device"),
    (lambda t: t.float().to_sparse(), "is sparse"),
    (lambda t: torch._neg_view(t), "negated"),
])  # fmt: skip
@pytest.mark.parametrize("form", ["bin", "legacy"])
def test_tensors_whose_numbers_are_not_in_the_file_as_they_are_meant(tmp_path, capsys, change, words, form):
    source = write_full_toy(tmp_path / "source", form="bin")
    state, _ = full_toy()
    state["transformer.final_layernorm.bias"] = change(state["transformer.final_layernorm.bias"])
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.UNSUPPORTED
    assert words in capsys.readouterr().err


def test_parameters_that_want_gradients_are_read_from_old_files_too(tmp_path):
    source = write_full_toy(tmp_path / "source", form="bin")
    state = {name: torch.nn.Parameter(tensor) for name, tensor in full_toy()[0].items()}
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    slim.slim(str(source), tmp_path / "out")
    assert all(same_bits(tensors_of(tmp_path / "out")[name], tensor) for name, tensor in slim_toy().items())


@pytest.mark.parametrize("damage", ["cut", "junk", "varint", "empty"])
def test_damaged_vocabularies_end_cleanly(tmp_path, damage):
    source = write_full_toy(tmp_path / "source")
    model = (source / "ice_text.model").read_bytes()
    changed = {"cut": model[:9001], "junk": bytes(range(256)) * 20, "varint": model + b"\xff" * 300_000, "empty": b""}
    (source / "ice_text.model").write_bytes(changed[damage])
    assert slim.main([str(source), str(tmp_path / "out")]) in (Exit.WRONG_TOKENIZER, Exit.BROKEN_SHARD)


@pytest.mark.parametrize(
    "file", ["a\x00b", "a" * 5000, "\ud800.safetensors", "../x", None, 5, {"a": 1}, "config.json"]
)
def test_file_names_in_an_index_that_are_none(tmp_path, file):
    source = write_full_toy(tmp_path / "source", shards=3)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][HEAD] = file
    path.write_text(json.dumps(index))
    assert slim.main([str(source), str(tmp_path / "out")]) in (Exit.UNSAFE_PATH, Exit.WRONG_TENSORS)


TOY = {}  # the files of a small checkpoint of each form, made once


def toy(form: str) -> dict[str, bytes]:
    if form not in TOY:
        with contextlib.ExitStack() as stack:
            import tempfile

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "toy"
            write_full_toy(folder, form=form, shards=2)
            (folder / "generation_config.json").write_text('{"eos_token_id": 21105, "top_p": 0.7}')
            (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
            TOY[form] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return TOY[form]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**13) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def mutated_json(draw, content: bytes) -> bytes:
    table = json.loads(content)
    key = draw(st.sampled_from([*table, "new", "auto_map", "quantize_head", "padded_vocab_size"]))
    table[key] = draw(VALUES)
    return json.dumps(table).encode()


def mutated_bytes(draw, content: bytes) -> bytes:
    edges = st.integers(0, 3000) | st.integers(max(len(content) - 3000, 0), len(content))
    place = min(draw(edges), len(content))
    kind = draw(st.sampled_from(["cut", "flip", "write", "delete"]))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        damaged = bytearray(content)
        damaged[place % len(damaged)] ^= 1 << draw(st.integers(0, 7))
        return bytes(damaged)
    new = draw(st.binary(min_size=1, max_size=8)) if kind == "write" else b""
    return content[:place] + new + content[place + 8 :]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), form=st.sampled_from(["safetensors", "bin", "legacy"]))
def test_a_checkpoint_with_anything_changed_ends_with_one_of_the_promised_codes(tmp_path_factory, data, form):
    files = toy(form)
    name = data.draw(st.sampled_from(sorted(files)))
    mutate = mutated_json if name.endswith(".json") and data.draw(st.booleans()) else mutated_bytes
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        (folder / "source").mkdir()
        for other, content in files.items():
            (folder / "source" / other).write_bytes(mutate(data.draw, content) if other == name else content)
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            code = slim.main([str(folder / "source"), str(folder / "out")])
        lines = [line for line in error.getvalue().splitlines() if line.startswith("slim.py: ")]
        assert code in set(Exit) - {Exit.USAGE, Exit.CHECK_FAILED, Exit.BUSY, Exit.WRITE_FAILED, Exit.HUB}
        assert len(lines) == (code != 0)
        assert (folder / "out").exists() == (code == 0)
    finally:
        shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------- places and other runs


@pytest.mark.parametrize("name", ["", " ", "a" * 250, "中" * 80, "x\0y", "x/" * 1000 + "y"])
def test_names_that_no_output_can_have(tmp_path, monkeypatch, capsys, name):
    source = write_full_toy(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    assert slim.main([str(source), name]) == Exit.USAGE
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("place", [".", "/", "..", "a file", "source"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_places_that_are_taken(tmp_path, monkeypatch, place, overwrite):
    source = write_full_toy(tmp_path / "source")
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    place = place if place in (".", "/", "..") else str(tmp_path / place)
    assert slim.main([str(source), place, *overwrite]) == Exit.OUTPUT_EXISTS
    assert sorted(os.listdir(tmp_path)) == ["a file", "here", "source"]


@pytest.mark.parametrize("parent", ["a file", "/proc/nothing"])
def test_places_where_nothing_can_be_made(tmp_path, parent):
    source = write_full_toy(tmp_path / "source")
    (tmp_path / "a file").write_text("mine")
    place = Path(parent) / "out" if parent.startswith("/") else tmp_path / parent / "out"
    assert slim.main([str(source), str(place)]) in (Exit.WRITE_FAILED, Exit.TOO_LITTLE_DISK)  # /proc has no room
    assert sorted(os.listdir(tmp_path)) == ["a file", "source"]


def test_a_result_that_appears_meanwhile_stays_and_ours_waits(tmp_path, monkeypatch, capsys):
    source, out, write = write_full_toy(tmp_path / "source"), tmp_path / "out", slim.write_partial

    def slow(*arguments):
        write(*arguments)
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    with monkeypatch.context() as patch:
        patch.setattr(slim, "write_partial", slow)
        assert slim.main([str(source), str(out)]) == Exit.OUTPUT_EXISTS
    assert "appeared meanwhile" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(out)
    written = []
    monkeypatch.setattr(checkpoint_io, "write_shard", lambda *arguments: written.append(arguments))
    assert slim.main([str(source), str(out)]) == 0  # goes on from what waits
    assert not written


def test_a_run_that_planned_while_another_finished_does_not_replace_its_result(tmp_path, monkeypatch):
    source, out, make = write_full_toy(tmp_path / "source"), tmp_path / "out", slim.make_plan

    def slow(*arguments):
        made = make(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(slim, "make_plan", make)
            assert slim.main([str(source), str(out)]) == 0
        (out / "mark").write_text("of the first")
        return made

    monkeypatch.setattr(slim, "make_plan", slow)
    assert slim.main([str(source), str(out)]) == Exit.OUTPUT_EXISTS
    assert (out / "mark").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "slim-journal.json.new", "slim.lock", "README.md"]
)
def test_links_in_the_temporary_folder_are_not_followed(tmp_path, name):
    source, partial, victim = write_full_toy(tmp_path / "source"), tmp_path / "out-slim-partial", tmp_path / "victim"
    before = (source / "model.safetensors").read_bytes()
    victim.write_text("precious")
    partial.mkdir()
    checkpoint_io.Journal(partial, "an older plan")
    (partial / name).symlink_to(victim if name != "model.safetensors" else source / name)
    assert slim.main([str(source), str(tmp_path / "out")]) == 0
    assert victim.read_text() == "precious"
    assert (source / "model.safetensors").read_bytes() == before
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


def test_a_temporary_folder_that_is_a_link_or_holds_a_link_for_a_journal_is_refused(tmp_path):
    source, partial, elsewhere = write_full_toy(tmp_path / "source"), tmp_path / "out-slim-partial", tmp_path / "e"
    elsewhere.mkdir()
    partial.symlink_to(elsewhere)
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.OUTPUT_EXISTS
    assert os.listdir(elsewhere) == []
    partial.unlink()
    partial.mkdir()
    (partial / "slim-journal.json").symlink_to(source / "config.json")
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.OUTPUT_EXISTS


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_temporary_folder_is_ours_alone_and_the_output_as_other_folders(tmp_path, monkeypatch):
    source, modes, write = write_full_toy(tmp_path / "source"), [], slim.write_partial

    def looked_at(plan, partial, options):
        modes.append(stat.S_IMODE(partial.stat().st_mode))
        return write(plan, partial, options)

    monkeypatch.setattr(slim, "write_partial", looked_at)
    slim.slim(str(source), tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert modes == [0o700]
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------------------------------------------------------ resuming

SMALL_SHARDS = Options(max_shard_size=400)


def interrupted(source: Path, out: Path, monkeypatch, options: Options = SMALL_SHARDS) -> None:
    """A run that ends after three shards."""
    write, count = checkpoint_io.write_shard, []

    def failing(*arguments):
        count.append(1)
        if len(count) > 3:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Refusal):
        patch.setattr(checkpoint_io, "write_shard", failing)
        slim.slim(str(source), out, options)


def test_a_source_replaced_with_the_same_size_and_time_is_read_again(tmp_path, monkeypatch):
    source, out = write_full_toy(tmp_path / "source"), tmp_path / "out"
    path = source / "model.safetensors"
    interrupted(source, out, monkeypatch)
    status = path.stat()
    state = {name: -tensor for name, tensor in full_toy()[0].items()}
    shutil.rmtree(source)
    write_source(source, state, full_toy()[1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    slim.slim(str(source), out, SMALL_SHARDS)
    for name, tensor in tensors_of(out).items():
        assert same_bits(tensor, state[name][IMAGE_ROWS if name in (EMBEDDING, HEAD) else 0 :]), name


def test_contents_tell_files_apart_where_inodes_and_times_do_not(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    real = os.fstat(os.open(path, os.O_RDONLY))
    monkeypatch.setattr(checkpoint_io.os, "fstat", lambda descriptor: real)
    before = checkpoint_io.file_identity(path)
    path.write_bytes(bytes(50_000) + b"x" * 50_000)
    assert checkpoint_io.file_identity(path)[:-1] == before[:-1]
    assert checkpoint_io.file_identity(path) != before


def test_a_source_that_changes_while_it_is_read_gives_no_output(tmp_path, monkeypatch, capsys):
    source, write = write_full_toy(tmp_path / "source"), slim.write_shards

    def changing(*arguments):
        write(*arguments)
        os.utime(source / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(slim, "write_shards", changing)
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.BROKEN_SHARD
    assert "changed while it was read" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


def test_nan_let_through_by_a_killed_run_is_not_taken_over_without_leave(tmp_path, monkeypatch):
    state, config = full_toy()
    name = next(name for name in state if name not in (EMBEDDING, HEAD))
    state[name] = torch.full_like(state[name], float("nan"))
    source, out = write_source(tmp_path / "source", state, config), tmp_path / "out"
    interrupted(source, out, monkeypatch, Options(max_shard_size=400, allow_nonfinite=True))
    assert slim.main([str(source), str(out), "--max-shard-size", "400B"]) == Exit.NONFINITE
    assert not out.exists()


# ------------------------------------------------------------------------------------------- layouts, card, downloads


@pytest.mark.parametrize("head", [8, 4])
@pytest.mark.parametrize("official", [False, True])
def test_the_packages_own_quantized_heads_are_slimmed(tmp_path, head, official):
    """int8 or int4 rows with a scale each; the official int4 code calls the same layout quantization_embeddings."""
    state, config = widened(*golden_toy("quant8" if head == 8 else "quant4"))
    columns = state[EMBEDDING].shape[1] * head // 8
    del state[HEAD]
    state[EMBEDDING] = torch.randint(-127, 127, (state[EMBEDDING].shape[0], columns), dtype=torch.int8)
    state[f"{EMBEDDING}_scale"] = torch.rand(state[EMBEDDING].shape[0]).half()
    config.update({"quantization_embeddings": True} if official else {"quantize_head": head})
    config["tie_word_embeddings"] = True
    source = write_source(tmp_path / "source", state, config)
    slim.slim(str(source), tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert same_bits(found[EMBEDDING], state[EMBEDDING][IMAGE_ROWS:])
    assert same_bits(found[f"{EMBEDDING}_scale"], state[f"{EMBEDDING}_scale"][IMAGE_ROWS:])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantize_head"] == (4 if head == 4 else True)
    assert "quantization_embeddings" not in written
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.head_bits == head


def test_the_card_names_the_folder_its_base_its_licence_and_the_install_line(tmp_path):
    source = write_full_toy(tmp_path / "source")
    (source / "MODEL_LICENSE").write_text("The ChatGLM-6B License")
    slim.slim(str(source), tmp_path / "my model")
    card = (tmp_path / "my model" / "README.md").read_text()
    assert "THIS_FOLDER" not in card
    assert 'AutoModel.from_pretrained("my model", trust_remote_code=True)' in card
    for line in ("license: other", "license_link: MODEL_LICENSE", "pipeline_tag: text-generation", "- zh"):
        assert f"\n{line}\n" in card
    line = next(line for line in card.splitlines() if line.startswith("pip install"))
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    asked = {re.split("[<>]", one)[0]: one.split(",")[0] for one in shlex.split(line)[2:]}
    assert set(asked) >= {"torch", "transformers", "sentencepiece", "accelerate"} and set(asked.values()) <= set(
        required
    )
    assert "`pip install ./cpu`" in card
    assert f"version {package_module('configuration_chatglm').CODE_VERSION}." in card
    slim.slim(str(tmp_path / "my model"), tmp_path / "again", Options(repackage=True, push="me/model"))
    card = (tmp_path / "again" / "README.md").read_text()
    assert "0 of" not in card and "bit for bit" in card
    assert 'from_pretrained("me/model"' in card


def test_the_card_of_real_sizes_names_the_original(tmp_path, monkeypatch):
    from slimming import card

    monkeypatch.setattr(card, "ORIGINAL_SIZES", {"hidden_size": 8, "num_layers": 2, "inner_hidden_size": 16})
    slim.slim(str(write_full_toy(tmp_path / "source")), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: THUDM/chatglm-6b" in text
    assert "license_link: https://github.com/THUDM/ChatGLM-6B/blob/main/MODEL_LICENSE" in text


@pytest.mark.parametrize(("error", "code", "words"), [
    (OSError(28, "No space left on device"), Exit.TOO_LITTLE_DISK, "HF_HOME"),
    (PermissionError(13, "Permission denied"), Exit.HUB, "write to"),
    (ConnectionError("no route"), Exit.HUB, "whether the Hub can be reached"),
])  # fmt: skip
def test_a_download_that_fails_says_why(tmp_path, monkeypatch, capsys, error, code, words):
    import huggingface_hub

    def failing(*arguments, **options):
        try:
            raise error
        except OSError as behind:
            raise RuntimeError("the download ended") from behind

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: ["model.safetensors"])
    assert slim.main(["someone/model", str(tmp_path / "out")]) == code
    said = capsys.readouterr().err
    assert words in said and "check the id" not in said


def test_an_end_that_is_a_list_moves_with_its_ids(tmp_path):
    source = write_full_toy(tmp_path / "source")
    edit_json(source / "config.json", eos_token_id=[21105, 20002])
    slim.slim(str(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [1105, 2]


def test_one_file_beside_a_stale_index_is_the_checkpoint_and_is_named(tmp_path, capsys):
    state, config = full_toy()
    stale = {name: -tensor for name, tensor in state.items()}
    source = write_source(tmp_path / "source", stale, config, shards=3)
    good = write_full_toy(tmp_path / "good")
    shutil.copy(good / "model.safetensors", source)
    slim.slim(str(source), tmp_path / "out")
    assert all(same_bits(tensors_of(tmp_path / "out")[name], tensor) for name, tensor in slim_toy().items())
    assert "model.safetensors.index.json and its shards are ignored" in capsys.readouterr().out


def test_trimming_that_finds_nothing_to_cut_still_writes_its_map(tmp_path):
    source = write_full_toy(tmp_path / "source")
    made = slim.slim(str(source), tmp_path / "out", Options(keep_languages=("zh", "en"), check=True))
    assert made.vocabulary.rows == 1472
    assert json.loads((tmp_path / "out" / "vocabulary_map.json").read_text())["kept_runs"] == [[20000, 21472]]


def test_the_first_rows_are_the_configurations(tmp_path):
    from chatglm_slim.configuration_chatglm import IMAGE_TOKENS

    assert plan.IMAGE_ROWS == IMAGE_TOKENS == IMAGE_ROWS
