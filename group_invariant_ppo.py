"""Group invariant PPO: ppo.py, which also infers groups of episodes and evens out their returns.

Paper: "Improving Generalization of Alignment with Human Preferences through Group Invariant Learning" (Zheng et al.
2023, arXiv 2310.11971). No code of it is public, and much here is reconstructed: docs/group_invariant.md says what.
  stage 1: a group head on the critic learns labels p(g|x, y) that maximise the variance of the groups' returns
  stage 2: the policy minimises that variance too: advantages count less in groups with more than the mean return
  KL: an episode's penalty is weighted with its probability of the best group
`[detail N]` are the N+ paper's, `[G N]` this one's, `[E N]` our own choices; docs/details.md has each with its reason.
`Paper:` in the flags is this paper's value, or N+'s where this one's is not known (seeds, AdamW, episodes, lengths).

Differs from the N+ paper's code, and so in the numbers:
  1. losses, whitening and metrics are means over all ranks, not per rank or micro-batch      [E2] [E8]
  2. policy and critic have an optimizer each                                                 [E9]
  3. sampling stops at EOS, which changes nothing that counts                                 [E10]
  4. a token's noise is addressed by (seed, update, episode, position), not drawn in turn     [E11]

Run:     python group_invariant_ppo.py                   the embedded task, CPU, minutes
         deepspeed group_invariant_ppo.py --lr 5e-7      every GPU of this machine
Reads:   --sft_model; --reward_model or --reward_function; --prompts with a column {prompt}, perhaps {group} to compare
Writes:  --output_dir: the policy as a Hugging Face folder, critic/, group_head.safetensors, best/, metrics.jsonl,
         samples.jsonl, summary.json, TensorBoard, checkpoints
Result:  docs/group_invariant.md (CPU-sized tasks); not yet measured at the paper's scale

Shapes:  B episodes of this rank, Tr response tokens (right-padded), Tq query tokens (left-padded, while sampling),
         T tokens of the longest query and response in a micro-batch of b rows (left-padded), V vocabulary, M groups.
         Response token t was sampled in the state before it, whose value is V_t.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from transformers import DynamicCache

from utils.data import auc_of_groups, load_grouped_prompts
from utils.data import call_judge, chunks, load_function, load_prompts, pad, permutation
from utils.launch import all_max, all_sum, check_batch_size, check_flags, create_engine, fail, fail_together
from utils.launch import finish, gather_rows, init_distributed, note_small_lr, on_device, optimizer_step, print0
from utils.launch import print_memory_plan, rank, rollout_weights, world_size
from utils.models import check_length, count_parameters, decode_responses, eos_token_ids, load_causal_lm
from utils.models import load_classifier, load_tokenizer, save_model
from utils.models import save_weights
from utils.run import Tracker, choose_folder, interrupted, leave_interrupted, load_checkpoint, model_card, open_folder
from utils.run import save_checkpoint, stop_if_not_finite


@dataclass
class Args:
    # models and data
    sft_model: str = "assets/sft"
    """policy and reference start here: Hugging Face folder or Hub id"""
    reward_model: str = "assets/reward_model"
    """scores responses, and the critic starts from it (detail 22): folder or Hub id"""
    retokenize: bool = False
    """for a reward model with another tokenizer: it reads decoded texts, and the critic starts from the SFT model"""
    allow_pickle: bool = False
    """read model folders whose weights are pickled (.bin) alone: a pickle of a stranger may run code when it is read"""
    reward_function: str | None = None
    """module:name of a Python function of texts, (queries, responses) -> scores, in place of the reward model"""
    gold_function: str | None = "assets.vader:positive"
    """module:name of such a function that only watches. The default judges the embedded task; None: no judge"""
    prompts: str = "assets/data/train.jsonl"
    """prompts: .jsonl, .json, .csv, .parquet, folder or Hub id; column {prompt}. Paper: those of Anthropic/hh-rlhf"""
    eval_prompts: str = "assets/data/validation.jsonl"
    """held-out prompts"""
    max_prompt_length: int = 32
    """tokens; longer prompts are dropped and counted, TL;DR posts cut (detail 2). Paper: 512"""

    # rollouts
    episodes_per_prompt: int = 1
    """episodes of a prompt in a row [G1]. Paper: 8"""
    response_length: int = 24
    """tokens to sample at most. Paper: 512"""
    temperature: float = 0.7
    """sampling temperature; log-probabilities are taken at the same one (detail 27). Paper: 0.8"""
    top_p: float = 1.0
    """sample from the smallest set of tokens with this probability; log-probabilities ignore it. Paper: 0.9"""
    repetition_penalty: float = 1.0
    """divide the logits of tokens seen before while sampling; log-probabilities ignore it. Paper: 1.1"""
    missing_eos_score: float | None = -1.0
    """replaces the score of a response without EOS (detail 23). Paper: -1.0; None: keep the score"""
    rollout_batch_size: int = 64
    """sequences decoded together per rank; changes memory and speed only. Paper: 64"""
    offload_frozen: bool = False
    """keep reference and reward model in CPU memory while they are not used. Paper: True for 6.9B (detail 48)"""

    # PPO [detail 20]
    total_episodes: int = 3200
    """episodes to roll out in all. Paper: 1,000,000"""
    batch_size: int = 64
    """episodes per update, over all ranks. Paper: 64"""
    num_ppo_epochs: int = 4
    """passes over the episodes of an update. Paper: 1"""
    num_minibatches: int = 1
    """optimizer steps per pass. Paper: 1"""
    micro_batch_size: int = 32
    """sequences per forward and rank; changes memory and speed, not the gradient. Paper: 16 (1B) to 1 (6.9B)"""
    lr: float = 5e-4
    """learning rate of the policy, falling linearly to 0. Paper: 5e-7"""
    critic_lr: float = 5e-4
    """learning rate of the critic, falling linearly to 0. Paper: 9e-6"""
    weight_decay: float = 0.01
    """AdamW weight decay. Paper: 0.01, torch's default (detail 43)"""
    adam_eps: float = 1e-5
    """AdamW epsilon. Paper: 1e-5"""
    max_grad_norm: float = 0.0
    """clip each model's global gradient norm here; 0 = off. Paper: off (detail 44)"""
    kl_coef: float = 0.2
    """price of a nat of KL from the reference, in normalised scores. Paper: 0.05"""
    gamma: float = 1.0
    """discount. Paper: 1.0"""
    lam: float = 0.95
    """lambda of generalised advantage estimation. Paper: 0.95"""
    cliprange: float = 0.2
    """clip range of the ratio. Paper: 0.2"""
    cliprange_value: float = 0.2
    """clip range of the value around the rollout's. Paper: 0.2"""
    vf_coef: float = 1.0
    """weight of the value loss. Paper: 1.0"""
    whiten_rewards: bool = False
    """whiten rewards too, keeping their mean (detail 24). Paper: False"""
    score_clip: float = 5.0
    """scores are normalised by their running moments and clipped at plus and minus this; 0: neither. Paper: 5.0"""

    # group invariance
    num_groups: int = 2
    """groups to infer. Paper: 2"""
    beta_critic: float = 1.0
    """weight of the between-group variance that critic and group head maximise. Paper: 1.0"""
    beta_policy: float = 0.01
    """weight of the between-group variance that the policy minimises. Paper: 0.01"""
    dynamic_kl: bool = True
    """times kl_coef: the probability of the best group. Paper: True"""
    group_level: Literal["trajectory", "prompt"] = "trajectory"
    """a group of queries and responses, or of queries alone. Paper: trajectory"""
    group_variance: Literal["mass", "uniform"] = "mass"
    """groups count by their shares, or all alike. Paper: uniform, as printed"""
    invariance_estimator: Literal["advantage", "exact"] = "advantage"
    """gradient of the variance with advantages, labels taken as fixed, or with scores, exact. Paper: not known"""
    group_head_lr: float = 5e-4
    """learning rate of the group head, falling linearly to 0. Paper: not known"""
    detach_group_trunk: bool = False
    """train the group head alone on the variance, not the critic under it. Paper: False"""

    # evaluation
    eval_every: int = 10
    """updates between evaluations on held-out prompts; one comes before the first, one after the last. Paper: 1"""
    num_eval_prompts: int = 500
    """held-out prompts, each continued with the same noise every time"""

    # run
    seed: int = 1
    """decides the order of the prompts and all sampling noise. Paper: 44413, 55513, 66613, 77713"""
    output_dir: str | None = None
    """where to write; default runs/group_invariant_ppo, or runs/group_invariant_ppo-2, ... if that exists"""
    resume: bool = False
    """continue the run in output_dir from its last checkpoint, exactly"""
    overwrite: bool = False
    """replace an earlier run in output_dir"""
    save_every: int = 10
    """updates between checkpoints"""

    # machine
    zero_stage: int = 0
    """DeepSpeed ZeRO stage: 0, 2 or 3. Paper: 2"""
    offload_optimizer: bool = False
    """keep optimizer state in CPU memory (ZeRO 2 and 3)"""
    bf16: bool = False
    """bf16 weights with fp32 master weights (GPUs). Paper: True"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""
    timeout_minutes: float = 30.0
    """end the run when ranks wait for one another longer than this"""
    local_rank: int = -1
    """set by the deepspeed launcher"""

    @property
    def num_updates(self):
        return self.total_episodes // self.batch_size  # [detail 41] a last incomplete batch is left out


# ---- Data -------------------------------------------------------------------------------------------------


def prompts_of_episodes(episodes, num_prompts, seed):
    """Index of the prompt of each n-th episode ever: all prompts, in a new order on every pass [detail 21]."""
    orders = {epoch: permutation(num_prompts, seed, epoch) for epoch in {n // num_prompts for n in episodes}}
    return [orders[n // num_prompts][n % num_prompts] for n in episodes]


def sampling_noise(seed, update, episodes, length):
    """Uniforms u[i, t] in [0, 1) that depend on (seed, update, episode, t) alone [E11]: (B, length) float64.

    So samples do not depend on ranks (theirs: a seed for each [detail 46]), the batch, or rows that have ended.
    """
    return torch.tensor(np.stack([np.random.default_rng((seed, update, n)).random(length) for n in episodes]))


# ---- Model ------------------------------------------------------------------------------------------------


class ScalarModel(torch.nn.Module):
    """One number per token from AutoModelForSequenceClassification: its `score` head on every hidden state.

    forward(ids (B, T), mask (B, T) bool) -> (B, T) fp32, less the config's constant `reward_mean` [detail 15].
    As reward model it is read at the last token, as critic at every token.
    """

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier
        self.reward_mean = getattr(classifier.config, "reward_mean", 0.0)  # not trained

    def forward(self, ids, mask):
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)  # [detail 14] [detail 45] on any padding side
        hidden = self.classifier.base_model(  # [detail 11] the last hidden state, after the final layer norm
            input_ids=torch.where(mask, ids, 0), attention_mask=mask.long(), position_ids=position_ids,
            use_cache=False).last_hidden_state  # (B, T, d)
        return self.classifier.score(hidden).squeeze(-1).float() - self.reward_mean


class GroupCritic(ScalarModel):
    """Values (B, T) in units of normalised scores [G3], and each row's state `back` (B,) before its last [G4]."""

    mean, sd = 0.0, 1.0  # of the first rollout's scores

    def forward(self, ids, mask, back):
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)  # as above
        hidden = self.classifier.base_model(
            input_ids=torch.where(mask, ids, 0), attention_mask=mask.long(), position_ids=position_ids,
            use_cache=False).last_hidden_state
        values = self.classifier.score(hidden).squeeze(-1).float() - self.reward_mean
        return (values - self.mean) / (self.sd or 1.0), hidden[torch.arange(len(ids), device=ids.device), -1 - back]


class GroupHead(torch.nn.Module):
    """Soft labels p(g | state): states (b, d) of the critic -> (b, M) fp32, rows sum to 1 [G4]."""

    def __init__(self, hidden_size, num_groups, seed):
        super().__init__()  # never zeros: equal labels are a saddle of the variance. No draw from the global generator
        weight = torch.randn(num_groups, hidden_size, generator=torch.Generator().manual_seed(seed)) / hidden_size**0.5
        self.weight, self.bias = torch.nn.Parameter(0.2 * weight), torch.nn.Parameter(torch.zeros(num_groups))

    def forward(self, states):
        return torch.nn.functional.linear(states, self.weight, self.bias).float().softmax(-1)


def response_logits(model, ids, mask, response_width, temperature, forbidden):
    """Logits (B, response_width, V) in fp32 that the response, the last columns of ids (B, T), was drawn from.

    Token t is predicted one position before it, hence the window shifted by one [detail 28]. Logits are divided
    by the sampling temperature [detail 27]; tokens that are never sampled get no probability [E12].
    """
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)  # [detail 45] the same for any padding side
    ids = torch.where(mask, ids, 0)  # [detail 3] PAD is never embedded
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids, use_cache=False,
                   logits_to_keep=response_width + 1).logits[:, :-1]  # response positions only
    return scale_logits(logits, temperature, forbidden)


def state_values(values, response_width, shift, response_length):
    """Of values (B, T), those of the states before each token of the response, the last columns [detail 28].

    One more, that of the state after its last token, follows where a response has room for it [detail 31]: left-
    aligned, (B, min(response_width + 1, response_length)).
    """
    return left_aligned(values[:, -response_width - 1 :], shift)[:, :response_length]


def scale_logits(logits, temperature, forbidden):
    """Logits of the sampling distribution, before top-p and repetition penalty, in fp32. forbidden: (V,) bool."""
    logits = logits.float() / (temperature + 1e-7)  # [detail 26]
    return logits.masked_fill_(forbidden, torch.finfo(torch.float32).min)


def load_models(args, tokenizer):
    """policy, ref_policy, critic, reward_model and its tokenizer, all without dropout [detail 7].

    The reward model is None where a Python function takes its place; its tokenizer is None where it is the policy's.
    """
    policy = load_causal_lm(args.sft_model, "--sft_model", tokenizer)
    ref_policy = load_causal_lm(args.sft_model, "--sft_model", tokenizer, args.bf16).eval()
    reward_model = retokenizer = None
    if not args.reward_function:
        own_tokenizer = load_tokenizer(args.reward_model, "--reward_model")
        if own_tokenizer.get_vocab() != tokenizer.get_vocab():
            if not args.retokenize:
                fail(f"--reward_model {args.reward_model}: its vocabulary differs from that of --sft_model "
                     f"{args.sft_model}. Train a reward model from this SFT model with reward_model.py, or pass "
                     "--retokenize: this one then reads decoded texts")
            retokenizer = own_tokenizer
        reward_model = load_classifier(args.reward_model, "--reward_model", own_tokenizer, args.bf16)
        reward_model = ScalarModel(reward_model).eval()
    if reward_model and not retokenizer:
        classifier = load_classifier(args.reward_model, "--reward_model", tokenizer)
    else:  # [E13] no reward model of these tokens to start the critic from: the SFT model with a head of zeros
        print0(f"{'critic':<22}starts from {args.sft_model} with a head of zeros, not from a reward model")
        classifier = load_classifier(args.sft_model, "--sft_model", tokenizer, new_head=True)
        torch.nn.init.zeros_(classifier.score.weight)
    for model in (policy, classifier):
        check_length(model, args.max_prompt_length + args.response_length, "--max_prompt_length + --response_length")
    critic = ScalarModel(classifier)  # [detail 22] a model of its own, from the reward model, constant and all
    return policy, ref_policy, critic, reward_model, retokenizer


# ---- Algorithm: sampling ----------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model, queries, query_mask, noise, temperature, top_p, repetition_penalty, forbidden, eos_ids, pad_id
):
    """Sample a response to each query until EOS, or until the noise ends.

    queries, query_mask: (B, Tq), left-padded; noise: (B, Tr) uniforms. Returns responses (B, Tr), PAD after EOS.
    Ended rows leave the batch [E10]; the paper goes on sampling, feeds it to policy and critic [detail 29], masks it.
    The model's stored generation config is never read.
    """
    responses = torch.full(noise.shape, pad_id, device=queries.device)  # (B, Tr)
    alive = torch.arange(len(queries), device=queries.device)  # rows still being decoded
    cache = DynamicCache(config=model.config)
    mask = query_mask
    ids, position_ids = torch.where(mask, queries, 0), (mask.long().cumsum(-1) - 1).clamp(min=0)
    seen = torch.zeros(len(queries), len(forbidden), device=queries.device)  # (B, V), for the repetition penalty
    seen.scatter_add_(1, ids, mask.float())
    for t in range(noise.shape[1]):
        logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids, logits_to_keep=1,
                       past_key_values=cache, use_cache=True).logits[:, -1].float()  # (alive, V)
        if repetition_penalty != 1.0:
            penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen > 0, penalised, logits)
        logits = scale_logits(logits, temperature, forbidden)
        if top_p < 1.0:
            logits = keep_top_p(logits, top_p)
        tokens = inverse_cdf(logits, noise[alive, t])  # (alive,)
        responses[alive, t] = tokens
        seen.scatter_(1, tokens[:, None], 1.0)
        going_on = (~torch.isin(tokens, eos_ids)).nonzero().squeeze(1)
        if len(going_on) < len(alive):
            alive, tokens, mask, seen = alive[going_on], tokens[going_on], mask[going_on], seen[going_on]
            cache.batch_select_indices(going_on)
        if len(alive) == 0:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ids, position_ids = tokens[:, None], mask.sum(1, keepdim=True) - 1
    return responses


def forbidden_tokens(tokenizer, vocabulary_size):
    """Tokens that are never sampled [E12]: PAD, and embedding rows without a token. (vocabulary_size,) bool."""
    forbidden = torch.ones(vocabulary_size, dtype=torch.bool)
    forbidden[list(tokenizer.get_vocab().values())] = False
    forbidden[tokenizer.pad_token_id] = True
    return forbidden


def inverse_cdf(logits, uniforms):
    """The token at which the cumulative probability first exceeds u. logits (B, V), uniforms (B,) -> (B,)."""
    cdf = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(1)
    return tokens.clamp(max=cdf.shape[1] - 1)  # beyond the last one with NaN, which scoring will report


def keep_top_p(logits, top_p):
    """Push every token outside the smallest set with probability >= top_p to -inf. logits (B, V)."""
    ordered, index = logits.sort(descending=True)
    mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    ordered = ordered.masked_fill(mass_before >= top_p, float("-inf"))  # the first token always stays
    return torch.empty_like(logits).scatter_(1, index, ordered)


def truncate_at_eos(responses, eos_ids, pad_id):
    """Keep each response up to its first EOS, PAD after it [detail 23].

    responses (B, Tr) -> responses (B, Tr), lengths (B,) with EOS counted, ended (B,) bool.
    """
    is_eos = torch.isin(responses, eos_ids)
    ended = is_eos.any(1)
    lengths = torch.where(ended, is_eos.int().argmax(1) + 1, responses.shape[1])
    kept = torch.arange(responses.shape[1], device=responses.device) < lengths[:, None]
    return responses.masked_fill(~kept, pad_id), lengths, ended


# ---- Algorithm: rewards and advantages --------------------------------------------------------------------


def at_last_token(values, mask):
    """values (B, T) at each row's last True of mask (B, T), wherever the padding is -> (B,) [detail 12].

    Searching for the first PAD instead finds position 0 in a left-padded row.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last_index = (positions * mask).argmax(-1)  # (B,)
    return values[torch.arange(len(values), device=mask.device), last_index]


def response_masks(lengths, width):
    """mask (B, Tr): t <= e, tokens that count [detail 30]; value_mask (B, Tr): t <= e + 1 [detail 31].

    e is the index of the last kept token. The state after EOS counts as well: the score lands there.
    """
    t = torch.arange(width, device=lengths.device)
    return t < lengths[:, None], t < lengths[:, None] + 1


def token_logprobs(logits, tokens):
    """log p(token) of tokens (B, Tr) under logits (B, Tr, V) -> (B, Tr)."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def token_entropies(logits):
    """Entropy of each token's distribution in nats: (B, Tr, V) -> (B, Tr)."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def k1(logprobs, ref_logprobs):
    """KL estimate log pi - log ref of each token: unbiased, may be negative [detail 32]. All (B, Tr)."""
    return logprobs - ref_logprobs


def k3(logprobs, ref_logprobs):
    """KL estimate ref/pi - 1 - log(ref/pi): unbiased too, never negative (Schulman 2020). All (B, Tr)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(kl, scores, lengths, kl_coef):
    """-kl_coef * kl (B, Tr) at every token, plus scores (B,) at one index each -> (B, Tr).

    That index is e + 1, one step after EOS, or e where the response fills the last column. No token is chosen at
    e + 1: the score teaches the critic there, and reaches the policy through the advantages before it.
    """
    rewards = -kl_coef * kl  # [detail 32]
    score_index = torch.where(lengths < kl.shape[1], lengths, lengths - 1)  # [detail 33] lengths = e + 1
    rewards[torch.arange(len(kl), device=kl.device), score_index] += scores
    return rewards


def masked_mean(values, mask):
    """Mean of values (B, Tr) where mask (B, Tr) is True, over all ranks [E8]. Every rank must call it."""
    total, count = all_sum(torch.stack([(values * mask).sum(), mask.sum().float()]))
    return total / count


def masked_whiten(values, mask, shift_mean=True):
    """(values - mean) / sqrt(variance + 1e-8) over mask (B, Tr) and all ranks, 0 elsewhere [detail 37].

    Advantages lose their mean [detail 25]; rewards keep it (shift_mean=False) [detail 24].
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)  # biased: divided by the count
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def gae(rewards, values, gamma, lam):
    """Generalised advantage estimation, no value after the last column [detail 36].

    rewards, values (B, Tr), 0 where nothing counts -> advantages, returns (B, Tr).
    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + V_t
    """
    advantages, advantage, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
    return advantages, advantages + values


# ---- Algorithm: groups ------------------------------------------------------------------------------------


def running_moments(moments, values):
    """(count, mean, sd) of all values so far: of those before and of values (B,) of every rank (Chan et al. 1979)."""
    count, mean, sd = moments
    values = values.double()
    size, total = all_sum(torch.stack([torch.ones_like(values).sum(), values.sum()])).tolist()
    squares = float(all_sum(((values - total / size) ** 2).sum())) + sd**2 * (count - 1) * (count > 0)
    squares += (total / size - mean) ** 2 * count * size / (count + size)
    mean = (count * mean + total) / (count + size)
    return count + size, mean, (squares / max(count + size - 1, 1)) ** 0.5


def normalize(scores, moments, clip):
    """Scores (B,) less their running mean, in units of their running sd, clipped at plus and minus clip [G2]."""
    _, mean, sd = moments
    return ((scores - mean) / (sd or 1.0)).clamp(-clip, clip)


def group_means(labels, values):
    """Share of each group, and mean of values (B,) in it, weighted by labels (B, M), over all ranks [G5]: (M,), (M,).

    An empty group has the mean of all, so that nothing follows from it.
    """
    labels, values = labels.double(), values.double()
    sums = all_sum(torch.stack([labels.sum(0), values @ labels]))  # (2, M)
    size, total = sums.sum(1)
    return sums[0] / size, torch.where(sums[0] > 1e-9, sums[1] / sums[0].clamp(min=1e-9), total / size)


def group_variance(labels, returns, kind):
    """Variance of the group means of returns (B,), over groups as they weigh, or "uniform" over groups alike [G6]."""
    shares, means = group_means(labels, returns)
    weights = shares if kind == "mass" else torch.full_like(shares, 1 / len(shares))
    return (weights * (means - (weights * means).sum()) ** 2).sum()


def group_pull(labels, returns, kind):
    """The variance's derivative by each group mean R_g over the group's share; what label_gradient counts from. (M,).

    mass: 2 (R_g - R) and (R_g + R) / 2, R the mean of all; uniform: 2 (R_g - mean of the M) / (M share_g) and R_g.
    """
    shares, means = group_means(labels, returns)
    if kind == "uniform":
        return 2 * (means - means.mean()) / (len(means) * shares.clamp(min=1e-9)), means
    mean = (shares * means).sum()
    return 2 * (means - mean), (means + mean) / 2


def label_gradient(labels, returns, kind):
    """B times the derivative of the variance by each label, up to a term that a row's labels share: (B, M) [G7].

    With two groups an episode moves to the better one where its return is above their midpoint (mass), or above
    R_better share_worse + R_worse share_better (uniform), which a small group moves away from itself.
    """
    pull, base = group_pull(labels, returns, kind)
    return (pull * (returns[:, None] - base)).to(labels.dtype)


def advantage_multiplier(labels, returns, beta, kind):
    """1 - beta * pull of the episode's groups: (B,), mean 1 over all episodes where no group is empty [G8].

    Policy gradient of J - beta * variance, with labels and shares taken as constants.
    """
    return (1 - beta * labels.double() @ group_pull(labels, returns, kind)[0]).to(labels.dtype)


def adaptive_kl_coefs(labels, scores, kl_coef):
    """kl_coef times the probability of the group with the highest mean score, (B,), and that group [G10]."""
    shares, means = group_means(labels, scores)
    best = means.masked_fill(shares < 1e-9, -torch.inf).argmax()  # an empty group would leave all without a penalty
    return kl_coef * labels[:, best], best


# ---- Algorithm: losses ------------------------------------------------------------------------------------


def policy_losses(new_logprobs, logprobs, advantages, cliprange):
    """PPO's clipped surrogate loss of each token, and where it is clipped [detail 38]. All (B, Tr)."""
    ratio = torch.exp(new_logprobs - logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).float()


def value_losses(new_values, values, returns, cliprange_value):
    """Half the squared error, clipped around the rollout's value, and where it is clipped [detail 39]. (B, Tr)."""
    clipped_values = torch.clamp(new_values, values - cliprange_value, values + cliprange_value)
    unclipped, clipped = (new_values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped).float()


# ---- Rollouts and evaluation ------------------------------------------------------------------------------


def rollout(model, prompts, noise, args, tokenizer, forbidden, eos_ids, device):
    """Responses (B, Tr), lengths (B,), ended (B,) for prompts of (ids, text)."""
    queries, query_mask = pad([ids for ids, _ in prompts], tokenizer.pad_token_id, "left", device)  # [detail 5]
    responses = torch.empty(noise.shape, dtype=torch.long, device=device)
    noise = noise.to(device)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))
    for rows in chunks(by_length, args.rollout_batch_size):
        width = len(prompts[rows[-1]][0])  # like lengths are decoded together, cut to their longest
        responses[rows] = generate(
            model, queries[rows, -width:], query_mask[rows, -width:], noise[rows], args.temperature,
            args.top_p, args.repetition_penalty, forbidden, eos_ids, tokenizer.pad_token_id)
    return truncate_at_eos(responses, eos_ids, tokenizer.pad_token_id)


@torch.no_grad()
def score_responses(reward_model, reward_function, sequences, ended, texts, args, retokenizer=None):
    """Score of each response (B,): the reward model's at the last token, or a Python function's of the texts.

    sequences: ids of query and response. retokenizer: the reward model's own tokenizer where it differs [E22].
    """
    if reward_function:
        scores = torch.tensor(call_judge(reward_function, "--reward_function", *texts), device=ended.device)
    else:
        if retokenizer:
            sequences = [
                retokenizer(query).input_ids + retokenizer(response, add_special_tokens=False).input_ids
                + [retokenizer.eos_token_id] * end for query, response, end in zip(*texts, ended.tolist())]
            longest = max(map(len, sequences))
            limit = getattr(reward_model.classifier.config, "max_position_embeddings", longest)
            fail_together(f"--retokenize: a text has {longest} of the reward model's tokens, and that has {limit} "
                          "positions. Lower the limits of prompt and response" if longest > limit else None)
        scores = torch.zeros(len(sequences), device=ended.device)
        by_length = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        for rows in chunks(by_length, args.micro_batch_size):
            ids, mask = pad([sequences[i] for i in rows], 0, "right", ended.device)
            scores[rows] = at_last_token(reward_model(ids, mask), mask)
    if args.missing_eos_score is None:
        return scores
    # [detail 13] away from EOS a score means nothing, so it is replaced, not reduced [detail 23]
    return torch.where(ended, scores, args.missing_eos_score)


def deal_by_length(lengths, micro_batch_size):
    """Which rows of a batch this rank trains on: micro-batches of like lengths, as many on every rank [E28].

    Ranks take turns to take a micro-batch from the longest rows left, 0 to last and then last to 0, so that all have
    about the same work. The paper's ranks keep what they sampled, and pad every row to the longest that may come.
    """
    by_length, mine = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    share = len(lengths) // world_size()
    for turn, start in enumerate(range(0, share, micro_batch_size)):
        size = min(micro_batch_size, share - start)
        place = rank() if turn % 2 == 0 else world_size() - 1 - rank()
        mine += by_length[start * world_size() + place * size :][:size]
    return sorted(mine)


def join(queries, responses, lengths):
    """Ids of each query and its response (B, Tr) as far as it counts, in lists, and the responses' lengths in one."""
    lengths = lengths.tolist()
    return [query + response[:length] for query, response, length in zip(queries, responses.tolist(), lengths)], lengths


def right_aligned(rows, sequences, lengths, pad_id, device):
    """Some rows as a batch in which query and response touch and end in the last column: ids, mask (b, T), tr, shift.

    So T is the longest row, not the longest query and the longest response together [E20]. tr: the longest of these
    responses; token t of a response stands in column shift + t, shift (b,), of the last tr columns.
    """
    ids, mask = pad([sequences[i] for i in rows], pad_id, "left", device)
    tr = max(lengths[i] for i in rows)
    return ids, mask, tr, torch.tensor([tr - lengths[i] for i in rows], device=device)


def left_aligned(values, shift):
    """values (b, w) with each row moved left by shift (b,), so that column t belongs to token t of the response.

    The last columns of a shorter response repeat its last value: nothing counts there.
    """
    columns = torch.arange(values.shape[1], device=values.device) + shift[:, None]
    return values.gather(1, columns.clamp(max=values.shape[1] - 1))


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. ranks, data, models
    check_flags(args)
    check_batch_size(args.batch_size, args.num_minibatches, args.total_episodes)
    device = init_distributed(args.timeout_minutes)
    folder = choose_folder(args, "group_invariant_ppo")
    tokenizer = load_tokenizer(args.sft_model, "--sft_model")
    prompts, group_of = load_grouped_prompts(args.prompts, "--prompts", tokenizer, args)
    eval_prompts = load_prompts(args.eval_prompts, "--eval_prompts", tokenizer, args)[: args.num_eval_prompts]
    if len(eval_prompts) < world_size():
        fail(f"--num_eval_prompts, --eval_prompts {args.eval_prompts}: {len(eval_prompts)} usable, and {world_size()} "
             "ranks need at least one each")
    gold_function = load_function(args.gold_function, "--gold_function")
    reward_function = load_function(args.reward_function, "--reward_function")
    policy, ref_policy, critic, reward_model, retokenizer = load_models(args, tokenizer)
    decoding_copy = None  # at ZeRO 3 the policy is in pieces: a whole copy to decode with
    if args.zero_stage == 3:
        decoding_copy = load_causal_lm(args.sft_model, "--sft_model", tokenizer, args.bf16).to(device)
    engines = {}
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
        critic.classifier.gradient_checkpointing_enable()
    critic = GroupCritic(critic.classifier)
    group_head = GroupHead(critic.classifier.score.in_features, args.num_groups, args.seed)
    for name, model in (("policy", policy), ("critic", critic), ("group_head", group_head)):  # [E9] [G11] [detail 47]
        optimizer = torch.optim.AdamW(  # [detail 43] eps 1e-5 and weight decay 0.01, both written out
            model.to(device).parameters(), betas=(0.9, 0.999), eps=args.adam_eps, weight_decay=args.weight_decay,
            fused=True)  # one pass over the weights, on a CPU several times faster
        engines[name] = create_engine(model, optimizer, args)
    eos_ids = torch.tensor(eos_token_ids(policy, tokenizer), device=device)
    forbidden = forbidden_tokens(tokenizer, ref_policy.get_output_embeddings().weight.shape[0]).to(device)  # (V,)

    for function, flag in ((gold_function, "--gold_function"), (reward_function, "--reward_function")):
        if function:
            call_judge(function, flag, [prompts[0][1]] * 2, [" a", " b"])  # a trial, before anything is written

    # 2. output folder, resume
    open_folder(folder, args, "group_invariant_ppo")
    state = (load_checkpoint(folder, engines) if args.resume else None) or {"step": 0, "best": float("-inf")}
    tracker = Tracker(folder, args, state["step"] + 1 if state["step"] else 0)
    print0(f"{'models':<22}policy {count_parameters(policy):,} and critic {count_parameters(critic):,} "
           f"parameters, {world_size()} rank(s) on {device.type}")
    print0(f"{'plan':<22}{args.num_updates} updates of {args.batch_size} episodes, {args.num_ppo_epochs} epochs "
           f"each; writes {folder}")
    print_memory_plan(args, count_parameters(policy) + count_parameters(critic), sum(
        count_parameters(model) for model in (ref_policy, reward_model, decoding_copy) if model))
    note_small_lr(args.lr, Args.lr, count_parameters(policy))

    def evaluate(update):
        """Continue the held-out prompts, with the same noise at every update and for every seed [detail 49] [E16]."""
        mine = range(rank(), len(eval_prompts), world_size())
        my_prompts = [eval_prompts[i] for i in mine]
        noise = sampling_noise(0, 0, mine, args.response_length)
        decoder = rollout_weights(engines["policy"], decoding_copy).eval()
        responses, lengths, ended = rollout(
            decoder, my_prompts, noise, args, tokenizer, forbidden, eos_ids, device)
        mask, _ = response_masks(lengths, args.response_length)
        query_ids, query_texts = zip(*my_prompts)
        texts = query_texts, decode_responses(tokenizer, query_ids, responses)
        sequences, response_lengths = join(query_ids, responses, lengths)
        kl = torch.zeros(noise.shape, device=device)
        by_length = sorted(range(len(mine)), key=lambda i: -len(sequences[i]))
        with torch.no_grad(), on_device(ref_policy, device, args.offload_frozen):
            for rows in chunks(by_length, args.micro_batch_size):
                ids, mb_mask, tr, shift = right_aligned(
                    rows, sequences, response_lengths, tokenizer.pad_token_id, device)
                window = ids, mb_mask, tr, args.temperature, forbidden
                logprobs = token_logprobs(response_logits(decoder, *window), ids[:, -tr:])
                ref_logprobs = token_logprobs(response_logits(ref_policy, *window), ids[:, -tr:])
                kl[rows, :tr] = left_aligned(k1(logprobs, ref_logprobs), shift) * mask[rows, :tr]
        with on_device(reward_model, device, args.offload_frozen):
            scores = score_responses(reward_model, reward_function, sequences, ended, texts, args, retokenizer)
        columns = {"query": texts[0], "response": texts[1], "score": scores.tolist(), "kl": kl.sum(1).tolist(),
                   "length": lengths.tolist(), "ended": ended.tolist()}
        if gold_function:
            columns["gold"] = call_judge(gold_function, "--gold_function", *texts)
        samples = gather_rows(dict(zip(columns, row)) for row in zip(*columns.values()))
        starts = gather_rows(tuple(row) for row in responses[:, :4].tolist())
        metrics = {f"eval/{name}": float(np.mean([row[name] for row in samples])) for name in list(columns)[2:]}
        unit = state.get("first_moments", (0, 0.0, 0.0))[2] or 1.0  # [G2] a nat costs kl_coef normalised scores
        metrics["eval/rlhf_reward"] = metrics["eval/score"] - args.kl_coef * unit * metrics["eval/kl"]
        metrics["eval/distinct_starts"] = len(set(starts)) / len(starts)  # low: it says the same thing everywhere
        tracker.samples(update, samples)
        tracker.log(update, metrics)
        gold = f"  gold {metrics['eval/gold']:.3f}" if gold_function else ""
        print0(f"{update:>6}/{args.num_updates}  held-out score {metrics['eval/score']:.3f}{gold}  "
               f"kl {metrics['eval/kl']:.2f}  length {metrics['eval/length']:.1f}")
        return metrics, samples

    if state["step"] == 0:
        metrics, samples = evaluate(0)
        state |= {"before": metrics, "samples_before": [row["response"] for row in samples[:20]]}

    for update in range(state["step"] + 1, args.num_updates + 1):
        clock = [time.time()]
        fraction_left = 1 - (update - 1) / args.num_updates  # [detail 42] linear to 0
        lr, critic_lr = args.lr * fraction_left, args.critic_lr * fraction_left

        # 3. rollout: this rank's episodes of the update
        first = (update - 1) * args.batch_size
        episodes = range(first + rank(), first + args.batch_size, world_size())
        visits = [n // args.episodes_per_prompt for n in episodes]  # [G1]
        batch_prompts = [prompts[i] for i in prompts_of_episodes(visits, len(prompts), args.seed)]
        noise = sampling_noise(args.seed, update, episodes, args.response_length)
        decoder = rollout_weights(engines["policy"], decoding_copy).eval()
        responses, lengths, ended = rollout(
            decoder, batch_prompts, noise, args, tokenizer, forbidden, eos_ids, device)
        engines["policy"].train()
        # [E28] from here on a rank has rows as long as the others', not those that it sampled
        of_all_ranks = gather_rows(zip(batch_prompts, responses.tolist(), lengths.tolist()))
        mine = deal_by_length([len(ids) + length for (ids, _), _, length in of_all_ranks], args.micro_batch_size)
        batch_prompts, responses, _ = zip(*(of_all_ranks[i] for i in mine))
        responses, lengths, ended = truncate_at_eos(
            torch.tensor(responses, device=device), eos_ids, tokenizer.pad_token_id)
        mask, value_mask = response_masks(lengths, args.response_length)  # (B, Tr) bool, True = counts
        query_ids, query_texts = zip(*batch_prompts)
        texts = query_texts, decode_responses(tokenizer, query_ids, responses)
        sequences, response_lengths = join(query_ids, responses, lengths)
        clock.append(time.time())

        # 4. scores
        with on_device(reward_model, device, args.offload_frozen):  # [detail 48] one at a time (theirs: by layers)
            scores = score_responses(reward_model, reward_function, sequences, ended, texts, args, retokenizer)
        golds = call_judge(gold_function, "--gold_function", *texts) if gold_function else []
        normalized = scores
        if args.score_clip:  # [G2] by the moments of all scores so far, also these, EOS rule included
            state["moments"] = running_moments(state.get("moments", (0, 0.0, 0.0)), scores)
            normalized = normalize(scores, state["moments"], args.score_clip)
            state.setdefault("first_moments", state["moments"])
            if reward_model and not retokenizer:  # [G3] a head of zeros has no units
                _, critic.mean, critic.sd = state["first_moments"]

        # 5. micro-batches of every epoch; log-probabilities and values by exactly the first epoch's forwards
        plan = []  # [epoch][minibatch][micro-batch] -> rows of this rank
        for epoch in range(args.num_ppo_epochs):
            order = permutation(len(episodes), args.seed, update, rank(), epoch)  # [detail 41] new in each epoch
            minibatches = chunks(order, len(episodes) // args.num_minibatches)
            for rows in minibatches:  # like lengths share a micro-batch, the longest first, as memory is least torn so
                rows.sort(key=lambda i: -len(sequences[i]))
            plan.append([chunks(rows, args.micro_batch_size) for rows in minibatches])
        logprobs, ref_logprobs, values, entropies = torch.zeros(4, *responses.shape, device=device)  # (B, Tr)
        labels = torch.zeros(len(episodes), args.num_groups, device=device)  # (B, M)
        back = lengths * (args.group_level == "prompt")  # [G4] the last token of the trajectory or of the query
        with torch.no_grad(), on_device(ref_policy, device, args.offload_frozen):
            for rows in [micro_batch for minibatch in plan[0] for micro_batch in minibatch]:
                ids, mb_mask, tr, shift = right_aligned(
                    rows, sequences, response_lengths, tokenizer.pad_token_id, device)
                mb_values, mb_states = engines["critic"](ids, mb_mask, back[rows])
                labels[rows] = engines["group_head"](mb_states)
                mb_values = state_values(mb_values, tr, shift, args.response_length)
                values[rows, : mb_values.shape[1]] = mb_values  # [detail 28] V_t is read before token t
                logits = response_logits(ref_policy, ids, mb_mask, tr, args.temperature, forbidden)
                ref_logprobs[rows, :tr] = left_aligned(token_logprobs(logits, ids[:, -tr:]), shift)
                logits = response_logits(engines["policy"], ids, mb_mask, tr, args.temperature, forbidden)
                logprobs[rows, :tr] = left_aligned(token_logprobs(logits, ids[:, -tr:]), shift)
                entropies[rows, :tr] = left_aligned(token_entropies(logits), shift)
                del logits  # (b, tr, V): of all that is made here the largest
        logprobs, ref_logprobs = logprobs * mask, ref_logprobs * mask  # [detail 30] [E15]
        values = values * value_mask  # [detail 31]
        clock.append(time.time())

        # 6. rewards and advantages
        kl = k1(logprobs, ref_logprobs)  # (B, Tr), 0 after EOS
        kl_coefs, best_group = adaptive_kl_coefs(labels, normalized, args.kl_coef)  # [G10]
        kl_coefs = kl_coefs if args.dynamic_kl else torch.full_like(kl_coefs, args.kl_coef)
        rewards = token_rewards(kl, normalized, lengths, kl_coefs[:, None])  # (B, Tr)
        group_returns = normalized if args.invariance_estimator == "exact" else rewards.sum(1)  # [G5] (B,)
        gradient = label_gradient(labels, group_returns, args.group_variance)  # [G7] (B, M)
        kappas = advantage_multiplier(labels, group_returns, args.beta_policy, args.group_variance)  # (B,)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, value_mask, shift_mean=False)  # [detail 24] [detail 35]
        advantages, returns = gae(rewards, values, args.gamma, args.lam)  # [detail 36] returns before whitening
        variance = masked_mean((advantages - masked_mean(advantages, mask)) ** 2, mask)
        advantages = masked_whiten(advantages, mask)  # [detail 25] [detail 37]
        if args.invariance_estimator == "exact":  # [G9]
            cost = args.beta_policy * (labels * gradient).sum(1, keepdim=True)  # (B, 1); its mean is not 0 for mass
            advantages -= (cost - all_sum(cost.sum()) / args.batch_size) * torch.rsqrt(variance + 1e-8)
        else:  # [G8] after whitening, which would undo some of it, and before the clip, as it may be negative
            advantages *= kappas[:, None]
        saved_on_failure = {"queries": query_ids, "responses": responses}
        stop_if_not_finite({"scores": scores, "values": values, "ref_logprobs": ref_logprobs, "logprobs": logprobs},
                           saved_on_failure, folder, update)

        # 7. update: epochs x minibatches optimizer steps
        token_sums, state_sums = torch.zeros(5, device=device), torch.zeros(2, device=device)  # over all that count
        counted, grad_norms = torch.zeros(2, device=device), torch.zeros(2, device=device)  # of tokens and states
        ratio_max, trained = torch.zeros((), device=device), {}  # losses and gradient norms of each step, in order
        for epoch in range(args.num_ppo_epochs):
            for m, minibatch in enumerate(plan[epoch]):
                members = [i for rows in minibatch for i in rows]
                counts = all_sum(torch.stack([mask[members].sum(), value_mask[members].sum()]).float())
                counted += counts
                drift = torch.zeros((), device=device)
                for rows in minibatch:
                    ids, mb_mask, tr, shift = right_aligned(
                        rows, sequences, response_lengths, tokenizer.pad_token_id, device)
                    logits = response_logits(engines["policy"], ids, mb_mask, tr, args.temperature, forbidden)
                    new_logprobs = left_aligned(token_logprobs(logits, ids[:, -tr:]), shift)  # (b, tr)
                    del logits
                    token_mask = mask[rows, :tr]
                    pg_losses, pg_clipped = policy_losses(
                        new_logprobs, logprobs[rows, :tr], advantages[rows, :tr], args.cliprange)
                    pg_loss = (pg_losses * token_mask).sum()
                    engines["policy"].backward(pg_loss / counts[0] * world_size())  # [detail 40] [E2]
                    with torch.no_grad():
                        log_ratio = (new_logprobs - logprobs[rows, :tr]) * token_mask
                        drift = torch.maximum(drift, log_ratio.abs().max())
                        ratio_max = torch.maximum(ratio_max, log_ratio.max().exp())
                        token_sums += torch.stack([
                            pg_loss, (pg_clipped * token_mask).sum(), 0.5 * (log_ratio**2).sum(),
                            (log_ratio.exp() * token_mask).sum(), (log_ratio.exp() ** 2 * token_mask).sum()])
                if epoch == m == 0:  # [E14] nothing is trained yet: the ratio must be 1
                    drift = float(all_max(drift))
                    stop_if_not_finite({"first log-ratio": drift}, saved_on_failure, folder, update)
                    if drift > 1e-4 and args.bf16:
                        print0(f"warning: update {update}: first log ratio off by {drift:.1e} (bf16 rounding)")
                    elif not drift <= 1e-4:
                        fail(f"update {update}: log-probabilities moved by {drift:.1e} before any training. Scoring "
                             "and update disagree: dropout, temperature, padding or the model's forward")
                norm, where = optimizer_step(engines["policy"], lr), f"of epoch {epoch + 1}, minibatch {m + 1}"
                grad_norms[0] += norm
                trained |= {f"policy loss {where}": token_sums[0].clone(), f"policy gradient norm {where}": norm}

                for rows in minibatch:  # only now, as the policy's gradients are gone
                    ids, mb_mask, tr, shift = right_aligned(
                        rows, sequences, response_lengths, tokenizer.pad_token_id, device)
                    new_values, states = engines["critic"](ids, mb_mask, back[rows])
                    new_values = state_values(new_values, tr, shift, args.response_length)
                    tv = new_values.shape[1]  # tr + 1: the state after the last token has a value as well
                    vf_losses, vf_clipped = value_losses(
                        new_values, values[rows, :tv], returns[rows, :tv], args.cliprange_value)
                    vf_loss = (vf_losses * value_mask[rows, :tv]).sum()
                    loss = args.vf_coef * vf_loss / counts[1] * world_size()  # [detail 39]
                    if args.beta_critic and epoch == 0:  # [G7] a sum over all episodes, linear in the labels
                        leaf = states.detach().requires_grad_()
                        gain = (engines["group_head"](leaf) * gradient[rows]).sum() / args.batch_size
                        engines["group_head"].backward(-args.beta_critic * gain * args.num_minibatches * world_size())
                        if not args.detach_group_trunk:
                            loss = loss + (leaf.grad * states).sum()  # the head's gradient, on into the critic
                    engines["critic"].backward(loss)
                    state_sums += torch.stack([vf_loss, (vf_clipped * value_mask[rows, :tv]).sum()]).detach()
                if args.beta_critic and epoch == 0:
                    group_norm = optimizer_step(engines["group_head"], args.group_head_lr * fraction_left)
                    trained |= {f"group head gradient norm {where}": group_norm}
                norm = optimizer_step(engines["critic"], critic_lr)
                grad_norms[1] += norm
                trained |= {f"value loss {where}": state_sums[0].clone(), f"critic gradient norm {where}": norm}
        clock.append(time.time())

        # 8. log: masked means over counted tokens or over episodes, on all ranks [E8]
        episode_sums = all_sum(torch.stack([x.sum() for x in (
            scores, kl, k3(logprobs, ref_logprobs), -logprobs, lengths.float(), ended.float(),
            torch.tensor(golds, device=device))]))  # no golds without a judge
        score, mean_kl, mean_k3, entropy, length, share_ended, gold = (episode_sums / args.batch_size).tolist()
        sums = torch.stack([normalized.sum(), kl_coefs.sum(), kl_coefs @ kl.sum(1), torch.special.entr(labels).sum()])
        normal, kl_coef, kl_cost, label_entropy = (all_sum(sums) / args.batch_size).tolist()
        pg_loss, pg_clipfrac, approx_kl, ratio, ratio_square = (all_sum(token_sums) / counted[0]).tolist()
        vf_loss, vf_clipfrac = (all_sum(state_sums) / counted[1]).tolist()
        steps = args.num_ppo_epochs * args.num_minibatches
        residual = returns - values
        unexplained = masked_mean((residual - masked_mean(residual, value_mask)) ** 2, value_mask)
        variance = masked_mean((returns - masked_mean(returns, value_mask)) ** 2, value_mask)
        metrics = {
            "objective/scores": score, "objective/kl": mean_kl, "objective/kl_k3": mean_k3,
            "objective/entropy": entropy, "objective/non_score_reward": -kl_cost,
            "objective/rlhf_reward": normal - kl_cost, "objective/kl_coef": kl_coef,
            "policy/entropy_avg": masked_mean(entropies, mask), "policy/approxkl_avg": approx_kl,
            "policy/clipfrac_avg": pg_clipfrac, "policy/grad_norm": grad_norms[0] / steps,
            "loss/policy_avg": pg_loss, "loss/value_avg": vf_loss,
            "val/clipfrac_avg": vf_clipfrac, "val/grad_norm": grad_norms[1] / steps,
            "val/ratio": ratio, "val/ratio_var": ratio_square - ratio**2, "val/ratio_max": all_max(ratio_max),
            "val/explained_variance": 1 - unexplained / variance.clamp(min=1e-8),
            "val/length": length, "val/ended": share_ended,
            "lr": lr, "critic_lr": critic_lr, "episode": update * args.batch_size}
        shares, means = group_means(labels, normalized)
        order = means.argsort(descending=True)  # group_0 has the highest score, whichever column of the labels it is
        for name, found in (("score", scores), ("return", rewards.sum(1)), ("kl", kl.sum(1)), ("length", lengths)):
            found = group_means(labels, found)[1][order].tolist()
            metrics |= {f"group_{place}/{name}": mean for place, mean in enumerate(found)}
        metrics |= {f"group_{place}/share": float(shares[g]) for place, g in enumerate(order)}
        metrics |= {
            "groups/gap": metrics["group_0/return"] - metrics[f"group_{args.num_groups - 1}/return"],
            "groups/variance": group_variance(labels, group_returns, args.group_variance),
            "groups/label_entropy": label_entropy, "groups/kappa_min": -all_max(-kappas.min()),
            "groups/kappa_max": all_max(kappas.max())}
        if group_of:
            metrics["groups/auc"] = auc_of_groups(labels[:, best_group], scores, map(group_of.get, query_texts))
        if gold_function:
            metrics["objective/gold"] = gold
        stop_if_not_finite(trained | metrics, saved_on_failure, folder, update)
        seconds = dict(zip(("generate", "score", "train"), np.diff(clock)))
        tracker.log(update, metrics | {f"time/{name}_seconds": value for name, value in seconds.items()} | {
            "time/generate_tokens_per_second": length * args.batch_size / seconds["generate"]})
        tracker.line(update, args.num_updates, score=(score, "6.3f"), gold=(metrics.get("objective/gold"), ".3f"),
                     kl=(mean_kl, "6.2f"), length=(length, "4.1f"), ended=(share_ended, ".2f"),
                     gap=(metrics["groups/gap"], "5.2f"), entropy=(float(metrics["policy/entropy_avg"]), ".2f"))
        if mean_kl > 40:
            print0("warning: KL above 40 nats. In the paper such runs had the best scores and the worst texts")

        # 9. evaluate, keep the best, save
        if update % args.eval_every == 0 or update == args.num_updates:
            after, samples = evaluate(update)
            if after["eval/rlhf_reward"] > state["best"]:
                state["best"] = after["eval/rlhf_reward"]
                save_model(engines["policy"], policy, tokenizer, folder / "best")
        stop = interrupted(device)  # by SIGTERM
        if (stop or update % args.save_every == 0) and update < args.num_updates:
            save_checkpoint(folder, update, engines, state)
            if stop:
                leave_interrupted(folder, update)

    # 10. save, show samples before and after
    save_model(engines["policy"], policy, tokenizer, folder)
    save_model(engines["critic"], critic.classifier, tokenizer, folder / "critic")
    save_weights(engines["group_head"], folder / "group_head.safetensors")
    model_card(folder, "group_invariant_ppo.py", args.sft_model, args.prompts, [
        f"Held-out score {state['before']['eval/score']:.3f} -> {after['eval/score']:.3f}, "
        f"KL {after['eval/kl']:.2f}."])
    side_by_side = [{"query": row["query"], "before": before, "after": row["response"], "score": row["score"]}
                    for row, before in zip(samples, state["samples_before"])]
    tracker.close({"before": state["before"], "after": after, "best_rlhf_reward": state["best"],
                   "episodes": args.num_updates * args.batch_size, "samples": side_by_side})
    for row in side_by_side[:8]:
        print0(f"\n{row['query']}\n  before:{row['before']}\n  after: {row['after']}")
    print0(f"\nsaved {folder}: score {state['before']['eval/score']:.3f} -> {after['eval/score']:.3f}" + (
        f", gold {state['before']['eval/gold']:.3f} -> {after['eval/gold']:.3f}" if gold_function else ""))
    finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
