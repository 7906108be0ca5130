"""The memory and traffic of each process of a run, counted from shapes: nothing is loaded, downloaded or run.

Letters: P pairs of a step, S processes that share weights, D hidden, F intermediate, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from tvkd_fast.distributed.vocabulary import states_held
from tvkd_fast.models import BITS_PER_WEIGHT, ModelShape
from tvkd_fast.models.shared_prompt import HANDLED, Layout
from tvkd_fast.objectives import SCORED, TEACHER, Need
from tvkd_fast.objectives.divergences.joint_numbers import SCORE
from tvkd_fast.ops.tiles.forward_gradients import WORKSPACE_MB, row_bytes
from tvkd_fast.planning.activations import Activations, count_activations
from tvkd_fast.planning.sampler_memory import cache_bytes, whole_copy
from tvkd_fast.training.train_config import TrainConfig

_BYTES = {"float32": 4, "bfloat16": 2}
_HEAD_WORKSPACE = 64 * 2**20
"""Bytes of the head's tiles; an upper bound that its tests check."""
_BESIDE_A_BLOCK = 8 * 2**20
"""Bytes of the numbers per token, and of the library's products."""


_OF_REFERENCE = frozenset({Need.REFERENCE, Need.REFERENCE_STATES})
_JOINT_WORKSPACE = 128 * 2**20
"""Bytes of a walk over two vocabularies; an upper bound by count."""


@dataclass(frozen=True)
class PairTokens:
    """Tokens of a pair, means over the data, and of the longest sequence."""

    prompt: float
    chosen: float
    rejected: float
    longest: float

    def of(self, packing: str, both: bool) -> float:
        """Return the tokens that go through the model, of both responses or of the chosen one alone."""
        return (2 if both and packing != "shared" else 1) * self.prompt + self.responses(both)

    def responses(self, both: bool) -> float:
        """Return the tokens that reach the head."""
        return self.chosen + self.rejected if both else self.chosen


def compares(config: TrainConfig) -> bool:
    """Return whether rejected responses go through the models as well."""
    return Need.REJECTED in config.loss.needs


@dataclass(frozen=True)
class Footprint:
    """A training run of `processes`, seen from one of them. Sizes are in bytes."""

    config: TrainConfig
    policy: ModelShape
    teacher: ModelShape | None
    """None where its scores are on disk, or where there is none."""
    tokens: PairTokens
    processes: int

    def memory(self) -> tuple[str, dict[str, float]]:
        """Return the moment of a step's peak, and the device's memory then, by part, without Python and its libraries.

        Activations are most as a backward begins, gradients as it ends: a head's dW is then whole, and a tied weight
        has its embedding's beside it. A shared embedding looks up all processes' tokens as a forward begins.
        """
        kept = self._gathered if self._offloads else self._kept | self._gathered
        kept |= whole_copy(self.config, self._weights, self.processes)
        moments = {
            "as a forward begins": kept | self._looked_up | self._so_far,
            "as a backward begins": kept | self._forward | self._so_far,
            "as a backward ends": kept | self._gradients | ({} if self.config.lora.rank else self._looked_up),
        }
        if self.config.sampled_share:
            rows = self.config.pairs_per_step / self.processes
            cache = cache_bytes(self.config, self.policy, self.tokens.prompt, rows, self._compute)
            moments["as responses are sampled"] = kept | {"keys and values": cache}
        return max(moments.items(), key=lambda moment: sum(moment[1].values()))

    def host_memory(self) -> dict[str, float]:
        """Return the host's memory by part where shards are offloaded, else nothing."""
        return self._kept | {"gradients": self._own_gradients} if self._offloads else {}

    def communication(self) -> dict[str, float]:
        """Bytes that a process sends in a step of the policy, and receives, in rings: (S−1)/S of all."""
        config, ring = self.config, (self._group - 1) / self._group
        reductions = self.micro_batches if config.parallel.reduce == "micro_batch" else 1
        # Blocks are gathered for the forward and again for the backward, the root once for both.
        weights = 2 * self.policy.blocks + self.policy.root - self._stays
        parts = {
            "weights, gathered": ring * self.micro_batches * self._compute * weights,
            "gradients, reduced": ring * reductions * 4 * self._reduced,
        }
        if self.shares_vocabulary:
            # The few numbers per token by which its parts are merged are left out. The head's gradients are float32.
            pairs = config.pairs_per_step / self.processes
            per_token = ring * self._group * self.policy.hidden
            answers = pairs * self.tokens.responses(compares(config))
            parts["states of tokens"] = per_token * answers * (self._compute + 4)
            if self.policy.tied:
                padded = config.model.packing == "padded"
                looked_up = self.micro_batches * self.row if padded else pairs * self._tokens_per_pair
                # A frozen table has no way back.
                directions = 2 if config.lora.rank == 0 else 1
                parts["embeddings of tokens"] = per_token * looked_up * directions * _BYTES[config.model.dtype]
        replicas = config.parallel.replicas
        if replicas > 1:
            own = reductions * 4 * self._reduced
            if self.shares_vocabulary and config.lora.rank == 0:
                # Its rows' gradients are summed in each micro-batch, the head's and the embedding's apart.
                uses = 2 if self.policy.tied else 1
                own += self.micro_batches * uses * _BYTES[config.model.dtype] * self.policy.head
            parts["gradients, replicas"] = 2 * (1 - 1 / replicas) * own / self._group
        return parts

    def arithmetic(self) -> float:
        """Floating-point operations of a step by its products with weights, of all processes together.

        A weight takes 2 per token forward, 2 for its input's gradient and 2 for its own; the head sees response tokens
        alone. What is computed again counts once, and attention's own products are left out.
        """
        config, policy, teacher = self.config, self.policy, self.teacher
        tokens = config.pairs_per_step * self._tokens_per_pair
        answers = config.pairs_per_step * self.tokens.responses(compares(config))
        trained = 6 if config.lora.rank == 0 else 4
        total = trained * (policy.blocks * tokens + policy.head * answers)
        if Need.COLLISIONS in config.loss.needs:
            total += 2 * policy.head * answers
        forward = 2 * (policy.blocks * tokens + policy.head * answers)
        # Over responses to other prompts, and over the pairs that a selection chooses from.
        others = float(Need.LABELS in config.loss.needs)
        chosen_from = 0.0 if config.data.selection is None else config.pairs_taken / config.pairs_per_step
        total += forward * (others + chosen_from * (config.data.select == "learnability"))
        if not config.needs & SCORED or config.scores is not None:
            return total
        if config.loss.needs & _OF_REFERENCE:
            total += forward * (1 + others + chosen_from)
        if Need.REFERENCE_STATES in config.loss.needs:
            total += 2 * policy.head * answers
        if teacher is not None:
            asked = chosen_from + bool(config.loss.needs & TEACHER)
            teachers = asked * (1 if config.teacher_reference is None else 2)
            total += 2 * teachers * (teacher.blocks * tokens + teacher.head * answers)
        return total

    @cached_property
    def learning(self) -> int:
        """Parameters that do."""
        lora = self.config.lora
        if lora.rank == 0:
            return self.policy.parameters
        sizes = (
            size for name, size in self.policy.adapted if lora.targets is None or name.split(".")[-1] in lora.targets
        )
        return lora.rank * sum(sizes)

    @cached_property
    def micro_batches(self) -> int:
        """Return the micro-batches of each process per step."""
        config = self.config
        if config.model.packing == "padded":
            return math.ceil(config.pairs_per_step / config.pairs_per_micro_batch / self.processes)
        return math.ceil(config.pairs_per_step * self._tokens_per_pair / config.tokens_per_micro_batch / self.processes)

    @property
    def row(self) -> float:
        """Tokens that go through the policy at once, padding among them."""
        config = self.config
        if config.model.packing == "padded":
            sequences = 2 if compares(config) else 1
            return config.pairs_per_micro_batch * sequences * self.tokens.longest
        return min(config.tokens_per_micro_batch, config.pairs_per_step * self._tokens_per_pair / self.processes)

    @cached_property
    def shares_vocabulary(self) -> bool:
        """Return the decision of `models.Sharing`, except for families whose embedding cannot be shared."""
        config = self.config
        if self._group == 1 or config.parallel.vocabulary != "auto":
            return self._group > 1 and config.parallel.vocabulary == "shared"
        possible = config.model.packing != "padded" and not config.parallel.cpu_offload and not config.loss.whole_head
        return possible and self._group * config.tokens_per_micro_batch < self.policy.vocab

    @cached_property
    def activations(self) -> float:
        """Return the bytes of the activations in and around the policy's blocks, and of the head's states."""
        config, policy = self.config, self.policy
        row = self._tokens * policy.hidden * self._compute
        size = self._counted(policy).of(policy.layers, config.model.activation_checkpointing, row)
        if config.model.autocast == "bfloat16" and self._group > 1:
            # Sharded weights are gathered in that dtype, and no cast of them is kept.
            size -= 2 * policy.blocks
        return size + self._answers * policy.hidden * self._compute

    def _counted(self, shape: ModelShape) -> Activations:
        """Count the activations of a model over a row."""
        model, tokens = self.config.model, self._tokens
        return count_activations(
            shape.name,
            tokens,
            self._layout(tokens),
            sequences=self._rows,
            autocast=torch.bfloat16 if model.autocast == "bfloat16" else None,
            trust_remote_code=model.trust_remote_code,
        )

    @property
    def _teacher_learning(self) -> int:
        """Return the parameters that learn in the teacher."""
        lora = self.config.loss.teacher_lora
        if lora is None or self.teacher is None:
            return 0
        return lora.rank * sum(size for _, size in self.teacher.adapted)

    @property
    def _rows(self) -> int:
        """Sequences that go through the policy at once and pad each other; 0 where they are packed."""
        if self.config.model.packing != "padded":
            return 0
        return self.config.pairs_per_micro_batch * (2 if compares(self.config) else 1)

    @property
    def _tokens(self) -> int:
        """Return the tokens of a row, rounded up."""
        return max(1, round(self.row))

    @property
    def _answers(self) -> float:
        """Response tokens among those of a row."""
        return self._tokens * self.tokens.responses(compares(self.config)) / self._tokens_per_pair

    def _layout(self, tokens: int) -> Layout | None:
        """Return a row's layout, filled with pairs of the data's mean lengths."""
        implementation = self.config.model.attn_implementation
        handled = implementation is None or implementation in HANDLED
        if self.config.model.packing != "shared" or not compares(self.config) or not handled:
            return None
        pairs = max(1, round(tokens / self._tokens_per_pair))
        ends = [round(tokens * i / pairs) for i in range(pairs + 1)]
        rows = []
        for start, end in pairwise(ends):
            chosen = start + round((end - start) * self.tokens.prompt / self._tokens_per_pair)
            rejected = chosen + round((end - start) * self.tokens.chosen / self._tokens_per_pair)
            rows.append((start, chosen, rejected, end))
        return tuple(rows)

    @property
    def _kept(self) -> dict[str, float]:
        """Return the memory that is held from step to step, by part."""
        config, size = self.config, _BYTES[self.config.model.dtype] / self._group
        parts = {
            "policy weights": self._weights / self._group,
            "AdamW's two moments": 2 * self.learning * size,
        }
        if config.loss.needs & _OF_REFERENCE and config.scores is None and not config.lora.rank:
            parts["reference weights"] = self.policy.parameters * size
        if self.teacher is not None:
            parts["teacher weights"] = self.teacher.parameters * size
            if self._teacher_learning:
                # Weights and moments as the policy's, gradients in float32.
                parts["teacher's adapters"] = self._teacher_learning * (3 * size + 4)
            if config.teacher_reference is not None:
                parts["its reference's weights"] = self.teacher.parameters * size
        heads = self._frozen_heads
        if self._group > 1 and heads:
            parts["frozen heads, whole"] = heads * _BYTES[config.model.dtype]
        return parts

    @property
    def _weights(self) -> float:
        """Return the bytes of the whole policy."""
        lora, size = self.config.lora, _BYTES[self.config.model.dtype]
        packed = self.policy.blocks if lora.quantize == "nf4" else 0
        adapters = self.learning if lora.rank else 0
        return (self.policy.parameters - packed + adapters) * size + packed * BITS_PER_WEIGHT / 8

    @property
    def _frozen_heads(self) -> int:
        """Parameters of the frozen models' heads whose distributions are compared."""
        needs, teacher = self.config.loss.needs, 0 if self.teacher is None else self.teacher.head
        own = self.policy.head if Need.REFERENCE_STATES in needs else 0
        return own + teacher * len(needs & {Need.TEACHER_STATES, Need.BASE_STATES})

    @property
    def _gathered(self) -> dict[str, float]:
        if self._group == 1:
            return {}
        # The block that runs, and the one that is fetched meanwhile.
        blocks = 2 * self.policy.blocks / self.policy.layers
        return {"gathered weights": self._compute * (self.policy.root - self._stays + blocks)}

    @property
    def _forward(self) -> dict[str, float]:
        parts = {
            "activations": self.activations,
            "head's workspace": self._head_workspace,
        }
        if self.teacher is not None and self._teacher_learning:
            # Nothing of a teacher is recomputed.
            counted, tokens = self._counted(self.teacher), self._tokens
            states = (tokens + self._answers) * self.teacher.hidden * self._compute
            parts["teacher's activations"] = counted.of(self.teacher.layers, "none", 0) + states
        if self.shares_vocabulary:
            parts["states of all tokens"] = states_held(self._group, self._answers, self.policy.hidden, self._compute)
        if self.config.lora.rank == 0:
            # Of a shared one by targets and by softmaxes, until they are summed.
            parts["head's gradient"] = self._head_gradient * (2 if self.shares_vocabulary else 1)
        return parts

    @property
    def _head_workspace(self) -> float:
        """Return the head's tiles; or a block's logits, of an exact gradient that is made in the forward."""
        if self.config.loss.whole_head:
            joint = self.config.loss.joint
            # The heads of models whose logits add up stand side by side while a walk lasts.
            several = any(len(key.of) > 1 and key.output != SCORE for key in joint)
            return float(_JOINT_WORKSPACE) + several * self._frozen_heads * self._compute
        if self.config.head.grad_mode != "exact" or self.shares_vocabulary:
            return float(_HEAD_WORKSPACE)
        impl = "triton" if self.config.model.device.startswith("cuda") else "torch"
        allowed = self.config.head.workspace_mb or WORKSPACE_MB[impl]
        row = row_bytes(impl, self.policy.vocab, self.policy.hidden, self._compute)
        block = min(allowed * 2**20, self._answers * row)
        return float(max(_HEAD_WORKSPACE, block + _BESIDE_A_BLOCK))

    @property
    def _so_far(self) -> dict[str, float]:
        return {"gradients so far": self._gradients_so_far} if self.micro_batches > 1 else {}

    @property
    def _gradients(self) -> dict[str, float]:
        parts = {} if self._offloads else {"gradients": self._own_gradients}
        if self._group > 1:
            parts |= self._so_far
        if self.config.lora.rank == 0:
            # Of a tied weight the embedding's and the head's are summed; both exist before, and the sum so far.
            beside = (1 if self.policy.tied else 0) + (1 if self.micro_batches > 1 else 0)
            parts["embedding's gradient"] = beside * self._head_gradient
        return parts

    @property
    def _looked_up(self) -> dict[str, float]:
        """Return the embeddings of all tokens from a shared table, or their gradients, and this process's own."""
        if not self.shares_vocabulary or not self.policy.tied:
            return {}
        size = self.row * self.policy.hidden * _BYTES[self.config.model.dtype]
        return {"embeddings of all tokens": (self._group + 1) * size}

    @property
    def _own_gradients(self) -> float:
        """Return the gradients of the weights that this process keeps."""
        return 4.0 * self.learning / self._group

    @property
    def _offloads(self) -> bool:
        """Return whether shards are offloaded to the host."""
        return self.config.parallel.cpu_offload and self.processes > 1

    @property
    def _gradients_so_far(self) -> float:
        """Return the gradients of earlier micro-batches."""
        if self._group == 1 or self.config.parallel.reduce == "micro_batch":
            return 0.0 if self._offloads else self._own_gradients
        return 4.0 * self._reduced

    @property
    def _head_gradient(self) -> float:
        return 4.0 * self.policy.head / (self._group if self.shares_vocabulary else 1)

    @property
    def _tokens_per_pair(self) -> float:
        return self.tokens.of(self.config.model.packing, compares(self.config))

    @property
    def _group(self) -> int:
        return self.processes // self.config.parallel.replicas

    @property
    def _compute(self) -> int:
        """Bytes of a number that products read."""
        return 2 if self.config.model.autocast == "bfloat16" else _BYTES[self.config.model.dtype]

    @property
    def _stays(self) -> int:
        """Parameters that are gathered by nobody."""
        return self.policy.head if self.shares_vocabulary else 0

    @property
    def _reduced(self) -> int:
        """Parameters whose gradients are summed over processes: those that learn, but for a head that stays."""
        return self.learning - (self._stays if self.config.lora.rank == 0 else 0)
