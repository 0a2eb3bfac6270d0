"""What the words of questions give away: the best of several blind guessers, fitted on other questions."""

import re
from collections import Counter

import numpy as np

from lib.streams import numpy_stream


def text_features(question):
    """Features of each option: letter, words, rank, likeness; the same given the question without its numbers, or whole."""
    template = re.sub(r"\d+(\.\d+)?", "#", question["question"])
    texts = [option.split(". ", 1)[1] for option in question["options"]]
    ends = [(text.split()[0], text.split()[-1]) for text in texts]
    features = []
    for letter, text, words in zip("ABCDEF", texts, ends, strict=False):
        alike = [sum(word in other for other in ends) for word in words]
        alone = [letter, text, *words, f"alike {alike}", f"rank {sorted(texts).index(text)}"]
        features.append(list(alone))
        for condition in (template, question["question"]):
            features[-1] += [f"{condition} | {feature}" for feature in alone]
    return features


def text_only_chance(train: list[dict], test: list[dict], epochs: int = 12) -> float:
    """The best accuracy that the text alone allows, of several blind rules fitted on the training questions.

    The rules: the commonest letter; the commonest letter given the question; the option that was the answer most often
    when offered, given the question or its template; a linear model. Near 1 / options if nothing gives itself away.
    """
    train_rows = [text_features(question) for question in train]
    test_rows = [text_features(question) for question in test]
    train_gold = ["ABCDEF".index(question["answer"]) for question in train]
    test_gold = ["ABCDEF".index(question["answer"]) for question in test]

    offered = Counter()
    right = Counter()
    for options, gold in zip(train_rows, train_gold, strict=True):
        for option in options:
            offered.update(option)
        right.update(options[gold])

    # how often an option with a feature was the answer; 1/4 for one that was never offered
    share = {feature: (right[feature] + 1) / (offered[feature] + 4) for feature in offered}
    guesses = []
    width = len(train_rows[0][0]) // 3
    for position in (0, 1):  # the letter, the whole text
        for i in (position, position + width, position + 2 * width):  # alone, given the template,
            guesses.append(
                [np.argmax([share.get(row[i], 1 / 4) for row in rows]) for rows in test_rows]
            )
    guesses.append(linear_guesses(train_rows, train_gold, test_rows, list(offered), epochs))
    return max(float(np.mean(np.array(guess) == test_gold)) for guess in guesses)


def linear_guesses(train_rows, train_gold, test_rows, known, epochs):
    """Conditional logit over `known` features by stochastic gradient descent -> the option it takes, per test question."""
    index = {feature: i for i, feature in enumerate(known)}
    weights = np.zeros(len(index) + 1)  # the last one is every unknown feature: never learned

    def coded(options):
        return np.array([[index.get(feature, -1) for feature in option] for option in options])

    train_codes = [coded(options) for options in train_rows]  # (options, features) each
    for epoch in range(epochs):
        for q in numpy_stream("text guess", epoch).permutation(len(train_codes)):
            codes = train_codes[q]
            scores = weights[codes].sum(1)
            odds = np.exp(scores - scores.max())
            slope = (np.arange(len(codes)) == train_gold[q]) - odds / odds.sum()
            np.add.at(weights, codes, 0.05 / (1 + epoch) * slope[:, None])
            weights[-1] = 0
    return [int(weights[coded(options)].sum(1).argmax()) for options in test_rows]
