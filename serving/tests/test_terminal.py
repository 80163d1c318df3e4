"""The terminal chat with rich and prompt_toolkit, judged by what is on the screen."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

for library in ("pty", "termios", "pyte", "prompt_toolkit", "rich"):
    pytest.importorskip(library)

import termios  # noqa: E402

import pyte  # noqa: E402
from rich.console import Console  # noqa: E402
from terminal import Terminal  # noqa: E402

from serving import screen  # noqa: E402

WIDTH, HEIGHT = 60, 14
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"
DOCUMENT = """第一行，
second line with **bold**, <b>html</b> and 2 * 3 * 4

| 名称 | 值 |
| --- | ---: |
| 长一点的名字 | 1 |

```python
def f(x):
    return x  # 注释
```

1. one
2. two

the end 👋！"""


def lines_of(written: str) -> list[str]:
    """What is on a screen of this size, and above it, after these bytes."""
    shown = pyte.HistoryScreen(WIDTH, HEIGHT, history=1000)
    pyte.Stream(shown).feed(written.replace("\n", "\r\n"))
    above = ["".join(line[x].data for x in range(WIDTH)) for line in shown.history.top]
    return [line.rstrip() for line in [*above, *shown.display]]


def answered(monkeypatch, pieces: list[str], note: str = "") -> list[str]:
    """The screen after an answer whose text was each of the pieces in turn."""
    monkeypatch.setattr(screen, "REDRAWN", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=HEIGHT, highlight=False)
    answer = screen.MarkdownAnswer(console)
    for text in pieces:
        answer.show(text)
    answer.finish(pieces[-1], note)
    return [line for line in lines_of(console.file.getvalue()) if line]


def growing(text: str) -> list[str]:
    return [text[:length] for length in range(1, len(text) + 1)]


def test_markdown_is_drawn_once_and_as_if_it_had_come_at_once(monkeypatch):
    lines = answered(monkeypatch, growing(DOCUMENT))
    assert lines == answered(monkeypatch, [DOCUMENT])
    text = "\n".join(lines)
    assert lines[:3] == ["ChatGLM>", "第一行，", "second line with bold, <b>html</b> and 2 * 3 * 4"]
    assert " 长一点的名字   1" in lines
    assert "     return x  # 注释" in lines and "```" not in text
    assert lines[-3:] == [" 1 one", " 2 two", "the end 👋！"]


def test_a_block_longer_than_the_screen_is_followed_and_in_the_end_whole(monkeypatch):
    code = "```\n" + "\n".join(f"line {n}" for n in range(50))
    lines = answered(monkeypatch, growing(code + "\n```"))
    assert [line.strip() for line in lines[1:]] == [f"line {n}" for n in range(50)]
    monkeypatch.setattr(screen, "REDRAWN", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=HEIGHT)
    answer = screen.MarkdownAnswer(console)
    answer.show(code)
    on_screen = "\n".join(lines_of(console.file.getvalue())[-HEIGHT:])
    assert "line 49" in on_screen and "line 3\n" not in on_screen, "the end of what grows is what is looked at"
    answer.finish(code, "")


def test_what_was_printed_and_has_changed_is_printed_once_more(monkeypatch):
    lines = answered(monkeypatch, ["one\n\ntwo", "ONE\n\ntwo"], note="(stopped)")
    assert lines == ["ChatGLM>", "one", "ONE", "two", "(stopped)"]


def test_control_characters_do_not_reach_the_screen(monkeypatch):
    assert answered(monkeypatch, ["a\x1b[2Jb\x07c"])[1:] == ["a[2Jbc"]


@pytest.mark.parametrize("text", ["para", "- a\n- b", "- a\n\n  b", "```\na\n\nb", "> a\nb", "| a |\n| - |\n| b |"])
def test_the_last_block_is_never_taken_for_finished(text):
    assert screen.finished(text) == 0
    assert screen.finished(f"first\u2028\n\n{text}") == len("first\u2028\n\n")


def test_a_person_types_edits_pastes_goes_back_and_interrupts():
    program = [sys.executable, str(ROOT / "cli_chat.py"), "--device", "cpu", "--greedy"]
    terminal = Terminal(program, PROMPT_TOOLKIT_NO_CPR="1", COLUMNS=str(WIDTH), LINES=str(HEIGHT))
    terminal.resize(HEIGHT, WIDTH)

    def screen_has(text: str) -> None:
        terminal.wait_until(lambda: text in "\n".join(lines_of(terminal.raw.decode(errors="ignore"))), text)

    screen_has("You>")
    terminal.type("你好吗啊")
    terminal.type(b"\x7f\x7f")  # two wide characters are taken back
    screen_has("You> 你好\n")
    terminal.type("\r")
    screen_has("很高兴见到你！")
    terminal.type(b"\x1b[200~1+1\n=?\x1b[201~")  # a paste of two lines is sent by Enter alone
    screen_has("...> =?")
    terminal.type(CTRL_C)
    screen_has("(stop or Ctrl-D leaves)")
    terminal.type(UP)
    screen_has("You> 你好\n")
    terminal.type("\x01\x0b/set temperature 0.5\r")
    screen_has("temperature 0.5")
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.seen


TALK = """
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
from serving import cli

class Model:
    def stream_chat(self, tokenizer, query, history, **options):
        yield "slowly", [(query, "slowly")]
        for line in open(sys.argv[2]):
            if "fault" in line:
                raise KeyError("a fault of the program")
        yield f"slowly heard {query!r}", [(query, query)]

options = cli.parse(["--greedy", *sys.argv[3:]])
tokenizer = SimpleNamespace(build_chat_input_ids=lambda query, history: [0])
cli.converse(cli.Conversation(tokenizer, Model(), options, cli.open_terminal(options.plain)))
"""


class Talk:
    """A conversation with a model whose answers wait for a line in a pipe."""

    def __init__(self, folder: Path, *options: str):
        self.gate = folder / "gate"
        os.mkfifo(self.gate)
        program = [sys.executable, "-c", TALK, str(ROOT), str(self.gate), *options]
        self.terminal = Terminal(program, PROMPT_TOOLKIT_NO_CPR="1", COLUMNS=str(WIDTH), LINES=str(HEIGHT))
        self.terminal.resize(HEIGHT, WIDTH)
        self.found = self.settings()
        self.sees("You>")

    def settings(self) -> list:
        return termios.tcgetattr(self.terminal.fd)

    def lines(self) -> list[str]:
        return [line for line in lines_of(self.terminal.raw.decode(errors="ignore")) if line]

    def sees(self, text: str) -> None:
        self.terminal.wait_until(lambda: text in "\n".join(self.lines()), text)

    def ask(self, text: str) -> None:
        self.terminal.type(f"{text}\r")
        self.sees("slowly")
        self.terminal.wait_until(lambda: not self.settings()[3] & termios.ECHO, "a terminal that echoes nothing")

    def go_on(self, line: str = "go") -> None:
        def is_told() -> bool:
            try:  # fails while nobody reads, where it would wait for ever
                gate = os.open(self.gate, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                return False
            with open(gate, "w") as file:
                file.write(f"{line}\n")
            return True

        self.terminal.wait_until(is_told, "a program that waits at its gate")


@pytest.mark.parametrize("options", [[], ["--plain"]], ids=["rich", "plain"])
def test_keys_typed_during_an_answer_wait_for_the_next_question_unseen(tmp_path, options):
    talk = Talk(tmp_path, *options)
    talk.ask("one")
    talk.terminal.type("二 twx\x7fo")
    time.sleep(0.5)  # an echo would come at once
    talk.terminal.read(0)
    assert "tw" not in "\n".join(talk.lines())
    talk.go_on()
    talk.sees("heard 'one'")
    talk.sees("You> 二 two")
    assert "\n".join(talk.lines()).count("二 two") == 1
    talk.terminal.type("\r")
    talk.go_on()
    talk.sees("heard '二 two'")
    talk.terminal.type("stop\r")
    assert talk.terminal.exit_code() == 0
    assert talk.settings() == talk.found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("answering", [True, False], ids=["answering", "asking"])
def test_a_signal_ends_the_program_and_the_terminal_is_as_it_was(tmp_path, number, answering):
    talk = Talk(tmp_path)
    if answering:
        talk.ask("one")
    os.kill(talk.terminal.pid, number)
    assert talk.terminal.exit_code() == -number
    assert talk.settings() == talk.found


def test_an_exception_ends_the_program_and_the_terminal_is_as_it_was(tmp_path):
    talk = Talk(tmp_path)
    talk.ask("one")
    talk.go_on("fault")
    talk.terminal.wait_for("a fault of the program")
    assert talk.terminal.exit_code() == 1
    assert talk.settings() == talk.found
