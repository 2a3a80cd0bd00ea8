"""What `--dry-run` prints: the memory, FLOPs and time of a job."""
