"""Errors that a user sees: one line, and an exit code that a script can test."""

import re


class LongNetError(Exception):
    """A failure with a message for the user: what is wrong, where, and what to do. Exit code 1."""

    exit_code = 1


class ConfigError(LongNetError):
    """A wrong option, recipe or model configuration. Exit code 2, as for a usage error."""

    exit_code = 2


class TooLongError(ConfigError):
    """A document with more tokens than a model reads; `why` is the message without what to do `instead`."""

    def __init__(self, why: str, instead: str) -> None:
        super().__init__(f"{why}: {instead}")
        self.why = why


class DataError(LongNetError):
    """Bad, truncated or unreadable input data; the message names file, row and offset. Exit code 3."""

    exit_code = 3


class CheckpointError(LongNetError):
    """A model directory that is missing, damaged or does not fit the configuration. Exit code 4."""

    exit_code = 4


class MemoryLimitError(LongNetError):
    """The request cannot fit this machine; the message says what would. Exit code 5."""

    exit_code = 5


class NotFiniteError(LongNetError):
    """The net computed NaN or an infinity; the message names the document and the token. Exit code 1."""


LEFT_OUT = 6  # exit code of a run that is done, but for inputs that it could not read and was told to leave out


class InputWarning(UserWarning):
    """A line on stderr that the user should know of the inputs and need not act on."""


def refuse_web_address(name: str) -> None:
    """Raise ConfigError where the name of an input is an http:// or https:// address, saying what to do."""
    if re.match(r"https?://", name, re.IGNORECASE):
        raise ConfigError(f"{name}: web addresses are not read: download it first, or `curl -L URL | longnet ... -`")
