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
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    # The job runner serves MLflow's GenAI judges: eight processes that a page of metrics does not need.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = {**settings, **os.environ}
    with subprocess.Popen(command, env=environment) as server:
        try:
            return server.wait()
        except (KeyboardInterrupt, SystemExit):
            return 0
        finally:
            server.terminate()


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
