"""The server's app as replicas, on one machine or several, by Ray Serve.

    python serving/replicas.py --model FOLDER --replicas 2

This process is the door: it listens, checks keys and limits, and hands each request to a replica. A request whose
replica dies before it has said anything is given to another one; one that has begun to stream ends with an error
event, because half an answer cannot be taken back. Where no replica takes it, the client gets a 503. Ray starts dead
replicas again. The other options are those of api.py.

Needs `pip install -r serving/requirements-ray.txt`. Several machines: `ray start --head` on one, `ray start --address`
on the others, then this program with `--address auto` on the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    sys.path[0] = ROOT

from serving import api  # noqa: E402
from serving.door import Door  # noqa: E402
from serving.errors import ApiError  # noqa: E402
from serving.metrics import Metrics  # noqa: E402
from serving.streaming import leaves  # noqa: E402

TRIES = 3
PATIENCE = 30  # seconds until a replica takes a request; for Ray's own router it waits without end
TAKEN = {"type": "chatglm.taken"}  # before the messages of a response, which may take minutes
NO_REPLICA = ApiError(503, "the replica that answered is gone: try again", code="no_replica", retry_after=5)
KEPT = ("type", "http_version", "method", "path", "raw_path", "query_string", "headers", "scheme", "root_path")


class Replica:
    """One model with its app, in a process of Ray's."""

    def __init__(self, arguments: list[str]):
        self.service = api.ready_service(api.parse(arguments))
        self.app = api.make_app(self.service)
        self.service.start()

    async def answer(self, scope: dict, body: bytes) -> AsyncIterator[dict]:
        """TAKEN and the ASGI messages of one response; closing this is the client's leaving."""
        yield TAKEN
        messages: asyncio.Queue = asyncio.Queue()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            return asked.pop() if asked else await asyncio.Event().wait()

        async def run() -> None:
            try:
                await self.app({**scope, "asgi": {"version": "3.0"}}, receive, messages.put)
            finally:
                await messages.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await running
        finally:
            running.cancel()


class Front:
    """The ASGI app of the door; `replicas` is Ray Serve's handle."""

    def __init__(self, replicas):
        self.replicas = replicas.options(stream=True)

    async def __call__(self, scope, receive, send) -> None:
        body = (await receive()).get("body", b"")
        answering, leaving = asyncio.create_task(self._answer(scope, body, send)), asyncio.create_task(leaves(receive))
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if answering.done():
            answering.result()
        answering.cancel()

    async def _answer(self, scope, body: bytes, send) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        small = {name: scope[name] for name in KEPT if name in scope}
        for _ in range(TRIES):
            start = None
            messages = self.replicas.answer.remote(small, body)
            try:
                async with asyncio.timeout(PATIENCE):
                    await messages.__anext__()
                async for message in messages:
                    start = start or message
                    await send(message)
                return
            except TimeoutError:
                break
            except (RayError, RayServeException):  # the replica died, or there is none
                if start is not None:
                    await self._end(start, send)
                    return
            finally:
                messages.cancel()
        await NO_REPLICA.response(scope, None, send)

    @staticmethod
    async def _end(start: dict, send) -> None:
        """Of a response that had begun. The rest of a whole one is missing, which its length tells the client."""
        if b"text/event-stream" in str(start["headers"]).encode():
            line = f"data: {json.dumps(NO_REPLICA.body)}\n\n"
            await send({"type": "http.response.body", "body": line.encode(), "more_body": False})


def deploy(arguments: list[str], replicas: int, cpus: float, replica: type[Replica] = Replica):
    """Starts so many replicas, each with so many CPUs of Ray's; returns their handle."""
    from ray import serve

    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=1000,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": cpus},
    )(replica)
    return serve.run(deployment.bind(arguments), name="chatglm", route_prefix=None)


def make_front(handle, options: argparse.Namespace) -> Door:
    keys = api.keys_in(options.api_key_file)
    return Door(Front(handle), api.Limits(), Metrics(), keys, api.hosts_of(options))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="other options: those of api.py")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="of each replica, as Ray counts them")
    parser.add_argument("--address", help="of a Ray cluster; default: a new one on this machine")
    own, others = parser.parse_known_args(arguments)
    options = api.parse(others)
    import ray

    ray.init(own.address, runtime_env={"env_vars": {"PYTHONPATH": ROOT}}, log_to_driver=False)
    front = make_front(deploy(others, own.replicas, own.cpus), options)
    api.uvicorn.run(front, host=options.host, port=options.port, lifespan="off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
