"""`dinobench ui`: the MLflow pages of an output folder, on this machine only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

HOST = "127.0.0.1"
"""There is no option for another: these pages ask nobody who they are (`mlflow server --app-name basic-auth` does)."""
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # the job runner serves MLflow's GenAI judges: eight processes that a page of metrics does not need
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
OPENINGS = frozenset(
    {
        "MLFLOW_HOST",
        "MLFLOW_SERVER_ALLOWED_HOSTS",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS",
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE",
        "MLFLOW_SERVER_X_FRAME_OPTIONS",
        "MLFLOW_GUNICORN_OPTS",
        "MLFLOW_UVICORN_OPTS",
    }
)
"""Variables that open a server to other machines and pages: meant for one that asks for passwords."""


def run_server(
    output: Annotated[Path, typer.Option(help="Folder that holds mlflow.db.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Serve the MLflow pages on 127.0.0.1 until Ctrl-C."""
    from dinobench import tracking
    from dinobench.cli.links import say_links
    from dinobench.cli.output import print_text
    from pretrain.errors import DinobenchError

    uri = tracking.tracking_uri(output)
    if tracking.is_server(uri):
        print_text(f"MLFLOW_TRACKING_URI is set, the pages are at {tracking.masked(uri)}")
        try:
            return say_links(tracking.connect(uri).links("", everything=True), uri, output, print_text)
        except tracking.TrackingUnavailable as error:
            return print_text(f"it cannot be asked for its pages now: {error}")
    file = tracking.database_file(uri)
    if file is not None and not file.is_file():
        raise DinobenchError(f"no tracking store {file}: pretrain something first, or name its folder with --output")
    refuse_taken_port(port)
    # connecting makes a missing table and gives the numbers of the experiments
    for name, page in tracking.connect(uri).links(f"http://{HOST}:{port}", everything=True).items():
        print_text(f"{name:<24}{page}")
    print_text("the server takes some seconds to start; Ctrl-C stops it")
    sys.stdout.flush()
    raise typer.Exit(serve(uri, port))


def serve(uri: str, port: int) -> int:
    """Run the server until it ends or we are told to."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    with subprocess.Popen(command, env=server_environment(uri)) as server:
        try:
            return server.wait()
        except (KeyboardInterrupt, SystemExit):
            return 0
        finally:
            server.terminate()


def server_environment(uri: str) -> dict[str, str]:
    """The environment of the server: what it serves, to this machine only, with its checks of host and origin on."""
    environment = {name: value for name, value in {**DEFAULTS, **os.environ}.items() if name not in OPENINGS}
    # not an argument: a database's password would be in the list of processes, which everybody may read
    return {**environment, "MLFLOW_BACKEND_STORE_URI": uri}


def refuse_taken_port(port: int) -> None:
    """Raise a clear error for a port in use.

    Raises:
        DinobenchError: something listens there.
    """
    from pretrain.errors import DinobenchError

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise DinobenchError(
                f"port {port} on {HOST} is in use ({error.strerror}): choose one with --port"
            ) from None
