"""Stage `decoder`: distils the base's VAE decoder into a tiny one.

*Iteration* and *micro-batch* are defined in `training/manual_optimization.py`. The student is the decoder, which is updated
on every iteration.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Dtype, Frozen
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


class DecoderDistillation(ManualOptimization):
    """Trains a tiny decoder against the base's VAE decoder, which is frozen and runs in float32, or against the data's images.

    Args:
        family: the base.
        decoder: the network to train and export.
        max_student_updates: number of decoder updates, after which the run ends.
        reconstruction: the loss against the target images.
        sampler: samples the latents, as in SDXS; None uses the batch's, which are VAE means of images.
        target: the reconstruction target: the VAE's images of the same latents ("vae", as in SDXS), or the batch's images
            ("images"), whose latents come with the batch or are encoded in the step. On the toy world at equal budget
            the latter gives a higher PSNR of real images, since the VAE's own errors are not learned.
        features: frozen feature network of the discriminator; set together with the next two. None means no GAN.
        discriminator: heads on these features.
        adversarial: schedule and weight of the GAN.
        ema_decay: decay per update of the averaged decoder, which is evaluated and exported.
        accumulate_grad_batches: micro-batches per iteration; their gradients are averaged.
        gradient_clip_norm: maximum gradient norm, per network; None does not clip.
        seed: with a sample's position in the run it determines every random number of the step.
        real_score_dtype: dtype of the frozen networks except the VAE: the sampler's U-Net, text encoders, feature network.

    Raises:
        ValueError: if the arguments are inconsistent.

    Source: SDXS, arXiv:2403.16627, section 3.1 and eq. 5. The settings classes name the choices that the paper leaves open.
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
        self.average: DecoderAverage | None = None  # built in configure_model, like all weights
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
        """One micro-batch: reconstruction and GAN losses of the decoder, then the discriminator's loss."""
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
                self.accumulate(reconstruction, ["decoder"])
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
        """Backward of both decoder losses, adaptively weighted; returns the detached features of the decoder's images."""
        assert self.discriminator is not None and self.adversarial is not None
        with no_param_grad(self.discriminator):
            features = self._features_of(images, positions)
            adversarial = hinge_generator_loss(self.discriminator(features))
            # Each loss is differentiated down to the images; their sum then goes through the shared decoder once.
            (by_reconstruction,) = torch.autograd.grad(reconstruction, images, retain_graph=True)
            (by_adversarial,) = torch.autograd.grad(adversarial, images)
        weight = self.adversarial.weight(
            self._at_last_layer(images, by_reconstruction), self._at_last_layer(images, by_adversarial)
        )
        self.accumulate((images * (by_reconstruction + weight * by_adversarial)).sum(), ["decoder"])
        self.note("student/", adversarial_loss=adversarial, adversarial_weight=weight)
        return [feature_map.detach() for feature_map in features]

    def _at_last_layer(self, images: Tensor, gradient: Tensor) -> Tensor:
        """Backpropagates a gradient at the images to the decoder's last weight, averaged over ranks."""
        (at_weight,) = torch.autograd.grad(
            images, self.decoder.last_weight, grad_outputs=gradient, retain_graph=True
        )
        if dist.is_initialized():  # else the weight would depend on how the batch is split over ranks
            dist.all_reduce(at_weight)
            at_weight = at_weight / dist.get_world_size()
        return at_weight

    def _discriminator_backward(self, real_features: list[Tensor], fake_features: list[Tensor]) -> None:
        """Backward of the discriminator's loss; the fake images are those from before the decoder's update."""
        assert self.discriminator is not None and self.adversarial is not None
        r1_weight = self.adversarial.r1_weight
        loss, scalars = projected_discriminator_loss(
            self.discriminator, real_features, fake_features, r1_weight
        )
        self.note("discriminator/", **scalars)
        self.accumulate(loss, ["discriminator"])

    # ------------------------------------------------------------------------------------------------ parts of the step

    @property
    def student_updates(self) -> int:
        """Number of decoder updates: one per iteration."""
        return self.iterations

    @property
    def iteration_kind(self) -> tuple[str, int]:
        """All alike, but for the GAN that sets in."""
        return "", int(self.gan_is_on)

    @property
    def gan_is_on(self) -> bool:
        """Whether the GAN is active in this iteration."""
        if self.adversarial is None:
            return False
        return self.iterations >= self.adversarial.starts_at(self.max_student_updates)

    def _features_of(self, images: Tensor, positions: Tensor) -> list[Tensor]:
        """Feature maps of the images, or of a random crop of each; differentiable."""
        assert self._features is not None and self.adversarial is not None
        if self.adversarial.crop_px is not None:
            places = uniform(self.seed, Stream.AUGMENTATION, positions, (2,))
            images = cut_squares(images, places, self.adversarial.crop_px)
        features: list[Tensor] = self._features(images)
        return features

    # -------------------------------------------------------------------------------------------------- building, moving

    def configure_model(self) -> None:
        """Builds all networks. Idempotent. None is sharded: they are too small to benefit."""
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
        networks: dict[str, Network] = {"decoder": self.decoder}
        return networks if self.discriminator is None else networks | {"discriminator": self.discriminator}

    def on_fit_start(self) -> None:
        """Moves the frozen networks, which Lightning does not know about."""
        self.family.to(self.device, self.frozen_dtype)
        for frozen in (self.pairs.network, self._features):
            if frozen is not None:
                frozen.to(self.device)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype) -> None:
        """Writes an AutoencoderTiny folder. The decoder is unsharded, so rank 0 writes alone."""
        assert self.average is not None
        if self.global_rank != 0:
            return
        source = self.average.decoder if average else self.decoder.decoder
        weights = {
            # channels_last is for training only.
            name: tensor.detach().to("cpu", memory_format=torch.contiguous_format)
            for name, tensor in source.state_dict().items()
        }
        autoencoder = self.decoder.autoencoder(weights)
        nn.Module.to(autoencoder, dtype=dtype)  # the override of diffusers warns about every cast
        with new_folder(folder) as written:
            autoencoder.save_pretrained(written, safe_serialization=True)

    def on_train_start(self) -> None:
        """Stops at once if a finished run is resumed."""
        if self.student_updates >= self.max_student_updates:
            self.trainer.should_stop = True

    # ------------------------------------------------------------------------------------------------------ memory plan

    def plan_networks(self) -> list[PlannedNetwork]:
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
        """One iteration, with the GAN if enabled."""
        latents = self.pairs.latents(batch)
        target = self.pairs.targets(batch, latents)
        images = self.decoder(latents)
        reconstruction = self.reconstruction.loss(images, target, self.pairs.vae_factor)
        if self.discriminator is None:
            self.accumulate(reconstruction, ["decoder"])
        else:
            fake_features = self._adversarial_backward(images, reconstruction, batch.positions)
            self._discriminator_backward(self._features_of(target, batch.positions), fake_features)
        yield PlannedPhase("decoder and discriminator", tuple(self.networks))
        self._scalars.clear()
