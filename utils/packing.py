"""Several texts in one row of token ids, each blind to the others: the layout of such rows, and what a model is fed.

A row of `segments` says for each token whose it is: 1, 2, ... number the texts, COMMON (-1) is a beginning that all
texts of the row share, 0 is padding. All else follows. A token sees the common beginning and its own text up to itself.
Its position is the number of tokens that it sees before itself, as if its text stood alone.

        ids           a   b   c     y  y  EOS     z  EOS    0       texts "a b c y y EOS" and "a b c z EOS"
        segments     -1  -1  -1     1  1  1       2  2      0
        position_ids  0   1   2     3  4  5       3  4      0       as if "a b c" stood before each

sft.py --pack_length puts whole rows side by side (no common beginning); reward_model.py and dpo.py --share_prefix put
the two texts of a pair into one row. The numbers are those of rows apart, up to rounding; only the cost differs.

Shapes:  B rows, T tokens
"""

import torch

from utils.data import pad
from utils.launch import fail

COMMON = -1  # the segment that all texts of a row see


def pack(items, pack_length):
    """Items in lists of at most pack_length tokens, one list for each row. The first entry of an item is its token ids.

    Best fit: the longest items first, each into the fullest list that still has room. pack_length 0: each alone.
    """
    if not pack_length:
        return [[item] for item in items]
    packs, room = [], [[] for _ in range(pack_length + 1)]  # room[n]: packs with n tokens left
    for item in sorted(items, key=lambda item: -len(item[0])):
        length = len(item[0])
        left = next((n for n in range(length, pack_length + 1) if room[n]), None)
        if left is None:
            packs.append([])
            room[pack_length].append(packs[-1])
            left = pack_length
        found = room[left].pop()
        found.append(item)
        room[left - length].append(found)
    return packs


def share_prefix(pairs, side, device):
    """Pairs of texts as rows that hold their common beginning once, padded on `side`: ids, segments (B, T).

    pairs: (first ids, second ids, number of tokens in the common beginning). Ids are 0 at padding, never PAD.
    """
    rows, segments = [], []
    for first, second, common in pairs:
        rows.append(first + second[common:])
        segments.append([COMMON] * common + [1] * (len(first) - common) + [2] * (len(second) - common))
    return pad(rows, 0, side, device)[0], pad(segments, 0, side, device)[0]


def shared_length(first, second):
    """Number of tokens that two texts both begin with, each keeping at least its last one."""
    both = list(zip(first[:-1], second[:-1]))
    return next((i for i, (a, b) in enumerate(both) if a != b), len(both))


def packed_inputs(segments, dtype):
    """attention_mask (B, 1, T, T) of the model's dtype and position_ids (B, T) for segments (B, T)."""
    own = segments[:, :, None] == segments[:, None, :]  # [E21] [E27] [W13] blind to the other texts of the row
    seen = (own | (segments == COMMON)[:, None, :]).tril()  # (B, T, T): whether token t sees token s
    attention_mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    position_ids = torch.where(segments == 0, 0, seen.sum(-1) - 1)  # [detail 45] the tokens seen before this one
    return {"attention_mask": attention_mask, "position_ids": position_ids}


def shared_logprobs(model, pairs, device):
    """log pi(response | prompt) of both responses to a prompt that stands in the row once [W13] -> (2, B), fp32 sums.

    pairs: B of (prompt ids, first response, second response). Of "a b c" and the responses "y y EOS" and "z EOS":

        ids           a   b     c  y  y  EOS     c  z  EOS       c predicts both first tokens: it stands twice
        segments     -1  -1     1  1  1   1      2  2   2
    """
    rows = [(prompt + first, prompt + second, len(prompt) - 1) for prompt, first, second in pairs]
    ids, segments = share_prefix(rows, "left", device)
    width = int((segments > 0).sum(1).max())  # columns of responses, each with the prompt's last token before it
    logits = model(input_ids=ids, **packed_inputs(segments, next(model.parameters()).dtype), use_cache=False,
                   logits_to_keep=width).logits[:, :-1].float()  # (B, width - 1, V)
    logprobs = logits.gather(-1, ids[:, 1 - width :, None]).squeeze(-1) - logits.logsumexp(-1)
    before, here = segments[:, -width:-1], segments[:, 1 - width :]  # unequal where a column begins another response
    return torch.stack([(logprobs * ((before == side) & (here == side))).sum(-1) for side in (1, 2)])


@torch.no_grad()
def check_mask(model, flag, max_length):
    """Fail in one line unless the model obeys a mask (B, 1, T, T) that hides tokens in the middle of a row.

    Layers that read a row in order (state-space, convolution, linear attention) do not, and where attention reaches
    back a limited number of tokens, the mask would take the place of that limit. The probe is one small forward.
    """
    for name in ("sliding_window", "window_size", "attention_chunk_size"):
        limit = getattr(model.config, name, None)
        if isinstance(limit, int) and limit < max_length:
            fail(f"{flag} with --max_length {max_length}: this model attends to {limit} tokens ({name}), and rows must "
                 "not be longer")
    segments = torch.tensor([[COMMON] * 8 + [1] * 8 + [2] * 8] * 2)
    ids = torch.arange(24).repeat(2, 1)
    ids[1, 8:16] += 8  # the two rows differ in their first text, which the second one must not see
    ids %= model.get_input_embeddings().num_embeddings
    dtype = next(model.parameters()).dtype
    try:
        first, second = model.base_model(  # not the model: a classifier's logits are those of the last token alone
            input_ids=ids, use_cache=False, **packed_inputs(segments, dtype)).last_hidden_state[:, 16:].float()
        rounding = 1e-5 if dtype == torch.float32 else 1e-2
        obeys = bool((first - second).abs().max() <= rounding * first.std())
    except (ValueError, RuntimeError):
        obeys = False
    if not obeys:
        fail(f"{flag}: this model ({model.config.model_type}) does not obey a mask that hides tokens within a row")
