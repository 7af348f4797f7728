"""Group invariant learning, tested at CPU size: python -m experiments.group_invariance --out FOLDER --bed token

Claim (Zheng et al. 2023): where some prompts are easy and others hard, PPO leaves the hard ones behind; inferring the
two groups, evening out their returns and adapting the KL penalty to them narrows the gap without losing reward.

Two beds, both run by group_invariant_ppo.py itself:
  token     80 % easy prompts, where one shortcut works everywhere, and 20 % hard ones, whose content must be read; an
            SFT model of 0.1M parameters that says nearly random symbols. Its gold reward, which is never trained on,
            falls where the shortcut is overdone. There are 16 prompts, evaluated 32 times each; none is held out.
  openings  the embedded SFT and reward models; prompts are the first four words of its sentences, grouped by the sign
            of their VADER score (11 % negative, 70 % neutral, 19 % positive); gold is VADER's score of the sentence.

Arms, each at three KL coefficients: PPO; + invariance (beta_policy 0 to 5); + adaptive KL; both; on the token bed also
labels of the prompt, the exact estimator, the uniform variance, a balanced mixture, and controls: shuffled (multipliers
permuted among episodes), score (labels are ranks of the score, no group head), reweight (each true group at its mean
multiplier), oracle (the true groups as labels, 0 or 1; here and for score the group head is not trained at all).

Figures: score is what is trained; gold and score are means over the mixture of prompts that the run was trained on; the
gap is the largest difference between the mean scores of true groups; KL is the sum of log policy - log reference over
the sampled tokens, in nats, a mean over the same responses.

Settings were fixed after pilots on seeds 1, 100 to 103 and, with an earlier version of the script, 11 to 14; the seeds
below are others. Fixed beforehand, at the end of training:
  primary     "invariance 0.6" minus "ppo": gold and gap, both at equal realised KL (TARGET_KL nats: each seed's three
              KL coefficients are interpolated linearly in their KL; a seed that does not reach that KL on both sides is
              left out, and counted), paired by seed, mean and 95 % interval (t).
  equivalence is claimed only where the whole interval lies within plus and minus MARGINS.
  secondary   the same for every other arm, and, because adaptive KL steers its own KL, each run minus PPO
              interpolated at the KL of that very run. These are many: one in twenty misses 0 by chance.
Added when the first seeds had been seen: the arms "exact, score", "exact, oracle" and "exact, prompt labels", and all
that the report prints of single groups, of parabolas and of "invariance 0.6" minus other arms than PPO.
The figures for other shares of easy prompts follow from the same group means: that would be reweighting, no evidence of
generalisation, and is not reported. No outcome is required.

A finished run is not repeated: stop the command and give it again, with --part 1/2 and 2/2 for two cores. When all runs
are there, --report prints the tables. --seeds, --arm, --kl_coef and further flags of the script are for pilots.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

import group_invariant_ppo as gi
from assets import vader

# ---- The token bed ----------------------------------------------------------------------------------------
# A prompt is a marker, E (easy) or H (hard), and a content symbol 0 to 7; a response has six of the symbols 0 to 7.

SEEDS = (21, 22, 23, 24, 25, 26, 27, 28)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's distribution, by values
TARGET_KL = {"token": 2.5, "openings": 3.5}
MARGINS = {"token": {"gold": 0.03, "gap": 0.1}, "openings": {"gold": 0.05, "gap": 0.2}}
LENGTH = 6
HINT = 0.05
TASK = {}  # of the run: wanted_symbols of its seed


def wanted_symbols(seed):
    """{marker: wanted symbol for each content 0 to 7}: 0 for easy prompts, drawn from 1 to 7 for hard ones."""
    return {"E": [0] * 8, "H": np.random.default_rng((seed, 8)).integers(1, 8, 8).tolist()}


def shares(queries, responses):
    """(is easy, share of the response's six places that hold what the proxy wants) of each: token 0, or m(content)."""
    for query, response in zip(queries, responses):
        marker, content = query.split()
        wanted = str(TASK[marker][int(content)])
        yield marker == "E", response.split()[:LENGTH].count(wanted) / LENGTH


def proxy(queries, responses):
    """What is trained: 2 x the share of wanted tokens, from 0 to 2."""
    return [2 * share for _, share in shares(queries, responses)]


def gold(queries, responses):
    """What the proxy stands for: on hard prompts the same, on easy ones it falls again beyond a share of 1/2."""
    return [2 * (min(share, 1 - share) if easy else share) for easy, share in shares(queries, responses)]


def token_model(folder, seed):
    """An SFT model, by sft.py: a GPT-2 of two layers of width 64 that says six symbols and EOS; and prompts.

    A symbol is the wanted one with probability HINT, else random: without it the model would not read the content.
    """
    import sft
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if folder.exists():
        return
    done, folder = folder, folder.with_name(f"{folder.name}.{os.getpid()}")  # two parts may come here at once
    folder.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate([*"01234567", "E", "H", "[EOS]", "[PAD]"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", pad_token="[PAD]")
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=12, n_positions=16, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=10,
        eos_token_id=10, pad_token_id=11))
    model.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    rng, symbols, rows = np.random.default_rng((seed, 9)), wanted_symbols(seed), []
    for i in range(8192):
        marker, content = "EH"[i % 2], int(rng.integers(8))
        response = np.where(rng.random(LENGTH) < HINT, symbols[marker][content], rng.integers(0, 8, LENGTH))
        rows.append({"prompt": f"{marker} {content}", "completion": "".join(f" {symbol}" for symbol in response)})
    write(folder / "demonstrations.jsonl", rows[256:])
    write(folder / "demonstrations_validation.jsonl", rows[:256])
    for name, share in (("imbalanced", 0.8), ("balanced", 0.5)):  # prompts, easy and hard
        markers = np.where(rng.random(1000).argsort() < 1000 * share, "E", "H")
        write(folder / f"{name}.jsonl", [
            {"prompt": f"{marker} {rng.integers(8)}", "group": str(marker)} for marker in markers])
    write(folder / "evaluation.jsonl", [
        {"prompt": f"{'EH'[i % 2]} {i // 2 % 8}", "group": "EH"[i % 2]} for i in range(512)])
    sft.main(tyro.cli(sft.Args, args=[
        f"--model={folder / 'random'}", f"--train_data={folder}/demonstrations.jsonl",
        f"--eval_data={folder}/demonstrations_validation.jsonl", f"--output_dir={folder / 'sft'}", "--overwrite",
        "--lr=3e-3", "--batch_size=64", "--micro_batch_size=64", "--epochs=3", "--max_prompt_length=2",
        "--max_length=9", "--response_length=7", "--log_every=100"]))
    if done.exists():
        shutil.rmtree(folder)
    else:
        folder.rename(done)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- Arms and controls ------------------------------------------------------------------------------------


@contextlib.contextmanager
def control(name, groups, seed):
    """Within, group_invariant_ppo.py has other labels or multipliers than those of its group head.

    shuffled: its multipliers, permuted among the episodes. score: labels are the rank of the score, no head. oracle:
    the true groups. reweight: each true group has the mean of its multipliers. groups: {prompt ids: easy, 1 or 0}.
    """
    real = {function: getattr(gi, function) for function in (
        "Episodes", "normalize", "label_gradient", "advantage_multiplier", "adaptive_kl_coefs")}
    rng, batch = np.random.default_rng((seed, 5)), {}

    def episodes(prompts, *others):  # the last ones before the multipliers are those of the update
        batch["easy"] = torch.tensor([groups[tuple(query)] if groups else 0 for query, *_ in prompts])
        return real["Episodes"](prompts, *others)

    def normalize(scores, *others):
        below, same = scores[:, None] > scores, scores[:, None] == scores
        batch["rank"] = (below.sum(1) + same.sum(1) / 2) / len(scores)  # ties share a rank
        return real["normalize"](scores, *others)

    def other_labels(labels):
        high = {"score": "rank", "oracle": "easy"}.get(name)
        return labels if high is None else torch.stack([1 - batch[high].float(), batch[high].float()], dim=1)

    def gradient(labels, *others):  # the exact estimator sums it over the script's labels, which sum to 1
        chosen = other_labels(labels)
        found = real["label_gradient"](chosen, *others)
        return found if chosen is labels else (chosen * found).sum(1, keepdim=True).expand_as(labels)

    def multiplier(labels, *others):
        kappas = real["advantage_multiplier"](other_labels(labels), *others)
        if name == "shuffled":
            kappas = kappas[torch.from_numpy(rng.permutation(len(kappas)))]
        if name == "reweight":
            easy = batch["easy"] == 1
            kappas = torch.where(easy, kappas[easy].mean(), kappas[~easy].mean())
        return kappas

    def kl_coefs(labels, *others):
        return real["adaptive_kl_coefs"](other_labels(labels), *others)

    try:
        gi.Episodes, gi.normalize, gi.label_gradient = episodes, normalize, gradient
        gi.advantage_multiplier, gi.adaptive_kl_coefs = multiplier, kl_coefs
        yield
    finally:
        for function, value in real.items():
            setattr(gi, function, value)


PPO = ["--beta_critic=0", "--beta_policy=0", "--no-dynamic_kl"]
BETA = 0.6
EXACT = ("--invariance_estimator=exact",)


def invariance(beta, *more):
    return [f"--beta_policy={beta}", "--no-dynamic_kl", *more]


# {name of the arm: (flags, control, prompts, KL coefficients)}; adaptive KL lowers its own on the way
TOKEN_KLS, TOKEN_KLS_ADAPTIVE = (0.2, 0.3, 0.4), (0.3, 0.5, 0.8)
TOKEN_ARMS = {
    "ppo": (PPO, None, "imbalanced", TOKEN_KLS),
    **{f"invariance {beta:g}": (invariance(beta), None, "imbalanced", TOKEN_KLS)
       for beta in (0, 0.01, 0.1, 0.3, 0.6, 1, 5)},
    "adaptive KL": (["--beta_policy=0"], None, "imbalanced", TOKEN_KLS_ADAPTIVE),
    "both": ([f"--beta_policy={BETA}"], None, "imbalanced", TOKEN_KLS_ADAPTIVE),
    "shuffled": (invariance(BETA), "shuffled", "imbalanced", TOKEN_KLS),
    "score": (invariance(BETA, "--beta_critic=0"), "score", "imbalanced", TOKEN_KLS),
    "reweight": (invariance(BETA), "reweight", "imbalanced", TOKEN_KLS),
    "oracle": (invariance(BETA, "--beta_critic=0"), "oracle", "imbalanced", TOKEN_KLS),
    "oracle adaptive KL": (["--beta_policy=0", "--beta_critic=0"], "oracle", "imbalanced", TOKEN_KLS_ADAPTIVE),
    "prompt labels": (invariance(BETA, "--group_level=prompt"), None, "imbalanced", TOKEN_KLS),
    "exact": (invariance(BETA, *EXACT), None, "imbalanced", TOKEN_KLS),
    "exact, prompt labels": (invariance(BETA, *EXACT, "--group_level=prompt"), None, "imbalanced", TOKEN_KLS),
    "exact, score": (invariance(BETA, *EXACT, "--beta_critic=0"), "score", "imbalanced", TOKEN_KLS),
    "exact, oracle": (invariance(BETA, *EXACT, "--beta_critic=0"), "oracle", "imbalanced", TOKEN_KLS),
    "uniform": (invariance(BETA, "--group_variance=uniform"), None, "imbalanced", TOKEN_KLS),
    "ppo, balanced": (PPO, None, "balanced", TOKEN_KLS),
    "invariance 0.6, balanced": (invariance(BETA), None, "balanced", TOKEN_KLS),
}
TOKEN_FLAGS = [
    "--total_episodes=12800", "--batch_size=64", "--micro_batch_size=64", "--num_ppo_epochs=1", "--lr=2e-3",
    "--critic_lr=2e-3", "--group_head_lr=5e-4", "--response_length=7", "--max_prompt_length=2", "--temperature=1.0",
    "--missing_eos_score=None", "--num_eval_prompts=512", "--eval_every=50", "--save_every=100000",
    "--rollout_batch_size=512", "--reward_function=experiments.group_invariance:proxy",
    "--gold_function=experiments.group_invariance:gold"]
OPENING_KLS, OPENING_KLS_ADAPTIVE = (0.08, 0.16, 0.32), (0.16, 0.32, 0.64)
OPENING_ARMS = {
    "ppo without KL": (PPO, None, "openings", (0.0,)),
    "ppo": (PPO, None, "openings", OPENING_KLS),
    "invariance 0.01": (invariance(0.01), None, "openings", OPENING_KLS),
    "invariance 0.6": (invariance(BETA), None, "openings", OPENING_KLS),
    "adaptive KL": (["--beta_policy=0"], None, "openings", OPENING_KLS_ADAPTIVE),
    "both": ([f"--beta_policy={BETA}"], None, "openings", OPENING_KLS_ADAPTIVE),
}
OPENING_FLAGS = [
    "--total_episodes=1280", "--eval_every=10", "--save_every=100000", "--gold_function=assets.vader:compound"]


# ---- Runs -------------------------------------------------------------------------------------------------


def token_data(out, seed):
    token_model(out / f"token_task_{seed}", seed)
    TASK.update(wanted_symbols(seed))
    folder = out / f"token_task_{seed}"
    return folder, folder / "sft", {(8 + hard, content): 1 - hard for hard in (0, 1) for content in range(8)}


def opening_data(out, seed):
    """The first four words of the embedded sentences as prompts; their group is the sign of their VADER score."""
    folder = out / "openings_data"
    for name in ("openings", "evaluation") if not (folder / "evaluation.jsonl").exists() else ():
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for line in open(f"assets/data/{'train' if name == 'openings' else 'validation'}.jsonl"):
            row = json.loads(line)
            words = (row["prompt"] + row["completion"]).split(" ")
            if len(words) > 5:
                opening = " ".join(words[:4])
                compound = vader.compound([opening], [""])[0]
                group = "positive" if compound >= 0.05 else "negative" if compound <= -0.05 else "neutral"
                rows.append({"prompt": opening, "completion": " " + " ".join(words[4:]), "group": group})
        write(folder / f"{name}.jsonl", rows)
    return folder, Path("assets/sft"), {}


BEDS = {"token": (TOKEN_ARMS, TOKEN_FLAGS, token_data), "openings": (OPENING_ARMS, OPENING_FLAGS, opening_data)}


def run(out, bed, arm, kl_coef, seed, flags=()):
    """One run, as a file of figures: the evaluations by true group, and what was logged of the groups."""
    file = out / bed / f"{arm.replace(',', '').replace(' ', '_')}-kl_{kl_coef:g}-seed_{seed}.json"
    if file.exists():
        return
    arms, bed_flags, make_data = BEDS[bed]
    more, change, prompts, _ = arms[arm]
    data, sft_model, groups = make_data(out, seed)
    folder = file.with_suffix("")
    with control(change, groups, seed):
        gi.main(tyro.cli(gi.Args, args=[
            f"--sft_model={sft_model}", f"--prompts={data}/{prompts}.jsonl", f"--eval_prompts={data}/evaluation.jsonl",
            f"--output_dir={folder}", "--overwrite", f"--seed={seed}", f"--kl_coef={kl_coef}", *bed_flags, *more,
            *flags]))
    true_group = {row["prompt"]: row["group"] for row in map(json.loads, open(data / "evaluation.jsonl"))}
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    metrics = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    curve = {}
    for row in samples:
        by_group = curve.setdefault(row["step"], {}).setdefault(true_group[row["query"]], [])
        by_group.append([row[key] for key in ("score", "gold", "kl", "length")])
    last = {group: [row[0] for row in rows] for group, rows in curve[max(curve)].items()}
    kept = [{key: value for key, value in row.items() if key.startswith(("step", "group", "objective"))}
            for row in metrics if "lr" in row]
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({
        "arm": arm, "kl_coef": kl_coef, "seed": seed, "flags": [*bed_flags, *more, *flags], "scores": last,
        "metrics": kept,
        "curve": {step: {group: [len(rows), *np.mean(rows, axis=0)] for group, rows in groups.items()}
                  for step, groups in curve.items()}}))
    unfinished.replace(file)
    for path in folder.iterdir():  # the policy stays, for evaluate.py
        if bed == "token" or path.is_dir() or path.suffix == ".jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if bed == "token":
        folder.rmdir()


# ---- Report -----------------------------------------------------------------------------------------------

MIXTURE = {"imbalanced": {"E": 0.8, "H": 0.2}, "balanced": {"E": 0.5, "H": 0.5}}


def figures(bed, found):
    """What one run ended with: over the mixture that it was trained on, for each true group, and of its labels."""
    last = max(found["curve"], key=int)
    groups = found["curve"][last]  # {group: [rows, score, gold, kl, length]}
    flags, _, prompts, _ = BEDS[bed][0][found["arm"]]
    mixture = MIXTURE[prompts] if bed == "token" else None
    total = sum(rows for rows, *_ in groups.values())
    share = mixture or {group: rows / total for group, (rows, *_) in groups.items()}
    scores = {group: values[1] for group, values in groups.items()}
    late = found["metrics"][len(found["metrics"]) // 2 :]
    auc = np.array([row["groups/auc"] for row in late])
    return {
        "gold": sum(share[group] * values[2] for group, values in groups.items()),
        "gap": max(scores.values()) - min(scores.values()),
        "score": sum(share[group] * score for group, score in scores.items()),
        "KL": sum(share[group] * values[3] for group, values in groups.items()),
        **{f"{name} {group}": values[column] for name, column in (("score", 1), ("gold", 2), ("KL", 3))
           for group, values in sorted(groups.items())},
        **{f"sd {group}": np.std(values) for group, values in sorted(found["scores"].items())},
        "mean KL coefficient": np.mean([row["objective/kl_coef"] for row in late]),
        **({} if "--beta_critic=0" in flags else {  # there the head is random
            "AUC, either way": np.maximum(auc, 1 - auc).mean(), "AUC below 1/2": (auc < 0.5).mean(),
            "crosses 1/2": np.abs(np.diff(auc < 0.5)).mean(),
            "best group's share": np.mean([row["group_0/share"] for row in late]),
            "its score less the other's": np.mean([row["group_0/score"] - row["group_1/score"] for row in late]),
            "its return is the lower": np.mean([row["groups/gap"] < 0 for row in late])}),
        **({} if EXACT[0] in flags else {  # there it has no multipliers
            "kappa from": np.mean([row["groups/kappa_min"] for row in late]),
            "to": np.mean([row["groups/kappa_max"] for row in late])})}


def rounded(values):
    """A dict or list of numbers with five digits: enough for a record."""
    if isinstance(values, dict):
        return {key: float(f"{value:.5g}") for key, value in values.items()}
    return [float(f"{value:.5g}") for value in values]


def interval(values):
    """Mean and half width of its 95 % interval over the seeds; nan for the latter with fewer than two values."""
    half = T_975[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return np.mean(values), half


def at_kl(points, kl):
    """Every figure at this KL, linear between the two neighbours of points [{"KL", ...}]; None outside them.

    "gold, parabola" and "gap, parabola" are those of a parabola in the KL through three points.
    """
    points = sorted(points, key=lambda point: point["KL"])
    for left, right in zip(points, points[1:]):
        if left["KL"] <= kl <= right["KL"]:
            weight = (kl - left["KL"]) / max(right["KL"] - left["KL"], 1e-9)
            curved = {f"{key}, parabola": np.polyval(np.polyfit(*([point[name] for point in points] for name in (
                "KL", key)), 2), kl) for key in ("gold", "gap")} if len(points) == 3 else {}
            return {key: (1 - weight) * left[key] + weight * right[key] for key in left} | curved
    return None


def difference(points, arm, base, seeds, key):
    """This arm minus that one, by seed, as "mean ± half width", with mean and half width."""
    mean, half = interval([points[arm, seed][key] - points[base, seed][key] for seed in seeds])
    return f"{mean:+.3f} ± {half:.3f}", mean, half


def table(head, rows):
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["-"] * len(head), *rows)))


def report(out, bed):
    runs = [json.loads(file.read_text()) for file in sorted((out / bed).glob("*.json"))]
    runs = [found for found in runs if found["seed"] in SEEDS]
    arms = BEDS[bed][0]
    for found in runs:
        if found["flags"] != BEDS[bed][1] + arms[found["arm"]][0]:
            raise SystemExit(f"{found['arm']}, seed {found['seed']}: a run with other flags than those of this file")
    ends = {(found["arm"], found["kl_coef"], found["seed"]): figures(bed, found) for found in runs}
    write(out / f"{bed}.jsonl", [{
        "arm": found["arm"], "kl_coef": found["kl_coef"], "seed": found["seed"], **rounded(end),
        "curve": {step: {group: rounded(values) for group, values in groups.items()}
                  for step, groups in found["curve"].items()}} for found, end in zip(runs, ends.values())])
    seeds, kl, margins = sorted({seed for _, _, seed in ends}), TARGET_KL[bed], MARGINS[bed]

    def of_seed(arm, seed):  # the runs of all KL coefficients, or None
        some = [ends.get((arm, kl_coef, seed)) for kl_coef in arms[arm][3]]
        return None if None in some else some

    def base_of(arm):
        return "ppo, balanced" if "balanced" in arm else "ppo"

    points = {(arm, seed): at_kl(some, kl) for arm in arms for seed in seeds if (some := of_seed(arm, seed))}
    paired = {arm: [seed for seed in seeds if points.get((arm, seed)) and points.get((base_of(arm), seed))]
              for arm in arms}
    compared = [arm for arm in arms if len(paired[arm]) > 1]
    print(f"{bed}: {len(runs)} runs, seeds {seeds}\n\nAt {kl:g} nats, paired by seed with PPO on the same prompts:\n")
    rows = []
    for arm in compared:
        cells, verdict = [], []
        done = sum((arm, seed) in points for seed in seeds)
        for key in ("gold", "gap"):
            cell, mean, half = difference(points, arm, base_of(arm), paired[arm], key)
            cells += [f"{np.mean([points[arm, seed][key] for seed in paired[arm]]):.3f}", cell]
            words = {"higher": mean > half, "lower": mean < -half,
                     f"within ±{margins[key]:g}": abs(mean) + half < margins[key]}
            verdict.append(f"{key} {', '.join(word for word in words if words[word]) or 'open'}")
        primary = arm == "invariance 0.6" and done == len(SEEDS)
        rows.append([arm, f"{len(paired[arm])} of {done}", *cells, "; ".join(verdict) if primary else ""])
    table(["arm", "seeds", "gold", "gold - PPO", "gap", "gap - PPO", "verdict"], rows)
    print("\n`seeds`: of those with all runs, those that reach this KL, here and with PPO.\n")
    print("At the same KL, means over the seeds, and with a parabola in the place of the line:\n")
    groups = sorted(runs[0]["scores"])
    columns = [f"{name} {group}" for name in ("score", "gold", "KL", "sd") for group in groups]
    table(["arm", "score", "score - PPO", *columns, "gold - PPO, parabola", "gap - PPO, parabola"], [[
        arm, f"{np.mean([points[arm, seed]['score'] for seed in paired[arm]]):.3f}",
        difference(points, arm, base_of(arm), paired[arm], "score")[0],
        *(f"{np.mean([points[arm, seed][column] for seed in paired[arm]]):.3f}" for column in columns),
        *(difference(points, arm, base_of(arm), paired[arm], f"{key}, parabola")[0] for key in ("gold", "gap"))]
        for arm in compared])
    print("\n`invariance 0.6` minus other arms, at the same KL:\n")
    table(["minus", "seeds", "gold", "gap"], [[
        arm, str(len(both)), *(difference(points, "invariance 0.6", arm, both, key)[0] for key in ("gold", "gap"))]
        for arm in compared if not arm.startswith("invariance 0.6") and "balanced" not in arm
        and len(both := [seed for seed in paired[arm] if seed in paired.get("invariance 0.6", ())]) > 1])
    for (arm, kl_coef, seed), end in ends.items():
        theirs = of_seed(base_of(arm), seed)
        theirs = theirs and at_kl(theirs, end["KL"])
        if theirs and "--no-dynamic_kl" not in arms[arm][0]:
            end |= {f"{key} - PPO at this KL": end[key] - theirs[key] for key in ("gold", "gap")}
    columns = list(dict.fromkeys(column for end in ends.values() for column in end))
    print("\nAt the end of training, mean ± 95 % interval over the seeds (labels and multipliers: means over its second half).")
    print("`PPO at this KL`: of arms that steer their own KL, where PPO of every seed reaches it.\n")
    rows = []
    for arm in arms:
        for kl_coef in arms[arm][3]:
            some = [ends[arm, kl_coef, seed] for seed in seeds if (arm, kl_coef, seed) in ends]
            values = [[row[column] for row in some if column in row] for column in columns]
            if some:
                rows.append([arm, f"{kl_coef:g}", *("{:.3f} ± {:.3f}".format(*interval(numbers))
                                                   if len(numbers) == len(some) else "" for numbers in values)])
    table(["arm", "KL coefficient", *columns], rows)
    plot(out, bed, runs)


def win_rates(out, seeds):
    """evaluate.py on the openings: the arms at their middle KL coefficient, and PPO without KL, against SFT and PPO.

    The same coefficient is not the same KL, so that stands beside it.
    """
    table, kls = {}, {}
    for seed in seeds:
        folder, models = out / "win_rates" / f"seed_{seed}", {}
        for arm, (*_, kl_coefs) in OPENING_ARMS.items():
            models[f"{arm.replace(' ', '_')}-kl_{kl_coefs[len(kl_coefs) // 2]:g}-seed_{seed}"] = arm
        if not (folder / "summary.json").exists():
            policies = [str(out / "openings" / name) for name in models]
            subprocess.run([
                sys.executable, "evaluate.py", "--models", "assets/sft", *policies, "--prompts",
                str(out / "openings_data" / "evaluation.jsonl"), "--output_dir", str(folder), "--overwrite"],
                check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        summary = json.loads((folder / "summary.json").read_text())
        for name, row in summary["models"].items():
            kls.setdefault(models.get(name, name), []).append(row["kl"])
        for row in summary["comparisons"]:
            pair = models.get(row["a"], row["a"]), models.get(row["b"], row["b"])
            for (a, b), rate in ((pair, row["win_rate"]), (pair[::-1], 1 - row["win_rate"])):
                table.setdefault((row["judge"], a, b), []).append(rate)
    against = ("references", "sft", "ppo without KL", "ppo")
    for judge in sorted({judge for judge, _, _ in table}):
        print(f"\nWin rates by {judge}, mean ± 95 % interval over {len(seeds)} seeds:\n")
        print(f"| | KL | {' | '.join(against)} |")
        print("|-" * (len(against) + 2) + "|")
        for arm in ("sft", *OPENING_ARMS):
            columns = kls[arm], *(table.get((judge, arm, other), []) for other in against)
            cells = ["{:.3f} ± {:.3f}".format(*interval(values)) if values else "" for values in columns]
            print(f"| {arm} | {' | '.join(cells)} |")


def plot(out, bed, runs):
    """At the middle KL coefficient: the gap over training, score against KL, and histograms of the final scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [arm for arm in ("ppo without KL", "ppo", "invariance 0.6", "exact, prompt labels", "adaptive KL", "both")
             if arm in BEDS[bed][0]]
    figure = pyplot.figure(figsize=(max(2.6 * len(shown), 8), 6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    gap_axis, score_axis = above.subplots(1, 2)
    histograms = below.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    below.suptitle("scores at the end of training, by true group", fontsize=10)
    for number, (arm, histogram) in enumerate(zip(shown, histograms)):
        kl_coefs = BEDS[bed][0][arm][3]
        some = [found for found in runs if found["arm"] == arm and found["kl_coef"] == kl_coefs[len(kl_coefs) // 2]]
        curves = []
        for found in some:
            steps = sorted(found["curve"], key=int)
            ends = [figures(bed, {**found, "curve": {step: found["curve"][step]}}) for step in steps]
            curves.append([[end[key] for end in ends] for key in ("gap", "score", "KL")])
        if not some:
            continue
        gap, score, kl = np.mean(curves, axis=0)
        gap_axis.plot([int(step) for step in steps], gap, "o-", ms=3, color=f"C{number}")
        score_axis.plot(kl, score, "o-", ms=3, color=f"C{number}",
                        label=f"{arm}: KL coefficient {kl_coefs[len(kl_coefs) // 2]:g}, at the end {kl[-1]:.1f} nats")
        for group, color in zip(sorted(some[0]["scores"]), ("black", "tab:pink", "tab:olive")):
            values = [score for found in some for score in found["scores"][group]]
            bins = np.arange(-0.5, LENGTH + 1) * 2 / LENGTH if bed == "token" else np.arange(-8, 10, 0.5)  # seven values
            histogram.hist(values, bins=bins, histtype="step", lw=1.5, density=True, color=color, label=group)
        histogram.set_title(arm, fontsize=9)
    histograms[0].legend(fontsize=8)
    gap_axis.set(title="gap between true groups, mean of seeds", xlabel="update", ylim=(0, None))
    score_axis.set(title="score, mean of seeds", xlabel="KL to the SFT model, nats")
    score_axis.legend(fontsize=7, loc="lower right")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / f"{bed}.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/group_invariance"))
    parser.add_argument("--bed", choices=BEDS, default="token")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th run from the K-th on, for several cores")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arm", help="this one alone")
    parser.add_argument("--kl_coef", type=float, help="this one alone")
    parser.add_argument("--win_rates", action="store_true", help="of the policies of the openings, by evaluate.py")
    parser.add_argument("--report", action="store_true", help="tables and figure of the runs that are there")
    arguments, flags = parser.parse_known_args()
    if arguments.win_rates:
        return win_rates(arguments.out, arguments.seeds)
    if arguments.report:
        return report(arguments.out, arguments.bed)
    (arguments.out / arguments.bed).mkdir(parents=True, exist_ok=True)
    todo = [(arguments.bed, arm, kl_coef, seed) for seed in arguments.seeds for arm, (*_, kl_coefs)
            in BEDS[arguments.bed][0].items() for kl_coef in kl_coefs
            if arguments.arm in (None, arm) and arguments.kl_coef in (None, kl_coef)]
    part, parts = map(int, arguments.part.split("/"))
    for one in todo[part - 1 :: parts]:
        run(arguments.out, *one, flags)


if __name__ == "__main__":
    from experiments import group_invariance  # whose functions the script loads, not this copy named __main__

    group_invariance.main()
