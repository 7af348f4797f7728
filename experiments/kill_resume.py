"""Kill runs anywhere and resume them: python -m experiments.kill_resume --script ppo --trials 20

A short run is made once without a kill, which also counts how often each place below is passed. Then, for every trial,
the run is started, and all its processes get SIGKILL, launcher and ranks, when one of them is at one of these places,
drawn with the occasion from the trial's number, or at a random time. In every second trial the resumed run is killed as well. The
last process must end the run as if nothing had happened. Compared with the run that was never killed, bit for bit:
  weights of policy, critic, group head and best policy; every file of the last checkpoint, optimizer states included;
  every line of metrics.jsonl and samples.jsonl; summary.json but for its seconds;
  and TensorBoard's curves: each step of each scalar once, in order, with the value of metrics.jsonl.
A finished trial is not repeated while the code is the same, so the command can be stopped and given again.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

FLAGS = {
    "sft": ["--model=assets/base", "--train_data={data}/train.jsonl", "--eval_data={data}/validation.jsonl",
            "--epochs=2", "--batch_size=8", "--num_samples=4", "--log_every=1"],
    "reward_model": ["--train_data={data}/preferences_train.jsonl", "--eval_data={data}/preferences_validation.jsonl",
                     "--demonstrations={data}/train.jsonl", "--epochs=2", "--batch_size=8", "--log_every=1"],
    "ppo": ["--prompts={data}/train.jsonl", "--eval_prompts={data}/validation.jsonl", "--total_episodes=48",
            "--batch_size=8", "--micro_batch_size=4", "--num_ppo_epochs=2", "--num_eval_prompts=8"],
    "dpo": ["--train_data={data}/preferences_train.jsonl", "--eval_data={data}/preferences_validation.jsonl",
            "--eval_prompts={data}/validation.jsonl", "--num_eval_prompts=8", "--epochs=2", "--batch_size=8",
            "--log_every=1", "--ref_cache={data}/ref_logprobs"]}
FLAGS["group_invariant_ppo"] = [*FLAGS["ppo"], "--episodes_per_prompt=3", "--beta_policy=0.6"]
COMMON = ["--save_every=2", "--eval_every=3"]  # of six steps
PLACES = {  # where: (module, name of what is called there, whether the kill comes before, after or in the middle of it)
    "before a training step": ("SCRIPT", "optimizer_step", "before"),
    "inside an update": ("torch.optim.AdamW", "step", "after"),
    "inside a rollout": {"ppo": ("SCRIPT", "inverse_cdf", "before"),
                         "group_invariant_ppo": ("SCRIPT", "inverse_cdf", "before"),
                         "sft": ("SCRIPT", "decode_responses", "before"),
                         "reward_model": ("SCRIPT", "score_sequences", "before"),
                         "dpo": ("SCRIPT", "decode_responses", "before")},
    "before a line of metrics": ("utils.run.Tracker", "log", "before"),
    "half a file into a checkpoint": ("torch", "save", "middle"),
    "before the checksums are on disk": ("os", "fsync", "before"),
    "before a checkpoint's rename": ("pathlib.Path", "rename", "before"),
    "after a checkpoint's rename": ("pathlib.Path", "rename", "after"),
    "while an old checkpoint is deleted": ("shutil", "rmtree", "middle"),
    "inside a line of metrics.jsonl": ("json", "dumps", "line"),
    "before a written file is put in its place": ("os", "replace", "before"),
    "while metrics.jsonl is cut for the resumed run": ("utils.run", "_write", "before"),
    "before the last weights": ("SCRIPT", "save_model", "before"),
    "before the model card": ("SCRIPT", "model_card", "before"),
    "before the summary": ("utils.run.Tracker", "close", "before"),
    "at a random time": None}


# ---- One process ------------------------------------------------------------------------------------------


def find(script, module):
    """The module or class of a place."""
    if module == "SCRIPT":
        return importlib.import_module(script)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        parent, _, name = module.rpartition(".")
        return getattr(importlib.import_module(parent), name)


def kill_all(root):
    """SIGKILL for a process, before it can react to the end of another, and for all that it has started, in whatever
    group; this process alone is left."""
    started = [process for process in root.children(recursive=True) if process.pid != os.getpid()]
    for process in [root] * (root.pid != os.getpid()) + started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=60)


def kill_everything():
    """From inside: the launcher and the other ranks, then this process."""
    me = psutil.Process()
    kill_all(me.parent() if "TORCHELASTIC_RUN_ID" in os.environ else me)
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle(name, args):
    """Half of what the function does."""
    if name == "save":
        whole = Path(args[1])
        original_save(*args)
        with open(whole, "r+b") as file:
            file.truncate(whole.stat().st_size // 2)
    elif name == "rmtree":
        files = sorted(file for file in Path(args[0]).rglob("*") if file.is_file())
        for file in files[: (len(files) + 1) // 2]:
            file.unlink()


def worker(script, place, occasion, counts_file, flags):
    """Run a script and kill all its processes at the n-th passage of a place; or count all passages (place None)."""
    global original_save
    import torch

    original_save, passed = torch.save, Counter()
    sys.argv = [f"{script}.py", *flags]

    def watch(where, module, name, when):
        owner = find(script, module)
        original = getattr(owner, name)

        def function(*args, **kwargs):
            passed[where] += 1
            now = where == place and passed[where] == occasion
            if now and when == "middle":
                in_the_middle(name, args)
            metrics = Path(next(flag.partition("=")[2] for flag in flags if "--output_dir" in flag), "metrics.jsonl")
            if now and when == "line" and metrics.exists():
                with open(metrics, "a") as file:
                    file.write(original(*args)[:20])
            if now and when != "after":
                kill_everything()
            result = original(*args, **kwargs)
            if now:
                kill_everything()
            return result

        setattr(owner, name, function)

    module = importlib.import_module(script)
    for where, at in PLACES.items():
        at = at[script] if isinstance(at, dict) else at
        if at and place in (None, where):
            watch(where, *at)
    module.main(module.tyro.cli(module.Args))
    if counts_file and int(os.environ.get("RANK", 0)) == 0:
        Path(counts_file).write_text(json.dumps(passed))


# ---- Trials -----------------------------------------------------------------------------------------------


class Runs:
    """Starts one script with one number of ranks and ZeRO stage."""

    def __init__(self, out, script, ranks, zero):
        self.script, self.ranks, self.out = script, ranks, out / f"{script}_{ranks}_zero{zero}"
        data = out / "data"
        data.mkdir(parents=True, exist_ok=True)
        for file, rows in (("train", 24), ("validation", 8), ("preferences_train", 24), ("preferences_validation", 8)):
            lines = Path("assets/data", f"{file}.jsonl").read_text().splitlines(keepends=True)
            (data / f"{file}.jsonl").write_text("".join(lines[:rows]))
        self.flags = [flag.format(data=data) for flag in FLAGS[script]] + COMMON + [f"--zero_stage={zero}"]

    def start(self, folder, place=None, occasion=0, after=None, counts=None):
        """The script, with its launcher if there is one, until it ends or is killed. Returns (exit code, seconds)."""
        resume = ["--resume"] if (folder / "args.json").exists() else ["--overwrite"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        command = [sys.executable, *(launcher if self.ranks > 1 else []), "-m", "experiments.kill_resume", "--worker",
                   json.dumps([self.script, place, occasion, counts, [*self.flags, f"--output_dir={folder}", *resume]])]
        began = time.time()
        with open(f"{folder}.log", "a") as log:
            process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, env={
                **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                kill_all(psutil.Process(process.pid))
            process.wait()
        return process.returncode, time.time() - began

    def reference(self):
        """The run that is never killed: its folder, seconds, and how often each place is passed."""
        folder, record = self.out / "whole", self.out / "whole.json"
        code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(  # of other code, results say nothing
            [*Path(".").glob("*.py"), *Path("utils").glob("*.py"), Path(__file__)]))).hexdigest()
        if not record.exists() or json.loads(record.read_text())["code"] != code:
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir()
            failed, seconds = self.start(folder, counts=str(self.out / "counts.json"))
            if failed:
                raise SystemExit(f"the run without a kill failed: see {folder}.log")
            counts = json.loads((self.out / "counts.json").read_text())
            record.write_text(json.dumps({"seconds": seconds, "counts": counts, "code": code}))
        return folder, json.loads(record.read_text())

    def trial(self, number):
        """Kill at the number-th place, in odd trials also at one drawn; returns what was done and what differs."""
        draw, places = random.Random(number), [
            place for place in PLACES if PLACES[place] is None or self.reference()[1]["counts"].get(place)]
        first = places[number % len(places)]
        if first == "while metrics.jsonl is cut for the resumed run":  # so something has to be killed before
            return self.killed(number, ["before a training step", first], draw)
        return self.killed(number, [first, draw.choice(places)][: 1 + number % 2], draw)

    def killed(self, number, at, draw):
        whole, record = self.reference()
        folder = self.out / f"trial_{number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.out.parent / "data/ref_logprobs", ignore_errors=True)  # dpo.py's cache: each trial makes it
        kills, code = [], None
        for place in at:
            if PLACES[place] is None:
                after = draw.uniform(0.3, 0.9) * record["seconds"]
                code, _ = self.start(folder, after=after)
                kills.append([place, f"{after:.1f} s", code == -signal.SIGKILL])
            else:
                most = 3 if "is cut" in place else record["counts"][place]  # metrics, times and samples
                occasion = draw.randint(1, most)
                code, _ = self.start(folder, place, occasion)
                kills.append([place, f"{occasion} of {most}", code == -signal.SIGKILL])
            if not kills[-1][2]:  # nothing was left to kill, or the run failed
                break
        if kills[-1][2]:
            code, _ = self.start(folder)
        return {"trial": number, "kills": kills, "code": code, "differs": differences(whole, folder)}


def differences(whole, folder):
    """What of a run is not as in the one that was never killed."""
    differs = []
    for name in ("model.safetensors", "critic/model.safetensors", "group_head.safetensors", "best/model.safetensors",
                 "metrics.jsonl", "samples.jsonl"):
        one, other = (file.read_bytes() if file.exists() else None for file in (whole / name, folder / name))
        if one != other:
            differs.append(name)
    if not (folder / "summary.json").exists():
        return [*differs, "no summary.json"]
    one, other = (json.loads((path / "summary.json").read_text()) | {"seconds_this_process": 0}
                  for path in (whole, folder))
    if one != other:
        differs.append("summary.json")
    one, other = (max((path / "checkpoints").glob("step_*")) for path in (whole, folder))
    if one.name != other.name:
        return [*differs, f"last checkpoint {other.name}"]
    for file in sorted(one.rglob("*")):
        if file.is_file() and file.name != "sha256.json" and not same(file, other / file.relative_to(one)):
            differs.append(f"checkpoint {file.relative_to(one)}")
    return differs + tensorboard_differs(folder)


def same(one, other):
    """Whether two files of checkpoints hold the same: bytes, or where those differ every tensor and number in them."""
    if one.read_bytes() == other.read_bytes():
        return True
    import torch

    if one.suffix != ".pt":
        return False

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        if hasattr(a, "__dict__") and not callable(a):
            return type(a) is type(b) and equal(vars(a), vars(b))
        return type(a) is type(b) and a == b

    return equal(*(torch.load(file, weights_only=False) for file in (one, other)))


def tensorboard_differs(folder):
    """Scalars whose curve in TensorBoard, with what a restart purges gone, is not that of metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = {}
    for row in map(json.loads, open(folder / "metrics.jsonl")):
        for key, value in row.items():
            expected.setdefault(key, []).append((row["step"], value))
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    differs = []
    for key, curve in expected.items():
        shown = [(event.step, event.value) for event in events.Scalars(key)] if key != "step" else []
        if key != "step" and shown != [(step, float(np.float32(value))) for step, value in curve]:
            differs.append(f"TensorBoard {key}")
    return differs


def main(args):
    runs = Runs(args.out, args.script, args.ranks, args.zero_stage)
    runs.reference()
    results = runs.out / "results.jsonl"
    done = [json.loads(line) for line in open(results)] if results.exists() else []
    for number in range(len(done), args.trials):
        done.append(runs.trial(number))
        with open(results, "a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        if not done[-1]["differs"]:
            shutil.rmtree(runs.out / f"trial_{number}")
    good = 0
    print(f"{args.script}.py, {args.ranks} rank(s), ZeRO {args.zero_stage}\n\n| trial | killed | end |\n|-|-|-|")
    for row in done[: args.trials]:
        kills = "; ".join(f"{place} ({occasion})" if hit else f"not reached: {place}"
                          for place, occasion, hit in row["kills"])
        good += row["kills"][0][2] and row["code"] == 0 and not row["differs"]
        print(f"| {row['trial']} | {kills} | {', '.join(row['differs']) or 'the same bits'} |")
    print(f"\n{good} of {args.trials} runs end with the bits of the run that was never killed")
    raise SystemExit(good < args.trials)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=FLAGS, default="ppo")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill_resume"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    worker(*json.loads(args.worker)) if args.worker else main(args)
