"""The command tree. Only names, options and help live here; each body calls into a module beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    name="fedpeft",
    help="Federated fine-tuning in which only adapter deltas travel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: fedpeft simulate simulations/jobs/quickstart.toml --out runs/quickstart",
)
job_app = typer.Typer(
    help="Check a job file, or print the schema.",
    no_args_is_help=True,
    epilog="Example: fedpeft job check simulations/jobs/quickstart.toml",
)
server_app = typer.Typer(
    help="Run and administer the server daemon.", no_args_is_help=True, epilog="Example: fedpeft server init fl-server"
)
client_app = typer.Typer(
    help="Run the client agent.",
    no_args_is_help=True,
    epilog="Example: fedpeft client up --bundle hospital-a.toml --config client.toml",
)
data_app = typer.Typer(
    help="Work with local data.",
    no_args_is_help=True,
    epilog="Example: fedpeft data export simulations/jobs/quickstart.toml --out data",
)
app.add_typer(job_app, name="job")
app.add_typer(server_app, name="server")
app.add_typer(client_app, name="client")
app.add_typer(data_app, name="data")

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (TOML).", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--set", metavar="KEY=VALUE", help="Override a job key, e.g. aggregation.rounds=5. Repeatable."),
]
OperatorBundle = Annotated[
    Path,
    typer.Option(
        "--bundle",
        envvar="FEDPEFT_BUNDLE",
        help="The operator's bundle, made by `fedpeft server init` (or set FEDPEFT_BUNDLE).",
    ),
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="Run id, as printed by submit.", show_default=False)]


def _version(show: bool) -> None:
    if show:
        from fedpeft import __version__

        print(f"fedpeft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: fedpeft simulate simulations/jobs/quickstart.toml --out runs/quick --set seed=3")
def simulate(
    job: JobFile,
    out: Annotated[Path, typer.Option(help="Run folder; made if missing. An unfinished run in it is continued.")],
    set_: Set = None,
    engine: Annotated[
        str, typer.Option(help="auto | in-process | processes; the result does not depend on it.")
    ] = "auto",
    json_: Json = False,
) -> None:
    """Run a job on this machine, all clients simulated."""
    from fedpeft.cli.simulate import run_simulation

    run_simulation(job, out, set_ or [], engine, json_)


@app.command(epilog="Example: fedpeft compare runs/ffa runs/lora")
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.", show_default=False)],
    json_: Json = False,
) -> None:
    """Put the final tables of several finished runs side by side."""
    from fedpeft.cli.simulate import compare_runs

    compare_runs(directories, json_)


@job_app.command("check", epilog="Example: fedpeft job check job.toml --set adapter.rank=4")
def job_check(job: JobFile, set_: Set = None, json_: Json = False) -> None:
    """Check a job file: schema, base model, target modules; print what would travel."""
    from fedpeft.cli.job import check_job

    check_job(job, set_ or [], json_)


@job_app.command("schema", epilog="Example: fedpeft job schema > job.schema.json")
def job_schema_() -> None:
    """Print the JSON Schema of the job file."""
    from fedpeft.cli.job import print_schema

    print_schema()


@data_app.command("export", epilog="Example: fedpeft data export simulations/jobs/quickstart.toml --out data")
def data_export(
    job: JobFile,
    out: Annotated[Path, typer.Option(help="Folder; gets one sub-folder per client.")],
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Write each simulated client's data to a folder of its own, as an agent would have it."""
    from fedpeft.cli.job import export_data

    export_data(job, out, set_ or [], json_)


@server_app.command("init", epilog="Example: fedpeft server init fl-server --host fl.example.org --port 9443")
def server_init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.", show_default=False)],
    host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Name or address under which clients reach the server. Repeatable. Default: localhost."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the gRPC endpoint.")] = 9443,
    renew: Annotated[
        bool, typer.Option("--renew", help="Only renew the server's certificate in an existing folder.")
    ] = False,
) -> None:
    """Make a server folder: certificate authority, server certificate, configuration, operator bundle."""
    from fedpeft.cli.server import init

    init(directory, host or [], port, renew)


@server_app.command("up", epilog="Example: fedpeft server up fl-server")
def server_up(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.", show_default=False)],
    metrics_port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=65535, help="Serve Prometheus metrics and a status page on 127.0.0.1 at this port."),
    ] = None,
    log_json: Annotated[bool, typer.Option(help="Log as JSON lines.")] = False,
) -> None:
    """Run the daemon in the foreground until it is interrupted."""
    from fedpeft.cli.server import up

    up(directory, metrics_port, log_json)


@server_app.command("enroll", epilog="Example: fedpeft server enroll hospital-a --dir fl-server --out hospital-a.toml")
def server_enroll(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of the clients.", show_default=False)],
    directory: Annotated[Path, typer.Option("--dir", help="The server's folder.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Bundle file, for one client. Default: NAME.toml in the server's bundles folder."),
    ] = None,
    valid_days: Annotated[int, typer.Option(min=1, max=3650, help="Life of the certificate.")] = 365,
    renew: Annotated[
        bool, typer.Option("--renew", help="Replace the keys of a client that is enrolled already.")
    ] = False,
    json_: Json = False,
) -> None:
    """Enrol clients: make their keys and certificates, and write the bundles to hand over."""
    from fedpeft.cli.server import enroll

    enroll(directory, names, out, valid_days, renew, json_)


@server_app.command("revoke", epilog="Example: fedpeft server revoke hospital-a --dir fl-server")
def server_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the client.", show_default=False)],
    directory: Annotated[Path, typer.Option("--dir", help="The server's folder.")],
) -> None:
    """Revoke a client: its certificate and node key are refused from now on."""
    from fedpeft.cli.server import revoke

    revoke(directory, name)


@client_app.command("up", epilog="Example: fedpeft client up --bundle hospital-a.toml --config client.toml")
def client_up(
    bundle: Annotated[Path, typer.Option(help="The client's bundle, from the operator.")],
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="client.toml: data path and limits. Default: client.toml beside the bundle."),
    ] = None,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Data folder, or builtin:SOURCE/CLIENT; instead of client.toml's."),
    ] = None,
    log_json: Annotated[bool, typer.Option(help="Log as JSON lines.")] = False,
) -> None:
    """Run the agent in the foreground until it is interrupted."""
    from fedpeft.cli.client import up

    up(bundle, config, data, log_json)


@client_app.command("config", epilog="Example: fedpeft client config > client.toml")
def client_config() -> None:
    """Print a commented client.toml."""
    from fedpeft.cli.client import print_config

    print_config()


@app.command(epilog="Example: fedpeft submit simulations/jobs/quickstart.toml --bundle fl-server/operator.toml")
def submit(
    job: JobFile,
    bundle: OperatorBundle,
    set_: Set = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run until it ends.")] = False,
    json_: Json = False,
) -> None:
    """Hand a job to the daemon; prints the run id."""
    from fedpeft.cli.runs import submit_job

    submit_job(job, bundle, set_ or [], watch, json_)


@app.command(epilog="Example: fedpeft status runs/quickstart --json")
def status(
    run: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[RUN]", help="Run id, or a run folder. Default: every run of the server."),
    ] = None,
    bundle: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--bundle", envvar="FEDPEFT_BUNDLE", help="The operator's bundle."),
    ] = None,
    json_: Json = False,
) -> None:
    """Show a run: state, rounds, clients. Works on a run folder too."""
    from fedpeft.cli.runs import show_status

    show_status(run, bundle, json_)


@app.command(epilog="Example: fedpeft watch quickstart-1a2b3c4d")
def watch(run: RunId, bundle: OperatorBundle, json_: Json = False) -> None:
    """Follow a run until it ends."""
    from fedpeft.cli.runs import watch_run

    watch_run(run, bundle, json_)


@app.command(epilog="Example: fedpeft stop quickstart-1a2b3c4d")
def stop(run: RunId, bundle: OperatorBundle) -> None:
    """Stop a run; its committed rounds are kept."""
    from fedpeft.cli.runs import stop_run

    stop_run(run, bundle)


@app.command(epilog="Example: fedpeft resume quickstart-1a2b3c4d")
def resume(run: RunId, bundle: OperatorBundle) -> None:
    """Queue a failed or stopped run again; it goes on after its last committed round."""
    from fedpeft.cli.runs import resume_run

    resume_run(run, bundle)


@app.command(epilog="Example: fedpeft fetch quickstart-1a2b3c4d --out results")
def fetch(
    run: RunId,
    bundle: OperatorBundle,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder. Default: the run id."),
    ] = None,
) -> None:
    """Download the run folder: job, metrics, adapter, checkpoints, ledger."""
    from fedpeft.cli.runs import fetch_run

    fetch_run(run, bundle, out)


@app.command(epilog="Example: fedpeft verify runs/quickstart")
def verify(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.", show_default=False)], json_: Json = False
) -> None:
    """Check a run folder offline: the ledger's hash chain, and checkpoints, adapter and deltas against it."""
    from fedpeft.cli.runs import verify_run

    verify_run(run, json_)
