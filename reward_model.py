"""Reward model: a scalar head on the SFT model, trained on pairs of a chosen and a rejected completion.

Paper: "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031), section 6.
`[detail N]` are its numbers, `[E N]` our own choices; docs/details.md has every one with its reason.

Differs from the paper's code:
  1. an epoch visits every pair exactly once on any number of ranks (the original: 65.6 % of them on 8)   [E5]
  2. prompt and completion are tokenised apart and joined as ids, as the sampler will see them            [E1]
  3. the head has no bias (Hugging Face's classes have none); normalisation makes up for it               [E6]

Run:     python reward_model.py                          the embedded task, CPU, minutes
         deepspeed reward_model.py --model runs/sft --train_data ... --lr 3e-6 --max_length 638    8 GPUs
Reads:   --model, an SFT model; --train_data and --eval_data with columns {prompt, chosen, rejected};
         --demonstrations {prompt, completion}, whose scores will average 0
Writes:  --output_dir: a folder for AutoModelForSequenceClassification (its config holds `reward_mean`, which our
         scripts subtract), metrics.jsonl, samples.jsonl, TensorBoard, checkpoints
Result:  assets/README.md (embedded task); not yet measured at the paper's scale

Shapes:  B pairs of this micro-batch, T tokens
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from utils.data import chunks, describe, load_rows, pad, permutation, rows_of_this_rank, show_example
from utils.formats import CNNDM_BATCHES
from utils.launch import all_sum, check_batch_size, check_flags, create_engine, fail, finish, gather_rows
from utils.launch import init_distributed, optimizer_step, print0, print_memory_plan, world_size
from utils.models import check_length, check_mask, count_parameters, load_classifier, load_tokenizer, save_model
from utils.run import Tracker, choose_folder, interrupted, leave_interrupted, load_checkpoint, model_card, open_folder
from utils.run import save_checkpoint, stop_if_not_finite


@dataclass
class Args:
    # models and data
    model: str = "assets/sft"
    """SFT model to start from: Hugging Face folder or Hub id. Paper: the SFT model of the same size"""
    allow_pickle: bool = False
    """read model folders whose weights are pickled (.bin) alone: a pickle of a stranger may run code when it is read"""
    train_data: str = "assets/data/preferences_train.jsonl"
    """preferences: .jsonl, .json, .csv, .parquet, folder or Hub id; columns {prompt, chosen, rejected}"""
    eval_data: tuple[str, ...] = (
        "assets/data/preferences_validation.jsonl", "assets/data/preferences_persuasion.jsonl")
    """held-out preferences, one or more, each evaluated apart. Paper: TL;DR validation and CNN/DM"""
    demonstrations: str = "assets/data/train.jsonl"
    """after training their scores are shifted to average 0; columns {prompt, completion}. Paper: the SFT train split"""
    max_length: int = 64
    """tokens of prompt + completion + EOS; longer rows are dropped and counted. Paper: 638, and 2021 for CNN/DM"""
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
    """put both completions of a pair into one row that holds their common beginning once, each blind to the other:
    faster where prompts are long; needs a model that obeys such a mask (E27)"""
    lr: float = 2e-3
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
    eval_every: int = 50
    """optimizer steps between evaluations on all of eval_data (there is one before the first and after the last)"""
    accuracy_by: tuple[str, ...] = ()
    """columns of eval_data to group the accuracy by, such as batch, split, confidence, policies (detail 16)"""

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


def encode(prompt, completion, tokenizer):
    """Token ids of prompt and completion, joined as ids [E1], EOS last: the score is read there [detail 12]."""
    completion = tokenizer(completion, add_special_tokens=False).input_ids
    return tokenizer(prompt).input_ids + completion + [tokenizer.eos_token_id]


def load_pairs(path, flag, tokenizer, args):
    """List of (chosen ids, rejected ids, row), without equal and too long pairs, which are counted."""
    rows = load_rows(path, flag, [("prompt", "chosen", "rejected")], tokenizer, args.max_prompt_length)
    different = [row for row in rows if row["chosen"] != row["rejected"]]
    pairs = [(encode(row["prompt"], row["chosen"], tokenizer), encode(row["prompt"], row["rejected"], tokenizer), row)
             for row in different]
    kept = [pair for pair in pairs if max(len(pair[0]), len(pair[1])) <= args.max_length]
    describe(flag, path, [max(len(pair[0]), len(pair[1])) for pair in kept],
             {"chosen equal to rejected": len(rows) - len(different),
              f"over {args.max_length} tokens": len(pairs) - len(kept)})
    return kept


def load_demonstrations(path, flag, tokenizer, args):
    """List of token ids of the demonstrations, without the too long ones, which are counted."""
    rows = load_rows(path, flag, [("prompt", "completion")], tokenizer, args.max_prompt_length)
    encoded = [encode(row["prompt"], row["completion"], tokenizer) for row in rows]
    kept = [ids for ids in encoded if len(ids) <= args.max_length]
    describe(flag, path, [len(ids) for ids in kept], {f"over {args.max_length} tokens": len(encoded) - len(kept)})
    return kept


def shared_length(chosen, rejected):
    """Number of tokens that two rows both begin with, each keeping at least its last one."""
    both = list(zip(chosen[:-1], rejected[:-1]))
    return next((i for i, (a, b) in enumerate(both) if a != b), len(both))


def collate_shared(pairs, device):
    """Pairs as right-padded rows that hold the common beginning once [E27]: ids, segments, position_ids, all (B, T).

        ids           a  b  c     y  y  EOS     z  EOS    0       both begin with a b c, chosen y y EOS, rejected z EOS
        segments      1  1  1     2  2  2       3  3      0       scores are read at the last 2 and the last 3
        position_ids  0  1  2     3  4  5       3  4      0       as if the beginning stood before each [detail 45]

    A None among the pairs becomes a row of two tokens, one a side, which has to be left out of the loss.
    """
    rows, segments, position_ids = [], [], []
    for chosen, rejected in [pair[:2] if pair else ([0], [0]) for pair in pairs]:
        shared = shared_length(chosen, rejected)
        rows.append(chosen + rejected[shared:])
        segments.append([1] * shared + [2] * (len(chosen) - shared) + [3] * (len(rejected) - shared))
        position_ids.append([*range(len(chosen)), *range(shared, len(rejected))])
    return [pad(x, 0, "right", device)[0] for x in (rows, segments, position_ids)]  # id 0, never PAD [detail 3]


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


class PairModel(ScalarModel):
    """ScalarModel that takes pairs of collate_shared too, for --share_prefix [E27].

    forward(ids, segments, position_ids), all (B, T) -> scores of chosen and rejected, (2, B) fp32. A token sees the
    common beginning, and its own completion up to itself. forward(ids, mask) is that of ScalarModel.
    """

    def forward(self, ids, segments, position_ids=None):
        if position_ids is None:
            return super().forward(ids, segments)
        seen = ((segments[:, :, None] == segments[:, None, :]) | (segments == 1)[:, None, :]).tril()[:, None]
        dtype = self.classifier.score.weight.dtype
        attention_mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)  # (B, 1, T, T)
        states = self.classifier.base_model(
            input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).last_hidden_state
        values = self.classifier.score(states).squeeze(-1).float() - self.reward_mean  # (B, T)
        return torch.stack([at_last_token(values, segments == side) for side in (2, 3)])


def init_head(model, seed):
    """Draw the score head from a normal distribution of standard deviation 1/sqrt(d + 1) [detail 11], no bias [E6]."""
    generator = torch.Generator().manual_seed(seed)
    d = model.score.in_features
    model.score.weight.data.copy_(torch.randn(1, d, generator=generator) / math.sqrt(d + 1))


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
    """Learning rate after `step` finished optimizer steps: linear warm-up, then half a cosine to 0 [detail 42]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


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


def accuracy_by_column(correct, rows, column):
    """Mean accuracy of the pairs with each value of a column [detail 16]: {value: accuracy}."""
    groups = {}
    for value, row in zip(correct, rows):
        groups.setdefault(str(row.get(column)), []).append(value)
    return {name: np.mean(values) for name, values in sorted(groups.items())}


def calibration(chosen_scores, rejected_scores, width=0.5):
    """Is a difference worth what sigmoid(difference) says? Pairs in bins of |difference| [detail 18].

    Returns a list of {from, pairs, accuracy, predicted} for the bins up to the 99.5 % quantile, predicted being the
    bin's mean sigmoid(|difference|); above accuracy: the model is too sure.
    """
    differences = np.asarray(chosen_scores) - np.asarray(rejected_scores)
    sizes, correct = np.abs(differences), accuracy(differences, 0 * differences)
    table = []
    for low in np.arange(0, np.quantile(sizes, 0.995) + 1e-12, width):
        inside = (sizes >= low) & (sizes < low + width)
        if inside.any():
            table.append({"from": float(low), "pairs": int(inside.sum()), "accuracy": float(correct[inside].mean()),
                          "predicted": float((1 / (1 + np.exp(-sizes[inside]))).mean())})
    return table


@torch.no_grad()
def score_sequences(engine, sequences, pad_id, batch_size):
    """Scores of token-id sequences that end with EOS, each computed once over all ranks. Returns a list of floats."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # like lengths share a batch
    scores = []
    for rows in chunks(rows_of_this_rank(order), batch_size):
        ids, mask = pad([[0] if row is None else sequences[row] for row in rows], pad_id, "right", engine.device)
        scores += at_last_token(engine(ids, mask), mask).tolist()
    gathered = gather_rows(scores)[: len(order)]  # Nones stand last
    return [score for _, score in sorted(zip(order, gathered))]


def evaluate(engine, pairs, tokenizer, args):
    """Accuracy of the reward model on held-out pairs, beside two baselines that a useful one must beat or match.

    longer_wins: choose the longer completion. shuffled_prompts: the same model, each pair under another pair's
    prompt; where this is as accurate, the model reads completions alone.
    """
    def score(sequences):
        return score_sequences(engine, sequences, tokenizer.pad_token_id, 2 * args.micro_batch_size)

    chosen, rejected, rows = zip(*pairs)
    prompts = [row["prompt"] for row in rows]
    chosen_scores, rejected_scores = score(chosen), score(rejected)
    if not np.isfinite(chosen_scores + rejected_scores).all():
        fail("a held-out score is not finite: the weights have gone wrong. Start anew with a lower learning rate")
    correct = accuracy(chosen_scores, rejected_scores)
    distinct = sorted(set(prompts))
    other = dict(zip(distinct, distinct[1:] + distinct[:1]))  # never a pair's own prompt, unless there is only one
    strangers = [[encode(other[row["prompt"]], row[side], tokenizer) for side in ("chosen", "rejected")]
                 for row in rows]
    strangers = [pair for pair in strangers if max(map(len, pair)) <= args.max_length]
    strangers = strangers or [pair[:2] for pair in pairs]  # none fits: this baseline then equals the accuracy
    shuffled = accuracy(*(score(sequences) for sequences in zip(*strangers)))
    lengths, all_scores = [len(ids) for ids in chosen + rejected], chosen_scores + rejected_scores
    varied = len(set(lengths)) > 1 and len(set(all_scores)) > 1  # else there is no correlation
    low, high = clustered_interval(correct, prompts)
    metrics = {
        "accuracy": correct.mean(), "accuracy_low": low, "accuracy_high": high,
        "longer_wins": accuracy([len(ids) for ids in chosen], [len(ids) for ids in rejected]).mean(),
        "shuffled_prompts": shuffled.mean(),
        "score_length_correlation": np.corrcoef(lengths, all_scores)[0, 1] if varied else 0.0,
        "chosen_rewards": np.mean(chosen_scores), "rejected_rewards": np.mean(rejected_scores)}
    samples = [{"query": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "chosen_score": good,
                "rejected_score": bad} for row, good, bad in zip(rows, chosen_scores, rejected_scores)]
    for column in args.accuracy_by:
        groups = accuracy_by_column(correct, rows, column)
        metrics |= {f"accuracy/{column}/{value}": mean for value, mean in groups.items()}
    return metrics, samples, calibration(chosen_scores, rejected_scores)


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. ranks, data, model
    check_flags(args)
    check_batch_size(args.batch_size)
    device = init_distributed(args.timeout_minutes)
    folder = choose_folder(args, "reward_model")
    tokenizer = load_tokenizer(args.model, "--model")
    train = load_pairs(args.train_data, "--train_data", tokenizer, args)
    names = {path: Path(path).stem for path in args.eval_data}
    if len(set(names.values())) < len(names):  # files of one name in several folders
        names = {path: path.replace("/", "_") for path in args.eval_data}
    held_out = {}  # {name: pairs}
    for path, name in names.items():
        apart = name if name.endswith("_cnndm") else name + "_cnndm"  # [detail 6] CNN/DM is another distribution
        groups = {name: [], apart: []}
        for pair in load_pairs(path, "--eval_data", tokenizer, args):
            missing = set(args.accuracy_by) - set(pair[2])
            if missing:
                fail(f"--accuracy_by {missing.pop()}: no such column in {path}. Found: {', '.join(pair[2])}")
            groups[apart if pair[2].get("batch") in CNNDM_BATCHES else name].append(pair)
        for group, pairs in groups.items():
            if pairs and group in held_out:
                fail(f"--eval_data {path}: its pairs and those of another file would both be called {group}. Rename it")
            if pairs:
                held_out[group] = pairs
    demonstrations = load_demonstrations(args.demonstrations, "--demonstrations", tokenizer, args)
    model = load_classifier(args.model, "--model", tokenizer, new_head=True)  # [detail 7] without dropout
    check_length(model, args.max_length, "--max_length")
    if args.share_prefix:
        check_mask(model, "--share_prefix", args.max_length)
    model.config.reward_mean = 0.0
    init_head(model, args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    scalar_model = (PairModel if args.share_prefix else ScalarModel)(model).to(device)
    optimizer = torch.optim.AdamW(  # [detail 43] eps 1e-5 and weight decay 0.01, both written out
        scalar_model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps, weight_decay=args.weight_decay)
    engine = create_engine(scalar_model, optimizer, args)

    # 2. output folder, schedule, resume
    open_folder(folder, args, "reward_model")
    steps_per_epoch = math.ceil(len(train) / args.batch_size)  # [E3] the last batch of an epoch may be smaller
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = int(args.warmup_ratio * total_steps)
    state = (load_checkpoint(folder, {"model": engine}) if args.resume else None) or {"step": 0}
    tracker = Tracker(folder, args, state["step"] + 1 if state["step"] else 0)
    print0(f"{'model':<22}{args.model}: {count_parameters(model):,} parameters, {world_size()} rank(s) on "
           f"{device.type}")
    print0(f"{'plan':<22}{total_steps} steps of {args.batch_size} pairs = {args.epochs} epochs; writes {folder}")
    print_memory_plan(args, count_parameters(model))
    show_example(tokenizer, train[0][0], [i == len(train[0][0]) - 1 for i in range(len(train[0][0]))])

    def evaluate_all(step):
        metrics, samples, calibrations = {}, [], {}
        for name, pairs in held_out.items():
            figures, rows, calibrations[name] = evaluate(engine, pairs, tokenizer, args)
            metrics |= {f"eval/{name}/{key}": value for key, value in figures.items()}
            samples += rows[:10]
            print0(f"{step:>6}/{total_steps}  {name}: accuracy {figures['accuracy']:.3f} "
                   f"[{figures['accuracy_low']:.3f}, {figures['accuracy_high']:.3f}]; longer wins "
                   f"{figures['longer_wins']:.3f}, prompts shuffled {figures['shuffled_prompts']:.3f}")
        tracker.samples(step, samples)
        return tracker.log(step, metrics), calibrations

    if state["step"] == 0:
        state["before"], _ = evaluate_all(0)

    # 3. train
    clock, tokens = time.time(), 0
    for step in range(state["step"] + 1, total_steps + 1):
        epoch, index = divmod(step - 1, steps_per_epoch)
        order = permutation(len(train), args.seed, epoch)  # [E5] one order for all ranks, each takes its share
        batch = [train[i] for i in order[index * args.batch_size : (index + 1) * args.batch_size]]
        batch.sort(key=lambda pair: max(len(pair[0]), len(pair[1])) if not args.share_prefix else
                   len(pair[0]) + len(pair[1]) - shared_length(*pair[:2]))  # like lengths share a micro-batch
        sums = torch.zeros(4, device=device)  # loss, correct, chosen score, rejected score
        for micro in chunks(rows_of_this_rank(batch), args.micro_batch_size):
            counts = torch.tensor([pair is not None for pair in micro], device=device)  # (B,)
            if args.share_prefix:
                chosen, rejected = engine(*collate_shared(micro, device))
            else:
                sequences = [pair[side] if pair else [0] for side in (0, 1) for pair in micro]
                ids, mask = pad(sequences, tokenizer.pad_token_id, "right", device)
                chosen, rejected = at_last_token(engine(ids, mask), mask).chunk(2)  # [detail 10] one forward for both
            loss_sum = (pair_losses(chosen, rejected) * counts).sum()
            engine.backward(loss_sum / len(batch) * world_size())  # [E2] one mean over the step; ranks are averaged
            correct = (chosen > rejected) + 0.5 * (chosen == rejected)
            sums += torch.stack([(x * counts).sum() for x in (pair_losses(chosen, rejected), correct, chosen, rejected)]
                                ).detach()
        lr = cosine_lr(step - 1, total_steps, warmup_steps, args.lr)
        grad_norm = optimizer_step(engine, lr)
        stop_if_not_finite({"scores": sums[2:], "train/loss": sums[0], "train/grad_norm": grad_norm},
                           {"rows": [pair[2] for pair in batch]}, folder, step)
        tokens += sum(len(pair[0]) + len(pair[1]) for pair in batch)

        # 4. log, evaluate, save
        if step % args.log_every == 0 or step == total_steps:
            loss, correct, chosen_mean, rejected_mean = all_sum(sums) / len(batch)
            rate = tokens / (time.time() - clock)
            clock, tokens = time.time(), 0
            tracker.log(step, {"train/loss": loss, "train/accuracy": correct, "train/chosen_rewards": chosen_mean,
                               "train/rejected_rewards": rejected_mean, "train/lr": lr, "train/grad_norm": grad_norm,
                               "train/epoch": step / steps_per_epoch, "time/tokens_per_second": rate})
            tracker.line(step, total_steps, loss=(float(loss), ".4f"), accuracy=(float(correct), ".3f"),
                         lr=(lr, ".2e"), tokens_per_s=(rate, ",.0f"))
        if step % args.eval_every == 0 or step == total_steps:
            after, calibrations = evaluate_all(step)
        stop = interrupted(device)  # by SIGTERM
        if (stop or step % args.save_every == 0) and step < total_steps:
            save_checkpoint(folder, step, {"model": engine}, {"before": state["before"]})
            if stop:
                leave_interrupted(folder, step)

    # 5. normalise: the demonstrations average 0 from now on [detail 15]
    scores = np.array(score_sequences(engine, demonstrations, tokenizer.pad_token_id, 2 * args.micro_batch_size))
    model.config.reward_mean = float(scores.mean())
    print0(f"{'reward_mean':<22}{scores.mean():.4f} over {len(scores):,} demonstrations (standard deviation "
           f"{scores.std():.4f}), subtracted from now on")

    # 6. save
    save_model(engine, model, tokenizer, folder)
    model_card(folder, "reward_model.py", args.model, args.train_data, [
        f"Its logit averages {scores.mean():.6f} over `{args.demonstrations}`. That constant is `reward_mean` in",
        "config.json; our scripts subtract it, other tools see the logit as it is."])
    tracker.close({"before": state["before"], "after": after, "calibration": calibrations,
                   "reward_mean": float(scores.mean()), "reward_std": float(scores.std())})
    print0(f"saved {folder}")
    finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
