"""Texts that are nearly the same, and texts that share a long passage.

In: texts. Out: pairs of places with their similarity; word n-grams as 64-bit numbers.
Must not know: examples, files, findings.

Near duplicates (Broder 1997): the Jaccard similarity of the sets of 3-word shingles. MinHash with banding (rensa)
proposes pairs, the sets themselves decide: there are no false positives, and with 160 permutations in 32 bands a pair
at the threshold is proposed with a probability of 1 - (1 - 0.7^5)^32 = 99.7 %.
Shapes: N texts, W words of a text, P permutations.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

THRESHOLD = 0.7
"""Jaccard similarity from which two texts are near duplicates: about one word in twelve changed."""
SHINGLE_WORDS = 3
"""Short enough for answers of ten words, long enough that common phrases do not match."""
NUM_PERMUTATIONS, NUM_BANDS, SEED = 160, 32, 20261121
ESTIMATE_MARGIN = 0.15
"""The signatures' own estimate has a standard deviation of 0.036 at 0.7: four of them below are not looked at."""
WINDOW = 8
"""A row of a bucket is compared with this many that follow it: large buckets cost time in proportion to their size."""
CHUNK = 4096
MAX_VOCABULARY = 2_000_000  # about 300 MB; then the table of word hashes starts anew
# Chinese and Japanese write no spaces: each of their characters counts as a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


@dataclass(frozen=True, slots=True)
class NearPair:
    """Two places, first < second, and the Jaccard similarity of their texts."""

    first: int
    second: int
    similarity: float


class Words:
    """Texts to word hashes, equal in every process; each word is hashed once."""

    def __init__(self) -> None:
        self._table: dict[str, int] = {}

    def hashes(self, text: str) -> Hashes:
        """One number a word, [W]; case does not count."""
        table = self._table
        words = WORD.findall(text.lower())
        missing = {word for word in words if word not in table}
        if len(table) + len(missing) > MAX_VOCABULARY:
            table.clear()
            missing = set(words)
        for word in missing:
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            table[word] = int.from_bytes(digest, "little")
        return np.fromiter((table[word] for word in words), dtype=np.uint64, count=len(words))

    def ngrams(self, text: str, num_words: int, *, whole_only: bool = False) -> Hashes:
        """One number for every run of `num_words` words, [W - num_words + 1].

        A shorter text is one run, or none with `whole_only`.
        """
        words_W = self.hashes(text)
        if not len(words_W) or (whole_only and len(words_W) < num_words):
            return words_W[:0]
        length = min(num_words, len(words_W))
        count = len(words_W) - length + 1
        total = np.zeros(count, dtype=np.uint64)
        for place in range(length):  # wraps around at 2^64, as a polynomial hash should
            total = total * _MULTIPLIER + words_W[place : place + count]
        return total ^ (total >> np.uint64(29))

    def shingles(self, text: str) -> Hashes:
        """The set of the text's shingles, sorted."""
        return np.unique(self.ngrams(text, SHINGLE_WORDS))


def jaccard(first: Hashes, second: Hashes) -> float:
    """Shared members over all members of two sorted sets; 1 for two empty ones."""
    if not len(first) and not len(second):
        return 1.0
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def near_pairs(texts: Sequence[str], words: Words, *, threshold: float = THRESHOLD) -> list[NearPair]:
    """Pairs of texts whose similarity is at least `threshold`, each computed from the sets themselves.

    Texts without a word are left out. In a group of many alike texts not every pair is listed, but each text is
    linked to a neighbour of its group.
    """
    signatures_NP, present = _signatures(texts, words)
    if len(present) < 2:
        return []

    @lru_cache(maxsize=8192)
    def shingles(place: int) -> Hashes:
        return words.shingles(texts[place])

    found = []
    for first, second in _candidates(signatures_NP, threshold):
        one, two = present[first], present[second]
        similarity = jaccard(shingles(one), shingles(two))
        if similarity >= threshold:
            found.append(NearPair(one, two, similarity))
    return found


def _signatures(texts: Sequence[str], words: Words) -> tuple[npt.NDArray[np.uint32], list[int]]:
    """MinHash signatures, [N, P], and the places of the texts that have a word."""
    import rensa

    parts: list[npt.NDArray[np.uint32]] = []
    present: list[int] = []
    for start in range(0, len(texts), CHUNK):
        shingles = [words.shingles(text) for text in texts[start : start + CHUNK]]
        kept = [place for place, members in enumerate(shingles) if len(members)]
        if not kept:
            continue
        present += [start + place for place in kept]
        flat = np.concatenate([shingles[place] for place in kept])
        ends = np.cumsum([0, *(len(shingles[place]) for place in kept)]).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, NUM_PERMUTATIONS, SEED)
        parts.append(np.asarray(matrix.to_rows(), dtype=np.uint32))
    empty = np.zeros((0, NUM_PERMUTATIONS), dtype=np.uint32)
    return (np.concatenate(parts) if parts else empty), present


def _candidates(signatures_NP: npt.NDArray[np.uint32], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows that share a band and whose signatures agree well enough, each once, in order."""
    rows = NUM_PERMUTATIONS // NUM_BANDS
    found = np.zeros(0, dtype=np.int64)
    num = len(signatures_NP)
    for band in range(NUM_BANDS):
        part = np.ascontiguousarray(signatures_NP[:, band * rows : (band + 1) * rows])
        keys = np.zeros(num, dtype=np.uint64)
        for column in range(rows):
            keys = keys * _MULTIPLIER + part[:, column].astype(np.uint64)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        fresh = []
        for step in range(1, min(WINDOW, num - 1) + 1):
            same = np.flatnonzero(ordered[:-step] == ordered[step:])
            fresh.append(order[same].astype(np.int64) * num + order[same + step])
        unseen = np.setdiff1d(np.concatenate(fresh), found)
        found = np.union1d(found, unseen[_alike(signatures_NP, unseen, threshold - ESTIMATE_MARGIN)])
    yield from ((int(code) // num, int(code) % num) for code in found)


def _alike(signatures_NP: npt.NDArray[np.uint32], codes: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Whether the signatures of each pair agree in at least this share of their numbers."""
    num = len(signatures_NP)
    result = np.zeros(len(codes), dtype=np.bool_)
    for start in range(0, len(codes), CHUNK * 4):
        part = codes[start : start + CHUNK * 4]
        agree = (signatures_NP[part // num] == signatures_NP[part % num]).mean(axis=1)
        result[start : start + len(part)] = agree >= share
    return result


def clusters(pairs: Sequence[NearPair]) -> list[list[int]]:
    """Places that are linked by pairs, each group in order, groups by their first place."""
    parent: dict[int, int] = {}

    def root(place: int) -> int:
        parent.setdefault(place, place)
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for pair in pairs:
        one, two = sorted((root(pair.first), root(pair.second)))
        parent[two] = one
    groups: dict[int, list[int]] = {}
    for place in sorted(parent):
        groups.setdefault(root(place), []).append(place)
    return [groups[key] for key in sorted(groups)]
