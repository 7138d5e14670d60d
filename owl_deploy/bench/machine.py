"""The machine that a benchmark ran on, as far as it decides the result."""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

# What inference kernels choose between, as Linux spells it in /proc/cpuinfo.
_ISA = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_vbmi2",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


class Machine(BaseModel):
    """Processor, memory and system; `busy_cores` is what others used just before the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    isa: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    governor: str | None
    system: str
    busy_cores: float

    @property
    def name(self) -> str:
        """The machine in a few words."""
        top = [flag for flag in self.isa if flag.startswith(("avx512", "amx_", "avx_vnni", "sve"))]
        missing = ["no AVX-512"] if "avx2" in self.isa else []
        told = f" ({', '.join(top or missing)})" if top or missing else ""
        return f"{self.cpu}, {self.physical_cores} cores{told}"


def look(seconds: float = 1.0) -> Machine:
    """Describe this machine; watches for `seconds` how busy it is."""
    cpu, flags = _cpuinfo()
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return Machine(
        cpu=cpu,
        isa=tuple(flag for flag in _ISA if flag in flags),
        physical_cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        logical_cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        governor=governor.read_text(encoding="ascii").strip() if governor.exists() else None,
        system=f"{platform.system()} {platform.release()}",
        busy_cores=round(busy_cores(seconds), 2),
    )


def busy_cores(seconds: float) -> float:
    """How many cores' worth of work the machine does while this process sleeps for `seconds`."""
    before, began = psutil.cpu_times(), time.perf_counter()
    time.sleep(seconds)
    after, took = psutil.cpu_times(), time.perf_counter() - began  # more, on a busy machine
    busy = sum(
        getattr(after, kind) - getattr(before, kind)
        for kind in ("user", "nice", "system", "irq", "softirq", "steal")
        if hasattr(after, kind)
    )
    return float(busy) / took


def read_bandwidth(threads: int, size_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """What a plain read of memory reaches on so many threads, in GB/s: the best of `repeats`.

    A dot product of a vector with itself reads each value once and computes almost nothing.
    """
    parts = [np.ones(size_bytes // 4 // threads, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            seconds = time.perf_counter() - start
            best = max(best, sum(part.nbytes for part in parts) / seconds / 1e9)
    return best


def _cpuinfo() -> tuple[str, frozenset[str]]:
    """The processor's name and its flags."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    lines = [line.partition(":") for line in text.splitlines()]
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name") or platform.machine()
    return name, frozenset((fields.get("flags") or fields.get("Features") or "").split())
