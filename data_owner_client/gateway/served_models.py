"""The models of a gateway: adapters by name, whose folders are watched, and the PLM alone as their parent."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import InvalidData, InvalidRequest, PemaError

_log = logging.getLogger(__name__)
_CHECK_SECONDS = 1.0
_FILES = ("adapter.json", "adapter.safetensors", "pairs.jsonl")
# Times and sizes of an adapter's files; None for a file that is missing.
_Stamp = tuple[tuple[int, int, int] | None, ...]


class UnknownModel(InvalidRequest):
    """The gateway serves no model of this name."""

    code = "model_not_found"
    http_status = 404


@dataclass(frozen=True)
class ServedModel:
    """One version of a model. It never changes, so that a request keeps the version that it began with.

    Attributes:
        name: name by which applications choose it.
        adapter: the adapter; None for the PLM alone.
        version: digest of the adapter's card, which has that of its tensors; of the PLM alone, its own digest.
        created: time of the adapter's card, in seconds since 1970; of the PLM alone, 0.
        folder: folder of the adapter; None for the PLM alone.
    """

    name: str
    adapter: TrainedAdapter | None
    version: str
    created: int
    folder: Path | None


class ServedModels:
    """Adapters by name, and the PLM alone by its own.

    A thread looks for new versions of the adapters. A version that cannot be used, such as one that is half written,
    damaged or of another model, never replaces one that can.

    Args:
        plm: the PLM.
        folders: the adapters' folders by name.
        check_seconds: seconds between two looks at the folders; None for no thread.

    Raises:
        InvalidRequest: an adapter has the name of the PLM.
        InvalidData: a folder holds no adapter, or a damaged one; the message names the adapter.
        IdentityMismatch: an adapter belongs to another model than the server's; the message names the adapter.
    """

    def __init__(
        self, plm: RemotePlm, folders: Mapping[str, Path], *, check_seconds: float | None = _CHECK_SECONDS
    ) -> None:
        self._plm = plm
        self._folders = dict(folders)
        self._models: dict[str, ServedModel] = {}
        self._stamps = {name: _stamp(folder) for name, folder in self._folders.items()}
        self._problems: dict[str, str] = {}
        if plm.card.name in self._folders:
            raise InvalidRequest(
                f"The adapter {plm.card.name} has the name of the owner's model.", hint="Give it another name."
            )
        for name, folder in self._folders.items():
            self._models[name] = self._load(name, folder)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if check_seconds is not None:
            self._thread = threading.Thread(target=self._watch, args=(check_seconds,), name="adapters", daemon=True)
            self._thread.start()

    def get(self, name: str) -> ServedModel:
        """The newest usable version of a model; without a name, of the first.

        Raises:
            UnknownModel: there is none of this name.
            IdentityMismatch: the owner's server has another model than the adapter's.
        """
        name = name or self.all()[0].name
        if name == self._plm.card.name:
            return self._alone
        model = self._models.get(name)
        if model is None or model.adapter is None:
            raise UnknownModel(
                "There is no model of this name.",
                hint=f"Choose one of {', '.join(each.name for each in self.all())}.",
            )
        # The card may have been read again since the version was loaded.
        self._require_same_model(name, model.adapter)
        return model

    def all(self) -> list[ServedModel]:
        """All models: the adapters in the order of the command line, then the PLM alone."""
        return [*self._models.values(), self._alone]

    @property
    def problems(self) -> dict[str, str]:
        """Reasons for which newer files of an adapter are not used, by its name; empty if all is well."""
        return dict(self._problems)

    def check(self) -> None:
        """Look at the folders once, and take over each new version that can be used."""
        for name, folder in self._folders.items():
            stamp = _stamp(folder)
            if stamp == self._stamps[name]:
                continue
            # Taken before the files are read: what changes meanwhile is seen at the next look.
            self._stamps[name] = stamp
            self._take_over(name, folder)

    def close(self) -> None:
        """Watch the folders no longer."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def _alone(self) -> ServedModel:
        card = self._plm.card
        return ServedModel(card.name, None, card.digest[:16], 0, None)

    def _watch(self, check_seconds: float) -> None:
        while not self._closed.wait(check_seconds):
            self.check()

    def _take_over(self, name: str, folder: Path) -> None:
        try:
            model = self._load(name, folder)
        except PemaError as error:
            self._problems[name] = error.detail
            _log.warning("%s The version before stays in use.", error.detail)
            return
        self._problems.pop(name, None)
        if model.version != self._models[name].version:
            self._models = self._models | {name: model}
            _log.info("The adapter %s is now version %s.", name, model.version)

    def _load(self, name: str, folder: Path) -> ServedModel:
        """Read an adapter's files.

        Raises:
            InvalidData: there is no adapter, or a damaged one.
            IdentityMismatch: the adapter belongs to another model.
        """
        try:
            created = int((folder / _FILES[0]).stat().st_mtime)
            adapter = TrainedAdapter.load(folder)
        except OSError as error:
            raise InvalidData(
                f"The adapter {name} cannot be read from {folder}: {error.strerror}.",
                hint="Give the folder that train wrote, which this user must be able to read.",
            ) from error
        except InvalidData as error:
            raise InvalidData(f"The adapter {name} cannot be used: {error.detail}", hint=error.hint) from error
        self._require_same_model(name, adapter)
        version = hashlib.sha256(adapter.card.model_dump_json().encode()).hexdigest()[:16]
        return ServedModel(name, adapter, version, created, folder)

    def _require_same_model(self, name: str, adapter: TrainedAdapter) -> None:
        served = ModelIdentity.from_card(self._plm.card)
        adapter.card.model.require(served, f"The adapter {name}", "the server")


def _stamp(folder: Path) -> _Stamp:
    return tuple(_stamp_of_file(folder / name) for name in _FILES)


def _stamp_of_file(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
