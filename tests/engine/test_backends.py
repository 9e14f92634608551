"""Choosing a backend, each time in a fresh process, since jax starts once; plugins are fakes on its path."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

import irkit
from irkit.engine import backends

ROOT = Path(irkit.__file__).parents[1]

# What a fake plugin does.
ABORTS = "import os; os.abort()"
HANGS = "import time; time.sleep(600)"
# A CPU under another name: all that a plugin must be for jax.
WORKS = (
    "from jax._src.xla_bridge import make_cpu_client, register_backend_factory; "
    "register_backend_factory({platform!r}, make_cpu_client, priority=500, fail_quietly=False)"
)
COMPUTES_NONSENSE = WORKS + "; import jax.numpy as jnp; jnp.take = lambda table, ids, **options: table[ids] + 1"
FAILS_TO_START = """from jax._src.xla_bridge import register_backend_factory
    def make(): raise RuntimeError('no device today')
    register_backend_factory({platform!r}, make, priority=500, fail_quietly=False)
"""
# jax itself looks into /dev before it starts this platform.
CUDA_WORKS = WORKS + "; from jax._src import hardware_utils; hardware_utils.has_visible_nvidia_gpu = lambda: True"

PRELUDE = """
import json, os
from irkit.engine import backends

def show(**found):
    print(json.dumps(found))

def refusal(*arguments):
    try:
        backends.select(*arguments)
    except backends.BackendError as error:
        return str(error)

refused = None
"""
SHOW = """
import jax
assert float(jax.device_put(6.0, selected.device)) == 6
show(name=selected.name, line=selected.line, threads=selected.threads, refused=refused)
"""
NO_SUBPROCESS = """
def run(*arguments, **options): raise AssertionError("a subprocess was started")
backends.subprocess.run = run
"""


@dataclass
class Machine:
    """A computer with some packages installed, where Python can be run."""

    folder: Path

    def install(self, package: str, version: str) -> None:
        """A distribution, as far as its metadata."""
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")

    def plugin(self, name: str, body: str, when: str = "initialize") -> None:
        """A plugin that does `body` when jax imports or initializes it, and its distribution."""
        package, module, platform = {
            "metal": ("jax-metal", "metal_plugin", "METAL"),
            "mps": ("jax-mps", "mps", "mps"),
            "cuda": ("jax-cuda12-plugin", "xla_cuda12", "cuda"),
        }[name]
        body = body.replace("{platform!r}", repr(platform))
        path = self.folder / "jax_plugins" / module / "__init__.py"
        if not path.exists():
            path.parent.mkdir(parents=True)
            self.install(package, "0.1.1")
        path.write_text(
            f"def initialize():\n    {body}\n" if when == "initialize" else f"{body}\ndef initialize(): pass\n"
        )

    def python(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `code` after `PRELUDE`."""
        clean = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "NPROC", "PYTHONWARNINGS")}
        clean |= {"IRKIT_HOME": str(self.folder / "home"), "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}"}
        return subprocess.run(
            [sys.executable, "-c", PRELUDE + code],
            env=clean | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )

    def select(self, arguments: str = "", before: str = "", after: str = SHOW, **environment: str) -> dict:
        """What `after` showed of `selected = select(arguments)`, and stderr."""
        done = self.python(f"{before}\nselected = backends.select({arguments})\n{after}", **environment)
        assert done.returncode == 0, done.stderr
        return {"stderr": done.stderr, **json.loads(done.stdout)}

    def refusal(self, arguments: str = "", **environment: str) -> str:
        """The message of the BackendError that `select(arguments)` raises."""
        done = self.python(f"show(message=refusal({arguments}))", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["message"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def no_warning(found: dict) -> bool:
    return "Warning" not in found["stderr"]


def one_warning(found: dict) -> bool:
    return found["stderr"].count("Warning:") == 1 and "Traceback" not in found["stderr"]


@pytest.mark.skipif(
    any(backends._installed(accelerator) for accelerator in backends._ACCELERATORS),
    reason="an accelerator's plugin is installed here",
)
def test_an_ordinary_install_computes_on_the_cpu_and_tests_nothing(machine: Machine) -> None:
    found = machine.select(before="import sys; assert 'jax' not in sys.modules" + NO_SUBPROCESS)
    threads = backends.physical_cores()
    plural = "s" if threads > 1 else ""
    assert found == {
        "stderr": "",
        "name": "cpu",
        "line": f"CPU: {threads} thread{plural}, jax {metadata.version('jax')}",
        "threads": threads,
        "refused": None,
    }
    assert not (machine.folder / "home").exists()


@pytest.mark.parametrize("when", ["import", "initialize"])
def test_a_plugin_that_aborts_is_kept_out_with_one_warning(machine: Machine, when: str) -> None:
    machine.plugin("mps", ABORTS, when)
    found = machine.select()
    assert found["name"] == "cpu"
    assert one_warning(found)
    for part in ("mps cannot be used", "SIGABRT", "pip install --upgrade 'jax-mps", "computing on cpu instead"):
        assert part in found["stderr"]
    assert "backend mps cannot be used" in found["line"]

    again = machine.select(before=NO_SUBPROCESS)
    assert (again["name"], again["line"]) == ("cpu", found["line"])
    assert one_warning(again)


def test_asking_for_the_cpu_keeps_every_plugin_out(machine: Machine) -> None:
    machine.plugin("mps", ABORTS)
    found = machine.select("'cpu'", before=NO_SUBPROCESS)
    assert found["name"] == "cpu"
    assert no_warning(found)


def test_a_failure_that_is_remembered_is_tried_again_when_asked_for(machine: Machine) -> None:
    machine.plugin("mps", "raise SystemExit('no Metal device')", "import")
    assert "smoke test failed (no Metal device)" in machine.refusal("'mps'")
    machine.plugin("mps", WORKS)
    assert "no Metal device" in machine.select(before=NO_SUBPROCESS)["line"]
    assert machine.select("'mps'")["name"] == "mps"
    assert machine.select(before=NO_SUBPROCESS)["name"] == "mps"


def test_a_plugin_that_works_is_used_and_the_cpu_beside_it(machine: Machine) -> None:
    machine.plugin("mps", WORKS)
    shown = "cpu=backends.select('cpu').name, default=jax.devices()[0] == selected.device"
    found = machine.select(after=SHOW.replace("show(", f"show({shown}, "))
    assert (found["name"], found["default"], found["cpu"]) == ("mps", True, "cpu")
    assert found["line"] == f"MPS: cpu, jax {metadata.version('jax')}"
    assert found["stderr"].count("\n") <= 1  # jax's own word on experimental platforms

    shown = "import jax; show(cpu=len(jax.devices('cpu')))"
    assert machine.select(before=NO_SUBPROCESS, after=shown, JAX_PLATFORMS="mps")["cpu"] == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(HANGS, "no result within 3 seconds", id="hangs"),
        pytest.param(COMPUTES_NONSENSE, "wrong values from gather in float32", id="nonsense"),
        pytest.param(FAILS_TO_START, "no device today", id="fails"),
    ],
)
def test_a_plugin_that_hangs_errs_or_fails_is_not_used(machine: Machine, body: str, reason: str) -> None:
    machine.plugin("mps", body)
    found = machine.select(before="backends.SMOKE_TEST_SECONDS = 3" if body is HANGS else "")
    assert found["name"] == "cpu"
    assert one_warning(found)
    assert reason in found["stderr"]


def test_a_plugin_that_worked_once_and_fails_to_start_now_is_not_used(machine: Machine) -> None:
    machine.plugin("mps", FAILS_TO_START)
    found = machine.select(before="backends._run_smoke_test = lambda accelerator: ''\nrefused = refusal('mps')")
    assert found["name"] == "cpu"
    assert one_warning(found)
    assert "no device today" in found["stderr"]
    assert "no device today" in found["refused"]


def test_metal_beside_a_jaxlib_too_new_for_it_is_not_even_tried(machine: Machine) -> None:
    machine.install("jaxlib", "0.5.1")
    machine.plugin("metal", ABORTS)
    found = machine.select(before=NO_SUBPROCESS + "refused = refusal('metal')")
    assert found["name"] == "cpu"
    assert one_warning(found)
    assert "pip install jax-metal==0.1.1 jax==0.5.0 jaxlib==0.5.0" in found["stderr"]
    assert "jaxlib up to 0.5.0, and 0.5.1 is installed" in found["refused"]


def test_metal_beside_the_jaxlib_it_was_made_for_is_tried(machine: Machine) -> None:
    machine.install("jaxlib", "0.5.0")
    machine.plugin("metal", WORKS)
    assert machine.select("'metal'", JAX_PLATFORMS="METAL,cpu")["name"] == "metal"


@pytest.mark.parametrize(("platforms", "name"), [("cpu,mps", "cpu"), ("mps,cpu", "mps")])
def test_jax_platforms_says_what_is_used_and_in_which_order(machine: Machine, platforms: str, name: str) -> None:
    machine.plugin("mps", WORKS)
    shown = "import jax; show(name=selected.name, mps=len(jax.devices('mps')))"
    found = machine.select(before=NO_SUBPROCESS if name == "cpu" else "", after=shown, JAX_PLATFORMS=platforms)
    assert (found["name"], found["mps"]) == (name, 1)
    assert no_warning(found)


def test_what_jax_platforms_leaves_out_is_refused(machine: Machine) -> None:
    machine.plugin("mps", ABORTS)
    found = machine.select(before=NO_SUBPROCESS + "refused = refusal('mps')", JAX_PLATFORMS="cpu")
    assert "JAX_PLATFORMS is cpu, without mps" in found["refused"]
    assert no_warning(found)
    assert "JAX_PLATFORMS is rocm, of which irkit knows none" in machine.refusal(JAX_PLATFORMS="rocm")
    assert "SIGABRT" in machine.refusal(JAX_PLATFORMS="mps")


@pytest.mark.parametrize("accelerator", backends._ACCELERATORS, ids=lambda accelerator: accelerator.name)
def test_a_backend_that_is_not_installed_is_refused_with_the_remedy(
    machine: Machine, accelerator: backends._Accelerator
) -> None:
    if backends._installed(accelerator):
        pytest.skip("it is installed here")
    message = machine.refusal(repr(accelerator.name))
    assert message.startswith(f"backend {accelerator.name} cannot be used: ")
    assert accelerator.install in message


def test_after_jax_has_started_only_what_it_started_with_can_be_chosen(machine: Machine) -> None:
    machine.plugin("mps", ABORTS)
    found = machine.select(before=NO_SUBPROCESS + "backends.select('cpu'); refused = refusal('mps')")
    assert "jax has started with cpu only; restart Python" in found["refused"]
    assert found["name"] == "cpu"
    assert no_warning(found)


@pytest.mark.skipif(any(os.path.exists(path) for path in backends._NVIDIA_DEVICES), reason="has an NVIDIA GPU")
def test_cuda_without_a_gpu_is_passed_over_silently_unless_asked_for(machine: Machine) -> None:
    machine.plugin("cuda", ABORTS)
    found = machine.select(before=NO_SUBPROCESS + "refused = refusal('cuda')")
    assert found["name"] == "cpu"
    assert no_warning(found)
    assert "no NVIDIA GPU is visible" in found["refused"]


@pytest.mark.parametrize(("given", "used"), [({}, "false"), ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "true")])
def test_cuda_leaves_memory_to_others_unless_told_otherwise(machine: Machine, given: dict, used: str) -> None:
    machine.plugin("cuda", CUDA_WORKS)
    before = "backends._NVIDIA_DEVICES = ('/',); backends._run_smoke_test = lambda accelerator: ''"
    after = "show(name=selected.name, used=os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])"
    found = machine.select(before=before, after=after, **given)
    assert (found["name"], found["used"]) == ("cuda", used)


COUNT_THREADS = """
import jax.numpy as jnp
(jnp.ones((256, 256)) @ jnp.ones((256, 256))).block_until_ready()
show(threads=selected.threads, running=len(os.listdir('/proc/self/task')))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_xla_starts_as_many_threads_as_asked_for(machine: Machine) -> None:
    few, many, given = (
        machine.select(arguments, after=COUNT_THREADS, **environment)
        for arguments, environment in [("threads=1", {}), ("threads=9", {}), ("", {"NPROC": "9"})]
    )
    assert (few["threads"], many["threads"], given["threads"]) == (1, 9, 9)
    assert many["running"] >= few["running"] + 8
    assert given["running"] >= few["running"] + 8


def test_another_number_of_threads_than_jax_started_with_is_warned_of(machine: Machine) -> None:
    other = machine.select("'cpu', 3", before="backends.select('cpu', 2); backends.select(None, 2)")
    assert one_warning(other)
    assert "jax has already started with 2 CPU threads" in other["stderr"]


def fake_cpus(folder: Path, siblings: dict[int, str], quota: str | None = None) -> Path:
    for cpu, listed in siblings.items():
        topology = folder / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(listed)
    if quota:
        (folder / "fs/cgroup").mkdir(parents=True)
        (folder / "fs/cgroup/cpu.max").write_text(quota)
    return folder


HYPERTHREADS = {0: "0,2\n", 1: "1,3\n", 2: "0,2\n", 3: "1,3\n"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /sys")
@pytest.mark.parametrize(
    ("affinity", "siblings", "quota", "cores"),
    [
        ({0, 1, 2, 3}, HYPERTHREADS, None, 2),
        ({0, 2}, HYPERTHREADS, None, 1),
        ({0, 1, 2}, {}, None, 3),
        ({0, 1, 2, 3}, {}, "max 100000\n", 4),
        ({0, 1, 2, 3}, {}, "250000 100000\n", 2),
        ({0, 1, 2, 3}, {}, "50000 100000\n", 1),
    ],
)
def test_physical_cores_counts_cores_within_affinity_and_quota(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    affinity: set[int],
    siblings: dict[int, str],
    quota: str | None,
    cores: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: affinity)
    assert backends.physical_cores(fake_cpus(tmp_path, siblings, quota)) == cores


@pytest.mark.skipif(sys.platform != "linux", reason="sets the affinity mask")
def test_the_real_affinity_mask_is_respected(machine: Machine) -> None:
    cpu = min(os.sched_getaffinity(0))
    done = machine.python(f"os.sched_setaffinity(0, [{cpu}])\nshow(cores=backends.physical_cores())")
    assert json.loads(done.stdout) == {"cores": 1}


def test_on_a_mac_the_performance_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysctl = tmp_path / "sysctl"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for script, cores in [("echo 6; echo 10", 6), ("echo 4; exit 1", 4), ("exit 1", os.cpu_count())]:
        sysctl.write_text(f"#!/bin/sh\n{script}\n")
        sysctl.chmod(0o755)
        assert backends.physical_cores() == cores
