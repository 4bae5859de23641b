"""Everything that only a GPU can tell, in one run of a few minutes.

    python tests/gpu.py --out runs/gpu              # all parts
    python tests/gpu.py --only right decode         # some of them
    python tests/gpu.py --dry-run                   # all of them, tiny, on a CPU

  right    CUDA against the CPU, the sampler against the trainer, CUDA graphs against plain steps,
           LoRA, a run that is stopped and resumed
  toy      python rl.py: seconds, and held-out ROUGE-L beside a CPU's
  decode   tokens a second, beside transformers' generate and what the card's memory allows
  update   seconds and memory of a training step, beside transformers and the card's matrix rate
  judge    training and asking a reward model of BERT-base's shape
  memory   bytes a weight
  head     log-probabilities over a large vocabulary, by the size of a chunk
  static   transformers' generate with a static cache, which it compiles first

Each part is a process of its own with a time limit, so that what fails or hangs in one does not
reach the next. Each result is printed, and appended to results.jsonl, as soon as it is there.
Models have the shapes of DeepSeek-R1-Distill-Qwen-1.5B and Qwen2.5-0.5B and random weights.
transformers is compared with if it is installed.
"""

import argparse
import contextlib
import copy
import gc
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from benchmark import COMMON, ROOT, SHAPES, machine, matrices, seconds

import prlm
import retrieve
import reward
import rl

LIMITS = {  # seconds
    "right": 95, "toy": 80, "decode": 70, "update": 55, "judge": 25, "memory": 30, "head": 25,
    "static": 80,
}  # fmt: skip
TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
TINY |= {"intermediate_size": 48, "vocab_size": 1200}
BERT = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}
BERT |= {"intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512}
HERE = SimpleNamespace(dry=False, device="cuda", out=Path(), part="", failed=0)
TOY = prlm.SHIPPED / "policy"
BF16 = torch.bfloat16


# ---- Measuring ---------------------------------------------------------------------------------


def measure(name: str, function, *arguments, **named) -> None:
    """Prints and appends the dictionary that the function returns, or how it failed."""
    begun = time.perf_counter()
    line = {"part": HERE.part, "name": name}
    try:
        line |= function(*arguments, **named)
        json.dumps(line)
    except Exception as error:
        traceback.print_exc()
        line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    line["took"] = time.perf_counter() - begun
    HERE.failed += "error" in line or not line.get("ok", True)
    prlm.append(HERE.out / "results.jsonl", [line])
    print(describe(line), flush=True)
    allocated()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def describe(line: dict) -> str:
    values = {k: v for k, v in line.items() if k not in ("part", "name")}
    text = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    flag = "  WRONG" if "error" in line or not line.get("ok", True) else ""
    return f"{line['part']:<7} {line['name']:<30} {'; '.join(text)}{flag}"


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def peak(function) -> float:
    """The most memory, in GiB, that was in use during a call."""
    if HERE.device != "cuda":
        function()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def card() -> tuple[float, float]:
    """(operations a second of a product in bfloat16, bytes a second that a sum reads)"""
    return machine(BF16, HERE.device, *((64, 2**16) if HERE.dry else (8192, 2**30)))


@contextlib.contextmanager
def pace(**changes):
    """Other settings of the device; yields the seconds that the recordings of CUDA graphs take."""
    record, times = prlm.Recorded.record, []

    def timed(self):
        begun = time.perf_counter()
        record(self)
        times.append(time.perf_counter() - begun)

    changed = {HERE.device: prlm.PACES[HERE.device]._replace(**changes)}
    with mock.patch.dict(prlm.PACES, changed), mock.patch.object(prlm.Recorded, "record", timed):
        yield times


def shape_of(shape: str) -> dict:
    return COMMON | SHAPES[shape] | (TINY if HERE.dry else {})


def build(shape: str, **changes) -> prlm.Decoder:
    """Random float32 weights on the grid of bfloat16, as published ones are."""
    torch.manual_seed(0)
    with torch.device(HERE.device):
        decoder = prlm.Decoder(shape_of(shape) | changes)
    for parameter in decoder.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    return decoder


def make_policy(shape: str, lora: int = 0) -> rl.Policy:
    """As rl.make_policy, of random weights."""
    decoder = prlm.multiply_in(build(shape), BF16)
    if lora:
        prlm.add_lora(prlm.for_sampling(decoder, BF16), lora, lora)
        return rl.Policy(decoder, decoder, None, prlm.without_lora(decoder))
    reference = prlm.for_sampling(copy.deepcopy(decoder), BF16)
    return rl.Policy(decoder, copy.deepcopy(reference), None, reference)


def peer_or_none(shape: str, dtype):
    """transformers' model of the same shape, random."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no comparison")
        return None
    raw = {k: v for k, v in shape_of(shape).items() if k != "model_type"}
    with torch.device(HERE.device):
        make, config = (
            transformers.AutoModelForCausalLM.from_config,
            transformers.Qwen2Config(**raw),
        )
        return make(config, dtype=dtype, attn_implementation="sdpa")


def sizes(T: int = 512, C: int = 256) -> tuple[int, int]:
    """(prompt tokens, new tokens)"""
    return (12, 6) if HERE.dry else (T, C)


def random_ids(rows: int, length: int, vocabulary: int, ragged: bool = False) -> list[list[int]]:
    rng = random.Random(f"{rows} {length}")
    lengths = [rng.randint(length // 2, length) if ragged else length for _ in range(rows)]
    return [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]


def toy_prompts(o, count: int) -> list[list[int]]:
    tokenizer = prlm.load_tokenizer(TOY)
    return retrieve.make_prompts(o, tokenizer, retrieve.load_examples(o, "dev")[:count])


# ---- right -------------------------------------------------------------------------------------


def right() -> None:
    for dtype in (torch.float32, BF16):
        measure(f"attention, {str(dtype)[6:]}", attention_is_right, dtype)
    measure("toy's logits and greedy texts", toy_is_the_cpus)
    for shape in ("toy", "1.5B"):
        measure(f"sampler and trainer, {shape}", sampler_is_the_trainer, shape)
    measure("graph, toy, float32", graphs_are_right, "toy", torch.float32)
    measure("graph, 0.5B, bfloat16", graphs_are_right, "0.5B", BF16)
    measure("graph, 0.5B, LoRA", graphs_are_right, "0.5B", BF16, lora=True)
    measure("reward model", judge_is_the_cpus)
    measure("LoRA, 3 steps", lora_runs)
    measure("resume", run_resumes)


def attention_is_right(dtype) -> dict:
    """Values and gradients of masked, grouped attention against a float64 softmax."""
    torch.manual_seed(0)
    B, T, S, K, R, D = (2, 9, 14, 2, 2, 8) if HERE.dry else (8, 255, 767, 2, 6, 128)
    shapes = ((T, K * R), (S, K), (S, K))
    q, k, v = (torch.randn(B, t, h, D, device=HERE.device).to(dtype) for t, h in shapes)
    q = q * 3
    visible = torch.ones(B, T, S, dtype=torch.bool, device=HERE.device).tril(S - T)
    visible[1:, :, : S // 4] = False
    weight = torch.randn(B, T, K * R, D, device=HERE.device)

    def run(attend, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = attend(*inputs)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    def plain(q, k, v):
        k, v = (x.repeat_interleave(R, 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
        scores = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", scores, v)

    got = run(lambda *x: prlm.attention(*x, visible), q, k, v)
    expected = run(plain, *(x.double() for x in (q, k, v)))
    got.append(prlm.exact_scores(q[:, :, 0], k[:, :, 0]))
    expected.append(q[:, :, 0].double() @ k[:, :, 0].double().mT)
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected)]
    most = 1e-4 if dtype == torch.float32 else 2e-2
    names = ("out", "dq", "dk", "dv", "exact_scores")
    return dict(zip(names, errors)) | {"ok": max(errors) < most and errors[-1] < 1e-5}


def toy_is_the_cpus() -> dict:
    prompts = toy_prompts(rl.Options(), 2 if HERE.dry else 32)
    eos, new = prlm.load_tokenizer(TOY).eos_ids, 8 if HERE.dry else 128
    logits, texts = [], []
    for device in ("cpu", HERE.device):
        decoder = prlm.load_decoder(TOY, device)
        rows = prlm.Ragged(prompts, device)
        with torch.no_grad():
            logits.append(decoder(rows.grid(rows.tokens), rows.mask)[rows.mask].cpu())
        texts.append(prlm.generate(decoder, prompts, 1, new, 0.0, eos))
    error = (logits[0] - logits[1]).abs().max().item()
    same = statistics.mean(a[0].tokens == b[0].tokens for a, b in zip(*texts))
    return {"logits": error, "same_texts": same, "ok": error < 1e-3 and same > 0.95}


def graphs_are_right(shape: str, dtype, lora: bool = False) -> dict:
    """The same completions with and without graphs, and log-probabilities that the trainer has,
    where rows leave and the cache's window grows beyond 128."""
    decoder = prlm.load_decoder(TOY, HERE.device) if shape == "toy" else build(shape)
    prlm.for_sampling(decoder, dtype)
    vocabulary = decoder.vocab_limit
    if lora:
        prlm.add_lora(decoder, 8, 8)
        for name, parameter in decoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    P, G, new = (2, 2, 8) if HERE.dry else (8, 8, 160)
    prompts = random_ids(P, 12 if HERE.dry else 90, vocabulary, ragged=True)
    # One id in 150 ends a completion: a few rows leave early, most in the middle, some never.
    asked = (decoder, prompts, G, new, 1.0, range(vocabulary // 150), 3)
    with pace() as recorded:
        groups, again = prlm.generate(*asked), prlm.generate(*asked)
    with pace(record=False):
        plain = prlm.generate(*asked)
    pairs = [(a, b) for x, y in zip(groups, plain) for a, b in zip(x, y)]
    found = {"same": statistics.mean(a.tokens == b.tokens for a, b in pairs)}
    found |= {"again": groups == again, "recordings": len(recorded)}
    found |= gaps(decoder, prompts, groups, 1.0)
    fine = found["gap"] < (5e-4 if dtype == torch.float32 else 0.5)
    fine &= HERE.device == "cpu" or len(recorded) > 2
    return found | {"ok": found["same"] == 1 and found["again"] and fine}


@torch.no_grad()
def gaps(decoder, prompts, groups, temperature: float) -> dict:
    """Differences between the sampler's log-probabilities and the trainer's."""
    tokens = [[c.tokens for c in group] for group in groups]
    logprobs, mask = prlm.token_logprobs(decoder, prompts, tokens, temperature)
    sampled = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    gap = (logprobs[mask].cpu() - sampled).abs()
    return {"gap": gap.max().item(), "gap_mean": gap.mean().item()}


def sampler_is_the_trainer(shape: str) -> dict:
    """In bfloat16, at equal weights; the KL to the reference is exactly 0 there."""
    o = rl.Options(device=HERE.device, precision="bfloat16")
    if shape == "toy":
        policy, prompts = rl.make_policy(o, TOY), toy_prompts(o, 2 if HERE.dry else 16)
        eos, new = policy.tokenizer.eos_ids, 8 if HERE.dry else 128
    else:
        policy, eos, new = make_policy(shape), (), 8 if HERE.dry else 160
        prompts = random_ids(2, sizes(300)[0], policy.decoder.vocab_limit, ragged=True)
    found = {}
    for temperature in (1.0, 0.7):
        groups = prlm.generate(policy.sampler, prompts, 4, new, temperature, eos, seed=1)
        gap = gaps(policy.decoder, prompts, groups, temperature)
        found |= {f"{name} at {temperature}": value for name, value in gap.items()}
    tokens = [[c.tokens for c in group] for group in groups]
    logprobs, mask = prlm.token_logprobs(policy.decoder, prompts, tokens)  # with gradient
    with torch.no_grad():
        reference, _ = prlm.token_logprobs(policy.reference, prompts, tokens)
    found["kl"] = rl.k3(logprobs.detach(), reference)[mask].abs().max().item()
    return found | {"ok": found["kl"] == 0 and found["gap at 1.0"] < 0.5}


def judge_is_the_cpus() -> dict:
    queries, scores = ["a story about paris"] * 6, []
    answers = ["asthma", "paris again no joke", "x y z " * 40, "a", "behind doors", "why, friend"]
    for device, dtype in (
        ("cpu", torch.float32),
        (HERE.device, torch.float32),
        (HERE.device, BF16),
    ):
        torch.manual_seed(0)
        model = reward.RewardModel(prlm.load_encoder(prlm.SHIPPED / "encoder", "cpu")).to(device)
        with torch.no_grad():
            scores.append(prlm.multiply_in(model, dtype).score(queries, answers).cpu())
    error, low = ((x - scores[0]).abs().max().item() for x in scores[1:])
    spread = scores[0].std().item()
    return {"float32": error, "bfloat16": low, "spread": spread, "ok": error < 1e-4}


def toy_run(folder, **options) -> list[dict]:
    """The lines of metrics.jsonl of a short run without a judge."""
    small = dict(limit=2, prompts_per_step=1, group_size=2, max_new_tokens=8, k=1)
    fixed = dict(limit=24, prompts_per_step=8, group_size=8) | (small if HERE.dry else {})
    fixed |= dict(personalization=0.0, eval_every=0, force=True, device=HERE.device)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        rl.main(rl.Options(out=str(folder), precision="bfloat16", **fixed | options))
    return prlm.read_lines(Path(folder) / "metrics.jsonl")


def lora_runs() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        log = toy_run(f"{folder}/a", steps=3, lora_rank=8, beta=0.04, lr=1e-3)
        merged = prlm.load_decoder(f"{folder}/a/checkpoint", HERE.device)
        fine = all(bool(p.isfinite().all()) for p in merged.parameters())
    found = {key: [line[key] for line in log] for key in ("gap", "gap_mean", "grad_norm", "kl")}
    first, *_, last = found["kl"]
    return found | {"ok": fine and first == 0 and (last > 0 or HERE.dry)}


def run_resumes() -> dict:
    """Six steps at once, and six that are cut off in the fourth and go on from the third."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the last one of its process
    warnings.filterwarnings("ignore", message=".*deterministic")
    update, calls = rl.update, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise ConnectionAbortedError
        return update(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        how = dict(steps=6, save_every=3)
        whole = toy_run(f"{folder}/a", **how)
        with mock.patch.object(rl, "update", stopping), contextlib.suppress(ConnectionAbortedError):
            toy_run(f"{folder}/b", **how)
        parts = toy_run(f"{folder}/b", resume=True, **how)
        samples = [prlm.read_lines(f"{folder}/{run}/samples.jsonl") for run in "ab"]
    apart = [
        max(abs(a[n] - b[n]) / (abs(a[n]) + 1e-3) for n in ("reward", "grad_norm", "entropy"))
        for a, b in zip(whole, parts)
    ]
    same = statistics.mean(a["tokens"] == b["tokens"] for a, b in zip(*samples))
    # On CUDA sums may be taken in another order, and one other token makes another sample.
    found = {"same_samples": same, "apart_by_step": apart}
    return found | {"ok": len(parts) == 6 and max(apart[:4]) < 0.05}


# ---- toy ---------------------------------------------------------------------------------------


def toy() -> None:
    measure("python rl.py", toy_default)


def toy_default() -> dict:
    """The default run, and the same on the CPU at the same time, if that ends before the limit."""
    few = "--steps 1 --group-size 2 --prompts-per-step 2 --limit 2 --max-new-tokens 8 --force"
    few += " --personalization 0 --eval-every 0 --k 1"
    env = os.environ | {"OMP_NUM_THREADS": "1" if HERE.dry else "4"}
    found, begun, runs = {}, time.perf_counter(), {}
    last = begun + (600 if HERE.dry else LIMITS["toy"] - 5)
    for device in dict.fromkeys((HERE.device, "cpu")):
        out, log = HERE.out / f"toy_{device}", HERE.out / f"toy_{device}.log"
        line = [sys.executable, "rl.py", "--device", device, "--out", out, "--overwrite"]
        with open(log, "w") as file:
            how = {"cwd": ROOT, "env": env, "stdout": file, "stderr": file}
            runs[device] = out, log, subprocess.Popen(line + few.split() * HERE.dry, **how)
    for device, (out, log, process) in runs.items():
        try:
            status = process.wait(max(0.1, last - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            continue
        if status:
            raise RuntimeError(log.read_text()[-2000:])
        found[f"{device}_seconds"] = time.perf_counter() - begun
        scores, lines = prlm.read_json(out / "scores.json"), prlm.read_lines(out / "metrics.jsonl")
        found |= {f"{device}_{name}": s["rouge-l"] for name, s in scores.items()}
        for name in ("gap", "gap_mean", "seconds_rollout", "seconds_update"):
            found[f"{device}_{name}"] = statistics.median(line[name] for line in lines)
    return found | {"ok": f"{HERE.device}_after" in found}


# ---- decode, static ----------------------------------------------------------------------------


def decode() -> None:
    rates, gpu = card(), HERE.device == "cuda"
    name = torch.cuda.get_device_name() if gpu else "cpu"
    measure("card", lambda: {"card": name, "TFLOP/s": rates[0] / 1e12, "GB/s": rates[1] / 1e9})
    for shape, rows in (("0.5B", [(4, 8)]), ("1.5B", [(1, 4), (4, 8), (16, 8)])):
        decoder = prlm.for_sampling(build(shape), BF16)
        for P, G in rows:
            measure(f"{shape}, {P} x {G}", decode_speed, decoder, P, G, rates)
    measure("1.5B, 4 x 8, prompt 509", decode_speed, decoder, 4, 8, rates, 509)
    prlm.add_lora(decoder, 16, 16)
    measure("1.5B, 4 x 8, LoRA", decode_speed, decoder, 4, 8, rates)
    del decoder
    if model := peer_or_none("1.5B", BF16):
        for P in (4, 16):
            measure(f"transformers 1.5B, {P} x 8", peer_decode, model, P, 8)


def static() -> None:
    if model := peer_or_none("1.5B", BF16):
        measure("transformers 1.5B, 4 x 8", peer_decode, model, 4, 8, "static")


def decode_speed(decoder, P: int, G: int, rates, T: int = 512) -> dict:
    """Of a step: the time, and the time that reading weights and cache once would take."""
    T, C = sizes(T)
    prompts, c = random_ids(P, T, decoder.vocab_limit), decoder.config

    def run(new):
        prlm.generate(decoder, prompts, G, new, 1.0, (), seed=1)

    with pace() as recorded:
        memory = peak(lambda: run(C))
        recorded.clear()
        whole, first = seconds(lambda: run(C), 2), seconds(lambda: run(1), 3)
    with pace(record=False):
        run(2)
        plain = (seconds(lambda: run(C // 4 + 1)) - first) / (C // 4)
    step, weights = (whole - first) / (C - 1), matrices(decoder) + decoder.head.numel()
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # its keys and values
    read = 2 * (weights + token * (P * T + P * G * C / 2))
    floor = max(read / rates[1], 2 * P * G * weights / rates[0])
    return {
        "tokens/s": P * G * C / whole, "prompt_s": first, "step_ms": 1e3 * step,
        "plain_step_ms": 1e3 * plain, "floor_ms": 1e3 * floor, "share": floor / step,
        "recording_ms": 1e3 * sum(recorded) / 2, "GiB": memory,
    }  # fmt: skip


def peer_decode(model, P: int, G: int, cache: str | None = None) -> dict:
    from transformers import GenerationConfig

    T, C = sizes()
    prompts = torch.tensor(random_ids(P, T, model.config.vocab_size), device=HERE.device)
    how = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0)
    how |= dict(num_return_sequences=G, eos_token_id=None, cache_implementation=cache)

    def run(new):
        config, mask = GenerationConfig(max_new_tokens=new, **how), torch.ones_like(prompts)
        out = model.generate(prompts, attention_mask=mask, generation_config=config)
        if out.shape != (P * G, T + new):
            raise RuntimeError(f"transformers generated {[*out.shape]}")

    first = seconds(lambda: run(C if cache else 3))
    memory = []
    whole = seconds(lambda: memory.append(peak(lambda: run(C))))
    return {"tokens/s": P * G * C / whole, "seconds": whole, "GiB": memory[0], "warm_up": first}


# ---- update ------------------------------------------------------------------------------------


def update() -> None:
    rate, shape = card()[0], (4, 8, 512, 256)
    policy = make_policy("1.5B")
    for name, saving, *rows in (
        ("full, 4 x 8, 512 + 256", False, *shape),
        ("full, 4 x 8, 512 + 256, checkpointing", True, *shape),
        ("full, 1 x 4, 512 + 768, checkpointing", True, 1, 4, 512, 768),
    ):
        measure(name, update_speed, policy, rate, saving, *rows)
    measure("refresh", lambda: {"seconds": seconds(lambda: rl.refresh(policy, 1), 2)})
    policy = make_policy("1.5B", lora=16)
    for saving in (False, True):
        name = f"LoRA, 4 x 8, 512 + 256{', checkpointing' * saving}"
        measure(name, update_speed, policy, rate, saving, *shape)
    del policy
    measure("transformers, 4 x 8, 512 + 256", peer_update, *shape)


def rollout(policy, P: int, G: int, T: int, C: int, **options):
    """The arguments of rl.update for random completions, each of full length."""
    row, vocabulary = dict(logprobs=[0.0] * C, finished=True), policy.decoder.vocab_limit
    completions = random_ids(P * G, C, vocabulary)
    rows = [row | {"tokens": x, "advantage": n % 2 - 0.5} for n, x in enumerate(completions)]
    o = rl.Options(group_size=G, prompts_per_step=P, max_new_tokens=C, **options)
    return o, random_ids(P, T, vocabulary), rows


def update_speed(policy, rate: float, saving: bool, P: int, G: int, T: int, C: int) -> dict:
    T, C = sizes(T, C)
    decoder, optimizer = policy.decoder, rl.make_optimizer(policy, 1e-6)
    decoder.checkpointing, c = saving, decoder.config
    o, prompts, rows = rollout(policy, P, G, T, C)

    def step():
        rl.update(o, policy, optimizer, prompts, rows)

    step()
    memory, time_of_one = peak(step), seconds(step, 2)
    # A product with W costs 2 operations a weight and token, its gradients twice that; a frozen W
    # has no gradient of its own. Causal attention costs 4 heads D operations a pair of tokens.
    products = 2 * matrices(decoder) * (P * T + P * G * (C - 1))
    products += 2 * decoder.head.numel() * P * G * C
    pairs = P * T * T / 2 + P * G * (C * T + C * C / 2)
    scores = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    operations = (3 if decoder.head.requires_grad else 2) * products + 3 * scores
    return {
        "seconds": time_of_one, "tokens/s": (P * T + P * G * C) / time_of_one, "GiB": memory,
        "TFLOP": operations / 1e12, "share": operations / rate / time_of_one,
    }  # fmt: skip


def peer_update(P: int, G: int, T: int, C: int) -> dict:
    """The same step in transformers as it comes: each row with its prompt, 8 rows at a time."""
    T, C = sizes(T, C)
    model = peer_or_none("1.5B", torch.float32)
    if not model:
        return {}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=HERE.device == "cuda")
    ids = torch.tensor(random_ids(P * G, T + C, model.config.vocab_size), device=HERE.device)

    def step():
        for part in ids.split(8):
            with torch.autocast(HERE.device, BF16):
                logits = model(part, logits_to_keep=C + 1, use_cache=False).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1).gather(-1, part[:, -C:, None])
            (-logprobs.sum() / ids.numel()).backward()
            del logits, logprobs
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    memory, time_of_one = peak(step), seconds(step)
    tokens = P * T + P * G * C  # as ours are counted: a prompt once
    return {"seconds": time_of_one, "tokens/s": tokens / time_of_one, "GiB": memory}


# ---- judge, memory, head -----------------------------------------------------------------------


def judge() -> None:
    measure("BERT-base, pairs of 512", judge_speed)


def judge_speed() -> dict:
    with torch.device(HERE.device):
        encoder = prlm.Encoder(BERT | (TINY | {"vocab_size": 30522} if HERE.dry else {}))
    encoder.tokenizer = prlm.load_tokenizer(prlm.SHIPPED / "encoder")
    model = prlm.multiply_in(reward.RewardModel(encoder), BF16)
    words = sorted(word for word in encoder.tokenizer.backend.get_vocab() if word.isalpha())
    rng = random.Random(0)

    def text(count):
        return " ".join(rng.choices(words, k=10 if HERE.dry else count))

    def pairs(count):
        texts = [(text(400), text(200), text(200)) for _ in range(count)]
        return [{"id": str(n), "query": query, "positive": good, "negatives": [bad]}
                for n, (query, good, bad) in enumerate(texts)]  # fmt: skip

    o = reward.RewardOptions(reward_epochs=1, reward_lr=5e-5)
    reward.train_reward_model(o, model, pairs(4 if HERE.dry else 128))
    chosen, memory = pairs(6 if HERE.dry else 720), []

    def train():
        memory.append(peak(lambda: reward.train_reward_model(o, model, chosen)))

    whole, trained = seconds(train), len(reward.split_pairs(chosen, o.seed)[0])
    examples = [SimpleNamespace(query=text(400)) for _ in range(32)]
    answers = [text(200) for _ in examples]
    model.judge(examples, answers)
    return {
        "seconds": whole, "pairs/s": trained / whole, "GiB": memory[0],
        "5000_pairs_3_epochs": 15000 / trained * whole,
        "score_32_s": seconds(lambda: model.judge(examples, answers), 3),
    }  # fmt: skip


def memory() -> None:
    kinds = {"full": {}, "beta": {"beta": 0.04}, "LoRA": {"lora_rank": 16}}
    with tempfile.TemporaryDirectory() as folder:
        decoder = prlm.for_sampling(build("0.5B"), BF16)
        prlm.save_decoder(decoder, prlm.load_tokenizer(TOY), folder)
        del decoder
        for name, options in kinds.items():
            measure(f"0.5B, {name}", bytes_of_a_weight, folder, **options)


def bytes_of_a_weight(folder, **options) -> dict:
    """Of a policy as loaded, between steps, and the most in a step on a handful of tokens."""
    start, made, found = allocated(), [], {}
    o = rl.Options(device=HERE.device, precision="bfloat16", **options)
    found["loading"] = peak(lambda: made.append(rl.make_policy(o, folder))) * 2**30
    policy = made[0]
    count = sum(p.numel() for n, p in policy.decoder.named_parameters() if "lora" not in n)
    found["loaded"], optimizer = allocated(), rl.make_optimizer(policy, 1e-6)
    o, prompts, rows = rollout(policy, 1, 2, 8, 8, **options)
    rl.update(o, policy, optimizer, prompts, rows)
    found["between"] = allocated()
    found["update"] = peak(lambda: rl.update(o, policy, optimizer, prompts, rows)) * 2**30
    found["refresh"] = peak(lambda: rl.refresh(policy, 1)) * 2**30
    return {name: (x - start) / count for name, x in found.items()} | {"weights": count}


def head() -> None:
    decoder = prlm.multiply_in(build("1.5B", num_hidden_layers=1), BF16)
    count = 64 if HERE.dry else 8192
    hidden = torch.randn(count, decoder.head.shape[1], device=HERE.device, requires_grad=True)
    targets = torch.randint(decoder.vocab_limit, (count,), device=HERE.device)
    measure("log_softmax of all", head_speed, decoder, hidden, targets)
    for power in (24,) if HERE.dry else (24, 27, 28):
        with pace(logits=2**power):
            measure(
                f"chunks of 2**{power}", head_speed, decoder, hidden, targets, prlm.head_logprobs
            )


def plain_logprobs(decoder, hidden, targets, temperature):
    logprobs = decoder.logits(hidden, decoder.head).float().log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])


def head_speed(decoder, hidden, targets, logprobs=plain_logprobs) -> dict:
    def run():
        decoder.zero_grad()
        hidden.grad = None
        logprobs(decoder, hidden, targets, 1.0).sum().backward()

    run()
    decoder.zero_grad()
    hidden.grad = None
    start = allocated() / 2**30
    return {"GiB_beside_weights": peak(run) - start, "seconds": seconds(run, 3)}


# ---- All of it ---------------------------------------------------------------------------------


def child(part: str, dry: bool, out: Path) -> None:
    os.setsid()  # so that what the part starts ends with it
    os.environ["HF_HUB_OFFLINE"] = "1"
    if part == "right":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else no product is deterministic
    HERE.dry, HERE.device, HERE.out, HERE.part = dry, "cpu" if dry else "cuda", out, part
    if dry:
        torch.set_num_threads(1)
    try:
        globals()[part]()
    except Exception:
        traceback.print_exc()
        HERE.failed += 1
    sys.stdout.flush()
    sys.exit(min(HERE.failed, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=[*LIMITS], metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    o = parser.parse_args()
    out = o.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if o.dry_run:  # once for all parts; on a GPU each does it itself, since it might touch CUDA
        with contextlib.suppress(ImportError):
            import torch._dynamo  # noqa: F401
            from transformers import GenerationConfig, Qwen2ForCausalLM  # noqa: F401
    begun, wrong = time.perf_counter(), []
    for part in o.only:
        # Forked, so that torch is imported once; nothing here may touch CUDA before.
        fork = multiprocessing.get_context("fork")
        process, started = fork.Process(target=child, args=(part, o.dry_run, out)), time.time()
        process.start()
        try:
            process.join(LIMITS[part])
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        print(
            f"---- {part}: {time.time() - started:.1f} s, status {process.exitcode}\n", flush=True
        )
        if process.exitcode:
            wrong.append(f"{part} {'was stopped' if process.exitcode < 0 else 'failed, see above'}")
    print(f"{time.perf_counter() - begun:.0f} s; {'; '.join(wrong) or 'all is right'}; {out}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
