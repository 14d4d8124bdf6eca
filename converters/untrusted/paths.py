"""Files that an index names, kept inside the folder that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.errors import CheckpointError


def file_inside(folder: Path, name: Any, index: str) -> Path:
    """The regular file `name` of the folder, named by its file `index`.

    CheckpointError when the name is absolute, leads to another folder, also by a symbolic link, or is no regular file.
    A link into the `blobs` next to the snapshot of a download cache is followed: so a hub's client stores files.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or "\\" in name or Path(name).name != name:
        raise CheckpointError(f"{folder / index}: names {str(name)[:200]!r}, which is not a file of this folder")
    path = folder / name
    try:
        target, inside = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read, named in {index}: {error}") from None
    blobs = inside.parent.parent / "blobs"
    if not target.is_relative_to(inside) and not (inside.parent.name == "snapshots" and target.is_relative_to(blobs)):
        raise CheckpointError(f"{path}: is a link out of its folder, to {target}; copy the file into the folder")
    if not target.is_file():
        raise CheckpointError(f"{path}: is no regular file")
    return path
