"""What the benchmarks share: workloads of random weights and real words, processes in turn, memory, matrix products."""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Shapes of the workloads: transformers' configuration classes with the published sizes, built with random weights.
GPT_NEOX = dict(model_type="gpt_neox", rotary_pct=0.25, use_parallel_residual=True)
SHAPES = {
    "7m": GPT_NEOX | dict(vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8,
                          intermediate_size=1024, max_position_embeddings=1024),
    "pythia-1b": GPT_NEOX | dict(vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8,
                                 intermediate_size=8192, max_position_embeddings=2048),
    "qwen2.5-0.5b": dict(model_type="qwen2", vocab_size=151936, hidden_size=896, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                         max_position_embeddings=32768, tie_word_embeddings=True)}


# ---- Workloads --------------------------------------------------------------------------------------------


def make_tokenizer():
    """A tokenizer of 4,096 tokens, trained on the embedded task's texts: the workloads' models have no unused ids."""
    from transformers import AutoTokenizer

    texts = [row["prompt"] + row["completion"] for row in map(json.loads, open("assets/data/train.jsonl"))]
    return AutoTokenizer.from_pretrained("assets/sft").train_new_from_iterator(texts, 4096, show_progress=False)


def make_model(folder, shape, tokenizer, eos_probability=None, temperature=1.0, seed=0, classifier=False):
    """Save a model of this shape with random weights, and the tokenizer.

    eos_probability (GPT-NeoX alone): build the EOS logit into the weights as a constant, so that at this temperature
    each token ends the response with this probability; 0: never. PAD and ids without a token are never sampled, so
    that a trainer which does not forbid them has the same law. None: weights as drawn.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    settings = dict(SHAPES[shape], eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = AutoConfig.for_model(settings.pop("model_type"), num_labels=1, **settings)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):  # a CPU would take many seconds to draw 1B weights
        model = kind.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32)
    if eos_probability is not None:
        norm, head = model.base_model.final_layer_norm, model.get_output_embeddings().weight.data
        norm.weight.data[0], norm.bias.data[0] = 0.0, 1.0  # hidden dimension 0 is 1 at every position
        sampled = torch.zeros(len(head), dtype=torch.bool, device=head.device)
        sampled[list(tokenizer.get_vocab().values())] = True
        sampled[[tokenizer.pad_token_id, tokenizer.eos_token_id]] = False
        head[:, 0] = torch.where(sampled, 0.0, -1e4)
        if eos_probability > 0:
            spread = head[sampled, 1:].float().square().sum(1).mean() / temperature**2  # the other logits' variance
            others = sampled.sum() * torch.exp(spread / 2)
            head[tokenizer.eos_token_id] = 0.0
            head[tokenizer.eos_token_id, 0] = temperature * torch.log(
                others * eos_probability / (1 - eos_probability))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts_of_lengths(lengths, tokenizer, seed=0):
    """Real words, each text of exactly so many tokens."""
    import numpy as np

    words = " ".join(json.loads(line)["completion"] for line in open("assets/data/train.jsonl")).split()
    draw, texts = np.random.default_rng(seed), []
    for length in lengths:
        while True:  # a cut in the middle of a word may be tokenised differently: draw again
            start = draw.integers(len(words) - length)
            text = tokenizer.decode(tokenizer(" " + " ".join(words[start : start + length])).input_ids[:length])
            if len(tokenizer(text).input_ids) == length:
                break
        texts.append(text)
    return texts


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- Processes --------------------------------------------------------------------------------------------


def child(module, python, side, folder, threads=1, packages=None, **settings):
    """One run of one side in a process of its own; what it returns comes back through a file.

    packages: a folder of packages that go before those of the environment.
    """
    command = [python, "-m", f"benchmarks.{module}", "--side", side, "--folder", str(folder),
               "--settings", json.dumps(settings)]
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # it is no rank of ours
    environment = {name: value for name, value in os.environ.items() if name not in alone}
    environment["OMP_NUM_THREADS"] = str(threads)
    if side.startswith("TRL") and torch.cuda.is_available():
        environment["ACCELERATE_MIXED_PRECISION"] = "bf16"  # its PPOTrainer reads it from here alone
    if packages:
        environment["PYTHONPATH"] = os.pathsep.join([str(packages), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "Error" in line or line.startswith("error:")]
        raise SystemExit(f"{side} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}\n" + "\n".join(told[-3:]))
    return json.loads(Path(folder, "result.json").read_text())


def median(runs, *keys):
    """Median over runs of the median over what a run measured."""
    values = []
    for run in runs:
        for key in keys:
            run = run[key]
        values.append(statistics.median(run) if isinstance(run, list) else run)
    return statistics.median(values)


def print_table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "-|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)


# ---- Memory and time --------------------------------------------------------------------------------------


def now():
    """Seconds, with everything that a GPU has been given done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Memory:
    """Peak memory in MiB above the level when made: resident memory on a CPU, torch's allocations on a GPU."""

    def __init__(self):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.level = torch.cuda.memory_allocated() / 2**20
        else:
            for tensor in filter(torch.is_tensor, gc.get_objects()):
                tensor.detach().sum()  # weights are mapped from their file, and take memory once they are read
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak starts again from here
            self.level = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def peak(self):
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20 - self.level
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10 - self.level


# ---- Matrix products --------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Lists the matrix products that run inside, to time them alone: the floor below which no rewriting gets.

    Attention counts as its two products forward and four backward (fused kernels compute one of them twice). The
    seconds that attention takes here are noted.
    """

    def __init__(self):
        super().__init__()
        self.found = {}  # {((shape, strides) of a, of b): times}
        self.attention_seconds = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm"):
            self.add(*args[-2:])
        elif name.startswith("_scaled_dot_product") and name.endswith("backward"):
            q, k = args[1], args[2]
            scores = q.new_empty(1).expand(*q.shape[:3], k.shape[2])
            for a, b in ((scores.mT, q), (q, k.mT), (scores, k), (scores.mT, q)):  # dV, dP, dQ, dK
                self.add(a, b)
        elif name.startswith("_scaled_dot_product"):
            q, k = args[0], args[1]
            self.add(q, k.mT)
            self.add(q.new_empty(1).expand(*q.shape[:3], k.shape[2]), k)
        start = now() if name.startswith("_scaled_dot_product") else None
        result = function(*args, **(kwargs or {}))
        self.attention_seconds += now() - start if start else 0.0
        return result

    def add(self, a, b):
        # an expanded stand-in for the scores has strides of 0: its real layout is the contiguous one
        key = tuple((tuple(x.shape), tuple(x.stride()) if 0 not in x.stride() else None) for x in (a, b))
        self.found[key] = self.found.get(key, 0) + 1

    def flops(self):
        """Multiplications and additions of all of them."""
        return sum(2 * math.prod(a) * b[-1] * times for ((a, _), (b, _)), times in self.found.items())

    def seconds(self, dtype=torch.float32):
        """Time of all of them, one after the other, on tensors that are there already."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        total = 0.0
        for key, times in self.found.items():
            a, b = (torch.randn(shape, dtype=dtype, device=device) if strides is None else
                    torch.empty_strided(shape, strides, dtype=dtype, device=device).normal_() for shape, strides in key)
            torch.matmul(a, b)
            start = now()
            for _ in range(times):
                torch.matmul(a, b)
            total += now() - start
        return total


# ---- Seconds per optimizer step ---------------------------------------------------------------------------

# Workloads of sft_speed.py, reward_model_speed.py and dpo_speed.py. prompt, response: tokens (low, high), uniform.
CPU = dict(shape="7m", batch_size=32, micro_batch_size=8, batches=5)
GPU = dict(prompt=(128, 512), response=(16, 128), batch_size=64, micro_batch_size=16, batches=8)
STEP_WORKLOADS = {
    "tiny": CPU | dict(prompt=(8, 16), response=(4, 8), batch_size=8, micro_batch_size=4, batches=4),
    "flat": CPU | dict(prompt=(72, 72), response=(52, 52)),
    "mixed": CPU | dict(prompt=(16, 128), response=(8, 96)),
    "long_responses": CPU | dict(prompt=(16, 32), response=(240, 480)),
    "pythia-1b": GPU | dict(shape="pythia-1b"),
    "qwen2.5-0.5b": GPU | dict(shape="qwen2.5-0.5b")}
NOT_COUNTED = 2  # optimizer steps that warm up
TRL_SIDES = {"TRL": "sequential", "TRL, by length": "group_by_length", "TRL, balanced": "batch_rebalance"}  # samplers


def draw_texts(workload, parts, tokenizer):
    """One dict for each row of all batches: a text of real words for each {name: (low, high) tokens} of parts."""
    import numpy as np

    rows, draw = workload["batches"] * workload["batch_size"], np.random.default_rng(0)
    columns = [texts_of_lengths(draw.integers(*lengths, size=rows, endpoint=True), tokenizer, seed)
               for seed, lengths in enumerate(parts.values())]
    return [dict(zip(parts, texts)) for texts in zip(*columns)]


def write_shuffled(path, rows, seed=1):
    """Write rows so that a script's first epoch with this seed visits them in the order given here."""
    from utils.data import permutation

    written = [None] * len(rows)
    for row, place in zip(rows, permutation(len(rows), seed, 0)):
        written[place] = row
    write_rows(path, written)


def time_script(script, args, steps, products=False):
    """Run script.main(args): seconds per step, loss of each step, memory; products: its matrix products alone too."""
    stamps, memory, peak, recorder = [], None, 0.0, Products()
    open_folder, optimizer_step = script.open_folder, script.optimizer_step

    def marked_open_folder(*args):
        nonlocal memory
        memory = Memory()  # the model is loaded, nothing has run
        return open_folder(*args)

    def timed_step(*args):
        nonlocal peak
        norm = optimizer_step(*args)
        stamps.append(now())
        peak = memory.peak()
        if products and len(stamps) == NOT_COUNTED:
            recorder.__enter__()
        elif products and len(stamps) == steps:
            recorder.__exit__(None, None, None)
        return norm

    with patch.multiple(script, open_folder=marked_open_folder, optimizer_step=timed_step):
        script.main(args)
    rows = [json.loads(line) for line in open(Path(args.output_dir, "metrics.jsonl"))]
    counted = steps - NOT_COUNTED
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return {"step": (stamps[-1] - stamps[NOT_COUNTED - 1]) / counted, "memory": peak, "loaded": memory.level,
            "losses": [row["train/loss"] for row in rows if "train/loss" in row],
            "products": recorder.seconds(dtype) / counted if products else None, "flops": recorder.flops() / counted}


def time_trl(trainer_class, config_class, model, tokenizer, data, folder, workload, sampler, **settings):
    """The same of one of TRL's trainers, with one of its samplers."""
    from transformers import TrainerCallback

    stamps = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            stamps.append(now())

    gpu = torch.cuda.is_available()
    config = config_class(
        output_dir=str(folder / "trl"), per_device_train_batch_size=workload["micro_batch_size"],
        gradient_accumulation_steps=workload["batch_size"] // workload["micro_batch_size"], num_train_epochs=1,
        learning_rate=0.0, weight_decay=0.01, max_grad_norm=1.0, max_length=None, gradient_checkpointing=False,
        bf16=gpu, use_cpu=not gpu, train_sampling_strategy=sampler, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, **settings)
    trainer = trainer_class(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    memory = Memory()
    trainer.train()
    return {"step": (stamps[-1] - stamps[NOT_COUNTED - 1]) / (len(stamps) - NOT_COUNTED), "memory": memory.peak(),
            "loaded": memory.level,
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def compare_steps(module, script, doc, make_workload, run_side, more=(), trl_sides=tuple(TRL_SIDES)):
    """Command line of a benchmark of seconds per optimizer step: our script, and `more` sides, beside TRL's trainer."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=STEP_WORKLOADS, default="mixed")
    parser.add_argument("--trl_python", default=sys.executable, help="python of an environment with trl 1.16.0")
    parser.add_argument("--sides", nargs="+", help=f'compare these in place of TRL: {script} "{script} --bf16"')
    parser.add_argument("--repeats", type=int, default=5)
    for name in ("side", "folder", "settings"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        result = run_side(args.side, Path(args.folder), **json.loads(args.settings))
        Path(args.folder, "result.json").write_text(json.dumps(result))
        return
    workload, sides = STEP_WORKLOADS[args.workload], args.sides or [script, *more, *trl_sides]
    runs, floors = {side: [] for side in sides}, []
    with tempfile.TemporaryDirectory() as folder:
        make_workload(Path(folder), workload)
        print(f"{args.workload}: {workload}\n")
        for repeat in range(args.repeats):
            for side in sides:
                python = args.trl_python if side.startswith("TRL") else sys.executable
                runs[side].append(child(module, python, side, folder, workload=workload))
            floors.append(child(module, sys.executable, sides[0], folder, workload=workload, products=True))
            if repeat == 0:
                print_table(["loss", "of the first batch", "mean of all batches"], [
                    [side, *(f"{x:.7f}" for x in (run["losses"][0], statistics.mean(run["losses"])))]
                    for side, (run,) in runs.items()])
    print(f"Median of {args.repeats} runs of {workload['batches'] - NOT_COUNTED} counted steps (a run counts with its "
          "mean step), MiB above the level after loading:\n")
    print_table(["", "seconds per step", "lowest to highest run", "memory"], [
        [side, median(some, "step"), "{:.3f} to {:.3f}".format(*(f(run["step"] for run in some) for f in (min, max))),
         median(some, "memory")] for side, some in runs.items()])
    print_table([f"{sides[0]} in times of", "seconds per step", "memory"], [
        [side, *(median(runs[sides[0]], name) / median(runs[side], name) for name in ("step", "memory"))]
        for side in sides[1:]])
    step, floor = median(runs[sides[0]], "step"), median(floors, "products")
    print_table(["seconds per step", "its matrix products alone", "ratio", "GFLOP/s of the products"],
                [[step, floor, step / floor, median(floors, "flops") / floor / 1e9]])
