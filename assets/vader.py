"""The gold judge of the embedded task: VADER's sentiment (Hutto and Gilbert 2014) of the whole sentence.

PPO never trains on it: it shows whether the reward model's score is worth anything.
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_analyzer = SentimentIntensityAnalyzer()


def compound(queries, responses):
    """VADER's compound score of query + response, from -1 (unpleasant) to 1 (pleasant). Texts in, floats out."""
    return [_analyzer.polarity_scores(query + response)["compound"] for query, response in zip(queries, responses)]


def positive(queries, responses):
    """1.0 where the compound score is at least 0.05, VADER's own line for positive text, else 0.0."""
    return [float(score >= 0.05) for score in compound(queries, responses)]
