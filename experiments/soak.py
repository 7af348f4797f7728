"""Does anything grow over a long run? python -m experiments.soak

2,000 small updates of ppo.py on the embedded models, with an evaluation and a checkpoint every 100, in one process.
After every update: resident memory, open files, bytes of the folder (checkpoints apart from the logs), seconds.
Asked beforehand: memory at update 200 and at the end within 2 %, as many open files, seconds flat, two checkpoints.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import ppo


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def size_mib(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def main(args):
    folder, rows, before = args.out / "run", [], [time.perf_counter()]

    class Tracker(ppo.Tracker):
        def line(self, step, *_, **__):
            now, checkpoints = time.perf_counter(), size_mib(folder / "checkpoints")
            rows.append([step, resident_mib(), len(os.listdir("/proc/self/fd")), checkpoints,
                         size_mib(folder) - checkpoints, now - before[0]])
            before[0] = time.perf_counter()

    ppo.Tracker = Tracker
    ppo.main(ppo.Args(
        output_dir=str(folder), overwrite=True, total_episodes=4 * args.updates, batch_size=4, response_length=8,
        num_ppo_epochs=1, num_eval_prompts=4, eval_every=100, save_every=100))
    with open(args.out / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print("\n| update | resident MiB | open files | checkpoints, MiB | all else, MiB | seconds, median of 100 updates |\n"
          "|-|-|-|-|-|-|")
    for row in rows[99::100]:
        seconds = statistics.median(other[5] for other in rows[row[0] - 100 : row[0]])
        print("| {} | {:.1f} | {} | {:.1f} | {:.2f} | {:.4f} |".format(*row[:5], seconds))
    early, late = (rows[min(n, len(rows)) - 1] for n in (200, args.updates))
    growth, kept = late[1] / early[1] - 1, len(list((folder / "checkpoints").iterdir()))
    slower = statistics.median(row[5] for row in rows[-500:]) / statistics.median(row[5] for row in rows[:500])
    print(f"\nresident memory {growth:+.2%} from update {early[0]} to {late[0]}; open files {early[2]} and {late[2]}; "
          f"seconds of the last 500 updates {slower:.2f} of those of the first 500; {kept} checkpoints")
    raise SystemExit(not (abs(growth) < 0.02 and early[2] == late[2] and slower < 1.2 and kept <= 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000, help="more than 1,000, or nothing is compared")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    main(parser.parse_args())
