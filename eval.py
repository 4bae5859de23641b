"""Scores: ROUGE and BLEU, the answer in a completion, and a policy's score on held-out data.

ROUGE is that of LaMP's evaluation, Google's rouge_score without stemming: it counts the n-grams of
lowercased [a-z0-9]+ words that two texts share, a repeated one as often as both have it.

  ROUGE-n = 2 p r / (p + r),  p, r = matches / n-grams of the prediction, the target
  ROUGE-L = the same with the longest common subsequence as the matches

A text in another script scores 0. The authors' numbers, by rouge_chinese, cannot be compared with
these; BLEU is theirs, with NLTK's smoothing method 3.

    python eval.py --run runs/toy  # a run's checkpoint, under the run's options"""

import dataclasses
import math
import random
import re
import shutil
from collections import ChainMap, Counter
from pathlib import Path

import prlm
from prlm import option
from retrieve import CLOSED, PromptOptions, Split, load_examples, make_prompts, task_of

# ---- The paper's evaluation: metrics of two texts ----
METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu")


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def f1(matches: int, predicted: int, wanted: int) -> float:
    precision, recall = matches / max(predicted, 1), matches / max(wanted, 1)
    return 2 * precision * recall / (precision + recall) if matches else 0.0


def common(a: list, b: list, n: int) -> int:
    """How many n-grams both have, a repeated one as often as the text with fewer of it."""
    ngrams = [Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (a, b)]
    return (ngrams[0] & ngrams[1]).total()


def longest_common_subsequence(a: list, b: list) -> int:
    """Its length, L(len(a), len(b)): where a's i-th token is b's j-th, L(i, j) = L(i-1, j-1) + 1,
    elsewhere max(L(i-1, j), L(i, j-1)), and L(i, 0) = L(0, j) = 0."""
    row = [0] * (len(b) + 1)  # L(i, 0) .. L(i, len(b)), so far for i = 0
    for token in a:
        above, row = row, [0]
        for j, other in enumerate(b, 1):
            row.append(above[j - 1] + 1 if token == other else max(above[j], row[-1]))
    return row[-1]


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """F1 of ROUGE-1, -2 and -L; 0 where a side is empty.
    >>> rouge("a b c", "a b d")
    {'rouge-1': 0.6666666666666666, 'rouge-2': 0.5, 'rouge-l': 0.6666666666666666}"""
    a, b = words(prediction), words(reference)
    return {
        "rouge-1": f1(common(a, b, 1), len(a), len(b)),
        "rouge-2": f1(common(a, b, 2), len(a) - 1, len(b) - 1),
        "rouge-l": f1(longest_common_subsequence(a, b), len(a), len(b)),
    }


def bleu(prediction: str, reference: str) -> float:
    """BLEU-4 over lowercased characters: the geometric mean of the n-gram precisions p_1 .. p_4,
    times exp(1 - r / c) if the prediction's length c is below the reference's, r. By the smoothing
    the k-th order without a match counts as having 1 / 2^k matches."""
    a, b = list(prediction.lower()), list(reference.lower())
    found = [common(a, b, n) for n in (1, 2, 3, 4)]
    if not found[0]:
        return 0.0
    smooth = [matches or 0.5 ** found[: n + 1].count(0) for n, matches in enumerate(found)]
    logs = [math.log(matches / max(len(a) - n, 1)) for n, matches in enumerate(smooth)]
    return math.exp(min(0.0, 1 - len(b) / len(a)) + math.fsum(logs) / 4)


# ---- The answer in a completion: what this parser cannot read earns no accuracy ----
ANY = "['‘’\"“”]"


def extract_answer(completion: str, task: str) -> str:
    """The value of 'title' or what else the task asks for; "" if none. ValueError: unknown task.
    1. Only what follows the last </think> counts, and nothing if that has a <think>; of it, what
       stands between the first </answer> and the last <answer> before it, if any.
    2. A key is the task's word and a colon. The word is in quotation marks of any sort, or begins
       its line, after blanks and Markdown's marks.
    3. A value in quotation marks ends at the first mark of the same sort, single or double, before
       the end of its line, a closing brace, or a comma and another key: so it may hold quotes and
       apostrophes. Any other value ends with its line, or at a closing brace.
    4. The answer is the first value that is neither empty nor the placeholder; else the latter.
    >>> extract_answer("<think>\\nhm\\n</think>\\n{'title': 'It's a start'}", "LaMP-4")
    "It's a start"
    """
    word = re.escape(task_of(task).answer)
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:
        return ""
    text = text.partition("</answer>")[0].rpartition("<answer>")[2]
    key = re.compile(rf"(?:{ANY}{word}{ANY}|^[ \t{{#>*-]*{word})[\s*]*:[\s*]*", re.I | re.M)
    values, start = [], 0
    while found := key.search(text, start):
        value, start = read_value(text, found.end())
        values.append(value)
    real = [value for value in values if not is_placeholder(value, task)]
    return next(filter(None, real + values), "")


def read_value(text: str, start: int) -> tuple[str, int]:
    r"""(the value that begins at `start`, where it ends), by rule 3; \' and \" are read as ' and ".
    An object or a fenced block is no value: "", of no length."""
    if text.startswith(("{", "```"), start):
        return "", start
    escaped = r"\\(['\"\\])"
    after = rf"[*.,;]*[^\S\n]*(?:\n|\}}|\Z)|,\s*{ANY}[\w -]+{ANY}\s*:"
    for sort in ("['‘’]", '["“”]'):
        if found := re.compile(rf"{sort}((?:\\.|[^\\\n])*?){sort}(?={after})").match(text, start):
            return re.sub(escaped, r"\1", found[1]).strip(), found.end()
    found = re.compile(rf"{ANY}?([^\n}}]*)").match(text, start)
    return re.sub(escaped, r"\1", found[1].strip("* \t")).strip(), found.end()


def is_placeholder(answer: str, task: str) -> bool:  # or empty
    return not answer.strip() or f"generated {task_of(task).answer}" in answer.lower()


# ---- A policy on a data set ----
def seed_of(*parts) -> int:  # one for each purpose: no shared noise
    return random.Random(repr(parts)).getrandbits(63)


def make_records(
    o: PromptOptions, decoder, tokenizer, examples, prompts: list[list[int]],
    group_size: int, temperature: float, purpose=("evaluate",), batch: int = 64,
) -> list[dict]:  # fmt: skip
    """What the policy is asked and says, for each of P G completions: id, query, target, prompt
    and completion (text), answer, tokens (ids), logprobs, finished. `batch` are sampled
    at once, in order of their prompts' lengths; `purpose` and place seed the noise."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    starts = range(0, len(order), max(1, batch // group_size))
    how = (group_size, o.max_new_tokens, temperature, tokenizer.eos_ids)
    groups = {}  # completions, by the prompt's index
    for start in prlm.progress(prlm.my_share(starts), purpose[0], delay=1):
        chosen = order[start : start + starts.step]
        asked, seed = [prompts[n] for n in chosen], seed_of(o.seed, *purpose, start)
        groups |= zip(chosen, prlm.generate(decoder, asked, *how, seed))
    groups = ChainMap(*prlm.gather(groups))
    begun, records = tokenizer.opening if o.reasoning else CLOSED, []
    for n, (e, prompt) in enumerate(zip(examples, prompts)):
        asked = dict(id=e.id, query=e.query, target=e.target, prompt=tokenizer.decode(prompt))
        for completion in groups[n]:
            text = begun + tokenizer.decode(completion.tokens)
            said = {"completion": text, "answer": extract_answer(text, e.task)}
            rounded = {"logprobs": [round(x, 6) for x in completion.logprobs]}
            records.append(asked | said | vars(completion) | rounded)
    return records


def answer_all(o: PromptOptions, decoder, tokenizer, examples, temperature=0.0) -> list[dict]:
    """`make_records` of one completion for each example, with every metric if it has a target."""
    prompts = make_prompts(o, tokenizer, examples)
    records = make_records(o, decoder, tokenizer, examples, prompts, 1, temperature)
    for record in records:
        if record["target"] is not None:
            texts = record["answer"], record["target"]
            record |= rouge(*texts) | {"bleu": bleu(*texts)}
    return records


def mean_scores(records: list[dict]) -> dict[str, float]:
    """The mean of each metric; {} without records, or where targets are withheld."""
    scored = records and all(record["target"] is not None for record in records)
    return {name: sum(r[name] / len(records) for r in records) for name in METRICS if scored}


def evaluate(decoder, tokenizer, examples, options=None, temperature=0.0) -> tuple[dict, dict]:
    """(mean scores, answers by record id), greedy by default."""
    records = answer_all(options or PromptOptions(), decoder, tokenizer, examples, temperature)
    return mean_scores(records), {record["id"]: record["answer"] for record in records}


# ==== Below: not the method ====
# May change on --resume: length, place, what costs time or memory.
FREE = {"steps", "device", "save_every", "eval_every", "tokens_per_micro_batch", "checkpointing"}
FREE |= {"out", "resume", "overwrite", "force", "preset"}


def run_directory(o, record="config.json") -> Path:
    """o.out, its options in `record`. ValueError unless it is new, or a run that --resume continues
    (all options but FREE ones agree), or a result that --overwrite deletes."""
    out, mine = Path(o.out), dataclasses.asdict(o)
    held = prlm.read_json(out / record) if (out / record).is_file() else {}
    if held.keys() == mine.keys() and mine.get("resume"):
        wrong = [name for name in mine if name not in FREE and mine[name] != held[name]]
        if wrong := wrong or ["steps"] * (o.steps < held["steps"]):
            words = ", ".join(f"--{name.replace('_', '-')} {held[name]}" for name in wrong)
            raise ValueError(f"{out} was made with {words}: resume it so, or take another --out")
    elif out.is_dir() and any(path.suffix != ".tmp" for path in out.iterdir()):
        if held.keys() != mine.keys():
            raise ValueError(f"{out} is not empty, and no result of this: take another --out")
        if not o.overwrite:
            ways = "--resume goes on with it, " * ("resume" in mine) + "--overwrite deletes it"
            raise ValueError(f"{out} holds a result already: {ways}")
        for name in {"model", "data", "encoder", "reward_model"} & mine.keys():
            if mine[name] and Path(mine[name]).resolve().is_relative_to(out.resolve()):
                raise ValueError(f"--overwrite would delete the {name} that it needs, {mine[name]}")
        for path in sorted(out.iterdir(), key=lambda path: path.name == record):  # that last
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    prlm.write_json(out / record, mine)
    return out


def write_predictions(path, task: str, records: list[dict]):  # for LaMP's own script
    golds = [{"id": record["id"], "output": record["answer"]} for record in records]
    prlm.write_json(path, {"task": task.replace("-", "_"), "golds": golds})


def line(name: str, scores: dict[str, float]) -> str:
    return f"{name:<11} " + "  ".join(f"{m} {scores[m]:.3f}" for m in METRICS)


def shares(records: list[dict], task: str) -> str:
    empty = sum(is_placeholder(record["answer"], task) for record in records) / len(records)
    cut = sum(not record["finished"] for record in records) / len(records)
    return f"{1 - empty:.0%} answered, {cut:.0%} truncated"


@dataclasses.dataclass
class Options(PromptOptions):
    run: str | None = option(None, "run directory of rl.py: its checkpoint, its options")
    split: Split = option("dev", "which of LaMP's files")
    temperature: float = option(0.0, "0 is greedy", 0)
    out: str = option("runs/eval", "directory of answers and scores")
    overwrite: bool = option(False, "delete the result that is there")


def main(o: Options):
    examples = load_examples(o, o.split)
    decoder, tokenizer = prlm.load_policy(o)
    out = run_directory(o)
    records = answer_all(o, decoder, tokenizer, examples, o.temperature)
    write_predictions(out / "predictions.json", o.task, records)
    prlm.append(out / "samples.jsonl", records)
    if scores := mean_scores(records):
        prlm.write_json(out / "scores.json", scores)
        print(line(f"{o.task} {o.split}", scores))
    print(f"{out}: {len(records)} records, {shares(records, o.task)}")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
