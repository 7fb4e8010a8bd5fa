"""SIGKILL at random moments over every part of a lab run, and proof that nothing was lost, doubled or changed.

    python -m tests.chaos --kills 50 --seed 0

Starts one undisturbed run and one whose processes are killed, compares both, and prints how long each recovery took.
Linux only: processes are found through /proc.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.runs import SMALL, finish, start, weights_of
from unirl.monitoring.journal import read_step, step_file
from unirl.run_files import read_lines

ACTORS = {
    "rollout": "ray::RolloutWorker",
    "reward": "ray::RewardWorker",
    "pairing": "ray::PairingActor",
    "learner": "ray::LearnerRank",
}
ROLES = (*ACTORS, "driver")
PATIENCE_S = 240.0


@dataclass(frozen=True)
class Kill:
    """One SIGKILL and what came of it."""

    role: str
    step: int
    """Steps recorded before it."""
    recovery_s: float
    """Until the next step was recorded."""
    kept: dict
    """Finished rollouts on disk at that moment, by step under way; counted for the driver alone."""


def settings(num_steps, mode):
    """A lab run that takes seconds: the plain sampler, checkpoints far enough apart that the journal has work."""
    return (
        *SMALL, "rollout.backend=torch", f"train.num_steps={num_steps}", "train.save_every=4", f"overlap.mode={mode}",
        "rollout.sequences_per_unit=4", "rollout.text.num_cpus=0.5", "rollout.image.num_cpus=0.5",
        "rollout.max_attempts=10", "learner.max_restarts=1000",
        "rewards.understanding.accuracy.max_attempts=10", "rewards.generation.lab_verifier.max_attempts=10",
    )  # fmt: skip


def processes_of(run_dir, title):
    """Pids of a run's actors whose command begins with the title: actors are told where their run logs."""
    mark = f"UNIRL_LOG_DIR={(run_dir / 'logs').resolve()}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            ours = mark in (folder / "environ").read_bytes().split(b"\0")
            if ours and (folder / "cmdline").read_bytes().decode(errors="replace").startswith(title):
                found.append(int(folder.name))
        except (OSError, PermissionError):
            continue
    return found


def last_recorded(run_dir):
    """Steps in the journal, counted without a gap."""
    step = 0
    while step_file(run_dir, step + 1).is_file():
        step += 1
    return step


def wait_beyond(run_dir, step, process):
    """Until a later step is recorded, or the run has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while last_recorded(run_dir) <= step and process.poll() is None:
        assert time.monotonic() < deadline, f"no step after {step} within {PATIENCE_S:g} s"
        time.sleep(0.02)


def disturb(folder, name, arguments, *, num_kills, num_steps, rng):
    """Run to the end while processes are killed; returns the run directory and the kills."""
    run_dir, kills = folder / name, []
    process = start(folder, name, f"train.run_dir={run_dir}", *arguments)
    wait_beyond(run_dir, 0, process)
    roles = [ROLES[number % len(ROLES)] for number in range(num_kills)]
    rng.shuffle(roles)
    for number, role in enumerate(roles):
        # Spread over the run, and at any moment of a step.
        wait_beyond(run_dir, 1 + number * (num_steps - 2) // num_kills - 1, process)
        time.sleep(rng.uniform(0.0, 0.6))
        if process.poll() is not None:
            break
        kept = {}
        if role == "driver":
            process.kill()
            process.wait()
            step = last_recorded(run_dir)
            kept = {n: c for n, c in Counter(files_ahead(run_dir)).items() if n > step}
            began = time.monotonic()
            process = start(folder, name, "--resume", str(run_dir))
        else:
            pids = processes_of(run_dir, ACTORS[role])
            if not pids:
                continue
            step, began = last_recorded(run_dir), time.monotonic()
            os.kill(rng.choice(pids), signal.SIGKILL)
        wait_beyond(run_dir, step, process)
        kills.append(Kill(role, step, time.monotonic() - began, kept))
    finish(process, folder, name)
    return run_dir, kills


def check_same(run_dir, reference, num_steps):
    """The disturbed run is the undisturbed one: every pair once, every trajectory, every weight to the bit."""
    for step in range(1, num_steps + 1):
        ours, theirs = read_step(run_dir, step), read_step(reference, step)
        assert [facts_of(row) for row in ours] == [facts_of(row) for row in theirs], f"step {step} differs"
    assert weights_of(run_dir) == weights_of(reference), "the final weights differ"
    ledgers = [newest_state(folder)["pairs"] for folder in (run_dir, reference)]
    assert ledgers[0] == ledgers[1], "the ledgers differ: a pair was skipped or doubled"
    assert ledgers[0]["done"] == list(range(num_steps))


def facts_of(row):
    """All of a trajectory that an update could see."""
    ids, logprobs = row.completion_ids.tobytes(), row.logprobs.tobytes()
    return row.pair_id, row.task, row.index, row.seed, row.policy_version, ids, logprobs, row.reward, row.advantage


def newest_state(run_dir):
    newest = max((run_dir / "checkpoints").glob("step_*/COMMIT.json"))
    return json.loads(newest.read_text())["state"]["run"]


def kept_in(run_dir):
    """Rollouts that resumed runs took from disk instead of sampling them again, over the whole run."""
    lines, _ = read_lines(run_dir / "metrics.jsonl")
    return sum({line["step"]: line.get("rollout/num_kept", 0) for line in lines}.values())


def files_ahead(run_dir):
    """The step of each finished rollout on disk."""
    return [int(path.parent.name[5:]) for path in (run_dir / "ahead").glob("*/*.npz") if path.name[0] != "."]


def report(kills, out):
    """Recoveries by part."""
    out.write(f"{'killed':<10}{'times':>6}{'recovery, median s':>20}{'slowest s':>12}\n")
    for role, count in Counter(kill.role for kill in kills).most_common():
        times = sorted(kill.recovery_s for kill in kills if kill.role == role)
        out.write(f"{role:<10}{count:>6}{times[len(times) // 2]:>20.1f}{times[-1]:>12.1f}\n")


def main(folder, *, num_kills, num_steps, seed, mode="synchronous", out=sys.stdout):
    """One whole trial; raises AssertionError when anything was lost, doubled or changed."""
    rng, arguments = random.Random(seed), settings(num_steps, mode)
    reference = folder / "reference"
    finish(start(folder, "reference", f"train.run_dir={reference}", *arguments), folder, "reference")
    run_dir, kills = disturb(folder, "disturbed", arguments, num_kills=num_kills, num_steps=num_steps, rng=rng)
    report(kills, out)
    check_same(run_dir, reference, num_steps)
    # A driver that is killed twice in one step leaves what it had kept to the third.
    kept = sum({n: count for kill in kills for n, count in kill.kept.items()}.values())
    found = kept_in(run_dir)
    out.write(f"{len(kills)} kills, {num_steps} steps: trajectories, ledger and final weights are those of the ")
    out.write(f"undisturbed run; of {kept} rollouts finished before a driver died {found:g} were used again\n")
    assert found == kept, "a finished rollout was lost"
    assert len(kills) >= num_kills - 1, f"only {len(kills)} of {num_kills} kills met a process"
    return kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", default="synchronous", choices=["synchronous", "one_step_off"])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unirl-chaos-") as place:
        steps = chosen.steps or chosen.kills + 4
        main(Path(place), num_kills=chosen.kills, num_steps=steps, seed=chosen.seed, mode=chosen.mode)
