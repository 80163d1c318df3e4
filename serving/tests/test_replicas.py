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


def parent(process: int) -> int:
    """0 for a process that has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def is_ours(process: int) -> bool:
    """Of the cluster that this process started, not of any other on the machine."""
    while process > 1 and process != os.getpid():
        process = parent(process)
    return process == os.getpid()


def replica_processes() -> set[int]:
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                title = file.read()
        except OSError:
            continue
        if title.startswith(b"ray::ServeReplica:chatglm:Replica") and is_ours(int(entry)):
            found.add(int(entry))
    return found


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def rows_of_replicas(address: str) -> set[float]:
    """Answers that run, of whichever replicas answer; ten questions reach both."""
    found = set()
    for _ in range(10):
        with urllib.request.urlopen(f"{address}/metrics", timeout=300) as response:
            lines = response.read().decode().splitlines()
        found |= {float(line.split()[1]) for line in lines if line.startswith("chatglm_rows ")}
    return found


CLIENTS, WHOLE = 16, 4  # how many ask at once, and how many of them not for a stream


def test_each_request_of_a_killed_replica_is_answered_by_another_or_ends_with_an_error(address):
    question = {"role": "user", "content": "你好"}
    status, text = post(address, {"messages": [question]})
    expected = json.loads(text)["choices"][0]["message"]["content"]
    assert status == 200 and expected
    heard: dict[int, tuple[int, str]] = {}

    def client(number: int) -> None:
        # an answer that cannot end early, whole or as a stream, then a short one
        options = {**ENDLESS, "seed": number, "max_tokens": 1000}
        heard[number] = post(address, {"messages": [question], "stream": number >= WHOLE, **options})
        heard[100 + number] = post(address, {"messages": [question]})

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in clients:
        thread.start()
    until(lambda: min(rows_of_replicas(address)) > WHOLE)  # so each of the two has streams
    processes = replica_processes()
    assert len(processes) == 2
    os.kill(min(processes), signal.SIGKILL)
    for thread in clients:
        thread.join(300)
    assert len(heard) == 2 * CLIENTS
    ended = [text for _, text in heard.values() if '"code": "no_replica"' in text]
    assert ended  # the streams of the one that was killed
    for number, (status, text) in heard.items():
        if status != 200:
            assert status == 503 and json.loads(text)["error"]["code"] == "no_replica"
        elif WHOLE <= number < 100:
            assert ("data: [DONE]" in text) != ('"code": "no_replica"' in text)
        else:
            assert json.loads(text)["choices"][0]["message"]["content"] == expected or number < 100
    statuses = [status for number, (status, _) in heard.items() if number < WHOLE or number >= 100]
    assert statuses.count(200) >= len(statuses) - 1  # whole answers are given again by the other replica


def test_a_client_that_leaves_the_door_leaves_the_replica(address):
    question = {"role": "user", "content": "你好"}
    options = {**ENDLESS, "max_tokens": 90_000, "stream": True}
    body = json.dumps({"messages": [question], **options}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert 1.0 in rows_of_replicas(address)
    until(lambda: rows_of_replicas(address) == {0.0})
