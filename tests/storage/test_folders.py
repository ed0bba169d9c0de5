import tempfile

import numpy as np
import pytest

from stillhouse.errors import StorageError
from stillhouse.fingerprint import sha256
from stillhouse.storage.commit import create, replace
from stillhouse.storage.filesystem import join, list_names, read_bytes
from stillhouse.storage.folders import local_folder, put_folder


def save(folder):
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def put(store, save=save, name="m"):
    return put_folder(store, name, save, inputs={"a": 1}, settings={"b": 2}, totals={"c": 3})


def test_put_folder(store):
    """Files of a writer that died are adopted."""
    manifest = put(store)
    digests = {"config.json": sha256(b"{}"), "model.safetensors": sha256(b"weights")}
    assert manifest.files == digests
    assert (manifest.kind, manifest.inputs, manifest.totals) == ("models", {"a": 1}, {"c": 3})
    assert read_bytes(store.path("models/m/model.safetensors")) == b"weights"
    assert store.get_manifest("models", "m") == manifest
    create(store.path("models/n/model.safetensors"), b"its weights")
    for files in (save, lambda folder: None):
        found = put(store, files, "n").files["model.safetensors"]
        assert found == sha256(b"its weights")


def test_a_full_temporary_folder_leaves_nothing(store, small_disk, monkeypatch):
    """64 KiB of TMPDIR, 1 MB of weights: safetensors' own error, not the system's."""
    from safetensors.numpy import save_file

    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))

    def large(folder):
        save_file({"weights": np.zeros(1 << 17)}, folder / "model.safetensors")

    for too_much in (large, lambda folder: (folder / "x").write_bytes(bytes(1 << 20))):
        message = r"No space left on device.*models go to TMPDIR.*set another one"
        with pytest.raises(StorageError, match=message) as refused:
            put(store, too_much)
        assert refused.value.exit_code == 4
        assert list_names(store.path("models")) == list_names(str(small_disk)) == []


def test_local_folder(folder):
    """Of a remote folder only the files with the suffixes are copied."""
    replace(join(folder, "a.json"), b"{}")
    replace(join(folder, "b.bin"), bytes(9 << 20))
    with local_folder(folder, (".json", ".bin")) as local:
        assert sorted(path.name for path in local.iterdir()) == ["a.json", "b.bin"]
        assert (local / "a.json").read_bytes() == b"{}"
        assert (local / "b.bin").stat().st_size == 9 << 20
    assert str(local) == folder or not local.exists()
    replace("memory://models/a.json", b"{}")
    replace("memory://models/b.bin", b"large")
    with local_folder("memory://models", (".json",)) as local:
        assert [path.name for path in local.iterdir()] == ["a.json"]
