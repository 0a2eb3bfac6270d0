"""
Answers without a policy: what words alone give away, and what captions and pixel columns of the given views hold.

Every solver is fitted on some questions of a family and asked others. They are the yardsticks of experiments/questions.py.
"""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lib.consistency import WEAK, describe
from lib.geometry import Array
from lib.rooms import COLOURS
from lib.streams import stream_seed

COLOUR_NAMES = list(COLOURS)


def gold_of(rows: list[dict]) -> Array:
    """(n,) index of the right option."""
    return np.array(["ABCD".index(row["answer"]) for row in rows])


def colours_of(row: dict) -> list[int]:
    """The options of a question as indices into COLOURS."""
    return [COLOUR_NAMES.index(option[3:]) for option in row["options"]]


# ---- words -----------------------------------------------------------------------------------------------------------


def wording(row: dict) -> str:
    """The question without its colours and image numbers."""
    words = re.sub(r"Image-\d", "Image", row["question"]).split()
    return " ".join(word for word in words if word not in COLOURS)


class Words:
    """Questions as vectors: a bag of words, the colours offered, and which wording it is; fitted on `rows`."""

    def __init__(self, rows: list[dict]):
        known = {feature for row in rows for feature in self.features(row)}
        self.index = {feature: i for i, feature in enumerate(sorted(known))}

    def features(self, row: dict) -> list[str]:
        offered = [f"option {option[3:]}" for option in row["options"]]
        return [*row["question"].split(), *offered, wording(row)]

    def vectors(self, rows: list[dict]) -> torch.Tensor:
        """(n, features), the last one constant."""
        vectors = torch.zeros(len(rows), len(self.index) + 1)
        vectors[:, -1] = 1
        for vector, row in zip(vectors, rows, strict=True):
            for feature in self.features(row):
                if feature in self.index:
                    vector[self.index[feature]] = 1
        return vectors


def ridge(fit_x: torch.Tensor, fit_y: Array, test_x: torch.Tensor, penalty: float = 10.0) -> Array:
    """Predictions (n,) of a linear model with an L2 penalty."""
    y = torch.tensor(fit_y, dtype=torch.float32)
    gram = fit_x.T @ fit_x + penalty * torch.eye(fit_x.shape[1])
    return (test_x @ torch.linalg.solve(gram, fit_x.T @ y)).numpy()


def template_means(fit: list[dict], fit_y: Array, test: list[dict]) -> Array:
    """Predictions (n,): the mean of the questions of the same wording, or of all where there is none."""
    groups = defaultdict(list)
    for row, y in zip(fit, fit_y, strict=True):
        groups[wording(row)].append(y)
    every = np.mean(fit_y)
    return np.array([np.mean(groups.get(wording(row), [every])) for row in test])


def area_under_curve(scores: Array, true: Array) -> float:
    """AUC: how often a positive one (1) has the higher score than a negative one (0), ties counted half."""
    positive = true > 0.5
    high = scores[positive][:, None]
    low = scores[~positive][None]
    if high.size == 0 or low.size == 0:
        return float("nan")
    return float((high > low).mean() + 0.5 * (high == low).mean())


def explained(scores: Array, true: Array) -> float:
    """R²: the share of the variance that predictions explain."""
    return float(1 - np.square(true - scores).mean() / np.var(true))


def told_by_words(fit: list[dict], test: list[dict], value, measure) -> float:
    """The better of two guessers of a number from the words, ridge on a bag of words and the mean of a wording.

    value(row) -> a number, or None for a row that does not count;  measure(predictions, true values) -> float
    """
    fit = [row for row in fit if value(row) is not None]
    test = [row for row in test if value(row) is not None]
    if not fit or not test:
        return float("nan")
    fit_y = np.array([value(row) for row in fit], float)
    test_y = np.array([value(row) for row in test], float)
    words = Words(fit)
    linear = ridge(words.vectors(fit), fit_y, words.vectors(test))
    means = template_means(fit, fit_y, test)
    return max(measure(linear, test_y), measure(means, test_y))


# ---- captions and columns of the given views -------------------------------------------------------------------------


class Given(NamedTuple):
    """What the four given views of a question show, by colours."""

    count: Array  # (4, 8) pixels
    degrees: Array  # (4, 8) to the right of the view's middle


def given_views(images: Array) -> list[Given]:
    """(n, 4, H, W, 3) uint8 -> what each question's views show."""
    n = len(images)
    content = describe(images.reshape(n * 4, *images.shape[2:]))
    degrees = np.degrees(np.arctan(2 * content.middle - 1))
    pairs = zip(content.count.reshape(n, 4, 8), degrees.reshape(n, 4, 8), strict=True)
    return [Given(count, angle) for count, angle in pairs]


def start_of(row: dict) -> int:
    """Index of the given image that the ideal calls start from, or that answers as it stands."""
    return (row["ideal"][0]["reference_image"] if row["ideal"] else row["shown_by"]) - 1


def caption(row: dict, given: Given, colour: int | None) -> list[float]:
    """Where a colour stands in a perfect caption of each view, the one that the turn starts from first, then what
    lies to its right: absent, or its place from the left and from the right."""
    places = np.zeros((4, 9))
    for d in range(4):
        k = (start_of(row) - d) % 4
        seen = np.flatnonzero(given.count[k] >= WEAK)
        order = seen[np.argsort(given.degrees[k][seen])].tolist()
        if colour not in order:
            places[d, 0] = 1
            continue
        place = order.index(colour)
        places[d, 1 + min(place, 3)] = 1
        places[d, 5 + min(len(order) - 1 - place, 3)] = 1
    return places.flatten().tolist()


def captions(row: dict, given: Given) -> list[list[float]]:
    """Per option: the captions' places of its colour and of the one that the words name."""
    colour = COLOUR_NAMES.index(row["named"]) if row["named"] else None
    named = caption(row, given, colour)
    return [caption(row, given, colour) + named for colour in colours_of(row)]


def columns(row: dict, given: Given) -> list[list[float]]:
    """Per option: its angle around the viewer from where the asked view looks, its size, and those of all others."""
    colour = COLOUR_NAMES.index(row["named"]) if row["named"] else None
    best = given.count.argmax(0)  # (8,) the view that shows most of a colour
    every = np.arange(8)
    angles = given.degrees[best, every] - 90 * (best - start_of(row))
    sizes = given.count[best, every] / 100
    if colour is not None:
        turn = given.degrees[best[colour], colour]
    else:
        turn = sum(call["value"] for call in row["ideal"] if call["motion_type"] == "dangle")
    angles = (angles - turn + 180) % 360 - 180
    angles[sizes == 0] = 180
    order = np.argsort(angles)
    others = np.stack([angles[order] / 45, sizes[order]]).flatten().tolist()
    options = []
    for option in colours_of(row):
        bins = np.eye(13)[int(np.clip(np.round(angles[option] / 10), -6, 6)) + 6]
        own = [angles[option] / 45, abs(angles[option]) / 45, sizes[option], option == colour]
        options.append([*own, *bins.tolist(), *others])
    return options


def learned_solver(make, fit: tuple, test: tuple, seed: int = 0, epochs: int = 40) -> Array:
    """Right or wrong (n,) of a network that scores options by `make` (captions or columns) and the wording.

    fit, test   (rows, what their given views show)
    """
    wordings = sorted({wording(row) for row in fit[0]})

    def encoded(rows, views):
        x = torch.tensor([make(row, given) for row, given in zip(rows, views, strict=True)])
        asked = torch.tensor([[wording(row) == known for known in wordings] for row in rows])
        return torch.cat([x, asked.float()[:, None].expand(-1, 4, -1)], -1).float()

    fit_x, test_x = encoded(*fit), encoded(*test)  # (n, 4, features)
    gold = torch.from_numpy(gold_of(fit[0]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("weights", seed, "solver"))
        net = nn.Sequential(
            nn.Linear(fit_x.shape[-1], 128),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 1),
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
        for _ in range(epochs):
            for batch in torch.randperm(len(gold)).split(64):
                loss = F.cross_entropy(net(fit_x[batch])[..., 0], gold[batch])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        guesses = net(test_x)[..., 0].argmax(1)
    return guesses.numpy() == gold_of(test[0])
