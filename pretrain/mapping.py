"""YAML files that hold a mapping: recipes, presets, suite definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UsageError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""That of libyaml wherever PyYAML has it: ten times as fast, and a table reads hundreds of recipes."""


def read_mapping(path: Path, *, kind: str, holds: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        kind: what it is, for messages: "recipe".
        holds: what belongs in it, for messages: "sections (key: value)".

    Raises:
        UsageError: the file cannot be read, is not valid YAML, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(), LOADER)
    except OSError as error:
        raise UsageError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold {holds}, found {type(content).__name__}")
    return content
