"""A checkpoint of any family as the lab examines it: through the samplers that a run uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unirl.config import ModelConfig, RolloutConfig, SamplingConfig
from unirl.lab.lab_model import SamplingPlan
from unirl.lab.tokenizer import EOS
from unirl.lab.world import Question
from unirl.rollout.build import build_sampler
from unirl.rollout.sampler import Sampler
from unirl.rollout.seeds import sample_seed
from unirl.types import GenerationSample, RolloutRequest, Task, Trajectory, UnderstandingSample


@dataclass(frozen=True, slots=True)
class SampledModel:
    """Draws and answers as a `LabModel` does."""

    sampler: Sampler
    sampling: SamplingConfig

    @classmethod
    def load(cls, model: ModelConfig, path: Path, sampling: SamplingConfig) -> "SampledModel":
        """The checkpoint folder's model in this process."""
        sampler = build_sampler(model, path, RolloutConfig(backend="torch", sampling=sampling), "both")
        return cls(sampler, sampling)

    def draw(self, captions: Sequence[str], plan: SamplingPlan) -> NDArray[np.uint8]:
        """Pictures [N, 20, 20, 3], one per caption."""
        samples = [GenerationSample(id=str(index), prompt=caption) for index, caption in enumerate(captions)]
        drawn = (trajectory.image for trajectory in self._sample(samples, "generation", plan))
        return np.stack([image for image in drawn if image is not None])

    def answer(self, images: NDArray[np.uint8], questions: Sequence[Question], plan: SamplingPlan) -> list[str]:
        """Answer texts; one that was ended, not cut off, ends in the lab's end token whatever the family's."""
        samples = [
            UnderstandingSample(id=str(index), image=image, question=q.text, choices=q.choices, answer=q.letter)
            for index, (image, q) in enumerate(zip(images, questions, strict=True))
        ]
        texts = []
        for trajectory in self._sample(samples, "understanding", plan):
            text = str(trajectory.text).removesuffix(EOS).strip()
            texts.append(f"{text} {EOS}" if trajectory.finish_reason == "stop" else text)
        return texts

    def _sample(
        self, samples: Sequence[UnderstandingSample | GenerationSample], task: Task, plan: SamplingPlan
    ) -> list[Trajectory]:
        text, image = self.sampling.text, replace(self.sampling.image, guidance_scale=plan.guidance)
        if plan.greedy:
            text, image = replace(text, temperature=0.0), replace(image, temperature=0.0)
        requests = [
            RolloutRequest(
                request_id=sample.id,
                pair_id=sample.id,
                task=task,
                sample=sample,
                seeds=(sample_seed(plan.seed, 0, sample.id, task, 0),),
            )
            for sample in samples
        ]
        groups = self.sampler.sample(requests, SamplingConfig(text=text, image=image))
        return [group.trajectories[0] for group in groups]
