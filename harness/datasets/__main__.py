"""Preparation of a data set: `python -m harness.datasets NAME FOLDER`; without arguments, all names."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from data_owner_client.runtime.console import print_table
from harness.datasets.catalogue import DATA_SETS
from protocol import standard_streams


def main() -> None:
    """Write a data set, or list them all."""
    standard_streams.use_utf8()
    parser = argparse.ArgumentParser(prog="python -m harness.datasets", description=__doc__)
    parser.add_argument("name", nargs="?", choices=DATA_SETS, metavar="NAME", help="name of the data set")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="folder to write it to")
    parser.add_argument("--train", type=int, help="number of training examples; default: the data set's own")
    arguments = parser.parse_args()
    if arguments.name is None:
        print_table(_table())
    elif arguments.folder is None:
        parser.error("FOLDER is missing: the folder to write the data set to.")
    else:
        sizes = {} if arguments.train is None else {"train": arguments.train}
        DATA_SETS[arguments.name].prepare(arguments.folder, **sizes)


def _table() -> Table:
    table = Table("name", "kind", "source → target", "packages", "licence", title="Data sets")
    for name, data in DATA_SETS.items():
        table.add_row(name, data.kind, data.content, ", ".join(data.packages), data.licence)
    return table


if __name__ == "__main__":
    main()
