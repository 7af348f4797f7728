"""The benchmarks measure what they say: workloads, matrix products, memory, and our side of each without its peer.

pytest tests/test_benchmarks.py
"""

import functools
import glob
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import common, dpo_speed, gpu_day, ppo_speed, ppo_what_pays
from utils.data import permutation

make_tokenizer = functools.cache(common.make_tokenizer)


@torch.no_grad()
def probabilities(folder, eos_probability, monkeypatch):
    """Next-token probabilities after real words (tokens, V), and the tokenizer; 904 of the ids have no token."""
    monkeypatch.setitem(common.SHAPES, "7m", common.SHAPES["7m"] | dict(vocab_size=5000))
    tokenizer = make_tokenizer()
    common.make_model(folder, "7m", tokenizer, eos_probability, temperature=0.7)
    ids = tokenizer(common.texts_of_lengths([64] * 8, tokenizer), return_tensors="pt").input_ids
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    return (logits / 0.7).softmax(-1).flatten(0, 1), tokenizer


@pytest.mark.parametrize("wanted", [0.07, 0.005])
def test_make_model_ends_responses_with_the_probability_asked_for(wanted, tmp_path, monkeypatch):
    chances, tokenizer = probabilities(tmp_path, wanted, monkeypatch)
    assert chances[:, tokenizer.eos_token_id].mean() == pytest.approx(wanted, rel=0.03)
    assert chances[:, tokenizer.pad_token_id].max() == 0 and chances[:, 4096:].max() == 0


def test_make_model_never_ends_at_0(tmp_path, monkeypatch):
    chances, tokenizer = probabilities(tmp_path, 0.0, monkeypatch)
    assert chances[:, tokenizer.eos_token_id].max() == 0
    assert (chances[0] > 0).sum() == 4094  # all tokens but EOS and PAD


def test_texts_of_lengths_are_exact():
    lengths = [1, 2, 50, 128, 3] * 20
    texts = common.texts_of_lengths(lengths, make_tokenizer())
    assert [len(make_tokenizer()(text).input_ids) for text in texts] == lengths and len(set(texts)) > 60


def test_write_shuffled_undoes_the_first_epochs_order(tmp_path):
    rows = [{"number": i} for i in range(7)]
    common.write_shuffled(tmp_path / "rows.jsonl", rows)
    written = [json.loads(line) for line in open(tmp_path / "rows.jsonl")]
    assert [written[i] for i in permutation(7, 1, 0)] == rows


def test_products_of_a_forward_and_backward_equal_the_formula(tiny_lm):
    """Three products for each weight matrix (output, and gradients of input and weight), six for attention."""
    B, T, d, layers, V, mlp = 3, 10, 64, 2, 64, 128
    ids = torch.randint(0, 60, (B, T))
    with common.Products() as products:
        F.cross_entropy(tiny_lm(ids).logits.flatten(0, 1), ids.flatten()).backward()
    weights = layers * (4 * d * d + 2 * d * mlp) + V * d
    assert products.flops() == 3 * 2 * B * T * weights + 6 * 2 * layers * B * T * T * d
    assert 0 < products.seconds() < 10


def test_memory_is_the_peak_above_the_level_when_made():
    memory = common.Memory()
    torch.ones(64 * 2**20 // 4)  # freed at once
    assert 63 <= memory.peak() < 80
    assert common.Memory().peak() < 16  # the next one starts again


def test_ppo_speed_parts_of_made_up_stamps():
    ends = np.array([[1, 2, 4, 5], [7, 10, 14, 15], [18, 19, 25, 27]])
    assert ppo_speed.parts(ends) == {
        "rollout": [2, 3], "scoring": [3, 1], "training": [4, 6], "update": [10, 12]}


def test_every_optimisation_can_be_undone():
    """Each text that ppo_what_pays.py replaces stands once in ppo.py, and what comes out is a program."""
    source = Path("ppo.py").read_text()
    for name, changes in ppo_what_pays.UNDONE.items():
        text = source
        for old, new in changes:
            assert text.count(old) == 1, name
            text = text.replace(old, new)
        compile(text, name, "exec")


def test_ppo_speed_runs_its_own_side(tmp_path):
    workload = ppo_speed.WORKLOADS["tiny"]
    ppo_speed.make_workload(tmp_path, workload)
    run = common.child("ppo_speed", sys.executable, "ppo.py", tmp_path, workload=workload, updates=2, products=True)
    seconds = [run[part][0] for part in ("rollout", "scoring", "training")]
    assert min(seconds) > 0 and sum(seconds) <= run["update"][0] and run["memory"] > 0
    # two models of 4.7M weights in layers, 8 rows of at most 24 tokens and at least 9, 4 epochs, 3 products a weight
    layers = 6 * 12 * 256**2
    assert 8 * 9 < run["flops"] / (2 * layers * 4 * 3 * 2) < 8 * 24 * 1.3  # 1.3: heads and attention
    assert 1 <= np.mean(run["length"]) <= 8
    rollouts = ppo_speed.run_rollouts(tmp_path, workload, 1)
    assert all(len(rollouts[name]) == 1 for name in ("ours", "generate", "static", "prefill"))


@torch.no_grad()
def loss_of_ids(name, folder, rows):
    """Loss of these rows of the file for TRL, by transformers' own classes, one sequence at a time."""
    if name == "dpo_speed":
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")

        def logprob(model, prompt, response):
            prompt, response = tokenizer(prompt).input_ids, tokenizer(response).input_ids + [tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            return logits.log_softmax(-1)[range(len(response)), response].sum()

        model, reference = (AutoModelForCausalLM.from_pretrained(folder / path) for path in ("model", "reference"))
        margins = [sum(sign * (logprob(model, prompt, text) - logprob(reference, prompt, text))
                       for sign, text in ((1, chosen), (-1, rejected))) for prompt, chosen, rejected in rows]
        return -F.logsigmoid(dpo_speed.BETA * torch.stack(margins)).mean()
    if name == "sft_speed":
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        logprobs = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
                    for (ids,) in rows]
        return -torch.cat(logprobs).mean()
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    scores = torch.tensor([[model(torch.tensor([ids])).logits.item() for ids in row[:2]] for row in rows])
    return -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()


@pytest.mark.parametrize("name, script, copies", [
    ("sft_speed", "sft.py", 1), ("reward_model_speed", "reward_model.py", 2), ("dpo_speed", "dpo.py", 2)])
def test_own_side_trains_on_the_batches_that_the_peer_gets(name, script, copies, tmp_path):
    module = importlib.import_module(f"benchmarks.{name}")
    workload = common.STEP_WORKLOADS["tiny"] | dict(batches=3)
    module.make_workload(tmp_path, workload)
    run = module.run_side(script, tmp_path, workload, products=True)
    file = tmp_path / ("texts.jsonl" if name == "dpo_speed" else "ids.jsonl")
    rows = [list(json.loads(line).values()) for line in open(file)]
    expected = [loss_of_ids(name, tmp_path, rows[start : start + 8]).item() for start in (0, 8, 16)]
    assert run["losses"] == pytest.approx(expected, rel=1e-5)
    assert run["step"] > 0 and run["products"] > 0 and "memory" in run  # what earlier tests have freed is taken first
    tokens = 8 * copies * 25  # longest rows; one counted step, with its 3 products a weight
    assert 0.4 * tokens < run["flops"] / (2 * 3 * 6 * 12 * 256**2) < 1.4 * tokens


# ---- gpu_day.py -------------------------------------------------------------------------------------------


def test_useful_flops_are_those_of_the_products(tmp_path, tiny_lm):
    """Policy and critic on rows without padding: what is counted equals the matrix products that run."""
    tiny_lm.save_pretrained(tmp_path)
    critic = AutoModelForSequenceClassification.from_config(tiny_lm.config).base_model
    ids = torch.randint(0, 60, (3, 10))
    with common.Products() as products:
        logits = tiny_lm(ids, logits_to_keep=5).logits[:, :-1]  # a response of four tokens
        F.cross_entropy(logits.flatten(0, 1), ids[:, -4:].flatten()).backward()
        critic(ids).last_hidden_state.sum().backward()
    counted = gpu_day.useful_flops(tmp_path, [6, 6, 6], 4, 2)
    extra_position = 6 * 3 * 64 * 64  # the program makes logits of one position more than the response has
    assert counted == 2 * (products.flops() - extra_position)


def step_of(name):
    return next(step for step in gpu_day.STEPS if step.name == name)


def test_a_step_that_takes_too_long_leaves_its_results(tmp_path):
    """A process that writes a result and then hangs is ended with all that it has started, and said to be stopped."""
    run = gpu_day.Run("facts", tmp_path, tmp_path, tiny=True)
    code = f"import subprocess, time, pathlib; subprocess.Popen(['sleep', '987654']); " \
           f"pathlib.Path(r'{tmp_path}/results.jsonl').write_text('{{\"step\": \"facts\"}}\\n'); time.sleep(99)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    gpu_day.wait(step_of("facts"), process, time.monotonic(), 2, run)
    rows = gpu_day.read(tmp_path / "results.jsonl")
    assert rows[0] == {"step": "facts"} and rows[1]["ended"] == "stopped after 2 seconds"
    commands = [Path(path).read_text() for path in glob.glob("/proc/[0-9]*/cmdline") if os.path.exists(path)]
    assert not [command for command in commands if "987654" in command and "sleep" in command[:6]]


def test_gpu_day_writes_facts_and_tables(tmp_path):
    """The command itself, one step of it: results, log and tables are there, and what was not run is not claimed."""
    subprocess.run([sys.executable, "-m", "benchmarks.gpu_day", "--tiny", "--out", str(tmp_path), "--only", "facts"], check=True)
    known, rates, ended = gpu_day.read(tmp_path / "results.jsonl")
    assert known["torch"] == torch.__version__ and rates["bf16_tflops"] > 0 and ended["ended"] == "complete"
    text = (tmp_path / "tables.md").read_text()
    assert "matrix product in bf16" in text and "TRL" not in text and "first log-ratio" not in text


def test_tables_of_made_up_results():
    """Shares, differences and failures are what the results say."""
    base = {key: 1.0 for key in gpu_day.COMPARED}
    text = gpu_day.tables([
        {"step": "facts", "bf16_tflops": 800.0, "fp32_tflops": 50.0, "copy_gb_per_second": 3000.0},
        {"step": "right/bf16", "variant": "ZeRO 0", "dtype": "bf16", "first_log_ratio": 0.01, **base},
        {"step": "right/bf16", "variant": "ZeRO 2", "dtype": "bf16", "first_log_ratio": 0.02, **base, "loss/policy_avg": 1.25},
        {"step": "right/bf16", "variant": "ZeRO 3", "dtype": "bf16", "error": "RuntimeError: no"},
        {"step": "plan", "workload": "512-53", "peaks_gib": {"start": 90.0, "training": 50.0, "rollout": 40.0}},
        {"step": "ppo/512-53", "workload": "512-53", "side": "ppo.py", "batch": 64, "rollout": 2.0, "scoring": 1.0,
         "training": 4.0, "update": 7.0, "memory_gib": 20.0, "peak_gib": 48.0, "response_tokens": 50.0, "flops": 1.6e15},
        {"step": "ppo/512-53", "workload": "512-53", "side": "TRL", "error": "out of memory"},
        {"step": "ppo/512-53", "ended": "stopped after 150 seconds"}])
    assert "| ZeRO 2 | bf16 | 0.02 | 1 | 1.25 | 1 | 1 | 1 | 0.25 |" in text
    assert "| ZeRO 3 | bf16 | failed | failed | failed | failed | failed | failed | RuntimeError: no |" in text
    assert "| 512-53 | ppo.py | 2 | 1 | 4 | 7 | 1.6e+03 | 0.5 | 48 | 50 |" in text  # 1.6e15 / 4 s / 800e12
    assert "| 512-53 | TRL | failed |" in text and "Not complete: ppo/512-53 (stopped after 150 seconds)." in text


def test_the_gpu_section_of_the_page_is_what_the_program_writes():
    section = gpu_day.PAGE.read_text().split(gpu_day.BEGIN)[1].split(gpu_day.END)[0]
    assert section == gpu_day.page_section()
