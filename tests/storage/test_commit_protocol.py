"""Writers, crashes and readers drive the protocol in any order; a reader sees all or nothing."""

import tempfile
from pathlib import Path

import pyarrow as pa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stillhouse.fingerprint import sha256
from stillhouse.storage import artifact
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.commit import create
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.parquet import parquet_bytes, read_table

TASKS = ("t0", "t1", "t2")
WRITERS = st.sampled_from(["old version", "new version"])
ALL_TASKS = st.sampled_from(TASKS)
FINGERPRINT = "f" * 64


def table(task, writer):
    """Writers agree on the rows of a task, not on the bytes of its file."""
    rows = pa.table({"x": [int(task[1]), 10, 11]})
    return rows.replace_schema_metadata({"writer": writer})


def part_path(task):
    return f"tokens/parts/{task}.parquet"


class Protocol(RuleBasedStateMachine):
    """The model remembers the first bytes of every name: they must never change."""

    inline_parts = 300

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.store = Store(self.folder.name)
        self.first = {}
        self.whole = artifact._MAX_INLINE_PARTS
        artifact._MAX_INLINE_PARTS = self.inline_parts

    def teardown(self):
        artifact._MAX_INLINE_PARTS = self.whole
        self.folder.cleanup()

    @rule(task=ALL_TASKS, writer=WRITERS, share=st.floats(0, 1))
    def die_while_writing_a_part(self, task, writer, share):
        data = parquet_bytes(table(task, writer))
        self._leave(part_path(task), data[: int(len(data) * share)])

    @rule(task=ALL_TASKS, writer=WRITERS)
    def die_between_link_and_unlink(self, task, writer):
        data = parquet_bytes(table(task, writer))
        self._leave(part_path(task), data)
        create(self.store.path(part_path(task)), data)

    @rule(task=ALL_TASKS, writer=WRITERS)
    def die_between_part_and_receipt(self, task, writer):
        self.store.put_part(part_path(task), table(task, writer), num_tokens=3)

    @rule(task=ALL_TASKS, share=st.floats(0, 1))
    def die_while_writing_a_receipt(self, task, share):
        self._leave(f"tokens/receipts/{task}.json", b'{"task": "t"'[: int(12 * share)])

    @rule(task=ALL_TASKS, writer=WRITERS)
    def finish_a_task(self, task, writer):
        part = self.store.put_part(part_path(task), table(task, writer), num_tokens=3)
        self.store.put_receipt("tokens", Receipt(task, (part,), {}, {"writer": writer}))

    @rule(share=st.floats(0, 1))
    def die_while_writing_a_manifest(self, share):
        self._leave(f"tokens/{FINGERPRINT}/manifest.json", b'{"kind": "tokens"'[: int(17 * share)])

    @rule(writer=WRITERS)
    def die_between_list_and_manifest(self, writer):
        receipts = self.store.finished("tokens", TASKS)
        if len(receipts) == len(TASKS) and self.inline_parts < len(TASKS):
            rows = [_row(receipts[task].parts[0]) for task in TASKS]
            parts = pa.Table.from_pylist(rows).replace_schema_metadata({"writer": writer})
            data = parquet_bytes(parts)
            create(self.store.path("tokens", FINGERPRINT, "parts.parquet"), data)

    @rule(writer=WRITERS)
    def run_to_the_end(self, writer):
        found = self.store.finished("tokens", TASKS)
        for task in TASKS:
            if task not in found:
                part = self.store.put_part(part_path(task), table(task, writer), num_tokens=3)
                found[task] = self.store.put_receipt("tokens", Receipt(task, (part,)))
        parts = tuple(found[task].parts[0] for task in TASKS)
        made = self.store.put_manifest(
            Manifest("tokens", FINGERPRINT, parts, {}, {}, {"by": writer})
        )
        assert made == self.store.find_manifest("tokens", FINGERPRINT)

    @invariant()
    def nothing_that_stands_changes(self):
        for path in self.root.rglob("*"):
            if path.is_file() and path.suffix != ".tmp":
                data = path.read_bytes()
                assert self.first.setdefault(path, data) == data

    @invariant()
    def a_reader_sees_all_or_nothing(self):
        manifest = self.store.find_manifest("tokens", FINGERPRINT)
        if manifest is None:
            assert self.root / "tokens" / FINGERPRINT / "manifest.json" not in self.first
            return
        assert [part.path for part in manifest.parts] == [part_path(task) for task in TASKS]
        for task, part in zip(TASKS, manifest.parts, strict=True):
            data = read_bytes(self.store.path(part.path))
            assert (sha256(data), len(data)) == (part.sha256, part.num_bytes)
            assert read_table(self.store.path(part.path))["x"].to_pylist() == [int(task[1]), 10, 11]

    @invariant()
    def a_receipt_names_parts_that_stand(self):
        for receipt in self.store.finished("tokens", TASKS).values():
            for part in receipt.parts:
                assert sha256(read_bytes(self.store.path(part.path))) == part.sha256

    def _leave(self, name, data):
        path = self.root / f"{name}.{len(list(self.root.rglob('*.tmp'))):032x}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class ProtocolWithListedParts(Protocol):
    """The same with the parts in a file beside the manifest."""

    inline_parts = 1


def _row(ref):
    return {name: getattr(ref, name) for name in ref.__slots__}


for machine in (Protocol, ProtocolWithListedParts):
    machine.TestCase.settings = settings(
        max_examples=25,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
TestProtocol = Protocol.TestCase
TestProtocolWithListedParts = ProtocolWithListedParts.TestCase
