"""Replies of text and images to prompts, from a checkpoint: printed, and written with their pictures."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unirl.config import GenerateConfig
from unirl.config_loading import model_settings
from unirl.data.atomic import DataError, atomic_file
from unirl.data.interleaved import IMAGES, require_new, write_interleaved
from unirl.data.interleaved_page import render_page, sample_lines
from unirl.data.messages import COLUMNS, TURNS, normalise, to_sample, turns_of
from unirl.data.records import decode_image
from unirl.data.tables import Row, stream_rows
from unirl.jobs.assets import resolve_checkpoint
from unirl.jobs.responder import Prompt, Responder
from unirl.models.policy import family_of
from unirl.rollout.interleaved_replies import Reply
from unirl.types import InterleavedSample, Segment, Turn

REPLIES, PAGE = "replies.jsonl", "index.html"
_UNANSWERED = {"role": "assistant", "content": "-"}
"""Stands for the answer that a prompt does not have yet."""


def settings_of(checkpoint: str) -> list[str]:
    """The settings that name a checkpoint: a folder, a finished run with its own model settings, or a "lab:" name.

    Raises:
        DataError: there is no such checkpoint.
        ValueError: it is of no family that is known.
    """
    run = Path(checkpoint)
    if (run / "run.json").is_file() and (run / "policy" / "config.json").is_file():
        own = model_settings(run / "config.yaml")
        return [*own, f"model.path={run / 'policy'}"]
    return [f"model.path={checkpoint}", f"model.family={family_of(resolve_checkpoint(checkpoint))}"]


def prompt_of(text: str, images: Sequence[Path]) -> Prompt:
    """The prompt of a command: its images, then its text.

    Raises:
        DataError: an image is missing or does not decode.
    """
    segments: list[Segment] = []
    for path in images:
        try:
            segments.append(Segment(image=decode_image(path.read_bytes())))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"--image {path}: {reason}") from error
    return Prompt("prompt", (Turn(role="user", segments=(*segments, Segment(text=text))),))


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: conversations in any form that `unirl data` reads, or {"prompt": text} a line.

    An assistant's turn at the end is left out, so that a file of samples is answered anew.

    Raises:
        DataError: names the first row that is no prompt.
    """
    prompts, ids = list[Prompt](), set[str]()
    for place, row in enumerate(stream_rows(path, (*COLUMNS, "prompt"))):
        try:
            if isinstance(row, DataError):
                raise row
            if "prompt" in row:
                row = {**row, "messages": [{"role": "user", "content": row["prompt"]}]}
            sample = to_sample(normalise(_answered(row), default_id=f"{path.stem}-{place}"), path.parent)
            require_new(sample.id, ids)
        except ValueError as error:
            raise DataError(f"{path}, row {place}: {error}") from error
        prompts.append(Prompt(sample.id, sample.turns[:-1]))
    if not prompts:
        raise DataError(f"{path}: expected prompts; got an empty file; write one a line")
    return prompts


def _answered(row: Row) -> Row:
    """The row with an answer where it ends with the user's turn."""
    for key in TURNS:
        turns = turns_of(row.get(key))
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last: dict[str, Any] = turns[-1]
            asked = last.get("role", last.get("from")) in ("user", "human")
            return {**row, key: [*turns, _UNANSWERED]} if asked else row
    return row


def main(config: GenerateConfig, prompts: Sequence[Prompt], *, out: Path | None, as_json: bool = False) -> int:
    """Answer the prompts, print the replies and write them; returns the exit code.

    Args:
        config: all settings.
        prompts: to be answered.
        out: folder for replies.jsonl, the pictures and index.html; None makes generated/<date>.
        as_json: print a line of JSON for each reply instead of text.

    Raises:
        ConfigError: the checkpoint is of another family, or replies would be longer than it allows.
        DataError: the checkpoint or a prompt cannot be used, or the folder holds replies already.
        ValueError: the settings do not fit the checkpoint.
    """
    out = out or Path("generated") / time.strftime("%Y%m%d-%H%M%S")
    if (out / REPLIES).exists():
        raise DataError(
            f"{out}: expected a folder without replies; got one that has {REPLIES}; name another with --out"
        )
    responder = Responder(config.model, resolve_checkpoint(config.model.path), config.replies)
    try:
        requests = responder.requests(prompts, range(config.seed, config.seed + config.num_replies))
    except ValueError as error:
        raise DataError(str(error)) from error
    replies = responder.reply(requests)
    owners = {prompt.id: prompt for prompt in prompts}
    samples = [_sample(owners[reply.request_id], reply, responder.segments(reply)) for reply in replies]
    out.mkdir(parents=True, exist_ok=True)
    write_interleaved(out / REPLIES, samples, images=out / IMAGES)
    with atomic_file(out / PAGE) as file:
        file.write(render_page(samples, title=f"Replies of {config.model.path}", marks=False).encode())
    sys.stdout.writelines(_lines(replies, samples, as_json=as_json))
    sys.stderr.write(f"{out / REPLIES}, {out / IMAGES}/ and {out / PAGE}\n")
    return 0


def _sample(prompt: Prompt, reply: Reply, segments: tuple[Segment, ...]) -> InterleavedSample:
    """The conversation with its reply, as a record like any other."""
    answer = Turn(role="assistant", segments=segments or (Segment(text="(nothing)"),))
    return InterleavedSample(
        id=f"{prompt.id}/{reply.seed}",
        turns=(*prompt.turns, answer),
        subset="generated",
        source=f"seed {reply.seed}, ended by {reply.finish_reason}",
    )


def _lines(replies: Sequence[Reply], samples: Sequence[InterleavedSample], *, as_json: bool) -> Iterator[str]:
    for reply, sample in zip(replies, samples, strict=True):
        if not as_json:
            yield "\n".join(sample_lines(sample)) + "\n"
            continue
        answer = sample.turns[-1].segments
        yield (
            json.dumps(
                {
                    "id": reply.request_id,
                    "seed": reply.seed,
                    "text": " ".join(segment.text for segment in answer if segment.text is not None),
                    "num_images": len(sample.turns[-1].images),
                    "finish_reason": reply.finish_reason,
                    "well_formed": reply.well_formed,
                    "num_tokens": len(reply.ids),
                }
            )
            + "\n"
        )
