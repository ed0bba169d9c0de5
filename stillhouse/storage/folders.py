"""Model artifacts: folders as transformers writes them."""

import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillhouse.errors import StorageError
from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.commit import copy, create_or_adopt
from stillhouse.storage.filesystem import join, list_names, open_read, protocol_of
from stillhouse.storage.retries import explain

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

    Files that an earlier writer left behind are adopted.

    Raises:
        StorageError: the temporary folder (TMPDIR) or the store cannot be written.
    """
    from safetensors import SafetensorError

    files: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            save(Path(temporary))
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{explain(error, f'writing a model to {temporary}')}; models go to TMPDIR before "
                "they go to the store: free space there, or set another one, and run again"
            ) from error
        for file in sorted(Path(temporary).iterdir()):
            data = create_or_adopt(store.path("models", name, file.name), file.read_bytes())
            files[file.name] = sha256(data)
    return store.put_manifest(Manifest("models", name, (), inputs, settings, totals, files=files))


def copy_folder(
    store: Store,
    name: str,
    folder: str,
    files: Sequence[str],
    *,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    totals: dict[str, Any],
) -> Manifest:
    """Commit copies of files of another folder, of any size, as the model artifact `name`.

    `name` has to be derived from their content, so that every writer writes the same bytes.
    """
    digests = {f: copy(join(folder, f), store.path("models", name, f)) for f in files}
    return store.put_manifest(Manifest("models", name, (), inputs, settings, totals, files=digests))


@contextmanager
def local_folder(uri: str, suffixes: tuple[str, ...]) -> Generator[Path]:
    """A local folder itself; of a remote one a temporary copy of the files with these suffixes."""
    if protocol_of(uri) == "file":
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in list_names(uri):
            if name.endswith(suffixes):
                with open_read(join(uri, name)) as source, open(Path(folder, name), "wb") as file:
                    shutil.copyfileobj(source, file, _BLOCK)
        yield Path(folder)
