"""Odd and hostile data files: each ends in rows that are as they were, the dropped ones counted, or in one line that says
where the fault is. Never in a traceback, a hang, or a silent change.

`python tests/test_hostile.py` prints the table of all files with what came of each.
"""

import gzip
import io
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import group_invariant_ppo
import ppo
import reward_model
import sft
from utils.data import load_prompts

ROWS = [{"prompt": "She was", "completion": " happy.", "chosen": " happy.", "rejected": " tired."},
        {"prompt": "He had", "completion": " a house.", "chosen": " friends.", "rejected": " no, none"},
        {"prompt": "It is", "completion": " so;\nshe knew.", "chosen": " true.", "rejected": " not true."}]
TEMPLATE = ("{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('a second system message')"
            " }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
SYSTEM, USER, ANSWER = ({"role": role, "content": "hello"} for role in ("system", "user", "assistant"))


def jsonl(*lines):
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode("utf-8")


def second(**changes):
    """Three rows, the second one changed."""
    return jsonl(ROWS[0], {**ROWS[1], **changes}, ROWS[2])


def parquet(columns):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


PROMPTS = parquet({"prompt": ["She was", "He had", "It is"]})
CSV = b'prompt,completion\nShe was,happy\n"He had, then","a ""house"""\nIt is,"so;\r\nshe knew"\n'
# name: (file name, content, kept rows or None where it is refused, words of the message or of the output[, loader])
FILES = {
    "good": ("a.jsonl", jsonl(*ROWS), 3, []),
    # JSON
    "an object without its end": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "He had"', ROWS[2]), None, ["line 2", "broken JSON"]),
    "a comma too many": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "He had",}'), None, ["line 2", "broken JSON"]),
    "single quotes": ("a.jsonl", jsonl(ROWS[0], "{'prompt': 'He had'}"), None, ["line 2", "broken JSON"]),
    "a key without quotes": ("a.jsonl", jsonl("{prompt: 1}"), None, ["line 1", "broken JSON"]),
    "last line cut off": ("a.jsonl", jsonl(*ROWS)[:-20], None, ["line 3", "broken JSON"]),
    "NUL bytes after the end": ("a.jsonl", jsonl(*ROWS) + b"\0" * 50, None, ["line 4", "broken JSON"]),
    "a NUL byte in a text": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "He\0had"}'), None, ["line 2", "control character"]),
    "a newline in a text": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "He\nhad"}'), None, ["line 2", "broken JSON"]),
    "a tab in a text": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "He\thad"}'), None, ["line 2", "control character"]),
    "an escaped NUL": ("a.jsonl", second(prompt="He\0had"), 3, []),
    "two objects in a line": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "a"} {"prompt": "b"}'), None, ["line 2", "Extra data"]),
    "a comment": ("a.jsonl", jsonl(ROWS[0], "// the second", ROWS[1]), None, ["line 2", "broken JSON"]),
    "a list in .jsonl": ("a.jsonl", json.dumps(ROWS).encode(), None, ["line 1", "not a JSON object"]),
    "a string for a row": ("a.jsonl", jsonl(ROWS[0], '"He had"'), None, ["line 2", "not a JSON object"]),
    "a number for a row": ("a.jsonl", jsonl(ROWS[0], "7"), None, ["line 2", "not a JSON object"]),
    "null for a row": ("a.jsonl", jsonl(ROWS[0], "null"), None, ["line 2", "not a JSON object"]),
    "a key twice": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "a", "prompt": "b"}'), None, ["line 2", "'prompt'", "twice"]),
    "100,000 brackets": ("a.jsonl", jsonl(ROWS[0], '{"prompt": ' + "[" * 100_000), None, ["line 2"]),
    "a number of 10,000 digits": ("a.jsonl", jsonl(ROWS[0], '{"prompt": ' + "7" * 10_000 + "}"), None, ["line 2"]),
    "NaN for a text": ("a.jsonl", second(prompt=float("nan")), None, ["row 2", "must be text", "nan"]),
    "a .json list": ("a.json", json.dumps(ROWS).encode(), 3, []),
    "a .json list, broken": ("a.json", json.dumps(ROWS, indent=1).encode()[:-90], None, ["line", "broken JSON"]),
    "a .json object around the rows": ("a.json", json.dumps({"data": ROWS}).encode(), None, ["columns {data}"]),
    "a .json list of strings": ("a.json", b'["She was"]', None, ["not a list of JSON objects"]),
    # bytes
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + jsonl(*ROWS), 3, []),
    "a byte order mark inside": ("a.jsonl", jsonl(ROWS[0]) + b"\xef\xbb\xbf" + jsonl(ROWS[1]), None, ["line 2", "broken JSON"]),
    "CRLF": ("a.jsonl", jsonl(*ROWS).replace(b"\n", b"\r\n"), 3, []),
    "CR alone": ("a.jsonl", jsonl(*ROWS).replace(b"\n", b"\r"), None, ["line 1", "Extra data"]),
    "blank lines": ("a.jsonl", jsonl("", ROWS[0], "  ", ROWS[1], ROWS[2], ""), 3, []),
    "UTF-16": ("a.jsonl", jsonl(*ROWS).decode().encode("utf-16"), None, ["not UTF-8"]),
    "Latin-1": ("a.jsonl", '{"prompt": "na\u00efve"}\n'.encode("latin-1"), None, ["not UTF-8"]),
    "gzip": ("a.jsonl", gzip.compress(jsonl(*ROWS)), None, ["not UTF-8", "gzip, unpack it"]),
    "Parquet named .jsonl": ("a.jsonl", PROMPTS, None, ["a.jsonl"]),
    "random bytes": ("a.jsonl", bytes(range(256)) * 9, None, ["not UTF-8"]),
    "no byte": ("a.jsonl", b"", None, ["no rows"]),
    "newlines alone": ("a.jsonl", b"\n \n", None, ["no rows"]),
    "an unknown ending": ("a.txt", jsonl(*ROWS), None, ["unknown kind of file", ".jsonl"]),
    # CSV
    "CSV with commas, quotes and a line break": ("a.csv", CSV, 3, []),
    "CSV, a quote left open": ("a.csv", b'prompt\nShe was\n"He had\nIt is\n', None, ["line 3", "CSV"]),
    "CSV, text after a quote": ("a.csv", b'prompt\n"She" was\n', None, ["line 2", "CSV"]),
    "CSV, a field too many": ("a.csv", b"prompt,completion\nShe was,happy\nHe had,a,house\n", None, ["line 3", "more fields"]),
    "CSV, a field too few": ("a.csv", b"completion,prompt\nhappy,She was\na house\n", None, ["row 2", "'prompt'", "None"]),
    "CSV, a column twice": ("a.csv", b"prompt,prompt\na,b\n", None, ["two columns 'prompt'"]),
    "CSV, a header alone": ("a.csv", b"prompt\n", None, ["no rows"]),
    "CSV with semicolons": ("a.csv", b"prompt;completion\nShe was;happy\n", None, ["{prompt;completion}"]),
    "CSV without a header": ("a.csv", b"She was\nHe had\n", None, ["{She was}"]),
    "CSV, blank lines": ("a.csv", b"prompt\nShe was\n\nHe had\n", 2, []),
    # Parquet
    "Parquet": ("a.parquet", PROMPTS, 3, []),
    "half a Parquet file": ("a.parquet", PROMPTS[: len(PROMPTS) // 2], None, ["cannot be read"]),
    "Parquet without a byte": ("a.parquet", b"", None, ["cannot be read"]),
    "Parquet whose name is a pattern": ("a[1].parquet", PROMPTS, 3, []),
    "JSON named .parquet": ("a.parquet", jsonl(*ROWS), None, ["cannot be read"]),
    "Parquet without rows": ("a.parquet", parquet({"prompt": pyarrow.array([], pyarrow.string())}), None, ["a.parquet"]),
    "Parquet with numbers": ("a.parquet", parquet({"prompt": [1, 2, 3]}), None, ["row 1", "must be text"]),
    "Parquet with a null": ("a.parquet", parquet({"prompt": ["a", None]}), None, ["row 2", "must be text", "None"]),
    # columns and values
    "one row": ("a.jsonl", jsonl(ROWS[0]), 1, []),
    "a number": ("a.jsonl", second(prompt=7), None, ["row 2", "'prompt'", "7"]),
    "null": ("a.jsonl", second(prompt=None), None, ["row 2", "'prompt'", "None"]),
    "true": ("a.jsonl", second(prompt=True), None, ["row 2", "'prompt'", "True"]),
    "an object": ("a.jsonl", second(prompt={"text": "He had"}), None, ["row 2", "'prompt'"]),
    "a list of texts": ("a.jsonl", second(prompt=["He had"]), None, ["row 2"]),
    "nested lists": ("a.jsonl", second(prompt=[[["He had"]]]), None, ["row 2"]),
    "an empty list": ("a.jsonl", second(prompt=[]), None, ["row 2"]),
    "a column missing in one row": ("a.jsonl", jsonl(ROWS[0], {"completion": "a"}), None, ["row 2", "'prompt'"]),
    "a capital in the column's name": ("a.jsonl", jsonl({"Prompt": "She was"}), None, ["{Prompt}", "{prompt}"]),
    "a space in the column's name": ("a.jsonl", jsonl({"prompt ": "She was"}), None, ["{prompt }"]),
    "a response where prompts are read": ("a.jsonl", jsonl({"response": "She was"}), None, ["{response}", "{prompt}"]),
    "an object without a key": ("a.jsonl", jsonl({}), None, ["{}", "{prompt}"]),
    "an empty text": ("a.jsonl", second(prompt=""), 2, ["1 empty"]),
    "empty texts alone": ("a.jsonl", jsonl({"prompt": ""}, {"prompt": ""}), None, ["no row is left", "2 empty"]),
    "blanks": ("a.jsonl", second(prompt="  \t "), 3, []),
    "a line of 2 MB": ("a.jsonl", second(prompt="She was " * 250_000), 2, ["1 over 32 tokens"]),
    "a word of 2 MB": ("a.jsonl", second(prompt="a" * 2_000_000), 2, ["1 over 32 tokens"]),
    "long texts alone": ("a.jsonl", jsonl({"prompt": "She was " * 99}), None, ["no row is left", "1 over 32 tokens"]),
    "half a surrogate pair": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "He \\ud83d had"}'), None, ["row 2", "half a character"]),
    "a surrogate pair": ("a.jsonl", jsonl(ROWS[0], '{"prompt": "He \\ud83d\\ude00 had"}'), 2, []),
    "emoji": ("a.jsonl", second(prompt="\U0001f468\u200d\U0001f469\u200d\U0001f467"), 3, []),
    "right to left": ("a.jsonl", second(prompt="\u202e\u05e9\u05dc\u05d5\u05dd\u202c \u0645\u0631\u062d\u0628\u0627"), 3, []),
    "line separators in a text": ("a.jsonl", '{"prompt": "a\u2028b\u0085c"}\n'.encode(), 1, []),
    "combining marks": ("a.jsonl", second(prompt="Z\u0351\u036b\u0343a\u0325"), 3, []),
    "the text of EOS in a prompt": ("a.jsonl", second(prompt="He<|endoftext|> had"), 3, ["warning", "1 rows", "row 2"]),
    "the text of PAD in a prompt": ("a.jsonl", second(prompt="He[PAD] had"), 3, ["warning", "1 rows", "row 2"]),
    "HTML and markdown": ("a.jsonl", second(prompt="<script>a|b</script>"), 3, []),
    "words that look like missing values": ("a.csv", b"prompt\nnull\nNaN\nNone\n", 3, []),
    # pairs and demonstrations
    "chosen equal to rejected": ("a.jsonl", second(chosen="a", rejected="a"), 2, ["1 chosen equal to rejected"], "pairs"),
    "pairs that are all equal": ("a.jsonl", jsonl({"prompt": "a", "chosen": "b", "rejected": "b"}), None, ["no row is left"], "pairs"),
    "a number chosen": ("a.jsonl", second(chosen=7), None, ["row 2", "'chosen'"], "pairs"),
    "demonstrations for pairs": ("a.jsonl", jsonl({"prompt": "a", "completion": "b"}), None, ["{prompt, completion}"], "pairs"),
    "an empty completion": ("a.jsonl", second(completion=""), 2, ["1 empty"], "demonstrations"),
    "a completion that is EOS": ("a.jsonl", second(completion="<|endoftext|>"), 2, ["1 empty"], "demonstrations"),
    "EOS at the end of a completion": ("a.jsonl", second(completion=" a house.<|endoftext|>"), 3, [], "demonstrations"),
    "EOS inside a completion": ("a.jsonl", second(completion=" a<|endoftext|> b"), 3, ["warning", "row 2"], "demonstrations"),
    "messages": ("a.jsonl", jsonl({"messages": [SYSTEM, USER, ANSWER]}), 1, [], "demonstrations"),
    "two system messages": ("a.jsonl", jsonl({"messages": [SYSTEM, SYSTEM, USER, ANSWER]}), None, ["row 1", "second system"],
                            "demonstrations"),
    "messages without an answer": ("a.jsonl", jsonl({"messages": [SYSTEM, USER]}), None, ["row 1", "assistant"], "demonstrations"),
    "no message": ("a.jsonl", jsonl({"messages": []}), None, ["row 1"], "demonstrations"),
    "a message without a role": ("a.jsonl", jsonl({"messages": [{"content": "a"}, ANSWER]}), None, ["row 1"], "demonstrations"),
    "a message that is a text": ("a.jsonl", jsonl({"messages": ["a", "b"]}), None, ["row 1"], "demonstrations"),
    "TL;DR without its post": ("a.jsonl", jsonl({"subreddit": "a", "title": "b", "post": None}), None, ["row 1", "post"]),
    "a comparison of one": ("a.jsonl", jsonl({"info": {"post": "a"}, "summaries": [], "choice": 0}), None, ["row 1"], "pairs"),
}


def tokenizer():
    found = AutoTokenizer.from_pretrained(ROOT / "assets" / "base")
    found.chat_template = TEMPLATE
    return found


def read(path, loader, words):
    """(rows or None, what was printed) of a file; a failure must be one line on stderr."""
    out, err, rows = io.StringIO(), io.StringIO(), None
    args = {"prompts": ppo.Args(), "pairs": reward_model.Args(), "demonstrations": sft.Args()}[loader]
    load = {"prompts": load_prompts, "pairs": reward_model.load_pairs, "demonstrations": sft.load_demonstrations}[loader]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            rows = load(str(path), "--data", words, args)
        except SystemExit as stopped:
            assert stopped.code == 1
    printed = out.getvalue() + err.getvalue()
    if rows is None:
        assert err.getvalue().startswith(f"error: --data {path}") and err.getvalue().count("\n") == 1, printed
    return rows, printed


@pytest.fixture(scope="session")
def words():
    return tokenizer()


@pytest.mark.parametrize("name", FILES)
def test_odd_file_is_read_or_refused_in_one_line(name, words, tmp_path):
    """Kept rows are as many as expected, or the line names the place; and it takes less than 20 seconds of work."""
    file, content, kept, said, *loader = FILES[name]
    path, began = tmp_path / file, time.process_time()
    path.write_bytes(content)
    rows, printed = read(path, *(loader or ["prompts"]), words)
    assert (None if rows is None else len(rows)) == kept, printed
    assert all(word in printed for word in said), printed
    assert ("warning" in printed) == ("warning" in said)
    assert time.process_time() - began < 20


def test_there_are_enough_odd_files():
    assert len(FILES) >= 60 and sum(expected is None for _, _, expected, *_ in FILES.values()) >= 40


def test_texts_are_not_changed(words, tmp_path):
    """What is kept is the text of the file: line breaks of every kind, quotes, emoji, marks, and 'null' in CSV."""
    for name in ("CSV with commas, quotes and a line break", "emoji", "right to left", "combining marks", "an escaped NUL",
                 "line separators in a text", "blanks", "a surrogate pair", "words that look like missing values"):
        file, content, *_ = FILES[name]
        (tmp_path / file).write_bytes(content)
        rows, _ = read(tmp_path / file, "prompts", words)
        expected = (["She was", "He had, then", "It is"] if name.startswith("CSV") else ["null", "NaN", "None"]
                    if file == "a.csv" else [json.loads(line)["prompt"] for line in content.decode().split("\n") if line])
        assert [text for _, text, _ in rows] == expected
        assert [words.decode(ids) for ids, _, _ in rows] == expected
    (tmp_path / "a.csv").write_bytes(CSV)
    rows, _ = read(tmp_path / "a.csv", "demonstrations", words)
    assert [row["completion"] for _, _, row in rows] == ["happy", 'a "house"', "so;\r\nshe knew"]


# ---- Anything at all --------------------------------------------------------------------------------------

MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6)
COLUMNS = st.sampled_from(["prompt", "completion", "chosen", "rejected", "text", "messages", "query", "info", "summaries",
                           "choice", "subreddit", "title", "post", "extra", "reference_response", "tools"]) | st.text()


@MANY
@given(content=st.binary(max_size=200), ending=st.sampled_from(["jsonl", "json", "csv"]))
def test_any_bytes_end_in_rows_or_one_line(content, ending, words, tmp_path):
    (tmp_path / f"a.{ending}").write_bytes(content)
    read(tmp_path / f"a.{ending}", "prompts", words)


@MANY
@given(rows=st.lists(st.dictionaries(COLUMNS, VALUES, max_size=5), min_size=1, max_size=3),
       loader=st.sampled_from(["prompts", "pairs", "demonstrations"]))
def test_any_json_ends_in_rows_or_one_line(rows, loader, words, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    read(tmp_path / "a.jsonl", loader, words)


@MANY
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=3))
def test_any_text_is_kept_as_it_is(texts, words, tmp_path):
    """Every text is kept, or counted as too long; with the same characters, which its tokens give back."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"prompt": text} for text in texts)))
    rows, printed = read(tmp_path / "a.jsonl", "prompts", words)
    short = [text for text in texts if len(words(text).input_ids) <= 32]
    assert [text for _, text, _ in rows or []] == short
    assert [words.decode(ids) for ids, _, _ in rows or []] == short
    assert rows is None or len(short) == len(texts) or f"{len(texts) - len(short)} over 32 tokens" in printed


# ---- Whole runs -------------------------------------------------------------------------------------------

ODD = [{"prompt": prompt, "completion": f" {prompt}.", "chosen": f" {prompt}!", "rejected": " no"} for prompt in (
    "He<|endoftext|> had", "He[PAD] had", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u202e\u05e9\u05dc\u05d5\u05dd", "a\u2028b|<b>",
    "  ", "../../outside", "\0")]
GROUPS = [None, 7, 7.5, True, "", "a\u2028b|<b>", ["a"], {"b": 1}]  # of these prompts, for group_invariant_ppo.py


@pytest.mark.parametrize("script", [sft, reward_model, ppo, group_invariant_ppo], ids=lambda script: script.__name__)
def test_odd_texts_train_and_stay_in_the_folder(script, tmp_path):
    """A run on such texts ends well, writes nothing outside its folder, and TensorBoard's tables have no HTML of theirs."""
    data, folder = tmp_path / "odd.jsonl", tmp_path / "run"
    data.write_bytes(jsonl(*(row | {"group": group} for row, group in zip(ODD, GROUPS))))
    common = dict(output_dir=str(folder), batch_size=4, micro_batch_size=4)
    path = str(data)
    rollouts = dict(prompts=path, eval_prompts=path, total_episodes=8, response_length=4, num_eval_prompts=8,
                    gold_function=None, **common)
    script.main({
        sft: lambda: sft.Args(model="assets/base", train_data=path, eval_data=path, epochs=1, response_length=4, **common),
        reward_model: lambda: reward_model.Args(train_data=path, eval_data=(path,), demonstrations=path, **common),
        ppo: lambda: ppo.Args(**rollouts),
        group_invariant_ppo: lambda: group_invariant_ppo.Args(episodes_per_prompt=2, **rollouts)}[script]())
    assert sorted(os.listdir(tmp_path)) == ["odd.jsonl", "run"] and (folder / "summary.json").is_file()
    rows = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert {row["query"] for row in rows} >= {ODD[0]["prompt"], ODD[4]["prompt"]}
    shown = b"".join(file.read_bytes() for file in (folder / "tensorboard").iterdir())
    assert b"<b>" not in shown and b"&#124;&#60;b>" in shown
    aucs = [row["groups/auc"] for row in map(json.loads, open(folder / "metrics.jsonl")) if "groups/auc" in row]
    assert len(aucs) == 2 * (script is group_invariant_ppo) and all(0 <= auc <= 1 for auc in aucs)


if __name__ == "__main__":  # the table for records/
    reader = tokenizer()
    sys.stdout.write("| file | what came of it |\n|-|-|\n")
    for title, (file_name, data, _, _, *kind) in FILES.items():
        with tempfile.TemporaryDirectory() as parent:
            where = Path(parent, file_name)
            where.write_bytes(data)
            found, said = read(where, *(kind or ["prompts"]), reader)
            line = next((part for part in said.splitlines() if "warning" in part or found is None), said.splitlines()[-1])
            line = line.replace(str(where), file_name).replace("|", "\\|")
            sys.stdout.write(f"| {title} | {'read' if found is not None else 'refused'}: {line} |\n")
