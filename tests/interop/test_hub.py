"""A model by its name: from a server that answers as the hub does, in processes that know no other."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.interop.test_imported_run import published
from tests.reliability import runs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub with one model, tiny/moe. `cut` connections for weights break off in the middle."""

    def __init__(self, folder: Path, cut: int = 0) -> None:
        self.files, self.cut, self.ranges = {p.name: p.read_bytes() for p in folder.iterdir()}, cut, list[str]()

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = handler.path.partition("?")[0]
        if path.startswith("/api/models/tiny/moe/tree/"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in self.files.items()]
            return self._json(handler, tree)
        if path.startswith("/api/models/tiny/moe"):
            names = [{"rfilename": name} for name in self.files]
            return self._json(handler, {"id": "tiny/moe", "sha": COMMIT, "siblings": names, "private": False})
        if path.startswith(f"/tiny/moe/resolve/{COMMIT}/"):
            return self._file(handler, path.rpartition("/")[2], body)
        return self._json(handler, {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def _json(handler: BaseHTTPRequestHandler, value: object, status: int = 200, headers: dict | None = None) -> None:
        text = json.dumps(value).encode()
        handler.send_response(status)
        for name, header in {
            "Content-Type": "application/json",
            "Content-Length": len(text),
            **(headers or {}),
        }.items():
            handler.send_header(name, str(header))
        handler.end_headers()
        handler.wfile.write(text)

    def _file(self, handler: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        content = self.files[name]
        wanted = handler.headers.get("Range", "")
        first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        handler.send_response(206 if wanted else 200)
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        headers |= {"Content-Length": len(content) - first}
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        for key, value in headers.items():
            handler.send_header(key, str(value))
        handler.end_headers()
        if not body:
            return
        if name.endswith(".safetensors"):
            self.ranges.append(wanted)
            if self.cut:
                self.cut -= 1
                handler.wfile.write(content[first : first + len(content) // 2])
                handler.wfile.flush()
                handler.connection.close()
                return
        handler.wfile.write(content[first:])


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self, True)

        def do_HEAD(self) -> None:
            hub.answer(self, False)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda request, client_address: None  # ty: a client that has gone
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def imported(source: str, hub: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = runs.environment(home) | {"HF_ENDPOINT": hub, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "moe_jax", "import", source, "--weights", "int8", "--out", str(home / "run")]
    return subprocess.run(
        command, env=environment | more, cwd=home, capture_output=True, text=True, check=False, timeout=240
    )


def one_line(done: subprocess.CompletedProcess[str], said: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("hub") / "moe", shard_bytes=10**9)


def test_a_model_is_downloaded_by_its_name(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    hub = Hub(folder)
    with serving(hub) as address:
        done = imported("tiny/moe", address, tmp_path)
        assert done.returncode == 0, done.stderr
        assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))
        assert (tmp_path / "run" / "config.json").exists()
        one_line(imported("tiny/other", address, tmp_path / "run"), "the hub has no model of this name")


def test_no_network_is_one_line(tmp_path: Path) -> None:
    said = "`uvx hf download tiny/moe --local-dir moe`"
    one_line(imported("tiny/moe", "http://127.0.0.1:9", tmp_path), said)
    one_line(imported("tiny/moe", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1"), said)
    assert os.listdir(tmp_path / "hf") == [] if (tmp_path / "hf").exists() else True
    assert not (tmp_path / "run").exists()
