"""Errors that a user sees: one line, and an exit code that a script can test."""

import re
from typing import TypeGuard


class LongNetError(Exception):
    """A failure with a message for the user: what is wrong, where, and what to do. Exit code 1."""

    exit_code = 1


class ConfigError(LongNetError):
    """A wrong option, recipe or model configuration. Exit code 2, as for a usage error."""

    exit_code = 2


class TooLongError(ConfigError):
    """A document with more tokens than a model reads. `why` is the message without the advice `instead`."""

    def __init__(self, why: str, instead: str) -> None:
        super().__init__(f"{why}: {instead}")
        self.why = why


class RefusedError(ConfigError):
    """The refusal of a chat template, or of a text beside a prompt. Its place is not known yet: the caller adds it."""


class DataError(LongNetError):
    """Bad, truncated or unreadable input data; the message names file, row and offset. Exit code 3."""

    exit_code = 3


class NoTokensError(DataError):
    """Documents without any token to read."""


class CheckpointError(LongNetError):
    """A model directory that is missing, damaged or does not fit the configuration. Exit code 4."""

    exit_code = 4


class MemoryLimitError(LongNetError):
    """A request that does not fit this machine; the message says what would fit. Exit code 5."""

    exit_code = 5


class NotFiniteError(LongNetError):
    """A NaN or an infinity that the net computed; the message names the document and the token. Exit code 1."""


# Messages of torch on a CPU, and of oneDNN, which got no memory for its code
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|\Acould not create a primitive\Z"
)
LEFT_OUT = 6  # exit code of a finished run that left out unreadable inputs, as it was told to


class InputWarning(UserWarning):
    """A note about the inputs, one line on stderr, that needs no action."""


def refuse_web_address(name: str) -> None:
    """Raise ConfigError, with advice, if the name of an input is an http:// or https:// address."""
    if re.match(r"https?://", name, re.IGNORECASE):
        raise ConfigError(
            f"{name}: web addresses are not read: download it first, or `curl -L URL | longnet ... -`"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that memory ran out. Torch's error is known by name: importing torch is slow."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, ImportError):  # the loader adds why, unless memory was short
        return str(error).endswith("failed to map segment from shared object")
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def extra(name: str) -> str:
    """Return how to install an extra. No package index has this package yet."""
    return f"in longnet's folder, pip install '.[{name}]'"


def one_line(said: object) -> str:
    """Return what a text or an error says, in one line."""
    return " ".join(str(said).split())


def is_of_system(error: BaseException) -> TypeGuard[OSError]:
    """Return whether an error comes from the operating system, which says why. pyarrow raises other OSErrors."""
    return isinstance(error, OSError) and bool(error.strerror)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, otherwise the error's type; no errno."""
    if is_of_system(error):
        return str(error.strerror)
    lines = map(str.strip, str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def is_utf8(text: str) -> bool:
    """Return whether a text has no lone surrogates, which stand for bytes that are not UTF-8."""
    return not re.search("[\ud800-\udfff]", text)
