"""Health check of the server in this container: exits with 0 if it answers calls, else with 1 and the reason."""

import os
import re
import ssl
import sys
import urllib.error
import urllib.request


def port_of(variable: str, default: int) -> int:
    """The port that a variable sets. Kubernetes sets such variables to addresses, for a Service named pema."""
    value = os.environ.get(variable, "").strip()
    return int(value) if value.isdecimal() else default


# A server on this container's loopback need not prove its name.
context = ssl._create_unverified_context()  # noqa: S323
scheme = "https" if os.environ.get("PEMA_TLS_CERTIFICATE") else "http"
url = f"{scheme}://127.0.0.1:{port_of('PEMA_PORT', 8000)}/readyz"
demands_certificates = bool(os.environ.get("PEMA_TLS_CLIENT_CA"))
if demands_certificates:  # and there is none here: the metrics say the same
    url = f"http://127.0.0.1:{port_of('PEMA_METRICS_PORT', 9100)}/metrics"
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
try:
    with direct.open(url, timeout=8) as answer:
        if demands_certificates and not re.search(rb"^pema_ready 1", answer.read(), re.MULTILINE):
            sys.exit("not ready, say the metrics")
except (urllib.error.URLError, OSError) as error:
    sys.exit(f"not ready: {error}")
