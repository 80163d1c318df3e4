"""What a terminal shows and what is typed into it: plain text, or Markdown (rich) and editing (prompt_toolkit)."""

from __future__ import annotations

import locale
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import termios
except ImportError:  # Windows, whose console shows nothing of what is typed until it is read
    termios = None

ASK, GO_ON, ANSWER = "You> ", "...> ", "ChatGLM> "
CLEAR_SCREEN = "\x1b[2J\x1b[3J\x1b[H"  # screen, scroll-back, cursor home
REDRAWN = 0.1  # seconds between two drawings of an unfinished block


def printable(text: str) -> str:
    """Without control characters, which could move the cursor or change the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def open_terminal(plain: bool = False, history: Path | None = None) -> PlainTerminal:
    """The richest terminal that there is: plain text where something is piped, where NO_COLOR is set, and where the
    two libraries are missing."""
    prepare_streams()
    is_screen = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if plain or not is_screen or os.environ.get("NO_COLOR"):
        return PlainTerminal()
    try:
        return RichTerminal(history)
    except ImportError:
        print("(plain text: `pip install -r serving/requirements-chat.txt` brings Markdown and better editing)")
        return PlainTerminal()


def prepare_streams() -> None:
    """UTF-8 in pipes whatever the system's code page, and no crash on other bytes."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        piped = not stream.isatty() and "PYTHONIOENCODING" not in os.environ
        stream.reconfigure(errors="replace", **({"encoding": "utf-8"} if piped else {}))


@contextmanager
def left_as_found() -> Iterator[None]:
    """Gives the terminal its settings back in the end, also when an exception or a signal ends the program."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    found = termios.tcgetattr(sys.stdin)

    def end(number, frame) -> None:
        if os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():  # else the settings are another program's
            termios.tcsetattr(sys.stdin, termios.TCSANOW, found)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, end) for number in signals}
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, found)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def without_echo() -> Iterator[None]:
    """What is typed meanwhile is not shown, and waits for the next question."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    found = termios.tcgetattr(sys.stdin)
    silent = [*found[:3], found[3] & ~termios.ECHO, *found[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, found)


class PlainTerminal:
    """Lines in, text out."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        if self.interactive:
            prepare_editing()

    def ask(self) -> str:
        """One question; a backslash at the end of a line continues it."""
        line = input(f"\n{ASK}" if self.interactive else "")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(GO_ON if self.interactive else "")
        if not self.interactive:
            print(f"\n{ASK}{line}")  # so that a log of a piped conversation can be read
        return line

    def say(self, text: str) -> None:
        print(text, flush=True)

    def clear(self) -> None:
        if not sys.stdout.isatty():
            return
        if os.name == "nt":
            os.system("cls")
        else:
            print(CLEAR_SCREEN, end="", flush=True)

    def begin_answer(self) -> PlainAnswer:
        return PlainAnswer()


class PlainAnswer:
    """Prints a growing text by its new part alone, so that wide characters are never drawn twice."""

    def __init__(self) -> None:
        self.shown = ""
        print(ANSWER, end="", flush=True)

    def show(self, text: str) -> None:
        text = printable(text)
        if not text.startswith(self.shown):
            if self.shown.startswith(text):
                return  # a part that was held back; it comes with the next piece
            print()  # something that was printed has changed: print the whole once more
            self.shown = ""
        print(text[len(self.shown) :], end="", flush=True)
        self.shown = text

    def finish(self, text: str, note: str) -> None:
        self.show(text)
        print(f" {note}" if note else "", flush=True)


def prepare_editing() -> None:
    """Chinese is typed and deleted by characters, and a tab is a tab. In the locale C, which Python reads as UTF-8 and
    readline as bytes with Alt, that takes a locale of UTF-8 and three settings."""
    if locale.setlocale(locale.LC_CTYPE) in ("C", "POSIX"):
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    with suppress(ImportError):
        import readline

        for setting in ("convert-meta off", "input-meta on", "output-meta on", "disable-completion on"):
            readline.parse_and_bind(f"set {setting}")
        readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text arrives whole, line ends included


class RichTerminal(PlainTerminal):
    """Questions over several lines, edited by prompt_toolkit; answers as Markdown, drawn by rich."""

    def __init__(self, history: Path | None = None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from rich.console import Console

        self.console = Console(highlight=False)
        self.session = PromptSession(
            multiline=True,  # what is pasted stays as it is
            key_bindings=keys(),
            prompt_continuation=GO_ON,
            history=FileHistory(str(history)) if history else InMemoryHistory(),
        )

    def ask(self) -> str:
        print()
        return self.session.prompt(ASK)

    def begin_answer(self) -> MarkdownAnswer:
        return MarkdownAnswer(self.console)


def keys():
    """Enter sends, unless a backslash is before it; Alt-Enter begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class MarkdownAnswer:
    """Draws a growing text: finished blocks for good, the one that grows again and again."""

    def __init__(self, console) -> None:
        from rich.live import Live

        self.console, self.printed, self.drawn = console, "", 0.0
        console.print(ANSWER.strip(), style="bold green")
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible")
        self.live.start()

    def show(self, text: str) -> None:
        if time.monotonic() < self.drawn + REDRAWN:
            return
        text = printable(text)
        if text.startswith(self.printed):
            self.print_blocks(text[: len(self.printed) + finished(text[len(self.printed) :])])
            self.live.update(Tail(markdown(text[len(self.printed) :])), refresh=True)
        self.drawn = time.monotonic()

    def print_blocks(self, text: str) -> None:
        new = text[len(self.printed) :]
        if new.strip():
            if self.printed:
                self.console.print()
            self.console.print(markdown(new))
            self.printed = text

    def finish(self, text: str, note: str) -> None:
        text = printable(text)
        self.live.update("", refresh=True)
        self.live.stop()
        if not text.startswith(self.printed):
            self.printed = ""  # something that was printed has changed: print the whole once more
        self.print_blocks(text)
        if note:
            self.console.print(note, style="dim", markup=False)


class Tail:
    """The last lines of a block, as many as the screen has."""

    def __init__(self, block) -> None:
        self.block = block

    def __rich_console__(self, console, options):
        from rich.segment import Segment

        lines = console.render_lines(self.block, options, pad=False)
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line
            yield Segment.line()


def parser():
    """CommonMark with tables; HTML is text, since it would not be shown."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def markdown(text: str):
    """Text as rich draws it; a line of the text stays a line."""
    from rich.markdown import Markdown

    drawn = Markdown(text, code_theme="ansi_dark", hyperlinks=False)
    drawn.parsed = parser().parse(text)
    for token in drawn.parsed:
        for part in token.children or ():
            if part.type == "softbreak":
                part.type, part.tag = "hardbreak", "br"
    return drawn


def finished(text: str) -> int:
    """Characters of the blocks that no later text can change: all but the last."""
    starts = [token.map[0] for token in parser().parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    return sum(len(line) + 1 for line in text.split("\n")[: starts[-1]]) if len(starts) > 1 else 0
