"""How much memory there is, and how much a process has used."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now; 4 GiB where the system doesn't say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * 2**30


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that an allocation failed, on the accelerator or in main memory."""
    return isinstance(error, torch.OutOfMemoryError) or out_of_main_memory(error)


def out_of_main_memory(error: RuntimeError) -> bool:
    """Whether an error says that an allocation failed in main memory."""
    return "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def pictures_in_main_memory() -> Iterator[None]:
    """Raises MemoryError where main memory runs out: torch's own error names only the bytes that were one too many."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_main_memory(error):
            raise
        free = available_memory(torch.device("cpu")) / 2**20
        raise MemoryError(
            "main memory ran out: the pictures on the way take about 60 bytes there for each pixel of the result, and "
            f"{free:.0f} MiB are free. Close other programs, or choose a smaller result"
        ) from error


def resident_memory(device: torch.device) -> int:
    """Bytes in use now: allocated tensors on CUDA, the process's resident set on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def reset_peak_memory(device: torch.device) -> None:
    """Start counting the peak anew (on the CPU: Linux only, elsewhere it counts since the process started)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes in use at most since the count was reset; as `resident_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0  # not known without further packages
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
