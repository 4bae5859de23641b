"""The language model: a Hugging Face checkpoint read by hand, in plain PyTorch.

  Decoder          Qwen2 (so Qwen2.5 and R1-Distill), Qwen3, Llama
  generate         samples G completions of each of P prompts, with a key-value cache
  token_logprobs   the log-probability of every completion token, with gradient
  Encoder          the BERT family, for the reward model and the dense retriever
  Tokenizer        tokenizer.json, chat formats, EOS ids

`generate` and `token_logprobs` both run each prompt ONCE, and its G completions attend to its keys
and values: 1,200 tokens, not 4,000, for a prompt of 400 and 8 completions of 100. They differ in
where keys and values lie, so each hands `Decoder.run` its own `attend`. Left out: sliding windows,
rope types but default and llama3, quantised weights, top-k, top-p (GRPO needs all probabilities).

    python prlm.py --prompt "What is BM25?"  # the toy answers its own tasks only

Shapes: P prompts, G completions per prompt, B batch, T tokens, C completion tokens, N tokens laid
end to end, V vocabulary, H hidden size, D head size, K key-value heads, R query heads for each."""

import argparse
import json
import math
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ---- The decoder: with Hugging Face's names, its state dict is the checkpoint ----
def rope_frequencies(c):
    """Radians per position of each channel pair, theta^(-2i/D), i = 0 .. D/2 - 1: [D/2]. llama3
    divides them by `factor` below `low` turns within the original context, keeps them above `high`,
    and blends linearly between."""
    exponents = torch.arange(0, c.head_dim, 2, device="cpu").float() / c.head_dim
    frequencies = 1.0 / c.rope_theta**exponents
    if c.rope_type == "llama3":
        low, high = c.low_freq_factor, c.high_freq_factor
        turns = c.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / c.factor
    return frequencies


def rotate(x, cos, sin):
    """Rotary embedding: channel i turns with channel i + D/2. `cos`, `sin` [.., D] hold each angle
    twice, `sin`'s first half negated."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attention(q, k, v, visible=None):
    """softmax(q k^T / sqrt(D)) v for [B, T, heads, D]; causal, or by `visible` [B, T, S]: True if t
    may see s. k, v [B, S, K, D] may have fewer heads: query head h looks at key head h // R."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, T, D]
    how = {"is_causal": True} if visible is None else {"attn_mask": visible[:, None]}
    if visible is not None and q.is_cuda:
        # On CUDA, enable_gqa with a mask has only a slow kernel that stores all products.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)
    return out.transpose(1, 2)


class Linear(nn.Linear):
    """W x + b, and after `rl.add_lora` also (alpha / r) B A x (Hu et al. 2021); A [r, inputs], B
    [outputs, r]. Products are of the type `products`, or W's own if None."""

    products: torch.dtype | None = None
    scale = 0.0  # alpha / r; 0: no adapter

    def forward(self, x):
        dtype = self.products or self.weight.dtype
        x, weight = x.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not self.scale:
            return F.linear(x, weight, bias)
        change = self.scale * F.linear(F.linear(x, self.lora_A.to(dtype)), self.lora_B.to(dtype))
        change = change if bias is None else change + bias
        # Added within the product: rounding its result would swallow a small change.
        product = torch.addmm(change.flatten(0, -2), x.flatten(0, -2), weight.T)
        return product.view(change.shape)


class RMSNorm(nn.RMSNorm):  # x / sqrt(mean(x^2) + eps) * weight, in x's precision
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); attend(q, k, v) is the caller's."""

    def __init__(self, c):
        super().__init__()
        H, D, inner, eps = c.hidden_size, c.head_dim, c.intermediate_size, c.rms_norm_eps
        queries, keys = c.num_attention_heads * D, c.num_key_value_heads * D
        norm = RMSNorm if c.model_type == "qwen3" else nn.Identity
        self.input_layernorm = RMSNorm(H, eps)
        self.self_attn = nn.ModuleDict(dict(
            q_proj=Linear(H, queries, c.qkv_bias), k_proj=Linear(H, keys, c.qkv_bias),
            v_proj=Linear(H, keys, c.qkv_bias), o_proj=Linear(queries, H, c.o_bias),
            q_norm=norm(D, eps), k_norm=norm(D, eps),
        ))  # fmt: skip
        self.post_attention_layernorm = RMSNorm(H, eps)
        sizes = dict(gate_proj=(H, inner), up_proj=(H, inner), down_proj=(inner, H))
        self.mlp = nn.ModuleDict({name: Linear(*size, c.mlp_bias) for name, size in sizes.items()})

    def forward(self, x, cos, sin, attend):
        y, own, mlp = self.input_layernorm(x).to(cos.dtype), self.self_attn, self.mlp
        heads = (-1, cos.shape[-1])  # q, k, v: [.., heads, D]
        q, k, v = (p(y).unflatten(-1, heads) for p in (own.q_proj, own.k_proj, own.v_proj))
        q, k = rotate(own.q_norm(q), cos, sin), rotate(own.k_norm(k), cos, sin)
        x = x + own.o_proj(attend(q, k, v).flatten(-2))
        y = self.post_attention_layernorm(x).to(cos.dtype)  # that of products
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class Decoder(nn.Module):
    """A causal language model. `raw` is its config.json; the weights start random."""

    def __init__(self, raw: dict, tokenizer=None):
        super().__init__()
        self.raw = raw
        self.config = c = parse_config(raw)
        self.vocab_limit = tokenizer.size if tokenizer else c.vocab_size  # later ids are no tokens
        self.model, V, H = nn.Module(), c.vocab_size, c.hidden_size
        table = torch.empty(V, H)  # nn.Embedding(V, H) would fill it first
        self.model.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.model.norm = RMSNorm(H, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(H, V, bias=False)
        start_random(self)
        self.frequencies = rope_frequencies(c)  # no buffer: `to(bfloat16)` would round it
        self.checkpointing = False  # True: backward recomputes each layer's activations

    @property
    def head(self):  # [V, H]; a tied model's is its embedding
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    @property
    def products(self) -> torch.dtype:  # of matrix products, see `multiply_in`
        return self.model.layers[0].self_attn.o_proj.products or self.head.dtype

    def logits(self, hidden, head):  # hidden [.., H], rows of the head
        return F.linear(hidden.to(self.products), head.to(self.products))

    def run(self, tokens, positions, attend):
        """Final hidden states [.., H] of tokens [..]; attend(layer, q, k, v) is the attention. The
        residual stream is at least float32, so that sampler and trainer differ less."""
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None, None] * self.frequencies  # [.., 1, D/2]
        angles = torch.cat([-angles, angles], -1)  # [.., 1, D]; cos is even, sin is odd
        cos, sin = angles.cos().to(self.products), angles.sin().to(self.products)
        x = widen(self.model.embed_tokens(tokens).to(self.products))  # rounded as in the sampler
        for number, layer in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, cos, sin, partial(attend, number))
        return self.model.norm(x).to(self.products)

    def forward(self, tokens, mask=None):
        """Logits [B, T, V] of tokens [B, T]; mask [B, T] is 0 at padding, on either side. The plain
        definition: the tests compare all faster code with it."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        visible = (positions <= positions[:, None]) & mask[:, None]  # [B, T, T]
        visible |= positions == positions[:, None]  # a query that sees nothing would be NaN
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # [B, T]
        x = self.run(tokens * mask, positions, lambda _, *qkv: attention(*qkv, visible))
        return self.logits(x, self.head)


def start_random(module):
    for x in module.parameters():
        if x.dim() == 2 and not x.is_meta:
            nn.init.normal_(x, std=0.02)


def widen(x):  # to float32 at least
    return x.to(torch.promote_types(x.dtype, torch.float32))


def multiply_in(module, dtype: torch.dtype):  # in place
    for part in module.modules():
        if isinstance(part, Linear):
            part.products = dtype
    return module


def for_sampling(decoder, dtype: torch.dtype):  # frozen; all but norms cast
    for module in decoder.modules():
        if isinstance(module, Linear | nn.Embedding):
            module.to(dtype)
    return multiply_in(decoder, dtype).requires_grad_(False)


# ---- Sampling: the prompt once, its completions many ----
class Ragged:
    """Unequal sequences end to end, N tokens in all: only attention pays for padding.
    >>> rows = Ragged([[5, 6, 7], [8]])
    >>> rows.tokens.tolist(), rows.positions.tolist(), rows.grid(rows.tokens).tolist()
    ([5, 6, 7, 8], [0, 1, 2, 0], [[5, 6, 7], [8, 0, 0]])"""

    def __init__(self, sequences: list[list[int]], device="cpu", multiple: int = 1):
        integers = partial(torch.tensor, dtype=torch.long, device=device)
        self.tokens = integers([token for sequence in sequences for token in sequence])  # [N]
        self.lengths = integers([*map(len, sequences)])  # [rows]
        self.ends = self.lengths.cumsum(0) - 1  # [rows] each one's last token
        longest = max(map(len, sequences), default=0)
        self.shape = (len(sequences), -(-longest // multiple) * multiple)
        self.mask = torch.arange(self.shape[1], device=device) < self.lengths[:, None]  # [rows, T]
        self.rows, self.positions = self.mask.nonzero().unbind(1)  # [N] each
        self.cells = self.rows * self.shape[1] + self.positions  # [N] index in the grid

    def grid(self, x):  # [N, ..] to [rows, T, ..], zeros after each row's end
        empty = x.new_zeros(self.mask.numel(), *x.shape[1:])
        return empty.index_copy(0, self.cells, x).unflatten(0, self.shape)

    def flat(self, grid):  # [rows, T, ..] back to [N, ..]
        return grid.flatten(0, 1).index_select(0, self.cells)


@dataclass
class Completion:
    tokens: list[int]
    logprobs: list[float]
    finished: bool  # its last token is an EOS id


class Cache:
    """Keys and values while sampling: a prompt's once for its group, a completion's in its row.
      shared  per layer (keys, values), each [P, K, T, D]: what the prompts left, read-only
      own     per layer [2, P, K, G, C, D]: a slot for each completion token
      hide    [P, T + C]: 0 where a row may look, -inf at padding and slots not yet written
    G comes after K: the G R queries that share a key-value head meet the prompt's keys in one
    product. A step reads the first `window` slots: what is written, or a power of 2."""

    def __init__(self, decoder: Decoder, prompts: Ragged, group_size: int, max_new_tokens: int):
        c, device = decoder.config, prompts.tokens.device
        self.prompts, self.shared = prompts, []
        rows = (2, prompts.shape[0], c.num_key_value_heads, group_size, max_new_tokens, c.head_dim)
        self.own = [*torch.zeros(c.num_hidden_layers, *rows, dtype=decoder.products, device=device)]
        self.length = self.window = 0  # tokens written of each completion
        # Where the new token goes: a tensor, as a CUDA graph would freeze a Python number.
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.hide = torch.where(F.pad(prompts.mask, (0, max_new_tokens)), 0.0, -math.inf)

    def read_prompts(self, layer, q, k, v):
        """Causal attention within each prompt, [N, heads, D]; fills `shared`."""
        q, k, v = (self.prompts.grid(x) for x in (q, k, v))  # [P, T, heads, D]
        self.shared.append([x.transpose(1, 2).contiguous() for x in (k, v)])
        return self.prompts.flat(attention(q, k, v))

    def next_slot(self, coarse: bool):
        self.slot.fill_(self.length)
        self.hide[:, self.prompts.shape[1] + self.length] = 0.0
        self.length += 1
        self.window = max(128, 1 << (self.length - 1).bit_length()) if coarse else self.length

    def read_next(self, layer, q, k, v):
        """One new token per row, [P*G, heads, D]: it sees its prompt and its completion so far.
        One softmax over products with both is exact, as if the keys lay in one tensor."""
        P, K, G, slots, D = self.own[layer].shape[1:]
        n, R, T = min(self.window, slots), q.shape[1] // K, self.prompts.shape[1]
        for own, new in zip(self.own[layer], (k, v)):
            own.index_copy_(3, self.slot, new.view(P, G, K, 1, D).transpose(1, 2))
        own_keys, own_values = self.own[layer].flatten(1, 3)[:, :, :n]  # [P*K*G, n, D]
        keys, values = (x.flatten(0, 1) for x in self.shared[layer])  # [P*K, T, D]
        q = q.view(P, G, K, R, D).transpose(1, 2)  # [P, K, G, R, D]
        to_prompt = exact_products(q.reshape(P * K, G * R, D), keys)  # [P*K, G*R, T]
        to_own = exact_products(q.reshape(P * K * G, R, D), own_keys)  # [P*K*G, R, n]
        both = torch.cat([x.view(P, K * G * R, -1) for x in (to_prompt, to_own)], -1)
        both = torch.add(self.hide[:, None, : T + n], both, alpha=D**-0.5)
        weights = both.softmax(-1).to(v.dtype).view(P * K * G, R, T + n)
        for_prompt, for_own = weights.split([T, n], -1)
        out = torch.bmm(for_prompt.reshape(P * K, G * R, T), values).view(P * K * G, R, D)
        out = torch.baddbmm(out, for_own, own_values)
        return out.view(P, K, G, R, D).transpose(1, 2).reshape(P * G, K * R, D)


def sample(logits, temperature: float, generator=None):
    """One id per row of softmax(logits / temperature) [rows, V], never one of probability 0, and
    its log-probability; at temperature 0 the largest logit's id, with that at temperature 1."""
    probs = (logits.float() / (temperature or 1.0)).softmax(-1)
    if temperature:
        # One uniform number, looked up in running sums: torch.multinomial draws one for each id, 3
        # to 7 times slower on a CPU. CUDA's parallel sums could decrease in float32.
        sums = probs.cumsum(-1, dtype=torch.float64 if logits.is_cuda else None)
        uniform = torch.rand(len(sums), 1, device=sums.device, generator=generator) * sums[:, -1:]
        ids = torch.searchsorted(sums, uniform, right=True)  # right: no id of probability 0
        ids = ids.clamp(max=logits.shape[-1] - 1)  # `uniform` can round up to the whole sum
    else:
        ids = logits.argmax(-1, keepdim=True)  # of the logits: probabilities round to ties
    # A probability that underflows must not give -inf.
    chosen = probs.gather(-1, ids).clamp(min=torch.finfo(torch.float32).tiny)
    return ids[:, 0], chosen.log()[:, 0]


@torch.no_grad()
def generate(
    decoder: Decoder, prompts: list[list[int]], group_size: int = 1, max_new_tokens: int = 256,
    temperature: float = 1.0, eos_ids=(), seed: int | None = None,
) -> list[list[Completion]]:  # fmt: skip
    """Samples `group_size` completions of each prompt, [P][G].
    A completion ends with its first id of `eos_ids`, or, not `finished`, after `max_new_tokens`.
    The same seed samples the same. Temperature 0 is greedy. Ids from `decoder.vocab_limit` on are
    never sampled. ValueError for what is empty or too low."""
    if min(group_size, max_new_tokens, *map(len, prompts)) < 1 or not (temperature or 1) >= COLDEST:
        raise ValueError(f"prompts and sizes must be at least 1, a temperature 0 or {COLDEST}")
    P, G, eos_ids = len(prompts), group_size, [*map(int, eos_ids)]
    device, head = decoder.head.device, decoder.head[: decoder.vocab_limit]
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    eos, pace = torch.tensor(eos_ids, dtype=torch.long, device=device), PACES[device.type]
    laid = Ragged(prompts, device, pace.multiple)
    cache = Cache(decoder, laid, G, max_new_tokens)
    run_step = partial(decoder.run, attend=cache.read_next)
    run_step = Recorded(run_step, cache) if pace.record else run_step
    hidden = decoder.run(laid.tokens, laid.positions, cache.read_prompts)  # [N, H]
    hidden = hidden[laid.ends].repeat_interleave(G, 0)  # [P*G, H]
    positions = laid.lengths.repeat_interleave(G)  # [P*G] of the next token
    writing = torch.arange(P * G, device=device)  # [P*G] which completion a row writes
    done = torch.zeros(P, G, dtype=torch.bool, device=device)
    tokens = torch.zeros(P * G, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(tokens.shape, device=device)
    for step in range(max_new_tokens if prompts else 0):
        logits = decoder.logits(hidden, head)  # [rows, V]
        ids, chosen = sample(logits, temperature, generator)
        tokens[writing, step], logprobs[writing, step] = ids, chosen
        done |= torch.isin(ids, eos).view_as(done)
        look = (step + 1) % pace.look == 0
        if step + 1 == max_new_tokens or (look and done.all()):
            break
        if look and (stay := leave(cache, done, pace.keep)):
            kept, done = stay
            ids, positions, writing = ids[kept], positions[kept], writing[kept]
        cache.next_slot(pace.record)
        hidden = run_step(ids, positions)
        positions = positions + 1
    found = []
    for row, chosen in zip(tokens.tolist(), logprobs.tolist()):  # a finished row may have gone on
        end = next((n for n, token in enumerate(row, 1) if token in eos_ids), None)
        found.append(Completion(row[:end], chosen[:end], end is not None))
    return [found[first : first + G] for first in range(0, P * G, G)]


# ---- Training: the same tokens once more, with gradient ----
def token_logprobs(decoder: Decoder, prompts, completions, temperature: float = 1.0):
    """(logprobs, mask), each [P, G, C]: log softmax(logits / temperature) of completion tokens.
    `completions` [P][G] are lists of ids; after each one's end mask and logprobs are 0. All tokens
    lie end to end; only attention sees grids, where a completion's queries meet [prompt keys, its
    own keys]. The temperature is the sampler's: else the loss would compare two policies. The
    softmax is over ids below `decoder.vocab_limit`; others have -inf. ValueError for an
    empty prompt, unequal groups, and a temperature below COLDEST."""
    fits = len(prompts) == len(completions) and len({*map(len, completions)}) <= 1
    if not (fits and temperature >= COLDEST and all(map(len, prompts))):
        raise ValueError(f"empty prompts, unequal groups, or a temperature below {COLDEST}")
    P, G, device = len(prompts), len(completions[0]) if completions else 0, decoder.head.device
    rows = [ids for group in completions for ids in group]  # P*G
    prompt, target = Ragged(prompts, device), Ragged(rows, device)
    fed = Ragged([ids[:-1] for ids in rows], device)  # the last token predicts nothing
    N, L = len(prompt.tokens), fed.shape[1]  # L is C - 1
    causal = torch.ones(L, L, dtype=torch.bool, device=device).tril().expand(len(rows), L, L)
    inside = prompt.mask.repeat_interleave(G, 0)[:, None].expand(-1, L, -1)
    visible = torch.cat([inside, causal], -1)  # [P*G, L, T+L]

    def attend(_, q, k, v):
        prompt_q, prompt_k, prompt_v = (prompt.grid(x[:N]) for x in (q, k, v))  # [P, T, heads, D]
        out = prompt.flat(attention(prompt_q, prompt_k, prompt_v))
        # Unlike in the Cache, prompt keys are repeated for each completion: so autograd sums their
        # gradients over the group, and sharing is exact (arXiv 2506.05433).
        k = torch.cat([prompt_k.repeat_interleave(G, 0), fed.grid(k[N:])], 1)  # [P*G, T+L, K, D]
        v = torch.cat([prompt_v.repeat_interleave(G, 0), fed.grid(v[N:])], 1)
        return torch.cat([out, fed.flat(attention(fed.grid(q[N:]), k, v, visible))])

    offset = prompt.lengths.repeat_interleave(G)[fed.rows]  # completions go on where prompts end
    positions = torch.cat([prompt.positions, offset + fed.positions])
    x = decoder.run(torch.cat([prompt.tokens, fed.tokens]), positions, attend)  # [N+.., H]
    # The prompt's last state predicts a completion's first token, each token's the next.
    first = x[prompt.ends].repeat_interleave(G, 0)  # [P*G, H]
    x = target.flat(torch.cat([first[:, None], fed.grid(x[N:])], 1))
    logprobs = target.grid(head_logprobs(decoder, x, target.tokens, temperature))
    return logprobs.unflatten(0, (P, G)), target.mask.unflatten(0, (P, G))


def head_logprobs(decoder: Decoder, hidden, targets, temperature: float):
    """log softmax(hidden W^T / temperature)[target], [N], a chunk of logits at a time, and again in
    backward: all of them, for 8,192 tokens and 152,000 words, are 5 GB in float32."""
    limit = decoder.vocab_limit

    def chunk(x, ids):
        logits = decoder.logits(x, head)  # casts the head here: its gradient sums in float32
        logits = widen(logits) / temperature
        return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)

    size, head = max(128, PACES[hidden.device.type].logits // limit), decoder.head[:limit]
    run = partial(checkpoint, chunk, use_reentrant=False)
    parts = map(run, hidden.split(size), targets.clamp(max=limit - 1).split(size))
    return torch.cat([*parts]).masked_fill(targets >= limit, -math.inf)


# ---- The encoder ----
class EncoderLayer(nn.Module):
    """Post-norm: norm(x + attention(x)), then norm(x + mlp(x)), with dropout before each sum."""

    def __init__(self, c):
        super().__init__()
        self.c, H, inner = c, c.hidden_size, c.intermediate_size
        norm = partial(nn.LayerNorm, H, c.layer_norm_eps)
        qkv = nn.ModuleDict({name: Linear(H, H) for name in ("query", "key", "value")})
        output = nn.ModuleDict({"dense": Linear(H, H), "LayerNorm": norm()})
        self.attention = nn.ModuleDict({"self": qkv, "output": output})
        self.intermediate = nn.ModuleDict({"dense": Linear(H, inner)})
        self.output = nn.ModuleDict({"dense": Linear(inner, H), "LayerNorm": norm()})

    def forward(self, x, visible):
        c, on, first, last = self.c, self.training, self.attention.output, self.output
        heads, rate = (c.num_attention_heads, -1), c.hidden_dropout_prob
        linears = self.attention["self"].values()  # to q, k, v [B, heads, T, D]
        q, k, v = (linear(x).unflatten(-1, heads).transpose(1, 2) for linear in linears)
        out = F.scaled_dot_product_attention(q, k, v, visible, c.attention_probs_dropout_prob * on)
        out = first.dense(out.transpose(1, 2).flatten(2))  # [B, T, H]
        x = first.LayerNorm(x + F.dropout(out, rate, on))
        out = last.dense(F.gelu(self.intermediate.dense(x)))
        return last.LayerNorm(x + F.dropout(out, rate, on))


class Encoder(nn.Module):
    """BERT. `raw` is its config.json."""

    def __init__(self, raw: dict, tokenizer=None):
        super().__init__()
        self.raw = BERT | raw
        if any(self.raw[name] != BERT[name] for name in [*BERT][:4]):
            raise ValueError("not a BERT with gelu and absolute positions")
        self.config = c = SimpleNamespace(**self.raw)
        self.tokenizer, self.max_length = tokenizer, c.max_position_embeddings
        H, embedding = c.hidden_size, partial(nn.Embedding.from_pretrained, freeze=False)
        sizes = dict(word=c.vocab_size, position=self.max_length, token_type=c.type_vocab_size)
        tables = {f"{name}_embeddings": embedding(torch.empty(n, H)) for name, n in sizes.items()}
        self.embeddings = nn.ModuleDict({**tables, "LayerNorm": nn.LayerNorm(H, c.layer_norm_eps)})
        layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": Linear(H, H)})
        start_random(self)

    def forward(self, tokens, mask=None, segments=None):
        """Hidden states [B, T, H] of tokens [B, T]; mask 0 is padding; segments are 0 or 1."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        segments = torch.zeros_like(tokens) if segments is None else segments
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        words, places, kinds, norm = self.embeddings.values()
        x = norm(words(tokens * mask) + places(positions) + kinds(segments * mask))
        x = F.dropout(x, self.config.hidden_dropout_prob, self.training)
        visible = mask | ~mask.any(1, keepdim=True)  # [B, T]; a row of padding alone sees itself
        for layer in self.encoder.layer:
            x = layer(x, visible[:, None, None])
        return x


# ---- Text and chat formats ----
ROLES = ("system", "user", "assistant")
FORMATS = {  # name: (how a chat begins, what stands before and after a message of each role)
    "R1": ("<｜begin▁of▁sentence｜>", {  # its bars are wide ones, U+FF5C
        "system": ("", ""), "user": ("<｜User｜>", ""),
        "assistant": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>")}),
    "ChatML": ("", {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ROLES}),
    "Llama 3": ("<|begin_of_text|>", {role: (
        f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ROLES}),
}  # fmt: skip
CONTROL = re.compile(r"<\|\w+\|>|<｜[\w▁]+｜>|</?think>")
FOREIGN = ("<|im_sep|>", "## Metadata", "%}{{ system_message }}")  # Phi-4's, SmolLM3's, Yi's
PLAIN = r"(?:\\.|['\"](?=\w)|\{(?![{%])|(?!<\|)[^\\'\"{])"  # a character within a Jinja string
DEFAULT_SYSTEM = rf"<\|im_start\|>system(?:\\n|\n)({PLAIN}+)<\|im_end\|>"
OPENING = rf"(?:<｜Assistant｜>|assistant(?:\\n|\n))(<think>{PLAIN}*)"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # Llama 3.1's


def chat_format(known, template: str):  # templates are searched, not run
    for name, (begin, turns) in FORMATS.items():
        user, end = turns["user"][0], turns["assistant"][1]
        named = not template or CONTROL.findall(user)[0] in template
        if named and {*CONTROL.findall(begin + user + end)} <= known.keys():
            return None if any(mark in template for mark in FOREIGN) else name


class Tokenizer:
    """tokenizer.json with its EOS ids and chat. `files` {name: content} go into a checkpoint.
    Control tokens, <think> and </think> among them, come from our words, never from data."""

    def __init__(self, backend: Backend, eos_ids=(), files=None):
        self.files = files or {"tokenizer.json": backend.to_str()}
        settings = json.loads(self.files.get("tokenizer_config.json", "{}"))
        found = self.files.get("chat_template.jinja") or settings.get("chat_template") or ""
        if isinstance(found, list):  # several
            found = next((x["template"] for x in found if x["name"] == "default"), "")
        self.template = template = found.replace("\r\n", "\n")
        known = backend.get_vocab()
        self.size = max(known.values()) + 1
        self.format = chat_format(known, template)
        end = [known[FORMATS[self.format][1]["assistant"][1].strip()]] if self.format else []
        self.eos_ids = frozenset([*eos_ids, *end])
        self.end_id = min(end or eos_ids, default=None)
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        added = content["added_tokens"]
        for t in added:  # R1's "<｜User｜>" does not say that it is special
            t["special"] |= bool(CONTROL.fullmatch(t["content"])) or t["id"] in self.eos_ids
        self.control = {t["content"]: t["id"] for t in added if t["special"]}
        self.hidden = {i for n, i in self.control.items() if "think>" not in n}  # by `decode`
        names = sorted((re.escape(t["content"]) for t in added), key=len, reverse=True)
        self.added = re.compile(f"({'|'.join(names) or '(?!)'})")
        self.backend = Backend.from_str(json.dumps(content))
        self.backend.encode_special_tokens = True  # as text
        # What the template adds to its format: a BOS, a system message, the shortest opening.
        bos, plain = settings.get("bos_token") or "", not template
        bos = bos["content"] if isinstance(bos, dict) else bos
        self.bos = bos if "bos_token" in template else ""
        unescape = partial(re.sub, r"\\(.)", lambda found: found[1].replace("n", "\n"))
        begins = "<think>\n" * (self.format == "R1" and plain)
        self.opening = unescape(min(re.findall(OPENING, template), key=len, default=begins))
        dated = DATES[:22] in template or (plain and "<|eom_id|>" in self.control)
        self.dates = DATES * (self.format == "Llama 3" and dated)
        found = re.search(DEFAULT_SYSTEM, template)
        self.system = unescape(found[1]) if found else "" if self.dates else None

    def encode(self, text: str) -> list[int]:  # no BOS, no control token that the text spells
        return self.backend.encode(as_text(text), add_special_tokens=False).ids

    def fill(self, form: str, *texts: str):
        """Ids of a form whose {} are filled by texts. Added tokens (<|im_end|>) of the form get
        their ids, those in a text stay text."""
        ids, texts = [], iter(texts)
        for n, piece in enumerate(self.added.split(form)):  # odd: added tokens
            text = re.sub(r"\{\}", lambda _: next(texts), piece)
            ids += [self.backend.token_to_id(text)] if n % 2 else self.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:  # drops EOS, padding, BOS; keeps <think>, </think>
        ids = [i for i in ids if i not in self.hidden]
        return self.backend.decode(ids, skip_special_tokens=False)

    def chat(self, messages: list[dict], said=""):
        """Ids of {"role", "content"} messages, each between its marks of FORMATS, and of what is
        `said` in the next turn (default: the template's <think>). ValueError: unknown template."""
        turns, said = [(m["role"], m["content"]) for m in messages], said or self.opening
        if self.format is None:
            if self.template:
                raise ValueError(f"the chat template is none of those known: {', '.join(FORMATS)}")
            warnings.warn("no chat format: messages are sent as plain text", stacklevel=2)
            plain = as_text("".join(f"{text}\n\n" for _, text in turns))
            return self.backend.encode(plain).ids + self.fill(said)
        begin, around = FORMATS[self.format]
        ids = self.fill(begin or self.bos)
        if self.system is not None and "system" not in dict(turns[:1]):
            turns = [("system", self.system), *turns]
        for role, text in turns:
            if role == "assistant" and (self.format == "R1" or "</think>" in self.template):
                text = text.rpartition("</think>")[2].lstrip("\n" * (self.format == "ChatML"))
            if self.format == "Llama 3":
                text = self.dates * (role == "system") + text.strip()
            # A system message is ours, part of the form: its <think> is the token.
            spelled = {*map(self.control.get, self.added.findall(text))} & self.hidden
            ours = role == "system" and "{}" not in text and not spelled
            ids += self.fill((text if ours else "{}").join(around[role]), text)
        return ids + self.fill(around["assistant"][0] + said)

    def encode_pair(self, first: str, second, max_length: int):
        """BERT's ids and segments of [CLS] first [SEP], or + second [SEP]; the longer is cut."""
        self.backend.enable_truncation(max_length)
        encoding = self.backend.encode(as_text(first), second and as_text(second))
        self.backend.no_truncation()
        return encoding.ids, encoding.type_ids

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of `text` that its first `tokens` tokens spell, in whole characters."""
        text = as_text(text)
        offsets = self.backend.encode(text, add_special_tokens=False).offsets
        return text[: offsets[tokens][0]] if tokens < len(offsets) else text


# ==== Below: not the method ====
# ---- Faster: rows that leave the batch, CUDA graphs ----
# CUDA elsewhere: attention, sample, generate, device_and_dtype; rl.py: processes, make_optimizer.
class Pace(NamedTuple):
    look: int  # steps between looks at who has finished: each waits for the GPU
    keep: float  # rows leave when at most this share stays: leaving copies the cache
    logits: int  # numbers in a chunk of logits
    multiple: int  # divides a prompt batch's width: a GPU reads 16 bytes at a time
    record: bool  # a step is a CUDA graph, whose shapes must last: windows are powers of 2


PACES = dict(cpu=Pace(1, 0.75, 2**21, 1, False), cuda=Pace(16, 0.5, 2**27, 8, True))
PACES["mps"] = PACES["cpu"]
COLDEST = 1e-6  # least temperature above 0: below, logits / temperature may overflow
torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for nearly every batch


def leave(cache: Cache, done, keep: float):
    """(indices of the rows that stay, `done` [P', G'] of them), if at most `keep` of [P, G] stay.
    All groups keep one size: unfinished rows first, then finished ones to fill up."""
    left = (~done).sum(1)  # [P] completions of each prompt
    alive, width = left.nonzero()[:, 0], int(left.max())
    if len(alive) * width > keep * done.numel():
        return None
    members = done[alive].sort(dim=1, stable=True).indices[:, :width]  # [P', G']
    cache.hide = cache.hide[alive]
    cache.shared = [(k[alive], v[alive]) for k, v in cache.shared]
    rows = (own[:, alive[:, None], :, members] for own in cache.own)  # each [P', G', 2, K, C, D]
    cache.own = [x.permute(2, 0, 3, 1, 4, 5).contiguous() for x in rows]
    kept = (alive[:, None] * done.shape[1] + members).flatten()
    return kept, done[alive[:, None], members]


def exact_products(q, k):
    """q k^T of [batch, n, D] and [batch, m, D], in float32: near 300, bfloat16 has steps of 2."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)  # CUDA only
    return torch.bmm(widen(q), widen(k.mT))


class Recorded:
    """The decode step as a CUDA graph, one launch in place of dozens per layer, recorded anew for
    each shape: by hand, since `torch.cuda.graph` would first free all cached memory."""

    newest = side = None  # the last graph, whose memory the next one takes over; a stream

    def __init__(self, step, cache: Cache):
        self.step, self.cache, self.shape = step, cache, None
        Recorded.side = Recorded.side or torch.cuda.Stream(cache.hide.device)

    def __call__(self, ids, positions):
        if self.shape != (shape := (len(ids), self.cache.window)):
            self.shape, self.ids, self.positions = shape, ids.clone(), positions.clone()
            self.graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(ids.device)
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                # Once unrecorded: libraries then load and allocate, which a recording forbids.
                self.step(self.ids, self.positions)
                # thread_local: NCCL's watchdog, another thread, may still call CUDA.
                pool = Recorded.newest.pool() if Recorded.newest else None
                self.graph.capture_begin(pool, capture_error_mode="thread_local")
                self.hidden = self.step(self.ids, self.positions)
                self.graph.capture_end()
            Recorded.newest = self.graph
            main.wait_stream(self.side)
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.hidden


# ---- Checkpoints ----
DTYPES = dict(BOOL=torch.bool, BF16=torch.bfloat16, I8=torch.int8, U8=torch.uint8)
for kind in ("int", "uint", "float"):  # I16, U32, F64, ...
    DTYPES |= {f"{kind[0].upper()}{n}": getattr(torch, f"{kind}{n}") for n in (16, 32, 64)}
BERT = dict(  # its config.json's defaults; for the first four, all that is implemented
    model_type="bert", hidden_act="gelu", is_decoder=False, position_embedding_type="absolute",
    type_vocab_size=2, layer_norm_eps=1e-12, hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)  # fmt: skip
SETTINGS = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
SETTINGS += ("config.json", "chat_template.jinja")


def parse_config(raw: dict) -> SimpleNamespace:
    """config.json with Hugging Face's defaults and its rotary settings, from rope_scaling or
    transformers 5's rope_parameters. ValueError for what is not implemented."""
    given = {key: value for key, value in raw.items() if value is not None}
    rope = given.get("rope_scaling") or given.get("rope_parameters", {})
    family, heads = given.get("model_type"), raw["num_attention_heads"]
    defaults = dict(
        head_dim=128 if family == "qwen3" else raw["hidden_size"] // heads,
        num_key_value_heads=heads, rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False,
        mlp_bias=False, tie_word_embeddings=False, use_sliding_window=False, max_window_layers=28,
        max_position_embeddings=10**9, rope_theta=10000.0 if family == "llama" else None,
        rope_type=rope.get("type", "default"), partial_rotary_factor=1, layer_types=(),
    )  # fmt: skip
    c = SimpleNamespace(**defaults | given | rope)
    known = dict(
        model_type=family in ("qwen2", "qwen3", "llama"),
        hidden_act=c.hidden_act == "silu",
        rope_type=c.rope_type in ("default", "llama3"),
        rope_theta=c.rope_theta,
        partial_rotary_factor=c.partial_rotary_factor in (1, None),
        layer_types={*c.layer_types} <= {"full_attention"},
        use_sliding_window=not (c.use_sliding_window and c.max_window_layers < c.num_hidden_layers),
    )
    for name in known:
        if not known[name]:
            raise ValueError(f"{name} {getattr(c, name, None)!r} is not implemented")
    # Qwen2 has biases, but not at the output; its config.json does not say so.
    c.qkv_bias, c.o_bias = (True, False) if family == "qwen2" else [c.attention_bias] * 2
    return c


def load_decoder(directory, device="cpu", dtype=torch.float32) -> Decoder:
    """A Qwen2, Qwen3 or Llama checkpoint; a weight missing, left over or misshapen: ValueError."""
    return load_module(directory, Decoder, {r"^(?!model\.|lm_head\.)": "model."}, device, dtype)


def load_encoder(directory, device="cpu", dtype=torch.float32) -> Encoder:
    """A BERT checkpoint, with or without `bert.` prefix, gamma/beta names, pooler, other heads."""
    names = {r"^bert\.": "", r"\.gamma$": ".weight", r"\.beta$": ".bias"}
    names[r"^(cls|classifier|qa_outputs)\..*"] = ""
    return load_module(directory, Encoder, names, device, dtype)


def load_module(directory, kind, names: dict, device, dtype=torch.float32):
    """kind(config.json, tokenizer) with exactly the weights of one file or of shards. `names` is
    what to replace in their names; one that becomes empty is left out."""
    folder, weights = Path(directory), {}
    if not folder.is_dir():
        said = "no such directory (a run writes it last); hf download"
        raise FileNotFoundError(f"{folder}: {said} {folder} --local-dir X")
    with faults_in(folder):
        raw, files = read_json(folder / "config.json"), [folder / "model.safetensors"]
        if not files[0].is_file() and (index := folder / "model.safetensors.index.json").is_file():
            files = sorted({folder / Path(n).name for n in read_json(index)["weight_map"].values()})
        for file in files:
            for name, tensor in read_safetensors(file).items():
                for old, new in names.items():
                    name = re.sub(old, new, name)
                if name and not name.endswith(("position_ids", "inv_freq")):  # old exports' buffers
                    weights[name] = tensor.to(device, dtype, copy=True)
        tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
        if tokenizer and tokenizer.size > raw["vocab_size"]:
            raise ValueError(f"the tokenizer has {tokenizer.size} ids, the model fewer")
        with torch.device("meta"):  # no memory yet
            module = kind(raw, tokenizer)
        tied = raw.get("tie_word_embeddings") and "lm_head.weight" in weights
        if tied and not weights.pop("lm_head.weight").equal(weights["model.embed_tokens.weight"]):
            raise ValueError("lm_head is tied to the embedding, but differs")
        if "pooler.dense.weight" not in weights:
            module.pooler = None  # an encoder's
        module.load_state_dict(weights, assign=True)
    return module.eval()


def save_checkpoint(state: dict[str, Tensor], raw: dict, tokenizer: Tokenizer, directory):
    """The tokenizer's files, config.json, and last the weights: if they exist, all is there."""
    widest = max(state.values(), key=Tensor.element_size).dtype
    raw = raw | {"dtype" if "dtype" in raw else "torch_dtype": str(widest).removeprefix("torch.")}
    files = tokenizer.files | {"config.json": json.dumps(raw, indent=1) + "\n"}
    for file, content in files.items():
        write_text(f"{directory}/{file}", content)
    write_safetensors(f"{directory}/model.safetensors", state)


def save_decoder(decoder: Decoder, tokenizer: Tokenizer, directory):
    """A checkpoint that transformers opens unchanged, LoRA merged in: W + (alpha / r) B A, in
    float32, since a bfloat16 W would lose most of the change."""
    state = {name: x for name, x in decoder.state_dict().items() if ".lora_" not in name}
    for path, module in decoder.named_modules():
        if isinstance(module, Linear) and module.scale:
            change = module.scale * (module.lora_B @ module.lora_A)
            state[f"{path}.weight"] = module.weight.float() + change
    save_checkpoint(state, decoder.raw, tokenizer, directory)


def load_tokenizer(directory) -> Tokenizer:
    """tokenizer.json; its EOS ids are all that any of the checkpoint's settings name."""
    path, eos_ids, texts = Path(directory) / "tokenizer.json", set(), {}
    for file in [path, *filter(Path.is_file, map(path.with_name, SETTINGS))]:
        with faults_in(file):
            texts[file.name] = text = file.read_bytes().decode("utf-8-sig")
            if file == path:
                backend = Backend.from_str(text)
            elif file.suffix == ".json":
                settings = json.loads(text)
                ids, token = settings.get("eos_token_id"), settings.get("eos_token") or ""
                token = token if isinstance(token, str) else token["content"]
                eos_ids |= {*(ids if isinstance(ids, list) else [ids]), backend.token_to_id(token)}
                if not all(type(i) is int for i in eos_ids - {None}):
                    raise ValueError(f"eos_token_id {ids!r} is no id, and no list of ids")
    with faults_in(directory):
        return Tokenizer(backend, eos_ids - {None}, texts)


def read_safetensors(path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, memory-mapped; writing to one does not change the file.
    Format: 8 bytes little-endian header length; a JSON header {name: {dtype, shape, data_offsets}};
    the bytes, which the ranges must tile. Faults are a ValueError that names the file."""

    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key is repeated")
        return dict(pairs)

    tensors, size = {}, Path(path).stat().st_size
    with faults_in(path):
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        start = 8 + int.from_bytes(data[:8].tolist(), "little")
        if start > min(size, 100_000_008):  # the format's own limit
            raise ValueError("it ends within its header; is the download complete?")
        header = json.loads(data[8:start].numpy().tobytes().decode(), object_pairs_hook=unique)
        for name, (begin, end, dtype, shape) in check_header(header, size - start).items():
            flat = data[start + begin : start + end]
            flat = flat.clone() if (start + begin) % dtype.itemsize else flat  # not aligned
            tensors[name] = flat.view(dtype).view(shape)
    return tensors


def check_header(header: dict, size: int):
    """name -> (begin, end, dtype, shape), if the ranges tile `size` bytes."""
    ranges, covered = {}, 0
    json.dumps(header, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no half surrogate
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("__metadata__ is not a map of strings")
    for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 2**60 for n in (*shape, begin, end))
        if not whole or begin != covered or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: its bytes are not those from {covered} that its shape needs")
        ranges[name], covered = (begin, end, dtype, shape), end
    if covered != size:
        raise ValueError(f"the tensors fill {covered} bytes, but {size} follow the header")
    return ranges


def write_safetensors(path, tensors: dict[str, Tensor], metadata: dict | None = None):
    """Writes `tensors` (any strides, any device) as a .safetensors file, atomically."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
    # Large elements first: each tensor begins at a multiple of its element's size.
    pairs = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
    for name, x in pairs:
        begin, end = end, end + x.nbytes
        header[name] = dict(dtype=codes[x.dtype], shape=[*x.shape], data_offsets=[begin, end])
    text = json.dumps(header).encode()
    check_header(header, end)
    text += b" " * (-len(text) % 8)
    if world()[0] == 0:
        with replacing(path) as temp, open(temp, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, x in pairs:
                file.write(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


# ---- Files: never half-written, never trusted ----
@contextmanager
def faults_in(path):
    """What is wrong with the content of `path` is a ValueError that names it."""
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        if getattr(error, "filename", None) or said.startswith(str(path)):
            raise
        raise ValueError(f"{path}: {said}") from error


@contextmanager
def replacing(path):  # a temporary path; on success it is `path`
    temp = Path(path).with_name(f".{Path(path).name}.tmp")
    temp.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temp
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def write_text(path, text: str):
    if world()[0] == 0:
        with replacing(path) as temp:
            temp.write_bytes(text.encode())


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def append(path, records: list[dict]):  # to a JSON Lines file
    if world()[0] == 0:
        with open(path, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def read_json(path, kind: type = dict):  # the top level must be a `kind`
    with faults_in(path):
        value = json.loads(Path(path).read_text("utf-8-sig"))
        if not isinstance(value, kind):
            raise ValueError(f"the top level is not a JSON {kind.__name__}")
        return value


def read_lines(path) -> list[dict]:  # without the half line of a killed process
    with faults_in(path):
        return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def as_text(text: str) -> str:  # with U+FFFD for half of a surrogate pair
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:  # on a terminal or a page, where nothing in it must act
    acting = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(acting, "\ufffd", text)


# ---- Several processes, by torchrun. `make_records` splits sampling and gathers it; gradients are
# split by `micro_batches` and summed in `optimizer_step`, logs in `warm_start`, `update_metrics`.
# Every process does all the rest; files and the bert judge's weights are the first's.
def world():  # (this process's number from 0, how many there are)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(items):  # of a range or a list
    return items[world()[0] :: world()[1]]


def gather(value=None):  # every process's value; each waits here for all
    values = [value] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def progress(iterable=None, title=None, **more):  # on a terminal, by the first process
    return tqdm(iterable, title, leave=False, disable=True if world()[0] else None, **more)


# ---- Options ----
SHIPPED = Path(__file__).resolve().parent / "toy"
PRESETS = {  # changes to the defaults, the toy's; a command takes those that it has
    "small": dict(  # models like SmolLM2-135M
        k=3, encoder=None, reward_lr=2e-4, warm_start_lr=3e-4, steps=24, prompts_per_step=4,
        temperature=0.7, lr=6e-5, personalization=0.0, save_every=5,
        tokens_per_micro_batch=4096,
    ),
    "paper": dict(  # what the paper and the authors' code say
        k=5, encoder=None, max_new_tokens=768, pairs_per_query=10, reward_lr=5e-5, limit=500,
        steps=2500, prompts_per_step=1, group_size=4, temperature=0.7, lr=1e-6, beta=0.04,
        checkpointing=True, eval_every=500, save_every=100,
    ),
}  # fmt: skip


def option(default, help: str, least=None):
    return field(default=default, metadata=dict(help=help, least=least))


def parse_flags(options: type, description: str, arguments=None) -> dict:
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.argument_default = argparse.SUPPRESS
    for entry in fields(options):
        kind = entry.type
        how = {"type": (*get_args(kind), kind)[0], "metavar": "X"}  # T of "T | None"
        if get_origin(kind) is Literal:
            how = {"choices": get_args(kind)}
        elif kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        text = f"{entry.metadata['help']} ({entry.default})".replace("%", "%%")
        parser.add_argument(f"--{entry.name.replace('_', '-')}", help=text, **how)
    parser.add_argument("--debug", action="store_true", help="show an error's traceback")
    return vars(parser.parse_args(arguments))


def resolve(options: type, given: dict):
    """The options: defaults, then a preset or what a run recorded, then what was given."""
    names = {entry.name for entry in fields(options)}
    path = Path(given.get("run") or given.get("out") or getattr(options, "out", "")) / "config.json"
    shipped = Path(given.get("model", SHIPPED / "policy")).resolve() == SHIPPED / "policy"
    base = PRESETS.get(given.get("preset"), {})
    if "run" in given:  # eval.py scores a run's checkpoint as the run does, on all records
        base = read_json(path) | {"model": str(path.parent / "checkpoint"), "limit": 0}
    elif given.get("resume") and path.is_file():
        base = read_json(path)
    elif "preset" in names - given.keys() and not shipped:
        raise ValueError("--model is not the toy's: --preset toy, small (135 M) or paper (1.5 B)?")
    # These are never inherited: a run's temperature is for rollouts.
    own = {"out", "overwrite", "force", "" if "steps" in names else "temperature"}
    chosen = names & (base.keys() - own | given.keys())
    o = options(**{name: (base | given)[name] for name in chosen})
    for entry in fields(o):
        value, least = getattr(o, entry.name), entry.metadata.get("least")
        if None not in (value, least) and not least <= value < math.inf:
            raise ValueError(f"--{entry.name.replace('_', '-')} must be >= {least}, not {value}")
    return o


def command(main, options: type, description: str):
    """Runs main(options); what is wrong with them is one line and exit status 2."""
    given = parse_flags(options, description)
    # Data may hold what a terminal cannot show; a log is read while it grows.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main(resolve(options, given))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if "debug" in given:
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def device_and_dtype(o):  # and the type of matrix products
    device = o.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    dtype = o.precision.replace("auto", "bfloat16" if "cuda" in device else "float32")
    return device, getattr(torch, dtype)


def load_policy(o, train: bool = False) -> tuple[Decoder, Tokenizer]:
    """The checkpoint o.model with products, and unless `train` the weights, in --precision's type.
    ValueError if the model was made for shorter texts."""
    device, dtype = device_and_dtype(o)
    decoder = load_decoder(o.model, device)
    longest = getattr(o, "max_prompt_tokens", 0) + o.max_new_tokens
    if longest > (most := decoder.config.max_position_embeddings):
        raise ValueError(f"the model was made for {most} tokens, not {longest}: prompt and answer")
    return (multiply_in if train else for_sampling)(decoder, dtype), load_tokenizer(o.model)


@dataclass
class ModelOptions:
    model: str = option(str(SHIPPED / "policy"), "checkpoint directory of the policy")
    max_new_tokens: int = option(128, "longest completion", 1)
    seed: int = option(0, "of everything random", 0)
    device: str = option("auto", "auto, cuda, mps or cpu")
    precision: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 on CUDA")


@dataclass
class Options(ModelOptions):
    prompt: str = option("Hello.", "what the user says")
    temperature: float = option(0.7, "0 is greedy", 0)


def main(o: Options):
    decoder, tokenizer = load_policy(o)
    prompt = tokenizer.chat([{"role": "user", "content": o.prompt}])
    how = (1, o.max_new_tokens, o.temperature, tokenizer.eos_ids, o.seed)
    ((completion,),) = generate(decoder, [prompt], *how)
    print(printable(tokenizer.opening + tokenizer.decode(completion.tokens)))


if __name__ == "__main__":
    command(main, Options, __doc__)
