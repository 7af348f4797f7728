"""group_invariant_ppo.py's groups: the functions by themselves, and whole runs on test_ppo.py's tiny random models.

T1 ... T19 are the numbers of the tests in the method's specification, whose worked example is the golden one here: four
returns, two groups, the second of which has the higher mean. [G N] are the choices that the script marks so.
"""

import json
import shutil
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import group_invariant_ppo as gip
import ppo
from test_ppo import assets, byte_reward_model  # fixtures
from test_ppo import digest, recording, relative_error
from test_ppo import rows, rows_of, training, weights
from utils.data import load_grouped_prompts, load_prompts, pad
from utils.launch import create_engine, init_distributed
from utils.models import save_weights

KINDS = pytest.mark.parametrize("kind", ["mass", "uniform"])
RETURNS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
HIGH = torch.tensor([0.9, 0.8, 0.6, 0.1], dtype=torch.float64)
LABELS = torch.stack([1 - HIGH, HIGH], 1)


def close(actual, expected, atol=1e-6):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def drawn(size, groups, seed=0, dtype=torch.float64):
    """Random labels (B, M), which leave no group near empty, and returns (B,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(size, groups, generator=generator, dtype=torch.float64)
    returns = 0.7 + 2 * torch.randn(size, generator=generator, dtype=torch.float64)
    return logits.softmax(1).to(dtype), returns.to(dtype)


def by_logit(labels, gradient):
    """Gradient with respect to the logits of softmax labels (B, M), from one with respect to the labels."""
    return labels * (gradient - (labels * gradient).sum(1, keepdim=True))


def slow_means(labels, values):
    """Share and mean of each group, by a double loop."""
    shares, means = [], []
    for g in range(len(labels[0])):
        mass = sum(float(row[g]) for row in labels)
        shares.append(mass / len(labels))
        means.append(sum(float(row[g]) * float(value) for row, value in zip(labels, values)) / mass)
    return shares, means


def slow_variance(shares, means, kind):
    weights = shares if kind == "mass" else [1 / len(shares)] * len(shares)
    centre = sum(w * mean for w, mean in zip(weights, means))
    return sum(w * (mean - centre) ** 2 for w, mean in zip(weights, means))


# ---- The golden example -----------------------------------------------------------------------------------


def test_golden_group_means():
    """Shares .4 and .6, means -0.3125 and 1.0416667, the gap is 1.3541667 (T3, G5)."""
    shares, means = gip.group_means(LABELS, RETURNS)
    close(shares, [0.4, 0.6], 1e-12)
    close(means, [-0.3125, 1.0416667])
    close(means[1] - means[0], 1.3541667)


def test_golden_variances():
    """0.4401042 where groups weigh, 0.4584418 where all count alike: not torch's 0.9168837 (T3, G6)."""
    close(gip.group_variance(LABELS, RETURNS, "mass"), 0.4401042)
    close(gip.group_variance(LABELS, RETURNS, "uniform"), 0.4584418)


@pytest.mark.parametrize("kind, expected", [("uniform", [0.112406, 0.086986, -0.038791, -0.078023]),
                                            ("mass", [0.099658, 0.068837, -0.059245, -0.083154])])
def test_golden_label_gradient(kind, expected):
    """The variance's derivative by each logit of the high group (T3, G7)."""
    close(by_logit(LABELS, gip.label_gradient(LABELS, RETURNS, kind))[:, 1] / 4, expected)


@pytest.mark.parametrize("kind, beta, expected", [("uniform", 0.1, [0.915365, 0.943576, 1, 1.141059]),
                                                  ("mass", 0.1, [0.918750, 0.945833, 1, 1.135417]),
                                                  ("uniform", 0.01, [0.991536, 0.994358, 1, 1.014106]),
                                                  ("mass", 0.01, [0.991875, 0.994583, 1, 1.013542])])
def test_golden_multipliers(kind, beta, expected):
    """Advantages count less in the high group, more in the low one (T3, G8)."""
    close(gip.advantage_multiplier(LABELS, RETURNS, beta, kind), expected)


def test_golden_exact_coefficients():
    """What --invariance_estimator exact takes off: the worked numbers times B, and for mass the formula (T3, G9)."""
    found = {kind: (LABELS * gip.label_gradient(LABELS, RETURNS, kind)).sum(1) for kind in ("uniform", "mass")}
    close(found["uniform"] / 4, [0.145467, -0.120488, -0.229221, 0.204242])
    means, mean = gip.group_means(LABELS, RETURNS)[1], RETURNS.mean()
    close(found["mass"], (LABELS * (means - mean) * (2 * RETURNS[:, None] - means - mean)).sum(1), 1e-12)


def test_golden_kl_coefs():
    """At 0.05 the coefficients are .045, .040, .030, .005, and the best group is the second (T3, G10)."""
    coefs, best = gip.adaptive_kl_coefs(LABELS, RETURNS, 0.05)
    close(coefs, [0.045, 0.040, 0.030, 0.005], 1e-12)
    assert best == 1


# ---- Groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3, 5])
@KINDS
def test_means_and_variance_equal_a_double_loop(groups, kind):
    """Shares, means and both variances of soft groups; means of fp32 labels too are summed in float64 (G5, G6)."""
    labels, returns = drawn(40, groups, dtype=torch.float32)
    close(gip.group_means(labels, returns)[1], slow_means(labels, returns)[1], 1e-12)
    labels, returns = drawn(40, groups)
    shares, means = slow_means(labels, returns)
    close(gip.group_means(labels, returns)[0], shares, 1e-12)
    close(gip.group_variance(labels, returns, kind), slow_variance(shares, means, kind), 1e-12)


@pytest.mark.parametrize("groups", [2, 3, 5])
@KINDS
def test_label_gradient_equals_autograd(groups, kind):
    """B times the derivative of the variance, compared by logit, as what a row has in common is left out (T4, G7)."""
    labels, returns = drawn(32, groups)
    logits = labels.log().requires_grad_()
    gip.group_variance(logits.softmax(1), returns, kind).backward()
    close(by_logit(labels, gip.label_gradient(labels, returns, kind)) / 32, logits.grad, 1e-12)


@KINDS
def test_multipliers_have_mean_1_and_the_closed_forms(kind):
    """The mean is 1; for 2 groups 1 - 2 beta gap (p - share) by mass, by uniform over 4 share (1 - share) (T5)."""
    for groups in (2, 5):
        labels, returns = drawn(64, groups, seed=groups)
        kappas = gip.advantage_multiplier(labels, returns, 0.7, kind)
        close(kappas.mean(), 1.0, 1e-12)
        assert kappas.std() > 0.05
    labels, returns = drawn(64, 2)
    share, means = labels[:, 0].mean(), slow_means(labels, returns)[1]
    scale = 1 if kind == "mass" else 4 * share * (1 - share)
    expected = 1 - 2 * 0.7 * (means[0] - means[1]) * (labels[:, 0] - share) / scale
    close(gip.advantage_multiplier(labels, returns, 0.7, kind), expected, 1e-12)


@KINDS
def test_order_of_episodes_and_of_groups_carries_no_meaning(kind):
    """Episodes in another order have their own numbers still; groups in another order change none (T6, G11)."""
    labels, returns = drawn(12, 3)
    order, columns = torch.randperm(12, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1])
    other = labels[order][:, columns], returns[order]
    close(gip.group_variance(*other, kind), gip.group_variance(labels, returns, kind), 1e-12)
    kappas, gradient = gip.advantage_multiplier(labels, returns, 0.5, kind), gip.label_gradient(labels, returns, kind)
    close(gip.advantage_multiplier(*other, 0.5, kind), kappas[order], 1e-12)
    close(gip.label_gradient(*other, kind), gradient[order][:, columns], 1e-12)
    (coefs, best), (other_coefs, other_best) = (gip.adaptive_kl_coefs(*x, 0.3) for x in ((labels, returns), other))
    close(other_coefs, coefs[order], 0)
    assert columns[other_best] == best


@KINDS
def test_shift_and_scale_of_returns(kind):
    """A shift of the returns changes nothing; 3 times the returns are 9 times the variance, 3 times kappa - 1 (T7)."""
    labels, returns = drawn(12, 3)
    variance, kappas = gip.group_variance(labels, returns, kind), gip.advantage_multiplier(labels, returns, 0.5, kind)
    close(gip.group_variance(labels, returns + 10, kind), variance, 1e-10)
    close(gip.advantage_multiplier(labels, returns + 10, 0.5, kind), kappas, 1e-10)
    close(gip.group_variance(labels, 3 * returns, kind), 9 * variance, 1e-10)
    close(gip.advantage_multiplier(labels, 3 * returns, 0.5, kind) - 1, 3 * (kappas - 1), 1e-10)


ONE_HOT = torch.eye(2, dtype=torch.float64)


@KINDS
@pytest.mark.parametrize("labels, returns", [
    (ONE_HOT[[0, 0, 0, 0]], RETURNS), (ONE_HOT[[1, 1, 1, 1]].float(), RETURNS.float()),  # the other group is empty
    (LABELS[:1], RETURNS[:1]), (ONE_HOT[:1], RETURNS[:1]), (LABELS, RETURNS * 0 + 1.7)], ids=[
        "all in group 0", "all in group 1", "one episode", "one episode, one group", "equal returns"])
def test_nothing_follows_where_groups_cannot_differ(labels, returns, kind):
    """An empty group has the mean of all, so variance and gradient are 0 and every multiplier is 1 (T8, G5)."""
    close(gip.group_means(labels, returns)[1], [returns.mean()] * 2)
    close(gip.group_variance(labels, returns, kind), 0.0, 1e-12)
    close(gip.label_gradient(labels, returns, kind), torch.zeros(len(labels), 2), 1e-12)
    close(gip.advantage_multiplier(labels, returns, 0.5, kind), torch.ones(len(labels)), 1e-12)


@KINDS
def test_hard_labels_and_a_group_of_almost_nothing_are_finite(kind):
    """Hard labels give the groups' plain means; a label of 1e-12 counts as none, and of 1e-6 gives no infinity (T8)."""
    hard = ONE_HOT[[1, 1, 0, 0]]
    close(gip.group_means(hard, RETURNS)[1], [-0.5, 1.5], 1e-12)
    close(gip.group_variance(hard, RETURNS, kind), 1.0, 1e-12)
    close(gip.advantage_multiplier(hard, RETURNS, 0.1, kind), [0.8, 0.8, 1.2, 1.2], 1e-12)
    tiny = torch.tensor([[1 - 1e-12, 1e-12]] + [[1.0, 0.0]] * 3).double()
    close(gip.group_means(tiny, RETURNS)[1], [0.5, 0.5], 1e-9)
    small = torch.tensor([[1 - 1e-6, 1e-6]] + [[1.0, 0.0]] * 3)
    for found in (gip.label_gradient(small, RETURNS, kind), gip.advantage_multiplier(small, RETURNS, 0.5, kind)):
        assert found.isfinite().all() and found.dtype == torch.float32
    close(gip.group_means(small, RETURNS)[1], [0.5, 2.0], 1e-5)


@KINDS
def test_an_empty_third_group_changes_no_mass_and_no_other_gradient(kind):
    """Beside two groups, one whose labels are exactly 0 leaves variance and multipliers by mass as they were (T8)."""
    labels = torch.cat([LABELS, torch.zeros(4, 1).double()], 1)
    for found in (gip.group_variance(labels, RETURNS, kind), gip.label_gradient(labels, RETURNS, kind),
                  gip.advantage_multiplier(labels, RETURNS, 0.5, kind)):
        assert found.isfinite().all()
    if kind == "mass":
        close(gip.group_variance(labels, RETURNS, kind), 0.4401042)
        close(gip.advantage_multiplier(labels, RETURNS, 0.1, kind), [0.918750, 0.945833, 1, 1.135417])


@pytest.mark.parametrize("certain", [0, 1])
def test_certain_labels_make_the_adaptive_kl_the_fixed_one(certain):
    """Where one group has probability 1 for every episode the coefficients are kl_coef, to the bit (T10, G10)."""
    coefs, best = gip.adaptive_kl_coefs(ONE_HOT[[certain] * 4].float(), RETURNS.float(), 0.3)
    assert torch.equal(coefs, torch.full((4,), 0.3)) and best == certain


# ---- Estimators of the policy's gradient ------------------------------------------------------------------


def bandit(level):
    """Three states alike, four actions whose probabilities are eighths, returns and soft labels of three groups.

    A batch of 24 episodes has each pair of state and action as often as it is likely, so its means are expectations.
    """
    generator = torch.Generator().manual_seed(5)
    eighths = torch.tensor([[3, 2, 2, 1], [1, 1, 5, 1], [2, 4, 1, 1]])
    returns = 2 * torch.randn(3, 4, generator=generator).double() + torch.tensor([[1.0], [0.0], [-1.0]])
    logits = 1.5 * torch.randn(3, 4 if level == "trajectory" else 1, 3, generator=generator).double()
    episodes = [(s, a) for s in range(3) for a in range(4) for _ in range(eighths[s, a])]
    return (eighths / 8).double().log(), returns, logits.softmax(2).expand(3, 4, 3), torch.tensor(episodes).T


def exact_variance(logits, returns, labels, kind):
    """Variance of the groups' expected returns under the policy softmax(logits), by enumeration."""
    joint = logits.softmax(1)[:, :, None] * labels / len(logits)  # P(s, a, g)
    shares = joint.sum((0, 1))
    means = (joint * returns[:, :, None]).sum((0, 1)) / shares
    return slow_variance(shares.tolist(), means.tolist(), kind)


def finite_differences(function, logits, step=1e-5):
    nudges = step * torch.eye(logits.numel(), dtype=logits.dtype).view(-1, *logits.shape)
    slopes = [(function(logits + nudge) - function(logits - nudge)) / (2 * step) for nudge in nudges]
    return torch.tensor(slopes, dtype=logits.dtype).view_as(logits)


@KINDS
@pytest.mark.parametrize("level", ["prompt", "trajectory"])
def test_estimators_against_the_enumerated_gradient(level, kind):
    """Labels of prompts: both estimators are the variance's gradient to 1e-6. Labels of trajectories: `exact` is, and
    `advantage`, whose labels are constants, is off by more than 5 %, as documented (T11, G8, G9)."""
    logits, table, soft, (s, a) = bandit(level)
    expected = finite_differences(lambda x: exact_variance(x, table, soft, kind), logits)
    returns, labels = table[s, a], soft[s, a]
    close(gip.group_variance(labels, returns, kind), exact_variance(logits, table, soft, kind), 1e-12)
    advantages = returns - (logits.exp() * table).sum(1)[s]  # less the value of the state
    taken = {"advantage": (1 - gip.advantage_multiplier(labels, returns, 1.0, kind)) * advantages,
             "exact": (labels * gip.label_gradient(labels, returns, kind)).sum(1)}
    errors = {}
    for name, weight in taken.items():
        variable = logits.clone().requires_grad_()
        (weight * variable.log_softmax(1)[s, a]).mean().backward()  # of what is taken off each advantage
        errors[name] = float((variable.grad - expected).norm() / expected.norm())
    assert errors["exact"] < 1e-6
    assert errors["advantage"] < 1e-6 if level == "prompt" else errors["advantage"] > 0.05


def test_negative_multipliers_turn_the_advantage_before_the_clip():
    """kappa -0.5, ratios 1.5 and 0.5, advantages 1 and -1, by hand: losses .75, -.6, .4, -.25. They are not -0.5 times
    those without kappa, where the clip decides against the other side (T14, G8, pitfall 8)."""
    labels, returns = ONE_HOT[[0, 0, 1, 1]], torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    kappas = gip.advantage_multiplier(labels, returns, 0.75, "mass")
    close(kappas, [-0.5, -0.5, 2.5, 2.5], 1e-12)
    ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]).double(), torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    losses, clipped = gip.policy_losses(ratio.log(), torch.zeros(4), advantages * kappas[0], 0.2)
    close(losses, [0.75, -0.6, 0.4, -0.25])
    assert clipped.tolist() == [0, 1, 1, 0]
    assert not torch.allclose(losses, kappas[0] * gip.policy_losses(ratio.log(), torch.zeros(4), advantages, 0.2)[0])


# ---- Labels that are learned ------------------------------------------------------------------------------


def ascend(returns, kind, steps, seed=0):
    """A group head on the states (return, noise), trained to raise the variance as main does; its labels (B, M)."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.stack([returns, torch.randn(len(returns), generator=generator)], 1)
    head = gip.GroupHead(2, 2, seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(steps):
        labels = head(states)
        gain = (labels * gip.label_gradient(labels.detach(), returns, kind)).sum() / len(returns)
        optimizer.zero_grad()
        (-gain).backward()
        optimizer.step()
    return head(states).detach()


@pytest.mark.parametrize("share, kind, least", [(0.5, "mass", 0.98), (0.5, "uniform", 0.98), (0.8, "mass", 0.97)])
def test_planted_populations_are_found(share, kind, least):
    """Returns N(1, .4) and N(-1, .4): .98 of the labels are right at half and half, .97 at 80/20 by mass (T15, G6)."""
    generator = torch.Generator().manual_seed(1)
    high = torch.arange(512) < 512 * share
    returns = torch.where(high, 1.0, -1.0) + 0.4 * torch.randn(512, generator=generator)
    labels = ascend(returns, kind, 300)
    found = labels.argmax(1) == gip.group_means(labels, returns)[1].argmax()
    assert (found == high).float().mean() >= least


def test_mass_leaves_no_group_empty():
    """Of 64 Gaussian returns every group keeps 20 % of labels and of mass over 1200 steps, in two draws (T16, G6)."""
    for seed in (0, 1):
        returns = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        labels = ascend(returns, "mass", 1200, seed)
        assert torch.bincount(labels.argmax(1), minlength=2).min() >= 0.2 * 64
        assert labels.mean(0).min() >= 0.2


# ---- Scores, rewards --------------------------------------------------------------------------------------


def test_running_moments_equal_numpys_over_everything():
    """After each of five batches, of 1 to 40 scores about 1e4, mean and sd are those of all scores so far (T17, G2)."""
    generator, moments, seen = torch.Generator().manual_seed(0), (0, 0.0, 0.0), torch.zeros(0)
    for number, size in enumerate((1, 7, 40, 3, 1)):
        batch = 1e4 + number + 3 * torch.randn(size, generator=generator)
        moments, seen = gip.running_moments(moments, batch), torch.cat([seen, batch])
        everything = seen.double().numpy()
        assert moments[0] == len(seen) and moments[1] == pytest.approx(everything.mean(), rel=1e-12)
        assert moments[2] == pytest.approx(everything.std(ddof=1) if len(seen) > 1 else 0.0, rel=1e-9)


@pytest.mark.parametrize("scores", [[0.3], [0.1] * 5, [-1.0] * 3])
def test_one_score_or_equal_ones_are_normalised_to_0(scores):
    """No 0 / 0: without spread every score is 0, and the next batch has the spread of all (T17, G2)."""
    moments = gip.running_moments((0, 0.0, 0.0), torch.tensor(scores))
    assert gip.normalize(torch.tensor(scores), moments, 5.0).tolist() == [0.0] * len(scores) and moments[2] == 0.0
    moments = gip.running_moments(moments, torch.tensor([7.0, 8.0]))
    assert moments[2] == pytest.approx(torch.tensor([*scores, 7.0, 8.0]).std().item(), rel=1e-6)


def test_normalised_scores_are_clipped_on_both_sides():
    """(score - mean) / sd, at most 5 and at least -5 (T17, G2)."""
    close(gip.normalize(torch.tensor([3.0, 1.0, 40.0, -40.0]), (9, 1.0, 2.0), 5.0), [1.0, 0.0, 5.0, -5.0])


def test_token_rewards_with_a_coefficient_of_each_episode():
    """-coefficient * KL of each token, plus the score one step after the last real token, or at the last column where
    the response is cut off; advantages and returns of them by a double loop (T18, G10)."""
    kl, values = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    lengths, scores = torch.tensor([1, 4, 5, 6]), torch.tensor([2.0, -1.0, 3.0, 4.0])
    coefs = torch.tensor([0.1, 0.2, 0.3, 0.0])
    kl = kl * (torch.arange(6) < lengths[:, None])
    rewards = gip.token_rewards(kl, scores, lengths, coefs[:, None])
    advantages, returns = gip.gae(rewards, values, 0.9, 0.8)
    for i, n in enumerate(lengths.tolist()):
        expected = [-float(coefs[i] * kl[i, t]) for t in range(6)]
        expected[min(n, 5)] += float(scores[i])
        close(rewards[i], expected)
        delta = [expected[t] + 0.9 * (values[i, t + 1] if t < 5 else 0) - values[i, t] for t in range(6)]
        close(advantages[i], [sum(0.72 ** (u - t) * delta[u] for u in range(t, 6)) for t in range(6)])
        close(returns[i], advantages[i] + values[i])


# ---- Models, data, files ----------------------------------------------------------------------------------


def test_group_head_is_drawn_small_from_the_seed_alone():
    """Weights of sd .02, not 0, by the seed alone; torch's own generator stays where it was (pitfalls 1, 17, G4)."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    head, same, other = (gip.GroupHead(4096, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(head.weight, same.weight) and not torch.equal(head.weight, other.weight)
    assert head.weight.shape == (3, 4096) and head.weight.std().item() == pytest.approx(0.2 / 4096**0.5, rel=0.05)
    assert (head.bias == 0).all() and head.weight.requires_grad and head.bias.requires_grad


def test_group_head_is_a_softmax_over_groups():
    """Probabilities that sum to 1 in each row, in fp32 also from bf16 states: softmax of W state + bias (G4)."""
    head, states = gip.GroupHead(8, 3, 0), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    head.bias.data += torch.tensor([0.0, 1.0, 2.0])
    close(head(states), torch.stack([(head.weight @ state + head.bias).softmax(0) for state in states]))
    close(head(states).sum(1), torch.ones(5))
    assert head.bfloat16()(states.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_critic_values_in_units_and_the_state_of_the_right_token(tiny_classifier):
    """Rows of unlike lengths, padded on the left: values are (score - mean) / sd, and the state `back` tokens before
    the end is that of a plain forward of the row alone (G3, G4, pitfall 14)."""
    tiny_classifier.config.reward_mean = 0.5
    critic, backs = gip.GroupCritic(tiny_classifier), [0, 3, 1, 4]
    sequences = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 0], [0, 15, 16, 17, 0]]
    ids, mask = pad(sequences, 60, "left")
    plain, states = critic(ids, mask, torch.tensor(backs))
    critic.units = 1.5, 4.0
    values, _ = critic(ids, mask, torch.tensor(backs))
    for i, row in enumerate(sequences):
        hidden = tiny_classifier.base_model(torch.tensor([row])).last_hidden_state
        raw = tiny_classifier.score(hidden)[0, :, 0] - 0.5
        close(plain[i, -len(row) :], raw, 1e-5)
        close(values[i, -len(row) :], (raw - 1.5) / 4, 1e-5)
        close(states[i], hidden[0, len(row) - 1 - backs[i]], 1e-5)
    critic.units = 1.5, 0.0  # a first rollout of equal scores
    close(critic(ids, mask, torch.tensor(backs))[0], plain - 1.5, 1e-5)


def slow_auc(probabilities, scores, groups):
    """By a double loop over pairs of the best group and the others."""
    known = [(p, s, g) for p, s, g in zip(probabilities, scores, groups) if g is not None]
    means = {g: np.mean([s for _, s, other in known if other == g]) for _, _, g in known}
    best = max(means, key=means.get)
    wins = [(p > q) + (p == q) / 2 for p, _, g in known if g == best for q, _, h in known if h != best]
    return sum(wins) / len(wins)


def test_auc_of_groups_equals_a_double_loop():
    """Three groups, ties, episodes without a group: the best group's against all the others'."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        names = np.random.default_rng(seed).choice(["easy", "hard", "odd", None], 40).tolist()
        probabilities = torch.randint(0, 6, (40,), generator=generator) / 6
        scores = torch.randn(40, generator=generator)
        expected = slow_auc(probabilities.tolist(), scores.tolist(), names)
        close(gip.auc_of_groups(probabilities, scores, names), expected, 1e-12)


def test_auc_of_groups_by_hand():
    """Best by score, not by name: 1 where all of its probabilities are larger, 0 where smaller, a tie counts half."""
    p, scores = torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([1.0, 2.0, 0.0, 0.5])
    assert gip.auc_of_groups(p, scores, ["z", "z", "a", "a"]) == 1.0 == gip.auc_of_groups(p, scores, ["a", "a", "z", "z"])
    assert gip.auc_of_groups(p, -scores, ["z", "z", "a", "a"]) == 0.0
    assert gip.auc_of_groups(p, scores, ["z", "a", "z", "a"]) == 0.25  # a is the best, .8 and .1 against .9 and .2
    assert gip.auc_of_groups(p * 0, scores, ["z", "z", "a", "a"]) == 0.5
    assert gip.auc_of_groups(p, scores, ["z", "a", None, None]) == 0.0  # 0.8 of the better a, 0.9 of z
    assert gip.auc_of_groups(p, scores, ["", "", "a", "a"]) == 1.0  # a group without a name is one


@pytest.mark.parametrize("groups", [["a"] * 3, [None] * 3, ["a", None, "a"]])
def test_auc_of_one_group_is_one_half(groups):
    """There is nothing to compare with."""
    assert gip.auc_of_groups(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 2.0, 3.0]), groups) == 0.5


def test_grouped_prompts_are_the_prompts_and_their_groups(tmp_path):
    """The column `group` as text, of the number 0 too; None and no entry are none; prompts as without the column."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/base")
    texts = ["She said", "He was", "They had", "It rained"]
    columns = {"group": "hard"}, {"group": 0}, {"group": None}, {}
    data = [{"prompt": text, **column} for text, column in zip(texts, columns)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    args = SimpleNamespace(max_prompt_length=16)
    prompts, groups = load_grouped_prompts(str(file), "--prompts", tokenizer, args)
    assert groups == {"She said": "hard", "He was": "0"}
    assert prompts == [(tokenizer(row["prompt"]).input_ids, row["prompt"], row) for row in data]
    assert prompts == load_prompts(str(file), "--prompts", tokenizer, args)
    file.write_text(json.dumps({"prompt": "She said"}) + "\n")
    assert load_grouped_prompts(str(file), "--prompts", tokenizer, args)[1] == {}


def test_weights_are_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    """The file has every weight, one that is a view too; where writing fails the earlier file is as it was."""
    init_distributed()
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(torch.arange(6.0).view(3, 2).T)
    assert not model.weight.is_contiguous()
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0, module=model)
    file = tmp_path / "head.safetensors"
    save_weights(engine, file)
    found = load_file(file)
    assert found.keys() == {"weight", "bias"} and [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
    assert torch.equal(found["weight"], model.weight) and torch.equal(found["bias"], model.bias)
    before = digest(file)

    def torn(tensors, path):
        open(path, "wb").write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("utils.models.save_file", torn)
    with pytest.raises(OSError):
        save_weights(engine, file)
    assert digest(file) == before


# ---- Whole runs -------------------------------------------------------------------------------------------


def run(flags, folder, script=gip, **changes):
    """Run main of a script. Returns the rows of metrics.jsonl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        script.main(script.Args(**{**flags, "output_dir": str(folder), **changes}))
    return rows_of(folder / "metrics.jsonl")


SPIED = ("sampling_noise", "rollout", "score_responses", "running_moments", "normalize", "adaptive_kl_coefs",
         "label_gradient", "advantage_multiplier", "token_rewards", "gae", "masked_whiten", "response_logprobs",
         "values_and_states", "policy_losses", "value_losses", "auc_of_groups")


def observe(flags, folder, scale=10.0, **changes):
    """A run whose group head starts at `scale` times its draw, to be sure of itself, and all that is seen of it.

    calls: {function: its calls}; names: functions and optimizer steps in order; steps: the engines' state before each;
    held: which of policy, critic and head have gradients then; units: the critic's mean and sd in each update; draw:
    the head's first weights; updates: what each update computed.
    """
    o = SimpleNamespace(flags={**flags, **changes}, folder=folder, calls=defaultdict(list), names=[], steps=[], held=[],
                        units=[], engines=[], rows=None, updates=[], episodes=[])

    def spy(name, original):
        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            if name in ("response_logprobs", "values_and_states"):
                o.rows = args[2]
            if name == "score_responses":
                o.episodes.append(args[2])
            if name == "gae":
                o.units.append(tuple(o.engines[1].module.units))
            kept = result.clone() if isinstance(result, torch.Tensor) else result  # as main may change it in place
            o.calls[name].append(SimpleNamespace(args=args, kwargs=kwargs, result=kept, rows=o.rows))
            o.names.append(name)
            return result
        return wrapper

    def create(model, *rest):
        if isinstance(model, gip.GroupHead):
            model.weight.data *= scale
            o.draw = {name: value.clone() for name, value in model.state_dict().items()}
        o.engines.append(create_engine(model, *rest))
        return o.engines[-1]

    def step(engine, lr):
        o.names.append(("policy", "critic", "group_head")[o.engines.index(engine)])
        o.held.append([any(x.grad is not None for x in each.module.parameters()) for each in o.engines])
        norm = recorded(engine, lr)
        o.steps[-1].part = o.names[-1]
        return norm

    recorded = recording(o.steps)
    with pytest.MonkeyPatch.context() as patch:
        for name in SPIED:
            patch.setattr(gip, name, spy(name, getattr(gip, name)))
        patch.setattr(gip, "create_engine", create)
        patch.setattr(gip, "optimizer_step", step)
        o.metrics = run(o.flags, folder)
    o.args = gip.Args(**o.flags)
    trains = [call.args[1] > 0 for call in o.calls["sampling_noise"]]  # evaluations have the noise of update 0
    new, scored, episodes = ([call for call, kept in zip(calls, trains, strict=True) if kept]
                             for calls in (o.calls["rollout"], o.calls["score_responses"], o.episodes))
    batches = len(o.calls["policy_losses"]) // len(new) - 1  # the last call of an update is for its metrics
    for u in range(len(new)):
        responses, lengths, ended = gip.truncate_at_eos(new[u].result, torch.tensor([0]), 1)
        mask, value_mask = gip.response_masks(lengths, o.args.response_length)
        assert torch.equal(responses, episodes[u].responses)
        gradient, multiplier, token_rewards, gae = (
            o.calls[name][u] for name in ("label_gradient", "advantage_multiplier", "token_rewards", "gae"))
        o.updates.append(SimpleNamespace(
            number=u, prompts=[ids for ids, _, _ in new[u].args[1]], texts=[text for _, text, _ in new[u].args[1]],
            responses=responses, lengths=lengths, ended=ended, mask=mask, value_mask=value_mask,
            scores=scored[u].result, labels=gradient.args[0], group_returns=gradient.args[1], gradient=gradient.result,
            kappas=multiplier.result, kl=token_rewards.args[0], normalized=token_rewards.args[1],
            coefs=token_rewards.args[3], token_rewards=token_rewards.result, rewards=gae.args[0], values=gae.args[1],
            advantages=gae.result[0], returns=gae.result[1],
            policy_losses=o.calls["policy_losses"][(batches + 1) * u : (batches + 1) * (u + 1) - 1],
            value_losses=o.calls["value_losses"][(batches + 1) * u : (batches + 1) * (u + 1) - 1]))
    return o


def steps_of(o, part):
    return [step for step in o.steps if step.part == part]


@pytest.fixture(scope="module")
def grouped(assets, tmp_path_factory):
    """The flags with prompts of which two thirds have a group, and three episodes of each."""
    file = tmp_path_factory.mktemp("grouped") / "train.jsonl"
    named = [row | {"group": name} for row, name in zip(rows_of(ROOT / assets["prompts"]), ["easy", None, "hard"] * 8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in named))
    return dict(assets, prompts=str(file), episodes_per_prompt=3, total_episodes=32, score_clip=1.2, beta_critic=1.5,
                beta_policy=10.0, group_head_lr=0.01, lr=1e-3, critic_lr=1e-3)


@pytest.fixture(scope="module")
def spied(grouped, tmp_path_factory):
    """Two updates of 16 episodes, two epochs of four micro-batches."""
    return observe(grouped, tmp_path_factory.mktemp("spied") / "run")


@pytest.fixture(scope="module")
def counted(grouped, tmp_path_factory):
    """Two updates with three groups alike, the letters t in place of the reward model: the longer the better."""
    flags = dict(grouped, reward_function="test_ppo:count_the", missing_eos_score=None, num_groups=3)
    return observe(flags, tmp_path_factory.mktemp("counted") / "run", group_variance="uniform", beta_policy=2.0)


@pytest.fixture(params=["spied", "counted"])
def either(request):
    return request.getfixturevalue(request.param)


def test_run_has_sure_labels_and_negative_multipliers(spied):
    """The shared run is a fair one: labels far from equal, kappas on both sides of 0, scores that are clipped."""
    for u in spied.updates:
        assert u.labels.std(0).min() > 0.1 and 2 < u.ended.sum() < 16
    clipped = torch.stack([u.normalized.abs() > 1.19 for u in spied.updates])
    kappas = torch.stack([u.kappas for u in spied.updates])
    assert 2 < clipped.sum() < 24 and (kappas < -0.1).sum() > 2 and (kappas > 1.1).sum() > 2
    assert (spied.updates[1].kl.abs() > 1e-2).any()


def test_g1_episodes_of_a_prompt_stand_in_a_row(spied):
    """Each prompt three times in a row, over the border of two updates too, each time with noise of its own (G1)."""
    tokenizer = AutoTokenizer.from_pretrained(spied.flags["sft_model"])
    texts = [row["prompt"] for row in rows_of(ROOT / spied.flags["prompts"])]
    expected = [tokenizer(texts[i]).input_ids for i in ppo.prompts_of_episodes(range(11), 24, 1) for _ in range(3)][:32]
    assert [prompt for u in spied.updates for prompt in u.prompts] == expected
    calls = [call for call in spied.calls["sampling_noise"] if call.args[1] > 0]
    assert [list(call.args[2]) for call in calls] == [list(range(16)), list(range(16, 32))]
    noise = torch.cat([call.result for call in calls])
    assert len({tuple(row) for row in noise.tolist()}) == 32
    given = [call.args[2] for call in spied.calls["rollout"] if len(call.args[1]) == 16]
    assert torch.equal(torch.cat(given), noise)


def test_g2_scores_are_normalised_by_the_moments_of_all_so_far(spied):
    """A response without EOS has its -1 before moments are taken; a batch counts in its own moments; then comes the
    clip, and what is clipped goes into the rewards (T17, G2)."""
    seen, moments = [], (0, 0.0, 0.0)
    assert len(spied.calls["running_moments"]) == len(spied.calls["normalize"]) == 2
    for u, running, normal in zip(spied.updates, spied.calls["running_moments"], spied.calls["normalize"]):
        assert torch.equal(u.scores[~u.ended], torch.full_like(u.scores[~u.ended], -1.0)) and not u.ended.all()
        assert running.args[0] == moments and torch.equal(running.args[1], u.scores)
        moments = running.result
        seen += u.scores.tolist()
        expected = (u.scores.double() - np.mean(seen)) / np.std(seen, ddof=1)
        close(u.normalized, expected.clamp(-1.2, 1.2), 1e-5)
        assert torch.equal(normal.result, u.normalized)
    assert [call for call in spied.names if call in ("running_moments", "normalize", "gae")] == [
        "running_moments", "normalize", "gae"] * 2


@torch.no_grad()
def slow_values(o, model, query, response):
    """Values of the states before each token and after the last, in units of the first rollout's scores."""
    first = o.updates[0].scores.double()
    hidden = model.base_model(torch.tensor([query + response])).last_hidden_state
    raw = model.score(hidden)[0, len(query) - 1 :, 0] - 0.5
    return ((raw - first.mean()) / first.std())[: o.args.response_length], hidden[0]


def test_g3_values_are_in_units_of_the_first_rollout(spied):
    """The critic starts as the reward model in units of normalised scores: V after EOS is the normalised score (G3)."""
    model, u = AutoModelForSequenceClassification.from_pretrained(spied.flags["reward_model"]).eval(), spied.updates[0]
    for i, (query, response, length) in enumerate(rows(u)):
        values, _ = slow_values(spied, model, query, response)
        close(u.values[i, : len(values)], values, 1e-5)
        if length < 8:
            close(u.values[i, length].clamp(-1.2, 1.2), u.normalized[i], 1e-5)


def test_g3_units_are_set_once(spied):
    """Mean and sd of the first rollout's scores in both updates, though the running moments have moved on (G3)."""
    scores = spied.updates[0].scores.double()
    assert spied.units[0] == spied.units[1] and spied.calls["running_moments"][1].result[1:] != spied.units[0]
    close(spied.units[0], [scores.mean(), scores.std()], 1e-9)


def test_g2_held_out_reward_charges_kl_in_the_same_units(spied):
    """eval/rlhf_reward takes off kl_coef times the sd of the first rollout's scores for a nat (G2)."""
    last, before = spied.metrics[-1], spied.metrics[0]
    assert abs(last["eval/kl"]) > 1e-3
    close(last["eval/rlhf_reward"], last["eval/score"] - 0.3 * spied.units[0][1] * last["eval/kl"])
    assert before["eval/rlhf_reward"] == before["eval/score"]


@torch.no_grad()
def test_g4_labels_are_the_heads_at_the_last_real_token(spied):
    """The first labels are the head's on the state of each row's last token, EOS or where it is cut off (G4, T18)."""
    model, u = AutoModelForSequenceClassification.from_pretrained(spied.flags["reward_model"]).eval(), spied.updates[0]
    for i, (query, response, _) in enumerate(rows(u)):
        hidden = slow_values(spied, model, query, response)[1]
        close(u.labels[i], (spied.draw["weight"] @ hidden[-1] + spied.draw["bias"]).softmax(0), 1e-5)
    of_a_prompt = u.labels[:3, 0]  # three episodes of one prompt
    assert u.prompts[0] == u.prompts[2] and len({round(float(p), 4) for p in of_a_prompt}) == 3


def test_g5_group_returns_are_sums_of_rewards(either):
    """Gradient and multipliers are given the score less the KL that an episode pays, summed over its tokens (G5)."""
    gradients, multipliers = either.calls["label_gradient"], either.calls["advantage_multiplier"]
    for u, gradient, multiplier in zip(either.updates, gradients, multipliers, strict=True):
        expected = u.normalized - u.coefs[:, 0] * u.kl.sum(1)
        close(gradient.args[1], expected, 1e-5)
        assert torch.equal(gradient.args[1], multiplier.args[1]) and torch.equal(gradient.args[0], multiplier.args[0])
        assert gradient.args[2] == multiplier.args[3] == either.args.group_variance


def test_g8_advantages_are_multiplied_after_whitening_and_before_the_clip(either):
    """The losses are given the whitened advantages times kappa; the value targets know nothing of it (G8, T14)."""
    names = [name for name in either.names if name in ("advantage_multiplier", "masked_whiten", "policy_losses")]
    assert names[:3] == ["advantage_multiplier", "masked_whiten", "policy_losses"]
    for u in either.updates:
        advantages = u.advantages[u.mask]
        whitened = (u.advantages - advantages.mean()) / advantages.std(correction=0)
        beta, kind = either.args.beta_policy, either.args.group_variance
        kappas = gip.advantage_multiplier(u.labels, u.group_returns, beta, kind)
        assert torch.equal(kappas, u.kappas) and kappas.std() > 0.1
        expected = whitened * kappas[:, None]
        close(u.returns, u.advantages + u.values, 1e-6)
        losses_are_given(u, expected)


def losses_are_given(u, advantages):
    """Every micro-batch's policy losses are given these advantages (B, Tr), its value losses gae's returns."""
    for call in u.policy_losses:
        width = call.args[2].shape[1]
        counts = u.mask[call.rows, :width]
        close(call.args[2] * counts, advantages[call.rows, :width] * counts, 1e-4)
    for call in u.value_losses:
        assert torch.equal(call.args[2], u.returns[call.rows, : call.args[2].shape[1]])


def test_g10_rewards_pay_kl_by_the_probability_of_the_best_group(spied):
    """kl_coef times the probability of the group with the highest mean normalised score, at each token; gae gets these
    rewards (G10, G11, pitfall 3)."""
    for u, call in zip(spied.updates, spied.calls["adaptive_kl_coefs"]):
        best = int(np.argmax(slow_means(u.labels, u.normalized)[1]))
        assert call.args[1] is u.normalized and call.result[1] == best
        close(u.coefs[:, 0], 0.3 * u.labels[:, best], 1e-7)
        expected = -0.3 * u.labels[:, best : best + 1] * u.kl
        for i, n in enumerate(u.lengths.tolist()):
            expected[i, min(n, 7)] += u.normalized[i]
        close(u.rewards, expected, 1e-6)


def test_nothing_that_groups_decide_has_a_gradient(spied):
    """Labels, coefficients, rewards, multipliers and the label gradient are numbers (T12, pitfall 9)."""
    for u in spied.updates:
        for name in ("labels", "group_returns", "gradient", "kappas", "coefs", "rewards", "values", "returns"):
            assert not getattr(u, name).requires_grad, name
    for call in (call for u in spied.updates for call in u.policy_losses + u.value_losses):
        assert call.args[0].requires_grad and not call.args[1].requires_grad and not call.args[2].requires_grad


def test_each_model_gets_its_own_gradients_alone(spied):
    """Before a step of the policy critic and head hold none; after the critic's backward the policy does not (T12)."""
    policy, both, critic = [True, False, False], [False, True, True], [False, True, False]
    assert spied.held == [policy, both, critic, policy, critic] * 2


def test_g7_head_steps_in_the_first_epoch_only(spied):
    """One step of the head in each update, before the critic's, at a rate that falls linearly to 0, with an AdamW of
    its own (G7, G9)."""
    parts = [name for name in spied.names if name in ("policy", "critic", "group_head")]
    assert parts == ["policy", "group_head", "critic", "policy", "critic"] * 2
    assert [step.lr for step in steps_of(spied, "group_head")] == [0.01, 0.005]
    assert [step.lr for step in steps_of(spied, "critic")] == [1e-3, 1e-3, 5e-4, 5e-4]
    assert steps_of(spied, "group_head")[0].group == {"betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.01}


def test_g7_coefficients_are_those_of_the_rollout(spied):
    """Once an update, before any step of it: epochs and minibatches share them (G7, 1.7)."""
    important = [name for name in spied.names if name in ("label_gradient", "policy", "group_head")]
    assert important == ["label_gradient", "policy", "group_head", "policy"] * 2


def oracle(o, detach=False):
    """Gradients of the first step for critic and head by autograd, row by row without padding, of value loss -
    beta_critic * variance, over all episodes' labels at once; and these labels."""
    model, u = AutoModelForSequenceClassification.from_pretrained(o.flags["reward_model"]).eval(), o.updates[0]
    head = {name: value.clone().requires_grad_() for name, value in o.draw.items()}
    mean, sd = o.units[0]
    labels, value_loss = [], 0
    for i, (query, response, length) in enumerate(rows(u)):
        states = min(length + 1, o.args.response_length)
        hidden = model.base_model(torch.tensor([query + response])).last_hidden_state[0]
        values = (model.score(hidden)[len(query) - 1 :, 0][:states] - 0.5 - mean) / sd
        value_loss = value_loss + 0.5 * ((values - u.returns[i, :states]) ** 2).sum()
        state = hidden[len(query) - 1] if o.args.group_level == "prompt" else hidden[-1]
        state = state.detach() if detach else state
        labels.append((head["weight"] @ state + head["bias"]).softmax(0))
    variance = gip.group_variance(torch.stack(labels), u.group_returns, o.args.group_variance)
    (o.args.vf_coef * value_loss / u.value_mask.sum() - o.args.beta_critic * variance).backward()
    critic = {"classifier." + name: param.grad for name, param in model.named_parameters()}
    return critic, {name: value.grad for name, value in head.items()}, torch.stack(labels)


@pytest.mark.parametrize("changes", [
    dict(), dict(group_variance="uniform", group_level="prompt", num_groups=3, micro_batch_size=3),
    dict(invariance_estimator="exact", group_variance="uniform", micro_batch_size=16),
    dict(invariance_estimator="exact", group_level="prompt", dynamic_kl=False),
    dict(beta_critic=0.25)],
    ids=["default", "uniform-prompt", "exact-uniform", "exact-prompt", "beta"])
def test_g7_gradients_of_head_and_trunk_equal_autograd(grouped, tmp_path, changes):
    """Micro-batch by micro-batch, head and critic get the gradient of value loss - beta_critic * variance over all
    episodes in one go, to 1e-4, which is not that of the critic's value loss alone. Labels are of queries or of
    trajectories (T4, T13, G4, G7, pitfalls 2, 10, 18)."""
    o = observe(grouped, tmp_path / "run", total_episodes=16, num_ppo_epochs=1, **changes)
    critic, head, labels = oracle(o)
    close(o.updates[0].labels, labels, 1e-5)
    assert relative_error(steps_of(o, "group_head")[0].gradient, head) < 1e-4
    assert relative_error(steps_of(o, "critic")[0].gradient, critic) < 1e-4
    other = oracle(o, detach=True)[0]
    assert relative_error(critic, other) > 5e-3  # the variance's part is not nothing
    prompts = {}
    for prompt, row in zip(o.updates[0].prompts, o.updates[0].labels):
        prompts.setdefault(tuple(prompt), []).append(row)
    spread = max(float((torch.stack(some) - some[0]).abs().max()) for some in prompts.values())
    assert spread < 1e-5 if o.args.group_level == "prompt" else spread > 0.01


def test_g7_minibatches_share_the_variances_gradient(grouped, tmp_path):
    """At rates of 0 the mean of two minibatches' gradients of the head is that of all episodes at once (G7, 1.8)."""
    rates = dict(lr=0.0, critic_lr=0.0, group_head_lr=0.0)
    o = observe(grouped, tmp_path / "run", total_episodes=16, num_minibatches=2, **rates)
    found = [step.gradient for step in steps_of(o, "group_head")]
    assert len(found) == 2 and len(steps_of(o, "critic")) == 4
    mean = {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}
    assert relative_error(mean, oracle(o)[1]) < 1e-4
    assert relative_error(found[0], oracle(o)[1]) > 0.05


def test_g9_exact_takes_off_the_scores_part(grouped, tmp_path):
    """--invariance_estimator exact: the groups' returns are the normalised scores without KL; what is taken off the
    advantages loses its mean, is divided by the sd that whitens them, and nothing is multiplied (T11, G9)."""
    o, taken = observe(grouped, tmp_path / "run", invariance_estimator="exact"), []
    for u in o.updates:
        assert torch.equal(u.group_returns, u.normalized)
        mean, found = u.normalized.double().mean(), u.advantages[u.mask].double()
        means = torch.tensor(slow_means(u.labels, u.normalized)[1])
        off = 10.0 * (u.labels * (means - mean) * (2 * u.normalized[:, None] - means - mean)).sum(1)
        off = off - off.mean()
        expected = (u.advantages - found.mean() - off[:, None]) / found.std(correction=0)
        losses_are_given(u, expected)
        taken.append(off)
    assert torch.cat(taken).abs().max() > 0.1


def test_g8_multipliers_are_those_of_the_variance_asked_for(grouped, tmp_path):
    """--group_variance uniform: so are the multipliers, and they differ from those by mass (G6, G8)."""
    o = observe(grouped, tmp_path / "run", group_variance="uniform")
    for u, row in zip(o.updates, training(o.metrics)):
        uniform, mass = (gip.advantage_multiplier(u.labels, u.group_returns, 10.0, kind) for kind in ("uniform", "mass"))
        close(row["groups/kappa_max"], uniform.max(), 1e-4)
    assert abs(uniform.max() - mass.max()) > 1e-3


def test_g10_fixed_kl_is_charged_to_all_alike(grouped, tmp_path):
    """--no-dynamic_kl: kl_coef for every episode, in rewards and in objective/kl_coef (G10)."""
    o = observe(grouped, tmp_path / "run", dynamic_kl=False)
    for u, row in zip(o.updates, training(o.metrics)):
        close(u.coefs, torch.full((16, 1), 0.3), 1e-7)
        close(u.rewards.sum(1), u.normalized - 0.3 * u.kl.sum(1), 1e-5)
        close(row["objective/kl_coef"], 0.3)


def test_logged_metrics_equal_slow_loops(either):
    """Each group's means, by a double loop, from the highest score to the lowest; gap, variance, entropy, multipliers,
    coefficient and the rewards that pay it (G5, G6, G10)."""
    for u, row in zip(either.updates, training(either.metrics)):
        episodes = u.rewards.sum(1)
        order = np.argsort(slow_means(u.labels, u.normalized)[1])[::-1]
        shares, means = slow_means(u.labels, u.group_returns)
        kl_cost = (u.coefs[:, 0] * u.kl.sum(1)).mean()
        expected = {
            "objective/kl_coef": u.coefs.mean(), "objective/non_score_reward": -kl_cost,
            "objective/rlhf_reward": u.normalized.mean() - kl_cost, "objective/scores": u.scores.mean(),
            "objective/kl": u.kl.sum(1).mean(),
            "groups/variance": slow_variance(shares, means, either.args.group_variance),
            "groups/kappa_min": u.kappas.min(), "groups/kappa_max": u.kappas.max(),
            "groups/gap": means[order[0]] - means[order[-1]],
            "groups/label_entropy": -(u.labels * u.labels.log()).sum(1).mean(),
            "groups/grad_norm": np.mean([float(torch.cat([g.flatten() for g in step.gradient.values()]).norm())
                                         for step in steps_of(either, "group_head")[u.number :: 2]])}
        for place, g in enumerate(order):
            expected[f"group_{place}/share"] = shares[g]
            found = {"score": u.scores, "return": episodes, "kl": u.kl.sum(1), "length": u.lengths}
            for name, numbers in found.items():
                expected[f"group_{place}/{name}"] = slow_means(u.labels, numbers)[1][g]
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), abs=1e-5), name
        assert {name for name in row if name.startswith("group")} == {
            "groups/auc", *(name for name in expected if name.startswith("group"))}
    assert training(either.metrics)[1]["objective/non_score_reward"] != 0


def test_auc_compares_the_best_label_with_the_column_group(spied):
    """groups/auc: the best group's probability against the prompts' groups, those without one left out."""
    group_of = {row["prompt"]: row["group"] for row in rows_of(ROOT / spied.flags["prompts"])}
    for u, row in zip(spied.updates, training(spied.metrics)):
        groups = [group_of[text] for text in u.texts]
        best = int(np.argmax(slow_means(u.labels, u.normalized)[1]))
        assert {None, "easy", "hard"} == set(groups)
        close(row["groups/auc"], slow_auc(u.labels[:, best].tolist(), u.scores.tolist(), groups), 1e-9)


def test_labels_in_another_order_change_nothing(grouped, spied, tmp_path):
    """A head with the signs turned has its two groups swapped: the same run, to rounding (T6, pitfall 3)."""
    o = observe(grouped, tmp_path / "run", scale=-10.0)
    close(o.updates[0].labels, spied.updates[0].labels.flip(1), 1e-6)
    for found, expected in zip(o.metrics, spied.metrics):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_saved_group_head_is_the_trained_one(spied):
    """group_head.safetensors has the weights that the head had in the end, which are not its draw."""
    found = load_file(spied.folder / "group_head.safetensors")
    trained = spied.engines[2].module.state_dict()
    assert found.keys() == trained.keys() == {"weight", "bias"}
    for name, value in found.items():
        assert torch.equal(value, trained[name]) and not torch.equal(value, spied.draw[name])
    assert not list(spied.folder.glob("*.unfinished"))


# ---- Parity with ppo.py -----------------------------------------------------------------------------------


OFF = dict(beta_critic=0.0, beta_policy=0.0, dynamic_kl=False)
FILES = ("samples.jsonl", "model.safetensors", "critic/model.safetensors")


@pytest.fixture(scope="module")
def plain(assets, tmp_path_factory):
    """ppo.py, three updates of two minibatches."""
    flags = dict(assets, total_episodes=48, num_minibatches=2)
    folder = tmp_path_factory.mktemp("plain") / "run"
    return SimpleNamespace(flags=flags, folder=folder, metrics=run(flags, folder, ppo))


@pytest.mark.parametrize("changes", [dict(), dict(invariance_estimator="exact", group_level="prompt", num_groups=3)],
                         ids=["advantage", "exact"])
def test_without_groups_it_is_ppo_to_the_bit(plain, tmp_path, monkeypatch, changes):
    """Both betas 0, fixed KL, raw scores: samples, policy, critic and shared metrics of ppo.py, of which two are added
    up in another order. The head stays at its draw and in no backward pass (T1, pitfall 17)."""
    forward, with_gradient = gip.GroupHead.forward, []
    monkeypatch.setattr(gip.GroupHead, "forward", lambda head, states: (
        with_gradient.append(torch.is_grad_enabled()), forward(head, states))[1])
    metrics = run(plain.flags, tmp_path / "run", **OFF, score_clip=0.0, **changes)
    for name in FILES:
        assert digest(tmp_path / "run" / name) == digest(plain.folder / name), name
    for found, expected in zip(metrics, plain.metrics, strict=True):
        assert expected.keys() <= found.keys()
        for name, value in expected.items():
            summed = name in ("objective/non_score_reward", "objective/rlhf_reward")
            assert found[name] == (pytest.approx(value, abs=1e-7) if summed else value), name
        assert "groups/auc" not in found  # as no prompt has a group
    assert len(with_gradient) > 8 and not any(with_gradient)
    head, found = gip.GroupHead(64, changes.get("num_groups", 2), 1), load_file(tmp_path / "run/group_head.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in head.state_dict().items())


def test_head_on_a_detached_trunk_changes_no_other_bit(assets, tmp_path, monkeypatch):
    """beta_critic 1 where the head's states have no way back into the critic: policy, critic and samples of beta_critic
    0, clipped gradients and all, while the head learns; with the way back the critic is another one (T2, pitfalls 16,
    18)."""
    read = gip.values_and_states

    def detached(*args):
        values, states = read(*args)
        return values, states.detach()

    flags = dict(assets, total_episodes=32, beta_policy=0.0, dynamic_kl=False, max_grad_norm=0.05)
    run(flags, tmp_path / "without", beta_critic=0.0)
    run(flags, tmp_path / "shared", beta_critic=1.0)
    monkeypatch.setattr(gip, "values_and_states", detached)
    run(flags, tmp_path / "detached", beta_critic=1.0)
    for name in FILES:
        assert digest(tmp_path / "detached" / name) == digest(tmp_path / "without" / name), name
    assert weights(tmp_path / "shared/critic") != weights(tmp_path / "without/critic")
    draw = gip.GroupHead(64, 2, 1).weight
    for name, learns in (("without", False), ("detached", True), ("shared", True)):
        assert torch.equal(load_file(tmp_path / name / "group_head.safetensors")["weight"], draw) != learns


# ---- More runs --------------------------------------------------------------------------------------------


def test_micro_batches_change_no_weight(grouped, tmp_path):
    """Micro-batches of 1 and 8 episodes: the gradients of policy, critic and head to 1e-5, the weights after the update
    too (T13, pitfall 10)."""
    flags = dict(grouped, batch_size=8, total_episodes=8, num_ppo_epochs=1, adam_eps=1e-2)
    runs = [observe(flags, tmp_path / f"{size}", micro_batch_size=size) for size in (1, 8)]
    for one, eight in zip(*(o.steps for o in runs), strict=True):
        assert one.part == eight.part and relative_error(one.gradient, eight.gradient) < 1e-5
    for name in ("model", "critic/model", "group_head"):
        one, eight = (load_file(o.folder / f"{name}.safetensors") for o in runs)
        assert relative_error(one, eight) < 1e-5


@pytest.fixture(scope="module")
def long_run(grouped, tmp_path_factory):
    """Four updates with two minibatches and whitened rewards, a checkpoint after each."""
    flags = dict(grouped, batch_size=8, num_minibatches=2, save_every=1, eval_every=2, whiten_rewards=True,
                 group_variance="uniform", beta_policy=0.5)
    return observe(flags, tmp_path_factory.mktemp("long") / "run")


def test_resumed_run_is_bit_identical(long_run, tmp_path):
    """A run killed after update 2 and resumed ends with the same bits, the head's too, and the critic's units are those
    of the first rollout of all (G2, G3)."""
    folder = tmp_path / "run"
    shutil.copytree(long_run.folder, folder)
    files = ("model.safetensors", "critic/model.safetensors", "group_head.safetensors")
    for name in ("summary.json", *files):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints/step_0000003")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000002"]
    resumed = observe(long_run.flags, folder, resume=True)
    assert len(resumed.units) == 2 and set(resumed.units) == set(long_run.units) and len(set(long_run.units)) == 1
    for name in ("metrics.jsonl", "samples.jsonl", *files):
        assert digest(folder / name) == digest(long_run.folder / name), name


def test_minibatches_each_step_the_head_in_the_first_epoch(long_run):
    """Two steps of the head in each update, at the update's rate; the gradient comes from the rollout's labels (G7)."""
    assert [step.lr for step in steps_of(long_run, "group_head")] == pytest.approx(
        [0.01, 0.01, 0.0075, 0.0075, 0.005, 0.005, 0.0025, 0.0025])
    assert len(long_run.calls["label_gradient"]) == 4


def test_g5_group_returns_are_those_before_rewards_are_whitened(long_run):
    """--whiten_rewards does not reach the groups' returns, nor kappa the whitening (G5, G8)."""
    for u in long_run.updates:
        assert torch.equal(u.group_returns, u.token_rewards.sum(1)) and not torch.equal(u.rewards, u.token_rewards)


def test_g3_critic_of_zeros_has_no_units(grouped, counted, byte_reward_model, tmp_path):
    """A critic that starts from a head of zeros, as there is a reward function or a reward model of other tokens, keeps
    mean 0 and sd 1: its first values are 0, later ones not (G3)."""
    retokenized = observe(grouped, tmp_path / "run", reward_model=byte_reward_model, retokenize=True)
    for o in (counted, retokenized):
        assert o.units == [(0.0, 1.0)] * 2 and len(o.calls["running_moments"]) == 2
        assert (o.updates[0].values == 0).all() and (o.updates[1].values != 0).any()


def test_smoke_of_three_groups_of_prompts_uniform_and_exact(grouped, tmp_path):
    """Three updates with three groups, uniform, exact, labels of prompts: all is finite, each group is logged (T19)."""
    flags = dict(grouped, num_groups=3, group_variance="uniform", invariance_estimator="exact", group_level="prompt")
    metrics = training(run(flags, tmp_path / "run", total_episodes=48))
    assert len(metrics) == 3 and all(np.isfinite(list(row.values())).all() for row in metrics)
    for row in metrics:
        assert sum(row[f"group_{g}/share"] for g in range(3)) == pytest.approx(1.0)
        assert row["groups/gap"] == pytest.approx(row["group_0/return"] - row["group_2/return"])
    assert load_file(tmp_path / "run/group_head.safetensors")["weight"].shape == (3, 64)


def test_equal_scores_do_not_stop_a_run(grouped, tmp_path):
    """A sparse reward that is 0 for a whole first batch: normalised scores 0, multipliers 1, all finite (T8, T17)."""
    metrics = run(grouped, tmp_path / "run", reward_function="test_ppo:return_zero", missing_eos_score=None)
    first = training(metrics)[0]
    assert first["objective/rlhf_reward"] == first["objective/scores"] == 0.0
    close([first["groups/kappa_min"], first["groups/kappa_max"]], [1.0, 1.0])
    assert all(np.isfinite(list(row.values())).all() for row in metrics)


def late(queries, responses):
    """Reward function whose scores are all 0 until the second update: the letters t, from the fourth call on."""
    late.calls += 1
    return [float(response.count("t")) * (late.calls > 3) for response in responses]


def test_g2_held_out_reward_charges_kl_after_a_first_rollout_of_equal_scores(grouped, tmp_path):
    """With no spread to measure in, a nat costs kl_coef as it is, as scores and values stay as they are (G2)."""
    late.calls = 0  # a trial, the first evaluation, the first update
    last = run(grouped, tmp_path / "run", reward_function=f"{__name__}:late", missing_eos_score=None)[-1]
    assert abs(last["eval/kl"]) > 1e-3
    close(last["eval/rlhf_reward"], last["eval/score"] - 0.3 * last["eval/kl"])


@pytest.mark.parametrize("flag, value", [("num_groups", 1), ("episodes_per_prompt", 0), ("beta_critic", -1.0),
                                         ("beta_policy", -0.1), ("score_clip", -5.0), ("group_head_lr", -1e-3)])
def test_numbers_that_make_no_sense_are_refused(assets, tmp_path, capsys, flag, value):
    """One line that names the flag, before anything is loaded or written."""
    with pytest.raises(SystemExit):
        run(assets, tmp_path / "run", **{flag: value})
    error = capsys.readouterr().err
    assert error.startswith(f"error: --{flag} {value}: must be at least") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_raw_scores_have_no_moments(grouped, tmp_path):
    """--score_clip 0: scores go into the rewards as they are, and the critic's values are raw too (G2, G3)."""
    o = observe(grouped, tmp_path / "run", score_clip=0.0, total_episodes=16)
    assert not o.calls["running_moments"] and o.units == [(0.0, 1.0)]
    assert torch.equal(o.updates[0].normalized, o.updates[0].scores)
    last = o.metrics[-1]
    close(last["eval/rlhf_reward"], last["eval/score"] - 0.3 * last["eval/kl"])
