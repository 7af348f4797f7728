"""From texts to token ids and back: one BOS, one terminator, and ids that spell what the texts say.

These rules hold for every script, in training, scoring, sampling and evaluation:
  - a prompt has at most one BOS, whoever wrote it, its author or the tokenizer
  - a response ends with exactly one terminator. It is the one that the text brings, if it brings one. Else it is the
    chat template's end of turn after a prompt that this template has rendered, and the tokenizer's EOS after any other
  - prompt ids and response ids, one list after the other, spell the prompt and the response
"""

import os
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from transformers import AutoConfig, GenerationConfig

from utils.launch import fail, fail_together, print0


class Turn(NamedTuple):
    """How a chat template ends an answer, and how a prompt ends that it has rendered. None: it does neither."""

    end: str | None
    cue: str | None


# ---- Where a response ends --------------------------------------------------------------------------------


def terminator_ids(tokenizer):
    """All ids that end a response: the tokenizer's EOS, the chat template's end of turn, the generation config's."""
    return sorted(_terminators(tokenizer))


def _terminators(tokenizer):
    """{id: text} of the terminators. The text is None for an ordinary token that a generation config ends at: it is a
    part of the texts that it ends."""
    more = tuple(getattr(tokenizer, "generation_eos_ids", ()))
    return _terminators_of(tokenizer, len(tokenizer), tokenizer.eos_token_id, more, end_of_turn(tokenizer).end)


@lru_cache(maxsize=16)
def _terminators_of(tokenizer, size, eos_id, more, turn):
    added = {number: token for token, number in tokenizer.get_added_vocab().items()}
    ids = {eos_id, *more, *([tokenizer.convert_tokens_to_ids(turn)] if turn else [])}
    return {number: added.get(number) for number in ids}


def end_of_turn(tokenizer):
    """The Turn of the tokenizer's chat template."""
    return _end_of_turn(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else Turn(None, None)


SYSTEM, QUESTION, ANSWER = (
    {"role": role, "content": f"{role.title()}Probe7"} for role in ("system", "user", "assistant"))


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer, template):
    def rendered(*turns, **options):
        return tokenizer.apply_chat_template([*start, *turns], tokenize=False, **options)

    question, answer = QUESTION["content"], ANSWER["content"]
    for start in ([], [SYSTEM]):  # some templates refuse a system message, and some want one
        try:
            prompt, whole = rendered(QUESTION, add_generation_prompt=True), rendered(QUESTION, ANSWER)
            break
        except Exception:
            pass
    else:  # templates refuse roles as they like; then the tokenizer's EOS has to do
        return Turn(None, None)
    header, _, cue = prompt.rpartition(question)
    cue, last = cue.rstrip() or None, whole.rpartition(answer)[2]
    try:
        middle = rendered(QUESTION, ANSWER, QUESTION).partition(answer)[2].partition(question)[0]
    except Exception:
        middle = last
    # What stands after every answer. After an answer within the text comes the header of the next turn, and after the
    # last one some templates always print the cue for another answer.
    header = header.removeprefix(tokenizer.bos_token or "")
    if header and header in middle:
        return Turn(_first_added_token(middle[: middle.rfind(header)], tokenizer), cue)
    end = _first_added_token(os.path.commonprefix([last, middle]), tokenizer)
    if end is None:  # the last answer ends otherwise than those before it
        end = _first_added_token(last, tokenizer)
        end = None if end and end in (cue or "") else end
    return Turn(end, cue)


def _first_added_token(text, tokenizer):
    """The first of the tokenizer's added tokens in a text, such as <|im_end|>, or None."""
    found = [(text.find(token), -len(token), token) for token in added_tokens(tokenizer) if token in text]
    return min(found)[2] if found else None


def added_tokens(tokenizer):
    """Texts of the tokens that a tokenizer finds in any text before it reads the rest, such as <|im_end|>. Some have
    runs of spaces or newlines too, which are left out here."""
    return [token for token in tokenizer.get_added_vocab() if token.strip(" \n\t\r▁")]


def split_terminator(prompt, response, tokenizer):
    """A response without what ends it, and the id that ends it: (text, id).

    [E29] Of several terminators at the end of the text the first counts, and space between and after them is dropped.
    """
    turn, own = end_of_turn(tokenizer), None
    if turn.end and turn.cue and turn.end in turn.cue and response.rstrip().endswith(turn.cue):
        response = response.rstrip().removesuffix(turn.cue) + turn.end  # a template that always prints the cue
    ends = [text for text in _terminators(tokenizer).values() if text]
    while found := next((end for end in ends if response.rstrip().endswith(end)), None):
        own, response = found, response.rstrip().removesuffix(found)
    if own is None:
        own = turn.end if _is_rendered(prompt, turn) else tokenizer.eos_token
    return response, tokenizer.convert_tokens_to_ids(own)


def without_terminator(prompt, response, tokenizer):
    """A response without its terminator, if `encode_texts` puts the same one there again; else as it is."""
    text, end = split_terminator(prompt, response, tokenizer)
    return text if split_terminator(prompt, text, tokenizer) == (text, end) else response


def _is_rendered(prompt, turn):
    """Whether a prompt ends with the template's cue for an answer, and perhaps the beginning of the answer."""
    return bool(turn.end and turn.cue and turn.cue in prompt and turn.end not in prompt.rpartition(turn.cue)[2])


def the_terminator(sequences, tokenizer):
    """The id in which all texts end that a reward model is trained and measured on; fail in one line if there are more.

    sequences: {flag: lists of ids}. A score means something at the token at which the model was trained, nowhere else.
    Ordinary tokens that a generation config ends at do not count: there a score is read as at any other last token.
    """
    ends = {number for number, text in _terminators(tokenizer).items() if text}
    last = {flag: Counter(ids[-1] for ids in lists if ids[-1] in ends) for flag, lists in sequences.items()}
    found = sum(last.values(), Counter())
    if len(found) > 1:
        counts = "; ".join(f"{flag}: " + ", ".join(
            f"{times} in {tokenizer.convert_ids_to_tokens(token)!r}" for token, times in ends.most_common())
            for flag, ends in last.items())
        fail(f"the texts end in different tokens, and a reward model is read at one ({counts}). Write all answers in "
             "one way: all as messages, or all as text, without or with the same token at the end")
    return next(iter(found), tokenizer.eos_token_id)


def set_terminator(classifier, path, flag, tokenizer, prompt, policy_tokenizer=None):
    """Decide at which token a reward model reads a response that has ended: `terminator_token_id` of its config.

    reward_model.py has written it there. For one from elsewhere it is what the rule says with its own tokenizer. None:
    at whichever token came, as for a policy whose responses may end in an ordinary one.
    """
    if policy_tokenizer and None in _terminators(policy_tokenizer).values():
        classifier.config.terminator_token_id = None
        return
    known = getattr(classifier.config, "terminator_token_id", None)
    if known is None:
        classifier.config.terminator_token_id = split_terminator(prompt, "", tokenizer)[1]
    token = tokenizer.convert_ids_to_tokens(classifier.config.terminator_token_id)
    print0(f"{'reward model':<22}{flag} {path} reads a response that has ended at {token!r}, "
           f"{'where it was trained' if known is not None else 'as its tokenizer and template suggest'}")


def generation_eos_ids(path, flag, tokenizer):
    """The ids in a model folder's generation config that end a response: they are terminators too.

    A folder without that file has the ids of its config.json instead. What stands there may be some class's default:
    of those only tokens count that can end a response.
    """
    try:
        config, file = GenerationConfig.from_pretrained(path), "generation_config.json"
    except OSError:
        try:
            config, file = AutoConfig.from_pretrained(path, trust_remote_code=False), "config.json"
        except (OSError, ValueError, KeyError):  # whoever loads the model says what is wrong with it
            return []
    ids = config.eos_token_id
    ids, vocabulary = ids if isinstance(ids, list) else [] if ids is None else [ids], tokenizer.get_vocab()
    added = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}
    if file == "config.json":
        return [token for token in ids if token in added]
    words = {number: token for token, number in vocabulary.items()}
    if getattr(config, "_from_model_config", False):  # copied from a config.json, perhaps with a default
        ids = [token for token in ids if token in words]
    for token in ids:
        if token not in words:
            fail(f"{flag} {path}: its generation_config.json ends responses at {token}, which is no token of its "
                 "tokenizer. Correct eos_token_id there")
        if token not in added:
            print0(f"warning: {flag} {path}: its generation_config.json ends responses at {token}, the ordinary token "
                   f"{words[token]!r}. So do these scripts")
    return ids


# ---- From texts to ids ------------------------------------------------------------------------------------


def encode_texts(prompt, response, tokenizer, finished=True):
    """Ids of a prompt, and ids of a response to it with its terminator: two lists.

    finished: False where a sampler has cut the response. Then it has no terminator.
    """
    response, end = split_terminator(prompt, response, tokenizer)
    ids = encode_response(prompt, response, tokenizer)
    while ids and ids[-1] in _terminators(tokenizer):  # an ordinary token that a generation config ends at
        end = ids.pop()
    return encode_prompt(prompt, tokenizer), ids + [end] * bool(finished)


def encode_text(text, tokenizer):
    """Ids of a text without a prompt, with its terminator."""
    text, end = split_terminator("", text, tokenizer)
    return encode_prompt(text, tokenizer) + [end]


def encode_prompt(text, tokenizer):
    """Ids of a text at the beginning of a row, with one BOS where the tokenizer puts one or the text brings one."""
    bos = tokenizer.bos_token
    if not (adds_bos(tokenizer) and text.lstrip().startswith(bos)):
        return tokenizer(text).input_ids
    while text.lstrip().startswith(bos):
        text = text.lstrip().removeprefix(bos)
    return tokenizer(bos + text, add_special_tokens=False).input_ids  # read as it stands: some put a space after BOS


def encode_response(prompt, response, tokenizer):
    """Ids of a text that comes after a prompt, without a terminator.

    [E1] Prompt and response are never merged into one token: the sampler starts behind the prompt's last token. Some
    tokenizers (SentencePiece's) read any text as the beginning of one and put a space before it. For these the response
    is read behind another text, whose ids are then cut off.
    """
    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    for context in _contexts(tokenizer, prompt) if prompt and response else ():
        before, both = ids_of(context), ids_of(context + response)
        if both[: len(before)] == before:  # else the beginning of the response has merged with the context
            return both[len(before) :]
    return ids_of(response)


JOINTS = [("Hello", " world"), ("Hello:\n", "world"), ("Hello", "\nworld"), ("Hello. ", "World"), ("Hello:", " 12")]


@lru_cache(maxsize=16)
def adds_bos(tokenizer):
    """Whether the tokenizer puts BOS before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


def _contexts(tokenizer, prompt):
    """The texts behind which a response is read so that it spells itself: "" if it can be read by itself."""
    return ("",) if _reads_apart(tokenizer) else (prompt[-200:], "\n", ".", "a", "0")


@lru_cache(maxsize=16)
def _reads_apart(tokenizer):
    """Whether the ids of two texts, each read alone, spell both."""
    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    return all(spell(ids_of(first) + ids_of(second), tokenizer) == spell(ids_of(first + second), tokenizer)
               for first, second in JOINTS)


def spell(ids, tokenizer):
    """The text of ids, with nothing left out or made prettier."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_spelling(rows, flag, path, tokenizer, sample=200):
    """Fail in one line where the ids of prompt and response, joined, do not spell the two texts; warn where few do not.

    rows: dicts with a prompt and a completion, or chosen and rejected. A sample of them is looked at.
    """
    wrong, step = [], max(1, len(rows) // sample)
    for number, row in list(enumerate(rows, 1))[::step]:
        for name in ("completion", "chosen", "rejected"):
            if isinstance(row.get("prompt"), str) and isinstance(row.get(name), str):
                response = split_terminator(row["prompt"], row[name], tokenizer)[0][:200]
                prompt = row["prompt"][-200:]  # what matters is where the two meet
                ids = encode_prompt(prompt, tokenizer) + encode_response(prompt, response, tokenizer)
                found, both = spell(ids, tokenizer), spell(encode_prompt(prompt + response, tokenizer), tokenizer)
                if found not in (both, prompt + response):
                    wrong.append((number, name, found[-60:], (prompt + response)[-60:]))
    if not wrong:
        return
    number, name, found, text = wrong[0]
    looked_at = len(range(0, len(rows), step))
    message = (f"{flag} {path}: in {len(wrong)} texts of {looked_at} rows the ids of prompt and response, joined, do "
               f"not spell the texts. The first is {name} of row {number}: the ids end in {found!r}, the texts in {text!r}")
    if len(wrong) > looked_at // 20:
        fail(f"{message}. Move the space or newline between the two into the response, or use another tokenizer")
    print0(f"warning: {message}")


# ---- And back ---------------------------------------------------------------------------------------------


def decode_responses(tokenizer, queries, responses):
    """Texts of responses (B, Tr) after queries (lists of ids), without special tokens, leading space kept.

    Some tokenizers (Llama 2, Mistral) drop the space before the first word when ids are decoded alone.
    """
    def texts(rows):
        return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    ends = {number for number, text in _terminators(tokenizer).items() if text}  # not every end of turn is "special"
    responses = [[token for token in response if token not in ends] for response in responses.tolist()]
    befores, wholes, alones = texts(queries), texts([q + r for q, r in zip(queries, responses)]), texts(responses)
    return [whole[len(before):] if whole.startswith(before) else alone
            for before, whole, alone in zip(befores, wholes, alones)]


def retokenize(texts, ended, tokenizer, classifier):
    """Ids of queries and responses in a reward model's own tokens [E22]: B lists; what has ended has a terminator.

    texts: (B queries, B responses); ended: B bools. Every rank must call it.
    """
    sequences = [sum(encode_texts(query, response, tokenizer, end), []) for query, response, end in zip(*texts, ended)]
    longest = max(map(len, sequences))
    limit = getattr(classifier.config, "max_position_embeddings", longest)
    fail_together(f"--retokenize: a text has {longest} of the reward model's tokens, and that has {limit} "
                  "positions. Lower the limits of prompt and response" if longest > limit else None)
    return sequences


def show_example(tokenizer, ids, counted):
    """Print one row as the model sees it, the tokens that the loss counts between ⟦ and ⟧."""
    whole, text, start = spell(ids, tokenizer), "", 0
    for edge in range(1, len(ids) + 1):
        if edge == len(ids) or counted[edge] != counted[edge - 1]:
            end = len(spell(ids[:edge], tokenizer))
            text += f"⟦{whole[start:end]}⟧" if counted[edge - 1] else whole[start:end]
            start = end
    print0(f"{'example':<22}{text!r}  (the loss counts ⟦...⟧)")
