"""`stillhouse verify`: everything that a result rests on, checked from the store alone."""

import secrets
from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.jobs.cluster import cluster
from stillhouse.jobs.kinds import result_artifact
from stillhouse.pipelines.checksums import compare_here, compare_in_tasks
from stillhouse.reading.readers import open_selection
from stillhouse.selection.verification import Verifier
from stillhouse.spec import ComputeSettings
from stillhouse.storage import names
from stillhouse.storage.artifact import load_manifest
from stillhouse.storage.commit import MARKER
from stillhouse.storage.filesystem import absolute_uri, exists, join, known_options, use_options
from stillhouse.storage.integrity import Survey, survey_result, survey_store
from stillhouse.storage.layout import MANIFEST, PART_LIST
from stillhouse.storage.parquet import read_table
from stillhouse.storage.run_record import read_json

_LARGE_BYTES = 8 << 30
_MAX_PROBLEMS = 50


def verify(uri: str, sample: int, large_bytes: int = _LARGE_BYTES) -> dict[str, Any]:
    """Check a run with all that its result rests on, an artifact with that, or a whole store.

    Every byte is read: from `large_bytes` on in Ray tasks (of RAY_ADDRESS, else on this machine).
    Where the bytes are right, their content is checked: see `Verifier` and `_check_distilled`.

    Args:
        uri: of a run, an artifact, `STORE#name` or a store.
        sample: for how many sequences of a selection the losses are recomputed.
        large_bytes: where Ray begins.

    Returns:
        `checked` (counts by what), `problems` (one sentence each), for a selection the `seed` of
        the sample.

    Raises:
        ArtifactError: there is nothing to check.
    """
    store, folder = _store_and_folder(uri)
    survey = survey_result(store, folder) if folder else survey_store(store)
    if folder and not survey.checked:
        if exists(join(store, folder, "spec.yaml")):
            raise ArtifactError(f"{uri}: the run is not finished (see `stillhouse status {uri}`)")
        raise ArtifactError(f"no artifact at {uri}: there is no {MANIFEST}, and it is no store")
    problems = _compare(survey, large_bytes)
    found: dict[str, Any] = {"store": store, "checked": survey.checked, "problems": problems}
    if not folder:
        unnamed = survey.there.keys() - survey.expected.keys()
        # these carry their own digest, or need none
        known = (".json", f"/{PART_LIST}")
        survey.checked["objects that nothing names"] = sum(
            not path.endswith(known) and not path.startswith("runs/") for path in unnamed
        )
    if problems or not folder:
        return found
    result = read_json(join(store, folder), "result.json")
    if result is not None and result["job"] == "chain":
        for step in result["chain"]["steps"].values():
            one = verify(step["run"], sample, large_bytes)
            problems += one["problems"]
            for what, count in one["checked"].items():
                survey.checked[what] = survey.checked.get(what, 0) + count
        return found
    kind, artifact = folder.split("/")[0], join(store, folder)
    if result is not None:
        kind, made = result_artifact(result)
        artifact = join(store, kind, made)
    found[kind.removesuffix("s")] = artifact
    if kind == "selections":
        found["seed"] = _check_selection(artifact, sample, survey, problems)
    elif kind == "distilled":
        _check_distilled(artifact, survey, problems)
    return found


def _store_and_folder(uri: str) -> tuple[str, str]:
    """The store, and the folder in it that is to be checked; empty for the whole store."""
    store, mark, name = uri.rpartition("#")
    if mark and "/" not in name:
        store = absolute_uri(store)
        published = names.published(store, name)
        return store, f"{published.kind}/{published.selection}"
    folder = absolute_uri(uri)
    if exists(join(folder, MARKER)):
        return folder, ""
    store, kind, name = folder.rsplit("/", 2)
    return store, f"{kind}/{name}"


def _compare(survey: Survey, large_bytes: int) -> list[str]:
    checks = survey.checks()
    survey.checked["objects"] = len(checks)
    survey.checked["bytes"] = survey.num_bytes()
    if survey.num_bytes() < large_bytes:
        problems = compare_here(checks)
    else:
        with cluster(ComputeSettings(), use_options(survey.store, known_options(survey.store)), 0):
            problems = compare_in_tasks(checks)
    found = survey.problems + problems
    survey.checked["problems"] = len(found)
    return found[:_MAX_PROBLEMS]


def _check_selection(uri: str, sample: int, survey: Survey, problems: list[str]) -> int:
    """Add what `Verifier` finds; the seed of the sample of losses."""
    seed = secrets.randbelow(2**31)
    findings = Verifier(open_selection(uri)).check(sample, seed)
    survey.checked.update(findings.checked)
    problems += findings.problems
    return seed


def _check_distilled(folder: str, survey: Survey, problems: list[str]) -> None:
    """A distilled set has the size that its manifest states, and labels of its classes."""
    from stillhouse.distillation.stored_sets import read_set

    manifest = load_manifest(folder, "distilled")
    store = folder.rsplit("/", 2)[0]
    found = read_set(read_table(join(store, manifest.parts[0].path)), folder)
    stated, classes = manifest.totals["image_bytes"], len(manifest.totals["class_names"])
    survey.checked["images"] = len(found.images)
    if found.stored.images != stated:
        problems.append(
            f"{folder}: images of {found.stored.images} bytes, its manifest states {stated}"
        )
    if not 0 <= int(found.labels.min()) <= int(found.labels.max()) < classes:
        problems.append(f"{folder} has labels outside its {classes} classes")
