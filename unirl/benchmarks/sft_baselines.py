"""What our fine-tuning step is compared with: plain PyTorch loops, and Hugging Face's Trainer.

All learn the same targets of the same sequences with the same AdamW. The loops know the restricted loss and spend
nothing on checks, metrics, ranks or checkpoints; the Trainer has the loss over the joint vocabulary, since it knows no
other, and pads.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from unirl.config import SftConfig
from unirl.learner.engine import ADAM_EPSILON
from unirl.learner.packing import plan_rows
from unirl.learner.sft_targets import target_mask
from unirl.models.joint_policy import JointPolicy
from unirl.models.packed_attention import document_arguments
from unirl.types import TokenSequence

IGNORED = -100
log = logging.getLogger(__name__)


def seconds_now() -> float:
    """A clock for arms that take turns: of the processor where there is no GPU, so that other processes count less."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True, slots=True)
class _Learned:
    """A sequence's ids and labels, int64 [L]; a label is the id itself, or IGNORED."""

    ids: Tensor
    labels: Tensor


def _learned(sequence: TokenSequence, config: SftConfig) -> _Learned:
    ids = torch.from_numpy(sequence.ids.astype(np.int64))
    mask = torch.from_numpy(target_mask(sequence, config.loss))
    return _Learned(ids, ids.masked_fill(~mask, IGNORED))


class PlainLoop:
    """Forward, backward, clip, AdamW, and no more."""

    def __init__(
        self, policy: JointPolicy, config: SftConfig, sequences: Sequence[TokenSequence], *, packed: bool
    ) -> None:
        """Put the policy on the GPU, if there is one.

        Args:
            policy: whose weights are trained.
            config: of the optimizer and the loss.
            sequences: learned in every step.
            packed: rows filled by `plan_rows` with our attention; else batches of like length, padded behind, which
                causal attention needs no mask for.
        """
        self._module: Any = policy.module.to("cuda" if torch.cuda.is_available() else "cpu")
        self._vocabulary, self._config = policy.layout.vocabulary, config
        self._sequences, self._packed = sequences, packed
        if not packed:
            self._module.config._attn_implementation = "sdpa"
        learner = config.learner
        self._trained = list(self._module.parameters())
        settings = {"lr": learner.lr, "betas": learner.betas, "eps": ADAM_EPSILON, "weight_decay": learner.weight_decay}
        self._optimizer = torch.optim.AdamW(self._trained, fused=self._trained[0].is_cuda, **settings)

    def step(self) -> float:
        """One optimizer step on all sequences; returns the mean loss of their targets."""
        learned = [_learned(sequence, self._config) for sequence in self._sequences]
        num_targets = sum(int((own.labels != IGNORED).sum()) for own in learned)
        total = torch.zeros((), device=self._trained[0].device)
        for batch in self._batches([len(own.ids) for own in learned]):
            loss = self._loss([learned[index] for index in batch]) / num_targets
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._trained, self._config.learner.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total.item()

    def _batches(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """Which sequences go through the network together, within the token budget, padding included."""
        budget = self._config.learner.max_tokens_per_micro_batch
        if self._packed:
            return plan_rows(lengths, max_tokens=budget, num_ranks=1, batching="packed")[0]
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            # The longest comes first.
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
                batches.append([])
            batches[-1].append(index)
        return [tuple(batch) for batch in batches]

    def _loss(self, batch: Sequence[_Learned]) -> Tensor:
        """Sum of the nats of all targets, each among the ids of its own modality."""
        device, vocabulary = self._trained[0].device, self._vocabulary
        named: dict[str, Any] = {}
        if self._packed:
            ids = torch.cat([own.ids for own in batch])[None].to(device)
            labels = torch.cat([own.labels for own in batch])[None].to(device)
            named = document_arguments([len(own.ids) for own in batch], device)
        else:
            ids = pad_sequence([own.ids for own in batch], batch_first=True).to(device)
            labels = pad_sequence([own.labels for own in batch], batch_first=True, padding_value=IGNORED).to(device)
        states = self._module.model(input_ids=ids, use_cache=False, **named).last_hidden_state
        counted = labels[:, 1:] != IGNORED
        hidden, targets = states[:, :-1][counted], labels[:, 1:][counted]
        first, end = vocabulary.first_code, vocabulary.first_code + vocabulary.num_codes
        is_code = (targets >= first) & (targets < end)
        weight, text = self._module.lm_head.weight, targets[~is_code]
        text_logits = functional.linear(hidden[~is_code], torch.cat([weight[:first], weight[end:]]))
        code_logits = functional.linear(hidden[is_code], weight[first:end])
        places = torch.where(text < first, text, text - vocabulary.num_codes)
        nats = functional.cross_entropy(text_logits.float(), places, reduction="sum")
        return nats + functional.cross_entropy(code_logits.float(), targets[is_code] - first, reduction="sum")


@dataclass(slots=True)
class Trained:
    """The steps that a Trainer made."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def trainer_is_installed() -> bool:
    """Whether the Trainer can run; it needs a package that nothing else here does."""
    found = find_spec("accelerate") is not None
    if not found:
        log.warning("Hugging Face's Trainer is left out: it needs accelerate; install it with pip install accelerate")
    return found


def run_trainer(
    policy: JointPolicy,
    config: SftConfig,
    sequences: Sequence[TokenSequence],
    steps: int,
    between: Callable[[], None],
) -> Trained:
    """So many steps of Hugging Face's Trainer on all sequences; `between` runs after each and is not timed.

    A batch holds as many sequences as fit into the token budget at the length of the longest, in the order given.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    learned = [_learned(sequence, config) for sequence in sequences]
    trained, learner = Trained(), config.learner
    nats: list[Tensor] = []

    class FullVocabularyTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
            labels = inputs["labels"][:, 1:]
            module = getattr(model, "module", model)
            masks = {"attention_mask": inputs["attention_mask"]}
            states = module.model(input_ids=inputs["input_ids"], use_cache=False, **masks).last_hidden_state
            logits = module.lm_head(states)[:, :-1].float()
            total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            loss = total / num_items_in_batch
            nats.append(loss.detach())
            return loss

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = seconds_now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            trained.seconds.append(seconds_now() - self.started)
            trained.losses.append(float(sum(nats)))
            nats.clear()
            between()
            self.started = seconds_now()

    def collate(batch: Sequence[_Learned]) -> dict[str, Tensor]:
        padded = [pad_sequence([own.ids for own in batch], batch_first=True)]
        padded += [pad_sequence([own.labels for own in batch], batch_first=True, padding_value=IGNORED)]
        mask = pad_sequence([torch.ones_like(own.ids) for own in batch], batch_first=True)
        return {"input_ids": padded[0], "labels": padded[1], "attention_mask": mask}

    fitting = max(1, learner.max_tokens_per_micro_batch // max(len(own.ids) for own in learned))
    batch_size = max(size for size in range(1, fitting + 1) if len(learned) % size == 0)
    policy.module.config._attn_implementation = "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=len(learned) // batch_size,
            learning_rate=learner.lr,
            adam_beta1=learner.betas[0],
            adam_beta2=learner.betas[1],
            weight_decay=learner.weight_decay,
            max_grad_norm=learner.max_grad_norm,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        dataset: Any = learned * steps
        trainer = FullVocabularyTrainer(
            model=policy.module, args=arguments, train_dataset=dataset, data_collator=collate, callbacks=[Turns()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trained
