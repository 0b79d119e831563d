"""The command line, called in this process, for the tests of what it says."""

from __future__ import annotations

import sys

import pytest

from cifarlab import cli


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["/a/place/bin/cifarlab", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, output.out, output.err
