"""More than one prompt at a time, prompt-lookup decoding, and torch.compile, on the model with random weights.

    python benchmarks/throughput.py [--kind int4-head] [--layers 4] [--compile]

Batches: 1, 4 and 16 left-padded prompts of 32 to 128 tokens. Prompt lookup: transformers' `prompt_lookup_num_tokens`
on a summarising prompt; random weights cannot summarise, so a logits processor dictates the summary below, and the
guesses that it confirms are those that a model with these words would confirm. With `--layers` fewer than 28 the
ratios hold for that depth only. `--compile` compiles the forward pass of a decode step (needs a C++ compiler).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import machine
import torch
from make_model import DATA, KINDS, make_folders
from speed_report import table
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging
from worker import Clock, Worker, options_of

BATCHES = (1, 4, 16)
ARTICLE = """Summarise the text in two sentences. Text: The General Language Model is trained to fill in the
blanks of a text. Spans of tokens are removed and the model learns to write them one token after the other,
while it reads the rest of the text in both directions. Two positions belong to each token: the place of the
blank that it fills, and its place within that blank. ChatGLM-6B is a General Language Model with 28 layers of
4096 hidden units, which was trained on one trillion tokens of Chinese and English and then tuned to answer
questions. With INT4 weights it runs in 6 GB of memory, so that a graphics card for games is enough. Most of
the time of an answer goes into reading the weights, once for each token, which is why fewer bits for each
weight make the answer faster. Summary:"""
SUMMARY = """The General Language Model learns to fill in the blanks of a text, reading the rest of the text
in both directions. ChatGLM-6B is a General Language Model with 28 layers of 4096 hidden units, and with INT4
weights it runs in 6 GB of memory; fewer bits for each weight make the answer faster."""


def padded_prompts(worker: Worker, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [batch, 128] of prompts of 128 tokens and fewer, padded on the left."""
    ids = torch.full((batch, 128), worker.model.config.pad_token_id)
    for row in range(batch):
        length = 128 - row * 96 // max(batch - 1, 1)
        ids[row, 128 - length :] = worker.prompt(length)[0]
    mask = torch.zeros_like(ids)
    for row in range(batch):
        mask[row, 128 - (128 - row * 96 // max(batch - 1, 1)) :] = 1
    return ids, mask


def batch_times(worker: Worker, batch: int, steps: int) -> tuple[float, float]:
    """Seconds of prefill, and of one step of all rows."""
    ids, mask = padded_prompts(worker, batch)
    clock = Clock()
    start = time.perf_counter()
    worker.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=steps + 1,
        do_sample=False,
        pad_token_id=worker.model.config.pad_token_id,
        stopping_criteria=[clock],
    )
    times = [start, *clock.times]
    gaps = [after - before for before, after in zip(times, times[1:])]
    return gaps[0], median(gaps[1:])


def batch_table(worker: Worker, runs: int, steps: int) -> str:
    times = {batch: [] for batch in BATCHES}
    for _ in range(runs):
        for batch in BATCHES:
            times[batch].append(batch_times(worker, batch, steps))
    rows = []
    for batch, values in times.items():
        prefill, step = (median(column) for column in zip(*values))
        prompt_tokens = int(padded_prompts(worker, batch)[1].sum())
        first = median(step for _, step in times[1])
        rows.append([str(batch), f"{prompt_tokens / prefill:.1f}", f"{1e3 * step:.1f}", f"{batch / step:.2f}"])
        rows[-1].append(f"{batch * first / step:.2f} ×")
    return table(["batch", "prompt tokens/s", "ms a step", "new tokens/s", "against batch 1"], rows)


class Dictation(LogitsProcessor):
    """Leaves one choice at each place: the next token of a given answer."""

    def __init__(self, prompt_length: int, answer: list[int]):
        self.prompt_length, self.answer = prompt_length, answer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = min(input_ids.shape[1] - self.prompt_length, len(self.answer) - 1)
        scores = torch.full_like(scores, -1e4)
        scores[:, self.answer[place]] = 0
        return scores


def prompt_lookup_table(worker: Worker, folder: Path, runs: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = worker.model.config  # whose control tokens lie elsewhere than the stand-in vocabulary's
    prompt = torch.tensor([[*tokenizer.encode_text(ARTICLE), config.gmask_token_id, config.bos_token_id]])
    answer = tokenizer.encode_text(SUMMARY)
    times: dict[int, list[float]] = {0: [], 5: [], 10: []}
    for _ in range(runs):
        for guesses, values in times.items():
            options = {"prompt_lookup_num_tokens": guesses} if guesses else {}
            start = time.perf_counter()
            output = worker.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=len(answer),
                do_sample=False,
                logits_processor=LogitsProcessorList([Dictation(prompt.shape[1], answer)]),
                **options,
            )
            values.append(time.perf_counter() - start)
            if output[0, prompt.shape[1] :].tolist() != answer:
                raise SystemExit(f"prompt lookup with {guesses} guesses did not write the dictated answer")
    prefill = median(worker.prefill(prompt.shape[1])["seconds"] for _ in range(runs))
    plain = median(times[0]) - prefill
    rows = []
    for guesses, values in times.items():
        seconds = median(values) - prefill
        rows.append([str(guesses or "none"), f"{len(answer) / seconds:.2f}", f"{plain / seconds:.2f} ×"])
    return table([f"guesses ({prompt.shape[1]} + {len(answer)} tokens)", "new tokens/s", "against none"], rows)


def compile_table(folder: Path, layers: int, threads: int, runs: int, steps: int) -> str:
    rows, times = [], {}
    for compiled in (False, True):
        options = options_of([str(folder), "--layers", str(layers), *(["--compile"] if compiled else [])])
        torch.set_num_threads(threads)
        worker = Worker(options)
        start = time.perf_counter()
        worker.decode(128, 3)
        warm = time.perf_counter() - start
        times[compiled] = median(second for _ in range(runs) for second in worker.decode(128, steps)["seconds"])
        rows.append(["compiled" if compiled else "as it is", f"{warm:.1f}", f"{1e3 * times[compiled]:.1f}"])
        rows[-1].append(f"{times[False] / times[compiled]:.2f} ×")
    return table(["decode at 128", "s for the first tokens", "ms a token", "gain"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kind", choices=KINDS, default="int4-head")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--only-lookup", action="store_true", help="no batches")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile instead")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    folder = make_folders(options.layers, [options.kind], data=options.data)[options.kind]
    print(
        f"{machine.processor()}, {options.threads} threads; {options.kind}, {options.layers} layers; load average "
        f"{machine.load_average():.1f}\n"
    )
    if options.compile:
        print(compile_table(folder, options.layers, options.threads, options.runs, options.steps))
        return
    worker = Worker(options_of([str(folder)]))
    if not options.only_lookup:
        print(batch_table(worker, options.runs, options.steps), end="\n\n", flush=True)
    print(prompt_lookup_table(worker, folder, options.runs))


if __name__ == "__main__":
    main()
