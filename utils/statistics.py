"""Statistics of held-out pairs: accuracy with ties, its interval, calibration."""

import numpy as np


def accuracy(chosen, rejected):
    """1 where the chosen one has the higher number, 1/2 at ties [E7], per pair: (N,), (N,) -> (N,)."""
    chosen, rejected = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def clustered_interval(values, clusters, resamples=1000):
    """95 % bootstrap interval of a mean, drawing whole clusters: pairs that share a prompt are not independent."""
    _, index = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    draws = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


def calibration(chosen_scores, rejected_scores, width=0.5):
    """Is a difference worth what sigmoid(difference) says? Pairs in bins of |difference| [detail 18].

    Returns a list of {from, pairs, accuracy, predicted} for the bins up to the 99.5 % quantile. predicted is the bin's
    mean of sigmoid(|difference|). Where it is above accuracy, the model is too sure.
    """
    differences = np.asarray(chosen_scores) - np.asarray(rejected_scores)
    sizes, correct = np.abs(differences), accuracy(differences, 0 * differences)
    table = []
    for low in np.arange(0, np.quantile(sizes, 0.995) + 1e-12, width):
        inside = (sizes >= low) & (sizes < low + width)
        if inside.any():
            table.append({"from": float(low), "pairs": int(inside.sum()), "accuracy": float(correct[inside].mean()),
                          "predicted": float((1 / (1 + np.exp(-sizes[inside]))).mean())})
    return table
