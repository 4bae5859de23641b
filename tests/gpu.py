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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

import prlm  # noqa: E402
import retrieve  # noqa: E402
import reward  # noqa: E402
import rl  # noqa: E402

LIMITS = {  # seconds
    "right": 95, "toy": 80, "decode": 70, "update": 55, "judge": 25, "memory": 30, "head": 25,
    "static": 80,
}  # fmt: skip
COMMON = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 4096}
SHAPES = {
    "1.5B": dict(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        intermediate_size=8960, vocab_size=151936, rope_theta=1e4, tie_word_embeddings=False,
    ),
    "0.5B": dict(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151936, rope_theta=1e6, tie_word_embeddings=True,
    ),
}  # fmt: skip
TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=1200,
)
BERT = dict(
    model_type="bert", hidden_size=768, num_attention_heads=12, num_hidden_layers=12,
    intermediate_size=3072, max_position_embeddings=512, vocab_size=30522,
)  # fmt: skip
HERE = SimpleNamespace(dry=False, device="cuda", out=Path("runs/gpu"), part="", failed=0)
TOY = prlm.SHIPPED / "policy"


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
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def describe(line: dict) -> str:
    values = {k: v for k, v in line.items() if k not in ("part", "name")}
    text = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    flag = "  WRONG" if "error" in line or not line.get("ok", True) else ""
    return f"{line['part']:<7} {line['name']:<30} {'; '.join(text)}{flag}"


def wait_for_device() -> None:
    if HERE.device == "cuda":
        torch.cuda.synchronize()


def seconds(function, runs: int = 1) -> float:
    """The median over `runs` calls."""
    times = []
    for _ in range(runs):
        wait_for_device()
        begun = time.perf_counter()
        function()
        wait_for_device()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def peak(function) -> float:
    """The most memory, in GiB, that was in use during a call."""
    if HERE.device != "cuda":
        function()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    function()
    wait_for_device()
    return torch.cuda.max_memory_allocated() / 2**30


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if HERE.device == "cuda" else 0


def card() -> tuple[float, float]:
    """(bytes a second that a copy reads and writes, bfloat16 operations a second of a product)."""
    n = 256 if HERE.dry else 8192
    x = torch.empty(n * n * 8, dtype=torch.bfloat16, device=HERE.device)
    y = torch.empty_like(x)
    a = torch.randn(n, n, device=HERE.device).bfloat16()

    def repeat(function):
        function()
        return seconds(lambda: [function() for _ in range(10)], 3) / 10

    return 4 * len(x) / repeat(lambda: y.copy_(x)), 2 * n**3 / repeat(lambda: a @ a)


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


def peer_model(shape: str, dtype):
    """transformers' model of the same shape, random."""
    import transformers

    raw = shape_of(shape)
    config = transformers.Qwen2Config(**{k: v for k, v in raw.items() if k != "model_type"})
    with torch.device(HERE.device):
        make = transformers.AutoModelForCausalLM.from_config
        return make(config, dtype=dtype, attn_implementation="sdpa")


def random_ids(rows: int, length: int, vocabulary: int, ragged: bool = False) -> list[list[int]]:
    rng = random.Random(f"{rows} {length}")
    lengths = [rng.randint(length // 2, length) if ragged else length for _ in range(rows)]
    return [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]


# ---- right -------------------------------------------------------------------------------------


def right() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        measure(f"attention, {str(dtype)[6:]}", attention_is_right, dtype)
    measure("toy's logits and greedy texts", toy_is_the_cpus)
    for shape in ("toy", "1.5B"):
        measure(f"sampler and trainer, {shape}", sampler_is_the_trainer, shape)
    measure("graph, toy, float32", graphs_are_right, "toy", torch.float32)
    measure("graph, 0.5B, bfloat16", graphs_are_right, "0.5B", torch.bfloat16)
    measure("graph, 0.5B, LoRA", graphs_are_right, "0.5B", torch.bfloat16, lora=True)
    measure("reward model", judge_is_the_cpus)
    measure("LoRA, 3 steps", lora_runs)
    measure("resume", run_resumes)


def attention_is_right(dtype) -> dict:
    """Values and gradients of masked, grouped attention against a float64 softmax."""
    torch.manual_seed(0)
    B, T, S, K, R, D = (2, 9, 14, 2, 2, 8) if HERE.dry else (8, 255, 767, 2, 6, 128)
    sizes = ((T, K * R), (S, K), (S, K))
    q, k, v = (torch.randn(B, t, h, D, device=HERE.device).to(dtype) for t, h in sizes)
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
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected)]
    scores = prlm.exact_scores(q[:, :, 0], k[:, :, 0])
    exact = (q[:, :, 0].double() @ k[:, :, 0].double().mT).float()
    errors.append(((scores - exact).abs().max() / exact.abs().max()).item())
    names = ("out", "dq", "dk", "dv", "exact_scores")
    most = 1e-4 if dtype == torch.float32 else 2e-2
    return dict(zip(names, errors)) | {"ok": max(errors) < most and errors[-1] < 1e-5}


def toy_prompts(o, count: int) -> list[list[int]]:
    tokenizer = prlm.load_tokenizer(TOY)
    return retrieve.make_prompts(o, tokenizer, retrieve.load_examples(o, "dev")[:count])


def toy_is_the_cpus() -> dict:
    o = rl.Options()
    prompts = toy_prompts(o, 2 if HERE.dry else 32)
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
    how = dict(temperature=1.0, eos_ids=range(vocabulary // 150), seed=3)
    recorded, record = [], prlm.Recorded.record

    def counted(self):
        record(self)
        recorded.append((len(self.ids), self.cache.window))

    prlm.Recorded.record = counted
    try:
        with_graph = prlm.generate(decoder, prompts, G, new, **how)
        again = prlm.generate(decoder, prompts, G, new, **how)
        prlm.PACES["cuda"] = prlm.PACES["cuda"]._replace(record=False)
        plain = prlm.generate(decoder, prompts, G, new, **how)
    finally:
        prlm.PACES["cuda"] = prlm.PACES["cuda"]._replace(record=True)
        prlm.Recorded.record = record
    pairs = [(a, b) for x, y in zip(with_graph, plain) for a, b in zip(x, y)]
    same = statistics.mean(a.tokens == b.tokens for a, b in pairs)
    first = max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in pairs)
    found = {"same": same, "again": with_graph == again, "first_logprob": first}
    found |= {"lengths": sorted({len(a.tokens) for a, _ in pairs})[:: max(1, len(pairs) // 6)]}
    gap = gaps(decoder, prompts, with_graph, 1.0)
    half = len(recorded) // 2
    found |= gap | {"recorded": recorded[:half]}
    fine = gap["gap"] < (5e-4 if dtype == torch.float32 else 0.5)
    done = HERE.device == "cpu" or (half > 1 and len(recorded) == 2 * half)
    return found | {"ok": same == 1 and found["again"] and fine and done}


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
        vocabulary = policy.decoder.vocab_limit
        prompts = random_ids(2, 10 if HERE.dry else 300, vocabulary, ragged=True)
    found = {}
    for temperature in (1.0, 0.7):
        groups = prlm.generate(policy.sampler, prompts, 4, new, temperature, eos, seed=1)
        found |= {
            f"{name} at {temperature}": value
            for name, value in gaps(policy.decoder, prompts, groups, temperature).items()
        }
    tokens = [[c.tokens for c in group] for group in groups]
    logprobs, mask = prlm.token_logprobs(policy.decoder, prompts, tokens)
    with torch.no_grad():
        reference, _ = prlm.token_logprobs(policy.reference, prompts, tokens)
    found["kl"] = rl.k3(logprobs.detach(), reference)[mask].abs().max().item()
    return found | {"ok": found["kl"] == 0 and found["gap at 1.0"] < 0.5}


def judge_is_the_cpus() -> dict:
    queries, scores = ["a story about paris"] * 6, []
    answers = ["asthma", "paris again no joke", "x y z " * 40, "a", "behind doors", "why, friend"]
    for device in ("cpu", HERE.device):
        torch.manual_seed(0)
        model = reward.RewardModel(prlm.load_encoder(prlm.SHIPPED / "encoder", "cpu")).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                scores.append(prlm.multiply_in(model, dtype).score(queries, answers).cpu())
    error, low = (scores[2] - scores[0]).abs().max(), (scores[3] - scores[0]).abs().max()
    spread = scores[0].std().item()
    return {
        "float32": error.item(),
        "bfloat16": low.item(),
        "spread": spread,
        "ok": error.item() < 1e-4,
    }


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
        finite = all(p.isfinite().all() for p in merged.parameters())
    names = ("gap", "gap_mean", "grad_norm", "kl")
    return {name: [round(line[name], 5) for line in log] for name in names} | {
        "ok": bool(finite) and log[0]["kl"] == 0 and (log[-1]["kl"] > 0 or HERE.dry)
    }


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
        rl.update = stopping
        try:
            toy_run(f"{folder}/b", **how)
        except ConnectionAbortedError:
            pass
        finally:
            rl.update = update
        parts = toy_run(f"{folder}/b", resume=True, **how)
        samples = [prlm.read_lines(f"{folder}/{run}/samples.jsonl") for run in "ab"]
    names = ("reward", "grad_norm", "entropy", "gap_mean")
    apart = [
        max(abs(a[n] - b[n]) / (abs(a[n]) + 1e-3) for n in names) for a, b in zip(whole, parts)
    ]
    same = statistics.mean(a["tokens"] == b["tokens"] for a, b in zip(*samples))
    # On CUDA sums may be taken in another order, and one other token makes another sample.
    found = {"same_samples": same, "apart_by_step": [round(x, 6) for x in apart]}
    return found | {"ok": len(parts) == 6 and max(apart[:4]) < 0.05}


# ---- toy ---------------------------------------------------------------------------------------


def toy() -> None:
    measure("python rl.py", toy_default)


def toy_default() -> dict:
    """The default run, and the same on the CPU at the same time, if that ends before the limit."""
    few = "--steps 1 --group-size 2 --prompts-per-step 2 --limit 2 --max-new-tokens 8 --force"
    few += " --personalization 0 --eval-every 0 --k 1"
    with tempfile.TemporaryDirectory() as folder:
        runs, begun = {}, time.perf_counter()
        for device in dict.fromkeys((HERE.device, "cpu")):
            command = [sys.executable, "rl.py", "--device", device, "--out", f"{folder}/{device}"]
            log = open(HERE.out / f"toy_{device}.log", "w")  # noqa: SIM115
            how = dict(cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            how["env"] = os.environ | {"OMP_NUM_THREADS": "1" if HERE.dry else "4"}
            runs[device] = subprocess.Popen(command + few.split() * HERE.dry, **how)
        found, last = {}, begun + (600 if HERE.dry else LIMITS["toy"] - 5)
        while len(found) < len(runs) and time.perf_counter() < last:
            time.sleep(0.1)
            for device, process in runs.items():
                if process.poll() is not None:
                    found.setdefault(f"{device}_seconds", time.perf_counter() - begun)
        for device, process in runs.items():
            if process.poll() is None:
                process.kill()
                continue
            if process.returncode:
                raise RuntimeError((HERE.out / f"toy_{device}.log").read_text()[-2000:])
            scores = prlm.read_json(f"{folder}/{device}/scores.json")
            found |= {f"{device}_{name}": s["rouge-l"] for name, s in scores.items()}
            log = prlm.read_lines(f"{folder}/{device}/metrics.jsonl")
            for name in ("gap", "gap_mean", "seconds_rollout", "seconds_update"):
                found[f"{device}_{name}"] = statistics.median(line[name] for line in log)
    return found | {"ok": f"{HERE.device}_after" in found}


# ---- decode ------------------------------------------------------------------------------------


def decode() -> None:
    bandwidth, rate = card()
    name = torch.cuda.get_device_name() if HERE.device == "cuda" else "cpu"
    measure("card", lambda: {"name_of_card": name, "GB/s": bandwidth / 1e9, "TFLOP/s": rate / 1e12})
    rows = ((1, 4), (4, 8), (16, 8))
    for shape in ("1.5B", "0.5B"):
        decoder = prlm.for_sampling(build(shape), torch.bfloat16)
        for P, G in rows if shape == "1.5B" else rows[1:2]:
            measure(f"{shape}, {P} x {G}", decode_speed, decoder, P, G, bandwidth, rate)
        if shape == "1.5B":
            measure("1.5B, 4 x 8, prompt 509", decode_speed, decoder, 4, 8, bandwidth, rate, 509)
            prlm.add_lora(decoder, 16, 16)
            measure("1.5B, 4 x 8, LoRA", decode_speed, decoder, 4, 8, bandwidth, rate)
    del decoder
    model = peer_or_none("1.5B", torch.bfloat16)
    for P, G in rows[1:] if model else ():
        measure(f"transformers 1.5B, {P} x {G}", peer_decode, model, P, G)


def sizes(T: int = 512) -> tuple[int, int]:
    """(prompt tokens, new tokens)"""
    return (12, 6) if HERE.dry else (T, 256)


def dimensions(decoder) -> tuple[int, int, int, int]:
    """(layers, query heads, key-value heads, their size)"""
    keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    layers, heads, shared = (decoder.raw[key] for key in keys)
    return layers, heads, shared, decoder.raw["hidden_size"] // heads


def matrices(decoder) -> int:
    """Weights that take part in a product of every token: all but the embedding."""
    layers = sum(p.numel() for p in decoder.model.layers.parameters() if p.dim() == 2)
    return layers + decoder.head.numel()


def decode_speed(decoder, P: int, G: int, bandwidth: float, rate: float, T: int = 512) -> dict:
    """Of a step: the time, and the time that reading weights and cache once would take."""
    T, C = sizes(T)
    prompts = random_ids(P, T, decoder.vocab_limit)
    recordings, record = [], prlm.Recorded.record

    def timed(self):
        begun = time.perf_counter()
        record(self)
        recordings.append(time.perf_counter() - begun)

    def run(new):
        prlm.generate(decoder, prompts, G, new, 1.0, (), seed=1)

    prlm.Recorded.record = timed
    try:
        memory = peak(lambda: run(C))
        recordings.clear()
        whole, first = seconds(lambda: run(C), 2), seconds(lambda: run(1), 3)
        prlm.PACES["cuda"], few = prlm.PACES["cuda"]._replace(record=False), C // 4
        run(2)
        plain = (seconds(lambda: run(few)) - first) / max(few - 1, 1)
    finally:
        prlm.PACES["cuda"] = prlm.PACES["cuda"]._replace(record=True)
        prlm.Recorded.record = record
    step = (whole - first) / (C - 1)
    layers, _, keys, size = dimensions(decoder)
    token = layers * 2 * keys * size * 2  # bytes of a token's keys and values
    read = 2 * matrices(decoder) + token * (P * T + P * G * C / 2)
    floor = max(read / bandwidth, 2 * P * G * matrices(decoder) / rate)
    return {
        "tokens/s": P * G * C / whole, "prompt_s": first, "step_ms": 1e3 * step,
        "plain_step_ms": 1e3 * plain, "floor_ms": 1e3 * floor, "share": floor / step,
        "recording_ms": 1e3 * sum(recordings) / 2, "GiB": memory,
    }  # fmt: skip


def peer_or_none(shape: str, dtype):
    try:
        return peer_model(shape, dtype)
    except ImportError:
        print("transformers is not installed: no comparison")
    except Exception:
        HERE.failed += 1
        traceback.print_exc()


def peer_decode(model, P: int, G: int, cache: str | None = None) -> dict:
    from transformers import GenerationConfig

    T, C = sizes()
    prompts = torch.tensor(random_ids(P, T, model.config.vocab_size), device=HERE.device)
    how = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0)
    how |= dict(num_return_sequences=G, eos_token_id=None)
    how |= {"cache_implementation": cache} if cache else {}

    def run(new):
        config = GenerationConfig(max_new_tokens=new, **how)
        mask = torch.ones_like(prompts)
        out = model.generate(prompts, attention_mask=mask, generation_config=config)
        if out.shape != (P * G, T + new):
            raise RuntimeError(f"transformers generated {[*out.shape]}")

    begun = time.perf_counter()
    run(C if cache else 3)
    first = time.perf_counter() - begun
    memory = []
    whole = seconds(lambda: memory.append(peak(lambda: run(C))))
    return {"tokens/s": P * G * C / whole, "seconds": whole, "GiB": memory[0], "warm_up": first}


def static() -> None:
    model = peer_or_none("1.5B", torch.bfloat16)
    if model:
        measure("transformers 1.5B, 4 x 8", peer_decode, model, 4, 8, "static")


# ---- update ------------------------------------------------------------------------------------


def update() -> None:
    rate = card()[1]
    for lora in (0, 16):
        policy = make_policy("1.5B", lora)
        optimizer = rl.make_optimizer(policy, 1e-6)
        kind = "LoRA" if lora else "full"
        for P, G, T, C, saving in ((4, 8, 512, 256, 0), (4, 8, 512, 256, 1), (1, 4, 512, 768, 1)):
            if not lora or P == 4:
                name = f"{kind}, {P} x {G}, {T} + {C}{', checkpointing' * saving}"
                how = (policy, optimizer, P, G, T, C, bool(saving), rate)
                measure(name, update_speed, *how)
        if not lora:
            measure("refresh", lambda p=policy: {"GiB": peak(lambda: rl.refresh(p, 1)),
                    "seconds": seconds(lambda: rl.refresh(p, 1))})  # fmt: skip
        del policy, optimizer
        allocated()
    measure("transformers, 4 x 8, 512 + 256", peer_update, 4, 8, 512, 256)


def make_policy(shape: str, lora: int = 0) -> rl.Policy:
    """As rl.make_policy, of random weights."""
    decoder = prlm.multiply_in(build(shape), torch.bfloat16)
    if lora:
        prlm.add_lora(prlm.for_sampling(decoder, torch.bfloat16), lora, lora)
        return rl.Policy(decoder, decoder, None, prlm.without_lora(decoder))
    reference = prlm.for_sampling(copy.deepcopy(decoder), torch.bfloat16)
    return rl.Policy(decoder, copy.deepcopy(reference), None, reference)


def rollout(policy, P: int, G: int, T: int, C: int, **options):
    """The arguments of rl.update for random completions, each of full length."""
    if HERE.dry:
        T, C = 12, 6
    vocabulary = policy.decoder.vocab_limit
    row = dict(logprobs=[0.0] * C, finished=True)
    completions = random_ids(P * G, C, vocabulary)
    rows = [row | {"tokens": x, "advantage": n % 2 - 0.5} for n, x in enumerate(completions)]
    o = rl.Options(group_size=G, prompts_per_step=P, max_new_tokens=C, **options)
    return o, random_ids(P, T, vocabulary), rows


def update_speed(policy, optimizer, P, G, T, C, saving: bool, rate: float) -> dict:
    decoder = policy.decoder
    decoder.checkpointing = saving
    layers, heads, _, size = dimensions(decoder)
    o, prompts, rows = rollout(policy, P, G, T, C)
    T, C = len(prompts[0]), len(rows[0]["tokens"])

    def step():
        rl.update(o, policy, optimizer, prompts, rows)

    step()
    memory = peak(step)
    time_of_one = seconds(step, 2)
    tokens = P * T + P * G * (C - 1)
    # A product with W costs 2 operations a weight and token, its gradients twice that; a frozen W
    # has no gradient of its own. Causal attention costs 4 heads D operations a pair of tokens.
    frozen = not decoder.head.requires_grad
    products = 2 * (matrices(decoder) - decoder.head.numel()) * tokens
    products += 2 * decoder.head.numel() * P * G * C
    pairs = P * T * T / 2 + P * G * (C * T + C * C / 2)
    scores = 4 * layers * heads * size * pairs
    operations = (2 if frozen else 3) * products + 3 * scores
    return {
        "seconds": time_of_one, "tokens/s": (P * T + P * G * C) / time_of_one, "GiB": memory,
        "TFLOP": operations / 1e12, "share": operations / rate / time_of_one,
    }  # fmt: skip


def peer_update(P: int, G: int, T: int, C: int) -> dict:
    """The same step in transformers as it comes: each row with its prompt, 8 rows at a time."""
    if HERE.dry:
        T, C = 12, 6
    model = peer_or_none("1.5B", torch.float32)
    if not model:
        return {}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=HERE.device == "cuda")
    ids = torch.tensor(random_ids(P * G, T + C, model.config.vocab_size), device=HERE.device)

    def step():
        for part in ids.split(8):
            with torch.autocast(HERE.device, torch.bfloat16):
                logits = model(part, logits_to_keep=C + 1, use_cache=False).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1).gather(-1, part[:, -C:, None])
            (-logprobs.sum() / ids.numel()).backward()
            del logits, logprobs
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    memory = peak(step)
    time_of_one = seconds(step)
    tokens = P * T + P * G * C  # as ours are counted: a prompt once
    return {"seconds": time_of_one, "tokens/s": tokens / time_of_one, "GiB": memory}


# ---- judge, memory, head -----------------------------------------------------------------------


def judge() -> None:
    measure("BERT-base, pairs of 512", judge_speed)


def judge_speed() -> dict:
    tiny = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16)
    with torch.device(HERE.device):
        encoder = prlm.Encoder(BERT | (tiny if HERE.dry else {}))
    encoder.tokenizer = prlm.load_tokenizer(prlm.SHIPPED / "encoder")
    model = prlm.multiply_in(reward.RewardModel(encoder), torch.bfloat16)
    words = sorted(word for word in encoder.tokenizer.backend.get_vocab() if word.isalpha())
    rng = random.Random(0)

    def text(count):
        return " ".join(rng.choices(words, k=10 if HERE.dry else count))

    def pairs(count):
        rows = ({"query": text(400), "positive": text(200), "negatives": [text(200)]}
                for _ in range(count))  # fmt: skip
        return [{"id": str(n), **row} for n, row in enumerate(rows)]

    o = reward.RewardOptions(reward_epochs=1, reward_lr=5e-5)
    reward.train_reward_model(o, model, pairs(4 if HERE.dry else 128))
    chosen, memory = pairs(6 if HERE.dry else 720), []
    whole = seconds(
        lambda: memory.append(peak(lambda: reward.train_reward_model(o, model, chosen)))
    )
    trained = len(reward.split_pairs(chosen, o.seed)[0])
    examples = [SimpleNamespace(query=text(400)) for _ in range(32)]
    answers = [text(200) for _ in examples]
    model.judge(examples, answers)
    return {
        "seconds": whole, "pairs/s": trained / whole, "GiB": memory[0],
        "5000_pairs_3_epochs": 15000 / trained * whole,
        "score_32_s": seconds(lambda: model.judge(examples, answers), 3),
    }  # fmt: skip


def memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        decoder = build("0.5B")
        state = {name: x.bfloat16() for name, x in decoder.state_dict().items()}
        prlm.save_checkpoint(state, decoder.raw, prlm.load_tokenizer(TOY), folder)
        del decoder, state
        for name, options in {
            "full": {},
            "beta": {"beta": 0.04},
            "LoRA": {"lora_rank": 16},
        }.items():
            measure(f"0.5B, {name}", bytes_of_a_weight, folder, **options)


def bytes_of_a_weight(folder, **options) -> dict:
    """Of a policy as loaded, between steps, and the most in a step on a handful of tokens."""
    start = allocated()
    o = rl.Options(device=HERE.device, precision="bfloat16", **options)
    made = []
    loading = peak(lambda: made.append(rl.make_policy(o, folder))) * 2**30 - start
    policy = made[0]
    count = sum(p.numel() for n, p in policy.decoder.named_parameters() if "lora" not in n)
    loaded, optimizer = allocated() - start, rl.make_optimizer(policy, 1e-6)
    o, prompts, rows = rollout(policy, 1, 2, 8, 8, **options)
    rl.update(o, policy, optimizer, prompts, rows)
    between = allocated() - start
    most = peak(lambda: rl.update(o, policy, optimizer, prompts, rows)) * 2**30 - start
    refreshing = peak(lambda: rl.refresh(policy, 1)) * 2**30 - start
    values = {"loading": loading, "loaded": loaded, "between": between}
    values |= {"update": most, "refresh": refreshing}
    return {name: value / count for name, value in values.items()} | {"weights": count}


def head() -> None:
    decoder = prlm.multiply_in(build("1.5B", num_hidden_layers=1), torch.bfloat16)
    count = 64 if HERE.dry else 8192
    hidden = torch.randn(count, decoder.head.shape[1], device=HERE.device, requires_grad=True)
    targets = torch.randint(decoder.vocab_limit, (count,), device=HERE.device)
    measure("log_softmax of all", head_speed, decoder, hidden, targets, None)
    for power in (24,) if HERE.dry else (24, 27, 28):
        measure(f"chunks of 2**{power}", head_speed, decoder, hidden, targets, 2**power)


def head_speed(decoder, hidden, targets, logits: int | None) -> dict:
    device = hidden.device.type
    pace = prlm.PACES[device]

    def run():
        decoder.zero_grad()
        hidden.grad = None
        if logits:
            out = prlm.head_logprobs(decoder, hidden, targets, 1.0)
        else:
            scores = decoder.logits(hidden, decoder.head).float().log_softmax(-1)
            out = scores.gather(-1, targets[:, None])
        out.sum().backward()

    try:
        if logits:
            prlm.PACES[device] = pace._replace(logits=logits)
        run()
        decoder.zero_grad()
        hidden.grad = None
        start = allocated()
        used = peak(run) - start / 2**30
        return {"seconds": seconds(run, 3), "GiB_beside_weights": used}
    finally:
        prlm.PACES[device] = pace
        decoder.zero_grad()


# ---- All of it ---------------------------------------------------------------------------------


def child(part: str, dry: bool, out: Path) -> None:
    os.setsid()  # so that what the part starts ends with it
    if part == "right":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else no product is deterministic
    HERE.dry, HERE.out, HERE.part = dry, out, part
    HERE.device = "cpu" if dry else "cuda"
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
    parser.add_argument("--seconds", type=float, default=270, help="of all parts (270)")
    o = parser.parse_args()
    out = o.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    results.touch()
    if o.dry_run:  # on a GPU each part does it itself: it might touch CUDA
        with contextlib.suppress(ImportError):
            import torch._dynamo  # noqa: F401
            from transformers import GenerationConfig, Qwen2ForCausalLM  # noqa: F401
    start, begun, wrong = results.stat().st_size, time.perf_counter(), []
    for part in o.only:
        left = min(LIMITS[part], o.seconds - (time.perf_counter() - begun))
        if left < 5:
            wrong.append(f"{part}: no time left")
            continue
        # Forked, so that torch is imported once; nothing here may touch CUDA before.
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(part, o.dry_run, out)
        )
        started = time.perf_counter()
        process.start()
        try:
            process.join(left)
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        took = time.perf_counter() - started
        print(f"---- {part}: {took:.1f} s, exit status {process.exitcode}\n", flush=True)
        if process.exitcode:
            stopped = process.exitcode < 0
            wrong.append(f"{part}: {f'stopped after {took:.0f} s' if stopped else 'see above'}")
    with open(results) as file:
        file.seek(start)
        print("\n".join(describe(json.loads(line)) for line in file))
    print(f"{time.perf_counter() - begun:.0f} s; {'; '.join(wrong) or 'all is right'}; {results}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
