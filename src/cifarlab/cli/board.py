"""`cifarlab board`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cifarlab.cli.common import say

ADDRESS = "127.0.0.1"


def board(
    runs: Annotated[
        Path, typer.Argument(readable=False, help="A folder that holds runs, or a run folder.", show_default=True)
    ] = Path("runs"),
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="The port; 0 takes any. [default: 6006, or the next free one]"),
    ] = None,
) -> None:
    """Open TensorBoard on runs, for this machine only, until Ctrl-C.

    Curves, the first training images as the network saw them, the recipes beside what came out, and the weights'
    histograms of runs with --histograms.
    """
    import threading

    from cifarlab.rundir import find_runs

    found = find_runs([runs])
    address = serve(runs, port)
    count = f"{len(found)} run{'s' * (len(found) > 1)}"
    say(f"TensorBoard shows {count} in {runs} at {address} (only on this machine); Ctrl-C ends it")
    threading.Event().wait()


def serve(folder: Path, port: int | None) -> str:
    """Start TensorBoard on a folder, in threads of this process that end with it; returns its address.

    port: 0 takes any free one, None the first free one from 6006 on. Raises UsageError where it can't be had.
    """
    import contextlib
    import io

    from cifarlab.errors import UsageError

    with contextlib.redirect_stderr(io.StringIO()):  # advice on options that are not ours
        from tensorboard import default, program

        server = program.TensorBoard(default.get_plugins())
        # An absolute path is nothing that it could take for the address of some storage.
        flags = ["tensorboard", f"--logdir={folder.resolve()}", f"--host={ADDRESS}"]
        server.configure(flags if port is None else [*flags, f"--port={port}"])
        try:
            return str(server.launch())
        except program.TensorBoardPortInUseError:
            raise UsageError(f"port {port} is in use; give another, or no --port to take the next free one") from None
        except program.TensorBoardServerException as error:
            raise UsageError(f"TensorBoard can't be reached here: {error.msg}; give another --port") from None
