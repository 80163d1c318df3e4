"""The server under load: tokens/s and time to first token of many clients at once, and a soak with clients that leave.

    python benchmarks/server_load.py                                    # tiny
    python benchmarks/server_load.py --model FOLDER --clients 1 8 --prompt 32 --tokens 64
    python benchmarks/server_load.py --soak 120 --clients 200           # random cancels; answers, memory and threads
    python benchmarks/server_load.py --kind transformers                # `transformers serve` in its place
    python benchmarks/server_load.py --url http://127.0.0.1:8000        # any that runs already
    python benchmarks/server_load.py --batch-alone --clients 1 8        # no server: steps of so many rows, prompts

Each client asks one question after the other, all of them different, greedily and as a stream. A model of random
weights needs a vocabulary with a piece for (nearly) each of its rows, or its tokens have no text: `--vocabulary FILE`
puts that ice_text.model into the folder.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("清华大学", "北京", "天气", "春天", "hello", "world", "数学", "物理", "音乐", "电影", "历史", "计算机")


class Answer(NamedTuple):
    text: str
    tokens: int
    first: float  # seconds
    whole: float


class Server(NamedTuple):
    port: int
    model: str
    process: subprocess.Popen | None

    def of_process(self, field: str) -> int:
        """A figure of /proc/PID/status: VmRSS (kB) or Threads."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith((f"{name} ", f"{name}_total ")))


# ---- the servers ----------------------------------------------------------------------------------------------------


def command_of(kind: str, model: str, port: int, slots: int, huge_pages: bool = False) -> list[str]:
    ours = [sys.executable, str(ROOT / "serving" / "api.py"), "--model", model, "--port", str(port)]
    theirs = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", model]
    return {
        "ours": [*ours, "--slots", str(slots), "--queue", "1000", *["--huge-pages"] * huge_pages],
        "transformers": [*theirs, "--trust-remote-code", "--device", "cpu", "--port", str(port)],
    }[kind]


@contextlib.contextmanager
def serve(kind: str, model: str, slots: int, huge_pages: bool = False) -> Iterator[Server]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(
        command_of(kind, model, port, slots, huge_pages), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(port, process)
        yield Server(port, Path(model).name if kind == "ours" else model, process)
    finally:
        process.terminate()
        process.wait(60)


def wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}: run {' '.join(process.args)}")
        time.sleep(0.5)
    raise SystemExit("the server has not started within five minutes")


# ---- a client -------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A status other than 200."""


async def events(server: Server, body: dict) -> AsyncIterator[dict]:
    """The events of a streamed answer. Closing this closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
    try:
        content = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        status = int((await reader.readline()).split()[1])
        if status != 200:
            raise Refused(status)
        async for line in reader:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[6:])
    finally:
        writer.close()


async def ask(server: Server, question: str, tokens: int, leave_after: int | None = None) -> Answer | None:
    """None: left after so many pieces, before the answer was whole."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, text, pieces, counted, ended = time.perf_counter(), None, "", 0, 0, False
    async with contextlib.aclosing(events(server, body)) as stream:
        async for event in stream:
            if "error" in event:
                raise Refused(event["error"]["message"])
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                text, pieces = text + piece, pieces + bool(piece)
                ended = ended or choice.get("finish_reason") is not None
            if text and first is None:
                first = time.perf_counter() - started
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            if leave_after is not None and pieces >= leave_after and not ended:
                return None
    if not ended:
        raise Refused("the stream ended before the answer")
    whole = time.perf_counter() - started
    return Answer(text, counted or pieces, whole if first is None else first, whole)


def questions(count: int, prompt: int) -> list[str]:
    chance = random.Random(1)
    return [f"{index} " + "".join(chance.choice(WORDS) for _ in range(prompt)) for index in range(count)]


# ---- figures --------------------------------------------------------------------------------------------------------


async def measure(server: Server, clients: int, rounds: int, prompt: int, tokens: int) -> dict:
    """Tokens/s of all clients together, and seconds to the first token."""
    texts = questions(clients * rounds, prompt)
    chance = random.randint(0, 10**9)  # other prompts than those of an earlier run, whose keys may be known

    async def client(number: int) -> list[Answer]:
        own = texts[number::clients]
        return [await ask(server, f"{chance}{text}", tokens) for text in own]

    started = time.perf_counter()
    answers = [answer for some in await asyncio.gather(*map(client, range(clients))) for answer in some]
    seconds = time.perf_counter() - started
    firsts = sorted(answer.first for answer in answers)
    return {
        "clients": clients,
        "tokens/s": round(sum(answer.tokens for answer in answers) / seconds, 1),
        "first token, median s": round(statistics.median(firsts), 2),
        "first token, worst s": round(firsts[-1], 2),
        "seconds": round(seconds, 1),
    }


async def soak(server: Server, clients: int, seconds: float, tokens: int) -> dict:
    """Clients that ask, and a third of the time leave in the middle, for so long; each whole answer is compared with
    the one that the question had alone."""
    asked = [f"{text}？" for text in WORDS] + ["你好", "介绍一下清华大学", "1+1=?", "Hello", "写一首诗"]
    expected = {text: (await ask(server, text, tokens)).text for text in asked}
    chance, until = random.Random(2), time.monotonic() + seconds
    counts = {"whole": 0, "left": 0, "wrong": 0, "lost": 0, "refused": 0}
    memory, before = [], server.of_process("Threads")

    async def client() -> None:
        while time.monotonic() < until:
            text = chance.choice(asked)
            try:
                answer = await ask(server, text, tokens, chance.randint(0, 9) if chance.random() < 1 / 3 else None)
            except Refused as refused:
                counts["refused" if refused.args[0] == 429 else "lost"] += 1
                await asyncio.sleep(1)
            except (OSError, asyncio.IncompleteReadError):
                counts["lost"] += 1
            else:
                kind = "left" if answer is None else "whole" if answer.text == expected[text] else "wrong"
                counts[kind] += 1

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(server.of_process("VmRSS") // 1024)
            await asyncio.sleep(5)

    await asyncio.gather(watch(), *(client() for _ in range(clients)))
    await asyncio.sleep(3)
    after = {"rows": server.metric("chatglm_rows"), "waiting": server.metric("chatglm_waiting")}
    threads = f"{before} -> {server.of_process('Threads')}"
    return {**counts, **after, "threads": threads, "MiB, every 5 s": memory}


def batch_alone(model: str, rows: list[int], words: int, steps: int, huge_pages: bool) -> Iterator[dict]:
    """Without server and clients, in milliseconds: the prompts of so many rows, computed one after the other and up to
    so many tokens together, and a step of them."""
    sys.path.insert(0, str(ROOT))
    from serving.batching import Batch, Generation
    from serving.loading import load
    from serving.sampling import Sampling
    from serving.warming import warm_up

    def batch_of(prompts: list[list[int]], answer: int) -> Batch:
        batch = Batch(network, len(prompts), kept_bytes=0)
        batch.end_ids = set()
        batch.add(Generation(ids, lambda _: None, answer, Sampling(temperature=0)) for ids in prompts)
        return batch

    tokenizer, network = load(model, huge_pages=huge_pages)
    warm_up(network, max(rows), tokenizer.build_chat_input_ids("你好"))
    for count in rows:
        prompts = [tokenizer.build_chat_input_ids(text) for text in questions(count, words)]
        found = {"rows": count, "tokens of prompts": sum(map(len, prompts))}
        for together in (1, 64, 128, 256):
            batch, started = batch_of(prompts, answer=1), time.perf_counter()
            batch.together = together
            while batch.step():
                pass
            found[f"prompts, {together} together"] = round(1000 * (time.perf_counter() - started), 1)
        batch, times = batch_of(prompts, answer=steps + 2 * count), []
        while len(times) < steps:
            batch.step()
            times += [batch.step_seconds] * (len(batch.running) == count and not batch.waiting)
        yield {**found, "step": round(1000 * statistics.median(times), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--vocabulary", type=Path, help="an ice_text.model to put into the folder")
    parser.add_argument("--kind", choices=("ours", "transformers"), default="ours")
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--slots", type=int, default=16, help="1: one at a time")
    parser.add_argument("--huge-pages", action="store_true", help="as that option of ours")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=2, help="questions of each client")
    parser.add_argument("--prompt", type=int, default=8, help="words of a question")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--soak", type=float, help="seconds")
    parser.add_argument("--batch-alone", action="store_true", help="no server: --tokens steps of --clients rows")
    options = parser.parse_args()
    if options.huge_pages and (options.url or options.kind != "ours"):
        parser.error("--huge-pages is an option of our server, where this program starts it")
    if options.vocabulary:
        shutil.copyfile(options.vocabulary, Path(options.model, "ice_text.model"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.batch_alone:
        for found in batch_alone(options.model, options.clients, options.prompt, options.tokens, options.huge_pages):
            print(json.dumps(found), flush=True)
        return
    running = (
        contextlib.nullcontext(Server(int(options.url.rpartition(":")[2].strip("/")), options.model, None))
        if options.url
        else serve(options.kind, options.model, options.slots, options.huge_pages)
    )
    with running as server:
        asyncio.run(ask(server, "你好", options.tokens if options.url else 4))  # compiles what there is to compile
        if options.soak:
            print(json.dumps(asyncio.run(soak(server, options.clients[0], options.soak, options.tokens)), indent=1))
            return
        for clients in options.clients:
            figures = measure(server, clients, options.rounds, options.prompt, options.tokens)
            print(json.dumps(asyncio.run(figures), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
