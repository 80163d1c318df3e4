"""Decode steps as a program of CPU kernels: equal to the plain network, and aware of whatever changes in it."""

from __future__ import annotations

import gc
import threading
import types
import weakref

import pytest
import torch
from chatglm_cpu import instruction_set, move_to_huge_pages, program, runtime
from chatglm_slim import compat, kernel_routes, modeling_chatglm
from chatglm_slim.modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from rounding import ROUNDINGS_OF_THE_HEAD, assert_as_near, exact, roundings

from serving.prompts import Prompts
from serving.slots import Slots

pytestmark = pytest.mark.skipif(
    not instruction_set() or runtime.nap_function() is None,
    reason="needs llvmlite, a CPU with AVX2 and FMA, and usleep",
)
GMASK, SOP, EOP, PAD = 1101, 1104, 1105, 3
IDS = torch.tensor([[5, 9, 700, 33, 12, GMASK, SOP, 40, 41, 42, 43, 44]])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_model(dtype=torch.bfloat16, quantization=None, **changes):
    sizes = {"hidden_size": 128, "num_layers": 3, "num_attention_heads": 4, "inner_hidden_size": 256}
    config = ChatGLMConfig(
        vocab_size=1472, bos_token_id=SOP, eos_token_id=EOP, gmask_token_id=GMASK, pad_token_id=PAD, **sizes, **changes
    )
    torch.manual_seed(3)
    model = ChatGLMForConditionalGeneration(config).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.transformer.layers.named_parameters():  # no term may be lost in the others
            if "layernorm" not in name:
                parameter.normal_(0, 0.2)
    return model.quantize(**quantization) if quantization else model


@pytest.fixture
def served(monkeypatch):
    """For each decode step, whether the program served it."""
    seen, real = [], modeling_chatglm.decode_step

    def counted(*arguments):
        last = real(*arguments)
        seen.append(last is not None)
        return last

    monkeypatch.setattr(modeling_chatglm, "decode_step", counted)
    return seen


def steps(model, ids=IDS, prompt=8, **arguments):
    """Logits of the last prompt token and of each further one, [B, steps, V], and the cache."""
    output = model(ids[:, :prompt], use_cache=True, **arguments)
    logits = [output.logits[:, -1:]]
    for index in range(prompt, ids.shape[1]):
        output = model(ids[:, index, None], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1), output.past_key_values


def plain_steps(monkeypatch, model, *arguments, **named):
    with monkeypatch.context() as patch:
        patch.setattr(modeling_chatglm, "decode_step", lambda *rest: None)
        return steps(model, *arguments, **named)


def assert_equals_plain(monkeypatch, model, ids=IDS, prompt=8):
    """Judged by the whole text at once in float64, whose logits and cache are those of the steps."""
    logits, cache = steps(model, ids, prompt)
    plain, plain_cache = plain_steps(monkeypatch, model, ids, prompt)
    truth, layers = exact(model, ids, use_cache=True), len(model.transformer.layers)
    assert plain.abs().max() > 0.5
    of_logits = roundings(model.config, layers) + ROUNDINGS_OF_THE_HEAD
    assert_as_near(logits, plain, truth.logits[:, prompt - 1 :], of_logits)
    if model.dtype != torch.float32:  # it rounds to 16 bits as often; the largest error is chance, the sum is not
        ours, others = ((x - truth.logits[:, prompt - 1 :]).norm() for x in (logits, plain))
        assert ours <= 1.5 * others
    found = [cache_tensors(each) for each in (cache, plain_cache, truth.past_key_values)]
    assert [len(tensors) for tensors in found] == [2 * layers] * 3
    for number, states in enumerate(zip(*found)):
        assert_as_near(*states, roundings(model.config, number // 2 + 1))


def cache_tensors(cache):
    """Keys and values of the first layer, of the second one ..."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        found = [states for layer in zip(cache.key_cache, cache.value_cache) for states in layer]
    else:
        found = [states for layer in layers for states in (layer.keys, layer.values)]
    return [states for states in found if states is not None]  # a pruned model leaves layers out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "quantization", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 32, "quantize_head": 8}, None], ids=str
)
@torch.no_grad()
def test_decode_steps_equal_the_plain_network(monkeypatch, served, dtype, quantization):
    model = make_model(dtype, quantization)
    assert_equals_plain(monkeypatch, model)
    assert served == [quantization is not None or dtype != torch.float32] * (IDS.shape[1] - 8)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits(served, threads):
    model = make_model(torch.bfloat16, {"bits": 4})
    before = torch.get_num_threads()
    first, _ = steps(model)
    try:
        torch.set_num_threads(threads)
        for _ in range(3):
            again, _ = steps(model)
            assert torch.equal(first, again)
    finally:
        torch.set_num_threads(before)
    assert all(served)


@pytest.mark.parametrize(
    "changes",
    [{"position_encoding_2d": False}, {"pre_seq_len": 5}, {"pre_seq_len": 5, "prefix_projection": True}],
    ids=str,
)
@torch.no_grad()
def test_other_positions_and_a_prefix(monkeypatch, served, changes):
    assert_equals_plain(monkeypatch, make_model(**changes))
    assert all(served)


@pytest.mark.parametrize("batch", [2, 4, 5, 11, 16, 17])
@torch.no_grad()
def test_batches_of_up_to_sixteen_sequences(monkeypatch, served, batch):
    ids = IDS.repeat(batch, 1)
    ids[1:, 1:4] += torch.arange(1, batch)[:, None]
    assert_equals_plain(monkeypatch, make_model(), ids)
    assert served == [batch <= 16] * (IDS.shape[1] - 8)


@pytest.mark.parametrize("changes", [{}, {"pre_seq_len": 3}], ids=str)
@torch.no_grad()
def test_padded_batches(monkeypatch, served, changes):
    ids = torch.cat((torch.cat((torch.full((1, 2), PAD), IDS), 1), torch.cat((IDS[:, :2], IDS), 1)))
    assert_equals_plain(monkeypatch, make_model(**changes), ids, prompt=10)
    assert all(served) and served


@torch.no_grad()
def test_rows_with_ends_of_their_own(served):
    """As a server keeps them: each step is that of the row alone, and what lies behind its end is not read."""
    model, prompts = make_model(torch.float32, {"bits": 8}), [IDS[:, :8], IDS[:, 2:8], IDS[:, 1:8]]
    slots, alone, truth = Slots(), [], exact(make_model(torch.float32, {"bits": 8}), IDS).logits
    for prompt in prompts:
        computed = Prompts(prompt.tolist(), model)
        model(**computed.inputs, use_cache=True)
        slots.join(computed.states[0])
        alone.append(steps(model, torch.cat((prompt, IDS[:, 8:]), 1), prompt.shape[1])[0][0, 1:])
    for layer in slots.layers:
        for buffer in layer:
            for row, length in enumerate(slots.lengths):
                buffer[row, :, length + 1 :] = float("nan")
    served.clear()
    for number, token in enumerate(IDS[0, 8:]):
        positions = torch.tensor([[[p.shape[1] - 3], [number + 3]] for p in prompts])  # [gMASK] <sop> 40
        hidden = slots.begin_step()
        output = model(token.expand(3, 1), position_ids=positions, attention_mask=hidden, past_key_values=slots)
        slots.end_step()
        for row, logits in enumerate(alone):
            rounding = roundings(model.config) * torch.finfo(torch.float32).eps * truth.abs().max()
            assert (output.logits[row, 0] - logits[number]).abs().max() <= rounding
    assert len(served) == 4 and all(served)


@torch.no_grad()
def test_the_cache_grows_past_its_buffers(monkeypatch, served):
    ids = torch.cat((IDS, torch.arange(300)[None] % 1000 + 10), dim=1)
    assert_equals_plain(monkeypatch, make_model(torch.float16), ids, prompt=250)
    assert all(served)


@torch.no_grad()
def test_cropped_reordered_and_rebuilt_caches_are_continued(monkeypatch, served):
    model = make_model(torch.float16)

    def branches():
        _, cache = steps(model, IDS.repeat(2, 1))
        if hasattr(cache, "crop"):
            cache.crop(-3)
        else:
            cache = tuple((k[:, :, :9], v[:, :, :9]) for k, v in zip(cache.key_cache, cache.value_cache))
            cache = compat.as_cache(cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        positions = torch.tensor([[[5], [4]]] * 2)
        return model(torch.tensor([[7], [8]]), past_key_values=cache, position_ids=positions).logits

    ours = branches()
    assert all(served) and len(served) == 5
    monkeypatch.setattr(modeling_chatglm, "decode_step", lambda *rest: None)
    whole = torch.cat((IDS[:, :9].repeat(2, 1), torch.tensor([[7], [8]])), dim=1)  # which has these positions
    assert_as_near(ours, branches(), exact(model, whole).logits[:, -1:], roundings(model.config))


def test_gradients_take_the_plain_way(served):
    model = make_model()
    with torch.no_grad():
        _, cache = steps(model)
    served.clear()
    model(torch.tensor([[7]]), past_key_values=cache).logits.float().sum().backward()
    assert served == [False] and model.transformer.layers[0].mlp.dense_h_to_4h.weight.grad is not None


def replace_weight(model):
    layer = model.transformer.layers[1].mlp.dense_4h_to_h
    layer.weight = torch.nn.Parameter(-layer.weight)


def write_into_weight(model):
    model.transformer.layers[1].attention.dense.weight.mul_(-1)


def move_data(model):
    norm = model.transformer.layers[2].input_layernorm
    norm.weight.data = -norm.weight.data


def add_hook(model):
    model.transformer.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -output)


def replace_forward(model):
    dense = model.transformer.layers[0].attention.dense
    dense.forward = types.MethodType(lambda self, x: -torch.nn.Linear.forward(self, x), dense)


def replace_layer(model):
    block = model.transformer.layers[1].mlp
    block.dense_h_to_4h = torch.nn.Sequential(block.dense_h_to_4h, torch.nn.LeakyReLU(-1.0))


def change_norm(model):
    model.transformer.final_layernorm.weight = torch.nn.Parameter(-model.transformer.final_layernorm.weight)


def replace_norm(model):
    norm = torch.nn.LayerNorm(128).to(model.dtype)
    model.transformer.final_layernorm = norm
    norm.weight.fill_(-1)


def transpose_in_place(model):
    dense = model.transformer.layers[0].attention.dense
    dense.weight.data = dense.weight.data.t()


def change_scale(model):
    model.transformer.layers[0].residual_scale = -1.0


def change_epsilon(model):
    model.transformer.final_layernorm.eps = 100.0


def add_block(model):
    block = modeling_chatglm.GLMBlock(model.config, 3).to(model.dtype)
    block.mlp.dense_h_to_4h.weight.normal_(0, 0.5)
    model.transformer.layers.append(block)


def remove_block(model):
    del model.transformer.layers[1]


class Negated(modeling_chatglm.MLP):
    def forward(self, hidden):
        return -super().forward(hidden)


def change_class(model):
    model.transformer.layers[1].mlp.__class__ = Negated


class Skipped(torch.nn.Module):
    def forward(self, hidden, rotary, visible, past, output_attentions):
        past.extend(*[hidden.new_ones(len(hidden), 4, hidden.shape[1], 32)] * 2, 2)
        return hidden, None


def skip_block(model):
    model.transformer.layers[2] = Skipped()


def drop_bias(model):
    norm = model.transformer.layers[1].input_layernorm = torch.nn.LayerNorm(128, bias=False).to(model.dtype)
    norm.weight.fill_(-1)


def weight_as_plain_tensor(model):
    layer = model.transformer.layers[1].mlp.dense_h_to_4h
    weight = layer.weight.data.clone()
    del layer.weight
    layer.weight = -weight


def bias_as_plain_tensor(model):
    norm = model.transformer.layers[1].input_layernorm
    bias = norm.bias.data.clone()
    del norm.bias
    norm.bias = bias + 3


def quantize(model):
    model.quantize(4)


def change_type(model):
    model.half()


@pytest.mark.parametrize(
    "change",
    [
        *(replace_weight, write_into_weight, move_data, add_hook, replace_forward, replace_layer, change_norm),
        *(replace_norm, transpose_in_place, change_scale, change_epsilon, add_block, remove_block, change_class),
        *(skip_block, drop_bias, quantize, change_type, weight_as_plain_tensor, bias_as_plain_tensor),
    ],
)
@torch.no_grad()
def test_a_change_between_two_steps_is_noticed(monkeypatch, served, change):
    model = make_model()
    before, _ = steps(model)
    change(model)
    assert_equals_plain(monkeypatch, model)
    after, _ = steps(model)
    assert (before - after).abs().max() > (0.2 if change not in (change_type, quantize) else 1e-3)
    assert all(served[:4])


PATCHES = {
    "block": (modeling_chatglm.GLMBlock, "forward"),
    "attention module": (modeling_chatglm.SelfAttention, "forward"),
    "MLP": (modeling_chatglm.MLP, "forward"),
    "linear module": (torch.nn.Linear, "forward"),
    "LayerNorm": (torch.nn.LayerNorm, "forward"),
    "call of a module": (torch.nn.Module, "__call__"),
    "F.linear": (torch.nn.functional, "linear"),
    "F.layer_norm": (torch.nn.functional, "layer_norm"),
    "F.gelu": (torch.nn.functional, "gelu"),
    "F.scaled_dot_product_attention": (torch.nn.functional, "scaled_dot_product_attention"),
    "attention": (modeling_chatglm, "attention"),
    "gelu": (modeling_chatglm, "gelu"),
    "linear": (modeling_chatglm, "linear"),
    "rotate": (modeling_chatglm, "rotate"),
}


@pytest.mark.parametrize("name", PATCHES)
@torch.no_grad()
def test_a_patched_class_or_function_is_called_at_each_step_and_forgotten_when_it_is_undone(monkeypatch, served, name):
    model, (owner, attribute) = make_model(), PATCHES[name]
    before, _ = steps(model)
    calls, real = [], getattr(owner, attribute)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, lambda *arguments, **named: calls.append(1) or real(*arguments, **named))
        _, cache = steps(model)
        called = len(calls)
        output = model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
        assert called > 0 and len(calls) - called >= len(model.transformer.layers), "not called by a step"
        assert output.logits.isfinite().all()
    served.clear()
    again, _ = steps(model)
    assert torch.equal(before, again) and all(served)


@torch.no_grad()
def test_a_function_of_the_attention_interface_is_called_for_prompt_and_steps(monkeypatch, served):
    functions = pytest.importorskip("transformers.modeling_utils")
    functions = getattr(functions, "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        pytest.skip("transformers before 4.48 has no AttentionInterface")
    calls = []

    def halved(module, query, key, value, visible, scaling=None, dropout=0.0, **rest):
        calls.append(query.shape[2])
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
        return context.transpose(1, 2) / 2, None

    model = make_model()
    before, _ = steps(model)
    for name in ("halved", "sdpa"):
        monkeypatch.setitem(functions, name, halved)
        monkeypatch.setattr(model.config, "_attn_implementation", name)
        calls.clear()
        served.clear()
        after, _ = steps(model)
        assert calls == [8] * 3 + [1] * 3 * (IDS.shape[1] - 8) and not any(served)
        assert (before - after).abs().max() > 0.01


@torch.no_grad()
def test_who_counts_or_casts_what_torch_computes_sees_every_step():
    from torch.utils.flop_counter import FlopCounterMode

    model, flops = make_model(), []
    for _ in range(2):
        output = model(IDS[:, :8], use_cache=True)
        with FlopCounterMode(display=False) as counter:
            model(IDS[:, 8:9], past_key_values=output.past_key_values)
        flops.append(counter.get_total_flops())
    products = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    assert flops[0] == flops[1] >= 2 * products


@torch.no_grad()
def test_a_mode_that_casts_takes_the_plain_way(served):
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps(model)
    assert not any(served)


class HalvesProducts(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result / 2 if function is torch.nn.functional.linear else result


@torch.no_grad()
def test_a_mode_that_replaces_functions_is_obeyed_at_each_step(monkeypatch, served):
    model = make_model()
    before, _ = steps(model)
    assert all(served)
    with HalvesProducts():
        served.clear()
        after, _ = steps(model)
        assert not any(served) and (before - after).abs().max() > 0.1
    with torch.device("cpu"):  # a mode too, which is about new tensors
        assert torch.equal(steps(model)[0], before) and any(served)


@pytest.mark.parametrize("quantization", [None, {"bits": 8}, {"bits": 4}], ids=str)
@torch.no_grad()
def test_tangents_and_batched_tensors_go_through_plain_products(quantization):
    mlp = make_model(quantization=quantization).transformer.layers[0].mlp.requires_grad_(False)
    x = torch.linspace(-1, 1, 3 * 128, dtype=mlp.dense_h_to_4h.bias.dtype).view(3, 128)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(mlp(torch.autograd.forward_ad.make_dual(x, x))).tangent
    assert tangent.float().norm() > 0.1
    batched = torch.vmap(mlp)(x[:, None])[:, 0].float()
    torch.testing.assert_close(batched, mlp(x).float(), rtol=2**-5, atol=2**-5 * batched.abs().max().item())


@torch.no_grad()
def test_a_name_of_torch_that_is_gone_counts_as_a_hook(monkeypatch, served):
    model = make_model()
    monkeypatch.setattr(kernel_routes, "GLOBAL_HOOKS", [True, {}])
    steps(model)
    assert not any(served)


def assigned(model):
    model.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()}, assign=True)


def other_data(model):
    for parameter in model.transformer.layers.parameters():
        parameter.data = torch.zeros_like(parameter)


@pytest.mark.parametrize("quantization", [None, {"bits": 8}], ids=str)
@pytest.mark.parametrize("swap", [assigned, other_data])
@pytest.mark.parametrize("how", ["program", "single kernels"])
@torch.no_grad()
def test_what_is_swapped_while_a_kernel_runs_stays_in_memory_until_it_ends(monkeypatch, how, swap, quantization):
    """The swap comes between the addresses and the kernel, and the memory that it frees is filled at once."""
    model, filled = make_model(quantization=quantization), []
    caches = [model(IDS[:, :8], use_cache=True).past_key_values for _ in range(3)]
    layer, x = model.transformer.layers[0].attention.query_key_value, torch.randn(1, 1, 128).to(model.dtype)

    def compute(cache):
        if how == "single kernels":
            return modeling_chatglm.linear(layer, x)
        return model.transformer(IDS[:, 8:9], past_key_values=cache).last_hidden_state

    owner = program if how == "program" else runtime
    real = owner.launch

    def late(*arguments):
        if not filled:
            swap(model)
            gc.collect()
            sizes = {parameter.nbytes for parameter in model.parameters()}
            filled.extend(torch.full((size,), 127, dtype=torch.int8) for size in sizes for _ in range(20))
        return real(*arguments)

    expected = compute(caches[0])
    monkeypatch.setattr(owner, "launch", late)
    during, after = compute(caches[1]), compute(caches[2])
    assert filled and torch.equal(during, expected) and expected.any()
    assert not after.any()


@torch.no_grad()
def test_moving_weights_leaves_those_who_compute_with_the_old_ones_what_they_hold():
    model = make_model()
    old = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    move_to_huge_pages(model)
    gc.collect()
    assert all(torch.equal(parameter, values) for parameter, values in old.values())
    assert all(parameter is not old[name][0] for name, parameter in model.named_parameters())


@torch.no_grad()
def test_a_cache_with_a_shorter_layer_takes_the_plain_way(served):
    model = make_model()
    _, cache = steps(model)
    if not hasattr(cache, "layers"):
        pytest.skip("caches have no layers before transformers 4.54")
    cache.layers[2].keys, cache.layers[2].values = cache.layers[2].keys[:, :, :3], cache.layers[2].values[:, :, :3]
    served.clear()
    assert model(torch.tensor([[7]]), past_key_values=cache).logits.isfinite().all()
    assert served == [False]


@torch.no_grad()
def test_hooks_of_all_modules_are_noticed(served):
    model = make_model()
    before, _ = steps(model)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: -output if isinstance(module, modeling_chatglm.MLP) else None
    )
    served.clear()
    try:
        after, _ = steps(model)
    finally:
        handle.remove()
    assert not any(served) and (before - after).abs().max() > 0.2


@torch.no_grad()
def test_caches_of_another_shape_take_the_plain_way(monkeypatch, served):
    model = make_model(torch.float16)
    _, cache = steps(model, IDS.repeat(4, 1))
    served.clear()
    position = torch.tensor([[[5], [6]]])
    with pytest.raises(RuntimeError):  # as plain PyTorch says it
        model(torch.tensor([[7]]), past_key_values=cache, position_ids=position)
    _, cache = steps(model)
    with pytest.raises(RuntimeError):
        model(torch.tensor([[7], [8]]), past_key_values=cache, position_ids=position.repeat(2, 1, 1))
    assert not any(served[:1] + served[-1:])


def test_a_program_made_in_inference_mode_serves_outside_of_it(served):
    model = make_model()
    with torch.inference_mode():
        inside, _ = steps(model)
    with torch.no_grad():
        outside, cache = steps(model)
    assert torch.equal(inside, outside) and all(served)
    with torch.inference_mode():
        model(torch.tensor([[7]]), past_key_values=cache)
    assert all(served) and cache.get_seq_length() == IDS.shape[1] + 1


@torch.no_grad()
def test_programs_keep_no_weight_alive(served):
    model = make_model()
    steps(model)
    layer = model.transformer.layers[0].mlp.dense_h_to_4h
    weight = weakref.ref(layer.weight)
    del layer
    model.quantize(4)
    gc.collect()
    assert weight() is None


@torch.no_grad()
def test_chats_of_different_batches_take_turns_without_rebuilding(served):
    model = make_model()
    for batch in (1, 2):
        steps(model, IDS.repeat(batch, 1))
    programs = dict(program._programs[model.transformer.layers].by_purpose)
    for batch in (1, 2, 1):
        steps(model, IDS.repeat(batch, 1))
    assert len(programs) == 2 and program._programs[model.transformer.layers].by_purpose == programs


@torch.no_grad()
def test_lora_of_peft_is_noticed(monkeypatch, served):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    from finetune.adapters import know_quantized_layers

    model = make_model(torch.bfloat16, {"bits": 4})
    before, _ = steps(model)
    served.clear()
    config = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, know_quantized_layers(config, model)).eval()
    after, _ = steps(adapted.base_model.model)
    assert not any(served) and (before - after).abs().max() > 0.01


@torch.no_grad()
def test_eager_attention_and_attention_weights_take_the_plain_way(served):
    model = make_model()
    _, cache = steps(model)
    served.clear()
    output = model(torch.tensor([[7]]), past_key_values=cache, output_attentions=True)
    assert output.attentions[0].shape[-1] == IDS.shape[1] + 1 and served == []
    output = model(torch.tensor([[7]]), past_key_values=cache, output_hidden_states=True)
    assert len(output.hidden_states) == 4 and served == []


def test_generate_gives_the_plain_tokens(monkeypatch, served):
    model = make_model(torch.float16, {"bits": 8})
    arguments = {"max_new_tokens": 12, "attention_mask": torch.ones_like(IDS[:, :7])}
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        served.clear()
        ours = model.generate(IDS[:, :7], **arguments, **options)
        assert served and all(served)
        with monkeypatch.context() as patch:
            patch.setattr(modeling_chatglm, "decode_step", lambda *rest: None)
            assert ours.tolist() == model.generate(IDS[:, :7], **arguments, **options).tolist()


@torch.no_grad()
def test_threads_that_decode_with_one_model_do_not_mix():
    model = make_model(torch.bfloat16, {"bits": 4})
    prompts = [torch.cat((IDS[:, :7], torch.full((1, 20), 30 + n)), dim=1) for n in range(3)]
    alone = [steps(model, prompt)[0] for prompt in prompts]
    together: dict[int, torch.Tensor] = {}

    def work(number):
        with torch.no_grad():
            together[number] = steps(model, prompts[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert torch.equal(together[number], expected)


@torch.no_grad()
def test_a_wrong_kernel_is_replaced_by_the_plain_network(monkeypatch, served):
    real = runtime.kernel_ir

    def wrong(variant):
        text = real(variant)
        return text.replace("fdiv", "fmul", 1) if variant.kind == "gelu" else text

    monkeypatch.setattr(runtime, "kernel_ir", wrong)
    monkeypatch.setattr(runtime, "_compiled", {})
    with pytest.warns(UserWarning, match="gelu.*differ from plain PyTorch"):
        assert_equals_plain(monkeypatch, make_model())
    assert not any(served)


@torch.no_grad()
def test_programs_go_with_their_models(served):
    gc.collect()  # models of other tests
    before = len(program._programs)
    model = make_model()
    steps(model)
    assert len(program._programs) == before + 1
    del model
    assert len(program._programs) == before
