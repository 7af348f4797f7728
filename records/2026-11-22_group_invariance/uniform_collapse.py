"""How small the smaller group gets: PYTHONPATH=.:tests python records/2026-11-22_group_invariance/uniform_collapse.py

64 returns N(0, 1); a group head on (return, noise) climbs the gradient of the variance for 1200 steps, as in tests.
"""

import torch
from test_group_invariant_ppo import ascend

print("| seed | mass: rows of the smaller group | its share | uniform: rows | share |\n|-|-|-|-|-|")
for seed in range(8):
    returns = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    cells = []
    for kind in ("mass", "uniform"):
        labels = ascend(returns, kind, 1200, seed)
        cells += [f"{int(torch.bincount(labels.argmax(1), minlength=2).min())}", f"{float(labels.mean(0).min()):.2f}"]
    print(f"| {seed} | {' | '.join(cells)} |")
