"""The texts that options and arguments name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_owner_client.data.reading.settings import ReadingSettings
from protocol.errors import InvalidData

if TYPE_CHECKING:
    from data_owner_client.data.pair_files import PairFile
    from data_owner_client.data.pairs import Source


def pairs_of(input_file: Path | None, sources: Path | None, targets: Path | None, reading: ReadingSettings) -> PairFile:
    """The pairs of a file, or of two parallel ones.

    Raises:
        InvalidData: they were given in two ways, or only half, or cannot be read.
    """
    from data_owner_client.data.reading.reader import spool_pairs, spool_parallel

    if sources is not None and targets is not None and input_file is None:
        return spool_parallel(sources, targets, reading)
    if sources is not None or targets is not None:
        raise InvalidData("Texts were given in two ways, or only half.", hint="--input, or --sources with --targets.")
    return spool_pairs(input_file or Path("-"), reading)


def sources_of(
    texts: list[str] | None, input_file: Path | None, reading: ReadingSettings, *, trim: bool
) -> Sequence[Source]:
    """The source texts of the command line, or those and the conversations of a file.

    An invalid or blank record is an empty text.

    Args:
        texts: texts of the command line, if any.
        input_file: the file; None for standard input.
        reading: settings of reading.
        trim: remove spaces, tabs and line ends around a text of a file.

    Raises:
        InvalidData: they were given in two ways, or cannot be read.
    """
    from data_owner_client.data.pair_files import Questions
    from data_owner_client.data.reading.reader import spool_sources

    if texts and input_file is not None:
        raise InvalidData("Texts were given in two ways.", hint="Give them as arguments or with --input.")
    return texts or Questions(spool_sources(input_file or Path("-"), reading, trim=trim))
