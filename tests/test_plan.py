"""The planner of benchmarks/plan.py: what it counts against real models, real tensors and formulas."""

import functools

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXForCausalLM

import ppo
from benchmarks import plan

ARGUMENTS = ["--batch_size", "8", "--micro_batch_size", "4", "--rollout_batch_size", "4", "--max_prompt_length", "12",
             "--response_length", "6"]


@functools.cache
def planned(*flags, ranks=1, padded=False):
    args = plan.parser().parse_args([*ARGUMENTS, *flags])
    vars(args).update(padded=padded, foreach=False, lazy_buckets=True, flops=1.0)
    laps, saved, engines, sizes = plan.simulate(tiny_config(), args, ranks)
    return args, laps, saved, engines, sizes


def test_published_sizes_and_a_real_model_have_the_planned_parameters(tiny_lm):
    *_, engines, sizes = planned()
    assert engines["policy"].total == sum(p.numel() for p in tiny_lm.parameters())
    assert sizes["policy"] == 4 * engines["policy"].total
    for name, parameters in (("pythia-1b", 1_011_781_632), ("pythia-2.8b", 2_775_208_960),
                             ("pythia-6.9b", 6_857_302_016), ("llama-70b", 70_553_706_496),
                             ("qwen2.5-0.5b", 494_032_768)):
        with torch.device("meta"):
            assert plan.count(AutoModelForCausalLM.from_config(plan.load_config(name))) == parameters


def test_zero_divides_what_it_should():
    (_, _, _, whole, _), (_, _, _, two, _), (_, _, _, three, _) = (
        planned("--zero", stage, ranks=2) for stage in ("0", "2", "3"))
    for name in ("policy", "critic"):
        total = whole[name].total
        assert whole[name].share == total and two[name].share == three[name].share == -(-total // 2)
        assert whole[name].weights.numel() == two[name].weights.numel() == total
        assert three[name].weights.numel() == three[name].gradients.numel() == -(-total // 2)
        for engine, elements in ((whole[name], total), (two[name], -(-total // 2)), (three[name], -(-total // 2))):
            assert sum(moment.numel() for pair in engine.optimizers[0].moments for moment in pair) == 2 * elements


@pytest.mark.parametrize("padded", (False, True))
def test_activations_are_what_a_real_forward_saves(tiny_lm, padded):
    """Unique storages that autograd keeps of a real forward with its loss, and the logits that main still holds."""
    args, _, saved, *_ = planned(padded=padded)
    policy = tiny_lm.train()
    ids, mask = torch.ones(4, 18, dtype=torch.long), torch.ones(4, 18, dtype=torch.bool)
    mask[0, :3] = not padded
    weights = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers(), ids, mask)}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = ppo.response_logits(policy, ids, mask, 6, 0.7, torch.zeros(64, dtype=torch.bool))
        logprobs = ppo.token_logprobs(logits, ids[:, -6:])
        losses, _ = ppo.policy_losses(logprobs, torch.zeros(4, 6), torch.ones(4, 6), 0.2)
        loss = losses.sum()
    real = sum(len(storage) for address, storage in kept.items() if address not in weights)
    real -= 2 * 4 * 18 * 64 * 4  # the CPU's attention kernel keeps its output in another layout: a copy more a layer
    assert loss.requires_grad and saved["policy"] == pytest.approx(real, rel=0.01)


def test_kv_cache_is_that_of_a_real_rollout(tiny_lm, monkeypatch):
    made = []
    monkeypatch.setattr(ppo, "DynamicCache", lambda **options: made.append(DynamicCache(**options)) or made[-1])
    queries = torch.ones(3, 7, dtype=torch.long)
    ppo.generate(tiny_lm, queries, queries.bool(), torch.full((3, 5), 0.5), 1.0, 1.0, 1.0,
                 torch.zeros(64, dtype=torch.bool), torch.tensor([99]), 60)
    real = sum(x.nbytes for layer in made[0].layers for x in (layer.keys, layer.values))
    assert plan.kv_cache_bytes(tiny_lm.config, 3, 7 + 5 - 1, 4) == real  # the last token is not fed back


def test_flops_are_those_of_the_formula():
    """Forward: 2 a weight of the matrices and token, 4 T^2 d a layer and row for attention, the head for 7 positions."""
    _, laps, *_ = planned()
    layers, width, inner, rows, length, vocabulary = 2, 64, 128, 4, 18, 64
    body = layers * (2 * rows * length * (4 * width**2 + 2 * width * inner) + 4 * rows * length**2 * width)
    head, score = 2 * rows * 7 * width * vocabulary, 2 * rows * length * width
    assert laps["scoring"].flops == 3 * body + 2 * head + score  # policy, reference, critic
    # Backward: twice the matrices; attention 2.5 times, because the scores are computed once more.
    attention = layers * 4 * rows * length**2 * width
    assert laps["training"].flops == 2 * (3 * (body - attention) + 3.5 * attention) + 3 * (head + score)


def test_flags_save_what_they_are_for():
    _, plain, saved, *_ = planned()
    _, _, checkpointed, *_ = planned("--gradient_checkpointing")
    assert checkpointed["policy"] < 0.6 * saved["policy"]
    _, offloaded, _, _, sizes = planned("--offload_frozen")
    assert plain["rollout"].peak - offloaded["rollout"].peak == sizes["policy"] + sizes["critic"]
    _, small, _, engines, _ = planned("--zero", "2", ranks=2)
    _, smaller, *_ = planned("--zero", "2", "--offload_optimizer", ranks=2)
    state = sum(12 * engine.share for engine in engines.values())  # fp32: Adam's moments and the copy of the weights
    extra = sum(4 * max(p.numel() for p in engine.params) for engine in engines.values())
    assert small["rollout"].peak - smaller["rollout"].peak == state - extra


def test_bf16_has_fp32_gradients_and_zero_2_in_place_of_0():
    """Two ranks: half of 4 bytes a parameter for gradients, of 12 for optimizer state, and weights of 2 bytes."""
    args, _, saved, engines, sizes = planned("--bf16", ranks=2)
    total = engines["policy"].total
    parts, _ = plan.memory_parts(tiny_config(), args, 2, saved, engines, sizes)
    assert args.zero_stage == 2 and engines["policy"].share == -(-total // 2) and sizes["policy"] == 2 * total
    assert parts["gradients, from backward to step"][0] == 4 * -(-total // 2) / 2**30
    assert parts["optimizer state"][0] == 12 * -(-total // 2) / 2**30
    _, bf16, *_ = planned("--bf16", "--zero", "2", ranks=2)
    assert bf16["training"].peak == planned("--bf16", ranks=2)[1]["training"].peak


def test_a_plan_says_whether_it_fits_and_bad_input_ends_in_one_line(tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path)
    for memory, words in (("0.5", "does not fit: the largest phase"), ("2", "fits: the largest phase")):
        plan.main(plan.parser().parse_args(["--model", str(tmp_path / "config.json"), *ARGUMENTS, "--gpus", "2",
                                            "--zero", "2", "--bf16", "--gpu_memory", memory]))
        printed = capsys.readouterr().out
        assert printed.startswith("computed, not measured") and printed.splitlines()[-1].startswith(words)
    with pytest.raises(SystemExit):
        plan.main(plan.parser().parse_args(["--model", "no/such/model"]))
    error = capsys.readouterr().err
    assert error.startswith("error: --model no/such/model: no config found there") and error.count("\n") == 1
