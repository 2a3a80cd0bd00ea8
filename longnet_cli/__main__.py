"""The entry point of `python -m longnet_cli`, the same as `longnet`."""

from longnet_cli.cli.app import main

if __name__ == "__main__":
    main()
