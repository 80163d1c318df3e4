"""What the server refuses, who may come in, and who holds up whom."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="pip install -r serving/requirements.txt")

from serving.schemas import Limits
from serving.tests.conftest import ROOT, TINY
from serving.tests.running import MODEL, Served

SECRET = "eine geheime Frage 0815"


@pytest.fixture(scope="module")
def served(tiny):
    with Served(*tiny, limits=Limits(length=1024, body=1 << 16, body_seconds=600.0)) as server:
        yield server


def user(text):
    return {"role": "user", "content": text}


HI = [user("你好")]
CHAT, TEXT, VECTOR, OFFICIAL = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/"
BAD = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "你好"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    (CHAT, {"messages": [user(7)]}, "messages"),
    (CHAT, {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "messages"),
    (CHAT, {"messages": [user("a"), user("b")]}, "messages"),
    (CHAT, {"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "messages"),
    (CHAT, {"messages": [user("a"), {"role": "system", "content": "b"}, user("c")]}, "messages"),
    (CHAT, {"messages": [user("x")] * 513}, "messages"),
    (CHAT, {"messages": [user("很长" * 3000)]}, "messages"),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 1025}, "messages"),
    (CHAT, {"messages": HI, "max_tokens": 2.5}, "max_tokens"),
    (CHAT, {"messages": HI, "temperature": 2.1}, "temperature"),
    (CHAT, {"messages": HI, "temperature": float("nan")}, "temperature"),
    (CHAT, {"messages": HI, "temperature": "0"}, "temperature"),
    (CHAT, {"messages": HI, "top_p": 0}, "top_p"),
    (CHAT, {"messages": HI, "n": 9}, "n"),
    (CHAT, {"messages": HI, "n": True}, "n"),
    (CHAT, {"messages": HI, "stop": ["a", "b", "c", "d", "e"]}, "stop"),
    (CHAT, {"messages": HI, "stop": ""}, "stop"),
    (CHAT, {"messages": HI, "stop": ["", ""]}, "stop"),
    (CHAT, {"messages": HI, "stop": [None]}, "stop"),
    (CHAT, {"messages": HI, "n": -1}, "n"),
    (CHAT, {"messages": HI, "logit_bias": {"5": 100}}, "logit_bias"),
    (CHAT, {"messages": HI, "logprobs": 3}, "logprobs"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, None),
    (CHAT, {"messages": HI, "temperature": float("-inf")}, "temperature"),
    (CHAT, {"messages": HI, "response_format": "json_object"}, "response_format"),
    (CHAT, {"messages": [user(None)]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "\udfff", "content": "a"}]}, "messages.0.role"),
    (CHAT, {"messages": HI, "\udfff": 1}, None),
    (CHAT, {"messages": HI, "stream": "yes"}, "stream"),
    (CHAT, {"messages": HI, "seed": 1 << 63}, "seed"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, None),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": HI, "temprature": 1}, "temprature"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, "response_format"),
    (
        CHAT,
        {
            "messages": HI,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}},
        },
        "response_format",
    ),
    (CHAT, {"messages": [user("\ud800")]}, "messages"),
    (TEXT, {"prompt": [1, 2, 3]}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": "a", "echo": True}, "echo"),
    (TEXT, {"prompt": ["a"] * 65}, "prompt"),
    (TEXT, {"prompt": [["a"]]}, "prompt"),
    (TEXT, {"prompt": ["a", ""]}, "prompt"),
    (TEXT, {"prompt": ["a"] * 64, "n": 8, "max_tokens": 1}, None),
    (VECTOR, {"input": []}, "input"),
    (VECTOR, {"input": "很长" * 3000}, "input"),
    (VECTOR, {"input": [[5, 74874]]}, "input"),
    (VECTOR, {"input": "a", "dimensions": 3}, "dimensions"),
    (VECTOR, {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    (OFFICIAL, {"history": []}, "prompt"),
    (OFFICIAL, {"prompt": "a", "history": [["b"]]}, "history"),
    (OFFICIAL, {"prompt": "a", "max_length": 100_000}, "max_length"),
    (OFFICIAL, {"prompt": "a", "max_length": -1}, "max_length"),
    (OFFICIAL, {"prompt": "a", "history": [["\ud800", "b"]]}, "history"),
    (OFFICIAL, {"prompt": "a", "history": [["a", "b"]] * 300}, "history"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_a_400_that_names_its_field(served, path, body, param):
    heard = served.post(path, body)
    error = heard.json["error"]
    assert heard.status == 400 and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 1000
    assert param is None or error["param"].startswith(param)
    assert "constrained" not in str(error) and "list[" not in str(error)  # names of pydantic's
    assert served.chat(max_tokens=2).status == 200


def schema(**one):
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": one}}
    return {"messages": HI, "max_tokens": 20, "temperature": 1, "seed": 1, "response_format": asked}


DEEP = {"type": "integer"}
for _ in range(60):
    DEEP = {"type": "array", "items": DEEP}
TRAPS = {
    "the levels": DEEP,
    "a loop": {"$ref": "#"},
    "a loop of two": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "another server": {"$ref": "http://127.0.0.1:1/x"},
    "a file": {"$ref": "file:///etc/passwd"},
    "what cannot be": {"type": "integer", "minimum": 5, "maximum": 4},
    "nothing to choose from": {"enum": []},
    "a contradiction": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "a look-ahead": {"type": "string", "pattern": "^(?=a)b"},
    "a format unknown": {"type": "string", "format": "nonsense"},
    "multiples of nothing": {"type": "integer", "multipleOf": 0},
    "a lone surrogate": {"enum": ["\ud800"]},
    "a lone surrogate as a key": {"type": "object", "properties": {"\ud800": {"type": "null"}}},
    "a text that is tokenized at each token": {"const": "x" * 60_000},
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_schema_that_is_a_trap_is_a_400(served, name):
    heard = served.post(CHAT, schema(**TRAPS[name]))
    assert heard.status == 400 and heard.json["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    "one",
    [
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9, "maxItems": 10**12},
        {"type": "string", "x-guidance": {"whitespace_flexible": True, "lenient": True}},
    ],
)
def test_a_schema_without_an_end_is_cut_by_max_tokens(served, one):
    heard = served.post(CHAT, schema(**one)).json["choices"][0]
    assert heard["finish_reason"] == "length" and heard["message"]["content"][0] in '"['


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-31])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_temperature_of_nearly_nothing_is_greedy(served, temperature, seed):
    coldest = served.chat(max_tokens=6).json["choices"][0]["message"]
    assert served.chat(max_tokens=6, temperature=temperature, seed=seed).json["choices"][0]["message"] == coldest
    official = {"prompt": "你好", "max_length": 30}
    greedy = served.post(OFFICIAL, {**official, "top_p": 1e-320}).json["response"]
    assert served.post(OFFICIAL, {**official, "temperature": temperature}).json["response"] == greedy


@pytest.mark.parametrize(
    "odd",
    [
        {"top_p": 1e-320},
        {"top_k": 1 << 70},
        {"stop": "\x00"},
        {"stop": "\ud800"},
        {"user": "\ud800", "metadata": [[[]]]},
        {"logit_bias": {}},
        {"seed": -(1 << 63)},
        {"frequency_penalty": -2, "presence_penalty": 2},
    ],
)
def test_odd_values_that_mean_something_are_served(served, odd):
    assert served.chat(**{"temperature": 1, "max_tokens": 3, **odd}).status == 200


@pytest.mark.parametrize("text", ["", "   ", "\x00a\x00", "\u202e\ufeff\u200b", "😀" * 50, "\r\n\t" * 20])
def test_odd_texts_are_questions(served, text):
    assert served.chat(text, max_tokens=3).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 20_000,
        b'{"messages": NaN}',
        b'{"n":' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(served, body):
    heard = served.post(CHAT, body)
    assert heard.status == 400 and heard.json["error"]["message"]


def test_paths_methods_and_models_that_there_are_not(served):
    for heard, status in (
        (served.get("/v1/files"), 404),
        (served.get(CHAT), 405),
        (served.chat(model="gpt-4"), 404),
        (served.request("POST", CHAT, b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}), 415),
    ):
        assert heard.status == status and heard.json["error"]["message"]


def test_a_body_too_large_is_refused_by_its_header_and_by_its_bytes(served):
    assert served.post(CHAT, b" " * (1 << 17)).status == 413
    chunks = (b" " * 4096 for _ in range(64))
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port)) as client:
        client.request("POST", CHAT, chunks, {"Content-Type": "application/json"}, encode_chunked=True)
        assert client.getresponse().status == 413


def test_a_body_that_does_not_come_is_not_waited_for(tiny):
    with (
        Served(*tiny, limits=Limits(body_seconds=0.5)) as impatient,
        raw(impatient, b'{"messages"', declared=100) as connection,
    ):
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


# ---- who may come in ----------------------------------------------------------------------------------------------


def test_a_key_is_asked_for(tiny):
    with Served(*tiny, keys=["first-key", "another"]) as served:
        assert served.get("/health").status == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}):
            for heard in (served.chat(headers=header), served.get("/metrics", **header)):
                assert heard.status == 401 and heard.json["error"]["code"] == "invalid_api_key"
        for key in ("first-key", "another"):
            assert served.chat(headers={"Authorization": f"Bearer {key}"}, max_tokens=2).status == 200
            assert served.chat(headers={"Authorization": f"Bearer {key}x"}).status == 401


def test_keys_are_compared_in_constant_time_all_of_them(tiny, monkeypatch):
    from serving import door

    asked, compare = [], door.hmac.compare_digest
    monkeypatch.setattr(door.hmac, "compare_digest", lambda ours, given: asked.append(ours) or compare(ours, given))
    with Served(*tiny, keys=["first-key", "another"]) as served:
        assert served.chat(headers={"Authorization": "Bearer first-key"}, max_tokens=2).status == 200
    assert asked == [b"first-key", b"another"]


def test_a_web_page_under_another_name_gets_nothing(served):
    assert served.chat(headers={"Host": "evil.example:8000"}).status == 421
    for name in ("localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert served.chat(headers={"Host": name}, max_tokens=2).status == 200


def test_an_empty_key_file_is_refused(tmp_path):
    from serving.api import keys_in

    path = tmp_path / "keys"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="no key"):
        keys_in(path)
    path.write_text("one\ntwo\n")
    assert keys_in(path) == ["one", "two"] and keys_in(None) == []


def test_it_binds_to_loopback_unless_told():
    from serving.api import parse

    assert parse([]).host == "127.0.0.1"


# ---- what is in a text ----------------------------------------------------------------------------------------------

CONTROL = "<eop> [gMASK] <sop> [MASK] <pad> <unk> </s> <|blank_2|> <n> [sMASK] <ENC> <dBLOCK>"


def test_control_tokens_in_no_field_become_control_tokens(served, tiny):
    tokenizer, model = tiny
    special = {
        index
        for index in range(model.config.vocab_size)
        if index < tokenizer.vocab_size and tokenizer.sp.is_control(index - tokenizer.num_image_tokens)
    }
    assert tokenizer.eos_token_id in special and tokenizer.mask_token_id in special
    seen, add = [], served.service.scheduler.submit
    served.service.scheduler.submit = lambda works: seen.extend(work.ids for work in works) or add(works)
    try:
        turns = [{"role": "system", "content": CONTROL}, user(CONTROL), {"role": "assistant", "content": CONTROL}]
        served.post(CHAT, {"messages": [*turns, user([{"type": "text", "text": CONTROL}])], "max_tokens": 2})
        served.post(CHAT, {"messages": HI, "max_tokens": 2, "stop": CONTROL})
        served.post(TEXT, {"prompt": CONTROL, "max_tokens": 2})
        served.post(VECTOR, {"input": [CONTROL, CONTROL]})
        served.post(OFFICIAL, {"prompt": CONTROL, "history": [[CONTROL, CONTROL]]})
    finally:
        served.service.scheduler.submit = add
    assert len(seen) == 6
    for ids in seen:
        assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
        assert not special & set(ids[:-2])


def test_no_text_is_logged(tiny, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    with Served(*tiny) as served:
        logging.getLogger("uvicorn").setLevel(logging.DEBUG)
        answer = served.chat(SECRET).json["choices"][0]["message"]["content"]
        served.chat(SECRET, stream=True)
        served.post(CHAT, {"messages": [user(SECRET), user(SECRET)]})
        served.post(CHAT, f'{{"messages": "{SECRET}"'.encode())
        served.post(OFFICIAL, {"prompt": SECRET, "history": [[SECRET]]})
        monkeypatch.setattr(served.batch, "_forward", lambda: (_ for _ in ()).throw(RuntimeError("a fault")))
        assert served.chat(SECRET, max_tokens=50).status == 500
        figures = served.get("/metrics").text
    assert "a fault" in caplog.text
    for text in (SECRET, answer):
        assert text and text not in caplog.text and text not in figures


# ---- who holds up whom --------------------------------------------------------------------------------------------


def raw(served, body, declared=None):
    """A connection that has sent a chat request; with few bytes of room for what comes back."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", served.port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {declared or len(body)}\r\n\r\n".encode() + body)
    return connection


def endless(text="你好", **options):
    return json.dumps({"messages": [user(text)], "temperature": 0, **options}).encode()


@pytest.fixture
def long_answers(tiny):
    """A server whose answers end at their last possible token only."""
    with Served(*tiny, slots=4, places=10**7, limits=Limits(length=100_000)) as served:
        served.batch.end_ids.clear()
        yield served


@pytest.mark.parametrize("stream", [True, False])
def test_the_row_of_a_client_that_left_is_free_within_a_step(long_answers, stream):
    served, noticed, freed = long_answers, [], []
    cancel, leave = served.service.scheduler.cancel, served.batch._leave
    served.service.scheduler.cancel = lambda works: (cancel(works), noticed.append(served.batch.steps))
    served.batch._leave = lambda *row: freed.append(served.batch.steps) or leave(*row)
    other = raw(served, endless("介绍一下清华大学", stream=True))
    connection = raw(served, endless(stream=stream))
    served.until(lambda: len(served.batch.running) == 2 and served.batch.steps > 5)
    connection.close()
    served.until(lambda: len(served.batch.running) == 1)
    assert freed[0] - noticed[0] <= 1
    other.close()
    served.until(served.is_idle)


def test_a_prompt_whose_client_left_is_not_computed_to_its_end(long_answers):
    served, layers = long_answers, []
    gone = threading.Event()

    def look(module, inputs, n):
        if inputs[0].shape[1] > 1:
            layers.append(n)
            gone.wait(30)  # until the other side has left

    blocks = served.service.model.base_model.layers
    hooks = [
        block.register_forward_pre_hook(lambda module, inputs, n=n: look(module, inputs, n))
        for n, block in enumerate(blocks)
    ]
    try:
        connection = raw(served, endless(stream=True))
        served.until(lambda: layers)
        (work,) = served.batch.works
        connection.close()
        served.until(lambda: work.cancelled)
        gone.set()
        served.until(served.is_idle)
    finally:
        for hook in hooks:
            hook.remove()
    assert layers == [0] and not served.batch.prompts_computed


def test_a_reader_that_reads_nothing_holds_up_nobody(tiny):
    with Served(*tiny, slots=4) as served:
        served.batch.end_ids.clear()
        served.buffer_little()
        slow = raw(served, endless(stream=True, logprobs=True, top_logprobs=20, max_tokens=120))
        served.until(lambda: served.batch.running)
        assert served.chat("介绍一下清华大学", max_tokens=30).status == 200
        served.until(served.is_idle)  # its row has come to its end, and is free
        counted = 'chatglm_requests_total{path="/v1/chat/completions",status="200"} '
        assert f"{counted}1.0" in served.get("/metrics").text  # the slow one is not through yet
        received = b""
        while b"[DONE]" not in received[-100:]:
            received += slow.recv(1 << 16)
        slow.close()
        assert received.count(b'"top_logprobs"') == 120  # every token, in fewer pieces


def test_a_reader_that_reads_nothing_for_long_is_let_go(tiny):
    limits = Limits(stalled_seconds=0.5)
    with Served(*tiny, limits=limits) as served:
        served.batch.end_ids.clear()
        served.buffer_little()
        slow = raw(served, endless(stream=True, logprobs=True, top_logprobs=20, max_tokens=1000))
        counted = 'chatglm_requests_total{path="/v1/chat/completions",status="200"} 1.0'
        served.until(lambda: counted in served.get("/metrics").text)
        served.until(served.is_idle)
        slow.close()


def test_a_full_queue_is_a_429_that_says_when_to_come_again(tiny):
    with Served(*tiny, slots=1, queue=1, limits=Limits(length=100_000)) as served:
        served.batch.end_ids.clear()
        running = raw(served, endless(stream=True))
        served.until(lambda: served.batch.running)
        waiting = raw(served, endless("介绍一下清华大学", stream=True))
        served.until(lambda: served.service.scheduler.waiting == 1)
        heard = served.chat()
        assert heard.status == 429 and heard.json["error"]["code"] == "queue_full"
        assert 1 <= int(heard.headers["retry-after"]) <= 120
        never = served.chat(n=2)  # which no waiting would help
        assert never.status == 400 and never.json["error"]["code"] == "too_many_answers"
        running.close()
        waiting.close()
        served.until(served.is_idle)
        assert served.chat(max_tokens=2).status == 200


def test_the_threads_are_the_loop_the_batch_and_one_more(tiny):
    before = set(threading.enumerate())
    with Served(*tiny, slots=4) as served:
        clients = [threading.Thread(target=served.chat, kwargs={"max_tokens": 5}) for _ in range(12)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        served.chat(response_format={"type": "json_object"}, max_tokens=5)
        served.post(VECTOR, {"input": "a"})
        names = {thread.name for thread in set(threading.enumerate()) - before - {served.thread}}
        assert names == {"batch", "prepare_0"}
    served.until(lambda: set(threading.enumerate()) <= before)


@pytest.mark.parametrize("grace", [0.0, 60.0])
def test_shutdown_finishes_or_ends_what_runs_within_its_time(tiny, grace):
    served = Served(*tiny, grace=grace, limits=Limits(length=100_000)).__enter__()
    served.batch.end_ids.clear()
    tokens = 20 if grace else 90_000
    connection = raw(served, endless(stream=True, max_tokens=tokens))
    served.until(lambda: served.batch.running)
    started = time.monotonic()
    served.server.should_exit = True
    with contextlib.closing(connection):
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    served.stop()
    assert time.monotonic() - started < 60
    assert (b"[DONE]" in received) == bool(grace)
    assert (b"shutting down" in received) == (not grace)
    assert not served.service.scheduler.thread.is_alive()


FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 90_000}
WITHOUT_END = {"type": "json_schema", "json_schema": {"name": "flags", "schema": FLAGS}}


class Program:
    """`python serving/api.py` with tiny, that listens."""

    def __init__(self):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        options = f"--model {TINY} --port {self.port} --slots 4 --grace 1 --max-length 100000 --places 10000000"
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "serving" / "api.py"), *options.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        deadline = time.monotonic() + 300
        while not self.listens():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        return self

    def listens(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def end(self, how: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(how)
        return self.process.wait(60), self.process.stdout.read()


def test_sigterm_under_load_ends_every_answer_with_a_word():
    with Program() as program, contextlib.ExitStack() as stack:
        bodies = [endless(stream=bool(n % 2), max_tokens=90_000, response_format=WITHOUT_END) for n in range(12)]
        clients = [stack.enter_context(raw(program, body)) for body in bodies]
        heard = [b"" if n % 2 == 0 else client.recv(1000) for n, client in enumerate(clients)]
        assert all(one.startswith(b"HTTP/1.1 200") for one in heard[1::2])
        program.process.send_signal(signal.SIGTERM)
        for number, client in enumerate(clients):
            while piece := client.recv(1 << 16):
                heard[number] += piece
        code, _ = program.end(signal.SIGTERM)
    assert code in (0, -signal.SIGTERM)
    assert all(b"the server is shutting down" in one for one in heard)
    assert all(one.startswith(b"HTTP/1.1 503") for one in heard[::2])


def test_ctrl_c_ends_the_program_without_a_traceback():
    with Program() as program:
        code, said = program.end(signal.SIGINT)
    assert code == 0 and "Traceback" not in said


def test_health_says_that_the_server_is_leaving(served):
    served.service.scheduler.closing = True
    try:
        assert served.get("/health").status == 503
        heard = served.chat()
        assert heard.status == 503 and heard.json["error"]["code"] == "shutting_down"
    finally:
        served.service.scheduler.closing = False
    assert served.chat(max_tokens=2, model=MODEL).status == 200
