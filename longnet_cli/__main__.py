"""The entry point of `longnet`, and of `python -m longnet_cli`."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command. Until its modules are imported, Ctrl-C ends the process, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # `run` in cli/app.py unwinds on it
    from longnet_cli.cli.app import main

    main()


if __name__ == "__main__":
    main()
