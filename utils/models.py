"""Loading and saving Hugging Face folders: tokenizer, language models, sequence classifiers. Safe by default."""

import hashlib
import inspect
import json
import os
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from utils.launch import allowed, fail, full_state_dict, given, note_small_lr, print0, print_memory_plan, rank
from utils.launch import world_size
from utils.tokens import generation_eos_ids, terminator_ids

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def is_hub_id(path):
    """Whether a path that does not exist here can be a Hub id, `owner/name`."""
    return path.count("/") == 1 and not path.startswith(("assets/", "runs/", ".", "/"))


def check_folder(path, flag, pattern, remedy):
    """Fail in one line on a missing local folder, or one without a file of this pattern."""
    folder = Path(path)
    if not folder.exists():
        if is_hub_id(path):
            return  # transformers says what is wrong with it, if anything
        fail(f"{flag} {path}: no such folder. Give a Hugging Face model folder or a Hub id (owner/name)")
    if not list(folder.glob(pattern)):
        fail(f"{flag} {path}: this folder has no {pattern}. {remedy}")


def load_tokenizer(path, flag):
    """Tokenizer of a model folder or Hub id, with an EOS, and a PAD of its own that is not EOS.

    One without PAD, or whose PAD ends responses too, gets `[PAD]`: else a sampler that may not draw PAD would never
    stop, and a score read at the last token that is not PAD would stand before the end. An unused token that some
    other tool means for padding is not looked for.
    """
    check_folder(path, flag, "token*", "Save the model's tokenizer there with tokenizer.save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        with tempfile.TemporaryDirectory() as trial:  # it is saved with every model: not to find out after training
            tokenizer.save_pretrained(trial)
    except Exception as error:
        fail(f"{flag} {path}: cannot load a tokenizer from it ({first_line(error)}). "
             "Save one there with tokenizer.save_pretrained")
    if tokenizer.eos_token_id is None:
        fail(f"{flag} {path}: its tokenizer has no EOS token, so no response could ever end. Set eos_token")
    if tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        fail(f"{flag} {path}: its tokenizer ends every text with EOS, prompts too. Set add_eos_token to false: the "
             "scripts put EOS where it belongs")
    tokenizer.generation_eos_ids = generation_eos_ids(path, flag, tokenizer)
    if tokenizer.pad_token_id in (None, *terminator_ids(tokenizer)):
        was = "it has no PAD" if tokenizer.pad_token is None else f"its PAD {tokenizer.pad_token} ends responses"
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        print0(f"{'tokenizer':<22}{path}: {was}, so [PAD] is added, id {tokenizer.pad_token_id}")
    return tokenizer


def check_vocabulary(path, flag, tokenizer, model):
    """Fail in one line where the model at `path` has other tokens than `model`, whose tokenizer is given."""
    if path != model and load_tokenizer(path, flag).get_vocab() != tokenizer.get_vocab():
        fail(f"{flag} {path}: its vocabulary differs from that of --model {model}, so their probabilities cannot be "
             "compared")


def load_tokenizers(models, ref_model):
    """{path: tokenizer} of --models, and of --ref_model if there is one; the first one reads the data.

    All have one vocabulary, and those of --models make the same ids of a text, with the same chat template: else
    prompts would differ, and a KL mean nothing.
    """
    named = [(path, "--models") for path in models] + [(ref_model, "--ref_model")] * bool(ref_model)
    if not named:
        fail("--models: responses alone. Give --ref_model, whose tokenizer measures their lengths")
    tokenizers = {path: load_tokenizer(path, flag) for path, flag in named}
    probe, first = "She said:\n 12 naïve days", tokenizers[named[0][0]]
    for path, flag in named[1:]:
        other = tokenizers[path]
        wrong = ("another vocabulary" if other.get_vocab() != first.get_vocab() else None if flag == "--ref_model" else
                 "other ids for the same text" if other(probe).input_ids != first(probe).input_ids else
                 "another chat template" if other.chat_template != first.chat_template else None)
        if wrong:
            remedy = ("Give a reference of the same family, or None" if flag == "--ref_model" else
                      "Evaluate it alone, then give its samples.jsonl as a model here")
            fail(f"{flag} {path}: its tokenizer has {wrong} than that of {named[0][0]}. {remedy}")
    return tokenizers


def other_tokenizer(args, tokenizer, own):
    """`own`, the tokenizer of --reward_model, if it has another vocabulary than the policy's, or None.

    That needs --retokenize.
    """
    if own.get_vocab() == tokenizer.get_vocab():
        return None
    if not args.retokenize:
        fail(f"--reward_model {args.reward_model}: its vocabulary differs from that of --sft_model {args.sft_model}. "
             "Train a reward model from this SFT model with reward_model.py, or pass --retokenize: this one then reads "
             "decoded texts")
    return own


def load_causal_lm(path, flag, tokenizer, bf16=False):
    """AutoModelForCausalLM in fp32 (bf16: in bf16), dropout off. Resized only where the tokenizer would not fit."""
    model, loaded = _load(AutoModelForCausalLM, path, flag, bf16)
    if "score.weight" in loaded["unexpected_keys"]:
        fail(f"{flag} {path}: this is a reward model or critic. Give a language model")
    if type(model.config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:  # transformers loads it, without a causal mask
        fail(f"{flag} {path}: {type(model).__name__} is of an encoder family, whose tokens see the tokens after them. "
             "Give a decoder (GPT-NeoX, GPT-2, Llama, Qwen, Mistral, Gemma, ...)")
    _check_complete(loaded, path, flag)
    ends = terminator_ids(tokenizer)
    model.generation_config = GenerationConfig(  # token ids alone: stored sampling settings would be saved again
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0])
    return disable_dropout(_fit(model, tokenizer))


def load_classifier(path, flag, tokenizer, bf16=False, new_head=False):
    """AutoModelForSequenceClassification with one label, dropout off. new_head: it may lack a trained head.

    A bias that the stored head has and Hugging Face's class has not goes into reward_mean: W h + b - mean is the same
    number, for the reward model, for the critic that starts from it, and after saving.
    """
    model, loaded = _load(AutoModelForSequenceClassification, path, flag, bf16, num_labels=1)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        fail(f"{flag} {path}: {type(model).__name__} has no linear `score` head. Families whose classifier has one "
             "(GPT-NeoX, GPT-2, Llama, Qwen, Mistral, Gemma, ...) work")
    if "score.weight" in loaded["missing_keys"] and not new_head:
        strange = next(iter(loaded["unexpected_keys"]), None)
        what = f"its head is {strange}, where `score.weight` is read" if strange else "this is a language model"
        fail(f"{flag} {path}: {what}, so it has no score head. Train a reward model with reward_model.py")
    labels = {name: stored[0] for name, stored, _ in loaded["mismatched_keys"]}.get("score.weight")
    if labels:
        fail(f"{flag} {path}: this is a classifier with {labels} labels, and a reward model has one. "
             + ("Give a language model" if new_head else "Train one with reward_model.py"))
    _check_complete(loaded, path, flag)
    if "score.bias" in loaded["unexpected_keys"] and not new_head:
        bias = float(_stored(path, "score.bias"))
        model.config.reward_mean = getattr(model.config, "reward_mean", 0.0) - bias
        print0(f"{'head':<22}{path}: its bias {bias:.6g} is subtracted from reward_mean, now "
               f"{model.config.reward_mean:.6g}")
    if model.config.get_text_config().pad_token_id == tokenizer.eos_token_id and not new_head:
        print0(f"{'note':<22}{path}: PAD is EOS in its config, so other tools read its score one token before EOS. "
               "These scripts read it at EOS")
    return disable_dropout(_fit(model, tokenizer))


def _load(auto_class, path, flag, bf16, **options):
    check_folder(path, flag, "config.json", "It is not a Hugging Face model folder")
    if not allowed["pickle"]:
        check_folder(path, flag, "*.safetensors", "Pickled weights can run code when loaded: convert them to "
                     "safetensors, or pass --allow_pickle if you trust them")
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        model, loaded = auto_class.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=None if allowed["pickle"] else True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options)  # ours to say: _check_complete
    except Exception as error:
        fail(f"{flag} {path}: cannot load a model from it ({first_line(error)})")
    bad = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if bad:
        fail(f"{flag} {path}: its weight {bad} has NaN or infinity in it. Give a checkpoint from before that")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:  # BLOOM would ignore ours
        fail(f"{flag} {path}: {type(model).__name__} takes no position_ids. Families that do (GPT-NeoX, GPT-2, Llama, "
             "Qwen, Mistral, Gemma, ...) work")
    return model, loaded


def _check_complete(loaded, path, flag):
    for name, stored, wanted in loaded["mismatched_keys"]:
        fail(f"{flag} {path}: its weight {name} has the shape {list(stored)}, and its config.json asks for "
             f"{list(wanted)}. Give a whole model folder")
    missing = sorted(set(loaded["missing_keys"]) - {"score.weight", "score.bias"})
    if missing:
        fail(f"{flag} {path}: its weights lack {missing[0]} and {len(missing) - 1} more, which would be random")


def _stored(path, name):
    """One weight of a model folder or Hub id, from the file that has it."""
    def find(file):
        return cached_file(path, file, _raise_exceptions_for_missing_entries=False)

    for whole in ("model.safetensors", "pytorch_model.bin"):
        file, index = find(whole), find(whole + ".index.json")
        if not file and index:  # in several files
            file = find(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"][name])
        if file and file.endswith(".safetensors"):
            with safe_open(file, "pt") as weights:
                return weights.get_tensor(name)
        if file:
            return torch.load(file, map_location="cpu", weights_only=True)[name]


def _fit(model, tokenizer):
    """Give the model the tokenizer's special ids, and rows for ids that its embeddings lack, the same ones every time.

    A larger embedding is left alone.
    """
    embeddings, needed = model.get_input_embeddings(), max(tokenizer.get_vocab().values()) + 1
    if needed > embeddings.num_embeddings:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # policy and reference must not differ in their new rows
            model.resize_token_embeddings(needed, mean_resizing=False)  # by the family's initialisation
    if embeddings.padding_idx is not None:
        embeddings.padding_idx = tokenizer.pad_token_id  # its row has no gradient: where PAD was EOS, that of EOS
    for config in (model.config, model.config.get_text_config()):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id  # AutoModelForSequenceClassification finds the end by it
    return model


def disable_dropout(model):
    """Set every dropout of a model to zero [detail 7]: modules, and the floats that attention layers keep [E4]."""
    for key, value in vars(model.config).items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(model.config, key, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    return model


def forbidden_tokens(tokenizer, vocabulary_size):
    """What is never sampled [E12]: PAD, and rows of the embedding without a token. (vocabulary_size,) bool."""
    forbidden = torch.ones(vocabulary_size, dtype=torch.bool)
    forbidden[list(tokenizer.get_vocab().values())] = False
    forbidden[tokenizer.pad_token_id] = True
    return forbidden


def print_plan(args, default_lr, folder, device, policy, critic, frozen):
    """Say what PPO trains, how often, where it writes, and the memory that this takes. frozen: models, or None."""
    print0(f"{'models':<22}policy {count_parameters(policy):,} and critic {count_parameters(critic):,} "
           f"parameters, {world_size()} rank(s) on {device.type}")
    print0(f"{'plan':<22}{args.num_updates} updates of {args.batch_size} episodes, {args.num_ppo_epochs} epochs "
           f"each; writes {folder}")
    print_memory_plan(args, count_parameters(policy) + count_parameters(critic),
                      sum(count_parameters(model) for model in frozen if model))
    note_small_lr(args.lr, default_lr, count_parameters(policy))


# Where to start the search for a learning rate, {stage: {number of parameters from which on: range}}; docs/scaling.md
# says where they come from. From 1e9 on they are the papers'.
START_RATES = {
    "sft": {1e7: "1e-4 to 1e-3", 1e8: "1e-5 to 1e-4", 1e9: "3e-6 to 2e-5"},
    "reward_model": {1e7: "5e-5 to 5e-4", 1e8: "1e-5 to 1e-4", 1e9: "2e-6 to 1e-5"},
    "ppo": {1e7: "1e-5 to 1e-4", 1e8: "3e-6 to 3e-5", 1e9: "5e-7 to 3e-6"},  # of the policy; the critic follows
    "dpo": {1e7: "1e-5 to 1e-4", 1e8: "2e-6 to 2e-5", 1e9: "5e-7 to 1e-5"}}


def check_rate(args, stage, model):
    """Refuse the default learning rate, which is tuned on 0.9M parameters, for a model of 10M and more.

    Good rates fall about as one over the width; with ten times the parameters a model is two to three times as wide.
    """
    parameters = count_parameters(model)
    ranges = [words for least, words in START_RATES[stage].items() if parameters >= least]
    if ranges and not given(args, "lr"):
        fail(f"--lr: not given, and the default {args.lr:g} is tuned on the embedded model of 0.9M parameters; this "
             f"one has {parameters / 1e6:,.0f}M. Start with a rate from {ranges[-1]} (docs/scaling.md, Learning rates)")


def count_parameters(model):
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ds_numel: in pieces, at ZeRO 3


def save_model(engine, model, tokenizer, folder):
    """Write a plain Hugging Face folder from an engine [E17]. `model` is the Hugging Face model inside it.

    Every rank must call it. The model is reloaded by transformers' own classes without any of our code. Each file is
    whole or as it was before.
    """
    state = full_state_dict(engine)
    if rank() == 0:
        inner = next((name + "." for name, m in engine.module.named_modules() if m is model and name), "")
        state = {name.removeprefix(inner): tensor for name, tensor in state.items()}
        unfinished = Path(folder, "unfinished")
        model.save_pretrained(unfinished, state_dict=state)
        tokenizer.save_pretrained(unfinished)
        for file in unfinished.iterdir():
            os.replace(file, Path(folder, file.name))
        unfinished.rmdir()


def save_weights(engine, file):
    """Write an engine's weights as one .safetensors file, whole or not at all. Every rank must call it."""
    state = full_state_dict(engine)
    if rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, f"{file}.unfinished")
        os.replace(f"{file}.unfinished", file)


def fingerprint(model, *others):
    """Hash of a model's weights, their precision and config, and of anything else that JSON can hold."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(json.dumps([config, *others], default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_length(model, tokens, flags):
    """Fail in one line where a model has fewer positions than the run may need."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and tokens > limit:
        fail(f"{flags} = {tokens} tokens, but the model has {limit} positions. Lower the flags")
