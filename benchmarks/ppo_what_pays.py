"""What each of ppo.py's optimisations is worth: python -m benchmarks.ppo_what_pays --workload mixed

Every side but the first is ppo.py with one of them undone, by a change of its text, or with a flag set; they take turns.
Times and memory as in ppo_speed.py, divided by those of ppo.py as it is.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.common import child, median, print_table
from benchmarks.ppo_speed import WORKLOADS, make_workload, run_ours

UNDONE = {  # name: [(text of ppo.py, what stands there without the optimisation), ...]
    "ended rows are decoded to the end": [("if len(going_on) < len(alive):", "if False:")],
    "logits of the prompts too": [("logits_to_keep=width + 1).logits[:, :-1]",
                                   "logits_to_keep=0).logits[:, -width - 1 : -1]")],
    "micro-batches of any lengths": [("chunks(sorted(rows, key=lambda i: -len(self.sequences[i])), size)",
                                      "chunks(rows, size)")],
    "micro-batches shortest first": [("sorted(rows, key=lambda i: -len(self.sequences[i]))",
                                      "sorted(rows, key=lambda i: len(self.sequences[i]))")],
    "queries and responses padded apart": [(
        '''        return ids, attention_mask, width, width - self.lengths[rows]
''', '''        apart = max(len(self.queries[i]) for i in rows) + width - ids.shape[1]
        ids, attention_mask = (torch.nn.functional.pad(x, (apart, 0)) for x in (ids, attention_mask))
        return ids, attention_mask, width, width - self.lengths[rows]
''')],
    "AdamW not fused": [("fused=True", "fused=False")],
    "micro-batches of at most 1,024 tokens": [
        ("chunks(sorted(rows, key=lambda i: -len(self.sequences[i])), size)",
         "by_tokens(sorted(rows, key=lambda i: -len(self.sequences[i])), self.sequences)"),
        ("# ---- Main ---", '''def by_tokens(rows, sequences):
    batches = []
    for i in rows:  # the longest first
        if not batches or (1 + len(batches[-1])) * len(sequences[batches[-1][0]]) > 1024:
            batches.append([])
        batches[-1].append(i)
    return batches


# ---- Main ---''')]}
FLAGS = {"one micro-batch": "--micro_batch_size=32", "micro-batches of 4": "--micro_batch_size=4",
         "bf16": "--bf16"}


def main(args):
    names = ["ppo.py", *(args.only or [*UNDONE, *FLAGS, "two threads"])]
    source, settings = Path("ppo.py").read_text(), dict(workload=WORKLOADS[args.workload], updates=args.updates)
    with tempfile.TemporaryDirectory() as parent:
        make_workload(Path(parent, "ppo.py"), settings["workload"])
        runs = {name: [] for name in names}
        for name in names:
            folder, text = Path(parent, name), source
            if name != "ppo.py":
                shutil.copytree(Path(parent, "ppo.py"), folder)
            for old, new in UNDONE.get(name, ()):
                if text.count(old) != 1:
                    raise SystemExit(f"{name}: ppo.py has {text.count(old)} times {old!r}")
                text = text.replace(old, new)
            Path(folder, "ppo.py").write_text(text)
        for _ in range(args.repeats):
            for name in names:
                flags = [FLAGS[name]] if name in FLAGS else []
                runs[name].append(child("ppo_what_pays", sys.executable, "ppo.py", Path(parent, name), flags=flags,
                                        threads=2 if name == "two threads" else 1, **settings))
    parts = ("update", "rollout", "scoring", "training", "memory")
    print(f"{args.workload}, in times of ppo.py as it is, medians of {args.repeats} runs of {args.updates - 1} updates:\n")
    print_table(["", *parts], [
        [name, *(median(runs[name], part) / median(runs["ppo.py"], part) for part in parts)] for name in names])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--only", nargs="+", choices=[*UNDONE, *FLAGS, "two threads"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=2)
    for name in ("side", "folder", "settings"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        sys.path.insert(0, args.folder)  # its ppo.py comes before the one of this folder
        result = run_ours(Path(args.folder), **json.loads(args.settings))
        Path(args.folder, "result.json").write_text(json.dumps(result))
    else:
        main(args)
