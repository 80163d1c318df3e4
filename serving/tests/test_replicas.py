"""Two replicas on this machine, one of which is killed while it answers: no request is lost without a word."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

ray = pytest.importorskip("ray", reason="pip install -r serving/requirements-ray.txt")
pytest.importorskip("ray.serve", reason="pip install -r serving/requirements-ray.txt")

from serving.tests.conftest import ROOT, TINY  # noqa: E402

FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 90_000}
ENDLESS = {"response_format": {"type": "json_schema", "json_schema": {"name": "flags", "schema": FLAGS}}}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the door, before two replicas of tiny."""
    import uvicorn

    from serving import api, replicas

    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    handle = replicas.deploy(["--model", str(TINY), "--max-length", "100000", "--places", "10000000"], 2, 0.5)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    front = replicas.make_front(handle, api.parse([]))
    server = uvicorn.Server(uvicorn.Config(front, "127.0.0.1", port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
    ray.serve.shutdown()
    ray.shutdown()


def post(address: str, body: dict) -> tuple[int, str]:
    content = json.dumps({"temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def replica_processes() -> set[int]:
    found = set()
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                title = file.read()
        except OSError:
            continue
        if title.startswith(b"ray::ServeReplica:chatglm:Replica"):
            found.add(int(entry))
    return found


def test_each_request_of_a_killed_replica_is_answered_by_another_or_ends_with_an_error(address):
    question = {"role": "user", "content": "你好"}
    status, text = post(address, {"messages": [question]})
    expected = json.loads(text)["choices"][0]["message"]["content"]
    assert status == 200 and expected
    heard: dict[int, tuple[int, str]] = {}

    def client(number: int) -> None:
        # an answer that cannot end early, whole or as a stream, then a short one
        options = {**ENDLESS, "seed": number, "max_tokens": 600}
        heard[number] = post(address, {"messages": [question], "stream": number % 2 == 1, **options})
        heard[100 + number] = post(address, {"messages": [question]})

    clients = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in clients:
        thread.start()
    time.sleep(2)
    processes = replica_processes()
    assert len(processes) == 2
    os.kill(min(processes), signal.SIGKILL)
    for thread in clients:
        thread.join(300)
    assert len(heard) == 24
    ended = [text for _, text in heard.values() if '"code": "no_replica"' in text]
    assert ended  # the streams of the one that was killed
    for number, (status, text) in heard.items():
        if status != 200:
            assert status == 503 and json.loads(text)["error"]["code"] == "no_replica"
        elif number < 100 and number % 2:
            assert ("data: [DONE]" in text) != ('"code": "no_replica"' in text)
        else:
            assert json.loads(text)["choices"][0]["message"]["content"] == expected or number < 100
    statuses = [status for number, (status, _) in heard.items() if number % 2 == 0]
    assert statuses.count(200) >= 11  # whole answers are given again by the other replica


def rows_of_replicas(address: str) -> set[str]:
    """Of whichever replicas answer; ten questions reach both."""
    found = set()
    for _ in range(10):
        with urllib.request.urlopen(f"{address}/metrics", timeout=300) as response:
            text = response.read().decode()
        found |= {line for line in text.splitlines() if line.startswith("chatglm_rows ")}
    return found


def test_a_client_that_leaves_the_door_leaves_the_replica(address):
    question = {"role": "user", "content": "你好"}
    options = {**ENDLESS, "max_tokens": 90_000, "stream": True}
    body = json.dumps({"messages": [question], **options}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert "chatglm_rows 1.0" in rows_of_replicas(address)
    deadline = time.monotonic() + 120
    while rows_of_replicas(address) != {"chatglm_rows 0.0"}:
        assert time.monotonic() < deadline, "the row is still there"
        time.sleep(0.2)
