"""Digests of the contents of input files, by which a resumed run knows them again."""

import hashlib
import os
from contextlib import suppress

from longnet_cli.data.folders import sniff
from longnet_cli.data.names import Source

WHOLE_TEXT, WHOLE_TABLE = 1 << 30, 1 << 23  # a resumed run reads all of a text again, and passes over tables
PIECES, PIECE, END = 64, 1 << 16, 1 << 20


def content_digest(source: Source) -> str | None:
    """Return a digest of a file's contents; None for a pipe, and for what cannot be read, which its reader reports.

    A file of at most WHOLE_TEXT bytes, or WHOLE_TABLE for a table, is read whole. Of a larger one, the digest is of its
    size, both ends (a table's footer) and PIECES pieces. Of a file in a store, it is of the ETag, or size and time.
    """
    if source.path is None:
        return None
    if source.filesystem is not None and source.filesystem.type_name != "local":
        from longnet_cli.data.remote import version  # imported late: 20 ms that local input does not need

        found = version(source.filesystem, str(source.path))
        return found and hashlib.sha256(found.encode()).hexdigest()[:16]
    if not source.path.is_file():
        return None
    with suppress(OSError), open(source.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(b"%d" % size)
        ranges = [(0, size)]
        if size > (WHOLE_TEXT if sniff(file.read(8)) == "text" else WHOLE_TABLE):
            pieces = [(size * piece // PIECES, PIECE) for piece in range(PIECES)]
            ranges = [(0, END), *pieces, (size - END, END)]
        for start, length in ranges:
            file.seek(start)
            while data := file.read(min(length, END)):
                digest.update(data)
                length -= len(data)
        return digest.hexdigest()[:16]
    return None
