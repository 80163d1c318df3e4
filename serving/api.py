"""A server for many at once: `python serving/api.py --model FOLDER`.

OpenAI's /v1/chat/completions, /v1/completions, /v1/embeddings and /v1/models, the `POST /` of the official
repository's api.py, /health and /metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    sys.path[0] = ROOT  # not this folder, whose names are no modules of their own
    # Threads of PyTorch that wait actively would keep the event loop from the cores: a tenth of the tokens/s on two.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import uvicorn  # noqa: E402
from fastapi import FastAPI, Request, Response  # noqa: E402

from serving import errors  # noqa: E402
from serving.door import LOOPBACK, Door  # noqa: E402
from serving.formats import ChatFormat, CompletionFormat  # noqa: E402
from serving.loading import DTYPES, load  # noqa: E402
from serving.schemas import (  # noqa: E402
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Limits,
    OfficialRequest,
)
from serving.service import Service, Settings  # noqa: E402
from serving.streaming import EventStream, unless_client_leaves  # noqa: E402


def make_app(service: Service, keys: list[str] = (), hosts: list[str] = ()) -> FastAPI:
    """The app of one service, which it starts and ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="ChatGLM-6B-Slim", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Door, limits=service.limits, metrics=service.metrics, keys=keys, hosts=hosts)
    errors.install(app)
    add_completions(app, service)
    add_official(app, service)
    add_rest(app, service)
    return app


def add_completions(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, asked, reply, form):
        if asked.stream:
            return EventStream(form.chunks(reply), reply.cancel)
        await unless_client_leaves(request, reply.finished(), reply.cancel)
        return form.whole(reply)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest):
        reply = await service.chat(asked)
        return await answer(request, asked, reply, ChatFormat(service, asked))

    @app.post("/v1/completions")
    async def complete(request: Request, asked: CompletionRequest):
        reply = await service.complete(asked)
        return await answer(request, asked, reply, CompletionFormat(service, asked))


def add_official(app: FastAPI, service: Service) -> None:
    @app.post("/")
    async def official(request: Request, asked: OfficialRequest) -> dict:
        chat, max_length = asked.as_chat()
        reply = await service.chat(chat, max_length)
        (choice,) = await unless_client_leaves(request, reply.finished(), reply.cancel)
        return {
            "response": choice.text.ready,
            "history": [*(asked.history or []), (asked.prompt, choice.text.ready)],
            "status": 200,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }


def add_rest(app: FastAPI, service: Service) -> None:
    started = int(time.time())
    model = {"id": service.settings.name, "object": "model", "created": started, "owned_by": "local"}

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, asked: EmbeddingRequest) -> dict:
        vectors, tokens = await unless_client_leaves(request, service.embed(asked), lambda: None)
        as_asked = {"float": lambda one: one.tolist(), "base64": lambda one: base64.b64encode(one.numpy()).decode()}
        made = [as_asked[asked.encoding_format](vector) for vector in vectors]
        return {
            "object": "list",
            "model": service.settings.name,
            "data": [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(made)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        service.check_model(name)
        return model

    @app.get("/health")
    async def health() -> dict:
        if service.scheduler.closing:
            raise errors.ApiError(503, "the server is shutting down", code="shutting_down")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


# ---- the program ----------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Ends within a stated time: what runs has `grace` seconds to finish, the rest is ended and told so."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self.service, self.grace = service, grace

    async def shutdown(self, sockets=None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self.service.close, self.grace))
        await super().shutdown(sockets)
        await closing


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(Path(ROOT, "tiny")), help="folder or Hub id (default: the tiny one)")
    parser.add_argument("--model-name", help="what clients call it (default: the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine; with a key only")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--allow-host", action="append", default=[], help="a name that requests may call it by")
    parser.add_argument("--api-key-file", type=Path, help="a key on each line; any of them lets in")
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=0, help="quantize the loaded weights")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first GPU, else the CPU)")
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        help="copy the weights to memory that a CPU reads faster, and that no other process shares",
    )
    parser.add_argument("--slots", type=int, default=16, help="answers at once")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait; the next ones get a 429")
    parser.add_argument(
        "--max-length", type=int, help="tokens of prompt and answer (default: what it was trained for)"
    )
    parser.add_argument("--places", type=int, help="answers at once times the tokens of the longest (8 full lengths)")
    parser.add_argument("--keep-prompts", type=int, default=1024, metavar="MIB", help="for questions asked again")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds to finish what runs, at the end")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace, config) -> Settings:
    length = options.max_length or config.max_sequence_length
    return Settings(
        name=options.model_name or Path(options.model).name,
        slots=options.slots,
        queue=options.queue,
        places=options.places or 8 * length,
        kept_bytes=options.keep_prompts << 20,
        limits=Limits(length=length),
    )


def ready_service(options: argparse.Namespace) -> Service:
    """Of the model asked for, warmed up: once it listens, the first answer takes no longer than the others."""
    tokenizer, model = load(options.model, options.dtype, options.bits, options.device, options.huge_pages)
    service = Service(tokenizer, model, settings_of(options, model.config))
    print("warming up …", flush=True)
    service.warm_up()
    return service


def keys_in(path: Path | None) -> list[str]:
    """ValueError for a file without any: a server that was to be closed would be open."""
    keys = [] if path is None else path.read_text(encoding="utf-8").split()
    if path is not None and not keys:
        raise ValueError(f"{path} has no key")
    return keys


def hosts_of(options: argparse.Namespace) -> list[str]:
    """The names that the server may be called by; none: any."""
    return [*LOOPBACK, *options.allow_host] if options.host in LOOPBACK else options.allow_host


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        keys = keys_in(options.api_key_file)
        service = ready_service(options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"cannot serve {options.model}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.host not in LOOPBACK and not keys:
        logging.warning("whoever reaches %s may use this server: give it an --api-key-file", options.host)
    app = make_app(service, keys, hosts_of(options))
    config = uvicorn.Config(app, options.host, options.port, timeout_graceful_shutdown=options.grace + 5)
    with contextlib.suppress(KeyboardInterrupt):  # said once more when all has ended
        Server(config, service, options.grace).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
