"""The terminal chat, as a person uses it (on a pseudo-terminal) and piped."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_compat import make_folder

import cli_chat

ROOT = Path(__file__).resolve().parents[1]
GREETING = "你好👋！我是人工智能 ChatGLM-6B，可以回答问题。"
CTRL_C, CTRL_D = b"\x03", b"\x04"


@pytest.fixture(scope="module")
def talker(tmp_path_factory, golden, tiny_sp_model) -> Path:
    """A trained toy whose greedy answers are known."""
    return make_folder(tmp_path_factory.mktemp("cli") / "talker", golden / "model" / "chat2d", tiny_sp_model)


@pytest.fixture(scope="module")
def endless(tmp_path_factory, golden, tiny_sp_model) -> Path:
    """Random weights: talks until the context is full."""
    return make_folder(tmp_path_factory.mktemp("cli") / "endless", golden / "model" / "base2d", tiny_sp_model)


def command(model: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "cli_chat.py"), "--model", str(model), "--device", "cpu", "--greedy", *options]


class Terminal:
    """The program on a pseudo-terminal."""

    def __init__(self, argv: list[str]):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell ignores for its background jobs
            os.environ.update(TERM="xterm-256color", LANG="C.UTF-8", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
            os.execv(argv[0], argv)
        self.seen = ""
        self.raw = b""

    def type(self, keys: str | bytes) -> None:
        os.write(self.fd, keys if isinstance(keys, bytes) else keys.encode())

    def read(self, timeout: float) -> bool:
        """Take in what is there; False at the end of the program's output."""
        if select.select([self.fd], [], [], timeout)[0]:
            try:
                piece = os.read(self.fd, 65536)
            except OSError:  # Linux says EIO when the other end is closed
                return False
            self.raw += piece
            self.seen = self.raw.decode(errors="ignore").replace("\r\n", "\n")
            return bool(piece)
        return True

    def wait_for(self, text: str, after: int = 0, timeout: float = 60) -> int:
        """Wait until `text` is on the screen after position `after`; returns the position behind it."""
        deadline = time.monotonic() + timeout
        while text not in self.seen[after:]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen[after:]!r}"
            assert self.read(0.2) or text in self.seen[after:], f"ended without {text!r}: {self.seen[after:]!r}"
        return self.seen.index(text, after) + len(text)

    def exit_code(self, timeout: float = 30) -> int:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            self.read(0.1)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running: {self.seen[-300:]!r}")


def test_a_conversation_in_a_terminal(talker):
    pytest.importorskip("pty")
    terminal = Terminal(command(talker))
    at = terminal.wait_for(cli_chat.ASK.strip())
    assert "2 layers of 64, 1472 tokens, float32" in terminal.seen
    terminal.type("你好\n")
    at = terminal.wait_for(f"{cli_chat.ANSWER}{GREETING}\n", at)
    at = terminal.wait_for(cli_chat.ASK.strip(), at)
    assert terminal.seen.count("👋") == 1, "a part of the answer was drawn twice"

    terminal.type(CTRL_C)  # at the prompt: no exit
    at = terminal.wait_for("leaves)", at)
    at = terminal.wait_for(cli_chat.ASK.strip(), at)

    terminal.type("clear\n")
    at = terminal.wait_for(cli_chat.CLEAR_SCREEN, at)
    at = terminal.wait_for(cli_chat.ASK.strip(), at)
    terminal.type("写 code\n")
    at = terminal.wait_for("def f(x):\n    return x\t# ok", at)
    at = terminal.wait_for(cli_chat.ASK.strip(), at)
    terminal.type("stop\n")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(endless):
    """On the way: pasted lines are one question, and so are lines continued with a backslash."""
    pytest.importorskip("pty")
    pytest.importorskip("readline")
    terminal = Terminal(command(endless, "--max-length", "100000"))
    at = terminal.wait_for(cli_chat.ASK.strip())
    for question in (b"\x1b[200~one\ntwo\nthree\x1b[201~\n", b"four \\\nfive\n"):
        terminal.type(question)
        at = terminal.wait_for(cli_chat.ANSWER, at)
        begun = len(terminal.seen)
        while len(terminal.seen) < begun + 30:
            assert terminal.read(30)
        terminal.type(CTRL_C)
        at = terminal.wait_for("(stopped)", at)
        at = terminal.wait_for(cli_chat.ASK.strip(), at)
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0
    assert terminal.seen.count(cli_chat.ANSWER) == 2


def run(model: Path, typed: str, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command(model, *options), input=typed, capture_output=True, text=True, encoding="utf-8", env=environment
    )


def test_piped_questions_are_answered_line_by_line_until_the_end(talker):
    done = run(talker, "你好\n\nclear\nsay hi\n")
    assert done.returncode == 0, done.stderr
    answers = re.findall(rf"^{re.escape(cli_chat.ANSWER)}(.*)$", done.stdout, re.MULTILINE)
    assert answers == [GREETING, "Hi, how are you?"]
    assert cli_chat.CLEAR_SCREEN not in done.stdout


def test_dtype_and_bits_are_applied_and_shown(talker):
    done = run(talker, "say hi\nstop\nnever read\n", "--dtype", "bfloat16", "--bits", "4")
    assert done.returncode == 0, done.stderr
    assert "INT4 + bfloat16" in done.stdout
    assert done.stdout.count(cli_chat.ANSWER) == 1


def test_a_folder_that_is_none_gives_one_line_and_an_exit_code(tmp_path):
    done = run(tmp_path / "nowhere", "")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


class ScriptedModel:
    """Streams the given texts, and notes when its stream is closed."""

    def __init__(self, *texts: str):
        self.texts, self.closed = texts, False

    def stream_chat(self, tokenizer, query, history=None, **options):
        try:
            for text in self.texts:
                yield text, [*history, (query, text)]
        finally:
            self.closed = True


def test_an_answer_is_printed_once_whatever_is_rewritten_on_the_way(capsys):
    texts = ["", "[", "[[训", "[[训练时间]", "2023年", "2023年,", "2023年，你", "2023年，你好!", "2023年，你好！"]
    for text in texts:
        assert not any(mark in cli_chat.settled(text) for mark in "[,!")
    history = cli_chat.answer(None, ScriptedModel(*texts), "q", [], {})
    assert capsys.readouterr().out == f"{cli_chat.ANSWER}2023年，你好！\n"
    assert history == [("q", "2023年，你好！")]


def test_ctrl_c_closes_the_stream_and_keeps_what_was_said(capsys):
    class Interrupting(ScriptedModel):
        def stream_chat(self, tokenizer, query, history=None, **options):
            for item in super().stream_chat(tokenizer, query, history, **options):
                os.kill(os.getpid(), signal.SIGINT)
                yield item

    before = signal.getsignal(signal.SIGINT)
    model = Interrupting("one", "one two")
    history = cli_chat.answer(None, model, "q", [("a", "b")], {})
    assert model.closed
    assert history == [("a", "b"), ("q", "one")]
    assert capsys.readouterr().out == f"{cli_chat.ANSWER}one (stopped)\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_refused_question_leaves_the_history_as_it_was(capsys):
    class Refusing:
        def stream_chat(self, *args, **options):
            raise ValueError("prompt of 3000 tokens leaves no room")
            yield

    assert cli_chat.answer(None, Refusing(), "q", [("a", "b")], {}) == [("a", "b")]
    assert "leaves no room" in capsys.readouterr().out


def test_control_characters_never_reach_the_terminal():
    assert cli_chat.printable("a\x1b[2Jb\x07\x9b\n\tc") == "a[2Jb\n\tc"


def test_sampling_options_reach_the_model():
    given = ["--top-p", "0.5", "--temperature", "1.5", "--repetition-penalty", "1.1", "--max-length", "99"]
    expected = {"max_length": 99, "do_sample": True, "top_p": 0.5, "temperature": 1.5, "repetition_penalty": 1.1}
    assert cli_chat.sampling(cli_chat.parse(given)) == {**expected, "answer_room": 49}
    greedy = {"max_length": 2048, "do_sample": False, "answer_room": cli_chat.ANSWER_ROOM}
    assert cli_chat.sampling(cli_chat.parse(["--greedy"])) == greedy
