"""Look at the batch that stopped a run with NaN or infinity: python -m utils.replay runs/ppo/bad_batch_rank0.pt

Says which quantity was the first and in which rows it is not finite, then reads every row again, alone, with the model
that the run began with, or with --model FOLDER. A row that is not finite there is the fault of the data (or of that
model); where all are finite the weights went wrong on the way, and a lower learning rate is what to try. The run itself
repeats its last steps, up to the bad one, with --resume.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from utils.launch import allowed, escape_output, fail
from utils.models import load_causal_lm, load_classifier, load_tokenizer
from utils.tokens import encode_text, encode_texts


@dataclass
class Args:
    file: Annotated[Path, tyro.conf.Positional]
    """bad_batch_rank0.pt of a run"""
    model: str | None = None
    """Hugging Face folder to read the rows with, a language or reward model; default: what the run began with"""
    allow_pickle: bool = False
    """read a model folder whose weights are pickled (.bin) alone"""


def sequences_of(batch, script, tokenizer):
    """Token ids of each row of a saved batch: queries and responses as they were, or texts put together."""
    if "queries" in batch:
        return [list(query) + [token for token in response if token != tokenizer.pad_token_id]
                for query, response in zip(batch["queries"], batch["responses"].tolist())]
    sides = ("completion", "text") if script == "sft" else ("chosen", "rejected")
    return [encode_text(row[side], tokenizer) if side == "text" else
            sum(encode_texts(row["prompt"], row[side], tokenizer, row.get(f"{side}_finished") is not False), [])
            for row in batch["rows"] for side in sides if side in row]


@torch.no_grad()
def read_again(model, ids):
    """What a model makes of one row: mean negative log-likelihood of its tokens, or a reward model's score."""
    logits = model(input_ids=torch.tensor([ids])).logits
    if logits.ndim == 2:
        return float(logits)
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:])))


def main(args):
    escape_output()
    if not args.file.is_file():
        fail(f"{args.file}: no such file. A run that NaN or infinity stops writes bad_batch_rank0.pt into its folder")
    try:
        saved = torch.load(args.file, weights_only=True)
        path = args.model or saved["args"].get("sft_model") or saved["args"]["model"]
    except Exception:
        fail(f"{args.file}: this is no bad_batch_rank0.pt of a run, or it is damaged")
    allowed["pickle"] = args.allow_pickle
    print(f"step {saved['step']}: the first quantity that is not finite is {saved['first_bad']}")
    for name, values in saved["quantities"].items():
        rows = (~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero()[:, 0] if values.ndim else []
        if len(rows):
            print(f"  {name}: not finite in {len(rows)} of {len(values)} rows, the first is {int(rows[0])}")
        elif not values.ndim:
            print(f"  {name}: {float(values):.4g}")
    tokenizer = load_tokenizer(path, "--model")
    scores = "score.weight" in " ".join(weights_of(path))
    model = (load_classifier if scores else load_causal_lm)(path, "--model", tokenizer).eval()
    print(f"\nEach row alone, read by {path} ({'its score' if scores else 'mean negative log-likelihood of a token'}):")
    bad, rows = 0, sequences_of(saved["batch"], saved["args"]["script"], tokenizer)
    for row, ids in enumerate(rows):
        value = read_again(model, ids) if len(ids) > 1 else 0.0  # one token has none before it
        bad += not torch.isfinite(torch.tensor(value))
        print(f"{row:>6}  {len(ids):>5} tokens  {value:10.4f}  {tokenizer.decode(ids)!r:.70}")
    print(f"\n{bad} rows are not finite here" if bad else
          f"\nAll {len(rows)} rows are finite here: the weights went wrong, not the rows")


def weights_of(path):
    """Names of the weights in a folder's safetensors files."""
    from safetensors import safe_open

    return [name for file in Path(path).glob("*.safetensors") for name in safe_open(file, "pt").keys()]


if __name__ == "__main__":
    main(tyro.cli(Args))
