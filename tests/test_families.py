"""GPT-NeoX, GPT-2, Llama, Qwen2, Mistral and Gemma-2: decoding, padding, saving, and the four scripts in a row."""

import contextlib
import copy
import io
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import BertConfig, BloomConfig, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig
from transformers import Qwen2Config

import dpo
import group_invariant_ppo
import ppo
import reward_model
import sft
from utils.data import pad
from utils.models import load_causal_lm, load_classifier, load_tokenizer, save_model

EOS, PAD = 0, 1
SIZES = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=EOS,
             eos_token_id=EOS, pad_token_id=PAD, initializer_range=0.2)  # weights so large that wrong numbers show
NEWER = dict(SIZES, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128)
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=64, max_position_embeddings=128),
    "gpt2": GPT2Config(**SIZES, n_positions=128),
    "llama": LlamaConfig(**NEWER),
    "qwen2": Qwen2Config(**NEWER, tie_word_embeddings=True),
    "mistral": MistralConfig(**NEWER, sliding_window=8),
    "gemma2": Gemma2Config(**NEWER, head_dim=8, sliding_window=8),
}
TIED = {"gpt2", "qwen2", "gemma2"}
FORBIDDEN = torch.arange(1024) == PAD


def save_random(folder, config, num_labels=None):
    """A random model of this configuration in a folder, with the tokenizer of assets/base."""
    auto_class, config = AutoModelForCausalLM, copy.deepcopy(config)
    if num_labels:
        auto_class, config.num_labels = AutoModelForSequenceClassification, num_labels
    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "assets" / "base").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=CONFIGS)
def family(request, tmp_path_factory):
    """A family's name, and its folder with a random language model in lm/ and a random classifier in rm/."""
    folder = tmp_path_factory.mktemp(request.param)
    save_random(folder / "lm", CONFIGS[request.param])
    save_random(folder / "rm", CONFIGS[request.param], num_labels=1)
    return SimpleNamespace(name=request.param, folder=folder)


@pytest.fixture
def lm(family):
    return load_causal_lm(str(family.folder / "lm"), "--model", load_tokenizer(str(family.folder / "lm"), "--model")
                          ).eval()


@pytest.fixture
def classifier(family):
    return load_classifier(str(family.folder / "rm"), "--model", load_tokenizer(str(family.folder / "rm"), "--model")
                           ).eval()


def random_rows(*lengths):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, 1024, (length,), generator=generator).tolist() for length in lengths]


def plain_logits(model, ids):
    """Logits (T, V) of one row by the model's own forward: no padding, no cache, no mask, no position ids."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


# ---- Numbers ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_generate_equals_full_forwards_of_each_row(lm, monkeypatch):
    """Decoding with cache, left pads and rows that end at different steps draws each row's own tokens and logits."""
    queries = random_rows(3, 11, 7, 1, 10, 6, 12, 2)
    ids, mask = pad(queries, PAD, "left")
    eos_ids = torch.arange(0, 1024, 16)  # one token in sixteen ends a row
    noise = torch.rand(8, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    steps, draw = [], ppo.inverse_cdf
    monkeypatch.setattr(ppo, "inverse_cdf", lambda logits, u: steps.append(logits.clone()) or draw(logits, u))
    responses = ppo.generate(lm, ids, mask, noise, 0.7, 1.0, 1.0, FORBIDDEN, eos_ids, PAD)
    _, lengths, _ = ppo.truncate_at_eos(responses, eos_ids, PAD)
    assert len(set(lengths.tolist())) >= 3 and lengths.max() > 8, lengths  # beyond the sliding window
    for row, (query, length) in enumerate(zip(queries, lengths.tolist())):
        response = responses[row, :length].tolist()
        logits = ppo.scale_logits(plain_logits(lm, query + response)[len(query) - 1 : -1], 0.7, FORBIDDEN)
        found = torch.stack([steps[t][(lengths[:row] > t).sum()] for t in range(length)])  # rows alive at t, in order
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
        assert draw(logits, noise[row, :length]).tolist() == response
        assert (responses[row, length:] == PAD).all()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_numbers(lm, classifier, side):
    """Logits of sft.py and ppo.py, and values, equal those of each row alone, whichever side is padded."""
    rows = random_rows(4, 13, 9)  # the last 4 columns are the response where rows are padded left
    ids, mask = pad(rows, PAD, side)
    whole = sft.forward_logits(lm, ids, mask.long())
    response = ppo.response_logits(lm, ids, mask, 3, 0.7, FORBIDDEN)
    values = ppo.ScalarModel(classifier)(ids, mask)
    for i, row in enumerate(rows):
        alone = plain_logits(lm, row)
        torch.testing.assert_close(whole[i][mask[i]], alone, rtol=0, atol=1e-4)
        hidden = classifier.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
        torch.testing.assert_close(values[i][mask[i]], classifier.score(hidden)[0, :, 0], rtol=0, atol=1e-4)
        if side == "left" or len(row) == 13:
            expected = ppo.scale_logits(alone[-4:-1], 0.7, FORBIDDEN)
            torch.testing.assert_close(response[i], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_group_head_reads_the_last_state_of_each_row_or_of_its_query(classifier):
    """Left-padded rows: the critic's states are those of each row alone, `back` tokens before its end; its values are
    those of ppo.py's critic in other units, and the head fits the states."""
    rows, back = random_rows(4, 13, 9), torch.tensor([0, 5, 8])
    ids, mask = pad(rows, PAD, "left")
    critic, values = group_invariant_ppo.GroupCritic(classifier), ppo.ScalarModel(classifier)(ids, mask)
    found, states = critic(ids, mask, back)
    assert torch.equal(found, values)
    for row, length, state in zip(rows, back.tolist(), states):
        hidden = classifier.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
        torch.testing.assert_close(state, hidden[0, len(row) - 1 - length], rtol=0, atol=1e-4)
    critic.units = 0.5, 2.0
    torch.testing.assert_close(critic(ids, mask, back)[0], (values - 0.5) / 2)
    labels = group_invariant_ppo.GroupHead(classifier.score.in_features, 3, seed=1)(states)
    assert labels.shape == (3, 3) and len(set(labels.flatten().tolist())) == 9


@torch.no_grad()
def test_response_logits_of_padded_responses(lm):
    """Left-padded queries before right-padded responses: the logits of each token equal those of the row alone."""
    queries, responses = random_rows(3, 11, 7), random_rows(5, 2, 4)
    query_ids, query_mask = pad(queries, PAD, "left")
    response_ids, response_mask = pad(responses, PAD, "right")
    ids, mask = torch.cat([query_ids, response_ids], 1), torch.cat([query_mask, response_mask], 1)
    logits = ppo.response_logits(lm, ids, mask, 5, 0.7, FORBIDDEN)
    for i, (query, response) in enumerate(zip(queries, responses)):
        alone = ppo.scale_logits(plain_logits(lm, query + response)[len(query) - 1 : -1], 0.7, FORBIDDEN)
        torch.testing.assert_close(logits[i, : len(response)], alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_rows_of_a_pack_are_blind_to_each_other(lm):
    """Rows within the attention window have in a pack the logits that they have alone."""
    rows = random_rows(8, 3, 7, 5)
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    ids, segments, _ = sft.collate([[(row, 0, {}) for row in rows], [(rows[1], 0, {})]], tokenizer, False, "cpu")
    logits = sft.forward_logits(lm, ids, segments)
    for number, row in enumerate(rows, 1):
        torch.testing.assert_close(logits[0][segments[0] == number], plain_logits(lm, row), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1, :3], plain_logits(lm, rows[1]), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("share_prefix", [False, True], ids=["plain", "shared"])
def test_dpo_logprobs_of_padded_pairs(lm, share_prefix):
    """Pairs of all sizes, left-padded, two rows or one: each response has the log-probability of its row alone."""
    parts = random_rows(6, 2, 1, 3, 5, 2, 1, 1, 3)  # prompt, chosen, rejected of each; within the attention window
    pairs = [dpo.Pair(*parts[i : i + 3], {}) for i in (0, 3, 6)]
    logprobs = dpo.pair_logprobs(lm, [*pairs, None], dpo.Args(share_prefix=share_prefix), "cpu")
    for i, (prompt, *responses, _) in enumerate(pairs):
        for side, response in enumerate(responses):
            alone = plain_logits(lm, prompt + response)[len(prompt) - 1 : -1].log_softmax(-1)
            expected = alone[range(len(response)), response].sum()
            torch.testing.assert_close(logprobs[side, i], expected, rtol=1e-4, atol=0)
    assert logprobs[:, 3].tolist() == [0, 0]


@torch.no_grad()
def test_scores_of_a_pair_with_one_beginning(classifier):
    """reward_model.py --share_prefix: pairs of all sizes in one row each have the scores of their rows alone."""
    parts = random_rows(6, 2, 1, 3, 5, 2, 1, 1, 3)  # beginning, chosen, rejected of each; within the attention window
    pairs = [(start + chosen, start + rejected, {}) for start, chosen, rejected in (parts[:3], parts[3:6], parts[6:])]
    model, args = reward_model.PackedScalarModel(classifier), reward_model.Args(share_prefix=True)
    scores = reward_model.pair_scores(model, [*pairs, None], PAD, args, "cpu")
    for i, pair in enumerate(pairs):
        for side in (0, 1):
            hidden = classifier.base_model(input_ids=torch.tensor([pair[side]]), use_cache=False).last_hidden_state
            torch.testing.assert_close(scores[side, i], classifier.score(hidden)[0, -1, 0], rtol=0, atol=1e-4)


def test_packs_of_rows_beyond_the_attention_window_are_refused(tmp_path, capsys):
    """A pack's mask would replace the sliding window of Mistral: one line says so."""
    folder = save_random(tmp_path / "lm", CONFIGS["mistral"])
    with pytest.raises(SystemExit):
        sft.main(sft.Args(model=str(folder), output_dir=str(tmp_path / "out"), pack_length=128))
    assert "this model attends to 8 tokens" in only_error(capsys)


# ---- Saving -----------------------------------------------------------------------------------------------


def engine_of(module):
    """What save_model asks of a DeepSpeed engine below ZeRO 3."""
    return SimpleNamespace(module=module, zero_optimization_stage=lambda: 0)


@torch.no_grad()
def test_a_saved_language_model_is_reloaded_by_transformers(lm, family, tmp_path):
    """AutoModelForCausalLM gives the logits that were saved; tied weights are saved once and stay tied."""
    for param in lm.parameters():
        param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(2)))
    save_model(engine_of(lm), lm, AutoTokenizer.from_pretrained(family.folder / "lm"), tmp_path)
    again, loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    row, = random_rows(12)
    assert torch.equal(plain_logits(again.eval(), row), plain_logits(lm, row))
    is_tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert is_tied == (family.name in TIED)
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert saved == sum(param.numel() for param in again.parameters())  # parameters() has a tied weight once


@torch.no_grad()
def test_a_saved_reward_model_is_reloaded_by_transformers(classifier, family, tmp_path):
    """AutoModelForSequenceClassification gives the score that ours had, plus reward_mean, which stays in its config."""
    classifier.config.reward_mean = 0.75
    model = ppo.ScalarModel(classifier)
    save_model(engine_of(model), classifier, AutoTokenizer.from_pretrained(family.folder / "rm"), tmp_path)
    again, loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and again.config.reward_mean == 0.75
    ids, mask = pad(random_rows(12, 5), PAD, "right")
    scores = again.eval()(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(ppo.at_last_token(model(ids, mask), mask), scores - 0.75, rtol=0, atol=1e-5)


# ---- The scripts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Six demonstrations and six pairs."""
    folder = tmp_path_factory.mktemp("data")
    for source, name in (("train.jsonl", "rows.jsonl"), ("preferences_train.jsonl", "pairs.jsonl")):
        lines = (ROOT / "assets" / "data" / source).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:6]), encoding="utf-8")
    return str(folder / "rows.jsonl"), str(folder / "pairs.jsonl")


def sft_args(model, rows, out):
    return sft.Args(model=str(model), train_data=rows, eval_data=rows, epochs=1, batch_size=3, num_samples=2,
                    response_length=4, warmup_ratio=0.0, lr=1e-3, output_dir=str(out))


def reward_model_args(model, rows, pairs, out):
    return reward_model.Args(model=str(model), train_data=pairs, eval_data=(pairs,), demonstrations=rows, batch_size=3,
                             warmup_ratio=0.0, lr=1e-3, output_dir=str(out))


def ppo_args(sft_model, rm, rows, out):
    return ppo.Args(sft_model=str(sft_model), reward_model=str(rm), prompts=rows, eval_prompts=rows, temperature=1.0,
                    total_episodes=8, batch_size=4, micro_batch_size=2, response_length=8, num_ppo_epochs=2, lr=1e-3,
                    critic_lr=1e-3, missing_eos_score=None, output_dir=str(out))


def dpo_args(model, rows, pairs, out):
    return dpo.Args(model=str(model), train_data=pairs, eval_data=(pairs,), eval_prompts=rows, gold_function=None,
                    epochs=1, batch_size=3, response_length=4, warmup_ratio=0.0, lr=1e-3,
                    ref_cache=str(out.with_name("ref_logprobs")), output_dir=str(out))


def share_changed(folder, start):
    """How many of the tensors that two saved models have in common differ, as a share."""
    a, b = load_file(folder / "model.safetensors"), load_file(start / "model.safetensors")
    common = a.keys() & b.keys()
    return sum(not torch.equal(a[name], b[name]) for name in common) / len(common)


def test_the_four_scripts_run_in_a_row(family, data, tmp_path):
    """All four scripts train every family: the weights move, reward_mean reaches the critic."""
    rows, pairs = data
    with contextlib.redirect_stdout(io.StringIO()):
        sft.main(sft_args(family.folder / "lm", rows, tmp_path / "sft"))
        reward_model.main(reward_model_args(tmp_path / "sft", rows, pairs, tmp_path / "rm"))
        ppo.main(ppo_args(tmp_path / "sft", tmp_path / "rm", rows, tmp_path / "ppo"))
        dpo.main(dpo_args(tmp_path / "sft", rows, pairs, tmp_path / "dpo"))
    for name, start in (("sft", family.folder / "lm"), ("rm", tmp_path / "sft"), ("ppo", tmp_path / "sft"),
                        ("ppo/critic", tmp_path / "rm"), ("dpo", tmp_path / "sft")):
        assert share_changed(tmp_path / name, start) > 0.9, name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("rm", "ppo/critic")]
    assert configs[0]["reward_mean"] == configs[1]["reward_mean"] != 0
    assert configs[0]["model_type"] == family.name
    summary = json.loads((tmp_path / "sft" / "summary.json").read_text())
    assert summary["after"]["eval/loss"] < summary["before"]["eval/loss"]


# ---- Other families ---------------------------------------------------------------------------------------


def only_error(capsys):
    """The single line that a failing script leaves on stderr."""
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


BERT = BertConfig(vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
BLOOM = BloomConfig(vocab_size=1024, hidden_size=32, n_layer=2, n_head=2)


@pytest.mark.parametrize("config, script, reason", [
    (BERT, sft, "is of an encoder family"), (BERT, reward_model, "has no linear `score` head"),
    (BERT, ppo, "is of an encoder family"), (BLOOM, sft, "takes no position_ids"),
    (BLOOM, reward_model, "takes no position_ids"), (BLOOM, ppo, "takes no position_ids"),
    (BERT, dpo, "is of an encoder family"), (BLOOM, dpo, "takes no position_ids"),
], ids=lambda x: getattr(x, "model_type", None) or getattr(x, "__name__", "refused"))
def test_a_family_that_cannot_work_ends_in_one_line(config, script, reason, data, tmp_path, capsys):
    """An encoder would see the tokens that it predicts, BLOOM ignores position ids: each script refuses both."""
    model, out = save_random(tmp_path / "lm", config), tmp_path / "out"
    args = {sft: lambda: sft_args(model, data[0], out), reward_model: lambda: reward_model_args(model, *data, out),
            ppo: lambda: ppo_args(model, "assets/reward_model", data[0], out),
            dpo: lambda: dpo_args(model, *data, out)}[script]()
    with pytest.raises(SystemExit):
        script.main(args)
    assert reason in only_error(capsys)
    assert not out.exists()


def test_a_classifier_without_score_head_is_no_reward_model(data, tmp_path, capsys):
    """ppo.py with BERT as its reward model ends in one line."""
    rm = save_random(tmp_path / "rm", BERT, num_labels=1)
    with pytest.raises(SystemExit):
        ppo.main(ppo_args("assets/sft", rm, data[0], tmp_path / "out"))
    assert "--reward_model" in (line := only_error(capsys)) and "has no linear `score` head" in line
