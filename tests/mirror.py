"""A simulator for tests of dialogues."""


class Mirror:
    """A simulator that returns its reference image, mirrored; it remembers what it was asked."""

    def __init__(self):
        self.batches = []

    def imagine(self, queries):
        self.batches.append(queries)
        return [query.images[query.reference - 1][:, ::-1].copy() for query in queries]
