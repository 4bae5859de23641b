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
Models are random, shaped as R1-Distill-Qwen-1.5B and Qwen2.5-0.5B. transformers may be missing."""

import argparse
import contextlib
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import benchmark as bench
import torch
from benchmark import full_forward_loss, random_ids, seconds, step_floor

import prlm
import retrieve
import reward
import rl

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else no product is deterministic
LIMITS = {"right": 95, "toy": 85, "decode": 105, "update": 60}  # seconds
LIMITS |= {"judge": 30, "memory": 35, "head": 30, "static": 120}
TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
TINY |= {"intermediate_size": 48, "vocab_size": 1200}
BERT = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}
BERT |= {"intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512}
HERE = SimpleNamespace(dry=False, tiny={}, device="cuda", out=Path(), part="", failed=0)
TOY, BF16 = prlm.SHIPPED / "policy", torch.bfloat16


def measure(name: str, function, *arguments, **named) -> None:
    """Prints and appends the dictionary that the function returns, or how it failed."""
    begun, line = time.perf_counter(), {"part": HERE.part, "name": name}
    try:
        found = function(*arguments, **named)
        if found is None:  # a part, whose measurements stand above
            return
        line |= found
    except ModuleNotFoundError as error:
        line["skipped"] = str(error)
    except Exception as error:
        traceback.print_exc()
        line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    line["took"] = time.perf_counter() - begun
    flag = "" if "error" not in line and line.get("ok", True) else "  WRONG"
    HERE.failed += bool(flag)
    prlm.append(HERE.out / "results.jsonl", [line])
    text = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()]
    print(f"{HERE.part:<7} {name:<30} {'; '.join(text[2:])}{flag}", flush=True)
    allocated()
    with contextlib.suppress(RuntimeError):  # CUDA may be out of order after an error
        torch.cuda.empty_cache()


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def speed(function, tokens: int, runs: int = 1) -> dict:
    """Of a call that has been made once before; GiB: the most that was in use meanwhile."""
    function()
    if HERE.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    each = seconds(function, runs)
    most = torch.cuda.max_memory_allocated() if HERE.device == "cuda" else 0
    return {"seconds": each, "tokens/s": tokens / each, "GiB": most / 2**30}


def card() -> tuple[float, float]:
    """(operations a second of a product in bfloat16, bytes a second that a sum reads)"""
    return bench.machine(BF16, HERE.device, *((64, 2**16) if HERE.dry else (8192, 2**30)))


def pace(**changes):
    """A context in which these settings of the device are others."""
    mine = prlm.PACES[HERE.device]._replace(**changes)
    return mock.patch.dict(prlm.PACES, {HERE.device: mine})


def build(shape: str, **changes) -> prlm.Decoder:
    """Random float32 weights on the grid of bfloat16, as published ones are."""
    torch.manual_seed(0)
    with torch.device(HERE.device):
        decoder = prlm.Decoder(bench.shape_of(shape) | HERE.tiny | changes)
    for parameter in decoder.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    return decoder


def make_policy(shape: str, precision="bfloat16", lora: int = 0) -> rl.Policy:
    """rl.make_policy, of the toy or of random weights."""
    o = rl.Options(device=HERE.device, precision=precision, lora_rank=lora)
    make = (lambda *_: build(shape)) if shape in bench.SHAPES else prlm.load_decoder
    with mock.patch.object(prlm, "load_decoder", make):
        return rl.make_policy(o)


def sizes(T: int = 512, C: int = 256) -> tuple[int, int]:
    """(prompt tokens, new tokens)"""
    return (12, 6) if HERE.dry else (T, C)


def right() -> None:
    for dtype in (torch.float32, BF16):
        measure(f"attention, {str(dtype)[6:]}", attention_is_right, dtype)
    measure("toy's logits and greedy texts", toy_is_the_cpus)
    measure("sampling, toy, float32", sampling_is_right, "toy", "float32")
    measure("sampling, toy, LoRA", sampling_is_right, "toy", "bfloat16", lora=8)
    measure("reward model", judge_is_the_cpus)
    measure("LoRA, 3 steps", lora_runs)
    for shape in ("toy", "0.5B", "1.5B"):
        measure(f"sampling, {shape}, bfloat16", sampling_is_right, shape, "bfloat16")
    measure("resume", run_resumes)


def attention_is_right(dtype) -> dict:
    """Values and gradients of masked, grouped attention, beside the CPU's in float64."""
    torch.manual_seed(0)
    B, T, S, K, R, D = (2, 9, 14, 2, 2, 8) if HERE.dry else (8, 255, 767, 2, 6, 128)
    shapes = ((B, T, K * R, D), (B, S, K, D), (B, S, K, D))
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    visible = torch.ones(B, T, S, dtype=torch.bool).tril(S - T)
    visible[1:, :, : S // 4] = False
    weight = torch.randn(shapes[0])

    def run(device, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in (3 * q, k, v)]
        out = prlm.attention(*inputs, visible.to(device))
        gradients = torch.autograd.grad((out * weight.to(device)).sum(), inputs)
        scores = prlm.exact_products(*(x[:, :, 0].detach() for x in inputs[:2]))
        return [x.detach().cpu().double() for x in (out, *gradients, scores)]

    pairs = zip(run(HERE.device, dtype), run("cpu", torch.float64))
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    most = 1e-4 if dtype == torch.float32 else 2e-2
    return {"out_dq_dk_dv_scores": errors, "ok": max(errors) < most and errors[-1] < 1e-5}


def toy_is_the_cpus() -> dict:
    o, tokenizer = rl.Options(limit=2 if HERE.dry else 32), prlm.load_tokenizer(TOY)
    prompts = retrieve.make_prompts(o, tokenizer, retrieve.load_examples(o, "dev"))
    eos, logits, texts = tokenizer.eos_ids, [], []
    for device in ("cpu", HERE.device):
        decoder, rows = prlm.load_decoder(TOY, device), prlm.Ragged(prompts, device)
        with torch.no_grad():
            logits.append(decoder(rows.grid(rows.tokens), rows.mask)[rows.mask].cpu())
        texts.append(prlm.generate(decoder, prompts, 1, 8 if HERE.dry else 128, 0.0, eos))
    error = (logits[0] - logits[1]).abs().max().item()
    same = statistics.mean(a[0].tokens == b[0].tokens for a, b in zip(*texts))
    return {"logits": error, "same_texts": same, "ok": error < 1e-3 and same > 0.95}


def sampling_is_right(shape: str, precision: str, lora: int = 0) -> dict:
    """The same completions with and without CUDA graphs, where rows leave and the cache's window
    grows beyond 128; nearly the trainer's log-probabilities, which the reference's are exactly."""
    policy = make_policy(shape, precision, lora)
    for name, parameter in policy.decoder.named_parameters():
        if "lora_B" in name:  # which is 0 at first
            torch.nn.init.normal_(parameter, std=0.02)
    P, G, new = (2, 2, 8) if HERE.dry else (8, 8, 160)
    vocabulary = policy.decoder.vocab_limit
    prompts = random_ids(P, sizes(90)[0], vocabulary, least=6)
    # One id in 150 ends a completion: a few rows leave early, most in the middle, some never.
    asked = (policy.sampler, prompts, G, new, 0.7, range(vocabulary // 150), 3)
    groups, again = prlm.generate(*asked), prlm.generate(*asked)
    with pace(record=False):
        plain = prlm.generate(*asked)
    tokens = [[c.tokens for c in group] for group in groups]
    logprobs, mask = prlm.token_logprobs(policy.decoder, prompts, tokens, 0.7)  # with gradient
    with torch.no_grad():
        reference, _ = prlm.token_logprobs(policy.reference, prompts, tokens, 0.7)
    sampled = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    gap = (logprobs.detach()[mask].cpu() - sampled).abs()
    same = [a == [c.tokens for c in b] for a, b in zip(tokens, plain)]  # by prompt
    kl = rl.k3(logprobs.detach(), reference)[mask].abs().max().item()
    found = {"same": statistics.mean(same), "again": groups == again, "gap": gap.max().item()}
    fine = all(same) and groups == again and (bool(lora) or kl == 0)
    fine &= found["gap"] < (5e-4 if precision == "float32" else 0.5)
    fine &= HERE.dry or prlm.Recorded.newest is not None
    return found | {"gap_mean": gap.mean().item(), "kl": kl, "ok": fine}


def judge_is_the_cpus() -> dict:
    answers = ["asthma", "paris again no joke", "x y z " * 40, "why, friend"]
    asked = ["a story about paris"] * len(answers), answers
    torch.manual_seed(0)
    model = reward.RewardModel(prlm.load_encoder(prlm.SHIPPED / "encoder"))
    with torch.no_grad():
        expected, model = model.score(*asked), model.to(HERE.device)
        found = [prlm.multiply_in(model, d).score(*asked).cpu() for d in (torch.float32, BF16)]
    error, low = ((x - expected).abs().max().item() for x in found)
    return {"float32": error, "bfloat16": low, "ok": error < 1e-4 and low < 0.1}


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
        log = toy_run(folder, steps=3, lora_rank=8, beta=0.04, lr=1e-3)
        merged = prlm.load_decoder(f"{folder}/checkpoint", HERE.device)
    finite = all(bool(p.isfinite().all()) for p in merged.parameters())
    found = {key: [line[key] for line in log] for key in ("gap", "kl")}
    first, *_, last = found["kl"]
    # On CUDA not quite 0 at first: the change, 0, is added within a product of another kernel.
    return found | {"ok": finite and first <= 1e-3 * (not HERE.dry) and (last > first or HERE.dry)}


def run_resumes() -> dict:
    """Six steps at once, and six that are cut off in the fourth and go on from the third."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the last one of its process
    torch.backends.cuda.enable_flash_sdp(False)  # with warn_only these two stay as they are
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    warnings.filterwarnings("ignore", message=".*deterministic")
    cut_off = mock.Mock(wraps=rl.update, side_effect=[mock.DEFAULT] * 3 + [ConnectionAbortedError])
    with tempfile.TemporaryDirectory() as folder:
        how = dict(steps=6, save_every=3)
        whole = toy_run(f"{folder}/a", **how)
        with mock.patch.object(rl, "update", cut_off), contextlib.suppress(ConnectionAbortedError):
            toy_run(f"{folder}/b", **how)
        parts = toy_run(f"{folder}/b", resume=True, **how)
    # On CUDA sums may be taken in another order, and one other token makes another sample.
    norms = [[line["grad_norm"] for line in log] for log in (whole, parts)]
    apart = [abs(a - b) / (a + 1e-3) for a, b in zip(*norms)]
    return {"apart_by_step": apart, "ok": len(parts) == 6 and max(apart[:4]) < 0.05}


def toy() -> dict:
    """The default run, and the same on the CPU at the same time, if that ends before the limit."""
    found = {}

    def run(device: str) -> None:
        few = "--steps 1 --group-size 2 --prompts-per-step 2 --limit 2 --max-new-tokens 8 --force"
        few += " --personalization 0 --eval-every 0 --k 1"
        env = os.environ | {"OMP_NUM_THREADS": "1" if HERE.dry else "4"}
        out, begun = HERE.out / f"toy_{device}", time.perf_counter()
        line = [sys.executable, "rl.py", "--device", device, "--overwrite", "--out", out]
        line += few.split() * HERE.dry
        limit = None if HERE.dry else LIMITS["toy"] - 20
        how = dict(cwd=prlm.SHIPPED.parent, env=env, timeout=limit, check=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            with open(f"{out}.log", "w") as log:
                subprocess.run(line, stdout=log, stderr=log, **how)
            found[f"{device}_seconds"] = time.perf_counter() - begun
            scores = prlm.read_json(out / "scores.json")
            found.update({f"{device}_{name}": s["rouge-l"] for name, s in scores.items()})

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, {HERE.device, "cpu"}))
    return found | {"ok": f"{HERE.device}_after" in found}


def decode() -> None:
    rates = card()
    name = torch.cuda.get_device_name() if HERE.device == "cuda" else "none"
    measure("card", lambda: {"gpu": name, "TFLOP/s": rates[0] / 1e12, "GB/s": rates[1] / 1e9})
    for shape, rows in (("0.5B", [(4, 8)]), ("1.5B", [(1, 4), (4, 8), (16, 8)])):
        decoder = prlm.for_sampling(build(shape), BF16)
        for P, G in rows:
            measure(f"{shape}, {P} x {G}", decode_speed, decoder, P, G, rates)
    rl.add_lora(decoder, 16, 16)
    measure("1.5B, 4 x 8, LoRA", decode_speed, decoder, 4, 8, rates)
    del decoder
    for P in (4, 16):
        measure(f"transformers 1.5B, {P} x 8", peer_decode, P, 8)


def static() -> None:
    measure("transformers 1.5B, 4 x 8", peer_decode, 4, 8, cache="static")


def decode_speed(decoder, P: int, G: int, rates) -> dict:
    """Of a step: the time, and the time that reading weights and cache once would take."""
    T, C = sizes()
    prompts = random_ids(P, T, decoder.vocab_limit)

    def run(new):
        prlm.generate(decoder, prompts, G, new, 1.0, (), seed=1)

    found, first = speed(lambda: run(C), P * G * C, 2), seconds(lambda: run(1), 3)
    with pace(record=False):
        run(2)
        plain = (seconds(lambda: run(1 + (C // 16 or 1))) - first) / (C // 16 or 1)
    step = (found["seconds"] - first) / (C - 1)
    floor = step_floor(decoder, P * T, P * G, C, *rates)
    found |= {"prompt_s": first, "step_ms": 1e3 * step, "plain_step_ms": 1e3 * plain}
    return found | {"floor_ms": 1e3 * floor, "share": floor / step}


def peer_decode(P: int, G: int, cache: str | None = None) -> dict:
    from transformers import GenerationConfig

    T, C = sizes()
    model = bench.make_peer(bench.shape_of("1.5B") | HERE.tiny, BF16, HERE.device)
    prompts = torch.tensor(random_ids(P, T, model.config.vocab_size), device=HERE.device)
    how = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=None,
        num_return_sequences=G, cache_implementation=cache,
    )  # fmt: skip
    asked = {"attention_mask": torch.ones_like(prompts), "generation_config": how}
    lengths = iter((C if cache else 2, C))  # of the first call, which is not timed, and the second

    def run():
        how.max_new_tokens = next(lengths)
        model.generate(prompts, **asked)

    return speed(run, P * G * C)


def update() -> None:
    rate, shape = card()[0], (4, 8, 512, 256)
    for lora in (0, 16):
        policy = make_policy("1.5B", lora=lora)
        for saving, P, G, T, C in ((False, *shape), (True, *shape), (True, 1, 4, 512, 768)):
            name = f"{'LoRA' if lora else 'full'}, {P} x {G}, {T} + {C}{', checkpointing' * saving}"
            measure(name, update_speed, policy, rate, saving, P, G, T, C)
        del policy
        allocated()
    measure("transformers, 4 x 8, 512 + 256", peer_update, *shape)


def rollout(policy, P: int, G: int, T: int, C: int, **options):
    """The arguments of rl.update for random completions, each of full length."""
    row, vocabulary = dict(logprobs=[0.0] * C, finished=True), policy.decoder.vocab_limit
    completions = random_ids(P * G, C, vocabulary)
    rows = [row | {"tokens": x, "advantage": n % 2 - 0.5} for n, x in enumerate(completions)]
    o = rl.Options(group_size=G, max_new_tokens=C, **options)
    return o, random_ids(P, T, vocabulary), rows


def update_speed(policy, rate: float, saving: bool, P: int, G: int, T: int, C: int) -> dict:
    (T, C), decoder = sizes(T, C), policy.decoder
    decoder.checkpointing, optimizer = saving, rl.make_optimizer(policy, 1e-6)
    o, *asked = rollout(policy, P, G, T, C)
    found = speed(lambda: rl.update(o, policy, optimizer, *asked), P * (T + G * C), 2)
    # A product with W costs 2 operations a weight and token, its gradients twice that; a frozen W
    # has no gradient of its own.
    operations = bench.matrices(decoder) * P * (T + G * C) + decoder.head.numel() * P * G * C
    operations *= 6 if decoder.head.requires_grad else 4
    return found | {"share": operations / rate / found["seconds"]}


def peer_update(P: int, G: int, T: int, C: int) -> dict:
    """The same step in transformers as it comes: each row with its prompt, a group at a time."""
    T, C = sizes(T, C)
    model = bench.make_peer(bench.shape_of("1.5B") | HERE.tiny, torch.float32, HERE.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=HERE.device == "cuda")
    prompts, rows = (random_ids(n, m, model.config.vocab_size) for n, m in ((P, T), (P * G, C)))
    advantages = torch.randn(1, G, device=HERE.device)

    def step():
        for n, prompt in enumerate(prompts):
            with torch.autocast(HERE.device, BF16):
                loss = full_forward_loss(model, [prompt], [rows[n * G : n * G + G]], advantages)
            (loss / P).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return speed(step, P * (T + G * C))  # counted as ours: a prompt once


def judge() -> dict:
    """Of BERT-base, pairs of 512 tokens."""
    with torch.device(HERE.device):
        encoder = prlm.Encoder(BERT | HERE.tiny)
    encoder.tokenizer = prlm.load_tokenizer(prlm.SHIPPED / "encoder")
    model = prlm.multiply_in(reward.RewardModel(encoder), BF16)
    words = sorted(word for word in encoder.tokenizer.backend.get_vocab() if word.isalpha())
    o, rng = reward.RewardOptions(reward_epochs=1, reward_lr=5e-5), random.Random(0)

    def texts(length, count):
        return [" ".join(rng.choices(words, k=10 if HERE.dry else length)) for _ in range(count)]

    rows = zip(*(texts(length, 6 if HERE.dry else 512) for length in (400, 200, 200)))
    pairs = [
        {"id": str(n), "query": query, "positive": good, "negatives": [bad]}
        for n, (query, good, bad) in enumerate(rows)
    ]
    trained = len(reward.split_pairs(pairs, o.seed)[0])  # pairs, not tokens
    found = speed(lambda: reward.train_reward_model(o, model, pairs), trained)
    found["pairs/s"] = found.pop("tokens/s")
    asked = [SimpleNamespace(query=text) for text in texts(400, 32)], texts(200, 32)
    return found | {"score_32_s": speed(lambda: model.judge(*asked), 32, 3)["seconds"]}


def memory() -> None:
    kinds = {"full": {}, "beta": {"beta": 0.04}, "LoRA": {"lora_rank": 16}}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = prlm.load_tokenizer(TOY)
        prlm.save_decoder(prlm.for_sampling(build("0.5B"), BF16), tokenizer, folder)
        for name, options in kinds.items():
            measure(f"0.5B, {name}", bytes_of_a_weight, folder, **options)


def bytes_of_a_weight(folder, **options) -> dict:
    """Of a policy as loaded, between steps, and the most in a step on a handful of tokens."""
    start, found = allocated(), {}
    options |= {"model": str(folder), "device": HERE.device, "precision": "bfloat16"}
    policy = rl.make_policy(rl.Options(**options))
    found["loaded"], optimizer = allocated(), rl.make_optimizer(policy, 1e-6)
    o, *asked = rollout(policy, 1, 2, 8, 8, **options)
    rl.update(o, policy, optimizer, *asked)
    found["between"] = allocated()
    found["update"] = speed(lambda: rl.update(o, policy, optimizer, *asked), 1)["GiB"] * 2**30
    count = sum(p.numel() for n, p in policy.decoder.named_parameters() if "lora" not in n)
    return {name: (x - start) / count for name, x in found.items()} | {"weights": count}


def head() -> None:
    decoder = prlm.multiply_in(build("1.5B", num_hidden_layers=1), BF16)
    count = 64 if HERE.dry else 8192
    hidden = torch.randn(count, decoder.head.shape[1], device=HERE.device, requires_grad=True)
    targets = torch.randint(decoder.vocab_limit, (count,), device=HERE.device)

    def at_once(decoder, hidden, targets, temperature):
        logprobs = decoder.logits(hidden, decoder.head).float().log_softmax(-1)
        return logprobs.gather(-1, targets[:, None])

    def head_speed(logprobs=prlm.head_logprobs) -> dict:
        def run():
            logprobs(decoder, hidden, targets, 1.0).sum().backward()
            hidden.grad = decoder.zero_grad()

        found = speed(run, count, 3)
        return found | {"GiB_beside_weights": found["GiB"] - allocated() / 2**30}

    measure("log_softmax of all", head_speed, at_once)
    for power in (24, 27, 28):
        with pace(logits=2**power):
            measure(f"chunks of 2**{power}", head_speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=[*LIMITS], metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, in one process")
    o = parser.parse_args()
    begun, HERE.out = time.perf_counter(), o.out.resolve()
    HERE.out.mkdir(parents=True, exist_ok=True)
    if o.dry_run:
        HERE.dry, HERE.tiny, HERE.device = True, TINY, "cpu"
        torch.set_num_threads(1)
        gc.freeze()  # what is imported is not looked through each time
    for part in o.only:
        if o.dry_run or len(o.only) == 1:
            HERE.part = part
            measure(part, globals()[part])
            continue
        command = [sys.executable, __file__, "--only", part, "--out", HERE.out]
        try:
            HERE.failed += subprocess.run(command, timeout=LIMITS[part]).returncode != 0
        except subprocess.TimeoutExpired:
            late = {"part": part, "error": f"stopped after {LIMITS[part]} s"}
            prlm.append(HERE.out / "results.jsonl", [late])
            print(f"{part}: WRONG, {late['error']}")
            HERE.failed += 1
    said = f"{HERE.failed} WRONG, see above" if HERE.failed else "all is right"
    print(f"{' '.join(o.only)}: {time.perf_counter() - begun:.0f} s, {said}; {HERE.out}")
    sys.exit(bool(HERE.failed))


if __name__ == "__main__":
    main()
