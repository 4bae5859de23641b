"""The reward is the sum it says; the reward model equals transformers' and learns a contrast."""

import copy
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import same

import prlm
import retrieve
import reward
from retrieve import Example, load_lamp

TOY = Path(__file__).parent.parent / "toy"
WORDS = ["tennis", "golf", "paris", "oslo", "wins", "today", "zebra"]  # the last is unknown


def close(a, b, relative=1e-5, case=""):
    __tracebackhide__ = True
    same(a, b, case, relative)


def make_model(directory, scale=0.3):
    """A reward model with every weight away from its default, so that scores differ widely."""
    torch.manual_seed(0)
    model = reward.RewardModel(prlm.load_encoder(directory))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.fixture
def model(world):
    return make_model(world / "encoder")


@pytest.fixture(scope="session")
def toy():
    return prlm.load_decoder(TOY / "policy"), prlm.load_tokenizer(TOY / "policy")


def random_texts(count, longest=20, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def example(task="LaMP-4", target="tennis wins", query="golf today"):
    return Example("1", "u", task, query, [], target)


def scores_of(model, queries, answers):
    with torch.no_grad():
        return model.score(queries, answers)


class Fake:
    """A reward model whose score is a table's."""

    def __init__(self, table):
        self.table = table

    def score(self, queries, answers):
        return torch.tensor([float(self.table[answer]) for answer in answers])


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


@pytest.fixture(scope="session")
def pair(request, tmp_path_factory):
    """(a random model of transformers, the same as ours)"""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(directory := tmp_path_factory.mktemp("model"))
    return model, prlm.load_decoder(directory)


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
    @pytest.mark.parametrize("pair", ["Qwen2", "Llama"], indirect=True)
    def test_equals_a_plain_computation_with_transformers(self, pair):
        theirs, decoder = pair
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

    @pytest.mark.parametrize("pair", ["Qwen2"], indirect=True)
    def test_a_prompt_runs_once_within_the_budget_and_without_gradient(self, pair, monkeypatch):
        """And neither batches, nor groups, nor neighbours change a ratio."""
        asked, real, decoder = [], prlm.token_logprobs, pair[1]
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
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, dtype="auto"
        ).eval()
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
        pairs = list(zip(queries, answers, strict=True))
        alone = torch.cat([scores_of(model, [query], [answer]) for query, answer in pairs])
        close(scores_of(model, queries, answers), alone)
        assert alone.std() > 0.1  # a constant would pass all of this
        monkeypatch.setattr(reward, "BATCH", 7)
        judged = model.judge([example(query=query) for query in queries], answers)
        close(torch.tensor(judged), alone.sigmoid())

    def test_query_and_answer_both_count_and_differ(self, model):
        a, b, c = "tennis wins", "golf", "paris today"
        scores = scores_of(model, [a, b, c, a], [b, a, b, c])
        assert len({round(s, 4) for s in scores.tolist()}) == 4

    def test_no_dropout_outside_training_and_gradient_everywhere(self, model):
        assert not model.training
        first, second = (model.score(["golf"], ["tennis"]) for _ in range(2))
        assert torch.equal(first, second)
        model.score(["golf"], ["tennis wins"]).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_directories_without_a_reward_model(self, world, model, tmp_path):
        with pytest.raises(ValueError, match="no reward model"):
            reward.load_reward_model(world / "encoder")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            reward.load_reward_model(tmp_path / "nowhere")
        reward.save_reward_model(model, tmp_path)
        tensors = prlm.read_safetensors(tmp_path / "model.safetensors")
        two = {"classifier.weight": torch.ones(2, 16), "classifier.bias": torch.ones(2)}
        prlm.write_safetensors(tmp_path / "model.safetensors", tensors | two)
        with pytest.raises(ValueError, match="one label"):
            reward.load_reward_model(tmp_path)


# fmt: off
CASES = [  # completion, task, whether it holds an answer, accuracy, format
    ("<think>\nx\n</think>\n{'title': 'tennis wins'}", "LaMP-4", True, 3.0, 1),
    ("{'title': 'golf wins'}", "LaMP-4", True, 0.5 + 0 + 0.5, 0),
    ("<think>\nx\n</think>\n{'title': ''}", "LaMP-4", False, 0, 1),
    ("<think>\nnever closed {'title': 'tennis wins'}", "LaMP-4", False, 0, 0),
    ("<think>\nx\n</think>\n{'title': 'generated title wins'}", "LaMP-4", False, 0, 1),
    ("{'tweet': 'tennis wins'}", "LaMP-7", True, 3.0, 0),
    ("x\n</think>\n", "LaMP-7", False, 0, 1),
    ("{'tweet': 'generated tweet wins'}", "LaMP-7", False, 0, 0),
    ("{'title': 'tennis wins'}", "LaMP-5", True, 3.0, 0),
]
# fmt: on


class TestRewards:
    @pytest.mark.parametrize(("completion", "expected"), [
        ("<think>\na\n</think>\n{'title': 'b'}", 1), ("a\n</think>\nb", 1),  # the prompt opened it
        ("<think>\na", 0), ("{'title': 'b'}", 0), ("", 0), ("<think>\n\n</think>\n<think>\na", 0),
    ])  # fmt: skip
    def test_format(self, completion, expected):
        assert reward.format_reward(completion) == expected

    @pytest.mark.parametrize("weight", [None, 0.1, 2.0])
    def test_parts_and_sum(self, model, weight):
        """`weight` None is without a judge."""
        completions = [case[0] for case in CASES]
        queries = random_texts(len(completions))
        examples = [example(case[1], query=q) for case, q in zip(CASES, queries, strict=True)]
        how = {} if weight is None else {"judge": model.judge}
        rows = reward.rewards(completions, examples, **how, personalization=weight or 0.1)
        for row, e, case in zip(rows, examples, CASES, strict=True):
            _, task, answered, accuracy, shaped = case
            personal = 0.0
            if weight is not None and answered:
                personal = scores_of(model, [e.query], [row["answer"]]).sigmoid().item()
            elif weight is not None and task == "LaMP-4":
                personal = -10.0
            total = accuracy + 0.1 * shaped + (weight or 0) * personal
            names = ("accuracy", "format", "personalization", "reward")
            values = [row[name] for name in names]
            for name, value, wanted in zip(names, values, [accuracy, shaped, personal, total]):
                assert value == pytest.approx(wanted, rel=1e-4), f"{name} of {case[0]!r}, {task}"
            assert bool(row["answer"]) == (answered or "generated" in case[0])
        assert rows[0]["answer"] == "tennis wins"

    def test_nothing_to_judge(self, model):
        assert reward.rewards([], [], model.judge) == []
        (row,) = reward.rewards(["hm"], [example()], model.judge)
        assert row["reward"] == pytest.approx(-1.0) and row["answer"] == ""

    def test_the_weights(self):
        """By default 1, a tenth and a tenth; the parts in the rows are not multiplied by them."""
        completion = "hm\n</think>\n{'title': 'tennis wins'}"
        parts = {"accuracy": 3, "format": 1, "personalization": 0.75}
        expected = {"": 3.175, "accuracy": 0.175, "format": 3.075, "personalization": 3.1}
        for name, total in expected.items():
            weights = {name: 0.0} if name else {}
            (row,) = reward.rewards([completion], [example()], lambda *_: [0.75], **weights)
            assert {key: row[key] for key in parts} == pytest.approx(parts)
            assert row["reward"] == pytest.approx(total)

    def test_a_user_without_gold_text(self):
        """Nothing but the accuracy is missing. And a judge may give a tensor."""
        asked = [example(target=None)]
        (row,) = reward.rewards(["'title': 'golf'"], asked, lambda *_: torch.tensor([0.5]))
        assert (row["accuracy"], row["personalization"]) == (0.0, 0.5)

    @pytest.mark.parametrize(
        "values", [None, [], [1.0], [1.0, None], [1.0, math.nan], [1.0, math.inf, 2.0]]
    )
    def test_a_judge_must_give_a_number_for_each_answer(self, values):
        with pytest.raises(ValueError, match=r"the judge gave .*not 2 finite numbers"):
            reward.rewards(["'title': 'a'", "'title': 'b'"], [example()] * 2, lambda *_: values)

    def test_a_judge_sees_only_answers_with_their_examples(self):
        seen, examples = [], [example(case[1], query=str(n)) for n, case in enumerate(CASES)]

        def judge(examples, answers):
            seen.extend((e.query, answer) for e, answer in zip(examples, answers, strict=True))
            return [float(e.query) for e in examples]

        rows = reward.rewards([case[0] for case in CASES], examples, judge)
        expected = [(str(n), rows[n]["answer"]) for n, case in enumerate(CASES) if case[2]]
        assert seen == expected
        for n, _ in expected:
            same(rows[int(n)]["personalization"], float(n), f"the judge's value of completion {n}")


def contrast(count=110, seed=0):
    """Pairs in which the positive holds "golf" and the negatives "oslo", among other words."""
    rng, other = random.Random(seed), ["tennis", "paris", "wins", "today"]

    def text(word):
        words = [word, *rng.choices(other, k=rng.randint(1, 4))]
        rng.shuffle(words)
        return " ".join(words)

    return [
        {
            "id": str(n // 2),  # two pairs a query
            "query": text("wins"),
            "positive": text("golf"),
            "negatives": [text("oslo") for _ in range(rng.randint(1, 2))],
        }
        for n in range(count)
    ]


class TestMicroBatches:
    @pytest.mark.parametrize("budget", [1, 150, 10**6])
    def test_the_budget_changes_neither_loss_nor_gradient(self, model, budget, monkeypatch):
        """Pairs of unequal length and number of negatives; without dropout."""
        sizes, score, pairs = [], model.score, contrast(30)
        for n in (3, 20):
            pairs[n]["positive"] += " wins" * 20

        def spy(queries, answers):
            rows = [model.tokenizer.encode_pair(q, a, 64)[0] for q, a in zip(queries, answers)]
            sizes.append((len(rows), max(map(len, rows))))
            return score(queries, answers)

        def gradient():
            return torch.cat([p.grad.flatten() for p in model.parameters()])

        o = reward.RewardOptions(tokens_per_micro_batch=budget)
        for part in (pairs[:10], pairs[10:]):
            monkeypatch.undo()
            model.zero_grad()
            expected = reward.info_nce(*reward.score_pairs(model, part))
            expected.backward()
            whole = gradient()
            model.zero_grad()
            monkeypatch.setattr(model, "score", spy)
            close(reward.info_nce_backward(o, model, part), expected.detach(), case="loss")
            close(gradient(), whole, case="gradient")
        same(sum(rows for rows, _ in sizes), sum(1 + len(p["negatives"]) for p in pairs), "texts")
        over = [(rows, width) for rows, width in sizes if rows > 3 and rows * width > budget]
        same(over, [], f"batches (texts, longest) above {budget} tokens")
        assert (len(sizes) == 2) == (budget == 10**6), f"{len(sizes)} batches"


class TestPairs:
    """From the policy's answers to a trained reward model."""

    def test_pairs_are_with_against_without_the_profile(self, world, monkeypatch):
        examples = load_lamp(world / "lamp", "LaMP-4", "train")
        tokenizer, asked = prlm.load_tokenizer(world / "policy"), []

        def fake(o, decoder, tokenizer, prompts, group_size=1, temperature=0.0, purpose=()):
            texts = [tokenizer.decode(prompt) for prompt in prompts]
            titles = [any(item["title"] in text for item in e.profile)
                      for e, text in zip(examples, texts, strict=True)]  # fmt: skip
            asked.append((group_size, temperature))
            name = {(True,): "with", (False,): "without"}[tuple(set(titles))]
            answers = [f"{name} {n}" for n in range(group_size)]
            answers[name == "with"] = ""
            group = [tokenizer.encode(f"{{'title': '{a}'}}") for a in answers]
            return [[prlm.Completion(ids, [], True) for ids in group] for _ in prompts]

        monkeypatch.setattr(reward, "complete", fake)
        options = reward.RewardOptions(pairs_per_query=4, k=2)
        pairs = reward.build_pairs(options, None, tokenizer, examples)
        assert asked == [(4, 0.7), (4, 0.7)]
        for e in examples:
            own = [pair for pair in pairs if pair["id"] == e.id]
            assert {pair["query"] for pair in own} == {e.query.strip()}
            positives = [pair["positive"] for pair in own]
            used = [text for pair in own for text in pair["negatives"]]
            for texts, name in ((positives, "with "), (used, "without ")):
                assert len(set(texts)) == len(texts) and all(t.startswith(name) for t in texts)
            sizes = [len(pair["negatives"]) for pair in own]
            assert len(own) in (2, 3) and set(sizes) == {1}

    def test_the_two_answers_of_a_pair_share_no_noise(self, toy, monkeypatch):
        """Without profiles both are asked the same. If they drew the same noise, they would be the
        same; so they may be equal, or begin alike, no more often than answers of different pairs.
        """
        seeds, real = [], prlm.generate
        monkeypatch.setattr(
            prlm,
            "generate",
            lambda *given, **how: seeds.append(how.get("seed", given[-1])) or real(*given, **how),
        )
        examples = [replace(e, profile=[]) for e in load_lamp(TOY / "lamp", "LaMP-4", "train")[:40]]
        o = reward.RewardOptions(pairs_per_query=6, max_new_tokens=40, reasoning=False)
        pairs = reward.build_pairs(o, *toy, examples)
        assert len(pairs) > 200 and len(set(seeds)) == len(seeds) > 2

        def alike(shift, length):
            """Among pairs n and n + shift of one query."""
            both = [(p, q) for p, q in zip(pairs, pairs[shift:]) if p["id"] == q["id"]]
            texts = [(p["positive"][:length], q["negatives"][0][:length]) for p, q in both]
            return sum(a == b for a, b in texts) / len(texts)

        for length in (4, 100):
            own, *others = [alike(shift, length) for shift in range(4)]
            assert abs(own - sum(others) / 3) < 0.1, f"{own}, of different pairs {others}"

    def test_scores_of_pairs_with_unequal_numbers_of_negatives(self, model):
        pairs = contrast(5)
        positive, negatives = reward.score_pairs(model, pairs)
        assert positive.requires_grad and negatives.shape == (5, 2)
        expected = torch.full((5, 3), -math.inf)
        for n, pair in enumerate(pairs):
            texts = [pair["positive"], *pair["negatives"]]
            expected[n, : len(texts)] = scores_of(model, [pair["query"]] * len(texts), texts)
        close(torch.cat([positive[:, None], negatives], 1).detach(), expected)

    def test_pair_accuracy_equals_a_naive_loop(self):
        rng = random.Random(0)
        table = {str(n): rng.randrange(50) for n in range(500)}  # ties are a half
        names = iter(table)
        pairs = [
            {"query": "q", "positive": next(names), "negatives": [next(names) for _ in range(size)]}
            for size in rng.choices((1, 2, 4), k=130)
        ]
        scores = [(table[p["positive"]], table[n]) for p in pairs for n in p["negatives"]]
        won = [0.5 if a == b else float(a > b) for a, b in scores]
        assert reward.pair_accuracy(Fake(table), pairs) == sum(won) / len(won)

    def test_training_learns_a_contrast_and_repeats(self, world):
        """Dropout follows the option's seed alone, whatever was drawn before."""
        start, pairs, reports, models = make_model(world / "encoder", 0), contrast(), [], []
        swapped = [
            pair | {"positive": pair["negatives"][0], "negatives": [pair["positive"]]}
            for pair in pairs
        ]
        for seed, given in ((0, pairs), (0, pairs), (1, pairs), (0, swapped)):
            torch.rand(len(reports))
            models.append(copy.deepcopy(start))
            options = reward.RewardOptions(seed=seed, reward_epochs=10, reward_lr=1e-2)
            reports.append(reward.train_reward_model(options, models[-1], list(given)))
        assert all(r["pair_accuracy"] > 0.9 and r["pairs"] == len(pairs) for r in reports)
        new = contrast(50, seed=9)
        assert reward.pair_accuracy(models[0], new) > 0.9
        assert reward.pair_accuracy(models[3], new) < 0.1
        heads = [m.classifier.weight for m in models]
        assert reports[0] == reports[1] and torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2]) and not models[0].training

    def test_held_out_queries_are_never_trained_on(self, model, monkeypatch):
        seen, score = {True: set(), False: set()}, model.score

        def spy(queries, answers):
            seen[torch.is_grad_enabled()] |= set(queries)
            assert model.training == torch.is_grad_enabled()
            return score(queries, answers)

        monkeypatch.setattr(model, "score", spy)
        pairs = contrast(100)
        for n, pair in enumerate(pairs):
            pair["query"] = f"query {n // 2}"
        report = reward.train_reward_model(reward.RewardOptions(reward_epochs=2), model, pairs)
        assert len(seen[True]) == 45 and len(seen[False]) == 5 and not seen[True] & seen[False]
        assert (report["held_out_pairs"], report["held_out_queries"]) == (10, 5)

    def test_the_report_is_the_last_epochs_loss_and_the_held_out_accuracy(self, model):
        rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        bert = prlm.Encoder(model.bert.raw | rates)
        bert.tokenizer = model.tokenizer
        model = reward.RewardModel(bert)
        pairs, o = contrast(100), reward.RewardOptions(reward_lr=1e-12, reward_epochs=2)
        report = reward.train_reward_model(o, model, pairs)
        kept, held = reward.split_pairs(pairs, o.seed)
        assert len(kept) == 90 and report["pair_accuracy"] == reward.pair_accuracy(model, held)
        with torch.no_grad():  # at this learning rate the model has stayed what it was
            losses = [reward.info_nce(*reward.score_pairs(model, [pair])) for pair in kept]
        close(torch.tensor(report["loss"]), sum(losses) / len(losses))

    def test_a_loss_gone_wrong_is_told(self, model, monkeypatch):
        monkeypatch.setattr(reward, "info_nce_backward", lambda *_: math.nan)
        with pytest.raises(ValueError, match="lower --reward-lr"):
            reward.train_reward_model(reward.RewardOptions(), model, contrast(20))

    def test_bfloat16_products_leave_float32_gradients(self, model):
        pairs, losses = contrast(8), []
        for dtype in (torch.float32, torch.bfloat16):
            prlm.multiply_in(model, dtype)
            losses.append(reward.info_nce_backward(reward.RewardOptions(), model, pairs))
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


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

    @pytest.mark.parametrize("by", ["id", "profile"])
    def test_the_other_profile_is_another_users(self, by):
        """Records of one user stand together in many files, under one user id or, where data has
        none, with profile items in common. Nothing else of a record changes.
        """
        examples, asked = users(6), []
        for n, e in enumerate(examples):
            if by == "id":
                examples[n] = replace(e, user_id=f"u{n // 3}")
            else:
                shared = {"title": f"everybody's {n // 3}", "text": "y", "id": str(n)}
                examples[n] = replace(e, profile=[*e.profile, shared])
        reward.swap_test(lambda e, a: asked.append(e) or [0.0] * len(e), examples)
        owners = []
        for own, swapped in zip(*asked, strict=True):
            (owner,) = (n for n, e in enumerate(examples) if e.profile == swapped.profile)
            assert owner // 3 != int(own.id) // 3
            assert replace(swapped, profile=own.profile) == own
            owners.append(own)
        assert owners == examples

    def test_without_a_second_user_there_is_none(self):
        one = users(1)
        again = replace(one[0], id="9", user_id="9", query="another")  # the same profile
        assert reward.swap_test(reader, one) is reward.swap_test(reader, [*one, again]) is None


class TestRatioJudge:
    def test_equals_one_answer_at_a_time(self, toy):
        """Answers of several users in any order: each is compared beside its own two prompts."""
        decoder, tokenizer = toy
        examples = load_lamp(TOY / "lamp", "LaMP-4", "dev")[:3]
        asked = [examples[n] for n in (0, 1, 0, 2, 0)]
        answers = ["on golf no joke", "about tennis", examples[0].target, "why", "on\n\n and on"]
        o = reward.RewardOptions(judge="ratio", k=3)
        values = reward.ratio_judge(o, decoder, tokenizer)(asked, answers)
        for e, answer, value in zip(asked, answers, values, strict=True):
            logits, answer = [], answer.replace("\n\n", "")  # it is asked for in one line
            for k in (3, 0):
                messages = retrieve.build_messages(e, retrieve.retrieve(e, k))
                prompt = tokenizer.chat(messages) + tokenizer.fill(retrieve.CLOSED)
                ids = tokenizer.encode(f"<answer>\n{{'title': '{answer}'}}\n</answer>")
                logprobs, _ = prlm.token_logprobs(decoder, [prompt], [[ids]])
                logits.append(logprobs.sum().item())
            assert math.log(value / (1 - value)) == pytest.approx(logits[0] - logits[1], abs=1e-3)

    def test_a_very_likely_answer_is_still_told_from_a_likelier_one(self, toy, monkeypatch):
        found = torch.tensor([[20.0, 25, -800]])
        monkeypatch.setattr(reward, "likelihood_ratio", lambda *_, **__: found)
        examples = load_lamp(TOY / "lamp", "LaMP-4", "dev")[:1] * 3
        judge = reward.ratio_judge(reward.RewardOptions(), *toy)
        one, more, least = judge(examples, ["a", "b", "c"])
        assert 0 <= least < one < more <= 1

    def test_of_records_that_differ_in_their_profile_alone(self, toy):
        """As in the swap test: same id, same query. And no answers at all."""
        judge = reward.ratio_judge(reward.RewardOptions(), *toy)
        own, other = load_lamp(TOY / "lamp", "LaMP-4", "dev")[:2]
        swapped = replace(own, profile=other.profile)
        alone = [*judge([own], [own.target]), *judge([swapped], [own.target])]
        together = judge([own, swapped], [own.target] * 2)
        assert together == pytest.approx(alone, abs=1e-5) and together[0] != together[1]
        assert judge([], []) == []


class TestMakeJudge:
    """From the options to a judge and its report."""

    @pytest.fixture
    def o(self, world):
        return reward.RewardOptions(encoder=str(world / "encoder"), reward_epochs=1, device="cpu")

    @pytest.fixture
    def calls(self, monkeypatch):
        """Counts the two slow parts; the pairs are `contrast`'s."""
        calls, train = [], reward.train_reward_model
        monkeypatch.setattr(reward, "build_pairs", lambda *_: calls.append("pairs") or contrast(40))
        monkeypatch.setattr(
            reward, "train_reward_model", lambda *given: calls.append("train") or train(*given)
        )
        return calls

    def test_what_is_there_is_not_made_again(self, o, calls, tmp_path, capsys):
        asked = [example(query=query) for query in random_texts(5, seed=1)], random_texts(5, seed=2)
        first = reward.make_judge(o, None, None, [], users(), tmp_path / "a/b")(*asked)
        assert calls == ["pairs", "train"]
        report = prlm.read_json(tmp_path / "a/b/report.json")
        assert report["swap_test"] == 0.5 and report["pairs"] == 40  # it is blind to the profile
        said = capsys.readouterr().out
        assert f"pair accuracy {report['pair_accuracy']:.3f} on" in said
        assert "2 held-out queries" in said and "does not see the profile" in said
        model = reward.load_reward_model(tmp_path / "a/b")
        assert model.judge(*asked) == first
        assert reward.make_judge(o, None, None, [], users(), tmp_path / "a/b")(*asked) == first
        saved = replace(o, reward_model=str(tmp_path / "a/b"), encoder=None)
        assert reward.make_judge(saved, None, None, [], users(1), tmp_path / "new")(*asked) == first
        assert "no second user" in capsys.readouterr().out and len(calls) == 2
        (tmp_path / "a/b/report.json").unlink()  # killed before the end: the pairs are kept,
        again = reward.make_judge(o, None, None, [], users(), tmp_path / "a/b")(*asked)
        assert again == first and calls[2:] == ["train"]  # the same model comes out

    def test_ratio_knows_the_user_and_reports_it(self, toy, tmp_path, capsys):
        o, held = reward.RewardOptions(judge="ratio"), load_lamp(TOY / "lamp", "LaMP-4", "dev")
        judge = reward.make_judge(o, *toy, [], held[:30], tmp_path / "new")
        report = prlm.read_json(tmp_path / "new" / "report.json")
        assert report["swap_test"] > 0.8
        said = capsys.readouterr().out
        assert f"swap test {report['swap_test']:.3f} on" in said and "not see" not in said
        assert all(0 < v < 1 for v in judge(held[:2], [e.target for e in held[:2]]))

    @pytest.mark.parametrize("none", [{"k": 0}, {"retriever": "none"}])
    def test_without_a_profile_there_is_nothing_to_compare(self, model, o, tmp_path, none):
        """A judge that is trained already needs none."""
        ((name, value),) = none.items()
        for judge in ("ratio", "bert"):
            with pytest.raises(ValueError, match=f"--{name} {value} leaves none"):
                reward.make_judge(replace(o, judge=judge, **none), None, None, [], [], tmp_path)
        reward.save_reward_model(model, tmp_path / "saved")
        saved = replace(o, reward_model=str(tmp_path / "saved"), **none)
        assert reward.make_judge(saved, None, None, [], users(), tmp_path)(users(1), ["golf"])

    def test_too_few_pairs_or_a_wrong_checkpoint(self, world, o, tmp_path, monkeypatch):
        for pairs in ([], contrast(2)):  # none, or of one query only
            monkeypatch.setattr(reward, "build_pairs", lambda *_, pairs=pairs: pairs)
            with pytest.raises(ValueError, match=f"{len(pairs)} pairs of .* too few"):
                reward.make_judge(o, None, None, [], [], tmp_path / str(len(pairs)))
        for wrong in ({"encoder": str(world / "policy")}, {"reward_model": str(world / "encoder")}):
            with pytest.raises(ValueError, match=next(iter(wrong.values()))):
                reward.make_judge(replace(o, **wrong), None, None, [], [], tmp_path / "new")
        with pytest.raises(ValueError, match="--encoder"):
            reward.make_judge(replace(o, encoder=None), None, None, [], [], tmp_path / "new")

    def test_command(self, world, calls, tmp_path, capsys):
        places = {name: str(world / name) for name in ("policy", "lamp", "encoder")}
        given = {"model": places["policy"], "data": places["lamp"], "encoder": places["encoder"]}
        given |= {"preset": "toy", "device": "cpu", "out": str(tmp_path / "judge")}
        reward.main(o := prlm.resolve(reward.Options, given))
        judge = reward.load_reward_model(o.out).judge(users(2), ["golf", "paris"])
        assert len(set(judge)) == 2 and prlm.read_json(tmp_path / "judge/options.json")["k"] == o.k
        with pytest.raises(ValueError, match="--overwrite"):
            reward.main(o)
        reward.main(replace(o, overwrite=True))
        assert calls == ["pairs", "train"] * 2
