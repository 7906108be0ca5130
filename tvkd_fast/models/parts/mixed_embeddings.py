"""Embeddings of tokens mixed with those of others, in whichever model is called.

Letters: L tokens of a row, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def mixed_embeddings(model: PreTrainedModel, batch: Any) -> Iterator[None]:
    """While the block lasts, the model reads s·e + (1 − s)·e' in place of a token's embedding e, e' its partner's.

    A batch that mixes has `partners` (rows·L,), flat positions among the tokens that the model is given, and `shares`
    (rows·L,), s, 1 where nothing is mixed; for any other nothing is done. Differentiable.
    """
    partners = getattr(batch, "partners", None)
    if partners is None:
        yield
        return

    def mix(embedding: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        own = output.flatten(0, 1)
        share = batch.shares.to(own.dtype)[:, None]
        return (share * own + (1 - share) * own.index_select(0, partners)).view(output.shape)

    hook = model.get_input_embeddings().register_forward_hook(mix)
    try:
        yield
    finally:
        hook.remove()
