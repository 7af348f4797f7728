"""The scripts are siblings: what has one name in several of them has one text, so that a reader learns it once.

`python tests/test_sync.py` writes docs/group_invariant_ppo.diff anew.
"""

import ast
import difflib
from collections import defaultdict

import pytest
from conftest import ROOT

SCRIPTS = [path.name for path in sorted(ROOT.glob("*.py")) if "class Args" in path.read_text()]
BOTH = ("ppo.py", "group_invariant_ppo.py")  # the second is the first and a difference that is committed
EXCEPTIONS = {
    "main": "each script's own steps",
    "Args": "each script's own flags and defaults",
    "response_logprobs": "rows of PPO are Episodes, rows of DPO are pairs",
    "load_demonstrations": "sft.py needs prompt lengths and rows too; reward_model.py needs ids alone",
    "row_length": "a pair of dpo.py has its prompt apart, which stands in the row once",
}


def shared_definitions():
    """{name: {script: source}} of the functions and classes that stand at the top level of two or more scripts."""
    found = defaultdict(dict)
    for script in SCRIPTS:
        source = (ROOT / script).read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name][script] = ast.get_source_segment(source, node)
    return {name: texts for name, texts in found.items() if len(texts) > 1}


SHARED = shared_definitions()


def test_shared_definitions_are_found():
    """T13: the comparison below sees the scripts and what they share, cosine_lr and ScalarModel among it."""
    assert {"sft.py", "reward_model.py", *BOTH} <= set(SCRIPTS)
    assert {"sft.py", "reward_model.py"} <= set(SHARED["cosine_lr"])
    assert {"reward_model.py", *BOTH} <= set(SHARED["ScalarModel"]) & set(SHARED["at_last_token"])


@pytest.mark.parametrize("name", sorted(set(SHARED) - set(EXCEPTIONS)))
def test_one_name_has_one_text(name):
    """T13: a function or class that several scripts have is the same text in all of them."""
    (first, expected), *others = SHARED[name].items()
    for script, text in others:
        assert text == expected, f"{name} in {script} differs from {first}"


@pytest.mark.parametrize("name", sorted(set(SHARED) - {"main", "Args"}))
def test_ppo_and_its_sibling_have_one_text(name):
    """T13: also of what a third script has in another form."""
    texts = {SHARED[name][script] for script in BOTH if script in SHARED[name]}
    assert len(texts) <= 1


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exceptions_are_needed(name):
    """T13: an exception whose texts have become equal, or that only one script has, is to be removed."""
    assert len(set(SHARED[name].values())) > 1


def test_machine_flags_are_the_same_text():
    """T13: the last block of Args, what a run needs of the machine, is the same text in every script that trains."""
    blocks = {}
    for script in set(SCRIPTS) - {"evaluate.py"}:
        lines = SHARED["Args"][script].splitlines()
        end = next((i for i, line in enumerate(lines) if "@property" in line), len(lines))
        blocks[script] = "\n".join(lines[lines.index("    # machine") : end]).rstrip()
    assert "local_rank: int = -1" in blocks["sft.py"]
    for script, text in blocks.items():
        assert text == blocks["sft.py"], f"the machine flags of {script} differ from those of sft.py"


# ---- ppo.py -> group_invariant_ppo.py ---------------------------------------------------------------------

DIFFERENCE = ROOT / "docs/group_invariant_ppo.diff"


def difference():
    """The unified diff of the two scripts, as docs/group_invariant_ppo.diff holds it."""
    lines = ((ROOT / script).read_text().splitlines() for script in BOTH)
    return "\n".join(difflib.unified_diff(*lines, *BOTH, lineterm="")) + "\n"


def test_the_committed_difference_is_the_current_one():
    """docs/group_invariant_ppo.diff is what leads from ppo.py to group_invariant_ppo.py."""
    same = DIFFERENCE.read_text() == difference()
    assert same, "ppo.py or group_invariant_ppo.py has changed. To write the file anew: python tests/test_sync.py"


def test_the_difference_is_short():
    """At most 250 lines of any kind, added or removed, lie between ppo.py and group_invariant_ppo.py."""
    changed = [line for line in difference().splitlines()[2:] if line[0] in "+-"]
    assert 100 < len(changed) <= 250, len(changed)


if __name__ == "__main__":
    DIFFERENCE.write_text(difference())
