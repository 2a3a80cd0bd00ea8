"""Import paths that stand in users' files. The code is in `longnet_cli.models.hf`."""
