"""Stage `decoder`: a tiny image decoder that imitates the base's own, on latents of the base.

For *iteration* and *micro-batch* see `training/manual_optimization.py`. The student here is the decoder; it is updated on
every iteration.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.export import new_folder
from sdxs_lightning.families import Family
from sdxs_lightning.networks.image_features import FeatureNetwork, ImageFeatures
from sdxs_lightning.networks.network import Network, no_param_grad
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.tiny_decoder import DecoderAverage, TinyDecoder
from sdxs_lightning.objectives.decoder_distillation import ProjectedAdversarial, Reconstruction
from sdxs_lightning.objectives.projected_gan import hinge_generator_loss, projected_discriminator_loss
from sdxs_lightning.stages.decoder_pairs import DecoderPairs, SampledLatents, Target
from sdxs_lightning.stages.distillation.augmentation import cut_squares
from sdxs_lightning.training.manual_optimization import ManualOptimization
from sdxs_lightning.training.plannable import PlannedNetwork, PlannedPhase

Dtype = Literal["float32", "bfloat16", "float16"]


class DecoderDistillation(ManualOptimization):
    """Trains a tiny decoder against the base's VAE decoder, which is frozen and runs in float32, or against the data's images.

    Args:
        family: the base.
        decoder: the network that will be exported.
        max_student_updates: the run ends after so many updates of the decoder.
        reconstruction: the loss against the target images.
        sampler: makes the latents, as in SDXS; None takes the batch's, which are VAE means of images.
        target: what the decoder's images are compared with: those of the VAE for the same latents, as in SDXS, or the
            batch's images, whose latents are the batch's or are encoded in the step. On the toy world at equal budget
            the latter gives a higher PSNR of real images, since the VAE's own errors are not learned.
        features: frozen network whose features the discriminator reads; goes with the two below. None means no GAN.
        discriminator: heads on the features.
        adversarial: the GAN's schedule and strength.
        ema_decay: of the averaged decoder that is evaluated and exported, per update.
        accumulate_grad_batches: micro-batches of an iteration; their gradients are averaged.
        gradient_clip_norm: of each network by itself; None does not clip.
        seed: of every random number of the step, together with a sample's position in the run.
        real_score_dtype: of the frozen networks in the step but the VAE: the sampler's U-Net, text encoders, features.

    Raises:
        ValueError: for parts that do not go together.

    Source: SDXS, arXiv:2403.16627, section 3.1 and eq. 5. The settings' classes name what the paper leaves open and we chose.
    """

    export_name = "decoder"

    def __init__(
        self,
        family: Family,
        decoder: TinyDecoder,
        max_student_updates: int,
        reconstruction: Reconstruction = Reconstruction(),
        sampler: SampledLatents | None = SampledLatents(),
        target: Target = "vae",
        features: ImageFeatures | None = None,
        discriminator: ProjectedDiscriminator | None = None,
        adversarial: ProjectedAdversarial | None = None,
        ema_decay: float = 0.999,
        accumulate_grad_batches: int = 1,
        gradient_clip_norm: float | None = 1.0,
        seed: int = 0,
        real_score_dtype: Dtype = "float32",
    ) -> None:
        super().__init__(accumulate_grad_batches, gradient_clip_norm)
        if max_student_updates < 1:
            raise ValueError(f"max_student_updates must be 1 or more, got {max_student_updates}.")
        if len({part is None for part in (features, discriminator, adversarial)}) > 1:
            raise ValueError(
                "features, discriminator and adversarial go together: set all three, or all to null."
            )
        self.pairs = DecoderPairs(sampler, target, seed)
        self.family = family
        self.decoder = decoder
        self.discriminator = discriminator
        self.average: DecoderAverage | None = None  # made in configure_model, as everything with weights
        self.max_student_updates = max_student_updates
        self.reconstruction = reconstruction
        self.adversarial = adversarial
        self.ema_decay = ema_decay
        self.seed = seed
        self.frozen_dtype: torch.dtype = getattr(torch, real_score_dtype)
        self._feature_source = features
        self._features: Frozen[FeatureNetwork] | None = None

    # ------------------------------------------------------------------------------------------------ the training step

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """One micro-batch: the decoder learns to reproduce the target images, the discriminator to tell them from its own."""
        latents = self.pairs.latents(batch)
        target = self.pairs.targets(batch, latents)
        with self.without_reducer():
            images = self.decoder(latents)
            reconstruction = self.reconstruction.loss(images, target, self.pairs.vae_factor)
            self.note("student/", reconstruction_loss=reconstruction)
            if self.gan_is_on:
                fake_features = self._adversarial_backward(images, reconstruction, batch.positions)
                self._discriminator_backward(self._features_of(target, batch.positions), fake_features)
            else:
                self.accumulate(reconstruction)
            if self.iteration_is_ending:
                self.apply_update("decoder")
                if self.gan_is_on:
                    self.apply_update("discriminator")
                assert self.average is not None
                self.average.update(self.decoder)
        self.end_micro_batch(student_updates=self.student_updates)
        if self.student_updates >= self.max_student_updates:
            self.trainer.should_stop = True

    def _adversarial_backward(
        self, images: Tensor, reconstruction: Tensor, positions: Tensor
    ) -> list[Tensor]:
        """The decoder's gradients of both losses, weighed against each other; returns the features of its images."""
        assert self.discriminator is not None and self.adversarial is not None
        with no_param_grad(self.discriminator):
            features = self._features_of(images, positions)
            adversarial = hinge_generator_loss(self.discriminator(features))
            # Each loss is followed back to the images once; the decoder, which both share, is passed once with their sum.
            (by_reconstruction,) = torch.autograd.grad(reconstruction, images, retain_graph=True)
            (by_adversarial,) = torch.autograd.grad(adversarial, images)
        weight = self.adversarial.weight(
            self._at_last_layer(images, by_reconstruction), self._at_last_layer(images, by_adversarial)
        )
        self.accumulate((images * (by_reconstruction + weight * by_adversarial)).sum())
        self.note("student/", adversarial_loss=adversarial, adversarial_weight=weight)
        return [feature_map.detach() for feature_map in features]

    def _at_last_layer(self, images: Tensor, gradient: Tensor) -> Tensor:
        """What a gradient at the images is at the decoder's last weight; the same on every rank."""
        (at_weight,) = torch.autograd.grad(
            images, self.decoder.last_weight, grad_outputs=gradient, retain_graph=True
        )
        if dist.is_initialized():  # else the weight would depend on how the batch is split over ranks
            dist.all_reduce(at_weight)
            at_weight = at_weight / dist.get_world_size()
        return at_weight

    def _discriminator_backward(self, real_features: list[Tensor], fake_features: list[Tensor]) -> None:
        """The heads learn to tell features of the VAE's images from those of the decoder's, as these were before its update."""
        assert self.discriminator is not None and self.adversarial is not None
        r1_weight = self.adversarial.r1_weight
        loss, scalars = projected_discriminator_loss(
            self.discriminator, real_features, fake_features, r1_weight
        )
        self.note("discriminator/", **scalars)
        self.accumulate(loss)

    # ------------------------------------------------------------------------------------------------ parts of the step

    @property
    def student_updates(self) -> int:
        """Updates of the decoder: one an iteration."""
        return self.iterations

    @property
    def gan_is_on(self) -> bool:
        """Whether this iteration has the GAN."""
        if self.adversarial is None:
            return False
        return self.iterations >= self.adversarial.starts_at(self.max_student_updates)

    def _features_of(self, images: Tensor, positions: Tensor) -> list[Tensor]:
        """Feature maps of the images, or of a random square of each; with graph where images have one."""
        assert self._features is not None and self.adversarial is not None
        if self.adversarial.crop_px is not None:
            places = uniform(self.seed, Stream.AUGMENTATION, positions, (2,))
            images = cut_squares(images, places, self.adversarial.crop_px)
        features: list[Tensor] = self._features(images)
        return features

    # -------------------------------------------------------------------------------------------------- building, moving

    def configure_model(self) -> None:
        """Loads every network, once. None is sharded: they are too small for that to pay."""
        if self.average is not None:
            return
        self.pairs.load(self.family, self.frozen_dtype)
        self.decoder.build(self.family.latent_shape()[0], self.pairs.vae_factor)
        if self.discriminator is not None:
            assert self._feature_source is not None and self.adversarial is not None
            network = self._feature_source.load()
            self._features = Frozen(network)
            self.discriminator.build(network.shapes(self.adversarial.crop_px or self.family.resolution))
            self._features.to(dtype=self.frozen_dtype)
        self.average = DecoderAverage(self.decoder, self.ema_decay)

    @property
    def networks(self) -> dict[str, Network]:
        """The networks that learn, by role."""
        networks: dict[str, Network] = {"decoder": self.decoder}
        return networks if self.discriminator is None else networks | {"discriminator": self.discriminator}

    def on_fit_start(self) -> None:
        """Moves what Lightning does not see."""
        self.family.to(self.device, self.frozen_dtype)
        for frozen in (self.pairs.network, self._features):
            if frozen is not None:
                frozen.to(self.device)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype) -> None:
        """Writes an AutoencoderTiny folder; the decoder is complete on every rank. See `callbacks.export.Exportable`."""
        assert self.average is not None
        if self.global_rank != 0:
            return
        source = self.average.decoder if average else self.decoder.decoder
        weights = {
            # channels_last is for training; files hold plain layouts.
            name: tensor.detach().to("cpu", memory_format=torch.contiguous_format)
            for name, tensor in source.state_dict().items()
        }
        autoencoder = self.decoder.autoencoder(weights)
        nn.Module.to(autoencoder, dtype=dtype)  # the override of diffusers warns about every cast
        with new_folder(folder) as written:
            autoencoder.save_pretrained(written, safe_serialization=True)

    def on_train_start(self) -> None:
        """A finished run that is resumed ends at once."""
        if self.student_updates >= self.max_student_updates:
            self.trainer.should_stop = True

    # ------------------------------------------------------------------------------------------------------ memory plan

    def plan_networks(self) -> list[PlannedNetwork]:
        """See `Plannable`."""
        networks = [
            PlannedNetwork(role, network, "trained", network.optimizer, sharded=False)
            for role, network in self.networks.items()
        ]
        assert self.average is not None
        networks.append(PlannedNetwork("average", self.average, "averaged", sharded=False))
        if self.pairs.network is not None:
            networks.append(PlannedNetwork("sampler", self.pairs.network.module, "frozen", sharded=False))
        if self._features is not None:
            networks.append(PlannedNetwork("features", self._features.module, "frozen", sharded=False))
        return networks

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        """See `Plannable`: an iteration with the GAN, if there is one."""
        latents = self.pairs.latents(batch)
        target = self.pairs.targets(batch, latents)
        images = self.decoder(latents)
        reconstruction = self.reconstruction.loss(images, target, self.pairs.vae_factor)
        if self.discriminator is None:
            self.accumulate(reconstruction)
        else:
            fake_features = self._adversarial_backward(images, reconstruction, batch.positions)
            self._discriminator_backward(self._features_of(target, batch.positions), fake_features)
        yield PlannedPhase("decoder and discriminator", tuple(self.networks))
        self._scalars.clear()
