"""ppo.py's rewards, advantages and losses, and whole runs of it on a tiny random model.

The golden example is worked by hand for three responses of five tokens: PAD 9, EOS 0, kl_coef 0.05, gamma 1, lambda 0.95.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, StubTokenizer, tiny_config
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, PreTrainedTokenizerFast

import ppo
from test_generate import biased_to
from utils.launch import create_engine, init_distributed, optimizer_step

EOS, PAD = 0, 9


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=atol, check_dtype=False)


# ---- The golden example -----------------------------------------------------------------------------------


def example(junk=(7, 8), **changes):
    """Everything that ppo.py computes between rollout and losses for the golden example, by its own functions."""
    responses = torch.tensor([[5, 6, 0, *junk], [5, 6, 7, 8, 0], [5, 6, 7, 8, 4]])
    logprobs = torch.tensor([[-1, -2, -0.5, -3, -1], [-1.0] * 5, [-2.0] * 5])
    ref_logprobs = torch.tensor([[-1.2, -1.5, -0.7, -2, -4], [-1.1] * 5, [-1, -2, -3, -2, -1.0]])
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5] * 5, [0, 0.1, 0.2, 0.3, 0.4]])
    e = SimpleNamespace(prompt_rows=None, **{**dict(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values), **changes})
    e.responses, e.lengths, e.ended = ppo.truncate_at_eos(responses, torch.tensor([EOS]), PAD)
    e.mask, e.value_mask = ppo.response_masks(e.lengths, 5)
    e.query_texts, e.response_texts = ["q"] * 3, ["r"] * 3
    e.scores = ppo.score_responses(
        None, lambda queries, texts: [1.5, 2.0, 3.0], e, SimpleNamespace(missing_eos_score=-1.0))
    e.logprobs, e.ref_logprobs = e.logprobs * e.mask, e.ref_logprobs * e.mask
    e.values = e.values * e.value_mask
    e.kl = ppo.k1(e.logprobs, e.ref_logprobs)
    e.rewards = ppo.token_rewards(e.kl, e.scores, e.lengths, 0.05)
    e.advantages, e.returns = ppo.gae(e.rewards, e.values, 1.0, 0.95)
    e.whitened = ppo.masked_whiten(e.advantages, e.mask)
    return e


def test_golden_truncation_and_masks():
    """Row 0 is cut after its EOS at 2, EOS in the last slot and no EOS cut nothing; values keep one state more (golden)."""
    e = example()
    assert e.responses.tolist() == [[5, 6, 0, 9, 9], [5, 6, 7, 8, 0], [5, 6, 7, 8, 4]]
    assert e.lengths.tolist() == [3, 5, 5] and e.ended.tolist() == [True, True, False]
    assert e.mask.int().tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1] * 5]
    close(e.values[0], [0.1, 0.2, 0.3, 0.4, 0])


def test_golden_scores():
    """The response without EOS gets exactly -1 in place of its 3.0; EOS in the last slot is not punished (golden, T27)."""
    assert example().scores.tolist() == [1.5, 2.0, -1.0]


def test_golden_rewards():
    """KL is paid at each token, the score comes one step after EOS, or at the last column (golden)."""
    close(example().rewards, [[-0.010, 0.025, -0.010, 1.5, 0], [-0.005] * 4 + [1.995], [0.05, 0, -0.05, 0, -0.95]])


def test_golden_advantages():
    """Advantages by generalised advantage estimation, before whitening (golden)."""
    close(example().advantages, [[1.233087, 1.203250, 1.135000, 1.100000, 0],
                                 [1.199137, 1.267513, 1.339487, 1.415250, 1.495000],
                                 [-0.723721, -0.919706, -1.073375, -1.182500, -1.350000]])


def test_golden_returns():
    """Returns are the unwhitened advantages plus the values (golden)."""
    close(example().returns, [[1.333087, 1.403250, 1.435000, 1.5, 0],
                              [1.699137, 1.767513, 1.839487, 1.915250, 1.995],
                              [-0.723721, -0.819706, -0.873375, -0.8825, -0.95]])


def test_golden_whitened_advantages():
    """Whitened over the tokens up to EOS only; the state after EOS has none (golden)."""
    close(example().whitened, [[0.736721, 0.710723, 0.651255, 0, 0],
                               [0.707139, 0.766717, 0.829430, 0.895444, 0.964932],
                               [-0.968298, -1.139065, -1.272961, -1.368044, -1.513992]])


def test_golden_kl_and_entropy():
    """Sequence KL -0.1, 0.5, -1.0, mean -0.2; the mean of -log p up to EOS is 6.166667, not 5.5 (golden)."""
    e = example()
    close(e.kl.sum(1), [-0.1, 0.5, -1.0])
    close(e.kl.sum(1).mean(), -0.2)
    close(-e.logprobs.sum(1).mean(), 6.166667)


def test_golden_whitened_rewards():
    """Rewards whitened over t <= e + 1 with their mean kept, 0 after (golden)."""
    e = example()
    close(ppo.masked_whiten(e.rewards, e.value_mask, shift_mean=False),
          [[-0.095355, -0.044691, -0.095355, 2.090455, 0], [-0.088118] * 4 + [2.806995],
           [-0.008502, -0.080880, -0.153258, -0.080880, -1.456058]])


def test_golden_losses():
    """At ratio 1 the policy loss of the batch is 0; the value loss at the old values is 0.724493 (golden)."""
    e = example()
    pg_losses, pg_clipped = ppo.policy_losses(e.logprobs, e.logprobs, e.whitened, 0.2)
    vf_losses, vf_clipped = ppo.value_losses(e.values, e.values, e.returns, 0.2)
    close(ppo.masked_mean(pg_losses, e.mask), 0)
    close(sum(ppo.masked_mean(pg_losses[i], e.mask[i]) for i in range(3)) / 3, -0.093275)  # means per row: not 0
    close(ppo.masked_mean(vf_losses, e.value_mask), 0.724493)
    assert pg_clipped.sum() == vf_clipped.sum() == 0


def test_junk_after_eos_changes_nothing():
    """Tokens, log-probabilities and values after EOS (after e + 1 for values) change no later quantity (T28)."""
    plain, numbers = example(), torch.tensor([-9.0, 7.0])
    changes = {name: getattr(example(), name).clone() for name in ("logprobs", "ref_logprobs", "values")}
    changes["logprobs"][0, 3:], changes["ref_logprobs"][0, 3:], changes["values"][0, 4] = numbers, -2 * numbers, 5.0
    for junk in ((0, 0), (4, 0), (9, 1)):
        other = example(junk, **changes)
        for name in ("responses", "lengths", "scores", "kl", "rewards", "advantages", "returns", "whitened"):
            assert torch.equal(getattr(other, name), getattr(plain, name)), name


# ---- KL, entropy, rewards ---------------------------------------------------------------------------------


def test_detail_32_k1_and_k3_are_unbiased():
    """In exact expectation over the policy k1 and k3 equal the KL to 1e-12, k2 does not; k3 is never negative."""
    policy, ref = (torch.randn(6, generator=torch.Generator().manual_seed(i)).double().log_softmax(0) for i in (0, 1))
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (policy, ref)))
    mean = lambda estimate: (policy.exp() * estimate).sum()
    close(mean(ppo.k1(policy, ref)), kl, 1e-12)
    close(mean(ppo.k3(policy, ref)), kl, 1e-12)
    assert abs(mean(ppo.k1(policy, ref) ** 2 / 2) - kl) > 0.01
    assert ppo.k1(policy, ref).min() < 0 <= ppo.k3(policy, ref).min()


def test_detail_32_kl_has_the_right_sign():
    """A token likelier under the policy than under the reference has KL > 0 and lowers the reward by kl_coef * KL (T24)."""
    kl = ppo.k1(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]]))
    close(kl, [[0.5, 0.0]])
    close(ppo.token_rewards(kl, torch.tensor([0.0]), torch.tensor([2]), 0.2), [[-0.1, 0.0]])


def test_detail_33_score_lands_one_step_after_eos():
    """With e the last kept token the score is added at e + 1, at e where the response fills the last column."""
    rewards = ppo.token_rewards(torch.zeros(4, 3), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 2, 3, 3]), 0.1)
    assert rewards.tolist() == [[0, 1, 0], [0, 0, 2], [0, 0, 3], [0, 0, 4]]


def test_token_entropies_equal_torchs_and_are_not_negative():
    """Entropies equal torch.distributions.Categorical's, also with forbidden tokens, and are >= 0 when certain (T38)."""
    logits = 3 * torch.randn(4, 5, 20, generator=torch.Generator().manual_seed(0))
    forbidden = torch.arange(20) >= 17
    close(ppo.token_entropies(ppo.scale_logits(logits, 0.7, forbidden)),
          torch.distributions.Categorical(logits=logits[..., :17] / (0.7 + 1e-7)).entropy(), 1e-5)
    assert ppo.token_entropies(1e3 * logits).min() >= 0
    close(ppo.token_entropies(torch.zeros(1, 1, 8)), [[torch.tensor(8.0).log()]])


def test_token_logprobs_equal_torchs():
    """Log-probabilities equal torch.distributions.Categorical's."""
    logits = 3 * torch.randn(4, 5, 20, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(1))
    close(ppo.token_logprobs(logits, tokens), torch.distributions.Categorical(logits=logits).log_prob(tokens), 1e-5)


# ---- Advantages and whitening -----------------------------------------------------------------------------


def test_detail_36_gae_equals_a_double_loop():
    """A_t = sum over s >= t of (gamma lam)^(s - t) delta_s, with no value after the end (T32)."""
    rewards, values = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).double()
    advantages, returns = ppo.gae(rewards, values, 0.9, 0.8)
    for i in range(3):
        delta = [rewards[i, t] + 0.9 * (values[i, t + 1] if t < 6 else 0) - values[i, t] for t in range(7)]
        for t in range(7):
            expected = sum((0.9 * 0.8) ** (s - t) * delta[s] for s in range(t, 7))
            close(advantages[i, t], expected, 1e-12)
            close(returns[i, t], expected + values[i, t], 1e-12)


def test_detail_36_returns_are_suffix_sums_at_gamma_and_lambda_1():
    """With gamma = lambda = 1 the return is the sum of the rewards from t on, whatever the values are (T32)."""
    rewards, values = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)).double()
    close(ppo.gae(rewards, values, 1.0, 1.0)[1], rewards.flip(1).cumsum(1).flip(1), 1e-12)


NINE = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])


def test_detail_24_whitening_keeps_the_mean():
    """1.2 ... 2.0 become .0508, .4381, .8254, ... with mean 1.6 kept: the variance is divided by N, not N - 1 (T33)."""
    whitened = ppo.masked_whiten(NINE, torch.ones(3, 3, dtype=torch.bool), shift_mean=False)
    close(whitened[0], [0.0508, 0.4381, 0.8254], 5e-5)
    close(whitened.mean(), 1.6)


def test_detail_25_whitening_gives_mean_0_and_variance_1():
    """Advantage whitening removes the mean and divides by the biased standard deviation (T33)."""
    whitened = ppo.masked_whiten(NINE, torch.ones(3, 3, dtype=torch.bool))
    close(whitened, (NINE - NINE.mean()) / NINE.std(correction=0), 1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_detail_37_masked_entries_never_influence_whitening(shift_mean):
    """Numbers outside the mask change nothing and come out as 0; more masked columns change nothing (T33, T38)."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    plain = ppo.masked_whiten(NINE, mask, shift_mean)
    assert torch.equal(ppo.masked_whiten(torch.where(mask, NINE, 1e4), mask, shift_mean), plain)
    assert (plain[~mask] == 0).all() and (plain[mask] != 0).all()
    wider = torch.cat([NINE, torch.full((3, 2), 50.0)], 1), torch.cat([mask, torch.zeros(3, 2).bool()], 1)
    close(ppo.masked_whiten(*wider, shift_mean)[:, :3], plain)


def test_masked_variance_divides_by_the_count():
    """That of numpy over the entries that count, of every epoch where there are several; others change nothing."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    close(ppo.masked_variance(torch.where(mask, NINE, 1e4), mask), NINE[mask].numpy().var(), 1e-6)
    both = torch.stack([NINE, NINE * 2])
    close(ppo.masked_variance(both, mask.expand_as(both)), both[:, mask].numpy().var(), 1e-6)


def test_masked_mean_ignores_pads():
    """The mean is taken over the entries that count, and more masked columns do not change it (T38)."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    close(ppo.masked_mean(NINE, mask), (1.2 + 1.3 + 1.5) / 3)
    wider = torch.cat([NINE, NINE], 1), torch.cat([mask, mask & False], 1)
    assert torch.equal(ppo.masked_mean(*wider), ppo.masked_mean(NINE, mask))


# ---- Losses -----------------------------------------------------------------------------------------------


def test_detail_38_policy_loss_is_clipped_against_improvement():
    """By hand: A 1, ratio 1.5 -> -1.2; A -1, 1.5 -> 1.5; A 1, 0.5 -> -0.5; A -1, 0.5 -> 0.8; ratio 1.1 unclipped (T34)."""
    ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    losses, clipped = ppo.policy_losses(ratio.log() - 2, torch.full((5,), -2.0), advantages, 0.2)
    close(losses, [-1.2, 1.5, -0.5, 0.8, -1.1])
    assert clipped.tolist() == [1, 0, 0, 1, 0]


def test_detail_38_policy_gradient_by_autograd():
    """At ratio 1 the gradient with respect to the log-probability is -A; where the clip decides it is 0 (T34)."""
    new = torch.tensor([0.0, 0.0, 0.5, -0.5], requires_grad=True)
    losses, _ = ppo.policy_losses(new, torch.zeros(4), torch.tensor([2.0, -3.0, 1.0, -1.0]), 0.2)
    losses.sum().backward()
    close(new.grad, [-2.0, 3.0, 0.0, 0.0])


def test_detail_39_value_loss_is_the_larger_of_two():
    """By hand: old 0, new 0.5, return 1 -> half of max(.25, .64); return 0 -> half of max(.25, .04) (T34)."""
    new, returns = torch.tensor([0.5, 0.5, 0.1, -0.5]), torch.tensor([1.0, 0.0, 1.0, -1.0])
    losses, clipped = ppo.value_losses(new, torch.zeros(4), returns, 0.2)
    close(losses, [0.32, 0.125, 0.405, 0.32])
    assert clipped.tolist() == [1, 0, 0, 1]


# ---- Reading scores and values ----------------------------------------------------------------------------


def test_detail_12_last_token_is_found_on_any_padding_side():
    """Left pads, right pads, both, none: the value at the last real token is read (T15)."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert ppo.at_last_token(torch.arange(16).view(4, 4), mask).tolist() == [3, 5, 10, 15]


STUB = StubTokenizer(0, 60, lambda ids: " ".join(map(str, ids)))  # the text of a token is its id


def made(queries, responses):
    """Episodes of these ids; EOS is 0, PAD is 60."""
    return ppo.Episodes([(ids, f"query {ids}", {}) for ids in queries], responses, STUB, torch.tensor([EOS]))


def test_episodes_follow_from_their_ids():
    """Cut at the first EOS; lengths, masks, texts and the ids of query and response, without PAD."""
    e = made([[5, 6], [7, EOS, 8]], torch.tensor([[4, 0, 9, 9], [1, 2, 3, 4]]))
    assert e.queries == ([5, 6], [7, 0, 8]) and e.query_texts == ("query [5, 6]", "query [7, 0, 8]")
    assert e.responses.tolist() == [[4, 0, 60, 60], [1, 2, 3, 4]]
    assert e.lengths.tolist() == [2, 4] and e.ended.tolist() == [True, False]
    assert e.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert e.value_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert e.sequences == [[5, 6, 4, 0], [7, 0, 8, 1, 2, 3, 4]]
    assert e.response_texts == [" 4 60 60", " 1 2 3 4"]  # no terminator


def test_micro_batches_put_like_lengths_together():
    """The longest rows first, rows of equal length in their order, and only the rows that are asked for."""
    e = made([[5], [5] * 4, [5] * 2, [5] * 4, [5] * 3], torch.ones(5, 2, dtype=torch.long))
    assert e.micro_batches([4, 0, 1, 3, 2], 2) == [[1, 3], [4, 2], [0]]
    assert e.micro_batches([2, 0, 3], 3) == [[3, 2, 0]]


@pytest.fixture
def scored(tiny_classifier):
    """A reward model, three padded queries (one holds an EOS) and four-token responses."""
    tiny_classifier.config.reward_mean = 0.5
    episodes = made([[5, 6], [7, EOS, 8, 9], [3]], torch.tensor([[4, 0, 9, 9], [1, 2, 3, 4], [2, 2, 5, 0]]))
    return SimpleNamespace(model=ppo.ScalarModel(tiny_classifier), classifier=tiny_classifier, episodes=episodes)


def score(s, missing_eos_score, micro_batch_size=2):
    args = SimpleNamespace(missing_eos_score=missing_eos_score, micro_batch_size=micro_batch_size)
    return ppo.score_responses(s.model, None, s.episodes, args)


def test_detail_15_scores_equal_the_classifiers_on_unpadded_rows(scored):
    """Each score is what transformers' own classifier gives for the row without padding, less reward_mean (T15, T17)."""
    rows = [[5, 6, 4, 0], [7, 0, 8, 9, 1, 2, 3, 4], [3, 2, 2, 5, 0]]
    expected = [scored.classifier(torch.tensor([row])).logits.item() - 0.5 for row in rows]
    close(score(scored, None), expected, 1e-5)
    close(score(scored, None, micro_batch_size=8), expected, 1e-5)


def test_detail_23_score_without_eos_is_replaced(scored):
    """No EOS in the response: exactly -1, though the query holds one; EOS in the last slot keeps its score (T27)."""
    kept, replaced = score(scored, None), score(scored, -1.0)
    assert replaced[1] == -1.0 != kept[1]
    assert torch.equal(replaced[[0, 2]], kept[[0, 2]])


def test_detail_e29_the_end_is_read_at_the_token_at_which_the_reward_model_was_trained(scored):
    """Whatever ended a response, the reward model reads its own terminator in that place; what is cut stays as it is."""
    scored.classifier.config.terminator_token_id = 33
    scored.model = ppo.ScalarModel(scored.classifier)
    rows = [[5, 6, 4, 33], [7, 0, 8, 9, 1, 2, 3, 4], [3, 2, 2, 5, 33]]
    close(score(scored, None), [scored.classifier(torch.tensor([row])).logits.item() - 0.5 for row in rows], 1e-5)


def test_scores_are_read_in_micro_batches_of_like_length(scored):
    """The reward model reads the longest rows first, micro_batch_size at a time, each batch as wide as its longest row."""
    shapes = []
    scored.model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    score(scored, None)
    assert shapes == [(2, 8), (1, 4)]  # rows of 8, 5 and 4 tokens


def test_left_aligned_repeats_the_last_value():
    """A row moves left by its shift; what a shorter response leaves free is its last value, never a prompt's or PAD's."""
    values, shift = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]), torch.tensor([0, 1, 3])
    assert ppo.left_aligned(values, shift, 4).tolist() == [[0, 1, 2, 3], [5, 6, 7, 7], [11, 11, 11, 11]]
    assert ppo.left_aligned(values, shift, 5)[:2].tolist() == [[0, 1, 2, 3, 3], [5, 6, 7, 7, 7]]
    assert ppo.left_aligned(values, shift, 3).tolist() == [[0, 1, 2], [5, 6, 7], [11, 11, 11]]


@torch.no_grad()
def test_detail_E20_batches_have_no_needless_padding_and_the_numbers_of_lone_rows(tiny_lm):
    """A micro-batch is as wide as its longest row, and the logits as its longest response. Log-probabilities, entropies
    and values are those of each row alone, in the columns of their tokens, and 0 where nothing counts (T36)."""
    lengths, widths, room = [2, 5, 3, 1], [4, 1, 2, 6], 6
    torch.manual_seed(0)
    queries, responses = ([torch.randint(1, 60, (n,)).tolist() for n in sizes] for sizes in (lengths, widths))
    ends = [[EOS] if width < room else [] for width in widths]  # and one that fills the last column
    responses = [response[: len(response) - len(end)] + end for response, end in zip(responses, ends)]
    e = made(queries, torch.tensor([response + [60] * (room - len(response)) for response in responses]))
    assert e.lengths.tolist() == widths
    args, forbidden, seen = SimpleNamespace(temperature=0.7, response_length=room), torch.arange(64) == 60, []
    critic = lambda ids, mask: torch.where(mask, ids, -1).float() + 1  # "the value after a token" is its id + 1

    def model(**inputs):
        out = tiny_lm(**inputs)
        seen.append(out.logits.shape[1])
        return out

    for rows, shape in (([0, 2], (6, 4)), ([3], (7, 6)), ([1, 0], (6, 4)), ([0, 1, 2, 3], (7, 6))):
        ids, attention_mask, width, shift = e.batch(rows)
        assert (ids.shape[1], width) == shape and shift.tolist() == [width - widths[i] for i in rows]
        assert [row[m].tolist() for row, m in zip(ids, attention_mask)] == [e.sequences[i] for i in rows]
        assert attention_mask[:, -1].all()
        entropies = torch.full((4, room), 7.0)
        logprobs = ppo.response_logprobs(model, e, rows, args, forbidden, entropies)
        assert torch.equal(logprobs, ppo.response_logprobs(model, e, rows, args, forbidden))
        assert seen[-2:] == [width + 1] * 2  # never as many logits as the longest response that may come
        values = ppo.response_values(critic, e, rows, args)
        assert logprobs.shape == values.shape == (len(rows), room)
        for j, i in enumerate(rows):
            states = [queries[i][-1], *responses[i]][:room]
            assert values[j].tolist() == [state + 1 for state in states] + [0] * (room - len(states))
            logits = tiny_lm(torch.tensor([e.sequences[i]])).logits[0, lengths[i] - 1 : -1] / (0.7 + 1e-7)
            alone = torch.distributions.Categorical(logits=logits.masked_fill(forbidden, -1e30))
            close(logprobs[j, : widths[i]], alone.log_prob(torch.tensor(responses[i])), 1e-5)
            close(entropies[i, : widths[i]], alone.entropy(), 1e-5)
            assert (logprobs[j, widths[i] :] == 0).all() and (entropies[i, widths[i] :] == 0).all()
        assert all((entropies[i] == 7).all() for i in range(4) if i not in rows)


# ---- Engines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_detail_44_gradients_are_clipped_at_the_flag_only(zero_stage, max_grad_norm):
    """A plain SGD step of 1 moves the weights by the clipped norm, or unclipped at 0; the norm before is reported (T40)."""
    init_distributed()
    model = torch.nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    engine = create_engine(model, torch.optim.SGD(model.parameters(), lr=9.0), SimpleNamespace(
        zero_stage=zero_stage, bf16=False, offload_optimizer=False, max_grad_norm=max_grad_norm))
    engine.backward(engine(torch.tensor([[2.0, 4.0, 4.0]])).sum())  # gradient (2, 4, 4), norm 6
    close(optimizer_step(engine, 1.0), 6.0, 1e-5)
    close((model.weight - before).norm(), max_grad_norm or 6.0, 1e-5)


# ---- Whole runs -------------------------------------------------------------------------------------------


def count_the(queries, responses):
    """Reward function of the runs below: how often the letter t stands in a response."""
    return [float(response.count("t")) for response in responses]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Flags of a small run, with a policy that ends about every other response, a reward model, and 24 prompts."""
    folder = tmp_path_factory.mktemp("assets")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/base")
    config = dict(vocab_size=1024, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    sft = biased_to(GPTNeoXForCausalLM(tiny_config(**config)), EOS, 5.2)
    torch.manual_seed(1)
    reward_model = GPTNeoXForSequenceClassification(tiny_config(**config, num_labels=1, reward_mean=0.5))
    for name, model in (("sft", sft), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, first, last in (("train", 0, 24), ("validation", 0, 8)):
        rows = (ROOT / f"assets/data/{name}.jsonl").read_text().splitlines()[first:last]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return dict(
        sft_model=str(folder / "sft"), reward_model=str(folder / "reward_model"), prompts=str(folder / "train.jsonl"),
        eval_prompts=str(folder / "validation.jsonl"), gold_function=None, max_prompt_length=16, response_length=8,
        rollout_batch_size=8, total_episodes=16, batch_size=16, num_ppo_epochs=2, micro_batch_size=4, lr=3e-4, critic_lr=3e-4,
        temperature=0.8, kl_coef=0.3, gamma=0.99, lam=0.9, cliprange=0.15, cliprange_value=0.25, vf_coef=0.2)


def run(flags, folder, steps=None, **changes):
    """Run ppo.main. steps: a list that gets the engines' state before every optimizer step. Returns rows of metrics.jsonl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        if steps is not None:
            patch.setattr(ppo, "optimizer_step", recording(steps))
        ppo.main(ppo.Args(**{**flags, "output_dir": str(folder), **changes}))
    return rows_of(folder / "metrics.jsonl")


def recording(steps):
    def step(engine, lr):
        group = engine.optimizer.param_groups[0]
        steps.append(SimpleNamespace(lr=lr, group={key: group[key] for key in ("betas", "eps", "weight_decay")}, gradient={
            name: param.grad.clone() for name, param in engine.module.named_parameters() if param.grad is not None}))
        return optimizer_step(engine, lr)
    return step


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def training(rows):
    return [row for row in rows if "objective/scores" in row]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


SPIED = ("rollout", "deal_by_length", "sampling_noise", "score_responses", "k3", "token_rewards", "gae",
         "masked_whiten", "policy_losses", "value_losses", "response_logprobs", "response_values")


@pytest.fixture(scope="module")
def spied(assets, tmp_path_factory):
    """A run of two updates of 16 episodes, two epochs each, and what its functions were given and returned."""
    calls, steps, folder = defaultdict(list), [], tmp_path_factory.mktemp("spied") / "run"
    before = {name: weights(ROOT / assets[name]) for name in ("sft_model", "reward_model")}

    def spy(original):
        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            calls[original.__name__].append(SimpleNamespace(args=args, kwargs=kwargs, result=result))
            return result
        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in SPIED:
            patch.setattr(ppo, name, spy(getattr(ppo, name)))
        metrics = run(assets, folder, steps, total_episodes=32, lr=2e-3, critic_lr=1e-3, weight_decay=0.02, adam_eps=1e-6)
    policy = AutoModelForCausalLM.from_pretrained(assets["sft_model"]).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(assets["reward_model"]).eval()
    updates = []
    for u in range(2):  # four micro-batches: read by policy and reference, then by the policy in two epochs
        logprobs = calls["response_logprobs"][4 + 16 * u : 20 + 16 * u]  # 4: of the evaluation before the first update
        values = calls["response_values"][12 * u : 12 * u + 12]
        assert [call.args[2] for call in logprobs[:8:2] + logprobs[8:]] == [call.args[2] for call in values]
        train = [calls[name][9 * u : 9 * u + 8] for name in ("policy_losses", "value_losses")]  # the 9th: metrics
        e = logprobs[0].args[1]
        updates.append(SimpleNamespace(
            prompts=[ids for ids, _, _ in calls["rollout"][u + 1].args[1]], responses=e.responses,
            lengths=e.lengths, ended=e.ended, mask=e.mask, value_mask=e.value_mask, episodes=e,
            scores=calls["score_responses"][u + 1].result, logprobs=calls["k3"][u].args[0],
            ref_logprobs=calls["k3"][u].args[1], kl=calls["token_rewards"][u].args[0],
            rewards=calls["gae"][u].args[0], values=calls["gae"][u].args[1],
            advantages=calls["masked_whiten"][u].result, returns=calls["gae"][u].result[1],
            policy_losses=train[0], value_losses=train[1], rows=[call.args[2] for call in logprobs[8:]]))
    return SimpleNamespace(calls=calls, steps=steps, folder=folder, flags=assets, before=before, metrics=metrics,
                           policy=policy, reward_model=reward_model, updates=updates)


def slow_logprobs(model, query, response, temperature=0.8):
    """Log-probabilities of a response after a query, unpadded, one row, by transformers alone; PAD (id 1) and rows beyond the
    1000 tokens of the tokenizer excluded."""
    logits = model(torch.tensor([[*query, *response]])).logits[0, len(query) - 1 : -1] / (temperature + 1e-7)
    logits[:, 1], logits[:, 1000:] = float("-inf"), float("-inf")
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def rows(update):
    """Query, response up to EOS, and its length, of each episode of an update."""
    everything = zip(update.prompts, update.responses.tolist(), update.lengths.tolist())
    return [(query, response[:length], length) for query, response, length in everything]


def test_run_has_unequal_and_unended_responses(spied):
    """The shared run is a fair one: responses end at several steps, some do not, some fill the last column."""
    lengths, ended = (torch.cat([getattr(u, name) for u in spied.updates]) for name in ("lengths", "ended"))
    assert len(set(lengths.tolist())) >= 5 and 4 < ended.sum() < 31 and (lengths < 8).sum() >= 8


def test_detail_22_value_after_eos_equals_the_score_at_the_start(spied):
    """The critic starts as the reward model, constant and all: V at e + 1 is the score, so its delta is 0 (T30)."""
    u = spied.updates[0]
    early = (u.lengths < 8).nonzero().flatten()
    after_eos = u.values[early, u.lengths[early]]
    close(after_eos, u.scores[early], 1e-5)
    close(u.rewards[early, u.lengths[early]] - after_eos, torch.zeros(len(early)), 1e-5)


@torch.no_grad()
def test_detail_28_values_do_not_depend_on_the_token_they_precede(spied):
    """V_t is the reward model on the query and the tokens before t, so another token t changes V_{t+1} but not V_t (T31)."""
    u = spied.updates[0]
    value_of = lambda ids: spied.reward_model(torch.tensor([ids])).logits.item() - 0.5
    for i, (query, response, length) in enumerate(rows(u)):
        for t in range(min(length + 1, 8)):
            close(u.values[i, t], value_of(query + response[:t]), 1e-5)
            if 0 < t:
                assert abs(u.values[i, t] - value_of(query + response[: t - 1] + [response[t - 1] ^ 3])) > 1e-4
        assert (u.values[i, length + 1 :] == 0).all()  # [detail 31] after e + 1 there is no value


@torch.no_grad()
def test_detail_30_log_probabilities_equal_a_slow_loop(spied):
    """Policy and reference log-probabilities are those of unpadded rows at the same temperature, 0 after EOS (T21)."""
    for number, u in enumerate(spied.updates):
        for i, (query, response, length) in enumerate(rows(u)):
            expected = slow_logprobs(spied.policy, query, response)
            close(u.ref_logprobs[i, :length], expected, 2e-5)
            if number == 0:
                close(u.logprobs[i, :length], expected, 2e-5)
            assert (u.logprobs[i, length:] == 0).all() and (u.ref_logprobs[i, length:] == 0).all()


def test_kl_is_0_before_the_first_step(spied):
    """In the first update and the first evaluation the policy is the reference: every KL is 0 (T23)."""
    assert (spied.updates[0].kl == 0).all() and (spied.updates[1].kl.abs() > 1e-3).any()
    first, start = training(spied.metrics)[0], spied.metrics[0]
    assert first["objective/kl"] == first["objective/kl_k3"] == first["objective/non_score_reward"] == start["eval/kl"] == 0


@torch.no_grad()
def test_evaluated_kl_equals_a_slow_loop(spied):
    """KL, score and length of each held-out sample after training equal a row-by-row loop over the saved policy (T24)."""
    trained = AutoModelForCausalLM.from_pretrained(spied.folder).eval()
    prompts, responses = spied.calls["rollout"][-1].args[1], spied.calls["rollout"][-1].result
    lengths = torch.tensor([(row + [EOS]).index(EOS) + (EOS in row) for row in responses.tolist()])
    samples = [row for row in rows_of(spied.folder / "samples.jsonl") if row["step"] == 2]
    assert len(samples) == 8 and max(abs(row["kl"]) for row in samples) > 0.01
    for (query, _, _), response, length, sample in zip(prompts, responses, lengths.tolist(), samples):
        response = response[:length].tolist()
        kl = slow_logprobs(trained, query, response) - slow_logprobs(spied.policy, query, response)
        close(sample["kl"], kl.sum(), 1e-4)
        score = spied.reward_model(torch.tensor([query + response])).logits.item() - 0.5
        close(sample["score"], score if sample["ended"] else -1.0, 1e-4)
        assert sample["length"] == length and sample["ended"] == (EOS in response)
    last = spied.metrics[-1]
    for name in ("score", "kl", "length", "ended"):
        close(last[f"eval/{name}"], sum(row[name] for row in samples) / 8)
    close(last["eval/rlhf_reward"], last["eval/score"] - 0.3 * last["eval/kl"])
    assert last["eval/distinct_starts"] == len({tuple(row[:4].tolist()) for row in responses}) / 8


def test_detail_32_rewards_and_advantages_of_a_run(spied):
    """The run's rewards hold -kl_coef * k1 and the scores, its advantages gamma, lambda and whitening over t <= e (T24, T32)."""
    for u, call in zip(spied.updates, spied.calls["gae"]):
        assert torch.equal(u.kl, u.logprobs - u.ref_logprobs) and call.args[2:] == (0.99, 0.9)
        close(u.rewards.sum(1), u.scores - 0.3 * u.kl.sum(1), 1e-5)
        advantages = call.result[0][u.mask]
        close(u.advantages[u.mask], (advantages - advantages.mean()) / advantages.std(correction=0), 1e-5)
        assert (u.advantages[~u.mask] == 0).all()
        assert torch.equal(u.scores[~u.ended], torch.full_like(u.scores[~u.ended], -1.0))


def test_ratio_is_exactly_1_in_the_first_epoch(spied):
    """Before the first optimizer step of each update the recomputed log-probabilities are bit-equal to the old ones (T22)."""
    for u in spied.updates:
        for number, policy_loss in enumerate(u.policy_losses):
            new, old, *_ = policy_loss.args
            assert torch.equal(new, old) == (number < 4)  # four micro-batches an epoch; the second one has moved


def test_each_epoch_sees_every_episode_once(spied):
    """The micro-batches of an epoch are a partition of the batch, another one in the second epoch (detail 41)."""
    for u in spied.updates:
        first, second = u.rows[:4], u.rows[4:]
        assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(16))
        assert first != second


@pytest.mark.parametrize("world, rows, size", [(1, 7, 2), (2, 32, 8), (2, 12, 8), (4, 48, 4), (8, 64, 3), (8, 64, 4)])
def test_detail_e28_ranks_share_a_batch_evenly_and_by_length(monkeypatch, world, rows, size):
    """Every row is on one rank, as many on each, in order; micro-batches are as narrow as the whole batch's, and for
    lengths that fall evenly all ranks have the same work."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randperm(rows, generator=generator) + 10).tolist()  # of query and response together
    responses = torch.full((rows, 9), PAD)
    for row, n in zip(responses, torch.randint(1, 10, (rows,), generator=generator).tolist()):
        row[:n] = 5
    prompts = [([7] * (length - n), i, {}) for i, (length, n) in enumerate(zip(lengths, (responses == 5).sum(1).tolist()))]
    monkeypatch.setenv("WORLD_SIZE", str(world))
    hands = []
    for r in range(world):
        monkeypatch.setenv("RANK", str(r))
        everyones = list(zip(prompts, responses.tolist(), (responses == 5).sum(1).tolist()))
        monkeypatch.setattr("utils.data.gather_rows", lambda mine: everyones if list(mine) == everyones[r::world] else None)
        dealt, kept = ppo.deal_by_length(prompts[r::world], responses[r::world], PAD, size)
        hands.append([i for _, i, _ in dealt])
        assert list(dealt) == [prompts[i] for i in hands[-1]] and torch.equal(kept, responses[hands[-1]])
    assert sorted(sum(hands, [])) == list(range(rows)) and all(hand == sorted(hand) for hand in hands)
    assert {len(hand) for hand in hands} == {rows // world}
    if rows // world % (2 * size) == 0:
        widths = [sorted((lengths[i] for i in hand), reverse=True)[::size] for hand in hands]
        assert sorted(sum(widths, []), reverse=True) == sorted(lengths, reverse=True)[::size]
        assert len({sum(hand) for hand in widths}) == 1


def test_detail_e28_what_was_dealt_is_scored_and_trained_on(spied):
    """After the rollout its prompts and responses are dealt; the reward model and the update read what comes of it."""
    calls = spied.calls
    for u, rollout, dealt, scored in zip(spied.updates, calls["rollout"][1:3], calls["deal_by_length"],
                                         calls["score_responses"][1:3], strict=True):
        assert dealt.args[0] is rollout.args[1] and dealt.args[1] is rollout.result and dealt.args[3] == 4
        assert scored.args[2] is u.episodes
        prompts, responses = dealt.result
        assert list(u.episodes.queries) == [ids for ids, _, _ in prompts]
        assert u.episodes.sequences == [ids + row[:n] for (ids, _, _), row, n in zip(
            prompts, responses.tolist(), u.lengths.tolist())]


def test_micro_batches_hold_rows_of_like_length_the_longest_first(spied):
    """Query and response together never get longer from one row to the next, in an epoch and in an evaluation (E20)."""
    before = spied.calls["response_logprobs"][:4:2]  # held-out prompts, read by the policy, and then by the reference
    read = [(before[0].args[1], [call.args[2] for call in before])]
    read += [(u.episodes, epoch) for u in spied.updates for epoch in (u.rows[:4], u.rows[4:])]
    for episodes, epoch in read:
        lengths = [len(episodes.sequences[i]) for rows in epoch for i in rows]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_detail_26_evaluation_noise_and_training_noise(spied):
    """Held-out prompts get the same noise at every evaluation, and each training episode its own address (E11)."""
    addresses = [(*call.args[:2], list(call.args[2])) for call in spied.calls["sampling_noise"]]
    held_out = (0, 0, list(range(8)))
    assert addresses == [held_out, (1, 1, list(range(16))), (1, 2, list(range(16, 32))), held_out]
    tokenizer = AutoTokenizer.from_pretrained(spied.flags["sft_model"])
    texts = [row["prompt"] for row in rows_of(ROOT / spied.flags["prompts"])]
    expected = [tokenizer(texts[i]).input_ids for i in ppo.prompts_of_episodes(range(32), 24, 1)]
    assert [prompt for u in spied.updates for prompt in u.prompts] == expected


def relative_error(gradient, expected):
    difference = sum((gradient[name] - expected[name]).double().square().sum() for name in expected)
    return float((difference / sum(value.double().square().sum() for value in expected.values())).sqrt())


def test_first_gradients_equal_autograd_row_by_row(spied):
    """The gradients of the first step are those of one sum over unpadded rows by autograd: -sum A log p / tokens for the
    policy, 0.2 * sum (V - R)^2 / 2 / states for the critic (T36, details 38, 39)."""
    u, loss, value_loss = spied.updates[0], 0, 0
    for i, (query, response, length) in enumerate(rows(u)):
        loss = loss - (u.advantages[i, :length] * slow_logprobs(spied.policy, query, response)).sum()
        states = min(length + 1, 8)
        hidden = spied.reward_model.base_model(torch.tensor([query + response])).last_hidden_state
        values = spied.reward_model.score(hidden)[0, len(query) - 1 :][:states, 0] - 0.5
        value_loss = value_loss + 0.5 * ((values - u.returns[i, :states]) ** 2).sum()
    (loss / u.mask.sum()).backward()
    (0.2 * value_loss / u.value_mask.sum()).backward()
    expected = [{prefix + name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
                for model, prefix in ((spied.policy, ""), (spied.reward_model, "classifier."))]
    spied.policy.zero_grad(), spied.reward_model.zero_grad()
    assert relative_error(spied.steps[0].gradient, expected[0]) < 1e-4
    assert relative_error(spied.steps[1].gradient, expected[1]) < 1e-4
    assert len(spied.steps) == 8  # two updates, two epochs, two models (T35)


def test_logged_metrics_equal_slow_loops_over_counted_tokens(spied):
    """Each logged mean equals a loop over the tokens up to EOS, whatever the padding of its micro-batch (T38)."""
    for u, logged in zip(spied.updates, training(spied.metrics)):
        old, new, advantages, v, v_new, v_return = [], [], [], [], [], []
        for rows_, policy_loss, value_loss in zip(u.rows, u.policy_losses, u.value_losses, strict=True):
            for j, i in enumerate(rows_):
                n = int(u.lengths[i])
                for source, target in zip(policy_loss.args, (new, old, advantages)):
                    target += source[j, :n].tolist()
                for source, target in zip(value_loss.args, (v_new, v, v_return)):
                    target += source[j, : min(n + 1, 8)].tolist()
        old, new, advantages, v, v_new, v_return = map(torch.tensor, (old, new, advantages, v, v_new, v_return))
        ratio = (new - old).exp()
        losses = -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.85, 1.15))
        value_losses = torch.maximum((v_new - v_return) ** 2, (torch.clamp(v_new, v - 0.25, v + 0.25) - v_return) ** 2) / 2
        explained = 1 - (u.returns - u.values)[u.value_mask].var() / u.returns[u.value_mask].var()
        for name, value in {
            "policy/approxkl_avg": ((new - old) ** 2).mean() / 2, "val/ratio": ratio.mean(), "val/ratio_max": ratio.max(),
            "val/ratio_var": ratio.var(correction=0), "loss/policy_avg": losses.mean(), "loss/value_avg": value_losses.mean(),
            "policy/clipfrac_avg": (losses > -advantages * ratio).float().mean(),
            "val/clipfrac_avg": (2 * value_losses > (v_new - v_return) ** 2).float().mean(),
            "objective/scores": u.scores.mean(), "objective/kl": u.kl.sum(1).mean(), "val/explained_variance": explained,
            "objective/kl_k3": ((u.ref_logprobs - u.logprobs).exp() - 1 + u.kl).sum(1).mean(),
            "objective/entropy": -(u.logprobs * u.mask).sum(1).mean(),
            "objective/non_score_reward": -0.3 * u.kl.sum(1).mean(),
            "objective/rlhf_reward": u.scores.mean() - 0.3 * u.kl.sum(1).mean(),
            "val/length": u.lengths.float().mean(), "val/ended": u.ended.float().mean(),
        }.items():
            assert logged[name] == pytest.approx(float(value), abs=1e-4), name
        assert logged["policy/clipfrac_avg"] > 0 and logged["objective/entropy"] > 0


@torch.no_grad()
def test_logged_entropy_equals_a_slow_loop(spied):
    """policy/entropy_avg is the mean entropy of the sampling distribution over the tokens up to EOS, and >= 0 (T38)."""
    total, u = 0.0, spied.updates[0]
    for query, response, length in rows(u):
        logits = spied.policy(torch.tensor([query + response])).logits[0, len(query) - 1 : -1] / 0.8
        allowed = [token for token in range(1000) if token != 1]
        total += torch.distributions.Categorical(logits=logits[:, allowed]).entropy().sum()
    close(training(spied.metrics)[0]["policy/entropy_avg"], total / u.lengths.sum(), 1e-4)


def test_detail_42_learning_rates_fall_linearly(spied):
    """Update u of N runs at lr * (1 - (u - 1) / N), policy and critic each with its own (T13)."""
    assert [step.lr for step in spied.steps] == [2e-3, 1e-3] * 2 + [1e-3, 5e-4] * 2
    logged = [(row["lr"], row["critic_lr"], row["episode"]) for row in training(spied.metrics)]
    assert logged == [(2e-3, 1e-3, 16), (1e-3, 5e-4, 32)]


def test_detail_43_optimizers_use_the_flags(spied):
    """AdamW's epsilon and weight decay are those of the flags, for policy and critic (T40)."""
    assert all(step.group == {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.02} for step in spied.steps)
    args = ppo.Args()
    assert (args.adam_eps, args.weight_decay, args.max_grad_norm) == (1e-5, 0.01, 0.0)


def test_logged_gradient_norms_are_unclipped_means(spied):
    """Both logged gradient norms are the means over the update's steps of each model's own norm (T40)."""
    norms = [torch.cat([g.flatten() for g in step.gradient.values()]).norm() for step in spied.steps]
    for u, row in enumerate(training(spied.metrics)):
        policy, _, policy_2, _ = norms[4 * u : 4 * u + 4]
        _, critic, _, critic_2 = norms[4 * u : 4 * u + 4]
        close(row["policy/grad_norm"], (policy + policy_2) / 2, 1e-4)
        close(row["val/grad_norm"], (critic + critic_2) / 2, 1e-4)


def test_sft_and_reward_model_are_not_touched(spied):
    """The folders read are the same bytes afterwards; every weight of policy and critic that can move has moved (T39)."""
    for name, before in spied.before.items():
        assert weights(ROOT / spied.flags[name]) == before
    policy = AutoModelForCausalLM.from_pretrained(spied.folder)
    critic = AutoModelForSequenceClassification.from_pretrained(spied.folder / "critic")
    for model, start in ((policy, spied.policy), (critic, spied.reward_model)):
        for (name, new), (_, old) in zip(model.named_parameters(), start.named_parameters()):
            assert not torch.equal(new, old), name
    assert critic.config.reward_mean == 0.5  # [detail 15] the constant is not trained


def test_frozen_policy_keeps_ratio_1(assets, tmp_path):
    """With learning rate 0, three epochs: ratio 1, approxkl 0, nothing clipped, policy loss 0, same held-out samples (T22)."""
    metrics = run(assets, tmp_path / "run", lr=0.0, critic_lr=0.0, num_ppo_epochs=3, micro_batch_size=16)
    row = training(metrics)[0]
    close([row["val/ratio"], row["val/ratio_max"]], [1.0, 1.0], 1e-5)
    close([row[f"policy/{name}_avg"] for name in ("approxkl", "clipfrac")], [0.0, 0.0], 1e-9)
    close([row["loss/policy_avg"], row["val/ratio_var"], row["val/clipfrac_avg"]], [0.0, 0.0, 0.0], 1e-6)
    samples = [{**row, "step": 0, "gold": 0} for row in rows_of(tmp_path / "run/samples.jsonl")]
    assert len(samples) == 16 and samples[:8] == samples[8:]
    assert weights(tmp_path / "run/critic") == weights(ROOT / assets["reward_model"])


def test_one_model_at_a_time_has_gradients(assets, tmp_path, monkeypatch):
    """Before a step of the policy the critic holds no gradient, and the reverse; sums that are logged keep no graph."""
    engines, held, summed = [], [], []

    def step(engine, lr):
        held.append([any(param.grad is not None for param in each.module.parameters()) for each in engines])
        return optimizer_step(engine, lr)

    all_sum = ppo.all_sum
    monkeypatch.setattr(ppo, "create_engine", lambda *args: engines.append(create_engine(*args)) or engines[-1])
    monkeypatch.setattr(ppo, "optimizer_step", step)
    monkeypatch.setattr(ppo, "all_sum", lambda tensor: summed.append(tensor.requires_grad) or all_sum(tensor))
    run(assets, tmp_path / "run")
    assert held == [[True, False], [False, True]] * 2
    assert len(summed) > 5 and not any(summed)


def test_detail_E14_disagreement_of_rollout_and_update_stops_the_run(assets, tmp_path, monkeypatch, capsys):
    """Where the update's log-probabilities differ from the rollout's before any training the run ends with one line (T22)."""
    original = ppo.response_logits
    warmer = lambda *args: original(*args[:4], args[4] * (1.001 if torch.is_grad_enabled() else 1.0), args[5])
    monkeypatch.setattr(ppo, "response_logits", warmer)
    with pytest.raises(SystemExit):
        run(assets, tmp_path / "run")
    error = capsys.readouterr().err
    assert "update 1" in error and "before its first step" in error and error.count("\n") == 1
    assert training(rows_of(tmp_path / "run/metrics.jsonl")) == []


def test_gradient_does_not_depend_on_the_micro_batch(assets, tmp_path):
    """Micro-batches of 1, 2, 4 and 8 give the gradients of both models to 1e-5, and the logged metrics to 1e-4 (T36)."""
    runs = {}
    for size in (8, 1, 2, 4):
        steps = []
        metrics = run(assets, tmp_path / f"{size}", steps, batch_size=8, total_episodes=8, micro_batch_size=size)
        runs[size] = steps, training(metrics)[0]
    for size in (1, 2, 4):
        (steps, row), (expected_steps, expected_row) = runs[size], runs[8]
        for step, expected in zip(steps[:2], expected_steps[:2]):
            assert relative_error(step.gradient, expected.gradient) < 1e-5
        for name in expected_row:
            assert row[name] == pytest.approx(expected_row[name], rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def long_run(assets, tmp_path_factory):
    """Five updates with two minibatches, whitened rewards, a checkpoint after each; what whitening and GAE were given."""
    folder, steps, whitened, values = tmp_path_factory.mktemp("long") / "run", [], [], []
    flags = dict(assets, total_episodes=43, batch_size=8, num_minibatches=2, num_ppo_epochs=3, save_every=1, eval_every=2,
                 whiten_rewards=True, reward_function=f"{__name__}:count_the", lr=1e-3)
    whiten, gae = ppo.masked_whiten, ppo.gae
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "masked_whiten", lambda *args, **kwargs: whitened.append((args, kwargs)) or whiten(*args, **kwargs))
        patch.setattr(ppo, "gae", lambda *args: values.append(args[1]) or gae(*args))
        metrics = run(flags, folder, steps)
    return SimpleNamespace(flags=flags, folder=folder, steps=steps, whitened=whitened, values=values, metrics=metrics)


def test_every_update_takes_epochs_times_minibatches_steps(long_run):
    """Two minibatches and three epochs are six steps of each model in all five updates; left-over episodes are not used (T35)."""
    assert len(long_run.steps) == 5 * 6 * 2
    assert [row["step"] for row in training(long_run.metrics)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in long_run.metrics if "eval/score" in row] == [0, 2, 4, 5]


def test_detail_35_rewards_are_whitened_over_states_with_their_mean(long_run):
    """--whiten_rewards whitens the rewards over t <= e + 1 and keeps their mean, then the advantages over t <= e."""
    for (rewards_call, keep), (advantages_call, remove) in zip(long_run.whitened[::2], long_run.whitened[1::2]):
        lengths = advantages_call[1].sum(1)
        assert keep == {"shift_mean": False} and remove == {}
        assert torch.equal(rewards_call[1].sum(1), (lengths + 1).clamp(max=8))


def test_critic_of_a_reward_function_starts_at_0(long_run):
    """Without a reward model to start from, every value is 0 in the first update, and no longer in the second (E13)."""
    assert (long_run.values[0] == 0).all() and (long_run.values[1] != 0).any()


def test_resumed_run_is_bit_identical(long_run, tmp_path):
    """A run killed after update 3 and resumed ends with the same bits: metrics, samples, policy and critic (T43)."""
    folder = tmp_path / "run"
    shutil.copytree(long_run.folder, folder)
    for name in ("summary.json", "model.safetensors", "critic/model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints/step_0000004")  # the newest is now that of update 3
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000003"]
    steps = []
    run(long_run.flags, folder, steps, resume=True)
    assert len(steps) == 2 * 6 * 2
    for name in ("metrics.jsonl", "samples.jsonl", "model.safetensors", "critic/model.safetensors"):
        assert digest(folder / name) == digest(long_run.folder / name), name
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, long_run.folder)]
    for summary in summaries:
        del summary["seconds_this_process"]
    assert summaries[0] == summaries[1]


def test_resume_passes_over_a_damaged_checkpoint(long_run, tmp_path):
    """A newest checkpoint with four wrong bytes, and a sample cut off in the middle: same end, from the one before."""
    folder = tmp_path / "run"
    shutil.copytree(long_run.folder, folder)
    for name in ("summary.json", "model.safetensors", "critic/model.safetensors"):
        (folder / name).unlink()
    damaged = folder / "checkpoints/step_0000004/policy/mp_rank_00_model_states.pt"
    with open(damaged, "r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2\3")
    with open(folder / "samples.jsonl", "a") as file:
        file.write('{"step": 5, "query": "a}')
    steps = []
    run(long_run.flags, folder, steps, resume=True)
    assert len(steps) == 2 * 6 * 2  # updates 4 and 5 again
    for name in ("metrics.jsonl", "samples.jsonl", "model.safetensors", "critic/model.safetensors"):
        assert digest(folder / name) == digest(long_run.folder / name), name


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_policy_learns_a_countable_reward(assets, tmp_path):
    """Rewarded for each letter t, the policy writes many more of them and leaves the reference; kl_coef 10 holds it there (T41)."""
    flags = dict(assets, reward_function=f"{__name__}:count_the", missing_eos_score=None, total_episodes=64 * 10, batch_size=64,
                 micro_batch_size=64, rollout_batch_size=64, num_ppo_epochs=4, lr=3e-3, critic_lr=3e-3, eval_every=100)
    free = training(run(flags, tmp_path / "free", kl_coef=0.01))
    held = training(run(flags, tmp_path / "held", kl_coef=10.0))
    scores, kl = ([row[f"objective/{name}"] for row in free] for name in ("scores", "kl"))
    assert sum(scores[-3:]) / 3 > 2 * scores[0] and kl[0] == 0 and kl[-1] > 2
    assert max(abs(row["objective/kl"]) for row in held) < kl[-1] / 3


def return_zero(queries, responses):
    return [0.0] * len(queries)


def test_equal_returns_do_not_stop_a_run(assets, tmp_path):
    """A sparse reward that is 0 for a whole batch leaves nothing to explain, which is no error."""
    rows = training(run(assets, tmp_path / "run", reward_function=f"{__name__}:return_zero", missing_eos_score=None))
    assert rows[0]["val/explained_variance"] == 1.0 and rows[0]["objective/scores"] == 0.0


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(assets, tmp_path, monkeypatch):
    """Both models recompute their activations; gradients and the weights after 2 steps stay the same to 1e-6."""
    gradients, weights_after, recomputed = {}, {}, []
    checkpoint = transformers.modeling_utils.checkpoint
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", lambda *args, **options: (
        recomputed.append(torch.is_grad_enabled()), checkpoint(*args, **options))[1])
    for name in (False, True):
        steps = []
        run(assets, tmp_path / str(name), steps, gradient_checkpointing=name)
        gradients[name] = [step.gradient for step in steps[:2]]  # policy, critic
        folder = tmp_path / str(name)
        weights_after[name] = [load_file(path / "model.safetensors") for path in (folder, folder / "critic")]
    assert sum(recomputed) == 2 * 2 * 2 * 4  # models x layers x epochs x micro-batches
    for plain, saving in zip(gradients[False] + weights_after[False], gradients[True] + weights_after[True]):
        for key in plain:
            close(plain[key], saving[key], atol=1e-6)


# ---- Frozen models ----------------------------------------------------------------------------------------


BYTES = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.fixture(scope="module")
def byte_reward_model(tmp_path_factory):
    """A reward model whose tokens are bytes; its tokenizer puts a BOS in front. BOS 0, EOS 1, PAD 2."""
    folder = tmp_path_factory.mktemp("byte_reward_model")
    tokens = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "<pad>": 2, **BYTES}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(3)
    config = tiny_config(vocab_size=259, pad_token_id=2, eos_token_id=1, num_labels=1, reward_mean=0.25)
    GPTNeoXForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_retokenized_scores_equal_those_of_the_texts(assets, byte_reward_model, tmp_path, monkeypatch, capsys):
    """Every score is the reward model's on BOS, the bytes of query and response, and EOS only where the row ended."""
    calls, values, original, gae = [], [], ppo.score_responses, ppo.gae

    def spy(*args, **options):
        result, episodes = original(*args, **options), args[2]
        calls.append((episodes.query_texts, episodes.response_texts, episodes.ended.tolist(), result.tolist()))
        return result

    monkeypatch.setattr(ppo, "score_responses", spy)
    monkeypatch.setattr(ppo, "gae", lambda *args: values.append(args[1]) or gae(*args))
    metrics = run(assets, tmp_path / "run", reward_model=byte_reward_model, retokenize=True, missing_eos_score=None)
    classifier = AutoModelForSequenceClassification.from_pretrained(byte_reward_model).eval()
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    scores = []
    for queries, responses, ended, found in calls:
        for query, response, end, score in zip(queries, responses, ended, found):
            spelled = "".join(piece for piece, _ in spell.pre_tokenize_str(query + response))
            ids = [0] + [BYTES[letter] for letter in spelled] + [1] * end
            close(score, classifier(torch.tensor([ids])).logits.item() - 0.25, 1e-4)
            scores.append((end, score))
    assert [len(found) for _, _, _, found in calls] == [8, 16, 8]  # held-out, training, held-out
    assert {end for end, _ in scores} == {True, False} and len({round(score, 3) for _, score in scores}) > 16
    close(training(metrics)[0]["objective/scores"], sum(calls[1][3]) / 16, 1e-5)
    assert (values[0] == 0).all()  # the critic starts from the policy's model with a head of zeros [E13]
    assert f"starts from {assets['sft_model']} with a head of zeros" in capsys.readouterr().out
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/critic")
    assert critic.get_input_embeddings().num_embeddings == 1024 and getattr(critic.config, "reward_mean", 0.0) == 0.0


def test_retokenized_text_longer_than_the_positions_is_refused(assets, byte_reward_model, tmp_path, capsys):
    """A text with more of the reward model's tokens than that has positions ends the run in one line."""
    folder = shutil.copytree(byte_reward_model, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    with pytest.raises(SystemExit):
        run(assets, tmp_path / "run", reward_model=str(folder), retokenize=True)
    error = capsys.readouterr().err
    assert error.startswith("error: --retokenize: a text has") and "that has 8 positions" in error


def test_another_tokenizer_needs_the_flag(assets, byte_reward_model, tmp_path, capsys):
    """Without --retokenize a reward model with another vocabulary is refused in one line that names the flag."""
    with pytest.raises(SystemExit):
        run(assets, tmp_path / "run", reward_model=byte_reward_model)
    error = capsys.readouterr().err
    assert error.startswith(f"error: --reward_model {byte_reward_model}") and error.count("\n") == 1
    assert "--retokenize" in error and not (tmp_path / "run").exists()


def test_retokenize_changes_nothing_for_the_same_vocabulary(assets, tmp_path, spied):
    """With the flag, a reward model of the policy's own vocabulary reads ids as ever, and starts the critic."""
    metrics = run(assets, tmp_path / "run", retokenize=True)
    assert metrics[0] == spied.metrics[0]
    for name in ("objective/scores", "val/explained_variance", "objective/entropy"):
        assert training(metrics)[0][name] == training(spied.metrics)[0][name]


def test_detail_48_frozen_models_are_on_the_device_only_when_used(assets, tmp_path, monkeypatch):
    """--offload_frozen: reference and reward model come before they are used and leave before decoding and training.

    On the CPU all metrics, samples and weights are the same bits as without.
    """
    here, events, loaded = torch.device("cpu"), [], []
    to, init, load_causal_lm = torch.nn.Module.to, ppo.init_distributed, ppo.load_causal_lm

    def spy(kind, original):
        def wrapper(*args, **options):
            events.append((kind, args[0]))
            return original(*args, **options)
        return wrapper

    def recorded_to(self, where, *rest, **options):
        events.append(("device" if where is here else "cpu", self))
        return to(self, where, *rest, **options)

    monkeypatch.setattr(torch.nn.Module, "to", recorded_to)
    monkeypatch.setattr(ppo, "init_distributed", lambda *args: (init(*args), here)[1])
    monkeypatch.setattr(ppo, "load_causal_lm", lambda *args: loaded.append(load_causal_lm(*args)) or loaded[-1])
    for kind, name in (("use", "response_logits"), ("use", "score_responses"),
                       ("free", "rollout"), ("free", "optimizer_step")):
        monkeypatch.setattr(ppo, name, spy(kind, getattr(ppo, name)))
    for name, offload in (("plain", False), ("offloaded", True)):
        events.clear(), loaded.clear()
        run(assets, tmp_path / name, total_episodes=32, offload_frozen=offload)
        reward_model, = {model for kind, model in events if isinstance(model, ppo.ScalarModel) and kind == "use"}
        place, uses = {loaded[1]: "cpu", reward_model: "cpu"}, 0  # the second language model is the reference
        for kind, model in events:
            if kind in ("device", "cpu") and model in place:
                place[model] = kind
            elif kind == "use" and model in place:
                uses += 1
                assert place[model] == "device"
                assert not offload or sorted(place.values()) == ["cpu", "device"]  # one at a time
            elif kind == "free" and offload:
                assert set(place.values()) == {"cpu"}
        assert uses == 2 * (2 + 1) + 2 * (4 + 1)  # evaluations and updates: forwards of the reference, scores
        assert set(place.values()) == {"cpu" if offload else "device"}
    for file in ("metrics.jsonl", "samples.jsonl", "model.safetensors", "critic/model.safetensors"):
        assert digest(tmp_path / "plain" / file) == digest(tmp_path / "offloaded" / file), file
