"""The network of `longnet`: configuration, positions, the net itself, and its weights on disk."""

from longnet_cli.model.config import LongNetConfig
from longnet_cli.model.longnet import LongNet
from longnet_cli.model.torchscale import from_torchscale, to_torchscale

__all__ = ["LongNet", "LongNetConfig", "from_torchscale", "to_torchscale"]
