"""PPO for language models (RLHF): a policy learns to get high scores, and stays close to where it started.

    for each update:
        responses  = the policy answers each prompt of a batch, until EOS or response_length tokens
        scores     = the reward model reads each prompt with its response; -1 where EOS is missing
        kl         = log policy(token) - log reference(token), of every token of the responses
        rewards    = -kl_coef * kl at every token, and the score at the end
        advantages = GAE(rewards, values of the critic), whitened
        repeat num_ppo_epochs times over these responses:
            the policy steps down its clipped surrogate loss, the critic its clipped squared error

Run:     python ppo.py                                   the embedded task, CPU, minutes
         deepspeed ppo.py --lr 5e-7                      every GPU of this machine
Reads:   --sft_model; --reward_model or --reward_function; --prompts and --eval_prompts, column {prompt}
Writes:  --output_dir: the policy as a Hugging Face folder, critic/, best/, metrics.jsonl, samples.jsonl,
         summary.json, TensorBoard, checkpoints
Result:  README.md (embedded and other small tasks); not yet measured at the paper's scale

Paper: "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031), section 7.
`[detail N]` are its numbers, `[E N]` our own choices, all listed in docs/details.md. `N+:` is its value of a flag.

Differs from the paper's code in the numbers, above all:
  1. losses, whitening and metrics are means over all ranks, not per rank or micro-batch      [E2] [E8]
  2. a token's noise is addressed by (seed, update, episode, position), not drawn in turn     [E11]
and not in the numbers:
  3. policy and critic have an optimizer each                                                 [E9]
  4. sampling stops at EOS; what the paper's code samples after it counts nowhere             [E10]

Shapes:  B episodes of this rank, b rows of a micro-batch, V vocabulary
         Tr response tokens (right-padded), Tq query tokens (left-padded, while sampling),
         T tokens of the longest query and response in a micro-batch (left-padded)
         Response token t was sampled in the state before it, whose value is V_t.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import DynamicCache

from utils.companions import hold_out, settle_companions
from utils.data import call_judge, chunks, deal_by_length, load_function, load_prompts, pad, permutation
from utils.launch import all_max, all_sum, check_batch_size, check_flags, create_engine, fail, finish
from utils.launch import gather_rows, init_distributed, on_device, optimizer_step, print0, rank, rollout_weights
from utils.launch import world_size
from utils.models import check_length, check_rate, forbidden_tokens, load_causal_lm, load_classifier
from utils.models import load_tokenizer, other_tokenizer, print_plan, save_model
from utils.run import Tracker, choose_folder, interrupted, leave_interrupted, load_checkpoint, model_card
from utils.run import open_folder, save_checkpoint, stop_if_not_finite
from utils.tokens import decode_responses, retokenize, set_terminator, terminator_ids


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
    """read model folders that have pickled weights (.bin) only: a stranger's pickle may run code when it is read"""
    reward_function: str | None = None
    """module:name of a Python function (queries, responses, columns of the rows...) -> scores, in place of the
    reward model"""
    gold_function: str | None = "assets.vader:positive"
    """module:name of such a function that only watches; None, the default with your own prompts: no judge"""
    prompts: str = "assets/data/train.jsonl"
    """prompts: .jsonl, .json, .csv, .parquet, folder or Hub id; column {prompt}. N+: the SFT train split"""
    eval_prompts: str | None = "assets/data/validation.jsonl"
    """held-out prompts; None, the default with your own prompts: a share of --prompts"""
    columns: tuple[str, ...] = ()
    """other names of columns in your data files, as in prompt=question chosen=answer_a: ours=yours"""
    max_prompt_length: int = 32
    """tokens; longer prompts are dropped and counted, TL;DR posts cut (detail 2). N+: 512"""

    # rollouts
    response_length: int = 24
    """tokens to sample at most. N+: 53"""
    temperature: float = 0.7
    """sampling temperature; log-probabilities are taken at the same one (detail 27). N+: 0.7"""
    top_p: float = 1.0
    """sample from the smallest set of tokens with this probability; log-probabilities ignore it. N+: 1.0"""
    repetition_penalty: float = 1.0
    """divide the logits of tokens seen before while sampling; log-probabilities ignore it. N+: 1.0"""
    missing_eos_score: float | None = -1.0
    """replaces the score of a response without EOS (detail 23). N+: -1.0; None, the default with a reward
    function: keep the score"""
    rollout_batch_size: int = 64
    """sequences decoded together per rank; in fp32 it changes memory and speed only. N+: 64 (1B) to 4 (6.9B)"""
    offload_frozen: bool = False
    """keep reference and reward model in CPU memory while they are not used. N+: True for 6.9B (detail 48)"""

    # PPO. [detail 20] The paper's settings are Stiennon et al.'s (2020), but for the learning rate
    total_episodes: int = 3200
    """episodes to roll out in all. N+: 1,000,000"""
    batch_size: int = 64
    """episodes per update, over all ranks. N+: 512"""
    num_ppo_epochs: int = 4
    """passes over the episodes of an update. N+: 4"""
    num_minibatches: int = 1
    """optimizer steps per pass. N+: 1"""
    micro_batch_size: int = 32
    """sequences per forward and rank; with one minibatch it changes memory and speed, not the gradient. N+: 16
    (1B) to 1 (6.9B)"""
    lr: float = 5e-4
    """learning rate of the policy, falling linearly to 0; large models: see docs/scaling.md. N+: 3e-6"""
    critic_lr: float | None = None
    """learning rate of the critic, falling linearly to 0; None: that of the policy. N+: 3e-6"""
    weight_decay: float = 0.01
    """AdamW weight decay. N+: 0.01, torch's default (detail 43)"""
    adam_eps: float = 1e-5
    """AdamW epsilon. N+: 1e-5"""
    max_grad_norm: float = 0.0
    """clip each model's global gradient norm here; 0 = off. N+: off (detail 44)"""
    kl_coef: float = 0.4
    """price of a nat of KL from the reference, in reward. N+: 0.05"""
    gamma: float = 1.0
    """discount. N+: 1.0"""
    lam: float = 0.95
    """lambda of generalised advantage estimation. N+: 0.95"""
    cliprange: float = 0.2
    """clip range of the ratio. N+: 0.2"""
    cliprange_value: float = 0.2
    """clip range of the value around the rollout's. N+: 0.2"""
    vf_coef: float = 0.1
    """weight of the value loss. N+: 0.1"""
    whiten_rewards: bool = False
    """whiten rewards too, keeping their mean (detail 24). N+: False"""

    # evaluation
    eval_every: int = 10
    """updates between evaluations on held-out prompts; one comes before the first, one after the last. N+: 1"""
    num_eval_prompts: int = 500
    """held-out prompts, each continued with the same noise every time"""

    # run
    seed: int = 1
    """decides the order of the prompts and the noise of the rollouts. N+: 44413, 55513, 66613, 77713"""
    output_dir: str | None = None
    """where to write; default: a new folder runs/ppo, runs/ppo-2, ..."""
    resume: bool = False
    """continue the run in output_dir from its last checkpoint, exactly"""
    overwrite: bool = False
    """replace an earlier run in output_dir"""
    save_every: int = 10
    """updates between checkpoints"""

    # machine
    zero_stage: int = 0
    """DeepSpeed ZeRO stage: 0, 2 or 3; with bf16, 0 is 2 inside. N+: 2"""
    offload_optimizer: bool = False
    """keep optimizer state in CPU memory (ZeRO 2 and 3)"""
    bf16: bool = False
    """bf16 weights with fp32 master weights and gradients (GPUs). N+: True"""
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


def prompts_of_episodes(numbers, num_prompts, seed):
    """Index of the prompt of the n-th episode ever, for each n. [detail 21] Each pass has a new order."""
    passes = {n // num_prompts for n in numbers}
    orders = {number: permutation(num_prompts, seed, number) for number in passes}
    return [orders[n // num_prompts][n % num_prompts] for n in numbers]


def sampling_noise(seed, update, numbers, length):
    """Uniforms u[i, t] in [0, 1) for the episodes of these numbers: (B, length) float64.

    [E11] They depend on (seed, update, episode, t) alone, so that in fp32 a response is the same in any batch, and
    [detail 46] on any rank (theirs: a seed for each rank). bf16 rounds otherwise in another batch.
    """
    return torch.tensor(np.stack([np.random.default_rng((seed, update, n)).random(length) for n in numbers]))


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
        self.terminator = getattr(classifier.config, "terminator_token_id", None)  # [E29] where it is read

    def forward(self, ids, mask):
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)  # [detail 14] [detail 45] on any padding side
        hidden = self.classifier.base_model(  # [detail 11] the last hidden state, after the final layer norm
            input_ids=torch.where(mask, ids, 0), attention_mask=mask.long(), position_ids=position_ids,
            use_cache=False).last_hidden_state  # (B, T, d)
        return self.classifier.score(hidden).squeeze(-1).float() - self.reward_mean


def load_models(args, tokenizer, prompt):
    """policy, ref_policy, critic, reward_model and its tokenizer. [detail 7] Dropout is off in all of them.

    The reward model is None with --reward_function. Its tokenizer is None where it reads the policy's tokens.
    prompt: one prompt's text. Its end shows where a reward model from elsewhere is to be read [E29].
    """
    policy = load_causal_lm(args.sft_model, "--sft_model", tokenizer)  # in fp32: DeepSpeed converts it for --bf16
    ref_policy = load_causal_lm(args.sft_model, "--sft_model", tokenizer, args.bf16).eval()
    reward_model = retokenizer = None
    if not args.reward_function:
        own_tokenizer = load_tokenizer(args.reward_model, "--reward_model")
        retokenizer = other_tokenizer(args, tokenizer, own_tokenizer)
        classifier = load_classifier(args.reward_model, "--reward_model", own_tokenizer, args.bf16)
        set_terminator(classifier, args.reward_model, "--reward_model", own_tokenizer, prompt, tokenizer)
        reward_model = ScalarModel(classifier).eval()
    if reward_model and not retokenizer:
        # [detail 22] the critic is a model of its own that starts as the reward model. So at first the value of
        # the state after EOS is the score, and advantages start without a shock
        classifier = load_classifier(args.reward_model, "--reward_model", tokenizer)
    else:  # [E13] no reward model reads these tokens: it starts as the SFT model, with a head of zeros
        print0(f"{'critic':<22}starts from {args.sft_model} with a head of zeros, not from a reward model")
        classifier = load_classifier(args.sft_model, "--sft_model", tokenizer, new_head=True)
        torch.nn.init.zeros_(classifier.score.weight)
    longest, flags = args.max_prompt_length + args.response_length, "--max_prompt_length + --response_length"
    for model in (policy, classifier):
        check_length(model, longest, flags)
        check_rate(args, "ppo", model)
    return policy, ref_policy, ScalarModel(classifier), reward_model, retokenizer


# ---- Algorithm: sampling ----------------------------------------------------------------------------------


def rollout(model, prompts, noise, args, tokenizer, forbidden, eos_ids):
    """Responses (B, Tr) to B Prompts, from noise (B, Tr). Similar lengths are decoded together."""
    noise = noise.to(eos_ids.device)
    responses = torch.empty(noise.shape, dtype=torch.long, device=noise.device)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))
    for rows in chunks(by_length, args.rollout_batch_size):
        queries, attention_mask = pad(  # [detail 5] prompts are padded left: responses start in one column
            [prompts[i][0] for i in rows], tokenizer.pad_token_id, "left", noise.device)
        responses[rows] = generate(
            model, queries, attention_mask, noise[rows], args.temperature, args.top_p,
            args.repetition_penalty, forbidden, eos_ids, tokenizer.pad_token_id)
    return responses


@torch.no_grad()
def generate(
    model, queries, query_mask, noise, temperature, top_p, repetition_penalty, forbidden, eos_ids, pad_id
):
    """Sample a response to each query until EOS, or for Tr tokens.

    queries, query_mask: (B, Tq), left-padded; noise: (B, Tr) uniforms; forbidden: (V,) bool, the tokens that are
    never sampled. Returns responses (B, Tr), PAD after EOS. The model's stored generation config is never read.
    """
    responses = torch.full(noise.shape, pad_id, device=queries.device)  # (B, Tr)
    alive = torch.arange(len(queries), device=queries.device)  # rows still being decoded
    cache = DynamicCache(config=model.config)
    attention_mask = query_mask
    ids, position_ids = torch.where(query_mask, queries, 0), (query_mask.long().cumsum(-1) - 1).clamp(min=0)
    seen = torch.zeros(len(queries), len(forbidden), device=queries.device)  # (B, V), for the penalty
    seen.scatter_add_(1, ids, query_mask.float())
    for t in range(noise.shape[1]):
        logits = model(
            input_ids=ids, attention_mask=attention_mask.long(), position_ids=position_ids, logits_to_keep=1,
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
        if len(going_on) < len(alive):  # [E10] a row that has ended leaves the batch
            # [detail 29] what follows EOS counts nowhere (theirs is sampled, read by the models, and masked)
            alive, tokens, attention_mask, seen = (x[going_on] for x in (alive, tokens, attention_mask, seen))
            cache.batch_select_indices(going_on)
        if len(alive) == 0:
            break
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(alive), 1)], dim=1)
        ids, position_ids = tokens[:, None], attention_mask.sum(1, keepdim=True) - 1
    return responses


def scale_logits(logits, temperature, forbidden):
    """Logits (..., V) of the sampling distribution, in fp32, before top-p. forbidden: (V,) bool."""
    logits = logits.float() / (temperature + 1e-7)  # [detail 26] 0.7 in the paper, whose code adds 1e-7
    return logits.masked_fill_(forbidden, torch.finfo(torch.float32).min)


def inverse_cdf(logits, uniforms):
    """The token at which the cumulative probability first exceeds u. logits (B, V), uniforms (B,) -> (B,)."""
    cdf = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(1)
    return tokens.clamp(max=cdf.shape[1] - 1)  # NaN logits point past the end; step 6 stops on them


def keep_top_p(logits, top_p):
    """Logits (B, V) that are -inf outside the smallest set of tokens whose probability reaches top_p."""
    ordered, index = logits.sort(descending=True)
    mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    ordered = ordered.masked_fill(mass_before >= top_p, float("-inf"))  # the first token always stays
    return torch.empty_like(logits).scatter_(1, index, ordered)


# ---- Algorithm: episodes ----------------------------------------------------------------------------------


class Episodes:
    """B prompts and responses of this rank, and all that follows from their ids.

    queries: ids of the prompts; responses (B, Tr): PAD after EOS; query_texts, response_texts
    prompt_rows: the rows of the data set that the prompts come from, for judges that want their columns
    lengths (B,): tokens of each response, EOS counted; ended (B,) bool: whether EOS came
    mask, value_mask (B, Tr) bool: tokens that count, and states whose value counts
    sequences: ids of query and response in one list, without PAD
    """

    def __init__(self, prompts, responses, tokenizer, eos_ids):
        self.queries, self.query_texts, self.prompt_rows = zip(*prompts)
        self.responses, self.lengths, self.ended = truncate_at_eos(responses, eos_ids, tokenizer.pad_token_id)
        self.mask, self.value_mask = response_masks(self.lengths, responses.shape[1])
        self.response_texts = decode_responses(tokenizer, self.queries, self.responses)
        rows = zip(self.queries, self.responses.tolist(), self.lengths.tolist())
        self.sequences = [query + response[:length] for query, response, length in rows]

    def micro_batches(self, rows, size):
        """These rows, `size` at a time. [E20] Similar lengths are together, so that little is padded.

        The longest come first: where memory is too small, the run ends in its first micro-batch.
        """
        return chunks(sorted(rows, key=lambda i: -len(self.sequences[i])), size)

    def batch(self, rows):
        """These rows, padded on the left: ids (b, T), attention_mask (b, T) bool, width, shift (b,).

        [E20] Query and response touch, and end in the last column. So T is the longest row, and not the
        longest query plus the longest response (theirs: always 512 + 53). The longest response has `width`
        tokens. Token t of row i stands in column shift[i] + t of the last `width` columns:

            q q r r r r    width 4, shift 0
            . q q q r r             shift 2
        """
        ids, attention_mask = pad([self.sequences[i] for i in rows], 0, "left", self.lengths.device)
        width = max(len(self.sequences[i]) - len(self.queries[i]) for i in rows)
        return ids, attention_mask, width, width - self.lengths[rows]


def truncate_at_eos(responses, eos_ids, pad_id):
    """Keep each response up to its first EOS, with PAD after it.

    responses (B, Tr) -> responses (B, Tr), lengths (B,) with EOS counted, ended (B,) bool.
    """
    is_eos = torch.isin(responses, eos_ids)
    ended = is_eos.any(1)
    # [detail 23] a response ends at its first EOS
    lengths = torch.where(ended, is_eos.int().argmax(1) + 1, responses.shape[1])
    kept = torch.arange(responses.shape[1], device=responses.device) < lengths[:, None]
    return responses.masked_fill(~kept, pad_id), lengths, ended


def response_masks(lengths, response_length):
    """mask (B, Tr): tokens that count, t <= e; value_mask (B, Tr): states whose value counts, t <= e + 1.

    e = lengths - 1 is the index of the last kept token, EOS where there is one.
    """
    t = torch.arange(response_length, device=lengths.device)
    mask = t < lengths[:, None]  # [detail 30] log-probabilities after EOS are masked: KL 0 and ratio 1
    value_mask = t < lengths[:, None] + 1  # [detail 31] the state after EOS counts: the score lands there
    return mask, value_mask


# ---- Algorithm: log-probabilities, values, scores ---------------------------------------------------------


def response_logprobs(model, episodes, rows, args, forbidden, entropies=None):
    """log p of the response tokens of these rows, under policy or reference: (b, Tr), 0 after EOS.

    entropies (B, Tr): where given, these rows of it are filled with the entropy of each token's distribution.
    """
    ids, attention_mask, width, shift = episodes.batch(rows)
    logits = response_logits(model, ids, attention_mask, width, args.temperature, forbidden)  # (b, width, V)
    mask = episodes.mask[rows]
    if entropies is not None:
        entropies[rows] = left_aligned(token_entropies(logits), shift, args.response_length) * mask
    logprobs = left_aligned(token_logprobs(logits, ids[:, -width:]), shift, args.response_length)
    return logprobs * mask  # [E15] 0 after EOS (theirs: 1.0)


def response_values(critic, episodes, rows, args):
    """Values (b, Tr) of the states before each response token and, if a column is left, after the last one."""
    ids, attention_mask, width, shift = episodes.batch(rows)
    values = critic(ids, attention_mask)[:, -width - 1 :]  # [detail 28] V_t is read one step before token t
    return left_aligned(values, shift, args.response_length) * episodes.value_mask[rows]


def response_logits(model, ids, attention_mask, width, temperature, forbidden):
    """Logits (b, width, V) in fp32 that the last `width` tokens of ids (b, T) were drawn from."""
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # [detail 45] they count real tokens
    logits = model(
        input_ids=torch.where(attention_mask, ids, 0),  # [detail 3] PAD is never embedded
        attention_mask=attention_mask.long(), position_ids=position_ids, use_cache=False,
        logits_to_keep=width + 1).logits[:, :-1]  # [detail 28] token t is predicted one position before it
    # [detail 27] at the sampling temperature: else the KL would be of another policy than the one that sampled
    return scale_logits(logits, temperature, forbidden)


def left_aligned(values, shift, length):
    """values (b, w), each row moved left by shift (b,), so that token t is in column t -> (b, length).

    The columns after a row's end repeat its last value: nothing counts there.
    """
    columns = torch.arange(length, device=values.device) + shift[:, None]
    return values.gather(1, columns.clamp(max=values.shape[1] - 1))


def token_logprobs(logits, tokens):
    """log p(token) of tokens (B, Tr) under logits (B, Tr, V) -> (B, Tr)."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def token_entropies(logits):
    """Entropy of each token's distribution in nats: (B, Tr, V) -> (B, Tr)."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


@torch.no_grad()
def score_responses(reward_model, reward_function, episodes, args, retokenizer=None):
    """Score of each response (B,): the reward model's at the last token, or a Python function's of the texts.

    retokenizer: the reward model's own tokenizer, where it is not the policy's.
    """
    device, texts = episodes.ended.device, (episodes.query_texts, episodes.response_texts)
    if reward_function:
        scores = call_judge(reward_function, "--reward_function", *texts, episodes.prompt_rows)
        scores = torch.tensor(scores, device=device)
    else:
        sequences = episodes.sequences
        if retokenizer:  # [E22] it reads decoded texts, with a terminator of its own where a response ended
            sequences = retokenize(texts, episodes.ended.tolist(), retokenizer, reward_model.classifier)
        if reward_model.terminator is not None:  # [E29] it reads the end at the token at which it was trained
            sequences = [ids[:-1] + [reward_model.terminator] if ended else ids
                         for ids, ended in zip(sequences, episodes.ended.tolist())]
        scores = torch.zeros(len(sequences), device=device)
        by_length = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        for rows in chunks(by_length, args.micro_batch_size):
            ids, attention_mask = pad([sequences[i] for i in rows], 0, "right", device)
            scores[rows] = at_last_token(reward_model(ids, attention_mask), attention_mask)
    if args.missing_eos_score is None:
        return scores
    # [detail 13] a score away from EOS means nothing; [detail 23] so it is replaced, not reduced
    return torch.where(episodes.ended, scores, args.missing_eos_score)


def at_last_token(values, mask):
    """values (B, T) at each row's last True of mask (B, T), wherever the padding is -> (B,) [detail 12].

    Searching for the first PAD instead finds position 0 in a left-padded row.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last_index = (positions * mask).argmax(-1)  # (B,)
    return values[torch.arange(len(values), device=mask.device), last_index]


# ---- Algorithm: rewards and advantages --------------------------------------------------------------------


def k1(logprobs, ref_logprobs):
    """KL estimate log pi - log ref of each token. [detail 32] Unbiased; it may be negative. All (B, Tr)."""
    return logprobs - ref_logprobs


def k3(logprobs, ref_logprobs):
    """KL estimate ref/pi - 1 - log(ref/pi): unbiased too, never negative (Schulman 2020). All (B, Tr)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(kl, scores, lengths, kl_coef):
    """-kl_coef * kl (B, Tr) at every token, plus scores (B,) at one index each -> (B, Tr).

    e = lengths - 1 is the index of the last kept token. No token is chosen at e + 1. The score corrects the value
    of that state, which starts as the score itself (detail 22), and reaches the policy through GAE.
    """
    rewards = -kl_coef * kl  # [detail 32] every token pays, EOS too
    # [detail 33] the score lands at e + 1, one step after EOS, or at e where that is the last column
    score_index = torch.where(lengths < kl.shape[1], lengths, lengths - 1)
    rewards[torch.arange(len(kl), device=kl.device), score_index] += scores
    return rewards


def masked_mean(values, mask):
    """Mean of values where mask is True, both (..., B, Tr). [E8] Over all ranks: every rank must call it."""
    total, count = all_sum(torch.stack([(values * mask).sum(), mask.sum().float()]))
    return total / count


def masked_variance(values, mask):
    """Variance of values where mask is True, divided by their count. Over all ranks, as masked_mean."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def masked_whiten(values, mask, shift_mean=True):
    """(values - mean) / sqrt(variance + 1e-8) over mask (B, Tr) and all ranks, 0 elsewhere.

    [detail 25] Advantages lose their mean. [detail 24] Rewards keep it (shift_mean=False).
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_variance(values, mask) + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask  # [detail 37] 0 where nothing counts


def gae(rewards, values, gamma, lam):
    """Generalised advantage estimation. [detail 36] There is no value after the last column.

    rewards, values (B, Tr), 0 where nothing counts -> advantages, returns (B, Tr).
    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + V_t
    """
    advantages, advantage, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
    return advantages, advantages + values


# ---- Algorithm: losses ------------------------------------------------------------------------------------


def policy_losses(new_logprobs, logprobs, advantages, cliprange):
    """PPO's clipped surrogate loss of each token, and where it is clipped. All (..., B, Tr)."""
    ratio = torch.exp(new_logprobs - logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).float()  # [detail 38] the worse case


def value_losses(new_values, values, returns, cliprange_value):
    """Half the larger of two squared errors: of the new value, and of it clipped to near the rollout's.

    And where the latter is the larger. All (..., B, Tr).
    """
    clipped_values = torch.clamp(new_values, values - cliprange_value, values + cliprange_value)
    unclipped, clipped = (new_values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped).float()  # [detail 39] the worse case


def check_first_ratio(log_ratio, saved_on_failure, folder, update, bf16):
    """Stop where the log-probabilities moved before the first step. log_ratio: (rows, Tr), 0 if all is well.

    Scoring and update call the same function on the same rows. What can differ is the model: dropout, a forward
    that is not deterministic, or a change that somebody made to one of the two places.
    """
    stop_if_not_finite({"first log-ratio": log_ratio}, saved_on_failure, folder, update)
    drift = float(all_max(log_ratio.abs().max()))
    if drift > 1e-4 and bf16:
        print0(f"warning: update {update}: first log ratio off by {drift:.1e} (bf16 rounding)")
    elif drift > 1e-4:
        fail(f"update {update}: log-probabilities moved by {drift:.1e} before its first step. Scoring and "
             "update disagree: dropout, or a forward that is not deterministic")


# ---- Metrics ----------------------------------------------------------------------------------------------


def episode_means(of_episodes, batch_size):
    """Means of tensors {name: (B,) or (B, Tr)} over the episodes of all ranks, which are batch_size [E8]."""
    sums = all_sum(torch.stack([x.sum().float() for x in of_episodes.values()]))
    return dict(zip(of_episodes, (sums / batch_size).tolist()))


def update_metrics(episodes, new_logprobs, logprobs, advantages, new_values, values, returns, args):
    """How the update went, under TRL's names: means over the tokens, or the states, of all epochs and ranks.

    new_logprobs, new_values (epochs, B, Tr): what each epoch computed. The others (B, Tr).
    """
    mask, value_mask = (x.expand_as(new_values) for x in (episodes.mask, episodes.value_mask))
    pg_losses, pg_clipped = policy_losses(new_logprobs, logprobs, advantages, args.cliprange)
    vf_losses, vf_clipped = value_losses(new_values, values, returns, args.cliprange_value)
    ratio = (new_logprobs - logprobs).exp()
    unexplained = masked_variance(returns - values, episodes.value_mask)
    variance = masked_variance(returns, episodes.value_mask)
    return {
        "loss/policy_avg": masked_mean(pg_losses, mask), "policy/clipfrac_avg": masked_mean(pg_clipped, mask),
        "loss/value_avg": masked_mean(vf_losses, value_mask),
        "val/clipfrac_avg": masked_mean(vf_clipped, value_mask),
        "val/explained_variance": 1 - unexplained / variance.clamp(min=1e-8),
        "policy/approxkl_avg": masked_mean(0.5 * (new_logprobs - logprobs) ** 2, mask),
        "val/ratio": masked_mean(ratio, mask), "val/ratio_var": masked_variance(ratio, mask),
        "val/ratio_max": all_max(ratio.max())}


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. ranks, data, models
    check_flags(args)
    check_batch_size(args.batch_size, args.num_minibatches, args.total_episodes)
    args = settle_companions(args, "prompts", ["sft_model", "reward_model"], eval_prompts=None,
                             gold_function="no judge watches")
    device = init_distributed(args.timeout_minutes)
    script = Path(__file__).stem  # it names the folder of a run
    folder = choose_folder(args, script)
    tokenizer = load_tokenizer(args.sft_model, "--sft_model")
    prompts = load_prompts(args.prompts, "--prompts", tokenizer, args)
    if args.eval_prompts:
        eval_prompts = load_prompts(args.eval_prompts, "--eval_prompts", tokenizer, args)
    else:
        rows = [prompt.row for prompt in prompts]
        prompts, eval_prompts = hold_out(prompts, rows, "--prompts", "--eval_prompts")
    eval_prompts = eval_prompts[: args.num_eval_prompts]
    if len(eval_prompts) < world_size():
        fail(f"--num_eval_prompts {args.num_eval_prompts}, --eval_prompts {args.eval_prompts}: {len(eval_prompts)} "
             f"usable, and {world_size()} ranks need at least one each. Give more of them with --eval_prompts")
    gold_function = load_function(args.gold_function, "--gold_function", prompts + eval_prompts)
    reward_function = load_function(args.reward_function, "--reward_function", prompts + eval_prompts)
    policy, ref_policy, critic, reward_model, retokenizer = load_models(args, tokenizer, prompts[0].text)
    decoding_copy = None  # at ZeRO 3 the policy is in pieces: a whole copy to decode with
    if args.zero_stage == 3:
        decoding_copy = load_causal_lm(args.sft_model, "--sft_model", tokenizer, args.bf16).to(device)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
        critic.classifier.gradient_checkpointing_enable()
    critic_peak_lr = args.lr if args.critic_lr is None else args.critic_lr
    trained, engines = {"policy": policy, "critic": critic}, {}
    for name, model in trained.items():  # [E9] an optimizer each; [detail 47] theirs: one for both
        optimizer = torch.optim.AdamW(  # [detail 43] eps 1e-5 and weight decay 0.01, both written out
            model.to(device).parameters(), betas=(0.9, 0.999), eps=args.adam_eps,
            weight_decay=args.weight_decay, fused=True)  # fused: one pass over the weights, faster
        engines[name] = create_engine(model, optimizer, args)
    eos_ids = torch.tensor(terminator_ids(tokenizer), device=device)
    vocabulary_size = ref_policy.get_output_embeddings().weight.shape[0]
    forbidden = forbidden_tokens(tokenizer, vocabulary_size).to(device)  # [E12] PAD, and ids without a token

    # 2. output folder, resume
    open_folder(folder, args, script, {"--prompts": prompts, "--eval_prompts": eval_prompts})
    resumed = load_checkpoint(folder, engines) if args.resume else None
    progress = resumed or {"step": 0, "best": float("-inf")}
    tracker = Tracker(folder, args, progress["step"] + 1 if resumed else 0)
    print_plan(args, Args.lr, folder, device, policy, critic, (ref_policy, reward_model, decoding_copy))

    def evaluate(update):
        """Continue the held-out prompts. [detail 49] Every few updates; [E16] always with the same noise."""
        mine = range(rank(), len(eval_prompts), world_size())
        my_prompts = [eval_prompts[i] for i in mine]
        noise = sampling_noise(0, 0, mine, args.response_length)
        decoder = rollout_weights(engines["policy"], decoding_copy).eval()
        responses = rollout(decoder, my_prompts, noise, args, tokenizer, forbidden, eos_ids)
        episodes = Episodes(my_prompts, responses, tokenizer, eos_ids)
        kl = torch.zeros(responses.shape, device=device)
        with torch.no_grad(), on_device(ref_policy, device, args.offload_frozen):
            for rows in episodes.micro_batches(range(len(mine)), args.micro_batch_size):
                logprobs, ref_logprobs = (response_logprobs(model, episodes, rows, args, forbidden)
                                          for model in (decoder, ref_policy))
                kl[rows] = k1(logprobs, ref_logprobs)
        with on_device(reward_model, device, args.offload_frozen):
            scores = score_responses(reward_model, reward_function, episodes, args, retokenizer)
        columns = {
            "query": episodes.query_texts, "response": episodes.response_texts, "score": scores.tolist(),
            "kl": kl.sum(1).tolist(), "length": episodes.lengths.tolist(), "ended": episodes.ended.tolist()}
        if gold_function:
            texts = episodes.query_texts, episodes.response_texts
            columns["gold"] = call_judge(gold_function, "--gold_function", *texts, episodes.prompt_rows)
        samples = gather_rows(dict(zip(columns, row)) for row in zip(*columns.values()))
        starts = gather_rows(tuple(row) for row in episodes.responses[:, :4].tolist())
        metrics = {f"eval/{name}": float(np.mean([row[name] for row in samples]))
                   for name in list(columns)[2:]}
        metrics["eval/rlhf_reward"] = metrics["eval/score"] - args.kl_coef * metrics["eval/kl"]
        metrics["eval/distinct_starts"] = len(set(starts)) / len(starts)  # low: it always says the same
        tracker.samples(update, samples)
        tracker.log(update, metrics)
        gold = f"  gold {metrics['eval/gold']:.3f}" if gold_function else ""
        print0(f"{update:>6}/{args.num_updates}  held-out score {metrics['eval/score']:.3f}{gold}  "
               f"kl {metrics['eval/kl']:.2f}  length {metrics['eval/length']:.1f}")
        return metrics, samples

    if progress["step"] == 0:
        metrics, samples = evaluate(0)
        progress |= {"before": metrics, "samples_before": [row["response"] for row in samples[:20]]}

    for update in range(progress["step"] + 1, args.num_updates + 1):
        clock = [time.time()]
        fraction_left = 1 - (update - 1) / args.num_updates  # [detail 42] learning rates fall linearly to 0
        lr, critic_lr = args.lr * fraction_left, critic_peak_lr * fraction_left

        # 3. rollout: this rank's episodes of the update
        first = (update - 1) * args.batch_size
        numbers = range(first + rank(), first + args.batch_size, world_size())
        batch_prompts = [prompts[i] for i in prompts_of_episodes(numbers, len(prompts), args.seed)]
        noise = sampling_noise(args.seed, update, numbers, args.response_length)
        decoder = rollout_weights(engines["policy"], decoding_copy).eval()
        responses = rollout(decoder, batch_prompts, noise, args, tokenizer, forbidden, eos_ids)
        engines["policy"].train()  # in eval mode gradient checkpointing does nothing
        batch_prompts, responses = deal_by_length(  # [E28] dealt anew to the ranks, so that none waits for another
            batch_prompts, responses, tokenizer.pad_token_id, args.micro_batch_size)
        episodes = Episodes(batch_prompts, responses, tokenizer, eos_ids)
        mask, value_mask = episodes.mask, episodes.value_mask  # (B, Tr) bool: tokens and states that count
        clock.append(time.time())

        # 4. scores (B,)
        with on_device(reward_model, device, args.offload_frozen):  # [detail 48] on the GPU only while it is used
            scores = score_responses(reward_model, reward_function, episodes, args, retokenizer)

        # 5. log-probabilities and values (B, Tr), in the micro-batches of the first epoch: in others they would be
        # padded and so rounded differently, and the first ratio would not be 1 [E14]
        plan = []  # [epoch][minibatch][micro-batch] -> rows of this rank
        for epoch in range(args.num_ppo_epochs):
            # [detail 41] new minibatches in each epoch; within one, rows go by length
            order = permutation(len(numbers), args.seed, update, rank(), epoch)
            minibatches = chunks(order, len(numbers) // args.num_minibatches)
            plan.append([episodes.micro_batches(rows, args.micro_batch_size) for rows in minibatches])
        logprobs, ref_logprobs, values, entropies = torch.zeros(4, *responses.shape, device=device)
        with torch.no_grad(), on_device(ref_policy, device, args.offload_frozen):
            for rows in sum(plan[0], []):  # the micro-batches of the first epoch, one after the other
                logprobs[rows] = response_logprobs(
                    engines["policy"], episodes, rows, args, forbidden, entropies)
                ref_logprobs[rows] = response_logprobs(ref_policy, episodes, rows, args, forbidden)
                values[rows] = response_values(engines["critic"], episodes, rows, args)
        clock.append(time.time())

        # 6. rewards and advantages (B, Tr)
        kl = k1(logprobs, ref_logprobs)
        rewards = token_rewards(kl, scores, episodes.lengths, args.kl_coef)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, value_mask, shift_mean=False)  # [detail 35] also over e + 1
        advantages, returns = gae(rewards, values, args.gamma, args.lam)
        advantages = masked_whiten(advantages, mask)  # [detail 36] the returns stay as they are
        saved_on_failure = {"queries": episodes.queries, "responses": episodes.responses}
        stop_if_not_finite(
            {"scores": scores, "values": values, "ref_logprobs": ref_logprobs, "logprobs": logprobs},
            saved_on_failure, folder, update)

        # 7. update: epochs x minibatches optimizer steps
        epoch_logprobs, epoch_values = torch.zeros(2, args.num_ppo_epochs, *responses.shape, device=device)
        norms = {name: [] for name in engines}  # gradient norms of each step
        for epoch in range(args.num_ppo_epochs):
            for minibatch in plan[epoch]:
                members = sum(minibatch, [])  # all rows of this minibatch
                num_tokens, num_states = all_sum(
                    torch.stack([mask[members].sum(), value_mask[members].sum()]).float())
                for rows in minibatch:
                    new_logprobs = response_logprobs(engines["policy"], episodes, rows, args, forbidden)
                    pg_losses, _ = policy_losses(
                        new_logprobs, logprobs[rows], advantages[rows], args.cliprange)  # (b, Tr)
                    # [detail 40] a mean over tokens, [E2] those of the whole step and of all ranks
                    pg_loss = (pg_losses * mask[rows]).sum() / num_tokens
                    engines["policy"].backward(pg_loss * world_size())  # DeepSpeed divides by the ranks
                    epoch_logprobs[epoch, rows] = new_logprobs.detach()
                if not norms["policy"]:  # [E14] before the first step of this update the ratio must be 1
                    log_ratio = epoch_logprobs[0, members] - logprobs[members]
                    check_first_ratio(log_ratio, saved_on_failure, folder, update, args.bf16)
                norms["policy"].append(optimizer_step(engines["policy"], lr))

                for rows in minibatch:  # [E9] after the policy's step: one model's gradients in memory at a time
                    new_values = response_values(engines["critic"], episodes, rows, args)
                    vf_losses, _ = value_losses(
                        new_values, values[rows], returns[rows], args.cliprange_value)  # (b, Tr)
                    vf_loss = args.vf_coef * (vf_losses * value_mask[rows]).sum() / num_states
                    engines["critic"].backward(vf_loss * world_size())
                    epoch_values[epoch, rows] = new_values.detach()
                norms["critic"].append(optimizer_step(engines["critic"], critic_lr))
        clock.append(time.time())

        # 8. log
        metrics = update_metrics(
            episodes, epoch_logprobs, logprobs, advantages, epoch_values, values, returns, args)
        metrics["policy/grad_norm"] = sum(norms["policy"]) / len(norms["policy"])
        metrics["val/grad_norm"] = sum(norms["critic"]) / len(norms["critic"])
        kl_cost = args.kl_coef * kl.sum(1)  # (B,)
        of_episodes = {
            "objective/scores": scores, "objective/kl": kl, "objective/kl_k3": k3(logprobs, ref_logprobs),
            "objective/entropy": -logprobs, "objective/non_score_reward": -kl_cost,
            "objective/rlhf_reward": scores - kl_cost,
            "val/length": episodes.lengths, "val/ended": episodes.ended}
        if gold_function:
            texts = episodes.query_texts, episodes.response_texts
            golds = call_judge(gold_function, "--gold_function", *texts, episodes.prompt_rows)
            of_episodes["objective/gold"] = torch.tensor(golds, device=device)
        metrics |= episode_means(of_episodes, args.batch_size)
        metrics["policy/entropy_avg"] = masked_mean(entropies, mask)
        metrics |= {"lr": lr, "critic_lr": critic_lr, "episode": update * args.batch_size}
        stop_if_not_finite(metrics, saved_on_failure, folder, update)
        seconds = dict(zip(("generate", "score", "train"), np.diff(clock)))
        tracker.log(update, metrics | {f"time/{name}_seconds": value for name, value in seconds.items()} | {
            "time/generate_tokens_per_second": metrics["val/length"] * args.batch_size / seconds["generate"]})
        tracker.line(
            update, args.num_updates, score=(metrics["objective/scores"], "6.3f"),
            gold=(metrics.get("objective/gold"), ".3f"), kl=(metrics["objective/kl"], "6.2f"),
            length=(metrics["val/length"], "4.1f"), ended=(metrics["val/ended"], ".2f"),
            entropy=(metrics["policy/entropy_avg"], ".2f"))
        if metrics["objective/kl"] > 40:
            print0("warning: KL above 40 nats. In the paper such runs had the best scores and the worst texts")

        # 9. evaluate, keep the best, save
        if update % args.eval_every == 0 or update == args.num_updates:
            after, samples = evaluate(update)
            if after["eval/rlhf_reward"] > progress["best"]:
                progress["best"] = after["eval/rlhf_reward"]
                save_model(engines["policy"], policy, tokenizer, folder / "best")
        stop = interrupted(device)  # by SIGTERM
        if (stop or update % args.save_every == 0) and update < args.num_updates:
            save_checkpoint(folder, update, engines, progress)
            if stop:
                leave_interrupted(folder, update)

    # 10. save, show samples before and after
    save_model(engines["policy"], policy, tokenizer, folder)
    save_model(engines["critic"], critic.classifier, tokenizer, folder / "critic")
    before = progress["before"]
    model_card(folder, f"{script}.py", args.sft_model, args.prompts, [
        f"Held-out score {before['eval/score']:.3f} -> {after['eval/score']:.3f}, "
        f"KL {after['eval/kl']:.2f}."])
    side_by_side = [
        {"query": row["query"], "before": text_before, "after": row["response"], "score": row["score"]}
        for row, text_before in zip(samples, progress["samples_before"])]
    tracker.close({"before": before, "after": after, "best_rlhf_reward": progress["best"],
                   "episodes": args.num_updates * args.batch_size, "samples": side_by_side})
    for row in side_by_side[:8]:
        print0(f"\n{row['query']}\n  before:{row['before']}\n  after: {row['after']}")
    gold = f", gold {before['eval/gold']:.3f} -> {after['eval/gold']:.3f}" if gold_function else ""
    print0(f"\nsaved {folder}: score {before['eval/score']:.3f} -> {after['eval/score']:.3f}{gold}")
    finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
