"""Speed and memory beside the reference libraries and beside what the machine could do at best.

Each comparison runs the two sides in turn, in one process and with one thread count, and prints the
median of the pairwise ratios: above 1 is faster than the peer. The floor of a row is the time its
floating-point operations take at the measured rate of a large matrix product, or its bytes at the
measured memory bandwidth, whichever is longer. Peers that are not installed are left out.

    python tests/benchmark.py                    # the small model: minutes on one core
    python tests/benchmark.py --large            # also Qwen2.5-0.5B's shape: + 20 minutes
    python tests/benchmark.py --device cuda      # DeepSeek-R1-Distill-Qwen-1.5B's shape
    python tests/benchmark.py --trl models/smollm2    # whole GRPO steps beside TRL's

Measured on one core of a 2-core AMD server (AVX2), float32, medians of 5 alternating runs, fewer
with --large; "floor" is how many times the floor we take:

                                                ours            peer             ratio  floor
    sample, small, 8 prompts x 8 x 64 tokens    1.04 s          3.60 s           3.5    3.2
    update, small, the same prompts             1.83 s          9.32 s           5.1    2.4
    BM25, 300 items, 20 words asked             167 users/s     120 users/s      1.3
    BM25, 300 items, 150 words asked            124 users/s     73 users/s       1.7
    ROUGE-1, -2, -L of 10 words                 31,600 pairs/s  11,900 pairs/s   2.7
    read 400 MB of safetensors                  11.3 GB/s       13.1 GB/s        0.88
    sample, 0.5B, 2 prompts x 4 x 32 tokens     20.7 s          41.0 s           2.0    2.9
    update, 0.5B, the same prompts              35.2 s          130 s            3.7    1.7
    its memory beside weights, 4 x 512 tokens   7.3 GiB         11.6 GiB         1.6
    the same with checkpointing                 3.4 GiB                          3.4

A whole step of GRPO beside TRL's GRPOTrainer: SmolLM2-135M, the toy's prompts, 2 x 4 completions of
at most 64 tokens, while other programs kept the second core busy. Seconds are medians of the steps
after the first, GiB the highest memory of the process:

    step, no checkpointing                      31.9 s          78.5 s         2.5
    its memory                                  4.1 GiB         10.0 GiB       2.4
    step, checkpointing                         30.3 s          82.4 s         2.7
    its memory                                  3.0 GiB         6.2 GiB        2.1

The peers are transformers (`generate`; training with every row in full), rank_bm25, rouge_score and
safetensors. A prompt is not paid again for more completions: 4 prompts of 512 tokens with
completions of 64 take, for G = 1, 4, 8, 16, in sampling .62, .79, .88, 1.31 s and in the update .9,
1.3, 1.7, 2.6 s.
"""

import argparse
import ctypes
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import torch  # noqa: E402
import trl_example  # noqa: E402

import prlm  # noqa: E402
import rl  # noqa: E402
from eval import rouge  # noqa: E402
from retrieve import BM25, load_lamp  # noqa: E402

COMMON = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 4096}
SHAPES = {
    "small": dict(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=512, vocab_size=2048, rope_theta=1e4, tie_word_embeddings=True,
    ),
    "0.5B": dict(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151936, rope_theta=1e6, tie_word_embeddings=True,
    ),
    "1.5B": dict(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        intermediate_size=8960, vocab_size=151936, rope_theta=1e4, tie_word_embeddings=False,
    ),
}  # fmt: skip


def seconds(function) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def duel(ours, theirs, runs: int) -> tuple[float, float, float]:
    """(our median, their median, median of theirs / ours) over `runs` alternating runs."""
    ours(), theirs() if theirs else None  # warm up
    pairs = [(seconds(ours), seconds(theirs) if theirs else float("nan")) for _ in range(runs)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return a, b, statistics.median(their / our for our, their in pairs)


def row(name: str, *cells) -> None:
    text = "".join(f"{c:>13.3g}" if isinstance(c, float) else f"{c:>13}" for c in cells)
    print(f"{name:<46}{text}", flush=True)


def machine(device: str, dtype) -> tuple[float, float]:
    """Measured (floating-point operations a second of a large product, bytes a second of a sum)."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    flops = 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))
    x = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    bandwidth = x.numel() * 4 / min(seconds(lambda: x.sum()) for _ in range(5))
    return flops, bandwidth


def build(shape: str, device: str, dtype):
    """(our decoder, transformers' model with the same weights or None)."""
    raw = COMMON | SHAPES[shape]
    torch.manual_seed(0)
    decoder = prlm.Decoder(raw).to(device, dtype).eval()
    try:
        import transformers
    except ImportError:
        return decoder, None
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    model.load_state_dict(decoder.views(), strict=False)
    model = model.to(device, dtype).eval()
    return decoder, model


def ids(generator, length: int) -> list[int]:
    return torch.randint(2000, (length,), generator=generator).tolist()


def workload(prompts: int, group: int, low: int, high: int, short: int, long: int, seed=0):
    """(prompts [P], completions [P][G]) of random ids and lengths."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda a, b: int(torch.randint(a, b + 1, (1,), generator=g))  # noqa: E731
    questions = [ids(g, draw(low, high)) for _ in range(prompts)]
    return questions, [[ids(g, draw(short, long)) for _ in range(group)] for _ in questions]


def matrices(decoder) -> int:
    """Parameters in the layers' matrices."""
    return sum(p.numel() for layer in decoder.layers for p in layer.parameters() if p.dim() == 2)


def sampling_floor(decoder, prompts, group, tokens, flops, bandwidth) -> float:
    """Prefill by operations; each step by its operations or by the bytes of weights and cache."""
    inside, head = matrices(decoder), decoder.head.numel()
    c, rows = decoder.config, len(prompts) * group
    size = decoder.head.element_size()
    prefill = 2 * inside * sum(map(len, prompts)) / flops
    cached = 2 * c.layers * c.kv_heads * c.head_dim * size  # bytes of one cached token
    shared, own = cached * sum(map(len, prompts)), cached * rows * tokens / 2
    step = 2 * (inside + head) * rows / flops
    return prefill + tokens * max(step, ((inside + head) * size + shared + own) / bandwidth)


def bench_sampler(name, decoder, model, prompts, group, tokens, runs, rates) -> None:
    device, rows = decoder.head.device, [p for p in prompts for _ in range(group)]
    width = max(map(len, rows))
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for n, prompt in enumerate(rows):
        padded[n, width - len(prompt) :], mask[n, width - len(prompt) :] = torch.tensor(prompt), 1
    padded, mask = padded.to(device), mask.to(device)

    def ours():
        prlm.generate(decoder, prompts, group, tokens, 0.7, seed=0)

    @torch.no_grad()
    def theirs():
        model.generate(
            padded, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
            max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    ours_s, theirs_s, ratio = duel(ours, theirs if model else None, runs)
    floor = sampling_floor(decoder, prompts, group, tokens, *rates)
    row(name, ours_s, theirs_s, ratio, len(rows) * tokens / ours_s, ours_s / floor)


def full_forward_loss(model, prompts, completions, advantages):
    """The plain way: every row in full, padded, logits everywhere."""
    device = next(model.parameters()).device
    rows = [p + c for p, group in zip(prompts, completions, strict=True) for c in group]
    starts = [len(p) for p, group in zip(prompts, completions, strict=True) for _ in group]
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask, inside = torch.zeros_like(tokens), torch.zeros(len(rows), width)
    for n, (ids_, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[n, : len(ids_)], mask[n, : len(ids_)] = torch.tensor(ids_), 1
        inside[n, start : len(ids_)] = 1
    tokens, mask, inside = tokens.to(device), mask.to(device), inside.to(device)[:, 1:]
    logits = model(tokens, attention_mask=mask).logits[:, :-1].float() / 0.7
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -(ratio * advantages.flatten()[:, None] * inside).sum(-1) / inside.sum(-1)
    return loss.mean()


def bench_update(name, decoder, model, prompts, completions, runs, rates) -> None:
    advantages = torch.randn(len(prompts), len(completions[0])).to(decoder.head.device)

    def make(loss_of, module):
        optimizer = torch.optim.AdamW(module.parameters(), 1e-9)

        def step():
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    def shared():
        logprobs, mask = prlm.token_logprobs(decoder, prompts, completions, 0.7)
        return rl.grpo_loss(logprobs, logprobs.detach(), advantages, mask)

    ours, theirs = make(shared, decoder), None
    if model:
        theirs = make(lambda: full_forward_loss(model, prompts, completions, advantages), model)
        a, b = ours(), theirs()
        assert abs(a - b) < 1e-2 * max(abs(a), 0.1), f"the two losses differ: {a} and {b}"
    ours_s, theirs_s, ratio = duel(ours, theirs, runs)
    trained = sum(len(c) for group in completions for c in group)
    tokens = sum(map(len, prompts)) + trained
    needed = 6 * (matrices(decoder) * tokens + decoder.head.numel() * trained)
    row(name, ours_s, theirs_s, ratio, tokens / ours_s, ours_s / (needed / rates[0]))


def peak_mib(function) -> float:
    """MiB that a call adds to the process (Linux) or to the GPU at its highest point."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would be used unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def bench_memory(decoder, model, prompts, completions) -> None:
    advantages = torch.randn(len(prompts), len(completions[0])).to(decoder.head.device)

    def ours():
        logprobs, mask = prlm.token_logprobs(decoder, prompts, completions, 0.7)
        rl.grpo_loss(logprobs, logprobs.detach(), advantages, mask).backward()

    def theirs():
        full_forward_loss(model, prompts, completions, advantages).backward()

    other = peak_mib(theirs) if model else float("nan")
    if model:
        model.zero_grad(set_to_none=True)
    for decoder.checkpointing in (False, True):
        mine, how = peak_mib(ours), ", --checkpointing" * decoder.checkpointing
        decoder.zero_grad(set_to_none=True)
        row(f"update, 4 completions of 512{how}: MiB", mine, other, other / mine)


def bench_scaling(decoder) -> None:
    """How the time of sampling and update grows with each length, and with G."""
    print("\nseconds by size                                    sampling       update")
    for prompt, completion, group in (
        (128, 64, 8), (256, 64, 8), (512, 64, 8), (1024, 64, 8),
        (512, 32, 8), (512, 128, 8), (512, 256, 8), (512, 64, 1), (512, 64, 4), (512, 64, 16),
    ):  # fmt: skip
        prompts, completions = workload(4, group, prompt, prompt, completion, completion)

        def sampling(prompts=prompts, group=group, completion=completion):
            prlm.generate(decoder, prompts, group, completion, 0.7, seed=0)

        def updating(prompts=prompts, completions=completions):
            logprobs, mask = prlm.token_logprobs(decoder, prompts, completions)
            (logprobs * mask).sum().backward()
            decoder.zero_grad()

        times = (statistics.median(seconds(f) for _ in range(3)) for f in (sampling, updating))
        row(f"4 prompts of {prompt}, {group} completions of {completion}", *times)


def bench_loading() -> None:
    tensors = {f"layer.{n}": torch.randn(1024, 4096).bfloat16() for n in range(50)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        prlm.write_safetensors(path, tensors)

        def ours():
            for tensor in prlm.read_safetensors(path).values():
                torch.empty_like(tensor).copy_(tensor)

        try:
            from safetensors.torch import load_file
        except ImportError:
            load_file = None

        def theirs():
            for tensor in load_file(path).values():
                torch.empty_like(tensor).copy_(tensor)

        a, b, ratio = duel(ours, theirs if load_file else None, 5)
        row("read 400 MB of safetensors: GB/s", 0.419 / a, 0.419 / b, ratio)
    imports = [sys.executable, "-c", "import torch"]
    help_ = [sys.executable, str(ROOT / "rl.py"), "--help"]
    run = lambda line: subprocess.run(line, stdout=subprocess.DEVNULL, check=True)  # noqa: E731
    a, b, _ = duel(lambda: run(help_), lambda: run(imports), 5)
    row("rl.py --help, beside `import torch`: s", a, b, b / a)


def bench_text() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{n}" for n in range(5000)]
    weights = [1 / (n + 1) for n in range(5000)]
    say = lambda n: " ".join(rng.choices(vocabulary, weights, k=n))  # noqa: E731
    users = [[say(60) for _ in range(300)] for _ in range(30)]
    for length in (20, 150):
        queries = [say(length) for _ in users]

        def ours(queries=queries):
            for texts, query in zip(users, queries, strict=True):
                BM25([t.split() for t in texts]).scores(query.split()).argsort()

        def theirs(queries=queries):
            for texts, query in zip(users, queries, strict=True):
                BM25Okapi([t.split() for t in texts]).get_scores(query.split()).argsort()

        try:
            from rank_bm25 import BM25Okapi
        except ImportError:
            theirs = None
        a, b, ratio = duel(ours, theirs, 5)
        row(f"BM25, 300 items, {length} words in the query: users/s", 30 / a, 30 / b, ratio)
    pairs = [(say(10), say(10)) for _ in range(2000)]
    try:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    except ImportError:
        scorer = None
    a, b, ratio = duel(
        lambda: [rouge(p, t) for p, t in pairs],
        (lambda: [scorer.score(t, p) for p, t in pairs]) if scorer else None,
        5,
    )
    row("ROUGE-1, -2, -L of 10 words: pairs/s", 2000 / a, 2000 / b, ratio)


# ---- Whole steps beside TRL's GRPOTrainer ----------------------------------------------------

STEP = {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 64, "max_prompt_tokens": 320,
        "k": 4, "task": "LaMP-4", "lr": 1e-6, "temperature": 1.0, "seed": 0}  # fmt: skip
STEPS = 4  # the first one warms up


def our_steps(model: str, data: str, checkpointing: bool, out: Path) -> list[float]:
    """Seconds of each step of rl.py."""
    o = rl.Options(
        model=model, data=data, out=str(out), device="cpu", precision="float32", steps=STEPS,
        personalization=0.0, checkpointing=checkpointing, eval_every=0, eval_examples=1, **STEP
    )  # fmt: skip
    o.force = True  # a released model answers in no form yet: its rewards are all 0
    rl.main(o)
    lines = prlm.read_lines(out / "metrics.jsonl")
    return [line["seconds_rollout"] + line["seconds_update"] for line in lines]


def trl_steps(model: str, data: str, checkpointing: bool, out: Path) -> list[float]:
    """Seconds of each step of TRL's trainer on the same prompts, with the same reward."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.times = [time.perf_counter()]

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter())

    how = {key: STEP[key] for key in ("task", "k", "max_prompt_tokens", "max_new_tokens")}
    o = trl_example.Options(model=model, data=data, **how)
    examples = load_lamp(data, o.task, "train")
    columns = trl_example.columns(o, prlm.load_tokenizer(model), examples)
    config = GRPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, max_steps=STEPS, save_strategy="no",
        per_device_train_batch_size=STEP["prompts_per_step"] * STEP["group_size"],
        num_generations=STEP["group_size"], max_completion_length=STEP["max_new_tokens"],
        temperature=STEP["temperature"], learning_rate=STEP["lr"], beta=0.0, loss_type="grpo",
        gradient_checkpointing=checkpointing, report_to=[], disable_tqdm=True, seed=STEP["seed"],
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    clock = Clock()
    reward = trl_example.trl_reward(examples)
    trainer = GRPOTrainer(model, reward, config, Dataset.from_dict(columns), callbacks=[clock])
    trainer.train()
    return [after - before for before, after in itertools.pairwise(clock.times)]


def bench_trl(model: str, data: str, threads: int) -> None:
    """Each side in a process of its own, so that each has a memory peak of its own."""
    row("\nwhole GRPO steps", "ours", "TRL", "TRL/ours")
    for checkpointing in (False, True):
        found = {}
        for side in ("ours", "trl"):
            line = [sys.executable, __file__, "--trl", model, "--data", data, "--side", side]
            line += ["--threads", str(threads), *["--checkpointing"] * checkpointing]
            done = subprocess.run(line, check=True, capture_output=True, text=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
        size = "{prompts_per_step} x {group_size} x {max_new_tokens}".format(**STEP)
        size += ", checkpointing" * checkpointing
        for name, unit in (("seconds", "s"), ("peak", "GiB")):
            ours, theirs = found["ours"][name], found["trl"][name]
            row(f"{size}: {unit}", ours, theirs, theirs / ours)


def run_side(side: str, *how) -> None:
    """One side of bench_trl: median seconds a step, and the process's highest memory in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        times = {"ours": our_steps, "trl": trl_steps}[side](*how, Path(folder) / "run")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": statistics.median(times[1:]), "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs of each comparison")
    parser.add_argument("--large", action="store_true", help="also Qwen2.5-0.5B's shape, on a CPU")
    parser.add_argument("--trl", help="only whole GRPO steps of this model, beside TRL's")
    parser.add_argument("--data", default=str(ROOT / "toy/lamp"), help="LaMP's files, for --trl")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    if o.side:
        run_side(o.side, o.trl, o.data, o.checkpointing)
        return
    if o.trl:
        bench_trl(o.trl, o.data, o.threads)
        return
    print(f"torch {torch.__version__}, {o.device}, {o.threads} threads, medians of {o.runs} runs\n")
    row("", "ours", "peer", "peer/ours", "tokens/s", "x floor")
    cuda = o.device == "cuda"
    shapes = [("1.5B", torch.bfloat16)] if cuda else [("small", torch.float32)]
    if o.large and not cuda:  # in the precision that this CPU is faster in
        kinds = torch.float32, torch.bfloat16
        shapes.append(("0.5B", max(kinds, key=lambda kind: machine("cpu", kind)[0])))
    for shape, dtype in shapes:
        name = f"{shape} {str(dtype).removeprefix('torch.')}"
        rates = machine(o.device, dtype)
        decoder, model = build(shape, o.device, dtype)
        runs = o.runs if shape == "small" or cuda else 1
        if cuda:
            for group in (4, 8):
                prompts, completions = workload(4, group, 512, 512, 768, 768)
                how = f"4 prompts of 512 x {group}"
                bench_sampler(
                    f"sample {name}: {how} x 768", decoder, model, prompts, group, 768, 3, rates
                )
                bench_update(f"update {name}: {how}", decoder, None, prompts, completions, 3, rates)
            continue
        count, group, tokens = (8, 8, 64) if shape == "small" else (2, 4, 32)
        prompts, completions = workload(count, group, 128, 256, 32, 64)
        how = f"{count} x {group}"
        where = decoder, model, prompts
        bench_sampler(f"sample {name}: {how} x {tokens}", *where, group, tokens, runs, rates)
        bench_update(f"update {name}: {how} rows", *where, completions, runs, rates)
        if shape == "small":
            small = decoder
        else:
            bench_memory(decoder, model, *workload(1, 4, 128, 128, 512, 512))
        del decoder, model, where
    if not cuda:
        row("\n", "ours", "peer", "ratio")
        bench_loading()
        bench_text()
        bench_scaling(small)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"\npeak memory of this process: {peak} MiB")


if __name__ == "__main__":
    main()
