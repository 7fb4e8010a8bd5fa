"""transformers' own model of each family, and where a family's two modalities have weights of their own."""

import numpy as np
import torch
from transformers import (
    ChameleonForConditionalGeneration,
    Emu3ForCausalLM,
    Emu3ForConditionalGeneration,
    GemmaForCausalLM,
    JanusForConditionalGeneration,
    JanusImageProcessor,
)

THEIRS = {
    "anole": ChameleonForConditionalGeneration,
    "emu3": Emu3ForCausalLM,
    "emu3 native": Emu3ForConditionalGeneration,
    "liquid": GemmaForCausalLM,
    "liquid tied": GemmaForCausalLM,
    "janus_pro": JanusForConditionalGeneration,
}


def rounding(case):
    """Largest difference of equal states; the test's Janus-Pro has weights some ten times as large as the others'."""
    return 5e-6 if case == "janus_pro" else 1e-6


def their_model(case, folder):
    model, report = THEIRS[case].from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.no_grad()
def their_states(model, sequence):
    """Last hidden states [L, H] of one sequence alone, by transformers' own modules."""
    ids = torch.from_numpy(sequence.ids).long()[None]
    if not isinstance(model, JanusForConditionalGeneration):
        return getattr(model.model, "text_model", model.model)(input_ids=ids).last_hidden_state[0]
    first_code = model.config.text_config.vocab_size
    embedded = model.get_input_embeddings()(ids.clamp(max=first_code - 1))
    codes = ids[ids >= first_code] - first_code
    embedded[ids >= first_code] = model.prepare_embeddings_for_image_generation(codes)
    if sequence.pixels:
        pixels = [their_pixels(image) for image in sequence.pixels]
        features = model.model.get_image_features(torch.cat(pixels), return_dict=True).pooler_output
        embedded[ids == model.config.image_token_id] = features.flatten(0, 1)
    return model.model.language_model(inputs_embeds=embedded).last_hidden_state[0]


def their_pixels(image):
    processor = JanusImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 8, "width": 8}, min_size=1
    )
    return processor([image], input_data_format="channels_last", return_tensors="pt").pixel_values


def head_rows(policy, part):
    """What only this modality's logits read: a list of tensors of which gradients are taken, and their rows."""
    vocabulary = policy.layout.vocabulary
    if policy.layout.sees_pixels:
        head = policy.module.lm_head if part == "text" else policy.module.model.generation_head.vision_head
        return head.weight, np.arange(len(head.weight))
    return policy.module.lm_head.weight, np.flatnonzero(vocabulary.is_code == (part == "image"))
