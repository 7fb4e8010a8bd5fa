"""Tiny random checkpoints of the joint-vocabulary families, in the layout and under the names of the public ones."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForCausalLM,
    Emu3ForConditionalGeneration,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedTokenizerFast,
)

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return write_model(folder, ChameleonForConditionalGeneration(config), dtype)


def visual_token(code):
    return f"<|visual token {code:06d}|>"


def write_emu3(folder, *, num_codes=16, layers=2, hidden=64, head_dim=16, dtype=torch.float32, native=False):
    """Emu3's layout: text, marks and then codes; as published, or as transformers converts it."""
    folder.mkdir(parents=True, exist_ok=True)
    special = [f"<|extra_{number}|>" for number in (0, 200, 201, 203, 204)]
    special = ["<|endoftext|>", *special, "<|image token|>", "<|image start|>", "<|image end|>"]
    special += map(visual_token, range(num_codes))
    ids = write_byte_tokenizer(
        folder, [], special, bos_token="<|extra_203|>", eos_token="<|extra_204|>", pad_token="<|endoftext|>"
    )
    sizes = dict(
        vocab_size=len(ids), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // head_dim, num_key_value_heads=hidden // head_dim // 2,
        max_position_embeddings=512,
        pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|extra_203|>"], eos_token_id=ids["<|extra_204|>"],
    )  # fmt: skip
    text = Emu3TextConfig(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not native:
            write_model(folder, Emu3ForCausalLM(text), dtype)
            facts = sizes | {"attention_dropout": 0.1, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
            facts |= {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], "torch_dtype": "float32"}
            facts |= {"auto_map": {"AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"}, "image_area": 518400}
            (folder / "config.json").write_text(json.dumps(facts))
            return folder
        vq = Emu3VQVAEConfig(
            codebook_size=num_codes, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
            attn_resolutions=[1], hidden_size=32,
        )  # fmt: skip
        vocabulary_map = ids | {"<image>": ids["<|extra_0|>"]}
        config = Emu3Config(text_config=text, vq_config=vq, vocabulary_map=vocabulary_map, tie_word_embeddings=False)
        return write_model(folder, Emu3ForConditionalGeneration(config), dtype)


def write_liquid(folder, *, num_codes=16, layers=2, hidden=64, head_dim=16, dtype=torch.float32, tied=False):
    """Liquid's layout: Gemma's specials first, text, and codes that the tokenizer does not know."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<boi>", "<eoi>", "<unconditional>"]
    special += ["<start_of_turn>", "<end_of_turn>"]
    ids = write_byte_tokenizer(
        folder, special, [], bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    config = GemmaConfig(
        vocab_size=len(ids) + num_codes, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=head_dim, max_position_embeddings=512,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return write_model(folder, GemmaForCausalLM(config), dtype)


def write_byte_tokenizer(folder, before, behind, **names):
    """A tokenizer whose words are single bytes, special tokens before and behind them; returns the id of each token."""
    tokens = [*before, *sorted(pre_tokenizers.ByteLevel.alphabet()), *behind]
    ids = {token: id for id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(ids, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": [*before, *behind]})
    tokenizer.save_pretrained(folder)
    return ids


def write_model(folder, model, dtype):
    """The model with weights large enough to tell its logits apart."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "vqmodel" not in name and value.ndim > 1 and "norm" not in name:
                value.normal_(std=0.08)
    model.config.save_pretrained(folder)
    state = {name: value.contiguous() for name, value in model.to(dtype).state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_config(folder):
    return json.loads((folder / "config.json").read_text())
