"""What was measured on this machine, kept in the cache folder for the next run; deleting the file forgets it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifarlab import files
from cifarlab.download import cache_folder
from cifarlab.errors import StorageError


def recall(key: Mapping[str, Any]) -> Any:
    """What was remembered for the same key, JSON's values; None where nothing was, or the file is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return json.loads(_path().read_text(encoding="utf-8"))[_name(key)]
    return None


def remember(key: Mapping[str, Any], value: Any) -> None:
    """Keep a JSON value for the next run; where that can't be written, the next run measures again."""
    path = _path()
    entries: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        entries = found if isinstance(found, dict) else {}
    with contextlib.suppress(StorageError):
        files.make_folder(path.parent)
        files.write_json(path, entries | {_name(key): value})


def _path() -> Path:
    return cache_folder() / "measured.json"


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
