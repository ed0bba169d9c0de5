"""Reasons to doubt a selection, found in numbers alone: each check returns its warnings.

Every warning says what was seen, what it means, and what to do. Thresholds stand beside their
checks; they mark where a person should look, not where a selection is wrong.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.report.data import (
    Difference,
    HealthWarning,
    SeenUnseen,
    SourceRow,
    TargetScores,
    TrainingRow,
)
from stillhouse.report.formatting import compact, decimals, percent, signed
from stillhouse.report.near_duplicates import NearDuplicates
from stillhouse.selection.contamination import NUM_WORDS
from stillhouse.selection.sources import OTHER


@dataclass(frozen=True, slots=True)
class HealthInputs:
    """What the checks look at: of the whole pool, but for the texts."""

    target_scores: TargetScores | None
    absolute: bool
    """Whether a score of 0 has a meaning: prior and conditional alike, as in CoLoR-Filter's."""
    gain: Difference | None
    """Loss of the target model minus that of the one trained on random data."""
    sources: Sequence[SourceRow]
    spread: float
    """Standard deviation of all finite scores of the pool."""
    correlations: Mapping[str, float]
    """Of the score with measures of length and fragmentation, over the pool, by their name."""
    num_scored: int
    num_nan: int
    num_kept: int
    num_tied: int
    """Eligible sequences whose score equals the threshold, kept or not."""
    seen: SeenUnseen | None
    near_duplicates: NearDuplicates | None
    packed_tokens: int
    remainder_tokens: int
    """Tokens at the ends of units that filled no sequence."""
    num_documents: int
    num_dead_letters: int
    num_heldout: int
    num_short: int
    """Held-out texts in all, and those that are too short for the search for contamination."""
    trainings: Sequence[TrainingRow]
    unknown_tokens: int = 0
    """Tokens that stand for text which the tokenizer has no pieces for."""
    sampled_documents: int = 0
    changed_documents: int = 0
    """Of the sampled ones, those that are another text after encoding and decoding."""
    prior_loss: float | None = None
    """The prior's mean loss on the pool, in nats a token."""
    vocab_size: int = 0


def check_health(inputs: HealthInputs) -> list[HealthWarning]:
    """All warnings, the gravest kind first; empty if there is nothing to say."""
    return [
        *no_better_than_random(inputs.gain),
        *target_scores(inputs.target_scores, absolute=inputs.absolute),
        *knows_nothing(inputs.prior_loss, inputs.vocab_size),
        *lost_text(inputs),
        *nan_scores(inputs.num_nan, inputs.num_scored),
        *near_constant(inputs.sources, inputs.spread),
        *mostly_length(inputs.correlations),
        *memorised(inputs.seen, inputs.spread),
        *one_source(inputs.sources),
        *ties(inputs.num_tied, inputs.num_kept),
        *repeats(inputs.near_duplicates),
        *remainder(inputs.remainder_tokens, inputs.packed_tokens),
        *unreadable(inputs.num_dead_letters, inputs.num_documents),
        *too_short(inputs.num_short, inputs.num_heldout),
        *unfinished((row.name, row.late_fall) for row in inputs.trainings),
    ]


def no_better_than_random(gain: Difference | None) -> Iterator[HealthWarning]:
    """A loss not below that of random data, or not by two standard errors over the seeds."""
    if gain is None:
        return
    noise = 2 * (gain.spread or 0.0) / gain.num_seeds**0.5
    if gain.mean + noise >= 0:
        said = f"by {signed(gain.mean)} nats per token"
        said += f", give or take {decimals(noise)}" if gain.spread else ""
        yield HealthWarning(
            "The selection is no better than random data",
            f"A model trained on it differs {said} from one trained on as many random tokens, on "
            "held-out target text. Do not use it as it is: look at the other warnings, read the "
            "best examples, and check that prior and conditional are the right way round, that "
            "the conditional was tuned on this target, and that both trained long enough.",
        )


def target_scores(found: TargetScores | None, *, absolute: bool) -> Iterator[HealthWarning]:
    """Held-out target text must score above 0 and above the pool: what the score is for."""
    if found is None:
        return
    error = (found.std**2 / found.count + found.pool_std**2 / found.pool_count) ** 0.5
    numbers = (
        f"Its mean score is {signed(found.mean)}, the pool's {signed(found.pool_mean)} with a "
        f"standard deviation of {decimals(found.pool_std)}"
    )
    if found.mean - found.pool_mean <= max(2 * error, 0.1 * found.pool_std):
        yield HealthWarning(
            "Held-out target text scores no higher than the pool",
            f"{numbers}. Prior and conditional may be swapped, or the conditional may not be "
            "tuned on this target; two models that hardly differ, or a pool that is all like the "
            "target, look like this too. Do not use the selection before that is clear.",
        )
    elif absolute and found.mean <= 0:
        yield HealthWarning(
            "The conditional does not know the target better than the prior",
            f"On held-out target text its loss is higher. {numbers}. It may have been tuned for "
            "too long on too little, at too high a learning rate, or on something else.",
        )


def knows_nothing(prior_loss: float | None, vocab_size: int) -> Iterator[HealthWarning]:
    """A prior whose loss is at least 0.97 of that of guessing every token."""
    if prior_loss is not None and prior_loss > 0.97 * math.log(vocab_size):
        guessing = f"guessing one of {vocab_size:,} tokens costs {math.log(vocab_size):.2f}"
        yield HealthWarning(
            "The prior predicts no better than guessing",
            f"Its mean loss on the pool is {prior_loss:.2f} nats a token; {guessing}. It is "
            "untrained, reads tokens of another tokenizer, or lacks its BOS token "
            "(`tokenizer.bos`): the scores are noise.",
        )


def lost_text(inputs: HealthInputs) -> Iterator[HealthWarning]:
    """More than 1 % unknown tokens, or of the sampled documents that do not come back."""
    total = inputs.packed_tokens + inputs.remainder_tokens
    if inputs.unknown_tokens > 0.01 * total:
        yield HealthWarning(
            f"{percent(inputs.unknown_tokens / total)} of the tokens are unknown to the tokenizer",
            "It has no pieces for that text, so that models see one unknown token instead of it. "
            "Take a tokenizer that knows the pool's language and alphabet.",
        )
    if inputs.changed_documents > 0.01 * inputs.sampled_documents:
        yield HealthWarning(
            "Text does not come back from the tokenizer as it was",
            f"{inputs.changed_documents:,} of {inputs.sampled_documents:,} sampled documents are "
            "another text after encoding and decoding (case, accents or white space are lost, or a "
            "normaliser changes them): models never see what was there. Take a lossless tokenizer.",
        )


def nan_scores(num_nan: int, num_scored: int) -> Iterator[HealthWarning]:
    """Any score that is not a number."""
    if num_nan > 0:
        yield HealthWarning(
            f"{compact(num_nan)} scores are not numbers ({percent(num_nan / num_scored)})",
            "They are never kept. A model's forward pass overflowed: score with "
            "`scoring.dtype: float32`, and look at the prior's and the conditional's last losses.",
        )


def near_constant(sources: Sequence[SourceRow], spread: float) -> Iterator[HealthWarning]:
    """Sources above 1 % of the pool whose scores vary less than 5 % of the whole pool's."""
    pool = sum(row.pool_tokens for row in sources)
    named = [row for row in sources if row.name != OTHER]
    large = [row for row in named if row.pool_tokens > 0.01 * pool and row.pool_sequences > 1]
    for row in large:
        if row.std_score is not None and row.std_score < 0.05 * spread:
            yield HealthWarning(
                f"Scores hardly differ inside {row.name}",
                f"Their standard deviation is {decimals(row.std_score)}, against "
                f"{decimals(spread)} over the whole pool: this source is kept or left as one "
                "block. Its texts may be copies of one template: read some, and deduplicate.",
            )


def mostly_length(correlations: Mapping[str, float]) -> Iterator[HealthWarning]:
    """A correlation above 0.6 between the score and a measure of length or fragmentation."""
    for name, correlation in correlations.items():
        if abs(correlation) > 0.6:
            yield HealthWarning(
                f"The score follows {name}",
                f"Their correlation is {signed(correlation, 2)}: much of the ranking is "
                "length, not likeness to the target. Compare the best and the worst examples; "
                "split or filter by length before scoring, or fine-tune the conditional longer.",
            )


def memorised(seen: SeenUnseen | None, spread: float) -> Iterator[HealthWarning]:
    """Means of seen and unseen sequences further apart than a tenth of the spread, and noise."""
    if seen is None or not seen.seen_rows or not seen.unseen_rows:
        return
    gap = seen.seen_mean - seen.unseen_mean
    noise = spread * (1 / seen.seen_rows + 1 / seen.unseen_rows) ** 0.5
    if abs(gap) > max(0.1 * spread, 3 * noise):
        advice = (
            "They were not eligible, so the selection is fair."
            if seen.excluded
            else "Keep them out with `selection.exclude_prior_rows: true`."
        )
        yield HealthWarning(
            "What the prior was trained on scores differently",
            f"By {signed(gap)} nats per token on average: the prior remembers these sequences. "
            f"{advice} A smaller prior or more tokens for it lessen this.",
        )


def one_source(sources: Sequence[SourceRow]) -> Iterator[HealthWarning]:
    """One of several sources with more than 90 % of the kept tokens."""
    kept = sum(row.kept_tokens for row in sources)
    for row in sources if len(sources) > 1 else ():
        if row.kept_tokens > 0.9 * kept and row.name != OTHER:
            yield HealthWarning(
                f"{row.name} makes up {percent(row.kept_tokens / kept)} of the selection",
                "The score mostly tells sources apart; taking that source alone would do nearly "
                "the same. If you want variety, set `selection.max_share`.",
            )


def ties(num_tied: int, num_kept: int) -> Iterator[HealthWarning]:
    """More scores equal to the threshold than 1 % of the kept."""
    if num_tied > max(1, 0.01 * num_kept):
        yield HealthWarning(
            f"{compact(num_tied)} sequences tie at the cut",
            "Which of them are kept is decided by their place in the pool, not by their score. "
            "They are often copies of one text: deduplicate, or score in float32.",
        )


def repeats(found: NearDuplicates | None) -> Iterator[HealthWarning]:
    """More than 1 % near-duplicates in a sample of the kept."""
    if found is not None and found.share > 0.01:
        yield HealthWarning(
            f"{percent(found.share)} of a sample of the kept are near-duplicates",
            f"{found.num_repeats:,} of {found.num_texts:,} texts share four fifths of their "
            "5-word runs with an earlier one. Every sequence is scored alone, so a good text is "
            "kept as often as it occurs: deduplicate the pool by similarity first.",
        )


def remainder(remainder_tokens: int, packed_tokens: int) -> Iterator[HealthWarning]:
    """More than 1 % of the tokens lost at the ends of packing units."""
    total = remainder_tokens + packed_tokens
    if remainder_tokens > 0.01 * total:
        yield HealthWarning(
            f"{percent(remainder_tokens / total)} of the tokens filled no sequence",
            "Each unit of files is cut in whole sequences and its rest is dropped. Your units are "
            "small: join files, raise `part_tokens`, or shorten `sequence_length`.",
        )


def unreadable(num_dead_letters: int, num_documents: int) -> Iterator[HealthWarning]:
    """More than one input row in a thousand that could not be read."""
    total = num_dead_letters + num_documents
    if num_dead_letters > 0.001 * total:
        yield HealthWarning(
            f"{percent(num_dead_letters / total)} of the input rows could not be read",
            f"{compact(num_dead_letters)} rows were set aside; the first are listed under `What "
            "was left out`. Check `pool.columns` and the files' encoding.",
        )


def too_short(num_short: int, num_heldout: int) -> Iterator[HealthWarning]:
    """More than a tenth of the held-out texts cannot be found in others."""
    if num_short > 0.1 * num_heldout:
        yield HealthWarning(
            f"{percent(num_short / num_heldout)} of the held-out texts are too short to find "
            "contamination",
            f"{num_short:,} of {num_heldout:,} have fewer than {NUM_WORDS} words, and documents "
            f"are searched for runs of {NUM_WORDS} words: a copy inside a longer document is not "
            "seen. Hold longer texts out, such as a question with its answer.",
        )


def unfinished(late_falls: Iterable[tuple[str, float | None]]) -> Iterator[HealthWarning]:
    """Trainings, by name, whose loss fell by more than 0.06 nats in the last tenth of the steps."""
    falls = {name: fall for name, fall in late_falls if fall is not None and fall > 0.06}
    if falls:
        worst = max(falls, key=lambda name: falls[name])
        others = f" and of {len(falls) - 1} more trainings" if len(falls) > 1 else ""
        yield HealthWarning(
            f"The loss of {worst}{others} was still falling steeply at the end",
            f"By {decimals(falls[worst])} nats in the last tenth of the steps: the model is far "
            "from what its size and data allow. Train it on more tokens, with a smaller "
            "`global_batch` (more steps) or a higher `learning_rate`; `auto` chooses both.",
        )
