from __future__ import annotations

from pathlib import Path

import pytest

from dinobench import addresses
from dinobench.cli.links import full_links

PAGES = {"digits-v1 models": "/#/experiments/2/models?workflowType=machine_learning"}


def test_every_page_is_one_of_model_training() -> None:
    base = "http://host:5000"
    pages = [
        addresses.charts_page(base, "7"),
        addresses.models_page(base, "7"),
        addresses.runs_page(base, "7"),
        addresses.run_page(base, "7", "abc"),
    ]
    for page in pages:
        assert page.startswith("http://host:5000/#/experiments/7/")
        assert page.endswith("workflowType=machine_learning")
        assert page.count("?") == 1


@pytest.mark.parametrize(
    ("address", "shown", "linked"),
    [
        ("http://host:5000/", "http://host:5000/", "http://host:5000"),
        ("https://me:s3:cr%2Fet%40@host/x/", "https://me:***@host/x/", "https://host/x"),
        ("https://me:s3cret@host", "https://me:***@host", "https://host"),
    ],
)
def test_a_password_is_neither_shown_nor_linked(address: str, shown: str, linked: str) -> None:
    assert addresses.masked(address) == shown
    assert addresses.without_credentials(address) == linked


def test_a_password_that_breaks_the_address_is_not_shown() -> None:
    with pytest.raises(addresses.TrackingUnavailable, match="is not the address of a server") as raised:
        addresses.probe("https://me:s3:cr/et@host")
    assert not any(part in str(raised.value) for part in ("s3", "cr/", "et@"))


def test_links_of_a_server_need_no_other_server() -> None:
    links = full_links(PAGES, "https://me:s3cret@host/", Path("runs"))
    assert links == {"digits-v1 models": f"https://host{PAGES['digits-v1 models']}"}


def test_links_of_a_database_begin_with_what_starts_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    links = full_links(PAGES, f"sqlite:///{tmp_path}/my runs/mlflow.db", Path("runs"))
    assert links["pages"] == "start `dinobench ui --output 'my runs'`, then open"
    assert links["digits-v1 models"] == f"http://127.0.0.1:5000{PAGES['digits-v1 models']}"
    assert full_links({}, f"sqlite:///{tmp_path}/mlflow.db", Path("runs")) == {}


def test_processes_of_one_store_share_a_lock_and_stores_do_not(tmp_path: Path) -> None:
    assert addresses.lock_file(f"sqlite:///{tmp_path}/mlflow.db") == tmp_path / "mlflow.db.lock"
    one = addresses.lock_file("http://me:s3cret@host:5000")
    assert one == addresses.lock_file("http://host:5000/")
    assert one != addresses.lock_file("http://host:5001")
    assert "s3cret" not in str(one)
