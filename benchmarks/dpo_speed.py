"""Speed and memory of dpo.py against TRL's DPOTrainer: python -m benchmarks.dpo_speed --trl_python PATH

PATH is the python of an environment with trl 1.16.0 (pip install trl==1.16.0), which dpo.py does not need.

Both train the same random GPT-NeoX (--width 256: 7M parameters; 6 layers, vocabulary 4,096) in fp32 on one thread, on
the same pairs of mixed lengths (--prompt 16 128 and --response 8 96 tokens), 32 pairs a step, 8 a micro-batch, with
learning rate 0, so that nothing drifts. The sides alternate; each run is a process of its own. Compared are medians of
seconds per optimizer step, all that happens in it counted, and the peak of resident memory above the level after the
imports. First, on one batch: the losses.

dpo.py stores its reference's log-probabilities on both sides. --share_prefix, one row a pair, saves the second copy of
the prompt and costs attention between the two responses, which is masked but computed: it pays where prompts are long or
the model is wide. --prompt 16 32 --response 240 480 is the other end.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Memory, child, now, write_rows

BATCH_SIZE, MICRO_BATCH_SIZE, BETA = 32, 8, 0.1
SIDES = ("dpo.py", "dpo.py --share_prefix", "TRL, live reference", "TRL, precomputed reference")


def make_workload(folder, args):
    """Policy, reference (other random weights, so that the loss is not ln 2) and pairs of real words."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = AutoTokenizer.from_pretrained("assets/sft")
    config = GPTNeoXConfig(
        vocab_size=4096, hidden_size=args.width, num_hidden_layers=6, num_attention_heads=8,
        intermediate_size=4 * args.width, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        GPTNeoXForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = " ".join(json.loads(line)["completion"] for line in open("assets/data/train.jsonl")).split()
    draw = np.random.default_rng(0)

    def text(low, high):
        """Real words, about a uniform number of tokens from low to high."""
        start, target = draw.integers(len(words) - high), draw.integers(low, high + 1)
        return tokenizer.decode(tokenizer(" " + " ".join(words[start : start + high])).input_ids[:target])

    rows = [{"prompt": text(*args.prompt), "chosen": text(*args.response), "rejected": text(*args.response)}
            for _ in range(BATCH_SIZE * args.batches)]
    for name, some in (("many", rows), ("one", rows[:BATCH_SIZE])):
        write_rows(folder / f"{name}.jsonl", some)


def run_ours(folder, data, side):
    import dpo

    memory, stamps = Memory(), []

    def timed_step(*args, original=dpo.optimizer_step):
        norm = original(*args)
        stamps.append(now())
        return norm

    dpo.optimizer_step = timed_step
    data = str(folder / f"{data}.jsonl")
    out = folder / "ours"
    dpo.main(dpo.Args(
        model=str(folder / "policy"), ref_model=str(folder / "reference"), train_data=data,
        eval_data=(str(folder / "one.jsonl"),), eval_prompts=str(folder / "one.jsonl"), num_eval_prompts=1,
        response_length=1, gold_function=None, max_prompt_length=512, max_length=1024, beta=BETA, epochs=1,
        batch_size=BATCH_SIZE, micro_batch_size=MICRO_BATCH_SIZE, lr=0.0, log_every=1, eval_every=10**6,
        save_every=10**6, share_prefix="--share_prefix" in side, ref_cache=str(folder / "cache"),
        output_dir=str(out), overwrite=out.exists()))
    losses = [json.loads(line).get("train/loss") for line in open(out / "metrics.jsonl")]
    return {"stamps": stamps, "losses": [loss for loss in losses if loss], "memory": memory.peak()}


def run_trl(folder, data, side):
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    memory, stamps = Memory(), []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            stamps.append(now())

    config = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=BATCH_SIZE // MICRO_BATCH_SIZE, num_train_epochs=1, learning_rate=0.0,
        beta=BETA, max_length=None, logging_steps=1, report_to=[], bf16=False, use_cpu=True,
        gradient_checkpointing=False, save_strategy="no", precompute_ref_log_probs="precomputed" in side, disable_tqdm=True)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("policy", "reference"))
    trainer = DPOTrainer(
        policy, reference, config, callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        train_dataset=load_dataset("json", data_files=str(folder / f"{data}.jsonl"), split="train"))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"stamps": stamps, "losses": losses, "memory": memory.peak()}


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        make_workload(Path(folder), args)
        pythons = {side: sys.executable if side.startswith("dpo.py") else args.trl_python for side in SIDES}
        print(f"Loss of one batch of {BATCH_SIZE} pairs, learning rate 0:\n\n| | loss |\n|-|-|")
        for side in SIDES:
            print(f"| {side} | {child('dpo_speed', pythons[side], side, folder, data='one')['losses'][0]:.7f} |",
                  flush=True)
        seconds, memory = {side: [] for side in SIDES}, {side: [] for side in SIDES}
        for _ in range(args.repeats):
            for side in SIDES:
                result = child("dpo_speed", pythons[side], side, folder, data="many")
                stamps = result["stamps"][1:]
                seconds[side].append(statistics.median(after - before for before, after in zip(stamps, stamps[1:])))
                memory[side].append(result["memory"])
        print(f"\nMedian of {args.repeats} runs of {args.batches} steps (each run: its median step):\n\n"
              "| | seconds per step | lowest to highest run | peak memory, MiB |\n|-|-|-|-|")
        for side in SIDES:
            print(f"| {side} | {statistics.median(seconds[side]):.3f} | {min(seconds[side]):.3f} to "
                  f"{max(seconds[side]):.3f} | {statistics.median(memory[side]):.0f} |")
        print("\n| time of ... | in times of dpo.py | of TRL live | of TRL precomputed |\n|-|-|-|-|")
        for side in SIDES[:2]:
            ratios = [statistics.median(seconds[side]) / statistics.median(seconds[peer])
                      for peer in (SIDES[0], *SIDES[2:])]
            print(f"| {side} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 128))
    parser.add_argument("--response", type=int, nargs=2, default=(8, 96))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8)
    for name in ("side", "folder", "settings"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run = run_ours if args.side.startswith("dpo.py") else run_trl
        result = run(Path(args.folder), side=args.side, **json.loads(args.settings))
        Path(args.folder, "result.json").write_text(json.dumps(result))
    else:
        main(args)
