"""A repository on a hub: its files in the cache of huggingface_hub, downloaded if they are not there, and checked.

What a hub names becomes paths in the cache, and what it sends becomes a model. A commit is 40 hexadecimal digits. A
file's name stays below its folder. A blob, the file that a name in a snapshot links to, is named by its ETag,
hexadecimal digits. Where these are 64, they are its SHA-256, where 40, git's SHA-1 of it, which is compared once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple

from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.configuration import parse, read_text
from longnet_cli.basics.errors import CheckpointError, LongNetError, extra, one_line
from longnet_cli.basics.model_files import (
    BESIDE_TOKENIZER,
    CONFIG,
    GENERATION,
    MODEL_TYPE,
    MODULES,
    NEEDED_BY_MODULE,
    OF_SENTENCES,
    PROMPTS,
    SHARDED,
    TOKENIZER,
    TRANSFORMER_CONFIGS,
    WEIGHTS,
)
from longnet_cli.basics.sealed import file_git_sha1, file_sha256
from longnet_cli.basics.verdicts import remembered

FIRST_ANSWER = 2.5  # seconds to wait for a hub, unless HF_HUB_DOWNLOAD_TIMEOUT is set
_WORD = r"[A-Za-z0-9_](?:[\w.-]*[\w])?"
_NAME = re.compile(rf"({_WORD}(?:/{_WORD})?)(?:@([^@:\s/][^@:\s]*))?(?::([^:]+\.gguf))?", re.ASCII)
_LOCAL = (
    ".json",
    ".jsonl",
    ".toml",
    ".gguf",
    ".safetensors",
    ".pth",
    ".pt",
    ".bin",
)  # endings of files, not of models


class Located(NamedTuple):
    """A folder or a file, and a name that means the same contents later: ORG/NAME@COMMIT for those of a hub."""

    path: Path
    name: str


@dataclass(frozen=True)
class Repository:
    """The `name` of a model on a hub, and its parts. Of a `tokenizer`, only the tokenizer's files are read."""

    name: str
    repo: str
    revision: str
    file: str | None
    tokenizer: bool
    embeds: bool = False  # needs the files of sentence-transformers

    @classmethod
    def of(cls, name: str, tokenizer: bool = False, *, embeds: bool = False) -> Repository | None:
        """Return the repository that a name stands for; None for a path that exists and for other names."""
        match = _NAME.fullmatch(name)
        if (
            not match
            or ".." in name
            or "--" in match[1]
            or match[1].endswith(_LOCAL)
            or os.path.exists(name)
        ):
            return None
        return cls(name, match[1], match[2] or "main", match[3], tokenizer, embeds)

    def find(self, *, update: bool = False) -> Located:
        """Return the folder or the file in the cache, downloaded if it is not there. `update` asks the hub first."""
        constants = self._library()
        if update or not self._is_cached():
            try:
                self._download(constants, update)
            except CheckpointError:
                if update or not self._is_cached(any_tokenizer=True):
                    raise
        commit = self._commit()
        snapshot = self._folder / "snapshots" / str(commit)
        file = f":{self.file}" if self.file else ""
        return Located(
            snapshot / self.file if self.file else snapshot, f"{self.repo}@{commit}{file}"
        )

    def _library(self) -> ModuleType:
        try:
            from huggingface_hub import constants
        except ImportError:
            raise CheckpointError(
                f"{self._not_here}; a model on a hub needs the extra hf: {extra('hf')}"
            ) from None
        return constants

    @property
    def _not_here(self) -> str:
        if "/" in self.repo:
            return f"{self.name}: no folder of that name here"
        return (
            f"{self.name}: no model of that name ships (a path needs a slash, e.g. ./{self.name})"
        )

    @property
    def _folder(self) -> Path:
        return Path(self._library().HF_HUB_CACHE, f"models--{self.repo.replace('/', '--')}")

    def _commit(self) -> str | None:
        """Return the commit that the revision is in the cache; None if it is not there."""
        return (
            self.revision
            if COMMIT.fullmatch(self.revision)
            else _read_ref(self._folder, self.revision)
        )

    def _is_cached(self, *, any_tokenizer: bool = False) -> bool:
        """Return whether the cache has all files that are needed.

        A model needs a tokenizer.json unless its repository is known to have none, or with `any_tokenizer`.
        """
        if not (commit := self._commit()):
            return False
        snapshot, needed = self._folder / "snapshots" / commit, [TOKENIZER]
        if self.file:
            needed = [self.file]
        elif not self.tokenizer:
            none = any_tokenizer or (self._folder / ".no_exist" / commit / TOKENIZER).exists()
            needed = [CONFIG, *weight_files(snapshot), *([] if none else needed)]
            if self.embeds and unknown_files(snapshot):
                return False
        return all((snapshot / name).is_file() for name in needed)

    def _download(self, constants: Any, update: bool) -> None:
        """Download the files that the cache lacks, of one commit. Raises CheckpointError.

        Several processes may do so: the library locks each file, and the first one downloads it.
        """
        from huggingface_hub import HfApi, hf_hub_download

        commit, own = None if update else self._commit(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        seconds = FIRST_ANSWER if own == constants.DEFAULT_DOWNLOAD_TIMEOUT else own
        answered, file = False, None
        try:
            info = _within(
                seconds,
                lambda: HfApi().model_info(
                    self.repo, revision=commit or self.revision, timeout=seconds
                ),
            )
            answered, commit = True, check_commit(info.sha, commit, self.name)
            names = {file.rfilename for file in info.siblings or ()}
            snapshot = self._folder / "snapshots" / commit
            with checked_answers(commit, self.name):
                for file in self._wanted(
                    names, snapshot
                ):  # one by one: threads would keep Ctrl-C waiting
                    if not is_within(file):
                        what = f"a file {file!r}, which is outside of a snapshot"
                        raise CheckpointError(f"{self.name}: the hub names {what}: it is not taken")
                    path = hf_hub_download(self.repo, file, revision=commit)
                    check_sent(Path(path), self.name)
            for name in (
                ()
                if self.file
                else ({TOKENIZER} if self.tokenizer else {TOKENIZER, *OF_SENTENCES}) - names
            ):
                (absent := self._folder / ".no_exist" / commit / name).parent.mkdir(
                    parents=True, exist_ok=True
                )
                absent.touch()
        except LongNetError:
            raise
        except Exception as error:  # its libraries raise exceptions of many kinds
            raise CheckpointError(self._explain(error, constants, answered, file)) from None
        if not COMMIT.fullmatch(
            self.revision
        ):  # last: a revision in the cache is one that was whole
            reference = self._folder / "refs" / self.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_file(reference, commit.encode())

    def _wanted(self, names: set[str], snapshot: Path) -> Iterator[str]:
        """Yield the files to download of a repository with these `names`. Raises CheckpointError if it lacks some."""
        ggufs = ", ".join(f"{self.repo}:{name}" for name in sorted(names) if name.endswith(".gguf"))
        if self.file:
            if self.file not in names:
                have = f"; it has {ggufs or 'no GGUF files'}" if self.file.endswith(".gguf") else ""
                raise CheckpointError(f"{self.name}: the repository has no file of that name{have}")
            yield self.file
            return
        if self.tokenizer:
            if TOKENIZER not in names:
                raise CheckpointError(f"{self.name}: the repository has no {TOKENIZER}")
            yield from sorted(names & {TOKENIZER, *BESIDE_TOKENIZER})
            return
        if CONFIG not in names or not names & {WEIGHTS, SHARDED}:
            if ggufs:
                raise CheckpointError(
                    f"{self.name}: the repository has GGUF files, name one: {ggufs}"
                )
            pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
            why = "; pickled weights are never read, since a pickle can run code" if pickled else ""
            raise CheckpointError(
                f"{self.name}: the repository has no {CONFIG} with {WEIGHTS}{why}"
            )
        index = set() if WEIGHTS in names else {SHARDED}
        of_sentences = {MODULES, PROMPTS, *TRANSFORMER_CONFIGS}
        yield from sorted(
            names & ({CONFIG, GENERATION, TOKENIZER, *BESIDE_TOKENIZER, *of_sentences} | index)
        )
        yield from sorted(names & {name for name, _ in module_files(snapshot)})
        yield from [WEIGHTS] if WEIGHTS in names else weight_files(snapshot)

    def _explain(
        self, error: BaseException, constants: Any, answered: bool, file: str | None
    ) -> str:
        """Return why a download failed, of one `file` or before the first, and what to do."""
        from huggingface_hub import errors

        hub, here, log_in = (
            constants.ENDPOINT,
            self._not_here,
            "log in (hf auth login) or set HF_TOKEN",
        )
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__
        if isinstance(error, errors.GatedRepoError):
            return f"{here}, and {hub}/{self.repo} is gated: ask for access there, then {log_in}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{here}, and no repository of that name on {hub}, or a private one: check the name, or {log_in}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.name}: {self.repo} has no revision {self.revision} on {hub}: name a branch, tag or commit"
        if isinstance(error, errors.HfHubHTTPError):
            code = error.response.status_code
            what = f": {log_in}" if code in (401, 403) else ""
            refused = f"refuses its file {file}" if file else "refuses it"
            refused = f"has no file {file} of it" if file and code == 404 else refused
            return (
                f"{here}, and {hub} {refused} ({code} {error.server_message or ''}".rstrip()
                + f"){what}"
            )
        if (
            isinstance(error, OSError)
            and error.strerror
            and not isinstance(error, ConnectionError | TimeoutError)
        ):
            return f"{here}, and the cache {constants.HF_HUB_CACHE} cannot be written: {error.strerror}"
        said = one_line(error) or type(error).__name__
        if answered:
            return f"{self.name}: the download broke off ({said}): the same command continues it"
        if isinstance(error, errors.OfflineModeIsEnabled):
            why, then = "HF_HUB_OFFLINE is set", "without it"
        else:
            why, then = f"{hub} does not answer ({type(error).__name__})", "with a network"
        if self._is_cached(any_tokenizer=True):
            return f"{self.name}: {why}: leave out --update to take what is in the cache {constants.HF_HUB_CACHE}"
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        file = f" {self.file}" if self.file else ""
        download = f"hf download {self.repo}{file}{revision}"
        return (
            f"{here}, nor in {constants.HF_HUB_CACHE}, and {why}: {then}, repeat this or {download}"
        )


def snapshot_in(folder: Path) -> Located | None:
    """Return the snapshot of `main`, or the only one, in the folder of a repository in a cache; None for other folders.

    Raises CheckpointError where it is not clear which snapshot is meant.
    """
    if not folder.name.startswith("models--") or not (snapshots := folder / "snapshots").is_dir():
        return None
    present, commit = (
        sorted(path for path in snapshots.iterdir() if path.is_dir()),
        _read_ref(folder, "main"),
    )
    meant = [path for path in present if path.name == commit] or present
    if len(meant) != 1:
        names = ", ".join(map(str, present)) or "there is none"
        raise CheckpointError(
            f"{folder}: its refs/main leads to no snapshot: name a snapshot ({names})"
        )
    return Located(meant[0], str(meant[0]))


def _read_ref(folder: Path, revision: str) -> str | None:
    with suppress(OSError, ValueError):
        commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        return commit if COMMIT.fullmatch(commit) else None
    return None


def module_files(snapshot: Path) -> Iterator[tuple[str, bool]]:
    """Yield the files of the modules that modules.json names in folders of their own, and whether each is needed."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        for module in parse(read_text(snapshot / MODULES)):
            if folder := str(module.get("path", "")):
                needed = NEEDED_BY_MODULE.get(str(module.get("type")).rpartition(".")[2], ())
                yield from ((f"{folder}/{name}", name in needed) for name in (CONFIG, WEIGHTS))


def unknown_files(snapshot: Path) -> str | None:
    """Return a file of sentence-transformers of which the cache of a hub does not know whether there is one.

    A LongNet needs none of them.
    """
    with suppress(OSError, ValueError, AttributeError):
        if parse(read_text(snapshot / CONFIG)).get("model_type", MODEL_TYPE) == MODEL_TYPE:
            return None
    absent = snapshot.parents[1] / ".no_exist" / snapshot.name
    if not (snapshot / MODULES).is_file():
        return None if (absent / MODULES).exists() else MODULES
    files = [*OF_SENTENCES, *(name for name, needed in module_files(snapshot) if needed)]
    return next(
        (name for name in files if not ((snapshot / name).is_file() or (absent / name).exists())),
        None,
    )


def weight_files(snapshot: Path) -> list[str]:
    """Return the files with the weights of a snapshot, as its index lists them."""
    if not (snapshot / WEIGHTS).exists():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return sorted(
                {str(name) for name in parse(read_text(snapshot / SHARDED))["weight_map"].values()}
            )
    return [WEIGHTS]


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """Return what `ask` returns. Raises TimeoutError after `seconds`: to look up a host has no limit of its own."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()  # not a pool's, which a program waits for at its end
    if not wait([answer], seconds).done:
        raise TimeoutError(
            f"no answer in {seconds:g} seconds, HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer"
        )
    return answer.result()


COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGITS = re.compile(r"[0-9a-fA-F]+")
_DIGESTS = {
    64: ("SHA-256", file_sha256),
    40: ("git SHA-1", file_git_sha1),
}  # by the digits of a blob's name


def check_commit(named: object, asked: str | None, repo: str) -> str:
    """Return the commit that a hub names. Raises CheckpointError for anything else, and for another one than `asked`.

    Without `asked`, any commit will do.
    """
    if not COMMIT.fullmatch(str(named)) or asked not in (None, named):
        wanted = f" instead of {asked}" if asked else ", which is not 40 hexadecimal digits"
        raise CheckpointError(
            f"{repo}: the hub names {str(named)!r} as the commit{wanted}: nothing is taken"
        )
    return str(named)


def is_within(name: str) -> bool:
    """Return whether a file's name, which a hub or a folder's file says, stays below the folder."""
    return not (name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name)


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
            raise CheckpointError(
                f"{repo}: the hub gives a file the ETag {tag!r}, not of digits: it is not taken"
            )

    made_before: Callable[[], Any] = (
        _http._GLOBAL_CLIENT_FACTORY
    )  # it has no public name; proxies may be set in it

    def client() -> (
        Any
    ):  # not a hook of the client that there is: the library makes a new one when a host fails
        made = made_before()
        made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks["response"], check]}
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(made_before)


def check_sent(path: Path, repo: str) -> None:
    """Remove a file that a hub has sent, now or earlier, and raise CheckpointError, if its digest is not its name."""
    if damage := _damage(path):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{repo}: {path.name} is not what the hub names: {damage}; it is removed: the same command asks again"
        )


def check_blobs(model: Path) -> None:
    """Compare the weights and modules of a snapshot, or its GGUF file, with their blobs' names, each once.

    Raises CheckpointError for the first damage.
    """
    names = [*weight_files(model), *(name for name, _ in module_files(model))]
    for file in [model] if model.suffix == ".gguf" else [model / name for name in names]:
        if damage := _damage(file):
            raise CheckpointError(f"{file}: damaged: {damage}{download_again(file)}")


def download_again(path: Path) -> str:
    """Return how to download a file of a cache again, to follow an error about it; nothing for any other file."""
    again = next((folder for folder in path.parents if folder.name.startswith("models--")), None)
    return f"; to download it again, remove {again}" if again else ""


def _damage(path: Path) -> str | None:
    """Return what is wrong with a file of a cache; None if nothing is, or if nothing is known about it."""
    blob = path.resolve()
    kind, find = _DIGESTS.get(len(blob.name), ("", None))
    if (
        blob.parent.name != "blobs"
        or not find
        or not _DIGITS.fullmatch(blob.name)
        or not blob.is_file()
    ):
        return None
    status = blob.stat()
    file = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    digest = remembered({f"{kind} of": file}, partial(find, blob))
    return (
        None
        if digest == blob.name.lower()
        else f"its {kind} is {digest:.12}..., and it is named {blob.name:.12}..."
    )
