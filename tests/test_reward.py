"""The reward is the sum it says; the reward model equals transformers' and learns a contrast."""

import copy
import json
import math
import random
from pathlib import Path

import pytest
import torch

import prlm
import retrieve
import reward
from retrieve import Example, load_lamp

TOY = Path(__file__).parent.parent / "toy"
WORDS = ["tennis", "golf", "paris", "oslo", "wins", "today", "zebra"]  # the last is unknown


def close(a, b, relative=1e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape
    assert (a - b).abs().max() <= relative * b.abs().max(), float((a - b).abs().max())


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
        assert ratios.shape == (4, 3) and expected.abs().mean() > 1
        close(ratios, expected.float(), 1e-4)
        assert ratios[1, 2] == 0  # an empty answer

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
            assert len(prompts) == 1 or tokens <= 60
            return real(decoder, prompts, completions)

        monkeypatch.setattr(prlm, "token_logprobs", spy)
        with_profile, without, answers = ratio_problem()
        ratios = reward.likelihood_ratio(decoder, with_profile, without, answers, 60)
        assert not ratios.requires_grad
        assert sorted(p for batch in asked for p in batch) == sorted(with_profile + without)
        assert len(asked) > 2

    def test_the_same_prompt_twice_says_nothing(self, tmp_path):
        transformers_model("Qwen2", tmp_path)
        with_profile, _, answers = ratio_problem()
        decoder = prlm.load_decoder(tmp_path)
        ratios = reward.likelihood_ratio(decoder, with_profile, with_profile, answers)
        assert ratios.abs().max() == 0

    def test_nothing_to_compare(self, tmp_path):
        transformers_model("Qwen2", tmp_path)
        assert reward.likelihood_ratio(prlm.load_decoder(tmp_path), [], [], []).numel() == 0


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
            assert values == pytest.approx([accuracy, shaped, personal, total], rel=1e-4)
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
        assert all(rows[int(n)]["personalization"] == float(n) for n, _ in expected)


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

    @pytest.mark.parametrize("negatives", [1, 3])
    def test_pairs_are_with_against_without_the_profile(self, world, monkeypatch, negatives):
        examples = load_lamp(world / "lamp", "LaMP-4", "train")
        tokenizer, asked = prlm.load_tokenizer(world / "policy"), []

        def fake(o, decoder, tokenizer, prompts, group_size=1, temperature=0.0, *_):
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

    def test_probe_counts_a_tie_as_a_half(self, tmp_path):
        rows = [("a", "b", "c"), ("b", "a", "c"), ("a", "c", "b"), ("b", "b", "c")]
        keys, path = ("query", "own", "other", "plain"), tmp_path / "probe.json"
        path.write_text(json.dumps([dict(zip(keys, ("q", *row), strict=True)) for row in rows]))
        shares = reward.probe(Fake(dict(a=2, b=1, c=0)), path)
        assert shares == {"own_over_other": 2.5 / 4, "own_over_plain": 1.0}
        shares = reward.probe(Fake(dict(a=1, b=1, c=1)), path)
        assert shares == {"own_over_other": 0.5, "own_over_plain": 0.5}

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
        triples = [{"query": "wins", "own": "golf wins", "other": "oslo wins"}]
        (tmp_path / "LaMP_4").mkdir()
        (tmp_path / "LaMP_4" / "probe.json").write_text(json.dumps(triples))
        options = reward.RewardOptions(
            encoder=str(world / "encoder"), data=str(tmp_path), reward_epochs=1, device="cpu"
        )
        directory = tmp_path / "runs" / "reward"

        def get():
            return reward.obtain_reward_model(options, None, None, [], directory)

        first = get()
        assert calls == ["build_pairs", "train_reward_model"]
        report = json.loads((directory / "report.json").read_text())
        assert report.keys() >= {"pairs", "pair_accuracy", "own_over_other"}
        second = get()
        assert len(calls) == 2
        queries, answers = random_texts(5, seed=1), random_texts(5, seed=2)
        expected = first.score_all(queries, answers)
        assert torch.equal(second.score_all(queries, answers), expected)
        (directory / "report.json").unlink()  # killed before the end: the pairs are kept,
        assert torch.equal(get().score_all(queries, answers), expected)  # the same model comes out
        assert calls[2:] == ["train_reward_model"]


class TestTRL:
    def test_trains_with_our_prompts_and_reward(self, tmp_path):
        """Two steps of TRL's own trainer on the toy policy; its logged reward is ours."""
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        examples = load_lamp(TOY / "lamp", "LaMP-4", "train")[:4]
        tokenizer = prlm.load_tokenizer(TOY / "policy")
        messages = [retrieve.build_messages(e, retrieve.retrieve(e, 2)) for e in examples]
        prompts = [prlm.render_chat(chat, tokenizer.vocabulary) for chat in messages]
        columns = {"prompt": prompts, "query": [e.query for e in examples]}
        data = datasets.Dataset.from_dict(columns | {"target": [e.target for e in examples]})
        paid, ours = [], reward.trl_reward("LaMP-4")

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

    def test_columns_and_chats(self):
        pay = reward.trl_reward("LaMP-4")
        good = "<think>\nhm\n</think>\n{'title': 'golf in oslo'}"
        completions = [good, [{"role": "assistant", "content": good}], "no answer"]
        targets = ["golf in oslo", "golf", "golf"]
        found = pay(completions, query=["q"] * 3, target=targets, prompt=["p"] * 3)
        examples = [Example("", "", "LaMP-4", "q", [], target) for target in targets]
        texts = [good, good, "no answer"]
        assert found == [part["reward"] for part in reward.rewards(texts, examples)]
        assert found[0] == pytest.approx(3.1) and found[2] == 0
