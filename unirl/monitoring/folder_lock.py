"""One writer per folder, enforced by the operating system: the lock ends with the process, however it ends."""

import fcntl
import os
import socket
import stat
from pathlib import Path

# POSIX locks belong to the process: they do not survive in forked children, but do not refuse this process either.
_held: set[Path] = set()


class RunDirError(ValueError):
    """A directory that this run cannot write."""

    exit_code = 4  # the command line's code for data


class FolderLock:
    """Holds `<folder>/lock` from construction to `release`."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            RunDirError: another writer holds it.
        """
        self._folder = folder.resolve()
        if self._folder in _held:
            raise _refusal(folder, "this process")
        self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise _refusal(folder, holder or "unknown") from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held.add(self._folder)

    def release(self) -> None:
        """Let others write."""
        os.close(self._file)
        _held.discard(self._folder)


def is_locked(folder: Path) -> bool:
    """Whether a process is writing the folder.

    Takes a reader's lock for an instant, which refuses nobody but a writer that starts in that instant. What is no
    plain file of the folder's own, or cannot be read, is nobody's lock.
    """
    if folder.resolve() in _held:
        return True
    try:
        file = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return False
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _refusal(folder: Path, holder: str) -> RunDirError:
    return RunDirError(
        f"run directory {folder}: expected no other writer; got one at work ({holder}); wait for it, stop it, or set "
        "another train.run_dir"
    )
