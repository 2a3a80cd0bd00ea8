"""Kinds of files, by their first bytes and by the endings of their names."""

import re
from mimetypes import MimeTypes

SHARD_SUFFIXES = (".parquet", ".pq", ".arrow", ".arrows", ".ipc", ".feather")
JSON_SUFFIXES = (".jsonl", ".ndjson")
HDF5_SUFFIXES = (".h5", ".hdf5")
FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".faa")  # which are refused
PACKED_SUFFIXES = (".gz", ".zst")
ARROW_KINDS = ("file", "stream", "parquet")  # results of `sniff` for tables with typed columns

_KINDS = MimeTypes()  # without those of the system, which differ
# Regular expressions of the first bytes. The last one is of a skippable frame, with which pzstd's files start.
_PACKED = {
    rb"\x1f\x8b\x08": "gzip",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"[\x50-\x5f]\x2a\x4d\x18": "zstd",
}
_MAGIC = {
    b"ARROW1\0\0": "file",
    b"\xff\xff\xff\xff": "stream",
    b"\x89HDF\r\n\x1a\n": "hdf5",
    b"PAR1": "parquet",
}


def sniff(head: bytes) -> str:
    """Return `file`, `stream` (Arrow IPC), `parquet`, `hdf5` or `text`, by at least the first 8 bytes."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "text")


def begins_json_lines(head: bytes) -> bool:
    """Return whether a text is JSON Lines by its first 8 bytes: a brace and a quotation mark, after blank lines.

    Pretty-printed JSON, a template and a program have something else after their first brace.
    """
    return re.match(rb'(\xef\xbb\xbf)?[\r\n]*\{ *"', head) is not None


def compression(head: bytes) -> str | None:
    """Return the compression of an input, by at least its first 8 bytes; None if it is not compressed."""
    return next((name for magic, name in _PACKED.items() if re.match(magic, head)), None)


def bare_name(name: str) -> str:
    """Return the name of a file in lower case, without the suffix of its compression: `a.jsonl` for `A.jsonl.GZ`."""
    name = name.lower()
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def is_named_text(name: str) -> bool:
    """Return whether the suffix of a file names a kind of text."""
    bare = bare_name(name)
    return (_KINDS.guess_type(bare)[0] or "").startswith("text/") or bare.endswith((".md", ".rst"))
