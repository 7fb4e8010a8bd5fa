"""A command of unirl as a job of a Ray cluster: what goes there, whether it fits, its log here, its end as ours."""

import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from unirl.cluster.job_client import STOP_WAIT_S, Ending, JobClient, Nodes, dashboard_address, read_token
from unirl.cluster.placement import planned_bundles
from unirl.cluster.plan import (
    PlacementError,
    PlannedActor,
    actor_plan,
    encoder_plan,
    sft_plan,
    shortages,
    total_resources,
)
from unirl.cluster.upload import SubmitError, Upload, collect
from unirl.config import AblationConfig, RecipeConfig, RlConfig, SftConfig
from unirl.config_rules import AnyConfig
from unirl.jobs.ablate import runs_of

FAILED, INTERRUPTED, TERMINATED = 1, 130, 143


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command of unirl that was read, not run."""

    words: tuple[str, ...]
    """All of it after `unirl`, less its settings files."""
    files: tuple[Path, ...] = ()
    settings: AnyConfig | None = None
    """None where it has none, or where they lie with a run that cannot be seen from here."""
    results: Path | None = None
    """Folder or file that it writes, as far as it was named."""
    writes: str = ""
    """How it is named, "--out " or "out="; empty for a command that only prints."""
    in_one_process: bool = False
    """It makes no actors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a job goes, and how."""

    address: str | None = None
    token_file: Path | None = None
    working_dir: Path = Path()
    job_id: str | None = None
    driver_gpus: float = 0.0
    """Of the command's own process, beside those of its actors."""

    def connect(self) -> JobClient:
        """The cluster.

        Raises:
            ConnectionError: nobody answers, or the token is refused.
        """
        return JobClient(dashboard_address(self.address), read_token(self.token_file))


def main(command: Command, target: Target, *, dry_run: bool = False, follow: bool = True) -> int:
    """Submit a command; returns the exit code.

    Args:
        command: what to run there.
        target: where.
        dry_run: print what would be sent, and read the token; ask nobody.
        follow: print the job's log and wait for its end.

    Returns:
        0 when the job succeeded or was left to itself, 1 when it failed, 130 when a Ctrl-C here stopped it, 143 when
        something else did.

    Raises:
        SubmitError: it would lose its results, or has too much to upload, or the job's name is taken.
        ConnectionError: the cluster does not answer, or refuses the token.
        PlacementError: the cluster cannot hold the actors.
    """
    _check_results(command)
    upload, names = collect(target.working_dir, command.files)
    _check_arms(command, upload)
    files = [word for name in names for word in ("-c", name)]
    entrypoint = f"exec {shlex.join(['unirl', *command.words, *files])}"
    job_id = target.job_id or f"{_slug(_name(command))}-{time.strftime('%Y%m%d-%H%M%S')}"
    address = dashboard_address(target.address)
    text = "\n".join(_plan(command, upload, entrypoint, job_id, address))
    if dry_run:
        read_token(target.token_file)
        sys.stdout.write(f"{text}\n")
        return 0
    client = target.connect()
    _check_room(command, client.nodes(), target)
    sys.stderr.write(f"{text}\n")
    metadata = {"name": _name(command), "run_dir": str(command.results or ""), "command": shlex.join(command.words)}
    client.submit(entrypoint, upload, metadata, job_id=job_id, num_gpus=target.driver_gpus)
    if not follow:
        sys.stdout.write(f"{job_id}\n")
        sys.stderr.write(f"submitted; end it with: unirl submit --stop {job_id} --address {address}\n")
        return 0
    return _follow(client, job_id)


def stop(job_id: str, target: Target, *, follow: bool = True) -> int:
    """Ask a job to end, and wait until it has; returns the exit code, 0 however it ended.

    Raises:
        SubmitError: there is no such job.
        ConnectionError: the cluster does not answer, or refuses the token.
    """
    client = target.connect()
    if not client.stop(job_id):
        sys.stderr.write(f"{job_id} had ended already\n")
    elif follow:
        sys.stderr.write(f"{job_id}: {client.follow(job_id, _write).status.lower()}\n")
    return 0


def _follow(client: JobClient, job_id: str) -> int:
    try:
        ending = client.follow(job_id, _write)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"\nasking {job_id} to end: a run finishes its step and saves, within {STOP_WAIT_S // 60} minutes; again "
            "leaves it to that\n"
        )
        try:
            client.stop(job_id)
            ending = client.follow(job_id, _write)
        except KeyboardInterrupt:
            return INTERRUPTED
        return _exit_code(ending, job_id, stopped=INTERRUPTED)
    return _exit_code(ending, job_id, stopped=TERMINATED)


def _exit_code(ending: Ending, job_id: str, *, stopped: int) -> int:
    if ending.status == "FAILED":
        why = f"its command ended with exit code {ending.exit_code}" if ending.exit_code is not None else ending.message
        sys.stderr.write(f"{job_id}: failed: {why}\n")
        return FAILED
    sys.stderr.write(f"{job_id}: {ending.status.lower()}\n")
    return stopped if ending.status == "STOPPED" else 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _check_results(command: Command) -> None:
    if command.writes and (command.results is None or not command.results.is_absolute()):
        raise SubmitError(
            f"{command.writes.rstrip(' =')}: expected an absolute path on storage that every node sees, since "
            f"a job's own folder goes away with it; got {command.results or 'none'}; add {command.writes}/shared/NAME"
        )


def _check_arms(command: Command, upload: Upload) -> None:
    """An ablation names files inside its own; they are found where it is run."""
    if isinstance(command.settings, AblationConfig):
        named = [*command.settings.files, *(file for arm in command.settings.arms.values() for file in arm.files)]
        if missing := [name for name in named if Path(name).as_posix() not in upload.files]:
            raise SubmitError(
                f"--working-dir: expected every file of the grid in {upload.folder}; got {missing[0]}, which is "
                "not there; give the folder that it is named from"
            )


def _check_room(command: Command, nodes: Nodes, target: Target) -> None:
    """A cluster that may grow is left to the job, which waits for its nodes."""
    if nodes.may_grow:
        return
    needs = _needs(command)
    problems = [problem for actors, _ in needs for problem in shortages(actors, nodes.total)]
    bundles = [{"GPU": target.driver_gpus}, *(bundle for _, own in needs for bundle in own)]
    large = [bundle for bundle in bundles if not nodes.fits(bundle)]
    problems += [f"no node with {' and '.join(f'{need:g} {name}' for name, need in large[0].items())}"] if large else []
    if problems:
        raise PlacementError(
            f"{dashboard_address(target.address)}: expected room for every actor; got {'; '.join(problems)}; lower "
            "num_workers, num_ranks, num_cpus or num_gpus, or submit to a larger cluster"
        )


def _plan(command: Command, upload: Upload, entrypoint: str, job_id: str, address: str) -> Iterator[str]:
    yield f"cluster  {address}"
    yield f"job      {job_id}"
    yield f"command  {entrypoint}"
    yield f"upload   {upload.folder}: {len(upload.files)} files, {upload.megabytes:.1f} MB, mostly {upload.largest()}"
    if command.writes:
        yield f"results  {command.results}, which every node must see"
    needs = _needs(command)
    for actors, _ in needs:
        shown = ", ".join(f"{a.count} x {a.role} ({a.num_cpus:g} CPU, {a.num_gpus:g} GPU)" for a in actors)
        total = total_resources(actors)
        yield f"actors   {shown}: {total['CPU']:g} CPUs and {total['GPU']:g} GPUs at once"
    if not needs:
        yield "actors   none that are known here"


Need = tuple[list[PlannedActor], list[dict[str, float]]]


def _needs(command: Command) -> list[Need]:
    """For each stage its actors, and what each of them needs of one node. Memory is not known: weights lie there."""
    settings = None if command.in_one_process else command.settings
    match settings:
        case RlConfig() if command.words[0] == "eval":
            return [_need(actor_plan(settings, 0, with_learner=False), [])]
        case RlConfig() | SftConfig():
            return _stages(settings)
        case RecipeConfig():
            return [*_stages(settings.sft), *_stages(settings.train)]
        case AblationConfig():
            runs = islice(runs_of(settings, Path()), len(settings.arms))
            return [_times(need, settings.runs_at_once) for run in runs for need in _stages(run.config)]
        case _:
            return []


def _stages(config: RlConfig | SftConfig) -> list[Need]:
    bundles = planned_bundles(config)
    if isinstance(config, RlConfig):
        return [_need(actor_plan(config, 0), bundles)]
    return [_need(encoder_plan(config), []), _need(sft_plan(config, 0), bundles)]


def _need(plan: list[PlannedActor], bundles: list[dict[str, float]]) -> Need:
    return plan, [*bundles, *({"CPU": actor.num_cpus, "GPU": actor.num_gpus} for actor in plan)]


def _times(need: Need, count: int) -> Need:
    return [replace(actor, count=actor.count * count) for actor in need[0]], need[1]


def _name(command: Command) -> str:
    """Short name of the run, else of the command."""
    settings = command.settings
    named = settings.train.name if isinstance(settings, RlConfig | SftConfig) else getattr(settings, "name", "")
    return named or command.words[0]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
