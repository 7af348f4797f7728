"""The documentation is true: details have tags and tests, links lead somewhere, numbers of lines are right."""

import ast
import dataclasses
import importlib
import itertools
import json
import re
import shlex
import shutil

import pytest
import torch
import tyro
from conftest import ROOT
from mutants import MUTANTS, WIRING

import group_invariant_ppo
import ppo
import sft
from utils.models import load_tokenizer

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")])
PAGES = sorted([ROOT / "README.md", *(page for pattern in ("assets/README.md", "docs/*.md", "records/*/README.md")
                                     for page in ROOT.glob(pattern))])


def tags():
    """{number: {file: its first line with this tag}} of every [detail N], [EN], [WN] and [GN] in the code."""
    found = {}
    for path in SOURCES:
        lines = path.read_text().splitlines()
        header = len((ast.get_docstring(ast.parse(path.read_text()), clean=False) or "").splitlines())
        for line in [*range(header, len(lines)), *range(header)]:  # the module's docstring last
            for number in re.findall(r"\[(?:detail )?([EGW]?\d+)\]", lines[line]):
                if number[0] in "EGW" or f"[detail {number}]" in lines[line]:
                    found.setdefault(number, {}).setdefault(str(path.relative_to(ROOT)), line + 1)
    return found


def where(files):
    """The links of a row of docs/details.md."""
    return ", ".join(f"[{file}](../{file}#L{line})" for file, line in files.items())


def rows():
    """{number: (links, test file, test name)} of the tables of docs/details.md."""
    found = {}
    for line in (ROOT / "docs/details.md").read_text().splitlines():
        if re.match(r"\| [EGW]?\d+ \|", line):
            number, _, _, links, _, test = (cell.strip() for cell in line.strip("|").split(" | "))
            assert number not in found, f"detail {number} has two rows"
            found[number] = (links, *test.strip("` |").split("::"))
    return found


def write_links():
    """Write the links of docs/details.md anew."""
    lines, tagged = (ROOT / "docs/details.md").read_text().splitlines(), tags()
    for i, line in enumerate(lines):
        if re.match(r"\| [EGW]?\d+ \|", line):
            cells = line.split(" | ")
            cells[3] = where(tagged.get(cells[0].strip("| "), {}))
            lines[i] = " | ".join(cells)
    (ROOT / "docs/details.md").write_text("\n".join(lines) + "\n")


def test_every_tag_has_a_row_and_every_row_its_tags():
    """A row links the first line with its number in each file that has one. Remedy: python tests/test_docs.py."""
    assert len(rows()) > 60
    assert {number: links for number, (links, _, _) in rows().items()} == {
        number: where(files) for number, files in tags().items()}


def test_every_detail_of_the_paper_is_there_or_says_why():
    """1 to 49: a row, or a word in the paragraph of those that no line carries."""
    without = re.search(r"Without a row, .*?\n\n", (ROOT / "docs/details.md").read_text(), re.S)[0]
    missing = [number for number in range(1, 50) if str(number) not in rows()]
    assert missing and all(re.search(rf"\({number}[:)]", without) for number in missing)


def test_no_tag_stands_alone():
    """A comment of tags alone sends the reader away: each tag is followed by its fact."""
    tags_alone = re.compile(r"#( *\[(detail )?[EGW]?\d+\])+ *$")
    assert tags_alone.search("x = 1  # [detail 22] [E14]") and not tags_alone.search("x = 1  # [E14] a fact")
    assert not [(path.name, line) for path in SOURCES for line in path.read_text().splitlines() if tags_alone.search(line)]


def test_every_row_of_a_paper_names_its_source():
    """A pinned line of the paper's code, or the paper's section; so has every row that says what theirs does."""
    pinned = r"\[[^]]+\]\(https://github\.com/[\w.-]+/[\w.-]+/blob/[0-9a-f]{40}/[\w./-]+#L\d+(-L\d+)?\)"
    lines = [line for line in (ROOT / "docs/details.md").read_text().splitlines() if re.match(r"\| [EGW]?\d+ \|", line)]
    assert len(lines) > 80
    for line in lines:
        number, fact, why, _, source, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        if number[0] != "E" or "theirs" in (fact + why).lower():
            assert re.fullmatch(rf"{pinned}|\[TRL [\d.]+, {pinned[2:]}|paper, sections? .*|ours.*", source), (number, source)


def test_the_tests_that_rows_name_exist():
    """A row names a test function that is there."""
    for number, (_, file, name) in rows().items():
        source = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {name}\(", source, re.M), f"detail {number}: {file}::{name}"


def test_every_row_has_a_mutant_that_fits():
    """tests/mutants.py breaks each detail that has a row, in a text that its file holds exactly once."""
    assert set(MUTANTS) == set(rows())
    for name, (file, text, broken, *_) in [*MUTANTS.items(), *WIRING.items()]:
        assert (ROOT / file).read_text().count(text) == 1 and text != broken, f"{name}: {file}: {text}"
    assert len(WIRING) > 300


def test_links_lead_to_files():
    """Every relative link of every page leads to a file of the repository."""
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) > 40
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_states_the_length_of_each_script():
    """The scripts table gives each script's number of lines, to within five of the truth."""
    stated = dict(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M))
    assert set(stated) == {path.name for path in ROOT.glob("*.py")}
    for name, lines in stated.items():
        assert abs(int(lines) - len((ROOT / name).read_text().splitlines())) <= 5, name


# ---- Commands ---------------------------------------------------------------------------------------------

SEEDS = {44413, 55513, 66613, 77713}
PAPER = {  # nplus.md 2.1, 2.2, 2.4: sections 5 to 7 of the paper and its code
    "sft": dict(lr=3e-6, adam_eps=1e-5, weight_decay=0.01, max_grad_norm=0.0, warmup_ratio=0.0, epochs=1,
                batch_size=128, micro_batch_size=1, max_prompt_length=512, max_length=562, response_length=53, temperature=0.01,
                completion_only=False, pack_length=0, num_samples=6447),
    "reward_model": dict(lr=3e-6, adam_eps=1e-5, weight_decay=0.01, max_grad_norm=0.0, warmup_ratio=0.0, epochs=1,
                         batch_size=64, micro_batch_size=1, max_prompt_length=512, max_length=2022),
    "ppo": dict(lr=3e-6, critic_lr=3e-6, adam_eps=1e-5, weight_decay=0.01, max_grad_norm=0.0, total_episodes=1_000_000,
                num_updates=1953, batch_size=512, num_minibatches=1, num_ppo_epochs=4, kl_coef=0.05,
                gamma=1.0, lam=0.95,
                cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, temperature=0.7, top_p=1.0, repetition_penalty=1.0,
                max_prompt_length=512, response_length=53, missing_eos_score=-1.0, whiten_rewards=False),
}
DPO = dict(loss="sigmoid", label_smoothing=0.0, nll_coef=0.0)
PAPER["dpo"] = dict(  # rlhf_workflow.md 1.8 and 2.1; AdamW and clipping are the defaults of transformers' trainer
    DPO, beta=0.1, lr=5e-7, lr_schedule="cosine", warmup_ratio=0.03, epochs=2, batch_size=128, micro_batch_size=2,
    weight_decay=0.0, adam_eps=1e-8, max_grad_norm=1.0, max_length=2048, max_prompt_length=1000, ref_model=None)
DPO_BY_MODEL = {  # the start of --model: that paper's table
    "RLHFlow/": PAPER["dpo"],
    "models/sft_": dict(  # nplus.md 2.3
        DPO, beta=0.05, lr=3e-6, lr_schedule="cosine", warmup_ratio=0.0, epochs=1, batch_size=64, adam_eps=1e-5,
        weight_decay=0.01, max_grad_norm=0.0, max_length=2022, max_prompt_length=512),
    "meta-llama/": dict(  # learning_dynamics.md 2.2
        DPO, beta=0.01, lr=1e-5, lr_schedule="constant", warmup_ratio=0.0, epochs=1, batch_size=128, micro_batch_size=32,
        adam_eps=1e-8, weight_decay=0.0, max_grad_norm=1.0, max_length=512, max_prompt_length=128, seed=1234),
}
GROUPS = {  # group_invariant.md 2.1 and 1.3; total_episodes is MOSS-RLHF's, lengths of rows are nobody's
    "sft": dict(lr=5e-6, epochs=2, batch_size=32),
    "reward_model": dict(lr=5e-6, epochs=1, batch_size=64, train_data="Anthropic/hh-rlhf"),
    "group_invariant_ppo": dict(
        lr=5e-7, critic_lr=9e-6, group_head_lr=9e-6, batch_size=64, episodes_per_prompt=8, num_ppo_epochs=1,
        num_minibatches=1, num_updates=1000, prompts="Anthropic/hh-rlhf", response_length=512, temperature=0.8,
        top_p=0.9, repetition_penalty=1.1, kl_coef=0.05, gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2,
        vf_coef=1.0, score_clip=5.0, whiten_rewards=False, num_groups=2, beta_critic=1.0, beta_policy=0.01, dynamic_kl=True,
        group_level="trajectory", group_variance="mass"),
}
MEMORY = {"1b": (16, 64, False), "2.8b": (4, 32, False), "6.9b": (1, 4, True)}  # micro-batch, rollout, offload


def commands(page):
    """[(script, Args, command)] of every command of a page that runs a script, loops over SIZE and SEED unrolled."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S):
        lines = block.replace("\\\n", " ").splitlines()
        loops = dict(re.findall(r"for (SIZE|SEED) in ([\w. ]+); do", lines[0]))
        for size, seed in itertools.product(*(loops.get(name, "-").split() for name in ("SIZE", "SEED"))):
            for line in lines:
                words = shlex.split(line.replace("${SIZE}", size).replace("$SIZE", size).replace("$SEED", seed))
                script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                if script is not None and words[0] in ("deepspeed", "python"):
                    name = words[script].removesuffix(".py")
                    args = tyro.cli(importlib.import_module(name).Args, args=words[script + 1 :])
                    found.append((name, args, words[: script + 1]))
    return found


def of_the_group_paper(args):
    return "llama2" in args.output_dir


def test_group_commands_have_that_papers_settings():
    """A command for each of the three stages, with the settings of group invariant learning."""
    found = [(name, args) for name, args, _ in commands("docs/scaling.md") if of_the_group_paper(args)]
    assert [name for name, _ in found] == list(GROUPS)
    for name, args in found:
        assert args.bf16 and args.zero_stage == 2
        for flag, value in GROUPS[name].items():
            assert getattr(args, flag) == value, (name, flag)


def test_paper_commands_have_the_papers_settings():
    """Each command of docs/scaling.md parses, and its Args are those of the N+ paper's tables; other papers: apart."""
    found = [(name, args, words) for name, args, words in commands("docs/scaling.md") if not of_the_group_paper(args)]
    for name, args, _ in found:
        assert args.bf16 and args.zero_stage == 2
        if name == "dpo":
            continue
        for flag, value in PAPER[name].items():
            assert getattr(args, flag) == value, (name, flag)
        assert args.seed in SEEDS
        assert "summarize_from_feedback" in (args.prompts if name == "ppo" else args.train_data)
    policies = [args for name, args, words in found if name == "ppo" and words == ["deepspeed", "ppo.py"]]
    for size, memory in MEMORY.items():
        of_size = [args for args in policies if args.sft_model.startswith(f"models/sft_{size}_")]
        assert {args.seed for args in of_size} == SEEDS
        assert {(args.micro_batch_size, args.rollout_batch_size, args.offload_frozen) for args in of_size} == {memory}
    assert [name for name, _, words in found if "--num_gpus" in words] == ["ppo"]
    trained = [(name, args.seed) for name, args, _ in found if name in ("sft", "reward_model")]
    assert sorted(trained) == sorted((name, seed) for name in ("sft", "reward_model") for seed in SEEDS for _ in MEMORY)


def test_dpo_commands_have_the_settings_of_three_papers():
    """RLHF Workflow's, the learning dynamics', and the N+ paper's for three sizes and four seeds."""
    found = [args for name, args, _ in commands("docs/scaling.md") if name == "dpo"]
    assert len(found) == 2 + 3 * len(SEEDS)
    for args in found:
        (table,) = (table for start, table in DPO_BY_MODEL.items() if args.model.startswith(start))
        for flag, value in table.items():
            assert getattr(args, flag) == value, (args.model, flag)


def test_paper_commands_hand_their_models_on():
    """Every model folder that a command reads was written by a command before it, with the same seed."""
    written = set(re.findall(r"meta-llama/.* --local-dir (\S+)", (ROOT / "docs/scaling.md").read_text()))
    assert len(written) == 1
    for name, args, _ in commands("docs/scaling.md"):
        reads = [args.sft_model, args.reward_model] if hasattr(args, "sft_model") else [args.model]
        for path in reads:
            published = path.startswith(("EleutherAI/", "RLHFlow/", "meta-llama/"))
            seed = of_the_group_paper(args) or str(args.seed) in path
            assert published or (path in written and seed), path
        written.add(args.output_dir)


def test_the_group_commands_read_conversations_and_dialogues_alike(tmp_path, monkeypatch):
    """The chat template of docs/scaling.md writes `messages` as hh-rlhf has its dialogues, whose prompts are read."""
    start = "\n\nHuman: Hello.\n\nAssistant: Good day.\n\nHuman: Who sat on the mat?\n\nAssistant:"
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "Hello."), ("assistant", "Good day."), ("user", "Who sat on the mat?"), ("assistant", "A cat."))]
    pair = {"chosen": start + " A cat.", "rejected": start + " A"}
    for name, row in (("sharegpt", {"messages": turns}), ("hh", pair)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    shutil.copytree(ROOT / "assets/base", tmp_path / "models/llama2_7b")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.S)
    exec(block, {})
    tokenizer = load_tokenizer("models/llama2_7b", "--model")
    ((_, _, row),) = sft.load_demonstrations("sharegpt.jsonl", "--train_data", tokenizer, sft.Args())
    assert (row["prompt"], row["completion"]) == (start, " A cat.")
    args = group_invariant_ppo.Args(max_prompt_length=64)
    prompts, groups = group_invariant_ppo.load_grouped_prompts("hh.jsonl", "--prompts", tokenizer, args)
    assert [text for _, text, _ in prompts] == [start] and groups == {}


def test_evaluate_commands_are_understood():
    """The commands of docs/evaluation.md parse; the one for TL;DR has the paper's lengths and all its prompts."""
    found = [args for name, args, _ in commands("docs/evaluation.md") if name == "evaluate"]
    assert len(found) >= 2
    (paper,) = (args for args in found if "summarize_from_feedback" in args.prompts)
    assert (paper.num_prompts, paper.max_prompt_length, paper.response_length) == (6447, 512, 53)
    assert paper.pairs == "references" and paper.bf16 and paper.judge_prices and not paper.group_by


def test_help_states_the_papers_values():
    """Where a flag's help says "Paper: 0.05" or "N+: 0.05", the number is that of that paper's table; and the header
    of group_invariant_ppo.py names each flag in which the two papers differ."""
    tables = PAPER | {"group_invariant_ppo": GROUPS["group_invariant_ppo"]}
    stated = {}
    for name, table in tables.items():
        source = (ROOT / f"{name}.py").read_text()
        for flag, value in table.items():
            text = re.search(rf'^    {flag}: .*\n    """.*(Paper|N\+): (-?[\d.,e-]*\d)', source, re.M)
            if text and flag not in ("max_length", "num_samples"):  # 638 with 2021 for CNN/DM; all of them
                stated[name, flag] = text[1]
                theirs = PAPER["ppo"] if text[1] == "N+" else table
                assert float(text[2].replace(",", "")) == float(theirs[flag]), (name, flag)
                if theirs[flag] != value:
                    header = " ".join(source.split('"""')[1].split())
                    assert f"{flag} {value:g}" in header or f"{flag} {value:.0e}".replace("e-0", "e-") in header, flag
    assert {name: stated["group_invariant_ppo", name] for name in ("vf_coef", "episodes_per_prompt", "beta_policy")} == {
        "vf_coef": "N+", "episodes_per_prompt": "Paper", "beta_policy": "Paper"}
    assert stated["ppo", "kl_coef"] == "N+" and stated["sft", "lr"] == "Paper"


# ---- The worked example -----------------------------------------------------------------------------------


def worked_tables():
    """[{first cell: [numbers]}] of the tables of docs/worked_example.md."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs/worked_example.md").read_text(), re.M):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()[2:]]
        tables.append([(row[0], [float(cell) for cell in row[1:6]]) for row in rows])
    return tables


def test_worked_example_is_what_the_functions_give():
    """Every number of docs/worked_example.md, by ppo.py's own functions on the three responses together."""
    first, others = worked_tables()
    first = dict(first)
    rows = [numbers for _, numbers in others]
    old = torch.tensor([first["log-probability under the policy"], rows[1], rows[5]])
    ref = torch.tensor([first["under the reference"], rows[2], rows[6]])
    sampled = torch.tensor([[5, 6, 0, 7, 8], rows[0], rows[4]]).long()
    responses, lengths, ended = ppo.truncate_at_eos(sampled, torch.tensor([0]), 9)
    mask, value_mask = ppo.response_masks(lengths, 5)
    scores = torch.where(ended, torch.tensor([1.5, 2.0, 3.0]), -1.0)
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5] * 5, [0, 0.1, 0.2, 0.3, 0.4]]) * value_mask
    kl = ppo.k1(old * mask, ref * mask)
    rewards = ppo.token_rewards(kl, scores, lengths, 0.05)
    advantages, returns = ppo.gae(rewards, values, 1.0, 0.95)
    deltas = rewards + torch.nn.functional.pad(values, (0, 1))[:, 1:] - values
    whitened = ppo.masked_whiten(advantages, mask)
    expected = {
        "token": responses[0], "counts as an action: t <= e": mask[0], "counts as a state: t <= e + 1": value_mask[0],
        "value of the state before the token": values[0], "KL estimate k1": kl[0],
        "reward: -0.05 KL, and the score at e + 1": rewards[0], "delta: reward + next value - value": deltas[0],
        "advantage: delta + 0.95 next advantage": advantages[0], "return: advantage + value": returns[0],
        "whitened advantage, 0 where masked": whitened[0]}
    assert set(first) - set(expected) == {"log-probability under the policy", "under the reference"}
    for name, tensor in expected.items():
        assert first[name] == pytest.approx(tensor.float().tolist(), abs=1e-6), name
    assert rows[0] == responses[1].tolist() and rows[4] == responses[2].tolist()
    assert rows[3] == pytest.approx(rewards[1].tolist(), abs=1e-6)
    assert rows[7] == pytest.approx(rewards[2].tolist(), abs=1e-6)


def test_flags_of_the_trl_map_exist():
    """Every --flag that docs/coming_from_trl.md names is one of ppo.py."""
    flags = set(re.findall(r"`--(\w+)", (ROOT / "docs/coming_from_trl.md").read_text())) - {"help"}
    assert len(flags) > 15
    assert flags <= {field.name for field in dataclasses.fields(ppo.Args)}


if __name__ == "__main__":
    write_links()
