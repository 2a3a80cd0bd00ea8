"""Estimates for `--dry-run`: the memory, FLOPs and time of a job on this machine."""
