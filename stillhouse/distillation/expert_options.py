"""From the settings of experts to how each is trained, and which of its epochs are kept."""

from stillhouse.distillation.experts import AST_EXPERT, FTD_EXPERT, ExpertOptions
from stillhouse.distillation.methods import ExpertSettings, TrajectoryMethod
from stillhouse.distillation.settings import Group

_KINDS = {"mtt": "plain", "tesla": "plain", "ftd": "flat", "datm": "flat", "ast": "smooth"}
_OPTIONS = {"plain": ExpertOptions(), "flat": FTD_EXPERT, "smooth": AST_EXPERT}


def expert_options(
    settings: ExpertSettings, method: str, groups: tuple[Group, ...]
) -> ExpertOptions:
    """The method's own experts, with what the settings change."""
    smoothing = settings.smoothing
    kind = _KINDS[method] if smoothing.kind == "auto" else smoothing.kind
    own = _OPTIONS[kind]
    half = settings.epochs // 2 + 1 if own.drop_epoch is not None else None

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return ExpertOptions(
        num_epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=given(settings.learning_rate, own.learning_rate),
        momentum=given(settings.momentum, own.momentum),
        weight_decay=given(settings.weight_decay, own.weight_decay),
        drop_epoch=settings.drop_epoch or half,
        drop_factor=given(settings.drop_factor, own.drop_factor),
        augmentation=groups,
        ramp_epochs=own.ramp_epochs if smoothing.ramp_epochs is None else smoothing.ramp_epochs,
        penalty_weight=given(smoothing.penalty_weight, own.penalty_weight),
        rho=smoothing.rho or own.rho,
        alpha=smoothing.alpha,
    )


def kept_epochs(settings: ExpertSettings, method: TrajectoryMethod) -> tuple[int, ...]:
    """The epochs that matching reads, and the last where images or labels are chosen by it."""
    if settings.keep == "all":
        return tuple(range(settings.epochs + 1))
    end = method.window_end(settings.epochs) - 1 + method.expert_epochs
    kept = set(range(method.min_start_epoch, end + 1))
    if method.start_from != "random_real" or method.soft_labels:
        kept.add(settings.epochs)
    return tuple(sorted(kept))
