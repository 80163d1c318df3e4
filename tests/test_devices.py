"""Models whose parts lie on several devices: maps, offloading to CPU and disk, what chat and quantize() make of it.

Without a GPU the devices are the CPU and the disk; tests/test_devices_gpu.py has the rest.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from chatglm_slim.compat import GrowingStates
from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration
from packaging.version import Version
from rounding import assert_as_near, exact, roundings
from safetensors.torch import load_file
from transformers import AutoTokenizer

import utils

accelerate = pytest.importorskip("accelerate")
TINY = Path(__file__).resolve().parents[1] / "tiny"
FORMATS = {
    "plain": {},
    "INT8": {"bits": 8, "quantize_head": 8},
    "INT4": {"bits": 4, "group_size": 32, "quantize_head": 4},
}
VERSION = Version(transformers.__version__)
ENDS = "disk" if Version("5.23") <= VERSION else "cpu"  # older ones find no tied head in the file that they offload
ON_DISK = {"transformer.word_embeddings": ENDS, "lm_head": ENDS, "transformer.final_layernorm": "cpu"}
ON_DISK.update({f"transformer.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(4)})
IDS = torch.tensor([[5, 95, 1101, 1601, 1604, 7]])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(TINY), trust_remote_code=True)


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, tmp_path_factory):
    """tiny in each format."""
    folder = tmp_path_factory.mktemp("formats")
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY)
    if FORMATS[request.param]:
        model.quantize(**FORMATS[request.param])
    model.save_pretrained(folder)
    return folder


def loaded(folder, device_map=None, offload_folder=None, **options):
    """With and without a map, in evaluation mode."""
    if device_map is not None:
        options.update(device_map=device_map, offload_folder=str(offload_folder))
    return ChatGLMForConditionalGeneration.from_pretrained(folder, **options).eval()


def devices_of(module) -> set:
    return {parameter.device.type for parameter in module.parameters()}


def bytes_of(module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def assert_same_numbers(placed, plain):
    """The same numbers at other addresses, of which the order of sums may depend."""
    with torch.no_grad():
        logits = placed(IDS).logits
        assert_as_near(logits, plain(IDS).logits, exact(plain, IDS).logits, roundings(plain.config))


def test_an_automatic_map_keeps_each_block_whole_and_computes_the_same(folder, tmp_path):
    plain = loaded(folder)
    embedding, block = (bytes_of(part) for part in (plain.transformer.word_embeddings, plain.transformer.layers[0]))
    room = embedding + 2 * block + max(embedding, block)  # accelerate keeps that of the largest part free
    placed = loaded(folder, "auto", tmp_path, max_memory={"cpu": room})
    assert {"cpu", "disk"} == set(placed.hf_device_map.values())
    assert all(len(devices_of(block)) == 1 for block in placed.transformer.layers)
    assert {"cpu", "meta"} == set().union(*(devices_of(block) for block in placed.transformer.layers))
    assert_same_numbers(placed, plain)


def test_infer_auto_device_map_never_splits_a_block():
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY)
    block = bytes_of(model.transformer.layers[0])
    places = accelerate.infer_auto_device_map(
        model,
        max_memory={0: int(2.5 * block), 1: int(1.5 * block), "cpu": 10**9},
        no_split_module_classes=model._no_split_modules,
    )
    assert len(set(places.values())) > 1
    for name in places:
        assert name.count(".") <= 2, f"{name} is a part of a block"


@pytest.mark.parametrize("place", ["map", "disk_offload", "cpu_offload"])
def test_chat_puts_its_prompt_where_the_embedding_executes(tokenizer, tmp_path, place):
    if place == "map" and ENDS == "cpu":
        pytest.skip("the embedding is not on disk")
    options = {"history": [], "do_sample": False, "max_new_tokens": 8}
    expected = loaded(TINY).chat(tokenizer, "你好", **options)
    model = loaded(TINY, *([ON_DISK, tmp_path] if place == "map" else []))
    if place == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    elif place == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer.word_embeddings.weight.device.type == "meta"
    assert model.chat(tokenizer, "你好", **options) == expected
    assert list(model.stream_chat(tokenizer, "你好", **options))[-1] == expected


def test_a_stream_knows_the_devices_of_a_model_on_disk(tokenizer, tmp_path):
    """Autocast is a thread's own; the thread of a stream gets that of the device where the model computes."""
    model, seen = loaded(TINY, ON_DISK, tmp_path), []
    model.transformer.final_layernorm.register_forward_hook(
        lambda *call: seen.append(torch.is_autocast_enabled("cpu"))
    )
    with torch.autocast("cpu", torch.bfloat16):
        list(model.stream_chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=2))
    assert seen and all(seen)


def test_a_model_partly_on_disk_refuses_other_layers_before_anything_changes(folder, tmp_path):
    model = loaded(folder, ON_DISK, tmp_path)
    before, config = [type(module) for module in model.modules()], model.config.to_dict()
    for change in (
        [model.dequantize] if model.config.quantization_bit else [lambda: model.quantize(8), model.dequantize]
    ):
        with pytest.raises(ValueError, match="weights are offloaded or split .* for one; load the model as a whole"):
            change()
        assert [type(module) for module in model.modules()] == before and model.config.to_dict() == config
    assert_same_numbers(model, loaded(folder))


@pytest.mark.skipif(Version("5.0.0") > VERSION, reason="transformers does not save all offloaded weights")
def test_a_model_partly_on_disk_is_saved_whole(folder, tmp_path):
    loaded(folder, ON_DISK, tmp_path / "offload").save_pretrained(tmp_path / "saved")
    saved, stored = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", folder))
    assert saved.keys() == stored.keys() and all(torch.equal(saved[name], stored[name]) for name in stored)


@torch.no_grad()
def test_a_prefix_reaches_blocks_on_disk(tmp_path):
    torch.manual_seed(0)
    config = ChatGLMForConditionalGeneration.from_pretrained(TINY).config
    config.pre_seq_len = 3
    ChatGLMForConditionalGeneration(config).save_pretrained(tmp_path / "prefix")
    plain = loaded(tmp_path / "prefix")
    assert_same_numbers(loaded(tmp_path / "prefix", ON_DISK | {"transformer.prefix_encoder": "disk"}, tmp_path), plain)


def test_a_trained_prefix_of_another_device_is_put_before_the_keys():
    """As for a block on another GPU than the prefix, while gradients are kept: the meta device stands for that GPU."""
    prefix, keys = torch.ones(1, 4, 3, 8, requires_grad=True), torch.ones(1, 4, 2, 8, device="meta")
    states = GrowingStates().append(prefix, keys)
    assert states.device.type == "meta" and states.shape == (1, 4, 5, 8) and states.requires_grad


def test_the_official_map_spreads_the_blocks_evenly_and_in_order():
    for gpus, layers in ((1, 28), (2, 28), (3, 28), (4, 28), (8, 28), (3, 5)):
        places = utils.auto_configure_device_map(gpus, layers)
        blocks = [places[f"transformer.layers.{layer}"] for layer in range(layers)]
        counts = [2 * (gpu == 0) + blocks.count(gpu) for gpu in range(gpus)]
        assert blocks == sorted(blocks) and max(counts) - min(counts) <= 1
        assert {
            places[name] for name in ("transformer.word_embeddings", "transformer.final_layernorm", "lm_head")
        } == {0}
    assert utils.auto_configure_device_map(2, prefix=True)["transformer.prefix_encoder"] == 0
    with pytest.raises(ValueError, match="num_gpus = 0"):
        utils.auto_configure_device_map(0)


def test_the_official_map_names_every_module_with_weights():
    for changes in ({}, {"pre_seq_len": 3}):
        config = ChatGLMForConditionalGeneration.config_class.from_dict(
            json.loads((TINY / "config.json").read_text()) | changes
        )
        model = ChatGLMForConditionalGeneration(config)
        places = utils.auto_configure_device_map(2, config.num_layers, bool(changes))
        assert all(name.startswith(tuple(places)) for name, _ in model.named_parameters())
        assert all(model.get_submodule(name) for name in places)


def test_load_model_on_gpus_takes_a_map_and_names_what_is_missing(tokenizer, tmp_path, monkeypatch):
    model = utils.load_model_on_gpus(str(TINY), device_map=ON_DISK, offload_folder=str(tmp_path)).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=8)[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="num_gpus = 2: PyTorch sees 1 GPUs here.*device_map"):
        utils.load_model_on_gpus(str(TINY), num_gpus=2)
