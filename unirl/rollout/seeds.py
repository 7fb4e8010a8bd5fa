"""Seeds of sampled completions, keyed by what is sampled and never by worker or order."""

import hashlib

from unirl.types import Task


def sample_seed(run_seed: int, step: int, pair_id: str, task: Task, index: int) -> int:
    """A seed in [0, 2**31) that is the same for the same arguments on every machine.

    Args:
        run_seed: seed of the run.
        step: step of the run, or any number that names the occasion.
        pair_id: pair, or sample where there are no pairs.
        task: side of the pair.
        index: which of the group's completions.
    """
    key = repr((int(run_seed), int(step), str(pair_id), str(task), int(index))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % 2**31
