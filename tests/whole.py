"""Shared by the whole-run tests of sft.py, reward_model.py and dpo.py: parts of a plain loop.

Nothing here imports the scripts or utils/. What a run leaves behind is compared with these lines and torch.
"""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPTNeoXForCausalLM

ENDS = {0, 2}  # token ids that end a response in these tests: EOS, and "!" by the generation config


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def embedded_rows(name, first, last):
    """Rows of a file of the embedded task."""
    return rows_of(ROOT / f"assets/data/{name}.jsonl")[first:last]


def save_policy(folder, seed=0, noise=0.0, pretrained=False):
    """A tiny language model that ends about every third response early, or the embedded SFT model.

    Its folder has sampling settings of its own, which no script may follow. noise: standard deviation of what
    is added to the weights.
    """
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/base")
    assert tokenizer.eos_token_id == 0 and tokenizer("!").input_ids == [2]
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(tiny_config(vocab_size=1024, pad_token_id=1, eos_token_id=0))
    with torch.no_grad():  # final states have mean 0: a constant in them raises the logits of the ends alone
        model.gpt_neox.final_layer_norm.bias.fill_(0.05)
        model.get_output_embeddings().weight[[0, 2]] += 3.5 / (0.05 * 64)
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    if pretrained:
        model = AutoModelForCausalLM.from_pretrained(ROOT / "assets/sft", dtype=torch.float32)
    model.generation_config.update(
        do_sample=True, temperature=3.0, top_k=2, repetition_penalty=5.0, eos_token_id=sorted(ENDS),
        pad_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def assert_only_ids_in(generation_config):
    """Of the sampling settings that save_policy puts there, the ids of the ends alone are left."""
    assert set(generation_config.eos_token_id) == ENDS and generation_config.pad_token_id == 1
    assert not generation_config.do_sample
    for name in ("temperature", "top_k", "repetition_penalty"):
        assert getattr(generation_config, name) == getattr(GenerationConfig(), name), name


def permutation(size, *address):
    return np.random.default_rng(address).permutation(size).tolist()


def batches(size, batch_size, seed, epochs):
    """The rows of each optimizer step."""
    orders = [permutation(size, seed, epoch) for epoch in range(epochs)]
    return [order[start : start + batch_size] for order in orders for start in range(0, size, batch_size)]


def rate(finished, total, warmup, peak, schedule="cosine"):
    """Learning rate after so many finished steps."""
    if finished < warmup:
        return peak * finished / warmup
    if schedule == "constant":
        return peak
    return peak * math.cos(math.pi / 2 * (finished - warmup) / (total - warmup)) ** 2


def plain_step(optimizer, model, loss, lr, max_grad_norm):
    """One clipped optimizer step; the norm before."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return float(norm)


def token_logprobs(model, ids):
    """log p of each token of ids but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


@torch.no_grad()
def sample(model, prompts, seed, temperature, response_length, batch_size):
    """Responses (token ids), one row at a time, by the noise that generate draws for a batch of prompts."""
    torch.manual_seed(seed)
    responses = []
    for start in range(0, len(prompts), batch_size):
        some = [(prompt, []) for prompt in prompts[start : start + batch_size]]
        for _ in range(response_length):
            going_on = [not (response and response[-1] in ENDS) for _, response in some]
            if not any(going_on):
                break
            chances = torch.ones(len(some), model.config.vocab_size)
            for i, (prompt, response) in enumerate(some):
                if going_on[i]:
                    logits = model(torch.tensor([prompt + response])).logits[0, -1].float()
                    chances[i] = (logits / temperature).softmax(-1)
            drawn = torch.multinomial(chances, 1)[:, 0].tolist()
            for token, (_, response), alive in zip(drawn, some, going_on):
                response.extend([token] * alive)
        responses += [response for _, response in some]
    return responses


def interval(values, prompts):
    """95 % bootstrap interval of a mean over rows: a thousand draws of prompts, each with all its rows."""
    rows = list(zip(values, prompts))
    groups = [[value for value, prompt in rows if prompt == name] for name in sorted(set(prompts))]
    draws = np.random.default_rng(0).integers(len(groups), size=(1000, len(groups)))
    return np.percentile([np.mean(sum([groups[i] for i in draw], [])) for draw in draws], [2.5, 97.5])


def count_recomputed(patch):
    """A list that grows by one item with each layer that will be computed again in the backward pass."""
    calls, original = [], transformers.modeling_utils.checkpoint
    patch.setattr(transformers.modeling_utils, "checkpoint", lambda *args, **options: (
        calls.extend([1] * torch.is_grad_enabled()), original(*args, **options))[1])
    return calls


def assert_rows_equal(rows, expected, tolerance=1e-4):
    """The same names and values in every row, numbers up to rounding."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected):
        assert set(row) == set(wanted)
        for name, value in wanted.items():
            number = isinstance(value, (float, np.floating, torch.Tensor))
            value = pytest.approx(float(value), rel=tolerance, abs=tolerance) if number else value
            assert row[name] == value, (row["step"], name)


def assert_summary_equals(summary, before, after):
    """The figures before and after of summary.json are those of two rows of metrics."""
    for name, row in (("before", before), ("after", after)):
        assert_rows_equal([{"step": row["step"], **summary[name]}], [row])


def assert_speeds(file, steps):
    """times.jsonl has a speed for each line of training."""
    rows = rows_of(file)
    assert [row["step"] for row in rows] == steps and all(row["time/tokens_per_second"] > 0 for row in rows)


def assert_tokenizer_saved(folder):
    saved, expected = (AutoTokenizer.from_pretrained(path) for path in (folder, ROOT / "assets/base"))
    assert saved.get_vocab() == expected.get_vocab()


def assert_checkpoints(folder, weights, before, prefix="", steps=(3, 6)):
    """Checkpoints of two steps, and unless it is among them none at the last step, 9: weights, and the evaluation at
    the start."""
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step_{step:07d}" for step in steps]
    states = []
    for step in steps:
        found = checkpointed_weights(folder, step)
        found = {name.removeprefix(prefix): value for name, value in found.items()}
        assert_weights_equal(found, weights[step], weights[0])
        states.append(json.loads((folder / f"checkpoints/step_{step:07d}/state.json").read_text()))
        assert states[-1]["step"] == step
        assert_rows_equal([{"step": 0, **states[-1]["before"]}], [before])
    return states


def assert_card_and_record(folder, script, flags):
    """The model card names what the run was made of; args.json has its flags. Returns the card."""
    card, record = (folder / "README.md").read_text(), json.loads((folder / "args.json").read_text())
    assert f"Made by `{script}` from `{record['model']}` on `{record['train_data']}`" in card
    assert {name: record[name] for name in flags} == json.loads(json.dumps(flags))
    return card


def count_minutes(patch, script):
    """A list of the time limits that a script asks the process group for."""
    minutes, join = [], script.init_distributed
    patch.setattr(script, "init_distributed", lambda wait=30.0: (minutes.append(wait), join(wait))[1])
    return minutes


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def checkpointed_weights(folder, step):
    """Weights in checkpoints/step_N, by the names of the model."""
    file, = (folder / f"checkpoints/step_{step:07d}").rglob("*model_states.pt")
    return torch.load(file, weights_only=False)["module"]


def assert_weights_equal(found, expected, start, tolerance=2e-3):
    """Equal to a small part of the way from the start."""
    names = [name for name in expected if name in found]
    assert len(names) == len(expected)
    flat = lambda weights: torch.cat([weights[name].flatten().float() for name in names])
    moved = (flat(expected) - flat(start)).norm()
    assert moved > 0 and (flat(found) - flat(expected)).norm() < tolerance * moved
