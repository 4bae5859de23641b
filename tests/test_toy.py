"""The toy world is what its README says; the experiments' statistics and the page are right."""

import json
import random
import re
import runpy
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import experiments
import make
import numpy as np
import page
import pytest
import tokenizers
import trl_example
from conftest import write_lamp

import eval as scoring
import prlm
import retrieve
import rl
from reward import RewardOptions, rewards
from toy import common

TOY = Path(__file__).parent.parent / "toy"


class TestWorld:
    def test_both_hops_are_in_the_profile(self):
        for seed in range(200):
            user = make.make_user(random.Random(seed))
            query = user.query
            assert 12 <= len(user.posts) <= 24
            assert {post.named for post in user.posts if user.tells(post)} == {query.column}
            assert {post.motto for post in user.posts if user.shows(post)} == {query.motto}
            assert query.keyword not in {post.keyword for post in user.posts}
            assert {post.sign_off for post in user.posts} == {query.sign_off}

    def test_careful_reasoning_finds_the_target(self):
        """From two posts, one that names the column and one that shows its motto."""
        phase = make.Phase("", 1.0, [4], thorough=0.5, careful=0.5, careless=0.0)
        for seed in range(50):
            rng = random.Random(seed)
            user = make.make_user(rng)
            posts = [next(filter(useful, user.posts)) for useful in (user.tells, user.shows)]
            reasoning, answer = make.think(rng, user, posts, phase)
            assert answer.headline == user.query.headline
            assert f"{user.query.day} {user.query.column} {user.query.motto}" in reasoning


class TestStatistics:
    def test_users_seeds_and_both_have_the_intervals_of_their_normal_theory(self):
        """Differences are normal in users and in seeds, so all three deviations are known."""
        rng = np.random.default_rng(2)
        users, seeds = rng.normal(0.03, 0.4, 400), np.array([[-0.02], [0.0], [0.02]])
        found = common.bootstrap(users + seeds)
        deviations = {"users": 1.96 * users.std(ddof=1) / 20, "seeds": 4.303 * 0.02 / 3**0.5}
        for unit, half in deviations.items():
            expected = [users.mean() - half, users.mean() + half]
            assert [*found[unit][1:]] == pytest.approx(expected, abs=0.006)
        width = {unit: high - low for unit, (_, low, high) in found.items()}
        together = np.hypot(width["users"], width["seeds"])  # exact if both were normal
        assert max(width["users"], width["seeds"]) < width["both"] < 1.1 * together

    def test_a_difference_is_told_from_none_and_one_seed_says_nothing_of_seeds(self):
        rng = np.random.default_rng(1)
        scores = rng.random(200)
        found = common.bootstrap(rng.normal(0.1, 0.2, 200))
        assert found.keys() == {"users"} and found["users"][0] < 0.001
        p, low, high = common.bootstrap(scores - scores[::-1])["users"]
        assert p > 0.3 and low < 0 < high
        # Two policies that differ by chance of training alone: users are sure of it, seeds are not.
        found = common.bootstrap(np.array([[0.05], [-0.01], [-0.005]]) + np.zeros(200))
        assert found["users"][0] < 0.001 and found["seeds"][0] > 0.5 and found["both"][0] > 0.5

    def test_means_leave_out_what_says_nothing(self):
        assert common.mean([[1.0, np.nan, 3.0], [4.0, np.nan, 4.0]]) == "3.000 ± 1.414"
        assert common.mean([0.5]) == "0.500" and common.mean([]) == "–"


class TestExperiments:
    """One task, one seed, a step an arm, a handful of users, their own prompts and rollouts."""

    @pytest.fixture(scope="class")
    @classmethod
    def o(cls, tmp_path_factory):
        out = tmp_path_factory.mktemp("experiments")
        users = [make.make_user(random.Random(n)) for n in range(14)]
        make.write_lamp("LaMP-4", {"train": users[:8], "dev": users[8:]}, out / "lamp")
        small = {"prompts_per_step": 2, "group_size": 2, "pairs_per_query": 1, "max_new_tokens": 64}
        arms = {arm: (name, o | small) for arm, (name, o) in experiments.ARMS.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiments, "TASKS", ["LaMP-4"])
            patch.setattr(experiments, "ARMS", arms)
            patch.setattr(common, "run_jobs", cls.run)
            yield experiments.Options(data=str(out / "lamp"), steps=1, seeds=1, out=str(out))

    @staticmethod
    def run(work, *_):
        for words, result in (command for job in work.values() for command in job):
            if not result.is_file():
                chapter = {"rl.py": rl, "eval.py": scoring}[words[1]]
                given = prlm.parse_flags(chapter.Options, "", words[2:])
                chapter.main(prlm.resolve(chapter.Options, given))

    def test_the_main_table(self, o):
        o = replace(o, quick=True)
        experiments.main(o)
        text = (Path(o.out) / "report.md").read_text()
        for row in ("no profile", "RAG base", "supervised on the answers", "PrLM"):
            assert f"| {row} | 0." in text
        files = {path: path.stat().st_mtime_ns for path in Path(o.out).rglob("predictions*")}
        experiments.main(o)
        assert files == {path: path.stat().st_mtime_ns for path in files} and len(files) == 4
        config = prlm.read_json(experiments.place(o, "LaMP-4", "sft", 0) / "config.json")
        assert config["warm_start"] == 2 and config["steps"] == 0 and not config["reasoning"]
        with pytest.raises(ValueError, match="was made with"):
            experiments.main(replace(o, steps=2))

    def test_everything(self, o, monkeypatch):
        """Judges, trained, untrained and the ratio: only the last sees whose profile it is. The
        grid's cell of k and retriever as in training is the run's own score."""
        monkeypatch.setattr(experiments, "GRID", [("bm25", 4), ("random", 4)])
        monkeypatch.setattr(experiments, "RETRIEVERS", ["bm25", "random"])
        monkeypatch.setattr(experiments, "ITEMS", [4])
        experiments.main(o)
        text = (Path(o.out) / "report.md").read_text()
        line = r"(?m)^\| (PrLM|reward.*|ratio judge) \| ([.\d–]+) \| ([.\d]+) \|$"
        found = re.findall(line, text)
        assert [name for name, *_ in found] == ["PrLM", "reward model untrained", "ratio judge"]
        assert [pairs == "–" for _, pairs, _ in found] == [False, False, True]
        *blind, ratio = (float(swaps) for *_, swaps in found)
        assert blind == [0.5, 0.5] and ratio > 0.6
        run = experiments.place(o, "LaMP-4", "base", 0)
        scores = [prlm.read_json(run / f"{place}scores.json") for place in ("", "bm25_4/")]
        assert scores[0]["after"]["rouge-l"] == scores[1]["rouge-l"]


def test_the_tour_runs_as_it_is(monkeypatch, capsys):
    """At ratio 1 the loss is 0, and its step makes likelier what had the better rewards."""
    monkeypatch.setattr(sys, "path", [str(TOY), *sys.path])
    runpy.run_path(str(TOY / "tour.py"))
    said = capsys.readouterr().out
    assert abs(float(re.search(r"^loss (\S+), norm", said, re.M)[1])) < 1e-6
    assert float(said.rpartition("advantage and change: ")[2]) > 0.5


class TestTRL:
    def test_trains_with_our_prompts_and_reward(self, tmp_path):
        """Two steps of TRL's own trainer on the toy policy; its logged reward is ours."""
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        examples = retrieve.load_lamp(TOY / "lamp", "LaMP-4", "train")[:4]
        tokenizer, o = prlm.load_tokenizer(TOY / "policy"), RewardOptions(k=2)
        data = trl_example.columns(o, tokenizer, examples)
        backend = tokenizers.Tokenizer.from_file(str(TOY / "policy" / "tokenizer.json"))
        prompts = [backend.encode(text).ids for text in data["prompt"]]
        assert prompts == retrieve.make_prompts(o, tokenizer, examples)
        paid, ours = [], trl_example.trl_reward(examples)

        def watched(completions, **columns):
            paid.extend(ours(completions, **columns))
            return paid[-len(completions) :]

        how = trl.GRPOConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=48, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        data = datasets.Dataset.from_dict(data)
        trainer = trl.GRPOTrainer(str(TOY / "policy"), watched, how, data)
        trainer.train()
        logged = [line["reward"] for line in trainer.state.log_history if "reward" in line]
        assert logged == pytest.approx([sum(paid[n : n + 4]) / 4 for n in (0, 4)], rel=1e-4)
        assert max(paid) > 0.1 and trainer.state.global_step == 2

    def test_columns_chats_and_weights(self):
        good = "<think>\nhm\n</think>\n{'title': 'golf in oslo'}"
        made = [(str(n), "", "LaMP-4", "q", [], text) for n, text in enumerate(("golf", "oslo"))]
        examples = [retrieve.Example(*each) for each in made]
        pay = trl_example.trl_reward(examples[::-1], format=0.5)
        found = pay([good, [{"role": "assistant", "content": good}]], id=["0", "1"], prompt=["p"])
        assert found == [part["reward"] for part in rewards([good, good], examples, format=0.5)]
        begun = trl_example.trl_reward(examples, None, "<think>\n")  # as by R1's prompt
        assert begun(["so\n'title': 'golf'\nbut"], id=["0"]) == [0]


class Html(HTMLParser):
    """Reads a page: its text, its tags with their attributes; AssertionError if one stays open."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags = [], "", []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in ("meta", "polyline", "circle", "line"))

    def handle_endtag(self, tag):
        assert tag in ("polyline", "circle", "line") or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


HOSTILE = '</b></style><script>alert(1)</script>\x00\x1b[31m\u202e\ud800 & " onfocus="alert(1)'


class TestPage:
    @pytest.fixture
    def run(self, finished, tmp_path):
        return Path(shutil.copytree(finished, tmp_path / "run"))

    def edit(self, path, change):
        lines = prlm.read_lines(path)
        path.unlink()
        prlm.append(path, [line | change(n, line) for n, line in enumerate(lines)])

    def page(self, run, **options):
        page.main(page.Options(run=str(run), **options))
        return (run / "report.html").read_text()

    def test_is_whole_alone_and_data_cannot_break_out(self, run, world):
        html = self.page(run)
        plain = {tag for tag, _ in Html(html).tags}
        assert {"script", "img", "link", "iframe", "a"}.isdisjoint(plain)  # nothing is fetched
        assert not re.search(r"(src|href|url|@import)\s*[=(]?[\"' ]", html)
        ids = prlm.load_tokenizer(world / "policy").encode(HOSTILE)
        texts = ("id", "query", "target", "prompt", "answer")
        for path in (run / "samples.jsonl", *run.glob("held_out/*.jsonl")):
            self.edit(path, lambda n, line: {name: f"{line[name]}{HOSTILE}" for name in texts})
            self.edit(path, lambda n, line: {"tokens": ids, "logprobs": [-1.0] * len(ids)})
        settings = dict.fromkeys(("out", "k", "group_size", "warm_start", "judge"), HOSTILE)
        prlm.write_json(run / "config.json", prlm.read_json(run / "config.json") | settings)
        scores = prlm.read_json(run / "scores.json")
        prlm.write_json(run / "scores.json", scores | {HOSTILE: scores["after"]})
        html = self.page(run)
        parsed = Html(html)
        assert {tag for tag, _ in parsed.tags} <= plain | {"i", "mark"}
        assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", html)

    def test_parts_add_up_to_the_reward(self, run):
        self.edit(run / "samples.jsonl", lambda n, line: {"completion": str(n)})  # all are shown
        html = self.page(run, prompts=4)
        cards = [card for card in html.split('<article class="card">') if "advantage <b" in card]
        rewards = []
        for card in cards:
            card = card.replace("−", "-")
            *shares, reward = map(float, re.findall(r"<td>([-.\d]+)</td></tr>", card))
            factors = re.findall(r"<td>([.\d]+) × ([-.\d]+) =</td>", card)
            products = [float(weight) * float(value) for weight, value in factors]
            assert shares == pytest.approx(products, abs=0.0016)
            assert [weight for weight, _ in factors] == ["2", "0.1", "0.1"]
            assert round(sum(shares), 3) == reward
            rewards.append(reward)
        logged = [line["reward"] for line in prlm.read_lines(run / "samples.jsonl")]
        assert sorted(rewards) == pytest.approx(sorted(logged), abs=0.0016) and len(rewards) == 24

    def test_an_unfinished_run_says_what_is_missing(self, run, world):
        (run / "held_out" / "after.jsonl").unlink()
        lines, scores = prlm.read_lines(run / "metrics.jsonl"), prlm.read_json(run / "scores.json")
        (run / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n{half a li")
        prlm.write_json(run / "scores.json", {k: scores[k] for k in ("no_profile", "before")})
        assert "1 of 4 steps are done, no answers after RL." in Html(self.page(run)).text
        for name in ("samples.jsonl", "metrics.jsonl", "held_out/before.jsonl"):
            (run / name).unlink()
        assert "0 of 4 steps" in Html(self.page(run)).text
        with pytest.raises(ValueError, match=r"was not written by rl\.py or eval\.py"):
            self.page(world / "policy")

    def test_an_evaluation(self, finished, tmp_path):
        out = tmp_path / "eval"
        how = {"run": str(finished), "out": str(out), "limit": 3, "temperature": 0.0}
        scoring.main(prlm.resolve(scoring.Options, how))
        score = prlm.read_json(out / "scores.json")["rouge-l"]
        assert page.number(score) in Html(self.page(out, records=1)).text
        self.edit(out / "samples.jsonl", lambda n, line: {"target": None, "rouge-l": 0.0})
        (out / "scores.json").unlink()
        assert "None" not in Html(self.page(out)).text

    @pytest.mark.parametrize("task", list(retrieve.TASKS))
    def test_items_are_found_in_the_prompt(self, task, tmp_path):
        tokenizer, fields = prlm.load_tokenizer(TOY / "policy"), [*retrieve.TASKS[task].fields]
        write_lamp(tmp_path, task, users=20, split="dev")
        for example in retrieve.load_lamp(tmp_path, task, "dev"):
            for items in (retrieve.retrieve(example, 4), []):
                prompt = tokenizer.decode(tokenizer.chat(retrieve.build_messages(example, items)))
                found = [list(item)[: len(fields)] for item in page.items_of(prompt, task)]
                assert found == [[item[field] for field in fields] for item in items]


class TestShipped:
    def test_make_builds_the_same_files(self, tmp_path):
        """But for the weights, which take a quarter of an hour."""
        make.main(make.Options(out=str(tmp_path), pretrain_steps=1, encoder_steps=1))
        files = [*tmp_path.rglob("token*.json"), *(tmp_path / "lamp").rglob("*.json")]
        assert len(files) == 4 + 3 * 4
        for file in files:
            assert file.read_bytes() == (TOY / file.relative_to(tmp_path)).read_bytes(), file

    @pytest.mark.parametrize("task", make.TASKS)
    def test_records(self, task):
        """They fit the prompts; the answer is in no profile, whose newest item comes last."""
        tokenizer = prlm.load_tokenizer(TOY / "policy")
        assert len(tokenizer.fill(retrieve.SYSTEM)) == 1  # after a change of it, build toy/ anew
        for example in retrieve.load_lamp(TOY / "lamp", task, "dev"):
            messages = retrieve.build_messages(example, retrieve.retrieve(example, 4))
            assert len(tokenizer.chat(messages)) < 170
            assert example.target not in json.dumps(example.profile)
            newest = retrieve.retrieve(example, 1, "recency")[0]
            assert newest["date"] == example.profile[-1]["date"]
