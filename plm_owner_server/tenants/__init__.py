"""Who may call: tenants, their keys, and what each of them may do."""

from plm_owner_server.tenants.access import Access, Anyone, OneKey, TenantKeys, access_for
from plm_owner_server.tenants.certified import CertifiedTenants, certified_for
from plm_owner_server.tenants.store import ANYBODY, SCOPES, Scope, Tenant, TenantRecord, TenantStore

__all__ = [
    "ANYBODY",
    "SCOPES",
    "Access",
    "Anyone",
    "CertifiedTenants",
    "OneKey",
    "Scope",
    "Tenant",
    "TenantKeys",
    "TenantRecord",
    "TenantStore",
    "access_for",
    "certified_for",
]
