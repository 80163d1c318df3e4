"""install.py: what it refuses, what it installs PyTorch from, and that it repairs an environment."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import install


@pytest.fixture
def commands(monkeypatch):
    """The pip commands that would run, without the interpreter; `commands.failing` holds words that make one fail."""

    class Commands(list):
        failing: set = set()

    seen = Commands()

    def call(command, **options):
        if command[1:4] == ["-m", "pip", "install"]:
            seen.append([word for word in command[4:] if word not in ("--quiet", "--disable-pip-version-check")])
            return int(bool(seen.failing & set(command)))
        return 1  # nothing is installed, and no other program is there

    monkeypatch.setattr(install.subprocess, "call", call)
    return seen


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 12)])
def test_an_old_python_is_refused_by_name_before_anything_else(version, commands):
    old, least = ".".join(map(str, version[:2])), ".".join(map(str, install.OLDEST))
    with pytest.raises(SystemExit, match=f"this is Python {old}, and {least} or newer.*make chat PYTHON=python3"):
        install.refuse_old_python(version)
    assert commands == []
    install.refuse_old_python((*install.OLDEST, 0))
    install.refuse_old_python((4, 0, 0))


@pytest.mark.parametrize(
    "asked, linux, driver, answering, expected",
    [
        ("", True, False, True, install.CPU_INDEX),
        ("", True, False, False, ""),  # offline, or behind a mirror
        ("", True, True, True, ""),
        ("", False, False, True, ""),  # the usual builds for macOS and Windows have no CUDA libraries
        ("https://mirror/cpu", True, True, False, "https://mirror/cpu"),
        (install.DEFAULT, True, False, True, ""),
    ],
)
def test_pytorch_for_cpus_is_chosen_where_no_driver_is_and_the_index_answers(
    monkeypatch, asked, linux, driver, answering, expected
):
    monkeypatch.setattr(install.platform, "system", lambda: "Linux" if linux else "Windows")
    monkeypatch.setattr(install, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(install, "answers", lambda url: answering)
    assert install.torch_index(asked) == expected


def test_an_index_that_answers_and_then_fails_gives_way_unless_it_was_asked_for(commands, monkeypatch):
    monkeypatch.setattr(install, "torch_index", lambda asked: asked or install.CPU_INDEX)
    commands.failing = {"--index-url"}
    install.install_torch(sys.executable, "")
    pin = commands[0][0]
    assert pin.startswith("torch==")
    assert commands == [[pin, "--index-url", install.CPU_INDEX], [pin]]
    with pytest.raises(SystemExit, match="pip failed"):
        install.install_torch(sys.executable, "https://mirror/cpu")


def test_the_cpu_engine_comes_with_it_where_it_can_run_and_may_fail(commands, monkeypatch, capsys):
    monkeypatch.setattr(install.platform, "machine", lambda: "aarch64")
    install.install_engine(sys.executable)
    assert commands == []
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    install.install_engine(sys.executable)
    assert commands[0][:2] == ["-e", str(install.HERE / "cpu")] and "failed" not in capsys.readouterr().out
    commands.failing = {"-e"}
    install.install_engine(sys.executable)
    assert "works without it" in capsys.readouterr().out


def test_what_is_installed_is_not_downloaded_again(monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(install, "pip", lambda *arguments, **options: asked.append(arguments))
    if f"torch=={torch.__version__.split('+')[0]}" in (install.HERE / "requirements.txt").read_text().split():
        install.install_torch(sys.executable, "")
        assert asked == []


def test_answers_tell_a_page_from_none(tmp_path):
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.HTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{server.server_port}"
        assert install.answers(f"{there}/")
        assert not install.answers(f"{there}/nothing/")
        server.shutdown()
    assert not install.answers(f"{there}/")
    assert not install.answers("no address")


def test_an_environment_is_made_once_and_again_when_it_is_broken(tmp_path):
    python = Path(install.environment(tmp_path / "new folder"))
    assert subprocess.run([python, "-c", "import pip"], check=False).returncode == 0
    (tmp_path / "new folder" / "kept").touch()
    install.environment(tmp_path / "new folder")
    assert (tmp_path / "new folder" / "kept").exists()
    python.unlink()
    install.environment(tmp_path / "new folder")
    assert python.exists() and not (tmp_path / "new folder" / "kept").exists()


def test_a_driver_is_believed_only_when_it_speaks(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(install, "DRIVER", tmp_path / "version")
    assert not install.has_nvidia_driver()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0\n")
    assert install.has_nvidia_driver()
    (tmp_path / "nvidia-smi").unlink()
    assert not install.has_nvidia_driver()
    (tmp_path / "version").touch()
    assert install.has_nvidia_driver()
