"""Estimates for `--dry-run`: the memory, FLOPs and time of a job, here or on another machine."""
