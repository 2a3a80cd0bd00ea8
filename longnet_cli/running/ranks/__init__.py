"""Several processes that share one job: their start, what they send to each other, and their end."""
