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


def put(store, save=save):
    return put_folder(store, "m", save, inputs={"a": 1}, settings={"b": 2}, totals={"c": 3})


def test_put_folder(store):
    manifest = put(store)
    assert manifest.files == {
        "config.json": sha256(b"{}"),
        "model.safetensors": sha256(b"weights"),
    }
    assert (manifest.kind, manifest.inputs, manifest.totals) == ("models", {"a": 1}, {"c": 3})
    assert read_bytes(store.path("models/m/model.safetensors")) == b"weights"
    assert store.get_manifest("models", "m") == manifest


def test_files_of_a_writer_that_died_are_adopted(store):
    create(store.path("models/m/model.safetensors"), b"its weights")
    assert put(store).files["model.safetensors"] == sha256(b"its weights")
    assert put(store, lambda folder: None).files["model.safetensors"] == sha256(b"its weights")


def test_failed_save_leaves_nothing(store):
    def broken(folder):
        save(folder)
        raise OSError("disk full")

    with pytest.raises(StorageError, match="disk full; models go to TMPDIR"):
        put(store, broken)
    assert list_names(store.path("models")) == []


def test_local_folder(folder):
    replace(join(folder, "a.json"), b"{}")
    replace(join(folder, "b.bin"), bytes(9 << 20))
    with local_folder(folder) as local:
        assert sorted(path.name for path in local.iterdir()) == ["a.json", "b.bin"]
        assert (local / "a.json").read_bytes() == b"{}"
        assert (local / "b.bin").stat().st_size == 9 << 20
    assert str(local) == folder or not local.exists()


def test_only_named_files_of_a_remote_folder_are_copied():
    replace("memory://models/a.json", b"{}")
    replace("memory://models/b.bin", b"large")
    with local_folder("memory://models", (".json",)) as local:
        assert [path.name for path in local.iterdir()] == ["a.json"]


def test_a_temporary_folder_that_is_full(store, small_disk, monkeypatch):
    """64 KiB of TMPDIR, 1 MB of weights: safetensors' own error, not the system's."""
    from safetensors.numpy import save_file

    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))

    def large(folder):
        save_file({"weights": np.zeros(1 << 17)}, folder / "model.safetensors")

    for too_much in (large, lambda folder: (folder / "x").write_bytes(bytes(1 << 20))):
        with pytest.raises(StorageError, match=r"No space left on device.*set another one") as said:
            put(store, too_much)
        assert said.value.exit_code == 4
        assert list_names(store.path("models")) == list_names(str(small_disk)) == []
