"""Hosts for text work: the Scanner hashes documents, the Packer tokenises and packs them."""

from dataclasses import dataclass

from stillhouse.storage.artifact import Receipt, Store
from stillhouse.text.tasks import PackTask, UnitTask, pack_unit, scan_unit
from stillhouse.text.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Scanner:
    """Scans units of raw files."""

    store: Store

    def run(self, task: UnitTask) -> Receipt:
        """Hash a unit's documents and set its bad rows aside."""
        return scan_unit(self.store, task)

    def prefetch(self, task: UnitTask) -> None:
        """Raw files are streamed; there is nothing to read ahead."""


class PackerHost:
    """Hosts a tokenizer and packs units with it."""

    def __init__(self, store: Store, tokenizer: str, eos_token: str | None) -> None:
        self._store = store
        self._tokenizer = load_tokenizer(tokenizer, eos_token)

    def run(self, task: PackTask) -> Receipt:
        """Tokenise a unit and write its parts."""
        return pack_unit(self._store, self._tokenizer, task)

    def prefetch(self, task: PackTask) -> None:
        """Raw files are streamed; there is nothing to read ahead."""
