"""DPO: a language model trained on preferences directly, against a frozen reference, without a reward model.

Papers: "Direct Preference Optimization" (Rafailov et al. 2023, arXiv 2305.18290), as used by "RLHF Workflow" (Dong et
al. 2024, arXiv 2405.07863), section 3. `[W N]` are details of the latter and its code, `[detail N]` those of the N+
paper, `[E N]` our own choices; docs/details.md has every one with its reason.

Differs from the papers' code:
  1. too long pairs are dropped and counted, not cut                                                   [W4]
  2. one mean over the whole optimizer step, not a mean of micro-batch means                           [E2]
  3. prompt and response are tokenised apart and joined as ids, one terminator, none after a cut text  [E1] [W3]
  4. reference log-probabilities come from a cache, which any change of model or data renews           [W6]
  5. a prompt goes through the model once for its two responses: fewer tokens, the same numbers        [W13]

Run:     python dpo.py                                   the embedded task, CPU, minutes
         deepspeed dpo.py --model ... --train_data ... --lr 5e-7 --zero_stage 2 --bf16    every GPU of this machine
Reads:   --model, an SFT model; --train_data and --eval_data with columns {prompt, chosen, rejected};
         --eval_prompts with a column {prompt}
Writes:  --output_dir: the policy as a Hugging Face folder, metrics.jsonl, samples.jsonl, summary.json, TensorBoard,
         checkpoints; --ref_cache: the reference's log-probabilities
Result:  README.md (embedded task); not yet measured at the papers' scale

Shapes:  N pairs, B of them in this micro-batch, T tokens of a pair's row (left-padded), V vocabulary. In a (2, B)
         tensor row 0 is for the chosen responses and row 1 for the rejected ones.
"""

import inspect
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from utils.data import call_judge, chunks, describe, load_function, load_prompts, load_rows, pad, permutation
from utils.data import rows_of_this_rank, show_example
from utils.launch import all_sum, check_batch_size, check_flags, create_engine, fail, finish, from_rank0, gather_rows
from utils.launch import init_distributed, note_small_lr, optimizer_step, print0, print_memory_plan, rank
from utils.launch import rollout_weights, world_size
from utils.models import check_length, check_mask, count_parameters, decode_responses, eos_token_ids, fingerprint
from utils.models import load_causal_lm, load_tokenizer, save_model
from utils.run import Tracker, cached_array, choose_folder, interrupted, leave_interrupted, load_checkpoint
from utils.run import make_folder, model_card, open_folder, save_checkpoint, stop_if_not_finite


@dataclass
class Args:
    # models and data
    model: str = "assets/sft"
    """the policy starts here: Hugging Face folder or Hub id"""
    ref_model: str | None = None
    """frozen reference; None: --model itself. Paper: the SFT model in every iteration (W1)"""
    allow_pickle: bool = False
    """read model folders whose weights are pickled (.bin) alone: a pickle of a stranger may run code when it is read"""
    train_data: str = "assets/data/preferences_train.jsonl"
    """preferences: .jsonl, .json, .csv, .parquet, folder or Hub id; columns {prompt, chosen, rejected}. Where the
    sampler cut a response, chosen_finished or rejected_finished is false: no EOS is added (W3)"""
    eval_data: tuple[str, ...] = (
        "assets/data/preferences_validation.jsonl", "assets/data/preferences_persuasion.jsonl")
    """held-out preferences, one or more, each evaluated apart"""
    eval_prompts: str = "assets/data/validation.jsonl"
    """held-out prompts to continue; column {prompt}"""
    gold_function: str | None = "assets.vader:positive"
    """module:name of a Python function of texts, (queries, responses) -> scores, that only watches; None: no judge"""
    max_prompt_length: int = 32
    """tokens; longer prompts to continue are dropped and counted, TL;DR posts cut (detail 2). Paper: 1,000"""
    max_length: int = 64
    """tokens of prompt + response + EOS; longer pairs are dropped and counted (W4). Paper: 2,048"""
    ref_cache: str | None = "runs/ref_logprobs"
    """folder of reference log-probabilities, computed once (W6); None: the reference stays in memory and computes
    them in the batches of the policy, which saves rounding errors (in bf16 hundredths of a nat)"""

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
    lr: float = 2e-4
    """peak learning rate of AdamW. Paper: 5e-7"""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: down to 0 as half a cosine, or constant. Paper: cosine"""
    warmup_ratio: float = 0.03
    """share of the steps with rising learning rate. Paper: 0.03"""
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


# ---- Data -------------------------------------------------------------------------------------------------


def encode_response(response, finished, tokenizer, eos_ids):
    """Token ids of a response after its prompt, with exactly one terminator where the sampler came to an end [W3].

    That is the first of those which end the text (a chat template's end of turn), or else the tokenizer's EOS.
    """
    ids = tokenizer(response, add_special_tokens=False).input_ids  # [E1] apart from the prompt: no merge with it
    terminator = tokenizer.eos_token_id
    while ids and ids[-1] in eos_ids:
        terminator = ids.pop()
    return ids + [terminator] if finished else ids


def load_preferences(path, flag, tokenizer, eos_ids, args):
    """List of (prompt ids, chosen ids, rejected ids, row), without unusable and too long pairs, which are counted."""
    rows = load_rows(path, flag, [("prompt", "chosen", "rejected")], tokenizer, args.max_prompt_length)
    for number, row in enumerate(rows, 1):
        for name in ("chosen_finished", "rejected_finished"):
            if row.get(name) is not None and not isinstance(row[name], bool):
                fail(f"{flag} {path}, row {number}: column {name!r} must be true or false, found {row[name]!r:.60}")
    different = [row for row in rows if row["chosen"] != row["rejected"]]
    pairs, dropped = [], {"chosen equal to rejected": len(rows) - len(different), "empty": 0,
                          f"over {args.max_length} tokens": 0}
    for row in different:
        prompt = tokenizer(row["prompt"]).input_ids  # one list of ids for both responses
        chosen, rejected = (encode_response(row[side], row.get(f"{side}_finished") is not False, tokenizer, eos_ids)
                            for side in ("chosen", "rejected"))
        if not (prompt and chosen and rejected):
            dropped["empty"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > args.max_length:  # [W4] a cut would lose the end
            dropped[f"over {args.max_length} tokens"] += 1
        else:
            pairs.append((prompt, chosen, rejected, row))
    lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected, _ in pairs]
    describe(flag, path, lengths, dropped)
    return pairs


def row_length(pair):
    """Tokens of a pair's row in collate_pairs."""
    prompt, chosen, rejected, _ = pair
    return len(prompt) + len(chosen) + len(rejected) + 1


def collate_pairs(pairs, pad_id, device):
    """Pairs as left-padded rows that hold their prompt once [W13]: ids, segments, position_ids, all (B, T).

        ids           PAD   a  b     c  y  y  EOS     c  z  EOS       prompt a b c, chosen y y EOS, rejected z EOS
        segments        0   1  1     2  2  2  2       3  3  3         c predicts both first tokens: it stands twice
        position_ids    0   0  1     2  3  4  5       2  3  4         as if the prompt stood before each [detail 45]

    A None among the pairs becomes a row without a response token, which counts for nothing.
    """
    rows, segments, position_ids = [], [], []
    for prompt, chosen, rejected in [pair[:3] if pair else ([0], [], []) for pair in pairs]:
        last = len(prompt) - 1
        rows.append(prompt + chosen + prompt[last:] + rejected)
        segments.append([1] * last + [2] * (1 + len(chosen)) + [3] * (1 + len(rejected)))
        position_ids.append([*range(last + 1 + len(chosen)), *range(last, last + 1 + len(rejected))])
    return (pad(rows, pad_id, "left", device)[0], pad(segments, 0, "left", device)[0],
            pad(position_ids, 0, "left", device)[0])


# ---- Model ------------------------------------------------------------------------------------------------


def response_logprobs(model, ids, segments, position_ids):
    """log pi(response | prompt), a sum over its tokens and EOS in fp32 [W2] (2, B), and their number (2, B).

    ids, segments, position_ids: (B, T), from collate_pairs. A token sees the prompt, and its own response up to itself;
    a response token is predicted one column before. Logits are made there only, and no temperature divides them.
    """
    of_prompt, real = segments == 1, segments > 0  # (B, T)
    seen = ((segments[:, :, None] == segments[:, None, :]) | of_prompt[:, None, :]).tril()[:, None]  # (B, 1, T, T)
    dtype = next(model.parameters()).dtype
    attention_mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    width = int((segments > 1).sum(1).max())  # columns of responses, each with the prompt token before it
    logits = model(input_ids=torch.where(real, ids, 0), attention_mask=attention_mask, position_ids=position_ids,
                   use_cache=False, logits_to_keep=width).logits[:, :-1].float()  # (B, width - 1, V)
    logprobs = token_logprobs(logits, ids[:, 1 - width :])
    before, here = segments[:, -width:-1], segments[:, 1 - width :]  # unequal where a column begins another response
    masks = torch.stack([(before == side) & (here == side) for side in (2, 3)])  # (2, B, width - 1)
    return (logprobs * masks).sum(-1), masks.sum(-1)


def token_logprobs(logits, tokens):
    """log p(token) of tokens (B, Tr) under logits (B, Tr, V) -> (B, Tr)."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


# ---- Algorithm --------------------------------------------------------------------------------------------

# The losses of B pairs. logprobs, ref_logprobs: (2, B), log-probabilities of whole responses; lengths: (2, B), their
# tokens, for the losses in experiments/dpo_losses.py that want a mean. With y_w chosen and y_l rejected,
#     u = log pi(y_w|x) - log ref(y_w|x),  v = log pi(y_l|x) - log ref(y_l|x),  h = u - v
# and beta * u, beta * v are the implicit rewards.


def sigmoid_losses(logprobs, ref_logprobs, lengths, beta, label_smoothing=0.0):
    """DPO: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing [W7] -> (B,)."""
    u, v = logprobs - ref_logprobs
    h = u - v
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def hinge_losses(logprobs, ref_logprobs, lengths, beta):
    """SLiC, RSO: max(0, 1 - beta h) [W8] -> (B,)."""
    u, v = logprobs - ref_logprobs
    return F.relu(1 - beta * (u - v))


def ipo_losses(logprobs, ref_logprobs, lengths, beta):
    """IPO: (h - 1 / (2 beta))^2, with sums over tokens as in its paper [W9] -> (B,)."""
    u, v = logprobs - ref_logprobs
    return (u - v - 1 / (2 * beta)) ** 2


LOSSES = {"sigmoid": sigmoid_losses, "hinge": hinge_losses, "ipo": ipo_losses}


def cosine_lr(step, total_steps, warmup_steps, peak):
    """Learning rate after `step` finished optimizer steps: linear warm-up, then half a cosine to 0 [detail 42]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def constant_lr(step, total_steps, warmup_steps, peak):
    """Learning rate after `step` finished optimizer steps: linear warm-up, then constant."""
    return peak * min(1.0, step / warmup_steps) if warmup_steps else peak


def choose_loss(args):
    """The function of --loss with its flags filled in: (logprobs, ref_logprobs, lengths) -> (B,)."""
    function = LOSSES.get(args.loss) or fail(f"--loss {args.loss}: unknown. There are {', '.join(LOSSES)}")
    options = {"beta": args.beta}
    if args.label_smoothing:
        if "label_smoothing" not in inspect.signature(function).parameters:
            fail(f"--label_smoothing {args.label_smoothing}: --loss {args.loss} has none. Leave it at 0")
        options["label_smoothing"] = args.label_smoothing
    return partial(function, **options)


# ---- Evaluation -------------------------------------------------------------------------------------------


def accuracy(chosen, rejected):
    """1 where the chosen one has the higher number, 1/2 at ties [E7], per pair: (N,), (N,) -> (N,)."""
    chosen, rejected = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def clustered_interval(values, clusters, resamples=1000):
    """95 % bootstrap interval of a mean, drawing whole clusters: pairs that share a prompt are not independent."""
    _, index = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    draws = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


@torch.no_grad()
def score_pairs(model, pairs, pad_id, batch_size, device):
    """Log-probabilities of the responses of all pairs, each computed once over all ranks: (2, N) float32 array."""
    order = sorted(range(len(pairs)), key=lambda i: row_length(pairs[i]))  # like lengths share a batch
    found = []
    for rows in chunks(rows_of_this_rank(order), batch_size):
        batch = collate_pairs([None if row is None else pairs[row] for row in rows], pad_id, device)
        found += response_logprobs(model, *batch)[0].T.tolist()
    gathered = gather_rows(found)[: len(order)]  # back in the order of `order`; rows for None stand last
    logprobs = np.empty((2, len(pairs)), dtype=np.float32)
    logprobs[:, order] = np.array(gathered).T
    return logprobs


def reference_logprobs(reference, pairs, name, tokenizer, args, device):
    """score_pairs of the reference, read from --ref_cache where it was computed before [W6].

    The key is a hash of weights, config and precision of the reference, of all token ids, which contain tokenizer, data
    and length limits, and of what decides about rounding: batches, ranks, device, version.
    """
    def compute():
        return score_pairs(reference, pairs, tokenizer.pad_token_id, 2 * args.micro_batch_size, device)

    if not args.ref_cache:
        return compute()
    rounding = [args.micro_batch_size, world_size(), str(device), torch.__version__, args.zero_stage]
    key = from_rank0(lambda: fingerprint(reference, [pair[:3] for pair in pairs], rounding))
    return cached_array(Path(args.ref_cache) / f"{key[:16]}.npz", f"reference on {name}", compute)


def evaluate_pairs(engine, pairs, ref_logprobs, pair_losses, tokenizer, args):
    """Loss and implicit rewards of held-out pairs: the policy as a reward model [detail 19]."""
    logprobs = score_pairs(engine, pairs, tokenizer.pad_token_id, 2 * args.micro_batch_size, engine.device)
    lengths = np.array([[len(pair[side]) for pair in pairs] for side in (1, 2)])
    losses = pair_losses(*map(torch.tensor, (logprobs, ref_logprobs, lengths)))
    chosen, rejected = args.beta * (logprobs - ref_logprobs)
    correct = accuracy(chosen, rejected)
    low, high = clustered_interval(correct, [row["prompt"] for *_, row in pairs])
    return {"loss": losses.mean(), "rewards/accuracies": correct.mean(), "rewards/accuracies_low": low,
            "rewards/accuracies_high": high, "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(), "logps/chosen": logprobs[0].mean(),
            "logps/rejected": logprobs[1].mean()}


@torch.no_grad()
def sample_responses(model, prompts, tokenizer, args, device):
    """Continuations of prompts (token ids, text) by transformers' own generate: list of {query, response, ...}.

    The same noise in every evaluation of a run; other micro-batches or ranks bring other noise.
    """
    torch.manual_seed(args.seed + rank())
    rows, eos_ids = [], eos_token_ids(model, tokenizer)
    for some in chunks(prompts, 4 * args.micro_batch_size):
        sequences, texts = zip(*some)
        ids, mask = pad(sequences, tokenizer.pad_token_id, "left", device)
        output = model.generate(
            input_ids=torch.where(mask, ids, 0), attention_mask=mask.long(), max_new_tokens=args.response_length,
            do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
            eos_token_id=eos_ids, pad_token_id=tokenizer.pad_token_id)[:, ids.shape[1] :]
        responses = decode_responses(tokenizer, sequences, output)
        for text, response, tokens in zip(texts, responses, output.tolist()):
            ended = any(token in eos_ids for token in tokens)
            length = next((t + 1 for t, token in enumerate(tokens) if token in eos_ids), len(tokens))
            rows.append({"query": text, "response": response, "length": length, "ended": ended})
    return rows


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. ranks, data, models
    check_flags(args)
    check_batch_size(args.batch_size)
    pair_losses = choose_loss(args)
    device = init_distributed(args.timeout_minutes)
    folder = choose_folder(args, "dpo")
    tokenizer = load_tokenizer(args.model, "--model")
    model = load_causal_lm(args.model, "--model", tokenizer)  # [detail 7] without dropout
    check_length(model, max(args.max_length, args.max_prompt_length + args.response_length),
                 "the larger of --max_length and --max_prompt_length + --response_length")
    check_mask(model, "--model", args.max_length)  # [W13] responses are blind to one another
    eos_ids = eos_token_ids(model, tokenizer)
    train = load_preferences(args.train_data, "--train_data", tokenizer, eos_ids, args)
    names = {path: Path(path).stem for path in args.eval_data}
    if len(set(names.values())) < len(names):  # files of one name in several folders
        names = {path: path.replace("/", "_") for path in args.eval_data}
    held_out = {name: load_preferences(path, "--eval_data", tokenizer, eos_ids, args) for path, name in names.items()}
    prompts = load_prompts(args.eval_prompts, "--eval_prompts", tokenizer, args)[: args.num_eval_prompts]
    gold_function = load_function(args.gold_function, "--gold_function")
    if gold_function:
        call_judge(gold_function, "--gold_function", [prompts[0][1]] * 2, [" a", " b"])  # a trial
    ref_path, ref_flag = (args.ref_model, "--ref_model") if args.ref_model else (args.model, "--model")
    if args.ref_model and load_tokenizer(ref_path, ref_flag).get_vocab() != tokenizer.get_vocab():
        fail(f"--ref_model {ref_path}: its vocabulary differs from that of --model {args.model}, so their "
             "probabilities cannot be compared")
    reference = load_causal_lm(ref_path, ref_flag, tokenizer, args.bf16).eval()  # [W1] [W5]
    check_length(reference, args.max_length, "--max_length")
    check_mask(reference, ref_flag, args.max_length)
    if args.ref_cache:
        make_folder(args.ref_cache, "--ref_cache")

    # 2. policy, output folder, reference, resume
    decoding_copy = None  # at ZeRO 3 the model is in pieces: a whole copy to decode with
    if args.zero_stage == 3:
        decoding_copy = load_causal_lm(args.model, "--model", tokenizer, args.bf16).to(device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(device)
    optimizer = torch.optim.AdamW(  # [W11]
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps, weight_decay=args.weight_decay)
    engine = create_engine(model, optimizer, args)
    open_folder(folder, args, "dpo")
    reference.to(device)  # after create_engine, since ZeRO 3 brings another matrix product with it, for both
    held_out_ref = {name: reference_logprobs(reference, pairs, name, tokenizer, args, device)
                    for name, pairs in held_out.items()}
    if args.ref_cache:
        train_ref = torch.tensor(reference_logprobs(reference, train, "the training pairs", tokenizer, args, device))
        reference = None  # its memory is free from here on
    steps_per_epoch = math.ceil(len(train) / args.batch_size)  # [E3] the last batch of an epoch may be smaller
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = math.ceil(args.warmup_ratio * total_steps)  # [W10] rounded up
    state = (load_checkpoint(folder, {"model": engine}) if args.resume else None) or {"step": 0}
    tracker = Tracker(folder, args, state["step"] + 1 if state["step"] else 0)
    print0(f"{'model':<22}{args.model}: {count_parameters(model):,} parameters, {world_size()} rank(s) on "
           f"{device.type}; reference {ref_path}, {'in memory' if reference else 'cached'}")
    print0(f"{'plan':<22}{total_steps} steps of {args.batch_size} pairs = {args.epochs} epochs; writes {folder}")
    print_memory_plan(args, count_parameters(model), sum(
        count_parameters(model) for model in (reference, decoding_copy) if model))
    note_small_lr(args.lr, Args.lr, count_parameters(model))
    prompt, chosen, *_ = train[0]
    show_example(tokenizer, prompt + chosen, [False] * len(prompt) + [True] * len(chosen))

    def evaluate(step):
        metrics = {}
        for name, pairs in held_out.items():
            figures = evaluate_pairs(engine, pairs, held_out_ref[name], pair_losses, tokenizer, args)
            metrics |= {f"eval/{name}/{key}": value for key, value in figures.items()}
            print0(f"{step:>6}/{total_steps}  {name}: accuracy {figures['rewards/accuracies']:.3f} "
                   f"[{figures['rewards/accuracies_low']:.3f}, {figures['rewards/accuracies_high']:.3f}]  "
                   f"loss {figures['loss']:.4f}  logps {figures['logps/chosen']:.2f} {figures['logps/rejected']:.2f}")
        decoder = rollout_weights(engine, decoding_copy).eval()
        mine = [prompt for prompt in rows_of_this_rank(prompts) if prompt]
        rows = sample_responses(decoder, mine, tokenizer, args, device)
        engine.train()
        if gold_function:
            texts = [row["query"] for row in rows], [row["response"] for row in rows]
            rows = [{**row, "gold": gold} for row, gold in zip(rows, call_judge(
                gold_function, "--gold_function", *texts))]
        rows = gather_rows(rows)
        for key in ("gold", "length", "ended") if gold_function else ("length", "ended"):
            metrics[f"eval/{key}"] = np.mean([row[key] for row in rows])
        metrics["eval/distinct_starts"] = len({tuple(row["response"].split()[:3]) for row in rows}) / len(rows)
        tracker.samples(step, rows)
        print0(f"{step:>6}/{total_steps}  continuations: " + ", ".join(
            f"{key} {metrics[f'eval/{key}']:.3f}" for key in ("gold", "length", "ended") if f"eval/{key}" in metrics))
        return tracker.log(step, metrics), rows

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
        batch.sort(key=lambda i: row_length(train[i]))  # like lengths share a micro-batch
        chosen_tokens = sum(len(train[i][1]) for i in batch)
        sums = torch.zeros(6, device=device)  # loss, rewards chosen and rejected, correct, logps chosen and rejected
        for rows in chunks(rows_of_this_rank(batch), args.micro_batch_size):
            counts = torch.tensor([i is not None for i in rows], device=device)  # (B,)
            inputs = collate_pairs([None if i is None else train[i] for i in rows], tokenizer.pad_token_id, device)
            logprobs, lengths = response_logprobs(engine, *inputs)  # (2, B): one forward for both
            if reference:
                with torch.no_grad():
                    ref_logprobs, _ = response_logprobs(reference, *inputs)
            else:
                ref_logprobs = train_ref[:, [i or 0 for i in rows]].to(device)  # (2, B); a None counts 0 below
            losses = pair_losses(logprobs, ref_logprobs, lengths) * counts
            nll = -logprobs[0]  # (B,), sums over tokens; 0 for a None
            loss = losses.sum() / len(batch) + args.nll_coef * nll.sum() / chosen_tokens  # [W12]
            engine.backward(loss * world_size())  # [E2] one mean over the step; DeepSpeed averages ranks
            with torch.no_grad():
                chosen, rejected = args.beta * (logprobs - ref_logprobs) * counts
                correct = ((chosen > rejected) + 0.5 * (chosen == rejected)) * counts  # [E7]
                sums += torch.stack([losses.sum(), chosen.sum(), rejected.sum(), correct.sum(), *logprobs.sum(1)])
        lr = learning_rate(step - 1, total_steps, warmup_steps, args.lr)
        grad_norm = optimizer_step(engine, lr)
        stop_if_not_finite({"logps": sums[4:], "train/loss": sums[0], "train/grad_norm": grad_norm},
                           {"rows": [train[i][3] for i in batch]}, folder, step)
        tokens += sum(row_length(train[i]) for i in batch)

        # 4. log, evaluate, save
        if step % args.log_every == 0 or step == total_steps:
            loss, chosen, rejected, correct, chosen_logps, rejected_logps = (all_sum(sums) / len(batch)).tolist()
            nll = -chosen_logps * len(batch) / chosen_tokens
            loss += args.nll_coef * nll
            rate = tokens / (time.time() - clock)
            clock, tokens = time.time(), 0
            tracker.log(step, {
                "train/loss": loss, "train/nll": nll, "rewards/chosen": chosen,
                "rewards/rejected": rejected, "rewards/margins": chosen - rejected, "rewards/accuracies": correct,
                "logps/chosen": chosen_logps, "logps/rejected": rejected_logps, "train/lr": lr,
                "train/grad_norm": grad_norm, "train/epoch": step / steps_per_epoch, "time/tokens_per_second": rate})
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
