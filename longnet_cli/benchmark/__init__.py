"""The job `bench`: options in settings.py, cases in a file an op, the clock in measurement.py, the order in job.py."""

from .job import bench, machine
from .measurement import Case, Measurement
from .settings import OPS, Settings

__all__ = ["OPS", "Case", "Measurement", "Settings", "bench", "machine"]
