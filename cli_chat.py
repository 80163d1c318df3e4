"""Chat in a terminal: `python cli_chat.py --model FOLDER-OR-HUB-ID`.

Answers appear as they are made. `clear` forgets the conversation and clears the screen, `stop`, `exit`, `quit` or
Ctrl-D leaves, and Ctrl-C stops an answer but not the program; a slash before a word is fine, and /help lists them. A
line that ends with a backslash goes on in the next one, and a pasted text of several lines is one question. Piped
input is UTF-8, and every line of it one question.
"""

from __future__ import annotations

import argparse
import locale
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HELP = (
    "clear: forget the conversation · stop, exit, quit or Ctrl-D: leave · Ctrl-C: stop an answer · /help: this line\n"
    "清空对话: clear · 退出: stop"
)
LEAVE, CLEAR = ("stop", "exit", "quit", "/bye"), "clear"
ASK, ANSWER = "\nYou> ", "ChatGLM> "
CLEAR_SCREEN = "\x1b[2J\x1b[3J\x1b[H"  # screen, scroll-back, cursor home
ANSWER_ROOM = 256  # tokens; a long conversation loses its oldest rounds before it loses these
DTYPES = ("bfloat16", "float16", "float32")
INTERRUPTED = 130  # the exit code that shells give to Ctrl-C
HUB_PATIENCE = 10  # seconds
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
    except KeyboardInterrupt:
        print("\nstopped while loading", file=sys.stderr)
        return INTERRUPTED
    if options.seed is not None:
        import torch

        torch.manual_seed(options.seed)
    converse(tokenizer, model, sampling(options))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--model", default=str(here / "tiny"), help="folder or Hub id (default: the tiny one here)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
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
    print(f"loading {options.model} …", flush=True)
    where = find(options.model)
    import torch  # both are slow to import: after --help, a sign of life and what can be wrong
    from transformers import AutoModel, AutoTokenizer

    device = usable_device(options.device)

    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=True)
    model = AutoModel.from_pretrained(**where, trust_remote_code=True).eval()
    if options.dtype:
        model = model.to(getattr(torch, options.dtype))
    if options.bits:
        model = model.quantize(options.bits)
    model = model.to(device)
    print(describe(model), flush=True)
    return tokenizer, model


def usable_device(asked: str | None) -> str:
    """The device asked for, else the first GPU, else the CPU; ValueError where this PyTorch cannot use it."""
    import torch

    if asked is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: built without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {asked!r} is of no use here: {reason}") from error
    return asked


def find(name: str) -> dict:
    """What `name` means, as arguments of from_pretrained: a folder, or a model of the Hub.

    Judged before transformers is asked, which answers a mistyped path with minutes of retries or with a message about
    something else. ValueError says what is wrong and what helps.
    """
    folder = Path(name).expanduser()
    if not name:
        raise ValueError("the name is empty; give a folder or the id of a model on the Hub")
    if folder.is_dir():
        refuse_incomplete(folder)
        return {"pretrained_model_name_or_path": str(folder)}
    if folder.exists():
        raise ValueError("this is a file; give the folder that it lies in")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) or name.startswith("."):
        raise ValueError("there is no such folder")
    return find_on_hub(name)


def refuse_incomplete(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError("there is no config.json in this folder, so it is none of a model")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            f"there is no tokenizer_config.json in this folder: `python slim.py {folder} OUTPUT --repackage` makes a "
            "complete one of it (with the ice_text.model of ChatGLM-6B in it)"
        )


def find_on_hub(name: str) -> dict:
    """One short question to the Hub; without an answer, what an earlier download left in the cache."""
    import huggingface_hub
    from huggingface_hub.utils import HfHubHTTPError

    arguments = {"pretrained_model_name_or_path": name}
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_PATIENCE)
    except HfHubHTTPError as error:
        reason = str(error).strip().partition("\n")[0]
        if getattr(error.response, "status_code", 500) in (401, 403, 404):
            message = f"there is no folder of this name here, and no model on the Hub that you may read ({reason})"
            raise ValueError(message) from error
    except Exception as error:  # each version has its own for no network, for a time-out and for HF_HUB_OFFLINE
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    else:
        return arguments
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        print("the Hub does not answer: this is the copy of an earlier download", flush=True)
        return {**arguments, "local_files_only": True}
    raise ValueError(f"there is no folder of this name here, and the Hub does not answer ({reason})")


def describe(model) -> str:
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
        order = command(query)
        if order in LEAVE:
            return
        if order == CLEAR:
            history = []
            clear_screen()
        if order:
            print(HELP)
        elif query.strip():
            history = answer(tokenizer, model, query, history, options)


def command(query: str) -> str:
    """The word of LEAVE or CLEAR that a line is, with a slash or without; "/help" for other words with one, or ""."""
    word = query.strip().lower()
    known = next((order for order in (*LEAVE, CLEAR) if word in (order, f"/{order}")), "")
    return known or ("/help" if re.fullmatch(r"/[a-z?]+", word) else "")


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
    """UTF-8 in pipes whatever the system's code page, line editing where there is any, and no crash on other bytes."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        piped = not stream.isatty() and "PYTHONIOENCODING" not in os.environ
        stream.reconfigure(errors="replace", **({"encoding": "utf-8"} if piped else {}))
    if sys.stdin.isatty():
        prepare_editing()


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


if __name__ == "__main__":
    sys.exit(main())
