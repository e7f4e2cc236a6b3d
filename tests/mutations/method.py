"""Mutations of the method: losses, updates, networks, and how processes share them."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

CORE, NETWORKS, OBJECTIVES = "sdxs_lightning/core", "sdxs_lightning/networks", "sdxs_lightning/objectives"
DISTILLATION, TRAINING = "sdxs_lightning/stages/distillation", "sdxs_lightning/training"
CONTROLNET, CONTROLNET_TESTS = (
    "sdxs_lightning/stages/controlnet",
    "tests/training/test_controlnet_training.py",
)
STEP_BY_HAND = (
    "tests/training/distillation/test_training_step.py::test_an_iteration_equals_the_same_step_in_plain_torch"
)

MUTATIONS = (
    Mutation(
        "sign of the score difference",
        f"{OBJECTIVES}/distribution_matching.py",
        "gradient = (fake_x0.float() - real_x0) / distance",
        "gradient = (real_x0 - fake_x0.float()) / distance",
        "tests/objectives/test_objectives.py::test_a_step_against_the_gradient_moves_from_fake_to_real",
    ),
    Mutation(
        "alphas off by one",
        f"{CORE}/noise_schedule.py",
        "return self._at(self.alpha, timesteps)",
        "return self._at(self.alpha, (timesteps - 1).clamp_min(0))",
        "tests/parity/test_noise_schedule_parity.py::test_add_noise_and_velocity_equal_ddpm",
    ),
    Mutation(
        "missing detach in the distribution matching loss",
        f"{OBJECTIVES}/distribution_matching.py",
        "target = (pred_x0 - gradient.float()).detach()",
        "target = pred_x0 - gradient.float()",
        "tests/parity/test_objectives_parity.py::test_distribution_matching",
    ),
    Mutation(
        "guidance on the wrong branch",
        f"{CORE}/guidance.py",
        "return cond + (guidance_scale - 1.0) * (cond - uncond)",
        "return uncond + (guidance_scale - 1.0) * (uncond - cond)",
        "tests/core/test_small_pure_parts.py::test_guidance",
    ),
    Mutation(
        "unconditional half from the wrong prompt",
        f"{CORE}/batch.py",
        "            prompt_embeds=self.negative_prompt_embeds,\n            pooled",
        "            prompt_embeds=self.prompt_embeds.roll(1, 0),\n            pooled",
        "tests/core/test_batch.py::test_doubled_is_the_unconditional_half_then_the_conditional",
    ),
    Mutation(
        "average not updated",
        f"{DISTILLATION}/step.py",
        "            self.ema.update(self.student)\n",
        "",
        "tests/training/distillation/test_training_step.py::test_average_follows_student_updates_only",
    ),
    Mutation(
        "last timestep of a range never drawn",
        f"{CORE}/timesteps.py",
        "return integers(seed, stream, positions, self.low, self.high + 1)",
        "return integers(seed, stream, positions, self.low, self.high)",
        "tests/core/test_small_pure_parts.py::test_a_range_draws_both_ends_and_nothing_else",
    ),
    Mutation(
        "GAN labels flipped",
        f"{OBJECTIVES}/adversarial.py",
        "return softplus(fake_logits.float()).mean() + softplus(-real_logits.float()).mean()",
        "return softplus(-fake_logits.float()).mean() + softplus(real_logits.float()).mean()",
        "tests/objectives/test_objectives.py::test_the_gan_at_indifference_and_its_directions",
    ),
    Mutation(
        "time ids swapped",
        "sdxs_lightning/families/sdxl.py",
        "return torch.cat([original, corner, target], dim=1)",
        "return torch.cat([corner, original, target], dim=1)",
        "tests/parity/test_families_parity.py::test_sdxl_time_ids_are_those_of_the_samples_own_size_and_crop",
    ),
    Mutation(
        "epsilon as the target of a v-prediction base",
        f"{CORE}/noise_schedule.py",
        "return schedule.alpha_t(timesteps) * noise.float() - schedule.sigma_t(timesteps) * latents.float()",
        "return noise.float()",
        "tests/core/test_noise_schedule.py::test_the_target_decodes_to_the_latents_and_the_noise",
    ),
    Mutation(
        "clipping before averaging over ranks",
        f"{TRAINING}/manual_optimization.py",
        "        optimizer = self._optimizer_of(role)\n",
        "        optimizer = self._optimizer_of(role)\n"
        "        clip_gradients(self.networks[role].parameters(), self.gradient_clip_norm)\n",
        "tests/training/distillation/test_distributed.py::test_same_weights_as_one_process",
    ),
    Mutation(
        "optimizer of the wrong network",
        f"{TRAINING}/manual_optimization.py",
        "return optimizers[list(self.networks).index(role)]",
        "return optimizers[0]",
        STEP_BY_HAND,
    ),
    Mutation(
        "ratio off by one",
        f"{DISTILLATION}/update_schedule.py",
        "student=index % self.student_every == 0",
        "student=index % (self.student_every + 1) == 0",
        "tests/training/distillation/test_training_step.py::test_run_ends_after_the_last_student_update",
    ),
    Mutation(
        "student trained by the discriminator's loss",
        f"{DISTILLATION}/step.py",
        "self._fake_score_and_discriminator_update(sample.detach(), part)",
        "self._fake_score_and_discriminator_update(sample, part)",
        "tests/training/distillation/test_training_step.py::test_which_networks_move",
    ),
    Mutation(
        "features of the fake half without graph",
        f"{DISTILLATION}/gan.py",
        "self.discriminator(torch.cat([fake_features, real_features]))",
        "self.discriminator(torch.cat([fake_features.detach(), real_features]))",
        STEP_BY_HAND,
    ),
    Mutation(
        "GAN weight ignored",
        f"{OBJECTIVES}/adversarial.py",
        "return self.student_weight * generator_loss(fake_logits)",
        "return generator_loss(fake_logits)",
        "tests/objectives/test_objectives.py::test_weights_multiply",
    ),
    Mutation(
        "accumulated gradients summed",
        f"{TRAINING}/manual_optimization.py",
        "self.manual_backward(loss / self.accumulate_grad_batches)",
        "self.manual_backward(loss)",
        "tests/training/distillation/test_training_step.py::test_two_micro_batches_are_one_batch_of_twice_the_size",
    ),
    Mutation(
        "one seed for all streams",
        f"{CORE}/seeding.py",
        "_GOLDEN * (int(stream) + 1)",
        "_GOLDEN",
        "tests/core/test_seeding.py::test_streams_seeds_positions_and_elements_are_independent",
    ),
    Mutation(
        "guidance applied twice",
        f"{OBJECTIVES}/distribution_matching.py",
        "guided = guide(cond.pred_x0, uncond.pred_x0, scale)",
        "guided = guide(guide(cond.pred_x0, uncond.pred_x0, scale), uncond.pred_x0, scale)",
        STEP_BY_HAND,
    ),
    Mutation(
        "x_0 from another timestep",
        f"{NETWORKS}/denoiser.py",
        "known = noisy_latents, timesteps, self.schedule, self.prediction_type",
        "known = noisy_latents, timesteps // 2, self.schedule, self.prediction_type",
        STEP_BY_HAND,
    ),
    Mutation(
        "a sample used again at the same noise",
        f"{OBJECTIVES}/term.py",
        "return self.seed + (self.use << 40)",
        "return self.seed",
        "tests/training/distillation/test_cheaper_updates.py::test_a_sample_used_twice_draws_new_noise_and_timesteps",
    ),
    Mutation(
        "alignment in the wrong direction",
        f"{NETWORKS}/fake_score.py",
        "own[name].lerp_(weight, self.alignment)",
        "weight.lerp_(own[name], self.alignment)",
        "tests/training/distillation/test_cheaper_updates.py::test_alignment_moves_the_fake_score_by_its_share_after_a_student_update",
    ),
    Mutation(
        "stale samples for the later updates",
        f"{DISTILLATION}/step.py",
        "                self._fake_score_and_discriminator_backward(sample.used(use), its_batch, last)",
        "                self._fake_score_and_discriminator_backward(self._kept_samples[0][0].used(use), its_batch, last)",
        "tests/training/distillation/test_cheaper_updates.py::test_two_micro_batches_used_twice_are_one_batch_used_twice",
    ),
    Mutation(
        "the fake score learns from the first half",
        "sdxs_lightning/core/batch.py",
        "return self[::nth]",
        "return self[: len(self) // nth]",
        "tests/training/distillation/test_cheaper_updates.py::test_the_fake_score_learns_from_every_second_sample",
    ),
    Mutation(
        "decoupled guidance away from the prompt",
        f"{OBJECTIVES}/decoupled_guidance.py",
        "distribution_matching_gradient(sample.latents, guided, cond.pred_x0)",
        "distribution_matching_gradient(sample.latents, cond.pred_x0, guided)",
        "tests/training/distillation/test_score_terms.py::test_decoupled_guidance_is_the_guidance_at_noise_of_its_own",
    ),
    Mutation(
        "score identity with a score held constant",
        f"{OBJECTIVES}/score_identity.py",
        "terms = (1 - alpha) * difference.square() + difference * (fake_x0 - pred_x0)",
        "terms = (1 - alpha) * difference.square() + difference * (fake_x0.detach() - pred_x0)",
        "tests/training/distillation/test_score_terms.py::test_score_identity_moves_one_gaussian_onto_another",
    ),
    Mutation(
        "one guidance scale for all samples",
        "sdxs_lightning/core/batch.py",
        "is None else self.guidance_scales.view(-1, 1, 1, 1)",
        "is None else self.guidance_scales[:1].view(-1, 1, 1, 1)",
        "tests/training/distillation/test_guidance_input.py::test_the_real_score_is_guided_by_each_samples_scale",
    ),
    Mutation(
        "pairs of another scale than their student is told",
        "sdxs_lightning/pairs/stored_pairs.py",
        "conditioning = self._guide(conditioning, chosen)",
        "conditioning = self._guide(conditioning, positions)",
        "tests/training/distillation/test_guidance_of_pairs.py::"
        "test_pairs_in_memory_have_each_their_scale_and_negative_prompt[sd-v_prediction]",
    ),
    Mutation(
        "adapters on in a controlled real score",
        f"{CONTROLNET}/distillation.py",
        "if isinstance(plain, BaseView):",
        "if False:",
        f"{CONTROLNET_TESTS}::test_adapters_of_the_fake_score_share_the_base_with_a_real_score_that_has_the_controlnet",
    ),
    Mutation(
        "conditions dropped in one half of the GAN",
        f"{CONTROLNET}/distillation.py",
        "        controls = self._control_images(batch)\n        controls = with_some_dropped(",
        "        controls = self._control_images(batch)\n        with_some_dropped(",
        f"{CONTROLNET_TESTS}::test_both_halves_of_the_discriminator_lose_the_same_conditions",
    ),
    Mutation(
        "condition term pushes away",
        f"{OBJECTIVES}/condition_consistency.py",
        "return self.weight * loss,",
        "return -self.weight * loss,",
        "tests/training/test_condition_consistency.py::test_a_step_against_the_gradient_of_condition_consistency_brings_the_image_nearer",
    ),
    Mutation(
        "noise of pairs never redrawn",
        f"{CONTROLNET}/distillation.py",
        "noise = torch.where(redrawn[:, None, None, None], fresh, noise)",
        "noise = torch.where(redrawn[:, None, None, None], noise, noise)",
        f"{CONTROLNET_TESTS}::test_pairs_bring_the_condition_of_their_target_and_some_new_noise",
    ),
    Mutation(
        "features of a discriminator without the ControlNet's residual",
        f"{NETWORKS}/denoiser.py",
        "features = tap.features if mid is None else tap.features + mid",
        "features = tap.features",
        f"{CONTROLNET_TESTS}::test_who_sees_the_condition",
    ),
)
