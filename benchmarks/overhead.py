"""What Python and the tokenizer cost: the time of everything but the arithmetic.

    python benchmarks/overhead.py [--kind int4-head]

Decode step: 28 layers of width 128 have next to no arithmetic, so their time is Python's and PyTorch's own; once as
one program of CPU kernels, once layer by layer, as on other devices. Yardsticks of the same depth and width are
transformers' GPT-NeoX and LLaMA, and the official code's way to compute (original.py, which has a plain loop in place
of `generate`), measured in turn on one thread, as processor time (which other programs do not change). `--kind
int4-head` adds what the program brings at full size.

Tokenizer: encode and decode against SentencePiece itself on the same text, and a batch over the cores; with the real
vocabulary from $ICE_TEXT_MODEL where it is set, else the stand-in. Then the parts of a call: `at most` is what is left
of SentencePiece's speed when white space is spelled as the format demands, and nothing else is done.
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
PROSE = (
    "ChatGLM-6B 是一个开源的、支持中英双语的对话语言模型，基于 General Language Model (GLM) 架构，具有 62 亿参数。\n"
    "The weights are read once for each token, so fewer bits make the answer faster.\n"
)
CODE = "def mean(values):\n\treturn sum(values) / len(values)\n    # an empty list has no mean\n\n"
TEXTS = {"prose": PROSE * 20, "prose and code": (PROSE + CODE) * 20}
BATCH = 64


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


def tokenizers():
    """Ours and SentencePiece alone, and the name of their vocabulary."""
    import sentencepiece

    real = os.environ.get("ICE_TEXT_MODEL")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_code(folder)
        shutil.copyfile(ROOT / "config.json", folder / "config.json")
        if real:
            shutil.copyfile(real, folder / "ice_text.model")
        ours = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    return ours, plain, "the real vocabulary" if real else "the stand-in of 1,444 pieces"


def microseconds(work: dict, runs: int) -> dict[str, float]:
    """Medians of calls in turn, the first of which warm up."""
    times = {name: [] for name in work}
    for _ in range(runs + 2):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * median(values[2:]) for name, values in times.items()}


def speed_rows(ours, plain, kind: str, runs: int) -> list[list[str]]:
    text = TEXTS[kind]
    ids, raw, texts = ours.encode_text(text), plain.encode(text), [text] * BATCH
    work = {
        "encode": (lambda: ours.encode_text(text), lambda: plain.encode(text), 1),
        "tokenizer(text)": (lambda: ours(text), lambda: plain.encode(text), 1),
        f"tokenizer({BATCH} texts)": (lambda: ours(texts), lambda: plain.encode(texts), BATCH),
        "decode": (lambda: ours.decode(ids), lambda: plain.decode(raw), 1),
    }
    rows = []
    for what, (mine, theirs, count) in work.items():
        times = microseconds({"ours": mine, "theirs": theirs}, runs)
        rates = count * len(ids) / times["ours"], count * len(raw) / times["theirs"]
        ratios = rates[0] / rates[1], times["theirs"] / times["ours"]
        rows.append([f"{what}, {kind}", *(f"{rate:.2f}" for rate in rates), *(f"{ratio:.2f} ×" for ratio in ratios)])
    return rows


def tokenizer_table(ours, plain, vocabulary: str, runs: int) -> str:
    """Speed against SentencePiece's. The format spells white space, so the same text makes more tokens than there."""
    rows = [row for kind in TEXTS for row in speed_rows(ours, plain, kind, runs)]
    head = [f"tokenizer, {vocabulary}", "ours, M tokens/s", "SentencePiece", "by tokens", "by text"]
    return table(head, rows)


def parts_row(ours, plain, kind: str, count: int, runs: int) -> list[str]:
    code = sys.modules[type(ours).__module__]
    texts = [TEXTS[kind]] * count
    spelled = [code.spell_whitespace(text) for text in texts]
    ids = [ours.encode_text(text) for text in texts]
    given, given_spelled = (texts, spelled) if count > 1 else (texts[0], spelled[0])
    work = {
        "raw": lambda: plain.encode(given),
        "spelled": lambda: plain.encode(given_spelled),
        "spelling": lambda: [code.spell_whitespace(text) for text in texts],
        "special": lambda: [ours.build_inputs_with_special_tokens(row) for row in ids],
        "call": lambda: ours(given),
    }
    times = microseconds(work, runs)
    rest = times["call"] - times["spelled"] - times["spelling"] - times["special"]
    bound = times["raw"] / (times["spelled"] + times["spelling"])
    values = [times["raw"], times["spelled"], times["spelling"], times["special"], rest, times["call"]]
    return [f"{count} × {kind}", *(f"{value:.0f}" for value in values), f"{bound:.2f} ×"]


def parts_table(ours, plain, runs: int) -> str:
    """Where the time of `tokenizer(text)`, alone and for a batch, goes."""
    rows = [parts_row(ours, plain, kind, count, runs) for kind in TEXTS for count in (1, BATCH)]
    head = [
        "µs", "SentencePiece, raw text", "SentencePiece, spelled text", "spelling white space", "special tokens",
        "rest", "tokenizer(text)", "at most",
    ]  # fmt: skip
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only-tokenizer", action="store_true")
    parser.add_argument("--kind", choices=KINDS, help="the full-size model too")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"{machine.processor()}, {machine.cores()} cores; load average {machine.load_average():.1f}\n")
    if not options.only_tokenizer:
        print(decode_table(options.runs), end="\n\n", flush=True)
    if options.kind:
        print(program_table(options.kind, options.runs), end="\n\n", flush=True)
    ours, plain, vocabulary = tokenizers()
    print(tokenizer_table(ours, plain, vocabulary, 10 * options.runs), flush=True)
    print(f"\n{parts_table(ours, plain, 10 * options.runs)}")


if __name__ == "__main__":
    sys.exit(main())
