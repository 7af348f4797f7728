"""Evaluation: is a checkpoint better, by how much, at what length and KL, and would another judge agree?

    responses = of each model, sampled, to the same held-out prompts; and the reference responses
    of each model: length, share that ended, distinct n-grams, ROUGE, KL to a reference model
    for each judge (reward model, Python function or server) and each pair of models a, b:
        a_wins   = for each prompt 1 where the judge prefers the response of a, 0 where that of b, 1/2 at ties
        win rate = mean of a_wins, also at equal lengths and by group of prompts
    for each two judges: how often they prefer the same response
    all with 95 % bootstrap intervals over prompts; samples side by side

Run:     python evaluate.py --models assets/sft runs/ppo runs/dpo      the embedded task, CPU, half a minute
         python evaluate.py --models runs/ppo --judges http://localhost:8000/v1 --judge_model NAME
         deepspeed evaluate.py --models ... --bf16                     the ranks share sampling and scoring
Reads:   --models: language models, or files of responses {prompt, response}; --prompts with a column {prompt},
         and {completion} for the references; --judges; for a server OPENAI_API_KEY
Writes:  --output_dir: report.html, table.md, figures, samples.jsonl, verdicts.jsonl, summary.json; --cache:
         samples and the replies of a server: a command that was cut off goes on where it was when given again
Result:  README.md (embedded task)

Papers: the win rates, the length curve and the agreement of judges of "The N+ Implementation Details of RLHF
with PPO" (Huang et al. 2024, arXiv 2403.17031); the length-controlled win rate of AlpacaEval 2 (Dubois et al.
2024, arXiv 2404.04475). `[detail N]` and `[E N]` are rows of docs/details.md; docs/evaluation.md has the formulas.

Differs from the papers' code:
  1. a server judges each pair in both orders; a verdict that turns with it is a tie (N+: one order)      [E23]
  2. a pair with a reply that names no letter is dropped and counted (N+: a letter at random)             [E24]
  3. the length-controlled win rate has no term for a prompt's difficulty: that takes a whole leaderboard [E25]
  4. the KL is that of the samples that are judged, at their temperature (N+: of PPO's own rollouts)      [E26]

Shapes:  N prompts, R bootstrap resamples, B sequences of a batch, T tokens, Tr response tokens, V vocabulary
"""

import json
import re
import shlex
import sys
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro

from utils.companions import settle_companions
from utils.data import FORMATS, as_answer, call_judge, load_prompts, over_ranks, pad, read_responses
from utils.data import rows_of_this_rank, short_names
from utils.judge import ask_within_budget, fill, open_judges, parse_letter
from utils.launch import check_flags, fail, finish, from_rank0, gather_rows, init_distributed, print0, rank, world_size
from utils.models import check_length, fingerprint, load_causal_lm, load_tokenizers
from utils.report import write_report
from utils.rouge import ROUGE, rouge
from utils.run import cached_array, choose_folder, make_folder, open_folder
from utils.statistics import accuracy, calibration
from utils.tokens import decode_responses, encode_texts, terminator_ids

REFERENCES = "references"
SCRIPTS_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@dataclass
class Args:
    # what is compared, on what
    models: tuple[str, ...] = ("assets/sft",)
    """Hugging Face folders, Hub ids, or files (.jsonl, .json, .csv, .parquet) of responses {prompt, response}"""
    prompts: str = "assets/data/validation.jsonl"
    """.jsonl, .json, .csv, .parquet, folder or Hub id; columns {prompt}, and {completion} where there are references"""
    num_prompts: int = 500
    """of them, from the first one on. Paper: all 6,447"""
    columns: tuple[str, ...] = ()
    """other names of columns in your data files, as in prompt=question chosen=answer_a: ours=yours"""
    max_prompt_length: int = 32
    """tokens; longer prompts are dropped and counted, TL;DR posts cut (detail 2). Paper: 512"""
    pairs: Literal["all", "references"] = "all"
    """compare each model with the references and with every other model, or with the references alone (paper)"""
    group_by: tuple[str, ...] = ()
    """columns of --prompts; win rates are also given for each of their values"""

    # samples
    response_length: int = 24
    """tokens of a response at most. Paper: 53"""
    temperature: float = 0.7
    """sampling temperature, and that of the KL (E26)"""
    greedy: bool = False
    """take the likeliest token instead of sampling; there is no KL then"""
    ref_model: str | None = "assets/sft"
    """the KL is that to this model; None, the default with your own prompts: no KL. Its tokenizer measures
    lengths, or else the first model's"""
    allow_pickle: bool = False
    """read model folders whose weights are pickled (.bin) alone: a pickle of a stranger may run code when it is read"""

    # judges
    judges: tuple[str, ...] | None = ("assets/reward_model", "assets.vader:compound")
    """each one of: a reward model (folder or Hub id); module:name of a Python function of texts, (queries, responses)
    -> scores; http://... , the base URL of an OpenAI-compatible server. None, the default with your own prompts: no
    judge, so lengths, KL and ROUGE alone. Paper: gpt-3.5-turbo-0125"""
    judge_model: str = "gpt-4o-mini"
    """model name to ask a server for"""
    judge_template: str | None = None
    """file with the question, {prompt}, {a} and {b} in it standing for texts; None: which summary is better (paper)"""
    judge_options: str = '{"temperature": 0, "max_tokens": 200}'
    """JSON of what else is sent with a request; some models refuse a temperature, or want max_completion_tokens"""
    judge_timeout: float = 60.0
    """seconds to wait while a server sends nothing; then it is asked again, 5 times at most"""
    judge_requests_per_minute: float | None = None
    """no more requests than that; None: as fast as --judge_parallel allows"""
    judge_parallel: int = 8
    """requests to a server at the same time"""
    judge_prices: tuple[float, float] | None = None
    """dollars per million tokens of question and of answer, for the estimate of the cost that is printed beforehand"""
    judge_budget: float | None = None
    """dollars; stop before the first question if the estimate is higher. Needs --judge_prices"""

    # run
    seed: int = 1
    """decides the sampling noise and the bootstrap"""
    output_dir: str | None = None
    """where to write; default runs/evaluate, or runs/evaluate-2, ... if that exists"""
    overwrite: bool = False
    """replace an earlier evaluation in output_dir"""
    cache: str = "runs/evaluate_cache"
    """folder of samples and answers; both are found again under a hash of everything that decides them"""

    # machine
    micro_batch_size: int = 64
    """sequences decoded or scored together per rank"""
    bf16: bool = False
    """bf16 weights (GPUs)"""
    timeout_minutes: float = 30.0
    """end the run when ranks wait for one another longer than this"""
    local_rank: int = -1
    """set by the deepspeed launcher"""


# ---- Model ------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate_responses(model, sequences, tokenizer, args, device):
    """Responses to prompts (lists of ids) by transformers' own generate: list of {response, tokens, length, ended}.

    tokens: ids up to the first EOS, which is the last of them, and counts in the length. The noise depends on the
    seed, the batches and the ranks.
    """
    eos_ids = terminator_ids(tokenizer)
    sampling = {"do_sample": False} if args.greedy else {
        "do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}

    def sample(some):
        ids, mask = pad(some, tokenizer.pad_token_id, "left", device)
        output = model.generate(
            input_ids=torch.where(mask, ids, 0), attention_mask=mask.long(),  # PAD may have no embedding [detail 3]
            max_new_tokens=args.response_length, repetition_penalty=1.0, eos_token_id=eos_ids,
            pad_token_id=tokenizer.pad_token_id, **sampling)[:, ids.shape[1] :]
        rows = []
        for response, tokens in zip(decode_responses(tokenizer, some, output), output.tolist()):
            end = next((t + 1 for t, token in enumerate(tokens) if token in eos_ids), None)
            rows.append({"response": response, "tokens": tokens[:end], "length": len(tokens[:end]),
                         "ended": end is not None, "kl": None})
        return rows

    torch.manual_seed(args.seed + rank())
    return over_ranks(sample, sequences, len, args.micro_batch_size, "sampling")


@torch.no_grad()
def sequence_logprobs(model, sequences, answers, args, device):
    """log pi(response | prompt) at the sampling temperature [E26], a sum over its tokens and EOS -> list of N.

    Rows are padded left, so that all responses end in the last column.
    """
    def score(some):
        ids, mask = pad([prompt + response for prompt, response in some], 0, "left", device)
        counted = pad([[0] * len(prompt) + [1] * len(response) for prompt, response in some], 0, "left", device)[0]
        width = max(len(response) for _, response in some)
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)  # [detail 45] count real tokens
        logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids, use_cache=False,
                       logits_to_keep=width + 1).logits[:, :-1].float() / args.temperature  # (B, Tr, V)
        logprobs = -F.cross_entropy(logits.transpose(1, 2), ids[:, -width:], reduction="none")  # (B, Tr)
        return (logprobs * counted[:, -width:]).sum(-1).tolist()

    pairs = [(prompt, answer["tokens"]) for prompt, answer in zip(sequences, answers)]
    return over_ranks(score, pairs, lambda pair: len(pair[0] + pair[1]), args.micro_batch_size, "log-probabilities")


# ---- Judges -----------------------------------------------------------------------------------------------


@torch.no_grad()
def reward_scores(model, tokenizer, flag, prompts, responses, args, device):
    """Scores of texts by a reward model with its own tokenizer -> list of N.

    Each counts as ended: it gets the terminator at which the model was trained [E29], and the score is read there
    [detail 12], less the constant of the config [detail 15].
    """
    def score(some):
        ids, mask = pad(some, tokenizer.pad_token_id, "right", device)
        logits = model(input_ids=ids, attention_mask=mask.long()).logits  # (B, 1), at the last token that is not PAD
        return (logits[:, 0].float() - getattr(model.config, "reward_mean", 0.0)).tolist()

    model.to(device)
    sequences = [sum(encode_texts(prompt, response, tokenizer), [])  # [E1] joined as ids
                 for prompt, response in zip(prompts, responses)]
    terminator = getattr(model.config, "terminator_token_id", None)
    if terminator is not None:
        sequences = [ids[:-1] + [terminator] for ids in sequences]
    check_length(model, max(map(len, sequences)), f"{flag}: the longest prompt and response")
    scores = over_ranks(score, sequences, len, args.micro_batch_size, "scoring")
    model.to("cpu")
    if not np.isfinite(scores).all():
        row = int(np.argmin(np.isfinite(scores)))
        fail(f"{flag}: score {scores[row]} for query {prompts[row]!r:.60}, response {responses[row]!r:.60}")
    return scores


def both_orders(letters):
    """Verdicts on a of a judge that read each pair twice. letters (N, 2): A, B or None with a shown as A, then with b
    as A; "=" where both responses are the same text, which nobody is asked about.

    Returns a_wins (N,): 1, 0, 1/2 where the two disagree [E23], nan where either is no letter [E24]; position_bias, the
    share of verdicts that change with the order, and first, the share of letters for the response shown first.
    """
    number = {"A": 1.0, "B": 0.0, "=": 0.5, None: np.nan}
    read = np.array([[number[letter] for letter in pair] for pair in letters])
    a_wins = (read[:, 0] + 1 - read[:, 1]) / 2
    asked = ~np.isnan(a_wins) & (read[:, 0] != 0.5)
    return a_wins, {"position_bias": float((a_wins[asked] == 0.5).mean()) if asked.any() else None,
                    "first": float(read[asked].mean()) if asked.any() else None}


# ---- Statistics -------------------------------------------------------------------------------------------


def resample_prompts(prompts, seed, resamples=1000):
    """Paired bootstrap: how often each row stands in each resample of whole prompts -> (R, N).

    Every figure uses these same draws, so two models, or two judges, are always compared on the same prompts.
    """
    _, index = np.unique(prompts, return_inverse=True)
    size = index.max() + 1
    draws = np.random.default_rng(seed).integers(size, size=(resamples, size))
    return np.stack([np.bincount(draw, minlength=size) for draw in draws]).astype(float)[:, index]


def interval(name, values, weights):
    """Mean of the values (N,) that are not nan, under the key `name`, with low and high, its 95 % bootstrap interval;
    all three None where there is no value."""
    values = np.asarray(values, dtype=float)
    known = ~np.isnan(values)
    totals = weights[:, known].sum(1)
    drawn = totals > 0
    if not drawn.any():
        return {name: None, "low": None, "high": None}
    means = weights[drawn][:, known] @ values[known] / totals[drawn]
    low, high = np.percentile(means, [2.5, 97.5])
    return {name: float(values[known].mean()), "low": float(low), "high": float(high)}


def length_controlled(a_wins, differences, weights, ridge=(0.01, 1.0)):
    """Win rate of a if its texts were as long as b's, as in AlpacaEval 2 [E25]: weights (R, N) -> (R,).

        P(a wins) = sigmoid(theta + phi tanh(d / std(d)))        d = length of a - length of b

    theta and phi by maximum likelihood (Newton; a small penalty on theta, so that 500 wins of 500 have a solution, and
    on phi, as theirs); the figure is sigmoid(theta). Ties count half.
    """
    z = np.tanh(differences / (differences.std() or 1.0))
    theta, phi = np.zeros((2, len(weights), 1))
    for _ in range(50):
        p = 1 / (1 + np.exp(-theta - phi * z))  # (R, N)
        slope, curve = weights * (a_wins - p), weights * p * (1 - p)
        g1, g2 = slope.sum(1) - ridge[0] * theta[:, 0], slope @ z - ridge[1] * phi[:, 0]
        h11, h12, h22 = curve.sum(1) + ridge[0], curve @ z, curve @ z**2 + ridge[1]
        determinant = h11 * h22 - h12**2
        step = np.stack([h22 * g1 - h12 * g2, h11 * g2 - h12 * g1]) / determinant
        step = np.clip(step, -1, 1)[..., None]  # far from the solution a Newton step can overshoot
        theta, phi = theta + step[0], phi + step[1]
        if np.abs(step).max() < 1e-9:
            break
    return 1 / (1 + np.exp(-theta[:, 0]))


def compare(a_wins, a_lengths, b_lengths, groups, weights):
    """Everything about a against b by one judge.

    a_wins: 1, 1/2, 0, or nan where dropped (N,); lengths: tokens (N,); groups: {name: (N,) bool}; weights: (R, N).
    """
    known = ~np.isnan(a_wins)

    def within(mask):
        return {"prompts": int((mask & known).sum()), **interval("win_rate", np.where(mask, a_wins, np.nan), weights)}

    found = {**within(known), "dropped": int((~known).sum())}
    names = "length_controlled", "length_controlled_low", "length_controlled_high"
    found |= dict.fromkeys(("win", "tie", "lose", "longer", *names))
    if known.any():
        found |= {name: float((a_wins[known] == x).mean()) for name, x in (("win", 1), ("tie", 0.5), ("lose", 0))}
        found["longer"] = float(accuracy(a_lengths, b_lengths)[known].mean())  # equal lengths: one half
        drawn = weights[weights[:, known].sum(1) > 0][:, known]
        draws = np.concatenate([np.ones((1, known.sum())), drawn])  # first all prompts, then the resamples
        rates = length_controlled(a_wins[known], (a_lengths - b_lengths)[known], draws)
        found |= dict(zip(names, map(float, (rates[0], *np.percentile(rates[1:], [2.5, 97.5])))))
    ratio, edges = np.log(a_lengths / b_lengths), [-np.inf, *np.arange(-1, 1.1, 0.25), np.inf]
    by_length = [{"from": low if np.isfinite(low) else None, "to": high if np.isfinite(high) else None,
                  **within((ratio >= low) & (ratio < high))} for low, high in zip(edges, edges[1:])]
    return {**found, "by_length": by_length, "groups": {name: within(mask) for name, mask in groups.items()}}


def agreement(first, second):
    """How often two judges prefer the same response, where neither sees a tie [detail 17], and Cohen's kappa:
    (agreement - chance) / (1 - chance), chance from the two judges' own shares p and q."""
    both = np.isin(first, (0, 1)) & np.isin(second, (0, 1))
    if not both.any():
        return {"prompts": 0, "agreement": None, "kappa": None}
    observed, p, q = (first == second)[both].mean(), first[both].mean(), second[both].mean()
    chance = p * q + (1 - p) * (1 - q)
    return {"prompts": int(both.sum()), "agreement": float(observed),
            "kappa": float((observed - chance) / (1 - chance)) if chance < 1 else None}


def split_words(text):
    """What stands between spaces, and each character of the scripts that have none between words: Thai, Lao, Burmese,
    Khmer, Chinese, Japanese."""
    return re.findall(rf"(?!\s)[{SCRIPTS_WITHOUT_SPACES}]|[^\s{SCRIPTS_WITHOUT_SPACES}]+", text)


def describe_texts(answers, references, weights):
    """What needs no judge: length, endings, distinct n-grams of words, KL, and ROUGE where there are references."""
    texts = [answer["response"] for answer in answers]
    found = {key: None if any(answer[key] is None for answer in answers) else np.mean(
        [answer[key] for answer in answers]) for key in ("length", "ended")}
    for n in (1, 2, 3):
        grams = [tuple(words[i : i + n]) for words in map(split_words, texts) for i in range(len(words) - n + 1)]
        found[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    kl = interval("kl", [np.nan if answer["kl"] is None else answer["kl"] for answer in answers], weights)
    found |= {"kl": kl["kl"], "kl_low": kl["low"], "kl_high": kl["high"]}
    return found | dict.fromkeys(ROUGE) | rouge(references, texts)


# ---- Main -------------------------------------------------------------------------------------------------


def main(args: Args):
    # 1. everything that can be wrong is found before anything is sampled
    check_flags(args)
    args = settle_companions(args, "prompts", ["models"], ref_model="no KL to a reference",
                             judges="no win rates, only lengths, KL and ROUGE")
    device = init_distributed(args.timeout_minutes)
    folder = choose_folder(args, "evaluate")
    paths = short_names(args.models, REFERENCES)
    checkpoints = {name: path for name, path in paths.items() if Path(path).suffix not in FORMATS}
    tokenizers = load_tokenizers(checkpoints.values(), args.ref_model)  # {path: tokenizer}, one vocabulary
    tokenizer = next(iter(tokenizers.values()))
    found = load_prompts(args.prompts, "--prompts", tokenizer, args, [("prompt", "completion"), ("prompt",)])
    sequences, prompts, rows = map(list, zip(*found[: args.num_prompts]))
    columns = sorted(set().union(*rows))
    for column in sorted(set(args.group_by) - set(columns)):
        fail(f"--group_by {column}: --prompts {args.prompts} has the columns {', '.join(columns)}")
    answers = {name: None if name in checkpoints else read_responses(path, prompts, tokenizer)
               for name, path in paths.items()}
    if "completion" in rows[0]:
        answers[REFERENCES] = [as_answer(row["prompt"], row["completion"], tokenizer) for row in rows]
    pairs = [(name, REFERENCES) for name in paths if REFERENCES in answers]
    pairs += list(combinations(paths, 2)) if args.pairs == "all" else []
    if not pairs:
        print0(f"{'note':<22}nothing to compare: {args.prompts} has no column completion, and there is one model, or "
               "--pairs references")
    judges = open_judges(args, found)
    longest, flags = args.max_prompt_length + args.response_length, "--max_prompt_length + --response_length"
    for path in checkpoints.values():  # each one is tried now, before another one samples for hours
        check_length(load_causal_lm(path, "--models", tokenizer, args.bf16), longest, flags)
    reference_model = None
    if args.ref_model and not args.greedy:
        reference_model = load_causal_lm(args.ref_model, "--ref_model", tokenizer, args.bf16).eval()
        check_length(reference_model, longest, flags)
    make_folder(args.cache, "--cache")
    open_folder(folder, args, "evaluate")
    print0(f"{'plan':<22}{len(rows)} prompts; {', '.join(answers)}; judges {', '.join(judges) or 'none'}; "
           f"writes {folder}")

    # 2. responses of every model, and their log-ratio to the reference model
    for name, path in checkpoints.items():
        model = load_causal_lm(path, "--models", tokenizer, args.bf16).eval()

        def sample():
            found = generate_responses(model.to(device), sequences, tokenizers[path], args, device)
            logprobs = sequence_logprobs(model, sequences, found, args, device)
            return np.array(json.dumps([{**answer, "logprob": value} for answer, value in zip(found, logprobs)]))

        law = [terminator_ids(tokenizers[path]), args.response_length, args.greedy, args.temperature, args.seed]
        rounding = [args.micro_batch_size, world_size(), str(device), torch.__version__, transformers.__version__]
        key = from_rank0(lambda: fingerprint(model, sequences, law, rounding))
        file = Path(args.cache) / f"samples_{key[:16]}.npz"
        answers[name] = json.loads(str(cached_array(file, f"samples of {name}", sample)))
        if reference_model:
            ref_logprobs = sequence_logprobs(reference_model.to(device), sequences, answers[name], args, device)
            for answer, ref_logprob in zip(answers[name], ref_logprobs):
                answer["kl"] = answer["logprob"] - ref_logprob
    model = reference_model = None  # their memory is free from here on
    texts = {name: [answer["response"] for answer in found] for name, found in answers.items()}

    # 3. scores of texts; then the other ranks leave, and this one waits for servers as long as they take
    scores = {judge: {} for judge, (kind, _) in judges.items() if kind != "server"}  # {judge: {model: list of N}}
    for judge, (name, responses) in product(scores, texts.items()):
        kind, scorer = judges[judge]
        if kind == "reward model":
            scores[judge][name] = reward_scores(*scorer, f"--judges {judge}", prompts, responses, args, device)
        else:
            mine = [item for item in rows_of_this_rank(list(zip(prompts, responses, rows))) if item]
            columns = zip(*mine) if mine else ([], [], [])
            scores[judge][name] = gather_rows(call_judge(scorer, f"--judges {judge}", *columns))
    finish()
    if rank() != 0:
        return

    # 4. the verdicts of every judge on every pair
    wins, bias, said = {}, {}, {}  # {(judge, a, b): (N,) 1, 1/2, 0 or nan}; of servers {position_bias, first}, replies
    same = {(a, b): [x == y for x, y in zip(texts[a], texts[b])] for a, b in pairs}  # a tie, whatever rounding says
    for judge, (kind, server) in judges.items():
        if kind != "server":
            wins |= {(judge, a, b): np.where(same[a, b], 0.5, accuracy(scores[judge][a], scores[judge][b]))
                     for a, b in pairs}
            continue
        questions = {(a, b): [() if equal else (  # [E23] each pair in both orders
            fill(server.template, prompt, x, y), fill(server.template, prompt, y, x)) for prompt, x, y, equal in zip(
                prompts, texts[a], texts[b], same[a, b])] for a, b in pairs}
        replies = ask_within_budget(server, [question for asked in questions.values() for both in asked
                                             for question in both], args.judge_budget)  # {question: reply or None}
        for pair, asked in questions.items():
            said[(judge, *pair)] = [[replies[question] for question in both] for both in asked]
            wins[(judge, *pair)], bias[(judge, *pair)] = both_orders(
                [[parse_letter(reply) for reply in both] or ["=", "="] for both in said[(judge, *pair)]])

    # 5. figures, tables, page
    weights = resample_prompts(prompts, args.seed)
    values = {column: [str(row.get(column)) for row in rows] for column in args.group_by}
    groups = {f"{column}={value}": np.array(found) == value for column, found in values.items()
              for value in sorted(set(found))}
    lengths = {name: np.array([answer["length"] for answer in found]) for name, found in answers.items()}
    results = {"command": "python " + shlex.join(sys.argv), "prompts": len(rows), "reference_model": args.ref_model,
               "models": {}, "comparisons": [], "agreement": [], "calibration": []}
    for name, found in answers.items():
        references = texts.get(REFERENCES, []) if name != REFERENCES else []
        results["models"][name] = {
            "path": paths.get(name), **describe_texts(found, references, weights),
            "scores": {judge: interval("mean", scores[judge][name], weights) for judge in scores}}
    for (judge, a, b), a_wins in wins.items():
        found = {"judge": judge, "a": a, "b": b, **bias.get((judge, a, b), {}),
                 **compare(a_wins, lengths[a], lengths[b], groups, weights)}
        results["comparisons"].append(found)
        print0("{judge}: {a} against {b} wins {win_rate:.3f} [{low:.3f}, {high:.3f}], at equal length "
               "{length_controlled:.3f}".format(**found) if found["prompts"] else "{judge}: no verdict".format(**found))
    for (a, b), (one, two) in product(pairs, combinations(judges, 2)):
        results["agreement"].append({"a": a, "b": b, "judges": [one, two],
                                     **agreement(wins[one, a, b], wins[two, a, b])})
    for (a, b), (one, two) in product(pairs, permutations(judges, 2)):
        decided = np.isin(wins[two, a, b], (0, 1))
        if judges[one][0] == "reward model" and decided.any():  # its differences in favour of what the other prefers
            margins = (np.subtract(scores[one][a], scores[one][b]) * (2 * wins[two, a, b] - 1))[decided]
            results["calibration"].append({"a": a, "b": b, "judge": one, "by": two,
                                           "bins": calibration(margins, 0 * margins)})
    write_report(folder, results, prompts, answers, scores, wins, said, values)
    print0(f"wrote {folder}/report.html")


if __name__ == "__main__":
    main(tyro.cli(Args))
