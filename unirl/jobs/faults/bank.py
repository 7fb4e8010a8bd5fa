"""The bank: faults to plant in a run of the lab, and the clean runs in which no sentinel may speak."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from unirl.jobs.faults import fleet_faults as fleet
from unirl.jobs.faults import learning_faults as learning
from unirl.jobs.faults import reward_faults as rewards
from unirl.jobs.faults import sampling_faults as sampling
from unirl.jobs.faults import sft_faults as sft

DIFFUSION = (
    "model.family=lumina_dimoo",
    "model.path=lab:lumina_dimoo",
    "rollout.sampling.text.max_tokens=20",
    "rollout.sampling.text.diffusion_steps=2",
    "rollout.sampling.image.diffusion_steps=12",
    "algorithm.diffusion_steps_per_update=6",
)
"""Settings of the lab's masked-diffusion model."""
BFLOAT16 = ("model.dtype=bfloat16", "rollout.sampling.image.guidance_scale=5")
"""Where single tokens differ most between sampler and learner."""
TWO_WORKERS = ("rollout.text.num_workers=0", "rollout.image.num_workers=0", "rollout.both.num_workers=2")
"""Of rollouts, for a run on Ray."""
TWO_RANKS = (
    "rollout.text.num_workers=0",
    "rollout.image.num_workers=0",
    "rollout.both.num_workers=1",
    "learner.num_ranks=2",
)
"""Of the learner, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One row of the bank."""

    plant: Callable[[], AbstractContextManager[None]]
    """Its name and docstring are the fault's."""
    sentinel: str
    """Which must speak."""
    settings: tuple[str, ...] = ()
    job: Literal["train", "sft"] = "train"
    local: bool = True
    """Without Ray; False for what is wrong inside an actor."""

    @property
    def name(self) -> str:
        """As in the table."""
        return self.plant.__name__

    @property
    def what(self) -> str:
        """In one sentence."""
        return (self.plant.__doc__ or "").strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Clean:
    """A run without a fault."""

    name: str
    seed: int
    settings: tuple[str, ...] = ()
    local: bool = True
    """Without Ray; False where sampling overlaps learning."""
    job: Literal["train", "sft"] = "train"


FAULTS: tuple[Fault, ...] = (
    Fault(plant=rewards.right_whatever_is_said, sentinel="constant_reward"),
    Fault(plant=rewards.blank_canvas_scored, sentinel="constant_reward"),
    Fault(plant=rewards.score_of_the_prompt, sentinel="zero_variance"),
    Fault(
        plant=rewards.length_is_paid,
        sentinel="length_coupling",
        settings=("rollout.sampling.text.temperature=1.6",),
    ),
    Fault(plant=rewards.brightness_is_paid, sentinel="brightness_coupling"),
    Fault(plant=rewards.darkness_is_paid, sentinel="brightness_coupling"),
    Fault(plant=rewards.nan_reward, sentinel="unjudged"),
    Fault(plant=rewards.one_group_fails, sentinel="unjudged", settings=("rewards.max_unjudged_fraction=1",)),
    Fault(plant=rewards.component_lost, sentinel="missing_component"),
    Fault(plant=rewards.sign_lost, sentinel="disordered_advantages"),
    Fault(plant=rewards.off_by_one, sentinel="disordered_advantages"),
    Fault(plant=rewards.no_baseline, sentinel="disordered_advantages"),
    Fault(plant=rewards.aligned_pairs_weighed, sentinel="wrong_pair_weights"),
    Fault(plant=rewards.weight_upside_down, sentinel="wrong_pair_weights"),
    Fault(plant=sampling.update_ignored, sentinel="stale_sampler"),
    Fault(plant=sampling.half_loaded, sentinel="stale_sampler"),
    Fault(plant=sampling.weights_not_shown, sentinel="stale_sampler"),
    Fault(plant=fleet.deaf_worker, sentinel="stale_sampler", settings=TWO_WORKERS, local=False),
    Fault(plant=sampling.bit_flipped, sentinel="damaged_weights"),
    Fault(plant=sampling.wrong_model, sentinel="damaged_weights"),
    Fault(plant=sampling.hotter_sampler, sentinel="logprob_gap"),
    Fault(plant=sampling.other_guidance, sentinel="logprob_gap"),
    Fault(plant=sampling.other_guidance_of_diffusion, sentinel="logprob_gap", settings=DIFFUSION),
    Fault(plant=sampling.logprobs_forgotten, sentinel="logprob_gap"),
    Fault(plant=sampling.warmer_in_bfloat16, sentinel="logprob_gap", settings=BFLOAT16),
    Fault(plant=sampling.unguided_in_bfloat16, sentinel="logprob_gap", settings=("model.dtype=bfloat16",)),
    Fault(plant=sampling.positions_shifted_in_bfloat16, sentinel="logprob_gap", settings=BFLOAT16),
    Fault(plant=sampling.logprobs_shifted, sentinel="off_policy_ratio"),
    Fault(plant=sampling.infinite_logprob, sentinel="nonfinite"),
    Fault(plant=sampling.cold, sentinel="entropy_collapse"),
    Fault(plant=sampling.one_seed, sentinel="equal_images"),
    Fault(plant=sampling.old_rollouts, sentinel="staleness"),
    Fault(plant=sampling.rollouts_from_tomorrow, sentinel="staleness"),
    Fault(plant=sampling.pictures_not_counted, sentinel="no_gradient"),
    Fault(plant=sampling.cut_short, sentinel="truncated_failures"),
    Fault(plant=sampling.hangs, sentinel="stalled", settings=("monitoring.stall_after_s=15",)),
    Fault(plant=sampling.pixels_lost, sentinel="unread_images"),
    Fault(plant=sampling.pixels_not_embedded, sentinel="unread_images"),
    Fault(plant=sampling.codes_lost, sentinel="unread_images", settings=DIFFUSION),
    Fault(plant=sampling.picture_left_behind, sentinel="unread_images"),
    Fault(plant=sampling.same_batch_again, sentinel="repeated_pairs"),
    Fault(
        plant=sampling.evaluated_pairs,
        sentinel="evaluation_leak",
        settings=("evaluation.enabled=true", "evaluation.num_prompts=4", "evaluation.greedy=false"),
    ),
    Fault(plant=sampling.black_pictures, sentinel="blank_images"),
    Fault(plant=learning.pictures_never_learned, sentinel="no_gradient"),
    Fault(plant=learning.pictures_detached, sentinel="no_gradient"),
    Fault(plant=learning.answers_weigh_nothing, sentinel="no_gradient"),
    Fault(plant=learning.every_other_row, sentinel="lost_rows"),
    Fault(plant=learning.rows_twice, sentinel="lost_rows"),
    Fault(plant=learning.micro_batch_skipped, sentinel="lost_rows"),
    Fault(plant=learning.micro_batch_masked, sentinel="lost_rows"),
    Fault(plant=fleet.idle_rank, sentinel="lost_rows", settings=TWO_RANKS, local=False),
    Fault(plant=learning.dropout_left_on, sentinel="logprob_gap"),
    Fault(plant=learning.dropout_in_bfloat16, sentinel="logprob_gap", settings=BFLOAT16),
    Fault(plant=learning.ratio_to_something_else, sentinel="off_policy_ratio"),
    Fault(plant=learning.other_ratio_in_bfloat16, sentinel="off_policy_ratio", settings=BFLOAT16),
    Fault(plant=learning.loss_explodes, sentinel="gradient_spike"),
    Fault(plant=learning.pictures_dominate, sentinel="dominating_modality"),
    Fault(plant=learning.nan_loss, sentinel="nonfinite"),
    Fault(plant=learning.nan_metric, sentinel="nonfinite"),
    Fault(plant=learning.nan_weights, sentinel="nonfinite"),
    Fault(plant=learning.optimizer_asleep, sentinel="frozen_weights"),
    Fault(plant=learning.old_weights_published, sentinel="frozen_weights"),
    Fault(plant=learning.no_rate, sentinel="learning_rate_zero"),
    Fault(plant=learning.huge_rate, sentinel="far_kl", settings=("algorithm.updates_per_step=2",)),
    Fault(plant=learning.huge_rate_once, sentinel="fallen_reward"),
    *(Fault(plant=plant, sentinel=sentinel, job="sft") for plant, sentinel in sft.FAULTS),
)

CLEAN: tuple[Clean, ...] = (
    *(Clean(name=f"seed {seed}", seed=seed) for seed in range(4)),
    Clean(name="bfloat16, guidance 5", seed=12, settings=BFLOAT16),
    Clean(name="bfloat16, the engine", seed=13, settings=(*BFLOAT16, "rollout.backend=vllm")),
    Clean(
        name="4 completions of 12 pairs",
        seed=4,
        settings=("rollout.pairs_per_step=12", "rollout.num_understanding=4", "rollout.num_generation=4"),
    ),
    Clean(
        name="2 updates a step, KL to the initial policy",
        seed=5,
        settings=("algorithm.updates_per_step=2", "algorithm.kl_beta=0.02", "algorithm.kl_reference=initial"),
    ),
    Clean(
        name="evaluated at every third step, conditional log-probabilities",
        seed=6,
        settings=(
            "evaluation.enabled=true",
            "evaluation.every=3",
            "evaluation.num_prompts=8",
            "evaluation.greedy=false",
            "algorithm.image_logprob=conditional",
        ),
    ),
    Clean(
        name="epochs of 3 steps, one batch of both tasks",
        seed=7,
        settings=("data.max_pairs=20", "algorithm.objective=vanilla_mixed"),
    ),
    Clean(name="masked diffusion", seed=8, settings=DIFFUSION),
    Clean(name="masked diffusion, another seed", seed=9, settings=DIFFUSION),
    Clean(
        name="one step off, two workers",
        seed=10,
        local=False,
        settings=(
            *TWO_WORKERS,
            "overlap.mode=one_step_off",
        ),
    ),
    Clean(
        name="staleness up to 2, weights in flight, two workers",
        seed=11,
        local=False,
        settings=(*TWO_WORKERS, "overlap.mode=bounded_staleness", "overlap.in_flight_updates=true"),
    ),
    *(Clean(name=f"fine-tuning, {name}", seed=12 + i, settings=s, job="sft") for i, (name, s) in enumerate(sft.CLEAN)),
)
