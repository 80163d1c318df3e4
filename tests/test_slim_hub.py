"""SOURCE as a Hub id and --push, against a stand-in of the Hub's HTTP API on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from slim_sources import same_bits, slim_toy, tensors_of, write_full_toy

from slimming.checkpoint_io import Exit

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository to download, `someone/source`, and one to be created, as far as huggingface_hub asks for them."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, content=b"", status: int = 200, **headers) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    # ---- download

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        state = self.server.state
        if path.startswith("/api/models/someone/source/tree/"):
            files = [self.entry(file) for file in sorted(state["source"].iterdir())]
            self.answer(files)
        elif path.startswith("/api/models/someone/source"):
            names = [{"rfilename": file.name} for file in sorted(state["source"].iterdir())]
            self.answer({"id": "someone/source", "sha": COMMIT, "siblings": names, "private": False, "tags": []})
        elif path.startswith(f"/someone/source/resolve/{COMMIT}/"):
            self.send_file(state["source"] / path.rsplit("/", 1)[1])
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def entry(self, file: Path) -> dict:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}

    def send_file(self, file: Path) -> None:
        content = file.read_bytes()
        self.server.state["downloads"].append(file.name)
        etag = hashlib.sha1(content).hexdigest()
        self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    # ---- upload

    def do_POST(self) -> None:
        path, content, state = urlsplit(self.path).path, self.body(), self.server.state
        if state["refuse"]:
            self.answer({"error": "Forbidden: the token may not write"}, 403)
        elif path == "/api/repos/create":
            state["created"] = json.loads(content)
            self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/out", "id": "me/out"})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = ["lfs" if name.endswith((".safetensors", ".model")) else "regular" for name in names]
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False, "oid": None} for n, m in zip(names, modes)]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [self.slot(one) for one in json.loads(content)["objects"]]})
        elif path.endswith("/commit/main"):
            state["commit"] = [json.loads(line) for line in content.splitlines()]
            url = f"http://127.0.0.1:{self.server.server_port}/me/out/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.answer({})  # validate-yaml and the like

    def slot(self, wanted: dict) -> dict:
        href = f"http://127.0.0.1:{self.server.server_port}/upload/{wanted['oid']}"
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": {"href": href, "header": {}}}}

    def do_PUT(self) -> None:
        content = self.body()
        self.server.state["uploads"][hashlib.sha256(content).hexdigest()] = content
        self.answer()


@pytest.fixture
def hub(tmp_path):
    """The stand-in's state, and `run`, which runs slim.py in a process that knows no other Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = {"source": tmp_path / "on_hub", "downloads": [], "uploads": {}, "refuse": False}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
    environment.update(HF_HOME=str(tmp_path / "cache"), HF_TOKEN="hf_stand_in", HF_HUB_OFFLINE="0", NO_PROXY="*")
    for name in [name for name in environment if name.lower().endswith("_proxy") and name != "NO_PROXY"]:
        del environment[name]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "slim.py"), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    server.state["run"] = run
    yield server.state
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_downloaded_without_the_bin_twins_and_slimmed(hub, tmp_path):
    source = write_full_toy(hub["source"])
    (source / "pytorch_model.bin").write_bytes(b"the same again")
    (source / "photo.png").write_bytes(b"not needed")
    process = hub["run"]("someone/source", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    found = tensors_of(tmp_path / "out")
    assert all(same_bits(found[name], tensor) for name, tensor in slim_toy().items())
    assert "base_model: someone/source" in (tmp_path / "out" / "README.md").read_text()
    assert {"pytorch_model.bin", "photo.png"}.isdisjoint(hub["downloads"])


def test_an_unknown_hub_id_is_refused(hub, tmp_path):
    process = hub["run"]("someone/nothing", tmp_path / "out")
    assert process.returncode == Exit.HUB
    assert "someone/nothing can't be downloaded" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("public", [False, True])
def test_push_uploads_every_file_privately_unless_asked(hub, tmp_path, public):
    source = write_full_toy(tmp_path / "source")
    process = hub["run"](source, tmp_path / "out", "--push", "me/out", *(["--public"] if public else []))
    assert process.returncode == 0, process.stderr
    created = hub["created"]
    assert created["name"] == "out"
    assert created.get("private", created.get("visibility") == "private") is not public
    header, *operations = hub["commit"]
    assert header["key"] == "header"
    pushed = {operation["value"]["path"]: operation for operation in operations}
    assert set(pushed) == set(os.listdir(tmp_path / "out"))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert pushed["model.safetensors"]["value"]["oid"] == hashlib.sha256(weights).hexdigest()
    assert hub["uploads"][hashlib.sha256(weights).hexdigest()] == weights


def test_a_failed_push_leaves_the_output_and_says_how_to_go_on(hub, tmp_path):
    hub["refuse"] = True
    process = hub["run"](write_full_toy(tmp_path / "source"), tmp_path / "out", "--push", "me/out")
    assert process.returncode == Exit.HUB
    assert "hf upload me/out" in process.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
