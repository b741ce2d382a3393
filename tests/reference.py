"""PEMA in one process, slow and obvious: the truth that client and server together are compared with.

Full logits in float64, one sequence and one position at a time, no cache, no batches, no look-ahead, no candidate rows:
P_PEMA is a vector over all of V that is 0 for tokens that never occur as a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel


class Reference:
    """The PLM in float64, and the method on top of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.double()

    @torch.inference_mode()
    def context(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """f(c) [D] and P_PLM(· | c) [V] of the context that these tokens are."""
        ids = torch.tensor([list(token_ids)])
        out = self.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][0, -1], out.logits[0, -1].softmax(-1)

    def teacher_forced(self, prompt: Sequence[int], target: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The memory's rows for one pair: (f(prompt + y_<i), y_i)."""
        return [(self.context([*prompt, *target[:i]])[0], y) for i, y in enumerate(target)]

    def private(self, prompt: Sequence[int], target: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The memory's rows for one pair: (f(prompt + ŵ_<i), y_i), ŵ being the PLM's greedy continuation."""
        rows, continued = [], list(prompt)
        for y in target:
            f_D, p_V = self.context(continued)
            rows.append((f_D, y))
            continued.append(int(p_V.argmax()))
        return rows

    def logits_of(self, h_D: Tensor) -> Tensor:
        """Logits of a last hidden state [V]."""
        head = self.model.get_output_embeddings()
        logits_V = head.weight @ h_D + (0 if head.bias is None else head.bias)
        config = self.model.config
        logits_V = (
            logits_V * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1)
        )
        cap = getattr(config, "final_logit_softcapping", None)
        capped_V: Tensor = logits_V if cap is None else cap * torch.tanh(logits_V / cap)
        return capped_V

    @torch.inference_mode()
    def pema(
        self,
        f_D: Tensor,
        weights: dict[str, Tensor],
        form: str,
        targets: Sequence[int],
        generated: Sequence[int] = (),
    ) -> Tensor:
        """P_PEMA(· | c) [V]: softmax(head(B_pd A f)) over the tokens that are targets, f added but in the paper's form.

        In the form `recent`, E times the head rows of the last two tokens is added to A f.
        """
        z_R = weights["A.weight"].double() @ f_D
        if form == "recent":
            rows = [self._row(token, targets) for token in (*reversed(generated[-2:]), None, None)][:2]
            e_E = torch.cat(rows) / weights["head_rms"].double()
            z_R = z_R + weights["rms"].double() * (weights["E.weight"].double() @ e_E)
        h_D = weights["B_pd.weight"].double() @ z_R
        logits_V = self.logits_of(h_D if form == "paper" else h_D + f_D)
        masked_V = torch.full_like(logits_V, -math.inf)
        masked_V[list(targets)] = logits_V[list(targets)]
        return masked_V.softmax(-1)

    def _row(self, token: int | None, targets: Sequence[int]) -> Tensor:
        weight_V_D = self.model.get_output_embeddings().weight
        return weight_V_D[token] if token is not None and token in targets else torch.zeros_like(weight_V_D[0])

    def label_logprobs(
        self,
        prompt: Sequence[int],
        labels: Sequence[Sequence[int]],
        weights: dict[str, Tensor],
        form: str,
        targets: Sequence[int],
        lambdas: Sequence[float],
        own_prompt: Sequence[int] | None = None,
        gate: dict[str, list[float]] | None = None,
    ) -> list[float]:
        """log P of each label's tokens in the mixture, one after another; the arguments are those of `decode`."""
        logprobs = []
        for label in labels:
            logprob = 0.0
            for t, token in enumerate(label):
                f_D, p_plm_V = self.context([*prompt, *label[:t]])
                weight = lambdas[t]
                if weight or gate is not None:
                    if own_prompt is not None:
                        f_D, _ = self.context([*own_prompt, *label[:t]])
                    p_pema_V = self.pema(f_D, weights, form, targets, label[:t])
                    if gate is not None:
                        weight = gated(gate, p_plm_V, p_pema_V, targets, t)
                    p_plm_V = (1 - weight) * p_plm_V + weight * p_pema_V
                logprob += math.log(p_plm_V[token].item())
            logprobs.append(logprob)
        return logprobs

    def decode(
        self,
        prompt: Sequence[int],
        weights: dict[str, Tensor],
        form: str,
        targets: Sequence[int],
        lambdas: Sequence[float],
        stop_ids: frozenset[int],
        own_prompt: Sequence[int] | None = None,
        gate: dict[str, list[float]] | None = None,
        length_reward: float = 0.0,
    ) -> list[int]:
        """Greedy decoding of (1 − λ_t)·P_PLM + λ_t·P_PEMA, a token for each λ until a stop token.

        P_PEMA is that of the same tokens behind `own_prompt`, where it is given. A gate gives λ_t instead. The
        length reward makes stop tokens that are targets less probable by a factor, where λ_t is not 0.
        """
        generated: list[int] = []
        for weight in lambdas:
            mixture_V, _ = self.mixture(
                prompt, generated, weights, form, targets, weight, stop_ids, own_prompt, gate, length_reward
            )
            generated.append(int(mixture_V.argmax()))
            if generated[-1] in stop_ids:
                break
        return generated

    def mixture(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        weights: dict[str, Tensor],
        form: str,
        targets: Sequence[int],
        weight: float,
        stop_ids: frozenset[int],
        own_prompt: Sequence[int] | None = None,
        gate: dict[str, list[float]] | None = None,
        length_reward: float = 0.0,
    ) -> tuple[Tensor, int]:
        """The mixture behind the generated tokens [V], and the PLM's top-1; the arguments are those of `decode`."""
        f_D, p_plm_V = self.context([*prompt, *generated])
        if own_prompt is not None:
            f_D, _ = self.context([*own_prompt, *generated])
        p_pema_V = self.pema(f_D, weights, form, targets, generated)
        if gate is not None:
            weight = gated(gate, p_plm_V, p_pema_V, targets, len(generated))
        mixture_V = (1 - weight) * p_plm_V + weight * p_pema_V
        if weight > 0:
            mixture_V[sorted(stop_ids & set(targets))] /= math.exp(length_reward)
        return mixture_V, int(p_plm_V.argmax())


def until_stop(token_ids: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """The ids up to the first stop, without the padding behind it."""
    end = next((at for at, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    return list(token_ids[: end + 1])


def transformers_beams(
    model: Any,
    prompt: Sequence[int],
    *,
    beams: int,
    length_penalty: float,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    **options: Any,
) -> list[tuple[list[int], float]]:
    """Token ids and score of each beam that transformers finds, the best first; further options are of `generate`."""
    found = model.generate(
        torch.tensor([prompt]),
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=length_penalty,
        early_stopping=False,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = found.sequences[:, len(prompt) :].tolist()
    return [
        (until_stop(ids, stop_ids), score) for ids, score in zip(rows, found.sequences_scores.tolist(), strict=True)
    ]


class ReplacedScores(LogitsProcessor):  # type: ignore[misc]  # its package has no types
    """Scores of a function in place of the model's, for transformers' own ways of generation.

    Args:
        prompt: number of the prompt's tokens.
        logprobs: log-probabilities [V] behind generated tokens.
    """

    def __init__(self, prompt: int, logprobs: Callable[[tuple[int, ...]], Tensor]) -> None:
        self._prompt = prompt
        self._logprobs = logprobs

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.stack([self._logprobs(tuple(ids[self._prompt :])) for ids in input_ids.tolist()]).to(scores)


def schedule(name: str, lambda_max: float, expected_length: float, steps: int) -> list[float]:
    """λ_0 … λ_{steps−1}, one after another as the paper's section 3.3 tells it."""
    values, current = [], lambda_max
    for t in range(steps):
        if name == "none":
            values.append(0.0)
        elif name == "constant" or t == 0:
            values.append(lambda_max)
        else:
            current = max(0.0, current - lambda_max / expected_length)
            values.append(current**2 if name == "gradual" else current)
    return values


def gated(
    gate: dict[str, list[float]], p_plm_V: Tensor, p_pema_V: Tensor, targets: Sequence[int], position: int
) -> float:
    """λ of a learned gate, feature by feature; both distributions are looked at on the targets alone."""
    plm, pema = ([p_V[token].item() for token in targets] for p_V in (p_plm_V, p_pema_V))
    plm_at, pema_at = (max(range(len(p)), key=p.__getitem__) for p in (plm, pema))

    def log(p: float) -> float:
        return max(-12.0, math.log(max(p, 1e-300)))

    features = [
        1.0,
        log(plm[plm_at]),
        log(pema[pema_at]),
        log(plm[pema_at]),
        log(pema[plm_at]),
        float(plm_at == pema_at),
        -sum(p * math.log(p) for p in plm if p > 0),
        -sum(p * math.log(p) for p in pema if p > 0),
        1.0 - sum(plm),
        float(position == 0),
        math.log(1 + position),
    ]
    rows = zip(gate["weight"], features, gate["centre"], gate["scale"], strict=True)
    return 1 / (1 + math.exp(-sum(w * (x - centre) / scale for w, x, centre, scale in rows)))


def train(
    rows_N_D: Tensor,
    label_N: Tensor,
    head_C_D: Tensor,
    initial: dict[str, Tensor],
    batches: Sequence[Sequence[Tensor]],
    *,
    form: str,
    rms: float,
    kappa: float,
    learning_rates: Sequence[float],
    reconstruction_epochs: int,
) -> dict[str, Tensor]:
    """The two phases in float64, without dropout, by the formulas; `batches` holds the row indices of every step."""
    A, B_pd, B_rct = (initial[f"{name}.weight"].double().requires_grad_() for name in ("A", "B_pd", "B_rct"))
    x_N_D = rows_N_D.double() / rms

    def reconstruction(x_B_D: Tensor) -> Tensor:
        return (x_B_D @ A.T @ B_rct.T - x_B_D).square().mean()

    optimiser = torch.optim.Adam([A, B_rct], lr=learning_rates[0])
    for epoch in batches[:reconstruction_epochs]:
        for index in epoch:
            optimiser.zero_grad()
            reconstruction(x_N_D[index]).backward()
            optimiser.step()
    B_rct.requires_grad_(False)
    optimiser = torch.optim.Adam([A, B_pd], lr=learning_rates[0])
    step = 0
    for epoch in batches[reconstruction_epochs:]:
        for index in epoch:
            optimiser.param_groups[0]["lr"] = learning_rates[step]
            step += 1
            x_B_D = x_N_D[index]
            update_B_D = x_B_D @ A.T @ B_pd.T
            h_B_D = rms * (x_B_D + update_B_D if form == "residual" else update_B_D)
            logprob_B_C = (h_B_D @ head_C_D.double().T).log_softmax(-1)
            prediction = -logprob_B_C[torch.arange(len(index)), label_N[index]].mean()
            optimiser.zero_grad()
            (kappa * reconstruction(x_B_D) + (1 - kappa) * prediction).backward()
            optimiser.step()
    return {"A.weight": A.detach(), "B_pd.weight": B_pd.detach(), "B_rct.weight": B_rct.detach()}
