"""A server on loopback that speaks the Hub's HTTP paths for models, so that huggingface_hub's client can read from it.

Paths, headers and error codes are those that huggingface_hub's client asks for and understands (``hf_api.py``,
``file_download.py``, ``utils/_http.py``). Files of weights are redirected to another host, as the Hub does for LFS.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".model")  # what .gitattributes stores in LFS
Files = Mapping[str, bytes]


@dataclass
class Repository:
    """``commits`` by their hash, the last one is main's; ``refs`` are branches and tags.

    ``readers`` are the tokens that may read a ``private`` or ``gated`` repository. ``forbidden`` are tokens without
    the permission that it needs.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    forbidden: set[str] = field(default_factory=set)

    def commit(self, files: Files, ref: str = "main") -> str:
        """Add a commit that holds ``files`` alone, and let ``ref`` be it; its hash."""
        content = repr([len(self.commits), sorted(files.items())]).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The hash of a branch, a tag or a commit; None for none."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """A request as it arrived; ``token`` is empty without one, ``sent`` are the bytes of its answer's body."""

    method: str
    path: str
    range: str = ""
    token: str = ""
    sent: int = 0


class HttpError(Exception):
    """An answer that is an error, with the Hub's code and message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class Hub(ThreadingHTTPServer):
    """``tokens`` are the valid ones. Connections drop after ``drop_every`` bytes of a body.

    ``failures`` are statuses with which the next requests for files end.
    """

    daemon_threads = True

    def __init__(self, handler: type[HubHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or HubHandler)
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.requests: list[Request] = []
        self.drop_every: int | None = None
        self.failures: list[int] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Where large files are; another host to a client, which must not send its token there."""
        return f"http://localhost:{self.server_port}/lfs"

    def add(self, name: str, files: Files, **settings: Any) -> Repository:
        """A new repository with one commit."""
        self.repositories[name] = repository = Repository(**settings)
        repository.commit(files)
        return repository

    def fetched(self, method: str = "GET") -> list[str]:
        """The names of the files that were asked for, in order."""
        found = (re.search(r"/(?:resolve/[^/]+|lfs/\w+)/(.+)", each.path) for each in self.sent(method))
        return [match[1] for match in found if match]

    def sent(self, method: str = "GET") -> list[Request]:
        return [each for each in self.requests if each.method == method]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients close connections whenever they like."""


class HubHandler(BaseHTTPRequestHandler):
    """Answers requests; ``routes`` are (method, expression of the path, name of the method that answers)."""

    server: Hub
    protocol_version = "HTTP/1.1"
    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "model"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "file"),
        ("GET", r"/lfs/(?P<digest>[0-9a-f]{64})/(?P<file>.+)", "large"),
    ]

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        try:
            for known, expression, name in self.routes:
                if known == method and (match := re.fullmatch(expression, path)):
                    found = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    getattr(self, name)(**found)
                    return
            raise HttpError(404, message="no such path")
        except HttpError as failure:
            self.reply(
                json.dumps({"error": failure.message}).encode(),
                {"X-Error-Code": failure.code, "X-Error-Message": failure.message},
                status=failure.status,
            )

    def reply(self, body: bytes, headers: Mapping[str, str] = {}, status: int = 200) -> None:
        """Send an answer; the connection drops where ``drop_every`` says so."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        most = self.server.drop_every
        part = b"" if self.command == "HEAD" else body[:most]
        self.wfile.write(part)
        self.server.requests.append(
            Request(self.command, self.path, self.headers.get("Range", ""), self.token, len(part))
        )
        if self.command != "HEAD" and len(part) < len(body):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def reply_json(self, value: Any, headers: Mapping[str, str] = {}) -> None:
        self.reply(json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def repository(self, name: str, *, content: bool = False) -> Repository:
        """The repository, if the token may see it and, of a gated one, its ``content``. Raises ``HttpError``."""
        if self.token and self.token not in self.server.tokens:
            raise HttpError(401, message="Invalid credentials in Authorization header")
        found = self.server.repositories.get(name)
        allowed = found is not None and self.token in found.readers
        if found is None or (found.private and not allowed):
            raise HttpError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if self.token in found.forbidden:
            raise HttpError(403, message="your token lacks the permission to read this repository")
        if found.gated and content and not allowed:
            raise HttpError(403 if self.token else 401, "GatedRepo", f"Access to model {name} is restricted")
        return found

    def commit(self, repository: Repository, revision: str | None) -> tuple[str, dict[str, bytes]]:
        """The hash and the files of a revision. Raises ``HttpError``."""
        sha = repository.resolve(revision or "main")
        if sha is None:
            raise HttpError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def model(self, name: str, revision: str | None) -> None:
        repository = self.repository(name)
        sha, files = self.commit(repository, revision)
        self.reply_json(
            {
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "siblings": [{"rfilename": file} for file in sorted(files)],
                "tags": [],
            }
        )

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        files = self.commit(self.repository(name), revision)[1]
        start = f"{folder}/" if folder else ""
        inside = {file: content for file, content in files.items() if file.startswith(start)}
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
        folders = {
            start + file.removeprefix(start).rpartition("/")[0]
            for file in inside
            if "/" in file.removeprefix(start)
        }
        if not recursive:
            inside = {file: each for file, each in inside.items() if "/" not in file.removeprefix(start)}
            folders = {start + each.removeprefix(start).partition("/")[0] for each in folders}
        entries = [{"type": "directory", "oid": blob(b""), "size": 0, "path": each} for each in folders]
        self.reply_json(entries + [entry(file, content) for file, content in sorted(inside.items())])

    def paths_info(self, name: str, revision: str) -> None:
        raw = self.body()
        files = self.commit(self.repository(name), revision)[1]
        asked = json.loads(raw)["paths"] if raw.startswith(b"{") else parse_qs(raw.decode()).get("paths", [])
        self.reply_json([entry(file, files[file]) for file in asked if file in files])

    def file(self, name: str, revision: str, file: str) -> None:
        if self.server.failures:
            raise HttpError(self.server.failures.pop(0), message="Service Unavailable")
        sha, files = self.commit(self.repository(name, content=True), revision)
        if file not in files:
            raise HttpError(404, "EntryNotFound", "Entry not found")
        content = files[file]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob(content)}"'}
        if not file.endswith(LARGE):
            self.content(content, headers)
            return
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self.reply(b"", headers | {"Location": f"{self.server.storage}/{digest}/{file}"}, status=302)

    def large(self, digest: str, file: str) -> None:
        for repository in self.server.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == digest:
                        self.content(content, {"ETag": f'"{digest}"'})
                        return
        raise HttpError(404)

    def content(self, content: bytes, headers: Mapping[str, str]) -> None:
        """A file, or the range of it that the request asks for."""
        headers = {"Accept-Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self.reply(content, headers)
            return
        first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if first > last:
            raise HttpError(416)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.reply(content[first : last + 1], headers, status=206)


def blob(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(file: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    found: dict[str, Any] = {"type": "file", "oid": blob(content), "size": len(content), "path": file}
    if file.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return found


@contextmanager
def serving(handler: type[HubHandler] | None = None) -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub(handler)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
