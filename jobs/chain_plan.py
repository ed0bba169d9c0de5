"""`stillhouse plan` of a chain: what is finished, and what the rest would cost.

A step whose inputs are there is planned as any job is. Of one that waits for another, tokens and
FLOPs follow from its settings and from what that other step is expected to make.
"""

from collections.abc import Collection, Mapping
from typing import Any

from stillhouse.classification.spec import ClassifierObjective, ClassifySpec
from stillhouse.data_settings import TokenizerSettings, TokenizerTraining
from stillhouse.distillation.spec import DistillSpec
from stillhouse.jobs.chain import Chain
from stillhouse.jobs.chain_spec import AnySpec, ChainSpec
from stillhouse.jobs.kinds import Estimate, Spec, cost_row, planned_price, speeds_of
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.sweep import Sweep
from stillhouse.jobs.sweep_record import Budget, Decisions
from stillhouse.jobs.sweep_spec import SweepSpec
from stillhouse.mixing.flad import Ucb1
from stillhouse.mixing.spec import MixSpec
from stillhouse.models.network_settings import GivenClassifier, NetworkSettings
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.train_data import TEXT_LENGTH
from stillhouse.report.formatting import number_of
from stillhouse.spec import ConditionalSettings, ModelSettings, PriorSettings, SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import absolute_uri, use_options
from stillhouse.storage.run_record import read_json
from stillhouse.training.spec import TrainSpec


def plan_spec(spec: AnySpec) -> dict[str, Any]:
    """What `run` would do with a spec, without doing it; see `plan_job`.

    Where the spec has `prices`: `price`, with `compute` in workers.
    """
    planned = _plan(spec)
    if spec.prices is None:
        return planned
    speeds = speeds_of(Store(absolute_uri(spec.store)))
    compute, unknown = planned_price(planned["steps"], speeds, spec)
    note = f"about {compute:,.2f} at the spec's prices"
    if unknown:
        note += f", and {number_of(len(unknown), 'step')} of unknown time: {', '.join(unknown[:5])}"
    return planned | {"price": {"compute": compute}, "notes": [*planned["notes"], note]}


def _plan(spec: AnySpec) -> dict[str, Any]:
    if isinstance(spec, SweepSpec):
        return _plan_sweep(spec)
    return _plan_chain(spec) if isinstance(spec, ChainSpec) else plan_job(spec)


def _plan_sweep(spec: SweepSpec) -> dict[str, Any]:
    """Every variant as if it were alone; of an optuna search one, as often as it may run."""
    sweep = Sweep(spec)
    use_options(spec.store, spec.storage_options)
    variants = sweep.variants or {"each": spec.sweep.drawn([0.0] * len(spec.sweep.over))}
    run = Store(absolute_uri(spec.store)).path("runs", sweep.name)
    decisions = Decisions(run)
    budget = Budget(spec.sweep.max_flops, decisions)
    checked = {name: sweep.checked(values) for name, values in variants.items()}
    planned = {name: plan_job(one) for name, one in checked.items() if budget.pays(one)}
    ended = {*decisions.stopped}
    todo = [
        name
        for name, one in planned.items()
        if one["status"] == "to_do" and one["run"].rsplit("/", 1)[-1] not in ended
    ]
    finished, count = len(planned) - len(todo), number_of(len(planned), "variant")
    notes = [f"finished: {finished} of {count}; steps that variants share are done once"]
    if len(planned) < len(variants):
        left_out = len(variants) - len(planned)
        of = number_of(len(variants), "variant")
        notes.append(f"`sweep.max_flops` leaves out {left_out} of {of}")
    if sweep.search == "optuna" or spec.sweep.mixture is not None:
        notes = [f"one of {spec.sweep.max_runs} variants, which are chosen as the sweep goes on"]
    return {
        "status": "to_do" if todo or read_json(run, "result.json") is None else "nothing_to_do",
        "job": "sweep",
        "run": run,
        "steps": {
            f"{name}: {step}": row
            for name, one in planned.items()
            for step, row in one["steps"].items()
        },
        "notes": notes,
    }


def _plan_chain(spec: ChainSpec) -> dict[str, Any]:
    use_options(spec.store, spec.storage_options)
    chain, store = Chain(spec), Store(absolute_uri(spec.store))
    runs: dict[str, str] = {}
    steps: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for name in chain.order:
        waits = [one for one in chain.needs[name] if one not in runs]
        if waits:
            rows = _priced(spec, name, chain, steps)
            notes.append(f"{name}: estimated, as it waits for {', '.join(waits)}")
        else:
            planned = _plan(spec.step(name, runs))
            rows = planned["steps"]
            if planned["status"] == "nothing_to_do":
                runs[name] = planned["run"]
            notes += [f"{name}: {note}" for note in planned["notes"]]
        steps |= {f"{name}: {step}": row for step, row in rows.items()}
    return {
        "status": "nothing_to_do" if len(runs) == len(chain.order) else "to_do",
        "job": "chain",
        "run": store.path("runs", chain.name),
        "steps": steps,
        "notes": notes,
    }


def _priced(
    spec: ChainSpec, name: str, chain: Chain, planned: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The rows of a step that waits for others, by the name of its step."""
    step: Any = spec.step(name, {})
    if isinstance(step, SelectSpec) and step.pool.from_ not in spec.steps:
        parts = [part for part in ("prior", "conditional", "tokenizer") if _from(step, part)]
        given = {part if part == "tokenizer" else f"train {part}" for part in parts}
        return _without(given, plan_job(_with_fresh_models(spec, step)))
    if isinstance(step, MixSpec):
        return _without({"tokenizer"}, plan_job(_mix_of_fresh_models(spec, step)))
    if isinstance(step, ClassifySpec):
        return plan_job(_untaught(spec, step))["steps"]
    if isinstance(step, DistillSpec):
        given = set[str]() if step.trained_teachers else {"teachers"}
        return _without(given, plan_job(_with_fresh_teachers(spec, step)))
    if not isinstance(step, TrainSpec):
        return {
            step.job: cost_row(step.job, None, Estimate(0), speeds_of(_store(spec)), step.compute)
        }
    made = [
        planned[f"{one}: selection"]["tokens"]
        for one in chain.needs[name]
        if f"{one}: selection" in planned
    ]
    tokens = step.train.num_tokens or sum(made)
    length = step.sequence_length or TEXT_LENGTH
    origin = step.init.from_ if step.init is not None else None
    model = _model_of(spec, origin) if origin else step.model
    flops = planned_shape(model, _vocabulary(spec, chain, name), length).flops_per_token(length)
    estimates = {"train": Estimate(tokens, flops_per_token=flops)}
    teachers = len(step.train.objective.teachers)
    if teachers and step.train.objective.signals == "stored":
        scored = Estimate(teachers * sum(made), flops_per_token=None)
        estimates = {"teacher signals": scored} | estimates
    speeds = speeds_of(_store(spec))
    return {
        step_name: cost_row(step_name, None, estimate, speeds, step.compute)
        for step_name, estimate in estimates.items()
    }


def _without(given: Collection[str], planned: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a plan but those of steps whose results are given."""
    return {name: row for name, row in planned["steps"].items() if name not in given}


def _store(spec: ChainSpec) -> Store:
    return Store(absolute_uri(spec.store))


def _from(step: SelectSpec, part: str) -> str | None:
    return getattr(step, part).from_


def _with_fresh_models(spec: ChainSpec, step: SelectSpec) -> Spec:
    """The step with models of the same sizes in place of those that other steps make."""
    changes: dict[str, Any] = {}
    if step.prior.from_ in spec.steps:
        model = _model_of(spec, step.prior.from_)
        changes["prior"] = PriorSettings.model_validate({"model": model.model_dump()})
    if step.conditional.from_ in spec.steps:
        changes["conditional"] = ConditionalSettings()
    if step.tokenizer.from_ in spec.steps:
        changes["tokenizer"] = TokenizerSettings(train=TokenizerTraining())
    return step.model_copy(update=changes)


def _mix_of_fresh_models(spec: ChainSpec, step: MixSpec) -> Spec:
    """The same of a mixture, whose policy is UCB1 if it waits for another run's."""
    changes: dict[str, Any] = {}
    if step.model.from_ in spec.steps:
        sizes = _model_of(spec, step.model.from_).model_dump()
        changes["model"] = step.model.model_copy(update={"from_": None, **sizes})
    if step.tokenizer.from_ in spec.steps:
        changes["tokenizer"] = TokenizerSettings(train=TokenizerTraining())
    if getattr(step.policy, "from_", None) in spec.steps:
        changes["policy"] = Ucb1(name="ucb1")
    return step.model_copy(update=changes)


def _untaught(spec: ChainSpec, step: ClassifySpec) -> Spec:
    """The same of a classifier, trained on labels alone."""
    learning = step.train.model_copy(update={"objective": ClassifierObjective()})
    origin = None if step.init is None else step.init.from_
    changes: dict[str, Any] = {"train": learning}
    if origin in spec.steps:
        changes |= {"init": None, "network": _network_of(spec, origin)}
    return step.model_copy(update=changes)


def _with_fresh_teachers(spec: ChainSpec, step: DistillSpec) -> Spec:
    """The same of a distillation, whose teachers it would train itself."""
    teachers = [
        _network_of(spec, one.from_)
        if isinstance(one, GivenClassifier) and one.from_ in spec.steps
        else one
        for one in step.teachers or []
    ]
    return step.model_copy(update={"teachers": teachers or None})


def _network_of(spec: ChainSpec, name: str | None) -> NetworkSettings:
    """The network that a step trains, or continues from."""
    step: Any = spec.steps.get(name or "")
    if not isinstance(step, ClassifySpec):
        return NetworkSettings()
    if step.init is not None and step.init.from_ in spec.steps:
        return _network_of(spec, step.init.from_)
    return step.network


def _model_of(spec: ChainSpec, name: str | None) -> ModelSettings:
    """The sizes of the model that a step trains, or continues from."""
    step: Any = spec.steps.get(name or "")
    if isinstance(step, TrainSpec):
        if step.init is not None and step.init.from_ in spec.steps:
            return _model_of(spec, step.init.from_)
        return step.model
    if isinstance(step, SelectSpec):
        return step.prior.model or ModelSettings()
    return ModelSettings()


def _vocabulary(spec: ChainSpec, chain: Chain, name: str) -> int:
    """Tokens of the tokenizer that a step, or one that it needs, trains."""
    for one in (name, *chain.needs[name]):
        tokenizer = getattr(spec.steps[one], "tokenizer", None)
        if tokenizer is not None and tokenizer.train is not None:
            return tokenizer.train.vocab_size
        if one != name and chain.needs[one]:
            return _vocabulary(spec, chain, one)
    return TokenizerTraining().vocab_size
