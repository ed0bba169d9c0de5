"""Checking a selection against everything it was made from, with nothing believed.

The cut against the stored scores; the fate of every row of the pool
against the ledger and the kept rows; and a random sample of losses against the models themselves.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError
from stillhouse.reading.readers import Selection
from stillhouse.selection.budget import Cut, find_cut, find_weighted_cut
from stillhouse.selection.quotas import (
    QuotaCut,
    cut_from_json,
    cut_to_json,
    find_quota_cut,
    named_shares,
)
from stillhouse.selection.ranking import REASONS, PartScores, RankedPart, scorers_read
from stillhouse.selection.rules import NamedRule, find_rule
from stillhouse.selection.scorers import TOLERANCES
from stillhouse.selection.sources import Sources
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import join, list_names
from stillhouse.storage.layout import LEDGER, PART_LIST
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import read_pieces, row_sources, token_ids
from stillhouse.training.seen import add_rows, file_digests, rows_with, trained_rows

_MAX_PROBLEMS = 50


@dataclass(slots=True)
class Findings:
    """What was checked, by name, and what is wrong."""

    checked: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Note that something is wrong; after fifty only the count matters."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)
        self.checked["problems"] += 1


class Verifier:
    """One selection, opened with all that it was made from.

    Raises:
        ArtifactError: a manifest that it names is missing or broken.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.store = Store(selection.store)
        self.findings = Findings()
        inputs, self.settings = selection.manifest.inputs, selection.manifest.settings
        self.tokens = self.store.get_manifest("tokens", inputs["tokens"])
        self.scores = {n: self.store.get_manifest("scores", f) for n, f in inputs["scores"].items()}
        self.contamination = (
            self.store.get_manifest("scores", inputs["contamination"])
            if inputs["contamination"]
            else None
        )

    def check_parts(self) -> None:
        """No file of rows is in no manifest: readers of the folder would take it for a part."""
        listed = {part.path.rsplit("/", 1)[-1] for part in self.selection.manifest.parts}
        if self.selection.about == self.selection.uri:
            listed |= {LEDGER, PART_LIST}
        for name in list_names(self.selection.uri):
            if name.endswith(".parquet") and name not in listed:
                self.findings.problem(f"{self.selection.uri}/{name} is in no manifest")

    def check_joins(self) -> None:
        """Scores belong to the tokens that the selection names, part by part."""
        artifacts = [*self.scores.items()]
        if self.contamination:
            artifacts.append(("contamination", self.contamination))
        for name, manifest in artifacts:
            if manifest.inputs["tokens"] != self.tokens.fingerprint:
                self.findings.problem(f"scores `{name}` were made from other tokens")
            rows = [part.num_rows for part in manifest.parts]
            if rows != [part.num_rows for part in self.tokens.parts]:
                self.findings.problem(f"scores `{name}` have other rows than the tokens")

    def ranked(self) -> list[RankedPart]:
        """Every part of the pool under the selection's rule."""
        rule = self._rule()
        hidden = self._prior_rows()
        return [
            RankedPart(
                store=self.store,
                tokens=part,
                scores={n: self.scores[n].parts[i].path for n in scorers_read(rule, self.scores)},
                contamination=self.contamination.parts[i].path if self.contamination else None,
                prior_rows=hidden.get(part.sha256),
                exclude_prior_rows=self.settings["prior_rows_excluded"],
                rule=rule,
                grain=self.settings["grain"],
                seed=self.settings["seed"],
            )
            for i, part in enumerate(self.tokens.parts)
        ]

    def _rule(self) -> NamedRule:
        """The rule of the selection; code of the user's has to be here as it was then.

        Raises:
            SpecError: it is not here. ArtifactError: it is other code.
        """
        rule, digest = find_rule("rule", self.settings["rule"]), self.settings.get("rule_code")
        if rule.code is not None and rule.code.digest != digest:
            raise ArtifactError(
                f"the rule `{rule.name}` is other code here than the selection was made with: "
                "verify it where that code is"
            )
        return rule

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

    def check_cut(self) -> None:
        """The cut again from the stored scores: the rows it keeps must be the manifest's."""
        cut = cut_from_json(self.selection.manifest.totals["cut"])
        if isinstance(cut, Cut) and cut.part is None:
            return  # a threshold: nothing was searched for
        parts = dict(enumerate(self.ranked()))
        again: Cut | QuotaCut
        if isinstance(cut, QuotaCut):
            again = self._quota_cut(parts)
        elif self.settings["grain"] == "documents":
            weighted = {index: partial(_weighted, part) for index, part in parts.items()}
            again = find_weighted_cut(weighted, self.selection.num_tokens)
        else:
            values = {index: partial(_values, part) for index, part in parts.items()}
            again = find_cut(values, self.selection.num_rows)
        self.findings.checked["cuts"] += 1
        if cut_to_json(again) != cut_to_json(cut):
            self.findings.problem(f"the stored scores give the cut {again}, the manifest has {cut}")

    def _quota_cut(self, parts: dict[int, RankedPart]) -> QuotaCut:
        sources = self._sources()
        return find_quota_cut(
            {i: partial(_with_sources, part, sources) for i, part in parts.items()},
            self.selection.num_rows,
            names=sources.labels,
            **named_shares(self.settings["max_share"], self.settings["min_share"], sources),
        )

    def _sources(self) -> Sources:
        return Sources.from_labels(self.selection.manifest.totals["source_names"])

    def check_fates(self) -> None:
        """Every row of the pool: kept or dropped as the ledger says, kept ones unchanged."""
        kept = self._kept_rows()
        ledger = read_table(join(self.selection.about, LEDGER)).to_pylist()
        cut = cut_from_json(self.selection.manifest.totals["cut"])
        if [row["part"] for row in ledger] != list(range(len(self.tokens.parts))):
            self.findings.problem("the ledger does not have one row for each part of the pool")
            return
        for index, (member, row) in enumerate(zip(self.ranked(), ledger, strict=True)):
            scores = member.read()
            mask = self._mask(cut, index, member, scores)
            self._check_ledger(row, scores, mask)
            self._check_kept(index, member, scores, mask, kept.pop(index, None))
            self.findings.checked["rows"] += len(mask)
        for index in kept:
            self.findings.problem(f"kept rows of part {index}, which the pool does not have")

    def _mask(
        self, cut: Cut | QuotaCut, index: int, member: RankedPart, scores: PartScores
    ) -> NDArray[np.bool_]:
        if isinstance(cut, Cut):
            return cut.mask(index, scores.value)
        return cut.mask(index, *_with_sources(member, self._sources()))

    def _kept_rows(self) -> dict[int, pa.Table]:
        tables: dict[int, list[pa.Table]] = {}
        for part in self.selection.parts:
            table = read_table(part.uri)
            owners = table["part"].to_numpy()
            for index in np.unique(owners):
                mine = table.filter(pa.array(owners == index))
                tables.setdefault(int(index), []).append(mine)
        return {i: pa.concat_tables(found).sort_by("row") for i, found in tables.items()}

    def _check_ledger(
        self, row: dict[str, Any], scores: PartScores, mask: NDArray[np.bool_]
    ) -> None:
        counts = {"kept": int(mask.sum())}
        for code, reason in enumerate(REASONS):
            counts[reason.replace(" ", "_")] = int(((scores.fate == code) & ~mask).sum())
        wrong = {name: (row[name], count) for name, count in counts.items() if row[name] != count}
        if wrong:
            self.findings.problem(f"ledger of part {row['part']}: (said, found) {wrong}")

    def _check_kept(
        self,
        index: int,
        member: RankedPart,
        scores: PartScores,
        mask: NDArray[np.bool_],
        found: pa.Table | None,
    ) -> None:
        expected = np.flatnonzero(mask)
        rows = found["row"].to_numpy() if found is not None else np.zeros(0, np.int64)
        if not np.array_equal(rows, expected):
            missing = len(np.setdiff1d(expected, rows))
            extra = len(rows) - (len(expected) - missing)
            self.findings.problem(f"part {index}: {missing} kept rows missing, {extra} too many")
            return
        if found is None:
            return
        if not np.array_equal(found["score"].to_numpy(), scores.raw[expected]):
            self.findings.problem(f"part {index}: scores of kept rows differ from the stored ones")
        if "input_ids" in found.column_names:
            stored = token_ids(read_table(self.store.path(member.tokens.path)))
            if not np.array_equal(token_ids(found), stored[expected]):
                self.findings.problem(f"part {index}: tokens of kept rows differ from the pool's")

    def check_losses(self, num_rows: int, seed: int) -> None:
        """A random sample of stored losses against the models, on whatever device is here."""
        from stillhouse.selection.sampling import sample_rows

        chosen = sample_rows(self.tokens.parts, num_rows, seed)
        for name in ("prior", "conditional"):
            if name not in self.scores:
                continue
            manifest = self.scores[name]
            try:
                recompute = _loss_function(self.store, manifest)
            except ArtifactError as error:
                self.findings.problem(f"the model of `{name}` cannot be loaded: {error}")
                continue
            for index, rows in chosen:
                self._compare(name, manifest, index, rows, recompute)

    def _compare(
        self, name: str, manifest: Manifest, index: int, rows: NDArray[np.int64], recompute: Any
    ) -> None:
        tokens = token_ids(read_table(self.store.path(self.tokens.parts[index].path)))
        stored = read_table(self.store.path(manifest.parts[index].path), ["value"])
        values = stored["value"].to_numpy()[rows]
        again = recompute(tokens[rows]).mean(axis=1)
        tolerance = TOLERANCES.get(manifest.made_by.get("dtype", ""), TOLERANCES["float32"])
        same = np.isclose(values, again, atol=tolerance, rtol=tolerance, equal_nan=True)
        bad = np.flatnonzero(~same)
        self.findings.checked["losses"] += len(rows)
        for place in bad[:3]:
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
    """Values, and each row's source as a code: from the tokens, not from what was ranked by."""
    pieces = read_pieces(read_table(part.store.path(part.tokens.path), ["documents"]))
    codes = sources.codes(pieces.sources)
    return part.read(pieces).value, codes[row_sources(pieces, part.grain)]


def _loss_function(store: Store, manifest: Manifest) -> Any:
    from stillhouse.models.scoring import load_scoring_model
    from stillhouse.spec import ScoringSettings

    settings = ScoringSettings(dtype="float32")
    model = load_scoring_model(
        _model_folder(store, manifest.inputs["model"]), settings, device="auto", gpus=0, threads=1
    )
    return partial(model.token_nll)


def _model_folder(store: Store, model: str) -> str:
    """Models of the store are named relative to it, given ones by their full URI."""
    return store.path(model) if model.startswith("models/") else model
