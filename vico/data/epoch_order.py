"""Which questions an epoch takes, and in which order."""

from collections.abc import Sequence

import numpy as np

from vico.data.mixture import DatasetChoice, epoch_count

PART = 1  # tells the seed of a part from those of an epoch's order and of the caption crops


class EpochOrder:
    """Which questions an epoch takes, and in which order: a function of the seed and the epoch.

    A data set of weight w and n questions brings round(w * n): whole repetitions of it, and a part
    that differs each epoch. All are shuffled together, or else come in file order, one data set
    after the other.
    """

    def __init__(
        self, datasets: Sequence[str], choices: Sequence[DatasetChoice], seed: int, shuffle: bool
    ) -> None:
        """`datasets`: the name of each question's data set."""
        self._seed, self._shuffle = seed, shuffle
        names_N = np.array(datasets)
        self._sets: list[tuple[np.ndarray, int]] = []  # places of a set, how many an epoch takes
        for choice in choices:
            places = np.flatnonzero(names_N == choice.name)
            self._sets.append((places, epoch_count(choice, len(places))))

    def __len__(self) -> int:
        """Questions of an epoch."""
        return sum(count for _, count in self._sets)

    def places(self, epoch: int) -> np.ndarray:
        """Positions of the epoch's questions, in its order."""
        members = [np.empty(0, np.int64)]
        for number, (places, count) in enumerate(self._sets):
            repetitions, rest = divmod(count, len(places))
            members += [places] * repetitions
            if rest:
                members.append(self._part(number, places, rest, epoch))
        joined = np.concatenate(members)
        if not self._shuffle:
            return joined
        return joined[np.random.default_rng([self._seed, epoch]).permutation(len(joined))]

    def _part(self, number: int, places: np.ndarray, count: int, epoch: int) -> np.ndarray:
        """`count` of `places`, each once. Every ceil(n / count) epochs, all have been taken."""
        num_parts = -(-len(places) // count)
        cycle, part = divmod(epoch, num_parts)
        start = min(part * count, len(places) - count)
        if self._shuffle:
            rng = np.random.default_rng([self._seed, cycle, number, PART])
            places = places[rng.permutation(len(places))]
        return places[start : start + count]
