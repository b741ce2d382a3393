"""Entities that Microsoft's presidio finds, on this machine; imported only where rules want it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_owner_client.data.redaction.spans import Span
from protocol.errors import Unsupported


class PresidioFinder:
    """Finds entities by presidio.

    Args:
        language: language of the texts, such as `en`.
        entities: kinds of entities, such as `PERSON`; empty for all that presidio knows.
        model: installed spaCy model, or its folder, which finds names and places; empty for presidio's patterns alone.

    Raises:
        Unsupported: presidio or the model is not installed, or presidio lacks the language or an entity.
    """

    def __init__(self, language: str, entities: Sequence[str], model: str) -> None:
        try:
            from presidio_analyzer import AnalyzerEngine
            from presidio_analyzer.nlp_engine import NlpEngineProvider
        except ImportError as error:
            raise Unsupported(
                "The rules want presidio, which is not installed.", hint="pip install 'pema[client,redaction]'"
            ) from error
        if model:
            _require_model(model)
        # An engine without a model needs a name for it nevertheless.
        models = [{"lang_code": language, "model_name": model or "none"}]
        configuration = {"nlp_engine_name": "spacy" if model else "no_op", "models": models}
        try:
            engine = NlpEngineProvider(nlp_configuration=configuration).create_engine()
            self._engine = AnalyzerEngine(nlp_engine=engine, supported_languages=[language])
            known = set(self._engine.get_supported_entities(language))
        except ValueError as error:
            raise Unsupported(
                f"presidio cannot be used for the language {language!r}: {error}", hint="Use another language or model."
            ) from error
        if unknown := sorted({*entities} - known):
            raise Unsupported(
                f"presidio finds no {', '.join(unknown)} in this language{'' if model else ' without a model'}.",
                hint=f"It finds {', '.join(sorted(known))}.",
            )
        self._language = language
        self._entities = list(entities) or None

    def __call__(self, text: str) -> Iterator[Span]:
        """Yield all entities."""
        found = self._engine.analyze(text=text, language=self._language, entities=self._entities)
        return (Span(each.start, each.end, each.entity_type.lower()) for each in found)


def _require_model(model: str) -> None:
    """Require a model that is there, as presidio would else download it.

    Raises:
        Unsupported: it is not installed.
    """
    from spacy.util import is_package

    if not is_package(model) and not Path(model).is_dir():
        raise Unsupported(f"The spaCy model {model} is not installed.", hint=f"python -m spacy download {model}")
