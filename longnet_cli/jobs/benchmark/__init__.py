"""The job `bench`: cases.py has the options, the rows and what runs, job.py the order and the clock."""

from .cases import OPS, Case, Measurement, Settings
from .job import bench, machine

__all__ = ["OPS", "Case", "Measurement", "Settings", "bench", "machine"]
