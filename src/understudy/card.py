"""The model card: what a compressed folder is, how it loads, how it was made, and whose licence it is under."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from understudy._version import __version__
from understudy.facts import ModelFacts, format_bytes
from understudy.plans import Plan
from understudy.recipe import Calibration, Recovery, Selection

_LICENCE = ("license", "license_name", "license_link")
_CARRIED = (*_LICENCE, "language", "pipeline_tag")


@dataclass(frozen=True)
class Card:
    """What a model card is made of; `paper` is the method's, `kinds` says what each kind in the plan is."""

    name: str
    source: str
    source_card: dict[str, Any]
    facts: ModelFacts
    plan: Plan
    paper: str
    kinds: dict[str, str]
    nbytes: int
    stock: bool  # loads without Understudy
    vllm: str | None  # why vLLM cannot read it
    data: dict[str, Any]  # of the statistics
    notes: Sequence[str]
    commands: Sequence[str]

    def text(self) -> str:
        """Return the card in Markdown, with the YAML front matter that hubs read."""
        return "\n".join([self._front_matter(), self._summary(), self._loading(), self._making(), self._licence()])

    def _front_matter(self) -> str:
        source = re.sub(r"[^\w./-]+", "-", self.source if _is_hub_id(self.source) else Path(self.source).name)
        tags = ["understudy", "mixture-of-experts", self.plan.method, *sorted(self.kinds)]
        head: dict[str, Any] = {"base_model": source, "library_name": "transformers", "tags": list(dict.fromkeys(tags))}
        head |= {name: self.source_card[name] for name in _CARRIED if name in self.source_card}
        return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"

    def _summary(self) -> str:
        replaced = sum(len(self.plan.replaced(key)) for key in self.plan.layers)
        share = replaced / self.facts.experts
        lines = [f"- `{name}`: {what}" for name, what in sorted(self.kinds.items())]
        return f"""\
# {self.name}

{Path(self.source).name} ({self.facts.family}) with {replaced} of its {self.facts.experts} routed experts ({share:.1%})
replaced by Understudy {__version__}. Nothing was trained; everything else is the source's, byte for byte.

| | source | this model |
|---|---|---|
| weights | {format_bytes(self.facts.nbytes)} | {format_bytes(self.nbytes)} |
| routed experts | {self.facts.experts} | {self.facts.experts - replaced} |

Method: `{self.plan.method}` ({self.paper}).
What experts became:

{chr(10).join(lines) or "nothing was replaced"}

How much quality this cost is not measured here: `understudy eval {shlex.quote(self.name)} --against SOURCE` does.
"""

    def _loading(self) -> str:
        first = "" if self.stock else "import understudy  # teaches transformers about the stand-ins\n"
        last = f'model = AutoModelForCausalLM.from_pretrained("{self.name}")'
        code = f"{first}from transformers import AutoModelForCausalLM\n\n{last}"
        if self.stock:
            vllm = "An ordinary checkpoint of its family: whatever loads the source loads this."
        elif self.vllm is None:
            vllm = f"vLLM 0.33 and later: `vllm serve {shlex.quote(self.name)}`, as it is."
        else:
            vllm = f"vLLM cannot read the stand-ins of this model: {self.vllm}."
        return f"## Load it\n\n```python\n{code}\n```\n\n{vllm}\n"

    def _making(self) -> str:
        drawn = [f"| {name} | {blocks} |" for name, blocks in self.data.get("blocks", {}).items()]
        notes = [f"- {note}" for note in self.notes]
        steps = "\n".join(self.commands)
        text = f"""\
Calibration text, in blocks of {self.data.get("seq_len")} tokens drawn with seed {self.data.get("seed")}:

| source | blocks |
|---|---|
{chr(10).join(drawn)}
"""
        return f"""\
## How it was made

{"No text was read: the method needs the weights alone." if self.data.get("weights_only") else text}
{chr(10).join([*notes, ""]) if notes else ""}
To make it again:

```
{steps}
```

Statistics, plan, every setting, and the hashes of what the model was made from are in `understudy/`.
"""

    def _licence(self) -> str:
        found = [f"{name}: {self.source_card[name]}" for name in _LICENCE if name in self.source_card]
        if found:
            return f"## Licence\n\nThe source's, which holds for this model, too: {', '.join(found)}.\n"
        return "## Licence\n\nThe source's card names none; find out what it allows before you pass this model on.\n"


def read_card(folder: Path) -> dict[str, Any]:
    """Read the front matter of a folder's README.md; empty where there is none that can be read."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig", errors="replace")
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        found = yaml.safe_load(match.group(1)) if match else None
    except (OSError, yaml.YAMLError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def commands(
    model: str, out: str, calibration: Calibration, selection: Selection, max_shard_size: str | None, repair: int = 0
) -> list[str]:
    """Return the command lines that make a model again: in one step, and in three; `repair` is in the first alone."""
    last = [*([("--max-shard-size", max_shard_size)] if max_shard_size else []), ("--out", out)]
    both = list(dict.fromkeys([*_flags(calibration), *_flags(selection)]))
    steps: list[list[str | tuple[str, ...]]] = [
        ["compress", model, *both, *([("--repair", str(repair))] if repair else []), *last],
        ["calibrate", model, *_flags(calibration), ("--out", "stats.safetensors")],
        ["plan", "stats.safetensors", *_flags(selection), ("--out", "plan.yaml")],
        ["apply", model, "plan.yaml", ("--stats", "stats.safetensors"), *last],
    ]
    lines = [" ".join(["understudy", *_words(step)]) for step in steps]
    return [lines[0], "# or, with a look at the plan in between:", *lines[1:]]


def _flags(settings: BaseModel) -> list[tuple[str, ...]]:
    """Return the flags of settings that are not at their defaults."""
    flags: list[tuple[str, ...]] = []
    for name, field in type(settings).model_fields.items():
        value, flag = getattr(settings, name), f"--{name.replace('_', '-')}"
        if value != field.default:
            if value is True:
                flags.append((flag,))
            else:
                flags += [(flag, str(v)) for v in (value if isinstance(value, tuple) else (value,))]
    return flags


def _words(step: Iterable[str | tuple[str, ...]]) -> list[str]:
    return [shlex.quote(word) for part in step for word in ((part,) if isinstance(part, str) else part)]


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def recover_command(model: str, out: str, teacher: str | None, settings: Recovery) -> str:
    """Return the command line that trains a model again."""
    last = [*([("--teacher", teacher)] if teacher else []), *_flags(settings), ("--out", out)]
    return " ".join(["understudy", *_words(["recover", model, *last])])


def recovered_card(text: str, name: str, was: str, facts: dict[str, Any]) -> str:
    """Return the card of a trained model: that of the model that it was made from, if any, and how it was trained.

    Args:
        text: the card of the model before, empty where it has none.
        name: of the trained model.
        was: name of the model before.
        facts: of the training, as `recovery.json` holds them.
    """
    run, settings = facts["runs"][facts["chosen"]], Recovery.model_validate(facts["settings"])
    figures = ", ".join(f"{what} {value:.4f}" for what, value in run["held_out"].items())
    if not text:
        text = f"# {name}\n\n{was}, trained further by Understudy {__version__}.\n"
    text = re.sub(rf"^# {re.escape(was)}$", f"# {name}", text, flags=re.MULTILINE)
    for before, after in (('from_pretrained("{}")', name), ("understudy eval {} ", name), ("vllm serve {}`", name)):
        text = text.replace(before.format(was), before.format(after))
    text = text.replace(
        "Nothing was trained; everything else is the source's, byte for byte.", "Then it was trained, see Recovery."
    )
    how = f"`understudy recover` trained {facts['trained']:,} parameters of {was} (`{facts['train_what']}`) for\n"
    how += f"{settings.steps:,} steps of {settings.batch} sequences of up to {settings.seq_len} tokens."
    if settings.loss == "repair":
        how = f"What the outputs of layers are linear in, {facts['trained']:,} parameters, was solved for layer by\n"
        how += f"layer in {settings.rounds} rounds over {facts['sequences']['trained']} sequences of "
        how += f"{settings.seq_len} tokens."
    again = " To train it again:\n\n```\n{}\n```\n" if settings.train else "\n"
    again = again.format(recover_command(was, name, "SOURCE" if facts["teacher"] else None, settings))
    faded = f" The originals faded out over {run['end_ratio']:g} of the steps." if run["end_ratio"] else ""
    return f"""\
{text.rstrip()}

## Recovery

{how}{faded}
On held-out training text: {figures}.{again}
Every run and setting is in `understudy/recovery.json`.
"""
