"""LongNet: dilated attention over token streams of any length. Importing this package imports no torch."""

__version__ = "0.1.0"
