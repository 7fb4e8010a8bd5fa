"""The loop with which unified models are commonly sampled: what our engine is compared with.

As the papers describe it: every picture is two rows of a batch, prompt and null prompt; transformers' cache grows by
concatenation; each step runs the trunk on one new position of all rows, mixes the two rows' logits, takes a softmax and
draws by `torch.multinomial`.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from unirl.models.janus_pro import JanusPro


@torch.inference_mode()
def draw_pictures(policy: JanusPro, prompts: Tensor, *, guidance_scale: float, num_codes: int) -> Tensor:
    """Image codes int64 [B, num_codes] of prompts int64 [B, P], all of one length, so that no mask is needed.

    Args:
        policy: whose module is run.
        prompts: begin of text first, begin of image last.
        guidance_scale: classifier-free guidance s.
        num_codes: codes of a picture that are drawn.
    """
    trunk: Any = policy.module.model.language_model
    rows = prompts.repeat_interleave(2, dim=0)
    rows[1::2, 1:-1] = policy.prompts.ids.pad
    embeddings = trunk.embed_tokens(rows)
    cache = DynamicCache()
    codes = torch.empty(len(prompts), num_codes, dtype=torch.long, device=prompts.device)
    for index in range(num_codes):
        hidden = trunk(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state
        logits = policy.code_logits(hidden[:, -1])
        conditional, unconditional = logits[0::2], logits[1::2]
        mixed = unconditional + guidance_scale * (conditional - unconditional)
        drawn = torch.multinomial(torch.softmax(mixed, dim=-1), num_samples=1)
        codes[:, index] = drawn[:, 0]
        embeddings = policy.embed_codes(drawn.repeat_interleave(2, dim=0))
    return codes


def decode_pictures(policy: JanusPro, codes: Tensor) -> list[NDArray]:
    """Pictures uint8 [H, W, 3] of image codes [B, N], as our sampler decodes them."""
    return policy.decode_images(list(codes.int().cpu().numpy()))
