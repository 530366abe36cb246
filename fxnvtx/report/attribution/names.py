"""Numbers for ranges' names: from a row's text, domain and category to the `Name` that distinguishes siblings; numbers
for keys in general, and sums by number that never round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...categories import PIECE
from ..labels import Name, clean, numbered
from .batches import Ints, Mask

__all__ = ["MODULE", "OTHER", "RESIDENCY", "Interner", "Names", "Numbered", "Sums", "grown"]


_EXACT = 1 << 53  # integers up to here are exact in a float64, which is what bincount adds in
_LOW = (1 << 32) - 1


class Interner:
    """Integer keys to small numbers. `make` is asked for the number of each new key, in the order they appear in."""

    def __init__(self, make: Callable[[int], int] | None = None) -> None:
        self._make = make
        self._keys = np.empty(0, np.int64)
        self._ids = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[int]:
        """All keys, by their number. Only without `make`."""
        return list(self._keys[np.argsort(self._ids)].tolist())

    def __call__(self, keys: Ints) -> Ints:
        if not len(keys):
            return np.empty(0, np.int64)
        if (keys == keys[0]).all():
            return np.full(len(keys), self._few(keys[:1])[0])
        return self._few(keys)

    def _few(self, keys: Ints) -> Ints:
        found = self._look(keys)
        missing = found < 0
        if missing.any():
            self._add(keys[missing])
            found = self._look(keys)
        return found

    def _look(self, keys: Ints) -> Ints:
        """-1 where a key is new."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._ids[at], -1)

    def _add(self, keys: Ints) -> None:
        new, first = np.unique(keys, return_index=True)
        new = new[np.argsort(first, kind="stable")]
        if self._make is None:
            ids = np.arange(len(self._keys), len(self._keys) + len(new))
        else:
            ids = np.array([self._make(key) for key in new.tolist()], np.int64)
        whole = np.concatenate([self._keys, new])
        order = np.argsort(whole, kind="stable")
        self._keys, self._ids = whole[order], np.concatenate([self._ids, ids])[order]


class Sums:
    """One sum per number, exact for any int64 summands. Two arrays, because a sum may need more than 64 bits."""

    def __init__(self) -> None:
        self._low = np.zeros(0, np.int64)
        self._high = np.zeros(0, np.int64)

    @property
    def empty(self) -> bool:
        """Whether nothing was ever added."""
        return not len(self._low)

    def add(self, ids: Ints, values: Ints, sign: int = 1) -> None:
        if not len(ids):
            return
        size = int(ids.max()) + 1
        self._low, self._high = grown(self._low, size), grown(self._high, size)
        least, most = int(values.min()), int(values.max())
        if least == most == 0:
            return
        if max(-least, most) < _EXACT // len(values):
            total = np.bincount(ids, weights=values).astype(np.int64)
            self._low[:size] += sign * (total & _LOW)
            self._high[:size] += sign * (total >> 32)
        else:
            self._low[:size] += sign * np.bincount(ids, weights=values & _LOW).astype(np.int64)
            self._high[:size] += sign * np.bincount(ids, weights=values >> 32).astype(np.int64)

    def count(self, ids: Ints) -> None:
        """Add one for every number."""
        if len(ids):
            size = int(ids.max()) + 1
            self._low, self._high = grown(self._low, size), grown(self._high, size)
            self._low[:size] += np.bincount(ids)

    def tolist(self, size: int) -> list[int]:
        low, high = grown(self._low, size)[:size], grown(self._high, size)[:size]
        if not high.any():
            return list(low.tolist())
        return [(up << 32) + down for up, down in zip(high.tolist(), low.tolist(), strict=True)]


def grown(array: NDArray[Any], size: int, fill: int = 0) -> NDArray[Any]:
    """The array, or a longer copy of it (by half at least) where it has less than `size` places."""
    if len(array) >= size:
        return array
    longer = np.full(max(size, len(array) * 3 // 2, 64), fill, array.dtype)
    longer[: len(array)] = array
    return longer


# ----------------------------------------------------------------------------------------------------- names of ranges


OTHER, RESIDENCY, MODULE = 0, 1, 2
_FORGET = 200_000  # texts that never repeat are looked at anew from here on
_PART = 21  # bits each of process, domain and category


class Numbered:
    """Distinct Names, by number. kinds: OTHER, RESIDENCY or MODULE, of each."""

    def __init__(self) -> None:
        self.names: list[Name] = []
        self.kinds: list[int] = []
        self.has_pieces = False  # whether any range goes on with a call seen before
        self._numbers: dict[Name, int] = {}

    def number(self, name: Name) -> int:
        """The number of a Name."""
        found = self._numbers.get(name)
        if found is None:
            found = self._numbers[name] = len(self.names)
            self.names.append(name)
            self.kinds.append({"residency": RESIDENCY, "module": MODULE}.get(name.category, OTHER))
        return found


class Names(Numbered):
    """`raw` numbers what rows say; `final` gives each distinct Name one number.

    text_of: the text of a string's id. name_of: (process, text, domain, category) -> Name; it may be asked only after
    all rows were read, because a domain may be named after its first range. exact: see `read_sqlite`. different:
    modules whose payload says which kind of call it is.
    """

    def __init__(
        self,
        text_of: Callable[[int], str],
        name_of: Callable[[int, str, int, int | None], Name],
        exact: bool,
        different: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self._different = different
        self._text_of = text_of
        self._name_of = name_of
        self._exact = exact
        self._texts: list[str | int] = []  # number of a text -> itself, or the id of the string it is
        self._strings = Interner(self._new_string)
        self._spelled: dict[str, int] = {}
        self._seen: dict[bytes | str, int] = {}
        self._columns = (Interner(), Interner(), Interner())
        self._values: tuple[list[int | None], ...] = ([], [], [])
        self._places = Interner()
        self._raw = Interner()
        self._final = np.empty(0, np.int64)  # raw number -> number of its Name
        self._piece = np.empty(0, np.bool_)  # raw number -> whether such ranges are pieces
        self._counted: dict[tuple[int, int], int] = {}

    # ------------------------------------------------------------------------------------------ while rows are read

    def raw(
        self,
        pids: Ints,
        strings: tuple[Ints, Mask | None],
        texts: list[bytes] | list[str] | None,
        domains: tuple[Ints, Mask | None],
        categories: tuple[Ints, Mask | None],
    ) -> Ints:
        """The rows' names as numbers that mean nothing outside this class."""
        values, valid = strings
        if valid is None:
            text = self._strings(values)
        else:
            text = np.empty(len(values), np.int64)
            text[valid] = self._strings(values[valid])
            text[~valid] = self._spell("")
        if texts is not None:
            at = [index for index, item in enumerate(texts) if item]
            text[at] = [self._text(texts[index]) for index in at]
        domain_values, named = domains
        if named is not None:
            domain_values = np.where(named, domain_values, 0)
        place = self._column(0, pids, None) << (2 * _PART)
        place |= self._column(1, domain_values, None) << _PART
        place |= self._column(2, categories[0], categories[1])
        return self._raw(self._places(place) | (text << 32))

    def _column(self, which: int, values: Ints, valid: Mask | None) -> Ints:
        """Numbers of few distinct values; 0 stands for NULL."""
        numbers = self._columns[which](values) + 1
        known = self._values[which]
        if len(known) < len(self._columns[which]) + 1:
            known[:] = [None, *self._columns[which].keys()]
            if len(known) >= 1 << _PART:
                raise ValueError("more distinct domains, categories or processes than there can be")
        return numbers if valid is None else np.where(valid, numbers, 0)

    def _new_string(self, key: int) -> int:
        self._texts.append(key)
        return len(self._texts) - 1

    def _text(self, raw: bytes | str) -> int:
        number = self._seen.get(raw)
        if number is None:
            text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
            number = self._spell(text if self._exact else clean(text))
            if len(self._seen) >= _FORGET:
                self._seen.clear()
            self._seen[raw] = number
        return number

    def _spell(self, text: str) -> int:
        number = self._spelled.get(text)
        if number is None:
            number = self._spelled[text] = len(self._texts)
            self._texts.append(text)
        return number

    # ------------------------------------------------------------------------------------------ when all were read

    def final(self, raw: Ints, payload: Ints, has_payload: Mask) -> tuple[Ints, Mask]:
        """The numbers of the Names of rows: what `names` and `kinds` are indexed by; and which rows are pieces."""
        if len(self._final) < len(self._raw):
            self._resolve()
        numbers, piece = self._final[raw], self._piece[raw]
        if has_payload.any():
            at = np.flatnonzero(has_payload & ~piece)
            at = at[np.array([self._counts(name) for name in self.names])[numbers[at]]]
            numbers[at] = [
                self._with_payload(number, value)
                for number, value in zip(numbers[at].tolist(), payload[at].tolist(), strict=True)
            ]
        return numbers, piece

    def _counts(self, name: Name) -> bool:
        """Whether a payload becomes part of the name."""
        if name.category == "module":
            return name.text.partition(" in=")[0] in self._different
        return not self._exact and numbered(name.text, name.category, 0) != name.text

    def _with_payload(self, number: int, value: int) -> int:
        found = self._counted.get((number, value))
        if found is None:
            name = self.names[number]
            if name.category == "module":
                counted = name._replace(number=value)
            else:
                counted = name._replace(text=numbered(name.text, name.category, value))
            found = self._counted[number, value] = self.number(counted)
        return found

    def _resolve(self) -> None:
        places = self._places.keys()
        found: list[int] = []
        pieces: list[bool] = []
        for key in self._raw.keys()[len(self._final) :]:
            item = self._texts[key >> 32]
            place = places[key & 0xFFFFFFFF]
            pid, domain, category = (
                self._values[which][(place >> shift) & ((1 << _PART) - 1)]
                for which, shift in ((0, 2 * _PART), (1, _PART), (2, 0))
            )
            text = item if isinstance(item, str) else self._text_of(item)
            if not self._exact:
                text = clean(text)
            name = self._name_of(pid or 0, text, domain or 0, category)
            pieces.append(name.category == PIECE)
            found.append(self.number(name._replace(category="module") if pieces[-1] else name))
        self._final = np.append(self._final, np.array(found, np.int64))
        self._piece = np.append(self._piece, np.array(pieces, np.bool_))
        self.has_pieces = bool(self._piece.any())
