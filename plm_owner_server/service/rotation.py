"""A tenant's secret basis: it gets f' = Q f and W' = W Qᵀ, hence unchanged logits, and neither f nor W."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plm_owner_server.engines.ops.to_host import to_host

_TILE_ROWS = 16


@dataclass(frozen=True)
class RotationKey:
    """Key from which a rotation is derived.

    Attributes:
        key: secret bytes. They are derived from the server's master secret and stored nowhere.
    """

    key: bytes

    @classmethod
    def derive(cls, master_secret: bytes, tenant: str, weights_digest: str) -> RotationKey:
        """Derive the key of one tenant and one model."""
        purpose = "\0".join(["pema rotation", tenant, weights_digest])
        return cls(hmac.digest(master_secret, purpose.encode(), hashlib.sha256))

    def __repr__(self) -> str:
        """Text without the key, which could end up in a log."""
        return f"RotationKey({self.fingerprint[:12]})"

    @cached_property
    def fingerprint(self) -> str:
        """Public name of the rotation; it reveals nothing about the key."""
        return hmac.digest(self.key, b"fingerprint", hashlib.sha256).hex()

    def matrix(self, size: int) -> Tensor:
        """Q, float32 [size, size]: an orthogonal matrix, Haar-distributed.

        It is the Q of a QR decomposition of independent normal numbers, with the signs that make R's diagonal positive
        (Mezzadri 2007, arXiv math-ph/0609050). The numbers come from SHAKE-256 of the whole key, because the 64-bit
        seed of a common generator could be searched.
        """
        pairs = (size * size + 1) // 2
        bits = np.frombuffer(hashlib.shake_256(self.key).digest(16 * pairs), dtype="<u8")
        uniform = ((bits >> 11) + 1) * 2.0**-53  # in (0, 1]
        radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: size * size]
        q_D_D, r_D_D = torch.linalg.qr(torch.from_numpy(normal).view(size, size))
        haar_D_D: Tensor = q_D_D * r_D_D.diagonal().sign()
        return haar_D_D.float()


@dataclass(frozen=True)
class Rotation:
    """Rotation into the basis of one tenant.

    Attributes:
        q_D_D: Q, float32, on the device of the LM head.
    """

    q_D_D: Tensor

    def apply(self, rows_N_D: Tensor) -> Tensor:
        """Q x for every row x, [N, D] float32 on the device of the rows: representations or rows of the LM head.

        The result of a row is equal to the last bit whatever rows are beside it: a resumed memory build requests its
        rows in other groups.
        """
        count = len(rows_N_D)
        # BLAS sums in another order if the rows are few, or do not fill a tile.
        full_N_D = F.pad(rows_N_D.to(self.q_D_D.device, torch.float32), (0, 0, 0, -count % _TILE_ROWS))
        rotated_N_D = (full_N_D @ self.q_D_D.T)[:count]
        return to_host(rotated_N_D)[0] if rows_N_D.device.type == "cpu" else rotated_N_D.to(rows_N_D.device)
