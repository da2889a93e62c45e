"""Fingerprints of large files, taken by all ranks together.

Ranks that see the same files share the reading; the others read their own, so that what is compared
afterwards is the whole of what each host has. The ranks meet every few seconds: progress is shown,
an error of one is every rank's, and what is done is kept in the cache, also when the run is cut.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from vico.checkpoint.fingerprint import (
    Sources,
    TensorSet,
    backbone_tensors,
    feature_tensors,
    of_texts,
)
from vico.distributed.cores import host_cores
from vico.distributed.launcher_env import host_name
from vico.distributed.world import World
from vico.errors import UserError
from vico.io import log
from vico.io.digest import digest_json
from vico.io.file_cache import FileCache, cache_key, file_stamp
from vico.io.input_files import InputFiles
from vico.train.rank_consistency import require_same_inputs

ROUND_SECONDS = 10.0  # of digesting, until the ranks meet
BATCH_BYTES = 1 << 28  # per thread, between two looks at the clock
MIN_GB_TO_ANNOUNCE = 2.0
MAX_THREADS = 8

Digests = dict[str, str]  # by tensor


def of_run(
    sources: Sources,
    recorded: Mapping[str, str],
    files: InputFiles,
    cache: FileCache,
    world: World,
    verify: bool,
) -> dict[str, str]:
    """The fingerprints of all that a run's result depends on. A collective of all ranks.

    `recorded`: those of the checkpoint that they will be compared with; empty without one.
    They are the same on every rank: raises UserError, on all ranks, where hosts have other files,
    and as `take` does.
    """
    world.set_phase("taking fingerprints")
    with world.raise_together():
        texts = of_texts(sources, recorded)
        features = []  # of files that are watched as long as the run goes on
        for prefix, inputs, questions in sources.parts():
            features.append(feature_tensors(inputs.features, questions, prefix))
        sets = [backbone_tensors(sources.weights), *features]
    fingerprints = texts | take(sets, files, cache, world, verify)
    require_same_inputs(world, fingerprints)
    paths = [path for tensors in features for path in tensors.paths]
    files.compare_by(paths, partial(_are_as_digested, features, fingerprints, world))
    return fingerprints


def _are_as_digested(
    sets: Sequence[TensorSet], fingerprints: Mapping[str, str], world: World, path: Path
) -> bool:
    """Whether the tensors still have these fingerprints. Reads all of them, on this rank alone.

    `path`: a file whose entry has changed.
    """
    phase = world.phase
    try:
        are_same = all(_is_as_digested(tensors, fingerprints, world) for tensors in sets)
    except UserError:  # a wrong checksum
        return False
    world.set_phase(phase)
    if are_same:
        world.print_rank0(
            f"{path}: its entry changed during the run (chmod, ln), and its content did not; "
            "the run goes on"
        )
    return are_same


def _is_as_digested(tensors: TensorSet, fingerprints: Mapping[str, str], world: World) -> bool:
    digests = Digests()
    for new in _digest_in_rounds(tensors, list(tensors.num_bytes), {}, _num_threads(world)):
        digests |= new
        world.set_phase(f"comparing the {tensors.what} again: {len(digests)} tensors")
    return tensors.fingerprints(digests).items() <= fingerprints.items()


def take(
    sets: Sequence[TensorSet], files: InputFiles, cache: FileCache, world: World, verify: bool
) -> dict[str, str]:
    """The fingerprints of all sets. A collective of all ranks; `files` are those of this rank.

    `verify`: each host reads all by itself, also what looks like a shared file. Raises UserError,
    on all ranks, for a wrong checksum and for a file that changes meanwhile.
    """
    fingerprints: dict[str, str] = {}
    for tensors in sets:
        fingerprints |= _take_one(tensors, files, cache, world, verify)
    return fingerprints


def _take_one(
    tensors: TensorSet, files: InputFiles, cache: FileCache, world: World, verify: bool
) -> dict[str, str]:
    key = cache_key(f"{tensors.what} digests", *map(file_stamp, tensors.paths), tensors.groups)
    known = cache.get(key) or {"fingerprints": None, "digests": {}}
    stamps = [files.stamp(path) for path in tensors.paths]
    group = digest_json([stamps, tensors.groups, host_name() if verify else None])
    reports = world.gather_objects((group, known["fingerprints"]))
    sharers = [rank for rank, (other, _) in enumerate(reports) if other == group]
    done = [known for other, known in reports if other == group and known is not None]
    share = [] if done else _share(tensors.num_bytes, sharers.index(world.rank), len(sharers))
    progress = _ProgressLines(tensors, world, len(sharers))
    rounds = _digest_in_rounds(tensors, share, known["digests"], _num_threads(world))
    digests = _gather_rounds(rounds, group, progress, files, cache, key, world)
    fingerprints: dict[str, str] = done[0] if done else tensors.fingerprints(digests)
    cache.put(key, {"fingerprints": fingerprints, "digests": {}})
    return fingerprints


def _gather_rounds(
    rounds: Iterator[Digests],
    group: str,
    progress: "_ProgressLines",
    files: InputFiles,
    cache: FileCache,
    key: str | None,
    world: World,
) -> Digests:
    """The digests of this rank's group, after every rank has done its rounds."""
    digests: Digests = {}
    while True:
        world.set_phase(progress.phase(digests))
        with world.raise_together():
            own = next(rounds, None)
            files.check_unchanged()
        reports: list[tuple[str, Digests | None]] = world.gather_objects((group, own))
        if all(new is None for _, new in reports):
            return digests
        for of_group, new in reports:
            if of_group == group and new is not None:
                digests |= new
        cache.put(key, {"fingerprints": None, "digests": digests})
        if world.is_first_of_host:
            cache.flush()
        progress.show(digests)


def _share(num_bytes: Mapping[str, int], position: int, size: int) -> list[str]:
    """The tensors that one of `size` readers takes: neighbours, about as many bytes for each."""
    total, before = max(1, sum(num_bytes.values())), 0
    share = []
    for name, count in num_bytes.items():
        if before * size // total == position:
            share.append(name)
        before += count
    return share


def _digest_in_rounds(
    tensors: TensorSet, share: Sequence[str], known: Mapping[str, str], num_threads: int
) -> Iterator[Digests]:
    """The digests of a rank's share: first those that are known, then what each round adds."""
    if share:
        yield {name: known[name] for name in share if name in known}
    unknown = [name for name in share if name not in known]
    with ThreadPoolExecutor(num_threads) as pool:
        new: Digests = {}
        deadline = time.monotonic() + ROUND_SECONDS
        for batch in _batches(unknown, tensors.num_bytes, num_threads * BATCH_BYTES):
            new |= dict(zip(batch, pool.map(tensors.digest, batch), strict=True))
            if time.monotonic() > deadline:
                yield new
                new, deadline = {}, time.monotonic() + ROUND_SECONDS
        if new:
            yield new


def _batches(names: Sequence[str], num_bytes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Neighbours of `limit` bytes, or a little more."""
    batch: list[str] = []
    size = 0
    for name in names:
        batch.append(name)
        size += num_bytes[name]
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_threads(world: World) -> int:
    """This rank's part of its host's cores."""
    num_ranks = sum(member.host == host_name() for member in world.members) or 1
    return max(1, min(MAX_THREADS, host_cores() // num_ranks))


class _ProgressLines:
    """Lines and phases with GB and minutes, of the files that this rank shares with others."""

    def __init__(self, tensors: TensorSet, world: World, num_sharers: int) -> None:
        self._tensors, self._world = tensors, world
        self._num_gb = sum(tensors.num_bytes.values()) / 1e9
        self._started, self._shared_by = time.monotonic(), f"{num_sharers} rank(s) share the work"

    def phase(self, digests: Digests) -> str:
        return f"taking fingerprints of the {self._tensors.what}: {self._gb(digests)}"

    def _gb(self, digests: Digests) -> str:
        done = sum(self._tensors.num_bytes[name] for name in digests) / 1e9
        return f"{done:.1f} of {self._num_gb:.1f} GB"

    def show(self, digests: Digests) -> None:
        """On rank 0, for what takes long."""
        if self._num_gb < MIN_GB_TO_ANNOUNCE or not self._world.is_main:
            return
        minutes = (time.monotonic() - self._started) / 60
        log.info(
            f"{self._tensors.what}: {self._gb(digests)} read in {minutes:.1f} min, once: "
            f"{self._shared_by}, and what is done is kept"
        )
