"""A hub on this machine, by the few requests that its clients make: what it holds, the files, its refusals."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Attributes:
    repositories: by `models/OWNER/NAME` or `datasets/OWNER/NAME` their files' bytes by name.
    commit: of every repository; its branch is main.
    sizes: of files that are listed with another one than they have.
    gated: ids of models that list their files and give none.
    refusals: by the id of a model the status and the code that it is refused with.
    fetched: names of the files that were given.
    asked: method and path of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commit, self.sizes = COMMIT, dict[str, int]()
        self.gated, self.refusals = set[str](), dict[str, tuple[int, str | None]]()
        self.fetched, self.asked = list[str](), list[str]()

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is set to."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[Hub]:
    """An empty one that runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    """Those of a folder, as a repository has them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Handler(BaseHTTPRequestHandler):
    """Answers: `/` with nothing, `/api/KIND/OWNER/NAME...` about a repository, and
    `/[datasets/]OWNER/NAME/resolve/COMMIT/FILE`."""

    server: Hub

    def do_GET(self) -> None:
        """A listing or a file."""
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        if not path:
            return self.send_json({})
        if path.startswith("api/"):
            return self.answer_api(path.removeprefix("api/"))
        kind, path = ("datasets", path.removeprefix("datasets/")) if path.startswith("datasets/") else ("models", path)
        return self.answer_file(kind, *path.split("/", 4))

    def do_HEAD(self) -> None:
        """The same without a body."""
        self.do_GET()

    def answer_api(self, path: str) -> None:
        """What a repository holds, at one level for all its folders."""
        kind, owner, name, *rest = path.split("/")
        repository, model = f"{kind}/{owner}/{name}", f"{owner}/{name}"
        if model in self.server.refusals:
            return self.refuse(*self.server.refusals[model])
        if repository not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        if rest[:1] == ["revision"] and rest[1] not in ("main", self.server.commit):
            return self.refuse(404, "RevisionNotFound")
        files = self.server.repositories[repository]
        listing = {name: (self.server.sizes.get(name, len(data)), _mark(data)) for name, data in files.items()}
        if rest[:1] == ["tree"]:
            return self.send_json([{"type": "file", "path": n, "size": s, "oid": m} for n, (s, m) in listing.items()])
        siblings = [{"rfilename": n, "size": s, "blobId": m} for n, (s, m) in listing.items()]
        return self.send_json({"id": model, "sha": self.server.commit, "siblings": siblings})

    def answer_file(self, kind: str, owner: str, name: str, _resolve: str, _commit: str, file: str) -> None:
        """One file."""
        if f"{owner}/{name}" in self.server.gated:
            return self.refuse(403, "GatedRepo")
        files = self.server.repositories.get(f"{kind}/{owner}/{name}")
        if files is None or file not in files:
            return self.refuse(404, "RepoNotFound" if files is None else "EntryNotFound")
        if self.command == "GET":
            self.server.fetched.append(file)
        return self.send(files[file], {"ETag": f'"{_mark(files[file])}"', "X-Repo-Commit": self.server.commit})

    def send_json(self, content: object) -> None:
        """An answer in JSON."""
        self.send(json.dumps(content).encode())

    def send(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        """An answer."""
        self.send_response(200)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def refuse(self, status: int, code: str | None = None) -> None:
        """No answer, and why."""
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _mark(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
