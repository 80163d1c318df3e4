"""Folders as users have them: the bare code, a first-release checkpoint, 16-bit files, several devices."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from chatglm_slim import compat
from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_slim.tokenization_chatglm import ChatGLMTokenizer
from rounding import assert_as_near, exact, roundings
from safetensors.torch import load_file, save_file
from slim_sources import IMAGE_ROWS, golden_toy, widened, write_source
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_the_code_alone_says_in_one_line_where_weights_come_from():
    with pytest.raises(OSError, match="without weights: make a complete folder with `python slim.py") as error:
        AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    assert "\n" not in str(error.value)


def test_the_code_alone_says_in_one_line_where_the_vocabulary_comes_from():
    with pytest.raises((OSError, ValueError), match="slim.py") as error:
        AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    assert "\n" not in str(error.value)


def folder_of(golden, tmp_path, name):
    """A golden model as a folder that every transformers version loads (4.x wants the format in the metadata)."""
    folder = tmp_path / name.replace("/", "_")
    folder.mkdir()
    shutil.copy(golden / "model" / name / "config.json", folder)
    save_file(load_file(golden / "model" / name / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def test_a_first_release_checkpoint_answers_as_the_slim_one(golden, golden_model, tmp_path):
    source = write_source(tmp_path / "full", *widened(*golden_toy("base2d")))
    full = ChatGLMForConditionalGeneration.from_pretrained(source).eval()
    slim = ChatGLMForConditionalGeneration.from_pretrained(folder_of(golden, tmp_path, "base2d")).eval()
    _, cases, tensors = golden_model("base2d")
    for index in range(2):
        ids, logits = torch.tensor(cases[f"single{index}"]["input_ids"]), tensors[f"single{index}.logits"]
        ours, truth, steps = slim(ids).logits, exact(slim, ids).logits, roundings(slim.config)
        assert_as_near(ours, logits, truth, steps)
        # The same numbers in the same shapes; only the head's product has another size.
        hidden = [model.transformer(each).last_hidden_state for model, each in ((slim, ids), (full, ids + IMAGE_ROWS))]
        assert torch.equal(*hidden)
        assert_as_near(full(ids + IMAGE_ROWS).logits[..., IMAGE_ROWS:], logits, truth, steps)
        answer = slim.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert answer.tolist() == [row[: answer.shape[1]] for row in cases[f"greedy{index}"]["output_ids"]]


def test_a_first_release_tokenizer_numbers_its_text_behind_the_image_tokens(golden):
    full = ChatGLMTokenizer(str(golden / "tiny_sp_preslim.model"))
    slim = ChatGLMTokenizer(str(golden / "tiny_sp.model"))
    text = "你好, hello\tworld  ！"
    assert full(text)["input_ids"] == [token + 20000 for token in slim(text)["input_ids"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_given_dtype_wins_over_the_checkpoint(golden, tmp_path, dtype):
    folder = folder_of(golden, tmp_path, "trim/slim")  # stored in float16
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert ChatGLMForConditionalGeneration.from_pretrained(folder).dtype == torch.float16


@torch.no_grad()
def test_device_map_places_the_blocks(golden, tmp_path):
    pytest.importorskip("accelerate")
    folder = folder_of(golden, tmp_path, "base2d")
    plain = ChatGLMForConditionalGeneration.from_pretrained(folder).float()
    placed = ChatGLMForConditionalGeneration.from_pretrained(folder, device_map={"": "cpu"}).float()
    ids = torch.tensor([[5, 95, 1101, 1104]])
    assert torch.equal(placed(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_blocks_offloaded_to_disk_compute_the_same(golden, tmp_path):
    pytest.importorskip("accelerate")
    folder = folder_of(golden, tmp_path, "base2d")
    plain = ChatGLMForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)
    places = {"transformer.word_embeddings": "cpu", "lm_head": "cpu", "transformer.final_layernorm": "cpu"}
    places.update({"transformer.layers.0": "cpu", "transformer.layers.1": "disk", "transformer.layers.2": "cpu"})
    placed = ChatGLMForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, device_map=places, offload_folder=str(tmp_path / "offload")
    )
    ids = torch.tensor([[5, 95, 1101, 1104]])
    # The same numbers at other addresses, of which the order of sums may depend.
    assert_as_near(placed(ids).logits, plain(ids).logits, exact(plain, ids).logits, roundings(plain.config))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 3}
    assert placed.generate(input_ids=ids, **options).tolist() == plain.generate(input_ids=ids, **options).tolist()


def test_untied_matrices_of_a_checkpoint_stay_two(golden, tmp_path):
    folder = folder_of(golden, tmp_path, "base2d")
    model = ChatGLMForConditionalGeneration.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.transformer.word_embeddings.weight, stored["transformer.word_embeddings.weight"])
    assert not torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
PART = (1000).to_bytes(8, "little") + b'{"a": {"dtype": "F16", "shape": [9], "data_offsets": [0, 18]}}'.ljust(1000)
INDEX = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": POINTER}, "model.safetensors is a Git-LFS pointer.*git lfs pull"),
        ({"pytorch_model.bin": POINTER}, "pytorch_model.bin is a Git-LFS pointer.*git lfs pull"),
        ({"model.safetensors": PART}, "ends after 1,008 bytes.*download it again"),
        ({"model.safetensors": PART[:500]}, "ends after 500 bytes.*download it again"),
        ({"model.safetensors": b""}, "ends after 0 bytes.*download it again"),
        ({"pytorch_model.bin": b"PK\3\4" + bytes(100)}, "ends after 104 bytes.*download it again"),
        ({"model-00001-of-00002.safetensors": PART + bytes(18)}, "1 shards .* no model.safetensors.index.json"),
        ({"pytorch_model-00001-of-00002.bin": b"PK"}, "1 shards .* no pytorch_model.bin.index.json"),
        (
            {"model.safetensors.index.json": INDEX, "model-00001-of-00002.safetensors": PART + bytes(18)},
            "index.json names model-00002-of-00002.safetensors, which is not there",
        ),
        ({"model.safetensors.index.json": POINTER}, "index.json is a Git-LFS pointer"),
    ],
)
def test_weights_that_cannot_be_loaded_are_told_apart_in_one_line(files, message, tmp_path):
    shutil.copy(ROOT / "config.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=message) as error:
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_pointers_beside_the_weights_that_are_loaded_do_not_matter(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(PART + bytes(18))
    (tmp_path / "pytorch_model.bin").write_bytes(POINTER)
    compat.check_weight_files(tmp_path)


def test_a_quantized_folder_loads_with_its_own_configuration_given_as_a_path(golden, tmp_path):
    folder = folder_of(golden, tmp_path, "base2d")
    ChatGLMForConditionalGeneration.from_pretrained(folder).quantize(8).save_pretrained(tmp_path / "int8")
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "int8", config=str(tmp_path / "int8"))
    assert model.config.quantization_bit == 8
    with pytest.raises(ValueError, match="'quantization_bit': 8.*load it as it is"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "int8", config=str(folder))
