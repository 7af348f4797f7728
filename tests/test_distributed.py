"""Two ranks give the numbers of one rank: collectives, saving, and runs of every script at ZeRO 0, 2 and 3.

One worker on two ranks, this file under torchrun, runs all cases and leaves its results in a folder. The runs on one
rank are made in the test process. With RECORD_DIFFERENCES=file.json in the environment, the relative differences of
weights that the tests have measured are written there.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

import dpo
import evaluate
import group_invariant_ppo
import ppo
import reward_model
import sft
import utils.run
from utils.data import call_judge, rows_of_this_rank
from utils.launch import all_max, all_sum, create_engine, full_state_dict, gather_rows, init_distributed
from utils.launch import optimizer_step, rank, rollout_weights, world_size
from utils.models import count_parameters, load_causal_lm, load_tokenizer, save_model
from utils.run import stop_if_not_finite

SEED = 5


def values_and_mask():
    """Values (5, 6) far from mean 0, and a mask (5, 6) with 1 to 6 True in a row."""
    generator = torch.Generator().manual_seed(SEED)
    values = 3 + torch.randn(5, 6, generator=generator)
    return values, torch.arange(6) < torch.tensor([6, 1, 4, 2, 5])[:, None]


def arguments(script, inputs, output_dir, **changes):
    """Args of a short run: 7 rows in batches of 4, so that the last batch is uneven on two ranks."""
    rows, pairs, lm, rm = (str(inputs / name) for name in ("rows.jsonl", "pairs.jsonl", "lm", "rm"))
    common = dict(output_dir=str(output_dir), seed=SEED, max_grad_norm=0.5, lr=1e-3)
    rollouts = dict(sft_model=lm, reward_model=rm, prompts=rows, eval_prompts=rows, num_eval_prompts=5, batch_size=8,
                    total_episodes=24, micro_batch_size=2, response_length=10, critic_lr=1e-3, temperature=1.0,
                    gold_function="test_ppo_whole:gold", eval_every=2, save_every=100, num_ppo_epochs=2)
    own = {
        sft: dict(model=lm, train_data=rows, eval_data=rows, epochs=2, batch_size=4, micro_batch_size=1, log_every=1,
                  num_samples=3, response_length=4),
        reward_model: dict(model=lm, train_data=pairs, eval_data=(pairs,), demonstrations=rows, epochs=2, batch_size=4,
                           micro_batch_size=1, log_every=1),
        ppo: dict(rollouts, whiten_rewards=True),
        group_invariant_ppo: dict(rollouts, prompts=str(inputs / "grouped.jsonl"), episodes_per_prompt=3, num_groups=3,
                                  beta_policy=0.6, beta_critic=1.0, dynamic_kl=True, kl_coef=0.2, group_head_lr=0.05),
        dpo: dict(model=lm, ref_model=str(inputs / "tied"), train_data=pairs, eval_data=(pairs,), eval_prompts=rows,
                  gold_function=None, epochs=2, batch_size=4, micro_batch_size=1, log_every=1, response_length=4,
                  beta=0.1, nll_coef=0.5, adam_eps=1e-5,  # 1e-8 would make steps of key biases' noise
                  ref_cache=str(Path(output_dir).with_name("ref_logprobs"))),
    }[script]
    changes = {flag: str(inputs / value.removeprefix("inputs/")) if "inputs/" in str(value) else value
               for flag, value in changes.items()}
    if "eval_data" in changes and script in (reward_model, dpo):
        changes["eval_data"] = (changes["eval_data"],)
    return script.Args(**{**common, **own, **changes})


# Runs by name: the script, and what differs from `arguments`. `inputs/` stands for the folder of models and data.
PACKED = dict(max_length=32, pack_length=48, batch_size=2)
FEW = dict(train_data="inputs/rows_5.jsonl", eval_data="inputs/rows_1.jsonl", epochs=1)  # batches of 4 and 1
FEW_PAIRS = dict(FEW, train_data="inputs/pairs_5.jsonl", eval_data="inputs/pairs_1.jsonl",
                 demonstrations="inputs/rows_1.jsonl")
FEW_DPO = dict(FEW, train_data="inputs/pairs_5.jsonl", eval_data="inputs/pairs_1.jsonl",
               eval_prompts="inputs/rows_1.jsonl")
TIED, ENDING = dict(model="inputs/tied", epochs=1), dict(sft_model="inputs/ending", total_episodes=8)
SAVERS = dict(gradient_checkpointing=True, offload_optimizer=True)
EXACT = dict(invariance_estimator="exact", group_variance="uniform", group_level="prompt", whiten_rewards=True)
ON_ONE_RANK = {
    "sft": (sft, {}), "sft_packed": (sft, PACKED), "sft_few": (sft, FEW), "sft_tied": (sft, TIED),
    "reward_model": (reward_model, {}), "reward_model_few": (reward_model, FEW_PAIRS),
    "ppo": (ppo, {}), "ppo_ending": (ppo, ENDING),
    **{f"ppo_micro{size}": (ppo, dict(micro_batch_size=size)) for size in (1, 8)},
    "group_invariant_ppo": (group_invariant_ppo, {}), "group_invariant_ppo_exact": (group_invariant_ppo, EXACT),
    **{f"group_invariant_ppo_micro{size}": (group_invariant_ppo, dict(micro_batch_size=size)) for size in (1, 8)},
    "dpo": (dpo, {}), "dpo_micro4": (dpo, dict(micro_batch_size=4)), "dpo_few": (dpo, FEW_DPO),
}
ON_TWO_RANKS = {
    "sft": (sft, {}), "reward_model": (reward_model, {}),
    **{f"sft_zero{stage}": (sft, dict(zero_stage=stage)) for stage in (2, 3)},
    **{f"reward_model_zero{stage}": (reward_model, dict(zero_stage=stage)) for stage in (2, 3)},
    "sft_packed": (sft, PACKED), "sft_tied_zero3": (sft, TIED | dict(zero_stage=3)),
    "sft_few_zero3": (sft, FEW | dict(zero_stage=3)),
    "reward_model_few_zero3": (reward_model, FEW_PAIRS | dict(zero_stage=3)),
    "reward_model_shared_few_zero3": (reward_model, FEW_PAIRS | dict(zero_stage=3, share_prefix=True)),
    **{f"ppo_zero{stage}": (ppo, dict(zero_stage=stage, save_every=1 if stage == 2 else 100)) for stage in (0, 2, 3)},
    **{f"ppo_zero{stage}_savers": (ppo, dict(zero_stage=stage, **SAVERS)) for stage in (2, 3)},
    "ppo_offload_frozen": (ppo, dict(offload_frozen=True)),
    "ppo_ending_zero3": (ppo, ENDING | dict(zero_stage=3)),
    **{f"group_invariant_ppo_zero{stage}": (
        group_invariant_ppo, dict(zero_stage=stage, save_every=1 if stage == 2 else 100)) for stage in (0, 2, 3)},
    "group_invariant_ppo_exact_zero0": (group_invariant_ppo, EXACT),
    "group_invariant_ppo_zero3_savers": (group_invariant_ppo, dict(zero_stage=3, **SAVERS)),
    **{f"group_invariant_ppo_minibatches_zero{stage}": (group_invariant_ppo, dict(zero_stage=stage, num_minibatches=2))
       for stage in (0, 3)},
    **{f"dpo_zero{stage}": (dpo, dict(zero_stage=stage)) for stage in (0, 2, 3)},
    "dpo_zero3_live": (dpo, dict(zero_stage=3, ref_cache=None)),
    "dpo_zero2_savers": (dpo, dict(zero_stage=2, micro_batch_size=2, **SAVERS)),
    "dpo_few_zero3": (dpo, FEW_DPO | dict(zero_stage=3)),
    "dpo_shared_few_zero3": (dpo, FEW_DPO | dict(zero_stage=3, share_prefix=True, ref_cache=None)),
}


def evaluation(inputs, out, **changes):
    """Args of an evaluation on 7 prompts, two models and both kinds of scoring judges."""
    return evaluate.Args(**{**dict(
        models=(str(inputs / "lm"), str(inputs / "tied")), ref_model=str(inputs / "lm"),
        prompts=str(inputs / "rows.jsonl"), judges=(str(inputs / "rm"), "assets.vader:compound"), response_length=10,
        micro_batch_size=2, greedy=True, output_dir=str(out / "evaluate"), cache=str(out / "evaluate_cache")), **changes})


# ---- bf16 -------------------------------------------------------------------------------------------------

ADAMW = dict(lr=0.01, eps=1.0, weight_decay=0.1)  # with so large an eps a step's size follows the gradient's


class Products(torch.nn.Module):
    """A model whose gradients are its inputs: (w * x).sum() of two weights. The sizes leave ranks uneven pieces."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.first, self.second = (torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((3, 5), (7,)))

    def forward(self, x):
        return (self.first * x[:15].view(3, 5)).sum() + (self.second * x[15:]).sum()


def bf16_inputs(step, number):
    """The inputs of a micro-batch (22,): multiples of 1/8 up to 15/8, so that bf16 has them, and a sum of two, exactly."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randint(-7, 16, (22,), generator=generator) / 8


def bf16_updates(stage, folder, micro_batches, steps, offload=False):
    """Master weights after each of `steps` updates with --bf16 from all ranks' micro-batches, and the gradient norms.

    Before the last step the run is saved and goes on from its checkpoint.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    args = sft.Args(bf16=True, zero_stage=stage, offload_optimizer=offload)
    found = []
    for step in range(steps):
        if step in (0, steps - 1):
            model = Products()
            engine = create_engine(model, torch.optim.AdamW(model.parameters(), **ADAMW), args)
            if step:
                utils.run.load_checkpoint(folder, {"model": engine})
        for number in range(rank(), micro_batches, world_size()):
            engine.backward(engine(bf16_inputs(step, number)) * world_size() / 64)
        norm = optimizer_step(engine, ADAMW["lr"])
        masters = [safe_get_full_fp32_param(param) for param in model.parameters()]
        found.append({"norm": float(norm), "masters": torch.cat([master.flatten() for master in masters]).tolist(),
                      "weights": sum((weight.flatten().tolist() for weight in full_state_dict(engine).values()), [])})
        utils.run.save_checkpoint(folder, step + 1, {"model": engine}, {})
    return found


BF16 = {"first": (4, 1), "three": (128, 3)}  # (micro-batches of all ranks, updates)


# ---- The worker -------------------------------------------------------------------------------------------


def collectives():
    """What the functions that look across ranks give on this rank."""
    values, mask = values_and_mask()
    mine, my_mask = values[rank() :: 2], mask[rank() :: 2]
    return {
        "sum": all_sum(torch.tensor([1.0 + rank(), 10.0])).tolist(),
        "max": all_max(torch.tensor([1.0 + rank(), 5.0 - rank()])).tolist(),
        "mean": float(ppo.masked_mean(mine, my_mask)),
        "whitened": ppo.masked_whiten(mine, my_mask).tolist(),
        "scaled": ppo.masked_whiten(mine, my_mask, shift_mean=False).tolist(),
        "rows": rows_of_this_rank(list("abcde")),
        "gathered": gather_rows(list("abcde")[rank() :: 2]),
        "gathered_short": gather_rows(["a"][rank() :: 2]),
    }


def bad_judge(queries, responses):
    return [float("nan") if rank() == 1 else 0.0 for _ in queries]


def stopped(function, *args):
    """What this rank prints when a function ends the program, or None if it does not."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            function(*args)
        except SystemExit:
            return printed.getvalue()


def worker(inputs, out):
    for script in (sft, reward_model, ppo, group_invariant_ppo, dpo, evaluate, utils.run):
        script.finish = lambda: None  # it ends the process group, which the next case needs
    init_distributed(5.0)
    (out / f"collectives_{rank()}.json").write_text(json.dumps(collectives()))
    (out / f"stopped_{rank()}.json").write_text(json.dumps([
        stopped(stop_if_not_finite, {"loss": 1.0, "norm": float("nan") if rank() == 1 else 2.0}, {}, out, 7),
        stopped(call_judge, bad_judge, "--reward_function", ["She was"], [" happy"]),
        stopped(stop_if_not_finite, {"loss": 1.0}, {}, out, 8)]))

    # saving and decoding weights that ZeRO 3 keeps in pieces
    tokenizer = load_tokenizer(str(inputs / "lm"), "--model")
    model, spare = (load_causal_lm(str(inputs / "lm"), "--model", tokenizer) for _ in range(2))
    for param in spare.parameters():
        torch.nn.init.zeros_(param)
    engine = create_engine(model, torch.optim.AdamW(model.parameters()), sft.Args(zero_stage=3))
    save_model(engine, model, tokenizer, out / "saved")
    save_file(rollout_weights(engine, spare).state_dict(), out / f"decoder_{rank()}.safetensors")

    counts = {"whole": count_parameters(spare), "in_pieces": count_parameters(model)}
    (out / f"parameters_{rank()}.json").write_text(json.dumps(counts))

    for stage in (0, 2, 3):
        for name, (micro_batches, steps) in BF16.items():
            for offload in (False, True)[: 1 + (stage > 0)]:
                case = f"bf16_{name}_{stage}_{offload}"
                found = bf16_updates(stage, out / case, micro_batches, steps, offload)
                (out / f"{case}_{rank()}.json").write_text(json.dumps(found))

    for name, (script, changes) in ON_TWO_RANKS.items():
        script.main(arguments(script, inputs, out / name, **changes))

    evaluate.main(evaluation(inputs, out))
    sampled = out / "evaluate_sampled"
    evaluate.main(evaluation(inputs, out, greedy=False, output_dir=str(sampled)))
    evaluate.main(evaluation(inputs, out, prompts=str(inputs / "rows_1.jsonl"), output_dir=str(out / "evaluate_few")))

    # the ZeRO 2 runs again, as if killed after the checkpoint of their first update
    for script in (ppo, group_invariant_ppo):
        resumed = out / f"{script.__name__}_resumed"
        if rank() == 0:
            shutil.copytree(out / f"{script.__name__}_zero2", resumed)
            shutil.rmtree(resumed / "checkpoints" / "step_0000002")
            for name in ("summary.json", "model.safetensors", "group_head.safetensors"):
                (resumed / name).unlink(missing_ok=True)
        torch.distributed.barrier()
        script.main(arguments(script, inputs, resumed, zero_stage=2, resume=True, save_every=1))

    # SIGTERM reaches rank 1 alone, in the first optimizer step
    for script in (ppo, group_invariant_ppo):
        real = script.optimizer_step
        script.optimizer_step = lambda *args: (rank() == 1 and os.kill(os.getpid(), signal.SIGTERM), real(*args))[1]
        codes, name = [], f"{script.__name__}_sigterm"
        try:
            script.main(arguments(script, inputs, out / name))
        except SystemExit as stop:
            codes.append(stop.code)
        script.optimizer_step = real
        (out / f"{name}_{rank()}.json").write_text(json.dumps(codes))

    # SIGTERM reaches rank 1 alone in a batch of an evaluation or of the normalisation, at ZeRO 3; then the run goes on
    codes, real = [], reward_model.interrupted
    for number in (3, 10, 10, None):
        asked = []
        reward_model.interrupted = lambda device: (asked.append(0), len(asked) == number and rank() == 1 and os.kill(
            os.getpid(), signal.SIGTERM), real(device))[2]
        try:
            reward_model.main(arguments(reward_model, inputs, out / "reward_model_sigterm", zero_stage=3,
                                        eval_batch_size=2, resume=number != 3))
            codes.append(len(asked))
        except SystemExit as stop:
            codes.append(stop.code)
    (out / f"reward_model_sigterm_{rank()}.json").write_text(json.dumps(codes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
    raise SystemExit


# ---- Fixtures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Random tiny models and 7 rows. One token in eight ends a response, so that endings differ."""
    folder = tmp_path_factory.mktemp("distributed")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "base")
    config = tiny_config(vocab_size=1024, pad_token_id=tokenizer.pad_token_id, num_labels=1)
    torch.manual_seed(SEED)
    lm, rm = GPTNeoXForCausalLM(config), GPTNeoXForSequenceClassification(config)
    lm.generation_config.eos_token_id = list(range(0, 1024, 8))
    for model, name in ((lm, "lm"), (rm, "rm")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=128, n_embd=32, n_layer=2, n_head=4))
    lm.generation_config.eos_token_id = list(range(1024))  # any token ends a response
    for model, name in ((tied, "tied"), (lm, "ending")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for source, name in (("train.jsonl", "rows"), ("preferences_train.jsonl", "pairs")):
        lines = (ROOT / "assets" / "data" / source).read_text(encoding="utf-8").splitlines(keepends=True)
        for file, count in ((name, 7), (f"{name}_5", 5), (f"{name}_1", 1)):
            (folder / f"{file}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    grouped = [row | {"group": place % 2} for place, row in enumerate(read(folder / "rows.jsonl"))]
    (folder / "grouped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in grouped))
    head = group_invariant_ppo.GroupHead(config.hidden_size, 3, SEED)
    (folder / "group_head").mkdir()
    save_file(head.state_dict(), folder / "group_head" / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def two(inputs, tmp_path_factory):
    """The folder with everything that two ranks made."""
    out = tmp_path_factory.mktemp("two_ranks")
    env = {key: value for key, value in os.environ.items()
           if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
               str(inputs), str(out)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.fixture(scope="session")
def one(inputs, tmp_path_factory):
    """The folder with the runs of one rank."""
    out = tmp_path_factory.mktemp("one_rank")
    before = os.getcwd()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()):
        for name, (script, changes) in ON_ONE_RANK.items():
            script.main(arguments(script, inputs, out / name, **changes))
        evaluate.main(evaluation(inputs, out))
    os.chdir(before)
    return out


SAMPLED = ("eval/rouge", "eval/length", "eval/ended", "eval/distinct")  # sft.py, dpo.py: from each rank's own stream


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


DIFFERENCES = {}  # {case: what assert_same_weights has measured}


@pytest.fixture(scope="session", autouse=True)
def record_differences():
    """Write the differences of weights to the file that RECORD_DIFFERENCES names, when all tests are done."""
    yield
    if file := os.environ.get("RECORD_DIFFERENCES"):
        Path(file).write_text(json.dumps(DIFFERENCES, indent=1) + "\n")


def weights(path):
    """The weights of a saved model, its folder, or of a saved group head, its file without the ending."""
    return load_file(path / "model.safetensors" if path.is_dir() else path.with_suffix(".safetensors"))


def assert_same_weights(folder, other, start, of_norm=1e-5):
    """Two saved models differ by less than 1e-5 of their norm, and 1e-4 of how far training has moved them."""
    inner = ("critic", "best", "group_head")
    case = " = ".join(f"{path.relative_to(path.parents[path.name in inner])}" for path in (folder, other))
    a, b, start = map(weights, (folder, other, start))
    assert a.keys() == b.keys()
    difference, norm, moved = (sum(float(x.double().square().sum()) for x in tensors) ** 0.5 for tensors in (
        [a[k] - b[k] for k in a], b.values(), [b[k] - start[k] for k in b.keys() & start.keys()]))
    DIFFERENCES[case] = {"of the norm": difference / norm, "of the movement": difference / moved}
    assert moved > 1e-3 * norm, "training has hardly moved the weights"
    assert difference < of_norm * norm
    assert difference < 1e-4 * moved


def assert_same_metrics(rows, expected, skip=(), relative=1e-4):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        assert row.keys() == other.keys()
        for name in row:
            if not name.startswith(skip):
                assert row[name] == pytest.approx(other[name], rel=relative, abs=1e-5), (row["step"], name)


def assert_same_samples(folder, other):
    """Every row of samples.jsonl, in order, each with its own score, KL and gold score."""
    rows, expected = read(folder / "samples.jsonl"), read(other / "samples.jsonl")
    assert len(rows) == len(expected) == 3 * 5 and len({row["gold"] for row in rows}) > 2
    for row, wanted in zip(rows, expected):
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            assert row[key] == (pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value), key


def assert_same_summary(folder, other):
    """All of summary.json but the time."""
    found, expected = (json.loads((path / "summary.json").read_text()) for path in (folder, other))
    for key in ("before", "after"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5)
    assert found["best_rlhf_reward"] == pytest.approx(expected["best_rlhf_reward"], rel=1e-4)
    assert found["episodes"] == expected["episodes"] == 24
    texts = [[(row["query"], row["before"], row["after"]) for row in each["samples"]] for each in (found, expected)]
    assert texts[0] == texts[1] and len(texts[0]) == 5


# ---- Collectives ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def both(two):
    """The results of `collectives` on rank 0 and on rank 1."""
    return [json.loads((two / f"collectives_{number}.json").read_text()) for number in (0, 1)]


def test_all_sum_and_all_max_look_at_all_ranks(both):
    """all_sum adds and all_max compares over the ranks, and every rank has the result."""
    for results in both:
        assert results["sum"] == [3.0, 20.0]
        assert results["max"] == [2.0, 5.0]


def test_masked_mean_is_over_all_ranks(both):
    """masked_mean of uneven shares is the mean of all counted tokens, not the mean of two means."""
    values, mask = values_and_mask()
    for results in both:
        assert results["mean"] == pytest.approx(float(values[mask].mean()), rel=1e-6)


@pytest.mark.parametrize("name, shift_mean", [("whitened", True), ("scaled", False)])
def test_masked_whiten_is_over_all_ranks(both, name, shift_mean):
    """masked_whiten uses mean and variance of all ranks: every rank's rows equal those of one rank."""
    values, mask = values_and_mask()
    expected = ppo.masked_whiten(values, mask, shift_mean)
    for number in (0, 1):
        torch.testing.assert_close(torch.tensor(both[number][name]), expected[number::2], rtol=1e-5, atol=1e-6)


def test_rows_of_this_rank_cover_all_rows_once(both):
    """Each row goes to one rank; the shorter share is filled with None, so that both have the same length."""
    assert both[0]["rows"] == ["a", "c", "e"]
    assert both[1]["rows"] == ["b", "d", None]


def test_gather_rows_restores_the_order(both):
    """gather_rows undoes the split on every rank, also where a rank has no row."""
    for results in both:
        assert results["gathered"] == list("abcde")
        assert results["gathered_short"] == ["a"]


def test_a_fault_on_one_rank_stops_all(two):
    """A NaN, or a judge's fault, on rank 1 ends both ranks; rank 0 prints the line, no rank is left in a collective."""
    texts = [json.loads((two / f"stopped_{number}.json").read_text()) for number in (0, 1)]
    assert "step 7: norm is not finite" in texts[0][0] and "bad_batch_rank1.pt" in texts[0][0]
    assert "--reward_function: it returned nan on query 'She was'" in texts[0][1]
    assert texts[1][:2] == ["", ""] and [text[2] for text in texts] == [None, None]


# ---- Weights in pieces ------------------------------------------------------------------------------------


def test_zero3_saves_full_weights(inputs, two):
    """At ZeRO 3, save_model writes every weight in full, bit for bit."""
    weights, expected = (load_file(path / "model.safetensors") for path in (two / "saved", inputs / "lm"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("number", [0, 1])
def test_zero3_rollout_weights_are_full_on_every_rank(inputs, two, number):
    """At ZeRO 3, both ranks decode with a model that holds every weight in full, bit for bit."""
    weights = load_file(two / f"decoder_{number}.safetensors")
    expected = GPTNeoXForCausalLM.from_pretrained(inputs / "lm").state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_zero3_parameters_are_counted_in_full(two):
    """Printed sizes do not shrink to 0 when ZeRO 3 keeps the weights in pieces."""
    for number in (0, 1):
        counts = json.loads((two / f"parameters_{number}.json").read_text())
        assert counts["in_pieces"] == counts["whole"] > 10_000


# ---- Runs -------------------------------------------------------------------------------------------------


def plain_bf16_updates(micro_batches, steps):
    """(norm, weights) of the same updates by torch alone, in fp32 from weights that were rounded to bf16 once."""
    model, found = Products().bfloat16().float(), []
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for step in range(steps):
        total = sum(bf16_inputs(step, number) / 64 for number in range(micro_batches))
        model.first.grad, model.second.grad = total[:15].view(3, 5), total[15:]
        optimizer.step()
        found.append((total.norm(), torch.cat([model.first.detach().flatten(), model.second.detach()])))
    return found


def assert_bf16_updates(found, micro_batches, steps):
    before = torch.cat([param.detach().bfloat16().float().flatten() for param in Products().parameters()])
    for row, (norm, expected) in zip(found, plain_bf16_updates(micro_batches, steps), strict=True):
        masters = torch.tensor(row["masters"])
        torch.testing.assert_close(masters - before, expected - before, rtol=1e-3, atol=1e-6)  # size and direction
        assert (expected - before).abs().median() > 1e-4 and row["norm"] == pytest.approx(float(norm), rel=1e-4)
        torch.testing.assert_close(torch.tensor(row["weights"]), masters.bfloat16().float(), rtol=0, atol=0)
        before = expected


@pytest.mark.parametrize("name", BF16)
@pytest.mark.parametrize("stage, offload", [(0, False), (2, False), (2, True), (3, False), (3, True)])
def test_bf16_updates_on_two_ranks_are_those_of_fp32_masters_and_gradients(two, stage, offload, name):
    """--bf16 at every ZeRO stage: the first update, and three of 128 micro-batches, are those of plain torch with
    fp32 master weights and gradients summed in fp32; so is the norm. The last of three is made after a resume."""
    for number in (0, 1):
        file = two / f"bf16_{name}_{stage}_{offload}_{number}.json"
        found = json.loads(file.read_text())
        if number:  # only rank 0 gets all weights at ZeRO 3
            found = [{**row, "weights": torch.tensor(row["masters"]).bfloat16().tolist()} for row in found]
        assert_bf16_updates(found, *BF16[name])


@pytest.mark.parametrize("name", BF16)
@pytest.mark.parametrize("stage", [0, 2])  # ZeRO 3 would replace torch's linear for the tests that come after
def test_bf16_updates_on_one_rank_are_those_of_fp32_masters_and_gradients(tmp_path, stage, name):
    """The same on one rank, with the micro-batches of both."""
    init_distributed()
    assert_bf16_updates(bf16_updates(stage, tmp_path, *BF16[name]), *BF16[name])


@pytest.mark.parametrize("run", ["sft", "sft_zero2", "sft_zero3"])
def test_sft_on_two_ranks_equals_one(inputs, one, two, run):
    """sft.py: losses, gradient norms and weights of two ranks equal those of one, with an uneven last batch."""
    rows, expected = read(two / run / "metrics.jsonl"), read(one / "sft" / "metrics.jsonl")
    assert_same_metrics(rows, expected, skip=("eval/rouge",))  # its samples come from each rank's own stream
    assert_same_weights(two / run, one / "sft", inputs / "lm")


@pytest.mark.parametrize("run", [*(name for name in ON_TWO_RANKS if name.startswith("dpo_zero")), "dpo_micro4"])
def test_dpo_does_not_depend_on_ranks_or_micro_batches(inputs, one, two, run):
    """dpo.py: losses, rewards and weights do not depend on ranks, ZeRO, micro-batches or where the reference is."""
    folder = (one if run == "dpo_micro4" else two) / run
    assert_same_metrics(read(folder / "metrics.jsonl"), read(one / "dpo" / "metrics.jsonl"), SAMPLED)
    assert_same_weights(folder, one / "dpo", inputs / "lm")


def test_references_that_two_ranks_cache_equal_those_of_one(one, two):
    """dpo.py: one rank and two cache the same log-probabilities of 7, 5 and 1 pairs, in every ZeRO stage."""
    found, expected = ([np.load(file)["array"] for file in (folder / "ref_logprobs").iterdir()] for folder in (two, one))
    expected = {array.shape[1]: array for array in expected}
    assert {array.shape[1] for array in found} == set(expected) == {1, 5, 7}
    for array in found:
        np.testing.assert_allclose(array, expected[array.shape[1]], rtol=1e-6)


@pytest.mark.parametrize("run", ["reward_model", "reward_model_zero2", "reward_model_zero3"])
def test_reward_model_on_two_ranks_equals_one(inputs, one, two, run):
    """reward_model.py: losses, accuracies, weights and reward_mean of two ranks equal those of one."""
    assert_same_metrics(read(two / run / "metrics.jsonl"), read(one / "reward_model" / "metrics.jsonl"))
    assert_same_weights(two / run, one / "reward_model", inputs / "lm")
    configs = [json.loads((path / "config.json").read_text()) for path in (two / run, one / "reward_model")]
    assert configs[0]["reward_mean"] == pytest.approx(configs[1]["reward_mean"], rel=1e-4)


def test_packed_sft_on_two_ranks_equals_one(inputs, one, two):
    """sft.py --pack_length: two ranks equal one, also where the last batch is one pack and rank 1 has none."""
    args, tokenizer = arguments(sft, inputs, "out", **PACKED), load_tokenizer(str(inputs / "lm"), "--model")
    packs = sft.pack(sft.load_demonstrations(args.train_data, "--train_data", tokenizer, args), args.pack_length)
    assert len(packs) == 3 and any(len(items) > 2 for items in packs)
    rows, expected = read(two / "sft_packed" / "metrics.jsonl"), read(one / "sft_packed" / "metrics.jsonl")
    assert sum("train/loss" in row for row in rows) == 4  # two batches, of 2 packs and of 1, in two epochs
    assert_same_metrics(rows, expected, skip=("eval/rouge",))
    assert_same_weights(two / "sft_packed", one / "sft_packed", inputs / "lm")


@pytest.mark.parametrize("script", ["sft", "reward_model", "reward_model_shared", "dpo", "dpo_shared"])
def test_a_rank_without_a_row_waits_for_the_other(inputs, one, two, script):
    """Last batches of one row and one held-out row, so nothing for rank 1: ZeRO 3 on two ranks equals one rank.

    ..._shared: --share_prefix on two ranks equals one rank without it.
    """
    run, expected = two / f"{script}_few_zero3", one / f"{script.removesuffix('_shared')}_few"
    assert_same_metrics(read(run / "metrics.jsonl"), read(expected / "metrics.jsonl"), SAMPLED)
    assert_same_weights(run, expected, inputs / "lm")


def test_zero3_trains_and_saves_tied_weights(inputs, one, two):
    """A model with tied embeddings at ZeRO 3: the weights of one rank, saved once, reloaded whole and tied."""
    run, expected = two / "sft_tied_zero3", one / "sft_tied"
    assert_same_weights(run, expected, inputs / "tied")
    model, loaded = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same_metrics(read(run / "metrics.jsonl"), read(expected / "metrics.jsonl"), skip=("eval/rouge",))


def test_ppo_reference_run_has_unequal_endings(one):
    """The run on one rank, which the next tests compare with, has responses that end early and others that do not."""
    rows = read(one / "ppo" / "samples.jsonl")
    assert len({row["length"] for row in rows}) > 3 and {row["ended"] for row in rows} == {True, False}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ppo_on_two_ranks_samples_the_same_responses(one, two, stage):
    """ppo.py: two ranks sample the same held-out responses as one, in order and once, and score them alike, by the gold
    judge too, before and after training."""
    assert_same_samples(two / f"ppo_zero{stage}", one / "ppo")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ppo_on_two_ranks_writes_the_same_summary(one, two, stage):
    """ppo.py: held-out figures and samples before and after, and the best score, are of both ranks' prompts."""
    assert_same_summary(two / f"ppo_zero{stage}", one / "ppo")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ppo_on_two_ranks_logs_the_same_metrics(one, two, stage):
    """ppo.py: every metric of two ranks equals that of one, gradient norms of both models included."""
    rows, expected = read(two / f"ppo_zero{stage}" / "metrics.jsonl"), read(one / "ppo" / "metrics.jsonl")
    assert_same_metrics(rows, expected)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("model", ["", "best", "critic"], ids=["policy", "best", "critic"])
def test_ppo_on_two_ranks_ends_with_the_same_weights(inputs, one, two, stage, model):
    """ppo.py: policy, best policy and critic of two ranks equal those of one after 3 updates, at every ZeRO stage."""
    start = inputs / ("rm" if model == "critic" else "lm")
    assert_same_weights(two / f"ppo_zero{stage}" / model, one / "ppo" / model, start)


@pytest.mark.parametrize("model", ["", "critic"], ids=["policy", "critic"])
@pytest.mark.parametrize("run", ["ppo_micro1", "ppo_micro8"])
def test_ppo_does_not_depend_on_micro_batches(inputs, one, run, model):
    """ppo.py: 8 micro-batches of 1 and 1 of 8 end with the weights of 4 of 2."""
    assert_same_weights(one / run / model, one / "ppo" / model, inputs / ("rm" if model else "lm"))


@pytest.mark.parametrize("run, plain", [
    ("ppo_zero2_savers", "ppo_zero2"), ("ppo_zero3_savers", "ppo_zero3"), ("ppo_offload_frozen", "ppo_zero0")])
def test_ppo_saves_memory_without_changing_numbers(inputs, two, run, plain):
    """Gradient checkpointing with optimizer offload, and frozen models offloaded: the same metrics and weights."""
    assert_same_metrics(read(two / run / "metrics.jsonl"), read(two / plain / "metrics.jsonl"))
    for model, start in (("", "lm"), ("critic", "rm")):
        assert_same_weights(two / run / model, two / plain / model, inputs / start)


def test_ppo_where_all_rows_end_at_once(inputs, one, two):
    """Every response ends with its first token: at ZeRO 3 no rank hangs, and two ranks equal one."""
    rows = read(two / "ppo_ending_zero3" / "metrics.jsonl")
    assert {row["val/length"] for row in rows if "val/length" in row} == {1.0}
    assert_same_metrics(rows, read(one / "ppo_ending" / "metrics.jsonl"))
    for model, start in (("", "ending"), ("critic", "rm")):
        assert_same_weights(two / "ppo_ending_zero3" / model, one / "ppo_ending" / model, inputs / start)


GROUP_MODELS = {"": "lm", "best": "lm", "critic": "rm", "group_head": "group_head"}  # folder or file of a run, and where it started


def assert_same_group_run(folder, other, inputs):
    """Metrics, samples, summary, and the weights of policy, best policy, critic and group head."""
    assert_same_metrics(read(folder / "metrics.jsonl"), read(other / "metrics.jsonl"))
    assert_same_samples(folder, other)
    assert_same_summary(folder, other)
    for model, start in GROUP_MODELS.items():  # the group head moves by several times the norm that it starts with
        assert_same_weights(folder / model, other / model, inputs / start, 1e-4 if model == "group_head" else 1e-5)


def test_group_invariant_ppo_reference_run_has_groups_that_matter(one):
    """The runs on one rank, which the next tests compare with: labels and multipliers differ between episodes."""
    for run in ("group_invariant_ppo", "group_invariant_ppo_exact"):
        rows = [row for row in read(one / run / "metrics.jsonl") if "groups/gap" in row]
        assert len(rows) == 3 and any(0 < row["groups/auc"] < 1 for row in rows)
        assert rows[-1]["groups/label_entropy"] < 0.9 * np.log(3) and abs(rows[-1]["groups/gap"]) > 0.3
        assert rows[-1]["groups/kappa_max"] - rows[-1]["groups/kappa_min"] > 0.1


def test_the_group_head_has_a_learning_rate_of_its_own(inputs, one):
    """In three updates of two epochs AdamW moves its weights by 0.05 (1 + 2/3 + 1/3) at most, and some nearly so."""
    head, start = (weights(path) for path in (one / "group_invariant_ppo/group_head", inputs / "group_head"))
    moved = (head["weight"] - start["weight"]).abs()
    assert 0.09 < moved.max() < 0.101 and moved.median() > 0.05


@pytest.mark.parametrize("run", ["zero0", "zero2", "zero3", "zero3_savers", "micro1", "micro8", "exact_zero0"])
def test_group_invariant_ppo_does_not_depend_on_ranks_or_micro_batches(inputs, one, two, run):
    """group_invariant_ppo.py: every metric, and policy, critic and group head, of two ranks at every ZeRO stage, and of
    other micro-batches, equal those of one rank; so they do with groups of prompts, the uniform variance and the exact
    estimator."""
    folder = (one if "micro" in run else two) / f"group_invariant_ppo_{run}"
    plain = one / ("group_invariant_ppo_exact" if "exact" in run else "group_invariant_ppo")
    assert_same_group_run(folder, plain, inputs)


def test_group_invariant_ppo_minibatches_do_not_depend_on_zero(inputs, two):
    """group_invariant_ppo.py: two minibatches, which differ with the ranks, have the same steps at ZeRO 0 and 3."""
    runs = (two / f"group_invariant_ppo_minibatches_zero{stage}" for stage in (3, 0))
    assert_same_group_run(*runs, inputs)


def test_an_evaluation_on_two_ranks_equals_one(one, two):
    """evaluate.py: responses, scores and verdicts of two ranks, which share 7 prompts, are those of one, in order."""
    found, expected = (read(folder / "evaluate" / "samples.jsonl") for folder in (two, one))
    assert len(found) == 21 and len({row["length"] for row in found}) > 3
    for row, other in zip(found, expected):
        assert {**row, "scores": None} == {**other, "scores": None}
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-5)
    results, others = (json.loads((folder / "evaluate" / "summary.json").read_text()) for folder in (two, one))
    assert results["comparisons"] == others["comparisons"]


def test_the_kl_of_two_ranks_belongs_to_their_responses(inputs, two):
    """evaluate.py: each sampled response's log-ratio, gathered from two ranks, is that of a plain forward."""
    tokenizer = load_tokenizer(str(inputs / "lm"), "--model")
    models = [load_causal_lm(str(inputs / name), "--model", tokenizer).eval() for name in ("tied", "lm")]
    cached = [json.loads(str(np.load(file)["array"])) for file in (two / "evaluate_cache").iterdir()]
    rows = [row for row in read(two / "evaluate_sampled" / "samples.jsonl") if row["model"] == "tied"]
    (tokens,) = [[row["tokens"] for row in answers] for answers in cached
                 if [row["response"] for row in answers] == [row["response"] for row in rows]]
    for row, response in zip(rows, tokens):
        prompt = tokenizer(row["prompt"]).input_ids
        with torch.no_grad():
            logprobs = [(model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
                        for model in models]
        ratio = sum((p[t, token] - q[t, token]).item() for p, q in [logprobs] for t, token in enumerate(response))
        assert row["kl"] == pytest.approx(ratio, abs=1e-4)
    assert len(rows) == 7 and json.loads((two / "evaluate_few" / "summary.json").read_text())["prompts"] == 1


@pytest.mark.parametrize("script, more", [("ppo", []), ("group_invariant_ppo", ["group_head.safetensors"])])
def test_resume_on_two_ranks_is_exact(two, script, more):
    """A ZeRO 2 run on two ranks that is resumed after update 1 ends with the same bits: metrics, samples, weights."""
    for name in ("metrics.jsonl", "samples.jsonl", "model.safetensors", "critic/model.safetensors", *more):
        assert (two / f"{script}_resumed" / name).read_bytes() == (two / f"{script}_zero2" / name).read_bytes(), name


@pytest.mark.parametrize("script", ["ppo", "group_invariant_ppo"])
def test_sigterm_to_one_rank_stops_both_in_the_same_update(two, script):
    """Rank 1 alone gets SIGTERM in update 1: both ranks leave with code 75 after it, with its checkpoint complete."""
    assert [json.loads((two / f"{script}_sigterm_{number}.json").read_text()) for number in (0, 1)] == [[75], [75]]
    folder = two / f"{script}_sigterm"
    assert {row["step"] for row in read(folder / "metrics.jsonl")} == {0, 1}
    assert (folder / "checkpoints/step_0000001/sha256.json").is_file() and (folder / "INTERRUPTED").is_file()
    assert not (folder / "summary.json").exists()


def test_sigterm_to_one_rank_stops_both_in_the_same_batch(inputs, two):
    """reward_model.py at ZeRO 3: in the first evaluation, the last one and the normalisation. Resumed each time, it ends
    as the run that nobody stopped."""
    # the last process has two batches of demonstrations to score, and nothing else
    assert [json.loads((two / f"reward_model_sigterm_{number}.json").read_text()) for number in (0, 1)] == [
        [75, 75, 75, 2]] * 2
    found, expected = two / "reward_model_sigterm", two / "reward_model_zero3"
    assert_same_metrics(read(found / "metrics.jsonl"), read(expected / "metrics.jsonl"))
    assert_same_weights(found, expected, inputs / "lm")
    constants = [json.loads((path / "summary.json").read_text())["reward_mean"] for path in (found, expected)]
    assert constants[0] == pytest.approx(constants[1], rel=1e-4)
    assert not (found / "INTERRUPTED").exists()
