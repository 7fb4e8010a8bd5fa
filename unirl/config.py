"""Every setting of every job: frozen dataclasses, how they are loaded, and what they must satisfy. No torch, no Ray."""

import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from unirl.types import Task

# The string under a field is its documentation: `unirl config keys` and docs/configuration show it.


@dataclass(frozen=True)
class ModelConfig:
    """The policy: which family, which checkpoint, what is trained."""

    family: Literal["janus_pro"] = "janus_pro"
    """Which file of unirl/models loads the checkpoint."""
    path: str = "lab:janus"
    """Folder of a Hugging Face checkpoint, or "lab:janus" for the tiny one that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in sampler and learner."""
    frozen: tuple[str, ...] = ("vision", "vq")
    """Parts that are not trained: "vision" (vision tower), "aligner", "vq" (image tokenizer)."""
    system_prompt: str | None = None
    """System prompt of understanding prompts; null takes what the checkpoint's processor says, "" means none."""


@dataclass(frozen=True)
class DataConfig:
    """The pair set and how it is read."""

    pairs: str = "lab:pairs"
    """Folder of a pair set made by `unirl pair make`, or "lab:pairs" (made on first use, kept in `cache_dir`)."""
    cache_dir: str = ".unirl"
    """Where data that a command makes for itself is kept."""
    max_pairs: int | None = None
    """Use only the first n pairs; null uses all."""
    max_rejected_fraction: float = 0.01
    """A bad record is skipped, counted and named in rejected.jsonl; more than this share of them stops the job."""
    shuffle: bool = True
    """New order in every epoch, from the run's seed."""


@dataclass(frozen=True)
class TextSampling:
    """How answers are sampled."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    max_tokens: int = 24
    """Longest answer in tokens; a longer one is cut and marked finish_reason "length"."""


@dataclass(frozen=True)
class ImageSampling:
    """How images are sampled."""

    temperature: float = 1.0
    """0 takes the most likely code."""
    guidance_scale: float = 1.5
    """Classifier-free guidance s: logits = uncond + s (cond - uncond); 1 is off and costs one stream."""


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled, per modality."""

    text: TextSampling = field(default_factory=TextSampling)
    """How answers are sampled."""
    image: ImageSampling = field(default_factory=ImageSampling)
    """How images are sampled."""


@dataclass(frozen=True)
class WorkersConfig:
    """How many Ray actors of one kind, and what each needs."""

    num_workers: int = 1
    """Ray actors of this kind; 0 for none."""
    num_cpus: float = 1.0
    """CPU cores of one worker."""
    num_gpus: float = 0.0
    """GPUs of one worker; a fraction shares the GPU."""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of trajectories."""

    backend: Literal["vllm", "torch"] = "vllm"
    """"torch" is the plain sampler: the oracle of the tests, and what --local may choose."""
    pairs_per_step: int = 16
    """Pairs per step; each gives one understanding and one generation prompt."""
    num_understanding: int = 8
    """Answers per question, K_u in the paper."""
    num_generation: int = 8
    """Images per prompt, K_g in the paper."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of training rollouts; evaluation uses it too, and adds greedy columns."""
    sequences_per_unit: int = 128
    """Completions of a unit of work, what a worker is handed at a time: smaller spreads better over workers, larger
    batches better."""
    deterministic: bool = True
    """Run each unit of work alone in the engine, so that tokens do not depend on what else is in flight or on the
    number of workers. Costs the continuous batching across units."""
    text: WorkersConfig = field(default_factory=WorkersConfig)
    """Workers that only answer: one-stream engine."""
    image: WorkersConfig = field(default_factory=WorkersConfig)
    """Workers that only draw: two-stream engine when guidance is on."""
    both: WorkersConfig = field(default_factory=lambda: WorkersConfig(num_workers=0))
    """Workers that do either; text-only batches skip the second stream."""
    max_model_len: int = 128
    """Longest prompt plus completion in tokens."""
    max_num_seqs: int = 128
    """Most sequences that one engine decodes at once."""
    kv_cache_memory_gib: float = 0.125
    """Memory for the key-value cache of one engine, in GiB."""
    enforce_eager: bool = True
    """Skip torch.compile and CUDA graphs; starts faster, samples slower."""
    timeout_s: float = 600.0
    """A unit that takes longer is taken for hung: its worker is replaced and the unit requeued."""
    max_attempts: int = 3
    """A unit that failed this often stops the run with the last error."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward: its weight, its workers, its patience."""

    weight: float = 1.0
    """Factor in the weighted sum of this task's rewards; 0 leaves the reward out."""
    num_workers: int = 1
    """Ray actors that serve it."""
    num_cpus: float = 0.5
    """CPU cores of one worker."""
    num_gpus: float = 0.0
    """GPUs of one worker."""
    timeout_s: float = 60.0
    """One group that takes longer counts as failed: its trajectories are masked, not scored 0."""
    max_attempts: int = 2
    """Tries for a group before it counts as failed."""
    cache_entries: int = 100_000
    """Scores remembered by content (prompt, completion, reward settings); 0 turns the cache off."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of this reward, checked by its constructor, e.g. {checkpoint: HPS_v2.1_compressed.pt}."""


@dataclass(frozen=True)
class RewardsConfig:
    """Which rewards score which task."""

    understanding: dict[str, RewardConfig] = field(default_factory=lambda: {"accuracy": RewardConfig()})
    """Rewards of answers by name."""
    generation: dict[str, RewardConfig] = field(default_factory=lambda: {"lab_verifier": RewardConfig()})
    """Rewards of images by name."""
    max_unjudged_fraction: float = 0.2
    """Stop when more than this share of a step's trajectories could not be judged."""

    def active(self, task: Task) -> dict[str, RewardConfig]:
        """The rewards of this task that count."""
        rewards = self.understanding if task == "understanding" else self.generation
        return {name: reward for name, reward in rewards.items() if reward.weight != 0}


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to the loss."""

    objective: Literal["pair_grpo", "pairwise", "vanilla_mixed"] = "pair_grpo"
    """PairUni eq. 4, eq. 2 (no weight) or eq. 1 (tasks shuffled into one batch)."""
    pair_weight: Literal["sqrt", "linear", "none"] = "sqrt"
    """Weight of a retrieved pair from its similarity (eq. 3, Table 7); aligned pairs weigh 1."""
    advantage_std: Literal["sample", "population", "none"] = "sample"
    """Divide by the group's standard deviation: ddof 1, ddof 0, or not at all (Dr.GRPO)."""
    token_aggregation: Literal["sequence_mean", "sequence_sum", "token_mean", "constant_length"] = "sequence_mean"
    """How token losses become one number: mean per trajectory then per task; the paper's literal sum; mean over a
    task's tokens (T2I-R1, DAPO); sum over tokens divided by the longest length allowed (Dr.GRPO)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    kl_beta: float = 0.0
    """Factor of the KL penalty; 0 turns it off (the paper's default)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence per token."""
    kl_reference: Literal["old", "initial"] = "old"
    """Policy the KL is taken to: the one that sampled (as printed), or the one training started from."""
    image_logprob: Literal["guided", "conditional"] = "guided"
    """Log-probability of an image token under guidance: of the mixed logits it was drawn from (exact, two streams),
    or of the conditional stream alone (T2I-R1; cheaper, biased). Old and new use the same mode."""
    updates_per_step: int = 1
    """Optimizer updates per rollout batch, each over all of it."""


@dataclass(frozen=True)
class LearnerConfig:
    """Optimisation: ranks, ZeRO, AdamW, memory."""

    num_ranks: int = 1
    """Data-parallel ranks, one Ray actor each."""
    num_cpus: float = 1.0
    """CPU cores of one rank."""
    num_gpus: float = 0.0
    """GPUs of one rank: 0 or 1."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage 0 to 3."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    warmup_steps: int = 5
    """Updates over which the rate rises linearly; the first update already uses lr / warmup_steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate after the warm-up; linear and cosine end at 0 after train.num_steps."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    max_tokens_per_micro_batch: int = 8192
    """Token budget (prompt and completion, both streams) of one forward and backward pass."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, less memory."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO keeps optimizer states; GPUs only."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO-3 keeps parameters; GPUs only."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, needed when something is offloaded to "nvme"."""


@dataclass(frozen=True)
class TrainConfig:
    """The run: length, seed, folder, checkpoints."""

    num_steps: int = 60
    """Steps of the run; one step samples, scores and updates once."""
    seed: int = 0
    """Seed of the data order and of every sampled token."""
    run_dir: str | None = None
    """Run directory; null makes runs/<date>-<name>."""
    name: str = "lab"
    """Short name of the run."""
    save_every: int = 20
    """Steps between checkpoints; the last step and an interrupt always save. 0 keeps only those."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0 keeps all."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out measurements."""

    every: int = 0
    """Steps between evaluations; 0 evaluates before the first and after the last step only."""
    enabled: bool = True
    """False skips evaluation altogether."""
    data: str = "lab:heldout"
    """Folder with understanding.parquet and generation.parquet of held-out samples, or "lab:heldout"."""
    num_prompts: int = 480
    """Held-out prompts per task."""
    seed: int = 99
    """Sampling seed, the same before and after, so that differences are the policy's."""
    greedy: bool = True
    """Also evaluate at temperature 0."""
    num_examples: int = 10
    """Held-out pairs shown side by side in the report."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where actors run."""

    address: str | None = None
    """Ray address; null joins the cluster of RAY_ADDRESS, or starts a local one for the run."""
    placement: Literal["separate", "colocated"] = "separate"
    """Rollout workers beside the learner's GPUs, or on the same ones with fractions of num_gpus."""
    num_cpus: int | None = None
    """CPUs announced to a local Ray; null counts what the actor plan needs."""
    object_store_gib: float = 0.5
    """Shared memory of a local Ray, in GiB."""
    start_timeout_s: float = 300.0
    """Give up when an actor is not up after this time."""


@dataclass(frozen=True)
class MonitoringConfig:
    """What is recorded."""

    pairs_every: int = 10
    """Steps between steps whose pairs are shown (pairs.jsonl, images/)."""
    pairs_per_step: int = 4
    """Pairs shown in such a step."""
    images_max_mb: int = 2000
    """Limit of the images folder; the oldest are thinned first."""
    journal: bool = True
    """Write every trajectory to journal/step_*.parquet."""
    tensorboard: bool = False
    """Mirror the metrics to TensorBoard files."""
    stall_after_s: float = 300.0
    """Say what is being waited for when nothing happened for this long."""


@dataclass(frozen=True)
class RlConfig:
    """Everything `unirl train` needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    data: DataConfig = field(default_factory=DataConfig)
    """The pair set."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """Scoring."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """From rewards to the loss."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Optimisation."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out measurements."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where actors run."""
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """What is recorded."""


@dataclass(frozen=True)
class PairConfig:
    """Everything `unirl pair make` needs."""

    understanding: str = "lab:understanding"
    """Folder or parquet file of understanding samples, or "lab:understanding"."""
    generation: str = "lab:generation"
    """Folder or parquet file of generation samples, or "lab:generation"."""
    out: str | None = None
    """Folder of the pair set; must not exist yet."""
    encoder: Literal["lab", "resnet50"] = "lab"
    """Image features: the lab's histograms, or torchvision's ResNet-50 without its classification head."""
    encoder_checkpoint: str | None = None
    """ResNet-50 weights file (state dict, .pt/.pth or .safetensors); needed by "resnet50"."""
    teacher: Literal["lab", "none"] = "lab"
    """Who completes single-task samples to quadruples (section 2.1.1); "none" takes retrieved pairs only."""
    num_aligned: int = 500
    """Clusters K: aligned pairs wanted."""
    threshold: float = 0.6
    """Least cosine similarity of a retrieved pair."""
    top_n: int = 16
    """Candidates per generation image."""
    order: Literal["similarity", "input"] = "similarity"
    """Greedy order: best pair first, or Algorithm 1 literally."""
    seed: int = 0
    """Seed of the clustering."""
    lab_samples: int = 1600
    """Samples per task drawn from the lab when the sources are "lab:..."."""


Config = TypeVar("Config", RlConfig, PairConfig)

# What people coming from other projects type, and what it is called here.
SYNONYMS = {
    "learning_rate": ("learner.lr",),
    "batch_size": ("rollout.pairs_per_step",),
    "group_size": ("rollout.num_understanding", "rollout.num_generation"),
    "num_generations": ("rollout.num_understanding", "rollout.num_generation"),
    "cfg_scale": ("rollout.sampling.image.guidance_scale",),
    "max_new_tokens": ("rollout.sampling.text.max_tokens",),
    "actors": ("rollout.text.num_workers", "rollout.image.num_workers"),
    "num_actors": ("rollout.text.num_workers", "rollout.image.num_workers"),
    "max_steps": ("train.num_steps",),
    "steps": ("train.num_steps",),
    "output_dir": ("train.run_dir",),
    "model_path": ("model.path",),
    "checkpoint": ("model.path",),
    "beta": ("algorithm.kl_beta",),
    "epsilon": ("algorithm.clip_low", "algorithm.clip_high"),
    "grad_clip": ("learner.max_grad_norm",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with a configuration."""

    key: str
    value: object
    rule: str
    """What must hold, as the end of a sentence that starts with the key."""
    fix: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.key} ({self.value}) {self.rule}; {self.fix}"


class ConfigError(Exception):
    """A configuration that cannot be used. Carries every problem, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        super().__init__("\n  ".join([f"the configuration has {count}:", *map(str, problems)]))


def load_config(files: Iterable[str | Path], overrides: Iterable[str], schema: type[Config] = RlConfig) -> Config:
    """The defaults of `schema`, then each file, then each override, later ones on top; checked as a whole.

    A table whose keys the user chooses (rewards.understanding, rewards.generation) is replaced by a file or override
    that assigns it; `rewards.generation.hpsv2.weight=0.5` edits or adds one entry.

    Args:
        files: YAML files with only what differs from the defaults; the value "???" asks the user for one.
        overrides: "key=value" each, the value read as YAML.
        schema: which job's settings.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value has the wrong type, or a rule is broken; all of
            them are named at once.
    """
    tree = OmegaConf.structured(schema)
    problems: list[Problem] = []
    for file in files:
        try:
            problems += _assign(tree, schema, "", OmegaConf.to_container(OmegaConf.load(file)) or {})
        except (OSError, YAMLError) as error:
            problems.append(_unreadable(str(file), error))
    for override in overrides:
        problems += _override(tree, schema, override)
    problems += _missing(OmegaConf.to_container(tree, resolve=False))
    if not problems:
        try:
            config = cast("Config", OmegaConf.to_object(tree))
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "?"
            raise ConfigError([_refused(key, "interpolation", error)]) from error
        problems = find_problems(config)
        if not problems:
            return config
    raise ConfigError(problems)


def to_yaml(config: object) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: object, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted key, e.g. {"learner.lr": 0.0003, ...}; free-form options stay one value."""
    flat: dict[str, Any] = {}
    for item in fields(config):  # pyright: ignore[reportArgumentType]
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            flat |= flatten(value, f"{key}.")
        elif _is_table(value):
            for name, entry in value.items():
                flat |= flatten(entry, f"{key}.{name}.")
        else:
            flat[key] = value
    return flat


def differences(left: object, right: object) -> dict[str, tuple[Any, Any]]:
    """Settings whose values differ, each with both values; None stands for a key that one side lacks."""
    ours, theirs = flatten(left), flatten(right)
    keys = list(dict.fromkeys([*ours, *theirs]))
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def _is_table(value: Any) -> bool:
    entries: list[Any] = list(cast("dict[str, Any]", value).values()) if type(value) is dict else []
    return bool(entries) and all(map(is_dataclass, entries))


def _is_settings(hint: Any) -> bool:
    return is_dataclass(hint)


def entry_type(hint: Any) -> type | None:
    """The settings class of a table's entries (dict[str, RewardConfig] -> RewardConfig); None for any other type."""
    return get_args(hint)[1] if get_origin(hint) is dict and _is_settings(get_args(hint)[1]) else None


def _override(tree: DictConfig, schema: type, override: str) -> list[Problem]:
    path, equals, text = override.partition("=")
    if not equals or not path:
        rule = "is not of the form key=value"
        return [Problem(key=override, value="", rule=rule, fix="write for example train.num_steps=10")]
    try:
        value = cast("Any", OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
    except YAMLError as error:
        return [_unreadable(path, error)]
    *parents, leaf = path.split(".")
    hint: Any = schema
    node = tree
    for depth, name in enumerate(parents):
        entry = entry_type(hint)
        hint = entry or (get_type_hints(hint).get(name) if _is_settings(hint) else None)
        if hint is None:
            return [_unknown(path, value, schema)]
        if entry and name not in node:
            with read_write(node):
                node[name] = entry()
        if not isinstance(node[name], DictConfig):
            rule = f"does not exist: {'.'.join(parents[: depth + 1])} is a value, not a group"
            return [Problem(key=path, value=value, rule=rule, fix="see `unirl config keys`")]
        node = node[name]
    return _assign_one(node, hint, f"{'.'.join([*parents, ''])}", leaf, value, schema)


def _assign(tree: DictConfig, schema: type, prefix: str, values: Any, root: type | None = None) -> list[Problem]:
    """Put a mapping into the node of a settings class or table; what does not fit comes back as problems."""
    if not isinstance(values, Mapping):
        rule = "is a group of settings, not a value"
        return [Problem(key=prefix.rstrip(".") or "the file", value=values, rule=rule, fix="write key: value lines")]
    items = cast("Mapping[str, Any]", values).items()
    return [p for name, value in items for p in _assign_one(tree, schema, prefix, str(name), value, root or schema)]


def _assign_one(node: DictConfig, hint: Any, prefix: str, name: str, value: Any, root: type) -> list[Problem]:
    key = f"{prefix}{name}"
    entry = entry_type(hint)
    inner: Any = entry or (get_type_hints(hint).get(name) if _is_settings(hint) else Any)
    if inner is None:
        return [_unknown(key, value, root)]
    with read_write(node):
        if _is_settings(inner):
            if entry:
                node[name] = entry()
            return _assign(node[name], inner, f"{key}.", {} if entry and value is None else value, root)
        if entry_type(inner):
            node[name] = {}
            return _assign(node[name], inner, f"{key}.", value, root)
        try:
            OmegaConf.update(node, name, value, merge=False)
        except OmegaConfBaseException as error:
            return [_refused(key, value, error)]
    return []


def _missing(values: Any, key: str = "") -> list[Problem]:
    if isinstance(values, dict):
        items = cast("dict[str, Any]", values).items()
        return [problem for name, value in items for problem in _missing(value, f"{key}.{name}" if key else name)]
    return [Problem(key=key, value=values, rule="must be given", fix=f"add {key}=VALUE")] if values == "???" else []


def _refused(key: str, value: Any, error: Exception) -> Problem:
    reason = str(error).split("\n", 1)[0]
    return Problem(key=key, value=repr(value), rule=f"is not accepted: {reason}", fix=f"see `unirl config keys {key}`")


def _unreadable(name: str, error: Exception) -> Problem:
    reason = " ".join(str(error).split())
    return Problem(key=name, value="unreadable", rule=f"could not be read: {reason}", fix="check the path and the YAML")


def _unknown(key: str, value: Any, schema: type) -> Problem:
    names = setting_names(schema)
    parent, _, leaf = key.rpartition(".")
    while parent and not any(name.startswith(f"{parent}.") for name in names):
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    group = [name for name in names if name.startswith(prefix)]
    near = difflib.get_close_matches(leaf, [_leaf(name) for name in group], n=1, cutoff=0.75)
    meant = (
        [name for name in group if parent and near and _leaf(name) == near[0]]
        or [name for name in SYNONYMS.get(leaf, ()) if name in names]
        or [name for name in names if _leaf(name) == leaf or (near and _leaf(name) == near[0])]
    )
    inside = dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in group)
    fix = f"did you mean {' or '.join(meant)}?" if meant else f"{parent or 'the top level'} has {', '.join(inside)}"
    return Problem(key=key, value=value, rule="is not a setting", fix=fix)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def setting_names(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a settings class; entries of a table, which the user names, stand as "<name>"."""
    names: list[str] = []
    for name, hint in get_type_hints(schema).items():
        entry = entry_type(hint)
        inner = entry or (hint if is_dataclass(hint) else None)
        part = f"{prefix}{name}.<name>" if entry else f"{prefix}{name}"
        names += setting_names(inner, f"{part}.") if inner else [part]  # pyright: ignore[reportArgumentType]
    return names


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
            "train.num_steps",
            "evaluation.num_prompts",
            "cluster.num_cpus",
            "top_n",
            "lab_samples",
            "*.guidance_scale",
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
        ("*.temperature",),
    ),
    (
        "must be above 0",
        _ABOVE_0,
        _LARGEST,
        ("*.kv_cache_memory_gib", "cluster.object_store_gib", "algorithm.clip_high"),
    ),
    ("must be above 0 (.inf waits for ever)", _ABOVE_0, math.inf, ("*timeout_s", "*.stall_after_s")),
    (
        "must be at least 0",
        0,
        _LARGEST,
        (
            "rollout.*.num_workers",
            "*.num_cpus",
            "*.num_gpus",
            "*.cache_entries",
            "algorithm.kl_beta",
            "learner.lr",
            "learner.weight_decay",
            "learner.warmup_steps",
            "learner.max_grad_norm",
            "train.save_every",
            "train.keep_checkpoints",
            "evaluation.every",
            "evaluation.num_examples",
            "monitoring.*",
            "num_aligned",
        ),
    ),
    ("must lie in [0, 1]", 0, 1, ("*_fraction",)),
    ("must be above 0 and at most 1", _ABOVE_0, 1, ("algorithm.clip_low",)),
    ("must be at least 0 and below 1", 0, _BELOW_1, ("learner.betas",)),
    ("must be 0, 1, 2 or 3", 0, 3, ("learner.zero_stage",)),
    ("must lie in [-1, 1], where cosines lie", -1, 1, ("threshold",)),
    ("must be a whole number in [0, 2^31)", 0, _SEEDS, ("*seed",)),
    ("must be a finite number", -_LARGEST, _LARGEST, ("rewards.*.weight",)),
)


def bound_of(key: str) -> tuple[str, float, float] | None:
    """Rule, least and greatest value of a number; None when the key has no bound."""
    for rule, low, high, patterns in _BOUNDS:
        if any(fnmatchcase(key, pattern) for pattern in patterns):
            return rule, low, high
    return None


def find_problems(config: RlConfig | PairConfig) -> list[Problem]:
    """Everything in a well-typed configuration that would fail later, or make learning fail in silence."""
    problems = list(_out_of_bounds(config))
    if isinstance(config, RlConfig):
        for rules in (_model_and_run, _sampling, _rewards, _algorithm, _learner):
            problems += rules(config)
    elif config.encoder == "resnet50" and not config.encoder_checkpoint:
        rule, fix = "must name a weights file when encoder is resnet50", "set encoder_checkpoint=FILE or encoder=lab"
        problems.append(Problem(key="encoder_checkpoint", value=None, rule=rule, fix=fix))
    return problems


def _out_of_bounds(config: RlConfig | PairConfig) -> Iterator[Problem]:
    defaults = flatten(type(config)())
    reward_defaults = flatten(RewardConfig())
    for key, value in flatten(config).items():
        bound = bound_of(key)
        numbers = _numbers(value)
        if bound is None or not numbers:
            continue
        rule, low, high = bound
        if not all(low <= number <= high for number in numbers):
            default = defaults.get(key, reward_defaults.get(key.rpartition(".")[2]))
            yield Problem(key=key, value=value, rule=rule, fix=f"the default is {default}")


def _numbers(value: Any) -> list[float]:
    parts: list[Any] = list(cast("tuple[Any, ...]", value)) if type(value) is tuple else [value]
    return [part for part in parts if isinstance(part, int | float) and not isinstance(part, bool)]


def _model_and_run(config: RlConfig) -> Iterator[Problem]:
    unknown = set(config.model.frozen) - {"vision", "aligner", "vq"}
    if unknown:
        rule = f"must hold only vision, aligner and vq, not {', '.join(sorted(unknown))}"
        yield Problem(key="model.frozen", value=list(config.model.frozen), rule=rule, fix="try [vision, vq]")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.train.name):
        rule = "must be letters, digits, dots, dashes and underscores, since a folder is named after it"
        yield Problem(key="train.name", value=repr(config.train.name), rule=rule, fix="try lab")


def _sampling(config: RlConfig) -> Iterator[Problem]:
    rollout = config.rollout
    for name, work in (("text", "answers"), ("image", "draws")):
        if not getattr(rollout, name).num_workers and not rollout.both.num_workers:
            rule = f"must be at least 1 when rollout.both.num_workers is 0: nobody {work}"
            yield Problem(key=f"rollout.{name}.num_workers", value=0, rule=rule, fix="try 1")
    if rollout.sampling.text.max_tokens >= rollout.max_model_len:
        rule = f"must be below rollout.max_model_len ({rollout.max_model_len}), which counts the prompt too"
        fix = f"try rollout.max_model_len={2 * rollout.sampling.text.max_tokens + 64}"
        yield Problem(
            key="rollout.sampling.text.max_tokens", value=rollout.sampling.text.max_tokens, rule=rule, fix=fix
        )


def _rewards(config: RlConfig) -> Iterator[Problem]:
    for task in ("understanding", "generation"):
        table: dict[str, RewardConfig] = getattr(config.rewards, task)
        if not any(reward.weight for reward in table.values()):
            rule = "must name a reward whose weight is not 0, or nothing is learned"
            example = "accuracy" if task == "understanding" else "lab_verifier"
            shown = {name: reward.weight for name, reward in table.items()}
            yield Problem(key=f"rewards.{task}", value=shown, rule=rule, fix=f"try rewards.{task}.{example}.weight=1")


def _algorithm(config: RlConfig) -> Iterator[Problem]:
    rules = config.algorithm
    if rules.kl_beta > 0 and rules.kl_reference == "old" and rules.updates_per_step == 1:
        rule = "has no effect with kl_reference old and one update per step: the policy is still the old one"
        yield Problem(
            key="algorithm.kl_beta",
            value=rules.kl_beta,
            rule=rule,
            fix="try algorithm.kl_reference=initial or kl_beta=0",
        )


def _learner(config: RlConfig) -> Iterator[Problem]:
    learner = config.learner
    guided = config.algorithm.image_logprob == "guided" and config.rollout.sampling.image.guidance_scale > 1
    longest = config.rollout.max_model_len * (2 if guided else 1)
    if learner.max_tokens_per_micro_batch < longest:
        rule = f"must hold the longest row, {longest} tokens (rollout.max_model_len{', two streams' if guided else ''})"
        key, value = "learner.max_tokens_per_micro_batch", learner.max_tokens_per_micro_batch
        yield Problem(key=key, value=value, rule=rule, fix=f"try {longest}")
    if config.cluster.placement == "separate" and learner.num_gpus not in (0, 1):
        rule = "must be 0 or 1 for each rank when cluster.placement is separate"
        yield Problem(key="learner.num_gpus", value=learner.num_gpus, rule=rule, fix="raise learner.num_ranks instead")
    for name, stage in (("offload_optimizer", 1), ("offload_params", 3)):
        target = getattr(learner, name)
        needs: list[str] = []
        if target != "none" and not learner.num_gpus:
            needs.append("learner.num_gpus=1")
        if target != "none" and learner.zero_stage < stage:
            needs.append(f"learner.zero_stage={stage}")
        if target == "nvme" and not learner.nvme_path:
            needs.append("learner.nvme_path=FOLDER")
        if needs:
            rule = f"needs {' and '.join(needs)}"
            yield Problem(key=f"learner.{name}", value=target, rule=rule, fix=f"set that, or learner.{name}=none")
