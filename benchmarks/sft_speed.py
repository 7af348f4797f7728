"""Speed and memory of sft.py against TRL's SFTTrainer: python -m benchmarks.sft_speed --trl_python PATH

PATH is the python of an environment with trl 1.16.0 (pip install trl==1.16.0), which sft.py does not need.

Both train the same model with random weights on the same token ids, prompt tokens counted, the same rows in every
optimizer step, with the same micro-batches, weight decay and clipping, and learning rate 0, so that nothing drifts. TRL
recomputes no activations here; its loss is its own, which never holds all logits. Two more sides take its samplers for
mixed lengths: "by length" puts like lengths into one batch, here of one batch (of up to 50 in a long run);
"balanced" puts like lengths of one batch into one micro-batch, in micro-batches of unequal size. Both see the same rows
in another order. The sides alternate; each run is a process of its own. Compared are seconds per optimizer step, all
that happens in it counted, the first two steps left out, and peak memory above the level after loading. First: the
losses. Last: a step beside its own matrix products alone.

--workload mixed, flat: 7M parameters, fp32, one CPU thread; flat has rows of one length, which need no padding. The
others are for one GPU, in bf16 with fp32 master weights (TRL: fp32 weights under autocast), beside `tiny`, which tries
the program. --sides "sft.py" "sft.py --gradient_checkpointing" compares flags of sft.py instead.
"""

import torch

from benchmarks.common import (
    TRL_SIDES, compare_steps, draw_texts, make_model, make_tokenizer, time_script, time_trl, write_rows, write_shuffled)


def make_workload(folder, workload):
    import sft

    tokenizer = make_tokenizer()
    make_model(folder / "model", workload["shape"], tokenizer)
    rows = draw_texts(workload, {"prompt": workload["prompt"], "completion": workload["response"]}, tokenizer)
    write_shuffled(folder / "train.jsonl", rows)
    write_rows(folder / "one.jsonl", rows[:1])
    write_rows(folder / "ids.jsonl", [{"input_ids": sft.encode_demonstration(row, tokenizer)[0]} for row in rows])


def run_ours(folder, flags, workload, products):
    import tyro

    import sft

    args = tyro.cli(sft.Args, args=flags, default=sft.Args(
        model=str(folder / "model"), train_data=str(folder / "train.jsonl"), eval_data=str(folder / "one.jsonl"),
        num_samples=0, max_prompt_length=2048, max_length=workload["prompt"][1] + workload["response"][1] + 1, epochs=1,
        batch_size=workload["batch_size"], micro_batch_size=workload["micro_batch_size"], lr=0.0, max_grad_norm=1.0,
        log_every=1, eval_every=10**6, save_every=10**6, output_dir=str(folder / "ours"),
        overwrite=(folder / "ours").exists(), bf16=torch.cuda.is_available()))
    return time_script(sft, args, workload["batches"], products)


def run_trl(folder, workload, sampler):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    return time_trl(
        SFTTrainer, SFTConfig, AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder / "model"),
        load_dataset("json", data_files=str(folder / "ids.jsonl"), split="train"), folder, workload, sampler)


def run_side(side, folder, workload, products=False):
    if side in TRL_SIDES:
        return run_trl(folder, workload, TRL_SIDES[side])
    return run_ours(folder, side.split()[1:], workload, products)


if __name__ == "__main__":
    compare_steps("sft_speed", "sft.py", __doc__, make_workload, run_side)
