"""The tables of `selection_quality.py`, and whether its floors for books are reached."""

from typing import Any

CONTROLS = ("random", "conditional_only", "dsir")
FLOOR_NATS, FLOOR_AUC, FLOOR_RECALL = 0.35, 0.98, 0.90


def tables(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rules = ("color", *CONTROLS)
    lines = ["", "Held-out loss at equal tokens, nats: mean (standard deviation over seeds)", ""]
    lines += ["| target | tau | tokens | seeds | " + " | ".join(rules) + " |"]
    lines += ["|---|---|---|---|" + "---|" * len(rules)]
    for row in report["main"]:
        found = row["losses"]
        cells = [_cell(found["heldout_nll"][rule]) for rule in rules]
        seeds = len(found["heldout_nll"]["color"]["by_seed"])
        head = f"| {row['target']} | {row['tau']:g} | {found['num_tokens']:,} | {seeds} | "
        lines += [head + " | ".join(cells) + " |"]
    lines += ["", "Gain over the controls, paired by seed; label metrics of the scores", ""]
    lines += ["| target | " + " | ".join(f"over {rule}" for rule in CONTROLS)]
    lines[-1] += " | AUC | recall at k | AUC dsir | recall dsir | share pool -> kept |"
    lines += ["|---|" + "---|" * (len(CONTROLS) + 5)]
    for row in report["main"]:
        gains = [_cell(row["losses"]["color_gain_over"][rule]) for rule in CONTROLS]
        labels = [
            f"{row['labels'][rule][key]:.4f}"
            for rule in ("color", "dsir")
            for key in ("auc", "recall_at_k")
        ]
        share = f"{row['share']['pool']:.3f} -> {row['share']['kept']:.3f}"
        lines += [f"| {row['target']} | " + " | ".join([*gains, *labels, share]) + " |"]
    for row in report["flops"]:
        lines += [
            "",
            f"Equal total FLOPs ({row['total_flops']:.3g}), {row['target']}, one seed",
            "",
        ]
        lines += [
            "| color | random | gain | random's tokens | of them unique |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['color']:.4f} | {row['random']:.4f} | {row['color_gain']:+.4f} | "
            f"{row['random_tokens']:,} | {row['random_unique_tokens']:,} |"
        ]
    if report["tau"]:
        lines += ["", "Held-out loss against tau (one seed, one pass over the selection)", ""]
        lines += ["| tau | tokens | loss | share kept |", "|---|---|---|---|"]
        lines += [
            f"| {r['tau']:g} | {r['num_tokens']:,} | {r['heldout_nll']:.4f} | "
            f"{r['share']['kept']:.3f} |"
            for r in sorted(report["tau"], key=lambda r: r["tau"])
        ]
    return "\n".join(lines)


def _cell(value: dict[str, Any]) -> str:
    spread = "" if value["stdev"] is None else f" ({value['stdev']:.4f})"
    return f"{value['mean']:.4f}{spread}"


def shortfalls(report: dict[str, Any]) -> list[str]:
    """Floors for books that were not reached."""
    missed: list[str] = []
    for row in report["main"]:
        if row["target"] != "books":
            continue
        gains, labels = row["losses"]["color_gain_over"], row["labels"]["color"]
        checks = [
            ("gain over random", gains["random"]["mean"], FLOOR_NATS),
            ("gain over conditional_only", gains["conditional_only"]["mean"], 0.0),
            ("gain over dsir", gains["dsir"]["mean"], 0.0),
            ("AUC", labels["auc"], FLOOR_AUC),
            ("recall at k", labels["recall_at_k"], FLOOR_RECALL),
        ]
        missed += [f"{name} {got:.4f} < {floor}" for name, got, floor in checks if got < floor]
    return missed
