"""Random input on which an exercise's two solutions must agree: `exercises.py selftest` runs it.

A case is named after its function. It takes `m`, the module with one of the solutions, and `r`, a
random.Random; what it returns is compared. What the docstring leaves open (which noise, what stands
behind the mask) the case leaves out.
"""

import functools
import math
import random
import sys
import time
import types
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from conftest import byte_tokenizer, difference, write_encoder

import prlm
from retrieve import Example

CASES = 500  # of an exercise; fewer where they take longer than SECONDS
SECONDS = 2


def case_of(function: str):
    return globals()[function.replace(".", "_")]


def compare(file: str, function: str, original: str, other: str) -> tuple[int, str]:
    """(cases, "" or the first that differs) of two texts of a module."""
    case, modules = case_of(function), [load(file, text) for text in (other, original)]
    for n in range(3):  # what is imported late or made once is not on the clock
        outcome(case, modules[1], n)
    end = time.process_time() + SECONDS
    for n in range(CASES):
        got, expected = (outcome(case, m, n) for m in modules)
        if said := difference(got, expected, 1e-4):
            return n + 1, f"case {n}: {said}"
        if time.process_time() > end:
            return n + 1, ""
    return CASES, ""


def load(file: str, text: str):
    module = types.ModuleType(f"differential_{Path(file).stem}")
    module.__file__ = str(Path(prlm.__file__).with_name(file))
    sys.modules[module.__name__] = module  # dataclasses look for their module there
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def outcome(case, module, n: int):
    try:
        return case(module, random.Random(n))
    except Exception as error:
        return type(error).__name__


# ---- What is drawn ---------------------------------------------------------------------------


def words(r, most=9):
    return r.choices("abc", k=r.randint(0, most))


def phrase(r, *pieces):
    return " ".join(r.choices(pieces or ("a'b", "é", "of ", "word", "!"), k=r.randint(0, 12)))


def ids(r, most):
    return r.choices(range(9), k=r.randint(0, most))


def sizes(r, count, most=4):
    return [r.randint(1, most) for _ in range(count)]


def normal(r, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(r.getrandbits(60)))


def mask_of(r, *shape):
    """[.., C]: a random number of ones, then zeros."""
    lengths = torch.tensor([r.randint(0, shape[-1]) for _ in range(math.prod(shape[:-1]))])
    return torch.arange(shape[-1]) < lengths.view(*shape[:-1], 1)


def fill(r, model):
    for parameter in model.parameters():
        parameter.data = 0.5 * normal(r, *parameter.shape)
    return model


def decoder(m, r, kv_heads=1):
    raw = dict(
        model_type="qwen2", vocab_size=9, hidden_size=12, intermediate_size=8, rope_theta=99.0,
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    return fill(r, m.Decoder(raw)).eval()


@functools.cache
def encoder_directory():
    write_encoder(Path("encoder"))
    return "encoder"


@functools.cache
def tokenizer():
    return prlm.Tokenizer(byte_tokenizer())


# ---- retrieve.py and eval.py -----------------------------------------------------------------


def BM25___init__(m, r):
    corpus = [words(r) for _ in range(r.randint(0, 8))]
    index = m.BM25(corpus, 2 * r.random(), r.random(), r.choice(["okapi", "lucene", "x"]))
    return index.scores(words(r)), index.norm, index.k1, dict(index.idf)


def BM25_scores(m, r):
    corpus = [words(r) for _ in range(r.randint(0, 8))]
    return m.BM25(corpus, 2 * r.random(), r.random()).scores([*words(r), "unknown"])


def retrieve(m, r):
    task = r.choice(["LaMP-4", "LaMP-5", "LaMP-7"])
    retriever = r.choice(["none", "random", "recency", "bm25", "lucene", "dense", "best"])
    items = [{key: phrase(r) for key in m.TASKS[task].fields} for _ in range(r.randint(0, 6))]
    items = [item | {"date": r.choice(["2012", "2013-1", "2013-1-7", "?"])} for item in items]
    example = m.Example(str(r.random()), "u", task, phrase(r), items, None)
    letters = "".join(sorted({*"".join(value for item in items for value in item.values())}))
    m.embed = lambda _, texts: np.array([[c in text for c in letters] for text in texts], int)
    encoder = r.choice([*(types.SimpleNamespace(tokenizer=x) for x in (1, 1, None)), None])
    found = m.retrieve(example, r.randint(-1, 7), retriever, r.randint(0, 3), encoder)
    return len(found) if retriever == "random" else found


def build_messages(m, r):
    task = r.choice(["LaMP-4", "LaMP-5", "LaMP-7"])
    items = [{key: phrase(r) for key in m.TASKS[task].fields} for _ in range(r.randint(0, 4))]
    example = m.Example("1", "u", task, phrase(r), items, None)
    least, most = (len(tokenizer().chat(m.build_messages(example, x))) for x in ([], items))
    budget = r.choice([None, *(r.randint(least - 60, most + 2) for _ in range(9))])
    return m.build_messages(example, items, tokenizer(), budget)


def common(m, r):
    return m.common(words(r), words(r), r.randint(1, 3))


def longest_common_subsequence(m, r):
    return m.longest_common_subsequence(words(r, 80), words(r, 80))


def extract_answer(m, r):
    pieces = [*"{}'\"‘’“”:;.\n\t ,*#>-_\\", "\\'", "```", "a b", "it's", "title", "TITLE", "tweet"]
    pieces += ["<think>", "</think>", "<answer>", "</answer>", "'title': '", '"Title": "', "'}"]
    pieces += ["title: ", "generated title", ", 'tweet'", "“title”", "subtitle", "**Title:** "]
    weights = r.choices([0, 0.3, 1, 3], k=len(pieces))  # so that some cases have much of a few
    weights[0] = 1
    return m.extract_answer("".join(r.choices(pieces, weights, k=r.randint(0, 24))), "LaMP-4")


# ---- prlm.py ---------------------------------------------------------------------------------


def read_safetensors(m, r):
    kinds, path = [torch.uint8, torch.int16, torch.float32, torch.bool], Path("weights")
    shapes = [[r.randint(0, 3) for _ in range(r.randint(0, 3))] for _ in range(r.randint(0, 3))]
    tensors = {str(n): normal(r, *shape).to(r.choice(kinds)) for n, shape in enumerate(shapes)}
    data = bytearray(safetensors.torch.save(tensors))
    for _ in range(r.choice([0, 1, 2])):
        data[r.randrange(len(data))] = r.choice(b'0123456789-[]{},:"FU')
    path.write_bytes(data[: r.choice([None, None, r.randint(0, len(data))])])
    return {name: (str(x.dtype), x.double()) for name, x in m.read_safetensors(path).items()}


def rope_frequencies(m, r):
    low, wide, context = 3 * r.random(), 0.1 + r.random(), 2.0 ** r.randint(5, 13)
    rope = dict(factor=1 + 9 * r.random(), low_freq_factor=low, high_freq_factor=low + wide)
    rope |= dict(original_max_position_embeddings=context, head_dim=2 * r.randint(1, 64))
    rope |= {"rope_theta": 10 ** (2 + 4 * r.random()), "rope_type": r.choice(["llama3", "default"])}
    return m.rope_frequencies(types.SimpleNamespace(**rope))


def rotate(m, r):
    B, T, heads, half = sizes(r, 4)
    angles = normal(r, T, 1, half)
    cos, sin = angles.cos().repeat(1, 1, 2), torch.cat([-angles.sin(), angles.sin()], -1)
    return m.rotate(normal(r, B, T, heads, 2 * half), cos, sin)


def Linear_forward(m, r):
    linear = m.Linear(*sizes(r, 2), r.random() < 0.5)
    if r.random() < 0.8:
        rank, linear.scale = r.randint(1, 3), 1 + r.random()
        linear.lora_A = torch.nn.Parameter(torch.empty(rank, linear.in_features))
        linear.lora_B = torch.nn.Parameter(torch.empty(linear.out_features, rank))
    fill(r, linear)
    x = normal(r, *sizes(r, r.randint(1, 2)), linear.in_features).requires_grad_()
    out = linear(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *linear.parameters()])


def attention(m, r):
    B, T, K, R, D = sizes(r, 5)
    S = T + r.choice([0, 2])
    visible = normal(r, B, T, S) > 0
    visible[..., r.randrange(S)] = True
    q, k, v = (normal(r, B, *shape, D) for shape in ((T, K * R), (S, K), (S, K)))
    return m.attention(q, k, v, visible if S > T else r.choice([None, visible]))


@torch.no_grad()
def Decoder_forward(m, r):
    mask = mask_of(r, r.randint(1, 3), r.randint(1, 6))
    mask[:, 0] = True
    mask = r.choice([mask, mask.flip(1)])
    one, tokens = decoder(m, r), (normal(r, *mask.shape).abs() * 3).long().clamp(max=8)
    return one(tokens, mask.int()) * mask[..., None], one(tokens)


@torch.no_grad()
def Cache_read_next(m, r):
    K, G, C = r.choice([1, 2, 3, 6]), r.randint(1, 3), r.randint(1, 3)
    prompts = m.Ragged([[0] * length for length in sizes(r, r.randint(1, 3))])
    cache, found = m.Cache(decoder(m, r, K), prompts, G, C), []
    for layer in (0, 1):
        cache.read_prompts(layer, *(normal(r, len(prompts.tokens), n, 2) for n in (6, K, K)))
    for _ in range(C):
        cache.next_slot(r.random() < 0.5)
        for layer in (0, 1):
            new = [normal(r, len(prompts.lengths) * G, n, 2) for n in (6, K, K)]
            found.append(cache.read_next(layer, *new))
    return found


def sample(m, r):
    logits, temperature = 9 * normal(r, *sizes(r, 2, 7)), r.choice([0, 0.3, 1, 2])
    if r.random() < 0.5:  # only one id of each row is possible
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True), -math.inf)
    found, logprobs = m.sample(logits, temperature)
    expected = (logits / (temperature or 1)).log_softmax(-1)[range(len(found)), found]
    certain = temperature == 0 or logits.isinf().any()
    return found if certain else None, (logprobs - expected).abs() < 1e-4


def generate(m, r):
    one, prompts = decoder(m, r), [ids(r, 5) or [1] for _ in range(r.randint(0, 4))]
    one.vocab_limit = r.randint(3, 9)
    group, longest, temperature = r.randint(0, 3), r.randint(0, 6), r.choice([0, 0, 0, 0, -1])
    found = m.generate(one, prompts, group, longest, temperature, ids(r, 4))
    return [[(c.tokens, torch.tensor(c.logprobs), c.finished) for c in row] for row in found]


def head_logprobs(m, r):
    one, n = decoder(m, r), r.choice([1, 5, 9, 150])
    one.vocab_limit, hidden = r.choice([9, 9, 7]), normal(r, n, 12).requires_grad_()
    targets = torch.tensor([r.randrange(9) for _ in range(n)])
    logprobs = m.head_logprobs(one, hidden, targets, 0.2 + r.random())
    total = (logprobs.masked_fill(logprobs.isinf(), 0.0) * normal(r, n)).sum()
    return logprobs, torch.autograd.grad(total, (hidden, one.head))


def token_logprobs(m, r):
    one, prompts = decoder(m, r), [ids(r, 5) or [1] for _ in range(r.randint(1, 3))]
    one.vocab_limit, G = r.choice([9, 9, 7]), r.randint(1, 3)
    answers = [[ids(r, 4) for _ in range(G)] for _ in prompts]
    answers[0][0] = [1]  # one token at least
    logprobs, mask = m.token_logprobs(one, prompts, answers, r.choice([0.5, 1.0, 2.0, 0.0]))
    total = (logprobs.masked_fill(logprobs.isinf(), 0.0) * normal(r, *mask.shape)).sum()
    return logprobs, mask, torch.autograd.grad(total, [*one.parameters()], allow_unused=True)


# ---- reward.py and rl.py ---------------------------------------------------------------------


def info_nce(m, r):
    (B, N), size = sizes(r, 2), r.choice([1, 9, 3e4])
    positive, negatives = size * normal(r, B).double(), size * normal(r, B, N).double()
    negatives[0, 0] = r.choice([0.0, -math.inf])
    return 1 + m.info_nce(positive, negatives, 0.1 + r.random())


@torch.no_grad()
def RewardModel_score(m, r):
    model = fill(r, m.RewardModel(prlm.load_encoder(encoder_directory())))
    queries, answers = ([phrase(r, "golf", " oslo ", "no") * 6 for _ in range(3)] for _ in "qa")
    return model.score(queries, answers)


def likelihood_ratio(m, r):
    P, G = r.randint(0, 3), r.randint(1, 3)
    prompts = [[ids(r, 5) or [1] for _ in range(P)] for _ in "dq"]
    answers = [[ids(r, 4) for _ in range(G)] for _ in range(P)]
    return m.likelihood_ratio(decoder(prlm, r), *prompts, answers, r.choice([1, 20, 999]))


def info_nce_backward(m, r):
    model = fill(r, m.RewardModel(prlm.load_encoder(encoder_directory())))
    o = m.RewardOptions(tokens_per_micro_batch=r.choice([1, 60, 9999]))
    pairs, texts = [], r.randint(3, 5)
    for _ in range(r.randint(1, 5)):
        query, own, *others = (phrase(r, "golf", "oslo", "no") for _ in range(texts))
        pairs.append({"query": query, "positive": own, "negatives": others})
    loss = m.info_nce_backward(o, model, pairs)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


def rewards(m, r):
    names = {"LaMP-4": "title", "LaMP-5": "title", "LaMP-7": "tweet"}
    tasks = r.choices([*names], k=r.randint(0, 4))
    starts = r.choices(["", "<think>\nx\n</think>\n", "<think>\nx"], k=len(tasks))
    said = [r.choice([phrase(r), "generated title", "generated tweet", ""]) for _ in tasks]
    rows = zip(starts, tasks, said)
    texts = [f"{start}{{'{names[task]}': '{text}'}}" for start, task, text in rows]
    examples = [m.Example("1", "u", task, phrase(r), [], r.choice([None, "a b"])) for task in tasks]

    def judge(examples, answers):
        return [len(e.query + a) / 9 for e, a in zip(examples, answers)]

    return m.rewards(texts, examples, r.choice([None, judge]), r.random(), r.random(), r.random())


def group_advantages(m, r):
    (P, G), size = sizes(r, 2), r.choice([1, 0.1, 1e-6, 1e6])
    rewards = [[size * r.choice([0.0, 1.0, 3.0, 1.1]) for _ in range(G)] for _ in range(P)]
    return m.group_advantages(torch.tensor(rewards), r.choice(["std", "none", "x"]))


def warm_start_targets(m, r):
    task = r.choice(["LaMP-4", "LaMP-5", "LaMP-7"])
    how = {"task": task, "reasoning": r.random() < 0.7, "k": r.randint(0, 3)}
    own = prlm.Tokenizer(byte_tokenizer(), {256, 258})
    own.opening = r.choice(["", "<think>\n"])
    fields = m.task_of(task).fields
    items = [{key: phrase(r) for key in fields} for _ in range(r.randint(0, 4))]
    texts = [(phrase(r), phrase(r)) for _ in range(r.randint(0, 2))]
    examples = [Example("1", "u", task, query, items, target) for query, target in texts]
    return m.warm_start_targets(m.Options(**how), own, examples)


def k3(m, r):
    shape = sizes(r, 3)
    return m.k3(normal(r, *shape), normal(r, *shape))


def token_weights(m, r):
    mask, name = mask_of(r, *sizes(r, 3)), r.choice(["grpo", "dapo", "dr_grpo", "x"])
    return m.token_weights(mask, name, r.choice([None, 5, 9]))


def grpo_loss(m, r):
    shape = sizes(r, 3)
    new, old, ref = (normal(r, *shape) for _ in range(3))
    mask, gain = mask_of(r, *shape), normal(r, *shape[:2])
    for x in (new, old, ref):
        x[~mask] = r.choice([99.0, math.inf, math.nan])
    how = {"clip": r.random(), "clip_high": r.choice([None, r.random()])}
    how |= {"beta": r.choice([0.0, r.random()]), "ref_logprobs": r.choice([ref, ref, None])}
    how |= {"normalizer": r.choice(["grpo", "dapo", "dr_grpo"])}
    how |= {"max_new_tokens": r.choice([9, 9, None])}
    how |= {"weights": r.choice([None, normal(r, *shape) * mask])}
    loss = m.grpo_loss(new.requires_grad_(), old, gain, mask, **how)
    return loss, torch.autograd.grad(loss, new)


def learning_rate(m, r):
    steps = r.randint(1, 60)
    return m.learning_rate(r.randrange(steps), steps, r.random())
