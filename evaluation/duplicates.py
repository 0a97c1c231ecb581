"""Clips that occur more than once in a dataset, to the byte or to the eye.

Of clips that are near each other a perceptual hash finds the candidates: 64 bits of a frame that say where its
thumbnail becomes brighter to the right. Their thumbnails decide.
"""

from typing import NamedTuple

import numpy as np

from evaluation.scan import CELLS, Scan

KEEP_FIRST = ("test", "val", "train")
"""Of clips that are the same, that of an earlier split is kept: what was held out stays as it was."""
BRIGHTER = 3  # grey levels by which a cell must exceed its left neighbour; noise of compression does not
NEAR = 4  # grey levels by which a cell may differ in clips that are near; a small figure elsewhere makes more
HASHED_FRAMES = 8  # of each clip, evenly spread
NEIGHBOURS = 24  # with as many of those that share a part of a frame's hash a clip is compared
CHUNK_BYTES = 64 * 2**20  # of thumbnails compared at a time


class Duplicates(NamedTuple):
    """For each clip the number of the one that it repeats; its own if it repeats none that is kept.

    exact_N: The same frames and the same actions.
    near_N: As many frames, each of which looks the same, and the same actions; exact ones too.
    """

    exact_N: np.ndarray
    near_N: np.ndarray

    def repeats(self, near: bool = True) -> np.ndarray:
        """Which clips repeat another one, bool (N,)."""
        first_N = self.near_N if near else self.exact_N
        return first_N != np.arange(len(first_N))


def find_duplicates(scan: Scan) -> Duplicates:
    """Finds the clips that repeat another one.

    Clips cut from the same video at other frames are not found; `seen_elsewhere` counts their frames.
    """
    N = len(scan.places)
    rank_N = np.array([_rank(place.split) for place in scan.places], np.int64).reshape(N)
    order_N = np.lexsort((np.arange(N), rank_N))  # which of equals is kept: the first one of this order
    position_N = np.empty(N, np.int64)
    position_N[order_N] = np.arange(N)

    def first_of(groups_N: np.ndarray) -> np.ndarray:
        """From the number of each clip's group to the clip of the group that is kept."""
        least = np.full(groups_N.max(initial=-1) + 1, N)
        np.minimum.at(least, groups_N, position_N)
        return order_N[least[groups_N]]

    keys_N3 = np.stack([scan.clip_digests_N, scan.action_digests_N, scan.lengths_N.astype(np.uint64)], axis=1)
    _, groups_N = np.unique(keys_N3, axis=0, return_inverse=True)
    exact_N = first_of(groups_N.reshape(N))
    # In pairs, the one that is kept first: what repeats a clip that is left out itself may be unlike all that are kept.
    # Again and again, since among many that are alike not all are compared at once.
    near_N, repeated_N, found = np.arange(N), np.zeros(N, bool), True
    while found:
        kept, found = np.flatnonzero((exact_N == np.arange(N)) & (near_N == np.arange(N))), False
        pairs_P2 = np.sort(position_N[_confirmed(scan, _candidates(scan, kept))], axis=1)
        for first, second in order_N[pairs_P2[np.lexsort((pairs_P2[:, 0], pairs_P2[:, 1]))]]:
            if near_N[first] == first and near_N[second] == second and not repeated_N[second]:
                near_N[second], repeated_N[first], found = first, True, True
    return Duplicates(exact_N, near_N[exact_N])


def _rank(split: str) -> int:
    return KEEP_FIRST.index(split) if split in KEEP_FIRST else len(KEEP_FIRST)


def perceptual_hashes(thumbnails_FZ: np.ndarray) -> np.ndarray:
    """64 bits for each thumbnail, uint64: whether each cell is brighter than the one to its left, by rows."""
    cells = thumbnails_FZ.reshape(-1, CELLS, CELLS).astype(np.int16)
    brighter = cells - np.roll(cells, 1, axis=2) > BRIGHTER
    return np.packbits(brighter.reshape(len(cells), -1), axis=1).view(np.uint64).reshape(-1)


def _candidates(scan: Scan, clips: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of as long clips of which some frame looks the same in the same place, as its hash tells.

    A quarter of the hash is enough, for where neighbouring cells are about alike noise decides a bit.
    """
    lengths, starts = scan.lengths_N[clips], scan.starts_N[clips]
    found = [np.empty((0, 2), np.int64)]
    for k in range(HASHED_FRAMES):
        thumbnails = scan.thumbnails_FZ[starts + (k * (lengths - 1)) // max(1, HASHED_FRAMES - 1)]
        brightness = thumbnails.sum(axis=1, dtype=np.int64)
        for quarter in perceptual_hashes(thumbnails).view(np.uint16).reshape(-1, 4).T:
            # By brightness within a quarter: of many that share it those are compared that are most alike.
            order = np.lexsort((brightness, quarter, lengths))
            keys = lengths[order] * 2**16 + quarter[order]
            for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
                same = np.flatnonzero(keys[step:] == keys[:-step])
                a, b = order[same], order[same + step]
                alike = _look_alike(thumbnails[a], thumbnails[b])
                found.append(np.sort(clips[np.stack([a[alike], b[alike]], axis=1)], axis=1))
        found = [np.unique(np.concatenate(found), axis=0)]
    return found[0]


def _look_alike(a_PZ: np.ndarray, b_PZ: np.ndarray) -> np.ndarray:
    """Whether each cell of thumbnails (…, Z) differs by `NEAR` grey levels at most."""
    return ((np.maximum(a_PZ, b_PZ) - np.minimum(a_PZ, b_PZ)) <= NEAR).all(axis=-1)


def _confirmed(scan: Scan, pairs_P2: np.ndarray) -> np.ndarray:
    """Those of the pairs of which all thumbnails and the actions are the same, nearly."""
    starts, digests = scan.starts_N, scan.action_digests_N
    pairs_P2 = pairs_P2[digests[pairs_P2[:, 0]] == digests[pairs_P2[:, 1]]]
    near = [np.empty((0, 2), np.int64)]
    for length in np.unique(scan.lengths_N[pairs_P2[:, 0]]):
        of_length = pairs_P2[scan.lengths_N[pairs_P2[:, 0]] == length]
        step = max(1, CHUNK_BYTES // int(2 * length * CELLS * CELLS))
        for first in range(0, len(of_length), step):
            chunk = of_length[first : first + step]
            frames = starts[chunk][..., None] + np.arange(length)
            alike = _look_alike(scan.thumbnails_FZ[frames[:, 0]], scan.thumbnails_FZ[frames[:, 1]])
            near.append(chunk[alike.all(axis=1)])
    return np.concatenate(near)


def seen_elsewhere(scan: Scan, split: str, other: str) -> tuple[float, float]:
    """Shares of a split's frames that occur in another split too: to the byte, and by their perceptual hash."""
    of_frames = {name: np.repeat(scan.of_split(name), scan.lengths_N) for name in (split, other)}
    here, there = of_frames[split], of_frames[other]
    if not here.any():
        return 0.0, 0.0
    # Brighter to the right and brighter below: a picture of large areas alone has not enough of either.
    turned = scan.thumbnails_FZ.reshape(-1, CELLS, CELLS).swapaxes(1, 2).reshape(-1, CELLS * CELLS)
    hashes = perceptual_hashes(scan.thumbnails_FZ) * np.uint64(0x9E3779B97F4A7C15) + perceptual_hashes(turned)
    same = (np.isin(values[here], values[there]).mean() for values in (scan.frame_digests_F, hashes))
    exact, alike = (float(share) for share in same)
    return exact, alike
