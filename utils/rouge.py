"""ROUGE of responses against references: Google's rouge-score, without stems, on tokens of every script."""

import unicodedata

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

ROUGE = "rouge1", "rouge2", "rougeL"
UNSPACED = (  # how Unicode's names of the letters begin in scripts that put no space between words
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "YI ", "THAI", "LAO", "KHMER",
    "MYANMAR", "TAI ", "NEW TAI", "JAVANESE", "BALINESE")


class Words:
    """Tokens of a text for rouge-score, whose own drops every character but a-z and 0-9.

    ASCII has the same tokens as there. A word is a run of letters and digits of any script. In scripts without spaces
    each letter is a token. Marks (vowel signs, accents) belong to the letter before them.
    """

    def tokenize(self, text):
        tokens, before = [], ""  # before: what a character can continue
        for character in unicodedata.normalize("NFC", text.lower()):
            kind = unicodedata.category(character)
            if kind == "Cf":  # invisible: joiners inside a word, directions; one of them separates words
                before = "" if character == "\u200b" else before
                continue
            if kind[0] == "M":
                if before:
                    tokens[-1] += character
            elif kind[0] not in "LN":
                before = ""
            elif unicodedata.name(character, "").startswith(UNSPACED):
                tokens.append(character)
                before = "letter"
            elif before == "word":
                tokens[-1] += character
            else:
                tokens.append(character)
                before = "word"
        return tokens


def rouge(references, responses):
    """Mean ROUGE-1, -2 and -L F-measures, as N+ calls the library: no stems. {name: mean}.

    A row whose reference has no token (empty, emoji alone) has no figure and is left out. With no row left there is
    none at all: {}. A response without a token has 0 against any other reference.
    """
    words = Words()
    scorer = RougeScorer(ROUGE, tokenizer=words)
    scores = [scorer.score(reference, response) for reference, response in zip(references, responses)
              if words.tokenize(reference)]
    return {name: np.mean([score[name].fmeasure for score in scores]) for name in ROUGE if scores}
