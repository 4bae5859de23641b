"""The language model: a Hugging Face checkpoint read by hand, in plain PyTorch.

The other chapters need four things of a language model, and this file is those four:

  read and write   safetensors, config.json and tokenizer.json of a Hugging Face checkpoint
  Decoder          Qwen2 (so Qwen2.5 and R1-Distill), Qwen3 and Llama; Encoder: the BERT family
  generate         samples G completions of each of P prompts, with a key-value cache
  token_logprobs   the log-probability of every completion token, with gradient

The last two are twins: both run each prompt ONCE and let its G completions attend to the prompt's keys
and values. A retrieval prompt is long and GRPO asks it G times, so this is where the speed comes from.
What a token may look at is the only thing that differs between a plain forward pass, the prompt, a
sampling step and a training step; so `Decoder.run` is one loop over the layers, and each of the four
hands it its own `attend` function.

Left out: sliding windows, rope types other than llama3, quantised weights, top-k and top-p (GRPO needs
the probability of what was sampled, and a cut distribution is not the one that is trained).

    python prlm.py --model toy/policy --prompt "Generate a title for (sport) tennis in paris"

Shapes: P prompts, G completions a prompt, B batch, T tokens, C completion tokens, V vocabulary,
H hidden size, D head size, K key-value heads, R query heads that share one key-value head.
"""

import argparse
import dataclasses
import inspect
import json
import math
import mmap
import os
import re
import sys
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------
# Files: never half-written, never trusted
# ---------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    A reader, or a run that is killed, sees the old file or the new one, never a part of one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path, kind: type = dict):
    """The JSON of a file whose top level is a `kind`. Raises ValueError that names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); is it a complete download?") from None
    if not isinstance(value, kind):
        names = {dict: "object", list: "list"}
        raise ValueError(f"{path}: the top level is not a JSON {names[kind]}")
    return value


_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32,
    "F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def _unique_keys(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice in the header")
    return dict(pairs)


def read_safetensors(path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, memory-mapped: a page is read when it is first touched.

    Format: 8 bytes little-endian header length; a JSON header {name: {dtype, shape, data_offsets}};
    the bytes. The ranges must tile the byte buffer exactly: no hole, no overlap, nothing after it.
    Writing to a returned tensor does not change the file. Raises ValueError that names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start > min(size, 8 + 100_000_000):
                raise ValueError("the file ends before its header does; is it a complete download?")
            header = json.loads(
                file.read(start - 8).decode("utf-8"), object_pairs_hook=_unique_keys
            )
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        return _tensors_of(header, data, start)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None


def _tensors_of(header: dict, data, start: int) -> dict[str, Tensor]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not a map of strings")
    ranges, tensors = [], {}
    for name, entry in header.items():
        dtype, shape, offsets = (
            entry.get(key) if isinstance(entry, dict) else None
            for key in ("dtype", "shape", "data_offsets")
        )
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{name}: unknown dtype {dtype!r}")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
                raise ValueError(f"{name}: shape and data_offsets must be lists of numbers >= 0")
        wanted = math.prod(shape) * _DTYPES[dtype].itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != wanted:
            raise ValueError(f"{name}: data_offsets {offsets} do not hold {dtype} {shape}")
        ranges.append((*offsets, name))
    end = 0
    for begin, stop, name in sorted(ranges):
        if begin != end:
            raise ValueError(f"{name}: its bytes start at {begin}, not at {end} where they must")
        end = stop
    if start + end != len(data):
        raise ValueError(f"the tensors fill {end} bytes, but {len(data) - start} follow the header")
    for begin, stop, name in ranges:
        dtype, shape = _DTYPES[header[name]["dtype"]], header[name]["shape"]
        if begin == stop:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        raw = torch.frombuffer(data, dtype=torch.uint8, count=stop - begin, offset=start + begin)
        if (start + begin) % dtype.itemsize:  # the format does not promise alignment
            raw = raw.clone()
        tensors[name] = raw.view(dtype).view(shape)
    return tensors


def write_safetensors(
    path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes `tensors` (any strides, any device) as one .safetensors file, atomically."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    metadata = {"format": "pt"} if metadata is None else metadata
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"{path}: metadata must map strings to strings")
    header, offset = {"__metadata__": metadata}, 0
    order = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # keeps alignment
    for name in order:
        tensor = tensors[name]
        if name in header or tensor.dtype not in names:
            raise ValueError(f"{path}: cannot write a tensor named {name!r} of {tensor.dtype}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy())


def read_checkpoint(directory) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory: `model.safetensors`, or the shards its index names."""
    directory = Path(directory)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if not index.is_file():
        if list(directory.glob("pytorch_model*.bin")):
            raise ValueError(
                f"{directory}: only a pickled pytorch_model.bin, which is not opened here; "
                "save the model with save_pretrained(..., safe_serialization=True) first"
            )
        raise FileNotFoundError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json"
        )
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{index}: no weight_map from names to files")
    tensors = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise ValueError(f"{index}: shard {shard!r} is not a plain file name")
        found = read_safetensors(directory / shard)
        wanted = {name for name, file in where.items() if file == shard}
        if wanted != found.keys():
            odd = sorted(wanted ^ found.keys())[:3]
            raise ValueError(f"{directory / shard}: differs from the index on {', '.join(odd)}")
        tensors |= found
    return tensors


def fill(views: dict[str, Tensor], tensors: dict[str, Tensor], directory) -> None:
    """Copies each checkpoint tensor into the view of its name; every name must match exactly once."""
    missing, left = sorted(views.keys() - tensors.keys()), sorted(tensors.keys() - views.keys())
    for problem, names in (("lacks", missing), ("has weights this model has no place for:", left)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{directory}: the checkpoint {problem} {', '.join(names[:3])}{more}")
    for name, view in views.items():
        tensor = tensors[name]
        if tensor.shape != view.shape or not tensor.is_floating_point():
            kind = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(
                f"{directory}: {name} is {kind}, config.json asks for {list(view.shape)}"
            )
        view.copy_(tensor)


# ---------------------------------------------------------------------------------------------------
# The decoder
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The numbers of a decoder's config.json that its forward pass needs."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    tied: bool  # the output head is the embedding matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # Qwen3: RMSNorm on each head's query and key
    rope_theta: float
    rope_scaling: dict | None  # llama3's four numbers

    @classmethod
    def parse(cls, raw: dict, where="config.json") -> "Config":
        """Reads Hugging Face's dictionary, old (`rope_theta`) or new (`rope_parameters`) layout."""

        def number(key, default=None):
            value = default if raw.get(key) is None else raw[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{where}: {key!r} must be a number > 0, not {value!r}")
            return value

        kind = raw.get("model_type")
        if kind not in ("qwen2", "qwen3", "llama"):
            raise ValueError(f"{where}: model_type {kind!r} is none of qwen2, qwen3, llama")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{where}: hidden_act {raw['hidden_act']!r} is not silu")
        layer_types = set(raw.get("layer_types") or ["full_attention"])
        if layer_types != {"full_attention"} or (
            raw.get("use_sliding_window")
            and raw.get("max_window_layers", 0) < raw.get("num_hidden_layers", 0)
        ):
            raise ValueError(f"{where}: sliding-window attention is not implemented")
        rope = raw.get("rope_parameters") or {}
        scaling = rope or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict) or not isinstance(scaling, dict):
            raise ValueError(f"{where}: rope_parameters and rope_scaling must be objects")
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(
                f"{where}: rope type {rope_type!r} is not implemented (default, llama3)"
            )
        if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1:
            raise ValueError(f"{where}: partial rotary embeddings are not implemented")
        theta = rope.get("rope_theta", raw.get("rope_theta"))
        if not isinstance(theta, int | float) or not theta > 0:
            raise ValueError(f"{where}: no rope_theta, neither at the top nor in rope_parameters")
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if rope_type == "llama3" and not all(isinstance(scaling.get(k), int | float) for k in keys):
            raise ValueError(f"{where}: llama3 rope scaling needs {', '.join(keys)}")
        heads, hidden = int(number("num_attention_heads")), int(number("hidden_size"))
        config = cls(
            vocab_size=int(number("vocab_size")),
            hidden=hidden,
            intermediate=int(number("intermediate_size")),
            layers=int(number("num_hidden_layers")),
            heads=heads,
            kv_heads=int(number("num_key_value_heads", heads)),
            head_dim=int(number("head_dim", 128 if kind == "qwen3" else hidden // heads)),
            eps=float(number("rms_norm_eps", 1e-6)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bool(raw.get("attention_bias")),
            o_bias=kind != "qwen2" and bool(raw.get("attention_bias")),
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias")),
            qk_norm=kind == "qwen3",
            rope_theta=float(theta),
            rope_scaling=scaling if rope_type == "llama3" else None,
        )
        if config.heads % config.kv_heads or config.head_dim % 2:
            raise ValueError(f"{where}: heads must be a multiple of key-value heads, head_dim even")
        return config


def rope_frequencies(config: Config) -> Tensor:
    """Radians a position for each pair of a head's channels: theta^(-2i/D), i < D/2. [D/2]

    llama3 scaling divides the slow ones (wavelength over original / low_freq_factor) by `factor`,
    keeps the fast ones, and blends linearly between.
    """
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling:
        s = config.rope_scaling
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 = fast, as it is; 0 = slow, divided
        frequencies = keep * frequencies + (1 - keep) * frequencies / s["factor"]
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, Hugging Face's half-split layout: channel i turns with channel i + D/2.

    `sin` carries the rotation's signs (minus for the first half), so a roll does the exchange.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for [B, T, heads, D] inputs; without a mask it is causal."""
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))  # [B, heads, T, D]
    shared = queries.shape[1] != keys.shape[1]
    mask = None if mask is None else mask[:, None]  # [B, 1, T, keys]
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=shared
    )
    return out.transpose(1, 2)


class Layer(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + down(silu(gate) * up).

    q, k, v stand in one matrix and so do gate and up: fewer, larger products are faster.
    """

    def __init__(self, config: Config):
        super().__init__()
        c, self.config = config, config
        heads = (c.heads + 2 * c.kv_heads) * c.head_dim
        self.attention_norm = nn.RMSNorm(c.hidden, c.eps)
        self.qkv = nn.Linear(c.hidden, heads, c.qkv_bias)
        self.o = nn.Linear(c.heads * c.head_dim, c.hidden, c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim, c.eps), nn.RMSNorm(c.head_dim, c.eps)
        self.mlp_norm = nn.RMSNorm(c.hidden, c.eps)
        self.gate_up = nn.Linear(c.hidden, 2 * c.intermediate, c.mlp_bias)
        self.down = nn.Linear(c.intermediate, c.hidden, c.mlp_bias)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        c = self.config
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (-1, c.head_dim))
        queries, keys, values = qkv.split([c.heads, c.kv_heads, c.kv_heads], -2)  # [..., heads, D]
        if c.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        hidden = hidden + self.o(attend(queries, keys, values).flatten(-2))  # [..., H]
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, -1)
        return hidden + self.down(F.silu(gate) * up)

    def views(self) -> dict[str, Tensor]:
        """Hugging Face's weight names and the part of this layer's parameters that each stands for."""
        c = self.config
        rows = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        views = {"input_layernorm.weight": self.attention_norm.weight}
        views["post_attention_layernorm.weight"] = self.mlp_norm.weight
        if c.qk_norm:
            views["self_attn.q_norm.weight"] = self.q_norm.weight
            views["self_attn.k_norm.weight"] = self.k_norm.weight
        for module, names, sizes in (
            (self.qkv, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], rows),
            (self.o, ["self_attn.o_proj"], [c.hidden]),
            (self.gate_up, ["mlp.gate_proj", "mlp.up_proj"], [c.intermediate] * 2),
            (self.down, ["mlp.down_proj"], [c.hidden]),
        ):
            for kind, parameter in module.named_parameters():  # weight, and bias where there is one
                views |= {
                    f"{n}.{kind}": part
                    for n, part in zip(names, parameter.split(sizes), strict=True)
                }
        return views


class Decoder(nn.Module):
    """A causal language model. `raw` is the checkpoint's config.json; weights start random."""

    def __init__(self, raw: dict, where="config.json"):
        super().__init__()
        self.raw, self.config = raw, Config.parse(raw, where)
        self.vocab_limit = self.config.vocab_size  # ids from here on exist in the matrix only
        self.embed = nn.Embedding(self.config.vocab_size, self.config.hidden)
        self.layers = nn.ModuleList(Layer(self.config) for _ in range(self.config.layers))
        self.norm = nn.RMSNorm(self.config.hidden, self.config.eps)
        self.lm_head = None
        if not self.config.tied:
            self.lm_head = nn.Linear(self.config.hidden, self.config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.frequencies = rope_frequencies(self.config)

    @property
    def head(self) -> Tensor:
        """The output matrix [V, H]."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin of positions [...], as [..., 1, D] in the weights' precision."""
        angles = positions[..., None, None] * self.frequencies.to(positions.device)  # [..., 1, D/2]
        cos, sin = angles.cos(), angles.sin()
        dtype = self.norm.weight.dtype
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)

    def run(self, tokens: Tensor, positions: Tensor, attend) -> Tensor:
        """Final hidden states [..., H] of tokens [...]; `attend(layer, q, k, v)` decides who sees whom."""
        hidden = self.embed(tokens)
        cos, sin = self.rotary(positions)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, cos, sin, lambda q, k, v, n=number: attend(n, q, k, v))
        return self.norm(hidden)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; mask [B, T] is 0 at padding, on either side."""
        _, length = tokens.shape
        if mask is None:
            positions = torch.arange(length, device=tokens.device).expand_as(tokens)
            visible = None
        else:
            mask = mask.bool()
            tokens = tokens.masked_fill(~mask, 0)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
            itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
            visible = causal & mask[:, None, :] | itself  # padding sees itself: softmax needs a key
        hidden = self.run(tokens, positions, lambda _, q, k, v: attention(q, k, v, visible))
        return F.linear(hidden, self.head)

    def views(self) -> dict[str, Tensor]:
        """Hugging Face's weight names, each with the part of our parameters that holds it."""
        views = {
            "model.embed_tokens.weight": self.embed.weight,
            "model.norm.weight": self.norm.weight,
        }
        if self.lm_head is not None:
            views["lm_head.weight"] = self.lm_head.weight
        for n, layer in enumerate(self.layers):
            views |= {f"model.layers.{n}.{name}": part for name, part in layer.views().items()}
        return {name: view.detach() for name, view in views.items()}


def _empty(make, device, dtype) -> nn.Module:
    """Builds a module whose weights are about to be read: allocated once, never initialised."""
    with torch.device("meta"):
        module = make()
    return module.to(dtype).to_empty(device=device).eval()


def load_decoder(directory, device="cpu", dtype=torch.float32) -> Decoder:
    """A Qwen2, Qwen3 or Llama checkpoint. Any weight missing, left over or misshapen is a ValueError."""
    directory = Path(directory)
    raw = read_json(directory / "config.json")
    decoder = _empty(lambda: Decoder(raw, directory / "config.json"), device, dtype)
    tensors = {}
    for name, tensor in read_checkpoint(directory).items():
        if name.endswith("rotary_emb.inv_freq"):  # a buffer of old exports, computed here
            continue
        if not name.startswith(("model.", "lm_head.")):  # base-model exports lack the prefix
            name = "model." + name
        tensors[name] = tensor
    head = tensors.pop("lm_head.weight", None) if decoder.config.tied else None
    fill(decoder.views(), tensors, directory)
    if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
        raise ValueError(
            f"{directory}: config.json ties lm_head to the embedding, but the two differ"
        )
    if (directory / "tokenizer.json").is_file():
        decoder.vocab_limit = load_tokenizer(directory).size
        if decoder.vocab_limit > decoder.config.vocab_size:
            raise ValueError(
                f"{directory}: tokenizer.json has ids up to {decoder.vocab_limit - 1}, "
                f"the model only {decoder.config.vocab_size} of them"
            )
    return decoder


def save_decoder(decoder: Decoder, tokenizer: "Tokenizer", directory) -> None:
    """Writes a checkpoint that transformers opens unchanged, in the parameters' precision."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        write_text(directory / name, content)
    raw = dict(decoder.raw)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(decoder.norm.weight.dtype).removeprefix(
        "torch."
    )
    write_json(directory / "config.json", raw)
    write_safetensors(directory / "model.safetensors", decoder.views())


# ---------------------------------------------------------------------------------------------------
# The twins: sampling and training on a prompt that is run once
# ---------------------------------------------------------------------------------------------------


class Ragged:
    """Unequal sequences laid end to end, N tokens in all: no layer but attention computes on padding.

    >>> rows = Ragged([[5, 6, 7], [8]])
    >>> rows.tokens.tolist(), rows.positions.tolist(), rows.grid(rows.tokens).tolist()
    ([5, 6, 7, 8], [0, 1, 2, 0], [[5, 6, 7], [8, 0, 0]])
    """

    def __init__(self, sequences: list[list[int]], device="cpu"):
        lengths = torch.tensor([len(s) for s in sequences])
        self.shape = (len(sequences), max(map(len, sequences), default=0))
        steps = torch.arange(self.shape[1])
        self.mask = (steps < lengths[:, None]).to(device)  # [rows, T]
        self.lengths = lengths.to(device)
        self.cells = self.mask.flatten().nonzero()[:, 0]  # [N] where each token stands in the grid
        self.positions = self.cells % max(self.shape[1], 1)
        self.tokens = torch.tensor(
            [t for s in sequences for t in s], dtype=torch.long, device=device
        )

    def grid(self, x: Tensor) -> Tensor:
        """[N, ...] to [rows, T, ...], zeros behind each row's end."""
        rows, length = self.shape
        return (
            x.new_zeros(rows * length, *x.shape[1:])
            .index_copy(0, self.cells, x)
            .unflatten(0, self.shape)
        )

    def flat(self, grid: Tensor) -> Tensor:
        """[rows, T, ...] back to [N, ...]."""
        return grid.flatten(0, 1).index_select(0, self.cells)


@dataclass
class Completion:
    """One sampled answer: its ids (the end-of-sequence id too), their log-probabilities, and
    `finished`: whether it ended by itself and not at max_new_tokens."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def _check_ids(decoder: Decoder, prompts: list[list[int]], completions=()) -> None:
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    for ids in (*prompts, *(c for group in completions for c in group)):
        if ids and not 0 <= min(ids) <= max(ids) < decoder.config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{decoder.config.vocab_size - 1}")


class Cache:
    """Keys and values while sampling: each prompt's once for its group, the completions' per row.

    Rows lie [P, K, G]: the G·R queries of a group that share a key-value head meet the prompt's keys in
    one matrix product. A cache that repeats the prompt for each row would read it G times.
    """

    def __init__(self, decoder: Decoder, prompts: Ragged, group_size: int, max_new_tokens: int):
        c, (groups, _) = decoder.config, prompts.shape
        self.prompts, self.filled, self.scale = prompts, 0, c.head_dim**-0.5
        like = decoder.norm.weight
        hide = like.new_zeros(prompts.mask.shape).masked_fill(~prompts.mask, -math.inf)
        self.hide = hide[:, None, None].expand(-1, c.kv_heads, -1, -1)  # [P, K, 1, T]
        self.shared = []  # a layer: the prompts' keys and values, [P, K, T, D] each
        self.own = like.new_empty(
            c.layers, 2, groups, c.kv_heads, group_size, max_new_tokens, c.head_dim
        )

    def read_prompts(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The first pass: causal attention within each prompt [N, heads, D]; its keys stay."""
        q, k, v = (self.prompts.grid(x) for x in (q, k, v))  # [P, T, heads, D]
        self.shared.append((k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()))
        return self.prompts.flat(attention(q, k, v))

    def read_next(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token a row, [P*G, heads, D]: it sees its prompt and its own completion so far."""
        _, _, P, K, G, _, D = self.own.shape
        q = q.view(P, G, K, -1, D).transpose(1, 2)  # [P, K, G, R, D]
        R, n = q.shape[3], self.filled + 1
        own_k, own_v = self.own[layer]  # [P, K, G, C, D]
        own_k[..., n - 1, :] = k.view(P, G, K, D).transpose(1, 2)
        own_v[..., n - 1, :] = v.view(P, G, K, D).transpose(1, 2)
        own_k, own_v = own_k.view(P * K * G, -1, D)[:, :n], own_v.view(P * K * G, -1, D)[:, :n]
        keys, values = (x.flatten(0, 1) for x in self.shared[layer])  # [P*K, T, D]
        q = q.reshape(P * K, G * R, D)
        to_prompt = torch.baddbmm(
            self.hide.flatten(0, 1), q, keys.mT, alpha=self.scale
        )  # [P*K, G*R, T]
        to_own = torch.bmm(q.view(P * K * G, R, D), own_k.mT) * self.scale  # [P*K*G, R, n]
        scores = torch.cat([to_prompt.view(P * K * G, R, -1), to_own], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # [P*K*G, R, T+n]
        of_prompt, of_own = weights.split([keys.shape[1], n], -1)
        out = torch.bmm(of_prompt.reshape(P * K, G * R, -1), values).view(P * K * G, R, D)
        out = torch.baddbmm(out, of_own, own_v)
        return out.view(P, K, G, R, D).transpose(1, 2).reshape(P * G, K * R, D)

    def keep(self, groups: Tensor, members: Tensor) -> None:
        """Shrinks the batch: `groups` [P'] are the prompts that stay, `members` [P', G'] their rows."""
        self.hide = self.hide[groups]
        self.shared = [(k[groups], v[groups]) for k, v in self.shared]
        old, n = self.own, self.filled
        self.own = old.new_empty(
            *old.shape[:2], len(groups), old.shape[3], members.shape[1], *old.shape[5:]
        )
        index = members[:, None, :, None, None].expand(-1, old.shape[3], -1, n, old.shape[6])
        for new, layer in zip(self.own.flatten(0, 1), old.flatten(0, 1), strict=True):
            new[..., :n, :] = layer[groups][..., :n, :].gather(2, index)


def sample(logits: Tensor, temperature: float, generator=None) -> tuple[Tensor, Tensor]:
    """One id a row from softmax(logits / temperature) [rows, V], and its log-probability.

    Dividing the probabilities by exponential noise makes the largest a fair draw (the Gumbel trick): no
    running sum, and every row has noise of its own. Temperature 0 takes the likeliest id and reports
    its log-probability at temperature 1.
    """
    probabilities = (logits.float() / (temperature or 1.0)).softmax(-1)
    race = probabilities
    if temperature:
        race = probabilities / torch.empty_like(probabilities).exponential_(generator=generator)
    ids = race.argmax(-1)
    return ids, probabilities.gather(-1, ids[:, None])[:, 0].log()


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    group_size: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    eos_ids=(),
    seed: int | None = None,
) -> list[list[Completion]]:
    """Samples `group_size` completions of each prompt: [P][G].

    Every prompt runs once. Then each step computes one token for every row, and rows that have met an
    id of `eos_ids` leave the batch as soon as a quarter of it can go. `seed` makes the noise repeatable
    (None draws from torch's global generator). Ids from decoder.vocab_limit on are never sampled.
    """
    if group_size < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError("generate needs group_size >= 1, max_new_tokens >= 1, temperature >= 0")
    _check_ids(decoder, prompts)
    if not prompts:
        return []
    device, P, G = decoder.head.device, len(prompts), group_size
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    head = decoder.head[: decoder.vocab_limit]
    ragged = Ragged(prompts, device)
    cache = Cache(decoder, ragged, G, max_new_tokens)
    hidden = decoder.run(ragged.tokens, ragged.positions, cache.read_prompts)  # [N, H]
    hidden = hidden[ragged.lengths.cumsum(0) - 1].repeat_interleave(G, 0)  # [P*G, H]
    positions = ragged.lengths.repeat_interleave(G)  # where each row's next token stands
    answer = torch.arange(P * G, device=device)  # which answer a row of the batch is writing
    done = torch.zeros(P, G, dtype=torch.bool, device=device)
    tokens = torch.zeros(P * G, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(P * G, max_new_tokens, device=device)
    for step in range(max_new_tokens):
        ids, chosen = sample(F.linear(hidden, head), temperature, generator)
        tokens[answer, step], logprobs[answer, step] = ids, chosen
        done |= torch.isin(ids, eos).view_as(done)
        if step + 1 == max_new_tokens:
            break
        if device.type == "cpu" or step % 16 == 15:  # looking at `done` makes a GPU wait
            left = (~done).sum(1)  # [P] unfinished rows of each prompt
            groups, width = left.nonzero()[:, 0], int(left.max())
            if not width:
                break
            if len(groups) * width <= 0.75 * done.numel():
                members = done[groups].sort(1, stable=True).indices[:, :width]  # unfinished first
                rows = (groups[:, None] * done.shape[1] + members).flatten()
                cache.keep(groups, members)
                done = done.flatten()[rows].view_as(members)
                ids, positions, answer = ids[rows], positions[rows], answer[rows]
        hidden = decoder.run(ids, positions, cache.read_next)  # [P*G, H]
        cache.filled += 1
        positions = positions + 1
    completions = []
    stop = set(eos_ids)
    for ids, chosen in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        end = next((n for n, i in enumerate(ids, 1) if i in stop), None)
        completions.append(Completion(ids[:end], chosen[:end], end is not None))
    return [completions[i : i + G] for i in range(0, P * G, G)]


class HeadLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature)[target] and the entropy, a chunk of rows at a time.

    The logits of a whole batch [N, V] never exist: forward keeps the log-sum-exp of each row, backward
    computes a chunk's logits again. Entropy carries no gradient; it is for the log.
    """

    @staticmethod
    def chunks(rows: int, vocabulary: int):
        size = max(128, 2**21 // vocabulary)  # 8 MiB of float32 logits, or 128 rows
        return (slice(start, start + size) for start in range(0, rows, size))

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
        logprobs, entropy, lse = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for rows in HeadLogprobs.chunks(*hidden.shape[:1], *weight.shape[:1]):
            logits = F.linear(hidden[rows], weight).float() / temperature  # [chunk, V]
            top = logits.amax(-1, keepdim=True)
            powers = (logits - top).exp_()
            total = powers.sum(-1)
            lse[rows] = top[:, 0] + total.log()
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - lse[rows]
            entropy[rows] = lse[rows] - (powers * logits).sum(-1) / total
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in HeadLogprobs.chunks(*hidden.shape[:1], *weight.shape[:1]):
            logits = F.linear(hidden[rows], weight).float() / ctx.temperature
            slope = (logits - lse[rows, None]).exp_() * -grad[
                rows, None
            ]  # d logprob / d logits [chunk, V]
            slope.scatter_add_(1, targets[rows, None], grad[rows, None])
            slope = (slope / ctx.temperature).to(weight.dtype)
            grad_hidden[rows] = slope @ weight
            grad_weight.addmm_(slope.T, hidden[rows])
        return grad_hidden, grad_weight, None, None


def score_completions(decoder, prompts, completions, temperature: float = 1.0):
    """(logprobs, entropy, mask), each [P, G, C]: `token_logprobs` and the entropy of each prediction.

    Each prompt runs once, with gradient, next to its G completions. All tokens lie end to end as one
    [N, H]; attention alone sees the grids. Completion queries meet [the prompt's keys, their own keys].
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            "token_logprobs needs temperature > 0: greedy choices have no log-probability"
        )
    if len(prompts) != len(completions) or len({len(group) for group in completions}) > 1:
        raise ValueError("token_logprobs needs one group of completions a prompt, all of one size")
    _check_ids(decoder, prompts, completions)
    device, G = decoder.head.device, len(completions[0]) if completions else 0
    answers = [answer for group in completions for answer in group]  # P*G
    prompt, target = Ragged(prompts, device), Ragged(answers, device)
    fed = Ragged([answer[:-1] for answer in answers], device)  # the last token predicts nothing
    (_, T), (_, C), N = prompt.shape, fed.shape, len(prompt.tokens)
    causal = torch.ones(C, C, dtype=torch.bool, device=device).tril().expand(len(answers), -1, -1)
    inside = prompt.mask.repeat_interleave(G, 0)[:, None].expand(-1, C, -1)
    visible = torch.cat([inside, causal], -1)  # [P*G, C, T+C]

    def attend(_, q, k, v):
        q_prompt, k_prompt, v_prompt = (prompt.grid(x[:N]) for x in (q, k, v))  # [P, T, heads, D]
        out = prompt.flat(attention(q_prompt, k_prompt, v_prompt))
        if not C:
            return out
        k_seen = torch.cat(
            [k_prompt.repeat_interleave(G, 0), fed.grid(k[N:])], 1
        )  # [P*G, T+C, K, D]
        v_seen = torch.cat([v_prompt.repeat_interleave(G, 0), fed.grid(v[N:])], 1)
        return torch.cat([out, fed.flat(attention(fed.grid(q[N:]), k_seen, v_seen, visible))])

    starts = prompt.lengths.repeat_interleave(G)  # [P*G] where each completion begins
    positions = torch.cat([prompt.positions, fed.positions + starts.repeat_interleave(fed.lengths)])
    hidden = decoder.run(torch.cat([prompt.tokens, fed.tokens]), positions, attend)  # [N, H]
    # A completion's first token is predicted at its prompt's end, the others one token before them.
    row = target.cells // max(target.shape[1], 1)
    end = (prompt.lengths.cumsum(0) - 1)[row // max(G, 1)]
    before = N + (fed.lengths.cumsum(0) - fed.lengths)[row] + target.positions - 1
    hidden = hidden.index_select(0, torch.where(target.positions == 0, end, before))
    limit, ids = decoder.vocab_limit, target.tokens
    logprobs, entropy = HeadLogprobs.apply(
        hidden, decoder.head[:limit], ids.clamp(max=limit - 1), temperature
    )
    logprobs = logprobs.masked_fill(ids >= limit, -math.inf)
    return tuple(
        x.unflatten(0, (-1, G)) for x in (target.grid(logprobs), target.grid(entropy), target.mask)
    )


def token_logprobs(decoder: Decoder, prompts, completions, temperature: float = 1.0):
    """(logprobs, mask), each [P, G, C]: log softmax(logits / temperature) of every completion token.

    `completions` [P][G] are lists of ids; the mask is 0 behind each one's end, where logprobs are 0.
    Differentiable in the decoder's parameters. Raises ValueError at temperature 0.
    """
    logprobs, _, mask = score_completions(decoder, prompts, completions, temperature)
    return logprobs, mask


# ---------------------------------------------------------------------------------------------------
# The encoder: BERT, for the reward model and the dense retriever
# ---------------------------------------------------------------------------------------------------


class EncoderLayer(nn.Module):
    """One post-norm block: x = norm(x + attention(x)), then x = norm(x + mlp(x))."""

    def __init__(
        self, hidden: int, heads: int, inner: int, eps: float, dropout: tuple[float, float]
    ):
        super().__init__()
        self.heads, (self.dropout, self.attention_dropout) = heads, dropout
        self.qkv, self.o = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [B, heads, T, D]
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        out = F.dropout(self.o(out.transpose(1, 2).flatten(2)), self.dropout, self.training)
        x = self.attention_norm(x + out)
        out = F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)
        return self.mlp_norm(x + out)

    def views(self) -> dict[str, Tensor]:
        views = {}
        for module, names in (
            (self.qkv, ["attention.self.query", "attention.self.key", "attention.self.value"]),
            (self.o, ["attention.output.dense"]),
            (self.attention_norm, ["attention.output.LayerNorm"]),
            (self.up, ["intermediate.dense"]),
            (self.down, ["output.dense"]),
            (self.mlp_norm, ["output.LayerNorm"]),
        ):
            for kind, parameter in module.named_parameters():
                views |= {
                    f"{n}.{kind}": p
                    for n, p in zip(names, parameter.chunk(len(names)), strict=True)
                }
        return views


class Encoder(nn.Module):
    """BERT. `raw` is the checkpoint's config.json; `tokenizer` comes from the same directory."""

    def __init__(self, raw: dict, where="config.json", pooler: bool = True):
        super().__init__()
        wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for key, value in wanted.items():
            if raw.get(key, None if key == "model_type" else value) != value:
                raise ValueError(
                    f"{where}: {key} is {raw.get(key)!r}, only {value!r} is implemented"
                )
        sizes = (
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "num_hidden_layers",
            "vocab_size",
        )
        for key in (*sizes, "max_position_embeddings"):
            if type(raw.get(key)) is not int or raw[key] < 1:
                raise ValueError(
                    f"{where}: {key!r} must be a whole number > 0, not {raw.get(key)!r}"
                )
        hidden, heads, inner, layers, vocabulary = (raw[key] for key in sizes)
        if hidden % heads:
            raise ValueError(f"{where}: hidden_size must be a multiple of num_attention_heads")
        eps, self.raw, self.tokenizer = raw.get("layer_norm_eps", 1e-12), raw, None
        self.dropout = raw.get("hidden_dropout_prob", 0.1)
        dropout = (self.dropout, raw.get("attention_probs_dropout_prob", 0.1))
        self.words = nn.Embedding(vocabulary, hidden)
        self.places = nn.Embedding(raw["max_position_embeddings"], hidden)
        self.segments = nn.Embedding(raw.get("type_vocab_size", 2), hidden)
        self.norm = nn.LayerNorm(hidden, eps)
        self.layers = nn.ModuleList(
            EncoderLayer(hidden, heads, inner, eps, dropout) for _ in range(layers)
        )
        self.pooler = nn.Linear(hidden, hidden) if pooler else None
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, T, H] of tokens [B, T]; mask is 0 at padding; segments are 0 (first) or 1."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if positions.numel() and positions.max() >= self.places.num_embeddings:
            raise ValueError(
                f"a text of {int(positions.max()) + 1} tokens: BERT has {self.places.num_embeddings} places"
            )
        segments = torch.zeros_like(tokens) if segments is None else segments
        tokens, segments = tokens.masked_fill(~mask, 0), segments.masked_fill(~mask, 0)
        x = self.norm(self.words(tokens) + self.places(positions) + self.segments(segments))
        x = F.dropout(x, self.dropout, self.training)
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        visible = mask[:, None, None, :] | itself  # [B, 1, T, T]; padding sees itself too
        for layer in self.layers:
            x = layer(x, visible)
        return x

    def views(self) -> dict[str, Tensor]:
        """BERT's weight names, each with the part of our parameters that holds it."""
        views = {
            "embeddings.word_embeddings.weight": self.words.weight,
            "embeddings.position_embeddings.weight": self.places.weight,
            "embeddings.token_type_embeddings.weight": self.segments.weight,
            "embeddings.LayerNorm.weight": self.norm.weight,
            "embeddings.LayerNorm.bias": self.norm.bias,
        }
        if self.pooler is not None:
            views |= {f"pooler.dense.{kind}": p for kind, p in self.pooler.named_parameters()}
        for n, layer in enumerate(self.layers):
            views |= {f"encoder.layer.{n}.{name}": part for name, part in layer.views().items()}
        return {name: view.detach() for name, view in views.items()}


def load_encoder(directory, device="cpu", dtype=torch.float32) -> Encoder:
    """A BERT checkpoint, with or without the `bert.` prefix, legacy gamma/beta names, pooler or heads."""
    directory = Path(directory)
    raw, tensors = read_json(directory / "config.json"), {}
    for name, tensor in read_checkpoint(directory).items():
        if name.endswith("position_ids") or name.startswith(("cls.", "classifier.", "qa_outputs.")):
            continue  # a buffer, and the heads of other tasks
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        if name in tensors:
            raise ValueError(f"{directory}: {name} stands in the checkpoint under two names")
        tensors[name] = tensor
    pooler = "pooler.dense.weight" in tensors
    encoder = _empty(lambda: Encoder(raw, directory / "config.json", pooler), device, dtype)
    fill(encoder.views(), tensors, directory)
    if (directory / "tokenizer.json").is_file():
        encoder.tokenizer = load_tokenizer(directory)
    return encoder


# ---------------------------------------------------------------------------------------------------
# The tokenizer and its chat format
# ---------------------------------------------------------------------------------------------------

R1_BOS, R1_EOS = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
R1_USER, R1_ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA_DATES = (
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # pinned, as Llama 3.1
)


def render_chat(messages: list[dict], known) -> str | None:
    """The chat as text, ready for the assistant's turn; None if `known` (the vocabulary) has no format.

    A model's chat template is a program inside its checkpoint. It is not run: the format is recognised
    by the special tokens that only its family has.
    """
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    turns = [m for m in messages if m["role"] != "system"]
    if R1_USER in known:
        marks = {"user": (R1_USER, ""), "assistant": (R1_ASSISTANT, R1_EOS)}
        text = R1_BOS + system
        for m in turns:
            before, after = marks[m["role"]]
            text += (
                before
                + (m["content"] if m["role"] == "user" else m["content"].split("</think>")[-1])
                + after
            )
        return text + R1_ASSISTANT + "<think>\n"
    if "<|im_start|>" in known:
        qwen3 = "<think>" in known
        if not any(m["role"] == "system" for m in messages) and not qwen3:
            default = (
                QWEN_SYSTEM
                if "<tool_call>" in known
                else SMOLLM_SYSTEM
                if "<gh_stars>" in known
                else None
            )
            messages = [{"role": "system", "content": default}] * bool(default) + messages
        text = ""
        for m in messages:
            content = m["content"]
            if qwen3 and m["role"] == "assistant":
                content = content.split("</think>")[-1].lstrip("\n")
            text += f"<|im_start|>{m['role']}\n{content}<|im_end|>\n"
        return text + "<|im_start|>assistant\n"
    if "<|start_header_id|>" in known:
        if "<|eom_id|>" in known:  # Llama 3.1 and later always open with the two dates
            turns = [{"role": "system", "content": LLAMA_DATES + system.strip()}] + turns
            keep = turns[0]["content"]
        else:
            turns, keep = messages, None
        text = "<|begin_of_text|>"
        for m in turns:
            content = keep if m["content"] is keep else m["content"].strip()
            text += f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{content}<|eot_id|>"
        return text + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return None


class Tokenizer:
    """tokenizer.json with its ids for the end, padding and chat. `files` are what save_decoder copies."""

    def __init__(self, backend: Backend, eos_ids=(), pad_id: int | None = None, files=None):
        backend.no_truncation()  # a tokenizer.json may carry both, switched on
        backend.no_padding()
        self.backend, self.files = backend, files or {}
        self.vocabulary = backend.get_vocab(with_added_tokens=True)
        self.size = max(self.vocabulary.values(), default=-1) + 1
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id if pad_id is not None else min(self.eos_ids, default=0)
        added = backend.get_added_tokens_decoder().items()
        self.hidden_ids = {
            i for i, t in added if t.special and t.content not in ("<think>", "</think>")
        }
        self.opening = (
            "<think>\n" if R1_USER in self.vocabulary else ""
        )  # reasoning opened by the prompt

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no [CLS]."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens (EOS, padding, BOS); <think> marks are kept."""
        return self.backend.decode(
            [i for i in ids if i not in self.hidden_ids], skip_special_tokens=False
        )

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation [{"role", "content"}, ...] up to where the assistant's answer begins.

        A rendered format brings its own BOS, so none is added; the plain fallback gets the tokenizer's.
        """
        for m in messages:
            if m.get("role") not in ("system", "user", "assistant") or not isinstance(
                m.get("content"), str
            ):
                raise ValueError(
                    f"a message needs a role (system, user, assistant) and a content: {m!r}"
                )
        text = render_chat(messages, self.vocabulary)
        if text is not None:
            return self.encode(text)
        plain = "\n\n".join(m["content"] for m in messages) + "\n\n"
        return self.backend.encode(plain, add_special_tokens=True).ids

    def encode_pair(
        self, first: str, second: str | None, max_length: int
    ) -> tuple[list[int], list[int]]:
        """BERT's (ids, segments): [CLS] first [SEP] second [SEP], the longer text cut to fit."""
        self.backend.enable_truncation(max_length)
        encoding = self.backend.encode(first, second)
        self.backend.no_truncation()
        return encoding.ids, encoding.type_ids

    def cut(self, text: str, tokens: int) -> str:
        """The longest beginning of `text` that takes at most `tokens` tokens."""
        offsets = self.backend.encode(text, add_special_tokens=False).offsets
        return (
            text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]] if tokens > 0 else ""
        )


def load_tokenizer(directory) -> Tokenizer:
    """tokenizer.json; EOS ids are the union of all that the three config files of a checkpoint name."""
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        backend = Backend.from_str(text)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error})") from None
    names = (
        "generation_config.json",
        "config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
    files = {name: read_json(directory / name) for name in names if (directory / name).is_file()}

    def ids_of(key: str) -> list[int]:
        found = []
        for name, settings in files.items():
            value = settings.get(key + "_id")
            for item in value if isinstance(value, list) else [value]:
                if item is not None and (type(item) is not int or item < 0):
                    raise ValueError(f"{directory / name}: {key}_id {item!r} is not a token id")
                found.append(item)
            token = settings.get(key)  # a string, or {"content": ...}
            token = token.get("content") if isinstance(token, dict) else token
            found.append(backend.token_to_id(token) if isinstance(token, str) else None)
        return [i for i in found if i is not None]

    copies = {
        n: json.dumps(files[n], indent=2, ensure_ascii=False) + "\n"
        for n in files
        if n != "config.json"
    }
    return Tokenizer(
        backend,
        ids_of("eos_token"),
        next(iter(ids_of("pad_token")), None),
        {path.name: text} | copies,
    )


# ---------------------------------------------------------------------------------------------------
# The command line, shared by all chapters
# ---------------------------------------------------------------------------------------------------


def pick_device(name: str) -> str:
    """auto is the best of cuda, mps and cpu that this machine has."""
    if name == "auto":
        return (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: this machine or this build of torch has none") from None


def parse_options(options: type, description: str, arguments: list[str] | None = None):
    """A dataclass as a command line: each field is a flag, the comment behind it is the flag's help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    comments = dict(
        re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(options), re.MULTILINE)
    )
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        choices = kinds if typing.get_origin(hints[field.name]) is typing.Literal else None
        kind = str if choices else (kinds or [hints[field.name]])[0]
        more = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"type": kind, "choices": choices}
        )
        help = comments[field.name].replace("%", "%%") + f" (default: {field.default})"
        parser.add_argument(
            "--" + field.name.replace("_", "-"), default=field.default, help=help, **more
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parsed = vars(parser.parse_args(arguments))
    debug = parsed.pop("debug")
    return options(**parsed), debug


def command(main, options: type, description: str) -> None:
    """Runs main(options); a mistake in what it was given is one line on stderr and exit status 2."""
    chosen, debug = parse_options(options, description)
    try:
        main(chosen)
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class Options:
    model: str = "toy/policy"  # checkpoint directory of the language model
    prompt: str = "Hello."  # what the user says
    group_size: int = 1  # completions to sample
    max_new_tokens: int = 256  # longest completion, in tokens
    temperature: float = 0.7  # 0 is greedy
    seed: int = 0  # of the sampling noise
    device: str = "auto"  # auto, cuda, mps or cpu


def main(options: Options) -> None:
    device = pick_device(options.device)
    decoder, tokenizer = load_decoder(options.model, device), load_tokenizer(options.model)
    prompt = tokenizer.chat([{"role": "user", "content": options.prompt}])
    (group,) = generate(
        decoder, [prompt], options.group_size, options.max_new_tokens,
        options.temperature, tokenizer.eos_ids, options.seed,
    )  # fmt: skip
    for completion in group:
        print(tokenizer.opening + tokenizer.decode(completion.tokens))
        print(
            f"[{len(completion.tokens)} tokens, log-probability {sum(completion.logprobs):.2f}]\n"
        )


if __name__ == "__main__":
    command(main, Options, __doc__)
