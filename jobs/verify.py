"""`stillhouse verify`: everything that a result rests on, checked from the store alone."""

import secrets
from typing import Any

from jobs.kinds import result_artifact
from stillhouse.fingerprint import sha256
from stillhouse.reading.readers import open_selection
from stillhouse.selection.verification import Verifier
from stillhouse.storage.artifact import load_manifest
from stillhouse.storage.filesystem import absolute_uri, exists, join, read_bytes
from stillhouse.storage.run_record import read_json


def verify(uri: str, sample: int) -> dict[str, Any]:
    """Check a selection, or a trained model (or the one that a run made).

    Raises:
        ArtifactError: there is neither, or a manifest that is named is missing.
    """
    folder = _model_folder(uri)
    return verify_selection(uri, sample) if folder is None else verify_model(folder)


def _model_folder(uri: str) -> str | None:
    """The folder of the model at a URI, or of the one that the run there made."""
    folder = absolute_uri(uri)
    result = read_json(folder, "result.json")
    if result is not None:
        kind, made = result_artifact(result)
        return join(folder.rsplit("/", 2)[0], kind, made) if kind == "models" else None
    is_artifact = exists(join(folder, "manifest.json"))
    return folder if is_artifact and load_manifest(folder).kind == "models" else None


def verify_model(folder: str) -> dict[str, Any]:
    """Check every file of a model artifact.

    Returns:
        `checked` (counts by what) and `problems` (one sentence each).
    """
    problems: list[str] = []
    manifest = load_manifest(folder, "models")
    for name, digest in manifest.files.items():
        try:
            if sha256(read_bytes(join(folder, name))) != digest:
                problems.append(f"{join(folder, name)} is not what was written")
        except FileNotFoundError:
            problems.append(f"{join(folder, name)} is missing")
    return {"model": folder, "checked": {"files": len(manifest.files)}, "problems": problems}


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
