"""Checks that training can read all samples, for `python -m data.prepare verify`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data.shards.decoders import (
    CAPTION_MEMBERS,
    IMAGE_MEMBERS,
    JSON_MEMBER,
    LATENT_MEMBER,
    READABLE,
    BadSampleError,
    decode,
    latent_shape,
)
from data.shards.layout import CONTENTS, Content, EmptyCaptions
from data.shards.sample_decoder import Reading, SampleDecoder, invalid_fields

Shape = tuple[int, ...]
_EXAMPLES = 3
_MOST_ODD = 20  # per shape and shard; further samples are reported together


class SampleCheck:
    """Finds the samples of one shard that training could not read.

    Args:
        contents: as data.contents of the training; samples are decoded in the same way. None requires a caption and an image
            or latents in every sample.
        empty_captions: as data.empty_captions.

    Raises:
        ValueError: for an unknown content.
    """

    def __init__(self, contents: Sequence[Content] | None, empty_captions: EmptyCaptions) -> None:
        if unknown := sorted(set(contents or ()) - set(CONTENTS)):
            raise ValueError(f"--contents names {', '.join(unknown)}, but it accepts {', '.join(CONTENTS)}.")
        self._decoder = (
            None if contents is None else SampleDecoder(contents, Reading(empty_captions=empty_captions))
        )
        self._empty_captions = empty_captions
        self._samples = 0
        self._unreadable: defaultdict[str, list[str]] = defaultdict(list)
        self.latent_shapes: dict[Shape, list[str]] = {}
        """Keys of samples by shape of their latents."""

    def sample(self, key: str, members: Mapping[str, bytes]) -> Iterator[str]:
        """Yield the errors of one sample.

        Args:
            key: key of the sample.
            members: content by extension.
        """
        self._samples += 1
        found, has_caption = False, False
        for name, content in members.items():
            if name in READABLE:
                try:
                    decoded = decode(name, content, name)
                except BadSampleError as error:
                    found = True
                    yield str(error)
                    continue
                if name == JSON_MEMBER:
                    has_caption |= isinstance(decoded.get("caption"), str)
                    for reason in invalid_fields(decoded):
                        found = True
                        yield f"{name}: {reason}"
                has_caption |= name in CAPTION_MEMBERS
                if name in CAPTION_MEMBERS and not decoded and self._empty_captions == "refuse":
                    found = True
                    yield "the caption is empty"
                if name == LATENT_MEMBER:
                    self.latent_shapes.setdefault(latent_shape(content, name), []).append(key)
        if self._decoder is None:
            self._note_missing(key, set(members), has_caption or found)
        elif not found:
            try:
                self._decoder.decode_members(members, self._samples - 1, "as data.contents reads it")
            except BadSampleError as error:
                yield str(error)

    def _note_missing(self, key: str, names: set[str], has_caption: bool) -> None:
        if not has_caption:
            what = f"no caption ({', '.join(CAPTION_MEMBERS)}, or 'caption' in {JSON_MEMBER})"
            self._unreadable[what].append(key)
        if not names & {*IMAGE_MEMBERS, LATENT_MEMBER}:
            held = ", ".join(sorted(names)[:_EXAMPLES]) or "nothing"
            what = f"neither an image ({', '.join(IMAGE_MEMBERS)}) nor latents ({LATENT_MEMBER})"
            dotted = any(name.rpartition(".")[2] in IMAGE_MEMBERS for name in names if name not in READABLE)
            hint = ": a key ends at the first dot of a file's name" if dotted else ""
            self._unreadable[f"{what}, but {held}{hint}"].append(key)

    def shard(self) -> Iterator[str]:
        """Yield the errors of the complete shard."""
        for what, keys in self._unreadable.items():
            if len(keys) * 2 > self._samples:
                names = ", ".join(repr(key) for key in keys[:_EXAMPLES])
                yield (
                    f"{len(keys)} of {self._samples} samples have {what} (the first: {names}), so no training can read "
                    "them; if one should, name what it reads with --contents (captions for captions alone)"
                )


def odd_latents(
    shards: Iterable[tuple[str, Mapping[Shape, Sequence[str]]]],
) -> Iterator[tuple[str, str, str]]:
    """Samples whose latents differ in shape from most of a set, for training without data.buckets: shard, key, reason.

    Args:
        shards: location and `SampleCheck.latent_shapes` of each.
    """
    found = list(shards)
    counts: defaultdict[Shape, int] = defaultdict(int)
    for _, shapes in found:
        for shape, keys in shapes.items():
            counts[shape] += len(keys)
    if len(counts) < 2:
        return
    usual = max(counts, key=lambda shape: counts[shape])
    for location, shapes in found:
        for shape, keys in shapes.items():
            if shape == usual:
                continue
            reason = (
                f"{shape}, but those of {counts[usual]} of {sum(counts.values())} samples {usual}; write sets of one shape, or "
                "verify with --buckets if the training has data.buckets"
            )
            if len(keys) > _MOST_ODD:
                yield location, "", f"the latents of {len(keys)} samples, {keys[0]!r} the first, are {reason}"
            else:
                yield from ((location, key, f"its latents are {reason}") for key in keys)
