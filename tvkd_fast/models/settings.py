"""The settings of loading and running models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tvkd_fast.ranges import POSITIVE, at_least, check_numbers, number

if TYPE_CHECKING:
    pass


Recompute = Literal["none", "selective", "full"]


@dataclass(kw_only=True)
class ModelConfig:
    """How models are loaded and run; shared by policy, reference and teacher."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights. Training wants float32 (see `autocast`); scores serve only runs of the same precision."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Run the forward products in bfloat16 over float32 weights."""
    attn_implementation: str | None = None
    """transformers' attention: sdpa, eager, flash_attention_2 …; the model's default where not given."""
    packing: Literal["shared", "unshared", "padded"] = "shared"
    """How pairs become rows: `shared` computes a pair's prompt once (sdpa, eager, flex or flash attention), `unshared`
    packs without padding, `padded` pads."""
    activation_checkpointing: Recompute = "none"
    """What is computed again in the backward: nothing, all of a block but its products (`selective`), or all of it
    (`full`)."""
    compile: bool = False
    """Run every block of a backbone through torch.compile: faster steps after a first one of a minute or so."""
    device: str = "auto"
    """`auto` takes a GPU where there is one."""
    threads: int = number(0, at_least(0))
    """CPU threads; 0 leaves torch's choice."""
    return_memory: bool = False
    """Give memory that is freed back to the system at once, on a CPU under glibc: less is held, and steps take longer
    (docs/scaling.md)."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Off unless asked for."""

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        if "flash" in (self.attn_implementation or "") and self.dtype == "float32" and self.autocast == "off":
            raise ValueError(
                f"{self.attn_implementation} computes in 16 bits, and the weights are of 32: set --model.autocast "
                "bfloat16 to train, or --model.dtype bfloat16"
            )


@dataclass(kw_only=True)
class LoraConfig:
    """Adapters of low rank that learn in the policy's place, and the policy without them as its reference."""

    rank: int = number(0, at_least(0))
    """r of W + (alpha/r)·B·A; 0 trains the policy's own weights."""
    alpha: float | None = number(None, POSITIVE)
    """Scale; twice the rank where not given."""
    targets: list[str] | None = None
    """Names of the linear layers that get one, such as q_proj; all of the backbone where not given."""
    quantize: Literal["no", "nf4"] = "no"
    """Hold the frozen backbone in four bits a weight (QLoRA); needs bitsandbytes. One process."""

    def __post_init__(self) -> None:
        check_numbers(self, "lora")
        if self.quantize != "no" and self.rank == 0:
            raise ValueError(
                "a backbone in four bits does not learn, adapters beside it do: set --lora.rank, such as 16"
            )
