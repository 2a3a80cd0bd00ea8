"""The file of chosen blocks that `score --chosen` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.groups import GroupedPart
from longnet_cli.data.outputs import ShardWriter
from longnet_cli.runtime.reader import OnWindows, Window

BATCH = 1 << 14  # rows per record batch


def chosen_schema(metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of chosen blocks: a row says what the tokens [start, stop) of a document see in a layer.

    Positions count the tokens that the net reads, those before the document included. Block b is the tokens
    [b n, (b + 1) n), for n in the metadata as `longnet.chosen_block`.
    """
    fields = [
        pa.field("doc_id", pa.string()),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("blocks", pa.list_(pa.int32()), nullable=False),
    ]
    return pa.schema(fields, metadata=dict(metadata or {}))


@contextmanager
def write_chosen(path: str | Path, pattern: Pattern, metadata: Mapping[str, str] | None = None) -> Iterator[OnWindows]:
    """Open a file for chosen blocks (see `chosen_schema`), and yield the `on_choice` of `score`."""
    rows: list[dict[str, Any]] = []
    size, every = pattern.chosen_block, pattern.chosen_every
    with ShardWriter(path, chosen_schema({**(metadata or {}), "longnet.chosen_block": str(size)})) as writer:

        def flush() -> None:
            if rows:
                writer.write(pa.RecordBatch.from_pylist(rows, schema=writer.schema))
            rows.clear()

        def on_choice(windows: Sequence[Window], layer: int, part: GroupedPart, chosen: list[Tensor]) -> None:
            first, _, queries, _ = part.groups
            for window, of_row in zip(windows[part.rows], chosen, strict=True):
                name = window.sequence.document.doc_id  # type: ignore[attr-defined]
                for start, blocks in zip(range(first, len(window), every), of_row.tolist(), strict=False):
                    stop = min(start + queries, len(window))  # the rest is padding
                    rows.append({"doc_id": name, "layer": layer, "start": start, "stop": stop, "blocks": blocks})
            if len(rows) >= BATCH:
                flush()

        yield on_choice
        flush()
