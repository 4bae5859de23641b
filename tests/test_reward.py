"""The reward is the sum it says; the reward model equals transformers' and learns a contrast."""

import copy
import json
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
import rl
from retrieve import Example, load_lamp

TOY = Path(__file__).parent.parent / "toy"
WORDS = ["tennis", "golf", "paris", "oslo", "wins", "today", "zebra"]  # the last is unknown


def close(a, b, relative=1e-5, case=""):
    __tracebackhide__ = True
    same(a, b, case, relative)


def make_model(directory, seed=0, scale=0.3):
    """A reward model with every weight away from its default, so that scores differ widely."""
    torch.manual_seed(seed)
    model = reward.RewardModel(prlm.load_encoder(directory))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.fixture
def model(world):
    return make_model(world / "encoder")


def random_texts(count, longest=20, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def example(task="LaMP-4", target="tennis wins", query="golf today"):
    return Example("1", "u", task, query, [], target)


class Fake:
    """A reward model whose score is a table's."""

    def __init__(self, table):
        self.table = table

    def score(self, queries, answers):
        return torch.tensor([float(self.table[answer]) for answer in answers])

    score_all = score


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

    def test_one_negative_is_minus_log_sigmoid(self):
        a, b = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
        close(reward.info_nce(a, b[:, None]), -torch.sigmoid(a - b).log().mean())

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


def transformers_model(kind, directory):
    """A random model of transformers, saved where load_decoder finds it."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(directory)
    return model


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
    @pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
    def test_equals_a_plain_computation_with_transformers(self, tmp_path, kind):
        theirs = transformers_model(kind, tmp_path)
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
        ratios = reward.likelihood_ratio(
            prlm.load_decoder(tmp_path), with_profile, without, answers
        )
        assert expected.abs().mean() > 1
        close(ratios, expected.float(), 1e-4, "ratios")
        same(ratios[1, 2].item(), 0.0, "an empty answer")

    def test_does_not_depend_on_batches_groups_or_neighbours(self, tmp_path):
        transformers_model("Qwen2", tmp_path)
        decoder = prlm.load_decoder(tmp_path)
        with_profile, without, answers = ratio_problem()
        whole = reward.likelihood_ratio(decoder, with_profile, without, answers)
        close(reward.likelihood_ratio(decoder, with_profile, without, answers, 1), whole)
        alone = [
            [reward.likelihood_ratio(decoder, [p], [q], [[answer]]).item() for answer in group]
            for p, q, group in zip(with_profile, without, answers, strict=True)
        ]
        close(torch.tensor(alone), whole)

    def test_a_prompt_runs_once_within_the_budget_and_without_gradient(self, tmp_path, monkeypatch):
        transformers_model("Qwen2", tmp_path)
        decoder, asked = prlm.load_decoder(tmp_path), []
        real = prlm.token_logprobs

        def spy(decoder, prompts, completions):
            asked.append(prompts)
            tokens = sum(map(len, prompts)) + sum(len(a) for group in completions for a in group)
            assert len(prompts) == 1 or tokens <= 60, f"{len(prompts)} groups, {tokens} tokens"
            return real(decoder, prompts, completions)

        monkeypatch.setattr(prlm, "token_logprobs", spy)
        with_profile, without, answers = ratio_problem()
        ratios = reward.likelihood_ratio(decoder, with_profile, without, answers, 60)
        assert not ratios.requires_grad, "the result has a gradient"
        ran = sorted(prompt for batch in asked for prompt in batch)
        same(ran, sorted(with_profile + without), "prompts that ran")
        assert len(asked) > 2, "all groups ran at once"

    def test_the_same_prompt_twice_says_nothing(self, tmp_path):
        transformers_model("Qwen2", tmp_path)
        with_profile, _, answers = ratio_problem()
        decoder = prlm.load_decoder(tmp_path)
        ratios = reward.likelihood_ratio(decoder, with_profile, with_profile, answers)
        same(ratios, torch.zeros(4, 3), "the same prompt on both sides")

    def test_nothing_to_compare(self, tmp_path):
        transformers_model("Qwen2", tmp_path)
        none = reward.likelihood_ratio(prlm.load_decoder(tmp_path), [], [], [])
        same(none, torch.zeros(0, 0), "no prompts")


class TestRewardModel:
    def test_scores_equal_transformers(self, model, tmp_path):
        transformers = pytest.importorskip("transformers")
        queries, answers = random_texts(6, seed=1), random_texts(6, seed=2)
        queries[0], answers[1] = " ".join(WORDS * 20), " ".join(WORDS * 9)  # beyond 64 tokens
        reward.save_reward_model(model, tmp_path)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        file = str(tmp_path / "tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, pad_token="[PAD]")
        how = dict(truncation=True, max_length=64, padding=True, return_token_type_ids=True)
        batch = tokenizer(queries, answers, return_tensors="pt", **how)
        assert batch["token_type_ids"].sum() > 0
        with torch.no_grad():
            close(model.score(queries, answers), theirs(**batch).logits[:, 0], 1e-4)

    def test_a_pair_scores_the_same_alone_in_a_batch_and_in_chunks(self, model):
        queries, answers = random_texts(30, seed=1), random_texts(30, seed=2)
        pairs = list(zip(queries, answers, strict=True))
        with torch.no_grad():
            alone = torch.cat([model.score([query], [answer]) for query, answer in pairs])
            close(model.score(queries, answers), alone)
        close(model.score_all(queries, answers, 7), alone)
        assert alone.std() > 0.1  # a constant would pass all of this

    def test_query_and_answer_both_count_and_differ(self, model):
        a, b, c = "tennis wins", "golf", "paris today"
        scores = model.score_all([a, b, c, a], [b, a, b, c])
        assert len({round(s, 4) for s in scores.tolist()}) == 4

    def test_no_dropout_outside_training_and_gradient_everywhere(self, model):
        assert not model.training
        first, second = (model.score(["golf"], ["tennis"]) for _ in range(2))
        assert torch.equal(first, second)
        model.score(["golf"], ["tennis wins"]).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert not model.score_all(["golf"], ["tennis"]).requires_grad

    def test_load_reads_what_save_wrote(self, model, tmp_path):
        queries, answers = random_texts(9, seed=1), random_texts(9, seed=2)
        reward.save_reward_model(model, tmp_path)
        again = reward.load_reward_model(tmp_path)
        assert torch.equal(again.score_all(queries, answers), model.score_all(queries, answers))

    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_the_config_names_the_precision_of_the_weights(self, world, model, tmp_path, key):
        transformers = pytest.importorskip("transformers")
        model.encoder.raw = model.encoder.raw | {key: "float16"}  # what its encoder was loaded from
        reward.save_reward_model(model, tmp_path)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, dtype="auto"
        )
        assert {p.dtype for p in theirs.parameters()} == {torch.float32}

    def test_directories_without_a_reward_model(self, world, model, tmp_path):
        with pytest.raises(ValueError, match="classifier"):
            reward.load_reward_model(world / "encoder")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            reward.load_reward_model(tmp_path / "nowhere")
        reward.save_reward_model(model, tmp_path)
        tensors = prlm.read_safetensors(tmp_path / "model.safetensors")
        two = {"classifier.weight": torch.ones(2, 16), "classifier.bias": torch.ones(2)}
        prlm.write_safetensors(tmp_path / "model.safetensors", tensors | two)
        with pytest.raises(ValueError, match="labels"):
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
    @pytest.mark.parametrize(
        "completion, expected",
        [
            ("<think>\na\n</think>\n{'title': 'b'}", 1),
            ("a\n</think>\nb", 1),  # the prompt has opened it
            ("<think>\na", 0),
            ("{'title': 'b'}", 0),
            ("", 0),
        ],
    )
    def test_format(self, completion, expected):
        assert reward.format_reward(completion) == expected

    def test_accuracy_is_the_sum_of_three_rouges(self):
        assert reward.accuracy_reward("a b c", "A, b c!") == 3
        close(reward.accuracy_reward("a b c", "a b d"), 2 / 3 + 1 / 2 + 2 / 3)
        assert reward.accuracy_reward("", "a b") == 0

    @pytest.mark.parametrize("weight", [None, 0.1, 2.0])
    def test_parts_and_sum(self, model, weight):
        """`weight` None is without a judge."""
        completions = [case[0] for case in CASES]
        queries = random_texts(len(completions))
        examples = [example(case[1], query=q) for case, q in zip(CASES, queries, strict=True)]
        how = {} if weight is None else {"judge": reward.bert_judge(model)}
        rows = reward.rewards(completions, examples, **how, personalization=weight or 0.1)
        for row, e, case in zip(rows, examples, CASES, strict=True):
            _, task, answered, accuracy, shaped = case
            personal = 0.0
            if weight is not None and answered:
                personal = model.score_all([e.query], [row["answer"]]).sigmoid().item()
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
        judge = reward.bert_judge(model)
        assert reward.rewards([], [], judge) == []
        (row,) = reward.rewards(["hm"], [example()], judge)
        assert row["reward"] == pytest.approx(-1.0) and row["answer"] == ""

    def test_the_weights(self):
        """By default 1, a tenth and a tenth; the parts in the rows are not multiplied by them."""
        judge = reward.bert_judge(Fake({"tennis wins": math.log(3)}))  # whose sigmoid is 3/4
        completion = "hm\n</think>\n{'title': 'tennis wins'}"
        parts = {"accuracy": 3, "format": 1, "personalization": 0.75}
        expected = {"": 3.175, "accuracy": 0.175, "format": 3.075, "personalization": 3.1}
        for name, total in expected.items():
            weights = {name: 0.0} if name else {}
            (row,) = reward.rewards([completion], [example()], judge, **weights)
            assert {key: row[key] for key in parts} == pytest.approx(parts)
            assert row["reward"] == pytest.approx(total)

    def test_a_user_without_gold_text(self):
        """Nothing but the accuracy is missing."""
        judge = reward.bert_judge(Fake({"tennis wins": 0}))
        (row,) = reward.rewards(["{'title': 'tennis wins'}"], [example(target=None)], judge)
        assert (row["accuracy"], row["personalization"]) == (0.0, 0.5)

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

        o = reward.RewardOptions(negatives=2, tokens_per_micro_batch=budget)
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

    def test_scores_of_pairs_with_unequal_numbers_of_negatives(self, model):
        pairs = contrast(5)
        positive, negatives = reward.score_pairs(model, pairs)
        width = max(len(pair["negatives"]) for pair in pairs)
        assert positive.requires_grad and negatives.shape == (5, width)
        for n, pair in enumerate(pairs):
            count, query = len(pair["negatives"]), pair["query"]
            close(positive[n : n + 1].detach(), model.score_all([query], [pair["positive"]]))
            expected = model.score_all([query] * count, pair["negatives"])
            close(negatives[n, :count].detach(), expected)
            assert (negatives[n, count:] == -math.inf).all()

    def test_pair_accuracy_equals_a_naive_loop(self):
        rng = random.Random(0)
        table = {str(n): rng.random() for n in range(500)}
        names = iter(table)
        pairs = [
            {"query": "q", "positive": next(names), "negatives": [next(names) for _ in range(size)]}
            for size in rng.choices((1, 2, 4), k=130)
        ]
        won = [table[p["positive"]] > table[n] for p in pairs for n in p["negatives"]]
        assert reward.pair_accuracy(Fake(table), pairs) == sum(won) / len(won)

    def test_training_learns_a_contrast_and_repeats(self, world):
        """Dropout follows the option's seed alone, whatever was drawn before."""
        start, pairs, reports, models = make_model(world / "encoder", scale=0), contrast(), [], []
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
        reward.train_reward_model(reward.RewardOptions(reward_epochs=2), model, pairs)
        assert len(seen[True]) == 45 and len(seen[False]) == 5 and not seen[True] & seen[False]

    def test_too_few_pairs_to_train_on(self, model):
        for pairs in ([], contrast(1), contrast(2)):  # of one query only
            with pytest.raises(ValueError, match="too few"):
                reward.train_reward_model(reward.RewardOptions(), model, pairs)

    @pytest.mark.parametrize("loss, gradient", [(0.5, math.inf), (math.nan, 0.0)])
    def test_a_number_gone_wrong_is_not_applied(self, model, monkeypatch, loss, gradient):
        def breaks(o, model, pairs):
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient)
            return loss

        monkeypatch.setattr(reward, "info_nce_backward", breaks)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="lower --reward-lr"):
            reward.train_reward_model(reward.RewardOptions(), model, contrast(20))
        after = list(model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_bfloat16_products_leave_float32_gradients(self, model):
        pairs, losses = contrast(8), {}
        for precision in ("float32", "bfloat16", "auto"):  # auto: float32 on a CPU
            o = reward.RewardOptions(negatives=2, precision=precision)
            losses[precision] = reward.info_nce_backward(o, model, pairs)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        assert losses["auto"] == losses["float32"] != losses["bfloat16"]
        assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)

    def test_the_report_says_what_it_stands_on(self, model):
        """Held-out pairs and queries, an interval, and the mean loss of the last epoch."""
        model.encoder.dropout[:] = [0.0, 0.0]
        pairs, o = contrast(100), reward.RewardOptions(reward_lr=1e-12, reward_epochs=2)
        report = reward.train_reward_model(o, model, pairs)
        assert (report["held_out_pairs"], report["held_out_queries"]) == (10, 5)
        bounds = report["pair_accuracy_low"], report["pair_accuracy_high"]
        assert bounds == reward.wilson(report["pair_accuracy"], 5)
        kept, held = reward.split_pairs(pairs, o.seed)
        assert len(kept) == 90 and report["pair_accuracy"] == reward.pair_accuracy(model, held)
        with torch.no_grad():  # at this learning rate the model has stayed what it was
            losses = [reward.info_nce(*reward.score_pairs(model, [pair])) for pair in kept]
        close(torch.tensor(report["loss"]), sum(losses) / len(losses))

    @pytest.mark.parametrize("negatives", [1, 3])
    def test_pairs_are_with_against_without_the_profile(self, world, monkeypatch, negatives):
        examples = load_lamp(world / "lamp", "LaMP-4", "train")
        tokenizer, asked = prlm.load_tokenizer(world / "policy"), []

        def fake(o, decoder, tokenizer, prompts, group_size=1, temperature=0.0, description=""):
            texts = [tokenizer.decode(prompt) for prompt in prompts]
            titles = [any(item["title"] in text for item in e.profile)
                      for e, text in zip(examples, texts, strict=True)]  # fmt: skip
            asked.append((group_size, temperature))
            name = {(True,): "with", (False,): "without"}[tuple(set(titles))]
            answers = [f"{name} {n}" for n in range(group_size)]
            answers[name == "with"] = ""
            return [[f"{{'title': '{a}'}}" for a in answers] for _ in prompts]

        monkeypatch.setattr(reward, "complete", fake)
        options = reward.RewardOptions(pairs_per_query=4, negatives=negatives, k=2)
        pairs = reward.build_pairs(options, None, tokenizer, examples)
        assert sorted(asked) == sorted([(4, 0.7), (4 * negatives, 0.7)])
        for e in examples:
            own = [pair for pair in pairs if pair["id"] == e.id]
            assert {pair["query"] for pair in own} == {e.query.strip()}
            positives = [pair["positive"] for pair in own]
            used = [text for pair in own for text in pair["negatives"]]
            for texts, name in ((positives, "with "), (used, "without ")):
                assert len(set(texts)) == len(texts) and all(t.startswith(name) for t in texts)
            sizes = [len(pair["negatives"]) for pair in own]
            assert len(own) in (2, 3) and min(sizes) >= 1 and max(sizes) == negatives

    def test_pairs_of_a_real_policy(self, world):
        """It is random, so most answers are empty; what is left has both sides."""
        decoder = prlm.load_decoder(world / "policy")
        tokenizer = prlm.load_tokenizer(world / "policy")
        examples = load_lamp(world / "lamp", "LaMP-4", "train")
        options = reward.RewardOptions(pairs_per_query=6, max_new_tokens=12, max_prompt_tokens=300)
        pairs, again = (reward.build_pairs(options, decoder, tokenizer, examples) for _ in range(2))
        assert pairs == again and 0 < len(pairs) <= 36
        assert all(pair["positive"] and all(pair["negatives"]) for pair in pairs)

    def test_a_reward_model_is_made_once(self, world, tmp_path, monkeypatch):
        calls = []

        def spy(name, result=None):
            real = getattr(reward, name)

            def counted(*arguments):
                calls.append(name)
                return real(*arguments) if result is None else result

            monkeypatch.setattr(reward, name, counted)

        spy("build_pairs", contrast(40))
        spy("train_reward_model")
        options = reward.RewardOptions(encoder=str(world / "encoder"), reward_epochs=1)
        directory = tmp_path / "runs" / "reward"

        def get():
            return reward.obtain_reward_model(options, None, None, [], directory)

        first = get()
        assert calls == ["build_pairs", "train_reward_model"]
        report = json.loads((directory / "report.json").read_text())
        assert report.keys() >= {"pairs", "pair_accuracy"}
        second = get()
        assert len(calls) == 2
        queries, answers = random_texts(5, seed=1), random_texts(5, seed=2)
        expected = first.score_all(queries, answers)
        assert torch.equal(second.score_all(queries, answers), expected)
        (directory / "report.json").unlink()  # killed before the end: the pairs are kept,
        assert torch.equal(get().score_all(queries, answers), expected)  # the same model comes out
        assert calls[2:] == ["train_reward_model"]

    def test_a_faulty_encoder_or_reward_model_is_found_before_the_slow_part(self, world, tmp_path):
        for files in ({"encoder": str(world / "policy")}, {"reward_model": str(world / "encoder")}):
            with pytest.raises(ValueError, match=next(iter(files.values()))):
                reward.check_judge(reward.RewardOptions(**files))

    def test_a_better_policy_after_too_few_pairs(self, world, tmp_path, monkeypatch):
        """What the first one gave is not kept: the same directory serves the next."""
        options = reward.RewardOptions(encoder=str(world / "encoder"), reward_epochs=1)
        for pairs in ([], contrast(2)):  # none, or of one query only
            monkeypatch.setattr(reward, "build_pairs", lambda *_, pairs=pairs: pairs)
            with pytest.raises(ValueError, match=f"{len(pairs)} pairs of .* too few"):
                reward.obtain_reward_model(options, None, None, [], tmp_path)
        monkeypatch.setattr(reward, "build_pairs", lambda *_: contrast(40))
        reward.obtain_reward_model(options, None, None, [], tmp_path)
        assert json.loads((tmp_path / "report.json").read_text())["pairs"] == 40


@pytest.mark.parametrize("rows, text", [
    ([3], "record 0 is not an object"), ([{"query": "q"}], "record 0 is not an object of strings"),
    ([{"query": "q", "own": 3}], "record 0 is not an object of strings"),
    ([{"query": "q", "own": "a", "other": "b"}, {"query": "q", "own": "a"}], "record 1 does not"),
])  # fmt: skip
def test_a_broken_probe_is_named(tmp_path, rows, text):
    (tmp_path / "LaMP_4").mkdir()
    prlm.write_json(tmp_path / "LaMP_4" / "probe.json", rows)
    with pytest.raises(ValueError, match=rf"probe\.json: {text}"):
        reward.read_rivals(reward.RewardOptions(data=str(tmp_path)))


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


class TestProbe:
    def test_swap_test_of_one_who_reads_and_one_who_is_blind(self):
        report = reward.probe(reader, users())
        low, high = reward.wilson(1.0, 4)
        expected = {"swap_test": 1.0, "swap_test_low": low, "swap_test_high": high, "users": 4}
        assert report == expected
        blind = reward.probe(lambda examples, answers: [float(len(a)) for a in answers], users())
        assert blind["swap_test"] == 0.5
        against = reward.probe(lambda *given: [-value for value in reader(*given)], users())
        assert against["swap_test"] == 0.0

    def test_the_other_profile_is_another_users(self):
        """Records of one user stand together in many files; nothing else of a record changes."""
        examples = [replace(e, user_id=f"u{n // 3}") for n, e in enumerate(users(6))]
        for own, swapped in zip(examples, reward.swap_profiles(examples), strict=True):
            (owner,) = (e.user_id for e in examples if e.profile == swapped.profile)
            assert owner != own.user_id
            assert replace(swapped, profile=own.profile) == own

    def test_rivals_are_judged_beside_their_users_profiles(self):
        rows = [
            {"query": f" query {n}", "own": f"w{n}", "other": f"w{1 - n}", "plain": f"w{n} about"}
            for n in range(2)
        ]
        rows.append({"query": "nobody's", "own": "w0", "other": "w1", "plain": "w2"})  # left out
        report = reward.probe(reader, users(), rows)
        assert (report["own_over_other"], report["own_over_plain"]) == (1.0, 0.5)

    def test_one_user_has_no_other(self):
        assert reward.probe(reader, users(1)) == {}

    def test_wilsons_bounds_are_196_standard_errors_from_the_share(self):
        """Their own standard errors, which is what keeps the interval open at 0 and 1."""
        for won, count in ((0, 5), (3, 7), (40, 50), (200, 200)):
            low, high = reward.wilson(won / count, count)
            assert 0 <= low < high <= 1
            for bound in (low, high):
                squared = 1.96**2 * bound * (1 - bound) / count
                assert (won / count - bound) ** 2 == pytest.approx(squared, abs=1e-12)


class TestJudge:
    """From the options to a judge and its report."""

    @pytest.fixture
    def toy(self):
        return prlm.load_decoder(TOY / "policy"), prlm.load_tokenizer(TOY / "policy")

    def test_ratio_equals_one_answer_at_a_time(self, toy):
        """Answers of several users in any order: each is compared beside its own two prompts."""
        decoder, tokenizer = toy
        examples = load_lamp(TOY / "lamp", "LaMP-4", "dev")[:3]
        asked = [examples[n] for n in (0, 1, 0, 2, 0)]
        answers = ["on golf no joke", "about tennis", examples[0].target, "why", "on and on"]
        o = reward.RewardOptions(judge="ratio", k=3)
        values = reward.ratio_judge(o, decoder, tokenizer)(asked, answers)
        for e, answer, value in zip(asked, answers, values, strict=True):
            logits = []
            for k in (3, 0):
                messages = retrieve.build_messages(e, retrieve.retrieve(e, k))
                prompt = tokenizer.chat(messages) + tokenizer.encode(retrieve.CLOSED)
                ids = tokenizer.encode(f"<answer>\n{{'title': '{answer}'}}\n</answer>")
                logprobs, _ = prlm.token_logprobs(decoder, [prompt], [[ids]])
                logits.append(logprobs.sum().item())
            assert math.log(value / (1 - value)) == pytest.approx(logits[0] - logits[1], abs=1e-3)

    def test_ratio_knows_the_user_and_reports_it(self, toy, tmp_path, capsys):
        o = reward.RewardOptions(judge="ratio", data=str(TOY / "lamp"), probe_examples=30)
        judge = reward.make_judge(o, *toy, [], tmp_path / "new")
        report = json.loads((tmp_path / "new" / "report.json").read_text())
        assert report["swap_test"] > 0.8 and report["own_over_other"] > 0.8
        assert report["users"] == 30
        said = capsys.readouterr().out
        assert f"swap test {report['swap_test']:.3f} (" in said and "own over other" in said
        examples = load_lamp(TOY / "lamp", "LaMP-4", "dev")[:2]
        assert all(0 < v < 1 for v in judge(examples, [e.target for e in examples]))

    def test_a_saved_reward_model_is_examined_too(self, world, model, toy, tmp_path, capsys):
        reward.save_reward_model(model, tmp_path / "saved")
        o = reward.RewardOptions(reward_model=str(tmp_path / "saved"), data=str(world / "lamp"))
        judge = reward.make_judge(o, *toy, [], tmp_path / "run")
        expected = model.score_all(["golf"], ["tennis"]).sigmoid().tolist()
        assert judge([example(query="golf")], ["tennis"]) == expected
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["swap_test"] == 0.5  # it is blind to the profile
        assert "it does not see the profile" in capsys.readouterr().out

    def test_no_weight_no_judge(self, tmp_path):
        assert rl.obtain_judge(rl.Options(personalization=0), tmp_path, None, []) is None

    @pytest.mark.parametrize("none", [{"k": 0}, {"retriever": "none"}])
    def test_a_ratio_without_a_profile_is_refused(self, none):
        (name, value), *_ = none.items()
        with pytest.raises(ValueError, match=f"--{name} {value} leaves none"):
            reward.check_judge(reward.RewardOptions(judge="ratio", **none))

    def test_few_held_out_queries_are_mentioned(self):
        report = {"pairs": 71, "held_out_pairs": 6, "held_out_queries": 2, "loss": 0.5}
        report |= {"pair_accuracy": 0.75, "pair_accuracy_low": 0.2, "pair_accuracy_high": 0.97}
        said = reward.describe("bert", report)
        assert "0.750 (0.20 to 0.97), from 6 pairs of 2 held-out queries: too few" in said
        assert "too few" not in reward.describe("bert", report | {"held_out_queries": 40})

    def test_a_very_likely_answer_is_still_told_from_a_likelier_one(self, toy, monkeypatch):
        monkeypatch.setattr(
            reward, "likelihood_ratio", lambda *_, **__: torch.tensor([[20.0, 25, -800]])
        )
        examples = load_lamp(TOY / "lamp", "LaMP-4", "dev")[:1] * 3
        judge = reward.ratio_judge(reward.RewardOptions(), *toy)
        one, more, least = judge(examples, ["a", "b", "c"])
        assert 0 <= least < one < more <= 1

    def test_ratio_of_records_that_differ_in_their_profile_alone(self, toy):
        """As in the swap test: same id, same query. And no answers at all."""
        o = reward.RewardOptions(judge="ratio", data=str(TOY / "lamp"))
        judge = reward.ratio_judge(o, *toy)
        own, other = load_lamp(TOY / "lamp", "LaMP-4", "dev")[:2]
        swapped = replace(own, profile=other.profile)
        alone = [*judge([own], [own.target]), *judge([swapped], [own.target])]
        together = judge([own, swapped], [own.target] * 2)
        assert together == pytest.approx(alone, abs=1e-5) and together[0] != together[1]
        assert judge([], []) == []

    def test_only_the_papers_judge_is_called_blind(self):
        report = {"swap_test": 0.5, "swap_test_low": 0.4, "swap_test_high": 0.6, "users": 40}
        assert "does not see the profile" in reward.describe("bert", report)
        assert "does not see" not in reward.describe("ratio", report)

    def test_an_answer_of_several_lines_is_asked_for_in_one(self):
        block = retrieve.answer_block("LaMP-7", "so tired \n\n of mondays")
        assert reward.extract_answer(block, "LaMP-7") == "so tired of mondays"

    def test_a_judge_may_return_a_tensor(self):
        asked = [example(query="golf", target="golf")]
        rows = reward.rewards(["{'title': 'golf'}"], asked, judge=lambda *_: torch.tensor([0.25]))
        assert json.loads(json.dumps(rows))[0]["personalization"] == 0.25
