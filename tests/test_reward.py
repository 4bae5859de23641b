"""The reward is the sum it says; the reward model equals transformers' and learns a contrast."""

import copy
import math
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import WORDS, close, random_texts, same, shake

import prlm
import retrieve
import reward
from retrieve import Example, load_lamp


def make_model(directory, scale=0.3):
    torch.manual_seed(0)
    return shake(reward.RewardModel(prlm.load_encoder(directory)), scale)


@pytest.fixture
def model(world):
    return make_model(world / "encoder")


@pytest.fixture(scope="session")
def toy():
    return prlm.load_decoder(prlm.SHIPPED / "policy"), prlm.load_tokenizer(prlm.SHIPPED / "policy")


def example(task="LaMP-4", target="tennis wins", query="golf today"):
    return Example("1", "u", task, query, [], target)


def scores_of(model, queries, answers):
    with torch.no_grad():
        return model.score(queries, answers)


class TestInfoNCE:
    @pytest.mark.parametrize("temperature", [1.0, 0.2, 3.0])
    def test_equals_a_naive_loop(self, temperature):
        generator = torch.Generator().manual_seed(0)
        positive, *negatives = torch.randn(5, 7, generator=generator) * 3
        negatives = torch.stack(negatives, 1)
        losses = []
        for p, row in zip(positive.tolist(), negatives.tolist(), strict=True):
            own = math.exp(p / temperature)
            losses.append(-math.log(own / (own + sum(math.exp(n / temperature) for n in row))))
        close(reward.info_nce(positive, negatives, temperature), torch.tensor(losses).mean())

    def test_a_missing_negative_counts_for_nothing(self):
        scores = torch.tensor([0.3, -1.0]), torch.tensor([[0.5, -math.inf], [2.0, 1.0]])
        alone = [reward.info_nce(scores[0][:1], scores[1][:1, :1])]
        alone += [reward.info_nce(scores[0][1:], scores[1][1:])]
        negatives = scores[1].clone().requires_grad_()
        loss = reward.info_nce(scores[0], negatives)
        close(loss, sum(alone) / 2)
        loss.backward()
        assert negatives.grad.isfinite().all() and negatives.grad[0, 1] == 0

    def test_large_scores_do_not_overflow(self):
        loss = reward.info_nce(torch.tensor([3e4, -3e4]), torch.tensor([[-3e4], [3e4]]))
        close(loss, torch.tensor(3e4))


def ratio_problem(prompts=4, group=3, longest=9):
    """Two prompts a query and the answers that follow either; one answer is empty."""
    rng = random.Random(0)

    def ids(low, high):
        return [rng.randrange(97) for _ in range(rng.randint(low, high))]

    with_profile, without = ([ids(3, size) for _ in range(prompts)] for size in (30, 8))
    answers = [[ids(1, longest) for _ in range(group)] for _ in range(prompts)]
    answers[1][2] = []
    return with_profile, without, answers


class TestLikelihoodRatio:
    @pytest.mark.parametrize("name", ["qwen2", "llama"])
    def test_equals_a_plain_computation_with_transformers(self, name, tmp_path):
        theirs = pytest.importorskip("test_prlm").reference(name)  # it needs transformers
        theirs.save_pretrained(tmp_path)
        decoder = prlm.load_decoder(tmp_path)
        with_profile, without, answers = ratio_problem()

        @torch.no_grad()
        def log_probability(prompt, answer):
            logits = theirs(torch.tensor([prompt + answer])).logits[0].double()
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            return sum(logits[n].log_softmax(-1)[t] for n, t in zip(places, answer, strict=True))

        expected = torch.tensor([
            [log_probability(p, answer) - log_probability(q, answer) for answer in group]
            for p, q, group in zip(with_profile, without, answers, strict=True)
        ])  # fmt: skip
        ratios = reward.likelihood_ratio(decoder, with_profile, without, answers)
        assert expected.abs().mean() > 1
        close(ratios, expected.float(), 1e-4, "ratios")
        same(ratios[1, 2].item(), 0.0, "an empty answer")
        twice = reward.likelihood_ratio(decoder, with_profile, with_profile, answers)
        same(twice, torch.zeros(4, 3), "the same prompt on both sides")
        same(reward.likelihood_ratio(decoder, [], [], []), torch.zeros(0, 0), "no prompts")

    def test_a_prompt_runs_once_within_the_budget_and_without_gradient(self, toy, monkeypatch):
        """And neither batches, nor groups, nor neighbours change a ratio."""
        asked, real, decoder = [], prlm.token_logprobs, toy[0]
        with_profile, without, answers = ratio_problem()
        whole = reward.likelihood_ratio(decoder, with_profile, without, answers)
        alone = [
            [reward.likelihood_ratio(decoder, [p], [q], [[answer]]).item() for answer in group]
            for p, q, group in zip(with_profile, without, answers, strict=True)
        ]
        close(torch.tensor(alone), whole)

        def spy(decoder, prompts, completions):
            asked.append(prompts)
            tokens = sum(map(len, prompts)) + sum(len(a) for group in completions for a in group)
            assert len(prompts) == 1 or tokens <= 60, f"{len(prompts)} groups, {tokens} tokens"
            return real(decoder, prompts, completions)

        monkeypatch.setattr(prlm, "token_logprobs", spy)
        ratios = reward.likelihood_ratio(decoder, with_profile, without, answers, 60)
        close(ratios, whole)
        assert not ratios.requires_grad, "the result has a gradient"
        ran = sorted(prompt for batch in asked for prompt in batch)
        same(ran, sorted(with_profile + without), "prompts that ran")
        assert len(asked) > 2, "all groups ran at once"


class TestRewardModel:
    def test_scores_equal_transformers(self, model, tmp_path):
        """And those of the model that is read from the same files, whatever type it came from."""
        transformers = pytest.importorskip("transformers")
        queries, answers = random_texts(6, seed=1), random_texts(6, seed=2)
        queries[0], answers[1] = " ".join(WORDS * 20), " ".join(WORDS * 9)  # beyond 64 tokens
        model.bert.raw = model.bert.raw | {"dtype": "float16", "torch_dtype": "float16"}
        reward.save_reward_model(model, tmp_path)
        kind = transformers.AutoModelForSequenceClassification
        theirs = kind.from_pretrained(tmp_path, dtype="auto").eval()
        assert {p.dtype for p in theirs.parameters()} == {torch.float32}
        file = str(tmp_path / "tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, pad_token="[PAD]")
        how = dict(truncation=True, max_length=64, padding=True, return_token_type_ids=True)
        batch = tokenizer(queries, answers, return_tensors="pt", **how)
        assert batch["token_type_ids"].sum() > 0
        scores = scores_of(model, queries, answers)
        with torch.no_grad():
            close(scores, theirs(**batch).logits[:, 0], 1e-4)
        assert torch.equal(scores_of(reward.load_reward_model(tmp_path), queries, answers), scores)

    def test_a_pair_scores_the_same_alone_in_a_batch_and_in_chunks(self, model, monkeypatch):
        queries, answers = random_texts(30, seed=1), random_texts(30, seed=2)
        alone = [scores_of(model, [q], [a]) for q, a in zip(queries, answers, strict=True)]
        alone = torch.cat(alone)
        close(scores_of(model, queries, answers), alone)
        assert alone.std() > 0.1  # a constant would pass all of this
        monkeypatch.setattr(reward, "BATCH", 7)
        judged = model.judge([example(query=query) for query in queries], answers)
        close(torch.tensor(judged), alone.sigmoid())


CASES = [  # completion, task, whether it holds an answer, accuracy, format
    ("<think>\nx\n</think>\n{'title': 'tennis wins'}", "LaMP-4", True, 3.0, 1),
    ("{'title': 'golf wins'}", "LaMP-4", True, 0.5 + 0 + 0.5, 0),
    ("<think>\nx\n</think>\n{'title': ''}", "LaMP-4", False, 0, 1),
    ("<think>\nnever closed {'title': 'tennis wins'}", "LaMP-4", False, 0, 0),
    ("<think>\nx\n</think>\n{'title': 'generated title wins'}", "LaMP-4", False, 0, 1),
    ("{'tweet': 'tennis wins'}", "LaMP-7", True, 3.0, 0), ("x\n</think>\n", "LaMP-7", False, 0, 1),
]  # fmt: skip


class TestRewards:
    @pytest.mark.parametrize(("completion", "expected"), [
        ("<think>\na\n</think>\n{'title': 'b'}", 1), ("a\n</think>\nb", 1),  # the prompt opened it
        ("<think>\na", 0), ("{'title': 'b'}", 0), ("", 0), ("<think>\n\n</think>\n<think>\na", 0),
    ])  # fmt: skip
    def test_format(self, completion, expected):
        assert reward.format_reward(completion) == expected

    @pytest.mark.parametrize("judged", [False, True])
    def test_parts_and_sum(self, judged):
        """A judge sees answers alone, each with its own example; here it likes the later ones."""
        examples, seen = [example(case[1], query=str(n)) for n, case in enumerate(CASES)], []

        def judge(examples, answers):
            seen.extend((int(e.query), answer) for e, answer in zip(examples, answers, strict=True))
            return [float(e.query) / 10 for e in examples]

        rows = reward.rewards([c[0] for c in CASES], examples, judge if judged else None)
        for n, (row, (text, task, answered, accuracy, shaped)) in enumerate(zip(rows, CASES)):
            personal = (n / 10 if answered else -10.0 if task == "LaMP-4" else 0.0) * judged
            expected = {"accuracy": accuracy, "format": shaped, "personalization": personal}
            expected["reward"] = accuracy + 0.1 * shaped + 0.1 * personal
            same({key: row[key] for key in expected}, expected, f"{text!r}, {task}", 1e-4)
            assert bool(row["answer"]) == (answered or "generated" in text)
        answers = [(n, rows[n]["answer"]) for n, case in enumerate(CASES) if case[2]]
        assert seen == answers * judged and rows[0]["answer"] == "tennis wins"

    def test_nothing_to_judge_and_no_gold_text(self):
        """Without a gold text nothing but the accuracy is missing; a judge may give a tensor."""
        assert reward.rewards([], [], lambda *_: None) == []
        asked = [example(target=None)]
        for row in reward.rewards(["'title': 'golf'"] * 2, asked * 2, lambda *_: torch.ones(2)):
            assert (row["accuracy"], row["personalization"]) == (0.0, 1.0)

    def test_the_weights(self):
        """One of them is 0; the parts in the rows are not multiplied by them."""
        completion = "hm\n</think>\n{'title': 'tennis wins'}"
        parts = {"accuracy": 3, "format": 1, "personalization": 0.75}
        for name, total in {"accuracy": 0.175, "format": 3.075, "personalization": 3.1}.items():
            (row,) = reward.rewards([completion], [example()], lambda *_: [0.75], **{name: 0.0})
            assert {key: row[key] for key in parts} == pytest.approx(parts)
            assert row["reward"] == pytest.approx(total)

    @pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0] * 3])
    def test_a_judge_must_give_a_number_for_each_answer(self, values):
        with pytest.raises(ValueError, match=r"the judge gave .*not 2 finite numbers"):
            reward.rewards(["'title': 'a'", "'title': 'b'"], [example()] * 2, lambda *_: values)


def contrast(count=110, seed=0):
    """Pairs in which the positive holds "golf" and the negatives "oslo", among other words."""
    rng, other = random.Random(seed), ["tennis", "paris", "wins", "today"]

    def text(word):
        words = [word, *rng.choices(other, k=rng.randint(1, 4))]
        return " ".join(rng.sample(words, len(words)))

    return [  # two pairs a query
        {"id": str(n // 2), "query": text("wins"), "positive": text("golf"),
         "negatives": [text("oslo"), text("oslo")]}
        for n in range(count)
    ]  # fmt: skip


class TestMicroBatches:
    @pytest.mark.parametrize("budget", [1, 150, 10**6])
    def test_the_budget_changes_neither_loss_nor_gradient(self, model, budget, monkeypatch):
        """Pairs of unequal length; without dropout."""
        sizes, score, pairs = [], model.score, contrast(30)
        for n in (3, 20):
            pairs[n]["positive"] += " wins" * 20

        def spy(queries, answers):
            rows = [model.tokenizer.encode_pair(q, a, 64)[0] for q, a in zip(queries, answers)]
            sizes.append((len(rows), max(map(len, rows))))
            return score(queries, answers)

        o = reward.RewardOptions(tokens_per_micro_batch=budget)
        for part in (pairs[:10], pairs[10:]):
            expected = reward.info_nce(*reward.score_pairs(model, part))
            whole = torch.autograd.grad(expected, [*model.parameters()])
            model.zero_grad()
            with monkeypatch.context() as patch:
                patch.setattr(model, "score", spy)
                close(reward.info_nce_backward(o, model, part), expected, case="loss")
            got = [torch.cat([x.flatten() for x in xs])
                   for xs in (whole, [p.grad for p in model.parameters()])]  # fmt: skip
            close(got[1], got[0], case="gradient")
        same(sum(rows for rows, _ in sizes), sum(1 + len(p["negatives"]) for p in pairs), "texts")
        over = [(rows, width) for rows, width in sizes if rows > 3 and rows * width > budget]
        same(over, [], f"batches (texts, longest) above {budget} tokens")
        assert (len(sizes) == 2) == (budget == 10**6), f"{len(sizes)} batches"


class TestPairs:
    def test_pairs_are_with_against_without_the_profile(self, world, monkeypatch):
        """Each kind sampled with noise of its own; a pair with an empty answer is dropped."""
        examples, asked = load_lamp(world / "lamp", "LaMP-4", "train"), []
        tokenizer = prlm.load_tokenizer(world / "policy")

        def fake(o, decoder, tokenizer, examples, prompts, group_size, temperature, purpose):
            text = tokenizer.decode(prompts[0])
            shown = any(item["title"] in text for item in examples[0].profile)
            kind = "with" if shown else "without"
            asked.append((kind, group_size, temperature, *purpose))
            said = ["" if n == shown else f"{kind} {{}} {n}" for n in range(group_size)]
            rows = [(e, x.format(e.id)) for e in examples for x in said]
            return [{"id": e.id, "query": e.query, "answer": x} for e, x in rows]

        monkeypatch.setattr("reward.make_records", fake)
        o = reward.RewardOptions(pairs_per_query=4, k=2)
        assert reward.build_pairs(o, None, tokenizer, examples) == [
            {"id": e.id, "query": e.query.strip(), "positive": f"with {e.id} {n}",
             "negatives": [f"without {e.id} {n}"]}
            for e in examples for n in (2, 3)
        ]  # fmt: skip
        assert [call[:3] for call in asked] == [("with", 4, 0.7), ("without", 4, 0.7)]
        assert asked[0][3:] != asked[1][3:]

    def test_pair_accuracy_counts_ties_as_half(self, model, monkeypatch):
        """By a model whose scores are its answers."""
        numbers = lambda _, answers: torch.tensor([*map(float, answers)])  # noqa: E731
        monkeypatch.setattr(model, "score", numbers)
        made = [("3", ["1", "5"]), ("2", ["2", "3"]), ("-4", ["-5", "-9"])]
        pairs = [{"query": "q", "positive": own, "negatives": rest} for own, rest in made]
        assert reward.pair_accuracy(model, pairs * 50) == (1 + 0 + 0.5 + 0 + 1 + 1) / 6

    def test_training_learns_a_contrast_and_repeats(self, world):
        """Dropout follows the option's seed alone, whatever was drawn before."""
        start, pairs, reports, models = make_model(world / "encoder", 0), contrast(), [], []
        swapped = [p | {"positive": p["negatives"][0], "negatives": [p["positive"]]} for p in pairs]
        for seed, given in ((0, pairs), (0, pairs), (1, pairs), (0, swapped)):
            torch.rand(len(reports))
            models.append(copy.deepcopy(start))
            options = reward.RewardOptions(seed=seed, reward_epochs=6, reward_lr=1e-2)
            reports.append(reward.train_reward_model(options, models[-1], list(given)))
        assert all(r["pair_accuracy"] > 0.9 and r["pairs"] == len(pairs) for r in reports)
        new = contrast(50, seed=9)
        assert reward.pair_accuracy(models[0], new) > 0.9
        assert reward.pair_accuracy(models[3], new) < 0.1
        heads = [m.classifier.weight for m in models]
        assert reports[0] == reports[1] and torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2]) and not models[0].training

    def test_the_report_is_of_queries_that_were_never_trained_on(self, model, monkeypatch):
        pairs, score = [p | {"query": f"query {p['id']}"} for p in contrast(100)], model.score
        seen, o = {True: set(), False: set()}, reward.RewardOptions(reward_epochs=2)

        def spy(queries, answers):
            seen[torch.is_grad_enabled()] |= {*queries}
            assert model.training == torch.is_grad_enabled()
            return score(queries, answers)

        monkeypatch.setattr(model, "score", spy)
        report = reward.train_reward_model(o, model, pairs)
        assert len(seen[True]) == 45 and len(seen[False]) == 5 and not seen[True] & seen[False]
        assert (report["held_out_pairs"], report["held_out_queries"]) == (10, 5)
        held = reward.split_pairs(pairs, o.seed)[1]
        assert report["pair_accuracy"] == reward.pair_accuracy(model, held)
        losses = iter([7.0, 7.0, 3.0, 1.0, math.nan, math.nan])  # of two batches, 64 and 26 pairs
        monkeypatch.setattr(reward, "info_nce_backward", lambda *_: next(losses))
        report = reward.train_reward_model(o, model, pairs)  # the last epoch's mean
        assert report["loss"] == pytest.approx((64 * 3 + 26 * 1) / 90)
        with pytest.raises(ValueError, match="lower --reward-lr"):
            reward.train_reward_model(replace(o, reward_epochs=1), model, pairs)


def users(count=4):
    """Users who each write one word of their own, which their targets have too."""
    return [
        Example(f"{n}", f"u{n}", "LaMP-4", f"query {n}", [{"title": f"w{n}", "text": "x"}], f"w{n}")
        for n in range(count)
    ]


def reader(examples, answers):
    """A judge that knows the user: does the answer stand in the profile?"""
    titles = [[item["title"] for item in e.profile] for e in examples]
    return [float(a.split()[0] in own) for a, own in zip(answers, titles, strict=True)]


class TestSwapTest:
    def test_of_one_who_reads_and_one_who_is_blind(self):
        judges = {1.0: reader, 0.0: lambda *given: [-value for value in reader(*given)]}
        judges[0.5] = lambda examples, answers: [float(len(answer)) for answer in answers]
        for expected, judge in judges.items():
            assert reward.swap_test(judge, users()) == expected
        one = users(1)  # and without a second user there is none
        again = replace(one[0], id="9", user_id="9", query="another")  # the same profile
        assert reward.swap_test(reader, one) is reward.swap_test(reader, [*one, again]) is None

    @pytest.mark.parametrize("by", ["id", "profile"])
    def test_the_other_profile_is_another_users(self, by):
        """Users have one id or, where data has none, profile items in common."""
        examples, asked = users(6), []
        for n, e in enumerate(examples):
            shared = {"title": f"everybody's {n // 3}", "text": "y", "id": str(n)}
            new = {"user_id": f"u{n // 3}"} if by == "id" else {"profile": [*e.profile, shared]}
            examples[n] = replace(e, **new)
        reward.swap_test(lambda e, a: asked.append(e) or [0.0] * len(e), examples)
        for own, swapped in zip(*asked, strict=True):
            (owner,) = (n for n, e in enumerate(examples) if e.profile == swapped.profile)
            assert owner // 3 != int(own.id) // 3
            assert replace(swapped, profile=own.profile) == own
        assert asked[0] == examples


class TestRatioJudge:
    def test_equals_one_answer_at_a_time(self, toy):
        """Of several users in any order, and of records that differ in their profile alone."""
        one, two = load_lamp(prlm.SHIPPED / "lamp", "LaMP-4", "dev")[:2]
        asked = [one, two, one, replace(one, profile=two.profile), one]
        answers = ["on golf no joke", "why", one.target, one.target, "on\n\n and on"]
        o = reward.RewardOptions(judge="ratio", k=3)
        judge, tokenizer, sides = partial(reward.ratio_judge, o, *toy), toy[1], []
        for e, answer, value in zip(asked, answers, judge(asked, answers), strict=True):
            logits, answer = [], answer.replace("\n\n", "")  # it is asked for in one line
            for k in (3, 0):
                messages = retrieve.build_messages(e, retrieve.retrieve(e, k))
                prompt = tokenizer.chat(messages) + tokenizer.fill(retrieve.CLOSED)
                ids = tokenizer.encode(f"<answer>\n{{'title': '{answer}'}}\n</answer>")
                logprobs, _ = prlm.token_logprobs(toy[0], [prompt], [[ids]])
                logits.append(logprobs.sum().item())
            sides.append(math.log(value / (1 - value)))
            assert sides[-1] == pytest.approx(logits[0] - logits[1], abs=1e-3)
        assert sides[2] != pytest.approx(sides[3], abs=0.1) and judge([], []) == []

    def test_a_very_likely_answer_is_still_told_from_a_likelier_one(self, toy, monkeypatch):
        found = torch.tensor([[20.0, 25, -800]])
        monkeypatch.setattr(reward, "likelihood_ratio", lambda *_, **__: found)
        examples = load_lamp(prlm.SHIPPED / "lamp", "LaMP-4", "dev")[:1] * 3
        judge = partial(reward.ratio_judge, reward.RewardOptions(), *toy)
        one, more, least = judge(examples, ["a", "b", "c"])
        assert 0 <= least < one < more <= 1


class TestMakeJudge:
    @pytest.fixture
    def o(self, world):
        return reward.RewardOptions(encoder=str(world / "encoder"), reward_epochs=1, device="cpu")

    @pytest.fixture
    def calls(self, monkeypatch):
        calls, train = [], reward.train_reward_model
        monkeypatch.setattr(reward, "build_pairs", lambda *_: calls.append("pairs") or contrast(40))
        spy = lambda *given: calls.append("train") or train(*given)  # noqa: E731
        monkeypatch.setattr(reward, "train_reward_model", spy)
        return calls

    def test_what_is_there_is_not_made_again(self, o, calls, tmp_path, capsys):
        asked = [example(query=query) for query in random_texts(5, seed=1)], random_texts(5, seed=2)
        first = reward.make_judge(o, None, None, [], users(), tmp_path / "a/b")(*asked)
        assert calls == ["pairs", "train"]
        report = prlm.read_json(tmp_path / "a/b/report.json")
        assert report["swap_test"] == 0.5 and report["pairs"] == 40  # it is blind to the profile
        said = capsys.readouterr().out
        assert f"pair_accuracy {round(report['pair_accuracy'], 3)}, swap_test 0.5" in said
        model = reward.load_reward_model(tmp_path / "a/b")
        assert model.judge(*asked) == first
        assert reward.make_judge(o, None, None, [], users(), tmp_path / "a/b")(*asked) == first
        saved = replace(o, reward_model=str(tmp_path / "a/b"), encoder=None)
        assert reward.make_judge(saved, None, None, [], users(1), tmp_path / "new")(*asked) == first
        assert capsys.readouterr().out.endswith("chance): \n") and len(calls) == 2  # one user
        (tmp_path / "a/b/report.json").unlink()  # killed before the end: the pairs are kept,
        again = reward.make_judge(o, None, None, [], users(), tmp_path / "a/b")(*asked)
        assert again == first and calls[2:] == ["train"]  # the same model comes out

    def test_ratio_knows_the_user_and_reports_it(self, toy, tmp_path, capsys):
        o = reward.RewardOptions(judge="ratio")
        held = load_lamp(prlm.SHIPPED / "lamp", "LaMP-4", "dev")
        judge = reward.make_judge(o, *toy, [], held[:20], tmp_path / "new")
        report, said = prlm.read_json(tmp_path / "new/report.json"), capsys.readouterr().out
        assert report["swap_test"] > 0.8 and all(0 < v < 1 for v in judge(held[:1], ["why"]))
        assert f"judge ratio (.5 is chance): swap_test {report['swap_test']}" in said

    @pytest.mark.parametrize(("text", "changes"), [
        ("2 pairs of 1 queries are too few", {}), ("policy", {"encoder": "policy"}),
        ("encoder", {"reward_model": "encoder"}), ("--encoder", {"encoder": None}),
        ("no tokenizer.json", {"encoder": "alone"}),
    ])  # fmt: skip
    def test_what_is_refused(self, world, o, tmp_path, monkeypatch, text, changes):
        monkeypatch.setattr(reward, "build_pairs", lambda *_: contrast(2))
        shutil.copytree(world, tmp_path, dirs_exist_ok=True)
        shutil.copytree(world / "encoder", tmp_path / "alone")
        (tmp_path / "alone/tokenizer.json").unlink()
        changes = {name: value and str(tmp_path / value) for name, value in changes.items()}
        with pytest.raises(ValueError, match=text):
            reward.make_judge(replace(o, **changes), None, None, [], [], tmp_path / "new")

    def test_command(self, world, calls, tmp_path):
        given = {"model": world / "policy", "data": world / "lamp", "encoder": world / "encoder"}
        given = {name: str(path) for name, path in (given | {"out": tmp_path / "judge"}).items()}
        reward.main(o := prlm.resolve(reward.Options, given | {"preset": "toy", "device": "cpu"}))
        judge = reward.load_reward_model(o.out).judge(users(2), ["golf", "paris"])
        assert len(set(judge)) == 2 and prlm.read_json(tmp_path / "judge/options.json")["k"] == o.k
        with pytest.raises(ValueError, match="--overwrite"):
            reward.main(o)
        reward.main(replace(o, overwrite=True))
        assert calls == ["pairs", "train"] * 2
