"""Data in the layouts as published: exact template and truncation, one leading space, one EOS, the right columns."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT, tiny_config
from tokenizers.processors import TemplateProcessing
from transformers import GPTNeoXForCausalLM

import ppo
import reward_model
import sft
from utils.data import load_rows
from utils.formats import TLDR, fit_query, standard_row
from utils.models import load_tokenizer

EOS = "<|endoftext|>"
SENTENCES = ["She had a cat and it sat on the mat.", "I was so tired of it that I left the house.", "What do I do now?"]
POST = "\n".join(SENTENCES)
TLDR_ROW = {"id": "t3_1hxu8s", "subreddit": "relationships", "title": "I [24 M] had a cat", "post": POST,
            "summary": "I left the house because of a cat."}
QUERY = ("SUBREDDIT: r/relationships\n\nTITLE: I [24 M] had a cat\n\nPOST: She had a cat and it sat on the mat.\n"
         "I was so tired of it that I left the house.\nWhat do I do now?\n\nTL;DR:")
ARTICLE = "The house was old .\n\nIt was sold to a man from London ."
CNNDM_QUERY = "Article:\nThe house was old .\n\nIt was sold to a man from London .\n\nTL;DR:\n"
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (
    ("user", "Who sat on the mat?"), ("assistant", "The cat."), ("assistant", "I do not know.")))
EARLIER = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]


def comparison(choice=0, batch="batch3", split="train", confidence=8, info=None):
    """A row of OpenAI's comparisons; the texts have one leading space there."""
    tldr = {"id": "t3_1hxu8s", "post": POST, "title": "I [24 M] had a cat", "subreddit": "relationships",
            "site": None, "article": None}
    return {
        "info": info or tldr, "choice": choice, "worker": "w1", "batch": batch, "split": split,
        "summaries": [{"text": " A cat made me leave.", "policy": "sup4", "note": None},
                      {"text": " I am tired.", "policy": "ref", "note": None}],
        "extra": {"confidence": confidence}}


def cnndm_comparison(choice=0, batch="cnndm2", article=ARTICLE):
    info = {"id": "3b7", "post": None, "title": None, "subreddit": None, "site": "cnn", "article": article}
    return comparison(choice, batch, "valid2", None, info)


PREPROCESSED_SFT = {**TLDR_ROW, "query": QUERY, "query_token": [1, 2], "reference_response": f" I left.{EOS}",
                    "reference_response_token": [3, 0]}
PREPROCESSED_PAIR = {"batch": "batch3", "split": "train", "query": QUERY, "query_token": [1, 2],
                     "chosen": f" A cat made me leave.{EOS}", "rejected": f" I am tired.{EOS}",
                     "chosen_policy": "sup4", "rejected_policy": "ref", "policies": "ref--sup4"}
HH_START = "\n\nHuman: Hello.\n\nAssistant: Good day.\n\nHuman: Who sat on the mat?\n\nAssistant:"
HH_ROW = {"chosen": HH_START + " The cat, so it is said.", "rejected": HH_START + " The man."}
MESSAGES = {"messages": [*EARLIER, USER, GOOD]}
PROMPT_COMPLETION = {"prompt": [*EARLIER, USER], "completion": [GOOD]}
PROMPT_PAIR = {"prompt": [*EARLIER, USER], "chosen": [GOOD], "rejected": [BAD]}
WHOLE_PAIR = {"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}
TEXT_PROMPT_PAIR = {"prompt": "Who sat on the mat?", **WHOLE_PAIR, **MESSAGES}
SHP_ROW = {"post_id": "1", "history": "Who sat there?", "human_ref_A": "A cat.", "human_ref_B": "A man.", "labels": 0}
ALPACA_ROW = {"instruction": "Add.", "input": "1 1", "output": "2", "text": "Below is an instruction.\n\n### Response:\n2"}
OASST_ROW = {"message_id": "a", "parent_id": None, "text": "Hello?", "role": "prompter", "message_tree_id": "a"}
ORCA_PAIR = {"system": "Be brief.", "question": "Who?", "chosen": "A cat.", "rejected": "I do not know."}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
CHAT_PROMPT = ("<|user|>\nHello.\n<|assistant|>\nGood day.<|endoftext|>\n<|user|>\nWho sat on the mat?\n"
               "<|assistant|>\n")  # after the BOS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "assets/base"), "--model")


def chat_tokenizer(adds_bos):
    """A tokenizer with a chat template that writes a BOS; adds_bos: it also puts one in front by itself."""
    chat = load_tokenizer(str(ROOT / "assets/base"), "--model")
    chat.add_special_tokens({"bos_token": "<s>"})
    chat.chat_template = TEMPLATE
    if adds_bos:
        chat.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", chat.bos_token_id)])
    return chat


@pytest.fixture(scope="module", params=[True, False], ids=["adds_bos", "adds_none"])
def chat(request):
    return chat_tokenizer(request.param)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def length(text, tokenizer):
    return len(tokenizer(text).input_ids)


def tldr_query(post):
    return QUERY.replace(POST, post)


def cut_query(post, budget, tokenizer):
    return standard_row({**TLDR_ROW, "post": post}, tokenizer, budget)["prompt"]


# ---- Summarisation: prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("row, query", [(TLDR_ROW, QUERY), (comparison(), QUERY), (cnndm_comparison(), CNNDM_QUERY)],
                         ids=["tldr", "comparison", "cnndm"])
def test_detail_2_template_is_exact(row, query, tokenizer):
    """The prompt is the paper's to the letter: no space after the cue of TL;DR, a newline after that of CNN/DM."""
    assert standard_row(row, tokenizer, 512)["prompt"] == query


@pytest.mark.parametrize("separator", ["\n", "\n\n"])
@pytest.mark.parametrize("layout", ["tldr", "comparison"])
def test_detail_2_post_is_cut_at_a_paragraph(layout, separator, tokenizer):
    """T1: over budget, the post ends before one of its newlines, the last that fits; title and cue stay whole."""
    post = separator.join(SENTENCES)
    starts = [post[:i] for i, letter in enumerate(post) if letter == "\n"] + [post]
    sizes = [length(tldr_query(start), tokenizer) for start in starts]
    for budget in range(sizes[0], sizes[-1] + 2):
        row = comparison(info={**comparison()["info"], "post": post}) if layout == "comparison" else TLDR_ROW
        cut = standard_row({**row, "post": post}, tokenizer, budget)["prompt"]
        fitting = [start for start, size in zip(starts, sizes) if size <= budget]
        assert cut == tldr_query(max(fitting, key=len)) and length(cut, tokenizer) <= budget
    assert cut == tldr_query(post)


@pytest.mark.parametrize("post", [POST.replace("\n", " "), SENTENCES[0] + "\n" + SENTENCES[1]])
def test_detail_2_post_without_newline_is_cut_by_characters(post, tokenizer):
    """T1: a post whose first paragraph alone is over budget ends with the longest start of it that fits."""
    first = post.partition("\n")[0]
    for budget in range(length(tldr_query(""), tokenizer), length(tldr_query(first), tokenizer)):
        fitting = [i for i in range(len(first)) if length(tldr_query(first[:i]), tokenizer) <= budget]
        assert cut_query(post, budget, tokenizer) == tldr_query(first[: max(fitting)])


def test_detail_2_prompt_that_cannot_fit_ends_the_run(tmp_path, tokenizer, capsys):
    """T1: where the prompt is over budget without any post, one line names file, row and field."""
    path = write_rows(tmp_path / "rows.jsonl", [TLDR_ROW, {**TLDR_ROW, "title": "cat " * 600}])
    with pytest.raises(SystemExit):
        load_rows(path, "--prompts", [("prompt",)], tokenizer, 512)
    error = capsys.readouterr().err
    assert error == f"error: --prompts {path}, row 2: prompt over 512 tokens with an empty post (1 of 2 rows cannot be used)\n"


def test_detail_4_cnndm_articles_have_a_budget_of_their_own(tokenizer):
    """T6: an article is cut to 1919 tokens, as long as possible, whatever the budget of TL;DR is."""
    found = []
    for start in ("He", "He had"):  # a token more; every other paragraph has two, with its newline
        paragraphs = [start] + ["a"] * 980
        queries = ["Article:\n" + "\n".join(paragraphs[:k]) + "\n\nTL;DR:\n" for k in range(900, 982)]
        prompt = standard_row(cnndm_comparison(article="\n".join(paragraphs)), tokenizer, 512)["prompt"]
        assert length(queries[-1], tokenizer) > 1919
        assert prompt == max((query for query in queries if length(query, tokenizer) <= 1919), key=len)
        found.append(length(prompt, tokenizer))
    assert sorted(found) == [1918, 1919]


@pytest.mark.parametrize("script, flag", [(sft, "--train_data"), (reward_model, "--train_data"), (ppo, "--prompts")],
                         ids=["sft", "reward_model", "ppo"])
def test_detail_2_scripts_cut_at_their_flag(script, flag, tmp_path, tokenizer):
    """T1: each script cuts TL;DR posts at its own --max_prompt_length; none is dropped for it."""
    budget = length(tldr_query(SENTENCES[0]), tokenizer)
    path = write_rows(tmp_path / "rows.jsonl", [comparison() if script is reward_model else TLDR_ROW])
    load = {sft: sft.load_demonstrations, reward_model: reward_model.load_pairs, ppo: ppo.load_prompts}[script]
    size = {} if script is ppo else {"max_length": 600}
    (row,) = load(path, flag, tokenizer, script.Args(max_prompt_length=budget, **size))
    assert row[-1]["prompt"] == tldr_query(SENTENCES[0])


# ---- Summarisation: completions ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["I left.", " I left.", "  I left. \n"])
def test_detail_3_completions_have_one_leading_space(text, tokenizer):
    """T2: summaries without, with one and with two leading spaces all become completions with exactly one."""
    assert standard_row({**TLDR_ROW, "summary": text}, tokenizer, 512)["completion"] == " I left."
    pair = comparison()
    pair["summaries"][0]["text"] = pair["summaries"][1]["text"] = text
    row = standard_row(pair, tokenizer, 512)
    assert row["chosen"] == row["rejected"] == " I left."


@pytest.mark.parametrize("make", [comparison, cnndm_comparison])
def test_detail_1_choice_is_the_chosen_summary(make, tokenizer):
    """T5: choice is the index of the chosen summary; the other choice swaps both columns and their policies."""
    first, second = (standard_row(make(choice), tokenizer, 512) for choice in (0, 1))
    assert (first["chosen"], first["rejected"]) == (" A cat made me leave.", " I am tired.")
    assert (second["chosen"], second["rejected"]) == (first["rejected"], first["chosen"])
    assert (first["chosen_policy"], first["rejected_policy"]) == ("sup4", "ref")
    assert (second["chosen_policy"], second["rejected_policy"]) == ("ref", "sup4")


@pytest.mark.parametrize("make", [comparison, cnndm_comparison])
@pytest.mark.parametrize("choice", [0, 1])
def test_detail_1_comparisons_under_other_names(make, choice, tokenizer):
    """meta, responses, label are info, summaries, choice: the same row, and the same refusal of a bad label."""
    row = make(choice)
    renamed = {{"info": "meta", "summaries": "responses", "choice": "label"}.get(name, name): value
               for name, value in row.items()}
    assert standard_row(renamed, tokenizer, 512) == standard_row(row, tokenizer, 512)
    with pytest.raises(ValueError, match="needs two summaries and choice 0 or 1, found 2 and None"):
        standard_row({**renamed, "label": None}, tokenizer, 512)
    other = {"meta": {"source": "x"}, "prompt": "a", "completion": "b"}
    assert standard_row(other, tokenizer, 512) == other  # a column of this name alone is no layout


def test_detail_1_columns_to_group_by(tokenizer):
    """Comparisons keep batch, split, confidence and the pair of policies, which has one name in either order."""
    row = standard_row(comparison(1, "batch11", "valid1", 3), tokenizer, 512)
    assert (row["batch"], row["split"], row["confidence"], row["policies"]) == ("batch11", "valid1", 3, "ref--sup4")
    assert standard_row({**comparison(), "extra": None}, tokenizer, 512)["confidence"] is None
    row = standard_row({**PREPROCESSED_PAIR, "extra": {"confidence": 7}}, tokenizer, 512)
    assert (row["batch"], row["split"], row["confidence"], row["policies"]) == ("batch3", "train", 7, "ref--sup4")


def load_ids(row, tokenizer, folder):
    """[(prompt, completion, ids)] of one row as sft.py or reward_model.py reads it."""
    path = write_rows(folder / "row.jsonl", [row])
    if {"chosen", "info"} & set(row):
        args = reward_model.Args(max_length=600)
        (chosen, rejected, row), = reward_model.load_pairs(path, "--train_data", tokenizer, args)
        return [(row["prompt"], row["chosen"], chosen), (row["prompt"], row["rejected"], rejected)]
    (ids, _, row), = sft.load_demonstrations(path, "--train_data", tokenizer, sft.Args(max_length=600))
    return [(row["prompt"], row["completion"], ids)]


SUMMARIES = [" A cat made me leave.", " I am tired."]
PLAIN = {
    "tldr": (TLDR_ROW, QUERY, [" I left the house because of a cat."]),
    "comparison": (comparison(), QUERY, SUMMARIES),
    "cnndm": (cnndm_comparison(), CNNDM_QUERY, SUMMARIES),
    "preprocessed_sft": (PREPROCESSED_SFT, QUERY, [" I left."]),
    "preprocessed_pair": (PREPROCESSED_PAIR, QUERY, SUMMARIES),
    "preprocessed_with_info": ({**comparison(), **PREPROCESSED_PAIR}, QUERY, SUMMARIES),
    "hh": (HH_ROW, HH_START, [" The cat, so it is said.", " The man."]),
}


@pytest.mark.parametrize("eos", [EOS, "</s>"])
@pytest.mark.parametrize("layout", PLAIN)
def test_detail_3_ids_end_with_the_only_eos(layout, eos, tmp_path):
    """T3: in every layout the ids are prompt, completion and one EOS at the end, whatever the tokenizer's EOS is."""
    tokenizer = load_tokenizer(str(ROOT / "assets/base"), "--model")
    tokenizer.add_special_tokens({"eos_token": eos})
    row, prompt, completions = PLAIN[layout]
    texts = load_ids(row, tokenizer, tmp_path)
    assert [(found, completion) for found, completion, _ in texts] == [(prompt, text) for text in completions]
    for _, completion, ids in texts:
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids) == prompt + completion + eos


# ---- HH-RLHF ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen, rejected", [
    (" I think so.", " I think not."), (" Yes", " Yes, it did."), ("", " Yes."),
    (" A", " B\n\nHuman: C\n\nAssistant: D")])
def test_dialogues_split_after_their_common_turns(chosen, rejected, tokenizer):
    """T5: answers that begin alike, or are the start of one another, stay whole; the prompt ends with the last cue."""
    row = standard_row({"chosen": HH_START + chosen, "rejected": HH_START + rejected}, tokenizer, 512)
    assert (row["prompt"], row["chosen"], row["rejected"]) == (HH_START, chosen, rejected)


# ---- Conversations ----------------------------------------------------------------------------------------


CHATS = {
    "messages": (MESSAGES, ["The cat."]), "prompt_completion": (PROMPT_COMPLETION, ["The cat."]),
    "prompt_pair": (PROMPT_PAIR, ["The cat.", "I do not know."]),
    "whole_pair": (WHOLE_PAIR, ["The cat.", "I do not know."]),
    "text_prompt_pair": (TEXT_PROMPT_PAIR, ["The cat.", "I do not know."]),
}


@pytest.mark.parametrize("layout", CHATS)
def test_conversations_have_one_bos_and_one_terminator(layout, chat, tmp_path):
    """T4: ids hold one BOS, in front, and after the prompt one EOS, at the end, whoever writes the BOS."""
    row, answers = CHATS[layout]
    texts = load_ids(row, chat, tmp_path)
    assert [answer for _, answer, _ in texts] == answers
    for _, answer, ids in texts:
        assert ids[0] == chat.bos_token_id and ids.count(chat.bos_token_id) == 1
        assert chat.decode(ids) == "<s>" + CHAT_PROMPT + answer + EOS
        assert ids[-1] == chat.eos_token_id and ids.count(chat.eos_token_id) == 2  # the earlier answer has its own


@pytest.mark.parametrize("row", [MESSAGES, PROMPT_COMPLETION, PROMPT_PAIR, WHOLE_PAIR])
def test_ppo_prompts_end_with_the_cue_of_the_template(row, chat, tmp_path):
    """ppo.py reads the prompts of conversations: all but the last answer, then the template's cue, with one BOS."""
    path = write_rows(tmp_path / "rows.jsonl", [row])
    (ids, text, _), = ppo.load_prompts(path, "--prompts", chat, ppo.Args(max_prompt_length=200))
    assert chat.decode(ids) == "<s>" + CHAT_PROMPT and ids.count(chat.bos_token_id) == 1
    assert chat(text).input_ids == ids


# ---- Broken rows ------------------------------------------------------------------------------------------


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


BROKEN = {
    "choice_missing": (comparison(), without(comparison(), "choice"), "KeyError: 'choice'"),
    "choice_too_large": (comparison(), comparison(choice=2), "choice 0 or 1"),
    "one_summary": (comparison(), {**comparison(), "summaries": [{"text": " A"}]}, "two summaries"),
    "info_none": (comparison(), {**comparison(), "info": None}, "not the layout that its columns promise"),
    "no_post_nor_article": (comparison(), cnndm_comparison(article=None), "must be text, found None"),
    "post_none": (TLDR_ROW, {**TLDR_ROW, "post": None}, "post must be text, found None"),
    "summary_none": (TLDR_ROW, {**TLDR_ROW, "summary": None}, "not the layout that its columns promise"),
    "response_none": (PREPROCESSED_SFT, {**PREPROCESSED_SFT, "reference_response": None}, "not the layout"),
    "no_common_turn": (HH_ROW, {"chosen": "a", "rejected": "b"}, "no common beginning with '\\n\\nAssistant:'"),
    "dialogue_none": (HH_ROW, {**HH_ROW, "rejected": None}, "without a value: rejected"),
    "no_messages": (MESSAGES, {"messages": []}, "empty conversation"),
    "role_refused": (MESSAGES, {"messages": [{"role": "system", "content": "."}, GOOD]}, "System role not supported"),
    "question_last": (MESSAGES, {"messages": [*EARLIER, USER]}, "its last message is not the assistant's"),
    "question_chosen": (PROMPT_PAIR, {**PROMPT_PAIR, "chosen": [GOOD, USER]}, "last message is not the assistant's"),
    "no_content": (MESSAGES, {"messages": [USER, {**GOOD, "content": None}]}, "content of a message must be text"),
    "content_parts": (MESSAGES, {"messages": [USER, {**GOOD, "content": [{"type": "text"}]}]}, "must be text, found ["),
    "no_title": (TLDR_ROW, {**TLDR_ROW, "title": None}, "title must be text, found None"),
    "text_for_messages": (PROMPT_COMPLETION, {**PROMPT_COMPLETION, "completion": "The cat."}, "Give both as text or"),
    "messages_for_text": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": [GOOD]}, "Give both as text or"),
    "answer_alone": (MESSAGES, {"messages": [GOOD]}, "a conversation of one message, by assistant"),
    "chosen_alone": (WHOLE_PAIR, {"prompt": "Hello", "chosen": [GOOD], "rejected": [BAD]}, "of one message, by assistant"),
    "empty_prompt": (PROMPT_PAIR, {**PROMPT_PAIR, "prompt": []}, "prompt is an empty conversation"),
    "list_of_texts": (MESSAGES, {"messages": ["Hello.", "Good day."]}, "must hold messages {role, content}, found 'Hello.'"),
    "text_messages": (MESSAGES, {"messages": json.dumps([USER, GOOD])}, "must be a list of {role, content}, and is text"),
    "no_role": (MESSAGES, {"messages": [{"content": "Hello."}, GOOD]}, "role of a message must be text, found None"),
    "sharegpt_question_last": (MESSAGES, {"messages": [{"from": "human", "value": "a"}] * 2}, "not the assistant's"),
    "other_name": (MESSAGES, {"messages": [USER, {"role": "bot", "content": "a"}]}, "not the assistant's"),
    "sharegpt_none": (MESSAGES, {"messages": [{"from": "human", "value": None}, GOOD]}, "must be text, found None"),
    "one_message_no_list": (PROMPT_PAIR, {"prompt": "a", "chosen": GOOD, "rejected": BAD}, "as a list of {role, content}"),
    "shp_label": (SHP_ROW, {**SHP_ROW, "labels": 2}, "labels must be 1 (human_ref_A is preferred) or 0, found 2"),
    "alpaca_input": (ALPACA_ROW, without(ALPACA_ROW, "text"), "--columns prompt=instruction completion=output"),
    "alpaca_other_text": (ALPACA_ROW, {**ALPACA_ROW, "output": "Three."}, "a column text that ends with the output"),
    "oasst": (PROMPT_COMPLETION, OASST_ROW, "a single message of a tree"),
    "other_questions": (WHOLE_PAIR, {**WHOLE_PAIR, "rejected": [USER, BAD]}, "differ before their last message"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_row_is_named(case, tmp_path, capsys):
    """A row that is not what its layout promises ends the run with one line: flag, file, row and reason."""
    good, broken, words = BROKEN[case]
    path = write_rows(tmp_path / "rows.jsonl", [good, broken])
    alternatives = [("prompt", "completion"), ("prompt", "chosen", "rejected")]
    assert load_rows(write_rows(tmp_path / "good.jsonl", [good]), "--train_data", alternatives, chat_tokenizer(True))
    with pytest.raises(SystemExit) as stopped:
        load_rows(path, "--train_data", alternatives, chat_tokenizer(True))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1
    assert error.startswith(f"error: --train_data {path}, row 2: ") and words in error


def test_messages_need_a_chat_template(tmp_path, tokenizer, capsys):
    """Messages with a tokenizer that has no chat template are refused in one line."""
    path = write_rows(tmp_path / "rows.jsonl", [MESSAGES])
    with pytest.raises(SystemExit):
        sft.load_demonstrations(path, "--train_data", tokenizer, sft.Args())
    error = capsys.readouterr().err
    assert error == f"error: --train_data {path}, row 1: messages, and the tokenizer has no chat template " \
        "(1 of 1 rows cannot be used)\n"


def test_bad_rows_are_counted(tmp_path, tokenizer, capsys):
    """The line has the first bad row and how many there are, of a layout and of plain columns."""
    for rows, column in (([SHP_ROW, {**SHP_ROW, "labels": 2}, SHP_ROW, {**SHP_ROW, "labels": None}], "labels must be"),
                         ([{"prompt": "a", "chosen": text, "rejected": "c"} for text in ("b", None, "b", 7)], "'chosen'")):
        with pytest.raises(SystemExit):
            load_rows(write_rows(tmp_path / "rows.jsonl", rows), "--train_data", [("prompt", "chosen", "rejected")], tokenizer)
        error = capsys.readouterr().err
        assert "row 2: " in error and column in error and "(2 of 4 rows cannot be used; this is the first)" in error


# ---- Flat layouts -----------------------------------------------------------------------------------------


SHAREGPT = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Good day."},
            {"from": "human", "value": "Who sat on the mat?"}, {"from": "gpt", "value": "The cat."}]


@pytest.mark.parametrize("row", [{"messages": SHAREGPT}, {"messages": [
    {"role": {"user": "prompter"}.get(m["role"], "Assistant"), "content": m["content"]} for m in MESSAGES["messages"]]}],
    ids=["from and value", "prompter"])  # and small letters
def test_other_names_in_messages_mean_the_usual_ones(row):
    """ShareGPT's from and value, and oasst's prompter, give the row of role and content, user and assistant."""
    chat = chat_tokenizer(True)
    found, expected = standard_row(row, chat, 512), standard_row(MESSAGES, chat, 512)
    assert (found["prompt"], found["completion"]) == (expected["prompt"], expected["completion"])


def test_a_column_of_messages_is_named_in_the_refusal(tmp_path, capsys):
    """A conversation under another name: the line says the flag that makes it messages, and so it is read."""
    path = write_rows(tmp_path / "rows.jsonl", [{"id": 1, "conversations": SHAREGPT}])
    with pytest.raises(SystemExit):
        load_rows(path, "--train_data", [("prompt", "completion"), ("text",)], chat_tokenizer(True))
    assert "{id, conversations}" in (error := capsys.readouterr().err) and error.endswith("--columns messages=conversations\n")
    args = sft.Args(model="no such folder", train_data=path, columns=("messages=conversations",))
    with pytest.raises(SystemExit):
        sft.main(args)
    row, = load_rows(path, "--train_data", [("prompt", "completion")], chat_tokenizer(True))
    assert row["completion"] == standard_row(MESSAGES, chat_tokenizer(True), 512)["completion"]
    sft.check_flags(sft.Args())


@pytest.mark.parametrize("row, names", [
    (ORCA_PAIR, ("chosen", "rejected")),
    ({**without(ORCA_PAIR, "question"), "input": "Who?", "order": ["a"]}, ("chosen", "rejected")),
    ({"system_prompt": "Be brief.", "question": "Who?", "response": "A cat."}, ("completion",))],
    ids=["Intel", "argilla", "OpenOrca"])
def test_orca_rows_go_through_the_template(row, names, tokenizer):
    """System text and question are the prompt; without a template the line says what to do; no system text, no turn."""
    chat = chat_tokenizer(False)
    chat.chat_template = TEMPLATE.replace("raise_exception('System role not supported')", "'~'")
    found = standard_row(row, chat, 512)
    assert found["prompt"] == "<s>~<|system|>\nBe brief.\n<|user|>\nWho?\n<|assistant|>\n"
    assert {name: found[name] for name in names} == {
        name: text for name, text in (("chosen", "A cat."), ("rejected", "I do not know."), ("completion", "A cat."))
        if name in names}
    bare = standard_row({name: "" if "system" in name else value for name, value in row.items()}, chat, 512)
    assert bare["prompt"] == "<s><|user|>\nWho?\n<|assistant|>\n"
    with pytest.raises(ValueError, match="--columns prompt=(question|input)") as refused:
        standard_row(row, tokenizer, 512)
    assert str(refused.value).endswith("prompt=input" if "input" in row else "prompt=question")


def test_shp_rows_are_pairs(tokenizer):
    """The label says which answer was preferred: 1 the first one."""
    for label, chosen, rejected in ((1, "A cat.", "A man."), (0, "A man.", "A cat.")):
        row = standard_row({**SHP_ROW, "labels": label}, tokenizer, 512)
        assert (row["prompt"], row["chosen"], row["rejected"]) == ("Who sat there?", chosen, rejected)


def test_alpaca_rows_are_prompt_and_output(tmp_path, tokenizer):
    """What stands in text before the output is the prompt; the ids are those of both, with the output alone counted."""
    item, = sft.load_demonstrations(write_rows(tmp_path / "rows.jsonl", [ALPACA_ROW]), "--train_data", tokenizer, sft.Args())
    assert item[2]["prompt"] + item[2]["completion"] == ALPACA_ROW["text"] and item[2]["completion"] == "2"
    assert sft.count_labels(item, True) == 2


# ---- Splits -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets_cache")


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_split_after_a_colon_is_read(kind, tmp_path, tokenizer, capsys):
    """`folder:validation` reads that split, `folder` the train split; a split that is not there is refused."""
    table = datasets.Dataset.from_list([comparison()] * 2 + [comparison(1, "batch11", "valid1", 3), cnndm_comparison()])
    tables = datasets.DatasetDict(train=table.select([0, 1]), validation=table.select([2, 3]))
    folder = tmp_path / "comparisons"
    if kind == "saved":
        tables.save_to_disk(folder)
    else:
        folder.mkdir()
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    columns = [("prompt", "chosen", "rejected")]
    train = load_rows(str(folder), "--train_data", columns, tokenizer)
    assert [(row["chosen"], row["batch"]) for row in train] == [(" A cat made me leave.", "batch3")] * 2
    first, second = load_rows(f"{folder}:validation", "--eval_data", columns, tokenizer)
    assert (first["prompt"], first["chosen"], first["confidence"]) == (QUERY, " I am tired.", 3)
    assert (second["prompt"], second["batch"], second["confidence"]) == (CNNDM_QUERY, "cnndm2", None)
    with pytest.raises(SystemExit):
        load_rows(f"{folder}:test", "--eval_data", columns, tokenizer)
    error = capsys.readouterr().err
    assert error.startswith(f"error: --eval_data {folder}:test: cannot be read") and error.count("\n") == 1


@pytest.mark.parametrize("layout", [MESSAGES, PROMPT_PAIR], ids=["messages", "pair"])
def test_saved_conversations_equal_those_of_json_lines(layout, tmp_path, chat):
    """Messages from a saved data set are those of a .jsonl file."""
    datasets.DatasetDict(validation=datasets.Dataset.from_list([layout])).save_to_disk(tmp_path / "saved")
    columns = [("prompt", "completion"), ("prompt", "chosen", "rejected")]
    names = ["prompt", "completion"] if "messages" in layout else ["prompt", "chosen", "rejected"]
    (saved,) = load_rows(f"{tmp_path / 'saved'}:validation", "--eval_data", columns, chat)
    (plain,) = load_rows(write_rows(tmp_path / "rows.jsonl", [layout]), "--eval_data", columns, chat)
    assert [saved[name] for name in names] == [plain[name] for name in names]


# ---- CNN/DM apart -----------------------------------------------------------------------------------------


def tiny_model(folder, tokenizer):
    """Folder of a random model with 256 positions."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=1024, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=256)
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize("only_cnndm", [False, True])
def test_detail_6_cnndm_is_an_evaluation_set_of_its_own(only_cnndm, tmp_path, tokenizer, monkeypatch):
    """T7: of one --eval_data, the three CNN/DM batches are evaluated apart from all others, every pair once."""
    tldr = [] if only_cnndm else [comparison(i % 2, batch, "valid1") for i, batch in enumerate(
        ("batch3", "batch11", "edit_b2_eval_test", "batch22"))]
    cnndm = [cnndm_comparison(0, batch) for batch in ("cnndm0", "cnndm2", "batch0_cnndm")]
    rows = tldr[:2] + cnndm[:2] + tldr[2:] + cnndm[2:]
    files = dict(
        model=tiny_model(tmp_path, tokenizer),
        train_data=write_rows(tmp_path / "train.jsonl", [comparison(), comparison(1)]),
        eval_data=(write_rows(tmp_path / "comparisons.jsonl", rows),),
        demonstrations=write_rows(tmp_path / "tldr.jsonl", [TLDR_ROW]))
    seen, original = [], reward_model.evaluate

    def spy(engine, pairs, *rest, **options):
        seen.append([pair[2]["batch"] for pair in pairs])
        return original(engine, pairs, *rest, **options)

    monkeypatch.setattr(reward_model, "evaluate", spy)
    reward_model.main(reward_model.Args(**files, output_dir=str(tmp_path / "run"), batch_size=2, max_length=256))
    expected = [["batch3", "batch11", "edit_b2_eval_test", "batch22"], ["cnndm0", "cnndm2", "batch0_cnndm"]]
    assert seen == expected[only_cnndm:] * 2  # before and after the only step
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    names = {name.split("/")[1] for name in summary["after"]}
    assert names == set(summary["calibration"]) == {"comparisons_cnndm"} | ({"comparisons"} if tldr else set())


def test_an_empty_post_is_a_tldr_post(tokenizer):
    """A comparison whose post is empty is not taken for CNN/DM, which has an article."""
    row = comparison()
    prompt = standard_row({**row, "info": {**row["info"], "post": ""}}, tokenizer, 512)["prompt"]
    assert prompt.endswith("\n\nPOST: \n\nTL;DR:") and prompt.startswith("SUBREDDIT:")


def test_a_post_without_summary_is_a_prompt(tokenizer):
    """ppo.py needs the prompt alone."""
    row = {name: value for name, value in TLDR_ROW.items() if name != "summary"}
    assert standard_row(row, tokenizer, 512)["prompt"] == QUERY


@pytest.mark.parametrize("name", ["text", "completion", "chosen", "rejected"])
def test_plain_texts_do_not_end_with_eos(name, tokenizer):
    """A row that brings its own EOS does not get a second one."""
    row = standard_row({"prompt": "She was", name: f" happy.{EOS}"}, tokenizer, 512)
    assert row == {"prompt": "She was", name: " happy."}


def test_keys_without_a_value_are_no_keys():
    """`datasets` gives a message the keys of all; templates ask whether one is there. Tools reach the template."""
    seen = []

    class Spy:
        chat_template, eos_token, eos_token_id, bos_token_id, bos_token = "some", EOS, 0, None, None

        def __call__(self, text):
            return SimpleNamespace(input_ids=[])

        def __len__(self):
            return 1

        def get_added_vocab(self):
            return {EOS: 0}

        def convert_tokens_to_ids(self, token):
            return {EOS: 0}[token]

        def apply_chat_template(self, messages, tokenize, strftime_now=None, **options):
            seen.append((messages, options))
            return " ".join([str(options.get("tools", "")), *(message["content"] for message in messages)])

    standard_row({"messages": [{**USER, "tool_calls": None}, GOOD], "tools": [{"name": "f"}]}, Spy(), 512)
    assert seen[:3] == [([USER], {"add_generation_prompt": True, "tools": [{"name": "f"}]}),
                        ([USER], {"add_generation_prompt": True}), ([USER, GOOD], {"tools": [{"name": "f"}]})]


def test_a_long_post_without_newline_is_cut_quickly(tokenizer):
    """The cut of 4,000 characters looks at tens of texts, not at thousands."""
    calls = []

    def counting(text):
        calls.append(text)
        return tokenizer(text)

    query = fit_query(TLDR, {**TLDR_ROW, "post": "she was happy " * 300}, "post", counting, 200)
    assert len(tokenizer(query).input_ids) == 200 and len(calls) < 60


def test_columns_of_token_ids_are_not_read(tmp_path, tokenizer):
    """The paper's preprocessed sets bring ids of every text, tens of gigabytes as Python lists."""
    datasets.Dataset.from_list([PREPROCESSED_SFT]).to_parquet(str(tmp_path / "rows.parquet"))
    (row,) = load_rows(str(tmp_path / "rows.parquet"), "--train_data", [("prompt", "completion")], tokenizer)
    assert row["completion"] == " I left." and not [name for name in row if name.endswith("_token")]


def test_evaluation_sets_keep_one_name_each(tmp_path, tokenizer, capsys):
    """CNN/DM pairs of a file called ..._cnndm keep its name; two files whose pairs would share a name are refused."""
    pairs = {"valid": [comparison(), cnndm_comparison()], "valid_cnndm": [cnndm_comparison()]}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in pairs.items()}
    common = dict(train_data=paths["valid"], demonstrations=write_rows(tmp_path / "sft.jsonl", [TLDR_ROW]),
                  max_length=256, batch_size=2, model=tiny_model(tmp_path, tokenizer))
    reward_model.main(reward_model.Args(
        **common, eval_data=(paths["valid_cnndm"],), output_dir=str(tmp_path / "one")))
    assert "valid_cnndm: accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reward_model.main(reward_model.Args(
            **common, eval_data=tuple(paths.values()), output_dir=str(tmp_path / "two")))
    assert "would both be called valid_cnndm" in capsys.readouterr().err
