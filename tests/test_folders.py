"""Model folders made elsewhere: PAD that is EOS, heads with a bias, classifiers with several labels."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForSequenceClassification, LlamaConfig
from transformers import Qwen2Config

import evaluate
import group_invariant_ppo
import ppo
import reward_model
import sft
from utils.data import pad
from utils.launch import allowed
from utils.models import check_vocabulary, forbidden_tokens, load_causal_lm, load_classifier, load_tokenizer
from utils.models import load_tokenizers, other_tokenizer

EOS, PAD = 0, 1000  # PAD: the first id after the 1,000 tokens of assets/base
UNUSED = "<|finetune_right_pad_id|>"  # the name of PAD of assets/base here: a token that looks made for padding
ROWS = [{"prompt": "She was", "completion": " happy.", "chosen": " happy.", "rejected": " tired of it."},
        {"prompt": "He had", "completion": " a house.", "chosen": " friends.", "rejected": " no, none"}]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, bos_token_id=EOS,
             eos_token_id=EOS, pad_token_id=EOS, max_position_embeddings=128, initializer_range=0.2)
CONFIGS = {"gpt_neox": GPTNeoXConfig(**SIZES), "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
           "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)}


def save_tokenizer(folder, pad_token="<|endoftext|>"):
    """The tokenizer of assets/base with another PAD, or None, and without a token [PAD]."""
    shutil.copytree(ROOT / "assets" / "base", folder, dirs_exist_ok=True, ignore=lambda _, names: [
        name for name in names if not name.startswith("token")])
    for file in folder.glob("token*"):
        file.write_text(file.read_text(encoding="utf-8").replace("[PAD]", UNUSED), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(folder)
    return tokenizer


def save(folder, family="gpt_neox", vocab_size=1000, num_labels=None, pad_token="<|endoftext|>", seed=0):
    """A random model whose config has PAD = EOS, with such a tokenizer."""
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), "vocab_size": vocab_size})
    auto_class = AutoModelForCausalLM
    if num_labels:
        auto_class, config.num_labels = AutoModelForSequenceClassification, num_labels
    torch.manual_seed(seed)
    auto_class.from_config(config).save_pretrained(folder)
    save_tokenizer(folder, pad_token)
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2))
    return str(file)


@pytest.fixture
def refused(capsys):
    def only_error(call):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            call()
        line, = capsys.readouterr().err.splitlines()
        return line
    return only_error


# ---- PAD = EOS --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_token, was", [("<|endoftext|>", "its PAD <|endoftext|> ends responses"),
                                            (None, "it has no PAD")])
def test_a_pad_of_its_own_is_added_and_said(pad_token, was, tmp_path, capsys):
    """One line says which folder and which id; an unused token that looks made for padding is left alone."""
    save_tokenizer(tmp_path, pad_token)
    tokenizer = load_tokenizer(str(tmp_path), "--model")
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("[PAD]", PAD, EOS)
    assert capsys.readouterr().out == f"{'tokenizer':<22}{tmp_path}: {was}, so [PAD] is added, id {PAD}\n"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), "--model").get_vocab() == tokenizer.get_vocab()
    assert capsys.readouterr().out == ""


def test_a_pad_that_ends_the_turns_of_the_template_is_replaced_too(tmp_path, capsys):
    """EOS is another token, and PAD ends turns: a policy that may not draw PAD would never stop."""
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<|im_end|>"})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), "--model").pad_token == "[PAD]"
    assert "its PAD <|im_end|> ends responses" in capsys.readouterr().out


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("vocab_size, rows", [(1000, 1001), (1024, 1024)])
def test_the_embedding_grows_only_where_the_id_does_not_fit(family, vocab_size, rows, tmp_path):
    """Old rows stay; new ones have the spread of the family's initialisation, and policy, reference in bf16 (as
    DeepSpeed rounds the policy) and a second load have the same ones. PAD and rows without a token are not sampled."""
    folder = save(tmp_path / "lm", family, vocab_size)
    stored = {name: weight + ("embed" in name or "lm_head" in name)  # rows with a mean of 1, which new ones have not
              for name, weight in load_file(tmp_path / "lm" / "model.safetensors").items()}
    save_file(stored, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load_tokenizer(folder, "--model")
    policy = load_causal_lm(folder, "--model", tokenizer).eval()
    torch.manual_seed(5)  # what was drawn in between decides nothing
    again = load_causal_lm(folder, "--model", tokenizer)
    reference = load_causal_lm(folder, "--model", tokenizer, bf16=True).eval()
    embedding, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
    assert embedding.shape == head.shape == (rows, 32) and policy.config.vocab_size == rows
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert torch.equal(weight.bfloat16(), reference.state_dict()[name]), name
    old = next(weight for name, weight in stored.items() if "embed" in name and "out" not in name)
    assert torch.equal(embedding[: len(old)], old)
    if rows > vocab_size:
        assert abs(embedding[PAD].mean()) < 0.2 and 0.1 < embedding[PAD].std() < 0.3  # 0 and 0.2 by the config
    forbidden = forbidden_tokens(tokenizer, rows)
    assert forbidden[PAD:].all() and not forbidden[:PAD].any()  # EOS can be sampled


def test_reward_model_and_critic_have_the_same_new_row(tmp_path):
    folder = save(tmp_path, "llama", num_labels=1)
    tokenizer = load_tokenizer(folder, "--model")
    critic, judge = (load_classifier(folder, "--model", tokenizer, bf16).get_input_embeddings().weight
                     for bf16 in (False, True))
    assert critic.shape == (1001, 32) and torch.equal(critic.bfloat16(), judge)


@pytest.mark.parametrize("load, num_labels", [(load_causal_lm, None), (load_classifier, 1)])
def test_the_row_of_eos_learns(load, num_labels, tmp_path):
    """torch gives the row of an embedding's padding_idx no gradient: that was EOS in these folders."""
    folder = save(tmp_path, "llama", num_labels=num_labels)
    tokenizer = load_tokenizer(folder, "--model")
    model = load(folder, "--model", tokenizer)
    model.base_model(input_ids=torch.tensor([[5, EOS]])).last_hidden_state.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[EOS].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_read_at_eos(family, tmp_path, capsys):
    """ppo.py and evaluate.py agree with a row without padding; what other tools would read is said."""
    folder = save(tmp_path, family, num_labels=1)
    tokenizer = load_tokenizer(folder, "--judges")
    classifier = load_classifier(folder, "--judges", tokenizer).eval()
    assert "PAD is EOS in its config, so other tools read its score one token before EOS" in capsys.readouterr().out
    prompts, responses = ["She was", "He"], [" happy and tired.", " had"]
    sequences = [tokenizer(a).input_ids + tokenizer(b).input_ids + [EOS] for a, b in zip(prompts, responses)]
    alone = [classifier.score(classifier.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item()
             for ids in sequences]
    args = evaluate.Args(micro_batch_size=2)
    found = evaluate.reward_scores(classifier, tokenizer, "--judges", prompts, responses, args, torch.device("cpu"))
    assert found == pytest.approx(alone, abs=1e-4)
    ids, mask = pad(sequences, tokenizer.pad_token_id, "right")
    assert ppo.at_last_token(ppo.ScalarModel(classifier)(ids, mask), mask).tolist() == pytest.approx(alone, abs=1e-4)


def test_an_original_and_what_was_made_from_it_have_one_vocabulary(tmp_path):
    """Whichever of the two was saved by us, with [PAD], and whether the original's PAD was EOS or missing."""
    for name, pad_token in (("same", "<|endoftext|>"), ("none", None), ("ours", "<|endoftext|>")):
        save(tmp_path / name, pad_token=pad_token)
    ours = load_tokenizer(str(tmp_path / "ours"), "--model")
    ours.save_pretrained(tmp_path / "ours")
    paths = [str(tmp_path / name) for name in ("same", "none", "ours")]
    for path in paths:
        tokenizer = load_tokenizer(path, "--sft_model")
        for other in paths:
            check_vocabulary(other, "--ref_model", tokenizer, path)
            args = SimpleNamespace(reward_model=other, sft_model=path, retokenize=False)
            assert other_tokenizer(args, tokenizer, load_tokenizer(other, "--reward_model")) is None
        assert len(load_tokenizers(paths, path)) == 3


def special_ids(folder):
    """(bos, eos, pad) of each part of a folder, as plain transformers reads it."""
    parts = [AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)]
    if (folder / "generation_config.json").exists():
        parts.append(GenerationConfig.from_pretrained(folder))
    return [(part.bos_token_id, part.eos_token_id, part.pad_token_id) for part in parts]


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_chain_of_scripts_from_such_folders_saves_ids_that_agree(family, rows, tmp_path):
    """SFT, reward model, PPO with its critic and best/, the group-invariant one: config, tokenizer and generation
    config name the same ids, and plain transformers reads all of it."""
    save(tmp_path / "base", family)
    sft.main(sft.Args(model=str(tmp_path / "base"), train_data=rows, eval_data=rows, epochs=1, batch_size=4,
                      num_samples=2, response_length=2, output_dir=str(tmp_path / "sft")))
    reward_model.main(reward_model.Args(
        model=str(tmp_path / "sft"), train_data=rows, eval_data=(rows,), demonstrations=rows, batch_size=4,
        output_dir=str(tmp_path / "rm")))
    shutil.copytree(tmp_path / "base", tmp_path / "original")
    for script, name, policy in ((ppo, "ppo", "original"), (group_invariant_ppo, "group", "sft")):
        script.main(script.Args(  # a policy with PAD = EOS, a reward model that we saved, with [PAD]
            sft_model=str(tmp_path / policy), reward_model=str(tmp_path / "rm"), prompts=rows, eval_prompts=rows,
            gold_function=None, batch_size=4, total_episodes=8, response_length=4, eval_every=1,
            output_dir=str(tmp_path / name)))
    folders = {tmp_path / "sft": 3, tmp_path / "rm": 2}
    for name in ("ppo", "group"):
        folders |= {tmp_path / name: 3, tmp_path / name / "best": 3, tmp_path / name / "critic": 2}
    for folder, parts in folders.items():
        assert special_ids(folder) == [(None, EOS, PAD)] * parts, folder
        auto_class = AutoModelForCausalLM if parts == 3 else AutoModelForSequenceClassification
        model, loaded = auto_class.from_pretrained(folder, output_loading_info=True)
        assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.get_input_embeddings().num_embeddings == 1001


def test_the_generation_config_keeps_further_ends_and_names_eos(tmp_path):
    """Its own stop tokens stay; the tokenizer's EOS, which ends responses in all scripts, is among them."""
    folder = save(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom|>"]})
    tokenizer.save_pretrained(folder)
    eom = tokenizer.convert_tokens_to_ids("<|eom|>")
    for stored, saved in ((eom, [EOS, eom]), ([eom, EOS], [EOS, eom]), (EOS, EOS), (None, EOS)):
        GenerationConfig(eos_token_id=stored, pad_token_id=EOS).save_pretrained(folder)
        model = load_causal_lm(folder, "--model", load_tokenizer(folder, "--model"))
        assert model.generation_config.eos_token_id == saved and model.config.eos_token_id == EOS


# ---- Heads ------------------------------------------------------------------------------------------------


def with_bias(folder, bias, reward_mean=0.25, shards=False, pickled=False):
    """Give the head of a saved classifier a bias, and its config a reward_mean."""
    state = {**load_file(folder / "model.safetensors"), "score.bias": torch.tensor([bias])}
    (folder / "model.safetensors").unlink()
    if shards:
        parts = {"model-1.safetensors": {"score.bias": state.pop("score.bias")}, "model-2.safetensors": state}
        for name, part in parts.items():
            save_file(part, folder / name, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {
            key: name for name, part in parts.items() for key in part}}))
    elif pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "reward_mean": reward_mean}))
    return str(folder)


def own_logits(folder, sequences):
    """What the model itself says of each sequence: W h + b at its last token, from the stored weights."""
    body = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).base_model.eval()
    file = next(path for path in folder.glob("*.safetensors") if "score.weight" in load_file(path))
    weight = load_file(file)["score.weight"][0]
    with torch.no_grad():
        return [float(weight @ body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]) for ids in sequences]


SEQUENCES = [[5, 9, 300, 4, EOS], [70, 8, EOS]]


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("files", ["one", "shards", "pickled"])
def test_a_bias_in_the_head_is_kept(family, files, tmp_path, capsys, monkeypatch):
    """Scores are the model's own logit, W h + b, less its reward_mean, in ppo.py and in evaluate.py."""
    folder = tmp_path / "rm"
    save(folder, family, num_labels=1)
    expected = [logit + 1.5 - 0.25 for logit in own_logits(folder, SEQUENCES)]
    monkeypatch.setitem(allowed, "pickle", files == "pickled")
    path = with_bias(folder, 1.5, shards=files == "shards", pickled=files == "pickled")
    tokenizer = load_tokenizer(path, "--reward_model")
    classifier = load_classifier(path, "--reward_model", tokenizer).eval()
    assert f"{path}: its bias 1.5 is subtracted from reward_mean, now -1.25" in capsys.readouterr().out
    ids, mask = pad(SEQUENCES, tokenizer.pad_token_id, "right")
    for script in (ppo, group_invariant_ppo, reward_model):
        values = script.ScalarModel(classifier)(ids, mask)
        assert script.at_last_token(values, mask).tolist() == pytest.approx(expected, abs=1e-4)
    texts = [tokenizer.decode(ids[:-1]) for ids in SEQUENCES]
    args = SimpleNamespace(micro_batch_size=2)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **_: SimpleNamespace(
        input_ids=SEQUENCES[texts.index(text)][:-1] if text else []))
    found = evaluate.reward_scores(classifier, tokenizer, "--judges", texts, [""] * 2, args, torch.device("cpu"))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_bias_reaches_the_critic_and_what_it_saves(zero_stage, rows, tmp_path, monkeypatch):
    """ppo.py with a rate of 0: the saved critic, as plain transformers reads it, less its reward_mean, is the score."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO 3 replaces it, for good
    save(tmp_path / "sft"), save(tmp_path / "rm", num_labels=1, seed=1)
    expected = [logit + 1.5 - 0.25 for logit in own_logits(tmp_path / "rm", SEQUENCES)]
    with_bias(tmp_path / "rm", 1.5)
    ppo.main(ppo.Args(sft_model=str(tmp_path / "sft"), reward_model=str(tmp_path / "rm"), prompts=rows,
                      eval_prompts=rows, gold_function=None, batch_size=4, total_episodes=4, response_length=4,
                      lr=1e-9, critic_lr=1e-12, zero_stage=zero_stage, output_dir=str(tmp_path / "out")))
    critic, loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out/critic", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and critic.config.reward_mean == -1.25
    again = load_classifier(str(tmp_path / "out/critic"), "--reward_model", load_tokenizer("assets/base", "--model"))
    for model in (critic, again):
        with torch.no_grad():
            logits = [model.score(model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item()
                      for ids in SEQUENCES]
        assert [logit - model.config.reward_mean for logit in logits] == pytest.approx(expected, abs=1e-4)


def test_a_new_head_takes_no_bias_over(tmp_path, capsys):
    """reward_model.py draws its head anew: the bias of the old one is not of it."""
    path = with_bias(save(tmp_path, num_labels=1) and tmp_path, 1.5)
    classifier = load_classifier(path, "--model", load_tokenizer(path, "--model"), new_head=True)
    assert classifier.config.reward_mean == 0.25 and "its bias" not in capsys.readouterr().out


def test_a_family_whose_head_has_a_bias_of_its_own(tmp_path, monkeypatch):
    """Its class reads the bias: it stays in the head. A language model of it has neither weight nor bias of a head."""
    original = GPTNeoXForSequenceClassification.__init__

    def with_native_bias(self, config):
        original(self, config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    save(tmp_path / "lm"), save(tmp_path / "rm", num_labels=1)
    expected = [logit + 1.5 - 0.25 for logit in own_logits(tmp_path / "rm", SEQUENCES)]
    monkeypatch.setattr(GPTNeoXForSequenceClassification, "__init__", with_native_bias)
    path = with_bias(tmp_path / "rm", 1.5)
    classifier = load_classifier(path, "--reward_model", load_tokenizer(path, "--reward_model")).eval()
    assert classifier.config.reward_mean == 0.25
    ids, mask = pad(SEQUENCES, PAD, "right")
    with torch.no_grad():
        values = ppo.ScalarModel(classifier)(ids, mask)
    assert ppo.at_last_token(values, mask).tolist() == pytest.approx(expected, abs=1e-4)
    lm = str(tmp_path / "lm")
    assert float(load_classifier(lm, "--model", load_tokenizer(lm, "--model"), new_head=True).score.bias) == 0.0


@pytest.mark.parametrize("script, flag, remedy", [
    (ppo, "reward_model", "Train one with reward_model.py"), (group_invariant_ppo, "reward_model", "Train one"),
    (reward_model, "model", "Give a language model"), (evaluate, "judges", "Train one with reward_model.py")],
    ids=lambda x: getattr(x, "__name__", None))
@pytest.mark.parametrize("num_labels", [2, 5])
def test_a_classifier_with_several_labels_ends_in_one_line(script, flag, remedy, num_labels, rows, tmp_path, refused):
    folder = save(tmp_path / "rm", num_labels=num_labels)
    lm = save(tmp_path / "lm")
    rollouts = dict(sft_model=lm, prompts=rows, eval_prompts=rows, gold_function=None, batch_size=4)
    args = {ppo: rollouts, group_invariant_ppo: rollouts,
            reward_model: dict(train_data=rows, eval_data=(rows,), demonstrations=rows),
            evaluate: dict(models=(lm,), ref_model=None, prompts=rows, cache=str(tmp_path / "cache"))}[script]
    value = (folder,) if flag == "judges" else folder
    line = refused(lambda: script.main(script.Args(**{**args, flag: value, "output_dir": str(tmp_path / "out")})))
    assert line.startswith(f"error: --{flag} {folder}: this is a classifier with {num_labels} labels, and a reward "
                           f"model has one. {remedy}")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_shape_end_in_one_line(tmp_path, refused):
    """A config.json of another model: the line names the weight and both shapes, not "the above report"."""
    folder = save(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**config, "vocab_size": 900}))
    tokenizer = load_tokenizer(folder, "--model")
    for load in (load_causal_lm, lambda *args: load_classifier(*args, new_head=True)):
        line = refused(lambda: load(folder, "--model", tokenizer))
        assert line.startswith(f"error: --model {folder}: its weight ") and "[1000, 32]" in line and "[900, 32]" in line
