"""An OpenTelemetry span of each call, if the environment names a collector.

Spans hold what metrics hold, per call: no ids except those of the trace, and no data of the request.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from plm_owner_server.operations.call_log import PROBE, CallRecord
from protocol.errors import NotReady, PemaError, ServerFault

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# OpenTelemetry: an error that the client has caused leaves the status of the server's span unset.
_SERVER_ERRORS = frozenset(error.code for error in (PemaError, ServerFault, NotReady))
_SERVICE = {"service.name": "pema-server"}


class Traces:
    """Makes a span of each call that is over.

    Args:
        provider: takes the spans. It is not made the process's provider, so that no library adds spans with data.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("plm_owner_server")
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._error = Status(StatusCode.ERROR)

    def observe(self, call: CallRecord) -> None:
        """Make the span of a call that is over."""
        if call.name == PROBE:
            return
        # Without W3C's `tracestate`, which may hold any text of the client.
        parent = self._propagator.extract({"traceparent": call.traceparent})
        attributes: dict[str, str | int | float] = {
            "pema.call": call.name,
            "pema.transport": call.transport,
            "pema.outcome": call.outcome,
            "pema.tokens_in": call.usage.tokens,
            "pema.rows_out": call.usage.rows,
            "pema.queue_s": call.usage.queue_s,
            "pema.compute_s": call.usage.compute_s,
        }
        span = self._tracer.start_span(
            call.name, parent, self._kind, attributes=attributes, start_time=call.began_ns, record_exception=False
        )
        if call.outcome in _SERVER_ERRORS:
            span.set_status(self._error)
        span.end(call.began_ns + int(1e9 * call.seconds))

    def close(self) -> None:
        """Send all spans that are not sent yet."""
        self._provider.shutdown()


def traces_from_environment() -> Traces | None:
    """Traces as OpenTelemetry's environment variables demand. None, without any import, if they name no collector.

    Raises:
        PemaError: a collector is named, and OpenTelemetry is not installed.
    """
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if off or not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise PemaError(
            f"{' or '.join(_ENDPOINTS)} asks for traces, and OpenTelemetry is not installed.",
            hint="pip install -e '.[server,traces]', or unset it.",
        ) from error
    resource = Resource.create(None if os.environ.get("OTEL_SERVICE_NAME") else _SERVICE)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)
