"""The table of sentinels: what each watches, why it matters, what to do. docs/sentinels.md is made from it."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unirl.monitoring import detectors, sft_detectors
from unirl.monitoring.detectors import Look


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentinel:
    """One row of the table."""

    name: str
    normal: str
    """What a healthy run shows."""
    why: str
    """What happens to a run in which it is not heard."""
    remedy: str
    watches: str = ""
    """What it looks at in PairGRPO, and from when on it speaks; empty where it has nothing to look at."""
    find: Callable[[Look], Iterator[str]] | None = None
    """Says what is wrong with a step of PairGRPO; None where it is seen elsewhere, or of no meaning."""
    sft: str = ""
    """What it looks at in fine-tuning; empty where it has nothing to look at."""
    find_sft: Callable[[Look], Iterator[str]] | None = None
    """Says what is wrong with a step of fine-tuning; None as for `find`."""
    refusals: tuple[str, ...] = ()
    """Words of the errors by which a run that cannot go on says so."""
    stops: bool = True
    """Whether it ends a run with `monitoring.on_alert=stop`."""
    needs: str = "nothing"
    """What it must have seen before it can speak, also after a resume."""
    looks_at: tuple[str, ...] = ()
    """Metrics that not every step has, without which it knows nothing of the step."""


_STEPS = "three steps; after a resume from metrics.jsonl"
_LINES = "two steps; after a resume from metrics.jsonl"
_GO_BACK = "go on from an older checkpoint: unirl runs fork RUN NEW --step N."

SENTINELS: tuple[Sentinel, ...] = (
    Sentinel(
        name="nonfinite",
        watches="Every metric, log-probability, gradient, weight and reward: NaN or infinity.",
        normal="No such value, ever.",
        why="One NaN gradient makes every weight NaN. The learner refuses it before the optimizer moves.",
        remedy="Look at the rows the message names in the journal; lower learner.lr; resume from the last checkpoint.",
        find=detectors.nonfinite,
        sft="Every metric, loss and gradient.",
        find_sft=detectors.nonfinite,
        refusals=("expected finite", "expected a finite"),
    ),
    Sentinel(
        name="constant_reward",
        watches="Greatest less least reward of a task: 0 in three steps running, and over 12 pairs.",
        normal="Rewards of a step differ, until a task is solved.",
        why="Nothing is learned from a task whose every completion earns the same.",
        remedy="Read pairs in the dashboard: if answers are rightly all right, take harder data; else mend the reward.",
        find=detectors.constant_reward,
        needs=_STEPS,
    ),
    Sentinel(
        name="fallen_reward",
        watches="Mean reward of a task over two steps, and 12 pairs: lower than in the five steps before by a quarter "
        "of the range of rewards, and beyond chance.",
        normal="A rise, with ups and downs of a few hundredths.",
        why="The policy has lost what it could; checkpoints saved from now on hold it as it is.",
        remedy="Go on from before the fall with a lower learner.lr: unirl runs fork RUN NEW --step N.",
        find=detectors.fallen_reward,
        needs=_STEPS,
    ),
    Sentinel(
        name="zero_variance",
        watches="Share of groups whose rewards are all equal: 100 % in three steps running, and over 12 pairs.",
        normal="Less than half of the groups are flat; more near the end of a run.",
        why="Group-relative advantages of equal rewards are 0: steps cost as always and teach nothing.",
        remedy="More completions a prompt (rollout.num_*), a higher temperature, or pairs of middling difficulty.",
        find=detectors.zero_variance,
        needs=_STEPS,
    ),
    Sentinel(
        name="disordered_advantages",
        watches="Inside each group: advantages must rise with the rewards and sum to 0.",
        normal="0 %: this is arithmetic.",
        why="A wrong sign or a mixed-up group trains towards the worse completion.",
        remedy="A defect of the code that turns rewards into advantages; compare unirl/algorithms/advantages.py.",
        find=detectors.disordered_advantages,
    ),
    Sentinel(
        name="wrong_pair_weights",
        watches="Weight of each pair: in [0, 1], and 1 for aligned pairs.",
        normal="sqrt(similarity) for retrieved pairs, 1 for aligned ones.",
        why="A wrong weight scales a pair's whole gradient.",
        remedy="Check the pair set with unirl pair verify; else a defect of unirl/algorithms/pair_weight.py.",
        find=detectors.wrong_pair_weights,
        refusals=("expected pair weights in [0, 1]",),
    ),
    Sentinel(
        name="no_gradient",
        watches="Gradient of each task that has advantages: missing or exactly 0.",
        normal="Norms of both tasks above 0 in every step with advantages.",
        why="One side of the model silently stays as it was, and the method's point is lost.",
        remedy="See that model.frozen leaves weights this task passes through; look for a detached tensor.",
        find=detectors.no_gradient,
        sft="Each modality with targets: no gradient at the states that predict them. No target of a modality any "
        "more, where by the steps before 20 sequences should have one.",
        find_sft=sft_detectors.no_gradient,
        refusals=(
            "expected a gradient from every task",
            "expected a gradient from each modality",
            "expected a gradient; got none at all",
        ),
    ),
    Sentinel(
        name="lost_rows",
        watches="Completions with an advantage and a loss token, against rows that took part in a loss of the update.",
        normal="The two numbers are equal.",
        why="Samples that never reach the loss bias it towards those that do.",
        remedy="A defect between weigh_groups and the loss; compare unirl/learner/batching.py and learner.py.",
        find=detectors.lost_rows,
        sft="Targets of the step's sequences, against those that took part in its loss.",
        find_sft=sft_detectors.lost_targets,
    ),
    Sentinel(
        name="learning_rate_zero",
        watches="Learning rate of each update: 0.",
        normal="Above 0 in every step; a schedule reaches 0 after the last one.",
        why="Steps cost as always and change nothing.",
        remedy="Set learner.lr, or a schedule that ends with the run (train.num_steps).",
        find=detectors.learning_rate_zero,
        sft="The same.",
        find_sft=detectors.learning_rate_zero,
    ),
    Sentinel(
        name="frozen_weights",
        watches="Checksum of the published weights: unchanged by an update with a gradient and a rate.",
        normal="Another checksum after every update.",
        why="The optimizer moves something else than what is published: nothing reaches the samplers.",
        remedy="See that the published module is the trained one; in bfloat16 raise learner.lr above rounding.",
        find=detectors.frozen_weights,
        sft="64 values of each trained tensor before and after the update: none changed in three steps running, at a "
        "rate of at least a tenth of the highest.",
        find_sft=sft_detectors.frozen_weights,
        needs="one step of the same process",
    ),
    Sentinel(
        name="stale_sampler",
        watches="Checksum of a fixed slice of each sampler's own weights after each sync, against the learner's; and a "
        "sampler of which no weight can be compared, unless its engine sleeps.",
        normal="No difference, with any engine and any way of transport; rollout/num_compared_weights above 0.",
        why="A sampler with old weights makes every batch off-policy, and no curve shows why.",
        remedy="Read that worker's log; end it, and another takes its place with the newest weights.",
        find=detectors.stale_sampler,
    ),
    Sentinel(
        name="damaged_weights",
        watches="Names, shapes and checksum of each publication, by each sampler that loads it.",
        normal="Every publication is taken over.",
        why="Half an update, or another model's, would sample nonsense.",
        remedy="Look at memory, disk and network of the machine; resume.",
        refusals=("they were damaged on the way", "publish from a learner of the same checkpoint", "publish again"),
    ),
    Sentinel(
        name="logprob_gap",
        watches="|learner - sampler| log-probability of on-policy tokens, by modality: the largest against "
        "monitoring.max_logprob_gap, the mean of two steps running against a fiftieth of it; for images 2s - 1 times.",
        normal="On the lab: mean 1e-7 and at most 2e-6 in float32; in bfloat16 mean 0.001 and at most 0.03 in answers, "
        "0.01 and 1.3 in images at guidance s = 5.",
        why="Ratios and advantages are then of another policy than the one that sampled.",
        remedy="Run unirl verify on the checkpoint: it says which part differs. Raise the limit for a larger model.",
        find=detectors.logprob_gap,
        needs="nothing; two steps for the mean, after a resume from metrics.jsonl",
    ),
    Sentinel(
        name="off_policy_ratio",
        watches="Ratios of an on-policy update, which should be 1: the mean of two steps running, within a twentieth "
        "of monitoring.max_logprob_gap; least and greatest; log-ratios beyond 20 nats ever.",
        normal="With one update a step 1 to five digits in float32; in bfloat16 a mean of 0.998 to 1.001.",
        why="The clipped loss drops the very tokens that should be learned.",
        remedy="As for logprob_gap; with several updates a step, lower learner.lr or algorithm.updates_per_step.",
        find=detectors.off_policy_ratio,
        needs="nothing; two steps for the mean, after a resume from metrics.jsonl",
    ),
    Sentinel(
        name="far_kl",
        watches="KL per token from the policy that sampled, during the updates and, in steps with a cosine, after "
        "them: above 0.5 nats.",
        normal="0 during a single update; below 0.05 else.",
        why="So long a step usually cannot be taken back.",
        remedy=f"Lower learner.lr or algorithm.updates_per_step; {_GO_BACK}",
        find=detectors.far_kl,
        looks_at=("policy/kl_update",),
    ),
    Sentinel(
        name="dominating_modality",
        watches="Gradient norms of the tasks: one 30 times as long as the other in two measured steps running.",
        normal="Norms within a factor of 5 on the lab.",
        why="Clipping and Adam follow the longer one; the other task is not trained.",
        remedy="Look at token_aggregation, the tasks' numbers of completions, and their advantages' sizes.",
        find=detectors.dominating_modality,
        looks_at=("learner/grad_norm/understanding", "learner/grad_norm/generation"),
        sft="Gradients at the states that predict text and image codes: one 100 times shorter in two steps running, "
        "though it has a tenth of the targets and 0.1 nats to learn.",
        find_sft=sft_detectors.dominating_modality,
        needs=_LINES,
    ),
    Sentinel(
        name="gradient_spike",
        watches="Gradient norm: 30 times the median of the last 20 steps.",
        normal="Within a factor of 3 of the median.",
        why="One such step may undo many.",
        remedy="learner.max_grad_norm limits the harm; look at the step's pairs; lower learner.lr if it comes again.",
        find=detectors.gradient_spike,
        sft="The same.",
        find_sft=detectors.gradient_spike,
        stops=False,
        needs=_LINES,
    ),
    Sentinel(
        name="entropy_collapse",
        watches="Entropy and surprisal of either modality: below a tenth of the median of the first, or last, 5 steps.",
        normal="A slow fall, to a half over a run.",
        why="Samples of a prompt become alike, and groups lose their signal for good.",
        remedy=f"See that temperatures were not changed; lower learner.lr; {_GO_BACK}",
        find=detectors.entropy_collapse,
        needs=_LINES,
    ),
    Sentinel(
        name="equal_images",
        watches="Drawings of each prompt: all the same, code by code.",
        normal="No group of copies.",
        why="A group of copies teaches nothing, and means that seeds or temperature are lost.",
        remedy="Check rollout.sampling.image and the sampler's seeds.",
        find=detectors.equal_images,
    ),
    Sentinel(
        name="length_coupling",
        watches="Rank correlation of reward and length inside groups of answers: above 0.8, and beyond chance.",
        normal="Between -0.5 and 0.5.",
        why="The policy learns to write longer, or shorter, instead of better.",
        remedy="Read the answers in the dashboard; mend the reward, or mask answers that are cut off.",
        find=detectors.length_coupling,
        needs="some 25 completions; after a resume from metrics.jsonl",
    ),
    Sentinel(
        name="brightness_coupling",
        watches="Rank correlation of reward and mean pixel inside groups of drawings: above 0.8, and beyond chance.",
        normal="Between -0.5 and 0.5.",
        why="The policy learns to draw bright, or dark, instead of right: a known way to please a preference model.",
        remedy="Look at the pictures in the dashboard; add a reward that does not follow brightness.",
        find=detectors.brightness_coupling,
        needs="some 25 completions; after a resume from metrics.jsonl",
    ),
    Sentinel(
        name="missing_component",
        watches="Rewards that are configured: absent from a group, or one value for everything beside other rewards.",
        normal="Each reward judges every group of its task, and its values differ.",
        why="The weighted sum goes on without one of its parts, and the curve only looks a little lower.",
        remedy="Look at the reward's log and options.",
        find=detectors.missing_component,
        needs="nothing; three steps where it says one thing",
    ),
    Sentinel(
        name="unjudged",
        watches="Completions that no reward could judge: any; above rewards.max_unjudged_fraction the run ends.",
        normal="0 %.",
        why="They are masked, so what cannot be judged is not learned from.",
        remedy="logs/driver.log has the reward's error; raise its timeout_s, or mend it.",
        find=detectors.unjudged,
        refusals=("rewards.max_unjudged_fraction",),
        stops=False,
    ),
    Sentinel(
        name="truncated_failures",
        watches="Answers cut off at the limit: a fifth or more of two steps running, earning less than finished ones.",
        normal="Below 5 % cut off.",
        why="Long thought is taught as failure, though nobody knows how it would have ended.",
        remedy="Raise rollout.sampling.text.max_tokens, or have the reward leave them unjudged.",
        find=detectors.truncated_failures,
        needs=_LINES,
    ),
    Sentinel(
        name="repeated_pairs",
        watches="Uses of each pair, against the epochs that are over.",
        normal="Each pair once an epoch.",
        why="Some pairs are overlearned, and others never seen.",
        remedy="A defect of the pair source; resume is no cause, since the order is a function of seed and step.",
        find=detectors.repeated_pairs,
        needs="nothing; after a resume from used_pairs.jsonl",
    ),
    Sentinel(
        name="evaluation_leak",
        watches="Question with picture, and prompt, of each training sample: the same as a held-out one.",
        normal="No sample in common.",
        why="Evaluation then measures memory.",
        remedy="Make the pair set without the held-out samples, or name other evaluation.data.",
        find=detectors.evaluation_leak,
        sft="Tokens and pictures before the first target of each sequence, or all of them: the same as of one of "
        "`evaluation.sources`. A prompt that several of these share tells none of them.",
        find_sft=sft_detectors.evaluation_leak,
    ),
    Sentinel(
        name="unread_images",
        watches="The first question of each unit of work: another picture must give another prompt.",
        normal="Another prompt for another picture.",
        why="Placeholder tokens without pixels: the model answers blind, sampler and learner alike, and no gap shows.",
        remedy="Mend encode or embed_prompts of the family; unirl verify compares with another implementation.",
        refusals=("placeholder tokens without pixels", "image placeholders"),
    ),
    Sentinel(
        name="blank_images",
        watches="Pictures of the step's questions: one colour all over.",
        normal="None.",
        why="A question about nothing can only be guessed.",
        remedy="Find the pairs with unirl pair report; repair the files or drop the samples.",
        find=detectors.blank_images,
    ),
    Sentinel(
        name="staleness",
        watches="Updates since the weights that drew a token: of the oldest more than overlap.mode allows, of "
        "the newest below 0.",
        normal="0 in a synchronous run, `algorithm.updates_per_step` one step off.",
        why="Importance weights reach only so far.",
        remedy="A defect of the flow or of the pool, which refuse such rollouts.",
        find=detectors.staleness,
    ),
    Sentinel(
        name="importance_capped",
        watches="Share of tokens of older weights whose weight is the cap: above a fifth.",
        normal="Below 5 %.",
        why="The correction for older weights is biased where it is capped.",
        remedy="Lower overlap.max_staleness or learner.lr, or raise algorithm.importance_cap.",
        find=detectors.importance_capped,
        stops=False,
    ),
    Sentinel(
        name="lost_workers",
        watches="Rollout workers, reward workers and learner ranks that died or hung and were replaced.",
        normal="None; a few over days on shared machines.",
        why="The run goes on; often it means that memory is short.",
        remedy="Read that worker's log and the machine's; lower num_workers or max_num_seqs.",
        find=detectors.lost_workers,
        stops=False,
    ),
    Sentinel(
        name="quarantined",
        watches="Requests that failed as often as they may and were left out.",
        normal="None.",
        why="The step is smaller, and what fails is not learned from.",
        remedy="quarantine.jsonl has each with its last error.",
        find=detectors.quarantined,
        stops=False,
    ),
    Sentinel(
        name="loss_spike",
        sft="Nats of a target of either modality: in two steps running above all of the last 20, twice their median "
        "and a nat more than it.",
        normal="A fall, then a plateau with noise of tenths of a nat.",
        why="What fine-tuning had taught, and what the model knew before it, is being lost.",
        remedy="Look at the data from that step on; lower learner.lr; resume from a checkpoint before it.",
        find_sft=sft_detectors.loss_spike,
        needs="three steps; after a resume from metrics.jsonl",
    ),
    Sentinel(
        name="flat_loss",
        sft="Nats of a target of either modality: the same to the last digit in three steps running. Held-out nats of "
        "both: within 0.1 % of those before training.",
        normal="Other sequences have another loss, and held-out ones a lower one.",
        why="Nothing is learned, or what is shown is not what is learned.",
        remedy="See learner.lr and what of the model is trained; compare unirl/learner/sft_learner.py.",
        find_sft=sft_detectors.flat_loss,
        needs=_STEPS,
    ),
    Sentinel(
        name="unlearned_modality",
        sft="A modality of which nothing will be learned, told at the start: a weight of 0, or no target of it in the "
        "first steps.",
        normal="Both, but for runs on one modality alone.",
        why="Data whose images nobody marked as targets teach text alone, and no curve says so.",
        remedy="Nothing if it is meant; else mark what is to be learned, or set loss.targets=all.",
        stops=False,
    ),
    Sentinel(
        name="left_out",
        sft="Conversations that could not become sequences, told at the start: over one in a thousand of a source.",
        normal="None, or a handful. None is ever cut: a long one is split between two exchanges, or left out.",
        why="Long conversations go first, so that what is left is other data than you gave.",
        remedy="rejected.jsonl beside the tokens has the reasons; raise data.max_length, or repair the data.",
        stops=False,
    ),
    Sentinel(
        name="rate_jump",
        sft="The learning rate of a resumed run of another length, told at the start: other than it would have been.",
        normal="A resumed run has the length that it began with.",
        why="A cosine that had come down rises again at once, which costs what the last steps had gained.",
        remedy="Nothing if it is meant; else start a new run from the exported policy.",
        stops=False,
    ),
    Sentinel(
        name="repeated_conversations",
        sft="Sequences of the same name and tokens in an epoch: a tenth of a step came oftener than weights and counts "
        "ask for.",
        normal="Each as often as its source's weight says.",
        why="Some conversations are overlearned.",
        remedy="Two sources may hold the same rows, or one holds them twice; to show a source oftener set its weight.",
        find_sft=sft_detectors.repeated_conversations,
        needs="to have seen them in this start of the run",
    ),
    Sentinel(
        name="data_wait",
        sft="Seconds that the slowest rank waited for its sequences: more than half a second, and more than the update "
        "took, in three steps running.",
        normal="Near 0: sequences are made two steps ahead.",
        why="The GPUs idle while a thread reads a slow disk or decodes pictures.",
        remedy="Put data.cache_dir on a local disk; give the ranks more CPUs (learner.num_cpus).",
        find_sft=sft_detectors.data_wait,
        stops=False,
        needs=_STEPS,
    ),
    Sentinel(
        name="stalled",
        watches="The run, and each worker at work: nothing done for monitoring.stall_after_s and thrice the longest "
        "wait before; or a worker without a heartbeat for so long.",
        sft="The same of its ranks.",
        normal="A sign every few seconds to minutes.",
        why="A hung worker costs the machine's hours and shows in no curve.",
        remedy="Read the log of the worker it names. A hung one is replaced in the end (rollout.timeout_s).",
        stops=False,
    ),
    Sentinel(
        name="other_weights",
        watches="Weights of a step that was made again from the journal, against those of the run.",
        normal="The same to the bit on the same machine.",
        why="The machine computes otherwise than before: the run goes on, but is no longer the same run.",
        remedy="Resume on the same kind of machine, with the same torch and number of threads.",
        stops=False,
    ),
)


def sentinel_of(name: str) -> Sentinel:
    """The row of this name."""
    return next(sentinel for sentinel in SENTINELS if sentinel.name == name)


def refusing_sentinel(error: BaseException) -> Sentinel | None:
    """The sentinel whose words an error has; the first ones count, since an error may tell of another inside it."""
    text = str(error)
    found = [(text.index(words), s.name) for s in SENTINELS for words in s.refusals if words in text]
    return sentinel_of(min(found)[1]) if found else None


def failure_of(name: str) -> str:
    """Words with which an alert begins that is about the sentinel itself, which could not look."""
    return f"sentinel {name} failed"


def severity_of(sentinel: Sentinel, on_alert: str) -> str:
    """What an alert does to a run with this `monitoring.on_alert`: "stop" where it ends it, else "warn"."""
    return "stop" if on_alert == "stop" and sentinel.stops else "warn"


def alert_fields(sentinel: Sentinel, step: int, on_alert: str = "warn") -> dict[str, object]:
    """Fields of an alert's event beside its message."""
    severity = severity_of(sentinel, on_alert)
    return {"step": step, "sentinel": sentinel.name, "severity": severity, "remedy": sentinel.remedy}


def page() -> str:
    """docs/sentinels.md, made from the table."""
    lines = [PREFACE]
    jobs = {"A PairGRPO run": [s for s in SENTINELS if s.watches], "Fine-tuning": [s for s in SENTINELS if s.sft]}
    for job, own in jobs.items():
        lines += [f"**{job} has {len(own)}:** {', '.join(s.name for s in own)}.", ""]
    lines += ["## All of them", ""]
    for s in SENTINELS:
        watches = " ".join(filter(None, [s.watches, REFUSES if s.refusals else ""]))
        lines += [f"### {s.name}", "", *([watches, ""] if watches else [])]
        lines += [f"In fine-tuning: {s.sft}", ""] if s.sft else []
        lines += [f"- Normal: {s.normal}", f"- Otherwise: {s.why}", f"- What to do: {s.remedy}"]
        ends = "the run" if s.stops else "nothing"
        lines += [f"- Needs {s.needs}. With `monitoring.on_alert=stop` it ends {ends}.", ""]
    return "\n".join(lines)


REFUSES = "A step that cannot go on is refused with an error, which is an alert too."
PREFACE = """\
# Sentinels

Made from the table in `unirl/monitoring/sentinel_table.py` by
`python -m unirl.monitoring.sentinel_table > docs/sentinels.md`.

Sentinels look at every step of a PairGRPO run (`unirl train`) and of fine-tuning (`unirl sft`) after it is recorded.
What one of them finds is an `alert` in `events.jsonl`, a line `step N, sentinel: message -> remedy` in the terminal, in
`logs/driver.log` and in `unirl runs show`, and red on the dashboard. A run that had any ends with a line that counts
them.

```json
{"kind": "alert", "step": 120, "sentinel": "logprob_gap", "severity": "warn", "since": 120,
 "message": "sampler and learner differ by 3.62 nats on a text token; expected at most 0.001",
 "remedy": "Run unirl verify on the checkpoint: it says which part differs. ..."}
```

- **A condition that lasts is told when it begins**, when it comes to another task or modality, then every 100 steps,
  and once in each new attempt of a run that is resumed, always with `since`, its first step. Three steps without it,
  and an event `alert over` ends it.
- **`monitoring.on_alert`** is `warn` or `stop`. With `stop`, the first alert that says learning has gone wrong
  (`severity` is then `stop`) saves a checkpoint and ends the run with exit code 1. Mend what it names and go on with
  `--resume RUN key=value`: as it is, the run ends again after a step. With `monitoring.on_alert=warn` it goes on
  whatever is found.
- **A checkpoint from before** the first step of such an alert is kept, one for each sentinel that spoke, beside the
  newest `train.keep_checkpoints`, with `warn` as with `stop`. `unirl runs fork RUN NEW --step N` goes on from there:
  see [](survival.md).
- **A sentinel that fails** costs the run nothing but its opinion: one alert of severity `warn` says so, the traceback
  is in `logs/driver.log`, and the others are asked all the same.
- **After a resume** they go on as if nothing had happened: what they compare with is read from `metrics.jsonl`,
  `used_pairs.jsonl` and `events.jsonl`. Steps that are made again replace what was noted of them.
- **Limits** are no settings, but for `monitoring.max_logprob_gap`, which depends on the model, and
  `monitoring.stall_after_s`. Single tokens may differ by tenths in bfloat16, so there it is the mean of a modality's
  tokens that tells a wrong temperature. They are far from what healthy runs show: [the bank of faults](faults.md)
  plants more than eighty faults in runs of the lab, each of which must be caught within three steps, beside runs
  without a fault, in which none may speak. `unirl verify --faults` runs it.

A sentinel reads what the run recorded and asks workers for nothing more, but for the checksums of their weights: 64
values of each tensor at each sync.

"""


if __name__ == "__main__":
    sys.stdout.write(page())
