"""What goes wrong while writing, as errors that a user understands."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from workbench.errors import DataError, ResourceError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's errors into ResourceError (no space) or DataError (anything else)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{path}: no space left on its disk; make room or write elsewhere") from error
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
