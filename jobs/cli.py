"""The command line: `stillhouse VERB ...`. Verbs are thin; heavy imports wait until one runs."""

import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

import typer

from stillhouse.errors import SpecError, StillhouseError

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
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, only that.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _guarded(action: Callable[[], int | None], as_json: bool, debug: bool) -> None:
    """Run a verb: errors become a line or two on stderr and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = action() or 0
    except StillhouseError as error:
        _complain(error, str(error), as_json, debug)
        code = error.exit_code
    except (KeyboardInterrupt, SystemExit):  # Ray makes a SystemExit of SIGTERM
        typer.secho("stopped; run the same command again to go on", fg="yellow", err=True)
        code = 4
    except Exception as error:
        if debug:
            raise
        from stillhouse.jobs.run import failure_text

        hint = "run again with --debug for the traceback"
        _complain(error, f"{failure_text(error)} ({hint})", as_json, debug)
        code = 1
    raise typer.Exit(code)


def _complain(error: Exception, message: str, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    typer.secho(f"error: {message}", fg="red", err=True)
    if as_json:
        print(json.dumps({"status": "error", "error": message}))


def _print(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=1))


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
        _print(result) if as_json else show_result(result)

    _guarded(action, as_json, debug)


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
        _print(planned) if as_json else show_plan(planned)

    _guarded(action, as_json, debug)


@app.command()
def status(
    uri: Annotated[
        str, typer.Argument(help="A run, a store, STORE#NAME, or a submitted job's id.")
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show a run's steps as they change, to its end.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="For a job: the cluster's dashboard.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="For a job: its store, when the cluster is gone.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show how far a run is, what a store holds, or a published name's history. Needs no cluster.

    A submitted job is looked up in its cluster while that is there, and in its store.

    Example: `stillhouse status ./store`
    """

    def action() -> None:
        from stillhouse.jobs.status import status_of
        from stillhouse.jobs.summary import show_status

        if re.fullmatch(r"[0-9a-f]{64}-\d+", uri):
            from stillhouse.jobs.job_status import job_status
            from stillhouse.jobs.summary import show_job

            known = job_status(uri, address, store)
            if follow:
                if known["run"] is None:
                    say = f"job {uri} has no run yet: follow it with `submit SPEC --follow`"
                    raise SpecError(say)
                _follow(known["run"]["uri"], quiet=as_json)
                known = job_status(uri, address, store)
            _print(known) if as_json else show_job(known)
            return
        if follow:
            _follow(uri, quiet=as_json)
        found = status_of(uri)
        _print(found) if as_json else show_status(found)

    _guarded(action, as_json, debug)


def _follow(uri: str, quiet: bool) -> None:
    """Show changes until the run ends or Ctrl-C; the run itself is not touched."""
    from stillhouse.jobs.status import follow
    from stillhouse.jobs.summary import show_changes

    with suppress(KeyboardInterrupt):
        for found, changed in follow(uri):
            if not quiet:
                show_changes(found, changed)


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
            _print(found)
        return code

    _guarded(action, as_json, debug)


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
        _print({"kind": kind, "text": text}) if as_json else print(text, end="")

    _guarded(action, as_json, debug)


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
        _print(found) if as_json else show_published(found)

    _guarded(action, as_json, debug)


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
        _print(found) if as_json else show_pruned(found)

    _guarded(action, as_json, debug)


@app.command()
def report(
    uri: Annotated[str, typer.Argument(help="A run.", metavar="RUN")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw a finished run's report again; prints where the page is.

    Example: `stillhouse report store/runs/0123abc...`
    """

    def action() -> None:
        from stillhouse.jobs.status import draw_report

        page = draw_report(uri)
        _print({"report": page}) if as_json else print(page)

    _guarded(action, as_json, debug)


@app.command()
def verify(
    uri: Annotated[
        str,
        typer.Argument(
            help="A run, a selection, a model or a distilled set.", metavar="RUN_OR_ARTIFACT"
        ),
    ],
    sample: Annotated[int, typer.Option(min=0, help="Scores to recompute with the models.")] = 64,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check sha256 of every part, recompute a sample of scores and the fate of every row.

    Example: `stillhouse verify store/runs/0123abc... --sample 256`
    """

    def action() -> int:
        from stillhouse.jobs.summary import show_verification
        from stillhouse.jobs.verify import verify as check

        found = check(uri, sample)
        _print(found) if as_json else show_verification(found)
        return 3 if found["problems"] else 0

    _guarded(action, as_json, debug)


def main() -> None:
    """Entry point of the `stillhouse` command."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    app()
