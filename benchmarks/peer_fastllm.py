"""fastllm beside us: its file made from our random weights, and its worker.

    python benchmarks/peer_fastllm.py convert FOLDER FILE --type int4 [--layers N]
    python benchmarks/peer_fastllm.py work FILE

`peers.py fastllm` makes its environment, which sees ours (torch, transformers). Its threads spin beside the one that
calls it: with as many as there are cores they fight for them (two instead of one: 750 against 42 to 51 ms a token, 4
layers in INT4), so it gets one fewer.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

from machine import cores, resident_memory
from remote import run_peer, serve


class Worker:
    def __init__(self, file: str):
        from ftllm import llm

        start = time.perf_counter()
        llm.set_cpu_threads(max(cores() - 1, 1))
        self.model = llm.model(file)
        loaded = time.perf_counter() - start
        self.prefill(8)
        first = time.perf_counter() - start
        self.started = {"load_seconds": loaded, "first_token_seconds": first, "version": version("ftllm")}

    def memory(self) -> dict:
        return resident_memory()

    def token_seconds(self, tokens: int, new_tokens: int) -> list[float]:
        """Seconds of each new token behind a prompt of `tokens`; the first is the prompt's."""
        ids = [100 + 37 * index % 90000 for index in range(tokens - 2)] + [130001, 130004]
        times = [time.perf_counter()]
        for _ in self.model.stream_response_raw(ids, max_length=new_tokens, do_sample=False):
            times.append(time.perf_counter())
        if len(times) <= new_tokens:
            raise RuntimeError(f"fastllm ended its answer after {len(times) - 1} of {new_tokens} tokens")
        return [after - before for before, after in zip(times, times[1:])]

    def prefill(self, tokens: int) -> dict:
        return {"seconds": self.token_seconds(tokens, 1)[0]}

    def decode(self, context: int, steps: int) -> dict:
        """Seconds of each of `steps` tokens behind a prompt of `context` tokens and two."""
        return {"seconds": self.token_seconds(context, steps + 2)[2:]}


def convert(folder: Path, file: Path, kind: str, layers: int | None = None) -> None:
    from ftllm import hf_model
    from transformers import AutoModel

    changes = {"num_layers": layers} if layers else {}
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **changes).half().eval()
    hf_model.create(model, None, dtype=kind).save(str(file))


if __name__ == "__main__":
    run_peer(__doc__, ("int4", "int8", "float16"), convert, lambda file: serve(lambda: Worker(file)))
