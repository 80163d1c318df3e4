"""What each quantized format costs in accuracy: `python benchmarks/quantization_accuracy.py [MODEL]`.

For the 16-bit model and each format: the weights' signal-to-quantization-noise ratio (SQNR, dB: on the model's own
matrices, and on Gaussian ones 4096 wide), bits a weight, and on the dialogues of the model (dialogues.jsonl,
as `tiny` has them) the perplexity of the answers and how often the best next token stays the unquantized model's.
INT8 activations change something on CPUs with AVX-512 VNNI only.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from package import engine_module  # noqa: E402

FORMATS = {
    "INT8 per row (official)": {"bits": 8},
    "INT4 per row (official)": {"bits": 4},
    "INT4 per row, searched scale": {"bits": 4, "search": True},
    "INT4 groups of 128": {"bits": 4, "group_size": 128},
    "INT4 groups of 32": {"bits": 4, "group_size": 32},
    "INT4 groups of 32, searched scale": {"bits": 4, "group_size": 32, "search": True},
    "INT8, head INT8": {"bits": 8, "quantize_head": 8},
    "INT4 groups of 32, head INT8": {"bits": 4, "group_size": 32, "quantize_head": 8},
    "INT4 groups of 32, head INT4": {"bits": 4, "group_size": 32, "quantize_head": 4},
    "INT8, activations INT8": {"bits": 8, "quantize_activations": True},
    "INT4 per row, activations INT8": {"bits": 4, "quantize_activations": True},
}
OF_A_MATRIX = ("bits", "group_size", "search")


def examples(tokenizer, folder: Path) -> list[tuple[list[int], int]]:
    """(ids, index of <sop>) of every exchange: prompt, answer, <eop>."""
    found = []
    for line in (folder / "dialogues.jsonl").read_text(encoding="utf-8").splitlines():
        history = []
        for turn in json.loads(line)["rounds"]:
            prompt = tokenizer.build_chat_input_ids(turn["ask"][0], history)
            found.append(([*prompt, *tokenizer.encode_text(turn["answer"]), tokenizer.eos_token_id], len(prompt) - 1))
            history.append((turn["ask"][0], turn["answer"]))
    return found


@torch.no_grad()
def answer_logits(model, data) -> list[Tensor]:
    """The logits [answer, rows] that predict each answer token."""
    return [model(torch.tensor([ids])).logits[0, start:-1].float() for ids, start in data]


def perplexity(logits: list[Tensor], data) -> float:
    total, count = 0.0, 0
    for scores, (ids, start) in zip(logits, data):
        target = torch.tensor(ids[start + 1 :])
        total += torch.nn.functional.cross_entropy(scores, target, reduction="sum").item()
        count += len(target)
    return math.exp(total / count)


def agreement(logits: list[Tensor], reference: list[Tensor]) -> float:
    """Share of answer tokens whose best prediction is the reference's."""
    same = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for a, b in zip(logits, reference))
    return same / sum(len(a) for a in reference)


def sqnr(weight: Tensor, rounded: Tensor) -> float:
    return 10 * math.log10(weight.square().sum().item() / (weight - rounded).square().sum().item())


def weights_of(model) -> dict[str, Tensor]:
    """The matrices of the blocks, as the model computes with them."""
    matrices = {}
    for name, layer in model.transformer.layers.named_modules():
        if isinstance(layer, torch.nn.Linear):
            eye = torch.eye(layer.in_features)
            bias = layer.bias if layer.bias is not None else 0
            matrices[name] = (layer(eye) - bias).T.detach()
    return matrices


def activation_errors() -> str:
    """Relative errors of a product whose activations are rounded to int8."""
    rounded = engine_module("kernels").activations_as_int8
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(1024, 4096, generator=generator), torch.randn(64, 4096, generator=generator)
    outliers = x.clone()
    outliers[:, torch.randperm(4096, generator=generator)[:20]] *= 40  # 0.5 % of the channels
    errors = []
    for activations in (x, outliers):
        values, scales = rounded(activations, 8)
        exact = activations @ weight.T
        errors.append(f"{((values * scales) @ weight.T - exact).norm() / exact.norm():.2%}")
    return f"INT8 activations: a product is off by {errors[0]}, with 0.5 % of the channels 40 times larger {errors[1]}"


def bits_a_weight(bits: int, group_size: int = 0, columns: int = 4096, **_) -> float:
    return bits + 16 / (group_size or columns)


def layer_of(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "tiny"), help="folder with dialogues.jsonl")
    folder = Path(parser.parse_args().model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).float().eval()
    data = examples(tokenizer, folder)
    reference, weights = answer_logits(model, data), weights_of(model)
    gaussian = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
    print("| format | bits a weight | SQNR, Gaussian | SQNR, model | perplexity | same best token |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| unquantized | 16 | | | {perplexity(reference, data):.4f} | 100 % |")
    for name, options in FORMATS.items():
        quantized = copy.deepcopy(model).quantize(**options)
        logits, rounded = answer_logits(quantized, data), weights_of(quantized)
        own = sqnr(*(torch.cat([weight.flatten() for weight in of.values()]) for of in (weights, rounded)))
        matrix = type(quantized.transformer.layers[0].mlp.dense_h_to_4h).from_linear(
            layer_of(gaussian), **{key: options[key] for key in OF_A_MATRIX if key in options}
        )
        round_trip = matrix(torch.eye(4096)).T.detach()
        print(
            f"| {name} | {bits_a_weight(**options):.2f} | {sqnr(gaussian, round_trip):.1f} | {own:.1f} | "
            f"{perplexity(logits, data):.4f} | {100 * agreement(logits, reference):.2f} % |",
            flush=True,
        )
    print(f"\n{activation_errors()}")


if __name__ == "__main__":
    main()
