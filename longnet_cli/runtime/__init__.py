"""The runtime of a net: devices and precision, chunks of sequences longer than memory, ranks that share them."""
