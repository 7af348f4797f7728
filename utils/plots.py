"""Curves of finished or running PPO runs: python -m utils.plots OUT.png RUN [RUN ...]"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (("eval/score", "reward-model score"), ("eval/gold", "gold score"), ("eval/kl", "KL to the SFT model (nats)"))


def plot_runs(out, runs):
    """One panel each for held-out score, gold and KL over episodes; a thin line per run, the mean thick."""
    curves = []
    for run in runs:
        batch_size = json.loads((Path(run) / "args.json").read_text(encoding="utf-8"))["batch_size"]
        rows = [json.loads(line) for line in open(Path(run) / "metrics.jsonl", encoding="utf-8")]
        curves.append([(row["step"] * batch_size, row) for row in rows if "eval/kl" in row])
    panels = [(key, label) for key, label in PANELS if all(key in row for curve in curves for _, row in curve)]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 2.9), squeeze=False)
    for axis, (key, label) in zip(axes[0], panels):
        for curve in curves:
            axis.plot([x for x, _ in curve], [row[key] for _, row in curve], color="tab:blue", alpha=0.35, lw=1)
        values = [{episodes: row[key] for episodes, row in curve} for curve in curves]
        shared = sorted(set.intersection(*map(set, values)))  # where all runs were evaluated
        means = [sum(run[episodes] for run in values) / len(values) for episodes in shared]
        axis.plot(shared, means, color="tab:blue", lw=2.2)
        axis.set_xlabel("episodes")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    plot_runs(sys.argv[1], sys.argv[2:])
