"""The language model: a Hugging Face checkpoint read by hand, in plain PyTorch.

  Decoder          Qwen2 (so Qwen2.5 and R1-Distill), Qwen3, Llama; LoRA adapters for it
  generate         samples G completions of each of P prompts, with a key-value cache
  token_logprobs   the log-probability of every completion token, with gradient
  Encoder          the BERT family, for the reward model and the dense retriever
  Tokenizer        tokenizer.json, chat formats, end-of-sequence ids
  files, results, processes, device, command line: what all five chapters share

`generate` and `token_logprobs` are twins: both run each prompt ONCE and let its G completions
attend to the prompt's keys and values. A retrieval prompt is long and GRPO samples from it G
times: this is where the speed comes from. A plain pass, a prompt, a sampling step and a training
step differ only in which token may look at which, so `Decoder.run` is one loop over the layers and
each of the four brings its own `attend`.

Left out: sliding windows, rope types other than default and llama3, quantised weights, top-k and
top-p (GRPO needs the probability of what was sampled; a cut distribution is not the one that is
trained).

    python prlm.py --model DIR --prompt "What is BM25?"     # the toy answers its own tasks only

Shapes: P prompts, G completions per prompt, B batch, T tokens, C completion tokens, N tokens laid
end to end, V vocabulary, H hidden size, D head size, K key-value heads, R query heads for each.
"""

import argparse
import ast
import dataclasses
import errno
import hashlib
import inspect
import io
import json
import math
import mmap
import os
import re
import shutil
import signal
import sys
import typing
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

CHAPTERS = ["prlm.py", "retrieve.py", "eval.py", "reward.py", "rl.py"]  # each builds on those above

if Path(sys.argv[0]).name in CHAPTERS:  # a command: what has to be set before torch is loaded
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it loads: no traceback
    # Waiting threads should sleep: on a busy machine, spinning ones slow everything down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# cuDNN's attention makes a plan for each new shape, which is slow, and here nearly every batch has
# a new one.
torch.backends.cuda.enable_cudnn_sdp(False)

# ---- The decoder ----------------------------------------------------------------------------
#
# The policy: config.json, rotary embedding, attention, one layer, the model, its checkpoint. Needs
# `read_checkpoint` and its helpers from "Files". The tests compare its logits with transformers'.


def parse_config(raw: dict, where="config.json") -> SimpleNamespace:
    """What the forward pass needs of Hugging Face's config.json; ValueError for what it lacks.

    Knows the old layout of the rotary settings (rope_theta, rope_scaling) and that of
    transformers 5 (rope_parameters). Defaults are transformers' own; rope_theta has none, since
    its default differs from version to version.
    """

    def need(condition, message: str) -> None:
        if not condition:
            raise ValueError(f"{where}: {message}")

    def flag(key) -> bool:
        value = raw.get(key)
        need(value in (None, False, True), f"{key!r} must be true or false, not {value!r}")
        return bool(value)

    number = partial(read_number, raw, where)
    family, kinds = raw.get("model_type"), raw.get("layer_types")
    need(family in ("qwen2", "qwen3", "llama"), f"model_type {family!r} is not qwen2, qwen3, llama")
    need(raw.get("hidden_act", "silu") == "silu", f"hidden_act {raw.get('hidden_act')!r}, not silu")
    need(isinstance(kinds, list | None), "layer_types must be a list")
    windows = any(kind != "full_attention" for kind in kinds or [])
    sliding = flag("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    if sliding and kinds is None and family != "llama":  # Llama has no such setting
        # From layer max_window_layers on they slide.
        windows = number("max_window_layers", 28, least=0) < number("num_hidden_layers")
    need(not windows, "sliding-window attention is not implemented")
    need(raw.get("is_causal") in (None, True), "is_causal false: not implemented")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # as transformers 5 decides
    need(isinstance(rope, dict), "rope_parameters and rope_scaling must be objects")
    rope = {"rope_theta": raw.get("rope_theta")} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind in ("default", "llama3"), f"rope type {kind!r} is neither default nor llama3")
    share = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    need(share == 1, "partial rotary embeddings are not implemented")
    context = "original_max_position_embeddings"
    outside = raw.get(context)  # which of the two counts depends on the version of transformers
    need(
        kind != "llama3" or outside in (None, rope.get(context)),
        f"{context} is {outside!r} outside of the rotary settings, not what it is inside",
    )
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", context)
    hidden = number("hidden_size")
    heads = number("num_attention_heads")
    bias = flag("attention_bias")
    config = SimpleNamespace(
        vocabulary=number("vocab_size"),
        hidden=hidden,
        intermediate=number("intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", 128 if family == "qwen3" else hidden // heads),
        eps=number("rms_norm_eps", 1e-6, float),
        tied=flag("tie_word_embeddings"),  # the output head is the embedding
        qkv_bias=bias or family == "qwen2",  # Qwen2 has them though its config.json does not say so
        o_bias=bias and family != "qwen2",
        mlp_bias=flag("mlp_bias") and family == "llama",
        qk_norm=family == "qwen3",  # RMSNorm on each head's query and key
        theta=read_number(rope, where, "rope_theta", kind=float),
        scaling=[read_number(rope, where, k, kind=float) for k in llama3 if kind == "llama3"],
    )
    even = config.heads % config.kv_heads == 0 and config.head_dim % 2 == 0
    need(even, "heads must be a multiple of key-value heads, head_dim must be even")
    return config


def rope_frequencies(config: SimpleNamespace) -> Tensor:
    """Radians per position for each channel pair of a head: theta^(-2i/D), i = 0 .. D/2 - 1. [D/2]

    Without scaling `config.scaling` is empty; llama3's is [factor, low, high, original context].
    The frequency of a pair that turns (2 pi radians) fewer than `low` times within the original
    context is divided by `factor`; that of a pair with more than `high` turns is kept; in between
    the two are blended, linearly in the turns. float32.
    """
    # On the CPU even where `filled` builds all else on meta, without values.
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.theta**exponents
    if config.scaling:
        factor, low, high, context = config.scaling
        turns = context * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / factor
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split as Hugging Face's: channel i turns with channel i + D/2.

    `cos` and `sin` [.., D] hold each angle twice, for channel i and for channel i + D/2.
    `sin` carries the minus sign of the first half. Hugging Face builds (-x2, x1) for each query and
    key instead; here rolling by half gives (x2, x1), and the sign was set once for all layers.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for [B, T, heads, D]; causal unless given `visible` [B, T, S].

    `visible` is True where query t may look at key s. k and v [B, S, kv_heads, D] may have fewer
    heads: query head h looks at key-value head h // (heads / kv_heads).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, T, D]
    how = {"is_causal": True} if visible is None else {"attn_mask": visible.unsqueeze(1)}
    if visible is not None and q.is_cuda:
        # With a mask, enable_gqa allows only the slow kernel, which stores all scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)
    return out.transpose(1, 2)


class Linear(nn.Linear):
    """W x + b, and with `add_lora` also (alpha / r) B A x, for each block of W's rows on its own.

    `rows` are the sizes of the blocks: q, k and v are stored in one matrix and so are gate and up,
    since fewer, larger products are faster. A is [blocks * r, inputs] and B [outputs, r] (Hu et al.
    2021).
    """

    def __init__(self, inputs: int, rows: list[int], bias: bool):
        super().__init__(inputs, sum(rows), bias)
        self.rows = rows
        self.scale = 0.0  # alpha / r; 0: the adapters are absent or switched off
        self.register_parameter("A", None)
        self.register_parameter("B", None)

    def add_lora(self, rank: int, alpha: float) -> None:
        new = partial(torch.zeros, device=self.weight.device)  # float32, whatever W is held in
        self.A = nn.Parameter(new(len(self.rows) * rank, self.in_features))
        self.B = nn.Parameter(new(self.out_features, rank))  # 0: at first nothing changes
        nn.init.kaiming_uniform_(self.A, math.sqrt(5))
        self.scale = alpha / rank

    def blocks(self, dtype):
        """(A, B) of each block of rows."""
        return zip(self.A.to(dtype).chunk(len(self.rows)), self.B.to(dtype).split(self.rows))

    def merged(self) -> Tensor:
        """W + (alpha / r) B A, rounded once to W's precision."""
        change = torch.cat([b @ a for a, b in self.blocks(torch.float32)])
        return (self.weight + self.scale * change).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[.., inputs] to [.., outputs]; the adapters' products are in x's precision.

        A scale of 0 (no LoRA, or within `without_lora`) leaves W x + b, whatever A and B hold.
        """
        out = super().forward(x)
        if self.scale == 0:
            return out
        changes = [F.linear(F.linear(x, a), b) for a, b in self.blocks(x.dtype)]
        return out + self.scale * torch.cat(changes, -1)


class Layer(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + down(silu(gate) * up)."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.c, self.heads = c, [c.heads, c.kv_heads, c.kv_heads]
        self.attention_norm = nn.RMSNorm(c.hidden, c.eps)
        self.mlp_norm = nn.RMSNorm(c.hidden, c.eps)
        self.qkv = Linear(c.hidden, [heads * c.head_dim for heads in self.heads], c.qkv_bias)
        self.o = Linear(c.heads * c.head_dim, [c.hidden], c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim, c.eps), nn.RMSNorm(c.head_dim, c.eps)
        self.gate_up = Linear(c.hidden, 2 * [c.intermediate], c.mlp_bias)
        self.down = Linear(c.intermediate, [c.hidden], c.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.c.head_dim))
        q, k, v = qkv.split(self.heads, -2)  # [.., heads, D]
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        x = x + self.o(attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(-2))  # [.., H]
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


# Our name: Hugging Face's; for a matrix that we hold fused, the names of its blocks.
DECODER_NAMES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head",
    "layers": "model.layers", "attention_norm": "input_layernorm",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "down": "mlp.down_proj",
    "mlp_norm": "post_attention_layernorm", "gate_up": "mlp.gate_proj mlp.up_proj",
}  # fmt: skip


class Decoder(nn.Module):
    """A causal language model. `raw` is its config.json; the weights start random."""

    def __init__(self, raw: dict, where="config.json"):
        super().__init__()
        self.raw = raw
        self.config = c = parse_config(raw, where)
        self.vocab_limit = c.vocabulary  # ids from here on are rows without a token: never sampled
        self.embed = nn.Embedding(c.vocabulary, c.hidden)
        self.norm = nn.RMSNorm(c.hidden, c.eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.lm_head = None if c.tied else nn.Linear(c.hidden, c.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.frequencies = rope_frequencies(c)  # no buffer: `to(bfloat16)` would round it
        self.checkpointing = False  # True: each layer's activations are recomputed in backward

    @property
    def head(self) -> Tensor:
        """The output matrix [V, H]."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def run(self, tokens: Tensor, positions: Tensor, attend) -> Tensor:
        """Final hidden states [.., H] of tokens [..].

        attend(layer, q, k, v) is the attention: it decides which token may look at which.
        """
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None, None] * self.frequencies  # [.., 1, D/2]
        x = self.embed(tokens)  # [.., H]
        cos = torch.cat([angles.cos(), angles.cos()], -1).to(x.dtype)  # [.., 1, D]
        sin = torch.cat([-angles.sin(), angles.sin()], -1).to(x.dtype)
        for number, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, cos, sin, partial(attend, number))
        return self.norm(x)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; mask [B, T] is 0 at padding, on either side.

        The plain definition, which the tests compare with transformers and with everything
        faster. `generate` and `score_completions` call `run`, each with an attention of its own.

        At its real tokens a row has the logits that it would have alone, whatever ids the padding
        holds: padding is not seen and takes no position. Its logits are finite and mean nothing.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        visible = None  # causal
        if mask is not None:
            mask = mask.bool()
            tokens = tokens.masked_fill(~mask, 0)
            visible = (positions <= positions[:, None]) & mask[:, None]  # [B, T, T]
            # Padding sees itself: a query that sees nothing would be NaN.
            visible |= torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
        positions = positions.expand_as(tokens)
        x = self.run(tokens, positions, lambda _, q, k, v: attention(q, k, v, visible))
        return F.linear(x, self.head)

    def views(self) -> dict[str, Tensor]:
        """Hugging Face's weight names, each with the part of our parameters that holds it.

        With LoRA they are parts of the merged weights, and no longer of the parameters.
        """
        return checkpoint_views(self, DECODER_NAMES, merged_state(self))


def load_decoder(directory, device="cpu", dtype=torch.float32) -> Decoder:
    """A Qwen2, Qwen3 or Llama checkpoint; a weight missing, left over or misshapen: ValueError."""
    directory = checkpoint_directory(directory)
    raw = read_json(directory / "config.json")

    def rename(name: str) -> str | None:
        if name.endswith("rotary_emb.inv_freq"):
            return None  # a buffer of old exports, computed here
        # Exports of a base model lack the prefix.
        return name if name.startswith(("model.", "lm_head.")) else "model." + name

    tensors = renamed_weights(directory, rename)
    head = tensors.pop("lm_head.weight", None) if raw.get("tie_word_embeddings") else None
    make = partial(Decoder, raw, directory / "config.json")
    decoder = filled(make, tensors, directory, device, dtype)
    if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
        raise ValueError(f"{directory}: lm_head is tied to the embedding, but the two differ")
    if tokenizer := tokenizer_beside(directory, raw["vocab_size"]):
        decoder.vocab_limit = tokenizer.size
    return decoder


def save_decoder(decoder: Decoder, tokenizer: "Tokenizer", directory) -> None:
    """Writes a checkpoint that transformers opens unchanged, in the parameters' precision."""
    directory = Path(directory)
    tokenizer.save(directory)
    write_json(directory / "config.json", config_with_dtype(decoder.raw, decoder.head.dtype))
    write_safetensors(directory / "model.safetensors", decoder.views())


# ---- LoRA: a few numbers to train beside frozen weights -------------------------------------
#
# Instead of W (2,359,296 numbers for 1536 x 1536) an A and a B are trained (49,152 at rank 16), and
# AdamW keeps moments of these alone. `Linear` above computes with them; rl.py decides whether to.


def add_lora(decoder: Decoder, rank: int, alpha: float) -> None:
    """Freezes the decoder and gives every matrix of its layers an adapter that can be trained.

    A is drawn from torch's own generator, as PEFT draws it; B is 0. The frozen weights stay as they
    were loaded, in bfloat16 say; the adapters are float32.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"LoRA needs a rank of at least 1 and alpha > 0, not {rank} and {alpha}")
    if rank > decoder.config.hidden:
        size = decoder.config.hidden
        raise ValueError(f"a LoRA rank of {rank} exceeds that of the weights, {size} at most")
    decoder.requires_grad_(False)
    for module in decoder.layers.modules():
        if isinstance(module, Linear):
            module.add_lora(rank, alpha)


@contextmanager
def without_lora(decoder: Decoder):
    """Inside it the adapters are off."""
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    scales = [linear.scale for linear in linears]
    for linear in linears:
        linear.scale = 0.0
    try:
        yield
    finally:
        for linear, scale in zip(linears, scales, strict=True):
            linear.scale = scale


@torch.no_grad()
def merged_parameters(decoder: Decoder):
    """(name, tensor) of an equivalent decoder without adapters, merged one matrix at a time."""
    for name, parameter in decoder.named_parameters():
        path, _, kind = name.rpartition(".")
        linear = decoder.get_submodule(path)
        if kind == "weight" and isinstance(linear, Linear) and linear.A is not None:
            parameter = linear.merged()
        if kind not in ("A", "B"):
            yield name, parameter.detach()


def merged_state(decoder: Decoder) -> dict[str, Tensor]:
    """The state dict of the plain decoder that computes the same; without LoRA its own weights."""
    return dict(merged_parameters(decoder))


# ---- The twins: sampling and training on a prompt that is run once --------------------------
#
# `generate` and `token_logprobs`, the two that GRPO needs. Both take token ids and a Decoder, and
# both bring `Decoder.run` an attention in which the G completions share their prompt's keys.


class Ragged:
    """Unequal sequences laid end to end, N tokens in all: only attention pays for padding.

    >>> rows = Ragged([[5, 6, 7], [8]])
    >>> rows.tokens.tolist(), rows.positions.tolist(), rows.grid(rows.tokens).tolist()
    ([5, 6, 7, 8], [0, 1, 2, 0], [[5, 6, 7], [8, 0, 0]])
    """

    def __init__(self, sequences: list[list[int]], device="cpu"):
        tokens = [token for sequence in sequences for token in sequence]
        self.tokens = torch.tensor(tokens, dtype=torch.long, device=device)  # [N]
        self.lengths = torch.tensor([*map(len, sequences)], dtype=torch.long, device=device)
        self.starts = self.lengths.cumsum(0) - self.lengths  # [rows] each one's first token
        self.shape = (len(sequences), max(map(len, sequences), default=0))
        self.mask = torch.arange(self.shape[1], device=device) < self.lengths[:, None]  # [rows, T]
        self.rows, self.positions = self.mask.nonzero().unbind(1)  # [N] each
        self.cells = self.rows * self.shape[1] + self.positions  # [N] index in the grid

    def grid(self, x: Tensor) -> Tensor:
        """[N, ..] to [rows, T, ..], zeros after each row's end."""
        empty = x.new_zeros(self.mask.numel(), *x.shape[1:])
        return empty.index_copy(0, self.cells, x).unflatten(0, self.shape)

    def flat(self, grid: Tensor) -> Tensor:
        """[rows, T, ..] back to [N, ..]."""
        return grid.flatten(0, 1).index_select(0, self.cells)


def check_ids(decoder: Decoder, prompts: list[list[int]], completions=()) -> None:
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    for ids in (*prompts, *(ids for group in completions for ids in group)):
        if ids and not 0 <= min(ids) <= max(ids) < decoder.config.vocabulary:
            raise ValueError(f"token ids must lie in 0..{decoder.config.vocabulary - 1}")


@dataclass
class Completion:
    """A sampled completion; `finished`: it ended by itself, and its EOS id is its last token."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def exact_scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T of [batch, n, D] and [batch, m, D], summed and kept in float32 even from bfloat16.

    Real checkpoints have scores of several hundred, which bfloat16 would round to steps of 2: the
    softmax, and so the sampler, would disagree with the trainer's attention, which does not round.
    """
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)  # CUDA only
    return torch.bmm(q.float(), k.float().mT)


class Cache:
    """Keys and values while sampling: a prompt's once for its group, a completion's in its row.

    The layout is [P, K, G], so that the G·R queries of a group that share a key-value head are
    multiplied with the prompt's keys in one product. A cache that repeats the prompt would read it
    G times.

    A completion has a slot for each token. A step reads the first `window` of them and hides those
    not yet written. On a CPU the window is what is written, the least work; a CUDA graph needs
    shapes that stay the same for many steps.
    """

    def __init__(self, decoder: Decoder, prompts: Ragged, group_size: int, max_new_tokens: int):
        c, P = decoder.config, prompts.shape[0]
        self.prompts = prompts
        self.scale = c.head_dim**-0.5
        self.shared = []  # per layer: the prompts' keys and values, [P, K, T, D] each
        shape = (c.layers, 2, P, c.kv_heads, group_size, max_new_tokens, c.head_dim)
        self.own = decoder.head.new_zeros(shape)
        self.length = self.window = 0  # tokens written of each completion, slots a step reads
        # Where the new token goes; a tensor, because a CUDA graph would freeze a Python number.
        self.slot = torch.zeros(1, dtype=torch.long, device=decoder.head.device)
        seen = F.pad(prompts.mask, (0, max_new_tokens))  # [P, T+C]
        # Added to the scores: -inf hides padding and slots not yet written.
        self.hide = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)

    def read_prompts(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The first pass: causal attention within each prompt, [N, heads, D]; fills `shared`."""
        q, k, v = (self.prompts.grid(x) for x in (q, k, v))  # [P, T, heads, D]
        self.shared.append((k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()))
        return self.prompts.flat(attention(q, k, v))

    def open(self, coarse: bool) -> None:
        """Opens the next slot of every completion; `coarse` windows are 128, 256, 512, ..."""
        self.slot.fill_(self.length)
        self.hide[:, self.prompts.shape[1] + self.length] = 0.0
        self.length += 1
        window = max(128, 1 << (self.length - 1).bit_length()) if coarse else self.length
        self.window = min(window, self.own.shape[5])  # max_new_tokens

    def read_next(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token per row, [P*G, heads, D]: it sees its prompt and its completion so far.

        The new key and value go to `slot` of `own` [layer, key or value, P, K, G, C, D]. Then, in
        one softmax, a row sees the prompt's keys, `shared[layer]`, and the first `window` slots of
        its own; `hide` [P, T+C] is -inf at padding and unwritten slots. Heads as in `attention`.
        Written as batched products because einsum, which reads better, is a tenth slower here.
        """
        P, K, G, _, D = self.own.shape[2:]
        n, R, T = self.window, q.shape[1] // K, self.prompts.shape[1]
        for own, new in zip(self.own[layer], (k, v), strict=True):
            own.index_copy_(3, self.slot, new.view(P, G, K, 1, D).transpose(1, 2))
        own_keys, own_values = self.own[layer].flatten(1, 3)[:, :, :n]  # [P*K*G, n, D]
        keys, values = (x.flatten(0, 1) for x in self.shared[layer])  # [P*K, T, D]
        q = q.view(P, G, K, R, D).transpose(1, 2)  # [P, K, G, R, D]
        to_prompt = exact_scores(q.reshape(P * K, G * R, D), keys)  # [P*K, G*R, T]
        to_own = exact_scores(q.reshape(P * K * G, R, D), own_keys)  # [P*K*G, R, n]
        scores = torch.cat([x.view(P, K * G * R, -1) for x in (to_prompt, to_own)], -1)
        scores = torch.add(self.hide[:, None, : T + n], scores, alpha=self.scale)
        weights = scores.softmax(-1).to(v.dtype).view(P * K * G, R, T + n)
        for_prompt, for_own = weights.split([T, n], -1)
        out = torch.bmm(for_prompt.reshape(P * K, G * R, T), values).view(P * K * G, R, D)
        out = torch.baddbmm(out, for_own, own_values)
        return out.view(P, K, G, R, D).transpose(1, 2).reshape(P * G, K * R, D)

    def shrink(self, kept: Tensor, members: Tensor) -> None:
        """Keeps the prompts of indices `kept` [P'] and in each the rows `members` [P', G']."""
        self.hide = self.hide[kept]
        self.shared = [(k[kept], v[kept]) for k, v in self.shared]
        layers, two, _, K, _, C, D = self.own.shape
        new = self.own.new_zeros(layers, two, len(kept), K, members.shape[1], C, D)
        rows = members[:, None, :, None, None].expand(-1, K, -1, self.length, D)
        for target, source in zip(new.flatten(0, 1), self.own.flatten(0, 1), strict=True):
            target[..., : self.length, :] = source[kept][..., : self.length, :].gather(2, rows)
        self.own = new


class Recorded:
    """The decode step as a CUDA graph: one launch in place of dozens per layer.

    A graph keeps the addresses and shapes it was recorded with, so it is recorded anew whenever the
    number of rows (each Cache.shrink lowers it) or the cache's window changes. If that fails, the
    steps from then on run without a graph.
    """

    devices = ("cuda",)  # the kinds of device that have graphs
    newest = None  # the last graph, kept because the next one takes over its memory pool
    side = None  # the stream to record on; one for all, since cuBLAS keeps a workspace for each

    def __init__(self, step, cache: Cache):
        self.step = step  # hidden = step(ids, positions)
        self.cache = cache
        Recorded.side = Recorded.side or torch.cuda.Stream(cache.own.device)
        self.shape = self.graph = None
        self.refused = False  # by CUDA

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states [rows, H] of the tokens ids [rows]; the next call overwrites them."""
        shape = len(ids), self.cache.window
        if shape != self.shape and not self.refused:
            self.shape = shape
            self.record(ids, positions)
        if self.refused:
            return self.step(ids, positions)
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.hidden

    def record(self, ids: Tensor, positions: Tensor) -> None:
        """Records the step. `torch.cuda.graph` would first wait for the device and give all cached
        memory back to it, at each of a rollout's recordings.
        """
        self.ids = ids.clone()
        self.positions = positions.clone()
        graph = torch.cuda.CUDAGraph()
        main = torch.cuda.current_stream(ids.device)
        pool = Recorded.newest.pool() if Recorded.newest else None
        self.side.wait_stream(main)
        try:
            with torch.cuda.stream(self.side):
                # Once unrecorded: libraries load and allocate then, which a recording forbids.
                self.step(self.ids, self.positions)
                # thread_local: NCCL's watchdog, another thread, may still call CUDA.
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    self.hidden = self.step(self.ids, self.positions)
                finally:
                    graph.capture_end()
            self.graph = Recorded.newest = graph
        except RuntimeError as error:
            self.refused = True
            warnings.warn(f"no CUDA graph, sampling is slower: {error}", stacklevel=2)
        main.wait_stream(self.side)


COLDEST = 1e-6  # the least temperature above 0: with less, logits / temperature can overflow


def sample(logits: Tensor, temperature: float, generator=None) -> tuple[Tensor, Tensor]:
    """One id per row of softmax(logits / temperature) [rows, V], and its log-probability.

    Temperature 0 takes the id of the largest logit and reports its log-probability at temperature
    1. Rows are independent, the same generator draws the same, an id of probability 0 is never
    drawn.
    """
    probabilities = (logits.float() / (temperature or 1.0)).softmax(-1)
    if temperature:
        # A uniform number is looked up in the running sum of the probabilities. torch.multinomial
        # draws a number for every id of the vocabulary instead: 3 to 7 times slower on a CPU.
        sums = probabilities.cumsum(-1)
        uniform = torch.rand(len(sums), 1, device=sums.device, generator=generator) * sums[:, -1:]
        ids = torch.searchsorted(sums, uniform, right=True)  # right: no id of probability 0
        ids = ids.clamp(max=logits.shape[-1] - 1)  # `uniform` can round up to the whole sum
    else:
        ids = logits.argmax(-1, keepdim=True)  # of the logits: probabilities round to ties
    # A probability that underflows must not give -inf.
    chosen = probabilities.gather(-1, ids).clamp(min=torch.finfo(torch.float32).tiny)
    return ids[:, 0], chosen.log()[:, 0]


@torch.no_grad()
def generate(
    decoder: Decoder, prompts: list[list[int]], group_size: int = 1, max_new_tokens: int = 256,
    temperature: float = 1.0, eos_ids=(), seed: int | None = None,
) -> list[list[Completion]]:  # fmt: skip
    """Samples `group_size` completions of each prompt, [P][G].

    Every prompt runs once; then a step computes one token of every row, on CUDA as a graph. Rows
    that have met an id of `eos_ids` leave the batch as soon as a quarter of it can go (on CUDA a
    half; Cache.shrink). `seed` makes the noise repeatable (None draws from torch's own generator).
    Temperature 0 is greedy. Ids from `decoder.vocab_limit` on are never sampled. A completion ends
    with its first id of `eos_ids`, and is then finished, or after `max_new_tokens`. ValueError for
    a group or a length below 1, a temperature below 0 or between 0 and COLDEST, and what
    `check_ids` refuses.
    """
    if group_size < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError("generate needs group_size >= 1, max_new_tokens >= 1, temperature >= 0")
    if 0 < temperature < COLDEST:
        raise ValueError(f"a temperature of {temperature} is greedy in all but name: take 0")
    check_ids(decoder, prompts)
    if not prompts:
        return []
    P, G = len(prompts), group_size
    head, device = decoder.head, decoder.head.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    laid = Ragged(prompts, device)
    cache = Cache(decoder, laid, G, max_new_tokens)
    hidden = decoder.run(laid.tokens, laid.positions, cache.read_prompts)  # [N, H]
    hidden = hidden[laid.starts + laid.lengths - 1].repeat_interleave(G, 0)  # [P*G, H]
    positions = laid.lengths.repeat_interleave(G)  # [P*G] of the next token
    writing = torch.arange(P * G, device=device)  # [P*G] which completion a row writes
    done = torch.zeros(P, G, dtype=torch.bool, device=device)
    tokens = torch.zeros(P * G, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(P * G, max_new_tokens, device=device)
    recorded = device.type in Recorded.devices
    run_step = partial(decoder.run, attend=cache.read_next)
    run_step = Recorded(run_step, cache) if recorded else run_step
    # Leaving the batch copies the cache of those that stay, and calls for a new recording. These
    # limits keep both rare.
    small_enough = 0.5 if recorded else 0.75
    for step in range(max_new_tokens):
        ids, chosen = sample(F.linear(hidden, head[: decoder.vocab_limit]), temperature, generator)
        tokens[writing, step], logprobs[writing, step] = ids, chosen
        done |= torch.isin(ids, eos).view_as(done)
        # Reading `done` makes the host wait for all queued GPU work: so only now and then.
        if device.type == "cpu" or step % 16 == 15:
            unfinished = (~done).sum(1)  # [P] completions of each prompt
            width = int(unfinished.max())
            if width == 0:
                break
            alive = unfinished.nonzero()[:, 0]  # [P'] prompts with an unfinished completion
            if len(alive) * width <= small_enough * done.numel():
                # All groups keep one size: unfinished rows first, then finished ones to fill up.
                members = done[alive].sort(dim=1, stable=True).indices[:, :width]
                kept = (alive[:, None] * done.shape[1] + members).flatten()
                cache.shrink(alive, members)
                done = done.flatten()[kept].view_as(members)
                ids, positions, writing = ids[kept], positions[kept], writing[kept]
        if step + 1 < max_new_tokens:
            cache.open(coarse=recorded)
            hidden = run_step(ids, positions)
            positions = positions + 1
    stop = set(eos.tolist())  # a row may have gone on after its end: it is cut there
    completions = []
    for ids, chosen in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        end = next((n for n, token in enumerate(ids, 1) if token in stop), None)
        completions.append(Completion(ids[:end], chosen[:end], end is not None))
    return [completions[first : first + G] for first in range(0, P * G, G)]


class HeadLogprobs(torch.autograd.Function):
    """log softmax(x W^T / temperature)[target], [N], and the entropy, a chunk of rows at a time.

    The logits of a whole batch [N, V] never exist: forward keeps each row's log-sum-exp, backward
    computes a chunk's logits again. The entropy carries no gradient; it is for the log. Products
    are in x's precision, the weight's gradient is summed in the weight's.
    """

    @staticmethod
    def chunks(x: Tensor, weight: Tensor, temperature: float):
        weight = weight.to(x.dtype)
        size = max(128, 2**21 // len(weight))  # of float32 logits: 8 MiB, or 128 rows
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            yield rows, F.linear(x[rows], weight).float() / temperature  # [chunk, V]

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, temperature: float):
        logprobs, entropy, lse = (torch.empty(len(x), device=x.device) for _ in range(3))
        for rows, logits in HeadLogprobs.chunks(x, weight, temperature):
            top = logits.amax(-1, keepdim=True)
            powers = (logits - top).exp_()
            total = powers.sum(-1)
            lse[rows] = top[:, 0] + total.log()
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - lse[rows]
            entropy[rows] = lse[rows] - (powers * logits).sum(-1) / total
        ctx.save_for_backward(x, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        """The gradients of x [N, H] and weight [V, H], given that of the log-probabilities [N].

        Temperature and targets have none, and the entropy's is not used.
        """
        x, weight, targets, lse = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # not in LoRA
        matrix = weight.to(x.dtype)  # once, not once per chunk: a head can have 500 MB
        for rows, logits in HeadLogprobs.chunks(x, matrix, ctx.temperature):
            # grad * (onehot - softmax)
            slope = (logits - lse[rows, None]).exp_() * -grad[rows, None]
            slope.scatter_add_(1, targets[rows, None], grad[rows, None])
            slope = (slope / ctx.temperature).to(x.dtype)  # [chunk, V]
            grad_x[rows] = slope @ matrix
            if grad_weight is None:
                continue
            if x.dtype == weight.dtype:
                grad_weight.addmm_(slope.T, x[rows])  # without a second [V, H]
            else:
                grad_weight += slope.T @ x[rows]
        return grad_x, grad_weight, None, None


def score_completions(decoder: Decoder, prompts, completions, temperature: float = 1.0):
    """(logprobs, entropy, mask), each [P, G, C]: `token_logprobs`, and the entropy for the log.

    Each prompt runs once, with gradient, beside its G completions. All tokens lie end to end; only
    attention sees grids, where a completion's queries meet [prompt keys, its own keys].

    The softmax is over the ids below `decoder.vocab_limit`; an id from there on has -inf. Past a
    completion's end all three are 0; for an empty completion that is everywhere. ValueError for a
    temperature below COLDEST, groups of unequal size, more or fewer groups than prompts, and what
    `check_ids` refuses.
    """
    if not COLDEST <= temperature < math.inf:
        raise ValueError(f"log-probabilities need a temperature above 0, at least {COLDEST}")
    if len(prompts) != len(completions) or len({len(group) for group in completions}) > 1:
        raise ValueError("each prompt needs one group of completions, and all groups one size")
    check_ids(decoder, prompts, completions)
    device = decoder.head.device
    G = len(completions[0]) if completions else 0
    rows = [list(ids) for group in completions for ids in group]  # P*G
    prompt, target = Ragged(prompts, device), Ragged(rows, device)
    fed = Ragged([ids[:-1] for ids in rows], device)  # the last token predicts nothing
    N, L = len(prompt.tokens), fed.shape[1]  # L is C - 1
    causal = torch.ones(L, L, dtype=torch.bool, device=device).tril().expand(len(rows), L, L)
    inside = prompt.mask.repeat_interleave(G, 0)[:, None].expand(-1, L, -1)
    visible = torch.cat([inside, causal], -1)  # [P*G, L, T+L]

    def attend(_, q, k, v):
        prompt_q, prompt_k, prompt_v = (prompt.grid(x[:N]) for x in (q, k, v))  # [P, T, heads, D]
        out = prompt.flat(attention(prompt_q, prompt_k, prompt_v))
        if L == 0:
            return out
        # Here, unlike in the sampler's Cache, the prompt's keys are repeated for each completion:
        # autograd then sums their gradients over the group, which is what makes the shared prompt
        # exact (Prefix Grouper, arXiv 2506.05433), and one fast kernel does the rest. What is not
        # repeated is the work of the layers' matrices, which is most of the cost.
        k = torch.cat([prompt_k.repeat_interleave(G, 0), fed.grid(k[N:])], 1)  # [P*G, T+L, K, D]
        v = torch.cat([prompt_v.repeat_interleave(G, 0), fed.grid(v[N:])], 1)
        return torch.cat([out, fed.flat(attention(fed.grid(q[N:]), k, v, visible))])

    offset = prompt.lengths.repeat_interleave(G)[fed.rows]  # completions go on where prompts end
    positions = torch.cat([prompt.positions, offset + fed.positions])
    x = decoder.run(torch.cat([prompt.tokens, fed.tokens]), positions, attend)  # [N+.., H]
    # A completion's first token is predicted at its prompt's end, the others one token before.
    first = (prompt.starts + prompt.lengths - 1).repeat_interleave(G)[target.rows]
    before = N + fed.starts[target.rows] + target.positions - 1
    x = x.index_select(0, torch.where(target.positions == 0, first, before))
    if torch.is_autocast_enabled(device.type):  # HeadLogprobs' backward runs outside it
        x = x.to(torch.get_autocast_dtype(device.type))
    limit = decoder.vocab_limit
    weight = decoder.head[:limit]
    ids = target.tokens
    logprobs, entropy = HeadLogprobs.apply(x, weight, ids.clamp(max=limit - 1), temperature)
    logprobs = logprobs.masked_fill(ids >= limit, -math.inf)
    grids = target.grid(logprobs), target.grid(entropy), target.mask
    return tuple(grid.unflatten(0, (len(prompts), G)) for grid in grids)


def token_logprobs(decoder: Decoder, prompts, completions, temperature: float = 1.0):
    """(logprobs, mask), each [P, G, C]: log softmax(logits / temperature) of completion tokens.

    `completions` [P][G] are lists of ids; after each one's end mask and logprobs are 0.
    Differentiable in the decoder's parameters. ValueError at temperature 0.
    """
    logprobs, _, mask = score_completions(decoder, prompts, completions, temperature)
    return logprobs, mask


def micro_batches(sizes: Sequence[int], budget: int, padded: bool = False) -> list[list[int]]:
    """Indices of `sizes`, largest first, as many together as stay within `budget`; at least one.

    `padded`: each counts as much as the largest of its batch, since padding takes memory too.
    """
    batches, room, cost = [], 0, 0
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        if not padded:
            cost = sizes[n]  # padded: the cost stays that of the batch's first and largest
        if not batches or cost > room:
            batches.append([])
            room, cost = budget, sizes[n]
        batches[-1].append(n)
        room -= cost
    return batches


# ---- The encoder: BERT, for the reward model and the dense retriever ------------------------
#
# Bidirectional and post-norm; it shares no layer with the decoder, only the reading of checkpoints
# from "Files". retrieve.py pools its hidden states, reward.py puts a classifier on them.


class EncoderLayer(nn.Module):
    """One post-norm block: x = norm(x + attention(x)), then x = norm(x + mlp(x))."""

    def __init__(self, hidden: int, heads: int, inner: int, eps: float, dropout: list[float]):
        super().__init__()
        self.heads, self.dropout = heads, dropout  # dropout: of outputs, of attention weights
        self.qkv, self.o = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        outputs, weights = self.dropout if self.training else (0.0, 0.0)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=weights)
        x = self.attention_norm(x + F.dropout(self.o(out.transpose(1, 2).flatten(2)), outputs))
        return self.mlp_norm(x + F.dropout(self.down(F.gelu(self.up(x))), outputs))


ENCODER_NAMES = {
    "words": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings", "norm": "embeddings.LayerNorm",
    "layers": "encoder.layer", "o": "attention.output.dense",
    "qkv": "attention.self.query attention.self.key attention.self.value",
    "attention_norm": "attention.output.LayerNorm", "up": "intermediate.dense",
    "down": "output.dense", "mlp_norm": "output.LayerNorm", "pooler": "pooler.dense",
}  # fmt: skip


class Encoder(nn.Module):
    """BERT. `raw` is its config.json; `tokenizer` is set by load_encoder where there is one."""

    def __init__(self, raw: dict, where="config.json", pooler: bool = True):
        super().__init__()
        assumed = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
        for key, wanted in {"model_type": "bert", **assumed}.items():
            if (assumed | raw).get(key) != wanted:
                raise ValueError(f"{where}: {key} {raw.get(key)!r} is not {wanted}")
        number = partial(read_number, raw, where)
        hidden, heads = number("hidden_size"), number("num_attention_heads")
        if hidden % heads:
            raise ValueError(f"{where}: hidden_size is no multiple of num_attention_heads")
        eps, inner = number("layer_norm_eps", 1e-12, float), number("intermediate_size")
        keys = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        self.dropout = [number(key, 0.1, float, least=0) for key in keys]
        self.raw = {"type_vocab_size": 2} | raw
        self.hidden, self.tokenizer = hidden, None
        self.max_length = number("max_position_embeddings")
        self.words = nn.Embedding(number("vocab_size"), hidden)
        self.positions = nn.Embedding(self.max_length, hidden)
        self.segments = nn.Embedding(number("type_vocab_size", 2), hidden)
        self.norm = nn.LayerNorm(hidden, eps)
        shape, count = (hidden, heads, inner, eps, self.dropout), number("num_hidden_layers")
        self.layers = nn.ModuleList(EncoderLayer(*shape) for _ in range(count))
        self.pooler = nn.Linear(hidden, hidden) if pooler else None  # for reward.py's classifier
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None):
        """Hidden states [B, T, H] of tokens [B, T]; mask 0 is padding; segments are 0 or 1."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if tokens.numel() and positions.max() >= self.max_length:
            raise ValueError(f"a text is longer than the encoder's {self.max_length} tokens")
        segments = torch.zeros_like(tokens) if segments is None else segments
        tokens, segments = tokens.masked_fill(~mask, 0), segments.masked_fill(~mask, 0)
        x = self.norm(self.words(tokens) + self.positions(positions) + self.segments(segments))
        x = F.dropout(x, self.dropout[0], self.training)
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        visible = mask[:, None, None, :] | itself  # [B, 1, T, T]; padding sees itself too
        for layer in self.layers:
            x = layer(x, visible)
        return x

    def views(self) -> dict[str, Tensor]:
        """BERT's weight names, each with the part of our parameters that holds it."""
        return checkpoint_views(self, ENCODER_NAMES, dict(self.named_parameters()))


def load_encoder(directory, device="cpu", dtype=torch.float32) -> Encoder:
    """A BERT checkpoint, with or without `bert.` prefix, gamma/beta names, pooler, other heads."""
    directory = checkpoint_directory(directory)
    raw = read_json(directory / "config.json")

    def rename(name: str) -> str | None:
        if name.endswith("position_ids") or name.startswith(("cls.", "classifier.", "qa_outputs.")):
            return None  # a buffer, and the heads of other tasks
        name = name.removeprefix("bert.").replace("Norm.gamma", "Norm.weight")
        return name.replace("Norm.beta", "Norm.bias")

    tensors = renamed_weights(directory, rename)
    pooler = "pooler.dense.weight" in tensors
    make = partial(Encoder, raw, directory / "config.json", pooler)
    encoder = filled(make, tensors, directory, device, dtype)
    encoder.tokenizer = tokenizer_beside(directory, encoder.words.num_embeddings)
    return encoder


# ---- The tokenizer and its chat formats -----------------------------------------------------
#
# Texts and conversations become token ids, and back. The `tokenizers` library does the splitting;
# here are the chat formats, the EOS ids, and the border between text and control tokens.

# Not a character, by Unicode's definition: reserved for a program's own use. It precedes the name
# of a control token where a chat format means the token, and nowhere else: `as_text` removes it
# from all that comes from data or from the policy, so that no text can open a turn or end one.
MARK = "\ufdd0"

# The bars of R1's tokens are wide ones, U+FF5C.
R1 = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # 3.1's, pinned

# A chat template is a program, and it is not run. It is only searched for what it says beyond the
# format: a system turn in a string, in a variable, or as plain text, and whether it opens <think>.
QUOTED = r"(?P<text>(?:\\.|(?!(?P=mark))[^\\])+?)"  # the inside of a string, up to its mark
SYSTEM_TURN = rf"""(?P<mark>['"])<\|im_start\|>system(?:\\n|\n){QUOTED}<\|im_end\|>"""
SYSTEM_VARIABLE = rf"""set (?:default_)?system_message = (?P<mark>['"]){QUOTED}(?P=mark)"""
PLAIN_TURN = r"""<\|im_start\|>system\n(?P<text>[^{}'"]+?)<\|im_end\|>"""
UNUSED = r"\{#.*?#\}|\{%-? if tools\b.*?\{%-? (?:elif|else|endif)\b"  # comments; where tools are
THINK_OPENED = (
    r"(?:<｜Assistant｜>|assistant(?:<\|end_header_id\|>\\n)?(?:\\n|\n){1,2})<think>(?:\\n|\n)"
)


def as_text(text: str) -> str:
    """The text with U+FFFD for what is no character: half of a surrogate pair, and MARK."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace(MARK, "\ufffd")


@cache
def read_template(template: str) -> tuple[str, bool]:
    """(the system message that it inserts where a chat has none, whether it opens <think>)."""
    used = re.sub(UNUSED, "", template, flags=re.DOTALL)
    opens = re.search(THINK_OPENED, used) is not None
    for pattern in (SYSTEM_TURN, SYSTEM_VARIABLE):
        if found := re.search(pattern, used, re.DOTALL):  # its escapes are read as Jinja does
            text = found["text"].encode("ascii", "backslashreplace").decode("unicode-escape")
            return as_text(text), opens
    found = re.search(PLAIN_TURN, used)
    return found["text"] if found else "", opens


def default_system(known, template: str) -> str:
    """The system message that a ChatML model expects where a chat has none; "" for no such turn.

    That of its template; without one, that of the family that the tokens show.
    """
    if template:
        return read_template(template)[0]
    if "<think>" in known:
        return ""  # Qwen3, which has the other tokens of Qwen2.5
    if "<tool_call>" in known:
        return QWEN_SYSTEM
    return SMOLLM_SYSTEM if "<gh_stars>" in known else ""


def chat_format(known) -> tuple[str, ...] | None:
    """R1, CHATML or LLAMA3: the format whose control tokens are all among the `known` ones."""
    return next((names for names in (R1, CHATML, LLAMA3) if {*names} <= known.keys()), None)


def opening_of(known, template: str) -> str:
    """What the prompt says for the assistant: R1 and other reasoning models begin to think."""
    kind = chat_format(known)
    opened = read_template(template)[1] if template else kind is R1
    return "<think>\n" if kind and opened else ""


def without_old_reasoning(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Qwen3's rule: only what answers the last question keeps its reasoning."""
    tool = ("<tool_response>", "</tool_response>")  # such a message asks nothing
    asked = []
    for n, (role, text) in enumerate(turns):
        if role == "user" and not (text.startswith(tool[0]) and text.endswith(tool[1])):
            asked.append(n)
    last = asked[-1] if asked else len(turns) - 1
    found = []
    for n, (role, content) in enumerate(turns):
        if role == "assistant":
            thought = ""
            if "</think>" in content:
                thought = content.partition("</think>")[0].rpartition("<think>")[2].strip("\n")
                content = content.rpartition("</think>")[2].lstrip("\n")
            if n > last and (thought or n == len(turns) - 1):
                content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
        found.append((role, content))
    return found


def render_chat(messages: list[dict], known, template: str = "") -> str | None:
    """The chat as text, ready for the assistant's turn; None if the `known` tokens show no format.

    The format is recognised by the special tokens that only its family has; the checkpoint's
    template, if there is one, says what differs within a family.
    """
    turns = [(m["role"], m["content"]) for m in messages]
    kind, said = chat_format(known), opening_of(known, template)
    if kind is None:
        return None
    if kind is R1:
        bos, eos, user, assistant = (MARK + name for name in R1)
        text = bos + next((content for role, content in reversed(turns) if role == "system"), "")
        for role, content in turns:
            if role == "user":
                text += user + content
            elif role == "assistant":
                text += assistant + content.split("</think>")[-1] + eos
        return text + assistant + said
    opened = bool(turns) and turns[0][0] == "system"  # the chat begins with a system message
    if kind is CHATML:
        begin, head, end = "", f"{MARK}<|im_start|>{{}}\n", f"{MARK}<|im_end|>\n"
        if "<think>" in known and (not template or "</think>" in template):  # Qwen3
            turns = without_old_reasoning(turns)
        default = default_system(known, template)
        if default and not opened:
            turns = [("system", default), *turns]
    else:  # LLAMA3
        head = f"{MARK}<|start_header_id|>{{}}{MARK}<|end_header_id|>\n\n"
        begin, end = f"{MARK}<|begin_of_text|>", f"{MARK}<|eot_id|>"
        turns = [(role, content.strip()) for role, content in turns]
        if "<|eom_id|>" in known:  # Llama 3.1 and later always open with two dates
            system = turns.pop(0)[1] if opened else ""
            turns = [("system", LLAMA_DATES + system), *turns]
    text = "".join(head.format(role) + content + end for role, content in turns)
    return begin + text + head.format("assistant") + said


class Tokenizer:
    """tokenizer.json with its EOS ids and chat. `files` {name: content} are what `save` writes.

    Control tokens come from the chat format and from the [CLS] and [SEP] of a pair, never from
    what a text spells. Apart from that, ids equal transformers'.
    """

    def __init__(self, backend: Backend, eos_ids=(), files: dict | None = None):
        backend.no_truncation()  # tokenizer.json may switch on either
        backend.no_padding()
        self.backend = backend
        self.files = files or {"tokenizer.json": backend.to_str()}
        self.vocabulary = backend.get_vocab(with_added_tokens=True)
        self.size = max(self.vocabulary.values(), default=-1) + 1
        self.eos_ids = frozenset(eos_ids)
        added = backend.get_added_tokens_decoder().items()
        think = ("<think>", "</think>")  # the policy has to write them; we read them
        # An added token that ends a text is special, even if tokenizer.json does not say so.
        special = {i: t.content for i, t in added if t.special or i in self.eos_ids}
        self.skipped = {i for i, content in special.items() if content not in think}
        # R1's "<｜User｜>" opens a turn, but its tokenizer.json does not call it special.
        markers = {*R1, *CHATML, *LLAMA3}
        self.control = {t.content for i, t in added if i in self.skipped or t.content in markers}
        self.opening = opening_of(self.vocabulary, self.template)  # ends the prompt

    @property
    def end_id(self) -> int:
        """The EOS id that ends an assistant's turn in the chat format, else the lowest one."""
        if not self.eos_ids:
            raise ValueError("the tokenizer knows no EOS token")
        ends = (self.vocabulary.get(name) for name in (CHATML[1], LLAMA3[3], R1[1]))
        return min([i for i in ends if i in self.eos_ids] or self.eos_ids)

    @cached_property
    def template(self) -> str:
        """The checkpoint's chat template, a program in Jinja's language; "" if it has none."""
        if "chat_template.jinja" in self.files:
            found = self.files["chat_template.jinja"]
            return found if isinstance(found, str) else found.decode("utf-8", "replace")
        found = json.loads(self.files.get("tokenizer_config.json", "{}")).get("chat_template")
        if isinstance(found, list):  # several: [{"name", "template"}]
            named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
            found = named[0].get("template") if named else ""
        return found if isinstance(found, str) else ""

    @cached_property
    def reader(self) -> Backend:
        """The backend that encodes. In it the name of every control token begins with MARK, so no
        text can spell one. Their ids stay, and so does everything else.
        """
        tokenizer = json.loads(self.backend.to_str())
        model = tokenizer["model"]
        added = tokenizer["added_tokens"]

        def rename(name):
            return MARK + name if name in self.control else name

        if isinstance(model["vocab"], dict):
            model["vocab"] = {rename(name): i for name, i in model["vocab"].items()}
        else:  # Unigram's pieces with their scores
            model["vocab"] = [[rename(name), score] for name, score in model["vocab"]]
        if "merges" in model:  # BPE's: a pair may neither make nor use what has another name now
            model["merges"] = [
                pair for pair in model["merges"] if not self.control & {*pair, "".join(pair)}
            ]
        if model.get("unk_token"):
            model["unk_token"] = rename(model["unk_token"])
        tokenizer["added_tokens"] = [t | {"content": rename(t["content"])} for t in added]
        return Backend.from_str(json.dumps(tokenizer))

    def split(self, text: str, second: str | None = None, special: bool = False):
        """The `tokenizers` library's Encoding of a text or a pair; ValueError if it has none."""
        try:
            return self.reader.encode(text, second, add_special_tokens=special)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the tokenizer cannot encode {text[:40]!r}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no [CLS], and no control token that the text spells."""
        return self.split(as_text(text)).ids

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens (EOS, padding, BOS); <think> and </think> are kept."""
        ids = [i for i in ids if i not in self.skipped]
        return self.backend.decode(ids, skip_special_tokens=False)

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation of {"role", "content"} up to where the assistant's turn begins.

        A chat format brings its own BOS, so none is added. A tokenizer that shows none of the
        formats gets the contents as plain text, with its BOS, and a warning.
        """
        roles = ("system", "user", "assistant")
        for m in messages:
            fields = m if isinstance(m, dict) else {}
            if fields.get("role") not in roles or not isinstance(fields.get("content"), str):
                raise ValueError(f"a message needs a role of {roles} and a content, not {m!r}")
        messages = [m | {"content": as_text(m["content"])} for m in messages]
        text = render_chat(messages, self.vocabulary, self.template)
        if text is not None:
            return self.split(text).ids
        names = "R1-Distill, ChatML (Qwen, SmolLM) and Llama 3"
        warnings.warn(
            f"the tokenizer shows no chat format known here ({names}): messages are sent as plain "
            "text, which an instruct model of another format may not answer well",
            stacklevel=1,  # this line: so Python shows it once, whoever calls
        )
        plain = "".join(m["content"] + "\n\n" for m in messages)
        return self.split(plain, special=True).ids

    def encode_pair(self, first: str, second: str | None, max_length: int):
        """BERT's ids and segments of [CLS] first [SEP] second [SEP], the longer text cut to fit;
        without a second text those of [CLS] first [SEP].
        """
        self.reader.enable_truncation(max_length)
        second = None if second is None else as_text(second)
        encoding = self.split(as_text(first), second, special=True)
        self.reader.no_truncation()
        return encoding.ids, encoding.type_ids

    def cut(self, text: str, tokens: int) -> str:
        """A beginning of `text`, of whole characters, that takes at most `tokens` tokens."""
        text = as_text(text)
        if tokens <= 0:
            return ""  # the loop would keep a text that has no tokens at all
        while True:  # what is left may split into other, more tokens
            offsets = self.split(text).offsets
            if len(offsets) <= tokens:
                return text
            text = text[: offsets[tokens][0]]  # where the first token too many begins

    def save(self, directory) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            with replacing(Path(directory) / name) as temporary:
                content = content.encode() if isinstance(content, str) else content
                temporary.write_bytes(content)


def checkpoint_directory(directory) -> Path:
    """The path, if there is such a directory; else an error that says how to get the files."""
    path = Path(directory)
    if not path.is_dir():
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory))  # like a model on the hub
        folder = f"models/{path.name}"
        get = f"hf download {directory} --local-dir {folder}"
        hint = f"; if it is a model of the Hugging Face hub: {get}, then give {folder}"
        raise FileNotFoundError(f"{directory}: no such directory{hint if named else ''}")
    return path


# Files other programs may want beside a trained checkpoint: they are copied unchanged.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
    "chat_template.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def load_tokenizer(directory) -> Tokenizer:
    """tokenizer.json; its EOS ids are the union of what all the checkpoint's settings name."""
    directory = checkpoint_directory(directory)
    path = directory / "tokenizer.json"
    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8-sig"))
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error})") from None
    if not backend.get_vocab_size():
        raise ValueError(f"{path}: its vocabulary is empty")
    eos_ids = []
    for kind in ("generation_config", "config", "tokenizer_config", "special_tokens_map"):
        file = directory / f"{kind}.json"
        content = read_json(file) if file.is_file() else {}
        ids = content.get("eos_token_id")
        token = content.get("eos_token")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise ValueError(f"{file}: eos_token_id {ids} is not a token id")
        token = token.get("content") if isinstance(token, dict) else token
        known = backend.token_to_id(token) if isinstance(token, str) else None
        eos_ids += ids if known is None else [*ids, known]
    found = (directory / name for name in TOKENIZER_FILES)
    files = {file.name: file.read_bytes() for file in found if file.is_file()}
    return Tokenizer(backend, eos_ids, files)


# ---- Files: never half-written, never trusted -----------------------------------------------
#
# Text, JSON and safetensors, in and out. Every file is replaced as a whole, and whatever is wrong
# with one that is read becomes an error that names it.


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path`; on success it is synced and renamed to `path`.

    A reader, or a run that was killed, finds the old file or the new one, never a part of one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk's error names no file
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path, kind: type = dict):
    """The JSON of a file whose top level is a `kind`; ValueError names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); is the download complete?") from None
    if not isinstance(value, kind):
        name = "list" if kind is list else "object"
        raise ValueError(f"{path}: the top level is not a JSON {name}")
    return value


def read_lines(path) -> list[dict]:
    """The records of a JSON Lines file; ValueError names file and line.

    What follows the last line break, nothing or the half line of a killed process, is left out.
    """
    records = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # b"", or half a line
                break
            raise ValueError(f"{path}: line {number} is not valid JSON ({error})") from None
        if not isinstance(records[-1], dict):
            raise ValueError(f"{path}: line {number} is not a JSON object")
    return records


def to_lines(records: list[dict]) -> str:
    """The records as JSON Lines, which `read_lines` reads."""
    return "".join(json.dumps(record) + "\n" for record in records)


def write_lines(path, records: list[dict]) -> None:
    write_text(path, to_lines(records))


def append(path, records: list[dict]) -> None:
    """Adds whole lines to a JSON Lines file: all of them, or on a full disk none."""
    text = memoryview(to_lines(records).encode())
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            while text:  # a nearly full disk takes only a part
                text = text[file.write(text) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from None


def read_steps(path) -> list[dict]:
    """The records of a JSON Lines file of which each says its step."""
    lines = read_lines(path)
    if not all(isinstance(line.get("step"), int) for line in lines):
        raise ValueError(f"{path}: a line does not say its step")
    return lines


def rewind(path, steps: int) -> list[dict]:
    """Drops the lines of steps after `steps`, and a half-written one; returns what is left."""
    lines = read_steps(path) if path.is_file() else []
    kept = [line for line in lines if line["step"] <= steps]
    write_lines(path, kept)
    return kept


def check_room(path, size: int) -> None:
    """OSError if the disk has no room for `size` more bytes: the old file stays until the new is
    whole, so replacing a file needs its size once more."""
    free = shutil.disk_usage(Path(path).parent).free
    if size > free:
        need = f"needs {size / 1e6:,.0f} MB of free disk, {free / 1e6:,.0f} MB are left"
        raise OSError(errno.ENOSPC, f"not written, it {need}", str(path))


DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "U64": torch.uint64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def read_safetensors(path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, memory-mapped: a page is read when it is first touched.

    Format: 8 bytes little-endian header length; a JSON header {name: {dtype, shape,
    data_offsets}} in UTF-8, without a byte order mark; the bytes, which the ranges must tile: no
    hole, no overlap, nothing after them (`_ranges` checks that and all entries). A range may begin
    at any byte; a tensor may be empty. Writing to a tensor does not change the file, writing a new
    file in its place does not change the tensors. Faulty bytes, also a repeated name or endless
    nesting, are a ValueError that names the file; a path without a file a FileNotFoundError.
    """

    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice in the header")
        return dict(pairs)

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start > size:
                raise ValueError("the file ends before its header; is the download complete?")
            if start > 8 + 100_000_000:  # the format's own limit
                raise ValueError("its header is longer than 100 MB")
            text = file.read(start - 8).decode("utf-8")
            header = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
            if not isinstance(header, dict):
                raise ValueError("the header is not a JSON object")
            ranges = _ranges(header, size - start)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    tensors, data = {}, torch.frombuffer(data, dtype=torch.uint8)
    for name, (begin, end, dtype, shape) in ranges.items():
        flat = data[start + begin : start + end]
        if (start + begin) % dtype.itemsize:  # the format does not promise alignment
            flat = flat.clone()
        tensors[name] = flat.view(dtype).view(shape)
    return tensors


def _ranges(header: dict, size: int) -> dict[str, tuple]:
    """name -> (begin, end, dtype, shape), all checked against each other and the buffer's size."""
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not a map of strings")
    ranges = {}
    for name, entry in header.items():
        name.encode()  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name}: unknown dtype {dtype!r}")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"{name}: shape and data_offsets must be lists of numbers >= 0")
        if math.prod(max(n, 1) for n in shape) > 2**60:  # torch overflows, also if one n is 0
            raise ValueError(f"{name}: shape {shape} is too large")
        wanted = math.prod(shape) * DTYPES[dtype].itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != wanted:
            raise ValueError(f"{name}: data_offsets {offsets} do not hold {dtype} {shape}")
        ranges[name] = (*offsets, DTYPES[dtype], shape)
    covered = 0
    for begin, end, name in sorted((*r[:2], name) for name, r in ranges.items()):
        if begin != covered:
            raise ValueError(f"{name}: its bytes start at {begin} instead of at {covered}")
        covered = end
    if covered != size:
        raise ValueError(f"the tensors fill {covered} bytes, but {size} follow the header")
    return ranges


def write_safetensors(path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    """Writes `tensors` (any strides, any device) as one .safetensors file, atomically."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    metadata = {"format": "pt"} if metadata is None else metadata
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"{path}: metadata must map strings to strings")
    header, offset = {"__metadata__": metadata}, 0
    # Large elements first: then each tensor begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        x, begin = tensors[name], offset
        if name in header or x.dtype not in codes or name != as_text(name):
            raise ValueError(f"{path}: cannot write a tensor named {name!r} of {x.dtype}")
        if x.layout != torch.strided:
            raise ValueError(f"{path}: cannot write {name!r}, which is {x.layout}")
        offset += x.numel() * x.element_size()
        header[name] = {"dtype": codes[x.dtype], "shape": list(x.shape)}
        header[name]["data_offsets"] = [begin, offset]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
            if len(flat):  # an empty tensor cannot be viewed as bytes
                file.write(flat.view(torch.uint8).numpy())


def read_checkpoint(directory) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `model.safetensors`, or exactly the shards its index names."""
    directory = Path(directory)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if not index.is_file():
        hint = ""
        if list(directory.glob("pytorch_model*.bin")):
            hint = "; a pickled pytorch_model.bin is not opened here: save it as safetensors first"
        raise FileNotFoundError(f"{directory}: no {single.name} and no {index.name}{hint}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{index}: no weight_map from names to files")
    tensors = {}
    for shard in sorted(set(shards.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):  # so no way out of the directory
            raise ValueError(f"{index}: shard {shard!r} is not a plain .safetensors file name")
        found = read_safetensors(directory / shard)
        odd = {name for name, file in shards.items() if file == shard} ^ found.keys()
        if odd:
            raise ValueError(f"{directory / shard}: differs from {index.name} in {min(odd)}")
        tensors |= found
    return tensors


def renamed_weights(directory, rename) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names that rename(name) gives them; without those that get
    None. ValueError if two get the same.
    """
    tensors = {}
    for old, tensor in read_checkpoint(directory).items():
        name = rename(old)
        if name in tensors:
            raise ValueError(f"{directory}: {name} is in the checkpoint under two names")
        if name is not None:
            tensors[name] = tensor
    return tensors


def tokenizer_beside(directory: Path, vocabulary: int) -> "Tokenizer | None":
    """The checkpoint's tokenizer, if it has one; ValueError if that has ids beyond the model's."""
    if not (directory / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(directory)
    if tokenizer.size > vocabulary:
        raise ValueError(f"{directory}: tokenizer.json has ids beyond the model's {vocabulary}")
    return tokenizer


def config_with_dtype(raw: dict, dtype: torch.dtype) -> dict:
    """A config.json that names the precision of its weights, under the key that it had for it."""
    key = "dtype" if "dtype" in raw else "torch_dtype"
    return raw | {key: str(dtype).removeprefix("torch.")}


def checkpoint_views(module: nn.Module, names: dict[str, str], state) -> dict[str, Tensor]:
    """A checkpoint's weight names, each with the part of a tensor of `state` that holds it.

    `names` translates each step of a parameter's path. A fused matrix has several names, one for
    each block of its rows: `rows` of our Linear says where to cut; BERT's blocks are equal.
    """
    found = {}
    for path, parameter in state.items():
        *outer, own, kind = path.split(".")
        prefix = "".join(f"{names.get(step, step)}." for step in outer)
        fused = names[own].split()
        linear = module.get_submodule(".".join([*outer, own]))
        blocks = parameter.detach().split(getattr(linear, "rows", len(parameter) // len(fused)))
        found |= {f"{prefix}{name}.{kind}": b for name, b in zip(fused, blocks, strict=True)}
    return found


def filled(make, tensors: dict[str, Tensor], directory, device, dtype) -> nn.Module:
    """make() with a checkpoint's weights: copied into `views`, which share the module's memory."""
    with torch.device("meta"):
        module = make()
    shapes = {name: list(view.shape) for name, view in module.views().items()}
    missing, left = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    for problem, names in (("lacks", missing), ("has weights that do not belong here:", left)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            names = ", ".join(sorted(names)[:3])
            raise ValueError(f"{directory}: the checkpoint {problem} {names}{more}")
    for name, wanted in shapes.items():
        found = tensors[name]
        if list(found.shape) != wanted or not found.is_floating_point():
            kind = f"{found.dtype} {list(found.shape)}"
            asked = f"config.json asks for floating point {wanted}"
            raise ValueError(f"{directory}: {name} is {kind}, {asked}")
    module = module.to(dtype).to_empty(device=device).eval()  # only now it takes memory
    for name, view in module.views().items():
        view.copy_(tensors[name])
        if not torch.stack(view.aminmax()).isfinite().all():  # else it would sample garbage
            raise ValueError(f"{directory}: {name} holds NaN or infinity; is the file damaged?")
    return module


def read_number(raw: dict, where, key: str, default=None, kind: type = int, least=1e-30):
    """The number raw[key] of a config, or the default where it is absent or null."""
    value = default if raw.get(key) is None else raw[key]
    good = isinstance(value, int | kind) and not isinstance(value, bool)
    if not good or not least <= value < 1e18:
        wanted = "an integer" if kind is int else "a number"
        bound = "above 0" if least > 0 else "of at least 0"
        raise ValueError(f"{where}: {key!r} must be {wanted} {bound}, not {value!r}")
    return kind(value)


# ---- Results: a directory knows what made it ------------------------------------------------
#
# Every command that leaves files keeps its options beside them, with a fingerprint of the code and
# of the inputs. Started again, it resumes what is its own and refuses what is another's.


PATHS = {"model", "data", "encoder", "reward_model"}  # compared by content, not by spelling


def beside(path: str) -> str:
    """A path beside this file, relative to the working directory."""
    return os.path.relpath(Path(__file__).resolve().parent / path)


def fingerprint(*paths) -> str:
    """Twelve hex digits of files' contents; of a directory, its .json, .jinja, .safetensors files.

    A Python file counts by its syntax tree: comments and layout may change, docstrings may not.
    Versions of Python that write a tree differently give other digits.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(
                f for f in path.iterdir() if f.suffix in (".json", ".jinja", ".safetensors")
            )
        for file in files:
            digest.update(file.name.encode())
            if file.suffix == ".py":
                digest.update(ast.dump(ast.parse(file.read_bytes())).encode())
            else:
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


def recipe(o, inputs: dict[str, list]) -> dict:
    """What makes a result: the command's options, its code, and its inputs by their contents."""
    chapter = Path(inspect.getsourcefile(type(o)))
    found = {name: fingerprint(*paths) for name, paths in inputs.items()}
    code = code_of(chapter)
    return dataclasses.asdict(o) | {"command": chapter.name, "code": code, "inputs": found}


@cache  # what runs is what was loaded, though the file may be edited since
def code_of(chapter: Path) -> dict[str, str]:
    """The fingerprints of a chapter and those that it builds on."""
    chapters = CHAPTERS[: CHAPTERS.index(chapter.name) + 1]
    return {name: fingerprint(chapter.with_name(name)) for name in chapters}


def differences(theirs: dict, mine: dict, ignored=()) -> dict[str, tuple]:
    """{what: (theirs, mine)} of two recipes, code and inputs file by file."""
    changed = {}
    for name in mine.keys() - {*ignored, *PATHS, "out", "overwrite", "force", "preset"}:
        old, new = theirs.get(name), mine[name]
        if name in ("code", "inputs"):
            old = old or {}
            for part in sorted(old.keys() | new.keys()):
                if old.get(part) != new.get(part):
                    changed[part] = (old.get(part), new.get(part))
        elif old != new:
            changed[name] = (old, new)
    return dict(sorted(changed.items()))


def open_result(o, inputs: dict[str, list], record="config.json") -> Path:
    """The directory o.out, made or opened again; ValueError if it holds another result.

    `inputs` names the files and directories that the result depends on. A path counts by what it
    leads to, so a result may be moved. Options in `o.free` do not change the result. Those in
    `o.adjustable`, and with --force the code, may change too: `adopt` records that.
    """
    out, mine = Path(o.out), recipe(o, inputs)
    whole = out.resolve()  # what --overwrite replaces is the directory, not a link to it
    old = whole.with_name(f".{whole.name}.overwritten.tmp")
    config = out / record
    theirs = read_json(config) if config.is_file() else {}
    if "out" in theirs:  # a model's config.json, for one, is not ours, and not ours to delete
        if theirs.get("command") != mine["command"]:
            command = theirs.get("command", "another program")
            raise ValueError(f"{out} holds a result of {command}: choose another --out")
        accepted = {*getattr(o, "free", ()), *getattr(o, "adjustable", ())}
        changed = differences(theirs, mine, accepted)
        if getattr(o, "force", False):
            changed = {name: both for name, both in changed.items() if name not in CHAPTERS}
        if changed and o.overwrite:
            for path in (path for paths in inputs.values() for path in paths):
                if Path(path).resolve().is_relative_to(whole):
                    text = f"{path} lies in {out}, which --overwrite would delete"
                    raise ValueError(f"{text}: choose another --out")
            shutil.rmtree(old, ignore_errors=True)
            whole.rename(old)  # so that a crash leaves no half-deleted result
            whole.mkdir()
        elif changed:
            raise ValueError(f"{out} holds another result: {explain(changed)}")
    elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no result: choose another --out")
    shutil.rmtree(old, ignore_errors=True)  # before anything is written: it may fill the disk
    if not config.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_json(config, mine)
    for left in out.rglob(".*.tmp"):  # of a process that was killed while it wrote
        left.unlink()
    return out


def adopt(o, names) -> None:
    """Records what has changed of `names`, options or chapters, in a resumed run's config.json.

    The run calls it when it goes to work with them: a command that is refused, or that has nothing
    to do, leaves the record as it was.
    """
    config = Path(o.out) / "config.json"
    theirs = read_json(config)
    changed = differences(theirs, recipe(o, inputs={}), {"inputs"})
    changed = {name: both for name, both in changed.items() if name in names}
    if changed:
        new = {name: now for name, (_, now) in changed.items()}
        code = theirs["code"] | {name: new.pop(name) for name in CHAPTERS if name in new}
        changes = [*theirs.get("changes", []), changed]
        write_json(config, theirs | new | {"code": code, "changes": changes})
        words = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        print(f"{o.out} is resumed with {words}")


def explain(changed: dict[str, tuple]) -> str:
    """A sentence on how a directory's recipe differs, and what to do."""
    words = []
    for name, (old, new) in changed.items():
        if name in CHAPTERS:
            words.append(f"{name} has been edited since, or runs under another version of Python")
        elif name in PATHS:
            words.append(f"--{name.replace('_', '-')} leads to other files")
        else:
            words.append(f"{name} {old!r} -> {new!r}")
    return f"{', '.join(words)}. Choose another --out, or --overwrite to start anew"


@contextmanager
def alone(out):
    """Holds a directory for this process; the system releases it however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    out = Path(out).resolve()  # a link to a directory leads to the same lock
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.parent / f".{out.name}.lock"  # beside it, where --overwrite does not reach
    if out.is_dir() and not os.access(out.parent, os.W_OK):
        lock = out / ".lock"  # a volume mounted into a directory that is not ours
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is working in {out}") from None
        yield


# ---- Several processes, which torchrun starts -----------------------------------------------
#
# Every process runs the same program. What only one of them may do goes through `on_first`, what
# all must know through `gather`; without torchrun both are plain calls.


def rank_and_world_size() -> tuple[int, int]:
    """Which process this is, counted from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value) -> list:
    """The value of every process, by rank. All must come here, and each waits for all."""
    values = [value] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_first(make):
    """make() in the first process alone; the others wait for its value."""
    return gather(make() if rank_and_world_size()[0] == 0 else None)[0]


@contextmanager
def processes():
    """Joins the processes that torchrun has started, if it has; a lost one ends them all."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(hours=1))  # the first may train a reward model
    if dist.get_rank():
        sys.stdout = io.StringIO()  # only one prints
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "by peer" not in str(error):  # gloo's words
            raise
        reason = str(error).strip().split("\n")[0]
        text = "another process of the run has ended; the same command resumes from what is saved"
        raise ValueError(f"{text} ({reason})") from error
    dist.destroy_process_group()


# ---- Device and precision -------------------------------------------------------------------
#
# Where a model lives, and in which precision it multiplies: the same in every command.


Precision = Literal["auto", "float32", "bfloat16"]


def pick_device(name: str) -> str:
    """`auto` is the best of cuda, mps and cpu that this machine has."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        found = torch.empty(0, device=name)
        found.tolist()  # "meta" is a device that holds no data
        return str(found.device)
    except (RuntimeError, AssertionError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"--device {name}: this machine, or this torch, has none") from None


def product_dtype(precision: str, device) -> torch.dtype:
    """The precision of matrix products; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    low = precision == "bfloat16" or (precision == "auto" and str(device).startswith("cuda"))
    return torch.bfloat16 if low else torch.float32


def products(precision: str, device) -> torch.autocast:
    """A context in which matrix products are computed in that precision."""
    low = product_dtype(precision, device) == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=low)


def load_policy(o) -> tuple[Decoder, Tokenizer]:
    """The checkpoint o.model, to sample from, in the precision that the options ask for.

    The same weights sample the same in every command: rl.py's copy for sampling is rounded alike.
    """
    device = pick_device(o.device)
    dtype = product_dtype(o.precision, device)
    return load_decoder(o.model, device, dtype), load_tokenizer(o.model)


# ---- The command line, shared by all chapters -----------------------------------------------
#
# Each command's options are a dataclass; a field's comment is its help. Progress, stopping and
# errors look the same everywhere.


# Control characters show as pictures of themselves (U+2400 is NUL's); what would reorder the text
# around it, or is no character, as the replacement character.
ODD = {n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n"} | {
    n: "\ufffd"
    for first, last in ((0x7F, 0x9F), (0x202A, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF))
    for n in range(first, last + 1)
}


def printable(text: str) -> str:
    """Text of the data or of the policy for a terminal or a page: nothing in it acts there."""
    return text.translate(ODD)


class Progress(tqdm):
    """tqdm's bar on a terminal; in a log file or a pipe, a line a minute at most."""

    def __init__(self, iterable=None, desc=None, total=None, **more):
        self.in_lines = not sys.stderr.isatty()
        if self.in_lines:
            more |= {"mininterval": 60, "maxinterval": 60, "miniters": 1, "delay": 59}
            more |= {"bar_format": "{desc}: {n_fmt} of {total_fmt}, {remaining} left{postfix}"}
        if rank_and_world_size()[0] > 0:
            more["disable"] = True
        super().__init__(iterable, desc, total, leave=False, **more)

    def display(self, msg=None, pos=None):
        if not self.in_lines:
            return super().display(msg, pos)
        if msg is None:  # "" asks to wipe a bar away
            print(self, file=sys.stderr, flush=True)
        return False

    def set_postfix(self, **shown):
        super().set_postfix(refresh=not self.in_lines, **shown)

    def close(self):
        if hasattr(self, "start_t"):  # set last: Ctrl-C may come while tqdm builds the bar
            super().close()

    @classmethod
    def write(cls, s, file=None, end="\n", nolock=False):
        super().write(s, file, end, nolock)
        (file or sys.stdout).flush()


class Lasting:
    """A stream that outlives its reader: after Ctrl-C, `| tee` ends before the run has saved."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act, *what) -> None:
        try:
            act(*what)
        except OSError:  # nobody reads, or its disk is full: what the run saves matters more
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


class Stop:
    """Ctrl-C and SIGTERM end the process, with status 130 and 143; nothing that is saved is lost.

    Within a training loop they wait until the step is finished and saved; a second one does not.
    """

    def __init__(self):
        self.signal, self.in_loop = None, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, _frame) -> None:
        if self.signal is not None or not self.in_loop:
            self.leave(number)
        self.signal = number
        print("\nstopping after this step (again: at once)", file=sys.stderr)

    def leave(self, number) -> None:
        print("\nstopped; the same command resumes from what is saved", file=sys.stderr)
        sys.exit(128 + number)


def presets_of(options: type) -> dict[str, dict]:
    """{preset: {field: value}}, gathered from the `presets` of the class and those it extends."""
    found: dict[str, dict] = {}
    for kind in reversed(options.__mro__):
        for name, values in vars(kind).get("presets", {}).items():
            found.setdefault(name, {}).update(values)
    return found


def parse_options(options: type, description: str, arguments: list[str] | None = None):
    """(options, debug): a dataclass as flags; the comment beside a field is the flag's help.

    Where there are `presets`, the values of the one that is asked for, or of the one that
    `choose_preset` finds for the model, take the place of the defaults.
    """
    classes = [c for c in options.__mro__[::-1] if dataclasses.is_dataclass(c)]
    source = "".join(map(inspect.getsource, classes))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        None, "%(prog)s [options]", description, formatter_class=layout
    )
    groups = {}  # one for each chapter that brings options
    for kind in classes:
        title = f"options of {Path(inspect.getsourcefile(kind)).name}"
        groups |= {name: title for name in kind.__annotations__ if name not in groups}
    shown = {title: parser.add_argument_group(title) for title in dict.fromkeys(groups.values())}
    for name, kind in typing.get_type_hints(options).items():
        default, inner = getattr(options, name), typing.get_args(kind)
        if typing.get_origin(kind) is typing.Literal:
            how = {"choices": inner}
        elif kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": inner[0] if inner else kind}  # X of "X | None"
        text = f"{comments[name]} (default: {default})".replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        shown[groups[name]].add_argument(flag, default=default, help=text, **how)
    parser.error = lambda text: parser.exit(2, f"error: {text} (--help lists the options)\n")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parsed = vars(parser.parse_args(arguments))
    if "preset" in parsed:
        if parsed["preset"] == "auto":
            try:
                parsed["preset"] = options.choose_preset(parsed["model"])
            except (ValueError, OSError) as error:
                parser.exit(2, f"error: {error}\n")
        preset = parsed["preset"]
        parser.set_defaults(**presets_of(options).get(preset, {}))
        # Once more, over the preset's defaults: a flag that was given wins.
        parsed = vars(parser.parse_args(arguments)) | {"preset": preset}
    debug = parsed.pop("debug")
    return options(**parsed), debug


ABOVE_0 = math.ulp(0.0)  # in `bounds`: any number above 0


def check_bounds(o) -> None:
    """ValueError for an option below what its class says in `bounds`, {least value: names}.

    No value may reach 2^62: torch takes seeds below 2^64, and small numbers are added to them.
    """
    for kind in type(o).__mro__:
        for least, names in vars(kind).get("bounds", {}).items():
            for name in names.split():
                value = getattr(o, name)
                if value is None or least <= value < 2**62:
                    continue
                wanted = "above 0" if least == ABOVE_0 else f"at least {least}"
                if value >= 2**62:
                    wanted = "below 2^62"
                raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the machine's, was too small."""
    known = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # MPS, CPU, cuBLAS
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in known)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def advice_on_memory(options: type) -> str:
    """Which of a command's flags make it need less memory, without changing what it computes."""
    flags = {
        "checkpointing": "take --checkpointing",
        "tokens_per_micro_batch": "lower --tokens-per-micro-batch",
        "batch_size": "lower --batch-size",
    }
    known = [text for name, text in flags.items() if hasattr(options, name)]
    return "out of memory: " + (" or ".join(known) or "take a smaller model")


def in_one_line(error: Exception) -> str:
    """What is printed of an error: its text, or for a file the name and the system's words."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"  # without the number in front
    return "error: " + printable(text)


def command(main, options: type, description: str) -> None:
    """Runs main(options); a mistake in what it was given is one line and exit status 2."""
    for name in ("stdout", "stderr"):  # a scheduler may have started it without them
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115
    # Data may hold what a terminal cannot show; and a log is read while it grows.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    chosen, debug = parse_options(options, description)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        check_bounds(chosen)
        main(chosen)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        full = is_out_of_memory(error)
        if debug or not (full or isinstance(error, ValueError | OSError)):
            raise
        print(
            f"error: {advice_on_memory(options)}" if full else in_one_line(error), file=sys.stderr
        )
        sys.exit(2)
    if dist.is_torchelastic_launched():
        # A thread of gloo may drop a Python object late. If the interpreter is shutting down by
        # then, the process aborts, though all its work is done; so leave without a shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@dataclass
class Options:
    bounds = {0: "temperature seed", 1: "group_size max_new_tokens"}  # noqa: RUF012
    model: str = beside("toy/policy")  # checkpoint directory of the language model
    prompt: str = "Hello."  # what the user says
    group_size: int = 1  # completions to sample
    max_new_tokens: int = 256  # longest completion, in tokens
    temperature: float = 0.7  # 0 is greedy
    seed: int = 0  # of the sampling noise
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: Precision = "auto"  # of matrix products; auto: bfloat16 on CUDA


def main(o: Options) -> None:
    decoder, tokenizer = load_policy(o)
    groups = generate(
        decoder,
        [tokenizer.chat([{"role": "user", "content": o.prompt}])],
        group_size=o.group_size,
        max_new_tokens=o.max_new_tokens,
        temperature=o.temperature,
        eos_ids=tokenizer.eos_ids,
        seed=o.seed,
    )
    for completion in groups[0]:
        print(printable(tokenizer.opening + tokenizer.decode(completion.tokens)))
        print(f"[{len(completion.tokens)} tokens, log-probability {sum(completion.logprobs):.2f}]")


if __name__ == "__main__":
    command(main, Options, __doc__)
