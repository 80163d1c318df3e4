"""One of our models in a process of its own: driven by remote.py.

    python benchmarks/worker.py FOLDER [--layers N] [--dtype bfloat16] [--threads 2] [--compile] [--int8-activations]
                                [--huge-pages]

What it times is `generate` as users call it. speed.py and throughput.py start it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

START = time.perf_counter()

import torch  # noqa: E402
from machine import resident_memory  # noqa: E402
from remote import DECODE_PROMPT, serve  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    GenerationMixin,  # noqa: F401  a slow import that is not part of loading a model
    PreTrainedModel,  # noqa: F401
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[1]))
from package import engine_module, find_engine  # noqa: E402

find_engine()
IMPORTED = time.perf_counter() - START


class Clock(StoppingCriteria):
    """The time at which each token is there."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Worker:
    def __init__(self, options: argparse.Namespace):
        start = time.perf_counter()
        changes = {"num_layers": options.layers} if options.layers else {}
        if options.int8_activations:
            changes["quantize_activations"] = True
        if options.dtype:
            changes["dtype"] = getattr(torch, options.dtype)
        self.model = AutoModel.from_pretrained(options.folder, trust_remote_code=True, **changes).eval()
        if options.huge_pages:
            engine_module().move_to_huge_pages(self.model)
        if options.compile:
            self.model.forward = torch.compile(self.model.forward, dynamic=True)
        self.model.generation_config.eos_token_id = None  # random weights may end an answer at any token
        self.cache, self.states = None, []
        loaded = time.perf_counter() - start
        self.prefill(8)
        self.started = {
            "import_seconds": IMPORTED,
            "load_seconds": loaded,
            "first_token_seconds": time.perf_counter() - start,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **{f"memory_{name}": value for name, value in resident_memory().items()},
        }

    def memory(self) -> dict:
        return resident_memory()

    def prompt(self, tokens: int) -> torch.Tensor:
        """[1, tokens] random text ids, [gMASK], <sop>."""
        config = self.model.config
        text = torch.randint(100, 100000, (1, tokens - 2), generator=torch.Generator().manual_seed(tokens))
        return torch.cat((text, torch.tensor([[config.gmask_token_id, config.bos_token_id]])), dim=1)

    def generate(self, ids: torch.Tensor, new_tokens: int, attention_mask: torch.Tensor | None = None, **arguments):
        """The output of `generate` and the seconds of each new token."""
        clock = Clock()
        start = time.perf_counter()
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if attention_mask is None else attention_mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([clock]),
            **arguments,
        )
        times = [start, *clock.times]
        return output, [after - before for before, after in zip(times, times[1:])]

    def prefill(self, tokens: int) -> dict:
        return {"seconds": self.generate(self.prompt(tokens), 1)[1][0]}

    def decode(self, context: int, steps: int) -> dict:
        """Seconds of each of `steps` tokens behind `context` tokens, a prompt and for the rest an answer."""
        ids = self.prompt(min(DECODE_PROMPT, context))
        ids = torch.cat((ids, torch.full((1, context + 1 - ids.shape[1]), 100)), dim=1)
        cache = self.filled_cache(context)
        _, seconds = self.generate(ids, steps + 1, past_key_values=cache)
        return {"seconds": seconds[1:]}  # the first pays for setting generate up

    def batch(self, lengths: list[int], steps: int) -> dict:
        """Seconds of each of `steps` tokens of all sequences, which stand behind so many tokens, padded in front."""
        ids = torch.full((len(lengths), max(lengths)), self.model.config.pad_token_id)
        for row, length in enumerate(lengths):
            ids[row, -length:] = self.prompt(length)[0]
        mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
        pad = self.model.config.pad_token_id
        _, seconds = self.generate(ids, steps + 2, attention_mask=mask, pad_token_id=pad)
        return {"seconds": seconds[2:]}

    def filled_cache(self, context: int):
        """A cache of `context` tokens; the answer's keys and values are copies of the prompt's: their numbers do not
        change the time. All contexts share the memory of the longest."""
        if self.cache is None:
            output, _ = self.generate(self.prompt(DECODE_PROMPT), 1)
            self.cache = output.past_key_values
            self.states = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.show(None)
        while self.cache.get_seq_length() < context:
            more = min(context - self.cache.get_seq_length(), self.cache.get_seq_length())
            for index, (keys, values) in enumerate(self.states):
                states = self.cache.update(keys[:, :, :more].clone(), values[:, :, :more].clone(), index)
                self.states[index] = tuple(states)
        self.show(context)
        return self.cache

    def show(self, tokens: int | None) -> None:
        """Make so many tokens, or all, what the cache holds; its own `crop` counts differently across versions."""
        for layer, (keys, values) in zip(self.cache.layers, self.states):
            layer.keys, layer.values = keys[:, :, :tokens], values[:, :, :tokens]


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What a Worker takes, from a command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, help="only the first so many layers")
    parser.add_argument("--dtype")
    parser.add_argument("--int8-activations", action="store_true", help="of prompts, in quantized models")
    parser.add_argument("--huge-pages", action="store_true", help="copy the weights from the mapped files")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward pass")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of(sys.argv[1:])
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    serve(lambda: Worker(options))


if __name__ == "__main__":
    main()
