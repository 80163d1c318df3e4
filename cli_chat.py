"""Chat in a terminal: `python cli_chat.py --model FOLDER-OR-HUB-ID`.

Answers appear as they are made. `clear` forgets the conversation and clears the screen, `stop` or Ctrl-D leaves, and
Ctrl-C stops an answer but not the program. A line that ends with a backslash goes on in the next one, and a pasted
text of several lines is one question. With piped input every line is one question.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

HELP = "clear: forget the conversation · stop or Ctrl-D: leave · Ctrl-C: stop an answer\n清空对话: clear · 退出: stop"
ASK, ANSWER = "\nYou> ", "ChatGLM> "
CLEAR_SCREEN = "\x1b[2J\x1b[3J\x1b[H"  # screen, scroll-back, cursor home
ANSWER_ROOM = 256  # tokens; a long conversation loses its oldest rounds before it loses these
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# What `process_response` may still change when more text arrives: a mark that becomes full-width before a Chinese
# character, and the beginning of the placeholder of the training date.
UNSETTLED_MARKS = ",!:;?"
PLACEHOLDER = "[[训练时间]]"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    prepare_streams()
    try:
        tokenizer, model = load(options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"cannot load {options.model}: {error}", file=sys.stderr)
        return 1
    if options.seed is not None:
        torch.manual_seed(options.seed)
    converse(tokenizer, model, sampling(options))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--model", default=str(here / "tiny"), help="folder or Hub id (default: the tiny one here)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the checkpoint's own")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: the first GPU, else the CPU)")
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=0, help="quantize the loaded weights")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and answer together")
    parser.add_argument("--top-p", type=float, default=0.7)
    parser.add_argument("--temperature", type=float, default=0.95)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, help="make sampled answers repeatable")
    return parser.parse_args(arguments)


def sampling(options: argparse.Namespace) -> dict:
    """The keyword arguments of `stream_chat` that the options ask for."""
    chosen = {"max_length": options.max_length, "do_sample": not options.greedy}
    chosen["answer_room"] = min(ANSWER_ROOM, options.max_length // 2)
    if not options.greedy:
        chosen.update(top_p=options.top_p, temperature=options.temperature)
    if options.repetition_penalty != 1.0:
        chosen["repetition_penalty"] = options.repetition_penalty
    return chosen


def load(options: argparse.Namespace) -> tuple:
    """Load tokenizer and model, say what was loaded, and return both."""
    from transformers import AutoModel, AutoTokenizer  # slow to import: after --help

    print(f"loading {options.model} …", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True).eval()
    if options.dtype:
        model = model.to(DTYPES[options.dtype])
    if options.bits:
        model = model.quantize(options.bits)
    model = model.to(options.device or best_device())
    print(describe(model), flush=True)
    return tokenizer, model


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe(model: torch.nn.Module) -> str:
    """One line: the code's version, layers, width, precision, device, and the memory that the weights take."""
    config = model.config
    version = getattr(sys.modules[type(config).__module__], "CODE_VERSION", "1")  # of the folder's code, which runs
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    precision = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    if config.quantization_bit:
        precision = f"INT{config.quantization_bit} + {precision}"
    return (
        f"code {version}, {config.num_layers} layers of {config.hidden_size}, {config.vocab_size} tokens, "
        f"{precision}, {size / 1e6:,.1f} MB of weights on {model.device}"
    )


def converse(tokenizer, model, options: dict) -> None:
    """Questions and answers until `stop` or the end of the input."""
    history: list = []
    print(f"\n{HELP}")
    while True:
        try:
            query = read_query()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(stop or Ctrl-D leaves)")
            continue
        if query.strip() == "stop":
            return
        if query.strip() == "clear":
            history = []
            clear_screen()
            print(HELP)
        elif query.strip():
            history = answer(tokenizer, model, query, history, options)


def read_query() -> str:
    """One question; a backslash at the end of a line continues it."""
    interactive = sys.stdin.isatty()
    line = input(ASK if interactive else "")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("...> " if interactive else "")
    if not interactive:
        print(f"{ASK}{line}")  # so that a log of a piped conversation can be read
    return line


def answer(tokenizer, model, query: str, history: list, options: dict) -> list:
    """Show the answer while it is made; return the history with what was made of it."""
    print(ANSWER, end="", flush=True)
    screen, response = Screen(), ""
    try:
        with ctrl_c() as pressed:
            stream = model.stream_chat(tokenizer, query, history=history, **options)
            for response, longer in stream:
                history = longer
                screen.show(settled(response))
                if pressed:
                    break
            stream.close()
    except KeyboardInterrupt:  # pressed twice, or while a long prompt was read
        pressed = [signal.SIGINT]
    except (
        ValueError,
        RuntimeError,
    ) as error:  # too long a prompt, non-finite logits, no memory: the model says which
        print(f"\n{error}", end="")
    screen.show(response)
    print(" (stopped)" if pressed else "", flush=True)
    return history


class Screen:
    """Prints a growing text by its new part alone, so that wide characters are never drawn twice."""

    def __init__(self) -> None:
        self.shown = ""

    def show(self, text: str) -> None:
        text = printable(text)
        if not text.startswith(self.shown):
            if self.shown.startswith(text):
                return  # a part that was held back; it comes with the next piece
            print()  # something that was printed has changed: print the whole once more
            self.shown = ""
        print(text[len(self.shown) :], end="", flush=True)
        self.shown = text


def settled(response: str) -> str:
    """The part of an unfinished answer that later text cannot change."""
    for length in range(min(len(PLACEHOLDER) - 1, len(response)), 0, -1):
        if PLACEHOLDER.startswith(response[-length:]):
            response = response[:-length]
            break
    return response.rstrip(UNSETTLED_MARKS)


def printable(text: str) -> str:
    """Without control characters, which could move the cursor or change the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


@contextmanager
def ctrl_c() -> Iterator[list]:
    """Collects Ctrl-C in the yielded list; a second one interrupts at once."""
    pressed: list = []

    def note(number, frame) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def clear_screen() -> None:
    if not sys.stdout.isatty():
        return
    if os.name == "nt":
        os.system("cls")
    else:
        print(CLEAR_SCREEN, end="", flush=True)


def prepare_streams() -> None:
    """Line editing where there is any, and no crash on bytes that are not text in the terminal's encoding."""
    with suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text arrives whole, line ends included
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
