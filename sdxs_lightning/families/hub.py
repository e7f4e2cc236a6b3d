"""Fetches models from the Hugging Face hub into its cache, limited to the needed files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from sdxs_lightning.core.hub_ids import HUB_ID, is_hub_id
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.weights import pickled, weight_files

__all__ = ["fetch", "is_hub_id", "needed_files"]


def fetch(name: str, key_file: str, components: Sequence[str], weights: bool = True) -> Path:
    """Returns the snapshot of a model, downloaded unless the cached one is complete.

    The cache is preferred, so that a run starts the same with and without network, and 64 processes do not query the hub 64
    times; to use a branch that has moved since, give the new `@revision`.

    Args:
        name: `org/name`, or `org/name@revision` with a branch, tag or commit.
        key_file: the file that identifies the model, such as "model_index.json".
        components: sub-folders to fetch; missing ones are skipped.
        weights: False fetches configs and tokenizers only.

    Returns:
        The snapshot's folder in the cache (HF_HUB_CACHE).

    Raises:
        FileNotFoundError: if it is not cached and offline, or does not exist, or access is denied.
        ValueError: if a component has only pickled weights.
    """
    match = HUB_ID.fullmatch(name)
    assert match is not None
    repo, revision = match["repo"], match["revision"]
    cached = _cached(repo, revision, key_file, components, weights)
    if cached is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"the hub model '{name}' is not complete in the cache {constants.HF_HUB_CACHE} and the network is switched "
            "off (HF_HUB_OFFLINE); fetch it once where there is network, or give a folder."
        )
    return _download(name, repo, revision, key_file, components, weights)


def needed_files(
    names: Sequence[str], key_file: str, components: Sequence[str], weights: bool = True
) -> list[str]:
    """Selects the files of a repository that a base needs.

    Plain weights, or fp16 ones if a component has no others; never both, and never pickles, flax, onnx or top-level
    checkpoints.

    Raises:
        ValueError: if a component has only pickled weights.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        folders[folder].append(file)
    chosen = [key_file] if key_file in names else []
    for component in components:
        files = folders.get(component, [])
        prefix = f"{component}/" if component else ""
        found = weight_files(files)
        if weights and found is None and (bad := pickled(files)) is not None:
            raise ValueError(
                f"its {prefix}{bad} is a pickle, which runs code when it is loaded, and there are no .safetensors"
            )
        chosen += [prefix + file for file in files if _is_text(file)]
        chosen += [prefix + file for file in (found.names if weights and found else [])]
    return sorted(set(chosen))


def _is_text(file: str) -> bool:
    return file.endswith((".json", ".txt")) and ".index." not in file


def _cached(
    repo: str, revision: str | None, key_file: str, components: Sequence[str], weights: bool
) -> Path | None:
    found = try_to_load_from_cache(repo, key_file, revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parents[key_file.count("/")]
    for component in components:
        path = folder / component
        names = [file.name for file in path.iterdir()] if path.is_dir() else []
        # Only networks have a config.json; tokenizers and the scheduler have other files. vae_large is optional.
        empty = not names and component != "vae_large"
        if empty or (weights and "config.json" in names and not _is_complete(path, names)):
            return None
    return folder


def _is_complete(folder: Path, names: list[str]) -> bool:
    found = weight_files(names)
    index = next((name for name in found.names if name.endswith(".json")), None) if found else None
    if index is None:
        return found is not None
    return set(read_json(folder / index)["weight_map"].values()) <= set(names)


def _download(
    name: str, repo: str, revision: str | None, key_file: str, components: Sequence[str], weights: bool
) -> Path:
    api = HfApi()
    try:
        files = needed_files(
            api.list_repo_files(repo, revision=revision), key_file, components, weights=weights
        )
        others = [file for file in files if file != key_file]
        snapshot = Path(api.snapshot_download(repo, revision=revision, allow_patterns=others))
        # Last, and of the same commit: its presence in the cache means that the download is complete.
        api.hf_hub_download(repo, key_file, revision=snapshot.name)
        return snapshot
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"the hub model '{name}' is gated: accept its terms on its page and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"the hub model '{repo}' has no revision '{revision}'.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no model '{name}' on the hub, or it is private and you are not logged in."
        ) from error
    except ValueError as error:
        raise ValueError(f"the hub model '{name}' cannot be used: {error}.") from error
    except Exception as error:  # the hub client's HTTP library has its own errors
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise FileNotFoundError(
            f"the hub model '{name}' is not complete in the cache {constants.HF_HUB_CACHE} and could not be fetched "
            f"({type(error).__name__}: {first})."
        ) from error
