"""The kernels and the model on a real NVIDIA GPU; without one nothing here runs.

tests/test_cuda_kernels.py proves the same on an emulated one, memory accesses included.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from chatglm_slim import cuda_kernels
from chatglm_slim.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_slim.quantization import QuantizedLinear, dequantize_weight, quantize_weight
from cuda_emulation import checks
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA GPU that PyTorch can use"
)
TINY = Path(__file__).resolve().parents[1] / "tiny"
FLOATS = checks.FLOATS
# rows, columns, groups: the smallest; tails of a block and of a warp; groups; a matrix of the 6B model
SHAPES = ((1, 32, 1), (9, 33 * 32, 1), (33, 704, 1), (10, 640, 5), (4096, 4096, 1), (257, 16384, 128))


@pytest.fixture(autouse=True)
def exact_sums(monkeypatch):
    """float32 products in float32, as on the CPU."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(TINY), trust_remote_code=True)


def test_the_kernels_of_this_gpu_are_in_use(recwarn):
    assert cuda_kernels._kernels_for(torch.zeros(1, device="cuda")) is not None, [str(w.message) for w in recwarn]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_stay_within_the_bound(bits, dtype):
    for rows, columns, groups in SHAPES:
        for scale_dtype in FLOATS:
            weight, scale = checks.random_weight(rows, columns, bits, groups, scale_dtype)
            exact = checks.exact_matrix(weight.cuda(), scale.cuda(), bits, dtype)
            for m in (1, 2, 5, cuda_kernels.FUSED_ROWS):
                x = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
                x[:, ::7] *= 20  # outliers, as real activations have
                x = x.to(dtype).cuda()
                y = cuda_kernels.linear(x, weight.cuda(), scale.cuda(), bits)
                expected = x.double() @ exact.T
                magnitude = x.double().abs() @ exact.abs().T
                bound = checks.product_bound(magnitude, expected, columns, bits, dtype)
                error = (y.double() - expected).abs()
                assert bool((error <= bound).all()), (rows, columns, groups, m, (error / bound).max().item())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_matrix_written_out_is_pytorchs_bit_for_bit(bits, dtype):
    for rows, columns, groups in (*SHAPES, (3, 72, 1), (1, 8, 1)):
        for scale_dtype in FLOATS:
            weight, scale = checks.random_weight(rows, columns, bits, groups, scale_dtype)
            matrix = cuda_kernels.dequantize(weight.cuda(), scale.cuda(), bits, dtype)
            assert checks.same_bits(matrix.cpu(), dequantize_weight(weight, scale, bits, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_compression_is_pytorchs_bit_for_bit(bits, dtype):
    generator = torch.Generator().manual_seed(3)
    random = [torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 2), (5, 6), (3, 258), (300, 4096))]
    for weight in (checks.edge_weights(dtype), *random):
        packed, scale = cuda_kernels.quantize(weight.cuda(), bits)
        expected, expected_scale = quantize_weight(weight, bits)
        assert torch.equal(packed.cpu(), expected)
        both_nan = scale.cpu().isnan() & expected_scale.isnan()  # of which there are many, and a GPU makes another
        assert checks.same_bits(scale.cpu()[~both_nan], expected_scale[~both_nan])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_golden_figures_are_reproduced(golden, bits):
    figures = load_file(golden / "quantization.safetensors", device="cuda")
    for case in sorted({name.split(".")[0] for name in figures if name.endswith(".w")}):
        packed, scale = cuda_kernels.quantize(figures[f"{case}.w"], bits)
        assert torch.equal(packed, figures[f"{case}.int{bits}.weight"]), case
        assert torch.equal(scale, figures[f"{case}.int{bits}.scale"]), case


@pytest.mark.parametrize("bits", [8, 4])
def test_the_golden_quantized_model_gives_its_logits(golden, tmp_path, bits):
    folder = golden / "model" / f"quant{bits}"
    shutil.copy(folder / "config.json", tmp_path)
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval().float().cuda()
    ids = torch.tensor(json.loads((folder / "cases.json").read_text(encoding="utf-8"))["input_ids"], device="cuda")
    with torch.no_grad():
        logits = model(ids).logits.cpu()
    expected = load_file(folder / "tensors.safetensors")["logits_float_from_dequant_half"]
    assert (logits - expected).abs().max() < 0.02  # float32 weights here, rounded to float16 there


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_quantized_on_the_gpu_has_the_weights_of_one_quantized_on_the_cpu(golden_model, bits):
    on_cpu, on_gpu = golden_model("chat2d")[0].half(), golden_model("chat2d")[0].half().cuda()
    expected, found = on_cpu.quantize(bits).state_dict(), on_gpu.quantize(bits).state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor), name


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_flow_through_a_quantized_layer(bits):
    layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 24).cuda(), bits)
    x, direction = torch.randn(3, 64, device="cuda", requires_grad=True), torch.randn(3, 24, device="cuda")
    (layer(x) * direction).sum().backward()
    matrix = dequantize_weight(layer.weight, layer.weight_scale, bits, torch.float32)
    torch.testing.assert_close(x.grad, direction @ matrix)


def test_a_product_waits_for_the_stream_that_it_is_asked_on():
    weight, scale = (tensor.cuda() for tensor in checks.random_weight(4096, 4096, 4, 1, torch.float16))
    x = torch.randn(1, 4096, device="cuda").half()
    expected = cuda_kernels.linear(x, weight, scale, 4)
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)  # cycles, tens of milliseconds: a kernel on another stream would see zeros
        late.copy_(x)
        y = cuda_kernels.linear(late, weight, scale, 4)
    own.synchronize()
    assert torch.equal(y, expected)


def test_products_can_be_captured_in_a_graph():
    weight, scale = (tensor.cuda() for tensor in checks.random_weight(64, 4096, 8, 1, torch.float16))
    x = torch.randn(2, 4096, device="cuda").half()
    expected = cuda_kernels.linear(x, weight, scale, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_kernels.linear(x, weight, scale, 8)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_tiny_answers_as_on_the_cpu(tokenizer, bits):
    lines = (TINY / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    queries = [json.loads(line)["rounds"][0]["ask"][0] for line in lines[:40]]
    answers = []
    for device in ("cpu", "cuda"):
        model = AutoModel.from_pretrained(str(TINY), trust_remote_code=True).float().eval()
        model = (model.quantize(bits) if bits else model).to(device)
        answers.append([model.chat(tokenizer, query, do_sample=False)[0] for query in queries])
    same = sum(a == b for a, b in zip(*answers))
    assert same >= len(queries) - 1, [pair for pair in zip(*answers) if pair[0] != pair[1]]  # a tie may fall otherwise


def test_a_stream_and_a_batch_answer_on_the_gpu_in_half_precision(tokenizer):
    model = AutoModel.from_pretrained(str(TINY), trust_remote_code=True).half().cuda().eval()
    answer, history = model.chat(tokenizer, "你好", do_sample=False)
    assert history[-1] == ("你好", answer)
    assert list(model.stream_chat(tokenizer, "你好", do_sample=False))[-1][0] == answer
    inputs = tokenizer(["你好", "你好"], return_tensors="pt", padding=True).to("cuda")
    first, second = model.generate(**inputs, do_sample=False, max_length=40)
    assert torch.equal(first, second)


def test_products_in_new_threads_are_those_of_the_first():
    """A new thread has no CUDA context until something makes one current there."""
    weight, scale = (tensor.cuda() for tensor in checks.random_weight(64, 4096, 4, 1, torch.float16))
    x, found = torch.randn(1, 4096, device="cuda").half(), []
    expected = cuda_kernels.linear(x, weight, scale, 4)
    for _ in range(8):
        thread = threading.Thread(target=lambda: found.append(cuda_kernels.linear(x, weight, scale, 4)))
        thread.start()
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("bits", [8, 4])
def test_under_autocast_a_quantized_layer_computes_in_its_type_for_any_number_of_rows(bits, rows):
    layer = QuantizedLinear.from_linear(torch.nn.Linear(4096, 24, bias=False).cuda(), bits)
    x = torch.randn(rows, 4096, device="cuda")
    for dtype in (torch.float16, torch.bfloat16):
        expected = layer(x.to(dtype))
        with torch.no_grad(), torch.autocast("cuda", dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        with torch.autocast("cuda", dtype):  # with gradients
            y = layer(x.clone().requires_grad_())
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_rows_of_different_lengths_answer_as_alone(tokenizer, bits):
    model = AutoModel.from_pretrained(str(TINY), trust_remote_code=True).float().eval()
    model = (model.quantize(bits) if bits else model).cuda()
    queries = ["你好", "早上好", "Where are you?", "晚上睡不着怎么办"]
    options = {"do_sample": False, "max_new_tokens": 24}
    inputs = tokenizer(queries, return_tensors="pt", padding=True).to("cuda")
    together = tokenizer.batch_decode(model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :])
    for query, answer in zip(queries, together):
        alone = tokenizer(query, return_tensors="pt").to("cuda")
        ids = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert answer.replace("<pad>", "").startswith(tokenizer.decode(ids)), query
