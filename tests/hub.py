"""A stand-in of the Hub's HTTP API on 127.0.0.1."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories in folders, as far as huggingface_hub asks for them; those of `me` are made by a push."""

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
        _, *parts = path.removeprefix("/api/models").split("/")
        folder = self.server.state["repositories"] / "/".join(parts[:2])
        if not folder.is_dir():
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.startswith("/api/") and parts[2:3] == ["tree"]:
            self.answer([self.entry(file) for file in sorted(folder.iterdir())])
        elif path.startswith("/api/"):
            names = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
            self.answer({"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": names, "private": False, "tags": []})
        elif parts[2] == "resolve" and (folder / parts[-1]).is_file():
            self.send_file(folder / parts[-1])
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def entry(self, file: Path) -> dict:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}

    def send_file(self, file: Path) -> None:
        content = file.read_bytes()
        if self.command == "GET":
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
            name = f"me/{state['created']['name']}"
            (state["repositories"] / name).mkdir(parents=True, exist_ok=True)
            self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/{name}", "id": name})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = ["lfs" if name.endswith((".safetensors", ".model")) else "regular" for name in names]
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False, "oid": None} for n, m in zip(names, modes)]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [self.slot(one) for one in json.loads(content)["objects"]]})
        elif path.endswith("/commit/main"):
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            state["commit"] = [json.loads(line) for line in content.splitlines()]
            self.keep(state["repositories"] / repository, state["commit"])
            url = f"http://127.0.0.1:{self.server.server_port}/{repository}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.answer({})  # validate-yaml and the like

    def keep(self, folder: Path, operations: list[dict]) -> None:
        for one in operations:
            value, large = one["value"], one["key"] == "lfsFile"
            if large or one["key"] == "file":
                content = self.server.state["uploads"][value["oid"]] if large else base64.b64decode(value["content"])
                (folder / value["path"]).write_bytes(content)

    def slot(self, wanted: dict) -> dict:
        href = f"http://127.0.0.1:{self.server.server_port}/upload/{wanted['oid']}"
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": {"href": href, "header": {}}}}

    def do_PUT(self) -> None:
        content = self.body()
        self.server.state["uploads"][hashlib.sha256(content).hexdigest()] = content
        self.answer()


@contextlib.contextmanager
def serving(tmp_path: Path) -> Iterator[dict]:
    """The stand-in's state, and `run`, which runs a Python program of this clone that knows no other Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    repositories = tmp_path / "on_hub"
    server.state = {"repositories": repositories, "downloads": [], "uploads": {}, "refuse": False}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
    environment.update(HF_HOME=str(tmp_path / "cache"), HF_TOKEN="hf_stand_in", HF_HUB_OFFLINE="0", NO_PROXY="*")
    environment.pop("HF_MODULES_CACHE", None)
    for name in [name for name in environment if name.lower().endswith("_proxy") and name != "NO_PROXY"]:
        del environment[name]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    server.state["run"] = run
    yield server.state
    server.shutdown()
    server.server_close()
