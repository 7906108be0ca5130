"""The step of `TVKDTrainer`: TRL's loss over a shifted reference, or an objective's in its place.

Letters: P pairs of a batch (2P rows, chosen first), L row length.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from tvkd_fast._compat import is_compiled
from tvkd_fast.integrations.returns import RETURNS
from tvkd_fast.integrations.rows import DATA_REWARDS, OF_OBJECTIVES
from tvkd_fast.integrations.trl_head import LEFT_OUT, AskedModel, HeardModel, TrainerHeads, sigmoid_derivative
from tvkd_fast.integrations.trl_objective import batch_of
from tvkd_fast.objectives import Need, Objective, PolicyNumbers
from tvkd_fast.scoring.layout import Scores


class TrainerStep(DPOTrainer):
    """DPOTrainer whose loss is the teacher's or an objective's; `TVKDTrainer` says which."""

    ref_model: Any
    precompute_ref_logps: bool
    _heads: TrainerHeads
    _asks_teacher: bool
    _objective: Objective | None

    @abstractmethod
    def _asked(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(P,) of chosen and of rejected responses, from the teacher itself."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self._heads.take(self)
        mode = "train" if self.model.training else "eval"
        if self._objective is not None:
            found = self._of_objective(self._objective, model, dict(inputs), return_outputs, self._metrics[mode])
        elif self._asks_teacher:
            found = self._shaped(model, dict(inputs), return_outputs, self._metrics[mode])
        else:
            held = self.ref_model
            if held is not None:
                self.ref_model = AskedModel(held, partial(self._heads.asked, held, self.model))
            try:
                found = super()._compute_loss(model, inputs, return_outputs)
            finally:
                self.ref_model = held
        if self._heads.ours:
            for name in LEFT_OUT:
                self._metrics[mode].pop(name, None)
        stats = self._heads.stats
        if stats is not None and mode == "train" and self.accelerator.sync_gradients:
            for name, number in stats.read().items():
                self._metrics[mode][f"tvkd/{name}"].append(number)
            stats.reset()
        return found

    def _shaped(self, policy: nn.Module, inputs: dict[str, Any], return_outputs: bool, metrics: Any) -> Any:
        """TRL's loss over shifted reference log-probabilities; its reward metrics over those that were not shifted."""
        psi = torch.stack(self._returns(inputs))
        inputs = {name: x for name, x in inputs.items() if name not in OF_OBJECTIVES}
        ref = self._ref_logps(inputs)
        shaping = self.args.alpha * psi.to(ref)
        shifted = ref + shaping / self.beta
        # A compiled model would take a new function in each step for a new program.
        known = self._heads.ours and self.loss_types == ["sigmoid"] and not is_compiled(policy)
        model = HeardModel(policy, sigmoid_derivative(self.beta, shifted.flatten()) if known else None)
        found = self._by_trl(model, inputs, shifted, return_outputs)
        rewards = self.beta * (torch.stack(model.logps.detach().chunk(2)) - ref)
        margins, shifts = rewards[0] - rewards[1], shaping[0] - shaping[1]
        flipped = (margins * (margins - shifts) < 0).float()
        self._show(metrics, rewards[0], rewards[1], **{"tvkd/shaping_margins": shifts, "tvkd/flipped": flipped})
        return found

    def _of_objective(
        self, objective: Objective, policy: nn.Module, inputs: dict[str, Any], return_outputs: bool, metrics: Any
    ) -> Any:
        """The objective's loss in place of TRL's, and its rewards; TRL's code calls the policy and logs the rest."""
        teacher = torch.cat(self._returns(inputs)) if self._asks_teacher else None
        batch = batch_of(inputs, inputs.get(DATA_REWARDS))
        inputs = {name: x for name, x in inputs.items() if name not in OF_OBJECTIVES}
        ref = self._ref_logps(inputs) if Need.REFERENCE in objective.needs else None
        scores = Scores(None if ref is None else ref.flatten(), teacher_logps=teacher)
        collisions = Need.COLLISIONS in objective.needs
        known = self._heads.ours and not collisions and not is_compiled(policy)
        upstream = objective.upstream(scores, batch) if known else None
        model = HeardModel(policy, None if upstream is None else upstream.derivative, collisions=collisions)
        found = self._by_trl(model, inputs, torch.zeros(2, batch.num_pairs) if ref is None else ref, return_outputs)
        out = objective.loss(PolicyNumbers(model.logps, batch.lengths, model.log_collisions), scores, batch)
        loss = out.losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * model.aux_loss
        assert out.chosen_rewards is not None
        assert out.rejected_rewards is not None
        self._show(metrics, out.chosen_rewards, out.rejected_rewards)
        return (loss, found[1]) if return_outputs else loss

    def _returns(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(P,) of chosen and of rejected responses, the teacher's, from the batch's columns or from the teacher."""
        chosen, rejected = (inputs.get(name) for name in RETURNS)
        return self._asked(inputs) if chosen is None or rejected is None else (chosen, rejected)

    def _ref_logps(self, inputs: dict[str, Any]) -> Tensor:
        """[2, P] of chosen and of rejected responses."""
        if self.precompute_ref_logps:
            return torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        reference = self.model if self.ref_model is None else self.ref_model
        return torch.stack(self.compute_ref_log_probs(reference, inputs))

    def _by_trl(self, model: HeardModel, inputs: dict[str, Any], ref: Tensor, return_outputs: bool) -> Any:
        """TRL's own step over reference log-probabilities [2, P]."""
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref.to(self.accelerator.device)
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = before

    def _show(self, metrics: Any, chosen: Tensor, rejected: Tensor, **more: Tensor) -> None:
        """Log means over all processes: rewards in place of TRL's, and `more`; (P,) each."""
        margins = chosen - rejected
        shown = {"chosen": chosen, "rejected": rejected, "accuracies": (margins > 0).float(), "margins": margins}
        columns = torch.stack([*shown.values(), *more.values()]).T.contiguous()
        means = self.accelerator.gather(columns).mean(0).tolist()
        for name, mean in zip(shown, means[: len(shown)], strict=True):
            metrics[f"rewards/{name}"][-1] = mean
        for name, mean in zip(more, means[len(shown) :], strict=True):
            metrics[name].append(mean)
