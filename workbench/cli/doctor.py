"""`wb doctor`: whether this machine can run Workbench, and with what."""

from __future__ import annotations

from typing import Any

from workbench.cli.common import EXIT_USAGE, Command, Output, size_text

CORE = ("torch", "transformers", "safetensors", "tokenizers", "peft", "typer", "rich", "pydantic", "numpy", "xxhash")
EXTRAS = {
    "te": ("transformer-engine",),
    "track": ("tensorboard", "wandb"),
    "datasets": ("datasets",),
    "harness": ("lm-eval",),
    "interop": ("megatron-core",),
}


def doctor(out: Output) -> int | None:
    """Show versions, cores, memory, devices, communication backends and extras; name what is missing."""
    from workbench.run_folder import environment, versions

    found = environment()
    found["versions"] = {"workbench": found["versions"].get("workbench", "not installed"), **versions(CORE)}
    found["extras"] = {name: versions(packages) for name, packages in EXTRAS.items()}
    problems = [f"{name} is not installed; run `make install`" for name in CORE if name not in found["versions"]]
    if "torch" in found["versions"]:
        found["torch"] = _torch()
        if "gloo" not in found["torch"]["backends"]:
            problems.append("this torch has no gloo, so ranks cannot talk on the CPU; install a build that has it")
    found["problems"] = problems
    out.result(found, text=_text(found))
    return EXIT_USAGE if problems else None


def _torch() -> dict[str, Any]:
    import torch

    from workbench.parallel.backends import available_backends

    devices = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return {"devices": devices or ["cpu"], "threads": torch.get_num_threads(), "backends": list(available_backends())}


def _text(found: dict[str, Any]) -> str:
    torch = found.get("torch", {"devices": [], "backends": [], "threads": 0})
    rows = [
        ("python", f"{found['python']}  {found['executable']}"),
        ("machine", f"{found['cpus']} cores, {size_text(found['memory_bytes'])}, {found['platform']}"),
        ("devices", f"{', '.join(torch['devices'])}; {torch['threads']} threads"),
        ("backends", ", ".join(torch["backends"])),
        ("packages", "  ".join(f"{name} {version}" for name, version in found["versions"].items())),
    ]
    for extra, packages in found["extras"].items():
        have = "  ".join(f"{name} {version}" for name, version in packages.items())
        rows.append((f"extra {extra}", have or f"not installed (pip install 'workbench[{extra}]')"))
    rows += [("problem", problem) for problem in found["problems"]] or [("verdict", "nothing is missing")]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


COMMAND = Command("doctor", doctor, panel="Start", order=40, example="wb doctor\nwb doctor --json")
