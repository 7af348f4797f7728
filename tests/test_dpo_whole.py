"""Whole runs of dpo.py with no flag at its default, against a plain loop that knows nothing of dpo.py.

The loop below is written from the papers: one response at a time, no padding, no micro-batches, no cache of
the reference, no engine, torch's own AdamW. It shares with dpo.py only the addresses of its randomness. What
a run leaves behind is compared: metrics.jsonl, samples.jsonl, summary.json, the policy, checkpoints, the
reference's cache.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import whole
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole import rows_of

import dpo

PROMPTS, SAMPLES = 22, 20  # held-out prompts that are continued, of which the summary shows some
FLAGS = dict(
    max_prompt_length=5, max_length=26, beta=0.4, nll_coef=0.3, epochs=3, batch_size=8, micro_batch_size=3,
    lr=5e-3, warmup_ratio=0.3, weight_decay=0.3, adam_eps=1e-2, max_grad_norm=0.5, eval_every=4,
    num_eval_prompts=PROMPTS, response_length=5, temperature=0.4, seed=7, save_every=3, log_every=2,
    gradient_checkpointing=True, timeout_minutes=3.0, gold_function=f"{__name__}:gold")
CASES = {
    "sigmoid": dict(loss="sigmoid", label_smoothing=0.1, lr_schedule="constant", ref_cache=None),
    "hinge": dict(loss="hinge", label_smoothing=0.0, lr_schedule="cosine", ref_cache="CACHE"),
    "ipo": dict(loss="ipo", label_smoothing=0.0, lr_schedule="cosine", ref_cache="CACHE", share_prefix=True)}
ELSEWHERE = {  # flags that have a run of their own, or cannot differ here
    "allow_pickle", "columns", "resume", "overwrite", "zero_stage", "offload_optimizer", "bf16", "local_rank", "model",
    "ref_model", "train_data", "eval_data", "eval_prompts", "output_dir"}
STEPS, EVALUATIONS, LOGGED = 9, [0, 4, 8, 9], [2, 4, 6, 8, 9]  # 22 pairs: 8, 8, 6; three times


def gold(queries, responses):
    """A judge that tells queries from responses."""
    return [len(query) + 100.0 * response.count("e") for query, response in zip(queries, responses)]


# ---- The plain loop ---------------------------------------------------------------------------------------


def read_pairs(file, tokenizer):
    """(prompt, chosen, rejected, text of the prompt) of the usable pairs: ids, one terminator a text."""
    pairs = []
    for row in rows_of(file):
        prompt, texts = tokenizer(row["prompt"]).input_ids, []
        for side in ("chosen", "rejected"):
            ids, ends = tokenizer(row[side]).input_ids, []
            while ids and ids[-1] in whole.ENDS:
                ends.append(ids.pop())
            texts.append(ids + (ends or [0])[-1:] * row.get(f"{side}_finished", True))
        if row["chosen"] != row["rejected"] and all(texts) and len(prompt) + max(map(len, texts)) <= 26:
            pairs.append((prompt, *texts, row["prompt"]))
    return pairs


def logprobs_of(model, pairs):
    """log pi of the chosen and the rejected response of each pair, sums over tokens, (2, pairs)."""
    of = lambda prompt, response: whole.token_logprobs(model, prompt + response)[len(prompt) - 1 :].sum()
    return torch.stack([torch.stack([of(pair[0], pair[side]) for pair in pairs]) for side in (1, 2)])


def losses_of(case, logprobs, ref_logprobs):
    u, v = logprobs - ref_logprobs
    h = u - v
    if case == "sigmoid":
        return 0.9 * torch.log1p(torch.exp(-0.4 * h)) + 0.1 * torch.log1p(torch.exp(0.4 * h))
    return (1 - 0.4 * h).clamp(min=0) if case == "hinge" else (h - 1.25) ** 2


def figures_of(logprobs, ref_logprobs):
    """What is logged of training and held-out pairs alike."""
    chosen, rejected = 0.4 * (logprobs - ref_logprobs)
    return {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "logps/chosen": logprobs[0].mean(), "logps/rejected": logprobs[1].mean()}


def plain_run(folder, case):
    """Rows of metrics and samples, and the weights after each step, as the papers describe."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    policy = AutoModelForCausalLM.from_pretrained(folder / "model")
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference")
    train = read_pairs(folder / "train.jsonl", tokenizer)
    held_out = {name: read_pairs(folder / f"{name}.jsonl", tokenizer) for name in ("validation", "others")}
    texts = [row["prompt"] for row in rows_of(folder / "prompts.jsonl")]
    prompts = [(tokenizer(text).input_ids, text) for text in texts]
    prompts = [prompt for prompt in prompts if len(prompt[0]) <= 5][:PROMPTS]
    with torch.no_grad():
        fixed = {name: logprobs_of(reference, pairs) for name, pairs in {**held_out, "train": train}.items()}
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.999), eps=1e-2, weight_decay=0.3)
    metrics, samples, weights, norms = [], [], {0: whole.weights_of(policy)}, []

    @torch.no_grad()
    def evaluate(step):
        row = {"step": step}
        for name, pairs in held_out.items():
            logprobs = logprobs_of(policy, pairs)
            figures = figures_of(logprobs, fixed[name])
            right = (logprobs - fixed[name])[0] > (logprobs - fixed[name])[1]
            low, high = whole.interval(right.float().tolist(), [pair[3] for pair in pairs])
            figures |= {"loss": losses_of(case, logprobs, fixed[name]).mean(), "rewards/accuracies_low": low,
                        "rewards/accuracies_high": high}
            row |= {f"eval/{name}/{key}": value for key, value in figures.items()}
        responses = whole.sample(policy, [ids for ids, _ in prompts], 7, 0.4, 5, 12)
        rows, starts = [], set()
        for (ids, text), response in zip(prompts, responses):
            said = tokenizer.decode(ids + response, skip_special_tokens=True)[len(text):]
            starts.add(tuple(response[:4]))
            rows.append({"step": step, "query": text, "response": said, "length": len(response),
                         "ended": response[-1] in whole.ENDS, "gold": gold([text], [said])[0]})
        row |= {f"eval/{key}": np.mean([row[key] for row in rows]) for key in ("gold", "length", "ended")}
        row["eval/distinct_starts"] = len(starts) / PROMPTS
        metrics.append(row), samples.extend(rows)

    evaluate(0)
    for step, batch in enumerate(whole.batches(len(train), 8, 7, 3), 1):
        pairs = [train[i] for i in batch]
        logprobs = logprobs_of(policy, pairs)
        nll = -logprobs[0].sum() / sum(len(pair[1]) for pair in pairs)
        loss = losses_of(case, logprobs, fixed["train"][:, batch]).mean() + 0.3 * nll
        lr = whole.rate(step - 1, STEPS, 3, 5e-3, CASES[case]["lr_schedule"])  # 30 % of 9 steps, rounded up
        norms.append(whole.plain_step(optimizer, policy, loss, lr, 0.5))
        weights[step] = whole.weights_of(policy)
        if step in LOGGED:
            metrics.append({
                "step": step, "train/loss": loss.detach(), "train/nll": nll.detach(), "train/lr": lr,
                "train/grad_norm": norms[-1], "train/epoch": step / 3,
                **figures_of(logprobs.detach(), fixed["train"][:, batch])})
        if step in EVALUATIONS:
            evaluate(step)
    return SimpleNamespace(metrics=metrics, samples=samples, weights=weights, norms=norms, fixed=fixed)


# ---- The comparison ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Policy and reference that differ, pairs of all kinds, prompts short and long."""
    folder = tmp_path_factory.mktemp("dpo")
    whole.save_policy(folder / "model")
    whole.save_policy(folder / "reference", noise=0.01)
    rows = whole.embedded_rows("preferences_train", 0, 24)
    rows[3]["chosen_finished"], rows[5]["rejected_finished"], rows[5]["chosen_finished"] = False, False, True
    rows[7]["rejected"] += " What!!"
    rows[9]["rejected"] = rows[9]["chosen"]
    rows[11].update(chosen="", chosen_finished=False)
    whole.write_rows(folder / "train.jsonl", rows + whole.embedded_rows("preferences_train", 60, 63))
    rows = whole.embedded_rows("preferences_validation", 0, 13)
    for i, row in enumerate(rows):
        row["prompt"] = rows[i % 5]["prompt"]
    whole.write_rows(folder / "validation.jsonl", rows)
    rows = whole.embedded_rows("preferences_persuasion", 0, 8)
    rows[6]["prompt"] = rows[7]["prompt"] = rows[0]["prompt"]
    rows[2]["rejected_finished"] = False
    whole.write_rows(folder / "others.jsonl", rows)
    whole.write_rows(folder / "prompts.jsonl", [
        {"prompt": row["prompt"]} for row in whole.embedded_rows("validation", 0, 40)])
    return folder


@pytest.fixture(scope="module", params=CASES)
def both(request, folder):
    """The plain loop, and dpo.py; what it asked of the process group and of checkpointing."""
    case, run = request.param, folder / request.param
    flags = {**FLAGS, **CASES[case]}
    flags["ref_cache"] = flags["ref_cache"] and str(folder / f"cache_{case}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recomputed, minutes = whole.count_recomputed(patch), whole.count_minutes(patch, dpo)
        dpo.main(dpo.Args(
            model=str(folder / "model"), ref_model=str(folder / "reference"),
            train_data=str(folder / "train.jsonl"),
            eval_data=(str(folder / "validation.jsonl"), str(folder / "others.jsonl")),
            eval_prompts=str(folder / "prompts.jsonl"), output_dir=str(run), **flags))
    return SimpleNamespace(case=case, plain=plain_run(folder, case), run=run, flags=flags,
                           recomputed=recomputed, minutes=minutes)


def test_every_flag_differs_from_its_default():
    """In one case at least."""
    fields = {field.name: field.default for field in dataclasses.fields(dpo.Args)}
    used = [{**FLAGS, **case} for case in CASES.values()]
    assert set(fields) == set().union(*used) | ELSEWHERE
    for name in set(fields) - ELSEWHERE:
        assert any(flags.get(name, fields[name]) != fields[name] for flags in used), name


def test_the_run_is_a_fair_one(both):
    """Clipping at work, rows dropped, prompts that repeat, responses that end early, and that begin alike."""
    plain = both.plain
    assert {name: len(logprobs[0]) for name, logprobs in plain.fixed.items()} == {
        "train": 22, "validation": 11, "others": 6}
    assert min(plain.norms) > 0.5
    assert len({row["length"] for row in plain.samples}) >= 4
    last = plain.metrics[-1]
    assert 0 < last["eval/ended"] < 1 and 0.1 < last["eval/distinct_starts"] < 1
    assert 0 < plain.metrics[0]["eval/validation/rewards/accuracies"] < 1
    assert last["eval/validation/rewards/chosen"] > plain.metrics[0]["eval/validation/rewards/chosen"] + 0.1
    assert len({float(row["rewards/accuracies"]) for row in plain.metrics if "train/lr" in row}) > 1


def test_metrics_equal_those_of_the_plain_loop(both):
    """Every figure of every line of metrics.jsonl; times.jsonl has a speed for each line of training."""
    whole.assert_rows_equal(rows_of(both.run / "metrics.jsonl"), both.plain.metrics)
    whole.assert_speeds(both.run / "times.jsonl", LOGGED)


def test_samples_equal_those_of_the_plain_loop(both):
    whole.assert_rows_equal(rows_of(both.run / "samples.jsonl"), both.plain.samples)


def test_weights_equal_those_of_the_plain_loop(both):
    """The policy at the end and in both checkpoints; a checkpoint has what a resumed run needs besides."""
    plain, run = both.plain, both.run
    policy = AutoModelForCausalLM.from_pretrained(run)
    whole.assert_weights_equal(policy.state_dict(), plain.weights[9], plain.weights[0])
    whole.assert_only_ids_in(policy.generation_config)
    whole.assert_tokenizer_saved(run)
    for state in whole.assert_checkpoints(run, plain.weights, plain.metrics[0]):
        assert state["samples_before"] == [row["response"] for row in plain.samples[:SAMPLES]]


def test_reference_cache_has_the_references_logprobs(both):
    """One file for each set of pairs. Without the flag the reference works beside the policy."""
    if both.case == "sigmoid":
        assert both.flags["ref_cache"] is None
        return
    files = (both.run.parent / f"cache_{both.case}").iterdir()
    found = sorted((np.load(file)["array"] for file in files), key=np.size)
    expected = sorted((value.numpy() for value in both.plain.fixed.values()), key=np.size)
    assert len(found) == 3
    for array, wanted in zip(found, expected):
        assert np.abs(array - wanted).max() < 1e-4


def test_summary_and_card_say_what_the_run_did(both):
    plain, run = both.plain, both.run
    summary = json.loads((run / "summary.json").read_text())
    evaluations = [row for row in plain.metrics if "eval/gold" in row]
    whole.assert_summary_equals(summary, evaluations[0], evaluations[-1])
    first, last = plain.samples[:SAMPLES], plain.samples[-PROMPTS:]
    assert summary["samples"] == [{"query": a["query"], "before": a["response"], "after": b["response"]}
                                  for a, b in zip(first, last)]
    card = whole.assert_card_and_record(run, "dpo.py", both.flags)
    for name in ("validation", "others"):
        assert f"on {name}: {float(evaluations[-1][f'eval/{name}/rewards/accuracies']):.3f}" in card


def test_checkpointing_and_timeout_are_passed_on(both):
    """Each layer of each micro-batch is computed again in the backward pass, after the evaluations too."""
    assert len(both.recomputed) == 2 * 3 * (3 + 3 + 2)  # layers, epochs, micro-batches of 8, 8, 6 pairs
    assert both.minutes == [3.0]
