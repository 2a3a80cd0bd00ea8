"""Kinds of files, by their first bytes and by the endings of their names."""

import re
from mimetypes import MimeTypes

SHARD_SUFFIXES = (".parquet", ".pq", ".arrow", ".arrows", ".ipc", ".feather")
JSON_SUFFIXES = (".jsonl", ".ndjson")
HDF5_SUFFIXES = (".h5", ".hdf5")
FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".faa")  # which are refused
PACKED_SUFFIXES = (".gz", ".zst")
# results of `sniff` for tables with typed columns, and for what is compressed
ARROW_KINDS = ("file", "stream", "parquet")
PACKED_KINDS = ("gzip", "zstd")

_KINDS = MimeTypes()  # without those of the system, which differ
# Regular expressions of the first bytes. The last one is of a skippable frame, with which pzstd's files start.
_MAGIC = {
    rb"ARROW1\0\0": "file",
    rb"\xff\xff\xff\xff": "stream",
    rb"\x89HDF\r\n\x1a\n": "hdf5",
    rb"PAR1": "parquet",
    rb"\x1f\x8b\x08": "gzip",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"[\x50-\x5f]\x2a\x4d\x18": "zstd",
}


def sniff(head: bytes) -> str:
    """Return `file`, `stream` (Arrow IPC), `parquet`, `hdf5`, `gzip`, `zstd` or `text`, by its first 8 bytes."""
    return next((kind for magic, kind in _MAGIC.items() if re.match(magic, head)), "text")


def begins_json_lines(head: bytes) -> bool:
    """Return whether a text is JSON Lines by its first 8 bytes: a brace and a quotation mark, after blank lines.

    Pretty-printed JSON, a template and a program have something else after their first brace.
    """
    return re.match(rb'(\xef\xbb\xbf)?[\r\n]*\{ *"', head) is not None


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
