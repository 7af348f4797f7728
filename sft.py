"""Supervised fine-tuning (SFT): next-token cross-entropy on demonstrations. The first of three steps of RLHF.

Paper: "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031), section 5.
`[detail N]` are its numbers, `[E N]` our own choices; docs/details.md has every one with its reason.

Differs from the paper's code:
  1. prompt and completion are tokenised apart and joined as ids, as the sampler will see them  [E1]
  2. the loss is a mean over the tokens of the whole optimizer step, not of each micro-batch    [E2]

Run:     python sft.py                                   the embedded task, CPU, minutes
         deepspeed sft.py --model EleutherAI/pythia-1b-deduped --train_data ... --lr 3e-6    8 GPUs
Reads:   --model, a Hugging Face folder or Hub id; --train_data and --eval_data with columns
         {prompt, completion} or {text}, as text or messages, or a published layout (utils/formats.py)
Writes:  --output_dir: the model as a Hugging Face folder, metrics.jsonl, samples.jsonl, TensorBoard, checkpoints
Result:  assets/README.md (embedded task); not yet measured at the paper's scale

Shapes:  B sequences of this micro-batch, T tokens, V vocabulary
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from utils.data import chunks, describe, load_rows, pad, permutation, rows_of_this_rank, show_example
from utils.launch import all_sum, check_batch_size, check_flags, create_engine, fail, finish, gather_rows
from utils.launch import init_distributed, optimizer_step, print0, print_memory_plan, rollout_weights, world_size
from utils.models import check_length, check_mask, count_parameters, decode_responses, eos_token_ids
from utils.models import load_causal_lm, load_tokenizer, save_model
from utils.run import Tracker, choose_folder, interrupted, leave_interrupted, load_checkpoint, model_card, open_folder
from utils.run import save_checkpoint, stop_if_not_finite


@dataclass
class Args:
    # models and data
    model: str = "assets/base"
    """language model to start from: Hugging Face folder or Hub id. Paper: EleutherAI/pythia-{1b,2.8b,6.9b}-deduped"""
    allow_pickle: bool = False
    """read model folders whose weights are pickled (.bin) alone: a pickle of a stranger may run code when it is read"""
    train_data: str = "assets/data/train.jsonl"
    """demonstrations: .jsonl, .json, .csv, .parquet, folder or Hub id; columns {prompt, completion} or {text}"""
    eval_data: str = "assets/data/validation.jsonl"
    """held-out demonstrations, same columns"""
    max_length: int = 64
    """tokens of prompt + completion + EOS; longer rows are dropped and counted. Paper: 562"""
    max_prompt_length: int = 512
    """tokens of a TL;DR prompt; longer posts are cut, paragraph by paragraph (detail 2). Paper: 512"""
    pack_length: int = 0
    """put several rows into sequences of up to so many tokens, each blind to the others, and count such sequences in
    the batch sizes; 0 = off. The mask takes pack_length^2 numbers a sequence. Paper: off"""
    completion_only: bool = False
    """count completion tokens alone in the loss. Paper: False, prompt tokens count too (detail 9)"""

    # optimisation
    epochs: int = 8
    """passes over the demonstrations. Paper: 1"""
    batch_size: int = 16
    """sequences per optimizer step, over all ranks. Paper: 128"""
    micro_batch_size: int = 16
    """sequences per forward and rank; changes memory and speed, not the gradient. Paper: 1"""
    lr: float = 4e-3
    """peak learning rate of AdamW. Paper: 3e-6"""
    warmup_ratio: float = 0.05
    """share of the steps with rising learning rate, before the cosine to 0. Paper: 0"""
    weight_decay: float = 0.01
    """AdamW weight decay. Paper: 0.01, torch's default (detail 43)"""
    adam_eps: float = 1e-5
    """AdamW epsilon. Paper: 1e-5"""
    max_grad_norm: float = 0.0
    """clip the global gradient norm here; 0 = off. Paper: off (detail 44)"""

    # evaluation
    eval_every: int = 500
    """optimizer steps between evaluations on all of eval_data (there is one before the first and after the last)"""
    num_samples: int = 64
    """held-out prompts to continue at every evaluation, for the sample table and ROUGE. Paper: all"""
    response_length: int = 24
    """tokens to sample at most. Paper: 53"""
    temperature: float = 0.7
    """sampling temperature of the samples. Paper: 0.01"""

    # run
    seed: int = 1
    """decides the order of the data and the samples. Paper: 44413, 55513, 66613, 77713"""
    output_dir: str | None = None
    """where to write; default runs/sft, or runs/sft-2, ... if that exists"""
    resume: bool = False
    """continue the run in output_dir from its last checkpoint, exactly"""
    overwrite: bool = False
    """replace an earlier run in output_dir"""
    save_every: int = 1000
    """optimizer steps between checkpoints"""
    log_every: int = 100
    """optimizer steps between console lines and metrics"""

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


def encode_demonstration(row, tokenizer):
    """Token ids of one demonstration, EOS last, and the number of prompt tokens in front (0 for `text` rows)."""
    if "completion" in row:
        prompt = tokenizer(row["prompt"]).input_ids
        completion = tokenizer(row["completion"], add_special_tokens=False).input_ids  # [E1] joined as ids
    else:
        prompt, completion = [], tokenizer(row["text"]).input_ids
    return prompt + completion + [tokenizer.eos_token_id], len(prompt)  # [detail 3] every row ends with EOS


def load_demonstrations(path, flag, tokenizer, args):
    """List of (ids, prompt_length, row), without the rows that are too long or empty, which are counted."""
    rows = load_rows(path, flag, [("prompt", "completion"), ("text",)], tokenizer, args.max_prompt_length)
    encoded = [(*encode_demonstration(row, tokenizer), row) for row in rows]
    fits = [len(ids) <= args.max_length for ids, _, _ in encoded]
    kept = [item for item, ok in zip(encoded, fits) if ok and len(item[0]) - item[1] > 1]
    dropped = {f"over {args.max_length} tokens": fits.count(False), "empty": sum(fits) - len(kept)}
    describe(flag, path, [len(ids) for ids, _, _ in kept], dropped)
    return kept


def pack(items, pack_length):
    """Items in lists of at most pack_length tokens together, one list a training sequence; 0: each item alone.

    Best fit, longest item first: the fullest list that still has room.
    """
    if not pack_length:
        return [[item] for item in items]
    packs, room = [], [[] for _ in range(pack_length + 1)]  # room[n]: packs with n tokens left
    for item in sorted(items, key=lambda item: -len(item[0])):
        length = len(item[0])
        left = next((n for n in range(length, pack_length + 1) if room[n]), None)
        if left is None:
            packs.append([])
            room[pack_length].append(packs[-1])
            left = pack_length
        found = room[left].pop()
        found.append(item)
        room[left - length].append(found)
    return packs


def count_labels(item, completion_only):
    """How many tokens of a row the loss counts: those after the prompt, or all but the first, which has no context."""
    ids, prompt_length, _ = item
    return len(ids) - max(1, prompt_length) if completion_only else len(ids) - 1


def collate(packs, tokenizer, completion_only, device):
    """Right-padded micro-batch [detail 5]: ids, segments, labels, all (B, T).

    segments: 1, 2, ... for the rows of a pack, 0 at padding. labels: -100 where nothing counts. A None among the packs
    becomes a sequence without labels.
    """
    sequences = [[token for ids, _, _ in items or [] for token in ids] or [tokenizer.eos_token_id] for items in packs]
    ids, mask = pad(sequences, tokenizer.pad_token_id, "right", device)
    segments = mask.long()  # (B, T)
    labels = ids.masked_fill(~mask, -100)  # [detail 3] PAD is never a target; it is not EOS, so EOS is one
    for i, items in enumerate(packs):
        start = 0
        for number, item in enumerate(items or [], 1):
            uncounted = max(1, item[1]) if completion_only else 1  # [detail 9] the paper counts prompt tokens too
            labels[i, start : start + uncounted] = -100  # the first token of a row follows nothing
            segments[i, start : start + len(item[0])] = number
            start += len(item[0])
        if items is None:
            labels[i] = -100
    return ids, segments, labels


# ---- Model ------------------------------------------------------------------------------------------------


def forward_logits(model, ids, segments):
    """Logits (B, T, V) in fp32 of ids (B, T), the same for any padding side and any neighbours in a pack.

    Padded positions (segment 0) are fed token 0, so PAD is never embedded [detail 3]. Position ids count the real
    tokens of each segment [detail 45]: with absolute positions (GPT-2) left-padded rows would otherwise be wrong.
    """
    mask, attention_mask = segments > 0, segments.clamp(max=1)  # (B, T)
    counted = mask.long().cumsum(-1)
    # number of real tokens before each row of a pack, at all of its tokens
    starts = torch.where(segments != F.pad(segments, (1, 0))[:, :-1], counted - mask.long(), 0).cummax(-1).values
    position_ids = (counted - 1 - starts).clamp(min=0)
    if segments.max() > 1:  # [E21] each token of a pack sees its own row alone
        same = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        dtype = next(model.parameters()).dtype
        attention_mask = torch.zeros_like(same, dtype=dtype).masked_fill(~same, torch.finfo(dtype).min)
    ids = torch.where(mask, ids, 0)
    return model(
        input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits.float()


# ---- Algorithm --------------------------------------------------------------------------------------------


def sft_loss_sum(logits, labels):
    """Sum of -log p(label_t | tokens before t) over the counted tokens. logits (B, T, V), labels (B, T) -> scalar."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def cosine_lr(step, total_steps, warmup_steps, peak):
    """Learning rate after `step` finished optimizer steps: linear warm-up, then half a cosine to 0 [detail 42]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


# ---- Evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_loss(engine, items, tokenizer, args):
    """Token-mean loss over held-out rows, each counted once over all ranks, and its perplexity."""
    loss_sum = torch.zeros((), device=engine.device)
    alone = [[item] for item in sorted(items, key=lambda item: len(item[0]))]
    for micro in chunks(rows_of_this_rank(alone), args.micro_batch_size):
        ids, segments, labels = collate(micro, tokenizer, args.completion_only, engine.device)
        loss_sum += sft_loss_sum(forward_logits(engine, ids, segments), labels)
    loss = all_sum(loss_sum) / sum(count_labels(item, args.completion_only) for item in items)
    return {"eval/loss": loss, "eval/perplexity": loss.exp()}


@torch.no_grad()
def sample(model, items, tokenizer, args, device):
    """Continuations of held-out prompts (of the first two words of `text` rows) by transformers' own generate."""
    torch.manual_seed(args.seed)
    rows = []
    for micro in chunks(items[: args.num_samples], args.micro_batch_size):
        rows_in = [item[2] for item in micro]
        prompts = [row["prompt"] if "completion" in row else " ".join(row["text"].split()[:2]) for row in rows_in]
        sequences = [tokenizer(prompt).input_ids or [tokenizer.eos_token_id] for prompt in prompts]
        ids, mask = pad(sequences, tokenizer.pad_token_id, "left", device)
        output = model.generate(
            input_ids=torch.where(mask, ids, 0), attention_mask=mask.long(), max_new_tokens=args.response_length,
            do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
            eos_token_id=eos_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
        )[:, ids.shape[1] :]
        responses = decode_responses(tokenizer, sequences, output)
        rows += [{"query": prompt, "response": response, "reference": row.get("completion", "")}
                 for row, prompt, response in zip(rows_in, prompts, responses)]
    return rows


def rouge(rows):
    """Mean ROUGE F-measures of responses against references (Google's rouge-score)."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(row["reference"], row["response"]) for row in rows]
    return {f"eval/{name}": sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. ranks, data, model
    check_flags(args)
    check_batch_size(args.batch_size)
    device = init_distributed(args.timeout_minutes)
    folder = choose_folder(args, "sft")
    tokenizer = load_tokenizer(args.model, "--model")
    train = load_demonstrations(args.train_data, "--train_data", tokenizer, args)
    held_out = load_demonstrations(args.eval_data, "--eval_data", tokenizer, args)
    model = load_causal_lm(args.model, "--model", tokenizer)  # [detail 7] without dropout
    decoding_copy = None  # at ZeRO 3 the model is in pieces: a whole copy to decode with
    if args.zero_stage == 3:
        decoding_copy = load_causal_lm(args.model, "--model", tokenizer, args.bf16).to(device)
    longest_prompt = max((prompt_length for _, prompt_length, _ in held_out[: args.num_samples]), default=0)
    check_length(model, args.max_length, "--max_length")
    if 0 < args.pack_length < args.max_length:
        fail(f"--pack_length {args.pack_length} must be 0 or at least --max_length {args.max_length}")
    if args.pack_length:  # [E21] rows of a pack are blind to one another
        check_mask(model, "--pack_length", args.max_length)
    check_length(model, longest_prompt + args.response_length, "the longest prompt + --response_length")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(device)
    optimizer = torch.optim.AdamW(  # [detail 43] eps 1e-5 and weight decay 0.01, both written out
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps, weight_decay=args.weight_decay)
    engine = create_engine(model, optimizer, args)

    # 2. output folder, schedule, resume
    open_folder(folder, args, "sft")
    packs = pack(train, args.pack_length)
    steps_per_epoch = math.ceil(len(packs) / args.batch_size)  # [E3] the last batch of an epoch may be smaller
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = int(args.warmup_ratio * total_steps)
    state = (load_checkpoint(folder, {"model": engine}) if args.resume else None) or {"step": 0}
    tracker = Tracker(folder, args, state["step"] + 1 if state["step"] else 0)
    print0(f"{'model':<22}{args.model}: {count_parameters(model):,} parameters, {world_size()} rank(s) on "
           f"{device.type}")
    print0(f"{'plan':<22}{total_steps} steps of {args.batch_size} sequences = {args.epochs} epochs; writes {folder}")
    print_memory_plan(args, count_parameters(model))
    example, uncounted = train[0][0], len(train[0][0]) - count_labels(train[0], args.completion_only)
    show_example(tokenizer, example, [i >= uncounted for i in range(len(example))])

    def evaluate(step):
        metrics = evaluate_loss(engine, held_out, tokenizer, args)
        decoder = rollout_weights(engine, decoding_copy).eval()
        mine = [item for item in rows_of_this_rank(held_out[: args.num_samples]) if item]
        rows = gather_rows(sample(decoder, mine, tokenizer, args, device))
        engine.train()
        if rows and rows[0]["reference"]:
            metrics |= rouge(rows)
        tracker.samples(step, rows)
        metrics = tracker.log(step, metrics)
        print0(f"{step:>6}/{total_steps}  held-out loss {metrics['eval/loss']:.4f}  "
               f"perplexity {metrics['eval/perplexity']:.2f}")
        return metrics

    if state["step"] == 0:
        state["before"] = evaluate(0)

    # 3. train
    clock, tokens = time.time(), 0
    for step in range(state["step"] + 1, total_steps + 1):
        epoch, index = divmod(step - 1, steps_per_epoch)
        order = permutation(len(packs), args.seed, epoch)
        batch = [packs[i] for i in order[index * args.batch_size : (index + 1) * args.batch_size]]
        # like lengths share a micro-batch; the step's gradient is the same
        batch.sort(key=lambda items: sum(len(item[0]) for item in items))
        count = sum(count_labels(item, args.completion_only) for items in batch for item in items)
        loss_sum = torch.zeros((), device=device)
        for micro in chunks(rows_of_this_rank(batch), args.micro_batch_size):
            ids, segments, labels = collate(micro, tokenizer, args.completion_only, device)
            micro_loss = sft_loss_sum(forward_logits(engine, ids, segments), labels)
            engine.backward(micro_loss / count * world_size())  # [E2] one mean over the step; DeepSpeed averages ranks
            loss_sum += micro_loss.detach()
        lr = cosine_lr(step - 1, total_steps, warmup_steps, args.lr)
        grad_norm = optimizer_step(engine, lr)
        stop_if_not_finite({"train/loss": loss_sum, "train/grad_norm": grad_norm},
                           {"rows": [item[2] for items in batch for item in items]}, folder, step)
        tokens += count

        # 4. log, evaluate, save
        if step % args.log_every == 0 or step == total_steps:
            loss = all_sum(loss_sum) / count
            rate = tokens / (time.time() - clock)
            clock, tokens = time.time(), 0
            tracker.log(step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm,
                               "train/epoch": step / steps_per_epoch, "time/tokens_per_second": rate})
            tracker.line(step, total_steps, loss=(float(loss), ".4f"), lr=(lr, ".2e"), tokens_per_s=(rate, ",.0f"))
        if step % args.eval_every == 0 or step == total_steps:
            after = evaluate(step)
        stop = interrupted(device)  # by SIGTERM
        if (stop or step % args.save_every == 0) and step < total_steps:
            save_checkpoint(folder, step, {"model": engine}, {"before": state["before"]})
            if stop:
                leave_interrupted(folder, step)

    # 5. save
    save_model(engine, model, tokenizer, folder)
    model_card(folder, "sft.py", args.model, args.train_data, [f"Held-out loss {after['eval/loss']:.4f}."])
    tracker.close({"before": state["before"], "after": after})
    print0(f"saved {folder}")
    finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
