"""The toy world is what its README says; the experiments' statistics and the page are right."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import experiments
import make
import numpy as np
import page
import pytest
import tokenizers
import torch
import trl_example
from conftest import write_lamp

import prlm
import retrieve
from reward import RewardOptions, rewards

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

    @pytest.mark.parametrize("task", make.TASKS)
    def test_lamps_files_hold_the_users(self, tmp_path, task):
        users = [make.make_user(random.Random(seed)) for seed in range(4)]
        make.write_lamp(task, {"train": users[:3], "dev": users[3:]}, tmp_path)
        examples = retrieve.load_lamp(tmp_path, task, "train")
        assert [e.target for e in examples] == [user.query.headline for user in users[:3]]
        for example, user in zip(examples, users, strict=False):
            assert len(example.profile) == len(user.posts)
            assert retrieve.retrieve(example, 3, "recency")[0]["date"] == user.posts[-1].date
            assert example.target not in json.dumps(example.profile)

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


class TestPretraining:
    def test_one_head_sees_the_token_before(self):
        decoder = prlm.Decoder(make.policy_config(make.make_tokenizer()))
        make.look_back(decoder)
        heads = []  # of each layer the attention of the first two queries to the first key head

        def attend(layer, q, k, v):
            scores = torch.einsum("qhd,kd->hqk", q[:, :2], k[:, 0]) * q.shape[-1] ** -0.5
            heads.append(scores.masked_fill(torch.ones(60, 60).triu(1) > 0, -1e9).softmax(-1))
            return torch.zeros_like(q)

        tokens = torch.randint(900, (60,), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            decoder.run(tokens, torch.arange(60), attend)
        first, second = (weights.diagonal(-1, 1, 2).mean() for weights in heads[:2])
        assert first > 0.8 and second < 0.2

    @pytest.mark.parametrize("parts", [1, 3])
    def test_a_step_of_muon_is_nearly_orthogonal_in_each_part(self, parts):
        torch.manual_seed(0)
        for rows, columns in ((6, 20), (20, 6)):
            matrix = torch.nn.Parameter(torch.zeros(parts * rows, columns))
            matrix.grad = torch.randn(parts * rows, columns)
            matrix.grad[:rows] *= 1000  # how large a part is does not matter
            make.Muon([{"params": [matrix], "parts": parts}], lr=1.0).step()
            assert (matrix.detach() * matrix.grad).sum() < 0  # downhill
            for part in matrix.detach().split(rows):
                values = torch.linalg.svdvals(part) / max(1.0, rows / columns) ** 0.5
                assert values.min() > 0.5 and values.max() < 1.3


class TestStatistics:
    def test_bootstrap_knows_a_difference_from_none(self):
        rng = np.random.default_rng(1)
        scores = rng.random(200)
        p, low, high = experiments.bootstrap(scores + rng.normal(0.1, 0.2, 200), scores)
        assert p < 0.001 and 0.05 < low < 0.1 < high < 0.15
        p, low, high = experiments.bootstrap(scores, scores[::-1])
        assert p > 0.3 and low < 0 < high
        assert experiments.bootstrap(scores, scores)[0] == 1.0

    def test_bootstrap_agrees_with_the_normal_interval(self):
        rng = np.random.default_rng(2)
        ours, theirs = rng.normal(0.5, 0.3, 400), rng.normal(0.47, 0.3, 400)
        difference = ours - theirs
        error = difference.std(ddof=1) / 20
        _, low, high = experiments.bootstrap(ours, theirs)
        assert low == pytest.approx(difference.mean() - 1.96 * error, abs=0.1 * error)
        assert high == pytest.approx(difference.mean() + 1.96 * error, abs=0.1 * error)

    def test_correlation_within_groups_leaves_the_prompts_out(self, tmp_path):
        """Between prompts the two rise together, within a prompt they go against each other."""
        rows = [
            {"step": 1, "id": str(prompt), "personalization": 0.1 * prompt + 0.01 * n + 0.1,
             "accuracy": prompt - 0.1 * n}
            for prompt in range(5) for n in range(4)
        ]  # fmt: skip
        rows.append({"step": 1, "id": "x", "personalization": -10, "accuracy": 3.0})  # the guard
        path = tmp_path / "samples.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        total, within = experiments.correlation(path)
        assert total > 0.9 and within == pytest.approx(-1.0)


class TestExperiments:
    def options(self, folder, tasks):
        for task in tasks:
            users = [make.make_user(random.Random(f"{task} {n}")) for n in range(18)]
            make.write_lamp(task, {"train": users[:12], "dev": users[12:]}, folder / "lamp")
            make.write_probe(task, users[12:], folder / "lamp")
        return experiments.Options(
            model=str(TOY / "policy"), encoder=str(TOY / "encoder"), data=str(folder / "lamp"),
            quick=True, steps=1, out=str(folder / "out"),
        )  # fmt: skip

    def test_judges_are_compared(self, tmp_path):
        """Trained, untrained, and the ratio: only the last sees whose profile it is."""
        o = self.options(tmp_path, [experiments.TASK])
        for arm in experiments.JUDGES:
            experiments.train(o, experiments.TASK, arm, 0)
        lines = {line["row"]: line for line in experiments.judges(o, range(1))}
        assert [*lines] == [experiments.ARMS[arm][0] for arm in experiments.JUDGES]
        shares = ["pair_accuracy", "swap_test", "own_over_other", "own_over_plain", "rouge-l"]
        assert all(0 <= line[share] <= 1 for line in lines.values() for share in shares)
        *blind, ratio = (line["swap_test"] for line in lines.values())
        assert blind == [0.5] * 3 and ratio > 0.6

    def test_the_whole_programme_in_miniature(self, tmp_path):
        """A step an arm, a handful of users: every table is there, a second call is quick."""
        o = self.options(tmp_path, ["LaMP-4", "LaMP-7"])
        experiments.main(o)
        text = (tmp_path / "out" / "report.md").read_text()
        for arm in experiments.MAIN:
            assert text.count(f"| {experiments.ARMS[arm][0]} |") == 3  # two tasks, and the costs
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert all(0 <= line["rouge-l"] <= 1 for line in results["main"])
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("predictions*")}
        experiments.main(o)
        assert files == {path: path.stat().st_mtime_ns for path in files} and len(files) == 6


class TestTRL:
    """toy/trl_example.py"""

    def test_trains_with_our_prompts_and_reward(self, tmp_path):
        """Two steps of TRL's own trainer on the toy policy; its logged reward is ours."""
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        examples = retrieve.load_lamp(TOY / "lamp", "LaMP-4", "train")[:4]
        tokenizer = prlm.load_tokenizer(TOY / "policy")
        data = trl_example.columns(RewardOptions(k=2), tokenizer, examples)
        prompts = retrieve.make_prompts(RewardOptions(k=2), tokenizer, examples)
        assert [tokenizer.backend.encode(text).ids for text in data["prompt"]] == prompts
        data = datasets.Dataset.from_dict(data)
        paid, ours = [], trl_example.trl_reward(examples)

        def watched(completions, **columns):
            assert all(isinstance(text, str) for text in completions)
            paid.extend(ours(completions, **columns))
            return paid[-len(completions) :]

        how = trl.GRPOConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=48, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(str(TOY / "policy"), watched, how, data)
        trainer.train()
        logged = [line["reward"] for line in trainer.state.log_history if "reward" in line]
        assert logged == pytest.approx([sum(paid[n : n + 4]) / 4 for n in (0, 4)], rel=1e-4)
        assert max(paid) > 0.1 and trainer.state.global_step == 2

    def test_columns_chats_and_weights(self):
        good = "<think>\nhm\n</think>\n{'title': 'golf in oslo'}"
        completions = [good, [{"role": "assistant", "content": good}], "no answer"]
        targets = ["golf in oslo", "golf", "golf"]
        examples = [
            retrieve.Example(str(n), "", "LaMP-4", "q", [], t) for n, t in enumerate(targets)
        ]
        pay = trl_example.trl_reward(examples[::-1], format=0.5)
        found = pay(completions, id=["0", "1", "2"], prompt=["p"] * 3)
        texts = [good, good, "no answer"]
        rows = rewards(texts, examples, format=0.5)
        assert found == [part["reward"] for part in rows]
        assert found[0] == pytest.approx(3.5) and found[2] == 0


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
        if tag not in ("meta", "polyline", "circle", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in ("polyline", "circle", "line") or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


HOSTILE = '</b></style><script>alert(1)</script>\x00\x1b[31m\u202e\ud800 & " onfocus="alert(1)'


class TestPage:
    @pytest.fixture
    def run(self, world, tmp_path):
        """A run of two steps: four held-out records, the same two training records in each."""
        self.tokenizer = prlm.load_tokenizer(world / "policy")
        options = {"model": str(world / "policy"), "task": "LaMP-4", "k": 2, "steps": 2}
        prlm.write_json(tmp_path / "config.json", options | {"group_size": 2, "accuracy": 2.0})
        scores = {
            name: {"rouge-l": x, "rouge-1": x} for name, x in zip(page.STAGES, (0.1, 0.3, 0.5))
        }
        prlm.write_json(tmp_path / "scores.json", scores)
        for name, column in (
            ("before", (0.25, 0.5, 0.75, 0.5)), ("after", (0.5, 1.0, 0.25, 0.4)),
        ):  # fmt: skip
            answers = [self.answer(f"r{n}", f"{name} {n}") for n in range(4)]
            lines = [a | {"rouge-l": score} for a, score in zip(answers, column, strict=True)]
            self.write(tmp_path / "held_out" / f"{name}.jsonl", lines)
        samples = []
        for step in (1, 2):
            for id, accuracies in (("7", (0.2002, 1.5)), ("8", (1.0, 1.0))):
                for n, accuracy in enumerate(accuracies):
                    parts = {
                        "accuracy": accuracy,
                        "format": 1.0,
                        "personalization": 0.004 + 0.4567 * n,
                    }
                    sample = self.answer(id, f"why {step} {n}", finished=n == 0) | parts
                    sample["reward"] = 2 * accuracy + 0.1 + 0.0004 + 0.04567 * n
                    samples.append(
                        sample | {"step": step, "advantage": n - 0.5 if id == "7" else 0.0}
                    )
        self.write(tmp_path / "samples.jsonl", samples)
        metrics = [{"step": s, "reward": 0.85, "zero_spread_groups": 0.5} for s in (1, 2)]
        metrics[1] |= {"eval_rouge-l": 0.5, "eval_rouge-1": 0.5}
        self.write(tmp_path / "metrics.jsonl", metrics)
        return tmp_path

    def answer(self, id, text, logprob=-0.5, **more):
        tokens = self.tokenizer.encode(f"<think>\nhm\n</think>\n<b>{text}")
        sample = {"id": id, "query": f"query {id}", "target": text, "prompt": "a < b & c"}
        sample |= {"completion": self.tokenizer.decode(tokens), "answer": text, "finished": True}
        return sample | {"tokens": tokens, "logprobs": [logprob] * len(tokens)} | more

    def write(self, path, lines):
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def page(self, run, **options):
        page.main(page.Options(run=str(run), **options))
        return (run / "report.html").read_text()

    def test_is_whole_escaped_and_alone(self, run):
        html = self.page(run)
        parsed = Html(html)
        assert "a < b & c" in parsed.text and "<b>why 1" in parsed.text
        assert {"script", "img", "link", "iframe", "a"}.isdisjoint(tag for tag, _ in parsed.tags)
        assert not re.search(r"(src|href|url|@import)\s*[=(]?[\"' ]", html)
        assert parsed.text.count("cut off") == 4

    def test_data_cannot_break_out(self, run):
        plain = {tag for tag, _ in Html(self.page(run)).tags}
        for path in (*run.glob("*.jsonl"), *run.glob("held_out/*.jsonl")):
            lines = prlm.read_lines(path)
            for line in lines:
                texts = {"id", "query", "target", "prompt", "answer"} & line.keys()
                line |= {name: f"{line[name]}{HOSTILE}" for name in texts}
                if "tokens" in line:
                    line["tokens"] = self.tokenizer.encode(HOSTILE)
                    line["logprobs"] = [-1.0] * len(line["tokens"])
            self.write(path, lines)
        settings = dict.fromkeys(("out", "k", "group_size", "warm_start"), HOSTILE)
        prlm.write_json(run / "config.json", prlm.read_json(run / "config.json") | settings)
        scores = prlm.read_json(run / "scores.json")
        prlm.write_json(run / "scores.json", scores | {HOSTILE: scores["after"]})
        html = self.page(run)
        parsed = Html(html)
        assert {tag for tag, _ in parsed.tags} <= plain | {"i"}
        assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", html)
        assert "\N{SYMBOL FOR NULL}\N{SYMBOL FOR ESCAPE}[31m" in parsed.text  # seen, not dropped

    def test_parts_add_up_to_the_reward(self, run):
        html = self.page(run)
        cards = [card for card in html.split('<article class="card">') if "advantage <b" in card]
        rewards = []
        for card in cards:
            *shares, reward = (float(x) for x in re.findall(r"<td>([.\d]+)</td></tr>", card))
            factors = re.findall(r"<td>([.\d]+) × ([.\d]+) =</td>", card)
            for share, (weight, value) in zip(shares, factors, strict=True):
                assert share == pytest.approx(float(weight) * float(value), abs=0.0016)
            assert [float(weight) for weight, _ in factors] == [2.0, 0.1, 0.1]
            assert round(sum(shares), 3) == reward
            rewards.append(reward)
        group = [3.1 + 0.04607, 2 * 0.2002 + 0.1004, 2.1 + 0.04607, 2.1004]  # the best first
        assert rewards == pytest.approx([*group[:2]] * 2 + [*group[2:]] * 2, abs=0.0016)

    def test_gains_and_losses_come_largest_first(self, run):
        text = Html(self.page(run)).text
        assert re.findall(r"record (r\d)\s+ROUGE-L ([+−][.\d]+)", text) == [
            ("r1", "+.500"), ("r0", "+.250"), ("r2", "−.500"), ("r3", "−.100")
        ]  # fmt: skip
        assert "2 are better" in text and "2 worse" in text
        text = Html(self.page(run, records=1)).text
        assert re.findall(r"record (r\d)\s+ROUGE-L", text) == ["r1", "r2"]

    def test_the_held_out_curve_starts_at_step_0(self, run):
        html = self.page(run)
        chart = html.split("<h3>Held-out users: greedy answers</h3>")[1].split("</figure>")[0]
        first, last = re.findall(r'class="c0" points="(\S+) (\S+)"', chart)[0]
        start = re.search(r'x="(\d+)" y="\d+">step 0', chart)[1]
        assert float(first.split(",")[0]) == float(start)
        height = [190 - float(point.split(",")[1]) for point in (first, last)]
        assert (height[0] - 22) / (height[1] - 22) == pytest.approx(0.3 / 0.5, abs=0.01)
        assert ">.300</text>" in chart and ">.500</text>" in chart

    def test_groups_that_teach_nothing_are_folded(self, run):
        lines = prlm.read_lines(run / "samples.jsonl")
        for line in lines:
            line["accuracy"] = 1.0 if line["step"] == 2 else line["accuracy"]
        self.write(run / "samples.jsonl", lines)
        html = self.page(run)
        groups = re.findall(r'<details class="step"( open)?>\n<summary>(.*?)</summary>', html)
        notes = [re.sub("<.*?>", "", note).split("  ")[0] for _, note in groups]
        assert [is_open for is_open, _ in groups] == [" open", " open", "", ""]
        for note, said in zip(notes, ("", "only the judge", "nothing", "nothing"), strict=True):
            assert said in note and ("judge" in note) == (said == "only the judge")

    def test_equal_completions_stand_once(self, run):
        lines = prlm.read_lines(run / "samples.jsonl")
        group = [line for line in lines if line["step"] == 1 and line["id"] == "7"]
        self.write(run / "samples.jsonl", [group[0]] * 5 + [group[1]])
        html = self.page(run)
        assert html.count("advantage <b") == 2 and html.count("5 of 6") == 1

    def test_the_size_is_bounded(self, run, capsys):
        long = self.answer("x", "words " * 250, logprob=-2.0)
        parts = dict.fromkeys(("accuracy", "format", "personalization", "reward"), 0.0)
        lines = [
            long | parts | {"step": step, "id": f"{n % 3}", "completion": str(n), "advantage": 1.0}
            for step in range(1, 6) for n in range(3 * 12)
        ]  # fmt: skip
        self.write(run / "samples.jsonl", lines)
        html = self.page(run)
        assert len(html) < 1.5e6 and not capsys.readouterr().err
        assert html.count("<mark>") < 3 * 3 * 8 * page.LONG / len("words ") + 20  # answers, too
        size = len(self.page(run, tokens=9000))
        assert size > 5e6 and f"{size / 1e6:.0f} MB: lower --records" in capsys.readouterr().err

    def test_an_unfinished_run_says_what_is_missing(self, run):
        (run / "held_out" / "after.jsonl").unlink()
        self.write(run / "metrics.jsonl", prlm.read_lines(run / "metrics.jsonl")[:1])
        scores = prlm.read_json(run / "scores.json")
        scores.pop("after")
        prlm.write_json(run / "scores.json", scores)
        text = Html(self.page(run)).text
        missing = "1 of 2 steps are done, no score after RL, no held-out answers after RL"
        assert f"Not there yet: {missing}." in text and "4 answers to held-out prompts" in text
        for name in ("samples.jsonl", "metrics.jsonl", "held_out/before.jsonl"):
            (run / name).unlink()
        assert "no held-out answers before RL" in Html(self.page(run)).text
        (run / "scores.json").unlink()
        with pytest.raises(ValueError, match="nothing to show yet"):
            self.page(run)

    def test_a_directory_of_another_kind_is_named(self, world):
        with pytest.raises(ValueError, match=r"was not written by rl\.py or eval\.py"):
            self.page(world / "policy")

    def test_an_older_run_knows_neither_weights_nor_queries(self, run):
        options = prlm.read_json(run / "config.json")
        options.pop("accuracy")
        prlm.write_json(run / "config.json", options)
        lines = prlm.read_lines(run / "samples.jsonl")
        for line in lines:
            line.pop("query")
        self.write(run / "samples.jsonl", lines)
        for path in run.glob("held_out/*"):
            path.unlink()
        text = Html(self.page(run)).text
        assert "1 × accuracy + 0.1 × format + 0.1 × personalization" in text
        assert "no held-out answers before RL, no held-out answers after RL" in text
        assert "Tokens are shaded" in text

    def test_an_evaluation(self, run):
        options = prlm.read_json(run / "config.json")
        options = {name: options[name] for name in ("model", "task", "k")}
        prlm.write_json(run / "config.json", options | {"temperature": 0.7})
        prlm.write_json(run / "scores.json", {"rouge-l": 0.5833, "rouge-1": 0.6})
        (run / "held_out" / "after.jsonl").rename(run / "samples.jsonl")
        (run / "metrics.jsonl").unlink()
        text = Html(self.page(run, records=2)).text
        assert ".583" in text and "sampled, at temperature 0.7" in text and "RL" not in text
        assert re.findall(r"record (r\d)", text) == ["r1", "r0", "r2", "r3"]
        withheld = [line | {"target": None} for line in prlm.read_lines(run / "samples.jsonl")]
        for line in withheld:
            line.pop("rouge-l")
        self.write(run / "samples.jsonl", withheld)
        (run / "scores.json").unlink()
        text = Html(self.page(run)).text
        assert "ROUGE" not in text and "None" not in text and "own title" not in text

    def test_the_models_folder_may_have_moved(self, run, world):
        (run / "checkpoint").symlink_to(world / "policy")
        options = prlm.read_json(run / "config.json") | {"model": "gone", "warm_start": 62}
        prlm.write_json(run / "config.json", options)
        text = Html(self.page(run)).text
        assert "After 62 supervised steps, reinforcement learning" in text and "<b>why 1" in text

    @pytest.mark.parametrize("task", list(retrieve.TASKS))
    def test_items_are_found_in_the_prompt(self, task, tmp_path):
        tokenizer = prlm.load_tokenizer(TOY / "policy")
        fields = list(retrieve.TASKS[task].fields)
        write_lamp(tmp_path, task, users=20, split="dev")
        for example in retrieve.load_lamp(tmp_path, task, "dev"):
            items = retrieve.retrieve(example, 4)
            prompt = tokenizer.decode(tokenizer.chat(retrieve.build_messages(example, items)))
            wanted = [[item[field] for field in fields] for item in items]
            assert [list(found)[: len(fields)] for found in page.items_of(prompt, task)] == wanted
            prompt = tokenizer.decode(tokenizer.chat(retrieve.build_messages(example, [])))
            assert page.items_of(prompt, task) == []

    def test_tokens_that_share_a_character_are_one_piece(self, toy_tokenizer):
        encode = toy_tokenizer.encode
        text, torn = "naïve 🙂\n", encode("🙂")[1:] * 2  # the middle of a character
        tokens = [*encode(text), *torn, *encode("ok"), *encode("🙂")[:2]]
        found = page.pieces({"tokens": tokens, "logprobs": [-1.0] * len(tokens)}, toy_tokenizer)
        assert [piece for piece, _ in found][:8] == [*text]
        assert [logprob for _, logprob in found][:8] == [-1, -1, -2, -1, -1, -1, -4, -1]
        assert sum(logprob for _, logprob in found) == -len(tokens)
        assert re.fullmatch("\ufffd+ok\ufffd", "".join(piece for piece, _ in found[8:]))

    def test_words_keep_the_space_before_them(self):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1}, "▁a"))
        backend.decoder = tokenizers.decoders.Metaspace()
        sample = {"tokens": [0, 1, 0], "logprobs": [0.0, 0.0, 0.0]}
        found = page.pieces(sample, prlm.Tokenizer(backend))
        assert [piece for piece, _ in found] == ["a", " b", " a"]

    def test_records_that_recur_are_followed(self):
        seen = {1: "ab", 2: "cd", 3: "be", 4: "fb"}
        samples = [{"step": step, "id": id} for step, ids in seen.items() for id in ids * 2]
        found = page.followed(samples, 2)
        assert {id: [*steps] for id, steps in found.items()} == {"b": [1, 3, 4], "a": [1]}
        once = [sample for sample in samples if sample["id"] != "b"]
        assert [*page.followed(once, 3)] == ["a", "d", "f"]  # of a c d e f

    def test_long_curves_are_thinned_to_means(self):
        points = page.block_means([(n, n % 2) for n in range(2400)])
        assert len(points) == 120 and all(value == 0.5 for _, value in points)
        assert points[0] == (9.5, 0.5) and points[-1] == (2389.5, 0.5)

    def test_the_picture_starts_at_step_0_and_has_a_legend(self, run, monkeypatch):
        figure = pytest.importorskip("matplotlib.figure")
        seen, save = [], figure.Figure.savefig
        monkeypatch.setattr(
            figure.Figure, "savefig", lambda self, *a, **k: seen.append(self) or save(self, *a, **k)
        )
        page.draw_curves(run)
        assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")
        curve = seen[0].axes[1].lines[0]
        assert [*curve.get_xdata()] == [0, 2] and [*curve.get_ydata()] == [0.3, 0.5]
        assert len(seen[0].legends[0].texts) == 2


@pytest.mark.parametrize("task", make.TASKS)
def test_the_shipped_toy_fits_the_prompts(task):
    """The policy knows the prompt's sentences as whole tokens: after a change, build it anew."""
    tokenizer = prlm.load_tokenizer(TOY / "policy")
    example = retrieve.load_lamp(TOY / "lamp", task, "dev")[0]
    items = retrieve.retrieve(example, 4)
    assert len(tokenizer.chat(retrieve.build_messages(example, items))) < 170
