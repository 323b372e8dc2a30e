"""examples/coco.py: its data, detectors, evaluation, and a run from end to end."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import coco_ranks
import pytest
import tiny_coco
import torch
import torchvision
from coco_ranks import measure
from models import randomise
from recipes_data import EXAMPLES
from test_recipes import records, run
from test_recipes_resume import assert_equal, start, wait_for_change, without_times
from torch import nn
from torchvision.transforms import v2

import spre_fx
from recipes.coco import Coco
from recipes.coco_data import AspectRatioBatches, CocoImages, splits
from recipes.coco_detectors import ALL_BUT_RESNET, FasterRCNN, MaskRCNN, build, start_from
from recipes.coco_evaluation import MEASURES, average_precision, detections
from recipes.errors import RecipeError

TRAINED_ON = 5  # of the tiny training images: those with objects

# pycocotools 2.0.11 decodes masks with an `__array__` of numpy 1.
_DECODING = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
WARNINGS = ["-W", "error", "-W", _DECODING]
pytestmark = pytest.mark.filterwarnings(_DECODING)


@pytest.fixture(name="root", scope="module")
def _root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "coco"
    tiny_coco.write(root)
    return root


@pytest.fixture(name="images")
def _images(root):
    """Training images with masks."""
    return CocoImages(splits(root)[0], masks=True)


def edit(root: Path, part: str, change) -> None:
    file = root / "annotations" / f"instances_{part}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_missing_pieces_of_the_layout_are_named(tmp_path):
    tiny_coco.write(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    (tmp_path / "val2017").rename(tmp_path / "validation")
    with pytest.raises(RecipeError) as error:
        splits(tmp_path)
    assert str(error.value) == (
        f"--data {tmp_path}: expected COCO 2017 as its archives unpack:\n"
        "    train2017/*.jpg\n"
        "    val2017/*.jpg\n"
        "    annotations/instances_train2017.json\n"
        "    annotations/instances_val2017.json\n"
        f"found no {tmp_path}/val2017, no {tmp_path}/annotations/instances_train2017.json. Unpack "
        "the missing archives there: https://cocodataset.org/#download"
    )


def test_a_sample_has_the_objects_of_its_image_and_no_crowd(images):
    image, target = images[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 64, 96)
    assert torch.equal(image[0], image[2])  # a grey JPEG
    assert type(target["boxes"]) is torch.Tensor
    assert target["image_id"] == 1000
    assert target["labels"].tolist() == [1, 2]  # categories 3 and 7
    assert target["boxes"].tolist() == [[6, 8, 30, 32], [32, 24, 56, 50]]
    assert target["masks"].shape == (2, 64, 96)
    square, triangle = target["masks"].sum((1, 2)).tolist()
    assert square == 24 * 24
    assert triangle == pytest.approx(24 * 26 / 2, rel=0.1)
    assert target["masks"][0, 8:32, 6:30].all()


def test_an_image_without_objects_is_evaluated_on_but_not_trained_on(images):
    assert len(images) == len(tiny_coco.SIZES)
    _, target = images[len(images) - 1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 64, 96)
    images.keep_those_with_objects()
    assert len(images) == TRAINED_ON
    assert all(len(images[index][1]["labels"]) for index in range(TRAINED_ON))


def test_boxes_are_cut_at_the_edge_and_left_out_if_nothing_remains(tmp_path):
    def move(content):
        content["annotations"][0]["bbox"] = [-5, -5, 15, 15]
        content["annotations"][1]["bbox"] = [95.5, 10, 20, 20]

    tiny_coco.write(tmp_path)
    edit(tmp_path, "train", move)
    _, target = CocoImages(splits(tmp_path)[0])[0]
    assert target["boxes"].tolist() == [[0, 0, 10, 10]]
    assert target["labels"].tolist() == [1]


def test_boxes_and_masks_are_mirrored_with_their_image(images):
    image, target = images[1]
    images.transform = v2.RandomHorizontalFlip(1.0)
    mirrored, moved = images[1]
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(moved["masks"], target["masks"].flip(-1))
    width = image.shape[-1]
    assert torch.equal(moved["boxes"][:, [0, 2]], width - target["boxes"][:, [2, 0]])


def without(key):
    return lambda content: [each.pop(key) for each in content["annotations"][1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("area"), "expected bbox, area, iscrowd, segmentation of every object, found no "),
        (without("segmentation"), "found no segmentation in annotation 2. Add it, as COCO defines"),
        (
            lambda content: content.pop("categories"),
            "annotations of instances, found no categories.",
        ),
        (
            lambda content: content["images"].append({"id": 1, "file_name": "x.jpg"}),
            "found 1 of 7 that are not there, such as x.jpg. Unpack",
        ),
    ],
)
def test_annotations_that_lack_something_are_refused(tmp_path, change, message):
    tiny_coco.write(tmp_path)
    edit(tmp_path, "train", change)
    with pytest.raises(RecipeError, match=r"instances_train2017\.json: expected") as error:
        CocoImages(splits(tmp_path)[0], masks=True)
    assert message in str(error.value)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    tiny_coco.write(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text()[:-10])
    with pytest.raises(RecipeError, match="found a file that is not whole"):
        CocoImages(splits(tmp_path)[1])


def test_both_parts_have_the_same_categories(tmp_path):
    tiny_coco.write(tmp_path)
    edit(tmp_path, "val", lambda content: content["categories"].pop())
    with pytest.raises(RecipeError, match=r"found ids \[3, 7\] and \[3\]"):
        Coco(root=tmp_path, detector="fasterrcnn").evaluation_data()


@pytest.mark.parametrize("count", [1, 7, 8, 12, 13])
def test_batches_are_wide_or_high_and_as_many_for_any_order(count):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        landscape = (torch.rand(30, generator=generator) < 0.6).tolist()
        order = torch.randperm(30, generator=generator)[:count].tolist()
        sampler = AspectRatioBatches(order, landscape, 4)
        batches = list(sampler)
        assert len(batches) == len(sampler) == count // 4
        assert all(len(batch) == 4 for batch in batches)
        taken = [index for batch in batches for index in batch]
        assert len({*taken}) == len(taken)
        assert {*taken} <= {*order}
        mixed = [len({landscape[index] for index in batch}) > 1 for batch in batches]
        assert not any(mixed[:-1])


@pytest.fixture(name="classifier", scope="module")
def _classifier():
    """The state of a ResNet-18 that was trained N:M sparse, at least for the looks of it."""
    torch.manual_seed(1)
    resnet = randomise(torchvision.models.resnet18())
    return spre_fx.prepare(resnet, "1:4").state_dict()


def detector(depth=18, **options):
    """A Faster R-CNN with a sparse backbone, or with a dense one for `pattern=None`."""
    dense = build("fasterrcnn", depth, classes=2, min_size=64, max_size=96)
    options = {"pattern": "1:4", "exclude": ALL_BUT_RESNET} | options
    return dense if options["pattern"] is None else spre_fx.prepare(dense, **options)


@pytest.mark.parametrize("name", ["fasterrcnn", "maskrcnn"])
def test_detectors_are_those_of_torchvision(name):
    builder = getattr(torchvision.models.detection, f"{name}_resnet50_fpn")
    with torch.device("meta"):
        own = build(name, 50, classes=80, min_size=800, max_size=1333)
        other = builder(weights=None, weights_backbone=None, num_classes=81)
    assert str(own) == str(other)
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert own.rpn.post_nms_top_n() == 1000


def test_a_sparse_backbone_is_taken_over_with_its_branches(classifier):
    model = detector()
    start_from(model, classifier, "r18.pt")
    body = model.backbone.body.state_dict()
    assert {*classifier} - {*body} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, classifier[key]) for key, value in body.items())
    frozen = {
        name.split(".")[2]
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    assert frozen == {"conv1", "bn1", "layer1"}
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert not any(name.startswith("backbone.body.layer1.") for name in trained)
    assert "backbone.body.layer2.0.conv1_spre.weight" in trained
    assert "backbone.body.layer2.0.bn1.weight" in trained


def test_masks_that_are_kept_stay_as_they_were():
    classifier = spre_fx.prepare(torchvision.models.resnet18(), "1:4", method="asp")
    classifier(torch.rand(2, 3, 32, 32))
    weights = classifier.state_dict()
    for value in weights.values():
        if value.dim() == 4 and value.is_floating_point():  # their masks would be others now
            value.normal_()
    model = detector(method="asp")
    start_from(model, weights, "r18.pt")
    target = {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])}
    model([torch.rand(3, 32, 32)], [target])
    body = model.backbone.body.state_dict()
    masks = [name for name in body if name.endswith(".nm_mask.mask")]
    assert len(masks) == 19
    assert all(torch.equal(body[name], weights[name]) for name in masks)


def test_batch_norms_keep_the_statistics_that_were_loaded(classifier):
    model = detector()
    start_from(model, classifier, "r18.pt")
    copied = copy.deepcopy(model.eval()).train()
    copied.backbone(torch.rand(2, 3, 32, 32))
    body = copied.backbone.body.state_dict()
    statistics = [name for name in body if name.split(".")[-1].startswith(("running", "num_"))]
    assert len(statistics) > 3 * 20
    assert all(torch.equal(body[name], classifier[name]) for name in statistics)
    assert copied.rpn.training


def test_a_dense_backbone_starts_as_what_n_m_alone_computes():
    torch.manual_seed(1)
    weights = randomise(torchvision.models.resnet18()).state_dict()
    x = torch.rand(2, 3, 32, 32)
    computed = {}
    for branch in ("spre", None):
        torch.manual_seed(0)
        model = detector(branch=branch)
        start_from(model, weights, "r18.pt")
        body = model.backbone.body
        assert body.get_submodule(
            "layer1.0.conv1"
        ).weight.requires_grad  # it has yet to become sparse
        assert not body.conv1.weight.requires_grad
        computed[branch] = model.train().backbone(x)
        assert torch.equal(body.bn1.running_mean, weights["bn1.running_mean"])
    assert body.get_submodule("layer1.0.bn1").training is False
    torch.testing.assert_close(computed["spre"], computed[None], rtol=0, atol=0)


def test_new_branches_learn_their_own_statistics():
    model = detector()
    start_from(model, torchvision.models.resnet18().state_dict(), "r18.pt")
    before = model.backbone.body.get_submodule("layer2.0.bn1_spre").running_var.clone()
    model.train().backbone(torch.rand(2, 3, 32, 32))
    assert not torch.equal(
        model.backbone.body.get_submodule("layer2.0.bn1_spre").running_var, before
    )


def test_a_dense_detector_of_a_dense_backbone_freezes_as_mmdetection_does():
    model = detector(pattern=None)
    start_from(model, torchvision.models.resnet18().state_dict(), "r18.pt")
    body = model.backbone.body
    assert not any(p.requires_grad for part in (body.bn1, body.layer1) for p in part.parameters())
    assert all(p.requires_grad for p in body.layer2.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, "expected a checkpoint of pattern 2:4, found one of pattern 1:4"),
        ({"pattern": None}, "expected dense weights for a dense backbone, found N:M sparse ones"),
        ({"branch": None}, "layer1.0.conv1_spre.weight, layer1.0.bn1_spre.weight, "),
        ({"depth": 34}, "no layer1.2.conv1.weight, no layer1.2.bn1.weight, "),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(classifier, options, message):
    with pytest.raises(RecipeError, match=r"--backbone r18\.pt: expected") as error:
        start_from(detector(**options), classifier, "r18.pt")
    assert message in str(error.value)


def outputs(images, shift=0.0):
    """What is true of each image as a detector says it, its boxes moved to the right."""
    for index in range(len(images)):
        _, target = images[index]
        yield (
            target["image_id"],
            {
                "boxes": target["boxes"] + torch.tensor([shift, 0, shift, 0]),
                "labels": target["labels"],
                "scores": torch.full((len(target["labels"]),), 0.9),
                "masks": target["masks"][:, None].float(),
            },
        )


def found(images, shift=0.0):
    each = (detections(*output, images.categories) for output in outputs(images, shift))
    return [detection for several in each for detection in several]


def test_perfect_detections_have_a_precision_of_one(images):
    crowded = {"image_id": 1000, "category_id": 3, "bbox": [0, 0, 2, 60], "score": 1.0}
    crowded["segmentation"] = images.truth.annToRLE(images.truth.imgToAnns[1000][-1])
    precision = average_precision(images.truth, [crowded, *found(images)], ("box", "mask"))
    assert list(precision) == [f"{k} {m}" for k in ("box", "mask") for m in MEASURES]
    assert precision == pytest.approx(dict.fromkeys(precision, 1.0))


def test_no_detections_have_a_precision_of_zero(images):
    precision = average_precision(images.truth, [], ("box", "mask"))
    assert precision == dict.fromkeys(precision, 0.0)
    assert len(precision) == 6


def test_an_iou_of_three_fifths_counts_at_the_thresholds_up_to_it(images):
    # All boxes are 24 wide: moved by s they have an IoU of (24 - s) / (24 + s), here 0.605.
    precision = average_precision(images.truth, found(images, shift=5.9), ("box", "mask"))
    assert precision["box AP50"] == pytest.approx(1)
    assert precision["box AP75"] == 0
    assert precision["box AP"] == pytest.approx(3 / 10)  # 0.5, 0.55 and 0.6 of ten
    assert precision["mask AP"] == pytest.approx(1)


def test_two_ranks_measure_what_one_does(root):
    directory = root.parent
    alone = measure(directory)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    command = [sys.executable, *WARNINGS, Path(__file__).parent / "coco_ranks.py", "1", directory]
    with subprocess.Popen(command, env=environment) as other:
        coco_ranks.main(0, directory)
    assert other.returncode == 0
    both = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]
    assert both == [alone, alone]
    assert alone["box AP50"] == pytest.approx(100 * 51 / 101)  # one of two images is grey
    assert 25 < alone["mask AP"] < 50  # JPEG blurs the edges


def options(root: Path, output: Path) -> list[object]:
    """Of a run that is short: on images of 32 pixels, with a ResNet-18."""
    where = ["--data", root, "--output", output, "--device", "cpu", "--workers", 0]
    return [*where, "--depth", 18, "--min-size", 32, "--max-size", 48, "--pattern", "1:4"]


def check_deployed(path: Path, kind: type[nn.Module]) -> None:
    """It is a detector whose ResNet is 1:4 and has no branches, and it runs."""
    model = torch.load(path, weights_only=False)
    assert isinstance(model, kind)
    sites = {site.name: site for site in spre_fx.sites(model)}
    convs = [site for name, site in sites.items() if name.startswith("backbone.body.layer")]
    assert len(convs) == 19
    for site in convs:
        weight = model.get_submodule(site.name).weight
        groups = weight.movedim(1, -1).reshape(-1, 4)
        assert (groups != 0).sum(1).max() == 1
    assert not any("_spre" in name for name, _ in model.named_modules())
    (output,) = model.eval()([torch.rand(3, 40, 40)])
    assert output["boxes"].shape[1] == 4


def test_it_runs_from_end_to_end(root, tmp_path, classifier):
    torch.save({"model": classifier}, tmp_path / "r18.pt")
    output = tmp_path / "run"
    more = ["--backbone", tmp_path / "r18.pt", "--epochs", 1, "--batch-size", 5]
    run("coco.py", *options(root, output), *more)
    settings, epoch, final = records(output)
    assert settings["settings"]["backbone"] == str(tmp_path / "r18.pt")
    assert epoch["epoch"] == 1
    assert epoch["lr"] == pytest.approx(0.02 * 5 / 16 * (0.001 + 0.999 / 500))
    results = final["results"]
    assert list(results) == ["trained", "trained, deployed"]
    assert list(results["trained"]) == [f"box {m}" for m in MEASURES]
    assert results["trained, deployed"] == pytest.approx(results["trained"], abs=0.01)
    state = torch.load(output / "checkpoint.pt", weights_only=True)["model"]
    kept = "layer1.0.conv1_spre.weight"
    assert torch.equal(state[f"backbone.body.{kept}"], classifier[kept])
    moved = "layer2.0.conv1_spre.weight"
    assert not torch.equal(state[f"backbone.body.{moved}"], classifier[moved])
    check_deployed(output / "deployed.pt", FasterRCNN)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_was_not(root, tmp_path, classifier):
    torch.save(classifier, tmp_path / "r18.pt")
    common = ["--backbone", tmp_path / "r18.pt", "--epochs", 2, "--batch-size", 2, "--resume"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("coco.py", *options(root, whole), *common)
    command = [sys.executable, EXAMPLES / "coco.py", *options(root, killed), *common]
    with start(command) as process:
        wait_for_change(killed / "checkpoint.pt", process)
        process.kill()
    run("coco.py", *options(root, killed), *common)
    ours, theirs = (
        torch.load(each / "checkpoint.pt", weights_only=True) for each in (killed, whole)
    )
    assert_equal(ours, theirs, "checkpoint")
    assert without_times(killed) == without_times(whole)


@pytest.mark.slow
def test_mask_rcnn_on_two_ranks(root, tmp_path):
    output = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    script = [EXAMPLES / "coco.py", *options(root, output), "--model", "maskrcnn"]
    command = [sys.executable, *WARNINGS, *torchrun, *script, "--epochs", 1, "--batch-size", 4]
    done = subprocess.run(
        [*map(str, command), "--ema", "0.9"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    settings, _, final = records(output)
    assert settings["settings"]["world_size"] == 2
    for name in ("trained", "EMA"):
        trained, deployed = final["results"][name], final["results"][f"{name}, deployed"]
        assert list(trained) == [f"{k} {m}" for k in ("box", "mask") for m in MEASURES]
        assert deployed == pytest.approx(trained, abs=0.01)
    check_deployed(output / "deployed-ema.pt", MaskRCNN)
    alone = measure(root.parent, torch.load(output / "deployed.pt", weights_only=False))
    assert alone == pytest.approx(final["results"]["trained, deployed"], abs=0.01)
