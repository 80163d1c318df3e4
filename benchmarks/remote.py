"""A worker in a process of its own, driven by JSON lines: both ends. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DECODE_PROMPT = 128  # tokens of the prompt in a worker's `decode`; what comes behind counts as an answer


class Remote:
    """Calls methods of a worker in another process: `remote("decode", context=128)`."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, quiet: bool = False):
        """quiet: what it writes to stderr is kept, and its last line told if it ends."""
        self.errors = tempfile.TemporaryFile("w+", errors="replace") if quiet else None  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.started = self._answer()

    def __call__(self, method: str, **arguments):
        self.process.stdin.write(json.dumps({"do": method, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        if self.errors is None:
            return " ".join(self.process.args)
        self.errors.seek(0)
        return "".join(self.errors.read().strip().splitlines()[-1:])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def serve(make_worker) -> None:
    """Makes the worker, says `worker.started`, then answers {"do": METHOD, ...arguments} until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def say(answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    worker = make_worker()
    say(worker.started)
    for line in sys.stdin:
        arguments = json.loads(line)
        say(getattr(worker, arguments.pop("do"))(**arguments))


def run_peer(description: str, types: tuple[str, ...], convert, work) -> None:
    """The command line of a peer: `convert FOLDER FILE --type T [--layers N]`, and `work FILE`, which serves."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert")
    converting.add_argument("folder", type=Path)
    converting.add_argument("file", type=Path, help="written under another name first, so that it is whole or missing")
    converting.add_argument("--type", choices=types, default=types[0])
    converting.add_argument("--layers", type=int)
    commands.add_parser("work").add_argument("file")
    options = parser.parse_args()
    if options.command == "work":
        work(options.file)
        return
    partial = options.file.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    convert(options.folder, partial, options.type, options.layers)
    partial.rename(options.file)


def script(name: str) -> str:
    return str(Path(__file__).resolve().with_name(name))
