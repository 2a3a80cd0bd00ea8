"""The version of longnet, which the build, `longnet --version` and the records of training runs read."""

__version__ = "0.2.0"
