"""`pema-server` that looks for renewed certificates and changed tenants at once, to be run with `-m`."""

from plm_owner_server.admission import tenant_cache
from plm_owner_server.cli import main
from plm_owner_server.transports import tls

if __name__ == "__main__":
    tls._POLL_SECONDS = 0.05
    tenant_cache._TTL_SECONDS = 0.05
    main()
