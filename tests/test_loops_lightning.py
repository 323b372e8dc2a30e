"""A Lightning Trainer, with checkpoint and resume, and no code of ours but the two functions."""

import warnings

import pytest
import torch
from loops import RECIPES, assert_agrees, batch, loss_of, prepared, quick, sgd
from models import assert_same

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning imports warns of what it imports
    lightning = pytest.importorskip("lightning", reason="Lightning is an optional extra")


WITHOUT_OUR_CODE = [name for name in RECIPES if name != "taylor"]


def module_of(recipe: str) -> "lightning.LightningModule":
    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = prepared(recipe)

        def training_step(self, images):
            return loss_of(self.net, images)

        def validation_step(self, images):
            self.log("val_loss", loss_of(self.net, images))

        def configure_optimizers(self):
            return sgd(self.net)

    return Classifier()


def fit(module, directory, steps, **options):
    batches = torch.utils.data.DataLoader([batch(step) for step in range(4)], batch_size=None)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=directory,
        **{key: value for key, value in options.items() if key != "ckpt_path"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        trainer.fit(module, batches, batches, ckpt_path=options.get("ckpt_path"), weights_only=True)
    return trainer


@pytest.mark.parametrize("recipe", quick("sr-ste every 3", "asp", "rigl", of=WITHOUT_OUR_CODE))
def test_a_trainer_saves_resumes_and_ends_as_one_that_did_not(recipe, tmp_path):
    straight = module_of(recipe)
    fit(straight, tmp_path, 10)
    first = module_of(recipe)
    # At the end of an epoch: in the middle of one, Lightning would begin its batches anew.
    fit(first, tmp_path, 4).save_checkpoint(tmp_path / "half.ckpt")
    resumed = module_of(recipe)
    fit(resumed, tmp_path, 10, ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.state_dict(), straight.state_dict())
    assert_agrees(resumed.net)


def test_a_trainer_in_bfloat16_clips_and_accumulates(tmp_path):
    module = module_of("sr-ste")
    fit(
        module,
        tmp_path,
        4,
        precision="bf16-mixed",
        gradient_clip_val=0.1,
        accumulate_grad_batches=2,
    )
    assert_agrees(module.net)


def test_another_pattern_is_refused_by_the_trainer_too(tmp_path):
    fit(module_of("sr-ste"), tmp_path, 1).save_checkpoint(tmp_path / "one.ckpt")
    other = module_of("sr-ste")
    other.net = prepared(pattern="2:4")
    with pytest.raises(RuntimeError, match="expected a checkpoint of pattern 2:4, found one of"):
        fit(other, tmp_path, 2, ckpt_path=tmp_path / "one.ckpt")
