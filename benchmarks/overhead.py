"""What Python and the tokenizer cost: the time of everything but the arithmetic.

    python benchmarks/overhead.py [--kind int4-head]

Decode step: 28 layers of width 128 have next to no arithmetic, so their time is Python's and PyTorch's own; once as
one program of CPU kernels, once layer by layer, as on other devices. Yardsticks of the same depth and width are
transformers' GPT-NeoX and LLaMA, and the official code's way to compute (original.py, which has a plain loop in place
of `generate`), measured in turn on one thread, as processor time (which other programs do not change). `--kind
int4-head` adds what the program brings at full size.

Tokenizer: encode and decode against SentencePiece itself on the same text, and a batch over the cores; with the real
vocabulary from $ICE_TEXT_MODEL where it is set, else the stand-in.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import machine
import torch
from make_model import KINDS, ROOT, copy_code, make_folders, package_module
from original import Original
from speed_report import table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from worker import Worker, options_of

WIDTH, LAYERS, HEADS, ROWS = 128, 28, 4, 1444
CONTEXTS = (128, 1024, 2000)
PROMPT = torch.tensor([[*range(10, 40), 1101, 1104]])
PROGRAM, PLAIN = "as one program", "layer by layer"
TEXT = (
    "ChatGLM-6B 是一个开源的、支持中英双语的对话语言模型，基于 General Language Model (GLM) 架构，具有 62 亿参数。\n"
    "    The weights are read once for each token, so fewer bits make the answer faster.\n"
    "def mean(values):\n\treturn sum(values) / len(values)\n"
)


def tiny_models() -> dict[str, torch.nn.Module]:
    """Ours and the yardsticks, 28 layers of width 128, bfloat16."""
    ours = package_module("configuration_chatglm").ChatGLMConfig(
        hidden_size=WIDTH, num_layers=LAYERS, num_attention_heads=HEADS, inner_hidden_size=4 * WIDTH,
        vocab_size=ROWS, bos_token_id=1104, eos_token_id=1105, pad_token_id=3,
    )  # fmt: skip
    common = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": ROWS}
    common.update(intermediate_size=4 * WIDTH, bos_token_id=1104, eos_token_id=1105, pad_token_id=3)
    models = {"ours": package_module("modeling_chatglm").ChatGLMForConditionalGeneration(ours)}
    for kind in ("gpt_neox", "llama"):
        models[kind] = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common))
    for model in models.values():
        model.eval().bfloat16().generation_config.eos_token_id = None
    original = Original(ours.to_dict()).eval().bfloat16()
    ours = models.pop("ours")
    return {f"ours, {PROGRAM}": ours, f"ours, {PLAIN}": ours, "original.py": original, **models}


@contextlib.contextmanager
def layer_by_layer(model: torch.nn.Module, wanted: bool = True):
    """Without the program of CPU kernels."""
    code = sys.modules[type(model).__module__]
    real = getattr(code, "decode_step", None)
    if wanted:
        code.decode_step = lambda *arguments: None
    yield
    if wanted:
        code.decode_step = real


def original_step_times(model: Original, tokens: int) -> tuple[float, float]:
    """As `step_times`."""
    ids, past, _ = model.generate(PROMPT, 1)
    start = time.thread_time()
    model.generate(ids, tokens, past)
    middle = time.thread_time()
    with torch.no_grad():
        for _ in range(tokens):
            model(ids, past)
    return (middle - start) / tokens, (time.thread_time() - middle) / tokens


def step_times(model: torch.nn.Module, tokens: int) -> tuple[float, float]:
    """Processor seconds of one decode step: of `generate`, and of the forward pass alone."""
    ids = PROMPT
    arguments = {"do_sample": False, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    times = []
    for count in (1, tokens + 1):
        start = time.thread_time()
        output = model.generate(ids, max_new_tokens=count, **arguments)
        times.append(time.thread_time() - start)
    cache, new = output.past_key_values, ids[:, -1:]
    position = {"position_ids": torch.tensor([[[30], [5]]])} if model.config.model_type == "chatglm" else {}
    start = time.thread_time()
    with torch.no_grad():
        for _ in range(tokens):
            model(new, past_key_values=cache, **position)
    return (times[1] - times[0]) / tokens, (time.thread_time() - start) / tokens


def decode_table(runs: int) -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = tiny_models()
    times: dict[str, list] = {name: [] for name in models}
    for run in range(runs + 1):
        for name, model in models.items():
            with layer_by_layer(model, name.endswith(PLAIN)):
                measured = (original_step_times if isinstance(model, Original) else step_times)(model, 20)
            if run:  # the first one warms up
                times[name].append(measured)
    torch.set_num_threads(threads)
    rows = []
    for name, values in times.items():
        whole, forward = (median(column) for column in zip(*values))
        rows.append([name, f"{1e3 * whole:.2f}", f"{1e3 * forward:.2f}", f"{1e6 * forward / LAYERS:.0f}"])
    return table(["28 layers of width 128", "ms a step of generate", "ms a forward pass", "µs a layer"], rows)


def program_table(kind: str, runs: int) -> str:
    """Of the full-size model, wall-clock time."""
    folder = make_folders(LAYERS, [kind])[kind]
    worker = Worker(options_of([str(folder)]))
    times: dict[tuple, list] = {}
    for _ in range(runs):
        for how in (PROGRAM, PLAIN):
            with layer_by_layer(worker.model, how == PLAIN):
                for context in CONTEXTS:
                    seconds = worker.decode(context, 6)["seconds"]
                    times.setdefault((how, context), []).append(median(seconds))
    rows = [[how, *(f"{1e3 * median(times[how, context]):.1f}" for context in CONTEXTS)] for how in (PROGRAM, PLAIN)]
    return table([f"{kind}, ms a token", *(f"at {context}" for context in CONTEXTS)], rows)


def tokenizer_table(runs: int) -> str:
    import sentencepiece

    real = os.environ.get("ICE_TEXT_MODEL")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_code(folder)
        shutil.copyfile(ROOT / "config.json", folder / "config.json")
        if real:
            shutil.copyfile(real, folder / "ice_text.model")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    text = TEXT * 20
    ids, raw = tokenizer.encode_text(text), plain.encode(text)
    texts = [text] * 64
    work = {
        "encode": (lambda: tokenizer.encode_text(text), lambda: plain.encode(text), len(raw)),
        "tokenizer(text)": (lambda: tokenizer(text), lambda: plain.encode(text), len(raw)),
        "decode": (lambda: tokenizer.decode(ids), lambda: plain.decode(raw), len(raw)),
        "tokenizer(64 texts)": (lambda: tokenizer(texts), lambda: plain.encode(texts), 64 * len(raw)),
    }
    rows = []
    for what, (ours, theirs, tokens) in work.items():
        times = [(seconds_of(ours), seconds_of(theirs)) for _ in range(runs + 1)][1:]
        mine, other = (median(column) for column in zip(*times))
        rows.append([what, f"{tokens / mine / 1e6:.2f}", f"{tokens / other / 1e6:.2f}", f"{other / mine:.2f} ×"])
    vocabulary = "the real vocabulary" if real else "the stand-in of 1,444 pieces"
    return table([f"tokenizer, {vocabulary}", "ours, M tokens/s", "SentencePiece", "ratio"], rows)


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--kind", choices=KINDS, help="the full-size model too")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"{machine.processor()}, {machine.cores()} cores; load average {machine.load_average():.1f}\n")
    print(decode_table(options.runs), flush=True)
    if options.kind:
        print(f"\n{program_table(options.kind, options.runs)}", flush=True)
    print()
    print(tokenizer_table(options.runs))


if __name__ == "__main__":
    sys.exit(main())
