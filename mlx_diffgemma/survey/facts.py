"""What is told of a machine, and what is not: no name of a person, a host, a folder or a file, and
no serial number."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma import __version__
from mlx_diffgemma.bench.device import load_a_core
from mlx_diffgemma.checkpoint.memory import machine, size_text

HIDDEN = "…"
_PACKAGES = ("mlx", "mlx-lm", "numpy")
_PUBLIC = ("google", "mlx-community")
_FEWEST = 3  # letters of a name that is looked for; shorter ones are parts of many words
_PATH = re.compile(r"""(['"])[^'"]*[/\\][^'"]*\1|(?:~|\b[A-Za-z]:)?[/\\][^\s'":,;()]+""")
_SECONDS = 5


def machine_facts() -> dict[str, str]:
    """What this machine is, by name; what it does not say is left out."""
    return {name: said for name, said in _facts() if said}


def _facts() -> Iterator[tuple[str, str | None]]:
    info = mx.device_info()
    yield "program", f"mlx-diffgemma {__version__}"
    yield "chip", str(info.get("device_name") or info.get("architecture") or "") or None
    yield "model", _asked("sysctl", "-n", "hw.model")
    yield "GPU", _said(lambda: str(mx.device_info(mx.gpu)["architecture"]))
    yield "GPU cores", _gpu_cores()
    yield "CPU cores", str(os.cpu_count() or "")
    yield (
        "memory",
        _said(lambda: size_text(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
    )
    held = machine()
    if held.working_set is not None:
        yield "held by the GPU at most", size_text(held.working_set)
    if held.available is not None:
        yield "available", size_text(held.available)
    limit = _asked("sysctl", "-n", "iogpu.wired_limit_mb")
    yield "iogpu.wired_limit_mb", limit
    yield "system", _system()
    yield "Python", platform.python_version()
    for name in _PACKAGES:
        yield name, _said(partial(version, name))
    if (load := load_a_core()) is not None:
        yield "load", f"{load:.1f} a core"


def _system() -> str:
    mac = platform.mac_ver()[0]
    # The release of a Linux kernel may end with a name that somebody gave it.
    number = re.match(r"\d+\.\d+", platform.release())
    name = f"macOS {mac}" if mac else f"{platform.system()} {number.group() if number else ''}"
    return f"{name.strip()}, {platform.machine()}"


def _gpu_cores() -> str | None:
    if platform.system() != "Darwin":
        return None
    found = re.search(r'"gpu-core-count" = (\d+)', _asked("ioreg", "-rc", "AGXAccelerator") or "")
    return found.group(1) if found else None


def _asked(*command: str) -> str | None:
    """What a program of macOS says; None on other systems, and where it fails."""
    if platform.system() != "Darwin":
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _said(ask: Callable[[], str]) -> str | None:
    try:
        return ask()
    except (KeyError, OSError, PackageNotFoundError, RuntimeError, ValueError):
        return None


def name_of(model: str) -> str:
    """What a model is called in public: the demo and the repositories of publishers by their name,
    others by their kind."""
    if model == "demo" or (model.count("/") == 1 and model.split("/")[0] in _PUBLIC):
        return model
    is_folder = Path(model).expanduser().is_dir()
    return "a model in a folder" if is_folder else "a model of another repository"


def without_names(text: str) -> str:
    """`text` on one line, without the paths in it and without the names of user and host."""
    for folder in (_said(lambda: str(Path.cwd())), _said(lambda: str(Path.home()))):
        if folder is not None and len(folder) > _FEWEST:
            text = text.replace(folder, "/")
    text = _PATH.sub(HIDDEN, " ".join(text.split()))
    for name in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", HIDDEN, text, flags=re.IGNORECASE)
    return text


def _names() -> list[str]:
    """Names of user and host, the longest first."""
    found = {os.environ.get(each) for each in ("USER", "LOGNAME", "USERNAME", "HOSTNAME")}
    found |= {_said(getpass.getuser), _said(lambda: Path.home().name)}
    for host in (_said(socket.gethostname), platform.node()):
        found |= {host, (host or "").partition(".")[0]}
    return sorted((name for name in found if name and len(name) >= _FEWEST), key=len, reverse=True)
