"""DPO's implicit reward against a reward model, and what beta does: python -m experiments.dpo_beta --out FOLDER

The N+ paper (section 6, detail 19) finds that the implicit reward of DPO, beta log(policy / reference), tells chosen
from rejected a little worse than a reward model that was trained on the same pairs from the same SFT model. Here: the
same comparison at the size of the embedded task, on held-out pairs of the training novels (openings) and of one that is
in no training data (Persuasion); then held-out accuracy, the gold judge's share of pleasant continuations and KL over
beta.

Settings were fixed after a pilot on seed 11 (records/2026-11-21_dpo); the seeds below are others. Everything starts
from assets/sft, sees each of the training pairs once (the default arm twice), and differs in what ARMS says. Outcomes,
fixed beforehand:
  1. accuracy of `dpo, pilot's best` minus that of `reward model`, per held-out set, paired by seed: mean and 95 %
     interval (t, 4 degrees of freedom). The intervals are over seeds, on these held-out pairs.
  2. over beta at one learning rate: accuracy, gold, KL at the sampling temperature, length, share that ends with EOS.
No outcome is required. A finished run is not repeated, so the command can be stopped and given again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

SEEDS = (1, 2, 3, 4, 5)
ARMS = {
    "reward model": ("reward_model.py", {}),
    "dpo, pilot's best": ("dpo.py", {"beta": 0.3, "lr": 1e-3, "epochs": 1}),
    "dpo, defaults": ("dpo.py", {}),
    **{f"dpo, beta {beta}": ("dpo.py", {"beta": beta, "lr": 5e-4, "epochs": 1}) for beta in (0.03, 0.1, 0.3, 1.0, 3.0)},
}
SETS = {"openings": "preferences_validation", "Persuasion": "preferences_persuasion"}
T_975 = 2.776  # of Student's distribution with 4 degrees of freedom


def run(out, arm, seed):
    """One run, unless its summary is there."""
    script, flags = ARMS[arm]
    folder = out / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}".replace("'", "")
    if not (folder / "summary.json").exists():
        command = [sys.executable, script, "--seed", str(seed), "--output_dir", str(folder), "--overwrite"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command += ["--eval_every", "100000"] if script == "dpo.py" else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def kl(folder):
    """KL of the saved policy to assets/sft at the sampling temperature, nats a response, by its last samples' texts."""
    import torch

    import dpo
    from utils.models import load_causal_lm, load_tokenizer
    from utils.tokens import encode_texts

    args, tokenizer = dpo.Args(), load_tokenizer("assets/sft", "--model")
    policy, reference = (load_causal_lm(str(path), "--model", tokenizer).eval() for path in (folder, "assets/sft"))
    rows = [json.loads(line) for line in open(folder / "samples.jsonl")]
    rows = [row for row in rows if row["step"] == rows[-1]["step"]]
    total = 0.0
    for row in rows:
        prompt, response = encode_texts(row["query"], row["response"], tokenizer, row["ended"])
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logprobs = [dpo.token_logprobs(model(ids).logits[:, len(prompt) - 1 : -1].float() / args.temperature,
                                           ids[:, len(prompt) :]).sum() for model in (policy, reference)]
        total += float(logprobs[0] - logprobs[1])
    return total / len(rows)


def figures(folder, script):
    """What a finished run measured."""
    after = json.loads((folder / "summary.json").read_text())["after"]
    key = "accuracy" if script == "reward_model.py" else "rewards/accuracies"
    found = {name: after[f"eval/{file}/{key}"] for name, file in SETS.items()}
    if script == "dpo.py":
        found |= {key: after[f"eval/{key}"] for key in ("gold", "length", "ended", "distinct_starts")}
        found |= {"chosen logps": after["eval/preferences_validation/logps/chosen"], "KL": kl(folder)}
    return found


def interval(values):
    """Mean and half width of its 95 % interval over the seeds."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, T_975 * (variance / len(values)) ** 0.5


def plot(out, found):
    """Accuracy and gold over beta, and gold over KL: mean and interval of each arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def draw(axis, arms, x, name, label):
        y, error = zip(*(interval([run[name] for run in found[arm]]) for arm in arms))
        axis.errorbar(x, y, error, marker="o", capsize=3, label=label)

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    arms = [arm for arm in found if arm.startswith("dpo, beta")]
    betas = [ARMS[arm][1]["beta"] for arm in arms]
    for name in SETS:
        draw(axes[0], arms, betas, name, name)
        axes[0].axhline(interval([run[name] for run in found["reward model"]])[0], linestyle=":", color="gray")
    for name in ("gold", "ended"):
        draw(axes[1], arms, betas, name, {"gold": "gold: pleasant", "ended": "ends with EOS"}[name])
    draw(axes[2], arms, [interval([run["KL"] for run in found[arm]])[0] for arm in arms], "gold", "beta 0.03 to 3")
    default = "dpo, defaults"
    draw(axes[2], [default], [interval([run["KL"] for run in found[default]])[0]], "gold", "defaults")
    for axis, title, x in zip(axes, ("held-out accuracy (dotted: reward models)", "continuations", "gold"),
                              ("beta", "beta", "KL to the SFT model, nats")):
        axis.set(title=title, xlabel=x, xscale="log")
        axis.legend()
    figure.savefig(out / "beta.png", dpi=110)


def main(out):
    found = {arm: [figures(run(out, arm, seed), ARMS[arm][0]) for seed in SEEDS] for arm in ARMS}
    (out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(out, found)
    columns = list(found["dpo, defaults"][0])
    print("| | " + " | ".join(columns) + " |\n|" + "-|" * (len(columns) + 1))
    for arm, runs in found.items():
        cells = ["{:.3f} ± {:.3f}".format(*interval([run[name] for run in runs])) if name in runs[0] else ""
                 for name in columns]
        print(f"| {arm} | " + " | ".join(cells) + " |")
    print("\n| accuracy minus the reward model's, by seed | " + " | ".join(SETS) + " |\n|-|" + "-|" * len(SETS))
    for arm in list(ARMS)[1:]:
        differences = [[mine[name] - its[name] for mine, its in zip(found[arm], found["reward model"])]
                       for name in SETS]
        cells = ["{:+.3f} ± {:.3f}".format(*interval(values)) for values in differences]
        print(f"| {arm} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dpo_beta"))
    main(parser.parse_args().out)
