"""Reward model: a scalar head on the SFT model, trained on pairs of a chosen and a rejected completion.

    model = the SFT model with a new head: one number per token, read at the last one, EOS
    for each batch of (prompt x, chosen completion y_w, rejected completion y_l), in random order:
        r_w, r_l = scores of "x y_w EOS" and "x y_l EOS", in one forward
        loss     = mean over the batch of -log sigmoid(r_w - r_l)
        one step of AdamW along the gradient of the loss
    now and then: accuracy on held-out pairs, beside the longer completion and the prompts of others
    at the end: reward_mean = mean score of the demonstrations, subtracted from then on

Run:     python reward_model.py                          the embedded task, CPU, minutes
         deepspeed reward_model.py --model runs/sft --train_data ... --lr 3e-6 --max_length 638    8 GPUs
Reads:   --model, an SFT model; --train_data and --eval_data with columns {prompt, chosen, rejected};
         --demonstrations {prompt, completion}, whose scores will average 0
Writes:  --output_dir: a folder for AutoModelForSequenceClassification (its config holds `reward_mean`, which
         our scripts subtract), metrics.jsonl, samples.jsonl, summary.json, TensorBoard, checkpoints
Result:  assets/README.md (embedded task); not yet measured at the paper's scale

Paper: "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031), section 6.
`[detail N]` are its numbers, `[E N]` our own choices; docs/details.md has every one with its reason.

Differs from the paper's code:
  1. an epoch visits every pair exactly once on any number of ranks (the original: 65.6 % of them on 8)   [E5]
  2. prompt and completion are tokenised apart and joined as ids, as the sampler will see them            [E1]
  3. the head has no bias (Hugging Face's classes have none); normalisation makes up for it               [E6]

EOS stands for whatever ends a text: the tokenizer's EOS, or the chat template's end of turn [E29].
Shapes:  N pairs, B of them in this micro-batch, T tokens. In a (2, B) tensor row 0 is for the chosen
         completions and row 1 for the rejected ones.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from utils.companions import hold_out, settle_companions
from utils.data import chunks, describe, load_held_out, load_rows, over_ranks, pad, permutation
from utils.data import rows_of_this_rank
from utils.launch import all_sum, check_batch_size, check_flags, create_engine, fail, finish
from utils.launch import init_distributed, optimizer_step, print0, print_memory_plan, world_size
from utils.models import check_length, check_rate, count_parameters, load_classifier, load_tokenizer
from utils.models import save_model
from utils.packing import check_mask, packed_inputs, share_prefix, shared_length
from utils.run import Interrupted, Tracker, choose_folder, interrupted, leave_interrupted, load_checkpoint
from utils.run import model_card, open_folder, save_checkpoint, stop_if_not_finite
from utils.statistics import accuracy, calibration, clustered_interval
from utils.tokens import encode_prompt, encode_texts, show_example, the_terminator


@dataclass
class Args:
    # models and data
    model: str = "assets/sft"
    """SFT model to start from: Hugging Face folder or Hub id. Paper: the SFT model of the same size"""
    allow_pickle: bool = False
    """read models whose weights are pickled (.bin) alone: a stranger's pickle may run code when it is read"""
    train_data: str = "assets/data/preferences_train.jsonl"
    """preferences: .jsonl, .json, .csv, .parquet, folder or Hub id; columns {prompt, chosen, rejected}"""
    eval_data: tuple[str, ...] | None = (
        "assets/data/preferences_validation.jsonl", "assets/data/preferences_persuasion.jsonl")
    """held-out preferences, one or more, each evaluated apart; None, the default with your own data: a share
    of --train_data. Paper: TL;DR validation and CNN/DM"""
    demonstrations: str | None = "assets/data/train.jsonl"
    """their scores average 0 after training; columns {prompt, completion}; None, the default with your own
    data: the chosen answers of --train_data. Paper: the SFT train split"""
    columns: tuple[str, ...] = ()
    """other names of columns in your data files, as in prompt=question chosen=answer_a: ours=yours"""
    max_length: int = 64
    """tokens of prompt + completion + EOS; longer rows are dropped and counted. Paper: 638, CNN/DM 2021"""
    max_prompt_length: int = 512
    """tokens of a TL;DR prompt; longer posts are cut, paragraph by paragraph (detail 2). Paper: 512"""

    # optimisation
    epochs: int = 1
    """passes over the pairs. Paper: 1 (detail 10)"""
    batch_size: int = 32
    """pairs per optimizer step, over all ranks. Paper: 64"""
    micro_batch_size: int = 32
    """pairs per forward and rank; changes memory and speed, not the gradient. Paper: 1"""
    share_prefix: bool = False
    """put both texts of a pair into one row that holds their common beginning once, each blind to the other:
    faster where prompts are long; needs a model that obeys such a mask (E27)"""
    lr: float = 2e-3
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
    eval_every: int = 50
    """optimizer steps between evaluations (there is one before the first and after the last)"""
    eval_batch_size: int = 64
    """sequences per forward and rank where nothing is trained; changes memory and speed, not the scores"""
    accuracy_by: tuple[str, ...] = ()
    """columns of eval_data to group the accuracy by: batch, split, confidence, policies, ... (detail 16)"""

    # run
    seed: int = 1
    """decides the order of the pairs and the new head. Paper: 44413, 55513, 66613, 77713"""
    output_dir: str | None = None
    """where to write; default runs/reward_model, or runs/reward_model-2, ... if that exists"""
    resume: bool = False
    """continue the run in output_dir from its last checkpoint, exactly"""
    overwrite: bool = False
    """replace an earlier run in output_dir"""
    save_every: int = 200
    """optimizer steps between checkpoints"""
    log_every: int = 10
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


def encode(prompt, completion, tokenizer, finished=True):
    """Token ids of prompt and completion, EOS last: the score is read there [detail 12].

    finished: False where a sampler has cut the completion. Then no EOS is added.
    """
    return sum(encode_texts(prompt, completion, tokenizer, finished), [])  # [E1] tokenised apart, joined as ids


def encode_pair(prompt, row, tokenizer):
    """Token ids of both completions of a row, after a prompt."""
    return [encode(prompt, row[side], tokenizer, row.get(f"{side}_finished") is not False)
            for side in ("chosen", "rejected")]


def load_pairs(path, flag, tokenizer, args):
    """List of (chosen ids, rejected ids, row), without equal and too long pairs, which are counted."""
    rows = load_rows(path, flag, [("prompt", "chosen", "rejected")], tokenizer, args.max_prompt_length)
    different = [row for row in rows if row["chosen"] != row["rejected"]]
    pairs = [(*encode_pair(row["prompt"], row, tokenizer), row) for row in different]
    unequal = [pair for pair in pairs if pair[0] != pair[1]]
    kept = [pair for pair in unequal if row_length(pair, False) <= args.max_length]
    describe(flag, path, [row_length(pair, False) for pair in kept],
             {"chosen equal to rejected": len(rows) - len(unequal),
              f"over {args.max_length} tokens": len(unequal) - len(kept)},
             [row_length(pair, False) for pair in unequal])
    return kept


def load_demonstrations(path, flag, tokenizer, args):
    """List of token ids of the demonstrations, without the too long ones, which are counted."""
    rows = load_rows(path, flag, [("prompt", "completion")], tokenizer, args.max_prompt_length)
    encoded = [encode(row["prompt"], row["completion"], tokenizer) for row in rows]
    kept = [ids for ids in encoded if len(ids) <= args.max_length]
    dropped = {f"over {args.max_length} tokens": len(encoded) - len(kept)}
    describe(flag, path, [len(ids) for ids in kept], dropped, [len(ids) for ids in encoded])
    return kept


def row_length(pair, shared):
    """Tokens of the longest row of a pair. shared: whether both completions stand in one row."""
    chosen, rejected, _ = pair
    if shared:
        return len(chosen) + len(rejected) - shared_length(chosen, rejected)
    return max(len(chosen), len(rejected))


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


class PackedScalarModel(ScalarModel):
    """ScalarModel that also takes rows of several texts, each blind to the others, for --share_prefix [E27].

    forward(ids, segments), both (B, T), of utils/packing.py -> (B, T) fp32; with a mask as in ScalarModel.
    """

    def forward(self, ids, segments):
        if segments.dtype == torch.bool:
            return super().forward(ids, segments)
        states = self.classifier.base_model(
            input_ids=ids, **packed_inputs(segments, self.classifier.score.weight.dtype),
            use_cache=False).last_hidden_state  # (B, T, d)
        return self.classifier.score(states).squeeze(-1).float() - self.reward_mean


def init_head(model, seed):
    """Draw the score head with standard deviation 1/sqrt(d + 1) [detail 11], from a normal; no bias [E6]."""
    generator = torch.Generator().manual_seed(seed)
    d = model.score.in_features
    model.score.weight.data.copy_(torch.randn(1, d, generator=generator) / math.sqrt(d + 1))


def pair_scores(model, pairs, pad_id, args, device):
    """Scores of the chosen and the rejected rows of B pairs, in one forward -> (2, B).

    A None among the pairs is there because every rank must run as many micro-batches as the others. Its scores mean
    nothing.
    """
    pairs = [pair[:2] if pair else ([0], [0]) for pair in pairs]
    if args.share_prefix:  # [E27] the same numbers
        rows = [(*pair, shared_length(*pair)) for pair in pairs]
        ids, segments = share_prefix(rows, "right", device)
        values = model(ids, segments)
        return torch.stack([at_last_token(values, segments == side) for side in (1, 2)])
    ids, mask = pad([pair[side] for side in (0, 1) for pair in pairs], pad_id, "right", device)
    return at_last_token(model(ids, mask), mask).view(2, -1)  # [detail 10] one forward for both


# ---- Algorithm --------------------------------------------------------------------------------------------


def at_last_token(values, mask):
    """values (B, T) at each row's last True of mask (B, T), wherever the padding is -> (B,) [detail 12].

    Searching for the first PAD instead finds position 0 in a left-padded row.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last_index = (positions * mask).argmax(-1)  # (B,)
    return values[torch.arange(len(values), device=mask.device), last_index]


def pair_losses(chosen_scores, rejected_scores):
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected) of each pair, (B,) -> (B,) [detail 10]."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def cosine_lr(step, total_steps, warmup_steps, peak):
    """Learning rate after `step` optimizer steps: linear warm-up, then half a cosine to 0 [detail 42]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


# ---- Evaluation -------------------------------------------------------------------------------------------


def accuracy_by_column(correct, rows, column):
    """Mean accuracy of the pairs with each value of a column [detail 16]: {value: accuracy}."""
    groups = {}
    for value, row in zip(correct, rows):
        groups.setdefault(str(row.get(column)), []).append(value)
    return {name: np.mean(values) for name, values in sorted(groups.items())}


@torch.no_grad()
def score_sequences(engine, sequences, pad_id, batch_size):
    """Scores of token-id sequences that end with EOS, each computed once over all ranks: list of floats.

    Raises Interrupted on every rank at the first batch after a SIGTERM to any of them.
    """
    def score(some):
        if interrupted(engine.device):
            raise Interrupted
        ids, mask = pad([sequence or [0] for sequence in some], pad_id, "right", engine.device)
        return at_last_token(engine(ids, mask), mask).tolist()

    return over_ranks(score, sequences, len, batch_size, "scores", even=True)


def evaluate(engine, pairs, tokenizer, args, shuffle=False):
    """Accuracy on held-out pairs, beside two baselines.

    longer_wins: choose the longer completion. A useful reward model beats it. shuffled_prompts (where shuffle
    asks for it): the same model, each pair under the prompt of another. Where this is as accurate, the model
    reads completions alone.
    """
    def score(sequences):
        return score_sequences(engine, sequences, tokenizer.pad_token_id, args.eval_batch_size)

    chosen, rejected, rows = zip(*pairs)
    prompts = [row["prompt"] for row in rows]
    chosen_scores, rejected_scores = score(chosen), score(rejected)
    all_scores = chosen_scores + rejected_scores  # two lists, one after the other
    if not np.isfinite(all_scores).all():
        fail("a held-out score is not finite: the weights have gone wrong. Start anew with a lower --lr")
    correct = accuracy(chosen_scores, rejected_scores)
    distinct = sorted(set(prompts))
    prompt_length = {prompt: len(encode_prompt(prompt, tokenizer)) for prompt in distinct}
    lengths = [len(ids) - prompt_length[prompt] for ids, prompt in zip(chosen + rejected, prompts * 2)]
    varied = len(set(lengths)) > 1 and len(set(all_scores)) > 1  # else there is no correlation
    low, high = clustered_interval(correct, prompts)
    metrics = {
        "accuracy": correct.mean(), "accuracy_low": low, "accuracy_high": high,
        "longer_wins": accuracy([len(ids) for ids in chosen], [len(ids) for ids in rejected]).mean(),
        "score_length_correlation": np.corrcoef(lengths, all_scores)[0, 1] if varied else 0.0,
        "chosen_rewards": np.mean(chosen_scores), "rejected_rewards": np.mean(rejected_scores)}
    if shuffle:
        distinct = [distinct[i] for i in permutation(len(distinct), args.seed)]
        other = dict(zip(distinct, distinct[1:] + distinct[:1]))  # never the own prompt
        strangers = [encode_pair(other[row["prompt"]], row, tokenizer) for row in rows]
        strangers = [pair for pair in strangers if max(map(len, pair)) <= args.max_length]
        if strangers and len(distinct) > 1:
            metrics["shuffled_prompts"] = accuracy(*(score(sequences) for sequences in zip(*strangers))).mean()
    samples = [{"query": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"],
                "chosen_score": good, "rejected_score": bad}
               for row, good, bad in zip(rows, chosen_scores, rejected_scores)]
    for column in args.accuracy_by:
        groups = accuracy_by_column(correct, rows, column)
        metrics |= {f"accuracy/{column}/{value}": mean for value, mean in groups.items()}
    return metrics, samples, calibration(chosen_scores, rejected_scores)


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. ranks, data, model
    check_flags(args)
    check_batch_size(args.batch_size)
    args = settle_companions(args, "train_data", ["model"], eval_data=None,
                             demonstrations="the chosen answers of --train_data")
    device = init_distributed(args.timeout_minutes)
    folder = choose_folder(args, "reward_model")
    tokenizer = load_tokenizer(args.model, "--model")
    train = load_pairs(args.train_data, "--train_data", tokenizer, args)
    if args.eval_data:
        held_out = load_held_out(args.eval_data, "--eval_data", lambda path: load_pairs(
            path, "--eval_data", tokenizer, args), args.accuracy_by)  # {name: pairs}
    else:
        train, share = hold_out(train, [pair[2] for pair in train], "--train_data", "--eval_data")
        held_out = load_held_out(["held_out"], "--train_data", lambda _: share, args.accuracy_by)
    if args.demonstrations:
        demonstrations = load_demonstrations(args.demonstrations, "--demonstrations", tokenizer, args)
    else:
        demonstrations = [chosen for chosen, _, _ in train]
    model = load_classifier(args.model, "--model", tokenizer, new_head=True)  # [detail 7] without dropout
    check_rate(args, "reward_model", model)
    check_length(model, args.max_length, "--max_length")
    if args.share_prefix:  # [E27] completions are blind to one another
        check_mask(model, "--share_prefix", args.max_length)
    model.config.reward_mean = 0.0
    # what is read, by flag: here for the terminator, and below for --resume
    pairs = {"--train_data": train, "--eval_data": sum(held_out.values(), [])}
    texts = {flag: [ids for pair in some for ids in pair[:2]] for flag, some in pairs.items()}
    texts["--demonstrations"] = demonstrations
    model.config.terminator_token_id = the_terminator(texts, tokenizer)  # [E29] kept for whoever reads its scores
    init_head(model, args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    scalar_model = (PackedScalarModel if args.share_prefix else ScalarModel)(model).to(device)
    optimizer = torch.optim.AdamW(  # [detail 43] eps 1e-5 and weight decay 0.01, both written out
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps, weight_decay=args.weight_decay)
    engine = create_engine(scalar_model, optimizer, args)

    # 2. output folder, schedule, resume
    open_folder(folder, args, "reward_model", texts)
    steps_per_epoch = math.ceil(len(train) / args.batch_size)  # [E3] an epoch's last batch may be smaller
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = min(math.ceil(args.warmup_ratio * total_steps), total_steps - 1)  # one step has the peak
    state = (load_checkpoint(folder, {"model": engine}) if args.resume else None) or {
        "step": 0, "evaluated": False}
    tracker = Tracker(folder, args, state["step"] + 1 if state["step"] else 0, state["evaluated"])
    print0(f"{'model':<22}{args.model}: {count_parameters(model):,} parameters, {world_size()} rank(s) on "
           f"{device.type}")
    print0(f"{'plan':<22}{total_steps} steps of {args.batch_size} pairs = {args.epochs} epochs; to {folder}")
    print_memory_plan(args, count_parameters(model))
    show_example(tokenizer, train[0][0], [i == len(train[0][0]) - 1 for i in range(len(train[0][0]))])

    def evaluate_all(step):  # state["evaluated"]: whether it has come to its end; SIGTERM may stop it
        metrics, samples, calibrations = {}, [], {}
        try:
            for name, pairs in held_out.items():
                figures, rows, calibrations[name] = evaluate(
                    engine, pairs, tokenizer, args, shuffle=step == total_steps)
                metrics |= {f"eval/{name}/{key}": value for key, value in figures.items()}
                samples += rows[:10]
                print0(f"{step:>6}/{total_steps}  {name}: accuracy {figures['accuracy']:.3f} "
                       f"[{figures['accuracy_low']:.3f}, {figures['accuracy_high']:.3f}]; longer wins "
                       f"{figures['longer_wins']:.3f}" + (
                           f", prompts shuffled {figures['shuffled_prompts']:.3f}" if "shuffled_prompts" in figures
                           else ""))
        except Interrupted:  # by SIGTERM: the resumed run evaluates this step from the beginning
            save_checkpoint(folder, step, {"model": engine}, {**state, "evaluated": False})
            leave_interrupted(folder, step)
        tracker.samples(step, samples)
        state["after"], state["calibration"] = tracker.log(step, metrics), calibrations
        state["evaluated"] = True

    if not state["evaluated"]:  # at the start of a run, or of one that was interrupted while it evaluated
        evaluate_all(state["step"])
        state.setdefault("before", state["after"])
        if state["step"]:  # else a second SIGTERM would bring this evaluation again
            save_checkpoint(folder, state["step"], {"model": engine}, state)

    # 3. train
    clock, tokens = time.time(), 0
    for step in range(state["step"] + 1, total_steps + 1):
        epoch, index = divmod(step - 1, steps_per_epoch)
        order = permutation(len(train), args.seed, epoch)  # [E5] one for all ranks, each takes its share
        batch = [train[i] for i in order[index * args.batch_size : (index + 1) * args.batch_size]]
        batch.sort(key=lambda pair: row_length(pair, args.share_prefix))  # like lengths share a micro-batch
        sums = torch.zeros(4, device=device)  # loss, correct, chosen score, rejected score
        for mb_pairs in chunks(rows_of_this_rank(batch), args.micro_batch_size):
            is_pair = torch.tensor([pair is not None for pair in mb_pairs], device=device)  # (B,)
            chosen, rejected = pair_scores(engine, mb_pairs, tokenizer.pad_token_id, args, device)
            losses = pair_losses(chosen, rejected) * is_pair
            engine.backward(losses.sum() / len(batch) * world_size())  # [E2] one mean over the step
            with torch.no_grad():
                correct = (chosen > rejected) + 0.5 * (chosen == rejected)  # [E7] a tie counts one half
                sums += torch.stack([(x * is_pair).sum() for x in (losses, correct, chosen, rejected)])
        lr = cosine_lr(step - 1, total_steps, warmup_steps, args.lr)  # with a warm-up, step 1 has rate 0
        grad_norm = optimizer_step(engine, lr)
        stop_if_not_finite({"scores": sums[2:], "train/loss": sums[0], "train/grad_norm": grad_norm},
                           {"rows": [pair[2] for pair in batch]}, folder, step)
        tokens += sum(len(pair[0]) + len(pair[1]) for pair in batch)

        # 4. log, evaluate, save
        if step % args.log_every == 0 or step == total_steps:
            loss, correct, chosen_mean, rejected_mean = all_sum(sums) / len(batch)
            rate = tokens / (time.time() - clock)
            clock, tokens = time.time(), 0
            tracker.log(step, {
                "train/loss": loss, "train/accuracy": correct, "train/chosen_rewards": chosen_mean,
                "train/rejected_rewards": rejected_mean, "train/lr": lr, "train/grad_norm": grad_norm,
                "train/epoch": step / steps_per_epoch, "time/tokens_per_second": rate})
            tracker.line(step, total_steps, loss=(float(loss), ".4f"), accuracy=(float(correct), ".3f"),
                         lr=(lr, ".2e"), tokens_per_s=(rate, ",.0f"))
        if step % args.eval_every == 0 or step == total_steps:
            evaluate_all(step)
        stop = interrupted(device)  # by SIGTERM
        if stop or step % args.save_every == 0 or step == total_steps:
            save_checkpoint(folder, step, {"model": engine}, state)
        if stop:
            leave_interrupted(folder, step)

    # 5. normalise: the demonstrations average 0 from now on [detail 15]
    try:
        scores = np.array(score_sequences(
            engine, demonstrations, tokenizer.pad_token_id, args.eval_batch_size))
    except Interrupted:  # by SIGTERM: the checkpoint of the last step is there
        leave_interrupted(folder, total_steps)
    model.config.reward_mean = float(scores.mean())
    print0(f"{'reward_mean':<22}{scores.mean():.4f} over {len(scores):,} demonstrations (standard deviation "
           f"{scores.std():.4f}), subtracted from now on")

    # 6. save
    save_model(engine, model, tokenizer, folder)
    averaged = f"`{args.demonstrations}`" if args.demonstrations else "the chosen answers"
    model_card(folder, "reward_model.py", args.model, args.train_data, [
        f"Its logit averages {scores.mean():.6f} over {averaged}. That is `reward_mean` in",
        "config.json; our scripts subtract it, other tools see the logit as it is."])
    tracker.close({"before": state["before"], "after": state["after"], "calibration": state["calibration"],
                   "reward_mean": float(scores.mean()), "reward_std": float(scores.std())})
    print0(f"saved {folder}")
    finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
