"""The job `bench`. settings.py has the options, job.py the order, measurement.py the clock, other files the cases."""

from .job import bench, machine
from .measurement import Case, Measurement
from .settings import OPS, Settings

__all__ = ["OPS", "Case", "Measurement", "Settings", "bench", "machine"]
