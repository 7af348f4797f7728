"""How ppo.py's time grows with the batch and with the length: python -m benchmarks.ppo_growth

Batch: 32 prompt and 32 response tokens, batches of 16, 64 and 256 episodes, micro-batches of 8: scoring and training
should take the same time per counted token. Length: 16 episodes of 32 to 512 tokens, half of them response: the time
per token should be the same once attention's, which grows with the square, is taken out. One epoch, random weights of
7M parameters, fp32, one thread; the first update of a run is not counted; the sizes alternate. Training has one AdamW
step an update, whatever the batch.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.common import child, median, print_table
from benchmarks.ppo_speed import CPU, make_workload, run_ours


def workload(batch_size, length):
    return CPU | dict(prompt=(length // 2, length // 2), response_length=length // 2, batch_size=batch_size,
                      eos_probability=0.0, epochs=1)


def main(args):
    sizes = [(batch, 64) for batch in args.batches] + [(16, length) for length in args.lengths]
    runs = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as parent:
        folders = {size: Path(parent, "{}_{}".format(*size)) for size in sizes}
        for size, folder in folders.items():
            make_workload(folder, workload(*size))
        for _ in range(args.repeats):
            for size, folder in folders.items():
                run, listed = (child("ppo_growth", sys.executable, "ppo.py", folder, workload=workload(*size),
                                     products=products) for products in (False, True))  # listing takes time itself
                runs[size].append(run | {"attention": listed["attention"]})
    rows = []
    for size in sizes:
        tokens = size[0] * size[1]
        scoring, training, attention = (
            median(runs[size], name) / tokens * 1e6 for name in ("scoring", "training", "attention"))
        rows.append([*size, scoring, training, attention, training - attention])
    print(f"Microseconds per token, medians of {args.repeats} runs:\n")
    print_table(["episodes", "tokens each", "scoring", "training", "of it attention", "training less attention"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=(16, 64, 256))
    parser.add_argument("--lengths", type=int, nargs="+", default=(32, 128, 256, 512))
    parser.add_argument("--repeats", type=int, default=5)
    for name in ("side", "folder", "settings"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        result = run_ours(Path(args.folder), [], updates=2, **json.loads(args.settings))
        Path(args.folder, "result.json").write_text(json.dumps(result))
    else:
        main(args)
