"""Supervised fine-tuning (SFT): next-token cross-entropy on demonstrations. The first of three steps of RLHF.

    for each batch of demonstrations, in random order:
        row  = prompt + completion + EOS, or text + EOS, as token ids
        loss = mean of -log p(token | tokens before it) over all tokens of the batch but PAD
               (--completion_only: over those of the completions)
        one step of AdamW along the gradient of the loss
    now and then: the same loss on held-out demonstrations, and sampled continuations of their prompts

Run:     python sft.py                                   the embedded task, CPU, minutes
         deepspeed sft.py --model EleutherAI/pythia-1b-deduped --train_data ... --lr 3e-6    8 GPUs
Reads:   --model, a Hugging Face folder or Hub id; --train_data and --eval_data with columns
         {prompt, completion} or {text}, as text or messages, or a published layout (utils/formats.py)
Writes:  --output_dir: the model as a Hugging Face folder, metrics.jsonl, samples.jsonl, summary.json,
         TensorBoard, checkpoints
Result:  assets/README.md (embedded task); not yet measured at the paper's scale

Paper: "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031), section 5.
`[detail N]` are its numbers, `[E N]` our own choices; docs/details.md has every one with its reason.

Differs from the paper's code:
  1. prompt and completion are tokenised apart and joined as ids, as the sampler will see them  [E1]
  2. the loss is a mean over the tokens of the whole optimizer step, not of each micro-batch    [E2]

EOS stands for whatever ends a text: the tokenizer's EOS, or the chat template's end of turn [E29].
Shapes:  B sequences of this micro-batch, T tokens, V vocabulary
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from utils.companions import hold_out, settle_companions
from utils.data import chunks, describe, load_rows, pad, permutation, rows_of_this_rank
from utils.launch import all_sum, check_batch_size, check_flags, create_engine, fail, finish, gather_rows
from utils.launch import init_distributed, optimizer_step, print0, print_memory_plan, rollout_weights
from utils.launch import world_size
from utils.models import check_length, check_rate, count_parameters, load_causal_lm, load_tokenizer
from utils.models import save_model
from utils.packing import check_mask, pack, packed_inputs
from utils.rouge import rouge
from utils.run import Tracker, choose_folder, interrupted, leave_interrupted, load_checkpoint, model_card
from utils.run import open_folder, save_checkpoint, stop_if_not_finite
from utils.sampling import sample_responses
from utils.tokens import encode_text, encode_texts, show_example


@dataclass
class Args:
    # models and data
    model: str = "assets/base"
    """language model to start from: Hugging Face folder or Hub id. Paper: pythia-{1b,2.8b,6.9b}-deduped"""
    allow_pickle: bool = False
    """read models whose weights are pickled (.bin) alone: a stranger's pickle may run code when it is read"""
    train_data: str = "assets/data/train.jsonl"
    """demonstrations: .jsonl, .json, .csv, .parquet, folder or Hub id; {prompt, completion} or {text}"""
    eval_data: str | None = "assets/data/validation.jsonl"
    """held-out demonstrations, same columns; None, the default with your own data: a share of --train_data"""
    columns: tuple[str, ...] = ()
    """other names of columns in your data files, as in prompt=question chosen=answer_a: ours=yours"""
    max_length: int = 64
    """tokens of prompt + completion + EOS; longer rows are dropped and counted. Paper: 562"""
    max_prompt_length: int = 512
    """tokens of a TL;DR prompt; longer posts are cut, paragraph by paragraph (detail 2). Paper: 512"""
    pack_length: int = 0
    """put several rows into sequences of up to so many tokens, each blind to the others: faster where lengths
    differ; needs a model that obeys such a mask (E21). Batch sizes count packs. 0 = off. Paper: off"""
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
    """peak learning rate of AdamW; larger models need another (docs/scaling.md). Paper: 3e-6"""
    warmup_ratio: float = 0.05
    """share of the steps, rounded up, with rising learning rate, before the cosine to 0. Paper: 0"""
    weight_decay: float = 0.01
    """AdamW weight decay. Paper: 0.01, torch's default (detail 43)"""
    adam_eps: float = 1e-5
    """AdamW epsilon. Paper: 1e-5"""
    max_grad_norm: float = 0.0
    """clip the global gradient norm here; 0 = off. Paper: off (detail 44)"""

    # evaluation
    eval_every: int = 500
    """optimizer steps between evaluations (there is one before the first and after the last)"""
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


def encode_demonstration(row, tokenizer):
    """Token ids of a demonstration, and the number of prompt tokens in it (0 for `text` rows).

    [detail 3] Every row ends with one terminator: EOS, or the chat template's end of turn [E29].
    """
    if "completion" in row:  # [E1] tokenised apart, joined as ids
        prompt, completion = encode_texts(row["prompt"], row["completion"], tokenizer)
    else:
        prompt, completion = [], encode_text(row["text"], tokenizer)
    return prompt + completion, len(prompt)


def load_demonstrations(path, flag, tokenizer, args):
    """List of (ids, prompt_length, row), without the rows that are too long or empty, which are counted."""
    rows = load_rows(path, flag, [("prompt", "completion"), ("text",)], tokenizer, args.max_prompt_length)
    if args.completion_only and "completion" not in rows[0]:
        fail(f"--completion_only: {flag} {path} has {{text}} alone, and so no prompt to leave out. Give it columns "
             "{prompt, completion} or messages, or leave out --completion_only")
    encoded = [(*encode_demonstration(row, tokenizer), row) for row in rows]
    fits = [len(ids) <= args.max_length for ids, _, _ in encoded]
    kept = [item for item, ok in zip(encoded, fits) if ok and len(item[0]) - item[1] > 1]  # more than EOS
    dropped = {f"over {args.max_length} tokens": fits.count(False), "empty": sum(fits) - len(kept)}
    describe(flag, path, [len(ids) for ids, _, _ in kept], dropped, [len(ids) for ids, _, _ in encoded])
    return kept


def count_labels(item, completion_only):
    """How many tokens of a row the loss counts: those after the prompt, or all but the first."""
    ids, prompt_length, _ = item
    return len(ids) - max(1, prompt_length) if completion_only else len(ids) - 1


def collate(packs, tokenizer, completion_only, device):
    """Right-padded micro-batch [detail 5]: ids, segments, labels, all (B, T).

    segments: 1, 2, ... for the rows of a pack, 0 at padding. labels: -100 where nothing counts. A None among
    the packs, there because every rank must run as many micro-batches as the others, has no labels.
    """
    rows = [[item[0] for item in items] if items else [[tokenizer.eos_token_id]] for items in packs]
    ids, mask = pad([sum(row, []) for row in rows], tokenizer.pad_token_id, "right", device)
    segments = mask.long()  # (B, T)
    labels = ids.masked_fill(~mask, -100)  # [detail 3] PAD is never a target; EOS is one, as PAD is another token
    for i, items in enumerate(packs):
        start = 0
        for number, (row, prompt_length, _) in enumerate(items or [], 1):
            uncounted = max(1, prompt_length) if completion_only else 1  # [detail 9] prompt tokens count too
            labels[i, start : start + uncounted] = -100  # the first token of a row follows nothing
            segments[i, start : start + len(row)] = number
            start += len(row)
        if items is None:
            labels[i] = -100
    return ids, segments, labels


# ---- Model ------------------------------------------------------------------------------------------------


def forward_logits(model, ids, segments):
    """Logits (B, T, V) in fp32 of ids (B, T). In an fp32 model padding and neighbours in a pack do not change them.

    Without packs, segments are a mask: 1 at real tokens, 0 at padding. Position ids count real tokens: with
    absolute positions (GPT-2) left-padded rows would otherwise be wrong.
    """
    mask = segments > 0  # (B, T)
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)  # [detail 45] on any padding side
    inputs = {"attention_mask": mask.long(), "position_ids": position_ids}
    if segments.max() > 1:  # [E21] each token of a pack sees its own row alone
        inputs = packed_inputs(segments, next(model.parameters()).dtype)
    ids = torch.where(mask, ids, 0)  # [detail 3] PAD is never embedded
    return model(input_ids=ids, **inputs, use_cache=False).logits.float()


# ---- Algorithm --------------------------------------------------------------------------------------------


def sft_loss_sum(logits, labels):
    """Sum of -log p(label_t | tokens before t) over the counted tokens: logits (B, T, V), labels (B, T)."""
    logits, targets = logits[:, :-1], labels[:, 1:]  # token t is predicted at position t - 1
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def cosine_lr(step, total_steps, warmup_steps, peak):
    """Learning rate after `step` optimizer steps: linear warm-up, then half a cosine to 0 [detail 42]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


# ---- Evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_loss(engine, items, tokenizer, args):
    """Token-mean loss over held-out rows, each counted once over all ranks, and its perplexity."""
    loss_sum = torch.zeros((), device=engine.device)
    alone = [[item] for item in sorted(items, key=lambda item: len(item[0]))]
    for mb_packs in chunks(rows_of_this_rank(alone), args.micro_batch_size):
        ids, segments, labels = collate(mb_packs, tokenizer, args.completion_only, engine.device)
        loss_sum += sft_loss_sum(forward_logits(engine, ids, segments), labels)
    loss = all_sum(loss_sum) / sum(count_labels(item, args.completion_only) for item in items)
    return {"eval/loss": loss, "eval/perplexity": loss.exp()}


def opening(item, tokenizer):
    """Token ids to continue: the prompt of a row, or of a `text` row the first four tokens and whole characters."""
    ids, prompt_length, row = item
    if "completion" in row:
        return ids[:prompt_length] or [tokenizer.eos_token_id]
    count = 4
    while count < len(ids) - 1 and tokenizer.decode(ids[:count]).endswith("\ufffd"):  # within a character's bytes
        count += 1
    return ids[: min(count, len(ids) - 1)]


def sample(model, items, tokenizer, args):
    """Continuations of prompts, or of the openings of `text` rows: {query, response, reference}."""
    rows, openings = [row for _, _, row in items], [opening(item, tokenizer) for item in items]
    texts = [row["prompt"] if "completion" in row else tokenizer.decode(ids, skip_special_tokens=True)
             for row, ids in zip(rows, openings)]
    prompts = list(zip(openings, texts, rows))
    samples = sample_responses(model, prompts, tokenizer, args, args.micro_batch_size, args.seed)
    return [{"query": text, "response": sampled["response"], "reference": row.get("completion", "")}
            for row, text, sampled in zip(rows, texts, samples)]


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. ranks, data, model
    check_flags(args)
    check_batch_size(args.batch_size)
    args = settle_companions(args, "train_data", ["model"], eval_data=None)
    device = init_distributed(args.timeout_minutes)
    folder = choose_folder(args, "sft")
    tokenizer = load_tokenizer(args.model, "--model")
    train = load_demonstrations(args.train_data, "--train_data", tokenizer, args)
    if args.eval_data:
        held_out = load_demonstrations(args.eval_data, "--eval_data", tokenizer, args)
    else:
        train, held_out = hold_out(
            train, [item[2] for item in train], "--train_data", "--eval_data", or_completion=True)
    model = load_causal_lm(args.model, "--model", tokenizer)  # [detail 7] without dropout
    check_rate(args, "sft", model)
    decoding_copy = None  # at ZeRO 3 the model is in pieces: a whole copy to decode with
    if args.zero_stage == 3:
        decoding_copy = load_causal_lm(args.model, "--model", tokenizer, args.bf16).to(device)
    longest_prompt = max((len(opening(item, tokenizer)) for item in held_out[: args.num_samples]), default=0)
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
    open_folder(folder, args, "sft", {
        "--train_data": [item[:2] for item in train], "--eval_data": [item[:2] for item in held_out]})
    packs = pack(train, args.pack_length)  # without the flag, each row alone
    steps_per_epoch = math.ceil(len(packs) / args.batch_size)  # [E3] an epoch's last batch may be smaller
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = min(math.ceil(args.warmup_ratio * total_steps), total_steps - 1)  # one step has the peak
    state = (load_checkpoint(folder, {"model": engine}) if args.resume else None) or {"step": 0}
    tracker = Tracker(folder, args, state["step"] + 1 if state["step"] else 0)
    print0(f"{'model':<22}{args.model}: {count_parameters(model):,} parameters, {world_size()} rank(s) on "
           f"{device.type}")
    print0(f"{'plan':<22}{total_steps} steps of {args.batch_size} sequences = {args.epochs} epochs; "
           f"to {folder}")
    print_memory_plan(args, count_parameters(model))
    example, uncounted = train[0][0], len(train[0][0]) - count_labels(train[0], args.completion_only)
    show_example(tokenizer, example, [i >= uncounted for i in range(len(example))])

    def evaluate(step):
        metrics = evaluate_loss(engine, held_out, tokenizer, args)
        decoder = rollout_weights(engine, decoding_copy).eval()
        mine = [item for item in rows_of_this_rank(held_out[: args.num_samples]) if item]
        rows = gather_rows(sample(decoder, mine, tokenizer, args))
        engine.train()
        found = rouge([row["reference"] for row in rows], [row["response"] for row in rows])
        metrics |= {f"eval/{name}": value for name, value in found.items()}  # none for `text` rows
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
        batch.sort(key=lambda items: sum(len(item[0]) for item in items))  # similar lengths share a micro-batch
        num_labels = sum(count_labels(item, args.completion_only) for items in batch for item in items)
        loss_sum = torch.zeros((), device=device)
        for mb_packs in chunks(rows_of_this_rank(batch), args.micro_batch_size):
            ids, segments, labels = collate(mb_packs, tokenizer, args.completion_only, device)
            mb_loss_sum = sft_loss_sum(forward_logits(engine, ids, segments), labels)
            # [E2] one mean over the step: DeepSpeed divides by the ranks
            engine.backward(mb_loss_sum / num_labels * world_size())
            loss_sum += mb_loss_sum.detach()
        lr = cosine_lr(step - 1, total_steps, warmup_steps, args.lr)  # with a warm-up, step 1 has rate 0
        grad_norm = optimizer_step(engine, lr)
        stop_if_not_finite({"train/loss": loss_sum, "train/grad_norm": grad_norm},
                           {"rows": [item[2] for items in batch for item in items]}, folder, step)
        tokens += num_labels

        # 4. log, evaluate, save
        if step % args.log_every == 0 or step == total_steps:
            loss = all_sum(loss_sum) / num_labels
            rate = tokens / (time.time() - clock)
            clock, tokens = time.time(), 0
            tracker.log(step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm,
                               "train/epoch": step / steps_per_epoch, "time/tokens_per_second": rate})
            tracker.line(step, total_steps, loss=(float(loss), ".4f"), lr=(lr, ".2e"),
                         tokens_per_s=(rate, ",.0f"))
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
