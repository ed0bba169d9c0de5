"""The command line, `stillhouse VERB ...`. Heavy modules are imported by the verb that runs."""

import os
import shlex
import sys
from typing import Annotated, Any, Literal

import typer

from stillhouse import __version__
from stillhouse.jobs import process, store_verbs
from stillhouse.jobs.process import AsJson, VerbOutput, verb
from stillhouse.jobs.store_verbs import InStore

app = typer.Typer(
    name="stillhouse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Select training data at cluster scale, and train on what was kept.

A job is one YAML file:

    stillhouse plan SPEC                # what is done, what is to do

    stillhouse run SPEC                 # do it; again: nothing to do

    stillhouse run SPEC --set selection.tau=16

    stillhouse submit SPEC --address URL --follow   # the same on a cluster

    stillhouse schedule SPEC --cron "0 3 * * *" --kind raycronjob

    stillhouse status ./store           # how far its runs are

    stillhouse verify ./store/runs/...  # every byte, a sample of scores

    stillhouse publish NAME --to 3      # a published name back to its version 3

Exit codes: 0 done (also: nothing to do), 2 bad spec or usage, 3 bad input data,
4 stopped but resumable (run the same command again), 1 anything else.
""",
)

Kind = Literal["raycronjob", "cronjob", "crontab"]
Spec = Annotated[str, typer.Argument(help="A YAML file (path or URI).", metavar="SPEC")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override one key; VALUE is read as YAML."),
]


def _load(spec: str, sets: list[str] | None) -> Any:
    from stillhouse.jobs.spec_file import load_spec

    return load_spec(spec, sets or [])


def _version(requested: bool) -> None:
    if requested:
        print(f"stillhouse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command()
@verb
def run(spec: Spec, sets: Sets = None, as_json: AsJson = False) -> VerbOutput:
    """Run a job; go on where an earlier run of the same spec stopped.

    Example: `stillhouse run examples/select.yaml --set selection.tau=16`
    """
    from stillhouse.jobs.chain import run_spec
    from stillhouse.jobs.progress import listener
    from stillhouse.jobs.run import SUBMISSION_VARIABLE
    from stillhouse.jobs.summary import show_result
    from stillhouse.jobs.webhook import told_of

    if SUBMISSION_VARIABLE in os.environ:
        from stillhouse.jobs.submit import warn_of_versions

        warn_of_versions()
    loaded = _load(spec, sets)
    process.tell_parent(told=told_of(loaded))
    shown = listener(quiet=as_json)
    try:
        return VerbOutput(run_spec(loaded, shown), show_result)
    finally:
        shown.close()


@app.command()
@verb
def plan(spec: Spec, sets: Sets = None) -> VerbOutput:
    """Show every step: reused or to do, with tokens, FLOPs and estimated seconds. Spends nothing.

    Example: `stillhouse plan examples/select.yaml`
    """
    from stillhouse.jobs.chain_plan import plan_spec
    from stillhouse.jobs.summary import show_plan

    return VerbOutput(plan_spec(_load(spec, sets)), show_plan)


@app.command()
@verb
def status(
    uri: Annotated[
        str, typer.Argument(help="A run, a store, STORE#NAME, or the id of a run or submitted job.")
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show a run's steps as they change, to its end.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="For a job: the cluster's dashboard.")
    ] = None,
    store: InStore = None,
    as_json: AsJson = False,
) -> VerbOutput:
    """Show how far a run is, what a store holds, or a published name's history. Needs no cluster.

    A submitted job is looked up in its cluster while that is there, and in its store.

    Example: `stillhouse status ./store`
    """
    from stillhouse.jobs.status import find, job_status, run_to_follow, show_to_end, status_of
    from stillhouse.jobs.summary import show_changes, show_job, show_status

    job, place = find(uri, address, store)
    if follow:
        followed = run_to_follow(job_status(job, address, store)) if job else place
        show_to_end(followed, None if as_json else show_changes)
    if job is not None:
        return VerbOutput(job_status(job, address, store), show_job)
    return VerbOutput(status_of(place), show_status)


@app.command()
@verb
def submit(
    spec: Spec,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Its dashboard; default RAY_API_SERVER_ADDRESS."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the output, end with the job's exit code.")
    ] = False,
    sets: Sets = None,
    as_json: AsJson = False,
) -> VerbOutput:
    """Run a job on a Ray cluster. Again: attach to it, or start the next attempt if it ended.

    The token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or `~/.ray/auth_token`.

    Example: `stillhouse submit books.yaml --address http://127.0.0.1:8265 --follow`
    """
    from stillhouse.jobs.submit import run_submit

    again = ["stillhouse", "submit", spec, *(word for s in sets or [] for word in ("--set", s))]
    again += ["--address", address] if address else []
    command = shlex.join([*again, "--follow"])
    result, code = run_submit(
        _load(spec, sets), address, follow=follow, command=command, quiet=as_json
    )

    def show(result: dict[str, Any]) -> None:
        if not follow:
            print(result["job_id"])

    return VerbOutput(result, show, code)


@app.command()
@verb
def schedule(
    spec: Spec,
    cron: Annotated[str, typer.Option(help="Five fields, or @daily.")],
    kind: Annotated[
        Kind,
        typer.Option(
            help="raycronjob: a cluster for each run (KubeRay 1.6 or newer); cronjob: submits to "
            "a running cluster; crontab: a line for this machine."
        ),
    ],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Dashboard of a running cluster.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="For Kubernetes: see Dockerfile.")] = None,
    service_account: Annotated[
        str | None, typer.Option(help="For Kubernetes: whose access to the store the pods have.")
    ] = None,
    time_zone: Annotated[
        str | None,
        typer.Option(
            metavar="ZONE",
            help="Of the cron line, such as Europe/Berlin. Default: UTC of a cronjob, the "
            "operator's of a raycronjob (KubeRay 1.6 knows no other).",
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="YAML merged into the manifests: tolerations, secrets, sizes under pod, head, "
            "cpu, gpu, job; see deploy/kubernetes/merge.yaml.",
        ),
    ] = None,
    sets: Sets = None,
) -> VerbOutput:
    """Print what makes a spec run by the clock: manifests for Kubernetes, or a crontab line.

    Example: `stillhouse schedule books.yaml --cron "0 3 * * *" --kind raycronjob
    --image REGISTRY/stillhouse:1 | kubectl apply -f -`
    """
    from stillhouse.jobs.schedule import Place
    from stillhouse.jobs.schedule import schedule as make

    place = Place(address, image, service_account, time_zone, merge)
    text = make(spec, _load(spec, sets), sets or [], cron, kind, place)
    return VerbOutput({"kind": kind, "text": text}, lambda result: print(result["text"], end=""))


@app.command()
@verb
def schema(
    job: Annotated[
        str | None, typer.Argument(help="select, train, ...; default: all.", metavar="JOB")
    ] = None,
) -> VerbOutput:
    """Print the JSON Schema of specs: editors complete and check YAML with it.

    Example: `stillhouse schema > stillhouse.schema.json`
    """
    import json

    from stillhouse.jobs.schema import schema as make

    return VerbOutput(make(job), lambda result: print(json.dumps(result, indent=1)))


for store_verb in store_verbs.VERBS:
    app.command()(store_verb)


def main() -> None:
    """Entry point of the `stillhouse` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.argv[1:2] == ["run"] and not process.is_supervised():
        process.supervise()
    try:
        app()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        process.tell_parent(ended=code)
        raise


if __name__ == "__main__":
    main()
