"""ppo.py's sampling: prompts and noise, the decoder against transformers' own, truncation at EOS."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor
from transformers import PreTrainedTokenizerFast, TemperatureLogitsWarper, TopPLogitsWarper

import ppo
from utils.data import pad
from utils.tokens import decode_responses

EOS, PAD = 0, 60
FORBIDDEN = torch.arange(64) == PAD


def biased_to(model, token, amount):
    """Raise the logit of one token by `amount` everywhere: final hidden states have mean 0, so a constant added to
    all of their entries and to all of the token's output weights shows in this token's logit alone."""
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias.fill_(0.05)
        model.get_output_embeddings().weight[token] += amount / (0.05 * model.config.hidden_size)
    return model


def left_padded(lengths, seed=0):
    """Random queries of these lengths, without EOS and PAD."""
    torch.manual_seed(seed)
    return pad([torch.randint(1, PAD, (length,)).tolist() for length in lengths], PAD, "left")


def sample(model, queries, mask, noise, temperature=0.7, top_p=1.0, penalty=1.0, forbidden=FORBIDDEN, eos=(EOS,), pad_id=PAD):
    return ppo.generate(model, queries, mask, noise, temperature, top_p, penalty, forbidden, torch.tensor(eos), pad_id)


def uniforms(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def recorded(monkeypatch):
    """The logits that each decoding step draws from, one (rows alive, V) tensor a step."""
    steps, draw = [], ppo.inverse_cdf
    monkeypatch.setattr(ppo, "inverse_cdf", lambda logits, u: steps.append(logits.clone()) or draw(logits, u))
    return steps


def of_row(steps, lengths, row):
    """Recorded logits (length of the row, V): step t has the rows alive at t, in order."""
    return torch.stack([steps[t][(lengths[:row] > t).sum()] for t in range(lengths[row])])


# ---- Prompts and noise ------------------------------------------------------------------------------------


def test_detail_21_every_prompt_is_visited_once_per_epoch_in_a_new_order():
    """Seven passes of ten episodes hold each of ten prompts once, in orders that differ with epoch and seed (D21)."""
    epochs = [ppo.prompts_of_episodes(range(start, start + 10), 10, seed=1) for start in range(0, 70, 10)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 7
    assert ppo.prompts_of_episodes(range(10), 10, seed=2) != epochs[0]
    assert ppo.prompts_of_episodes(range(5, 15), 10, seed=1) == epochs[0][5:] + epochs[1][:5]


def test_sampling_noise_depends_on_its_address_alone():
    """An episode's uniforms are the same whatever the other episodes are, and a longer row begins with the same (E11)."""
    noise = ppo.sampling_noise(1, 2, [7, 3, 12], 5)
    assert noise.shape == (3, 5) and noise.dtype == torch.float64
    assert torch.equal(ppo.sampling_noise(1, 2, [3], 5)[0], noise[1])
    assert torch.equal(ppo.sampling_noise(1, 2, range(3, 13), 9)[[4, 0, 9], :5], noise)


def test_sampling_noise_is_uniform_and_new_at_every_address():
    """Mean 1/2 and variance 1/12 over 20,000 draws; seed, update and episode each change the row (E11)."""
    noise = ppo.sampling_noise(1, 1, range(1000), 20)
    assert abs(noise.mean() - 1 / 2) < 0.01 and abs(noise.var() - 1 / 12) < 0.003 and 0 <= noise.min() and noise.max() < 1
    rows = [ppo.sampling_noise(*address, [episode], 4)[0] for address, episode in (
        ((1, 1), 1), ((2, 1), 1), ((1, 2), 1), ((1, 1), 2))]
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_load_prompts_drops_empty_and_too_long_ones(tmp_path, capsys):
    """Prompts of 1 to max_prompt_length tokens are kept whole, the others are dropped and counted."""
    tokenizer = AutoTokenizer.from_pretrained("assets/base")
    texts = ["He", "", "And how", "She had been so very much in love with him that day"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    kept = ppo.load_prompts(str(file), "--prompts", tokenizer, SimpleNamespace(max_prompt_length=2))
    assert kept == [(tokenizer(text).input_ids, text, {"prompt": text}) for text in ("He", "And how")]
    assert "1 over 2 tokens, 1 empty" in capsys.readouterr().out


# ---- Drawing a token --------------------------------------------------------------------------------------


def test_detail_26_token_frequencies_follow_the_tempered_softmax():
    """Over an even grid of 20,000 uniforms each token is drawn softmax(logits / 0.7) of the time (T26)."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 2
    scaled = ppo.scale_logits(logits, 0.7, torch.zeros(64, dtype=torch.bool))
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    drawn = ppo.inverse_cdf(scaled.expand(20000, 64), grid)
    share = torch.bincount(drawn, minlength=64) / 20000
    assert (share - (logits / 0.7).softmax(-1)).abs().max() < 1.1 / 20000


def test_inverse_cdf_never_draws_a_token_without_probability():
    """u = 0 and the largest u below 1 give the first and the last token that have probability, in every row (T29)."""
    nothing = float("-inf")
    logits = torch.tensor([[nothing, 1.0, 2.0, nothing], [0.5, nothing, nothing, nothing], [nothing, nothing, 0.3, 0.1]])
    assert ppo.inverse_cdf(logits, torch.zeros(3, dtype=torch.float64)).tolist() == [1, 0, 2]
    assert ppo.inverse_cdf(logits, torch.full((3,), 1 - 2**-53, dtype=torch.float64)).tolist() == [2, 0, 3]
    halves = torch.zeros(2, 2)
    assert ppo.inverse_cdf(halves, torch.tensor([0.5 - 1e-12, 0.5], dtype=torch.float64)).tolist() == [0, 1]


def test_keep_top_p_keeps_the_smallest_sufficient_set():
    """Of (.5, .15, .3, .05), 0.5 keeps one token, 0.7 two, 0.85 three, 1 - 1e-6 all; a tiny top_p keeps the first."""
    logits = torch.tensor([[0.5, 0.15, 0.3, 0.05]]).log()
    for top_p, kept in ((1e-6, [0]), (0.499, [0]), (0.7, [0, 2]), (0.85, [0, 1, 2]), (1 - 1e-6, [0, 1, 2, 3])):
        result = ppo.keep_top_p(logits, top_p)[0]
        assert result.isfinite().nonzero().flatten().tolist() == kept
        assert torch.equal(result[kept], logits[0, kept])


# ---- The decoder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p, penalty", [(1.0, 1.0), (0.6, 1.0), (1.0, 1.7), (0.6, 1.7)])
def test_generate_agrees_with_transformers_generate(tiny_lm, monkeypatch, top_p, penalty):
    """Every step's processed logits and the greedy tokens equal transformers' own, left pads and unequal ends included.

    transformers counts the ids at left pads as seen before; here that is PAD, which neither of the two ever samples.
    """
    model, eos = biased_to(tiny_lm, EOS, 2.0), [EOS, 57]
    queries, mask = left_padded([3, 9, 1, 6, 4, 2, 8, 5])
    steps = []
    monkeypatch.setattr(ppo, "inverse_cdf", lambda logits, u: steps.append(logits.clone()) or logits.argmax(-1))
    responses = sample(model, queries, mask, uniforms(8, 12), top_p=top_p, penalty=penalty, eos=eos)
    lengths = ppo.truncate_at_eos(responses, torch.tensor(eos), PAD)[1]
    assert len(set(lengths.tolist())) >= 4 and all((responses == end).any() for end in eos), "rows should end in many ways"

    processors = LogitsProcessorList([SuppressTokensLogitsProcessor([PAD])])
    if penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(0.7 + 1e-7))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    theirs = model.generate(
        input_ids=queries, attention_mask=mask.long(), logits_processor=processors, do_sample=False, max_new_tokens=12,
        eos_token_id=eos, pad_token_id=PAD, output_scores=True, return_dict_in_generate=True)
    width = len(theirs.scores)
    assert torch.equal(responses[:, :width], theirs.sequences[:, queries.shape[1]:]) and (responses[:, width:] == PAD).all()
    for row in range(8):
        ours = of_row(steps, lengths, row)
        expected = torch.stack([scores[row] for scores in theirs.scores[: lengths[row]]])
        torch.testing.assert_close(ours.clamp(min=-1e9), expected.clamp(min=-1e9), rtol=0, atol=1e-4)


def test_generate_rows_do_not_depend_on_their_batch(tiny_lm):
    """A row decoded alone and without padding gives the tokens it gives among padded rows that end earlier (E10, E11)."""
    model, lengths = biased_to(tiny_lm, EOS, 2.0), [3, 9, 1, 6, 4, 2, 8, 5]
    queries, mask = left_padded(lengths)
    noise = uniforms(8, 12)
    together = sample(model, queries, mask, noise, penalty=1.3)
    assert len({int((row != PAD).sum()) for row in together}) >= 4
    for row, length in enumerate(lengths):
        alone = sample(model, queries[row:row + 1, -length:], mask[row:row + 1, -length:], noise[row:row + 1], penalty=1.3)
        assert torch.equal(alone[0], together[row])


def test_rollout_does_not_depend_on_the_rollout_batch_size(tiny_lm):
    """Rollouts decoded 1, 3 or 8 at a time are the same rows in the same order, PAD after EOS (E11)."""
    lengths = [3, 9, 1, 6, 4, 2, 8, 5]
    queries, mask = left_padded(lengths)
    prompts = [(row[kept].tolist(), "") for row, kept in zip(queries, mask)]
    tokenizer, results = SimpleNamespace(pad_token_id=PAD), []
    for size in (1, 3, 8):
        args = SimpleNamespace(temperature=0.7, top_p=0.95, repetition_penalty=1.2, rollout_batch_size=size)
        model = biased_to(tiny_lm, EOS, 2.0) if size == 1 else tiny_lm
        results.append(ppo.rollout(
            model, prompts, uniforms(8, 10), args, tokenizer, FORBIDDEN, torch.tensor([EOS])))
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = sample(tiny_lm, queries, mask, uniforms(8, 10), top_p=0.95, penalty=1.2)
    assert torch.equal(results[0], alone)
    assert ((alone == EOS).any(1) & (alone == PAD).any(1)).any()  # what follows EOS is PAD


def test_detail_23_eos_is_sampled_and_pad_follows(tiny_lm):
    """A model biased to EOS ends responses, at the first step too, and only PAD comes after EOS (T25)."""
    responses = sample(biased_to(tiny_lm, EOS, 5.0), *left_padded([4] * 32), uniforms(32, 10))
    ends = (responses == EOS).int()
    assert ends.sum(1).max() == 1 and ends[:, 0].any() and ends[:, 1:].any()
    after = ends.cumsum(1) - ends == 1
    assert (responses[after] == PAD).all() and (responses[~after] != PAD).all()


def test_detail_26_first_token_frequencies_of_generate(tiny_lm):
    """4,000 copies of one prompt with a grid of uniforms: frequencies equal softmax(logits / 0.7), nothing filtered (T26)."""
    queries, mask = left_padded([5])
    grid = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000
    tokens = sample(tiny_lm, queries.expand(4000, -1), mask.expand(4000, -1), grid)[:, 0]
    logits = tiny_lm(queries).logits[0, -1].masked_fill(FORBIDDEN, float("-inf"))
    share = torch.bincount(tokens, minlength=64) / 4000
    assert (share - (logits / 0.7).softmax(-1)).abs().max() < 1.1 / 4000


def test_generate_never_reads_the_stored_generation_config(tiny_lm):
    """A generation config full of other settings changes no token (T26)."""
    inputs = *left_padded([3, 7, 5]), uniforms(3, 10)
    before = sample(tiny_lm, *inputs)
    tiny_lm.generation_config.update(
        do_sample=False, temperature=9.0, top_k=1, top_p=0.1, repetition_penalty=3.0, eos_token_id=before[0, 0].item(),
        pad_token_id=5, min_new_tokens=10, max_new_tokens=2, suppress_tokens=list(range(30)))
    assert torch.equal(sample(tiny_lm, *inputs), before)


def test_detail_E12_forbidden_tokens_and_pad_are_never_sampled(tiny_lm):
    """PAD and rows beyond the tokenizer have the largest logits by far and still never appear, at any u (T29)."""
    forbidden = (torch.arange(64) == PAD) | (torch.arange(64) >= 62)
    for token in (PAD, 62, 63):
        biased_to(tiny_lm, token, 40.0)
    queries, mask = left_padded([4] * 64)
    assert (tiny_lm(queries).logits[:, -1].argmax(-1) >= PAD).all()
    noise = uniforms(64, 6)
    noise[0], noise[1] = 0, 1 - 2**-53
    assert not torch.isin(sample(tiny_lm, queries, mask, noise, forbidden=forbidden, eos=()), torch.tensor([60, 62, 63])).any()


def test_detail_E12_every_other_token_may_be_sampled():
    """Ids of a vocabulary with gaps: tokens behind a gap stay, PAD and ids without a token are forbidden."""
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "[PAD]": 3, "c": 5, "</s>": 8}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="[PAD]")
    allowed = (~ppo.forbidden_tokens(tokenizer, 10)).nonzero().squeeze(1)
    assert allowed.tolist() == [0, 1, 5, 8]


# ---- Texts ------------------------------------------------------------------------------------------------


def test_responses_keep_their_leading_space():
    """A tokenizer that drops the first word's space when ids are decoded alone gives whole texts here."""
    metaspace = Tokenizer(WordLevel({"\u2581She": 0, "\u2581was": 1, "\u2581happy": 2, "</s>": 3, "[PAD]": 4}, unk_token="</s>"))
    metaspace.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=metaspace, eos_token="</s>", pad_token="[PAD]")
    responses = torch.tensor([[2, 3, 4], [1, 2, 3]])
    assert tokenizer.decode([2]) == "happy"
    assert decode_responses(tokenizer, [[0, 1], [0]], responses) == [" happy", " was happy"]


# ---- Logits of a response ---------------------------------------------------------------------------------


def test_detail_27_generate_and_forward_agree_only_at_the_same_temperature(tiny_lm, recorded):
    """response_logits on the full sequence equals what each token was drawn from; without temperature it is far off (T21)."""
    queries, mask = left_padded([3, 9, 1, 6])
    responses = sample(biased_to(tiny_lm, EOS, 3.0), queries, mask, uniforms(4, 10))
    responses, lengths, _ = ppo.truncate_at_eos(responses, torch.tensor([EOS]), PAD)
    ids, whole = torch.cat([queries, responses], 1), torch.cat([mask, ppo.response_masks(lengths, 10)[0]], 1)
    tempered, plain = (ppo.response_logits(tiny_lm, ids, whole, 10, temperature, FORBIDDEN).log_softmax(-1)
                       for temperature in (0.7, 1.0))
    for row, length in enumerate(lengths):
        drawn_from = of_row(recorded, lengths, row).log_softmax(-1)
        tokens = responses[row, :length, None]
        torch.testing.assert_close(tempered[row, :length].gather(1, tokens), drawn_from.gather(1, tokens), rtol=0, atol=1e-5)
        assert (plain[row, :length].gather(1, tokens) - drawn_from.gather(1, tokens)).abs().max() > 0.1


def test_detail_28_response_logits_equal_those_of_transformers_generate(tiny_lm):
    """Token t's logits are those transformers' generate had when it chose token t, over 0.7, left pads included (T21)."""
    queries, mask = left_padded([3, 9, 1, 6])
    theirs = tiny_lm.generate(input_ids=queries, attention_mask=mask.long(), do_sample=False, max_new_tokens=6,
                              min_new_tokens=6, pad_token_id=PAD, output_logits=True, return_dict_in_generate=True)
    whole = torch.cat([mask, torch.ones(4, 6, dtype=torch.bool)], 1)
    ours = ppo.response_logits(tiny_lm, theirs.sequences, whole, 6, 0.7, torch.zeros(64, dtype=torch.bool))
    torch.testing.assert_close(ours, torch.stack(theirs.logits, 1) / (0.7 + 1e-7), rtol=0, atol=1e-4)


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


def test_detail_45_absolute_positions_with_left_pads(gpt2):
    """GPT-2, which counts positions from 0, gives left-padded rows the tokens and logits of unpadded ones (T8, T21)."""
    lengths = [3, 9, 1]
    queries, mask = left_padded(lengths)
    noise = uniforms(3, 5)
    responses = sample(gpt2, queries, mask, noise, eos=())
    ids, whole = torch.cat([queries, responses], 1), torch.cat([mask, torch.ones(3, 5, dtype=torch.bool)], 1)
    logits = ppo.response_logits(gpt2, ids, whole, 5, 0.7, FORBIDDEN)
    for row, length in enumerate(lengths):
        alone = slice(row, row + 1), slice(9 - length, None)
        assert torch.equal(sample(gpt2, queries[alone], mask[alone], noise[alone[0]], eos=())[0], responses[row])
        oracle = gpt2(ids[alone]).logits[0, -6:-1] / (0.7 + 1e-7)  # no mask, no position ids
        torch.testing.assert_close(logits[row][:, :PAD], oracle[:, :PAD], rtol=0, atol=1e-4)


def test_detail_45_scalar_model_gives_padded_rows_the_values_of_unpadded_ones(gpt2):
    """Values of GPT-2 with left and right pads equal its values without any, less reward_mean (T8, detail 15)."""
    torch.manual_seed(0)
    config = GPT2Config(**{**gpt2.config.to_dict(), "num_labels": 1, "pad_token_id": PAD, "reward_mean": 0.25})
    classifier = GPT2ForSequenceClassification(config).eval()
    model = ppo.ScalarModel(classifier)
    ids = torch.randint(1, PAD, (1, 6))
    padded, mask = torch.full((1, 11), PAD), torch.zeros(1, 11, dtype=torch.bool)
    padded[:, 3:9], mask[:, 3:9] = ids, True
    values = model(padded, mask)
    assert values.shape == (1, 11) and values.dtype == torch.float32
    torch.testing.assert_close(values[:, 3:9], model(ids, torch.ones_like(ids).bool()), rtol=0, atol=1e-5)
    torch.testing.assert_close(values[0, 8], classifier(ids).logits[0, 0] - 0.25, rtol=0, atol=1e-5)


def test_detail_3_pad_is_never_embedded(tiny_lm, tiny_classifier):
    """A PAD id outside the embedding works in decoder, policy and critic, and gives the same numbers as one inside (T9)."""
    queries, mask = left_padded([3, 6])
    outside = torch.where(mask, queries, 9999)
    noise, whole = uniforms(2, 4), torch.ones(2, 4, dtype=torch.bool)
    model = ppo.ScalarModel(tiny_classifier)
    responses = sample(tiny_lm, queries, mask, noise, eos=())
    assert torch.equal(sample(tiny_lm, outside, mask, noise, eos=(), pad_id=9999), responses)
    whole = torch.cat([mask, whole], 1)
    inside, outside = torch.cat([queries, responses], 1), torch.cat([outside, responses], 1)
    assert torch.equal(*(ppo.response_logits(tiny_lm, ids, whole, 4, 0.7, FORBIDDEN) for ids in (inside, outside)))
    assert torch.equal(*(model(ids, whole) for ids in (inside, outside)))


# ---- Truncation -------------------------------------------------------------------------------------------


def test_detail_23_truncation_keeps_up_to_the_first_eos():
    """PAD after the first EOS, EOS in the last slot counts as an end, several EOS ids are all ends (T27)."""
    responses = torch.tensor([[5, 6, 0, 7, 0], [5, 6, 7, 8, 0], [5, 6, 7, 8, 4], [0, 1, 2, 3, 4], [5, 3, 0, 1, 1]])
    truncated, lengths, ended = ppo.truncate_at_eos(responses, torch.tensor([0, 3]), 9)
    assert truncated.tolist() == [[5, 6, 0, 9, 9], [5, 6, 7, 8, 0], [5, 6, 7, 8, 4], [0, 9, 9, 9, 9], [5, 3, 9, 9, 9]]
    assert lengths.tolist() == [3, 5, 5, 1, 2] and ended.tolist() == [True, True, False, True, True]


def test_truncation_by_a_loop():
    """Equals a Python loop on 200 random responses (T27)."""
    responses = torch.randint(0, 6, (200, 7), generator=torch.Generator().manual_seed(0))
    truncated, lengths, ended = ppo.truncate_at_eos(responses, torch.tensor([0]), 9)
    for row, cut, length, end in zip(responses.tolist(), truncated.tolist(), lengths.tolist(), ended.tolist()):
        kept = row[: row.index(0) + 1] if 0 in row else row
        assert (cut, length, end) == (kept + [9] * (7 - len(kept)), len(kept), 0 in row)
