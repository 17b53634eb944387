"""A Hub on this machine, as far as `huggingface_hub` needs one to download: what it answers is what huggingface.co answers."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, file_download

COMMIT = "c0ffee" + "0" * 34


@dataclass
class LocalHub:
    """Serves one repository's folder.

    Attributes:
        repo_id: owner/name.
        token: what a request must bring along to see the repository; None for a public one.
        break_after: bytes of a file after which the connection is dropped, once, the next time that one is longer.
        asked: "METHOD path" of every request.
    """

    repo_id: str
    folder: Path
    token: str | None = None
    break_after: int | None = None
    asked: list[str] = field(default_factory=list)
    closed: bool = field(default=False, repr=False)
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def __enter__(self) -> LocalHub:
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments):
                self.hub = hub
                super().__init__(*arguments)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def use(self, monkeypatch: Any, cache: Path) -> None:
        """This process asks here from now on, and keeps what it gets in ``cache``."""
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        for module in (constants, file_download):  # releases before 1 read the second
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def files_sent(self) -> list[str]:
        """Files that were asked for with their content, in order."""
        resolve = f"GET /{self.repo_id}/resolve/"
        return [request.removeprefix(resolve).split("/", 1)[1] for request in self.asked if request.startswith(resolve)]

    def weights_sent(self) -> list[str]:
        return [name for name in self.files_sent() if name.endswith(".safetensors")]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        if self.hub.closed:  # a connection that its client keeps open
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        api, resolve = f"/api/models/{self.hub.repo_id}", f"/{self.hub.repo_id}/resolve/"
        allowed = self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not allowed or not (path + "/").startswith((api + "/", resolve)):
            self.refuse(401, "RepoNotFound")  # what the Hub says of private and of unknown repositories alike
        elif path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            self.send_file(revision, self.hub.folder / name)
        else:
            self.describe(path.removeprefix(api).strip("/").split("/"))

    def describe(self, what: list[str]) -> None:
        if what[-1] not in ("", "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
            return
        files = [path for path in sorted(self.hub.folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(self.hub.folder).as_posix() for path in files]
        info = {"id": self.hub.repo_id, "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in names]}
        tree = [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
            for name, path in zip(names, files, strict=True)
        ]
        body = json.dumps(tree if what[0] == "tree" else info).encode()
        self.head(200, len(body), {"Content-Type": "application/json"})
        self.wfile.write(body)

    def send_file(self, revision: str, path: Path) -> None:
        if revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif not path.is_file():
            self.refuse(404, "EntryNotFound")
        else:
            content, etag = path.read_bytes(), f'"{_digest(path)}"'
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {"ETag": etag, "Accept-Ranges": "bytes"}
            if "Range" in self.headers:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.head(206 if "Range" in self.headers else 200, len(content) - start, headers)
            if self.command == "GET":
                self.send_content(content[start:])

    def send_content(self, content: bytes) -> None:
        with self.hub.lock:
            limit = self.hub.break_after
            if limit is not None and len(content) > limit:
                content, self.hub.break_after, self.close_connection = content[:limit], None, True
        self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.head(status, 0, {"X-Error-Code": code, "X-Error-Message": code})

    def head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
