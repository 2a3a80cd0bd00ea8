"""Encode a corpus of Parquet shards with Spark: shards in, shards out.

    pip install '.[spark]'
    python examples/spark_encode.py corpus/ vectors/
    spark-submit --master yarn examples/spark_encode.py hdfs:///corpus hdfs:///vectors

Without spark-submit it runs on this machine (local[*]), with this Python unless PYSPARK_PYTHON names another. Each of
Spark's Python workers loads the model once.

A row is a document, with a column `doc_id` or `id`, and `text` or `input_ids`. The columns of the output are those of
`longnet encode`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import SparkSession

from longnet_cli import encode_batches

SCHEMA = "doc_id string, span int, start long, end long, n_tokens long, embedding array<float>"


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode Parquet shards with Spark.")
    parser.add_argument("source", help="a Parquet file, or a folder of them")
    parser.add_argument("output", help="a new folder")
    parser.add_argument("--model", default="longnet-tiny")
    arguments = parser.parse_args()
    model = arguments.model

    def encoded(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = encode_batches(batch, model=model)
            # Spark has no lists of a fixed size
            vectors = rows["embedding"].cast(pa.list_(pa.float32()))
            place = rows.schema.get_field_index("embedding")
            yield from rows.set_column(place, "embedding", vectors).to_batches()

    # spark-submit sets this, beside the Python of its cluster
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.appName("longnet encode").getOrCreate()
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "256")
    spark.read.parquet(arguments.source).mapInArrow(encoded, SCHEMA).write.parquet(arguments.output)


if __name__ == "__main__":
    main()
