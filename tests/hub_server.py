"""A server on this machine that speaks the hub's API, for the hub's real client: models, their
lists of files, ranges, and what can go wrong.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """One repository: its files, and what is wrong with it."""

    files: dict[str, bytes]
    gated: bool = False
    stated: dict[str, int] = field(default_factory=dict)
    """Sizes that the list states, where they are not the true ones."""
    cut: Counter[str] = field(default_factory=Counter)
    """How many answers with a file's bytes break off in their middle."""
    slow: float = 0.0
    """Seconds that the server waits after each 64 KiB of a file."""
    broken: set[str] = field(default_factory=set)
    """Files that are listed, and answered with 404."""
    busy: int = 0
    """How many questions for it are answered with 429."""


class HubServer:
    """Serves `repos` while it is open; `seen` has the method and path of every request."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.seen: list[tuple[str, str, str]] = []
        outer = self

        class Handler(_Handler):
            hub = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for, in order."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for kind, path, _ in self.seen
                if kind == "GET" and "/resolve/" in path]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.hub.seen.append((self.command, path, self.headers.get("Range") or ""))
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/")
            self._api(f"{owner}/{name}", rest)
        elif "/resolve/" in path:
            repository, rest_of_path = path.split("/resolve/")
            self._file(repository, rest_of_path.split("/", 1)[1])
        else:
            self._json(404, {"error": "no such page"})

    def _known(self, repository: str) -> Repo | None:
        repo = self.hub.repos.get(repository)
        if repo is None:
            logged_in = "Authorization" in self.headers
            self._refuse(404 if logged_in else 401, "RepoNotFound")
        elif repo.busy:
            repo.busy -= 1
            self._refuse(429, "")
        else:
            return repo
        return None

    def _api(self, repository: str, rest: list[str]) -> None:
        repo = self._known(repository)
        if repo is None:
            return
        sizes = {name: repo.stated.get(name, len(data)) for name, data in repo.files.items()}
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": size, "oid": _oid(repo.files[name])}
                for name, size in sizes.items()
            ]
            self._json(200, entries)
        elif rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            gated = "manual" if repo.gated else False
            about = {"id": repository, "sha": COMMIT, "siblings": siblings, "gated": gated}
            self._json(200, {**about, "private": False, "tags": []})
        else:
            self._json(404, {"error": "no such page"})

    def _file(self, repository: str, name: str) -> None:
        repo = self._known(repository)
        if repo is None:
            return
        if repo.gated:
            self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
            return
        if name in repo.broken:
            time.sleep(1)  # so that the others are there
        if name not in repo.files or name in repo.broken:
            self._refuse(404, "EntryNotFound")
            return
        data = repo.files[name]
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        part = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if repo.cut[name] > 0:
            repo.cut[name] -= 1
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        step = 64 << 10 if repo.slow else max(len(part), 1)
        with suppress(ConnectionError):
            for offset in range(0, len(part), step):
                self.wfile.write(part[offset : offset + step])
                time.sleep(repo.slow)

    def _refuse(self, status: int, code: str) -> None:
        self._json(status, {"error": f"refused: {code}"}, {"X-Error-Code": code} if code else {})

    def _json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
