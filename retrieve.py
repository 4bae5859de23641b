"""LaMP records, retrieval from a user's own profile, and the personalized prompt.

A LaMP record asks for one text (a headline, a title, a tweet) and comes with the user's profile:
what the same user wrote before. Personalized RAG (retrieval-augmented generation) ranks the profile
by the query and puts the best k items before the question. This file goes all the way, from LaMP's
JSON to the token ids of the prompt:

  load_lamp        {split}_questions.json and {split}_outputs.json  ->  Example
  retrieve         none | random | recency | bm25 | dense           ->  the best k profile items
  build_messages   items + instruction + query in a token budget    ->  chat messages
  make_prompts     all of this for many examples                    ->  token ids

BM25 is Okapi, as rank_bm25 computes it and as the authors used it: whitespace tokens, case kept,

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
from pathlib import Path
from typing import Literal, get_args

import prlm  # before torch, so that Ctrl-C ends its long import without a traceback
from prlm import Encoder, Precision, Progress, Ragged, Tokenizer, beside, read_json

# isort: split
import numpy as np
import torch

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
Retriever = Literal["none", "random", "recency", "bm25", "dense"]


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


def load_lamp(directory, task: str, split: str) -> list[Example]:
    """The records of a split ("train" | "dev" | "test"), in file order.

    `directory` is the task's folder or its parent (LaMP_4, or LaMP_4_time as the authors name
    it); the files are in it or in a folder named after the split. Outputs are joined by id; only
    the test split may lack them. ValueError names the file and the record.
    """
    task_of(task)  # ValueError for an unknown one
    path = _find(Path(directory), task, split)
    targets = _load_outputs(path.with_name(f"{split}_outputs.json"), task, split)
    examples = [_example(r, n, task, path) for n, r in enumerate(read_json(path, list))]
    ids = Counter(e.id for e in examples)
    for id, count in ids.most_common(1):  # none, where there are no records
        if count > 1:
            raise ValueError(f"{path}: record id {id!r} occurs {count} times")
    if targets is None:
        return examples
    odd = sorted(ids.keys() ^ targets.keys())
    if odd:
        where = "has no output" if odd[0] in ids else "has an output but no question"
        raise ValueError(f"{path}: record {odd[0]!r} {where} ({len(odd)} such records)")
    return [replace(example, target=targets[example.id]) for example in examples]


def load_examples(o, split: str, limit: int = 0) -> list[Example]:
    """The first `limit` records, 0 for all, of the split that the options name; at least one."""
    examples = load_lamp(o.data, o.task, split)[: limit or None]
    if not examples:
        raise ValueError(f"{o.data}: the {split} split of {o.task} has no records")
    return examples


def _find(directory: Path, task: str, split: str) -> Path:
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is none of train, dev, test")
    name = f"{split}_questions.json"
    folder = task.replace("-", "_")
    parents = [directory, directory / folder, directory / f"{folder}_time"]
    for path in (p / sub / name for p in parents for sub in (split, "")):
        if path.is_file():
            return path
    where = f"in it, in {folder}/, in {folder}_time/, or in {split}/ in any of them"
    raise FileNotFoundError(f"{directory}: no {name} {where}")


def lamp_files(directory, task: str, *splits: str) -> list[Path]:
    """The files that `load_lamp` reads of these splits."""
    found = [_find(Path(directory), task, split) for split in splits]
    outputs = [p.with_name(p.name.replace("questions", "outputs")) for p in found]
    return [path for path in (*found, *outputs) if path.is_file()]


def _load_outputs(path: Path, task: str, split: str) -> dict[str, str] | None:
    if not path.is_file():
        if split == "test":  # LaMP withholds them
            return None
        raise FileNotFoundError(f"{path}: no such file, and only the test split may lack outputs")
    content = read_json(path)
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


def _example(record, number: int, task: str, path: Path) -> Example:
    kind = TASKS[task]
    if not isinstance(record, dict) or type(record.get("id")) not in (str, int):
        raise ValueError(f"{path}: record {number} has no id")
    where = f"{path}: record {record['id']!r}"
    text = record.get("input")
    profile = record.get("profile")
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
    user = record.get("user_id")
    return Example(
        id=str(record["id"]),
        user_id=str(record["id"] if user is None else user),
        task=task,
        query=text.removeprefix(kind.prefix),
        profile=profile,
        target=None,
    )


# ---- Retrieval -------------------------------------------------------------------------------


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


class Dense:
    """Ranks by the cosine of BERT embeddings; the profiles asked for last are kept embedded.

    `pooling` "mean" averages the hidden states of the real tokens (the authors' choice), "cls"
    takes the first one (as bge models were trained). `query_prefix` is the instruction that some
    models expect before a query.
    """

    most = 1000  # profiles to keep: 300 items of 768 numbers each would be 1 GB

    def __init__(self, encoder: Encoder, pooling="mean", query_prefix="", batch_size=32):
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling {pooling!r} is neither mean nor cls")
        if encoder.tokenizer is None:
            raise ValueError("the encoder's directory has no tokenizer.json")
        self.encoder = encoder
        self.pooling = pooling
        self.query_prefix = query_prefix
        self.batch_size = batch_size
        self.profiles = {}  # the texts of a profile -> their vectors, the oldest first

    @torch.no_grad()
    def embed(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [N, H], batched by length."""
        limit = min(512, self.encoder.max_length)
        device = self.encoder.norm.weight.device
        rows = [self.encoder.tokenizer.encode_pair(text, None, limit)[0] for text in texts]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        vectors = np.zeros((len(rows), self.encoder.hidden), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids = Ragged([rows[n] for n in batch], device)
            hidden = self.encoder(ids.grid(ids.tokens), ids.mask)  # [B, T, H]
            mean = (hidden * ids.mask[..., None]).sum(1) / ids.lengths.clamp(min=1)[:, None]
            pooled = mean if self.pooling == "mean" else hidden[:, 0]
            vectors[batch] = torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
        return vectors

    def scores(self, query: str, texts: list[str]) -> np.ndarray:
        """Cosine similarity of the query to each text [N]."""
        key = tuple(texts)  # by text: LaMP's item ids are not unique across records
        vectors = self.profiles.pop(key, None)
        vectors = self.embed(texts) if vectors is None else vectors
        self.profiles[key] = vectors  # as the newest
        if len(self.profiles) > self.most:
            del self.profiles[next(iter(self.profiles))]
        return vectors @ self.embed([self.query_prefix + query])[0]


def show(item: dict, task: str) -> str:
    """A profile item as the corpus and the prompt show it.

    >>> show({"title": "Open", "text": "We are.", "id": "1"}, "LaMP-4")
    "'text': 'We are.' 'title': 'Open'"
    """
    fields = TASKS[task].fields.items()
    return " ".join(f"'{name}': '{item[key].strip()}'" for key, name in fields)


def parse_date(item: dict, example: Example) -> tuple[int, ...]:
    """(2016, 3, 14) of "2016-03-14", with or without a time; (2014,) of a year."""
    date = item.get("date")
    found = re.match(r"\d{4}(-\d{1,2}){0,2}(?=$|[T ])", str(date))
    if not found:
        where = f"record {example.id!r}, profile item {item.get('id')!r}: the date is {date!r}"
        raise ValueError(f"{where}; recency needs dates like 2016-03-14, as LaMP's time split has")
    return tuple(map(int, found[0].split("-")))


def retrieve(
    example: Example, k: int, retriever: str = "bm25", seed: int = 0,
    dense: Dense | None = None, idf: str = "okapi", lowercase: bool = False,
) -> list[dict]:  # fmt: skip
    """The best k items of the user's own profile, best first; fewer if the profile is shorter.

    Items that tie, at 0 too, keep the profile's order. Recency puts the newest first; random is
    the same draw for the same seed and record. BM25 splits texts at whitespace, case kept;
    `lowercase` takes ROUGE's words instead, the runs of [a-z0-9] in the lowercased text.

    Returns the profile's own dictionaries. BM25 and dense rank the texts of `show`, recency the
    dates of `parse_date`; a random choice is also in random order. `dense.scores` is asked once,
    with the stripped query. ValueError: k below 0, an unknown retriever, "dense" without `dense`.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, not {k}")
    if retriever not in get_args(Retriever):
        raise ValueError(f"retriever {retriever!r} is none of {', '.join(get_args(Retriever))}")
    profile = example.profile
    if k == 0 or not profile or retriever == "none":
        return []
    if retriever == "random":
        return random.Random(f"{seed} {example.id}").sample(profile, min(k, len(profile)))
    if retriever == "recency":
        dates = [parse_date(item, example) for item in profile]
        order = sorted(range(len(profile)), key=lambda n: dates[n], reverse=True)  # stable
    else:
        texts = [show(item, example.task) for item in profile]
        if retriever == "bm25":
            words = (lambda text: re.findall("[a-z0-9]+", text.lower())) if lowercase else str.split
            scores = BM25([words(t) for t in texts], idf=idf).scores(words(example.query))
        elif dense is None:
            raise ValueError("the dense retriever needs an encoder: --encoder DIRECTORY")
        else:
            scores = dense.scores(example.query.strip(), texts)
        order = np.argsort(-scores, kind="stable")
    return [profile[n] for n in order[:k]]


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
    form = ANSWER_FORMAT.format(answer=kind.answer, placeholder=kind.placeholder)
    return start + form


def answer_block(task: str, answer: str) -> str:
    """An answer in the form that the prompt asks for; line breaks in it become blanks, since
    `extract_answer` reads one line.
    """
    answer = re.sub(r"\s*\n\s*", " ", answer)
    return f"<answer>\n{{'{task_of(task).answer}': '{answer}'}}\n</answer>"


def question(task: str, query: str) -> str:
    """The query in the form of an item, up to where the answer would be: 'text': '…' 'title':"""
    first, *rest = TASKS[task].fields.values()
    return f"'{first}': '{query.strip()}'" + "".join(f" '{name}':" for name in rest)


def build_messages(
    example: Example, items: list[dict],
    tokenizer: Tokenizer | None = None, max_prompt_tokens: int | None = None,
) -> list[dict]:  # fmt: skip
    """Chat messages: the system message, then one user message of items, instruction and query.

    The user message has one item per line, as `show` gives it, then `instruction`, then `question`.
    With a tokenizer and a budget, `tokenizer.chat` of the messages has at most `max_prompt_tokens`
    ids; a prompt that fits is left as it is. Otherwise the query has priority: it is cut only if it
    is too long without any item. The items share the rest evenly, and what a short one leaves goes
    to those after it. `_cut_item` shortens a long one; one that loses all of itself is left out.
    Without items the prompt does not speak of profiles. ValueError names the budget and what the
    bare instruction takes, if that is more.

    To share evenly, each item in turn may take what is left, line break included, divided by the
    number of items left, itself included. No text is cut more than its share asks for, but for a
    few tokens, since where two pieces meet, tokens can merge or split. A text may have 100,000
    words, so a cut takes off all that is too much at once, not token by token.
    """

    def messages(shown: list[str], query: str) -> list[dict]:
        request = instruction(example.task, bool(shown))
        user = "\n".join([*shown, request, question(example.task, query)])
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]

    full = messages([show(item, example.task) for item in items], example.query)
    if tokenizer is None or max_prompt_tokens is None:
        return full

    def excess(chat: list[dict]) -> int:
        return len(tokenizer.chat(chat)) - max_prompt_tokens

    if excess(full) <= 0:
        return full
    bare = excess(messages([], ""))
    if bare > 0:
        need = f"the bare instruction takes {max_prompt_tokens + bare}"
        raise ValueError(f"max_prompt_tokens is {max_prompt_tokens}, but {need}: raise it")
    # Where two pieces meet, tokens can merge or split, so a cut is checked on the whole prompt.
    query = example.query
    room = -bare
    while excess(messages([], query)) > 0:
        query = tokenizer.cut(example.query.strip(), room)
        room -= 1
    room = -excess(messages([], query))  # for the items
    while True:
        cut = []
        left = room
        for n, item in enumerate(items):
            text = _cut_item(item, example.task, tokenizer, left // (len(items) - n) - 1)
            left -= len(tokenizer.encode(text)) + 1 if text else 0  # 1 for the line break
            cut.append(text)
        chat = messages([text for text in cut if text], query)
        if excess(chat) <= 0:
            return chat
        room -= excess(chat)


def _cut_item(item: dict, task: str, tokenizer: Tokenizer, room: int) -> str:
    """The item in at most `room` tokens: first its text is cut, then its title, then all of it."""
    item = {key: item[key].strip() for key in TASKS[task].fields}
    for key in item:
        while (excess := len(tokenizer.encode(show(item, task))) - room) > 0 and item[key]:
            item[key] = tokenizer.cut(item[key], len(tokenizer.encode(item[key])) - excess)
    return show(item, task) if excess <= 0 else ""


# ---- The command ----------------------------------------------------------------------------


@dataclass
class PromptOptions:
    presets = {  # noqa: RUF012  what differs from the defaults, which are the toy's
        "toy": {},
        "small": {"k": 3, "max_prompt_tokens": 288, "encoder": None},
        "paper": {"k": 5, "encoder": None},
    }
    free = {"device"}  # noqa: RUF012  may change: greedy results stay the same up to rounding
    bounds = {0: "k seed", 1: "max_prompt_tokens"}  # noqa: RUF012  {least value: names}
    model: str = beside("toy/policy")  # checkpoint directory of the policy
    data: str = beside("toy/lamp")  # directory with LaMP's files
    task: TaskName = "LaMP-4"  # an entry of TASKS in retrieve.py
    preset: Literal["auto", "toy", "small", "paper"] = "auto"  # other defaults, by the model
    retriever: Retriever = "bm25"  # how profile items are ranked
    k: int = 4  # profile items in the prompt
    lowercase: bool = False  # BM25 on lowercased [a-z0-9]+ words, not on whitespace-separated ones
    idf: Literal["okapi", "lucene"] = "okapi"  # BM25's word weight
    encoder: str | None = beside("toy/encoder")  # BERT checkpoint for dense retrieval and judge
    pooling: Literal["mean", "cls"] = "mean"  # how the dense retriever sums up a text
    query_prefix: str = ""  # what the dense retriever puts before a query (bge models expect it)
    max_prompt_tokens: int = 512  # longest prompt; where it would be longer, items are cut
    reasoning: bool = True  # without it the prompt closes the reasoning: answer at once
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: Precision = "auto"  # of the policy's matrix products; auto: bfloat16 on CUDA

    @staticmethod
    def choose_preset(model: str) -> str:
        """The preset of --preset auto, by the model's config.json.

        "toy" for the shipped policy and what was trained from it, "small" below a hidden size of
        1,024 (about half a billion parameters), "paper" from there on.
        """
        shape = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        toy, own = {}, {}  # no config.json: both stay empty, so "toy"; loading then fails
        if (Path(model) / "config.json").is_file():
            own = read_json(Path(model) / "config.json")
            toy = read_json(beside("toy/policy/config.json"))
        if all(own.get(key) == toy.get(key) for key in shape):
            return "toy"
        size = own.get("hidden_size")
        return "small" if isinstance(size, int) and size < 1024 else "paper"


def encoder_of(o: PromptOptions) -> str:
    """The BERT checkpoint that the options name; ValueError if they name none."""
    if o.encoder is None:
        what = "the dense retriever and the BERT judge need"
        raise ValueError(f"{what} --encoder DIRECTORY, a BERT checkpoint (the toy's fits the toy)")
    return o.encoder


def make_ranker(o: PromptOptions):
    """rank(example, k) with the retriever that the options ask for."""
    dense = None
    if o.retriever == "dense":
        encoder = prlm.load_encoder(encoder_of(o), prlm.pick_device(o.device))
        dense = Dense(encoder, pooling=o.pooling, query_prefix=o.query_prefix)
    how = dict(seed=o.seed, dense=dense, idf=o.idf, lowercase=o.lowercase)
    return lambda example, k: retrieve(example, k, o.retriever, **how)


def assistant_start(o: PromptOptions, tokenizer: Tokenizer) -> str:
    """How a prompt begins the assistant's turn; `chat` itself brings `tokenizer.opening`."""
    return tokenizer.opening if o.reasoning else CLOSED


def make_prompts(o: PromptOptions, tokenizer: Tokenizer, examples, rank=None) -> list[list[int]]:
    """The token ids of each example's personalized prompt; `rank` is make_ranker(o), if at hand."""
    rank = rank or make_ranker(o)
    said = tokenizer.encode(assistant_start(o, tokenizer).removeprefix(tokenizer.opening))
    budget = o.max_prompt_tokens - len(said)
    prompts = []
    for example in Progress(examples, "prompts", delay=1):
        messages = build_messages(example, rank(example, o.k), tokenizer, budget)
        prompts.append(tokenizer.chat(messages) + said)
    return prompts


@dataclass
class Options(PromptOptions):
    bounds = {0: "show"}  # noqa: RUF012
    split: Split = "dev"  # which of LaMP's files
    show: int = 1  # prompts to print
    out: str | None = None  # write every record's whole ranking to this file, {id: [item ids]}


def main(o: Options) -> None:
    examples, rank = load_lamp(o.data, o.task, o.split), make_ranker(o)
    tokenizer = prlm.load_tokenizer(o.model) if o.show else None
    for example in examples[: o.show]:
        (prompt,) = make_prompts(o, tokenizer, [example], rank)
        record = f"record {prlm.printable(example.id)}: {len(prompt)} tokens"
        print(f"--- {record}, target {example.target!r}")
        print(prlm.printable(tokenizer.decode(prompt)))  # without the control tokens
    if o.out:
        ranking = {}
        for example in Progress(examples, f"rank by {o.retriever}"):
            items = rank(example, len(example.profile))
            ranking[example.id] = [str(item.get("id", "")) for item in items]
        prlm.write_json(o.out, ranking)
        print(f"{o.out}: {len(ranking)} ranked profiles")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
