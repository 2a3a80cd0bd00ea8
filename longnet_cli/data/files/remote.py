"""Inputs in a store: `s3://`, `gs://`, `hf://` and other URIs that pyarrow or fsspec can reach."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as fs

from longnet_cli.basics.errors import ConfigError, DataError, LongNetError, first_line

from .folder_files import choose_files, natural_order
from .opened_inputs import reading

# Google's library repeats a failed request for 15 minutes: too long to say that there is no network. That is right for
# reading, so that a long read outlives a short failure.
LIMIT = "retry_limit_seconds=3"


# Not fsspec alone: pyarrow reads s3:// and gs:// without another package.
def connect(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a URI, pyarrow's own or otherwise fsspec's, and the path on it.

    Raises ConfigError for a scheme that neither knows, saying what to install.
    """
    # it does not know each scheme, or was built without it
    with suppress(pa.ArrowInvalid, NotImplementedError, ImportError):
        return fs.FileSystem.from_uri(quote(uri, safe=":/?#&=@%+,;~!$'()*"))
    scheme = uri.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(uri)
    except ImportError as error:
        raise ConfigError(
            f"{uri}: {scheme}:// needs a package: pip install fsspec ({first_line(error)})"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{uri}: no filesystem is known for {scheme}:// ({first_line(error)})"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def find_remote(uri: str) -> tuple[fs.FileSystem, list[tuple[str, str, str, int | None]]]:
    """Return the filesystem of a URI, and the path, name, own URI and size of each file that the URI names.

    A URI names one file, the files of a folder (chosen as in a local folder), or the files that a * or ** matches.
    """
    address, mark, query = uri.partition("?")
    magic = re.search(r"[^/]*[*]", address)
    base = address[: magic.start()].rstrip("/") if magic else address
    folder = base.rstrip("/")
    with _telling(uri):
        filesystem, path = connect(f"{base}{mark}{query}")
        asked = filesystem
        if base.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in query:
            asked, _ = connect(f"{base}?{'&'.join(filter(None, (query, LIMIT)))}")
        info = asked.get_file_info(path)
        if info.type == fs.FileType.File and not magic:
            return filesystem, [(path, info.base_name, address, info.size)]
        sizes = _sizes_below(asked, path) if info.type == fs.FileType.Directory else {}

        def read(name: str, size: int | None) -> bytes:
            with asked.open_input_stream(f"{path}/{name}") as file:
                return bytes(file.read(size))

        if magic:
            matches = _glob(address[magic.start() :])
            matching = [name for name in sizes if matches.fullmatch(name)]
            names = sorted(matching, key=natural_order)
            if not names:
                raise DataError(f"{uri}: no file matches")
        elif sizes:
            names = choose_files(folder, [*sizes], read)
        else:
            raise DataError(f"{uri}: no such file or folder")
    return filesystem, [(f"{path}/{name}", name, f"{folder}/{name}", sizes[name]) for name in names]


def open_remote(filesystem: fs.FileSystem, path: str, where: str) -> Any:
    """Open a file in a store, which can seek. `where` is its name in messages."""
    with _telling(where):
        return filesystem.open_input_file(path)


def version(filesystem: fs.FileSystem, path: str) -> str | None:
    """Return the ETag of a file in a store, otherwise its size and time of writing; None if the store gives neither."""
    try:
        handler = getattr(filesystem, "handler", None)  # of those that are no pyarrow's own
        if isinstance(handler, fs.FSSpecHandler):
            metadata = handler.fs.info(path)
        else:
            with filesystem.open_input_stream(path) as file:
                metadata = file.metadata()
        if tag := metadata.get("ETag") or metadata.get("etag"):
            return str(tag)
        info = filesystem.get_file_info(path)
        return f"{info.size} {info.mtime_ns}" if info.mtime_ns else None
    except Exception:  # as its libraries raise; reading the file will report it
        return None


def _sizes_below(filesystem: fs.FileSystem, path: str) -> dict[str, int | None]:
    """Return the size of each file below a folder, by its name relative to the folder; None where it is not known."""
    entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    folder = f"{path.strip('/')}/"
    return {
        entry.path.strip("/").removeprefix(folder): entry.size
        for entry in entries
        if entry.type == fs.FileType.File
    }


def _glob(pattern: str) -> re.Pattern[str]:
    """Compile a pattern: * stands for anything in one name, ** for any folders."""
    rules = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*"}
    pieces = re.split(r"(\*\*/|\*\*|\*)", pattern)
    return re.compile("".join(rules.get(piece, re.escape(piece)) for piece in pieces))


@contextmanager
def _telling(uri: str) -> Iterator[None]:
    """Turn every error between here and a store into one line: its libraries raise exceptions of many kinds."""
    with reading(uri):
        try:
            yield
        except (LongNetError, MemoryError):
            raise
        except Exception as error:
            number = getattr(error, "errno", None) or errno.EIO
            # Google's library says all twice
            reason = first_line(error).partition(" error_info=")[0]
            raise OSError(number, reason) from error
