"""Fine-tuning, then PairGRPO from its policy, then one report: base, after fine-tuning, after both.

Each stage is a command of its own, so that it is resumed, shown and ended like any other run.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unirl.config import RecipeConfig, RlConfig, SftConfig
from unirl.config_loading import to_yaml
from unirl.data.atomic import atomic_file
from unirl.evaluation.exam import means_of
from unirl.evaluation.stages_report import Means, Stage, write_stages_report
from unirl.jobs.commands import Commands, RunCommand, folder_of_runs, keep_settings, words_of_run
from unirl.jobs.exam import SaveImage, take_exam
from unirl.jobs.interrupts import Interrupted
from unirl.jobs.run_dirs import is_finished
from unirl.jobs.sft import exam_name

log = logging.getLogger(__name__)

Exam = Callable[[SftConfig, Path, SaveImage], dict[str, Any]]

SFT, TRAIN = "sft", "train"
BASE_EVALUATION, FINAL_EXAM = "evaluation_base.json", "exam_final.json"


def main(
    config: RecipeConfig,
    *,
    local: bool = False,
    dry_run: bool = False,
    run: RunCommand | None = None,
    exam: Exam = take_exam,
) -> int:
    """Run both stages, or what is left of them, and write the report; returns the exit code.

    Args:
        config: all settings; `run_dir` of an unfinished recipe goes on with it.
        local: every stage in one process, without Ray.
        dry_run: show both stages' settings, actors and memory; start nothing.
        run: runs a command of unirl; None starts a process.
        exam: what judges a checkpoint.

    Raises:
        DataError: the folder's recipe was begun with other settings, or it is a run.
        CommandError: a stage failed; run the same command again once it is mended.
    """
    folder = folder_of_runs(config.run_dir, config.name)
    sft = replace(config.sft, evaluation=replace(config.sft.evaluation, exam="lab"))
    model = replace(sft.model, frozen=config.train.model.frozen)
    if dry_run:
        return _show_plans(sft, replace(config.train, model=model), local=local)
    train = replace(config.train, model=replace(model, path=str(folder / SFT / "policy")))
    for name, settings in ((SFT, sft), (TRAIN, train)):
        keep_settings(folder / f"{name}.yaml", to_yaml(settings))
    try:
        with Commands() as commands:
            _run_stages(folder, sft.model.path, run or commands.run, ["--local"] if local else [])
    except Interrupted as ending:
        sys.stderr.write(f"ended; go on with the same command and --run-dir {folder}\n")
        return ending.exit_code
    if not (folder / FINAL_EXAM).is_file():
        taken = exam(sft, folder / TRAIN / "policy", lambda image: "")
        with atomic_file(folder / FINAL_EXAM) as file:
            file.write(json.dumps(taken).encode())
    sys.stdout.write(f"{write_stages_report(folder, config.name, stages_of(folder))}\n")
    return 0


def _show_plans(fine_tuning: SftConfig, training: RlConfig, *, local: bool) -> int:
    """Both stages' plans, the second as if its policy were the base; the greater of their exit codes."""
    from unirl.jobs import rl, sft

    sys.stdout.write(f"unirl {SFT}\n")
    first = sft.main(fine_tuning, local=local, dry_run=True)
    sys.stdout.write(f"\nunirl {TRAIN}, from the policy of the first stage\n")
    return max(first, rl.main(training, local=local, dry_run=True))


def _run_stages(folder: Path, base: str, run: RunCommand, where: list[str]) -> None:
    if not (folder / BASE_EVALUATION).is_file():
        shown = run("eval", base, "-c", folder / f"{TRAIN}.yaml", "--json", *where)
        with atomic_file(folder / BASE_EVALUATION) as file:
            file.write(shown.encode())
    for name in (SFT, TRAIN):
        if is_finished(folder / name):
            log.info("%s is finished", folder / name)
        else:
            run(*words_of_run(name, folder / f"{name}.yaml", folder / name), *where)


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
