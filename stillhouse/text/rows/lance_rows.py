"""Lance, a fragment at a time; of structs only the leaves that are wanted are read."""

from collections.abc import Iterator

from stillhouse.storage.lance_files import LanceFragment
from stillhouse.text.rows.record import BATCH_ROWS, Record, Wanted, batch_records


def read(fragment: LanceFragment, wanted: Wanted) -> Iterator[Record]:
    """The wanted rows of those that are not deleted."""
    paths = [*wanted.columns(fragment.rows.schema)]
    first = wanted.rows[0] if wanted.rows else 0
    batches = fragment.rows.to_batches(columns=paths, batch_size=BATCH_ROWS, offset=first)
    for record in batch_records(batches, {path: path for path in paths}, first, wanted):
        yield record
        if record.row == wanted.last:
            return
