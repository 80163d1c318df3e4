"""The next token of one row, chosen as transformers' `generate` does for `model.chat`: the same ids from the same
scores and the same seed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

COLDEST = 1e-30  # of temperatures: quotients by less are no numbers, and only the likeliest token would be left


class Grammar(Protocol):
    """What may follow in a constrained answer."""

    def mask(self, scores: Tensor) -> Tensor:
        """scores [V] with -inf for tokens that may not follow."""

    def accept(self, token: int) -> None:
        """The token that was chosen."""


class Token(NamedTuple):
    id: int
    logprob: float = 0.0  # of the model's own scores, before temperature and grammar
    top: tuple[tuple[int, float], ...] = ()  # the likeliest ids with theirs


@dataclasses.dataclass(frozen=True)
class Sampling:
    """`temperature` 0 or nearly 0 is greedy; `top_k` 0, `top_p` 1 leave all tokens in; the penalties are OpenAI's."""

    temperature: float = 0.95
    top_k: int = 50
    top_p: float = 0.7
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None  # how many of the likeliest tokens to report; None: no logprobs at all

    def generator(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device=device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(
    scores: Tensor, sampling: Sampling, generator: torch.Generator, answer: list[int], grammar: Grammar | None
) -> Token:
    """scores [V] float32 of the model -> the next token after `answer`."""
    if sampling.presence_penalty or sampling.frequency_penalty:
        scores = penalized(scores, sampling, answer)
    allowed = scores if grammar is None else grammar.mask(scores)
    if sampling.temperature < COLDEST:
        chosen = highest(allowed)
    else:
        chosen = drawn(allowed / sampling.temperature, sampling, generator)
    if grammar is not None:
        grammar.accept(chosen)
    return Token(chosen) if sampling.logprobs is None else with_logprobs(chosen, scores, sampling.logprobs)


def highest(scores: Tensor) -> int:
    """argmax, which takes NumPy a tenth of the time on a CPU: a hundredth of a step of eight rows, in all."""
    return int((scores.numpy() if scores.device.type == "cpu" else scores).argmax())


def penalized(scores: Tensor, sampling: Sampling, answer: list[int]) -> Tensor:
    counts = Counter(answer)
    ids = torch.tensor(list(counts), device=scores.device, dtype=torch.long)
    times = torch.tensor(list(counts.values()), device=scores.device, dtype=scores.dtype)
    penalty = sampling.presence_penalty + sampling.frequency_penalty * times
    return scores.index_add(0, ids, -penalty)


def drawn(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """With a seed it is the token that `generate` draws, whose draw takes a random number for each of the vocabulary:
    3 ms a row. Without one nobody can tell, and only the tokens that are left get one."""
    left = candidates(scores, sampling)
    if sampling.seed is None:
        return int(left[torch.multinomial(scores[left].softmax(-1), 1, generator=generator)])
    only = torch.full_like(scores, float("-inf")).index_copy(0, left, scores[left])
    return int(torch.multinomial(only.softmax(-1), 1, generator=generator))


def candidates(scores: Tensor, sampling: Sampling) -> Tensor:
    """The ids that top_k and then top_p leave in. Only what top_k left is sorted: sorting the whole vocabulary for
    each row would cost more than the row's share of a small model."""
    least = torch.finfo(scores.dtype).min  # what a grammar forbids has less
    if 0 < sampling.top_k < len(scores):
        least = scores.topk(sampling.top_k).values[-1].clamp(min=least)
    left = (scores >= least).nonzero()[:, 0]
    if sampling.top_p < 1:
        ascending, order = scores[left].sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[-1] = False
        left = left[order[~out]]
    return left


def with_logprobs(chosen: int, scores: Tensor, count: int) -> Token:
    logprobs = scores.log_softmax(-1)
    values, ids = logprobs.topk(count)
    return Token(chosen, float(logprobs[chosen]), tuple(zip(ids.tolist(), values.tolist())))
