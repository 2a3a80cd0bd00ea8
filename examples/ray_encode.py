"""Encode a corpus of Parquet shards on a cluster, with Ray Data: a worker for each device, shards in, shards out.

    pip install '.[ray]'
    python examples/ray_encode.py corpus/ vectors/ --workers 2

A local cluster starts by itself; with RAY_ADDRESS, the script joins a running one. A worker has a GPU if the cluster
has any, otherwise a CPU. If a worker dies, or its node does, Ray starts it again and gives it its batch again. For
that, the nodes that are left need a CPU for each worker, and one more to read and to write. Rows come in the order in
which batches finish: sort by `doc_id`, or join on it.

A row is a document, with a column `doc_id` or `id`, and `text` or `input_ids`. The columns of the output are those of
`longnet encode`; other engines take `encode_batches` and `score_batches` in the same way.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from longnet_cli import encode_batches

SHARD_ROWS = 1 << 14


class Encoder:
    """A worker, which loads the model with the first table that it gets."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __call__(self, table: pa.Table) -> pa.Table:
        return encode_batches(table, **self.options)


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode Parquet shards with Ray Data.")
    parser.add_argument("source", help="a Parquet file, or a folder of them")
    parser.add_argument("output", help="a new folder")
    parser.add_argument("--model", default="longnet-tiny")
    parser.add_argument(
        "--keep", nargs="*", default=[], metavar="COLUMN", help="carry these columns along"
    )
    parser.add_argument(
        "--workers", type=int, help="by default, one for each device of the cluster"
    )
    parser.add_argument(
        "--batch-rows", type=int, default=256, help="documents that a worker gets at a time"
    )
    arguments = parser.parse_args()
    if Path(arguments.output).exists():
        parser.error(f"{arguments.output} exists: name a new folder")

    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        # One CPU more, to read and to write
        ray.init(num_cpus=(arguments.workers or os.cpu_count() or 1) + 1)
    # The newer reader of Ray 2.60 has actors that Ray does not start again when their node dies
    ray.data.DataContext.get_current().use_datasource_v2 = False
    found = ray.cluster_resources()
    gpus = int(found.get("GPU", 0))
    workers = arguments.workers or gpus or max(1, int(found["CPU"]) - 1)
    documents = ray.data.read_parquet(arguments.source)
    # Ray joins small files into one block, which a single worker would get
    vectors = documents.repartition(target_num_rows_per_block=arguments.batch_rows).map_batches(
        Encoder,
        fn_constructor_kwargs={"model": arguments.model, "keep": tuple(arguments.keep)},
        batch_format="pyarrow",
        batch_size=arguments.batch_rows,
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    vectors.write_parquet(os.path.abspath(arguments.output), min_rows_per_file=SHARD_ROWS)


if __name__ == "__main__":
    main()
