"""What is normal for each metric, and what to do when it is not; by the names of `metrics.METRICS`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """Of one metric."""

    normal: str
    otherwise: str
    """What to do."""


_SPEED = "See [what is slow](scaling.md); compare `phase/<phase>_s` and the fleet."
_PAIRS = "Look at the pair set with `unirl pair report`."

ADVICE: dict[str, Advice] = {
    "reward/<task>": Advice(
        "rises over tens of steps, with noise", "read pairs: are rewards and answers what you meant?"
    ),
    "reward/<task>/aligned": Advice("as `reward/<task>`", "where only one kind rises, look at the other's pairs"),
    "reward/<task>/retrieved": Advice("somewhat below the aligned pairs'", "as for aligned pairs"),
    "reward/<task>/group_std": Advice(
        "well above 0; falls as the task is learned", "more completions, or harder pairs"
    ),
    "reward/<task>/zero_variance_fraction": Advice(
        "below a half", "more completions a prompt, a higher temperature, pairs of middling difficulty"
    ),
    "reward/<task>/unjudged_fraction": Advice("0", "logs/driver.log has the reward's error"),
    "reward/<task>/range": Advice("most of what the reward can give", "0 is a constant reward: mend it"),
    "reward/understanding/length_coupling": Advice(
        "within 0.5 of 0", "beyond 0.8 length is rewarded: read the answers"
    ),
    "reward/understanding/length_coupling_freedom": Advice("above 10", "few groups vary in both: judge slowly"),
    "reward/generation/brightness_coupling": Advice(
        "within 0.5 of 0", "beyond 0.8 light is rewarded: look at pictures"
    ),
    "reward/generation/brightness_coupling_freedom": Advice("above 10", "few groups vary in both: judge slowly"),
    "reward/<task>/truncated": Advice("absent, or near the task's mean", "raise max_tokens, or leave them unjudged"),
    "reward/num_restarts": Advice("0", "read the worker's log; memory is the usual reason"),
    "score/<task>/<reward>": Advice("rises with the task's reward", "one that falls is traded for the others"),
    "score/<task>/<reward>/<detail>": Advice("as its reward", "shows which part of the reward moves"),
    "advantage/abs_mean": Advice("0.3 to 0.9 with `advantage_std` sample", "near 0 most groups are without a signal"),
    "advantage/disordered_fraction": Advice("0", "a defect in the code of advantages"),
    "pairs/similarity_mean": Advice("steady", _PAIRS),
    "pairs/similarity_min": Advice("at or above the pair set's threshold", _PAIRS),
    "pairs/weight_mean": Advice("0.8 to 1", _PAIRS),
    "pairs/similarity_mean/<kind>": Advice("aligned 1; retrieved at or above the threshold of the pair set", _PAIRS),
    "pairs/weight_mean/<kind>": Advice("aligned 1; retrieved below it", _PAIRS),
    "pairs/weight_min": Advice("root of the least similarity", _PAIRS),
    "pairs/aligned_fraction": Advice("about the pair set's own share", _PAIRS),
    "pairs/num_blank_images": Advice("0", "repair or drop these samples"),
    "rollout/policy_version": Advice("step - 1 in a synchronous run", "see `rollout/staleness_max`"),
    "rollout/staleness_mean": Advice("0 synchronous; up to the bound else", "lower `overlap.max_staleness`"),
    "rollout/staleness_min": Advice("0 or more", "below 0 tokens claim weights that do not exist: a defect"),
    "rollout/staleness_max": Advice("at most what `overlap.mode` allows", "a defect of the pool"),
    "rollout/staleness/<updates>": Advice("most mass at few updates", "more workers, or a lower bound"),
    "rollout/truncated_fraction": Advice("below 0.05", "raise `rollout.sampling.text.max_tokens`"),
    "rollout/answer_tokens_mean": Advice("drifts slowly", "a jump means another format: read answers"),
    "rollout/num_completions/<modality>": Advice("pairs a step times K", "see `rollout/num_quarantined`"),
    "rollout/num_tokens": Advice("steady; follows the length of answers", "see `rollout/answer_tokens_mean`"),
    "rollout/num_restarts": Advice("0", "read the worker's log; memory is the usual reason"),
    "rollout/num_kept": Advice("absent but after a crash", "nothing"),
    "rollout/num_quarantined": Advice("0", "quarantine.jsonl has the errors"),
    "rollout/surprisal/<modality>": Advice("near `policy/entropy/<modality>`", "as for the entropy"),
    "rollout/num_stale_samplers": Advice("0", "end that worker; another takes its place"),
    "rollout/num_compared_weights": Advice(
        "steady; all in a plain sampler, what the engine leaves as it was in vLLM", "0 says nothing: mend weight_slices"
    ),
    "rollout/equal_images_fraction": Advice("0", "check seeds and temperature"),
    "rollout/tokens_per_s": Advice("steady", _SPEED),
    "rollout/images_per_s": Advice("steady", _SPEED),
    "time/step_s": Advice("steady, but for evaluations and checkpoints", _SPEED),
    "time/<phase>_s": Advice("steady", _SPEED),
    "phase/<phase>_s": Advice("steady; `idle` small", _SPEED),
    "learner/loss": Advice("around 0", "nothing: watch rewards instead"),
    "learner/loss/<task>": Advice("around 0", "nothing: watch rewards instead"),
    "learner/grad_norm": Advice("within a factor of 3 of its median", "clipping holds spikes; lower `learner.lr`"),
    "learner/grad_norm/<task>": Advice(
        "both within a factor of 10", "see `token_aggregation` and numbers of completions"
    ),
    "learner/grad_cosine": Advice("above 0, or around it", "steadily below -0.2 the tasks fight: look at the pairs"),
    "learner/grad_cosine/<kind>": Advice("higher for aligned pairs", "else similarity says little: check the encoder"),
    "learner/grad_cosine_s": Advice("3 % of a step, averaged", "raise `monitoring.grad_cosine_every`"),
    "learner/lr": Advice("follows the schedule", "0 teaches nothing: set `learner.lr` and `train.num_steps`"),
    "learner/num_rows": Advice("completions in groups with a signal", "low: see `zero_variance_fraction`"),
    "learner/num_tokens": Advice("follows the rows", "see `learner/num_rows`"),
    "learner/num_micro_batches": Advice("steady", "raise `max_tokens_per_micro_batch` if memory is left"),
    "learner/skipped_updates": Advice("0", "no group had a signal: see `zero_variance_fraction`"),
    "learner/num_restarts": Advice("absent", "read the ranks' logs; memory is the usual reason"),
    "learner/update_s": Advice("steady", _SPEED),
    "learner/score_s": Advice("steady", _SPEED),
    "learner/backward_s": Advice("one to two times the forward passes", _SPEED),
    "sft/nats/<modality>": Advice("falls, then levels off", "rises: lower `learner.lr`"),
    "sft/accuracy/<modality>": Advice("rises", "as for the nats"),
    "sft/num_targets/<modality>": Advice("steady", "check the mixture's weights"),
    "sft/num_learned/<modality>": Advice("steady", "check the mixture's weights, and `loss.targets`"),
    "sft/num_lost_targets": Advice("0", "a defect of the packing: compare `learner/packing.py`"),
    "sft/grad_norm/<modality>": Advice("both within a factor of 10", "see `loss.reduction` and the loss's weights"),
    "sft/moved_fraction": Advice(
        "most in float32, less in bfloat16 and while the rate is low", "0 is a run that learns nothing"
    ),
    "sft/repeated_fraction": Advice("0", "two sources that overlap, or rows that are there twice"),
    "sft/num_leaked": Advice("0", "take the held-out conversations out of the training data"),
    "sft/tokens_per_s": Advice("steady", "see `sft/data_wait_s` and `sft/fill_fraction`"),
    "sft/fill_fraction": Advice("above 0.9", "raise `data.max_length`"),
    "sft/data_wait_s": Advice("near 0", "more `data.encoders`, or tokens encoded beforehand"),
    "policy/ratio_mean": Advice("1 on-policy; 0.9 to 1.1 else", "fewer updates a step, a lower rate"),
    "policy/ratio_max": Advice("1 on-policy", "on-policy see `policy/logprob_gap_max`; else a lower rate"),
    "policy/ratio_min": Advice("1 on-policy", "as for the largest"),
    "policy/clip_fraction": Advice("0 on-policy; below 0.2 else", "fewer updates a step, a lower rate"),
    "policy/ratio_capped_fraction": Advice("0", "sampler and learner disagree: `unirl verify`"),
    "policy/kl": Advice("0 on-policy; below 0.05 else", "fewer updates a step, a lower rate"),
    "reward/<task>/spread": Advice("falls as prompts are solved", "0 with a low mean: see `reward/<task>`"),
    "policy/kl_update": Advice("below 0.05", "a lower `learner.lr`; go on from before with `unirl runs fork`"),
    "policy/kl_reference": Advice("rises slowly", "fast: raise `algorithm.kl_beta` or lower `learner.lr`"),
    "policy/entropy/text": Advice(
        "falls slowly", "a fall to a tenth is a collapse: lower the rate, from before it (unirl runs fork)"
    ),
    "policy/entropy/image": Advice("falls slowly", "as for text"),
    "policy/guidance_gap": Advice(
        "steady", "grows with the guidance scale: a smaller scale, or guided log-probabilities"
    ),
    "policy/rescoring_gap": Advice("below 0.1", "a smaller `algorithm.diffusion_shrink`"),
    "policy/importance_mean": Advice("0.9 to 1.1", "a lower `overlap.max_staleness`"),
    "policy/importance_capped_fraction": Advice("below 0.05", "a lower `overlap.max_staleness`, or a higher cap"),
    "policy/logprob_gap_max": Advice("below 1e-5 (2s - 1) in float32, 0.5 (2s - 1) in bfloat16", "`unirl verify`"),
    "policy/logprob_gap_max/<modality>": Advice("likewise, without 2s - 1 for text", "`unirl verify`"),
    "policy/logprob_gap/<modality>": Advice(
        "below 1e-6 (2s - 1) in float32, 0.02 (2s - 1) in bfloat16; for text without 2s - 1", "`unirl verify`"
    ),
    "fleet/<role>/tokens_per_s": Advice("steady", _SPEED),
    "fleet/<role>/images_per_s": Advice("steady", _SPEED),
    "fleet/<role>/queue_length": Advice("above 0 while sampling, 0 at its end", "long: more workers of the role"),
}
