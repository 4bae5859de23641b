"""LaMP records, retrieval from a user's own profile, and the personalized prompt.

A LaMP record asks for one text (a headline, a tweet) and brings the user's profile: what the same
user wrote before. Retrieval ranks it by the query; the best k items stand before the question. A
prompt of the toy with k = 2, shortened at … (SYSTEM is its first part):

    <|im_start|>system
    You infer the user's preferences from the historical records … Reply in exactly this form:
    <think> … </think> <answer> … </answer><|im_end|>
    <|im_start|>user
    'text': 'on (thursday) [ledger], honey …' 'title': 'on honey lessons from last year read on'
    'text': 'on (saturday) [ledger], deserts …' 'title': 'on deserts lessons from last year read on'
    Based on the historical profiles provided, generate a title for the given text from the user.
    Answer in English as {'title': 'generated title'}, without any explanation.
    'text': 'crystals with singer in cairo on (saturday)' 'title':<|im_end|>
    <|im_start|>assistant

`build_messages` joins the parts, `make_prompts` makes ids of them. Parts and order are the paper's,
the wording is ours. BM25 is Okapi's, as in rank_bm25 and in the authors' code:

  score(d) = sum over query words w of  idf(w) f(w,d) (k1 + 1) / (f(w,d) + k1 (1 - b + b |d|/mean))
  idf(w)   = ln(N - n(w) + 0.5) - ln(n(w) + 0.5), a negative one replaced by 0.25 x the mean idf

f(w,d) counts w in d, n(w) of the N documents hold w, d has |d| words, `mean` is of all |d|.

    python retrieve.py --task LaMP-4 --k 4"""

import random
import re
from bisect import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

import prlm
from prlm import SHIPPED, Encoder, ModelOptions, Ragged, Tokenizer, option


# ---- Tasks and records ----
@dataclass(frozen=True)
class Task:
    prefix: str  # LaMP's words that begin each input; not part of the query
    fields: dict[str, str]  # a profile item's keys in their order -> the names shown
    request: str  # behind WITH_PROFILE, if there is one
    penalty: float = 0.0  # personalization reward of an answer that is empty or the placeholder

    @property
    def answer(self) -> str:  # the name of what is asked for
        return [*self.fields.values()][-1]


TASKS = {
    "LaMP-4": Task(
        "Generate a headline for the following article: ",
        {"text": "text", "title": "title"},
        "generate a title for the given text from the user.",
        penalty=-10.0,  # the authors': a learned reward likes such answers, and RL finds them
    ),
    "LaMP-5": Task(
        "Generate a title for the following abstract of a paper: ",
        {"abstract": "abstract", "title": "title"},
        "generate a title for the given abstract from the user.",
    ),
    "LaMP-7": Task(
        "Paraphrase the following tweet without any explanation before or after it: ",
        {"text": "tweet"},
        "paraphrase the user's input tweet in the style of the user's historical tweets.",
    ),
    "commits": Task(  # any git repository: toy/commits.py writes the files
        "Generate a subject line for the following commit message: ",
        {"body": "body", "subject": "subject"},
        "generate a subject for the given commit body from the user.",
    ),
}
TaskName = Literal[tuple(TASKS)]
Split = Literal["train", "dev", "test"]
Retriever = Literal["none", "random", "recency", "bm25", "lucene", "dense"]


def task_of(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task {name!r} is none of {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Example:  # one LaMP record
    id: str
    user_id: str
    task: str
    query: str
    profile: list[dict]  # the file's own dictionaries
    target: str | None  # None: withheld


# ---- The paper's retrieval ----
class BM25:
    """BM25 over tokenised documents; each profile gets an index of its own."""

    def __init__(self, corpus: list[list[str]], k1=1.5, b=0.75, idf: str = "okapi"):
        """Makes what `scores` reads: k1; counts, word -> {document: f(w, d)}; idf, word -> weight;
        and norm [N], k1 (1 - b + b |d|/mean) of each document. `idf` "okapi" is the formula above,
        "lucene" ln(1 + (N - n + 0.5) / (n + 0.5)). The mean idf is over all words, negative ones
        included; a mean length of 0 counts as 1. ValueError for another idf."""
        if idf not in ("okapi", "lucene"):
            raise ValueError(f"idf {idf!r} is neither okapi nor lucene")
        self.k1, self.counts = k1, defaultdict(dict)
        for number, text in enumerate(corpus):
            for word, count in Counter(text).items():
                self.counts[word][number] = count
        held = np.array([len(found) for found in self.counts.values()])  # n(w)
        if idf == "okapi":
            weights = np.log(len(corpus) - held + 0.5) - np.log(held + 0.5)
            weights[weights < 0] = 0.25 * (sum(weights.tolist()) / max(len(held), 1))
        else:
            weights = np.log1p((len(corpus) - held + 0.5) / (held + 0.5))
        self.idf = dict(zip(self.counts, weights))
        lengths = np.array([len(text) for text in corpus])
        self.norm = k1 * (1 - b + b * lengths / (lengths.mean() if lengths.any() else 1.0))

    def scores(self, query: list[str]) -> np.ndarray:
        """The documents' scores [N]: a repeated query word counts each time, an unknown one 0."""
        scores = np.zeros(len(self.norm))
        for word in query:
            if found := self.counts.get(word):
                where, count = np.array([*found]), np.array([*found.values()])
                weight = count * (self.k1 + 1) / (count + self.norm[where])
                scores[where] += self.idf[word] * weight
        return scores


def show(item: dict, task: str) -> str:
    """A profile item, for retrieval and in the prompt: 'text': 'We are.' 'title': 'Open'"""
    return " ".join(f"'{name}': '{item[key].strip()}'" for key, name in TASKS[task].fields.items())


def retrieve(example: Example, k: int, retriever="bm25", seed=0, encoder=None) -> list[dict]:
    """The best k of the profile's own dictionaries, best first; ties keep the profile's order. bm25
    and lucene (its idf) split the items' texts (`show`) at whitespace, case kept; dense ranks the
    same texts; recency: the latest date (year, month, ..) first; random depends on seed and record.
    ValueError: k below 0, unknown retriever, dense without `encoder`, a record with no date."""
    profile, known = example.profile, get_args(Retriever)
    if k < 0 or retriever not in known:
        raise ValueError(f"k {k} is below 0, or {retriever!r} is none of {', '.join(known)}")
    if k == 0 or not profile or retriever == "none":
        return []
    if retriever == "random":
        return random.Random(repr((seed, example.id))).sample(profile, min(k, len(profile)))
    texts = (show(item, example.task) for item in profile)
    if retriever == "recency":
        keys = [[*map(int, re.findall(r"\d+", str(item.get("date"))))] for item in profile]
        if not all(date and 999 < date[0] < 10000 for date in keys):
            raise ValueError(f"record {example.id!r}: recency needs dates like 2016-03-14")
    elif retriever == "dense":
        if encoder is None or encoder.tokenizer is None:
            raise ValueError("dense needs --encoder DIRECTORY, with a tokenizer.json")
        keys = embed(encoder, tuple(texts)) @ embed(encoder, (example.query.strip(),))[0]
    else:
        idf = "okapi" if retriever == "bm25" else "lucene"
        keys = BM25([text.split() for text in texts], idf=idf).scores(example.query.split())
    order = sorted(range(len(profile)), key=lambda n: keys[n], reverse=True)
    return [profile[n] for n in order[:k]]


# ---- The paper's prompt ----
SYSTEM = (
    "You infer the user's preferences from the historical records and the query. First reason "
    "step by step as an inner monologue, then answer. Reply in exactly this form:\n"
    "<think>\nyour reasoning\n</think>\n<answer>\nyour answer\n</answer>"
)
CLOSED = "<think>\n\n</think>\n\n"  # no reasoning: answer at once
WITH_PROFILE = "Based on the historical profiles provided, "
ANSWER_FORMAT = "Answer in English as {{'{0}': 'generated {0}'}}, without any explanation."


def instruction(task: str, personal: bool) -> str:  # `personal`: it follows profile items
    request = WITH_PROFILE * personal + TASKS[task].request
    return f"{request[0].upper()}{request[1:]} {ANSWER_FORMAT.format(TASKS[task].answer)}"


def question(task: str, query: str) -> str:  # an item up to its answer: 'text': '…' 'title':
    first, *rest = TASKS[task].fields.values()
    return f"'{first}': '{query.strip()}'" + "".join(f" '{name}':" for name in rest)


def build_messages(example: Example, items: list[dict], tokenizer=None, max_prompt_tokens=None):
    """SYSTEM, then one user message of lines: `show` of each item, `instruction`, `question`. With
    a tokenizer, `tokenizer.chat` of both has at most `max_prompt_tokens` ids: all items have F
    fields together; each is cut to n tokens, the query to F n (n if F = 0). n is the largest that
    fits; where 1 is too much, the last items go. ValueError if the bare instruction is too long."""
    task, fields = example.task, TASKS[example.task].fields

    def messages(most: int | None, items):
        def cut(text: str, F: int = 1) -> str:
            return text.strip() if most is None else tokenizer.cut(text.strip(), F * most)

        lines = [show({key: cut(item[key]) for key in fields}, task) for item in items]
        query = cut(example.query, len(items) * len(fields) or 1)
        lines += [instruction(task, bool(items)), question(task, query)]
        user = {"role": "user", "content": "\n".join(lines)}
        return [{"role": "system", "content": SYSTEM}, user]

    def fits(most, items) -> bool:
        return len(tokenizer.chat(messages(most, items))) <= max_prompt_tokens

    if tokenizer is None or max_prompt_tokens is None or fits(None, items):
        return messages(None, items)
    if not fits(0, []):
        raise ValueError(f"the bare instruction is over --max-prompt-tokens {max_prompt_tokens}")
    # bisect counts what fits: first items, then tokens of a field.
    counts = range(1, len(items) + 1), range(1, max_prompt_tokens + 1)
    items = items[: bisect(counts[0], False, key=lambda n: not fits(1, items[:n]))]
    return messages(bisect(counts[1], False, key=lambda n: not fits(n, items)), items)


def make_prompts(o: "PromptOptions", tokenizer: Tokenizer, examples) -> list[list[int]]:
    """Ids of `build_messages` by `Tokenizer.chat`; without reasoning CLOSED is appended."""
    said, prompts = "" if o.reasoning else CLOSED, []
    budget = o.max_prompt_tokens - len(tokenizer.fill(said))
    for example in prlm.progress(examples, "prompts", delay=1):
        messages = build_messages(example, best_items(o, example), tokenizer, budget)
        prompts.append(tokenizer.chat(messages, said))
    return prompts


load_once = cache(prlm.load_encoder)


def best_items(o: "PromptOptions", example: Example) -> list[dict]:
    wanted = o.retriever == "dense" and o.encoder
    encoder = load_once(o.encoder, prlm.device_and_dtype(o)[0]) if wanted else None
    return retrieve(example, o.k, o.retriever, o.seed, encoder)


def answer_block(task: str) -> str:  # what SYSTEM asks for, with {} for the answer
    return f"<answer>\n{{'{task_of(task).answer}': '{{}}'}}\n</answer>"


def one_line(answer: str) -> str:  # since `extract_answer` reads one
    return re.sub(r"\s*\n\s*", " ", answer.strip())


# ==== Below: not the method ====
def load_lamp(directory, task: str, split: str) -> list[Example]:
    """The records of a split in file order, outputs joined by id. The files are in `directory` or
    its LaMP_4 (the authors' LaMP_4_time), or there in a folder of the split's name. Only "test" may
    lack outputs. ValueError names file and record."""
    prefix, folder = task_of(task).prefix, task.replace("-", "_")
    places = [Path(directory, a, b) for a in ("", folder, f"{folder}_time") for b in (split, "")]
    files = [place / f"{split}_questions.json" for place in places]
    path = next(filter(Path.is_file, files), files[3])
    examples, outputs = [], path.with_name(f"{split}_outputs.json")
    for n, record in enumerate(prlm.read_json(path, list)):
        with prlm.faults_in(f"{path}: record {n}"):
            for item in record["profile"]:
                show(item, task)  # an error if it lacks a field
            id, query = record["id"], record["input"].removeprefix(prefix)
            user = id if record.get("user_id") is None else record["user_id"]
            examples.append(Example(str(id), str(user), task, query, record["profile"], None))
    if split == "test" and not outputs.is_file():
        return examples
    with prlm.faults_in(outputs):
        content = prlm.read_json(outputs)
        if content.get("task", task) not in (task, folder):
            raise ValueError(f"it holds {content['task']}, not {task}")
        golds = [(str(gold["id"]), gold["output"] + "") for gold in content["golds"]]  # only a str
    asked, given = Counter(e.id for e in examples), Counter(id for id, _ in golds)
    if odd := [id for id in asked | given if not asked[id] == given[id] == 1]:
        raise ValueError(f"{path}: record {odd[0]!r} must have one question and one output")
    targets = dict(golds)
    return [replace(example, target=targets[example.id]) for example in examples]


def load_examples(o, split: str) -> list[Example]:
    """The first --limit records of a split; ValueError for none."""
    examples = load_lamp(o.data, o.task, split)[: o.limit or None]
    if not examples:
        raise ValueError(f"{o.data}: the {split} split of {o.task} has no records")
    if not any(re.search("[a-z0-9]", e.target or "x", re.I) for e in examples):
        print("warning: ROUGE counts words of a-z and 0-9; no target has any: it will be 0")
    return examples


@lru_cache(2000)  # by text, since item ids repeat; 1,000 profiles of 300 items take 1 GB
@torch.no_grad()
def embed(encoder: Encoder, texts: tuple[str, ...]) -> np.ndarray:
    """BERT's mean hidden state over each text, as the authors do, but normalised: products
    are cosines, [N, H]. A text is cut to 512 tokens, or the encoder's most."""
    limit, found = min(512, encoder.max_length), []
    rows = [encoder.tokenizer.encode_pair(text, None, limit)[0] for text in texts]
    for start in range(0, len(rows), 32):
        ids = Ragged(rows[start : start + 32], encoder.embeddings.LayerNorm.weight.device)
        hidden = encoder(ids.grid(ids.tokens), ids.mask)  # [B, T, H]
        total = (hidden * ids.mask[..., None]).sum(1)  # the mean, but for its length
        found.append(torch.nn.functional.normalize(total.float()).cpu())
    return torch.cat(found).numpy()


@dataclass
class PromptOptions(ModelOptions):
    data: str = option(str(SHIPPED / "lamp"), "directory with LaMP's files")
    task: TaskName = option("LaMP-4", "an entry of TASKS in retrieve.py")
    preset: Literal["toy", "small", "paper"] = option("toy", "other defaults: PRESETS in prlm.py")
    limit: int = option(0, "only the first records of each split; 0: all", 0)
    retriever: Retriever = option("bm25", "how profile items are ranked")
    k: int = option(4, "profile items in the prompt", 0)
    encoder: str | None = option(str(SHIPPED / "encoder"), "BERT checkpoint: dense, and the judge")
    max_prompt_tokens: int = option(512, "longest prompt; a longer one has all fields cut", 1)
    reasoning: bool = option(True, "without it the prompt has an empty <think> block")


@dataclass
class Options(PromptOptions):
    split: Split = option("dev", "which of LaMP's files")


def main(o: Options):
    example, tokenizer = load_examples(o, o.split)[0], prlm.load_tokenizer(o.model)
    (prompt,) = make_prompts(o, tokenizer, [example])
    print(f"record {prlm.printable(example.id)}: {len(prompt)} tokens, target {example.target!r}")
    print(prlm.printable(tokenizer.decode(prompt)))  # without the control tokens


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
