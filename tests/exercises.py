"""Exercises: one function of the project is blanked, its ordinary tests say when it is right again.

    python tests/exercises.py list
    python tests/exercises.py start 27 ../mine     # a copy of the repository, grpo_loss blanked
    python tests/exercises.py check 27 ../mine     # what passes, the points, a hint
    python tests/exercises.py bug 27 ../broken     # a copy with a typical mistake in grpo_loss,
    python tests/exercises.py bug 27 ../broken --line 117    # which stands on this line: or not
    python tests/exercises.py selftest             # are the graders any good?

The files of the project are the solutions, and nothing in them is marked up. A grader is a few of
the repository's own tests. `selftest` finds out how good they are: they have to pass the reference
and a second solution, and to fail the blank, each of the typical mistakes below, a function that
answers zero, one that repeats its first answer, and, for each argument, one that ignores it. And
the two solutions have to agree on random input (differentials.py).
"""

import argparse
import ast
import dataclasses
import faulthandler
import functools
import gc
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import xml.etree.ElementTree
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("prlm.py", "retrieve.py", "eval.py", "reward.py", "rl.py")
ANSWERS = ("tests/exercises.py", "tests/test_exercises.py")  # not in any student's copy
MADE = "exercise.json"  # in a copy: which exercise it is for, and which of its bugs it holds
NEEDED = ("pytest", "hypothesis", "torch", "transformers", "safetensors")  # for any test at all
LIMIT = 180  # seconds for the tests of one exercise, after which a loop is taken to be endless
HINTS = {  # of any exercise, after its own
    "DID NOT RAISE": "The docstring says what is refused.",
    "Regex pattern": "What an error says is asked for as well: the words stand there.",
}


class Mutant(NamedTuple):
    """A typical mistake: `old`, which the function's body holds once, becomes `new`."""

    name: str
    symptom: str  # what somebody who trains with it would see
    old: str
    new: str


class Exercise(NamedTuple):
    number: int  # as the functions stand in the chapters
    title: str
    file: str
    function: str  # or Class.method
    points: int
    graders: str  # classes or tests of test_<file>, or files::test
    hints: dict[str, str]  # a part of the failed test's name, case or words -> what to look at
    mutants: list[Mutant]
    solution: str  # another body that is right as well

    @property
    def tests(self) -> list[str]:
        """pytest's names of what grades it."""
        names = (n if ".py" in n else f"test_{self.file}::{n}" for n in self.graders.split())
        return [f"tests/{name}" for name in names]

    @property
    def in_full(self) -> str:
        return " \\\n    ".join(["python -m pytest", *self.tests])


# ---- The exercises ---------------------------------------------------------------------------
# fmt: off

EXERCISES = [
    # Retrieval
    Exercise(1, "BM25: the index and the weight of a word", "retrieve.py", "BM25.__init__", 4,
        "TestBM25",
        {"": "Compute the idf of each word of [['a'], ['b', 'b', 'c'], ['b']] by hand: in how many "
             "documents does it stand? What happens to a word that stands in most of them?",
         "nothing": "What is the mean length of no documents, and the mean idf of no words?"}, [
            Mutant("idf without + 0.5", "Scores are off from rank_bm25's, most for rare words.",
                   " - held + 0.5) - np.log(held + 0.5)", ") - np.log(held)"),
            Mutant("a negative idf is kept", "A frequent query word lowers an item that holds it.",
                   "weights[weights < 0]", "weights[np.isnan(weights)]"),
            Mutant("n(w) counts occurrences", "A word repeated by one item hardly counts there.",
                   "len(found) for found", "sum(found.values()) for found"),
            Mutant("b and 1 - b are swapped", "Raising b makes an item's length matter less.",
                   "(1 - b + b *", "(b + (1 - b) *"),
        ], """
        if idf not in ("okapi", "lucene"):
            raise ValueError(f"idf {idf!r} is neither okapi nor lucene")
        self.k1, self.counts, self.idf, N = k1, {}, {}, len(corpus)
        for number, text in enumerate(corpus):
            for word in text:
                self.counts.setdefault(word, {})[number] = text.count(word)
        for word, found in self.counts.items():
            odds = (N - len(found) + 0.5) / (len(found) + 0.5)
            self.idf[word] = float(np.log(odds if idf == "okapi" else 1 + odds))
        mean = sum(self.idf.values()) / max(len(self.idf), 1)
        self.idf = {w: value if value >= 0 else mean / 4 for w, value in self.idf.items()}
        length = sum(map(len, corpus)) / max(N, 1) or 1.0
        self.norm = np.array([k1 * (1 - b) + k1 * b * len(text) / length for text in corpus])
        """),
    Exercise(2, "BM25: the score of a document", "retrieve.py", "BM25.scores", 3, "TestBM25",
        {"": "Score one document by hand. What does a word add that is asked twice, or is unknown?",
         "nothing": "Without documents, words or a match the scores are zeros, one a document."}, [
            Mutant("repeated words count once", "Queries that repeat a word are scored too low.",
                   "for word in query:", "for word in dict.fromkeys(query):"),
            Mutant("k1 + 1 is forgotten", "The ranking is right, but all scores are too small.",
                   " * (self.k1 + 1)", ""),
            Mutant("the count does not saturate", "One query word, repeated, beats all of them.",
                   "(count + self.norm[where])", "(1 + self.norm[where])"),
        ], """
        total = np.zeros(len(self.norm))
        for n, norm in enumerate(self.norm):
            for word in query:
                count = self.counts.get(word, {}).get(n, 0)
                total[n] += count and self.idf[word] * count * (self.k1 + 1) / (count + norm)
        return total
        """),
    Exercise(3, "The best k items of a profile", "retrieve.py", "retrieve", 3,
        "TestRetrieve TestDense::test_ranks_by_cosine",
        {"": "Rank three items by hand. Which texts are compared with which query? What ties keeps "
             "the profile's order, also where all scores are 0.",
         "random": "Does the draw depend on anything but the seed and the record's id?",
         "recency": "A date is its numbers, the year first; equal ones keep their order."}, [
            Mutant("ties go to the higher index", "Rankings are rank_bm25's, but for ties.",
                   "range(len(profile)), key", "range(len(profile))[::-1], key"),
            Mutant("the oldest items come first", "Recency shows what the user wrote years ago.",
                   "reverse=True", "reverse=retriever != \"recency\""),
            Mutant("one draw for all users", "Random retrieval takes the same places everywhere.",
                   "random.Random(repr((seed, example.id)))", "random.Random(seed)"),
            Mutant("the idfs are swapped", "`bm25` equals Lucene's ranking, not rank_bm25's.",
                   "\"okapi\" if retriever == \"bm25\"", "\"okapi\" if retriever != \"bm25\""),
        ], """
        if k < 0 or retriever not in ("none", "random", "recency", "bm25", "lucene", "dense"):
            raise ValueError(f"no {retriever!r}, or not {k} items")
        profile = example.profile
        if not k or not profile or retriever == "none":
            return []
        texts, query = [show(item, example.task) for item in profile], example.query
        if retriever == "random":
            noise = random.Random(f"{example.id!r} {seed}")
            keys = [noise.random() for _ in profile]
        elif retriever == "recency":
            keys = [[int(n) for n in re.split("[^0-9]+", str(i.get("date"))) if n] for i in profile]
            if any(not 999 < (date or [0])[0] < 10000 for date in keys):
                raise ValueError(f"{example.id!r} has an item without a date")
        elif retriever == "dense":
            if encoder is None or encoder.tokenizer is None:
                raise ValueError("dense retrieval needs an encoder")
            keys = (embed(encoder, (*texts,)) @ embed(encoder, (query.strip(),))[0]).tolist()
        else:
            idf = {"bm25": "okapi", "lucene": "lucene"}[retriever]
            keys = BM25([*map(str.split, texts)], idf=idf).scores(query.split()).tolist()
        places = sorted(range(len(profile)), key=keys.__getitem__, reverse=True)  # stable
        return [profile[place] for place in places[:k]]
        """),
    Exercise(4, "The personalized prompt under a token budget", "retrieve.py", "build_messages", 5,
        "TestPrompt",
        {"": "`show`, `instruction` and `question` make the lines. Are there items to speak of?",
         "budget": "Count the tokens of the chat as it is sent. Would one more for each field fit?",
         "long": "The query may have as many tokens as all fields of the items together."}, [
            Mutant("the chat format is not counted", "Prompts are a few tokens over the budget.",
                   "len(tokenizer.chat(messages(most, items)))",
                   "sum(len(tokenizer.encode(m[\"content\"])) for m in messages(most, items))"),
            Mutant("a profile is always spoken of", "The baseline speaks of a profile it lacks.",
                   "bool(items)", "True"),
            Mutant("what short fields leave is lost", "A short item makes the whole prompt short.",
                   "max_prompt_tokens + 1)", "max_prompt_tokens // (1 + 2 * len(items)) + 1)"),
            Mutant("items crowd the query out", "Of a long abstract a fifth is left.",
                   "len(items) * len(fields) or 1", "1"),
            Mutant("the first items are left out", "On a small budget the best items are missing.",
                   "items = items[: bisect(", "items = items[::-1][: bisect("),
        ], """
        keys = TASKS[example.task].fields

        def chat(most: int, count: int) -> list[dict]:
            def cut(text: str, n: int) -> str:
                return text.strip() if most < 0 else tokenizer.cut(text.strip(), n)

            shown = [{key: cut(item[key], most) for key in keys} for item in items[:count]]
            lines = [show(item, example.task) for item in shown]
            lines += [instruction(example.task, count > 0)]
            query = cut(example.query, most * max(1, sum(map(len, shown))))
            text = "\\n".join([*lines, question(example.task, query)])
            return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]

        def fits(most: int, count: int) -> bool:
            return len(tokenizer.chat(chat(most, count))) <= max_prompt_tokens

        def largest(good) -> int:
            found = 0
            for step in (1 << n for n in range(20, -1, -1)):  # bit by bit, from above
                found += step * good(found + step)
            return found

        limit, count = max_prompt_tokens, len(items)
        if tokenizer is None or limit is None or fits(-1, count):
            return chat(-1, count)
        if not fits(0, 0):
            raise ValueError(f"the bare instruction takes more than {limit}")
        items = [{key: tokenizer.cut(item[key].strip(), limit) for key in keys} for item in items]
        count = largest(lambda n: n <= len(items) and fits(1, n))
        return chat(largest(lambda most: most <= limit and fits(most, count)), count)
        """),
    # Scores
    Exercise(5, "Matching n-grams", "eval.py", "common", 2, "TestRouge TestBleu",
        {"": "How often do ['a', 'a'] and ['a', 'b'] match, how often ['a', 'a'] and itself?"}, [
            Mutant("sets instead of counts", "ROUGE is off for titles that repeat a word.",
                   "(ngrams[0] & ngrams[1]).total()", "len(ngrams[0] & ngrams[1])"),
            Mutant("counts are not clipped", "'the the the the' scores a perfect precision.",
                   "(ngrams[0] & ngrams[1]).total()",
                   "sum(n for gram, n in ngrams[0].items() if gram in ngrams[1])"),
            Mutant("n-grams do not overlap", "ROUGE-1 is right; ROUGE-2 of equal texts is a half.",
                   "tokens[i:] for i in range(n)", "tokens[i::n] for i in range(n)"),
        ], """
        left = [tuple(b[i : i + n]) for i in range(len(b) - n + 1)]
        count = len(left)
        for i in range(len(a) - n + 1):
            if tuple(a[i : i + n]) in left:
                left.remove(tuple(a[i : i + n]))  # each may be matched once
        return count - len(left)
        """),
    Exercise(6, "ROUGE-L: the longest common subsequence", "eval.py", "longest_common_subsequence",
        3, "TestLongestCommonSubsequence TestRouge::test_golden_values",
        {"": "A subsequence may leave words out, not reorder or repeat them; see the docstring."}, [
            Mutant("a word matches twice", "Repeated words raise a headline's ROUGE-L.",
                   "above[j - 1] + 1", "row[-1] + 1"),
            Mutant("the row above is forgotten", "ROUGE-L is now and then too low.",
                   "max(above[j], row[-1])", "row[-1]"),
            Mutant("a substring, not a subsequence", "ROUGE-L is 0 where the last words differ.",
                   "max(above[j], row[-1])", "0"),
        ], """
        columns = {x: sum(1 << j for j, other in enumerate(b) if other == x) for x in b}
        row = last = (1 << len(b)) - 1  # Hyyrö 2004: bit j is 0 where the row grows at column j
        for token in a:
            matches = row & columns.get(token, 0)
            row = ((row + matches) | (row - matches)) & last
        return len(b) - row.bit_count()
        """),
    Exercise(7, "The answer in a completion", "eval.py", "extract_answer", 5, "TestExtractAnswer",
        {"": "Take the case that failed through the docstring's rules. `read_value` has rule 3.",
         "nothing": "Rules 1 and 2: what counts at all, and what is no key?",
         "placeholder": "Rule 4: the first value that says something, else the placeholder.",
         "several": "Rule 4, and which of several answer tags rule 1 names."}, [
            Mutant("an unclosed thought counts", "Completions cut off in thought earn accuracy.",
                   "if \"<think>\" in text:", "if not text:"),
            Mutant("the last value counts", "Afterthoughts and second attempts replace the answer.",
                   "real + values", "real[::-1] + values"),
            Mutant("the placeholder counts", "A model that repeats the form first earns nothing.",
                   "if not is_placeholder(value, task)", "if value"),
            Mutant("a key may end another word", "'subtitle: ...' is read as an answer.",
                   r"|^[ \t{{#>*-]*{word})", "|{word})"),
        ], r'''
        word, marks, values, at = task_of(task).answer, tuple("'\"‘’“”"), [], 0
        text = completion.split("</think>")[-1]
        if "<think>" in text:
            return ""
        text = text.split("</answer>")[0].split("<answer>")[-1]
        while at < len(text):
            quoted, rest = text[at] in marks, ""
            if quoted:
                rest = text[at + 1 :]
            elif at == 0 or text[at - 1] == "\n":
                rest = text[at:].lstrip(" \t{#>*-")
            good = rest[: len(word)].lower() == word
            good = good and (not quoted or rest.startswith(marks, len(word)))
            rest = re.sub(r"\A[\s*]+", "", rest[len(word) + quoted :])
            at += 1
            if good and rest.startswith(":"):
                rest = re.sub(r"\A[\s*]+", "", rest[1:])
                value, at = read_value(text, len(text) - len(rest))
                values.append(value)
        good = [value for value in values if not is_placeholder(value, task)]
        return next(iter(good), next(filter(None, values), ""))
        '''),
    # The language model
    Exercise(8, "RoPE: the frequencies", "prlm.py", "rope_frequencies", 3,
        "TestRope::test_frequencies_equal_the_formula",
        {"": "The first frequency is 1 and the last is just above 1/theta. For llama3, how often "
             "does a pair turn within the original context, and which ones are left alone?"}, [
            Mutant("the exponent runs twice as fast", "Logits are right at first, then drift off.",
                   ".float() / c.head_dim", ".float() / (c.head_dim / 2)"),
            Mutant("the fast ones are slowed down", "Llama 3.1 mixes up neighbouring words.",
                   "keep * frequencies + (1 - keep) *", "(1 - keep) * frequencies + keep *"),
            Mutant("radians taken for turns", "Qwen2 is right; Llama 3.1 is always slightly off.",
                   " / (2 * math.pi)", ""),
        ], """
        found = []
        for i in range(c.head_dim // 2):
            frequency = c.rope_theta ** (-2 * i / c.head_dim)
            if c.rope_type == "llama3":
                low, high = c.low_freq_factor, c.high_freq_factor
                turns = c.original_max_position_embeddings * frequency / (2 * math.pi)
                if turns < low:
                    frequency /= c.factor
                elif turns < high:
                    share = (turns - low) / (high - low)
                    frequency *= share + (1 - share) / c.factor
            found.append(frequency)
        return torch.tensor(found)
        """),
    Exercise(9, "RoPE: the rotation", "prlm.py", "rotate", 2,
        "TestRope::test_channels_turn_as_complex_numbers",
        {"": "Rotate (1, 0, 0, 0) by hand: which channel gets the sine? `sin` has its minus."}, [
            Mutant("neighbouring channels are paired", "A checkpoint loads, and writes word salad.",
                   "x.roll(x.shape[-1] // 2, -1)", "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)"),
            Mutant("rotated backwards", "Short texts look plausible; word order is mixed up.",
                   "+ x.roll", "- x.roll"),
            Mutant("heads are rolled", "With one head all is right, with more nothing is.",
                   "// 2, -1)", "// 2, -2)"),
        ], """
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        cos, sin = cos[..., :half], sin[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
        """),
    Exercise(10, "Grouped-query attention", "prlm.py", "attention", 5,
        "TestAttention::test_equals_a_naive_loop",
        {"": "Loop over the keys that one query may see. Which of them belong to query head 1?",
         "True": "`visible` [B, T, S] is one for all heads, and True where a query may look."}, [
            Mutant("not causal", "The training loss falls to almost nothing, samples are nonsense.",
                   "{\"is_causal\": True}", "{}"),
            Mutant("key-value heads are tiled", "Word salad with fewer key-value heads than heads.",
                   "for x in (q, k, v))  # [B, heads, T, D]",
                   "for x in (q, k, v))\n"
                   "    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))"),
            Mutant("not scaled", "Each head looks at one token; logits are far from transformers'.",
                   ", **how)", ", scale=1.0, **how)"),
        ], """
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        if visible is None:
            visible = q.new_ones(1, q.shape[1], k.shape[1]).tril() > 0
        scores = scores.masked_fill(~visible[:, None], -math.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        """),
    Exercise(11, "LoRA", "prlm.py", "Linear.forward", 3,
        "TestLinear TestDecoder::test_logits_equal_transformers",
        {"": "x meets A, then B. What scales the result? In which precision are products taken?"}, [
            Mutant("alpha is forgotten", "The sampled policy and the merged one drift apart.",
                   "change = self.scale * F", "change = F"),
            Mutant("an adapter replaces the bias", "Llama has none; Qwen2 writes noise at once.",
                   "else change + bias", "else change"),
            Mutant("`products` is ignored", "--precision bfloat16 is not faster than float32.",
                   "dtype = self.products or self.weight.dtype", "dtype = self.weight.dtype"),
        ], """
        kind = self.weight.dtype if self.products is None else self.products
        x = x.to(kind)
        out = torch.einsum("...i,oi->...o", x, self.weight.to(kind))
        out = out if self.bias is None else out + self.bias.to(kind)
        if self.scale:
            inner = torch.einsum("...i,ri->...r", x, self.lora_A.to(kind))
            out = out + torch.einsum("...r,or->...o", inner * self.scale, self.lora_B.to(kind))
        return out
        """),
    Exercise(12, "Causal masks and padding", "prlm.py", "Decoder.forward", 5,
        "TestDecoder::test_padding_on_either_side_changes_nothing "
        "TestDecoder::test_logits_equal_transformers TestDecoder::test_no_token_sees_the_future",
        {"": "`run` hands q, k and v to attend(layer, q, k, v): what does `attention` need beside?",
         "padding": "Put the same prompt alone, left-padded and right-padded: from which position "
                    "do its logits differ? Which axis of the mask are queries, and which keys?",
         "future": "Token t sees the real tokens s <= t, with a mask as without one."}, [
            Mutant("the causal mask is off by one", "In padded batches the loss is far too low.",
                   "(positions <= positions[:, None])", "(positions <= positions[:, None] + 1)"),
            Mutant("padding is attended", "A prompt answers differently beside a longer one.",
                   "& mask[:, None]", "& torch.ones_like(mask)[:, None]"),
            Mutant("queries are masked, not keys", "Right-padded batches are right, others wrong.",
                   "& mask[:, None]", "& mask[:, :, None]"),
        ], """
        T = tokens.shape[1]
        mask = torch.ones_like(tokens) if mask is None else mask.long()
        visible = torch.eye(T, dtype=torch.bool, device=tokens.device).repeat(len(tokens), 1, 1)
        places = torch.zeros_like(tokens)
        for t in range(T):
            visible[:, t, : t + 1] |= mask[:, : t + 1] == 1
            places[:, t] = mask[:, :t].sum(1) * mask[:, t]
        look = lambda layer, q, k, v: attention(q, k, v, visible)
        return self.logits(self.run(tokens * mask, places, look), self.head)
        """),
    Exercise(13, "Grouped-query attention with a cache", "prlm.py", "Cache.read_next", 6,
        "TestCache TestTwins::test_sampler_and_trainer_agree "
        "TestDecoder::test_greedy_generate_equals_transformers",
        {"": "Compare with plain attention over all keys that one row sees, prompt and completion. "
             "`next_slot` has just counted the new token in `length` and put its place in `slot`; "
             "`hide` is 0 at the prompt's tokens and the slots written so far, -inf elsewhere.",
         "rounded": "`exact_products` keeps float32; the weights of the values may be rounded."}, [
            Mutant("prompts' padding is attended", "A prompt answers badly beside a longer one.",
                   "self.hide[:, None, : T + n]", "F.pad(self.hide[:, None, T : T + n], (T, 0))"),
            Mutant("products are rounded", "In bfloat16, `gap` is above 1 on a real checkpoint.",
                   "torch.cat([x.view(P", "torch.cat([x.to(k.dtype).view(P"),
            Mutant("two softmaxes", "`gap` is large; completions lose the thread of the prompt.",
                   "both.softmax(-1)",
                   "torch.cat([part.softmax(-1) for part in both.split([T, n], -1)], -1)"),
            Mutant("heads are paired wrongly", "Right with one key-value head, noise with more.",
                   "q.view(P, G, K, R, D).transpose(1, 2)", "q.view(P, G, R, K, D).movedim(3, 1)"),
        ], """
        P, K, G, _, D = self.own[layer].shape[1:]
        n, real, rows = self.length, self.hide[:, : self.prompts.shape[1]] == 0, []
        for own, new in zip(self.own[layer], (k, v)):
            own[:, :, :, n - 1] = new.view(P, G, K, D).transpose(1, 2)
        for p in range(P):
            for g in range(G):
                keys, values = (torch.cat([shared[p][:, real[p]], own[p, :, g, :n]], 1)
                                for shared, own in zip(self.shared[layer], self.own[layer]))
                scores = q[p * G + g].view(K, -1, D).float() @ keys.float().mT * D**-0.5
                rows.append((scores.softmax(-1) @ values.float()).to(v.dtype).flatten(0, 1))
        return torch.stack(rows)
        """),
    Exercise(14, "One sampler step", "prlm.py", "sample", 3, "TestSample",
        {"": "Draw 10,000 times from three logits and count. Whose probability is returned?",
         "rows": "Every row draws for itself, from its own logits.",
         "greedy": "At temperature 0 the likeliest id, with its log-probability at temperature 1.",
         "impossible": "Can rounding at either end return an id of probability 0?"}, [
            Mutant("temperature forgotten", "--temperature does nothing but make `gap` large.",
                   "(logits.float() / (temperature or 1.0))", "logits.float()"),
            Mutant("one random number for all rows", "All completions of a group are equal.",
                   "torch.rand(len(sums), 1,", "torch.rand(1, 1,"),
            Mutant("impossible ids can be drawn", "Once in millions of tokens `gap` is above 80.",
                   "right=True", "right=False"),
        ], """
        logprobs = (logits.float() / (temperature if temperature else 1.0)).log_softmax(-1)
        if temperature:
            ids = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
        else:
            ids = logits.max(-1).indices
        return ids, logprobs[torch.arange(len(ids), device=ids.device), ids]
        """),
    Exercise(15, "Sampling groups of completions", "prlm.py", "generate", 6,
        "TestTwins::test_sampler_and_trainer_agree "
        "TestDecoder::test_greedy_generate_equals_transformers "
        "TestTwins::test_ids_beyond_the_tokenizer_are_never_sampled "
        "TestTwins::test_samples_follow_the_distribution "
        "TestTwins::test_rows_are_independent_and_seeds_repeat "
        "TestTwins::test_bad_calls_are_refused",
        {"": "The prompt's last hidden state predicts the first token, which stands behind it. "
             "`cache.next_slot` makes place for every row's next token before it is run.",
         "agree": "A completion ends with its first EOS id, which belongs to it. Each token stands "
                  "one place behind the one before it, and the first one behind its prompt.",
         "beyond": "Only the first `decoder.vocab_limit` rows of the head are ids."}, [
            Mutant("prompts are tiled", "Right with one prompt; `gap` is large with more.",
                   "laid.lengths.repeat_interleave(G)", "laid.lengths.repeat(G)"),
            Mutant("positions stand still", "The first two tokens are right, then `gap` grows.",
                   "positions = positions + 1", "positions = positions.clone()"),
            Mutant("only one EOS id stops", "Some completions make up the user's next turn.",
                   "if token in eos_ids", "if token in [*eos_ids][:1]"),
            Mutant("rows that stay are misplaced", "Some completions go on in others' places.",
                   "positions[kept], writing[kept]", "positions[kept], writing[: len(kept)]"),
        ], """
        fine = temperature == 0 or temperature >= 1e-6
        if group_size < 1 or max_new_tokens < 1 or [] in prompts or not fine:
            raise ValueError("a size, a prompt or the temperature is too small")
        if not prompts:
            return []
        device, rows, G = decoder.head.device, Ragged(prompts, decoder.head.device), group_size
        noise = None if seed is None else torch.Generator(device).manual_seed(seed)
        cache = Cache(decoder, rows, G, max_new_tokens)
        hidden = decoder.run(rows.tokens, rows.positions, cache.read_prompts)
        hidden = torch.stack([hidden[end] for end in rows.ends.tolist() for _ in range(G)])
        writing = [(p, Completion([], [], False)) for p in range(len(prompts)) for _ in range(G)]
        groups, width = [[one for q, one in writing if q == p] for p in range(len(prompts))], G
        while True:
            logits = decoder.logits(hidden, decoder.head[: decoder.vocab_limit])
            ids, chosen = sample(logits, temperature, noise)
            for (_, one), token, logprob in zip(writing, ids.tolist(), chosen.tolist()):
                if not one.finished:
                    one.tokens.append(token)
                    one.logprobs.append(logprob)
                    one.finished = token in eos_ids
            done = [one.finished for _, one in writing]
            if all(done) or cache.length + 1 == max_new_tokens:
                return groups
            if stay := leave(cache, torch.tensor(done, device=device).view(-1, width), 0.75):
                ids, width = ids[stay[0]], stay[1].shape[1]
                writing = [writing[n] for n in stay[0].tolist()]
            behind = [len(prompts[p]) + cache.length for p, _ in writing]
            cache.next_slot(coarse=False)
            hidden = decoder.run(ids, torch.tensor(behind, device=device), cache.read_next)
        """),
    Exercise(16, "Token log-probabilities through the shared prompt", "prlm.py", "token_logprobs",
        6, "TestTwins::test_sampler_and_trainer_agree "
        "TestTwins::test_gradients_equal_the_naive_ones "
        "TestTwins::test_all_completions_of_one_token "
        "TestTwins::test_ids_beyond_the_tokenizer_are_never_sampled "
        "TestTwins::test_bad_calls_are_refused",
        {"": "Run one row at a time in full. Where does each token stand, and which may it see?",
         "one_token": "Which hidden state predicts the first token of a completion?",
         "gradients": "Every completion's gradient flows through the prompt's keys and values."}, [
            Mutant("EOS is not trained", "Completions grow until all of them are truncated.",
                   "target.mask.unflatten", "F.pad(target.mask[:, 1:], (0, 1)).unflatten"),
            Mutant("the causal mask is off by one", "`gap` is large; entropy falls for nothing.",
                   ".tril()", ".tril(1)"),
            Mutant("completions start at place 0", "`gap` is large from the second token on.",
                   "offset + fed.positions", "fed.positions"),
            Mutant("prompts' keys are detached", "The policy hardly learns to use its profiles.",
                   "[prompt_k.repeat_interleave", "[prompt_k.detach().repeat_interleave"),
        ], """
        if not 1e-6 <= temperature < math.inf or [] in prompts:
            raise ValueError("the temperature must be above 0, and prompts hold a token")
        sizes = {len(group) for group in completions}
        if len(prompts) != len(completions) or len(sizes) > 1:
            raise ValueError("each prompt needs a group of completions, all groups of one size")
        device, limit, groups = decoder.head.device, decoder.vocab_limit, []
        width = max((len(answer) for group in completions for answer in group), default=0)
        for prompt, group in zip(prompts, completions):
            for answer in group:
                row = torch.tensor([[*prompt, *answer]], device=device)
                logits = decoder(row)[0, len(prompt) - 1 : -1, :limit].float() / temperature
                ids = row[0, len(prompt) :]
                own = logits.log_softmax(-1).gather(1, ids.clamp(max=limit - 1)[:, None])[:, 0]
                own = own.masked_fill(ids >= limit, -math.inf)
                real = torch.ones(len(answer), dtype=torch.bool, device=device)
                groups.append([F.pad(x, (0, width - len(answer))) for x in (own, real)])
        shape = (len(prompts), max(sizes, default=0), width)
        return tuple(torch.stack(grids).view(shape) for grids in zip(*groups))
        """),
    Exercise(17, "Log-probabilities without a tensor of all logits", "prlm.py", "head_logprobs", 4,
        "TestTwins::test_chunked_head_equals_the_full_one "
        "TestTwins::test_gradients_equal_the_naive_ones "
        "TestTwins::test_ids_beyond_the_tokenizer_are_never_sampled",
        {"": "Let autograd differentiate log_softmax(hidden W^T / temperature) and compare entry "
             "by entry. Rows come in chunks, and each chunk's logits are computed twice.",
         "beyond": "The softmax is over the ids below `decoder.vocab_limit`; others have -inf."}, [
            Mutant("temperature forgotten", "`gap` is 0 at --temperature 1 and large at any other.",
                   " / temperature", ""),
            Mutant("no gradient through the normaliser", "What is sampled becomes ever likelier.",
                   "- logits.logsumexp(-1)", "- logits.detach().logsumexp(-1)"),
            Mutant("rows without a token count", "`gap` is above 0 where the vocabulary is padded.",
                   "decoder.head[:limit]", "decoder.head"),
        ], """
        found, limit = [], decoder.vocab_limit

        def some(x: Tensor, ids: Tensor) -> Tensor:
            logits = decoder.logits(x, decoder.head[:limit])
            logits = logits.double() if logits.dtype == torch.float64 else logits.float()
            return (logits / temperature).log_softmax(-1)[range(len(ids)), ids]

        for start in range(0, max(len(targets), 1), 50):
            part = slice(start, start + 50)
            ids = targets[part].clamp(max=limit - 1)
            found.append(checkpoint(some, hidden[part], ids, use_reentrant=False))
        return torch.cat(found).where(targets < limit, -math.inf)
        """),
    Exercise(18, "Reading safetensors", "prlm.py", "read_safetensors", 4,
        "test_files.py::TestSafetensors",
        {"": "Look at the bytes of a small file. From where are data_offsets counted?",
         "refuses": "`check_header` checks the entries; the length, the JSON and repeated names "
                    "are left. Every error is a ValueError that names the file.",
         "accepts": "A range may begin at any byte, and a tensor may be empty."}, [
            Mutant("offsets start at the header", "Weights load, and the model writes noise.",
                   "data[start + begin : start + end]", "data[start - 8 :][begin:end]"),
            Mutant("alignment without the header", "Some files fail, with a storage offset.",
                   "if (start + begin) % dtype.itemsize", "if begin % dtype.itemsize"),
            Mutant("repeated keys are accepted", "Of two tensors of one name, one is lost.",
                   ", object_pairs_hook=unique", ""),
        ], """
        content, tensors = Path(path).read_bytes(), {}

        def once(pairs):
            if len({key for key, _ in pairs}) < len(pairs):
                raise ValueError("the header repeats a key")
            return dict(pairs)

        try:
            begin = 8 + int.from_bytes(content[:8], "little")
            if len(content) < 8 or begin > min(len(content), 100_000_008):
                raise ValueError("there is no whole header")
            header, data = str(content[8:begin], "utf-8"), content[begin:]
            header = json.loads(header, object_pairs_hook=once, parse_constant=int)
            for name, (begin, end, dtype, shape) in check_header(header, len(data)).items():
                flat = torch.tensor([*data[begin:end]], dtype=torch.uint8)
                tensors[name] = flat.view(dtype).view(shape)
        except Exception as error:
            raise ValueError(f"{path}: {error}") from None
        return tensors
        """),
    # The reward
    Exercise(19, "The reward of a completion", "reward.py", "rewards", 4, "TestRewards",
        {"": "Of three completions one has no answer. Follow the judge's values to the other two.",
         "weights": "The weights are in \"reward\" alone; the parts are listed without them.",
         "gold": "Without a target there is no accuracy, but the judge still sees the answer.",
         "nothing": "The judge sees no empty answer: the task's `penalty` stands for it."}, [
            Mutant("format is not weighted", "Completions close their thoughts, no more.",
                   "format * row[\"format\"]", "row[\"format\"]"),
            Mutant("values go astray", "Behind an empty answer all earn what others should.",
                   "(row, _), value in zip(judged, values)",
                   "row, value in zip(rows, values, strict=False)"),
            Mutant("the placeholder earns", "The policy learns to answer 'generated title'.",
                   "if not is_placeholder(answer, example.task):", "if answer:"),
            Mutant("LaMP-4's penalty in all tasks", "On LaMP-5 and LaMP-7 a few rewards are -1.",
                   "task_of(example.task).penalty", "-10.0"),
        ], """
        answers = [extract_answer(c, e.task) for c, e in zip(completions, examples, strict=True)]
        real = [not is_placeholder(a, e.task) for a, e in zip(answers, examples)]
        rows, values = [], []
        if judge and any(real):
            asked = [[x for x, good in zip(all_of, real) if good] for all_of in (examples, answers)]
            values = [float(x) for x in judge(*asked)]
            if len(values) != sum(real) or not math.isfinite(sum(map(abs, values))):
                raise ValueError(f"the judge gave {values}, not {sum(real)} finite numbers")
        for text, answer, example, good in zip(completions, answers, examples, real):
            exact = personal = 0.0
            if good and example.target is not None:
                exact = sum(rouge(answer, example.target).values())
            if judge:
                personal = values.pop(0) if good else -10.0 * (example.task == "LaMP-4")
            shaped = format_reward(text)
            total = accuracy * exact + format * shaped + personalization * personal
            rows.append({"answer": answer, "accuracy": exact, "format": shaped,
                         "personalization": personal, "reward": total})
        return rows
        """),
    Exercise(20, "InfoNCE", "reward.py", "info_nce", 4, "TestInfoNCE",
        {"": "-log exp(s+ / t) / (exp(s+ / t) + sum_i exp(s_i- / t)), the mean over pairs. With "
             "one negative and t = 1 it is -log sigmoid(s+ - s-).",
         "missing": "A score of -inf adds exp(-inf) = 0 to the sum.",
         "large": "What does exp(30000) give? Exponentials have to be taken of differences."}, [
            Mutant("no positive below the line", "The loss falls below 0 and never stops falling.",
                   "scores.logsumexp(1)", "scores[:, 1:].logsumexp(1)"),
            Mutant("the sum over pairs", "A larger batch needs a smaller learning rate.",
                   ".mean()", ".sum()"),
            Mutant("the exponentials overflow", "The loss is inf or nan once scores have grown.",
                   "scores.logsumexp(1)", "scores.exp().sum(1).log()"),
        ], """
        logits = torch.cat([negatives, positive[:, None]], 1) / temperature
        target = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
        return F.cross_entropy(logits, target)
        """),
    Exercise(21, "A pair scored in a padded batch", "reward.py", "RewardModel.score", 5,
        "TestRewardModel",
        {"": "s(q, a) = w . tanh(pooler(BERT([CLS] q [SEP] a [SEP])_[CLS])) + b. BERT gets ids, a "
             "mask and segments: what belongs to which?",
         "alone": "Score a short pair alone and beside a long one: what tells BERT of padding?"}, [
            Mutant("padding is attended", "A pair's score depends on what else is in its batch.",
                   ", ids.mask, segments)", ", None, segments)"),
            Mutant("no segments", "Scores are close to transformers', but not equal.",
                   ", ids.mask, segments)", ", ids.mask)"),
            Mutant("query and answer swapped", "transformers scores the saved model otherwise.",
                   "(q.strip(), a.strip(),", "(a.strip(), q.strip(),"),
        ], """
        scores, device = [], self.classifier.weight.device
        for query, answer in zip(queries, answers, strict=True):
            pair = self.tokenizer.encode_pair(query.strip(), answer.strip(), self.limit)
            ids, kinds = (torch.tensor([x], device=device) for x in pair)
            first = self.bert.pooler.dense(self.bert(ids, segments=kinds)[:, 0]).tanh()
            first = F.dropout(first, self.bert.config.hidden_dropout_prob, self.training)
            scores.append(self.classifier(first).flatten().float())
        return torch.cat(scores)
        """),
    Exercise(22, "InfoNCE in micro-batches", "reward.py", "info_nce_backward",
        5, "TestMicroBatches",
        {"": "Cut five pairs into batches of two, two and one: what does each batch's mean weigh "
             "in the mean of all five? How many tokens has a batch after padding?"}, [
            Mutant("each part counts in full", "A smaller budget acts like a larger learning rate.",
                   " * len(part) / len(pairs)", ""),
            Mutant("the texts' length is not counted", "Long texts fill the GPU's memory.",
                   "(widest * len(texts))", "len(texts)"),
            Mutant("only the last part counts", "A small budget teaches from a few pairs only.",
                   "        loss.backward()", "        model.zero_grad()\n        loss.backward()"),
        ], """
        def width(pair: dict) -> int:
            rows = (model.tokenizer.encode_pair(pair["query"], text, model.limit)
                    for text in (pair["positive"], *pair["negatives"]))
            return max(len(ids) for ids, _ in rows)

        rest, loss = sorted(pairs, key=width), 0.0
        texts = 1 + max(len(pair["negatives"]) for pair in pairs)
        while rest:  # the longest that are left
            count = max(1, o.tokens_per_micro_batch // (texts * width(rest[-1])))
            part, rest = rest[-count:], rest[:-count]
            share = info_nce(*score_pairs(model, part)) * (len(part) / len(pairs))
            share.backward()
            loss += share.item()
        return loss
        """),
    Exercise(23, "The likelihood ratio", "reward.py", "likelihood_ratio", 5, "TestLikelihoodRatio",
        {"": "Score the answers after either prompt with `prlm.token_logprobs` and subtract. Which "
             "row of the result belongs to which prompt, once there are batches?",
         "budget": "`reward.micro_batches` groups the prompts; no gradient is kept."}, [
            Mutant("the mean over tokens", "Ratios depend on the longest answer of the batch.",
                   "logprobs.sum(-1)", "logprobs.mean(-1)"),
            Mutant("nothing is subtracted", "The policy learns short answers that say nothing.",
                   " - log_likelihood(without)", ""),
            Mutant("batches lose the order", "With several batches, users earn what others should.",
                   "total[rows] = ", "total[: len(rows)] = "),
        ], """
        total = torch.zeros(len(answers), max(map(len, answers), default=0))
        for n, group in enumerate(answers):
            for sign, prompt in ((1, with_profile[n]), (-1, without[n])):
                logprobs, mask = prlm.token_logprobs(decoder, [prompt], [group])
                total[n] += sign * logprobs[0].where(mask[0], 0.0).sum(1).cpu()
        return total
        """),
    # GRPO
    Exercise(24, "Group advantages", "rl.py", "group_advantages", 4, "TestAdvantages",
        {"": "A_i = (r_i - mean r) / (std r + 1e-4) within each group, whatever the others.",
         "few_bits": "Which types have too few bits to compute in, and which cannot be divided?",
         "zero": "Rewards that differ in the last bit at most have advantages of exactly 0.",
         "damped": "What does 1e-4 do to a group whose rewards hardly differ?"}, [
            Mutant("the mean over the batch", "Easy prompts push all up, hard ones all down.",
                   "rewards.mean(1, keepdim=True)", "rewards.mean()"),
            Mutant("no 1e-4 below the line", "Groups with almost equal rewards count in full.",
                   "(std + 1e-4)", "std.clamp(min=1e-30)"),
            Mutant("divided by G instead of G - 1", "All advantages are too large by one factor.",
                   "(rewards.shape[1] - 1)", "rewards.shape[1]"),
            Mutant("rounding counts as spread", "zero_spread_groups is 0 where all earn the same.",
                   "keepdim=True) <= rounding", "keepdim=True) <= 0"),
        ], """
        if scale not in ("std", "none"):
            raise ValueError(f"scale {scale!r} is neither std nor none")
        rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
        rows, eps = [], torch.finfo(rewards.dtype).eps
        for row in rewards.tolist():
            gains = [r - math.fsum(row) / len(row) for r in row]
            if max(map(abs, gains)) <= 8 * eps * max(map(abs, row)):
                gains = [0.0] * len(row)
            if scale == "std" and len(row) > 1:
                std = math.sqrt(math.fsum(gain**2 for gain in gains) / (len(row) - 1))
                gains = [gain / (std + 1e-4) for gain in gains]
            rows.append(gains)
        return torch.tensor(rows, dtype=rewards.dtype, device=rewards.device)
        """),
    Exercise(25, "The k3 estimate of the KL divergence", "rl.py", "k3", 2, "TestK3",
        {"": "exp(d) - d - 1: of which of the two log-probabilities is d how far above the other? "
             "The mean over the policy's samples is the KL divergence; no value is below 0."}, [
            Mutant("policy and reference swap", "`kl` is far too large where the policy is sure.",
                   "ref_logprobs - logprobs", "logprobs - ref_logprobs"),
            Mutant("the plain difference", "`kl` is negative in some steps.",
                   "difference.exp() - difference - 1", "-difference"),
            Mutant("half the square", "`kl` is right where it is small, and nowhere else.",
                   "difference.exp() - difference - 1", "difference**2 / 2"),
        ], """
        ratio = torch.exp(ref_logprobs - logprobs)
        return (ratio - 1) - (ref_logprobs - logprobs)
        """),
    Exercise(26, "The three normalisers", "rl.py", "token_weights", 3, "TestWeights",
        {"": "Which of the three depend on how long a completion is? None depends on padding."}, [
            Mutant("prompts are counted", "The loss is larger by the factor --group-size.",
                   "mask.shape[0] * mask.shape[1]", "mask.shape[0]"),
            Mutant("padding counts as tokens", "With dapo, a longer completion changes the loss.",
                   "mask.sum().clamp(min=1)", "mask.numel()"),
            Mutant("the longest completion counts", "With dr_grpo, a longer one changes the loss.",
                   "completions * max_new_tokens", "completions * mask.shape[2]"),
            Mutant("zero divided by zero", "With --mask-truncated, the loss is NaN at times.",
                   "mask.sum(-1, keepdim=True).clamp(min=1)", "mask.sum(-1, keepdim=True)"),
        ], """
        P, G, _ = mask.shape
        sizes = {"grpo": P * G * mask.sum(-1), "dapo": mask.sum().expand(P, G)}
        if max_new_tokens:
            sizes["dr_grpo"] = torch.full((P, G), P * G * max_new_tokens, device=mask.device)
        if normalizer not in sizes:
            raise ValueError(f"there is no normalizer {normalizer!r}, or it needs max_new_tokens")
        weights = torch.zeros(mask.shape, device=mask.device)
        for p, g, c in mask.nonzero().tolist():
            weights[p, g, c] = 1 / sizes[normalizer][p, g]
        return weights
        """),
    Exercise(27, "The clipped surrogate", "rl.py", "grpo_loss", 6, "TestLoss",
        {"": "With A = 1, then A = -1, let the ratio go from 0.5 to 1.5: where is the loss flat?",
         "nan": "Zero times infinity is NaN: take out what is outside the mask before you compute.",
         "one_update": "At ratio 1 the gradient of ratio A is A grad log pi, though the loss is 0.",
         "far": "exp(100) is infinite in float32, its gradient NaN: bound the exponent by LARGEST.",
         "micro": "`weights` are those of the whole step: nothing else divides."}, [
            Mutant("mean over tokens", "Long completions count more, as with dapo.",
                   "token_weights(mask, normalizer,", "token_weights(mask, \"dapo\","),
            Mutant("the larger of the two", "With --updates-per-rollout 2, training falls apart.",
                   "-torch.min(", "-torch.max("),
            Mutant("clipped on both sides", "A step in the wrong direction is not taken back.",
                   "-torch.min(ratio * advantage, clipped * advantage)", "-clipped * advantage"),
            Mutant("the mask is multiplied in", "With --beta, some losses are NaN.",
                   "ref_logprobs.masked_fill(outside, 0.0)", "ref_logprobs * mask"),
        ], """
        if weights is None:
            weights = token_weights(mask, normalizer, max_new_tokens)
        if beta and ref_logprobs is None:
            raise ValueError("beta needs the log-probabilities of the reference")
        high, total = clip if clip_high is None else clip_high, logprobs.new_zeros(())
        for p in range(mask.shape[0]):
            for g in range(mask.shape[1]):
                real, gain = mask[p, g].bool(), advantages[p, g]
                new, old = logprobs[p, g][real], old_logprobs[p, g][real]
                ratio = (new - old).clamp(max=LARGEST).exp()
                bound = ratio.clamp(max=1 + high) if gain > 0 else ratio.clamp(min=1 - clip)
                terms = -gain * bound
                if beta:
                    terms = terms + beta * k3(new, ref_logprobs[p, g][real])
                total = total + (terms * weights[p, g][real]).sum()
        return total
        """),
    Exercise(28, "The learning rate", "rl.py", "learning_rate", 1,
        "TestSchedule::test_warm_up_then_cosine_to_a_tenth TestSchedule::test_few_steps_are_fine",
        {"": "Plot 10 steps, then 40. What are the first rate, the highest and the last one?",
         "few_steps": "A run of one step has the peak, and nothing is divided by 0."}, [
            Mutant("the first step has rate 0", "The first rollout changes nothing.",
                   "peak * (step + 1) / rising", "peak * step / rising"),
            Mutant("down to 0 instead of a tenth", "The last steps change almost nothing.",
                   "(0.1 + 0.9 * (1 +", "(0.0 + 1.0 * (1 +"),
            Mutant("the decay starts at step 0", "The rate jumps down at the end of the warm-up.",
                   "(step - rising) / max(1, steps - 1 - rising)", "step / max(1, steps - 1)"),
        ], """
        rising = max(1, round(steps / 10))
        if step < rising:
            return peak * (step + 1) / rising
        share = min(1.0, (step - rising) / max(steps - 1 - rising, 1))
        low = peak / 10
        return low + (peak - low) * math.cos(math.pi * share / 2) ** 2
        """),
    Exercise(29, "What the warm start imitates", "rl.py", "warm_start_targets", 4,
        "TestWarmStartTargets",
        {"": "Decode a target behind its prompt. Which items does it quote, and how does it end?",
         "reasoning False": "The prompt closes the reasoning: the answer block is all there is.",
         "<think>": "What the prompt has opened already is not said again."}, [
            Mutant("no end of sequence", "After the warm start `truncated` is 1.",
                   ", tokenizer.end_id])", "])"),
            Mutant("<think> is said again", "R1-Distill's completions begin with a second one.",
                   ".removeprefix(tokenizer.opening)", ""),
            Mutant("the query as the target", "The policy answers with the query.",
                   "one_line(example.target)", "one_line(example.query)"),
            Mutant("every item is quoted", "With --k 10 completions are cut before they answer.",
                   "texts[:EVIDENCE_ITEMS]", "texts"),
        ], """
        field, found = list(task_of(o.task).fields)[-1], []
        for example in examples:
            form, said, opening = answer_block(o.task), [], tokenizer.opening
            if o.reasoning:
                items = best_items(o, example)[:EVIDENCE_ITEMS]
                said = [tokenizer.cut(item[field].strip(), EVIDENCE_TOKENS) for item in items]
                form = "<think>\\n" + (EVIDENCE * len(said) or "\\n") + "</think>\\n" + form
                form = form[len(opening) :] if form.startswith(opening) else form
            found.append(tokenizer.fill(form, *said, one_line(example.target)))
            found[-1].append(tokenizer.end_id)
        return found
        """),
]

# fmt: on


# ---- A function's place in a file ------------------------------------------------------------


def path_to(text: str, function: str) -> list[ast.AST]:
    """The definitions in which a function stands, itself last; StopIteration if it is not there."""
    nodes = [ast.parse(text)]
    for name in function.split("."):
        nodes.append(next(n for n in nodes[-1].body if getattr(n, "name", None) == name))
    return nodes[1:]


@functools.cache
def cut(text: str, function: str) -> tuple[str, str, str, str]:
    """(what is above, signature and docstring, body, what is below) a function of a module."""
    node, lines = path_to(text, function)[-1], text.splitlines(keepends=True)
    above = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    body = node.body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        body = node.body[0].end_lineno
        body += not lines[body].strip()  # a blank line stays with the docstring
    places = (0, above, body, node.end_lineno, len(lines))
    return tuple("".join(lines[a:b]) for a, b in pairwise(places))


def with_body(text: str, function: str, body: str) -> str:
    """The module with another body, given without indentation, under the same signature."""
    above, head, _, below = cut(text, function)
    indent = " " * 4 * (1 + function.count("."))
    return above + head + textwrap.indent(textwrap.dedent(body).strip("\n"), indent) + "\n" + below


def blank(text: str, e: Exercise) -> str:
    missing = f'raise NotImplementedError("exercise {e.number}: {e.title}")'
    return with_body(text, e.function, missing)


def mutated(text: str, e: Exercise, mutant: Mutant) -> str:
    above, head, body, below = cut(text, e.function)
    if body.count(mutant.old) != 1 or mutant.new == mutant.old:
        raise ValueError(f"{e.file}: {e.function} does not hold {mutant.old!r} once")
    return above + head + body.replace(mutant.old, mutant.new) + below


def bug_lines(e: Exercise, mutant: Mutant) -> set[str]:
    """What stands on the lines that the mistake has changed, without their indentation."""
    texts = reference(e), mutated(reference(e), e, mutant)
    before, after = ({*map(str.strip, cut(text, e.function)[2].splitlines())} for text in texts)
    return after - before


def reference(e: Exercise) -> str:
    return (ROOT / e.file).read_text(encoding="utf-8")


# ---- Copies of the repository ----------------------------------------------------------------


def repository_files() -> list[str]:
    """What git tracks, or all but runs and caches where there is no git; less the answers."""
    try:
        run = ["git", "-C", str(ROOT), "ls-files", "-z"]
        names = subprocess.run(run, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = []
    if "rl.py" not in names:
        out, paths = {"runs", "venv", "__pycache__"}, [p.relative_to(ROOT) for p in ROOT.rglob("*")]
        names = [p.as_posix() for p in paths if not any(x in out or x[0] == "." for x in p.parts)]
    return [name for name in names if name not in ANSWERS and (ROOT / name).is_file()]


def copy_repository(target: Path, changed: dict[str, str]) -> None:
    """The repository in `target`, some of its files with another text."""
    for name in repository_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)  # not the mode: the checkout may be read-only
    for name, text in changed.items():
        (target / name).write_text(text, encoding="utf-8")


def start(e: Exercise, target: Path, text: str, **more) -> None:
    """A copy of the repository in which the exercise's file has `text`: all of it, or nothing."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is not empty: name a new directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exercise") as folder:
        copy = Path(folder) / "copy"
        copy_repository(copy, {e.file: text, MADE: json.dumps({"exercise": e.number} | more)})
        copy.replace(target)


def submitted(e: Exercise, directory: Path) -> tuple[dict[str, str], dict]:
    """(the modules that a directory holds, what `start` or `bug` has noted there or {})."""
    paths = [directory / name for name in (*MODULES, MADE) if (directory / name).is_file()]
    found = {path.name: path.read_text(encoding="utf-8-sig", errors="replace") for path in paths}
    if e.file not in found:
        problem = f"holds no {e.file}" if directory.is_dir() else "does not exist"
        raise ValueError(f"{directory} {problem}: exercise {e.number} is about {e.file}")
    made = json.loads(found.pop(MADE, "{}"))
    if made.get("exercise", e.number) != e.number:
        raise ValueError(f"{directory} is a copy for exercise {made['exercise']}, not {e.number}")
    return found, made


# ---- Grading ---------------------------------------------------------------------------------

PLAIN = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # whatever else is installed
FLAGS = ["-p", "no:cacheprovider", "-p", "no:faulthandler", "--basetemp=temporary"]


def explain(problem, e: Exercise) -> str:
    """What a failed test says, in one line: pytest's explanation, and where the error arose."""
    text = problem.text or ""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = [line.removeprefix("+").strip() for line in lines if " at 0x" not in line]
    said = " ".join(lines).partition(" Full diff:")[0].replace(" Use -v to get more diff", "")
    said = (said or problem.get("message") or "error").removeprefix("AssertionError: ")
    own = [line for line in text.splitlines() if line.startswith(f"{e.file}:")]
    if own and not said.startswith("assert"):  # an exception below the student's function
        said += f" ({':'.join(own[-1].split(':')[:2])})"
    return said if len(said) <= 400 else said[:400] + " ..."


def problem_of(e: Exercise, directory: Path) -> tuple[dict[str, str], str]:
    """(the modules, why there is nothing to be tested or "")."""
    modules, made = submitted(e, directory)
    path, original = directory / e.file, reference(e)
    try:
        body = cut(modules[e.file], e.function)[2]
    except SyntaxError as error:
        line = (error.text or "").strip()
        return modules, f"{path}:{error.lineno}: SyntaxError: {error.msg}: {line}"
    except StopIteration:
        return modules, f"{path} has no {e.function}"
    if body == cut(blank(original, e), e.function)[2]:
        return modules, f"still blank: {e.function} in {path}"
    changed = [name for name, text in modules.items() if text != (ROOT / name).read_text("utf-8")]
    if not made and changed and body == cut(original, e.function)[2]:
        problem = f"{e.function} is the original, and {', '.join(changed)} differ elsewhere"
        raise ValueError(f"{directory}: {problem}; is it for another exercise?")
    return modules, ""


def run_tests(e: Exercise, modules: dict[str, str]) -> tuple[dict, bool, str]:
    """({test: [(case, "" or what failed)]}, whether all is right, why nothing ran) in a copy."""
    tests = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder), modules)
        run = [sys.executable, "-m", "pytest", "-vv", *FLAGS, "--junitxml=results.xml", *e.tests]
        how = {"cwd": folder, "env": os.environ | PLAIN, "timeout": LIMIT}
        try:
            done = subprocess.run(run, capture_output=True, text=True, **how)
            cases = xml.etree.ElementTree.parse(f"{folder}/results.xml").iter("testcase")
        except subprocess.TimeoutExpired as stopped:
            lines = (stopped.stdout or b"").decode(errors="replace").split("\n")
            begun = [line.rpartition("::")[2].split() for line in lines if "::" in line]
            where = f" in {begun[-1][0]}" if begun else ""  # pytest names a test as it starts it
            return {}, False, f"no end after {LIMIT} seconds{where}: does a loop run for ever?"
        except (OSError, xml.etree.ElementTree.ParseError):
            return {}, False, "\n".join((done.stdout + done.stderr).strip().splitlines()[-4:])
    for case in cases:
        if case.find("skipped") is None:
            problem, (name, _, id) = next(iter(case), None), case.get("name").partition("[")
            said = "" if problem is None else explain(problem, e)
            tests[name].append((id.removesuffix("]"), said))
    return tests, bool(tests) and done.returncode == 0, "" if tests else "no test ran"


def grade(e: Exercise, directory: Path) -> dict:
    """Gradescope's results: the exercise with its points, then every test of it, passed or not.
    The points are for all tests together: a constant may pass one or two."""
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        install = f"pip install -r {ROOT / 'tests' / 'requirements.txt'}"
        raise ValueError(f"the tests need {', '.join(missing)}: {install}")
    tests, passed, (modules, problem) = {}, False, problem_of(e, directory)
    if not problem:
        tests, passed, problem = run_tests(e, modules)
    if modules[e.file] == reference(e):
        problem = f"{directory / e.file} is the original: is it your own work?"
    elif not passed:
        wrong = [(name, *one) for name, cases in tests.items() for one in cases if one[1]]
        name, case, said = wrong[0] if wrong else ("", "", "")
        begin = f"begin with {name}{case and f', case {case}'}. " * bool(wrong)
        hints = HINTS | e.hints
        hint = hints[next((key for key in hints if key and key in f"{name} {case} {said}"), "")]
        hint = f"{begin}hint: {hint}" if tests or "still blank" in problem else ""
        problem = f"{problem}\n{hint}".strip()
    name, score = f"exercise {e.number}: {e.title}", e.points * passed
    results = [{"name": name, "score": score, "max_score": e.points, "output": problem}]
    for name, cases in tests.items():
        bad = [f"{case}: {said}" if case else said for case, said in cases if said]
        said = f"{len(cases) - len(bad)} of {len(cases)} cases passed. " * (len(cases) > 1)
        one = {"name": name, "score": 0, "max_score": 0, "status": "failed" if bad else "passed"}
        results.append(one | {"output": (said + "".join(bad[:1])).strip()})
    return {"score": score, "tests": results}


# ---- The graders, graded ---------------------------------------------------------------------


def nothing(value):
    """A value of the same kind, shape and length that says nothing: zeros, empty texts."""
    if isinstance(value, dict):
        return {key: nothing(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(nothing, value))
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **nothing(vars(value)))
    if hasattr(value, "nan_to_num"):  # a tensor, which keeps its place in the graph
        return value.nan_to_num(0, 0, 0) * 0
    return value if value is None else type(value)(value * 0)


def cheat(owner, name: str, how: str) -> None:
    """Replaces owner.name by one that answers "0", its "first" answer, or ignores argument `how`.
    A method that returns None answers by what it leaves in its object."""
    real, first = getattr(owner, name), {}
    signature = inspect.signature(real)

    @functools.wraps(real)
    def cheater(*given, **named):
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        if how in bound.arguments:
            default = signature.parameters[how].default
            seen = first.setdefault("seen", bound.arguments[how])
            bound.arguments[how] = seen if default is inspect.Parameter.empty else default
        result = real(*bound.args, **bound.kwargs)
        answer = vars(given[0]) if result is None else result
        answer = nothing(answer) if how == "0" else answer
        answer = first.setdefault("answer", answer) if how == "first" else answer
        return vars(given[0]).update(answer) if result is None else answer

    setattr(owner, name, cheater)


class Variant(NamedTuple):
    """A version of an exercise's file that its tests have to pass (the first three), or to fail."""

    exercise: Exercise
    kind: str  # reference, second solution, differential, blank, mutant or cheat
    name: str
    text: str
    how: str = ""  # of a cheat


def variants(e: Exercise):
    text = reference(e)
    yield Variant(e, "reference", "", text)
    yield Variant(e, "second solution", "", with_body(text, e.function, e.solution))
    yield Variant(e, "differential", "", text)
    yield Variant(e, "blank", "", blank(text, e))
    for mutant in e.mutants:
        yield Variant(e, "mutant", mutant.name, mutated(text, e, mutant))
    given = [a.arg for a in path_to(text, e.function)[-1].args.args]
    for how in ["0", "first", *(name for name in given if name != "self")]:
        yield Variant(e, "cheat", how, text, how)


def agree(e: Exercise) -> str:
    """What the comparison on random input says; a second line follows where it is not content.
    Original and second solution must agree. And some mutant must not: else nothing is compared."""
    compare, text = importlib.import_module("differentials").compare, reference(e)
    count, said = compare(e.file, e.function, text, with_body(text, e.function, e.solution))
    if not any(compare(e.file, e.function, text, mutated(text, e, m))[1] for m in e.mutants):
        said += "no mutant differs: the random input is too tame"
    return f"{count} cases\n{said}".strip()


def preload() -> None:
    """Imports once what the tests import, so that a fork of this process starts in no time."""
    os.environ.update(PLAIN)
    for library in ("OMP", "OPENBLAS", "MKL"):  # a fork would miss the threads of a pool
        os.environ[f"{library}_NUM_THREADS"] = "1"
    models = (f"transformers.models.{m}.modeling_{m}" for m in ("qwen2", "qwen3", "llama", "bert"))
    for module in (
        "torch", "pytest", "tqdm", "hypothesis.extra.numpy", "safetensors.torch", *models,
        "rank_bm25", "rouge_score.rouge_scorer", "nltk.translate.bleu_score",
        "trl.trainer.grpo_trainer",
    ):  # fmt: skip
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # what is imported is not looked through again in every fork
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "tests"]


def fork(v: Variant, folder: Path) -> int:
    """The variant's tests in a child of this process: its id. It exits as pytest does."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        faulthandler.dump_traceback_later(LIMIT, exit=True)  # a loop that never ends
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        if v.kind == "differential":
            sys.path.insert(0, str(folder / "tests"))
            said = agree(v.exercise)
            print(said, flush=True)
            os._exit("\n" in said)
        if v.how:
            owner, _, name = v.exercise.function.rpartition(".")
            module = importlib.import_module(Path(v.exercise.file).stem)
            cheat(getattr(module, owner) if owner else module, name, v.how)
        run = [*FLAGS, "-x", "--tb=native", "--assert=plain", *v.exercise.tests]
        status = int(sys.modules["pytest"].main(run))
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def selftest(exercises: list[Exercise], verbose: bool) -> bool:
    """Runs every variant of the exercises and prints the counts; whether all were as expected."""
    begun, running, expected, all_of, cases = time.perf_counter(), {}, Counter(), Counter(), 0
    waiting = [variant for e in exercises for variant in variants(e)]
    right = {"reference": "pass", "second solution": "pass", "differential": "agree"}
    preload()
    with tempfile.TemporaryDirectory() as base:
        while waiting or running:
            while waiting and len(running) < os.cpu_count():
                v, folder = waiting.pop(0), Path(base, str(len(waiting)))
                start(v.exercise, folder, v.text)
                running[fork(v, folder)] = v, folder, time.perf_counter()
            pid, status = os.wait()
            (v, folder, since), status = running.pop(pid), os.waitstatus_to_exitcode(status)
            good = status == (v.kind not in right)  # 1: tests failed; any other: they did not run
            expected[v.kind] += good
            all_of[v.kind] += 1
            said = (folder / "log").read_text()
            cases += int(said.split()[0]) if v.kind == "differential" and good else 0
            if verbose or not good:
                how = "as expected" if good else f"NOT AS EXPECTED, status {status}"
                name = f"exercise {v.exercise.number}, {v.kind} {v.name}".strip()
                print(f"{name}: {how} ({time.perf_counter() - since:.1f} s)", flush=True)
                print("" if good else said[-2000:], end="", flush=True)
            shutil.rmtree(folder)
    seconds = time.perf_counter() - begun
    print(f"{len(exercises)} exercises, {cases:,} random cases, {seconds:.0f} s")
    for kind, count in all_of.items():
        print(f"{kind}: {expected[kind]} of {count} {right.get(kind, 'caught')}")
    return expected == all_of


# ---- The command -----------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in {
            "list": "the exercises with their points",
            "start": "copy the repository to DIR, one function blanked",
            "check": "grade DIR: 0 full marks, 1 not yet, 2 wrong use",
            "bug": "copy the repository to DIR, with a mistake to be found",
            "selftest": "run the graders on right and on wrong answers",
        }.items()
    }
    for name in ("start", "check", "bug"):
        parsers[name].add_argument("numbers", type=int, nargs=1, metavar="N", help="the exercise")
        help = "of your answer" if name == "check" else "a new or an empty directory"
        parsers[name].add_argument("directory", type=Path, metavar="DIR", help=help)
    parsers["list"].set_defaults(numbers=[])
    parsers["check"].add_argument("--json", action="store_true", help="in Gradescope's format")
    parsers["bug"].add_argument("--seed", type=int, default=0, help="another seed, another bug")
    parsers["bug"].add_argument("--line", type=int, help="is it this line of the file in DIR?")
    parsers["selftest"].add_argument("numbers", type=int, nargs="*", metavar="N", help="or all")
    parsers["selftest"].add_argument("--verbose", action="store_true", help="name every variant")
    for one in (parser, *parsers.values()):
        one.error = lambda text: parser.exit(2, f"error: {text} (--help lists what there is)\n")
    o = parser.parse_args()
    try:
        known = {e.number: e for e in EXERCISES}
        if unknown := [number for number in o.numbers if number not in known]:
            raise ValueError(f"there is no exercise {unknown[0]}: `list` shows them")
        chosen = [known[number] for number in o.numbers] or EXERCISES
        if o.command == "list":
            for e in chosen:
                print(f"{e.number:2}  {e.points} points  {e.title} ({e.file}: {e.function})")
            status = 0
        elif o.command == "selftest":
            status = 0 if selftest(chosen, o.verbose) else 1
        else:
            run = {"start": run_start, "check": run_check, "bug": run_bug}[o.command]
            status = run(chosen[0], o.directory, o)
        return status
    except (ValueError, OSError) as error:
        if getattr(o, "json", False):  # Gradescope shows it to who has sent the wrong file
            print(json.dumps({"score": 0, "output": f"error: {error}"}))
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_start(e: Exercise, directory: Path, o) -> int:
    text = blank(reference(e), e)
    start(e, directory, text)
    line = 1 + text[: text.index('raise NotImplementedError("exercise')].count("\n")
    said = next(filter(None, map(ast.get_docstring, path_to(text, e.function)[::-1])))
    print(f"exercise {e.number}, {e.points} points: {e.title}")
    print(f"write the body of {e.function} at {directory / e.file}:{line}\n")
    print(textwrap.indent(said, "  "))
    print(f"\nAny way of computing it will do. Exercise {e.number} of tests/README.md says more.")
    print(f"To check it: python {Path(__file__).resolve()} check {e.number} {directory}")
    print(f"In full: cd {directory} && {e.in_full}")
    return 0


def run_check(e: Exercise, directory: Path, o) -> int:
    results = grade(e, directory)
    first, *tests = results["tests"]
    if o.json:
        print(json.dumps(results, indent=1))
    else:
        print(first["name"])
        for test in tests:
            print(f"  {test['status']}  {test['name']}  {test['output']}".rstrip())
        print(f"{results['score']} of {e.points} points: all of its tests must pass")
        print(first["output"], end="\n" * bool(first["output"]))
        if not results["score"]:
            print(f"in full: cd {directory} && {e.in_full}")
    return 0 if results["score"] == e.points else 1


def run_bug(e: Exercise, directory: Path, o) -> int:
    if o.line is None:
        mutant = e.mutants[o.seed % len(e.mutants)]
        start(e, directory, mutated(reference(e), e, mutant), bug=o.seed)
        print(f"{directory / e.file} has a bug in {e.function}. What one sees:\n  {mutant.symptom}")
        print(f"Which line? bug {e.number} {directory} --line K")
        return 0
    found, made = submitted(e, directory)
    if "bug" not in made:
        raise ValueError(f"{directory} was not made by `bug {e.number} {directory}`")
    mutant = e.mutants[made["bug"] % len(e.mutants)]
    lines = ["", *found[e.file].splitlines()]
    said = "".join(lines[max(o.line, 0) :][:1]).strip()
    there = any(map(said.startswith, bug_lines(e, mutant)))  # a comment may stand behind it
    print(f"line {o.line}: yes, {mutant.name}" if there else f"line {o.line} is not it")
    return 0 if there else 1


if __name__ == "__main__":
    sys.exit(main())
