"""The engines that speed.py measures beside ours, each in a process and an environment of its own.

    python benchmarks/peers.py llama.cpp openvino      installs them into bench_data/peers/NAME; all without names
    python benchmarks/speed.py --peers llama.cpp openvino

What cannot be installed is named with its error, and the others are installed all the same. Left out on purpose: MNN,
whose exporter fails for this model and whose converter installs packages by itself, and neural-speed, which is not
maintained and runs all 28 layers only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path

from make_model import DATA

EMBEDDING = 130528 * 4096  # weights, of which a token reads one row


@dataclass(frozen=True, eq=False)
class Peer:
    """Another engine: what is installed for it, and what makes and runs its files."""

    name: str
    script: str
    pip: tuple[str, ...]
    npm: tuple[str, ...] = ()
    ours: bool = False  # its environment sees what is installed beside ours (torch, transformers)
    variables: dict[str, str] = field(default_factory=dict)  # of the installation
    copies: bool = False  # its files are made from our 16-bit folder, else they have random weights of their own
    deepest: int = 28  # layers that are measured, which others scale
    batches: bool = True
    stores: bool = True  # what it computes with, rather than what it makes that from when it starts
    unread: dict[str, float] = field(default_factory=dict)  # type -> bytes of its files that no token reads
    spins: bool = False  # its threads are busy even between requests: nothing runs beside it, its bandwidth is too low

    def home(self, data: Path) -> Path:
        return data / "peers" / self.name

    def python(self, data: Path) -> Path:
        return self.home(data) / "bin" / "python"

    def installed(self, data: Path) -> bool:
        return (self.home(data) / "installed").exists()


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama.cpp",
            "peer_llama_cpp.py",
            ("gguf==0.19.0",),
            npm=("@node-llama-cpp/linux-x64@3.22.1",),
            unread={"q4_0": EMBEDDING * 18 / 32, "q8_0": EMBEDDING * 34 / 32, "bf16": EMBEDDING * 2},
        ),
        Peer(
            "openvino",
            "peer_openvino.py",
            ("openvino==2026.4.1", "nncf==3.4.0"),
            deepest=4,
            unread={"int4": EMBEDDING * (0.5 + 2 / 128), "int8": EMBEDDING, "bf16": EMBEDDING * 2},
        ),
        Peer(
            "xfastertransformer",
            "peer_xfastertransformer.py",
            ("xfastertransformer==2.1.2", "torch>=2.7,<2.8", "numpy"),
            stores=False,
        ),
        Peer(
            "chatglm.cpp",
            "peer_chatglm_cpp.py",
            ("chatglm-cpp==0.4.2",),
            ours=True,
            variables={"CMAKE_ARGS": "-DCMAKE_POLICY_VERSION_MINIMUM=3.5"},  # its files are older than CMake 4
            copies=True,
            batches=False,
        ),
        Peer(
            "fastllm",
            "peer_fastllm.py",
            ("ftllm==1.9.0",),
            ours=True,
            copies=True,
            batches=False,
            unread=dict.fromkeys(("int4", "int8", "float16"), EMBEDDING * 4),  # apart from the head, in float32
            spins=True,
        ),
    )
}


def install(peer: Peer, data: Path) -> None:
    """Raises CalledProcessError with what pip or npm said."""
    home = peer.home(data)
    mark = home / "installed"
    mark.unlink(missing_ok=True)
    venv.create(home, with_pip=True)
    if peer.ours:
        found = subprocess.run(
            [peer.python(data), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        Path(found.stdout.strip(), "ours.pth").write_text(sysconfig.get_path("purelib"))
    commands = [[str(peer.python(data)), "-m", "pip", "install", "--quiet", *peer.pip]]
    if peer.npm:
        commands.append(
            ["npm", "install", "--prefix", str(home), "--no-audit", "--no-fund", "--omit=optional", *peer.npm]
        )
    for command in commands:
        environment = {**os.environ, **peer.variables}
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    mark.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    unknown = set(options.names) - set(PEERS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    failed = 0
    for name in options.names or PEERS:
        try:
            install(PEERS[name], options.data)
            print(f"{name}: {PEERS[name].home(options.data)}")
        except (OSError, subprocess.CalledProcessError) as error:
            failed += 1
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            print(f"{name} cannot be installed: {said[-1]}", file=sys.stderr)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
