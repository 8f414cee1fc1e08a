"""What happens with a finished run: merged, published, and how to load it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from ..encoders.export import check_replaceable
from ..evaluation.results import load_records, save_records
from ..hub.licences import Licence
from ..utils.files import move_into_place, staging_folder
from ..utils.load_errors import explain_load_errors
from .adapters import find_beside, is_adapter, load_finetuned, read_description, way_to_base
from .card import write_card
from .prepared import FineTuningRun
from .result_files import RESULTS
from .weights import SAVED_BESIDE, save_weights


def merge_adapter(adapter: str | Path, directory: str | Path, base: str | Path | None = None, **options: Any) -> Path:
    """Write an adapter and its base as one plain model, with processor and card.

    transformers' auto class and pipeline of the task load it without PEFT. An older merged model in the folder is
    replaced as a whole.

    Args:
        adapter: Folder or Hub id.
        directory: Where to write.
        base: As in ``load_finetuned``.
        **options: Further ones of ``load_finetuned``.

    Returns:
        ``directory``.

    Raises:
        ValueError: ``adapter`` is none; ``directory`` holds other files; and as ``load_finetuned``.
    """
    adapter, directory = str(adapter), Path(directory)
    check_replaceable(directory, also=SAVED_BESIDE)
    place = {name: value for name, value in options.items() if name != "trust_remote_code"}
    if not is_adapter(adapter, **place):
        raise ValueError(f"{adapter} holds no adapter (adapter_config.json): there is nothing to merge.")
    description, results = read_description(adapter, **place), find_beside(adapter, RESULTS, **place)
    records = [] if results is None else load_records(results)
    with explain_load_errors(adapter, "image processor", config_name="preprocessor_config.json", **place):
        processor = AutoImageProcessor.from_pretrained(adapter, trust_remote_code=False, **place)
    model: Any = load_finetuned(adapter, base, merge=True, **options)
    with staging_folder(directory) as staging:
        save_weights(description.make_task(), model, staging)
        processor.save_pretrained(staging)
        replace(description, base=way_to_base(adapter, description)).save(staging)
        save_records(records, staging / RESULTS)
        write_card(staging, description, records, name=directory.name)
        move_into_place(staging, directory)
    return directory


def publish(
    run: FineTuningRun,
    *,
    merge: bool | None = None,
    push_to_hub: bool | None = None,
    repo_id: str | None = None,
    private: bool | None = None,
    licence: Licence | None = None,
) -> str:
    """Merge and push a finished run as asked.

    Args:
        run: The trained run.
        merge: Write ``merged/`` beside the adapter.
        push_to_hub: Publish the merged model if there is one, else the adapter or model.
        repo_id: Name on the Hub, "owner/name".
        private: Make a new repository private.
        licence: That of the weights; needed for a push.

    Returns:
        For people: what lies where, and how to load it.
    """
    folder = run.folder
    lines = []
    if merge:
        settings = run.settings
        # The Hub id in the description may not exist yet: then the base is the folder of the encoder. Without such an
        # id the description knows the place, with commit and sub-folder.
        base = None if settings.base_id is None else Path(settings.encoder) / settings.subfolder
        folder = merge_adapter(
            run.folder, Path(settings.output_dir) / "merged", base, trust_remote_code=settings.trust_remote_code
        )
        lines.append(f"The merged model lies in {folder}.")
    if push_to_hub and repo_id is not None:
        from ..hub.benchmarks import write_eval_results
        from ..hub.push import push_repository

        records = load_records(folder / RESULTS)
        write_card(folder, run.description, records, name=repo_id, licence=licence)
        write_eval_results(records, repo_id, folder)
        copy = None if licence is None else licence.copy
        info = push_repository(folder, repo_id, private=private, licence_copy=copy)
        lines.append(f"Published: {info.repo_url}")
    what = "adapter" if run.settings.is_adapter else "model"
    load = f"hf_equissl.finetuning.load_finetuned({str(run.folder)!r})"
    lines.append(f"The {what} lies in {run.folder}. Load it with {load}.")
    return "\n".join(lines)
