"""Two ranks of ppo.py beside two processes of matrix products: python -m benchmarks.ppo_ranks --workload mixed

The cores of one machine share memory and clock, so two processes that have nothing to do with each other do not get
twice the work done either. Their speed-up, on the products that a micro-batch is made of, is the most that two ranks can
reach; that of ppo.py on the same batch is compared with it, and with two runs of ppo.py that know nothing of each other
(more than products, they wait for the memory that the cores share). One thread a process; everything alternates.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import child, median, now, print_table
from benchmarks.ppo_speed import WORKLOADS, make_workload, run_ours

PRODUCTS = ((896, 256, 1024), (896, 1024, 256), (1024, 896, 256))  # m, k, n of a layer's MLP: forward, inputs, weights


def product_seconds():
    import torch

    torch.set_num_threads(1)
    pairs = [(torch.randn(m, k), torch.randn(k, n)) for m, k, n in PRODUCTS]
    start = now()
    for _ in range(1000):
        for a, b in pairs:
            a @ b
    return now() - start


def at_once(number):
    """Seconds of the products in each of so many processes at once: their mean."""
    command = [sys.executable, "-m", "benchmarks.ppo_ranks", "--side", "products"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                 for _ in range(number)]
    return statistics.mean(float(process.communicate()[0]) for process in processes)


def two_ranks(folder, settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
               "benchmarks.ppo_ranks", "--side", "ppo.py", "--folder", str(folder), "--settings", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"two ranks failed:\n{done.stderr[:3000]}")
    return json.loads(Path(folder, "result.json").read_text())


def main(args):
    settings = dict(workload=WORKLOADS[args.workload], updates=args.updates)
    ones, twos, strangers, alone, together = [], [], [], [], []
    with tempfile.TemporaryDirectory() as parent:
        folder, copy = Path(parent, "a"), Path(parent, "b")
        make_workload(folder, settings["workload"])
        shutil.copytree(folder, copy)

        def one_rank(folder):
            return child("ppo_ranks", sys.executable, "ppo.py", folder, **settings)

        for _ in range(args.repeats):
            alone.append(at_once(1))
            together.append(at_once(2))
            ones.append(one_rank(folder))
            twos.append(two_ranks(folder, settings))
            with ThreadPoolExecutor() as pool:
                strangers += pool.map(one_rank, (folder, copy))
    names = ("update", "rollout", "scoring", "training")
    print(f"{args.workload}: medians of {args.repeats} runs of {args.updates - 1} updates each\n")
    speedups = [median(ones, name) / median(twos, name) for name in names]
    print_table(["seconds", *names], [["1 rank", *(median(ones, name) for name in names)],
                                      ["2 ranks", *(median(twos, name) for name in names)],
                                      ["speed-up", *speedups]])
    products = 2 * statistics.median(alone) / statistics.median(together)
    runs = 2 * median(ones, "update") / median(strangers, "update")
    print_table(["speed-up of", "", "two ranks, of it"], [
        ["two processes of matrix products", products, speedups[0] / products],
        ["two runs of ppo.py", runs, speedups[0] / runs]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=3)
    for name in ("side", "folder", "settings"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "products":
        print(product_seconds())
    elif args.side:
        result = run_ours(Path(args.folder), [], **json.loads(args.settings))
        if int(os.environ.get("RANK", 0)) == 0:
            Path(args.folder, "result.json").write_text(json.dumps(result))
    else:
        main(args)
