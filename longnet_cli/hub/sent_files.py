"""Checks of what a hub says: what it names becomes paths in the cache, and what it sends becomes a model.

A commit is 40 hexadecimal digits. A file's name stays below its folder. A blob, the file that a name in a snapshot
links to, is named by its ETag, hexadecimal digits. Where these are 64, they are its SHA-256, which is compared once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longnet_cli.basics.atomic import file_sha256, write_file
from longnet_cli.basics.errors import CheckpointError, LongNetError
from longnet_cli.basics.verdicts import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable

COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGITS, _SHA256 = re.compile(r"[0-9a-fA-F]+"), re.compile(r"[0-9a-f]{64}")


def check_commit(named: object, asked: str | None, repo: str) -> str:
    """Return the commit that a hub names. Raises CheckpointError for anything else, and for another one than `asked`.

    Without `asked`, any commit will do.
    """
    if not COMMIT.fullmatch(str(named)) or asked not in (None, named):
        raise CheckpointError(f"{repo}: the hub names {str(named)!r} as the commit{_instead(asked)}: nothing is taken")
    return str(named)


def _instead(asked: str | None) -> str:
    return f" instead of {asked}" if asked else ", which is not 40 hexadecimal digits"


def is_within(name: str) -> bool:
    """Return whether a file's name, which a hub or a folder's file says, stays below the folder."""
    return not (name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name)


def check_name(name: str, repo: str) -> str:
    """Return the name of a file in a repository. Raises CheckpointError for one that may lead out of its folder."""
    if not is_within(name):
        raise CheckpointError(f"{repo}: the hub names a file {name!r}, which is outside of a snapshot: it is not taken")
    return name


@contextmanager
def checked_answers(commit: str, repo: str) -> Iterator[None]:
    """Refuse the facts that a hub tells of a file before huggingface_hub makes paths of them.

    Raises CheckpointError, out of the library, for another commit and for an ETag that is not of digits.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    def check(response: Any) -> None:
        told = response.headers
        if response.request.method != "HEAD" or "X-Repo-Commit" not in told:
            return
        check_commit(told["X-Repo-Commit"], commit, repo)
        tag = told.get("X-Linked-Etag") or told.get("ETag")
        if tag and not _DIGITS.fullmatch(tag.lstrip("W/").strip('"')):
            raise CheckpointError(f"{repo}: the hub gives a file the ETag {tag!r}, not of digits: it is not taken")

    made_before: Callable[[], Any] = _http._GLOBAL_CLIENT_FACTORY  # it has no public name; proxies may be set in it

    def client() -> Any:  # not a hook of the client that there is: the library makes a new one when a host fails
        made = made_before()
        made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks["response"], check]}
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(made_before)


def check_sent(path: Path, repo: str) -> None:
    """Remove a file that a hub has sent, now or earlier, and raise CheckpointError, if its SHA-256 is not its name."""
    if damage := _damage(path):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{repo}: {path.name} is not what the hub names: {damage}; it is removed: the same command asks again"
        )


def check_blobs(folder: Path, names: Iterable[str]) -> None:
    """Compare files of a snapshot with their blobs' names, each once. Raises CheckpointError for the first damage."""
    for name in names:
        if damage := _damage(folder / name):
            raise CheckpointError(f"{folder / name}: damaged: {damage}{download_again(folder / name)}")


def download_again(path: Path) -> str:
    """Return how to download a file of a cache again, to follow an error about it; nothing for any other file."""
    again = next((folder for folder in path.parents if folder.name.startswith("models--")), None)
    return f"; to download it again, remove {again}" if again else ""


def _damage(path: Path) -> str | None:
    """Return what is wrong with a file of a cache; None if nothing is, or if nothing is known about it."""
    blob = path.resolve()
    if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name) or not blob.is_file():
        return None
    status = blob.stat()
    state = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    note = cache_folder() / "blobs" / blob.name  # in which state of its file a blob was compared
    with suppress(OSError, ValueError):
        if note.read_text(encoding="ascii") == state:
            return None
    if (digest := file_sha256(blob)) != blob.name:
        return f"its SHA-256 is {digest:.12}..., and it is named {blob.name:.12}..."
    with suppress(LongNetError):  # a folder that cannot be written: it is compared again
        write_file(note, state.encode())
    return None
