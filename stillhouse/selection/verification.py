"""Checking a selection by recomputing it from everything that it was made from.

The cut from the stored scores; the status of every row of the pool against the ledger and the kept
rows; and a random sample of losses from the models themselves.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError
from stillhouse.reading.readers import Selection
from stillhouse.selection.budget import Cut, find_cut, find_weighted_cut
from stillhouse.selection.quotas import (
    QuotaCut,
    Sources,
    cut_from_json,
    cut_to_json,
    find_quota_cut,
    named_shares,
)
from stillhouse.selection.ranking import REASONS, PartScores, RankedPart, scorers_read
from stillhouse.selection.rules import find_rule
from stillhouse.selection.sampling import sample_rows
from stillhouse.selection.scorers import TOLERANCES, answer_mask, mean_losses
from stillhouse.selection.takedown import stored_documents, taken_rows
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import join, list_names
from stillhouse.storage.layout import LEDGER, PART_LIST
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import row_sources, token_ids
from stillhouse.training.seen import add_rows, file_digests, rows_with, trained_rows

_MAX_PROBLEMS = 50


@dataclass(slots=True)
class Findings:
    """What was checked, by name, and what is wrong."""

    checked: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Record a problem; beyond fifty only their number is kept."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)
        self.checked["problems"] += 1


class Verifier:
    """Checks one selection; what is wrong is in `findings`.

    Raises:
        ArtifactError: a manifest that the selection names is missing or broken.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.store = Store(selection.store)
        self.findings = Findings()
        inputs, self.settings = selection.manifest.inputs, selection.manifest.settings
        self.tokens = self.store.get_manifest("tokens", inputs["tokens"])
        self.scores = {n: self.store.get_manifest("scores", f) for n, f in inputs["scores"].items()}
        self.flags = {  # of sequences that share text with others
            name: self.store.get_manifest("scores", inputs[name])
            for name in ("contamination", "benchmarks")
            if inputs.get(name)
        }
        self.cut = cut_from_json(selection.manifest.totals["cut"])
        self.sources = Sources.from_labels(selection.manifest.totals["source_names"])

    def check(self, num_losses: int, seed: int) -> Findings:
        """All checks; `num_losses` random losses are computed again, on this machine's device."""
        self._check_parts()
        self._check_cut()
        self._check_rows()
        self._check_losses(num_losses, seed)
        return self.findings

    def _check_parts(self) -> None:
        """The folder holds no file of rows that is missing in the manifest: readers would read it.

        And scores belong to the selection's tokens, part by part.
        """
        listed = {part.path.rsplit("/", 1)[-1] for part in self.selection.manifest.parts}
        if self.selection.about == self.selection.uri:
            listed |= {LEDGER, PART_LIST}
        for name in list_names(self.selection.uri):
            if name.endswith(".parquet") and name not in listed:
                self.findings.problem(f"{self.selection.uri}/{name} is in no manifest")
        for name, manifest in {**self.scores, **self.flags}.items():
            if manifest.inputs["tokens"] != self.tokens.fingerprint:
                self.findings.problem(f"scores `{name}` were made from other tokens")
            rows = [part.num_rows for part in manifest.parts]
            if rows != [part.num_rows for part in self.tokens.parts]:
                self.findings.problem(f"scores `{name}` have other rows than the tokens")

    @cached_property
    def ranked(self) -> list[RankedPart]:
        """Every part of the pool under the selection's rule.

        Raises:
            SpecError: the code of the user's rule is not here.
            ArtifactError: it has changed.
        """
        rule = find_rule("rule", self.settings["rule"])
        if rule.code is not None and rule.code.digest != self.settings.get("rule_code"):
            raise ArtifactError(
                f"the rule `{rule.name}` is other code here than the selection was made with: "
                "verify it where that code is"
            )
        prior_rows, taken = self._prior_rows(), self._taken_rows()
        return [
            RankedPart(
                store=self.store,
                tokens=part,
                scores={n: self.scores[n].parts[i].path for n in scorers_read(rule, self.scores)},
                **{
                    name: self.flags[name].parts[i].path if name in self.flags else None
                    for name in ("contamination", "benchmarks")
                },
                prior_rows=prior_rows.get(part.sha256),
                exclude_prior_rows=self.settings["prior_rows_excluded"],
                rule=rule,
                grain=self.settings["grain"],
                seed=self.settings["seed"],
                taken_down=taken.get(part.sha256),
            )
            for i, part in enumerate(self.tokens.parts)
        ]

    def _taken_rows(self) -> dict[str, NDArray[np.int64]]:
        name = self.selection.manifest.inputs.get("taken_down")
        if name is None:
            return {}
        documents, grain = stored_documents(self.store, self.tokens, name), self.settings["grain"]
        pairs = zip(self.tokens.parts, file_digests(self.tokens), strict=True)
        return {p.sha256: taken_rows(self.store, documents, grain, (p.path, f)) for p, f in pairs}

    def _prior_rows(self) -> dict[str, NDArray[np.int64]]:
        model = self.selection.manifest.inputs["prior_rows"]
        if model is None:
            return {}
        folder = self.store.path(model if "/" in model else f"models/{model}")
        found, seen = trained_rows(folder, {part.sha256 for part in self.tokens.parts})
        if seen:
            for part, files in zip(self.tokens.parts, file_digests(self.tokens), strict=True):
                if not seen.keys().isdisjoint(files):
                    rows = rows_with(self.store.path(part.path), files, seen)
                    add_rows(found, part.sha256, rows)
        return found

    def _check_cut(self) -> None:
        """The cut found again from the stored scores equals the manifest's."""
        if isinstance(self.cut, Cut) and self.cut.part is None:
            return  # a threshold: nothing was searched for
        parts = dict(enumerate(self.ranked))
        again: Cut | QuotaCut
        if isinstance(self.cut, QuotaCut):
            again = find_quota_cut(
                {i: partial(_with_sources, part, self.sources) for i, part in parts.items()},
                self.selection.num_rows,
                names=self.sources.labels,
                **named_shares(
                    self.settings["max_share"], self.settings["min_share"], self.sources
                ),
            )
        elif self.settings["grain"] == "documents":
            weighted = {i: partial(_weighted, part) for i, part in parts.items()}
            again = find_weighted_cut(weighted, self.selection.num_tokens)
        else:
            again = find_cut(
                {i: partial(_values, part) for i, part in parts.items()}, self.selection.num_rows
            )
        self.findings.checked["cuts"] += 1
        if cut_to_json(again) != cut_to_json(self.cut):
            self.findings.problem(
                f"the stored scores give the cut {again}, the manifest has {self.cut}"
            )

    def _check_rows(self) -> None:
        """Every row of the pool is kept or dropped as the ledger says; kept rows are unchanged."""
        kept = self._kept_rows()
        ledger = read_table(join(self.selection.about, LEDGER)).to_pylist()
        if [row["part"] for row in ledger] != list(range(len(self.tokens.parts))):
            self.findings.problem("the ledger does not have one row for each part of the pool")
            return
        for index, (ranked, row) in enumerate(zip(self.ranked, ledger, strict=True)):
            scores = ranked.read()
            if isinstance(self.cut, Cut):
                mask = self.cut.mask(index, scores.value)
            else:
                mask = self.cut.mask(index, *_with_sources(ranked, self.sources))
            counts = {"kept": int(mask.sum())}
            for status, reason in enumerate(REASONS):
                counts[reason.replace(" ", "_")] = int(((scores.fate == status) & ~mask).sum())
            said = {name: row.get(name, 0) for name in counts}  # older ones have fewer reasons
            wrong = {name: (said[name], n) for name, n in counts.items() if said[name] != n}
            if wrong:
                self.findings.problem(f"ledger of part {row['part']}: (said, found) {wrong}")
            self._check_kept(index, ranked, scores, np.flatnonzero(mask), kept.pop(index, None))
            self.findings.checked["rows"] += len(mask)
        for index in kept:
            self.findings.problem(f"kept rows of part {index}, which the pool does not have")

    def _kept_rows(self) -> dict[int, pa.Table]:
        """The selection's rows by part of the pool, in the order of its rows."""
        tables: dict[int, list[pa.Table]] = {}
        for part in self.selection.parts:
            table = read_table(part.uri)
            owners = table["part"].to_numpy()
            for index in np.unique(owners):
                mine = table.filter(pa.array(owners == index))
                tables.setdefault(int(index), []).append(mine)
        return {i: pa.concat_tables(found).sort_by("row") for i, found in tables.items()}

    def _check_kept(
        self,
        index: int,
        ranked: RankedPart,
        scores: PartScores,
        expected: NDArray[np.int64],
        kept: pa.Table | None,
    ) -> None:
        rows = kept["row"].to_numpy() if kept is not None else np.zeros(0, np.int64)
        if not np.array_equal(rows, expected):
            missing = len(np.setdiff1d(expected, rows))
            extra = len(rows) - (len(expected) - missing)
            self.findings.problem(f"part {index}: {missing} kept rows missing, {extra} too many")
            return
        if kept is None:
            return
        if not np.array_equal(kept["score"].to_numpy(), scores.raw[expected]):
            self.findings.problem(f"part {index}: scores of kept rows differ from the stored ones")
        if "input_ids" in kept.column_names:
            stored = token_ids(read_table(self.store.path(ranked.tokens.path)))
            if not np.array_equal(token_ids(kept), stored[expected]):
                self.findings.problem(f"part {index}: tokens of kept rows differ from the pool's")

    def _check_losses(self, num_rows: int, seed: int) -> None:
        from stillhouse.models.scoring import load_scoring_model
        from stillhouse.spec import ScoringSettings

        chosen = sample_rows(self.tokens.parts, num_rows, seed)
        for name in ("prior", "conditional"):
            if name not in self.scores:
                continue
            manifest = self.scores[name]
            model = manifest.inputs["model"]  # given ones by their full URI
            folder = self.store.path(model) if model.startswith("models/") else model
            settings, bos_id = ScoringSettings(dtype="float32"), manifest.settings.get("bos_id")
            try:
                scorer = load_scoring_model(
                    folder, settings, device="auto", gpus=0, threads=1, bos_id=bos_id
                )
            except ArtifactError as error:
                self.findings.problem(f"the model of `{name}` cannot be loaded: {error}")
                continue
            for index, rows in chosen:
                self._compare(name, manifest, index, rows, scorer)

    def _compare(
        self, name: str, manifest: Manifest, index: int, rows: NDArray[np.int64], scorer: Any
    ) -> None:
        part = read_table(self.store.path(self.tokens.parts[index].path)).take(rows)
        stored = read_table(self.store.path(manifest.parts[index].path), ["value"])
        values = stored["value"].to_numpy()[rows]
        again = mean_losses(scorer.token_nll(token_ids(part)), answer_mask(part))
        tolerance = TOLERANCES.get(manifest.made_by.get("dtype", ""), TOLERANCES["float32"])
        same = np.isclose(values, again, atol=tolerance, rtol=tolerance, equal_nan=True)
        self.findings.checked["losses"] += len(rows)
        for place in np.flatnonzero(~same)[:3]:
            self.findings.problem(
                f"`{name}` loss of part {index} row {rows[place]}: stored {values[place]:.5f}, "
                f"the model gives {again[place]:.5f}"
            )


def _values(part: RankedPart) -> NDArray[np.float32]:
    return part.read().value


def _weighted(part: RankedPart) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    scores = part.read()
    return scores.value, scores.weight


def _with_sources(
    part: RankedPart, sources: Sources
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Values, and the sources of rows by the tokens themselves, not by the ranks table."""
    pieces = part.pieces()
    codes = sources.codes(pieces.sources)
    return part.read(pieces).value, codes[row_sources(pieces, part.grain)]
