"""A store made by an importer through the job, and read back."""

import json
import tempfile
from pathlib import Path

from unirl.data.interleaved import stream_interleaved
from unirl.data.interleaved_import import Plan
from unirl.jobs.data import import_store


def made(tmp_path, importer, source, *, bad=None, max_samples=None, **options):
    """The samples of a store; `bad`, a list, takes the reasons of what was left out."""
    out = Path(tempfile.mkdtemp(dir=tmp_path)) / "store"
    plan = Plan(importer=importer, source=str(source), options=options, max_samples=max_samples)
    assert import_store(plan, out, max_rejected_fraction=0 if bad is None else 1) == 0
    if bad is not None:
        bad += [json.loads(line)["reason"] for line in (out / "rejected.jsonl").read_text().splitlines()]
    return list(stream_interleaved(out, []))
