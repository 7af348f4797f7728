"""sft.py: every row ends with EOS and teaches it, padding changes nothing, the loss is a mean over tokens."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, check_step, set_weights, tiny_config, watch_steps
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaConfig
from transformers import LlamaForCausalLM, MistralConfig, get_cosine_schedule_with_warmup

import sft
from utils.data import pad, permutation
from utils.models import disable_dropout, load_causal_lm, load_tokenizer

PROMPTS = [{"prompt": "the cat", "completion": " sat on the mat"}, {"prompt": "she", "completion": " is a good man"}]
TEXTS = [{"text": "the cat sat on the mat"}, {"text": "so be it"}]
EOS, PAD = 0, 1  # of the tokenizer in assets/base


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "assets/base"), "--model")


def encode_all(rows, tokenizer):
    return [(*sft.encode_demonstration(row, tokenizer), row) for row in rows]


def collate(items, tokenizer, completion_only):
    """sft.collate of rows without packing: ids, mask (True at real tokens), labels."""
    packs = [item and [item] for item in items]
    ids, segments, labels = sft.collate(packs, tokenizer, completion_only, "cpu")
    return ids, segments > 0, labels


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_files(folder, tokenizer):
    """A tiny random model, and sentences that all end after "mat". Returns the arguments that name the three."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=1024, initializer_range=0.02, pad_token_id=PAD, tie_word_embeddings=True)
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"the {who}", "completion": f" {verb} on the {kind}mat"} for kind in ("", "old ", "good ")
            for verb in ("sat", "is", "was") for who in ("cat", "dog", "man", "old cat")]
    return dict(model=str(folder / "model"), train_data=write_rows(folder / "train.jsonl", rows[:28]),
                eval_data=write_rows(folder / "validation.jsonl", rows[28:]))


def run(files, output_dir, **changes):
    sft.main(sft.Args(**{
        **files, "output_dir": str(output_dir), "batch_size": 8, "micro_batch_size": 8, "epochs": 12, "lr": 1e-2,
        "log_every": 1, "save_every": 20, "num_samples": 8, "response_length": 12, **changes}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """One run of main, used by several tests: (files, folder)."""
    files = make_files(tmp_path_factory.mktemp("files"), tokenizer)
    folder = tmp_path_factory.mktemp("runs") / "sft"
    run(files, folder)
    return files, folder


# ---- Data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [PROMPTS, TEXTS], ids=["prompts", "texts"])
@pytest.mark.parametrize("completion_only", [False, True])
def test_detail_3_eos_is_a_target(rows, completion_only, tokenizer):
    """T3: EOS is the last real token of every row, once, and its label is counted; PAD is another token."""
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    ids, mask, labels = collate(encode_all(rows, tokenizer), tokenizer, completion_only)
    for row_ids, row_mask, row_labels in zip(ids, mask, labels):
        assert row_ids[row_mask][-1] == row_labels[row_mask][-1] == EOS
        assert (row_ids == EOS).sum() == 1


def test_detail_3_pad_is_never_a_target(tokenizer):
    """T3: labels are the ids at real tokens but the first, and -100, which the loss ignores, at PAD."""
    ids, mask, labels = collate(encode_all(PROMPTS + TEXTS, tokenizer), tokenizer, False)
    assert not mask.all() and (ids[~mask] == PAD).all() and (ids[mask] != PAD).all()
    assert (labels[~mask] == -100).all() and torch.equal(labels[:, 1:][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])


def test_detail_3_pad_is_never_eos(tmp_path):
    """T3: a tokenizer whose PAD is its EOS, and one without PAD, get a PAD of their own."""
    changed = load_tokenizer(str(ROOT / "assets/base"), "--model")
    for pad_token in (changed.eos_token, None):
        changed.pad_token = pad_token
        changed.save_pretrained(tmp_path)
        assert load_tokenizer(str(tmp_path), "--model").pad_token_id not in (None, EOS)


def test_detail_5_rows_are_padded_right(tokenizer):
    """T3: training rows start in the first column, whatever their length."""
    items = encode_all(TEXTS, tokenizer)
    ids, mask, _ = collate(items, tokenizer, False)
    for (sequence, _, _), row_ids, row_mask in zip(items, ids, mask):
        assert row_ids[: len(sequence)].tolist() == sequence
        assert row_mask.tolist() == [True] * len(sequence) + [False] * (ids.shape[1] - len(sequence))


def test_detail_9_prompt_tokens_count(tokenizer):
    """T11: by default prompt tokens are targets like all others; with completion_only only those after it are."""
    (ids, prompt_length, row), = items = encode_all(PROMPTS[:1], tokenizer)
    assert tokenizer.decode(ids[:prompt_length]) == row["prompt"]
    assert collate(items, tokenizer, False)[2][0].tolist() == [-100] + ids[1:]  # the first token follows nothing
    assert collate(items, tokenizer, True)[2][0].tolist() == [-100] * prompt_length + ids[prompt_length:]


def test_detail_e1_prompt_and_completion_are_tokenised_apart(tokenizer):
    """T4: ids are those of the prompt, then those of the completion, also where the joint string has others."""
    row = {"prompt": "I wo", "completion": "uld not"}
    ids, prompt_length = sft.encode_demonstration(row, tokenizer)
    assert ids == tokenizer("I wo").input_ids + tokenizer("uld not").input_ids + [EOS]
    assert prompt_length == len(tokenizer("I wo").input_ids)
    assert ids[:-1] != tokenizer("I would not").input_ids


def test_encode_demonstration_puts_one_bos_in_front():
    """T4: where a tokenizer adds a BOS, prompt and completion together get one."""
    with_bos = load_tokenizer(str(ROOT / "assets/base"), "--model")
    plain = with_bos("the cat").input_ids
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="[PAD] $A", special_tokens=[("[PAD]", PAD)])
    assert with_bos("the cat").input_ids == [PAD] + plain  # PAD plays the BOS here
    for row in PROMPTS + TEXTS:
        ids, _ = sft.encode_demonstration(row, with_bos)
        assert ids[0] == PAD and ids.count(PAD) == 1


@pytest.mark.parametrize("completion_only", [False, True])
def test_count_labels_agrees_with_collate(completion_only, tokenizer):
    """T11: the number that divides the loss is the number of labels that the loss sees, in both modes."""
    items = encode_all(PROMPTS + TEXTS + [{"prompt": "", "completion": " sat on the mat"}], tokenizer)
    _, _, labels = collate(items, tokenizer, completion_only)
    seen = (labels[:, 1:] != -100).sum(1).tolist()  # the first token has nothing before it
    assert [sft.count_labels(item, completion_only) for item in items] == seen


def test_collate_none_is_a_row_without_labels(tokenizer):
    """T11: the row that fills up a rank's short share adds nothing to the loss."""
    ids, mask, labels = collate([None], tokenizer, False)
    assert mask.any() and (labels == -100).all()
    items = encode_all(PROMPTS, tokenizer)
    _, mask, labels = collate(items + [None], tokenizer, False)
    logits = torch.randn(3, mask.shape[1], 1024)
    alone = sft.sft_loss_sum(logits[:2], labels[:2]).item()
    assert sft.sft_loss_sum(logits, labels).item() == pytest.approx(alone, rel=1e-6)


def test_load_demonstrations_counts_what_it_drops(tmp_path, tokenizer, capsys):
    """T6: rows of exactly max_length stay; longer ones and empty completions are dropped, counted and named."""
    rows = PROMPTS[:1] + [{"prompt": "she", "completion": completion} for completion in ("", " is good" * 9)]
    length = len(sft.encode_demonstration(PROMPTS[0], tokenizer)[0])
    path = write_rows(tmp_path / "rows.jsonl", rows)
    kept = sft.load_demonstrations(path, "--train_data", tokenizer, sft.Args(max_length=length))
    assert [row for _, _, row in kept] == PROMPTS[:1]
    assert f"1 rows (dropped: 1 over {length} tokens, 1 empty)" in capsys.readouterr().out


# ---- Model ------------------------------------------------------------------------------------------------


def right_left_and_unpadded(pads):
    """One text with pads on the right, on the left, and without, each as (ids, mask, slice of the real tokens)."""
    sequence = torch.randint(1, 60, (12,), generator=torch.Generator().manual_seed(3)).tolist()
    filler = [5] * (12 + pads)  # a longer second row, which makes `pad` add the pads
    for side, real in (("right", slice(0, 12)), ("left", slice(pads, pads + 12))):
        yield *pad([sequence, filler], 60, side), real
    yield *pad([sequence], 60, "right"), slice(0, 12)


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                                      initializer_range=0.2, bos_token_id=0, eos_token_id=0)).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_detail_45_padding_side_does_not_change_logits(family, tiny_lm):
    """T8: the same text with 0 pads, 9 on the left and 9 on the right has the same logits, to 1e-5."""
    model = tiny_lm if family == "gpt_neox" else tiny_gpt2()
    right, left, plain = (
        sft.forward_logits(model, ids, mask)[0, real] for ids, mask, real in right_left_and_unpadded(9))
    assert (left - plain).abs().max() < 1e-5
    assert (right - plain).abs().max() < 1e-5


@torch.no_grad()
def test_detail_45_position_ids_are_what_makes_gpt2_right():
    """T8: GPT-2 called without the position ids of forward_logits is wrong by more than 0.1 on a left-padded row."""
    model = tiny_gpt2()
    _, (ids, mask, real), (plain_ids, plain_mask, _) = right_left_and_unpadded(9)
    naive = model(input_ids=ids, attention_mask=mask.long()).logits[0, real]
    assert (naive - sft.forward_logits(model, plain_ids, plain_mask)[0]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_detail_3_pad_is_never_embedded(side, tiny_lm):
    """T9: the PAD id does not matter, not even one beyond the embedding: logits at real tokens are the same bits."""
    sequences = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    expected = None
    for pad_id in (60, 17, 64_000):
        ids, mask = pad(sequences, pad_id, side)
        logits = sft.forward_logits(tiny_lm, ids, mask)[mask]
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected)


def with_dropout(family):
    sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(tiny_config(hidden_dropout=0.5, attention_dropout=0.5, classifier_dropout=0.5))
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=128, attention_dropout=0.5))


@torch.no_grad()
def two_training_forwards(model):
    torch.manual_seed(0)
    model.train()
    ids = torch.arange(1, 21).view(2, 10)
    return [sft.forward_logits(model, ids, torch.ones_like(ids, dtype=torch.bool)) for _ in range(2)]


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_detail_7_dropout_is_off(family):
    """T10: with all dropout at 0.5, two forwards in train mode differ; after disable_dropout they are bit-equal."""
    model = with_dropout(family)
    first, second = two_training_forwards(model)
    assert not torch.equal(first, second)
    first, second = two_training_forwards(disable_dropout(model))
    assert torch.equal(first, second)
    rates = {key: value for key, value in vars(model.config).items() if "drop" in key and isinstance(value, float)}
    assert rates and not any(rates.values())  # attention layers of some families read the config in every forward


def test_detail_7_a_loaded_model_has_no_dropout(tmp_path, tokenizer):
    """T10: load_causal_lm, which main calls, switches off the dropout of a saved model."""
    with_dropout("llama").save_pretrained(tmp_path)
    first, second = two_training_forwards(load_causal_lm(str(tmp_path), "--model", tokenizer))
    assert torch.equal(first, second)


# ---- Packing ----------------------------------------------------------------------------------------------


def random_items(lengths, seed=0):
    """Rows of so many random tokens, EOS last; a third of each is prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(2, 60, (n - 1,), generator=generator).tolist() + [EOS], n // 3, {"row": i})
            for i, n in enumerate(lengths)]


def with_attention(family, attention):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    config = {
        "gpt_neox": tiny_config(), "gpt2": GPT2Config(**sizes, n_positions=16),
        "llama": LlamaConfig(**sizes, intermediate_size=128, num_key_value_heads=2)}[family]
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_packed_rows_have_their_own_logits(family, attention, tokenizer):
    """The logits of each row of a pack are those of the row alone, also where the pack exceeds GPT-2's positions."""
    model, items = with_attention(family, attention), random_items([9, 2, 5, 7, 1, 4])
    ids, segments, _ = sft.collate([items[:4], items[4:]], tokenizer, False, "cpu")  # the second one has pads
    logits = sft.forward_logits(model, ids, segments)
    for i, members in enumerate((items[:4], items[4:])):
        for number, (row, _, _) in enumerate(members, 1):
            alone = model(torch.tensor([row])).logits[0]
            assert (logits[i][segments[i] == number] - alone).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_packed_rows_are_blind_to_one_another(family, tokenizer):
    """Another first row leaves the logits of the second one as they are, bit for bit, and so the other way round."""
    model = with_attention(family, "sdpa")
    (first, second), (other_first, other_second) = random_items([6, 7]), random_items([6, 7], seed=1)
    logits = [sft.forward_logits(model, *sft.collate([pack], tokenizer, False, "cpu")[:2])[0]
              for pack in ([first, second], [other_first, second], [first, other_second])]
    assert torch.equal(logits[0][6:], logits[1][6:]) and torch.equal(logits[0][:6], logits[2][:6])
    assert (logits[0][:6] - logits[1][:6]).abs().max() > 0.1 and (logits[0][6:] - logits[2][6:]).abs().max() > 0.1


def test_positions_restart_in_every_row_of_a_pack(tokenizer):
    """Position ids count from 0 in each row; the model is never given PAD."""
    seen = {}

    class Model(torch.nn.Linear):
        def forward(self, **inputs):
            seen.update(inputs)
            return SimpleNamespace(logits=torch.zeros(1))

    packs = [random_items([3, 1, 4]), random_items([2, 3])]
    sft.forward_logits(Model(1, 1), *sft.collate(packs, tokenizer, False, "cpu")[:2])
    positions = seen["position_ids"]
    assert positions[0].tolist() == [0, 1, 2, 0, 0, 1, 2, 3] and positions[1, :5].tolist() == [0, 1, 0, 1, 2]
    assert (seen["input_ids"] != PAD).all() and seen["input_ids"][1, 5:].tolist() == [0] * 3


@pytest.mark.parametrize("completion_only", [False, True])
def test_first_token_of_a_packed_row_has_no_label(completion_only, tokenizer):
    """Labels of a pack are those of its rows one by one: never a row's first token, with the flag no prompt token."""
    items = random_items([6, 3, 7, 1])
    ids, segments, labels = sft.collate([items], tokenizer, completion_only, "cpu")
    assert segments[0].tolist() == [1] * 6 + [2] * 3 + [3] * 7 + [4]
    start = 0
    for row, prompt_length, _ in items:
        first = max(1, prompt_length) if completion_only else 1
        assert labels[0, start : start + len(row)].tolist() == [-100] * first + row[first:]
        assert ids[0, start : start + len(row)].tolist() == row
        start += len(row)
    counted = sum(sft.count_labels(item, completion_only) for item in items)
    assert (labels[0, 1:] != -100).sum() == counted


@pytest.mark.parametrize("pack_length", [12, 17, 50])
def test_pack_loses_and_repeats_no_row(pack_length):
    """Every row lies whole in exactly one pack, no pack is over the length, and no two packs fit into one."""
    lengths = torch.randint(2, 13, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    items = random_items(lengths)
    packs = sft.pack(items, pack_length)
    assert sorted(item[2]["row"] for pack in packs for item in pack) == list(range(80))
    assert all(item == items[item[2]["row"]] for pack in packs for item in pack)
    sizes = sorted(sum(len(ids) for ids, _, _ in pack) for pack in packs)
    assert sum(sizes) == sum(lengths) and sizes[-1] <= pack_length and sizes[0] + sizes[1] > pack_length
    assert len(packs) <= 1.2 * sum(lengths) / pack_length
    assert sft.pack(items, 0) == [[item] for item in items]


def test_pack_takes_the_fullest_list_with_room():
    """By hand: 7 and 5 open a list each; 3 fits the fuller one, then 2 fits only the other, and 1 fills the first."""
    packs = sft.pack(random_items([1, 2, 7, 3, 5]), 11)
    assert [[len(ids) for ids, _, _ in pack] for pack in packs] == [[7, 3, 1], [5, 2]]


@pytest.mark.parametrize("completion_only", [False, True])
def test_packed_gradient_equals_the_unpacked_one(completion_only, tokenizer, tiny_lm):
    """A step over the same rows, packed or each alone, has the same gradient to a relative norm of 1e-5."""
    items = random_items([9, 3, 5, 7, 2, 4, 8, 6])
    count, gradients = sum(sft.count_labels(item, completion_only) for item in items), []
    for packs in ([[item] for item in items], sft.pack(items, 16)):
        tiny_lm.zero_grad()
        ids, segments, labels = sft.collate(packs, tokenizer, completion_only, "cpu")
        (sft.sft_loss_sum(sft.forward_logits(tiny_lm, ids, segments), labels) / count).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tiny_lm.parameters()]))
    assert len(packs) == 3 and (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


# ---- Loss and schedule ------------------------------------------------------------------------------------


def test_sft_loss_sum_equals_a_loop_over_tokens():
    """T11: the sum of -log p of each counted token under the logits one position before it, and nothing else."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, 5:] = labels[1, :4] = -100
    expected = 0.0
    for b in range(3):
        for t in range(1, 7):
            if labels[b, t] != -100:
                expected -= logits[b, t - 1].log_softmax(-1)[labels[b, t]].item()
    assert sft.sft_loss_sum(logits, labels).item() == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_sft_loss_sum_ignores_more_pads(tokenizer, tiny_lm):
    """T11: appending 9 pads to a batch leaves its loss as it is."""
    items = [(ids, 1, {}) for ids in ([5, 6, 7, EOS], [8, 9, 10, 11, 12, EOS])]
    ids, mask, labels = collate(items, tokenizer, False)
    loss = sft.sft_loss_sum(sft.forward_logits(tiny_lm, ids, mask), labels)
    ids, mask, labels = (F.pad(x, (0, 9), value=fill) for x, fill in ((ids, PAD), (mask, False), (labels, -100)))
    again = sft.sft_loss_sum(sft.forward_logits(tiny_lm, ids, mask), labels)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)


def test_detail_e2_gradient_does_not_depend_on_micro_batches(tokenizer, tiny_lm):
    """T12: 8 rows of unlike lengths in one micro-batch or in 8 give the same gradient, when divided by one count."""
    lengths = torch.arange(3, 11)
    items = [(torch.randint(2, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() + [EOS], 2, {})
             for n in lengths.tolist()]
    count = sum(sft.count_labels(item, True) for item in items)
    gradients = []
    for size in (8, 1):
        tiny_lm.zero_grad()
        for start in range(0, 8, size):
            ids, mask, labels = collate(items[start : start + size], tokenizer, True)
            (sft.sft_loss_sum(sft.forward_logits(tiny_lm, ids, mask), labels) / count).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tiny_lm.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_detail_42_cosine_lr_golden_values():
    """T13: after 1 of 911 steps with peak 3e-6 the rate is 2.9999910808426766e-06, after the last 0."""
    assert sft.cosine_lr(0, 911, 0, 3e-6) == 3e-6
    assert sft.cosine_lr(1, 911, 0, 3e-6) == pytest.approx(2.9999910808426766e-06, rel=1e-14)
    assert sft.cosine_lr(911, 911, 0, 3e-6) == pytest.approx(0, abs=1e-20)


def test_detail_42_cosine_lr_equals_transformers_schedule():
    """T13: with warm-up, every step has the rate of transformers' cosine schedule, rising at first."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 4, 20)
    ours, theirs = [], []
    for step in range(20):
        ours.append(sft.cosine_lr(step, 20, 4, 0.5))
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert ours[:5] == [0, 0.125, 0.25, 0.375, 0.5]


# ---- Evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("completion_only", [False, True])
def test_evaluate_loss_is_a_mean_over_tokens(completion_only, tokenizer, tiny_lm):
    """T11: the held-out loss is the sum over all rows divided by their counted tokens, not a mean of row means."""
    items = [(ids, 1, {}) for ids in ([5, EOS], [8, 9, 10, 11, 12, 13, 14, EOS], [20, 21, 22, EOS])]
    loss, count = 0.0, 0
    for ids, prompt_length, _ in items:
        logprobs = tiny_lm(torch.tensor([ids])).logits[0].log_softmax(-1)
        targets = range(prompt_length if completion_only else 1, len(ids))
        loss, count = loss - sum(logprobs[t - 1, ids[t]].item() for t in targets), count + len(targets)
    args = sft.Args(micro_batch_size=2, completion_only=completion_only)
    metrics = sft.evaluate_loss(tiny_lm, items, tokenizer, args)
    assert metrics["eval/loss"].item() == pytest.approx(loss / count, rel=1e-5)
    assert metrics["eval/perplexity"].item() == pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-4)


@torch.no_grad()
def test_sample_continues_each_prompt_as_if_alone(tokenizer):
    """T8: near temperature 0, prompts of unlike lengths sampled together continue as each does greedily alone."""
    torch.manual_seed(2)
    model = GPTNeoXForCausalLM(tiny_config(vocab_size=1000, pad_token_id=PAD)).eval()
    rows = PROMPTS + [{"prompt": "I would not have the old", "completion": " mat"}] + TEXTS
    args = sft.Args(num_samples=5, micro_batch_size=3, response_length=6, temperature=1e-4)
    samples = sft.sample(model, encode_all(rows, tokenizer), tokenizer, args)
    queries = [row["prompt"] for row in rows[:3]]
    queries += ["the cat", "so be it"]  # the first four tokens of `text` rows
    assert [row["query"] for row in samples] == queries
    assert [row["reference"] for row in samples] == [row["completion"] for row in rows[:3]] + ["", ""]
    for row in samples:
        ids = tokenizer(row["query"], return_tensors="pt").input_ids
        for _ in range(6):
            token = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
            if token == EOS:
                break
        greedy = ids[0, len(tokenizer(row["query"]).input_ids) :]
        assert row["response"] == tokenizer.decode(greedy, skip_special_tokens=True)


def test_the_opening_of_a_text_is_tokens_and_whole_characters(tokenizer):
    """Four tokens; in Chinese, where this tokenizer has three a character, six. Of a shorter text all but its EOS."""
    for text, count in (("good good good good good", 4), ("今天天气很好", 6), ("今", 3), ("cat", 2)):
        item = (*sft.encode_demonstration({"text": text}, tokenizer), {"text": text})
        found = sft.opening(item, tokenizer)
        assert len(found) == min(count, len(item[0]) - 1) and text.startswith(tokenizer.decode(found)), text
    item = (*sft.encode_demonstration({"prompt": "", "completion": "a"}, tokenizer), {"prompt": "", "completion": "a"})
    assert sft.opening(item, tokenizer) == [EOS]


def test_texts_without_spaces_are_continued_from_their_first_tokens(tmp_path, tokenizer):
    """A text of one long word leaves room for its continuation: a model with 40 positions, 38 of them for the text."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1024, n_positions=40, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = "今天天气很好我们去公园"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    sft.main(sft.Args(
        model=str(tmp_path / "model"), train_data=str(tmp_path / "rows.jsonl"), eval_data=str(tmp_path / "rows.jsonl"),
        epochs=1, batch_size=1, micro_batch_size=1, max_length=40, response_length=30, output_dir=str(tmp_path / "out")))
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and {row["query"] for row in rows} == {"今天"}
    assert len(tokenizer(text).input_ids) + 30 > 40


# ---- Main -------------------------------------------------------------------------------------------------


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_main_learns_and_reports(trained):
    """T13: the loss falls, the learning rates are the cosine's, and the folder holds what the header promises."""
    _, folder = trained
    for name in ("args.json", "config.json", "metrics.jsonl", "model.safetensors", "samples.jsonl", "tensorboard",
                 "times.jsonl", "tokenizer.json", "README.md"):
        assert (folder / name).exists(), name
    metrics = read_metrics(folder)
    train = [row for row in metrics if "train/loss" in row]
    assert [row["step"] for row in train] == list(range(1, 49))  # 28 rows, 8 a step, 12 epochs: 4 steps an epoch
    assert train[0]["train/loss"] > 6.5 and train[-1]["train/loss"] < 1.5  # ln 1024 = 6.93 at first
    assert [row["train/lr"] for row in train] == [sft.cosine_lr(step, 48, 3, 1e-2) for step in range(48)]  # 5 %, up
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["eval/loss"] < 0.5 * summary["before"]["eval/loss"]
    assert metrics[0] == {"step": 0, **summary["before"]} and metrics[-1] == {"step": 48, **summary["after"]}


def test_main_teaches_where_to_stop(trained, tokenizer):
    """T3: sampled by transformers from the saved folder, every continuation ends with EOS right after "mat"."""
    _, folder = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, mask = pad([tokenizer(f"the {who}").input_ids for who in ("cat", "dog", "man", "old cat") * 4], PAD, "left")
    torch.manual_seed(0)
    output = model.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=True,
                            temperature=0.3, eos_token_id=EOS, pad_token_id=PAD)[:, ids.shape[1] :]
    for response in output.tolist():
        assert response.count(EOS) == 1
        assert tokenizer.decode(response[: response.index(EOS)]).endswith(" mat")


def test_main_saves_the_weights_that_it_evaluated(trained, tokenizer):
    """T11: the saved folder, loaded by transformers alone, has the held-out loss of summary.json and tied weights."""
    files, folder = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    items = sft.load_demonstrations(files["eval_data"], "--eval_data", tokenizer, sft.Args())
    loss = sft.evaluate_loss(model, items, tokenizer, sft.Args())["eval/loss"].item()
    assert loss == pytest.approx(json.loads((folder / "summary.json").read_text())["after"]["eval/loss"], rel=1e-6)


def test_main_visits_every_row_once_an_epoch_in_a_new_order(trained, tmp_path, tokenizer, monkeypatch):
    """T18: each epoch trains on each row exactly once, another epoch in another order."""
    seen, original = [], sft.collate

    def spy(packs, *rest):
        seen.append([item[2] for items in packs for item in items])
        return original(packs, *rest)

    monkeypatch.setattr(sft, "collate", spy)
    files, _ = trained
    run(files, tmp_path / "run", epochs=2)
    train = [json.loads(line) for line in open(files["train_data"])]
    batches = [rows for rows in seen if all(row in train for row in rows)]  # the others are evaluation's
    assert [len(rows) for rows in batches] == [8, 8, 8, 4] * 2
    epochs = [[row for rows in batches[start : start + 4] for row in rows] for start in (0, 4)]
    for rows in epochs:
        assert sorted(map(str, rows)) == sorted(map(str, train))
    assert {str(row) for row in batches[0]} != {str(row) for row in batches[4]}


def test_main_learns_from_packs(trained, tmp_path, capsys, monkeypatch):
    """With --pack_length an epoch is fewer sequences over the same rows, each once, and the held-out loss falls."""
    seen, original = [], sft.collate

    def spy(packs, *rest):
        seen.append(packs)
        return original(packs, *rest)

    monkeypatch.setattr(sft, "collate", spy)
    files, _ = trained
    run(files, tmp_path / "run", pack_length=64, batch_size=2, micro_batch_size=2, log_every=10)
    batches = [packs for packs in seen if any(len(items) > 1 for items in packs)]
    train = [json.loads(line) for line in open(files["train_data"])]
    first_epoch = [item[2] for packs in batches[:3] for items in packs for item in items]
    assert sorted(map(str, first_epoch)) == sorted(map(str, train))
    assert len(batches) == 36 and all(sum(len(item[0]) for item in items) <= 64 for packs in batches for items in packs)
    assert "36 steps of 2 sequences" in capsys.readouterr().out  # 280 tokens or so: 5 packs, 3 steps an epoch
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["eval/loss"] < 0.5 * summary["before"]["eval/loss"]


def test_main_steps_alike_packed_and_unpacked(trained, tmp_path):
    """A step over all rows ends with the same weights, loss and gradient norm in packs as with each row alone."""
    files, _ = trained
    models, rows = [], []
    for name, changes in {"plain": dict(batch_size=28), "packed": dict(batch_size=8, pack_length=64)}.items():
        run(files, tmp_path / name, epochs=1, warmup_ratio=0.0, **changes)
        models.append(flat(AutoModelForCausalLM.from_pretrained(tmp_path / name)))
        rows.append(read_metrics(tmp_path / name)[1])
    assert rows[0]["step"] == 1 and (models[0] - models[1]).abs().max() < 1e-4
    for name in ("train/loss", "train/grad_norm"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5)


@pytest.mark.parametrize("case", ["short", "window"])
def test_pack_length_that_cannot_work_is_refused(case, trained, tmp_path, capsys):
    """A pack shorter than a row may be, and rows beyond a model's sliding attention window, end in one line."""
    files, _ = trained
    changes = dict(max_length=64, pack_length=63)
    if case == "window":  # the pack's own mask would let its rows see further than the model may
        config = MistralConfig(vocab_size=1024, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                               num_key_value_heads=2, intermediate_size=32, sliding_window=63)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        load_tokenizer(files["model"], "--model").save_pretrained(tmp_path / "model")
        changes = dict(max_length=64, pack_length=128, model=str(tmp_path / "model"))
    with pytest.raises(SystemExit):
        run({**files, **changes}, tmp_path / "run")
    error = capsys.readouterr().err
    assert error.startswith("error: --pack_length") and error.count("\n") == 1
    assert "--max_length" in error and "63" in error and not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_nothing(trained, tmp_path, monkeypatch):
    """After 2 steps the weights with and without recomputed activations agree to 1e-6; it does recompute."""
    files, _ = trained
    models, recomputed, checkpoint = [], [], transformers.modeling_utils.checkpoint
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", lambda *args, **options: (
        recomputed.append(torch.is_grad_enabled()), checkpoint(*args, **options))[1])
    for switch in (False, True):
        run(files, tmp_path / str(switch), epochs=1, batch_size=14, gradient_checkpointing=switch)
        models.append(flat(AutoModelForCausalLM.from_pretrained(tmp_path / str(switch))))
        assert sum(recomputed) == switch * 2 * 2 * 2  # steps x micro-batches x layers
    assert (models[0] - models[1]).abs().max() < 1e-6


@pytest.mark.parametrize("micro_batch_size, completion_only", [(8, False), (3, True), (1, True)])
def test_main_equals_a_plain_torch_loop(micro_batch_size, completion_only, trained, tmp_path, monkeypatch):
    """T12: for any micro-batch size, main's 4 steps are AdamW's on the mean over tokens, row by row without pads."""
    files, _ = trained
    steps = watch_steps(monkeypatch, sft)
    run(files, tmp_path / "run", epochs=1, micro_batch_size=micro_batch_size, completion_only=completion_only,
        warmup_ratio=0.0)
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    assert torch.equal(flat(model), steps[0].before)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)
    tokenizer = load_tokenizer(files["model"], "--model")
    items = encode_all([json.loads(line) for line in open(files["train_data"])], tokenizer)
    order = permutation(28, 1, 0)
    for number, step in enumerate(steps):
        set_weights(model, step.before)
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * number / 4))
        loss, count = 0, 0
        for ids, prompt_length, _ in (items[i] for i in order[8 * number : 8 * number + 8]):
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for t in range(prompt_length if completion_only else 1, len(ids)):
                loss, count = loss - logprobs[t - 1, ids[t]], count + 1
        optimizer.zero_grad()
        (loss / count).backward()
        norm, row = check_step(step, model, optimizer), read_metrics(tmp_path / "run")[number + 1]
        assert (row["train/loss"], row["train/grad_norm"]) == pytest.approx(((loss / count).item(), norm), rel=1e-4)
    assert len(steps) == 4
    assert torch.equal(flat(AutoModelForCausalLM.from_pretrained(tmp_path / "run")), steps[-1].after)


def test_resume_ends_with_the_same_bits(trained, tmp_path, capsys):
    """T43: killed and resumed from a checkpoint, a run ends with the same weights, metrics and samples."""
    files, folder = trained
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    shutil.rmtree(killed / "checkpoints/step_0000040")  # so that 28 steps are left to do
    for name in ("summary.json", "model.safetensors", "config.json"):
        (killed / name).unlink()
    half = (killed / "metrics.jsonl").read_text()[:-40]  # killed while it wrote a row
    (killed / "metrics.jsonl").write_text(half)
    run(files, killed, resume=True)
    steps = [line.split("/48")[0].strip() for line in capsys.readouterr().out.splitlines() if "/48  loss" in line]
    assert steps == [str(step) for step in range(21, 49)]
    for name in ("model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (killed / name).read_bytes() == (folder / name).read_bytes(), name
