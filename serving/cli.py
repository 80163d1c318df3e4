"""Chat in a terminal: `python cli_chat.py --model FOLDER-OR-HUB-ID`.

Answers appear as they are made, as Markdown where rich and prompt_toolkit are installed. `clear` forgets the
conversation and clears the screen, `stop`, `exit`, `quit` or Ctrl-D leaves, and Ctrl-C stops an answer but not the
program; a slash before a word is fine, and /help lists them. A line that ends with a backslash goes on in the next
one, and a pasted text of several lines is one question. Piped input is UTF-8, and every line of it one question.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from serving.loading import DTYPES, load  # noqa: E402
from serving.rounds import latest_rounds  # noqa: E402
from serving.screen import PlainTerminal, left_as_found, open_terminal, without_echo  # noqa: E402

HELP = (
    "clear: forget the conversation · stop, exit or Ctrl-D: leave · Ctrl-C: stop an answer\n"
    "/system TEXT · /set NAME VALUE · /save FILE · /load FILE · \\ before Enter: a new line\n"
    "清空对话: clear · 退出: stop · /help: this"
)
LEAVE, CLEAR = ("stop", "exit", "quit", "/bye"), "clear"
WITH_TEXT = ("/system", "/set", "/save", "/load")
INTERRUPTED = 130  # the exit code that shells give to Ctrl-C


def number(kind: type, least: float, most: float, above: bool = False) -> Callable[[str], float]:
    """A reader of numbers from `least` (or above it) to `most`; its ValueError names both."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or (above and value == least):
            whole, start = "a whole number" if kind is int else "a number", "above" if above else "from"
            raise argparse.ArgumentTypeError(f"{text!r}: give {whole} {start} {least:g} to {most:g}")
        return value

    return read


def switch(text: str) -> bool:
    if text.lower() not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r}: say on or off")
    return text.lower() == "on"


SETTINGS = {  # of /set and of the command line: reader, default, help
    "max_length": (number(int, 1, 2**31 - 1), 2048, "tokens of prompt and answer together"),
    "top_p": (number(float, 0, 1, above=True), 0.7, "sample from the likeliest tokens that have this share"),
    "temperature": (number(float, 0, 100, above=True), 0.95, "below 1 the likely gets likelier"),
    "repetition_penalty": (number(float, 0, 100, above=True), 1.0, "above 1 what was said gets unlikelier"),
    "seed": (number(int, 0, 2**63 - 1), None, "make sampled answers repeatable"),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    terminal = open_terminal(options.plain, options.history)
    try:
        tokenizer, model = load(options.model, options.dtype, options.bits, options.device)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"cannot load {options.model}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped while loading", file=sys.stderr)
        return INTERRUPTED
    converse(Conversation(tokenizer, model, options, terminal))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / "tiny"), help="folder or Hub id (default: the tiny one here)")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--device", help="cpu, cuda, cuda:1, mps … (default: the first GPU, else the CPU)")
    add("--bits", type=int, choices=(0, 4, 8), default=0, help="quantize the loaded weights")
    for name, (reader, default, meaning) in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", type=reader, default=default, help=meaning, metavar=name.upper())
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--plain", action="store_true", help="no Markdown, no colours (as where NO_COLOR is set)")
    add("--history", type=Path, metavar="FILE", help="keep the questions there, for the arrow keys of the next time")
    return parser.parse_args(arguments)


def sampling(options: argparse.Namespace) -> dict:
    """The keyword arguments of `stream_chat` that the options ask for."""
    chosen = {"max_length": options.max_length, "do_sample": not options.greedy}
    if not options.greedy:
        chosen.update(top_p=options.top_p, temperature=options.temperature)
    if options.repetition_penalty != 1.0:
        chosen["repetition_penalty"] = options.repetition_penalty
    return chosen


def command(query: str) -> tuple[str, str]:
    """What a line orders, and the text behind it: a word of LEAVE, CLEAR or WITH_TEXT, "/help" for any other word
    with a slash, "" for a question."""
    word, _, text = query.strip().partition(" ")
    if word.lower() in WITH_TEXT:
        return word.lower(), text.strip()
    word = query.strip().lower()
    known = next((order for order in (*LEAVE, CLEAR) if word in (order, f"/{order}")), "")
    return known or ("/help" if re.fullmatch(r"/[a-z?]+", word) else ""), ""


class CtrlC:
    """Ctrl-C during a conversation: an exception while a question is typed, at all other times a note."""

    def __init__(self) -> None:
        self.pressed = self.raises = False

    def __enter__(self) -> CtrlC:
        self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self.before)

    def note(self, signum, frame) -> None:
        self.pressed = True
        if self.raises:
            self.raises = False  # once: the next one may come while this one is dealt with
            raise KeyboardInterrupt

    def while_typing(self, ask: Callable[[], str]) -> str:
        try:
            self.raises = True
            return ask()
        finally:
            self.raises, self.pressed = False, False


class Conversation:
    """What was said and what is set."""

    def __init__(self, tokenizer, model, options: argparse.Namespace, terminal: PlainTerminal):
        self.tokenizer, self.model, self.options, self.terminal = tokenizer, model, options, terminal
        self.messages: list[dict] = []
        self.file: Path | None = None  # that the conversation was saved to or loaded from
        self.ctrl_c = CtrlC()
        if options.seed is not None:
            self.set(f"seed {options.seed}")

    def hear(self, query: str) -> bool:
        """Does what a line asks for; whether the conversation goes on."""
        order, text = command(query)
        if order in LEAVE:
            return False
        if order == CLEAR:
            self.messages, self.file = self.messages[: self.has_system], None
            self.terminal.clear()
        if order in WITH_TEXT:
            try:
                self.terminal.say(getattr(self, order[1:])(text))
            except (OSError, ValueError, argparse.ArgumentTypeError) as error:
                self.terminal.say(str(error))
        elif order:
            self.terminal.say(HELP)
        elif query.strip():
            with without_echo():
                self.answer(query)
        return True

    @property
    def has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    def answer(self, query: str) -> None:
        """Shows the answer while it is made, and keeps what was made of it."""
        from package import package_module

        settled = package_module("chat").settled
        answer, response, note = self.terminal.begin_answer(), "", ""
        before, asked = self.messages, {"role": "user", "content": query}
        try:
            told = latest_rounds(self.tokenizer, query, before, self.options.max_length)
            stream = self.model.stream_chat(self.tokenizer, query, history=told, **sampling(self.options))
            for response, _ in stream:
                self.messages = [*before, asked, {"role": "assistant", "content": response}]
                answer.show(settled(response))
                if self.ctrl_c.pressed:
                    note = "(stopped)"
                    break
            stream.close()
        except (ValueError, RuntimeError) as error:  # too long a prompt, non-finite logits, no memory: it says which
            note = f"({error})"
        answer.finish(response, note)

    # ---- the commands with a text: each returns what is to be said ----
    def system(self, text: str) -> str:
        rounds = self.messages[self.has_system :]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rounds]
        return "the system message is set, from the next answer on" if text else "no system message any more"

    def set(self, text: str) -> str:
        name, _, value = text.replace("=", " ").partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if name == "greedy" and value:
            self.options.greedy = switch(value)
        elif name in SETTINGS and value:
            setattr(self.options, name, SETTINGS[name][0](value))
            self.options.greedy &= name not in ("top_p", "temperature")  # without sampling they have no effect
        elif text:
            raise ValueError(f"/set {text}: give one of {', '.join((*SETTINGS, 'greedy'))}, and a value")
        if name == "seed":
            import torch

            torch.manual_seed(self.options.seed)
        return ", ".join(f"{name} {getattr(self.options, name)}" for name in (*SETTINGS, "greedy"))

    def save(self, text: str) -> str:
        file = Path(text).expanduser() if text else self.file
        if file is None:
            raise ValueError("/save: give the name of a file")
        if file.exists() and file != self.file:
            raise ValueError(f"{file} is there already: give another name")
        file.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        self.file = file
        return f"{len(self.messages)} messages are in {file}"

    def load(self, text: str) -> str:
        if not text:
            raise ValueError("/load: give the name of a file that /save wrote")
        file = Path(text).expanduser()
        messages = json.loads(file.read_text(encoding="utf-8"))  # a JSONDecodeError is a ValueError
        self.tokenizer.build_prompt("", messages)  # a ValueError that names what is no conversation
        self.messages, self.file = as_messages(messages), file
        return "\n\n".join(f"{one['role']}: {one['content']}" for one in self.messages)


def as_messages(history: list) -> list[dict]:
    """(question, answer) pairs, or messages, as messages."""
    if history and isinstance(history[0], dict):
        return [{"role": one["role"], "content": one["content"]} for one in history]
    pairs = (zip(("user", "assistant"), pair) for pair in history)
    return [{"role": role, "content": text} for pair in pairs for role, text in pair]


def converse(conversation: Conversation) -> None:
    """Questions and answers until `stop` or the end of the input."""
    terminal = conversation.terminal
    terminal.say(f"\n{HELP}")
    with left_as_found(), conversation.ctrl_c as ctrl_c:
        while True:
            try:
                query = ctrl_c.while_typing(terminal.ask)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(stop or Ctrl-D leaves)")
                continue
            if not conversation.hear(query):
                return


if __name__ == "__main__":
    sys.exit(main())
