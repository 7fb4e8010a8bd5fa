"""Keeps text requests to text ids and image requests to image codes inside one vLLM engine."""

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

MODALITIES = ("text", "image")


class ModalityMask(LogitsProcessor):
    """Masks each row by the modality that its request names in `extra_args`.

    The model's configuration gives `vocab_size` (text and codes), `first_code`, `num_codes` and `forbidden_text_ids`.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request that does not say what it samples.

        Raises:
            ValueError: `extra_args["modality"]` is absent or unknown.
        """
        modality = (sampling_params.extra_args or {}).get("modality")
        if modality not in MODALITIES:
            raise ValueError(f"request: expected extra_args['modality'] in {MODALITIES}; got {modality!r}; name it")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        config = vllm_config.model_config.hf_config
        self._forbidden = torch.zeros(len(MODALITIES), config.vocab_size, dtype=torch.bool)
        codes = slice(config.first_code, config.first_code + config.num_codes)
        self._forbidden[0, config.forbidden_text_ids] = True
        self._forbidden[0, codes] = True
        self._forbidden[1] = True
        self._forbidden[1, codes] = False
        self._forbidden = self._forbidden.to(device)
        self._rows = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.long)
        self._device = device
        self._rows_on_device = self._rows.to(device)

    def is_argmax_invariant(self) -> bool:
        """No: it decides what a greedy token may be."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they enter, leave and change rows."""
        if batch_update is None:
            return
        for row, params, _, _ in batch_update.added:
            self._rows[row] = MODALITIES.index((params.extra_args or {})["modality"])
        for source, target, direction in batch_update.moved:
            moved = int(self._rows[source])
            if direction == MoveDirectionality.SWAP:
                self._rows[source] = self._rows[target]
            self._rows[target] = moved
        self._rows_on_device = self._rows.to(self._device)

    def apply(self, logits: Tensor) -> Tensor:
        """The logits [B, V] with -inf on what each row may not draw."""
        forbidden = self._forbidden[self._rows_on_device[: len(logits)]]
        return logits.masked_fill_(forbidden, -torch.inf)
