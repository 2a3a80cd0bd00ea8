"""A repository on a hub: its files in the cache of huggingface_hub, downloaded where they are missing.

The library makes paths of what a hub names. It refuses a file's name that leads out of a snapshot. Two other names are
checked here: a commit is 40 hexadecimal digits, and the ETag of a file, which becomes its blob's name, has no others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.errors import CheckpointError, LongNetError, extra, one_line
from longnet_cli.basics.model_files import (
    BESIDE_MODEL,
    BESIDE_TOKENIZER,
    CONFIG,
    MODULES,
    TOKENIZER,
    WEIGHTS,
    weight_files,
)

COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r'(W/)?"?[0-9a-fA-F]+"?')
_NAME = re.compile(
    r"(?!.*\.\.)((?:[\w-]+(?:\.[\w-]+)*/)?[\w-]+(?:\.[\w-]+)*)"  # the repository
    r"(?:@([^@:\s/][^@:\s]*))?(?::([^:]+\.(?:gguf|pth)))?",  # the revision and the file
    re.ASCII,
)
_FILES = (".json", ".jsonl", ".toml", ".gguf", ".safetensors", ".pth", ".pt", ".bin")
_READ_TOO = {CONFIG: BESIDE_MODEL, TOKENIZER: BESIDE_TOKENIZER}  # the files beside the first one
_LOG_IN = "log in (hf auth login) or set HF_TOKEN"
_REASONS = {  # by the names of the errors of huggingface_hub and of Python
    "GatedRepoError": f"it is gated: ask for access on its page, then {_LOG_IN}",
    "RepositoryNotFoundError": f"it is not there, or private: check the name, or {_LOG_IN}",
    "RevisionNotFoundError": "it has no such branch, tag or commit",
    "RemoteEntryNotFoundError": "it has no safetensors: pickles are never read; name a GGUF file as ORG/NAME:FILE.gguf",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "ModuleNotFoundError": f"that needs the extra hf: {extra('hf')}",
}


class Located(NamedTuple):
    """A folder or a file, and a name that means the same contents later: ORG/NAME@COMMIT for those of a hub."""

    path: Path
    name: str


@dataclass(frozen=True)
class Repository:
    """A `name` on a hub, taken apart into `repo`, `revision` and `file`, and the names of files that are `needed`.

    The cache must have the first of the `needed` files. It must have the others too, or know that there are none.
    """

    name: str
    repo: str
    revision: str
    file: str
    needed: tuple[str, ...]

    @classmethod
    def of(cls, name: str, *needed: str) -> Repository | None:
        """Return the repository that a name stands for; None for a path that exists and for other names."""
        match = _NAME.fullmatch(name)
        if match is None or match[1].endswith(_FILES) or os.path.exists(name):
            return None
        repo, revision, file = match.groups(default="")
        return cls(name, repo, revision or "main", file, (file,) if file else needed)

    def find(self) -> Located:
        """Return the folder or the file in the cache, downloaded if it is not there.

        Raises CheckpointError, in one line, for all that fails.
        """
        with self._errors():
            snapshot = self._in_cache() or self._download()
        # without a file, nothing follows the commit
        name = f"{self.repo}@{snapshot.name}:{self.file}".removesuffix(":")
        return Located(snapshot / self.file, name)

    def update(self) -> None:
        """Ask the hub what the revision is now, and download what is new. Raises as `find` does."""
        with self._errors():
            self._download()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except LongNetError:
            raise
        except Exception as error:  # the library raises errors of many kinds
            told = type(error).__name__ in _REASONS
            cause = error if told else error.__cause__ or error
            kind = type(cause).__name__
            reason = _REASONS.get(kind, f"{kind}: {one_line(cause)}")
            hub = os.environ.get("HF_ENDPOINT", "huggingface.co")
            raise CheckpointError(
                f"{self.name}: no folder of that name here, and not taken from {hub}: {reason}"
            ) from None

    def _in_cache(self) -> Path | None:
        """Return the snapshot in the cache if that has all that is needed, otherwise None."""
        from huggingface_hub import try_to_load_from_cache

        places = [try_to_load_from_cache(self.repo, x, revision=self.revision) for x in self.needed]
        if None in places or not isinstance(places[0], str):
            return None
        snapshot = Path(places[0].removesuffix(self.needed[0]))
        weights = weight_files(snapshot) if CONFIG in self.needed else []
        is_whole = all((snapshot / name).is_file() for name in weights)
        return snapshot if is_whole else None

    def _download(self) -> Path:
        """Download what is read, of one commit, and return its snapshot. Several processes may do so at a time."""
        from huggingface_hub import HfApi, constants, hf_hub_download
        from huggingface_hub.utils import filter_repo_objects

        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        answer = HfApi().model_info(self.repo, revision=self.revision, timeout=seconds)
        commit = str(answer.sha)
        what = f"{self.name}: the hub names the commit {commit!r}, which is not"
        if not COMMIT.fullmatch(commit):
            raise CheckpointError(f"{what} 40 hexadecimal digits")
        if COMMIT.fullmatch(self.revision) and commit != self.revision:
            raise CheckpointError(f"{what} the one that was asked for")
        names = sorted(file.rfilename for file in answer.siblings or ())
        first = self.needed[0]
        if first not in names:
            raise CheckpointError(f"{self.name}: the repository has no {first}")
        patterns = [*self.needed, *_READ_TOO.get(first, ())]
        wanted = filter_repo_objects(names, allow_patterns=patterns)
        cache = Path(constants.HF_HUB_CACHE, f"models--{self.repo.replace('/', '--')}")
        snapshot = cache / "snapshots" / commit
        with _checked_etags(self.name):
            # one by one: the threads of `snapshot_download` keep Ctrl-C waiting until a whole file has come
            for file in wanted:
                hf_hub_download(self.repo, file, revision=commit)
            if first == CONFIG:
                for file in [WEIGHTS] if WEIGHTS in names else weight_files(snapshot):
                    hf_hub_download(self.repo, file, revision=commit)
        for file in {TOKENIZER, MODULES}.difference(names):
            write_file(cache / ".no_exist" / commit / file, b"")
        if commit != self.revision:  # at the end: what a revision in the cache names is whole
            write_file(cache / "refs" / self.revision, commit.encode())
        return snapshot


@contextmanager
def _checked_etags(name: str) -> Iterator[None]:
    """Refuse an ETag that is not of digits before huggingface_hub makes a path of it.

    The library makes a new client when a host has failed, so what makes its clients adds the check.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    def check(response: Any) -> None:
        headers = response.headers
        etag = headers.get("X-Linked-Etag") or headers.get("ETag", "0")
        if response.request.method == "HEAD" and not _ETAG.fullmatch(etag):
            raise CheckpointError(f"{name}: the hub names a file {etag!r}, which is not of digits")

    make_client = _http._GLOBAL_CLIENT_FACTORY  # it has no public name

    def make_checked_client() -> Any:
        client = make_client()
        client.event_hooks["response"].append(check)
        return client

    set_client_factory(make_checked_client)
    try:
        yield
    finally:
        set_client_factory(make_client)


def download_again(path: Path) -> str:
    """Return how to download a file of a cache again, to follow an error about it; nothing for any other file."""
    again = next((folder for folder in path.parents if folder.name.startswith("models--")), None)
    return f"; to download it again, remove {again}" if again else ""
