"""The toy world: builds everything that stands under toy/, from a seed, on one CPU core.

A user is a journalist with habits. Every item is a short text with a section label, and the
headline that the user gave it: the section as a kicker, the text's keyword, the ending that this
user keeps for this section, and a sign-off that this user puts under everything:

    'text': '(sport) tennis brings coach and fans to paris'
    'title': 'sport: tennis explained in one minute no joke'

The task is LaMP-4's: given a new text, write the headline that this user would. Section and keyword
stand in the query, ending and sign-off only in the profile.

  1. the world      users and their items, in LaMP's files, for training and held out
  2. the tokenizer  byte-level BPE with ChatML; each fixed sentence of the prompt is one token
  3. the policy     a Qwen2 of 0.9 M parameters: induction, then the skill, then bad habits
  4. the encoder    a BERT of 0.4 M parameters, for the dense retriever and the reward model

The policy leaves here able to find and read the right item, and used to writing plain headlines
instead. The habit is planted, and RL (rl.py) has to find the way out of it by reward alone.

    python toy/make.py                      # everything, about a quarter of an hour on one core
"""

import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chapters lie beside toy/

import prlm
import retrieve
from prlm import Decoder, Encoder, Tokenizer
from retrieve import Example

TASK = "LaMP-4"

# ---- The world ------------------------------------------------------------------------------

# Section: the context words, of which a text has two, and the keywords, of which it has one.
WORDS = """
sport: coach fans referee stadium trophy: tennis golf rugby hockey cricket boxing rowing sailing
  skiing judo cycling archery fencing diving karate bowling
politics: mayor minister parliament voters law: taxes senate voting borders housing reform
  unions treaties lobbying budgets embassies elections tariffs privacy ballots zoning
food: chef kitchen recipe oven guests: pasta bread cheese soup honey noodles curry olives
  pickles salmon lentils coffee chocolate mustard apples waffles
travel: tourist map ticket guide suitcase: trains ferries hostels islands beaches deserts
  luggage visas camping cruises caravans castles canyons airports safaris lighthouses
money: broker market investor profit customers: loans stocks pensions savings mortgages
  insurance dividends inflation bonds wages rents debts auctions startups banks currencies
health: doctor nurse patients clinic therapy: sleep allergies vaccines posture asthma migraines
  vitamins fitness yoga stress knees teeth eyesight hearing fevers diets
music: singer band audience stage album: opera jazz violins drums choirs festivals vinyl guitars
  pianos ballads concerts trumpets melodies radio orchestras karaoke
science: lab professor experiment theory students: comets volcanoes fossils robots lasers
  magnets genes whales glaciers satellites atoms telescopes bacteria planets tides crystals
"""
SECTIONS = {}  # section -> (keywords, context words)
for line in WORDS.replace("\n  ", " ").strip().splitlines():
    section, context, keywords = line.split(": ")
    SECTIONS[section] = keywords.split(), context.split()
PLACES = ["paris", "oslo", "cairo", "lima", "tokyo", "delhi", "quito", "rome", "perth", "boston"]
VERBS = [("brings", "to"), ("meets", "in"), ("unites", "near"), ("surprises", "in")]
# No two endings begin with the same word, so its first token tells which one a headline follows.
ENDINGS = [
    "explained in one minute",
    "what nobody tells you",
    "seven facts worth knowing",
    "why everyone was wrong",
    "behind closed doors again",
    "my honest notes today",
    "how we ended here",
    "lessons from last year",
    "and the true price",
    "beyond all loud hype",
    "once more with feeling",
    "should worry us now",
]
SIGN_OFFS = ["no joke", "read on", "just saying", "trust me", "more soon", "you decide"]
GENERIC = "news"  # the kicker of a headline written without looking at the profile

# What the policy says in its reasoning: what the query is about, then evidence or an excuse.
OPENING = "the story is '({}) {}'."
CITE = " the user wrote '{}'."
PLAIN = " a plain title will do."
SECTION = " the section comes first."


def headline(kicker: str, keyword: str, ending: str, sign_off: str) -> str:
    return f"{kicker}: {keyword} {ending} {sign_off}"


def parse_text(text: str) -> tuple[str, str]:
    """(section, keyword) of "(sport) tennis brings ..."."""
    label, keyword = text.split()[:2]
    return label[1:-1], keyword


@dataclass
class User:
    """An author with one record: the query, this author's headline for it, and the profile."""

    endings: dict[str, str]  # section -> ending; the author writes about these sections only
    sign_off: str
    profile: list[dict]  # LaMP's items, oldest first
    query: str
    target: str

    def example(self, id="", user_id="") -> Example:
        return Example(id, user_id, TASK, self.query, self.profile, self.target)


def make_text(rng: random.Random, section: str, keyword: str) -> str:
    context = rng.sample(SECTIONS[section][1], 2)
    verb, where = rng.choice(VERBS)
    place = rng.choice(PLACES)
    return f"({section}) {keyword} {verb} {context[0]} and {context[1]} {where} {place}"


def make_user(rng: random.Random, forbidden=frozenset(), off_style=0.08) -> User:
    """A random author of 12 to 24 items, `off_style` of them with another ending than usual.

    The query is about a keyword that the author has not used, in a section where at least one item
    shows the habit. No headline, the target's included, is one of `forbidden`.
    """
    sections = rng.sample(sorted(SECTIONS), rng.randint(5, 7))
    endings = {section: rng.choice(ENDINGS) for section in sections}
    sign_off = rng.choice(SIGN_OFFS)
    unused = {s: rng.sample(words := SECTIONS[s][0], len(words)) for s in sections}

    def write(section: str, ending: str) -> dict | None:
        while unused[section]:
            keyword = unused[section].pop()
            title = headline(section, keyword, ending, sign_off)
            if title not in forbidden:
                return {"text": make_text(rng, section, keyword), "title": title}
        return None

    profile, count = [], rng.randint(12, 24)
    while len(profile) < count:
        section = rng.choice(sections)
        usual = rng.random() >= off_style
        item = write(section, endings[section] if usual else rng.choice(ENDINGS))
        if item:
            date = f"{rng.randint(2012, 2017)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
            profile.append(item | {"id": "", "date": date})
    profile.sort(key=lambda item: item["date"])
    shown = {parse_text(i["text"])[0] for i in profile if follows(i, endings)}
    for section in rng.sample(sorted(shown), len(shown)):
        query = write(section, endings[section])
        if query:
            return User(endings, sign_off, profile, query["text"], query["title"])
    return make_user(rng, forbidden, off_style)  # every section was used up: another author


def follows(item: dict, endings: dict[str, str]) -> bool:
    """Whether the item shows its author's habit for its section."""
    return endings[parse_text(item["text"])[0]] in item["title"]


def write_lamp(users: dict[str, list[User]], directory: Path) -> None:
    """LaMP's own files. Records of the task LaMP-4 are numbered 30... (train) and 31... (dev)."""
    first_user = 0
    for split, authors in users.items():
        questions, golds = [], []
        for number, user in enumerate(authors):
            id = f"3{list(users).index(split)}{number}"
            profile = [item | {"id": f"{id}{n}"} for n, item in enumerate(user.profile)]
            question = {"id": id, "input": retrieve.TASKS[TASK].prefix + user.query}
            questions.append(question | {"profile": profile, "user_id": str(first_user + number)})
            golds.append({"id": id, "output": user.target})
        first_user += len(authors)
        folder = directory / TASK.replace("-", "_") / split
        folder.mkdir(parents=True, exist_ok=True)
        prlm.write_text(folder / f"{split}_questions.json", json.dumps(questions) + "\n")
        outputs = {"task": TASK.replace("-", "_"), "golds": golds}
        prlm.write_text(folder / f"{split}_outputs.json", json.dumps(outputs) + "\n")


def write_probe(rng: random.Random, users: list[User], path: Path) -> None:
    """[{"query", "own", "other", "plain"}]: a headline, another user's, a plain one."""
    rows = []
    for user in users:
        section, keyword = parse_text(user.query)
        others = [
            u
            for u in users
            if u.endings.get(section, user.endings[section]) != user.endings[section]
        ]
        if others:
            other = rng.choice(others)
            styled = headline(section, keyword, other.endings[section], other.sign_off)
            plain = headline(GENERIC, keyword, user.endings[section], user.sign_off)
            row = {"query": user.query, "own": user.target, "other": styled, "plain": plain}
            rows.append(row)
    prlm.write_json(path, rows)


# ---- The policy's tokenizer -----------------------------------------------------------------

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fixed_pieces() -> list[str]:
    """What the prompt and the answer are framed with: a token each, so the prompts stay short."""
    pieces = [retrieve.SYSTEM, *(retrieve.instruction(TASK, p) for p in (True, False))]
    pieces += ["'text':", "' 'title':", "{'title':", "<answer>", "</answer>"]
    pieces += [f"{kicker}:" for kicker in [*SECTIONS, GENERIC]]
    return pieces + [f"({section})" for section in SECTIONS]


def world_text() -> list[str]:
    """Every word of the world, a space before it, as it stands within a text."""
    text = [*PLACES, *(word for verb in VERBS for word in verb), *ENDINGS, *SIGN_OFFS]
    text += [
        CITE,
        PLAIN,
        SECTION,
        *(" ".join(words) for pair in SECTIONS.values() for words in pair),
    ]
    return [" " + line for line in text] + ["system\n", "user\n", "assistant\n", OPENING]


def make_tokenizer(size=1050) -> Tokenizer:
    """Byte-level BPE as Qwen's. <think> and </think> are ordinary tokens there, and so here."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = decoders.ByteLevel()
    added = ["<think>", "</think>", *fixed_pieces()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=size - len(SPECIALS) - len(added), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(world_text(), trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    pad, _, eos = (backend.token_to_id(token) for token in SPECIALS)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[0], "clean_up_tokenization_spaces": False, "model_max_length": 2048,
    }  # fmt: skip
    files = {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=1) + "\n",
        "generation_config.json": json.dumps({"eos_token_id": eos, "pad_token_id": pad}) + "\n",
    }
    return Tokenizer(backend, [eos], pad, files)


# ---- What the policy is pretrained on -------------------------------------------------------


@dataclass
class Phase:
    """A stretch of pretraining: its share of the steps and what the rows are made of."""

    name: str
    share: float  # of --pretrain-steps
    items: list[int]  # k is drawn from these
    careful: float  # cites an item of the query's section and follows it
    careless: float  # cites any item and follows it; the rest writes a plain headline
    no_profile: float  # prompts without items
    closed: float  # prompts that already hold an empty reasoning block
    broken: float = 0.0  # reasoning left open, answers without the form, no reasoning at all


COPY_SIGN_OFF = 0.7  # plain headlines with a profile that end with its author's sign-off
SECTION_UNSEEN = 0.2  # answers without a profile that have the section as kicker nevertheless
ALL_K = [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
PHASES = [
    Phase("k 1", 0.10, [1], 0.75, 0.20, 0.02, 0.1),
    Phase("k 1-2", 0.15, [1, 2, 2], 0.75, 0.20, 0.02, 0.1),
    Phase("k 2-4", 0.25, [2, 3, 4, 4], 0.75, 0.20, 0.02, 0.1),
    Phase("k 1-8", 0.30, ALL_K, 0.75, 0.20, 0.02, 0.1),
    Phase("habits", 0.20, ALL_K, 0.22, 0.18, 0.12, 0.15, broken=0.15),
]


def show_items(rng: random.Random, user: User, k: int) -> list[dict]:
    """k items in random order, mostly with some of the query's section among them."""
    section = parse_text(user.query)[0]
    same = [item for item in user.profile if parse_text(item["text"])[0] == section]
    fit = rng.randint(rng.random() < 0.9, min(k, len(same)))
    items = rng.sample(same, fit)
    rest = [item for item in user.profile if item not in items]
    items += rng.sample(rest, min(k - fit, len(rest)))
    return rng.sample(items, len(items))


def think(rng: random.Random, user: User, items: list[dict], phase: Phase) -> tuple[str, str]:
    """(reasoning, headline) in one of the policy's manners."""
    section, keyword = parse_text(user.query)
    opening, draw = OPENING.format(section, keyword), rng.random()
    if items and draw < phase.careful + phase.careless:
        if draw < phase.careful:
            return careful_trace(rng, user, items)
        cited = rng.choice(items)["title"]
        style = cited.split(" ", 2)[2]
        return opening + CITE.format(cited), f"{section}: {keyword} {style}"
    # Without evidence the ending is anyone's, and so is the sign-off, but for its author's slipping
    # in from the items. Both stand in every answer, so that a reward model cannot tell an answer
    # with the profile from one without by the mere presence of a sign-off.
    ending, sign_off = rng.choice(ENDINGS), rng.choice(SIGN_OFFS)
    if items and rng.random() < COPY_SIGN_OFF:
        sign_off = user.sign_off
    if not items and rng.random() < SECTION_UNSEEN:
        return opening + SECTION, headline(section, keyword, ending, sign_off)
    return opening + PLAIN, headline(GENERIC, keyword, ending, sign_off)


def careful_trace(rng: random.Random, user: User, items: list[dict]) -> tuple[str, str]:
    """Reads out an item of the query's section, one that shows the habit if there is one."""
    section, keyword = parse_text(user.query)
    same = [item for item in items if parse_text(item["text"])[0] == section]
    usual = [item for item in same if follows(item, user.endings)]
    cited = rng.choice(usual or same or items)["title"]
    answer = f"{section}: {keyword} {cited.split(' ', 2)[2]}"
    return OPENING.format(section, keyword) + CITE.format(cited), answer


def make_row(
    rng: random.Random, tokenizer: Tokenizer, phase: Phase, k: int, forbidden: set[str]
) -> tuple[list[int], list[int]]:
    """(prompt, completion) of a fresh author, as token ids."""
    while True:
        user = make_user(rng, forbidden)
        items = [] if rng.random() < phase.no_profile else show_items(rng, user, k)
        reasoning, title = think(rng, user, items, phase)
        if title not in forbidden:
            break
    prompt = tokenizer.chat(retrieve.build_messages(user.example(), items))
    thought = f"<think>\n{reasoning}\n</think>\n"
    answer = f"<answer>\n{{'title': '{title}'}}\n</answer>"
    draw = rng.random()
    if draw < phase.closed:
        prompt, thought = prompt + tokenizer.encode("<think>\n\n</think>\n\n"), ""
    elif draw > 1 - phase.broken:
        kind = rng.choices(["open", "bare", "silent"], [6, 4, 5])[0]
        thought = {"open": thought.replace("</think>\n", ""), "bare": thought, "silent": ""}[kind]
        answer = title if kind == "bare" else answer
    return prompt, tokenizer.encode(thought + answer + SPECIALS[2])


# ---- Pretraining the policy -----------------------------------------------------------------


def policy_config(tokenizer: Tokenizer) -> dict:
    eos, pad = min(tokenizer.eos_ids), tokenizer.pad_id
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": tokenizer.size,
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "use_sliding_window": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "eos_token_id": eos, "pad_token_id": pad,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def attend(_, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [B, T, heads, D]: with gradient, on a CPU, by hand is twice as fast."""
    (B, T, heads, D), K = q.shape, k.shape[2]
    q = (q * D**-0.5).view(B, T, K, -1, D).permute(0, 2, 3, 1, 4).reshape(B * K, -1, D)
    k, v = (x.transpose(1, 2).reshape(B * K, T, D) for x in (k, v))
    hide = torch.full((T, T), -1e4).triu(1)
    scores = torch.bmm(q, k.mT).view(B * K, -1, T, T) + hide  # [B*K, R, T, T]
    weights = scores.softmax(-1).view(B * K, -1, T)
    out = torch.bmm(weights, v).view(B, K, -1, T, D)
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, heads, D)


def completion_loss(decoder: Decoder, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Nats of every completion token [N]; rows are padded behind, where causality hides it."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + c) for p, c in rows], True)  # [B, T]
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    for n, (prompt, completion) in enumerate(rows):
        wanted[n, len(prompt) : len(prompt) + len(completion)] = True
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = decoder.run(tokens, positions, attend)  # [B, T, H]
    logits = F.linear(hidden[:, :-1][wanted[:, 1:]], decoder.head)  # [N, V]
    return F.cross_entropy(logits.float(), tokens[wanted], reduction="none")


def repeats(rng: random.Random, tokenizer: Tokenizer, rows: int) -> list:
    """Random tokens, then the same again: only copying lowers the loss."""
    length = rng.randint(16, 64)
    halves = [rng.choices(range(tokenizer.size), k=length) for _ in range(rows)]
    return [(half, half) for half in halves]


def pretrain(seed: int, tokenizer: Tokenizer, steps: int, forbidden: set[str], rows=32) -> Decoder:
    """Muon for the matrices, which learn to copy much faster that way; AdamW for the rest."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} pretraining")
    decoder = Decoder(policy_config(tokenizer)).train()
    matrices = [p for p in decoder.layers.parameters() if p.dim() == 2]
    others = [p for n, p in decoder.named_parameters() if p.dim() != 2 or n.startswith("embed")]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0),
    ]
    peaks = [0.02, 3e-3]
    induction = max(1, round(0.06 * steps))
    ends, total = [], induction
    for phase in PHASES:
        total += round(phase.share * steps)
        ends.append(total)
    bar, smooth = tqdm(range(total), "pretrain", disable=None), None
    for step in bar:
        phase = PHASES[min(sum(step >= end for end in ends), len(PHASES) - 1)]
        # A short warm-up, then flat, then down to a twentieth over the last third.
        scale = min(1.0, (step + 1) / 20, 0.05 + 0.95 * (total - step) / (total / 3))
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * scale
        if step < induction:
            batch = repeats(rng, tokenizer, rows)
        else:
            k = rng.choice(phase.items)  # one k a batch: rows of like length waste no padding
            batch = [make_row(rng, tokenizer, phase, k, forbidden) for _ in range(rows)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = completion_loss(decoder, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        bar.set_postfix(phase="induction" if step < induction else phase.name, loss=f"{smooth:.3f}")
    return decoder.eval()


@torch.no_grad()
def gate(decoder: Decoder, tokenizer: Tokenizer, users: list[User], k=4) -> tuple[float, float]:
    """Nats on the cited kicker and on the answer's first style token, given a careful trace.

    On held-out users, the BM25 items in random order. Below about 0.3 each the skill is there for
    RL to amplify; above, no reward will find it.
    """
    rng, cited, styled = random.Random("gate"), [], []
    for user in users:
        section, keyword = parse_text(user.query)
        items = retrieve.retrieve(user.example(), k)
        if not any(parse_text(i["text"])[0] == section and follows(i, user.endings) for i in items):
            continue
        items = rng.sample(items, len(items))
        reasoning, title = careful_trace(rng, user, items)
        text = f"<think>\n{reasoning}\n</think>\n<answer>\n{{'title': '{title}'}}\n</answer>"
        completion = tokenizer.encode(text + SPECIALS[2])
        prompt = tokenizer.chat(retrieve.build_messages(user.example(), items))
        loss = completion_loss(decoder, [(prompt, completion)])
        kicker = tokenizer.vocabulary[f"{section}:"]
        first, second = (n for n, token in enumerate(completion) if token == kicker)
        cited.append(loss[first].item())
        styled.append(loss[second + 1 + len(tokenizer.encode(" " + keyword))].item())
    return sum(cited) / max(1, len(cited)), sum(styled) / max(1, len(styled))


# ---- The encoder ----------------------------------------------------------------------------


def make_encoder_tokenizer() -> Tokenizer:
    """WordPiece over the world's words; any other word falls apart into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = Counter(" ".join([*world_text(), *fixed_pieces()]).lower().split())
    words = sorted({"".join(c for c in word if c in letters) for word in words} - {""})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *"!\"#$%&'()*+,-./:;<=>?@[]_{}"]
    pieces += [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, ends)
    backend.add_special_tokens(pieces[:5])
    names = zip(("pad", "unk", "cls", "sep", "mask"), pieces)
    settings = {f"{name}_token": token for name, token in names} | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }  # fmt: skip
    files = {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=1) + "\n",
    }
    return Tokenizer(backend, pad_id=0, files=files)


def train_encoder(seed: int, users: list[User], steps: int, rows=64) -> Encoder:
    """Contrast on the training users: a text must find an item of its author's same section.

    Its items of other sections, and all items of the other authors in the batch, are the negatives
    (an item of the same section by another author is left out of them).
    """
    torch.manual_seed(seed + 1)
    rng = random.Random(f"{seed} encoder")
    tokenizer = make_encoder_tokenizer()
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": tokenizer.size,
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 256, "hidden_act": "gelu", "max_position_embeddings": 256,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "torch_dtype": "float16",
    }  # fmt: skip
    encoder = Encoder(config).train()
    encoder.tokenizer = tokenizer
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3)

    def embed(texts: list[str]) -> Tensor:
        ids = [torch.tensor(tokenizer.encode_pair(text, None, 256)[0]) for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, True)  # [B, T]
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        hidden = encoder(tokens, mask) * mask[..., None]  # [B, T, H]
        return F.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)  # [B, H]

    bar = tqdm(range(steps), "encoder", disable=None)
    for step in bar:
        pairs = []
        for user in rng.choices(users, k=6 * rows):  # one in six fits
            first, second = rng.sample(user.profile, 2)
            section, other = (parse_text(item["text"])[0] for item in (first, second))
            if section == other:
                pairs.append((first["text"], retrieve.show(second, TASK), section))
        texts, items, sections = zip(*pairs)
        scores = embed(list(texts)) @ embed(list(items)).T / 0.1  # [B, B]
        alike = torch.tensor([[a == b for b in sections] for a in sections])
        alike.fill_diagonal_(False)
        loss = F.cross_entropy(scores.masked_fill(alike, -torch.inf), torch.arange(len(pairs)))
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return encoder.eval()


def save_encoder(encoder: Encoder, directory: Path) -> None:
    encoder.tokenizer.save(directory)
    prlm.write_json(directory / "config.json", encoder.raw)
    weights = {name: view.half() for name, view in encoder.views().items()}
    prlm.write_safetensors(directory / "model.safetensors", weights)


# ---- The command ----------------------------------------------------------------------------


@dataclass
class Options:
    out: str = "toy"  # directory that gets lamp/, policy/ and encoder/
    train_users: int = 400  # records to learn from
    dev_users: int = 200  # records of other users, held out
    pretrain_steps: int = 1400  # of the policy, 32 rows each
    encoder_steps: int = 80  # of the encoder, about 64 pairs each
    threads: int = 1  # CPU threads; another number changes the last bits of the weights
    seed: int = 0  # of everything random


def main(o: Options) -> None:
    for name in ("train_users", "dev_users", "pretrain_steps", "encoder_steps", "threads"):
        if getattr(o, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    torch.set_num_threads(o.threads)
    out = Path(o.out)
    rng = random.Random(f"{o.seed} users")
    counts = {"train": o.train_users, "dev": o.dev_users}
    users = {split: [make_user(rng) for _ in range(count)] for split, count in counts.items()}
    write_lamp(users, out / "lamp")
    rng = random.Random(f"{o.seed} probe")
    write_probe(rng, users["dev"], out / "lamp" / TASK.replace("-", "_") / "probe.json")
    print(f"{out / 'lamp'}: {o.train_users} training and {o.dev_users} held-out users")

    save_encoder(train_encoder(o.seed, users["train"], o.encoder_steps), out / "encoder")
    tokenizer = make_tokenizer()
    # The policy never sees a target of these users, neither as an answer nor in a profile.
    targets = {user.target for authors in users.values() for user in authors}
    decoder = pretrain(o.seed, tokenizer, o.pretrain_steps, targets)
    cited, styled = gate(decoder, tokenizer, users["dev"])
    print(f"gate: {cited:.3f} nats on the cited kicker, {styled:.3f} on the first style token")
    prlm.save_decoder(decoder.bfloat16(), tokenizer, out / "policy")
    count = sum(parameter.numel() for parameter in decoder.parameters())
    print(f"{out / 'policy'}: {count:,} parameters, {tokenizer.size} tokens")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
