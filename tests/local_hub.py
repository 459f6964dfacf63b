"""A hub on this machine: folders as repositories, by the few requests that the hub's own clients make.

`datasets` and `huggingface_hub` speak to it over HTTP as they do to huggingface.co, once `HF_ENDPOINT` names it.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
"""Of every repository; its branch is main."""


@contextmanager
def serving(root: Path) -> Iterator["Hub"]:
    """Serve ROOT/models/OWNER/NAME and ROOT/datasets/OWNER/NAME."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Hub(ThreadingHTTPServer):
    """Attributes: `asked`, the method and path of every request."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.asked = root, list[str]()

    @property
    def address(self) -> str:
        """What `HF_ENDPOINT` is set to."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """A repository, its files, or one of them."""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.server.asked.append(f"{self.command} {'/'.join(parts)}")
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            kind, owner, name, *rest = parts[1:]
            return self._about(kind, self._repository(kind, owner, name), f"{owner}/{name}", rest)
        kind, parts = (parts[0], parts[1:]) if parts[0] == "datasets" else ("models", parts)
        if len(parts) > 4 and parts[2] == "resolve" and parts[3] in ("main", COMMIT):
            folder = self._repository(kind, *parts[:2])
            return self._file(folder, "/".join(parts[4:]))
        return self._refuse("EntryNotFound")

    def do_POST(self) -> None:
        """What is known of some files of a repository."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path).path.strip("/").split("/")
        self.server.asked.append(f"POST {'/'.join(parts)}")
        folder = self._repository(*parts[1:4]) if parts[4:5] == ["paths-info"] else None
        if folder is None:
            return self._refuse("EntryNotFound")
        wanted = json.loads(body)["paths"]
        return self._answer([entry for entry in _entries(folder) if entry["path"] in wanted])

    def _repository(self, kind: str, owner: str, name: str) -> Path | None:
        folder = self.server.root / kind / owner / name
        return folder if folder.is_dir() else None

    def _about(self, kind: str, folder: Path | None, name: str, rest: list[str]) -> None:
        if folder is None:
            return self._refuse("RepoNotFound")
        if rest[:1] == ["tree"]:
            return self._answer(_entries(folder))
        if rest[1:2] not in ([], ["main"], [COMMIT]):
            return self._refuse("RevisionNotFound")
        files = [
            {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]} for entry in _entries(folder)
        ]
        return self._answer({"id": name, "sha": COMMIT, "siblings": files, "private": False, "gated": False,
                             "disabled": False, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def _file(self, folder: Path | None, name: str) -> None:
        if folder is None or not (folder / name).is_file():
            return self._refuse("EntryNotFound" if folder else "RepoNotFound")
        content = (folder / name).read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_mark(content)}"')
        return self._send(content, "application/octet-stream")

    def _answer(self, content: object) -> None:
        self.send_response(200)
        self._send(json.dumps(content).encode(), "application/json")

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self._send(b"{}", "application/json")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entries(folder: Path) -> list[dict[str, object]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size,
         "oid": _mark(path.read_bytes())} for path in files
    ]  # fmt: skip


def _mark(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
