"""Where and how a net runs: devices and precision."""
