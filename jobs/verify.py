"""`stillhouse verify`: everything that a result rests on, checked from the store alone."""

import secrets
from collections.abc import Mapping
from typing import Any

from stillhouse.fingerprint import sha256
from stillhouse.jobs.kinds import result_artifact
from stillhouse.reading.readers import open_selection
from stillhouse.selection.verification import Verifier
from stillhouse.storage.artifact import load_manifest
from stillhouse.storage.filesystem import absolute_uri, exists, join, read_bytes
from stillhouse.storage.parquet import read_table
from stillhouse.storage.run_record import read_json


def verify(uri: str, sample: int) -> dict[str, Any]:
    """Check a selection, a trained model or a distilled set (or the one that a run made).

    Raises:
        ArtifactError: there is none, or a manifest that is named is missing.
    """
    found = _other_than_selection(uri)
    if found is None:
        return verify_selection(uri, sample)
    kind, folder = found
    return verify_model(folder) if kind == "models" else verify_distilled(folder)


def _other_than_selection(uri: str) -> tuple[str, str] | None:
    """Kind and folder of the model or distilled set at a URI, or of what the run there made."""
    folder = absolute_uri(uri)
    result = read_json(folder, "result.json")
    if result is not None:
        kind, made = result_artifact(result)
        folder = join(folder.rsplit("/", 2)[0], kind, made)
    elif exists(join(folder, "manifest.json")):
        kind = load_manifest(folder).kind
    else:
        return None
    return (kind, folder) if kind in ("models", "distilled") else None


def verify_model(folder: str) -> dict[str, Any]:
    """Check every file of a model artifact.

    Returns:
        `checked` (counts by what) and `problems` (one sentence each).
    """
    manifest = load_manifest(folder, "models")
    problems = _changed(folder, manifest.files)
    return {"model": folder, "checked": {"files": len(manifest.files)}, "problems": problems}


def verify_distilled(folder: str) -> dict[str, Any]:
    """Check part and files of a distilled set, and that it costs the bytes that it says.

    Returns:
        `checked` (counts by what) and `problems` (one sentence each).
    """
    manifest = load_manifest(folder, "distilled")
    store = folder.rsplit("/", 2)[0]
    problems = _changed(store, {part.path: part.sha256 for part in manifest.parts})
    problems += _changed(folder, manifest.files)
    checked = {"parts": len(manifest.parts), "files": len(manifest.files)}
    if not problems:
        from stillhouse.distillation.stored_sets import read_set

        found = read_set(read_table(join(store, manifest.parts[0].path)), folder)
        said, classes = manifest.totals["image_bytes"], len(manifest.totals["class_names"])
        checked["images"] = len(found.images)
        if found.stored.images != said:
            problems.append(f"{folder}: images of {found.stored.images} bytes, {said} are said")
        if not 0 <= int(found.labels.min()) <= int(found.labels.max()) < classes:
            problems.append(f"{folder} has labels outside its {classes} classes")
    return {"distilled": folder, "checked": checked, "problems": problems}


def _changed(folder: str, digests: Mapping[str, str]) -> list[str]:
    """What is wrong with files by path in `folder`: missing, or other bytes."""
    problems: list[str] = []
    for name, digest in digests.items():
        try:
            if sha256(read_bytes(join(folder, name))) != digest:
                problems.append(f"{join(folder, name)} is not what was written")
        except FileNotFoundError:
            problems.append(f"{join(folder, name)} is missing")
    return problems


def verify_selection(uri: str, sample: int) -> dict[str, Any]:
    """Check a selection (or the one that a run made).

    Args:
        uri: of the selection, of its run, or `STORE#name`.
        sample: how many sequences' losses are computed again.

    Returns:
        `checked` (counts by what), `problems` (one sentence each), `seed` of the sample.

    Raises:
        ArtifactError: there is no such selection, or a manifest that it names is missing.
    """
    verifier = Verifier(open_selection(uri))
    verifier.check_bytes()
    seed = secrets.randbelow(2**31)
    if not verifier.findings.problems:
        verifier.check_joins()
        verifier.check_cut()
        verifier.check_fates()
        verifier.check_losses(sample, seed)
    findings = verifier.findings
    return {
        "selection": verifier.selection.uri,
        "checked": dict(findings.checked),
        "problems": findings.problems,
        "seed": seed,
    }
