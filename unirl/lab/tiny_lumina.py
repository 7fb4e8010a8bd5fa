"""The lab's tiny Lumina-DiMOO: LLaDA's network, diffusers' VQModel, a word-level tokenizer, and their folder.

Image codes are the last ids of the one vocabulary, as in the published model; every special token has a string, which
tokenizer_config.json names by role.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from unirl.lab.checkpoint_folder import write_folder
from unirl.lab.tokenizer import WORDS
from unirl.lab.world import CODE_DIM, IMAGE_PX, NUM_CODES
from unirl.models.checkpoint import write_weights
from unirl.models.llada import LladaConfig, LladaForDiffusion
from unirl.models.lumina_prompts import PUBLIC_IDS, TAGS
from unirl.models.lumina_vq import FOLDER, WEIGHTS

HIDDEN = 96
ROLES = {role: "<|code|>" if role == "first_code" else f"<|{role}|>" for role in PUBLIC_IDS}
"""Strings of the special tokens; only the first image code has one."""
NUM_TEXT_IDS = 80
"""Ids before the image codes, more than there are words; the spare ones must never be sampled."""
ANSWER_CELLS = 20


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: splits at blanks and special strings, adds nothing."""
    special = [text for role, text in ROLES.items() if role != "first_code"]
    vocabulary = {token: index for index, token in enumerate((*special, *TAGS, *WORDS))}
    vocabulary[ROLES["first_code"]] = NUM_TEXT_IDS
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[*special, *TAGS, ROLES["first_code"]],
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(seed: int) -> LladaForDiffusion:
    """0.5 M parameters with random weights: 4 layers of width 96, heads of 32; the torch generator stays as it was."""
    config = LladaConfig(
        d_model=HIDDEN,
        n_heads=3,
        n_layers=4,
        mlp_hidden_size=3 * HIDDEN,
        vocab_size=NUM_TEXT_IDS + NUM_CODES,
        max_sequence_length=128,
        rope_theta=10_000.0,
        weight_tying=True,
        init_std=0.06,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LladaForDiffusion(config).float().eval()


def make_vq(seed: int) -> Any:
    """A VQModel of the published kind with random weights, for squares of 4 x 4 pixels."""
    from diffusers.models.autoencoders.vq_model import VQModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vq: Any = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            latent_channels=CODE_DIM,
            sample_size=IMAGE_PX,
            num_vq_embeddings=NUM_CODES,
            norm_num_groups=4,
            vq_embed_dim=CODE_DIM,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
    return vq.eval()


def write_checkpoint(model: LladaForDiffusion, vq: nn.Module, path: Path, facts: dict[str, Any] | None = None) -> None:
    """Write the published layout whole or not at all: float16 weights, config, tokenizer, vqvae, facts in lab.json.

    Raises:
        ValueError: `path` is there and is not a checkpoint folder.
    """
    write_folder(path, lambda folder: _write_files(model, copy.deepcopy(vq), folder), facts)


def _write_files(model: LladaForDiffusion, vq: Any, folder: Path) -> None:
    make_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    own = {"token_roles": ROLES, "system_prompt": "", "choice_template": "{letter} {choice}"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own, indent=2) + "\n")
    side, area = IMAGE_PX, IMAGE_PX * IMAGE_PX
    sizes = {"drawn": [side, side], "min_area": area, "max_area": area}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes, indent=2) + "\n")
    config = copy.deepcopy(model.config)
    config.dtype = torch.float16
    config.save_pretrained(folder)
    state = model.state_dict()
    write_weights(folder, {name: state[name].half() for name in state.keys() - model.all_tied_weights_keys.keys()})
    vq.half().save_pretrained(folder / FOLDER, safe_serialization=True)
    (folder / FOLDER / WEIGHTS).chmod(0o644)  # the library leaves it readable by its owner only
