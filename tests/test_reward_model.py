"""reward_model.py: scores are read at EOS, pairs seen once, demonstrations average 0, the folder stands alone."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
import transformers
import whole
from conftest import ROOT, check_step, set_weights, tiny_config, watch_steps
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config
from transformers import GPT2ForSequenceClassification, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
from transformers import JambaConfig, LlamaConfig, LlamaForSequenceClassification, MistralConfig

import reward_model
import utils.data
from utils import packing
from utils.data import pad, permutation, rows_of_this_rank
from utils.launch import create_engine, init_distributed
from utils.models import load_classifier, load_tokenizer, save_model

EOS, PAD = 0, 1  # of the tokenizer in assets/base
QUERY, RESPONSE = [5, 6, 7], [8, 9, 10, 11]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "assets/base"), "--model")


@pytest.fixture
def scalar_model(tiny_classifier):
    """The tiny classifier as the scripts use it; `device` is what an engine has."""
    model = reward_model.ScalarModel(tiny_classifier)
    model.device = torch.device("cpu")
    return model


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


PROMPTS = [f"{start} {who}" for start in ("the", "so the", "and the") for who in ("cat", "dog", "man", "old cat")]
PAIRS = [{"prompt": prompt, "chosen": f" {verb} on the mat", "rejected": f" {verb} good"}
         for prompt in PROMPTS for verb in ("is", "was", "sat")]  # 36


def make_files(folder, tokenizer):
    """A tiny random SFT model, pairs and demonstrations. Returns the arguments that name them."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=1024, initializer_range=0.02, pad_token_id=PAD, tie_word_embeddings=True)
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return dict(
        model=str(folder / "model"), train_data=write_rows(folder / "train.jsonl", PAIRS[:28]),
        eval_data=(write_rows(folder / "held_out.jsonl", PAIRS[28:]),),
        demonstrations=write_rows(folder / "demonstrations.jsonl", [
            {"prompt": prompt, "completion": " had a good mat" + " indeed" * n} for n, prompt in enumerate(PROMPTS)]))


def run(files, output_dir, **changes):
    reward_model.main(reward_model.Args(**{
        **files, "output_dir": str(output_dir), "batch_size": 8, "micro_batch_size": 8, "epochs": 3, "lr": 3e-3,
        "log_every": 1, **changes}))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    return make_files(tmp_path_factory.mktemp("files"), tokenizer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, files):
    """The folder of one run of main, used by several tests."""
    folder = tmp_path_factory.mktemp("runs") / "reward_model"
    run(files, folder)
    return folder


def load(folder, tokenizer):
    model = reward_model.ScalarModel(load_classifier(str(folder), "--model", tokenizer, new_head=True))
    model.device = torch.device("cpu")
    return model


def value_at_end(model, sequence):
    """The value at the last token of one sequence, without pads."""
    return model(torch.tensor([sequence]), torch.ones(1, len(sequence), dtype=torch.bool))[0, -1]


def scores_of(model, sequences, batch_size=8):
    return np.array(reward_model.score_sequences(model, sequences, PAD, batch_size))


# ---- Data -------------------------------------------------------------------------------------------------


def test_load_pairs_counts_what_it_drops_and_keeps_the_sides(tmp_path, tokenizer, capsys):
    """T5: chosen first, rejected second, EOS last in both; equal and too long pairs are dropped and counted."""
    pair = {"prompt": "she", "chosen": " is good", "rejected": " was on the mat"}
    rows = [pair, {**pair, "chosen": " is", "rejected": " is"}, {**pair, "rejected": " was on the mat" * 9},
            {**pair, "chosen": " is good" * 9}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    length = len(reward_model.encode("she", " was on the mat", tokenizer))  # just long enough for the first row
    args = reward_model.Args(max_length=length)
    (chosen, rejected, row), = reward_model.load_pairs(path, "--train_data", tokenizer, args)
    assert tokenizer.decode(chosen) == "she is good<|endoftext|>" and chosen[-1] == EOS
    assert tokenizer.decode(rejected) == "she was on the mat<|endoftext|>" and rejected[-1] == EOS
    assert row == pair
    assert f"1 rows (dropped: 1 chosen equal to rejected, 2 over {length} tokens)" in capsys.readouterr().out


def test_detail_e1_prompt_and_completion_are_tokenised_apart(tokenizer):
    """T4: ids are those of the prompt, those of the completion and EOS, also where the joint string has others."""
    ids = reward_model.encode("I wo", "uld not", tokenizer)
    assert ids == tokenizer("I wo").input_ids + tokenizer("uld not").input_ids + [EOS]
    assert ids[:-1] != tokenizer("I would not").input_ids


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_detail_e5_an_epoch_visits_every_pair_once(world, monkeypatch):
    """T18: over all ranks an epoch has every pair exactly once, and each rank as many rows, Nones included."""
    size, batch_size = 61, 24  # the last batch has 13 rows
    monkeypatch.setenv("WORLD_SIZE", str(world))
    orders = []
    for epoch in (0, 1):
        seen, order = [], None
        for start in range(0, size, batch_size):
            shares = []
            for rank in range(world):
                monkeypatch.setenv("RANK", str(rank))
                order = permutation(size, 44413, epoch)  # each rank draws it anew
                shares.append(rows_of_this_rank(order[start : start + batch_size]))
            assert len({len(share) for share in shares}) == 1
            seen += [row for share in shares for row in share if row is not None]
        assert sorted(seen) == list(range(size))
        orders.append(order)
    assert orders[0] != orders[1] and orders[0] != permutation(size, 55513, 0)


def test_main_visits_every_pair_once_an_epoch_chosen_first(files, tmp_path, tokenizer, monkeypatch):
    """T18: main trains on each pair once an epoch; chosen and rejected of a micro-batch share one forward."""
    batches, original = [], reward_model.pad

    def spy(sequences, *rest):
        batches.append([tokenizer.decode(ids) for ids in sequences])
        return original(sequences, *rest)

    monkeypatch.setattr(reward_model, "pad", spy)
    run(files, tmp_path / "run", epochs=2)
    pairs = {f"{row['prompt']}{row['chosen']}<|endoftext|>": f"{row['prompt']}{row['rejected']}<|endoftext|>"
             for row in PAIRS[:28]}
    train = [texts for texts in batches if texts[0] in pairs and texts[-1] in pairs.values()]  # without evaluation
    assert [len(texts) for texts in train] == [16, 16, 16, 8] * 2
    for texts in train:
        half = len(texts) // 2
        assert [pairs[chosen] for chosen in texts[:half]] == texts[half:]
    epochs = [[text for texts in train[start : start + 4] for text in texts[: len(texts) // 2]] for start in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(pairs)
    assert set(epochs[0][:8]) != set(epochs[1][:8])


def shared(pairs):
    """ids, segments of --share_prefix."""
    pairs = [pair[:2] if pair else ([0], [0]) for pair in pairs]
    return packing.share_prefix([(*pair, packing.shared_length(*pair)) for pair in pairs], "right", "cpu")


def scores_of_pairs(model, pairs, share_prefix=True):
    return reward_model.pair_scores(model, pairs, PAD, reward_model.Args(share_prefix=share_prefix), "cpu")


def test_detail_e27_rows_hold_the_common_beginning_once():
    """The row of packing's docstring, none in common, one the other's beginning, equal ids, a None: all by hand."""
    pairs = [([5, 6, 7, 8, 8, 0], [5, 6, 7, 9, 0], {}), ([5, 0], [6, 5, 0], {}), ([5, 6, 0], [5, 6, 0, 7, 0], {}),
             ([5, 0], [5, 0], {}), None]
    ids, segments = shared(pairs)
    assert ids.tolist() == [[5, 6, 7, 8, 8, 0, 9, 0], [5, 0, 6, 5, 0, 0, 0, 0], [5, 6, 0, 0, 7, 0, 0, 0],
                            [5, 0, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert segments.tolist() == [[-1, -1, -1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 0, 0, 0], [-1, -1, 1, 2, 2, 2, 0, 0],
                                 [-1, 1, 2, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]]
    positions = packing.packed_inputs(segments, torch.float32)["position_ids"]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4], [0, 1, 0, 1, 2, 0, 0, 0], [0, 1, 2, 2, 3, 4, 0, 0],
                                  [0, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
    lengths = [(reward_model.row_length(pair, True), reward_model.row_length(pair, False)) for pair in pairs[:4]]
    assert lengths == [(8, 6), (5, 3), (6, 5), (3, 2)]


# ---- Model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 64])
def test_detail_11_head_init(d):
    """T14: the weights of 2,000 heads have mean 0 and standard deviation 1/sqrt(d + 1), within 2 %."""
    model = SimpleNamespace(score=torch.nn.Linear(d, 1, bias=False))
    weights = []
    for seed in range(2000):
        reward_model.init_head(model, seed)
        weights.append(model.score.weight.detach().clone())
    weights = torch.stack(weights)
    assert weights.std().item() == pytest.approx(1 / math.sqrt(d + 1), rel=0.02)
    assert abs(weights.mean().item()) < 0.02
    reward_model.init_head(model, 7)
    assert torch.equal(model.score.weight, weights[7])  # the seed decides


def test_detail_e6_head_has_no_bias(tiny_classifier, trained):
    """T14: the head of the Hugging Face classes is a weight alone, also after training."""
    assert tiny_classifier.score.bias is None and tiny_classifier.score.weight.shape == (1, 64)
    assert [name for name in load_file(trained / "model.safetensors") if name.startswith("score")] == ["score.weight"]


@torch.no_grad()
def test_detail_11_head_reads_the_state_after_the_final_norm(scalar_model):
    """T14: values are score(hidden_states[-1]), which is the normed state: mean 0 and variance 1 in every token."""
    ids = torch.arange(1, 21).view(2, 10)
    hidden = scalar_model.classifier(ids, output_hidden_states=True).hidden_states[-1]
    assert hidden.mean(-1).abs().max() < 1e-5 and (hidden.var(-1, correction=0) - 1).abs().max() < 1e-3
    values = scalar_model(ids, torch.ones_like(ids, dtype=torch.bool))
    assert values.shape == (2, 10) and values.dtype == torch.float32
    assert torch.allclose(values, scalar_model.classifier.score(hidden).squeeze(-1), atol=1e-6)


def four_rows():
    """ids, mask, index of the last real token: pads on the left, nowhere, nowhere with EOS last, on the right."""
    rows = [
        [PAD, PAD, *QUERY, *RESPONSE[:3], EOS, PAD],  # left-padded query + EOS + pads
        [*QUERY, *RESPONSE, 12, 13, 14],  # full length, without EOS
        [*QUERY, *RESPONSE, 12, 13, EOS],  # EOS in the last slot
        [*QUERY, *RESPONSE[:3], EOS, PAD, PAD, PAD],  # the first text, right-padded
    ]
    ids = torch.tensor(rows)
    return ids, ids != PAD, torch.tensor([8, 9, 9, 6])


def test_detail_12_score_is_read_at_the_last_token():
    """T15: the last real token is found wherever the pads are; the first PAD, as once searched for, misleads."""
    ids, mask, last = four_rows()
    columns = torch.arange(10).expand(4, 10)
    assert reward_model.at_last_token(columns, mask).tolist() == last.tolist()
    assert reward_model.at_last_token(columns, columns == 0).tolist() == [0] * 4  # rows of one token
    values = torch.rand(4, 10)
    assert torch.equal(reward_model.at_last_token(values, mask), values[range(4), last])
    by_first_pad = (ids == PAD).int().argmax(1) - 1
    assert by_first_pad[3] == last[3]  # right on a right-padded row
    assert by_first_pad[0] == -1  # wrong on the left-padded one


def tiny_gpt2_scalar_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, num_labels=1)
    return reward_model.ScalarModel(GPT2ForSequenceClassification(GPT2Config(**sizes)).eval())


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])  # GPT-2 has absolute positions: wrong without position ids
def test_detail_45_padding_side_does_not_change_scores(family, scalar_model):
    """T15: the same text scores the same to 1e-5 without pads, with pads on the left, the right and both sides."""
    model = scalar_model if family == "gpt_neox" else tiny_gpt2_scalar_model()
    ids, mask, _ = four_rows()
    rows = [ids[0], ids[3], torch.tensor([PAD] * 3 + [*QUERY, *RESPONSE[:3], EOS])]
    scores = [reward_model.at_last_token(model(row[None], row[None] != PAD), row[None] != PAD) for row in rows]
    expected = value_at_end(model, [*QUERY, *RESPONSE[:3], EOS])
    assert (torch.cat(scores) - expected).abs().max() < 1e-5
    assert (value_at_end(model, [*QUERY, *RESPONSE[:2], 12, EOS]) - expected).abs() > 1e-3  # another text


@torch.no_grad()
def test_detail_3_pad_is_never_embedded(scalar_model):
    """T9: a PAD id beyond the embedding gives the same values at real tokens, bit for bit."""
    ids, mask, _ = four_rows()
    assert torch.equal(scalar_model(ids.masked_fill(~mask, 64_000), mask)[mask], scalar_model(ids, mask)[mask])


@torch.no_grad()
def test_detail_15_constant_is_subtracted_and_cancels_in_pairs(scalar_model):
    """T17: reward_mean of the config lowers every value by itself; the difference of a pair stays."""
    ids, mask, _ = four_rows()
    before = scalar_model(ids, mask)
    scalar_model.classifier.config.reward_mean = 2.5
    after = reward_model.ScalarModel(scalar_model.classifier)(ids, mask)
    assert torch.allclose(after, before - 2.5, atol=1e-6)
    assert torch.allclose(after[0, 8] - after[3, 6], before[0, 8] - before[3, 6], atol=1e-6)
    assert "reward_mean" not in dict(scalar_model.named_parameters())  # not trained


SIZES = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=128, initializer_range=0.2, num_labels=1)


@pytest.fixture(params=["gpt_neox", "gpt2", "llama"])
def pair_model(request, tiny_classifier):
    torch.manual_seed(2)
    return reward_model.PackedScalarModel(
        tiny_classifier if request.param == "gpt_neox" else tiny_gpt2_scalar_model().classifier
        if request.param == "gpt2" else LlamaForSequenceClassification(LlamaConfig(**SIZES)).eval())


def random_pairs():
    """Pairs with 4, 3, 9 and no tokens in common, and three where a completion is the other's beginning, or both."""
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for common, *lengths in ((4, 5, 3), (3, 1, 6), (9, 2, 2), (0, 4, 2), (5, 0, 3), (2, 4, 0), (6, 0, 0)):
        start, *ends = (torch.randint(2, 60, (n,), generator=draw).tolist() for n in (common, *lengths))
        pairs.append((*(start + end + [EOS] for end in ends), {}))
    return pairs


@torch.no_grad()
def test_detail_e27_scores_equal_those_of_separate_rows(pair_model):
    """Each score of a shared row is that of its sequence alone, to 1e-5, whatever its neighbours, Nones among them."""
    pairs = random_pairs()
    expected = torch.stack([torch.stack([value_at_end(pair_model, pair[side]) for pair in pairs]) for side in (0, 1)])
    assert expected[:, :6].flatten().unique().numel() == 12  # the last pair has equal ids
    scores = scores_of_pairs(pair_model, [*pairs, None])
    alone = torch.cat([scores_of_pairs(pair_model, [pair]) for pair in pairs], dim=1)
    plain = scores_of_pairs(pair_model, [*pairs, None], share_prefix=False)
    for found in (scores[:, :7], alone, plain[:, :7]):
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5 * expected.abs().max()
    pair_model.reward_mean = 2.5
    assert torch.allclose(scores_of_pairs(pair_model, pairs), expected - 2.5, atol=1e-5)


def test_detail_e27_gradient_equals_that_of_separate_rows(pair_model):
    """The loss of shared rows has the gradient of the one of separate rows, to a relative norm of 1e-5."""
    pairs, gradients = random_pairs(), []
    separate = [torch.stack([value_at_end(pair_model, pair[side]) for pair in pairs]) for side in (0, 1)]
    both = [scores_of_pairs(pair_model, [*pairs, None], share_prefix)[:, :7] for share_prefix in (True, False)]
    for chosen, rejected in (separate, *both):
        loss = reward_model.pair_losses(chosen, rejected).mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*pair_model.parameters()])]))
    assert all((gradients[0] - other).norm() < 1e-5 * gradients[0].norm() for other in gradients[1:])


@torch.no_grad()
def test_detail_e27_mask_and_positions_by_hand(tiny_classifier):
    """What a model in bf16 is fed for the row of the docstring and a longer one: its mask, positions, and no PAD."""
    fed, model = [], reward_model.PackedScalarModel(tiny_classifier.bfloat16())
    tiny_classifier.base_model.register_forward_pre_hook(lambda _, args, inputs: fed.append(inputs), with_kwargs=True)
    pairs = [([5, 6, 7, 8, 8, 0], [5, 6, 7, 9, 0], {}), ([5] * 8 + [0], [5] * 7 + [0], {})]
    scores = scores_of_pairs(model, pairs)
    mask = fed[0]["attention_mask"]
    assert mask.dtype == torch.bfloat16 and scores.dtype == torch.float32 and mask.shape == (2, 1, 10, 10)
    assert mask.unique().tolist() == [torch.finfo(torch.bfloat16).min, 0]
    assert ["".join(".x"[value == 0] for value in row) for row in mask[0, 0].tolist()] == [
        "x.........", "xx........", "xxx.......",  # a b c
        "xxxx......", "xxxxx.....", "xxxxxx....",  # y y EOS
        "xxx...x...", "xxx...xx..",  # z EOS
        "xxx.....x.", "xxx.....xx"]  # padding, which nothing sees
    assert fed[0]["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 0], [*range(9), 7]]
    assert fed[0]["input_ids"].tolist() == [[5, 6, 7, 8, 8, 0, 9, 0, 0, 0], [5] * 8 + [0, 0]]


# ---- Algorithm --------------------------------------------------------------------------------------------


def test_detail_10_pair_losses_golden_values():
    """T16: ln 2 at equal rewards, -log sigmoid(r_chosen - r_rejected) otherwise, of each pair."""
    losses = reward_model.pair_losses(torch.tensor([1.5, 2.0, 1.0, 50.0]), torch.tensor([1.5, 1.0, 2.0, -50.0]))
    assert losses.tolist() == pytest.approx([0.693147, 0.313262, 1.313262, 0], abs=1e-6)


@torch.no_grad()
def test_detail_10_fresh_reward_model_starts_near_ln_2(files, tokenizer):
    """T16: the mean loss of a fresh head on the training pairs lies between 0.6 and 0.8, for several seeds."""
    model = load(files["model"], tokenizer)
    pairs = reward_model.load_pairs(files["train_data"], "--train_data", tokenizer, reward_model.Args())
    for seed in range(5):
        reward_model.init_head(model.classifier, seed)
        chosen, rejected = (torch.tensor(scores_of(model, [pair[side] for pair in pairs])) for side in (0, 1))
        losses = torch.cat([reward_model.pair_losses(chosen, rejected), reward_model.pair_losses(rejected, chosen)])
        assert 0.6 < losses.mean() < 0.8


def test_cosine_lr_golden_values():
    """T13: after 1 of 911 steps with peak 3e-6 the rate is 2.9999910808426766e-06, after the last 0."""
    assert reward_model.cosine_lr(1, 911, 0, 3e-6) == pytest.approx(2.9999910808426766e-06, rel=1e-14)
    assert reward_model.cosine_lr(911, 911, 0, 3e-6) == pytest.approx(0, abs=1e-20)
    assert [reward_model.cosine_lr(step, 20, 4, 0.5) for step in range(5)] == [0, 0.125, 0.25, 0.375, 0.5]


# ---- Evaluation -------------------------------------------------------------------------------------------


def test_detail_e7_ties_count_one_half():
    """T19: accuracy is 1 for a right pair, 0 for a wrong one, 1/2 at a tie."""
    assert reward_model.accuracy([2.0, 1.0, 3.0], [1.0, 2.0, 3.0]).tolist() == [1, 0, 0.5]


def test_clustered_interval_of_single_rows_is_the_usual_one():
    """T19: with a cluster for each row the interval is mean -+ 1.96 standard errors, to 10 % of its width."""
    values = np.random.default_rng(1).normal(0.6, 1, 400)
    low, high = reward_model.clustered_interval(values, list(range(400)))
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.4 * error)


def test_clustered_interval_widens_when_rows_are_clustered():
    """T19: 40 rows, each ten times, have an interval about sqrt(10) times as wide, still around the mean."""
    values = np.repeat(np.random.default_rng(1).normal(0.6, 1, 40), 10)
    low, high = reward_model.clustered_interval(values, list(range(400)))
    clustered_low, clustered_high = reward_model.clustered_interval(values, [f"prompt {i // 10}" for i in range(400)])
    assert clustered_low < low < values.mean() < high < clustered_high
    assert (clustered_high - clustered_low) / (high - low) == pytest.approx(math.sqrt(10), rel=0.15)


def test_clustered_interval_weighs_rows_not_clusters():
    """T19: the mean is over rows: a cluster of 99 ones and one of a single zero are not half and half."""
    low, high = reward_model.clustered_interval([1.0] * 99 + [0.0], [0] * 99 + [1])
    assert (low, high) == (0, 1)  # a draw is all ones, all zeros, or 0.99
    values, clusters = [1.0] * 90 + [0.0] * 10, [i // 9 if i < 90 else i for i in range(100)]
    low, high = reward_model.clustered_interval(values, clusters)  # 10 clusters of 9 ones, 10 of a single zero
    assert 0.75 < low < 0.9 < high < 1


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_score_sequences_equals_one_by_one(batch_size, scalar_model):
    """T15: batches of like lengths give the scores of single rows at EOS, in the order of the input."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(2, 60, (n,), generator=generator).tolist() + [EOS] for n in (9, 2, 14, 5, 2, 30, 1)]
    expected = [value_at_end(scalar_model, ids).item() for ids in sequences]
    assert scores_of(scalar_model, sequences, batch_size).tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 7


@torch.no_grad()
def test_score_sequences_runs_batches_of_the_size_and_says_how_far_it_is(scalar_model, monkeypatch, capsys):
    """Seven rows by three are three forwards; each takes a minute here, and so has a line with the time left."""
    shapes, clock = [], iter(range(0, 10**6, 60))
    monkeypatch.setattr(utils.data, "time", SimpleNamespace(time=lambda: next(clock)))
    scalar_model.device = torch.device("cpu")
    scalar_model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    reward_model.score_sequences(scalar_model, [[2] * n + [EOS] for n in range(7)], PAD, 3)
    assert shapes == [(3, 3), (3, 6), (1, 7)]
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["scores", "3/7"], ["scores", "6/7"], ["scores", "7/7"]]


@pytest.mark.parametrize("eval_batch_size", [1, 5])
def test_eval_batch_size_changes_no_score(eval_batch_size, trained, files, tmp_path):
    """Evaluations and the constant, with batches of the size in all of them but for the training's."""
    run(files, tmp_path / "run", eval_batch_size=eval_batch_size)
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole.assert_rows_equal(*(whole.rows_of(folder / name) for folder in (tmp_path / "run", trained)))
    constants = [json.loads((folder / "summary.json").read_text())["reward_mean"] for folder in (tmp_path / "run", trained)]
    assert constants[0] == pytest.approx(constants[1], abs=1e-5)


class Scorer:
    """A stand-in for the engine whose score can be done by hand: a function of a row's token ids."""

    device = torch.device("cpu")

    def __init__(self, function):
        self.function = function

    def __call__(self, ids, mask):
        scores = [float(self.function(row[keep].tolist())) for row, keep in zip(ids, mask)]
        return torch.tensor(scores)[:, None].expand(ids.shape)


def evaluate(function, rows, tokenizer, shuffle=False, **changes):
    pairs = [(*(reward_model.encode(row["prompt"], row[side], tokenizer) for side in ("chosen", "rejected")), row)
             for row in rows]
    return reward_model.evaluate(Scorer(function), pairs, tokenizer, reward_model.Args(**changes), shuffle)


def test_evaluate_longer_wins_by_hand(tokenizer):
    """T19: chosen is longer twice, as long once, shorter once: 5/8; a model that scores length is that baseline."""
    rows = [{"prompt": prompt, "chosen": " good" * a, "rejected": " no" * b}
            for prompt, a, b in ((" she", 3, 1), (" she", 2, 1), (" he", 2, 2), (" it", 1, 4))]
    assert all(len(tokenizer(word).input_ids) == 1 for word in (" she", " he", " it", " good", " no"))
    metrics, samples, _ = evaluate(len, rows, tokenizer)
    assert metrics["longer_wins"] == metrics["accuracy"] == 0.625
    assert metrics["score_length_correlation"] == pytest.approx(1)
    assert metrics["accuracy_low"] <= 0.625 <= metrics["accuracy_high"]
    assert [row["chosen_score"] for row in samples] == [5, 4, 4, 3]  # with prompt and EOS
    assert [row["rejected_score"] for row in samples] == [3, 3, 4, 6]
    assert metrics["chosen_rewards"] == metrics["rejected_rewards"] == 4
    assert evaluate(lambda ids: -len(ids), rows, tokenizer)[0]["accuracy"] == 0.375


def test_evaluate_the_length_of_the_prompt_does_not_count(tokenizer):
    """A model that scores the completion's length has correlation 1 with it, whatever stands before."""
    rows = [{"prompt": " she" * n, "chosen": " good" * a, "rejected": " no" * b} for n, a, b in (
        (9, 1, 3), (1, 5, 2), (4, 4, 2))]
    words = [token for word in (" good", " no") for token in tokenizer(word).input_ids]
    metrics, _, _ = evaluate(lambda ids: sum(token in words for token in ids), rows, tokenizer)
    assert metrics["score_length_correlation"] == pytest.approx(1)


def test_evaluate_shuffled_prompts_are_never_the_own(tokenizer):
    """T19: a model that looks for the prompt in the completion is always right; with other prompts at chance."""
    prompts = (" he", " it", " it", " she", " he")
    assert all(len(tokenizer(prompt).input_ids) == 1 for prompt in prompts)
    rows = [{"prompt": prompt, "chosen": prompt, "rejected": " old mat"} for prompt in prompts]

    def repeats(ids):
        return ids[0] in ids[1:]

    for seed in range(5):
        metrics, _, _ = evaluate(repeats, rows, tokenizer, shuffle=True, seed=seed)
        assert (metrics["accuracy"], metrics["shuffled_prompts"]) == (1, 0.5)
    assert "shuffled_prompts" not in evaluate(repeats, rows, tokenizer)[0]


def test_evaluate_the_other_prompt_is_drawn_with_the_seed(tokenizer):
    """Each prompt is lent to one other; with another seed to another one, not always to its alphabetical neighbour."""
    rows = [{"prompt": " she" * (n + 1), "chosen": " good" * (n + 1), "rejected": " no" * (n + 1)} for n in range(9)]
    she, good = (tokenizer(word).input_ids[0] for word in (" she", " good"))
    found = set()
    for seed in range(4):
        seen = []
        evaluate(lambda ids: seen.append((ids.count(good), ids.count(she))) or 0, rows, tokenizer, shuffle=True, seed=seed)
        lent = {own: other for own, other in seen if own and own != other}
        assert set(lent) == set(lent.values()) == set(range(1, 10))
        found.add(tuple(sorted(lent.items())))
    assert len(found) == 4


GROUPED = [{"prompt": f" she{' is' * i}", "chosen": " good" * a, "rejected": " no" * b, "split": split, "batch": batch,
            "confidence": confidence} for i, (a, b, split, batch, confidence) in enumerate((
                (3, 1, "valid1", "batch11", 1), (1, 2, "valid1", "batch11", 5), (2, 2, "valid1", "batch13", 5),
                (4, 1, "valid2", "batch13", 5), (2, 1, "valid2", "batch13", 9), (1, 3, "valid2", "batch8", 1)))]


@pytest.mark.parametrize("eval_batch_size", [1, 2, 100])
def test_detail_16_accuracy_by_column_by_hand(eval_batch_size, tokenizer):
    """T19: six pairs right, wrong, tied, right, right, wrong: accuracy overall and by split, batch and confidence."""
    metrics, _, _ = evaluate(len, GROUPED, tokenizer, accuracy_by=("split", "batch", "confidence"),
                             eval_batch_size=eval_batch_size)
    assert metrics["accuracy"] == pytest.approx(3.5 / 6)
    assert {name: value for name, value in metrics.items() if name.startswith("accuracy/")} == pytest.approx({
        "accuracy/split/valid1": 0.5, "accuracy/split/valid2": 2 / 3, "accuracy/batch/batch11": 0.5,
        "accuracy/batch/batch13": 2.5 / 3, "accuracy/batch/batch8": 0.0, "accuracy/confidence/1": 0.5,
        "accuracy/confidence/5": 0.5, "accuracy/confidence/9": 1.0})
    assert not any(name.startswith("accuracy/") for name in evaluate(len, GROUPED, tokenizer)[0])


def test_detail_18_calibration_by_hand():
    """T19: bins of 0.5 by |difference|, their accuracy with ties 1/2, their mean sigmoid; empty ones are left out."""
    differences = [0.1, -0.2, 0.4, 0.0, 0.5, 0.7, -0.9, 1.6, -1.6]
    chosen = np.arange(9) / 3
    table = reward_model.calibration(chosen, chosen - differences)
    sigmoid = {x: 1 / (1 + math.exp(-x)) for x in map(abs, differences)}
    expected = [(0.0, 4, 2.5 / 4, (sigmoid[0.1] + sigmoid[0.2] + sigmoid[0.4] + 0.5) / 4),
                (0.5, 3, 2 / 3, (sigmoid[0.5] + sigmoid[0.7] + sigmoid[0.9]) / 3), (1.5, 2, 0.5, sigmoid[1.6])]
    assert [tuple(row) for row in table] == [("from", "pairs", "accuracy", "predicted")] * 3
    assert [tuple(row.values()) for row in table] == [pytest.approx(row) for row in expected]


def test_detail_18_calibration_ends_at_a_quantile():
    """T19: bins reach to the 99.5 % quantile of |difference|: 5 outliers of 1,000 have none, 6 of them do."""
    for outliers, last in ((5, 1.0), (6, 3.5)):
        differences = np.array([0.2] * 500 + [1.2] * (500 - outliers) + [3.7] * outliers)
        table = reward_model.calibration(differences, 0 * differences)
        assert [row["from"] for row in table] == sorted({0.0, 1.0, last})


# ---- Main -------------------------------------------------------------------------------------------------


def demonstrations_of(files, tokenizer):
    rows = [json.loads(line) for line in open(files["demonstrations"])]
    return [reward_model.encode(row["prompt"], row["completion"], tokenizer) for row in rows]


def test_main_learns_and_reports(trained):
    """T16: trained to prefer " mat", the model does so on held-out pairs; summary.json has before and after."""
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["after"]["eval/held_out/accuracy"] == 1 > summary["before"]["eval/held_out/accuracy"]
    assert summary["after"]["eval/held_out/chosen_rewards"] > summary["after"]["eval/held_out/rejected_rewards"] + 1
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train] == list(range(1, 13))  # 28 pairs, 8 a step, 3 epochs: 4 steps an epoch
    assert 0.4 < train[0]["train/loss"] < 1.2 and train[-1]["train/loss"] < 0.2 and train[-1]["train/accuracy"] == 1
    assert rows[0] == {"step": 0, **summary["before"]} and rows[-1] == {"step": 12, **summary["after"]}
    for name in ("args.json", "README.md", "samples.jsonl", "tensorboard", "tokenizer.json"):
        assert (trained / name).exists(), name


def test_accuracy_by_a_column_that_is_not_there_is_refused(files, tmp_path, capsys):
    """--accuracy_by a column that the held-out pairs lack ends in one line that lists those they have."""
    with pytest.raises(SystemExit):
        run(files, tmp_path / "run", accuracy_by=("confidense",))
    error = capsys.readouterr().err
    assert "--accuracy_by confidense" in error and "Found: prompt, chosen, rejected" in error
    assert not (tmp_path / "run").exists()


def test_main_reports_accuracy_by_column_and_calibration(files, tmp_path):
    """T19: --accuracy_by groups the held-out accuracy of every evaluation; summary.json has the calibration bins."""
    rows = [{**row, "batch": f"batch{i % 3}", "extra": {}} for i, row in enumerate(PAIRS[28:])]
    held_out = write_rows(tmp_path / "held_out.jsonl", rows)
    run({**files, "eval_data": (held_out,)}, tmp_path / "run", epochs=1, accuracy_by=("batch",), eval_every=2)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    evaluations = [row for row in metrics if "eval/held_out/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    for row in evaluations:
        scores = [(sample["chosen_score"], sample["rejected_score"]) for sample in samples
                  if sample["step"] == row["step"]]
        correct = [chosen > rejected for chosen, rejected in scores]
        assert {name: value for name, value in row.items() if "/batch/" in name} == pytest.approx({
            f"eval/held_out/accuracy/batch/batch{i}": sum(correct[i::3]) / len(correct[i::3]) for i in range(3)})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["calibration"] == {"held_out": reward_model.calibration(*zip(*scores))}
    assert summary["calibration"]["held_out"][0]["pairs"] > 0


def test_gradient_checkpointing_changes_nothing(files, tmp_path, monkeypatch):
    """After 2 steps the weights with and without recomputed activations agree to 1e-6; it does recompute."""
    models, recomputed, checkpoint = [], [], transformers.modeling_utils.checkpoint
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", lambda *args, **options: (
        recomputed.append(torch.is_grad_enabled()), checkpoint(*args, **options))[1])
    for switch in (False, True):
        run(files, tmp_path / str(switch), epochs=1, batch_size=14, gradient_checkpointing=switch)
        models.append(flat(AutoModelForSequenceClassification.from_pretrained(tmp_path / str(switch))))
        assert sum(recomputed) == switch * 2 * 2 * 2  # steps x micro-batches x layers
    assert (models[0] - models[1]).abs().max() < 1e-6


@torch.no_grad()
def test_detail_15_demonstrations_average_0(trained, files, tokenizer):
    """T17: reloaded from the folder, the mean score of the demonstrations is 0; before, it was the constant."""
    model = load(trained, tokenizer)
    sequences = demonstrations_of(files, tokenizer)
    constant = model.reward_mean
    assert model.terminator == EOS == json.loads((trained / "config.json").read_text())["terminator_token_id"]
    assert constant == json.loads((trained / "summary.json").read_text())["reward_mean"] and abs(constant) > 0.05
    scores = scores_of(model, sequences)
    assert abs(scores.mean()) < 1e-4 and scores.std() > 1e-3
    pairs = reward_model.load_pairs(files["train_data"], "--train_data", tokenizer, reward_model.Args())
    chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
    differences = scores_of(model, chosen) - scores_of(model, rejected)
    model.reward_mean = 0.0
    assert scores_of(model, sequences).mean() == pytest.approx(constant, abs=1e-5)
    assert scores_of(model, chosen) - scores_of(model, rejected) == pytest.approx(differences, abs=1e-5)


@torch.no_grad()
def test_detail_15_other_tools_see_the_score_plus_the_constant(trained, files, tokenizer):
    """T17: AutoModelForSequenceClassification's logits on right-padded rows, less reward_mean, are the scores."""
    sequences = demonstrations_of(files, tokenizer)
    plain = AutoModelForSequenceClassification.from_pretrained(trained)
    ids, mask = pad(sequences, plain.config.pad_token_id, "right")
    assert not mask.all()
    logits = plain(input_ids=ids, attention_mask=mask.long()).logits[:, 0] - plain.config.reward_mean
    assert logits.tolist() == pytest.approx(scores_of(load(trained, tokenizer), sequences).tolist(), abs=1e-5)


def test_saved_folder_stands_alone(files, tmp_path, tokenizer):
    """T20: with the SFT folder deleted, the reward model loads and scores as before."""
    sft_model = tmp_path / "sft"
    shutil.copytree(files["model"], sft_model)
    run({**files, "model": str(sft_model)}, tmp_path / "run", epochs=1)
    sequences = demonstrations_of(files, tokenizer)
    before = scores_of(load(tmp_path / "run", tokenizer), sequences)
    shutil.rmtree(sft_model)
    assert str(sft_model) not in (tmp_path / "run/config.json").read_text()
    after = scores_of(load(tmp_path / "run", load_tokenizer(str(tmp_path / "run"), "--model")), sequences)
    assert after.tolist() == before.tolist()


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("micro_batch_size", [8, 3, 1])
def test_main_equals_a_plain_torch_loop(micro_batch_size, share_prefix, files, tmp_path, tokenizer, monkeypatch):
    """T12: for any micro-batch size, main's 4 steps are AdamW's on the mean over pairs, row by row without pads."""
    steps = watch_steps(monkeypatch, reward_model)
    run(files, tmp_path / "run", epochs=1, micro_batch_size=micro_batch_size, share_prefix=share_prefix,
        warmup_ratio=0.0)
    model = load(files["model"], tokenizer)
    reward_model.init_head(model.classifier, 1)
    assert torch.equal(flat(model), steps[0].before)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)
    pairs = reward_model.load_pairs(files["train_data"], "--train_data", tokenizer, reward_model.Args())
    order = permutation(28, 1, 0)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for number, step in enumerate(steps):
        set_weights(model, step.before)
        optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * number / 4))
        losses = []
        for chosen, rejected, _ in (pairs[i] for i in order[8 * number : 8 * number + 8]):
            losses.append(torch.log1p(torch.exp(value_at_end(model, rejected) - value_at_end(model, chosen))))
        optimizer.zero_grad()
        loss = torch.stack(losses).mean()
        loss.backward()
        norm, row = check_step(step, model, optimizer), rows[number + 1]
        assert (row["train/loss"], row["train/grad_norm"]) == pytest.approx((loss.item(), norm), rel=1e-4)
    assert len(steps) == 4 and torch.equal(flat(load(tmp_path / "run", tokenizer)), steps[-1].after)


def lengths_of_shared_rows(monkeypatch):
    """A list that fills up with the tokens of each row of each call of share_prefix, None for a None."""
    seen, original = [], packing.share_prefix

    def spy(pairs, *rest):
        ids, segments = original(pairs, *rest)
        seen.append([None if pair == ([0], [0], 0) else int((row != 0).sum()) for pair, row in zip(pairs, segments)])
        return ids, segments

    monkeypatch.setattr(reward_model, "share_prefix", spy)
    return seen


def test_share_prefix_puts_rows_of_like_length_together(files, tmp_path, tokenizer, monkeypatch):
    """Long prompts with short completions make shorter rows than the reverse, though longer sequences; off: no row."""
    seen = lengths_of_shared_rows(monkeypatch)
    rows = [{"prompt": " good" * a, "chosen": " is" * b, "rejected": " no" * b} for a, b in ((9, 1), (2, 7)) * 2]
    files = {**files, "train_data": write_rows(tmp_path / "train.jsonl", rows)}
    run(files, tmp_path / "off", epochs=1)
    assert seen == []
    run(files, tmp_path / "on", epochs=1, batch_size=4, micro_batch_size=2, share_prefix=True)
    assert seen == [[13, 13], [18, 18]]  # sequences of 11 and 10


def test_share_prefix_leaves_nones_out(files, tmp_path, monkeypatch):
    """A None in the last micro-batch of each step, as ranks without a pair have it, changes no figure and no weight."""
    seen, rows, models = lengths_of_shared_rows(monkeypatch), [], []
    for name in ("without", "with"):
        if name == "with":
            monkeypatch.setattr(reward_model, "rows_of_this_rank", lambda rows: [*rows, None])
        run(files, tmp_path / name, epochs=1, micro_batch_size=3, share_prefix=True)
        rows += [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][1:5]
        models.append(flat(AutoModelForSequenceClassification.from_pretrained(tmp_path / name)))
    assert sum(None in lengths for lengths in seen) == 4 and (models[0] - models[1]).abs().max() < 1e-5
    for before, after in zip(rows[:4], rows[4:]):
        assert "train/loss" in after and after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("case", ["window", "state space"])
def test_share_prefix_is_refused_where_the_mask_would_fail(case, files, tmp_path, tokenizer, capsys):
    """Attention shorter than a row may be, and layers that ignore the mask, end in one line; without the flag not."""
    sizes = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                 intermediate_size=32)
    config = MistralConfig(**sizes, sliding_window=63) if case == "window" else JambaConfig(
        **sizes, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_dt_rank=4, num_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = dict(model=str(tmp_path / "model"), epochs=1)
    with pytest.raises(SystemExit):
        run({**files, **changes}, tmp_path / "run", share_prefix=True)
    error = capsys.readouterr().err
    words = ("--max_length 64", "63") if case == "window" else ("jamba", "mask")
    assert error.startswith("error: --share_prefix") and error.count("\n") == 1 and all(w in error for w in words)
    assert not (tmp_path / "run").exists()
    run({**files, **changes}, tmp_path / "run")
    assert (tmp_path / "run/summary.json").exists()


@torch.no_grad()
def test_save_model_writes_what_the_engine_holds(tmp_path, tokenizer):
    """T20: an engine's tied or untied language model or wrapped classifier reloads with the same logits."""
    init_distributed()
    ids, mask = pad([[*QUERY, *RESPONSE, EOS], [*QUERY, EOS]], 60, "right")
    inputs = dict(input_ids=ids, attention_mask=mask.long())
    args = reward_model.Args()
    torch.manual_seed(0)
    tied, untied = (GPTNeoXForCausalLM(tiny_config(tie_word_embeddings=tie)).eval() for tie in (True, False))
    classifier = GPTNeoXForSequenceClassification(tiny_config(num_labels=1)).eval()
    for name, model in (("tied", tied), ("untied", untied), ("classifier", classifier)):
        wrapped = reward_model.ScalarModel(model) if name == "classifier" else model
        engine = create_engine(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1), args)
        model.get_input_embeddings().weight.add_(0.1)  # no longer what it was made with
        save_model(engine, model, tokenizer, tmp_path / name)
        reloaded = type(model).from_pretrained(tmp_path / name).eval()
        assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits), name
    head = GPTNeoXForCausalLM.from_pretrained(tmp_path / "tied")
    assert head.get_output_embeddings().weight is head.get_input_embeddings().weight
