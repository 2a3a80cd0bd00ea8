"""The job `bench`. Rows and the clock are in measurement.py, what is measured in a file an op, the order in job.py."""

from longnet_cli.attention.pattern import attention_flops

from .job import DIRECTIONS, OPS, bench, directions_of, impls_of, machine
from .measurement import Case, Measurement, Stream
from .settings import Settings

__all__ = [
    "DIRECTIONS",
    "OPS",
    "Case",
    "Measurement",
    "Settings",
    "Stream",
    "attention_flops",
    "bench",
    "directions_of",
    "impls_of",
    "machine",
]
