"""A run directory with everything in it, written by the project's own writers from drawn lab scenes; no model runs."""

import dataclasses
import random
from pathlib import Path

import numpy as np

from unirl.config import MonitoringConfig, RlConfig, RolloutConfig, TrainConfig
from unirl.evaluation.evaluate import make_requests, summarise
from unirl.lab.verifier import verify
from unirl.lab.world import HELDOUT_CATEGORIES, caption, make_question, render, sample_scene
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.step_data import StepData
from unirl.types import (
    GenerationSample,
    PairRecord,
    RewardScores,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    Trajectory,
    UnderstandingSample,
    WeightedGroup,
)

NUM_SAMPLES = 8
_SCENES = {}


def make_config(num_steps=60, **monitoring):
    return RlConfig(
        train=TrainConfig(num_steps=num_steps, name="made"),
        rollout=RolloutConfig(pairs_per_step=4),
        monitoring=MonitoringConfig(**monitoring),
    )


def make_samples(name, rng, *, heldout=False, category=None):
    scene = sample_scene(rng, category, heldout=heldout)
    question = make_question(rng, scene)
    image = render(scene)
    _SCENES[f"{name}-g"] = scene
    return (
        UnderstandingSample(
            id=f"{name}-u",
            image=image,
            question=question.text,
            choices=question.choices,
            answer="ABCDEFG"[question.answer_index],
            category=scene.spec.category,
        ),
        GenerationSample(id=f"{name}-g", prompt=caption(scene.spec), image=image, class_name=scene.spec.category),
    )


def make_pair(name, rng):
    understanding, generation = make_samples(name, rng)
    aligned = rng.random() < 0.5
    return PairRecord(
        pair_id=name,
        kind="aligned" if aligned else "retrieved",
        similarity=1.0 if aligned else rng.uniform(0.6, 0.98),
        understanding=understanding,
        generation=generation,
    )


def make_answer(sample, seed, skill, version):
    rng = np.random.default_rng(seed)
    letters = "ABCDEFG"[: len(sample.choices)]
    letter = sample.answer if rng.random() < skill else str(rng.choice(list(letters)))
    word = sample.choices[letters.index(letter)]
    ids = rng.integers(0, 64, size=12).astype(np.int32)
    cut = rng.random() < 0.04
    return Trajectory(
        prompt_ids=rng.integers(0, 64, size=40).astype(np.int32),
        completion_ids=ids,
        loss_mask=np.ones(12, bool),
        logprobs=-rng.exponential(0.4, size=12).astype(np.float32),
        modality="text",
        text=f"<think> a {word} : {word} {letter}" + ("" if cut else f" </think> <answer> {letter} </answer> <eos>"),
        finish_reason="length" if cut else "stop",
        policy_version=version,
        seed=seed,
    )


def make_drawing(sample, seed, skill, version):
    rng = random.Random(seed)
    scene = _SCENES[sample.id] if rng.random() < skill else sample_scene(rng)
    numbers = np.random.default_rng(seed)
    return Trajectory(
        prompt_ids=numbers.integers(0, 64, size=14).astype(np.int32),
        completion_ids=numbers.integers(0, 192, size=25).astype(np.int32),
        loss_mask=np.ones(25, bool),
        logprobs=-numbers.exponential(0.3, size=25).astype(np.float32),
        modality="image",
        image=render(scene),
        finish_reason="stop",
        policy_version=version,
        seed=seed,
    )


def score(group, *, unjudged=()):
    request = group.request
    judged = np.array([index not in unjudged for index in range(len(group.trajectories))])
    problem = "the judge did not answer in 60 s" if unjudged else ""
    if request.task == "understanding":
        cut = np.array([t.finish_reason == "length" for t in group.trajectories], np.float32)
        right = np.array([f"<answer> {request.sample.answer} <" in t.text for t in group.trajectories], np.float32)
        details = {"correct": right, "formatted": 1 - cut, "truncated": cut}
        component = {"accuracy": RewardScores(values=right, judged=judged, details=details, problem=problem)}
        values = right
    else:
        verdicts = [verify(_SCENES[request.sample.id].spec, t.image) for t in group.trajectories]
        exact, partial = (np.array([getattr(v, n) for v in verdicts], np.float32) for n in ("exact", "partial"))
        values = (exact + partial) / 2
        details = {"exact": exact, "partial": partial}
        component = {"lab_verifier": RewardScores(values=values, judged=judged, details=details, problem=problem)}
    return ScoredGroup(group=group, rewards=np.where(judged, values, 0), judged=judged, components=component)


def sample_group(request, skill, version):
    draw = make_answer if request.task == "understanding" else make_drawing
    return RolloutGroup(
        request=request, trajectories=tuple(draw(request.sample, seed, skill, version) for seed in request.seeds)
    )


def make_groups(pair, step, skill, unjudged=()):
    for task, sample in (("understanding", pair.understanding), ("generation", pair.generation)):
        seeds = tuple(1000 * step + 17 * index + (task == "generation") for index in range(NUM_SAMPLES))
        name = f"{pair.pair_id}/{task}"
        request = RolloutRequest(request_id=name, pair_id=pair.pair_id, task=task, sample=sample, seeds=seeds)
        scored = score(sample_group(request, skill, step - 1), unjudged=unjudged)
        weight = float(np.sqrt(pair.similarity))
        spread = float(scored.rewards[scored.judged].std(ddof=1))
        centred = (scored.rewards - scored.rewards[scored.judged].mean()) / (spread + 1e-4)
        advantages = np.where(scored.judged, weight * centred, 0.0).astype(np.float64)
        yield WeightedGroup(scored=scored, pair=pair, pair_weight=weight, advantages=advantages)


def make_step(step, *, num_pairs=4, skill=0.6, unjudged=(), learner=None):
    rng = random.Random(step)
    pairs = [make_pair(f"pair-{step}-{index}", rng) for index in range(num_pairs)]
    groups = tuple(group for pair in pairs for group in make_groups(pair, step, skill, unjudged))
    seconds = {
        "pairs": 0.03,
        "rollout": rng.uniform(1.8, 2.6),
        "batch": 0.02,
        "update": rng.uniform(1.2, 1.6),
        "publish": 0.2,
    }
    learner = make_learner(step) | {"learner/num_rows": num_taught(groups)} if learner is None else learner
    return StepData(step=step, groups=groups, learner=learner, seconds=seconds, policy_version=step - 1)


def num_taught(groups):
    return float(sum(np.count_nonzero(group.advantages) for group in groups))


def make_learner(step):
    rng = random.Random(-step)
    return {
        "learner/loss": rng.gauss(0, 0.01),
        "learner/loss/understanding": rng.gauss(0, 0.01),
        "learner/loss/generation": rng.gauss(0, 0.01),
        "learner/grad_norm": rng.uniform(0.2, 0.4),
        "learner/lr": 3e-4 * min(1, step / 5),
        "learner/skipped_updates": 0.0,
        "policy/ratio_mean": 1 + rng.gauss(0, 1e-5),
        "policy/ratio_max": 1 + abs(rng.gauss(0, 1e-4)),
        "policy/ratio_min": 1 - abs(rng.gauss(0, 1e-4)),
        "policy/clip_fraction": 0.0,
        "policy/kl": abs(rng.gauss(0, 1e-6)),
        "policy/entropy/text": 0.5 - 0.004 * step + rng.gauss(0, 0.01),
        "policy/entropy/image": 0.27 - 0.0015 * step + rng.gauss(0, 0.005),
        "policy/logprob_gap_max": 2e-6,
        "policy/logprob_gap_max/text": abs(rng.gauss(0, 1e-6)),
        "policy/logprob_gap_max/image": 2e-6,
        "policy/logprob_gap/text": abs(rng.gauss(0, 1e-7)),
        "policy/logprob_gap/image": abs(rng.gauss(0, 2e-7)),
    }


def make_evaluation(log, step, skill, *, num=60, greedy_skill=0.9):
    rng = random.Random(777)
    sides = [
        make_samples(f"heldout-{index}", rng, heldout=True, category=HELDOUT_CATEGORIES[index % 5])
        for index in range(num)
    ]
    requests = make_requests([u for u, _ in sides], [g for _, g in sides], lambda task, name: abs(hash_of(task + name)))
    columns = [[score(sample_group(request, s, step)) for request in requests] for s in (skill, greedy_skill)]
    result = summarise(*columns, log.save_evaluation_image)
    log.write_evaluation(step, dataclasses.asdict(result))
    return result


def hash_of(text):
    return int.from_bytes(text.encode()[-6:], "big") % 2**31


def make_run(run_dir: Path, *, num_steps=60, num=60, **monitoring):
    config = make_config(num_steps, **monitoring)
    with RunLog(run_dir, config, config.monitoring, overrides=["train.num_steps=60"]) as log:
        make_evaluation(log, 0, 0.45, num=num)
        for step in range(1, num_steps + 1):
            log.record_step(make_step(step, skill=0.45 + 0.5 * step / num_steps))
        make_evaluation(log, num_steps, 0.88, num=num, greedy_skill=0.93)
    return run_dir
