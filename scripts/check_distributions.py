"""Check what the wheel and the source distribution hold.

    python -m build && python scripts/check_distributions.py dist

The wheel holds the modules of the program and of the converter, the demo's checkpoints, the page,
`py.typed` and the licence, all as in this repository, and nothing else. The source distribution
holds what a wheel is built from.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"mlx_diffgemma": ROOT, "mlx_diffgemma_convert": ROOT / "convert"}
DATA = (
    "mlx_diffgemma/demo/checkpoint",
    "mlx_diffgemma/demo/reader",
    "mlx_diffgemma/server/static",
)
BUILT_FROM = ("LICENSE", "README.md", "pyproject.toml")
_BUILD = ("PKG-INFO", "setup.cfg", "mlx_diffgemma.egg-info/")  # what setuptools adds to a source


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with one wheel and one source archive")
    folder = parser.parse_args().folder
    try:
        (wheel,) = folder.glob("*.whl")
        (source,) = folder.glob("*.tar.gz")
    except ValueError:
        sys.exit(f"{folder} must hold one wheel and one source archive; empty it and build again.")
    faults = [*check_wheel(wheel), *check_source(source)]
    sys.exit("\n".join(faults) if faults else 0)


def shipped() -> dict[str, bytes]:
    """What the program needs, by its name in the wheel."""
    found = {}
    for package, base in PACKAGES.items():
        for path in (base / package).rglob("*"):
            folder = path.parent.relative_to(base).as_posix()
            data = folder in DATA
            if path.is_file() and (path.suffix == ".py" or path.name == "py.typed" or data):
                found[path.relative_to(base).as_posix()] = path.read_bytes()
    return found


def check_wheel(path: Path) -> Iterator[str]:
    """One line for each fault of a wheel."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    about = {name for name in content if name.split("/")[0].endswith(".dist-info")}
    yield from _differences(path, shipped(), {n: c for n, c in content.items() if n not in about})
    if not any(name.endswith("/licenses/LICENSE") for name in about):
        yield f"{path.name} lacks LICENSE."


def check_source(path: Path) -> Iterator[str]:
    """One line for each fault of a source distribution."""
    with tarfile.open(path) as archive:
        content = {
            member.name.partition("/")[2]: file.read()
            for member in archive
            if (file := archive.extractfile(member)) is not None
        }
    wanted = {
        (PACKAGES[name.split("/")[0]] / name).relative_to(ROOT).as_posix(): data
        for name, data in shipped().items()
    } | {name: (ROOT / name).read_bytes() for name in BUILT_FROM}
    rest = {n: c for n, c in content.items() if not n.startswith(_BUILD) and n != "MANIFEST.in"}
    yield from _differences(path, wanted, rest)


def _differences(path: Path, wanted: dict[str, bytes], found: dict[str, bytes]) -> Iterator[str]:
    yield from _lines(path, "lacks", wanted.keys() - found.keys())
    yield from _lines(path, "should not hold", found.keys() - wanted.keys())
    differ = (name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    yield from _lines(path, "holds another version of", differ)


def _lines(path: Path, what: str, names: Iterable[str]) -> Iterator[str]:
    for name in sorted(names):
        yield f"{path.name} {what} {name}."


if __name__ == "__main__":
    main()
