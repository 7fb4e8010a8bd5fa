"""Fine-tuning, then PairGRPO from its policy, then one report: base, after fine-tuning, after both.

Each stage is a command of its own, so that it is resumed, shown and ended like any other run.
"""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unirl.config import RecipeConfig, SftConfig
from unirl.config_loading import to_yaml
from unirl.data.atomic import DataError, atomic_file
from unirl.evaluation.exam import means_of
from unirl.evaluation.stages_report import Means, Stage, write_stages_report
from unirl.jobs.exam import SaveImage, take_exam
from unirl.jobs.run_dirs import RUNS, is_finished, is_run
from unirl.jobs.sft import exam_name

log = logging.getLogger(__name__)

Run = Callable[..., str]
"""Runs a command of unirl, given its words; returns what it wrote to stdout."""
Exam = Callable[[SftConfig, Path, SaveImage], dict[str, Any]]

SFT, TRAIN = "sft", "train"
BASE_EVALUATION, FINAL_EXAM = "evaluation_base.json", "exam_final.json"


class StageError(RuntimeError):
    """A stage ended with an error; `exit_code` is that of its command."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(
            f"expected the stage `{command}` to finish; got exit code {code}; its own message is above; mend it and "
            "go on with the same command and --run-dir"
        )
        self.exit_code = code


def main(config: RecipeConfig, *, local: bool = False, run: Run | None = None, exam: Exam = take_exam) -> int:
    """Run both stages, or what is left of them, and write the report; returns the exit code.

    Args:
        config: all settings; `run_dir` of an unfinished recipe goes on with it.
        local: every stage in one process, without Ray.
        run: runs a command of unirl; None starts a process.
        exam: what judges a checkpoint.

    Raises:
        DataError: the folder's recipe was begun with other settings.
        StageError: a stage failed; run the same command again once it is mended.
    """
    folder = Path(config.run_dir) if config.run_dir else RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.name}"
    folder.mkdir(parents=True, exist_ok=True)
    sft = replace(config.sft, evaluation=replace(config.sft.evaluation, exam="lab"))
    model = replace(sft.model, path=str(folder / SFT / "policy"), frozen=config.train.model.frozen)
    train = replace(config.train, model=model)
    for name, settings in ((SFT, sft), (TRAIN, train)):
        _keep_settings(folder / f"{name}.yaml", to_yaml(settings))
    where, run = ["--local"] if local else [], run or run_command
    if not (folder / BASE_EVALUATION).is_file():
        shown = run("eval", sft.model.path, "-c", folder / f"{TRAIN}.yaml", "--json", *where)
        with atomic_file(folder / BASE_EVALUATION) as file:
            file.write(shown.encode())
    for name in (SFT, TRAIN):
        if is_finished(folder / name):
            log.info("%s is finished", folder / name)
        else:
            run(name, *_how(name, folder), *where)
    if not (folder / FINAL_EXAM).is_file():
        taken = exam(sft, folder / TRAIN / "policy", lambda image: "")
        with atomic_file(folder / FINAL_EXAM) as file:
            file.write(json.dumps(taken).encode())
    sys.stdout.write(f"{write_stages_report(folder, config.name, stages_of(folder))}\n")
    return 0


def _keep_settings(file: Path, settings: str) -> None:
    """Write a stage's settings once.

    Raises:
        DataError: the recipe was begun with others.
    """
    if file.is_file() and file.read_text() != settings:
        raise DataError(
            f"{file}: expected the settings that the recipe began with; got others; give the same ones, or name "
            "another --run-dir"
        )
    with atomic_file(file) as out:
        out.write(settings.encode())


def _how(name: str, folder: Path) -> list[str | Path]:
    run_dir = folder / name
    return ["--resume", run_dir] if is_run(run_dir) else ["-c", folder / f"{name}.yaml", "--run-dir", run_dir]


def run_command(*words: str | Path) -> str:
    """Run a command of unirl in a process of its own, and return what it wrote to stdout.

    Raises:
        StageError: it ended with an error.
    """
    shown = " ".join(["unirl", *map(str, words)])
    log.info("%s", shown)
    command = [sys.executable, "-c", "from unirl.cli import main; main()", *map(str, words)]
    to_keep = words[0] == "eval"
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE if to_keep else None) as stage:
        before = signal.signal(signal.SIGTERM, lambda signum, frame: stage.send_signal(signum))
        try:
            printed = _wait(stage)
        finally:
            signal.signal(signal.SIGTERM, before)
    if stage.returncode:
        raise StageError(shown, stage.returncode)
    return printed


def _wait(stage: "subprocess.Popen[str]") -> str:
    """What the stage wrote; a Ctrl-C, which it gets too, leaves it the time to save and end."""
    while True:
        try:
            return stage.communicate()[0] or ""
        except KeyboardInterrupt:
            continue


def stages_of(folder: Path) -> list[Stage]:
    """What was measured of the three checkpoints of a finished recipe."""
    after_sft = sorted((folder / SFT / "evaluations").glob("exam_*.json"))[-1]
    exams = [folder / SFT / "evaluations" / exam_name(0), after_sft, folder / FINAL_EXAM]
    evaluations = sorted((folder / TRAIN / "evaluations").glob("step_*.json"))
    measured = [folder / BASE_EVALUATION, evaluations[0], evaluations[-1]]
    labels = (("base", ""), ("after fine-tuning", f"{SFT}/report.html"), ("after PairGRPO", f"{TRAIN}/report.html"))
    return [
        Stage(label=label, link=link, means={**_evaluation_means(_json(evaluation)), **means_of(_json(exam))})
        for (label, link), evaluation, exam in zip(labels, measured, exams, strict=True)
    ]


def _evaluation_means(document: Mapping[str, Any]) -> Means:
    """Held-out questions and prompts of the pairs, sampled and greedy."""
    means: dict[str, tuple[float, float, float]] = {}
    for name, found in document["estimates"].items():
        mean = found["mean"]
        ends = (mean if end is None else end for end in (found["low"], found["high"]))
        means[f"held-out {name}"] = (mean, *ends)  # pyright: ignore[reportArgumentType]
    return means


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
