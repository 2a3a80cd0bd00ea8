"""The running of a net: devices and precision, chunks of sequences longer than memory, saved states, and ranks."""
