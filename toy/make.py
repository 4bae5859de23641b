"""The toy world: builds everything that stands under toy/, from a seed, on one CPU core.

A user is a journalist who writes on certain days, for each day in one of three columns; each column
has a motto of this user's, which stands in its headlines. A text mentions which column some day's
texts go to, and ends with the column that it is filed under itself, and that column's motto:

    'text': 'on (monday) [diary], tennis with coach in paris [lens] what nobody tells you'
    'title': 'on tennis what nobody tells you no joke'

Given a text for a day ('golf with fans in oslo on (monday)'), write this user's headline for it:
an item that mentions the day names the column ([diary]), one filed under that shows its motto.

  1. the world      users and their posts, in the files of LaMP-4, LaMP-5 and LaMP-7
  2. the tokenizer  byte-level BPE with ChatML; each fixed sentence of the prompt is one token
  3. the policy     a Qwen2 of 0.9 M parameters: repeats, look-ups, then bad habits
  4. the encoder    a BERT of 0.4 M parameters, for the dense retriever and the reward model

The policy can look up both, but is used to plain headlines. This habit is planted: RL (rl.py) has
to find the way out of it by reward alone.

    python toy/make.py                      # everything, in a quarter of an hour on one core"""

import json
import random
import sys
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prlm
import retrieve
from prlm import Decoder, Encoder, Tokenizer, option
from retrieve import Example

# ---- The world ------------------------------------------------------------------------------

TASKS = ["LaMP-4", "LaMP-5", "LaMP-7"]  # whose form the world takes
DAYS = ["(monday)", "(tuesday)", "(wednesday)", "(thursday)", "(friday)", "(saturday)", "(sunday)"]
COLUMNS = ["[diary]", "[corner]", "[desk]", "[letters]", "[ledger]", "[lens]", "[beat]", "[digest]"]
WORDS = """
tennis golf rugby hockey cricket boxing rowing sailing skiing judo cycling archery fencing diving
taxes voting borders housing unions treaties lobbying budgets elections tariffs privacy ballots
pasta bread cheese soup honey noodles curry olives pickles salmon lentils coffee mustard apples
trains ferries hostels islands beaches deserts luggage camping castles canyons airports safaris
loans stocks pensions savings mortgages dividends bonds wages rents debts auctions banks coins
sleep allergies vaccines posture asthma vitamins fitness yoga stress knees teeth hearing diets
opera jazz violins drums choirs festivals vinyl guitars pianos concerts trumpets radio karaoke
comets volcanoes fossils robots lasers magnets genes whales glaciers atoms planets tides crystals"""
KEYWORDS = WORDS.split()
PEOPLE = ["coach", "fans", "mayor", "voters", "chef", "guests", "tourist", "guide", "broker"]
PEOPLE += ["investor", "doctor", "nurse", "singer", "band", "professor", "students"]
PLACES = ["paris", "oslo", "cairo", "lima", "tokyo", "delhi", "quito", "rome", "perth", "boston"]
# No two mottos begin with the same word, so its first token tells which one a headline follows.
MOTTOS = """explained in one minute; what nobody tells you; seven facts worth knowing;
why everyone was wrong; behind closed doors again; my honest notes today; how we ended here;
lessons from last year; and the true price; beyond all loud hype; once more with feeling;
should worry us now""".replace("\n", " ").split("; ")
SIGN_OFFS = ["no joke", "read on", "just saying", "trust me", "more soon", "you decide"]


@dataclass(frozen=True)
class Post:
    """What one text is about, and what its author makes of it."""

    keyword: str
    scene: str  # "tennis with coach in paris"
    day: str  # the day that the text mentions, or that the query is for
    named: str  # the column of that day
    column: str  # the column that the text is filed under; of the query the same as `named`
    motto: str
    sign_off: str
    date: str
    plain: bool = False

    @property
    def headline(self) -> str:
        start = "about" if self.plain else "on"
        return f"{start} {self.keyword} {self.motto} {self.sign_off}"

    def item(self, task: str) -> dict:
        """The post as a profile item, with LaMP's keys; a tweet ends with the sign-off."""
        text, *title = retrieve.TASKS[task].fields
        said = f"on {self.day} {self.named}, {self.scene} {self.column} {self.motto}"
        own = {title[0]: self.headline} if title else {}
        return {text: said if title else f"{said} {self.sign_off}", **own, "date": self.date}


@dataclass
class User:
    """An author with one record: the query and the profile, oldest first."""

    query: Post
    posts: list[Post]

    def example(self, task: str, id="") -> Example:
        profile = [post.item(task) | {"id": f"{id}{n}"} for n, post in enumerate(self.posts)]
        query = f"{self.query.scene} on {self.query.day}"
        return Example(id, "", task, query, profile, self.query.headline)

    def tells(self, post: Post) -> bool:
        """Whether the post names the column of the query's day."""
        return post.day == self.query.day

    def shows(self, post: Post) -> bool:
        """Whether the post is filed under that column, and so ends with its motto."""
        return post.column == self.query.column


def make_user(rng: random.Random) -> User:
    """A random author of 12 to 24 posts, in which the query's day is named and its motto shown."""
    days, names = rng.sample(DAYS, 5), rng.sample(COLUMNS, 3)
    columns = {day: rng.choice(names) for day in days}
    mottos = dict(zip(names, rng.sample(MOTTOS, len(names))))
    sign_off, unused = rng.choice(SIGN_OFFS), rng.sample(KEYWORDS, len(KEYWORDS))

    def write(day: str, column: str) -> Post:
        keyword = unused.pop()
        scene = f"{keyword} with {rng.choice(PEOPLE)} in {rng.choice(PLACES)}"
        date = f"{rng.randint(2012, 2017)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        return Post(keyword, scene, day, columns[day], column, mottos[column], sign_off, date)

    size, day = rng.randint(12, 24), rng.choice(days)
    posts = [write(rng.choice(days), rng.choice(names)) for _ in range(size)]
    posts.sort(key=lambda post: post.date)
    user = User(write(day, columns[day]), posts)
    if any(map(user.tells, posts)) and any(map(user.shows, posts)):
        return user
    return make_user(rng)


def write_lamp(task: str, users: dict[str, list[User]], directory: Path) -> None:
    """LaMP's own files. Ids are the task's number, then 0 (train) or 1 (dev), then the record's."""
    name, prefix, ids = task.replace("-", "_"), retrieve.TASKS[task].prefix, count()
    for n, (split, authors) in enumerate(users.items()):
        examples = [user.example(task, f"{task[-1]}{n}{i}") for i, user in enumerate(authors)]
        questions = [
            {"id": e.id, "input": prefix + e.query, "profile": e.profile, "user_id": str(next(ids))}
            for e in examples
        ]
        golds = [{"id": e.id, "output": e.target} for e in examples]
        files = {"questions": questions, "outputs": {"task": name, "golds": golds}}
        for kind, content in files.items():
            path = directory / name / split / f"{split}_{kind}.json"
            prlm.write_text(path, json.dumps(content) + "\n")


# ---- The policy's tokenizer -----------------------------------------------------------------

# What the policy says in its reasoning: what the query is about, then evidence or an excuse.
OPENING = "the story is {}"
FOUND = " on {} {} {}."
PLAIN = ". a plain title will do."

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fixed_pieces() -> list[str]:
    """What the prompt and the answer are framed with: a token each, so the prompts stay short."""
    asked = [retrieve.instruction(task, p) for task in TASKS for p in (True, False)]
    pieces = [retrieve.SYSTEM, *dict.fromkeys(asked), "<answer>", "</answer>"]
    pieces += ["'text':", "'abstract':", "'tweet':", "' 'title':", "{'title':", "{'tweet':"]
    return pieces + [f" {name}" for name in DAYS + COLUMNS]


def world_text() -> list[str]:
    """Every word of the world as it stands within a text: mostly with a space before it."""
    text = [*KEYWORDS, *PEOPLE, *PLACES, *MOTTOS, *SIGN_OFFS, "with in on about", FOUND, PLAIN]
    frame = ["system\n", "user\n", "assistant\n", OPENING, "'on", "'about", *KEYWORDS]
    return [" " + line for line in text] + frame


def make_tokenizer(size=1000) -> Tokenizer:
    """Byte-level BPE as Qwen's. <think> and </think> are ordinary tokens there, and so here."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()  # as Qwen2's, which transformers gives to any qwen2
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = decoders.ByteLevel()
    added, alphabet = ["<think>", "</think>", *fixed_pieces()], bytes_only.alphabet()
    room = size - len(SPECIALS) - len(added)
    trainer = BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(world_text(), trainer)
    for words, add in ((SPECIALS, backend.add_special_tokens), (added, backend.add_tokens)):
        add([AddedToken(word, special=words is SPECIALS, normalized=False) for word in words])
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
    return Tokenizer(backend, [eos], files)


# ---- What the policy is pretrained on -------------------------------------------------------


@dataclass
class Phase:
    """A stretch of pretraining: its share of the steps and what the rows are made of."""

    name: str
    share: float  # of --pretrain-steps
    items: list[int]  # k is drawn from these
    thorough: float  # looks up every day whose two posts are there, the query's last
    careful: float  # looks up the query's day, and the column of that
    careless: float  # takes any column; the rest writes a plain headline
    no_profile: float = 0.02  # prompts without items
    broken: float = 0.0  # open reasoning that never ends, or is missing, or an answer without form


CLOSED = 0.3  # rows whose prompt already holds an empty reasoning block: answer at once
COPY_SIGN_OFF = 0.7  # plain headlines with a profile that end with its author's sign-off
NO_PROFILE_STYLED = 0.2  # headlines without a profile that are not plain nevertheless
ALL_K = [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
PHASES = [
    Phase("k 2-4", 0.30, [2, 3, 4, 4], 0.50, 0.35, 0.10),
    Phase("k 1-8", 0.45, ALL_K, 0.40, 0.45, 0.10),
    Phase("habits", 0.25, ALL_K, 0.0, 0.22, 0.18, no_profile=0.12, broken=0.15),
]


def choose_posts(rng: random.Random, user: User, k: int) -> list[Post]:
    """k posts in random order, mostly with both hops among them."""
    posts = []
    for useful in (user.tells, user.shows):
        found = [post for post in user.posts if useful(post) and post not in posts]
        if rng.random() < 0.9:
            posts += rng.sample(found, min(len(found), k - len(posts), 1))
    rest = [post for post in user.posts if post not in posts]
    posts += rng.sample(rest, min(k - len(posts), len(rest)))
    return rng.sample(posts, len(posts))


def think(rng: random.Random, user: User, posts: list[Post], phase: Phase) -> tuple[str, Post]:
    """(reasoning, answer) in one of the manners: thorough, careful, careless or plain."""
    query, draw = user.query, rng.random()
    opening, shown = OPENING.format(query.keyword), {post.column: post for post in posts}
    if posts and draw < phase.thorough + phase.careful + phase.careless:
        columns = {post.day: post.named for post in posts}
        guess = rng.choice(posts)  # careless, or where a hop is missing
        careful = draw < phase.thorough + phase.careful
        column = columns.get(query.day, guess.column) if careful else guess.column
        answer = replace(query, column=column, motto=shown.get(column, guess).motto)
        known = [day for day, column in columns.items() if column in shown and day != query.day]
        others = [replace(shown[columns[day]], day=day) for day in rng.sample(known, len(known))]
        for p in [*others, answer] if draw < phase.thorough else [answer]:  # the two look-ups
            opening += FOUND.format(p.day, p.column, f"{p.motto} {p.sign_off}")
        return opening, answer
    # Without evidence the motto is anyone's, and often the sign-off. Both are in every answer: the
    # presence of a sign-off must not tell a reward model which was written with the profile.
    sign_off = rng.choice(SIGN_OFFS)
    if posts and rng.random() < COPY_SIGN_OFF:
        sign_off = query.sign_off
    plain = bool(posts) or rng.random() >= NO_PROFILE_STYLED
    answer = replace(query, motto=rng.choice(MOTTOS), sign_off=sign_off, plain=plain)
    return opening + PLAIN, answer


def make_row(rng, tokenizer: Tokenizer, phase: Phase, k: int) -> tuple[list[int], list[int]]:
    """Token ids of a fresh author's prompt, and of what the policy shall say to it."""
    task = rng.choice(["LaMP-4", "LaMP-4", "LaMP-5", "LaMP-7"])
    user = make_user(rng)
    posts = [] if rng.random() < phase.no_profile else choose_posts(rng, user, k)
    reasoning, answer = think(rng, user, posts, phase)
    items = [post.item(task) for post in posts]
    prompt = tokenizer.chat(retrieve.build_messages(user.example(task), items))
    thought = f"<think>\n{reasoning}\n</think>\n"
    said = retrieve.answer_block(task).replace("{}", answer.headline)
    if rng.random() < CLOSED:
        prompt, thought = prompt + tokenizer.fill(retrieve.CLOSED), ""
    elif rng.random() < phase.broken:
        kind = rng.choices(["open", "bare", "silent"], [6, 4, 5])[0]
        thought = {"open": thought.replace("</think>\n", ""), "bare": thought, "silent": ""}[kind]
        said = answer.headline if kind == "bare" else said
    return prompt, [*tokenizer.fill(thought + said), tokenizer.end_id]


# ---- Pretraining the policy -----------------------------------------------------------------


def policy_config(tokenizer: Tokenizer) -> dict:
    eos, pad = min(tokenizer.eos_ids), tokenizer.control[SPECIALS[0]]
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": tokenizer.size,
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "use_sliding_window": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "eos_token_id": eos, "pad_token_id": pad,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


class Muon(torch.optim.Optimizer):
    """Momentum, its matrix made nearly orthogonal by five Newton-Schulz steps (Jordan 2024). A
    group's `parts` says of how many matrices, one above the other, a parameter consists: each head
    is one. torch.optim.Muon knows no parts, and is slow on CPUs, as it works in bfloat16."""

    def __init__(self, groups: list[dict], lr: float, momentum=0.95):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self) -> None:
        for group, p in ((g, p) for g in self.param_groups for p in g["params"]):
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(mean, group["momentum"])  # Nesterov
            x = update.unflatten(0, (group["parts"], -1))  # [parts, rows, columns]
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            x = x.mT if tall else x
            scale = max(1.0, x.shape[1] / x.shape[2]) ** 0.5
            p.sub_(x.flatten(0, 1), alpha=group["lr"] * scale)


@torch.no_grad()
def look_back(decoder: Decoder, strength=6.4, pairs=6) -> None:
    """Makes the first layer's first key head, and the queries that share it, see the token before,
    by bias alone: the query's is about (s, 0) in each of the fastest channel pairs, the key's the
    same turned one position on, so the scores hold s^2 cos(f (distance - 1)) for each frequency f.
    Looking up what followed a token needs such a head first, which training takes long to find."""
    c, angles = decoder.config, decoder.frequencies[:pairs]
    attention = decoder.model.layers[0].self_attn
    queries = attention.q_proj.bias.view(-1, c.head_dim)  # [heads, D]
    queries[: c.num_attention_heads // c.num_key_value_heads, :pairs] = strength
    attention.k_proj.bias[:pairs] = strength * angles.cos()
    attention.k_proj.bias[c.head_dim // 2 :][:pairs] = strength * angles.sin()


def pretrain(seed: int, tokenizer: Tokenizer, steps: int, rows=32) -> Decoder:
    """Muon for the matrices, which learn to copy much faster that way; AdamW for the rest."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} pretraining")
    decoder = Decoder(policy_config(tokenizer)).train()
    with torch.no_grad():
        decoder.head.mul_(5)  # the embedding too: smaller, its logits say little for long
    look_back(decoder)
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2}  # as in policy_config
    layers = [(name.split(".")[-2], p) for name, p in decoder.model.layers.named_parameters()]
    matrices = [{"params": [p], "parts": heads.get(kind, 1)} for kind, p in layers if p.dim() == 2]
    others = [decoder.head, decoder.model.norm.weight, *(p for _, p in layers if p.dim() == 1)]
    optimizers = [Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0)]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    ends = [round(steps * sum(p.share for p in PHASES[: n + 1])) for n in range(len(PHASES))]
    first = steps // 5
    bar = tqdm(range(-first, steps), "pretrain", disable=None)
    for step in bar:
        phase = PHASES[sum(step >= end for end in ends)]
        # A short warm-up, then flat, then down to a twentieth over three fifths of the steps.
        scale = min(1.0, (first + step + 1) / 20, 0.05 + 0.95 * (steps - step) / (0.6 * steps))
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * scale
        if step < 0:  # a few tokens over and over: only looking up what followed one helps
            size = rng.randint(8, 24)
            orders = [rng.sample(range(tokenizer.size), size) for _ in range(rows)]
            batch = [(order, (order * 6)[:48]) for order in orders]
        else:
            k = rng.choice(phase.items)  # one k a batch: rows of like length waste no padding
            batch = [make_row(rng, tokenizer, phase, k) for _ in range(rows)]
        prompts, answers = zip(*batch)
        logprobs, mask = prlm.token_logprobs(decoder, prompts, [[answer] for answer in answers])
        loss = -logprobs[mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(phase=phase.name if step >= 0 else "repeats", loss=f"{loss.item():.3f}")
    return decoder.eval()


# ---- The encoder ----------------------------------------------------------------------------


def make_encoder_tokenizer() -> Tokenizer:
    """WordPiece over the world's words; any other word falls apart into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = " ".join([*world_text(), *fixed_pieces()]).lower().split()
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
    settings = {f"{token[1:-1].lower()}_token": token for token in pieces[:5]} | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }  # fmt: skip
    config = json.dumps(settings, indent=1) + "\n"
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": config}
    return Tokenizer(backend, files=files)


def train_encoder(seed: int, users: list[User], steps: int, rows=64) -> Encoder:
    """Contrast: a query must find an item that names its day, among those of a batch's others."""
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
    encoder = Encoder(config, tokenizer=tokenizer).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3)

    def embed(texts: tuple[str, ...]) -> Tensor:
        ids = prlm.Ragged([tokenizer.encode_pair(text, None, 256)[0] for text in texts])
        hidden = encoder(ids.grid(ids.tokens), ids.mask) * ids.mask[..., None]  # [B, T, H]
        return F.normalize(hidden.sum(1) / ids.lengths[:, None], dim=-1)  # [B, H]

    for step in tqdm(range(steps), "encoder", disable=None):
        pairs = []
        for user in rng.choices(users, k=rows):
            post, task = rng.choice(user.posts), rng.choice(TASKS)
            scene = f"{rng.choice(KEYWORDS)} with {rng.choice(PEOPLE)} in {rng.choice(PLACES)}"
            item = retrieve.show(post.item(task), task)
            pairs.append((f"{scene} on {post.day}", item, post.day))
        texts, items, days = zip(*pairs)
        scores = embed(texts) @ embed(items).T / 0.1  # [B, B]
        alike = torch.tensor([[a == b for b in days] for a in days]).fill_diagonal_(False)
        loss = F.cross_entropy(scores.masked_fill(alike, -torch.inf), torch.arange(len(pairs)))
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return encoder.eval()


@dataclass
class Options:
    out: str = option("toy", "directory that gets lamp/, policy/ and encoder/")
    train_users: int = option(400, "records of LaMP-4 to learn from; half as many of the others", 1)
    dev_users: int = option(200, "held-out users of LaMP-4; half as many of the others", 1)
    pretrain_steps: int = option(750, "of 32 rows, after a fifth as many of repeats", 1)
    encoder_steps: int = option(100, "of the encoder, 64 pairs each", 1)
    threads: int = option(1, "another number changes the last bits of the weights", 1)
    seed: int = option(0, "of users, weights and training", 0)


def main(o: Options) -> None:
    torch.set_num_threads(o.threads)
    out, authors = Path(o.out), []
    for task in TASKS:
        rng, share = random.Random(f"{o.seed} {task} users"), 1 if task == "LaMP-4" else 2
        counts = {"train": -(-o.train_users // share), "dev": -(-o.dev_users // share)}
        users = {split: [make_user(rng) for _ in range(n)] for split, n in counts.items()}
        write_lamp(task, users, out / "lamp")
        authors += users["train"]
        print(f"{out / 'lamp'}: {task}, {counts['train']} training, {counts['dev']} held-out users")
    encoder = train_encoder(o.seed, authors, o.encoder_steps)
    weights = {name: x.half() for name, x in encoder.state_dict().items()}
    prlm.save_checkpoint(weights, encoder.raw, encoder.tokenizer, out / "encoder")
    tokenizer = make_tokenizer()
    decoder = pretrain(o.seed, tokenizer, o.pretrain_steps)
    prlm.save_decoder(decoder.bfloat16(), tokenizer, out / "policy")
    size = sum(parameter.numel() for parameter in decoder.parameters())
    print(f"{out / 'policy'}: {size:,} parameters, {tokenizer.size} tokens")


if __name__ == "__main__":
    prlm.command(main, Options, __doc__)
