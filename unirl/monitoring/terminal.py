"""What a run shows in the terminal: a live table for people, one line per step for logs, a word when it hangs."""

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import Self

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from unirl.monitoring.metrics import reduce_values
from unirl.types import TASKS

WINDOW = 5
"""Steps over which the table at the end takes first, last and best."""
_SHORT = {
    "reward/understanding": "r_und",
    "reward/generation": "r_gen",
    "reward/understanding/zero_variance_fraction": "flat_und",
    "reward/generation/zero_variance_fraction": "flat_gen",
    "sft/nats/text": "nats_txt",
    "sft/nats/image": "nats_img",
    "sft/accuracy/text": "acc_txt",
    "sft/accuracy/image": "acc_img",
    "policy/ratio_max": "ratio_max",
    "policy/clip_fraction": "clip",
    "policy/entropy/text": "ent_txt",
    "policy/entropy/image": "ent_img",
    "learner/grad_norm": "gnorm",
    "policy/logprob_gap_max": "gap",
}


class Terminal:
    """Progress of one run on stderr. A context manager: inside it the live table is up."""

    def __init__(
        self,
        num_steps: int,
        *,
        waiting_for: Callable[[], str],
        console: Console | None = None,
        quiet: bool = False,
    ) -> None:
        """Prepare; nothing is shown yet.

        Args:
            num_steps: last step of the run.
            waiting_for: phase that is running; called from a thread.
            console: where to write; stderr by default. Only a terminal gets the live table.
            quiet: show warnings only.
        """
        self._num_steps, self._waiting_for = num_steps, waiting_for
        # A log has no width; tables need one.
        width = None if sys.stderr.isatty() else 140
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True, width=width)
        self._quiet = quiet
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._durations: deque[float] = deque(maxlen=20)
        self._step = 0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def banner(self, facts: Mapping[str, object]) -> None:
        """One line per fact: run directory, actor plan, changed settings, how to stop."""
        width = max(map(len, facts), default=0)
        for name, fact in facts.items():
            self._say(f"{name:<{width}}  {fact}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a finished step and, without a live table, print its line."""
        self._step = step
        if (seconds := metrics.get("time/step_s")) is not None:
            # The evaluation before the first step comes once.
            self._durations.append(seconds - (0.0 if self._durations else metrics.get("time/evaluate_s", 0.0)))
        for name, value in metrics.items():
            self._history.setdefault(name, []).append((step, value))
        if self._live is None:
            self._say(step_line(step, self._num_steps, metrics, self._eta_s()))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table, such as the evaluation before and after."""
        if self._quiet:
            return
        table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def summary(self, facts: Mapping[str, object]) -> None:
        """End of the run: first, last and best reward of the steps seen, and where things lie."""
        rows = [row for task in TASKS for row in self._summary_rows(f"reward/{task}")]
        if rows:
            self.table(
                f"training rewards, means of up to {WINDOW} steps", ("", "first", "last", "best", "at step"), rows
            )
        self.banner(facts)

    def _summary_rows(self, prefix: str) -> list[tuple[str, ...]]:
        rows = []
        for name in (prefix, f"{prefix}/aligned", f"{prefix}/retrieved"):
            if name not in self._history:
                continue
            steps, values = zip(*self._history[name], strict=True)
            size = min(WINDOW, len(values))
            means = [reduce_values(name, values[i : i + size]) for i in range(len(values) - size + 1)]
            best = max(range(len(means)), key=means.__getitem__)
            shown = (f"{value:.3f}" for value in (means[0], means[-1], means[best]))
            rows.append((name, *shown, str(steps[best + size - 1])))
        return rows

    def _eta_s(self) -> float | None:
        """By the median step, since evaluations and checkpoints fall between some steps; None before the first one."""
        return median(self._durations) * (self._num_steps - self._step) if self._durations else None

    def _table(self) -> Table:
        title = f"step {self._step}/{self._num_steps}   ETA {_eta(self._eta_s())}   now: {self._waiting_for()}"
        table = Table(title=title, title_justify="left")
        for column in ("", "first", f"last {WINDOW}", "now"):
            table.add_column(column, justify="left" if not column else "right")
        for name in (*_SHORT, "rollout/tokens_per_s", "time/step_s"):
            values = [value for _, value in self._history.get(name, [])]
            if values:
                numbers = (values[0], reduce_values(name, values[-WINDOW:]), values[-1])
                table.add_row(name, *map(_number, numbers))
        return table

    def _say(self, line: str) -> None:
        if not self._quiet:
            self._console.print(line, markup=False)


def step_line(step: int, num_steps: int, metrics: Mapping[str, float], eta_s: float | None) -> str:
    """A step as `key=value` words, for logs and `grep`. The remaining seconds are None while no step was timed."""
    words = [f"step={step}/{num_steps}"]
    words += [f"{short}={_number(metrics[name])}" for name, short in _SHORT.items() if name in metrics]
    phases = {
        name.removeprefix("time/").removesuffix("_s"): value
        for name, value in metrics.items()
        if name.startswith("time/") and name != "time/step_s"
    }
    parts = " ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items() if seconds >= 0.05)
    words.append(f"t={metrics.get('time/step_s', 0.0):.1f}s" + (f" ({parts})" if parts else ""))
    return " ".join([*words, f"eta={_eta(eta_s)}"])


def format_duration(seconds: float) -> str:
    """Such as 42s, 3m12s or 5h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _eta(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)


def _number(value: float) -> str:
    size = abs(value)
    return f"{value:.1e}" if 0 < size < 1e-3 else f"{value:.3f}" if size < 100 else f"{value:.0f}"
