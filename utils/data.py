"""Plumbing for data: files and Hub sets into rows, permutations, padding, and a word on what was read."""

import copy
import csv
import glob
import importlib
import inspect
import io
import json
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.formats import CNNDM_BATCHES, standard_row
from utils.launch import all_sum, fail, fail_together, gather_rows, print0, rank, renamed, world_size
from utils.models import first_line, is_hub_id
from utils.tokens import added_tokens, adds_bos, check_spelling, encode_prompt, encode_texts, split_terminator
from utils.tokens import terminator_ids

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
ANSWERS = {"text", "completion", "chosen", "rejected", "reference_response"}
TEXTS = ANSWERS | {
    "prompt", "query", "messages", "info", "summaries", "meta", "responses", "title", "post", "summary", "system",
    "system_prompt", "question", "input", "response", "instruction", "output", "history", "human_ref_A", "human_ref_B"}


def load_rows(path, flag, columns, tokenizer, max_prompt_length=512):
    """Rows of a data set as a list of dicts, published layouts brought into the scripts' columns (utils/formats.py).

    path: a .jsonl, .json, .csv or .parquet file, a local folder that `datasets` can read, or a Hub id; of the last two
        the split train, or another one as in `owner/name:validation`.
    columns: the alternatives of columns that the script understands, e.g. [("prompt", "completion"), ("text",)];
        the first one that the rows have counts: it must be text in every row, and the other alternatives are dropped.
    --columns renames columns first.
    """
    file = Path(path)
    try:
        is_file = file.is_file()
    except OSError as error:
        fail(f"{flag} {path:.80}: {error.strerror}")
    if is_file:
        if file.suffix not in FORMATS:
            fail(f"{flag} {path}: unknown kind of file. Understood: {', '.join(FORMATS)}, a folder or a Hub id")
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
        rows = readers.get(file.suffix, _read_with_datasets)(path, flag)
    elif (folder := Path(path.partition(":")[0])).is_dir() or (is_hub_id(path) and folder.suffix not in FORMATS):
        rows = _read_with_datasets(path, flag)
    else:
        fail(f"{flag} {path}: no such file or folder")
    if not rows:
        fail(f"{flag} {path}: no rows in it")
    understood = " or ".join("{" + ", ".join(names) + "}" for names in columns)
    rows = _rename(rows, {name for names in columns for name in names}, flag, path)
    found = ", ".join(map(str, rows[0]))
    _name_special_tokens(rows, flag, path, tokenizer)
    faults = [None] * len(rows)
    for i, row in enumerate(rows):
        try:
            rows[i] = standard_row(row, tokenizer, max_prompt_length)
        except ValueError as error:
            faults[i] = str(error)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            missing = ", ".join(str(name) for name, value in row.items() if value is None)
            faults[i] = f"not the layout that its columns promise ({type(error).__name__}: {error})" + (
                f"; without a value: {missing}" if missing else "")
    _fail_at_first(faults, flag, path)
    wanted = next((names for names in columns if set(names) <= set().union(*rows)), None)
    if wanted is None and "conversation" in rows[0] and "completion" in columns[0]:
        wanted = columns[0]  # and no row has an answer
    if wanted is None:
        talk = next((name for name, value in rows[0].items() if isinstance(value, list) and value and isinstance(
            value[0], dict) and {"role", "from"} & set(value[0])), None)
        give = f"messages={talk}" if talk and "chosen" not in columns[0] else " ".join(
            f"{name}=YOURS" for name in columns[0] if name not in rows[0])
        fail(f"{flag} {path}: found the columns {{{found}}}; understood are {understood}, the same as messages, and "
             f"the layouts in utils/formats.py. Say which columns are these with --columns {give}")
    others = {name for names in columns for name in names} - set(wanted)
    rows = [{name: value for name, value in row.items() if name not in others} for row in rows]
    _fail_at_first([_fault(row, wanted) for row in rows], flag, path)
    check_spelling(rows, flag, path, tokenizer)
    return rows


def _rename(rows, read, flag, path):
    """The rows with the names of --columns. read: the names that the script reads from this file.

    A file has some of the columns and not others, as demonstrations beside pairs. The training data or prompts must
    have all, but for the answers that only another file has.
    """
    found = dict.fromkeys(name for row in rows for name in row) if renamed else {}
    source = {ours: theirs for theirs, ours in renamed.items()}
    used = {theirs: ours for theirs, ours in renamed.items()  # a column is put aside only where another takes its name
            if theirs in found and source.get(theirs, theirs) in found}
    lacks = [theirs for theirs, ours in renamed.items() if theirs not in found and (
        not used or ours in read or ours not in ("completion", "response"))]
    if lacks and flag in ("--train_data", "--prompts"):
        fail(f"--columns {renamed[lacks[0]]}={lacks[0]}: {flag} {path} has no column {lacks[0]!r}. Found: "
             f"{', '.join(map(str, found))}")
    for theirs, ours in used.items():
        if ours in found and ours not in used:
            fail(f"--columns {ours}={theirs}: {flag} {path} has a column {ours!r} already. If you do not need it, give "
                 f"it another name too: --columns {ours}={theirs} other={ours}")
    if used:
        rest = ", ".join(str(name) for name in found if name not in used) or "none"
        same = ", ".join(f"{ours} = {theirs}" for theirs, ours in used.items())
        print0(f"{'--columns':<22}{path}: {same}; the other columns: {rest}")
        rows = [{used.get(name, name): value for name, value in row.items()} for row in rows]
    return rows


def _fail_at_first(faults, flag, path):
    """Fail in one line where rows have faults (None: no fault): the first one, and how many there are."""
    bad = [i for i, fault in enumerate(faults) if fault]
    if bad:
        fail(f"{flag} {path}, row {bad[0] + 1}: {faults[bad[0]]} ({len(bad)} of {len(faults)} rows cannot be used"
             f"{'; this is the first' if len(bad) > 1 else ''})")


def _fault(row, wanted):
    """What no script can use in a row, or None."""
    for name, value in row.items():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            return (f"column {name!r} has half a character (a lone surrogate, {error.object[error.start]!r}) at place "
                    f"{error.start + 1}. Remove it")
    for name in ("chosen_finished", "rejected_finished"):
        if not isinstance(row.get(name), (bool, type(None))):
            return f"column {name!r} must be true or false, found {row[name]!r:.60}"
    for name in wanted:
        if name == "completion" and name not in row and "conversation" in row:
            return "messages: its last message is not the assistant's, so there is no answer to train on"
        if not isinstance(row.get(name), str):
            return (f"column {name!r} must be text, or messages as a list of {{role, content}}; found "
                    f"{row.get(name)!r:.60}")


def _name_special_tokens(rows, flag, path, tokenizer):
    """Say which texts hold what the tokenizer reads as one of its added tokens, and how many begin with BOS.

    A terminator at the end of an answer is where it belongs.
    """
    ends = tokenizer.convert_ids_to_tokens(terminator_ids(tokenizer))
    tokens = {token for token in (*added_tokens(tokenizer), tokenizer.eos_token, tokenizer.pad_token) if token}
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    held, numbers, begin = Counter(), [], 0
    for number, row in enumerate(rows, 1):
        found = Counter()
        for name in TEXTS & set(row):
            is_answer = name in ANSWERS and isinstance(row[name], str)
            for text in _texts(row[name]):
                if adds_bos(tokenizer) and name not in ANSWERS - {"text"} and text.startswith(tokenizer.bos_token):
                    begin, text = begin + 1, text.removeprefix(tokenizer.bos_token)
                while is_answer and (end := next((end for end in ends if text.rstrip().endswith(end)), None)):
                    text = text.rstrip().removesuffix(end)
                found.update(pattern.findall(text))
        if found:
            held, numbers = held + found, numbers + [number]
    if begin:
        print0(f"{'note':<22}{flag} {path}: {begin} texts begin with {tokenizer.bos_token}, which the tokenizer puts "
               "there too. One is kept")
    if held:
        named = ", ".join(f"{token!r} ({times} times)" for token, times in held.most_common(5))
        more = f" and {len(held) - 5} others" if len(held) > 5 else ""
        print0(f"warning: {flag} {path}: {len(numbers)} rows, the first of them row {numbers[0]}, hold text that the "
               f"tokenizer reads as special tokens: {named}{more}")


def _texts(value):
    """The texts in a column, those of messages too."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def _read_jsonl(path, flag):
    rows = []
    for number, line in enumerate(_read_text(path, flag).split("\n"), 1):
        if line.strip():
            rows.append(_parse_json(line, path, flag, number))
            if not isinstance(rows[-1], dict):
                fail(f"{flag} {path}, line {number}: not a JSON object")
    return rows


def _read_json(path, flag):
    text = _read_text(path, flag)
    if not text.lstrip().startswith("["):
        return _read_jsonl(path, flag)
    rows = _parse_json(text, path, flag)
    if not all(isinstance(row, dict) for row in rows):
        fail(f"{flag} {path}: not a list of JSON objects")
    return rows


def _read_csv(path, flag):
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_read_text(path, flag), newline=""), strict=True)
    rows = []
    try:
        twice = [name for name, times in Counter(reader.fieldnames or ()).items() if times > 1]
        if twice:
            fail(f"{flag} {path}, line 1: two columns {twice[0]!r}")
        for row in reader:
            rows.append(row)
            if None in row:
                fail(f"{flag} {path}, line {reader.line_num}: more fields than the first line has. Put text with "
                     'commas between double quotes, and write " within as ""')
    except csv.Error as error:
        fail(f"{flag} {path}: the row that begins in line {reader.line_num + 1} cannot be read as CSV ({error})")
    return rows


def _read_text(path, flag):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        packed = ": it is gzip, unpack it" if Path(path).read_bytes()[:2] == b"\x1f\x8b" else ""
        fail(f"{flag} {path}: not UTF-8 text{packed}")
    except OSError as error:
        fail(f"{flag} {path}: cannot be read ({error.strerror})")


def _parse_json(text, path, flag, line=1):
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        fail(f"{flag} {path}, line {line + error.lineno - 1}: broken JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        fail(f"{flag} {path}, line {line}: cannot be read ({first_line(error)})")


def _each_key_once(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return row


def _read_with_datasets(path, flag):
    """The rows of a .parquet file, or of one split of a folder or a Hub id."""
    import datasets

    datasets.disable_progress_bars()
    try:
        name, _, split = path.partition(":")
        if path.endswith(".parquet"):
            table = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train")
        elif (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(name)
            if split and not isinstance(table, datasets.DatasetDict):
                raise ValueError("it has no splits: leave out what follows the colon")
            table = table[split or "train"] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        fail(f"{flag} {path}: cannot be read ({first_line(error.__cause__ or error)})")
    endings = ("_token", "_token_len", "_token_response_label")  # the paper's sets have ids, 169 KiB a row
    return table.remove_columns([name for name in table.column_names if name.endswith(endings)]).to_list()


def load_held_out(paths, flag, load, columns=()):
    """{name: pairs} of held-out files, each under the name of its file, CNN/DM comparisons under one of their own.

    load: path -> list of pairs, whose last item is the row. columns: names that every row must have.
    """
    names = {path: Path(path).stem for path in paths}
    if len(set(names.values())) < len(names):  # files of one name in several folders
        names = {path: path.replace("/", "_") for path in paths}
    held_out = {}
    for path, name in names.items():
        apart = name if name.endswith("_cnndm") else name + "_cnndm"  # [detail 6] CNN/DM is another distribution
        groups = {name: [], apart: []}
        for pair in load(path):
            missing = set(columns) - set(pair[-1])
            if missing:
                fail(f"--accuracy_by {missing.pop()}: no such column in {flag} {path}. Found: {', '.join(pair[-1])}")
            groups[apart if pair[-1].get("batch") in CNNDM_BATCHES else name].append(pair)
        for group, pairs in groups.items():
            if pairs and group in held_out:
                fail(f"{flag} {path}: its pairs and those of another file would both be called {group}. Rename it")
            if pairs:
                held_out[group] = pairs
    return held_out


class Prompt(NamedTuple):
    """A prompt's token ids and text, and the row of the data set that it comes from, with its other columns."""

    ids: list
    text: str
    row: dict


def load_prompts(path, flag, tokenizer, args, columns=(("prompt",),)):
    """List of Prompts, without the too long ones, which are counted. columns: as of `load_rows`."""
    limit = args.max_prompt_length
    rows = load_rows(path, flag, columns, tokenizer, limit)
    prompts = [Prompt(encode_prompt(row["prompt"], tokenizer), row["prompt"], row) for row in rows]
    kept = [prompt for prompt in prompts if 0 < len(prompt.ids) <= limit]
    empty = sum(not prompt.ids for prompt in prompts)
    describe(flag, path, [len(prompt.ids) for prompt in kept],
             {f"over {limit} tokens": len(prompts) - len(kept) - empty, "empty": empty},
             [len(prompt.ids) for prompt in prompts], "--max_prompt_length")
    return kept


def load_grouped_prompts(path, flag, tokenizer, args):
    """Prompts as of `load_prompts`, and {text: group} from their column `group`, as text; empty without one."""
    prompts = load_prompts(path, flag, tokenizer, args)
    groups = {prompt.text: str(prompt.row["group"]) for prompt in prompts if prompt.row.get("group") is not None}
    return prompts, groups


def distinct_prompts(pairs, max_prompt_length):
    """Prompts as of `load_prompts`: those of dpo.py's held-out pairs, each once, without the too long ones."""
    prompts = list({pair.row["prompt"]: Prompt(pair.prompt, pair.row["prompt"], pair.row) for pair in pairs}.values())
    kept = [prompt for prompt in prompts if len(prompt.ids) <= max_prompt_length]
    describe("--eval_prompts", "none given, so those of the held-out pairs", [len(prompt.ids) for prompt in kept],
             {f"over {max_prompt_length} tokens": len(prompts) - len(kept)},
             [len(prompt.ids) for prompt in prompts], "--max_prompt_length")
    return kept


def as_answer(prompt, text, tokenizer, ended=None):
    """A text that evaluate.py has not sampled, as a row like its samples.

    ended: whether its terminator came, which then counts in the length; None: not known, and it counts too.
    """
    text, _ = split_terminator(prompt, text, tokenizer)
    length = len(encode_texts(prompt, text, tokenizer, ended is not False)[1])
    return {"response": text, "length": max(1, length), "ended": ended, "kl": None}


def read_responses(path, prompts, tokenizer):
    """Rows as of `as_answer` from a file {prompt, response, perhaps ended}, one for each prompt, matched by its text.

    Of an evaluation's own samples.jsonl the references are passed over.
    """
    found, models = {}, set()
    for number, row in enumerate(load_rows(path, "--models", [("prompt", "response")], tokenizer), 1):
        if not isinstance(row.get("ended"), (bool, type(None))):
            fail(f"--models {path}, row {number}: ended must be true, false or null, found {row['ended']!r:.60}")
        if row.get("model") != "references":
            answer = as_answer(row["prompt"], row["response"], tokenizer, row.get("ended"))
            found.setdefault(row["prompt"], []).append(answer)
            models.add(str(row.get("model")))
    if len(models) > 1:
        fail(f"--models {path}: responses of several models ({', '.join(sorted(models))}). Keep those of one")
    for prompt, times in Counter(prompts).items():
        if len(found.get(prompt, ())) < times:
            fail(f"--models {path}: {len(found.get(prompt, ()))} responses to the prompt {prompt!r:.60}, which stands "
                 f"{times} times among the first --num_prompts {len(prompts)}")
    return [found[prompt].pop(0) for prompt in prompts]


def short_names(paths, *taken):
    """{name: path}: the last part of each path, or the whole one where that part names something else too.

    taken: names that no path may have.
    """
    last = [path.rpartition(".")[2] if ":" in path else Path(path).resolve().name for path in paths]
    last = [name.removesuffix(Path(name).suffix) if Path(name).suffix in FORMATS else name for name in last]
    names = [path if [*last, *taken].count(name) > 1 else name for name, path in zip(last, paths)]
    return {str(Path(name).resolve()) if name in taken else name: path for name, path in zip(names, paths)}


def load_function(spec, flag, prompts=None):
    """The function that `module:name` names, or None for None or nothing; the current folder is on the import path.

    prompts: Prompts that a judge will see, to find one that cannot work before anything is written.
    """
    if not spec:
        return None
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        fail(f"{flag} {spec}: write it as module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        fail(f"{flag} {spec}: cannot import it ({first_line(error)}). Write it as module:function")
    if prompts:
        for wanted in _further_parameters(function)[1]:
            lacks = [prompt.row for prompt in prompts if wanted not in prompt.row]
            if lacks:
                fail(f"{flag} {spec}: it takes {wanted!r}, and {len(lacks)} of {len(prompts)} prompts have no such "
                     f"column. The first of these has: {', '.join(lacks[0])}")
        call_judge(function, f"{flag} {spec}", [prompts[0].text] * 2, [" a", " b"], [prompts[0].row] * 2)
    return function


JUDGED = {"queries": "queries", "prompts": "queries", "responses": "responses", "completions": "responses"}


def _further_parameters(function):
    """How to call a judge: (names of parameters for columns, those of them that must be given, whether it takes any
    column, {parameter: "queries" or "responses"}, empty where those are the first two, whatever their names)."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions in C do not tell
        return [], [], False, {}
    bound = getattr(function, "keywords", {})  # of a functools.partial
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    first = [one.name for one in parameters[:2] if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    in_place = [JUDGED.get(name, role) == role for name, role in zip(first, ("queries", "responses"))] == [True, True]
    by_name = {} if in_place else {one.name: JUDGED[one.name] for one in named if one.name in JUDGED}
    taken = set(by_name or first)
    columns = [one for one in named if one.name not in taken and one.name not in bound]
    return ([one.name for one in columns], [one.name for one in columns if one.default is one.empty],
            any(one.kind == one.VAR_KEYWORD for one in parameters), by_name)


def call_judge(function, flag, queries, responses, rows=None):
    """Scores of a Python judge as a list of floats, or one line that names its fault. Every rank must call it.

    queries and responses go to its first two parameters; if these have other names, as in TRL, to those named queries
    or prompts, and responses or completions. rows: the row of each query; its columns go, as lists, to parameters of
    their names, or to **. Whatever the judge gets is its own copy.
    """
    wanted, _, takes_any, by_name = _further_parameters(function)
    rows = rows or [{}] * len(queries)
    present = set().union(*rows)
    names = present & set(wanted) | (present - set(JUDGED) - {"prompt"} if takes_any else set())

    def ask(some):
        texts = {"queries": [queries[i] for i in some], "responses": [responses[i] for i in some]}
        columns = {name: copy.deepcopy([rows[i].get(name) for i in some]) for name in sorted(names)}
        if by_name:
            return list(function(**{name: texts[which] for name, which in by_name.items()}, **columns))
        return list(function(texts["queries"], texts["responses"], **columns))

    def fails_alone(i):
        try:
            return len([float(score) for score in ask([i])]) != 1
        except Exception:
            return True

    scores, wrong, row = [], None, None
    try:
        found = ask(range(len(queries))) if queries else []
        if len(found) != len(queries):
            wrong = f"it returned {len(found)} scores for {len(queries)} responses"
        else:
            for row, score in enumerate(found):
                scores.append(float(score))
                if not math.isfinite(scores[row]):
                    wrong = f"it returned {scores[row]}"
                    break
    except Exception as error:
        wrong = f"it failed ({type(error).__name__}: {first_line(error)})"
    if wrong and row is None:
        row = next((i for i in range(len(queries)) if fails_alone(i)), None)
    where = "" if row is None else f" on query {queries[row]!r:.60}, response {responses[row]!r:.60}"
    fail_together(wrong and f"{flag}: {wrong}{where}")
    return scores


def permutation(size, *address):
    """A permutation of range(size) that depends on the address (seed, epoch, ...) alone."""
    return np.random.default_rng(address).permutation(size).tolist()


def rows_of_this_rank(rows):
    """Every world-th row from this rank's number on; None where the share is shorter than the longest one.

    The Nones become rows that count for nothing, so that every rank runs the same number of micro-batches.
    """
    longest = -(-len(rows) // world_size())
    mine = list(rows[rank() :: world_size()])
    return mine + [None] * (longest - len(mine))


def over_ranks(function, items, size_of, batch_size, what, even=False):
    """Results of `function`, which takes a list and returns one as long, for all items in their order.

    The ranks share the items; like sizes are in one batch; a line on the progress comes every half minute. even: all
    ranks call the function equally often, as a model in pieces (ZeRO 3) needs it, with None for an item at the end.
    """
    order = sorted(range(len(items)), key=lambda i: size_of(items[i]))
    mine = [i for i in rows_of_this_rank(order) if even or i is not None]
    found, began = [], time.time()
    printed = began
    for some in chunks(mine, batch_size):
        found += function([None if i is None else items[i] for i in some])
        if time.time() - printed > 30:
            printed, left = time.time(), int((time.time() - began) / len(found) * (len(mine) - len(found)))
            print0(f"{what:<22}{len(found):,}/{len(mine):,}  left {left // 60}:{left % 60:02d}")
    return [result for _, result in sorted(zip(order, gather_rows(found)), key=lambda pair: pair[0])]


def running_moments(moments, values):
    """(count, mean, sd) of all values so far: those before, and values (B,) of every rank (Chan et al. 1979)."""
    count, mean, sd = moments
    values = values.double()
    size, total = all_sum(torch.stack([torch.ones_like(values).sum(), values.sum()])).tolist()
    squares = float(all_sum(((values - total / size) ** 2).sum())) + sd**2 * (count - 1) * (count > 0)
    squares += (total / size - mean) ** 2 * count * size / (count + size)
    mean = (count * mean + total) / (count + size)
    return count + size, mean, (squares / max(count + size - 1, 1)) ** 0.5


def deal_by_length(prompts, responses, pad_id, micro_batch_size):
    """Deal the episodes of all ranks anew [E28]. Returns prompts and responses of this rank, as many as before.

    prompts: the Prompt of each row; responses (B, Tr) with PAD after EOS. The ranks take turns at taking a
    micro-batch from the longest rows left, from the first rank to the last and then back. So all have about the same
    work. The paper's ranks keep what they sampled, and pad every row to the longest that may come.
    """
    lengths, device = (responses != pad_id).sum(1).tolist(), responses.device
    everyones = gather_rows(zip(prompts, responses.tolist(), lengths))
    sizes = [len(prompt[0]) + length for prompt, _, length in everyones]
    by_length, mine = sorted(range(len(sizes)), key=lambda i: -sizes[i]), []
    share = len(sizes) // world_size()
    for turn, start in enumerate(range(0, share, micro_batch_size)):
        size = min(micro_batch_size, share - start)
        place = rank() if turn % 2 == 0 else world_size() - 1 - rank()
        mine += by_length[start * world_size() + place * size :][:size]
    prompts, responses, _ = zip(*(everyones[i] for i in sorted(mine)))
    return prompts, torch.tensor(responses, device=device)


def chunks(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def pad(sequences, pad_id, side, device=None):
    """Token ids of unequal lengths as one tensor: ids (B, T), and mask (B, T) bool, True at real tokens."""
    width = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[i, where] = torch.tensor(sequence, dtype=torch.long)
        mask[i, where] = True
    return ids.to(device), mask.to(device)


def describe(name, path, lengths, dropped, needed, limit="--max_length"):
    """Say what was read: rows kept, rows dropped by reason, token lengths.

    needed: tokens of the rows, with those that are over the limit, which the flag `limit` sets.
    """
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none"
    too_long = sum(count for reason, count in dropped.items() if reason.startswith("over "))
    if not lengths:
        remedy = "" if not too_long else (
            f". The shortest row has {min(needed)} tokens, the longest {max(needed)}: raise {limit}")
        fail(f"{name} {path}: no row is left (dropped: {reasons}){remedy}")
    if 2 * too_long >= len(needed):
        print0(f"warning: {name} {path}: {too_long:,} of {len(needed):,} rows are too long and left out. {limit} "
               f"{math.ceil(np.percentile(needed, 95))} would keep 95 % of them, {limit} {max(needed)} all")
    median, p95 = np.percentile(lengths, [50, 95])
    print0(f"{name:<22}{path}: {len(lengths):,} rows (dropped: {reasons}); "
           f"tokens: median {median:.0f}, 95 % {p95:.0f}, longest {max(lengths)}")
