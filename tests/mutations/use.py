"""Mutations of what guards resumed runs, measured numbers and damaged data."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

CORE, CALLBACKS, RESUME = "sdxs_lightning/core", "sdxs_lightning/callbacks", "tests/training/resume"
RIGHT, SHARDS = "tests/evaluation/metrics/test_right", "data/shards"

MUTATIONS = (
    # What guards a resumed run.
    Mutation(
        "a frozen network left out of the identity",
        f"{CALLBACKS}/run_identity.py",
        "        if isinstance(value, Frozen):\n            yield here, value",
        "        if isinstance(value, Frozen) and not prefix:\n            yield here, value",
        f"{RESUME}/test_run_identity.py::test_networks_of_terms_and_those_that_load_on_first_use_are_compared",
    ),
    Mutation(
        "prediction type left out of the identity",
        f"{CALLBACKS}/run_identity.py",
        'identity["prediction_type"] = family.prediction_type',
        "pass",
        f"{RESUME}/test_run_identity.py::test_another_base_is_refused[prediction type]",
    ),
    Mutation(
        "heads and activations left out of the identity",
        f"{CALLBACKS}/run_identity.py",
        "if isinstance(network, ConfigMixin | PreTrainedModel) and not inside:",
        "if False:",
        f"{RESUME}/test_run_identity.py::test_what_weights_do_not_tell_is_compared",
    ),
    Mutation(
        "tokenizers left out of the identity",
        f"{CALLBACKS}/run_identity.py",
        "if tokenizers is not None:",
        "if False:",
        f"{RESUME}/test_run_identity.py::test_what_weights_do_not_tell_is_compared",
    ),
    Mutation(
        "checksum not verified",
        f"{CALLBACKS}/checkpoint_folder.py",
        "if wanted.get(name, value) != value",
        "if False",
        f"{RESUME}/test_checkpoint_choice.py::test_a_changed_checkpoint_is_passed_over_for_an_older_one[bit]",
    ),
    Mutation(
        "checkpoints ordered by time",
        f"{CALLBACKS}/checkpoint_folder.py",
        "return self.starts, self.batches, self.student_updates",
        "return int(self.saved_at), self.batches, self.student_updates",
        f"{RESUME}/test_checkpoint_choice.py::test_a_clock_that_is_ahead_deletes_nothing",
    ),
    Mutation(
        "a changed manifest believed",
        f"{CALLBACKS}/checkpoint_folder.py",
        "return manifest if typed and whole else None",
        "return manifest if typed else None",
        f"{RESUME}/test_checkpoint_choice.py::test_a_manifest_that_has_changed_is_no_manifest",
    ),
    Mutation(
        "lock ignored",
        f"{CALLBACKS}/run_folder.py",
        "if self._is_alive(owner):",
        "if False:",
        f"{RESUME}/test_run_lock.py::test_a_lock_of_another_host_is_watched",
    ),
    Mutation(
        "learning rate of the checkpoint kept",
        f"{CALLBACKS}/optimizer_settings.py",
        'group["lr"] = group["lr"] * new_lr / old_lr if old_lr else new_lr',
        "pass",
        f"{RESUME}/test_optimizer_settings.py::test_a_restored_schedule_goes_on_as_if_begun_with_the_new_rate",
    ),
    Mutation(
        "a class of anyone imported",
        "sdxs_lightning/trust.py",
        "                return False\n        return False",
        "                return False\n        return True",
        "tests/config/test_trust.py::test_what_loads_code_is_refused_below_trusted_packages_too",
    ),
    Mutation(
        "a command made by braces",
        f"{SHARDS}/locations.py",
        "for expanded in _expanded(str(pattern))",
        "for expanded in expand_braces(str(pattern))",
        "tests/data/shards/test_shard_index.py::test_braces_make_no_command",
    ),
    Mutation(
        "a mistyped path looked for on the hub",
        f"{CORE}/hub_ids.py",
        "path.parts[0] in PATHS or path.parent.is_dir()",
        "path.parts[0] in PATHS",
        "tests/families/test_foreign.py::test_hub_ids",
    ),
    # What a measured number depends on.
    Mutation(
        "order of captions left out of their digest",
        "evaluation/images/prompt_list.py",
        "json.dumps(list(captions))",
        "json.dumps(sorted(captions))",
        f"{RIGHT}_numbers.py::test_captions_in_another_order_are_measured_again",
    ),
    Mutation(
        "scheduler left out of the model hash",
        f"{CORE}/model_hash.py",
        "path.parts[0] not in NOT_MEASURED",
        'path.parts[0] not in (*NOT_MEASURED, "scheduler")',
        f"{RIGHT}_numbers.py::test_a_configuration_of_the_model_counts[scheduler/scheduler_config.json-prediction_type-v_prediction]",
    ),
    Mutation(
        "linked folders left out of the model hash",
        f"{CORE}/model_hash.py",
        "        if path.is_dir():",
        "        if path.is_dir() and not path.is_symlink():",
        f"{RIGHT}_numbers.py::test_a_model_hash_is_over_linked_folders_too",
    ),
    Mutation(
        "shards known by sizes",
        "evaluation/images/shard_images.py",
        'checksum(one or b"")',
        'str(len(one or b""))',
        f"{RIGHT}_numbers.py::test_shards_are_known_by_their_images_alone",
    ),
    Mutation(
        "a covariance with negative eigenvalues believed",
        "evaluation/metrics/statistics.py",
        "    _check_covariance(covariance, path)\n",
        "",
        f"{RIGHT}_numbers.py::test_statistics_that_are_none_are_refused_before_anything_is_measured",
    ),
    Mutation(
        "names in the order of text",
        "evaluation/images/image_sets.py",
        "return [int(part) if place % 2 else part for place, part in enumerate(parts)], name",
        "return parts[:0], name",
        f"{RIGHT}_captions.py::test_numbered_images_are_in_the_order_of_their_numbers",
    ),
    Mutation(
        "captions matched by file name alone",
        "evaluation/images/prompt_list.py",
        'places = by_path.get(without_ending(name)) or by_file.get(key(name) or "", [])',
        'places = by_file.get(key(name) or "", [])',
        f"{RIGHT}_captions.py::test_names_match_by_relative_path_first_and_never_by_chance",
    ),
    Mutation(
        "alpha composed under the protocols of tools that drop it",
        "evaluation/images/shard_images.py",
        'return opened.convert("RGB")',
        "return decode_pil(content, upright=False)",
        f"{RIGHT}_images.py::test_sixteen_bits_are_scaled_and_alpha_is_dropped",
    ),
    Mutation(
        "16 bits clipped",
        f"{CORE}/image_formats.py",
        "grey = (values >> 8).astype(np.uint8)",
        "grey = values.clip(0, 255).astype(np.uint8)",
        "tests/data/shards/test_shard_images.py::test_16_bit_grey_is_scaled_and_not_clipped",
    ),
    # What a damaged sample does.
    Mutation(
        "EXIF not applied",
        f"{SHARDS}/images.py",
        "exif = orientation(opened) if upright else 1",
        "exif = 1",
        "tests/data/shards/test_shard_images.py::test_the_orientation_of_cameras_is_applied",
    ),
    Mutation(
        "a PNG decoded for its EXIF, and its error with it",
        f"{SHARDS}/images.py",
        "            opened.load()  # raises",
        "            orientation(opened)\n            opened.load()  # raises",
        "tests/data/shards/test_shard_images.py::test_a_png_with_a_part_of_zeros_was_cut",
    ),
    Mutation(
        "errors of a decoder outside the budget",
        f"{SHARDS}/sample_decoder.py",
        "        except (BadSampleError, UserError):\n            raise\n        except Exception as error:",
        "        except BadSampleError as error:",
        "tests/data/shards/test_shard_faults.py::test_a_condition_that_fails_on_one_image",
    ),
    Mutation(
        "a block of zeros taken for the end of a tar",
        f"{SHARDS}/tar_headers.py",
        "            _check_end(path, data, at, total)\n",
        "",
        "tests/data/shards/test_shard_damage.py::test_what_follows_the_end_of_a_tar_is_not_passed_over",
    ),
    Mutation(
        "a cached shard of another state served",
        f"{SHARDS}/remote/shard_cache.py",
        "-{_digest(f'{stamp.size} {stamp.mark}')[:8]}.tar",
        ".tar",
        "tests/data/shards/test_shard_damage.py::test_a_replaced_shard_is_fetched_again_and_its_index_is_its_own",
    ),
)
