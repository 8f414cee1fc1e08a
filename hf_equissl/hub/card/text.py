"""Model cards: every sentence follows from a run's folder, its result records, and what was built from them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ...evaluation.registry import evaluator_of
from ...evaluation.report import protocol_notes, table_rows
from ...evaluation.results import FINE_TUNING, ResultRecord, merge_records
from ...modeling import EquiSSLConfig
from ...objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES
from ...utils.markdown import code, plain, table
from ...utils.strict_yaml import dump_yaml
from ..licences import Licence
from ..privacy import public_command, public_text, public_values
from ..run_folder import RunFolder
from .figures import Figure
from .licence import describe_licence
from .limits import limits
from .metadata import card_data, learns_classes
from .snippets import Snippet
from .writer import write

_TEMPLATE, _PAPER = "encoder.md", "paper_figures.yaml"


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        repo_id: Name on the Hub.
        licence: That of the weights.
        run: The run's folder.
        encoder: Config of the published encoder.
        encoder_steps: Optimizer steps behind its weights.
        num_parameters: Number of parameters of the encoder, without its decoder.
        parts: What was built.
        records: Results of this encoder, free of local paths.
        figures: The pictures in ``figures/``.
        snippets: Code that was executed.
        dataset: Name of the training data for readers.
        native_reason: Why there is no native export although one was asked for.
        description: The user's own words.
    """

    repo_id: str
    licence: Licence
    run: RunFolder
    encoder: EquiSSLConfig
    encoder_steps: int
    num_parameters: int
    parts: Sequence[str]
    records: Sequence[ResultRecord] = ()
    figures: Sequence[Figure] = ()
    snippets: Sequence[Snippet] = ()
    dataset: str | None = None
    native_reason: str | None = None
    description: str | None = None
    objectives: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", self.run.objectives())

    @property
    def finished(self) -> bool:
        """Whether the planned steps were taken."""
        return self.encoder_steps >= self.run.planned_steps

    @property
    def objective_names(self) -> list[str]:
        """Registry keys of the objectives that were trained."""
        return [self.objectives["invariance"]["name"], *(entry["name"] for entry in self.objectives["equivariance"])]


def render_card(facts: CardFacts) -> ModelCard:
    """Write the card. Equal facts give an equal text.

    Raises:
        ValueError: The head is no valid YAML of a model card; it says what is wrong with the user's words in it.
    """
    head = card_data(
        repo_id=facts.repo_id,
        license=facts.licence.license,
        license_name=facts.licence.name,
        license_link=facts.licence.link,
        objectives=facts.objective_names,
        data=facts.dataset,
        base_model=facts.run.base_model,
        records=facts.records,
    )
    return ModelCard(write(_TEMPLATE, head, _context(facts)))


def _context(facts: CardFacts) -> dict[str, Any]:
    run = facts.run
    settings = public_recipe(run, facts.dataset) or _settings(facts)
    ran = "as its last steps ran" if run.record.changes else "as run"
    title = f"Recipe {public_text(run.name)}, {ran}" if run.recipe else "Settings that differ from the defaults"
    return {
        "name": facts.repo_id.rpartition("/")[2],
        "summary": _summary(facts),
        "purpose": _purpose(facts),
        "description": public_text(facts.description.strip()) if facts.description else "",
        "finished": facts.finished,
        "steps": f"{facts.encoder_steps:,}",
        "planned_steps": f"{run.planned_steps:,}",
        "snippets": facts.snippets,
        **_continuing(facts),
        "contents": _contents(facts),
        "native_reason": public_text(facts.native_reason) if facts.native_reason else "",
        **_results(facts),
        "training": _training(facts),
        "figures": facts.figures,
        "settings_title": title,
        "settings": dump_yaml(settings),
        "limits": limits(run, facts.encoder, facts.encoder_steps, facts.dataset, facts.records),
        "licence": _licence(facts),
        **_citations(facts),
    }


def public_recipe(run: RunFolder, dataset: str | None) -> dict[str, Any]:
    """Return the run's recipe as others may read it, its data by the name ``dataset``; empty for a run without one."""
    recipe: dict[str, Any] = public_values(run.recipe or {})
    if dataset and (recipe.get("data") or {}).get("source"):
        recipe["data"]["source"] = dataset
    return recipe


def _size(config: EquiSSLConfig) -> str:
    height, width = (count * config.patch_side for count in config.grid_size)
    blocks = "1 block" if config.num_hidden_layers == 1 else f"{config.num_hidden_layers} blocks"
    return f"ViT of {blocks}, width {config.hidden_size}, {config.patch_side}-pixel patches at {height} x {width}"


def _summary(facts: CardFacts) -> str:
    family = facts.run.transformation
    of_family = f" of transformed images (`{family}`)" if family else ""
    added = "".join(
        f" and `{entry['name']}`{of_family}, weight {entry['weight']:g}" for entry in facts.objectives["equivariance"]
    )
    data = f" on {code(facts.dataset)}" if facts.dataset else ""
    start = f", starting from {code(facts.run.base_model)}" if facts.run.base_model else ""
    labels = "with class labels" if learns_classes(facts.objective_names) else "without labels"
    return (
        f"A vision encoder ({_size(facts.encoder)}, {facts.num_parameters:,} parameters), pretrained "
        f"{labels}{data}{start}, with the objective{'s' if added else ''} "
        f"`{facts.objectives['invariance']['name']}`{added}."
    )


def _purpose(facts: CardFacts) -> str:
    """Say what the equivariance objectives ask of the features, each in its own words."""
    names = facts.objective_names[1:]
    if not names:
        return "No equivariance objective was trained: it is the base method alone, for comparison."
    made = "Made with `hf_equissl`, an implementation of EquiSSL for the Hugging Face libraries."
    return " ".join(filter(None, [*(EQUIVARIANCE_OBJECTIVES[name].purpose for name in names), made]))


def _continuing(facts: CardFacts) -> dict[str, str]:
    if "pretraining" not in facts.parts or facts.run.recipe is None:
        return {"continue_command": "", "continue_note": ""}
    folder = facts.repo_id.rpartition("/")[2]
    command = (
        f"hf download {facts.repo_id} pretraining/recipe.yaml --local-dir {folder}\n"
        f"python training/pretrain.py --recipe {folder}/pretraining/recipe.yaml --init_from {facts.repo_id} \\\n"
        "    --model.init_subfolder pretraining --data ./photos --output_dir runs/continued"
    )
    note = "Student, teacher, heads and decoders go on; the optimizer and the schedules start anew."
    return {"continue_command": command, "continue_note": note}


def _contents(facts: CardFacts) -> list[tuple[str, str]]:
    state = "the whole training state: student, teacher, heads, decoders; no optimizer"
    if facts.run.steps != facts.encoder_steps:  # the run did not keep its last checkpoint
        state += f"; of step {facts.run.steps:,}, the encoder is of step {facts.encoder_steps:,}"
    said = {
        "encoder": ("root", "the encoder with its code and image processor"),
        "native": ("`native/`", "the same encoder as a stock type of transformers, with its image processor"),
        "pretraining": ("`pretraining/`", state),
        "figures": ("`figures/`", "the pictures of this card"),
    }
    rows = [said[part] for part in said if part in facts.parts]
    return [*rows, ("`results.json`", "every measurement with its protocol")] if facts.records else rows


def _results(facts: CardFacts) -> dict[str, Any]:
    records = [record for record in merge_records(facts.records) if record.about.hub_type is not None]
    groups: dict[str, list[ResultRecord]] = {}
    for record in records:
        if record.evaluator != FINE_TUNING:
            own = record.evaluator if evaluator_of(record).has_related_tasks else ""
            groups.setdefault(own, []).append(record)
    tables = [_table(groups[name]) for name in sorted(groups, key=lambda name: not name)]
    finetuned = [record for record in records if record.evaluator == FINE_TUNING]
    return {
        "tables": [*tables, *([_finetuned_table(finetuned)] if finetuned else [])],
        "results_note": _reading(records, bool(finetuned)),
        "protocols": protocol_notes(records),
        "commands": list(dict.fromkeys(record.command for record in records if record.command)),
        "paper": _paper(facts, records),
    }


def _reading(records: Sequence[ResultRecord], finetuned: bool) -> str:
    """Say how the numbers of the tables are read."""
    seeds = max((len(record.seeds) for record in records), default=1)
    spread = "mean and standard deviation over probe seeds" if seeds > 1 else "one probe seed"
    lower = dict.fromkeys(record.metric.replace("_", " ") for record in records if not record.about.higher_is_better)
    sentences = [f"Of the frozen encoder, {spread}."]
    sentences += dict.fromkeys(evaluator_of(record).reading for record in records)
    sentences += ["Shares such as accuracies in percent."] if any(r.about.unit == "%" for r in records) else []
    sentences += [f"Lower is better: {', '.join(lower)}."] if lower else []
    sentences += ["The last table is of the encoder fine-tuned, for each row anew."] if finetuned else []
    return " ".join(filter(None, sentences))


def _table(records: Sequence[ResultRecord]) -> str:
    """Write a table: a row for each kind of features, a column for each measurement, and a mean over related tasks."""
    header, rows = table_rows(records)
    header, rows = header[1:], [row[1:] for row in rows]
    evaluator = evaluator_of(records[0])
    if evaluator.has_related_tasks and len(header) > 2:
        place = (records[0].dataset, records[0].split)
        metric = evaluator.metrics[0]
        quoted = [r for r in records if r.metric == metric.name and (r.dataset, r.split) == place]
        header = [*header, f"mean {metric.name}"]
        for row in rows:
            row.append(metric.text(statistics.fmean(r.value for r in quoted if r.features == row[0])))
    return table([[plain(text) for text in row] for row in ([name.replace("_", " ") for name in header], *rows)])


def _finetuned_table(records: Sequence[ResultRecord]) -> str:
    """Write a table: a row for each way of fine-tuning, a column for each measurement."""
    several = len({record.task for record in records}) > 1
    columns: list[str] = []
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for record in records:
        protocol = record.protocol
        settings = (protocol["method"], record.features, f"{protocol['epochs']:g}", f"{protocol['learning_rate']:.4g}")
        column = f"{record.task} {record.metric}" if several else record.metric
        columns += [column] if column not in columns else []
        cells.setdefault(settings, {})[column] = record.text
    rows = [[*settings, *(row.get(column, "") for column in columns)] for settings, row in cells.items()]
    return table([["fine-tuned", "head reads", "epochs", "learning rate", *columns], *rows])


def _paper(facts: CardFacts, records: Sequence[ResultRecord]) -> dict[str, str] | None:
    """Find the paper's figures for the same objectives, views and transformation; ``None`` where it has none."""
    mine = {
        "invariance": facts.objectives["invariance"]["name"],
        "equivariance": "+".join(facts.objective_names[1:]),
        "pipeline": (facts.run.section("views").get("pipeline") or {}).get("name"),
        "transformation": facts.run.transformation,
    }
    listed = yaml.safe_load((resources.files(__package__) / _PAPER).read_text(encoding="utf-8"))
    found = next((entry for entry in listed if mine.items() <= entry.items()), None)
    if found is None:
        return None
    ours = {record.task: record for record in records if record.primary and record.metric == found["metric"]}
    common = [task for task in found["figures"] if task in ours]
    if not common:
        return None
    rows = [
        [found["metric"].upper(), *(task.replace("_", " ") for task in common)],
        ["the paper", *(f"{found['figures'][task]:.4g}" for task in common)],
        ["this encoder", *(f"{ours[task].value:.3f}" for task in common)],
    ]
    difference = (
        f"{found['backbone']} on ImageNet-1k, with the paper's schedule and probes. They say what the method has "
        "reached there, not what this encoder should reach."
    )
    return {"row": found["row"], "table": found["table"], "difference": difference, "text": table(rows)}


def _training(facts: CardFacts) -> list[tuple[str, str]]:
    run, record = facts.run, facts.run.record
    steps = f"{facts.encoder_steps:,}" + ("" if facts.finished else f" of {run.planned_steps:,} planned")
    rows = [("objectives", _objectives(facts)), ("data", _data(facts)), ("optimizer steps", steps)]
    if (passes := run.passes(facts.encoder_steps)) is not None:
        rows.append(("passes over the images", f"{passes:.3g}"))
    batch = record.batch
    arithmetic = f"{batch['per_device']} x {batch['processes']} process(es) x accumulation {batch['accumulation']}"
    names = {run.data: facts.dataset} if facts.dataset else {}
    rows += [
        ("images per step", f"{arithmetic} = {record.global_batch}"),
        ("precision", record.precision),
        ("hardware", _hardware(record.hardware)),
        ("wall time", _duration(record.seconds) + (f", in {record.starts} starts" if record.starts > 1 else "")),
        ("date", (record.finished or record.started)[:10]),
        ("seed", str(record.seed)),
        ("changed on the way", plain("; ".join(change.text for change in record.changes))),
        ("command", code(public_command(record.command, names))),
        ("versions", ", ".join(plain(f"{name} {version}") for name, version in record.versions.items())),
    ]
    last = next((entry for entry in reversed(run.history) if "loss_ssl" in entry), None)
    if last is not None:
        parts = [f"{key} {last[key]:.4g}" for key in last if key.startswith("loss")]
        rows.append((f"losses at step {last['step']:,}", ", ".join(parts)))
    return [(name, text) for name, text in rows if text]


def _objectives(facts: CardFacts) -> str:
    entries = [f"{entry['weight']:g} x `{entry['name']}`" for entry in facts.objectives["equivariance"]]
    return " + ".join([f"`{facts.objectives['invariance']['name']}`", *entries])


def _data(facts: CardFacts) -> str:
    record = facts.run.record
    said = [code(facts.dataset or "not recorded")]
    if " (" in record.data:
        said.append(f"split {plain(record.data.rpartition(' (')[2].rstrip(')'))}")
    said.append(f"{record.num_images:,} images" if record.num_images else "a stream")
    return ", ".join(said)


def _hardware(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    if found.get("device") == found.get("cpu"):
        each = f", {found['threads']} thread(s) each" if found.get("threads") else ""
        return f"CPU only: {plain(str(found['cpu']))}, {found.get('devices', 1)} process(es){each}"
    return plain(f"{found.get('devices', 1)} x {found.get('device')}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _settings(facts: CardFacts) -> dict[str, Any]:
    """Collect what a recipe would say, for a run that had none."""
    config, default = facts.run.config.encoder_config, EquiSSLConfig()
    names = [item.name for item in fields(EquiSSLConfig) if not item.name.startswith("_")]
    values = {name: (getattr(config, name), getattr(default, name)) for name in names}
    return public_values(
        {
            "model": {name: value for name, (value, usual) in values.items() if value != usual},
            "objectives": facts.objectives,
            "training": dict(facts.run.arguments),
        }
    )


def _licence(facts: CardFacts) -> str:
    code_too = "The code files `*_equissl.py` are part of `hf_equissl`: apache-2.0."
    return f"{describe_licence(facts.licence)} {code_too}"


def _citations(facts: CardFacts) -> dict[str, Any]:
    used = [INVARIANCE_OBJECTIVES[facts.objective_names[0]]]
    used += [EQUIVARIANCE_OBJECTIVES[name] for name in facts.objective_names[1:]]
    own = EQUIVARIANCE_OBJECTIVES["reconstruction"].citation  # the paper of EquiSSL
    citations = dict.fromkeys([own, *(objective.citation for objective in used)])
    names = ", ".join(f"`{name}`" for name in facts.objective_names)
    return {"citations": list(citations), "citation_note": f"EquiSSL, and the papers of {names}:"}
