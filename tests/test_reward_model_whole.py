"""Whole runs of reward_model.py with no flag at its default, against a plain loop that knows nothing of it.

The loop below is written from the paper: one row at a time, no padding, no shared rows, no micro-batches, no
engine, torch's own AdamW. It shares with reward_model.py only the addresses of its randomness. What a run
leaves behind is compared: metrics.jsonl, samples.jsonl, summary.json, model and constant, checkpoints.
"""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import whole
from conftest import ROOT
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from whole import rows_of

import reward_model

LONGEST, LONGEST_POST = 70, 60  # tokens of a row, and of a TL;DR prompt
FLAGS = dict(
    max_length=LONGEST, max_prompt_length=LONGEST_POST, epochs=3, batch_size=8, micro_batch_size=3, lr=5e-3,
    warmup_ratio=0.3, weight_decay=0.3, adam_eps=1e-2, max_grad_norm=0.5, eval_every=4, eval_batch_size=5,
    accuracy_by=("confidence", "policies"), seed=7, save_every=3, log_every=2,
    gradient_checkpointing=True, timeout_minutes=3.0)
CASES = {"shared": dict(share_prefix=True), "plain": dict(share_prefix=False)}
ELSEWHERE = {  # flags that have a run of their own, or cannot differ here
    "allow_pickle", "columns", "resume", "overwrite", "zero_stage", "offload_optimizer", "bf16", "local_rank", "model",
    "train_data", "eval_data", "demonstrations", "output_dir"}
STEPS, EVALUATIONS, LOGGED = 9, [0, 4, 8, 9], [2, 4, 6, 8, 9]  # 22 pairs: 8, 8, 6; three times
POST = ["I was at home.", "She came to see me.", "We were happy, and then she went away."]


# ---- The plain loop ---------------------------------------------------------------------------------------


def encode(tokenizer, prompt, completion):
    ids = tokenizer(prompt).input_ids + tokenizer(completion).input_ids
    return ids if ids[-1] in whole.ENDS else ids + [tokenizer.eos_token_id]  # one end


def read_pairs(file, tokenizer):
    """{prompt, chosen, rejected, ids of both, ...} of the usable pairs, comparisons as in the paper."""
    pairs = []
    for row in rows_of(file):
        if "info" in row:
            post, better = row["info"].get("post"), row["choice"]
            paragraphs = post.split("\n") if post else []
            tldr = lambda n: (f"SUBREDDIT: r/{row['info']['subreddit']}\n\nTITLE: {row['info']['title']}\n\n"
                              "POST: " + "\n".join(paragraphs[:n]) + "\n\nTL;DR:")
            fits = [tldr(n) for n in range(1, len(paragraphs) + 1)]
            fits = [text for text in fits if len(tokenizer(text).input_ids) <= LONGEST_POST]
            row |= {"prompt": fits[-1] if post else f"Article:\n{row['info']['article']}\n\nTL;DR:\n",
                    "chosen": row["summaries"][better]["text"],
                    "rejected": row["summaries"][1 - better]["text"],
                    "confidence": row["extra"]["confidence"],
                    "policies": "--".join(sorted(summary["policy"] for summary in row["summaries"]))}
        row["ids"] = [encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        if row["chosen"] != row["rejected"] and max(map(len, row["ids"])) <= LONGEST:
            pairs.append(row)
    return pairs


def score(model, ids):
    """The head on the last state of the last token."""
    return model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1])[0]


def scores_of(model, pairs):
    """Scores of the chosen and the rejected completions, (2, pairs)."""
    return torch.stack([torch.stack([score(model, pair["ids"][side]) for pair in pairs]) for side in (0, 1)])


def halves(first, second):
    """1 where the first is larger, 1/2 where they are equal."""
    return [float(a > b) if a != b else 0.5 for a, b in zip(first, second)]


def calibration_of(differences):
    """Pairs in bins of half a point of the difference, up to its 99.5 % quantile."""
    sizes, table = np.abs(differences), []
    for low in np.arange(0, 100, 0.5):
        inside = [(d, size) for d, size in zip(differences, sizes) if low <= size < low + 0.5]
        if inside and low <= np.quantile(sizes, 0.995):
            table.append({"from": low, "pairs": len(inside), "accuracy": np.mean([d > 0 for d, _ in inside]),
                          "predicted": np.mean([1 / (1 + math.exp(-size)) for _, size in inside])})
    return table


def plain_run(folder):
    """Rows of metrics and samples, weights after each step and the constant, as the paper describes."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    drawn = torch.randn(1, 64, generator=torch.Generator().manual_seed(7))
    model.score.weight.data.copy_(drawn / math.sqrt(65))
    train = read_pairs(folder / "train.jsonl", tokenizer)
    held_out = {name: read_pairs(folder / f"{name}.jsonl", tokenizer)
                for name in ("validation", "comparisons")}
    is_news = lambda pair: pair["batch"] in ("cnndm0", "batch0_cnndm")
    held_out["comparisons_cnndm"] = [pair for pair in held_out["comparisons"] if is_news(pair)]
    held_out["comparisons"] = [pair for pair in held_out["comparisons"] if not is_news(pair)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-2, weight_decay=0.3)
    metrics, samples, weights, norms, calibrations = [], [], {0: whole.weights_of(model)}, [], {}

    @torch.no_grad()
    def evaluate(step):
        metrics.append({"step": step})
        for name, pairs in held_out.items():
            good, bad = scores_of(model, pairs).tolist()
            right, prompts = halves(good, bad), [pair["prompt"] for pair in pairs]
            low, high = whole.interval(right, prompts)
            lengths = [[len(pair["ids"][side]) - len(tokenizer(pair["prompt"]).input_ids) for pair in pairs]
                       for side in (0, 1)]
            names = sorted(set(prompts))
            names = [names[i] for i in whole.permutation(len(names), 7)]
            strangers = []  # at the end alone: scores under the prompt that comes next in a seeded order
            for pair in pairs if step == STEPS else ():
                other = names[(names.index(pair["prompt"]) + 1) % len(names)]
                ids = [encode(tokenizer, other, pair[side]) for side in ("chosen", "rejected")]
                if max(map(len, ids)) <= LONGEST:
                    strangers.append([float(score(model, one)) for one in ids])
            figures = {
                "accuracy": np.mean(right), "accuracy_low": low, "accuracy_high": high,
                "longer_wins": np.mean(halves(*lengths)),
                "score_length_correlation": np.corrcoef(lengths[0] + lengths[1], good + bad)[0, 1],
                "chosen_rewards": np.mean(good), "rejected_rewards": np.mean(bad)}
            if strangers:
                figures["shuffled_prompts"] = np.mean(halves(*zip(*strangers)))
            for column in ("confidence", "policies"):
                for value in {str(pair[column]) for pair in pairs}:
                    figures[f"accuracy/{column}/{value}"] = np.mean(
                        [one for one, pair in zip(right, pairs) if str(pair[column]) == value])
            metrics[-1] |= {f"eval/{name}/{key}": value for key, value in figures.items()}
            samples.extend({
                "step": step, "query": pair["prompt"], "chosen": pair["chosen"], "rejected": pair["rejected"],
                "chosen_score": a, "rejected_score": b} for pair, a, b in list(zip(pairs, good, bad))[:10])
            calibrations[name] = calibration_of(np.array(good) - np.array(bad))

    evaluate(0)
    for step, batch in enumerate(whole.batches(len(train), 8, 7, 3), 1):
        good, bad = scores_of(model, [train[i] for i in batch])
        loss = torch.log1p(torch.exp(bad - good)).mean()
        lr = whole.rate(step - 1, STEPS, 3, 5e-3)  # 30 % of 9 steps, rounded up
        norms.append(whole.plain_step(optimizer, model, loss, lr, 0.5))
        weights[step] = whole.weights_of(model)
        if step in LOGGED:
            metrics.append({
                "step": step, "train/loss": loss.detach(), "train/accuracy": (good > bad).float().mean(),
                "train/lr": lr, "train/chosen_rewards": good.mean().detach(),
                "train/rejected_rewards": bad.mean().detach(),
                "train/grad_norm": norms[-1], "train/epoch": step / 3})
        if step in EVALUATIONS:
            evaluate(step)
    demonstrations = [encode(tokenizer, row["prompt"], row["completion"])
                      for row in rows_of(folder / "demonstrations.jsonl")]
    with torch.no_grad():
        scores = [float(score(model, ids)) for ids in demonstrations if len(ids) <= LONGEST]
    return SimpleNamespace(metrics=metrics, samples=samples, weights=weights, norms=norms, scores=scores,
                           calibrations=calibrations, held_out=held_out, train=train)


# ---- The comparison ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, pairs of all kinds, comparisons of posts and of news, other demonstrations."""
    folder = tmp_path_factory.mktemp("reward_model")
    whole.save_policy(folder / "model")
    rows = whole.embedded_rows("preferences_train", 0, 23)
    rows[9]["rejected"] = rows[9]["chosen"]
    rows[4]["rejected"] = " " + rows[4]["chosen"].strip() + " Indeed!"  # both begin alike
    long = {**rows[0], "rejected": " I am sure" * 40}
    whole.write_rows(folder / "train.jsonl", rows[:12] + [long] + rows[12:])
    rows = [{**row, "batch": "a", "confidence": i % 3, "policies": "sup--ref" if i % 4 else "ppo--ref"}
            for i, row in enumerate(whole.embedded_rows("preferences_validation", 0, 14))]
    for i, row in enumerate(rows):
        row["prompt"] = rows[i % 5]["prompt"]
    whole.write_rows(folder / "validation.jsonl", rows + [{**rows[0], "chosen": " I am sure" * 40}])
    comparisons = []
    for i, row in enumerate(whole.embedded_rows("preferences_persuasion", 0, 13)):
        post = {"subreddit": "a", "title": "b", "post": "\n".join(POST[: 1 + i % 3]), "article": None}
        news = {"article": POST[i % 2], "site": "c"}
        texts = [{"text": " " + row[side].strip(), "policy": policy} for side, policy in (
            ("rejected", "ref"), ("chosen", "ppo" if i % 2 else "sup"))][:: 1 if i % 3 else -1]
        comparisons.append({
            "info": news if i % 3 == 1 else post, "summaries": texts, "choice": 1 if i % 3 else 0,
            "batch": ("cnndm0" if i % 2 else "batch0_cnndm") if i % 3 == 1 else "batch7", "split": "valid1",
            "extra": {"confidence": i % 4}})
    whole.write_rows(folder / "comparisons.jsonl", comparisons)
    rows = whole.embedded_rows("train", 0, 11) + [{"prompt": "I am", "completion": " I am sure" * 40}]
    whole.write_rows(folder / "demonstrations.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return plain_run(folder)


@pytest.fixture(scope="module", params=CASES)
def run(request, folder):
    """A run of reward_model.py; what it asked of the process group and of checkpointing."""
    flags = {**FLAGS, **CASES[request.param]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recomputed, minutes = whole.count_recomputed(patch), whole.count_minutes(patch, reward_model)
        reward_model.main(reward_model.Args(
            model=str(folder / "model"), train_data=str(folder / "train.jsonl"),
            eval_data=(str(folder / "validation.jsonl"), str(folder / "comparisons.jsonl")),
            demonstrations=str(folder / "demonstrations.jsonl"), output_dir=str(folder / request.param),
            **flags))
    return SimpleNamespace(folder=folder / request.param, flags=flags, recomputed=recomputed, minutes=minutes)


def test_every_flag_differs_from_its_default():
    """In one case at least."""
    fields = {field.name: field.default for field in dataclasses.fields(reward_model.Args)}
    used = [{**FLAGS, **case} for case in CASES.values()]
    assert set(fields) == set(used[0]) | ELSEWHERE
    for name in set(fields) - ELSEWHERE:
        assert any(flags[name] != fields[name] for flags in used), name


def test_the_run_is_a_fair_one(plain):
    """Clipping at work, rows dropped, posts cut, prompts that repeat, demonstrations that score apart."""
    assert len(plain.train) == 22 and {name: len(pairs) for name, pairs in plain.held_out.items()} == {
        "validation": 14, "comparisons": 9, "comparisons_cnndm": 4}
    posts = {pair["prompt"] for pair in plain.held_out["comparisons"]}
    assert len(posts) == 2 and not any(POST[2] in post for post in posts)  # a third paragraph does not fit
    assert min(plain.norms) > 0.5 and len(plain.scores) == 11
    last = plain.metrics[-1]
    assert abs(np.mean(plain.scores)) > 0.05
    assert abs(np.mean(plain.scores) - last["eval/validation/chosen_rewards"]) > 0.02
    for name in ("validation", "comparisons"):
        figures = {key: last[f"eval/{name}/{key}"] for key in ("accuracy", "longer_wins", "shuffled_prompts")}
        assert len(set(figures.values())) > 1 and 0 < figures["accuracy"] < 1
    assert max(map(len, plain.calibrations.values())) >= 3, plain.calibrations
    assert len({float(row["train/accuracy"]) for row in plain.metrics if "train/lr" in row}) > 1


def test_metrics_equal_those_of_the_plain_loop(plain, run):
    """Every figure of every line of metrics.jsonl; times.jsonl has a speed for each line of training."""
    whole.assert_rows_equal(rows_of(run.folder / "metrics.jsonl"), plain.metrics)
    whole.assert_speeds(run.folder / "times.jsonl", LOGGED)


def test_samples_equal_those_of_the_plain_loop(plain, run):
    whole.assert_rows_equal(rows_of(run.folder / "samples.jsonl"), plain.samples)


def test_weights_equal_those_of_the_plain_loop(plain, run):
    """The model at the end with the constant of the demonstrations, and both checkpoints, the last before it."""
    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    whole.assert_weights_equal(model.state_dict(), plain.weights[9], plain.weights[0])
    assert model.config.reward_mean == pytest.approx(np.mean(plain.scores), abs=1e-4)
    whole.assert_tokenizer_saved(run.folder)
    whole.assert_checkpoints(run.folder, plain.weights, plain.metrics[0], "classifier.", steps=(6, 9))


def test_summary_and_card_say_what_the_run_did(plain, run):
    summary = json.loads((run.folder / "summary.json").read_text())
    whole.assert_summary_equals(summary, plain.metrics[0], plain.metrics[-1])
    assert summary["reward_mean"] == pytest.approx(np.mean(plain.scores), abs=1e-4)
    assert summary["reward_std"] == pytest.approx(np.std(plain.scores), abs=1e-4)
    assert set(summary["calibration"]) == set(plain.calibrations)
    for name, table in plain.calibrations.items():
        found = summary["calibration"][name]
        whole.assert_rows_equal([{"step": 9, **row} for row in found], [{"step": 9, **row} for row in table])
    card = whole.assert_card_and_record(run.folder, "reward_model.py", run.flags)
    demonstrations = run.folder.parent / "demonstrations.jsonl"
    assert f"averages {summary['reward_mean']:.6f} over `{demonstrations}`" in card


def test_checkpointing_and_timeout_are_passed_on(run):
    """Each layer of each micro-batch is computed again in the backward pass, after the evaluations too."""
    assert len(run.recomputed) == 2 * 3 * (3 + 3 + 2)  # layers, epochs, micro-batches of 8, 8 and 6 pairs
    assert run.minutes == [3.0]
