"""The command line: `stillhouse VERB ...`. Verbs are thin; heavy imports wait until one runs."""

import shlex
import sys
from typing import Annotated, Literal

import typer

from stillhouse import __version__
from stillhouse.jobs import supervised
from stillhouse.jobs.guarded import guarded, print_json

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
Store = Annotated[
    str | None, typer.Option(help="Where an id is looked up; default ./store.", metavar="URI")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, only that.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"stillhouse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def run(spec: Spec, sets: Sets = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Run a job; go on where an earlier run of the same spec stopped.

    Example: `stillhouse run examples/select.yaml --set selection.tau=16`
    """

    def action() -> None:
        from stillhouse.jobs.progress import listener
        from stillhouse.jobs.run import run_job
        from stillhouse.jobs.spec_file import load_spec
        from stillhouse.jobs.summary import show_result

        loaded = load_spec(spec, sets or [])
        shown = listener(quiet=as_json)
        try:
            result = run_job(loaded, shown)
        finally:
            shown.close()
        print_json(result) if as_json else show_result(result)

    guarded(action, as_json, debug)


@app.command()
def plan(spec: Spec, sets: Sets = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show every step: reused or to do, with tokens, FLOPs and estimated seconds. Spends nothing.

    Example: `stillhouse plan examples/select.yaml`
    """

    def action() -> None:
        from stillhouse.jobs.plan import plan_job
        from stillhouse.jobs.spec_file import load_spec
        from stillhouse.jobs.summary import show_plan

        planned = plan_job(load_spec(spec, sets or []))
        print_json(planned) if as_json else show_plan(planned)

    guarded(action, as_json, debug)


@app.command()
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
    store: Store = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show how far a run is, what a store holds, or a published name's history. Needs no cluster.

    A submitted job is looked up in its cluster while that is there, and in its store.

    Example: `stillhouse status ./store`
    """

    def action() -> None:
        from stillhouse.jobs.job_status import find, job_status, run_to_follow
        from stillhouse.jobs.status import show_to_end, status_of
        from stillhouse.jobs.summary import show_changes, show_job, show_status

        job, place = find(uri, address, store)
        if follow:
            followed = run_to_follow(job_status(job, address, store)) if job else place
            show_to_end(followed, None if as_json else show_changes)
        if job is not None:
            found, show = job_status(job, address, store), show_job
        else:
            found, show = status_of(place), show_status
        print_json(found) if as_json else show(found)

    guarded(action, as_json, debug)


@app.command()
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
    debug: Debug = False,
) -> None:
    """Run a job on a Ray cluster. Again: attach to it, or start the next attempt if it ended.

    The token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or `~/.ray/auth_token`.

    Example: `stillhouse submit books.yaml --address http://127.0.0.1:8265 --follow`
    """

    def action() -> int:
        from stillhouse.jobs.spec_file import load_spec
        from stillhouse.jobs.submit import run_submit

        again = ["stillhouse", "submit", spec, *(w for s in sets or [] for w in ("--set", s))]
        again += ["--address", address] if address else []
        command = shlex.join([*again, "--follow"])
        loaded = load_spec(spec, sets or [])
        found, code = run_submit(loaded, address, follow=follow, command=command, quiet=as_json)
        if as_json:
            print_json(found)
        elif not follow:
            print(found["job_id"])
        return code

    guarded(action, as_json, debug)


@app.command()
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print what makes a spec run by the clock: manifests for Kubernetes, or a crontab line.

    Example: `stillhouse schedule books.yaml --cron "0 3 * * *" --kind raycronjob
    --image REGISTRY/stillhouse:1 | kubectl apply -f -`
    """

    def action() -> None:
        from stillhouse.jobs.schedule import Place
        from stillhouse.jobs.schedule import schedule as make
        from stillhouse.jobs.spec_file import load_spec

        place = Place(address, image, service_account, time_zone, merge)
        text = make(spec, load_spec(spec, sets or []), sets or [], cron, kind, place)
        print_json({"kind": kind, "text": text}) if as_json else print(text, end="")

    guarded(action, as_json, debug)


@app.command()
def publish(
    name: Annotated[str, typer.Argument(help="A name, or STORE#NAME.", metavar="NAME")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="A number of its history, or a run or selection of the store; "
            "default: what a run published last.",
        ),
    ] = None,
    store: Annotated[str, typer.Option(help="The store that the name is in.")] = "./store",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let a published name stand for another version, under a new number.

    After a roll-back the name stays where it is until a run of its spec makes something new.

    Example: `stillhouse publish books-daily --to 3 --store s3://bucket/prefix`
    """

    def action() -> None:
        from stillhouse.jobs.publish import publish_by_hand
        from stillhouse.jobs.summary import show_published

        found = publish_by_hand(name, to, store)
        print_json(found) if as_json else show_published(found)

    guarded(action, as_json, debug)


@app.command()
def prune(
    uri: Annotated[str, typer.Argument(help="A store.", metavar="STORE")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only look.")] = False,
    grace_hours: Annotated[
        float, typer.Option(help="Remove nothing younger; a run silent for longer is dead.", min=0)
    ] = 24.0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove what no finished run, pin or published name refers to. Only looks unless `--yes`.

    To let go of what a run made, remove its folder in `runs/` first.

    Example: `stillhouse prune ./store --yes`
    """

    def action() -> None:
        from stillhouse.jobs.prune import prune_store
        from stillhouse.jobs.summary import show_pruned

        found = prune_store(uri, grace_hours=grace_hours, yes=yes)
        print_json(found) if as_json else show_pruned(found)

    guarded(action, as_json, debug)


@app.command()
def report(
    uri: Annotated[str, typer.Argument(help="A run, or its id.", metavar="RUN")],
    store: Store = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw a finished run's report again; prints where the page is.

    Example: `stillhouse report store/runs/0123abc...`
    """

    def action() -> None:
        from stillhouse.jobs.ids import resolve
        from stillhouse.jobs.status import draw_report

        page = draw_report(resolve(uri, store, ["runs"]))
        print_json({"report": page}) if as_json else print(page)

    guarded(action, as_json, debug)


@app.command()
def verify(
    uri: Annotated[
        str,
        typer.Argument(
            help="A run, an artifact (selection, model, ...), STORE#NAME, a store, or an id.",
            metavar="RUN_OR_STORE",
        ),
    ],
    sample: Annotated[int, typer.Option(min=0, help="Scores to recompute with the models.")] = 64,
    store: Store = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check every byte that a result rests on, or that a store holds; reads all of it.

    Of a selection also a sample of the scores, recomputed, and the fate of every row.

    Example: `stillhouse verify store/runs/0123abc... --sample 256`
    """

    def action() -> int:
        from stillhouse.jobs.ids import ARTIFACTS, resolve
        from stillhouse.jobs.summary import show_verification
        from stillhouse.jobs.verify import verify as check

        found = check(resolve(uri, store, ARTIFACTS), sample)
        print_json(found) if as_json else show_verification(found)
        return 3 if found["problems"] else 0

    guarded(action, as_json, debug)


def main() -> None:
    """Entry point of the `stillhouse` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.argv[1:2] == ["run"] and not supervised.is_child():
        supervised.supervise()
    try:
        app()
    except SystemExit as stop:
        supervised.tell(ended=stop.code if isinstance(stop.code, int) else int(bool(stop.code)))
        raise
