"""Figures of the embedded task: python assets/measure.py [RUN ...] reads assets/ and finished PPO runs.

Definitions: positive = VADER compound >= 0.05; 500 held-out openings continued with fixed noise at temperature 0.7;
KL = sum over tokens, mean over sequences; 95 % intervals by bootstrap over openings (the first two words).
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

import torch

from reward_model import Args as RewardArgs
from reward_model import ScalarModel, clustered_interval, evaluate, load_pairs
from sft import Args as SFTArgs
from sft import evaluate_loss, load_demonstrations
from utils.models import load_causal_lm, load_classifier, load_tokenizer


class Engine(torch.nn.Module):
    """What the scripts' evaluations use of a DeepSpeed engine: calls, and a device."""

    def __init__(self, module):
        super().__init__()
        self.module, self.device = module, torch.device("cpu")

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def sft_figures():
    """Bits per character on held-out openings and on the held-out novel (all tokens but the first, EOS included)."""
    tokenizer = load_tokenizer(str(ASSETS / "sft"), "assets/sft")
    model = Engine(load_causal_lm(str(ASSETS / "sft"), "assets/sft", tokenizer).eval())
    for split in ("validation", "persuasion"):
        items = load_demonstrations(str(ASSETS / "data" / f"{split}.jsonl"), split, tokenizer, SFTArgs())
        loss = float(evaluate_loss(model, items, tokenizer, SFTArgs())["eval/loss"])
        tokens = sum(len(ids) - 1 for ids, _, _ in items)
        characters = sum(len(row["prompt"] + row["completion"]) for _, _, row in items)
        bits = loss * tokens / characters / math.log(2)
        print(f"sft {split}: loss {loss:.4f} nats per token, {bits:.3f} bits per character")


@torch.no_grad()
def reward_model_figures():
    """Accuracy on held-out pairs, each set and both together."""
    tokenizer = load_tokenizer(str(ASSETS / "reward_model"), "assets/reward_model")
    model = Engine(ScalarModel(load_classifier(str(ASSETS / "reward_model"), "assets/reward_model", tokenizer)).eval())
    sets = {split: load_pairs(str(ASSETS / "data" / f"preferences_{split}.jsonl"), split, tokenizer, RewardArgs())
            for split in ("validation", "persuasion")}
    for name, pairs in {**sets, "both": sets["validation"] + sets["persuasion"]}.items():
        metrics, _, _ = evaluate(model, pairs, tokenizer, RewardArgs(), shuffle=True)
        print(f"reward model {name} ({len(pairs)} pairs): " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))


def ppo_figures(run):
    """Held-out figures of a run, at every evaluation."""
    rows = [json.loads(line) for line in open(Path(run) / "samples.jsonl")]
    distinct = {r["step"]: r["eval/distinct_starts"] for r in map(json.loads, open(Path(run) / "metrics.jsonl"))
                if "eval/distinct_starts" in r}
    entropy = {r["step"]: r["policy/entropy_avg"] for r in map(json.loads, open(Path(run) / "metrics.jsonl"))
               if "policy/entropy_avg" in r}
    for step in sorted({row["step"] for row in rows}):
        mine = [row for row in rows if row["step"] == step]
        figures = []
        for key, name in (("gold", "positive"), ("kl", "KL"), ("score", "score"), ("length", "tokens")):
            values = np.array([row[key] for row in mine])
            low, high = clustered_interval(values, [row["query"] for row in mine])
            figures.append(f"{name} {values.mean():.3f} [{low:.3f}, {high:.3f}]")
        print(f"{run} update {step}: " + ", ".join(figures) + f", distinct 4-token starts {distinct[step]:.3f}"
              + (f", token entropy {entropy[step]:.2f}" if step in entropy else ""))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sft_figures()
    reward_model_figures()
    for folder in sys.argv[1:]:
        ppo_figures(folder)
