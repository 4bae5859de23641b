"""Scores: ROUGE and BLEU, the answer in a completion, and a policy's score on held-out users.

ROUGE measures how many words of two texts match. It is that of LaMP's official evaluation, Google's
rouge_score without stemming: lowercased [a-z0-9]+ words, n-gram counts (a repeated word counts as
often as both sides have it), and F1, the harmonic mean of precision and recall:

  ROUGE-n = 2 p r / (p + r),  p, r = matches / n-grams of the prediction, the target
  ROUGE-L = the same with the longest common subsequence as the matches

The authors' release scores with rouge_chinese after jieba: sets of n-grams, punctuation as words.
Its numbers cannot be compared with these. BLEU is theirs: characters, 4-grams, NLTK's method 3.

    python eval.py --model toy/policy --data toy/lamp --task LaMP-4 --split dev --k 4
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass

import prlm
from prlm import Completion, Decoder, Progress, Tokenizer
from retrieve import (
    Example,
    PromptOptions,
    Split,
    assistant_start,
    encoder_of,
    lamp_files,
    load_examples,
    make_prompts,
    task_of,
)

# ---- Metrics of two texts -------------------------------------------------------------------

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu")


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def f1(matches: int, predicted: int, wanted: int) -> float:
    precision = matches / max(predicted, 1)
    recall = matches / max(wanted, 1)
    return 2 * precision * recall / (precision + recall) if matches else 0.0


def common(a: list, b: list, n: int) -> int:
    """How many n-grams of `a` and `b` match: each the smaller of its two counts."""
    ngrams = [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (a, b)]
    return (ngrams[0] & ngrams[1]).total()


def longest_common_subsequence(a: list, b: list) -> int:
    """The length of the longest common subsequence: L(len(a), len(b)), where L(i, 0) = L(0, j) = 0,

    L(i, j) = L(i-1, j-1) + 1 where the i-th of `a` equals the j-th of `b`,
              else max(L(i-1, j), L(i, j-1))

    From one column to the next, a row of the table grows by 1 or not at all. So one bit per column
    says it all, and a row is computed at once, by arithmetic on one integer (Hyyrö 2004): the
    reward scores every completion, and a loop over the columns takes 7 times as long.
    """
    columns: dict = {}  # token -> the columns with this token, one bit each
    for j, token in enumerate(b):
        columns[token] = columns.get(token, 0) | 1 << j
    all_columns = (1 << len(b)) - 1
    row = all_columns  # bit j is 0 where the row grows from column j to j + 1: nowhere yet
    for token in a:
        matches = row & columns.get(token, 0)
        # The carry of the sum moves each growth back to the first match since the growth before.
        row = ((row + matches) | (row - matches)) & all_columns
    return len(b) - row.bit_count()


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1, as rouge_score computes them without stemming; an empty side gives 0.

    >>> rouge("a b c", "a b d")
    {'rouge-1': 0.6666666666666666, 'rouge-2': 0.5, 'rouge-l': 0.6666666666666666}
    """
    a, b = words(prediction), words(reference)
    return {
        "rouge-1": f1(common(a, b, 1), len(a), len(b)),
        "rouge-2": f1(common(a, b, 2), len(a) - 1, len(b) - 1),
        "rouge-l": f1(longest_common_subsequence(a, b), len(a), len(b)),
    }


def bleu(prediction: str, reference: str) -> float:
    """BLEU-4 over lowercased characters: the geometric mean of the n-gram precisions p_1 .. p_4,
    times exp(1 - r / c) if the prediction's length c is below the reference's length r.

    NLTK's smoothing method 3: the k-th order without a match counts as having 1 / 2^k matches.

    >>> bleu("a", "b"), bleu("abcd", "abcd")
    (0.0, 1.0)
    """
    a, b = list(prediction.lower()), list(reference.lower())
    logs = []  # of p_1 .. p_4
    misses = 0
    for n in range(1, 5):
        matches = common(a, b, n)
        if not matches:
            if n == 1:
                return 0.0
            misses += 1
        logs.append(math.log((matches or 0.5**misses) / max(len(a) - n + 1, 1)))
    brevity = min(0.0, 1 - len(b) / len(a))
    return math.exp(brevity + math.fsum(logs) / 4)


# ---- The answer in a completion ------------------------------------------------------------------

SINGLE = "'‘’"  # quotation marks, straight and typographic
DOUBLE = '"“”'
# \u escapes in a row are read as one: two may be one character (a surrogate pair).
ESCAPE = re.compile(r"""(?:\\u[0-9a-fA-F]{4})+|\\['"\\]""")


def extract_answer(completion: str, task: str) -> str:
    """The value of 'title', 'tweet' or whatever the task asks for; "" where there is none.
    ValueError if there is no such task.

    1. Only what follows the last </think> counts, and nothing if there is a <think> in it:
       reasoning that never closes has no answer, whatever it quotes.
    2. Of that only what comes before the first </answer>, if there is one, and of that only what
       follows the last <answer>, if there is one. Even there, text without a key is no answer.
    3. A key is the task's word, in capitals or not, and a colon, with any blanks, line breaks and
       asterisks (Markdown's) before and after the colon. There are three forms, best first:
       - the word between two quotation marks of any sort;
       - the word after nothing on its line but spaces, tabs and any of { # > * -
       - the word anywhere else in a line, but not right after a letter, a digit, _ or -. Here the
         colon and the value have to be on the same line: "I call it the title: Deep Nets".
    4. `read_value` reads the value that follows. All keys of one form are found from left to right,
       none of them within the value of another. Then each key with its value is replaced by a line
       break, and the next form is looked for in what is left.
    5. The answer is the first value found that is neither empty nor the placeholder. If there is
       none, it is the first placeholder.

    >>> extract_answer("<think>\\nhm\\n</think>\\n{'title': 'It's a start'}", "LaMP-4")
    "It's a start"
    """
    word = re.escape(task_of(task).answer)
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:
        return ""
    text = text.partition("</answer>")[0].rpartition("<answer>")[2]
    forms = (
        rf"[{SINGLE}{DOUBLE}]{word}[{SINGLE}{DOUBLE}][\s*]*:[\s*]*",
        rf"^[ \t{{#>*-]*{word}[\s*]*:[\s*]*",
        rf"(?<![\w-]){word}[ \t*]*:[ \t*]*(?=\S)",
    )
    values = []
    for form in forms:
        key = re.compile(form, re.IGNORECASE | re.MULTILINE)
        rest = []  # the text without keys and values
        start = 0
        while found := key.search(text, start):
            value, end = read_value(text, found.end())
            values.append(value)
            rest.append(text[start : found.start()])
            start = end
        text = "\n".join([*rest, text[start:]])
    values = [value for value in values if value]
    real = [value for value in values if not is_placeholder(value, task)]
    return (real or values or [""])[0]


def read_value(text: str, start: int) -> tuple[str, int]:
    r"""(the value that begins at `start`, the index at which it ends): never more than a line.

    - A value that begins with a quotation mark ends at the first mark of the same sort, single or
      double, that is followed by the end of the line, by a closing brace, or by a comma and another
      quoted key. Before the first two, asterisks and . , ; and then blanks may stand. So a value
      may hold quotes and apostrophes. A mark that a backslash escapes ends nothing.
    - Any other value ends at the line's end or a closing brace, and loses the asterisks around it.
      If it begins with a mark that nothing ends, it loses that mark.
    - \' \" \\ and \u00e9 are read as in JSON; other backslashes stay (titles hold formulas).
    - An object or a fenced block is no value: "", of no length.
    """
    if text.startswith(("{", "```"), start):
        return "", start
    # Apostrophes and inner quotes are not followed by any of these.
    after = rf"[*.,;]*[^\S\n]*(?:\n|\}}|\Z)|,\s*[{SINGLE}{DOUBLE}][\w -]+[{SINGLE}{DOUBLE}]\s*:"
    for marks in (SINGLE, DOUBLE):
        quoted = re.compile(rf"[{marks}]((?:\\.|[^\\\n])*?)[{marks}](?={after})")
        if found := quoted.match(text, start):
            value = found[1]
            break
    else:
        found = re.compile(rf"[{SINGLE}{DOUBLE}]?([^\n}}]*)").match(text, start)
        value = found[1].strip("* \t")

    def plain(escape: re.Match) -> str:
        return json.loads(f'"{escape[0]}"') if escape[0][1] == "u" else escape[0][1:]

    return ESCAPE.sub(plain, value).strip(), found.end()


def is_placeholder(answer: str, task: str) -> bool:
    """Whether the answer is empty or still holds the prompt's "generated title": worth nothing."""
    return not answer.strip() or task_of(task).placeholder in answer.lower()


# ---- A policy on a data set ----------------------------------------------------------------------


@dataclass
class EvalOptions(PromptOptions):
    presets = {"paper": {"max_new_tokens": 768}}  # noqa: RUF012
    free = PromptOptions.free | {"batch_size"}
    bounds = {1: "max_new_tokens batch_size"}  # noqa: RUF012
    max_new_tokens: int = 128  # longest completion
    batch_size: int = 64  # completions generated together; a rollout of RL is always one batch


def sample_groups(
    o: EvalOptions, decoder: Decoder, tokenizer: Tokenizer, prompts: list[list[int]],
    group_size: int = 1, temperature: float = 0.0, description: str = "generate",
) -> list[list[Completion]]:  # fmt: skip
    """Completions [P][G]. Prompts of similar length share a batch, which leaves little padding.

    Several processes share the batches, and each gets all the completions.
    """
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    size = max(1, o.batch_size // group_size)
    rank, world_size = prlm.rank_and_world_size()
    groups: dict[int, list[Completion]] = {}  # by the prompt's index
    starts = range(0, len(order), size)[rank::world_size]
    for start in Progress(starts, description):
        batch = order[start : start + size]
        found = prlm.generate(
            decoder,
            [prompts[n] for n in batch],
            group_size=group_size,
            max_new_tokens=o.max_new_tokens,
            temperature=temperature,
            eos_ids=tokenizer.eos_ids,
            seed=o.seed + start,  # new noise in every batch
        )
        groups |= zip(batch, found, strict=True)
    for share in prlm.gather(groups):
        groups |= share
    return [groups[n] for n in range(len(prompts))]


def complete(
    o: EvalOptions, decoder: Decoder, tokenizer: Tokenizer, prompts: list[list[int]],
    group_size: int = 1, temperature: float = 0.0, description: str = "generate",
) -> list[list[str]]:  # fmt: skip
    """`sample_groups` as texts [P][G], with what the prompt has already said for the assistant."""
    groups = sample_groups(o, decoder, tokenizer, prompts, group_size, temperature, description)
    opened = assistant_start(o, tokenizer)
    return [[opened + tokenizer.decode(c.tokens) for c in group] for group in groups]


def score(answer: str, target: str) -> dict[str, float]:
    """Every metric of METRICS for one answer."""
    return {**rouge(answer, target), "bleu": bleu(answer, target)}


def sample_records(
    decoder: Decoder, tokenizer: Tokenizer, examples: list[Example],
    options: EvalOptions | None = None, temperature: float = 0.0, description: str = "evaluate",
) -> list[dict]:  # fmt: skip
    """What the policy was asked and what it answered: a JSON-ready dictionary for each example.

    Keys: id, query, target, prompt and completion (text), answer, finished, tokens (the
    completion's ids), logprobs (of these tokens), and every metric if there is a target.
    """
    o = options or EvalOptions()
    prompts = make_prompts(o, tokenizer, examples)
    groups = sample_groups(
        o, decoder, tokenizer, prompts, temperature=temperature, description=description
    )
    records = []
    for example, prompt, (completion,) in zip(examples, prompts, groups, strict=True):
        text = assistant_start(o, tokenizer) + tokenizer.decode(completion.tokens)
        record = {
            "id": example.id,
            "query": example.query,
            "target": example.target,
            "prompt": tokenizer.decode(prompt),
            "completion": text,
            "answer": extract_answer(text, example.task),
            "finished": completion.finished,
            "tokens": completion.tokens,
            "logprobs": [round(logprob, 4) for logprob in completion.logprobs],
        }
        if example.target is not None:
            record |= score(record["answer"], example.target)
        records.append(record)
    return records


def mean_scores(records: list[dict]) -> dict[str, float]:
    """The mean of each metric over sample records; {} without records, or if one has no target.

    LaMP withholds the targets of its test split.
    """
    if not records or any(record["target"] is None for record in records):
        return {}
    return {name: sum(r[name] / len(records) for r in records) for name in METRICS}


def evaluate(
    decoder: Decoder, tokenizer: Tokenizer, examples: list[Example],
    options: EvalOptions | None = None, temperature: float = 0.0,
) -> tuple[dict[str, float], dict[str, str]]:  # fmt: skip
    """(mean scores, answers by record id), greedy unless a temperature is given.

    The scores are {} where targets are withheld.
    """
    records = sample_records(decoder, tokenizer, examples, options, temperature)
    return mean_scores(records), {record["id"]: record["answer"] for record in records}


def why_empty(record: dict, task: str) -> str:
    """Why a sample record's answer is worth nothing; "" if it is worth something."""
    if not is_placeholder(record["answer"], task):
        return ""
    if record["answer"]:
        return "the placeholder repeated"
    if not record["finished"]:
        return "never finished"
    if "<think>" in record["completion"].rpartition("</think>")[2]:
        return "reasoning not closed"
    return f"no '{task_of(task).answer}' found"


def summary(records: list[dict], task: str) -> str:
    """How many answers are worth nothing, and why; and how many others were cut off. One line.

    >>> summary([{"answer": "", "finished": False, "completion": "<think>"}], "LaMP-4")
    '1 of 1 answers is empty or the placeholder: 1 never finished'
    """
    why = [why_empty(record, task) for record in records]
    reasons = Counter(filter(None, why))
    count = reasons.total()
    details = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    what = f" or the placeholder: {details}" if count else ""
    others = [record for record, reason in zip(records, why, strict=True) if not reason]
    cut_off = sum(not record["finished"] for record in others)
    cut = f"; {cut_off} cut off at --max-new-tokens" if cut_off else ""
    return f"{count} of {len(records)} answers {'is' if count == 1 else 'are'} empty{what}{cut}"


def write_predictions(path, task: str, answers: dict[str, str]) -> None:
    """The answers in LaMP's submission format, which its evaluation script reads."""
    golds = [{"id": id, "output": answer} for id, answer in answers.items()]
    prlm.write_json(path, {"task": task.replace("-", "_"), "golds": golds})


def table(rows: dict[str, dict[str, float]]) -> str:
    """Named score dictionaries as aligned text, a column for each key."""
    columns = list(dict.fromkeys(key for scores in rows.values() for key in scores))
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{column:>17}" for column in columns)]
    for name, scores in rows.items():
        cells = (f"{scores[c]:.3f}" if c in scores else "" for c in columns)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


@dataclass
class Options(EvalOptions):
    bounds = {0: "temperature limit"}  # noqa: RUF012
    split: Split = "dev"  # which of LaMP's files
    temperature: float = 0.0  # 0 is greedy
    limit: int = 0  # only the first records; 0 takes all
    out: str = "runs/eval"  # directory for predictions.json, samples.jsonl and scores.json
    overwrite: bool = False  # start anew where the directory holds another evaluation


def main(o: Options) -> None:
    examples = load_examples(o, o.split, o.limit)
    decoder, tokenizer = prlm.load_policy(o)
    inputs = {"model": [o.model], "data": lamp_files(o.data, o.task, o.split)}
    if o.retriever == "dense":
        inputs["encoder"] = [encoder_of(o)]
    with prlm.alone(o.out):
        out = prlm.open_result(o, inputs)
        records = sample_records(decoder, tokenizer, examples, o, o.temperature)
        scores = mean_scores(records)
        answers = {record["id"]: record["answer"] for record in records}
        write_predictions(out / "predictions.json", o.task, answers)
        prlm.write_lines(out / "samples.jsonl", records)
        if scores:
            prlm.write_json(out / "scores.json", scores)
            print(table({f"{o.task} {o.split}, {len(answers)} records": scores}))
        print(f"{out}/predictions.json and samples.jsonl: {summary(records, o.task)}")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
