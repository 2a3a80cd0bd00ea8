"""LongNet: dilated attention over token streams of any length. Importing this package does not import torch."""

__version__ = "0.1.0"
