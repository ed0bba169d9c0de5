"""What generated texts are dropped for: faults of an answer, copies, held-out text, language."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

from stillhouse.generation.asking import Answer
from stillhouse.text.duplicates import document_hash, normalise

if TYPE_CHECKING:  # imports tokenizers
    from stillhouse.selection.contamination import NgramIndex

_GRAM = 5
_MIN_LETTERS = 40
"""Shorter texts tell too little of their language."""
_SURE = 0.9
_REFUSAL = re.compile(
    r"^\W*(?:as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|(?:(?:i'?m|i am) (?:very |so |truly )?)?sorry\b"
    r"|(?:(?:unfortunately|my apologies|apologies)\W+)?(?:but )?(?:i|we) "
    r"(?:cannot|can'?t|can not|am unable to|am not able to|won'?t|must decline)\b)",
    re.I,
)


def answer_fault(answer: Answer) -> str:
    """Why an answer cannot be used: none came, empty, cut off, or a refusal; else nothing."""
    if answer.fault:
        return answer.fault
    if not answer.text:
        return "empty answer"
    if not answer.finished:
        return "answer cut off at `max_tokens`"
    if is_refusal(answer.text):
        return "refusal"
    return ""


def is_refusal(text: str) -> bool:
    """Whether a text begins as assistants decline requests, in English.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("I can help with that.")
    (True, False)
    """
    return _REFUSAL.match(unicodedata.normalize("NFKC", text).replace("’", "'")) is not None


class NearIndex:
    """Finds texts that are nearly equal to one of those added before.

    The similarity is that of the sets of character 5-grams of the normalised texts (Jaccard),
    computed exactly: of each text some grams are indexed, one of which any text that is as similar
    as `near`, or more, shares (prefix filtering, Bayardo et al. 2007).
    """

    def __init__(self, near: float) -> None:
        self._near = near
        self._sets: list[frozenset[str]] = []
        self._holding: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        grams = _grams(text)
        for gram in self._prefix(grams):
            self._holding[gram].append(len(self._sets))
        self._sets.append(grams)

    def has_near(self, text: str) -> bool:
        """Whether a text that is as similar as `near` was added."""
        grams = _grams(text)
        candidates = {i for gram in self._prefix(grams) for i in self._holding.get(gram, ())}
        return any(_jaccard(grams, self._sets[i]) >= self._near for i in candidates)

    def _prefix(self, grams: frozenset[str]) -> list[str]:
        """The first grams in one order for all sets, so many that two near sets share one.

        At least near |A| of A's grams are in B, so that one of the first (1 - near) |A| + 1 is.
        """
        count = len(grams) - math.ceil(self._near * len(grams) - 1e-9) + 1
        return sorted(grams, key=_place)[:count]


def _place(gram: str) -> tuple[int, str]:
    """Where a gram comes in the order of all: mixed, so that no prefix has common ones alone."""
    return crc32(gram.encode(errors="surrogatepass")), gram


def _grams(text: str) -> frozenset[str]:
    whole = normalise(text)
    return frozenset(whole[i : i + _GRAM] for i in range(max(1, len(whole) - _GRAM + 1)))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text that nothing may share: its word 13-grams, and the hashes of whole instructions."""

    grams: "NgramIndex"
    texts: frozenset[bytes] = frozenset()

    def holds(self, text: str, *, whole: bool) -> bool:
        """Whether a text shares a 13-gram; if `whole`, also whether it is an instruction."""
        if whole and self.texts and document_hash(text) in self.texts:
            return True
        return len(self.grams.hashes) > 0 and self.grams.hits(text) > 0


class Screen:
    """Decides which texts are dropped.

    Args:
        seeds: instructions that none may be a copy of.
        heldout: that nothing may share.
        languages: ISO 639-1 codes of what is let through; None for any.
        near: similarity from which on an instruction is a near-duplicate (`NearIndex`).
    """

    def __init__(
        self,
        seeds: Iterable[str],
        heldout: HeldOut,
        languages: frozenset[str] | None,
        near: float,
    ) -> None:
        self._known, self._near = _Known(near), near
        self._heldout, self._languages = heldout, languages
        self.add(seeds)

    def add(self, texts: Iterable[str]) -> None:
        """Compare later instructions with these."""
        for text in texts:
            self._known.add(text)

    def reasons(self, key: str, texts: Iterable[str]) -> Iterator[str | None]:
        """Why each text is dropped; None where it is let through.

        Args:
            key: an `instruction` is also compared with seeds, with those that were added, and with
                earlier ones of `texts`; other texts, such as short answers, may be equal.
        """
        here = _Known(self._near)
        for text in texts:
            reason = self._reason(key, text)
            if reason is None and key == "instruction":
                reason = self._known.copy_of(text) or here.copy_of(text)
                here.add(text)
            yield reason

    def _reason(self, key: str, text: str) -> str | None:
        if self._heldout.holds(text, whole=key == "instruction"):
            return "held-out text"
        code = None if self._languages is None else language_of(text)
        if self._languages is not None and code not in (None, *self._languages):
            return f"another language ({code})"
        return None


class _Known:
    """Texts that others may be copies of."""

    def __init__(self, near: float) -> None:
        self._hashes: set[bytes] = set()
        self._near = NearIndex(near)

    def add(self, text: str) -> None:
        self._hashes.add(document_hash(text))
        self._near.add(text)

    def copy_of(self, text: str) -> str | None:
        if document_hash(text) in self._hashes:
            return "duplicate"
        return "near-duplicate" if self._near.has_near(text) else None


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language by py3langid; None of a short text, or if unsure."""
    if sum(map(str.isalpha, text)) < _MIN_LETTERS:
        return None
    code, probability = _identifier().classify(text)
    return str(code) if float(probability) >= _SURE else None


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages_of(texts: Sequence[str]) -> frozenset[str]:
    """The languages that at least one in twenty of the texts whose language is known has."""
    found = Counter(code for code in map(language_of, texts) if code is not None)
    return frozenset(code for code, count in found.items() if count * 20 >= found.total())
