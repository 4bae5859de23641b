"""Shared by the tests: tokenizers, a data set and models so small that a run takes seconds."""

import copy
import functools
import json
import math
import random

import numpy as np
import pytest
import tokenizers
import torch

import prlm
import retrieve
import rl

PROMPTS = [[5, 36, 9, 2, 2, 30, 7, 11, 21], [8, 1, 17], [33, 3, 3, 25, 0, 14]]  # of `small_step`

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def difference(got, expected, relative=0.0, absolute=0.0) -> str:
    """The first place where two values differ and what stands there, in one line; else "".
    `relative` is how far numbers may be apart, as a share of the largest one expected."""
    numbers = torch.Tensor | np.ndarray | float
    if isinstance(expected, numbers) and isinstance(got, numbers | int):
        a, b = (torch.as_tensor(x).detach().double() for x in (got, expected))
        if a.shape != b.shape:
            return f"expected the shape {[*b.shape]}, got {[*a.shape]}"
        most = b[b.isfinite()].abs().max() if b.isfinite().any() else 0.0
        right = (a == b) | ((a - b).abs() <= relative * most + absolute)
        if right.all():
            return ""
        place = (~right).nonzero()[0].tolist()
        pair = f"expected {b[tuple(place)]:.6g}, got {a[tuple(place)]:.6g}"
        several = f"at {place} of {[*b.shape]}: {pair}; {int((~right).sum())} places differ"
        return several if place else pair
    if isinstance(expected, dict) and isinstance(got, dict):
        pairs = {key: (got[key], expected[key]) for key in expected if key in got}
    elif isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        pairs = dict(enumerate(zip(got, expected)))
    elif isinstance(expected, str) and isinstance(got, str) and got != expected:
        n = next((n for n, pair in enumerate(zip(got, expected)) if len({*pair}) > 1), None)
        n = min(len(got), len(expected)) if n is None else n
        near = slice(max(n - 30, 0), n + 30)
        return f"at character {n}: expected {expected[near]!r}, got {got[near]!r}"
    else:
        return "" if got == expected else f"expected {shorten(expected)}, got {shorten(got)}"
    for key, pair in pairs.items():
        if said := difference(*pair, relative, absolute):
            return f"[{key!r}]: {said}"
    if len(got) == len(expected) == len(pairs):
        return ""
    return f"expected {shorten(expected)}, got {shorten(got)}"


def shorten(value, most=100) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 4] + " ..."


def same(got, expected, case="", relative=0.0, absolute=0.0) -> None:
    """Fails where two values differ, in one line: the case, the first place, and what is there."""
    __tracebackhide__ = True
    if said := difference(got, expected, relative, absolute):
        raise AssertionError(f"{case}: {said}" if case else said)


def close(got, expected, relative=1e-5, case="") -> None:
    __tracebackhide__ = True
    same(got, expected, case, relative)


def byte_tokenizer(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    """Byte-level BPE without merges: every text round-trips."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {c: i for i, c in enumerate(sorted(alphabet))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


@pytest.fixture
def toy_tokenizer():
    return prlm.Tokenizer(byte_tokenizer(), {256})


def write_lamp(folder, task="LaMP-4", users=6, split="train", seed=0):
    """A small data set in LaMP's format under folder/{split}/."""
    rng, kind = random.Random(f"{split} {seed}"), retrieve.TASKS[task]
    words = ["tennis", "golf", "paris", "oslo", "wins", "again", "today", "why"]
    (folder / split).mkdir(parents=True, exist_ok=True)
    questions, golds = [], []
    for n in range(users):
        id = f"3{'0' if split == 'train' else '1'}{n}"
        profile = [
            {key: " ".join(rng.choices(words, k=4)) for key in kind.fields}
            | {"id": f"{id}{i}", "date": f"20{10 + i}-0{1 + n}-11"}
            for i in range(rng.randint(2, 5))
        ]
        text = kind.prefix + " ".join(rng.choices(words, k=5))
        questions.append({"id": id, "input": text, "profile": profile, "user_id": f"u{id}"})
        golds.append({"id": id, "output": " ".join(rng.choices(words, k=4))})
    outputs = {"task": task.replace("-", "_"), "golds": golds}
    (folder / split / f"{split}_questions.json").write_text(json.dumps(questions))
    (folder / split / f"{split}_outputs.json").write_text(json.dumps(outputs))


ANSWERS = ("{'title': 'tennis wins'}", "{'title': 'golf'}", "{'title': 'oslo today'}")


def write_policy(folder, seed=0, answers=ANSWERS):
    """A random Qwen2 whose tokenizer knows bytes and a few whole answers, which it likes."""
    backend = byte_tokenizer()
    backend.add_tokens(["<think>\n", "\n</think>\n", *answers, retrieve.SYSTEM])
    torch.manual_seed(seed)  # of the biases
    generator = torch.Generator().manual_seed(seed)
    raw = dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=272, hidden_size=16,
        intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    decoder = prlm.Decoder(raw)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.02, generator=generator)
        if answers:
            size, embeddings = backend.get_vocab_size(), decoder.model.embed_tokens.weight
            embeddings[:, 0] = 0.06  # a direction that every hidden state has, these rows most
            embeddings[size - 4 : size - 1] *= 25
    settings = json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": settings}
    prlm.save_decoder(decoder, prlm.Tokenizer(backend, {258}, files), folder)


WORDS = ["tennis", "golf", "paris", "oslo", "wins", "today", "zebra"]  # the last is unknown


def random_texts(count, longest=20, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, longest))) for _ in range(count)]


def shake(module, scale=0.3):
    """The module with every weight away from its default, so that its outputs differ widely."""
    noise = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=noise)
    return module


def write_encoder(folder, seed=0):
    """A random BERT over whole words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS[:-1]]
    known = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pair, special = "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    frame = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", pair, special)
    backend.post_processor = frame
    torch.manual_seed(seed)
    raw = dict(
        model_type="bert", vocab_size=len(words), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    tokenizer = prlm.Tokenizer(backend)
    prlm.save_checkpoint(prlm.Encoder(raw).state_dict(), raw, tokenizer, folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A directory with lamp/, policy/ and encoder/, each tiny."""
    folder = tmp_path_factory.mktemp("world")
    for split in ("train", "dev"):
        write_lamp(folder / "lamp" / "LaMP_4", split=split)
    write_policy(folder / "policy")
    write_encoder(folder / "encoder")
    return folder


# ---- A run, and one step of it ---------------------------------------------------------------


def tiny(world, out, **changes):
    """Options of a run that takes about a second."""
    settings = dict(
        model=str(world / "policy"), data=str(world / "lamp"), encoder=str(world / "encoder"),
        steps=4, prompts_per_step=2, group_size=3, max_new_tokens=8, max_prompt_tokens=400, k=2,
        eval_every=2, save_every=2, pairs_per_query=6, reward_epochs=1, lr=3e-3, limit=4,
        device="cpu", out=str(out),
    )  # fmt: skip
    return rl.Options(**settings | changes)


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """One undisturbed run with a judge."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    rl.main(tiny(world, out, beta=0.1, accuracy=2.0))
    return out


def without_clock(path):
    return [{k: v for k, v in line.items() if "second" not in k} for line in prlm.read_lines(path)]


def small_policy(o) -> rl.Policy:
    """A random model with 2 of its 40 ids unused; adapters, if asked for, that are not 0."""
    raw = dict(
        model_type="qwen2", vocab_size=40, hidden_size=16, intermediate_size=32, rope_theta=1e4,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
        tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder, reference = prlm.Decoder(raw), prlm.Decoder(raw)
    decoder.vocab_limit = reference.vocab_limit = 38
    with torch.no_grad():
        for parameter, other in zip(decoder.parameters(), reference.parameters()):
            parameter.normal_(std=0.3)
            other.copy_(parameter + 0.03 * torch.randn_like(parameter))
    if o.lora_rank:
        rl.add_lora(decoder, o.lora_rank, 2.0 * o.lora_rank)
        for name, parameter in decoder.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.1)
    return rl.Policy(decoder, decoder, None, reference.requires_grad_(False))


@functools.cache
def small_rollout(lora_rank: int):
    """Completions of PROMPTS, of which some do not end, with advantages."""
    decoder = small_policy(rl.Options(lora_rank=lora_rank)).decoder
    groups = prlm.generate(decoder, PROMPTS, 4, 8, 0.7, {3, 7, 11, 30}, seed=1)
    rows = [vars(c) for group in groups for c in group]
    gains = torch.randn(12, generator=torch.Generator().manual_seed(0)).tolist()
    for row, gain in zip(rows, gains):
        row["advantage"] = gain
        row["logprobs"] = [x + 0.1 * math.sin(x) for x in row["logprobs"]]  # a sampler that rounds
    assert {row["finished"] for row in rows} == {True, False}
    return rows


def small_step(**changes):
    """The arguments of an update on 3 prompts with 4 completions each."""
    how = dict(group_size=4, max_new_tokens=8, temperature=0.7, clip=0.02) | changes
    o = rl.Options(**how)
    policy = small_policy(o)
    trained = [p for p in policy.decoder.parameters() if p.requires_grad]
    rows = copy.deepcopy(small_rollout(o.lora_rank))
    return o, policy, torch.optim.SGD(trained, 0.5), PROMPTS, rows


def trained(policy):
    return torch.cat([p.detach().flatten() for p in policy.decoder.parameters() if p.requires_grad])
