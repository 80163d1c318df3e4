"""A server on a loopback port, in a thread of the tests, and a client that says whatever it likes."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from typing import NamedTuple

from serving.api import Server, make_app
from serving.door import LOOPBACK
from serving.service import Service, Settings

MODEL = "tiny"


class Heard(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self):
        return json.loads(self.body)


class Served:
    def __init__(self, tokenizer, model, keys=(), hosts=LOOPBACK, grace=0.0, **settings):
        import uvicorn

        self.service = Service(tokenizer, model, Settings(name=MODEL, **settings))
        config = uvicorn.Config(
            make_app(self.service, keys, hosts), "127.0.0.1", 0, log_level="warning", timeout_graceful_shutdown=30
        )
        self.server = Server(config, self.service, grace)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(300)
        assert not self.thread.is_alive()

    def buffer_little(self) -> None:
        """Gives the connections to come little room for what is not read yet."""
        self.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    @property
    def batch(self):
        return self.service.batch

    def is_idle(self) -> bool:
        return not (list(self.batch.works) or self.service.scheduler.waiting)

    def until(self, condition, seconds=300):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "not in time"
            time.sleep(0.005)

    def request(self, method, path, body=None, headers=()) -> Heard:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return Heard(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def get(self, path, **headers) -> Heard:
        return self.request("GET", path, headers=headers)

    def post(self, path, body, **headers) -> Heard:
        """`body`: what becomes JSON, or bytes as they are."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, body, {"Content-Type": "application/json", **headers})

    def chat(self, text="你好", headers=(), **options) -> Heard:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **options}
        return self.post("/v1/chat/completions", body, **dict(headers))
