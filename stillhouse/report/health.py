"""Checks of a selection's numbers; each yields its warnings.

A warning says what was seen, what it means, and what to do. The thresholds mark where a person
should look, not where a selection is wrong.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from statistics import fmean, stdev
from zlib import crc32

from stillhouse.report.blocks import Warn
from stillhouse.report.formatting import compact, decimals, percent, signed
from stillhouse.selection.contamination import NUM_WORDS
from stillhouse.selection.ledger import Moments, SourceTally, Tally
from stillhouse.selection.quotas import OTHER

SHINGLE_WORDS = 5


def no_better_than_random(gaps: Sequence[float]) -> Iterator[Warn]:
    """A loss not below random data's by two standard errors; `gaps` are differences by seed."""
    if not gaps:
        return
    noise = 2 * stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    if fmean(gaps) + noise >= 0:
        said = f"by {signed(fmean(gaps))} nats per token"
        said += f", give or take {decimals(noise)}" if noise else ""
        yield Warn(
            "The selection is no better than random data",
            f"A model trained on it differs {said} from one trained on as many random tokens, on "
            "held-out target text. Do not use it as it is: look at the other warnings, read the "
            "best examples, and check that prior and conditional are the right way round, that "
            "the conditional was tuned on this target, and that both trained long enough.",
        )


def target_scores(found: Moments, pool: Moments, *, absolute: bool) -> Iterator[Warn]:
    """Held-out target text that does not score above the pool.

    `absolute` scores (the prior's loss minus the conditional's) must also be above 0.
    """
    if not found.count or not pool.count:
        return
    error = (found.std**2 / found.count + pool.std**2 / pool.count) ** 0.5
    numbers = (
        f"Its mean score is {signed(found.mean)}, the pool's {signed(pool.mean)} with a "
        f"standard deviation of {decimals(pool.std)}"
    )
    if found.mean - pool.mean <= max(2 * error, 0.1 * pool.std):
        yield Warn(
            "Held-out target text scores no higher than the pool",
            f"{numbers}. Prior and conditional may be swapped, or the conditional may not be "
            "tuned on this target; two models that hardly differ, or a pool that is all like the "
            "target, look like this too. Do not use the selection before that is clear.",
        )
    elif absolute and found.mean <= 0:
        yield Warn(
            "The conditional does not know the target better than the prior",
            f"On held-out target text its loss is higher. {numbers}. It may have been tuned for "
            "too long on too little, at too high a learning rate, or on something else.",
        )


def knows_nothing(prior_loss: float | None, vocab_size: int) -> Iterator[Warn]:
    """A prior with at least 0.97 of the loss of guessing every token."""
    if prior_loss is not None and prior_loss > 0.97 * math.log(vocab_size):
        guessing = f"guessing one of {vocab_size:,} tokens costs {math.log(vocab_size):.2f}"
        yield Warn(
            "The prior predicts no better than guessing",
            f"Its mean loss on the pool is {prior_loss:.2f} nats a token; {guessing}. It is "
            "untrained, reads tokens of another tokenizer, or lacks its BOS token "
            "(`tokenizer.bos`): the scores are noise.",
        )


def lost_text(counts: Mapping[str, int]) -> Iterator[Warn]:
    """More than 1 % of unknown tokens, or of sampled documents that encoding changes."""
    total = counts["tokens"] + counts["remainder_tokens"]
    if counts["unknown_tokens"] > 0.01 * total:
        yield Warn(
            f"{percent(counts['unknown_tokens'] / total)} of the tokens are unknown to the "
            "tokenizer",
            "It has no pieces for that text, so that models see one unknown token instead of it. "
            "Take a tokenizer that knows the pool's language and alphabet.",
        )
    changed, sampled = counts["changed_documents"], counts["sampled_documents"]
    if changed > 0.01 * sampled:
        yield Warn(
            "Text does not come back from the tokenizer as it was",
            f"{changed:,} of {sampled:,} sampled documents are another text after encoding and "
            "decoding (case, accents or white space are lost, or a normaliser changes them): "
            "models never see what was there. Take a lossless tokenizer.",
        )


def nan_scores(num_nan: int, num_scored: int) -> Iterator[Warn]:
    if num_nan > 0:
        yield Warn(
            f"{compact(num_nan)} scores are not numbers ({percent(num_nan / num_scored)})",
            "They are never kept. A model's forward pass overflowed: score with "
            "`scoring.dtype: float32`, and look at the prior's and the conditional's last losses.",
        )


def split_answers(counts: Mapping[str, int]) -> Iterator[Warn]:
    """More than a fifth of the documents with answers go on in another sequence."""
    split, total = counts.get("split_documents", 0), counts["documents"]
    if split > 0.2 * total:
        yield Warn(
            f"{percent(split / total)} of the rows with answers are split between sequences",
            f"{split:,} of {total:,} rows go on in a second sequence, where their answers are read "
            "without what was asked before: raise `sequence_length`.",
        )


def near_constant(sources: Mapping[str, SourceTally], spread: float) -> Iterator[Warn]:
    """Sources above 1 % of the pool whose scores spread less than 5 % of the pool's."""
    pool = sum(row.pool_tokens for row in sources.values())
    for name, row in sources.items():
        large = row.pool_tokens > 0.01 * pool and row.pool_rows > 1 and name != OTHER
        if large and row.scores.count and row.scores.std < 0.05 * spread:
            yield Warn(
                f"Scores hardly differ inside {name}",
                f"Their standard deviation is {decimals(row.scores.std)}, against "
                f"{decimals(spread)} over the whole pool: this source is kept or left as one "
                "block. Its texts may be copies of one template: read some, and deduplicate.",
            )


def mostly_length(name: str, correlation: float) -> Iterator[Warn]:
    """A correlation above 0.6 between the score and a measure of length."""
    if abs(correlation) > 0.6:
        yield Warn(
            f"The score follows {name}",
            f"Their correlation is {signed(correlation, 2)}: much of the ranking is "
            "length, not likeness to the target. Compare the best and the worst examples; "
            "split or filter by length before scoring, or fine-tune the conditional longer.",
        )


def memorised(tally: Tally, *, excluded: bool) -> Iterator[Warn]:
    """Seen and unseen sequences whose means differ by more than a tenth of the spread and noise."""
    (num_seen, seen), (num_unseen, unseen) = tally.seen, tally.unseen
    if not num_seen or not num_unseen:
        return
    spread, gap = tally.pieces.y.std, seen / num_seen - unseen / num_unseen
    noise = spread * (1 / num_seen + 1 / num_unseen) ** 0.5
    if abs(gap) > max(0.1 * spread, 3 * noise):
        advice = (
            "They were not eligible, so the selection is fair."
            if excluded
            else "Keep them out with `selection.exclude_prior_rows: true`."
        )
        yield Warn(
            "What the prior was trained on scores differently",
            f"By {signed(gap)} nats per token on average: the prior remembers these sequences. "
            f"{advice} A smaller prior or more tokens for it lessen this.",
        )


def one_source(sources: Mapping[str, SourceTally]) -> Iterator[Warn]:
    """A source with more than 90 % of the kept tokens."""
    kept = sum(row.kept_tokens for row in sources.values())
    for name, row in sources.items() if len(sources) > 1 else ():
        if row.kept_tokens > 0.9 * kept and name != OTHER:
            yield Warn(
                f"{name} makes up {percent(row.kept_tokens / kept)} of the selection",
                "The score mostly tells sources apart; taking that source alone would do nearly "
                "the same. If you want variety, set `selection.max_share`.",
            )


def ties(num_tied: int, num_kept: int) -> Iterator[Warn]:
    """More ties at the threshold than 1 % of the kept."""
    if num_tied > max(1, 0.01 * num_kept):
        yield Warn(
            f"{compact(num_tied)} sequences tie at the cut",
            "Which of them are kept is decided by their place in the pool, not by their score. "
            "They are often copies of one text: deduplicate, or score in float32.",
        )


def repeats(num_repeats: int, num_texts: int) -> Iterator[Warn]:
    """More than 1 % of near-duplicates in a sample of the kept."""
    if num_repeats > 0.01 * num_texts:
        yield Warn(
            f"{percent(num_repeats / num_texts)} of a sample of the kept are near-duplicates",
            f"{num_repeats:,} of {num_texts:,} texts share four fifths of their "
            "5-word runs with an earlier one. Every sequence is scored alone, so a good text is "
            "kept as often as it occurs: deduplicate the pool by similarity first.",
        )


def remainder(counts: Mapping[str, int]) -> Iterator[Warn]:
    """More than 1 % of the tokens lost at the ends of packing units."""
    left = counts["remainder_tokens"]
    total = left + counts["tokens"]
    if left > 0.01 * total:
        yield Warn(
            f"{percent(left / total)} of the tokens filled no sequence",
            "Each unit of files is cut in whole sequences and its rest is dropped. Your units are "
            "small: join files, raise `part_tokens`, or shorten `sequence_length`.",
        )


def left_out(num_dead_letters: int, dropped: Mapping[str, int]) -> Iterator[Warn]:
    """Rows of a training's documents that could not be read, or were dropped, by reason."""
    lost = [f"{number:,} rows: {reason}" for reason, number in dropped.items()]
    if num_dead_letters:
        lost.insert(0, f"{num_dead_letters:,} rows could not be read")
    if lost:
        yield Warn("Rows of the data were left out", f"{'. '.join(lost)}.")


def unreadable(num_dead_letters: int, num_documents: int) -> Iterator[Warn]:
    """More than a thousandth of the input rows could not be read."""
    total = num_dead_letters + num_documents
    if num_dead_letters > 0.001 * total:
        yield Warn(
            f"{percent(num_dead_letters / total)} of the input rows could not be read",
            f"{compact(num_dead_letters)} rows were set aside; the first are listed under `What "
            "was left out`. Check `pool.columns` and the files' encoding.",
        )


def too_short(num_short: int, num_texts: int, of: str = "held-out texts") -> Iterator[Warn]:
    """More than a tenth of the texts that the pool is searched for cannot be found in others."""
    if num_short > 0.1 * num_texts:
        yield Warn(
            f"{percent(num_short / num_texts)} of the {of} are too short to find contamination",
            f"{num_short:,} of {num_texts:,} have fewer than {NUM_WORDS} words, and documents "
            f"are searched for runs of {NUM_WORDS} words: a copy inside a longer document is not "
            "seen. Give longer texts, such as a question with its answer (`columns.prompt`).",
        )


def not_found(listed: Mapping[str, int], found: Mapping[str, int]) -> Iterator[Warn]:
    """Lists of a take-down of which the pool has nothing; counts by kind of list."""
    for kind, number in listed.items():
        if number and not found[kind]:
            yield Warn(
                f"None of the {kind} in `exclude.{kind}` is in the pool",
                f"{number:,} are listed. Values are compared as they are written: look at one in "
                "the pool and at the list. If what they name has left the pool already, the list "
                "may go, too.",
            )


def seen_before(num_documents: int, num_seen: Mapping[str, int]) -> Iterator[Warn]:
    """Models that were trained on documents that are taken down; counts by model."""
    found = [f"the {name} on {number:,} of them" for name, number in num_seen.items() if number]
    if found:
        yield Warn(
            "Models of this job were trained on documents that are taken down",
            f"{num_documents:,} documents of the pool are taken down; {' and '.join(found)}. No "
            "new selection holds them, but these models chose it. Remove the documents from the "
            "files, and set `prior.pin: refresh`, where models must not have seen them either.",
        )


def unfinished(late_falls: Iterable[tuple[str, float | None, bool]]) -> Iterator[Warn]:
    """Trainings whose loss fell by more than 0.06 nats in the last tenth of the steps.

    `late_falls` are (name, that fall, whether `auto` chose learning rate and batch).
    """
    falls = {name: (fall, auto) for name, fall, auto in late_falls if fall and fall > 0.06}
    if falls:
        worst = max(falls, key=lambda name: falls[name])
        fall, auto = falls[worst]
        others = f" and of {len(falls) - 1} more trainings" if len(falls) > 1 else ""
        yield Warn(
            f"The loss of {worst}{others} was still falling steeply at the end",
            f"By {decimals(fall)} nats in the last tenth of the steps: the model is far "
            "from what its size and data allow. Train it on more tokens, with a smaller "
            "`global_batch` (more steps) or a higher `learning_rate`"
            + ("." if auto else "; `auto` chooses both."),
        )


def near_duplicates(texts: Sequence[str]) -> int:
    """Number of texts with a Jaccard similarity of at least 4/5 to an earlier one.

    Texts are sets of 5-word shingles; only texts that are no repeats themselves are compared with.
    Two sets of such similarity share one of their rarest shingles: of a set of n, one of the first
    n - ceil(4n/5) + 1 in a common order (prefix filtering: Chaudhuri, Ganti, Kaushik, ICDE 2006).
    Only those are looked up.
    """
    sets = [shingles(text) for text in texts]
    counts = Counter(chain.from_iterable(sets))
    holders: defaultdict[int, list[frozenset[int]]] = defaultdict(list)
    repeats = 0
    for mine in sets:
        rarest = sorted(mine, key=lambda shingle: (counts[shingle], shingle))
        prefix = rarest[: len(mine) - -(-4 * len(mine) // 5) + 1]
        others = chain.from_iterable(holders[shingle] for shingle in prefix)
        if any(5 * len(mine & other) >= 4 * len(mine | other) for other in others):
            repeats += 1
            continue
        for shingle in prefix:
            holders[shingle].append(mine)
    return repeats


def shingles(text: str) -> frozenset[int]:
    """Hashes of all runs of 5 lower-case words, or of the whole text if it has fewer."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1) if words else 0
    runs = (" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last))
    return frozenset(crc32(run.encode("utf-8", "replace")) for run in runs)
