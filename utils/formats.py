"""Published data layouts into the columns that the scripts read: prompt, completion, chosen, rejected, text.

What is understood, by its columns (Hub ids are examples of each):
  subreddit, title, post, summary       TL;DR as OpenAI published it (vwxyzjn/summarize_from_feedback_tldr_3_filtered)
  info, summaries, choice               its comparisons, CNN/DM among them (openai/summarize_from_feedback)
  meta, responses, label                the same under other names (HuggingFaceH4/summarize-from-feedback)
  query, reference_response             preprocessed by the paper's authors
                                        (vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144)
  query, chosen, rejected               (vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144)
  chosen, rejected                      two whole dialogues with a common beginning (Anthropic/hh-rlhf), or messages
  messages; or any column as messages   conversations, through the tokenizer's chat template; {from, value} too
  system, question or input, chosen, rejected     orca's pairs, through the chat template (Intel/orca_dpo_pairs)
  system_prompt, question, response               its demonstrations (Open-Orca/OpenOrca)
  instruction, input, output, text      Alpaca (tatsu-lab/alpaca): the text before the output is the prompt
  history, human_ref_A, human_ref_B, labels       SHP (stanfordnlp/SHP)
"""

import os
import re
from datetime import datetime

from jinja2 import TemplateError

from utils.tokens import encode_prompt, end_of_turn, without_terminator

TLDR = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # [detail 2] no space at the end
CNNDM = "Article:\n{article}\n\nTL;DR:\n"
CNNDM_PROMPT_LENGTH = 1919  # [detail 4] tokens, where TL;DR has 512
ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}  # names of the usual roles, in small letters
CNNDM_BATCHES = {"batch0_cnndm", "cnndm0", "cnndm2"}  # [detail 6] not of TL;DR: an evaluation set of their own


def standard_row(row, tokenizer, max_prompt_length):
    """A row (dict) with the scripts' columns, whatever published layout it has; unknown layouts are left as they are.

    No answer ends with the terminator that `encode_texts` (utils/tokens.py) puts there. Raises ValueError with the
    reason where a row of a known layout cannot be used.
    """
    row = usual_messages(row)
    if {"meta", "responses", "label"} <= set(row) and isinstance(row["meta"], dict):
        row = {**row, "info": row["meta"], "summaries": row["responses"], "choice": row["label"]}
    names = set(row)
    if "info" in row and "summaries" in row:
        row = comparison(row, tokenizer, max_prompt_length)
    elif {"subreddit", "title", "post"} <= set(row) and not {"query", "prompt"} & set(row):
        row = {**row, "prompt": fit_query(TLDR, row, "post", tokenizer, max_prompt_length)}
        if "summary" in row:
            row["completion"] = one_space(row["summary"])
    elif "query" in row and "prompt" not in row:
        row = {**row, "prompt": row["query"]}
        if "reference_response" in row:
            row["completion"] = row["reference_response"]
        if isinstance(row.get("extra"), dict):
            row["confidence"] = row["extra"].get("confidence")
        for name in {"completion", "chosen", "rejected"} & set(row):
            row[name] = row[name].removesuffix("<|endoftext|>")  # whatever the tokenizer's own EOS is
    elif any(isinstance(row.get(name), list) for name in ("messages", "prompt", "chosen", "rejected")):
        row = conversation(row, tokenizer)
    elif {"system", "system_prompt"} & names and {"question", "input"} & names and "prompt" not in row:
        row = conversation(orca(row, tokenizer), tokenizer)
    elif {"history", "human_ref_A", "human_ref_B", "labels"} <= names:
        row = shp(row)
    elif {"instruction", "output"} <= names and not {"prompt", "completion"} & names:
        row = alpaca(row)
    elif {"text", "role", "parent_id"} <= names:
        raise ValueError("a single message of a tree (columns text, role, parent_id). Join the messages on the way to "
                         "an answer into a conversation, one row with a column messages")
    elif {"chosen", "rejected"} <= set(row) and "prompt" not in row:
        row = dialogue(row)
    prompt = row["prompt"] if isinstance(row.get("prompt"), str) else ""
    ends = {name: without_terminator("" if name == "text" else prompt, row[name], tokenizer)
            for name in ("text", "completion", "chosen", "rejected") if isinstance(row.get(name), str)}
    return {**row, **ends}


# ---- Summarisation ----------------------------------------------------------------------------------------


def fit_query(template, info, field, tokenizer, max_tokens):
    """The prompt, its `field` cut until it has at most max_tokens [detail 2].

    At the last newline of the field, paragraph by paragraph; without one, character by character. The cue at the end
    of the template always survives; a hard cut of the tokens would lose it.
    """
    for name in re.findall(r"{(\w+)}", template):
        if not isinstance(info[name], str):
            raise ValueError(f"{name} must be text, found {info[name]!r:.60}")

    def query(text):
        return template.format(**{**info, field: text})

    def fits(text):
        return len(tokenizer(query(text)).input_ids) <= max_tokens

    text = info[field]
    while not fits(text) and "\n" in text:
        text = text.rpartition("\n")[0]
    if fits(text):
        return query(text)
    low, high = 0, len(text)  # bisect first: a character at a time is slow, and tokens grow almost evenly with text
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
    for length in range(min(low + 32, len(text)), -1, -1):
        if fits(text[:length]):
            return query(text[:length])
    raise ValueError(f"prompt over {max_tokens} tokens with an empty {field}")


def comparison(row, tokenizer, max_prompt_length):
    """OpenAI's comparisons [detail 1]: two summaries, who wrote them, which one the worker chose, how surely."""
    info, summaries = row["info"], row["summaries"]
    if len(summaries) != 2 or row["choice"] not in (0, 1):
        raise ValueError(f"needs two summaries and choice 0 or 1, found {len(summaries)} and {row['choice']!r}")
    if info.get("article") is None:
        prompt = fit_query(TLDR, info, "post", tokenizer, max_prompt_length)
    else:
        prompt = fit_query(CNNDM, info, "article", tokenizer, CNNDM_PROMPT_LENGTH)
    chosen, rejected = summaries[row["choice"]], summaries[1 - row["choice"]]
    return {
        "prompt": prompt, "chosen": one_space(chosen["text"]), "rejected": one_space(rejected["text"]),
        "chosen_policy": chosen.get("policy"), "rejected_policy": rejected.get("policy"),
        "policies": "--".join(sorted(str(summary.get("policy")) for summary in summaries)),
        "batch": row.get("batch"), "split": row.get("split"),
        "confidence": (row.get("extra") or {}).get("confidence")}


def one_space(text):
    """A summary with exactly one leading space [detail 3]: these texts have one already."""
    return " " + text.strip()


# ---- Other flat layouts -----------------------------------------------------------------------------------


def shp(row):
    """Two answers to a post, and which one was preferred."""
    if row["labels"] not in (0, 1):
        raise ValueError(f"labels must be 1 (human_ref_A is preferred) or 0, found {row['labels']!r:.60}")
    chosen, rejected = ("human_ref_A", "human_ref_B")[:: 1 if row["labels"] == 1 else -1]
    return {**row, "prompt": row["history"], "chosen": row[chosen], "rejected": row[rejected]}


def alpaca(row):
    """The whole text is the prompt, with the instruction and perhaps an input in it, and then the output."""
    text, output = row.get("text"), row["output"]
    if not (isinstance(text, str) and isinstance(output, str) and text.endswith(output)):
        raise ValueError("columns instruction and output without a column text that ends with the output. Where there "
                         "is no input, --columns prompt=instruction completion=output will do. Else write a column "
                         "prompt with both")
    return {**row, "prompt": text.removesuffix(output), "completion": output}


# ---- Conversations ----------------------------------------------------------------------------------------


def usual_messages(row):
    """A row whose conversations have the keys role and content, and the usual names of roles."""
    row = dict(row)
    if isinstance(row.get("messages"), str):
        raise ValueError("messages must be a list of {role, content}, and is text")
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        if not isinstance(row.get(name), list):
            continue
        if not row[name]:
            raise ValueError(f"{name} is an empty conversation")
        wrong = next((message for message in row[name] if not isinstance(message, dict)), None)
        if wrong is not None:
            raise ValueError(f"{name}: a list must hold messages {{role, content}}, found {wrong!r:.60}")
        messages = [{"role": message["from"], "content": message.get("value")} if message.get("from") else message
                    for message in row[name]]
        roles = [message.get("role") for message in messages]
        row[name] = [{**message, "role": ROLES.get(role.lower(), role) if isinstance(role, str) else role}
                     for message, role in zip(messages, roles)]
        is_whole = name == "messages" or name in ("chosen", "rejected") and not isinstance(row.get("prompt"), list)
        if is_whole and len(messages) < 2 and (name != "messages" or row[name][0]["role"] == "assistant"):
            raise ValueError(f"{name} is a conversation of one message, by {row[name][0]['role']}. It needs a question "
                             "and the assistant's answer")
    prompt = row.get("prompt")
    for name in ("completion", "chosen", "rejected"):
        if isinstance(prompt, list) and isinstance(row.get(name), str) or (
                name == "completion" and isinstance(prompt, str) and isinstance(row.get(name), list)):
            raise ValueError(f"of prompt and {name} one is text and one messages. Give both as text or both as messages")
    return row


def orca(row, tokenizer):
    """A system text and a question as a prompt of messages, with the answers to it."""
    asked = "question" if "question" in row else "input"
    if tokenizer.chat_template is None:
        raise ValueError(f"columns system and {asked} need a tokenizer with a chat template. If you can do without the "
                         f"system texts: --columns prompt={asked}")
    system = row.get("system", row.get("system_prompt"))
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": row[asked]}]
    names = {"response": "completion", "chosen": "chosen", "rejected": "rejected"}
    answers = {ours: [{"role": "assistant", "content": row[name]}] for name, ours in names.items() if name in row}
    return {**row, "prompt": turns, **answers}


def dialogue(row):
    """HH-RLHF: both texts begin with the same turns; the last answer of each is the completion."""
    common = os.path.commonprefix([row["chosen"], row["rejected"]])
    cue = "\n\nAssistant:"
    end = common.rfind(cue)
    if end < 0:
        raise ValueError(f"chosen and rejected have no common beginning with {cue!r}, and there is no prompt")
    end += len(cue)
    return {**row, "prompt": row["chosen"][:end], "chosen": row["chosen"][end:], "rejected": row["rejected"][end:]}


def conversation(row, tokenizer):
    """Messages ({role, content} lists) through the chat template: the prompt up to the last answer, and the answers.

    The prompt ends with the template's cue for an answer. It has no BOS in its text if the tokenizer puts the same ids
    there without. For judges the row also has `conversation`, the prompt's messages, and `last_user_turn`, the text of
    the user's last one.
    """
    if tokenizer.chat_template is None:
        raise ValueError("messages, and the tokenizer has no chat template")
    row = dict(row)
    if not isinstance(row.get("prompt"), list) and "chosen" in row:  # both whole: they share all turns but the last
        row["prompt"] = row["chosen"][:-1]
        if row["rejected"][:-1] != row["prompt"]:
            raise ValueError("chosen and rejected differ before their last message")
        row["chosen"], row["rejected"] = row["chosen"][-1:], row["rejected"][-1:]
    if "messages" in row:
        has_answer = row["messages"][-1].get("role") == "assistant"
        row["prompt"] = row["messages"][:-1] if has_answer else row["messages"]
        row |= {"completion": row["messages"][-1:]} if has_answer else {}
    prompt, options = row["prompt"], {"tools": row["tools"]} if row.get("tools") else {}
    if prompt and prompt[-1].get("role") == "assistant":
        raise ValueError("the prompt ends with a message of the assistant's. End it with the user's")
    row["prompt"] = render(prompt, tokenizer, add_generation_prompt=True, **options)
    if options and row["prompt"] == render(prompt, tokenizer, add_generation_prompt=True):
        raise ValueError("the chat template leaves out the tools. Use one that prints them, or leave out the column")
    for name in {"completion", "chosen", "rejected"} & set(row):
        if not row[name] or row[name][-1].get("role") != "assistant":
            raise ValueError(f"{name}: its last message is not the assistant's")
        row[name] = answer_of(prompt + row[name], row["prompt"], tokenizer, **options)
    row["conversation"] = prompt
    row["last_user_turn"] = next((turn["content"] for turn in prompt[::-1] if turn["role"] == "user"), "")
    bare = row["prompt"].removeprefix(tokenizer.bos_token or "")
    if encode_prompt(bare, tokenizer) == encode_prompt(row["prompt"], tokenizer):
        row["prompt"] = bare
    return row


def answer_of(messages, prompt, tokenizer, **options):
    """The text of the last message, an answer, as the template renders it after the prompt, up to its end of turn.

    What comes after that is cut: a newline, EOS, and the cue for another answer, which some templates print always.
    Raises ValueError where the template leaves something out. It may change the space around the content.
    """
    message, probe = messages[-1], "AnswerProbe7"
    whole = render(messages, tokenizer, **options)
    for key in ("tool_calls", "reasoning_content", "thinking"):
        if message.get(key) and whole == render(
                [*messages[:-1], {"content": "", **message, key: None}], tokenizer, **options):
            raise ValueError(f"the chat template leaves out {key} of the answer. Use one that prints it, or remove it")
    if not whole.startswith(prompt):
        raise ValueError("the chat template renders the prompt otherwise when an answer follows it (its cue for an "
                         "answer is not how answers begin). Use another template, or give prompts and answers as text")
    after = render([*messages[:-1], {**message, "content": probe}], tokenizer, **options).rpartition(probe)[2]
    text = whole[len(prompt) :].removesuffix(after)
    content = message.get("content") or ""
    if "".join(content.split()) not in "".join(text.split()):
        raise ValueError(f"the chat template drops or changes a part of the answer {content!r:.60}. Use a template "
                         "that keeps it, or give prompts and answers as text")
    turn = end_of_turn(tokenizer)
    if turn.end and turn.end in after:  # tool calls may stand before it
        return without_terminator(prompt, text + after.partition(turn.end)[0] + turn.end, tokenizer)
    return (text + after if message.get("tool_calls") else text).rstrip()


template_date = [datetime.now()]  # what templates print as today's; utils/run.py fixes it for a run and its resumes


def render(messages, tokenizer, **options):
    """The chat template's text. Keys without a value are left out: `datasets` gives every message all keys."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        if not isinstance(message.get("content", "" if "tool_calls" in message else None), str):
            raise ValueError(f"the content of a message must be text, found {message.get('content')!r:.60}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"the role of a message must be text, found {message.get('role')!r:.60}")
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, strftime_now=lambda form: template_date[0].strftime(form), **options)
    except TemplateError as error:  # some templates refuse roles, or their order
        raise ValueError(f"the chat template refuses it ({error})") from error
