"""Every setting of every job as frozen dataclasses, and their dotted names. No torch, no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from unirl.types import Task

Family = Literal["janus_pro", "lumina_dimoo", "anole", "emu3", "liquid"]
"""Model families: `unirl/models/<name>.py`, for vLLM `unirl/rollout/vllm_models/<name>.py`."""
RewardName = Literal["accuracy", "hpsv2", "lab_verifier"]
"""Rewards: `unirl/rewards/<name>.py`."""
ObjectiveName = Literal["pair_grpo", "pairwise", "vanilla_mixed"]
"""Objectives: `unirl/algorithms/<name>.py`."""
PairsTaken = Literal["all", "aligned", "retrieved", "from_understanding", "from_generation"]
PairPartners = Literal["own", "random", "unlike"]

# The string under a field is its documentation: `unirl config keys` and docs/configuration show it.


@dataclass(frozen=True)
class ModelConfig:
    """The policy: which family, which checkpoint, what is trained."""

    family: Family = "janus_pro"
    """Which file of unirl/models loads the checkpoint."""
    path: str = "lab:janus"
    """Folder of a Hugging Face checkpoint, or "lab:janus", "lab:lumina_dimoo" or "lab:anole" for the tiny ones of the
    package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in sampler and learner."""
    frozen: tuple[str, ...] = ("vision", "vq")
    """Parts that are not trained: "vision" (vision tower), "aligner", "vq" (image tokenizer). All but Janus-Pro
    have only the last, which they never train."""
    image_tokenizer: str | None = None
    """Folder or file of the image tokenizer, for families that keep it apart: Emu3 (BAAI/Emu3-VisionTokenizer) and
    Liquid (Chameleon's VQGAN); null where it is in the checkpoint."""
    image_pixels: tuple[int, int] | None = None
    """Least and greatest area of a picture in pixels, for families that take pictures of any size (Emu3: 512 x 512 and
    more by default, whose 4,096 codes do not fit into 4,096 tokens); null takes the checkpoint's own."""
    system_prompt: str | None = None
    """System prompt of understanding prompts, for every family but Janus-Pro of both kinds; null takes the
    checkpoint's, "" none."""


@dataclass(frozen=True)
class DataConfig:
    """The pair set and how it is read."""

    pairs: str = "lab:pairs"
    """Folder of a pair set made by `unirl pair make`, or "lab:pairs" (made on first use, kept in `cache_dir`), with
    settings of that command where wanted: "lab:pairs,threshold=0.9"."""
    cache_dir: str = ".unirl"
    """Where data that a command makes for itself is kept."""
    max_pairs: int | None = None
    """Use only the first n pairs, of those that are taken; null uses all."""
    take: PairsTaken = "all"
    """Which pairs: of one kind, or the aligned ones whose image comes from understanding or generation data (PairUni,
    table 5)."""
    partners: PairPartners = "own"
    """Whose prompt a question travels with: its own pair's, another's at random, or that of the image least like its
    own. New partners have no weight to speak of: set algorithm.pair_weight=none."""
    shuffle: bool = True
    """New order in every epoch, from the run's seed."""


@dataclass(frozen=True)
class TextSampling:
    """How answers are sampled."""

    temperature: float = 1.0
    """Divides the logits. Above 0, since equal samples teach nothing; `evaluation.greedy` measures at 0."""
    max_tokens: int = 24
    """Longest answer in tokens; a longer one is cut and marked finish_reason "length". A masked-diffusion family writes
    into this many cells."""
    diffusion_steps: int = 2
    """Masked-diffusion families only: steps in which an answer is revealed, all blocks together; at most max_tokens."""
    block_length: int | None = None
    """Masked-diffusion families only: an answer is written in blocks of this many cells from left to right; null makes
    it one block."""
    loss_padding: int | None = 0
    """Masked-diffusion families only: cells behind an answer's end that count in its loss (TraceRL's post_num). They
    were drawn too, and what is written first sees them, so only null, which counts all, is the exact likelihood; with
    long canvases their number outweighs the words'."""


@dataclass(frozen=True)
class ImageSampling:
    """How images are sampled."""

    temperature: float = 1.0
    """Divides the logits, after guidance. Above 0."""
    guidance_scale: float = 1.5
    """Classifier-free guidance s: logits = uncond + s (cond - uncond); 1 is off and costs one stream. What
    Lumina-DiMOO calls w is s - 1."""
    size: tuple[int, int] | None = None
    """Height and width of pictures in pixels, for families that draw any; null takes the checkpoint's own."""
    diffusion_steps: int = 35
    """Masked-diffusion families only: steps in which a picture is revealed; at most its number of image codes."""
    approximate_cache: bool = False
    """Masked-diffusion families only: reuse keys, values and logits of most positions between steps (half the work).
    Refused for rollouts, whose log-probabilities must be exact; `evaluation.approximate_cache` uses it."""


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
    """"vllm" draws token after token; "torch" is the sampler of masked-diffusion families, and for the others the plain
    one: the oracle of the tests, and what --local may choose."""
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
    """Memory for the key-value cache of one engine, in GiB; under guidance an image takes it for two streams."""
    enforce_eager: bool = True
    """Skip torch.compile and CUDA graphs; starts faster, samples slower."""
    timeout_s: float = 600.0
    """A unit that takes longer is taken for hung: its worker is replaced and the unit requeued."""
    max_attempts: int = 3
    """A unit that failed this often is cut into its requests; a request that fails as often again, alone, is left out
    and named in quarantine.jsonl, and its completions count as unjudged."""


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

    objective: ObjectiveName = "pair_grpo"
    """PairUni eq. 4, eq. 2 (no weight) or eq. 1 (tasks shuffled into one batch)."""
    pair_weight: Literal["sqrt", "linear", "none"] = "sqrt"
    """Weight of a retrieved pair from its similarity (eq. 3, Table 7); aligned pairs weigh 1."""
    advantage_std: Literal["sample", "population", "none"] = "sample"
    """Divide by the group's standard deviation: ddof 1, ddof 0, or not at all (Dr.GRPO)."""
    token_aggregation: Literal["sequence_mean", "sequence_sum", "token_mean", "constant_length"] = "sequence_mean"
    """How token losses become one number: mean per trajectory then per task; the paper's literal sum, with a gradient
    longer by the length of a completion; mean over a task's tokens (T2I-R1, DAPO); sum over tokens divided by the
    longest length allowed (Dr.GRPO)."""
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
    diffusion_steps_per_update: int | None = None
    """Masked-diffusion families only: learn from this many of a completion's K steps, drawn anew for every batch and
    weighted by K over their number, which leaves the expected gradient as it is; null, or K and more, takes all."""
    diffusion_shrink: int = 1
    """Masked-diffusion families only, BIASED: this many consecutive steps are scored as one, on the canvas before the
    first of them (TraceRL's shrink); old log-probabilities are then taken the same way, before the first update."""
    importance_cap: float | None = 2.0
    """Batches of older weights only (overlap.mode): each token's loss is multiplied by min(current / sampled
    probability, this cap), taken before the first update, and ratios are then to the current policy (truncated
    importance sampling). null takes ratios to the weights that sampled."""


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
    warmup_fraction: float = 0.0
    """Share of all updates over which the rate rises, instead of warmup_steps; 0 takes warmup_steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate after the warm-up; linear and cosine end at 0 after the last step."""
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
    timeout_s: float = 3600.0
    """An update, a publication or a checkpoint that takes longer is taken for hung, and its ranks for lost."""
    max_restarts: int = 3
    """Losses of a rank after which the run ends; until then all ranks start anew from the last checkpoint and the
    journal. PairGRPO with Ray only."""


@dataclass(frozen=True)
class OverlapConfig:
    """Whether rollouts go on while the learner learns. Needs Ray."""

    mode: Literal["synchronous", "one_step_off", "bounded_staleness"] = "synchronous"
    """"synchronous" samples a step, learns it, and repeats: every batch is on-policy. "one_step_off" samples the next
    step meanwhile, with the weights before; still the same run every time. "bounded_staleness" samples up to
    `max_staleness` steps ahead with the newest weights there are; what is sampled then depends on timing."""
    max_staleness: int = 2
    """"bounded_staleness" only: a step may be sampled with weights at most this many steps older than on-policy."""
    in_flight_updates: bool = False
    """"bounded_staleness" only: sequences that are being sampled go on with new weights as soon as they are there,
    which read anew what was drawn so far; the weights of each token are recorded."""


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
    """Newest checkpoints kept, and while an alert lasts that learning goes wrong, one from before it; 0 keeps all."""


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
    approximate_cache: bool = False
    """Masked-diffusion families only: draw the pictures with `sampling.image.approximate_cache`."""
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
    """CPUs that a Ray started for the run announces; null announces what the actor plan needs, at most four a core."""
    object_store_gib: float = 0.5
    """Shared memory of a local Ray, in GiB."""
    start_timeout_s: float = 300.0
    """Give up when an actor is not up after this time."""
    weight_transport: Literal["object_store", "broadcast", "shared_memory"] = "object_store"
    """How weights reach the rollout workers: through Ray's object store; by one broadcast from learner rank 0 to all of
    them, NCCL between GPUs, else gloo; or in memory that processes on rank 0's machine share."""
    broadcast_timeout_s: float = 60.0
    """Patience of a broadcast's members with each other; who is lost or late fetches the weights by itself."""
    metrics_port: int | None = None
    """Port on which a Ray that the run starts serves metrics to Prometheus; null lets Ray choose one."""


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
    """Mirror the metrics to TensorBoard files in the run directory."""
    wandb: Literal["none", "offline", "online"] = "none"
    """Mirror the metrics to W&B: into files of the run directory, which `wandb sync` sends later, or to its server."""
    wandb_project: str = "unirl"
    """Project of W&B."""
    prometheus: bool = False
    """Mirror the metrics to Prometheus through Ray's exporter. A Ray that the run starts serves them on
    cluster.metrics_port."""
    stall_after_s: float = 300.0
    """Seconds without a sign, of the run or of a worker at work, after which to say what is being waited for; at least
    three times the longest wait before."""
    on_alert: Literal["warn", "stop"] = "warn"
    """What an alert does (docs: sentinels): "warn" notes it in events.jsonl; "stop" saves a checkpoint and ends the run
    with exit code 1 at the first one that says learning has gone wrong."""
    max_logprob_gap: float | None = None
    """Nats by which sampler and learner may differ on a single token before an on-policy update; null takes 1e-3 in
    float32 and 1 in bfloat16. On average over a step's tokens they may differ by a fiftieth of it, and the mean ratio
    from 1 by a twentieth. Gaps of images may be 2s - 1 times as large, s the guidance scale. PairGRPO only."""
    grad_cosine_every: int = 10
    """Steps between measurements of the cosine between the understanding and the generation gradient, by pair kind too;
    the first step is one. In between the norm of either is taken where that needs no traffic between ranks. Keeps up to
    three copies of the gradient sums in main memory meanwhile, sharded as ZeRO shards them; 0 measures neither."""
    heartbeat_s: float = 5.0
    """Seconds between the lines that every actor writes about itself to actors/; 0 writes none."""


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
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    """Rollouts while the learner learns."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out measurements."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where actors run."""
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """What is recorded."""


@dataclass(frozen=True)
class SourceConfig:
    """Conversations of a mixture."""

    path: str = ""
    """Folder or file of conversations (docs: interleaved data), or "lab:<subset>" of the embedded world."""
    subsets: tuple[str, ...] = ()
    """Take only these subsets of it; empty takes all."""
    count: int | None = None
    """Exactly so many samples, the same in every epoch: a part of them, or all of them several times; 0 takes none."""
    weight: float = 1.0
    """How often a sample is seen in an epoch: 0.5 shows half of them, drawn anew each epoch, 2 all twice. Not with
    `count`."""


@dataclass(frozen=True)
class SftDataConfig:
    """What is learned from, and how it becomes tokens."""

    sources: dict[str, SourceConfig] = field(default_factory=lambda: {"lab": SourceConfig(path="lab:unified_visual")})
    """The mixture: conversations by a name of your own."""
    cache_dir: str = ".unirl"
    """Where token shards, and data that a command makes for itself, are kept."""
    max_length: int = 4096
    """Longest sequence in tokens; no image is ever cut."""
    too_long: Literal["split", "reject"] = "split"
    """A longer conversation is split between two exchanges, or left out; one exchange alone that is too long is left
    out. All that is left out is named in rejected.jsonl."""
    max_rejected_fraction: float = 0.01
    """Stop when more than this share of the samples cannot be used."""
    samples_per_shard: int = 1024
    """Conversations of one file of the token cache, the unit of work of an encoder."""
    encoders: WorkersConfig = field(default_factory=WorkersConfig)
    """Ray workers that turn pictures into codes."""


@dataclass(frozen=True)
class SftLossConfig:
    """The loss (UnifiedVisual, appendix A) and what the paper leaves open about it."""

    restrict: bool = True
    """Text targets compete with text ids only, image codes with image codes only; false is the plain cross-entropy."""
    form: Literal["sliced", "masked"] = "sliced"
    """"sliced" never builds logits over both modalities; "masked" is the reference form; they are equal."""
    targets: Literal["response", "all"] = "response"
    """Learn what the data marks, which is what the assistant says, or the user's text and images too."""
    end_of_image: Literal["text", "ignored"] = "text"
    """Whether the end of an image is learned as text, although a sampler is made to write it."""
    row_ends: Literal["text", "ignored"] = "ignored"
    """Whether the ends of rows inside an image are learned as text (Emu3), although a sampler is made to write them."""
    reduction: Literal["tokens", "modalities"] = "tokens"
    """One mean over all targets of a step, or the sum of a mean over text and a mean over image codes."""
    text_weight: float = 1.0
    """Factor of the loss of text targets."""
    image_weight: float = 1.0
    """Factor of the loss of image codes."""
    text_ids: Literal["all", "drawable"] = "all"
    """Which text ids compete: all rows of the head, or those that a sampler may draw."""
    rows_at_once: int = 1024
    """Targets whose logits are held at a time; logits of more are computed anew in the backward pass."""


@dataclass(frozen=True)
class SftTrainConfig:
    """The run: length, batches, seed, folder, checkpoints."""

    num_epochs: int = 2
    """Passes over the mixture."""
    samples_per_step: int = 512
    """Sequences of one optimizer step, over all ranks."""
    max_steps: int | None = None
    """End after this many steps; null ends with the last epoch."""
    batching: Literal["packed", "bucketed"] = "packed"
    """"packed" fills rows with whatever fits, "bucketed" gives a row sequences of like length. Attention never crosses
    from one sequence to another, and positions start anew with each."""
    seed: int = 0
    """Seed of the order of the samples."""
    run_dir: str | None = None
    """Run directory; null makes runs/<date>-<name>."""
    name: str = "sft"
    """Short name of the run."""
    save_every: int = 500
    """Steps between checkpoints; the last step and an interrupt always save. 0 keeps only those."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, and while an alert lasts that learning goes wrong, one from before it; 0 keeps all."""


@dataclass(frozen=True)
class DrawingConfig:
    """How the tokens of one modality are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1 keeps all."""


@dataclass(frozen=True)
class RepliesConfig:
    """How replies of text and pictures are sampled."""

    text: DrawingConfig = field(default_factory=lambda: DrawingConfig(temperature=0.0))
    """How text is drawn; greedily by default, as in the paper (UnifiedVisual, section 4.3)."""
    image: DrawingConfig = field(default_factory=DrawingConfig)
    """How image codes are drawn."""
    max_tokens: int | None = None
    """Longest reply in tokens; no image is begun that would not fit. null takes what `max_model_len` leaves after the
    prompt."""
    max_images: int | None = None
    """Most images of a reply; null sets no limit, 0 gives text only."""
    image_size: tuple[int, int] | None = None
    """Height and width of the pictures in pixels, for families that draw pictures of any size; null takes the size
    that a square picture is read at."""
    backend: Literal["vllm", "torch"] = "vllm"
    """"vllm" is the engine; "torch" the plain sampler, slow, for comparisons."""
    max_model_len: int | None = None
    """Longest prompt plus reply in tokens; null takes 4,096, or the checkpoint's positions where they are fewer."""
    max_num_seqs: int = 16
    """Most replies written at once."""
    kv_cache_memory_gib: float | None = None
    """Memory for the engine's key-value cache; null takes 1 GiB, or what one reply of the longest takes if that is
    more. More lets more replies be written at once."""
    enforce_eager: bool = True
    """Skip torch.compile and CUDA graphs; starts faster, samples slower."""


@dataclass(frozen=True)
class SftEvaluationConfig:
    """Held-out measurements."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Held-out conversations, scored before the first step, every so often, and after the last."""
    every: int = 0
    """Steps between evaluations; 0 evaluates before the first and after the last step only."""
    exam: Literal["none", "lab"] = "none"
    """Before the first and after the last step, answer the embedded world's held-out prompts and judge the replies."""
    exam_items: int = 60
    """Prompts of each subset in the exam."""
    exam_subsets: tuple[str, ...] = ()
    """Ask only these subsets; empty asks all."""
    replies: RepliesConfig = field(default_factory=RepliesConfig)
    """How the exam's replies are sampled."""


@dataclass(frozen=True)
class SftConfig:
    """Everything `unirl sft` needs."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(family="anole", path="lab:anole"))
    """The policy."""
    data: SftDataConfig = field(default_factory=SftDataConfig)
    """The mixture."""
    loss: SftLossConfig = field(default_factory=SftLossConfig)
    """The restricted cross-entropy."""
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(
            lr=2e-5, betas=(0.9, 0.999), schedule="cosine", warmup_fraction=0.05, max_tokens_per_micro_batch=8192
        )
    )
    """Optimisation."""
    train: SftTrainConfig = field(default_factory=SftTrainConfig)
    """The run."""
    evaluation: SftEvaluationConfig = field(default_factory=SftEvaluationConfig)
    """Held-out measurements."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where actors run."""
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """What is recorded."""


@dataclass(frozen=True)
class GenerateConfig:
    """Everything `unirl generate` needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    replies: RepliesConfig = field(default_factory=RepliesConfig)
    """Sampling."""
    num_replies: int = 1
    """Replies to each prompt, with consecutive seeds."""
    seed: int = 0
    """Of the first reply."""


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
    max_rejected_fraction: float = 0.01
    """A bad record is skipped, counted and named in rejected.jsonl; more than this share of a source stops the job."""
    teacher: Literal["lab", "none"] = "lab"
    """Who completes single-task samples to quadruples (section 2.1.1); "none" takes retrieved pairs only."""
    num_aligned: int = 500
    """Clusters K: aligned pairs wanted."""
    threshold: float = 0.6
    """Least cosine similarity of a retrieved pair."""
    top_n: int = 16
    """Candidates per generation image."""
    selection: Literal["medoids", "random"] = "medoids"
    """Which completed samples become aligned pairs: the most central of each cluster, or any (PairUni, table 9)."""
    order: Literal["similarity", "input"] = "similarity"
    """Greedy order: best pair first, or Algorithm 1 literally."""
    seed: int = 0
    """Seed of the clustering."""
    lab_samples: int = 1600
    """Samples per task drawn from the lab when the sources are "lab:..."."""


@dataclass(frozen=True)
class RecipeConfig:
    """Everything `unirl recipe` needs: fine-tuning, then reinforcement learning from its policy."""

    sft: SftConfig = field(default_factory=SftConfig)
    """The first stage."""
    train: RlConfig = field(default_factory=RlConfig)
    """The second; its model.path is the first stage's policy, whatever stands here."""
    run_dir: str | None = None
    """Folder of both runs and the report; null makes runs/<date>-<name>."""
    name: str = "recipe"
    """Short name of the recipe."""


@dataclass(frozen=True)
class ArmConfig:
    """One arm of an ablation: what it sets on top of the base settings."""

    files: tuple[str, ...] = ()
    """YAML files on top of the grid's files, and below its `settings`."""
    settings: tuple[str, ...] = ()
    """"key=value" each, on top of the files."""


@dataclass(frozen=True)
class ScoreConfig:
    """A number by which arms are compared."""

    metrics: tuple[str, ...] = ()
    """Its mean is over the held-out items of these measures, such as "understanding/answer_right" of the exam or
    "generation/sampled/reward" of an evaluation."""


@dataclass(frozen=True)
class CurveConfig:
    """A figure: a score over what some arms have more or less of."""

    score: str = ""
    """One of `scores`."""
    arms: tuple[str, ...] = ()
    """Its points."""
    x: tuple[float, ...] = ()
    """Where they lie, one number for each arm."""
    x_label: str = ""
    """What x is."""


@dataclass(frozen=True)
class AblationConfig:
    """Everything `unirl ablate` needs: runs that differ by arm and seed, and how to compare them."""

    job: Literal["sft", "train"] = "sft"
    """What each run is."""
    files: tuple[str, ...] = ()
    """YAML files with the settings that all arms share."""
    settings: tuple[str, ...] = ()
    """"key=value" each, on top of the files."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """What is compared, by a name of your own."""
    reference: str = ""
    """The arm that the others are compared with; empty takes the first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs of each arm (train.seed)."""
    scores: dict[str, ScoreConfig] = field(default_factory=dict)
    """By what, by a name of your own; every single measure is shown besides."""
    curves: dict[str, CurveConfig] = field(default_factory=dict)
    """Figures, by their title."""
    runs_at_once: int = 1
    """Runs under way at a time."""
    run_dir: str | None = None
    """Folder of all runs and the report; null makes runs/<date>-<name>."""
    name: str = "ablation"
    """Short name of the grid."""


SCHEMAS: dict[str, type] = {
    "train": RlConfig,
    "sft": SftConfig,
    "generate": GenerateConfig,
    "pair": PairConfig,
    "recipe": RecipeConfig,
    "ablate": AblationConfig,
}
"""The settings of each job."""


def flatten(config: object, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted key, e.g. {"learner.lr": 0.0003, ...}; free-form options stay one value."""
    flat: dict[str, Any] = {}
    for item in fields(config):  # pyright: ignore[reportArgumentType]
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            flat |= flatten(value, f"{key}.")
        elif is_table(value):
            for name, entry in value.items():
                flat |= flatten(entry, f"{key}.{name}.")
        else:
            flat[key] = value
    return flat


def setting_names(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a settings class; entries of a table, which the user names, stand as "<name>"."""
    names: list[str] = []
    for name, hint in get_type_hints(schema).items():
        entry = entry_type(hint)
        inner = entry or (hint if is_dataclass(hint) else None)
        part = f"{prefix}{name}.<name>" if entry else f"{prefix}{name}"
        names += setting_names(inner, f"{part}.") if inner else [part]  # pyright: ignore[reportArgumentType]
    return names


def entry_type(hint: Any) -> type | None:
    """The settings class of a table's entries (dict[str, RewardConfig] -> RewardConfig); None for any other type."""
    return get_args(hint)[1] if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]) else None


def is_table(value: Any) -> bool:
    """Whether a value is a table of settings by name, such as rewards.generation, and not empty."""
    entries: list[Any] = list(cast("dict[str, Any]", value).values()) if type(value) is dict else []
    return bool(entries) and all(map(is_dataclass, entries))


def default_of(schema: type, key: str) -> Any:
    """Default of a dotted key, also of one in an entry that the defaults lack; None for a free-form option."""
    kinds = (RewardConfig, SourceConfig, ArmConfig, ScoreConfig, CurveConfig)
    entries = {key: value for kind in kinds for key, value in flatten(kind()).items()}
    return flatten(schema()).get(key, entries.get(key.rpartition(".")[2]))


def default_text(value: Any) -> str:
    """A default as YAML writes it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(default_text, cast('Sequence[Any]', value)))}]"
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return f"{{{', '.join(f'{key}: {default_text(inner)}' for key, inner in items)}}}"
    return str(value) if value != "" else '""'
