"""Step 1: what the walk runs on, and whether the package finds its kernels there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from bench.minutes.cases import Case, NotTriedError, Row, Scale

ROOT = Path(__file__).parents[2]
LEAST_TORCH = (2, 11)
"""The first that multiplies 16-bit operands into float32 sums by the vendor's library."""
POWER = ("power.draw", "power.limit", "clocks.sm", "clocks.max.sm", "temperature.gpu")


def cases(scale: Scale) -> list[Case]:
    return [
        Case(name="provenance", run=provenance_of_the_walk),
        Case(name="torch", run=torch_version),
        Case(name="device", run=lambda: device(scale)),
        Case(name="power", run=lambda: power(scale)),
        Case(name="memory", run=lambda: memory(scale)),
        Case(name="kernels", run=lambda: kernels(scale)),
    ]


def provenance_of_the_walk() -> Row:
    """Versions, commit and machine as every figure has them; without transformers those that there are."""
    try:
        from tvkd_fast.commands.demo import provenance
    except ImportError as missing:
        return {"shown": f"{missing}: torch alone", "provenance": {"torch": torch.__version__}}
    known = provenance()
    return {"shown": f"commit {known['commit']}, Python {known['python']}", "provenance": known}


def torch_version() -> Row:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < LEAST_TORCH:
        raise ValueError(f"torch {torch.__version__} is older than 2.11: name another interpreter, make gpu PYTHON=…")
    return {"shown": torch.__version__}


def device(scale: Scale) -> Row:
    """The device, its driver and the packages that matter; without a device the walk stops."""
    if not (scale.dry or torch.cuda.is_available()):
        why = f"torch {torch.__version__} finds no CUDA or ROCm device: look at nvidia-smi or rocm-smi, or walk it dry"
        return {"failed": why, "stops": True}
    scale.needs_gpu()
    from bench.gpu.comparison import device_facts

    facts = device_facts()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    shown = f"{facts['device']}, {facts['memory_gb']} GB, driver {facts['driver']}, {facts['toolkit']}; {versions}"
    return {"shown": shown, "facts": facts}


def power(scale: Scale) -> Row:
    """Power, clocks and temperature at rest: a capped or hot device explains slow kernels."""
    scale.needs_gpu()
    return {"shown": power_now()}


def power_now() -> str:
    """What nvidia-smi says of the device at this moment."""
    command = ["nvidia-smi", f"--query-gpu={','.join(POWER)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as missing:
        raise NotTriedError(f"nvidia-smi does not say: {missing}") from missing
    values = dict(zip(POWER, (x.strip() for x in done.stdout.splitlines()[0].split(",")), strict=False))
    return ", ".join(f"{name} {value}" for name, value in values.items())


def memory(scale: Scale) -> Row:
    """Free memory, and the workspace that the kernels take of all of it."""
    scale.needs_gpu()
    from tvkd_fast.kernels.blocks import workspace_bytes

    free, whole = torch.cuda.mem_get_info()
    workspace = workspace_bytes(torch.empty(1, device="cuda"))
    return {"shown": f"{free / 2**30:.1f} of {whole / 2**30:.1f} GiB free, workspace {workspace / 2**20:.0f} MiB"}


def kernels(scale: Scale) -> Row:
    """The kernels' folder through its link, and the target that the device's tiles are of."""
    link = ROOT / "tvkd_fast" / "kernels"
    if not link.is_dir():
        raise ValueError(f"{link.relative_to(ROOT)} is no folder: make the link anew, ln -sfn ../kernels {link.name}")
    if link.resolve() != (ROOT / "kernels").resolve():
        raise ValueError(f"{link.relative_to(ROOT)} leads to {link.resolve().name}, not to kernels/: link it anew")
    from tvkd_fast.kernels.launch import target_of
    from tvkd_fast.kernels.products import library_sums

    if not scale.dry:
        scale.needs_gpu()
    target = target_of(torch.empty(1, device=scale.device))
    sums = [str(x) for x in scale.dtypes if library_sums(torch.device(scale.device), x)]
    return {"shown": f"tiles of {target}; the library sums in float32 for {', '.join(sums) or 'no dtype'}"}
