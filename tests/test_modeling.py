"""The network against figures computed by the original code, and against itself where it must not matter."""

from __future__ import annotations

import copy
import inspect
import json
import re
from pathlib import Path

import chatglm_cpu
import pytest
import torch
from chatglm_slim import compat
from chatglm_slim.compat import GrowingCache
from chatglm_slim.configuration_chatglm import ChatGLMConfig
from chatglm_slim.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    find_geometry,
    hidden_keys,
    position_ids_between,
    rotary_tables,
    shifted_cross_entropy,
)
from chatglm_slim.tokenization_chatglm import ChatGLMTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_as_near, exact, roundings
from safetensors.torch import load_file

DIFFERENCES = Path(__file__).parents[1] / "docs" / "differences.md"
GOLDEN_MODELS = ["base2d", "base1d", "prefix", "prefix_proj"]
PAD, MASK, GMASK, SOP, EOP = 3, 1100, 1101, 1104, 1105


def padding_mask(ids):
    return (ids != PAD).long()


def passed_arguments(case, tensors, two_dimensional):
    arguments = {}
    if "attention_mask" in case["passed"] and f"{case['name']}.attention_mask" in tensors:
        arguments["attention_mask"] = tensors[f"{case['name']}.attention_mask"].bool()
        if two_dimensional:
            arguments["position_ids"] = torch.tensor(case["position_ids"])
    elif "attention_mask" in case["passed"]:
        arguments["attention_mask"] = padding_mask(torch.tensor(case["input_ids"]))
    if "labels" in case:
        arguments["labels"] = torch.tensor(case["labels"])
    return arguments


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
@torch.no_grad()
def test_every_stored_forward_equals_the_original(golden_model, name, attention):
    model, cases, tensors = golden_model(name)
    model.config._attn_implementation = attention
    compared = 0
    for case in cases.values():
        if case["kind"] != "forward" or f"{case['name']}.logits" not in tensors:
            continue
        ids = torch.tensor(case["input_ids"])
        arguments = passed_arguments(case, tensors, model.config.position_encoding_2d)
        output = model(ids, output_hidden_states=True, **arguments)
        truth = exact(model, ids, output_hidden_states=True, **arguments)
        real, golden = ids != PAD, tensors[f"{case['name']}.logits"]
        assert_as_near(output.logits[real], golden[real], truth.logits[real], roundings(model.config))
        states = tensors.get(f"{case['name']}.hidden_states", [])
        for layer, (ours, golden) in enumerate(zip(output.hidden_states, states)):
            rest = golden.transpose(0, 1)[real], truth.hidden_states[layer][real]
            assert_as_near(ours[real], *rest, roundings(model.config, layer))
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@torch.no_grad()
def test_attentions_and_cache_equal_the_original(golden_model, name):
    model, cases, tensors = golden_model(name)
    arguments = {
        "input_ids": torch.tensor(cases["single0"]["input_ids"]),
        "output_attentions": True,
        "use_cache": True,
    }
    output, truth = model(**arguments), exact(model, **arguments)
    stored = [key for key in tensors if key.startswith("single0.past.") and key.endswith(".key")]
    assert len(stored) == model.config.num_layers
    for layer, weights in enumerate(output.attentions):
        steps, golden = roundings(model.config, layer + 1), tensors["single0.attentions"][layer]
        assert_as_near(weights[0], golden, truth.attentions[layer][0], steps)
        pairs = zip(layer_states(output.past_key_values, layer), layer_states(truth.past_key_values, layer))
        for kind, states in zip(("key", "value"), pairs):
            golden = tensors[f"single0.past.{layer}.{kind}"].permute(1, 2, 0, 3)  # [S, B, H, D]
            assert_as_near(states[0], golden, states[1], steps)


def layer_states(cache, layer_idx):
    if hasattr(cache, "layers"):
        return cache.layers[layer_idx].keys, cache.layers[layer_idx].values
    return cache.key_cache[layer_idx], cache.value_cache[layer_idx]


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@torch.no_grad()
def test_loss_equals_the_original(golden_model, name):
    model, cases, tensors = golden_model(name)
    losses = 0
    for case in cases.values():
        if case["kind"] != "forward" or "loss" not in case:
            continue
        ids, labels, loss = torch.tensor(case["input_ids"]), torch.tensor(case["labels"]), case["loss"]
        arguments = passed_arguments(case, tensors, True)
        if "leftpad" in case["name"]:
            # Here the first token after the padding has a label, predicted from a row of padding. In the original
            # such rows read everything evenly; they mean nothing, so the loss is compared without them.
            if f"{case['name']}.logits" not in tensors:
                continue
            labels = labels.clone()
            labels[:, 1:][ids[:, :-1] == PAD] = -100
            loss = shifted_cross_entropy(tensors[f"{case['name']}.logits"], labels).item()
        ours = model(ids, **{**arguments, "labels": labels}).loss
        logits = exact(model, ids, **{**arguments, "labels": None}).logits[:, :-1].flatten(0, 1)
        truth = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        assert_as_near(ours, torch.tensor(loss), truth, roundings(model.config) + 2)  # and softmax and mean
        losses += 1
    assert losses


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_gradients_equal_the_original(golden_model, name):
    model, cases, _ = golden_model(name)
    case = cases["train_rightpad_grads"]
    if model.config.pre_seq_len:
        # The original left an untied head trainable under P-tuning; its gradient is recorded, ours is frozen.
        assert not model.lm_head.weight.requires_grad
        model.lm_head.requires_grad_(True)
    ids, labels = torch.tensor(case["input_ids"]), torch.tensor(case["labels"])
    model(ids, labels=labels).loss.backward()
    truth = copy.deepcopy(model).double()
    truth.zero_grad()
    truth_logits = truth(ids).logits[:, :-1].flatten(0, 1)  # our loss is always float32
    torch.nn.functional.cross_entropy(truth_logits, labels[:, 1:].flatten()).backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    expected = {key: value for key, value in case["grad_l2"].items() if value}
    assert set(gradients) >= set(expected)
    truths = torch.stack([truth.get_parameter(key).grad.norm() for key in expected])
    ours = torch.stack([gradients[key].double().norm() for key in expected]) / truths
    golden = torch.tensor(list(expected.values())) / truths
    assert_as_near(ours.float(), golden, torch.ones_like(truths), 2 * roundings(model.config))  # forward and back


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@torch.no_grad()
def test_greedy_and_beam_search_equal_the_original(golden_model, name):
    model, cases, _ = golden_model(name)
    # Defects that are not copied: without a mask the original read the padding; with positions from its tokenizer the
    # answer filled [MASK] although [gMASK] was there; its 1-D decoding used other positions than its 1-D prefill, so
    # that only the [MASK] prompts are comparable.
    defects = {"batch_no_mask_greedy", "mask_and_gmask_tokenizer_greedy", "bug_1d_with_2d_positions"}
    compared = 0
    for case in cases.values():
        if case["kind"] != "generate" or case["name"] in defects or case["kwargs"].get("do_sample"):
            continue
        if not model.config.position_encoding_2d and case["name"] != "mask_mid_greedy":
            continue
        ids = torch.tensor(case["input_ids"])
        options = {key: value for key, value in case["kwargs"].items() if key != "seed"}
        output = model.generate(input_ids=ids, attention_mask=padding_mask(ids), **options)
        assert output.tolist() == case["output_ids"], case["name"]
        compared += 1
    assert compared >= (8 if model.config.position_encoding_2d else 1)


@torch.no_grad()
def test_one_dimensional_decoding_is_consistent_with_its_prefill(golden_model):
    model, cases, _ = golden_model("base1d")
    for name in ("greedy0", "greedy1", "greedy2"):
        ids = torch.tensor(cases[name]["input_ids"])
        options = {"do_sample": False, "max_length": cases[name]["kwargs"]["max_length"]}
        cached = model.generate(input_ids=ids, attention_mask=padding_mask(ids), **options)
        uncached = model.generate(input_ids=ids, attention_mask=padding_mask(ids), use_cache=False, **options)
        assert cached.tolist() == uncached.tolist()


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@torch.no_grad()
def test_padding_without_a_mask_changes_nothing(golden_model, name):
    model, cases, _ = golden_model(name)
    ids = torch.tensor(cases["batch_leftpad_no_mask_passed"]["input_ids"])
    alone = ids[:1, 6:]
    truth = exact(model, alone).logits
    assert_as_near(model(ids).logits[:1, 6:], model(alone).logits, truth, roundings(model.config))


@torch.no_grad()
def test_half_precision_stays_near_the_original(golden_model):
    model, cases, tensors = golden_model("base2d")
    ids = torch.tensor(cases["half_single1.logits"]["input_ids"])
    model.half()
    truth = exact(model, ids).logits
    assert_as_near(model(ids).logits, tensors["half_single1.logits"], truth, roundings(model.config))


# --- positions, masks, rotary tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, kind", [(torch.float32, "float"), (torch.float16, "half")])
def test_rotary_tables_are_the_golden_ones_to_the_last_bit_that_a_machine_can_promise(golden, dtype, kind):
    """The angles are exact products. PyTorch's cos and sin are right to one unit in the last place of float32, which
    float16 rounds once more; with AVX2 and AVX-512 they are the functions that made the golden tables."""
    tables = load_file(golden / "rotary.safetensors")
    angles = torch.arange(2048)[:, None].to(dtype) * tables["inv_freq_half"].to(dtype)
    cos, sin = rotary_tables(torch.arange(2048)[None, None], 64, dtype)
    assert torch.equal(sin[..., 0, :], -sin[..., 1, :])
    place = torch.finfo(dtype).eps / 2  # the last one of numbers below 1
    for name, ours in (("cos", cos[0, :, 0, 0, 0, 0]), ("sin", sin[0, :, 0, 0, 0, 1])):
        error = (ours.double() - getattr(angles.double(), name)()).abs().max().item()
        assert error <= (place if dtype == torch.float32 else place / 2 + 2.0**-24)
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert torch.equal(ours, tables[f"{name}_{kind}"])


def test_bfloat16_rotary_tables_keep_far_positions_apart(golden):
    cos, _ = rotary_tables(torch.arange(2048)[None, None], 64, torch.bfloat16)
    exact = load_file(golden / "rotary.safetensors")["cos_float"]
    assert (cos[0, :, 0, 0, 0, 0].float() - exact).abs().max() <= 2**-9  # half a bfloat16 step below 1


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_derived_positions_and_masks_equal_the_original(golden_model, name):
    model, cases, _ = golden_model(name)
    two_dimensional, compared = model.config.position_encoding_2d, 0
    for case in cases.values():
        if "derived_position_ids" not in case or "no_mask" in case["name"]:
            continue
        ids = torch.tensor(case["input_ids"])
        geometry = find_geometry(ids, model.config)
        positions = position_ids_between(geometry, 0, ids.shape[1], two_dimensional)
        golden = torch.tensor(case["derived_position_ids"])
        assert torch.equal(positions, golden if golden.dim() == 3 else golden[:, None]), case["name"]
        hidden = hidden_keys(geometry, None, 0, ids.shape[1], ids.shape[1], "cpu")
        assert rows_of(hidden) == case["derived_mask_rows"], case["name"]
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_official_helpers_give_the_positions_and_masks_of_the_original(golden_model, name):
    model, cases, _ = golden_model(name)
    assert model.position_encoding_2d == model.transformer.position_encoding_2d == (name != "base1d")
    compared = 0
    for case in cases.values():
        if "derived_position_ids" not in case or "no_mask" in case["name"]:
            continue
        ids = torch.tensor(case["input_ids"])
        use_gmasks = [GMASK in row for row in case["input_ids"]]
        places = [row.index(GMASK if gmask else MASK) for row, gmask in zip(case["input_ids"], use_gmasks)]
        for owner in (model, model.transformer):
            hidden = owner.get_masks(ids, device=ids.device)
            positions = owner.get_position_ids(ids, places, device=ids.device, use_gmasks=use_gmasks)
            assert hidden.dtype == torch.bool and rows_of(hidden) == case["derived_mask_rows"], case["name"]
            assert positions.tolist() == case["derived_position_ids"], case["name"]
        if name != "base1d":  # only 1-D models ask which of the two tokens it is
            assert torch.equal(model.get_position_ids(ids, torch.tensor(places), "cpu"), positions)
        compared += 1
    assert compared >= 5


def test_official_helpers_want_a_sop(model):
    with pytest.raises(ValueError, match="no <sop>"):
        model.get_masks(torch.tensor([[5, GMASK]]), "cpu")
    assert model.get_masks(torch.tensor([[5, SOP, 7]]), "cpu").shape == (1, 1, 3, 3)  # needs no [gMASK]


def rows_of(hidden):
    return [["".join(str(int(bit)) for bit in row) for row in sample] for sample in hidden[:, 0]]


def test_padded_positions_and_masks_equal_those_of_the_official_tokenizer(golden):
    batches = json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))["batches"]
    config, compared = ChatGLMConfig(), 0
    for batch in batches:
        case = batch["real"]["longest_np"]
        ids = torch.tensor(case["input_ids"])
        geometry = find_geometry(ids, config)
        if bool((ids == config.mask_token_id).any()):
            continue  # the original tokenizer placed the answer at [MASK], its model at [gMASK]: one rule here
        assert position_ids_between(geometry, 0, ids.shape[1], True).tolist() == case["position_ids"]
        compared += 1
    assert compared >= 3


words = st.integers(min_value=5, max_value=1099)


@st.composite
def sequences(draw):
    """A left-padded GLM sequence: padding, context with one or both mask tokens, <sop>, answer."""
    context = draw(st.lists(words, max_size=6))
    kinds = draw(st.sampled_from([[MASK], [GMASK], [MASK, GMASK], [GMASK, MASK, GMASK]]))
    for kind in kinds:
        context.insert(draw(st.integers(0, len(context))), kind)
    answer = draw(st.lists(words | st.sampled_from([SOP, MASK, GMASK]), max_size=5))
    return [PAD] * draw(st.integers(0, 4)) + context + [SOP] + answer


def reference_geometry(ids):
    """The rules of the model in plain Python, one token at a time: positions and visible keys."""
    padding = next(index for index, token in enumerate(ids) if token != PAD)
    text = ids[padding:]
    start = text.index(SOP)
    place = text.index(GMASK) if GMASK in text else text.index(MASK)
    rows = [[0] * padding, [0] * padding]
    for index in range(len(text)):
        rows[0].append(index if index < start else place)
        rows[1].append(0 if index < start else index - start + 1)
    visible = []
    for query in range(len(ids)):
        seen = [padding <= key and (key <= query or key < padding + start) for key in range(len(ids))]
        seen[query] = True
        visible.append(seen)
    return rows, visible


@settings(max_examples=200, deadline=None)
@given(ids=sequences(), cut=st.integers(0, 20))
def test_positions_and_masks_follow_the_rules_whole_and_in_parts(ids, cut):
    config = ChatGLMConfig(vocab_size=1472, bos_token_id=SOP, eos_token_id=EOP)
    tensor = torch.tensor([ids])
    geometry = find_geometry(tensor, config)
    rows, visible = reference_geometry(ids)
    assert position_ids_between(geometry, 0, len(ids), True)[0].tolist() == rows
    assert (~hidden_keys(geometry, None, 0, len(ids), len(ids), "cpu"))[0, 0].tolist() == visible
    start = min(max(cut, int(geometry.context_length)), len(ids) - 1)
    rest = len(ids) - start
    assert position_ids_between(geometry, start, rest, True)[0].tolist() == [row[start:] for row in rows]
    assert (~hidden_keys(geometry, None, start, rest, len(ids), "cpu"))[0, 0].tolist() == visible[start:]


# --- invariances ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[None, 6], ids=["plain", "prefix"])
def model(request):
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=1472,
        hidden_size=64,
        num_layers=3,
        num_attention_heads=4,
        inner_hidden_size=128,
        bos_token_id=SOP,
        eos_token_id=EOP,
        pre_seq_len=request.param,
    )
    return ChatGLMForConditionalGeneration(config).eval()


IDS = torch.tensor([[5, 95, 209, 7, GMASK, SOP, 44, 616, 707, 34, 124]])


def assert_equals_one_pass(model, logits, columns=slice(None)):
    """`logits` are what IDS give there, all at once."""
    whole, truth = model(IDS).logits[:, columns], exact(model, IDS).logits[:, columns]
    assert_as_near(logits, whole, truth, roundings(model.config))


@torch.no_grad()
def test_cached_steps_equal_one_pass(model):
    output = model(IDS[:, :6], use_cache=True)
    logits = [output.logits]
    for chunk in (IDS[:, 6:7], IDS[:, 7:10], IDS[:, 10:]):  # several new tokens at once stay causal
        output = model(chunk, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    assert_equals_one_pass(model, torch.cat(logits, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_attention_kernel_for_one_token_equals_torch(no_kernels, dtype):
    torch.manual_seed(1)
    sizes = {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 128}
    config = ChatGLMConfig(vocab_size=1472, bos_token_id=SOP, eos_token_id=EOP, **sizes)
    model = ChatGLMForConditionalGeneration(config).eval().to(dtype)
    batch = torch.cat((torch.cat((torch.full((1, 4), PAD), IDS), 1), torch.cat((IDS[:, :4], IDS), 1)))
    served = []

    def steps():
        output = model(batch[:, :10], use_cache=True)
        for index in range(10, batch.shape[1]):
            output = model(batch[:, index, None], past_key_values=output.past_key_values, use_cache=True)
        return output.logits[:, 0]

    def counted(*arguments):
        context = chatglm_cpu.attention(*arguments)
        served.append(context is not None)
        return context

    no_kernels.attention = counted
    through_kernel = steps()
    if not any(served):
        pytest.skip("no attention kernel on this machine (llvmlite does not work)")
    no_kernels.attention = lambda *arguments: None
    assert_as_near(through_kernel, steps(), exact(model, batch).logits[:, -1], roundings(config))


@torch.no_grad()
def test_legacy_tuple_cache_with_positions_equals_one_pass(model):
    output = model(IDS[:, :6], use_cache=True)
    past = tuple(layer_states(output.past_key_values, layer) for layer in range(3))
    positions = torch.tensor([[[4] * 5, [2, 3, 4, 5, 6]]])
    rest = model(IDS[:, 6:], past_key_values=past, position_ids=positions).logits
    assert_equals_one_pass(model, rest, slice(6, None))
    with pytest.raises(ValueError, match="position_ids"):
        model(IDS[:, 6:], past_key_values=past)


@torch.no_grad()
def test_left_padding_changes_no_logit(model):
    padded = torch.cat((torch.full((1, 5), PAD), IDS), dim=1)
    batch = torch.cat((padded, torch.cat((torch.tensor([[5, 33, 52, 5, 5]]), IDS), dim=1)))
    for mask in (None, padding_mask(batch)):
        logits = model(batch, attention_mask=mask).logits
        assert_equals_one_pass(model, logits[:1, 5:])
    output = model(batch[:, :-2], attention_mask=padding_mask(batch[:, :-2]), use_cache=True)
    for index in (-2, -1):
        mask = padding_mask(batch[:, : batch.shape[1] + index + 1])
        output = model(
            batch[:, index, None], attention_mask=mask, past_key_values=output.past_key_values, use_cache=True
        )
        assert_equals_one_pass(model, output.logits[:1], slice(index, IDS.shape[1] + index + 1))


@torch.no_grad()
def test_embeddings_with_positions_and_mask_equal_ids_and_without_are_refused(model):
    embeddings, positions = model.get_input_embeddings()(IDS), model.get_position_ids(IDS, [4], "cpu")
    places = {"position_ids": positions, "attention_mask": model.get_masks(IDS, "cpu")}
    assert_equals_one_pass(model, model(inputs_embeds=embeddings, **places).logits)
    with pytest.raises(ValueError, match="inputs_embeds take position_ids and the official mask"):
        model(inputs_embeds=embeddings, attention_mask=torch.ones_like(IDS))
    with pytest.raises(ValueError, match="inputs_embeds|encoder-decoder"):
        model.generate(inputs_embeds=embeddings[:, :6], max_new_tokens=2)


@torch.no_grad()
def test_official_4d_mask_and_positions_equal_the_derived_ones(model):
    geometry = find_geometry(IDS, model.config)
    hidden = hidden_keys(geometry, None, 0, IDS.shape[1], IDS.shape[1], "cpu")
    positions = position_ids_between(geometry, 0, IDS.shape[1], True)
    assert_equals_one_pass(model, model(IDS, attention_mask=hidden, position_ids=positions).logits)


@torch.no_grad()
def test_logits_to_keep_gives_the_last_rows_only(model):
    assert_equals_one_pass(model, model(IDS, logits_to_keep=1).logits, slice(-1, None))
    assert_equals_one_pass(model, model(IDS, logits_to_keep=torch.tensor([2, 5])).logits, [2, 5])


def holds_one_layer(static_cache: type) -> bool:
    """4.38 to 4.40: generate gave one of them to each layer."""
    return "key_cache: torch.Tensor" in inspect.getsource(static_cache)


@torch.no_grad()
def test_static_cache_generates_the_same(model):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if model.config.pre_seq_len:
        pytest.skip("generate sizes static caches without the P-tuning prefix")
    if not hasattr(cache_utils, "StaticCache") or holds_one_layer(cache_utils.StaticCache):
        pytest.skip("this transformers version has no static cache of all layers")
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS[:, :6])}
    expected = model.generate(input_ids=IDS[:, :6], **options)
    assert model.generate(input_ids=IDS[:, :6], cache_implementation="static", **options).tolist() == expected.tolist()


@torch.no_grad()
def test_decode_step_compiles_without_a_graph_break(model):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "StaticCache"):
        pytest.skip("this transformers version has no static cache")
    try:
        cache = cache_utils.StaticCache(config=model.config, max_cache_len=32)
    except TypeError:  # below 4.50
        cache = cache_utils.StaticCache(model.config, 1, 32, device="cpu", dtype=torch.float32)
    if holds_one_layer(cache_utils.StaticCache):
        with pytest.raises(ValueError, match=r"holds one layer: take 4\.41, or DynamicCache"):
            model(IDS[:, :6], past_key_values=cache, use_cache=True)
        pytest.skip("this transformers version has no static cache of all layers")
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    model(IDS[:, :6], past_key_values=cache, use_cache=True)
    for index in range(6, 9):
        inputs = model.prepare_inputs_for_generation(
            IDS[:, : index + 1],
            past_key_values=cache,
            attention_mask=torch.ones_like(IDS[:, : index + 1]),
            use_cache=True,
        )
        assert_equals_one_pass(model, step(**inputs).logits, [index])


@pytest.mark.parametrize("kind", ["ours", "DynamicCache"])
@torch.no_grad()
def test_a_cache_whose_rows_a_caller_chose_asks_for_positions_and_a_cropped_one_does_not(model, kind):
    """Who reorders it does not say so, and its contexts may end elsewhere now."""
    make = GrowingCache if kind == "ours" else getattr(pytest.importorskip("transformers.cache_utils"), kind)
    whole = torch.stack((IDS[0], torch.cat((torch.full((2,), model.config.pad_token_id), IDS[0, 2:]))))
    cache = make()
    model(whole[:, :9], past_key_values=cache, use_cache=True)
    step = model(whole[:, 9:10], past_key_values=cache, use_cache=True).logits
    truth = exact(model, whole).logits
    assert_as_near(step, model(whole).logits[:, 9:10], truth[:, 9:10], roundings(model.config))
    if hasattr(cache, "crop"):
        cache.crop(-1)
        again = model(whole[:, 9:10], past_key_values=cache, use_cache=True).logits
        assert_as_near(again, step, truth[:, 9:10], roundings(model.config))
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="nothing tells where the context of this cache ends"):
        model(whole[:, 10:], past_key_values=cache)
    places = model.get_position_ids(whole, [4, 4], "cpu")[[1, 0], :, 10:]
    mask = padding_mask(whole)[[1, 0]]
    rest = model(whole[[1, 0], 10:], past_key_values=cache, position_ids=places, attention_mask=mask).logits
    assert_as_near(rest, model(whole[[1, 0]]).logits[:, 10:], truth[[1, 0], 10:], roundings(model.config))


def test_growing_cache_writes_in_place_and_survives_cropping_and_reordering():
    cache, parts = GrowingCache(), []
    pointers = set()
    for length in (5, 1, 1, 3):
        states = torch.randn(2, 3, length, 4)
        parts.append(states)
        keys, values = cache.update(states, -states, 0)
        pointers.add(keys.data_ptr())
        assert torch.equal(keys, torch.cat(parts, dim=2)) and torch.equal(values, -keys)
    assert len(pointers) == 1  # no copy of the past
    reordered = torch.cat(parts, dim=2)[[1, 1]]
    cache.reorder_cache(torch.tensor([1, 1]))
    new = torch.randn(2, 3, 1, 4)
    keys, _ = cache.update(new, new, 0)
    assert torch.equal(keys, torch.cat((reordered, new), dim=2))
    states = torch.randn(2, 3, 600, 4)
    keys, _ = cache.update(states, states, 0)
    assert torch.equal(keys, torch.cat((reordered, new, states), dim=2))


@torch.no_grad()
def test_a_cache_of_another_prompt_is_refused_not_continued(model):
    first = model(IDS[:, :6], use_cache=True).past_key_values
    longer = torch.cat((IDS[:, :4], IDS), dim=1)
    with pytest.raises(ValueError, match="read in both directions"):
        model.prepare_inputs_for_generation(longer, past_key_values=first, attention_mask=torch.ones_like(longer))


def test_a_cache_filled_in_inference_mode_can_be_continued(model):
    with torch.inference_mode():
        cache = model(IDS[:, :6], use_cache=True).past_key_values
    with torch.no_grad():
        rest = model(IDS[:, 6:], past_key_values=cache).logits
        assert_equals_one_pass(model, rest, slice(6, None))


def test_keys_that_a_caller_kept_stay_as_they_were():
    """What crop() cuts off may be in somebody's hands."""
    cache = GrowingCache()
    if not hasattr(GrowingCache.__mro__[1], "crop"):
        pytest.skip("this version's caches cannot be cropped")
    states = torch.randn(2, 3, 6, 4)
    kept, _ = cache.update(states, states, 0)
    cache.crop(-2)
    cache.update(torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4), 0)
    assert torch.equal(kept, states)


@torch.no_grad()
def test_the_cache_of_the_caller_stays_the_object_that_it_is(model):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    cache = cache_utils.DynamicCache()
    options = {"do_sample": False, "max_length": IDS.shape[1] + 3, "min_length": IDS.shape[1] + 3}
    output = model.generate(IDS, past_key_values=cache, **options)
    assert type(cache) is cache_utils.DynamicCache and not hasattr(cache, "geometry")
    assert {type(layer) for layer in getattr(cache, "layers", [])} <= {getattr(cache_utils, "DynamicLayer", None)}
    assert cache.get_seq_length() == output.shape[1] - 1 + model.transformer.prefix_length
    assert torch.equal(output, model.generate(IDS, **options))


@torch.no_grad()
def test_generate_takes_official_masks_and_positions(model):
    batch = torch.tensor([[3, 3, 5, 95, GMASK, SOP], [5, 95, 209, 7, GMASK, SOP]])
    mask = (batch != 3).long()
    geometry = find_geometry(batch, model.config, mask)
    positions = position_ids_between(geometry, 0, 6, True)
    official = hidden_keys(geometry, mask, 0, 6, 6, "cpu") | (mask == 0)[:, None, :, None]  # as the tokenizer pads
    options = {"do_sample": False, "max_length": 11, "min_length": 11}
    expected = model.generate(batch, attention_mask=mask, **options)
    for more in ({}, {"num_beams": 1}, {"use_cache": False}):
        collated = {"input_ids": batch, "attention_mask": official, "position_ids": positions}
        assert torch.equal(model.generate(**collated, **more, **options), expected)
    beams = {**options, "num_beams": 2}
    assert torch.equal(
        model.generate(batch, attention_mask=official, position_ids=positions, **beams),
        model.generate(batch, attention_mask=mask, **beams),
    )


@torch.no_grad()
def test_masks_and_positions_that_the_model_would_not_derive_cannot_be_continued(model):
    prompt = IDS[:, :6]
    hidden, positions = model.get_masks(prompt, "cpu"), model.get_position_ids(prompt, [4], "cpu")
    assert model.generate(prompt, attention_mask=hidden, position_ids=positions, max_new_tokens=1).shape == (1, 7)
    with pytest.raises(ValueError, match="attention_mask of shape .1, 1, 6, 6. is not .* give generate.. a 2-D mask"):
        model.generate(prompt, attention_mask=torch.zeros_like(hidden))
    with pytest.raises(ValueError, match="position_ids of shape .1, 2, 6. is not .* and no position_ids"):
        model.generate(prompt, position_ids=positions + 1)
    with pytest.raises(ValueError, match=r"takes \[batch, 2, 6\]"):
        model.generate(prompt, position_ids=positions[:, :, :5])


@torch.no_grad()
def test_an_official_mask_of_one_column_holds_for_all_keys(model):
    seen = model(IDS[:, :6], use_cache=True).past_key_values
    step = model(IDS[:, 6:7], past_key_values=seen, attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool)).logits
    torch.testing.assert_close(step, model(IDS[:, :7]).logits[:, -1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_generation_that_makes_no_use_of_its_cache_says_so(model, monkeypatch):
    prepare = type(model).prepare_inputs_for_generation

    def without_cache(self, input_ids, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values", "past")}
        return {**prepare(self, input_ids, **kwargs), "use_cache": False}

    said: list = []
    monkeypatch.setattr(compat, "warn_once", said.append)
    model.generate(IDS, do_sample=False, max_new_tokens=3)
    model.generate(IDS, do_sample=False, max_new_tokens=3, use_cache=False)
    assert not said
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", without_cache)
    model.generate(IDS, do_sample=False, max_new_tokens=3)
    assert len(said) == 1 and "no use of its cache" in said[0]


@torch.no_grad()
def test_guidance_wants_a_whole_prompt_to_lead_away_from_and_then_equals_two_models(golden_model):
    model, _, _ = golden_model("base2d")
    prompt, other, scale, new = IDS[:, :6], torch.tensor([[33, 52, GMASK, SOP]]), 1.7, 6
    options = {"do_sample": False, "max_new_tokens": new, "min_length": prompt.shape[1] + new}
    with pytest.raises(ValueError, match=r"guidance_scale = 1.7: .* as negative_prompt_ids"):
        model.generate(prompt, guidance_scale=scale, **options)
    if "negative_prompt_ids" not in inspect.signature(model.generate).parameters:  # 4.32
        pytest.skip("this transformers version has no guidance by a second prompt")
    assert torch.equal(model.generate(prompt, guidance_scale=1.0, **options), model.generate(prompt, **options))
    guided = model.generate(prompt, guidance_scale=scale, negative_prompt_ids=other, **options)
    for index in range(prompt.shape[1], guided.shape[1]):
        answer = guided[:, prompt.shape[1] : index]
        towards, away = (model(torch.cat((ids, answer), 1)).logits[0, -1].log_softmax(-1) for ids in (prompt, other))
        scores = scale * (towards - away) + away
        scores[EOP] = float("-inf")  # of min_length
        assert scores[guided[0, index]] >= scores.max() - 1e-4


def test_contrastive_search_is_refused_in_one_line(model):
    with pytest.raises(ValueError, match="penalty_alpha = 0.6: contrastive search") as error:
        model.generate(IDS[:, :6], penalty_alpha=0.6, top_k=4, max_new_tokens=2)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_the_cache_of_the_caller_is_filled(model):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    cache = cache_utils.DynamicCache()
    model(IDS[:, :6], past_key_values=cache, use_cache=True)
    rest = model(IDS[:, 6:], past_key_values=cache).logits
    assert_equals_one_pass(model, rest, slice(6, None))


def test_growing_cache_keeps_gradients():
    cache = GrowingCache()
    states = torch.randn(1, 1, 2, 4, requires_grad=True)
    cache.update(states, states, 0)
    keys, _ = cache.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4), 0)
    keys.sum().backward()
    assert torch.equal(states.grad, torch.ones_like(states))


def test_gradient_checkpointing_changes_no_gradient(model):
    def gradients(model):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    truth = gradients(copy.deepcopy(model).double())  # but for the loss, which is float32: two roundings
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model)
    model.gradient_checkpointing_disable()
    model.eval()
    assert expected and set(checkpointed) == set(expected)
    for name, value in expected.items():
        assert_as_near(checkpointed[name], value, truth[name], 2 * roundings(model.config) + 2)  # forward and back


@pytest.mark.parametrize("name", ["chat2d", "prefix"])
@torch.no_grad()
def test_a_mask_that_hides_cached_keys_at_a_later_step_is_obeyed(golden_model, name):
    model = golden_model(name)[0]
    for hidden in ([2, 3], [0], [7]):
        cache = model(IDS[:, :8], use_cache=True).past_key_values
        mask = torch.ones(1, 9, dtype=torch.long)
        mask[:, hidden] = 0
        step = model(IDS[:, 8:9], past_key_values=cache, attention_mask=mask, use_cache=True).logits
        official = model.get_masks(IDS[:, :9], "cpu")
        official[:, :, -1, hidden] = True  # hidden from this token alone: the others were computed before
        whole = model(IDS[:, :9], attention_mask=official).logits
        truth = exact(model, IDS[:, :9], attention_mask=official).logits[:, -1:]
        assert_as_near(step, whole[:, -1:], truth, roundings(model.config))
        assert (whole - model(IDS[:, :9]).logits)[:, -1].abs().max() > 1e-4  # which no rounding explains


@torch.no_grad()
def test_a_configuration_without_pad_takes_no_token_for_padding(model, monkeypatch):
    ids = torch.cat((torch.zeros(1, 2, dtype=torch.long), IDS), dim=1)  # <unk> <unk> ...
    monkeypatch.setattr(model.config, "pad_token_id", None)
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits
    truth = exact(model, ids, attention_mask=torch.ones_like(ids)).logits
    assert_as_near(model(ids).logits, expected, truth, roundings(model.config))


@torch.no_grad()
def test_return_dict_of_the_configuration_is_obeyed(model, monkeypatch):
    options = {"do_sample": False, "max_new_tokens": 3}
    expected = model.generate(IDS[:, :6], **options)
    monkeypatch.setattr(model.config, "return_dict", False)
    logits, *_ = model(IDS)
    hidden, *_ = model.transformer(IDS)
    assert torch.equal(logits, model(IDS, return_dict=True).logits)
    assert torch.equal(hidden, model.transformer(IDS, return_dict=True).last_hidden_state)
    assert torch.equal(model.generate(IDS[:, :6], **options), expected)


SENTENCE_VECTORS = re.search(r"```python\n(import torch.*?)```", DIFFERENCES.read_text("utf-8"), re.S)[1]


@torch.no_grad()
def test_sentence_vectors_of_the_documentation_are_means_over_a_texts_own_tokens(model, golden):
    tokenizer, names = ChatGLMTokenizer(str(golden / "tiny_sp.model")), {}
    exec(SENTENCE_VECTORS, names)
    texts = ["你好", "介绍一下清华大学", "hello world, this is a test"]
    batch = names["sentence_vectors"](model, tokenizer, texts)
    assert batch.shape == (3, 64)
    steps = roundings(model.config, model.config.num_layers) + 2  # the last norm and the mean
    for text, vector in zip(texts, batch):
        alone = names["sentence_vectors"](model, tokenizer, [text])[0]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        by_hand, truth = (
            states.hidden_states[-1][0, :-2].mean(dim=0)
            for states in (model(ids, output_hidden_states=True), exact(model, ids, output_hidden_states=True))
        )
        assert_as_near(vector, by_hand, truth, steps)
        assert_as_near(alone, by_hand, truth, steps)


def registered(name, function, mask=None):
    """`attn_implementation` = name for a function with transformers' AttentionInterface, as a user does it."""
    interface = pytest.importorskip("transformers.modeling_utils")
    if not hasattr(interface, "AttentionInterface"):
        pytest.skip("this transformers version has no AttentionInterface")
    interface.AttentionInterface.register(name, function)
    if mask is not None:
        pytest.importorskip("transformers.masking_utils").AttentionMaskInterface.register(name, mask)
    return name


def attention_like(calls):
    def attend(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        calls.append(query.shape[2])
        assert mask is None or mask.dtype == torch.bool
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return context.transpose(1, 2), None

    return attend


@torch.no_grad()
def test_a_registered_attention_is_called_with_a_bool_mask(golden_model):
    model, calls = golden_model("base2d")[0], []
    expected = model(IDS).logits, model.generate(IDS[:, :6], do_sample=False, max_new_tokens=3)
    truth = exact(model, IDS).logits
    model.config._attn_implementation = registered("attention_of_a_test", attention_like(calls))
    assert_as_near(model(IDS).logits, expected[0], truth, roundings(model.config))
    assert calls == [11] * model.config.num_layers
    assert torch.equal(model.generate(IDS[:, :6], do_sample=False, max_new_tokens=3), expected[1])
    assert calls.count(1) == 2 * model.config.num_layers


@torch.no_grad()
def test_a_mask_that_cannot_hold_a_glm_context_is_refused(golden_model):
    model = golden_model("base2d")[0]
    name = registered("other_of_a_test", attention_like([]), lambda *args, **kwargs: None)
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match="register transformers' sdpa_mask for it"):
        model(IDS)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.tensor([[5, 95, GMASK]])}, "no <sop>"),
        ({"input_ids": torch.tensor([[5, 95, SOP]])}, r"no \[gMASK\] or \[MASK\]"),
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "position_ids": torch.zeros(1, 11, dtype=torch.long)}, r"takes \[batch, 2, 11\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 10)}, r"shape \(1, 10\): 11 new .* 0 .* take \[1, 11\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 11)}, r"shape \(2, 11\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 11, 11)}, r"shape \(1, 11, 11\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 11, 10)}, r"shape \(1, 1, 11, 10\)"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels of shape \(1, 10\) for logits of \(1, 11\)"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "no logits_to_keep"),
    ],
)
def test_bad_input_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_a_context_that_a_cache_cuts_is_refused(model):
    with torch.no_grad():
        cache = model(torch.tensor([[7, GMASK, SOP]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="read in both directions"):
        model.prepare_inputs_for_generation(IDS, past_key_values=cache)


def test_text_beyond_the_trained_length_works_with_one_warning(caplog):
    config = ChatGLMConfig(
        vocab_size=1472,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        inner_hidden_size=16,
        bos_token_id=SOP,
        eos_token_id=EOP,
        max_sequence_length=8,
    )
    model = ChatGLMForConditionalGeneration(config).eval()
    import chatglm_slim.configuration_chatglm as module

    messages = []
    module.warn_once.cache_clear()
    original, module.logger.warning = module.logger.warning, messages.append
    try:
        for _ in range(2):
            assert model(IDS).logits.shape == (1, 11, 1472)
    finally:
        module.logger.warning = original
    assert len(messages) == 1 and "8 tokens" in messages[0]
