"""What the tests of kills share: the fork server, and a run that nothing interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kills import ForkServer
from kills_lives import lives
from kills_reference import Reference, make_reference


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "life" in metafunc.fixturenames:
        found = lives(metafunc.config.getoption("--kills"))
        names = [f"{number}-{kind}-{'tables' if 'tables' in plan else 'run'}" for kind, number, plan in found]
        metafunc.parametrize("life", found, ids=names)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer({**os.environ, "MPLBACKEND": "Agg"})
    yield server
    server.close()


@pytest.fixture(scope="session")
def uninterrupted(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run, its results and a table that nothing interrupted."""
    return make_reference(fork_server, tmp_path_factory.mktemp("uninterrupted") / "place")
