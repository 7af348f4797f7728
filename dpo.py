"""DPO: a language model trained on preferences directly, against a frozen reference, without a reward model.

    policy and reference both start as the SFT model; the reference never changes
    for each batch of (prompt x, chosen response y_w, rejected response y_l), in random order:
        logprobs     = log pi(y|x) of both responses under the policy, each a sum over its tokens
        ref_logprobs = the same under the reference
        h            = (logprobs - ref_logprobs) of y_w, minus that of y_l
        loss         = mean over the batch of -log sigmoid(beta h)
        one step of AdamW down the loss
    now and then: beta (logprobs - ref_logprobs) as the reward of held-out pairs; sampled continuations

Run:     python dpo.py                                   the embedded task, CPU, minutes
         deepspeed dpo.py --model ... --train_data ... --lr 5e-7 --zero_stage 2 --bf16    all GPUs here
Reads:   --model, an SFT model; --train_data and --eval_data with columns {prompt, chosen, rejected};
         --eval_prompts with a column {prompt}
Writes:  --output_dir: the policy as a Hugging Face folder, metrics.jsonl, samples.jsonl, summary.json,
         TensorBoard, checkpoints; --ref_cache: the reference's log-probabilities
Result:  README.md (embedded task); not yet measured at the papers' scale

Papers: "Direct Preference Optimization" (Rafailov et al. 2023, arXiv 2305.18290), as used by "RLHF Workflow"
(Dong et al. 2024, arXiv 2405.07863), section 3. `[W N]` are details of the latter and its code, `[detail N]`
those of the N+ paper, `[E N]` our own choices; docs/details.md has every one with its reason.

Differs from the papers' code:
  1. too long pairs are dropped and counted, not cut                                               [W4]
  2. one mean over the whole optimizer step, not a mean of micro-batch means                       [E2]
  3. prompt and response are tokenised apart and joined as ids                                     [E1]
  4. a response ends with exactly one terminator, and with none where it was cut                   [W3]
  5. reference log-probabilities come from a cache, which any change of model or data renews       [W6]

Shapes:  N pairs, B of them in this micro-batch, T tokens of a row, V vocabulary. In a (2, B) tensor row 0 is
         for the chosen responses and row 1 for the rejected ones.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from utils.companions import hold_out, settle_companions
from utils.data import call_judge, chunks, describe, distinct_prompts, load_function, load_held_out
from utils.data import load_prompts, load_rows, over_ranks, pad, permutation, rows_of_this_rank
from utils.launch import all_sum, check_batch_size, check_flags, create_engine, fail, finish, from_rank0
from utils.launch import gather_rows, init_distributed, note_small_lr, optimizer_step, print0
from utils.launch import print_memory_plan, rank, rollout_weights, world_size
from utils.models import check_length, check_rate, check_vocabulary, count_parameters, fingerprint
from utils.models import load_causal_lm, load_tokenizer, save_model
from utils.packing import check_mask, shared_logprobs
from utils.run import Tracker, cached_array, choose_folder, interrupted, leave_interrupted, load_checkpoint
from utils.run import make_folder, model_card, open_folder, save_checkpoint, stop_if_not_finite
from utils.sampling import sample_responses
from utils.statistics import accuracy, clustered_interval
from utils.tokens import encode_texts, show_example


@dataclass
class Args:
    # models and data
    model: str = "assets/sft"
    """the policy starts here: Hugging Face folder or Hub id"""
    ref_model: str | None = None
    """frozen reference; None: --model itself. Paper: the SFT model in every iteration (W1)"""
    allow_pickle: bool = False
    """read models whose weights are pickled (.bin) alone: a stranger's pickle may run code when it is read"""
    train_data: str = "assets/data/preferences_train.jsonl"
    """preferences: .jsonl, .json, .csv, .parquet, folder or Hub id; columns {prompt, chosen, rejected}. Where
    the sampler cut a response, chosen_finished or rejected_finished is false: it gets no terminator (W3)"""
    eval_data: tuple[str, ...] | None = (
        "assets/data/preferences_validation.jsonl", "assets/data/preferences_persuasion.jsonl")
    """held-out preferences, one or more, each evaluated apart; None, the default with your own data: a share
    of --train_data"""
    eval_prompts: str | None = "assets/data/validation.jsonl"
    """held-out prompts to continue; column {prompt}; None, the default with your own data: those of the
    held-out pairs"""
    gold_function: str | None = "assets.vader:positive"
    """module:name of a Python function (queries, responses) -> scores that only watches; None, the default
    with your own data: no judge"""
    columns: tuple[str, ...] = ()
    """other names of columns in your data files, as in prompt=question chosen=answer_a: ours=yours"""
    max_prompt_length: int = 32
    """tokens; longer prompts to continue are dropped and counted, TL;DR posts cut (detail 2). Paper: 1,000"""
    max_length: int = 64
    """tokens of prompt + response + EOS; longer pairs are dropped and counted (W4). Paper: 2,048"""
    ref_cache: str | None = "runs/ref_logprobs"
    """folder of reference log-probabilities, computed once (W6); None: the reference stays in memory and
    computes them in the policy's batches, which saves rounding errors (in bf16 hundredths of a nat)"""

    # DPO
    beta: float = 1.0
    """strength of the KL constraint to the reference; higher stays nearer to it. Paper: 0.1"""
    loss: str = "sigmoid"
    """sigmoid, hinge or ipo; more in experiments/dpo_losses.py. Paper: sigmoid"""
    label_smoothing: float = 0.0
    """probability that a label is wrong, for the sigmoid loss (cDPO). Paper: 0"""
    nll_coef: float = 0.0
    """weight of the chosen responses' negative log-likelihood, a mean over their tokens (RPO). Paper: 0"""

    # optimisation
    epochs: int = 2
    """passes over the pairs. Paper: 2"""
    batch_size: int = 32
    """pairs per optimizer step, over all ranks. Paper: 128"""
    micro_batch_size: int = 16
    """pairs per forward and rank; changes memory and speed, not the gradient. Paper: 2"""
    share_prefix: bool = False
    """put both texts of a pair into one row that holds their common beginning once, each blind to the other:
    faster where prompts are long; needs a model that obeys such a mask (E27)"""
    lr: float = 2e-4
    """peak learning rate of AdamW; larger models need another (docs/scaling.md). Paper: 5e-7"""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: down to 0 as half a cosine, or constant. Paper: cosine"""
    warmup_ratio: float = 0.03
    """share of the steps, rounded up, with rising learning rate. Paper: 0.03"""
    weight_decay: float = 0.0
    """AdamW weight decay. Paper: 0"""
    adam_eps: float = 1e-8
    """AdamW epsilon. Paper: 1e-8"""
    max_grad_norm: float = 1.0
    """clip the global gradient norm here; 0 = off. Paper: 1.0"""

    # evaluation
    eval_every: int = 100
    """optimizer steps between evaluations (there is one before the first and after the last)"""
    num_eval_prompts: int = 500
    """held-out prompts to continue"""
    response_length: int = 24
    """tokens of a continuation at most"""
    temperature: float = 0.7
    """sampling temperature of the continuations; training has none (W2)"""

    # run
    seed: int = 1
    """decides the order of the pairs and the sampling noise"""
    output_dir: str | None = None
    """where to write; default runs/dpo, or runs/dpo-2, ... if that exists"""
    resume: bool = False
    """continue the run in output_dir from its last checkpoint, exactly"""
    overwrite: bool = False
    """replace an earlier run in output_dir"""
    save_every: int = 200
    """optimizer steps between checkpoints"""
    log_every: int = 10
    """optimizer steps between console lines and metrics, which are those of one step"""

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


# ---- Data -------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Token ids of a prompt and of both responses to it, and the row of the data set that they come from."""

    prompt: list
    chosen: list
    rejected: list
    row: dict


def load_preferences(path, flag, tokenizer, args):
    """List of Pairs, without those that cannot be used or are too long, which are counted.

    [W3] A response ends with one terminator [E29], and with none where it was cut.
    """
    rows = load_rows(path, flag, [("prompt", "chosen", "rejected")], tokenizer, args.max_prompt_length)
    different = [row for row in rows if row["chosen"] != row["rejected"]]
    pairs, needed, dropped = [], [], {"chosen equal to rejected": len(rows) - len(different), "empty": 0,
                                  f"over {args.max_length} tokens": 0}
    for row in different:
        (prompt, chosen), (_, rejected) = (  # [E1] tokenised apart, joined as ids
            encode_texts(row["prompt"], row[side], tokenizer, row.get(f"{side}_finished") is not False)
            for side in ("chosen", "rejected"))
        needed.append(len(prompt) + max(len(chosen), len(rejected)))
        if not (prompt and chosen and rejected):
            dropped["empty"] += 1
        elif chosen == rejected:  # texts that differ in their terminator alone
            dropped["chosen equal to rejected"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > args.max_length:  # [W4] a cut would lose the end
            dropped[f"over {args.max_length} tokens"] += 1
        else:
            pairs.append(Pair(prompt, chosen, rejected, row))
    describe(flag, path, [row_length(pair, False) for pair in pairs], dropped, needed)
    return pairs


def row_length(pair, shared):
    """Tokens of the longest row of a pair. shared: whether both responses stand in one row."""
    chosen, rejected = len(pair.chosen), len(pair.rejected)
    if shared:  # the prompt's last token stands twice there: it predicts both first tokens
        return len(pair.prompt) + chosen + 1 + rejected
    return len(pair.prompt) + max(chosen, rejected)


def collate_pairs(pairs, device):
    """Pairs as left-padded rows, B chosen, then B rejected: ids, mask (2B, T), response lengths (2B,)."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    ids, mask = pad([prompt + response for prompt, response in rows], 0, "left", device)  # [detail 3] 0, not PAD
    return ids, mask, torch.tensor([len(response) for _, response in rows], device=device)


# ---- Model ------------------------------------------------------------------------------------------------


def response_logprobs(model, ids, mask, lengths):
    """log pi(response | prompt) of each row: a sum over its tokens, EOS included, in fp32 [W2] -> (rows,).

    ids, mask: (rows, T), left-padded, so that the last `lengths` (rows,) tokens of a row are its response.
    Logits are made there only, each one position before its token, and no temperature divides them.
    """
    width = int(lengths.max())
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)  # [detail 45] count real tokens
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids, use_cache=False,
                   logits_to_keep=width + 1).logits[:, :-1].float()  # (rows, width, V)
    logprobs = token_logprobs(logits, ids[:, ids.shape[1] - width :])  # (rows, width)
    is_response = torch.arange(width, 0, -1, device=ids.device) <= lengths[:, None]
    return (logprobs * is_response).sum(-1)


def token_logprobs(logits, tokens):
    """log p(token) of tokens (B, Tr) under logits (B, Tr, V) -> (B, Tr)."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def pair_logprobs(model, pairs, args, device):
    """log pi of the chosen and the rejected responses of B pairs, in one forward -> (2, B).

    A None among the pairs is there because every rank must run as many micro-batches as the others. It gets 0.
    """
    pairs = [pair or Pair([0], [], [], {}) for pair in pairs]
    if args.share_prefix:
        return shared_logprobs(model, [pair[:3] for pair in pairs], device)  # the same numbers
    return response_logprobs(model, *collate_pairs(pairs, device)).view(2, -1)


# ---- Algorithm --------------------------------------------------------------------------------------------

# The losses of B pairs. logprobs, ref_logprobs: (2, B), log-probabilities of whole responses. With y_w chosen
# and y_l rejected,
#     u = log pi(y_w|x) - log ref(y_w|x),  v = log pi(y_l|x) - log ref(y_l|x),  h = u - v
# and beta * u, beta * v are the implicit rewards.


def sigmoid_losses(logprobs, ref_logprobs, beta, label_smoothing=0.0):
    """DPO: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing [W7] -> (B,)."""
    u, v = logprobs - ref_logprobs
    h = u - v
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def hinge_losses(logprobs, ref_logprobs, beta):
    """SLiC, RSO: max(0, 1 - beta h) [W8] -> (B,)."""
    u, v = logprobs - ref_logprobs
    h = u - v
    return F.relu(1 - beta * h)


def ipo_losses(logprobs, ref_logprobs, beta):
    """IPO: (h - 1 / (2 beta))^2, with sums over tokens as in its paper [W9] -> (B,)."""
    u, v = logprobs - ref_logprobs
    h = u - v
    return (h - 1 / (2 * beta)) ** 2


LOSSES = {"sigmoid": sigmoid_losses, "hinge": hinge_losses, "ipo": ipo_losses}
SMOOTHED = {"sigmoid"}  # the losses that --label_smoothing changes


def check_loss(args):
    """Fail in one line on an unknown --loss, and on a --label_smoothing that the loss does not have."""
    if args.loss not in LOSSES:
        fail(f"--loss {args.loss}: unknown. There are {', '.join(LOSSES)}")
    if args.label_smoothing and args.loss not in SMOOTHED:
        fail(f"--label_smoothing {args.label_smoothing}: --loss {args.loss} has none. Leave it at 0")


def preference_losses(logprobs, ref_logprobs, args):
    """Losses of B pairs by --loss, --beta and --label_smoothing -> (B,)."""
    smoothing = [args.label_smoothing] if args.label_smoothing else []
    return LOSSES[args.loss](logprobs, ref_logprobs, args.beta, *smoothing)


def cosine_lr(step, total_steps, warmup_steps, peak):
    """Learning rate after `step` optimizer steps: linear warm-up, then half a cosine to 0 [detail 42]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def constant_lr(step, total_steps, warmup_steps, peak):
    """Learning rate after `step` optimizer steps: linear warm-up, then constant."""
    return peak * min(1.0, step / warmup_steps) if warmup_steps else peak


# ---- Evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def score_pairs(model, pairs, args, device):
    """log pi of the responses of all pairs, each computed once over all ranks: (2, N) float32 array."""
    def score(some):
        return pair_logprobs(model, some, args, device).T.tolist()

    logprobs = over_ranks(score, pairs, lambda pair: row_length(pair, args.share_prefix),
                          2 * args.micro_batch_size, "log-probabilities", even=True)  # N of (chosen, rejected)
    return np.array(logprobs, dtype=np.float32).T.copy()


def reference_logprobs(reference, pairs, name, args, device):
    """score_pairs of the reference, read from --ref_cache where it was computed before [W6].

    The key is a hash of the reference's weights, config and precision, of all token ids (so of tokenizer,
    data and length limits), and of what decides about rounding: batches, layout, ranks, device, versions, ZeRO.
    """
    def compute():
        return score_pairs(reference, pairs, args, device)

    if not args.ref_cache:
        return compute()
    rounding = [args.micro_batch_size, args.share_prefix, world_size(), str(device), torch.__version__,
                args.zero_stage]
    key = from_rank0(lambda: fingerprint(reference, [pair[:3] for pair in pairs], rounding))
    return cached_array(Path(args.ref_cache) / f"{key[:16]}.npz", f"reference on {name}", compute)


def evaluate_pairs(engine, pairs, ref_logprobs, args):
    """Loss and implicit rewards of held-out pairs: the policy as a reward model [detail 19]."""
    logprobs = score_pairs(engine, pairs, args, engine.device)
    losses = preference_losses(torch.tensor(logprobs), torch.tensor(ref_logprobs), args)
    chosen, rejected = args.beta * (logprobs - ref_logprobs)
    correct = accuracy(chosen, rejected)
    low, high = clustered_interval(correct, [pair.row["prompt"] for pair in pairs])
    return {
        "loss": losses.mean(), "rewards/accuracies": correct.mean(), "rewards/accuracies_low": low,
        "rewards/accuracies_high": high, "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(), "logps/chosen": logprobs[0].mean(),
        "logps/rejected": logprobs[1].mean()}


def evaluate_samples(model, prompts, gold_function, tokenizer, args):
    """Continuations of held-out prompts, scored by the gold function if there is one: metrics, rows."""
    mine = [prompt for prompt in rows_of_this_rank(prompts) if prompt]
    rows = sample_responses(model, mine, tokenizer, args, 4 * args.micro_batch_size, args.seed + rank())
    if gold_function:
        texts = [row["query"] for row in rows], [row["response"] for row in rows]
        golds = call_judge(gold_function, "--gold_function", *texts, [prompt.row for prompt in mine])
        rows = [{**row, "gold": gold} for row, gold in zip(rows, golds)]
    starts = gather_rows(tuple(row.pop("tokens")[:4]) for row in rows)  # tokens: not every script has spaces
    rows = gather_rows(rows)
    names = [name for name in ("gold", "length", "ended") if name in rows[0]]
    metrics = {f"eval/{name}": np.mean([row[name] for row in rows]) for name in names}
    return metrics | {"eval/distinct_starts": len(set(starts)) / len(starts)}, rows


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. ranks, data, models
    check_flags(args)
    check_batch_size(args.batch_size)
    check_loss(args)
    args = settle_companions(
        args, "train_data", ["model"], eval_data=None, eval_prompts=None, gold_function="no judge watches")
    device = init_distributed(args.timeout_minutes)
    folder = choose_folder(args, "dpo")
    tokenizer = load_tokenizer(args.model, "--model")
    model = load_causal_lm(args.model, "--model", tokenizer)  # [detail 7] without dropout
    check_rate(args, "dpo", model)
    check_length(model, max(args.max_length, args.max_prompt_length + args.response_length),
                 "the larger of --max_length and --max_prompt_length + --response_length")
    train = load_preferences(args.train_data, "--train_data", tokenizer, args)
    if args.eval_data:
        held_out = load_held_out(args.eval_data, "--eval_data", lambda path: load_preferences(
            path, "--eval_data", tokenizer, args))  # {name: pairs}
    else:
        train, share = hold_out(train, [pair.row for pair in train], "--train_data", "--eval_data")
        held_out = load_held_out(["held_out"], "--train_data", lambda _: share)
    if args.eval_prompts:
        prompts = load_prompts(args.eval_prompts, "--eval_prompts", tokenizer, args)
    else:
        prompts = distinct_prompts(sum(held_out.values(), []), args.max_prompt_length)
    prompts = prompts[: args.num_eval_prompts]
    gold_function = load_function(args.gold_function, "--gold_function", prompts)
    ref_path, ref_flag = (args.ref_model, "--ref_model") if args.ref_model else (args.model, "--model")
    check_vocabulary(ref_path, ref_flag, tokenizer, args.model)
    # [W1] the reference is never trained and never replaced. [W5] It has the precision of the policy's forward
    reference = load_causal_lm(ref_path, ref_flag, tokenizer, args.bf16).eval()
    check_length(reference, args.max_length, "--max_length")
    if args.share_prefix:  # [W13] responses are blind to one another
        check_mask(model, "--share_prefix, --model", args.max_length)
        check_mask(reference, f"--share_prefix, {ref_flag}", args.max_length)
    if args.ref_cache:
        make_folder(args.ref_cache, "--ref_cache")

    # 2. policy, output folder, reference, resume
    decoding_copy = None  # at ZeRO 3 the model is in pieces: a whole copy to decode with
    if args.zero_stage == 3:
        decoding_copy = load_causal_lm(args.model, "--model", tokenizer, args.bf16).to(device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(device)
    optimizer = torch.optim.AdamW(  # [W11] eps 1e-8, no decay, clipping at 1: defaults of transformers' Trainer
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps, weight_decay=args.weight_decay)
    engine = create_engine(model, optimizer, args)
    open_folder(folder, args, "dpo", {"--train_data": [pair[:3] for pair in train], "--eval_data": {
        name: [pair[:3] for pair in pairs] for name, pairs in held_out.items()}, "--eval_prompts": prompts})
    reference.to(device)  # [W5] after create_engine: at ZeRO 3 that replaces torch's linear, for both models
    held_out_ref = {name: reference_logprobs(reference, pairs, name, args, device)
                    for name, pairs in held_out.items()}
    if args.ref_cache:
        train_ref = torch.tensor(reference_logprobs(reference, train, "training pairs", args, device))
        reference = None  # its memory is free from here on
    steps_per_epoch = math.ceil(len(train) / args.batch_size)  # [E3] an epoch's last batch may be smaller
    total_steps = args.epochs * steps_per_epoch
    # [W10] rounded up; at least one step has the peak
    warmup_steps = min(math.ceil(args.warmup_ratio * total_steps), total_steps - 1)
    state = (load_checkpoint(folder, {"model": engine}) if args.resume else None) or {"step": 0}
    tracker = Tracker(folder, args, state["step"] + 1 if state["step"] else 0)
    print0(f"{'model':<22}{args.model}: {count_parameters(model):,} parameters, {world_size()} rank(s) on "
           f"{device.type}; reference {ref_path}, {'in memory' if reference else 'cached'}")
    print0(f"{'plan':<22}{total_steps} steps of {args.batch_size} pairs = {args.epochs} epochs; to {folder}")
    print_memory_plan(args, count_parameters(model), sum(
        count_parameters(model) for model in (reference, decoding_copy) if model))
    note_small_lr(args.lr, Args.lr, count_parameters(model))
    prompt, chosen = train[0].prompt, train[0].chosen
    show_example(tokenizer, prompt + chosen, [False] * len(prompt) + [True] * len(chosen))

    def evaluate(step):
        metrics = {}
        for name, pairs in held_out.items():
            figures = evaluate_pairs(engine, pairs, held_out_ref[name], args)
            metrics |= {f"eval/{name}/{key}": value for key, value in figures.items()}
            low, high = figures["rewards/accuracies_low"], figures["rewards/accuracies_high"]
            print0(f"{step:>6}/{total_steps}  {name}: accuracy {figures['rewards/accuracies']:.3f} "
                   f"[{low:.3f}, {high:.3f}]  loss {figures['loss']:.4f}  "
                   f"logps {figures['logps/chosen']:.2f} {figures['logps/rejected']:.2f}")
        decoder = rollout_weights(engine, decoding_copy).eval()
        figures, rows = evaluate_samples(decoder, prompts, gold_function, tokenizer, args)
        engine.train()
        tracker.samples(step, rows)
        print0(f"{step:>6}/{total_steps}  continuations: " + ", ".join(
            f"{name.removeprefix('eval/')} {value:.3f}" for name, value in figures.items()))
        return tracker.log(step, metrics | figures), rows

    if state["step"] == 0:
        state["before"], rows = evaluate(0)
        state["samples_before"] = [row["response"] for row in rows[:20]]

    # 3. train
    clock, tokens = time.time(), 0
    learning_rate = cosine_lr if args.lr_schedule == "cosine" else constant_lr
    for step in range(state["step"] + 1, total_steps + 1):
        epoch, index = divmod(step - 1, steps_per_epoch)
        order = permutation(len(train), args.seed, epoch)  # one order for all ranks, each takes its share
        batch = order[index * args.batch_size : (index + 1) * args.batch_size]
        batch.sort(key=lambda i: row_length(train[i], args.share_prefix))  # similar lengths share a micro-batch
        chosen_tokens = sum(len(train[i].chosen) for i in batch)
        sums = torch.zeros(6, device=device)  # loss, correct, rewards and logps of chosen and rejected
        for mb_indices in chunks(rows_of_this_rank(batch), args.micro_batch_size):
            mb_pairs = [None if i is None else train[i] for i in mb_indices]
            is_pair = torch.tensor([i is not None for i in mb_indices], device=device)  # (B,)
            logprobs = pair_logprobs(engine, mb_pairs, args, device)  # (2, B)
            if reference:
                with torch.no_grad():
                    ref_logprobs = pair_logprobs(reference, mb_pairs, args, device)
            else:
                ref_logprobs = train_ref[:, [i or 0 for i in mb_indices]].to(device)
            losses = preference_losses(logprobs, ref_logprobs, args) * is_pair  # (B,)
            # [W12] the NLL of the chosen responses is one mean over their tokens in the whole step
            loss = losses.sum() / len(batch) - args.nll_coef * logprobs[0].sum() / chosen_tokens
            engine.backward(loss * world_size())  # [E2] one mean over the step: DeepSpeed divides by the ranks
            with torch.no_grad():
                rewards = args.beta * (logprobs - ref_logprobs) * is_pair  # implicit rewards, (2, B)
                margins = rewards[0] - rewards[1]
                correct = ((margins > 0) + 0.5 * (margins == 0)) * is_pair  # [E7] a tie counts one half
                sums += torch.stack([losses.sum(), correct.sum(), *rewards.sum(1), *logprobs.sum(1)])
        lr = learning_rate(step - 1, total_steps, warmup_steps, args.lr)  # with a warm-up, step 1 has rate 0
        grad_norm = optimizer_step(engine, lr)
        stop_if_not_finite({"logps": sums[4:], "train/loss": sums[0], "train/grad_norm": grad_norm},
                           {"rows": [train[i].row for i in batch]}, folder, step)
        tokens += sum(2 * len(train[i].prompt) + len(train[i].chosen) + len(train[i].rejected) for i in batch)

        # 4. log, evaluate, save
        if step % args.log_every == 0 or step == total_steps:
            loss, correct, chosen, rejected, *logps = (all_sum(sums) / len(batch)).tolist()
            nll = -logps[0] * len(batch) / chosen_tokens
            loss += args.nll_coef * nll
            rate = tokens / (time.time() - clock)
            clock, tokens = time.time(), 0
            tracker.log(step, {
                "train/loss": loss, "train/nll": nll, "rewards/chosen": chosen, "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected, "rewards/accuracies": correct, "logps/chosen": logps[0],
                "logps/rejected": logps[1], "train/lr": lr, "train/grad_norm": grad_norm,
                "train/epoch": step / steps_per_epoch, "time/tokens_per_second": rate})
            tracker.line(step, total_steps, loss=(loss, ".4f"), accuracy=(correct, ".3f"),
                         margin=(chosen - rejected, ".3f"), lr=(lr, ".2e"), tokens_per_s=(rate, ",.0f"))
        if step % args.eval_every == 0 or step == total_steps:
            after, samples = evaluate(step)
        stop = interrupted(device)  # by SIGTERM
        if (stop or step % args.save_every == 0) and step < total_steps:
            save_checkpoint(folder, step, {"model": engine}, state)
            if stop:
                leave_interrupted(folder, step)

    # 5. save, show continuations before and after
    save_model(engine, model, tokenizer, folder)
    model_card(folder, "dpo.py", args.model, args.train_data, [
        f"Held-out accuracy of its implicit reward on {name}: {after[f'eval/{name}/rewards/accuracies']:.3f}."
        for name in held_out])
    side_by_side = [{"query": row["query"], "before": before, "after": row["response"]}
                    for row, before in zip(samples, state["samples_before"])]
    tracker.close({"before": state["before"], "after": after, "samples": side_by_side})
    for row in side_by_side[:8]:
        print0(f"\n{row['query']}\n  before:{row['before']}\n  after: {row['after']}")
    print0(f"\nsaved {folder}" + (
        f": gold {state['before']['eval/gold']:.3f} -> {after['eval/gold']:.3f}" if gold_function else ""))
    finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
