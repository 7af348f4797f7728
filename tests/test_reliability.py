"""Kills, SIGTERM, full disks, NaN and dead ranks: what a run that goes wrong leaves behind, and how it goes on.

The whole kill matrix is experiments/kill_resume.py; here is a short form of it.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import dpo
import group_invariant_ppo
import ppo
import reward_model
import sft
import utils.replay
import utils.run
from experiments.kill_resume import Runs, differences
from test_launch import deepspeed_command, environment
from utils.launch import end_in_one_line, init_distributed
from utils.run import Tracker, choose_folder, load_checkpoint, open_folder, save_checkpoint

TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """ppo.py's short run of kill_resume.py, made once without a kill."""
    made = Runs(tmp_path_factory.mktemp("reliability"), "ppo", 1, 0)
    made.reference()
    return made


def start(runs, folder, *more, launcher=(sys.executable,), **options):
    return subprocess.Popen([*launcher, "ppo.py", *runs.flags, f"--output_dir={folder}", *more], cwd=ROOT, env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


def workers_of(launcher):
    """Process ids of the two ranks that torchrun has started."""
    children = subprocess.run(["pgrep", "-P", str(launcher.pid), "-f", "ppo.py"], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    return children


def wait_for_step(folder, step):
    """Until the first line of this step is in metrics.jsonl."""
    until = time.time() + 100
    while time.time() < until:
        file = folder / "metrics.jsonl"
        if file.exists() and any(json.loads(line)["step"] >= step for line in file.read_text().split("\n")[:-1]):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {folder}")


# ---- Kills ------------------------------------------------------------------------------------------------


def test_killed_run_ends_with_the_same_bits(runs):
    """SIGKILL in the middle of a checkpoint's file, resumed, while metrics.jsonl is cut, and, resumed again, inside an
    update: the end is bit-identical."""
    places = ["half a file into a checkpoint", "while metrics.jsonl is cut for the resumed run", "inside an update"]
    result = runs.killed(0, places, random.Random(1))
    assert [place for place, _, hit in result["kills"] if hit] == places, result
    assert result["code"] == 0 and result["differs"] == []


def test_killed_before_its_first_file_a_run_can_be_given_again(runs, tmp_path):
    """SIGKILL when args.json is written but not yet in its place: the same command then works."""
    code, _ = runs.start(tmp_path / "run", "before a written file is put in its place", 1)
    assert code == -signal.SIGKILL and [file.name for file in (tmp_path / "run").iterdir()] == ["args.json.unfinished"]
    args = ppo.tyro.cli(ppo.Args, args=[*runs.flags, f"--output_dir={tmp_path / 'run'}"])
    open_folder(choose_folder(args, "ppo"), args, "ppo")


def test_differences_are_seen(runs, tmp_path):
    """kill_resume.py's comparison sees a changed weight, line, optimizer state and curve."""
    whole, _ = runs.reference()
    assert differences(whole, whole) == []
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines + lines[-1:]))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1] + b"\1")
    file = next((copy / "checkpoints").glob("*4/policy/*.pt"))
    state = torch.load(file, weights_only=False)
    next(iter(state["optimizer"]["state"].values()))["exp_avg"] += 1
    torch.save(state, file)
    found = differences(whole, copy)
    assert found[:2] == ["model.safetensors", "metrics.jsonl"]
    assert f"checkpoint policy/{file.name}" in found and "TensorBoard eval/score" in found
    for name in ("critic/model.safetensors", "best/model.safetensors", "samples.jsonl"):
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    (copy / "summary.json").write_text(json.dumps({**json.loads((copy / "summary.json").read_text()), "best_rlhf_reward": 9}))
    assert set(differences(whole, copy)) - set(found) == {
        "critic/model.safetensors", "best/model.safetensors", "samples.jsonl", "summary.json"}
    (copy / "checkpoints/step_0000004").rename(copy / "checkpoints/step_0000003")
    assert "last checkpoint step_0000003" in differences(whole, copy)
    (copy / "summary.json").unlink()
    assert "no summary.json" in differences(whole, copy)


def test_sigterm_writes_a_checkpoint_and_exit_code_75(runs, tmp_path):
    """SIGTERM: within 30 seconds a checkpoint of the step under way, INTERRUPTED, code 75; resumed, the same bits."""
    whole, _ = runs.reference()
    folder = tmp_path / "run"
    process = start(runs, folder)
    wait_for_step(folder, 1)
    began = time.time()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and time.time() - began < 30, err
    step = int(out.split("SIGTERM: stopped after step ")[1].split(",")[0])
    assert (folder / "INTERRUPTED").is_file() and (folder / "checkpoints" / f"step_{step:07d}").is_dir()
    assert not (folder / "summary.json").exists()
    process = start(runs, folder, "--resume")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and not (folder / "INTERRUPTED").exists(), err
    assert "starting from the first step" not in out
    assert [name for name in differences(whole, folder) if not name.startswith("last checkpoint")] == []


def test_sigterm_to_one_of_two_ranks_stops_both_after_one_step(runs, tmp_path):
    """All ranks learn of it in the same step: the checkpoint is complete, and the launcher reports code 75."""
    folder = tmp_path / "run"
    process = start(runs, folder, launcher=TWO_RANKS)
    wait_for_step(folder, 1)
    os.kill(int(workers_of(process)[1]), signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    step = int(out.split("SIGTERM: stopped after step ")[1].split(",")[0])
    assert step < 6 and (folder / "INTERRUPTED").is_file() and process.returncode != 0
    assert [path.name for path in (folder / "checkpoints").iterdir()][-1:] == [f"step_{step:07d}"]
    assert "exitcode  : 75" in err, err


def test_sigterm_before_the_first_step_ends_the_process(runs, tmp_path):
    """Nothing is there to be saved while models load."""
    process = start(runs, tmp_path / "run")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and not (tmp_path / "run/checkpoints").exists()


@pytest.fixture
def watcher(monkeypatch):
    """utils.run's thread with a process beside it: (send a SIGTERM, the process, a list of exit codes)."""
    signals, sender = os.pipe()
    beside, codes = subprocess.Popen(["sleep", "1000"]), []

    def leave(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    for event in ("_sigterm", "_nothing_to_lose"):
        monkeypatch.setattr(utils.run, event, threading.Event())

    def watch():
        with contextlib.suppress(SystemExit):
            utils.run._watch_sigterm(signals, [psutil.Process(beside.pid)])

    thread = threading.Thread(target=watch)
    thread.start()
    yield lambda signum=signal.SIGTERM: os.write(sender, bytes([signum])), beside, codes
    os.close(sender)
    thread.join(timeout=10)
    assert not thread.is_alive()
    beside.kill()
    beside.wait()


def test_one_sigterm_ends_no_process_and_another_after_five_seconds_does(watcher):
    """Two at once are as one: launchers pass on theirs."""
    send, _, codes = watcher
    send()
    send()
    time.sleep(3)
    assert utils.run._sigterm.is_set() and codes == []
    time.sleep(2.5)
    send()
    time.sleep(1)
    assert codes == [143]


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_dead_rank_beside_ends_the_process_after_sigterm(watcher, dies):
    """Whether it dies before the signal or after it; without the signal nothing happens."""
    send, beside, codes = watcher
    if dies == "before":
        beside.kill()
        send(signal.SIGINT)
        time.sleep(1.5)
        assert codes == []
    send()
    if dies == "after":
        time.sleep(1.5)
        assert codes == []
        beside.kill()
    time.sleep(2)
    assert codes == [143]


def test_what_is_saved_needs_no_watching(watcher):
    """A rank beside that ends after the checkpoint is complete is not taken for a dead one."""
    send, beside, codes = watcher
    send()
    time.sleep(0.5)
    utils.run._nothing_to_lose.set()
    beside.kill()
    time.sleep(2)
    assert codes == []


def test_processes_of_a_judge_end_at_sigterm_and_hold_no_folder(tmp_path):
    """A forked process has neither the handler nor the lock of the run; signals to it are not taken for the run's."""
    done = subprocess.run([sys.executable, "-c", f"""
import fcntl, multiprocessing, os, signal, time
import ppo, utils.run
from pathlib import Path
args = ppo.Args(output_dir={str(tmp_path / "run")!r})
tracker = utils.run.Tracker(Path({str(tmp_path)!r}), args, 0)
fork = multiprocessing.get_context("fork").Process
for _ in range(20):
    process = fork(target=time.sleep, args=[100])
    process.start()
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM, process.exitcode
def handle():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    os.kill(os.getpid(), signal.SIGTERM)
process = fork(target=handle)
process.start()
process.join(10)
time.sleep(0.5)
print("ended", process.exitcode, utils.run._sigterm.is_set())
utils.run.open_folder(Path(args.output_dir), args, "ppo")
process = fork(target=time.sleep, args=[5])
process.start()
os.close(utils.run._locked.pop())
time.sleep(0.5)
fcntl.flock(os.open(args.output_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
print("free", flush=True)
process.kill()
os._exit(0)
"""], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.stdout.split("\n") == ["ended 7 False", "free", ""], done.stderr


def sigterm_in_step(number, script, monkeypatch):
    """This process gets SIGTERM inside the n-th optimizer step of a script. Returns the list of the steps made."""
    steps, real = [], script.optimizer_step

    def optimizer_step(*args):
        steps.append(args)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(script, "optimizer_step", optimizer_step)
    return steps


def test_sigterm_in_the_last_step_lets_the_run_end(tmp_path, monkeypatch):
    """Nothing is left to do: no INTERRUPTED, but the whole run."""
    made, folder, steps = Runs(tmp_path / "out", "sft", 1, 0), tmp_path / "run", sigterm_in_step(6, sft, monkeypatch)
    sft.main(sft.tyro.cli(sft.Args, args=[*made.flags, f"--output_dir={folder}"]))
    assert len(steps) == 6 and (folder / "summary.json").is_file() and not (folder / "INTERRUPTED").exists()


@pytest.mark.parametrize("script, calls", [(sft, 1), (reward_model, 1), (dpo, 1), (group_invariant_ppo, 5)],
                         ids=["sft", "reward_model", "dpo", "group_invariant_ppo"])
def test_sigterm_in_the_other_scripts(script, calls, tmp_path, monkeypatch):
    """In this process: SIGTERM inside the third step ends the run after it, with its checkpoint and code 75; then the
    resumed run ends complete, and SIGTERM ends processes at once again.

    calls: of optimizer_step in a step; a group head has one in the first of two epochs, policy and critic one in each.
    """
    made, folder = Runs(tmp_path / "out", script.__name__, 1, 0), tmp_path / "run"
    flags, steps = [*made.flags, f"--output_dir={folder}"], sigterm_in_step(3 * calls, script, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        script.main(script.tyro.cli(script.Args, args=flags))
    assert stopped.value.code == 75 and len(steps) == 3 * calls
    assert (folder / "checkpoints/step_0000003").is_dir()
    assert (folder / "INTERRUPTED").is_file()
    script.main(script.tyro.cli(script.Args, args=[*flags, "--resume"]))
    assert len(steps) == 6 * calls and (folder / "summary.json").is_file() and not (folder / "INTERRUPTED").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory):
    """Flags of a short run of reward_model.py with two batches for each side of the held-out pairs, and the whole run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        out = tmp_path_factory.mktemp("reward_run")
        flags = [*Runs(out, "reward_model", 1, 0).flags, "--eval_batch_size=4", "--save_every=4"]
        reward_model.main(reward_model.tyro.cli(reward_model.Args, args=[*flags, f"--output_dir={out / 'whole'}"]))
    return flags, out / "whole"


def stop_in_scoring(number, monkeypatch):
    """This process gets SIGTERM inside the n-th call of score_sequences, at its second batch. Returns the calls."""
    calls, score, asked = [], reward_model.score_sequences, reward_model.interrupted

    def score_sequences(*args):
        calls.append(0)
        return score(*args)

    def interrupted(device):
        calls[-1] += 1
        if len(calls) == number and calls[-1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(device)

    monkeypatch.setattr(reward_model, "score_sequences", score_sequences)
    monkeypatch.setattr(reward_model, "interrupted", interrupted)
    return calls


@pytest.mark.parametrize("number, step, again", [(1, 0, 9), (4, 3, 7), (7, 6, 5), (9, 6, 1)],
                         ids=["initial evaluation", "middle evaluation", "last evaluation", "normalisation"])
def test_sigterm_while_the_reward_model_only_scores(number, step, again, reward_run, tmp_path, monkeypatch):
    """The run ends at the next batch, with the checkpoint of the step before and code 75, and goes on to the same bits.

    again: calls of score_sequences in the resumed run. An evaluation has two, the last one four, the normalisation one.
    """
    flags, whole = reward_run
    flags = [*flags, f"--output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_in_scoring(number, patch)
        reward_model.main(reward_model.tyro.cli(reward_model.Args, args=flags))
    assert stopped.value.code == 75 and f"checkpoint of step {step} is" in (tmp_path / "run/INTERRUPTED").read_text()
    assert max((tmp_path / "run/checkpoints").iterdir()).name == f"step_{step:07d}"
    calls = stop_in_scoring(0, monkeypatch)
    reward_model.main(reward_model.tyro.cli(reward_model.Args, args=[*flags, "--resume"]))
    assert len(calls) == again and differences(whole, tmp_path / "run") == []


def test_an_evaluation_that_is_made_again_leaves_no_row_twice(reward_run, tmp_path, monkeypatch):
    """SIGTERM in the evaluation of step 3; the resumed run is killed right after it, so the third makes it once more."""
    flags, whole = reward_run
    flags = [*flags, f"--output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_scoring(4, patch)
        reward_model.main(reward_model.tyro.cli(reward_model.Args, args=flags))
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(reward_model, "save_checkpoint", lambda *args: {}["killed"])
        reward_model.main(reward_model.tyro.cli(reward_model.Args, args=[*flags, "--resume"]))
    rows = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == [0, 1, 2, 3, 3]
    reward_model.main(reward_model.tyro.cli(reward_model.Args, args=[*flags, "--resume"]))
    assert [name for name in differences(whole, tmp_path / "run") if "TensorBoard eval" not in name] == []


def test_a_kill_while_an_earlier_run_is_deleted_can_be_repeated(runs, tmp_path, monkeypatch):
    """--overwrite, stopped with some files of the earlier run gone: the same command then works."""
    folder = tmp_path / "run"
    shutil.copytree(runs.reference()[0], folder)
    args = ppo.tyro.cli(ppo.Args, args=[*runs.flags, f"--output_dir={folder}", "--overwrite"])
    real = shutil.rmtree

    def rmtree(path):
        real(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            open_folder(choose_folder(args, "ppo"), args, "ppo")
    assert (folder / "args.json").is_file()
    open_folder(choose_folder(args, "ppo"), args, "ppo")
    assert [file.name for file in folder.iterdir()] == ["args.json"]


# ---- Disks ------------------------------------------------------------------------------------------------


def test_full_disk_ends_in_one_line_and_loses_nothing(runs, tmp_path):
    """A file that cannot be written whole (no file may have more than 1 MiB from step 2 on) ends the run in one line, with
    code 1; with room again it resumes to the same bits."""
    whole, _ = runs.reference()
    folder = tmp_path / "run"
    process = start(runs, folder)
    wait_for_step(folder, 2)
    until = time.time() + 60
    while not (folder / "checkpoints/step_0000002").exists() and time.time() < until:
        time.sleep(0.02)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.count("error: rank 0: ") == 1 and "File too large" in err and "--resume a run that has one" in err, err
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_0000002"]
    process = start(runs, folder, "--resume")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert differences(whole, folder) == []


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device", "runs/a.pt"), RuntimeError(
    "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")], ids=["OSError", "torch"])
@pytest.mark.parametrize("part", ["first file", "last file", "checksums"])
def test_full_disk_in_a_checkpoint_leaves_the_one_before(fault, part, runs, tmp_path, monkeypatch, capsys):
    """The second checkpoint cannot be written, at its first or last file or its checksums: the first one is as it was, the
    word on it is one line, and the resumed run ends with the same bits."""
    whole, _ = runs.reference()
    folder, calls = tmp_path / "run", []
    flags = [*runs.flags, f"--output_dir={folder}"]
    owner, name, call = (os, "fsync", 7) if part == "checksums" else (torch, "save", 4 if part == "last file" else 3)
    real = getattr(owner, name)

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise fault
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        with pytest.raises(type(fault)) as caught:
            ppo.main(ppo.tyro.cli(ppo.Args, args=flags))
    capsys.readouterr()
    monkeypatch.setattr("utils.launch.said", [])
    end_in_one_line(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert said.startswith("error: rank 0: ") and said.count("\n") == 1 and "--resume" in said
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_0000002"]
    ppo.main(ppo.tyro.cli(ppo.Args, args=[*flags, "--resume"]))
    assert differences(whole, folder) == [] and not list((folder / "checkpoints").glob("unfinished_*"))


DISK = [OSError(number, os.strerror(number), "runs/a.pt") for number in (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)]


@pytest.mark.parametrize("error", [*DISK, SafetensorError("I/O error: No space left on device (os error 28)")], ids=str)
def test_a_disks_fault_is_told_in_one_line(error, capsys, monkeypatch):
    """In the main thread and in others, after init_distributed; once, where both have met it."""
    init_distributed()
    for hook in (lambda: sys.excepthook(type(error), error, None),
                 lambda: threading.excepthook(threading.ExceptHookArgs([type(error), error, None, None]))):
        monkeypatch.setattr("utils.launch.said", [])
        hook()
        hook()
        said = capsys.readouterr().err
        assert said.startswith("error: rank 0: ") and said.count("\n") == 1 and str(error.args[-1]) in said


@pytest.mark.parametrize("error", [ValueError("a fault"), OSError(errno.ENOENT, "No such file", "a"), KeyError("inline")], ids=str)
def test_a_fault_in_the_code_keeps_its_traceback(error, capsys):
    end_in_one_line(type(error), error, None)
    said = capsys.readouterr().err
    assert "error: " not in said and type(error).__name__ in said


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no sums"])
def test_damaged_checkpoints_are_passed_over(runs, damage, tmp_path, capsys):
    """A newest checkpoint whose file is cut, has a flipped bit, or is missing is not used, with a warning; the one before is,
    and the run goes on from there and puts a whole one in the place of the damaged one."""
    whole, _ = runs.reference()
    shutil.copytree(whole, tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").glob("step_*"))
    file = newest / "sha256.json" if damage == "no sums" else max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    middle = len(content) // 2
    if damage in ("missing", "no sums"):
        file.unlink()
    else:
        file.write_bytes(content[:middle] if damage == "cut" else
                         content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    loaded = []

    class Engine:
        def load_checkpoint(self, path, tag):
            loaded.append((Path(path).name, tag))

    state = load_checkpoint(tmp_path / "run", {"policy": Engine()})
    assert f"{newest} is damaged" in capsys.readouterr().out
    assert loaded == [("step_0000002", "policy")] and state["step"] == 2 and newest.name == "step_0000004"
    if damage == "flipped":
        (tmp_path / "run/summary.json").unlink()
        ppo.main(ppo.tyro.cli(ppo.Args, args=[*runs.flags, f"--output_dir={tmp_path / 'run'}", "--resume"]))
        assert differences(whole, tmp_path / "run") == []


def test_checkpoints_that_are_kept(tmp_path):
    """The new one, the one before it, and none that is later, which can only be a damaged one."""
    for step in (2, 4, 6, 9):
        (tmp_path / f"checkpoints/step_{step:07d}").mkdir(parents=True)
    save_checkpoint(tmp_path, 5, {}, {})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_0000004", "step_0000005"]


def test_damaged_lines_of_metrics_are_left_out(tmp_path, capsys):
    """Bytes that are no JSON, in the middle and at the end, do not stop a resumed run, which says how many there were."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 1}\n\xff\0\n[]\n{"step": 2, "a": 1}\n{"step": 3, "a": 1}\n{"st')
    Tracker(tmp_path, ppo.Args(), 3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": 1}\n'
    assert "metrics.jsonl: 2 damaged lines are left out" in capsys.readouterr().out


# ---- Folders ----------------------------------------------------------------------------------------------


def refusal(capsys, **flags):
    """The line on stderr with which ppo.py refuses to open its folder."""
    args = ppo.Args(**flags)
    with pytest.raises(SystemExit):
        open_folder(choose_folder(args, "ppo"), args, "ppo")
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_two_processes_do_not_write_to_one_folder(tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", f"""
import ppo, time
from utils.run import open_folder, Path
open_folder(Path({str(tmp_path / "run")!r}), ppo.Args(), "ppo")
print("open", flush=True)
time.sleep(100)
"""], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "open\n"
    assert "another process is writing there" in refusal(capsys, output_dir=str(tmp_path / "run"), overwrite=True)
    holder.kill()
    holder.wait()
    args = ppo.Args(output_dir=str(tmp_path / "run"), overwrite=True)
    open_folder(choose_folder(args, "ppo"), args, "ppo")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_file_systems_without_locks_will_do(number, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    args = ppo.Args(output_dir=str(tmp_path / "run"))
    open_folder(choose_folder(args, "ppo"), args, "ppo")


def test_what_comes_into_the_folder_while_models_load(tmp_path, capsys):
    """A file of somebody else is not deleted, and a run that has ended meanwhile is not resumed."""
    args = ppo.Args(output_dir=str(tmp_path / "run"))
    folder = choose_folder(args, "ppo")
    folder.mkdir()
    (folder / "thesis.txt").write_text("all of it")
    with pytest.raises(SystemExit):
        open_folder(folder, args, "ppo")
    assert "no longer empty" in capsys.readouterr().err and (folder / "thesis.txt").is_file()
    (folder / "thesis.txt").unlink()
    open_folder(folder, args, "ppo")
    args.resume = True
    folder = choose_folder(args, "ppo")
    (folder / "summary.json").write_text("{}")
    with pytest.raises(SystemExit):
        open_folder(folder, args, "ppo")
    assert "has come to its end" in capsys.readouterr().err


def test_folders_that_cannot_be_made(tmp_path, capsys):
    """Below a file, and with a name that is too long."""
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(capsys, output_dir=str(tmp_path / "file" / "run"))
    assert "name too long" in refusal(capsys, output_dir=str(tmp_path / ("a" * 300)))


def test_overwrite_follows_no_link_and_spares_what_the_run_reads(runs, tmp_path, capsys):
    """A folder that an earlier run's folder links to stays; so does data in it that a flag names with its split."""
    args = ppo.Args(output_dir=str(tmp_path / "run"))
    open_folder(choose_folder(args, "ppo"), args, "ppo")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("all of it")
    (tmp_path / "run/link").symlink_to(tmp_path / "precious")
    (tmp_path / "run/data").mkdir()
    said = refusal(capsys, output_dir=str(tmp_path / "run"), overwrite=True, prompts=f"{tmp_path / 'run/data'}:train")
    assert "--prompts" in said and (tmp_path / "run/data").is_dir()
    args.overwrite = True
    open_folder(choose_folder(args, "ppo"), args, "ppo")
    assert (tmp_path / "precious/thesis.txt").is_file() and os.listdir(tmp_path / "run") == ["args.json"]


def test_flags_that_alter_no_weight_may_change_on_resume(tmp_path):
    args = ppo.Args(output_dir=str(tmp_path / "run"))
    open_folder(choose_folder(args, "ppo"), args, "ppo")
    changed = ppo.Args(output_dir=str(tmp_path / "run"), resume=True, allow_pickle=True, timeout_minutes=7, save_every=3,
                       eval_every=5)
    assert choose_folder(changed, "ppo") == tmp_path / "run"


def test_tables_of_tensorboard_escape_what_they_show(tmp_path):
    """HTML, the borders of cells, links and images of markdown, and line breaks: in samples and hyperparameters."""
    text = "a|b<img src=x>&amp;\n![](http://x) `c`"
    shown = "a&#124;b&#60;img src=x>&#38;amp; &#33;&#91;&#93;(http://x) &#96;c&#96;"
    assert utils.run._cell(text) == shown
    tracker = Tracker(tmp_path, ppo.Args(prompts=text), 0)
    tracker.samples(0, [{"query": text}])
    tracker.close({})
    written = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert written.count(shown.encode()) == 2 and b"<img" not in written


# ---- Numbers ----------------------------------------------------------------------------------------------

NAN = float("nan")


def spoil(monkeypatch, script, name, call, change):
    """The script's function of this name gives `change(result)` at its n-th call."""
    calls, real = [], getattr(script, name)

    def function(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        return change(result) if len(calls) == call else result

    monkeypatch.setattr(script, name, function)


WRONG = [  # what is named first, the function whose result is wrong, at which call, and how
    ("scores", "score_responses", 3, lambda x: x.index_fill(0, torch.tensor([2]), float("inf"))),
    ("logprobs", "token_logprobs", 13, lambda x: x * NAN),
    ("ref_logprobs", "token_logprobs", 14, lambda x: x * NAN),
    ("values", "response_values", 7, lambda x: x * NAN),
    ("first log-ratio", "token_logprobs", 17, lambda x: x * NAN),
    ("loss/policy_avg", "policy_losses", 6, lambda x: (x[0] * NAN, x[1])),
    ("loss/value_avg", "value_losses", 6, lambda x: (x[0] * NAN, x[1])),
    ("policy/grad_norm", "policy_losses", 9, lambda x: (x[0] * NAN, x[1])),
    ("val/grad_norm", "value_losses", 9, lambda x: (x[0] * NAN, x[1])),
    ("policy/grad_norm", "optimizer_step", 7, lambda norm: norm * float("inf")),
    ("val/grad_norm", "optimizer_step", 6, lambda norm: norm * float("inf")),
]
WRONG_GROUPS = [("groups/grad_norm", "optimizer_step", 7, lambda norm: norm * NAN)]


@pytest.mark.parametrize("script, first_bad, name, call, change", [
    *((ppo, *case) for case in WRONG), *((group_invariant_ppo, *case) for case in WRONG[:1] + WRONG_GROUPS)])
def test_numbers_that_go_wrong_stop_the_run(
        script, first_bad, name, call, change, runs, tmp_path, monkeypatch, capsys):
    """In update 2, after the checkpoint of update 1: the first bad quantity is named, the batch saved and replayed, the
    checkpoint as it was."""
    folder = tmp_path / "run"
    spoil(monkeypatch, script, name, call, change)
    flags = [*(flag for flag in runs.flags if "save_every" not in flag), "--save_every=1", f"--output_dir={folder}"]
    with pytest.raises(SystemExit) as stopped:
        script.main(script.tyro.cli(script.Args, args=flags))
    said = capsys.readouterr().err
    file = folder / "bad_batch_rank0.pt"
    assert stopped.value.code == 1 and said.count("\n") == 1
    assert said.startswith(f"error: step 2: {first_bad} is not finite.") and f"python -m utils.replay {file}" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000001"]
    utils.replay.main(utils.replay.Args(file))
    said = capsys.readouterr().out
    assert f"step 2: the first quantity that is not finite is {first_bad}" in said and said.count(" tokens ") == 8
    if first_bad == "scores":
        assert "scores: not finite in 1 of 8 rows, the first is 2" in said
        utils.replay.main(utils.replay.Args(file, model="assets/reward_model"))
        by_score = capsys.readouterr().out
        assert "read by assets/reward_model (its score)" in by_score and by_score.count(" tokens ") == 8
    assert "All 8 rows are finite here" in said


@pytest.mark.parametrize("script, more", [(sft, ["--num_samples=0"]), (reward_model, [])], ids=["sft", "reward_model"])
def test_replay_names_the_rows_that_are_bad_for_the_model(script, more, tmp_path, capsys):
    """A model that overflows from the 21st position on, with short held-out rows: the run stops at step 1, and replay finds
    the rows that are longer."""
    made, model, folder = Runs(tmp_path / "out", script.__name__, 1, 0), tmp_path / "model", tmp_path / "run"
    tokenizer = sft.load_tokenizer("assets/base", "--model")
    network = GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_positions=128, n_embd=32, n_layer=1, n_head=2))
    network.transformer.wpe.weight.data[20:] = 1e30 * torch.randn(108, 32)
    network.save_pretrained(model)
    tokenizer.save_pretrained(model)
    for name in ("validation", "preferences_validation"):
        (tmp_path / f"out/data/{name}.jsonl").write_text(
            '{"prompt": "She", "completion": " was", "chosen": " was", "rejected": " is"}\n')
    with pytest.raises(SystemExit):
        script.main(script.tyro.cli(script.Args, args=[
            *made.flags, "--batch_size=24", f"--model={model}", f"--output_dir={folder}", *more]))
    first_bad = {"sft": "train/loss", "reward_model": "scores"}[script.__name__]
    assert f"step 1: {first_bad} is not finite" in capsys.readouterr().err
    utils.replay.main(utils.replay.Args(folder / "bad_batch_rank0.pt"))
    said = capsys.readouterr().out
    name = {"sft": "train", "reward_model": "preferences_train"}[script.__name__]
    rows = [json.loads(line) for line in open(tmp_path / f"out/data/{name}.jsonl")]
    texts = [row.get("prompt", "") + row[side] for row in rows for side in ("text", "completion", "chosen", "rejected") if side in row]
    long = sum(len(tokenizer(text).input_ids) + 1 > 20 for text in texts)  # EOS is read too
    assert 0 < long < len(texts) and f"\n{long} rows are not finite here" in said


@pytest.mark.parametrize("first_bad", ["logps", "train/loss", "train/grad_norm"])
def test_numbers_that_go_wrong_stop_dpo(first_bad, tmp_path, monkeypatch, capsys):
    """In step 3, after the checkpoint of step 2, which stays as it was; the pairs are saved and replayed."""
    made, folder, steps = Runs(tmp_path / "out", "dpo", 1, 0), tmp_path / "run", []
    real = {name: getattr(dpo, name) for name in ("response_logprobs", "sigmoid_losses", "optimizer_step")}

    def response_logprobs(*args):
        logprobs = real["response_logprobs"](*args)
        bad = first_bad == "logps" and torch.is_grad_enabled() and len(steps) == 2
        return logprobs * NAN if bad else logprobs

    def sigmoid_losses(*args, **kwargs):
        losses = real["sigmoid_losses"](*args, **kwargs)
        return losses * NAN if first_bad == "train/loss" and losses.requires_grad and len(steps) == 2 else losses

    def optimizer_step(*args):
        steps.append(real["optimizer_step"](*args))
        return steps[-1] * NAN if first_bad == "train/grad_norm" and len(steps) == 3 else steps[-1]

    for function in (response_logprobs, optimizer_step):
        monkeypatch.setattr(dpo, function.__name__, function)
    monkeypatch.setitem(dpo.LOSSES, "sigmoid", sigmoid_losses)
    with pytest.raises(SystemExit):
        dpo.main(dpo.tyro.cli(dpo.Args, args=[*made.flags, f"--output_dir={folder}"]))
    said = capsys.readouterr().err
    assert said.startswith(f"error: step 3: {first_bad} is not finite.") and said.count("\n") == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000002"]
    utils.replay.main(utils.replay.Args(folder / "bad_batch_rank0.pt"))
    assert "All 16 rows are finite here" in capsys.readouterr().out  # two of each of eight pairs


def test_held_out_scores_that_are_not_finite_stop_the_reward_model(tmp_path, capsys):
    """A model that overflows everywhere: one line in place of a calibration of NaN."""
    made, model = Runs(tmp_path / "out", "reward_model", 1, 0), tmp_path / "model"
    network = GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_positions=128, n_embd=32, n_layer=1, n_head=2))
    network.transformer.wpe.weight.data[:] = 1e30 * torch.randn(128, 32)
    network.save_pretrained(model)
    sft.load_tokenizer("assets/base", "--model").save_pretrained(model)
    with pytest.raises(SystemExit):
        reward_model.main(reward_model.tyro.cli(reward_model.Args, args=[
            *made.flags, f"--model={model}", f"--output_dir={tmp_path / 'run'}"]))
    said = capsys.readouterr().err
    assert said.startswith("error: a held-out score is not finite") and said.count("\n") == 1


def test_models_that_are_not_finite(runs, tmp_path, capsys):
    """NaN in a weight file is refused by name; a policy whose logits overflow stops at its first evaluation."""
    for value, expected in ((float("nan"), "its weight gpt_neox.final_layer_norm.weight has NaN"),
                            (1e38, "step 0: eval/kl is nan")):
        model = tmp_path / str(value)
        shutil.copytree(ROOT / "assets/sft", model)
        weights = load_file(model / "model.safetensors")
        weights["gpt_neox.final_layer_norm.weight"][:] = value
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(SystemExit):
            ppo.main(ppo.tyro.cli(ppo.Args, args=[*runs.flags, f"--sft_model={model}", f"--output_dir={model}_run"]))
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1


def test_replay_reads_no_pickle_because_the_file_says_so(tmp_path, capsys):
    """A bad_batch file from a stranger, with allow_pickle in its flags, and their model folder."""
    model, file = tmp_path / "model", tmp_path / "bad_batch_rank0.pt"
    shutil.copytree(ROOT / "assets/sft", model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    torch.save({"step": 1, "first_bad": "train/loss", "quantities": {}, "batch": {"rows": [{"prompt": "She was", "completion": "."}]},
                "args": {"model": str(model), "allow_pickle": True, "script": "sft"}}, file)
    with pytest.raises(SystemExit):
        utils.replay.main(utils.replay.Args(file))
    assert "--allow_pickle" in capsys.readouterr().err
    utils.replay.main(utils.replay.Args(file, allow_pickle=True))
    assert "All 1 rows are finite here" in capsys.readouterr().out


def test_replay_of_a_file_that_is_not_there(capsys, tmp_path):
    with pytest.raises(SystemExit):
        utils.replay.main(utils.replay.Args(tmp_path / "bad_batch_rank0.pt"))
    assert capsys.readouterr().err.startswith("error: ")


# ---- Dead ranks -------------------------------------------------------------------------------------------


def test_a_rank_that_is_killed_ends_the_job(runs, tmp_path):
    """SIGKILL for one of two ranks in the middle of training: the whole job is gone within 60 seconds."""
    folder = tmp_path / "run"
    process = start(runs, folder, launcher=TWO_RANKS)
    wait_for_step(folder, 1)
    children, began = workers_of(process), time.time()
    os.kill(int(children[1]), signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0 and time.time() - began < 60
    assert all(not Path(f"/proc/{child}").exists() for child in children)


def test_a_rank_that_raises_ends_the_job_with_its_traceback_first(runs, tmp_path):
    """An exception on rank 1 alone: the job ends within 60 seconds, and the first traceback is that of rank 1."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import ppo
real, calls = ppo.gae, []
def gae(*args):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        raise ArithmeticError("rank 1 has had enough")
    return real(*args)
ppo.gae = gae
ppo.main(ppo.tyro.cli(ppo.Args))
""")
    began = time.time()
    done = subprocess.run([*TWO_RANKS, str(worker), *runs.flags, f"--output_dir={tmp_path / 'run'}"], cwd=ROOT,
                          env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and time.time() - began < 60
    first = done.stderr.split("Traceback (most recent call last)")[1]
    assert "rank 1 has had enough" in first


def test_a_stuck_collective_ends_at_its_time_limit(runs, tmp_path):
    """Rank 1 sleeps for ever: with --timeout_minutes 0.1 rank 0 gives up, and the launcher ends the job, to which it gives
    30 seconds."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import ppo
real = ppo.gae
def gae(*args):
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    return real(*args)
ppo.gae = gae
ppo.main(ppo.tyro.cli(ppo.Args))
""")
    began = time.time()
    done = subprocess.run([*TWO_RANKS, str(worker), *runs.flags, "--timeout_minutes=0.1", f"--output_dir={tmp_path / 'run'}"],
                          cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and time.time() - began < 90
    assert "imed out" in done.stderr


def test_deepspeed_launcher_does_not_wait_for_ranks_that_wait_for_a_dead_one(tmp_path):
    """Three of four ranks wait for ever when one dies: gone within 45 seconds (the launcher would give each 30)."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"""import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import ppo
from utils.launch import barrier, init_distributed, rank
from utils.run import Tracker
init_distributed()
tracker = Tracker(Path({str(tmp_path)!r}), ppo.Args(), 0)
barrier()
if rank() == 1:
    print("dead at", time.time(), flush=True)
    os._exit(3)
while True:
    time.sleep(1)
""")
    done = subprocess.run([deepspeed_command(), "--num_accelerators", "4", str(worker)], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, timeout=150)
    dead = float(done.stdout.split("dead at ")[1].split()[0])
    assert done.returncode == 3 and time.time() - dead < 45
