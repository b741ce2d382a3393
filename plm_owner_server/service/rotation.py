"""A secret basis: a tenant sees f' = Q f and W' = W Qᵀ, so all logits as they are, and neither f nor W."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_ROWS = 16


@dataclass(frozen=True)
class RotationKey:
    """What a rotation follows from.

    Attributes:
        key: secret; from the server's master secret, so it is kept nowhere.
    """

    key: bytes

    @classmethod
    def derive(cls, master_secret: bytes, tenant: str, weights_digest: str) -> RotationKey:
        """A key of its own for every tenant and model."""
        purpose = "\0".join(["pema rotation", tenant, weights_digest])
        return cls(hmac.digest(master_secret, purpose.encode(), hashlib.sha256))

    def __repr__(self) -> str:
        """Without the key: it could end up in a log."""
        return f"RotationKey({self.fingerprint[:12]})"

    @cached_property
    def fingerprint(self) -> str:
        """Names the rotation, and tells nothing of it."""
        return hmac.digest(self.key, b"fingerprint", hashlib.sha256).hex()

    def matrix(self, size: int) -> Tensor:
        """Q, float32 [size, size]: orthogonal, and any of them as likely as any other (Haar).

        The Q of a QR decomposition of independent normal numbers, with the signs that make R's diagonal positive
        (Mezzadri 2007, arXiv math-ph/0609050). The numbers come from SHAKE-256 of the whole key: the 64 bits that seed
        a common generator could be searched.
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
    """The basis of one tenant.

    Attributes:
        q_D_D: Q, float32, on the device that multiplies.
    """

    q_D_D: Tensor

    def apply(self, rows_N_D: Tensor) -> Tensor:
        """Q x for every row x, representations as well as rows of the LM head; float32, where they were.

        To the last bit the same, whatever rows are beside it: a memory that was interrupted asks for others at a time.
        """
        count = len(rows_N_D)
        # BLAS sums in another order where the rows are few, or do not fill a tile.
        full_N_D = F.pad(rows_N_D.to(self.q_D_D.device, torch.float32), (0, 0, 0, -count % _TILE_ROWS))
        return (full_N_D @ self.q_D_D.T)[:count].to(rows_N_D.device)
