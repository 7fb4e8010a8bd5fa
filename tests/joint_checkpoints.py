"""Tiny random checkpoints of the joint-vocabulary families, in the layout and under the names of the public ones."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerFast

WORDS = ("draw", "a", "red", "green", "circle", "square", "what", "color", "is", "it", "?", "here", ":", ".", "and")


def write_tokenizer(folder, vocabulary, special, **names):
    """A word-level tokenizer with these ids, saved as the public ones are."""
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)


def code_name(code):
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def write_anole(folder, *, num_codes=16, layers=2, hidden=64, seed=0, dtype=torch.float32):
    """Anole's layout: codes from id 4, eoss and break behind them, the language model and an image tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["<s>", "<pad>", "</s>", "<unk>", *map(code_name, range(num_codes)), "<eoss>", "<racm3:break>"]
    names += ["<reserved08706>", "<reserved08707>", *WORDS]
    special = [name for name in names if name not in WORDS]
    write_tokenizer(
        folder, {name: id for id, name in enumerate(names)}, special,
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    config = ChameleonConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=512,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, tie_word_embeddings=False,
        vocabulary_map={name: id for id, name in enumerate(names)} | {"<image>": names.index("<reserved08707>")},
        vq_config={
            "embed_dim": 8, "num_embeddings": num_codes, "latent_channels": 8, "resolution": 16, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = ChameleonForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "vqmodel" not in name and value.ndim > 1 and "norm" not in name:
                value.normal_(std=0.08)
    config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def read_config(folder):
    return json.loads((folder / "config.json").read_text())
