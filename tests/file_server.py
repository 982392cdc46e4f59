"""A web server for tests, in this process: files with ranges and tags, the part of the Hub's interface that its client
needs, and faults on demand.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class FileServer:
    """Serves `files` (path to content).

    ``faults`` names what goes wrong, in order, with the next answers to GET: a status such as 503, "cut" (half of the
    content), "login" (a page in HTML with status 200) or None (nothing). ``requests`` records method, path and the
    Range header; ``tags`` is whether answers name the version of a file.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[int | str | None] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    tags: bool = True

    def __enter__(self) -> Self:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                owner.answer(self)

            def do_GET(self):
                owner.answer(self)

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):
                """Say nothing of a client that went away, as one that is killed does."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def ranges(self) -> list[str | None]:
        """Return the Range headers of the requests for content."""
        return [span for method, _, span in self.requests if method == "GET"]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        fault = self.faults.pop(0) if self.faults and handler.command == "GET" else None
        if isinstance(fault, int):
            return self._send(handler, fault, b"", {})
        if fault == "login":
            return self._send(handler, 200, b"<!DOCTYPE html><html>log in</html>", {"Content-Type": "text/html"})
        if path.startswith("/api/"):
            return self._send(handler, 200, *self._listing(path))
        if "/resolve/" in path and path.endswith(".safetensors") and not path.startswith("/cdn"):
            return self._redirect(handler, path)
        path = path.removeprefix("/cdn")
        if path not in self.files:
            return self._send(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        content = self.files[path]
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"} | ({"ETag": tag} if self.tags else {})
        span = handler.headers.get("Range")
        status, start = 200, 0
        if span and handler.headers.get("If-Range", tag) == tag:
            start = int(span.removeprefix("bytes=").partition("-")[0])
            if start >= len(content):
                return self._send(handler, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(handler, status, content[start:], headers, cut=fault == "cut")

    def _redirect(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        """Send a large file's request on to another host, as the Hub does, and offer its own protocol for it."""
        content = self.files[path]
        headers = {
            "Location": f"{self.url.replace('127.0.0.1', 'localhost')}/cdn{path}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "X-Xet-Hash": "0" * 64,
            "X-Xet-Refresh-Route": "/api/nowhere",
        }
        return self._send(handler, 302, b"", headers)

    def _listing(self, path: str) -> tuple[bytes, dict[str, str]]:
        """Return what the Hub's interface says of a repository: its commit, or the files of a folder."""
        kind, _, rest = path.removeprefix("/api/").partition("/")
        repo, _, where = rest.partition("/tree/") if "/tree/" in rest else rest.partition("/revision/")
        if "/tree/" not in rest:
            body = {"_id": "1", "id": repo, "sha": COMMIT, "private": False, "downloads": 0, "tags": [], "siblings": []}
            return json.dumps(body | {"disabled": False, "gated": False, "likes": 0}).encode(), {}
        folder = where.partition("/")[2]
        prefix = f"/{kind}/{repo}/resolve/{COMMIT}/" if kind == "datasets" else f"/{repo}/resolve/{COMMIT}/"
        found = [name.removeprefix(prefix) for name in self.files if name.startswith(f"{prefix}{folder}/")]
        entries = [
            {"type": "file", "path": name, "size": len(self.files[prefix + name]), "oid": "0" * 40} for name in found
        ]
        return json.dumps(entries).encode(), {"Content-Type": "application/json"}

    @staticmethod
    def _send(handler, status, content, headers, *, cut=False):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content[: len(content) // 2] if cut else content)
            handler.wfile.flush()
        if cut:
            handler.close_connection = True
