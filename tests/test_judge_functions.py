"""Python judges: what they get, and what they cannot change. And the rows of a run: recorded, and the same on resume."""

import functools
import json
from datetime import datetime
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_tokens import ANSWER, QUESTION, TEMPLATES, chat_tokenizer
from whole import embedded_rows, write_rows

import dpo
import group_invariant_ppo
import ppo
import reward_model
import sft
from utils import formats
from utils.data import call_judge, load_function, load_prompts
from utils.models import load_tokenizer
from utils.run import choose_folder, hashes, open_folder

# ---- What a judge gets ------------------------------------------------------------------------------------

ROWS = [{"prompt": "a", "reference": "one", "votes": [1, 2]}, {"prompt": "b", "reference": "two", "votes": [3]}]


def asked(function):
    return call_judge(function, "--reward_function", ("a", "b"), ["x", "y"], ROWS)


def test_a_judge_gets_the_columns_that_it_has_parameters_for():
    """By name, by name alone, with a default, or all of them with **; a judge of texts gets texts."""
    def by_name(queries, responses, reference):
        return [len(queries + responses + reference)] * 2

    def by_keyword(queries, responses, *, votes, absent=7):
        return [sum(some) + absent for some in votes]

    def everything(queries, responses, **columns):
        assert columns == {"reference": ["one", "two"], "votes": [[1, 2], [3]]}
        return [0, 1]

    assert asked(by_name) == [6.0, 6.0] and asked(by_keyword) == [10.0, 10.0] and asked(everything) == [0.0, 1.0]
    assert asked(lambda completions, prompts, reference: [len(x + y) for x, y in zip(completions, reference)]) == [4, 4]
    assert asked(lambda completions, **rest: [float(rest["votes"] == [[1, 2], [3]])] * 2) == [1.0, 1.0]  # as TRL calls it
    assert asked(functools.partial(by_name, reference=[])) == [4.0, 4.0]  # what is bound stays
    assert asked(lambda texts, votes: [len(votes)] * 2) == [2.0, 2.0]  # the first two, whatever their names
    assert asked(lambda queries, responses: [type(queries) is list and type(responses) is list] * 2) == [1.0, 1.0]


def test_a_judge_cannot_change_what_the_run_goes_on_with():
    """It gets lists of its own, also of the columns, and may empty them."""
    responses, rows = ["x", "y"], [{"votes": [1]}, {"votes": [2]}]

    def greedy(queries, responses, votes):
        queries.clear(), responses.clear(), [some.clear() for some in votes]
        return [1, 2]

    assert call_judge(greedy, "--reward_function", ("a", "b"), responses, rows) == [1.0, 2.0]
    assert responses == ["x", "y"] and rows == [{"votes": [1]}, {"votes": [2]}]


def test_a_judge_that_wants_an_absent_column_is_refused_at_once(monkeypatch, tmp_path, capsys):
    """The line names the parameter, and the columns that there are."""
    (tmp_path / "own_judges.py").write_text("def score(queries, responses, truth):\n    return [0] * len(queries)\n")
    monkeypatch.syspath_prepend(tmp_path)
    prompt = SimpleNamespace(text="a", row={"prompt": "a", "reference": "b"})
    with pytest.raises(SystemExit):
        load_function("own_judges:score", "--reward_function", [prompt])
    error = capsys.readouterr().err
    assert "'truth'" in error and "prompt, reference" in error and error.count("\n") == 1
    prompt.row["truth"] = "c"
    assert load_function("own_judges:score", "--reward_function", [prompt])(["q"], ["r"], "t") == [0]


def test_with_messages_a_judge_sees_the_conversation(tmp_path):
    """The last user turn and all turns before the answer arrive as columns, beside the rendered query."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [QUESTION, ANSWER], "topic": "t"}])
    (prompt,) = load_prompts(path, "--prompts", tokenizer, SimpleNamespace(max_prompt_length=99))

    def judge(queries, responses, conversation, last_user_turn, topic):
        assert (conversation, last_user_turn, topic) == ([[QUESTION]], [QUESTION["content"]], ["t"])
        assert queries[0].startswith("<|im_start|>user\n")
        return [4.0]

    assert call_judge(judge, "--reward_function", [prompt.text], [" Yes."], [prompt.row]) == [4.0]


JUDGES = """
seen = []

def follows(queries, responses, number):
    seen.append((list(queries), list(number)))
    assert all(query.endswith(str(n)) for query, n in zip(queries, number))
    return [len(response) / 10 for response in responses]
"""


@pytest.mark.parametrize("script", [ppo, group_invariant_ppo], ids=["ppo", "group_invariant_ppo"])
def test_columns_stay_with_their_prompts_through_a_run(script, tmp_path, monkeypatch):
    """Sampled, dealt anew and evaluated, each response is judged with its own row's column, as reward and as gold."""
    (tmp_path / "own_judges2.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    rows = [{"prompt": "She" * (1 + n % 3) + f" {n}", "number": n, "group": n % 2} for n in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    script.main(script.Args(
        prompts=path, eval_prompts=path, reward_function="own_judges2:follows", gold_function="own_judges2:follows",
        total_episodes=8, batch_size=8, micro_batch_size=4, num_ppo_epochs=1, response_length=3, lr=1e-4, critic_lr=1e-4,
        output_dir=str(tmp_path / "out")))
    import own_judges2

    assert {len(queries) for queries, _ in own_judges2.seen} == {2, 8, 12}  # a trial, an update, an evaluation
    assert len(own_judges2.seen) == 2 + 2 * (1 + 2)
    own_judges2.seen.clear()


# ---- What a run reads -------------------------------------------------------------------------------------


def test_a_resumed_run_reads_the_same_rows_on_the_same_date(tmp_path, monkeypatch, capsys):
    """args.json keeps a hash of the rows and the templates' date; other rows are refused by flag, the date comes back."""
    monkeypatch.setattr(formats, "template_date", formats.template_date)
    args, began = ppo.Args(output_dir=str(tmp_path / "run")), None
    rows = {"--prompts": [([1, 2], "a", {})], "--eval_prompts": [([3], "b", {})]}
    open_folder(choose_folder(args, "ppo"), args, "ppo", rows)
    began = formats.template_date[0]
    record = json.loads((tmp_path / "run/args.json").read_text())
    assert record["template_date"] == began.isoformat("T", "seconds") and set(record["data"]) == set(rows)
    assert len(set(record["data"].values())) == 2
    formats.template_date[0], args.resume = datetime(2001, 1, 1), True
    open_folder(choose_folder(args, "ppo"), args, "ppo", rows)
    assert formats.template_date[0] == began
    for changed in ([([1, 7], "a", {})], [([1, 2], "a", {"reference": "b"})], []):
        with pytest.raises(SystemExit):
            open_folder(choose_folder(args, "ppo"), args, "ppo", {**rows, "--prompts": changed})
        error = capsys.readouterr().err
        assert "rows of --prompts assets/data/train.jsonl are not those" in error and error.count("\n") == 1


@pytest.mark.parametrize("script, flag", [(sft, "model"), (ppo, "sft_model"), (dpo, "model")], ids=["sft", "ppo", "dpo"])
def test_a_models_date_is_handed_on(script, flag, tmp_path, monkeypatch):
    """A run whose model was trained by a run with a date in its prompts has the same date."""
    monkeypatch.setattr(formats, "template_date", formats.template_date)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/args.json").write_text('{"template_date": "2024-07-26T00:00:00"}')
    choose_folder(script.Args(output_dir=str(tmp_path / "run"), **{flag: str(tmp_path / "model")}), script.__name__)
    assert formats.template_date == [datetime(2024, 7, 26)]


def test_the_order_of_columns_is_not_part_of_the_rows():
    assert hashes({"a": [([1], {"x": 1, "y": 2})]}) == hashes({"a": [([1], {"y": 2, "x": 1})]})
    assert hashes({"a": [[1], [2]]}) != hashes({"a": [[2], [1]]})


FLAGS = {sft: {"train_data": "train", "eval_data": "validation"},
         reward_model: {"train_data": "preferences_train", "eval_data": "preferences_validation", "demonstrations": "train"},
         ppo: {"prompts": "train", "eval_prompts": "validation"},
         group_invariant_ppo: {"prompts": "train", "eval_prompts": "validation"},
         dpo: {"train_data": "preferences_train", "eval_data": "preferences_validation", "eval_prompts": "validation"}}


class Stop(Exception):
    pass


@pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)
def test_every_script_records_all_rows_that_it_reads(script, tmp_path, monkeypatch):
    """Each file that holds rows is under its flag, with token ids: [([ids], ...)], or {name: such} for several files."""
    tokenizer = load_tokenizer(str(ROOT / "assets/sft"), "--model")
    found, files = {}, {}
    for flag, name in FLAGS[script].items():
        file = write_rows(tmp_path / f"{flag}.jsonl", embedded_rows(name, 0, 30))
        files[flag] = (file,) if flag == "eval_data" and script is not sft else file

    def stop(folder, args, name, data):
        found.update(data)
        raise Stop

    monkeypatch.setattr(script, "open_folder", stop)
    with pytest.raises(Stop):
        script.main(script.Args(output_dir=str(tmp_path / "out"), **files))
    assert set(found) == {f"--{flag}" for flag in FLAGS[script]}
    for rows in found.values():
        first = next(iter(rows.values())) if isinstance(rows, dict) else rows
        ids = first[0] if isinstance(first[0][0], int) else first[0][0]
        assert len(first) > 10 and tokenizer.decode(ids)
