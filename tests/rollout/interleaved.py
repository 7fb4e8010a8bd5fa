"""What tests ask of interleaved replies, whichever family wrote them."""

import numpy as np
import torch

from unirl.models.interleaved import PackedRow
from unirl.rollout.interleaved_grammar import BatchGrammar, Grammar, Progress
from unirl.rollout.interleaved_law import drawing_logprobs
from unirl.types import TokenKind


def tokens(replies):
    return [reply.ids.tolist() for reply in replies]


def images(reply):
    return [segment.codes for segment in reply.segments if segment.codes is not None]


def check_replies(replies, layout, grid, max_tokens):
    """Each reply is text and whole images as the family writes them, and ends where it says; read without the grammar.

    Returns how many images there are.
    """
    for reply in replies:
        assert reply.well_formed
        begun = [id for id in reply.prompt_ids[-1:].tolist() if id == layout.image.begin]
        ids, at, left = begun + reply.ids.tolist(), 0, images(reply)
        while at < len(ids):
            if ids[at] != layout.image.begin:
                assert layout.vocabulary.drawable_text[ids[at]]
                assert ids[at] != layout.end or at == len(ids) - 1
                at += 1
                continue
            codes = left.pop(0)
            block, _ = layout.image.block(codes, layout.vocabulary.first_code)
            assert codes.shape == grid
            assert 0 <= codes.min() <= codes.max() < layout.vocabulary.num_codes
            assert ids[at : at + len(block)] == block
            at += len(block)
        assert not left
        ends = ids[-1] == layout.end
        assert reply.finish_reason == ("stop" if ends else "length")
        assert ends or len(reply.ids) == max_tokens
        assert reply.kinds[-1] == TokenKind.TEXT
    return sum(len(images(reply)) for reply in replies)


def teacher_forced(policy, replies, sampling, pixels=()):
    """Log-probabilities [T] of each reply from one pass over all of them, with their pictures, packed into one row."""
    sequences = [np.concatenate([reply.prompt_ids, reply.ids]) for reply in replies]
    lengths = tuple(len(sequence) for sequence in sequences)
    with torch.inference_mode():
        row = PackedRow(ids=torch.from_numpy(np.concatenate(sequences)).long(), lengths=lengths, pixels=pixels)
        logits = policy.logits(policy.hidden_states_of(row), "both").split(lengths)
    rules = Grammar.of(policy.layout, *sampling.grid)
    batch, scores = BatchGrammar(rules, torch.device("cpu")), []
    for reply, sequence, own in zip(replies, sequences, logits, strict=True):
        first, ids = len(reply.prompt_ids), torch.from_numpy(sequence).long()
        opened = rules.open_image(reply.prompt_ids.tolist(), "reply")
        progress, may_begin = Progress.start(rules, sampling.max_tokens, sampling.max_images, opened), []
        for id in reply.ids.tolist():
            may_begin.append(progress.may_begin)
            progress.add(id)
        law = drawing_logprobs(
            own[first - 1 : -1], batch.places(ids)[first - 1 : -1], torch.tensor(may_begin), batch,
            (sampling.text, sampling.image),
        )  # fmt: skip
        scores.append(law.gather(1, ids[first:, None])[:, 0].numpy())
    return scores


def gaps(policy, replies, sampling, pixels=()):
    """Largest |engine - learner| over text and over codes."""
    scores = teacher_forced(policy, replies, sampling, pixels)
    found = np.concatenate([abs(s - reply.logprobs) for s, reply in zip(scores, replies, strict=True)])
    is_code = np.concatenate([reply.kinds for reply in replies]) == TokenKind.CODE
    return float(found[~is_code].max()), float(found[is_code].max())
