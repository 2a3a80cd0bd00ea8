"""A hub on the loopback interface, which answers huggingface_hub as the real one does; and a cache filled by hand."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def name_of(name: str, data: bytes) -> str:
    """The ETag of a file, which names its blob: git's, and of a large file its SHA-256."""
    large = name.endswith((".safetensors", ".gguf"))
    return (
        hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
    ).hexdigest()


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def fill_cache(
    cache: Path, repo: str, files: dict[str, bytes], revision: str | None = "main"
) -> str:
    """Put files into a cache as huggingface_hub does: blobs, a snapshot of links to them, a ref. Returns the commit."""
    folder, commit = cache / f"models--{repo.replace('/', '--')}", commit_of(files)
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        blob = folder / "blobs" / name_of(name, data)
        blob.write_bytes(data)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    if revision:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
    return commit


class LoopbackHub:
    """A hub whose repositories are `push`ed: `commits[repo]` has the files of each commit, `refs[repo]` the branches.

    Large files are redirected to another path, as the hub does. `requests` are the method and path of all requests.
    `ranges` are the parts that were asked for. The connection breaks once after each of `breaks` bytes of a large file.
    Paths that start with `stalled` get no answer. `refused` repositories answer with that error, and all others with
    the `secret` only, if there is one. `told` replaces what it says: the `sha` of a repository, and headers of files.
    `sent` replaces the contents of files, and `status` answers for files with an error.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.breaks: list[int] = []
        self.stalled: str | None = None
        self.refused: dict[str, tuple[int, str]] = {}
        self.secret: str | None = None
        self.told: dict[str, str] = {}
        self.sent: dict[str, bytes] = {}
        self.status: dict[str, int] = {}
        self.url = ""

    def downloaded(self) -> list[str]:
        """The files that were asked for so far, by their paths in the repository."""
        asked = re.findall(r"GET /.*?/resolve/[^/]+/(\S+)", "\n".join(self.requests))
        return [name.partition("?")[0] for name in asked]

    def push(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        commit = commit_of(files)
        self.commits.setdefault(repo, {})[commit] = files
        self.refs.setdefault(repo, {})[branch] = commit
        return commit


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if self.command == "GET" and hub.stalled and self.path.startswith(hub.stalled):
                while hub.stalled:
                    time.sleep(0.01)
                self.close_connection = True
                return
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/((?:[^/]+/)?[^/]+)/revision/([^/]+)", path):
                self.info(*match.groups())
            elif match := re.fullmatch(r"/api/models/((?:[^/]+/)?[^/]+)/tree/([^/]+)", path):
                self.tree(*match.groups())
            elif match := re.fullmatch(r"/(cdn/)?((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)", path):
                self.file(*match.groups())
            else:
                self.answer(404)

        def info(self, repo: str, revision: str) -> None:
            if (commit := self.commit(repo, revision)) and not self.refuse(repo, "RepoNotFound"):
                names = [{"rfilename": name} for name in hub.commits[repo][commit]]
                sha = hub.told.get("sha", commit)
                self.answer(200, json.dumps({"id": repo, "sha": sha, "siblings": names}).encode())

        def tree(self, repo: str, revision: str) -> None:
            if (commit := self.commit(repo, revision)) and not self.refuse(repo, "RepoNotFound"):
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": name_of("", data)}
                    for name, data in hub.commits[repo][commit].items()
                ]
                self.answer(200, json.dumps(entries).encode())

        def commit(self, repo: str, revision: str) -> str | None:
            commits, revision = hub.commits.get(repo), "main" if hub.told else revision
            commit = (
                revision if revision in (commits or {}) else hub.refs.get(repo, {}).get(revision)
            )
            if not commit:
                self.answer(
                    404,
                    b"",
                    **{"X-Error-Code": "RepoNotFound" if not commits else "RevisionNotFound"},
                )
            return commit

        def refuse(self, repo: str, when: str) -> bool:
            status, code = hub.refused.get(repo, (0, ""))
            if hub.secret and self.headers.get("authorization") != f"Bearer {hub.secret}":
                status, code = 401, when
            if refused := code == when:
                self.answer(status, b"", **{"X-Error-Code": code})
            return refused

        def file(self, cdn: str | None, repo: str, revision: str, name: str) -> None:
            if not (commit := self.commit(repo, revision)) or (
                not cdn and self.refuse(repo, "GatedRepo")
            ):
                return
            data = hub.commits[repo][commit].get(name)
            known = {"X-Repo-Commit": hub.told.get("X-Repo-Commit", commit)}
            if data is None:
                self.answer(404, b"", **known, **{"X-Error-Code": "EntryNotFound"})
                return
            if name in hub.status:
                self.answer(hub.status[name])
                return
            digest, data = hub.told.get("ETag", name_of(name, data)), hub.sent.get(name, data)
            if not cdn and name.endswith((".safetensors", ".gguf")):
                linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
                self.answer(302, b"", Location=f"{hub.url}/cdn{self.path}", **known, **linked)
                return
            start = 0
            if wanted := self.headers.get("Range"):
                hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                known["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206 if wanted else 200, data[start:], ETag=f'"{digest}"', **known)

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "GET":
                return
            if self.path.startswith("/cdn/") and hub.breaks:
                body, self.close_connection = body[: hub.breaks.pop(0)], True
            with suppress(ConnectionError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    hub.stalled = None
    server.shutdown()
    server.server_close()
