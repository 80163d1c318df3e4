"""Memory and time of a training step at the width of the 6B model, on random weights.

    python finetune/memory.py --method lora --bits 4

prints peak memory and seconds a step, on the first GPU if there is one; `--layers 2 4` for parts of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.methods import trainable
from package import package_module


def random_model(layers: int, bits: int, pre_seq_len: int | None) -> torch.nn.Module:
    """bfloat16, or integers with bfloat16 scales; the numbers mean nothing."""
    config = package_module("configuration_chatglm").ChatGLMConfig(
        num_layers=layers, quantization_bit=bits, pre_seq_len=pre_seq_len
    )
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = package_module("modeling_chatglm").ChatGLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(old)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.int8:
            parameter.data.random_(-128, 128)
        elif name.endswith("weight_scale"):
            parameter.data.fill_(0.02 / 8)
        elif name.endswith("bias"):
            parameter.data.zero_()
    return model


def peak_memory() -> float | None:
    """GiB: the most that tensors of this process held on a GPU, or, if none were there, that it held in main memory;
    None where the system does not say (Windows)."""
    held = torch.cuda.max_memory_allocated()
    if not held and resource:
        unit = 1 if sys.platform == "darwin" else 2**10  # bytes of what getrusage counts in
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(held / 2**30, 2) or None


def measure(method: str, bits: int, layers: int, tokens: int, steps: int, device: str, answers) -> None:
    torch.manual_seed(0)
    torch.set_default_device(device)
    model = random_model(layers, bits, 128 if method == "ptuning" else None)
    model = trainable(model, method).train()
    model.gradient_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    config = model.config
    ids = torch.randint(1000, 100_000, (1, tokens))
    ids[0, tokens // 2 : tokens // 2 + 2] = torch.tensor([config.gmask_token_id, config.bos_token_id])
    labels = torch.where(torch.arange(tokens) > tokens // 2, ids, -100)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        model(ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    answers.put((peak_memory(), min(seconds), sum(parameter.numel() for parameter in trained)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "ptuning"), default="lora")
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=4)
    parser.add_argument("--layers", type=int, nargs="+", default=[28])
    parser.add_argument("--tokens", type=int, default=128, help="of the sequence, half of them the answer's")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for layers in options.layers:  # each in a process of its own, or peaks would add up
        answers = context.Queue()
        words = (options.method, options.bits, layers, options.tokens, options.steps, options.device, answers)
        process = context.Process(target=measure, args=words)
        process.start()
        peak, seconds, trained = answers.get()
        process.join()
        print(f"{layers} layers: peak {peak} GiB, {seconds:.1f} s a step, {trained:,} numbers trained", flush=True)


if __name__ == "__main__":
    main()
