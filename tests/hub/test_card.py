"""Model cards: what they say follows from the run, and what they must not say is not there."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_equissl.hub.card.figures import Figure, draw_figures
from hf_equissl.hub.card.metadata import eval_result
from hf_equissl.hub.card.snippets import Snippet, SnippetError, run_snippets, snippets
from hf_equissl.hub.card.text import CardFacts, render_card
from hf_equissl.hub.licences import Licence
from hf_equissl.hub.privacy import is_hub_id, public_command, public_source, public_text, public_values
from hf_equissl.hub.run_folder import RunFolder
from hf_equissl.modeling import EquiSSLConfig
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES
from hf_equissl.utils.markdown import plain
from tests.utils.test_markdown import HOSTILE

from .tiny_run import records_of, run

__all__ = ["run"]  # a fixture

REPO = "some-lab/tiny-rot"
OURS = EQUIVARIANCE_OBJECTIVES["reconstruction"].citation


def facts_of(read: RunFolder, **changes: Any) -> CardFacts:
    encoder = read.config.encoder_config
    parts = ("encoder", "native", "pretraining")
    given = {
        "repo_id": REPO,
        "licence": Licence("apache-2.0", stated=True),
        "run": read,
        "encoder": encoder,
        "encoder_steps": read.steps,
        "num_parameters": 12345,
        "parts": parts,
        "snippets": snippets(REPO, encoder, parts),
        "dataset": "some-lab/photos",
    }
    return CardFacts(**{**given, **changes})


@pytest.fixture(scope="module")
def read(run: Path) -> RunFolder:
    return RunFolder.read(run)


def trained_with(read: RunFolder, invariance: str, equivariance: str | None) -> RunFolder:
    config = type(read.config).from_dict(read.config.to_dict())
    config.invariance = {"name": invariance}
    config.equivariance = [{"name": equivariance, "weight": 3.0}] if equivariance else []
    return replace(read, config=config)


@pytest.mark.parametrize("invariance", INVARIANCE_OBJECTIVES)
@pytest.mark.parametrize("equivariance", [*EQUIVARIANCE_OBJECTIVES, None])
def test_every_objective_is_cited(read: RunFolder, invariance: str, equivariance: str | None) -> None:
    card = render_card(facts_of(trained_with(read, invariance, equivariance)))
    text = card.text
    cited = {OURS, INVARIANCE_OBJECTIVES[invariance].citation}
    if equivariance:
        cited.add(EQUIVARIANCE_OBJECTIVES[equivariance].citation)
        assert f"`{invariance}` + 3 x `{equivariance}`" in text
    assert all(citation in text for citation in cited)
    assert len(re.findall(r"^@\w+\{", text, re.MULTILINE)) == len(cited)
    told = invariance == "supervised"
    assert "pretrained with class labels" in text if told else "pretrained without labels" in text
    assert ("self-supervised-learning" in card.data.tags) != told
    assert ("what self-supervised features keep" in text) != told


def test_no_placeholder_survives(read: RunFolder, photo_folder: Path) -> None:
    records = records_of(read.path, photo_folder)
    for facts in (facts_of(read), facts_of(read, records=records), facts_of(replace(read, recipe=None))):
        head, _, _ = str(render_card(facts)).partition("## Citation")  # BibTeX has double braces
        assert not re.search(r"\{%|%\}|\{\{|\bNone\b|\bnan\b|TODO|More Information|\n\n\n", head)


def test_fine_tuned_results_have_a_table_and_names_of_their_own(read: RunFolder, photo_folder: Path) -> None:
    frozen = records_of(read.path, photo_folder)
    linear = next(record for record in frozen if record.evaluator == "linear")
    settings = {"epochs": 5.0, "learning_rate": 0.0042426}
    finetuned = [
        replace(
            linear,
            evaluator="finetune",
            features="cls_patches",
            metric=metric,
            values=(value,),
            protocol={"method": method, **settings},
        )
        for method, metric, value in (("lora", "top1", 0.58), ("lora", "top5", 0.95), ("full", "top1", 0.61))
    ]
    card = render_card(facts_of(read, records=[*frozen, *finetuned]))
    assert "| fine-tuned | head reads | epochs | learning rate | top1 | top5 |" in card.text
    assert "| lora | cls_patches | 5 | 0.004243 | 58.00 | 95.00 |" in card.text
    assert "| full | cls_patches | 5 | 0.004243 | 61.00 |  |" in card.text
    assert "fine-tuned, for each row anew" in card.text
    assert "fine-tuning and robustness were not measured" not in card.text
    names = [result.metric_name for result in card.data.eval_results]
    assert {"linear top1 (cls)", "finetune lora top1 (cls_patches)", "finetune full top1 (cls_patches)"} <= set(names)
    assert len(set(names)) == len(names)


def test_equal_facts_give_an_equal_card(run: Path, photo_folder: Path) -> None:
    cards = {str(render_card(facts_of(RunFolder.read(run), records=records_of(run, photo_folder)))) for _ in range(2)}
    assert len(cards) == 1
    assert ModelCard(cards.pop()).data.model_name == "tiny-rot"


def test_words_of_the_user_are_text_and_nothing_else(read: RunFolder) -> None:
    words = "Made by {{ 7 * 7 }} people on /home/someone/photos.\n\n---\nlicense: mit\n---"
    card = render_card(facts_of(read, description=words))
    assert card.data.license == "apache-2.0"
    assert "Made by {{ 7 * 7 }} people on photos." in card.text


def structure(card: str) -> list[tuple[str, str]]:
    """Blocks of a card with its headings, whatever is said in them."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.partition("\n---\n")[2])
    headings = {index + 1 for index, token in enumerate(tokens) if token.type == "heading_open"}
    return [(token.type, token.content if index in headings else "") for index, token in enumerate(tokens)]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_changes_the_structure_of_a_card(read: RunFolder, photo_folder: Path, name: str) -> None:
    def card(word: str) -> str:
        recipe = {**read.recipe, "name": word, "description": word, "monitor": {"source": word}}
        device = {"device": word, "cpu": word, "threads": 1}
        record = replace(read.record, data=f"{word} ({word})", command=shlex.join(["x", word]), hardware=device)
        records = [
            replace(known, dataset=word, split=word, command=shlex.join(["y", word]), protocol={"note": word, word: 1})
            for known in records_of(read.path, photo_folder)
        ]
        facts = facts_of(
            replace(read, recipe=recipe, record=record),
            records=records,
            dataset=word,
            native_reason=word,
            figures=[Figure("a.png", plain(word), plain(word))],
            snippets=snippets(word, read.config.encoder_config, ("encoder", "native", "pretraining")),
        )
        return str(render_card(facts))

    assert structure(card(name)) == structure(card("harmless"))
    for snippet in snippets(name, read.config.encoder_config, ("encoder", "native", "pretraining")):
        strings = [node.value for node in ast.walk(ast.parse(snippet.code)) if isinstance(node, ast.Constant)]
        assert name in strings


def test_limits_follow_from_the_run(read: RunFolder, photo_folder: Path) -> None:
    text = render_card(facts_of(read)).text
    assert "Trained at 32 x 32 pixels. Other sizes in multiples of 8" in text
    assert "`some-lab/photos` (32 images)" in text
    assert "each image was seen about 1 times" in text
    assert "Trained on a CPU, without a GPU." in text
    assert "one family of transformations, `rotation`" in text
    assert "Nothing was measured: judge it" in text
    assert "unfinished" not in text

    record = replace(
        read.record,
        num_images=None,
        hardware={"device": "NVIDIA H200", "devices": 8, "cpu": "a CPU", "threads": 2},
        seconds=7384.0,
        starts=3,
    )
    stream = replace(read, record=record, planned_steps=100)
    text = render_card(facts_of(stream, records=records_of(read.path, photo_folder))).text
    assert "Short training" not in text  # how often an image of a stream was seen is not known
    assert "| passes over the images |" not in text
    assert "without a GPU" not in text
    assert "| hardware | 8 x NVIDIA H200 |" in text
    assert "| wall time | 2 h 3 min, in 3 starts |" in text
    assert "has taken 4 of 100 planned steps" in text
    assert "The run is unfinished: 4 of 100 planned steps." in text
    assert "Measured by `transformation_regression`, `linear`, `effective_rank`" in text


def test_a_state_that_is_older_than_the_encoder_is_said_to_be(read: RunFolder) -> None:
    assert "; of step" not in render_card(facts_of(read)).text
    text = render_card(facts_of(replace(read, steps=2, planned_steps=4), encoder_steps=4)).text
    assert "no optimizer; of step 2, the encoder is of step 4 |" in text


def test_the_papers_figures_stand_only_beside_a_match(read: RunFolder, photo_folder: Path) -> None:
    records = records_of(read.path, photo_folder)
    text = render_card(facts_of(read, records=records)).text
    assert "| the paper | 0.9983 | 0.9801 |\n| this encoder | 0.600 | 0.250 |" in text
    assert "**The paper's figures, not ours**, for Ours(SIE, all, rot) (Table 2 of" in text
    others = (
        trained_with(read, "dino", "reconstruction"),  # the paper has no such row
        trained_with(read, "vicreg", None),
        replace(read, recipe={**read.recipe, "views": {**read.recipe["views"], "transformation": {"name": "crop"}}}),
        replace(read, recipe=None),
    )
    for other in others:
        assert "the paper" not in render_card(facts_of(other, records=records)).text.lower().replace(
            "the papers of", ""
        )


def test_a_start_from_another_encoder_is_named(read: RunFolder) -> None:
    def started_from(**model: str) -> ModelCard:
        recipe = {**read.recipe, "model": {**read.recipe["model"], **model}}
        return render_card(facts_of(replace(read, recipe=recipe)))

    card = started_from(init_from="facebook/dinov2-small", init_revision="0f1e")
    assert card.data.base_model == "facebook/dinov2-small"
    assert "starting from `facebook/dinov2-small`" in card.text
    assert "Beside its starting point's data it has seen" in card.text
    # No link of the Hub, and no commit of it.
    for folder in ("/home/me/my_encoder", "runs/my_encoder", "runs/my_encoder/encoder", "my_encoder/checkpoint-4"):
        card = started_from(init_from=folder)
        assert card.data.base_model is None
        assert "starting from `my_encoder`" in card.text


def test_several_seeds_are_a_mean_and_a_deviation(read: RunFolder, photo_folder: Path) -> None:
    record = records_of(read.path, photo_folder)[0]
    entry = eval_result(record)
    assert (entry.metric_value, entry.metric_args["std"], entry.metric_args["seeds"]) == (0.6, 0.1414, [0, 1])
    assert entry.metric_type == "r_squared"
    assert "std" not in eval_result(replace(record, values=(0.5,), seeds=(0,))).metric_args


def test_captions_say_what_is_in_the_figures(read: RunFolder, photo_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = [
        {"step": 0, "monitor/knn_top1": 0.25},
        {
            "step": 10,
            "loss": 9.0,
            "loss_ssl": 5.0,
            "loss_reconstruction": 4.0,
            "effective_rank": 8.0,
            "feature_std": 0.5,
        },
        {
            "step": 20,
            "loss": 6.0,
            "loss_ssl": 4.5,
            "loss_reconstruction": 1.5,
            "effective_rank": 3.5,
            "feature_std": 0.4,
        },
        {
            "step": 30,
            "loss": 5.0,
            "loss_ssl": 4.0,
            "loss_reconstruction": 1.0,
            "effective_rank": 6.0,
            "feature_std": 0.4,
        },
        {"step": 30, "monitor/knn_top1": 0.5},
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "monitor.png").write_bytes(b"a picture")
    seen = replace(read, path=tmp_path / "run", history=tuple(history))
    figures = draw_figures(seen, records_of(read.path, photo_folder), tmp_path / "figures")
    captions = {figure.file: figure.caption for figure in figures}
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(captions)
    assert "From step 10 to step 30: loss from 9 to 5" in captions["losses.png"]
    assert "2.5 x reconstruction from 4 to 1" in captions["losses.png"]
    assert "lowest at step 20 with 3.5 and ends at 6.0" in captions["features.png"]
    assert "Best: rotation 0.600, least: translation 0.250, mean 0.425" in captions["r2.png"]
    assert "fixed set of training images" in captions["monitor.png"]
    assert "kNN accuracy from 0.25 to 0.5" in captions["monitor.png"]
    assert draw_figures(replace(seen, path=tmp_path, history=()), [], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/someone/data/cifar10", "cifar10"),
        ("/data/My Photos/", "My Photos"),
        ("/data/photos (train)", "photos (train)"),
        ("~/photos", "photos"),
        ("../shared/photos", "photos"),
        ("C:\\Users\\me\\photos", "photos"),
        ("file:///mnt/disk/set.tar", "set.tar"),
        ("read from /mnt/disk/a.png, then '/mnt/b'", "read from a.png, then 'b'"),
        ("key=/mnt/c", "key=c"),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("training/pretrain.py", "training/pretrain.py"),
        ("https://arxiv.org/abs/2503.18753", "https://arxiv.org/abs/2503.18753"),
        ("7/8 and/or 1 / 2", "7/8 and/or 1 / 2"),
        ("hf_" + "a1" * 17, "removed"),
    ],
)
def test_paths_and_tokens_become_names(text: str, public: str) -> None:
    assert public_text(text) == public


def test_commands_keep_what_others_need() -> None:
    command = (
        "python /home/me/code/training/pretrain.py --recipe cifar10_ibot --data '/data/my photos' --hub_token abc "
        "--training.seed=3 --views.image_mean '[0.5, 0.5, 0.5]' --output_dir=/scratch/me/run --api_key=xyz"
    )
    assert public_command(command, {"/data/my photos": "some-lab/photos"}) == (
        "python training/pretrain.py --recipe cifar10_ibot --data some-lab/photos "
        "--training.seed=3 --views.image_mean '[0.5, 0.5, 0.5]' --output_dir=run"
    )


def test_settings_lose_secrets_and_ways() -> None:
    values = {"hub_token": "abc", "source": "/data/x", "use_mask_token": True, "files": ["/a/b", 3], "api_key": "t"}
    assert public_values(values) == {"source": "x", "use_mask_token": True, "files": ["b", 3]}


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "photos").mkdir(parents=True)
    assert (public_source("data/photos"), public_source("uoft-cs/cifar10")) == ("photos", "uoft-cs/cifar10")
    assert is_hub_id("data/photos")
    assert not any(map(is_hub_id, (None, "photos", "./photos", "a/b/c", "data/train.parquet", 'x"/y')))


def test_snippets_are_held_to_what_they_say() -> None:
    code = "import torch\ntokens = torch.zeros(1, 2, 3)\n"
    good = Snippet("One", code, needs_package=False, shape=(1, 2, 3))
    with pytest.raises(
        SnippetError, match=r"'Two' does not run: .*tokens are \(1, 2, 3\), the comment says \(1, 2, 4\)"
    ):
        run_snippets([good, Snippet("Two", code, needs_package=False, shape=(1, 2, 4))])
    other = "import torch\ntokens = torch.full((1, 2, 3), 0.01)\n"
    with pytest.raises(SnippetError, match=r"'Two' does not run: .*differ by 1\.00e-02"):
        run_snippets([good, Snippet("Two", other, needs_package=False, shape=(1, 2, 3))])
    with pytest.raises(SnippetError, match=r"'One' does not run: .*imported it"):
        run_snippets([Snippet("One", "import hf_equissl", needs_package=False)])


def test_only_snippets_of_parts_that_are_there() -> None:
    config = EquiSSLConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    assert snippets(REPO, config, []) == []
    native = snippets(REPO, config, ["native"])
    assert [snippet.needs_package for snippet in native] == [False]
    assert native[0].code.count(f'"{REPO}", subfolder="native"') == 2
    both = snippets(REPO, config, ["encoder", "pretraining"])
    assert not any("reconstruct" in snippet.code for snippet in both)  # without a decoder
