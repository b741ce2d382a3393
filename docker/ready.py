"""Whether the server of this container answers calls: exit status 0, or 1 with the reason. For health checks."""

import os
import ssl
import sys
import urllib.error
import urllib.request

# Who answers on this container's own loopback needs no proof of its name.
context = ssl._create_unverified_context()  # noqa: S323
scheme = "https" if os.environ.get("PEMA_TLS_CERTIFICATE") else "http"
port = os.environ.get("PEMA_PORT", "8000")
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
try:
    direct.open(f"{scheme}://127.0.0.1:{port}/readyz", timeout=8).close()
except (urllib.error.URLError, OSError) as error:
    sys.exit(f"not ready: {error}")
