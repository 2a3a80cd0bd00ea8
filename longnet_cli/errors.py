"""What a user sees when something is wrong: one line, and an exit code that a script can test."""


class LongNetError(Exception):
    """A failure with a message for the user: what is wrong, where, and what to do. Exit code 1."""

    exit_code = 1


class ConfigError(LongNetError):
    """A wrong option, recipe or model configuration. Exit code 2, as for a usage error."""

    exit_code = 2


class DataError(LongNetError):
    """Bad, truncated or unreadable input data; the message names file, row and offset. Exit code 3."""

    exit_code = 3


class CheckpointError(LongNetError):
    """A model directory that is missing, damaged or does not fit the configuration. Exit code 4."""

    exit_code = 4


class MemoryLimitError(LongNetError):
    """The request cannot fit this machine; the message says what would. Exit code 5."""

    exit_code = 5
