"""dpo.py: log-probabilities are those of a slow loop, the reference never moves, a step is one mean over pairs."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, check_step, set_weights, tiny_config, watch_steps
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXForCausalLM, Lfm2Config, LlamaConfig
from transformers import MistralConfig, get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

import dpo
from utils import packing
from utils.data import permutation
from utils.models import load_causal_lm, load_tokenizer
from utils.sampling import sample_responses
from utils.tokens import encode_texts, terminator_ids

EOS, PAD = 0, 1  # of the tokenizer in assets/base
END = "<|endoftext|>"
# log-probabilities of policy and reference, chosen and rejected: h = 1.5 and -6
CASE_A = torch.tensor([[-10.0], [-12.0]]), torch.tensor([[-11.0], [-11.5]])
CASE_B = torch.tensor([[-50.0], [-40.0]]), torch.tensor([[-48.0], [-44.0]])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "assets/base"), "--model")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def mats(queries, responses):
    """The judge of these tests."""
    return [response.count(" mat") for response in responses]


WORDS = [(start, who, verb) for start in ("the", "so the", "and the") for who in ("cat", "dog", "man", "old cat")
         for verb in ("is", "was", "sat")]
PAIRS = [{"prompt": f"{start} {who}", "chosen": f" {verb}{' so' * (i % 5)} on the mat", "rejected": f" {verb} good"}
         for i, (start, who, verb) in enumerate(WORDS)]  # 36


def make_files(folder, tokenizer):
    """Two tiny random models, with a dropout that must not act, and pairs whose chosen response ends with " mat"."""
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        config = tiny_config(vocab_size=1000, initializer_range=0.1, pad_token_id=PAD, tie_word_embeddings=True,
                             hidden_dropout=0.3, attention_dropout=0.3)
        GPTNeoXForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return dict(
        model=str(folder / "model"), train_data=write_rows(folder / "train.jsonl", PAIRS[:27]),
        eval_data=(write_rows(folder / "held_out.jsonl", PAIRS[27:]),), ref_cache=None, gold_function=None,
        eval_prompts=write_rows(folder / "prompts.jsonl", [{"prompt": f"the {who}"} for who in ("cat", "old man")]))


def other(files):
    return files["model"].removesuffix("model") + "other"


def run(files, output_dir, **changes):
    dpo.main(dpo.Args(**{
        "beta": 0.1, "batch_size": 8, "micro_batch_size": 8, "epochs": 1, "lr": 2e-3, "response_length": 8, "log_every": 1,
        **files, "output_dir": str(output_dir), **changes}))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    return make_files(tmp_path_factory.mktemp("files"), tokenizer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, files):
    """One run of main, used by several tests: (files and flags, folder)."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {**files, "epochs": 6, "warmup_ratio": 0.1, "save_every": 10, "eval_every": 12, "lr": 5e-3,
             "eval_data": (*files["eval_data"], files["train_data"]), "ref_cache": str(folder / "cache"),
             "gold_function": "test_dpo:mats"}
    run(flags, folder / "dpo")
    return flags, folder / "dpo"


def train_rows(folder):
    return [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]


def tiny_model(family):
    """2 layers, vocabulary 64; GPT-2 has just the positions that the longest prompt and response of SIZES need."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    config = {"gpt_neox": tiny_config(), "gpt2": GPT2Config(**sizes, n_positions=11),
              "llama": LlamaConfig(**sizes, intermediate_size=128, num_key_value_heads=2)}[family]
    return AutoModelForCausalLM.from_config(config).eval()


SIZES = [(5, 4, 2), (1, 3, 6), (9, 1, 2), (3, 2, 8), (2, 5, 3)]  # tokens of prompt, chosen, rejected


def random_pairs(sizes=SIZES, seed=0):
    """Pairs of random tokens with EOS at the end, each with a prompt text of its own."""
    generator = torch.Generator().manual_seed(seed)
    draws = [[torch.randint(2, 60, (n,), generator=generator).tolist() for n in size] for size in sizes]
    return [dpo.Pair(prompt, chosen[1:] + [EOS], rejected[1:] + [EOS], {"prompt": f"prompt {i}"})
            for i, (prompt, chosen, rejected) in enumerate(draws)]


def slow_logprob(model, prompt, response):
    """The sum of log-probabilities of a response, token by token, from a plain forward of its sequence alone."""
    logprobs = model(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
    return sum(logprobs[t - 1, token] for t, token in enumerate(response, len(prompt)))


def slow_logprobs(model, pairs):
    """(2, N)"""
    return torch.stack([torch.stack([slow_logprob(model, pair[0], pair[side]) for pair in pairs]) for side in (1, 2)])


def logprobs_of(model, pairs, share_prefix=False):
    pairs = [dpo.Pair(*pair[:3], {}) if pair else None for pair in pairs]
    return dpo.pair_logprobs(model, pairs, dpo.Args(share_prefix=share_prefix), "cpu")


SHARED = pytest.mark.parametrize("share_prefix", [False, True], ids=["plain", "shared"])


# ---- Data -------------------------------------------------------------------------------------------------


TURN = "[TURN]"


@pytest.mark.parametrize("text, terminator", [
    (" is good", END), (f" is good{END}", END), (f" is good{END}{END}", END), (f" is good{TURN}", TURN),
    (f" is good{TURN}\n{END}", TURN), (f" is good{TURN}{TURN} ", TURN), (f" {END} is good", END), ("", END)])
def test_detail_w3_a_finished_response_has_one_terminator(text, terminator):
    """The text's own end, or else EOS, stands once at the end; a cut text has none; inside the text all stays."""
    tokenizer = load_tokenizer(str(ROOT / "assets/base"), "--model")
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.generation_eos_ids = [tokenizer.convert_tokens_to_ids(TURN)]
    body = {"": [], f" {END} is good": [*tokenizer(" ").input_ids, EOS, 322, 552]}.get(text, [322, 552])
    end = tokenizer.convert_tokens_to_ids(terminator)
    assert encode_texts("She", text, tokenizer) == (tokenizer("She").input_ids, body + [end])
    assert encode_texts("She", text, tokenizer, finished=False)[1] == body


def test_detail_w3_cut_responses_get_no_terminator(tmp_path, tokenizer):
    """chosen_finished and rejected_finished decide for their own response; without the columns both have ended."""
    columns = ({}, {"chosen_finished": False}, {"rejected_finished": False},
               {"chosen_finished": False, "rejected_finished": False, "prompt": "she"}, {"rejected_finished": True},
               {"chosen_finished": None})
    path = write_rows(tmp_path / "pairs.jsonl", [{**PAIRS[0], **changes} for changes in columns])
    pairs = dpo.load_preferences(path, "--train_data", tokenizer, dpo.Args())
    ends = [(chosen[-1] == EOS, rejected[-1] == EOS) for _, chosen, rejected, _ in pairs]
    assert ends == [(True, True), (False, True), (True, False), (False, False), (True, True), (True, True)]


def test_detail_w3_a_chat_templates_end_of_turn_is_the_terminator(tmp_path):
    """Messages end with the template's own special token, once, and the sampler stops there too."""
    tokenizer = load_tokenizer(str(ROOT / "assets/base"), "--model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[END]"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}[END]\n{% endfor %}"
    turns = [[{"role": "user", "content": "the cat"}, {"role": "assistant", "content": text}] for text in ("is", "was")]
    path = write_rows(tmp_path / "pairs.jsonl", [{"chosen": turns[0], "rejected": turns[1]}])
    eos_ids, end = terminator_ids(tokenizer), tokenizer.convert_tokens_to_ids("[END]")
    assert eos_ids == [EOS, end]
    (_, chosen, rejected, _), = dpo.load_preferences(path, "--train_data", tokenizer, dpo.Args())
    for response in (chosen, rejected):
        assert response[-1] == end and not set(response[:-1]) & set(eos_ids)


@pytest.mark.parametrize("value", ["false", 0])
def test_detail_w3_finished_must_be_true_or_false(value, tmp_path, tokenizer, capsys):
    """Anything but a boolean is refused in one line with its row and column: "false" would count as true."""
    path = write_rows(tmp_path / "pairs.jsonl", [PAIRS[0], {**PAIRS[1], "rejected_finished": value}])
    with pytest.raises(SystemExit):
        dpo.load_preferences(path, "--train_data", tokenizer, dpo.Args())
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "row 2" in error and "'rejected_finished'" in error and repr(value) in error


@pytest.mark.parametrize("bos", [False, True])
def test_detail_e1_prompt_ids_are_shared_and_never_merged(bos, tmp_path, capsys):
    """Where the joint text has other tokens, prompt ids stay the tokenizer's, BOS once, and no text is lost."""
    tokenizer = load_tokenizer(str(ROOT / "assets/base"), "--model")
    if bos:  # PAD plays the BOS
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[PAD] $A", special_tokens=[("[PAD]", PAD)])
    prompts = ("I wo", "the", "the ", "she\n", "so\n\n", "man \U0001f600", "\U0001f600 a", " ", "a\t", "no one")
    responses = ("uld not", "cat", " cat", "re\n", "\n\nis", "\U0001f600", " \U0001f600\n", "  so", ".", "n\u00e9")
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for prompt in prompts for chosen, rejected in zip(responses, responses[1:] + responses[:1])]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    pairs = dpo.load_preferences(path, "--train_data", tokenizer, dpo.Args())
    assert [row for *_, row in pairs] == rows
    merged = 0
    for prompt, chosen, rejected, row in pairs:
        assert prompt == tokenizer(row["prompt"]).input_ids and prompt.count(PAD) == bos
        for ids, side in ((chosen, "chosen"), (rejected, "rejected")):
            assert ids.count(EOS) == 1 and PAD not in ids
            assert tokenizer.decode(prompt + ids) == "[PAD]" * bos + row["prompt"] + row[side] + END
        merged += tokenizer(row["prompt"] + row["chosen"]).input_ids != prompt + chosen[:-1]
    assert merged > 10


def test_detail_w4_long_pairs_are_dropped_and_counted(tmp_path, tokenizer, capsys):
    """Pairs of exactly the limit stay whole; longer, equal and empty ones are dropped, each reason counted."""
    row, long = PAIRS[0], PAIRS[4]["chosen"]
    rows = [row, {**row, "chosen": long}, {**row, "rejected": long}, {**row, "chosen": row["rejected"]},
            {**row, "prompt": "so the cat"}, {**row, "chosen": "", "chosen_finished": False}, {**row, "prompt": ""},
            {**row, "rejected": ""}]
    prompt, chosen, rejected = (tokenizer(row[name]).input_ids for name in ("prompt", "chosen", "rejected"))
    total = len(prompt + chosen) + 1
    args = dpo.Args(max_prompt_length=len(prompt), max_length=total)
    pairs = dpo.load_preferences(write_rows(tmp_path / "pairs.jsonl", rows), "--train_data", tokenizer, args)
    assert [pair[:3] for pair in pairs] == [
        (prompt, chosen + [EOS], rejected + [EOS]), (prompt, chosen + [EOS], [EOS])]
    dropped = f"2 rows (dropped: 1 chosen equal to rejected, 2 empty, 3 over {total} tokens)"
    assert dropped in capsys.readouterr().out
    prompts = dpo.load_prompts(write_rows(tmp_path / "prompts.jsonl", rows[3:7]), "--eval_prompts", tokenizer, args)
    assert [found[:2] for found in prompts] == [(prompt, row["prompt"])] * 2
    assert f"2 rows (dropped: 1 over {len(prompt)} tokens, 1 empty)" in capsys.readouterr().out


def test_collate_pairs_by_hand():
    """Chosen rows first, then rejected ones, all ending in the last column, 0 and no PAD before them; row lengths."""
    pairs = [dpo.Pair([5, 6, 7], [8, 8, 0], [9, 0], {}), dpo.Pair([5], [0], [9], {})]
    ids, mask, lengths = dpo.collate_pairs(pairs, "cpu")
    assert ids.tolist() == [[5, 6, 7, 8, 8, 0], [0] * 4 + [5, 0], [0, 5, 6, 7, 9, 0], [0] * 4 + [5, 9]]
    assert mask.sum(1).tolist() == [6, 2, 5, 2] and mask[:, -1].all() and lengths.tolist() == [3, 1, 2, 1]
    assert [dpo.row_length(pair, shared) for pair in pairs for shared in (False, True)] == [6, 9, 2, 4]


def test_detail_w13_rows_hold_their_prompt_once(monkeypatch):
    """The row of shared_logprobs's docstring, a shorter one beside it and a None: ids, segments, positions by hand."""
    seen, original = [], packing.share_prefix
    monkeypatch.setattr(packing, "share_prefix", lambda *args: (seen.append(original(*args)), seen[0])[1])
    logprobs_of(tiny_model("gpt_neox"), [([5, 6, 7], [8, 8, 0], [9, 0], {}), ([5], [0], [9], {}), None], True)
    (ids, segments), = seen
    assert ids.tolist() == [[5, 6, 7, 8, 8, 0, 7, 9, 0], [0] * 5 + [5, 0, 5, 9], [0] * 9]
    assert segments.tolist() == [[-1, -1, 1, 1, 1, 1, 2, 2, 2], [0] * 5 + [1, 1, 2, 2], [0] * 7 + [1, 2]]
    positions = packing.packed_inputs(segments, torch.float32)["position_ids"]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4], [0] * 5 + [0, 1, 0, 1], [0] * 9]


# ---- Model ------------------------------------------------------------------------------------------------


@SHARED
@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_detail_w2_logprobs_equal_a_loop_over_tokens(family, share_prefix):
    """Each is the sum over its response's tokens, EOS included, of a sequence of its own; a None counts nothing."""
    model, pairs = tiny_model(family), random_pairs()
    logprobs = logprobs_of(model, [*pairs, None], share_prefix)
    assert logprobs[:, :5].numpy() == pytest.approx(slow_logprobs(model, pairs).numpy(), rel=1e-5)
    assert logprobs[:, 5].tolist() == [0, 0] == logprobs_of(model, [None], share_prefix)[:, 0].tolist()
    no_end = [(prompt, chosen[:-1], rejected[:-1], row) for prompt, chosen, rejected, row in pairs]
    assert (logprobs_of(model, no_end, share_prefix)[:, 0] > logprobs[:, 0] + 0.1).all()  # EOS counts


@SHARED
@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_detail_w2_logprobs_do_not_depend_on_the_batch(family, share_prefix):
    """More pads, another order, other neighbours or none: the same to 1e-5."""
    model, pairs = tiny_model(family), random_pairs()
    expected = logprobs_of(model, pairs, share_prefix)
    alone = torch.cat([logprobs_of(model, [pair], share_prefix) for pair in pairs], dim=1)
    padded = logprobs_of(model, [*pairs, ([5] * 5, [6, 7] * 3, [8, 9] * 3, {})], share_prefix)
    for other in (alone, padded[:, :5], logprobs_of(model, pairs[::-1], share_prefix).flip(1)):
        assert (other - expected).abs().max() < 1e-5 * expected.abs().max()


HAND = [([5, 6, 7], [8, EOS], [9, 10], {}), ([5, 6, 7, 8], [EOS], [9], {})]


def test_detail_w2_logits_that_count_by_hand(tiny_lm):
    """From the bf16 logits on all is fp32; each token is read one position before it, those at EOS never."""
    seen, model = [], tiny_lm.bfloat16()
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    logprobs = logprobs_of(model, HAND)
    assert seen[0].dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    p = seen[0].detach().double().log_softmax(-1)  # rows: c y EOS; b c EOS of the prompt a b c; c z z; b c z
    expected = [[p[0, 0, 8] + p[0, 1, EOS], p[1, 1, EOS]], [p[2, 0, 9] + p[2, 1, 10], p[3, 1, 9]]]
    assert logprobs.detach().numpy() == pytest.approx(np.array(expected), rel=1e-6)
    gradient, = torch.autograd.grad(logprobs.sum(), seen)
    assert (gradient.abs().sum(-1) > 0).int().tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]]


def test_detail_w13_logits_that_count_by_hand(tiny_lm):
    """In a shared row too; those of the prompt's last token, which stands twice, count twice."""
    seen, model = [], tiny_lm.bfloat16()
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    logprobs = logprobs_of(model, HAND, share_prefix=True)
    assert seen[0].dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    p = seen[0].detach().double().log_softmax(-1)  # columns c y EOS c z z, and two of the prompt, c EOS c z
    expected = [[p[0, 0, 8] + p[0, 1, EOS], p[1, 2, EOS]], [p[0, 3, 9] + p[0, 4, 10], p[1, 4, 9]]]
    assert logprobs.detach().numpy() == pytest.approx(np.array(expected), rel=1e-6)
    gradient, = torch.autograd.grad(logprobs.sum(), seen)
    assert (gradient.abs().sum(-1) > 0).int().tolist() == [[1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 1, 0]]


@SHARED
@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_detail_w13_responses_do_not_see_each_other(family, share_prefix):
    """Another rejected response leaves the chosen one's log-probability as it is, and so the other way round."""
    model, (prompt, chosen, rejected, row) = tiny_model(family), random_pairs([(4, 5, 5)])[0]
    other, longer = random_pairs([(4, 5, 7)], seed=1)[0][1:3]
    before = logprobs_of(model, [(prompt, chosen, rejected, row)], share_prefix)[:, 0]
    for changed in (other, longer):
        first = logprobs_of(model, [(prompt, chosen, changed, row)], share_prefix)[:, 0]
        second = logprobs_of(model, [(prompt, changed, rejected, row)], share_prefix)[:, 0]
        assert first[0].item() == pytest.approx(before[0].item(), rel=1e-6) and abs(first[1] - before[1]) > 0.1
        assert second[1].item() == pytest.approx(before[1].item(), rel=1e-6) and abs(second[0] - before[0]) > 0.1


@SHARED
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_detail_w13_gradient_equals_that_of_two_forwards(family, share_prefix):
    """The DPO loss of a batch has the gradient of the one of sequences one by one, to a relative norm of 1e-5."""
    model, pairs, gradients = tiny_model(family), random_pairs(), []
    reference = slow_logprobs(model, pairs).detach() + torch.linspace(-3, 3, 10).view(2, 5)
    for logprobs in (logprobs_of(model, [*pairs, None], share_prefix)[:, :5], slow_logprobs(model, pairs)):
        loss = dpo.sigmoid_losses(logprobs, reference, 0.3).mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


# ---- Losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function, options, a, b", [
    (dpo.sigmoid_losses, {}, 0.620957, 1.037488),
    (dpo.sigmoid_losses, {"label_smoothing": 0.1}, 0.635957, 0.977488),
    (dpo.hinge_losses, {}, 0.85, 1.6), (dpo.ipo_losses, {}, 12.25, 121.0)])
def test_detail_w7_w8_w9_golden_losses(function, options, a, b):
    """Two pairs with h = 1.5 and -6 at beta 0.1, to six decimals, alone and in one batch."""
    assert function(*CASE_A, 0.1, **options).tolist() == pytest.approx([a], abs=1e-6)
    both = [torch.cat(parts, dim=1) for parts in zip(CASE_A, CASE_B)]
    assert function(*both, 0.1, **options).tolist() == pytest.approx([a, b], abs=1e-6)


def test_detail_w7_gradient_is_beta_times_the_doubt():
    """dL/d log pi(chosen) = -beta sigmoid(-beta h) / B, and the opposite for the rejected response."""
    logprobs = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    logprobs.requires_grad_()
    reference = logprobs.detach().flip(1)
    dpo.sigmoid_losses(logprobs, reference, 0.3).mean().backward()
    expected = [-0.3 / (1 + math.exp(0.3 * (u - v))) / 6 for u, v in (logprobs - reference).T.tolist()]
    assert logprobs.grad[0].tolist() == pytest.approx(expected, rel=1e-9)
    assert logprobs.grad[1].tolist() == pytest.approx([-x for x in expected], rel=1e-9)


def test_preference_losses_follow_the_flags(capsys):
    """--loss, --beta and --label_smoothing decide; unknown losses and losses without smoothing end in one line."""
    def loss(case, **flags):
        args = dpo.Args(**flags)
        dpo.check_loss(args)
        return dpo.preference_losses(*case, args).item()

    assert loss(CASE_A, beta=0.2) == pytest.approx(math.log1p(math.exp(-0.3)), abs=1e-6)
    assert loss(CASE_B, beta=0.1, label_smoothing=0.1) == pytest.approx(0.977488, abs=1e-6)
    assert loss(CASE_A, beta=0.2, loss="hinge") == pytest.approx(0.7) and loss(CASE_A, beta=0.5, loss="ipo") == 0.25
    for changes, words in ((dict(loss="sigmod"), ("--loss sigmod", "sigmoid, hinge, ipo")),
                           (dict(loss="hinge", label_smoothing=0.1), ("--label_smoothing 0.1", "hinge")),
                           (dict(loss="ipo", label_smoothing=0.1), ("--label_smoothing 0.1", "ipo"))):
        with pytest.raises(SystemExit):
            loss(CASE_A, **changes)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)


# ---- Evaluation -------------------------------------------------------------------------------------------


@SHARED
@pytest.mark.parametrize("micro_batch_size", [1, 2, 100])
def test_detail_19_implicit_reward_equals_a_slow_one(micro_batch_size, share_prefix, tiny_lm):
    """Whatever the batch size and the rows: accuracy, rewards and loss are those of plain forwards."""
    pairs = random_pairs([*SIZES, (4, 6, 3), (7, 2, 2), (2, 1, 7)])
    reference = tiny_model("gpt2").requires_grad_(False)
    args = dpo.Args(beta=0.2, micro_batch_size=micro_batch_size, share_prefix=share_prefix)
    scored = dpo.score_pairs(reference, pairs, args, "cpu")
    with torch.no_grad():
        logprobs, expected = slow_logprobs(tiny_lm, pairs), slow_logprobs(reference, pairs)
    assert scored.dtype == np.float32 and scored == pytest.approx(expected.numpy(), rel=1e-5)  # in the given order
    rewards = 0.2 * (logprobs - expected)
    margins = (rewards[0] - rewards[1]).tolist()
    correct = sum(margin > 0 for margin in margins)
    metrics = dpo.evaluate_pairs(tiny_lm, pairs, scored, args)
    low, high = (metrics.pop(f"rewards/accuracies_{end}") for end in ("low", "high"))
    assert 0 < low < correct / 8 < high < 1
    assert metrics == pytest.approx({
        "loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 8, "rewards/accuracies": correct / 8,
        "rewards/chosen": rewards[0].mean().item(), "rewards/rejected": rewards[1].mean().item(),
        "rewards/margins": sum(margins) / 8, "logps/chosen": logprobs[0].mean().item(),
        "logps/rejected": logprobs[1].mean().item()}, rel=1e-4)


def test_detail_e7_ties_count_one_half():
    """Accuracy is 1 for a right pair, 0 for a wrong one, 1/2 at a tie."""
    assert dpo.accuracy([2.0, 1.0, 3.0], [1.0, 2.0, 3.0]).tolist() == [1, 0, 0.5]


def test_sample_responses_measures_lengths_by_hand(tokenizer, monkeypatch):
    """A response is as long as up to its first end, of either kind, which counts; without one it has not ended."""
    seen = {}
    output = torch.tensor([[322, 552, EOS, PAD], [322, 792, PAD, PAD], [322, 322, 322, 322]])
    monkeypatch.setattr(tokenizer, "generation_eos_ids", [792])

    def generate(input_ids, **options):
        seen.update(options, input_ids=input_ids)
        return torch.cat([input_ids, output], dim=1)

    model = SimpleNamespace(generate=generate, device="cpu")
    prompts = [([5, 6], "a", {}), ([7], "b", {}), ([8, 9, 10], "c", {})]
    rows = sample_responses(model, prompts, tokenizer, dpo.Args(response_length=4, temperature=0.4), 4, seed=1)
    assert [tuple(row.values()) for row in rows] == [
        ("a", " is good", [322, 552, EOS], 3, True), ("b", " is mat", [322, 792], 2, True),
        ("c", " is is is is", [322] * 4, 4, False)]
    assert seen["input_ids"].tolist() == [[0, 5, 6], [0, 0, 7], [8, 9, 10]]
    assert seen["attention_mask"].tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert (seen["temperature"], seen["max_new_tokens"], seen["eos_token_id"]) == (0.4, 4, [EOS, 792])
    assert (seen["do_sample"], seen["top_k"], seen["top_p"], seen["repetition_penalty"]) == (True, 0, 1.0, 1.0)


def test_distinct_starts_are_of_tokens(tokenizer, monkeypatch):
    """Chinese responses, one word each, that begin with two different characters: 2 starts of 3; no tokens in the rows."""
    texts = ["好吃的东西", "好吃的水果", "不好吃"]
    monkeypatch.setattr(dpo, "sample_responses", lambda *rest: [
        {"query": "他说", "response": text, "tokens": tokenizer(text).input_ids, "length": 9, "ended": True} for text in texts])
    assert all(len(tokenizer(text).input_ids) > 4 for text in texts)
    metrics, rows = dpo.evaluate_samples(None, [([5], "他说")] * 3, None, tokenizer, dpo.Args())
    assert metrics["eval/distinct_starts"] == 2 / 3
    assert rows[0] == {"query": "他说", "response": "好吃的东西", "length": 9, "ended": True}


# ---- Reference --------------------------------------------------------------------------------------------


def count_scoring(monkeypatch):
    """A list that grows by the model at each call of dpo.score_pairs."""
    calls, original = [], dpo.score_pairs
    monkeypatch.setattr(dpo, "score_pairs", lambda model, *rest: (calls.append(model), original(model, *rest))[1])
    return calls


def test_detail_w6_any_change_renews_the_cache(tmp_path, tiny_lm, monkeypatch):
    """Read where nothing changed; computed anew for other weights, precision, config, tokens, order or batches."""
    calls, pairs = count_scoring(monkeypatch), random_pairs()
    args = dpo.Args(ref_cache=str(tmp_path / "cache"))

    def logprobs(pairs=pairs):
        return dpo.reference_logprobs(tiny_lm, pairs, "pairs", args, "cpu")

    first = logprobs()
    assert np.array_equal(logprobs(), first) and len(calls) == 1
    first_pair, *others = pairs
    for changed in ([first_pair._replace(rejected=[9, *first_pair.rejected[1:]]), *others], others, pairs[::-1],
                    [first_pair._replace(chosen=first_pair.chosen[:-1]), *others]):
        logprobs(changed)
    for change in (lambda: next(tiny_lm.parameters()).data[7, 7].add_(0.25), tiny_lm.bfloat16, tiny_lm.float,
                   lambda: setattr(tiny_lm.config, "layer_norm_eps", 1e-3)):  # float(): the same numbers in fp32
        change()
        logprobs()
    args.micro_batch_size += 1  # other batches round otherwise
    logprobs()
    args.share_prefix = True  # and so do other rows
    logprobs()
    assert len(calls) == len(list((tmp_path / "cache").iterdir())) == 11
    args.ref_cache = None
    monkeypatch.chdir(tmp_path)
    logprobs()
    assert len(calls) == 12 and [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("damage", ["byte", "half", "empty"])
def test_detail_w6_a_damaged_cache_is_computed_again(damage, tmp_path, tiny_lm, monkeypatch, capsys):
    """A wrong byte, half a file or an empty one is named in a warning, never used, and replaced by a good one."""
    calls, pairs, args = count_scoring(monkeypatch), random_pairs(), dpo.Args(ref_cache=str(tmp_path))

    def logprobs():
        return dpo.reference_logprobs(tiny_lm, pairs, "pairs", args, "cpu")

    expected = logprobs()
    file, = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[data.index(expected.tobytes()) + 3] ^= 1  # in the numbers themselves
    file.write_bytes({"byte": data, "half": data[: len(data) // 2], "empty": b""}[damage])
    assert np.array_equal(logprobs(), expected) and len(calls) == 2
    assert f"warning: {file} is damaged" in capsys.readouterr().out
    assert np.array_equal(logprobs(), expected) and len(calls) == 2


def test_detail_w6_a_run_with_a_cache_equals_one_without(files, tmp_path, monkeypatch):
    """Live, cached and read: losses to 1e-6 and weights to 1e-5; what is read is what trains."""
    calls, rows, weights = count_scoring(monkeypatch), [], []
    cached = {**files, "ref_cache": str(tmp_path / "cache"), "ref_model": other(files), "adam_eps": 1e-4}
    for name, flags in (("live", {**cached, "ref_cache": None}), ("cached", cached), ("read", cached)):
        run(flags, tmp_path / name)
        rows.append(read_rows(tmp_path / name / "metrics.jsonl"))
        weights.append(flat(AutoModelForCausalLM.from_pretrained(tmp_path / name)))
    assert len(calls) == 2 * 3 + 1 + 2 + 0  # the policy at both ends; live: held-out pairs; cached: training pairs too
    for row in zip(*rows):
        losses = [value for figures in row for key, value in figures.items() if key.endswith("/loss")]
        assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert max((weights[0] - other).norm() for other in weights[1:]) < 1e-5 * weights[0].norm()
    for file in (tmp_path / "cache").iterdir():
        np.savez(file, array=np.load(file)["array"] + 1)
    run(cached, tmp_path / "shifted")
    live, shifted = rows[0][1], train_rows(tmp_path / "shifted")[0]
    assert shifted["rewards/chosen"] == pytest.approx(live["rewards/chosen"] - 0.1, abs=1e-5)


@pytest.mark.parametrize("changes, expected", [
    (dict(), math.log(2)), (dict(label_smoothing=0.2), math.log(2)), (dict(loss="hinge"), 1), (dict(loss="ipo"), 25)])
@pytest.mark.parametrize("bf16", [False, True])
def test_detail_w1_w5_policy_and_reference_start_as_one(changes, expected, bf16, files, tmp_path):
    """In either precision the first losses are those of h = 0, margins 0, ties 1/2, although the config has dropout."""
    run(files, tmp_path / "run", bf16=bf16, **changes)
    before, first = read_rows(tmp_path / "run/metrics.jsonl")[:2]
    assert (before["eval/held_out/loss"], first["train/loss"]) == pytest.approx((expected, expected), abs=1e-6)
    for prefix, row in (("eval/held_out/", before), ("", first)):
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        assert [row[prefix + name] for name in names] == [0, 0, 0, 0.5]


# ---- Main -------------------------------------------------------------------------------------------------


def slow_loss(name, h, beta, smoothing):
    if name == "sigmoid":
        return (1 - smoothing) * torch.log1p(torch.exp(-beta * h)) + smoothing * torch.log1p(torch.exp(beta * h))
    return (1 - beta * h).clamp(min=0) if name == "hinge" else (h - 0.5 / beta) ** 2


RUNS = {
    "defaults": dict(),
    "cdpo_rpo": dict(micro_batch_size=3, label_smoothing=0.1, nll_coef=0.5, lr_schedule="constant",
                     weight_decay=0.1, adam_eps=1e-3, max_grad_norm=0.3, warmup_ratio=0.15, beta=0.4),
    "hinge": dict(micro_batch_size=1, loss="hinge", max_grad_norm=0.0, warmup_ratio=0.2, lr=3e-4),
    "ipo": dict(micro_batch_size=5, loss="ipo", nll_coef=1.0, adam_eps=1e-5, seed=3),
    "shared": dict(micro_batch_size=3, share_prefix=True, nll_coef=0.2, weight_decay=0.2, beta=0.3)}


@pytest.mark.parametrize("case", RUNS)
def test_detail_w11_main_equals_a_plain_torch_loop(case, files, tmp_path, tokenizer, monkeypatch):
    """At the weights of each of main's 8 steps, sequences one by one have its figures and its gradient, and torch's
    AdamW makes its step of that; the last one is what main saves."""
    steps = watch_steps(monkeypatch, dpo)
    changes = {**RUNS[case], **({} if case == "defaults" else {"ref_model": other(files)})}
    run(files, tmp_path / "run", epochs=2, **changes)
    settings = SimpleNamespace(**{**dict(  # main's defaults
        beta=0.1, loss="sigmoid", label_smoothing=0.0, nll_coef=0.0, weight_decay=0.0, adam_eps=1e-8,
        max_grad_norm=1.0, warmup_ratio=0.03, lr_schedule="cosine", ref_model=files["model"], seed=1, lr=2e-3),
        **changes})
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (files["model"], settings.ref_model))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, betas=(0.9, 0.999), eps=settings.adam_eps,
                                  weight_decay=settings.weight_decay)
    warmup = math.ceil(settings.warmup_ratio * 8)
    schedule = (get_cosine_schedule_with_warmup(optimizer, warmup, 8) if settings.lr_schedule == "cosine" else
                get_constant_schedule_with_warmup(optimizer, warmup))
    pairs = [[tokenizer(row[name]).input_ids + [EOS] * (name != "prompt") for name in ("prompt", "chosen", "rejected")]
             for row in PAIRS[:27]]
    with torch.no_grad():
        fixed = slow_logprobs(reference, pairs)
    rows, norms = train_rows(tmp_path / "run"), []
    assert [row["step"] for row in rows] == [*range(1, 9)]  # 27 pairs, 8 a step: 4 steps an epoch
    for row, step in zip(rows, steps, strict=True):
        set_weights(policy, step.before)
        epoch, index = divmod(row["step"] - 1, 4)
        batch = permutation(27, settings.seed, epoch)[8 * index : 8 * index + 8]
        logprobs = slow_logprobs(policy, [pairs[i] for i in batch])
        u, v = logprobs - fixed[:, batch]
        nll = -logprobs[0].sum() / sum(len(pairs[i][1]) for i in batch)
        loss = slow_loss(settings.loss, u - v, settings.beta, settings.label_smoothing).mean() + settings.nll_coef * nll
        optimizer.zero_grad()
        loss.backward()
        norms.append(check_step(step, policy, optimizer, settings.max_grad_norm))
        loss, nll, logprobs, u, v = (x.detach() for x in (loss, nll, logprobs, u, v))
        rewards = settings.beta * u, settings.beta * v
        correct = [1.0 if x > 1e-4 else 0.5 if abs(x) < 1e-4 else 0.0 for x in (rewards[0] - rewards[1]).tolist()]
        expected = {
            "train/loss": loss, "train/nll": nll, "train/grad_norm": norms[-1], "train/lr": schedule.get_last_lr()[0],
            "rewards/chosen": rewards[0].mean(), "rewards/rejected": rewards[1].mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(), "rewards/accuracies": sum(correct) / len(correct),
            "logps/chosen": logprobs[0].mean(), "logps/rejected": logprobs[1].mean(), "train/epoch": row["step"] / 4}
        assert {name: value for name, value in row.items() if name != "step"} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, rel=1e-4, abs=1e-5)
        schedule.step()
    assert max(norms) > max(1, settings.max_grad_norm)  # so that clipping, or its absence, shows
    assert torch.equal(flat(AutoModelForCausalLM.from_pretrained(tmp_path / "run")), steps[-1].after)


@pytest.mark.parametrize("case, expected", [((CASE_A, 5), 2.620957), ((CASE_B, 20), 3.537488)])
def test_detail_w12_golden_loss_with_nll(case, expected, files, tmp_path, monkeypatch):
    """With nll_coef 1 the logged loss is the DPO loss + (- log pi of the chosen responses) / their tokens."""
    (policy, reference), tokens = case

    def stub(model, ids, *_):  # gradients are on for the policy alone
        logprobs = policy + 0 * next(model.parameters()).sum() if torch.is_grad_enabled() else reference
        return logprobs.expand(2, len(ids) // 2).flatten()

    monkeypatch.setattr(dpo, "response_logprobs", stub)
    chosen = " is" * (tokens - 1)
    rows = [{"prompt": "the cat", "chosen": chosen, "rejected": " good" * n} for n in (2, 5, 3)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    run({**files, "train_data": path}, tmp_path / "run", nll_coef=1.0, micro_batch_size=2)
    assert train_rows(tmp_path / "run")[0]["train/loss"] == pytest.approx(expected, abs=1e-6)


def test_detail_e2_weights_do_not_depend_on_micro_batches(files, tmp_path):
    """Micro-batches of 8, 3 and 1 pairs, the last batch of 3 pairs included, plain and with shared rows, end with the
    same weights to 1e-5 and have the same figures. Not at eps 1e-8, where steps of key biases' noise would differ."""
    weights, rows = [], []
    for name, changes in {"8": {}, "3": dict(micro_batch_size=3), "1": dict(micro_batch_size=1),
                          "shared": dict(micro_batch_size=3, share_prefix=True)}.items():
        run(files, tmp_path / name, **{"nll_coef": 0.5, "adam_eps": 1e-4, **changes})
        weights.append(flat(AutoModelForCausalLM.from_pretrained(tmp_path / name)))
        rows.append(read_rows(tmp_path / name / "metrics.jsonl"))
    assert all((weights[0] - other).norm() < 1e-5 * weights[0].norm() for other in weights[1:])
    for same in zip(*rows, strict=True):
        for other in same[1:]:
            figures = {key: value for key, value in other.items() if key not in SAMPLED}
            assert figures == pytest.approx({key: same[0][key] for key in figures}, rel=1e-4, abs=1e-5)


SAMPLED = ("eval/length", "eval/ended", "eval/distinct_starts")  # the noise depends on the batches


def test_main_learns_and_reports(trained):
    """Trained to prefer " mat", the policy does so on pairs it saw and did not see; the judge only watches."""
    _, folder = trained
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    for name in ("train", "held_out"):
        assert before[f"eval/{name}/rewards/accuracies"] == 0.5
        assert after[f"eval/{name}/rewards/accuracies"] > 0.9 and after[f"eval/{name}/rewards/margins"] > 1
    metrics, samples = read_rows(folder / "metrics.jsonl"), read_rows(folder / "samples.jsonl")
    assert metrics[0] == {"step": 0, **before} and metrics[-1] == {"step": 24, **after}
    assert [row["step"] for row in metrics if "eval/gold" in row] == [0, 12, 24]
    assert len(samples) == 3 * 2 and all(row["gold"] == row["response"].count(" mat") for row in samples)
    last = [row for row in samples if row["step"] == 24]
    for key in ("gold", "length", "ended"):
        assert after[f"eval/{key}"] == sum(row[key] for row in last) / 2
    assert [row["after"] for row in summary["samples"]] == [row["response"] for row in last]
    assert [row["before"] for row in summary["samples"]] == [row["response"] for row in samples[:2]]
    for name in ("args.json", "README.md", "tensorboard", "tokenizer.json", "checkpoints/step_0000020"):
        assert (folder / name).exists(), name


def test_detail_w10_learning_rates_of_a_run(trained):
    """6 epochs of 27 pairs, 8 a step, are 24 steps; a tenth of them, rounded up to 3, warms up; a cosine follows."""
    rates = [row["train/lr"] for row in train_rows(trained[1])]
    expected = [5e-3 * step / 3 for step in range(3)]
    expected += [5e-3 * math.cos(math.pi / 2 * (step - 3) / 21) ** 2 for step in range(3, 24)]
    assert rates == pytest.approx(expected, rel=1e-9) and max(rates) == rates[3] == 5e-3


def test_saved_folder_is_the_policy_that_was_evaluated(trained, tokenizer):
    """Loaded by transformers alone, the folder has the held-out log-probabilities of summary.json."""
    flags, folder = trained
    model, after = AutoModelForCausalLM.from_pretrained(folder), read_rows(folder / "metrics.jsonl")[-1]
    pairs = dpo.load_preferences(flags["eval_data"][0], "--eval_data", tokenizer, dpo.Args())
    with torch.no_grad():
        expected = slow_logprobs(model, pairs).mean(1).tolist()
    found = [after[f"eval/held_out/logps/{side}"] for side in ("chosen", "rejected")]
    assert found == pytest.approx(expected, rel=1e-5)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_saved_embedding_fits_the_tokenizer(files, tmp_path, tokenizer):
    """A model with fewer rows than the tokenizer has ids is saved with a row for each; the rest loads as it was."""
    model = load_causal_lm(files["model"], "--model", tokenizer)
    model.resize_token_embeddings(len(tokenizer) - 1)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded.append(flat(load_causal_lm(str(tmp_path / "small"), "--model", tokenizer)))
    assert torch.equal(*loaded)  # policy and reference start as one
    run({**files, "model": str(tmp_path / "small")}, tmp_path / "run", lr=0.0)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").get_input_embeddings().weight
    assert saved.shape[0] == len(AutoTokenizer.from_pretrained(tmp_path / "run")) == 1000
    assert torch.equal(saved[:-1], model.get_input_embeddings().weight)


def test_resume_ends_with_the_same_bits(trained, tmp_path, capsys):
    """Killed after step 10 and resumed, a run ends with the same weights, metrics, samples and summary."""
    flags, folder = trained
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    shutil.rmtree(killed / "checkpoints/step_0000020")
    for name in ("summary.json", "model.safetensors", "config.json"):
        (killed / name).unlink()
    (killed / "metrics.jsonl").write_text((killed / "metrics.jsonl").read_text()[:-40])  # killed while it wrote a row
    run(flags, killed, resume=True)
    steps = [line.split("/24")[0].strip() for line in capsys.readouterr().out.splitlines() if "/24  loss" in line]
    assert steps == [str(step) for step in range(11, 25)]
    for name in ("model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (killed / name).read_bytes() == (folder / name).read_bytes(), name
    first, second = (json.loads((path / "summary.json").read_text()) for path in (killed, folder))
    assert {**first, "seconds_this_process": 0} == {**second, "seconds_this_process": 0}


def test_held_out_files_of_one_name_are_kept_apart(files, tmp_path):
    """Two files pairs.jsonl in two folders have figures of their own, under names that tell which is which."""
    paths = []
    for name, rows in (("first", PAIRS[27:]), ("second", PAIRS[:3])):
        (tmp_path / name).mkdir()
        paths.append(write_rows(tmp_path / name / "pairs.jsonl", rows))
    run({**files, "eval_data": tuple(paths)}, tmp_path / "run")
    names = [key for key in read_rows(tmp_path / "run/metrics.jsonl")[-1] if key.endswith("logps/chosen")]
    assert [key.count("/") for key in names] == [3, 3] and "first" in names[0] and "second" in names[1]


@pytest.mark.parametrize("case", ["window", "convolution", "vocabulary"])
def test_models_that_cannot_be_used_are_refused(case, files, tmp_path, tokenizer, capsys):
    """With shared rows attention shorter than a row and layers that ignore the mask, always a reference with other
    tokens: one line. Plain rows need no such mask."""
    if case == "window":  # rows of 64, where 63 would do
        config = MistralConfig(vocab_size=1000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                               num_key_value_heads=2, intermediate_size=32, sliding_window=63)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        changes = dict(model=str(tmp_path / "model"), max_length=64)
        words = ("--share_prefix", "--max_length 64", "63")
    elif case == "convolution":
        config = Lfm2Config(vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                            num_key_value_heads=2, intermediate_size=32, full_attn_idxs=[1], initializer_range=0.01)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        changes, words = dict(model=str(tmp_path / "model")), ("--share_prefix", "--model", "lfm2", "mask")
    else:
        tokenizer = AutoTokenizer.from_pretrained(files["model"])
        tokenizer.add_tokens(["[more]"])
        shutil.copytree(files["model"], tmp_path / "model")
        changes, words = dict(ref_model=str(tmp_path / "model")), ("--ref_model", "vocabulary")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        run(files, tmp_path / "run", **changes, share_prefix=case != "vocabulary")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)
    assert not (tmp_path / "run").exists()
    if case == "window":
        run(files, tmp_path / "shared", **{**changes, "max_length": 63, "share_prefix": True})
        assert (tmp_path / "shared/summary.json").exists()
    if case != "vocabulary":
        run(files, tmp_path / "run", **changes)
        assert (tmp_path / "run/summary.json").exists()
