"""Do the tests see it when a line is broken? python tests/mutants.py [NUMBER ...], or --wiring [NAME ...]

Without --wiring: one patch for each detail of docs/details.md, which the test of its row must see. With it: the patches
of wiring_mutants_ppo.py and wiring_mutants_pref.py, faults in how `main` connects the parts. Each patch is applied alone
to a copy of the repository; then its test runs there and must fail. Prints a table; the exit code is 1 if any patch goes
unseen. --part 1/2 takes every second one from the first on. Not part of the gate; tests/test_docs.py checks that every
detail has a patch and that all patches still fit the code.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import wiring_mutants_ppo
import wiring_mutants_pref

ROOT = Path(__file__).resolve().parent.parent

MUTANTS = {  # number: (file, text, broken text)
    "1": ("utils/formats.py", 'summaries[row["choice"]], summaries[1 - row["choice"]]',
          'summaries[1 - row["choice"]], summaries[row["choice"]]'),
    "2": ("utils/formats.py", 'text.rpartition("\\n")', 'text.partition("\\n")'),
    "3": ("sft.py", "return prompt + completion, len(prompt)", "return (prompt + completion)[:-1], len(prompt)"),
    "4": ("utils/formats.py", "CNNDM_PROMPT_LENGTH = 1919", "CNNDM_PROMPT_LENGTH = 512"),
    "5": ("sft.py", 'tokenizer.pad_token_id, "right", device)', 'tokenizer.pad_token_id, "left", device)'),
    "6": ("utils/data.py", 'pair[-1].get("batch") in CNNDM_BATCHES', "False"),
    "7": ("utils/models.py", "            module.p = 0.0\n", "            pass\n"),
    "8": ("utils/launch.py", '"bf16": {"enabled": args.bf16}', '"bf16": {"enabled": False}'),
    "9": ("sft.py", "uncounted = max(1, prompt_length) if completion_only else 1",
          "uncounted = max(1, prompt_length)"),
    "10": ("reward_model.py", "return -F.logsigmoid(chosen_scores - rejected_scores)",
           "return -F.logsigmoid(rejected_scores - chosen_scores)"),
    "11": ("reward_model.py", "math.sqrt(d + 1)", "(d + 1)"),
    "12": ("reward_model.py", "(positions * mask).argmax(-1)", "(~mask).int().argmax(-1) - 1"),
    "13": ("ppo.py", "torch.where(episodes.ended, scores, args.missing_eos_score)", "scores"),
    "14": ("reward_model.py", "hidden = self.classifier.base_model(",
           "position_ids = None; hidden = self.classifier.base_model("),
    "15": ("reward_model.py", "score(hidden).squeeze(-1).float() - self.reward_mean",
           "score(hidden).squeeze(-1).float()"),
    "16": ("reward_model.py", "str(row.get(column))", '"all"'),
    "17": ("evaluate.py", "(first == second)[both].mean()", "(first == second).mean()"),
    "18": ("utils/statistics.py", "np.arange(0, np.quantile(sizes, 0.995) + 1e-12, width)",
           "np.arange(0, sizes.max() + width, width)"),
    "19": ("dpo.py", "args.beta * (logprobs - ref_logprobs)\n    correct", "args.beta * logprobs\n    correct"),
    "20": ("ppo.py", "    cliprange: float = 0.2\n", "    cliprange: float = 0.1\n"),
    "21": ("ppo.py", "permutation(num_prompts, seed, number)", "permutation(num_prompts, seed)"),
    "22": ("ppo.py", 'classifier = load_classifier(args.reward_model, "--reward_model", tokenizer)',
           'classifier = load_classifier(args.sft_model, "--sft_model", tokenizer, new_head=True)'),
    "23": ("ppo.py", "torch.where(episodes.ended, scores, args.missing_eos_score)",
           "torch.where(episodes.ended, scores, scores + args.missing_eos_score)"),
    "24": ("ppo.py", "whitened if shift_mean else whitened + mean", "whitened"),
    "25": ("ppo.py", "whitened = (values - mean) * torch.rsqrt", "whitened = values * torch.rsqrt"),
    "26": ("ppo.py", "logits.float() / (temperature + 1e-7)", "logits.float()"),
    "27": ("ppo.py", "return scale_logits(logits, temperature, forbidden)",
           "return scale_logits(logits, 1.0, forbidden)"),
    "28": ("ppo.py", "critic(ids, attention_mask)[:, -width - 1 :]", "critic(ids, attention_mask)[:, -width:]"),
    "29": ("ppo.py", "        if len(going_on) < len(alive):", "        if False:"),
    "30": ("ppo.py", "    mask = t < lengths[:, None]", "    mask = t < lengths[:, None] + 2"),
    "31": ("ppo.py", "t < lengths[:, None] + 1", "t < lengths[:, None]"),
    "32": ("ppo.py", "return logprobs - ref_logprobs", "return (logprobs - ref_logprobs) ** 2 / 2"),
    "33": ("ppo.py", "torch.where(lengths < kl.shape[1], lengths, lengths - 1)", "lengths - 1"),
    "35": ("ppo.py", "masked_whiten(rewards, value_mask, shift_mean=False)",
           "masked_whiten(rewards, mask, shift_mean=False)"),
    "36": ("ppo.py", "advantage = delta + gamma * lam * advantage", "advantage = delta + lam * lam * advantage"),
    "37": ("ppo.py", "masked_whiten(advantages, mask)", "masked_whiten(advantages, value_mask)"),
    "38": ("ppo.py", "return torch.maximum(unclipped, clipped), (clipped > unclipped)",
           "return torch.minimum(unclipped, clipped), (clipped > unclipped)"),
    "39": ("ppo.py", "0.5 * torch.maximum(unclipped, clipped)", "torch.maximum(unclipped, clipped)"),
    "40": ("ppo.py", "(pg_losses * mask[rows]).sum() / num_tokens", "(pg_losses * mask[rows]).sum() / mask[rows].sum()"),
    "41": ("ppo.py", "permutation(len(numbers), args.seed, update, rank(), epoch)",
           "permutation(len(numbers), args.seed, update, rank())"),
    "42": ("ppo.py", "1 - (update - 1) / args.num_updates", "1 - update / args.num_updates"),
    "43": ("ppo.py", "betas=(0.9, 0.999), eps=args.adam_eps,", "betas=(0.9, 0.999),"),
    "44": ("utils/launch.py", "            if args.max_grad_norm > 0:\n", "            if True:\n"),
    "45": ("sft.py", "position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)",
           "position_ids = torch.arange(ids.shape[1]).expand_as(ids)"),
    "46": ("ppo.py", "np.random.default_rng((seed, update, n))", "np.random.default_rng((seed, update, n % 2))"),
    "47": ("ppo.py", 'optimizer_step(engines["critic"], critic_lr)', 'optimizer_step(engines["critic"], lr)'),
    "48": ("utils/launch.py", "    if model and offload:\n", "    if False:\n"),
    "49": ("ppo.py", "noise = sampling_noise(0, 0, mine, args.response_length)",
           "noise = sampling_noise(args.seed, update, mine, args.response_length)"),
    "E1": ("utils/tokens.py", "            return both[len(before) :]\n", "            return ids_of(response)\n"),
    "E2": ("ppo.py", "(pg_losses * mask[rows]).sum() / num_tokens", "(pg_losses * mask[rows]).sum() / mask[rows].sum()"),
    "E3": ("sft.py", "math.ceil(len(packs) / args.batch_size)", "len(packs) // args.batch_size"),
    "E4": ("utils/models.py", "                setattr(module, key, 0.0)\n", "                pass\n"),
    "E5": ("utils/data.py", "rows[rank() :: world_size()]", "rows[rank() :: world_size() + 1]"),
    "E6": ("reward_model.py", "model.score.weight.data.copy_(",
           "model.score.bias = torch.nn.Parameter(torch.ones(1)); model.score.weight.data.copy_("),
    "E7": ("utils/statistics.py", "return (chosen > rejected) + 0.5 * (chosen == rejected)",
           "return (chosen > rejected) + 0.0 * (chosen == rejected)"),
    "E8": ("ppo.py", '"val/ratio": masked_mean(ratio, mask)', '"val/ratio": ratio.mean()'),
    "E9": ("ppo.py", "args.vf_coef * (vf_losses * value_mask[rows]).sum()", "(vf_losses * value_mask[rows]).sum()"),
    "E10": ("ppo.py", "attention_mask.new_ones(len(alive), 1)", "attention_mask.new_zeros(len(alive), 1)"),
    "E11": ("ppo.py", "np.random.default_rng((seed, update, n)).random(length)",
            "np.random.default_rng((seed, update, n, length)).random(length)"),
    "E12": ("utils/models.py", "forbidden[list(tokenizer.get_vocab().values())] = False",
            "forbidden[: len(tokenizer)] = False"),
    "E13": ("ppo.py", "torch.nn.init.zeros_(classifier.score.weight)", "torch.nn.init.ones_(classifier.score.weight)"),
    "E14": ("ppo.py", "elif drift > 1e-4:", "elif False:"),
    "E15": ("ppo.py", "return logprobs * mask  #", "return logprobs * mask + ~mask  #"),
    "E16": ("ppo.py", "noise = sampling_noise(0, 0, mine, args.response_length)",
            "noise = sampling_noise(args.seed, 0, mine, args.response_length)"),
    "E17": ("utils/models.py", "state = {name.removeprefix(inner): tensor for name, tensor in state.items()}", "pass"),
    "E18": ("utils/launch.py", '"gradient_clipping": 0.0 if clips_itself(args) else args.max_grad_norm,',
            '"gradient_clipping": 1.0,'),
    "E19": ("utils/run.py", "all(_sha256(checkpoint / name) == value for name, value in sums.items()):", "True:"),
    "E20": ("ppo.py", "width = max(len(self.sequences[i])", "width = min(len(self.sequences[i])"),
    "E21": ("utils/packing.py", "own = segments[:, :, None] == segments[:, None, :]",
            "own = segments[:, :, None] >= segments[:, None, :]"),
    "E22": ("utils/tokens.py", "encode_texts(query, response, tokenizer, end)", "encode_texts(query, response, tokenizer)"),
    "E23": ("evaluate.py", "a_wins = (read[:, 0] + 1 - read[:, 1]) / 2", "a_wins = read[:, 0]"),
    "E24": ("evaluate.py", "None: np.nan}", "None: 0.0}"),
    "E25": ("evaluate.py", "np.tanh(differences / (differences.std() or 1.0))",
            "differences / (differences.std() or 1.0)"),
    "E26": ("evaluate.py", ".logits[:, :-1].float() / args.temperature", ".logits[:, :-1].float()"),
    "E27": ("utils/packing.py", "own = segments[:, :, None] == segments[:, None, :]",
            "own = segments[:, :, None] >= segments[:, None, :]"),
    "E28": ("utils/data.py", "rank() if turn % 2 == 0 else world_size() - 1 - rank()", "rank()"),
    "E29": ("utils/tokens.py", "own = turn.end if _is_rendered(prompt, turn) else", "own ="),
    "G1": ("group_invariant_ppo.py", "n // args.episodes_per_prompt for n", "n for n"),
    "G2": ("group_invariant_ppo.py", 'running_moments(progress.get("moments", (0, 0.0, 0.0)), scores)',
           "running_moments((0, 0.0, 0.0), scores)"),
    "G3": ("group_invariant_ppo.py", "return (values - mean) / (sd or 1.0), hidden[",
           "return values, hidden["),
    "G4": ("group_invariant_ppo.py", "-1 - back]", "-2 - back]"),
    "G5": ("group_invariant_ppo.py", "sums = all_sum(torch.stack([labels.sum(0), values @ labels]))",
           "sums = torch.stack([labels.sum(0), values @ labels])"),
    "G6": ("group_invariant_ppo.py", 'weights = shares if kind == "mass" else',
           'weights = shares if kind == "uniform" else'),
    "G7": ("group_invariant_ppo.py", "* gradient[rows]).sum() / args.batch_size",
           "* gradient[rows]).sum() / len(rows)"),
    "G8": ("group_invariant_ppo.py", "            advantages *= kappas[:, None]", "            pass"),
    "G9": ("group_invariant_ppo.py", "args.batch_size) * inverse_sd", "args.batch_size)"),
    "G10": ("group_invariant_ppo.py", "best = means.masked_fill(shares < 1e-9, -torch.inf).argmax()",
            "best = group_means(labels, scores)[1].argmin()"),
    "G11": ("group_invariant_ppo.py", 'optimizer_step(engines["group_head"], group_head_lr)',
            'optimizer_step(engines["group_head"], critic_lr)'),
    "W1": ("dpo.py", "load_causal_lm(ref_path, ref_flag,", 'load_causal_lm(args.model, "--model",'),
    "W2": ("dpo.py", "return (logprobs * is_response).sum(-1)",
           "return (logprobs * is_response).sum(-1) / lengths.clamp(min=1)"),
    "W3": ("utils/tokens.py", "+ [end] * bool(finished)", "+ [end]"),
    "W4": ("dpo.py", "elif len(prompt) + max(len(chosen), len(rejected)) > args.max_length:", "elif False:"),
    "W5": ("dpo.py", "load_causal_lm(ref_path, ref_flag, tokenizer, args.bf16)",
           "load_causal_lm(ref_path, ref_flag, tokenizer)"),
    "W6": ("dpo.py", "fingerprint(reference, [pair[:3] for pair in pairs], rounding)", "fingerprint(reference, rounding)"),
    "W7": ("dpo.py", "- label_smoothing * F.logsigmoid(-beta * h)", "+ label_smoothing * F.logsigmoid(-beta * h)"),
    "W8": ("dpo.py", "F.relu(1 - beta * h)", "F.relu(1 - h)"),
    "W9": ("dpo.py", "return (h - 1 / (2 * beta)) ** 2", "return (h - 1 / beta) ** 2"),
    "W10": ("dpo.py", "math.ceil(args.warmup_ratio * total_steps)", "int(args.warmup_ratio * total_steps)"),
    "W11": ("dpo.py", "betas=(0.9, 0.999), eps=args.adam_eps, weight_decay", "betas=(0.9, 0.999), weight_decay"),
    "W12": ("dpo.py", "args.nll_coef * logprobs[0].sum() / chosen_tokens",
            "args.nll_coef * logprobs[0].sum() / sum(len(pair[1]) for pair in mb_pairs if pair)"),
    "W13": ("utils/packing.py", "own = segments[:, :, None] == segments[:, None, :]",
            "own = segments[:, :, None] >= segments[:, None, :]"),
}


WIRING = wiring_mutants_ppo.MUTANTS | wiring_mutants_pref.MUTANTS  # name: (file, text, broken text, test)


def rows():
    """{number: test} of docs/details.md."""
    found = {}
    for line in (ROOT / "docs" / "details.md").read_text().splitlines():
        if match := re.match(r"\| ([EGW]?\d+) \|.*\| `([\w./]+::\w+)` \|$", line):
            found[match[1]] = "tests/" + match[2]
    return found


def killed(file, text, broken, test):
    """Whether the test fails in a copy of the repository with this text broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "records", "__pycache__"))
        source = (copy / file).read_text()
        assert source.count(text) == 1, f"{file} has this text {source.count(text)} times: {text}"
        (copy / file).write_text(source.replace(text, broken))
        code = run_in_fork(copy, test)
        assert code in (0, 1), f"{test} did not run: exit code {code}"
        return code == 1


def run_in_fork(copy, test):
    """pytest's exit code in the copy, in a fork of this process: torch's import takes longer than most of the tests."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(copy)
    sys.path = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *test.split()])))


def main(names):
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    import deepspeed  # noqa: F401  so that every fork has it, and torch

    assert not killed("README.md", "# Minimal RLHF", "# Minimal RLHF", "tests/test_gpu.py -k advantages"), "no patch, no kill"
    wiring = "--wiring" in names
    chosen = WIRING if wiring else {number: (*MUTANTS[number], test) for number, test in rows().items()}
    part, parts = next((map(int, name.split("/")) for name in names if re.fullmatch(r"\d+/\d+", name)), (1, 1))
    names = [name for name in names if name in chosen] or list(chosen)[part - 1 :: parts]
    survivors = 0
    print("| fault | file | broken | test | |\n|-|-|-|-|-|", flush=True)
    for name in names:
        file, _, broken, test = chosen[name]
        seen = killed(*chosen[name])
        survivors += not seen
        line = (broken.strip().splitlines() or ["(line removed)"])[0].replace("|", "\\|")
        print(f"| {name} | {file} | `{line}` | {test} | {'killed' if seen else 'SURVIVED'} |", flush=True)
    print(f"\n{survivors} survived")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
