"""A program on a pseudo-terminal, as a person uses it."""

from __future__ import annotations

import os
import select
import signal
import struct
import time
from collections.abc import Callable


class Terminal:
    """The program on a pseudo-terminal."""

    def __init__(self, argv: list[str], **environment: str):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell ignores for its background jobs
            usual = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            os.environ.update({**usual, **environment})
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

    def wait_until(self, is_there: Callable[[], bool], what: str, after: int = 0, timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not is_there():
            assert time.monotonic() < deadline, f"no {what!r} in {self.seen[after:]!r}"
            assert self.read(0.2) or is_there(), f"ended without {what!r}: {self.seen[after:]!r}"

    def wait_for(self, text: str, after: int = 0) -> int:
        """Wait until `text` comes after position `after`; returns the position behind it."""
        self.wait_until(lambda: text in self.seen[after:], text, after)
        return self.seen.index(text, after) + len(text)

    def interrupt(self, text: str, after: int, timeout: float = 240) -> int:
        """Ctrl-C at a prompt, until `text` comes: Python misses a signal between drawing its prompt and waiting for
        keys, which is when a program that looks for the prompt is quick enough to send one."""
        deadline = time.monotonic() + timeout
        while text not in self.seen[after:]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen[after:]!r}"
            self.type(b"\x03")
            again = time.monotonic() + 5
            while text not in self.seen[after:] and time.monotonic() < again:
                assert self.read(0.2), f"ended without {text!r}: {self.seen[after:]!r}"
        return self.seen.index(text, after) + len(text)

    def resize(self, lines: int, columns: int) -> None:
        import fcntl
        import termios

        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def exit_code(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            self.read(0.1)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running: {self.seen[-300:]!r}")
