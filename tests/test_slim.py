"""slim.py makes the same model without its image rows from every kind of checkpoint, and survives what goes wrong."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_as_near, roundings
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
from slim import Options
from slimming import checkpoint_io
from slimming import output as outputs
from slimming.checkpoint_io import Exit, Refusal
from slimming.output import replaced

ROOT = Path(__file__).resolve().parents[1]


def assert_is_slim_toy(output: Path) -> None:
    found, expected = tensors_of(output), slim_toy()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


# --------------------------------------------------------------------------------------------- every kind of source


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"shards": 4},
        {"shards": 3, "index": False},
        {"form": "bin"},
        {"form": "bin", "shards": 4},
        {"form": "bin", "shards": 2, "index": False},
        {"form": "legacy"},
        {"form": "legacy", "shards": 2},
    ],
    ids=lambda form: "-".join(map(str, form.values())) or "safetensors",
)
def test_every_file_layout_gives_the_golden_slim_toy_bit_for_bit(tmp_path, form):
    source = write_full_toy(tmp_path / "source", **form)
    slim.slim(str(source), tmp_path / "out")
    assert_is_slim_toy(tmp_path / "out")


def test_ids_rows_and_classes_of_the_config_are_the_slim_ones_and_the_rest_stays(tmp_path):
    source = write_full_toy(tmp_path / "source")
    slim.slim(str(source), tmp_path / "out")
    before = json.loads((source / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "mask", "gmask", "pad")] == [
        1104,
        1105,
        1100,
        1101,
        3,
    ]
    assert config["vocab_size"] == 1472
    assert config["auto_map"]["AutoModel"] == "modeling_chatglm.ChatGLMForConditionalGeneration"
    changed = {name for name in config if config[name] != before.get(name)}
    moved = {f"{name}_token_id" for name in ("bos", "eos", "mask", "gmask", "pad")}
    package = {"auto_map", "architectures", "code_version", "tokenizer_class"}
    assert moved | {"vocab_size"} <= changed <= moved | {"vocab_size"} | package
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1104, 1105, 3)


def test_generation_settings_stay_and_ids_nobody_uses_are_dropped(tmp_path):
    source = write_full_toy(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "eos_token_id": 20002, "sep_token_id": 7, "pad_token_id": 0})
    )
    stale = {"bos_token_id": 1104, "eos_token_id": [21105, 20002], "top_p": 0.5}
    (source / "generation_config.json").write_text(json.dumps(stale))
    slim.slim(str(source), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 3)
    assert "sep_token_id" not in config
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1104, "eos_token_id": [1105, 2], "top_p": 0.5}


def test_output_loads_and_generates_what_the_original_did(tmp_path, golden):
    from transformers import AutoModel, AutoTokenizer

    slim.slim(str(write_full_toy(tmp_path / "source")), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).float().eval()
    for case in json.loads((golden / "model" / "trim" / "cases.json").read_text())["cases"]:
        ids = tokenizer(case["text"])["input_ids"]
        assert [ids] == case["slim_ids"]
        new = len(case["slim_greedy"][0]) - len(ids)
        generated = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new)
        assert generated.tolist() == case["slim_greedy"]
    assert isinstance(model.chat(tokenizer, "你好", do_sample=False, max_length=32)[0], str)


def test_the_real_tokenizer_file_of_the_first_release_becomes_the_published_one(tmp_path, real_sp_model):
    first_release = real_sp_model.with_name("ice_text.preslim.model")
    if not first_release.is_file():
        pytest.skip(f"{first_release} is not there")
    state, config = full_toy()
    state[EMBEDDING], state[HEAD] = torch.randn(2, 150528, 8).half()
    config.update(vocab_size=150528, bos_token_id=150004, eos_token_id=150005, mask_token_id=150000)
    config.update(gmask_token_id=150001)
    source = write_source(tmp_path / "source", state, config)
    (source / "ice_text.model").write_bytes(first_release.read_bytes())
    slim.slim(str(source), tmp_path / "out")
    digest = hashlib.sha256((tmp_path / "out" / "ice_text.model").read_bytes()).hexdigest()
    assert digest == "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"
    assert same_bits(tensors_of(tmp_path / "out")[EMBEDDING], state[EMBEDDING][IMAGE_ROWS:])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["pad_token_id"]) == (130528, 130004, 3)


def test_full_rows_with_the_later_complete_tokenizer_file(tmp_path, golden):
    source = write_full_toy(tmp_path / "source")
    (source / "ice_text.model").write_bytes((golden / "tiny_sp.model").read_bytes())
    (source / "tokenizer_config.json").write_text('{"num_image_tokens": 20000, "do_lower_case": true}')
    slim.slim(str(source), tmp_path / "out")
    assert_is_slim_toy(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["num_image_tokens"], settings["do_lower_case"]) == (0, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_other_dtypes_are_copied_as_they_are(tmp_path, dtype, form):
    state, config = full_toy()
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    slim.slim(str(write_source(tmp_path / "source", state, config, form=form)), tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        rows = IMAGE_ROWS if name in (EMBEDDING, HEAD) else 0
        assert same_bits(tensor, state[name][rows:]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_converts_every_number_as_torch_does(tmp_path, dtype):
    state, config = full_toy()
    state["transformer.final_layernorm.weight"] = state["transformer.final_layernorm.weight"].float() + 1e-5
    source = write_source(tmp_path / "source", state, config)
    slim.slim(str(source), tmp_path / "out", Options(dtype=dtype, check=True))
    for name, tensor in tensors_of(tmp_path / "out").items():
        rows = IMAGE_ROWS if name in (EMBEDDING, HEAD) else 0
        assert same_bits(tensor, state[name][rows:].to(getattr(torch, dtype))), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize(("head", "tied"), [("absent", True), ("equal", True), ("different", False)])
def test_head_is_stored_once_when_equal_and_twice_when_not(tmp_path, capsys, head, tied):
    state, config = full_toy()
    config.pop("tie_word_embeddings")
    if head == "absent":
        del state[HEAD]
    if head == "equal":
        state[HEAD] = state[EMBEDDING].clone()
        state[HEAD][:IMAGE_ROWS] += 1  # rows that go don't count
    source = write_source(tmp_path / "source", state, config)
    slim.slim(str(source), tmp_path / "out", Options(check=True))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    found = tensors_of(tmp_path / "out")
    assert (HEAD in found) is not tied
    assert same_bits(found[EMBEDDING], state[EMBEDDING][IMAGE_ROWS:])
    assert f"head: {head}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["quant8", "quant4"])
def test_quantized_checkpoints_keep_their_layers(tmp_path, name):
    slim_state, slim_config = golden_toy(name)
    source = write_source(tmp_path / "source", *widened(slim_state, slim_config), form="bin", shards=2)
    slim.slim(str(source), tmp_path / "out", Options(check=True))
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(slim_state)
    assert all(same_bits(found[name], slim_state[name]) for name in found)


def test_fully_quantized_vocabulary_loses_rows_and_scales(tmp_path):
    state, config = widened(*golden_toy("quant8"))
    del state[HEAD]
    rows = state[EMBEDDING].shape[0]
    state[EMBEDDING] = torch.randint(-127, 127, state[EMBEDDING].shape, dtype=torch.int8)
    state[f"{EMBEDDING}_scale"] = torch.rand(rows).half()
    config.update(quantize_head=True, tie_word_embeddings=True)
    source = write_source(tmp_path / "source", state, config)
    slim.slim(str(source), tmp_path / "out", Options(check=True))
    found = tensors_of(tmp_path / "out")
    assert same_bits(found[EMBEDDING], state[EMBEDDING][IMAGE_ROWS:])
    assert same_bits(found[f"{EMBEDDING}_scale"], state[f"{EMBEDDING}_scale"][IMAGE_ROWS:])


@pytest.mark.parametrize("name", ["prefix", "prefix_proj"])
def test_whole_p_tuned_checkpoints(tmp_path, name):
    slim_state, slim_config = golden_toy(name)
    source = write_source(tmp_path / "source", *widened(slim_state, slim_config))
    slim.slim(str(source), tmp_path / "out", Options(check=True))
    found = tensors_of(tmp_path / "out")
    assert all(same_bits(found[name], slim_state[name]) for name in slim_state)


@pytest.mark.parametrize("name", ["prefix", "prefix_proj"])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_p_tuning_prefix_alone_keeps_its_tensors_and_works_on_the_slim_model(tmp_path, name, tokenizer):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    slim_state, slim_config = golden_toy(name)
    state, config = widened(slim_state, slim_config)
    prefix = {key: tensor for key, tensor in state.items() if "prefix_encoder" in key}
    source = write_source(tmp_path / "source", prefix, config, form="bin")
    if not tokenizer:
        (source / "ice_text.model").unlink()
    slim.slim(str(source), tmp_path / "out", Options(check=True))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(prefix)
    assert all(same_bits(found[key], prefix[key]) for key in prefix)
    # the recipe of the card
    whole = write_source(tmp_path / "whole", slim_state, {**slim_config, "pre_seq_len": slim_config["pre_seq_len"]})
    slim.slim(str(whole), tmp_path / "base", Options(repackage=True))
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (config.bos_token_id, config.vocab_size) == (slim_config["bos_token_id"], slim_config["vocab_size"])
    model = AutoModel.from_pretrained(tmp_path / "base", config=config, trust_remote_code=True)
    assert not model.load_state_dict(found, strict=False).unexpected_keys


def test_slim_checkpoints_are_repackaged_only_when_asked(tmp_path):
    state, config = golden_toy("trim/slim")
    source = write_source(tmp_path / "source", state, config, form="bin")
    with pytest.raises(Refusal) as refusal:
        slim.slim(str(source), tmp_path / "out")
    assert refusal.value.code == Exit.ALREADY_SLIM
    assert "1472 rows" in str(refusal.value)
    slim.slim(str(source), tmp_path / "out", Options(repackage=True, check=True))
    assert_is_slim_toy(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- adapters


def write_adapter(folder: Path, state: dict, form: str = "safetensors", **config) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": "/old/base", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    if form == "bin":
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_adapters_lose_the_image_rows_of_every_vocabulary_tensor(tmp_path, form):
    stem = "base_model.model."
    state = {
        f"{stem}transformer.layers.0.attention.query_key_value.lora_A.weight": torch.randn(2, 8),
        f"{stem}transformer.layers.0.attention.query_key_value.lora_B.weight": torch.randn(24, 2),
        f"{stem}transformer.word_embeddings.lora_embedding_A": torch.randn(2, 150528),
        f"{stem}transformer.word_embeddings.lora_embedding_B": torch.randn(8, 2),
        f"{stem}lm_head.lora_A.weight": torch.randn(2, 8),
        f"{stem}lm_head.lora_B.weight": torch.randn(150528, 2),
        f"{stem}lm_head.lora_magnitude_vector": torch.randn(150528),
    }
    source = write_adapter(tmp_path / "source", state, form)
    slim.slim(str(source), tmp_path / "out", Options(base="someone/slim", check=True))
    found = tensors_of(tmp_path / "out")
    for name, tensor in state.items():
        expected = tensor[:, IMAGE_ROWS:] if "embedding_A" in name else tensor
        expected = expected[IMAGE_ROWS:] if tensor.shape[0] == 150528 else expected
        assert same_bits(found[name], expected), name
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/slim"


def test_adapters_without_vocabulary_tensors_are_copied_and_their_token_indices_move(tmp_path):
    state = {"base_model.model.transformer.layers.0.attention.dense.lora_A.weight": torch.randn(2, 8)}
    source = write_adapter(tmp_path / "source", state, trainable_token_indices={"word_embeddings": [150004, 20005]})
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.WRONG_ROWS  # of which vocabulary, nobody says
    base = write_full_toy(tmp_path / "base")
    indices = {"word_embeddings": [21104, 20005]}
    settings = {"base_model_name_or_path": str(base), "trainable_token_indices": indices, "peft_type": "LORA"}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    (source / "ice_text.model").write_bytes((base / "ice_text.model").read_bytes())
    slim.slim(str(source), tmp_path / "out")
    assert all(same_bits(tensors_of(tmp_path / "out")[name], state[name]) for name in state)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"word_embeddings": [1104, 5]}


def test_adapters_of_other_models_are_refused(tmp_path, capsys):
    other = {"base_model.model.transformer.encoder.layers.0.self_attention.dense.lora_A.weight": torch.randn(2, 8)}
    assert slim.main([str(write_adapter(tmp_path / "glm2", other)), str(tmp_path / "out")]) == Exit.UNSUPPORTED
    head = {"base_model.model.lm_head.lora_B.weight": torch.randn(65024, 2)}
    assert slim.main([str(write_adapter(tmp_path / "head", head)), str(tmp_path / "out")]) == Exit.WRONG_ROWS
    assert "65024" in capsys.readouterr().err


def test_an_adapter_trained_on_the_full_model_gives_the_same_logits_on_the_slim_one(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    state, config = full_toy()
    state[HEAD] = state[EMBEDDING].clone()
    source = write_source(tmp_path / "source", state, config)
    slim.slim(str(source), tmp_path / "slim")
    base = AutoModel.from_pretrained(tmp_path / "slim", trust_remote_code=True).float()
    full_config = type(base.config)(**{**config, "auto_map": None})
    full_config.tie_word_embeddings = False
    full = type(base)(full_config).float()
    full.load_state_dict(state, strict=False)
    lora = peft.LoraConfig(r=2, target_modules=["query_key_value", "word_embeddings"], modules_to_save=["lm_head"])
    tuned = peft.get_peft_model(full, lora)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "ice_text.model").write_bytes((source / "ice_text.model").read_bytes())
    slim.slim(str(tmp_path / "adapter"), tmp_path / "slim_adapter", Options(base=str(tmp_path / "slim"), check=True))
    on_slim = peft.PeftModel.from_pretrained(base, tmp_path / "slim_adapter").eval()
    ids = torch.tensor([[5, 95, 209, 1101, 1104]])
    with torch.no_grad():
        expected = tuned.eval()(input_ids=ids + IMAGE_ROWS).logits[..., IMAGE_ROWS:]
        truth = copy.deepcopy(on_slim).double()(input_ids=ids).logits
        steps = roundings(base.config) + 4 * config["num_layers"]  # an adapter's: down, up, scale, sum
        assert_as_near(on_slim(input_ids=ids).logits, expected, truth, steps)


# ------------------------------------------------------------------------------------------------------ quantization


@pytest.mark.parametrize(("bits", "group_size", "quantize_head"), [(8, 0, False), (4, 0, False), (4, 32, True)])
def test_bits_writes_what_quantize_and_save_would(tmp_path, bits, group_size, quantize_head):
    from transformers import AutoModel

    state, config = widened(*golden_toy("base2d"))
    state = {name: tensor.half() for name, tensor in state.items()}
    source = write_source(tmp_path / "source", state, config, form="bin")
    slim.slim(str(source), tmp_path / "slim")
    options = Options(bits=bits, group_size=group_size, quantize_head=quantize_head, check=True)
    slim.slim(str(source), tmp_path / "quantized", options)
    model = AutoModel.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    expected = model.quantize(bits, group_size=group_size, quantize_head=quantize_head).state_dict()
    found = {k: v for k, v in tensors_of(tmp_path / "quantized").items() if "inv_freq" not in k}
    assert set(found) == set(expected)
    assert all(same_bits(found[name], expected[name]) for name in found)
    loaded = AutoModel.from_pretrained(tmp_path / "quantized", trust_remote_code=True)
    assert loaded.config.quantization_bit == bits
    assert all(same_bits(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


# ------------------------------------------------------------------------------------------------ shards and resuming


def shard_names(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*.safetensors"))


def test_max_shard_size_splits_the_output_and_the_index_names_every_tensor(tmp_path):
    from transformers import AutoModel

    source = write_full_toy(tmp_path / "source")
    slim.slim(str(source), tmp_path / "out", Options(max_shard_size=20_000, check=True))
    names = shard_names(tmp_path / "out")
    assert len(names) == 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    assert_is_slim_toy(tmp_path / "out")
    AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)


def count_writes(monkeypatch, fail_at: int | None = None) -> list[str]:
    """Names of the shards written from now on; the `fail_at`-th finds the disk full half-way."""
    written, write = [], checkpoint_io.write_shard

    def counted(path, tensors, content):
        if len(written) == fail_at:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        return write(path, tensors, content)

    monkeypatch.setattr(checkpoint_io, "write_shard", counted)
    return written


SMALL_SHARDS = Options(max_shard_size=400)


def test_a_full_disk_leaves_no_output_and_the_next_run_goes_on(tmp_path, monkeypatch):
    source = write_full_toy(tmp_path / "source")
    with monkeypatch.context() as patch, pytest.raises(Refusal) as refusal:
        first = count_writes(patch, fail_at=3)
        slim.slim(str(source), tmp_path / "out", SMALL_SHARDS)
    assert refusal.value.code == Exit.WRITE_FAILED
    assert not (tmp_path / "out").exists()
    second = count_writes(monkeypatch)
    slim.slim(str(source), tmp_path / "out", SMALL_SHARDS)
    assert set(first).isdisjoint(second)
    assert sorted(first + second) == shard_names(tmp_path / "out")
    assert_is_slim_toy(tmp_path / "out")
    assert os.listdir(tmp_path) == ["source", "out"] or sorted(os.listdir(tmp_path)) == ["out", "source"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import slim
from slimming import checkpoint_io
write, count = checkpoint_io.write_shard, 0
def dying(path, tensors, content):
    global count
    count += 1
    if count == 4:
        path.write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, tensors, content)
checkpoint_io.write_shard = dying
slim.slim({source!r}, {output!r}, slim.Options(max_shard_size=400))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_is_resumed_from_its_finished_shards(tmp_path, monkeypatch):
    source, output = write_full_toy(tmp_path / "source"), tmp_path / "out"
    script = KILLED.format(root=str(ROOT), source=str(source), output=str(output))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    written = count_writes(monkeypatch)
    slim.slim(str(source), output, SMALL_SHARDS)
    names = shard_names(output)
    assert written == names[3:]  # the fourth was half-written when it was killed
    assert_is_slim_toy(output)


@pytest.mark.parametrize("change", ["a finished shard", "the source", "the options"])
def test_what_changed_since_is_written_again(tmp_path, monkeypatch, change):
    source = write_full_toy(tmp_path / "source")
    with monkeypatch.context() as patch, pytest.raises(Refusal):
        count_writes(patch, fail_at=3)
        slim.slim(str(source), tmp_path / "out", SMALL_SHARDS)
    partial = tmp_path / "out-slim-partial"
    first = shard_names(partial)[0]
    options = SMALL_SHARDS
    if change == "a finished shard":
        content = bytearray((partial / first).read_bytes())
        content[-1] ^= 1
        (partial / first).write_bytes(content)
    elif change == "the source":
        os.utime(source / "model.safetensors", ns=(1, 1))
    else:
        options = Options(max_shard_size=400, dtype="bfloat16")
    written = count_writes(monkeypatch)
    slim.slim(str(source), tmp_path / "out", options)
    assert first in written
    if change != "the options":
        assert_is_slim_toy(tmp_path / "out")


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=16, max_size=200), cuts=st.lists(st.integers(0, 200)), flips=st.sets(st.integers(0, 1599))
)
def test_checksum_does_not_depend_on_the_chunks_but_on_every_bit_and_its_place(tmp_path_factory, data, cuts, flips):
    path, entry = tmp_path_factory.mktemp("checksum") / "shard.safetensors", [("a", "U8", (len(data),))]

    def checksum(content: bytes, ends: list[int]) -> str:
        pieces = [("a", content[begin:end]) for begin, end in zip([0, *ends], [*ends, len(content)])]
        written = checkpoint_io.write_shard(path, entry, pieces)
        assert checkpoint_io.shard_checksum(path) == written
        return written

    whole = checksum(data, [])
    assert checksum(data, sorted(min(cut, len(data)) for cut in cuts)) == whole
    damaged = bytearray(data)
    for flip in {flip % (8 * len(data)) for flip in flips}:
        damaged[flip // 8] ^= 1 << flip % 8
    assert (checksum(bytes(damaged), []) == whole) == (bytes(damaged) == data)


def test_two_sign_flips_in_words_of_equal_parity_show_in_the_checksum(tmp_path):
    """The sums of 64-bit words that stood here before were blind to them."""
    entry, numbers = [("a", "F64", (4,))], torch.arange(4.0, dtype=torch.float64)
    flipped = numbers * torch.tensor([-1.0, 1, -1, 1])
    sums = [
        checkpoint_io.write_shard(tmp_path / "shard", entry, [("a", checkpoint_io.tensor_bytes(one))])
        for one in (numbers, flipped)
    ]
    assert sums[0] != sums[1]


def test_two_runs_into_one_output_are_kept_apart(tmp_path):
    source = write_full_toy(tmp_path / "source")
    with outputs.locked(tmp_path / "out-slim-partial"), pytest.raises(Refusal) as refusal:
        slim.slim(str(source), tmp_path / "out")
    assert refusal.value.code == Exit.BUSY


# ---------------------------------------------------------------------------------------------------------- the output


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_source_and_existing_output_stay_and_dry_run_writes_nothing(tmp_path, capsys):
    source, output = write_full_toy(tmp_path / "source"), tmp_path / "out"
    before = snapshot(source)
    assert slim.main([str(source), str(output), "--dry-run"]) == 0
    assert os.listdir(tmp_path) == ["source"]
    text = capsys.readouterr().out
    assert "21,472 -> 1,472" in text
    assert "640,000" in text  # bytes saved
    assert "21104 -> 1104" in text
    output.mkdir()
    (output / "config.json").write_text("{}")
    assert slim.main([str(source), str(output)]) == Exit.OUTPUT_EXISTS
    assert os.listdir(output) == ["config.json"]
    assert slim.main([str(source), str(output), "--overwrite"]) == 0
    assert_is_slim_toy(output)
    assert snapshot(source) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_failed_overwrite_keeps_the_old_output(tmp_path, monkeypatch):
    source, output = write_full_toy(tmp_path / "source"), tmp_path / "out"
    slim.slim(str(source), output)
    old = snapshot(output)
    with monkeypatch.context() as patch:
        count_writes(patch, fail_at=0)
        assert slim.main([str(source), str(output), "--overwrite"]) == Exit.WRITE_FAILED
    assert snapshot(output) == old
    # killed between the two renames: the next run puts the old one back before anything else
    os.rename(output, replaced(output))
    assert slim.main([str(source), str(output)]) == Exit.OUTPUT_EXISTS
    assert snapshot(output) == old
    assert sorted(os.listdir(tmp_path)) == ["out", "out-slim-partial", "source"]


@pytest.mark.parametrize("place", ["source", "source/inside", "."])
def test_output_may_not_touch_the_source(tmp_path, place):
    source = write_full_toy(tmp_path / "source")
    before = snapshot(source)
    assert slim.main([str(source), str(tmp_path / place), "--overwrite"]) == Exit.OUTPUT_EXISTS
    assert snapshot(source) == before


def test_overwrite_deletes_nothing_but_model_folders(tmp_path):
    source, output = write_full_toy(tmp_path / "source"), tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.txt").write_text("years of work")
    assert slim.main([str(source), str(output), "--overwrite"]) == Exit.OUTPUT_EXISTS
    assert (output / "chapter1.txt").exists()


def test_a_folder_that_has_the_temporary_name_is_left_alone(tmp_path):
    source, taken = write_full_toy(tmp_path / "source"), tmp_path / "out-slim-partial"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    assert slim.main([str(source), str(tmp_path / "out")]) == Exit.OUTPUT_EXISTS
    assert os.listdir(taken) == ["mine.txt"]


def test_folder_holds_code_template_card_and_licence(tmp_path):
    slim.slim(str(write_full_toy(tmp_path / "source")), tmp_path / "out")
    names = set(os.listdir(tmp_path / "out"))
    assert names >= {"modeling_chatglm.py", "configuration_chatglm.py", "tokenization_chatglm.py", "quantization.py"}
    assert names >= {"chat_template.jinja", "README.md", "LICENSE", "ice_text.model", "generation_config.json"}
    assert not {name for name in names if "slim" in name or "journal" in name}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "20,000 of 21,472 vocabulary rows were cut" in card
    assert "bit for bit" in card
