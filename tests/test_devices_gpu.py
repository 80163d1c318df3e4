"""Models over a GPU and the CPU as two devices that both compute, over a GPU with offloading, and on one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration
from rounding import assert_as_near, exact, roundings
from transformers import AutoTokenizer

import utils

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY = Path(__file__).resolve().parents[1] / "tiny"
ENDS = ("transformer.word_embeddings", "transformer.final_layernorm", "lm_head")
FORMATS = {"plain": {}, "INT8": {"bits": 8, "quantize_head": 8}, "INT4": {"bits": 4}}
IDS = torch.tensor([[5, 95, 1101, 1601, 1604, 7]])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(TINY), trust_remote_code=True)


def tiny(**format):
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY).eval()
    return model.quantize(**format) if format else model


def spread(model, ends, blocks):
    """Ends and every other block on one device, the remaining blocks on the other. With the ends on the CPU all
    compute where they are; with the ends on the GPU the others are offloaded, and compute there too."""
    places = dict.fromkeys([*ENDS, *(["transformer.prefix_encoder"] if model.config.pre_seq_len else [])], ends)
    places.update({f"transformer.layers.{layer}": (ends, blocks)[layer % 2] for layer in range(4)})
    return accelerate.dispatch_model(model, places, main_device=ends, force_hooks=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("ends", "blocks"), [(0, "cpu"), ("cpu", 0)])
@torch.no_grad()
def test_blocks_in_turn_on_gpu_and_cpu_compute_what_the_cpu_computes(tokenizer, format, ends, blocks):
    plain, placed = tiny(**FORMATS[format]), spread(tiny(**FORMATS[format]), ends, blocks)
    logits = placed(IDS).logits.cpu()
    assert_as_near(logits, plain(IDS).logits, exact(plain, IDS).logits, roundings(plain.config))
    options = {"history": [], "do_sample": False, "max_new_tokens": 16}
    assert placed.chat(tokenizer, "你好", **options) == plain.chat(tokenizer, "你好", **options)
    assert list(placed.stream_chat(tokenizer, "你好", **options))[-1] == plain.chat(tokenizer, "你好", **options)


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload"])
def test_offloaded_weights_execute_on_the_gpu(tokenizer, tmp_path, place):
    options = {"history": [], "do_sample": False, "max_new_tokens": 16}
    expected, model = tiny().chat(tokenizer, "你好", **options), tiny()
    extra = (str(tmp_path),) if place == "disk_offload" else ()
    getattr(accelerate, place)(model, *extra, execution_device=torch.device(0))
    assert model.chat(tokenizer, "你好", **options) == expected


def test_a_prefix_learns_through_blocks_of_two_devices():
    config = tiny().config
    config.pre_seq_len = 3
    torch.manual_seed(0)
    plain = ChatGLMForConditionalGeneration(config).eval()
    placed = ChatGLMForConditionalGeneration(config).eval()
    placed.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, spread(placed, "cpu", 0)):
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    assert gradients[0].any() and torch.allclose(*gradients, rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max()))


def test_one_gpu_is_a_number_of_gpus_too(tokenizer):
    model = utils.load_model_on_gpus(str(TINY), num_gpus=1).eval()
    assert {(p.dtype, p.device) for p in model.parameters()} == {(torch.float16, torch.device("cuda", 0))}
    assert model.chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=16)[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_the_blocks(tokenizer):
    model = utils.load_model_on_gpus(str(TINY), num_gpus=2).eval()
    assert {p.device.index for p in model.parameters()} == {0, 1}
    assert model.chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=16)[0]
