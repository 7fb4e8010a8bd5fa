"""One rank of fine-tuning: the sequences of each step, made ahead, and the learner that takes them. No Ray here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unirl.config import SftConfig, SourceConfig
from unirl.data.mixture import Mixture
from unirl.data.prefetch import Prefetch
from unirl.data.token_store import TokenStore
from unirl.learner.engine import RankPlace
from unirl.learner.sft_learner import SftLearner, SftSettings, StepWork
from unirl.models.policy import load_interleaved


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSources:
    """Folder and fingerprint of the token store of each source, by its name."""

    training: dict[str, tuple[Path, str]]
    heldout: dict[str, tuple[Path, str]]


def open_mixture(stores: dict[str, tuple[Path, str]], sources: dict[str, SourceConfig], config: SftConfig) -> Mixture:
    """The mixture of finished token stores.

    Raises:
        DataError: a store is damaged or of another family, or lacks a subset.
    """
    by_folder = {folder: TokenStore(folder, fingerprint) for folder, fingerprint in set(stores.values())}
    opened = {name: by_folder[folder] for name, (folder, _) in stores.items()}
    return Mixture(opened, sources, seed=config.train.seed, samples_per_step=config.train.samples_per_step)


def num_steps(config: SftConfig, mixture: Mixture) -> int:
    """Steps of a run."""
    whole = config.train.num_epochs * mixture.steps_per_epoch
    return whole if config.train.max_steps is None else min(whole, config.train.max_steps)


class SftWorker:
    """All ranks call the same methods in the same order."""

    def __init__(
        self, config: SftConfig, checkpoint: Path, tokens: TokenSources, rank: int, address: tuple[str, int]
    ) -> None:
        """Open the sequences, load the weights and join rank 0 at `address`."""
        self._mixture = open_mixture(tokens.training, config.data.sources, config)
        self._heldout = open_mixture(tokens.heldout, config.evaluation.sources, config) if tokens.heldout else None
        self._num_steps = num_steps(config, self._mixture)
        place = RankPlace(rank=rank, world_size=config.learner.num_ranks, address=address[0], port=address[1])
        policy = load_interleaved(config.model, checkpoint)
        self._learner = SftLearner(policy, SftSettings.of(config, self._num_steps), place)
        self._ahead: Prefetch[StepWork] | None = None

    @property
    def num_passes(self) -> int:
        """Backward passes since the start."""
        return self._learner.num_passes

    def update(self, step: int) -> dict[str, float]:
        """Learn from the sequences of step number `step`, counted from 1."""
        if self._ahead is None:
            self._ahead = Prefetch(
                lambda number: self._learner.prepare(self._mixture.step(number - 1)), step, self._num_steps
            )
        work = self._ahead.take(step)
        return self._learner.update(work, step) | {"sft/data_wait_s": self._ahead.wait_s}

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy over the held-out sequences; nothing when there are none."""
        return self._learner.evaluate(self._heldout.all()) if self._heldout else {}

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """This rank's part of a checkpoint."""
        self._learner.save(folder, step, state)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint; returns the state saved with it."""
        return self._learner.restore(folder)

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        self._learner.export(folder)

    def close(self) -> None:
        """End the thread and leave the process group."""
        if self._ahead is not None:
            self._ahead.close()
        self._learner.close()
