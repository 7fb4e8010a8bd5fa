"""Commands of unirl run as processes of their own, one or several at a time, and ended together."""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from types import FrameType, TracebackType
from typing import Self

from unirl.data.atomic import DataError, atomic_file
from unirl.jobs.interrupts import Interrupted
from unirl.jobs.run_dirs import RUNS, is_run

log = logging.getLogger(__name__)

RunCommand = Callable[..., str]
"""`Commands.run`, or what stands in its place."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class CommandError(RuntimeError):
    """A command ended with an error; `exit_code` is its own."""

    def __init__(self, command: str, code: int, output: Path | None) -> None:
        where = f"at the end of {output}" if output else "above"
        super().__init__(f"expected `{command}` to finish; got exit code {code}; its own message is {where}")
        self.exit_code = code


class Commands:
    """While entered, signals go on to every command under way, so that each saves and ends, and none is begun."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = Lock()
        self._received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup's
                self._before[signum] = signal.signal(signum, self._pass_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]

    def run(self, *words: str | Path, output: Path | None = None) -> str:
        """Run one command to its end, from any thread; returns what it wrote to stdout with --json, else "".

        Args:
            words: after `unirl`.
            output: what stdout and stderr are appended to; None shows them.

        Raises:
            CommandError: it ended with an error.
            Interrupted: a signal came, before or while it ran.
        """
        shown = " ".join(["unirl", *map(str, words)])
        command = [sys.executable, "-c", "from unirl.cli import main; main()", *map(str, words)]
        to_keep = "--json" in words
        with open(output, "ab") if output else nullcontext() as file:
            with self._lock:
                self.check()
                log.info("%s", shown)
                # A group of its own: a Ctrl-C of the terminal comes from here, once, as any other signal does.
                process = subprocess.Popen(
                    command, text=True, stdout=subprocess.PIPE if to_keep else file, stderr=file, process_group=0
                )
                self._running.add(process)
            if self._received is not None:
                process.send_signal(_as_ending(self._received))  # it came while the process began
            printed = process.communicate()[0] or ""
        with self._lock:
            self._running.discard(process)
        if process.returncode:
            self.check()
            raise CommandError(shown, process.returncode, output)
        return printed

    def check(self) -> None:
        """Raise `Interrupted` if a signal came since the block was entered."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        # Without the lock, which the interrupted code may hold.
        self._received = self._received or signum
        for process in list(self._running):
            process.send_signal(_as_ending(signum))


def _as_ending(signum: int) -> int:
    """The signal at which a run saves and ends."""
    return signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM


def folder_of_runs(run_dir: str | None, name: str) -> Path:
    """The folder of runs that belong together: the one that was named, or a new one below runs/.

    Raises:
        DataError: it is a run itself.
    """
    folder = Path(run_dir) if run_dir else RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    if is_run(folder):
        raise DataError(f"{folder}: expected a folder for several runs; got one that is a run; name another --run-dir")
    return folder


def words_of_run(job: str, settings: Path, run_dir: Path) -> list[str | Path]:
    """The command that begins a run with the settings of a file, or goes on with it."""
    return [job, "--resume", run_dir] if is_run(run_dir) else [job, "-c", settings, "--run-dir", run_dir]


def keep_settings(file: Path, settings: str) -> None:
    """Write the settings of a run that is part of something larger, once.

    Raises:
        DataError: it was begun with others.
    """
    if file.is_file() and file.read_text() != settings:
        raise DataError(
            f"{file}: expected the settings that this began with; got others; give the same ones, or name another "
            "--run-dir"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as out:
        out.write(settings.encode())
