from __future__ import annotations

from pretrain.packages import installed_versions


def test_only_what_is_installed_is_listed() -> None:
    versions = installed_versions(["torch", "no-such-distribution"])
    assert list(versions) == ["torch"]
    assert versions["torch"][0].isdigit()
