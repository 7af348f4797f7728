"""Speed and memory of dpo.py against TRL's DPOTrainer: python -m benchmarks.dpo_speed --trl_python PATH

PATH is the python of an environment with trl 1.16.0 (pip install trl==1.16.0), which dpo.py does not need.

Both train the same model with random weights against a reference with other random weights (so that the loss is not
ln 2), on the same pairs in every optimizer step, with the same micro-batches, beta and learning rate 0, so that nothing
drifts. TRL recomputes no activations here. dpo.py reads the reference's log-probabilities from its cache, which it
computes before the first step, or with --ref_cache None computes them in every step; TRL does the latter by default, and
the former as "TRL, precomputed reference". --share_prefix puts the two responses of a pair into one row with their
prompt: the same losses up to rounding. It pays where prompts are long. The sides alternate; each run is a process of its own. Compared are seconds
per optimizer step, all that happens in it counted, the first two steps left out, and peak memory above the level after
loading. First: the losses. Last: a step beside its own matrix products alone.

--workload mixed, long_responses: 7M parameters, fp32, one CPU thread. The others are for one GPU, in bf16 with fp32
master weights (TRL: fp32 weights under autocast), beside `tiny`, which tries the program.
--sides "dpo.py" "dpo.py --gradient_checkpointing" compares flags of dpo.py instead.
"""

import torch

from benchmarks.common import (
    compare_steps, draw_texts, make_model, make_tokenizer, time_script, time_trl, write_rows, write_shuffled)

BETA = 0.1
TRL_SIDES = {"TRL": False, "TRL, precomputed reference": True}


def make_workload(folder, workload):
    tokenizer = make_tokenizer()
    for seed, name in enumerate(("model", "reference")):
        make_model(folder / name, workload["shape"], tokenizer, seed=seed)
    response = workload["response"]
    rows = draw_texts(workload, {"prompt": workload["prompt"], "chosen": response, "rejected": response}, tokenizer)
    write_shuffled(folder / "train.jsonl", rows)
    write_rows(folder / "one.jsonl", rows[:1])
    write_rows(folder / "texts.jsonl", rows)


def run_ours(folder, flags, workload, products):
    import tyro

    import dpo

    one, longest = str(folder / "one.jsonl"), workload["prompt"][1] + workload["response"][1]
    args = tyro.cli(dpo.Args, args=flags, default=dpo.Args(
        model=str(folder / "model"), ref_model=str(folder / "reference"), train_data=str(folder / "train.jsonl"),
        eval_data=(one,), eval_prompts=one, num_eval_prompts=1, response_length=1, gold_function=None,
        max_prompt_length=workload["prompt"][1], max_length=longest + 1, beta=BETA, epochs=1,
        batch_size=workload["batch_size"], micro_batch_size=workload["micro_batch_size"], lr=0.0, log_every=1,
        eval_every=10**6, save_every=10**6, ref_cache=str(folder / "cache"), output_dir=str(folder / "ours"),
        overwrite=(folder / "ours").exists(), bf16=torch.cuda.is_available()))
    return time_script(dpo, args, workload["batches"], products)


def run_trl(folder, workload, precomputed):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype) for name, dtype in (
        ("model", torch.float32), ("reference", torch.bfloat16 if torch.cuda.is_available() else torch.float32)))

    class Trainer(DPOTrainer):
        def __init__(self, model, config, **settings):
            super().__init__(model, reference, config, **settings)

    return time_trl(
        Trainer, DPOConfig, policy, AutoTokenizer.from_pretrained(folder / "model"),
        load_dataset("json", data_files=str(folder / "texts.jsonl"), split="train"), folder, workload, "sequential",
        beta=BETA, precompute_ref_log_probs=precomputed)


def run_side(side, folder, workload, products=False):
    if side in TRL_SIDES:
        return run_trl(folder, workload, TRL_SIDES[side])
    return run_ours(folder, side.split()[1:], workload, products)


if __name__ == "__main__":
    compare_steps("dpo_speed", "dpo.py", __doc__, make_workload, run_side,
                  ["dpo.py --share_prefix", "dpo.py --ref_cache None"], TRL_SIDES)
