"""Further views: each kind through a real pipeline and a real encoder, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_equissl.data import ImageViewDataset, load_images
from hf_equissl.modeling import EquiSSLModel
from hf_equissl.objectives.equimod import UnaugmentedImage
from hf_equissl.objectives.essl import FourRotations
from hf_equissl.objectives.ser import TransformedPairs
from hf_equissl.objectives.stl import PairedViews
from hf_equissl.pretraining.encoding import encode_crops, encode_extra
from hf_equissl.views import RotationFamily, build_transformation
from hf_equissl.views.base import UNLABELLED, Item, map_tensors
from hf_equissl.views.collator import ViewCollator, collate_views
from hf_equissl.views.needs import ExtraViews, Needs
from hf_equissl.views.pipelines import PipelineSpec, ViewPipeline, ViewSpec
from tests.objectives.helpers import tiny_config

ORIGINAL = ExtraViews("original", UnaugmentedImage, hidden_layers=(1,), last_layer=1)
SMALL_CROP = ViewSpec(crop_scale=(0.05, 0.14))
TURNED = ExtraViews("turned", FourRotations, {"size": 16, "spec": SMALL_CROP}, patches=False)
# A third of the images, as SER sets apart.
THIRD = {"share": 1 / 3, "local_pairs": 0, "grid_scale": (0.7, 1.3), "grid_ratio": (0.75, 4 / 3)}
SHARE = ExtraViews("share", TransformedPairs, THIRD, teacher=(0, 1), hidden_layers=(1,), joins=(0, 1))
PAIRS = ExtraViews("pairs", PairedViews)


USUAL = (ViewSpec(), ViewSpec(solarize_probability=0.5))


def pipeline_of(*extra: ExtraViews, family=None, labels: bool = False, specs=USUAL, **needs) -> ViewPipeline:
    return ViewPipeline(
        PipelineSpec(specs),
        image_size=32,
        transformation=family or RotationFamily(),
        needs=Needs(extra=extra, labels=labels, **needs),
        image_mean=(0.5,) * 3,
        image_std=(0.25,) * 3,
        patch_size=8,
    )


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8))


def batch_of(pipeline: ViewPipeline, images: int = 6, seed: int = 0):
    samples = [
        {**pipeline.crop(Item((picture(n),), label=n), np.random.default_rng([seed, n])), "index": n}
        for n in range(images)
    ]
    return ViewCollator(pipeline)(samples)


def flat(batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(batch, found.append)
    return found


def test_no_usual_crop_moves():
    plain, full = pipeline_of(), pipeline_of(ORIGINAL, TURNED)
    usual, beside = plain(batch_of(plain)), full(batch_of(full))
    assert torch.equal(usual.global_crops, beside.global_crops)
    alone = pipeline_of(TURNED)
    assert all(map(torch.equal, alone(batch_of(alone)).extra["turned"], beside.extra["turned"]))


def test_kinds_and_shapes():
    pipeline = pipeline_of(ORIGINAL, TURNED, SHARE, labels=True)
    views = pipeline(batch_of(pipeline))
    assert views.global_crops.shape == (2, 4, 3, 32, 32)
    assert views.labels.tolist() == [0, 1, 2, 3, 4, 5]  # those that join follow
    assert [view.shape for view in views.extra["original"]] == [(4, 3, 32, 32)]
    assert [view.shape for view in views.extra["turned"]] == [(4, 3, 16, 16)] * 4
    assert torch.equal(views.extra["turned"][1], views.extra["turned"][0].rot90(1, dims=(-2, -1)))
    facts = views.facts["share"]
    for view, (*grid, turns) in zip(views.extra["share"], facts["geometries"], strict=True):
        sides = grid if turns % 2 == 0 else grid[::-1]
        assert view.shape == (2, 3, 8 * sides[0], 8 * sides[1])
    drawn = {str(batch_of(pipeline, seed=seed)["extra"]["share"]["geometries"]) for seed in range(8)}
    assert len(drawn) > 2
    assert batch_of(pipeline)["extra"]["share"]["geometries"] == facts["geometries"]


def test_features_are_those_of_a_pass_of_their_own():
    pipeline = pipeline_of(ORIGINAL, TURNED, SHARE)
    views = pipeline(batch_of(pipeline))
    torch.manual_seed(0)
    encoder = EquiSSLModel(tiny_config(num_hidden_layers=3, cls_insertion_layer=1)).eval()
    features = encode_crops(encoder, views.global_crops)
    encode_extra(encoder, views, features, [(extra, extra.of_student) for extra in pipeline.needs.extra])
    assert features.cls.shape == (2, 6, 32)
    assert features.tokens.shape[:2] == (2, 4)
    whole = encoder(views.extra["share"][1], output_hidden_states=True)
    torch.testing.assert_close(features.cls[1, 4:], whole.pooler_output)
    share = features.extra["share"][1]
    torch.testing.assert_close(share.hidden[1].patches, whole.hidden_states[1])
    assert share.hidden[1].tokens.shape[1] == share.grid[0] * share.grid[1]
    with pytest.raises(ValueError, match="cls_insertion_layer"):
        _ = share.hidden[1].cls
    original = features.extra["original"][0]
    torch.testing.assert_close(original.tokens, encoder(views.extra["original"][0], last_layer=1).last_hidden_state)
    assert features.extra["turned"][3].tokens.shape == (4, 1, 32)
    torch.testing.assert_close(features.extra["turned"][3].cls, encoder(views.extra["turned"][3]).pooler_output)


def test_views_of_drawn_sizes_have_a_pass_each():
    drawn = replace(TURNED, sizes_are_drawn=True)
    pipeline = pipeline_of(TURNED)
    views = pipeline(batch_of(pipeline))
    encoder = EquiSSLModel(tiny_config()).eval()
    passes: list[int] = []
    encoder.register_forward_hook(lambda _, args, output: passes.append(len(args[0])))
    found = []
    for extra in (TURNED, drawn):
        features = encode_crops(encoder, views.global_crops)
        encode_extra(encoder, views, features, [(extra, None)])
        found.append(features.extra["turned"])
    assert passes == [12, 24, 12, 6, 6, 6, 6]
    for view in range(4):
        torch.testing.assert_close(found[0][view].tokens, found[1][view].tokens)


class NoImages(UnaugmentedImage):
    def takes_from_batch(self, images: int) -> int:
        return 0

    def collate(self, own, samples, rng):
        return {"images": len(own), "samples": len(samples)}


def test_a_share_of_no_images_is_not_all_of_them():
    batch = batch_of(pipeline_of(ExtraViews("none", NoImages)), images=3)
    assert batch["extra"] == {"none": {"images": 0, "samples": 0}}
    assert len(batch["draws"]) == 3


def test_pairs_share_their_crops_and_g_follows():
    shared = tuple(replace(spec, flip_probability=0.0, blur_probability=0.0) for spec in USUAL)
    pipeline = pipeline_of(PAIRS, parameters=True, specs=shared)
    same = picture(0)
    samples = [{**pipeline.crop(Item((same,)), np.random.default_rng(number)), "index": number} for number in range(4)]
    assert "global_crops" not in samples[0]
    views = pipeline(ViewCollator(pipeline)(samples))
    first = views.global_crops[0]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[2], first[3])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(views.global_crops[1, 0], views.global_crops[1, 1])  # g is each image's own
    assert views.parameters.shape == (4, 1)
    assert not views.extra


@pytest.mark.parametrize("extra", [(ORIGINAL, TURNED, SHARE), (PAIRS,)], ids=["beside", "instead"])
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_and_resume_change_nothing(photo_folder, streaming, extra):
    pipeline = pipeline_of(*extra)

    def batches(workers: int, skip: int = 0):
        if streaming:
            from hf_equissl.data import StreamingViewDataset

            data = StreamingViewDataset(load_images(photo_folder, streaming=True), pipeline, 3, shuffle_buffer=4)
            loader = DataLoader(data, 8, collate_fn=ViewCollator(pipeline), num_workers=workers)
            return [batch for _, batch in zip(range(3), loader, strict=False)][skip:]
        data = ImageViewDataset(load_images(photo_folder), pipeline, 3)
        keys = list(data.sampler())[8 * skip :]
        return list(DataLoader(data, 8, sampler=keys, collate_fn=ViewCollator(pipeline), num_workers=workers))

    expected = batches(0)
    drawn = [drawn_for_all(batch) for batch in expected]
    assert len({str(each) for each in drawn}) > 1
    for workers, skip in ((1, 0), (0, 1)):
        again = batches(workers, skip)
        for one, other in zip(again, expected[skip:], strict=False):
            assert drawn_for_all(one) == drawn_for_all(other)
            assert all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


def drawn_for_all(batch):
    """What SER draws for a batch; without its views what STL draws for the first pair."""
    extra = batch["extra"]
    return extra["share"]["geometries"] if "share" in extra else extra["pairs"]["draws"][:2].tolist()


def test_blank_views_have_the_shapes_of_training():
    pipeline = pipeline_of(ORIGINAL, TURNED, SHARE, ExtraViewsOfAnotherKind, labels=True, fractions=(0.5,))
    real, blank = pipeline(batch_of(pipeline, 20)), pipeline.blank(20, device="meta")
    for name in ("global_crops", "labels", "intermediate_images"):
        assert getattr(blank, name).shape == getattr(real, name).shape
        assert getattr(blank, name).device.type == "meta"
    assert [view.shape for view in blank.extra["turned"]] == [view.shape for view in real.extra["turned"]]
    assert len(blank.extra["share"][0]) == len(real.extra["share"][0]) == 7
    assert all(isinstance(number, int) for number in blank.facts["share"]["geometries"][0])


ExtraViewsOfAnotherKind = ExtraViews("second", FourRotations, {"size": 24, "spec": SMALL_CROP})


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="join the usual crops"):
        pipeline_of(ExtraViews("share", TransformedPairs, THIRD, joins=(0,)))
    with pytest.raises(ValueError, match=r"replaces the global crops.*how they were cropped"):
        pipeline_of(PAIRS, photometric=True)
    with pytest.raises(ValueError, match=r"'pairs' replaces the global crops, and 'share' is made of them"):
        pipeline_of(PAIRS, SHARE)
    with pytest.raises(ValueError, match="different further images called 'turned'"):
        _ = Needs(extra=(TURNED,)) | Needs(
            extra=(ExtraViews("turned", FourRotations, {"size": 8, "spec": SMALL_CROP}),)
        )
    assert (Needs(extra=(TURNED,)) | Needs(extra=(TURNED,))).extra == (TURNED,)
    pipeline = pipeline_of(replace(SHARE, options=THIRD | {"share": 0.9}))
    with pytest.raises(ValueError, match="too small: further views take 2"):
        batch_of(pipeline, 2)


def test_one_missing_label_does_not_drop_the_others():
    samples = [{"draws": torch.zeros(1), "index": number} for number in range(3)]
    assert "labels" not in collate_views(samples)
    assert collate_views([samples[0] | {"label": 4}, samples[1], samples[2] | {"label": 0}])["labels"].tolist() == [
        4,
        UNLABELLED,
        0,
    ]


# ---- g of many families, and g of the data ----


def test_more_draws_than_are_reserved_move_no_crop():
    members = [{"name": name} for name in ("rotation", "crop", "color_jitter", "flip")]
    joint = build_transformation("joint", families=members)
    assert joint.num_draws > 24
    plain, full = pipeline_of(), pipeline_of(family=joint, parameters=True)
    usual, together = plain(batch_of(plain)), full(batch_of(full))
    assert torch.equal(usual.global_crops[0], together.global_crops[0])
    assert together.parameters.shape == (6, joint.num_parameters)
    assert joint.parameter_names[:2] == ("rotation_angle", "crop_top")


def test_one_of_touches_each_image_with_one_family_alone():
    family = build_transformation("one_of", families=[{"name": "rotation"}, {"name": "crop"}, {"name": "flip", "p": 1}])
    parameters = family.sample(torch.rand(3000, family.num_draws, generator=torch.Generator().manual_seed(0)))
    rotated = parameters[:, 0] != 0
    cropped = (parameters[:, 1:5] != torch.tensor([0.0, 0.0, 1.0, 1.0])).any(dim=1)
    flipped = parameters[:, 5] != 0
    assert torch.equal(rotated.int() + cropped.int() + flipped.int(), torch.ones(3000, dtype=torch.int32))
    for share in (rotated, cropped, flipped):
        assert share.float().mean() == pytest.approx(1 / 3, abs=0.04)
    images = torch.rand(3000, 3, 4, 4)
    assert torch.equal(family.apply(images, parameters)[flipped], images[flipped].flip(-1))


def test_joint_applies_one_after_the_other():
    rotation, translation = build_transformation("rotation"), build_transformation("translation")
    joint = build_transformation("joint", families=[{"name": "rotation"}, {"name": "translation"}])
    images, parameters = torch.rand(4, 3, 32, 32), joint.sample(torch.rand(4, joint.num_draws))
    for fraction in (0.5, 1.0):
        turned = rotation.apply(images, parameters[:, :1], fraction)
        expected = translation.apply(turned, parameters[:, 1:], fraction)
        assert torch.equal(joint.apply(images, parameters, fraction), expected)


def test_pairs_with_parameters_come_from_the_data():
    family = build_transformation("given", parameters=["hue", "angle"], ranges=[(0, 1), (-90, 90)])
    pipeline = pipeline_of(family=family, parameters=True)
    pairs = [Item((picture(n), picture(n + 10)), {"x": 7.0, "angle": 45.0, "hue": 0.25 * n}, n) for n in range(3)]
    samples = [{**pipeline.crop(pair, np.random.default_rng(n)), "index": n} for n, pair in enumerate(pairs)]
    views = pipeline(ViewCollator(pipeline)(samples))
    assert views.parameters.tolist() == [[0.0, 45.0], [0.25, 45.0], [0.5, 45.0]]
    assert views.normalized_parameters[2].tolist() == [0.0, 0.5]
    single = pipeline.crop(Item(pairs[0].images[1:], pairs[0].parameters), np.random.default_rng(0))
    assert torch.equal(samples[0]["global_crops"][1], single["global_crops"][1])
    with pytest.raises(ValueError, match="takes hue, angle from the data, and the data set gives no parameters"):
        pipeline.crop(Item((picture(0),)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="takes hue from the data, and the data set gives angle"):
        pipeline.crop(Item((picture(0),), {"angle": 0.0}), np.random.default_rng(0))
    with pytest.raises(ValueError, match="3 images at a time"):
        pipeline.crop(Item((picture(0),) * 3, pairs[0].parameters), np.random.default_rng(0))
