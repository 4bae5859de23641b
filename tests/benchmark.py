"""Speed and memory on a CPU, beside the reference libraries and what the machine could do at best.

Each comparison runs the two sides in turn, in one process and with one thread count, and prints the
median of the pairwise ratios: above 1 is faster than the peer. The floor of a row is the time its
floating-point operations take at the measured rate of a large matrix product, or its bytes at the
measured memory bandwidth, whichever is longer. The peers are in tests/requirements.txt. For a GPU
there is tests/gpu.py.

    python tests/benchmark.py                    # the small model: minutes on one core
    python tests/benchmark.py --large            # also Qwen2.5-0.5B's shape: + 20 minutes
    python tests/benchmark.py --trl models/smollm2    # whole GRPO steps beside TRL's

On one core of a 2-core AMD server (2 GHz, AVX2), float32, medians of 5 alternating runs; "floor":
how many times the floor. The rows below the line, and all of TRL's, are of the version before the
chapters were rewritten, on a faster one:

                                                ours            peer             ratio  floor
    sample, small, 8 prompts x 8 x 64 tokens    2.17 s          6.55 s           3.0    2.6
    update, small, the same prompts             3.86 s          15.6 s           4.1    1.9
    BM25, 300 items, 20 words asked             105 users/s     77 users/s       1.4
    BM25, 300 items, 150 words asked            80 users/s      47 users/s       1.7
    ROUGE-1, -2, -L of 10 words                 14,700 pairs/s  5,390 pairs/s    2.7
    read 400 MB of safetensors                  5.9 GB/s        5.7 GB/s         1.0
    ----
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
safetensors. A prompt is not paid again for more completions: for G = 1, 4, 8, 16 of them, 4 prompts
take 1.26, 1.63, 1.91 and 2.64 s in sampling, 1.95, 2.70, 3.68 and 5.99 s in the update.
"""

import argparse
import ctypes
import itertools
import random
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import torch  # noqa: E402
import trl_example  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

import prlm  # noqa: E402
import rl  # noqa: E402
from eval import rouge  # noqa: E402
from retrieve import BM25, load_lamp  # noqa: E402

KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
KEYS += ("intermediate_size", "vocab_size", "rope_theta", "tie_word_embeddings")
SHAPES = {  # Qwen2.5-0.5B's, DeepSeek-R1-Distill-Qwen-1.5B's
    "small": (192, 6, 6, 2, 512, 2048, 1e4, True),
    "0.5B": (896, 24, 14, 2, 4864, 151936, 1e6, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, 1e4, False),
}


def shape_of(name: str) -> dict:
    common = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 4096}
    return common | dict(zip(KEYS, SHAPES[name], strict=True))


def seconds(function, runs: int = 1) -> float:
    """The median over `runs` calls, each until what it began on a GPU is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    times = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def duel(ours, theirs, runs: int) -> tuple[float, float, float]:
    """(our median, their median, median of theirs / ours) over `runs` alternating runs."""
    ours(), theirs()  # warm up
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    rows = [(a, b, b / a) for a, b in pairs]
    return tuple(map(statistics.median, zip(*rows, strict=True)))


def row(name: str, *cells) -> None:
    text = "".join(f"{c:>13.3g}" if isinstance(c, float) else f"{c:>13}" for c in cells)
    print(f"{name:<46}{text}", flush=True)


def machine(dtype, device="cpu", n=1024, size=2**26) -> tuple[float, float]:
    """Measured (operations a second of a product of n x n, bytes a second of a sum of `size`)."""
    a = torch.randn(n, n, device=device).to(dtype)
    x = torch.randn(size, device=device)
    product, total = (min(seconds(f) for _ in range(5)) for f in (lambda: a @ a, lambda: x.sum()))
    return 2 * n**3 / product, 4 * size / total


def build(shape: str, dtype):
    """(our decoder, transformers' model with the same weights)."""
    import transformers  # here, as our side of bench_trl does without

    torch.manual_seed(0)
    decoder = prlm.Decoder(shape_of(shape)).to(dtype).eval()
    settings = {key: value for key, value in decoder.raw.items() if key != "model_type"}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    model.load_state_dict(decoder.state_dict(), strict=False)  # a tied head has no weight here
    return decoder, model.to(dtype).eval()


def workload(prompts: int, group: int, *lengths: tuple[int, int]):
    """(prompts [P], completions [P][G]) of random ids; `lengths`: between what, of each kind."""
    rng = random.Random(0)
    asked, answers = (
        [rng.choices(range(2000), k=rng.randint(*between)) for _ in range(count)]
        for between, count in zip(lengths, (prompts, prompts * group), strict=True)
    )
    return asked, [answers[n : n + group] for n in range(0, len(answers), group)]


def matrices(decoder) -> int:
    """Parameters in the layers' matrices."""
    return sum(p.numel() for p in decoder.model.layers.parameters() if p.dim() == 2)


def sampling_floor(decoder, prompts, group, tokens, flops, bandwidth) -> float:
    """Prefill by operations; each step by its operations or by the bytes of weights and cache."""
    inside, head, c = matrices(decoder), decoder.head.numel(), decoder.config
    rows, size = len(prompts) * group, decoder.head.element_size()
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # numbers of a token
    numbers = inside + head + cached * (sum(map(len, prompts)) + rows * tokens / 2)
    step = max(2 * (inside + head) * rows / flops, numbers * size / bandwidth)
    return 2 * inside * sum(map(len, prompts)) / flops + tokens * step


def pad(*columns: list[list[int]], side="right") -> list[torch.Tensor]:
    """A grid [rows, the longest one] of each column's rows."""
    columns = [[torch.tensor(row) for row in rows] for rows in columns]
    return [pad_sequence(rows, batch_first=True, padding_side=side) for rows in columns]


def bench_sampler(name, decoder, model, prompts, group, tokens, rates, runs) -> None:
    rows = [p for p in prompts for _ in range(group)]
    padded, mask = pad(rows, [[1] * len(p) for p in rows], side="left")
    how = dict(do_sample=True, temperature=0.7, top_k=0, top_p=1.0, eos_token_id=None)
    how |= dict(pad_token_id=0, max_new_tokens=tokens, min_new_tokens=tokens)
    ours = partial(prlm.generate, decoder, prompts, group, tokens, 0.7, seed=0)
    theirs = partial(model.generate, padded, attention_mask=mask, **how)
    ours_s, theirs_s, ratio = duel(ours, theirs, runs)
    floor = sampling_floor(decoder, prompts, group, tokens, *rates)
    row(name, ours_s, theirs_s, ratio, len(rows) * tokens / ours_s, ours_s / floor)


def full_forward_loss(model, prompts, completions, advantages):
    """The plain way: every row in full, padded, logits everywhere."""
    pairs = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    answered = [[0] * len(p) + [1] * len(c) for p, c in pairs]
    grids = pad([p + c for p, c in pairs], [[1] * len(p + c) for p, c in pairs], answered)
    tokens, mask, inside = (grid.to(model.device) for grid in grids)
    logits = model(tokens, attention_mask=mask).logits[:, :-1].float() / 0.7
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    loss = -(logprobs - logprobs.detach()).exp() * advantages.flatten()[:, None] * inside[:, 1:]
    return (loss.sum(-1) / inside.sum(-1)).mean()


def shared_loss(decoder, prompts, completions, advantages):
    """Ours: each prompt once for its completions, logits of the completions alone."""
    logprobs, mask = prlm.token_logprobs(decoder, prompts, completions, 0.7)
    return rl.grpo_loss(logprobs, logprobs.detach(), advantages, mask)


def bench_update(name, decoder, model, prompts, completions, rates, runs) -> None:
    asked = prompts, completions, torch.randn(len(prompts), len(completions[0]))

    def step(loss_of, module, optimizer):
        loss = loss_of(module, *asked)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    sides = ((shared_loss, decoder), (full_forward_loss, model))
    both = [partial(step, *side, torch.optim.AdamW(side[1].parameters(), 1e-9)) for side in sides]
    a, b = (one() for one in both)
    assert abs(a - b) < 1e-2 * max(abs(a), 0.1), f"the two losses differ: {a} and {b}"
    ours_s, theirs_s, ratio = duel(*both, runs)
    trained = sum(len(c) for group in completions for c in group)
    tokens = sum(map(len, prompts)) + trained
    needed = 6 * (matrices(decoder) * tokens + decoder.head.numel() * trained)
    row(name, ours_s, theirs_s, ratio, tokens / ours_s, ours_s / (needed / rates[0]))


def peak_mib(function) -> float:
    """MiB that a call adds to the process at its highest point (Linux)."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would be used unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def bench_memory(decoder, model, prompts, completions) -> None:
    asked = prompts, completions, torch.randn(len(prompts), len(completions[0]))
    other = peak_mib(lambda: full_forward_loss(model, *asked).backward())
    model.zero_grad(set_to_none=True)
    for decoder.checkpointing in (False, True):
        mine = peak_mib(lambda: shared_loss(decoder, *asked).backward())
        decoder.zero_grad(set_to_none=True)
        how = ", --checkpointing" * decoder.checkpointing
        row(f"update, 4 completions of 512{how}: MiB", mine, other, other / mine)


def bench_shape(shape: str, dtype, runs: int, prompts: int, group: int, tokens: int):
    """Sampling and update of a model's shape; returns `build`'s two models."""
    asked, completions = workload(prompts, group, (128, 256), (32, 64))
    both, rates, how = build(shape, dtype), machine(dtype), f"{shape}: {prompts} x {group}"
    bench_sampler(f"sample {how} x {tokens}", *both, asked, group, tokens, rates, runs)
    bench_update(f"update {how} rows", *both, asked, completions, rates, runs)
    return both


def bench_scaling(decoder) -> None:
    """How the time of sampling and update grows with G."""
    for group in (1, 4, 8, 16):
        prompts, completions = workload(4, group, (512, 512), (64, 64))

        def update(asked=(prompts, completions)):
            prlm.token_logprobs(decoder, *asked)[0].sum().backward()
            decoder.zero_grad()

        sample = partial(prlm.generate, decoder, prompts, group, 64, 0.7, seed=0)
        times = (seconds(f, 3) for f in (sample, update))
        row(f"seconds of sampling and update, 4 x {group}", *times)


def bench_loading() -> None:
    import safetensors.torch

    tensors = {f"layer.{n}": torch.randn(1024, 4096).bfloat16() for n in range(50)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        prlm.write_safetensors(path, tensors)

        def copy_all(read):
            for tensor in read(path).values():
                torch.empty_like(tensor).copy_(tensor)

        both = (prlm.read_safetensors, safetensors.torch.load_file)
        a, b, ratio = duel(*(partial(copy_all, read) for read in both), 5)
        row("read 400 MB of safetensors: GB/s", 0.419 / a, 0.419 / b, ratio)


def bench_text() -> None:
    from rank_bm25 import BM25Okapi
    from rouge_score.rouge_scorer import RougeScorer

    rng = random.Random(0)
    vocabulary = [f"w{n}" for n in range(5000)]
    weights = [1 / (n + 1) for n in range(5000)]
    say = lambda n: " ".join(rng.choices(vocabulary, weights, k=n))  # noqa: E731
    users = [[say(60) for _ in range(300)] for _ in range(30)]

    def rank_all(scores_of, queries):
        for texts, query in zip(users, queries, strict=True):
            scores_of([t.split() for t in texts], query.split()).argsort()

    for length in (20, 150):
        queries = [say(length) for _ in users]
        both = (lambda t, q: BM25(t).scores(q), lambda t, q: BM25Okapi(t).get_scores(q))
        a, b, ratio = duel(*(partial(rank_all, one, queries) for one in both), 5)
        row(f"BM25, 300 items, {length} words in the query: users/s", 30 / a, 30 / b, ratio)
    pairs = [(say(10), say(10)) for _ in range(2000)]
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score
    both = (lambda: [rouge(p, t) for p, t in pairs], lambda: [theirs(t, p) for p, t in pairs])
    a, b, ratio = duel(*both, 5)
    row("ROUGE-1, -2, -L of 10 words: pairs/s", 2000 / a, 2000 / b, ratio)


# ---- Whole steps beside TRL's GRPOTrainer ----------------------------------------------------

STEPS = 4  # the first one warms up


def our_steps(o: rl.Options) -> list[float]:
    """Seconds of each step of rl.py."""
    policy, examples = rl.make_policy(o), load_lamp(o.data, o.task, "train")
    rl.train_policy(o, Path(o.out), policy, None, examples, [])
    lines = prlm.read_lines(Path(o.out) / "metrics.jsonl")
    return [line["seconds_rollout"] + line["seconds_update"] for line in lines]


def trl_steps(o: rl.Options) -> list[float]:
    """Seconds of each step of TRL's trainer on the same prompts, with the same reward."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        times = [time.perf_counter()]  # noqa: RUF012

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter())

    examples = load_lamp(o.data, o.task, "train")
    columns = trl_example.columns(o, prlm.load_tokenizer(o.model), examples)
    config = GRPOConfig(
        output_dir=o.out, use_cpu=True, bf16=False, max_steps=STEPS, save_strategy="no",
        per_device_train_batch_size=o.prompts_per_step * o.group_size,
        num_generations=o.group_size, max_completion_length=o.max_new_tokens,
        temperature=o.temperature, learning_rate=o.lr, beta=0.0, loss_type="grpo",
        gradient_checkpointing=o.checkpointing, report_to=[], disable_tqdm=True, seed=o.seed,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    reward, data = trl_example.trl_reward(examples), Dataset.from_dict(columns)
    GRPOTrainer(o.model, reward, config, data, callbacks=[Clock()]).train()
    return [after - before for before, after in itertools.pairwise(Clock.times)]


def run_side(steps, threads: int, **how) -> tuple[float, float]:
    """Median seconds of a step, and the process's highest memory in GiB."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        o = rl.Options(
            out=folder, device="cpu", precision="float32", steps=STEPS, prompts_per_step=2,
            group_size=4, max_new_tokens=64, max_prompt_tokens=320, lr=1e-6, personalization=0.0,
            eval_every=0, **how,
        )  # fmt: skip
        times = steps(o)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return statistics.median(times[1:]), peak


def bench_trl(model: str, data: str, threads: int) -> None:
    row("\nwhole GRPO steps", "ours", "TRL", "TRL/ours")
    for checkpointing in (False, True):
        found = []  # of a process each, which has a memory peak of its own
        for steps in (our_steps, trl_steps):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                how = {"model": model, "data": data, "checkpointing": checkpointing}
                found.append(pool.submit(run_side, steps, threads, **how).result())
        size = "2 x 4 x 64" + ", checkpointing" * checkpointing
        for unit, ours, theirs in zip(("s", "GiB"), *found, strict=True):
            row(f"{size}: {unit}", ours, theirs, theirs / ours)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--large", action="store_true", help="also Qwen2.5-0.5B's shape")
    parser.add_argument("--trl", help="only whole GRPO steps of this model, beside TRL's")
    parser.add_argument("--data", default=str(ROOT / "toy/lamp"), help="LaMP's files, for --trl")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    if o.trl:
        return bench_trl(o.trl, o.data, o.threads)
    # The larger model's precision is what this CPU is faster in.
    dtype = max(torch.float32, torch.bfloat16, key=lambda kind: machine(kind)[0])
    print(f"torch {torch.__version__}, {o.threads} threads, {dtype}\n")
    row("", "ours", "peer", "peer/ours", "tokens/s", "x floor")
    small, _ = bench_shape("small", torch.float32, 5, 8, 8, 64)
    if o.large:
        both = bench_shape("0.5B", dtype, 1, 2, 4, 32)
        bench_memory(*both, *workload(1, 4, (128, 128), (512, 512)))
    row("\n", "ours", "peer", "ratio")
    bench_loading()
    bench_text()
    bench_scaling(small)


if __name__ == "__main__":
    main()
