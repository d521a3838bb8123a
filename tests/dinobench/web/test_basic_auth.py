"""A server that asks for a name and a password: in the environment or in the address, and never on the screen."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PASSWORD = "correct horse: b@ttery/staple"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, serving: Callable[..., Any]) -> Iterator[str]:
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth] (dependency group dev)")
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = curator\n"
        f"admin_password = {PASSWORD}\ndatabase_uri = sqlite:///{folder / 'users.db'}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    secrets = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for a test"}
    with serving(folder, "--app-name", "basic-auth", **secrets) as server:
        yield server


def test_name_and_password_are_taken_from_the_environment_or_the_address_and_shown_nowhere(
    guarded: str, measurer: Any, dinobench: Callable[..., tuple[int, str]]
) -> None:
    run = measurer.run("dino", 0, 80.0)
    quoted = urllib.parse.quote(PASSWORD, safe="")
    address = guarded.replace("://", f"://curator:{quoted}@")

    code, printed = dinobench("runs", "sync", str(run.path), MLFLOW_TRACKING_URI=address)
    assert code == 0, printed
    assert f"{guarded}/#/experiments/" in printed
    told = [printed]

    named = {"MLFLOW_TRACKING_USERNAME": "curator", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    code, printed = dinobench("ui", "--output", str(measurer.output), MLFLOW_TRACKING_URI=guarded, **named)
    assert (code, "/#/experiments/" in printed) == (0, True), printed
    told.append(printed)

    wrong = guarded.replace("://", f"://curator:{quoted[::-1]}@")
    code, printed = dinobench("runs", "sync", str(run.path), MLFLOW_TRACKING_URI=wrong)
    assert code == 3 and "MLflow store" in printed, printed
    told.append(printed)

    for secret in (PASSWORD, quoted, quoted[::-1]):
        assert not any(secret in printed for printed in told)
