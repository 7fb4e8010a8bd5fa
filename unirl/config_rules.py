"""What settings must satisfy: ranges, and rules between them. All that is wrong is found, not only the first."""

import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast, get_args

from unirl.config import (
    AblationConfig,
    CurveConfig,
    GenerateConfig,
    PairConfig,
    RecipeConfig,
    RepliesConfig,
    RewardConfig,
    RewardName,
    RlConfig,
    SftConfig,
    default_of,
    default_text,
    flatten,
)
from unirl.types import TASKS


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration."""

    key: str
    value: object
    rule: str
    """What must hold, as the end of a sentence that starts with the key."""
    fix: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.key} ({default_text(self.value)}) {self.rule}; {self.fix}"


class ConfigError(Exception):
    """A configuration that cannot be used. Carries every problem, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        super().__init__("\n  ".join([f"the configuration has {count}:", *map(str, problems)]))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[Problem, ...]]]:
        """Survives the way from a worker to the driver."""
        return ConfigError, (self.problems,)


class OptionError(ValueError):
    """An option of a command that cannot be; says what was expected and what came."""


_ABOVE_0 = math.nextafter(0.0, 1.0)
_BELOW_1 = math.nextafter(1.0, 0.0)
_SEEDS = 2**31 - 1
_LARGEST = sys.float_info.max

# Rule, least and greatest value, and the keys it holds for ("*" crosses dots).
_BOUNDS: tuple[tuple[str, float, float, tuple[str, ...]], ...] = (
    (
        "must be at least 1",
        1,
        _LARGEST,
        (
            "data.max_pairs",
            "*.max_tokens",
            "rollout.pairs_per_step",
            "rollout.sequences_per_unit",
            "*.max_attempts",
            "rollout.max_model_len",
            "rollout.max_num_seqs",
            "rewards.*.num_workers",
            "learner.num_ranks",
            "learner.max_tokens_per_micro_batch",
            "algorithm.updates_per_step",
            "algorithm.diffusion_*",
            "*.diffusion_steps",
            "*.block_length",
            "*replies.max_model_len",
            "*replies.max_num_seqs",
            "num_replies",
            "*.image_size",
            "evaluation.exam_items",
            "*.image.size",
            "train.num_steps",
            "evaluation.num_prompts",
            "cluster.num_cpus",
            "top_n",
            "lab_samples",
            "*.guidance_scale",
            "data.max_length",
            "model.image_pixels",
            "data.samples_per_shard",
            "train.num_epochs",
            "train.samples_per_step",
            "train.max_steps",
            "loss.rows_at_once",
            "data.encoders.num_workers",
            "runs_at_once",
            "algorithm.importance_cap",
            "overlap.max_staleness",
        ),
    ),
    (
        "must be at least 2, or the group states no preference",
        2,
        _LARGEST,
        ("rollout.num_*generation", "rollout.num_understanding"),
    ),
    (
        "must be above 0, or all samples of a prompt are alike and carry no signal",
        _ABOVE_0,
        _LARGEST,
        ("rollout.*.temperature",),
    ),
    (
        "must be above 0",
        _ABOVE_0,
        _LARGEST,
        ("*kv_cache_memory_gib", "cluster.object_store_gib", "algorithm.clip_high", "*sources.*.weight"),
    ),
    ("must be above 0 and at most a year, 31536000 s", _ABOVE_0, 31_536_000, ("*timeout_s", "*.stall_after_s")),
    (
        "must be at least 0",
        0,
        _LARGEST,
        (
            "rollout.*.num_workers",
            "*.num_cpus",
            "*.num_gpus",
            "*.cache_entries",
            "*.loss_padding",
            "algorithm.kl_beta",
            "learner.lr",
            "learner.weight_decay",
            "learner.warmup_steps",
            "learner.max_grad_norm",
            "learner.max_restarts",
            "train.save_every",
            "train.keep_checkpoints",
            "evaluation.every",
            "evaluation.num_examples",
            "loss.*_weight",
            "*replies.*.temperature",
            "*.top_k",
            "*.max_images",
            "*.count",
            "monitoring.*",
            "num_aligned",
        ),
    ),
    ("must lie in [0, 1]", 0, 1, ("*_fraction", "*.top_p")),
    ("must be above 0 and at most 1", _ABOVE_0, 1, ("algorithm.clip_low",)),
    ("must be at least 0 and below 1", 0, _BELOW_1, ("learner.betas",)),
    ("must be 0, 1, 2 or 3", 0, 3, ("learner.zero_stage",)),
    ("must lie in [-1, 1], where cosines lie", -1, 1, ("threshold",)),
    ("must be a whole number in [0, 2^31)", 0, _SEEDS, ("*seed", "seeds")),
    ("must be a port from 1024 to 65535", 1024, 65535, ("cluster.metrics_port",)),
    ("must be a finite number", -_LARGEST, _LARGEST, ("rewards.*.weight",)),
)


def bound_of(key: str) -> tuple[str, float, float] | None:
    """Rule, least and greatest value of a number; None when the key has no bound."""
    for rule, low, high, patterns in _BOUNDS:
        if any(fnmatchcase(key, pattern) for pattern in patterns):
            return rule, low, high
    return None


AnyConfig = RlConfig | SftConfig | GenerateConfig | RecipeConfig | AblationConfig | PairConfig


def find_problems(config: AnyConfig) -> list[Problem]:
    """Everything in a well-typed configuration that would fail later, or make learning fail in silence."""
    if isinstance(config, RecipeConfig):
        model = replace(config.train.model, family=config.sft.model.family)
        train = find_problems(replace(config.train, model=model))
        stages = {"sft": find_problems(config.sft), "train": train}
        found = [replace(problem, key=f"{stage}.{problem.key}") for stage, own in stages.items() for problem in own]
        return [*found, *_name("name", config.name)]
    problems = list(_out_of_bounds(config))
    if isinstance(config, RlConfig):
        for rules in (_model_and_run, _sampling, _rewards, _algorithm, _learner, _overlap):
            problems += rules(config)
    elif isinstance(config, SftConfig):
        for rules in (_model_and_run, _conversations, _ignored, _offload):
            problems += rules(config)
    elif isinstance(config, AblationConfig):
        problems += _ablation(config)
    elif isinstance(config, GenerateConfig):
        problems += _replies(config.replies, "replies")
    elif config.encoder == "resnet50" and not config.encoder_checkpoint:
        rule, fix = "must name a weights file when encoder is resnet50", "set encoder_checkpoint=FILE or encoder=lab"
        problems.append(Problem("encoder_checkpoint", None, rule, fix))
    return problems


def _out_of_bounds(config: AnyConfig) -> Iterator[Problem]:
    for key, value in flatten(config).items():
        bound = bound_of(key)
        numbers = _numbers(value)
        if bound is None or not numbers:
            continue
        rule, low, high = bound
        if not all(low <= number <= high for number in numbers):
            yield Problem(key, value, rule, f"the default is {default_text(default_of(type(config), key))}")


def _numbers(value: Any) -> list[float]:
    parts: list[Any] = list(cast("tuple[Any, ...]", value)) if type(value) is tuple else [value]
    return [part for part in parts if isinstance(part, int | float) and not isinstance(part, bool)]


def _model_and_run(config: RlConfig | SftConfig) -> Iterator[Problem]:
    area = config.model.image_pixels
    if area is not None and area[0] > area[1]:
        yield Problem("model.image_pixels", area, "must go from the least to the greatest area", "swap them")
    unknown = set(config.model.frozen) - {"vision", "aligner", "vq"}
    if unknown:
        rule = f"must hold only vision, aligner and vq, not {', '.join(sorted(unknown))}"
        yield Problem("model.frozen", list(config.model.frozen), rule, "try [vision, vq]")
    yield from _name("train.name", config.train.name)


def _name(key: str, name: str) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        rule = "must be letters, digits, dots, dashes and underscores, since a folder is named after it"
        yield Problem(key, repr(name), rule, "try lab")


def _sampling(config: RlConfig) -> Iterator[Problem]:
    rollout = config.rollout
    for name, work in (("text", "answers"), ("image", "draws")):
        if not getattr(rollout, name).num_workers and not rollout.both.num_workers:
            rule = f"must be at least 1 when rollout.both.num_workers is 0: nobody {work}"
            yield Problem(f"rollout.{name}.num_workers", 0, rule, "try 1")
    if rollout.sampling.text.max_tokens >= rollout.max_model_len:
        rule = f"must be below rollout.max_model_len ({rollout.max_model_len}), which counts the prompt too"
        fix = f"try rollout.max_model_len={2 * rollout.sampling.text.max_tokens + 64}"
        yield Problem("rollout.sampling.text.max_tokens", rollout.sampling.text.max_tokens, rule, fix)

    if rollout.sampling.image.approximate_cache:
        rule = "must be false for rollouts: the learner could not reproduce the log-probabilities of an approximation"
        key = "rollout.sampling.image.approximate_cache"
        yield Problem(key, True, rule, "to measure with it set evaluation.approximate_cache=true")
    if config.model.family == "emu3":
        rule = "must be a family whose pictures are codes alone: Emu3 ends their rows with ids that nobody samples"
        yield Problem("model.family", "emu3", rule, "try anole, liquid, janus_pro or lumina_dimoo; unirl sft takes it")


def _rewards(config: RlConfig) -> Iterator[Problem]:
    known: tuple[str, ...] = get_args(RewardName)
    for task in TASKS:
        table: dict[str, RewardConfig] = getattr(config.rewards, task)
        for name in [name for name in table if name not in known]:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            yield Problem(f"rewards.{task}.{name}", table[name].weight, "is not a reward", fix)
        if not config.rewards.active(task):
            rule = "must name a reward whose weight is not 0, or nothing is learned"
            example = "accuracy" if task == "understanding" else "lab_verifier"
            shown = {name: reward.weight for name, reward in table.items()}
            yield Problem(f"rewards.{task}", shown, rule, f"try rewards.{task}.{example}.weight=1")


def _algorithm(config: RlConfig) -> Iterator[Problem]:
    rules = config.algorithm
    if config.data.partners != "own" and rules.objective == "pair_grpo" and rules.pair_weight != "none":
        rule = (
            f"must be none when data.partners is {config.data.partners}: such pairs have hardly any similarity to weigh"
        )
        yield Problem("algorithm.pair_weight", rules.pair_weight, rule, "try algorithm.pair_weight=none")
    if config.data.partners != "own" and rules.objective == "vanilla_mixed":
        rule = "must be own when algorithm.objective is vanilla_mixed, which takes the sides apart itself"
        yield Problem("data.partners", config.data.partners, rule, "leave the key out")
    if rules.kl_beta > 0 and rules.kl_reference == "old" and rules.updates_per_step == 1:
        rule = "has no effect with kl_reference old and one update per step: the policy is still the old one"
        yield Problem("algorithm.kl_beta", rules.kl_beta, rule, "try algorithm.kl_reference=initial or kl_beta=0")


def _learner(config: RlConfig) -> Iterator[Problem]:
    learner = config.learner
    guided = config.algorithm.image_logprob == "guided" and config.rollout.sampling.image.guidance_scale > 1
    longest = config.rollout.max_model_len * (2 if guided else 1)
    if learner.max_tokens_per_micro_batch < longest:
        rule = f"must hold the longest row, {longest} tokens (rollout.max_model_len{', two streams' if guided else ''})"
        key, value = "learner.max_tokens_per_micro_batch", learner.max_tokens_per_micro_batch
        yield Problem(key, value, rule, f"try {longest}")
    if config.cluster.placement == "separate" and learner.num_gpus not in (0, 1):
        rule = "must be 0 or 1 for each rank when cluster.placement is separate"
        yield Problem("learner.num_gpus", learner.num_gpus, rule, "raise learner.num_ranks instead")
    if config.cluster.weight_transport == "broadcast" and config.cluster.placement == "colocated" and learner.num_gpus:
        rule = "needs a GPU for each member, which learner and workers share when cluster.placement is colocated"
        key = "cluster.weight_transport"
        yield Problem(key, "broadcast", rule, "try cluster.weight_transport=shared_memory")
    yield from _offload(config)


def _overlap(config: RlConfig) -> Iterator[Problem]:
    overlap = config.overlap
    if overlap.mode != "bounded_staleness" and overlap.in_flight_updates:
        rule = f"needs overlap.mode=bounded_staleness, not {overlap.mode}: sequences then meet newer weights"
        yield Problem("overlap.in_flight_updates", True, rule, "set it to false, or change the mode")
    if overlap.mode == "synchronous":
        return
    for key, value, needed in (
        ("algorithm.image_logprob", config.algorithm.image_logprob, "guided"),
        ("algorithm.diffusion_shrink", config.algorithm.diffusion_shrink, 1),
        ("monitoring.journal", config.monitoring.journal, True),
        ("cluster.weight_transport", config.cluster.weight_transport, "object_store"),
        ("cluster.placement", config.cluster.placement, "separate"),
    ):
        if value != needed:
            rule = f"must be {default_text(needed)} when overlap.mode is {overlap.mode}: older weights are still in use"
            yield Problem(key, value, rule, "change it, or set overlap.mode=synchronous")


def _offload(config: RlConfig | SftConfig) -> Iterator[Problem]:
    learner = config.learner
    for name, stage in (("offload_optimizer", 1), ("offload_params", 3)):
        target = getattr(learner, name)
        needs: list[str] = []
        if target != "none" and not learner.num_gpus:
            needs.append("learner.num_gpus=1")
        if target != "none" and learner.zero_stage < stage:
            needs.append(f"learner.zero_stage={stage}")
        if target == "nvme" and not learner.nvme_path:
            yield Problem("learner.nvme_path", None, f"must name a folder for learner.{name}=nvme", "set it")
        if needs:
            rule = f"needs {' and '.join(needs)}"
            yield Problem(f"learner.{name}", target, rule, f"set that, or learner.{name}=none")


def _conversations(config: SftConfig) -> Iterator[Problem]:
    data, learner = config.data, config.learner
    sources = {f"data.sources.{name}": source for name, source in data.sources.items()}
    sources |= {f"evaluation.sources.{name}": source for name, source in config.evaluation.sources.items()}
    for key, source in sources.items():
        if not source.path:
            yield Problem(f"{key}.path", "", "must name conversations", "set a folder, a file, or lab:unified_visual")
        if source.count is not None and source.weight != 1.0:
            rule = "must be left out when count is set, which says how many"
            yield Problem(f"{key}.weight", source.weight, rule, "keep one of the two")
    if not data.sources:
        yield Problem("data.sources", {}, "must name conversations to learn from", "see configs/sft/")
    if learner.max_tokens_per_micro_batch < data.max_length:
        rule = f"must hold the longest sequence, data.max_length ({data.max_length})"
        key, value = "learner.max_tokens_per_micro_batch", learner.max_tokens_per_micro_batch
        yield Problem(key, value, rule, f"try {data.max_length}")
    if not config.loss.restrict and config.loss.form == "sliced":
        rule = "must be masked when loss.restrict is false: the plain cross-entropy needs all logits"
        yield Problem("loss.form", "sliced", rule, "try loss.form=masked")
    if not config.loss.text_weight and not config.loss.image_weight:
        rule = "must be above 0 when loss.image_weight is 0, or nothing is learned"
        yield Problem("loss.text_weight", config.loss.text_weight, rule, "try loss.text_weight=1")
    if config.evaluation.exam != "none":
        yield from _replies(config.evaluation.replies, "evaluation.replies")
    if config.model.family == "lumina_dimoo":
        rule = "must be a family that writes token after token"
        yield Problem("model.family", "lumina_dimoo", rule, "try anole, emu3, liquid or janus_pro")


def _ignored(config: SftConfig) -> Iterator[Problem]:
    """Settings that fine-tuning would pass over in silence."""
    reasons = {
        "cluster.placement": "fine-tuning has no rollout workers",
        "learner.max_restarts": "lost ranks end fine-tuning, which is then resumed",
        "cluster.weight_transport": "fine-tuning has no rollout workers",
        "monitoring.max_logprob_gap": "fine-tuning samples nothing",
        "monitoring.pairs_every": "fine-tuning shows no pairs",
        "monitoring.pairs_per_step": "fine-tuning shows no pairs",
        "monitoring.images_max_mb": "fine-tuning keeps the exam's pictures alone",
        "monitoring.grad_cosine_every": "fine-tuning has one loss, not two tasks",
    }
    if config.model.family == "janus_pro":
        reasons["model.image_tokenizer"] = "the image tokenizer of Janus-Pro is in the checkpoint"
    else:
        reasons["model.frozen"] = f"all that {config.model.family} could freeze is its image tokenizer, never trained"
    if config.learner.warmup_fraction:
        reasons["learner.warmup_steps"] = "learner.warmup_fraction, which is not 0, takes its place"
    if not config.evaluation.sources:
        reasons["evaluation.every"] = "there are no evaluation.sources to score"
    given = flatten(config)
    for key, reason in reasons.items():
        if given[key] != default_of(SftConfig, key):
            yield Problem(key, given[key], f"has no effect: {reason}", "leave it out")


def _replies(config: RepliesConfig, section: str) -> Iterator[Problem]:
    if config.max_tokens and config.max_model_len and config.max_tokens >= config.max_model_len:
        rule = f"must be below {section}.max_model_len ({config.max_model_len}), which counts the prompt too"
        fix = "lower it, or leave it out to take what the prompt leaves"
        yield Problem(f"{section}.max_tokens", config.max_tokens, rule, fix)


def _ablation(config: AblationConfig) -> Iterator[Problem]:
    yield from _name("name", config.name)
    for name in config.arms:
        yield from _name(f"arms.{name}", name)
    if not config.arms:
        yield Problem("arms", {}, "must name what is compared", "see configs/ablations/")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        yield Problem("seeds", list(config.seeds), "must be one or more different numbers", "try [0, 1, 2]")
    if config.reference and config.reference not in config.arms:
        yield _no_such("reference", config.reference, "an arm", config.arms)
    for name, score in config.scores.items():
        if not score.metrics:
            yield Problem(f"scores.{name}.metrics", [], "must name measures", "see any run's report")
    for name, curve in config.curves.items():
        yield from _curve(f"curves.{name}", curve, config)


def _curve(key: str, curve: CurveConfig, config: AblationConfig) -> Iterator[Problem]:
    if curve.score not in config.scores:
        yield _no_such(f"{key}.score", curve.score, "a score", config.scores)
    for arm in curve.arms:
        if arm not in config.arms:
            yield _no_such(f"{key}.arms", arm, "an arm", config.arms)
    if len(curve.x) != len(curve.arms) or len(curve.x) < 2:
        rule = f"must give each of two or more arms its number; there are {len(curve.arms)} arms"
        yield Problem(f"{key}.x", list(curve.x), rule, "write one x for each arm")


def _no_such(key: str, value: str, what: str, known: Iterable[str]) -> Problem:
    return Problem(key, value, f"is not {what}", f"there are {', '.join(known) or 'none'}")
