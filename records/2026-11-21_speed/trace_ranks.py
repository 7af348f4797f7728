"""Seconds inside some functions of ppo.py, DeepSpeed and torch.distributed: see trace_ranks.txt. For one look."""

import collections
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, ".")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

import ppo
from benchmarks.ppo_speed import WORKLOADS, make_workload, run_ours

seconds, calls = collections.Counter(), collections.Counter()


def clocked(owner, name, label=None):
    function, label = getattr(owner, name), label or name

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[label] += time.perf_counter() - start
        calls[label] += 1
        return result

    setattr(owner, name, wrapper)


clocked(deepspeed.comm, "all_reduce", "DeepSpeed's all_reduce")
clocked(dist, "all_reduce")
clocked(torch.optim.AdamW, "step", "AdamW")
for name in ("backward", "forward"):
    clocked(DeepSpeedEngine, name)
for name in ("optimizer_step", "rollout", "score_responses"):
    clocked(ppo, name)
folder, workload = Path(sys.argv[1]), WORKLOADS[sys.argv[2]]
if not (folder / "prompts.jsonl").exists():
    make_workload(folder, workload)
result = run_ours(folder, [], workload, 3)
print("rank", os.environ["RANK"], {name: value for name, value in result.items() if isinstance(value, list)})
for name, total in seconds.most_common():
    print(os.environ["RANK"], name, calls[name], f"{total / calls[name] * 1e3:.1f} ms")
sys.stdout.flush()
os._exit(0)
