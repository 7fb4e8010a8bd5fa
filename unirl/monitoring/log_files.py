"""Where log records go: all to a file of the run, what matters to the terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOISY = ("vllm", "transformers", "DeepSpeed", "ray")


@contextmanager
def log_to_files(run_dir: Path, *, name: str = "driver", verbose: bool = False) -> Iterator[None]:
    """Inside the block, log records from INFO on go to logs/<name>.log.

    The terminal gets warnings, or all of them if `verbose`, in place of what the handlers so far gave it. Engines and
    libraries stay at WARNING unless `verbose`.
    """
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"{name}.log", encoding="utf-8")
    console = _CurrentStderr(logging.INFO if verbose else logging.WARNING)
    root = logging.getLogger()
    loggers = [root] if verbose else [root, *map(logging.getLogger, _NOISY)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO if logger is root else logging.WARNING)
    for handler in (file, console):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before, root.handlers = root.handlers, [file, console]
    try:
        yield
    finally:
        root.handlers = before
        file.close()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _CurrentStderr(logging.Handler):
    """Writes to what stderr is at that moment: a live table replaces it, and lines then appear above the table."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
