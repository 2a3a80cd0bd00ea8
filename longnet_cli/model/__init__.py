"""The network of `longnet`: configuration, positions, the net itself, and its weights on disk."""

from longnet_cli.model.config import LongNetConfig, SlideConfig
from longnet_cli.model.longnet import LongNet
from longnet_cli.model.slide import SlideEncoder
from longnet_cli.model.torchscale import from_torchscale, to_torchscale

__all__ = ["LongNet", "LongNetConfig", "SlideConfig", "SlideEncoder", "from_torchscale", "to_torchscale"]
