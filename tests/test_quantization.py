"""The official format bit for bit, the layers, and whole quantized models."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from chatglm_slim import kernel_routes
from chatglm_slim.configuration_chatglm import ChatGLMConfig
from chatglm_slim.kernel_routes import unpack_int4
from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_slim.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_weight,
    linear_layers,
    pack_int4,
    quantize_weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_as_near, exact, roundings
from safetensors.torch import load_file, save_file
from torch.nn import Linear

MATRICES = ["edge_9x8", "float_16x32", "half_5x6", "half_64x96", "half_8x16"]


@pytest.fixture(scope="module")
def figures(golden):
    return load_file(golden / "quantization.safetensors")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", MATRICES)
def test_values_scales_and_products_equal_the_original_bit_for_bit(figures, name, bits):
    golden = {key.split(".", 2)[-1]: value for key, value in figures.items() if key.startswith(f"{name}.int{bits}.")}
    weight, scale = quantize_weight(figures[f"{name}.w"], bits)
    assert torch.equal(scale, golden["scale"]) and torch.equal(weight, golden["weight"])
    values = unpack_int4(weight) if bits == 4 else weight
    assert torch.equal(values, golden["values"])
    assert torch.equal(dequantize_weight(weight, scale, bits, torch.float16), golden["dequant_half"])
    assert torch.equal(dequantize_weight(weight, scale.float(), bits, torch.float32), golden["dequant_float"])
    x, exact_weight = figures[f"{name}.x"].double(), golden["dequant_half"].double()
    y = torch.nn.functional.linear(x.float(), exact_weight.float())
    error = (y - golden["y_float_from_dequant_half"]).abs()
    rounding = 2 * x.shape[1] * 2.0**-24 * (x.abs() @ exact_weight.abs().T)  # of a sum in any order, on both sides
    assert torch.equal(y.isnan(), golden["y_float_from_dequant_half"].isnan())
    assert (error[~y.isnan()] <= rounding[~y.isnan()]).all()


def test_every_byte_unpacks_as_in_the_original_and_packs_back(figures):
    packed = figures["nibble_table.packed"]
    assert torch.equal(unpack_int4(packed), figures["nibble_table.unpacked"])
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_packing_round_trips(rows, columns, seed):
    values = torch.randint(-8, 8, (rows, 2 * columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(values)), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits, group_size", [(8, 0), (4, 0), (4, 32), (8, 64)])
def test_error_stays_within_half_a_step(dtype, bits, group_size):
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantized, scale = quantize_weight(weight, bits, group_size)
    back = dequantize_weight(quantized, scale.float(), bits, torch.float32)
    step = scale.float().reshape(24, -1, 1).expand(-1, -1, group_size or 128).reshape(24, 128)
    # The original rounds the quotient in the weight's dtype first: a float16 quotient below 128 is up to 1/32 off.
    # A bfloat16 scale is up to 1/256 off, which the largest values (127 or 7 steps) feel.
    slack = {torch.float32: 0.07, torch.float16: 0.1, torch.bfloat16: 127 / 256}[dtype]
    assert ((back - weight.float()).abs() <= step * (0.5 + slack)).all()


def test_zero_rows_give_zeros():
    weight = torch.randn(4, 32).half()
    weight[2] = 0
    for bits in (4, 8):
        back = dequantize_weight(*quantize_weight(weight, bits), bits, torch.float16)
        assert torch.equal(back[2], torch.zeros(32).half()) and torch.isfinite(back).all()


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_is_unpacked_in_parts_gives_the_product_of_the_whole(monkeypatch, bits, group_size):
    monkeypatch.setattr(kernel_routes, "ROWS_AT_ONCE", 8)
    rows = 3 * kernel_routes.ROWS_AT_ONCE - 5
    weight = torch.arange(rows * 64 * bits // 8).mul(37).to(torch.int8).view(rows, -1)
    scale = 2.0 ** torch.arange(-rows, 0).float()  # whole numbers times powers of two: no order of sums rounds
    scale = scale[:, None].expand(-1, 64 // group_size).contiguous() if group_size else scale
    x, bias = torch.arange(-96, 96).float().view(3, 64), 2.0 ** torch.arange(-rows, 0).float()
    whole = torch.nn.functional.linear(x, dequantize_weight(weight, scale, bits, torch.float32), bias)
    assert torch.equal(kernel_routes.product_of_unpacked(x, weight, scale, bits, bias), whole)
    assert torch.equal(kernel_routes.product_of_unpacked(x, weight, scale, bits, None), whole - bias)


def test_groups_and_searched_scales_lower_the_error():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))

    def error(**options):
        quantized, scale = quantize_weight(weight, 4, **options)
        return (dequantize_weight(quantized, scale.float(), 4, torch.float32) - weight).square().mean().item()

    assert error(group_size=32) < error(group_size=128) < error()
    assert error(search=True) < error() and error(group_size=32, search=True) < error(group_size=32)


def test_odd_widths_and_groups_are_refused_by_name():
    with pytest.raises(ValueError, match="in_features = 7 is not a multiple of 2,.* INT4"):
        quantize_weight(torch.zeros(2, 7), 4)
    with pytest.raises(ValueError, match="in_features = 48 is not a multiple of 32,.*group_size"):
        quantize_weight(torch.zeros(2, 48), 4, 32)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_golden_checkpoint_gives_the_golden_logits_and_answer(golden, tmp_path, bits):
    folder = golden / "model" / f"quant{bits}"
    case = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    shutil.copy(folder / "config.json", tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})  # which transformers 4 asks for
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert model.dtype == torch.float16  # the checkpoint's own
    assert model.transformer.layers[0].mlp.dense_h_to_4h.weight.dtype == torch.int8
    ids = torch.tensor(case["input_ids"])
    logits = load_file(folder / "tensors.safetensors")["logits_float_from_dequant_half"]
    model = model.float()
    with torch.no_grad():
        # There the weights of the four products of a layer are rounded to float16, here they are not.
        of_weights = 4 * model.config.num_layers
        assert_as_near(logits.half(), model(ids).logits.half(), exact(model, ids).logits, of_weights)
        for parent, name, layer in list(linear_layers(model.transformer.layers, QuantizedLinear)):
            rounded = Linear(layer.in_features, layer.out_features)
            scale = layer.weight_scale.half()
            rounded.weight.copy_(dequantize_weight(layer.weight, scale, bits, torch.float16).float())
            rounded.bias.copy_(layer.bias)
            setattr(parent, name, rounded)
        assert_as_near(model(ids).logits, logits, exact(model, ids).logits, roundings(model.config))
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=19)
    assert output.tolist() == case["greedy"]


@pytest.fixture
def config():
    return ChatGLMConfig(
        vocab_size=1472,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        inner_hidden_size=128,
        bos_token_id=1104,
        eos_token_id=1105,
    )


IDS = torch.tensor([[5, 95, 209, 1101, 1104, 44, 616]])


FORMATS = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "group_size": 32},
    {"bits": 4, "quantize_head": True},
    {"bits": 8, "quantize_head": 4, "group_size": 64},
]


@pytest.mark.parametrize("options", FORMATS)
def test_saved_quantized_models_load_as_they_were(config, tmp_path, options):
    torch.manual_seed(3)
    model = ChatGLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        full = model(IDS).logits
        assert model.quantize(**options) is model
        expected = model(IDS).logits
        assert 0 < (expected - full).abs().max() < 1
        model.save_pretrained(tmp_path, safe_serialization=True)
        loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(IDS).logits, expected)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["transformer.layers.0.mlp.dense_h_to_4h.weight"].dtype == torch.int8
    if options.get("quantize_head"):
        assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
        assert loaded.lm_head.weight_scale is loaded.transformer.word_embeddings.weight_scale
        assert saved["transformer.word_embeddings.weight"].dtype == torch.int8


@pytest.mark.parametrize("bits", [8, 4])
def test_a_format_that_the_checkpoint_does_not_have_is_refused_with_the_cure(config, tmp_path, bits):
    load = ChatGLMForConditionalGeneration.from_pretrained
    model = ChatGLMForConditionalGeneration(config).half()
    model.save_pretrained(tmp_path / "16")
    match = rf"'quantization_bit': 0, .* was to be loaded with .*'quantization_bit': {bits}, .*call model.quantize"
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "16", quantization_bit=bits)
    asked = ChatGLMConfig.from_pretrained(tmp_path / "16", quantization_bit=bits)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "16", config=asked)
    model.quantize(bits).save_pretrained(tmp_path / "int")
    for other in ({"quantization_bit": 0}, {"quantization_bit": 12 - bits}, {"quantize_head": True}):
        with pytest.raises(ValueError, match=f"holds weights with .*_bit': {bits}, .*: load it as it is$"):
            load(tmp_path / "int", **other)
    asked = ChatGLMConfig.from_pretrained(tmp_path / "int")
    assert load(tmp_path / "int", quantization_bit=bits) is not None
    (tmp_path / "int" / "config.json").unlink()
    assert load(tmp_path / "int", config=asked).config.quantization_bit == bits


def test_quantize_is_idempotent_and_refuses_a_second_format(config):
    plain = copy.deepcopy(config)
    model = ChatGLMForConditionalGeneration(config)
    assert model.quantize(0) is model and not list(layers_of(model, QuantizedLinear))
    assert model.quantize(8) is model
    layers = list(layers_of(model, QuantizedLinear))
    assert len(layers) == 8 and model.config.quantization_bit == 8
    assert model.quantize(8) is model and list(layers_of(model, QuantizedLinear)) == layers
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize(4)
    with pytest.raises(ValueError, match="quantization_bit = 5: use one of"):
        ChatGLMForConditionalGeneration(plain).quantize(5)


@pytest.mark.parametrize("bits", ["4", 4.0, True, None, 5])
def test_other_bits_are_named_as_they_came(config, bits):
    with pytest.raises(ValueError, match=re.escape(f"quantization_bit = {bits!r}: use one of")):
        ChatGLMForConditionalGeneration(config).quantize(bits)


@pytest.mark.parametrize("options", [{"quantize_head": 1}, {"quantize_head": 8.0}, {"group_size": False}], ids=str)
def test_what_only_compares_equal_to_a_choice_is_refused_before_anything_changes(config, options):
    """Such a model would be half quantized, or saved with a configuration that does not load."""
    model = ChatGLMForConditionalGeneration(config)
    with pytest.raises(ValueError, match=re.escape(repr(*options.values()))):
        model.quantize(8, **options)
    assert model.config.quantization_bit == 0 and not list(layers_of(model, QuantizedLinear))


def test_arguments_of_the_official_quantize_are_taken_and_those_without_effect_named(config, caplog):
    kernel_routes.warn_once.cache_clear()
    model = ChatGLMForConditionalGeneration(config).quantize(
        bits=4, empty_init=True, kernel_file="x.so", use_quantization_cache=False, quantize_embeddings=True
    )
    assert (
        sum("empty_init, kernel_file and use_quantization_cache have no effect" in text for text in caplog.messages)
        == 1
    )
    assert model.config.head_bits == 4 and isinstance(model.lm_head, QuantizedLinear) and model.lm_head.bits == 4
    with pytest.raises(TypeError, match="'bit'"):
        ChatGLMForConditionalGeneration(copy.deepcopy(plain_of(config))).quantize(4, bit=3)


def plain_of(config):
    config.quantization_bit, config.quantize_head = 0, False
    return config


def test_an_offloaded_weight_is_named_before_anything_changes(config):
    model = ChatGLMForConditionalGeneration(config)
    layer = model.transformer.layers[1].mlp.dense_h_to_4h
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"quantize\(8\): 1 weights are offloaded.*layers.1.mlp.dense_h_to_4h.weight"):
        model.quantize(8)
    assert [type(module) for module in model.modules()] == before and model.config.quantization_bit == 0


@pytest.mark.parametrize("options", FORMATS)
@torch.no_grad()
def test_dequantize_gives_plain_layers_with_the_same_numbers_back(config, tmp_path, options):
    torch.manual_seed(3)
    model = ChatGLMForConditionalGeneration(config).eval().quantize(**options)
    expected, stored = model(IDS).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.dequantize() is model and not list(layers_of(model, (QuantizedLinear, QuantizedEmbedding)))
    assert type(model.transformer.layers[0].mlp.dense_h_to_4h) is Linear is type(model.lm_head)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert_as_near(model(IDS).logits, expected, exact(model, IDS).logits, roundings(config))
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point())
    model.save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.quantization_bit == 0 and torch.equal(again(IDS).logits, model(IDS).logits)
    model.quantize(**options)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_dequantize_takes_a_type_and_leaves_plain_models_as_they_are(config):
    model = ChatGLMForConditionalGeneration(config)
    weight = model.lm_head.weight
    assert model.dequantize().lm_head.weight is weight
    assert (
        model.half().quantize(8).dequantize(torch.float32).transformer.layers[0].mlp.dense_h_to_4h.weight.dtype
        == torch.float32
    )


def test_one_configuration_serves_two_models_that_are_quantized_differently(config):
    first, second = ChatGLMForConditionalGeneration(config), ChatGLMForConditionalGeneration(config)
    first.quantize(4)
    second.quantize(8)
    assert (first.config.quantization_bit, second.config.quantization_bit) == (4, 8)
    assert second.transformer.config.quantization_bit == 8 and config.quantization_bit == 0


def test_plain_layers_are_those_of_torch_so_that_other_quantizers_find_them(config):
    model = ChatGLMForConditionalGeneration(config)
    assert {type(layer) for layer in layers_of(model, Linear)} == {Linear}


def test_activations_are_quantized_on_request_only_and_the_switch_is_saved(config, tmp_path, no_kernels):
    config.hidden_size, config.inner_hidden_size = 128, 256
    model = ChatGLMForConditionalGeneration(config).eval()
    asked = []

    def asked_for(x, weight, scale, bits, bias=None, int8_activations=False):
        asked.append(int8_activations)

    no_kernels.linear = asked_for

    def wishes(model):
        asked.clear()
        with torch.no_grad():
            model(IDS)
        return set(asked[:-1]), asked[-1]  # of the blocks, of the head

    with pytest.raises(ValueError, match="quantize_activations = 'yes': use one of"):
        model.quantize(8, quantize_activations="yes")
    with pytest.raises(ValueError, match="quantize_activations = 0: use one of"):
        model.quantize(8, quantize_activations=0)
    model.quantize(8, quantize_head=True)
    assert wishes(model) == ({False}, False)
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize(4, quantize_activations=True)
    assert not model.config.quantize_activations
    model.quantize(8, quantize_activations=True)
    assert wishes(model) == ({True}, False)
    model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert wishes(loaded) == ({True}, False)
    assert wishes(loaded.quantize(8, quantize_activations=False)) == ({False}, False)


def layers_of(model, kind):
    return (module for module in model.modules() if isinstance(module, kind))


@pytest.mark.parametrize("convert", ["half", "float", "bfloat16"])
def test_conversion_before_and_after_quantization_agree(config, convert):
    torch.manual_seed(4)
    first = ChatGLMForConditionalGeneration(config).eval().half()
    second = ChatGLMForConditionalGeneration(config).eval().half()
    second.load_state_dict(first.state_dict())
    before = getattr(first, convert)().quantize(8)
    after = getattr(second.quantize(8), convert)()
    assert before.dtype == after.dtype
    before, after = before.state_dict(), after.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        is_scale = name.endswith("weight_scale")
        if convert == "half" or tensor.dtype != torch.int8 and not (is_scale and convert == "bfloat16"):
            assert torch.equal(tensor, after[name])
        elif tensor.dtype == torch.int8:  # quotients of 16 bits are rounded elsewhere, by less than one
            assert (tensor.short() - after[name].short()).abs().max() <= 1
            assert (tensor != after[name]).double().mean() < 1
        else:  # the largest weight, the scale, and the scale once more are rounded by half of 2**-8
            assert ((tensor - after[name]).double().abs() <= 4 * 2.0**-9 * after[name].double()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_bias_alone_can_be_trained(dtype, rows):
    for layer in (Linear(128, 128).to(dtype), QuantizedLinear.from_linear(torch.nn.Linear(128, 128), 8)):
        layer.requires_grad_(False).bias.requires_grad_()
        layer(torch.randn(rows, 128).to(layer.bias.dtype)).float().sum().backward()
        assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, rows))


def test_gradients_reach_adapters_through_frozen_weights():
    layer = QuantizedLinear.from_linear(Linear(32, 16), 4)
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).square().sum().backward()
    weight = dequantize_weight(layer.weight, layer.weight_scale, 4, torch.float32)
    y, z = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    for each in (y, z):
        product = torch.nn.functional.linear(each, weight.to(each.dtype), layer.bias.to(each.dtype))
        product.square().sum().backward()
    assert_as_near(x.grad, y.grad, z.grad, 4)  # product, bias, square's derivative, product
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_p_tuning_trains_only_the_prefix_of_a_quantized_model(config, bits):
    config.pre_seq_len = 4
    model = ChatGLMForConditionalGeneration(config).quantize(bits).train()
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"transformer.prefix_encoder.embedding.weight"}


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 8, "quantize_head": True}], ids=str)
def test_a_quantized_model_is_frozen_however_it_was_made(config, tmp_path, options):
    model = ChatGLMForConditionalGeneration(config).quantize(**options)
    model.save_pretrained(tmp_path)
    for one in (model, ChatGLMForConditionalGeneration.from_pretrained(tmp_path)):
        assert not any(parameter.requires_grad for parameter in one.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.requires_grad for parameter in model.dequantize().parameters())


def test_quantized_embedding_returns_its_rows():
    for bits, group_size in ((8, 0), (4, 0), (4, 32)):
        linear = QuantizedLinear.from_linear(Linear(64, 6), bits, group_size)
        quantized = QuantizedEmbedding(6, 64, bits, group_size)
        quantized.weight, quantized.weight_scale = linear.weight, linear.weight_scale
        rows = dequantize_weight(linear.weight, linear.weight_scale, bits, torch.float32)
        assert torch.equal(quantized(torch.tensor([[1, 5]])), rows[[1, 5]][None])


def test_only_the_linear_layers_of_blocks_are_replaced(config):
    model = ChatGLMForConditionalGeneration(config)
    names = {name for _, name, _ in linear_layers(model.transformer.layers)}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    model.quantize(4)
    assert model.lm_head.weight.dtype == model.transformer.word_embeddings.weight.dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 16])
def test_strided_rows_of_a_batch_reach_kernel_and_plain_pytorch_alike(no_kernels, bits):
    """The last position of a padded batch, as prefill gives it to the head, is not contiguous."""
    weight = torch.randn(64, 128).half()
    weight, scale = (weight, None) if bits == 16 else quantize_weight(weight, bits)
    last = torch.randn(3, 5, 128).half()[:, -1:]
    contiguous = []
    no_kernels.linear = lambda x, *rest: contiguous.append(x.is_contiguous())

    def product(x):
        if bits == 8:
            return kernel_routes.product(x, weight, scale, bits)
        layer = Linear(128, 64, bias=False).half()
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return kernel_routes.linear(layer, x)

    y = product(last)
    assert contiguous == [True] and y.shape == (3, 1, 64)
    exact_weight = weight.double() if bits == 16 else weight.double() * scale.double()[:, None]
    expected, size = last.double() @ exact_weight.T, last.double().abs() @ exact_weight.abs().T
    # The unpacked weight and the result are rounded to float16; 128 products are summed in float32.
    assert ((y - expected).abs() <= 2.0**-11 * expected.abs() + (2.0**-11 + 128 * 2.0**-24) * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 32, "quantize_head": 8}, None]
)
@torch.no_grad()
def test_whole_model_through_kernels_equals_plain_pytorch(config, monkeypatch, dtype, options):
    """Prefill and one-token steps; what has no kernel here takes the plain way both times."""
    config.hidden_size, config.inner_hidden_size = 128, 256
    torch.manual_seed(5)
    model = ChatGLMForConditionalGeneration(config).eval().to(dtype)
    if options is not None:
        model.quantize(**options)

    def logits():
        output = model(IDS[:, :-1], use_cache=True)
        step = model(IDS[:, -1:], past_key_values=output.past_key_values)
        return torch.cat((output.logits, step.logits), dim=1)

    through_kernels = logits()
    no_kernels = type("NoKernels", (), {"__getattr__": lambda self, name: lambda *arguments: None})()
    monkeypatch.setattr(kernel_routes, "engine", lambda: no_kernels)
    monkeypatch.setattr(kernel_routes, "TORCH_ROWS", 0)
    plain = logits()
    assert plain.abs().max() > 0.5
    assert_as_near(through_kernels, plain, exact(model, IDS).logits, roundings(config))
