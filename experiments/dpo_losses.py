"""More losses for dpo.py, drop-in by signature: python -m experiments.dpo_losses --loss nca

Runs dpo.py with all its flags, and these losses besides its own three. To use one in your own copy, paste the function
and add it to LOSSES. As in dpo.py, with y_w chosen and y_l rejected, sums over tokens,

    u = log pi(y_w|x) - log ref(y_w|x),  v = log pi(y_l|x) - log ref(y_l|x),  h = u - v

logprobs, ref_logprobs: (2, B), chosen in row 0 and rejected in row 1; all return (B,). Losses and gradients stay finite
at beta h = +-100. Where a loss has a label_smoothing of its own, --label_smoothing 0 means that value. On several GPUs:
deepspeed --module experiments.dpo_losses --loss nca

The last four want more of a pair than its log-probabilities, so they are no values of --loss: `lengths` (2, B), the
tokens of each response, EOS included, or `probabilities` (B,). In your own copy, hand that to the loss at its two
calls: dpo.py has the lengths from collate_pairs, and in load_preferences' pairs.

Left out: losses whose value for a pair depends on the other pairs of its micro-batch (KTO-pair, AOT, BCO with a running
mean), and DiscoPOP, which overflows in fp32.
"""

import math

import torch.nn.functional as F
import tyro

import dpo


def robust_losses(logprobs, ref_logprobs, beta, label_smoothing=0.1):
    """Robust DPO (arXiv 2403.00409): [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2e), e = label_smoothing < 1/2.

    Unlike cDPO's, its mean over flipped labels (a share e of them) is the DPO loss of the true ones.
    """
    u, v = logprobs - ref_logprobs
    h, e = u - v, label_smoothing
    return (-(1 - e) * F.logsigmoid(beta * h) + e * F.logsigmoid(-beta * h)) / (1 - 2 * e)


def exo_losses(logprobs, ref_logprobs, beta, label_smoothing=1e-3):
    """EXO for pairs (arXiv 2402.00856): KL from (s(beta h), s(-beta h)) to the labels (1 - e, e), e > 0."""
    u, v = logprobs - ref_logprobs
    h, e = u - v, label_smoothing
    return (beta * h).sigmoid() * (F.logsigmoid(beta * h) - math.log(1 - e)) + (-beta * h).sigmoid() * (
        F.logsigmoid(-beta * h) - math.log(e))


def nca_losses(logprobs, ref_logprobs, beta):
    """NCA for pairs (arXiv 2402.05369): -log s(beta u) - [log s(-beta u) + log s(-beta v)] / 2.

    Holds the chosen reward near its start where DPO lets it fall.
    """
    u, v = beta * (logprobs - ref_logprobs)
    return -F.logsigmoid(u) - 0.5 * F.logsigmoid(-u) - 0.5 * F.logsigmoid(-v)


def apo_zero_losses(logprobs, ref_logprobs, beta):
    """APO-zero (arXiv 2408.06266): 1 - s(beta u) + s(beta v), chosen up and rejected down."""
    u, v = beta * (logprobs - ref_logprobs)
    return (-u).sigmoid() + v.sigmoid()


def apo_down_losses(logprobs, ref_logprobs, beta):
    """APO-down (arXiv 2408.06266): s(beta u) + 1 - s(beta h), both down, rejected more."""
    u, v = beta * (logprobs - ref_logprobs)
    return u.sigmoid() + (v - u).sigmoid()


def sppo_hard_losses(logprobs, ref_logprobs, beta):
    """SPPO with hard labels (arXiv 2405.00675): (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2."""
    u, v = logprobs - ref_logprobs
    return (u - 1 / (2 * beta)) ** 2 + (v + 1 / (2 * beta)) ** 2


def ipo_per_token_losses(logprobs, ref_logprobs, beta, lengths):
    """IPO with means over tokens, as TRL has it from 0.7.11 on: (u / n_w - v / n_l - 1 / (2 beta))^2."""
    u, v = (logprobs - ref_logprobs) / lengths.clamp(min=1)
    return (u - v - 1 / (2 * beta)) ** 2


def length_normalized_losses(logprobs, ref_logprobs, beta, lengths):
    """DPO on means over tokens, as in Tulu 3 (arXiv 2411.15124): -log s(beta (u / n_w - v / n_l)). Beta: larger."""
    u, v = (logprobs - ref_logprobs) / lengths.clamp(min=1)
    return -F.logsigmoid(beta * (u - v))


def simpo_losses(logprobs, beta, lengths, margin=1.0):
    """SimPO (arXiv 2405.14734): -log s(beta (log pi_w / n_w - log pi_l / n_l) - margin). No reference; beta about 2."""
    chosen, rejected = logprobs / lengths.clamp(min=1)
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def soft_label_losses(logprobs, ref_logprobs, beta, probabilities):
    """DPO with a probability (B,) per pair that its label is right: -p log s(beta h) - (1 - p) log s(-beta h).

    RLHFlow's code takes p = s(reward of chosen - reward of rejected), by a reward model.
    """
    return dpo.sigmoid_losses(logprobs, ref_logprobs, beta, label_smoothing=1 - probabilities)


LOSSES = {
    "robust": robust_losses, "exo": exo_losses, "nca": nca_losses, "apo_zero": apo_zero_losses,
    "apo_down": apo_down_losses, "sppo_hard": sppo_hard_losses}
SMOOTHED = {"robust", "exo"}

if __name__ == "__main__":
    dpo.LOSSES |= LOSSES
    dpo.SMOOTHED |= SMOOTHED
    dpo.main(tyro.cli(dpo.Args))
