"""The registered op of a mixture whose weights are known; its backward multiplies what the forward has made.

Letters: N tokens, D hidden of each model, V vocabulary, O outputs, M moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import HeadGradients
from tvkd_fast.ops.joint import backend
from tvkd_fast.ops.joint.joint_op import SIX, TENSORS, fake_values, joint_gradients_op, six_of, task_of, values_of
from tvkd_fast.ops.registered import check_differentiated_once, unwritten, wanted_gradients


def _distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    teacher_index: Tensor | None,
    teacher_lse: Tensor | None,
    rows: Tensor | None,
    upstream: Tensor,
    names: str,
    beta: float,
    alpha: float,
    softcap: float | None,
    logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    temperature: float,
    ignore_index: int,
    impl: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_teacher_hidden: bool,
    want_teacher_weight: bool,
    want_teacher_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss (); the outputs [O, N]; sums and moments [4 + M, N]; the loss's gradients by the six inputs, empty where
    none is wanted.
    """
    task = task_of(
        *(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias),
        *(labels, teacher_index, teacher_lse, rows),
        names,
        beta,
        alpha,
        softcap,
        logit_scale,
        teacher_softcap,
        teacher_logit_scale,
        temperature,
        ignore_index,
    )
    wants = (want_hidden, want_weight, want_bias)
    teacher_wants = (want_teacher_hidden, want_teacher_weight, want_teacher_bias)
    nothing = HeadGradients(None, None, None)
    if any((*wants, *teacher_wants)):
        numbers, student, teacher = backend.joint_known(task, impl, upstream, wants, teacher_wants)
    else:
        numbers, student, teacher = backend.joint_sums(task, impl), nothing, nothing
    values = values_of(task, numbers)
    loss = (values.double() * upstream.double()).sum().to(values.dtype)
    return loss, values, numbers.packed(values.dtype), *six_of(student, teacher, hidden, teacher_hidden)


distillation_op = torch.library.custom_op("tvkd_fast::fused_linear_distillation", _distillation, mutates_args=())


@distillation_op.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    values, numbers = fake_values(hidden, args[5], *args[10:13])
    return values.new_empty(()), values, numbers, *unwritten((hidden, *args[: SIX - 1]), args[-SIX:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # dL/doutput follows the tensors that `linear_joint` has.
    ctx.save_for_backward(*inputs[: TENSORS + 1], output[2])
    ctx.settings = inputs[TENSORS + 1 : -SIX]
    # Not saved but held, so that the first backward can scale them where they lie.
    ctx.made = output[3:]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_differentiated_once("fused_linear_distillation_loss")
    inputs, wants = len(ctx.needs_input_grad), ctx.needs_input_grad[:SIX]
    if grad_loss is None:
        return (None,) * inputs
    made, ctx.made = ctx.made, None
    if made is not None:
        grads = [grad.mul_(grad_loss) for grad in made]
    else:
        *tensors, upstream, numbers = ctx.saved_tensors
        grads = joint_gradients_op(upstream * grad_loss, *tensors, numbers, *ctx.settings, *wants)
    return (*wanted_gradients(grads, wants), *[None] * (inputs - SIX))


distillation_op.register_autograd(_backward, setup_context=_keep)
