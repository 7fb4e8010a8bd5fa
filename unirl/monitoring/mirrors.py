"""Where a run's metrics go besides its directory: TensorBoard, W&B, what jobs add. One that fails is left behind."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from unirl.config import MonitoringConfig

log = logging.getLogger(__name__)

WANDB_PATIENCE_S = 60.0
"""How long a run waits for W&B's server at its start, and again at its end; what is not sent by then stays on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MirroredRun:
    """What a mirror may know of the run."""

    run_dir: Path
    id: str
    created: str
    """Time of the first start, the same after a resume."""
    settings: str
    """config.yaml without secrets."""


class Mirror(Protocol):
    """Another place that shows the metrics. It may raise anything at any time."""

    name: str

    def open(self, run: MirroredRun) -> None:
        """Begin, now that the run directory is this run's own."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take in one step's metrics; some may be NaN. Steps may repeat after a resume."""
        ...

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        """Take in an event of the run."""
        ...

    def close(self) -> None:
        """End."""
        ...


class Mirrors:
    """All mirrors of a run. The first failure of one is told once, and the rest goes on without it."""

    def __init__(self, mirrors: Sequence[Mirror], complain: Callable[[str], None]) -> None:
        """Hold mirrors that are not open yet.

        Args:
            mirrors: any number.
            complain: told of each that failed.
        """
        self._mirrors, self._complain = list(mirrors), complain

    def open(self, run: MirroredRun) -> None:
        """Open each."""
        self._each(lambda mirror: mirror.open(run))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand each the step's metrics."""
        self._each(lambda mirror: mirror.write(step, values))

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        """Hand each the event."""
        self._each(lambda mirror: mirror.event(kind, fields))

    def close(self) -> None:
        """Close each."""
        self._each(lambda mirror: mirror.close())
        self._mirrors = []

    def _each(self, act: Callable[[Mirror], None]) -> None:
        for mirror in list(self._mirrors):
            try:
                act(mirror)
            except Exception as error:  # noqa: BLE001 - whatever happens to a copy, the run goes on
                self._mirrors.remove(mirror)
                problem = f"{mirror.name} failed ({type(error).__name__}: {error}); the run goes on without it"
                log.warning("%s", problem)
                self._complain(problem)


def chosen_mirrors(monitoring: MonitoringConfig) -> list[Mirror]:
    """The mirrors that need nothing but the run directory, as the settings ask for them.

    Raises:
        ModuleNotFoundError: a package that one needs is not installed.
        ValueError: W&B has no credentials.
    """
    mirrors: list[Mirror] = []
    if monitoring.tensorboard:
        mirrors.append(TensorBoard())
    if monitoring.wandb != "none":
        mirrors.append(WeightsAndBiases(monitoring.wandb, monitoring.wandb_project))
    return mirrors


class TensorBoard:
    """Event files in RUN/tb/."""

    name = "TensorBoard"

    def __init__(self) -> None:
        require("tensorboardX", "monitoring.tensorboard", "false")

    def open(self, run: MirroredRun) -> None:
        """Create a file for this start of the run."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.run_dir / "tb"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a scalar a metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        """TensorBoard has no events."""

    def close(self) -> None:
        """Flush what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run whose files lie in RUN/wandb/; metrics and settings only: no code, no console, no command line."""

    name = "W&B"

    def __init__(self, mode: Literal["offline", "online"], project: str) -> None:
        """Look for the package and, online, for credentials, which stay where the user keeps them.

        Raises:
            ModuleNotFoundError: wandb is not installed.
            ValueError: online without credentials.
        """
        require("wandb", "monitoring.wandb", "none")
        self._mode: Literal["offline", "online"] = mode
        self._project = project
        if mode == "online":
            import wandb

            if not wandb.login(prompt=False):
                raise ValueError(
                    "monitoring.wandb (online): expected W&B credentials; got none; run `wandb login` or set "
                    "WANDB_API_KEY, or take monitoring.wandb=offline"
                )

    def open(self, run: MirroredRun) -> None:
        """Start a W&B run, or go on with it after a resume."""
        import wandb

        identity = hashlib.sha256(f"{run.id} {run.created}".encode()).hexdigest()[:16]
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=WANDB_PATIENCE_S, finish_timeout=WANDB_PATIENCE_S,
            disable_git=True, disable_code=True, save_code=False,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self._run: Any = wandb.init(
            project=self._project,
            id=identity,
            name=run.id,
            resume="allow",
            mode=self._mode,
            dir=str(run.run_dir),
            config=yaml.safe_load(run.settings),
            settings=settings,
        )
        # Its own count only ever grows, and would refuse steps that are made again.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point a metric."""
        self._run.log({"step": step, **values})

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        """Events stay in the run directory."""

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def require(package: str, key: str, off: str) -> None:
    """Refuse a setting whose package is not installed.

    Raises:
        ModuleNotFoundError: names the package, and the setting that does without.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{key}: expected the package {package}; got none; install it (`pip install {package}`), or set {key}={off}"
        )
