"""The doctor and the monitor: recorded texts are read exactly, what is measured holds against torch itself."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from compresslab import doctor
from compresslab.errors import CompressLabError
from compresslab.measure import energy, gpu, hardware
from compresslab.report.schema import Measurement
from tiny import run_cli

SAPPHIRE_RAPIDS = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480C
flags\t\t: fpu vme sse sse2 avx fma avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl avx_vnni avx512_bf16 """ + (
    """avx512_vbmi avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8 arch_capabilities
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: fpu
"""
)
HASWELL = "processor\t: 0\nflags\t\t: fpu sse4_2 fma avx avx2 bmi1\n"
GRAVITON3 = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm dcpop sha3 asimddp sve i8mm svebf16 bf16 dgh
CPU implementer\t: 0x41
"""
RASPBERRY_PI_4 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"


def has(text: str) -> set[str]:
    return {name for name, there in hardware.instructions(text).items() if there}


def cpu(text: str, **changes: Any) -> hardware.Cpu:
    settings: dict[str, Any] = dict(
        name="a processor", architecture="x86_64", physical=4, logical=8, usable=8, cgroup_cpus=None,
        instructions=hardware.instructions(text), caches_bytes={"L1d": 32768},
    )  # fmt: skip
    return hardware.Cpu(**settings | changes)


def test_instruction_sets_of_recorded_processors() -> None:
    x86 = {"AVX2", "AVX-VNNI", "AVX-512", "AVX512-VNNI", "AVX512-BF16", "AMX-INT8", "AMX-BF16"}
    assert has(SAPPHIRE_RAPIDS) == x86
    assert has(HASWELL) == {"AVX2"} and set(hardware.instructions(HASWELL)) == x86
    assert has(GRAVITON3) == {"NEON", "DOTPROD", "I8MM", "ARM-BF16", "SVE"}
    assert has(RASPBERRY_PI_4) == {"NEON"}
    assert hardware.instructions("processor : 0\nfeatures of no kind\n") == {}


@pytest.mark.parametrize("without", ["amx_tile", "amx_int8"])
def test_amx_needs_its_tiles(without: str) -> None:
    assert "AMX-INT8" not in has(SAPPHIRE_RAPIDS.replace(f"{without} ", ""))


def write(folder: Path, **texts: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path / "pod", cpu__max="150000 100000", memory__max=4 << 30, memory__current=3 << 30)
    write(tmp_path / "pod" / "box", cpu__max="max 100000", memory__max=8 << 30, memory__current=1 << 30)
    groups = hardware.cgroups("0::/pod/box\n", "cpu", tmp_path)
    assert groups == [tmp_path / "pod" / "box", tmp_path / "pod", tmp_path]
    assert hardware.cgroup_cpus(groups) == 1.5
    assert hardware.cgroup_memory(groups) == (4 << 30, 3 << 30)  # the outer one leaves less
    write(tmp_path / "pod", memory__stat=f"anon {1 << 30}\nfile {2 << 30}\nactive_file 5\ninactive_file {1 << 30}")
    assert hardware.cgroup_memory(groups) == (4 << 30, (2 << 30) - 5), "pages of files make room when it is needed"


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    own = "4:memory:/box\n1:cpu,cpuacct:/box\n0::/\n"
    write(tmp_path / "cpu,cpuacct" / "box", cpu__cfs_quota_us=250000, cpu__cfs_period_us=100000)
    write(tmp_path / "memory" / "box", memory__limit_in_bytes=1 << 30, memory__usage_in_bytes=100)
    write(tmp_path / "memory" / "box", memory__stat="active_file 1\ntotal_active_file 30\ntotal_inactive_file 10")
    write(tmp_path / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    assert hardware.cgroup_cpus(hardware.cgroups(own, "cpu", tmp_path)) == 2.5
    assert hardware.cgroup_memory(hardware.cgroups(own, "memory", tmp_path)) == (1 << 30, 60)
    write(tmp_path / "cpu,cpuacct" / "box", cpu__cfs_quota_us=-1)
    assert hardware.cgroup_cpus(hardware.cgroups(own, "cpu", tmp_path)) is None


def test_caches_are_read_by_level(tmp_path: Path) -> None:
    for i, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (3, "Unified", "32768K")]):
        write(tmp_path / f"index{i}", level=level, type=kind, size=size)
    assert hardware.caches(tmp_path) == {"L1d": 49152, "L3": 33554432}


def test_threads_are_what_the_tighter_limit_leaves() -> None:
    assert cpu(HASWELL).threads == 8
    assert cpu(HASWELL, cgroup_cpus=2.9).threads == 2
    assert cpu(HASWELL, usable=1, cgroup_cpus=3.0).threads == 1
    assert cpu(HASWELL, cgroup_cpus=0.5).threads == 1


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        (SAPPHIRE_RAPIDS, {"torch, packed kernels", "onnxruntime, int8", "openvino, int8"}),
        (HASWELL, set()),
        (GRAVITON3, {"onnxruntime, int8", "openvino, int8"}),
    ],
)
def test_which_runtimes_are_fast(text: str, fast: set[str]) -> None:
    always = {"onnxruntime-genai, int4", "llama.cpp, GGUF", "executorch, XNNPACK"}
    found = {name: doctor.runtime(name, cpu(text), "1.0") for name in doctor.RUNTIMES}
    assert {name for name, row in found.items() if row.fast} == fast | always
    assert all(row.why for row in found.values())
    assert "pip install 'compresslab[onnx]'" in doctor.runtime("onnxruntime, int8", cpu(text), None).why
    assert doctor.runtime("onnxruntime, int8", cpu(""), "1.0").fast is None


def test_the_tested_releases_are_those_of_the_constraints() -> None:
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED


def test_problems_name_what_to_do() -> None:
    assert doctor._of_cpu(cpu(HASWELL), 0.0, 8) == [] or Path("/sys/devices/system/cpu/cpu0/cpufreq").exists()
    limited = doctor._of_cpu(cpu(HASWELL, cgroup_cpus=2.0), 5.0, 8)
    assert [problem.what.split(" (")[0] for problem in limited[:3]] == [
        "this process may use 2 of 8 cores", "torch would take 8 threads where 2 can run", "others compute here",
    ]  # fmt: skip
    assert "OMP_NUM_THREADS=2" in limited[1].do
    few = hardware.Memory(total_bytes=8 << 30, available_bytes=1 << 20, limit_bytes=None)
    assert [p.what for p in doctor._of_room(few, 10, Path("/x"))] == [
        "1.0 MB of memory are free", "10 B are free on the disk of /x",
    ]  # fmt: skip
    assert doctor._of_versions({"torch": ("2.13.9+cpu", "2.13.0")}) == []
    (other,) = doctor._of_versions({"torch": ("2.14.0", "2.13.0")})
    assert "pip install 'torch==2.13.0'" in other.do
    assert {p.what for p in doctor._unmeasured([])} == {
        f"this torch multiplies no {name} on this CPU" for name in ("fp32", "bf16", "int8")
    }


def test_no_product_is_faster_than_the_ceiling() -> None:
    """Loosely, since others may compute at the same time; and no ceiling is beyond what a core can do in a cycle."""
    here = hardware.cpu()
    found = {m.name: m for m in hardware.ceilings(here, budget_s=1.0)}
    assert {"memory_copy", "memory_triad", "fp32_ceiling", "bf16_ceiling"} <= set(found)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        call = hardware.multiply(dtype, 256)
        rate = 2 * 256**3 / min(hardware.seconds(call, 3)) / 1e9
        assert found[f"{name}_ceiling"].value * 1.6 >= rate
        assert found[f"{name}_ceiling"].value < 16_384 * here.logical
    assert 0.2 < found["memory_copy"].value < 2000
    assert all(m.n >= 3 and m.spread is not None and m.spread >= 0 for m in found.values())


def test_measuring_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own, on which a copy takes half a second, as on a machine that is overrun."""
    clock = iter(range(10**6))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: 0.5 * next(clock))
    calls: list[int] = []
    monkeypatch.setattr(torch, "add", lambda *_, **__: calls.append(1))
    found = hardware._streams(cpu(HASWELL, usable=2, physical=2), 0.8)
    assert {m.n for m in found} == {3}
    assert len(calls) == 2 * 4  # two numbers of threads: one call to warm up and three that count


def test_a_dtype_without_a_kernel_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> torch.Tensor:
        raise RuntimeError('"_int_mm" not implemented')

    monkeypatch.setattr(torch, "_int_mm", refuses)
    assert hardware._product("int8", torch.int8, cpu(HASWELL), 0.1) is None


def test_int8_products_are_sums_in_32_bits() -> None:
    torch.manual_seed(0)
    call = hardware.multiply(torch.int8, 64)
    assert call().dtype == torch.int32


def test_the_command_says_it_in_60_columns_and_as_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Measurement(name="memory_copy", value=21.0, unit="GB/s", n=5, spread=1.0, device="x", conditions="arrays")
    monkeypatch.setattr(hardware, "ceilings", lambda cpu: [made])
    code, out, _ = run_cli(monkeypatch, capsys, "doctor", "--json")
    assert code == 0
    found = doctor.Diagnosis.model_validate_json(out)
    assert found.cpu.logical >= found.cpu.usable >= 1 and found.cached.keys() == {*doctor.zoo.MODELS}
    assert {row.name for row in found.runtimes} == set(doctor.RUNTIMES)
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(doctor.to_terminal(found))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 60
    assert "21 GB/s" in text and "int8 on this CPU" in text  # the problem: it was not measured


# --- GPUs and the monitor ---------------------------------------------------------------------------------------------


class Nvml(types.ModuleType):
    """A machine with one GPU whose n-th sample is known."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_NoPermission(NVMLError):
        pass

    class NVMLError_FunctionNotFound(NVMLError):
        pass

    def __init__(self, *, power: bool = True) -> None:
        super().__init__("pynvml")
        self.asked, self.power = 0, power

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle {index}"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return "GPU-1234"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> types.SimpleNamespace:
        assert handle == "handle 0"
        return types.SimpleNamespace(total=80 << 30, free=70 << 30, used=(10 << 30) + self.asked)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> types.SimpleNamespace:
        self.asked += 1
        return types.SimpleNamespace(gpu=10 * self.asked, memory=1)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if not self.power:
            raise self.NVMLError_NotSupported
        return 300_000 + 1000 * self.asked

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 50


def test_gpus_as_nvml_describes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    (card,) = gpu.gpus(gpu.nvml())
    assert card == gpu.Gpu(index=0, name="NVIDIA H100 80GB HBM3", uuid="GPU-1234", memory_bytes=80 << 30,
                           free_bytes=70 << 30, driver="570.1", compute_capability="9.0")  # fmt: skip
    (problem,) = doctor._of_gpus([card], torch_sees_one=False)
    assert "H100" in problem.what and doctor._of_gpus([card], torch_sees_one=True) == []


@pytest.mark.parametrize("power", [True, False])
def test_mean_and_peak_of_what_a_gpu_did(power: bool) -> None:
    library = Nvml(power=power)
    source = gpu.GpuSource(library, gpu.gpus(library)[0])
    seen: list[gpu.Sample] = []
    with gpu.Monitor([source], 0.01, lambda label, sample: seen.append(sample)) as monitor:
        while len(seen) < 3:
            time.sleep(0.005)
    count = len(seen)
    found = {m.name: m for m in monitor.summary()}
    assert found["utilization_peak"].value == 10 * count and found["utilization_mean"].value == 5 * (count + 1)
    assert found["memory_bytes_peak"].value == (10 << 30) + count
    assert found["temperature_mean"].unit == "degrees C" and found["utilization_peak"].n == count
    assert ("power_peak" in found) == power
    if power:
        assert (found["power_peak"].value, found["power_peak"].unit) == (300 + count, "W")
    facts = monitor.facts()["gpu while it ran"]
    assert facts["temperature_peak (degrees C)"] == 50.0


class Driver:
    """libnvidia-ml.so.1 at the C boundary: functions that write through the pointers they are given."""

    def __init__(self, **refused: int) -> None:
        self.refused = refused

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        return lambda *given: self.refused.get(name, 0) or self.answer(name, given)

    def answer(self, name: str, given: tuple[Any, ...]) -> int:
        numbers = {
            "nvmlDeviceGetCount_v2": (1,), "nvmlDeviceGetCudaComputeCapability": (9, 0), "nvmlDeviceGetPowerUsage": (350_000,),
            "nvmlDeviceGetTemperature": (61,), "nvmlDeviceGetTotalEnergyConsumption": (7_500,),
        }  # fmt: skip
        texts = {"Name": b"NVIDIA H100", "UUID": b"GPU-1234", "DriverVersion": b"570.1"}
        if name in numbers:
            for pointer, value in zip(given[-len(numbers[name]) :], numbers[name], strict=True):
                pointer._obj.value = value
        elif (kind := next((kind for kind in texts if name.endswith("Get" + kind)), None)) is not None:
            next(one for one in given if hasattr(one, "raw")).value = texts[kind]
        elif name.endswith("MemoryInfo"):
            held = given[1]._obj
            held.total, held.free, held.used = 80 << 30, 70 << 30, 10 << 30
        elif name.endswith("UtilizationRates"):
            given[1]._obj.gpu = 42
        elif not name.startswith(("nvmlInit", "nvmlDeviceGetHandleBy")):
            raise AssertionError(f"{name} is not asked for")
        return 0


@pytest.fixture
def real_nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real nvidia-ml-py over a Driver; call it with functions to refuse and the NVML error code of each."""
    library = pytest.importorskip("pynvml")

    def over(**refused: int) -> Any:
        monkeypatch.setattr(library, "nvmlLib", Driver(**refused))
        monkeypatch.setattr(library, "_nvmlGetFunctionPointer_cache", {})
        return gpu.nvml()

    return over


def test_the_real_wrapper_of_nvml_is_asked_rightly(real_nvml: Any) -> None:
    library = real_nvml()
    (card,) = gpu.gpus(library)
    assert card == gpu.Gpu(index=0, name="NVIDIA H100", uuid="GPU-1234", memory_bytes=80 << 30, free_bytes=70 << 30,
                           driver="570.1", compute_capability="9.0")  # fmt: skip
    sample = gpu.GpuSource(library, card).sample()
    assert sample == {"utilization": 42, "memory_bytes": 10 << 30, "power": 350, "temperature": 61}
    handle = library.nvmlDeviceGetHandleByUUID("GPU-1234")
    assert energy.Nvml(library, handle).joules() == 7.5


def test_what_a_card_does_not_tell_is_left_out_and_a_lost_card_is_a_fault(real_nvml: Any) -> None:
    untold, refused, lost = 3, 4, 15  # NVML_ERROR_NOT_SUPPORTED, _NO_PERMISSION, _GPU_IS_LOST
    library = real_nvml(nvmlDeviceGetMemoryInfo=untold, nvmlDeviceGetUtilizationRates=refused)
    (card,) = gpu.gpus(library)
    assert card.memory_bytes is None and card.free_bytes is None
    assert gpu.GpuSource(library, card).sample() == {"power": 350, "temperature": 61}
    with pytest.raises(gpu.NoNvml, match="GPU is lost"):
        gpu.gpus(real_nvml(nvmlDeviceGetName=lost))
    library = real_nvml(nvmlDeviceGetPowerUsage=lost)
    with pytest.raises(library.NVMLError):
        gpu.GpuSource(library, card).sample()


def test_the_doctor_shows_a_card_whose_memory_is_not_told(monkeypatch: pytest.MonkeyPatch, real_nvml: Any) -> None:
    library = real_nvml(nvmlDeviceGetMemoryInfo=3)
    monkeypatch.setattr(hardware, "ceilings", lambda cpu: [])
    monkeypatch.setattr(gpu, "nvml", lambda: library)
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(doctor.to_terminal(doctor.diagnose()))
    assert "NVIDIA H100, memory not told" in console.export_text()


def test_a_monitor_that_fails_says_so_and_harms_nothing() -> None:
    library = Nvml()
    source = gpu.GpuSource(library, gpu.gpus(library)[0])
    source.sample = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with gpu.Monitor([source], 0.01) as monitor:
        time.sleep(0.1)
    with pytest.raises(CompressLabError, match="the monitor stopped"):
        monitor.summary()
    assert "division" in monitor.facts()["gpu while it ran"]


def test_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(gpu.NoNvml, match=re.escape("pip install 'compresslab[gpu]'")):
        gpu.nvml()
    with gpu.watch(torch.device("cpu")) as seen:
        pass
    assert seen.facts() == {}
    with gpu.watch(torch.device("cuda")) as seen:
        pass
    assert "compresslab[gpu]" in seen.facts()["gpu while it ran"]


HOLD = "import time; x = bytearray(120_000_000); t = time.time()\nwhile time.time() - t < 0.7: pass"


def test_the_monitor_command_follows_the_process_and_what_it_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> Any:
        raise gpu.NoNvml("no NVIDIA GPU")

    monkeypatch.setattr(gpu, "nvml", none)
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {HOLD!r}]).returncode + 7)"
    code, out, err = run_cli(
        monkeypatch, capsys, "monitor", "--interval", "0.1", "--json", "--", sys.executable, "-c", parent
    )
    assert code == 7
    assert "no NVIDIA GPU; watching the process's CPU and memory" in err and "cpu " in err
    found = {m["name"]: m for m in json.loads(out)}
    assert found["memory_bytes_peak"]["value"] > 120e6
    assert 30 < found["cpu_peak"]["value"] < 250
    assert found["cpu_mean"]["value"] <= found["cpu_peak"]["value"]


def test_a_command_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_cli(monkeypatch, capsys, "monitor", "--", "no-such-program")
    assert code == 2 and err.startswith("error: cannot run 'no-such-program'")
    code, _, err = run_cli(monkeypatch, capsys, "monitor", "--interval", "0", "--", "true")
    assert code == 2 and "--interval 0" in err


def test_the_terminal_shows_the_extra_of_a_runtime_that_is_absent() -> None:
    found = doctor.diagnose()
    why = "pip install 'compresslab[llama-cpp]'"
    row = found.runtimes[0].model_copy(update={"version": None, "why": why})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(doctor.to_terminal(found.model_copy(update={"runtimes": (row,)})))
    assert why in console.export_text()
