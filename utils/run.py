"""A run's folder: where it is written, checkpoints that can be trusted, exact resume, metrics and samples."""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import select
import shutil
import signal
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import torch

from utils.formats import template_date
from utils.launch import all_max, barrier, fail, finish, from_rank0, gather_rows, print0, rank, world_size

_locked = []  # the open folder of this process's run

# Flags that may change when a run is resumed: they alter no weight.
FREE_ON_RESUME = {
    "output_dir", "resume", "overwrite", "save_every", "eval_every", "log_every", "local_rank", "timeout_minutes",
    "allow_pickle"}
NO_FLAGS = {"template_date", "data"}  # what args.json has beside them


# ---- The folder -------------------------------------------------------------------------------------------


def choose_folder(args, name):
    """Decide on the folder of this run of NAME.py, and change nothing yet. Returns its Path.

    Without --output_dir: the first free one of runs/NAME, runs/NAME-2, ..., or the last existing one to resume.
    Also decides what chat templates print as today's date: the day on which the run began, or that of the run which
    trained its model.
    A folder in use is refused unless --resume or --overwrite is given; --overwrite replaces earlier runs only, and
    none that this run reads from.
    """

    resume = getattr(args, "resume", False)  # evaluate.py has none

    def decide():  # on rank 0; returns (folder, what is wrong or None)
        last = Path(args.output_dir) if args.output_dir else _numbered(name, existing=True)
        if _to_do_again(last, args, name):
            return last, None
        folder = last if args.output_dir or resume else _numbered(name, existing=False)
        record = folder / "args.json"
        if resume:
            if not record.is_file():
                return folder, f"--resume: there is no run in {folder} to resume. Give its --output_dir"
            before, now = _read_record(record), _comparable(args, name)
            if before.get("script") != name:
                return folder, f"--resume {folder}: this is not a run of {name}.py. Give the --output_dir of one"
            changed = [f"--{key} {before.get(key)} -> {now.get(key)}" for key in sorted(set(before) | set(now))
                       if key not in FREE_ON_RESUME | NO_FLAGS and before.get(key) != now.get(key)]
            if changed:
                return folder, (f"--resume {folder}: the run was started with other settings ({'; '.join(changed)}). "
                                "Resume with the same, or start a new run in another --output_dir")
            if (folder / "summary.json").is_file():
                return folder, f"--resume {folder}: this run is complete, there is nothing to resume"
            return folder, None
        if folder.exists() and not (folder.is_dir() and _is_empty(folder)):
            if not args.overwrite:
                go_on = "Continue that run with --resume, replace" if hasattr(args, "resume") else "Replace"
                return folder, f"--output_dir {folder}: in use. {go_on} it with --overwrite, or choose another folder"
            if "script" not in _read_record(record):
                return folder, f"--overwrite {folder}: this is not a run of these scripts, so it is left alone"
            for flag, path in _paths(args):
                if folder.resolve() in (path.resolve(), *path.resolve().parents):
                    return folder, f"--overwrite {folder}: --{flag} {path} lies in it. Choose another --output_dir"
        return folder, None

    def decide_or_say():
        try:
            return decide()
        except OSError as error:
            return None, f"--output_dir {args.output_dir}: {error.strerror}"

    def decide_with_date():
        folder, wrong = decide_or_say()
        model = getattr(args, "model", None) or getattr(args, "sft_model", None) or args.models[0]
        goes_on = not wrong and (resume or _to_do_again(folder, args, name))
        return folder, wrong, _read_record((folder if goes_on else Path(model)) / "args.json").get("template_date")

    folder, wrong, date = from_rank0(decide_with_date)
    if wrong:
        fail(wrong)
    template_date[0] = datetime.fromisoformat(date or from_rank0(lambda: datetime.now().isoformat("T", "seconds")))
    return folder


def open_folder(folder, args, name, data=None):
    """Make the folder of a new run, without what --overwrite replaces, and write args.json.

    data: {flag: rows as the run reads them, with their token ids}. A resumed run must read the same.
    """

    def make():  # on rank 0; returns what is wrong or None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"cannot make this folder ({error.strerror})"
        if not _lock(folder):
            return "another process is writing there. Wait for its end, or choose another folder"
        if getattr(args, "resume", False):
            if (folder / "summary.json").exists():
                return "the run has come to its end in the meantime, there is nothing to resume"
            before = _read_record(folder / "args.json").get("data", {})
            changed = [f"{flag} {getattr(args, flag.removeprefix('--'))}" for flag, digest in hashes(data).items()
                       if before.get(flag, digest) != digest]
            if changed:
                return (f"--resume: the rows of {', '.join(changed)} are not those that the run began with: the file, "
                        "the tokenizer or its chat template has changed. Put back what was there, or start a new run")
            (folder / "INTERRUPTED").unlink(missing_ok=True)
            return None
        if not (args.overwrite or _is_empty(folder) or _to_do_again(folder, args, name)):
            return "no longer empty. Give this run a folder of its own"  # the models took minutes to load
        # first this, so that after a kill in the next lines the same command with --overwrite finds a run to replace
        _write(folder / "args.json", json.dumps({"script": name}))
        for old in folder.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            elif old.name != "args.json":
                old.unlink()
        record = {**_comparable(args, name), "template_date": template_date[0].isoformat("T", "seconds"),
                  "data": hashes(data)}
        _write(folder / "args.json", json.dumps(record, indent=1) + "\n")

    wrong = from_rank0(make)
    if wrong:
        fail(f"--output_dir {folder}: {wrong}")


def hashes(data):
    """{flag: SHA-256 of its rows}."""
    found = {}
    for flag, rows in (data or {}).items():
        digest = hashlib.sha256()
        for row in rows.items() if isinstance(rows, dict) else rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        found[flag] = digest.hexdigest()
    return found


def _is_empty(folder):
    return not {file.name for file in folder.iterdir()} - {"args.json.unfinished"}


def _lock(folder):
    """Whether this process alone may write to a folder, until it ends or opens another one."""
    while _locked:
        os.close(_locked.pop())
    _locked.append(os.open(folder, os.O_RDONLY))
    try:
        fcntl.flock(_locked[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _to_do_again(folder, args, name):
    """Whether this is an evaluation with the same flags that was cut off: it keeps nothing but args.json of worth."""
    record = {**_read_record(folder / "args.json"), "overwrite": args.overwrite}
    record = {key: value for key, value in record.items() if key not in NO_FLAGS}
    return not hasattr(args, "resume") and record == _comparable(args, name) and not (folder / "summary.json").exists()


def _numbered(name, existing):
    number = 1
    while (Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    number = max(1, number - 1) if existing else number
    return Path("runs") / (name if number == 1 else f"{name}-{number}")


def _comparable(args, name):
    return json.loads(json.dumps({"script": name, **dataclasses.asdict(args), "world_size": world_size()}))


def _read_record(file):
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _paths(args):
    """(flag, Path) of every flag that names something on this disk, but for the output folder."""
    for flag, value in vars(args).items():
        for part in value if isinstance(value, tuple) else [value]:
            for name in {part, part.partition(":")[0]} if isinstance(part, str) and flag != "output_dir" else ():
                if name and Path(name).exists():
                    yield flag, Path(name)


# ---- Checkpoints ------------------------------------------------------------------------------------------


def save_checkpoint(folder, step, engines, state):
    """Write checkpoints/step_N complete or not at all, and keep the last two [E19]. Every rank must call it.

    engines: {name: DeepSpeed engine}; state: JSON-able values of the script. DeepSpeed writes weights, fp32 master
    weights and optimizer state, in pieces at ZeRO 2 and 3. The files are pickles: load only your own.
    """
    checkpoints = folder / "checkpoints"
    unfinished, finished = checkpoints / f"unfinished_{step:07d}", checkpoints / f"step_{step:07d}"
    if rank() == 0:
        for leftover in checkpoints.glob("unfinished_*"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
    barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(unfinished), tag=name, save_latest=False)
    barrier()
    if rank() == 0:
        (unfinished / "state.json").write_text(json.dumps({**state, "step": step}), encoding="utf-8")
        sums = {str(file.relative_to(unfinished)): _sha256(file) for file in _files(unfinished)}
        (unfinished / "sha256.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for file in _files(unfinished):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(finished, ignore_errors=True)  # there after a resume from before it: it was damaged
        unfinished.rename(finished)
        known = sorted(checkpoints.glob("step_[0-9]*"))
        place = known.index(finished)
        for other in known[: max(0, place - 1)] + known[place + 1 :]:  # later ones are damaged
            shutil.rmtree(other)
    barrier()


def load_checkpoint(folder, engines):
    """Load the newest checkpoint whose checksums hold into the engines. Returns its state, or None if there is none."""

    def newest():  # on rank 0
        for checkpoint in sorted((folder / "checkpoints").glob("step_[0-9]*"), reverse=True):
            try:
                sums = _read_record(checkpoint / "sha256.json")
                if "state.json" in sums and all(_sha256(checkpoint / name) == value for name, value in sums.items()):
                    return checkpoint
            except (OSError, ValueError):
                pass
            print0(f"warning: {checkpoint} is damaged; trying the one before")
        return None

    checkpoint = from_rank0(newest)
    if checkpoint is None:
        print0(f"{folder} has no complete checkpoint: starting from the first step")
        return None
    for name, engine in engines.items():
        engine.load_checkpoint(str(checkpoint), tag=name)
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def make_folder(path, flag):
    """Create a folder on rank 0, or end every rank in one line."""

    def make():
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return error.strerror

    wrong = from_rank0(make)
    if wrong:
        fail(f"{flag} {path}: cannot make this folder ({wrong})")


def cached_array(file, name, make):
    """The array of an .npz file, or where that is missing or damaged the one that make() returns, written there.

    Every rank must call it; make() may use collectives. Zip files carry checksums, so damage is noticed.
    """

    def read():  # on rank 0
        try:
            return np.load(file)["array"] if file.exists() else None
        except Exception:  # what zipfile and numpy raise depends on which byte is wrong
            print0(f"warning: {file} is damaged; computing it again")

    array = from_rank0(read)
    print0(f"{'cache':<22}{name}: {'computed now, to be kept in' if array is None else 'read from'} {file}")
    if array is None:
        array = make()
        if rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
            with open(unfinished, "wb") as handle:
                np.savez(handle, array=array)
            unfinished.rename(file)
    return array


# ---- SIGTERM ----------------------------------------------------------------------------------------------

_sigterm, _nothing_to_lose = threading.Event(), threading.Event()  # it has come; what it is to save is saved


def _note_sigterm(*_):
    _sigterm.set()


def _watch_sigterm(signals, beside):
    """A thread that reads the numbers of signals as they come, and the first SIGTERM makes `interrupted` true.

    It ends the process, with code 143, on another SIGTERM more than five seconds later, and on one after which a rank
    on the same machine is dead (beside: their psutil.Processes): the others may wait for it inside a collective, where
    no signal handler written in Python ever runs, and the deepspeed launcher gives each of them 30 seconds in turn.
    """
    first, poll = None, select.poll()
    poll.register(signals)
    while True:
        signum = os.read(signals, 1) if poll.poll(first and 1000) else None  # every second once it has come
        if signum == b"" or _nothing_to_lose.is_set():  # closed at the end of the run
            return
        again = signum == bytes([signal.SIGTERM])
        if again and first is None:
            first, again = time.time(), False
            _sigterm.set()
        dead = first and not all(map(_alive, beside))
        if dead or again and time.time() - first > 5:  # launchers send a second one at once
            os._exit(128 + signal.SIGTERM)


def _alive(process):
    try:
        return process.is_running() and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def _ranks_beside():
    """psutil.Process of every other rank on this machine. Every rank must call it."""
    beside = []
    for pid, born in gather_rows([(os.getpid(), psutil.Process().create_time())]):
        if pid != os.getpid() and psutil.pid_exists(pid) and psutil.Process(pid).create_time() == born:
            beside.append(psutil.Process(pid))
    return beside


def _hold_sigterm(how=signal.SIG_BLOCK):
    signal.pthread_sigmask(how, [signal.SIGTERM])


def _leave_to_parent():
    """In a forked process, of a judge say: SIGTERM ends it as any other, and it does not hold the folder."""
    if signal.getsignal(signal.SIGTERM) is _note_sigterm:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while _locked:
        os.close(_locked.pop())
    _hold_sigterm(signal.SIG_UNBLOCK)


os.register_at_fork(
    before=_hold_sigterm, after_in_parent=lambda: _hold_sigterm(signal.SIG_UNBLOCK), after_in_child=_leave_to_parent)


class Interrupted(Exception):
    """SIGTERM has come in the middle of a long evaluation, on every rank at the same place."""


def interrupted(device):
    """Whether any rank has got SIGTERM, as machines that are taken back send it. Every rank must call it, each step."""
    return bool(all_max(torch.tensor(float(_sigterm.is_set()), device=device)))


def leave_interrupted(folder, step):
    """End after SIGTERM, with the checkpoint of this step complete: a file INTERRUPTED, exit code 75 ("try again")."""
    _nothing_to_lose.set()
    if rank() == 0:
        _write(folder / "INTERRUPTED", f"by SIGTERM; the checkpoint of step {step} is complete. Go on with --resume\n")
    print0(f"SIGTERM: stopped after step {step}, go on with --resume --output_dir {folder}")
    finish()
    raise SystemExit(75)


# ---- Files ------------------------------------------------------------------------------------------------


def _write(file, text):
    """Write a small file whole or not at all: whoever is killed here leaves the file as it was."""
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def _files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(file):
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- Metrics ----------------------------------------------------------------------------------------------


class Tracker:
    """metrics.jsonl, samples.jsonl, TensorBoard and console lines of one run, on rank 0. Other ranks write nothing.

    Metrics go to metrics.jsonl, the same bits in a resumed run; `time/...` figures go to times.jsonl.
    """

    def __init__(self, folder, args, first_step, evaluated=True):
        """Rows from first_step on are dropped, and unless `evaluated` also the evaluation of the step before it."""
        self.folder, self.first_step, self.started = folder, first_step, time.time()
        self.last = {}
        _sigterm.clear()
        _nothing_to_lose.clear()
        signals, self.signals = os.pipe()  # from here on there are steps that ask `interrupted`
        os.set_blocking(self.signals, False)
        threading.Thread(target=_watch_sigterm, args=[signals, _ranks_beside()], daemon=True).start()
        signal.set_wakeup_fd(self.signals)
        signal.signal(signal.SIGTERM, _note_sigterm)
        self.active = rank() == 0
        if not self.active:
            return
        for name in ("metrics.jsonl", "times.jsonl", "samples.jsonl"):  # drop rows after the resumed checkpoint
            _keep_rows_before(folder / name, first_step, evaluated)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        rows = "\n".join(f"|{key}|{_cell(str(value))}|" for key, value in vars(args).items())
        self.writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}", first_step)

    def log(self, step, metrics):
        """Write one row of scalars (numbers or one-element tensors) for this step. Returns it as floats."""
        metrics = {key: float(value) for key, value in metrics.items()}
        bad = next((key for key, value in metrics.items() if not math.isfinite(value)), None)
        if bad:  # losses and gradients were looked at before: this is an evaluation
            fail(f"step {step}: {bad} is {metrics[bad]}. The weights, or the held-out rows, make numbers that are not "
                 "finite; checkpoints are untouched")
        self.last.update(metrics)
        if self.active:
            for name, is_time in (("metrics.jsonl", False), ("times.jsonl", True)):
                row = {key: value for key, value in metrics.items() if key.startswith("time/") == is_time}
                if row:
                    with open(self.folder / name, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"step": step, **row}) + "\n")
            for key, value in metrics.items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()
        return metrics

    def samples(self, step, rows):
        """Append sample rows (dicts) to samples.jsonl and show the first ten as a TensorBoard text table."""
        if self.active and rows:
            with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
            head = "|" + "|".join(rows[0]) + "|\n" + "|-" * len(rows[0]) + "|\n"
            cells = ("|" + "|".join(_cell(value) for value in row.values()) + "|" for row in rows[:10])
            self.writer.add_text("samples", head + "\n".join(cells), step)
            self.writer.flush()

    def line(self, step, last_step, **figures):
        """One aligned console line with the time left: figures are name=(value, format), None values left out."""
        done = step - max(1, self.first_step) + 1
        left = (time.time() - self.started) / done * (last_step - step)
        text = "  ".join(f"{name} {value:{spec}}" for name, (value, spec) in figures.items() if value is not None)
        print0(f"{step:>6}/{last_step}  {text}  left {int(left) // 60}:{int(left) % 60:02d}")

    def close(self, summary):
        """Write summary.json last: its presence says that the run is complete."""
        _nothing_to_lose.set()
        _sigterm.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(self.signals)
        if self.active:
            self.writer.close()
            text = json.dumps({**summary, "seconds_this_process": round(time.time() - self.started, 1)}, indent=1)
            _write(self.folder / "summary.json", text + "\n")


def _keep_rows_before(file, step, evaluated):
    if file.is_file():
        whole = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # behind the last: a line cut off
        kept = [_is_before(line, step, evaluated) for line in whole]
        if None in kept:
            print0(f"warning: {file}: {kept.count(None)} damaged lines are left out")
        _write(file, "".join(line + "\n" for line, keep in zip(whole, kept) if keep))


def _is_before(line, step, evaluated):
    """Whether a row comes before this step, and unless evaluated, before the evaluation of the step before it.

    None: the line is damaged.
    """
    try:
        row = json.loads(line)
        is_evaluation = not any(key.startswith(("train/", "time/")) for key in row)
        return row["step"] < step - (is_evaluation and not evaluated)
    except (ValueError, TypeError, KeyError):
        return None


def _cell(value):
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    for char in "&<|[]!`":  # HTML, and markdown: an image would call a stranger's server
        text = text.replace(char, f"&#{ord(char)};")
    return " ".join(text.splitlines())


def model_card(folder, script, base, data, lines=()):
    """README.md of a model folder: what it is, from what, and the command that made it."""
    if rank() == 0:
        spec = sys.modules["__main__"].__spec__  # of `python -m module`
        script = f"-m {spec.name}" if spec and spec.name.startswith("experiments.") else script
        command = " ".join([script] + sys.argv[1:])
        body = [f"# {Path(folder).name}", "", f"Made by `{script}` from `{base}` on `{data}`.", "",
                f"Command: `python {command}`", "", *lines]
        text = "\n".join(body).rstrip() + "\n"
        (Path(folder) / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def stop_if_not_finite(quantities, batch, folder, step):
    """Stop every rank on the first NaN or infinity of any, by name, after saving the batch. Checkpoints stay.

    quantities: {name: tensor or number}, in the order in which they were computed, of this rank or of all; batch: the
    same, {"queries": lists, "responses": tensor} or {"rows": dicts}. `python -m utils.replay` reads the file.
    Every rank must call it.
    """
    finite = [bool(torch.isfinite(torch.as_tensor(value, dtype=torch.float32)).all()) for value in quantities.values()]
    place, message = finite.index(False) if False in finite else len(finite), None
    if place < len(finite):
        bad, file = list(quantities)[place], folder / f"bad_batch_rank{rank()}.pt"
        quantities = {name: torch.as_tensor(value).detach().cpu() for name, value in quantities.items()}
        args = _read_record(folder / "args.json")
        if "rows" in batch:  # texts alone: whatever else is in a data set need not be safe to load
            batch = {"rows": [{key: value for key, value in row.items() if isinstance(value, (str, bool))}
                              for row in batch["rows"]]}
        torch.save({"step": step, "first_bad": bad, "quantities": quantities, "batch": batch, "args": args}, file)
        message = (f"step {step}: {bad} is not finite. The batch is saved, the last checkpoint is untouched. See which "
                   f"row it is with `python -m utils.replay {file}`; if none, start anew with a lower learning rate")
    place, message = min(gather_rows([(place, message or "")]))  # of the rank where it came first
    if message:
        fail(message)
