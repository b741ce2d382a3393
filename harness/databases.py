"""A PostgreSQL server of this machine's packages, for tests: `python -m harness.databases COMMAND…`.

The command runs with POSTGRES_URL, the address of an empty database. All of it is removed afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.processes import free_port

# Debian has the server's programs outside of PATH, in a folder for each version.
_DEBIAN = Path("/usr/lib/postgresql")
_READY_WITHIN_SECONDS = 60
# PostgreSQL does not run as root. Debian's package makes this user.
_USER = "postgres"


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs, of the newest version; None where there are none."""
    if found := shutil.which("pg_ctl"):
        return Path(found).parent
    versions = [path.parent for path in _DEBIAN.glob("*/bin/pg_ctl")]
    return max(versions, key=lambda path: int(path.parent.name), default=None)


@contextmanager
def postgres() -> Iterator[str]:
    """A new PostgreSQL server on loopback, with an empty database; gives its URL.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
        subprocess.CalledProcessError: it does not start.
    """
    programs = postgres_programs()
    if programs is None:
        raise FileNotFoundError("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pema-postgres-"))
    as_user = []
    if os.geteuid() == 0:
        shutil.chown(folder, _USER, _USER)
        as_user = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]
    data, port = folder / "data", free_port()
    control = [*as_user, str(programs / "pg_ctl"), "--pgdata", str(data), "--silent", "--wait"]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    try:
        initdb = ["--auth=trust", "--username=pema", "--encoding=UTF8", "--no-sync"]
        # pg_ctl's server keeps the output that it is given; a pipe would not end before it.
        _run([*as_user, str(programs / "initdb"), "--pgdata", str(data), *initdb], folder)
        log = str(folder / "log")
        _run([*control, "--timeout", str(_READY_WITHIN_SECONDS), "--log", log, "--options", options, "start"], folder)
        try:
            yield f"postgresql+psycopg://pema@127.0.0.1:{port}/postgres"
        finally:
            _run([*control, "--mode=immediate", "stop"], folder)
    finally:
        shutil.rmtree(folder)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run the command of the command line with a database."""
    with postgres() as url:
        done = subprocess.run(sys.argv[1:], env=os.environ | {"POSTGRES_URL": url}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
