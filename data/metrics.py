"""What a prediction is worth: accuracy, F1, SQuAD's exact match and F1 (arXiv 1606.05250). All are fractions 0 … 1."""

import re
import string
from collections import Counter

import numpy as np


def accuracy(predicted: list, expected: list) -> float:
    """The share of predictions that equal what was expected (two lists of the same length)."""
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def binary_f1(predicted: list, expected: list, positive) -> float:
    """Harmonic mean of precision and recall of the label `positive`; 0 if it is never predicted rightly."""
    hits = sum(p == e == positive for p, e in zip(predicted, expected, strict=True))
    return 2 * hits / (predicted.count(positive) + expected.count(positive)) if hits else 0.0


def spearman(predicted, expected) -> float:
    """Spearman's rank correlation of two arrays of the same length; equal numbers share their mean rank. 0 where one
    of them orders nothing."""
    ranks = []
    for values in (predicted, expected):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[place])
    if min(np.ptp(each) for each in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


# ---------------------------------------------------------------- SQuAD

def normalize_answer(text: str) -> str:
    """As SQuAD's official script compares: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(predicted: str, expected: str) -> float:
    """F1 of the words two answers share, after normalize_answer; a word counts as often as it occurs in both."""
    predicted_words, expected_words = normalize_answer(predicted).split(), normalize_answer(expected).split()
    common = (Counter(predicted_words) & Counter(expected_words)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted_words), common / len(expected_words)
    return 2 * precision * recall / (precision + recall)        # in SQuAD's order of operations, for its last digit


def squad_scores(predictions: dict[str, str], answers: dict[str, list[str]]) -> dict[str, float]:
    """`exact_match` and `f1` averaged over the questions of `answers` {id: accepted answers}; the best one counts."""
    exact = f1 = 0.0
    for identifier, accepted in answers.items():
        predicted = predictions[identifier]
        exact += max(normalize_answer(predicted) == normalize_answer(answer) for answer in accepted)
        f1 += max(answer_f1(predicted, answer) for answer in accepted)
    return {"exact_match": exact / len(answers), "f1": f1 / len(answers)}


def best_span(windows: list[dict], start_logits: list, end_logits: list,
              longest: int = 30) -> tuple[str, int, int, float]:
    """The best answer over all windows of one question: (text, first character, end character, score).

    `windows` are rows of TaskData.encode_question; start_logits[i] and end_logits[i] are float arrays with at least as
    many entries as window i has tokens. The score of a span is its start logit plus its end logit. Only spans of 1 to
    `longest` tokens of the context are looked at, and all of them: BERT's script takes the 20 best starts and ends
    first, which saves nothing here. The text is cut from the original context, so case and spaces are kept.
    """
    best = ("", 0, 0, -np.inf)
    for window, start, end in zip(windows, start_logits, end_logits, strict=True):
        offsets, begin = window["offsets"], window["context_begin"]
        count = len(offsets)
        start, end = np.asarray(start)[begin:begin + count], np.asarray(end)[begin:begin + count]
        for extra in range(min(longest, count)):            # spans of extra + 1 tokens, all at once
            scores = start[:count - extra] + end[extra:]
            token = int(scores.argmax())
            if scores[token] > best[3]:
                first, last = int(offsets[token, 0]), int(offsets[token + extra, 1])
                best = (window["context"][first:last], first, last, float(scores[token]))
    return best
