"""The keys of `run --json` of all jobs: programs read them, so that none goes or is renamed.

`*` stands for names that depend on the job: of sources, models, policies, seeds, steps.
"""

from typing import Any

COMMON = {"status", "job", "run", "report", "artifacts", "work", "warnings"}
TESTED = {"mean", "std", "seeds"}
CONTROL = {"bytes", "test_accuracy", "networks"}
MIX_SEED = {"heldout_nll", "accuracy", "accuracy_interval", "chance", "gradient_passes"} | {
    "validation_nll",
    "validation_accuracy",
}
KEYS: dict[str, dict[str, set[str]]] = {
    "select": {
        "": COMMON
        | {"selection_fingerprint", "selection", "dropped", "dead_letters", "training", "target"}
        | {"cost", "exclude", "decontaminate"},
        "artifacts": {"tokens", "target_tokens", "heldout_tokens", "tokenizer", "prior"}
        | {"conditional", "scores", "heldout_scores", "selection", "controls", "dead_letters"}
        | {"targets"},
        "work/*": {"parts", "reused"},
        "selection": {"num_sequences", "num_tokens", "threshold", "sources", "fates"},
        "selection/sources/*": {"pool_tokens", "kept_tokens"},
        "training/*": {"num_tokens", "num_steps", "learning_rate", "global_batch", "final_loss"}
        | {"late_fall"},
        "target/*": {"heldout_nll", "heldout_nll_by_seed", "heldout_halves", "num_tokens"},
        "cost": {"flops", "device_seconds", "paper"},
    },
    "train": {
        "": COMMON | {"model_fingerprint", "train", "cost"},
        "artifacts": {"model", "tokenizer"},
        "work/*": {"parts", "reused"},
        "train": {"heldout_nll", "final_loss", "num_tokens", "num_steps", "learning_rate"}
        | {"global_batch", "order_sha256", "tokens_per_second", "data_wait_share", "mfu"}
        | {"restarts", "sources", "data", "heldout_halves", "bits_per_byte"},
        "train/sources/*": {"nll", "num_tokens", "bits_per_byte"},
        "cost": {"flops", "device_seconds"},
    },
    "classify": {
        "": COMMON | {"model_fingerprint", "train", "cost", "dead_letters"},
        "artifacts": {"model", "images"},
        "work/*": {"parts", "reused"},
        "train": {"task", "accuracy", "validation_accuracy", "nll", "final_loss", "num_images"}
        | {"num_steps", "order_sha256", "images_per_second", "data_wait_share", "learning_rate"}
        | {"global_batch", "restarts", "attention", "bag_nll"},
        "cost": {"device_seconds"},
    },
    "mix": {
        "": COMMON | {"model_fingerprint", "mix", "rows", "skipped_arms"},
        "artifacts": {"tokenizer", "models", "decisions"},
        "work/*": {"parts", "reused"},
        "mix/*": {"seeds"},
        "mix/*/seeds/*": MIX_SEED | {"num_steps", "draws", "decisions_sha256"},
    },
    "distill": {
        "": COMMON | {"distilled_fingerprint", "distill", "cost", "dead_letters"},
        "artifacts": {"images", "learned_from", "distilled"},
        "work/*": {"parts", "reused"},
        "distill": {"method", "images_per_class", "bytes", "validation_accuracy", "test_accuracy"}
        | {"networks", "controls", "judged_by", "seconds", "iteration", "learning_rate"},
        "distill/test_accuracy": TESTED,
        "distill/networks/*": TESTED,
        "distill/controls/*": CONTROL,
        "cost": {"device_seconds"},
    },
    "generate": {
        "": COMMON | {"generated_fingerprint", "generate", "cost"},
        "artifacts": {"generated"},
        "work/*": {"parts", "reused"},
        "generate/models/*": {"calls", "prompt_tokens", "completion_tokens"},
        "cost": {"device_seconds"},
    },
}
GENERATE = {"num_pairs", "seeds", "calls", "cached_calls", "tokens", "rounds", "dropped", "models"}
"""Of every generation; `price` and what its method adds beside."""


def check_keys(result: dict[str, Any], kind: str | None = None) -> None:
    """Every object of a job's result has exactly the keys of its kind, by default of its job."""
    for path, keys in KEYS[kind or result["job"]].items():
        found = [result]
        for name in path.split("/") if path else []:
            found = [v for one in found for v in (one.values() if name == "*" else [one[name]])]
        assert found, path
        for one in found:
            assert set(one) == keys, path
