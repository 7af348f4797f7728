"""evaluate.py: win rates, intervals, length control, agreement, KL, judges of each kind, and runs from end to end."""

import contextlib
import json
import math
import re
import shlex
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPTNeoXForCausalLM

import evaluate
import reward_model
from evaluate import agreement, both_orders, compare, describe_texts, interval, length_controlled, resample_prompts
from evaluate import split_words
from utils.data import as_answer, pad, short_names
from utils.judge import Server, ask_within_budget, connect
from utils.models import load_causal_lm, load_classifier, load_tokenizer

NAN = float("nan")
GENERATOR = np.random.default_rng(3)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Verdicts ---------------------------------------------------------------------------------------------


def test_detail_e23_e24_both_orders_by_hand():
    """a wins where both orders say so; 1/2 where the letter stays; dropped where either is no letter."""
    letters = ["AB", "BA", "AA", "BB", [None, "A"], ["A", None], [None, None], "==", "AB", "AA"]
    a_wins, bias = both_orders(letters)
    np.testing.assert_array_equal(a_wins, [1, 0, 0.5, 0.5, NAN, NAN, NAN, 0.5, 1, 0.5])
    assert bias == {"position_bias": 3 / 6, "first": 7 / 12}


def test_both_orders_of_a_judge_that_always_takes_the_first():
    """Such a judge prefers nobody: all ties, position bias 1, first 1."""
    a_wins, bias = both_orders(["AA"] * 4 + ["=="])
    assert (a_wins == 0.5).all() and bias == {"position_bias": 1.0, "first": 1.0}
    a_wins, bias = both_orders([[None, "A"]])
    assert np.isnan(a_wins).all() and bias == {"position_bias": None, "first": None}


def test_both_orders_exchanged_is_one_minus():
    """The verdict on b is one minus that on a."""
    letters = GENERATOR.choice(np.array(["A", "B", None], dtype=object), (60, 2))
    np.testing.assert_array_equal(both_orders(letters[:, ::-1])[0], 1 - both_orders(letters)[0])


# ---- Bootstrap --------------------------------------------------------------------------------------------


def test_resampling_draws_whole_prompts():
    """Rows of one prompt have one weight; a resample has as many prompts as there are; seeds differ."""
    prompts = ["b", "a", "b", "c", "a", "b"]
    weights = resample_prompts(prompts, 1, resamples=200)
    assert weights.shape == (200, 6)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all() and weights.std() > 0
    np.testing.assert_array_equal(weights, resample_prompts(prompts, 1, resamples=200))
    assert (weights != resample_prompts(prompts, 2, resamples=200)).any()
    assert weights[:, 3].mean() == pytest.approx(1, abs=0.2)


def test_interval_equals_a_slow_bootstrap():
    """Weighted means are means over rows written out as often as they were drawn; nan rows stay out."""
    prompts = list("aabbcddeef")
    values = np.array([1, 0, 1, 1, 0.5, NAN, 0, 1, NAN, 1])
    weights = resample_prompts(prompts, 5)
    means = []
    for row in weights:
        drawn = [value for value, times in zip(values, row) for _ in range(int(times)) if not math.isnan(value)]
        means += [sum(drawn) / len(drawn)] if drawn else []
    found = interval("rate", values, weights)
    assert found["rate"] == pytest.approx(5.5 / 8)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert interval("rate", [NAN] * 10, weights) == {"rate": None, "low": None, "high": None}


def test_interval_is_that_of_the_binomial():
    """400 coin tosses: the half width is 1.96 standard errors, within 15 %."""
    values = GENERATOR.integers(2, size=400)
    found = interval("rate", values, resample_prompts(range(400), 1))
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.15)


def test_repeated_prompts_widen_the_interval():
    """Four copies of 50 prompts are 50 prompts, not 200."""
    values = np.repeat(GENERATOR.integers(2, size=50), 4)
    clustered, naive = (interval("rate", values, resample_prompts(prompts, 1)) for prompts in (
        np.repeat(np.arange(50), 4), np.arange(200)))
    assert clustered["high"] - clustered["low"] > 1.7 * (naive["high"] - naive["low"])


# ---- Length control ---------------------------------------------------------------------------------------


def draw_verdicts(theta, phi, size=4000, mean=6.0, seed=0):
    """Verdicts of a judge with this preference and this taste for length: a_wins (N,), length differences (N,)."""
    generator = np.random.default_rng(seed)
    differences = generator.normal(mean, 5, size)
    p = 1 / (1 + np.exp(-theta - phi * np.tanh(differences / differences.std())))
    return (generator.random(size) < p).astype(float), differences


def test_detail_e25_length_control_recovers_a_planted_preference():
    """A judge that likes long texts lets the longer, equally good model win; at equal length it does not."""
    for theta, rate in ((0.0, 0.5), (1.0, 1 / (1 + math.exp(-1)))):
        wins, differences = draw_verdicts(theta, 2.0)
        assert wins.mean() > rate + 0.1
        assert length_controlled(wins, differences, np.ones((1, 4000)))[0] == pytest.approx(rate, abs=0.04)


def test_detail_e25_length_control_is_the_maximum_of_the_penalised_likelihood():
    """Torch's optimizer on the likelihood written out, ties one half, both penalties, finds the same figure."""
    wins, differences = draw_verdicts(0.5, -1.0, size=60)
    wins[::7] = 0.5
    weights = GENERATOR.integers(0, 4, (3, 60)).astype(float)
    rates = length_controlled(wins, differences, weights)
    z = torch.tanh(torch.tensor(differences / differences.std()))
    for rate, weight in zip(rates, weights):
        theta = torch.tensor(math.log(rate / (1 - rate)), dtype=torch.float64, requires_grad=True)
        phi = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def loss(theta, phi):
            logits = theta + phi * z
            terms = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(wins), reduction="none")
            return (terms * torch.tensor(weight)).sum() + 0.01 / 2 * theta**2 + 1.0 / 2 * phi**2

        optimizer = torch.optim.LBFGS([theta, phi], max_iter=200, tolerance_grad=1e-12, tolerance_change=0,
                                      line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(theta, phi)
            value.backward()
            return value

        optimizer.step(closure)
        assert torch.sigmoid(theta).item() == pytest.approx(rate, abs=1e-7)


def test_length_control_golden_value():
    """Six verdicts against the highest point of a fine grid over theta and phi of the likelihood written out."""
    wins, differences = np.array([1, 1, 0, 1, 0, 0.5]), np.array([3.0, -1.0, -2.0, 4.0, 0.0, 1.0])
    theta, phi = np.meshgrid(np.linspace(-1, 2, 1001), np.linspace(-1, 2, 1001), indexing="ij")
    height = -0.01 / 2 * theta**2 - 1.0 / 2 * phi**2
    for win, difference in zip(wins, differences):
        logit = theta + phi * np.tanh(difference / differences.std())
        height += win * logit - np.logaddexp(0, logit)
    best = theta.flat[height.argmax()]
    rate = length_controlled(wins, differences, np.ones((1, 6)))[0]
    assert rate == pytest.approx(1 / (1 + math.exp(-best)), abs=1e-3)
    assert rate == pytest.approx(0.5579744, abs=1e-6)


def test_length_control_exchanged_is_one_minus():
    wins, differences = draw_verdicts(0.7, 1.0, size=80)
    weights = resample_prompts(range(80), 1, resamples=20)
    np.testing.assert_allclose(length_controlled(1 - wins, -differences, weights),
                               1 - length_controlled(wins, differences, weights), atol=1e-8)


def test_length_control_without_differences_is_the_win_rate():
    """Equal lengths say nothing; weights count rows as if they stood there more often."""
    wins = np.array([1.0, 1, 0, 0.5, 1] * 40)
    assert length_controlled(wins, np.zeros(200), np.ones((1, 200)))[0] == pytest.approx(0.7, abs=1e-4)
    wins, differences = draw_verdicts(0.3, 1.0, size=50)
    twice = length_controlled(np.repeat(wins, 2), np.repeat(differences, 2), np.ones((1, 100)))
    np.testing.assert_allclose(length_controlled(wins, differences, np.full((1, 50), 2.0)), twice, atol=1e-8)


@pytest.mark.parametrize("wins", [np.ones(500), np.zeros(500), (np.arange(500) >= 250).astype(float)],
                         ids=["all", "none", "by length alone"])
def test_length_control_where_verdicts_are_separable(wins):
    """Nobody ever loses, or length decides every verdict: the fit stays finite and ends where it must."""
    rate = length_controlled(wins, np.arange(500) - 249.5, np.ones((1, 500)))[0]
    assert rate == pytest.approx(wins.mean(), abs=0.001)


# ---- Comparisons ------------------------------------------------------------------------------------------


def test_compare_by_hand():
    """Shares, dropped prompts, who is longer, bins of the log ratio of lengths, groups."""
    a_wins = np.array([1, 1, 0, 0.5, NAN, 1])
    a_lengths, b_lengths = np.array([10, 20, 5, 8, 9, 10]), np.array([10, 10, 10, 10, 90, 40])
    groups = {"x=1": np.array([1, 1, 0, 0, 1, 0], bool), "x=2": np.array([0, 0, 1, 1, 0, 1], bool),
              "x=3": np.zeros(6, bool)}
    weights = resample_prompts(range(6), 1)
    found = compare(a_wins, a_lengths, b_lengths, groups, weights)
    assert {key: found[key] for key in ("prompts", "dropped", "win", "tie", "lose", "win_rate")} == {
        "prompts": 5, "dropped": 1, "win": 0.6, "tie": 0.2, "lose": 0.2, "win_rate": 0.7}
    assert found["longer"] == pytest.approx(1.5 / 5)
    bins = {(row["from"], row["to"]): (row["prompts"], row["win_rate"]) for row in found["by_length"] if row["prompts"]}
    assert bins == {(None, -1.0): (1, 1.0), (-0.75, -0.5): (1, 0.0), (-0.25, 0.0): (1, 0.5), (0.0, 0.25): (1, 1.0),
                    (0.5, 0.75): (1, 1.0)}
    assert len(found["by_length"]) == 10 and found["by_length"][-1]["from"] == 1.0
    rates = {name: (row["prompts"], row["win_rate"]) for name, row in found["groups"].items()}
    assert rates == {"x=1": (2, 1.0), "x=2": (3, 0.5), "x=3": (0, None)}
    assert (found["low"], found["high"]) == tuple(interval("rate", a_wins, weights).values())[1:]
    known = [0, 1, 2, 3, 5]
    fit = a_wins[known], (a_lengths - b_lengths)[known]
    assert found["length_controlled"] == pytest.approx(length_controlled(*fit, np.ones((1, 5)))[0])
    drawn = weights[:, known][weights[:, known].sum(1) > 0]  # a resample without a verdict says nothing
    low, high = np.percentile(length_controlled(*fit, drawn), [2.5, 97.5])
    assert (found["length_controlled_low"], found["length_controlled_high"]) == pytest.approx((low, high))


def test_compare_without_a_verdict():
    found = compare(np.full(3, NAN), np.array([1, 2, 3]), np.array([3, 2, 1]), {}, resample_prompts(range(3), 1))
    assert found["prompts"] == 0 and found["dropped"] == 3
    assert all(found[key] is None for key in ("win", "tie", "lose", "win_rate", "low", "length_controlled", "longer"))


def test_detail_17_agreement_by_hand():
    """Four of five where neither judge sees a tie or is silent; kappa against what the shares alone would give."""
    one = np.array([1, 1, 0, 0, 1, 0.5, NAN, 1])
    two = np.array([1, 1, 0, 1, 1, 1, 1, 0.5])
    assert agreement(one, two) == {"prompts": 5, "agreement": 0.8, "kappa": pytest.approx((0.8 - 0.56) / 0.44)}
    assert agreement(one[:2], two[:2]) == {"prompts": 2, "agreement": 1.0, "kappa": None}
    assert agreement(one[5:], two[5:]) == {"prompts": 0, "agreement": None, "kappa": None}


def test_describe_texts_by_hand():
    """Distinct n-grams of words over all texts; KL with its interval; ROUGE against each prompt's own reference."""
    answers = [{"response": " a cat sat", "length": 4, "ended": True, "kl": 1.0},
               {"response": " a cat ran", "length": 4, "ended": False, "kl": 2.0},
               {"response": "", "length": 1, "ended": True, "kl": 6.0}]
    references = [" a cat sat", " the dog", " nothing"]
    weights = resample_prompts(range(3), 1)
    found = describe_texts(answers, references, weights)
    assert {key: found[key] for key in ("distinct_1", "distinct_2", "distinct_3", "length", "kl")} == {
        "distinct_1": 4 / 6, "distinct_2": 3 / 4, "distinct_3": 1.0, "length": 3.0, "kl": 3.0}
    assert found["ended"] == pytest.approx(2 / 3) and found["kl_low"] == 1.0 and found["kl_high"] == 6.0
    assert found["rouge1"] == pytest.approx(1 / 3) and found["rouge2"] == found["rougeL"] == pytest.approx(1 / 3)
    none = describe_texts([{**row, "ended": None, "kl": None} for row in answers[2:]], [], weights[:, 2:])
    assert {key for key, value in none.items() if value is None} == {
        "ended", "kl", "kl_low", "kl_high", "rouge1", "rouge2", "rougeL", "distinct_1", "distinct_2", "distinct_3"}


def test_words_of_scripts_without_spaces_are_characters():
    """Elsewhere a word is what stands between spaces; a Chinese or Thai text is not one word, and has distinct n-grams."""
    english = [json.loads(line)["completion"] for line in open(ROOT / "assets/data/validation.jsonl", encoding="utf-8")]
    for text in [*english, "Он был рад, «очень» рад.", "صباح الخير", "a\u00a0b\u2003c\n\td\x1ee", "😀 good-day", " ", ""]:
        assert split_words(text) == text.split()
    assert split_words("今天 very好!\u3000ok。") == ["今", "天", "very", "好", "!", "ok", "。"]
    assert split_words("สวัสดี") == list("สวัสดี") and split_words("すごい") == list("すごい")
    answers = [{"response": "好好学习天天向上", "length": 8, "ended": True, "kl": None}]
    found = describe_texts(answers, [], resample_prompts(range(1), 1))
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (6 / 8, 1.0, 1.0)


def test_rouge_is_that_of_the_library():
    texts, references = [" She was happy there.", " It rains"], [" She is happy.", " it rained all day"]
    found = describe_texts([{"response": text, "length": 3, "ended": True, "kl": None} for text in texts], references,
                           resample_prompts(range(2), 1))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = np.mean([scorer.score(reference, text)[name].fmeasure for reference, text in zip(references, texts)])
        assert found[name] == pytest.approx(expected)
    assert found["rouge1"] > found["rouge2"]


# ---- Samples ----------------------------------------------------------------------------------------------

EOS, PAD = 0, 1  # of the tokenizer in assets/base


def exchange_words(file):
    """Two words of a tokenizer.json change their ids."""
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {"Ġthe": vocabulary["Ġto"], "Ġto": vocabulary["Ġthe"]}
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny random language models, a reward model with other ids and a mean, prompts with references and groups."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "base")
    learned = GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.15,
                         pad_token_id=PAD, eos_token_id=EOS, num_labels=1)  # sees where padding ends, as "two" does not
    rotary = tiny_config(vocab_size=1000, initializer_range=0.15, pad_token_id=PAD)
    for seed, (name, kind, config) in enumerate((
            ("one", GPT2LMHeadModel, learned), ("two", GPTNeoXForCausalLM, rotary),
            ("rm", GPT2ForSequenceClassification, learned))):
        torch.manual_seed(seed)
        if name == "rm":
            config.reward_mean = 0.75
        model = kind(config)
        if name != "rm":  # one token in sixteen ends a response
            model.generation_config.eos_token_id = list(range(0, 1000, 16))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    exchange_words(folder / "rm" / "tokenizer.json")
    lines = (ROOT / "assets/data/validation.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join(lines[:40]) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder / "one"), "--models")


def make_args(folder, **changes):
    return evaluate.Args(**{**dict(
        models=(str(folder / "one"), str(folder / "two")), prompts=str(folder / "prompts.jsonl"), response_length=8,
        ref_model=str(folder / "one"), judges=(str(folder / "rm"), "assets.vader:compound"), temperature=0.8,
        micro_batch_size=7, cache=str(folder / "cache")), **changes})


def prompts_of(folder, tokenizer, count=12):
    return [tokenizer(row["prompt"]).input_ids for row in read_rows(folder / "prompts.jsonl")[:count]]


@pytest.mark.parametrize("micro_batch_size", [1, 5, 12])
def test_greedy_responses_equal_generate_row_by_row(folder, tokenizer, micro_batch_size):
    """Batches, padding and order change nothing: each response is what generate gives its prompt alone."""
    model = load_causal_lm(str(folder / "one"), "--models", tokenizer).eval()
    sequences = prompts_of(folder, tokenizer)
    assert len({len(ids) for ids in sequences}) > 1
    found = evaluate.generate_responses(model, sequences, tokenizer, make_args(
        folder, greedy=True, micro_batch_size=micro_batch_size), "cpu")
    endings = set(range(0, 1000, 16))
    for ids, answer in zip(sequences, found):
        output = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=8,
            eos_token_id=sorted(endings), pad_token_id=PAD)[0, len(ids) :].tolist()
        assert answer["tokens"] == output and answer["length"] == len(output)
        assert answer["ended"] == (output[-1] in endings)
        assert answer["response"] == tokenizer.decode(output, skip_special_tokens=True)
    assert {answer["ended"] for answer in found} == {True, False}


def test_samples_follow_the_tempered_softmax(folder, tokenizer):
    """First tokens of 3,000 samples of one prompt have the frequencies of softmax(logits / temperature); no top-k."""
    model = load_causal_lm(str(folder / "one"), "--models", tokenizer).eval()
    ids = prompts_of(folder, tokenizer)[0]
    args = make_args(folder, response_length=1, micro_batch_size=1000, temperature=0.5)
    found = evaluate.generate_responses(model, [ids] * 3000, tokenizer, args, "cpu")
    counts = np.bincount([answer["tokens"][0] for answer in found], minlength=1000)
    with torch.no_grad():
        p = (model(torch.tensor([ids])).logits[0, -1] / 0.5).softmax(-1).numpy()
    often = p * 3000 > 5
    assert (counts > 0).sum() > 60 and often.sum() > 20
    assert ((counts - 3000 * p)[often] ** 2 / (3000 * p)[often]).sum() < 2 * often.sum()


@pytest.mark.parametrize("micro_batch_size", [1, 5, 12])
def test_detail_e26_logprobs_equal_a_loop_over_tokens(folder, tokenizer, micro_batch_size):
    """Sums over the response's own tokens, EOS included, at the sampling temperature, in any batch."""
    model = load_causal_lm(str(folder / "one"), "--models", tokenizer).eval()
    args, sequences = make_args(folder, micro_batch_size=micro_batch_size), prompts_of(folder, tokenizer)
    answers = evaluate.generate_responses(model, sequences, tokenizer, args, "cpu")
    assert len({answer["length"] for answer in answers}) > 2
    found = evaluate.sequence_logprobs(model, sequences, answers, args, "cpu")
    for ids, answer, value in zip(sequences, answers, found):
        expected = 0.0
        for t, token in enumerate(answer["tokens"]):
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer["tokens"][:t]])).logits[0, -1] / 0.8
            expected += logits.log_softmax(-1)[token].item()
        assert value == pytest.approx(expected, abs=1e-4)


def test_detail_e26_mean_log_ratio_is_the_kl(folder, tokenizer):
    """One-token responses: the mean over samples comes to the exact KL between the two tempered softmaxes."""
    one, two = (load_causal_lm(str(folder / name), "--models", tokenizer).eval() for name in ("one", "two"))
    ids = prompts_of(folder, tokenizer)[0]
    args = make_args(folder, response_length=1, micro_batch_size=1000, temperature=1.5)
    with torch.no_grad():
        p, q = ((model(torch.tensor([ids])).logits[0, -1] / 1.5).log_softmax(-1) for model in (one, two))
    answers = evaluate.generate_responses(one, [ids] * 4000, tokenizer, args, "cpu")
    ratios = np.subtract(*(evaluate.sequence_logprobs(model, [ids] * 4000, answers, args, "cpu")
                           for model in (one, two)))
    assert ratios.mean() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=4 * ratios.std() / 4000**0.5)
    assert ratios.std() / 4000**0.5 < 0.05 * ratios.mean()


def test_models_share_their_noise_and_the_seed_decides_it(folder, tokenizer):
    """What was sampled before does not matter; another seed gives other samples."""
    model, sequences = load_causal_lm(str(folder / "one"), "--models", tokenizer).eval(), prompts_of(folder, tokenizer)
    first, again, other = (evaluate.generate_responses(model, sequences, tokenizer, make_args(folder, seed=seed), "cpu")
                           for seed in (1, 1, 2))
    assert first == again != other


# ---- Judges -----------------------------------------------------------------------------------------------


def test_reward_scores_equal_those_of_reward_model_py(folder, tokenizer, capsys):
    """The same numbers as reward_model.py gives the same texts with EOS, its constant subtracted, in any batch; a text
    beyond the model's positions is refused."""
    rows = read_rows(folder / "prompts.jsonl")[:12]
    prompts, responses = ([row[key] for row in rows] for key in ("prompt", "completion"))
    responses[3] = ""
    classifier = load_classifier(str(folder / "rm"), "--judges", tokenizer).eval()
    ids, mask = pad([reward_model.encode(*pair, tokenizer) for pair in zip(prompts, responses)], PAD, "right")
    with torch.no_grad():
        expected = reward_model.at_last_token(reward_model.ScalarModel(classifier)(ids, mask), mask).tolist()
    for size in (1, 5, 12):
        found = evaluate.reward_scores(classifier, tokenizer, "--judges rm", prompts, responses,
                                       make_args(folder, micro_batch_size=size), "cpu")
        assert found == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.01
    classifier.config.terminator_token_id = 322  # [E29] trained at another token
    with torch.no_grad():
        ids[torch.arange(12), mask.sum(1) - 1] = 322
        expected = reward_model.at_last_token(reward_model.ScalarModel(classifier)(ids, mask), mask).tolist()
    found = evaluate.reward_scores(classifier, tokenizer, "--judges rm", prompts, responses, make_args(folder), "cpu")
    assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(SystemExit):
        evaluate.reward_scores(classifier, tokenizer, "--judges rm", ["a", "a " * 127], [" b", " b"], make_args(folder),
                               "cpu")
    assert "--judges" in (error := capsys.readouterr().err) and "128 positions" in error


class Judge(BaseHTTPRequestHandler):
    """A chat server whose letter is what `rule` says of the two texts shown; None: words without a letter."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        self.server.asked.append(question)
        if self.server.left == 0:
            self.send_error(503)
            return
        self.server.left -= 1
        first, second = (question.partition(f"[{side}]")[2].partition(f"[/{side}]")[0] for side in "AB")
        letter = self.server.rule(first, second)
        text = f"Comparison: they differ.\nPreferred: {letter}" if letter else "I would rather not say."
        answer = json.dumps({"choices": [{"message": {"content": text}}],
                             "usage": {"prompt_tokens": 7, "completion_tokens": 3}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """Starts a chat server with a rule; returns it and the flags that ask it."""
    running = []

    def start(rule, left=10**9):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
        server.rule, server.asked, server.left = rule, [], left
        server.handle_error = lambda *_: None  # a client that has gone
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        (tmp_path / "template.txt").write_text("To {prompt}: [A]{a}[/A] or [B]{b}[/B]?")
        return server, dict(judge_model="chat", judge_template=str(tmp_path / "template.txt"),
                            url=f"http://127.0.0.1:{server.server_port}/v1")

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def longer(first, second):
    return "A" if len(first) > len(second) else "B"


def characters(queries, responses):
    """The rule above as a Python judge."""
    return [len(response) for response in responses]


def run(folder, out, **changes):
    evaluate.main(make_args(folder, output_dir=str(out), **changes))
    return json.loads((out / "summary.json").read_text())


def test_a_server_judges_as_the_function_with_its_rule(folder, tmp_path, server, monkeypatch):
    """Verdicts of a server, both orders undone, are those of a Python function of the same texts; ties aside."""
    monkeypatch.setitem(__import__("sys").modules, "rules", SimpleNamespace(characters=characters))
    started, flags = server(longer)
    judges = "rules:characters", flags.pop("url")
    results = run(folder, tmp_path / "out", judges=judges, **flags)
    by_judge = {judge: [row for row in results["comparisons"] if row["judge"] == judge]
                for judge in ("rules:characters", "chat")}
    assert len(by_judge["chat"]) == 3
    for function, chat in zip(*by_judge.values()):
        assert (function["a"], function["b"]) == (chat["a"], chat["b"])
        for key in ("prompts", "dropped", "win", "tie", "lose", "win_rate", "low", "high", "length_controlled",
                    "by_length"):
            assert chat[key] == function[key], key
        assert chat["position_bias"] == function["tie"] and "position_bias" not in function
    assert all(row["agreement"] == 1.0 for row in results["agreement"])
    pairs = {(row["prompt"], row["response"]) for row in read_rows(tmp_path / "out" / "samples.jsonl")}
    for question in started.asked[1:]:  # the first one is a trial
        prompt, _, rest = question.removeprefix("To ").partition(": [A]")
        first, _, second = rest.removesuffix("[/B]?").partition("[/A] or [B]")
        assert {(prompt, first), (prompt, second)} <= pairs
    assert len(set(started.asked)) == len(started.asked)


def test_a_server_that_prefers_the_first_or_says_nothing(folder, tmp_path, server):
    """Position bias turns into ties, not into wins; a reply without a letter drops the prompt and is counted."""
    _, flags = server(lambda first, second: "A")
    results = run(folder, tmp_path / "first", judges=(flags.pop("url"),), **flags)
    for row in results["comparisons"]:
        assert (row["tie"], row["win_rate"], row["position_bias"], row["first"]) == (1.0, 0.5, 1.0, 1.0)
    _, flags = server(lambda first, second: None if "e" in first else longer(first, second))
    results = run(folder, tmp_path / "silent", judges=(flags.pop("url"),), **flags)
    answers = {}
    for row in read_rows(tmp_path / "silent" / "samples.jsonl"):
        answers.setdefault(row["model"], []).append(row["response"])
    for row in results["comparisons"]:
        silent = sum("e" in x or "e" in y for x, y in zip(answers[row["a"]], answers[row["b"]]))
        assert row["dropped"] == silent > 0 and row["prompts"] == 40 - silent


def test_a_server_that_dies_loses_no_answer(folder, tmp_path, server, capsys, monkeypatch):
    """50 answers, then 503s: one line that says so; the same command again asks only what is missing."""
    monkeypatch.setattr("utils.judge.FIRST_DELAY", 0.001)
    monkeypatch.setattr("utils.judge.LONGEST_DELAY", 0.002)
    started, flags = server(longer, left=50)
    flags |= dict(judges=(flags.pop("url"),), cache=str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", **flags)
    error = capsys.readouterr().err
    assert error.startswith("error: --judges") and error.count("\n") == 1 and "503" in error and "again" in error
    assert not (tmp_path / "out" / "summary.json").exists()
    answered, started.left = set(started.asked[:50]), 10**9
    started.asked.clear()
    monkeypatch.setattr(evaluate, "generate_responses", None)  # the samples are not made again either
    run(folder, tmp_path / "out", **flags)
    assert not answered & set(started.asked)
    assert len(set(started.asked)) == 241 - 50


def test_the_estimate_comes_before_the_questions_and_a_budget_stops(folder, tmp_path, server, capsys):
    """With prices the cost is printed before the first question; above --judge_budget nothing is asked."""
    started, flags = server(longer)
    flags |= dict(judges=(flags.pop("url"),), judge_prices=(1000.0, 2000.0), cache=str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", judge_budget=1.0, **flags)
    captured = capsys.readouterr()
    assert "--judge_budget" in captured.err and len(started.asked) == 1  # the trial
    assert "240 questions" in captured.out and "$" in captured.out
    run(folder, tmp_path / "out", judge_budget=1000.0, overwrite=True, **flags)
    assert len(started.asked) == 241


# ---- Runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder):
    """One run with both kinds of scoring judges, and what it printed."""
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = run(folder, folder / "finished", group_by=("novel",))
    return results, read_rows(folder / "finished" / "samples.jsonl"), printed.getvalue()


def test_a_run_writes_what_it_promises(folder, finished, tmp_path, monkeypatch):
    """Every file, the page with every sample and verdict; summary.json comes last, so that it means: complete."""
    written = {file.name for file in (folder / "finished").iterdir()}
    assert {"report.html", "table.md", "samples.jsonl", "summary.json", "args.json", "win_rates.png"} <= written
    page = (folder / "finished" / "report.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    data = json.loads(page)
    assert [row["cells"][1]["text"] for row in data["rows"]] == [
        row["response"] for row in finished[1] if row["model"] == "two"]
    assert [(row["judge"], row["a"], row["b"], np.mean(row["a_wins"])) for row in data["verdicts"]] == [
        (row["judge"], row["a"], row["b"], row["win_rate"]) for row in finished[0]["comparisons"]]
    monkeypatch.setattr("utils.report.write_page", None)
    with pytest.raises(TypeError):
        run(folder, tmp_path / "out", models=(str(folder / "two"),), judges=())
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_figures_of_a_run_follow_from_its_samples(folder, finished):
    """Win rates, lengths, KL and scores are recomputed from samples.jsonl; the model is as near to itself as can be."""
    results, samples, printed = finished
    rows = read_rows(folder / "prompts.jsonl")
    assert [(row["prompt_index"], row["prompt"], row["groups"]) for row in samples[::3]] == [
        (i, row["prompt"], {"novel": row["novel"]}) for i, row in enumerate(rows)]
    assert {str(row["ended"]) for row in samples} == {"True", "False", "None"}
    weights = resample_prompts([row["prompt"] for row in rows], 1)
    by_model = {name: [row for row in samples if row["model"] == name] for name in ("one", "two", "references")}
    assert [row["response"] for row in by_model["references"]] == [row["completion"] for row in rows]
    tokenizer = load_tokenizer(str(folder / "rm"), "--judges")
    classifier = load_classifier(str(folder / "rm"), "--judges", tokenizer).eval()
    texts = zip(*((row["prompt"], row["response"]) for row in by_model["references"]))
    scores = evaluate.reward_scores(classifier, tokenizer, "--judges rm", *texts, make_args(folder), "cpu")
    assert [row["scores"]["rm"] for row in by_model["references"]] == pytest.approx(scores, abs=1e-5)
    assert len(results["comparisons"]) == 6 and len(samples) == 120
    for row in results["comparisons"]:
        pairs = list(zip(*([sample["scores"][row["judge"]] for sample in by_model[row[side]]] for side in "ab")))
        masks = {f"novel={novel}": np.array([other["novel"] == novel for other in rows])
                 for novel in {other["novel"] for other in rows}}
        a_wins = np.array([(a > b) + (a == b) / 2 for a, b in pairs])
        lengths = (np.array([sample["length"] for sample in by_model[row[side]]]) for side in "ab")
        assert row == {**row, **compare(a_wins, *lengths, masks, weights)}
        assert ("{judge}: {a} against {b} wins {win_rate:.3f} [{low:.3f}, {high:.3f}], at equal length "
                "{length_controlled:.3f}\n").format(**row) in printed
    for name, found in results["models"].items():
        assert found["length"] == pytest.approx(np.mean([row["length"] for row in by_model[name]]))
        for judge, score in found["scores"].items():
            assert score == interval("mean", [row["scores"][judge] for row in by_model[name]], weights)
    models = results["models"]
    assert models["one"]["kl"] == 0 and models["two"]["kl"] > 1 and models["references"]["kl"] is None
    kl = [models["two"][key] for key in ("kl", "kl_low", "kl_high")]
    assert kl == list(interval("kl", [row["kl"] for row in by_model["two"]], weights).values())
    assert results["command"] == "python " + shlex.join(sys.argv) and results["prompts"] == 40
    assert [models[name]["path"] for name in by_model] == [str(folder / "one"), str(folder / "two"), None]
    assert models["references"]["rouge1"] is None and models["one"]["rouge1"] >= 0


def test_calibration_and_agreement_of_a_run(finished):
    """The reward model is set against the other judge's verdicts, pair by pair, without its ties."""
    results, samples, _ = finished
    scores = {name: [row["scores"] for row in samples if row["model"] == name] for name in ("one", "two", "references")}
    for row in results["calibration"]:
        assert (row["judge"], row["by"]) == ("rm", "vader:compound")
        gold, proxy = ([a[judge] - b[judge] for a, b in zip(scores[row["a"]], scores[row["b"]])]
                       for judge in ("vader:compound", "rm"))
        decided = [(g, p) for g, p in zip(gold, proxy) if g]
        assert row["bins"] == reward_model.calibration([p * np.sign(g) for g, p in decided], [0] * len(decided))
        agreed = next(found for found in results["agreement"] if (found["a"], found["b"]) == (row["a"], row["b"]))
        assert agreed["prompts"] == len(decided)
        assert agreed["agreement"] == pytest.approx(np.mean([g * p > 0 for g, p in decided]))
    assert len(results["calibration"]) == len(results["agreement"]) == 3


def test_a_second_run_takes_its_samples_from_the_cache(folder, finished, tmp_path, monkeypatch):
    """The same figures, without sampling; whatever else decides a sample samples anew."""
    results, samples, _ = finished
    monkeypatch.setattr(evaluate, "generate_responses", lambda *_: pytest.fail("sampled again"))
    again = run(folder, tmp_path / "again", group_by=("novel",))
    assert {**again, "command": ""} == {**results, "command": ""}
    assert read_rows(tmp_path / "again" / "samples.jsonl") == samples
    shutil.copytree(folder / "one", tmp_path / "one")
    (tmp_path / "one/generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    for number, changes in enumerate((
            dict(seed=2), dict(temperature=0.9), dict(response_length=9), dict(greedy=True), dict(micro_batch_size=8),
            dict(num_prompts=39), dict(models=(str(tmp_path / "one"),)))):
        with pytest.raises(pytest.fail.Exception):
            run(folder, tmp_path / f"other{number}", **changes)


def test_responses_in_a_file_are_a_model(folder, finished, tmp_path):
    """The references as a file tie with the references; lengths are those of the texts with EOS; there is no KL."""
    rows = read_rows(folder / "prompts.jsonl")
    file = write_rows(tmp_path / "people.jsonl", [
        {"prompt": row["prompt"], "response": row["completion"]} for row in rows])
    results = run(folder, tmp_path / "out", models=(str(folder / "one"), file))
    row = next(row for row in results["comparisons"] if (row["a"], row["b"]) == ("people", "references"))
    assert row["tie"] == 1.0 and row["longer"] == 0.5 and results["models"]["people"]["kl"] is None
    assert results["models"]["people"]["length"] == results["models"]["references"]["length"] > 5
    tokenizer = load_tokenizer(str(folder / "one"), "--models")
    ids = [tokenizer(row["completion"], add_special_tokens=False).input_ids for row in rows]
    lengths = [len(some) + (some[-1] % 16 != 0) for some in ids]  # a text that ends with an end has no other
    assert results["models"]["people"]["length"] == pytest.approx(np.mean(lengths))
    rows = [row for row in finished[1][:5] + finished[1] if row["model"] == "two"]  # one more than is needed
    samples = write_rows(tmp_path / "mine.jsonl", rows)
    again = run(folder, tmp_path / "mine", models=(samples,))  # an evaluation's own samples, as the docs say
    assert again["models"]["mine"]["scores"] == finished[0]["models"]["two"]["scores"]


def test_lengths_of_given_texts(folder, tokenizer):
    """EOS counts, but for a text that is known to have been cut; no text has length 0, which has no logarithm."""
    plain = len(tokenizer(" she said").input_ids)
    lengths = [as_answer("It was", text, tokenizer, ended)["length"] for text in (" she said", "")
               for ended in (None, True, False)]
    assert lengths == [plain + 1, plain + 1, plain, 1, 1, 1]


def test_responses_in_a_csv_file(folder, tmp_path):
    """Every kind of data file is a file of responses, not a model folder, and is named without its ending."""
    rows = ["prompt,response", *(json.dumps(row["prompt"]) + ", yes" for row in read_rows(folder / "prompts.jsonl"))]
    (tmp_path / "people.csv").write_text("\n".join(rows))
    results = run(folder, tmp_path / "out", models=(str(tmp_path / "people.csv"),), judges=())
    assert set(results["models"]) == {"people", "references"}


def test_a_complete_evaluation_is_not_done_again_over_itself(folder, tmp_path, capsys):
    """Only one that was cut off is: with a summary.json there the same command is refused and nothing changes."""
    for _ in range(2):
        with pytest.raises(SystemExit) if (tmp_path / "out").exists() else contextlib.nullcontext():
            run(folder, tmp_path / "out", judges=(), pairs="references")
    assert "in use" in capsys.readouterr().err and (tmp_path / "out" / "summary.json").exists()


def test_prompts_without_references(folder, tmp_path):
    """Models are then compared with each other alone, and there is no ROUGE; one model alone has no comparison."""
    rows = [{"prompt": row["prompt"]} for row in read_rows(folder / "prompts.jsonl")]
    prompts = write_rows(tmp_path / "bare.jsonl", rows)
    results = run(folder, tmp_path / "out", prompts=prompts)
    assert [(row["a"], row["b"]) for row in results["comparisons"]] == [("one", "two")] * 2
    assert "references" not in results["models"] and results["models"]["one"]["rouge1"] is None
    alone = run(folder, tmp_path / "alone", prompts=prompts, models=(str(folder / "two"),))
    assert alone["comparisons"] == [] and alone["models"]["two"]["scores"]["rm"]["mean"] is not None


def test_pairs_references_and_no_judge(folder, tmp_path):
    """--pairs references leaves out the models' own matches; without a judge there are texts and KL alone."""
    results = run(folder, tmp_path / "out", pairs="references", judges=("assets.vader:compound", str(folder / "rm")))
    assert [(row["judge"], row["by"]) for row in results["calibration"]] == [("rm", "vader:compound")] * 2
    assert {(row["a"], row["b"]) for row in results["comparisons"]} == {("one", "references"), ("two", "references")}
    bare = run(folder, tmp_path / "bare", judges=())
    assert bare["comparisons"] == [] and bare["models"]["two"]["kl"] > 0 and (tmp_path / "bare/report.html").exists()


def test_greedy_has_no_kl(folder, tmp_path):
    results = run(folder, tmp_path / "out", greedy=True)
    assert results["models"]["two"]["kl"] is None and results["reference_model"] == str(folder / "one")


def test_models_of_one_name_are_named_by_their_paths(folder, tmp_path):
    """runs/a/policy and runs/b/policy stay apart, in the samples too, and c/references from the references."""
    paths = tuple(str(tmp_path / name) for name in ("a/policy", "b/policy", "c/references"))
    for source, path in zip(("one", "two", "two"), paths):
        shutil.copytree(folder / source, path)
    results = run(folder, tmp_path / "out", models=paths)
    assert list(short_names(["references", "a/references"], "references")) == [str(ROOT / "references"), "a/references"]
    assert set(results["models"]) == {*paths, "references"}
    assert {row["model"] for row in read_rows(tmp_path / "out" / "samples.jsonl")} == {*paths, "references"}


def test_the_first_prompts_that_are_short_enough(folder, tmp_path, tokenizer, capsys):
    """--num_prompts counts what is left, the limit itself included; a prompt that stands twice is drawn as one."""
    rows = read_rows(folder / "prompts.jsonl")
    rows = [{**rows[0], "prompt": "word " * 30}, {**rows[2], "year": 1813}, {**rows[0], "prompt": ""}, *rows[2:0:-1],
            *rows[3:20]]
    limit = max(len(tokenizer(row["prompt"]).input_ids) for row in rows[1:])
    results = run(folder, tmp_path / "out", prompts=write_rows(tmp_path / "rows.jsonl", rows), num_prompts=12, seed=5,
                  max_prompt_length=limit, group_by=("year",), models=(str(folder / "two"),))
    assert f"(dropped: 1 over {limit} tokens, 1 empty)" in capsys.readouterr().out
    samples = [row for row in read_rows(tmp_path / "out" / "samples.jsonl") if row["model"] == "references"]
    expected = [row["prompt"] for row in rows[1:14] if row["prompt"]]
    assert [row["prompt"] for row in samples] == expected and results["prompts"] == 12
    assert [row["prompts"] for row in results["comparisons"][0]["groups"].values()] == [1, 11]  # 1813, None
    scores = [row["scores"]["rm"] for row in samples]
    assert results["models"]["references"]["scores"]["rm"] == interval("mean", scores, resample_prompts(expected, 5))


def test_bf16_reaches_every_model(folder, finished, tmp_path):
    """A policy in bf16 is its own reference in bf16; the reward model's scores are nearly those in fp32."""
    found = run(folder, tmp_path / "out", bf16=True, models=(str(folder / "one"),))["models"]
    scores, others = (models["references"]["scores"]["rm"]["mean"] for models in (found, finished[0]["models"]))
    assert found["one"]["kl"] == 0 and scores != others and scores == pytest.approx(others, abs=0.05)


def test_every_judge_flag_reaches_the_server(tmp_path, monkeypatch):
    """Free answers and a budget of nothing are understood."""
    monkeypatch.setattr("utils.judge.check", lambda *_: None)
    (tmp_path / "template.txt").write_text("{a} or {b}")
    args = evaluate.Args(judge_model="m", judge_template=str(tmp_path / "template.txt"), judge_options='{"x": 1}',
                         judge_timeout=3.0, judge_requests_per_minute=4.0, judge_parallel=5, judge_prices=(7.0, 0.0),
                         judge_budget=0.0, cache="c")
    assert connect("http://h", args) == Server("http://h", "m", "{a} or {b}", {"x": 1}, 3.0, 5, 4.0, 5, (7.0, 0.0), "c")


def test_a_word_before_and_after_the_questions(tmp_path, monkeypatch, capsys):
    """What the questions may cost, and what became of them; a budget holds exactly, one of 0 too."""
    tally = {"asked": 5, "refused": 1, "unanswered": 2, "input_tokens": 30, "output_tokens": 4, "message": "HTTP 400"}
    monkeypatch.setattr("utils.judge.ask", lambda *_: (["A"], tally))
    server = Server("http://h/v1", "m", prices=(1e6, 0.0), cache=str(tmp_path))
    assert ask_within_budget(server, ["x" * 40], 10.0) == {"x" * 40: "A"}
    found = capsys.readouterr().out
    assert "1 questions (0 more" in found and "10 tokens and up to 200 of replies, roughly $10.00 or less\n" in found
    assert "5 asked, 1 refused, 2 without an answer; 30 tokens and 4 of answers; the first one refused or" in found
    with pytest.raises(SystemExit):
        ask_within_budget(server, ["x" * 40], 0.0)
    assert "may cost $10.00. Raise it, or ask less: --num_prompts, --pairs" in capsys.readouterr().err


def test_equal_responses_tie_and_nobody_is_asked(folder, tmp_path, server):
    """Two copies of a model: a tie everywhere, no position bias, and questions about the references alone."""
    started, flags = server(longer)
    shutil.copytree(folder / "one", tmp_path / "copy")
    results = run(folder, tmp_path / "out", models=(str(folder / "one"), str(tmp_path / "copy")),
                  judges=(flags.pop("url"),), cache=str(tmp_path / "cache"), **flags)
    row = results["comparisons"][-1]
    assert (row["a"], row["b"], row["tie"], row["position_bias"], row["first"]) == ("one", "copy", 1.0, None, None)
    assert len(started.asked) == 81  # a trial, and 40 pairs in two orders that both copies share


def test_equal_responses_tie_for_a_reward_model_that_rounds(folder, tmp_path, monkeypatch):
    """The last bit of a score depends on the batch: of one text it must not make a winner."""
    scores = evaluate.reward_scores
    noise = iter(GENERATOR.normal(0, 1e-6, (9, 40)))
    monkeypatch.setattr(evaluate, "reward_scores", lambda *arguments: scores(*arguments) + next(noise))
    shutil.copytree(folder / "one", tmp_path / "copy")
    results = run(folder, tmp_path / "out", models=(str(folder / "one"), str(tmp_path / "copy")))
    ties = {(row["judge"], row["b"]): row["tie"] for row in results["comparisons"]}
    assert ties["rm", "copy"] == ties["vader:compound", "copy"] == 1.0 and ties["rm", "references"] < 0.1


def test_every_verdict_is_kept_with_what_was_said(folder, tmp_path, server):
    """verdicts.jsonl has one row for each judge, pair and prompt; a server's rows have its replies in both orders."""
    _, flags = server(lambda first, second: None if "e" in first else longer(first, second))
    results = run(folder, tmp_path / "out", judges=(flags.pop("url"), "assets.vader:compound"), **flags)
    verdicts = read_rows(tmp_path / "out" / "verdicts.jsonl")
    assert len(verdicts) == 2 * 3 * 40
    for found in results["comparisons"]:
        mine = [row for row in verdicts if all(row[key] == found[key] for key in ("judge", "a", "b"))]
        assert [row["prompt_index"] for row in mine] == list(range(40))
        assert np.mean([row["a_wins"] for row in mine if row["a_wins"] is not None]) == pytest.approx(found["win_rate"])
        for row in mine:
            assert ("replies" in row) == (row["judge"] == "chat")
            if row["judge"] == "chat" and row["replies"]:
                silent = any(reply == "I would rather not say." for reply in row["replies"])
                assert len(row["replies"]) == 2 and silent == (row["a_wins"] is None)


def test_each_model_ends_with_its_own_eos(folder, tmp_path):
    """A tokenizer that ends with another token of the same vocabulary: that token ends its model's responses."""
    copy = shutil.copytree(folder / "one", tmp_path / "own")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(copy)
    config["eos_token"] = tokenizer.convert_ids_to_tokens(300)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").write_text("{}")
    run(folder, tmp_path / "out", models=(str(folder / "two"), str(copy)), cache=str(tmp_path / "cache"))
    assert load_tokenizer(str(copy), "--models").eos_token_id == 300
    ends = {}
    for file in (tmp_path / "cache").glob("samples_*.npz"):
        answers = json.loads(str(np.load(file)["array"]))
        ends[len(ends)] = {answer["tokens"][-1] for answer in answers if answer["ended"]}
    assert any(found <= {300} for found in ends.values()) and any(found - {300} for found in ends.values())


def test_one_model_without_references_is_told_so(folder, tmp_path, capsys):
    rows = [{"prompt": row["prompt"]} for row in read_rows(folder / "prompts.jsonl")]
    run(folder, tmp_path / "out", prompts=write_rows(tmp_path / "bare.jsonl", rows), models=(str(folder / "two"),))
    assert "nothing to compare" in capsys.readouterr().out


def test_a_folder_that_another_run_took_meanwhile_is_left_alone(folder, tmp_path, monkeypatch, capsys):
    """Between the choice of the folder and its making another evaluation begins there: this one ends in a line."""
    def load_and_be_late(*arguments):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "args.json").write_text('{"script": "evaluate", "seed": 7}')
        return load_causal_lm(*arguments)

    monkeypatch.setattr(evaluate, "load_causal_lm", load_and_be_late)
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out")
    assert "no longer empty" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "args.json").read_text())["seed"] == 7


# ---- Bad input --------------------------------------------------------------------------------------------


@pytest.fixture
def refused(folder, tmp_path, capsys):
    """A function that evaluates with these changes, which must end in one line before anything is written."""

    def run(**changes):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(make_args(folder, **{"output_dir": str(tmp_path / "out"), **changes}))
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
        return error

    return run


def test_a_checkpoint_whose_tokenizer_differs_is_refused(folder, tmp_path, refused):
    """It is named with both folders and the way round: its own evaluation, whose samples are then given as a file."""
    path = str(shutil.copytree(folder / "two", tmp_path / "other"))
    exchange_words(tmp_path / "other" / "tokenizer.json")
    error = refused(models=(str(folder / "one"), path))
    assert f"--models {path}: its tokenizer has another vocabulary than that of {folder / 'one'}" in error
    assert "samples.jsonl" in error
    error = refused(models=(path,))
    assert f"--ref_model {folder / 'one'}: its tokenizer has another vocabulary" in error and "None" in error
    alone = run(folder, tmp_path / "alone", models=(path,), ref_model=None)
    assert alone["models"]["other"]["kl"] is None and alone["reference_model"] is None
    samples = str(tmp_path / "alone" / "samples.jsonl")
    both = run(folder, tmp_path / "both", models=(str(folder / "one"), samples))
    assert both["models"]["samples"]["scores"] == alone["models"]["other"]["scores"]
    assert both["models"]["samples"]["ended"] == alone["models"]["other"]["ended"]


def test_a_model_with_too_few_positions_is_refused_first(folder, tmp_path, refused):
    """Prompt and response together must fit, of every model and of the reference."""
    file = shutil.copytree(folder / "two", tmp_path / "two") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 39}))
    for changes in (dict(models=(str(file.parent),)), dict(ref_model=str(file.parent))):
        assert "--max_prompt_length + --response_length = 40 tokens, but the model has 39" in refused(**changes)


def test_a_cache_or_judge_that_cannot_be_is_named_first(tmp_path, refused):
    (tmp_path / "file").write_text("")
    assert "--cache" in refused(cache=str(tmp_path / "file"))
    assert "module:function, or the URL" in refused(judges=("gone",))
    assert "no such folder" not in refused(judges=("owner/name",))  # a Hub id, here without a network


@pytest.mark.parametrize("change, words", [
    (lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"), "another chat template"),
    (lambda tokenizer: setattr(tokenizer.backend_tokenizer, "pre_tokenizer", None), "other ids for the same text")])
def test_models_whose_prompts_would_differ_are_refused(change, words, folder, tmp_path, refused):
    """One vocabulary is not enough among models; as --ref_model such a model is welcome: its ids mean the same."""
    copy = shutil.copytree(folder / "two", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    change(tokenizer)
    tokenizer.save_pretrained(copy)
    error = refused(models=(str(folder / "one"), str(copy)))
    assert f"--models {copy}: its tokenizer has {words} than that of {folder / 'one'}" in error
    assert run(folder, tmp_path / "fine", ref_model=str(copy))["models"]["one"]["kl"] > 0


def test_a_reward_model_that_overflows_is_named(folder, tmp_path, capsys):
    """No win rate comes of infinite scores: the first such text is named."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder / "rm", tmp_path / "broken")
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"] = 3e38 * weights["score.weight"].sign()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", judges=(str(copy),))
    assert re.search("--judges broken: score -?(inf|nan) for query 'She listened'", capsys.readouterr().err)


@pytest.mark.parametrize("flags, words", [
    (dict(judge_options="{temperature: 0}"), ["--judge_options", "not JSON"]),
    (dict(judge_options="[1]"), ["--judge_options [1]", "object"]),
    (dict(judge_template="gone.txt"), ["--judge_template gone.txt", "No such file"]),
    (dict(judge_budget=0.0), ["--judge_budget 0.0", "--judge_prices"]),
    (dict(judge_prices=(2.0, -1.0)), ["--judge_prices", "at least 0"]),
    (dict(judge_requests_per_minute=0.0), ["--judge_requests_per_minute 0.0", "above 0"])])
def test_flags_of_a_server_that_make_no_sense_are_named(flags, words, server, refused):
    started, good = server(longer)
    error = refused(judges=(good.pop("url"),), **{**good, **flags})
    assert all(word in error for word in words) and not started.asked


def test_a_template_without_places_is_named(tmp_path, server, refused):
    _, flags = server(longer)
    (tmp_path / "template.txt").write_text("Which is better, {a} or b?")
    url = flags.pop("url")
    error = refused(judges=(url,), **flags)
    assert "--judge_template" in error and "{b}" in error
    (tmp_path / "template.txt").write_bytes(b"{a} or {b}? \xff")
    assert "not UTF-8 text" in refused(judges=(url,), **flags)


def test_two_servers_are_refused(server, refused):
    _, flags = server(longer)
    url = flags.pop("url")
    assert "two judges named chat" in refused(judges=(url, url.replace("127.0.0.1", "localhost")), **flags)


def test_a_server_that_is_down_or_slow_is_found_first(server, refused, monkeypatch):
    """Nothing listens, or the answer takes longer than --judge_timeout: one line, before anything is sampled."""
    import time

    monkeypatch.setattr("utils.judge.FIRST_DELAY", 0.001)
    for url in ("http://127.0.0.1:9/v1", "https://127.0.0.1:9/v1"):
        assert f"--judges {url}: no answer" in refused(judges=(url,))
    _, flags = server(lambda first, second: time.sleep(1.5) or "A")
    error = refused(judges=(flags.pop("url"),), judge_timeout=0.2, **flags)
    assert "no answer" in error and "--judge_timeout" in error


def test_a_file_of_responses_that_does_not_fit_is_named(folder, tmp_path, refused):
    """A prompt without a response, too few of them, responses of several models, a missing column."""
    rows = [{"prompt": row["prompt"], "response": " yes"} for row in read_rows(folder / "prompts.jsonl")]
    error = refused(models=(write_rows(tmp_path / "short.jsonl", rows[1:]),))
    assert "short.jsonl: 0 responses to the prompt 'She listened'" in error
    several = [{**row, "model": str(i % 2)} for i, row in enumerate(rows)]
    assert "several models (0, 1)" in refused(models=(write_rows(tmp_path / "several.jsonl", several),))
    bare = [{"prompt": row["prompt"], "text": " yes"} for row in rows]
    assert "{prompt, response}" in refused(models=(write_rows(tmp_path / "bare.jsonl", bare),))
    good = write_rows(tmp_path / "good.jsonl", rows)
    assert "--ref_model" in refused(models=(good,), ref_model=None)
    error = refused(models=(good,), prompts=write_rows(tmp_path / "twice.jsonl", rows[:3] + rows[1:2]))
    assert "1 responses to the prompt 'Darcy, though', which stands 2 times" in error


def test_a_reference_that_is_missing_in_some_rows_is_named(folder, tmp_path, refused):
    for hole in (0, 6):
        rows = read_rows(folder / "prompts.jsonl")
        del rows[hole]["completion"]
        error = refused(prompts=write_rows(tmp_path / "holes.jsonl", rows))
        assert f"holes.jsonl, row {hole + 1}: column 'completion' must be text" in error


def test_a_group_column_that_is_not_there_is_named(refused):
    error = refused(group_by=("novel", "author"))
    assert "--group_by author" in error and "completion" in error and "ids" not in error.split("columns")[1]


def test_a_function_that_fails_on_a_row_names_it_and_loses_nothing(folder, tmp_path, capsys, monkeypatch):
    """The row is named after sampling; the mended function runs on the samples that were kept."""
    def picky(queries, responses):
        return [1 / (query != "She listened" or response == " a" or response == " b")
                for query, response in zip(queries, responses)]

    rules = SimpleNamespace(picky=picky)
    monkeypatch.setitem(__import__("sys").modules, "rules", rules)
    flags = dict(judges=("rules:picky",), cache=str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", **flags)
    error = capsys.readouterr().err
    assert "--judges rules:picky: it failed (ZeroDivisionError" in error and "'She listened'" in error
    rules.picky = characters
    monkeypatch.setattr(evaluate, "generate_responses", None)
    assert run(folder, tmp_path / "out", overwrite=True, **flags)["comparisons"]
