"""Where and how a net runs: devices and precision, chunks of sequences longer than memory, ranks that share them."""
