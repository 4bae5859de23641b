"""LaMP is read exactly, retrievers rank as naive loops do, no prompt is over its budget."""

import doctest
import json
import math
import os
import random
import re
import signal
import typing
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from conftest import byte_tokenizer, same, shorten, write_lamp

import prlm
import retrieve as module
from retrieve import BM25, Dense, Example, build_messages, load_lamp, retrieve

PREFIX = {
    "LaMP-4": "Generate a headline for the following article: ",
    "LaMP-5": "Generate a title for the following abstract of a paper: ",
    "LaMP-7": "Paraphrase the following tweet without any explanation before or after it: ",
    "commits": "Generate a subject line for the following commit message: ",
}
ITEM = {"text": "a text", "title": "A Title", "id": "3000"}


@pytest.fixture(autouse=True)
def time_limit():
    """A loop that never ends fails its own test, and stops no other.

    What counts is the time that this process computes, so that a busy machine does not matter.
    """

    def stop(*_):
        raise TimeoutError("10 seconds are over: an endless loop, or a slow one over every token?")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 10)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def record(id="300", query="a query", task="LaMP-4", **changes):
    return {"id": id, "input": PREFIX[task] + query, "profile": [dict(ITEM)]} | changes


def write(folder, records, golds=None, split="dev", task="LaMP_4"):
    """LaMP's two files; golds are {id: output}, or what is to stand in the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_questions.json").write_text(json.dumps(records))
    if golds is not None:
        pairs = [{"id": i, "output": o} for i, o in golds.items()] if type(golds) is dict else golds
        text = json.dumps({"task": task, "golds": pairs})
        (folder / f"{split}_outputs.json").write_text(text)


def example(query="", texts=(), id="1", task="LaMP-7", **more):
    profile = [{"text": text, "id": f"{id}{n}"} | more for n, text in enumerate(texts)]
    return Example(id, id, task, query, profile, None)


def places(items, e):
    """Where the items stand in the profile: each must be the profile's own dictionary."""
    return [next(n for n, own in enumerate(e.profile) if own is item) for item in items]


class TestLoadLamp:
    @pytest.mark.parametrize("folder", ["LaMP_4/dev", "LaMP_4", "LaMP_4_time/dev", "dev", ""])
    def test_every_layout_from_both_directories(self, tmp_path, folder):
        write(tmp_path / folder, [record()], {"300": "A Gold "})
        expected = [Example("300", "300", "LaMP-4", "a query", [ITEM], "A Gold ")]
        for directory in (tmp_path, str(tmp_path), tmp_path / folder.removesuffix("dev")):
            assert load_lamp(directory, "LaMP-4", "dev") == expected
        with pytest.raises(FileNotFoundError, match="train_questions"):
            load_lamp(tmp_path, "LaMP-4", "train")

    def test_time_split_has_users_and_dates(self, tmp_path):
        items = [ITEM | {"date": "2016-03-14"}, ITEM | {"date": 2014}]
        users = {"300": "u1", "301": "u1", "302": 7, "303": None}
        records = [record(i, user_id=user, profile=items) for i, user in users.items()]
        write(tmp_path, records, dict.fromkeys(users, "gold"))
        loaded = load_lamp(tmp_path, "LaMP-4", "dev")
        assert [e.user_id for e in loaded] == ["u1", "u1", "7", "303"]
        assert all(e.profile == items for e in loaded)

    @pytest.mark.parametrize("task", PREFIX)
    def test_only_the_prefix_at_the_start_goes(self, tmp_path, task):
        queries = [" two  blanks ", PREFIX[task] + "twice", "", "Generate a"]
        records = [record(str(n), q, task, profile=[]) for n, q in enumerate(queries)]
        write(tmp_path, [*records, {"id": "9", "input": "no prefix", "profile": []}], split="test")
        loaded = load_lamp(tmp_path, task, "test")
        assert [(e.task, e.query) for e in loaded] == [(task, q) for q in [*queries, "no prefix"]]

    def test_outputs_are_joined_by_id(self, tmp_path):
        """Not by order; and an id may be a number in one of the files."""
        golds = [{"id": n, "output": f"gold {n}"} for n in range(12)[::-1]]
        write(tmp_path, [record(str(n)) for n in range(12)], golds)
        loaded = load_lamp(tmp_path, "LaMP-4", "dev")
        assert [(e.id, e.target) for e in loaded] == [(str(n), f"gold {n}") for n in range(12)]

    def test_only_the_test_split_may_lack_outputs(self, tmp_path):
        for split in ("train", "dev", "test"):
            write(tmp_path, [record()], split=split)
        assert load_lamp(tmp_path, "LaMP-4", "test")[0].target is None
        for split in ("train", "dev"):
            with pytest.raises(FileNotFoundError, match=f"{split}_outputs"):
                load_lamp(tmp_path, "LaMP-4", split)
        for task, split, wrong in (("LaMP_4", "test", "LaMP_4"), ("LaMP-4", "val", "val")):
            with pytest.raises(ValueError, match=wrong):
                load_lamp(tmp_path, task, split)

    def test_outputs_come_from_the_folder_of_the_questions(self, tmp_path):
        write(tmp_path / "LaMP_4", [record()], split="test")
        write(tmp_path / "LaMP_4_time", [record()], {"300": "another user's"}, split="test")
        assert load_lamp(tmp_path, "LaMP-4", "test")[0].target is None

    @pytest.mark.parametrize("changes", [
        {"input": None}, {"input": ["a"]}, {"input": PREFIX["LaMP-5"]}, {"input": PREFIX["LaMP-7"]},
        {"profile": None}, {"profile": {"text": "t"}}, {"profile": [ITEM, "text"]},
        {"profile": [ITEM, None]}, {"profile": [{"text": "t"}]}, {"id": 300},
        {"profile": [ITEM, {"abstract": "t", "title": "t"}]},
        {"profile": [{"text": "t", "title": None}]}, {"profile": [{"text": 1, "title": "t"}]},
    ])  # fmt: skip
    def test_a_malformed_record_is_named(self, tmp_path, changes):
        bad = record("666") | changes
        write(tmp_path, [record("300"), bad], {"300": "gold", "666": "gold"})
        with pytest.raises(ValueError, match=rf"dev_questions\.json.*{bad['id']}"):
            load_lamp(tmp_path, "LaMP-4", "dev")

    @pytest.mark.parametrize("bad", [{}, {"id": None, "input": "", "profile": []}, "300", None, []])
    def test_a_record_without_id_is_named_by_its_place(self, tmp_path, bad):
        write(tmp_path, [record(), bad], {"300": "gold"})
        with pytest.raises(ValueError, match=r"dev_questions\.json: record 1 "):
            load_lamp(tmp_path, "LaMP-4", "dev")

    @pytest.mark.parametrize(("golds", "named"), [
        ({"300": "a"}, "'301'"), ({"300": "a", "301": "b", "302": "c"}, "'302'"),  # not the same
        ({"300": "a", "301": None}, "outputs.json.* 1 "), ("golds", "outputs.json"),
        ([{"id": "300", "output": "a"}, {"output": "b"}], "outputs.json.* 1 "),
        ([{"id": "300", "output": "a"}, "b"], "outputs.json.* 1 "),
        ([{"id": "300", "output": "a"}, {"id": 300, "output": "b"}], "outputs.json.*300"),
    ])  # fmt: skip
    def test_outputs_that_do_not_match_are_refused(self, tmp_path, golds, named):
        write(tmp_path, [record("300"), record("301")], golds)
        with pytest.raises(ValueError, match=f"dev_.*{named}"):
            load_lamp(tmp_path, "LaMP-4", "dev")

    def test_files_that_are_not_lamps(self, tmp_path):
        write(tmp_path, [record()], {"300": "gold"}, task="LaMP_5")
        with pytest.raises(ValueError, match=r"dev_outputs\.json.*LaMP_5"):
            load_lamp(tmp_path, "LaMP-4", "dev")
        for name in ("dev_questions.json", "dev_outputs.json"):
            write(tmp_path, [record()], {"300": "gold"})
            for content in (b"", b"{", b'"text"', b"[{]", b"\x00", b"null", b'["\xff"]'):
                (tmp_path / name).write_bytes(content)
                with pytest.raises(ValueError, match=name):
                    load_lamp(tmp_path, "LaMP-4", "dev")

    @pytest.mark.parametrize("ascii", [True, False])
    def test_every_character_survives(self, tmp_path, ascii):
        odd = "é \u2028 \x85 \u00e2\x99\u00ab \x9f &quot;a&amp;b&quot; \U0001f600 \r\n'\"\\ z"
        odd += " \ud83d z" * ascii  # raw UTF-8 cannot hold half a pair
        write(tmp_path, [record(query=odd, profile=[{"text": odd, "title": odd}])], {"300": odd})
        for path in tmp_path.iterdir():  # with a BOM, and Windows line ends between the values
            text = json.dumps(json.loads(path.read_text()), ensure_ascii=ascii, indent=1)
            path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        (e,) = load_lamp(tmp_path, "LaMP-4", "dev")
        assert e.query == e.target == e.profile[0]["title"] == e.profile[0]["text"] == odd
        assert build_messages(e, retrieve(e, 1))[1]["content"].count(odd) == 3

    @pytest.mark.skipif("LAMP_DIR" not in os.environ, reason="LAMP_DIR: the folder of LaMP_7")
    def test_real_data(self):
        examples = load_lamp(os.environ["LAMP_DIR"], "LaMP-7", "train")
        assert len({e.id for e in examples}) == len(examples) > 0
        for e in examples:
            assert e.target and e.query and not e.query.startswith("Paraphrase the following")
            assert len(places(retrieve(e, 4), e)) == min(4, len(e.profile))


class TestTasks:
    """A task is one entry of TASKS: nothing else names it."""

    @pytest.mark.parametrize("task", PREFIX)
    def test_everything_follows_from_the_entry(self, world, tmp_path, task):
        assert [*PREFIX] == [*module.TASKS] == [*typing.get_args(module.TaskName)]
        folder, names = tmp_path / task.replace("-", "_"), module.TASKS[task].fields
        write_lamp(folder, task)
        write_lamp(tmp_path / "plain", task)
        parsed, _ = prlm.parse_options(module.Options, "", ["--task", task])
        for directory in (tmp_path, folder, tmp_path / "plain"):
            o = replace(parsed, data=str(directory), model=str(world / "policy"), k=1)
            examples = load_lamp(o.data, o.task, "train")
            assert all(e.task == task and e.query and e.target for e in examples)
            shown = build_messages(examples[0], retrieve(examples[0], 1))[1]["content"]
            assert all(f"'{name}': '" in shown for name in names.values())
        for other in PREFIX.keys() - {task}:
            bad = [record(task=other, profile=[dict.fromkeys(names, "x")])]
            write(folder, bad, {"300": ""}, "dev", folder.name)
            with pytest.raises(ValueError, match=f"belongs to {other}"):
                load_lamp(tmp_path, task, "dev")

    @pytest.mark.parametrize("name", ["my-mails", "my_mails"])
    def test_one_more(self, tmp_path, monkeypatch, name):
        mine = module.Task("Answer: ", {"q": "question", "a": "reply"}, "write it.", penalty=-2.0)
        monkeypatch.setitem(module.TASKS, name, mine)
        item = {"q": "why?", "a": "so"}
        good = {"id": 1, "input": "Answer: how?", "profile": [item]}
        write(tmp_path / "my_mails", [good], {1: "thus"}, task="my_mails")
        (e,) = load_lamp(tmp_path, name, "dev")
        assert (e.query, e.target, mine.placeholder) == ("how?", "thus", "generated reply")
        user = build_messages(e, retrieve(e, 1))[1]["content"]
        assert user.startswith("'question': 'why?' 'reply': 'so'\nBased on ")
        assert user.endswith("'question': 'how?' 'reply':")
        with pytest.raises(ValueError, match=name):
            load_lamp(tmp_path, "my mails", "dev")


def naive_bm25(corpus, query, k1=1.5, b=0.75, idf="okapi"):
    """The formula, a word and a document at a time."""
    held = {w: sum(w in text for text in corpus) for text in corpus for w in text}
    if idf == "okapi":
        weight = {w: math.log((len(corpus) - n + 0.5) / (n + 0.5)) for w, n in held.items()}
        floor = 0.25 * sum(weight.values()) / len(weight)
        weight = {w: floor if value < 0 else value for w, value in weight.items()}
    else:
        weight = {w: math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5)) for w, n in held.items()}
    mean = sum(map(len, corpus)) / len(corpus)
    scores = []
    for text in corpus:
        norm = k1 * (1 - b + b * len(text) / mean)
        found = [(weight[w], text.count(w)) for w in query if w in text]
        scores.append(sum(i * f * (k1 + 1) / (f + norm) for i, f in found))
    return np.array(scores)


def random_corpora(count, seed=0):
    """(corpus, query): few words, so that they repeat; empty texts; unknown words in the query."""
    draw = random.Random(seed)
    for _ in range(count):
        words = [f"{'wW'[n % 2]}{n // 2}" for n in range(draw.randint(1, 15))]  # case counts
        corpus = [draw.choices(words, k=draw.randint(0, 9)) for _ in range(draw.randint(1, 12))]
        if any(corpus):
            yield corpus, draw.choices([*words, "unknown"], k=draw.randint(0, 8))


def test_what_ties_in_rank_bm25_ties_here():
    """To the last bit, since the lower index wins a tie."""
    okapi = pytest.importorskip("rank_bm25").BM25Okapi
    for corpus, query in [([list("aaabb"), ["a"]], ["a"]), *random_corpora(1000, seed=2)]:
        assert BM25(corpus).scores(query).tolist() == okapi(corpus).get_scores(query).tolist()


class TestBM25:
    def test_equals_rank_bm25(self):
        okapi = pytest.importorskip("rank_bm25").BM25Okapi
        for corpus, query in random_corpora(400):
            for how in ({}, {"k1": 0.9, "b": 0.4}):
                expected = okapi(corpus, **how).get_scores(query)
                case = f"BM25({corpus}, **{how}).scores({query})"
                same(BM25(corpus, **how).scores(query), expected, case, absolute=1e-9)

    @pytest.mark.parametrize("how", [(1.5, 0.75), (0.9, 0.4), (0, 0.5), (2.0, 0.0), (1.2, 1.0)])
    @pytest.mark.parametrize("idf", ["okapi", "lucene"])
    def test_equals_the_formula(self, idf, how):
        for corpus, query in random_corpora(100, seed=1):
            scores = BM25(corpus, *how, idf=idf).scores(query)
            expected = naive_bm25(corpus, query, *how, idf)
            same(scores, expected, f"BM25({corpus}).scores({query})", absolute=1e-9)
            shared = [any(word in text for word in query) for text in corpus]
            assert idf == "okapi" or ((scores > 0) == shared).all()

    def test_by_hand(self):
        """idf(a) = idf(c) = ln 2.5/1.5; b stands in two of three, its idf is 1/4 of the mean."""
        rare = math.log(2.5 / 1.5)
        common, short, long = 0.25 * (rare + rare - rare) / 3, 1.5 * 0.7, 1.5 * 1.6
        scores = BM25([["a"], ["b", "b", "c"], ["b"]]).scores(["a", "b", "b", "?"])
        tail = [2 * common * 5 / (2 + long), 2 * common * 2.5 / (1 + short)]
        expected = np.array([rare * 2.5 / (1 + short), *tail])
        same(scores, expected, "the corpus a, b b c, b; the query a b b ?", relative=1e-9)
        half = [["a", "x"], ["b"]]  # ln 1: a word in half of the documents has no weight
        assert (BM25(half).scores(["a"]) == 0).all() and BM25(half, idf="lucene").scores(["a"])[0]

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("idf", ["okapi", "lucene"])
    def test_nothing_to_find(self, idf):
        assert BM25([], idf=idf).scores(["a"]).shape == (0,)
        assert BM25([[], []], idf=idf).scores(["a"]).tolist() == [0, 0]
        assert BM25([["a"], []], idf=idf).scores([]).tolist() == [0, 0]
        assert BM25([["a"], [], ["b"]], idf=idf).scores(["unknown", "b"])[:2].tolist() == [0, 0]

    @pytest.mark.parametrize("idf", ["okapi", "lucene"])
    def test_an_unknown_idf_is_refused(self, idf):
        with pytest.raises(ValueError, match=f"{idf}2"):
            BM25([["a"]], idf=f"{idf}2")


class TestRetrieve:
    def test_bm25_ranks_as_a_naive_loop(self):
        """Over the text as it is shown, split at blanks; ties, at 0 too, keep their order."""
        for corpus, query in random_corpora(60, seed=2):
            e = example(" ".join(query), map(" ".join, corpus), task="LaMP-4")
            for n, item in enumerate(e.profile):
                item["title"] = f" w{n % 3} w{n % 4} "
            rows = [
                f"'text': '{i['text'].strip()}' 'title': '{i['title'].strip()}'" for i in e.profile
            ]
            for idf in ("okapi", "lucene"):
                scores = naive_bm25([row.split() for row in rows], query, idf=idf).round(9)
                order = np.argsort(-scores, kind="stable").tolist()
                for k in (1, 3, len(rows), len(rows) + 5):
                    case = f"k {k}, idf {idf}, query {e.query!r}, items {shorten(rows, 400)}"
                    same(places(retrieve(e, k, idf=idf), e), order[:k], case)

    @pytest.mark.parametrize("idf", ["okapi", "lucene"])
    def test_bm25_on_lowercased_words(self, idf):
        """Those that ROUGE counts: neither case nor what stands between words matters."""
        draw, differ = random.Random(4), 0
        for _ in range(60):
            words = ["Oslo!", "oslo", "RAIN-rain", "Café", "it's", "7"]
            texts = [" ".join(draw.choices(words, k=5)) for _ in range(7)]
            e = example(
                " ".join(draw.choices(["OSLO", "rain", "caf", "IT", "sun's", "7?"], k=4)), texts
            )
            rows = [re.findall("[a-z0-9]+", f"'tweet': '{text}'".lower()) for text in texts]
            query = re.findall("[a-z0-9]+", e.query.lower())
            scores = naive_bm25(rows, query, idf=idf)
            found = places(retrieve(e, 7, idf=idf, lowercase=True), e)
            # Different words can add up to scores that differ in the last bit alone.
            same(scores[found], -np.sort(-scores), f"{query} in {rows}", absolute=1e-9)
            assert sorted(found) == [*range(7)]
            differ += places(retrieve(e, 7, idf=idf), e) != found
        assert differ > 30

    def test_ties_go_to_the_lower_index(self):
        e = example("the rare word", ["x y z", "a rare word !", "x z y", "a rare word !"] * 30)
        order = [*range(1, 120, 2), *range(0, 120, 2)]
        assert places(retrieve(e, 120, idf="lucene"), e) == order
        assert places(retrieve(e, 7, idf="lucene"), e) == order[:7]

    @pytest.mark.parametrize("retriever", ["none", "random", "recency", "bm25"])
    def test_sizes(self, retriever):
        e = example("a", ["a b", "", "b", "c"], date="2020-01-01")
        for k in range(7):
            found = places(retrieve(e, k, retriever), e)
            assert len(set(found)) == len(found) == (0 if retriever == "none" else min(k, 4))
        assert retrieve(example("a"), 3, retriever) == []
        with pytest.raises(ValueError, match="-1"):
            retrieve(e, -1, retriever)
        with pytest.raises(ValueError, match=f"{retriever}2"):
            retrieve(e, 1, f"{retriever}2")

    def test_random_depends_on_seed_and_record_alone(self):
        def draw(id, seed):
            e = example("", "abcdef", id)
            return tuple(places(retrieve(e, 3, "random", seed), e))

        assert draw("1", 0) == draw("1", 0)
        for draws in ([draw("1", n) for n in range(900)], [draw(str(n), 0) for n in range(900)]):
            assert len(set(draws)) > 115  # of 120; a fair draw misses one every 15th time

    def test_recency_puts_the_newest_first(self):
        dates = ["2016-03-14", 2014, "2016-12-01", "2016-3-20", "2015", "2016-12-01T09:30:00"]
        dates += ["2016-03-14 23:59", "2016-02", "1999-12-31"]
        e = example("", ["x"] * len(dates))
        for item, date in zip(e.profile, dates, strict=True):
            item["date"] = date
        same(places(retrieve(e, 9, "recency"), e), [2, 5, 3, 0, 6, 7, 4, 1, 8], f"dates {dates}")
        assert places(retrieve(e, 2, "recency"), e) == [2, 5]

    @pytest.mark.parametrize("date", [None, "", "today", "14.03.2016", 160314, [2016], "20", ...])
    def test_recency_without_dates_names_the_record(self, date):
        e = example("", "abc", id="4711", date="2016-03-14")
        e.profile[1]["date"] = date
        if date is ...:
            del e.profile[1]["date"]
        with pytest.raises(ValueError, match=r"4711.*47111"):
            retrieve(e, 1, "recency")


@pytest.fixture
def encoder(world):
    """A BERT over few words, its random weights large enough for texts to differ."""
    encoder = prlm.load_encoder(world / "encoder")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder


def naive_embedding(encoder, text, pooling):
    """One text alone: no batch, no mask, no padding."""
    known = encoder.tokenizer.vocabulary
    words = re.findall(r"\w+|[^\w\s]", text)[: encoder.max_length - 2]
    ids = [known[w] for w in ["[CLS]", *(w if w in known else "[UNK]" for w in words), "[SEP]"]]
    with torch.no_grad():
        hidden = encoder(torch.tensor([ids]))[0]
    vector = (hidden.mean(0) if pooling == "mean" else hidden[0]).numpy()
    return vector / np.linalg.norm(vector)


def random_texts(count, seed, longest=80):
    draw, words = random.Random(seed), ["tennis", "golf", "paris", "oslo", "wins", "unknown"]
    return [" ".join(draw.choices(words, k=draw.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
class TestDense:
    def test_equals_one_text_at_a_time(self, encoder, pooling):
        """Neither the padding nor the others in its batch change a vector."""
        texts = random_texts(17, 0)
        expected = np.array([naive_embedding(encoder, text, pooling) for text in texts])
        for size in (1, 4, 64):
            vectors = Dense(encoder, pooling, batch_size=size).embed(texts)
            assert vectors.shape == expected.shape and np.abs(vectors - expected).max() < 1e-5

    def test_ranks_by_cosine(self, encoder, pooling):
        dense = Dense(encoder, pooling, "golf oslo ")
        for seed in range(2):
            e = example(f" paris {seed} wins ", random_texts(12, seed, 9))
            query = naive_embedding(encoder, "golf oslo " + e.query, pooling)
            texts = [f"'tweet': '{item['text']}'" for item in e.profile]
            scores = np.array([naive_embedding(encoder, t, pooling) @ query for t in texts])
            assert dense.scores(e.query.strip(), texts) == pytest.approx(scores, abs=1e-5)
            found = places(retrieve(e, 12, "dense", dense=dense), e)
            assert sorted(found) == list(range(12)) and (np.diff(scores[found]) < 1e-5).all()
            assert places(retrieve(e, 5, "dense", dense=dense), e) == found[:5]
        assert np.abs(Dense(encoder, pooling).scores(e.query, texts) - scores).max() > 1e-3

    def test_the_profiles_asked_for_last_are_kept(self, encoder, pooling, monkeypatch):
        monkeypatch.setattr(Dense, "most", 2)
        dense = Dense(encoder, pooling)
        for text in ("golf", "tennis", "golf", "paris"):
            scores = dense.scores("oslo", [text])
            assert scores == pytest.approx(Dense(encoder, pooling).scores("oslo", [text]), abs=1e-6)
        assert [*dense.profiles] == [("golf",), ("paris",)]

    def test_a_profile_is_embedded_once(self, encoder, pooling, monkeypatch):
        """And never mixed up: LaMP's item ids repeat across records, with other texts."""
        dense, embedded = Dense(encoder, pooling), []
        embed = dense.embed
        monkeypatch.setattr(dense, "embed", lambda texts: embedded.extend(texts) or embed(texts))
        one, other = (example("tennis", random_texts(6, seed)) for seed in (1, 2))
        for e in (one, other, one, other, one):
            fresh = retrieve(e, 6, "dense", dense=Dense(encoder, pooling))
            assert places(retrieve(e, 6, "dense", dense=dense), e) == places(fresh, e)
        assert len(embedded) == 6 + 6 + 5

    def test_bad_calls_are_refused(self, encoder, pooling):
        with pytest.raises(ValueError, match="encoder"):
            retrieve(example("a", "bc"), 1, "dense")
        with pytest.raises(ValueError, match=f"{pooling}2"):
            Dense(encoder, f"{pooling}2")
        encoder.tokenizer = None
        with pytest.raises(ValueError, match="tokenizer"):
            Dense(encoder, pooling)


SOUP = ["it's", "some!", "words?'", "'", "a''b", "éé中", "\U0001f600", "of", "a", "b!'"]


@pytest.fixture(params=["bytes", "merges"])
def tokenizer(request, toy_tokenizer):
    """Bytes alone, and with merges (over quotes too), where a cut changes the tokens around it."""
    if request.param == "bytes":
        return toy_tokenizer
    backend, special = byte_tokenizer(()), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(
        [module.SYSTEM, " ".join(SOUP), "'text': 'a' 'title': 'b'"], trainer
    )
    return prlm.Tokenizer(backend)


def ask(query, *items):
    """A LaMP-4 example and its items, given as (text, title)."""
    items = [{"text": text, "title": title} for text, title in items]
    return Example("1", "1", "LaMP-4", query, items, None), items


def parts(messages):
    """(the lines of the items, the instruction, the query)"""
    *items, request, query = messages[1]["content"].split("\n")
    return items, request, query


class TestPrompt:
    @pytest.mark.parametrize(("task", "key", "item", "question"), [
        ("LaMP-4", "title", "'text': 'it’s' 'title': 'B'", "'text': 'the query' 'title':"),
        ("LaMP-5", "title", "'abstract': 'C' 'title': 'B'", "'abstract': 'the query' 'title':"),
        ("LaMP-7", "tweet", "'tweet': 'it’s'", "'tweet': 'the query'"),
        ("commits", "subject", "'body': 'D' 'subject': 'B'", "'body': 'the query' 'subject':"),
    ])  # fmt: skip
    def test_parts_and_their_order(self, task, key, item, question):
        e = example(" the query ", task=task)
        one = {"title": "B ", "text": " it’s ", "abstract": "C\n", "id": "1", "date": "2016"}
        one |= {"body": "D ", "subject": "\nB"}
        system, user = messages = build_messages(e, [one, dict.fromkeys(one, "2"), one])
        assert (system["role"], user["role"]) == ("system", "user")
        for tags in ("<think>\n", "\n</think>\n<answer>\n", "\n</answer>"):
            assert system["content"].count(tags) == 1
        items, request, asked = parts(messages)
        same(items, [item, re.sub("(?<= ')(it’s|B|C|D)(?=')", "2", item), item], "the items' lines")
        start = "Based on the historical profiles provided, "
        assert request.startswith(start) and f"{{'{key}': 'generated {key}'}}" in request
        assert item.split("'")[1] in request and asked == question
        zero_shot = build_messages(e, [])  # the same, less the items and the clause about them
        assert zero_shot[0] == system
        rest = request.removeprefix(start)
        assert parts(zero_shot) == ([], rest[0].upper() + rest[1:], question)

    def test_no_prompt_is_over_budget(self, tokenizer):
        """Whatever the texts are; and instruction, quotes and order stay whole."""
        draw = random.Random(3)
        soups = iter(lambda: " ".join(draw.choices(SOUP, k=draw.randint(0, 40))), None)
        for _ in range(8):
            e, items = ask(next(soups), *[(next(soups), next(soups)[:20]) for _ in range(3)])
            full, zero_shot = build_messages(e, items), build_messages(e, [])
            sizes = [
                len(tokenizer.chat(m)) for m in (build_messages(ask("")[0], []), zero_shot, full)
            ]
            for budget in (*draw.choices(range(sizes[0], sizes[2]), k=12), *sizes, sizes[2] + 1):
                messages = build_messages(e, items, tokenizer, budget)
                size = len(tokenizer.chat(messages))
                assert size <= budget, f"a prompt of {size} tokens, {budget} allowed"
                same(messages[0], full[0], "the system message")
                if budget >= sizes[2]:
                    same(messages, full, f"budget {budget}, the whole prompt has {sizes[2]}")
                lines, request, asked = parts(messages)
                assert request == parts(full if lines else zero_shot)[1]
                kept = asked.removesuffix("' 'title':").removeprefix("'text': '")
                assert e.query.startswith(kept) and (len(kept) == len(e.query) or budget < sizes[1])
                left = iter(items)
                for line in lines:  # an item may be missing, but none is out of order
                    text, title = re.fullmatch("'text': '(.*)' 'title': '(.*)'", line).groups()
                    assert any(
                        i["text"].strip().startswith(text) and i["title"].strip().startswith(title)
                        for i in left
                    )

    def test_long_items_use_the_budget_and_share_it(self, tokenizer):
        e, items = ask("some words", *[("abc it's " * 150 + "!", f"Title {n}") for n in range(4)])
        least = len(tokenizer.chat(build_messages(e, [])))
        for budget in (*range(least + 300, least + 330), least + 600, least + 1200):
            messages = build_messages(e, items, tokenizer, budget)
            size = len(tokenizer.chat(messages))
            assert budget - 6 <= size <= budget, f"{size} tokens, {budget} allowed and needed"
            lines = parts(messages)[0]
            assert [line[-9:] for line in lines] == [f"'Title {n}'" for n in range(4)]
            sizes = [len(tokenizer.encode(line)) for line in lines]
            assert max(sizes) - min(sizes) <= 6, f"four equal items got {sizes} tokens"

    def test_what_short_items_leave_goes_to_later_ones(self, tokenizer):
        long = "abc it's " * 300
        e, items = ask("some words", ("a", "A"), (long, "B"), ("", "C"), (long, "D"))
        budget = len(tokenizer.chat(build_messages(e, []))) + 800
        messages = build_messages(e, items, tokenizer, budget)
        size = len(tokenizer.chat(messages))
        assert budget - 6 <= size <= budget, f"{size} tokens, {budget} allowed and needed"
        a, b, c, d = parts(messages)[0]
        assert (a, c) == ("'text': 'a' 'title': 'A'", "'text': '' 'title': 'C'")
        assert b.endswith("' 'title': 'B'") and d.endswith("' 'title': 'D'")
        first, *_ = sizes = [len(tokenizer.encode(line)) + 1 for line in (a, b, c, d)]
        assert abs(sizes[1] - (sum(sizes) - first) / 3) <= 6, f"the items got {sizes} tokens"

    @pytest.mark.parametrize("unit", ["x", "word ", "\U0001f600", "中", "e\u0301", "it's! "])
    def test_an_item_loses_the_end_of_its_text_first(self, tokenizer, unit):
        e, items = ask("q", (unit * 16 + "!", "The Title"))
        full, bare = (build_messages(e, i) for i in (items, [{"text": "", "title": "The Title"}]))
        for budget in range(len(tokenizer.chat(bare)) + 8, len(tokenizer.chat(full))):
            messages = build_messages(e, items, tokenizer, budget)
            (text,) = re.findall("'text': '(.*)' 'title': 'The Title'", parts(messages)[0][0])
            assert items[0]["text"].startswith(text) and text != items[0]["text"]
            size = len(tokenizer.chat(messages))
            assert budget - 12 <= size <= budget, f"{size} tokens, {budget} allowed and needed"

    def test_the_query_is_served_first(self, tokenizer):
        e, items = ask("the whole query", ("abc " * 50, "Title"))
        zero_shot, bare = build_messages(e, []), len(tokenizer.chat(build_messages(ask("")[0], [])))
        fits = len(tokenizer.chat(zero_shot))
        assert build_messages(e, items, tokenizer, fits) == zero_shot
        for budget in range(bare, fits):
            lines, _, asked = parts(messages := build_messages(e, items, tokenizer, budget))
            query = asked.removeprefix("'text': '").removesuffix("' 'title':")
            assert not lines and e.query.startswith(query) and query != e.query
            size = len(tokenizer.chat(messages))
            assert budget - 4 <= size <= budget, f"{size} tokens, {budget} allowed and needed"
        for shown in (items, []):
            with pytest.raises(ValueError, match=f"{bare - 1}.*{bare}"):
                build_messages(e, shown, tokenizer, bare - 1)

    def test_a_hundred_thousand_words(self, toy_tokenizer):
        e, items = ask("query", ("b", "B"), ("a " * 100_000, "Title"))
        assert len(toy_tokenizer.chat(build_messages(e, items, toy_tokenizer, 700))) > 695
        e, items = ask("a " * 100_000)
        assert len(toy_tokenizer.chat(build_messages(e, items, toy_tokenizer, 700))) > 695

    def test_half_a_surrogate_pair(self, toy_tokenizer):
        """JSON can hold a tweet that was cut inside an emoji; a tokenizer refuses such text."""
        e, items = ask("half \ud83d", ("\ude00 other half", "\ud83d"))
        for budget in (600, 2000):
            messages = build_messages(e, items, toy_tokenizer, budget)
            assert len(toy_tokenizer.chat(messages)) <= budget

    def test_every_option_counts(self, toy_tokenizer):
        texts = ["x " * 70, "y", "z a z", "z a z z", "A", "w z a z"]  # "a" in half of them, or in 4
        e, prompts = example("a", texts), set()
        base = module.PromptOptions(task="LaMP-7", k=2, max_prompt_tokens=800)
        for change in ({}, {"k": 3}, {"k": 0}, {"max_prompt_tokens": 600}, {"idf": "lucene"},
                       {"retriever": "random"}, {"retriever": "random", "seed": 4},
                       {"lowercase": True}):  # fmt: skip
            o = replace(base, **change)
            items = retrieve(e, o.k, o.retriever, o.seed, None, o.idf, o.lowercase)
            messages = build_messages(e, items, toy_tokenizer, o.max_prompt_tokens)
            prompt = toy_tokenizer.chat(messages)
            assert module.make_prompts(o, toy_tokenizer, [e, e]) == [prompt, prompt]
            assert len(prompt) <= o.max_prompt_tokens
            prompts.add(tuple(prompt))
        assert len(prompts) == 8

    @pytest.mark.parametrize("opens", [False, True])
    def test_without_reasoning_the_prompt_closes_it(self, toy_tokenizer, opens):
        """Whether the chat format has opened the reasoning block already or not."""
        toy_tokenizer.opening = "<think>\n" if opens else ""
        e, items = ask("query", ("b", "B"), ("x " * 100, "Title"))
        o = module.PromptOptions(k=2, max_prompt_tokens=700, reasoning=False)
        (prompt,) = module.make_prompts(o, toy_tokenizer, [replace(e, profile=items)])
        said = "\n</think>\n\n" if opens else "<think>\n\n</think>\n\n"
        assert prompt[-len(said) :] == toy_tokenizer.encode(said)
        assert 690 < len(prompt) <= 700
        assert module.assistant_start(o, toy_tokenizer) == "<think>\n\n</think>\n\n"
        assert (
            module.assistant_start(replace(o, reasoning=True), toy_tokenizer) == "<think>\n" * opens
        )


def test_command_writes_whole_rankings(tmp_path):
    profile = [ITEM | {"id": str(n), "text": text} for n, text in enumerate("abcd")]
    records = [record("1", "z 'c'", profile=profile), record("2", profile=[])]
    write(tmp_path, records, {"1": "", "2": ""})
    out = tmp_path / "ranking.json"
    module.main(module.Options(data=str(tmp_path), show=0, out=str(out)))
    assert json.loads(out.read_text()) == {"1": ["2", "0", "1", "3"], "2": []}


def test_doctests():
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
