"""`tvkd explain`: potential differences token by token over the responses of a pair, as heat-coloured text.

Letters: T tokens of a response.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.commands.eval import EvalConfig
from tvkd_fast.commands.models import (
    load_frozen,
)
from tvkd_fast.commands.plot import new_figure
from tvkd_fast.data import PairDataset, collate_pairs
from tvkd_fast.data.data_config import DataConfig, load_dataset
from tvkd_fast.evaluation.html import page
from tvkd_fast.files import at_home, ready_folder, written
from tvkd_fast.losses.shaping import potential, shaping_steps
from tvkd_fast.models import (
    load_stop_ids,
    load_tokenizer,
)
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives.checks.fitting import check_teacher_reference
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.ranges import at_least, check_numbers, number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WARM, COLD = (193, 68, 14), (38, 103, 165)
"""The colours of a rising and of a falling potential."""

STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
.prompt { white-space: pre-wrap; color: #555; line-height: 1.5; }
.response { white-space: pre-wrap; font: 15px/1.9 ui-monospace, monospace; }
.response span { padding: .15em 0; border-radius: .2em; }
"""


@dataclass(frozen=True)
class Heat:
    """A response of T tokens and what each did to the potential."""

    name: str
    tokens: list[str]
    values: list[float]
    """V(s_0) .. V(s_T), T+1 of them, the last 0 where `terminal` has it so."""
    steps: list[float]
    """γ V(s_{t+1}) − V(s_t) of token t+1; what `terminal` leaves out of the sum is 0."""

    @property
    def total(self) -> float:
        """Ψ."""
        return sum(self.steps)


def explain(config: ExplainConfig) -> tuple[Path, Path]:
    """Writes explain.html and explain.png of one held-out pair; their paths. The PNG needs matplotlib."""
    folder = ready_folder(config.output_dir)
    tokenizer = load_tokenizer(config.teacher, trust_remote_code=config.model.trust_remote_code)
    stops = load_stop_ids(config.teacher, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset("eval", config.data, tokenizer, stop_ids=stops)
    if config.pair >= len(dataset):
        raise ValueError(f"there are {len(dataset)} held-out pairs: set --pair to at most {len(dataset) - 1}")
    heats = heats_of(dataset, config, tokenizer)
    prompt = tokenizer.decode(dataset[config.pair].prompt_ids)
    pages = folder / "explain.html", folder / "explain.png"
    with written(folder):
        pages[0].write_text(_html(prompt, heats, config.loss), encoding="utf-8")
        draw(heats, config.loss, pages[1])
    return pages


@torch.no_grad()
def heats_of(dataset: PairDataset, config: ExplainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Heat, Heat]:
    """Chosen and rejected response of the pair."""
    loss = config.loss
    asked = EvalConfig(
        policy=config.teacher,
        teacher=config.teacher,
        teacher_reference=config.teacher_reference,
        loss=loss,
        model=replace(config.model, packing="padded"),
    )
    models = load_frozen(asked, tokenizer, kappa=loss.kappa)
    assert models.teacher is not None
    pair = dataset[config.pair]
    batch = collate_pairs([pair], [config.pair]).to(models.teacher.model.device)
    values = loss.values(models.scorer(dataset, asked).of(batch))
    steps = shaping_steps(values, batch.cu_states, gamma=loss.gamma, terminal=loss.terminal, ended=batch.ended)
    values = potential(values, batch.cu_states, loss.terminal)
    middle, end = batch.cu_states[1:].tolist()
    chosen, rejected = (
        Heat(name, _texts(ids, tokenizer), values[where].tolist(), steps[where].tolist()[:-1])
        for name, ids, where in (
            ("chosen", pair.chosen_ids, slice(middle)),
            ("rejected", pair.rejected_ids, slice(middle, end)),
        )
    )
    return chosen, rejected


def draw(heats: tuple[Heat, Heat], loss: TVKD, path: Path) -> None:
    """Coloured text of both responses over the potential along them, as PNG."""
    width, height = 96, 0.26
    lines = {heat.name: _lines(heat, width) for heat in heats}
    rows = sum(map(len, lines.values())) + 5
    figure = new_figure(10, height * rows + 3.2)
    text, curve = figure.subplots(2, 1, height_ratios=[height * rows, 2.6])
    text.set_xlim(0, width)
    text.set_ylim(rows, 0)
    text.axis("off")
    scale, row = _scale(heats), 0.8
    for heat in heats:
        text.text(0, row, f"{heat.name}: Ψ = {heat.total:+.3f}", fontsize=11, fontweight="bold", va="center")
        for line in lines[heat.name]:
            row += 1
            for start, token, step in line:
                strength, colour = _colour(step, scale)
                box = {"facecolor": (*(x / 255 for x in colour), strength), "edgecolor": "none"}
                text.add_patch(_rectangle(start, row - 0.45, len(token), 0.9, **box))
                text.text(start, row, token.replace("$", r"\$"), family="monospace", fontsize=8.5, va="center")
        row += 2
    for heat, colour in zip(heats, (WARM, COLD), strict=True):
        curve.plot(heat.values, label=heat.name, color=[x / 255 for x in colour], linewidth=1.5)
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.set_xlabel("state: tokens of the response so far")
    curve.set_ylabel("V(s)")
    curve.legend(frameon=False)
    curve.spines[["top", "right"]].set_visible(False)
    curve.grid(alpha=0.25)
    figure.suptitle(_title(loss), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _html(prompt: str, heats: tuple[Heat, Heat], loss: TVKD) -> str:
    scale = _scale(heats)
    parts = [f"<p>{escape(_title(loss))}. Orange tokens raise the potential, blue ones lower it.</p>"]
    parts.append(f'<p class="prompt">{escape(prompt)}</p>')
    for heat in heats:
        spans = []
        for i, (token, step) in enumerate(zip(heat.tokens, heat.steps, strict=True)):
            strength, (red, green, blue) = _colour(step, scale)
            title = f"step {step:+.4f}, V {heat.values[i]:.3f} to {heat.values[i + 1]:.3f}"
            style = f"background: rgba({red}, {green}, {blue}, {strength:.2f})"
            spans.append(f'<span style="{style}" title="{title}">{escape(token)}</span>')
        parts.append(f"<h2>{heat.name}: Ψ = {heat.total:+.3f}</h2>")
        parts.append(f'<p class="response">{"".join(spans)}</p>')
    return page("What the teacher's value does", STYLE, "\n".join(parts))


def _title(loss: TVKD) -> str:
    scale = loss.beta if loss.value_scale is None else loss.value_scale
    return (
        f"γ V(s') − V(s), token by token: V from {loss.value_from}, κ = {loss.kappa:g}, b = {scale:g}, "
        f"γ = {loss.gamma:g}, terminal {loss.terminal}"
    )


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text that each token adds; one that ends within a letter adds nothing, and the next all of it."""
    texts, before = [], ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(whole[len(before) :] if len(whole) > len(before) else "")
        before = whole if len(whole) > len(before) else before
    return texts


def _scale(heats: tuple[Heat, Heat]) -> float:
    """The step that is coloured fully: nine tenths of them are smaller."""
    steps = sorted(abs(step) for heat in heats for step in heat.steps)
    return max(steps[int(0.9 * (len(steps) - 1))], 1e-12)


def _colour(step: float, scale: float) -> tuple[float, tuple[int, int, int]]:
    """Opacity and colour."""
    return 0.8 * min(abs(step) / scale, 1.0), WARM if step > 0 else COLD


def _lines(heat: Heat, width: int) -> list[list[tuple[int, str, float]]]:
    """Tokens with the column where each begins, broken where a line is full and where the text is."""
    lines: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for token, step in zip(heat.tokens, heat.steps, strict=True):
        shown = token.replace("\n", "↵")
        if column + len(shown) > width and column:
            lines.append([])
            column = 0
        lines[-1].append((column, shown[:width], step))
        column += len(shown)
        if "\n" in token:
            lines.append([])
            column = 0
    return [line for line in lines if line]


def _rectangle(x: float, y: float, width: float, height: float, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **style)


@dataclass(kw_only=True)
class ExplainConfig:
    """The settings of `tvkd explain`: one pair under a teacher."""

    teacher: str
    """The teacher; its tokenizer makes the tokens."""
    teacher_reference: str | None = None
    """The teacher's own reference, for loss.value_from implicit_reward."""
    output_dir: str
    """Folder for explain.html and explain.png."""
    pair: int = number(0, at_least(0))
    """Which of the held-out pairs, counted from 0."""
    data: DataConfig = field(default_factory=DataConfig)
    loss: TVKD = field(default_factory=TVKD)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        at_home(self)
        check_numbers(self)
        check_teacher_reference(self.teacher, self.teacher_reference, self.loss)


def run(config: ExplainConfig) -> None:
    """Draw the pair, and print the file's path."""
    print("\n".join(map(str, explain(config))))
