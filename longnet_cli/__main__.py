"""`python -m longnet_cli` is `longnet`."""

from longnet_cli.cli.app import main

if __name__ == "__main__":
    main()
