"""`stillhouse verify`: everything that a selection rests on, checked from the store alone."""

import secrets
from typing import Any

from stillhouse.reading.readers import open_selection
from stillhouse.selection.verification import Verifier


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
