"""The settings of `policy:` in a mix job, and the policy that they describe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from stillhouse.errors import SpecError
from stillhouse.spec import Count, Settings, Share

if TYPE_CHECKING:
    from stillhouse.mixing.decisions import Decision
    from stillhouse.mixing.policy import Policy

Positive = Annotated[float, Field(gt=0)]
Smoothing = Annotated[float, Field(gt=0.0, le=1.0)]


class RewardSettings(Settings):
    """What FLAD's policies learn from: how alike the gradients of an arm and of the target are."""

    reward: Literal["alignment", "magnitude", "aggregate"] = Field(
        default="alignment", description="alignment: the cosine, as published; sees no scale"
    )
    parameters: str = Field(
        default="output_head",
        description="gradients compared: output_head, as published, or a part of parameters' names",
    )
    target_gradient: Literal["before_step", "after_step"] = Field(
        default="before_step",
        description="before_step: same weights as the arms' and no second pass; after_step: as "
        "published",
    )
    initial_examples: Count = Field(
        default=1000, description="of each arm for the first rewards, as published"
    )


class BanditSettings(RewardSettings):
    """What EXP3 and UCB1 share."""

    sampler: Literal["faithful", "released"] = Field(
        default="faithful",
        description="faithful: the bandit's own law; released: its softmax, nearly uniform, as in "
        "the published code",
    )


class Exp3Settings(BanditSettings):
    """EXP3-FLAD: draws by exponential weights with a floor of exploration."""

    name: Literal["exp3"]
    smoothing: Smoothing = Field(
        default=1.0, description="of rewards; 1, as published, keeps only the last"
    )
    exploration_speed: Positive | None = Field(
        default=None,
        description="rounds a micro-batch counts as; default 1, the paper's formula (released "
        "sampler: 10, its code's)",
    )
    initial_pass: bool = Field(
        default=False, description="first rewards from a pass over the arms; as published: none"
    )


class Ucb1Settings(BanditSettings):
    """UCB1-FLAD: plays the arm with the highest upper confidence bound."""

    name: Literal["ucb1"]
    smoothing: Smoothing = Field(
        default=0.1, description="of rewards, which drift while the model learns; as published"
    )


class OdmSettings(Settings):
    """Online Data Mixing: the reward is the arm's training loss, no target is needed."""

    name: Literal["odm"]
    form: Literal["paper", "released", "released_single", "released_exp3"] = Field(
        default="paper", description="released: in proportion to smoothed perplexity (its 1B runs)"
    )
    smoothing: Share = Field(default=0.9, description="how much of the old estimate stays")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="steps at the arms' sizes before learning; published: 2,000"
    )


class DoReMiSettings(Settings):
    """DoReMi: weights by excess loss of a proxy over a reference model."""

    name: Literal["doremi"]
    path: str | None = Field(
        default=None,
        description="the reference model, trained on the reference weights: a folder or URI",
    )
    eta: Positive = Field(default=1.0, description="step size; 0.1 for small batches")
    smoothing: Share = Field(default=1e-3, description="share spread evenly; as published")
    size_temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="reference weights are sizes ** this; 0: uniform, as published"
    )


class StaticSettings(Settings):
    """One mixture for the whole run. Give exactly one of the three."""

    name: Literal["static"]
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="by arm, any scale; arms left out are not drawn"
    )
    size_temperature: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="sizes ** this: 1 as the data lie, 0 uniform"
    )
    alignment_temperature: Positive | None = Field(
        default=None, description="softmax of the initial alignment / this; published: 1"
    )
    parameters: str = Field(default="output_head", description="gradients compared for alignment")
    initial_examples: Count = Field(default=1000, description="of each arm for alignment")
    target_pass: bool = Field(
        default=False, description="every step also holds all of the target's training half"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "StaticSettings":
        given = [self.weights, self.size_temperature, self.alignment_temperature]
        if sum(rule is not None for rule in given) != 1:
            raise ValueError(
                "give exactly one of `weights`, `size_temperature`, `alignment_temperature`"
            )
        if self.weights is not None and not sum(self.weights.values()) > 0:
            raise ValueError("`weights` need at least one above 0")
        return self


class UniformSettings(Settings):
    """Every arm alike."""

    name: Literal["uniform"]
    target_pass: bool = Field(
        default=False, description="every step also holds all of the target's training half"
    )


class LossScalingSettings(RewardSettings):
    """Arms drawn alike, each one's loss multiplied by its smoothed reward."""

    name: Literal["loss_scaling"]
    smoothing: Smoothing = Field(default=0.1, description="of rewards")


class TargetOnlySettings(Settings):
    """No arm is drawn: the target's training half alone."""

    name: Literal["target_only"]


class ReplaySettings(Settings):
    """The decisions of an earlier run once more."""

    name: Literal["replay"]
    log: str = Field(description="URI of the folder of a run's decisions")


PolicySettings: TypeAlias = Annotated[
    Exp3Settings
    | Ucb1Settings
    | OdmSettings
    | DoReMiSettings
    | StaticSettings
    | UniformSettings
    | LossScalingSettings
    | TargetOnlySettings
    | ReplaySettings,
    Field(discriminator="name"),
]


@dataclass(frozen=True, slots=True)
class MixFacts:
    """What a policy has to know of the run.

    `sizes`: examples an arm. `initial_rewards`: measured by the initial pass, [K].
    `target_batches`: micro-batches of one target pass. `log`: decisions and arms' names,
    as from `read_decisions`.
    """

    arms: Sequence[str]
    accumulation: int
    target_batches: int = 0
    sizes: Sequence[int] = ()
    initial_rewards: Sequence[float] = ()
    log: "tuple[Sequence[Decision], Sequence[str]]" = ((), ())


def needs_initial_pass(settings: PolicySettings) -> bool:
    """Whether `make_policy` reads `initial_rewards`."""
    match settings:
        case Ucb1Settings() | LossScalingSettings():
            return True
        case Exp3Settings():
            return settings.initial_pass
        case StaticSettings():
            return settings.alignment_temperature is not None
        case _:
            return False


def make_policy(settings: PolicySettings, facts: MixFacts) -> "Policy":
    """The policy at the start of a run.

    Raises:
        SpecError: `weights` name an arm that is not there.
        InputError: as `Replay`.
    """
    from stillhouse.mixing.doremi import DoReMi
    from stillhouse.mixing.loss_scaling import LossScaling
    from stillhouse.mixing.odm import Odm
    from stillhouse.mixing.replay import Replay
    from stillhouse.mixing.static import Static, by_size
    from stillhouse.mixing.uniform import Uniform

    match settings:
        case Exp3Settings():
            return _exp3(settings, facts)
        case Ucb1Settings():
            return _ucb1(settings, facts)
        case OdmSettings():
            return Odm(
                facts.sizes,
                form=settings.form,
                smoothing=settings.smoothing,
                warmup_steps=settings.warmup_steps,
            )
        case DoReMiSettings():
            reference = by_size(facts.sizes, settings.size_temperature)
            return DoReMi(reference, eta=settings.eta, smoothing=settings.smoothing)
        case StaticSettings():
            return Static(_static_weights(settings, facts))
        case UniformSettings() | TargetOnlySettings():
            return Uniform(len(facts.arms))
        case LossScalingSettings():
            return LossScaling(facts.initial_rewards, smoothing=settings.smoothing)
        case ReplaySettings():
            return Replay(*facts.log, facts.arms)


def _exp3(settings: Exp3Settings, facts: MixFacts) -> "Policy":
    from stillhouse.mixing.exp3 import Exp3

    return Exp3(
        len(facts.arms),
        accumulation=facts.accumulation,
        smoothing=settings.smoothing,
        speed=settings.exploration_speed or (10 if settings.sampler == "released" else 1),
        sampler=settings.sampler,
        initial_rewards=facts.initial_rewards if settings.initial_pass else None,
    )


def _ucb1(settings: Ucb1Settings, facts: MixFacts) -> "Policy":
    from stillhouse.mixing.ucb1 import Ucb1

    return Ucb1(
        facts.initial_rewards,
        smoothing=settings.smoothing,
        sampler=settings.sampler,
        accumulation=facts.accumulation,
        target_batches=facts.target_batches,
    )


def _static_weights(settings: StaticSettings, facts: MixFacts) -> "Sequence[float]":
    from stillhouse.mixing.static import by_alignment, by_size

    if settings.weights is not None:
        unknown = sorted({*settings.weights} - {*facts.arms})
        if unknown:
            raise SpecError(f"`policy.weights` names arms that are not in `auxiliary`: {unknown}")
        return [settings.weights.get(arm, 0.0) for arm in facts.arms]
    if settings.size_temperature is not None:
        return by_size(facts.sizes, settings.size_temperature).tolist()
    assert settings.alignment_temperature is not None
    return by_alignment(facts.initial_rewards, settings.alignment_temperature).tolist()
