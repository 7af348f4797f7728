"""Inputs that were not given: with a user's own data nothing of the embedded task is used in silence; and default rates
stay with small models."""

import hashlib
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, tiny_config
from test_bad_input import refused  # noqa: F401  a fixture
from transformers import AutoTokenizer, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

import dpo
import evaluate
import group_invariant_ppo
import ppo
import reward_model
import sft
import utils.data
import utils.models
from utils.companions import hold_out, settle_companions
from utils.launch import given

PROMPTS = [f"word {n}" for n in range(20)]
ROWS = [{"prompt": prompt, "completion": f" good{n}.", "chosen": f" good{n}.", "rejected": f" no{n} no."}
        for prompt in PROMPTS for n in range(2)]
BY_HASH = sorted(PROMPTS, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
TRAINERS = [sft, reward_model, dpo, ppo, group_invariant_ppo]
SCRIPTS = [*TRAINERS, evaluate]


def named(script):
    return script.__name__


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a user's data, rows.jsonl, and models lm/ and rm/ of the embedded vocabulary, and foreign/."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/base")
    torch.manual_seed(0)
    config = tiny_config(vocab_size=1024, pad_token_id=tokenizer.pad_token_id, num_labels=1)
    GPTNeoXForCausalLM(config).save_pretrained(folder / "lm")
    GPTNeoXForSequenceClassification(config).save_pretrained(folder / "rm")
    for name in ("lm", "rm"):
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "lm", folder / "foreign")
    tokenizer.add_tokens(["Grüße"])
    tokenizer.save_pretrained(folder / "foreign")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def flags_of(script, own, out, **changes):
    """Args with a user's model and data, a short run, and no companion."""
    rows, lm = str(own / "rows.jsonl"), str(own / "lm")
    short = {
        sft: dict(model=lm, train_data=rows, epochs=1, batch_size=8, num_samples=2, response_length=2),
        reward_model: dict(model=lm, train_data=rows, batch_size=8),
        dpo: dict(model=lm, train_data=rows, epochs=1, batch_size=8, response_length=2, ref_cache=None),
        evaluate: dict(models=(lm,), prompts=rows, response_length=2, cache=str(own / "cache")),
    }
    rollouts = dict(sft_model=lm, reward_model=str(own / "rm"), prompts=rows, batch_size=4, total_episodes=4,
                    response_length=2)
    return script.Args(**{**short.get(script, rollouts), "output_dir": str(out), **changes})


@pytest.fixture
def read(monkeypatch):
    """The paths of data, and the names of functions, that a run asks for."""
    seen, load_rows = [], utils.data.load_rows
    for script in (sft, reward_model, dpo, utils.data):
        monkeypatch.setattr(script, "load_rows", lambda path, *args: seen.append(path) or load_rows(path, *args))
    load = utils.data.load_function
    for script in (dpo, ppo, group_invariant_ppo):
        monkeypatch.setattr(script, "load_function", lambda spec, *args: seen.append(spec) or load(spec, *args))
    return seen


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- What was given ---------------------------------------------------------------------------------------


def test_a_flag_is_given_by_its_value_or_by_standing_on_the_command_line(monkeypatch):
    """Both spellings count, with = and without, also as the deepspeed launcher hands them on."""
    monkeypatch.setattr(sys, "argv", ["sft.py", "--local_rank=0"])
    assert not given(sft.Args(), "eval_data") and given(sft.Args(eval_data="x"), "eval_data")
    assert given(sft.Args(eval_data=None), "eval_data")
    for words in (["--eval_data", sft.Args.eval_data], ["--eval-data", "x"], ["--eval_data=x"], ["--eval-data=x"]):
        monkeypatch.setattr(sys, "argv", ["sft.py", "--local_rank=0", *words])
        assert given(sft.Args(), "eval_data")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--eval_data_of_others=x", "eval_data"])
    assert not given(sft.Args(), "eval_data")


def test_a_companion_on_the_command_line_stays(own, tmp_path, monkeypatch, capsys):
    """--gold_function with its default value is a wish: it is kept beside own prompts, and nothing is said of it."""
    args = flags_of(ppo, own, tmp_path / "run")
    flags = dict(eval_prompts=None, gold_function="no judge watches")
    settled = settle_companions(args, "prompts", ["sft_model", "reward_model"], **flags)
    assert settled.gold_function is None and settled.eval_prompts is None
    assert capsys.readouterr().out == "--gold_function       none given: no judge watches\n"
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--gold-function", "assets.vader:positive"])
    assert settle_companions(args, "prompts", ["sft_model"], **flags).gold_function == "assets.vader:positive"
    assert capsys.readouterr().out == ""


def test_the_embedded_task_keeps_everything_and_says_nothing(capsys):
    """Other files under assets/ belong to it."""
    for args in (ppo.Args(), ppo.Args(prompts="assets/data/persuasion.jsonl", sft_model="./assets/base")):
        assert settle_companions(args, "prompts", ["sft_model", "reward_model"], eval_prompts=None) == args
    assert capsys.readouterr().out == ""


# ---- The share that is held out ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows, share", [(2, 1), (10, 1), (29, 1), (30, 2), (200, 10), (10_000, 500), (40_000, 500)])
def test_the_share_is_five_percent_at_least_one_and_at_most_500(rows, share, capsys):
    train, held_out = hold_out(range(rows), [{"text": str(i)} for i in range(rows)], "--train_data", "--eval_data")
    assert len(held_out) == share and sorted(train + held_out) == list(range(rows))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert f"--eval_data           none given: {share:,} of the {rows:,} rows of --train_data" in (
        capsys.readouterr().out)


def test_whole_prompts_are_held_out_and_their_hash_alone_decides(monkeypatch):
    """Neither the order of the rows, nor the rank, nor the number of ranks changes them."""
    train, held_out = hold_out(ROWS, ROWS, "--train_data", "--eval_data")
    assert [row["prompt"] for row in held_out] == [BY_HASH[0]] * 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert hold_out(ROWS[::-1], ROWS[::-1], "--train_data", "--eval_data") == (train[::-1], held_out[::-1])


def test_a_prompt_with_more_rows_than_the_share_is_not_taken():
    """Where every prompt has more, the one with the fewest is held out."""
    rows = [{"prompt": BY_HASH[0]}] * 19 + [{"prompt": BY_HASH[1]}]
    assert hold_out(range(20), rows, "--prompts", "--eval_prompts") == (list(range(19)), [19])
    rows = [{"prompt": "a"}] * 5 + [{"prompt": "b"}] * 3 + [{"prompt": "c"}] * 4
    assert hold_out(range(12), rows, "--prompts", "--eval_prompts")[1] == [5, 6, 7]


def test_where_all_rows_have_one_prompt_the_completions_count():
    rows = [{"prompt": "", "completion": text} for text in "aabb"]
    train, held_out = hold_out(rows, rows, "--train_data", "--eval_data", or_completion=True)
    assert len(train) == len(held_out) == 2 and train[0] != held_out[0]


@pytest.mark.parametrize("script", TRAINERS, ids=named)
def test_a_single_row_is_refused_in_a_line_that_names_the_flag(script, own, tmp_path, refused):  # noqa: F811
    data, held = ("prompts", "eval_prompts") if hasattr(script.Args, "prompts") else ("train_data", "eval_data")
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    args = flags_of(script, own, tmp_path / "out", **{data: str(tmp_path / "one.jsonl")})
    assert refused(script, args) == (
        f"error: --{data}: 1 row(s) with one prompt, so none can be held out. Give --{held}")


# ---- Runs on a user's data --------------------------------------------------------------------------------


@pytest.mark.parametrize("script", TRAINERS, ids=named)
def test_own_data_leave_nothing_of_the_embedded_task(script, own, tmp_path, read, capsys):
    """Only the user's file is read, no judge is called, each companion has its line, and the record says the same."""
    script.main(flags_of(script, own, tmp_path / "run"))
    assert {path for path in read if path} == {str(own / "rows.jsonl")}
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "run/args.json").read_text())
    for flag in ("eval_data", "eval_prompts", "demonstrations", "gold_function"):
        if flag in record:
            assert record[flag] is None and len(re.findall(rf"^--{flag} +none given", printed, re.M)) == 1
    assert "assets" not in printed and not re.search("^note  .*embedded", printed, re.M)


def test_sft_trains_on_no_held_out_row(own, tmp_path, monkeypatch):
    batches, collate = [], sft.collate
    monkeypatch.setattr(sft, "collate", lambda packs, *rest: batches.append(packs) or collate(packs, *rest))
    sft.main(flags_of(sft, own, tmp_path / "run", eval_every=100))
    seen = [item[2]["prompt"] for packs in batches for items in packs for item in items or ()]
    assert seen.count(BY_HASH[0]) == 2 * 2 and len(seen) == 38 + 2 * 2  # in the evaluations alone
    assert {row["query"] for row in rows_of(tmp_path / "run/samples.jsonl")} == {BY_HASH[0]}


def test_reward_model_centres_on_the_chosen_answers_of_the_training_pairs(own, tmp_path, monkeypatch):
    """They average 0; held-out pairs are not among them; --accuracy_by finds the columns of the share."""
    scored, score = [], reward_model.score_sequences
    monkeypatch.setattr(reward_model, "score_sequences", lambda engine, sequences, *rest: scored.append(
        (sequences, score(engine, sequences, *rest))) or scored[-1][1])
    reward_model.main(flags_of(reward_model, own, tmp_path / "run", accuracy_by=("chosen",)))
    sequences, scores = scored[-1]
    tokenizer = AutoTokenizer.from_pretrained(own / "lm")
    assert sequences == [reward_model.encode(row["prompt"], row["chosen"], tokenizer) for row in ROWS
                         if row["prompt"] != BY_HASH[0]]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["reward_mean"] == pytest.approx(sum(scores) / 38, abs=1e-6)
    assert "eval/held_out/accuracy/chosen/ good1." in rows_of(tmp_path / "run/metrics.jsonl")[0]
    assert "over the chosen answers. That" in (tmp_path / "run/README.md").read_text()


def test_dpo_continues_the_prompts_of_the_held_out_pairs_each_once(own, tmp_path, capsys, monkeypatch):
    """Also where --eval_data is given; a prompt over --max_prompt_length is dropped and counted. No pair of theirs is
    trained on."""
    read, reference = {}, dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda model, pairs, name, *rest: read.update(
        {name: {pair.row["prompt"] for pair in pairs}}) or reference(model, pairs, name, *rest))
    dpo.main(flags_of(dpo, own, tmp_path / "run", ref_cache=str(tmp_path / "cache")))
    assert read == {"held_out": {BY_HASH[0]}, "training pairs": set(BY_HASH[1:])}
    samples, summary = rows_of(tmp_path / "run/samples.jsonl"), json.loads((tmp_path / "run/summary.json").read_text())
    assert [row["query"] for row in samples] == [BY_HASH[0]] * 2  # before and after
    assert "eval/held_out/loss" in summary["after"] and "eval/gold" not in summary["after"]
    rows = [*ROWS[:4], {**ROWS[4], "prompt": "a b c d e f"}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    dpo.main(flags_of(dpo, own, tmp_path / "run2", eval_data=(str(tmp_path / "held.jsonl"),), max_prompt_length=4))
    assert [row["query"] for row in rows_of(tmp_path / "run2/samples.jsonl")] == PROMPTS[:2] * 2
    assert "2 rows (dropped: 1 over 4 tokens)" in capsys.readouterr().out


@pytest.mark.parametrize("script", [ppo, group_invariant_ppo], ids=named)
def test_ppo_never_trains_on_a_held_out_prompt(script, own, tmp_path, monkeypatch):
    """The prompt of two rows is held out with both, and continued in each evaluation."""
    rolled, rollout = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda model, prompts, *rest: rolled.append(
        [text for _, text, *_ in prompts]) or rollout(model, prompts, *rest))
    script.main(flags_of(script, own, tmp_path / "run", total_episodes=40, batch_size=20))
    assert rolled[0] == rolled[-1] == [BY_HASH[0]] * 2
    training = rolled[1] + rolled[2]
    assert BY_HASH[0] not in training and set(training) == set(BY_HASH[1:]) and len(training) == 40


def test_a_resumed_run_holds_out_the_same_rows(own, tmp_path):
    """A killed run goes on with the same flags, and ends with the same bits."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = dict(save_every=2, batch_size=8, log_every=1)
    sft.main(flags_of(sft, own, whole, **flags))
    shutil.copytree(whole, killed)
    for name in ("summary.json", "model.safetensors", "config.json"):
        (killed / name).unlink()
    sft.main(flags_of(sft, own, killed, resume=True, **flags))
    for name in ("model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


# ---- A user's model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_model_of_another_vocabulary_needs_data_of_its_own(script, own, tmp_path, refused):  # noqa: F811
    """The embedded data are for a vocabulary of 1,000 tokens: one line names them, the model, and the flag to give."""
    model, data = next((model, data) for model, data in (
        ("sft_model", "prompts"), ("models", "prompts"), ("model", "train_data")) if hasattr(script.Args, model))
    value = (str(own / "foreign"),) if script is evaluate else str(own / "foreign")
    message = refused(script, script.Args(**{model: value, "output_dir": str(tmp_path / "out")}))
    assert message == (
        f"error: --{data}: not given, and the default, {getattr(script.Args, data)}, is the embedded task's, for a "
        f"vocabulary of 1,000 tokens, which is not that of --{model} {own / 'foreign'}. Give your own --{data}")


def test_the_embedded_data_can_be_asked_for(own, monkeypatch, capsys):
    """On the command line they stay, with their companions, for a model of any vocabulary."""
    monkeypatch.setattr(sys, "argv", ["sft.py", "--train_data=" + sft.Args.train_data])
    args = sft.Args(model=str(own / "foreign"))
    assert settle_companions(args, "train_data", ["model"], eval_data=None) == args
    assert capsys.readouterr().out == "note                  not given, so the embedded task's: --eval_data\n"


def test_a_model_that_sft_made_of_the_embedded_task_keeps_its_companions(own, capsys):
    """As in README.md: python ppo.py --sft_model runs/my_sft --reward_model runs/my_reward_model."""
    args = ppo.Args(sft_model=str(own / "lm"), reward_model=str(own / "rm"))
    flags = dict(eval_prompts=None, gold_function="no judge watches")
    assert settle_companions(args, "prompts", ["sft_model", "reward_model"], **flags) == args
    assert capsys.readouterr().out == ("note                  not given, so the embedded task's: --prompts, "
                                       "--eval_prompts, --gold_function\n")
    args = evaluate.Args(models=("assets/sft", str(own / "lm")))
    assert settle_companions(args, "prompts", ["models"], judges="none", ref_model="none") == args
    assert "embedded task's: --prompts, --judges, --ref_model\n" in capsys.readouterr().out


def test_the_embedded_models_with_own_data_are_named(own, capsys):
    """A reward model that --reward_function replaces is not."""
    rows = str(own / "rows.jsonl")
    for more, names in ((dict(), "--sft_model, --reward_model"), (dict(reward_function="a:b"), "--sft_model")):
        settle_companions(ppo.Args(prompts=rows, **more), "prompts", ["sft_model", "reward_model"], eval_prompts=None)
        assert capsys.readouterr().out.endswith(f"embedded task's: {names}\n")


# ---- evaluate.py ------------------------------------------------------------------------------------------


def test_evaluate_without_a_judge_has_lengths_kl_and_rouge(own, tmp_path, capsys):
    """With own prompts the embedded judges and reference are off, each in a line; a given reference makes a KL."""
    evaluate.main(flags_of(evaluate, own, tmp_path / "out"))
    printed, summary = capsys.readouterr().out, json.loads((tmp_path / "out/summary.json").read_text())
    assert "--judges              none given: no win rates" in printed and "judges none; writes" in printed
    assert "--ref_model           none given: no KL to a reference" in printed
    model = summary["models"]["lm"]
    assert model["length"] >= 1 and model["rouge1"] is not None and model["kl"] is None and model["scores"] == {}
    assert summary["comparisons"] == summary["agreement"] == summary["calibration"] == []
    assert (tmp_path / "out/report.html").is_file() and (tmp_path / "out/samples.jsonl").is_file()
    evaluate.main(flags_of(evaluate, own, tmp_path / "out2", ref_model=str(own / "lm"), judges=()))
    summary = json.loads((tmp_path / "out2/summary.json").read_text())
    assert summary["models"]["lm"]["kl"] == pytest.approx(0, abs=1e-4)


# ---- Learning rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters, words", [
    (10_000_000, "has 10M"), (134_515_008, "has 135M"), (6_857_302_016, "has 6,857M")])
@pytest.mark.parametrize("script", TRAINERS, ids=named)
def test_a_default_rate_does_not_reach_a_large_model(
        script, parameters, words, own, tmp_path, refused, monkeypatch):  # noqa: F811
    """From 10M parameters on a rate must be given, and the line names a range to start in."""
    monkeypatch.setattr(utils.models, "count_parameters", lambda model: parameters)
    message = refused(script, flags_of(script, own, tmp_path / "out"))
    stage = "ppo" if "ppo" in script.__name__ else script.__name__
    ranges = [text for least, text in utils.models.START_RATES[stage].items() if parameters >= least]
    assert words in message and f"default {script.Args.lr:g} is tuned" in message
    assert f"Start with a rate from {ranges[-1]} (docs/scaling.md" in message


def test_a_given_rate_and_a_small_model_pass(monkeypatch):
    monkeypatch.setattr(utils.models, "count_parameters", lambda model: 9_999_999)
    utils.models.check_rate(sft.Args(), "sft", None)
    monkeypatch.setattr(utils.models, "count_parameters", lambda model: 10**9)
    utils.models.check_rate(sft.Args(lr=1e-5), "sft", None)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--lr", "4e-3"])  # the default, but wished for
    utils.models.check_rate(sft.Args(), "sft", None)


def test_the_size_of_a_critic_counts_too(own, tmp_path, monkeypatch, refused):  # noqa: F811
    monkeypatch.setattr(utils.models, "count_parameters",
                        lambda model: 10**9 if hasattr(model, "score") else 900_000)
    assert "has 1,000M" in refused(ppo, flags_of(ppo, own, tmp_path / "out"))


def test_docs_have_the_ranges_that_the_scripts_name():
    """The table of docs/scaling.md, and START_RATES, row by row."""
    text = (ROOT / "docs/scaling.md").read_text().split("## Learning rates")[1].split("\n## ")[0]
    for script, ranges in utils.models.START_RATES.items():
        (cells,) = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {script}"))
        assert [re.match(r"[\d.e-]+ to [\d.e-]+", cell)[0] for cell in cells[2:5]] == list(ranges.values())
        default = {"sft": sft, "reward_model": reward_model, "ppo": ppo, "dpo": dpo}[script].Args.lr
        assert float(re.match(r"[\d.e-]+", cells[1])[0]) == default


@pytest.mark.parametrize("script, given_rates, expected", [
    (ppo, dict(lr=3e-5), dict(policy=3e-5, critic=3e-5)),
    (ppo, dict(lr=3e-5, critic_lr=0.0), dict(policy=3e-5, critic=0.0)),
    (group_invariant_ppo, dict(lr=3e-5), dict(policy=3e-5, critic=3e-5, head=3e-5)),
    (group_invariant_ppo, dict(lr=3e-5, critic_lr=0.0), dict(policy=3e-5, critic=0.0, head=0.0)),
    (group_invariant_ppo, dict(lr=3e-5, critic_lr=2e-4), dict(policy=3e-5, critic=2e-4, head=2e-4)),
    (group_invariant_ppo, dict(lr=3e-5, critic_lr=2e-4, group_head_lr=0.0), dict(policy=3e-5, critic=2e-4, head=0.0))])
def test_critic_and_group_head_follow_the_rate_that_is_given(script, given_rates, expected, own, tmp_path, monkeypatch):
    """--lr alone sets all of them; --critic_lr sets critic and head; 0 is a rate. One update, so none has fallen."""
    names = {"GPTNeoXForCausalLM": "policy", "ScalarModel": "critic", "GroupCritic": "critic", "GroupHead": "head"}
    found, original = {}, script.optimizer_step
    monkeypatch.setattr(script, "optimizer_step", lambda engine, lr: found.update(
        {names[type(engine.module).__name__]: lr}) or original(engine, lr))
    script.main(flags_of(script, own, tmp_path / "run", num_ppo_epochs=1, **given_rates))
    assert found == expected
    assert rows_of(tmp_path / "run/metrics.jsonl")[1]["critic_lr"] == expected["critic"]


def test_a_reward_function_keeps_scores_without_eos(monkeypatch, capsys):
    """Without --missing_eos_score; a value that is given stays, on the command line the default too."""
    def settled(**changes):
        return settle_companions(ppo.Args(**changes), "prompts", ["sft_model", "reward_model"]).missing_eos_score

    monkeypatch.setattr("sys.argv", ["ppo.py"])
    assert settled() == -1.0 and "--missing_eos_score" not in capsys.readouterr().out
    assert settled(reward_function="assets.vader:compound") is None
    assert "--missing_eos_score" in capsys.readouterr().out
    assert settled(reward_function="assets.vader:compound", missing_eos_score=-2.0) == -2.0
    monkeypatch.setattr("sys.argv", ["ppo.py", "--missing-eos-score", "-1"])
    assert settled(reward_function="assets.vader:compound") == -1.0
