"""Model artifacts: a folder as transformers writes it, its files created one by one, then named."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import join, list_names, open_read, protocol_of

_BLOCK = 8 << 20


def put_folder(
    store: Store,
    name: str,
    save: Callable[[Path], object],
    *,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    totals: dict[str, Any],
) -> Manifest:
    """Commit what `save` writes into an empty folder as the model artifact `name`.

    Files that a writer before us left behind are adopted.
    """
    files: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        save(Path(temporary))
        for file in sorted(Path(temporary).iterdir()):
            data = create_or_adopt(store.path("models", name, file.name), file.read_bytes())
            files[file.name] = sha256(data)
    manifest = Manifest(
        kind="models",
        fingerprint=name,
        parts=(),
        inputs=inputs,
        settings=settings,
        totals=totals,
        files=files,
    )
    return store.put_manifest(manifest)


class LocalCopy:
    """A folder as a local path for as long as the `with` block lasts: a URI is downloaded."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Path:
        if protocol_of(self._uri) == "file":
            return Path(self._uri)
        self._temporary = tempfile.TemporaryDirectory()
        folder = Path(self._temporary.name)
        for name in list_names(self._uri):
            with open_read(join(self._uri, name)) as there, open(folder / name, "wb") as here:
                shutil.copyfileobj(there, here, _BLOCK)
        return folder

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
