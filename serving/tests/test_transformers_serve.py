"""`transformers serve` and `transformers chat` on the folder as it is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tiny"
sys.path.insert(0, str(ROOT / "tests"))

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    pytest.skip("serve of transformers 5.23 and later is tested", allow_module_level=True)
for library in ("fastapi", "uvicorn", "openai", "rich", "typer"):
    pytest.importorskip(library, reason="transformers[serving] is not installed")

PROGRAM = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
QUESTIONS = [
    "你好",
    "Hello",
    "1+1=?",
    "写一首诗",
    "你好👋😀",
    "def f(x):\n    return x",
    "a\tb  c",
    "What does <eop> do?",
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log"


@pytest.fixture(scope="module")
def served(log):
    """The address of `transformers serve tiny --trust-remote-code`."""
    port = free_port()
    options = [
        "serve",
        str(TINY),
        "--trust-remote-code",
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen([*PROGRAM, *options], env=environment, stdout=output, stderr=output)
    try:
        for _ in range(1500):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    return tokenizer, AutoModelForCausalLM.from_pretrained(TINY, trust_remote_code=True).eval()


def ask(address: str, messages: list, stream: bool, **options) -> tuple[str, str]:
    """The text of an answer and why it ended."""
    body = {"model": str(TINY), "messages": messages, "stream": stream, "temperature": 0, "max_tokens": 60, **options}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    raw = urllib.request.urlopen(request, timeout=600).read().decode()
    if not stream:
        choice = json.loads(raw)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    pieces = [
        json.loads(line[len("data: ") :])["choices"][0] for line in raw.splitlines() if line.startswith("data: ")
    ]
    assert len(pieces) > 3, "nothing was streamed"
    return "".join(one["delta"].get("content") or "" for one in pieces), pieces[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [True, False])
def test_serve_gives_the_answers_of_generate_and_cleaned_those_of_chat(served, tiny, stream):
    tokenizer, model = tiny
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer.build_chat_input_ids(question)])
        answer = model.generate(ids, do_sample=False, max_new_tokens=60)[0, ids.shape[1] :]
        text, _ = ask(served, [{"role": "user", "content": question}], stream)
        assert text == tokenizer.decode(answer, skip_special_tokens=True)
        shown, _ = model.chat(tokenizer, question, history=[], do_sample=False, max_new_tokens=60)
        assert model.process_response(text) == shown


@pytest.mark.parametrize("stream", [True, False])
def test_serve_knows_history_system_text_and_parts(served, tiny, stream):
    tokenizer, model = tiny
    asked = "它在哪里？"
    first, history = model.chat(tokenizer, "介绍一下清华大学", history=[], do_sample=False)
    expected, _ = model.chat(tokenizer, asked, history=history, do_sample=False)
    told = [{"role": "user", "content": "介绍一下清华大学"}, {"role": "assistant", "content": first}]
    text, ended = ask(served, [*told, {"role": "user", "content": [{"type": "text", "text": asked}]}], stream)
    assert (model.process_response(text), ended) == (expected, "stop")
    system = [{"role": "system", "content": "介绍一下"}]
    by_hand, _ = model.chat(tokenizer, "清华大学", history=system, do_sample=False, max_new_tokens=60)
    text, _ = ask(served, [*system, {"role": "user", "content": "清华大学"}], stream)
    assert model.process_response(text) == by_hand


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("roles", [["developer", "user"], ["tool", "user"], ["user", "assistant"], ["user", "user"]])
def test_what_the_tokenizer_refuses_is_status_500_with_the_reason_in_the_log(served, log, roles, stream):
    """transformers has a handler for its own CBWorkerDeadError alone; ours would need the web framework's exceptions.
    Where this fails with a 4xx, docs/ecosystem.md has to say so."""
    read = len(log.read_text())
    with pytest.raises(urllib.error.HTTPError) as raised:
        ask(served, [{"role": role, "content": "1"} for role in roles], stream)
    assert raised.value.code == 500
    for _ in range(3000):  # the log comes behind the answer
        said = log.read_text()[read:]
        if "ValueError: Message " in said or "ValueError: add_generation_prompt" in said:
            break
        time.sleep(0.1)
    else:
        pytest.fail(said)
    assert ask(served, [{"role": "user", "content": "你好"}], stream=True)[1] == "stop", "the server goes on"


def test_transformers_chat_talks_to_it_in_a_terminal(served, tmp_path, monkeypatch):
    pytest.importorskip("pty")
    from terminal import Terminal

    monkeypatch.chdir(tmp_path)  # it saves its history where it runs
    command = [*PROGRAM, "chat", str(TINY), f"{served}/v1", "do_sample=False", "--user", "someone"]
    terminal = Terminal(command, HF_HUB_OFFLINE="0")  # else its client reaches no server of this machine either
    at = terminal.wait_for("someone")
    terminal.type("你好\n")
    at = terminal.wait_for("很高兴见到你", at)
    terminal.wait_for("someone", at)
    terminal.type("!exit\n")
    assert terminal.exit_code() == 0
