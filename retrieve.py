"""LaMP records, retrieval from a user's own profile, and the personalized prompt.

A LaMP record asks for one text (a headline, a title, a tweet) and comes with the user's profile:
what the same user wrote before. Personalized RAG (retrieval-augmented generation) ranks the profile
by the query and puts the best k items before the question. This is a prompt of the toy, the items
shortened; after the last line the policy begins to write, <think> first:

PROMPT_EXAMPLE
The paper gives these parts and their order; the wording is ours. BM25 is Okapi, as rank_bm25
computes it and as the authors used it: whitespace tokens, case kept,

  score(d) = sum over query words w of  idf(w) f(w,d) (k1 + 1) / (f(w,d) + k1 (1 - b + b |d|/mean))
  idf(w)   = ln(N - n(w) + 0.5) - ln(n(w) + 0.5), a negative one replaced by 0.25 x the mean idf

where f(w,d) counts w in d, n(w) of the N documents hold w, |d| is the number of words of d, and
`mean` the average |d|.

    python retrieve.py --data toy/lamp --task LaMP-4 --split dev --k 4
"""

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

import prlm
from prlm import SHIPPED, Encoder, Precision, Ragged, Tokenizer, option

# ---- Tasks and records -----------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """All that makes one task differ from another: to add a task, add an entry to TASKS."""

    prefix: str  # the task's own instruction at the start of every input; not part of the query
    fields: dict[str, str]  # a profile item's keys, in the order shown -> the names shown
    request: str  # with a profile it follows "Based on the historical profiles provided, "
    penalty: float = 0.0  # personalization reward of an answer that is empty or the placeholder

    @property
    def answer(self) -> str:
        """The name under which the answer is asked for: that of the last field."""
        return list(self.fields.values())[-1]

    @property
    def placeholder(self) -> str:
        return f"generated {self.answer}"


TASKS = {
    "LaMP-4": Task(
        prefix="Generate a headline for the following article: ",
        fields={"text": "text", "title": "title"},
        request="generate a title for the given text from the user.",
        penalty=-10.0,  # the authors': a learned reward likes such answers, and RL finds that out
    ),
    "LaMP-5": Task(
        prefix="Generate a title for the following abstract of a paper: ",
        fields={"abstract": "abstract", "title": "title"},
        request="generate a title for the given abstract from the user.",
    ),
    "LaMP-7": Task(
        prefix="Paraphrase the following tweet without any explanation before or after it: ",
        fields={"text": "tweet"},
        request="paraphrase the user's input tweet in the style of the user's historical tweets.",
    ),
    "commits": Task(  # any git repository: toy/commits.py writes the files
        prefix="Generate a subject line for the following commit message: ",
        fields={"body": "body", "subject": "subject"},
        request="generate a subject for the given commit body from the user.",
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
class Example:
    """One LaMP record. `profile` holds the file's own dictionaries; `target` may be withheld."""

    id: str
    user_id: str
    task: str
    query: str
    profile: list[dict]
    target: str | None


# ---- Retrieval (the paper's retrieval section) -----------------------------------------------


class BM25:
    """Okapi BM25 over tokenised documents. A user's profile is small: each gets a new index.

    `idf` "okapi" is the formula above. It is exactly 0 for a word in half of the documents, so on a
    small profile a whole query may find nothing. "lucene" is ln(1 + (N - n + 0.5) / (n + 0.5)),
    always above 0.
    """

    def __init__(self, corpus: list[list[str]], k1=1.5, b=0.75, idf: str = "okapi"):
        """Makes what `scores` reads: k1; counts, word -> {document: f(w, d)}; idf, word -> weight;
        and norm [N], k1 (1 - b + b |d|/mean) of each document.

        The mean idf is over all words, negative ones included. An empty corpus, or one of empty
        texts, gives no error and no warning: an average length of 0 counts as 1. Sums and products
        are taken in rank_bm25's order, so that what ties there ties here.
        """
        if idf not in ("okapi", "lucene"):
            raise ValueError(f"idf {idf!r} is neither okapi nor lucene")
        self.k1 = k1
        self.counts = defaultdict(dict)  # word -> {document: f(w, d)}
        for number, text in enumerate(corpus):
            for word, count in Counter(text).items():
                self.counts[word][number] = count
        held = np.array([len(found) for found in self.counts.values()])  # n(w)
        if idf == "okapi":
            weights = np.log(len(corpus) - held + 0.5) - np.log(held + 0.5)
            weights[weights < 0] = 0.25 * (sum(weights.tolist()) / max(len(held), 1))
        else:
            weights = np.log1p((len(corpus) - held + 0.5) / (held + 0.5))
        self.idf = dict(zip(self.counts, weights, strict=True))
        lengths = np.array([len(text) for text in corpus])
        self.norm = k1 * (1 - b + b * lengths / (lengths.mean() if lengths.any() else 1.0))

    def scores(self, query: list[str]) -> np.ndarray:
        """The score of every document, an array [N], in the order of the corpus.

        A repeated query word counts each time, one that no document holds adds 0.
        """
        scores = np.zeros(len(self.norm))
        for word in query:
            if word in self.counts:
                found = self.counts[word]
                where, count = np.array([*found]), np.array([*found.values()])
                weight = count * (self.k1 + 1) / (count + self.norm[where])
                scores[where] += self.idf[word] * weight
        return scores


def show(item: dict, task: str) -> str:
    """A profile item as the corpus and the prompt show it.

    >>> show({"title": "Open", "text": "We are.", "id": "1"}, "LaMP-4")
    "'text': 'We are.' 'title': 'Open'"
    """
    fields = TASKS[task].fields.items()
    return " ".join(f"'{name}': '{item[key].strip()}'" for key, name in fields)


def retrieve(
    example: Example, k: int, retriever: str = "bm25", seed: int = 0, dense: "Dense | None" = None
) -> list[dict]:
    """The best k items of the user's own profile, best first; fewer if the profile is shorter.

    Items that tie, at 0 too, keep the profile's order. BM25, with Okapi's idf or "lucene"'s, splits
    the items' texts (`show`) at whitespace, case kept; dense ranks the same texts; recency puts the
    newest first; random is the same draw for the same seed and record. Returns the profile's own
    dictionaries. ValueError: k below 0, an unknown retriever, "dense" without `dense`.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, not {k}")
    if retriever not in get_args(Retriever):
        raise ValueError(f"retriever {retriever!r} is none of {', '.join(get_args(Retriever))}")
    profile = example.profile
    if k == 0 or not profile or retriever == "none":
        return []
    if retriever == "random":
        return random.Random(repr((seed, example.id))).sample(profile, min(k, len(profile)))
    if retriever == "recency":
        dates = [parse_date(item, example) for item in profile]
        order = sorted(range(len(profile)), key=lambda n: dates[n], reverse=True)  # stable
        return [profile[n] for n in order[:k]]
    texts = [show(item, example.task) for item in profile]
    if retriever == "dense":
        if dense is None:
            raise ValueError("the dense retriever needs an encoder: --encoder DIRECTORY")
        scores = dense.scores(example.query.strip(), texts)
    else:
        idf = "okapi" if retriever == "bm25" else "lucene"
        scores = BM25([text.split() for text in texts], idf=idf).scores(example.query.split())
    return [profile[n] for n in np.argsort(-scores, kind="stable")[:k]]


# ---- The personalized prompt -----------------------------------------------------------------

SYSTEM = (
    "You infer the user's preferences from the historical records and the query. First reason "
    "step by step as an inner monologue, then answer. Reply in exactly this form:\n"
    "<think>\nyour reasoning\n</think>\n<answer>\nyour answer\n</answer>"
)
CLOSED = "<think>\n\n</think>\n\n"  # reasoning that is over before it began: answer at once
WITH_PROFILE = "Based on the historical profiles provided, "
ANSWER_FORMAT = " Answer in English as {{'{answer}': '{placeholder}'}}, without any explanation."


def instruction(task: str, personal: bool) -> str:
    """The request of a task; `personal`: profile items come before it."""
    kind = TASKS[task]
    start = WITH_PROFILE + kind.request
    if not personal:
        start = kind.request[0].upper() + kind.request[1:]
    return start + ANSWER_FORMAT.format(answer=kind.answer, placeholder=kind.placeholder)


def question(task: str, query: str) -> str:
    """The query in the form of an item, up to where the answer would be: 'text': '…' 'title':"""
    first, *rest = TASKS[task].fields.values()
    return f"'{first}': '{query.strip()}'" + "".join(f" '{name}':" for name in rest)


def answer_block(task: str) -> str:
    """The form of an answer that the prompt asks for, with {} for its text."""
    return f"<answer>\n{{'{task_of(task).answer}': '{{}}'}}\n</answer>"


def one_line(answer: str) -> str:
    """The answer without line breaks, since `extract_answer` reads one line."""
    return re.sub(r"\s*\n\s*", " ", answer.strip())


def build_messages(
    example: Example, items: list[dict],
    tokenizer: Tokenizer | None = None, max_prompt_tokens: int | None = None,
) -> list[dict]:  # fmt: skip
    """Chat messages: the system message, then one user message of items, instruction and query.

    The user message has one item per line, as `show` gives it, then `instruction`, then `question`.
    With a tokenizer and a budget, `tokenizer.chat` of the messages has at most `max_prompt_tokens`
    ids. One rule: every field, of the items and of the query, is cut to the same number of tokens,
    the largest that fits. So a short title stays whole beside a long text, and what one field
    leaves unused goes to the others. Where one token of each is too much, the last items are left
    out. ValueError if even the bare instruction is too long.
    """
    fields = TASKS[example.task].fields

    def messages(most: int | None, items: list[dict]) -> list[dict]:
        def cut(text: str) -> str:
            return text.strip() if most is None else tokenizer.cut(text.strip(), most)

        lines = [show({key: cut(item[key]) for key in fields}, example.task) for item in items]
        lines += [
            instruction(example.task, bool(items)),
            question(example.task, cut(example.query)),
        ]
        user = {"role": "user", "content": "\n".join(lines)}
        return [{"role": "system", "content": SYSTEM}, user]

    def fits(most: int | None, items: list[dict]) -> bool:
        return len(tokenizer.chat(messages(most, items))) <= max_prompt_tokens

    if tokenizer is None or max_prompt_tokens is None or fits(None, items):
        return messages(None, items)
    if not fits(0, []):
        raise ValueError(
            f"not even the bare instruction fits --max-prompt-tokens {max_prompt_tokens}"
        )
    while items and not fits(1, items):
        items = items[:-1]
    # Nothing longer than the budget can fit: so a very long text is split into tokens only once.
    most = max_prompt_tokens
    items = [{key: tokenizer.cut(item[key].strip(), most) for key in fields} for item in items]
    example = replace(example, query=tokenizer.cut(example.query.strip(), most))
    low, high = 0, most  # `low` fits, and nothing above `high` does
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle, items) else (low, middle - 1)
    return messages(low, items)


def make_prompts(o: "PromptOptions", tokenizer: Tokenizer, examples, k=None) -> list[list[int]]:
    """The token ids of each example's personalized prompt, with `k` items (default o.k)."""
    rank = make_ranker(o)
    said = [] if o.reasoning else tokenizer.fill(CLOSED.removeprefix(tokenizer.opening))
    budget = o.max_prompt_tokens - len(said)
    prompts = []
    for example in prlm.progress(examples, "prompts", delay=1):
        items = rank(example, o.k if k is None else k)
        messages = build_messages(example, items, tokenizer, budget)
        prompts.append(tokenizer.chat(messages) + said)
    return prompts


# ==== Below: not the method =====================================================================


def load_lamp(directory, task: str, split: str) -> list[Example]:
    """The records of a split ("train" | "dev" | "test"), in file order.

    `directory` is the task's folder or its parent (LaMP_4, or LaMP_4_time as the authors name it);
    the files are in it or in a folder named after the split. Outputs are joined by id; only the
    test split may lack them. ValueError names the file and the record.
    """
    task_of(task)  # ValueError for an unknown one
    path = find_questions(Path(directory), task, split)
    targets = load_outputs(path.with_name(f"{split}_outputs.json"), task, split)
    records = enumerate(prlm.read_json(path, list))
    examples = [check_record(record, n, task, path) for n, record in records]
    ids = Counter(example.id for example in examples)
    if repeated := [id for id, count in ids.items() if count > 1]:
        raise ValueError(f"{path}: several records have the id {repeated[0]!r}")
    if targets is None:
        return examples
    if odd := sorted(ids.keys() ^ targets.keys()):
        where = "has no output" if odd[0] in ids else "has an output but no question"
        raise ValueError(f"{path}: record {odd[0]!r} {where} ({len(odd)} such records)")
    return [replace(example, target=targets[example.id]) for example in examples]


def find_questions(directory: Path, task: str, split: str) -> Path:
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is none of train, dev, test")
    name, folder = f"{split}_questions.json", task.replace("-", "_")
    parents = [directory, directory / folder, directory / f"{folder}_time"]
    for path in (parent / sub / name for parent in parents for sub in (split, "")):
        if path.is_file():
            return path
    where = f"in it, in {folder}/, in {folder}_time/, or in {split}/ in any of them"
    raise FileNotFoundError(f"{directory}: no {name} {where}")


def load_outputs(path: Path, task: str, split: str) -> dict[str, str] | None:
    """{record id: the text that the user wrote}; None where the test split withholds them."""
    if not path.is_file():
        if split == "test":
            return None
        raise FileNotFoundError(f"{path}: no such file, and only the test split may lack outputs")
    content = prlm.read_json(path)
    if str(content.get("task", task)).replace("_", "-") != task.replace("_", "-"):
        raise ValueError(f"{path}: it holds {content['task']}, not {task}")
    golds = content.get("golds")
    if not isinstance(golds, list):
        raise ValueError(f"{path}: no list of golds")
    targets = {}
    for number, gold in enumerate(golds):
        gold = gold if isinstance(gold, dict) else {}
        if type(gold.get("id")) not in (str, int) or not isinstance(gold.get("output"), str):
            raise ValueError(f"{path}: gold {number} needs an id and an output (a string)")
        if str(gold["id"]) in targets:
            raise ValueError(f"{path}: id {gold['id']!r} has two outputs")
        targets[str(gold["id"])] = gold["output"]
    return targets


def check_record(record, number: int, task: str, path: Path) -> Example:
    """The record as an Example without a target; ValueError says what it lacks."""
    if not isinstance(record, dict) or type(record.get("id")) not in (str, int):
        raise ValueError(f"{path}: record {number} has no id")
    kind, where = TASKS[task], f"{path}: record {record['id']!r}"
    text, profile = record.get("input"), record.get("profile")
    if not isinstance(text, str) or not isinstance(profile, list):
        raise ValueError(f"{where} needs an input (a string) and a profile (a list)")
    for name, other in TASKS.items():
        if name != task and text.startswith(other.prefix):
            raise ValueError(f"{where} belongs to {name}, not to {task}")
    for position, item in enumerate(profile):
        item = item if isinstance(item, dict) else {}
        if not all(isinstance(item.get(key), str) for key in kind.fields):
            names = " and ".join(kind.fields)
            raise ValueError(f"{where}: profile item {position} needs {names} (strings)")
    user = record["id"] if record.get("user_id") is None else record["user_id"]
    query = text.removeprefix(kind.prefix)
    return Example(str(record["id"]), str(user), task, query, profile, None)


def load_examples(o, split: str) -> list[Example]:
    """The records of a split that the options name, at least one; --limit takes the first ones."""
    examples = load_lamp(o.data, o.task, split)[: o.limit or None]
    if not examples:
        raise ValueError(f"{o.data}: the {split} split of {o.task} has no records")
    if not any(re.search("[a-z0-9]", (e.target or "x").lower()) for e in examples):
        print("warning: ROUGE counts words of a-z and 0-9, and no target has any: all scores are 0")
    return examples


def parse_date(item: dict, example: Example) -> tuple[int, ...]:
    """(2016, 3, 14) of "2016-03-14", with or without a time; (2014,) of a year."""
    found = re.match(r"\d{4}(-\d{1,2}){0,2}(?=$|[T ])", str(item.get("date")))
    if not found:
        where = f"{example.task}, record {example.id!r}: a profile item has the date"
        raise ValueError(f"{where} {item.get('date')!r}; recency needs dates like 2016-03-14")
    return tuple(map(int, found[0].split("-")))


class Dense:
    """Ranks by the cosine of BERT embeddings; the profiles asked for last are kept embedded.

    `pooling` "mean" averages the hidden states of the real tokens (the authors' choice), "cls"
    takes the first one (as bge models were trained). `query_prefix` is the instruction that some
    models expect before a query.
    """

    def __init__(self, encoder: Encoder, pooling="mean", query_prefix=""):
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling {pooling!r} is neither mean nor cls")
        if encoder.tokenizer is None:
            raise ValueError("the encoder's directory has no tokenizer.json")
        self.encoder, self.pooling, self.query_prefix = encoder, pooling, query_prefix
        # By text, since LaMP's item ids are not unique; 300 items of 768 numbers, each, are 1 GB.
        self.embed_profile = lru_cache(1000)(self.embed)

    @torch.no_grad()
    def embed(self, texts: tuple[str, ...]) -> np.ndarray:
        """Unit vectors [N, H], batched by length."""
        limit = min(512, self.encoder.max_length)
        device = self.encoder.embeddings.LayerNorm.weight.device
        rows = [self.encoder.tokenizer.encode_pair(text, None, limit)[0] for text in texts]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        vectors = np.zeros((len(rows), self.encoder.config.hidden_size), dtype=np.float32)
        for batch in (order[start : start + 32] for start in range(0, len(order), 32)):
            ids = Ragged([rows[n] for n in batch], device)
            hidden = self.encoder(ids.grid(ids.tokens), ids.mask)  # [B, T, H]
            mean = (hidden * ids.mask[..., None]).sum(1) / ids.lengths.clamp(min=1)[:, None]
            pooled = mean if self.pooling == "mean" else hidden[:, 0]
            vectors[batch] = torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
        return vectors

    def scores(self, query: str, texts: list[str]) -> np.ndarray:
        """Cosine similarity of the query to each text [N]."""
        return self.embed_profile(tuple(texts)) @ self.embed((self.query_prefix + query,))[0]


@cache
def load_dense(directory: str | None, device: str) -> Dense:
    if directory is None:
        raise ValueError("the dense retriever needs --encoder DIRECTORY, a BERT checkpoint")
    return Dense(prlm.load_encoder(directory, device))


def make_ranker(o: "PromptOptions"):
    """rank(example, k) with the retriever that the options ask for."""
    dense = None
    if o.retriever == "dense":
        dense = load_dense(o.encoder, prlm.pick_device(o.device))
    return lambda example, k: retrieve(example, k, o.retriever, o.seed, dense)


@dataclass
class PromptOptions:
    model: str = option(str(SHIPPED / "policy"), "checkpoint directory of the policy")
    data: str = option(str(SHIPPED / "lamp"), "directory with LaMP's files")
    task: TaskName = option("LaMP-4", "an entry of TASKS in retrieve.py")
    preset: Literal["toy", "small", "paper"] = option("toy", "other defaults: PRESETS in prlm.py")
    limit: int = option(0, "only the first records of each split; 0 takes all", 0)
    retriever: Retriever = option("bm25", "how profile items are ranked")
    k: int = option(4, "profile items in the prompt", 0)
    encoder: str | None = option(str(SHIPPED / "encoder"), "BERT checkpoint: dense, and the judge")
    max_prompt_tokens: int = option(512, "longest prompt; a longer one has all fields cut", 1)
    reasoning: bool = option(True, "without it the prompt closes the reasoning: answer at once")
    seed: int = option(0, "of everything random", 0)
    device: str = option("auto", "auto, cuda, mps or cpu")
    precision: Precision = option("auto", "of matrix products; auto: bfloat16 on CUDA")


@dataclass
class Options(PromptOptions):
    split: Split = option("dev", "which of LaMP's files")
    show: int = option(1, "prompts to print", 0)
    out: str | None = option(None, "file for every record's whole ranking, {id: [item ids]}")


def main(o: Options) -> None:
    examples, rank = load_examples(o, o.split), make_ranker(o)
    tokenizer = prlm.load_tokenizer(o.model)
    shown = examples[: o.show]
    for example, prompt in zip(shown, make_prompts(o, tokenizer, shown), strict=True):
        record = f"record {prlm.printable(example.id)}: {len(prompt)} tokens"
        print(f"--- {record}, target {example.target!r}")
        print(prlm.printable(tokenizer.decode(prompt)))  # without the control tokens
    if o.out:
        ranking = {
            e.id: [str(item.get("id", "")) for item in rank(e, len(e.profile))] for e in examples
        }
        prlm.write_json(o.out, ranking)
        print(f"{o.out}: {len(ranking)} ranked profiles")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
