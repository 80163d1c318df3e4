"""LoRA on INT8 and INT4 layers: right numbers, merges that are exact or say what they cost, refusals by name."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from finetune.adapters import TARGETS, QuantizedLora, add_lora, know_quantized_layers, load_lora


@pytest.fixture
def inputs(tokenizer):
    return tokenizer(["你好", "介绍一下清华大学"], padding=True, return_tensors="pt")


def adapted(model, **options):
    torch.manual_seed(0)
    return add_lora(model, init_lora_weights=False, **options).eval()


def twin(model):
    """The same numbers in plain layers."""
    return copy.deepcopy(model).dequantize()


def difference(one, other, inputs) -> float:
    with torch.no_grad():
        return float((one(**inputs).logits - other(**inputs).logits).abs().max())


@pytest.mark.parametrize("bits", [8, 4])
def test_lora_on_integers_gives_outputs_and_gradients_of_lora_on_the_dequantized_twin(load, inputs, bits):
    model = load(bits)
    plain = adapted(twin(model))
    model = adapted(model)
    assert sum(isinstance(module, QuantizedLora) for module in model.modules()) == 4 * len(TARGETS)
    assert difference(model, plain, inputs) < 1e-3 < 1 < difference(model, load(bits), inputs)
    for one in (model, plain):
        one(**inputs).logits.square().mean().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in gradients)
        if name in gradients:
            assert torch.allclose(
                parameter.grad, gradients[name], rtol=1e-3, atol=1e-6 + gradients[name].abs().max() * 1e-4
            )


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_into_a_plain_model_is_exact(load, inputs, safe):
    model = adapted(load())
    with torch.no_grad():
        before = model(**inputs).logits
    assert torch.allclose(model.merge_and_unload(safe_merge=safe)(**inputs).logits, before, atol=1e-3)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 32}], ids=str)
def test_a_merge_into_integers_is_the_rounded_sum_and_says_so(load, inputs, caplog, safe, options):
    model = adapted(load().quantize(**options))
    layer = model.base_model.model.transformer.layers[1].mlp.dense_h_to_4h
    wanted = twin(load().quantize(**options)).transformer.layers[1].mlp.dense_h_to_4h.weight
    wanted = wanted + layer.get_delta_weight("default")
    merged = model.merge_and_unload(safe_merge=safe)
    layer = merged.transformer.layers[1].mlp.dense_h_to_4h
    assert type(layer).__name__ == "QuantizedLinear" and layer.weight.dtype == torch.int8
    scale = (
        layer.weight_scale.repeat_interleave(layer.group_size, dim=1)
        if layer.group_size
        else layer.weight_scale[:, None]
    )
    error = (merged.dequantize().transformer.layers[1].mlp.dense_h_to_4h.weight - wanted).abs()
    assert (error <= scale * 0.51).all()  # half a step, and the scale's own rounding to float16
    assert "rounding moved the weight by" in caplog.text


def test_a_merge_into_integers_can_be_undone_exactly(load, inputs):
    model = adapted(load(8))
    with torch.no_grad():
        before = model(**inputs).logits
        model.merge_adapter()
        assert not torch.equal(model(**inputs).logits, before)
        with model.disable_adapter():
            assert difference(model, load(8), inputs) < 1e-4
        model.unmerge_adapter()
        assert torch.equal(model(**inputs).logits, before)


def test_broken_numbers_are_never_merged(load):
    model = adapted(load(8))
    layer = model.base_model.model.transformer.layers[0].attention.dense
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    values = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, values) and not layer.merged


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str
)
def test_kinds_of_lora_that_read_the_weight_are_refused_on_integers(load, bits, options):
    with pytest.raises(ValueError, match=f"on an INT{bits} layer.*plain LoRA, or a 16-bit base"):
        add_lora(load(bits), **options)


@pytest.mark.parametrize("kind", [peft.IA3Config, peft.OFTConfig, peft.LoHaConfig, peft.VeraConfig, peft.LoraConfig])
def test_peft_refuses_what_was_not_told_of_integers(load, kind):
    options = {"feedforward_modules": []} if kind is peft.IA3Config else {}
    with pytest.raises((ValueError, TypeError), match="QuantizedLinear|No layers types compatible"):
        peft.get_peft_model(load(8), kind(target_modules=["query_key_value"], **options))


@pytest.mark.parametrize("bits", [0, 8])
def test_a_saved_adapter_loads_again(load, inputs, tmp_path, bits):
    model = adapted(load(bits))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2**20
    assert difference(load_lora(load(bits), tmp_path).eval(), model, inputs) == 0


def test_other_adapters_of_peft_serve_on_a_plain_model(load, inputs):
    config = know_quantized_layers(peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]), load())
    model = peft.get_peft_model(load(), config).eval()
    assert difference(model, load(), inputs) < 1e-4
