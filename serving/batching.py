"""Many answers at once on one model: requests join and leave the running batch at every token.

A `Batch` does the work, one `step()` at a time, on the model's `forward` alone, so whatever computes that (the CPU
engine, CUDA, PyTorch) serves it. Each answer has the ids that it has when it runs alone:

* prompts that wait are computed together, each of which reads itself alone (prompts.py), and their keys then join the
  batch (slots.py);
* each row has its own positions, its own random generator, its own grammar.

The context of a GLM is read in both directions, so a prompt cannot be cut by tokens, and no part of an earlier one can
be used again. It is cut by layers: between two of them the running rows get a token. What is the same to the last
token, as for several answers to one question, is computed once.

scheduler.py puts it into a thread; here nothing is locked, and `cancelled` may be set from anywhere at any time.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor

from .prompts import Prompts, PromptStates
from .sampling import Grammar, Sampling, Token, choose
from .slots import Slots

# Tokens of prompts that are computed together, by type of device: a longer one is computed alone. On a CPU a product
# gains nothing from more rows (docs/speed.md), and who runs already waits for no more than one layer of them.
TOGETHER, TOGETHER_ELSEWHERE = {"cpu": 128}, 512


class End(NamedTuple):
    """The last event of a work: "stop", "length", "cancelled", or "error" with what went wrong."""

    reason: str
    error: Exception | None = None


class Gone(Exception):
    """Nobody waits for the prompt any more."""


class NotFinite(ValueError):
    def __init__(self) -> None:
        super().__init__(
            "the model's scores are not finite: float16 overflows on some hardware and with some fine-tunes; "
            "start the server with --dtype bfloat16 or float32"
        )


Event = Union[Token, Tensor, End]


class Prompt(NamedTuple):
    """What a computed prompt leaves: its keys and values, and the scores [V] of the first token behind it."""

    states: PromptStates
    scores: Tensor


class Work:
    """Something to be computed from `ids`. `tell(event)` is called in the thread that steps, and gets an End last."""

    answer_tokens = 0

    def __init__(self, ids: list[int], tell: Callable[[Event], None]):
        self.ids, self.tell = ids, tell
        self.cancelled, self.ended = False, False

    @property
    def tokens(self) -> int:
        """Places that its row may come to take."""
        return len(self.ids) + self.answer_tokens

    def end(self, reason: str, error: Exception | None = None) -> None:
        if not self.ended:
            self.ended = True
            self.tell(End(reason, error))


class Embedding(Work):
    """Tells the mean [hidden] of the last hidden states of all tokens but the last two, [gMASK] <sop>."""


class Generation(Work):
    """Tells each Token of an answer. `answer` has their ids, that of the end token too."""

    def __init__(
        self,
        ids: list[int],
        tell: Callable[[Event], None],
        max_tokens: int,
        sampling: Sampling,
        grammar: Grammar | None = None,
    ):
        super().__init__(ids, tell)
        self.answer_tokens, self.sampling, self.grammar = max_tokens, sampling, grammar
        self.answer: list[int] = []
        self.generator: torch.Generator | None = None
        self.prompt: Prompt | None = None  # where another work has had it computed
        self.joined = 0.0


class KeptPrompts:
    """The last prompts, for requests with the same: as many as fit into `room` bytes."""

    def __init__(self, room: int):
        self.room, self.used, self.prompts = room, 0, OrderedDict()

    def get(self, ids: list[int]) -> Prompt | None:
        key = tuple(ids)
        if key in self.prompts:
            self.prompts.move_to_end(key)
        return self.prompts.get(key)

    def keep(self, ids: list[int], prompt: Prompt) -> None:
        self.prompts[tuple(ids)] = prompt
        self.used += prompt.states.bytes
        while self.used > self.room:
            self.used -= self.prompts.popitem(last=False)[1].states.bytes


class Batch:
    """Works wait in turn, and up to `slots` answers run.

    Args:
        model: a ChatGLM in eval mode.
        slots: answers at once.
        places: rows times the tokens that the longest of them may come to, at most; a work that would exceed it waits.
        kept_bytes: room for the keys of prompts that may be asked again.
    """

    def __init__(self, model, slots: int = 16, places: int = 1 << 14, kept_bytes: int = 1 << 28):
        self.model, self.config = model, model.config
        end = model.config.eos_token_id
        self.end_ids = set(end) if isinstance(end, (list, tuple)) else {end}
        self.slots, self.places = slots, places
        together = TOGETHER.get(model.device.type, TOGETHER_ELSEWHERE)
        self.together = min(together, model.config.max_sequence_length)
        self.kept = KeptPrompts(kept_bytes)
        self.cache = Slots(model.config.pre_seq_len or 0)
        self.running: list[Generation] = []
        self.waiting: deque[Work] = deque()
        self.computing: dict[tuple[int, ...], list[Work]] = {}  # prompts, and the works that ask for each
        self.steps = self.prompts_computed = self.prompts_reused = 0
        self.step_seconds, self.step_ended = 0.0, 0.0
        self.answer_seconds = 1.0  # of late, from the place in the batch to the end
        self.stopped_by: Exception | None = None  # set from outside, it ends a prompt at its next layer

    @property
    def works(self) -> Iterator[Work]:
        yield from self.running
        yield from self.waiting
        yield from itertools.chain(*self.computing.values())

    def add(self, works: Iterable[Work]) -> None:
        self.waiting.extend(works)

    @torch.inference_mode()
    def step(self) -> bool:
        """Lets works join, of those whose prompts have to be computed as many as that is done for together, and gives
        each row a token. Returns whether there is more to do."""
        while (work := self._next_work()) is not None:
            known = self._known(work)
            if known is None:
                self.computing.setdefault(tuple(work.ids), []).append(work)
            else:
                self.prompts_reused += 1
                self._join(work, known)
        self._compute(list(self.computing))
        self.computing.clear()
        self._decode()
        return bool(self.running or self.waiting)

    def end_all(self, error: Exception) -> None:
        for work in list(self.works):
            work.end("error", error)
        self.waiting.clear()
        self.computing.clear()
        self.running.clear()
        self.cache.clear()

    # ---- joining --------------------------------------------------------------------------------------------------

    def _next_work(self) -> Work | None:
        """The first in turn, where there is room for it and its prompt goes with those that are to be computed."""
        self._sweep()
        while self.waiting and self.waiting[0].cancelled:
            self.waiting.popleft().end("cancelled")
        is_next = self.waiting and self._fits(self.waiting[0]) and self._goes_along(self.waiting[0])
        return self.waiting.popleft() if is_next else None

    def _fits(self, work: Work) -> bool:
        others = [*self.running, *itertools.chain(*self.computing.values())]
        if isinstance(work, Embedding) or not others:
            return True
        rows, longest = len(others) + 1, max(work.tokens, *(other.tokens for other in others))
        return rows <= self.slots and rows * longest <= self.places

    def _goes_along(self, work: Work) -> bool:
        """Prompts are computed together up to so many tokens, for works of one kind, in the order in which they came:
        so nobody waits for a longer prompt than those before his own."""
        if not self.computing or self._known(work) is not None:
            return True
        prompts = {*self.computing, tuple(work.ids)}
        first = next(iter(self.computing.values()))[0]
        return type(work) is type(first) and sum(map(len, prompts)) <= self.together

    def _known(self, work: Work) -> Prompt | None:
        return (work.prompt or self.kept.get(work.ids)) if isinstance(work, Generation) else None

    def _join(self, work: Generation, prompt: Prompt) -> None:
        work.prompt, work.joined = None, time.perf_counter()
        try:
            work.generator = work.sampling.generator(prompt.scores.device)
            self._take(work, prompt.scores)
            if not work.ended:
                self.cache.join(prompt.states)
                self.running.append(work)
        except Exception as error:  # whatever is raised concerns this one work
            work.end("error", error)

    def _compute(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Tells the works of some of the prompts in `computing` what comes of them."""
        works = [work for ids in prompts for work in self.computing[ids]]
        compute = self._means if works and isinstance(works[0], Embedding) else self._prefill
        again: Sequence[tuple[int, ...]] = ()
        try:
            results = compute(Prompts(prompts, self.model, lambda: self._between_layers(works))) if works else []
        except Gone:
            for work in works:
                work.end("cancelled")
        except Exception as error:
            if len(prompts) > 1 and self.stopped_by is None:
                again = prompts  # nobody knows whose error that is
            else:
                for work in works:
                    work.end("error", error)
        else:
            for ids, result in zip(prompts, results):
                self._deliver(self.computing[ids], result)
        for ids in again:  # here, where the error no longer keeps what failed in memory
            self._compute([ids])

    def _deliver(self, works: Sequence[Work], result: Prompt | Tensor) -> None:
        for work in works:
            if work.cancelled:
                work.end("cancelled")
            elif isinstance(result, Prompt):
                self._join(work, result)
            else:
                work.tell(result)
                work.end("stop")

    def _prefill(self, prompts: Prompts) -> list[Prompt]:
        scores = self.model(**prompts.inputs, logits_to_keep=prompts.last).logits[0].float()
        if not scores.amax(dim=-1).isfinite().all():
            raise NotFinite
        made = {ids: Prompt(*of) for ids, *of in zip(prompts.prompts, prompts.states, map(torch.clone, scores))}
        self.prompts_computed += len(made)
        self.prompts_reused += sum(len(self.computing[ids]) - 1 for ids in made)
        for ids, prompt in made.items():
            self.kept.keep(ids, prompt)
        for work in self.waiting:  # for which there was no room
            if isinstance(work, Generation):
                work.prompt = work.prompt or made.get(tuple(work.ids))
        return list(made.values())

    def _means(self, prompts: Prompts) -> list[Tensor]:
        hidden = self.model.base_model(**prompts.inputs).last_hidden_state[0]
        means = [hidden[start : end - 2].float().mean(dim=0).cpu() for start, end in prompts.places]
        if not all(mean.isfinite().all() for mean in means):
            raise NotFinite
        return means

    def _between_layers(self, works: list[Work]) -> None:
        """A token for the running rows, unless the last one took longer than what the prompt has had since."""
        if all(work.cancelled for work in works):
            raise Gone
        if self.stopped_by is not None:
            raise self.stopped_by
        if time.perf_counter() - self.step_ended >= self.step_seconds:
            self._decode()

    # ---- running --------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Takes out the rows of who has left."""
        for row in reversed(range(len(self.running))):
            if self.running[row].cancelled:
                self.running[row].end("cancelled")
                self._leave(row)

    def _leave(self, row: int, wipe: bool = False) -> None:
        self.running[row] = self.running[self.cache.leave(row, wipe)]
        self.running.pop()

    def _decode(self) -> None:
        """A token for each row."""
        self._sweep()
        if not self.running:
            return
        started = time.perf_counter()
        try:
            scores = self._forward()
            finite = scores.amax(dim=-1).isfinite().tolist()
        except Exception as error:  # memory, most likely: nobody knows whose
            for work in self.running:
                work.end("error", error)
            self.running.clear()
            self.cache.clear()
            return
        for row in reversed(range(len(self.running))):  # a row that leaves is replaced by one that has its token
            work = self.running[row]
            self._take_or_fail(work, scores[row], finite[row])
            if work.ended:
                self._leave(row, wipe=not finite[row])
        self.steps += 1
        self.step_ended = time.perf_counter()
        self.step_seconds = self.step_ended - started

    def _forward(self) -> Tensor:
        """Scores [N, V] of the token behind the last one of each row."""
        device = self.model.device
        ids = torch.tensor([[work.answer[-1]] for work in self.running], device=device)
        positions = torch.tensor([self._position(work) for work in self.running], device=device)
        hidden = self.cache.begin_step()
        output = self.model(
            input_ids=ids, position_ids=positions, attention_mask=hidden.to(device), past_key_values=self.cache
        )
        self.cache.end_step()
        return output.logits[:, -1].float()

    def _position(self, work: Generation) -> list[list[int]]:
        """Of the last token of an answer, which fills the [gMASK] that the prompt ends with, before <sop>: the place
        of that, and the place in the answer. [2, 1], or [1, 1] for models with 1-D positions."""
        if self.config.position_encoding_2d:
            return [[len(work.ids) - 2], [len(work.answer) + 1]]
        return [[len(work.ids) + len(work.answer) - 1]]

    def _take_or_fail(self, work: Generation, scores: Tensor, finite: bool) -> None:
        try:
            if not finite:
                raise NotFinite
            self._take(work, scores)
        except Exception as error:
            work.end("error", error)

    def _take(self, work: Generation, scores: Tensor) -> None:
        """Chooses a token, tells it, and says where it is the last."""
        token = choose(scores, work.sampling, work.generator, work.answer, work.grammar)
        work.answer.append(token.id)
        work.tell(token)
        if token.id in self.end_ids:
            work.end("stop")
        elif len(work.answer) >= work.answer_tokens:
            work.end("length")
        if work.ended:
            self.answer_seconds += 0.1 * (time.perf_counter() - work.joined - self.answer_seconds)
