"""Files that are written whole or not at all, so that a killed process leaves no part of one behind."""

import fcntl
import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file such that a reader, or a kill at any moment, finds the old content or the new one, never a part.

    Several processes may write to one path at the same time. Each has a temporary file of its own, and the last one to
    finish wins.

    Args:
        path: Path of the file, whose folder must exist. Where it is a link, the file that it points to is written.
        content: Whole content of the file.

    Raises:
        OSError: If the file cannot be written. What was there is left as it was.
    """
    path = path.resolve()  # the target of a link is written, and the link stays a link
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_unclaimed(path: Path, content: bytes, since: float) -> Path:
    """Writes a file whole, under a name that no other process has written since a moment.

    Args:
        path: Wanted path of the file.
        content: Whole content of the file.
        since: Moment, in seconds as `time.time` counts them.

    Returns:
        The path that was written: the wanted one, or one with a number behind its name.

    Raises:
        OSError: If the file cannot be written.
    """
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # no other process looks for a name between the next two lines
        path = unclaimed(path, since)
        write_whole(path, content)
    finally:
        os.close(descriptor)
    return path


def claimed(folder: Path) -> int | None:
    """Claims a folder for this process, until the descriptor is closed or the process ends in whatever way.

    Args:
        folder: Path of the folder.

    Returns:
        The descriptor of the folder, for `os.close`, or None on a file system without locks.

    Raises:
        BlockingIOError: If another process has claimed it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def unclaimed(path: Path, since: float) -> Path:
    """Finds a path whose file no other process has written since a moment.

    Args:
        path: Wanted path of the file.
        since: Moment, in seconds as `time.time` counts them.

    Returns:
        The wanted path, or one with a number behind its name.
    """
    candidate, number = path, 1
    while candidate.exists() and candidate.stat().st_mtime > since:
        number += 1
        candidate = path.with_stem(f"{path.stem}_{number}")
    return candidate
