"""PyTorch's own INT8 and INT4 products where the engine is missing: right within bfloat16, and INT4's copy of the
weight beside it, which nobody else gets to see."""

from __future__ import annotations

import copy

import pytest
import torch
from chatglm_slim import kernel_routes
from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm_slim.quantization import QuantizedLinear, dequantize_weight
from rounding import exact

IDS = torch.tensor([[5, 9, 700, 33, 12, 1101, 1104, 40, 41, 42]])
needs_int4 = pytest.mark.skipif(not kernel_routes.has_int4_product(), reason="this torch has no INT4 product for CPUs")


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    monkeypatch.setattr(kernel_routes, "engine", lambda: None)
    monkeypatch.setattr(kernel_routes, "SMALLEST", 0)


def make_layer(rows, columns, bits=4, group_size=0, bias=True, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(torch.nn.Linear(columns, rows, bias=bias).to(dtype), bits, group_size)


def assert_within_bfloat16(layer, x, y):
    weight = dequantize_weight(layer.weight, layer.weight_scale, layer.bits, torch.float64)
    size = x.double().abs() @ weight.abs().T + layer.bias.double().abs()
    error = (y.double() - (x.double() @ weight.T + layer.bias.double())).abs()
    # Each of x, the product's sum, and the result (or the scale of a group, or the unpacked weight) is rounded once to
    # bfloat16, whose unit is 2**-8, by half of it; one more for the sum in float32.
    assert (error <= (4 * 2.0**-9) * size).all()


@needs_int4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(192, 512, 0), (100, 96, 0), (4, 384, 32), (192, 384, 128)]
)
@torch.no_grad()
def test_int4_products_equal_float64_within_bfloat16(dtype, rows, columns, group_size):
    layer = make_layer(rows, columns, 4, group_size, dtype=dtype)
    for rows_of_x in (1, 5, 40, kernel_routes.TORCH_ROWS + 1):
        x = torch.randn(1, rows_of_x, columns).to(dtype)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (1, rows_of_x, rows)
        assert_within_bfloat16(layer, x, y)
    assert layer.copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_int8_products_equal_float64_within_bfloat16(dtype):
    for layer in (make_layer(64, 256, 8, dtype=dtype), make_layer(64, 256, 8, 32, dtype=dtype)):
        for rows_of_x in (1, 16, kernel_routes.TORCH_ROWS + 1):
            x = torch.randn(rows_of_x, 256).to(dtype)
            assert_within_bfloat16(layer, x, layer(x))


@pytest.mark.parametrize("offset", [1, 8, 16])
@torch.no_grad()
def test_weights_of_a_mapped_file_need_not_be_aligned(offset):
    """PyTorch's INT8 product reads 16 bytes at once, and crashes where they are not aligned."""
    layer = make_layer(384, 128, 8)
    memory = torch.empty(layer.weight.numel() + 128, dtype=torch.int8)
    start = -memory.data_ptr() % 64 + offset
    layer.weight.data = memory[start : start + layer.weight.numel()].view(384, 128).copy_(layer.weight)
    for rows in (1, 2, 7, 16):
        x = torch.randn(rows, 128).bfloat16()
        assert_within_bfloat16(layer, x, layer(x))


@needs_int4
@torch.no_grad()
def test_the_copy_is_not_counted_saved_copied_or_moved():
    layer, x = make_layer(128, 256), torch.randn(3, 256).bfloat16()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    count = sum(parameter.numel() for parameter in layer.parameters())
    y = layer(x)
    assert layer.copies["copy"][1][0].nbytes == layer.weight.nbytes
    assert count == sum(parameter.numel() for parameter in layer.parameters())
    assert {name: tensor.shape for name, tensor in layer.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert layer.copies  # state_dict() changes nothing
    twin = copy.deepcopy(layer)
    assert not twin.copies and layer.copies and torch.equal(twin(x), y)
    layer.float()
    assert not layer.copies
    layer.bfloat16()(x)
    assert layer.copies


@needs_int4
@torch.no_grad()
def test_pickles_hold_the_official_format(tmp_path):
    layer, x = make_layer(128, 256), torch.randn(3, 256).bfloat16()
    y = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert not loaded.copies and torch.equal(loaded.weight, layer.weight) and torch.equal(loaded(x), y)


def load(layer, other):
    layer.load_state_dict(other.state_dict())


def assign(layer, other):
    layer.load_state_dict(other.state_dict(), assign=True)


def write(layer, other):
    layer.weight.copy_(other.weight)
    layer.weight_scale.copy_(other.weight_scale)


def swap_data(layer, other):
    layer.weight.data, layer.weight_scale.data = other.weight.data, other.weight_scale.data


def replace(layer, other):
    layer.weight, layer.weight_scale = other.weight, other.weight_scale


@needs_int4
@pytest.mark.parametrize("change", [load, assign, write, swap_data, replace])
@pytest.mark.parametrize("group_size", [0, 32])
@torch.no_grad()
def test_another_weight_or_scale_gets_another_copy(change, group_size):
    layer, other, x = *(make_layer(128, 256, 4, group_size) for _ in range(2)), torch.randn(3, 256).bfloat16()
    layer(x)
    other.weight.neg_()
    other.weight_scale.mul_(2)
    expected = other(x)
    change(layer, other)
    assert torch.equal(layer(x), expected)


@needs_int4
@torch.no_grad()
def test_memory_that_is_given_to_another_weight_is_not_taken_for_the_old_one():
    """Allocators hand out the same address again; the copy holds what it was made of, so that they cannot."""
    layer, x = make_layer(128, 256), torch.randn(3, 256).bfloat16()
    for value in range(4):
        layer(x)
        layer.weight.data = torch.zeros(0, dtype=torch.int8)
        layer.weight.data = torch.full((128, 128), value, dtype=torch.int8)
        assert_within_bfloat16(layer, x, layer(x))


@needs_int4
def test_training_drops_the_copy_and_has_the_right_gradient():
    layer, x = make_layer(128, 256), torch.randn(3, 256).bfloat16()
    with torch.no_grad():
        layer(x)
    assert layer.copies
    x.requires_grad_()
    y = layer(x)
    assert not layer.copies
    with torch.no_grad():
        layer(x.detach())  # a copy between forward and backward changes nothing
    direction = torch.randn(3, 128).bfloat16()
    y.backward(direction)
    weight = dequantize_weight(layer.weight, layer.weight_scale, 4, torch.float64)
    expected, size = direction.double() @ weight, direction.double().abs() @ weight.abs()
    # The weight and the result are rounded to bfloat16, by half of 2**-8; 128 products are summed in float32.
    assert ((x.grad.double() - expected).abs() <= 2.0**-9 * expected.abs() + (2.0**-9 + 128 * 2.0**-24) * size).all()


@torch.no_grad()
def test_what_has_no_copy_takes_the_plain_way(monkeypatch):
    x = torch.randn(2, 256).bfloat16()
    hooked = make_layer(64, 256)
    hooked.forward = hooked.forward  # as accelerate's hooks do, which bring another weight at each call
    with torch.inference_mode():  # PyTorch counts no writes to such tensors
        untracked = make_layer(64, 256)
    narrow = make_layer(64, 24)
    for layer in (hooked, untracked, narrow):
        layer(x[:, : layer.in_features])
        assert not layer.copies
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = make_layer(64, 256)
        layer(x)
        assert not layer.copies


@torch.no_grad()
def test_a_product_of_torch_that_fails_or_is_wrong_is_said_once_and_not_used(monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("no such instruction")

    real = torch._weight_int4pack_mm_for_cpu if kernel_routes.has_int4_product() else fail
    for function in (fail, lambda *arguments: -real(*arguments)):
        if real is fail and function is not fail:
            continue
        caplog.clear()
        kernel_routes.has_int4_product.cache_clear()
        kernel_routes.warn_once.cache_clear()
        monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", function, raising=False)
        layer, x = make_layer(64, 128), torch.randn(2, 128).bfloat16()
        for _ in range(2):
            assert_within_bfloat16(layer, x, layer(x))
        assert not layer.copies and sum("INT4 product does not serve" in text for text in caplog.messages) == 1
        monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", real, raising=False)
    kernel_routes.has_int4_product.cache_clear()


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_one_line_says_what_is_missing_and_how_to_get_it(monkeypatch, caplog, bits):
    monkeypatch.setattr(kernel_routes.platform, "machine", lambda: "x86_64")
    kernel_routes.warn_once.cache_clear()
    layer = make_layer(64, 128, bits)
    for _ in range(3):
        layer(torch.randn(2, 128).bfloat16())
    lines = [text for text in caplog.messages if "chatglm_cpu" in text]
    assert len(lines) == 1 and f"INT{bits}" in lines[0] and "pip install" in lines[0]


@pytest.mark.parametrize("quantize_head", [False, 4])
@torch.no_grad()
def test_a_whole_model_answers_the_same_and_stays_what_it_is(tmp_path, quantize_head):
    sizes = {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 256}
    config = ChatGLMConfig(vocab_size=1472, bos_token_id=1104, eos_token_id=1105, **sizes)
    torch.manual_seed(1)
    model = ChatGLMForConditionalGeneration(config).eval()
    for name, parameter in model.transformer.layers.named_parameters():  # no term may be lost in the others
        if "layernorm" not in name:
            parameter.normal_(0, 0.2)
    model.quantize(4, quantize_head=quantize_head)
    official = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = model.num_parameters()
    packed = model(IDS).logits
    if kernel_routes.has_int4_product():
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert all(layer.copies for layer in layers) and len(layers) == 8 + bool(quantize_head)
    assert model.num_parameters() == size
    model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, official[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(IDS).logits, packed)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.forward = layer.forward  # never packed
    # PyTorch's products round to bfloat16, nothing else does: no further off than where everything is rounded to it.
    truth, rounded = exact(model, IDS).logits, copy.deepcopy(model).bfloat16()(IDS).logits
    assert (packed - truth).norm() <= (rounded - truth).norm()
