# %% [markdown]
# # One step of PrLM, by hand
# Ten cells, seconds on a laptop. VS Code, Spyder and Jupytext open this file as a notebook;
# `python toy/tour.py` runs it as it is. Change numbers, run a cell again, and look.

# %% 1. The toy: users who write headlines, and a language model of 0.9 M parameters
import sys

import torch

sys.path.insert(0, f"{sys.path[0] or '.'}/..")  # the chapters lie beside toy/

import prlm
import retrieve
import reward
import rl

o = rl.Options(device="cpu", k=4, group_size=8, temperature=1.0)
examples = retrieve.load_lamp(o.data, "LaMP-4", "train")
example = examples[1]  # whose four items hold what the answer takes
print(f"{len(examples)} users; this one wrote {len(example.profile)} texts before")
print("the query     :", example.query)
print("the user wrote:", example.target)

# %% 2. The profile: what the user wrote before, one item a line
for item in example.profile[:6]:
    print(item["date"], retrieve.show(item, example.task))

# %% 3. Retrieval: BM25 ranks the items by the words that they share with the query
corpus = [retrieve.show(item, example.task).split() for item in example.profile]
scores = retrieve.BM25(corpus).scores(example.query.split())
print("BM25, the best scores:", sorted(scores.round(2).tolist(), reverse=True)[:6])
for item in retrieve.retrieve(example, k=o.k):
    print(retrieve.show(item, example.task))

# %% 4. The prompt: the retrieved items, the request, the query
policy = rl.make_policy(o)
(prompt,) = retrieve.make_prompts(o, policy.tokenizer, [example])
print(policy.tokenizer.decode(prompt), f"[{len(prompt)} tokens]", sep="\n")

# %% 5. A group: eight completions of the same prompt, each reasoning first
sampling = (o.group_size, o.max_new_tokens, o.temperature, policy.tokenizer.eos_ids)
(group,) = prlm.generate(policy.sampler, [prompt], *sampling, seed=1)
texts = [policy.tokenizer.decode(completion.tokens) for completion in group]
print(texts[0], texts[1], texts[6], sep="\n")  # one without a </think> earns nothing

# %% 6. Rewards: ROUGE against what the user wrote, and a little for closing the reasoning
rows = reward.rewards(texts, [example] * len(texts), personalization=0.0)
for row in rows:
    print(f"{row['reward']:.3f}  {row['answer']!r}")

# %% 7. Advantages, by hand and by the function: better or worse than the group's mean?
r = torch.tensor([[row["reward"] for row in rows]])  # [P=1, G=8]
by_hand = (r - r.mean()) / (r.std() + 1e-4)
advantages = rl.group_advantages(r)
print("advantages:", [round(x, 2) for x in by_hand[0].tolist()])
assert torch.allclose(by_hand, advantages, atol=1e-5)

# %% 8. Log-probabilities of the sampled tokens: the sampler's, and once more with gradient
tokens = [[completion.tokens for completion in group]]  # [P][G]
logprobs, mask = prlm.token_logprobs(policy.decoder, [prompt], tokens, o.temperature)  # [P, G, C]
sampled = torch.tensor(group[0].logprobs)
apart = (logprobs[0, 0, : len(sampled)] - sampled).abs().max().item()
print(f"sampler and trainer differ by {apart:.1e} nats at most")

# %% 9. The loss is 0, its gradient is not: one step of AdamW
optimizer = rl.make_optimizer(policy, lr=1e-3)
loss = rl.grpo_loss(logprobs, logprobs.detach(), advantages, mask)
loss.backward()
norm = torch.nn.utils.clip_grad_norm_(policy.decoder.parameters(), 1.0)
optimizer.step()
print(f"loss {loss.item():.1e}, norm of its gradient {norm.item():.2f}")

# %% 10. What moved: mostly, the higher the advantage, the likelier; completions share tokens
with torch.no_grad():
    after, _ = prlm.token_logprobs(policy.decoder, [prompt], tokens, o.temperature)
change = (after - logprobs).sum(-1)[0]  # [G] nats
for advantage, nats, row in zip(advantages[0].tolist(), change.tolist(), rows, strict=True):
    print(f"advantage {advantage:+.2f}, log-probability changed by {nats:+.2f}: {row['answer']!r}")
both = torch.stack([advantages[0], change])
print(f"correlation of advantage and change: {torch.corrcoef(both)[0, 1]:.2f}")
