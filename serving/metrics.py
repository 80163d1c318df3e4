"""Figures for Prometheus. No text of a request or an answer is in them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of a scheduler and its batch; without one, of requests alone."""

    def __init__(self, scheduler=None):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "chatglm_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("chatglm_prompt_tokens", "Tokens of prompts", registry=registry)
        self.answer_tokens = Counter("chatglm_answer_tokens", "Tokens of answers", registry=registry)
        self.ended = Counter("chatglm_answers", "Answers by the reason that ended them", ["reason"], registry=registry)
        self.first_token = Histogram(
            "chatglm_first_token_seconds", "From a request to the first token", buckets=SECONDS, registry=registry
        )
        self.answer = Histogram(
            "chatglm_answer_seconds", "From a request to its last token", buckets=SECONDS, registry=registry
        )
        if scheduler is not None:
            self._watch(scheduler, scheduler.batch)

    def _watch(self, scheduler, batch) -> None:
        for name, text, read in (
            ("rows", "Answers that are running", lambda: len(batch.running)),
            ("waiting", "Requests in the queue", lambda: scheduler.waiting),
            ("steps", "Steps of the batch", lambda: batch.steps),
            ("prompts_computed", "Prompts that were computed", lambda: batch.prompts_computed),
            ("prompts_reused", "Prompts whose keys were known", lambda: batch.prompts_reused),
        ):
            Gauge(f"chatglm_{name}", text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)
