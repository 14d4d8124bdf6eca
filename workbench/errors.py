"""Errors that a user can cause. Each kind carries the exit code of the process that it ends."""


class WorkbenchError(Exception):
    """A fault that the user can mend; the message says what is wrong, both values, and what to do."""

    exit_code = 2


class ConfigError(WorkbenchError):
    """The configuration or the command line is wrong."""


class LayoutError(WorkbenchError):
    """The parallel layout cannot hold this model, batch or set of ranks."""

    exit_code = 3


class ConversionError(WorkbenchError):
    """The target format, family or layout cannot represent the source, or would lose something."""

    exit_code = 3


class VerificationError(WorkbenchError):
    """Two things that must be equal are not."""

    exit_code = 4


class CheckpointError(WorkbenchError):
    """A checkpoint is missing, unfinished, truncated, corrupt or foreign."""

    exit_code = 5


class DataError(WorkbenchError):
    """Training or evaluation data is missing, empty or unreadable."""

    exit_code = 5


class ResourceError(WorkbenchError):
    """There is not enough disk space, memory or ranks."""

    exit_code = 6


class LaunchError(WorkbenchError):
    """The ranks of a run could not start, or one of them failed."""

    exit_code = 6
