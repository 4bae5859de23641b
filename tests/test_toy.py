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
import torch
import trl_example

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


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "rect", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in ("rect", "polyline", "circle") or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


class TestPage:
    def make_run(self, folder, policy, target="<script>alert(1)</script>"):
        folder.mkdir()
        options = {"model": str(policy), "task": "LaMP-4", "steps": 2}
        prlm.write_json(folder / "config.json", options)
        tokenizer = prlm.load_tokenizer(policy)
        samples = []
        for step in (1, 2):
            for n, reward in enumerate((0.2, 1.5)):
                tokens = tokenizer.encode(f"<think>\nwhy {n}\n</think>\n<b>{step}")
                sample = {"step": step, "id": "7", "target": target, "prompt": "a < b & c"}
                sample |= {"tokens": tokens, "logprobs": [-0.5] * len(tokens), "finished": n == 0}
                sample |= {"completion": tokenizer.decode(tokens), "reward": reward}
                sample |= {"accuracy": reward, "format": 1.0, "personalization": 0.5}
                samples.append(sample | {"advantage": reward - 0.85})
        metrics = [{"step": s, "reward": 0.85, "completion_tokens": 9.0} for s in (1, 2)]
        metrics[1]["eval_rouge-l"] = 0.4
        for name, lines in (("samples", samples), ("metrics", metrics)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)

    def test_is_whole_escaped_and_alone(self, world, tmp_path):
        self.make_run(tmp_path / "run", world / "policy")
        page.main(page.Options(run=str(tmp_path / "run")))
        html = (tmp_path / "run" / "report.html").read_text()
        parser = Balanced()
        parser.feed(html)
        assert not parser.open and "a < b & c" in parser.text and "<b>2" in parser.text
        assert "<script" not in html and not re.search(r"(src|href|url)\s*[=(]", html)
        assert parser.text.index("reward 1.500") < parser.text.index("reward 0.200")
        assert parser.text.count("cut off") == 2

    def test_a_run_without_steps_is_an_error(self, world, tmp_path):
        self.make_run(tmp_path / "run", world / "policy")
        (tmp_path / "run" / "metrics.jsonl").write_text("")
        with pytest.raises(ValueError, match="no step"):
            page.main(page.Options(run=str(tmp_path / "run")))


@pytest.mark.parametrize("task", make.TASKS)
def test_the_shipped_toy_fits_the_prompts(task):
    """The policy knows the prompt's sentences as whole tokens: after a change, build it anew."""
    tokenizer = prlm.load_tokenizer(TOY / "policy")
    example = retrieve.load_lamp(TOY / "lamp", task, "dev")[0]
    items = retrieve.retrieve(example, 4)
    assert len(tokenizer.chat(retrieve.build_messages(example, items))) < 170
