"""A Hugging Face hub on this machine, with the network troubles that a test asks for."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FakeHub:
    """Serves one repository.

    Attributes:
        sha: the commit that `main` points to.
        cut: how many more downloads of a shard end in the middle.
        down: names of shards that cannot be had.
        served: (file, bytes) of every answer with content.
        uploaded: content of every file that was uploaded.
        watch: called with the name of each shard that is asked for.
    """

    def __init__(self, folder: Path, repository: str = "someone/tiny-it") -> None:
        self.folder, self.repository = folder, repository
        self.sha = "a" * 40
        self.cut = 0
        self.down: set[str] = set()
        self.served: list[tuple[str, int]] = []
        self.uploaded: dict[str, bytes] = {}
        self.watch = lambda name: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_ETAG_TIMEOUT": "5",
        }

    def bytes_of(self, name: str) -> int:
        return sum(size for file, size in self.served if file == name)

    def _handler(hub):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_content=False)

            def do_GET(self) -> None:
                self.answer(with_content=True)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if "Authorization" not in self.headers:
                    return self.fail(401, "")
                if self.path.endswith("/repos/create"):
                    asked = json.loads(body)
                    name = f"{asked.get('organization', 'me')}/{asked['name']}"
                    answer = {"url": f"http://{self.headers['Host']}/{name}"}
                elif "/preupload/" in self.path:
                    files = json.loads(body)["files"]
                    answer = {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for f in files
                        ]
                    }
                elif "/commit/" in self.path:
                    for line in body.decode().splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            content = base64.b64decode(entry["value"]["content"])
                            hub.uploaded[entry["value"]["path"]] = content
                    commit = f"http://{self.headers['Host']}/me/tiny-4bit/commit/{'c' * 40}"
                    answer = {"commitUrl": commit, "commitOid": "c" * 40, "success": True}
                else:
                    answer = {"errors": [], "warnings": []}
                self.send(json.dumps(answer).encode(), "", with_content=True)

            def fail(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def answer(self, with_content: bool) -> None:
                path = self.path.split("?")[0]
                if "/gated/" in path:
                    return self.fail(403, "GatedRepo")
                if hub.repository not in path:
                    return self.fail(401, "RepoNotFound")
                if "/tree/" in path:
                    return self.send(json.dumps(hub.tree()).encode(), "", with_content)
                if path.startswith("/api/models/"):
                    revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
                    if revision not in ("main", hub.sha):
                        return self.fail(404, "RevisionNotFound")
                    return self.send(json.dumps(hub.info()).encode(), "", with_content)
                found = re.fullmatch(rf"/{hub.repository}/resolve/([^/]+)/(.+)", path)
                file = hub.folder / found[2]
                if not file.is_file():
                    return self.fail(404, "EntryNotFound")
                self.send(file.read_bytes(), file.name, with_content)

            def send(self, content: bytes, name: str, with_content: bool) -> None:
                whole, start, end = len(content), 0, len(content) - 1
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                shard = name.endswith(".safetensors")
                if wanted:
                    start, end = int(wanted[1]), min(int(wanted[2] or end), end)
                header_only = wanted is not None and wanted[2] != ""
                if shard and with_content and not header_only:
                    hub.watch(name)
                    if name in hub.down:
                        return self.fail(503, "")
                content = content[start : end + 1]
                self.send_response(206 if wanted else 200)
                self.send_header("X-Repo-Commit", hub.sha)
                self.send_header("ETag", f'"{hashlib.sha1(name.encode()).hexdigest()}"')
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(content)))
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
                self.end_headers()
                if not with_content:
                    return
                if shard and not header_only and hub.cut > 0:
                    hub.cut -= 1
                    content = content[: len(content) // 2]
                    self.close_connection = True
                with contextlib.suppress(ConnectionError):  # whoever asked may be gone
                    self.wfile.write(content)
                if name:
                    hub.served.append((name, len(content)))

        return Handler

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name}
            for p in self._files()
        ]

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def info(self) -> dict:
        return {
            "id": self.repository,
            "modelId": self.repository,
            "sha": self.sha,
            "private": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": p.name, "size": p.stat().st_size} for p in self._files()],
        }
