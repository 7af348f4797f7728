"""Whole runs of sft.py with no flag at its default, against a plain loop that knows nothing of sft.py.

The loop below is written from the paper: one row at a time, no padding, no packs, no micro-batches, no
engine, torch's own AdamW. It shares with sft.py only the addresses of its randomness. What a run leaves
behind is compared: metrics.jsonl, samples.jsonl, summary.json, the model, checkpoints.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import whole
from conftest import ROOT
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole import rows_of

import sft

LONGEST, LONGEST_POST, PACK = 84, 60, 90  # tokens of a row, of a TL;DR prompt, of a pack
FLAGS = dict(
    max_length=LONGEST, max_prompt_length=LONGEST_POST, epochs=3, batch_size=5, micro_batch_size=2, lr=5e-3,
    warmup_ratio=0.3, weight_decay=0.3, adam_eps=1e-2, max_grad_norm=0.5, eval_every=4, num_samples=11,
    response_length=6, temperature=0.4, seed=7, save_every=3, log_every=2,
    gradient_checkpointing=True, timeout_minutes=3.0)
CASES = {  # rows by column: {prompt, completion} twice, {text} once
    "rows": dict(pack_length=0, completion_only=False),
    "texts": dict(pack_length=PACK, completion_only=False),
    "packs": dict(pack_length=PACK, completion_only=True)}
ELSEWHERE = {  # flags that have a run of their own, or cannot differ here
    "allow_pickle", "columns", "resume", "overwrite", "zero_stage", "offload_optimizer", "bf16", "local_rank", "model",
    "train_data", "eval_data", "output_dir"}
STEPS, EVALUATIONS, LOGGED = 9, [0, 4, 8, 9], [2, 4, 6, 8, 9]  # 13 sequences: 5, 5, 3; three times
POST = ["I was at home.", "She came to see me.", "We were happy, and then she went away."]


# ---- The plain loop ---------------------------------------------------------------------------------------


def read_rows(file, tokenizer):
    """(ids, prompt length, prompt to continue, reference) of the rows that can be used."""
    found = []
    for row in rows_of(file):
        if "post" in row:
            paragraphs = row["post"].split("\n")
            tldr = lambda n: (f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\n"
                              "POST: " + "\n".join(paragraphs[:n]) + "\n\nTL;DR:")
            fits = [tldr(n) for n in range(1, 4) if len(tokenizer(tldr(n)).input_ids) <= LONGEST_POST]
            row = {"prompt": fits[-1], "completion": row["summary"]}
        prompt = tokenizer(row.get("prompt", "")).input_ids
        ids = prompt + tokenizer(row.get("completion", row.get("text"))).input_ids + [0]
        if len(prompt) + 1 < len(ids) <= LONGEST:
            text = row["prompt"] if "prompt" in row else tokenizer.decode(tokenizer(row["text"]).input_ids[:4])
            found.append((ids, len(prompt), text, row.get("completion", "")))
    return found


def packs_of(rows):
    """Best fit, longest row first: the fullest pack with room, of equals the one that was filled last."""
    packs, filled = [], []  # filled: number of the pack at each row
    for row in sorted(rows, key=lambda row: -len(row[0])):
        used = [sum(len(other[0]) for other in pack) for pack in packs]
        room = [i for i in range(len(packs)) if used[i] + len(row[0]) <= PACK]
        room = [i for i in room if used[i] == max(used[j] for j in room)]
        filled.append(next((i for i in reversed(filled) if i in room), len(packs)))
        if not room:
            packs.append([])
        packs[filled[-1]].append(row)
    return packs


def losses_of(model, row, completion_only):
    """-log p of the tokens of a row that count."""
    ids, prompt_length, *_ = row
    return -whole.token_logprobs(model, ids)[max(1, prompt_length) - 1 if completion_only else 0 :]


def plain_run(folder, case):
    """Rows of metrics and samples, and the weights after each step, as the paper describes."""
    tokenizer = AutoTokenizer.from_pretrained(folder / case / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / case / "model", dtype=torch.float32)
    flags = CASES[case]
    train = read_rows(folder / case / "train.jsonl", tokenizer)
    held_out = read_rows(folder / case / "validation.jsonl", tokenizer)
    train = packs_of(train) if flags["pack_length"] else [[row] for row in train]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-2, weight_decay=0.3)
    metrics, samples, weights, norms = [], [], {0: whole.weights_of(model)}, []
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])

    @torch.no_grad()
    def evaluate(step):
        loss = torch.cat([losses_of(model, row, flags["completion_only"]) for row in held_out]).mean()
        metrics.append({"step": step, "eval/loss": loss, "eval/perplexity": loss.exp()})
        prompts = [(tokenizer(text).input_ids, text, reference) for _, _, text, reference in held_out[:11]]
        responses = whole.sample(model, [ids for ids, *_ in prompts], 7, 0.4, 6, 2)
        rows = [{"step": step, "query": text, "reference": reference,
                 "response": tokenizer.decode(ids + response, skip_special_tokens=True)[len(text):]}
                for (ids, text, reference), response in zip(prompts, responses)]
        if case != "texts":
            scores = [scorer.score(row["reference"], row["response"]) for row in rows]
            for name in ("rouge1", "rouge2", "rougeL"):
                metrics[-1][f"eval/{name}"] = sum(score[name].fmeasure for score in scores) / 11
        samples.extend(rows)

    evaluate(0)
    for step, batch in enumerate(whole.batches(len(train), 5, 7, 3), 1):
        rows = [row for i in batch for row in train[i]]
        loss = torch.cat([losses_of(model, row, flags["completion_only"]) for row in rows]).mean()
        lr = whole.rate(step - 1, STEPS, 3, 5e-3)  # 30 % of 9 steps, rounded up
        norms.append(whole.plain_step(optimizer, model, loss, lr, 0.5))
        weights[step] = whole.weights_of(model)
        if step in LOGGED:
            metrics.append({"step": step, "train/loss": loss.detach(), "train/lr": lr,
                            "train/grad_norm": norms[-1], "train/epoch": step / 3})
        if step in EVALUATIONS:
            evaluate(step)
    return SimpleNamespace(metrics=metrics, samples=samples, weights=weights, norms=norms, train=train,
                           held_out=held_out)


# ---- The comparison ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each case: a model whose folder has sampling settings of its own, rows of all kinds."""
    folder = tmp_path_factory.mktemp("sft")
    long = {"prompt": "I am", "completion": " I am sure" * 40}
    posts = [{"subreddit": "a", "title": "b", "post": "\n".join(POST[:n]), "summary": " I am happy."}
             for n in (1, 2, 3)]
    rows, held_out = whole.embedded_rows("train", 0, 55), whole.embedded_rows("validation", 0, 14)
    for row in held_out:
        row["completion"] += " differing pleasantly, so much not to be I and you"
    held_out += [posts[2], long]
    texts = lambda rows: [{"text": row["prompt"] + row["completion"]} for row in rows if "prompt" in row]
    for case, train, validation in (
            ("packs", rows[:48] + posts + [{"prompt": "I am", "completion": ""}, long], held_out),
            ("rows", rows[:11] + posts[1:] + [long], held_out),
            ("texts", texts(rows + [long]), texts(held_out))):
        whole.save_policy(folder / case / "model", pretrained=case == "packs")
        whole.write_rows(folder / case / "train.jsonl", train)
        whole.write_rows(folder / case / "validation.jsonl", validation)
    return folder


@pytest.fixture(scope="module", params=CASES)
def both(request, folder):
    """The plain loop, and sft.py; what it asked of the process group and of checkpointing."""
    case, run = request.param, folder / request.param / "run"
    flags = {**FLAGS, **CASES[case]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recomputed, minutes = whole.count_recomputed(patch), whole.count_minutes(patch, sft)
        sft.main(sft.Args(
            model=str(folder / case / "model"), train_data=str(folder / case / "train.jsonl"),
            eval_data=str(folder / case / "validation.jsonl"), output_dir=str(run), **flags))
    return SimpleNamespace(case=case, plain=plain_run(folder, case), run=run, flags=flags,
                           recomputed=recomputed, minutes=minutes)


def test_every_flag_differs_from_its_default():
    """In one case at least."""
    fields = {field.name: field.default for field in dataclasses.fields(sft.Args)}
    used = [{**FLAGS, **case} for case in CASES.values()]
    assert set(fields) == set(used[0]) | ELSEWHERE
    for name in set(fields) - ELSEWHERE:
        assert any(flags[name] != fields[name] for flags in used), name


def test_the_run_is_a_fair_one(both):
    """Clipping at work, rows dropped, posts cut, packs of several rows, ROUGE above 0."""
    plain, case = both.plain, both.case
    rows = sum(plain.train, [])
    assert (len(plain.train), len(rows), len(plain.held_out)) == {
        "packs": (13, 51, 15), "rows": (13, 13, 15), "texts": (13, 55, 14)}[case]
    assert min(plain.norms) > 0.5 and len({len(row["response"]) for row in plain.samples}) > 4
    if case == "packs":
        evaluations = [row for row in plain.metrics if "eval/loss" in row]
        assert all(row["eval/rouge2"] > 0.01 for row in evaluations)
        assert len({row["eval/rouge1"] for row in evaluations}) > 1
        assert any(row["eval/rouge1"] > row["eval/rougeL"] for row in evaluations)


def test_metrics_equal_those_of_the_plain_loop(both):
    """Every figure of every line of metrics.jsonl; times.jsonl has a speed for each line of training."""
    whole.assert_rows_equal(rows_of(both.run / "metrics.jsonl"), both.plain.metrics)
    whole.assert_speeds(both.run / "times.jsonl", LOGGED)


def test_samples_equal_those_of_the_plain_loop(both):
    whole.assert_rows_equal(rows_of(both.run / "samples.jsonl"), both.plain.samples)


def test_weights_equal_those_of_the_plain_loop(both):
    """The model at the end, without the sampling settings of its first folder; both checkpoints."""
    plain, run = both.plain, both.run
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    whole.assert_weights_equal(model.state_dict(), plain.weights[9], plain.weights[0])
    whole.assert_only_ids_in(model.generation_config)
    whole.assert_tokenizer_saved(run)
    whole.assert_checkpoints(run, plain.weights, plain.metrics[0])


def test_summary_and_card_say_what_the_run_did(both):
    plain, run = both.plain, both.run
    summary = json.loads((run / "summary.json").read_text())
    whole.assert_summary_equals(summary, plain.metrics[0], plain.metrics[-1])
    card = whole.assert_card_and_record(run, "sft.py", both.flags)
    assert f"Held-out loss {summary['after']['eval/loss']:.4f}." in card


def test_checkpointing_and_timeout_are_passed_on(both):
    """Each layer of each micro-batch is computed again in the backward pass, after the evaluations too."""
    layers = 4 if both.case == "packs" else 2
    assert len(both.recomputed) == layers * 3 * (3 + 3 + 2)  # epochs, micro-batches of 5, 5, 3 sequences
    assert both.minutes == [3.0]
