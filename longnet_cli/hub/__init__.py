"""Models by name: those that ship with `longnet`, and those of a hub and its cache."""
