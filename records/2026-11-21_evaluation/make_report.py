"""A synthetic report with hostile texts in it: make_report.py REPOSITORY FOLDER PROMPTS MODELS"""

import math
import random
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from utils.report import write_page

folder, prompts, count = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
folder.mkdir(parents=True, exist_ok=True)
random.seed(1)
words = "the a post about my friend who wants to leave and I do not know what to say because it was late".split()
models = (["sft", "ppo", "dpo-beta-0.1"] + [f"ppo-seed-{i}" for i in range(100)])[: count - 1] + ["references"]
judges = ["reward_model", "vader:compound"]
hostile = ["</script><script>window.hurt = 1; alert(1)</script>", "<img src=x onerror=\"window.hurt = 1; alert(2)\">",
           "<!-- <script> -->", "a\u2028b\u2029c", "lone \ud800 surrogate", "x" * 10000, "two\n\n  lines   here"]
rows = []
for i in range(prompts):
    prompt = f"Prompt {i}: " + " ".join(random.choices(words, k=330 if prompts > 1000 else 12))
    for m, model in enumerate(models):
        length = random.randint(8, 40)
        text = " " + " ".join(random.choices(words, k=length))
        if i < len(hostile) and m == 0:
            text = hostile[i]
        ended = None if model == "references" else random.random() < 0.9
        scores = {"reward_model": random.gauss(m, 2), "vader:compound": random.uniform(-1, 1)}
        if random.random() < 0.02:
            scores["vader:compound"] = random.choice([None, math.nan, math.inf])
        rows.append({"prompt_index": i, "prompt": prompt, "model": model, "response": text, "length": length,
                     "ended": ended, "kl": None if model == "references" else random.gauss(3 * m, 1), "scores": scores,
                     "groups": {"novel": random.choice(["Emma", "Persuasion", "<b>Sense & Sensibility</b>"])}})
by = {(row["prompt_index"], row["model"]): row for row in rows}
comparisons, verdicts = [], []
for judge in [*judges, "gpt-4o-mini"]:
    for a, b in [(m, "references") for m in models[:-1]] + [tuple(models[1::-1])]:
        wins = []
        for i in range(prompts):
            draw = random.random()
            wins.append(None if draw < 0.03 else 0.5 if draw < 0.08 else float(
                random.random() < 1 / (1 + math.exp(-0.5 * (models.index(a) - 1.5)))))
        kept = [w for w in wins if w is not None]
        n, rate = len(kept), sum(kept) / len(kept)
        half = 1.96 * math.sqrt(rate * (1 - rate) / n)
        edges = [None, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, None]
        bins = []
        for low, high in zip(edges, edges[1:]):
            inside = [w for i, w in enumerate(wins) if w is not None and (
                (low is None or low <= math.log(by[i, a]["length"] / by[i, b]["length"]))
                and (high is None or math.log(by[i, a]["length"] / by[i, b]["length"]) < high))]
            r = sum(inside) / len(inside) if inside else None
            h = 1 / math.sqrt(len(inside)) if inside else None
            bins.append({"from": low, "to": high, "prompts": len(inside), "win_rate": r,
                         "low": r and max(0, r - h), "high": r and min(1, r + h)})
        groups = {f"novel={g}": {"prompts": 200, "win_rate": rate, "low": rate - 2 * half, "high": rate + 2 * half}
                  for g in ("Emma", "Persuasion")}
        comparisons.append({
            "judge": judge, "a": a, "b": b, "prompts": n, "dropped": prompts - n, "win": kept.count(1.0) / n,
            "tie": kept.count(0.5) / n, "lose": kept.count(0.0) / n, "win_rate": rate, "low": rate - half,
            "high": rate + half, "length_controlled": rate - 0.05, "length_controlled_low": rate - 0.05 - half,
            "length_controlled_high": rate - 0.05 + half, "longer": 0.53,
            "position_bias": 0.11 if judge.startswith("gpt") else None,
            "first": 0.55 if judge.startswith("gpt") else None, "by_length": bins, "groups": groups})
        verdicts.append({"judge": judge, "a": a, "b": b, "a_wins": wins})


def score(model, judge):
    values = [row["scores"][judge] for row in rows if row["model"] == model]
    values = [v for v in values if v is not None and math.isfinite(v)]
    mean = sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values)) / len(values)
    return {"mean": mean, "low": mean - half, "high": mean + half}


results = {
    "command": "python evaluate.py --models sft=runs/sft ppo=runs/ppo", "prompts": prompts,
    "reference_model": "runs/sft",
    "models": {m: {"path": f"runs/{m}", "length": 20.5 + i, "ended": None if m == "references" else 0.9,
                   "distinct_1": 0.1, "distinct_2": 0.3, "distinct_3": 0.6,
                   "kl": None if m == "references" else 0.8 * i, "kl_low": None if m == "references" else 0.8 * i - 0.2,
                   "kl_high": None if m == "references" else 0.8 * i + 0.2,
                   "rouge1": None if m == "references" else 0.3, "rouge2": None if m == "references" else 0.1,
                   "rougeL": None if m == "references" else 0.2, "scores": {j: score(m, j) for j in judges}}
               for i, m in enumerate(models)},
    "comparisons": comparisons,
    "agreement": [{"a": m, "b": "references", "judges": judges, "prompts": 400, "agreement": 0.81, "kappa": 0.6}
                  for m in models[:-1]],
    "calibration": [{"judge": "reward_model", "by": by_, "a": m, "b": "references", "bins": [
        {"from": 0.5 * k, "pairs": 200 // (k + 1), "predicted": 1 / (1 + math.exp(-0.5 * k - 0.25)),
         "accuracy": min(1, 0.5 + 0.4 * (1 - math.exp(-0.5 * k)) + random.gauss(0, 0.02))} for k in range(6)]}
        for by_ in ("vader:compound", "gpt-4o-mini") for m in models[:-1][:4]],
}
write_page(folder, results, rows, verdicts)
