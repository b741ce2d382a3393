"""The digest of a model folder: what its function of token ids is made of, and nothing else."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from plm_owner_server.engines.model_files.weights import Tensors, open_weights, weight_files
from plm_owner_server.logs import logged_while
from protocol.codec import raw_bytes
from protocol.cores import usable_cores
from protocol.errors import Unsupported

log = logging.getLogger(__name__)

# Keys of config.json that change no logit: provenance, labels, and settings of training and generation.
_WITHOUT_EFFECT = frozenset(
    {
        *("_attn_implementation_autoset", "_commit_hash", "_name_or_path", "name_or_path", "transformers_version"),
        *("attention_dropout", "attn_pdrop", "dropout", "embd_pdrop", "hidden_dropout", "initializer_range"),
        *("layerdrop", "resid_pdrop", "activation_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"),
        *("bos_token_id", "eos_token_id", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
        *("dtype", "torch_dtype"),  # the server's own setting decides
        *("id2label", "label2id", "finetuning_task", "problem_type", "task_specific_params", "tokenizer_class"),
        *("auto_map", "transformers.js_config"),  # of code that is not run here
    }
)
_DIGEST = re.compile("[0-9a-f]{64}")
_GIB = 2**30


def digest_folder(folder: Path, cache_dir: Path | None = None) -> str:
    """SHA-256 of a model folder's weights and configuration, in hexadecimal.

    It covers the name, dtype, shape and bytes of every tensor, however they are divided into files. Of `config.json`
    it covers each key that may change a logit, in any order. Tokenizer and template have a digest of their own.

    Args:
        folder: folder in the Hugging Face layout.
        cache_dir: folder to record digests of weight files in, so that unchanged files are read only once; None to
            read them always.

    Raises:
        Unsupported: the weights or the configuration are missing or damaged.
    """
    parts = [_config_digest(folder / "config.json"), _weights_digest(weight_files(folder), cache_dir)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _config_digest(path: Path) -> str:
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_float=_number)
    except (OSError, ValueError) as error:
        raise Unsupported(
            f"{path} cannot be read as JSON: {error}.", hint="Copy or download the model again."
        ) from None
    return hashlib.sha256(json.dumps(_effective(config), sort_keys=True).encode()).hexdigest()


def _number(text: str) -> int | float:
    """A JSON number; 10000.0 is the same as 10000."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _effective(config: Any) -> Any:
    """A configuration without the keys that change no logit, also in the models' configurations within it."""
    if not isinstance(config, dict):
        return config
    return {
        key: _effective(value) if key.endswith("_config") and key != "quantization_config" else value
        for key, value in config.items()
        if key not in _WITHOUT_EFFECT
    }


def _weights_digest(files: Sequence[Path], cache_dir: Path | None) -> str:
    """The digest of the tensors in these files, from the record of an earlier start if no file has changed."""
    if cache_dir is None:
        return _read_digest(files)
    # A file that is written again has another time of change, even of the same size.
    identity = [[str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ino] for path in files]
    record = cache_dir / f"digest-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"
    with suppress(OSError, ValueError):  # no such record, or one that cannot be read
        if _DIGEST.fullmatch(digest := record.read_text(encoding="ascii")):
            return digest
    digest = _read_digest(files)
    try:
        _write(record, digest)
    except OSError as error:  # such as a folder that is read-only: then the next start reads the files again
        log.info("the digest is not recorded in %s: %s", cache_dir, error.strerror)
    return digest


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.partial-") as scratch:
        file = Path(scratch) / path.name
        file.write_text(text, encoding="ascii")
        os.replace(file, path)


def _read_digest(files: Sequence[Path]) -> str:
    gib = sum(path.stat().st_size for path in files) / _GIB
    with logged_while(log, f"computing the digest of {gib:.1f} GiB of weights"):
        lines = sorted(line for path in files for line in _tensor_lines(path))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensor_lines(path: Path) -> Iterator[str]:
    """A line for each tensor of a file: its name, dtype, shape and the SHA-256 of its bytes."""
    with open_weights(path) as tensors, ThreadPoolExecutor(usable_cores()) as threads:
        yield from threads.map(lambda name: _tensor_line(name, tensors), tensors)


def _tensor_line(name: str, tensors: Tensors) -> str:
    tensor = tensors[name]()
    digest = hashlib.sha256(raw_bytes(tensor)).hexdigest()
    return json.dumps([name, str(tensor.dtype), list(tensor.shape), digest])
