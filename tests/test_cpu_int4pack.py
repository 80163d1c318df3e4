"""torch's own INT4 product in place of the compiled kernels: packed once, equal within bfloat16, undone when asked."""

import copy

import pytest
import torch
from chatglm_slim import cpu_int4pack, quantization
from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm_slim.quantization import QuantizedLinear, dequantize_weight

pytestmark = pytest.mark.skipif(cpu_int4pack.block_order() is None, reason="this torch has no INT4 product for CPUs")
IDS = torch.tensor([[5, 9, 700, 33, 12, 1101, 1104, 40, 41, 42]])


@pytest.fixture(autouse=True)
def no_llvmlite(monkeypatch):
    monkeypatch.setattr(quantization, "instruction_set", lambda: "")
    monkeypatch.setattr(quantization, "cpu_linear", lambda *arguments: None)


def make_layer(rows, columns, group_size=0, bias=True, dtype=torch.bfloat16):
    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, rows, bias=bias).to(dtype)
    return QuantizedLinear.from_linear(layer, 4, group_size)


@pytest.mark.parametrize("shape", [(64, 16), (128, 32), (192, 480), (4160, 128)], ids=str)
def test_packing_every_byte_round_trips(shape, monkeypatch):
    monkeypatch.setattr(cpu_int4pack, "PACKED_AT_ONCE", 1 << 14)
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    packed = cpu_int4pack.pack(weight, torch.ones(shape[0]))
    assert packed.weight.nbytes == weight.nbytes
    assert torch.equal(cpu_int4pack.unpack(packed), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("columns", "group_size"), [(512, 0), (96, 0), (384, 32), (384, 128)])
@pytest.mark.parametrize("rows_of_x", [1, 5, 40])
@torch.no_grad()
def test_products_equal_float64_within_bfloat16(dtype, columns, group_size, rows_of_x):
    layer = make_layer(192, columns, group_size, dtype=dtype)
    exact = dequantize_weight(layer.weight, layer.weight_scale, 4, torch.float64)
    x = torch.randn(2, rows_of_x, columns).to(dtype)
    y = layer(x)
    assert layer.packed is not None and y.dtype == dtype and y.shape == (2, rows_of_x, 192)
    size = x.double().abs() @ exact.abs().T
    error = (y - (x.double() @ exact.T + layer.bias.double())).abs()
    assert (error <= 2.0**-7 * size).all() and error.mean() < 2.0**-9 * size.mean()


@torch.no_grad()
def test_a_packed_layer_takes_no_more_memory_and_is_saved_moved_copied_and_loaded_in_the_official_format():
    layer = make_layer(128, 256)
    official, x = layer.weight.clone(), torch.randn(3, 256).bfloat16()
    y = layer(x)
    assert layer.weight.numel() == 0 and layer.packed.weight.nbytes == official.nbytes
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(layer.state_dict()["weight"], official) and layer.packed is None
    assert torch.equal(layer(x), y)
    layer.float()
    assert layer.packed is None and torch.equal(layer.weight, official)
    layer.bfloat16()(x)
    other = make_layer(128, 256)
    other.weight.neg_()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_packing_between_forward_and_backward_leaves_autograd_its_weight():
    layer, x = make_layer(128, 256), torch.randn(3, 256).bfloat16().requires_grad_()
    y = layer(x)
    with torch.no_grad():
        layer(x)
    assert layer.packed is not None
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.inference_mode():
        layer.state_dict()
    layer(x).sum().backward()


@torch.no_grad()
def test_what_replaces_the_weight_or_the_scale_counts():
    layer, x = make_layer(128, 256, group_size=32), torch.randn(3, 256).bfloat16()
    y = layer(x)
    layer.weight_scale = torch.nn.Parameter(2 * layer.weight_scale, requires_grad=False)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (y - layer.bias), rtol=0.02, atol=0.02)
    zeros = torch.zeros(128, 128, dtype=torch.int8)
    layer.weight = torch.nn.Parameter(zeros, requires_grad=False)
    torch.testing.assert_close(layer(x), layer.bias.expand(3, -1))
    assert torch.equal(layer.state_dict()["weight"], zeros)
    layer(x)
    layer.forward = layer.forward  # as hooks of accelerate do, which move the weight
    layer(x)
    assert layer.packed is None and torch.equal(layer.weight, zeros)


@torch.no_grad()
def test_pickles_hold_the_official_format(tmp_path):
    layer, x = make_layer(128, 256), torch.randn(3, 256).bfloat16()
    official, y = layer.weight.clone(), layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert loaded.packed is None and torch.equal(loaded.weight, official) and torch.equal(loaded(x), y)


def test_gradients_flow_after_packing():
    layer = make_layer(128, 256)
    x = torch.randn(3, 256).bfloat16()
    with torch.no_grad():
        layer(x)
    dense = dequantize_weight(layer.state_dict()["weight"], layer.weight_scale, 4, torch.bfloat16)
    with torch.no_grad():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_what_cannot_be_packed_takes_the_plain_way(monkeypatch):
    for rows, columns in ((96, 128), (64, 24)):
        layer = make_layer(rows, columns)
        layer(torch.randn(2, columns).bfloat16())
        assert layer.packed is None
    layer = make_layer(64, 128)
    monkeypatch.setattr(quantization, "instruction_set", lambda: "avx2")
    layer(torch.randn(2, 128).bfloat16())
    assert layer.packed is None
    int8 = QuantizedLinear.from_linear(torch.nn.Linear(128, 64), 8)
    monkeypatch.setattr(quantization, "instruction_set", lambda: "")
    int8(torch.randn(2, 128))
    assert int8.packed is None


@torch.no_grad()
def test_an_order_that_gives_wrong_products_is_not_used(monkeypatch):
    real = torch._weight_int4pack_mm_for_cpu
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", lambda *arguments: -real(*arguments))
    cpu_int4pack.block_order.cache_clear()
    layer = make_layer(64, 128)
    layer(torch.randn(2, 128).bfloat16())
    assert layer.packed is None
    cpu_int4pack.block_order.cache_clear()


@pytest.mark.parametrize("quantize_head", [False, 4])
@torch.no_grad()
def test_a_whole_model_answers_the_same_and_is_saved_in_the_official_format(tmp_path, quantize_head):
    sizes = {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 256}
    config = ChatGLMConfig(vocab_size=1472, bos_token_id=1104, eos_token_id=1105, **sizes)
    torch.manual_seed(1)
    model = ChatGLMForConditionalGeneration(config).eval().quantize(4, quantize_head=quantize_head)
    official = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = model(IDS).logits
    layers = [module for module in model.transformer.modules() if isinstance(module, QuantizedLinear)]
    assert all(layer.packed is not None for layer in layers)
    model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, official[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(IDS).logits, packed)
    for layer in layers:
        layer.restore()
        layer.bits, layer.shares_weight = 4, True  # never packed
    torch.testing.assert_close(packed, model(IDS).logits, rtol=0, atol=0.03)
