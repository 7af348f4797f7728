"""Build everything in assets/ from the sentences alone, with fixed seeds: python assets/build.py (CPU, minutes).

Steps, each skipped when named in --skip: data (splits and preference pairs), base (tokenizer and random weights),
sft (sft.py), reward_model (reward_model.py). Without --sentences the sentences are read back from assets/data.
"""

import argparse
import hashlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
DATA = ASSETS / "data"
sys.path.insert(0, str(ASSETS.parent))
SPLITS = ("train", "validation", "persuasion")
STEPS = ("data", "base", "sft", "reward_model")
MIN_DIFFERENCE = 0.4  # of VADER compound scores between chosen and rejected
MAX_PAIRS = {"train": 120, "validation": 60, "persuasion": 60}  # per opening, so that "I am" does not drown the rest


def read(path):
    return [json.loads(line) for line in open(path)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path.relative_to(ASSETS.parent)}: {len(rows):,} rows")


def build_data(sentences):
    """Split by opening (the first two words): a held-out opening is never seen in training. Then pair up."""
    from assets.vader import compound

    if sentences:
        texts = [(row["novel"], row["text"]) for row in read(sentences)]
    else:
        texts = [(row["novel"], row["prompt"] + row["completion"]) for split in SPLITS
                 for row in read(DATA / f"{split}.jsonl")]
    splits = {split: [] for split in SPLITS}
    for novel, text in sorted(texts):
        opening = " ".join(text.split(" ")[:2])
        held_out = int(hashlib.sha256(opening.encode()).hexdigest(), 16) % 10 == 0
        split = "persuasion" if novel == "Persuasion" else "validation" if held_out else "train"
        splits[split].append({"novel": novel, "prompt": opening, "completion": text[len(opening):]})
    DATA.mkdir(exist_ok=True)
    for split, rows in splits.items():
        random.Random(split).shuffle(rows)
        write(DATA / f"{split}.jsonl", rows)
        scores = compound([row["prompt"] for row in rows], [row["completion"] for row in rows])
        by_opening = {}
        for row, score in zip(rows, scores):
            by_opening.setdefault(row["prompt"], []).append((score, row["completion"]))
        pairs = []
        for opening, endings in sorted(by_opening.items()):
            found = [(max(pair), min(pair)) for pair in itertools.combinations(endings, 2)
                     if abs(pair[0][0] - pair[1][0]) >= MIN_DIFFERENCE]
            random.Random(opening).shuffle(found)
            pairs += [{"prompt": opening, "chosen": chosen[1], "rejected": rejected[1]}
                      for chosen, rejected in found[: MAX_PAIRS[split]]]
        random.Random(split).shuffle(pairs)
        write(DATA / f"preferences_{split}.jsonl", pairs)


def build_base():
    """Byte-level BPE of 1,000 tokens trained on the training split, and a random GPT-NeoX stored in bf16."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|endoftext|>", "[PAD]"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in read(DATA / "train.jsonl")), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="[PAD]",
                                        model_max_length=128, clean_up_tokenization_spaces=False)
    torch.manual_seed(1)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=128, rotary_pct=0.25, tie_word_embeddings=True, use_cache=True,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.to(torch.bfloat16).save_pretrained(ASSETS / "base")
    tokenizer.save_pretrained(ASSETS / "base")
    print(f"assets/base: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")


def train(script, folder, *flags):
    """Run one of the project's own scripts with its defaults and keep its model folder."""
    run = ASSETS.parent / "runs" / f"build_{folder}"
    command = [sys.executable, script, "--output_dir", f"runs/build_{folder}", "--overwrite", *flags]
    subprocess.run(command, check=True, cwd=ASSETS.parent)  # a relative path: the model card quotes it
    shutil.rmtree(ASSETS / folder, ignore_errors=True)
    (ASSETS / folder).mkdir()
    for file in run.iterdir():
        if file.is_file() and file.name not in ("args.json", "samples.jsonl", "times.jsonl", "metrics.jsonl"):
            shutil.copy(file, ASSETS / folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", help="a .jsonl file with the columns novel and text")
    parser.add_argument("--skip", nargs="*", default=[], choices=STEPS)
    args = parser.parse_args()
    steps = {"data": lambda: build_data(args.sentences), "base": build_base,
             "sft": lambda: train("sft.py", "sft"), "reward_model": lambda: train("reward_model.py", "reward_model")}
    for name, step in steps.items():
        if name not in args.skip:
            started = time.time()
            step()
            print(f"--- {name}: {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
