"""Reward-model over-optimisation: python -m experiments.overoptimisation --out FOLDER

A policy that is trained long enough against a reward model raises its score while what the score stands for falls: gold
over KL is a hump where the proxy's curve keeps rising (Gao et al. 2022, arXiv 2210.10760; two of the N+ paper's 1B runs
end so). Here: ppo.py's defaults but for the KL coefficient and three times the episodes, whose proxy is
assets/reward_model and whose gold is VADER's compound score of the sentence, from which the training pairs have their
labels and which PPO never sees.

Settings were fixed after a pilot on seed 11 (three runs, kl_coef 0 and 0.1); the seeds below are others. Outcomes,
fixed beforehand, on 500 held-out openings, at the end of training:
  1. gold of each kl_coef minus gold of the best one, paired by seed: mean and 95 % interval (t, 2 degrees of freedom).
     Over-optimisation is claimed where kl_coef 0 lies below the best one with the interval below 0.
  2. proxy, KL, length, distinct trigrams and share with EOS of each, by evaluate.py.
The curves during training come from the runs' own metrics.jsonl, where a response without EOS scores -1. No outcome is
required. A finished run is not repeated, so the command can be stopped and given again; --only SEED [SEED ...] trains
these alone, for several cores.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

KL_COEFS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
SEEDS = (1, 2, 3)
EPISODES = 9600
T_975 = 4.303  # of Student's distribution with 2 degrees of freedom


def python(*words):
    subprocess.run([sys.executable, *map(str, words)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def folder_of(out, kl_coef, seed):
    return out / f"kl_coef_{kl_coef}_seed_{seed}"


def train(out, kl_coef, seed):
    """One run of ppo.py, unless its summary is there. Its last checkpoint would be large, so there is none."""
    folder = folder_of(out, kl_coef, seed)
    if not (folder / "summary.json").exists():
        python("ppo.py", "--kl_coef", kl_coef, "--seed", seed, "--total_episodes", EPISODES, "--output_dir", folder,
               "--gold_function", "assets.vader:compound", "--save_every", 1000, "--overwrite")


def curve(folder):
    """[(KL, proxy, gold)] of a run's evaluations during training."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [tuple(row[f"eval/{key}"] for key in ("kl", "score", "gold")) for row in rows if "eval/kl" in row]


def interval(values):
    """Mean and half width of its 95 % interval over the seeds."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, T_975 * (variance / len(values)) ** 0.5


def plot(out, found):
    """Proxy and gold over KL: training as lines, the end of each run as a dot; then gold over the KL coefficient."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for number, kl_coef in enumerate(KL_COEFS):
        colour = pyplot.cm.viridis(number / (len(KL_COEFS) - 1) * 0.92)
        for seed, run in zip(SEEDS, found[kl_coef]):
            kl, proxy, gold = zip(*curve(folder_of(out, kl_coef, seed)))
            for axis, values, key in ((axes[0], proxy, "proxy"), (axes[1], gold, "gold")):
                axis.plot(kl, values, color=colour, lw=0.8, alpha=0.6)
                axis.plot(run["KL"], run[key], "o", color=colour, ms=5, label=f"{kl_coef:g}" if seed == 1 else None)
        axes[2].plot([number] * len(SEEDS), [run["gold"] for run in found[kl_coef]], "o", color=colour, ms=5)
    gold = [interval([run["gold"] for run in found[kl_coef]])[0] for kl_coef in KL_COEFS]
    axes[2].plot(range(len(KL_COEFS)), gold, color="black", lw=1.5)
    axes[2].set_xticks(range(len(KL_COEFS)), [f"{kl_coef:g}" for kl_coef in KL_COEFS])
    axes[0].set(title="proxy: the reward model's score", xlabel="KL to the SFT model, nats")
    axes[1].set(title="gold: VADER's compound score", xlabel="KL to the SFT model, nats")
    axes[2].set(title="gold at the end: seeds and their mean", xlabel="KL coefficient")
    axes[0].legend(title="KL coefficient", fontsize=8, title_fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "overoptimisation.png", dpi=130)


def main(out, seeds):
    for seed in seeds or SEEDS:
        for kl_coef in KL_COEFS:
            train(out, kl_coef, seed)
    if seeds:
        return
    if not (out / "evaluation" / "summary.json").exists():
        policies = [folder_of(out, kl_coef, seed) for kl_coef in KL_COEFS for seed in SEEDS]
        python("evaluate.py", "--models", "assets/sft", *policies, "--pairs", "references", "--output_dir",
               out / "evaluation", "--overwrite")
    results = json.loads((out / "evaluation" / "summary.json").read_text())
    wins = {(row["a"], row["judge"]): row["win_rate"] for row in results["comparisons"]}

    def figures(name):
        model = results["models"][name]
        return {"KL": model["kl"], "proxy": model["scores"]["reward_model"]["mean"],
                "gold": model["scores"]["vader:compound"]["mean"], "gold wins": wins[name, "vader:compound"],
                "proxy wins": wins[name, "reward_model"], "length": model["length"], "ended": model["ended"],
                "distinct 3-grams": model["distinct_3"]}

    found = {kl_coef: [figures(folder_of(out, kl_coef, seed).name) for seed in SEEDS] for kl_coef in KL_COEFS}
    (out / "figures.json").write_text(json.dumps({"sft": figures("sft"), **found}, indent=1) + "\n")
    plot(out, found)
    columns = list(found[KL_COEFS[0]][0])
    print("| KL coefficient | " + " | ".join(columns) + " |\n|-" + "|-" * len(columns) + "|")
    print("| SFT model | " + " | ".join(f"{value:.3f}" for value in figures("sft").values()) + " |")
    for kl_coef, runs in found.items():
        cells = ["{:.3f} ± {:.3f}".format(*interval([run[name] for run in runs])) for name in columns]
        print(f"| {kl_coef:g} | " + " | ".join(cells) + " |")
    best = max(KL_COEFS, key=lambda kl_coef: interval([run["gold"] for run in found[kl_coef]])[0])
    print(f"\n| KL coefficient | gold minus that of {best:g}, by seed |\n|-|-|")
    for kl_coef in KL_COEFS:
        differences = [run["gold"] - other["gold"] for run, other in zip(found[kl_coef], found[best])]
        print("| {:g} | {:+.3f} ± {:.3f} |".format(kl_coef, *interval(differences)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/overoptimisation"))
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED")
    arguments = parser.parse_args()
    main(arguments.out, arguments.only)
