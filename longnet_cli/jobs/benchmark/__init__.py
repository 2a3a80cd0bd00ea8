"""The job `bench`. settings.py has the options and the rows, cases.py what runs, job.py the order and the clock."""

from .job import bench, machine
from .settings import OPS, Case, Measurement, Settings

__all__ = ["OPS", "Case", "Measurement", "Settings", "bench", "machine"]
