"""Bad input ends in one line on stderr before anything is written: what is wrong, where, and what to do.

Every case calls main(Args(...)) of a script in this process. `refused` compares the whole folder before and after.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
import tyro
from conftest import ROOT, tiny_config
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

import dpo
import evaluate
import group_invariant_ppo
import ppo
import reward_model
import sft
from test_launch import environment
from utils.data import call_judge, load_rows
from utils.launch import ABOVE_0, AT_LEAST_0, AT_LEAST_1, AT_MOST_1

ROWS = [
    {"prompt": "She was", "completion": " happy.", "chosen": " happy.", "rejected": " tired of it."},
    {"prompt": "He had", "completion": " a house, and \"friends\".", "chosen": " friends.", "rejected": " no, none"},
    {"prompt": "It is", "completion": " naïve;\nshe knew.", "chosen": " true.", "rejected": " not true."},
]
MODEL_FLAGS = [(sft, "model"), (reward_model, "model"), (ppo, "sft_model"), (ppo, "reward_model"),
               (group_invariant_ppo, "sft_model"), (group_invariant_ppo, "reward_model"),
               (dpo, "model"), (dpo, "ref_model"), (evaluate, "models"), (evaluate, "ref_model"), (evaluate, "judges")]
DATA_FLAGS = [(sft, "train_data"), (sft, "eval_data"), (reward_model, "train_data"), (reward_model, "eval_data"),
              (reward_model, "demonstrations"), (ppo, "prompts"), (ppo, "eval_prompts"),
              (group_invariant_ppo, "prompts"), (group_invariant_ppo, "eval_prompts"),
              (dpo, "train_data"), (dpo, "eval_data"), (dpo, "eval_prompts"), (evaluate, "prompts")]
TRAINERS = [sft, reward_model, ppo, group_invariant_ppo, dpo]
SCRIPTS = [*TRAINERS, evaluate]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "assets" / "base")


def named(cases):
    return [pytest.param(*case, id="-".join([case[0].__name__, *map(str, case[1:])])) for case in cases]


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with good inputs for every script: models lm/ and rm/, and rows.jsonl with all columns."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "base")
    torch.manual_seed(0)
    config = tiny_config(vocab_size=1024, pad_token_id=tokenizer.pad_token_id, num_labels=1)
    GPTNeoXForCausalLM(config).save_pretrained(folder / "lm")
    GPTNeoXForSequenceClassification(config).save_pretrained(folder / "rm")
    for name in ("lm", "rm"):
        tokenizer.save_pretrained(folder / name)
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="session")
def finished_runs(inputs, tmp_path_factory):
    """The output folder of a run of one step, per script."""
    folder = tmp_path_factory.mktemp("finished")
    for script in SCRIPTS:
        script.main(good_args(script, inputs, output_dir=str(folder / script.__name__)))
    return folder


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets_cache")


def good_args(script, inputs, **changes):
    """Args of a run of one step that nothing is wrong with."""
    rows, lm = str(inputs / "rows.jsonl"), str(inputs / "lm")
    rollouts = dict(sft_model=lm, reward_model=str(inputs / "rm"), prompts=rows, eval_prompts=rows, gold_function=None,
                    batch_size=2, total_episodes=2, response_length=4)
    good = {
        sft: dict(model=lm, train_data=rows, eval_data=rows, epochs=1, batch_size=4, num_samples=2, response_length=2),
        reward_model: dict(model=lm, train_data=rows, eval_data=(rows,), demonstrations=rows, batch_size=4),
        ppo: rollouts, group_invariant_ppo: rollouts,
        dpo: dict(model=lm, train_data=rows, eval_data=(rows,), eval_prompts=rows, gold_function=None, epochs=1,
                  batch_size=4, response_length=4, ref_cache=str(inputs / "ref_logprobs")),
        evaluate: dict(models=(lm,), ref_model=lm, judges=(str(inputs / "rm"),), prompts=rows, response_length=4,
                       cache=str(inputs / "evaluate_cache")),
    }[script]
    changes = {flag: (value,) if flag in ("models", "judges") and isinstance(value, str) else value
               for flag, value in changes.items()}
    return script.Args(**{**good, **changes})


def with_data(script, inputs, flag, path, output_dir, **changes):
    """Good Args, with `path` as the data file of one flag."""
    value = (str(path),) if (script, flag) in [(reward_model, "eval_data"), (dpo, "eval_data")] else str(path)
    return good_args(script, inputs, output_dir=str(output_dir), **{flag: value}, **changes)


def snapshot(folder):
    return {file: file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that runs a script, which must refuse its Args in one line and change no file. Returns the line.

    may_write: the script cannot know that the input is bad before it has made its output folder.
    """

    def run(script, args, may_write=False):
        before = snapshot(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            script.main(args)
        errors = capsys.readouterr().err
        assert stopped.value.code not in (0, None)
        assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
        assert may_write or snapshot(tmp_path) == before
        return errors.strip()

    return run


# ---- Models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flag", named(MODEL_FLAGS))
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_model_folder_missing_is_named(script, flag, absolute, inputs, tmp_path, monkeypatch, refused):
    """A model folder that does not exist is named with its flag, and the line says what to give."""
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "runs" / "gone") if absolute else "runs/gone"
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: path}))
    assert f"--{flag} {path}" in message and "no such folder" in message and "Hugging Face" in message


@pytest.mark.parametrize("script, flag", named(MODEL_FLAGS))
def test_model_folder_without_tokenizer_is_named(script, flag, inputs, tmp_path, refused):
    """A model folder without tokenizer files is refused with the call that writes them."""
    folder = shutil.copytree(inputs / ("rm" if flag == "reward_model" else "lm"), tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert f"--{flag} {folder}" in message and "tokenizer" in message and "save_pretrained" in message


@pytest.mark.parametrize("script, flag", named(MODEL_FLAGS))
def test_model_folder_without_config_is_named(script, flag, inputs, tmp_path, refused):
    """A model folder without config.json is refused, and the line names the missing file."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    (folder / "config.json").unlink()
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert f"--{flag} {folder}" in message and "has no config.json" in message


@pytest.mark.parametrize("script, flag", named(MODEL_FLAGS))
def test_pickled_weights_are_not_loaded(script, flag, inputs, tmp_path, refused):
    """A folder with pickled weights only is refused, and the line says to convert them to safetensors."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(GPTNeoXForCausalLM(tiny_config(vocab_size=1024)).state_dict(), folder / "pytorch_model.bin")
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert f"--{flag} {folder}" in message and "Pickled" in message and "convert them to safetensors" in message
    assert "--allow_pickle" in message


def test_pickled_weights_are_loaded_where_the_flag_allows_it(inputs, tmp_path, refused):
    """--allow_pickle: the run is that of the same weights in safetensors, and saves safetensors; the next run refuses again."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name, model, allow in (("a", folder, True), ("b", inputs / "lm", False)):
        sft.main(good_args(sft, inputs, model=str(model), output_dir=str(tmp_path / name), allow_pickle=allow))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    refused(sft, good_args(sft, inputs, model=str(folder), output_dir=str(tmp_path / "c")))


def test_pickled_weights_beside_some_safetensors_file_are_not_loaded(inputs, tmp_path, refused):
    """A safetensors file with another name does not open the door to the pickle beside it."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "another.safetensors")
    assert "cannot load" in refused(sft, good_args(sft, inputs, model=str(folder), output_dir=str(tmp_path / "out")))


def test_code_of_a_model_folder_is_not_run(inputs, tmp_path):
    """A config that names code in its folder: refused in one line, even where somebody would say yes to running it."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = subprocess.run([sys.executable, "sft.py", f"--model={folder}", f"--output_dir={tmp_path / 'out'}"], cwd=ROOT,
                          env=environment(), input="y\ny\n", capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith(f"error: --model {folder}: cannot load"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, flag", named(MODEL_FLAGS))
def test_damaged_weights_are_named(script, flag, inputs, tmp_path, refused):
    """A folder whose weights file is cut short is refused with its flag."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert f"--{flag} {folder}" in message and "cannot load" in message


@pytest.mark.parametrize("script, flag, other, words", named([
    *[(script, flag, "rm", "this is a reward model or critic") for script, flag in [
        (sft, "model"), (ppo, "sft_model"), (group_invariant_ppo, "sft_model"), (dpo, "model"), (dpo, "ref_model")]],
    (evaluate, "models", "rm", "this is a reward model or critic"),
    (evaluate, "ref_model", "rm", "this is a reward model or critic"),
    (ppo, "reward_model", "lm", "it has no score head"), (evaluate, "judges", "lm", "it has no score head")]))
def test_model_of_another_kind_is_refused(script, flag, other, words, inputs, tmp_path, refused):
    """A reward model as language model, or the reverse, would train a random head: refused."""
    path = str(inputs / other)
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: path}))
    assert f"--{flag} {path}" in message and words in message


def test_weights_that_lack_a_tensor_are_refused(inputs, tmp_path, refused):
    """A model file without one of its weights is refused, by the tensor's name."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(sft, good_args(sft, inputs, output_dir=str(tmp_path / "out"), model=str(folder)))
    assert f"--model {folder}" in message and "layers.0.mlp.dense_4h_to_h.weight" in message


@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
def test_stored_sampling_settings_do_not_lose_the_run(script, inputs, tmp_path):
    """A generation config that transformers would refuse to save is reduced to its token ids, EOS kept."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    stored = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [0, 7]}
    (folder / "generation_config.json").write_text(json.dumps(stored))
    flag = "sft_model" if hasattr(script.Args, "sft_model") else "model"
    script.main(good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    if script is not reward_model:
        saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert saved["eos_token_id"] == [0, 7] and "temperature" not in saved and "top_p" not in saved


@pytest.mark.parametrize("script, flag", named(MODEL_FLAGS))
def test_tokenizer_that_appends_eos_is_refused(script, flag, inputs, tmp_path, refused):
    """A tokenizer that ends every text with EOS would end prompts too: refused."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)])
    tokenizer.save_pretrained(folder)
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert f"--{flag} {folder}" in message and "ends every text with EOS" in message


@pytest.mark.parametrize("script, flag", named(MODEL_FLAGS))
def test_tokenizer_without_eos_is_refused(script, flag, inputs, tmp_path, refused):
    """A tokenizer without EOS is refused: no response could ever end."""
    folder = shutil.copytree(inputs / "lm", tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert f"--{flag} {folder}" in message and "no EOS token" in message and "eos_token" in message


@pytest.mark.parametrize("script, flag, kind, words", named([
    (ppo, "reward_model", "rm", ["--sft_model", "reward_model.py"]),
    (dpo, "ref_model", "lm", ["--model", "cannot be compared"])]))
def test_vocabularies_that_differ_are_refused(script, flag, kind, words, inputs, tmp_path, refused):
    """A reward model, or a reference, whose tokenizer gives other ids is refused; the line names both folders."""
    folder = shutil.copytree(inputs / kind, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert f"--{flag} {folder}" in message and "vocabulary differs" in message
    assert f"{words[0]} {inputs / 'lm'}" in message and words[1] in message


def test_prompt_and_response_longer_than_the_positions_are_refused(inputs, tmp_path, refused):
    """PPO refuses lengths that do not fit the model's 128 positions; lengths that just fit pass this check."""
    too_long = dict(max_prompt_length=100, response_length=29, output_dir=str(tmp_path / "out"))
    message = refused(ppo, good_args(ppo, inputs, **too_long))
    assert "--max_prompt_length + --response_length = 129" in message and "128 positions" in message
    just_fits = {**too_long, "response_length": 28, "reward_model": str(tmp_path / "gone")}
    assert "positions" not in refused(ppo, good_args(ppo, inputs, **just_fits))


@pytest.mark.parametrize("script, flag, kind", named([(ppo, "reward_model", "rm"), (dpo, "ref_model", "lm")]))
def test_other_model_with_fewer_positions_is_refused(script, flag, kind, inputs, tmp_path, refused):
    """A reward model, or a reference, whose positions do not hold prompt and response is refused."""
    folder = shutil.copytree(inputs / kind, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30}))
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: str(folder)}))
    assert "30 positions" in message


@pytest.mark.parametrize("script", [sft, dpo, evaluate], ids=lambda script: script.__name__)
def test_sample_longer_than_the_positions_is_refused(script, inputs, tmp_path, refused):
    """A response length that the positions do not hold behind the longest prompt that is continued is refused."""
    message = refused(script, good_args(script, inputs, response_length=128, output_dir=str(tmp_path / "out")))
    assert "--response_length" in message and "128 positions" in message


@pytest.mark.parametrize("flag", ["model", "ref_model"])
def test_dpo_rows_beyond_the_attention_window_are_refused(flag, inputs, tmp_path, refused):
    """dpo.py --share_prefix refuses a window shorter than --max_length, which its mask would replace; one as long runs."""
    config = MistralConfig(vocab_size=1024, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                           num_key_value_heads=1, intermediate_size=16, sliding_window=32)
    MistralForCausalLM(config).save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(inputs / "lm").save_pretrained(tmp_path / "lm")
    args = good_args(dpo, inputs, output_dir=str(tmp_path / "out"), share_prefix=True, **{flag: str(tmp_path / "lm")})
    message = refused(dpo, dataclasses.replace(args, max_length=33))
    assert "--max_length 33" in message and "attends to 32 tokens" in message
    dpo.main(dataclasses.replace(args, max_length=32))


@pytest.mark.parametrize("script", [sft, reward_model, dpo], ids=lambda script: script.__name__)
def test_rows_longer_than_the_positions_are_refused(script, inputs, tmp_path, refused):
    """--max_length above the model's positions is refused before a model with learned positions meets such a row."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "lm")
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=32, n_embd=16, n_layer=1, n_head=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{**ROWS[0], "completion": " a" * 40, "chosen": " a" * 40}]
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    args = with_data(script, inputs, "train_data", data, tmp_path / "out", model=str(folder), max_length=64)
    message = refused(script, args)
    assert "--max_length" in message and "= 64 tokens" in message and "32 positions" in message


@pytest.mark.parametrize("cache", ["file", "file/folder"])
def test_reference_cache_that_cannot_be_written_is_named(cache, inputs, tmp_path, refused):
    """--ref_cache where a file is in the way ends in one line before anything is computed, and the file stays."""
    (tmp_path / "file").write_text("years of work")
    args = good_args(dpo, inputs, output_dir=str(tmp_path / "out"), ref_cache=str(tmp_path / cache))
    assert f"--ref_cache {tmp_path / cache}" in refused(dpo, args)


# ---- Data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gone.jsonl", "data/gone.jsonl", "a/b/gone.jsonl", "assets/gone.csv"])
def test_data_file_missing_is_named(name, inputs, tmp_path, monkeypatch, refused):
    """A data file that does not exist is called missing, in whatever folder it was looked for."""
    monkeypatch.chdir(tmp_path)
    message = refused(ppo, with_data(ppo, inputs, "prompts", name, tmp_path / "out"))
    assert message == f"error: --prompts {name}: no such file or folder"


@pytest.mark.parametrize("script, flag", named(DATA_FLAGS))
def test_data_flag_missing_file_is_named(script, flag, inputs, tmp_path, refused):
    """Every data flag is checked and named when its file does not exist."""
    path = tmp_path / "gone.jsonl"
    message = refused(script, with_data(script, inputs, flag, path, tmp_path / "out"))
    assert f"--{flag} {path}" in message and "no such file" in message


@pytest.mark.parametrize("name, content", [
    ("rows.jsonl", ""), ("rows.jsonl", "\n\n"), ("rows.json", ""), ("rows.json", "[]"), ("rows.csv", ""),
    ("rows.csv", "prompt,completion\n"), ("rows.parquet", "")])
def test_data_file_empty_is_named(name, content, inputs, tmp_path, refused):
    """A data file of any kind without rows is named."""
    file = tmp_path / name
    file.write_text(content)
    message = refused(sft, with_data(sft, inputs, "train_data", file, tmp_path / "out"))
    assert f"--train_data {file}" in message
    assert "no rows in it" in message or name == "rows.parquet"


@pytest.mark.parametrize("name, content", [
    ("rows.jsonl", json.dumps(ROWS[0]) + "\n\n" + '{"prompt": "He had", "completion": \n'),
    ("rows.json", "[" + json.dumps(ROWS[0]) + ',\n\n{"prompt": "He had", "completion": ]'),
    ("rows.json", json.dumps(ROWS[0]) + "\n\n" + '{"prompt": "He had", "completion": \n')])
def test_broken_json_line_number_is_named(name, content, inputs, tmp_path, refused):
    """Broken JSON is reported with the line of the file, blank lines counted."""
    file = tmp_path / name
    file.write_text(content)
    message = refused(sft, with_data(sft, inputs, "train_data", file, tmp_path / "out"))
    assert f"--train_data {file}, line 3" in message and "broken JSON" in message


@pytest.mark.parametrize("name, content, fragment", [
    ("rows.jsonl", '["She was", " happy."]\n', "line 1: not a JSON object"),
    ("rows.jsonl", b"\xff\xfe\x00", "not UTF-8"),
    ("rows.json", "[1, 2]", "not a list of JSON objects"),
    ("rows.csv", 'prompt,completion\n"She was, happy.\n', "cannot be read as CSV"),
    ("rows.parquet", "not parquet", "cannot be read"),
    ("rows.txt", "She was happy.\n", "unknown kind of file. Understood: .jsonl, .json, .csv, .parquet")])
def test_unreadable_file_says_why(name, content, fragment, inputs, tmp_path, refused):
    """A file of the wrong kind, encoding or structure is refused with its name and the reason."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(sft, with_data(sft, inputs, "train_data", file, tmp_path / "out"))
    assert str(file) in message and fragment in message


@pytest.mark.parametrize("script, flag, understood", named([
    (sft, "train_data", "{prompt, completion} or {text}"), (reward_model, "train_data", "{prompt, chosen, rejected}"),
    (reward_model, "demonstrations", "{prompt, completion}"), (ppo, "prompts", "{prompt}"),
    (group_invariant_ppo, "prompts", "{prompt}"), (group_invariant_ppo, "eval_prompts", "{prompt}"),
    (dpo, "train_data", "{prompt, chosen, rejected}"), (dpo, "eval_prompts", "{prompt}")]))
def test_wrong_columns_lists_found_and_understood(script, flag, understood, inputs, tmp_path, refused):
    """Rows with other columns are refused with the columns found and those that the script understands."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"question": "Is it?", "answer": "It is."}])
    message = refused(script, with_data(script, inputs, flag, data, tmp_path / "out"))
    assert f"--{flag} {data}" in message and "{question, answer}" in message and understood in message
    assert message.endswith(f"with --columns {' '.join(f'{name}=YOURS' for name in understood.split('}')[0][1:].split(', '))}")


@pytest.mark.parametrize("value", [7, None, ["She was"], {"text": "She was"}], ids=str)
def test_value_that_is_not_text_names_its_row(value, inputs, tmp_path, refused):
    """A value that is not text is reported with its row and column."""
    data = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {**ROWS[1], "completion": value}, ROWS[2]])
    message = refused(sft, with_data(sft, inputs, "train_data", data, tmp_path / "out"))
    words = "completion: a list must hold messages" if isinstance(value, list) else "'completion' must be text"
    assert f"--train_data {data}, row 2" in message and words in message


def test_column_missing_in_one_row_names_it(inputs, tmp_path, refused):
    """A row that lacks a column which the first row has is reported with its number."""
    data = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "They"}])
    message = refused(sft, with_data(sft, inputs, "train_data", data, tmp_path / "out"))
    assert "row 4" in message and "'completion'" in message


@pytest.mark.parametrize("script, flag, limit", named([
    (sft, "train_data", "max_length"), (reward_model, "train_data", "max_length"),
    (reward_model, "demonstrations", "max_length"), (ppo, "prompts", "max_prompt_length"),
    (group_invariant_ppo, "prompts", "max_prompt_length"),
    (dpo, "train_data", "max_length"), (dpo, "eval_data", "max_length"), (dpo, "eval_prompts", "max_prompt_length")]))
def test_all_rows_over_the_limit_are_refused(script, flag, limit, inputs, tmp_path, refused):
    """Where every row is over the length limit, the line counts them and names flag and limit."""
    words = " and on" * 60
    data = write_jsonl(tmp_path / "rows.jsonl", [
        {"prompt": words, "completion": "0.", "chosen": f"{i}.", "rejected": "!"} for i in range(3)])
    message = refused(script, with_data(script, inputs, flag, data, tmp_path / "out", **{limit: 20}))
    assert f"--{flag}" in message and data in message and "no row is left" in message
    longest = 120 + (len(TOKENIZER("2.").input_ids) + 1) * (limit == "max_length")  # and EOS
    assert "3 over 20 tokens" in message and f"the longest {longest}: raise --{limit}" in message


@pytest.mark.parametrize("script", [reward_model, dpo], ids=lambda script: script.__name__)
def test_chosen_equal_to_rejected_everywhere_is_refused(script, inputs, tmp_path, refused):
    """Pairs whose two completions are the same teach nothing; where all are, they are counted and refused."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{**row, "rejected": row["chosen"]} for row in ROWS])
    message = refused(script, with_data(script, inputs, "train_data", data, tmp_path / "out"))
    assert "--train_data" in message and data in message and "3 chosen equal to rejected" in message


@pytest.mark.parametrize("script, flag, limit", named([
    (sft, "train_data", "max_length"), (reward_model, "train_data", "max_length"),
    (ppo, "prompts", "max_prompt_length"), (dpo, "eval_prompts", "max_prompt_length")]))
def test_rows_over_the_limit_are_dropped_and_counted(script, flag, limit, inputs, tmp_path, capsys):
    """A row over the limit is left out whole, and the line about the file counts it."""
    long = {key: text + " and on" * 40 for key, text in ROWS[0].items()}
    data = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, long])
    load = {sft: "load_demonstrations", reward_model: "load_pairs", ppo: "load_prompts", dpo: "load_prompts"}[script]
    args = with_data(script, inputs, flag, data, tmp_path / "out", **{limit: 30})
    tokenizer = AutoTokenizer.from_pretrained(inputs / "lm")
    assert len(getattr(script, load)(data, f"--{flag}", tokenizer, args)) == 3
    line = capsys.readouterr().out
    assert f"--{flag}" in line and data in line and "3 rows (dropped: 1 over 30 tokens)" in line


@pytest.mark.parametrize("script, flag, limit", named([
    (sft, "train_data", "max_length"), (reward_model, "demonstrations", "max_length"),
    (reward_model, "train_data", "max_length"), (ppo, "prompts", "max_prompt_length"), (dpo, "eval_data", "max_length")]))
def test_most_rows_over_the_limit_are_a_warning_of_its_own(script, flag, limit, inputs, tmp_path, capsys):
    """Where half of the rows or more are too long, a line says which flag at which value keeps 95 % of them, and all."""
    for few, many in ((20, 20), (21, 19)):
        rows = [{"prompt": " and" * n, "completion": "." * m, "chosen": "." * m, "rejected": "!"} for n, m in [(1, 1)] * few + [
            (21 + i, 2) for i in range(many)]]
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        args = with_data(script, inputs, flag, data, tmp_path / f"out{few}", **{limit: 20})
        script.main(args)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
        if few > many:
            assert lines == []
            continue
        more = 1 + len(TOKENIZER("..").input_ids) if limit == "max_length" else 0
        assert lines == [f"warning: --{flag} {data}: 20 of 40 rows are too long and left out. --{limit} {39 + more} would keep "
                         f"95 % of them, --{limit} {40 + more} all"]


def test_equal_pairs_are_dropped_and_counted(inputs, tmp_path, capsys):
    """A pair with chosen equal to rejected is left out, and the line about the file counts it."""
    data = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {**ROWS[0], "rejected": ROWS[0]["chosen"]}])
    tokenizer = AutoTokenizer.from_pretrained(inputs / "lm")
    pairs = reward_model.load_pairs(data, "--train_data", tokenizer, good_args(reward_model, inputs))
    assert [row for _, _, row in pairs] == ROWS
    assert "3 rows (dropped: 1 chosen equal to rejected)" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["train_data", "eval_data"])
@pytest.mark.parametrize("column", ["chosen_finished", "rejected_finished"])
@pytest.mark.parametrize("value", ["false", 0], ids=repr)
def test_finished_that_is_no_bool_names_its_row(flag, column, value, inputs, tmp_path, refused):
    """Whether the sampler cut a response is true or false in every row that says it, in dropped rows too."""
    equal = {**ROWS[2], "rejected": ROWS[2]["chosen"], column: value}
    data = write_jsonl(tmp_path / "rows.jsonl", [{**ROWS[0], column: False}, ROWS[1], equal])
    message = refused(dpo, with_data(dpo, inputs, flag, data, tmp_path / "out"))
    assert f"--{flag} {data}, row 3" in message and f"{column!r} must be true or false, found {value!r}" in message


# ---- Data that reads well ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "saved", "saved_splits"])
def test_load_rows_reads_every_kind_alike(kind, tmp_path):
    """The same three rows come back from every kind of file and folder, quotes, line ends and accents included."""
    table = datasets.Dataset.from_list(ROWS)
    path = tmp_path / ("rows" if kind in ("folder", "saved", "saved_splits") else f"rows.{kind}")
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "folder":
        path.mkdir()
        table.to_parquet(path / "train.parquet")
    elif kind == "saved":
        table.save_to_disk(path)
    else:
        datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(path)
    assert load_rows(str(path), "--train_data", [("prompt", "completion")], TOKENIZER) == ROWS


def test_load_rows_skips_byte_order_mark_and_blank_lines(tmp_path):
    """A .jsonl file with a byte order mark, Windows line ends and blank lines reads like a plain one."""
    file = tmp_path / "rows.jsonl"
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_rows(str(file), "--train_data", [("prompt", "completion")], TOKENIZER) == ROWS


def test_load_rows_drops_columns_of_the_other_alternatives(tmp_path):
    """Rows with text and completion, but no prompt, are text rows: no script takes them for half of a pair."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "She was happy.", "completion": " happy.", "id": 3}])
    rows = load_rows(file, "--train_data", [("prompt", "completion"), ("text",)], TOKENIZER)
    assert rows == [{"text": "She was happy.", "id": 3}]


def test_load_rows_keeps_words_that_look_like_missing_values(tmp_path):
    """The words None, NA and null in a CSV file are text like any other."""
    rows = [{"prompt": word, "completion": f" {word}."} for word in ("None", "NA", "null", "She")]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    assert load_rows(str(tmp_path / "rows.csv"), "--train_data", [("prompt", "completion")], TOKENIZER) == rows


# ---- Columns by other names -------------------------------------------------------------------------------

THEIRS = [{"question": row["prompt"], "answer": row["completion"], "good": row["chosen"], "bad": row["rejected"], "id": i}
          for i, row in enumerate(ROWS)]
COLUMNS = ("prompt=question", "completion=answer", "chosen=good", "rejected=bad")
MAIN_FLAGS = [(script, "prompts" if hasattr(script.Args, "prompts") else "train_data") for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_columns_gives_the_run_of_the_renamed_file(script, inputs, finished_runs, tmp_path, capsys):
    """A file with other names of columns, and --columns, trains the bits of the file with ours; the other files stay."""
    flag = dict(MAIN_FLAGS)[script]
    data = write_jsonl(tmp_path / "rows.jsonl", THEIRS)
    columns = COLUMNS[:2] if script in (sft, ppo, group_invariant_ppo, evaluate) else (COLUMNS[0], *COLUMNS[2:])
    changes = dict(cache=str(tmp_path / "cache")) if script is evaluate else {}
    script.main(with_data(script, inputs, flag, data, tmp_path / "out", columns=columns, **changes))
    said, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("--columns"))
    assert f"{data}: prompt = question, " in said and said.endswith(
        "the other columns: good, bad, id" if columns == COLUMNS[:2] else "the other columns: answer, id")
    for name in ("model.safetensors", "metrics.jsonl"):
        if (finished_runs / script.__name__ / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (finished_runs / script.__name__ / name).read_bytes()


@pytest.mark.parametrize("columns, words", [
    (("prompt",), "--columns prompt: write our name, ="), (("=question",), "--columns =question: write our name, ="),
    (("prompt=",), "--columns prompt=: write our name, ="),
    (("prompt=question", "prompt=answer"), "--columns prompt=answer: prompt stands there twice"),
    (("prompt=question", "completion=question"), "--columns completion=question: question stands there twice")], ids=str)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_columns_that_say_nothing_are_refused(script, columns, words, inputs, tmp_path, refused):
    """A pair that is not ours=yours, or a name twice, ends in one line."""
    assert words in refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), columns=columns))


@pytest.mark.parametrize("script, flag", named(MAIN_FLAGS))
def test_columns_that_the_file_lacks_are_refused(script, flag, inputs, tmp_path, refused):
    """In the training data or the prompts, a name that is not there is refused with those that are."""
    data = write_jsonl(tmp_path / "rows.jsonl", THEIRS)
    columns = tuple(pair.replace("question", "questions") for pair in COLUMNS)
    message = refused(script, with_data(script, inputs, flag, data, tmp_path / "out", columns=columns))
    assert f"--columns prompt=questions: --{flag} {data} has no column 'questions'. Found: question, answer" in message


def test_columns_onto_a_column_that_is_there_are_refused(inputs, tmp_path, refused):
    """Two columns of one name are refused; the line says how to put the other one aside, and that works."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{**row, "prompt": "x"} for row in THEIRS])
    args = with_data(sft, inputs, "train_data", data, tmp_path / "out", columns=COLUMNS[:2])
    message = refused(sft, args)
    assert f"--columns prompt=question: --train_data {data} has a column 'prompt' already" in message
    assert message.endswith("--columns prompt=question other=prompt")
    sft.main(dataclasses.replace(args, columns=(*COLUMNS[:2], "other=prompt")))


def test_columns_belong_to_one_run(inputs, tmp_path, capsys):
    """The next run in the process reads files by its own flags, pairs and demonstrations each those that they have."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{name: row[name] for name in ("question", "good", "bad")} for row in THEIRS])
    answers = write_jsonl(tmp_path / "answers.jsonl", [{name: row[name] for name in ("question", "answer")} for row in THEIRS])
    args = with_data(reward_model, inputs, "train_data", data, tmp_path / "out", columns=COLUMNS)
    reward_model.main(dataclasses.replace(args, demonstrations=answers))
    assert [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("--columns")] == [
        "prompt = question, chosen = good, rejected = bad; the other columns: none",
        "prompt = question, completion = answer; the other columns: none"]
    with pytest.raises(SystemExit):
        reward_model.main(dataclasses.replace(args, columns=(), output_dir=str(tmp_path / "next")))
    assert "found the columns {question, good, bad}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["train_data", "eval_data"])
def test_completion_only_needs_a_prompt(flag, inputs, tmp_path, refused):
    """Rows of text alone have no prompt to leave out; without the flag they train."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": row["prompt"] + row["completion"]} for row in ROWS])
    args = with_data(sft, inputs, flag, data, tmp_path / "out", completion_only=True)
    message = refused(sft, args)
    assert f"--completion_only: --{flag} {data} has {{text}} alone" in message and "{prompt, completion}" in message
    sft.main(dataclasses.replace(args, completion_only=False))


# ---- Sizes ------------------------------------------------------------------------------------------------


def sizes_named_in(message):
    return [int(size) for size in re.findall(r"\d+", re.split(r";", message)[-1])]


class Accepted(Exception):
    """Raised in place of the step after the size checks."""


@pytest.fixture
def stop_after_sizes(monkeypatch):
    def accepted(*_):
        raise Accepted

    for script in SCRIPTS:
        monkeypatch.setattr(script, "init_distributed", accepted)


@pytest.mark.parametrize("script", [sft, reward_model, dpo], ids=lambda script: script.__name__)
@pytest.mark.parametrize("batch_size, expected", [(8, [6, 9]), (2, [3])])
def test_batch_that_ranks_do_not_divide_names_sizes_that_work(
        script, batch_size, expected, inputs, tmp_path, monkeypatch, stop_after_sizes, refused):
    """On 3 ranks a batch size that does not divide is refused with the nearest that do, and those are accepted."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused(script, good_args(script, inputs, batch_size=batch_size, output_dir=str(tmp_path / "out")))
    assert f"--batch_size {batch_size}" in message and "3 ranks" in message
    assert sizes_named_in(message) == expected
    for size in expected:
        with pytest.raises(Accepted):
            script.main(good_args(script, inputs, batch_size=size))


@pytest.mark.parametrize("ranks, num_minibatches, batch_size, total_episodes", [
    (1, 3, 8, 100), (1, 3, 2, 100), (2, 2, 6, 100), (1, 1, 64, 10), (1, 3, 11, 11), (2, 4, 64, 60)])
def test_ppo_batch_that_does_not_divide_names_sizes_that_work(
        ranks, num_minibatches, batch_size, total_episodes, inputs, tmp_path, monkeypatch, stop_after_sizes, refused):
    """PPO names batch sizes that divide by ranks and minibatches and do not exceed the episodes; all are accepted."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    sizes = dict(num_minibatches=num_minibatches, total_episodes=total_episodes, output_dir=str(tmp_path / "out"))
    message = refused(ppo, good_args(ppo, inputs, batch_size=batch_size, **sizes))
    assert f"--batch_size {batch_size}" in message and f"--total_episodes {total_episodes}" in message
    assert sizes_named_in(message)
    for size in sizes_named_in(message):
        with pytest.raises(Accepted):
            ppo.main(good_args(ppo, inputs, batch_size=size, **sizes))


def test_offload_without_zero_names_both_flags(inputs, tmp_path, refused):
    """--offload_optimizer at ZeRO 0 is refused with the stages that it needs."""
    for script in TRAINERS:
        message = refused(script, good_args(script, inputs, offload_optimizer=True, output_dir=str(tmp_path / "out")))
        assert "--offload_optimizer" in message and "--zero_stage 2 or 3" in message


# ---- Numbers ----------------------------------------------------------------------------------------------


def numeric_flags():
    """(script, name, refused value) of each flag that is a number: one below its range, and one above if it has an end."""
    for script in SCRIPTS:
        for field in dataclasses.fields(script.Args):
            name = field.name
            if name in AT_LEAST_1:
                yield script, name, 0
            if name in AT_LEAST_0 | AT_MOST_1 | {"zero_stage"}:
                yield script, name, -1
            if name in ABOVE_0:
                yield script, name, 0
            if name in AT_MOST_1 | {"zero_stage"}:
                yield script, name, 1.5
            if name == "num_groups":
                yield script, name, 1
            if name == "label_smoothing":
                yield from [(script, name, -0.1), (script, name, 0.5)]


@pytest.mark.parametrize("script, name, value", named(numeric_flags()))
def test_number_out_of_range_is_named(script, name, value, inputs, tmp_path, refused):
    """A number that makes no sense is refused with its flag and its range."""
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{name: value}))
    assert f"--{name} {value}: must be " in message


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_number_has_a_range(script):
    """Each int or float flag is in a table of ranges, but for those that may be anything."""
    free = {"local_rank", "missing_eos_score"}
    numbers = {field.name for field in dataclasses.fields(script.Args) if field.type in (int, float, float | None)}
    ranges = AT_LEAST_1 | AT_LEAST_0 | ABOVE_0 | AT_MOST_1 | {"zero_stage", "num_groups", "label_smoothing"}
    assert numbers - free <= ranges


def test_the_numbers_of_groups_are_checked():
    """The flags that group_invariant_ppo.py has beyond ppo.py are among those above."""
    own = {field.name for field in dataclasses.fields(group_invariant_ppo.Args)
           if field.type in (int, float, float | None) and not hasattr(ppo.Args, field.name)}
    assert own == {"episodes_per_prompt", "score_clip", "num_groups", "beta_critic", "beta_policy", "group_head_lr"}
    tried = {(name, value) for script, name, value in numeric_flags() if script is group_invariant_ppo and name in own}
    assert tried == {("episodes_per_prompt", 0), ("num_groups", 1), *((name, -1) for name in own - {
        "episodes_per_prompt", "num_groups"})}


@pytest.mark.parametrize("flag, words", [
    ("group_variance", ["mass", "uniform"]), ("group_level", ["trajectory", "prompt"]),
    ("invariance_estimator", ["advantage", "exact"])])
def test_a_choice_of_groups_that_is_not_there_is_refused_with_those_that_are(flag, words, capsys):
    """By the command line itself, before anything is loaded."""
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(group_invariant_ppo.Args, args=[f"--{flag}=median"])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and flag.replace("_", "-") in errors.replace("_", "-") and "median" in errors
    assert all(word in errors for word in words)

@pytest.mark.parametrize("changes, fragments", [
    (dict(loss="kto"), ["--loss kto: unknown", "sigmoid, hinge, ipo"]),
    (dict(loss="hinge", label_smoothing=0.1), ["--label_smoothing 0.1: --loss hinge has none"])], ids=["kto", "hinge"])
def test_dpo_loss_that_is_not_there_is_named(changes, fragments, inputs, tmp_path, refused):
    """An unknown loss, or a flag that the loss does not have, is refused with what there is."""
    message = refused(dpo, good_args(dpo, inputs, output_dir=str(tmp_path / "out"), **changes))
    assert all(fragment in message for fragment in fragments)


# ---- Output folder and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_output_folder_in_use_is_left_alone(script, inputs, tmp_path, refused):
    """A folder that holds anything is refused, the line offers the ways on that there are, and its file is untouched."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out")))
    assert f"--output_dir {tmp_path / 'out'}" in message and "in use" in message
    assert ("--resume" in message) == (script in TRAINERS) and "--overwrite" in message and "another folder" in message


def test_output_folder_that_is_a_file_is_left_alone(inputs, tmp_path, refused):
    """An output folder that is a file is refused, with --overwrite too."""
    (tmp_path / "out").write_text("years of work")
    for overwrite in (False, True):
        message = refused(sft, good_args(sft, inputs, output_dir=str(tmp_path / "out"), overwrite=overwrite))
        assert str(tmp_path / "out") in message


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_overwrite_deletes_no_foreign_folder(script, inputs, tmp_path, refused):
    """--overwrite on a folder that is not a run of these scripts is refused, and its files stay."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), overwrite=True))
    assert f"--overwrite {tmp_path / 'out'}" in message and "not a run" in message
    (tmp_path / "out" / "args.json").write_text("{}")  # other programs write files of this name too
    assert "not a run" in refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), overwrite=True))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_overwrite_deletes_no_input(script, inputs, finished_runs, tmp_path, refused):
    """--overwrite of a run that holds the model, or the data, of this run is refused."""
    folder = shutil.copytree(finished_runs / "sft", tmp_path / "out")
    data = shutil.copy(inputs / "rows.jsonl", folder / "checkpoints.jsonl")
    rollouts = ("sft_model", "prompts")
    flag, data_flag = {ppo: rollouts, group_invariant_ppo: rollouts, evaluate: ("models", "prompts")}.get(
        script, ("model", "train_data"))
    for args in (good_args(script, inputs, output_dir=str(folder), overwrite=True, **{flag: str(folder)}),
                 with_data(script, inputs, data_flag, data, folder, overwrite=True)):
        message = refused(script, args)
        assert f"--overwrite {folder}" in message and "lies in it" in message


def test_resume_of_another_scripts_run_is_refused(inputs, finished_runs, tmp_path, refused):
    """--resume in the folder of another script's run says so, and lists no flags."""
    folder = shutil.copytree(finished_runs / "ppo", tmp_path / "out")
    message = refused(sft, good_args(sft, inputs, output_dir=str(folder), resume=True))
    assert "not a run of sft.py" in message and "batch_size" not in message
    message = refused(group_invariant_ppo, good_args(group_invariant_ppo, inputs, output_dir=str(folder), resume=True))
    assert "not a run of group_invariant_ppo.py" in message and "num_groups" not in message


@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
def test_resume_without_a_run_is_refused(script, exists, inputs, tmp_path, refused):
    """--resume of a folder without a run says that there is nothing to resume, and makes no folder."""
    if exists:
        (tmp_path / "out").mkdir()
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), resume=True))
    assert f"no run in {tmp_path / 'out'} to resume" in message and "--output_dir" in message


def test_resume_without_output_dir_and_runs_is_refused(inputs, tmp_path, monkeypatch, refused):
    """--resume with the default folder, and no run there, is refused in one line."""
    monkeypatch.chdir(tmp_path)
    assert "runs/sft" in refused(sft, good_args(sft, inputs, resume=True))


@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
def test_resume_of_a_complete_run_is_refused(script, inputs, finished_runs, tmp_path, refused):
    """--resume of a run that is complete says so and changes none of its files."""
    folder = shutil.copytree(finished_runs / script.__name__, tmp_path / "out")
    message = refused(script, good_args(script, inputs, output_dir=str(folder), resume=True))
    assert str(folder) in message and "complete" in message and "nothing to resume" in message


@pytest.mark.parametrize("script, flag, old, new", named([
    (sft, "lr", sft.Args.lr, 1e-5), (sft, "completion_only", False, True), (reward_model, "seed", 1, 2),
    (reward_model, "zero_stage", 0, 2), (ppo, "kl_coef", ppo.Args.kl_coef, 0.5), (ppo, "gold_function", None, "a:b"),
    (group_invariant_ppo, "beta_policy", 0.01, 0.5), (group_invariant_ppo, "dynamic_kl", True, False),
    (dpo, "beta", dpo.Args.beta, 0.5), (dpo, "ref_model", None, "assets/sft")]))
def test_resume_with_changed_flag_names_both_values(script, flag, old, new, inputs, finished_runs, tmp_path,
                                                    monkeypatch, refused):
    """--resume with another hyperparameter names the flag, its old and its new value, and no flag that is the same."""
    folder = shutil.copytree(finished_runs / script.__name__, tmp_path / "out")
    (folder / "summary.json").unlink()
    monkeypatch.setattr(ppo, "load_function", lambda *_: None)
    changes = {flag: new, "save_every": 3, "timeout_minutes": 5.0}  # the last two may change
    message = refused(script, good_args(script, inputs, output_dir=str(folder), resume=True, **changes))
    assert f"(--{flag} {old} -> {new})" in message and "--output_dir" in message


def test_resume_on_another_number_of_ranks_is_refused(inputs, finished_runs, tmp_path, monkeypatch, refused):
    """--resume on another number of ranks names both numbers."""
    folder = shutil.copytree(finished_runs / "sft", tmp_path / "out")
    (folder / "summary.json").unlink()
    record = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**record, "world_size": 8}))
    assert "world_size 8 -> 1" in refused(sft, good_args(sft, inputs, output_dir=str(folder), resume=True))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_bad_input_is_found_before_overwriting(script, inputs, finished_runs, tmp_path, refused):
    """With --overwrite, an earlier run is still there when the input turns out to be bad."""
    folder = shutil.copytree(finished_runs / script.__name__, tmp_path / "out")
    flag = "prompts" if hasattr(script.Args, "prompts") else "train_data"
    args = with_data(script, inputs, flag, tmp_path / "gone.jsonl", folder, overwrite=True)
    assert "no such file" in refused(script, args)


# ---- Reward functions -------------------------------------------------------------------------------------

JUDGES = '''
def one_too_few(queries, responses):
    return [1.0] * (len(queries) - 1)

def not_a_number(queries, responses):
    return [float("nan") if query == "He had" else 0.0 for query in queries]

def skips_a_query(queries, responses):
    return [1.0 for query in queries if query != "He had"]

def none_for_a_query(queries, responses):
    return [None if query == "He had" else 0.0 for query in queries]

def forgets_to_return(queries, responses):
    pass

def words(queries, responses):
    return ["good" for _ in queries]

def dislikes_houses(queries, responses):
    return [1 / ("He had" not in query) for query in queries]
'''


@pytest.fixture
def judges(tmp_path, monkeypatch):
    """A module `bad_input_judges` on the import path."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "bad_input_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr("sys.dont_write_bytecode", True)


JUDGE_FLAGS = [(ppo, "reward_function"), (ppo, "gold_function"), (group_invariant_ppo, "reward_function"),
               (dpo, "gold_function"), (evaluate, "judges")]


def test_judge_is_not_called_without_responses():
    """A rank that has no response asks no judge, which might fail on an empty list."""
    assert call_judge(lambda queries, responses: 1 / 0, "--gold_function", [], []) == []


@pytest.mark.parametrize("script, flag", named(JUDGE_FLAGS))
@pytest.mark.parametrize("spec", ["no_such_module:score", "bad_input_judges:no_such_function", "bad_input_judges"])
def test_judge_that_cannot_be_imported_is_named(script, flag, spec, inputs, tmp_path, judges, refused):
    """A judge that cannot be imported is named with its flag and how to write it."""
    message = refused(script, good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: spec}))
    assert f"--{flag} {spec}" in message and "module:function" in message


@pytest.mark.parametrize("script, flag", named(JUDGE_FLAGS))
@pytest.mark.parametrize("name, fragments", [
    ("dislikes_houses", ["query 'He had'", "ZeroDivisionError"]), ("words", ["could not convert", "'good'"]),
    ("one_too_few", ["returned 1 scores for 2 responses"]), ("skips_a_query", ["scores for", "query 'He had'"]),
    ("none_for_a_query", ["NoneType", "query 'He had'"]), ("forgets_to_return", ["NoneType", "query '"]),
    ("not_a_number", ["returned nan", "query 'He had'"])])
def test_judge_that_fails_names_the_row(script, flag, name, fragments, inputs, tmp_path, judges, refused):
    """A judge that raises, or returns no numbers or too few, is named with the first row for which it does so alone."""
    args = good_args(script, inputs, output_dir=str(tmp_path / "out"), **{flag: f"bad_input_judges:{name}"})
    message = refused(script, args, may_write=True)
    assert message.startswith(f"error: --{flag}") and all(fragment in message for fragment in fragments)


@pytest.mark.parametrize("script, flag", named(JUDGE_FLAGS))
def test_judge_that_always_fails_is_found_before_overwriting(
        script, flag, inputs, finished_runs, tmp_path, judges, refused):
    """With --overwrite, an earlier run is still there when the judge turns out to return too few scores."""
    folder = shutil.copytree(finished_runs / script.__name__, tmp_path / "out")
    changes = {flag: "bad_input_judges:one_too_few"}
    refused(script, good_args(script, inputs, output_dir=str(folder), overwrite=True, **changes))
