"""The machine: devices are chosen or refused by name, and the clocks and gauges show what they say."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from cifarlab import machine
from cifarlab.errors import UsageError

CPU = torch.device("cpu")
MB = 1_000_000


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def with_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    without_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


# --- devices ----------------------------------------------------------------------------------------


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)
    assert machine.choose_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.choose_device("auto") == torch.device("cuda")
    assert machine.choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpu", "did you mean 'cpu'?"),
        ("cudaa", "did you mean 'cuda'?"),
        ("CUDA", "did you mean 'cuda'?"),
        ("mpss", "did you mean 'mps'?"),
        ("tpu-v4", "choose from auto, cpu, cuda, mps"),
        ("", "choose from auto, cpu, cuda, mps"),
        ("cuda0", "did you mean 'cuda'?"),
        (" cpu", "did you mean 'cpu'?"),
    ],
)
def test_an_unknown_device_is_refused_with_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        machine.choose_device(name)
    assert str(caught.value) == f"unknown device '{name}'; {hint}"


@pytest.mark.parametrize(
    "name", ["cuda:", "cuda:x", "cuda:-1", "cuda:1.5", "cuda:²", "cuda:٣", "cuda:0:1", "cuda:99999", "cpu:", "auto:1"]
)
def test_a_number_that_is_none_or_that_a_device_has_not_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch, 1)
    with pytest.raises(UsageError) as caught:
        machine.choose_device(name)
    assert str(caught.value) == f"unknown device '{name}'; only cuda takes a number, as in cuda:0"


def test_an_absent_device_is_refused_with_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(UsageError) as caught:
            machine.choose_device(name)
        expected = f"device '{name}' is not available here; this machine and this torch have: cpu"
        assert str(caught.value) == expected


def test_a_gpu_is_chosen_by_its_number_if_there_are_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch, 2)
    assert machine.choose_device("cuda:1") == torch.device("cuda", 1)
    assert machine.choose_device("cuda") == torch.device("cuda")
    with pytest.raises(UsageError, match="device 'cuda:2' is not there; this machine has 2 CUDA device"):
        machine.choose_device("cuda:2")


# --- clocks and gauges ------------------------------------------------------------------------------


def test_the_age_of_this_process_grows_by_the_clock() -> None:
    before, clock = machine.process_age(), time.monotonic()
    assert before > 0
    time.sleep(0.05)
    assert machine.process_age() - before == pytest.approx(time.monotonic() - clock, abs=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the start is known to a second only")
def test_a_new_process_is_as_old_as_its_parent_has_waited() -> None:
    code = (
        "import time\n"
        "time.sleep(0.2)\n"  # some of its age is from before the import
        "from cifarlab import machine\n"
        "print(machine.process_age())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    waited = time.monotonic() - began
    assert 0.2 <= float(done.stdout) <= waited + 0.02


def test_without_proc_the_age_comes_from_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = machine.process_age()
    for text in ("", "1 (a) S 1"):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert machine.process_age() == pytest.approx(exact, abs=1.5)


def test_the_peak_grows_with_an_allocation_and_stays() -> None:
    # In a process of its own: memory that others kept would serve the allocation.
    code = (
        "import torch\n"
        "from cifarlab import machine\n"
        "cpu = torch.device('cpu')\n"
        "machine.reset_peak_memory(cpu)\n"
        "before = machine.peak_memory(cpu)\n"
        f"held = torch.ones(25 * {MB})\n"  # 100 MB, written to
        "during = machine.peak_memory(cpu)\n"
        "del held\n"
        "print(before, during, machine.peak_memory(cpu))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, during, after = map(int, output.split())
    assert 90 * MB < during - before < 130 * MB
    assert after >= during - MB  # the kernel counts pages in batches


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin anew")
def test_a_reset_forgets_what_was_given_back() -> None:
    # In a process of its own: whether memory is given back depends on what else was done.
    code = (
        "import mmap\n"
        "import torch\n"
        "from cifarlab import machine\n"
        "cpu = torch.device('cpu')\n"
        "held = mmap.mmap(-1, 200_000_000)\n"
        "held.write(bytes(200_000_000))\n"
        "before = machine.peak_memory(cpu)\n"
        "held.close()\n"
        "machine.reset_peak_memory(cpu)\n"
        "print(before - machine.peak_memory(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150 * MB


def test_free_memory_is_some_and_no_more_than_there_is() -> None:
    assert 0 < machine.free_memory(CPU) <= psutil.virtual_memory().total


def test_in_a_container_files_that_were_read_are_no_memory_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    free = psutil.virtual_memory().available
    assert machine.available_memory() == pytest.approx(free, rel=0.2)
    for name, text in (
        ("memory.max", "1000000"),
        ("memory.current", "900000"),
        ("memory.stat", "anon 200000\nactive_file 300000\ninactive_file 400000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert machine.available_memory() == 800_000
    assert machine.total_memory(CPU) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory() == pytest.approx(free, rel=0.2)


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "2"}, {"OMP_PROC_BIND": "false"}])
def test_every_thread_of_a_prepared_process_does_the_same_arithmetic(environment: dict[str, str]) -> None:
    # Tiny numbers all over a tensor that several threads work on: each of them flushes, or none does.
    code = (
        "import os\n"
        "from cifarlab import machine\n"
        "cores = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else None\n"
        "done = machine.prepare()\n"
        "import torch\n"
        "assert done == machine.prepare()\n"
        "assert cores is None or os.sched_getaffinity(0) == cores\n"
        "assert 'OMP_PLACES' not in os.environ\n"
        "small = torch.full((2_000_000,), 1e-40) * 0.5\n"
        "print(done['denormals_flushed'], int((small == 0).sum()), done['threads_pinned'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    flushed, zeros, pinned = done.stdout.split()
    assert zeros == ("2000000" if flushed == "True" else "0")
    if environment:
        assert pinned == "False"


@functools.cache
def effects() -> dict[str, tuple[dict[str, bool], dict[str, bool]]]:
    """What processes say they were prepared for, each without one setting ("": with all), and what can be seen of each.

    They are started at the same time, as importing torch takes seconds.
    """
    code = (
        "import json, os, resource, sys\n"
        "from pathlib import Path\n"
        "from cifarlab import machine\n"
        "said = machine.prepare(without=sys.argv[1:])\n"
        "import torch\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): torch.ones(16_000_000)\n"  # more than the 32 MB that malloc keeps of its own accord
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\n"
        "kept = faults() < 1000\n"
        "huge = 'AnonHugePages:         0 kB' not in Path('/proc/self/smaps_rollup').read_text()\n"
        "alone = [len(os.sched_getaffinity(int(task))) == 1 for task in os.listdir('/proc/self/task')]\n"
        "flushed = float(torch.tensor(1e-39) * 0.5) == 0\n"
        "seen = dict(memory_kept=kept, huge_pages=huge, threads_pinned=any(alone), denormals_flushed=flushed)\n"
        "assert not {'OMP_PLACES', 'GOMP_SPINCOUNT'} & os.environ.keys()\n"
        "print(json.dumps([said, seen]))"
    )
    free = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))}
    free["OMP_DISPLAY_ENV"] = "verbose"  # it tells what it goes by
    started = {
        without: subprocess.Popen(
            [sys.executable, "-c", code, *([without] if without else [])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=free,
        )
        for without in ("", *machine.SETTINGS)
    }  # fmt: skip
    found = {}
    for without, process in started.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        said, seen = json.loads(output)
        found[without] = said, seen | {"waits_bounded": "GOMP_SPINCOUNT = '10000'" in errors}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="what was done is seen in /proc")
@pytest.mark.parametrize("setting", machine.SETTINGS)
def test_a_process_is_prepared_without_just_that_one(setting: str) -> None:
    (with_all_said, with_all_seen), (said, seen) = effects()[""], effects()[setting]
    gone = {"memory_kept", "huge_pages"} if setting == "memory_kept" else {setting}
    assert said == with_all_said | dict.fromkeys(gone, False)
    # The kernel may give huge pages to all or to none, a machine may have a single core: then there is less to see.
    always = (
        with_all_seen["huge_pages"] and "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    )
    assert seen == with_all_seen | dict.fromkeys(gone - ({"huge_pages"} if always else set()), False)


def test_a_setting_of_another_name_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="huge_page"):
        machine.prepare(without=["huge_page"])


def test_kept_memory_is_used_again_without_page_faults() -> None:
    code = (
        "import resource\n"
        "import torch\n"
        "from cifarlab import machine\n"
        "kept = machine.keep_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): torch.ones(5_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\n"
        "print(kept, faults())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept in ("True", "False")
    if kept == "True":
        # 10 x 20 MB are 48,828 pages of 4 kB when they are asked for anew each time.
        assert int(faults) < 1000


def test_keeping_memory_says_whether_it_took_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.keep_memory() is False
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))  # musl
    assert machine.keep_memory() is False


def test_the_description_is_json_and_true() -> None:
    described = machine.describe(CPU)
    assert json.loads(json.dumps(described)) == described
    assert described["device"] == "cpu"
    assert described["gpu"] is described["cuda"] is None
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["memory"] == psutil.virtual_memory().total
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peak_is_what_was_allocated_there() -> None:
    device = machine.choose_device("auto")
    assert device.type == "cuda"
    machine.reset_peak_memory(device)
    before, free = machine.peak_memory(device), machine.free_memory(device)
    assert before is not None
    held = torch.ones(64 * 2**20, device=device)
    machine.synchronize(device)
    during = machine.peak_memory(device)
    assert during is not None
    assert during - before == held.numel() * 4
    assert free - machine.free_memory(device) >= held.numel() * 4
    del held
    assert machine.peak_memory(device) == during
    machine.reset_peak_memory(device)
    assert machine.peak_memory(device) == before
    assert machine.describe(device)["gpu"] == torch.cuda.get_device_name(device)
