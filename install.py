"""Makes the environment that the Makefile runs in; without make: `python3 install.py`, then .venv/bin/python.

The Python version is judged before anything is downloaded. Where no NVIDIA driver is found, PyTorch comes from its own
index of CPU builds, if that answers: 0.2 GB instead of 2.7. The syntax is that of Python 3.6, so that whoever has an
older one is told so.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

OLDEST = (3, 11)  # of the pinned transformers
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEFAULT = "default"  # as --torch-index: whatever pip itself is set to
DRIVER = Path("/proc/driver/nvidia/version")
PATIENCE = 5  # seconds for that index to answer
HERE = Path(__file__).resolve().parent


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default: .venv)")
    parser.add_argument(
        "--torch-index",
        default="",
        metavar="URL",
        help=f"where PyTorch comes from; {DEFAULT}: pip's own index, with CUDA libraries on Linux "
        "(default: that with an NVIDIA driver, PyTorch's CPU builds without one)",
    )
    options = parser.parse_args(arguments)
    refuse_old_python(sys.version_info)
    python = environment(Path(options.venv))
    install_torch(python, options.torch_index)
    print("installing the rest of requirements.txt", flush=True)
    pip(python, "-r", str(HERE / "requirements.txt"))
    install_engine(python)


def refuse_old_python(version):
    if tuple(version[:2]) >= OLDEST:
        return
    found, needed = (".".join(map(str, parts[:2])) for parts in (version, OLDEST))
    here = [name for name in ("python3.13", "python3.12", "python3.11") if succeeds(name, "-c", "import ensurepip")]
    cure = f"{here[0]} is here" if here else f"install python{needed} with its venv module"
    example = here[0] if here else f"python{needed}"
    raise SystemExit(f"this is Python {found}, and {needed} or newer is needed; {cure}: make chat PYTHON={example}")


def environment(folder):
    """The interpreter of the virtual environment in `folder`, made anew if there is none or one of another Python."""
    python = folder.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    same = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    if not succeeds(str(python), "-c", same):
        print(f"making {folder}", flush=True)
        if subprocess.call([sys.executable, "-m", "venv", "--clear", str(folder)]):
            raise SystemExit("python3 cannot make environments: on Debian and Ubuntu, apt install python3-venv")
    return str(python)


def install_torch(python, asked):
    """PyTorch goes first and by itself: it is by far the largest, and everything else only has to fit it."""
    pin = next(line for line in (HERE / "requirements.txt").read_text().split() if line.startswith("torch=="))
    if is_installed(python, pin):
        return
    index = torch_index(asked)
    if index:
        print(f"installing {pin} from {index}", flush=True)
        if pip(python, pin, "--index-url", index, fatal=bool(asked)):
            return
        print("that failed; now from pip's own index", flush=True)
    size = (
        " (builds with CUDA libraries: 2.7 GB of downloads, 5 GB on the disk)" if platform.system() == "Linux" else ""
    )
    print(f"installing {pin} from pip's own index{size}", flush=True)
    pip(python, pin, quiet=False)


def install_engine(python):
    """The compiled kernels of cpu/, which a chat is right without; in place, so that they stay those of this clone."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    print("installing the CPU engine (cpu/)", flush=True)
    if not pip(python, "-e", str(HERE / "cpu"), "-c", str(HERE / "requirements-dev.txt"), fatal=False):
        print("that failed: everything works without it, a CPU only decodes more slowly", flush=True)


def torch_index(asked):
    """The index to install PyTorch from; empty for pip's own."""
    if asked:
        return "" if asked == DEFAULT else asked
    if platform.system() != "Linux" or has_nvidia_driver():  # elsewhere the usual builds hold no CUDA libraries
        return ""
    if answers(CPU_INDEX + "/torch/"):
        return CPU_INDEX
    print(
        f"{CPU_INDEX} does not answer, so PyTorch comes from pip's own index; TORCH_INDEX=URL names a mirror",
        flush=True,
    )
    return ""


def has_nvidia_driver():
    return DRIVER.exists() or succeeds("nvidia-smi", "-L")  # WSL has no such file


def answers(url):
    """Whether the page comes within a few seconds. In a thread, because no time limit reaches the look-up of names."""
    found = []

    def ask():
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as page:
                found.append(page.status == 200)
        except (OSError, ValueError):  # no network, no such page, no certificates
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found == [True]


def is_installed(python, pin):
    name, version = pin.split("==")
    return succeeds(
        python, "-c", f"import importlib.metadata as m; assert m.version({name!r}).split('+')[0] == {version!r}"
    )


def succeeds(*command):
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:  # there is no such program
        return False


def pip(python, *arguments, quiet=True, fatal=True):
    """Run `pip install`; True if it went well."""
    options = ["--disable-pip-version-check", *(["--quiet"] if quiet else [])]
    failed = subprocess.call([python, "-m", "pip", "install", *options, *arguments]) != 0
    if failed and fatal:
        raise SystemExit("pip failed: the reason stands above; run the same again when it is cured")
    return not failed


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
