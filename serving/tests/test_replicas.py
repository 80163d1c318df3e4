"""Two replicas on this machine, one of which is killed while it answers: no request is lost without a word.

The replicas here say which process they are, in a header of each response and, before they answer, in a file; and they
keep a whole answer back until they are told, so it is known what the one that is killed had. None starts when told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="pip install -r serving/requirements-ray.txt")
pytest.importorskip("ray.serve", reason="pip install -r serving/requirements-ray.txt")

from serving import api, replicas  # noqa: E402
from serving.tests.conftest import ROOT, TINY  # noqa: E402

FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 90_000}
ENDLESS = {"response_format": {"type": "json_schema", "json_schema": {"name": "flags", "schema": FLAGS}}}
QUESTION = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0}
STREAM = {**QUESTION, **ENDLESS, "max_tokens": 90_000, "stream": True}  # ends by no token, only by who leaves
WHOLE = {**QUESTION, **ENDLESS, "max_tokens": 400}
FOLDER = "FOLDER_OF_THE_TEST"


class Telling(replicas.Replica):
    def __init__(self, arguments: list[str]):
        while (Path(os.environ[FOLDER]) / "stay away").exists():
            time.sleep(0.05)
        super().__init__(arguments)

    async def answer(self, scope: dict, body: bytes):
        folder, number = Path(os.environ[FOLDER]), dict(scope["headers"]).get(b"x-number", b"").decode()
        with (folder / "journal").open("a") as file:
            file.write(f"{os.getpid()} {number}\n")
        async with contextlib.aclosing(super().answer(scope, body)) as messages:
            async for message in messages:
                while number and message is not replicas.TAKEN and not (folder / "go").exists():
                    await asyncio.sleep(0.05)
                if message["type"] == "http.response.start":
                    header = (b"x-process", str(os.getpid()).encode())
                    message = {**message, "headers": [*message["headers"], header]}
                yield message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def port(folder):
    """Of the door, before two replicas of tiny."""
    import uvicorn

    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", FOLDER: str(folder)}
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
        _node_ip_address="127.0.0.1",
        _system_config={
            "health_check_timeout_ms": 600_000
        },  # a machine that stands still for a minute is none that died
    )
    options = ["--model", str(TINY), "--max-length", "100000", "--places", "10000000"]
    front = replicas.make_front(replicas.deploy(options, 2, 0.5, Telling), api.parse([]))
    server = uvicorn.Server(uvicorn.Config(front, "127.0.0.1", 0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()
    ray.serve.shutdown()
    ray.shutdown()


class Asked:
    """A request on its way; `process` is that of the replica whose response has begun."""

    def __init__(self, port: int, body: dict, number: str = ""):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        headers = {"Content-Type": "application/json", "x-number": number}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)

    def begin(self) -> Asked:
        self.response = self.connection.getresponse()
        self.process = int(self.response.headers.get("x-process", 0))
        return self

    def read(self) -> str:
        with contextlib.closing(self.connection):
            return self.response.read().decode()

    def leave(self) -> None:
        self.response.close()
        self.connection.close()

    def content(self) -> str:
        """Of a whole answer."""
        self.begin()
        text = self.read()
        assert self.response.status == 200, text
        return json.loads(text)["choices"][0]["message"]["content"]


def until(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def streams_of_both(port: int) -> dict[int, list[Asked]]:
    """Process -> its streams, at least two for each of the two."""
    found: dict[int, list[Asked]] = {}
    for _ in range(24):
        stream = Asked(port, STREAM).begin()
        assert stream.response.status == 200
        found.setdefault(stream.process, []).append(stream)
        if len(found) == 2 and min(map(len, found.values())) > 1:
            return found
    raise AssertionError(f"24 requests went to { ({process: len(those) for process, those in found.items()}) }")


def asked(folder: Path) -> list[tuple[int, str]]:
    """The process and the number of each whole answer that a replica was asked for."""
    words = [line.split(" ") for line in (folder / "journal").read_text().splitlines()]
    return [(int(process), number) for process, number in words if number]


def test_each_request_of_a_killed_replica_is_answered_by_another_or_ends_with_an_error(port, folder):
    expected, expected_whole = Asked(port, QUESTION).content(), Asked(port, WHOLE).content()
    assert expected and len(expected_whole) > 400
    streams = streams_of_both(port)
    victim, other = sorted(streams, key=lambda process: len(streams[process]))  # whoever has less gets what comes next
    wholes = {str(number): Asked(port, WHOLE, str(number)) for number in range(1, 9)}
    until(lambda: {number for _, number in asked(folder)} == set(wholes))
    given = {number for process, number in asked(folder) if process == victim}
    assert given
    os.kill(victim, signal.SIGKILL)
    (folder / "go").touch()
    later = [Asked(port, QUESTION) for _ in range(8)]

    for stream in streams[victim]:
        assert '"code": "no_replica"' in stream.read().splitlines()[-2], "the client of a stream is told"
    for stream in streams[other]:
        assert stream.response.readline() and not stream.response.isclosed()
        stream.leave()
    # Nothing of a whole answer was out, and another replica is there.
    assert [one.content() for one in wholes.values()] == [expected_whole] * len(wholes)
    assert [one.content() for one in later] == [expected] * len(later)
    assert all(one.process != victim for one in wholes.values())
    assert {number for process, number in asked(folder) if process != victim} == set(wholes)


def test_where_all_are_gone_a_request_gets_a_503_until_ray_has_started_one_again(port, folder, monkeypatch):
    expected = Asked(port, QUESTION).content()
    monkeypatch.setattr(replicas, "PATIENCE", 5)
    (folder / "stay away").touch()
    stream = Asked(port, STREAM).begin()
    gone = set()
    while (one := Asked(port, QUESTION).begin()).response.status == 200:
        assert json.loads(one.read())["choices"][0]["message"]["content"] == expected
        gone.add(one.process)
        os.kill(one.process, signal.SIGKILL)
    assert (one.response.status, one.response.headers["Retry-After"]) == (503, "5") and gone
    assert json.loads(one.read())["error"]["code"] == "no_replica"
    assert '"code": "no_replica"' in stream.read().splitlines()[-2]
    (folder / "stay away").unlink()
    until(lambda: Asked(port, QUESTION).begin().response.status == 200)
    one = Asked(port, QUESTION)
    assert one.content() == expected and one.process not in gone


def rows_of_replicas(port: int) -> set[float]:
    """Answers that run, of whichever replicas answer; ten questions reach both."""
    found = set()
    for _ in range(10):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        found |= {float(line.split()[1]) for line in lines if line.startswith("chatglm_rows ")}
    return found


def test_a_client_that_leaves_the_door_leaves_the_replica(port):
    until(lambda: rows_of_replicas(port) == {0.0})
    stream = Asked(port, STREAM).begin()
    assert stream.response.status == 200 and stream.response.readline()
    until(lambda: 1.0 in rows_of_replicas(port))
    stream.leave()
    until(lambda: rows_of_replicas(port) == {0.0})
