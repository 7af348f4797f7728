"""Speed and memory of ppo.py against TRL's PPOTrainer: python -m benchmarks.ppo_speed --workload mixed --trl_python PATH

PATH is the python of an environment with trl 1.12.0, the last release that has a PPOTrainer (pip install trl==1.12.0).

Both train the same models with random weights on the same prompts, with the same sampling law, epochs, batch sizes and
number of optimizer steps, with learning rate 0, so that nothing drifts. TRL recomputes no activations here. The sides
alternate; each run is a process of its own, its first update is not counted. An update is cut where the last response
is decoded (rollout) and where the last advantage is whitened (scoring). Memory is the peak above the level after
loading; TRL decodes and scores --rollout_batch_size rows at a time, ppo.py decodes so many and scores a micro-batch.
Then: the training part beside its own matrix products alone, and the rollout beside transformers' generate.

--workload flat, mixed: 7M parameters, fp32, one CPU thread. The others are for one GPU, in bf16, beside `tiny`, which
tries the program. --sides "ppo.py --bf16" ... compares flags of ppo.py instead (see --help).
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import (
    Memory, Products, child, make_model, make_tokenizer, median, now, print_table, texts_of_lengths, write_rows)

# Prompt tokens (low, high), probability that a token ends the response (None: weights as drawn), and ppo.py's sizes.
CPU = dict(shape="7m", response_length=48, batch_size=32, micro_batch_size=8, rollout_batch_size=32)
ONE_B = dict(shape="pythia-1b", micro_batch_size=16, rollout_batch_size=64)
WORKLOADS = {
    "tiny": CPU | dict(prompt=(8, 16), eos_probability=0.1, response_length=8, batch_size=8, micro_batch_size=4),
    "flat": CPU | dict(prompt=(32, 64), eos_probability=0.0),
    "mixed": CPU | dict(prompt=(16, 128), eos_probability=0.07),
    "pythia-1b-512-53": ONE_B | dict(prompt=(256, 512), eos_probability=0.0, response_length=53, batch_size=64),
    "pythia-1b-512-53-large": ONE_B | dict(prompt=(256, 512), eos_probability=0.0, response_length=53, batch_size=256),
    "pythia-1b-64-512": ONE_B | dict(prompt=(32, 64), eos_probability=0.005, response_length=512, batch_size=64),
    "pythia-1b-64-512-large": ONE_B | dict(prompt=(32, 64), eos_probability=0.005, response_length=512, batch_size=256),
    "qwen2.5-0.5b-512-53": dict(shape="qwen2.5-0.5b", prompt=(256, 512), eos_probability=None, response_length=53,
                                batch_size=64, micro_batch_size=16, rollout_batch_size=64)}
EPOCHS, TEMPERATURE = 4, 0.7


def make_workload(folder, workload):
    tokenizer = make_tokenizer()
    shape = workload["shape"]
    make_model(folder / "policy", shape, tokenizer, workload["eos_probability"], TEMPERATURE)
    make_model(folder / "reward_model", shape, tokenizer, seed=1, classifier=True)
    lengths = np.random.default_rng(0).integers(*workload["prompt"], size=workload["batch_size"], endpoint=True)
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in texts_of_lengths(lengths, tokenizer)])


# ---- The sides: each runs some updates and returns seconds of the parts of each, and the memory ------------


def run_ours(folder, flags, workload, updates, products=False):
    """ppo.py itself. Its parts are told apart by wrapping what it calls at their ends.

    products: list the matrix products of the training parts and time them alone afterwards.
    """
    import tyro

    import ppo

    stamps, memory, recorder, original = [], None, Products(), {
        name: getattr(ppo, name) for name in ("open_folder", "decode_responses", "stop_if_not_finite", "Tracker")}

    def open_folder(*args):
        nonlocal memory
        memory = Memory()  # all models are loaded, nothing has run
        return original["open_folder"](*args)

    def decode_responses(*args):
        stamps.append(now())  # also in the evaluation before the first update and after the last
        return original["decode_responses"](*args)

    def stop_if_not_finite(quantities, *args):
        original["stop_if_not_finite"](quantities, *args)
        if "first log-ratio" in quantities:  # inside the training
            return
        stamps.append(now())
        if products and "values" in quantities:
            recorder.__enter__()
        elif products:
            recorder.__exit__(None, None, None)

    class Tracker(original["Tracker"]):
        def line(self, *args, **kwargs):
            super().line(*args, **kwargs)
            stamps.append(now())

    for function in (open_folder, decode_responses, stop_if_not_finite, Tracker):
        setattr(ppo, function.__name__, function)
    sizes = {name: workload[name] for name in (
        "response_length", "batch_size", "micro_batch_size", "rollout_batch_size")}
    command = [f"--{name}={value}" for name, value in sizes.items()] + flags
    args = tyro.cli(ppo.Args, args=command, default=ppo.Args(
        sft_model=str(folder / "policy"), reward_model=str(folder / "reward_model"), gold_function=None,
        prompts=str(folder / "prompts.jsonl"), eval_prompts=str(folder / "prompts.jsonl"), num_eval_prompts=2,
        max_prompt_length=workload["prompt"][1], temperature=TEMPERATURE, num_ppo_epochs=workload.get("epochs", EPOCHS), lr=0.0, critic_lr=0.0,
        total_episodes=updates * workload["batch_size"], eval_every=10**6, save_every=10**6,
        output_dir=str(folder / "ours"), overwrite=(folder / "ours").exists(), bf16=torch.cuda.is_available()))
    ppo.main(args)
    ends = np.array(stamps[1:-1]).reshape(updates, 4)  # rollout, scoring, training, update
    return parts(ends) | {
        "memory": memory.peak(), "loaded": memory.level, "length": mean_length(folder), "flops": recorder.flops() / updates,
        "products": recorder.seconds(torch.bfloat16 if args.bf16 else torch.float32) / updates if products else None,
        "attention": recorder.attention_seconds / updates}


def mean_length(folder):
    rows = [json.loads(line) for line in open(folder / "ours" / "metrics.jsonl")]
    return [row["val/length"] for row in rows if "val/length" in row]


def parts(ends):
    """Seconds of the parts of each update but the first. ends (updates, 4): when each part ended."""
    starts = np.concatenate([ends[:-1, 3:], ends[1:, :3]], axis=1)
    seconds = ends[1:] - starts
    return {"rollout": seconds[:, 0].tolist(), "scoring": seconds[:, 1].tolist(), "training": seconds[:, 2].tolist(),
            "update": np.diff(ends[:, 3]).tolist()}


def run_trl(folder, workload, updates):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_num_threads(1)
    stamps = []

    def stamped(name):
        original = getattr(ppo_trainer, name)

        def function(*args, **kwargs):
            result = original(*args, **kwargs)
            stamps.append(now())
            return result

        setattr(ppo_trainer, name, function)

    class Clock(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            stamps.append(now())

        def on_step_end(self, *args, **kwargs):
            stamps.append(now())

    stamped("batch_generation")
    stamped("masked_whiten")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    data = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    data = data.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=["prompt"])
    gpu = torch.cuda.is_available()
    trained, frozen = torch.float32, torch.bfloat16 if gpu else torch.float32  # trained under autocast, sampled in fp32
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype) for dtype in (trained, frozen))
    critic, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", dtype=dtype)
        for dtype in (trained, frozen))
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=workload["micro_batch_size"],
            gradient_accumulation_steps=workload["batch_size"] // workload["micro_batch_size"], num_mini_batches=1,
            num_ppo_epochs=EPOCHS, total_episodes=updates * workload["batch_size"], learning_rate=0.0,
            response_length=workload["response_length"], temperature=TEMPERATURE, stop_token="eos",
            local_rollout_forward_batch_size=workload["rollout_batch_size"], missing_eos_penalty=1.0,
            num_sample_generations=0, report_to=[], bf16=gpu, use_cpu=not gpu, gradient_checkpointing=False,
            save_strategy="no", logging_steps=1, disable_tqdm=True),
        tokenizer, policy, reference, reward_model, data, critic, eval_dataset=data, callbacks=[Clock()])
    memory = Memory()
    trainer.train()
    return parts(np.array(stamps).reshape(updates, 4)) | {"memory": memory.peak(), "loaded": memory.level}


def run_rollouts(folder, workload, repeats, names=("ours", "prefill", "generate", "static")):
    """ppo.py's rollout and transformers' generate in turn, on the same prompts: seconds of each.

    static: generate with a static cache, which transformers compiles on a GPU; its first call is told apart. prefill:
    ppo.py's rollout of one token. floor: the seconds in which memory can deliver what decoding must read, weights once
    a step and keys and values of every row.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ppo

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype).to(device).eval()
    prompts = [(tokenizer(text).input_ids, text) for text in (
        json.loads(line)["prompt"] for line in open(folder / "prompts.jsonl"))]
    length, size = workload["response_length"], workload["rollout_batch_size"]
    args = ppo.Args(rollout_batch_size=size, temperature=TEMPERATURE)
    forbidden = ppo.forbidden_tokens(tokenizer, model.config.vocab_size).to(device)
    eos_ids = torch.tensor([tokenizer.eos_token_id], device=device)

    def ours(repeat, tokens):
        noise = ppo.sampling_noise(0, repeat, range(len(prompts)), tokens)
        return ppo.rollout(model, prompts, noise, args, tokenizer, forbidden, eos_ids)

    def generate(**settings):
        for some in ppo.chunks(prompts, size):
            ids, mask = ppo.pad([ids for ids, _ in some], tokenizer.pad_token_id, "left", device)
            model.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=length, do_sample=True, top_k=0,
                           temperature=TEMPERATURE, eos_token_id=eos_ids.tolist(), pad_token_id=tokenizer.pad_token_id,
                           **settings)

    ways = {"ours": lambda repeat: ours(repeat, length), "prefill": lambda repeat: ours(repeat, 1),
            "generate": lambda repeat: generate(), "static": lambda repeat: generate(cache_implementation="static")}
    ways = {name: ways[name] for name in names}
    seconds, all_drawn = {name: [] for name in ways}, []
    read, order = 0, sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = now()
            result = way(repeat)
            seconds[name].append(now() - start)
            if name == "ours":
                all_drawn.append((result != tokenizer.pad_token_id).sum(1).tolist())
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - (
        0 if config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes)  # of that, a row is looked up
    token = 2 * config.num_hidden_layers * model.dtype.itemsize * config.hidden_size * getattr(
        config, "num_key_value_heads", config.num_attention_heads) // config.num_attention_heads
    for lengths, rows in itertools.product(all_drawn, ppo.chunks(order, size)):
        sizes = [(len(prompts[i][0]), lengths[i]) for i in rows]
        for t in range(1, max(response for _, response in sizes)):
            read += weights + token * sum(prompt + t for prompt, response in sizes if response > t)
    found = {name: values[1:] for name, values in seconds.items()}
    if "static" in names:
        found["static_first"] = seconds["static"][0]
    if "ours" in names:
        found["floor"] = read / len(all_drawn) / memory_bandwidth(device)
    return found


def memory_bandwidth(device):
    """Bytes a second that this machine moves in a copy, read and written ones counted."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(6):
        start = now()
        target.copy_(source)
        seconds.append(now() - start)
    return 2 * source.nbytes / np.median(seconds[1:])


# ---- Main -------------------------------------------------------------------------------------------------


def main(args):
    workload = WORKLOADS[args.workload]
    if args.rollout_batch_size:
        workload = workload | {"rollout_batch_size": args.rollout_batch_size}
    sides = args.sides or ["ppo.py", "TRL"]
    with tempfile.TemporaryDirectory() as folder:
        make_workload(Path(folder), workload)
        settings = dict(workload=workload, updates=args.updates)
        runs = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side in sides:
                python = args.trl_python if side == "TRL" else sys.executable
                runs[side].append(child("ppo_speed", python, side, folder, **settings))
        print(f"{args.workload}: {workload}\n\nMedian seconds of {args.repeats} runs of {args.updates - 1} updates each, "
              "and MiB above the level after loading:\n")
        names = ("update", "rollout", "scoring", "training", "memory")
        print_table(["", *names, "lowest to highest update"], [
            [side, *(median(runs[side], name) for name in names),
             "{:.2f} to {:.2f}".format(*np.percentile([s for run in runs[side] for s in run["update"]], [0, 100]))]
            for side in sides])
        print_table([f"in times of {sides[-1]}", *names], [
            [side, *(median(runs[side], name) / median(runs[sides[-1]], name) for name in names)] for side in sides[:-1]])
        if not args.sides:
            ours = runs["ppo.py"]
            print(f"responses of ppo.py: {np.mean([run['length'] for run in ours]):.1f} tokens on average\n")
            floors = [child("ppo_speed", sys.executable, "ppo.py", folder, products=True, **settings)
                      for _ in range(2)]
            floor, training = median(floors, "products"), median(ours, "training")
            print_table(["training part", "its matrix products alone", "ratio", "GFLOP/s of the products"],
                        [[training, floor, training / floor, median(floors, "flops") / floor / 1e9]])
            found = child("ppo_speed", sys.executable, "rollout", folder, **settings)
            rollout, generate, static, prefill = (
                median([found], name) for name in ("ours", "generate", "static", "prefill"))
            print_table(["rollout", "transformers' generate", "times faster", "generate with a static cache",
                         "its first call"], [[rollout, generate, generate / rollout, static, found["static_first"]]])
            decode = rollout - prefill
            print_table(["prefill", "decode", "its reads from memory alone", "ratio"],
                        [[prefill, decode, found["floor"], decode / found["floor"]]])


def run_side(side, folder, workload, updates, products=False):
    if side == "TRL":
        return run_trl(folder, workload, updates)
    if side == "rollout":
        return run_rollouts(folder, workload, 5)
    return run_ours(folder, side.split()[1:], workload, updates, products)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--trl_python", default=sys.executable, help="python of an environment with trl 1.12.0")
    parser.add_argument("--sides", nargs="+", help='compare these in place of TRL: "ppo.py" "ppo.py --bf16"')
    parser.add_argument("--rollout_batch_size", type=int, help="another one than the workload's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=2, help="updates of a run; the first is not counted")
    for name in ("side", "folder", "settings"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        result = run_side(args.side, Path(args.folder), **json.loads(args.settings))
        Path(args.folder, "result.json").write_text(json.dumps(result))
    else:
        main(args)
