"""The check passes every right output and finds every damage, also where the conversion itself is what is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slim_sources import (
    EMBEDDING,
    GOLDEN,
    HEAD,
    IMAGE_ROWS,
    golden_toy,
    same_bits,
    widened,
    write_source,
)

import slim
from slimming import check, check_files, check_network, plan
from slimming.checkpoint_io import Exit

ROOT = Path(__file__).resolve().parents[1]
QKV = "transformer.layers.0.attention.query_key_value.weight"
DOWN = "transformer.layers.1.mlp.dense_4h_to_h.weight"
NORM = "transformer.layers.1.input_layernorm.weight"
CORPUS = "人工智能是计算机科学的一个分支，它企图了解智能的实质。\n今天天气很好！\nhello world, this is a test\n"


# ------------------------------------------------------------------------------------------------------- the sources


def toy(
    name: str = "base2d", dtype: torch.dtype = torch.float16, norms: torch.dtype = torch.float32, wide: bool = True
):
    """State and config of a golden toy; norms in float32 beside float16 are the layout of the released model."""
    state, config = golden_toy(name)
    for key, tensor in state.items():
        if tensor.is_floating_point() and "inv_freq" not in key:
            state[key] = tensor.to(norms if "layernorm" in key else dtype)
    config["torch_dtype"] = "float16"
    return widened(state, config) if wide else (state, config)


def tied(state: dict, config: dict, head: str) -> tuple[dict, dict]:
    state[HEAD] = state[EMBEDDING].clone()
    state[HEAD][:IMAGE_ROWS] += 1  # rows that go don't count
    if head == "absent":
        del state[HEAD]
    return state, {name: value for name, value in config.items() if name != "tie_word_embeddings"}


def int8_vocabulary() -> tuple[dict, dict]:
    state, config = widened(*golden_toy("quant8"))
    del state[HEAD]
    rows = state[EMBEDDING].shape[0]
    generator = torch.Generator().manual_seed(3)
    state[EMBEDDING] = torch.randint(-127, 127, state[EMBEDDING].shape, generator=generator, dtype=torch.int8)
    state[f"{EMBEDDING}_scale"] = torch.rand(rows, generator=generator).half() / 64
    return state, {**config, "quantize_head": True, "tie_word_embeddings": True}


def int4_vocabulary() -> tuple[dict, dict]:
    """As the official int4 code of its time stored it, under its own name for the field."""
    state, config = int8_vocabulary()
    layers, four = golden_toy("quant4")
    state.update({name: tensor for name, tensor in layers.items() if ".layers." in name})
    state[EMBEDDING] = state[EMBEDDING][:, ::2].clone()
    config.update(quantization_bit=four["quantization_bit"], quantization_embeddings=True)
    return state, {name: value for name, value in config.items() if name != "quantize_head"}


def odd_tensors() -> tuple[dict, dict]:
    state, config = toy()
    return {**state, "transformer.one": torch.tensor(3.5).half(), "transformer.none": torch.zeros(0, 4)}, config


def odd_ids() -> tuple[dict, dict]:
    """Stops at </s>, pads with an image row, as the first code did."""
    state, config = toy()
    return state, {**config, "eos_token_id": IMAGE_ROWS + 2, "pad_token_id": 0, "sep_token_id": 7}


def prefix_alone(name: str) -> tuple[dict, dict]:
    state, config = widened(*golden_toy(name))
    return {key: tensor for key, tensor in state.items() if "prefix_encoder" in key}, config


def adapter(folder: Path) -> Path:
    """LoRA on embedding, head and a layer, and a whole head beside it, over the first release's 150,528 rows."""
    generator = torch.Generator().manual_seed(5)
    stem, rows = "base_model.model.", 150528
    shapes = {
        "transformer.layers.0.attention.query_key_value.lora_A.weight": (2, 8),
        "transformer.layers.0.attention.query_key_value.lora_B.weight": (24, 2),
        "transformer.word_embeddings.lora_embedding_A": (2, rows),
        "transformer.word_embeddings.lora_embedding_B": (8, 2),
        "lm_head.lora_A.weight": (2, 8),
        "lm_head.lora_B.weight": (rows, 2),
        "lm_head.lora_magnitude_vector": (rows,),
    }
    folder.mkdir()
    state = {stem + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "/old/base", "r": 2, "lora_alpha": 4, "use_dora": True}
    config["trainable_token_indices"] = {"word_embeddings": [150004, 20005]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def corpus(folder: Path) -> list[str]:
    (folder / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    return ["--corpus", str(folder / "corpus.txt")]


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# name: (state and config, how the source is written, options)
SOURCES = {
    "released": (toy, {}, []),
    "float16": (lambda: toy(norms=F16), {}, []),
    "bfloat16": (lambda: toy(dtype=BF16), {}, []),
    "float32 that says float16": (lambda: toy(dtype=F32), {}, []),
    "float64": (lambda: toy(dtype=torch.float64), {}, []),
    "head equal": (lambda: tied(*toy(), "equal"), {}, []),
    "head absent": (lambda: tied(*toy(), "absent"), {}, []),
    "to float16": (toy, {}, ["--dtype", "float16"]),
    "to bfloat16": (toy, {}, ["--dtype", "bfloat16"]),
    "to float32": (toy, {}, ["--dtype", "float32"]),
    "8 bits": (toy, {}, ["--bits", "8"]),
    "4 bits": (toy, {}, ["--bits", "4"]),
    "4 bits, groups, head": (toy, {}, ["--bits", "4", "--group-size", "32", "--quantize-head"]),
    "8 bits, groups, tied head": (
        lambda: tied(*toy(), "equal"),
        {},
        ["--bits", "8", "--group-size", "64", "--quantize-head"],
    ),
    "8 bits of bfloat16": (lambda: toy(dtype=BF16), {}, ["--bits", "8"]),
    "4 bits of float32": (lambda: toy(dtype=F32), {}, ["--bits", "4"]),
    "4 bits in bfloat16": (toy, {}, ["--bits", "4", "--dtype", "bfloat16"]),
    "int8 source": (lambda: widened(*golden_toy("quant8")), {}, []),
    "int4 source": (lambda: widened(*golden_toy("quant4")), {"form": "bin", "shards": 2}, []),
    "int8 vocabulary": (int8_vocabulary, {}, []),
    "int8 source to bfloat16": (lambda: widened(*golden_toy("quant8")), {}, ["--dtype", "bfloat16"]),
    "int8 source, asked for again": (lambda: widened(*golden_toy("quant8")), {}, ["--bits", "8"]),
    "repackaged": (lambda: toy(wide=False), {"form": "bin"}, ["--repackage"]),
    "shards to one": (toy, {"shards": 4}, []),
    "shards without an index": (toy, {"shards": 3, "index": False}, []),
    "one to shards": (toy, {}, ["--max-shard-size", "100KB"]),
    "bin": (toy, {"form": "bin"}, []),
    "bin shards": (toy, {"form": "bin", "shards": 3}, []),
    "legacy bin": (toy, {"form": "legacy"}, []),
    "one-dimensional positions": (lambda: toy("base1d"), {}, []),
    "whole P-tuned": (lambda: toy("prefix", dtype=F32), {}, []),
    "whole P-tuned, projected": (lambda: toy("prefix_proj", dtype=F32), {}, []),
    "prefix alone": (lambda: prefix_alone("prefix"), {"form": "bin"}, []),
    "odd tensors": (odd_tensors, {}, []),
    "odd ids": (odd_ids, {}, []),
    "trimmed to languages": (toy, {}, ["--keep-languages", "en"]),
    "trimmed to a corpus": (toy, {}, ["--corpus"]),
    "slim, trimmed to a corpus": (lambda: toy(wide=False), {}, ["--corpus"]),
    "int4 vocabulary": (int4_vocabulary, {}, []),
    "adapter": (None, {}, ["--base", "someone/slim"]),
}


class Made:
    """An output made by slim.py once, copied for each damage."""

    def __init__(self, folder: Path, name: str):
        make, form, self.options = SOURCES[name]
        folder.mkdir()
        self.folder, self.source, self.output = folder, folder / "source", folder / "output"
        if make is None:
            adapter(self.source)
        else:
            write_source(self.source, *make(), **form)
        if self.options == ["--corpus"]:
            self.options = corpus(folder)

    def convert(self) -> int:
        return slim.main([str(self.source), str(self.output), *self.options, "--check"])

    def check_only(self, output: Path, *options: str) -> int:
        return slim.main([str(self.source), str(output), *self.options, *options, "--check-only"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made("8 bits")`: source and right output, made once."""
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            known[name] = Made(tmp_path_factory.mktemp("made") / "one", name)
            assert known[name].convert() == Exit.OK
        return known[name]

    return make


# ------------------------------------------------------------------------------------------------------ no false alarm


@pytest.mark.parametrize("name", SOURCES)
def test_a_right_output_passes(made, capsys, name):
    case = made(name)
    capsys.readouterr()
    assert case.check_only(case.output) == Exit.OK
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("proved: "))
    found = {key: tensor for path in case.output.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert f"{len(found)} tensors" in line
    assert f"{sum(tensor.nbytes for tensor in found.values()):,} bytes" in line
    assert f"{len(list(case.output.iterdir()))} files" in line
    whole_model = any(key.startswith("transformer.layers.0.mlp") for key in found)
    assert ("3 prompts within" in line) is whole_model


def test_the_real_tokenizer_of_the_first_release(tmp_path, capsys, real_sp_model):
    first_release = real_sp_model.with_name("ice_text.preslim.model")
    if not first_release.is_file():
        pytest.skip(f"{first_release} is not there")
    state, config = toy()
    generator = torch.Generator().manual_seed(7)
    for name in (EMBEDDING, HEAD):
        state[name] = torch.randn(150528, 64, generator=generator).half()
    ids = {"bos": 150004, "eos": 150005, "mask": 150000, "gmask": 150001, "pad": 20003}
    config.update({f"{name}_token_id": value for name, value in ids.items()}, vocab_size=150528)
    source = write_source(tmp_path / "source", state, config)
    (source / "ice_text.model").write_bytes(first_release.read_bytes())
    assert slim.main([str(source), str(tmp_path / "out"), "--check"]) == Exit.OK
    assert "16 strings" in capsys.readouterr().out
    content = bytearray((tmp_path / "out" / "ice_text.model").read_bytes())
    content[1_000_000] ^= 1
    (tmp_path / "out" / "ice_text.model").write_bytes(content)
    assert slim.main([str(source), str(tmp_path / "out"), "--check-only"]) == Exit.CHECK_FAILED


def test_a_tokenizer_from_elsewhere_and_the_sources_choices_belong_to_the_output(tmp_path):
    source = write_source(tmp_path / "source", *toy())
    (source / "ice_text.model").rename(tmp_path / "pieces")
    (source / "tokenizer_config.json").write_text(
        '{"num_image_tokens": 20000, "do_lower_case": true, "remove_space": 1}'
    )
    (source / "generation_config.json").write_text('{"eos_token_id": [21105, 20002], "top_p": 0.5, "bos_token_id": 7}')
    (source / "MODEL_LICENSE").write_text("words")
    command = [str(source), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "pieces")]
    assert slim.main([*command, "--check"]) == Exit.OK
    for damage in (
        settings(GENERATION, eos_token_id=1105),
        settings(GENERATION, top_p=...),
        settings(TOKENIZER, do_lower_case=...),
        rewritten("MODEL_LICENSE", lambda _: b"other words"),
        removed("MODEL_LICENSE"),
    ):
        shutil.copytree(tmp_path / "out", tmp_path / "damaged", dirs_exist_ok=True)
        damage(tmp_path / "damaged")
        command[1] = str(tmp_path / "damaged")
        assert slim.main([*command, "--check-only"]) == Exit.CHECK_FAILED
        shutil.rmtree(tmp_path / "damaged")


def test_the_mixed_layout_passes_with_any_declared_type(tmp_path):
    state, config = toy()
    for declared in ("float16", "bfloat16", "float32", None):
        source = write_source(tmp_path / f"source {declared}", state, {**config, "torch_dtype": declared})
        assert slim.main([str(source), str(tmp_path / f"out {declared}"), "--check"]) == Exit.OK


# ------------------------------------------------------------------------------------------------------------ damages


def edit_tensors(*changes):
    """Changes of the table of tensors, which is stored again as it was."""

    def damage(output: Path) -> None:
        (path,) = output.glob("*.safetensors")
        tensors = load_file(path)
        for change in changes:
            change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

    return damage


def flip(name: str, place: int = -1, bit: int = 0):
    """Another lowest bit in one number (the last byte's `bit`)."""

    def change(tensors: dict) -> None:
        tensor = tensors[name] = tensors[name].clone()
        flat = tensor.reshape(-1).view(torch.uint8)
        flat[
            place * tensor.itemsize + (tensor.itemsize if place < 0 else 0) + (0 if place >= 0 else -tensor.itemsize)
        ] ^= 1 << bit
        tensors[name] = flat.view(tensor.dtype).reshape(tensor.shape)

    return edit_tensors(change)


def edit(name: str, new):
    """`new(tensor)` in place of a tensor."""
    return edit_tensors(lambda tensors: tensors.__setitem__(name, new(tensors[name].clone())))


def swapped_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[[*range(10), 11, 10, *range(12, len(tensor))]]


def set_number(value: float):
    def new(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return new


def renamed(old: str, new: str):
    return edit_tensors(lambda tensors: tensors.__setitem__(new, tensors.pop(old)))


def settings(file: str, **changes):
    """Fields of a JSON file; `...` removes one."""

    def damage(output: Path) -> None:
        content = json.loads((output / file).read_text(encoding="utf-8"))
        for name, value in changes.items():
            content.pop(name, None)
            if value is not ...:
                content[name] = value
        (output / file).write_text(json.dumps(content), encoding="utf-8")

    return damage


def rewritten(file: str, change):
    """`change(bytes)` in place of a file's content."""

    def damage(output: Path) -> None:
        before = (output / file).read_bytes()
        after = change(before)
        assert after != before
        (output / file).write_bytes(after)

    return damage


def flipped(place: int):
    def change(content: bytes) -> bytes:
        place_in = place % len(content)
        return content[:place_in] + bytes((content[place_in] ^ 1,)) + content[place_in + 1 :]

    return change


def replaced(old: str, new: str):
    return lambda content: content.replace(old.encode(), new.encode())


def removed(file: str):
    return lambda output: (output / file).unlink()


def added(file: str, content: str = "x"):
    return lambda output: (output / file).write_text(content)


def without_metadata(output: Path) -> None:
    save_file(load_file(output / "model.safetensors"), output / "model.safetensors")


def as_bin(output: Path) -> None:
    torch.save(load_file(output / "model.safetensors"), output / "pytorch_model.bin")
    (output / "model.safetensors").unlink()


def index_of(output: Path) -> tuple[Path, dict]:
    path = output / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def other_shard_in_index(output: Path) -> None:
    path, index = index_of(output)
    names = list(index["weight_map"])
    index["weight_map"][names[0]] = next(v for v in index["weight_map"].values() if v != index["weight_map"][names[0]])
    path.write_text(json.dumps(index))


def one_less_in_index(output: Path) -> None:
    path, index = index_of(output)
    index["weight_map"].popitem()
    path.write_text(json.dumps(index))


def other_size_in_index(output: Path) -> None:
    path, index = index_of(output)
    index["metadata"]["total_size"] += 2
    path.write_text(json.dumps(index))


def first_shard_gone(output: Path) -> None:
    min(output.glob("model-*.safetensors")).unlink()


def tensor_in_two_shards(output: Path) -> None:
    first, second, *_ = sorted(output.glob("model-*.safetensors"))
    one, other = load_file(first), load_file(second)
    name = next(iter(one))
    save_file({**other, name: one[name]}, second, {"format": "pt"})


def stale_single_file(output: Path) -> None:
    """transformers loads it instead of the shards."""
    tensors = {key: tensor for path in output.glob("*.safetensors") for key, tensor in load_file(path).items()}
    tensors[EMBEDDING] = tensors[EMBEDDING] + 1
    save_file(tensors, output / "model.safetensors", {"format": "pt"})


def one_row_earlier(output: Path) -> None:
    """The cut that begins at row 19,999."""
    for name in (EMBEDDING, HEAD):
        edit(name, lambda rows: torch.cat((torch.ones_like(rows[:1]), rows[:-1])))(output)


def nibbles_swapped(weight: torch.Tensor) -> torch.Tensor:
    return (weight << 4) | (weight >> 4 & 15)


def shifted_run(output: Path) -> None:
    path = output / "vocabulary_map.json"
    record = json.loads(path.read_text())
    pairs = zip(record["kept_runs"], record["kept_runs"][1:])
    begin, end = next(run for before, run in pairs if run[1] - run[0] == 1 and before[1] < run[0] - 1)
    record["kept_runs"] = [[begin - 1, end - 1] if run == [begin, end] else run for run in record["kept_runs"]]
    path.write_text(json.dumps(record))


def without_eop(output: Path) -> None:
    """Rows, pieces and record agree, but an answer can't end."""
    from sentencepiece import SentencePieceProcessor

    path = output / "vocabulary_map.json"
    record, place = json.loads(path.read_text()), IMAGE_ROWS + 1105
    assert SentencePieceProcessor(model_file=str(GOLDEN / "tiny_sp.model")).id_to_piece(1105) == "<eop>"
    rows = [row for begin, end in record["kept_runs"] for row in range(begin, end)]
    index = rows.index(place)
    (run,) = (run for run in record["kept_runs"] if run[0] <= place < run[1])
    at = record["kept_runs"].index(run)
    record["kept_runs"][at : at + 1] = [[run[0], place], [place + 1, run[1]]]
    record["rows"] -= 1
    path.write_text(json.dumps(record))
    for name in (EMBEDDING, HEAD):
        edit(name, lambda tensor: torch.cat((tensor[:index], tensor[index + 1 :])))(output)
    pieces = list(check_files.numbered_pieces((output / "ice_text.model").read_bytes()))
    kept = b"".join(part for number, part in pieces if number != index)
    (output / "ice_text.model").write_bytes(kept)


CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
PIECES = "ice_text.model"
# what: (the output that is damaged, how, what the message names)
DAMAGES = {
    "two rows of the embedding swapped": (
        "released",
        edit(EMBEDDING, swapped_rows),
        f"{EMBEDDING}, row 10 (row 20010",
    ),
    "two rows of the head swapped": (
        "released",
        edit(HEAD, swapped_rows),
        f"{HEAD}, row 10 (row 20010 of the source)",
    ),
    "two rows of a matrix swapped": ("released", edit(QKV, swapped_rows), f"{QKV}, row 10, column 0"),
    "cut one row too early": ("released", one_row_earlier, f"{HEAD}, row 0 (row 20000"),
    "cut one row too late": ("released", edit(EMBEDDING, lambda t: t[1:]), f"{EMBEDDING} is float16 [1471, 64]"),
    "one row too many": ("released", edit(HEAD, lambda t: torch.cat((t, t[:1]))), f"{HEAD} is float16 [1473, 64]"),
    "bit in the embedding's first number": ("released", flip(EMBEDDING, 0), f"{EMBEDDING}, row 0 (row 20000 of the"),
    "bit in the embedding's last number": ("released", flip(EMBEDDING), f"{EMBEDDING}, row 1471"),
    "bit in the head": ("released", flip(HEAD, 100), f"{HEAD}, row 1 (row 20001 of the source), column 36"),
    "bit in a matrix": ("released", flip(QKV, 70), f"{QKV}, row 1, column 6"),
    "bit in a norm": ("released", flip(NORM, 3), f"{NORM}, row 3"),
    "bit in a bias": ("released", flip(QKV.replace("weight", "bias")), "query_key_value.bias, row 191"),
    "bit in int8 values": ("8 bits", flip(DOWN), f"{DOWN}, row 63, column 255"),
    "bit in a scale": ("8 bits", flip(f"{DOWN}_scale"), f"{DOWN}_scale, row 63"),
    "bit in int4 values": ("4 bits", flip(DOWN, 3), f"{DOWN}, row 0, column 3"),
    "bit in a number without axes": ("odd tensors", flip("transformer.one"), "transformer.one: 3.5"),
    "bit in a P-tuning prefix": (
        "prefix alone",
        flip("transformer.prefix_encoder.embedding.weight"),
        "prefix_encoder.embedding.weight, row 5",
    ),
    "bit in an adapter's columns": (
        "adapter",
        flip("base_model.model.transformer.word_embeddings.lora_embedding_A", 130528),
        "lora_embedding_A, row 1, column 0",
    ),
    "bit in an adapter's rows": (
        "adapter",
        flip("base_model.model.lm_head.lora_magnitude_vector", 3),
        "lora_magnitude_vector, row 3 (row 20003 of the source)",
    ),
    "bit in a trimmed row": ("trimmed to a corpus", flip(EMBEDDING, 64 * 300), f"{EMBEDDING}, row 300 (row"),
    "NaN in a norm": ("released", edit(NORM, set_number(float("nan"))), f"{NORM}, row 5: nan"),
    "NaN in a matrix": ("released", edit(QKV, set_number(float("nan"))), f"{QKV}, row 0, column 5: nan"),
    "infinity in the head": ("released", edit(HEAD, set_number(float("inf"))), f"{HEAD}, row 0"),
    "sign of a zero": ("odd tensors", edit("transformer.one", lambda t: -t), "transformer.one: -3.5, expected 3.5"),
    "a matrix scaled": ("released", edit(DOWN, lambda t: t * 2), f"{DOWN}, row 0"),
    "a matrix transposed": (
        "released",
        edit("transformer.layers.0.attention.dense.weight", lambda t: t.T),
        "attention.dense.weight, row 0, column 1",
    ),
    "scales doubled": ("8 bits", edit(f"{QKV}_scale", lambda t: t * 2), f"{QKV}_scale, row 0"),
    "scales of another row": ("8 bits", edit(f"{QKV}_scale", lambda t: t.roll(1)), f"{QKV}_scale, row 0"),
    "values rounded down": ("8 bits", edit(QKV, lambda t: t - (t > 3).to(t.dtype)), f"{QKV}, row"),
    "nibbles in the other order": ("4 bits", edit(QKV, nibbles_swapped), f"{QKV}, row 0, column 0"),
    "scales of groups moved": ("4 bits, groups, head", edit(f"{DOWN}_scale", lambda t: t.roll(1, 1)), f"{DOWN}_scale"),
    "norms in another type": ("released", edit(NORM, lambda t: t.half()), f"{NORM} is float16 [64], expected float32"),
    "a matrix in another type": ("released", edit(QKV, lambda t: t.bfloat16()), f"{QKV} is bfloat16"),
    "--dtype forgotten in one tensor": ("to bfloat16", edit(NORM, lambda t: t.float()), f"{NORM} is float32"),
    "another shape": ("released", edit(QKV, lambda t: t.view(96, 128)), f"{QKV} is float16 [96, 128]"),
    "a tensor missing": ("released", edit_tensors(lambda t: t.pop(DOWN)), f"{DOWN} is missing"),
    "a scale missing": ("8 bits", edit_tensors(lambda t: t.pop(f"{DOWN}_scale")), f"{DOWN}_scale is missing"),
    "a tensor too many": (
        "released",
        edit_tensors(lambda t: t.update({"transformer.more": torch.ones(2)})),
        "transformer.more is not in the source",
    ),
    "a tensor renamed": ("released", renamed(NORM, f"{NORM}s"), f"{NORM} is missing"),
    "two tensors exchanged": (
        "released",
        edit_tensors(lambda t: t.update({EMBEDDING: t[HEAD], HEAD: t[EMBEDDING]})),
        f"{HEAD}, row 0",
    ),
    "a tied head stored": (
        "head equal",
        edit_tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()})),
        f"{HEAD} is not in the source, or not apart from the embedding",
    ),
    "an untied head left out": ("released", edit_tensors(lambda t: t.pop(HEAD)), f"{HEAD} is missing"),
    "weights without their format": ("released", without_metadata, "metadata None"),
    "weights as .bin": ("released", as_bin, "holds no weights"),
    "weights cut off": ("released", rewritten("model.safetensors", lambda c: c[:-10]), "tensors: can't be read"),
    "weights with a tail": ("released", rewritten("model.safetensors", lambda c: c + b"x"), "tensors: can't be read"),
    "no weights": ("released", removed("model.safetensors"), "holds no weights"),
    "index that names another shard": ("one to shards", other_shard_in_index, "model.safetensors.index.json says"),
    "index without a tensor": ("one to shards", one_less_in_index, "is in None, it is in model-"),
    "index with another size": ("one to shards", other_size_in_index, "total_size"),
    "no index": ("one to shards", removed("model.safetensors.index.json"), "model.safetensors.index.json is there"),
    "a shard missing": ("one to shards", first_shard_gone, "-00001-of-"),
    "a shard too many": ("one to shards", added("model-00009-of-00009.safetensors"), "00009-of-00009"),
    "a tensor in two shards": ("one to shards", tensor_in_two_shards, "and in model-00002"),
    "a single file beside the shards": ("one to shards", stale_single_file, f"{EMBEDDING}, row 0 (row 20000"),
    "an index beside the single file": (
        "released",
        added("model.safetensors.index.json", "{}"),
        "index.json is there",
    ),
    "eos_token_id": ("released", settings(CONFIG, eos_token_id=7), "eos_token_id is 7, expected 1105"),
    "bos_token_id not moved": ("released", settings(CONFIG, bos_token_id=21104), "bos_token_id is 21104"),
    "mask_token_id": ("released", settings(CONFIG, mask_token_id=1101), "mask_token_id is 1101, expected 1100"),
    "gmask_token_id missing": ("released", settings(CONFIG, gmask_token_id=...), "gmask_token_id is absent"),
    "pad_token_id": ("released", settings(CONFIG, pad_token_id=0), "pad_token_id is 0, expected 3"),
    "an id in another type": ("released", settings(CONFIG, pad_token_id=3.0), "pad_token_id is 3.0, expected 3"),
    "vocab_size": ("released", settings(CONFIG, vocab_size=21472), "vocab_size is 21472, expected 1472"),
    "layernorm_epsilon": ("released", settings(CONFIG, layernorm_epsilon=1e-2), "layernorm_epsilon is 0.01"),
    "residual_scale": ("released", settings(CONFIG, residual_scale=2.0), "residual_scale is 2.0"),
    "num_layers": ("released", settings(CONFIG, num_layers=2), "num_layers is 2, expected 3"),
    "num_attention_heads": ("released", settings(CONFIG, num_attention_heads=8), "num_attention_heads is 8"),
    "position_encoding_2d": (
        "released",
        settings(CONFIG, position_encoding_2d=False),
        "position_encoding_2d is False",
    ),
    "max_sequence_length": ("released", settings(CONFIG, max_sequence_length=512), "max_sequence_length is 512"),
    "pre_seq_len": ("released", settings(CONFIG, pre_seq_len=4), "pre_seq_len is 4"),
    "pre_seq_len missing": ("whole P-tuned", settings(CONFIG, pre_seq_len=...), "pre_seq_len is absent, expected 6"),
    "quantization_bit": ("8 bits", settings(CONFIG, quantization_bit=4), "quantization_bit is 4, expected 8"),
    "quantization_bit missing": ("4 bits", settings(CONFIG, quantization_bit=...), "quantization_bit is absent"),
    "quantization_group_size": (
        "4 bits, groups, head",
        settings(CONFIG, quantization_group_size=64),
        "quantization_group_size is 64, expected 32",
    ),
    "quantize_head": ("4 bits, groups, head", settings(CONFIG, quantize_head=False), "quantize_head is False"),
    "quantize_head too many": ("8 bits", settings(CONFIG, quantize_head=True), "quantize_head is True"),
    "quantize_activations": ("8 bits", settings(CONFIG, quantize_activations=True), "quantize_activations is True"),
    "tie_word_embeddings": ("released", settings(CONFIG, tie_word_embeddings=True), "tie_word_embeddings is True"),
    "tie_word_embeddings of a tied head": (
        "head absent",
        settings(CONFIG, tie_word_embeddings=False),
        "tie_word_embeddings is False, expected True",
    ),
    "torch_dtype": (
        "released",
        settings(CONFIG, torch_dtype="float32"),
        "torch_dtype is 'float32', expected 'float16'",
    ),
    "dtype beside torch_dtype": ("released", settings(CONFIG, dtype="float32"), "dtype is 'float32'"),
    "model_type": ("released", settings(CONFIG, model_type="chatglm2"), "model_type is 'chatglm2'"),
    "architectures": ("released", settings(CONFIG, architectures=["Other"]), "architectures is ['Other']"),
    "auto_map to another repository": (
        "released",
        settings(CONFIG, auto_map={"AutoModel": "someone/else--modeling_chatglm.ChatGLMModel"}),
        "auto_map is {'AutoModel': 'someone/else",
    ),
    "auto_map missing": ("released", settings(CONFIG, auto_map=...), "auto_map is absent"),
    "custom_pipelines": (
        "released",
        settings(CONFIG, custom_pipelines={"x": {"impl": "someone/else--x.X"}}),
        "custom_pipelines is",
    ),
    "_attn_implementation": (
        "released",
        settings(CONFIG, _attn_implementation="someone/kernel"),
        "_attn_implementation is 'someone/kernel', a field that the format doesn't know",
    ),
    "quantization_config": (
        "released",
        settings(CONFIG, quantization_config={"quant_method": "bitsandbytes"}),
        "quantization_config is",
    ),
    "a number that nobody asked for": ("released", settings(CONFIG, output_attentions=1), "output_attentions is 1"),
    "config.json no object": (
        "released",
        rewritten(CONFIG, lambda _: b"[]"),
        "config.json is no JSON object but a list",
    ),
    "config.json cut off": ("released", rewritten(CONFIG, lambda c: c[:40]), "settings: can't be read"),
    "config.json deeply nested": ("released", rewritten(CONFIG, lambda _: b"[" * 100_000), "settings: can't be read"),
    "config.json missing": ("released", removed(CONFIG), "config.json is missing"),
    "eos of generation": (
        "released",
        settings(GENERATION, eos_token_id=7),
        "generation_config.json: eos_token_id is 7",
    ),
    "pad of generation": (
        "released",
        settings(GENERATION, pad_token_id=0),
        "generation_config.json: pad_token_id is 0",
    ),
    "temperature": ("released", settings(GENERATION, temperature=0.1), "generation_config.json: temperature is 0.1"),
    "custom_generate": ("released", settings(GENERATION, custom_generate="someone/else"), "custom_generate is"),
    "generation_config.json missing": ("released", removed(GENERATION), "generation_config.json is missing"),
    "num_image_tokens": (
        "released",
        settings(TOKENIZER, num_image_tokens=20000),
        "num_image_tokens is 20000, expected 0",
    ),
    "padding_side": ("released", settings(TOKENIZER, padding_side="right"), "padding_side is 'right'"),
    "do_lower_case": ("released", settings(TOKENIZER, do_lower_case=True), "do_lower_case is True"),
    "tokenizer's auto_map": (
        "released",
        settings(TOKENIZER, auto_map={"AutoTokenizer": ["someone/else--t.T", None]}),
        "tokenizer_config.json: auto_map is",
    ),
    "a template in the settings": (
        "released",
        settings(TOKENIZER, chat_template="{{ x }}"),
        "chat_template is '{{ x }}'",
    ),
    "bit in a piece": ("released", rewritten(PIECES, flipped(3000)), "ice_text.model differs"),
    "bit at the end of the pieces": ("released", rewritten(PIECES, flipped(-3)), "ice_text.model differs"),
    "bit in the normaliser": ("released", rewritten(PIECES, flipped(-20_000)), "ice_text.model differs"),
    "a piece renamed": ("released", rewritten(PIECES, replaced("的", "地")), "ice_text.model differs"),
    "pieces not completed": (
        "released",
        lambda output: shutil.copy(GOLDEN / "tiny_sp_preslim.model", output / PIECES),
        "ice_text.model differs",
    ),
    "pieces missing": ("released", removed(PIECES), "ice_text.model is missing"),
    "pieces of the whole vocabulary": (
        "trimmed to a corpus",
        lambda output: shutil.copy(GOLDEN / "tiny_sp.model", output / PIECES),
        "ice_text.model differs",
    ),
    "another row in the record": ("trimmed to a corpus", shifted_run, f"{HEAD}, row"),
    "record of rows missing": ("trimmed to a corpus", removed("vocabulary_map.json"), "vocabulary_map.json"),
    "record with another size": ("trimmed to a corpus", settings("vocabulary_map.json", rows=3), "rows is 3"),
    "record without <eop>": ("trimmed to a corpus", without_eop, "has lost its row"),
    "record of descending rows": (
        "trimmed to a corpus",
        settings("vocabulary_map.json", kept_runs=[[20005, 20010], [20001, 20003]]),
        "no ascending runs of rows",
    ),
    "a record that nobody asked for": ("released", added("vocabulary_map.json", "{}"), "vocabulary_map.json is there"),
    "residual scale in the code": (
        "released",
        rewritten("modeling_chatglm.py", replaced("self.residual_scale", "2.0")),
        "modeling_chatglm.py differs",
    ),
    "a comment in the code": (
        "released",
        rewritten("quantization.py", lambda c: c + b"# x\n"),
        "quantization.py differs",
    ),
    "code missing": ("released", removed("quantization.py"), "quantization.py is missing"),
    "code too many": ("released", added("sitecustomize.py", "print('hello')"), "sitecustomize.py is there"),
    "a folder too many": ("released", lambda output: (output / "__pycache__").mkdir(), "__pycache__ is there"),
    "a hidden file": ("released", added(".netrc"), ".netrc is there"),
    "a pickle too many": ("released", added("training_args.bin"), "training_args.bin is there"),
    "slim.py's own file left behind": ("released", added("slim-journal.json", "{}"), "slim-journal.json is there"),
    "the template": (
        "released",
        rewritten("chat_template.jinja", lambda c: c + b"{{ evil }}"),
        "chat_template.jinja differs",
    ),
    "the licence": ("released", rewritten("LICENSE", flipped(100)), "LICENSE differs"),
    "the card missing": ("released", removed("README.md"), "README.md is missing"),
    "the adapter's rank": ("adapter", settings("adapter_config.json", r=4), "adapter_config.json: r is 4, expected 2"),
    "the adapter's token ids": (
        "adapter",
        settings("adapter_config.json", trainable_token_indices={"word_embeddings": [150004, 20005]}),
        "expected {'word_embeddings': [130004, 5]}",
    ),
    "the adapter's base": (
        "adapter",
        settings("adapter_config.json", base_model_name_or_path="/old/base"),
        "base_model_name_or_path is '/old/base', expected 'someone/slim'",
    ),
    "a field of the adapter": ("adapter", settings("adapter_config.json", auto_mapping={"x": 1}), "auto_mapping is"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damage_is_found_and_named(made, tmp_path, capsys, what):
    name, damage, message = DAMAGES[what]
    case = made(name)
    output = tmp_path / "output"
    shutil.copytree(case.output, output)
    damage(output)
    capsys.readouterr()
    assert case.check_only(output) == Exit.CHECK_FAILED
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERENT: ")]
    assert any(message in line for line in lines), lines


def test_random_bits_in_random_places_of_every_file_are_found(made, tmp_path, capsys):
    """Only the card's text and white space of JSON say the same with another bit here and there."""
    import random

    case = made("8 bits")
    draw = random.Random(11)
    for path in sorted(case.output.iterdir()):
        if path.suffix in (".json", ".md"):
            continue
        for _ in range(2):
            output = tmp_path / "output"
            shutil.copytree(case.output, output)
            rewritten(path.name, flipped(draw.randrange(path.stat().st_size)))(output)
            assert case.check_only(output) == Exit.CHECK_FAILED, path.name
            shutil.rmtree(output)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("released", ["--dtype", "bfloat16"]),
        ("released", ["--bits", "8"]),
        ("8 bits", ["--quantize-head"]),
        ("8 bits", ["--bits", "4"]),
        ("released", ["--keep-languages", "en"]),
    ],
)
def test_an_output_made_with_other_options_is_not_what_was_asked_for(made, name, options):
    assert made(name).check_only(made(name).output, *options) == Exit.CHECK_FAILED


def test_an_output_of_another_source_is_found(made):
    for one, other in (("released", "float16"), ("8 bits", "4 bits"), ("head equal", "released")):
        assert made(one).check_only(made(other).output) == Exit.CHECK_FAILED


# ----------------------------------------------------------------------------------------- faults of the conversion


def test_a_conversion_that_takes_wrong_rows_is_found(tmp_path, capsys, monkeypatch):
    """The check knows rows by their ids: what the plan says of them is nothing to it."""
    source = write_source(tmp_path / "source", *toy())
    find = plan.find_vocabulary
    wrong = {
        "swapped": lambda rows: ((20000, 20010), (20011, 20012), (20010, 20011), (20012, rows)),
        "early": lambda rows: ((19999, rows - 1),),
        "doubled": lambda rows: ((20000, 20010), (20009, rows - 1)),
    }
    for name, runs in wrong.items():
        with monkeypatch.context() as patch:
            changed = lambda *arguments, runs=runs: with_runs(find(*arguments), runs)  # noqa: E731
            patch.setattr(plan, "find_vocabulary", changed)
            assert slim.main([str(source), str(tmp_path / name), "--check"]) == Exit.CHECK_FAILED
        assert f"DIFFERENT: tensors: {HEAD}" in capsys.readouterr().out  # the first one in the file
        assert not (tmp_path / name).exists()


def with_runs(vocabulary, runs):
    import dataclasses

    return dataclasses.replace(vocabulary, runs=runs(vocabulary.source_rows))


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_conversion_that_rounds_otherwise_is_found(tmp_path, capsys, monkeypatch, bits):
    source = write_source(tmp_path / "source", *toy())
    quantize = slim.quantized

    def coarse(rows, job):
        return quantize((rows.float() * 1.001).to(rows.dtype), job)

    monkeypatch.setattr(slim, "quantized", coarse)
    assert slim.main([str(source), str(tmp_path / "out"), "--bits", bits, "--check"]) == Exit.CHECK_FAILED
    assert re.search(r"DIFFERENT: tensors: transformer\.layers\.0\.\S+weight", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------- the logits


def logits_of(case: Made, output: Path) -> str:
    """What the comparison of logits alone says, whatever tensors and settings are."""
    told = check.read_case(case.source, output, slim.Options())
    return check_network.compare_logits(told, output, check.read_tensors(output))


@pytest.mark.parametrize(
    "damage",
    [
        edit(NORM, set_number(float("nan"))),
        edit(HEAD, set_number(float("inf"))),
        edit(DOWN, lambda tensor: tensor * 1.01),
        settings(CONFIG, residual_scale=7.4),
        settings(CONFIG, layernorm_epsilon=1e-3),
        settings(CONFIG, position_encoding_2d=False),
        settings(CONFIG, num_attention_heads=2),
        settings(CONFIG, gmask_token_id=1100),
        edit_tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()})),
    ],
)
def test_logits_alone_tell_damages_that_matter(made, tmp_path, damage):
    case = made("released")
    assert "3 prompts within" in logits_of(case, case.output)
    output = tmp_path / "output"
    shutil.copytree(case.output, output)
    damage(output)
    with pytest.raises((check.Difference, *check.UNREADABLE)):
        logits_of(case, output)


def test_logits_that_are_all_zero_are_said_to_prove_nothing(tmp_path, capsys):
    state, config = toy()
    state[HEAD].zero_()
    source = write_source(tmp_path / "source", state, config)
    assert slim.main([str(source), str(tmp_path / "out"), "--check"]) == Exit.OK
    assert "says nothing of the layers" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["base2d", "base1d", "prefix", "prefix_proj"])
def test_the_reference_network_gives_the_golden_logits(golden, name):
    """Of the original code, which the network of the package has no part in; prompts of the reference's own form."""
    folder = golden / "model" / name
    config = {
        **check_network.DEFAULTS,
        **{k: v for k, v in json.loads((folder / "config.json").read_text()).items() if v},
    }
    config["position_encoding_2d"] = name != "base1d"
    state = load_file(folder / "model.safetensors")
    config["rows"] = state[EMBEDDING].shape[0]
    tensors = load_file(folder / "tensors.safetensors")
    compared = 0
    for case in json.loads((folder / "cases.json").read_text())["cases"]:
        logits, ids = tensors.get(f"{case['name']}.logits"), case.get("input_ids")
        if logits is None or not ids or len(ids) != 1 or "position_ids" in case.get("passed", []):
            continue
        (ids,) = ids
        if config["bos_token_id"] not in ids or ids.index(config["bos_token_id"]) == 0:
            continue
        context = ids.index(config["bos_token_id"])
        if ids[context - 1] != config["gmask_token_id"] or config["gmask_token_id"] in ids[: context - 1]:
            continue
        numbers = lambda tensor, begin=0, end=None: state[tensor][begin:end]  # noqa: E731
        exact, short = check_network.reference(numbers, config, [check_network.Prompt(ids, context)])
        rounding, size = (short[0] - exact[0]).abs().max().item(), exact[0].abs().max().item()
        limit = check_network.rounding_limit(config, rounding, size)
        assert (logits[0].double() - exact[0]).abs().max().item() <= limit
        compared += 1
    assert compared


# ------------------------------------------------------------------------------------------------- parts of the check


def test_rounding_agrees_with_the_golden_vectors_of_the_original(golden):
    vectors = load_file(golden / "quantization.safetensors")
    for name in ("half_5x6", "half_8x16", "half_64x96", "float_16x32"):
        for bits in (8, 4):
            values, scale = check.rounded(vectors[f"{name}.w"], bits, 0)
            assert same_bits(values, vectors[f"{name}.int{bits}.weight"]), (name, bits)
            assert same_bits(scale.half(), vectors[f"{name}.int{bits}.scale"]), (name, bits)
            numbers = check_network.multiplied(values, scale, vectors[f"{name}.w"].shape[1])
            assert same_bits(numbers.half(), vectors[f"{name}.int{bits}.dequant_half"]), (name, bits)


def test_int4_values_come_back_in_their_order():
    values, scale = check.rounded(torch.tensor([[7.0, -3.0, 0.0, 1.0]]), 4, 0)
    assert values.tolist() == [[0x7D, 0x01]]
    assert check_network.multiplied(values, scale, 4).tolist() == [[7.0, -3.0, 0.0, 1.0]]


def test_completing_the_published_first_file_gives_the_published_final_one(real_sp_model):
    import hashlib

    import sentencepiece

    first_release = real_sp_model.with_name("ice_text.preslim.model")
    if not first_release.is_file():
        pytest.skip(f"{first_release} is not there")
    content = first_release.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    case = check.Case(first_release.parent, slim.Options(), "model", {}, {}, processor, 0, 0, torch.arange(0))
    assert hashlib.sha256(check_files.completed(case, content)).hexdigest() == check_files.PUBLISHED_SHA256


def test_the_files_of_the_package_are_those_that_it_imports():
    from package import package_files

    assert check_files.code_files() == {path.name for path in package_files()}


MEASURED = """
import sys, threading, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
import slim, sentencepiece
from package import package_module
from slimming import check, check_files, check_network
package_module("modeling_chatglm")

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
equal = check.check(Path(sys.argv[1]), Path(sys.argv[2]), slim.Options())
done.set()
thread.join()
print("EXTRA", peak - before, equal)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux reports it")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_is_a_few_blocks_whatever_the_size(tmp_path, form):
    """110 MB in all: the room is for one layer in float64 and in float32, and for blocks of rows."""
    hidden, inner, layers = 512, 2048, 14
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / 30).half()

    state = {EMBEDDING: numbers(21472, hidden)}
    for layer in range(layers):
        stem = f"transformer.layers.{layer}"
        shapes = {"attention.query_key_value": (3 * hidden, hidden), "attention.dense": (hidden, hidden)}
        shapes.update({"mlp.dense_h_to_4h": (inner, hidden), "mlp.dense_4h_to_h": (hidden, inner)})
        for name, shape in shapes.items():
            state[f"{stem}.{name}.weight"], state[f"{stem}.{name}.bias"] = numbers(*shape), numbers(shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{stem}.{norm}.weight"], state[f"{stem}.{norm}.bias"] = 1 + numbers(hidden), numbers(hidden)
    state["transformer.final_layernorm.weight"] = 1 + numbers(hidden)
    state["transformer.final_layernorm.bias"] = numbers(hidden)
    config = {**toy()[1], "hidden_size": hidden, "inner_hidden_size": inner, "num_layers": layers}
    config.pop("tie_word_embeddings")
    source = write_source(tmp_path / "source", state, config, form=form)
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.OK
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out"), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "EXTRA" in result.stdout, result.stderr
    extra, equal = result.stdout.split("EXTRA ")[1].split()
    assert equal == "True"
    layer = 4 * hidden * hidden + 2 * hidden * inner  # numbers
    blocks = 4 * check.BLOCK_BYTES  # of source and output, whether they are equal, and one more
    assert int(extra) < (8 + 4) * layer + blocks < sum(tensor.nbytes for tensor in state.values())
