"""ROUGE and BLEU equal the reference libraries, and a policy's answers end at the right record."""

import doctest
import functools
import itertools
import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import same, shorten
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as module
import prlm
from eval import bleu, evaluate, extract_answer, mean_scores, rouge
from retrieve import Example, PromptOptions, load_lamp

GOLDEN = [  # prediction, reference, ROUGE-1, -2, -L (rouge_score 0.1.2), BLEU (NLTK 3.10.4)
    ("The Cat sat on the mat.", "the cat sat on a mat", 5 / 6, 0.6, 5 / 6, 0.73783513),
    ("the the the cat", "the cat the dog", 0.75, 1 / 3, 0.5, 0.64754454),
    ("state-of-the-art", "state of the art", 1, 1, 1, 0.40455336),
    ("2n×4n grid", "2n4n grid", 0.4, 0, 0.4, 0.70710678),
    ("Café résumé", "cafe resume", 0, 0, 0, 0.26658377),
    ("headline", "headline", 1, 0, 1, 1), ("a", "a b", 2 / 3, 0, 2 / 3, 0.04784825),
    ("a", "b", 0, 0, 0, 0), ("", "a title", 0, 0, 0, 0), ("   ", "a title", 0, 0, 0, 0.05954673),
    ("", "", 0, 0, 0, 0), ("a title", "", 0, 0, 0, 0),
]  # fmt: skip
SOUP = ["the", "The", "cat", "a", "b", "2020", "x-y", "it's", "café", "中文", "İ", "ß", "\u212a"]
SOUP += ["É_e", "!", "'", "\u2028", "\x85", "\ud83d", "\U0001f600", "e\u0301"]
any_text = st.text(st.characters(codec=None))  # lone surrogates too
quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def soups(count, seed=0, longest=14):
    """Pairs of texts of few words in many scripts, some of them empty."""
    draw = random.Random(seed)
    for _ in range(count):
        yield tuple(" ".join(draw.choices(SOUP, k=draw.randint(0, longest))) for _ in range(2))


def naive_lcs(a, b):
    @functools.cache
    def length(i, j):  # of the first i and j tokens
        both = i and j and a[i - 1] == b[j - 1] and length(i - 1, j - 1) + 1
        return both or (max(length(i - 1, j), length(i, j - 1)) if i and j else 0)

    return length(len(a), len(b))


class TestLongestCommonSubsequence:
    def test_equals_the_table(self):
        draw = random.Random(0)
        for size, letters in itertools.product((1, 2, 3, 10, 63, 64, 65, 130), [1, 2, 4, 30] * 5):
            a, b = (draw.choices(range(letters), k=draw.randint(0, size)) for _ in "ab")
            found = module.longest_common_subsequence(a, b)
            same(found, naive_lcs(a, b), f"{shorten(a)}, {shorten(b)}")


class TestRouge:
    @pytest.mark.parametrize("row", GOLDEN)
    def test_golden_values(self, row):
        expected = dict(zip(("rouge-1", "rouge-2", "rouge-l"), row[2:5], strict=True))
        assert rouge(*row[:2]) == pytest.approx(expected, rel=1e-7)

    def test_equals_rouge_score(self):
        scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer
        scorer = scorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
        for prediction, reference in soups(400):
            theirs = [s.fmeasure for s in scorer.score(reference, prediction).values()]
            assert list(rouge(prediction, reference).values()) == theirs


class TestBleu:
    @pytest.mark.parametrize("row", GOLDEN)
    def test_golden_values(self, row):
        assert bleu(*row[:2]) == pytest.approx(row[5], rel=1e-6)

    def test_equals_nltk(self):
        nltk = pytest.importorskip("nltk.translate.bleu_score")
        smooth = nltk.SmoothingFunction().method3
        for a, b in [*soups(300, 2), *soups(100, 3, 2)]:
            a, b = list(a.lower()), list(b.lower())
            expected = nltk.sentence_bleu([b], a, smoothing_function=smooth) if a else 0
            assert bleu("".join(a), "".join(b)) == pytest.approx(expected, rel=1e-9)


ANSWERS = [  # every way of writing "A Start" that counts
    "{'title': 'A Start'}", '{"TITLE": "A Start"}', "{\n 'title':\n 'A Start'\n}",
    "{'title': 'A Start", "{title: A Start}", '"title": A Start\n', "{'title': ' A Start '},",
    "{'subtitle': 'a', 'title': 'A Start'}", "Here it is:\n{'title': 'A Start'}\nI hope so.",
    "{'title': 'generated title'}\n{'title': 'A Start'}", "{'title': 'A Start'}\n{'title': 'B'}",
    "**Title:** A Start", "**Title: A Start**", "> *Title*: A Start\n> So it is.",
    "**Title:**\n\nA Start\n\nI hope.", "{“title”: “A Start”}", "‘Title’: 'A Start'",
    '{\n  "id": 7,\n  "title": "A Start",\n  "first words": "no: a"\n}',
    # a word without quotation marks is a key at the beginning of its line alone
    "The title: no\n'title': 'A Start'\nTitle: no", "{'title': {'title': 'A Start'}}",
    "Title:\n```\n{'name': 'no'}\n```\nTitle: A Start", "So it's 'title': 'A Start'",
]  # fmt: skip


class TestExtractAnswer:
    @pytest.mark.parametrize("answer", ANSWERS)
    def test_every_form_of_an_answer(self, answer):
        for before in ("", "<think>{'title': 'no'}</think>", "<think>a</think>b\n</think>\n\n"):
            for form in ("{}", "<answer>\n{}\n</answer>", "<answer>{}</answer>\n{{'title': 'no'}}",
                         "An <answer>:\n<answer>{}", "{}</answer>'title': 'no'"):  # fmt: skip
                assert extract_answer(before + form.format(answer), "LaMP-4") == "A Start"
            for task, name in (("LaMP-7", "tweet"), ("commits", "subject")):
                swapped = answer.replace("tweet", "x").replace("title", name)
                swapped = swapped.replace("Title", name.title()).replace("TITLE", name.upper())
                assert extract_answer(before + swapped, task) == "A Start"

    @pytest.mark.parametrize(("value", "expected"), [
        ("'It\\'s a start'", "It's a start"), ('"It\'s a start"', "It's a start"),
        ("\"He said \\\"hi\\\"\"", 'He said "hi"'), ("'Job title: clerk'", "Job title: clerk"),
        ("'He said 'no', 'yes' and 'maybe''", "He said 'no', 'yes' and 'maybe'"),
        ("“It’s “late””", "It’s “late”"), ("'on $\\alpha$ and \\nu'", "on $\\alpha$ and \\nu"),
        ("'In the mayor's plan'\n'title':'no'\n'id': 'A", "In the mayor's plan"),
        ("'A {b} start', 'other words': 'x', \"year\": 'y'", "A {b} start"), ("'a, b'.", "a, b"),
    ])  # fmt: skip
    def test_what_a_value_may_hold(self, value, expected):
        for form in ("{{'title': {}}}", "'title': {}", "<answer>'title': {}</answer>",
                     "Title: {}", "**Title:**\n{}\n"):  # fmt: skip
            assert extract_answer("hm</think>" + form.format(value), "LaMP-4") == expected

    @pytest.mark.parametrize("completion", [
        "", "A Start", "{}", "{'title'}", "{'title': ''}", "'title':", "{'tweet': 'no'}",
        "{'subtitle': 'no'}", "subtitle: no", "my_title: no", "{'titles': 'no'}", "1. Title: no",
        "<think>\n{'title': 'no'}", "<think>\n{'title': 'no'}\n</think>\nno idea", "a</think>",
        "<think>a</think>\n<think>\n{'title': 'no'}", "**Title:** **", "'title': }'no'",
        "<answer>\nA Start\n</answer>\n{'title': 'no'}", "I shorten the user's title:\n\nno",
        "Title:\n```json\n{}\n```", "The title: 'no'\nIt's short.",
    ])  # fmt: skip
    def test_nothing_there(self, completion):
        """A thought is no answer, neither is one that never ends, and prose has no key."""
        assert extract_answer(completion, "LaMP-4") == ""
        swapped = completion.replace("title", "x").replace("tweet", "title").replace("Title", "X")
        assert extract_answer(swapped, "LaMP-7") == ""

    @pytest.mark.parametrize(("completion", "expected"), [
        # the placeholder is better than nothing, and nothing inside of a value is another key
        ("{'title': 'generated title'}", "generated title"),
        ("{'title': ''}\n{'title': 'Generated Title'}", "Generated Title"),
        ("{'title': 'generated title: no'}", "generated title: no"),
        ("Title: generated title\n'title': 'generated title!'", "generated title"),
        # what stands in the answer's tags comes before talk about it
        ("hm</think>\nTitle: no\n<answer>\n{'title': 'Yes'}\n</answer>", "Yes"),
        ("{'title': 'no'}\n<answer>\nTitle: Yes\n</answer>\n{'title': 'So it was'}", "Yes"),
    ])  # fmt: skip
    def test_which_of_several_counts(self, completion, expected):
        assert extract_answer(completion, "LaMP-4") == expected

    def test_placeholder(self):
        for answer in ("", " ", "generated title", "Generated Title: a start"):
            assert module.is_placeholder(answer, "LaMP-4")
        assert not module.is_placeholder("generated tweet", "LaMP-4")
        with pytest.raises(ValueError, match="LaMP-6"):
            extract_answer("", "LaMP-6")

    @quick
    @given(st.from_regex(r"[a-c]([a-c '!.:-]*[a-c!])?", fullmatch=True), any_text)
    def test_what_was_written_is_read_and_nothing_raises(self, title, thought):
        thought = thought.replace("</think>", "")
        for form in (f"{{'title': '{title}'}}", json.dumps({"title": title})):
            text = f"<think>{thought}</think>\n<answer>{form}</answer>"
            assert extract_answer(text, "LaMP-4") == title
        for text in (thought, "'title': " + thought):
            assert isinstance(extract_answer(text, "LaMP-4"), str)


def test_long_completions_take_no_longer_than_they_are_long():
    """A policy that repeats itself must not stop the training."""
    for piece in ("'title': 'x', ", "'title'*******", "- ", "<answer>", "',,,,", "' a a ", "\n"):
        for start in ("", "'title': '"):
            begun = time.process_time()
            extract_answer(start + piece * (100_000 // len(piece)), "LaMP-4")
            assert time.process_time() - begun < 1  # seconds; a quadratic search takes minutes


@pytest.mark.parametrize("size", [1, 5, 64])
def test_every_completion_goes_to_its_prompt(monkeypatch, size):
    """However prompts are batched; no two batches, and no two purposes, share their noise."""
    calls, prompts = [], [[n] * (1 + 7 * n % 5) for n in range(6)]
    tokenizer = SimpleNamespace(eos_ids={2}, opening="", decode=str)
    example = Example("0", "0", "LaMP-4", "", [], None)

    def generate(decoder, asked, group, longest, temperature, eos_ids, seed):
        calls.append((len(asked), seed))
        assert (longest, temperature, eos_ids) == (7, 0.9, {2})
        return [[prlm.Completion(prompt, [], bool(n)) for n in range(group)] for prompt in asked]

    monkeypatch.setattr(prlm, "generate", generate)
    for group in (1, 3):
        calls.clear()
        for seed, purpose in ((3, "a"), (3, "b"), (4, "a")):
            o, how = PromptOptions(max_new_tokens=7, seed=seed), (group, 0.9, (purpose,), size)
            rows = module.make_records(o, None, tokenizer, [example] * 6, prompts, *how)
            wanted = [(prompt, bool(n)) for prompt in prompts for n in range(group)]
            assert [(row["tokens"], row["finished"]) for row in rows] == wanted
        together = min(max(1, size // group), 6)
        assert max(count for count, _ in calls) == together
        assert len({seed for _, seed in calls}) == len(calls) == 3 * -(-6 // together)


class TestEvaluate:
    def test_scores_are_the_means_of_each_record(self, world):
        o, path = PromptOptions(k=2, max_new_tokens=12), world / "policy"
        examples = load_lamp(world / "lamp", "LaMP-4", "dev")
        policy = prlm.load_decoder(path), prlm.load_tokenizer(path), examples
        scores, answers = evaluate(*policy, o, 0.7)
        with_profile, without = (module.answer_all(replace(o, k=k), *policy, 0.7) for k in (2, 0))
        assert list(answers.items()) == [(r["id"], r["answer"]) for r in with_profile]
        assert all(len(a["prompt"]) > len(b["prompt"]) for a, b in zip(with_profile, without))
        assert list(scores) == ["rouge-1", "rouge-2", "rouge-l", "bleu"] and scores["rouge-1"] > 0
        for name, value in scores.items():
            pairs = [(answers[e.id], e.target) for e in examples]
            each = [(rouge(*pair) | {"bleu": bleu(*pair)})[name] for pair in pairs]
            assert value == pytest.approx(sum(each) / len(each), rel=1e-9)
        withheld = [examples[0], replace(examples[1], target=None)]
        records = module.answer_all(o, *policy[:2], withheld)
        assert ["rouge-l" in r for r in records] == [True, False]
        assert mean_scores(records) == mean_scores([]) == {}


@pytest.mark.parametrize("chapter", [module, prlm])
def test_doctests(chapter):
    result = doctest.testmod(chapter)
    assert result.attempted and not result.failed
