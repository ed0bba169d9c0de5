"""What `distillation.py --stage quality` compares: each cell is a change of the base job."""

from typing import Any

BASE: dict[str, Any] = {
    "job": "distill",
    "network": {"name": "convnet", "depth": 3, "width": 16},
    "preprocessing": {"augmentation": ["color", "crop", "cutout", "flip", "scale", "rotate"]},
    "evaluate": {"seeds": 10, "epochs": 300, "choose_seeds": 1},
    "controls": ["random_real"],
}
# with the student's momentum and few images the published rates diverge; chosen on validation
AST = {"learning_rate": 1e-3, "step_size_rate": 5e-7, "image_rate": 100}
AST_10 = AST | {"learning_rate": 3e-3, "max_start_epoch": 14}
EXPERTS = {"count": 5, "keep": "all"}
TEACHERS = [
    {"depth": d, "width": w, "norm": "batch"} for d, w in ((3, 16), (3, 32), (2, 16), (2, 32))
]
SQUEEZE = {
    "optimiser": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4, "epochs": 20,
    "batch_size": 128, "views": {"mix": "none", "flip": True},
}  # fmt: skip


def _matching(name: str, count: int, **changes: Any) -> dict[str, Any]:
    """A cell of trajectory matching; ten images a class ask for experts that know more."""
    few = {"num_iterations": 600, "max_start_epoch": 6}
    more = {"num_iterations": 400, "max_start_epoch": 20, "batch_size": 20}
    size = few if count == 1 else more
    method = {"name": name, "images_per_class": count, "num_steps": 20, **size, **changes}
    # AST's penalty moves experts of few epochs more than the images do; its scripts leave it off
    smoothing = {"penalty_weight": 0} if name == "ast" else {}
    experts = EXPERTS | {"epochs": 8 if count == 1 else 30, "smoothing": smoothing}
    return {"method": method, "experts": experts}


def _decoupled(name: str, teachers: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """A cell of the decoupled family, ten images a class."""
    method = {"name": name, "images_per_class": 10, **settings}
    return {
        "method": method,
        "teachers": teachers,
        "squeeze": SQUEEZE,
        "network": TEACHERS[0],
    }


# whole images, of few candidates: crops and a choice of the very surest leave too little variety
PATCHES = {"min_scale": 1.0, "num_candidates": 30}

CELLS: dict[str, dict[str, Any]] = {
    "mtt, 1": _matching("mtt", 1),
    "ast, 1": _matching("ast", 1, **AST),
    "mtt, 1, long": _matching("mtt", 1, num_iterations=1000),
    "ast, 1, long": _matching("ast", 1, num_iterations=1000, **AST),
    # labels of equal bytes: ten logits an image, or two distances of five views of it
    "rded, 10": _decoupled("rded", TEACHERS[:1], **PATCHES),
    "rded, views, 10": _decoupled("rded", TEACHERS[:1], labels="views", label_epochs=1, **PATCHES),
    "nrr_dd, 10": _decoupled("nrr_dd", TEACHERS[:1], label_epochs=5, least_sure=False, **PATCHES),
    # INFER's seven real images, 28 compensators and 350 labels lie between 10 and 11 images a class
    "sre2l, 11": _decoupled("sre2l", TEACHERS, iterations=300, images_per_class=11, batch_size=110),
    "infer, 10": _decoupled("infer", TEACHERS, iterations=300),
    "mtt, 10": _matching("mtt", 10),
    "ast, 10": _matching("ast", 10, **AST_10),
    "ast, 10, long": _matching("ast", 10, num_iterations=1000, **AST_10),
    "ast, 10, unbalanced": _matching("ast", 10, balanced=False, **AST_10),
    "datm, 10": _matching("datm", 10),
}
