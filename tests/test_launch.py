"""Launching: the deepspeed launcher, no compiler, the chain of scripts, folders, --help, README, DeepSpeed's config.

Subprocesses run on the CPU without network, in an environment that knows nothing of ranks.
"""

import ast
import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, tiny_config
from matplotlib.axes import Axes
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPTNeoXForCausalLM

import dpo
import group_invariant_ppo
import ppo
import reward_model
import sft
from utils import replay
from utils.launch import check_flags, deepspeed_config, print0, print_memory_plan
from utils.plots import plot_runs
from utils.run import choose_folder, open_folder

SCRIPTS = [sft, reward_model, ppo, group_invariant_ppo, dpo]
NAMES = [script.__name__ for script in SCRIPTS]
COMPILERS = ["cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc", "ninja"]
SMALL_PPO = ["--total_episodes", "8", "--batch_size", "4", "--num_eval_prompts", "4", "--response_length", "8"]


def open_run(args, name):
    """Choose and make the folder of a run, as the scripts do."""
    folder = choose_folder(args, name)
    open_folder(folder, args, name)
    return folder


def environment(**changes):
    """The environment of a user: no ranks left over from tests in this process, one thread, no GPU, no network."""
    env = {key: value for key, value in os.environ.items()
           if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")}
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "LOCAL_SIZE": "1"}
    return {**env, **fixed, **changes}


def deepspeed_command():
    beside_python = Path(sys.executable).parent / "deepspeed"
    return str(beside_python) if beside_python.is_file() else shutil.which("deepspeed")


def run(command, env, cwd=ROOT):
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=200)


def test_two_runs_with_one_port():
    """The second one ends in a line that says how to give it another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run([sys.executable, "ppo.py"], environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: port {port} is in use" in done.stderr and "--master_port" in done.stderr


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A random tiny language model with the tokenizer of assets/base."""
    folder = tmp_path_factory.mktemp("launch") / "base"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "base")
    torch.manual_seed(0)
    GPTNeoXForCausalLM(tiny_config(vocab_size=1024, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def first_rows(name, count, folder):
    """A file with the first rows of a file of assets/data."""
    lines = (ROOT / "assets" / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    return str(folder / name)


# ---- The deepspeed launcher -------------------------------------------------------------------------------


def test_deepspeed_launcher_trains_at_the_rate_of_large_models(tmp_path):
    """`deepspeed ppo.py --lr 5e-7` completes, says beforehand what that rate suits, and moves fp32 weights."""
    done = run([deepspeed_command(), "ppo.py", "--lr", "5e-7", *SMALL_PPO, "--output_dir", str(tmp_path / "out")],
               environment())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    note = next(i for i, line in enumerate(lines) if "--lr 5e-07 suits models of 1B parameters and more" in line)
    assert f"{ppo.Args.lr:g}" in lines[note]
    assert note < next(i for i, line in enumerate(lines) if line.strip().startswith("0/2"))
    before, after = (load_file(folder / "model.safetensors") for folder in (ROOT / "assets" / "sft", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["episodes"] == 8


def test_no_compiler_is_needed(tmp_path):
    """The launcher, gloo on the CPU and CPU offload at ZeRO 2 run where no compiler can be found; nothing is built."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "deepspeed").symlink_to(deepspeed_command())
    env = environment(PATH=str(tmp_path / "bin"), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    for name in ("CC", "CXX", "CUDA_HOME"):
        env.pop(name, None)
    look = f"import shutil; print([name for name in {COMPILERS} if shutil.which(name)])"
    assert run([sys.executable, "-c", look], env).stdout.strip() == "[]"
    done = run(["deepspeed", "ppo.py", "--zero_stage", "2", "--offload_optimizer", *SMALL_PPO, "--output_dir", str(tmp_path / "out")], env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "summary.json").is_file()
    assert not list(tmp_path.glob("extensions/**/*.so"))


# ---- Output and files that are not UTF-8 ------------------------------------------------------------------


@pytest.mark.parametrize("encoding, expected", [
    ("ascii", rb"\u27e6\U0001f600\xe9\ud83d"), ("latin-1", b"\\u27e6\\U0001f600\xe9\\ud83d"),
    ("utf-8", "⟦😀é".encode() + rb"\ud83d")])
def test_output_that_the_terminal_cannot_show_is_escaped(encoding, expected, monkeypatch):
    """From check_flags on, a character that standard output lacks is printed escaped: no script ends with a traceback."""
    for start in (lambda: check_flags(sft.Args()), lambda: replay_once("no such file")):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", out)
        start()
        print0("⟦😀é\ud83d")
        assert out.buffer.getvalue() == expected + b"\n"


def replay_once(file):
    with pytest.raises(SystemExit):
        replay.main(replay.Args(file=Path(file)))


def test_a_standard_output_that_cannot_be_reconfigured_is_left_alone(monkeypatch):
    """Notebooks and tests put an object of their own in the place of sys.stdout."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    check_flags(sft.Args())
    print0("⟦")
    assert out.getvalue() == "⟦\n"


@pytest.mark.parametrize("flags", [dict(PYTHONIOENCODING="ascii"), dict(
    LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="")], ids=["ascii output", "C locale"])
def test_a_run_outside_utf8(flags, tiny_base, tmp_path):
    """`deepspeed sft.py` on Chinese texts and emojis: it ends well, its files are UTF-8, and no file of ours is opened
    in the locale's encoding."""
    rows = [{"prompt": "今天", "completion": f"天气很好😀{number}"} for number in range(4)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    files = [word for flag in ("train", "eval") for word in (f"--{flag}_data", str(tmp_path / "rows.jsonl"))]
    done = run([deepspeed_command(), "sft.py", "--model", str(tiny_base), *files, "--epochs", "1", "--batch_size", "4",
                "--num_samples", "2", "--response_length", "2", "--output_dir", str(tmp_path / "out")],
               environment(PYTHONWARNDEFAULTENCODING="1", **flags))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert r"\u27e6" in done.stdout and "⟦" not in done.stdout
    ours = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and "site-packages" not in line
            and line.startswith(str(ROOT))]
    assert not ours and "EncodingWarning" in done.stderr  # the libraries do: the switch works
    samples = (tmp_path / "out" / "samples.jsonl").read_bytes().decode("utf-8")
    assert json.loads(samples.splitlines()[0])["query"] == "今天"


def test_every_text_file_is_opened_as_utf8():
    """open, read_text and write_text name their encoding, or open bytes, in every script and in utils/."""
    found = 0
    for file in [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")]:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", None))
            if name not in ("open", "read_text", "write_text", "fdopen"):
                continue
            if name == "open" and isinstance(call.func, ast.Attribute) and call.func.value.id == "os":
                continue  # a file descriptor
            found += 1
            binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in call.args[1:])
            encodings = [word.value.value for word in call.keywords if word.arg == "encoding"]
            assert binary or encodings == ["utf-8"], f"{file.name}:{call.lineno}"
    assert found > 15


def test_a_flag_that_the_locale_cannot_read_ends_in_one_line(tmp_path):
    """A path in Chinese under the C locale: the flag and the remedy, before TensorBoard fails at that name."""
    done = run([sys.executable, "sft.py", "--output_dir", str(tmp_path / "数据")], environment(
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING=""))
    assert done.returncode == 1 and done.stderr.startswith("error: --output_dir ") and done.stderr.count("\n") == 1
    assert "PYTHONUTF8=1" in done.stderr and not (tmp_path / "数据").exists()


# ---- The chain --------------------------------------------------------------------------------------------


def test_scripts_run_on_the_outputs_of_one_another(tiny_base, tmp_path):
    """sft.py, reward_model.py, ppo.py and dpo.py run in a row, each from the folders that the ones before wrote."""
    rows, pairs = first_rows("train.jsonl", 20, tmp_path), first_rows("preferences_train.jsonl", 20, tmp_path)
    sft_folder, rm_folder, ppo_folder, dpo_folder = (str(tmp_path / name) for name in ("sft", "rm", "ppo", "dpo"))
    commands = [
        (sft, ["--model", str(tiny_base), "--train_data", rows, "--eval_data", rows, "--epochs", "1",
               "--num_samples", "2", "--output_dir", sft_folder]),
        (reward_model, ["--model", sft_folder, "--train_data", pairs, "--eval_data", pairs, "--demonstrations", rows,
                        "--output_dir", rm_folder]),
        (ppo, ["--sft_model", sft_folder, "--reward_model", rm_folder, "--prompts", rows, "--eval_prompts", rows,
               *SMALL_PPO, "--output_dir", ppo_folder]),
        (ppo, ["--sft_model", ppo_folder, "--reward_model", ppo_folder + "/critic", "--prompts", rows,
               "--eval_prompts", rows, *SMALL_PPO, "--output_dir", ppo_folder + "-again"]),
        (dpo, ["--model", ppo_folder, "--ref_model", sft_folder, "--train_data", pairs, "--eval_data", pairs,
               "--eval_prompts", rows, "--epochs", "1", "--ref_cache", str(tmp_path / "ref_logprobs"),
               "--output_dir", dpo_folder]),
        (sft, ["--model", dpo_folder, "--train_data", rows, "--eval_data", rows, "--epochs", "1",
               "--num_samples", "2", "--output_dir", sft_folder + "-again"])]
    for script, flags in commands:
        script.main(tyro.cli(script.Args, args=flags))
        folder = Path(flags[-1])
        assert json.loads((folder / "summary.json").read_text())
        assert (folder / "README.md").is_file() and (folder / "model.safetensors").is_file()


# ---- Folders ----------------------------------------------------------------------------------------------


def test_default_output_folders_are_numbered(tmp_path, monkeypatch):
    """Without --output_dir, runs go to runs/ppo, runs/ppo-2, runs/ppo-3; --resume takes the last of them."""
    monkeypatch.chdir(tmp_path)
    assert [str(open_run(ppo.Args(), "ppo")) for _ in range(3)] == ["runs/ppo", "runs/ppo-2", "runs/ppo-3"]
    assert str(open_run(sft.Args(), "sft")) == "runs/sft"
    assert str(open_run(ppo.Args(resume=True), "ppo")) == "runs/ppo-3"


def test_overwrite_replaces_an_earlier_run(tmp_path):
    """--overwrite empties the folder of an earlier run before it writes there."""
    args = ppo.Args(output_dir=str(tmp_path / "out"))
    (open_run(args, "ppo") / "metrics.jsonl").write_text("old\n")
    folder = open_run(dataclasses.replace(args, overwrite=True), "ppo")
    assert [file.name for file in folder.iterdir()] == ["args.json"]


def test_an_empty_output_folder_can_be_used(tmp_path):
    """A folder that exists and is empty is taken without --overwrite."""
    (tmp_path / "out").mkdir()
    assert open_run(ppo.Args(output_dir=str(tmp_path / "out")), "ppo") == tmp_path / "out"


# ---- Importing, --help, copying ---------------------------------------------------------------------------


def test_importing_a_script_does_nothing(tmp_path):
    """Importing the scripts prints nothing, writes nothing, joins no process group and imports no DeepSpeed."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True\n"
            f"import {', '.join(NAMES)}, torch\n"
            "assert 'deepspeed' not in sys.modules and not torch.distributed.is_initialized()")
    done = run([sys.executable, "-c", code, str(ROOT)], environment(), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_explains_every_flag(script, capsys, monkeypatch):
    """--help shows every field of Args with its docstring, word for word."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(script.Args, args=["--help"])
    assert stopped.value.code == 0
    shown = "".join(re.sub(r"[│╭╮╰╯─]", "", capsys.readouterr().out).split())
    body = next(node.body for node in ast.parse(Path(script.__file__).read_text()).body
                if isinstance(node, ast.ClassDef) and node.name == "Args")
    docstrings = {field.target.id: ast.literal_eval(text.value) for field, text in zip(body, body[1:])
                  if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)}
    assert docstrings.keys() == {field.name for field in dataclasses.fields(script.Args)}
    for name, docstring in docstrings.items():
        assert "--" + name.replace("_", "-") in shown
        assert "".join(docstring.split()) in shown, f"the docstring of {name} is not in --help"


def test_one_script_with_utils_is_enough(tmp_path):
    """Each script starts with nothing but utils/ on the path; only its default model is missing, as one line says."""
    shutil.copytree(ROOT / "utils", tmp_path / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    for script in SCRIPTS:
        (tmp_path / f"only_{script.__name__}").mkdir()
        shutil.copy(script.__file__, tmp_path / f"only_{script.__name__}")
    code = ("import os, runpy, sys\n"
            "sys.path[0], sys.argv, sys.dont_write_bytecode = os.getcwd(), ['script.py'], True\n"
            f"for name in {NAMES}:\n"
            "    os.chdir(os.path.join(sys.path[0], 'only_' + name))\n"
            "    try:\n"
            "        runpy.run_path(name + '.py', run_name='__main__')\n"
            "    except SystemExit as stopped:\n"
            "        assert stopped.code == 1\n")
    done = run([sys.executable, "-c", code], environment(), tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(SCRIPTS), done.stderr
    for script, line in zip(SCRIPTS, lines):
        flag = "sft_model" if hasattr(script.Args, "sft_model") else "model"
        assert line.startswith(f"error: --{flag} {getattr(script.Args, flag)}: ")
        assert [file.name for file in (tmp_path / f"only_{script.__name__}").iterdir()] == [f"{script.__name__}.py"]


# ---- README -----------------------------------------------------------------------------------------------


def readme_commands():
    """(script, its flags) of every command in README's bash blocks that runs a script with Args."""
    text = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else ""
    commands = []
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S):
        for line in re.split(r"\n|&&|\|\||[;|]", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            name = next((word for word in words if word.endswith(".py")), "")
            if (ROOT / name).is_file() and "/" not in name and name:
                if hasattr(importlib.import_module(name[:-3]), "Args"):
                    commands.append((name[:-3], words[words.index(name) + 1 :]))
    return commands


def test_readme_commands_use_flags_that_exist():
    """README has commands, and each one parses: flags exist and values have their types."""
    commands = readme_commands()
    assert commands, "README.md has no command that runs a script"
    for script, flags in commands:
        try:
            tyro.cli(importlib.import_module(script).Args, args=flags)
        except SystemExit:
            pytest.fail(f"README: {script}.py does not take {shlex.join(flags)}")


# ---- DeepSpeed's config -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_deepspeed_config_follows_the_flags(script):
    """ZeRO stage, offload, bf16 and clipping stand in the config as the flags say."""
    config = deepspeed_config(script.Args(zero_stage=3, offload_optimizer=True, bf16=True, max_grad_norm=0.7))
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["bf16"] == {"enabled": True} and config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["gradient_clipping"] == 0.7
    config = deepspeed_config(script.Args(zero_stage=2))
    assert config["zero_optimization"] == {"stage": 2}
    assert config["bf16"] == {"enabled": False}
    stages = {stage: deepspeed_config(script.Args(zero_stage=stage, bf16=True))["zero_optimization"]["stage"]
              for stage in (0, 2, 3)}
    assert stages == {0: 2, 2: 2, 3: 3}  # in bf16, DeepSpeed's ZeRO 0 sums gradients in bf16
    assert deepspeed_config(script.Args())["zero_optimization"]["stage"] == 0


def test_memory_plan_counts_fp32_gradients_and_names_the_stage(monkeypatch, capsys):
    """2**20 parameters on two ranks with --bf16 at ZeRO 0: 2 MiB of weights, half of 4 MiB of gradients and of 12 MiB of
    optimizer state, in pieces as at ZeRO 2, which a line names."""
    monkeypatch.setattr("utils.launch.world_size", lambda: 2)
    print_memory_plan(sft.Args(bf16=True), 2**20)
    said, plan = capsys.readouterr().out.splitlines()
    assert said.startswith("bf16") and "ZeRO 2" in said
    assert "4 MiB of weights and gradients, 6 MiB of optimizer state" in plan
    print_memory_plan(sft.Args(), 2**20)
    (plan,) = capsys.readouterr().out.splitlines()
    assert "8 MiB of weights and gradients, 8 MiB of optimizer state" in plan


def test_deepspeed_config_clips_only_where_asked():
    """Clipping is written as 0 where the flag is off (DeepSpeed's own default is 1) and where create_engine clips."""
    for stage in (0, 2, 3):
        assert deepspeed_config(ppo.Args(zero_stage=stage))["gradient_clipping"] == 0.0
    assert deepspeed_config(ppo.Args(zero_stage=2, max_grad_norm=1.5))["gradient_clipping"] == 1.5
    assert deepspeed_config(ppo.Args(zero_stage=0, max_grad_norm=1.5))["gradient_clipping"] == 0.0
    assert deepspeed_config(ppo.Args(zero_stage=0, bf16=True, max_grad_norm=1.5))["gradient_clipping"] == 1.5


def test_deepspeed_config_leaves_accumulation_to_the_script():
    """DeepSpeed must not divide gradients by a number of micro-batches: the scripts divide by counted tokens."""
    config = deepspeed_config(ppo.Args())
    assert config["managed_gradient_accumulation"] is False
    assert config["gradient_accumulation_steps"] == 1


# ---- Plots ------------------------------------------------------------------------------------------------


def test_mean_curve_is_over_shared_evaluations(tmp_path, monkeypatch):
    """Runs evaluated at other updates: the thick line has the episodes that all of them share, and their mean there."""
    for name, every, scale in (("a", 1, 1.0), ("b", 2, 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text('{"batch_size": 10}')
        rows = [{"step": step, "eval/score": scale * step, "eval/kl": 1.0} for step in range(0, 5, every)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: lines.append((x, y)) or plot(self, x, y, **style))
    plot_runs(tmp_path / "out.png", [tmp_path / "a", tmp_path / "b"])
    assert lines[2] == ([0, 20, 40], [0.0, 4.0, 8.0])
    assert (tmp_path / "out.png").stat().st_size > 1000
