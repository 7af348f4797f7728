"""Speed and memory of reward_model.py against TRL's RewardTrainer.

python -m benchmarks.reward_model_speed --trl_python PATH, the python of an environment with trl 1.16.0 (pip install
trl==1.16.0), which reward_model.py does not need.

Both train the same classifier with random weights, head included, on the same token ids, the same pairs in every
optimizer step, with the same micro-batches, weight decay and clipping, and learning rate 0, so that nothing drifts. TRL
recomputes no activations here. Two more sides take its samplers for mixed lengths, by the longer sequence of a pair:
"by length" puts like lengths into one batch, here of one batch (of up to 50 in a long run); "balanced" puts
like lengths of one batch into one micro-batch, in micro-batches of unequal size, which its loss then weighs alike. Both
see the same pairs in another order. "--share_prefix" puts the two completions of a pair into one row with their prompt:
the same losses up to rounding. The sides alternate; each run is a process of its own. Compared are seconds per optimizer
step, all that happens in it counted, the first two steps left out, and peak memory above the level after loading. First:
the losses. Last: a step beside its own matrix products alone.

--workload mixed, flat: 7M parameters, fp32, one CPU thread; flat has rows of one length, which need no padding. The
others are for one GPU, in bf16 with fp32 master weights (TRL: fp32 weights under autocast), beside `tiny`, which tries
the program. --sides "reward_model.py" "reward_model.py --gradient_checkpointing" compares flags of reward_model.py.
"""

from unittest.mock import patch

import torch

from benchmarks.common import (
    TRL_SIDES, compare_steps, draw_texts, make_model, make_tokenizer, time_script, time_trl, write_rows, write_shuffled)


def make_workload(folder, workload):
    import reward_model

    tokenizer = make_tokenizer()
    make_model(folder / "model", workload["shape"], tokenizer, classifier=True)
    response = workload["response"]
    rows = draw_texts(
        workload, {"prompt": workload["prompt"], "chosen": response, "rejected": response}, tokenizer)
    write_shuffled(folder / "train.jsonl", rows)
    write_rows(folder / "one.jsonl", [{**row, "completion": row["chosen"]} for row in rows[:1]])
    pairs = [[reward_model.encode(row["prompt"], row[side], tokenizer) for side in ("chosen", "rejected")]
             for row in rows]
    write_rows(folder / "ids.jsonl", [
        {"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))}
        for chosen, rejected in pairs])


def run_ours(folder, flags, workload, products):
    import tyro

    import reward_model

    one = str(folder / "one.jsonl")
    args = tyro.cli(reward_model.Args, args=flags, default=reward_model.Args(
        model=str(folder / "model"), train_data=str(folder / "train.jsonl"), eval_data=(one,), demonstrations=one,
        max_prompt_length=2048, max_length=workload["prompt"][1] + workload["response"][1] + 1, epochs=1,
        batch_size=workload["batch_size"], micro_batch_size=workload["micro_batch_size"], lr=0.0, max_grad_norm=1.0,
        log_every=1, eval_every=10**6, save_every=10**6, output_dir=str(folder / "ours"),
        overwrite=(folder / "ours").exists(), bf16=torch.cuda.is_available()))
    with patch.object(reward_model, "init_head"):  # the saved head stays, which TRL has too
        return time_script(reward_model, args, workload["batches"], products)


def run_trl(folder, workload, sampler):
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(1)
    return time_trl(
        RewardTrainer, RewardConfig,
        AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder / "model"),
        load_dataset("json", data_files=str(folder / "ids.jsonl"), split="train"), folder, workload, sampler,
        remove_unused_columns=False)  # the sampler reads the column of lengths


def run_side(side, folder, workload, products=False):
    if side in TRL_SIDES:
        return run_trl(folder, workload, TRL_SIDES[side])
    return run_ours(folder, side.split()[1:], workload, products)


if __name__ == "__main__":
    compare_steps("reward_model_speed", "reward_model.py", __doc__, make_workload, run_side,
                  ["reward_model.py --share_prefix"])
