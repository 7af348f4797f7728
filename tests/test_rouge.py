"""ROUGE: Google's figures for English, and figures for every other script."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from utils.rouge import ROUGE, Words, rouge

TEXTS = {
    "russian": "Привет, мир! Ёжик ушёл.", "greek": "Καλημέρα, ΟΔΟΣ!", "georgian": "ქართული ენა", "amharic": "ሰላም ለዓለም",
    "korean": "안녕하세요, 세계", "chinese": "这是一个测试。", "japanese": "今日はカタカナです。", "thai": "ฉันรักภาษาไทย", "lao": "ສະບາຍດີ",
    "khmer": "ភាសាខ្មែរ", "burmese": "မြန်မာစာ", "tibetan": "བོད་སྐད་ཡིན།", "hindi": "मैं हिन्दी बोलता हूँ।", "tamil": "தமிழ் மொழி",
    "arabic": "كَتَبَ الوَلَدُ رِسالةً", "persian": "می‌خواهم بروم", "hebrew": "שָׁלוֹם עוֹלָם", "vietnamese": "tiếng Việt"}


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_has_googles_tokens(text):
    """Punctuation, digits, underscores, control characters and all: the same tokens as rouge-score's own."""
    assert Words().tokenize(text) == DefaultTokenizer().tokenize(text)


def test_english_has_googles_figures_without_stems():
    """N+ calls the library with its defaults: running and runs are two words."""
    references = [" She's running home, at 10:30 (again)...", " a good_cat", " It rained all day"]
    responses = [" He's running home again", " a good cat!", ""]
    scorer = RougeScorer(ROUGE)
    for name in ROUGE:
        expected = [scorer.score(*pair)[name].fmeasure for pair in zip(references, responses)]
        assert rouge(references, responses)[name] == pytest.approx(sum(expected) / 3) and 0 < expected[0] < 1
    assert rouge(["running"], ["runs"])["rouge1"] == 0.0


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_equal_texts_have_1_in_any_script(text):
    """Equal texts have 1, foreign ones 0, half of the text between."""
    assert rouge([text], [text]) == dict.fromkeys(ROUGE, 1.0)
    assert rouge([text], ["zebra quagga"]) == dict.fromkeys(ROUGE, 0.0)
    tokens = Words().tokenize(text)
    assert 0 < rouge([text], [tokens[0]])["rougeL"] < 1
    assert "".join(tokens) == "".join(c for c in text.lower() if c not in string.punctuation + " \u200c。།་।")


@pytest.mark.parametrize("text, tokens", [
    ("Привет, мир!", ["привет", "мир"]), ("Don’t", ["don", "t"]), ("naïve café", ["naïve", "café"]),
    ("测试 GPT4模型", ["测", "试", "gpt4", "模", "型"]), ("カナ", ["カ", "ナ"]), ("ไทยกิน", ["ไ", "ท", "ย", "กิ", "น"]),
    ("हिन्दी में", ["हिन्दी", "में"]), ("كَتَبَ", ["كَتَبَ"]), ("می‌خواهم", ["میخواهم"]), ("안녕 세계", ["안녕", "세계"]),
    ("\u2764\ufe0f ok", ["ok"]), ("cafe\u0301", ["café"])])
def test_tokens_by_hand(text, tokens):
    """Words of alphabets, letters of scripts without spaces; marks stay with their letter; an accent has one form."""
    assert Words().tokenize(text) == tokens


def test_rows_without_a_token_have_no_figure():
    """A reference of emoji or nothing is left out of the mean; an empty response to a real one has 0."""
    assert rouge(["a cat", "🎉❤️", "", "..."], ["a cat", "🎉❤️", "", "a"]) == dict.fromkeys(ROUGE, 1.0)
    assert rouge(["a cat", "a cat"], ["a cat", "🎉"]) == dict.fromkeys(ROUGE, 0.5)
    assert rouge(["🎉", ""], ["🎉", "a"]) == rouge([], []) == {}


def test_order_counts_in_rouge_l_and_pairs_in_rouge_2():
    words = TEXTS["chinese"][:6]
    shuffled = "".join(random.Random(1).sample(words, 6))
    found = rouge([words], [shuffled])
    assert found["rouge1"] == 1.0 and found["rouge2"] < 1 and found["rougeL"] < 1
