"""Metrics of captions by pycocoevalcap: BLEU-1 to 4, ROUGE-L, CIDEr, and METEOR where Java is.

Captions are tokenized first, as that package does: by Stanford's PTBTokenizer where Java is
("ptb"), without punctuation. Otherwise ("plain") they are lower case, and a token is a run of
letters and digits, with the apostrophes inside it. Numbers by one tokenizer are not those by the
other.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.errors import UserError

if TYPE_CHECKING:  # it imports torch, which is slow
    from vico.generation.generate import Generated

PLAIN_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
JAVA_SECONDS = 600.0
PTB = "edu.stanford.nlp.process.PTBTokenizer"
MIN_VIDEOS_OF_CIDER = 2

Tokenized = dict[str, list[str]]  # texts by video, of tokens with a blank between


def require_package() -> None:
    """Raises UserError where pycocoevalcap is not installed."""
    try:
        import pycocoevalcap  # noqa: F401  # an extra
    except ModuleNotFoundError:
        raise UserError(
            "metrics of captions need pycocoevalcap: pip install -e '.[captions]' (the extra "
            "'captions'), or leave the metrics out"
        ) from None


def caption_record(
    dataset: str, video: str, generated: "Generated", references: Sequence[str]
) -> dict[str, Any]:
    """A line of captions_SPLIT.jsonl."""
    return {
        "dataset": dataset,
        "video": video,
        "caption": generated.text,
        "references": list(references),
        "is_cut": generated.is_cut,
    }


def metrics_of(records: Sequence[Mapping[str, Any]], meteor: bool = True) -> dict[str, Any]:
    """`caption_metrics` of such lines, each of which has a reference."""
    texts, references = {}, {}
    for record in records:
        key = f"{record['dataset']}/{record['video']}"
        texts[key], references[key] = record["caption"], record["references"]
    return caption_metrics(texts, references, meteor=meteor)


def caption_metrics(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    java: bool | None = None,
    meteor: bool = True,
) -> dict[str, Any]:
    """bleu_1 to bleu_4, rouge_l, cider and meteor of one caption per video.

    `references`: at least one for each of the same videos. `java`: whether to use it; None: where
    it is found. `meteor`: whether to take METEOR there, which costs seconds and 2 GB.

    Besides: n (captions), n_references, and tokenizer, which is "ptb" or "plain". CIDEr weighs
    words by how many videos' references have them: of one video it is None. Raises UserError where
    pycocoevalcap is not installed.
    """
    require_package()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    assert captions.keys() == references.keys() and captions, "one caption for each video"
    assert all(references.values()), "a reference for each caption"
    uses_java = shutil.which("java") is not None if java is None else java
    hypotheses = {video: [text] for video, text in captions.items()}
    given = {video: list(texts) for video, texts in references.items()}
    tokenize = _by_java if uses_java else _plainly
    tokenizer = "ptb" if uses_java else "plain"
    found, wanted = tokenize(hypotheses), tokenize(given)
    scores, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    metrics: dict[str, Any] = {f"bleu_{i}": float(score) for i, score in enumerate(scores, 1)}
    metrics["rouge_l"] = float(Rouge().compute_score(wanted, found)[0])
    metrics["cider"] = None
    if len(captions) >= MIN_VIDEOS_OF_CIDER:
        metrics["cider"] = float(Cider().compute_score(wanted, found)[0])
    if uses_java and meteor:
        metrics["meteor"] = _meteor(wanted, found)
    counts = {"n": len(captions), "n_references": sum(map(len, given.values()))}
    return {**counts, **metrics, "tokenizer": tokenizer}


def _plainly(texts: Mapping[str, list[str]]) -> Tokenized:
    tokenized = Tokenized()
    for video, of_video in texts.items():
        tokenized[video] = [" ".join(PLAIN_TOKEN.findall(text.lower())) for text in of_video]
    return tokenized


def _by_java(texts: Mapping[str, list[str]]) -> Tokenized:
    """As pycocoevalcap.tokenizer.PTBTokenizer, which writes a file into its own package."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    # A line for each text; one without a word would be no line.
    lines = [" ".join(text.split()) for of_video in texts.values() for text in of_video]
    full = [line for line in lines if line]
    folder = Path(ptbtokenizer.__file__).parent
    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, PTB]
    # Java's own default may be ASCII.
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    environment = {**os.environ, "JAVA_TOOL_OPTIONS": "-Dfile.encoding=UTF-8"}
    try:
        run = subprocess.run(
            [*command, *options],
            input="".join(f"{line}\n" for line in full).encode(),
            capture_output=True,
            cwd=folder,
            env=environment,
            timeout=JAVA_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise _java_error(str(problem)) from None
    split = run.stdout.decode(errors="replace").splitlines()
    if run.returncode or len(split) != len(full):
        raise _java_error(run.stderr.decode(errors="replace").strip().split("\n")[-1])
    of_full = iter(split)
    tokenized = Tokenized()
    rest = iter(lines)
    for video, of_video in texts.items():
        tokenized[video] = []
        for _ in of_video:
            words = next(of_full).split() if next(rest) else []
            kept = [word for word in words if word not in ptbtokenizer.PUNCTUATIONS]
            tokenized[video].append(" ".join(kept))
    return tokenized


def _java_error(reason: str) -> UserError:
    return UserError(
        f"captions: Java's tokenizer failed ({reason}); repair that Java, or take it off the PATH "
        "for the plain tokenizer"
    )


def _meteor(references: Tokenized, captions: Tokenized) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    process = scorer.meteor_p
    try:
        return float(scorer.compute_score(references, captions)[0])
    except (OSError, ValueError) as problem:
        raise UserError(
            f"captions: Java's METEOR failed ({problem}); give it 2 GB of memory, or take Java off "
            "the PATH to leave METEOR out"
        ) from None
    finally:
        process.stdout.close()
        process.stderr.close()
