"""Speed and memory on a CPU, beside the reference libraries and what the machine could do at best.

Each comparison runs the two sides in turn, in one process and with one thread count, and prints the
median of the pairwise ratios: above 1 is faster than the peer, which is transformers (`generate`;
training with every row in full), rank_bm25 or rouge_score (tests/requirements.txt). The floor is
the time that the floating-point operations take at the measured rate of a large matrix product, or
the bytes at the measured memory bandwidth, whichever is longer. For a GPU: tests/gpu.py.

    python tests/benchmark.py                    # the small model: minutes on one core
    python tests/benchmark.py --large            # also Qwen2.5-0.5B's shape: + 20 minutes
    python tests/benchmark.py --trl models/smollm2    # whole GRPO steps beside TRL's

On one core of an AMD EPYC (AVX-512), float32, medians of 5 runs; "floor": in floors.

                                                ours            peer             ratio  floor
    sample, small, 8 prompts x 8 x 64 tokens    .98 s           3.17 s           3.2    3.1
    update, small, the same prompts             1.50 s          6.74 s           4.5    1.9
    BM25, 300 items, 20 words asked             222 users/s     177 users/s      1.3
    BM25, 300 items, 150 words asked            168 users/s     105 users/s      1.6
    ROUGE-1, -2, -L of 10 words                 27,200 pairs/s  17,100 pairs/s   1.6

A step of GRPO beside TRL's GRPOTrainer, on another machine, commit 9ba772a: SmolLM2-135M, the toy's
prompts, 2 x 4 completions of at most 64 tokens; seconds of a median step, GiB at the peak:

    step, no checkpointing                      31.9 s          78.5 s         2.5
    its memory                                  4.1 GiB         10.0 GiB       2.4
    step, checkpointing                         30.3 s          82.4 s         2.7
    its memory                                  3.0 GiB         6.2 GiB        2.1"""

import argparse
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

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prlm
import rl
from eval import rouge
from retrieve import BM25, load_lamp
from toy import trl_example

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


def row(name: str, *cells) -> None:
    text = "".join(f"{c:>13.3g}" if isinstance(c, float) else f"{c:>13}" for c in cells)
    print(f"{name:<46}{text}", flush=True)


def duel(name: str, ours, theirs, runs: int, amount=None, floor=None) -> None:
    """Prints medians over alternating runs: both sides' seconds, or the amount a second, the ratio,
    and how many times the floor, which is in seconds, ours is."""
    ours(), theirs()  # warm up
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    a, b, ratio = map(statistics.median, zip(*((a, b, b / a) for a, b in pairs)))
    shown = (amount / a, amount / b) if amount else (a, b)
    row(name, *shown, ratio, *([a / floor] if floor else []))


def machine(dtype, device="cpu", n=1024, size=2**26) -> tuple[float, float]:
    """Measured (operations a second of a product of n x n, bytes a second of a sum of `size`)."""
    a = torch.randn(n, n, device=device).to(dtype)
    x = torch.randn(size, device=device)
    product, total = (min(seconds(f) for _ in range(5)) for f in (lambda: a @ a, lambda: x.sum()))
    return 2 * n**3 / product, 4 * size / total


def make_peer(raw: dict, dtype, device="cpu"):
    """transformers' model of this config.json, with random weights."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**{key: value for key, value in raw.items() if key != "model_type"})
    with torch.device(device):
        make = AutoModelForCausalLM.from_config
        return make(config, dtype=dtype, attn_implementation="sdpa").eval()


def random_ids(rows: int, length: int, vocabulary: int, least=None) -> list[list[int]]:
    """Rows of `length` ids, or of `least` to `length`."""
    rng = random.Random(f"{rows} {length}")
    lengths = [rng.randint(least or length, length) for _ in range(rows)]
    return [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]


def matrices(decoder) -> int:
    """Parameters in the layers' matrices."""
    return sum(p.numel() for p in decoder.model.layers.parameters() if p.dim() == 2)


def step_floor(decoder, prompted: int, rows: int, new: int, flops, bandwidth) -> float:
    """Seconds of a sampling step, by its operations or by the bytes of weights and cache."""
    weights, c = matrices(decoder) + decoder.head.numel(), decoder.config
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # numbers of a token
    numbers = weights + cached * (prompted + rows * new / 2)
    return max(2 * weights * rows / flops, numbers * decoder.head.element_size() / bandwidth)


def pad(*columns: list[list[int]], side="right") -> list[torch.Tensor]:
    """A grid [rows, the longest one] of each column's rows."""
    columns = [[torch.tensor(row) for row in rows] for rows in columns]
    return [pad_sequence(rows, batch_first=True, padding_side=side) for rows in columns]


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


def bench_shape(shape: str, dtype, runs: int, P: int, G: int, new: int) -> None:
    """Sampling and update of a model's shape, with prompts and completions of random ids."""
    torch.manual_seed(0)
    decoder, (flops, bandwidth) = prlm.Decoder(shape_of(shape)).to(dtype).eval(), machine(dtype)
    model = make_peer(decoder.raw, dtype)
    model.load_state_dict(decoder.state_dict(), strict=False)  # a tied head has no weight here
    prompts, said = random_ids(P, 256, 2000, 128), random_ids(P * G, 64, 2000, 32)
    completions = [said[n : n + G] for n in range(0, P * G, G)]
    prompted, trained = sum(map(len, prompts)), sum(map(len, said))
    inside, head = matrices(decoder), decoder.head.numel()

    rows = [p for p in prompts for _ in range(G)]
    padded, mask = pad(rows, [[1] * len(p) for p in rows], side="left")
    how = dict(do_sample=True, temperature=0.7, top_k=0, top_p=1.0, eos_token_id=None)
    how |= dict(pad_token_id=0, max_new_tokens=new, min_new_tokens=new)
    ours = partial(prlm.generate, decoder, prompts, G, new, 0.7, seed=0)
    theirs = partial(model.generate, padded, attention_mask=mask, **how)
    floor = new * step_floor(decoder, prompted, P * G, new, flops, bandwidth)
    floor += 2 * inside * prompted / flops
    duel(f"sample {shape}: {P} x {G} x {new}", ours, theirs, runs, floor=floor)

    asked = prompts, completions, torch.randn(P, G)

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
    floor = 6 * (inside * (prompted + trained) + head * trained) / flops
    duel(f"update {shape}: {P} x {G} rows", *both, runs, floor=floor)


def bench_text() -> None:
    from rank_bm25 import BM25Okapi
    from rouge_score.rouge_scorer import RougeScorer

    rng, vocabulary = random.Random(0), [f"w{n}" for n in range(5000)]
    weights = [1 / (n + 1) for n in range(5000)]
    say = lambda n: " ".join(rng.choices(vocabulary, weights, k=n))  # noqa: E731
    users = [[say(60) for _ in range(300)] for _ in range(30)]

    def rank_all(scores_of, queries):
        for texts, query in zip(users, queries, strict=True):
            scores_of([t.split() for t in texts], query.split()).argsort()

    for length in (20, 150):
        queries = [say(length) for _ in users]
        both = (lambda t, q: BM25(t).scores(q), lambda t, q: BM25Okapi(t).get_scores(q))
        both = (partial(rank_all, one, queries) for one in both)
        duel(f"BM25, 300 items, {length} words in the query: users/s", *both, 5, 30)
    pairs = [(say(10), say(10)) for _ in range(2000)]
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score
    both = (lambda: [rouge(p, t) for p, t in pairs], lambda: [theirs(t, p) for p, t in pairs])
    duel("ROUGE-1, -2, -L of 10 words: pairs/s", *both, 5, 2000)


def trl_times(o: rl.Options, examples) -> list[float]:
    """When each step of TRL's trainer was over, on the same prompts and with the same reward."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=o.out, use_cpu=True, bf16=False, max_steps=o.steps, save_strategy="no",
        per_device_train_batch_size=o.prompts_per_step * o.group_size,
        num_generations=o.group_size, max_completion_length=o.max_new_tokens,
        temperature=o.temperature, learning_rate=o.lr, beta=0.0, loss_type="grpo",
        gradient_checkpointing=o.checkpointing, report_to=[], disable_tqdm=True, seed=o.seed,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    columns = trl_example.columns(o, prlm.load_tokenizer(o.model), examples)
    reward, data = trl_example.trl_reward(examples), Dataset.from_dict(columns)
    GRPOTrainer(o.model, reward, config, data, callbacks=[Clock()]).train()
    return times


def grpo_steps(trl: bool, threads: int, **how) -> tuple[float, float]:
    """Median seconds of a step after the first, and the process's highest memory in GiB."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        o = rl.Options(
            out=folder, device="cpu", precision="float32", steps=4, prompts_per_step=2,
            group_size=4, max_new_tokens=64, max_prompt_tokens=320, lr=1e-6, personalization=0.0,
            eval_every=0, **how,
        )  # fmt: skip
        examples = load_lamp(o.data, o.task, "train")
        if trl:
            each = [after - before for before, after in itertools.pairwise(trl_times(o, examples))]
        else:
            rl.train_policy(o, Path(folder), rl.make_policy(o), None, examples, [])
            lines = prlm.read_lines(Path(folder) / "metrics.jsonl")[1:]
            each = [line["seconds_rollout"] + line["seconds_update"] for line in lines]
    return statistics.median(each), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_trl(model: str, data: str, threads: int) -> None:
    row("\nwhole GRPO steps", "ours", "TRL", "TRL/ours")
    for checkpointing in (False, True):
        found, how = [], {"model": model, "data": data, "checkpointing": checkpointing}
        for trl in (False, True):  # a process each, which has a memory peak of its own
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found.append(pool.submit(grpo_steps, trl, threads, **how).result())
        for unit, ours, theirs in zip(("s", "GiB"), *found, strict=True):
            size = "2 x 4 x 64" + ", checkpointing" * checkpointing
            row(f"{size}: {unit}", ours, theirs, theirs / ours)


def main() -> None:
    data, layout = str(prlm.SHIPPED / "lamp"), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--large", action="store_true", help="also Qwen2.5-0.5B's shape")
    parser.add_argument("--trl", help="only whole GRPO steps of this model, beside TRL's")
    parser.add_argument("--data", default=data, help="LaMP's files, for --trl")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    if o.trl:
        return bench_trl(o.trl, o.data, o.threads)
    # The larger model's precision is what this CPU is faster in.
    dtype = max(torch.float32, torch.bfloat16, key=lambda kind: machine(kind)[0])
    print(f"torch {torch.__version__}, {o.threads} threads, {dtype}\n")
    row("", "ours", "peer", "peer/ours", "x floor")
    bench_shape("small", torch.float32, 5, 8, 8, 64)
    if o.large:
        bench_shape("0.5B", dtype, 1, 2, 4, 32)
    bench_text()


if __name__ == "__main__":
    main()
