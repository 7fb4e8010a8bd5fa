"""`unirl export`: a run's metrics as one table or as TensorBoard files, its rollouts as verl dumps them.

Reads the run directory and writes elsewhere.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unirl.data.atomic import DataError, atomic_file, atomic_folder
from unirl.evaluation.run_reader import RunRecord, read_run
from unirl.jobs.runs import find_run
from unirl.lab.checkpoint_folder import CHECKPOINTS
from unirl.monitoring.mirrors import require
from unirl.run_files import read_settings

_LINE = ("v", "step", "time", "attempt", "nonfinite")


def main(name: Path, kind: str, *, out: Path | None, tokenizer: Path | None = None) -> int:
    """Write one form of a run; prints where. Returns the exit code.

    Args:
        name: run directory, or its name in runs/.
        kind: "parquet", "tensorboard" or "verl-jsonl".
        out: new file or folder; by default named after the run, in the working directory.
        tokenizer: folder with the tokenizer.json that prompts are decoded with; by default the run's own.

    Raises:
        DataError: no run, nothing to export, or `out` is there already.
        ModuleNotFoundError: a package that the form needs is not installed.
    """
    folder = find_run(name)
    ending = {"parquet": "-metrics.parquet", "tensorboard": "-tb", "verl-jsonl": "-rollouts"}[kind]
    out = out or Path(folder.resolve().name + ending)
    if out.exists():
        raise DataError(f"export: expected a place that is free; got {out}; remove it, or name another with --out")
    match kind:
        case "parquet":
            count = write_parquet(_record(folder), out)
        case "tensorboard":
            count = write_tensorboard(_record(folder), out)
        case _:
            count = write_verl(folder, out, tokenizer)
    sys.stdout.write(f"{out}: {count}\n")
    return 0


def write_parquet(record: RunRecord, out: Path) -> str:
    """A row a step and a column a metric; null where a step lacks it. Returns what was written, in words."""
    require("pyarrow", "export --parquet", "--tensorboard")
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = metric_names(record)
    columns = {"step": pa.int64(), "time": pa.float64(), "attempt": pa.int64()} | dict.fromkeys(names, pa.float64())
    facts = {"unirl_run": json.dumps(record.run, ensure_ascii=False)}
    table = pa.Table.from_pylist(
        [{name: line.get(name) for name in columns} for line in record.metrics], pa.schema(columns, metadata=facts)
    )
    with atomic_file(out) as file:
        pq.write_table(table, file, compression="zstd")
    return f"{table.num_rows} steps, {len(names)} metrics"


def write_tensorboard(record: RunRecord, out: Path) -> str:
    """Scalars at their steps and times, held-out means among them. Returns what was written, in words."""
    require("tensorboardX", "export --tensorboard", "--parquet")
    from tensorboardX import SummaryWriter

    names = metric_names(record)
    with atomic_folder(out) as folder, SummaryWriter(str(folder)) as writer:
        for line in record.metrics:
            for name in names:
                if line.get(name) is not None:
                    writer.add_scalar(name, line[name], line["step"], walltime=line.get("time"))
        for step, result in record.evaluations.items():
            written = json.loads((record.folder / f"evaluations/step_{step:06d}.json").read_text()).get("time")
            for name, estimate in result.estimates.items():
                writer.add_scalar(f"evaluation/{name}", estimate.mean, step, walltime=written)
    return f"{len(record.metrics)} steps, {len(names)} metrics, {len(record.evaluations)} evaluations"


def write_verl(run_dir: Path, out: Path, tokenizer: Path | None) -> str:
    """STEP.jsonl a step with a line a completion, as verl's trainers dump it: input, output, gts, score, step and more.

    Returns what was written, in words.

    Raises:
        DataError: the run has no journal, or no tokenizer is found.
    """
    require("pyarrow", "export --verl-jsonl", "--tensorboard")
    require("tokenizers", "export --verl-jsonl", "--tensorboard")
    from tokenizers import Tokenizer

    steps = sorted(int(path.stem[5:]) for path in run_dir.glob("journal/step_*.parquet"))
    if not steps:
        raise DataError(f"export: expected journal/ in {run_dir}; got none; run with monitoring.journal=true")
    text = Tokenizer.from_file(str(_tokenizer_file(run_dir, tokenizer)))
    golds = _golds(run_dir)
    count = 0
    with atomic_folder(out) as folder:
        for step in steps:
            lines = list(_verl_lines(run_dir, step, text, golds))
            count += len(lines)
            (folder / f"{step}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return f"{count} completions of {len(steps)} steps"


def metric_names(record: RunRecord) -> list[str]:
    """Every metric of the run, in the order in which they first came."""
    return list(dict.fromkeys(name for line in record.metrics for name in line if name not in _LINE))


def _verl_lines(run_dir: Path, step: int, tokenizer: Any, golds: dict[str, str]) -> Iterator[str]:
    from unirl.monitoring.journal import read_step

    try:
        rows = read_step(run_dir, step)
    except ValueError as error:
        raise DataError(str(error)) from error
    for row in rows:
        drawn = f"images/{row.image}" if row.image else f"<image of {len(row.completion_ids)} codes>"
        entry: dict[str, Any] = {
            "input": tokenizer.decode(row.prompt_ids.tolist(), skip_special_tokens=True),
            "output": drawn if row.text is None else row.text,
            "gts": golds.get(row.sample_id),
            "score": row.reward if row.judged else None,
            "step": step,
            "request_id": row.request_id,
            "task": row.task,
            "pair_id": row.pair_id,
            "pair_kind": row.pair_kind,
            "similarity": row.similarity,
            "pair_weight": row.pair_weight,
            "advantage": row.advantage,
            "index": row.index,
            "seed": row.seed,
            "policy_version": row.policy_version,
            "finish_reason": row.finish_reason,
        }
        for part in row.components:
            named = {part.name: part.value} | {f"{part.name}/{detail}": v for detail, v in part.details.items()}
            entry |= {key: value if part.judged else None for key, value in named.items()}
        yield json.dumps(entry, ensure_ascii=False)


def _golds(run_dir: Path) -> dict[str, str]:
    """Right answers by sample id, of the pairs that were shown; the journal holds none."""
    sides = [line.get("understanding") or {} for line in read_run(run_dir).pairs]
    return {side["id"]: side["gold"] for side in sides if "gold" in side}


def _tokenizer_file(run_dir: Path, given: Path | None) -> Path:
    """The tokenizer.json of a folder that was named, of the exported policy, or of the checkpoint it began with.

    Raises:
        DataError: it is in none of them.
    """
    model = str(read_settings(run_dir).get("model.path", ""))
    began = CHECKPOINTS / model.removeprefix("lab:") if model.startswith("lab:") else Path(model)
    places = [given] if given else [run_dir / "policy", began]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
    raise DataError(
        f"export: expected tokenizer.json in {' or '.join(map(str, places))}; got none; name the checkpoint's folder "
        "with --tokenizer"
    )


def _record(folder: Path) -> RunRecord:
    try:
        return read_run(folder)
    except ValueError as error:
        raise DataError(str(error)) from error
