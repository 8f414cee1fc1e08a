"""Licences follow weights and data: inherited, stated, refused, on a Hub of the tests' own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from hf_equissl.encoders import save_encoder
from hf_equissl.encoders.convert import convert_to_folder
from hf_equissl.hub import repository
from hf_equissl.hub import terms as terms_module
from hf_equissl.hub.licences import choose_licence
from hf_equissl.hub.terms import find_terms, terms_of_recipe
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.training import push_to_hub
from hf_equissl.utils.strict_yaml import dump_yaml, load_yaml

from .loopback_hub import LoopbackHub
from .tiny_run import copy_of, run

__all__ = ["run"]  # a fixture

# Repositories with a card -> its head. "absent" has none.
MODELS = {
    "maker/free": {"license": "apache-2.0"},
    "maker/never": {"license": "cc-by-nc-4.0"},
    "maker/own": {"license": "other", "license_name": "my-terms", "license_link": "https://example.org/terms"},
    "maker/silent": {"tags": ["vision"]},
}
DATA = {"maker/photos": {"license": "cc-by-4.0"}, "maker/shared": {"license": ["mit", "cc-by-sa-4.0"]}}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 16}
DINOV3 = ("other", "dinov3-license")


def put(api: HfApi, name: str, head: dict[str, Any], kind: str = "model", **files: str) -> None:
    api.create_repo(name, repo_type=kind, exist_ok=True)
    for path, text in {"README.md": f"---\n{dump_yaml(head)}---\n# Card\n", **files}.items():
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=name, repo_type=kind)


def recipe(base: str | None, data: str) -> dict[str, Any]:
    model = {} if base is None else {"init_from": base} | ({} if base.startswith("/") else {"init_revision": "main"})
    return {"model": model, "data": {"source": data}}


def test_what_follows_from_what(api: HfApi) -> None:
    """Base weights, data, the publisher's answer -> the licence, or words of what is asked or refused."""
    for kind, cards in (("model", MODELS), ("dataset", DATA)):
        for name, head in cards.items():
            put(api, name, head, kind)
    free, nc = "maker/free", "maker/never"
    ours, asked = "yours to say", "Say under which licence"
    cases: list[tuple[str | None, str, str | None, Any]] = [
        # inherited
        (None, "maker/photos", None, ("cc-by-4.0", None)),
        (free, "maker/photos", None, ("apache-2.0", None)),
        (nc, "maker/photos", "inherit", ("cc-by-nc-4.0", None)),
        ("maker/own", "maker/photos", "inherit", ("other", "my-terms")),
        (free, "/data/3DIEBench", "inherit", ("cc-by-nc-4.0", None)),
        (free, "ILSVRC/imagenet-1k", "inherit", ("other", "imagenet-terms-of-access")),
        (nc, "/data/3DIEBench", "inherit", ("cc-by-nc-4.0", None)),
        # stated
        (None, "/home/me/photos", "mit", ("mit", None)),
        (free, "ILSVRC/imagenet-1k", "apache-2.0", ("apache-2.0", None)),
        ("maker/silent", "maker/photos", "mit", ("mit", None)),
        (nc, "/home/me/photos", "cc-by-nc-4.0", ("cc-by-nc-4.0", None)),
        # asked
        (None, "/home/me/photos", None, ours),
        (free, "/home/me/photos", None, ours),
        ("maker/silent", "maker/photos", None, ours),
        ("maker/absent", "maker/photos", None, ours),
        (None, "maker/shared", None, asked),
        (free, "ILSVRC/imagenet-1k", None, "non-commercial research and education only"),
        (free, "/data/3DIEBench", None, asked),
        (nc, "maker/photos", None, "no commercial use"),
        (nc, "ILSVRC/imagenet-1k", None, "Two licences at once"),
        # refused
        (nc, "maker/photos", "apache-2.0", "cannot be given away"),
        ("maker/own", "maker/photos", "mit", "cannot be given away"),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "maker/photos", "apache-2.0", "cannot be given away"),
        (free, "/home/me/photos", "inherit", "yours to say"),
        (free, "maker/photos", "unknown", "expected an identifier"),
        (free, "maker/photos", "Apache 2", "expected an identifier"),
        (free, "maker/photos", "other", "--license_name"),
    ]
    for base, data, answer, expected in cases:
        terms = terms_of_recipe(recipe(base, data))
        if isinstance(expected, tuple):
            found = choose_licence(terms, answer)
            assert ((found.license, found.name), found.question) == (expected, ""), (base, data, answer)
            assert found.stated == (answer is not None)
        elif answer is None:
            found = choose_licence(terms)
            assert expected in found.question, (base, data)
            assert found.license == "unknown"
        else:
            with pytest.raises(ValueError, match=re.escape(expected)):
                choose_licence(terms, answer)


def test_what_is_advised_helps(api: HfApi) -> None:
    """Every answer that a question or a refusal names is accepted; where none can be, none is named."""
    for name in ("maker/never", "maker/own"):
        put(api, name, MODELS[name])
    for base, data in (
        ("maker/never", "/home/me/photos"),
        ("maker/own", "/home/me/photos"),
        ("maker/never", "imagenet"),
    ):
        made_of = terms_of_recipe(recipe(base, data))
        said = [choose_licence(made_of).question]
        for wrong in ("mit", "inherit"):
            with pytest.raises(ValueError, match="--license ") as refused:
                choose_licence(made_of, wrong)
            said.append(str(refused.value))
        for text in said:
            words = text.rpartition("--license ")[2].removesuffix(".").split()
            answer = dict(zip(("name", "link"), words[2::2], strict=False))
            assert choose_licence(made_of, words[0], **answer).question == "", text
    both = find_terms("weights", "maker/never") + find_terms("weights", "maker/own")
    assert "no answer fits both" in choose_licence(both).question
    for answer in ("inherit", "cc-by-nc-4.0"):
        with pytest.raises(ValueError, match="no answer fits both"):
            choose_licence(both, answer)


def test_a_licence_of_ones_own_may_lie_beside(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the text")
    given = choose_licence((), "other", name="mine", copy=tmp_path / "text")
    assert (given.link, given.copy) == ("LICENSE.md", str(tmp_path / "text"))


def test_what_is_said_of_the_data_stands_beside_what_is_known(api: HfApi) -> None:
    put(api, "maker/photos", DATA["maker/photos"], "dataset")

    def licences(source: str) -> list[str]:
        return [each.license for each in terms_of_recipe(recipe(None, source), dataset="maker/photos")]

    assert licences("/data/3DIEBench") == ["cc-by-nc-4.0", "cc-by-4.0"]
    assert licences("maker/absent") == ["unknown", "cc-by-4.0"]
    assert licences("/home/me/folder") == ["cc-by-4.0"]  # nothing but its name is known of a folder
    assert licences("maker/photos") == ["cc-by-4.0"]


def test_models_on_this_machine_say_what_they_were_made_of(api: HfApi, tmp_path: Path) -> None:
    put(api, "maker/never", MODELS["maker/never"])
    model = tmp_path / "tuned" / "adapter"
    model.mkdir(parents=True)
    (model / "finetuning.json").write_text('{"base": "encoder", "revision": null}')
    (model / "results.json").write_text('{"results": [{"dataset": "3DIEBench"}]}')
    (model / "README.md").write_text("---\ntags: [vit]\n---\n")

    def said(path: Path) -> list[tuple[str, str, str]]:
        return [(each.kind, each.source, each.license) for each in find_terms("weights", str(path))]

    data = ("data", "3DIEBench", "cc-by-nc-4.0")
    assert said(model) == [("weights", "encoder", "unknown"), data]
    (model / ".base").write_text("maker/never\n")
    assert said(model) == [("weights", "maker/never", "cc-by-nc-4.0"), data]
    (model / ".base").unlink()
    (tmp_path / "tuned" / "finetune.json").write_text('{"encoder": "maker/never", "data": "/home/me/photos"}')
    assert said(model) == [("weights", "maker/never", "cc-by-nc-4.0"), ("data", "photos", "unknown")]
    # A converted encoder, and a run that starts from it.
    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / ".base").write_text("maker/never\n")
    assert said(converted) == [("weights", "maker/never", "cc-by-nc-4.0")]
    assert terms_of_recipe(recipe(str(converted), "3DIEBench"))[0].license == "cc-by-nc-4.0"


def test_converted_folders_name_their_source(tmp_path: Path) -> None:
    source = save_encoder(EquiSSLModel(EquiSSLConfig(**SMALL)), tmp_path / "dinov3-small", [0.5] * 3, [0.25] * 3)
    convert_to_folder(source, tmp_path / "native", to="native")
    assert find_terms("weights", str(tmp_path / "native"))[0].name == "dinov3-license"


def test_files_have_the_card_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("weights", "photos"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (tmp_path / "weights" / "ibot.pth").touch()
    monkeypatch.setattr(terms_module, "fetch_file", lambda *words: pytest.fail(f"asked the Hub for {words}"))
    for kind, source in (
        ("weights", "weights/ibot.pth"),
        ("weights", "weights/gone.pth"),
        ("weights", str(tmp_path / "weights" / "ibot.pth")),
        ("data", "photos/train.parquet"),
        ("data", "photos/*.tar"),
    ):
        (found,) = find_terms(kind, source)
        assert (found.license, found.source) == ("cc-by-nc-4.0", Path(source).name)


def test_weights_under_dinov3s_licence_travel_with_it(api: HfApi, tmp_path: Path) -> None:
    put(api, "maker/dinov3-tiny", {"license": "other"}, **{"LICENSE.md": "DINOv3 License, all of it"})
    for base, found in (("maker/dinov3-tiny", True), ("maker/dinov3-bare", False)):
        licence = choose_licence(find_terms("weights", base), "inherit")
        if found:
            assert (licence.license, licence.name) == DINOV3
            assert Path(str(licence.copy)).read_text() == "DINOv3 License, all of it"
        else:
            assert "give it with --license_file PATH" in licence.question
            assert licence.license == "unknown"
    (tmp_path / "text").write_text("the text")
    given = choose_licence(find_terms("weights", "maker/dinov3-bare"), "inherit", copy=tmp_path / "text")
    assert (given.question, given.copy) == ("", str(tmp_path / "text"))


def test_a_run_that_starts_from_a_run_inherits_from_both(tmp_path: Path) -> None:
    (tmp_path / "first" / "encoder").mkdir(parents=True)
    (tmp_path / "first" / "recipe.yaml").write_text(dump_yaml(recipe(None, "/data/3DIEBench")))
    terms = terms_of_recipe(recipe(str(tmp_path / "first" / "encoder"), "/home/me/photos"))
    assert [(each.kind, each.source, each.license) for each in terms] == [
        ("data", "3DIEBench", "cc-by-nc-4.0"),
        ("data", "photos", "unknown"),
    ]


@pytest.fixture
def made_of(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Copies of a finished run that say to be made of other things; cards without running their code."""
    monkeypatch.setattr(repository, "run_snippets", lambda chosen: None)

    def make(name: str, base: str | None, data: str) -> Path:
        folder = copy_of(run, tmp_path / name)
        said = load_yaml((folder / "recipe.yaml").read_text(), "recipe.yaml")
        said["model"] |= recipe(base, data)["model"]
        said["data"] |= recipe(base, data)["data"]
        (folder / "recipe.yaml").write_text(dump_yaml(said))
        return folder

    return make


def test_publish(
    hub_here: LoopbackHub,
    api: HfApi,
    made_of: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command: inherited, stated, and refused, before anything is created."""
    put(api, "maker/free", MODELS["maker/free"])
    put(api, "maker/dinov3-tiny", {}, **{"LICENSE": "DINOv3 License"})
    put(api, "maker/photos", DATA["maker/photos"], "dataset")

    def publish(run: Path, name: str, *words: str) -> tuple[int, str]:
        code = push_to_hub.main([str(run), "--repo_id", f"maker/{name}", "--parts", "encoder", "card", *words])
        captured = capsys.readouterr()
        return code, captured.err + captured.out

    inherited = made_of("inherited", "maker/free", "maker/photos")
    assert publish(inherited, "inherited")[0] == 0
    card = ModelCard.load("maker/inherited")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "maker/free")
    assert card.data.datasets == ["maker/photos"]
    assert "Weights: apache-2.0, inherited." in card.text
    assert "base weights `maker/free` (apache-2.0); training images `maker/photos` (cc-by-4.0)" in card.text

    bound = made_of("bound", "maker/dinov3-tiny", "maker/photos")
    for words in ([], ["--license", "apache-2.0"]):
        code, said = publish(bound, "bound", *words)
        assert code == 2
        assert "--license inherit" in said
    code, said = publish(bound, "bound", "--dry_run")
    assert code == 0
    assert "Before it is: What this was made of may not be used for everything" in said
    assert "license: unknown" in said
    assert not api.repo_exists("maker/bound")
    assert publish(bound, "bound", "--license", "inherit")[0] == 0
    card = ModelCard.load("maker/bound")
    assert (card.data.license, card.data.license_name) == DINOV3
    assert card.data.license_link.startswith("https://ai.meta.com/")
    assert Path(api.hf_hub_download("maker/bound", "LICENSE.md")).read_text() == "DINOv3 License"
    assert "LICENSE.md" in card.text
    assert publish(inherited, "bound")[0] == 0  # under another licence now: the old text does not stay
    assert "LICENSE.md" not in api.list_repo_files("maker/bound")

    # A folder that was built without an answer is refused until its card says one.
    built = tmp_path / "built"
    images = made_of("images", None, str(tmp_path / "imagenet"))
    code, said = publish(images, "images", "--output_dir", str(built))
    assert code == 0
    assert "write its licence into the head of README.md" in said
    assert push_to_hub.main([str(built), "--repo_id", "maker/images"]) == 2
    assert "does not say under which licence" in capsys.readouterr().err
    (built / "README.md").write_text((built / "README.md").read_text().replace("license: unknown", "license: mit"))
    assert push_to_hub.main([str(built), "--repo_id", "maker/images"]) == 0
    assert ModelCard.load("maker/images").data.license == "mit"
    assert "non-commercial research and education only" in ModelCard.load("maker/images").text
