"""Texts to ids and back (utils/tokens.py, utils/formats.py): terminators, templates, joints and BOS of real tokenizers' kinds."""

import json
import re
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from whole import write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import dpo
import ppo
import reward_model
import sft
from utils import formats
from utils.data import as_answer, load_prompts, load_rows
from utils.formats import standard_row
from utils.models import load_tokenizer
from utils.tokens import check_spelling, decode_responses, encode_prompt, encode_text, encode_texts
from utils.tokens import generation_eos_ids, retokenize, terminator_ids, the_terminator

EOS = "<|endoftext|>"

# ---- Chat templates of the kinds that are published -------------------------------------------------------

HEADER = "<|start|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|turn|>"
TEMPLATES = {  # template, and what it makes of an answer "Yes." up to its terminator
    "chatml": ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|im_end|>"),
    "cue_always": ("{% for m in messages %}" + HEADER + "{% endfor %}<|start|>assistant<|header|>\n\n", "<|turn|>"),
    "cue_always_chatml": ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                          "<|im_start|>assistant\n", "<|im_end|>"),
    "inst": ("{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} "
             "{{ m.content }} " + EOS + "{% endif %}{% endfor %}", EOS),
    "no_end": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
               "{% if add_generation_prompt %}assistant: {% endif %}", EOS),
    "no_end_cue_always": ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}<|assistant|>\n", EOS),
    "last_end_differs": ("<|start|>system\nBe kind.<|end|>{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
                         "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
                         "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}", "<|return|>"),
    "header_shared": ("{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}<|start|>assistant\n",
                      EOS),
    "two_ends": ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>\n{% else %}" + EOS + "{% endif %}", "<|end|>"),
    "system_default": ("<|im_start|>system\nBe kind.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
                       "{{ m.content }}<|im_end|>\n{% endfor %}"
                       "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|im_end|>"),
    "empty_thought": ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n"
                      "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
                      "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|im_end|>"),
}
ADDED = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|header|>", "<|turn|>", "<|user|>", "<|assistant|>", "<|end|>",
         "<|eom|>", "<s>", "<|return|>"]
QUESTION, ANSWER = {"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}


def chat_tokenizer(template, bos=None):
    tokenizer = load_tokenizer(str(ROOT / "assets/base"), "--model")
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"])  # not special, as Qwen3 has them
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=TEMPLATES)
def chat(request):
    template, end = TEMPLATES[request.param]
    return SimpleNamespace(name=request.param, tokenizer=chat_tokenizer(template), end=end)


def every_script(folder, tokenizer):
    """{script: ids of the prompt, the answer and its end} of one question and answer, as each script reads them."""
    write = lambda name, row: write_rows(folder / name, [row])
    pair = {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [OTHER]}
    pairs, messages = write("pairs.jsonl", pair), write("messages.jsonl", {"messages": [QUESTION, ANSWER]})
    (sft_ids, _, _), = sft.load_demonstrations(messages, "--train_data", tokenizer, sft.Args(max_length=500))
    (chosen, _, _), = reward_model.load_pairs(pairs, "--train_data", tokenizer, reward_model.Args(max_length=500))
    demonstrations = reward_model.load_demonstrations(
        messages, "--demonstrations", tokenizer, reward_model.Args(max_length=500))
    (found,) = dpo.load_preferences(pairs, "--train_data", tokenizer, dpo.Args(max_length=500))
    (prompt,) = load_prompts(messages, "--prompts", tokenizer, ppo.Args(max_prompt_length=500),
                             [("prompt", "completion")])
    scored = sum(encode_texts(prompt.text, prompt.row["completion"], tokenizer), [])
    return {"sft": sft_ids, "reward_model": chosen, "demonstrations": demonstrations[0],
            "dpo": found.prompt + found.chosen, "evaluate": scored, "ppo": prompt.ids}


def test_detail_e29_every_script_ends_a_response_alike(chat, tmp_path):
    """One terminator, the same in SFT, reward model, DPO and evaluation; it is among those at which sampling stops."""
    ids, tokenizer = every_script(tmp_path, chat.tokenizer), chat.tokenizer
    end = tokenizer.convert_tokens_to_ids(chat.end)
    assert end in terminator_ids(tokenizer)
    assert set(terminator_ids(tokenizer)) <= {end, tokenizer.eos_token_id}
    prompt = ids.pop("ppo")
    assert len({tuple(row) for row in ids.values()}) == 1
    row = ids["sft"]
    assert row[: len(prompt)] == prompt and row[-1] == end
    assert not set(row[len(prompt) : -1]) & set(terminator_ids(tokenizer))
    answer = tokenizer.decode(row[len(prompt) : -1])
    assert re.sub(r"<think>\s*</think>", "", answer).strip() == "Yes."


def test_templates_that_always_print_the_cue_do_not_teach_it(chat, tmp_path):
    """After the answer comes its end, and no header of another answer; the prompt ends with the header once."""
    rendered = standard_row({"messages": [QUESTION, ANSWER]}, chat.tokenizer, 512)
    whole = chat.tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert rendered["prompt"] == whole and rendered["completion"].endswith("Yes." if chat.name != "inst" else "Yes. ")
    assert rendered["conversation"] == [QUESTION] and rendered["last_user_turn"] == "Is it so?"


@pytest.mark.parametrize("content", ["d", "e", "i", "<", "|", "im", "end", "assistant", "n", "turn", "start", "1", "T"])
def test_short_answers_are_found(chat, content):
    """An answer that is a part of a header, an end or a cue is itself, and nothing more."""
    row = standard_row({"messages": [QUESTION, {**ANSWER, "content": content}]}, chat.tokenizer, 512)
    assert re.sub(r"<think>\s*</think>", "", row["completion"]).strip() == content
    ids = encode_texts(row["prompt"], row["completion"], chat.tokenizer)[1]
    assert chat.tokenizer.decode(ids[-1:]) == chat.end and not set(ids[:-1]) & set(terminator_ids(chat.tokenizer))


def test_a_template_that_wants_a_system_message_has_an_end_of_turn():
    """One that refuses a conversation without it is asked with one."""
    tokenizer = chat_tokenizer("{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
                               + TEMPLATES["chatml"][0])
    row = standard_row({"messages": [{"role": "system", "content": "Be kind."}, QUESTION, ANSWER]}, tokenizer, 512)
    ids = encode_texts(row["prompt"], row["completion"], tokenizer)[1]
    assert tokenizer.decode(ids) == "Yes.<|im_end|>"


@pytest.mark.parametrize("beginning", ["<think>\n\n</think>\n\n", "Sure,"])
def test_a_prompt_that_begins_the_answer_is_rendered_too(beginning):
    """The template's end of turn ends what follows the cue, also where the prompt goes on after it."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True) + beginning
    assert tokenizer.decode(encode_texts(prompt, "Yes.", tokenizer)[1]) == "Yes.<|im_end|>"
    whole = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)  # no answer is asked for
    assert tokenizer.decode(encode_texts(whole, "Yes.", tokenizer)[1]) == "Yes." + EOS


def test_a_cue_at_the_end_of_a_rendered_text_is_cut():
    """Text that a template has rendered which always prints the cue: the header of another answer is not trained."""
    tokenizer = chat_tokenizer(TEMPLATES["cue_always"][0])
    whole = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    prompt = whole[: whole.index("Yes.")]
    assert whole.rstrip().endswith("Yes.<|turn|><|start|>assistant<|header|>")
    assert tokenizer.decode(encode_texts(prompt, whole[len(prompt) :], tokenizer)[1]) == "Yes.<|turn|>"
    assert tokenizer.decode(encode_text(whole, tokenizer)) == prompt + "Yes.<|turn|>"


@pytest.mark.parametrize("text, end", [
    ("Yes.", "<|im_end|>"), ("Yes.<|im_end|>", "<|im_end|>"), ("Yes.<|im_end|>\n", "<|im_end|>"),
    (f"Yes.<|im_end|>\n{EOS}", "<|im_end|>"), (f"Yes.{EOS}", EOS), (f"Yes.{EOS}{EOS}\n", EOS),
    ("Yes.<|eom|>", "<|eom|>"), (f"Yes.<|eom|>{EOS}", "<|eom|>")])
def test_detail_e29_texts_that_were_rendered_beforehand(text, end, tmp_path):
    """The text's own terminator stays, once; one without gets the end of turn, since the template made its prompt."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    tokenizer.generation_eos_ids = [tokenizer.convert_tokens_to_ids("<|eom|>")]
    prompt = "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n"
    found = encode_texts(prompt, text, tokenizer)[1]
    assert found == tokenizer("Yes.").input_ids + [tokenizer.convert_tokens_to_ids(end)]
    assert encode_texts(prompt, text, tokenizer, finished=False)[1] == tokenizer("Yes.").input_ids
    assert as_answer(prompt, text, tokenizer)["response"] == "Yes."
    plain = encode_texts("Is it so?", "Yes.", tokenizer)[1]
    assert plain[-1] == tokenizer.eos_token_id  # a prompt that no template has made


def test_detail_e29_text_rows_of_whole_conversations_end_once(tmp_path):
    """`text` that a template has rendered ends with its end of turn, without a newline and EOS behind it."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    text = "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text}])
    (ids, length, _), = sft.load_demonstrations(path, "--train_data", tokenizer, sft.Args(max_length=500))
    assert tokenizer.decode(ids) == text.rstrip() and length == 0


def test_detail_e29_mixed_terminators_are_refused_where_scores_are_read(tmp_path, capsys):
    """A reward model is trained at one token: sets whose texts end otherwise are refused, with counts and flags."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", EOS))
    assert the_terminator({"--train_data": [[5, end], [6, 7, end]], "--demonstrations": [[8, end]]}, tokenizer) == end
    with pytest.raises(SystemExit):
        the_terminator({"--train_data": [[5, end], [6, 7, end]], "--demonstrations": [[8, eos]]}, tokenizer)
    error = capsys.readouterr().err
    assert "--train_data: 2 in '<|im_end|>'; --demonstrations: 1 in '<|endoftext|>'" in error and error.count("\n") == 1


@pytest.mark.parametrize("written, ids, kept", [
    (True, [0, 1007], [0, 1007]), (True, 0, [0]), (True, [0, 322], [0, 322]), (True, [0, 5000], None),
    (False, [0, 322], [0]), (False, [0, 1007], [0, 1007])])
def test_detail_e29_generation_configs_add_terminators_or_are_refused(written, ids, kept, tmp_path, capsys):
    """All tokens of generation_config.json end a response, ordinary ones with a warning; an unknown id is refused."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    assert tokenizer.convert_ids_to_tokens(1007) in ADDED
    if written:
        GenerationConfig(eos_token_id=ids).save_pretrained(tmp_path)
    else:
        config = json.loads((ROOT / "assets/base/config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": ids}))
    if kept is not None:
        assert generation_eos_ids(str(tmp_path), "--model", tokenizer) == kept
        assert ("ends responses at 322, the ordinary token 'Ġis'" in capsys.readouterr().out) == (322 in kept)
        return
    with pytest.raises(SystemExit):
        generation_eos_ids(str(tmp_path), "--model", tokenizer)
    error = capsys.readouterr().err
    assert "generation_config.json" in error and str(ids[1]) in error and error.count("\n") == 1


def test_detail_e29_load_tokenizer_knows_the_generation_configs_ends(tmp_path):
    """What a folder's generation config ends at is a terminator of its tokenizer, as chat models list several."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    tokenizer.save_pretrained(tmp_path)
    ids = [0, tokenizer.convert_tokens_to_ids("<|eom|>")]
    GenerationConfig(eos_token_id=ids).save_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert terminator_ids(load_tokenizer(str(tmp_path), "--model")) == sorted([*ids, end])


# ---- Content that a template changes ----------------------------------------------------------------------

DROPS_THOUGHT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("content, survives", [
    ("Yes.", True), ("<think>Hm.</think>Yes.", False), (" Yes. ", True), ("", True), ("Yes. <|im_end|> no", True)])
def test_content_survives_the_template_or_the_row_is_refused(content, survives, tmp_path, capsys):
    """A template that drops the reasoning of the answer that is trained on ends the run with the row's number."""
    tokenizer = chat_tokenizer(DROPS_THOUGHT)
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, {**ANSWER, "content": content}]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    if survives:
        assert load_rows(path, "--train_data", [("prompt", "completion")], tokenizer)[1]["completion"] == content
        return
    with pytest.raises(SystemExit):
        load_rows(path, "--train_data", [("prompt", "completion")], tokenizer)
    error = capsys.readouterr().err
    assert "row 2" in error and "drops or changes" in error and "Hm." in error


def test_trimmed_content_and_respaced_thoughts_survive():
    """Space around the content may change, as Llama-3's and Qwen3's templates change it."""
    respaced = DROPS_THOUGHT.replace("{{ m.content.split('</think>')[-1] }}", "{{ m.content | replace('>', '>\n') | trim }}")
    for template, content in ((TEMPLATES["cue_always"][0], "  Yes.\n\n"), (respaced, "<think>Hm.</think>Yes.")):
        row = standard_row({"messages": [QUESTION, {**ANSWER, "content": content}]}, chat_tokenizer(template), 512)
        assert "".join(row["completion"].split()) == "".join(content.split()) and row["completion"].endswith("Yes.")


def test_tool_calls_stay_in_the_answer():
    """What a template prints of an answer between its content and its end of turn belongs to it."""
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls is defined %}"
                "{{ '\n' }}<tool_call>{{ m.tool_calls[0].name }}{% endif %}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    answer = {**ANSWER, "tool_calls": [{"name": "look"}]}
    row = standard_row({"messages": [QUESTION, answer]}, chat_tokenizer(template), 512)
    assert row["completion"] == "Yes.\n<tool_call>look"
    empty = {**answer, "content": ""}
    assert standard_row({"messages": [QUESTION, empty]}, chat_tokenizer(template), 512)["completion"] == "\n<tool_call>look"


@pytest.mark.parametrize("row, said", [
    ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"name": "f"}]}]}, "leaves out tool_calls"),
    ({"messages": [QUESTION, {**ANSWER, "reasoning_content": "Hm."}]}, "leaves out reasoning_content"),
    ({"messages": [QUESTION, ANSWER], "tools": [{"name": "f"}]}, "leaves out the tools"),
    ({"prompt": [QUESTION, OTHER], "completion": [ANSWER]}, "ends with a message of the assistant's")])
def test_what_a_template_leaves_out_is_named(row, said):
    with pytest.raises(ValueError, match=said):
        standard_row(row, chat_tokenizer(TEMPLATES["chatml"][0]), 512)


def test_prompts_may_be_messages_that_end_with_the_user(tmp_path, capsys):
    """ppo.py answers them; sft.py says that there is no answer."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [QUESTION, ANSWER, QUESTION]}, {"messages": [QUESTION]}])
    prompts = load_prompts(path, "--prompts", tokenizer, ppo.Args(max_prompt_length=500))
    assert [prompt.text.count("Is it so?") for prompt in prompts] == [2, 1]
    assert all(prompt.text.endswith("<|im_start|>assistant\n") for prompt in prompts)
    with pytest.raises(SystemExit):
        load_rows(path, "--train_data", [("prompt", "completion"), ("text",)], tokenizer)
    assert "row 1" in (error := capsys.readouterr().err) and "its last message is not the assistant's" in error


def test_a_template_prints_the_date_on_which_the_run_began(monkeypatch):
    """`strftime_now` in a template is the run's own date, not that of the moment (Llama-3.1 and gpt-oss ask for it)."""
    template = "Today: {{ strftime_now('%d %b %Y') }}\n" + TEMPLATES["chatml"][0]
    monkeypatch.setattr(formats, "template_date", [datetime(2024, 7, 26)])
    row = standard_row({"messages": [QUESTION, ANSWER]}, chat_tokenizer(template), 512)
    assert row["prompt"].startswith("Today: 26 Jul 2024\n")


# ---- Prompt ids and response ids spell both texts ---------------------------------------------------------


def make_tokenizer(kind, bos=True):
    """A small tokenizer of one of the kinds that are in use, trained on the embedded text."""
    metaspace = kind.removeprefix("metaspace_") if kind.startswith("metaspace") else None
    byte_level = kind in ("byte_level", "prefix_space")
    tokenizer = Tokenizer(models.BPE() if byte_level else models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = [] if metaspace == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix_space")
    elif metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
    else:  # Llama 2
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    tokenizer.train_from_iterator(
        (json.loads(line)["completion"] for line in open(ROOT / "assets/data/validation.jsonl")),
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False, special_tokens=special + [
            f"<0x{byte:02X}>" for byte in range(256) if not byte_level]))
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(written))  # bytes are ordinary tokens
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


KINDS = ("llama2", "metaspace_first", "metaspace_always", "metaspace_never", "byte_level", "prefix_space")
TEXTS = [("She was", " happy."), ("Q: why?\n", "Because so."), ("a", "\n\nb"), ("x ", " y"), ("x\n", " y"), ("x ", "y"),
         ("She said: ", "naïve 日本 😀"), ("TL;DR:", " I left."), ("TL;DR:\n", "1. It"), ("a", "a"), ("(", ".5)")]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return SimpleNamespace(name=request.param, tokenizer=make_tokenizer(request.param))


@pytest.mark.parametrize("prompt, response", TEXTS)
def test_detail_e1_ids_spell_both_texts(kind, prompt, response):
    """Prompt ids and response ids, one after the other, read as prompt + response, with one BOS and one EOS."""
    tokenizer = kind.tokenizer
    first, second = encode_texts(prompt, response, tokenizer)
    whole = tokenizer.decode(tokenizer(prompt + response).input_ids, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(first + second, clean_up_tokenization_spaces=False) == whole + "</s>"
    assert first == tokenizer(prompt).input_ids and first.count(1) == 1  # <s>
    assert decode_responses(tokenizer, [first], torch.tensor([second])) == [response]
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=500))
    assert retokenize(([prompt], [response]), [True], tokenizer, model) == [first + second]


def test_detail_e1_texts_apart_stay_apart(kind):
    """Where a tokenizer reads a response by itself rightly, its ids are those of the text alone (Pythia, Llama-3, Qwen)."""
    alone = kind.tokenizer("Yes.", add_special_tokens=False).input_ids
    same = encode_texts("Q:\n", "Yes.", kind.tokenizer)[1][:-1] == alone
    assert same == (kind.name in ("metaspace_never", "byte_level"))


def test_check_spelling_refuses_what_does_not_spell(tmp_path, capsys):
    """A tokenizer that puts a space before every text, whatever stands before it, is refused with row and both texts."""
    tokenizer = make_tokenizer("llama2")
    rows = [{"prompt": "Q:\n", "completion": "Yes."}] * 3
    check_spelling(rows, "--train_data", "file", tokenizer)
    assert capsys.readouterr().out == ""

    class Stubborn:  # its joints cannot be mended
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

        def __call__(self, text, **options):
            found = tokenizer(text.replace("\n", "\n ") if "Q" in text and "Yes" not in text else text, **options)
            return found

    with pytest.raises(SystemExit):
        check_spelling(rows, "--train_data", "file", Stubborn())
    error = capsys.readouterr().err
    assert "--train_data file: in 3 texts of 3 rows" in error and "completion of row 1" in error
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit):
        load_rows(path, "--train_data", [("prompt", "completion")], Stubborn())
    assert f"--train_data {path}: in 3 texts of 3 rows" in capsys.readouterr().err


# ---- BOS, and special tokens in texts ---------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_rendered_prompts_have_the_ids_of_the_template(name, tmp_path):
    """A BOS that the template prints stays where it is: what follows it is read as behind it, as transformers does."""
    tokenizer = make_tokenizer(name)
    tokenizer.chat_template = ("<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
                               "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}")
    row = standard_row({"messages": [QUESTION, ANSWER]}, tokenizer, 512)
    ids = sum(encode_texts(row["prompt"], row["completion"], tokenizer), [])
    assert ids == tokenizer.apply_chat_template([QUESTION, ANSWER], return_dict=False)
    text = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    assert encode_text(text, tokenizer) == ids and encode_text("\n" + text, tokenizer).count(1) == 1


@pytest.mark.parametrize("bos", [True, False])
def test_one_bos_whoever_wrote_it(bos, tmp_path, capsys):
    """Prompts that bring their own BOS have one in their ids, and the run says so; a tokenizer without keeps the text's."""
    tokenizer = make_tokenizer("byte_level", bos)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": text, "completion": " so"} for text in ("<s>She", "<s><s>He", "It")])
    rows = load_rows(path, "--train_data", [("prompt", "completion")], tokenizer)
    counts = [encode_prompt(row["prompt"], tokenizer).count(1) for row in rows]
    assert counts == ([1, 1, 1] if bos else [1, 2, 0])
    assert ("2 texts begin with <s>" in capsys.readouterr().out) == bos
    (ids, _, _), *_ = sft.load_demonstrations(path, "--train_data", tokenizer, sft.Args())
    assert ids.count(1) == 1


def test_special_tokens_in_a_users_text_are_counted_and_named(tmp_path, capsys):
    """Any added token, in messages and texts; a terminator at an answer's end and runs of space are none."""
    tokenizer = chat_tokenizer(TEMPLATES["chatml"][0])
    tokenizer.add_tokens(["   "])
    turns = [{"role": "user", "content": "What is <|im_end|> and <think>?"}, {"role": "assistant", "content": "A   token."}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [QUESTION, ANSWER]}, {"messages": turns}])
    load_rows(path, "--train_data", [("prompt", "completion")], tokenizer)
    out = capsys.readouterr().out
    assert "1 rows, the first of them row 2," in out and "'<|im_end|>' (1 times), '<think>' (1 times)" in out
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Is it so?", "completion": f" Yes.{EOS}"}])
    load_rows(path, "--train_data", [("prompt", "completion")], tokenizer)
    assert capsys.readouterr().out == ""
