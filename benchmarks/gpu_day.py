"""Every figure that needs a GPU, in one command: python -m benchmarks.gpu_day --out gpu_day

For a GPU that is there for minutes, on a machine without network. bash benchmarks/gpu_wheels.sh, on another machine,
collects the packages that it lacks; this program installs them into a folder of its own. The steps run in the order of
their worth. Each has a time limit and writes each result at once, so that a stop at any moment leaves what was done:
  results.jsonl   one line a result, as soon as it is there
  log.txt         what the steps printed
  tables.md       the tables, which are also printed last
All of it takes under nine minutes on one H100. --tiny tries the same steps on small models, in minutes on a CPU.
--only ppo repeats the steps whose names begin so, and adds to the same files.

python -m benchmarks.gpu_day --page writes the GPU section of docs/speed.md from the newest records/*_gpu/results.jsonl.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "benchmarks/wheels"
PAGE, BEGIN, END = ROOT / "docs/speed.md", "<!-- gpu_day: begin -->\n", "<!-- gpu_day: end -->\n"


# ---- The steps: each runs in a process of its own and calls `record` for each result ----------------------


def facts(run):
    """What the machine is, and its two ceilings: matrix products and memory traffic."""
    import deepspeed
    import torch
    import transformers

    from benchmarks.common import now
    from benchmarks.ppo_speed import memory_bandwidth

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    run.record(
        device=torch.cuda.get_device_name() if gpu else "cpu", cores=os.cpu_count(), python=platform.python_version(),
        torch=torch.__version__, cuda=torch.version.cuda, transformers=transformers.__version__,
        deepspeed=deepspeed.__version__, commit=commit(), tiny=run.tiny)
    figures = {"copy_gb_per_second": memory_bandwidth(device) / 1e9}
    for name, dtype, size in (("bf16", torch.bfloat16, 8192), ("fp32", torch.float32, 4096)):
        size = size if gpu else 512
        a, b = torch.randn(2, size, size, dtype=dtype, device=device)
        seconds = []
        for _ in range(12):
            start = now()
            a @ b
            seconds.append(now() - start)
        figures[f"{name}_tflops"] = 2 * size**3 / statistics.median(seconds[2:]) / 1e12
    run.record(**figures)


def tests(run):
    """The tests that are marked `gpu`: they run on the GPU where there is one."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"],
                          capture_output=True, text=True)
    print(done.stdout, done.stderr[-3000:])
    summary = [line for line in done.stdout.splitlines() if " in " in line and ("passed" in line or "failed" in line)]
    run.record(passed=done.returncode == 0, last_line=summary[-1] if summary else "no summary: see log.txt")


# Flags of a short run of ppo.py on the embedded models, and what is tried with it.
SHORT = ["--batch_size=32", "--micro_batch_size=16", "--num_eval_prompts=32", "--eval_every=1000",
         "--gold_function=None"]
VARIANTS = {
    "ZeRO 0": [], "--offload_frozen": ["--offload_frozen"], "--gradient_checkpointing": ["--gradient_checkpointing"],
    "ZeRO 2": ["--zero_stage=2"], "ZeRO 2, --offload_optimizer": ["--zero_stage=2", "--offload_optimizer"],
    "ZeRO 3": ["--zero_stage=3"]}  # last: DeepSpeed replaces torch's linear there, and what follows rounds otherwise
COMPARED = ("objective/scores", "loss/policy_avg", "loss/value_avg", "policy/grad_norm", "val/grad_norm")


def short(run, dtype):
    """Two updates with each way to place models and states: the first must have the same figures, up to rounding.

    Later ones may not: in bf16 another rounding soon draws another token, and from there on another text.
    """
    import torch
    import tyro

    import ppo

    for name, flags in VARIANTS.items():
        out, drifts = run.folder / f"{dtype}_{name.replace(' ', '_')}", []
        start = time.time()
        gc.collect()
        if torch.cuda.is_available():  # what the variant before has left is not this one's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with noted_first_ratios(ppo, drifts):
                ppo.main(tyro.cli(ppo.Args, args=[
                    *SHORT, "--total_episodes=64", *flags, f"--output_dir={out}"] + ["--bf16"] * (dtype == "bf16")))
            first = metrics_of(out)[0]
            run.record(variant=name, dtype=dtype, seconds=time.time() - start, first_log_ratio=max(drifts),
                       peak_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
                       **{key: first[key] for key in COMPARED})
        except (Exception, SystemExit) as error:
            run.record(variant=name, dtype=dtype, error=f"{type(error).__name__}: {error}"[:300])


@contextlib.contextmanager
def noted_first_ratios(ppo, drifts):
    """Within, the largest |log ratio| before the first step of each update goes into drifts."""
    original = ppo.check_first_ratio

    def noted(log_ratio, *args):
        drifts.append(log_ratio.abs().max().item())
        return original(log_ratio, *args)

    ppo.check_first_ratio = noted
    try:
        yield
    finally:
        ppo.check_first_ratio = original


def metrics_of(folder):
    """The lines of a run's metrics.jsonl that belong to an update."""
    rows = [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]
    return [row for row in rows if "objective/scores" in row]


def sampled(run):
    """Log-probabilities of the same tokens, as they were sampled (one at a time, with a cache) and as they are scored."""
    import torch

    import ppo
    from utils.models import load_causal_lm, load_tokenizer
    from utils.tokens import terminator_ids

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, args = load_tokenizer("assets/sft", "--sft_model"), ppo.Args()
    prompts = ppo.load_prompts(args.eval_prompts, "--eval_prompts", tokenizer, args)[: 32 if run.tiny else 256]
    prompts.sort(key=lambda prompt: len(prompt[0]))  # as rollout takes them, in one batch
    args.rollout_batch_size = len(prompts)
    for dtype in ("fp32", "bf16"):
        model = load_causal_lm("assets/sft", "--sft_model", tokenizer, dtype == "bf16").to(device).eval()
        eos_ids = torch.tensor(terminator_ids(tokenizer), device=device)
        forbidden = ppo.forbidden_tokens(tokenizer, model.config.vocab_size).to(device)
        noise, steps, draw = ppo.sampling_noise(1, 1, range(len(prompts)), args.response_length), [], ppo.inverse_cdf

        def noted(logits, uniforms):
            tokens = draw(logits, uniforms)
            steps.append(ppo.token_logprobs(logits[:, None], tokens[:, None]).squeeze(1))  # of the rows still alive
            return tokens

        ppo.inverse_cdf = noted
        try:
            responses = ppo.rollout(model, prompts, noise, args, tokenizer, forbidden, eos_ids)
        finally:
            ppo.inverse_cdf = draw
        episodes = ppo.Episodes(prompts, responses, tokenizer, eos_ids)
        scored, at_sampling = torch.zeros(2, *responses.shape, device=device)
        for t, logprobs in enumerate(steps):
            at_sampling[episodes.lengths > t, t] = logprobs
        with torch.no_grad():
            for rows in episodes.micro_batches(range(len(prompts)), args.micro_batch_size):
                scored[rows] = ppo.response_logprobs(model, episodes, rows, args, forbidden)
        log_ratio = (scored - at_sampling)[episodes.mask]
        run.record(dtype=dtype, tokens=len(log_ratio), mean_difference=log_ratio.abs().mean().item(),
                   largest_difference=log_ratio.abs().max().item(), mean_ratio=log_ratio.exp().mean().item())


def launcher(run):
    """A short run under the deepspeed launcher, at the rate of large models."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "1", "--master_port", "29777",
               "ppo.py", "--lr", "5e-7", *SHORT, "--total_episodes=64", "--output_dir", str(run.folder / "launcher")]
    if not Path(command[0]).exists():  # the packages are in a folder of their own, without commands
        command[:1] = [sys.executable, "-m", "deepspeed.launcher.runner"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-2000:], done.stderr[-3000:])
    run.record(passed=done.returncode == 0 and (run.folder / "launcher/summary.json").exists())


def resume(run):
    """A run that is killed after its second update and resumed, beside the same run without a kill."""
    flags = [sys.executable, "ppo.py", *SHORT, "--total_episodes=128", "--save_every=1",
             *(["--bf16", "--zero_stage=2"] if gpu_here() else [])]
    whole = subprocess.Popen([*flags, f"--output_dir={run.folder}/whole"])
    killed = subprocess.Popen([*flags, f"--output_dir={run.folder}/killed"])
    while killed.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if len(metrics_of(run.folder / "killed")) >= 2:
                killed.kill()
        time.sleep(0.05)
    resumed = subprocess.run([*flags, f"--output_dir={run.folder}/killed", "--resume"])
    whole.wait()
    first, second = metrics_of(run.folder / "whole"), metrics_of(run.folder / "killed")
    differences = [max(abs(a[key] - b[key]) for key in COMPARED) for a, b in zip(first, second)]
    run.record(was_killed=killed.returncode == -signal.SIGKILL, differences=differences,
               passed=killed.returncode != 0 == resumed.returncode and len(first) == len(second) == 4)


DEFAULT_RUNS = ("ppo", "group_invariant_ppo", "dpo")


def default_run(run, script, dtype):
    """The bare command of a script on the embedded task."""
    out, start = run.folder / f"{script}_{dtype}", time.time()
    smaller = ["--num_eval_prompts=32", *(
        ["--train_data=assets/data/preferences_validation.jsonl"] if script == "dpo" else ["--total_episodes=128"])]
    command = [sys.executable, f"{script}.py", f"--output_dir={out}", "--seed=1", *(smaller if run.tiny else []),
               *(["--bf16"] if dtype == "bf16" else [])]
    if script == "dpo":
        command += [f"--ref_cache={out}_cache"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout[-3000:])
    if done.returncode:
        told = [line for line in done.stdout.splitlines() if "rror" in line] or ["see log.txt"]
        return run.record(script=script, dtype=dtype, error=told[-1][:300])
    summary = json.loads((out / "summary.json").read_text())
    run.record(script=script, dtype=dtype, seconds=time.time() - start, before=numbers(summary["before"]),
               after=numbers(summary["after"]))


def numbers(metrics):
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def ppo_workload(run, name):
    """A folder with policy, reward model and prompts of one of ppo_speed.py's workloads, made once; and its sizes."""
    from benchmarks import ppo_speed

    workload = ppo_speed.WORKLOADS["tiny" if run.tiny else f"pythia-1b-{name}"]
    return made_once(run.folder / f"ppo_{name}", ppo_speed.make_workload, workload), workload


def made_once(folder, make, workload):
    """Make a workload in a new folder unless an earlier step has; complete when the mark is there."""
    if not (folder / "complete").exists():
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        make(folder, workload)
        (folder / "complete").touch()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the measured process has the GPU to itself
    return folder


def ppo(run, name):
    """Updates of ppo.py and of TRL 1.12.0's PPOTrainer: rollout, scoring, training, memory, useful arithmetic."""
    from benchmarks.common import child
    from benchmarks.ppo_speed import EPOCHS

    folder, workload = ppo_workload(run, name)
    for side in ("ppo.py", "TRL"):
        try:
            result = child("ppo_speed", sys.executable, side, folder, workload=workload, updates=2,
                           threads=8 if gpu_here() else 1, packages=run.packages("trl_1.12") if side == "TRL" else None)
        except SystemExit as error:
            run.record(workload=name, side=side, error=str(error)[-600:])
            continue
        finally:
            shutil.rmtree(folder / "ours", ignore_errors=True)
        figures = {part: statistics.median(result[part]) for part in ("rollout", "scoring", "training", "update")}
        if side == "ppo.py":
            length = statistics.mean(result["length"])
            figures |= {"response_tokens": length, "flops": useful_flops(
                folder / "policy", prompt_lengths(folder), length, EPOCHS)}
        run.record(workload=name, side=side, batch=workload["batch_size"], memory_gib=result["memory"] / 1024,
                   peak_gib=(result["loaded"] + result["memory"]) / 1024, **figures)


def prompt_lengths(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    return [len(tokenizer(json.loads(line)["prompt"]).input_ids) for line in open(folder / "prompts.jsonl")]


def useful_flops(model, prompts, response, epochs):
    """Multiplications and additions that policy and critic need in an update's training, padding not counted.

    prompts: tokens of each prompt; response: tokens of a response on average. Three products (output, and gradients of
    input and weight) for each weight matrix and token; of the policy's head for response tokens only; attention's two
    products forward and four backward, the half of them that is masked counted too, as is the custom.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    width, layers = config.hidden_size, config.num_hidden_layers
    kv = width * getattr(config, "num_key_value_heads", config.num_attention_heads) // config.num_attention_heads
    mlp = (3 if config.model_type in ("qwen2", "llama") else 2) * width * config.intermediate_size
    layer = 2 * width * width + 2 * width * kv + mlp
    lengths = [prompt + response for prompt in prompts]
    body = 6 * layers * (layer * sum(lengths) + 2 * width * sum(length**2 for length in lengths))
    head = 6 * config.vocab_size * width * response * len(prompts)
    return epochs * (2 * body + head)


def decode(run, rows):
    """ppo.py's rollout, its prefill alone, transformers' generate, and generate with a static cache, compiled."""
    from benchmarks.ppo_speed import run_rollouts

    folder, workload = ppo_workload(run, "512-53" if rows == 64 else "512-53-large")
    workload = workload | dict(rollout_batch_size=min(rows, workload["batch_size"]))
    for names in (("ours", "prefill", "generate"), ("static",)):  # what needs no compiler is recorded before
        result = run_rollouts(folder, workload, 2, names)
        run.record(rows=rows, **{name: statistics.median(value) if isinstance(value, list) else value
                                 for name, value in result.items()})


TRAINERS = {"dpo": ["dpo.py", "TRL", "dpo.py --share_prefix"], "reward_model": ["reward_model.py", "TRL", "reward_model.py --share_prefix"],
            "sft": ["sft.py", "TRL"]}


def trainer(run, name, workload=None, sides=None):
    """Optimizer steps of a script beside TRL 1.16.0's trainer: seconds and memory."""
    from benchmarks.common import NOT_COUNTED, STEP_WORKLOADS, child

    module = importlib.import_module(f"benchmarks.{name}_speed")
    workload = workload or STEP_WORKLOADS["tiny" if run.tiny else "pythia-1b"] | dict(batches=NOT_COUNTED + 2)
    label = f"prompt {workload['prompt']}, response {workload['response']}"
    folder = made_once(run.folder / f"{name}_{workload['prompt'][1]}", module.make_workload, workload)
    for side in sides or TRAINERS[name]:
        try:
            result = child(f"{name}_speed", sys.executable, side, folder, workload=workload,
                           threads=8 if gpu_here() else 1, packages=run.packages("trl_1.16") if side == "TRL" else None)
            run.record(script=f"{name}.py", side=side, workload=label, step_seconds=result["step"],
                       peak_gib=(result["loaded"] + result["memory"]) / 1024, first_loss=result["losses"][0])
        except SystemExit as error:
            run.record(script=f"{name}.py", side=side, workload=label, error=str(error)[-600:])
        finally:
            shutil.rmtree(folder / "ours", ignore_errors=True)
    shutil.rmtree(folder)


def dense(run):
    """Long pairs with one prompt: the dense mask of shared prompts beside the plain batch, 2 x 2,048 tokens a pair."""
    prompt, response = (12, 6) if run.tiny else (1536, 511)
    workload = dict(shape="7m" if run.tiny else "pythia-1b", prompt=(prompt, prompt), response=(response, response),
                    batch_size=8, micro_batch_size=2, batches=4)
    trainer(run, "reward_model", workload, ["reward_model.py", "reward_model.py --share_prefix"])


def plan(run):
    """The peaks that benchmarks/plan.py computes for the workloads of step ppo. Needs no GPU."""
    from transformers import AutoConfig

    from benchmarks import plan as planner
    from benchmarks.common import SHAPES
    from benchmarks.ppo_speed import WORKLOADS

    for name in ("512-53", "64-512"):
        workload = WORKLOADS["tiny" if run.tiny else f"pythia-1b-{name}"]
        settings = dict(SHAPES[workload["shape"]])
        config = AutoConfig.for_model(settings.pop("model_type"), num_labels=1, **settings)
        flags = planner.parser().parse_args(["--gpus", "1"])
        vars(flags).update(
            batch_size=workload["batch_size"], micro_batch_size=workload["micro_batch_size"],
            rollout_batch_size=workload["rollout_batch_size"], max_prompt_length=workload["prompt"][1],
            response_length=workload["response_length"], bf16=not run.tiny, flops=989.0)
        laps, _, engines, sizes = planner.simulate(config, flags, 1)
        run.record(workload=name, peaks_gib=planner.peaks_of(laps, flags, engines, sizes))


# ---- The order, and what a step may use -------------------------------------------------------------------


def step(name, seconds, function, *args, beside=None):
    """beside: steps in a row with one word here run side by side, as nothing in them is timed for a comparison."""
    return SimpleNamespace(name=name, seconds=seconds, function=function, args=args, beside=beside)


STEPS = [
    step("plan", 500, plan, beside="all along"),  # no GPU: it runs beside everything
    step("facts", 120, facts),
    step("right/tests", 120, tests, beside="right"),
    step("right/bf16", 120, short, "bf16", beside="right"),
    step("right/fp32", 120, short, "fp32", beside="right"),
    step("right/sampled", 100, sampled, beside="right"),
    step("right/launcher", 100, launcher, beside="right"),
    step("right/resume", 120, resume, beside="right"),
    step("ppo/512-53", 200, ppo, "512-53"),
    step("decode/64", 100, decode, 64),
    step("trainers/dpo", 130, trainer, "dpo"),
    *(step(f"right/{script}_{dtype}", 150, default_run, script, dtype, beside="defaults")
      for dtype in ("bf16", "fp32") for script in DEFAULT_RUNS),
    step("ppo/64-512", 200, ppo, "64-512"),
    step("trainers/reward_model", 100, trainer, "reward_model"),
    step("trainers/sft", 100, trainer, "sft"),
    step("trainers/dense_mask", 80, dense),
    step("decode/256", 90, decode, 256),
]


def gpu_here():
    import torch

    return torch.cuda.is_available()


def commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown: no git here"


class Run:
    """What a step gets: whether it is the tiny form, a folder for its files, and `record`."""

    def __init__(self, name, out, work, tiny):
        self.name, self.results, self.folder, self.tiny = name, Path(out) / "results.jsonl", Path(work), tiny

    def record(self, **figures):
        """Append one result, at once and whole: steps that run side by side write to one file."""
        line = json.dumps({"step": self.name, **figures}) + "\n"
        print(line, end="", flush=True)
        with open(self.results, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def packages(self, name):
        """The folder of a peer's packages; None where no wheel was collected: the environment's own are used."""
        folder = self.folder / name
        return folder if folder.exists() else None


# ---- The driver: needs nothing but Python -----------------------------------------------------------------


def install(wheels, target):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target),
                    *map(str, wheels)], check=True)


def prepare(work):
    """Install the collected wheels that this Python lacks. Returns the environment for the steps."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    # cuDNN's attention makes a plan for every new shape, which decoding and batches cut to their longest row always are
    environment.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    if importlib.util.find_spec("deepspeed") is None:
        if not list(WHEELS.glob("*.whl")):
            raise SystemExit("error: deepspeed is not installed, and benchmarks/wheels has no wheels: run "
                             "bash benchmarks/gpu_wheels.sh on a machine with network and bring that folder along")
        install(WHEELS.glob("*.whl"), work / "packages")
        environment["PYTHONPATH"] = os.pathsep.join([str(work / "packages"), environment.get("PYTHONPATH", "")])
    for name in ("trl_1.12", "trl_1.16"):
        if list(WHEELS.glob(f"{name}/*.whl")):
            install(WHEELS.glob(f"{name}/*.whl"), work / name)
    return environment


def start(step, args, work, environment, log):
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--step", step.name, "--out", str(args.out),
               "--work", str(work), *["--tiny"] * args.tiny]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    return process, time.monotonic()


def wait(step, process, started, limit, run):
    """Wait for a step, at most `limit` seconds, then end all its processes; record how it ended."""
    try:
        code = process.wait(max(1, limit))
        ended = "complete" if code == 0 else f"failed with exit code {code}: see log.txt"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {limit:.0f} seconds"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run.record(ended=ended, took=round(time.monotonic() - started, 1))


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def left():
        return args.seconds - (time.monotonic() - begun)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work, open(args.out / "log.txt", "a") as log:
        work = Path(work)
        environment = prepare(work)
        chosen = [step for step in STEPS if any(step.name.startswith(name) for name in args.only)]
        background, side_by_side, slots = [], [], threading.Semaphore(args.jobs)

        def run_one(step, slot=contextlib.nullcontext()):
            with slot:
                run = Run(step.name, args.out, work, args.tiny)
                if left() < 5:
                    return run.record(ended="not begun: no time left")
                wait(step, *start(step, args, work, environment, log), min(step.seconds, left()), run)

        def begin(step, *slot):
            thread = threading.Thread(target=run_one, args=(step, *slot))
            thread.start()
            return thread

        for step, following in zip(chosen, [*chosen[1:], None]):
            if step.beside == "all along":
                background.append(begin(step))
            elif step.beside:
                side_by_side.append(begin(step, slots))
            else:
                run_one(step)
            if following is None or following.beside != step.beside:
                while side_by_side:
                    side_by_side.pop().join()
        for thread in background:
            thread.join()
        text = tables(read(args.out / "results.jsonl"))
        (args.out / "tables.md").write_text(text)
        print(text)


# ---- Tables -----------------------------------------------------------------------------------------------


def read(file):
    return [json.loads(line) for line in open(file)]


def table(header, rows):
    def cell(value):
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "-|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows]) + "\n\n"


def tables(results, reference=()):
    """Markdown of all results. reference: results of the default runs on a CPU, to stand beside."""

    def of(name):
        return [row for row in results if row["step"].startswith(name) and "ended" not in row]

    def figure(row, name, digits=3):
        return row.get(name) if "error" not in row else "failed"

    known = {}
    for row in of("facts"):
        known |= row
    text = ""
    if "device" in known:
        text += (f"{known['device']}, {known['cores']} CPU cores; Python {known['python']}, torch {known['torch']}, "
                 f"transformers {known['transformers']}, DeepSpeed {known['deepspeed']}; commit {known['commit']}"
                 + ("; the tiny form, which only tries the program" if known["tiny"] else "") + ".\n\n")
    if "bf16_tflops" in known:
        text += table(["ceiling", "measured"], [
            ["matrix product in bf16, TFLOP/s", known["bf16_tflops"]], ["in fp32", known["fp32_tflops"]],
            ["copy, GB/s read and written", known["copy_gb_per_second"]]])
    checks = [row for row in of("right") if "passed" in row]
    if checks:
        details = [row.get("last_line") or "; ".join(
            f"update {i} differs by {x:.1e}" for i, x in enumerate(row.get("differences", []), 1)) for row in checks]
        text += table(["check", "passed", "detail"], [
            [row["step"].split("/")[1], "yes" if row["passed"] else "NO", detail] for row, detail in zip(checks, details)])
    variants = [row for row in of("right") if "variant" in row]
    if variants:
        base = {row["dtype"]: row for row in variants if row["variant"] == "ZeRO 0" and "error" not in row}
        text += "The first update of the embedded task, with each way to place models and states:\n\n" + table(
            ["", "dtype", "first log-ratio", *COMPARED, "largest difference to ZeRO 0"], [
                [row["variant"], row["dtype"], figure(row, "first_log_ratio"), *(figure(row, key) for key in COMPARED),
                 max(abs(row[key] - base[row["dtype"]][key]) for key in COMPARED)
                 if "error" not in row and row["dtype"] in base else row.get("error")] for row in variants])
    if of("right/sampled"):
        text += "Log-probability of a token as scored less as sampled:\n\n" + table(
            ["dtype", "tokens", "mean size of the difference", "largest", "mean of its exp"],
            [[row[key] for key in ("dtype", "tokens", "mean_difference", "largest_difference", "mean_ratio")]
             for row in of("right/sampled")])
    defaults = [(row, "this machine") for row in of("right") if "script" in row] + [
        (row, "CPU") for row in reference if "script" in row]
    if defaults:
        names = {"eval/score": "score", "eval/gold": "gold", "eval/kl": "KL",
                 "eval/preferences_persuasion/rewards/accuracies": "accuracy"}
        text += "The bare command of each script, seed 1, held-out figures at the end:\n\n" + table(
            ["", "on", "dtype", *names.values(), "seconds, others beside it"],
            [[f"{row['script']}.py", where, row["dtype"], *(row.get("after", {}).get(name) for name in names),
              row.get("seconds", row.get("error"))] for row, where in sorted(
                 defaults, key=lambda item: (item[0]["script"], item[0]["dtype"], item[1]))])
    updates = of("ppo")
    if updates:
        planned = {row["workload"]: max(peak for phase, peak in row["peaks_gib"].items() if phase != "start")
                   for row in of("plan")}
        ceiling = known.get("bf16_tflops")
        rows = []
        for row in updates:
            if "error" in row:
                rows.append([row["workload"], row["side"], "failed", *[None] * 7])
                continue
            tokens = row["batch"] * row["response_tokens"] / row["rollout"] if "response_tokens" in row else None
            share = row["flops"] / row["training"] / 1e12 / ceiling if "flops" in row and ceiling else None
            plan_of_ours = planned.get(row["workload"]) if row["side"] == "ppo.py" else None
            rows.append([row["workload"], row["side"], row["rollout"], row["scoring"], row["training"], row["update"],
                         tokens, share, row["peak_gib"], plan_of_ours])
        text += ("One update of 64 episodes and 4 epochs, in bf16, prompt tokens - response tokens (TRL: fp32 weights, trained "
                 "under autocast, sampled in fp32):\n\n") + table(
            ["workload", "", "rollout, s", "scoring, s", "training, s", "update, s", "sampled tokens/s",
             "training's share of the bf16 ceiling", "peak after loading, GiB", "planned"], rows)
    decoded = {}  # {rows: all that was recorded of them}
    for row in of("decode"):
        decoded.setdefault(row["rows"], {}).update(row)
    if decoded:
        update = next((row["update"] for row in updates if row.get("side") == "ppo.py" and "update" in row
                       and row["workload"] == "512-53"), None)
        text += "53 tokens for each prompt of 256 to 512, seconds:\n\n" + table(
            ["rows", "ppo.py", "of it prefill", "of it decoding", "decoding's floor by memory traffic", "generate",
             "static cache, compiled", "its first call", "share of an update that compiling would save"],
            [[rows, row["ours"], row["prefill"], row["ours"] - row["prefill"], row["floor"], row["generate"],
              row.get("static"), row.get("static_first"),
              (row["ours"] - row["static"]) / update if update and rows == 64 and "static" in row else None]
             for rows, row in decoded.items()])
    if of("trainers"):
        text += "Seconds of an optimizer step at 1B, beside TRL 1.16.0:\n\n" + table(
            ["script", "side", "workload", "seconds", "peak after loading, GiB", "first loss"],
            [[row["script"], row["side"], row["workload"], figure(row, "step_seconds"), row.get("peak_gib"),
              row.get("first_loss")] for row in of("trainers")])
    ended = [row for row in results if "ended" in row and row["ended"] != "complete"]
    if ended:
        text += "Not complete: " + "; ".join(f"{row['step']} ({row['ended']})" for row in ended) + ".\n"
    return text


def page_section():
    """The GPU section of docs/speed.md: the tables of the newest record, or that there is none."""
    records = sorted(ROOT.glob("records/*_gpu/results.jsonl"))
    if not records:
        return ("Not measured yet: no GPU was at hand. `python -m benchmarks.gpu_day --out gpu_day` measures all of it in "
                "under nine minutes, and\n`python -m benchmarks.gpu_day --page` then writes this section.\n")
    folder = records[-1].parent
    reference = read(folder / "cpu.jsonl") if (folder / "cpu.jsonl").exists() else ()
    return (f"Written by `python -m benchmarks.gpu_day --page` from [the record](../records/{folder.name}/README.md).\n\n"
            + tables(read(records[-1]), reference).rstrip() + "\n")


def write_page():
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + page_section() + END + rest.split(END)[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540, help="for all steps together")
    parser.add_argument("--tiny", action="store_true", help="small models")
    parser.add_argument("--only", nargs="+", default=[""], help="steps whose names begin so")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() // 2), help="correctness steps side by side")
    parser.add_argument("--page", action="store_true", help="write docs/speed.md from the newest record")
    for name in ("step", "work"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.page:
        write_page()
    elif args.step:
        chosen = next(step for step in STEPS if step.name == args.step)
        chosen.function(Run(chosen.name, args.out, args.work, args.tiny), *chosen.args)
    else:
        main(args)
