"""Where MLflow is: the address of a store, whether it answers, and its pages worth opening.

MLflow's pages open in its GenAI view unless the link ends with `workflowType=machine_learning`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pretrain.errors import DinobenchError

SHORTEST_SECRET = 4
"""Characters of a password that is hidden wherever it stands; a shorter one only in an address."""
VIEW = "workflowType=machine_learning"


class TrackingUnavailable(DinobenchError):
    """MLflow is not installed, or its store cannot be reached."""


def tracking_uri(output: Path) -> str:
    """MLFLOW_TRACKING_URI, or <output>/mlflow.db, absolute: MLflow's own default depends on the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(output / 'mlflow.db').absolute()}"


def masked(text: str) -> str:
    """Text with the passwords of its URLs hidden, and with those that the environment holds."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    text = re.sub(r"(://[^/\s:@]*):[^\s'\"]+@", r"\1:***@", text)
    text = re.sub(r"://[^/\s:@'\"]+@", "://***@", text)  # a token in place of name and password
    return re.sub(r"([?&](?:\w*password|passwd|pwd|\w*token|\w*secret|\w*key)=)[^&\s'\"#]+", r"\1***", text, flags=re.I)


def _secrets() -> list[str]:
    """Passwords and tokens for MLflow, as they are written in an address and as they are meant; the longest first."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    user_info = re.search(r"://([^/\s:@]*)(?::(\S+))?@", address)
    found = {os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("PASSWORD", "TOKEN")}
    if user_info is not None:
        found.add(user_info[2] if user_info[2] is not None else user_info[1])
    found |= {urllib.parse.unquote(secret) for secret in found}
    # of shorter ones the text would be full, and hiding them would tell them
    return sorted((secret for secret in found if len(secret) >= SHORTEST_SECRET), key=len, reverse=True)


def without_credentials(uri: str) -> str:
    """The address of a server as it goes into a link: without name and password, without the last slash."""
    return re.sub(r"://[^/@]*@", "://", uri).rstrip("/")


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def database_file(uri: str) -> Path | None:
    """The file of a sqlite store, or None."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def lock_file(uri: str) -> Path:
    """What the processes of this machine lock: beside a database; of a server, a file of the user's own."""
    if file := database_file(uri):
        return file.with_name(f"{file.name}.lock")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    digest = hashlib.sha256(without_credentials(uri).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"dinobench-mlflow-{user}-{digest}.lock"


def probe(uri: str, timeout: float = 3.0) -> None:
    """Ask a server whether it is there, before a call of the client could wait for it.

    Raises:
        TrackingUnavailable: it is not, or the store cannot be used.
    """
    if not is_server(uri):
        return
    try:
        urllib.request.urlopen(f"{without_credentials(uri)}/health", timeout=timeout).close()
    except urllib.error.HTTPError as error:
        error.close()  # it answers; whether it lets us in is seen at the first call
    except (http.client.InvalidURL, ValueError) as error:  # whose text may hold a part of the password
        raise TrackingUnavailable(
            f"{masked(uri)} is not the address of a server: characters like @ : / in a password are written as %40 %3A "
            "%2F, or give it in MLFLOW_TRACKING_PASSWORD"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise TrackingUnavailable(masked(f"the MLflow server {uri} does not answer ({error})")) from error


def give_home() -> None:
    """MLflow cannot be imported by a user without a home, as in a container: a temporary one will do."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()


def charts_page(base: str, experiment: str) -> str:
    """Bars and curves of the runs of an experiment."""
    return f"{base}/#/experiments/{experiment}/runs?compareRunsMode=CHART&{VIEW}"


def models_page(base: str, experiment: str) -> str:
    """The model table, with metrics by data set as columns."""
    return f"{base}/#/experiments/{experiment}/models?{VIEW}"


def runs_page(base: str, experiment: str) -> str:
    return f"{base}/#/experiments/{experiment}/runs?{VIEW}"


def run_page(base: str, experiment: str, run_id: str) -> str:
    return f"{base}/#/experiments/{experiment}/runs/{run_id}?{VIEW}"


@contextlib.contextmanager
def as_unavailable(uri: str) -> Iterator[None]:
    """Whatever goes wrong inside MLflow (its exceptions, those of requests, sqlalchemy, alembic) is one case to us."""
    try:
        yield
    except TrackingUnavailable:
        raise
    except Exception as error:
        reason = masked(" ".join(str(error).split()))[:300]
        raise TrackingUnavailable(f"MLflow store {masked(uri)}: {reason}") from error
