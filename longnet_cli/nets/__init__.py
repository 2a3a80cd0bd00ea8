"""The nets of `longnet`: what jobs need from one, the LongNet, the slide encoder, their weights on disk."""

from longnet_cli.nets.config import LongNetConfig, SlideConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.slide import SlideEncoder

__all__ = ["LongNet", "LongNetConfig", "SlideConfig", "SlideEncoder"]
