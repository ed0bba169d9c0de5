"""The last step of a decoupled distillation as a task: units put together and labelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stillhouse.distillation.decoupled_job import KIND, assemble
from stillhouse.distillation.evaluate import Protocol
from stillhouse.distillation.methods import DecoupledMethod
from stillhouse.distillation.prepared import Prepared
from stillhouse.storage.artifact import Receipt, Store


@dataclass(frozen=True, slots=True)
class AssemblyTask:
    """What to put together: paths of the units' parts, in order."""

    fingerprint: str
    method: DecoupledMethod
    protocol: Protocol
    units: tuple[str, ...]


def run_assembly(
    store: Store, prepared: Prepared, teachers: Sequence[nn.Module], task: AssemblyTask
) -> Receipt:
    """Commit the labelled set, then its receipt."""
    made = assemble(
        store, prepared, teachers, task.method, task.protocol, task.units, task.fingerprint
    )
    files = {made.label_path: made.label_sha256} if made.label_path and made.label_sha256 else {}
    info: dict[str, Any] = {
        "label_path": made.label_path,
        "label_sha256": made.label_sha256,
        "stored": [made.stored.images, made.stored.labels],
    }
    counts = {"images": made.part.num_rows}
    return store.put_receipt(KIND, Receipt(task.fingerprint, (made.part,), counts, info, files))
