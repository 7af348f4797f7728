"""Inputs that were not given: nothing of the embedded task stands in silence beside a user's own models or data.

The default inputs of a script belong together: they are the embedded task, under assets/. Its held-out rows, its
demonstrations and its judges say nothing about other data.
"""

import dataclasses
import hashlib
from pathlib import Path

from utils.launch import fail, given, print0
from utils.models import load_tokenizer

HELD_OUT, MOST_HELD_OUT = 0.05, 500  # share of the rows, and number of rows


def settle_companions(args, data, models, **companions):
    """args without the embedded task's companions where the data are the user's. Each decision is printed in a line.

    data: the flag of the main data; models: those of the models; companions: {flag: what takes its place}, with None
    where what takes its place prints its own line. Whatever is given stays. A user's model with the embedded data keeps their
    companions, if it has their vocabulary: that is a model that sft.py has made of the embedded task.
    """
    own = [flag for flag in (data, *models) if _is_own(args, flag)]
    if data in own:
        args = dataclasses.replace(args, **{flag: None for flag in companions if not given(args, flag)})
    elif models[0] in own and not given(args, data):
        _check_vocabulary(args, models[0], data)
    for flag, instead in companions.items():
        if instead and not getattr(args, flag):
            print0(f"{'--' + flag:<22}none given: {instead}")
    left = [flag for flag in (data, *models, *companions) if getattr(args, flag) and not given(args, flag)]
    if getattr(args, "reward_function", None):  # it stands in for the reward model
        left = [flag for flag in left if flag != "reward_model"]
        if not given(args, "missing_eos_score"):  # -1 is low among a reward model's scores, perhaps not among others
            args = dataclasses.replace(args, missing_eos_score=None)
            print0(f"{'--missing_eos_score':<22}none given: a response without EOS keeps the reward function's score")
    if own and left:
        print0(f"{'note':<22}not given, so the embedded task's: {', '.join('--' + flag for flag in left)}")
    return args


def hold_out(items, rows, flag, eval_flag, or_completion=False):
    """(items to train on, items held out): 5 % of them, at least 1 and at most 500, whole prompts together.

    rows: the row of each item, with its `prompt` or `text`. or_completion: where all have one prompt, completions are
    held out instead. A hash of the text decides, so the share is the same for every seed, on any number of ranks, and
    on resume.
    """
    texts = [row["prompt"] if "prompt" in row else row["text"] for row in rows]
    if or_completion and len(set(texts)) == 1 and "completion" in rows[0]:
        texts = [row["completion"] for row in rows]
    groups = {}
    for i, text in enumerate(texts):
        groups.setdefault(text, []).append(i)
    if len(groups) == 1:
        fail(f"{flag}: {len(rows)} row(s) with one prompt, so none can be held out. Give {eval_flag}")
    room, held_out = max(1, min(round(HELD_OUT * len(items)), MOST_HELD_OUT)), set()
    for text in sorted(groups, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if len(groups[text]) <= room - len(held_out):
            held_out.update(groups[text])
    held_out = held_out or set(min(groups.values(), key=len))  # every prompt has more rows than that
    print0(f"{eval_flag:<22}none given: {len(held_out):,} of the {len(items):,} rows of {flag} are held out, "
           "whole prompts together")
    return [x for i, x in enumerate(items) if i not in held_out], [items[i] for i in sorted(held_out)]


def _is_own(args, flag):
    """Whether a flag names something outside assets/."""
    value = getattr(args, flag)
    paths = value if isinstance(value, tuple) else (value,)
    return any(Path("assets").resolve() not in Path(path).resolve().parents for path in paths)


def _check_vocabulary(args, flag, data):
    """Fail in one line where the user's model cannot be one of the embedded task, whose data would be read."""
    value, embedded = getattr(args, flag), getattr(type(args), flag)
    paths = value if isinstance(value, tuple) else (value,)
    own = next((path for path in paths if not Path(path).is_file()), None)  # evaluate.py: not a file of responses
    embedded = embedded[0] if isinstance(embedded, tuple) else embedded
    if own and load_tokenizer(own, f"--{flag}").get_vocab() != load_tokenizer(embedded, f"--{flag}").get_vocab():
        fail(f"--{data}: not given, and the default, {getattr(args, data)}, is the embedded task's, for a vocabulary "
             f"of 1,000 tokens, which is not that of --{flag} {own}. Give your own --{data}")
