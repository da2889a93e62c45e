"""What plan, check, extract and ask say, word by word, where no model is needed for it."""

import dataclasses
import io
from contextlib import redirect_stdout
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.errors import refusal
from support.planning import plan_request
from vico.cli import asked, check_report, extract, plan_text
from vico.cli.plan import _num_checkpointed
from vico.data.features import Scan
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.planner.gpu_specs import GPUS, Hardware, gpu_of_size
from vico.planner.plan import describe_layers, plan
from vico.train.config import RunConfig
from vico.video.extract import Share
from vico.video.provenance import Provenance

# vico plan


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 min"),
        (29, "1 min"),
        (91, "2 min"),
        (59 * 60 + 29, "59 min"),
        (59 * 60 + 31, "1 h 00 min"),
        (3600 + 9 * 60, "1 h 09 min"),
        (25 * 3600 + 59 * 60, "25 h 59 min"),
    ],
)
def test_how_long_an_epoch_takes(seconds: float, text: str) -> None:
    assert plan_text.duration(seconds) == text


def test_layers_to_recompute() -> None:
    named = {None: None, "none": 0, "full": 32, "1": 1, "07": 7, "32": 32}
    assert {text: _num_checkpointed(text, 32) for text in named} == named
    for text in ("0", "33", "-1", "1.5", "all", "", "\u0663", "\u00b2"):
        assert refusal(_num_checkpointed, text, 32) == (
            f"--checkpoint_activations {text}: must be none, full or a number of layers from 1 to "
            "32"
        )
    assert [describe_layers(n, 3) for n in range(4)] == [
        "no layer",
        "1 of 3 layers",
        "2 of 3 layers",
        "all layers",
    ]


def test_memory_of_a_plan_adds_up() -> None:
    """The lines that count are the total; the smaller of head and backward says it does not."""
    for model, gpu in (("7B", GPUS["H100"]), ("7B", gpu_of_size(16)), ("33B", gpu_of_size(40))):
        result = plan(plan_request(model, Hardware(gpu, 8)))
        lines = [line.split(maxsplit=1) for line in plan_text._memory_lines(result)]
        counted = [float(number) for number, name in lines if "(not added" not in name]
        has_host = "host memory per node, for weights" in [name for _, name in lines]
        assert has_host == bool(result.memory.host)
        total = sum(counted[:-1] if has_host else counted)
        assert total == pytest.approx(result.memory.total / 2**30, abs=0.05)
        assert sum("(not added" in name for _, name in lines) == 1
        head_is_larger = result.memory.head >= result.memory.backward
        (not_added,) = [name for _, name in lines if "(not added" in name]
        assert not_added.startswith("backward" if head_is_larger else "output head")


def test_flags_of_a_plan() -> None:
    """ZeRO-2's shipped file fits every model; ZeRO-3's has the sizes of this one."""
    small = plan(plan_request("7B", Hardware(GPUS["H100"])))
    flags = f"--max_tokens {small.max_tokens} --checkpoint_activations none"
    assert plan_text._flags_line(small, None) == f"--deepspeed zero2 {flags}"
    assert plan_text._flags_line(small, Path("z.json")) == f"--deepspeed z.json {flags}"
    assert plan_text._ds_config_line(small, None) == "ds_config"
    quantized = plan(plan_request("7B", Hardware(gpu_of_size(12)), quantize="nf4"))
    assert plan_text._flags_line(quantized, None).endswith(" --quantize nf4")
    large = plan(plan_request("65B", Hardware(GPUS["H100"], 8)))
    assert plan_text._flags_line(large, None).startswith("--deepspeed FILE --max_tokens ")
    assert plan_text._ds_config_line(large, None) == "ds_config (--write FILE writes it)"
    assert plan_text._ds_config_line(large, Path("z")) == "ds_config, written to z"


# vico check


def question(number: int, **changes: Any) -> Question:
    texts = f"why {number}?", ("a", "b")
    plain = Question(number, str(number), f"v{number % 2}", "C", *texts, 0, place=f"t:{number}")
    return dataclasses.replace(plain, **changes)


def test_repeated_questions() -> None:
    """The same in all that is asked, under another id; not with other options."""
    different = [question(1), question(3), question(1, options=("b", "a")), question(1, video="x")]
    assert not list(check_report.repeated_question_warnings("train", different))
    same = [question(1, qid=str(number), answer=None) for number in range(3)]
    assert list(check_report.repeated_question_warnings("train", [*different, *same])) == [
        "warning: train: 3 questions are repeated, with the same options, under another id"
    ]


def test_overlaps_of_data_sets() -> None:
    """By video and question, without its case, blanks and mark; none without a shared video."""
    of = check_report._SplitContent.of
    own = {
        "train": of([question(1), question(2)]),
        "val": of([question(1, video="other"), question(4, video="another")]),
    }
    others = [
        question(1, question=" WHY  1 ??"),
        question(1, question="why 1", qid="again"),
        question(2, question="why not?"),
        question(9, video="new"),
    ]
    assert check_report._overlaps(own, others) == ["2 videos and 2 questions with train"]
    assert check_report._overlaps(own, others[3:]) == []


def test_findings_of_a_scan() -> None:
    """In a fixed order, without the videos that questions use but for zeros."""
    scan = Scan(("a", "b"), ("c", "d", "e", "f", "g"), ("a",))
    assert list(check_report.scan_warnings("it", scan, {"a", "c"}, 512)) == [
        "warning: it: 1 videos hold a frame that is all zeros, of an extraction that failed, e.g. "
        "'a'",
        "warning: it: 1 videos are no floating-point tensor [frames >= 1, 512], and no question "
        "uses them, e.g. 'b'",
        "warning: it: 4 videos hold NaN or infinite values, and no question uses them, e.g. 'd', "
        "'e', 'f'",
    ]
    assert not list(check_report.scan_warnings("it", Scan((), (), ()), set(), 512))


class Letters:
    """A tokenizer whose pieces are letters."""

    eos = 0

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + number % 26) for number in ids)


@pytest.mark.parametrize(
    ("sequence", "shown"),
    [
        ((1, 2, 3, 0), "...'a' -> 'bc' and EOS (3 targets of 4 tokens)"),
        ((1, 2, 3), "...'a' -> 'bc', cut (2 targets of 3 tokens)"),
        (
            (1, VIDEO_SLOT, 2, *[3] * 24, 0),
            f"...'ab' -> '{'c' * 24}' ... and EOS (25 targets of 28 tokens)",
        ),
        ((1, 2, *[3] * 24), f"...'ab' -> '{'c' * 24}', cut (24 targets of 26 tokens)"),
        ((*[1] * 30, 2), f"...'{'a' * 24}' -> 'b', cut (1 targets of 31 tokens)"),
    ],
)
def test_samples(sequence: tuple[int, ...], shown: str) -> None:
    """24 tokens before the first target, and 24 of the targets at most; no slots."""
    starts = {4: 1, 3: 1, 28: 3, 26: 2, 31: 30}
    targets = range(starts[len(sequence)], len(sequence))
    tokens = TokenSequence("vqa", sequence, targets, 1)
    letters: Any = Letters()
    assert check_report._describe_sequence(tokens, letters) == shown
    frames = TokenSequence("qav", (1, VIDEO_SLOT, VIDEO_SLOT), range(1, 3), 1)
    assert check_report._describe_sequence(frames, letters) == (
        "...'a' -> the 2 frames of the video (2 targets of 3 tokens)"
    )


# vico extract


def test_what_is_extracted_is_named_once(tmp_path: Path) -> None:
    either = "name VIDEOS or --frames_dir, one of the two; see vico extract --help"
    rate = "--frames_dir and --frames_fps, the rate of its pictures, go together"
    output = ["--encoder", "clip", "--output", str(tmp_path / "f.pth")]
    for words, message in (
        ([], either),
        (["v", "--frames_dir", "d", "--frames_fps", "2"], either),
        (["--frames_dir", "d"], rate),
        (["v", "--frames_fps", "2"], rate),
    ):
        assert refusal(extract.parse, [*words, *output]) == message
    flags = extract.parse(["--frames_dir", "d", "--frames_fps", "30000/1001", *output])
    assert (flags.frames_fps, flags.fps) == (Fraction(30000, 1001), Fraction(1))
    assert (flags.batch_size, flags.precision, flags.keep_damaged) == (32, "fp32", False)
    assert (flags.num_workers, flags.device, flags.compare) == (None, None, None)
    for name in ("x.pt", "x.npy", "x.mp4"):
        assert refusal(extract.parse, ["v", "--encoder", "c", "--output", name]) == (
            f"--output {name}: .pth, .safetensors, or the name of a folder"
        )
    message = "--output ..: name a file or a new folder"
    assert refusal(extract.parse, ["v", "--encoder", "c", "--output", ".."]) == message


@pytest.mark.parametrize(
    ("given", "cores", "num_ranks", "expected"),
    [(3, 64, 1, 3), (None, 64, None, 8), (None, 12, 2, 6), (None, 2, 4, 1), (None, 15, 2, 7)],
)
def test_threads_that_decode(
    given: int | None,
    cores: int,
    num_ranks: int | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As asked; else the cores of the rank, eight at most and one at least."""
    monkeypatch.setattr(extract, "host_cores", lambda: cores)
    monkeypatch.setattr(extract.launcher_env, "local_world_size", lambda: num_ranks)
    flags: Any = SimpleNamespace(num_workers=given)
    assert extract._workers(flags) == expected


def test_how_fast_it_was() -> None:
    """Decoding as of the slowest rank, all of whose threads decode."""
    shares = [Share(num_frames=1000, decode_seconds=8.0, num_workers=2)]
    shares.append(Share(num_frames=500, decode_seconds=5.0, num_workers=1))

    def said(shares: list[Share]) -> str:
        with redirect_stdout(io.StringIO()) as out:
            extract._report(7, shares, 10.0)
        return out.getvalue()

    assert said(shares) == (
        "1,500 frames of 7 videos in 10 s: 150.0 frames/s; decoding alone takes 5.0 s, 300.0 "
        "frames/s\n"
    )
    assert said([Share(num_videos=3)]) == ""
    assert said([Share(num_frames=2)]).endswith("takes 0.0 s, 2000.0 frames/s\n")


def test_videos_that_are_left_out(tmp_path: Path) -> None:
    """One is said in a line; of several, where the others are and what each one lacks."""
    videos: Any = [SimpleNamespace(id=name, path=tmp_path / f"{name}.mp4") for name in "abc"]
    parts: Any = SimpleNamespace(output=Path("f.pth"), folder=Path("f.parts"))
    extract._end(videos, [Share(), Share(damaged={"a": "bad"})], parts)
    one = refusal(extract._end, videos[:1], [Share(left_out={"a": "is cut off"})], parts)
    assert one == f"{tmp_path / 'a.mp4'}: is cut off; nothing is written"
    shares = [Share(left_out={"c": "is cut off"}), Share(left_out={"a": "has no frame"})]
    two = refusal(extract._end, videos, shares, parts)
    assert two == (
        "2 of 3 videos are left out: the other 1 are in f.pth; mend them and start the same "
        "command again, or remove f.parts"
    )
    shares.append(Share(left_out={"b": "x"}))
    assert refusal(extract._end, videos, shares, parts) == (
        "3 of 3 videos are left out: nothing is written"
    )
    with pytest.raises(Exception, match="left out") as caught:
        extract._end(videos, shares[:2], parts)
    error: Any = caught.value
    assert error.of_all_ranks
    assert error.details.splitlines()[1:] == [
        f"  {tmp_path / 'a.mp4'}  has no frame",
        f"  {tmp_path / 'c.mp4'}  is cut off",
    ]


# vico ask

MADE = Provenance("clip", "abcdef0123456789", Fraction(1))


def test_features_beside_those_of_the_training() -> None:
    path = Path("d/f.pth")
    assert asked._compared({}, MADE.digest, Fraction(1)) == (
        "; whether the training's features have this encoder and rate is not recorded"
    )
    assert asked._compared({path: MADE}, MADE.digest, Fraction(1)) == ", as the training's features"
    end = "is at 1 per second by clip (sha256 abcdef01)"
    for digest, rate in ((MADE.digest, Fraction(2)), ("0123456789", Fraction(1))):
        said = asked._compared({path: MADE, Path("g"): MADE}, digest, rate)
        assert said == (
            f" (sha256 {digest[:8]})\nwarning: the training's features are others, so expect wrong "
            f"answers: {path} {end}; g {end}"
        )


def test_the_usual_rate_of_frames() -> None:
    """As recorded for every data set, else what they count in, if that is one rate."""
    one, two = RunConfig(dataset="nextqa"), RunConfig(dataset="nextqa,star")
    half = dataclasses.replace(MADE, fps=Fraction(1, 2))
    assert asked._usual_fps(one, {Path("a"): half}) == Fraction(1, 2)
    assert asked._usual_fps(two, {Path("a"): half, Path("b"): half}) == Fraction(1, 2)
    assert asked._usual_fps(two, {Path("a"): half}) == 1, "of the other it is not recorded"
    assert asked._usual_fps(one, {}) == 1
    assert asked._usual_fps(RunConfig(dataset="tvqa"), {}) == 3
    assert refusal(asked._usual_fps, RunConfig(dataset="nextqa,tvqa"), {}) == (
        "--fps is missing: the features of the run's data sets differ in it"
    )
