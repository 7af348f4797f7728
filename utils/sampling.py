"""Continuations of prompts by transformers' own generate, to look at: the samples of sft.py and dpo.py."""

import torch

from utils.data import chunks, pad
from utils.tokens import decode_responses, terminator_ids


@torch.no_grad()
def sample_responses(model, prompts, tokenizer, args, batch_size, seed):
    """Continuations of prompts (token ids, text): list of {query, response, tokens, length, ended}.

    args: response_length, temperature. tokens: ids up to the first EOS, that one included; length counts them. The
    noise is the same in every evaluation of a run; other batches or ranks bring other noise.
    """
    torch.manual_seed(seed)
    rows, eos_ids = [], terminator_ids(tokenizer)
    for some in chunks(prompts, batch_size):
        sequences, texts, _ = zip(*some)
        ids, mask = pad(sequences, tokenizer.pad_token_id, "left", model.device)
        output = model.generate(
            input_ids=torch.where(mask, ids, 0), attention_mask=mask.long(), max_new_tokens=args.response_length,
            do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
            eos_token_id=eos_ids, pad_token_id=tokenizer.pad_token_id)[:, ids.shape[1] :]
        for text, response, tokens in zip(texts, decode_responses(tokenizer, sequences, output), output.tolist()):
            end = next((t + 1 for t, token in enumerate(tokens) if token in eos_ids), None)
            rows.append({"query": text, "response": response, "tokens": tokens[:end], "length": len(tokens[:end]),
                         "ended": end is not None})
    return rows
