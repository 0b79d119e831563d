"""What the sources never do, whatever they are given: run what is in a file, or listen to a network."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import cifarlab
from cifarlab import recipe

SOURCE = Path(cifarlab.__file__).parent
# Modules that run what they read.
RUNNING = frozenset(
    {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}
)
# Calls that run a text, load what may run, or go through a shell.
REFUSED = frozenset(
    {
        "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
        "subprocess.getstatusoutput", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all",
        "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.serialization.load",
        "torch.serialization.add_safe_globals", "pandas.read_pickle", "pd.read_pickle", "importlib.reload",
    }
)  # fmt: skip
# What a call must be given, as it stands in the source: torch's own defaults have changed, and variables change them.
DEMANDED = {"torch.load": ("weights_only", "True"), "yaml.load": ("Loader", "_Loader")}
# What no call may be given.
FORBIDDEN = frozenset(
    {("shell", "True"), ("allow_pickle", "True"), ("weights_only", "False"), ("trust_remote_code", "True")}
)


def dangers(source: str) -> Iterator[str]:
    """What a source does that could run what somebody else wrote: the line, and what stands there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                # Under another name a call could not be told.
                hidden = [f"{node.module}.{name}" for name in names]
                names = [str(node.module), *(name for name in hidden if name in REFUSED or name in DEMANDED)]
            for name in names:
                if name in REFUSED or name in DEMANDED or name.partition(".")[0] in RUNNING:
                    yield f"line {node.lineno}: import of {name}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in REFUSED:
                yield f"line {node.lineno}: {called}"
            if called in DEMANDED:
                name, value = DEMANDED[called]
                if given.get(name) != value:
                    yield f"line {node.lineno}: {called} without {name}={value}"
            for argument in given.items():
                if argument in FORBIDDEN:
                    yield f"line {node.lineno}: {called} with {'='.join(map(str, argument))}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    assert not list(dangers(path.read_text(encoding="utf-8")))


def test_the_loader_of_yaml_is_a_safe_one() -> None:
    assert issubclass(recipe._Loader, yaml.SafeLoader)
    tags = {tag for tag in recipe._Loader.yaml_constructors if tag and "python" in tag}
    assert not tags


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=safe)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load with weights_only=False"),
        ("from torch import load", "import of torch.load"),
        ("def f():\n    import pickle as p", "line 2: import of pickle"),
        ("from pickle import Unpickler", "import of pickle"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load without Loader=_Loader"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("np.load(path, allow_pickle=True)", "np.load with allow_pickle=True"),
        ("subprocess.run(text, shell=True)", "subprocess.run with shell=True"),
        ("os.system(text)", "os.system"),
        ("x = eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("from os import system", "import of os.system"),
    ],
)
def test_what_would_run_something_is_found(source: str, found: str) -> None:
    assert any(found in danger for danger in dangers(source))


@pytest.mark.parametrize(
    "source", ["torch.load(path, weights_only=True)", "model.eval()", "np.load(path)", "re.compile(x)"]
)
def test_what_runs_nothing_is_fine(source: str) -> None:
    assert not list(dangers(source))


WATCHED = """
import json, socket, sys
events = []
watched = ("socket.bind", "socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo")
sys.addaudithook(lambda event, arguments: events.append([event, repr(arguments[1:])]) if event in watched else None)
from cifarlab import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["cifarlab", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, ended.code
print(json.dumps(events))
socket.socket().bind(("127.0.0.1", 0))
assert [event for event, _ in events[-1:]] == ["socket.bind"], "the hook is deaf"
"""


def test_a_run_and_a_comparison_open_no_socket(tmp_path: Path) -> None:
    runs = str(tmp_path / "runs")
    settings = ["train.epochs=1", "train.batch_size=64", "data.limit=200", "train.numerics=exact"]
    options = [part for setting in settings for part in ("--set", setting)]
    commands = [["run", "ex1", "--dataset", "digits", "--runs", runs, *options], ["compare", runs]]
    done = subprocess.run([sys.executable, "-c", WATCHED, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert list((tmp_path / "runs").rglob("test.json"))
