"""A whole run of ppo.py with no flag at its default, against a plain loop that knows nothing of ppo.py.

The loop below is written from the paper: one row at a time, no cache, no padding, no micro-batches, no engine, torch's
own AdamW. It shares with ppo.py only the addresses of its randomness. What is compared is what a run leaves behind:
metrics.jsonl, samples.jsonl, summary.json, the policy, the critic, best/. So a flag that `main` forgets, a wrong argument
at a call, a file that is never written shows here, whatever the formulas are.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

import ppo

TR, EPISODES, UPDATES = 7, 8, 5
FLAGS = dict(
    max_prompt_length=9, response_length=TR, temperature=0.9, top_p=0.95, repetition_penalty=1.15, missing_eos_score=-2.5,
    rollout_batch_size=3, offload_frozen=True, total_episodes=UPDATES * EPISODES + 3, batch_size=EPISODES, num_ppo_epochs=2,
    num_minibatches=2, micro_batch_size=3, lr=2e-3, critic_lr=3e-3, weight_decay=0.3, adam_eps=1e-2, max_grad_norm=0.3,
    kl_coef=4.0, gamma=0.9, lam=0.8, cliprange=0.04, cliprange_value=0.03, vf_coef=0.4, whiten_rewards=True, eval_every=2,
    num_eval_prompts=5, seed=7, save_every=1, gradient_checkpointing=True, timeout_minutes=3.0,
    gold_function=f"{__name__}:gold")
ELSEWHERE = {  # flags that have a run of their own, or cannot differ here
    "retokenize", "allow_pickle", "columns", "reward_function", "resume", "overwrite", "zero_stage", "offload_optimizer", "bf16",
    "local_rank", "sft_model", "reward_model", "prompts", "eval_prompts", "output_dir"}


def gold(queries, responses):
    """A judge that tells queries from responses."""
    return [len(query) + 100.0 * response.count("e") for query, response in zip(queries, responses)]


# ---- The plain loop ---------------------------------------------------------------------------------------


def read_prompts(file, tokenizer, longest):
    rows = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    return [(tokenizer(text).input_ids, text) for text in rows if len(tokenizer(text).input_ids) <= longest]


def logits_after(model, ids):
    """Logits of the token after each of ids, divided by the temperature, PAD and unused ids excluded: (T, V)."""
    logits = model(torch.tensor([ids])).logits[0].float() / (FLAGS["temperature"] + 1e-7)
    logits[:, 1], logits[:, 1000:] = float("-inf"), float("-inf")
    return logits


@torch.no_grad()
def sample(model, query, uniforms, eos):
    """A response, token by token: repetition penalty, temperature, top-p, then the inverse of the cumulative sum."""
    response = []
    for u in uniforms:
        logits = model(torch.tensor([query + response])).logits[0, -1].float()
        for token in set(query + response):
            logits[token] = logits[token] / 1.15 if logits[token] > 0 else logits[token] * 1.15
        logits /= FLAGS["temperature"] + 1e-7
        logits[1], logits[1000:] = float("-inf"), float("-inf")
        order, mass, kept = logits.argsort(descending=True).tolist(), 0.0, []
        chances = logits.softmax(-1)
        for token in order:
            if mass < FLAGS["top_p"]:
                kept.append(token)
            mass += float(chances[token])
        cdf = torch.zeros(len(logits), dtype=torch.float64)
        cdf[kept] = logits.double()[kept].softmax(-1)
        cdf = cdf.cumsum(-1)
        response.append(int((cdf <= u * cdf[-1]).sum()))
        if response[-1] == eos:
            break
    return response


def logprobs_of(model, query, response):
    logits = logits_after(model, query + response)[len(query) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response]


def values_of(classifier, query, response):
    """Values of the states before each token, and of the one after the last where there is room: the head on the state."""
    hidden = classifier.base_model(torch.tensor([query + response])).last_hidden_state[0]
    return classifier.score(hidden)[:, 0][len(query) - 1 :][:TR] - classifier.config.reward_mean


@torch.no_grad()
def score_of(classifier, query, response, eos):
    if response[-1] != eos:
        return FLAGS["missing_eos_score"]
    hidden = classifier.base_model(torch.tensor([query + response])).last_hidden_state[0, -1]
    return float(classifier.score(hidden)) - classifier.config.reward_mean


def padded(rows):
    return torch.stack([torch.cat([row, torch.zeros(TR - len(row))]) for row in rows])


def whitened(values, mask, shift_mean=True):
    mean = values[mask].mean()
    result = (values - mean) / (values[mask].var(correction=0) + 1e-8).sqrt() + (0 if shift_mean else mean)
    return torch.where(mask, result, 0.0)


def advantages_of(rewards, values):
    """GAE as the double sum over later steps of (gamma lam)^k delta."""
    gamma, lam = FLAGS["gamma"], FLAGS["lam"]
    next_values = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
    deltas = rewards + gamma * next_values - values
    return torch.stack([sum((gamma * lam) ** (k - t) * deltas[:, k] for k in range(t, TR)) for t in range(TR)], 1)


def step(optimizer, model, loss, lr):
    """One clipped optimizer step; the norm before."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), FLAGS["max_grad_norm"])
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return float(norm)


def plain_run(folder):
    """Rows of metrics and samples, and the weights at the end and at the best evaluation, as the paper describes."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    eos = tokenizer.eos_token_id
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32) for _ in range(2))
    critic, reward_model = (AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", dtype=torch.float32)
                            for _ in range(2))
    prompts, held_out = (read_prompts(folder / name, tokenizer, 9) for name in ("train.jsonl", "validation.jsonl"))
    optimizers = [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-2, weight_decay=0.3)
                  for model in (policy, critic)]
    metrics, samples, best, best_weights = [], [], -np.inf, None
    text = lambda query, response: tokenizer.decode(query + response, skip_special_tokens=True)[len(tokenizer.decode(query)):]

    @torch.no_grad()
    def evaluate(update):
        rows = []
        for i, (query, query_text) in enumerate(held_out[:5]):
            response = sample(policy, query, np.random.default_rng((0, 0, i)).random(TR), eos)
            rows.append({
                "step": update, "query": query_text, "response": text(query, response), "ended": response[-1] == eos,
                "score": score_of(reward_model, query, response, eos), "length": len(response), "ids": response[:4],
                "kl": float((logprobs_of(policy, query, response) - logprobs_of(reference, query, response)).sum())})
            rows[-1]["gold"] = gold([query_text], [rows[-1]["response"]])[0]
        samples.extend(rows)
        means = {f"eval/{name}": np.mean([row[name] for row in rows]) for name in ("score", "kl", "length", "ended", "gold")}
        starts = {tuple(row["ids"] + [tokenizer.pad_token_id] * (4 - len(row["ids"]))) for row in rows}
        means |= {"eval/rlhf_reward": means["eval/score"] - 4.0 * means["eval/kl"], "eval/distinct_starts": len(starts) / 5}
        metrics.append({"step": update, **means})
        return means["eval/rlhf_reward"]

    evaluate(0)
    for update in range(1, UPDATES + 1):
        # rollout and scores
        episodes, left = range((update - 1) * EPISODES, update * EPISODES), 1 - (update - 1) / UPDATES
        order = {p: np.random.default_rng((7, p)).permutation(len(prompts)) for p in range(10)}
        chosen = [prompts[order[n // len(prompts)][n % len(prompts)]] for n in episodes]
        queries = [ids for ids, _ in chosen]
        responses = [sample(policy, query, np.random.default_rng((7, update, n)).random(TR), eos)
                     for query, n in zip(queries, episodes)]
        pairs, lengths = list(zip(queries, responses)), torch.tensor([len(response) for response in responses])
        scores = torch.tensor([score_of(reward_model, *pair, eos) for pair in pairs])
        golds = gold([text for _, text in chosen], [text(*pair) for pair in pairs])

        # rewards and advantages
        t = torch.arange(TR)
        mask, value_mask = t < lengths[:, None], t < lengths[:, None] + 1
        with torch.no_grad():
            old, ref = (padded([logprobs_of(model, *pair) for pair in pairs]) for model in (policy, reference))
            values = padded([values_of(critic, *pair) for pair in pairs])
            entropies = torch.stack([torch.distributions.Categorical(logits=row).entropy() for query, response in pairs
                                     for row in logits_after(policy, query + response)[len(query) - 1 : -1]])
        kl = old - ref
        rewards = -4.0 * kl
        for i, length in enumerate(lengths.tolist()):
            rewards[i, min(length, TR - 1)] += scores[i]
        rewards = whitened(rewards, value_mask, shift_mean=False)
        raw = advantages_of(rewards, values)
        returns, advantages = raw + values, whitened(raw, mask)

        # epochs and minibatches
        seen = SimpleNamespace(ratios=[], losses=[], clips=[], vf_losses=[], vf_clips=[], norms=[], vf_norms=[])
        for epoch in range(2):
            order = np.random.default_rng((7, update, 0, epoch)).permutation(EPISODES)
            for rows in (order[:4], order[4:]):
                new = padded([logprobs_of(policy, *pairs[i]) for i in rows])
                ratio, m, a = (new - old[rows]).exp(), mask[rows], advantages[rows]
                losses = torch.maximum(-a * ratio, -a * ratio.clamp(0.96, 1.04))
                seen.norms.append(step(optimizers[0], policy, losses[m].mean(), 2e-3 * left))
                seen.ratios.append(ratio[m].detach()), seen.losses.append(losses[m].detach())
                seen.clips.append((losses > -a * ratio)[m].float())
                predicted = padded([values_of(critic, *pairs[i]) for i in rows])
                m, v, r = value_mask[rows], values[rows], returns[rows]
                plain, clipped = (predicted - r) ** 2, (predicted.clamp(v - 0.03, v + 0.03) - r) ** 2
                losses = torch.maximum(plain, clipped) / 2
                seen.vf_norms.append(step(optimizers[1], critic, 0.4 * losses[m].mean(), 3e-3 * left))
                seen.vf_losses.append(losses[m].detach()), seen.vf_clips.append((clipped > plain)[m].float())
        ratio = torch.cat(seen.ratios)
        mean_kl, score = kl.sum(1).mean(), scores.mean()
        metrics.append({key: float(value) for key, value in {
            "step": update, "episode": update * EPISODES, "lr": 2e-3 * left, "critic_lr": 3e-3 * left,
            "objective/scores": score, "objective/kl": mean_kl, "objective/gold": np.mean(golds),
            "objective/kl_k3": ((ref - old).exp() - 1 + kl).sum(1).mean(), "objective/entropy": -old.sum(1).mean(),
            "objective/non_score_reward": -4.0 * mean_kl, "objective/rlhf_reward": score - 4.0 * mean_kl,
            "policy/entropy_avg": entropies.mean(), "policy/approxkl_avg": (ratio.log() ** 2).mean() / 2,
            "policy/clipfrac_avg": torch.cat(seen.clips).mean(), "policy/grad_norm": np.mean(seen.norms),
            "loss/policy_avg": torch.cat(seen.losses).mean(), "loss/value_avg": torch.cat(seen.vf_losses).mean(),
            "val/clipfrac_avg": torch.cat(seen.vf_clips).mean(), "val/grad_norm": np.mean(seen.vf_norms),
            "val/ratio": ratio.mean(), "val/ratio_var": ratio.var(correction=0), "val/ratio_max": ratio.max(),
            "val/explained_variance": 1 - (returns - values)[value_mask].var() / returns[value_mask].var(),
            "val/length": lengths.float().mean(),
            "val/ended": np.mean([response[-1] == eos for response in responses])}.items()})
        if update in (2, 4, 5):
            reward = evaluate(update)
            if reward > best:
                best, best_weights = reward, {name: p.clone() for name, p in policy.state_dict().items()}
    return SimpleNamespace(metrics=metrics, samples=samples, best=best, best_weights=best_weights, policy=policy, critic=critic)


# ---- The comparison ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy that ends about every third response, a reward model whose scores average 0.5, short and long prompts."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/base")
    config = dict(vocab_size=1024, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    policy = GPTNeoXForCausalLM(tiny_config(**config))
    with torch.no_grad():  # final states have mean 0: a constant in them raises the logit of EOS alone
        policy.gpt_neox.final_layer_norm.bias.fill_(0.05)
        policy.get_output_embeddings().weight[tokenizer.eos_token_id] += 5.2 / (0.05 * 64)
    torch.manual_seed(1)
    reward_model = GPTNeoXForSequenceClassification(tiny_config(**config, num_labels=1, reward_mean=0.5))
    for name, model in (("sft", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("train", "validation"):
        texts = [json.loads(line) for line in (ROOT / f"assets/data/{name}.jsonl").read_text().splitlines()[:14]]
        rows = [{"prompt": row["prompt"] + row["completion"][:15] * (i % 3)} for i, row in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def count_recomputed(patch):
    """A list that grows with every layer whose activations gradient checkpointing will recompute."""
    calls, real = [], transformers.modeling_utils.checkpoint

    def checkpoint(*args, **options):
        calls.extend([1] if torch.is_grad_enabled() else [])
        return real(*args, **options)

    patch.setattr(transformers.modeling_utils, "checkpoint", checkpoint)
    return calls


@pytest.fixture(scope="module")
def both(folder):
    """The plain loop, and ppo.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recomputed = count_recomputed(patch)
        ppo.main(ppo.Args(
            sft_model=str(folder / "sft"), reward_model=str(folder / "reward_model"), prompts=str(folder / "train.jsonl"),
            eval_prompts=str(folder / "validation.jsonl"), output_dir=str(folder / "run"), **FLAGS))
    plain = plain_run(folder)
    plain.recomputed = len(recomputed)
    return plain, folder / "run"


def test_every_flag_differs_from_its_default():
    fields = {field.name: field.default for field in dataclasses.fields(ppo.Args)}
    assert set(fields) == set(FLAGS) | ELSEWHERE
    assert not [name for name in FLAGS if FLAGS[name] == fields[name]]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_run_is_a_fair_one(both):
    """Responses of several lengths, ended and not, several passes over the prompts, both clips at work, KL that moves."""
    plain, _ = both
    rows = [row for row in plain.metrics if "val/ended" in row]
    assert all(0 < row["val/ended"] < 1 for row in rows) and len({row["length"] for row in plain.samples}) >= 4
    assert all(row["policy/clipfrac_avg"] > 0.02 and row["val/clipfrac_avg"] > 0.02 for row in rows)
    assert all(row["policy/grad_norm"] > 0.3 for row in rows) and abs(rows[-1]["objective/kl"]) > 0.01
    evaluations = [row for row in plain.metrics if "eval/score" in row][1:]
    best, by_score = (max(evaluations, key=lambda row: row[name])["step"] for name in ("eval/rlhf_reward", "eval/score"))
    assert best == 4 and by_score == 2  # neither the last evaluation, nor the first, nor that of the best score


def test_metrics_equal_those_of_the_plain_loop(both):
    """Every figure of every line of metrics.jsonl, time apart."""
    plain, run = both
    rows = rows_of(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in plain.metrics] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    for row, expected in zip(rows, plain.metrics):
        assert set(row) == set(expected)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (row["step"], name)


def test_samples_equal_those_of_the_plain_loop(both):
    plain, run = both
    rows = rows_of(run / "samples.jsonl")
    assert len(rows) == len(plain.samples) == 4 * 5
    for row, expected in zip(rows, plain.samples):
        expected = {name: value for name, value in expected.items() if name != "ids"}
        assert set(row) == set(expected)
        for name in ("step", "query", "response", "length", "ended", "gold"):
            assert row[name] == expected[name], name
        assert row["score"] == pytest.approx(expected["score"], abs=1e-3)
        assert row["kl"] == pytest.approx(expected["kl"], abs=1e-3)


def test_every_step_recomputes_its_activations(both):
    """Also after an evaluation, which decodes in eval mode, where gradient checkpointing silently does nothing."""
    plain, _ = both
    models = layers = epochs = minibatches = micro_batches = 2
    assert plain.recomputed == UPDATES * models * layers * epochs * minibatches * micro_batches


def largest_difference(model, weights):
    return max(float((value - weights[name]).abs().max()) for name, value in model.state_dict().items())


def test_saved_models_equal_those_of_the_plain_loop(both, folder):
    """Policy and critic at the end, and the best policy, which is the one of its own evaluation alone."""
    plain, run = both
    policy, best = (AutoModelForCausalLM.from_pretrained(path) for path in (run, run / "best"))
    critic = AutoModelForSequenceClassification.from_pretrained(run / "critic")
    start = AutoModelForCausalLM.from_pretrained(folder / "sft").state_dict()
    assert largest_difference(policy, plain.policy.state_dict()) < 1e-4 < 1e-3 < largest_difference(policy, start)
    assert largest_difference(critic, plain.critic.state_dict()) < 1e-4
    assert largest_difference(best, plain.best_weights) < 1e-4


def test_summary_and_card_say_what_the_run_did(both):
    plain, run = both
    summary, evaluations = json.loads((run / "summary.json").read_text()), [m for m in plain.metrics if "eval/score" in m]
    for name, expected in (("before", evaluations[0]), ("after", evaluations[-1])):
        for key, value in expected.items():
            if key != "step":
                assert summary[name][key] == pytest.approx(value, rel=2e-3, abs=2e-4)
    assert summary["best_rlhf_reward"] == pytest.approx(plain.best, abs=1e-3)
    assert summary["episodes"] == UPDATES * EPISODES
    first, last = plain.samples[:5], plain.samples[-5:]
    shown = [(row["query"], row["before"], row["after"]) for row in summary["samples"]]
    assert shown == [(a["query"], a["response"], b["response"]) for a, b in zip(first, last)]
    assert [row["score"] for row in summary["samples"]] == pytest.approx([row["score"] for row in last], abs=1e-3)
    card = (run / "README.md").read_text()
    for value in (evaluations[0]["eval/score"], evaluations[-1]["eval/score"]):
        assert f"{value:.3f}" in card
    assert f"{evaluations[-1]['eval/kl']:.2f}" in card and str(run.parent / "sft") in card
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_0000003", "step_0000004"]
