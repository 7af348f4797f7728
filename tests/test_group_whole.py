"""Whole runs of group_invariant_ppo.py with no flag at its default, against a plain loop that knows nothing of it.

As test_ppo_whole.py, whose plain functions serve here as well. The group part is written from the method's definitions:
the variance of the groups' returns is one function of labels, weights and returns, and autograd takes the derivatives
that the script has as formulas.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_ppo_whole import EPISODES, FLAGS, TR, advantages_of, count_recomputed, gold, largest_difference
from test_ppo_whole import logits_after, logprobs_of, padded, read_prompts, rows_of, sample, score_of, whitened
from test_ppo_whole import folder as models  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import group_invariant_ppo

FLAGS = FLAGS | dict(episodes_per_prompt=3, kl_coef=0.3, score_clip=0.9, num_groups=3, beta_critic=0.4, beta_policy=0.6,
                     dynamic_kl=False, group_level="prompt", group_variance="uniform", invariance_estimator="exact", group_head_lr=0.05)
PAPERS = dict(dynamic_kl=True, group_level="trajectory", group_variance="mass", invariance_estimator="advantage",
              whiten_rewards=False)
RUNS = {
    "changed": FLAGS,  # every flag that can differ from its default does
    "papers": FLAGS | PAPERS,
    "raw": FLAGS | PAPERS | dict(invariance_estimator="exact", group_level="prompt", score_clip=0.0, num_groups=2,
                                 total_episodes=2 * EPISODES),  # scores as the reward model gives them
}
ELSEWHERE = {  # flags that have a run of their own, or cannot differ here
    "retokenize", "allow_pickle", "columns", "reward_function", "resume", "overwrite", "zero_stage", "offload_optimizer", "bf16",
    "local_rank", "sft_model", "reward_model", "prompts", "eval_prompts", "output_dir"}


# ---- The plain loop ---------------------------------------------------------------------------------------


def group_means(labels, weights, values):
    """Mean of the episodes' values in each group, an episode counting by its label and its weight: (M,)."""
    return torch.stack([(labels[:, g] * weights * values).sum() / (labels[:, g] * weights).sum()
                        for g in range(labels.shape[1])])


def variance_of(means, shares, kind):
    """Variance of the groups' means, over groups as they weigh (mass) or over groups alike (uniform)."""
    shares = shares if kind == "mass" else torch.full_like(shares, 1 / len(shares))
    return (shares * (means - (shares * means).sum()) ** 2).sum()


def group_derivatives(labels, returns, kind):
    """The variance V; its derivatives by the labels (B, M), by the group means (M,), and by the weights (B,)."""
    labels, weights = labels.double().requires_grad_(), torch.ones(len(labels), dtype=torch.float64, requires_grad=True)
    means = group_means(labels, weights, returns.double())
    shares = (labels * weights[:, None]).sum(0) / weights.sum()
    variance = variance_of(means, shares, kind)
    by_label, by_weight = torch.autograd.grad(variance, (labels, weights), retain_graph=True)
    means = means.detach().requires_grad_()  # the policy moves the means; labels and shares are constants
    by_mean, = torch.autograd.grad(variance_of(means, shares.detach(), kind), means)
    return float(variance.detach()), by_label.float(), by_mean, by_weight


def auc(probabilities, scores, groups):
    """Share of pairs, of the best true group and of another, that the probability puts in order; ties count half."""
    names = {group for group in groups if group is not None}
    best = max(names, key=lambda name: np.mean([score for score, group in zip(scores, groups) if group == name]))
    pairs = [(p, q) for p, g in zip(probabilities, groups) for q, h in zip(probabilities, groups)
             if g == best and h not in (best, None)]
    return np.mean([(p > q) + (p == q) / 2 for p, q in pairs])


def plain_run(folder, flags):
    """Rows of metrics and samples, the weights at the end and at the best evaluation, and the group head."""
    flags = SimpleNamespace(**flags)
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    eos, updates = tokenizer.eos_token_id, flags.total_episodes // EPISODES
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32) for _ in range(2))
    critic, reward_model = (AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", dtype=torch.float32)
                            for _ in range(2))
    prompts, held_out = (read_prompts(folder / name, tokenizer, 9) for name in ("grouped.jsonl", "validation.jsonl"))
    true_group = {row["prompt"]: row.get("group") for row in rows_of(folder / "grouped.jsonl")}
    head = torch.nn.Linear(64, flags.num_groups)
    weight = torch.randn(flags.num_groups, 64, generator=torch.Generator().manual_seed(flags.seed))
    head.load_state_dict({"weight": weight * 0.2 / 8, "bias": torch.zeros(flags.num_groups)})
    optimizers = {model: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-2, weight_decay=0.3)
                  for model in (policy, critic, head)}
    metrics, samples, best, best_weights = [], [], -np.inf, None
    all_scores, first, seen_heads = [], SimpleNamespace(mean=0.0, sd=1.0), []
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
        means |= {"eval/rlhf_reward": means["eval/score"] - flags.kl_coef * first.sd * means["eval/kl"],
                  "eval/distinct_starts": len(starts) / 5}
        metrics.append({"step": update, **means})
        return means["eval/rlhf_reward"]

    def read_critic(query, response):
        """Values of the states before and after each token, and the labels of this episode (M,)."""
        hidden = critic.base_model(torch.tensor([query + response])).last_hidden_state[0]
        values = critic.score(hidden)[:, 0][len(query) - 1 :][:TR] - critic.config.reward_mean
        state = hidden[len(query) - 1] if flags.group_level == "prompt" else hidden[-1]
        return (values - first.mean) / first.sd, head(state).softmax(-1)

    def clipped_step(model, lr):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.max_grad_norm)
        optimizers[model].param_groups[0]["lr"] = lr
        optimizers[model].step()
        return float(norm)

    evaluate(0)
    for update in range(1, updates + 1):
        # rollout, scores, units
        episodes, left = range((update - 1) * EPISODES, update * EPISODES), 1 - (update - 1) / updates
        order = {p: np.random.default_rng((7, p)).permutation(len(prompts)) for p in range(10)}
        visits = [n // flags.episodes_per_prompt for n in episodes]
        chosen = [prompts[order[v // len(prompts)][v % len(prompts)]] for v in visits]
        queries = [ids for ids, _ in chosen]
        responses = [sample(policy, query, np.random.default_rng((7, update, n)).random(TR), eos)
                     for query, n in zip(queries, episodes)]
        pairs, lengths = list(zip(queries, responses)), torch.tensor([len(response) for response in responses])
        scores = torch.tensor([score_of(reward_model, *pair, eos) for pair in pairs])
        golds = gold([text for _, text in chosen], [text(*pair) for pair in pairs])
        normal, all_scores = scores, all_scores + scores.tolist()
        if flags.score_clip:
            mean, sd = np.mean(all_scores), np.std(all_scores, ddof=1)
            normal = ((scores - mean) / sd).clamp(-flags.score_clip, flags.score_clip)
            if update == 1:
                first.mean, first.sd = mean, sd

        # the rollout's log-probabilities, values and labels
        t = torch.arange(TR)
        mask, value_mask = t < lengths[:, None], t < lengths[:, None] + 1
        with torch.no_grad():
            old, ref = (padded([logprobs_of(model, *pair) for pair in pairs]) for model in (policy, reference))
            values, labels = zip(*(read_critic(*pair) for pair in pairs))
            values, labels = padded(values), torch.stack(labels)
            entropies = torch.stack([torch.distributions.Categorical(logits=row).entropy() for query, response in pairs
                                     for row in logits_after(policy, query + response)[len(query) - 1 : -1]])

        # rewards: each episode's KL has its own price
        ones = torch.ones(EPISODES)
        best_group = int(group_means(labels, ones, normal).argmax())
        price = flags.kl_coef * labels[:, best_group] if flags.dynamic_kl else flags.kl_coef * ones
        kl = old - ref
        rewards = -price[:, None] * kl
        for i, length in enumerate(lengths.tolist()):
            rewards[i, min(length, TR - 1)] += normal[i]
        unwhitened = rewards.sum(1)
        returns_of_episodes = normal if flags.invariance_estimator == "exact" else unwhitened
        if flags.whiten_rewards:
            rewards = whitened(rewards, value_mask, shift_mean=False)
        raw = advantages_of(rewards, values)
        returns, advantages = raw + values, whitened(raw, mask)

        # the policy's part of the variance
        variance, by_label, by_mean, by_weight = group_derivatives(labels, returns_of_episodes, flags.group_variance)
        kappas = 1 - flags.beta_policy * (labels / labels.mean(0)) @ by_mean.float()
        if flags.invariance_estimator == "exact":
            cost = flags.beta_policy * EPISODES * by_weight.float()
            advantages = advantages - cost[:, None] / raw[mask].var(correction=0).sqrt()
        else:
            advantages = advantages * kappas[:, None]

        # epochs and minibatches
        seen = SimpleNamespace(ratios=[], losses=[], clips=[], vf_losses=[], vf_clips=[], norms=[], vf_norms=[])
        for epoch in range(2):
            order = np.random.default_rng((7, update, 0, epoch)).permutation(EPISODES)
            for rows in (order[:4], order[4:]):
                new = padded([logprobs_of(policy, *pairs[i]) for i in rows])
                ratio, m, a = (new - old[rows]).exp(), mask[rows], advantages[rows]
                losses = torch.maximum(-a * ratio, -a * ratio.clamp(0.96, 1.04))
                policy.zero_grad()
                losses[m].mean().backward()
                seen.norms.append(clipped_step(policy, 2e-3 * left))
                seen.ratios.append(ratio[m].detach()), seen.losses.append(losses[m].detach())
                seen.clips.append((losses > -a * ratio)[m].float())

                predicted, new_labels = zip(*(read_critic(*pairs[i]) for i in rows))
                predicted, new_labels = padded(predicted), torch.stack(new_labels)
                m, v, r = value_mask[rows], values[rows], returns[rows]
                plain, clipped = (predicted - r) ** 2, (predicted.clamp(v - 0.03, v + 0.03) - r) ** 2
                losses = torch.maximum(plain, clipped) / 2
                critic.zero_grad(), head.zero_grad()
                loss = 0.4 * losses[m].mean()
                if epoch == 0:  # half of the episodes, so twice their part of the sum
                    loss = loss - flags.beta_critic * 2 * (by_label[rows] * new_labels).sum()
                loss.backward()
                if epoch == 0:
                    seen_heads.append(clipped_step(head, flags.group_head_lr * left))
                seen.vf_norms.append(clipped_step(critic, 3e-3 * left))
                seen.vf_losses.append(losses[m].detach()), seen.vf_clips.append((clipped > plain)[m].float())
        ratio, episode_kl, score = torch.cat(seen.ratios), kl.sum(1), scores.mean()
        row = {
            "step": update, "episode": update * EPISODES, "lr": 2e-3 * left, "critic_lr": 3e-3 * left,
            "objective/scores": score, "objective/kl": episode_kl.mean(), "objective/gold": np.mean(golds),
            "objective/kl_k3": ((ref - old).exp() - 1 + kl).sum(1).mean(), "objective/entropy": -old.sum(1).mean(),
            "objective/kl_coef": price.mean(), "objective/non_score_reward": -(price * episode_kl).mean(),
            "objective/rlhf_reward": (normal - price * episode_kl).mean(),
            "policy/entropy_avg": entropies.mean(), "policy/approxkl_avg": (ratio.log() ** 2).mean() / 2,
            "policy/clipfrac_avg": torch.cat(seen.clips).mean(), "policy/grad_norm": np.mean(seen.norms),
            "loss/policy_avg": torch.cat(seen.losses).mean(), "loss/value_avg": torch.cat(seen.vf_losses).mean(),
            "val/clipfrac_avg": torch.cat(seen.vf_clips).mean(), "val/grad_norm": np.mean(seen.vf_norms),
            "val/ratio": ratio.mean(), "val/ratio_var": ratio.var(correction=0), "val/ratio_max": ratio.max(),
            "val/explained_variance": 1 - (returns - values)[value_mask].var() / returns[value_mask].var(),
            "val/length": lengths.float().mean(), "val/ended": np.mean([response[-1] == eos for response in responses]),
            "groups/variance": variance, "groups/kappa_min": kappas.min(), "groups/kappa_max": kappas.max(),
            "groups/label_entropy": -(labels * labels.log()).sum(1).mean(), "groups/grad_norm": np.mean(seen_heads[-2:]),
            "groups/auc": auc(labels[:, best_group].tolist(), scores.tolist(), [true_group[text] for _, text in chosen])}
        order = group_means(labels, ones, normal).argsort(descending=True)
        for name, found in (("score", scores), ("return", unwhitened), ("kl", episode_kl), ("length", lengths)):
            means = group_means(labels, ones, found)
            row |= {f"group_{place}/{name}": means[g] for place, g in enumerate(order)}
        row |= {f"group_{place}/share": labels[:, g].mean() for place, g in enumerate(order)}
        row["groups/gap"] = row["group_0/return"] - row[f"group_{flags.num_groups - 1}/return"]
        metrics.append({name: float(value) for name, value in row.items()})
        if update % flags.eval_every == 0 or update == updates:
            reward = evaluate(update)
            if reward > best:
                best, best_weights = reward, {name: p.clone() for name, p in policy.state_dict().items()}
    return SimpleNamespace(metrics=metrics, samples=samples, best=best, best_weights=best_weights, policy=policy,
                           critic=critic, head=head, head_norms=seen_heads, clipped=np.abs(normal.tolist()))


# ---- The comparison ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(models):  # noqa: F811
    """Models and prompts of test_ppo_whole.py; two of three prompts have a group."""
    rows = rows_of(models / "train.jsonl")
    for i, row in enumerate(rows):
        row |= {} if i % 3 == 2 else {"group": i % 3}
    (models / "grouped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return models


def arguments(folder, name, **more):
    return group_invariant_ppo.Args(
        sft_model=str(folder / "sft"), reward_model=str(folder / "reward_model"), prompts=str(folder / "grouped.jsonl"),
        eval_prompts=str(folder / "validation.jsonl"), output_dir=str(folder / name), **more)


@pytest.fixture(scope="module", params=RUNS)
def both(request, folder):
    """The plain loop, and group_invariant_ppo.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recomputed = count_recomputed(patch)
        group_invariant_ppo.main(arguments(folder, request.param, **RUNS[request.param]))
    plain = plain_run(folder, RUNS[request.param])
    plain.recomputed = len(recomputed)
    return plain, folder / request.param


def test_every_flag_differs_from_its_default():
    fields = {field.name: field.default for field in dataclasses.fields(group_invariant_ppo.Args)}
    assert set(fields) == set(FLAGS) | ELSEWHERE
    assert not [name for name in FLAGS if FLAGS[name] == fields[name]]


def test_the_run_is_a_fair_one(both):
    """Groups that differ and multipliers far from 1, labels that move, scores clipped and not, clips at work."""
    plain, run = both
    rows = [row for row in plain.metrics if "val/ended" in row]
    assert all(0 < row["val/ended"] < 1 and row["policy/grad_norm"] > 0.3 for row in rows)
    assert all(row["policy/clipfrac_avg"] > 0.02 and row["val/clipfrac_avg"] > 0.02 for row in rows)
    assert max(row["groups/kappa_max"] - row["groups/kappa_min"] for row in rows) > 0.05
    assert len({round(row["groups/label_entropy"], 2) for row in rows}) > 1
    assert len({row["groups/auc"] for row in rows}) > 1
    assert max(plain.head_norms) > 0.02 and (run.name == "raw" or 0 < np.mean(plain.clipped == np.float32(0.9)) < 1)


def test_metrics_equal_those_of_the_plain_loop(both):
    """Every figure of every line of metrics.jsonl, time apart."""
    plain, run = both
    rows = rows_of(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in plain.metrics]
    for row, expected in zip(rows, plain.metrics):
        assert set(row) == set(expected)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=3e-4, abs=3e-5), (row["step"], name)


def test_samples_equal_those_of_the_plain_loop(both):
    plain, run = both
    rows = rows_of(run / "samples.jsonl")
    assert len(rows) == len(plain.samples)
    for row, expected in zip(rows, plain.samples):
        expected = {name: value for name, value in expected.items() if name != "ids"}
        assert set(row) == set(expected)
        for name in ("step", "query", "response", "length", "ended", "gold"):
            assert row[name] == expected[name], name
        assert row["score"] == pytest.approx(expected["score"], abs=1e-3)
        assert row["kl"] == pytest.approx(expected["kl"], abs=1e-3)


def test_every_step_recomputes_its_activations(both):
    """As in test_ppo_whole.py, also after an evaluation; critic and labels come from one forward."""
    plain, run = both
    assert plain.recomputed == RUNS[run.name]["total_episodes"] // EPISODES * 2 * 2 * 2 * 2 * 2


def assert_same_models(plain, run):
    policy, best = (AutoModelForCausalLM.from_pretrained(path) for path in (run, run / "best"))
    critic = AutoModelForSequenceClassification.from_pretrained(run / "critic")
    assert largest_difference(policy, plain.policy.state_dict()) < 1e-5
    assert largest_difference(critic, plain.critic.state_dict()) < 1e-5
    assert largest_difference(best, plain.best_weights) < 1e-5
    assert largest_difference(plain.head, load_file(run / "group_head.safetensors")) < 1e-5


def test_saved_models_equal_those_of_the_plain_loop(both):
    """Policy, critic and group head at the end, and the best policy, which is the one of its own evaluation alone."""
    assert_same_models(*both)


def test_summary_and_card_say_what_the_run_did(both):
    plain, run = both
    summary, evaluations = json.loads((run / "summary.json").read_text()), [m for m in plain.metrics if "eval/score" in m]
    for name, expected in (("before", evaluations[0]), ("after", evaluations[-1])):
        for key, value in expected.items():
            if key != "step":
                assert summary[name][key] == pytest.approx(value, rel=2e-3, abs=2e-4)
    assert summary["best_rlhf_reward"] == pytest.approx(plain.best, abs=1e-3)
    assert summary["episodes"] == RUNS.get(run.name, FLAGS)["total_episodes"] // EPISODES * EPISODES
    first, last = plain.samples[:5], plain.samples[-5:]
    shown = [(row["query"], row["before"], row["after"]) for row in summary["samples"]]
    assert shown == [(a["query"], a["response"], b["response"]) for a, b in zip(first, last)]
    card = (run / "README.md").read_text()
    for value in (evaluations[0]["eval/score"], evaluations[-1]["eval/score"]):
        assert f"{value:.3f}" in card
    assert f"{evaluations[-1]['eval/kl']:.2f}" in card and str(run.parent / "sft") in card
    steps = {"raw": ["step_0000001"]}.get(run.name, ["step_0000003", "step_0000004"])
    assert sorted(path.name for path in (run / "checkpoints").glob("*")) == steps


@pytest.mark.parametrize("both", ["papers"], indirect=True)
def test_a_resumed_run_is_the_plain_loop_too(both, folder):
    """The run again, as if killed in its last update: moments, units, optimizers and best score are those of before."""
    plain, run = both
    resumed = run.with_name("resumed")
    shutil.copytree(run, resumed)
    for name in ("summary.json", "model.safetensors", "critic/model.safetensors", "group_head.safetensors"):
        (resumed / name).unlink()
    group_invariant_ppo.main(arguments(folder, "resumed", resume=True, **RUNS["papers"]))
    assert plain.metrics[-1]["eval/rlhf_reward"] < plain.best  # so the last evaluation is not the best one
    test_metrics_equal_those_of_the_plain_loop((plain, resumed))
    test_samples_equal_those_of_the_plain_loop((plain, resumed))
    test_summary_and_card_say_what_the_run_did((plain, resumed))
    assert_same_models(plain, resumed)
