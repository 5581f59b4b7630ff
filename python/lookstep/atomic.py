"""Files that are replaced whole or not at all, whatever kills the process that saves."""

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TypeAlias

if sys.platform != "win32":
    import fcntl

StrPath: TypeAlias = str | os.PathLike[str]

_TRIES = 100
"""How often the temporary file may vanish under a saver, by others that finish, before it counts as busy."""


@contextmanager
def replacing(path: StrPath) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of `path` when the block ends.

    It is written beside `path` under a fixed name, so that what a killed process leaves is cleared by the next save,
    then flushed to the disk, renamed, and the folder flushed too. Its mode is that of any new file, by the umask. Where
    `path` is a link, the file that it points to is replaced. When the block raises, `path` is as it was.

    Args:
        path: the file to replace, or to make.

    Raises:
        BlockingIOError: if another process or thread is saving to `path`.
        OSError: if the file cannot be written, such as on a full disk, or `path` is read-only or no regular file.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(os.path.join(folder, "run.bin")) as file:
        ...         _ = file.write(b"whole")
        ...     os.listdir(folder)
        ['run.bin']
    """
    target = _target(path)
    folder, name = os.path.split(target)
    temp = os.path.join(folder, f".{name}.saving")
    file = _claim(temp, target)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        if not _is_at(file, temp):  # Where a file system has no locks, another saver may have cleared it.
            raise _busy(target)
        if sys.platform == "win32":
            file.close()  # An open file cannot be moved there; elsewhere closing it would give up the lock.
        os.replace(temp, target)
    except BaseException:
        ours = file.closed or _is_at(file, temp)
        if sys.platform == "win32":
            _close(file)
        if ours:
            with suppress(OSError):
                os.unlink(temp)
        raise
    finally:
        _close(file)
    _sync_folder(folder)


def _target(path: StrPath) -> str:
    """The file that is to be replaced: links are followed, and what `open` would refuse to write is refused."""
    target = os.path.realpath(os.fspath(path))
    with suppress(FileNotFoundError):
        mode = os.lstat(target).st_mode
        if stat.S_ISLNK(mode):  # What is still a link is one that leads back to itself.
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), target)
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "cannot save: not a regular file", target)
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot save: the file is read-only", target)
    return target


def _claim(temp: str, target: str) -> BinaryIO:
    """The temporary file, new and locked.

    It is always made anew, never truncated: so its owner and mode are those of this save, and a link that somebody put
    in its place is not followed.
    """
    for _ in range(_TRIES):
        try:
            file = open(temp, "xb")
        except FileExistsError:
            _clear(temp, target)
            continue
        try:
            _lock(file, target)
            if _is_at(file, temp):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # Between the two, another saver took it for a left-over.
    raise _busy(target)


def _clear(temp: str, target: str) -> None:
    """Removes what a killed process has left, unless a living one holds it."""
    if sys.platform == "win32":
        try:
            os.unlink(temp)
        except PermissionError:  # An open file cannot be removed there: that is the lock.
            raise _busy(target) from None
        except FileNotFoundError:
            return
        return
    try:
        file = open(temp, "r+b", buffering=0, opener=_open_plain)
    except FileNotFoundError:
        return
    with file:
        _lock(file, target)
        if _is_at(file, temp):
            os.unlink(temp)


def _open_plain(path: str, flags: int) -> int:
    """Opens what is there itself, without waiting for anyone at the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _lock(file: BinaryIO, target: str) -> None:
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(target) from None
        except OSError:
            pass  # A file system without locks is no reason not to save.


def _is_at(file: BinaryIO, temp: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(temp))
    except FileNotFoundError:
        return False


def _busy(target: str) -> BlockingIOError:
    return BlockingIOError(errno.EWOULDBLOCK, "another process or thread is saving to it", target)


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # What a failed write left in the buffer cannot be written now either.
        file.close()


def _sync_folder(folder: str) -> None:
    """Makes the new name last through a power cut, where a folder can be opened and flushed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
