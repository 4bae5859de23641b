"""LaMP is read exactly, retrievers rank as naive loops do, no prompt is over its budget."""

import json
import math
import random
import re
import time
import typing
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import tokenizers
import torch
from conftest import byte_tokenizer, random_texts, same, shake, shorten

import prlm
import retrieve as module
from retrieve import BM25, Example, PromptOptions, build_messages, embed, load_lamp, retrieve

PREFIX = {name: task.prefix for name, task in module.TASKS.items()}
ITEM = {"text": "a text", "title": "A Title", "id": "3000"}


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

    def test_users_ids_queries_and_outputs(self, tmp_path):
        """By id, not order; one may be a number. Only the prefix at the start goes from a query."""
        users, outputs = ["u1", "u1", 7, None, None], ["gold 0", "gold 1", "gold 2", "gold 3", ""]
        queries = [" two  blanks ", PREFIX["LaMP-7"] + "twice", "", "Generate a", "b"]
        records = [record(str(n), q, "LaMP-7", user_id=users[n]) for n, q in enumerate(queries)]
        golds = [{"id": n, "output": gold} for n, gold in enumerate(outputs)]
        records.append({"id": "9", "input": "no prefix", "profile": []})
        write(tmp_path, records, [{"id": "9", "output": "a"}, *golds[::-1]], task="LaMP_7")
        loaded = load_lamp(tmp_path, "LaMP-7", "dev")
        assert [e.user_id for e in loaded] == ["u1", "u1", "7", "3", "4", "9"]
        assert [e.target for e in loaded] == [*outputs, "a"]
        assert [e.query for e in loaded] == [*queries, "no prefix"]

    def test_only_the_test_split_may_lack_outputs(self, tmp_path):
        """And they come from the folder of the questions."""
        write(tmp_path / "LaMP_4_time", [record()], {"300": "another user's"}, split="test")
        for split in ("train", "test"):
            write(tmp_path / "LaMP_4", [record()], split=split)
        assert load_lamp(tmp_path, "LaMP-4", "test")[0].target is None
        with pytest.raises(FileNotFoundError, match="train_outputs"):
            load_lamp(tmp_path, "LaMP-4", "train")
        with pytest.raises(ValueError, match="LaMP_4"):
            load_lamp(tmp_path, "LaMP_4", "test")

    @pytest.mark.parametrize(("bad", "golds", "named"), [
        *((bad, {"300": "a", "301": "b"}, "questions.json.*record 1") for bad in (
            None, {"input": None}, {"profile": "a"}, {"profile": [ITEM, {"text": 1, "title": "t"}]},
        )), ({}, 7, "outputs.json"),
        ({"id": "300"}, {"300": "a"}, "questions.json.*300"), ({}, {"300": "a"}, "'301'"),
        ({}, {"300": "a", "301": None}, "outputs.json"),
        ({}, [{"id": id, "output": "a"} for id in ("300", 300, "301")], "'300'"),
    ])  # fmt: skip
    def test_malformed_records_and_outputs_of_others_are_named(self, tmp_path, bad, golds, named):
        """By the place in the file, or by the id where the record is whole."""
        bad = record("301") | bad if isinstance(bad, dict) else bad
        write(tmp_path, [record("300"), bad], golds)
        with pytest.raises(ValueError, match=f"dev_.*{named}"):
            load_lamp(tmp_path, "LaMP-4", "dev")
        write(tmp_path, [record()], {"300": "gold"}, task="LaMP_5")
        with pytest.raises(ValueError, match=r"dev_outputs\.json.*LaMP_5"):
            load_lamp(tmp_path, "LaMP-4", "dev")

    @pytest.mark.parametrize("ascii", [True, False])
    def test_every_character_survives(self, tmp_path, ascii):
        odd = "é \u2028 \x85 \u00e2\x99\u00ab \x9f &quot;a&amp;b&quot; \U0001f600 \r\n'\"\\ z"
        odd += " \ud83d z" * ascii  # raw UTF-8 cannot hold half a pair
        items = [{"text": odd, "title": odd}]
        write(tmp_path, [record(f"3{odd}", odd, profile=items)], {f"3{odd}": odd})
        for path in tmp_path.iterdir():  # with a BOM, and Windows line ends between the values
            text = json.dumps(json.loads(path.read_text()), ensure_ascii=ascii, indent=1)
            path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        (e,) = load_lamp(tmp_path, "LaMP-4", "dev")
        assert e.query == e.target == e.profile[0]["title"] == e.profile[0]["text"] == odd
        assert build_messages(e, retrieve(e, 1))[1]["content"].count(odd) == 3
        assert e.id == f"3{odd}" and retrieve(e, 1, "random") == items


@pytest.mark.parametrize(("targets", "warnings"), [(["日本語", "Ярче!"], 1), (["日本語", "7"], 0)])
def test_what_rouge_cannot_count_is_said_once(tmp_path, capsys, targets, warnings):
    write(tmp_path, [record("0"), record("1")], dict(zip("01", targets)), "test")
    write(tmp_path, [], {})
    o = PromptOptions(data=str(tmp_path))
    assert [e.target for e in module.load_examples(o, "test")] == targets
    assert capsys.readouterr().out.count("a-z and 0-9") == warnings
    assert [e.id for e in module.load_examples(replace(o, limit=1), "test")] == ["0"]
    with pytest.raises(ValueError, match=rf"{tmp_path}.*dev.*LaMP-4"):  # which is empty
        module.load_examples(o, "dev")


def test_one_more_task_is_one_more_entry(tmp_path, monkeypatch):
    assert [*PREFIX] == [*typing.get_args(module.TaskName)]
    mine = module.Task("Answer: ", {"q": "question", "a": "reply"}, "write it.", penalty=-2.0)
    monkeypatch.setitem(module.TASKS, "my_mails", mine)
    good = {"id": 1, "input": "Answer: how?", "profile": [{"q": "why?", "a": "so"}]}
    write(tmp_path / "my_mails", [good], {1: "thus"}, task="my_mails")
    (e,) = load_lamp(tmp_path, "my_mails", "dev")
    assert (e.query, e.target, mine.answer) == ("how?", "thus", "reply")
    user = build_messages(e, retrieve(e, 1))[1]["content"]
    assert user.startswith("'question': 'why?' 'reply': 'so'\nBased on ")
    assert "{'reply': 'generated reply'}" in user
    assert user.endswith("'question': 'how?' 'reply':")


def naive_bm25(corpus, query, k1=1.5, b=0.75, idf="okapi"):
    """The formula, a word and a document at a time."""
    held = {w: sum(w in text for text in corpus) for text in corpus for w in text}
    odds = {w: (len(corpus) - n + 0.5) / (n + 0.5) for w, n in held.items()}
    weight = {w: math.log(x + (idf == "lucene")) for w, x in odds.items()}
    floor = 0.25 * sum(weight.values()) / len(weight)
    weight = {w: floor if value < 0 else value for w, value in weight.items()}
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
    for corpus, query in [([list("aaabb"), ["a"]], ["a"]), *random_corpora(400, seed=2)]:
        for how in ({}, {"k1": 0.9, "b": 0.4}):
            theirs = okapi(corpus, **how).get_scores(query)
            assert BM25(corpus, **how).scores(query).tolist() == theirs.tolist()


class TestBM25:
    @pytest.mark.parametrize("how", [(1.5, 0.75), (0, 0.5), (2.0, 0.0), (1.2, 1.0)])
    @pytest.mark.parametrize("idf", ["okapi", "lucene"])
    def test_equals_the_formula(self, idf, how):
        for corpus, query in random_corpora(50, seed=1):
            scores = BM25(corpus, *how, idf=idf).scores(query)
            expected = naive_bm25(corpus, query, *how, idf)
            same(scores, expected, f"BM25({corpus}).scores({query})", absolute=1e-9)
            shared = [any(word in text for word in query) for text in corpus]
            assert idf == "okapi" or ((scores > 0) == shared).all()

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("idf", ["okapi", "lucene"])
    def test_nothing_to_find(self, idf):
        assert BM25([], idf=idf).scores(["a"]).shape == (0,)
        assert BM25([[], []], idf=idf).scores(["a"]).tolist() == [0, 0]
        assert BM25([["a"], []], idf=idf).scores([]).tolist() == [0, 0]
        assert BM25([["a"], [], ["b"]], idf=idf).scores(["unknown", "b"])[:2].tolist() == [0, 0]
        with pytest.raises(ValueError, match=f"{idf}2"):
            BM25([["a"]], idf=f"{idf}2")


class TestRetrieve:
    def test_bm25_ranks_as_a_naive_loop(self):
        """Over the text as it is shown, split at blanks; ties, at 0 too, keep their order."""
        for corpus, query in random_corpora(60, seed=2):
            e = example(" ".join(query), map(" ".join, corpus), task="LaMP-4")
            for n, item in enumerate(e.profile):
                item["title"] = f" w{n % 3} w{n % 4} "
            rows = [f"'text': '{i['text']}' 'title': '{i['title'].strip()}'" for i in e.profile]
            for retriever, idf in (("bm25", "okapi"), ("lucene", "lucene")):
                scores = naive_bm25([row.split() for row in rows], query, idf=idf).round(9)
                order = np.argsort(-scores, kind="stable").tolist()
                for k in (1, 3, len(rows), len(rows) + 5):
                    case = f"k {k}, {retriever}, query {e.query!r}, items {shorten(rows, 400)}"
                    same(places(retrieve(e, k, retriever), e), order[:k], case)

    @pytest.mark.parametrize("retriever", ["none", "random", "recency", "bm25", "lucene"])
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
        e = example("", ["x"] * len(dates), id="4711")
        for item, date in zip(e.profile, dates, strict=True):
            item["date"] = date
        same(places(retrieve(e, 9, "recency"), e), [5, 2, 3, 6, 0, 7, 4, 1, 8], f"dates {dates}")
        for wrong in ({"date": None}, {"date": "14.3.2016"}, {"date": 160314}, {}):
            e.profile[1] = {"text": "x", **wrong}
            with pytest.raises(ValueError, match="4711"):
                retrieve(e, 1, "recency")


@pytest.fixture
def encoder(world):
    return shake(prlm.load_encoder(world / "encoder"))


def naive_embedding(encoder, text):
    """One text alone: no batch, no mask, no padding."""
    known = encoder.tokenizer.backend.get_vocab()
    words = re.findall(r"\w+|[^\w\s]", text)[: encoder.max_length - 2]
    ids = [known[w] for w in ["[CLS]", *(w if w in known else "[UNK]" for w in words), "[SEP]"]]
    with torch.no_grad():
        vector = encoder(torch.tensor([ids]))[0].mean(0).numpy()
    return vector / np.linalg.norm(vector)


class TestDense:
    def test_ranks_by_cosine(self, encoder):
        """Of one text at a time: neither the padding nor the others in its batch change a score."""
        e = example(" paris wins ", random_texts(67, 80))
        texts = [f"'tweet': '{item['text']}'" for item in e.profile]
        query = naive_embedding(encoder, e.query)
        scores = np.array([naive_embedding(encoder, text) @ query for text in texts])
        cosines = embed(encoder, (*texts,)) @ embed(encoder, (e.query.strip(),))[0]
        assert cosines == pytest.approx(scores, abs=1e-5)
        found = places(retrieve(e, 67, "dense", encoder=encoder), e)
        assert sorted(found) == list(range(67)) and (np.diff(scores[found]) < 1e-5).all()
        assert places(retrieve(e, 5, "dense", encoder=encoder), e) == found[:5]

    def test_bert_and_a_profile_are_read_once(self, world, toy_tokenizer, monkeypatch):
        """And no profile passes for another: LaMP's item ids repeat, with other texts."""
        loaded, seen, load, encode = [], [], prlm.load_module, prlm.Tokenizer.encode_pair
        encode_pair = lambda *a: seen.append(a[1]) or encode(*a)  # noqa: E731
        monkeypatch.setattr(prlm, "load_module", lambda *a: loaded.append(a) or load(*a))
        monkeypatch.setattr(prlm.Tokenizer, "encode_pair", encode_pair)
        module.load_once.cache_clear()
        o = PromptOptions(task="LaMP-7", retriever="dense", encoder=str(world / "encoder"), k=3)
        one, other = (example("tennis", random_texts(6, 9, seed)) for seed in (1, 2))
        prompts = [module.make_prompts(o, toy_tokenizer, [one, other]) for _ in range(3)]
        assert prompts[0] == prompts[1] == prompts[2] and prompts[0][0] != prompts[0][1]
        assert len(loaded) == 1 and len(seen) == 6 + 6 + 1  # profiles, and the query of both
        for e, prompt in zip((one, other), prompts[0], strict=True):
            items = retrieve(e, 3, "dense", encoder=prlm.load_encoder(world / "encoder"))
            assert prompt == toy_tokenizer.chat(build_messages(e, items, toy_tokenizer, 512))
        for lacks in (None, mock.Mock(tokenizer=None)):
            with pytest.raises(ValueError, match=r"--encoder DIRECTORY.*tokenizer\.json"):
                retrieve(one, 5, "dense", encoder=lacks)


SOUP = ["it's", "some!", "words?'", "'", "a''b", "éé中", "\U0001f600", "of", "a", "b!'"]


@pytest.fixture
def tokenizer():
    """Bytes and merges, over quotes too: a cut changes the tokens around it."""
    backend, special = byte_tokenizer(()), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [module.SYSTEM, " ".join(SOUP), "'text': 'a' 'title': 'b'"]
    backend.train_from_iterator(texts, trainer)
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
    @pytest.mark.parametrize("opens", [False, True])
    def test_closed_reasoning_has_the_ids_of_the_whole_text(self, opens):
        """Two line ends are one token of Qwen's, also where the chat has said the first one."""
        special = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
        content = json.loads(byte_tokenizer(special).to_str())
        content["model"]["vocab"]["ĊĊ"] = 300
        content["model"]["merges"] = [["Ċ", "Ċ"]]
        tokenizer = prlm.Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
        tokenizer.opening = "<think>\n" if opens else ""
        e, items = ask("query", ("b", "B"), ("x " * 100, "Title"))
        o = PromptOptions(k=2, reasoning=False, max_prompt_tokens=700)
        (prompt,) = module.make_prompts(o, tokenizer, [replace(e, profile=items)])
        begin, end = (tokenizer.control[name] for name in ("<think>", "</think>"))
        assert prompt[-4:] == [begin, 300, end, 300] and 690 < len(prompt) <= 700

    @pytest.mark.parametrize(("task", "key", "item", "question"), [
        ("LaMP-4", "title", "'text': 'it’s' 'title': 'B'", "'text': 'the query' 'title':"),
        ("LaMP-7", "tweet", "'tweet': 'it’s'", "'tweet': 'the query'"),
    ])  # fmt: skip
    def test_parts_and_their_order(self, task, key, item, question):
        e = example(" the query ", task=task)
        one = {"title": "B\n", "text": " it’s ", "id": "1", "date": "2016"}
        system, user = messages = build_messages(e, [one, dict.fromkeys(one, "2"), one])
        assert (system["role"], user["role"]) == ("system", "user")
        for tags in ("<think>\n", "\n</think>\n<answer>\n", "\n</answer>"):
            assert system["content"].count(tags) == 1
        items, request, asked = parts(messages)
        same(items, [item, re.sub("(?<= ')(it’s|B)(?=')", "2", item), item], "the items' lines")
        start = "Based on the historical profiles provided, "
        assert request.startswith(start) and f"{{'{key}': 'generated {key}'}}" in request
        assert item.split("'")[1] in request and asked == question
        zero_shot = build_messages(e, [])  # the same, less the items and the clause about them
        assert zero_shot[0] == system
        rest = request.removeprefix(start)
        assert parts(zero_shot) == ([], rest[0].upper() + rest[1:], question)

    def test_fields_are_cut_to_the_largest_number_of_tokens_that_fits(self, tokenizer):
        """A naive loop finds the same prompt, whatever the texts are: over the number of items,
        which shrinks only where one token of each field is too much, and the tokens of a field.
        The query has as many as all fields of the items, so that items do not crowd it out."""
        draw = random.Random(3)
        soups = iter(lambda: " ".join(draw.choices(SOUP, k=draw.randint(0, 9))), None)
        for _ in range(3):
            e, items = ask(next(soups), *[(next(soups), next(soups)[:20]) for _ in range(3)])

            def cut_to(count, n, e=e, items=items):
                shown = [{k: tokenizer.cut(x.strip(), n) for k, x in i.items()} for i in items]
                query = tokenizer.cut(e.query.strip(), n * max(1, 2 * count))
                messages = build_messages(replace(e, query=query), shown[:count])
                return len(tokenizer.chat(messages)), messages

            # In the order of preference; 80 tokens are more than any field has.
            every = [cut_to(count, n) for count in (3, 2, 1) for n in range(80, 0, -1)]
            every += [cut_to(0, n) for n in range(80, -1, -1)]
            (most, whole), (least, _) = every[0], every[-1]
            assert build_messages(e, items, tokenizer, most + 1) == whole
            for budget in (*draw.choices(range(least, most), k=30), least, most):
                expected = next(messages for size, messages in every if size <= budget)
                same(build_messages(e, items, tokenizer, budget), expected, f"budget {budget}")
            with pytest.raises(ValueError, match=f"bare instruction.*{least - 1}"):
                build_messages(e, items, tokenizer, least - 1)

    @pytest.mark.parametrize(("query", "items"), [
        ("query", [("b", "B"), ("a " * 30_000, "Title")]), ("a " * 30_000, []),
        ("half \ud83d", [("\ude00 other half " * 20, "\ud83d")]),  # which no tokenizer takes
        ("query", [(f"{n} word " * 60, "t") for n in range(200)]),
    ])  # fmt: skip
    def test_long_texts_many_items_and_half_a_surrogate_pair(self, toy_tokenizer, query, items):
        """The budget is nearly used up, in seconds."""
        begun = time.process_time()
        messages = build_messages(*ask(query, *items), toy_tokenizer, 700)
        assert 690 < len(toy_tokenizer.chat(messages)) <= 700
        assert time.process_time() - begun < 5


def test_command_shows_a_prompt(world, tmp_path, capsys):
    profile = [ITEM | {"id": str(n), "text": text} for n, text in enumerate("abcd")]
    records = [record("1", "z 'c'", profile=profile), record("2", profile=[])]
    write(tmp_path, records, {"1": "", "2": ""})
    module.main(module.Options(model=str(world / "policy"), data=str(tmp_path), k=1))
    said = capsys.readouterr().out
    assert "record 1: " in said and "'text': 'c' 'title': 'A Title'" in said and "2:" not in said
