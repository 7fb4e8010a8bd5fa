"""Every trajectory of every step in a parquet file, exact to the bit, so that a step can be computed again."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unirl.monitoring.durable_files import write_atomic
from unirl.monitoring.step_data import StepData
from unirl.types import FinishReason, PairKind, Task, WeightedGroup

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPart:
    """What one reward said about one trajectory."""

    name: str
    value: float
    """Meaningless where not judged."""
    judged: bool
    details: dict[str, float]
    problem: str
    """Why something in this group was not judged; empty when all was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRow:
    """One trajectory with all that the update made of it."""

    request_id: str
    pair_id: str
    pair_kind: PairKind
    similarity: float
    pair_weight: float
    task: Task
    sample_id: str
    index: int
    """Position in its group."""
    seed: int
    policy_version: int
    prompt_ids: NDArray[np.int32]
    completion_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    loss_mask: NDArray[np.bool_]
    unmask_step: NDArray[np.int16] | None
    finish_reason: FinishReason
    text: str | None
    image: str | None
    """File name in images/ when the step was shown; the codes in `completion_ids` give the picture anyway."""
    reward: float
    judged: bool
    components: tuple[RewardPart, ...]
    advantage: float
    version_spans: tuple[tuple[int, int], ...] = ()
    """(first token, version) of each stretch, where weights changed in mid-completion."""


_ARRAYS = {"prompt_ids": np.int32, "completion_ids": np.int32, "logprobs": np.float32, "loss_mask": np.bool_,
           "unmask_step": np.int16}  # fmt: skip
_COMPONENT = pa.struct(
    [
        ("name", pa.string()),
        ("value", pa.float32()),
        ("judged", pa.bool_()),
        ("details", pa.map_(pa.string(), pa.float32())),
        ("problem", pa.string()),
    ]
)
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("request_id", "pair_id", "pair_kind", "task", "sample_id", "finish_reason")),
        *((name, pa.string()) for name in ("text", "image")),
        *((name, pa.int64()) for name in ("index", "seed", "policy_version")),
        *((name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in _ARRAYS.items()),
        ("similarity", pa.float64()),
        ("pair_weight", pa.float64()),
        ("reward", pa.float32()),
        ("advantage", pa.float64()),
        ("judged", pa.bool_()),
        ("components", pa.list_(_COMPONENT)),
        ("version_spans", pa.list_(pa.list_(pa.int64()))),
    ]
)


def write_step(run_dir: Path, data: StepData, images: Mapping[tuple[str, int], str]) -> Path:
    """Write journal/step_<step>.parquet whole or not at all; a step that is run again replaces its file.

    Args:
        run_dir: the run directory.
        data: the step.
        images: names of the image files that were written, by (request_id, index).

    Raises:
        OSError: the disk is full or refuses.
    """
    rows = [row for group in data.groups for row in _rows(group, images)]
    facts = {"unirl_journal": str(VERSION), "step": str(data.step), "weights_checksum": data.weights_checksum}
    schema = _SCHEMA.with_metadata(facts)
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out, compression="zstd")
    path = step_file(run_dir, data.step)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, out.getvalue())
    return path


def read_step(run_dir: Path, step: int) -> tuple[JournalRow, ...]:
    """The rows of one step in the order in which they were written; arrays equal the originals bit for bit.

    Raises:
        ValueError: the step has no journal, or the file is damaged or of another version.
    """
    path = step_file(run_dir, step)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"journal: expected the trajectories of step {step} in {path}; got {error}; choose a step that was run "
            "with monitoring.journal=true"
        ) from error
    version = (table.schema.metadata or {}).get(b"unirl_journal", b"").decode()
    if version != str(VERSION):
        raise ValueError(
            f"journal: expected version {VERSION} in {path}; got {version or 'none'}; read it with the release of "
            "unirl that wrote it"
        )
    arrays = {name: _split(table.column(name), dtype) for name, dtype in _ARRAYS.items()}
    plain = table.drop_columns(list(_ARRAYS)).to_pylist()
    return tuple(
        JournalRow(
            **row
            | {name: values[number] for name, values in arrays.items()}
            | {"components": tuple(_reward_part(part) for part in row["components"])}
            | {"version_spans": tuple(map(tuple, row.get("version_spans", ())))}
        )
        for number, row in enumerate(plain)
    )


def weights_after(run_dir: Path, step: int) -> str:
    """Checksum of the weights after the step's update, as published; empty when it was not recorded.

    Raises:
        OSError: the step has no journal.
    """
    return (pq.read_schema(step_file(run_dir, step)).metadata or {}).get(b"weights_checksum", b"").decode()


def recorded_steps(run_dir: Path, after: int) -> range:
    """The steps without a gap from `after` + 1 on that were recorded whole: a step's journal is written last."""
    last = after
    while step_file(run_dir, last + 1).is_file():
        last += 1
    return range(after + 1, last + 1)


def forget_after(run_dir: Path, step: int) -> None:
    """Delete the journal of every later step: the run takes another course from here."""
    for path in (run_dir / "journal").glob("step_*.parquet"):
        if int(path.stem[5:]) > step:
            path.unlink()


def step_file(run_dir: Path, step: int) -> Path:
    """Where the journal of a step lies."""
    return run_dir / "journal" / f"step_{step:06d}.parquet"


def _reward_part(part: dict[str, Any]) -> RewardPart:
    part["details"] = dict(part["details"])
    return RewardPart(**part)


def _split(column: pa.ChunkedArray, dtype: Any) -> list[NDArray[Any] | None]:
    """One numpy array per row without a trip through Python numbers."""
    return [None if not row.is_valid else _values(row, dtype) for chunk in column.chunks for row in chunk]


def _values(row: pa.ListScalar, dtype: Any) -> NDArray[Any]:
    return np.asarray(row.values.to_numpy(zero_copy_only=False), dtype=dtype)


def _rows(group: WeightedGroup, images: Mapping[tuple[str, int], str]) -> Iterator[dict[str, object]]:
    scored, request = group.scored, group.scored.group.request
    for index, trajectory in enumerate(scored.group.trajectories):
        yield {
            "request_id": request.request_id,
            "pair_id": request.pair_id,
            "pair_kind": group.pair.kind,
            "similarity": group.pair.similarity,
            "pair_weight": group.pair_weight,
            "task": request.task,
            "sample_id": request.sample.id,
            "index": index,
            "seed": trajectory.seed,
            "policy_version": trajectory.policy_version,
            **{name: getattr(trajectory, name) for name in _ARRAYS},
            "finish_reason": trajectory.finish_reason,
            "text": trajectory.text,
            "image": images.get((request.request_id, index)),
            "reward": float(scored.rewards[index]),
            "judged": bool(scored.judged[index]),
            "components": list(_components(group, index)),
            "advantage": float(group.advantages[index]),
            "version_spans": [list(span) for span in trajectory.version_spans],
        }


def _components(group: WeightedGroup, index: int) -> Iterator[dict[str, object]]:
    for name, scores in group.scored.components.items():
        yield {
            "name": name,
            "value": float(scores.values[index]),
            "judged": bool(scores.judged[index]),
            "details": [(detail, float(values[index])) for detail, values in scores.details.items()],
            "problem": scores.problem,
        }
