"""Can this checkpoint be trained on? Builds its sampler and learner, runs the gates, prints a table with verdicts."""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from unirl.config import RlConfig
from unirl.config_loading import open_keys
from unirl.config_rules import ConfigError, Problem
from unirl.data.atomic import DataError
from unirl.jobs.assets import resolve_heldout
from unirl.jobs.evaluate import policy_of
from unirl.jobs.local import LocalLearner
from unirl.jobs.prompt_check import check_prompts, unusable
from unirl.jobs.verify_bench import Bench, Dtype, Finding
from unirl.jobs.verify_gates import (
    GUIDANCE_SCALES,
    LEARNING_GATES,
    MOVING_RATE,
    SAMPLING_GATES,
    check_greedy,
    check_ids,
    check_layout,
)
from unirl.models.policy import load_independent, load_policy
from unirl.rollout.build import backend_problems, build_sampler
from unirl.types import PairRecord

SAMPLES_PER_PROMPT = 2
LOG_WIDTH = 118
"""Width of the table where there is no terminal to ask."""

log = logging.getLogger(__name__)


def main(config: RlConfig, *, num_prompts: int, as_json: bool = False) -> int:
    """Run every gate on the checkpoint of `model.path` and print what was found.

    Args:
        config: model, sampling, algorithm and learner as in training; prompts from `evaluation.data`.
        num_prompts: prompts of each task.
        as_json: print one JSON object.

    Returns:
        0, or 1 when a gate failed.

    Raises:
        ConfigError: settings that are left open, or settings of sampling that the checkpoint cannot serve.
        DataError: no such checkpoint, one that cannot be loaded, or prompts that cannot be encoded.
    """
    started = time.perf_counter()
    check_given(config)
    name = config.model.path
    checkpoint = policy_of(name)
    config = settings_for(config, checkpoint)
    pairs = prompts_of(config, num_prompts)
    check_prompts([side for pair in pairs for side in (pair.understanding, pair.generation)], config, checkpoint)
    findings: list[Finding] = []
    for finding in examine(config, checkpoint, pairs):
        findings.append(finding)
        log.info("%s, %s: %s", finding.gate, finding.dtype, finding.verdict)
    facts = {
        "checkpoint": name,
        "family": config.model.family,
        "sampler": config.rollout.backend,
        "prompts_per_task": len(pairs),
        "passed": all(finding.verdict != "fail" for finding in findings),
    }
    if as_json:
        sys.stdout.write(json.dumps(facts | {"gates": [asdict(finding) for finding in findings]}, indent=2) + "\n")
    else:
        show(facts, findings, time.perf_counter() - started)
    return 0 if facts["passed"] else 1


def check_given(config: RlConfig) -> None:
    """Refuse settings left open, but for those of training's pairs and rewards, which no gate reads.

    Raises:
        ConfigError: names each.
    """
    wanted = [key for key in open_keys(asdict(config)) if not key.startswith(("data.", "rewards."))]
    if wanted:
        fixes = {"model.path": "add --checkpoint PATH"}
        raise ConfigError([Problem(key, "???", "must be given", fixes.get(key, f"add {key}=VALUE")) for key in wanted])


def settings_for(config: RlConfig, checkpoint: Path) -> RlConfig:
    """The run's settings on one rank, repeatable, a few samples a prompt, a rate that ends after the first update."""
    rollout = config.rollout
    if backend_problems(config.model, rollout):
        log.info("vLLM does not know the family %s; taking the plain sampler", config.model.family)
        rollout = replace(rollout, backend="torch")
    # Linear to 0 over one step: the first update moves the weights, every later one has learning rate 0.
    learner = replace(
        config.learner,
        num_ranks=1,
        zero_stage=min(config.learner.zero_stage, 2),
        offload_params="none",
        lr=MOVING_RATE,
        warmup_steps=0,
        schedule="linear",
    )
    return replace(
        config,
        model=replace(config.model, path=str(checkpoint)),
        rollout=replace(
            rollout,
            deterministic=True,
            num_understanding=SAMPLES_PER_PROMPT,
            num_generation=SAMPLES_PER_PROMPT,
        ),
        learner=learner,
        train=replace(config.train, num_steps=1),
    )


def prompts_of(config: RlConfig, count: int) -> tuple[PairRecord, ...]:
    """The first held-out samples of each task, side by side.

    Raises:
        DataError: the held-out data lacks a table or a sample.
    """
    questions, drawings = resolve_heldout(config.evaluation.data, count)
    pairs = tuple(
        PairRecord(pair_id=f"{index}", kind="aligned", similarity=1.0, understanding=question, generation=drawing)
        for index, (question, drawing) in enumerate(zip(questions, drawings, strict=False))
    )
    if not pairs:
        raise DataError(
            f"{config.evaluation.data}: expected questions and prompts; got {len(questions)} and {len(drawings)}; "
            "name a folder with both in evaluation.data"
        )
    return pairs


def examine(config: RlConfig, checkpoint: Path, pairs: tuple[PairRecord, ...]) -> Iterator[Finding]:
    """Every finding: of the precision that is trained in first, with its learner, then of the other.

    Raises:
        DataError: the checkpoint cannot be loaded.
    """
    trained = config.model.dtype
    for dtype in (trained, *(dtype for dtype in get_args(Dtype) if dtype != trained)):
        log.info("loading %s in %s", checkpoint, dtype)
        own = replace(config, model=replace(config.model, dtype=dtype))
        with ExitStack() as stack:
            try:
                learner = LocalLearner(own, checkpoint) if dtype == trained else None
                stack.callback(learner.close if learner else lambda: None)
                bench = open_bench(own, checkpoint, pairs, learner)
            except ValueError as error:
                raise unusable(error, checkpoint) from error
            yield from run_gates(bench, checkpoint, learner)
        # What one precision holds is free again before the other is loaded.
        del bench, learner


def run_gates(bench: Bench, checkpoint: Path, learner: LocalLearner | None) -> Iterator[Finding]:
    """Every gate for this bench; without a learner only those of the sampler."""
    yield from checked("layout", bench, lambda: check_layout(bench, checkpoint))
    if bench.dtype == "float32":
        yield from checked("special ids", bench, lambda: check_ids(bench, checkpoint))
    for name, gate in SAMPLING_GATES:
        yield from checked(name, bench, lambda gate=gate: gate(bench))
    if bench.dtype == "float32":
        yield from checked(
            "greedy tokens", bench, lambda: check_greedy(bench, load_independent(bench.config.model, checkpoint))
        )
    if learner is not None:
        for name, gate in LEARNING_GATES:
            yield from checked(name, bench, lambda gate=gate: gate(bench, learner))


def open_bench(
    config: RlConfig, checkpoint: Path, pairs: tuple[PairRecord, ...], learner: LocalLearner | None
) -> Bench:
    """The sampler of these settings beside the learner's policy, or beside one of its own where there is no learner."""
    image = replace(config.rollout.sampling.image, guidance_scale=max(GUIDANCE_SCALES))
    # An engine has its second stream from the start or never.
    rollout = replace(config.rollout, sampling=replace(config.rollout.sampling, image=image))
    sampler = build_sampler(config.model, checkpoint, rollout, "both")
    policy = learner.policy if learner else load_policy(config.model, checkpoint)
    if learner is None:
        nn.Module.to(policy.module, "cuda" if torch.cuda.is_available() else "cpu")
    return Bench(config=config, policy=policy, sampler=sampler, pairs=pairs)


def checked(name: str, bench: Bench, gate: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a gate finds; a gate that breaks has failed and hides no other."""
    log.info("%s in %s ...", name, bench.dtype)
    try:
        yield from gate()
    except Exception as error:
        log.debug("gate %s", name, exc_info=True)
        reason = f"{type(error).__name__}: {error}"
        yield Finding(gate=name, dtype=bench.dtype, measured="broke off", verdict="fail", reason=reason)


def show(facts: dict[str, object], findings: Sequence[Finding], seconds: float) -> None:
    """The table on stdout, reasons below it, then one line that says it all."""
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    title = f"{facts['checkpoint']}: {facts['family']}, sampler {facts['sampler']}, {facts['prompts_per_task']} prompts"
    table = Table(title=f"{title} of each task", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("gate", "weights", "measured", "figure", "limit", "verdict"):
        table.add_column(column, justify="right" if column in ("figure", "limit") else "left")
    notes: list[str] = []
    for finding in findings:
        verdict = finding.verdict.upper() if finding.verdict == "fail" else finding.verdict
        if finding.reason:
            note = f"{finding.gate}: {finding.reason}"
            notes += [] if note in notes else [note]
            verdict = f"{verdict} [{notes.index(note) + 1}]"
        limit = ("> " if finding.bound == "above" else "") + number(finding.limit)
        table.add_row(finding.gate, finding.dtype, finding.measured, number(finding.figure), limit, verdict)
    console.print(table, markup=False)
    for index, note in enumerate(notes, start=1):
        console.print(f"[{index}] {note}", markup=False)
    counts = Counter(finding.verdict for finding in findings)
    verdict = (
        "this checkpoint can be trained on" if facts["passed"] else "this checkpoint cannot be trained on as it is"
    )
    shown = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(f"{verdict}: {shown} ({seconds:.0f} s)", markup=False)


def number(value: float | None) -> str:
    """A figure or limit in few characters; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.2g}" if abs(value) < 1000 else f"{value:.0f}"
