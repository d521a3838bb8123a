"""`dinobench doctor`: does this installation fit together, and what is within its reach?"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

FAISS_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-cuda")


@dataclass(frozen=True)
class Check:
    """One line of the report; `advice` says what to do when it is not ok."""

    name: str
    status: Literal["ok", "warning", "broken"]
    found: str
    advice: str = ""


def run_checks(
    output: Annotated[Path, typer.Option(help="Folder that holds mlflow.db.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check torch, CUDA, FAISS, MLflow and the data.

    Exit code 3 when something is broken.
    """
    from dinobench.cli.output import print_json, print_table, print_text

    checks = [_guarded(check) for check in (check_torch, check_cuda, check_faiss)]
    checks += [check_mlflow(output), check_data()]
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        print_table("", ["check", "status", "found"], [[check.name, check.status, check.found] for check in checks])
        for check in checks:
            if check.advice:
                print_text(f"{check.name}: {check.advice}")
    if any(check.status == "broken" for check in checks):
        raise typer.Exit(3)


def _guarded(check: Callable[[], Check]) -> Check:
    """A broken installation fails at import in many ways; each is a finding, none ends the report."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.removeprefix("check_")
        return Check(name, "broken", " ".join(f"{type(error).__name__}: {error}".split())[:200], f"reinstall {name}")


def check_torch() -> Check:
    """torch and torchvision must come from the same index: their local version tags (+cu132) must agree."""
    import torch
    import torchvision

    found = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    if not same_build(torch.__version__, torchvision.__version__):
        return Check("torch", "broken", found, "install both from the same index: their builds (+...) differ")
    return Check("torch", "ok", found)


def same_build(torch_version: str, torchvision_version: str) -> bool:
    """Whether the local tags of two versions agree; a version without a tag says nothing."""
    tags = {version.partition("+")[2] for version in (torch_version, torchvision_version)} - {""}
    return len(tags) < 2


def check_cuda() -> Check:
    """CUDA devices that torch sees."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Check("cuda", "ok", f"{len(names)} x {', '.join(dict.fromkeys(names))}")
    if torch.version.cuda and Path("/proc/driver/nvidia").exists():
        return Check(
            "cuda", "warning", "a driver but no device torch can use", "the driver may be too old for this torch"
        )
    return Check("cuda", "ok", f"no device; {torch.get_num_threads()} CPU threads")


def check_faiss() -> Check:
    """Which FAISS is there; two of its distributions share one folder and break each other."""
    installed = faiss_distributions()
    if not installed:
        return Check("faiss", "warning", "not installed", "kNN uses the torch backend; pip install faiss-cpu is faster")
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    found = f"{', '.join(f'{name} {version}' for name, version in installed.items())}; sees {gpus} GPUs"
    if len(installed) > 1:
        names = " ".join(installed)
        return Check("faiss", "broken", found, f"pip uninstall {names}, then install one of them: they share a folder")
    return Check("faiss", "ok", found)


def faiss_distributions() -> dict[str, str]:
    """Installed FAISS distributions with their versions."""
    from pretrain.packages import installed_versions

    return installed_versions(FAISS_DISTRIBUTIONS)


def check_mlflow(output: Path) -> Check:
    """The store that a run would log to."""
    from dinobench import tracking

    uri = tracking.tracking_uri(output)
    shown = tracking.masked(uri)
    file = tracking.database_file(uri)
    try:
        version = importlib.metadata.version("mlflow")
        if file is not None and not file.is_file():
            return Check("mlflow", "ok", f"{version}; {shown} (made by the first run)")
        tracking.connect(uri)
    except importlib.metadata.PackageNotFoundError:
        return Check("mlflow", "warning", "not installed", "runs keep their journal; pip install mlflow for the pages")
    except tracking.TrackingUnavailable as error:
        return Check(
            "mlflow", "warning", str(error), "runs keep their journal; `dinobench runs sync RUN` logs them later"
        )
    return Check("mlflow", "ok", f"{version}; {shown}")


def check_data() -> Check:
    """The data root and the data sets found."""
    from pretrain.data.datasets import dataset_names

    root = os.environ.get("DINOBENCH_DATA")
    names = ", ".join(info.name for info in dataset_names() if info.available)
    if root is None:
        return Check("data", "ok", f"DINOBENCH_DATA is not set; available: {names}")
    if not Path(root).is_dir():
        return Check(
            "data", "warning", f"DINOBENCH_DATA={root} is not a folder", "set it to the folder of your data sets"
        )
    return Check("data", "ok", f"DINOBENCH_DATA={root}; available: {names}")
