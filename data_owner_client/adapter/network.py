"""The adapter's network: a few low-rank matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_owner_client.adapter.types import AdapterForm
from protocol.head import LMHead

RECENT_TOKENS = 2
"""Previous tokens that the form `recent` sees."""


class Adapter(nn.Module):
    """A ∈ R^{R×D}, B_pd ∈ R^{D×R} (prediction) and B_rct ∈ R^{D×R} (reconstruction), all float32.

    Representations are divided by `rms`, their root mean square over the memory, so that one learning rate suits every
    model. The product is multiplied by `rms` again, so that the head sees its usual scale.

    Args:
        hidden_size: D.
        rank: R.
        form: formula of h_pd, see `adapter.trained`.
        rms: root mean square of the memory's representations.
        head_rms: root mean square of the LM head's rows.
        dropout: probability with which a coordinate of A f is dropped in training.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        form: AdapterForm,
        *,
        rms: float = 1.0,
        head_rms: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.form: AdapterForm = form
        self.A = nn.Linear(hidden_size, rank, bias=False)
        self.B_pd = nn.Linear(rank, hidden_size, bias=False)
        self.B_rct = nn.Linear(rank, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.rms: Tensor
        self.register_buffer("rms", torch.tensor(rms))
        if form != "paper":
            nn.init.zeros_(self.B_pd.weight)
        if form == "recent":
            self.E = nn.Linear(RECENT_TOKENS * hidden_size, rank, bias=False)
            self.mismatch_scale = nn.Parameter(torch.tensor(0.5))
            self.head_rms: Tensor
            self.register_buffer("head_rms", torch.tensor(head_rms))

    @property
    def rank(self) -> int:
        """R."""
        return self.A.out_features

    def logprobs(self, head: LMHead, cr_N_D: Tensor, previous_N_P: Tensor, matches_N: Tensor | None = None) -> Tensor:
        """log P_PEMA over the candidates [N, C], float32.

        Args:
            head: LM-head rows of the C candidates.
            cr_N_D: representations.
            previous_N_P: see `recent_features`.
            matches_N: see `scaled`.
        """
        recent_N_F = self.recent_features(head, previous_N_P)
        return head.logits(self.hidden(self.scaled(cr_N_D, matches_N), recent_N_F)).log_softmax(dim=-1)

    def scaled(self, cr_N_D: Tensor, matches_N: Tensor | None = None) -> Tensor:
        """x = f / rms in float32; the form `recent` scales mismatched contexts by `mismatch_scale`.

        Args:
            cr_N_D: representations.
            matches_N: bool, True where the context ends as the true context does; None for True everywhere.
        """
        x_N_D = cr_N_D.float() / self.rms
        if self.form != "recent" or matches_N is None:
            return x_N_D
        return x_N_D * torch.where(matches_N, 1.0, self.mismatch_scale)[:, None]

    def recent_features(self, head: LMHead, previous_N_P: Tensor) -> Tensor | None:
        """e, the scaled head rows of the P previous tokens [N, P·D]; None for the other forms.

        Args:
            head: LM-head rows of the candidates.
            previous_N_P: int64 index of each token among the candidates, the newest first; −1 for none.
        """
        if self.form != "recent":
            return None
        rows_N_P_D = head.weight_V_D[previous_N_P.clamp(min=0)] / self.head_rms
        return (rows_N_P_D * (previous_N_P >= 0)[:, :, None]).flatten(1)

    @torch.no_grad()
    def rotate_back(self, axes_D_D: Tensor) -> None:
        """Convert weights trained in rotated coordinates to the original coordinates, in place.

        Args:
            axes_D_D: orthogonal, one axis a row; training saw the products of representations and head rows with them.
        """
        self.A.weight.copy_(self.A.weight @ axes_D_D)
        for decoder in (self.B_pd, self.B_rct):
            decoder.weight.copy_(axes_D_D.T @ decoder.weight)
        if self.form == "recent":
            self.E.weight.copy_((self.E.weight.unflatten(1, (RECENT_TOKENS, -1)) @ axes_D_D).flatten(1))

    def reconstruction(self, x_N_D: Tensor) -> Tensor:
        """B_rct A x for scaled representations x."""
        result: Tensor = self.B_rct(self.dropout(self.A(x_N_D)))
        return result

    def hidden(self, x_N_D: Tensor, recent_N_F: Tensor | None = None) -> Tensor:
        """h_pd, the head's input, for scaled representations x and the result of `recent_features`."""
        z_N_R: Tensor = self.A(x_N_D)
        if recent_N_F is not None:
            z_N_R = z_N_R + self.E(recent_N_F)
        update_N_D: Tensor = self.B_pd(self.dropout(z_N_R))
        return (update_N_D if self.form == "paper" else x_N_D + update_N_D) * self.rms
