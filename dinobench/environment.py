"""What a run ran on: machine, package versions, commit. No environment variables: they hold secrets."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from pretrain.packages import installed_versions

PACKAGES = ("dinobench", "torch", "torchvision", "timm", "numpy", "faiss-gpu", "faiss-cpu", "scikit-learn", "mlflow")
FLOORS = ("dinobench", "suites", "pretrain")


def code_commit() -> dict[str, Any]:
    """Commit of the checkout that runs, and whether its packages have changes; empty for an installed package.

    Written results are no change of the code that measured them.
    """
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "-uno", "--", *FLOORS)
    return {"commit": commit, "dirty": bool(changes)} if commit else {}


def describe(command: str, device: str, time: str, resumed_at: int | None, ranks: int = 1) -> dict[str, Any]:
    """One entry of environment.json."""
    return {
        "time": time,
        "command": command,
        "folder": str(Path.cwd()),
        "ranks": ranks,
        "resumed_at_step": resumed_at,
        "device": device,
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": installed_versions(PACKAGES),
        "code": code_commit(),
    }


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
